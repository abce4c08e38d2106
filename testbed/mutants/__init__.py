"""Proof that each check can fail: known faults, made one by one in a running lab."""
