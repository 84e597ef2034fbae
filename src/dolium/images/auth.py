"""Registry authentication: WWW-Authenticate challenges (RFC 9110 section 11.6.1) and the tokens they lead to."""

from __future__ import annotations

import base64
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass, field

from dolium.errors import Unavailable

_TOKEN = r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
_SCHEME = re.compile(rf"\s*,?\s*({_TOKEN})(?:\s+|$)")
_PARAMETER = re.compile(rf'\s*,?\s*({_TOKEN})\s*=\s*(?:"((?:[^"\\]|\\.)*)"|({_TOKEN}))\s*(?=,|$)')
_DEFAULT_LIFE = 60.0  # distribution-spec token authentication: when expires_in is not given
_MARGIN = 5.0


@dataclass(frozen=True, slots=True)
class Credentials:
    """A user and a password or access token. Never printed."""

    user: str
    password: str = field(repr=False)

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
