"""Quantization process: source weights to a prepared folder, resumable after a kill at any moment.

Its modules (this list is made by tools/docs.py):

    components.py    What stands around the transformers, kept beside them: text encoder packed, tokenizer, scheduler
                     and VAE as they are.
    notices.py       What the licence of Ideogram 4 asks of whoever makes a quantized copy: a notice, a mark, the
                     source's own texts.
    packing.py       A transformer, or the text encoder, on its way into its file, in runs of rows: read, scale, pack,
                     write, compare.
    run.py           One run from opened weights to a published folder: what transformers and their companions share.
    smoke_test.py    Does what was written compute what the source computes? Asked before a file gets its final name.
    source_hash.py   Hashes of large files, found by a thread of their own while other work goes on.
    transformers.py  Source -> recipe -> files: packs both transformers, in runs of rows, and publishes them.
    calibration/     Calibration: what the model's inputs look like, and what smoothing and protection follow from that.
"""
