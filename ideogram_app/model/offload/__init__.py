"""Offload: blocks that live in RAM or on disk and are copied to the device ahead of their use.

Its modules (this list is made by tools/docs.py):

    offload.py       CPU and disk offload: hooks that have blocks copied to slots on the device before their use.
    packed_block.py  Packed block, the unit of offload: a module's tensors as one run of bytes.
    ring.py          Ring buffer of device slots: offloaded blocks are prefetched, each copied ahead of its use.
"""
