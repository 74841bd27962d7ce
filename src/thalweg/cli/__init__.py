"""The command line: one file per command, each of which imports what is heavy only when it runs."""
