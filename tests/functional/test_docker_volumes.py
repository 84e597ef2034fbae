"""Volumes and mounts, by the docker command line and by dolium's own."""

from __future__ import annotations

import json

import pytest
from daemon import Daemon

pytestmark = pytest.mark.leaves("links", "nft")  # the daemon's pool of prepared networks fills in the background


def test_volumes_are_made_listed_and_pruned(engine: Daemon) -> None:
    for name, label in (("one", "team=a"), ("two", "team=b"), ("three", "keep")):
        assert engine.dolium("volume", "create", "--label", label, name).stdout == f"{name}\n"
    nameless = engine.docker("volume", "create").stdout.strip()
    engine.docker("create", "--name", "user", "-v", "two:/data", "base:1", "true")
    try:
        for words, names in ((("name=t",), ["three", "two"]), (("label=team",), ["one", "two"]), (("label=team=a",), ["one"]),
                             (("dangling=false",), ["two"]), (("driver=other",), []),
                             (("label=team", "dangling=true"), ["one"])):
            chosen = [word for one in words for word in ("--filter", one)]
            for client in (engine.docker, engine.dolium):
                listed = client("volume", "ls", "-q", *chosen).stdout.split()
                assert [name for name in listed if name != nameless] == names
        assert "invalid filter 'size'" in engine.docker("volume", "ls", "--filter", "size=1", check=False).stderr
        found = json.loads(engine.dolium("volume", "inspect", "one").stdout)[0]
        assert (found["Labels"], found["Scope"], found["Driver"]) == ({"team": "a"}, "local", "local")
        engine.docker("run", "--rm", "-v", "one:/v", "base:1", "sh", "-c", "head -c 1048576 /dev/zero > /v/f")
        assert engine.dolium("volume", "prune", "-f").stdout.startswith(f"Deleted Volumes:\n{nameless}\n\n")
        done = engine.docker("volume", "prune", "-af", "--filter", "label!=keep").stdout
        assert done.startswith("Deleted Volumes:\none\n\n")
        assert "1.0" in done.splitlines()[-1]
        assert engine.dolium("volume", "ls", "-q").stdout.split() == ["three", "two"]
        done = engine.dolium("volume", "rm", "two", "absent", "three", check=False)
        assert (done.stdout, done.returncode) == ("three\n", 1)
        assert "volume is in use" in done.stderr
        assert "no such volume" in done.stderr
    finally:
        engine.docker("rm", "user", check=False)
        engine.docker("volume", "rm", "-f", "one", "two", "three", check=False)
