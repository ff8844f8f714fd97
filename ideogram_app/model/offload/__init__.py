"""Offload: blocks that live in RAM or on disk and are copied to the device ahead of their use.

Its modules (this list is made by tools/docs.py):

    carrier.py       How bytes get from host memory to where a device computes: at once, or beside the computation.
    located.py       Where the large tensors of a block lie in its recipe's file, so that they can be read again instead
                     of being kept.
    offload.py       What is on the device, and when: one mechanism for transformers of every recipe and for the text
                     encoder.
    packed_block.py  A module as one run of bytes: what of it stays in host memory, what is read from its file again,
                     where it goes.
    ring.py          A few places on a device that many blocks take in turn, each brought there ahead of its use.
"""
