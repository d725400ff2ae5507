"""Deltas in tiers: blob store, local disk, host memory, device slots."""
