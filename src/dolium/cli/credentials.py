"""The caller's registry credentials: Docker's ``config.json``, and the helper programs it names.

    auths         {REGISTRY: {"auth": base64 of user:password, "identitytoken": ...}}
    credsStore    the helper docker-credential-NAME keeps all
    credHelpers   {REGISTRY: NAME}

Docker Hub's key is ``https://index.docker.io/v1/``.
"""

from __future__ import annotations

import base64
import json
import os
import subprocess

from dolium.cli.transport import ApiError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from dolium.cli.context import Context

HUB = "https://index.docker.io/v1/"
_HELPER_SECONDS = 60
_ABSENT = "credentials not found in native keychain"


def config_path(context: Context) -> str:
    """Where the caller's config.json is, or would be."""
    folder = context.env.get("DOCKER_CONFIG") or os.path.join(context.env.get("HOME") or "/root", ".docker")
    return context.path(os.path.join(folder, "config.json"))


def load(context: Context) -> dict[str, Any]:
    """The file's content, empty when there is none. Raises ApiError."""
    path = config_path(context)
    try:
        value = json.loads(context.read_text(path))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ApiError(0, f"{path}: {error}") from error
    if not isinstance(value, dict):
        raise ApiError(0, f"{path}: not a JSON object")
    return value


def save(context: Context, config: dict[str, Any]) -> None:
    """Replace the file: whoever reads it meanwhile sees the old one or the new one. Nobody else may read it."""
    path = os.path.realpath(config_path(context))
    os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
    beside = f"{path}.{os.getpid()}"
    with open(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600), "w", encoding="utf-8") as file:
        file.write(json.dumps(config, indent="\t") + "\n")
    os.replace(beside, path)


def registry_of(image: str) -> str:
    """The registry's key for an image's name."""
    head, slash, _ = image.partition("/")
    if slash and (head == "localhost" or "." in head or ":" in head):
        return key_of(head)
    return HUB


def key_of(server: str) -> str:
    """The key of a registry as a person writes it."""
    host = server.partition("://")[2] or server
    host = host.partition("/")[0]
    return HUB if host in ("", "docker.io", "index.docker.io", "registry-1.docker.io") else host


def _host(key: str) -> str:
    return (key.partition("://")[2] or key).partition("/")[0]


def find(context: Context, key: str, config: dict[str, Any] | None = None) -> dict[str, str]:
    """Docker's AuthConfig for a registry, empty when there are no credentials. Raises ApiError when a helper fails."""
    config = load(context) if config is None else config
    helper = helper_of(config, key)
    if helper:
        found = call_helper(context, helper, "get", key)
        if not found:
            return {}
        secret = {"identitytoken": found["Secret"]} if found["Username"] == "<token>" else {
            "username": found["Username"], "password": found["Secret"]}
        return {**secret, "serveraddress": key}
    auths = config.get("auths") or {}
    entry = auths.get(key) or next((value for name, value in auths.items() if _host(name) == _host(key)), None)
    if not entry:
        return {}
    return {name: str(entry[name]) for name in ("username", "password", "auth", "identitytoken", "registrytoken")
            if entry.get(name)} | {"serveraddress": key}


def helper_of(config: dict[str, Any], key: str) -> str:
    """The name of the helper that keeps a registry's credentials, or ""."""
    return str((config.get("credHelpers") or {}).get(_host(key) if key != HUB else key) or config.get("credsStore") or "")


def call_helper(context: Context, helper: str, verb: str, text: str) -> dict[str, str]:
    """``docker-credential-HELPER VERB``; the answer of ``get``, else empty. Raises ApiError."""
    program = f"docker-credential-{helper}"
    try:
        done = subprocess.run([program, verb], input=text, capture_output=True, text=True, env=context.env, check=False,
                              timeout=_HELPER_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ApiError(0, f"credential helper {program}: {error}") from error
    if done.returncode:
        said = (done.stdout or done.stderr).strip()
        if verb != "store" and _ABSENT in said:
            return {}
        raise ApiError(0, f"credential helper {program} {verb}: {said or f'exit code {done.returncode}'}")
    if verb != "get":
        return {}
    try:
        found = json.loads(done.stdout)
        return {"Username": str(found["Username"]), "Secret": str(found["Secret"])}
    except (ValueError, KeyError, TypeError) as error:
        raise ApiError(0, f"credential helper {program}: its answer makes no sense: {error}") from error


def keep(context: Context, key: str, user: str, password: str, identity_token: str) -> str:
    """Store what a login gave; returns where it went, for people."""
    config = load(context)
    helper = helper_of(config, key)
    if helper:
        call_helper(context, helper, "store", json.dumps({
            "ServerURL": key, "Username": "<token>" if identity_token else user, "Secret": identity_token or password}))
        return f"the credential helper docker-credential-{helper}"
    secret = {"auth": base64.b64encode(f"{user}:{'' if identity_token else password}".encode()).decode()}
    if identity_token:
        secret["identitytoken"] = identity_token
    config.setdefault("auths", {})[key] = secret
    save(context, config)
    return config_path(context)


def drop(context: Context, key: str) -> bool:
    """Forget a registry's credentials; False when there were none."""
    config = load(context)
    helper = helper_of(config, key)
    if helper and call_helper(context, helper, "get", key):
        call_helper(context, helper, "erase", key)
        return True
    names = [name for name in config.get("auths") or {} if _host(name) == _host(key)]
    for name in names:
        del config["auths"][name]
    if names:
        save(context, config)
    return bool(names)


def header(context: Context, image: str) -> dict[str, str]:
    """X-Registry-Auth for a request about an image, or nothing."""
    found = find(context, registry_of(image))
    return {"X-Registry-Auth": encoded(found)} if found else {}


def every(context: Context) -> dict[str, str]:
    """X-Registry-Config: what is known of all registries, for work on many images."""
    config = load(context)
    keys = {*(config.get("auths") or {}), *(config.get("credHelpers") or {})}
    found = {key: find(context, key, config) for key in sorted(keys)}
    found = {key: value for key, value in found.items() if value}
    return {"X-Registry-Config": encoded(found)} if found else {}


def encoded(value: object) -> str:
    """base64url of JSON."""
    return base64.urlsafe_b64encode(json.dumps(value).encode()).decode()
