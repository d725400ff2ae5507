"""The Python client, the `deltadock` command and what starts whole systems."""
