"""Which image a name means, and what removing a name takes along: Docker's rules, on dictionaries alone."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from dolium.errors import FailedPrecondition, InvalidArgument, NotFound
from dolium.images.progress import short_id
from dolium.images.reference import Reference, is_digest

_PREFIX = re.compile(r"(?:sha256:)?([0-9a-f]{1,64})", re.ASCII)


@dataclass(frozen=True, slots=True)
class Use:
    """A container that was made from an image."""

    container: str
    running: bool


@dataclass(frozen=True, slots=True)
class Removal:
    """One line of ``docker rmi``: ``kind`` is ``Untagged`` or ``Deleted``, ``value`` a familiar name or an image ID."""

    kind: str
    value: str


@dataclass(frozen=True, slots=True)
class RemovalPlan:
    """Canonical names to take away, and whether the image goes too."""

    untag: tuple[str, ...]
    delete: bool


class Names:
    """Canonical references, tagged or digested, to image IDs."""

    def __init__(self, tags: Mapping[str, str]) -> None:
        """Start from what the records hold."""
        self._images: dict[str, str] = {}
        self._references: dict[str, dict[str, Reference]] = {}  # by image: listing must not parse every name again
        self.update(tags)

    def get(self, name: str) -> str | None:
        """The image a canonical name points to."""
        return self._images.get(name)

    def update(self, tag: Mapping[str, str], untag: Iterable[str] = ()) -> None:
        """Move and remove names; what the database has committed already."""
        for name in (*untag, *tag):
            if (before := self._images.pop(name, None)) is not None:
                del self._references[before][name]
        for name, image in tag.items():
            self._images[name] = image
            self._references.setdefault(image, {})[name] = Reference.parse(name)

    def all(self) -> dict[str, str]:
        """Canonical name to image ID."""
        return dict(self._images)

    def of(self, image_id: str) -> list[Reference]:
        """All references to an image, sorted by their familiar form."""
        return sorted(self._references.get(image_id, {}).values(), key=Reference.familiar)

    def resolve(self, text: str, images: Collection[str]) -> tuple[str, Reference | None]:
        """The image ``text`` means, and the reference when it is a name: whole ID, name, then ID prefix.

        Raises NotFound with Docker's words, InvalidArgument for an ambiguous prefix or for what is neither.
        """
        if is_digest(text) or is_digest(f"sha256:{text}"):
            identifier = text if text.startswith("sha256:") else f"sha256:{text}"
            if identifier in images:
                return identifier, None
            raise NotFound(f"No such image: {text}")
        prefix = _PREFIX.fullmatch(text)
        try:
            reference = Reference.parse(text).with_default_tag()
        except InvalidArgument:
            if prefix is None:
                raise
            reference = None
        if reference is not None:
            name = reference.digested(reference.digest) if reference.digest else reference
            if (image := self._images.get(str(name))) is not None:
                return image, name
        if prefix is not None:
            found = [image for image in images if image.startswith(f"sha256:{prefix[1]}")]
            if len(found) == 1:
                return found[0], None
            if found:
                raise InvalidArgument(f"ambiguous image ID prefix {text!r}", hint=f"it fits {len(found)} images")
        raise NotFound(f"No such image: {reference.familiar() if reference else text}")


def plan_removal(
    names: Sequence[Reference], image_id: str, reference: Reference | None, uses: Sequence[Use], force: bool
) -> RemovalPlan:
    """What ``docker rmi`` does for an image with these names, asked for by ``reference`` or, when None, by its ID.

    A name goes; digests of a repository go with its last tag; the image goes with its last name. By ID, several
    tags, or names of several repositories, need ``force``. An image that containers were made from keeps its last name, or
    with ``force`` stays without one: a container's layers are never taken away. Raises FailedPrecondition.
    """
    if reference is None:
        several = len({name.name for name in names}) > 1 or sum(1 for name in names if name.tag) > 1
        if several and not force:
            raise FailedPrecondition(
                f"conflict: unable to delete {short_id(image_id)} (must be forced) - "
                "image is referenced in multiple repositories"
            )
        gone = list(names)
    else:
        gone = [name for name in names if name == reference]
        rest = [name for name in names if name != reference]
        if not any(name.tag for name in rest if name.name == reference.name):
            gone += [name for name in rest if name.name == reference.name and name.digest]
    last = len(gone) == len(names)
    running = [use for use in uses if use.running]
    if last and uses and (not force or (running and reference is None)):
        use = (running or list(uses))[0]
        raise FailedPrecondition(_conflict(image_id, reference, use, running=bool(running)))
    return RemovalPlan(tuple(str(name) for name in gone), last and not uses)


def _conflict(image_id: str, reference: Reference | None, use: Use, *, running: bool) -> str:
    container = use.container[:12]
    if reference is not None:
        return (
            f'conflict: unable to remove repository reference "{reference.familiar()}" (must force) - '
            f"container {container} is using its referenced image {short_id(image_id)}"
        )
    how, state = ("cannot be forced", "running") if running else ("must be forced", "stopped")
    image = short_id(image_id)
    return f"conflict: unable to delete {image} ({how}) - image is being used by {state} container {container}"
