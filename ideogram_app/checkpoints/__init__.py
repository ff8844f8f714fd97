"""Files on disk: safetensors and GGUF headers, weight files, spans of tensors, prefetching.

Its modules (this list is made by tools/docs.py):

    gguf.py         GGUF files: the header of one to be written, and tensors read where they lie.
    prefetch.py     Prefetch: tensors read from files by threads, ahead of their use, to where they stay.
    safetensors.py  Safetensors files: headers read and checked, tensors read where they lie, headers written before the
                    data exist.
    span.py         Where a tensor lies: a file, a place in it, and what its bytes mean. Every read of weights goes
                    through here.
    prepared/       What this program wrote: packed files, their journal and manifest, and the store that holds them.
    published/      Any published layout of Ideogram 4's weights, read as tensors by one set of names.
"""
