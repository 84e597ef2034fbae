"""Platforms: ``os/architecture/variant``, and which entry of an index this machine wants."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from dolium.errors import InvalidArgument

# What uname and people say -> what images say (GOARCH and GOARM).
_ARCHITECTURES = {
    "x86_64": ("amd64", ""), "x86-64": ("amd64", ""), "aarch64": ("arm64", ""), "i386": ("386", ""),
    "i486": ("386", ""), "i586": ("386", ""), "i686": ("386", ""), "armhf": ("arm", "v7"), "armel": ("arm", "v6"),
    "armv7l": ("arm", "v7"), "armv6l": ("arm", "v6"), "armv5tel": ("arm", "v5"), "loongarch64": ("loong64", ""),
}
_ARM = ("v8", "v7", "v6", "v5")
_AMD64 = ("v4", "v3", "v2", "v1")


@dataclass(frozen=True, slots=True)
class Platform:
    """Names as in OCI image-spec config.md; an empty ``variant`` is the architecture's usual one."""

    os: str
    architecture: str
    variant: str = ""

    @classmethod
    def parse(cls, text: str) -> Platform:
        """``linux/arm/v7``, ``linux/amd64``, ``arm64`` or ``linux``. Raises InvalidArgument."""
        parts = text.lower().split("/")
        if not all(parts) or len(parts) > 3:
            raise InvalidArgument(f"invalid platform {text!r}", hint="write os/architecture, as linux/arm64")
        if len(parts) == 1:
            if parts[0] == "linux":
                return host()
            parts = ["linux", *parts]
        return cls(*parts).normalized()

    def normalized(self) -> Platform:
        """Aliases resolved; the usual variant (arm64 v8, amd64 v1) left out, arm's made explicit."""
        architecture, alias = _ARCHITECTURES.get(self.architecture, (self.architecture, ""))
        variant = self.variant or alias
        if variant.isdigit():
            variant = f"v{variant}"
        if (architecture, variant) in (("arm64", "v8"), ("amd64", "v1")):
            variant = ""
        if architecture == "arm" and not variant:
            variant = "v7"
        return Platform(self.os, architecture, variant)

    def __str__(self) -> str:
        """``linux/arm/v7``."""
        return "/".join(part for part in (self.os, self.architecture, self.variant) if part)

    def accepts(self) -> tuple[Platform, ...]:
        """What runs on a machine of this platform, best first: older variants of it, 32 bit arm on arm64.

        containerd's platform order. A plain amd64 machine is not offered amd64/v2 and above.
        """
        if self.architecture == "arm64":
            own = (self,) if not self.variant else (self, Platform(self.os, "arm64"))
            return own + tuple(Platform(self.os, "arm", variant) for variant in _ARM)
        if self.architecture == "arm" and self.variant in _ARM:
            return tuple(Platform(self.os, "arm", variant) for variant in _ARM[_ARM.index(self.variant):])
        if self.architecture == "amd64" and self.variant in _AMD64:
            return tuple(Platform(self.os, "amd64", variant).normalized()
                         for variant in _AMD64[_AMD64.index(self.variant):])
        return (self,)

    def accepts_machine(self, found: Platform) -> bool:
        """Will an image for ``found`` do, whatever variant it says? Many images' configurations leave the variant out."""
        return (found.os, found.architecture) in {(each.os, each.architecture) for each in self.accepts()}


def host() -> Platform:
    """The platform of this kernel."""
    return Platform("linux", os.uname().machine).normalized()


_T = TypeVar("_T")


def choose(wanted: Platform, offers: Iterable[tuple[Platform | None, _T]]) -> _T | None:
    """The offer that suits ``wanted`` best, first of equals; None when none does.

    An offer without a platform is taken when nothing else fits: a single-image index often leaves it out.
    """
    listed = list(offers)
    for candidate in wanted.accepts():
        for platform, offer in listed:
            if platform is not None and platform == candidate:
                return offer
    return next((offer for platform, offer in listed if platform is None), None)


def describe(platforms: Sequence[Platform | None]) -> str:
    """The platforms of an index for a message, each once, in order."""
    return ", ".join(dict.fromkeys(str(platform) for platform in platforms if platform)) or "none"
