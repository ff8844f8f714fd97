"""Generate: one picture as an iterator of events, from a caption to a PNG, tried again when memory runs out.

Its modules (this list is made by tools/docs.py):

    captions.py       Ideogram 4's JSON caption: its schema, its checks, and wrapping plain text as a caption.
    draw.py           Drawing one picture as an iterator of events: load, sample, decode, save as PNG.
    encode_prompt.py  Encoding the caption: text features and noise that all recipes share, or what ran out of memory.
    guidance.py       Classifier-free guidance (CFG): `GuidedModel` combines both transformers at every step, with
                      speed-ups.
    retry.py          Retry loop of one recipe's picture: where memory runs out it takes a fallback, or offers the
                      fallbacks.
    sampler.py        The sampler in plain tensors: noise, schedule, Euler steps, VAE decoding and previews.
    session.py        A session of drawing: store, output folder, caches and lost devices, shared by all recipes of a
                      request.
    validate.py       Validation of a request before anything is loaded: sizes, preset, guidance, recipes, speed-ups,
                      seed.
"""
