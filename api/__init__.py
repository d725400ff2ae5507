"""The REST api and the dashboard: a module or folder per domain."""
