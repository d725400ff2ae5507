"""PEFT LoRA adapters as delta files."""
