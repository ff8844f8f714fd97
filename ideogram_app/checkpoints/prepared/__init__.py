"""Prepared checkpoints, as this program writes them: storage formats, packed files, journal, manifest, store.

Its modules (this list is made by tools/docs.py):

    file_plan.py    File plan: header and offsets of every tensor of a safetensors or GGUF file, before any is computed.
    journal.py      Journal of a resumable preparation: files filled in place, in any order, with a hash of every
                    tensor.
    manifest.py     The manifest of a folder of weights: its files, their sizes and hashes, and what they were made
                    from.
    packed_file.py  Packed files read: dense tensors and packed weights by official names, whole or by rows.
    storage.py      Storage formats of prepared files by recipe: names, shapes, types of their tensors; packing of rows.
    store.py        Store of prepared checkpoints: a folder per recipe, its status, lock, publishing, verification,
                    deletion.
"""
