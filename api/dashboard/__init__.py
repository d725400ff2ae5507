"""The dashboard: stored deltas, their fidelity, running jobs and nodes."""
