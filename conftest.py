"""Loads the test-bed's pytest plugin, and nothing else."""

pytest_plugins = ["testbed.plugin"]
