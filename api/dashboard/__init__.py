"""The dashboard: what is stored, how faithful it is, and what is being made."""
