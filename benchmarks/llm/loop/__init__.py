"""The loop of language models: sample answers, verify, keep the right ones, fine-tune, again."""
