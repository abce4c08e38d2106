"""Docker engines: the one that is here already, or a private one that leaves no trace."""
