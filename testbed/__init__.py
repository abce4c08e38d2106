"""Test-bed orchestrator and conformance suite for flannel."""

__version__ = "0.1.0"
