"""Plans of one kind of container, kept in their binary form: the next container of that kind differs in its id alone.

Two configurations are of one kind when they are the same text once each one's own id, and its first twelve digits, are
taken out, with the same profile, and the same kinds of files behind their bind mounts. An id is random and known to nobody
before its container's configuration is complete, so what has an id in it has it by our own doing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dolium.runtime.plan import AFTER_EXIT

if TYPE_CHECKING:
    from dolium.runtime.facts import Facts
    from dolium.runtime.plan import Plan

KEPT = 64
ID, SHORT = 64, 12  # digits
S_IFMT = 0o170000


@dataclass(frozen=True, slots=True)
class Compiled:
    """A plan in its binary form, and the part of it for after the exit. ``plan`` names its operations, in the same order;
    their arguments may have the id of the container that the form was made of."""

    plan: Plan
    encoded: bytes
    after_exit: bytes
    config: bytes = b""  # config.json, of a runtime that reads one


class Templates:
    """At most KEPT kinds; the one used longest ago goes first."""

    def __init__(self) -> None:
        self._kept: dict[tuple[object, ...], tuple[str, Compiled]] = {}
        self.used = 0

    def get(self, identity: str, config: dict[str, Any], facts: Facts, marks: Sequence[object],
            compile: Callable[[], Plan]) -> Compiled:
        """The plan of a configuration, from its kind's or from ``compile``, whose errors are raised. ``marks``: what else
        tells kinds apart; it stands for ``linux.seccomp``, which is not looked at."""
        key = _kind(identity, config, facts, marks)
        found = self._kept.pop(key, None) if key is not None else None
        if found is None:
            plan = compile()
            found = identity, Compiled(plan, plan.encode(), plan.part(AFTER_EXIT).encode())
        else:
            self.used += 1
        if key is not None:
            self._kept[key] = found
            if len(self._kept) > KEPT:
                del self._kept[next(iter(self._kept))]
        other, compiled = found
        if other == identity:
            return compiled

        def ours(form: bytes) -> bytes:
            form = form.replace(other.encode(), identity.encode())
            return form.replace(other[:SHORT].encode(), identity[:SHORT].encode())

        return Compiled(compiled.plan, ours(compiled.encoded), ours(compiled.after_exit))

    def clear(self) -> None:
        """Forget all."""
        self._kept.clear()


def _kind(identity: str, config: dict[str, Any], facts: Facts, marks: Sequence[object]) -> tuple[object, ...] | None:
    """None for one that is compiled anew each time: another form of id, a bind mount of what is not there."""
    if len(identity) != ID:
        return None
    sources = []
    for mount in config.get("mounts") or []:
        if mount["type"] == "bind":
            found = facts.stat(mount["source"])
            if found is None:
                return None
            sources.append(found[0] & S_IFMT)
    linux = {key: value for key, value in config["linux"].items() if key != "seccomp"}
    text = json.dumps({**config, "linux": linux}).replace(identity, "\0").replace(identity[:SHORT], "\1")
    return (text, *sources, *marks)
