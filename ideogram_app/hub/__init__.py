"""Fetch: files from the Hugging Face Hub, resumed where they stopped; the only package that touches the network.

Its modules (this list is made by tools/docs.py):

    access.py    Access to a repository at the Hub: its files, and whether token and licence let this user have them, in
                 words.
    download.py  Download of a source's files from the Hub into a folder: disk space checked, hashes verified, resumed
                 after a stop.
    record.py    Download record: what a folder of fetched files holds, with commit, sizes and hashes, read without the
                 network.
    resume.py    Resumable download of one file from the Hub, with retries: continued after cuts, restarts and kills.
"""
