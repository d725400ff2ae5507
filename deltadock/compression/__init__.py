"""Compression: calibration, quantization, allocation, distillation and quality of deltas.

Knows no database, queue or HTTP. Importing this package imports no torch: `options` and
`preview` are plain Python.
"""
