"""Typed questions to a node: what it captured, and the state of its kernel."""
