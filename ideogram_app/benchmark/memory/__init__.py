"""Device memory counted without a device: fake tensors, a ledger of storages, a model of CUDA's allocator."""
