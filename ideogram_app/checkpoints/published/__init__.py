"""Published checkpoints of any layout, read as tensors under one set of names.

Its modules (this list is made by tools/docs.py):

    codecs.py        Codecs of published tensors: dense, FP8, INT8, NF4, GGML; one table row each, with shape check and
                     dequantizing.
    component.py     Published checkpoint of one component, transformer or text encoder: tensors checked, then read by
                     rows.
    layouts.py       Published layouts of Ideogram 4's transformers, one table row each; component.py recognises them in
                     files.
    local.py         Local weights: the folder or file that a model is read from, given by the user or shipped with the
                     program.
    tensor_names.py  Names of tensors in published files, parsed and translated: prefixes, suffixes, Ideogram's and
                     diffusers' names.
    text_encoder.py  Text encoder from published weights of any layout: names translated, shape and config found,
                     tensors by rows.
    transformer.py   Transformers from published weights of any layout: the pair of files found, names and shapes
                     checked, rows read.
"""
