"""Generate: one picture as an iterator of events, from a caption to a PNG, tried again when memory runs out.

Its modules (this list is made by tools/docs.py):

    captions.py       Ideogram 4's JSON caption: its model, its checks, and how plain text becomes one.
    draw.py           One picture as an iterator: encode, noise, schedule, denoise, decode.
    encode_prompt.py  The caption, read before anything is drawn: text features and noise, or what ran out on the way.
    guidance.py       The guided velocity of a picture at every step: both transformers, where they live, and what may
                      be left out.
    retry.py          One recipe's picture, tried again with less where memory runs out, or offered to be.
    validate.py       What is refused before anything is loaded, and what a refused picture looks like in the results.
"""
