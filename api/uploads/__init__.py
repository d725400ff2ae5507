"""Uploads: receiving files that become a checkpoint or a calibration text."""
