"""A container that may reach some names alone: it is answered for those, and what it is told it may reach, for as long."""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Sequence

from dolium.linux.threads import in_thread
from dolium.network.egress import parse, pin_text, pinned
from dolium.network.firewall import Nft
from dolium.network.local import enter_network


class Pins:
    """Of one container; the rules are in its namespace already."""

    def __init__(self, namespace: int, texts: Sequence[str]) -> None:
        """``namespace``: an fd, the caller's; ``texts``: what --egress said. Blocks. Raises OSError, DoliumError."""
        self._allowed = parse(texts)
        self._until: dict[tuple[str, str], float] = {}  # by set and element: when it goes, by the monotonic clock
        self._lock = threading.Lock()

        def inside() -> Nft:
            enter_network(namespace)
            return Nft()

        self._nft = in_thread(inside)

    def allows(self, name: str) -> bool:
        """May it know where that is?"""
        return any(one.covers(name) for one in self._allowed)

    def pin(self, name: str, addresses: Sequence[tuple[str, int]]) -> None:
        """What the name was said to be may be reached. Blocks. Raises DoliumError."""
        with self._lock:
            now = time.monotonic()
            self._until = {element: end for element, end in self._until.items() if end > now}
            # another name with the same address may have said that it stays for longer
            elements = {element: max(seconds, math.ceil(self._until.get(element, now) - now))
                        for element, seconds in pinned(self._allowed, name, addresses).items()}
            if elements:
                self._nft.run(pin_text(elements))
                self._until |= {element: now + seconds for element, seconds in elements.items()}

    def close(self) -> None:
        """Idempotent."""
        self._nft.close()


def open_pins(namespace: int, texts: Sequence[str]) -> Pins:
    """As ``Pins``, with an fd that is this call's. Blocks. Raises OSError, DoliumError."""
    try:
        return Pins(namespace, texts)
    finally:
        os.close(namespace)
