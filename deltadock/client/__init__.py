"""The Python client: HTTP, and deltas in `transformers` models."""
