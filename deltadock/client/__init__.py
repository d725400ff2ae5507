"""The Python client: the REST interface, and deltas in `transformers` models."""
