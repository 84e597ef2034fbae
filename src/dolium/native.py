"""The ground: where the C programs are."""

from __future__ import annotations

import functools
import os
import shutil

from dolium.errors import NotFound

_FOLDER = os.path.join(os.path.dirname(os.path.abspath(__file__)), "_native")


@functools.cache
def init_program() -> str:
    """The pid 1 of ``--init``, as Docker has it: tini, the static one, for it runs in any root. "" when it is absent."""
    return shutil.which("tini-static") or ""


def program(name: str) -> str:
    """Absolute path of one of dolium's C programs. Raises NotFound with what to do."""
    path = os.path.join(_FOLDER, name)
    if os.access(path, os.X_OK):
        return path
    found = shutil.which(name)
    if found is None:
        raise NotFound(f"program {name} is not installed in {_FOLDER}", hint="run `make build`, or `pip install .` again")
    return found
