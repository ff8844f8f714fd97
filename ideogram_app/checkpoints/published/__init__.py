"""Published checkpoints of any layout, read as tensors under one set of names.

Its modules (this list is made by tools/docs.py):

    codecs.py        How a stored tensor becomes weights: one row for every packing that published files of this model
                     use.
    component.py     A transformer or text encoder in published files: every tensor accounted for, read whole or some
                     rows at a time.
    layouts.py       The layouts in which Ideogram 4's transformers are published, one frozen row each, and which of
                     them files have.
    local.py         The published sources of weights, one frozen row each.
    tensor_names.py  What a stored tensor's name says: which transformer it belongs to, which weight, and which part of
                     that weight.
    text_encoder.py  The text encoder's weights from any published layout, tensor by tensor and row by row.
    transformer.py   A transformer's weights from any published layout, by their official names.
"""
