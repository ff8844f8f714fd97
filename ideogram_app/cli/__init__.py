"""The command line: flags, progress and results on a terminal, and serving the page.

Its modules (this list is made by tools/docs.py):

    app.py       Commands of `python -m ideogram_app`: doctor, plan, prepare, quantize, calibrate, generate, compare,
                 check ...
    check.py     `python -m ideogram_app check`: the self-check on this machine's device, made anew, as a table or as
                 JSON.
    flags.py     Flag types that commands share, as typer reads them, and how a command ends.
    output.py    Text output of the command line: the machine, a plan, progress on one line, a result.
    prepare.py   First run on the command line: the same seven stages as on the page, printed on standard error as they
                 are passed.
    receipts.py  `python -m ideogram_app receipts add FILE ...`: strangers' measurements into one folder, and the table
                 of them.
    serve.py     Server of the Gradio page: flags with their environment variables, host, port, password, launch.
"""
