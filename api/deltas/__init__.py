"""Deltas: creating, listing and downloading them."""
