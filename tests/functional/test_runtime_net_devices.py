"""``linux.netDevices``: links of the host move into the container, with their addresses."""

from __future__ import annotations

import itertools
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from bundles import Bundle, Runtime, bundle, needs, runtime, until

__all__ = ["bundle", "runtime"]
pytestmark = needs
_numbers = itertools.count()

SHOW = "ip -o link show; ip -o addr show"


def ip(*words: str, check: bool = True) -> str:
    return subprocess.run(["ip", *words], capture_output=True, text=True, check=check).stdout


@pytest.fixture
def pair() -> Iterator[tuple[str, str]]:
    """The two ends of a veth with addresses; both go with either."""
    number = f"{os.getpid() % 100000}{next(_numbers)}"
    ends = f"dv{number}a", f"dv{number}b"
    ip("link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
    try:
        ip("link", "set", ends[0], "up")
        for address in ("192.0.2.5/24", "192.0.2.6/24", "198.51.100.7/32"):
            ip("addr", "add", address, "dev", ends[0])
        ip("addr", "add", "169.254.3.4/16", "dev", ends[0], "scope", "link")
        ip("-6", "addr", "add", "2001:db8::5/64", "dev", ends[0], "nodad")
        yield ends
    finally:
        ip("link", "del", ends[1], check=False)


def mapped(bundle: Bundle) -> Bundle:
    bundle.namespace("user", "")
    bundle.linux["uidMappings"] = bundle.linux["gidMappings"] = [{"containerID": 0, "hostID": 0, "size": 65536}]
    return bundle


def addresses(out: str, name: str) -> set[str]:
    """With prefix, as `ip -o addr` shows them for one link."""
    return {words[3] for words in map(str.split, out.splitlines()) if words[1] == name and words[2].startswith("inet")}


@pytest.mark.parametrize("user", [False, True])
@pytest.mark.parametrize("inside", ["", "eth7"])
def test_a_device_moves_with_its_addresses(runtime: Runtime, bundle: Bundle, pair: tuple[str, str], inside: str, user: bool) -> None:
    name, peer = pair
    bundle.linux["netDevices"] = {name: {"name": inside} if inside else {}}
    if user:
        mapped(bundle)
    out = runtime.run(bundle.sh(SHOW)).out
    found = inside or name
    assert f": {found}@" in out and ("UP" in out.split(f": {found}@")[1].split(">")[0])
    assert {"192.0.2.5/24", "192.0.2.6/24", "198.51.100.7/32", "2001:db8::5/64"} <= addresses(out, found)
    assert "169.254.3.4/16" not in out
    # a virtual link ends with the namespace, which the kernel takes apart later
    until(lambda: ip("-o", "link", "show", peer, check=False) == "", "the link is gone")


def test_a_device_moves_into_a_namespace_that_was_there(runtime: Runtime, bundle: Bundle, pair: tuple[str, str]) -> None:
    """Its index may be taken there: what is said of it inside goes by its name."""
    name, peer = pair
    holder = subprocess.Popen(["unshare", "--net", "sh", "-c", "ip link set lo up; echo ready; exec sleep 1000"],
                              stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout and holder.stdout.readline() == "ready\n"
        index = ip("-o", "link", "show", name).split(":")[0]
        taken = ["nsenter", "-t", str(holder.pid), "--net", "ip", "link", "add", "taken", "index", index, "type", "bridge"]
        subprocess.run(taken, check=True)
        bundle.namespace("network", f"/proc/{holder.pid}/ns/net")
        bundle.linux["netDevices"] = {name: {"name": "moved"}}
        out = runtime.run(bundle.sh(SHOW)).out
        assert {"192.0.2.5/24", "2001:db8::5/64"} <= addresses(out, "moved") and addresses(out, "taken") == set()
        assert ip("-o", "link", "show", peer)  # the namespace is still there, and the link in it
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()


def test_what_cannot_move_is_named(runtime: Runtime, bundle: Bundle, pair: tuple[str, str]) -> None:
    name, _ = pair
    before = ip("-o", "addr", "show", name)
    bundle.linux["netDevices"] = {name: {}, "nosuch0": {}}
    assert "linux.netDevices.nosuch0: there is no such link" in runtime.run(bundle.sh("true"), code=1).err
    bundle.linux["netDevices"] = {name: {}}
    bundle.namespace("network", absent=True)
    bundle.linux.pop("sysctl", None)
    assert "linux.netDevices: needs a network namespace" in runtime.run(bundle, code=1).err
    bundle.namespace("network", "")
    bundle.linux["netDevices"] = {name: {"name": "lo"}}
    result = runtime.run(bundle, code=1)
    assert f"linux.netDevices.{name}.name: every network namespace has a lo" in result.err
    assert runtime.left() == [] and bundle.groups() == [] and ip("-o", "addr", "show", name) == before


def test_the_runtimes_own_namespace_by_path_is_seen(runtime: Runtime, bundle: Bundle, pair: tuple[str, str]) -> None:
    """There the device would lose what only a move back can give; and the container's end would not take it away."""
    name, _ = pair
    before = ip("-o", "addr", "show", name)
    bundle.linux["netDevices"] = {name: {"name": "eth0"}}
    bundle.namespace("network", "/proc/self/ns/net")
    assert "network namespace is the runtime's own" in runtime.run(bundle, code=1).err
    assert runtime.left() == [] and bundle.groups() == [] and ip("-o", "addr", "show", name) == before


def test_what_fails_in_the_middle_is_undone(runtime: Runtime, bundle: Bundle, pair: tuple[str, str]) -> None:
    """A name that is taken inside moves nothing; an address that is refused inside brings all back."""
    name, peer = pair
    holder = subprocess.Popen(["unshare", "--net", "sh", "-c", "ip link add taken type bridge; echo 1 > "
                               "/proc/sys/net/ipv6/conf/default/disable_ipv6; echo ready; exec sleep 1000"],
                              stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout and holder.stdout.readline() == "ready\n"
        bundle.namespace("network", f"/proc/{holder.pid}/ns/net")
        for devices, why in (({peer: {"name": "eth1"}, name: {"name": "taken"}}, "has a link taken already"),
                             ({peer: {"name": "eth1"}, name: {"name": "eth0"}}, "give eth0 its address: Permission denied")):
            bundle.linux["netDevices"] = devices
            assert why in runtime.run(bundle, code=1).err
            assert ip("-o", "link", "show", name) and ip("-o", "link", "show", peer)
            assert runtime.left() == [] and bundle.groups() == []
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()


def test_the_device_is_there_for_the_hooks_of_the_container(runtime: Runtime, bundle: Bundle, pair: tuple[str, str],
                                                           tmp_path: Path) -> None:
    name, _ = pair
    bundle.linux["netDevices"] = {name: {"name": "eth0"}}
    bundle.hook("createRuntime", "/bin/sh", "-c", f"ls /sys/class/net > {tmp_path}/host")
    runtime.run(bundle.sh("true"))
    assert name not in (tmp_path / "host").read_text().split()
