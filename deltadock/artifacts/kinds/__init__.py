"""The kinds of encoding, one module each: what a record implies, how to write it and read it."""
