"""Calibration: what the model's inputs look like, and what smoothing and protection follow from that.

Its modules (this list is made by tools/docs.py):

    calibration.py  Calibration file: statistics of every Linear's input, smoothing, fragility ranking, importance of
                    channels.
    collect.py      Calibration pass: the source-precision model draws captions, statistics of every Linear's input are
                    recorded.
    smoothing.py    SmoothQuant, folded into the weights: outlier channels are evened out between an input and what
                    reads it.
    statistics.py   Activation statistics of Linear layers, recorded by forward hooks while pictures are drawn.
    tuning.py       Tuning of a recipe by a calibration: smoothing, importance, protected layers; which calibration file
                    is used.
"""
