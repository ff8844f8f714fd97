"""The one worker: its queue, its state, the services it calls, and the stages of a first run.

Its modules (this list is made by tools/docs.py):

    backend.py       What the studio has work done by: eight functions, and the real ones.
    board.py         What everybody may look at: the present `State`, the jobs behind it, and a way to wait for a newer
                     one.
    setup_stages.py  The first run as seven stages: machine, plan, licence, fetch, quantize, smoke test, first picture.
    setup_status.py  One model's first run as numbers: what is there, what is at work, what is still to come, how long
                     and how large.
    state.py         What the worker knows: its jobs, the machine, what is on disk, and everything a watcher may show,
                     as one `State`.
    studio.py        The one worker: a queue of jobs, what is known of them, and what stays loaded between them.
    worker.py        What the worker does: it looks at the machine and at the disk, and does jobs, one after another.
"""
