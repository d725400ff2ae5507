"""Run a checkpoint block by block, forward and backward."""
