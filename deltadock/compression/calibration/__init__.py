"""Calibration text from files, conversations or the fine-tuned model, as token windows."""
