"""From what is asked to tokens: tokenizers, chat templates, generation configs."""
