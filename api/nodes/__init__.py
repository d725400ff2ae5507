"""Inference nodes: who is there, what they hold, and which one a request goes to."""
