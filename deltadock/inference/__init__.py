"""The inference node: one base model in memory and any of its deltas on request."""
