"""The one table from the closed error set to Docker's status codes."""

from __future__ import annotations

import json
import logging
from collections.abc import Awaitable, Callable

from aiohttp import web

from dolium import errors

_log = logging.getLogger(__name__)

STATUS: dict[type[errors.DoliumError], int] = {
    errors.InvalidArgument: 400,
    errors.NotFound: 404,
    errors.AlreadyExists: 409,
    errors.FailedPrecondition: 409,
    errors.PermissionDenied: 403,
    errors.ResourceExhausted: 500,
    errors.DeadlineExceeded: 504,
    errors.Unavailable: 503,
    errors.Unimplemented: 501,
    errors.Internal: 500,
}


def status_of(error: errors.DoliumError) -> int:
    """The HTTP status of an error."""
    return STATUS.get(type(error), 500)


def error_response(status: int, message: str) -> web.Response:
    """Docker's error object."""
    # Without a charset: the docker command line compares the type as a whole.
    return web.Response(status=status, body=json.dumps({"message": message}).encode() + b"\n",
                        headers={"Content-Type": "application/json"})


async def begun(request: web.Request, response: web.StreamResponse) -> None:
    """A hook of the application: the client has an answer's head from now on."""
    request["begun"] = True


def _answer(request: web.Request, status: int, message: str) -> web.Response:
    """The error; in the middle of an answer there is no place for one: it is logged, and the connection ends there."""
    if request.get("begun"):
        _log.warning("%s %s: %s; the answer had begun and breaks off", request.method, request.path, message)
        if request.transport is not None:
            request.transport.close()
    return error_response(status, message)


def known(request: web.Request, error: Exception) -> errors.DoliumError:
    """The error itself, or for a bug one that says so; its trace is in the log then."""
    if isinstance(error, errors.DoliumError):
        return error
    _log.error("%s %s", request.method, request.path, exc_info=error)
    return errors.Internal(f"internal error: {error!r}", hint="a bug in dolium; the daemon's log has the trace")


@web.middleware
async def error_middleware(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    """Every error leaves as ``{"message": ...}`` with the status of its class; a bug is logged and is a 500."""
    try:
        return await handler(request)
    except errors.DoliumError as error:
        return _answer(request, status_of(error), str(error))
    except web.HTTPException as error:
        if error.status == 404:
            return error_response(404, "page not found")
        return error_response(error.status, error.reason)
    except (ConnectionError, OSError) as error:
        if isinstance(error, ConnectionError):
            raise
        _log.exception("%s %s", request.method, request.path)
        return _answer(request, 500, f"{request.method} {request.path}: {error}")
    except RecursionError:  # JSON, or a container's folders
        return _answer(request, 400, f"{request.method} {request.path}: what is asked for is nested too deeply to be read")
    except Exception as error:  # noqa: BLE001 - the last line of defence: a bug must not end the daemon
        return _answer(request, 500, str(known(request, error)))
