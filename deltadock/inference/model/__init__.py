"""The base model with per-row deltas: layers, attention, cache, loading."""
