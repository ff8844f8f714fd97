"""The transformers in memory: a Linear per storage, and how a checkpoint fills them.

layers.py   Linear layers whose weights stay packed: FP8, INT8 and GGUF blocks
"""
