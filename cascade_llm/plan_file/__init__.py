"""Step plans in a file, so that a bug report is a file."""
