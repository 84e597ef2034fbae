"""Registry authentication: WWW-Authenticate challenges (RFC 9110 section 11.6.1) and the tokens they lead to."""

from __future__ import annotations

import base64
import binascii
import json
import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime

from dolium.errors import InvalidArgument, Unavailable

_TOKEN = r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
_SCHEME = re.compile(rf"\s*,?\s*({_TOKEN})(?:\s+|$)")
_PARAMETER = re.compile(rf'\s*,?\s*({_TOKEN})\s*=\s*(?:"((?:[^"\\]|\\.)*)"|({_TOKEN}))\s*(?=,|$)')
_DEFAULT_LIFE = 60.0  # distribution-spec token authentication: when expires_in is not given
_MARGIN = 5.0
RETRY_AFTER_MAX = 120.0
"""Seconds: a server that wants us to wait longer is asked again all the same."""


@dataclass(frozen=True, slots=True)
class Credentials:
    """A user and a password or access token. Never printed. ``identity_token`` (OAuth 2's refresh token) is what some
    token servers give in place of the password, ``registry_token`` a bearer token that is used as it is.
    """

    user: str
    password: str = field(repr=False)
    identity_token: str = field(default="", repr=False)
    registry_token: str = field(default="", repr=False)

    @classmethod
    def parse(cls, value: object) -> Credentials | None:
        """Docker's AuthConfig object; None when there are none in it. Raises InvalidArgument."""
        if not isinstance(value, dict):
            raise InvalidArgument("the registry's credentials are no JSON object")
        words = {}
        for key in ("username", "password", "identitytoken", "registrytoken", "auth"):
            found = value.get(key) or ""
            if not isinstance(found, str):
                raise InvalidArgument(f"the registry's credentials: {key} is no string")
            words[key] = found
        if words["auth"] and not words["username"]:
            try:
                user, _, password = base64.b64decode(words["auth"], validate=True).decode().partition(":")
            except (binascii.Error, ValueError):
                raise InvalidArgument("the registry's credentials: auth is no base64 of user:password") from None
            words |= {"username": user, "password": password.rstrip("\0")}
        if not any(words[key] for key in ("username", "identitytoken", "registrytoken")):
            return None
        return cls(words["username"], words["password"], words["identitytoken"], words["registrytoken"])

    def basic(self) -> str:
        """The value of an Authorization header."""
        return "Basic " + base64.b64encode(f"{self.user}:{self.password}".encode()).decode("ascii")


@dataclass(frozen=True, slots=True)
class Challenge:
    """One way to authenticate; ``scheme`` in lower case, parameter names in lower case."""

    scheme: str
    parameters: dict[str, str]


def parse_challenges(headers: Iterable[str]) -> list[Challenge]:
    """All challenges of all WWW-Authenticate headers, in order. What cannot be parsed ends its header."""
    found: list[Challenge] = []
    for header in headers:
        position = 0
        while match := _SCHEME.match(header, position):
            parameters: dict[str, str] = {}
            position = match.end()
            while pair := _PARAMETER.match(header, position):
                quoted, plain = pair.group(2), pair.group(3)
                parameters[pair.group(1).lower()] = plain if quoted is None else re.sub(r"\\(.)", r"\1", quoted)
                position = pair.end()
            found.append(Challenge(match.group(1).lower(), parameters))
    return found


@dataclass(frozen=True, slots=True)
class Token:
    """A bearer token and the monotonic time after which it is not used any more."""

    value: str = field(repr=False)
    expires: float

    @property
    def fresh(self) -> bool:
        """False when a new one should be fetched."""
        return time.monotonic() < self.expires

    @classmethod
    def parse(cls, answer: object) -> Token:
        """The token server's JSON. Raises Unavailable when there is no token in it."""
        if isinstance(answer, dict):
            value = answer.get("token") or answer.get("access_token")
            life = answer.get("expires_in")
            seconds = float(life) if isinstance(life, int | float) and life > 0 else _DEFAULT_LIFE
            if isinstance(value, str) and value.isprintable():
                return cls(value, time.monotonic() + max(seconds - _MARGIN, 1.0))
        raise Unavailable("the token server's answer has no token")


def decode_header(text: str) -> object:
    """The JSON value of X-Registry-Auth or X-Registry-Config: base64url, with or without padding. Raises
    InvalidArgument.
    """
    try:
        return json.loads(base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)))
    except (ValueError, binascii.Error) as error:
        raise InvalidArgument("the registry's credentials are not base64 of a JSON object") from error


def credentials_of(hosts: Mapping[str, Credentials], domain: str) -> Credentials | None:
    """Those for a domain, by any of the keys clients write: the host, a URL of it, Docker Hub's old address."""
    for key, found in hosts.items():
        host = re.sub(r"^https?://", "", key).partition("/")[0]
        if host == domain or (domain == "docker.io" and host in ("index.docker.io", "registry-1.docker.io")):
            return found
    return None


def merge_scopes(scopes: Iterable[str]) -> list[str]:
    """Each resource once, with all actions asked for in order: ``repository:a:pull`` and ``repository:a:push`` are
    ``repository:a:pull,push``. What is no ``TYPE:NAME:ACTIONS`` stays as it is; empty ones go.
    """
    merged: dict[str, dict[str, None]] = {}
    for scope in scopes:
        resource, colon, actions = scope.rpartition(":")
        if not scope:
            continue
        if not colon or ":" not in resource:
            merged.setdefault(scope, {})
            continue
        merged.setdefault(resource, {}).update(dict.fromkeys(filter(None, actions.split(","))))
    return [f"{resource}:{','.join(actions)}" if actions else resource for resource, actions in merged.items()]


def retry_after(text: str, *, now: float | None = None) -> float:
    """Seconds of a Retry-After header (RFC 9110 section 10.2.3: seconds or a date), at most RETRY_AFTER_MAX; 0 without."""
    text = text.strip(" \t")
    if text.isascii() and text.isdigit():
        return min(float(text), RETRY_AFTER_MAX)
    try:
        moment = parsedate_to_datetime(text).timestamp()
    except (ValueError, TypeError):
        return 0.0
    return min(max(moment - (time.time() if now is None else now), 0.0), RETRY_AFTER_MAX)
