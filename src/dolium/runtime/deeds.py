"""What a plan does through a program of dolium's own: talk that is more than a system call (systemd, CRIU).

The compiler runs nothing, warm or cold: it writes an operation (a ``hook``), which the front executes in the caller's own
context, with the request as JSON on the program's standard input. Cold module, imported by those who need it.
"""

from __future__ import annotations

import json
import sys

from dolium.errors import Internal
from dolium.runtime.plan import PID

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from dolium.runtime.plan import Plan

_PID = -314159265  # stands for init's pid in a request until the executor knows it
PID_LATER = _PID
FOREGROUND = -1  # instead of a limit: it starts with all signals blocked, and gets those that the front gets


def add(plan: Plan, stage: int, label: str, module: str, request: dict[str, Any], limit_ms: int, *, optional: bool = False,
        nothing_ours: bool = False) -> None:
    """An operation that runs ``main()`` of a module with a request, within ``limit_ms`` (0: no limit). What the program
    writes to standard error becomes the error's detail (its first line, 159 bytes)."""
    python, here = sys.executable, __file__
    root = here[: here.rindex("/dolium/")]
    if not python or "'" in root or "\\" in root:
        raise Internal(f"this Python does not know its own program ({python!r}), or dolium lies in {root!r}")
    code = f"import sys;sys.path.insert(0,'{root}');from {module} import main;sys.exit(main())"
    text = json.dumps(request).replace(str(_PID), PID)
    plan.add(stage, "hook", label, python, [python, "-I", "-S", "-E", "-c", code], [], limit_ms, text, optional=optional,
             nothing_ours=nothing_ours)
