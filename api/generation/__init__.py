"""Answers from the inference node, for a delta or a base."""
