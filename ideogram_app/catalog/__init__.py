"""What exists, as frozen rows without torch: models, recipes, presets, speed-ups, the text encoder.

Its modules (this list is made by tools/docs.py):

    models.py        Models: shapes of the transformers of Ideogram 4 and of the miniature, one row a Linear, without
                     torch.
    presets.py       Sampling presets of Ideogram 4: steps, noise schedule and guidance, one row each.
    reasons.py       Reasons: one table of every sentence of a plan, and of what is offered when memory ran out; code ->
                     text.
    recipes.py       Recipes: every precision of the transformers' weights, one frozen row each.
    sources.py       Published sources of weights: repository, layout, size, licence and gate of each, one frozen row.
    speedups.py      Opt-in speed-ups ("savings"): what may be left out of a picture, as rows, each with its cost
                     measured.
    text_encoder.py  Text encoder: its shape and the recipes in which its weights may rest, without torch.
"""
