"""Benchmark: seconds a step of our recipes beside stock diffusers, on this device, in one session.

No checkpoint is needed: time depends on shapes and storages, not on what the weights say. Left out: quality, text
encoder and VAE, which `compare` measures on real pictures.

Its modules (this list is made by tools/docs.py):

    command.py    `python -m ideogram_app benchmark`: the flags, the table, one JSON line at the end.
    families.py   Names of operators and kernels to families: where does a step's time go?
    limits.py     What fits: rows into memory together, work into the seconds that are left.
    ours.py       Our recipes as the program runs them: the same assembly, kernels and denoising loop, on random
                  weights.
    profiling.py  One step under torch's profiler: the share of its time in each family.
    report.py     What a benchmark found: frozen rows, a table for people, one JSON object.
    rows.py       What may be timed: a row for each of our recipes, and one for each way in which stock diffusers is
                  run.
    run.py        One benchmark: the ceiling first, then rows built, warmed up, timed in turn and profiled, within a
                  budget.
    shapes.py     What a benchmark builds: the shape of a model by its name, and the type it computes in.
    stock.py      Stock diffusers: its own transformers, driven exactly as `Ideogram4Pipeline.__call__` drives them, on
                  random weights.
    weights.py    Random weights in every storage, made on the device: as fast as memory is written, valid as if
                  encoded.
    memory/       Device memory counted without a device: fake tensors, a ledger of storages, a model of CUDA's
                  allocator.
"""
