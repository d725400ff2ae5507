"""Tensors in, codes out: one module per method; knows no database, queue or HTTP.

Importing this package imports no torch: `deltadock.compression.catalogue` is for every process.
"""
