"""Benchmarks, one script per question; results/ has their output."""
