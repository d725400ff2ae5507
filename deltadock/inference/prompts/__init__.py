"""Prompts as tokens and tokens as text: tokenizer, chat templates and their sandbox."""
