"""The ground: sizes, durations and times as people write them and as the APIs print them."""

from __future__ import annotations

import re
from datetime import UTC, datetime

from dolium.errors import InvalidArgument

_SIZE = re.compile(r"^(\d+(?:\.\d+)?)\s*([kmgtp]?)i?b?$", re.IGNORECASE)
_POWER = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4, "p": 5}


def parse_size(text: str, *, name: str = "size") -> int:
    """Bytes of ``64m``, ``1.5g``, ``512`` (powers of 1024, as Docker's flags). Raises InvalidArgument."""
    match = _SIZE.match(text.strip())
    if match is None:
        raise InvalidArgument(f"invalid {name}: {text!r}", hint="write a number with b, k, m, g, t or p, as in 64m")
    value = float(match.group(1)) * 1024 ** _POWER[match.group(2).lower()]
    if value >= 1 << 63:
        raise InvalidArgument(f"invalid {name}: {text!r} is more than the kernel can count", hint="that is 8191 p")
    return int(value)


def format_size(size: float) -> str:
    """``1.23MB``: powers of 1000 and four significant digits, as Docker prints sizes."""
    return _scaled(size, 1000.0, ("B", "kB", "MB", "GB", "TB", "PB"))


def format_memory(size: float) -> str:
    """``1.23MiB``: powers of 1024, as Docker prints memory."""
    return _scaled(size, 1024.0, ("B", "KiB", "MiB", "GiB", "TiB", "PiB"))


def _scaled(size: float, base: float, names: tuple[str, ...]) -> str:
    index = 0
    while size >= base and index < len(names) - 1:
        size /= base
        index += 1
    return f"{size:.4g}{names[index]}"


def rfc3339(seconds: float) -> str:
    """UTC time stamp with nanosecond digits, as Docker writes them."""
    whole = int(seconds)
    nanoseconds = round((seconds - whole) * 1e9)
    if nanoseconds >= 1_000_000_000:
        whole, nanoseconds = whole + 1, nanoseconds - 1_000_000_000
    return datetime.fromtimestamp(whole, UTC).strftime("%Y-%m-%dT%H:%M:%S.") + f"{nanoseconds:09d}Z"


def human_duration(seconds: float) -> str:
    """``About a minute``, ``3 hours``: the words of ``docker ps``."""
    if seconds < 1:
        return "Less than a second"
    if seconds < 2:
        return "1 second"
    if seconds < 60:
        return f"{int(seconds)} seconds"
    minutes = int(seconds // 60)
    if minutes == 1:
        return "About a minute"
    if minutes < 60:
        return f"{minutes} minutes"
    hours = int(seconds / 3600 + 0.5)
    if hours == 1:
        return "About an hour"
    if hours < 48:
        return f"{hours} hours"
    days = hours // 24
    if days < 14:
        return f"{days} days"
    if days < 60:
        return f"{days // 7} weeks"
    if days < 730:
        return f"{days // 30} months"
    return f"{days // 365} years"
