"""Messages between dolium's own programs: fields, each a key and a list of byte strings.

The same in C is ``native/executor/fields.h``. A frame is a u32 length (little-endian) and a body. Cold module.
"""

from __future__ import annotations

from dolium.runtime.plan import encode_list, encode_string

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    Value = str | bytes | int | Sequence[str | bytes]

FRAME_LIMIT = 64 << 20


def encode_fields(fields: Mapping[str, Value]) -> bytes:
    """The body for a mapping; a single string or number stands for a list of one."""
    parts = []
    for key, value in fields.items():
        if isinstance(value, int):
            value = str(int(value))
        parts.append(encode_string(key) + encode_list([value] if isinstance(value, (str, bytes)) else value))
    return b"".join(parts)


def decode_fields(body: bytes) -> dict[str, list[bytes]]:
    """Key to values. Raises ValueError when the body is malformed."""
    fields: dict[str, list[bytes]] = {}
    at = 0
    while at < len(body):
        key, at = _take(body, at)
        count = int.from_bytes(body[at : at + 4], "little")
        at += 4
        values = []
        for _ in range(count):
            value, at = _take(body, at)
            values.append(value)
        fields[key.decode("utf-8", "surrogateescape")] = values
    return fields


def _take(body: bytes, at: int) -> tuple[bytes, int]:
    end = at + 4 + int.from_bytes(body[at : at + 4], "little")
    if end >= len(body) or body[end] != 0:
        raise ValueError("malformed message")
    return body[at + 4 : end], end + 1


def frame(body: bytes) -> bytes:
    """A body with its length before it."""
    return len(body).to_bytes(4, "little") + body
