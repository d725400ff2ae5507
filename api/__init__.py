"""The HTTP face: a folder per domain, each with its endpoints, schemas and service."""
