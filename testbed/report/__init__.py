"""What a run says at its end: a table, JUnit XML and checks.json."""
