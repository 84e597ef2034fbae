"""From a name to one platform's manifest: indexes followed, a foreign architecture named."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from dolium.errors import InvalidArgument, NotFound
from dolium.images.manifest import Manifest, parse_manifest
from dolium.images.platform import Platform, choose, describe
from dolium.images.reference import Reference

_NESTING = 4


class Manifests(Protocol):
    """Who has manifests: a registry, or several."""

    async def manifest(self, name: str) -> tuple[bytes, str, str]:
        """Bytes, media type and digest of a tag or digest."""


@dataclass(frozen=True, slots=True)
class Resolved:
    """``manifest`` and its own bytes and digest; ``top`` is the digest the name itself stands for (an index's)."""

    manifest: Manifest
    data: bytes
    digest: str
    top: str

    def check_platform(self, found: Platform, wanted: Platform, reference: Reference) -> None:
        """Refuse a single manifest's image for another architecture. What an index promised is believed: many
        images' configurations leave the variant out. Raises NotFound.
        """
        if self.top == self.digest and not wanted.accepts_machine(found):
            raise NotFound(
                f"{reference.familiar()} is an image for {found}, not for {wanted}",
                hint=f"--platform {found} pulls it all the same",
            )


async def resolve_manifest(registry: Manifests, reference: Reference, wanted: Platform) -> Resolved:
    """Fetch what the name stands for, and from an index the manifest that suits ``wanted``.

    Raises NotFound naming the platforms there are, InvalidArgument, and what the registry client raises.
    """
    name = reference.digest or reference.tag or ""
    data, media_type, top = await registry.manifest(name)
    digest = top
    for _ in range(_NESTING):
        parsed = parse_manifest(data, media_type, what=f"manifest {reference.familiar()}")
        if isinstance(parsed, Manifest):
            return Resolved(parsed, data, digest, top)
        offers = [(entry.platform, entry) for entry in parsed.images]
        chosen = choose(wanted, offers)
        if chosen is None:
            raise NotFound(
                f"no matching manifest for {wanted} in {reference.familiar()}: "
                f"it has {describe([platform for platform, _ in offers])}"
            )
        data, media_type, digest = await registry.manifest(chosen.digest)
    raise InvalidArgument(f"manifest {reference.familiar()}: indexes are nested too deep")
