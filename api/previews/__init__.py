"""Sizes of artifacts that have not been made."""
