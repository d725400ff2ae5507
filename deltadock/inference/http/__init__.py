"""The node's routes, bodies and answers."""
