"""The `deltadock` command, and what it starts: one process, or a whole system."""
