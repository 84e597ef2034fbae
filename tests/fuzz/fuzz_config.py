"""Any bytes as config.json: refused by name, or compiled to a plan that encodes. Run by run.py, as a program of its own."""

from __future__ import annotations

import sys
from pathlib import Path

import atheris
from mutator import mutate

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


def custom_mutator(data: bytes, max_size: int, seed: int) -> bytes:
    """libFuzzer's hook."""
    return mutate(data, max_size, seed)


if __name__ == "__main__":
    atheris.Setup(sys.argv, one_input, custom_mutator=custom_mutator)
    atheris.Fuzz()
