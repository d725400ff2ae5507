"""A checkpoint as a model that runs block by block, forwards and backwards."""
