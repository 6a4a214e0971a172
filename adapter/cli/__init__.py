"""The command line: the human edge."""
