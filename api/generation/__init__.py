"""Text generation through the inference nodes, by delta or base."""
