"""Compare: one request drawn with several recipes, measured, laid out and kept in the history.

Its modules (this list is made by tools/docs.py):

    compare.py        One request through several recipes: the same text features, the same noise, one picture after
                      another.
    contact_sheet.py  The contact sheet: every picture of a comparison with its numbers under it, as one lossless PNG.
    history.py        Comparisons on disk: one folder each, with its pictures, `comparison.json` and a contact sheet.
    metrics.py        How far one picture is from another: PSNR and SSIM.
"""
