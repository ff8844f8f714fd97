"""The one worker: its queue, its state, the services it calls, and the stages of a first run.

Its modules (this list is made by tools/docs.py):

    local_backend.py  `LocalBackend`: the services of studio/worker.py's `Backend`, done on this machine in one data
                      folder.
    setup_stages.py   The first run as seven stages: machine, plan, licence, fetch, quantize, smoke test, first picture.
    setup_status.py   `SetupStatus`: one model's first run in numbers: bytes on disk, to fetch, to make and lacking;
                      estimated times.
    state.py          The studio's immutable `State`: jobs, the machine, what is on disk; and `SharedState`, the lock
                      around it.
    studio.py         The studio: a queue of jobs, the one thread that does them, and models that stay loaded between
                      them.
    worker.py         The worker, which looks at machine and disk and does jobs; `Backend`, the protocol of the services
                      it calls.
"""
