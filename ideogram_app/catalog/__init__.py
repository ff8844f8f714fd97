"""What exists, as frozen rows without torch: models, recipes, presets, speed-ups, the text encoder.

Its modules (this list is made by tools/docs.py):

    models.py        The shape of an Ideogram 4 model, in numbers, without torch.
    presets.py       Ideogram 4's three sampling presets, as rows.
    reasons.py       Reasons of a plan, and of what is offered when memory ran out: one table of all their sentences,
                     code -> text.
    recipes.py       Every precision the program knows, one frozen row each.
    sources.py       Published sources of weights: repository, layout, size, licence and gate of each, one frozen row.
    speedups.py      What may be left out of a picture on request, as rows: opt-in, named in the result, and each with
                     its cost measured.
    text_encoder.py  The text encoder in numbers, without torch: its shape, and the precisions in which it may rest.
"""
