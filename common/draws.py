"""Seeded draws: every random decision of the project is a hash of what it is for, never the state of a generator.

So neither batch, order, memory budget nor number of processes changes a draw, and a resumed run draws what it would have.
"""

import hashlib
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TypeVar

Item = TypeVar("Item")
Key = tuple[int, int, str]  # (seed, step, sample id)


def uniform(key: Key, answer: int, position: int) -> float:
    """The random number in [0, 1) of one token: 24 bits of BLAKE2b over its coordinates, exact in float32."""
    return uniforms(key, answer, [position])[0]


def uniforms(key: Key, answer: int, positions: Iterable[int]) -> list[float]:
    """`uniform` of several tokens of an answer. What their names share is hashed once: almost half of the time."""
    seed, step, sample_id = key
    shared = hashlib.blake2b(f"{seed}/{step}/{sample_id}/{answer}/".encode(), digest_size=8)
    numbers = []
    for position in positions:
        whole = shared.copy()
        whole.update(b"%d" % position)
        numbers.append((int.from_bytes(whole.digest(), "big") >> 40) * 2.0**-24)
    return numbers


def stable_hash(text: str) -> int:
    """A number that depends on nothing but the text."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8])


def shuffled(items: Sequence[Item], key: str) -> list[Item]:
    """`items` in an order that depends on nothing but their number and `key`."""
    return random.Random(key).sample(list(items), len(items))


def first_shuffled(items: Sequence[Item], most: int, key: str) -> list[Item]:
    """The first `most` of a seeded shuffle, in their old order; all of them for 0."""
    chosen = sorted(shuffled(range(len(items)), key)[:most]) if most else range(len(items))
    return [items[i] for i in chosen]


def distinct(ids: Sequence[str]) -> list[str]:
    """Keys of random streams: an id that comes again in a step (D7's next epoch) gets a stream of its own."""
    seen: Counter[str] = Counter()
    keys = []
    for name in ids:
        keys.append(f"{name}#{seen[name]}" if seen[name] else name)
        seen[name] += 1
    return keys
