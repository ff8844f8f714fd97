"""Compare: one request drawn with several recipes, measured, laid out and kept in the history.

Its modules (this list is made by tools/docs.py):

    compare.py        Comparison of recipes: one request drawn with each, from the same text features and the same
                      noise.
    contact_sheet.py  The contact sheet: every picture of a comparison with its numbers under it, as one lossless PNG.
    history.py        History of comparisons on disk: one folder each, with its pictures, `comparison.json` and a
                      contact sheet.
    metrics.py        Image distance to the reference: PSNR and SSIM.
"""
