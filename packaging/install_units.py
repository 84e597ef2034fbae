"""Writes ``doliumd.service`` and ``doliumd.socket`` for systemd, with the path of this Python's ``doliumd``.

    PYTHON packaging/install_units.py [FOLDER]

systemd looks programs up in a path of its own, where no virtual environment is; so the unit names the file. FOLDER is
``/etc/systemd/system`` unless given.
"""

from __future__ import annotations

import os
import sys
import sysconfig
from pathlib import Path

HERE = Path(__file__).resolve().parent
PROGRAM = "@doliumd@"


def quoted(path: str) -> str:
    """A path as the first word of ``ExecStart=`` (systemd.unit(5)). Raises ValueError for one systemd refuses."""
    if not path.isprintable() or set(path) & set("\"'\\"):
        raise ValueError(f"systemd takes no program of the name {path!r}")
    return '"' + path.replace("%", "%%") + '"'


def install(folder: Path, program: str) -> list[Path]:
    """Both units, written by rename. Raises OSError, and ValueError for a program that a unit cannot name."""
    written = []
    for name in ("doliumd.service", "doliumd.socket"):
        text = (HERE / name).read_text().replace(PROGRAM, quoted(program))
        fresh = folder / f".{name}.new"
        fresh.write_text(text)
        written.append(fresh.rename(folder / name))
    return written


def main(words: list[str]) -> int:
    """The exit code."""
    folder = Path(words[0] if words else "/etc/systemd/system")
    program = os.path.join(sysconfig.get_path("scripts"), "doliumd")
    if not os.access(program, os.X_OK):
        print(f"install_units: there is no {program}: run this with the Python of the environment that dolium is in",
              file=sys.stderr)
        return 1
    try:
        written = install(folder, program)
    except (OSError, ValueError) as error:
        print(f"install_units: {error}", file=sys.stderr)
        return 1
    print(*written, sep="\n")
    print("now: systemctl daemon-reload && systemctl enable --now doliumd.socket")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
