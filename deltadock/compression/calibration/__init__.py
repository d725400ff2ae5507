"""From files, conversations or the fine-tuned model itself to token windows."""
