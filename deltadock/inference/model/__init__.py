"""The base with its per-row delta modules, attention and cache; what a delta changes in it."""
