"""Following one packet over every interface between two ends of a lab."""
