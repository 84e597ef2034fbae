"""Made-up hosts for the compiler: facts without a machine."""

from __future__ import annotations

import copy
from typing import Any

from dolium.linux.cgroup import tree
from dolium.runtime import plan as P
from dolium.runtime.compile import Launch, compile_container
from dolium.runtime.default_spec import default_spec
from dolium.runtime.facts import Facts, Need

HYBRID_TEXT = ("9:name=systemd:/\n8:pids:/\n7:blkio:/\n6:freezer:/\n5:devices:/\n4:memory:/some/where\n3:cpuset:/\n"
               "2:cpu,cpuacct:/\n0::/\n")
NAMES = ["blkio", "cpu,cpuacct", "cpuset", "devices", "freezer", "memory", "pids", "systemd"]
V1 = tree.parse(HYBRID_TEXT, NAMES, False)
HYBRID = tree.parse(HYBRID_TEXT, [*NAMES, "unified"], False)
V2 = tree.parse("0::/user.slice\n", [], True)

DIRECTORY, FILE = b"16877 0 0 0", b"33188 0 0 0"


class FakeFacts(Facts):
    """Facts from dictionaries; what is not in them is absent."""

    def __init__(self, files: dict[str, str | bytes] | None = None, stats: dict[str, bytes] | None = None,
                 lists: dict[str, list[str]] | None = None, real: dict[str, str] | None = None) -> None:
        super().__init__({})
        self.files = files or {}
        self.stats = stats or {}
        self.lists = lists or {}
        self.reals = real or {}
        self.asked: list[str] = []

    def want(self, *queries: str) -> None:
        self.asked += queries

    def _get(self, query: str) -> tuple[int, list[bytes]]:
        self.asked.append(query)
        kind, _, path = query.partition(":")
        if kind == "read" and path in self.files:
            text = self.files[path]
            return 0, [text.encode() if isinstance(text, str) else text]
        if kind == "stat" and path in self.stats:
            return 0, [self.stats[path]]
        if kind == "list":
            return 0, [name.encode() for name in self.lists.get(path, [])]
        if kind == "real" and path in self.reals:
            return 0, [self.reals[path].encode()]
        return 2, []


class Wish(Facts):
    """Facts that are never there: the first wish is raised."""

    def first(self, call: Any) -> list[str]:
        try:
            call(self)
        except Need as need:
            return need.queries
        return []


def config(**changes: Any) -> dict[str, Any]:
    """The default configuration without a terminal; ``linux`` is merged, other keys replace."""
    made = copy.deepcopy(default_spec())
    made["process"]["terminal"] = False
    made["linux"].update(changes.pop("linux", {}))
    made["process"].update(changes.pop("process", {}))
    made.update(changes)
    return made


def namespaces(**paths: str | None) -> list[dict[str, str]]:
    """By name: "" is new, None is left out, a path is joined."""
    return [{"type": kind, **({"path": path} if path else {})} for kind, path in paths.items() if path is not None]


def compiled(made: dict[str, Any], layout: tree.Layout = V1, facts: Facts | None = None, **options: Any) -> P.Plan:
    """The container's plan; ``options`` are attributes of Launch."""
    launch = Launch("box", "/bundle", layout)
    for name, value in options.items():
        setattr(launch, name, value)
    return compile_container(made, facts or FakeFacts(), launch)


def order(plan: P.Plan, stage: int | None = None) -> list[str]:
    """Names of operations, of one stage or all."""
    return [op.name for op in plan.ops if stage is None or op.stage == stage]


def only(plan: P.Plan, name: str) -> P.Op:
    """The one operation of a name."""
    (op,) = plan.named(name)
    return op
