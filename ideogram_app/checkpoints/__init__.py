"""Where weights come from and where they rest.

local.py           the published repositories, as rows
transformer.py           a transformer in any layout this version reads, by the official tensor names
storage.py           a recipe's files: what is written for each tensor, and how it is read back
safetensors.py  safetensors bytes: headers checked, tensors read and placed one by one
gguf.py         GGUF bytes
manifest.py          what a folder says of itself: files, sizes, hashes
journal.py           files filled in place, and what of them is done
store.py             status, verification, publishing by rename, deletion
"""
