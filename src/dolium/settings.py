"""What an administrator says in daemon.json, Docker's file of the daemon's settings; each room reads keys of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dolium.errors import FailedPrecondition


def daemon_json(etc: Path) -> tuple[Path, dict[str, Any]]:
    """The first of dolium/daemon.json and docker/daemon.json that is in a folder such as /etc, and what it says; an empty
    object when none is there. Raises FailedPrecondition naming the file that cannot be read."""
    paths = (etc / "dolium/daemon.json", etc / "docker/daemon.json")
    for path in paths:
        try:
            value = json.loads(path.read_text())
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            raise FailedPrecondition(f"{path}: {error}") from None
        if not isinstance(value, dict):
            raise FailedPrecondition(f"{path}: not a JSON object")
        return path, value
    return paths[0], {}
