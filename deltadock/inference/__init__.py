"""The inference node: one base model in memory, any of its deltas a request away."""
