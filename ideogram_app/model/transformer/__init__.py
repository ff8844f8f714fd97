"""Both transformers, written for drawing one picture at a time, and how a checkpoint fills them.

Its modules (this list is made by tools/docs.py):

    assemble.py     Tensors by their names -> a backbone: which layer is made of which, in the order in which they are
                    used.
    backbone.py     Ideogram 4's transformer, written for drawing one picture at a time.
    conditioner.py  What a prompt and a schedule come down to, computed once for a whole picture.
    layers.py       A Linear layer per storage, and the merging of layers that read one input.
"""
