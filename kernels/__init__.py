"""GPU kernels, one folder per operation: its truth in PyTorch, its Triton form, the dispatch."""
