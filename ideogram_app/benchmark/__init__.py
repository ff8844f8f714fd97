"""How fast a step is: our recipes beside what stock diffusers does, on this device, in one run.

    shapes.py      --shape -> the model whose shapes are built; the computing type
    rows.py        what may be timed, one row each, and what each needs
    weights.py     random weights in every storage, made on the device
    ours.py        our recipes on our backbone
    stock.py       stock diffusers, driven as its pipeline drives it, with the packings its users have
    ceiling.py     what this device does at best: large products, INT8 products, copying
    families.py    names of operators and kernels -> gemm, attention, other
    profiling.py   one step, its time by family
    limits.py      which rows lie in memory together, what the budget still allows
    run.py         builds, warms up, interleaves, profiles
    report.py      what came of it: a table, one JSON object
    command.py     the flags
    counted.py     device memory of a picture, counted on tensors that hold nothing
    ledger.py      which tensors are alive after every operation
    allocator.py   what CUDA's caching allocator reserves for them

No checkpoint is needed: time depends on shapes and storages, not on what the weights say. Left out: quality, text
encoder and VAE, which `compare` measures on real pictures.
"""
