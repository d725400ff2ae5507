"""From matrices to the encodings of a whole checkpoint, block by block."""
