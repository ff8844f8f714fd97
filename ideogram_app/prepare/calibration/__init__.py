"""Calibration: what the model's inputs look like, and what smoothing and protection follow from that.

Its modules (this list is made by tools/docs.py):

    calibration.py  What a calibration found, in one small file: smoothing, what is fragile, and which channels matter.
    collect.py      One pass of the source-precision model over a few captions, watched: what a calibration is made of.
    smoothing.py    SmoothQuant, folded away: outlier channels of an input are evened out between it and the weights
                    that read it.
    statistics.py   What the inputs of Linear layers look like while pictures are drawn, gathered as they pass.
    tuning.py       Which calibration a recipe is made with: one named, one made on this machine, one that ships, or
                    none.
"""
