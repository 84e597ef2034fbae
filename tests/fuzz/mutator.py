"""Mutations of JSON documents, for targets whose inputs are such."""

from __future__ import annotations

import copy
import json

import atheris

SWAPS = (None, True, 0, -1, 1 << 64, 1.5, "", "\0", "\ud800", "..", [], [None], {}, {"": None}, "x" * 300)


def mutate(data: bytes, max_size: int, seed: int) -> bytes:
    """Half of the mutations are of JSON's values, so that most inputs get past the parser."""
    import random

    chance = random.Random(seed)
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return bytes(atheris.Mutate(data, max_size))
    if chance.random() < 0.4 or not isinstance(value, dict):
        return bytes(atheris.Mutate(data, max_size))
    for _ in range(chance.choice((1, 1, 2, 4))):
        where, at = value, value
        while isinstance(at, (dict, list)) and at:
            where, key = at, chance.choice(list(at) if isinstance(at, dict) else range(len(at)))
            at = where[key]
            if chance.random() < 0.25:
                break
        if not where:
            continue
        if chance.random() < 0.3:
            del where[key]
        else:
            where[key] = copy.deepcopy(chance.choice(SWAPS))  # one that two places shared would come to hold itself
    try:
        made = json.dumps(value).encode()
    except RecursionError:  # deeper than can be written again
        return data
    return made if len(made) <= max_size else data
