"""Entry of the page and of a Hugging Face Space: `python app.py [flags]`; everything else stands in cli/serve.py."""

from __future__ import annotations

from ideogram_app.cli.serve import main

if __name__ == "__main__":
    main()
