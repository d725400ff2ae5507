"""Decompositions, quantizers and allocations of one matrix or of all; no model, no files."""
