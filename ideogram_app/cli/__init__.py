"""The command line: flags, progress and results on a terminal, and serving the page.

Its modules (this list is made by tools/docs.py):

    output.py   What the command line says to people: the machine, a plan, progress on one line, a result.
    prepare.py  The first run on the command line: the same seven stages as on the page, told on standard error as they
                are passed.
"""
