"""/networks: what ``docker network`` asks for."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import datetime
from typing import Any

from aiohttp import web

from dolium.api.docker.common import CONTAINERS, ENGINE, before_moment, body, filters, label_matches
from dolium.engine.engine import Engine
from dolium.errors import DoliumError, InvalidArgument, PermissionDenied
from dolium.network.base import endpoints
from dolium.network.records import PREDEFINED

routes = web.RouteTableDef()
_FILTERS = ("dangling", "driver", "id", "label", "name", "scope", "type")


def described(engine: Engine, row: dict[str, Any], *, containers: bool) -> dict[str, Any]:
    """A network's object, with its live containers by name; without them in a list, as Docker has it."""
    row["Containers"] = {
        one.id: {**entry, "Name": one.name} for one in engine.containers.values()
        if (entry := row["Containers"].get(one.id)) is not None} if containers else {}
    return row


def _matches(row: dict[str, Any], wanted: dict[str, list[str]]) -> bool:
    for key in wanted:
        if key not in _FILTERS:
            raise InvalidArgument(f"invalid filter '{key}'")
    predefined = row["Name"] in PREDEFINED
    dangling = not predefined and not row["Containers"]
    kinds = {"builtin": predefined, "custom": not predefined}
    for value in wanted.get("type") or []:
        if value not in kinds:
            raise InvalidArgument(f"invalid filter: 'type'='{value}'")
    checks: dict[str, Callable[[str], bool]] = {
        "id": lambda value: row["Id"].startswith(value), "name": lambda value: value in row["Name"],
        "driver": lambda value: row["Driver"] == value, "scope": lambda value: row["Scope"] == value,
        "type": lambda value: kinds[value],
        "dangling": lambda value: dangling == (value.lower() in ("true", "1"))}
    return label_matches(row["Labels"], wanted.get("label") or []) and all(
        any(check(value) for value in wanted[key]) for key, check in checks.items() if key in wanted)


@routes.get("/networks")
async def listing(request: web.Request) -> web.Response:
    """``docker network ls``."""
    engine, wanted = request.app[ENGINE], filters(request)
    rows = [row for row in engine.network.describe() if _matches(row, wanted)]
    return web.json_response([described(engine, row, containers=False) for row in rows])


@routes.get("/networks/{name}")
async def inspect(request: web.Request) -> web.Response:
    """``docker network inspect``."""
    engine = request.app[ENGINE]
    return web.json_response(described(engine, engine.network.find(request.match_info["name"]), containers=True))


@routes.post("/networks/create")
async def create(request: web.Request) -> web.Response:
    """``docker network create``."""
    engine, wish = request.app[ENGINE], await body(request)
    identity = await engine.network.create(wish)
    row = engine.network.find(identity)
    engine.events.publish("network", "create", identity, {"name": row["Name"], "type": row["Driver"]})
    return web.json_response({"Id": identity, "Warning": ""}, status=201)


async def _remove(engine: Engine, reference: str) -> str:
    row = engine.network.find(reference)
    name = await engine.network.remove(row["Id"])
    engine.events.publish("network", "destroy", row["Id"], {"name": name, "type": row["Driver"]})
    return name


@routes.delete("/networks/{name}")
async def remove(request: web.Request) -> web.Response:
    """``docker network rm``."""
    await _remove(request.app[ENGINE], request.match_info["name"])
    return web.Response(status=204)


@routes.post("/networks/prune")
async def prune(request: web.Request) -> web.Response:
    """Networks of users' own that no container is in, running or not."""
    engine, wanted = request.app[ENGINE], filters(request)
    for key in wanted:
        if key not in ("until", "label", "label!"):
            raise InvalidArgument(f"invalid filter '{key}'")
    before = before_moment(wanted) if "until" in wanted else time.time()
    used = {name for one in engine.containers.values() for name in [
        one.host_config.get("NetworkMode"), *one.endpoint_settings, *(end.get("network") for end in endpoints(one.network))]}
    removed = []
    for row in engine.network.describe():
        unwanted = [value for value in wanted.get("label!") or [] if label_matches(row["Labels"], [value])]
        if (row["Name"] in PREDEFINED or {row["Name"], row["Id"]} & used or unwanted
                or not label_matches(row["Labels"], wanted.get("label") or [])
                or datetime.fromisoformat(row["Created"]).timestamp() >= before):
            continue
        try:
            removed.append(await _remove(engine, row["Id"]))
        except PermissionDenied:
            continue  # a container came in just now
    return web.json_response({"NetworksDeleted": removed or None})


@routes.post("/networks/{name}/connect")
async def connect(request: web.Request) -> web.Response:
    """``docker network connect``."""
    wish = await body(request)
    settings = wish.get("EndpointConfig") or {}
    if not isinstance(settings, dict):
        raise InvalidArgument("EndpointConfig must be an object")
    await request.app[CONTAINERS].networks.connect(request.match_info["name"], str(wish.get("Container") or ""), settings)
    return web.Response(status=200)


@routes.post("/networks/{name}/disconnect")
async def disconnect(request: web.Request) -> web.Response:
    """``docker network disconnect``; ``Force`` passes over a container that is not in it."""
    wish = await body(request)
    try:
        await request.app[CONTAINERS].networks.disconnect(request.match_info["name"], str(wish.get("Container") or ""))
    except DoliumError:
        if not wish.get("Force"):
            raise
    return web.Response(status=200)
