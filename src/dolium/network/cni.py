"""A chain of CNI plugins (specification 1.0): its configuration, and its programs run one after the other. Blocks."""

from __future__ import annotations

import json
import os
import re
import subprocess
from dataclasses import dataclass
from ipaddress import IPv4Interface
from typing import Any

from dolium.errors import DeadlineExceeded, FailedPrecondition, InvalidArgument, NotFound

FOLDERS = "/opt/cni/bin:/usr/lib/cni:/usr/libexec/cni"
SECONDS = 60.0
"""What one plugin may take; dhcp asks a server."""
_VERSIONS = ("0.3.0", "0.3.1", "0.4.0", "1.0.0")
_TYPE = re.compile(r"[A-Za-z0-9_.-]+\Z")
_LARGEST = 1 << 20


@dataclass(frozen=True, slots=True)
class Attachment:
    """Where a chain works. ``namespace``: a path, "" when it is gone; ``link``: the name inside; ``wishes``: runtimeConfig
    by capability, of which each plugin gets what it says it takes."""

    container: str
    namespace: str
    link: str
    wishes: dict[str, Any]


def read_config(path: str) -> dict[str, Any]:
    """A ``.conflist``, or a ``.conf`` as a list of one. Raises NotFound, InvalidArgument."""
    try:
        with open(path, "rb") as file:
            found = json.loads(file.read(_LARGEST))
    except OSError as error:
        raise NotFound(f"CNI configuration {path}: {error.strerror}", errno=error.errno) from error
    except ValueError as error:
        raise InvalidArgument(f"CNI configuration {path}: {error}") from error
    return checked(found, path)


def checked(found: Any, path: str) -> dict[str, Any]:
    """The configuration as a list. Raises InvalidArgument, which names the field."""
    if isinstance(found, dict) and "type" in found and "plugins" not in found:
        found = {"cniVersion": found.get("cniVersion"), "name": found.get("name"), "plugins": [found]}
    if not isinstance(found, dict) or not isinstance(found.get("plugins"), list) or not found["plugins"]:
        raise InvalidArgument(f"CNI configuration {path}: plugins is a list of one at least")
    if found.get("cniVersion") not in _VERSIONS:
        raise InvalidArgument(f"CNI configuration {path}: cniVersion {found.get('cniVersion')!r} is none of "
                              f"{', '.join(_VERSIONS)}")
    if not isinstance(found.get("name"), str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", found["name"]):
        raise InvalidArgument(f"CNI configuration {path}: name {found.get('name')!r} is not a network's name")
    for number, plugin in enumerate(found["plugins"]):
        if not isinstance(plugin, dict) or not isinstance(plugin.get("type"), str) or not _TYPE.match(plugin["type"]):
            raise InvalidArgument(f"CNI configuration {path}: plugins[{number}].type is not a program's name")
    return found


def capabilities(config: dict[str, Any]) -> set[str]:
    """What its plugins take of a container's wishes."""
    return {name for plugin in config["plugins"] for name, on in (plugin.get("capabilities") or {}).items() if on}


def program(kind: str, folders: str) -> str:
    """The plugin of a type. Raises NotFound."""
    for folder in folders.split(":"):
        path = f"{folder}/{kind}"
        if folder and os.access(path, os.X_OK):
            return path
    raise NotFound(f"there is no CNI plugin {kind} in {folders}",
                   hint="apt-get install containernetworking-plugins, or -o bin=")


def add(config: dict[str, Any], folders: str, where: Attachment) -> dict[str, Any]:
    """The whole chain; the last result. When one fails all are undone. Raises NotFound, FailedPrecondition,
    DeadlineExceeded."""
    result: dict[str, Any] = {}
    try:
        for plugin in config["plugins"]:
            result = _run("ADD", config, plugin, folders, where, result) or result
    except BaseException:
        remove(config, folders, where, result)
        raise
    return result


def remove(config: dict[str, Any], folders: str, where: Attachment, result: dict[str, Any]) -> list[str]:
    """The chain backwards; idempotent. One that fails keeps no other back: what they said, by failures."""
    failures = []
    for plugin in reversed(config["plugins"]):
        try:
            _run("DEL", config, plugin, folders, where, result)
        except (NotFound, FailedPrecondition, DeadlineExceeded) as error:
            failures.append(str(error))
    return failures


def _run(command: str, config: dict[str, Any], plugin: dict[str, Any], folders: str, where: Attachment,
         before: dict[str, Any]) -> dict[str, Any]:
    given = {**plugin, "name": config["name"], "cniVersion": config["cniVersion"]}
    taken = {name: where.wishes[name] for name, on in (plugin.get("capabilities") or {}).items()
             if on and name in where.wishes}
    if taken:
        given["runtimeConfig"] = taken
    if before:
        given["prevResult"] = before
    env = {"CNI_COMMAND": command, "CNI_CONTAINERID": where.container, "CNI_NETNS": where.namespace,
           "CNI_IFNAME": where.link, "CNI_ARGS": "IgnoreUnknown=1", "CNI_PATH": folders,
           "PATH": os.environ.get("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")}
    what = f"network {config['name']}: CNI plugin {plugin['type']} {command}"
    try:
        done = subprocess.run([program(plugin["type"], folders)], input=json.dumps(given).encode(), capture_output=True,
                              env=env, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired as error:
        raise DeadlineExceeded(f"{what}: no answer within {SECONDS:g} s") from error
    except OSError as error:
        raise FailedPrecondition(f"{what}: {error.strerror}", errno=error.errno) from error
    try:
        said = json.loads(done.stdout) if done.stdout.strip() else {}
    except ValueError:
        said = {"msg": done.stdout.decode(errors="replace").strip()[:200]}
    if done.returncode:
        text = " ".join(str(said.get(key) or "") for key in ("msg", "details")).strip()
        raise FailedPrecondition(f"{what}: {text or done.stderr.decode(errors='replace').strip()[-200:] or 'failed'}")
    return said if isinstance(said, dict) and command == "ADD" else {}


def address_of(result: dict[str, Any]) -> tuple[str, int, str]:
    """(IPv4 address, prefix length, gateway) of a result; "" and 0 for what it does not say."""
    for one in result.get("ips") or []:
        text = str(one.get("address") or "")
        if ":" not in text and text:
            there = IPv4Interface(text)
            return str(there.ip), there.network.prefixlen, str(one.get("gateway") or "")
    return "", 0, ""


def mac_of(result: dict[str, Any], link: str) -> str:
    """Of the link inside."""
    return next((str(one.get("mac") or "") for one in result.get("interfaces") or []
                 if one.get("name") == link and one.get("sandbox")), "")
