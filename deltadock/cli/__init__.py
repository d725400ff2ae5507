"""The `deltadock` command and the processes that it starts."""
