"""Matrix decompositions, quantizers and bit allocation; no model, no files."""
