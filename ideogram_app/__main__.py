"""`python -m ideogram_app`: the command line, whose commands stand in cli/app.py."""

from ideogram_app.cli.app import main

if __name__ == "__main__":
    main()
