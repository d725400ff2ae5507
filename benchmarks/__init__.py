"""Measurements: what the methods keep, what they cost, and the pairs to measure them on."""
