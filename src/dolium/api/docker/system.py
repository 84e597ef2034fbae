"""/_ping, /version, /info and what else is about the whole."""

from __future__ import annotations

import asyncio
import os
import platform
import time
from collections import Counter
from pathlib import Path
from typing import Any

from aiohttp import web

from dolium import __version__
from dolium.api.docker import models, volumes
from dolium.api.docker.common import API_VERSION, ENGINE, MIN_API_VERSION, body
from dolium.api.docker.errors import error_response
from dolium.engine import model
from dolium.engine.engine import Engine
from dolium.engine.volumes import volume_size
from dolium.errors import DoliumError, InvalidArgument, PermissionDenied
from dolium.images.auth import Credentials
from dolium.images.hosts import read_settings
from dolium.units import rfc3339

routes = web.RouteTableDef()
GO_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}


def _architecture() -> str:
    return GO_ARCHITECTURES.get(platform.machine(), platform.machine())


@routes.get("/_ping")
async def ping(request: web.Request) -> web.Response:
    """GET and HEAD."""
    headers = {"API-Version": API_VERSION, "Builder-Version": "1", "Docker-Experimental": "false", "Ostype": "linux",
               "Cache-Control": "no-cache, no-store, must-revalidate", "Pragma": "no-cache", "Swarm": "inactive"}
    return web.Response(text="" if request.method == "HEAD" else "OK", headers=headers)


@routes.get("/version")
async def version(request: web.Request) -> web.Response:
    """``docker version``."""
    kernel = os.uname().release
    return web.json_response({
        "Platform": {"Name": "dolium"}, "Version": __version__, "ApiVersion": API_VERSION,
        "MinAPIVersion": MIN_API_VERSION, "GitCommit": "", "GoVersion": f"Python {platform.python_version()}", "Os": "linux",
        "Arch": _architecture(), "KernelVersion": kernel, "BuildTime": "",
        "Components": [
            {"Name": "Engine", "Version": __version__,
             "Details": {"ApiVersion": API_VERSION, "MinAPIVersion": MIN_API_VERSION, "Arch": _architecture(),
                         "KernelVersion": kernel, "Os": "linux"}},
            {"Name": "dolium-runtime", "Version": __version__, "Details": {}}],
    })


def _registries(engine: Engine) -> tuple[dict[str, Any], list[str]]:
    """What the host's files say of registries, and what is wrong with them."""
    try:
        settings = read_settings(Path(engine.paths.etc))
    except DoliumError as error:
        return {"IndexConfigs": {}, "InsecureRegistryCIDRs": [], "Mirrors": []}, [f"WARNING: {error}"]
    mirrors = [f"{'http' if mirror.plain else 'https'}://{mirror.location}/" for mirror in settings.hub_mirrors]
    hosts = {host: {"Name": host, "Mirrors": [], "Secure": False, "Official": False}
             for host in settings.insecure if "/" not in host}
    hub = {"Name": "docker.io", "Mirrors": mirrors, "Secure": True, "Official": True}
    networks = ["127.0.0.0/8", "::1/128", *(entry for entry in settings.insecure if "/" in entry)]
    return {"IndexConfigs": {"docker.io": hub, **hosts}, "InsecureRegistryCIDRs": networks, "Mirrors": mirrors}, []


@routes.get("/info")
async def info(request: web.Request) -> web.Response:
    """``docker info``."""
    engine = request.app[ENGINE]
    registries, warnings = _registries(engine)
    states = [container.status for container in engine.containers.values()]
    with open("/etc/os-release") as file:
        release = dict(line.strip().partition("=")[::2] for line in file if "=" in line)
    return web.json_response({
        "ID": engine.instance, "Containers": len(states), "ContainersRunning": states.count(model.RUNNING),
        "ContainersPaused": states.count(model.PAUSED),
        "ContainersStopped": sum(1 for state in states if state not in model.LIVE),
        "Images": len(engine.images.images()), "Driver": models.driver_name(engine),
        "DriverStatus": [],
        "DockerRootDir": engine.paths.data, "MemoryLimit": True, "SwapLimit": engine.has_swap_limit, "CpuCfsPeriod": True,
        "CpuCfsQuota": True, "CPUShares": True, "CPUSet": True, "PidsLimit": True, "IPv4Forwarding": True,
        "OomKillDisable": not engine.layout.pure_v2, "Debug": False, "NCPU": os.cpu_count() or 1,
        "MemTotal": models.host_memory(), "KernelVersion": os.uname().release, "OSType": "linux",
        "OperatingSystem": release.get("PRETTY_NAME", "Linux").strip('"'), "Architecture": platform.machine(),
        "Name": os.uname().nodename, "ServerVersion": __version__, "LoggingDriver": "json-file", "CgroupDriver": "cgroupfs",
        "CgroupVersion": "2" if engine.layout.pure_v2 else "1",
        "SecurityOptions": ["name=seccomp,profile=builtin", *(["name=userns"] if engine.remapped else [])],
        "Runtimes": engine.levels.table(), "DefaultRuntime": engine.levels.default, "InitBinary": "dolium-init",
        "Plugins": {"Volume": ["local"], "Network": ["bridge", "host", "none"], "Authorization": None, "Log": ["json-file"]},
        "RegistryConfig": registries,
        "Swarm": {"LocalNodeState": "inactive", "NodeID": "", "ControlAvailable": False, "Error": "",
                  "RemoteManagers": None},
        "LiveRestoreEnabled": True, "SystemTime": rfc3339(time.time()), "Warnings": warnings or None, "Labels": [],
        "IndexServerAddress": "https://index.docker.io/v1/", "HttpProxy": "", "HttpsProxy": "", "NoProxy": "",
    })


@routes.post("/auth")
async def auth(request: web.Request) -> web.Response:
    """``docker login``: the registry checks the credentials, nothing is kept here."""
    wish = await body(request)
    credentials = Credentials.parse(wish)
    if credentials is None:
        raise InvalidArgument("docker login: no credentials were given")
    try:
        token = await request.app[ENGINE].images.login(str(wish.get("serveraddress") or ""), credentials)
    except PermissionDenied as error:
        return error_response(401, str(error))  # what the docker command line takes for a refusal
    return web.json_response({"Status": "Login Succeeded", "IdentityToken": token})


# -- disk --


@routes.get("/system/df")
async def disk(request: web.Request) -> web.Response:
    """``docker system df``. ``LayersSize`` is of unpacked layers; ``Dolium.ContentSize`` of the blobs they came from."""
    engine = request.app[ENGINE]
    kinds = set(request.query.getall("type", [])) or {"image", "container", "volume", "build-cache"}
    found: dict[str, Any] = {"LayersSize": 0, "Images": [], "Containers": [], "Volumes": [], "BuildCache": [],
                             "BuilderSize": 0}
    sizes = engine.images.layer_sizes()
    if "image" in kinds:
        images = engine.images.images()
        users = Counter(chain for image in images for chain in image.chain_ids)
        for image in images:
            used = sum(1 for container in engine.containers.values() if container.image_id == image.id)
            row = models.image_summary(image, used)
            row["SharedSize"] = sum(sizes.get(chain, 0) for chain in image.chain_ids if users[chain] > 1)
            row["Labels"] = dict(engine.images.config(image.id).labels)
            found["Images"].append(row)
        found["LayersSize"] = sum(sizes.values())
        found["Dolium"] = {"ContentSize": await asyncio.to_thread(engine.images.content_bytes)}
    if "container" in kinds:
        now = time.time()
        found["Containers"] = [models.summary(engine, one, now, size=await asyncio.to_thread(engine.roots.size, one))
                               for one in list(engine.containers.values())]
    if "volume" in kinds:
        for volume in engine.volumes.all():
            found["Volumes"].append(volumes.described(engine, volume.name) | {
                "UsageData": {"Size": await volume_size(engine, volume.name),
                              "RefCount": len(engine.volume_users(volume.name))}})
    return web.json_response(found)


@routes.post("/build/prune")
async def build_prune(request: web.Request) -> web.Response:
    """There is no build cache in this version, so there is nothing to remove."""
    return web.json_response({"CachesDeleted": None, "SpaceReclaimed": 0})
