"""Uploads: files on their way to become a checkpoint or a calibration text."""
