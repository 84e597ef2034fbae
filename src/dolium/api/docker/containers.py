"""/containers and /exec, but for streams (streams.py) and archives (archive.py)."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import time
from collections.abc import Callable, Iterable
from typing import Any

from aiohttp import web

from dolium.api.docker import models
from dolium.api.docker.common import (
    CONTAINERS,
    ENGINE,
    EXECS,
    before_moment,
    body,
    filters,
    flag,
    gone,
    label_matches,
    no_content,
    number,
    stream,
)
from dolium.engine import changes as engine_changes
from dolium.engine import model
from dolium.engine.engine import Engine
from dolium.engine.model import Container
from dolium.errors import FailedPrecondition, InvalidArgument, NotFound
from dolium.linux.cgroup import manage
from dolium.runtime.cli import signal_number

routes = web.RouteTableDef()


def split_create(request_body: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any], Any]:
    """(Config, HostConfig, NetworkingConfig) of a create request."""
    host = request_body.get("HostConfig") or {}
    if not isinstance(host, dict):
        raise InvalidArgument("HostConfig must be an object")
    config = {key: value for key, value in request_body.items() if key not in ("HostConfig", "NetworkingConfig")}
    return config, dict(host), request_body.get("NetworkingConfig")


@routes.post("/containers/create")
async def create(request: web.Request) -> web.Response:
    """Make a container. ``platform`` in the query: what the image must be for; ``rootfs`` (dolium's own): a folder in place
    of an image."""
    config, host, networking = split_create(await body(request))
    container = await request.app[CONTAINERS].create(
        request.query.get("name", ""), config, host, networking, rootfs=request.query.get("rootfs", ""),
        platform=request.query.get("platform", ""))
    return web.json_response({"Id": container.id, "Warnings": []}, status=201)


_FILTERS = {"id", "name", "status", "label", "ancestor", "exited", "before", "since", "network", "volume", "publish",
            "expose", "health", "is-task"}


def _check_filters(wanted: dict[str, list[str]]) -> None:
    """Raises InvalidArgument in Docker's words."""
    for key, values in wanted.items():
        if key not in _FILTERS:
            raise InvalidArgument(f"invalid filter '{key}'")
        for value in values:
            if (key == "status" and value not in model.STATES) or (key == "exited" and not value.lstrip("-").isdigit()) or (
                    key == "health" and value not in ("none", "starting", "healthy", "unhealthy")):
                raise InvalidArgument(f"invalid filter '{key}={value}'")
            if key in ("name", "id"):
                try:
                    re.compile(value)
                except re.error as error:
                    raise InvalidArgument(f"invalid filter '{key}={value}': {error}") from error


def _port_matches(value: str, specs: Iterable[str]) -> bool:
    """``80``, ``80/tcp``, ``80-90/udp`` among ``80/tcp`` …"""
    text, _, protocol = value.partition("/")
    first, _, last = text.partition("-")
    if not first.isdigit() or not (last or first).isdigit():
        raise InvalidArgument(f"invalid filter: {value!r} is no port")
    return any(int(first) <= int(port) <= int(last or first) and kind == (protocol or "tcp")
               for port, _, kind in (spec.partition("/") for spec in specs) if port.isdigit())


def _matches(container: Container, wanted: dict[str, list[str]]) -> bool:
    live_ports = container.network.get("ports") or [] if container.live else []
    checks: dict[str, Callable[[str], bool]] = {
        "id": lambda value: re.search(value, container.id) is not None,
        "name": lambda value: any(re.search(value, name) for name in (container.name, f"/{container.name}")),
        "status": lambda value: container.status == value,
        "ancestor": lambda value: value in (container.image, container.image_id) or container.image.split(":")[0] == value
        or container.image_id.removeprefix("sha256:").startswith(value),
        "exited": lambda value: container.status == model.EXITED and container.exit_code == int(value),
        "network": lambda value: any(value in (name, entry["NetworkID"]) for name, entry in
                                     models.network_settings(container)["Networks"].items()),
        "health": lambda value: value == "none",  # there are no health checks
        "is-task": lambda value: value.lower() in ("false", "0"),
        "publish": lambda value: _port_matches(value, [f"{one['host_port']}/{one['protocol']}" for one in live_ports]),
        "expose": lambda value: _port_matches(value, container.config.get("ExposedPorts") or {}),
        "volume": lambda value: any(value in (mount.name, mount.target) for mount in container.mounts),
    }
    for key, values in wanted.items():
        if key == "label":
            if not label_matches(container.config.get("Labels") or {}, values):
                return False
        elif key in checks and not any(checks[key](value) for value in values):
            return False
    return True


async def written(engine: Engine, container: Container) -> int:
    """Bytes a container wrote. In a thread: it may have written a million files."""
    return await asyncio.to_thread(engine.roots.size, container)


@routes.get("/containers/json")
async def listing(request: web.Request) -> web.Response:
    """``docker ps``."""
    engine, wanted = request.app[ENGINE], filters(request)
    _check_filters(wanted)
    limit = number(request, "limit") or 0
    every = flag(request, "all") or limit > 0 or bool({"status", "exited"} & set(wanted))
    found = [container for container in engine.containers.values()
             if (every or container.live or container.status == model.RESTARTING) and _matches(container, wanted)]
    found.sort(key=lambda container: container.created, reverse=True)
    for key, newer in (("before", False), ("since", True)):
        for reference in wanted.get(key) or []:
            pivot = engine.find(reference).created
            found = [one for one in found if (one.created > pivot) == newer and one.created != pivot]
    now = time.time()
    rows = [models.summary(engine, one, now, size=await written(engine, one) if flag(request, "size") else None)
            for one in (found[:limit] if limit > 0 else found)]
    return web.json_response(rows)


@routes.get("/containers/{name}/json")
async def inspect(request: web.Request) -> web.Response:
    """``docker inspect``."""
    engine = request.app[ENGINE]
    container = engine.find(request.match_info["name"])
    found = models.inspect(engine, request.app[CONTAINERS], container, request.app[EXECS].of(container.id),
                           size=await written(engine, container) if flag(request, "size") else None)
    return web.json_response(found)


@routes.post("/containers/{name}/start")
async def start(request: web.Request) -> web.Response:
    """204, or 304 when it runs already."""
    done = await asyncio.shield(request.app[CONTAINERS].start(request.match_info["name"]))
    return web.Response(status=204 if done else 304)


@routes.post("/containers/{name}/stop")
async def stop(request: web.Request) -> web.Response:
    """204, or 304 when it was not running."""
    done = await request.app[CONTAINERS].stop(request.match_info["name"], number(request, "t"),
                                              request.query.get("signal", ""))
    return web.Response(status=204 if done else 304)


@routes.post("/containers/{name}/restart")
async def restart(request: web.Request) -> web.Response:
    """Stop and start."""
    await asyncio.shield(request.app[CONTAINERS].restart(request.match_info["name"], number(request, "t"),
                                                         request.query.get("signal", "")))
    return no_content()


@routes.post("/containers/{name}/kill")
async def kill(request: web.Request) -> web.Response:
    """A signal, SIGKILL by default."""
    name = request.match_info["name"]
    word = request.query.get("signal") or "KILL"
    try:
        signal_number(word)
    except InvalidArgument:
        raise InvalidArgument(f"Invalid signal: {word}") from None
    try:
        await request.app[CONTAINERS].kill(name, word)
    except (FailedPrecondition, NotFound) as error:
        raise type(error)(f"cannot kill container: {name}: {error}") from error
    return no_content()


@routes.post("/containers/{name}/rename")
async def rename(request: web.Request) -> web.Response:
    """Another name."""
    await request.app[CONTAINERS].rename(request.match_info["name"], request.query.get("name", ""))
    return no_content()


@routes.post("/containers/{name}/pause")
async def pause(request: web.Request) -> web.Response:
    """Freeze."""
    await request.app[CONTAINERS].pause(request.match_info["name"], True)
    return no_content()


@routes.post("/containers/{name}/unpause")
async def unpause(request: web.Request) -> web.Response:
    """Thaw."""
    await request.app[CONTAINERS].pause(request.match_info["name"], False)
    return no_content()


@routes.delete("/containers/{name}")
async def remove(request: web.Request) -> web.Response:
    """``docker rm``."""
    if flag(request, "link"):
        raise InvalidArgument("links are not supported", hint="name networks are the way since Docker 1.9")
    await asyncio.shield(request.app[CONTAINERS].remove(request.match_info["name"], force=flag(request, "force"),
                                                        volumes=flag(request, "v")))
    return no_content()


@routes.post("/containers/prune")
async def prune(request: web.Request) -> web.Response:
    """Remove every container that is not running."""
    engine, containers = request.app[ENGINE], request.app[CONTAINERS]
    wanted = filters(request)
    removed, freed, until = [], 0, before_moment(wanted)
    for container in list(engine.containers.values()):
        labels = container.config.get("Labels") or {}
        if container.status in (model.CREATED, model.EXITED, model.DEAD) and not (until and container.created >= until) \
                and label_matches(labels, wanted.get("label") or []) \
                and not any(label_matches(labels, [label]) for label in wanted.get("label!") or []):
            freed += await written(engine, container)
            await containers.remove(container.id)
            removed.append(container.id)
    return web.json_response({"ContainersDeleted": removed or None, "SpaceReclaimed": freed})


@routes.post("/containers/{name}/wait")
async def wait(request: web.Request) -> web.StreamResponse:
    """The headers go out at once: the client starts the container only when the wait is known to be in place."""
    future = request.app[CONTAINERS].wait(request.match_info["name"], request.query.get("condition") or "not-running")
    response = await stream(request)
    while not future.done():
        await asyncio.wait({future}, timeout=2)
        if gone(request):
            future.cancel()
            return response
    await response.write(json.dumps({"StatusCode": future.result()}).encode() + b"\n")
    return response


@routes.post("/containers/{name}/resize")
async def resize(request: web.Request) -> web.Response:
    """The terminal's size; one that is not running yet gets it at its start."""
    rows, columns = number(request, "h") or 0, number(request, "w") or 0
    container = request.app[ENGINE].find(request.match_info["name"])
    if not container.live:
        raise FailedPrecondition(f"container {container.id} is not running")
    _, shim = request.app[CONTAINERS].running(container.id)
    await shim.resize("init", rows, columns)
    return web.Response(status=200)


@routes.get("/containers/{name}/top")
async def top(request: web.Request) -> web.Response:
    """``ps`` on the host, with the rows of the container's processes."""
    engine = request.app[ENGINE]
    container, _ = request.app[CONTAINERS].running(request.match_info["name"])
    arguments = (request.query.get("ps_args") or "-ef").split()
    own = await engine.backend(container).listing(container.id)
    if own is not None:
        if arguments != ["-ef"]:
            raise InvalidArgument(f"ps {' '.join(arguments)}: the host's ps does not see into isolation "
                                  f"{engine.backend(container).level}", hint="leave the ps options out")
        return web.json_response({"Titles": own[0], "Processes": own[1]})
    folder = engine.layout.paths(engine.container_group(container.id))[0]
    pids = {str(pid) for pid in manage.processes(folder)}

    def run() -> subprocess.CompletedProcess[str]:
        return subprocess.run(["ps", *arguments], capture_output=True, text=True, check=False)

    done = await asyncio.to_thread(run)
    if done.returncode:
        raise InvalidArgument(f"ps {' '.join(arguments)}: {done.stderr.strip()}")
    lines = done.stdout.splitlines()
    titles = lines[0].split()
    if "PID" not in titles:
        raise InvalidArgument("Couldn't find PID field in ps output")
    column = titles.index("PID")
    rows = [line.split(None, len(titles) - 1) for line in lines[1:]]
    return web.json_response({"Titles": titles, "Processes": [row for row in rows if row[column] in pids]})


@routes.get("/containers/{name}/changes")
async def changes(request: web.Request) -> web.Response:
    """``docker diff``."""
    found = await engine_changes.diff(request.app[ENGINE], request.match_info["name"])
    return web.json_response([{"Path": one.path, "Kind": int(one.kind)} for one in found])


@routes.post("/commit")
async def commit(request: web.Request) -> web.Response:
    """``docker commit``. The body may be an image's Config."""
    engine, query = request.app[ENGINE], request.query
    repository, tag = query.get("repo", ""), query.get("tag", "")
    image = await engine_changes.commit(
        engine, request.app[CONTAINERS], query.get("container", ""), own=await body(request),
        name=f"{repository}:{tag}" if repository and tag else repository or None, author=query.get("author", ""),
        message=query.get("comment", ""), pause=flag(request, "pause", True), changes=query.getall("changes", []))
    return web.json_response({"Id": image.id}, status=201)


@routes.post("/containers/{name}/exec")
async def exec_create(request: web.Request) -> web.Response:
    """Remember an exec."""
    made = request.app[EXECS].create(request.match_info["name"], await body(request))
    return web.json_response({"Id": made.id}, status=201)


@routes.get("/exec/{id}/json")
async def exec_inspect(request: web.Request) -> web.Response:
    """State of an exec."""
    one = request.app[EXECS].find(request.match_info["id"])
    config = one.config
    command = config.get("Cmd") or [""]
    return web.json_response({
        "ID": one.id, "Running": one.running, "ExitCode": one.exit_code, "ContainerID": one.container, "Pid": one.pid,
        "OpenStdin": bool(config.get("AttachStdin")), "OpenStdout": bool(config.get("AttachStdout")),
        "OpenStderr": bool(config.get("AttachStderr")), "CanRemove": False, "DetachKeys": "",
        "ProcessConfig": {"tty": bool(config.get("Tty")), "entrypoint": command[0], "arguments": command[1:],
                          "privileged": bool(config.get("Privileged")), "user": config.get("User") or ""},
    })


@routes.post("/exec/{id}/resize")
async def exec_resize(request: web.Request) -> web.Response:
    """The terminal's size of an exec."""
    one = request.app[EXECS].find(request.match_info["id"])
    await request.app[EXECS].resize(one, number(request, "h") or 0, number(request, "w") or 0)
    return web.Response(status=200)
