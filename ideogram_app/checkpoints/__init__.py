"""Files on disk: safetensors and GGUF headers, weight files, spans of tensors, prefetching.

Its modules (this list is made by tools/docs.py):

    gguf.py          GGUF files: tensors read from them, mapped or by rows, and the header of a file to be written.
    prefetch.py      Prefetch: tensors read from files by threads ahead of their use, to the device or to host memory.
    safetensors.py   Safetensors files: headers read and checked, single tensors or rows read, headers written before
                     the data exist.
    span.py          Span: the bytes of a tensor, or of some of its rows, in a file, and how readers make tensors of
                     them.
    weight_files.py  Weight files of a folder: found by index or pattern, opened by their first bytes; config.json read.
    prepared/        Prepared checkpoints, as this program writes them: storage formats, packed files, journal,
                     manifest, store.
    published/       Published checkpoints of any layout, read as tensors under one set of names.
"""
