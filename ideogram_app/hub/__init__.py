"""Fetch: files from the Hugging Face Hub, resumed where they stopped; the only package that touches the network.

Its modules (this list is made by tools/docs.py):

    access.py    What a repository holds at the Hub, and whether this user may have it, in words.
    download.py  A source's files from the Hub to a folder: sizes first, then bytes, every file verified, nothing
                 fetched twice.
    record.py    What has been fetched: the record that stands beside the files, read without the network.
    resume.py    One file from the Hub, continued where it stopped, however often the line breaks and whoever ended the
                 program.
"""
