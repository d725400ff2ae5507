"""Bases: checkpoints that deltas are made against."""
