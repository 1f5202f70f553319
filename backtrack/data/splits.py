"""Which examples a split holds: pure functions of the seed, of texts and of places in a list."""

import hashlib
import math
from collections.abc import Mapping

from backtrack.data.types import Example, PreferenceTriple


def check_fractions(fractions: Mapping[str, float]) -> None:
    """Raise unless `fractions`, by name of the split, are shares of a whole.

    Raises:
        ValueError: If they are not.
    """
    if not fractions or min(fractions.values()) < 0 or not math.isclose(sum(fractions.values()), 1):
        raise ValueError(
            f"data.split: {dict(fractions)} are no shares of a whole; "
            "give every split a number of 0 or more, in all 1"
        )


def split_of(example: Example, *, fractions: Mapping[str, float], seed: int) -> str:
    """Return the name of the split of an example.

    It follows from (seed, text of the first user turn), case and white space aside. So equal
    prompts, and all continuations of one conversation (a tree of OpenAssistant, the growing
    dialogues of HH), share a split, and adding rows moves no other row.

    Args:
        example: Of any source.
        fractions: Expected share of the prompts in each split, e.g. `{"train": 0.9, "test": 0.1}`;
            see `check_fractions`.
        seed: Another seed gives another, independent split.
    """
    names = [name for name, fraction in fractions.items() if fraction > 0]
    if len(names) == 1:
        return names[0]
    point = _hash_to_unit(f"{seed}\n{_split_key(example)}")
    edge = 0.0
    for name in names:
        edge += fractions[name]
        if point < edge:
            return name
    return names[-1]  # round-off may leave the last edge a little below 1


def is_kept(place: int, *, total: int, most: int | None) -> bool:
    """Return whether item `place` is among the `most` that are spread evenly over `total` items.

    Those are the items `i * total // most`, so that no part of a list is favoured; all of them
    where `most` is None or not below `total`.
    """
    if most is None or total <= most:
        return True
    i = -(-place * most // total)
    return i < most and i * total // most == place


def _split_key(example: Example) -> str:
    messages = example.prompt if isinstance(example, PreferenceTriple) else example.messages
    first = next(message["content"] for message in messages if message["role"] == "user")
    return " ".join(first.split()).casefold()


def _hash_to_unit(text: str) -> float:
    """Return a number in [0, 1), uniform over texts; 53 bits, as many as a float holds."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / 2**53
