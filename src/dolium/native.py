"""The ground: where the C programs are."""

from __future__ import annotations

import os
import shutil

from dolium.errors import NotFound

_FOLDER = os.path.join(os.path.dirname(os.path.abspath(__file__)), "_native")


def program(name: str) -> str:
    """Absolute path of one of dolium's C programs. Raises NotFound with what to do."""
    path = os.path.join(_FOLDER, name)
    if os.access(path, os.X_OK):
        return path
    found = shutil.which(name)
    if found is None:
        raise NotFound(f"program {name} is not installed in {_FOLDER}", hint="run `make build`, or `pip install .` again")
    return found
