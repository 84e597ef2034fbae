"""A container that may reach some names alone: it is answered for those, and what it is told it may reach, for as long."""

from __future__ import annotations

import os
from collections.abc import Sequence

from dolium.linux.threads import in_thread
from dolium.network.egress import parse, pin_text
from dolium.network.firewall import Nft
from dolium.network.local import enter_network


class Pins:
    """Of one container; the rules are in its namespace already."""

    def __init__(self, namespace: int, texts: Sequence[str]) -> None:
        """``namespace``: an fd, the caller's; ``texts``: what --egress said. Blocks. Raises OSError, DoliumError."""
        self._allowed = parse(texts)

        def inside() -> Nft:
            enter_network(namespace)
            return Nft()

        self._nft = in_thread(inside)

    def allows(self, name: str) -> bool:
        """May it know where that is?"""
        return any(one.covers(name) for one in self._allowed)

    def pin(self, name: str, addresses: Sequence[tuple[str, int]]) -> None:
        """What the name was said to be may be reached. Blocks. Raises DoliumError."""
        text = pin_text(self._allowed, name, addresses)
        if text:
            self._nft.run(text)

    def close(self) -> None:
        """Idempotent."""
        self._nft.close()


def open_pins(namespace: int, texts: Sequence[str]) -> Pins:
    """As ``Pins``, with an fd that is this call's. Blocks. Raises OSError, DoliumError."""
    try:
        return Pins(namespace, texts)
    finally:
        os.close(namespace)
