"""Licence notices of a quantized copy, as Ideogram 4's licence demands: notice, mark, the source's own texts.

A quantized copy is a Model Derivative under the Ideogram Non-Commercial Model Agreement (section 3): whoever passes it
on gives a copy of the agreement, the sentence below word for word, and a prominent mark that files were modified. Both
are written beside every copy when it is made, so that a folder which is copied later has them. The agreement itself is
copied where the source folder holds it and is named by its address where it does not.

The miniature is this program's own and carries no such duty. Left out: legal advice.
"""

from __future__ import annotations

import shutil
from datetime import datetime, timezone
from pathlib import Path

from ideogram_app import __version__
from ideogram_app.files import write_text

NOTICE = "NOTICE"
OWN_WEIGHTS = ("miniature",)  # models that this program made itself
AGREEMENT = "https://github.com/ideogram-oss/ideogram4/model_licenses/LICENSE-IDEOGRAM-4-NON-COMMERCIAL"
# Word for word as section 3 (iii) of the agreement of June 3, 2026 has it.
SENTENCE = (
    "Ideogram 4 is provided under and subject to the Ideogram Non-Commercial Model Agreement available at "
    f"{AGREEMENT}. All rights reserved. Copyright © Ideogram, Inc."
)
DUTIES = f"""These files are a Model Derivative under that agreement. They may be used, modified and passed on for
non-commercial purposes only, together with a copy of the agreement ({AGREEMENT}),
this notice, the mark above, and its disclaimers of warranty and liability, on terms no less restrictive. Ideogram, Inc.
has neither made nor endorsed them.
"""


def write_notices(folder: Path, model: str, recipe: str, source: Path) -> list[Path]:
    """Write what must stand beside a quantized copy of a published model, nothing for the program's own; the files.

    LICENSE and NOTICE files of the folder `source` are copied; its own NOTICE gets the name NOTICE-SOURCE.
    """
    if model in OWN_WEIGHTS:
        return []
    today = datetime.now(timezone.utc).date().isoformat()
    mark = (
        f"MODIFIED FILES. The weights in this folder were modified by quantization on {today}:\n"
        f"recipe {recipe}, by ideogram_app {__version__}.\n"
    )
    write_text(folder / NOTICE, f"{SENTENCE}\n\n{mark}\n{DUTIES}")
    written = [folder / NOTICE]
    for path in sorted(source.iterdir() if source.is_dir() else ()):
        if path.is_file() and path.name.upper().startswith(("LICENSE", "LICENCE", NOTICE)):
            stem = path.name.upper().partition(".")[0]
            name = path.name if stem != NOTICE else path.name[: len(NOTICE)] + "-SOURCE" + path.name[len(NOTICE) :]
            shutil.copyfile(path, folder / name)
            written.append(folder / name)
    return written
