"""The ground: the closed set of errors every room raises, and nothing else.

    DoliumError
     +-- InvalidArgument      the request itself is wrong; nothing was changed
     +-- NotFound             the named object does not exist
     +-- AlreadyExists        the named object exists, or a name is in use
     +-- FailedPrecondition   the object is in a state that does not allow this
     +-- PermissionDenied     the caller, or the kernel, does not allow this
     +-- ResourceExhausted    disk, addresses, ports, limits
     +-- DeadlineExceeded     something did not answer in time
     +-- Unavailable          a peer (registry, daemon, shim) cannot be reached; may be tried again
     +-- Unimplemented        this kernel or this version cannot do it
     +-- Internal             a bug in dolium

Each is raised with what failed, on which object, why, and, where one is known, what to do. One table per API maps the
class to that API's status. Cold modules import this file: it may import nothing.
"""

from __future__ import annotations


class DoliumError(Exception):
    """Base of the closed set. ``str(error)`` is the one message a person reads.

    ``message`` says what failed, on which object and why; ``hint`` says what to do about it, or is empty.
    ``errno`` is the kernel's number where the kernel said no, else None.
    """

    def __init__(self, message: str, *, hint: str = "", errno: int | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.errno = errno

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


class InvalidArgument(DoliumError):
    """The request is wrong in itself. Nothing was changed."""


class NotFound(DoliumError):
    """The named object does not exist."""


class AlreadyExists(DoliumError):
    """The object exists already, or its name is taken."""


class FailedPrecondition(DoliumError):
    """The object's state does not allow the operation (start a running container, remove one in use)."""


class PermissionDenied(DoliumError):
    """The caller may not do this, or the kernel answered EPERM or EACCES."""


class ResourceExhausted(DoliumError):
    """Disk, memory, addresses, ports, file descriptors or another bounded thing ran out."""


class DeadlineExceeded(DoliumError):
    """Something did not answer within its time limit."""


class Unavailable(DoliumError):
    """A peer could not be reached, or broke off. Trying again may help."""


class Unimplemented(DoliumError):
    """This kernel, or this version of dolium, cannot do what was asked."""


class Internal(DoliumError):
    """A bug in dolium, or an answer from a part of dolium that makes no sense."""
