"""Single flight: work that several callers want at once is done once."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Hashable
from typing import Generic, TypeVar

_T = TypeVar("_T")


async def settled(future: asyncio.Future[_T]) -> bool:
    """Wait for a future's end without raising what it raised; True when it has a result.

    Cancelling does not shorten the wait, however often: a thread that works in a directory must be done with it before
    the directory goes. The cancellation is raised afterwards.
    """
    cancelled: asyncio.CancelledError | None = None
    while not future.done():
        try:
            await asyncio.wait([future])
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None and not future.cancelled():
        future.exception()  # retrieved: nobody else will
    if cancelled is not None:
        raise cancelled
    return not future.cancelled() and future.exception() is None


def first_error(errors: BaseExceptionGroup[BaseException]) -> BaseException:
    """The first error inside nested groups, in the order tasks failed."""
    error: BaseException = errors
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


class SingleFlight(Generic[_T]):
    """Calls with one key share one task. For one event loop.

    A caller that is cancelled leaves; the task itself is cancelled when the last one has left. Its error reaches every
    caller that waits.
    """

    def __init__(self) -> None:
        """Nothing in flight."""
        self._tasks: dict[Hashable, asyncio.Task[_T]] = {}
        self._waiting: dict[Hashable, int] = {}

    async def do(self, key: Hashable, work: Callable[[], Awaitable[_T]]) -> _T:
        """The result of ``work()``, or of the call with the same key that is under way."""
        task = self._tasks.get(key)
        if task is None:
            task = asyncio.ensure_future(self._run(key, work))
            self._tasks[key] = task
            self._waiting[key] = 0
        self._waiting[key] += 1
        try:
            return await asyncio.shield(task)
        finally:
            # The key may belong to a later flight by now: count only on the one this call waited for.
            if self._tasks.get(key) is task:
                self._waiting[key] -= 1
                if self._waiting[key] == 0 and not task.done():
                    del self._tasks[key], self._waiting[key]
                    task.cancel()
                    await settled(task)

    async def _run(self, key: Hashable, work: Callable[[], Awaitable[_T]]) -> _T:
        task = asyncio.current_task()
        try:
            return await work()
        finally:
            if self._tasks.get(key) is task:
                del self._tasks[key], self._waiting[key]
