"""The commands of `testbed`, a module each, imported only when asked for."""
