"""The one worker: its queue, its state, the services it calls, and the stages of a first run."""
