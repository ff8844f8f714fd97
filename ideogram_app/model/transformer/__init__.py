"""Both transformers, written for drawing one picture at a time, and how a checkpoint fills them.

Its modules (this list is made by tools/docs.py):

    assemble.py     Assembling a transformer from named tensors: which layer is made of which, in the order of use.
    backbone.py     Ideogram 4's diffusion transformer (DiT): block, trunk and backbone, for one picture at a time.
    conditioner.py  Conditioning: text projection, time embedding, adaLN modulation, rotary angles, once per picture.
    layers.py       Quantized Linear layers, one class per storage (FP8, INT8, GGUF), and their merging.
"""
