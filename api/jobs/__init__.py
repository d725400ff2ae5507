"""Jobs: how far a compression is, and stopping it."""
