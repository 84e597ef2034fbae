"""``--change`` of import and commit: Dockerfile instructions applied to an image's ``config`` object."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Mapping

from dolium.errors import InvalidArgument

JsonObject = Mapping[str, object]


def apply_changes(config: JsonObject, changes: Iterable[str]) -> dict[str, object]:
    """A copy of ``config`` with CMD, ENTRYPOINT, ENV, EXPOSE, LABEL, ONBUILD, STOPSIGNAL, USER, VOLUME and WORKDIR
    instructions applied in order. Raises InvalidArgument; ``config`` is not changed.
    """
    result = dict(config)
    for change in changes:
        word, _, rest = change.strip().partition(" ")
        name, value = word.upper(), rest.strip()
        if not value:
            raise InvalidArgument(f"change {change!r}: the instruction has no value")
        if name in ("CMD", "ENTRYPOINT"):
            result["Cmd" if name == "CMD" else "Entrypoint"] = _command(value)
        elif name == "ENV":
            result["Env"] = _environment(result.get("Env"), _pairs(change, value))
        elif name == "LABEL":
            result["Labels"] = _object(result.get("Labels")) | dict(_pairs(change, value))
        elif name == "EXPOSE":
            result["ExposedPorts"] = _object(result.get("ExposedPorts")) | {
                port if "/" in port else f"{port}/tcp": {} for port in value.split()
            }
        elif name == "VOLUME":
            paths = _json_words(value) or value.split()
            result["Volumes"] = _object(result.get("Volumes")) | {path: {} for path in paths}
        elif name == "ONBUILD":
            before = result.get("OnBuild")
            result["OnBuild"] = [*(before if isinstance(before, list) else []), value]
        elif name in ("USER", "WORKDIR", "STOPSIGNAL"):
            result[{"USER": "User", "WORKDIR": "WorkingDir", "STOPSIGNAL": "StopSignal"}[name]] = value
        else:
            raise InvalidArgument(f"{word} is not a valid change command")
    return result


def _object(value: object) -> dict[str, object]:
    return dict(value) if isinstance(value, dict) else {}


def _json_words(value: str) -> list[str] | None:
    """The exec form, or None when it is not one."""
    try:
        words = json.loads(value)
    except ValueError:
        return None
    return words if isinstance(words, list) and all(isinstance(word, str) for word in words) else None


def _command(value: str) -> list[str]:
    words = _json_words(value)
    return words if words is not None else ["/bin/sh", "-c", value]


def _pairs(change: str, value: str) -> list[tuple[str, str]]:
    """``a=1 b="2 3"``, or the old ``a everything else``."""
    first = value.split(None, 1)
    if "=" not in first[0]:
        if len(first) < 2:
            raise InvalidArgument(f"change {change!r}: {first[0]} has no value")
        return [(first[0], first[1])]
    try:
        words = shlex.split(value)
    except ValueError as error:
        raise InvalidArgument(f"change {change!r}: {error}") from None
    pairs = [word.partition("=") for word in words]
    if not all(name and equals for name, equals, _ in pairs):
        raise InvalidArgument(f"change {change!r}: write NAME=VALUE")
    return [(name, text) for name, _, text in pairs]


def _environment(before: object, pairs: list[tuple[str, str]]) -> list[str]:
    lines = [line for line in before if isinstance(line, str)] if isinstance(before, list) else []
    for name, value in pairs:
        lines = [line for line in lines if line.partition("=")[0] != name] + [f"{name}={value}"]
    return lines
