"""The one worker: its queue, its state, the services it calls, and the stages of a first run.

Its modules (this list is made by tools/docs.py):

    backend.py        The services that the worker calls, as a protocol: `Backend`; and what is on disk of a model's
                      published weights.
    local_backend.py  The backend that does the work on this machine: `LocalBackend`.
    setup_stages.py   The first run as seven stages: machine, plan, licence, fetch, quantize, smoke test, first picture.
    setup_status.py   One model's first run as numbers: what is there, what is at work, what is still to come, how long
                      and how large.
    state.py          The studio's state: jobs, the machine, what is on disk, and everything a watcher may show; and the
                      lock around it.
    studio.py         The one worker: a queue of jobs, what is known of them, and what stays loaded between them.
    worker.py         What the worker does: it looks at the machine and at the disk, and does jobs, one after another.
"""
