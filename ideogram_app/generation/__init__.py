"""Generate: one picture as an iterator of events, from a caption to a PNG, tried again when memory runs out.

Its modules (this list is made by tools/docs.py):

    captions.py       Ideogram 4's JSON caption: its model, its checks, and how plain text becomes one.
    draw.py           One picture as an iterator of events: load, sample, decode, save.
    encode_prompt.py  Encoding the caption before anything is drawn: text features and noise, or what ran out of memory
                      on the way.
    guidance.py       The guided velocity of a picture at every step: both transformers, where they live, and what may
                      be left out.
    retry.py          One recipe's picture: a retry loop that goes on with less where memory runs out, or offers to.
    sampler.py        The sampler in plain tensors: noise, schedule, Euler steps, decoding and previews.
    session.py        A session of drawing: store, output folder, caches and hooks shared by all recipes of a request.
    validate.py       What is refused before anything is loaded, and what a refused picture looks like in the results.
"""
