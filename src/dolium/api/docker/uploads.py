"""A request's body as a file for a thread that reads it while it arrives: nothing of it is put aside."""

from __future__ import annotations

import asyncio
import os
from asyncio.streams import FlowControlMixin
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import BinaryIO, cast

from aiohttp import web

from dolium.errors import InvalidArgument

_PIECE = 1 << 18


class _Upload:
    """The reading end. A body that broke off has no end: reading on raises InvalidArgument."""

    def __init__(self, fd: int) -> None:
        self._file = open(fd, "rb", buffering=0)  # closed by close
        self.broken = ""

    def read(self, size: int = -1) -> bytes:
        """Up to ``size`` bytes; none at the end. Blocks."""
        data = self._file.read(size) or b""
        if not data and self.broken:
            raise InvalidArgument(f"the upload broke off: {self.broken}")
        return data

    def close(self) -> None:
        self._file.close()


@asynccontextmanager
async def uploaded(request: web.Request) -> AsyncIterator[BinaryIO]:
    """The body, to be read by a thread. What was not read is received all the same: the client, which would be cut off in
    the middle of its upload, then gets its answer.
    """
    loop = asyncio.get_running_loop()
    out, into = os.pipe2(os.O_CLOEXEC)
    upload = _Upload(out)
    # written without a thread: those that read would otherwise keep all threads from those that write
    transport, protocol = await loop.connect_write_pipe(lambda: FlowControlMixin(loop), open(into, "wb", buffering=0))
    writer = asyncio.StreamWriter(transport, protocol, None, loop)

    async def feed() -> None:
        try:
            async for piece in request.content.iter_chunked(_PIECE):
                if not transport.is_closing():
                    try:
                        writer.write(piece)
                        await writer.drain()
                    except ConnectionError:
                        continue  # nobody reads any more
        except (ConnectionError, web.HTTPException, asyncio.CancelledError) as error:
            upload.broken = str(error) or type(error).__name__
            if isinstance(error, asyncio.CancelledError):
                raise
        except Exception as error:
            upload.broken = str(error)
            raise
        finally:
            transport.close()

    task = asyncio.ensure_future(feed())
    try:
        yield cast(BinaryIO, upload)
    except asyncio.CancelledError:
        task.cancel()
        raise
    finally:
        upload.close()
        await asyncio.wait({task})
        if not task.cancelled():
            task.exception()  # whoever read has been told
