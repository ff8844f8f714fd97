"""Captions to text features: tokenizer, Qwen3-VL's text side, and where it runs.

Its modules (this list is made by tools/docs.py):

    encoder.py    Loading the text encoder from published or prepared files, quantized matrix by matrix.
    features.py   Text features of a caption from 13 decoder layers of Qwen3-VL, and the cache of the last ones.
    on_device.py  Staged or streamed text encoder: on the device while it encodes a caption, freed afterwards.
    qwen.py       Qwen3-VL's text model, written for inference: token ids to hidden states, layer by layer.
    tokenizer.py  Tokenizer of captions: chat template and token ids, from the files of a tokenizer folder.
"""
