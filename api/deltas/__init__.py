"""Deltas: making them, looking at them, downloading them."""
