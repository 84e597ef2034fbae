"""/volumes: what ``docker volume`` asks for."""

from __future__ import annotations

import contextlib
from typing import Any

from aiohttp import web

from dolium.api.docker.common import ENGINE, body, filters, flag, label_matches, no_content
from dolium.engine.engine import Engine
from dolium.engine.volumes import volume_size
from dolium.errors import FailedPrecondition, InvalidArgument, NotFound
from dolium.units import rfc3339

routes = web.RouteTableDef()


def described(engine: Engine, name: str) -> dict[str, Any]:
    """A volume's object. Raises NotFound."""
    volume = engine.volumes.get(name)
    return {"Name": name, "Driver": "local", "Mountpoint": engine.volumes.path(name), "Labels": volume.labels or None,
            "Scope": "local", "Options": volume.options or None, "CreatedAt": rfc3339(volume.created)}


def _wanted(request: web.Request, known: tuple[str, ...]) -> dict[str, list[str]]:
    wanted = filters(request)
    for key in wanted:
        if key not in known:
            raise InvalidArgument(f"invalid filter '{key}'", hint=f"one of {', '.join(known)}")
    return wanted


def _truth(wanted: dict[str, list[str]], key: str) -> bool | None:
    """None without the filter. Raises InvalidArgument."""
    values = wanted.get(key) or []
    if not values:
        return None
    if len(values) > 1 or values[0] not in ("1", "true", "True", "0", "false", "False"):
        raise InvalidArgument(f"invalid filter '{key}={','.join(values)}'", hint="true or false")
    return values[0] in ("1", "true", "True")


@routes.get("/volumes")
async def listing(request: web.Request) -> web.Response:
    """``docker volume ls``."""
    engine, wanted = request.app[ENGINE], _wanted(request, ("dangling", "driver", "label", "name"))
    dangling, rows = _truth(wanted, "dangling"), []
    for volume in engine.volumes.all():
        if dangling is not None and dangling == bool(engine.volume_users(volume.name)):
            continue
        if "local" not in (wanted.get("driver") or ["local"]):
            continue
        if not any(name in volume.name for name in wanted.get("name") or [""]):
            continue
        if label_matches(volume.labels, wanted.get("label") or []):
            rows.append(described(engine, volume.name))
    return web.json_response({"Volumes": rows, "Warnings": None})


@routes.post("/volumes/create")
async def create(request: web.Request) -> web.Response:
    """``docker volume create``."""
    engine, wish = request.app[ENGINE], await body(request)
    for key, kind in (("Name", str), ("Driver", str), ("DriverOpts", dict), ("Labels", dict)):
        if not isinstance(wish.get(key) or kind(), kind):
            raise InvalidArgument(f"{key} must be {'a text' if kind is str else 'an object of texts'}")
    if not all(isinstance(text, str) for key in ("DriverOpts", "Labels") for text in (wish.get(key) or {}).values()):
        raise InvalidArgument("DriverOpts and Labels must be objects of texts")
    made = await engine.volumes.ensure(wish.get("Name") or "", labels=wish.get("Labels"),
                                       driver=wish.get("Driver") or "local", options=wish.get("DriverOpts"))
    engine.events.publish("volume", "create", made.name, {"driver": "local"})
    return web.json_response(described(engine, made.name), status=201)


@routes.get("/volumes/{name}")
async def inspect(request: web.Request) -> web.Response:
    """``docker volume inspect``."""
    return web.json_response(described(request.app[ENGINE], request.match_info["name"]))


@routes.delete("/volumes/{name}")
async def remove(request: web.Request) -> web.Response:
    """``docker volume rm``."""
    engine, name = request.app[ENGINE], request.match_info["name"]
    try:
        await engine.remove_volume(name, engine.volume_users(name))
    except NotFound:
        if not flag(request, "force"):
            raise
        return no_content()
    engine.events.publish("volume", "destroy", name, {"driver": "local"})
    return no_content()


@routes.post("/volumes/prune")
async def prune(request: web.Request) -> web.Response:
    """Remove unused anonymous volumes; with ``all`` named ones too. ``SpaceReclaimed`` is in bytes."""
    engine, wanted = request.app[ENGINE], _wanted(request, ("all", "label", "label!"))
    every = _truth(wanted, "all") or False
    removed, freed = [], 0
    for volume in engine.volumes.all():
        unwanted = any(label_matches(volume.labels, [value]) for value in wanted.get("label!") or [])
        if (not (volume.anonymous or every) or unwanted or engine.volume_users(volume.name)
                or not label_matches(volume.labels, wanted.get("label") or [])):
            continue
        # meanwhile somebody else may have removed it, or a container may have come that uses it
        with contextlib.suppress(NotFound, FailedPrecondition):
            size = await volume_size(engine, volume.name)
            await engine.remove_volume(volume.name, engine.volume_users(volume.name))
            removed.append(volume.name)
            freed += size
            engine.events.publish("volume", "destroy", volume.name, {"driver": "local"})
    engine.events.publish("volume", "prune", "", {"reclaimed": str(freed)})
    return web.json_response({"VolumesDeleted": removed or None, "SpaceReclaimed": freed})
