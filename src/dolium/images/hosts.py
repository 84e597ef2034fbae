"""Which hosts a name is pulled from and pushed to, and how each is spoken to: mirrors, plain HTTP, certificates.

Read from files other programs use, under one folder (``/etc``, tests give another):

    dolium/daemon.json, docker/daemon.json     registry-mirrors, insecure-registries; the first file that exists
    containers/registries.conf                 [[registry]] with prefix, location, blocked, insecure, mirror (version 2)
    containers/registries.conf.d/*.conf        the same; a later file's registry replaces one of the same prefix
    containers/certs.d/HOST, docker/certs.d/HOST   *.crt authorities; NAME.cert with NAME.key for the client

They are read anew for each pull and push: a change needs no restart.
"""

from __future__ import annotations

import ipaddress
import ssl
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from dolium.errors import FailedPrecondition, PermissionDenied
from dolium.images.reference import DEFAULT_DOMAIN, Reference
from dolium.settings import daemon_json

DOCKER_HUB = "registry-1.docker.io"
LOGIN_SERVER = "https://index.docker.io/v1/"
"""What Docker calls docker.io where credentials are kept."""


def is_loopback(host: str) -> bool:
    """127.0.0.0/8, ::1 and the name localhost: spoken to by plain HTTP unless there are certificates for it."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def split_port(host: str) -> str:
    """The host without its port."""
    name, colon, port = host.rpartition(":")
    return name if colon and port.isdigit() else host


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One place a repository is at. ``plain``: HTTP is allowed, ``plain_first``: tried before TLS; ``verify``: the
    server's certificate must be good; ``certificates``: folders of certs.d; ``mirror``: its failures are not the end.
    """

    host: str
    repository: str
    plain: bool = False
    plain_first: bool = False
    verify: bool = True
    certificates: tuple[Path, ...] = ()
    mirror: bool = False

    def tls(self) -> ssl.SSLContext | bool:
        """What to check the server by, and who we are; True is the system's default. Raises FailedPrecondition."""
        if self.verify and not self.certificates:
            return True
        context = ssl.create_default_context()
        if not self.verify:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        for folder in self.certificates:
            for path in sorted(folder.iterdir()):
                try:
                    if path.suffix == ".crt":
                        context.load_verify_locations(path)
                    elif path.suffix == ".cert":
                        context.load_cert_chain(path, path.with_suffix(".key"))
                except (ssl.SSLError, OSError) as error:
                    raise FailedPrecondition(f"certificate {path}: {error}",
                                             hint=".crt is an authority, .cert needs a .key beside it") from None
        return context


@dataclass(frozen=True, slots=True)
class Mirror:
    """Where else to look: ``location`` is HOST[/PATH]; ``plain`` when it was written with http://."""

    location: str
    insecure: bool = False
    plain: bool = False
    digests: bool = True
    tags: bool = True


@dataclass(frozen=True, slots=True)
class Rule:
    """One [[registry]] of registries.conf."""

    prefix: str
    location: str
    insecure: bool = False
    blocked: bool = False
    mirrors: tuple[Mirror, ...] = ()

    def matches(self, name: str) -> bool:
        """Does the rule speak of the canonical ``name`` (HOST/PATH)? A prefix ends where a part of the path ends."""
        if self.prefix.startswith("*."):
            host, _, rest = self.prefix[1:].partition("/")
            domain, _, path = name.partition("/")
            return split_port(domain).endswith(host) and (not rest or f"{path}/".startswith(f"{rest}/"))
        return name == self.prefix or (name.startswith(self.prefix) and name[len(self.prefix)] in "/:@")


@dataclass(frozen=True, slots=True)
class Settings:
    """What the files say."""

    rules: tuple[Rule, ...] = ()
    hub_mirrors: tuple[Mirror, ...] = ()
    insecure: tuple[str, ...] = ()
    certificates: Mapping[str, tuple[Path, ...]] = field(default_factory=dict)

    def is_insecure(self, host: str) -> bool:
        """Named in insecure-registries, by host, host:port or network."""
        name = split_port(host)
        for entry in self.insecure:
            if entry in (host, name):
                return True
            try:
                if ipaddress.ip_address(name.strip("[]")) in ipaddress.ip_network(entry, strict=False):
                    return True
            except ValueError:
                continue
        return False

    def rule(self, name: str) -> Rule | None:
        """The rule with the longest prefix."""
        found = [rule for rule in self.rules if rule.matches(name)]
        return max(found, key=lambda rule: len(rule.prefix)) if found else None

    def endpoint(self, location: str, *, insecure: bool = False, plain: bool = False, mirror: bool = False) -> Endpoint:
        """The endpoint of HOST/PATH."""
        host, _, repository = location.partition("/")
        insecure = insecure or self.is_insecure(host)
        loopback = is_loopback(split_port(host))
        certificates = self.certificates.get(host, ())
        return Endpoint(
            DOCKER_HUB if host == DEFAULT_DOMAIN else host, repository, plain=insecure or loopback,
            plain_first=(loopback and not certificates) or (plain and (insecure or loopback)),
            verify=not insecure or bool(certificates), certificates=certificates, mirror=mirror,
        )

    def sources(self, reference: Reference) -> list[Endpoint]:
        """Where to pull from, mirrors first, the registry itself last. Raises PermissionDenied for a blocked one."""
        rule = self.rule(reference.name)
        if rule is not None and rule.blocked:
            raise PermissionDenied(f"registry {rule.prefix} is blocked by containers/registries.conf")
        mirrors = rule.mirrors if rule else ()
        found = []
        by_digest = reference.digest is not None
        rest = reference.name[len(rule.prefix):] if rule and not rule.prefix.startswith("*.") else f"/{reference.path}"
        for mirror in mirrors:
            if mirror.digests if by_digest else mirror.tags:
                found.append(self.endpoint(f"{mirror.location}{rest}", insecure=mirror.insecure, mirror=True))
        if reference.domain == DEFAULT_DOMAIN:
            found += [self.endpoint(f"{mirror.location}/{reference.path}", insecure=mirror.insecure, plain=mirror.plain,
                                    mirror=True) for mirror in self.hub_mirrors]
        return [*found, self.home(reference)]

    def home(self, reference: Reference) -> Endpoint:
        """Where to push to: the registry itself. Raises PermissionDenied for a blocked one."""
        rule = self.rule(reference.name)
        if rule is None:
            return self.endpoint(reference.name)
        if rule.blocked:
            raise PermissionDenied(f"registry {rule.prefix} is blocked by containers/registries.conf")
        location = reference.name
        if rule.location and not rule.prefix.startswith("*."):
            location = rule.location + reference.name[len(rule.prefix):]
        return replace(self.endpoint(location, insecure=rule.insecure), mirror=False)


def read_settings(etc: Path) -> Settings:
    """All of it. Files that are not there say nothing. Raises FailedPrecondition naming the file that cannot be read."""
    insecure, mirrors = _daemon(etc)
    rules: dict[str, Rule] = {}
    for path in [etc / "containers/registries.conf", *sorted((etc / "containers/registries.conf.d").glob("*.conf"))]:
        rules |= {rule.prefix: rule for rule in _registries(path)}
    return Settings(tuple(rules.values()), mirrors, insecure, _certificates(etc))


def _daemon(etc: Path) -> tuple[tuple[str, ...], tuple[Mirror, ...]]:
    path, value = daemon_json(etc)
    insecure = _strings(path, value, "insecure-registries")
    mirrors = []
    for url in _strings(path, value, "registry-mirrors"):
        scheme, found, location = url.partition("://")
        if not found or scheme not in ("http", "https") or not location.strip("/"):
            raise FailedPrecondition(f"{path}: registry-mirrors: {url!r} is no http or https URL")
        mirrors.append(Mirror(location.rstrip("/"), plain=scheme == "http"))
    return tuple(insecure), tuple(mirrors)


def _strings(path: Path, value: Mapping[str, object], key: str) -> Sequence[str]:
    found = value.get(key) or []
    if not isinstance(found, list) or not all(isinstance(entry, str) for entry in found):
        raise FailedPrecondition(f"{path}: {key} is not a list of strings")
    return [entry for entry in found if isinstance(entry, str)]


def _registries(path: Path) -> tuple[Rule, ...]:
    try:
        value = tomllib.loads(path.read_text())
    except FileNotFoundError:
        return ()
    except (OSError, ValueError) as error:
        raise FailedPrecondition(f"{path}: {error}") from None
    return parse_registries(value, str(path))


def parse_registries(value: Mapping[str, object], what: str = "registries.conf") -> tuple[Rule, ...]:
    """The [[registry]] tables, containers-registries.conf(5) version 2. Raises FailedPrecondition."""
    tables = value.get("registry") or []
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise FailedPrecondition(f"{what}: registry is not a list of tables", hint="version 1 is not supported")
    rules = []
    for table in tables:
        location, prefix = str(table.get("location") or ""), str(table.get("prefix") or "")
        if not (location or prefix):
            raise FailedPrecondition(f"{what}: a registry has neither prefix nor location")
        mirrors = []
        entries = table.get("mirror") or []
        if not isinstance(entries, list):
            raise FailedPrecondition(f"{what}: mirror of {prefix or location} is not a list of tables")
        for entry in entries:
            if not isinstance(entry, dict) or not entry.get("location"):
                raise FailedPrecondition(f"{what}: a mirror of {prefix or location} has no location")
            which = entry.get("pull-from-mirror") or ("digest-only" if table.get("mirror-by-digest-only") else "all")
            mirrors.append(Mirror(str(entry["location"]), bool(entry.get("insecure")), False,
                                  which in ("all", "digest-only"), which in ("all", "tag-only")))
        rules.append(Rule(prefix or location, location, bool(table.get("insecure")), bool(table.get("blocked")),
                          tuple(mirrors)))
    return tuple(rules)


def _certificates(etc: Path) -> dict[str, tuple[Path, ...]]:
    found: dict[str, tuple[Path, ...]] = {}
    for base in (etc / "containers/certs.d", etc / "docker/certs.d"):
        if not base.is_dir():
            continue
        for folder in sorted(base.iterdir()):
            if folder.is_dir():
                found.setdefault(folder.name, (folder,))
    return found
