"""Tables people can read, JSON for programs, Go-like templates for those who come from docker."""

from __future__ import annotations

import json

from dolium.cli.flags import UsageError
from dolium.units import format_memory as memory
from dolium.units import format_size as size

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from dolium.cli.context import Context


def table(context: Context, titles: list[str], rows: list[list[str]]) -> None:
    """Columns as wide as their longest cell, three spaces apart."""
    widths = [max(len(row[column]) for row in [titles, *rows]) for column in range(len(titles))]
    for row in [titles, *rows]:
        context.say("   ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def listing(context: Context, how: str | None, titles: list[str], rows: list[dict[str, Any]],
            cells: list[list[str]]) -> None:
    """A list in the wanted form: table (default), json, or a template over the rows' keys."""
    if how in (None, "", "table"):
        table(context, titles, cells)
    elif how == "json":
        for row in rows:
            context.say(json.dumps(row))
    else:
        names = ["".join(word.capitalize() for word in title.split()) for title in titles]
        for line in cells:
            context.say(template(how, dict(zip(names, line, strict=True))))


def template(text: str, value: Any) -> str:
    """``{{.Name}}``, ``{{.State.Pid}}`` and ``{{json .Config}}``; no more of Go's templates. Raises UsageError."""
    out = []
    rest = text.replace("\\t", "\t").replace("\\n", "\n")
    while "{{" in rest:
        before, _, rest = rest.partition("{{")
        expression, closed, rest = rest.partition("}}")
        words = expression.split()
        if not closed or not words or len(words) > 2 or (len(words) == 2 and words[0] != "json"):
            raise UsageError(f"--format: {{{{{expression}}}}} is not supported: write {{{{.Field}}}} or {{{{json .Field}}}}")
        found = value
        for name in filter(None, words[-1].split(".")):
            if not isinstance(found, dict) or name not in found:
                raise UsageError(f"--format: there is no field {words[-1]}")
            found = found[name]
        out.append(before + (json.dumps(found) if len(words) == 2 else _plain(found)))
    return "".join(out) + rest


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return value if isinstance(value, str) else json.dumps(value)


def ago(seconds: float) -> str:
    """``3 hours``."""
    for limit, unit, name in ((60, 1, "second"), (3600, 60, "minute"), (86400 * 2, 3600, "hour"), (86400 * 14, 86400, "day"),
                              (86400 * 60, 604800, "week"), (86400 * 730, 2592000, "month")):
        if seconds < limit:
            count = max(int(seconds // unit), 0)
            return f"{count} {name}{'' if count == 1 else 's'}"
    return f"{int(seconds // 31536000)} years"


__all__ = ["ago", "listing", "memory", "size", "table", "template"]


def host_text(address: str) -> str:
    """An address before a colon and a port."""
    return f"[{address}]" if ":" in address else address
