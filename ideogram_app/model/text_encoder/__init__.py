"""Captions to text features: tokenizer, Qwen3-VL's text side, and where it runs."""
