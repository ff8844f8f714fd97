"""Prepared checkpoints, as this program writes them: storage formats, packed files, journal, manifest, store.

Its modules (this list is made by tools/docs.py):

    components.py  Reading a prepared text encoder: which file it is in, and what its config says.
    file_plan.py   Where every tensor of a file will lie, decided before any of them is computed.
    folder.py      One folder of prepared weights, wherever it is: being filled, published by rename, verified, deleted.
    journal.py     Files filled in place, in any order, and a journal of what is done.
    manifest.py    What a folder of weights says of itself: which files, how large, with which hashes.
    storage.py     What a recipe's files hold: the half that writes and the half that reads, side by side.
    store.py       Which prepared folder belongs to which model and recipe: status, verification, listing, deletion.
"""
