"""containerlab: the program, and a place to run it where it changes nothing of this machine."""
