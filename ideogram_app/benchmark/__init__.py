"""Benchmark: seconds a step of our recipes beside stock diffusers, on this device, in one session.

No checkpoint is needed: time depends on shapes and storages, not on what the weights say. Left out: quality, text
encoder and VAE, which `compare` measures on real pictures.

Its modules (this list is made by tools/docs.py):

    command.py    `python -m ideogram_app benchmark`: the flags, the table, one JSON line at the end.
    limits.py     Limits of a benchmark: which rows fit into memory together, how many steps into the time budget; an
                  alarm.
    ours.py       Our rows of a benchmark: recipes run with the program's own kernels and denoising loop, on random
                  weights.
    profiling.py  Profile of one step by torch's profiler: the share of its time in gemm, attention and other kernels.
    receipts.py   Receipts: what one machine measured, in one JSON that strangers can send and anybody can put into one
                  table.
    report.py     Report of a benchmark: measured rows as frozen dataclasses, a text table, the JSON object, its file
                  name.
    rows.py       Rows of a benchmark: our recipes, and each way to run stock diffusers; packages they need, memory they
                  take.
    session.py    Benchmark session: ceiling first, then rows built, warmed up, timed in turn, profiled, within a
                  budget.
    shapes.py     Workload of a benchmark: the model's shape by its name, picture size, tokens, computing dtype.
    stock.py      Stock rows of a benchmark: diffusers' own transformers and denoising loop, on random weights.
    weights.py    Random weights in every storage format, made on the device at the speed of memory, valid as if
                  encoded.
"""
