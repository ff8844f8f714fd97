"""Offload: blocks that live in RAM or on disk and are copied to the device ahead of their use.

Its modules (this list is made by tools/docs.py):

    offload.py       Offload: which blocks of a module rest in host memory or in their file, and the hooks that bring
                     them to its device.
    packed_block.py  A packed block: a module's tensors as one run of bytes, in host memory and in its file, so that one
                     copy offloads it.
    ring.py          A ring of slots on a device that offloaded blocks take in turn, each copied there ahead of its use.
"""
