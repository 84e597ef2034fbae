"""One host of the tests of encrypted overlays: an instance's networks in the caller's network namespace, which does what the
lines of its input say, and answers each by a line.

    python overlay_host.py FOLDER INSTANCE
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Any

from packets import Bench

from dolium.errors import DoliumError
from dolium.network.base import NetworkRequest


async def act(bench: Bench, command: dict[str, Any]) -> dict[str, Any]:
    match command["do"]:
        case "start":
            await bench.networks.start(command["live"])
        case "create":
            await bench.networks.create(command["wish"])
        case "up":
            prepared = await bench.networks.prepare(NetworkRequest(command["container"], command["network"],
                                                                    names=tuple(command["names"])))
            bench.prepared[command["container"]] = prepared
            return {"namespace": f"/proc/{os.getpid()}/fd/{prepared.fd}", "endpoint": prepared.endpoint}
        case "end":
            for container in list(bench.prepared):
                await bench.down(container)
            for container, endpoint in command["live"].items():
                await bench.networks.release(container, endpoint)
            for network in bench.networks.describe():
                if network["Name"] not in ("bridge", "host", "none"):
                    await bench.networks.remove(network["Name"])
            await bench.networks.close()
    return {}


async def main() -> None:
    bench = Bench(Path(sys.argv[1]), sys.argv[2])
    while line := await asyncio.to_thread(sys.stdin.readline):
        try:
            answer = await act(bench, json.loads(line))
        except DoliumError as error:
            answer = {"error": str(error)}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    asyncio.run(main())
