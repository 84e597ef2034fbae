"""Any bytes as config.json: refused by name, or compiled to a plan that encodes. Run by run.py, as a program of its own."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src"))

with atheris.instrument_imports(include=["dolium"]):
    from dolium.errors import DoliumError
    from dolium.linux.cgroup import tree
    from dolium.linux.seccomp import compile_profile
    from dolium.runtime import attributes, compile, lsm, net_devices, rdt, spec  # noqa: F401
    from dolium.runtime import plan as P
    from dolium.runtime.facts import Facts

V1 = tree.parse("3:memory:/\n2:cpuset:/\n1:cpu,cpuacct:/\n4:devices:/\n0::/\n",
                ["memory", "cpuset", "cpu,cpuacct", "devices", "unified"], False)
V2 = tree.parse("0::/\n", [], True)


class Host(Facts):
    """A host that has what is asked for: folders, security modules, resctrl."""

    def want(self, *queries: str) -> None:
        """All is known."""

    def _get(self, query: str) -> tuple[int, list[bytes]]:
        if query.startswith("stat:"):
            return 0, [b"16877 0 0 0"]
        if query.startswith(("read:", "netlink:")):
            return 0, [b"Y\n"]
        return 2, []


def one_input(data: bytes) -> None:
    """What may be raised is an error that a person is told; anything else is a fault of the compiler."""
    try:
        config = spec.load(data, "config.json")
        for layout in (V1, V2):
            launch = compile.Launch("box", "/bundle", layout)
            launch.start_socket = "/start"
            if (config.get("linux") or {}).get("seccomp"):
                launch.seccomp = compile_profile(config["linux"]["seccomp"], "x86_64")
            plan = compile.compile_container(config, Host(), launch)
            assert len(P.decode(plan.encode()).ops) == len(plan.ops)
            if config.get("process"):
                compile.compile_exec(config, config["process"], Host(), 7, 8, compile.Launch("box", "/b", layout), []).encode()
    except DoliumError:
        return


SWAPS = (None, True, 0, -1, 1 << 64, 1.5, "", "\0", "\ud800", "..", [], [None], {}, {"": None}, "x" * 300)


def mutate(data: bytes, max_size: int, seed: int) -> bytes:
    """Half of the mutations are of JSON's values, so that most inputs get past the parser."""
    import random

    chance = random.Random(seed)
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return bytes(atheris.Mutate(data, max_size))
    if chance.random() < 0.4 or not isinstance(value, dict):
        return bytes(atheris.Mutate(data, max_size))
    for _ in range(chance.choice((1, 1, 2, 4))):
        where, at = value, value
        while isinstance(at, (dict, list)) and at:
            where, key = at, chance.choice(list(at) if isinstance(at, dict) else range(len(at)))
            at = where[key]
            if chance.random() < 0.25:
                break
        if not where:
            continue
        if chance.random() < 0.3:
            del where[key]
        else:
            where[key] = chance.choice(SWAPS)
    try:
        made = json.dumps(value).encode()
    except RecursionError:  # deeper than can be written again
        return data
    return made if len(made) <= max_size else data


def custom_mutator(data: bytes, max_size: int, seed: int) -> bytes:
    """libFuzzer's hook."""
    return mutate(data, max_size, seed)


if __name__ == "__main__":
    atheris.Setup(sys.argv, one_input, custom_mutator=custom_mutator)
    atheris.Fuzz()
