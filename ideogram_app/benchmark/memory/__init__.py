"""Device memory counted without a device: fake tensors, a ledger of storages, a model of CUDA's allocator.

Its modules (this list is made by tools/docs.py):

    allocator.py  What a caching allocator reserves for a sequence of tensors: CUDA's, in a hundred lines.
    counted.py    Device memory of a picture, counted by running the real code on tensors that hold nothing.
    ledger.py     A ledger of memory: which tensors are alive after every operation, and the most that were.
"""
