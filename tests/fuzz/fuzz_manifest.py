"""Any bytes as what registries, archives and settings say: refused by name, or parsed. Run by run.py, as a program of its own."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import atheris
from mutator import mutate

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src"))

with atheris.instrument_imports(include=["dolium.images", "dolium.errors"]):
    from dolium.errors import DoliumError
    from dolium.images.auth import Credentials, Token, merge_scopes, parse_challenges, retry_after
    from dolium.images.hosts import parse_registries
    from dolium.images.manifest import Index, Manifest, parse_artifact, parse_config, parse_manifest
    from dolium.images.platform import choose, host
    from dolium.images.reference import Reference, is_digest
    from dolium.images.registry import referrer_entry
    from dolium.images.trust import parse_policy, scopes_of

MACHINE = host()


def documents(data: bytes) -> None:
    """Each reader raises an error that a person is told, or gives what holds what later code relies on."""
    for parse in (parse_manifest, parse_artifact, parse_config):
        try:
            found = parse(data)
        except DoliumError:
            continue
        if isinstance(found, Index):
            choose(MACHINE, [(entry.platform, entry) for entry in found.images])
            assert all(is_digest(entry.digest) for entry in found.manifests)
        elif isinstance(found, Manifest):
            assert all(is_digest(blob.digest) and blob.size >= 0 for blob in (found.config, *found.layers))
    referrer_entry(data, "a/b", "sha256:" + "0" * 64)


def values(data: bytes) -> None:
    """What takes a parsed value: any, for the other side chose it."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return
    for parse in (Credentials.parse, Token.parse, parse_policy, parse_registries):
        try:
            parse(value if parse is not parse_registries or isinstance(value, dict) else {})
        except DoliumError:
            continue
        except ValueError as error:
            if parse is not parse_policy:
                raise
            assert str(error)


def texts(data: bytes) -> None:
    """What takes a line of text."""
    text = data.decode("utf-8", "replace")
    parse_challenges([text])
    assert 0 <= retry_after(text) <= 120
    merge_scopes(text.split(" "))
    try:
        reference = Reference.parse(text)
    except DoliumError:
        return
    assert Reference.parse(str(reference)) == reference == Reference.parse(reference.familiar())
    assert scopes_of(reference)[-1] == ""


def one_input(data: bytes) -> None:
    """All of them."""
    documents(data)
    values(data)
    texts(data)


def custom_mutator(data: bytes, max_size: int, seed: int) -> bytes:
    """libFuzzer's hook."""
    return mutate(data, max_size, seed)


if __name__ == "__main__":
    atheris.Setup(sys.argv, one_input, custom_mutator=custom_mutator)
    atheris.Fuzz()
