"""What the routes share: parameters, filters, JSON bodies, streams."""

from __future__ import annotations

import json
import re
import time
from datetime import UTC, datetime
from typing import Any

from aiohttp import web

from dolium.engine.containers import Containers
from dolium.engine.engine import Engine
from dolium.engine.execs import Execs
from dolium.errors import InvalidArgument

ENGINE = web.AppKey("engine", Engine)
CONTAINERS = web.AppKey("containers", Containers)
EXECS = web.AppKey("execs", Execs)

API_VERSION, MIN_API_VERSION = "1.47", "1.24"


def flag(request: web.Request, name: str, default: bool = False) -> bool:
    """A boolean query parameter as Docker reads it."""
    value = request.query.get(name)
    return default if value is None else value.lower() not in ("", "0", "no", "false", "none")


def number(request: web.Request, name: str) -> int | None:
    """An integer query parameter, None when absent. Raises InvalidArgument."""
    value = request.query.get(name)
    if not value:
        return None
    try:
        return int(value)
    except ValueError as error:
        raise InvalidArgument(f"invalid value {value!r} for {name}") from error


async def body(request: web.Request) -> dict[str, Any]:
    """The JSON object of a request; empty when there is no body. Raises InvalidArgument."""
    text = await request.read()
    if not text.strip():
        return {}
    try:
        value = json.loads(text)
    except ValueError as error:
        raise InvalidArgument(f"invalid JSON: {error}") from error
    if not isinstance(value, dict):
        raise InvalidArgument("the request's body must be a JSON object")
    return value


def filters(request: web.Request) -> dict[str, list[str]]:
    """The ``filters`` parameter: name to values, in both of Docker's forms. Raises InvalidArgument."""
    text = request.query.get("filters")
    if not text:
        return {}
    try:
        value = json.loads(text)
        return {key: [one for one, on in entry.items() if on] if isinstance(entry, dict) else [str(one) for one in entry]
                for key, entry in value.items()}
    except (ValueError, AttributeError, TypeError) as error:
        raise InvalidArgument(f"invalid filter {text!r}") from error


_DURATION = re.compile(r"(\d+(?:\.\d+)?)(h|m|s)")


def before_moment(wanted: dict[str, list[str]]) -> float:
    """The ``until`` filter as Unix time, 0 without one: a duration back from now (``24h``, ``1h30m``), Unix seconds, a date
    or an RFC 3339 time. Raises InvalidArgument.
    """
    values = wanted.get("until") or []
    if not values:
        return 0.0
    text = values[0]
    parts = _DURATION.findall(text)
    if len(values) == 1 and parts and "".join(number + unit for number, unit in parts) == text:
        return time.time() - sum(float(number) * {"h": 3600, "m": 60, "s": 1}[unit] for number, unit in parts)
    try:
        if len(values) > 1:
            raise ValueError
        if text.replace(".", "", 1).isdigit():
            return float(text)
        found = datetime.fromisoformat(text)
    except ValueError:
        raise InvalidArgument(f"invalid filter 'until={text}'", hint="one of 24h, 2024-01-31, an RFC 3339 time") from None
    return (found if found.tzinfo else found.replace(tzinfo=UTC)).timestamp()


def label_matches(labels: dict[str, str], wanted: list[str]) -> bool:
    """``key`` or ``key=value``, all of them."""
    for entry in wanted:
        key, equals, value = entry.partition("=")
        if key not in labels or (equals and labels[key] != value):
            return False
    return True


async def stream(request: web.Request, content_type: str = "application/json") -> web.StreamResponse:
    """A response whose headers go out at once."""
    response = web.StreamResponse(headers={"Content-Type": content_type})
    await response.prepare(request)
    return response


def gone(request: web.Request) -> bool:
    """Has the client closed the connection?"""
    return request.transport is None or request.transport.is_closing()


def no_content() -> web.Response:
    """204."""
    return web.Response(status=204)
