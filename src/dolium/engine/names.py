"""Names for containers nobody named: two words, as Docker's users expect; the words are of the sea and the cellar."""

from __future__ import annotations

import secrets
from collections.abc import Container

_LEFT = ("amber", "ample", "ancient", "bold", "brave", "bright", "brisk", "calm", "clever", "deep", "eager", "early",
         "fair", "fleet", "free", "gentle", "glad", "golden", "grand", "hardy", "keen", "kind", "lively", "loyal",
         "lucky", "mellow", "merry", "mighty", "modest", "nimble", "noble", "patient", "plain", "proud", "quick", "quiet",
         "rapid", "ready", "ripe", "robust", "round", "sharp", "silent", "sober", "solid", "steady", "stout", "sunny",
         "swift", "tidy", "tranquil", "true", "vast", "vivid", "warm", "wise")
_RIGHT = ("amphora", "anchor", "ballast", "barge", "barrel", "beacon", "bilge", "bollard", "bowsprit", "breeze", "buoy",
          "cabin", "cargo", "carvel", "cask", "cistern", "cog", "compass", "corbita", "crane", "crate", "dock", "dolium",
          "ferry", "fjord", "galley", "gunwale", "harbor", "hawser", "helm", "hull", "jetty", "keel", "lagoon", "lantern",
          "locker", "mast", "merchant", "mooring", "oar", "pier", "pilot", "pithos", "port", "prow", "quay", "rudder",
          "sail", "skiff", "sloop", "stern", "tide", "tiller", "trireme", "vat", "wharf")


def random_name(taken: Container[str]) -> str:
    """A free name. Two words while some are likely free, then a number too."""
    for attempt in range(64):
        name = f"{secrets.choice(_LEFT)}_{secrets.choice(_RIGHT)}"
        if attempt > 8:
            name += str(secrets.randbelow(10 ** (1 + attempt // 8)))
        if name not in taken:
            return name
    return secrets.token_hex(8)
