"""What every folder of Deltadock shares: errors, settings, logs and the version."""

__version__ = "0.1.0"
