"""Image names: what a person writes, what the store keys on, what is shown again.

    debian                     docker.io/library/debian:latest      familiar: debian:latest
    me/app:1                   docker.io/me/app:1                   familiar: me/app:1
    localhost:5000/app@sha256  stays as it is

The grammar is that of the distribution project: [DOMAIN[:PORT]/]PATH[:TAG][@DIGEST]. Pure functions on text.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from dolium.errors import InvalidArgument

DEFAULT_DOMAIN = "docker.io"
DEFAULT_TAG = "latest"
OFFICIAL = "library"
NAME_MAX = 255

_LEGACY_DOMAIN = "index.docker.io"
_COMPONENT = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_LABEL = r"(?:[a-zA-Z0-9]|[a-zA-Z0-9][a-zA-Z0-9-]*[a-zA-Z0-9])"
_PATH = re.compile(rf"{_COMPONENT}(?:/{_COMPONENT})*", re.ASCII)
_DOMAIN = re.compile(rf"(?:{_LABEL}(?:\.{_LABEL})*|\[[a-fA-F0-9:]+\])(?::[0-9]+)?", re.ASCII)
_TAG = re.compile(r"[\w][\w.-]{0,127}", re.ASCII)
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}", re.ASCII)
_IDENTIFIER = re.compile(r"[0-9a-f]{64}", re.ASCII)


def is_digest(text: str) -> bool:
    """True for ``sha256:`` and 64 lower-case hexadecimal digits, the only algorithm the store keeps."""
    return _DIGEST.fullmatch(text) is not None


def is_domain(text: str) -> bool:
    """True for HOST or HOST:PORT, as they stand in front of a repository."""
    return _DOMAIN.fullmatch(text) is not None


def check_digest(text: str) -> str:
    """``text`` itself when it is a digest; else InvalidArgument. Guards every path made of a digest."""
    if not is_digest(text):
        raise InvalidArgument(f"invalid digest {text!r}", hint="a digest is sha256: and 64 hexadecimal digits")
    return text


@dataclass(frozen=True, slots=True)
class Reference:
    """A parsed name. ``domain`` and ``path`` are never empty; ``tag`` and ``digest`` may be None."""

    domain: str
    path: str
    tag: str | None = None
    digest: str | None = None

    @classmethod
    def parse(cls, text: str) -> Reference:
        """Parse with Docker's defaults for domain and ``library/``. No tag is added: see ``with_default_tag``.

        Raises InvalidArgument with Docker's words where Docker has them.
        """
        if _IDENTIFIER.fullmatch(text):
            raise InvalidArgument(f"invalid repository name ({text}), cannot specify 64-byte hexadecimal strings")
        rest, at, digest = text.partition("@")
        if at and not is_digest(digest):
            raise InvalidArgument(f"invalid reference format: {text!r}: the digest must be sha256 and 64 hex digits")
        rest, tag = _split_tag(rest)
        if tag is not None and not _TAG.fullmatch(tag):
            raise InvalidArgument(f"invalid reference format: {text!r}: invalid tag {tag!r}")
        domain, path = _split_domain(rest)
        if path != path.lower():
            raise InvalidArgument(f"invalid reference format: repository name ({path}) must be lowercase")
        if not _PATH.fullmatch(path) or not _DOMAIN.fullmatch(domain):
            raise InvalidArgument(f"invalid reference format: {text!r}")
        if len(path) > NAME_MAX:
            raise InvalidArgument(f"invalid reference format: repository name is longer than {NAME_MAX} characters")
        return cls(domain, path, tag, digest if at else None)

    @property
    def name(self) -> str:
        """Canonical name without tag and digest: ``docker.io/library/debian``."""
        return f"{self.domain}/{self.path}"

    @property
    def familiar_name(self) -> str:
        """The shortest name that parses to the same repository: ``debian``."""
        if self.domain != DEFAULT_DOMAIN:
            return self.name
        head, _, tail = self.path.partition("/")
        if head == OFFICIAL and "/" not in tail and not _IDENTIFIER.fullmatch(tail):
            return tail
        return self.name if _looks_like_domain(head) else self.path

    @property
    def suffix(self) -> str:
        """``:tag``, ``@digest``, both or nothing."""
        return (f":{self.tag}" if self.tag else "") + (f"@{self.digest}" if self.digest else "")

    def __str__(self) -> str:
        """Canonical form; parses to an equal reference."""
        return self.name + self.suffix

    def familiar(self) -> str:
        """What people see; parses to an equal reference."""
        return self.familiar_name + self.suffix

    def with_default_tag(self) -> Reference:
        """``:latest`` added when there is neither tag nor digest."""
        return replace(self, tag=DEFAULT_TAG) if self.tag is None and self.digest is None else self

    def tagged(self) -> Reference | None:
        """Repository and tag only; None without a tag."""
        return replace(self, digest=None) if self.tag is not None else None

    def digested(self, digest: str) -> Reference:
        """Repository and the given digest only: an entry of RepoDigests."""
        return replace(self, tag=None, digest=check_digest(digest))


def _split_tag(text: str) -> tuple[str, str | None]:
    head, colon, tail = text.rpartition(":")
    if not colon or "/" in tail:  # the colon belongs to a port
        return text, None
    return head, tail


def _looks_like_domain(component: str) -> bool:
    return component == "localhost" or "." in component or ":" in component or component != component.lower()


def _split_domain(text: str) -> tuple[str, str]:
    head, slash, tail = text.partition("/")
    if not slash or not _looks_like_domain(head):
        domain, path = DEFAULT_DOMAIN, text
    else:
        domain, path = head, tail
    if domain == _LEGACY_DOMAIN:
        domain = DEFAULT_DOMAIN
    if domain == DEFAULT_DOMAIN and "/" not in path:
        path = f"{OFFICIAL}/{path}"
    return domain, path
