"""Captions to text features: tokenizer, Qwen3-VL's text side, and where it runs.

Its modules (this list is made by tools/docs.py):

    encoder.py    The text encoder, text side alone: built without memory for its weights, then filled matrix by matrix.
    features.py   Captions to text features: Qwen3-VL's decoder layers, tapped at 13 depths.
    on_device.py  The text encoder on a device, for as long as it reads a caption.
    qwen.py       Qwen3-VL's text side, written for inference: token ids to hidden states, layer by layer.
    tokenizer.py  Captions to token ids, from the files of a tokenizer folder.
"""
