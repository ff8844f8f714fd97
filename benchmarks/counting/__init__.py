"""Device memory counted without a device: fake tensors, a ledger of storages, a model of CUDA's allocator.

An instrument of tests and of benchmarks/memory.py; nothing that ships imports it.
"""
