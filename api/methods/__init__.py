"""The catalogue of compression methods."""
