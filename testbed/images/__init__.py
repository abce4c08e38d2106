"""Container images for a lab's machines: made here in seconds, from this machine's own files."""
