from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest

from backtrack.data.splits import check_fractions, split_of
from backtrack.data.types import Conversation, Example, Message, PreferenceTriple

FRACTIONS = {"train": 0.5, "validation": 0.25, "test": 0.25}


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}


def triple(i: int, text: str) -> PreferenceTriple:
    return PreferenceTriple(f"s:{i}", (user(text),), "Yes.", "No.")


def split_examples(
    examples: Sequence[Example], *, fractions: Mapping[str, float], seed: int
) -> dict[str, list[Example]]:
    splits: dict[str, list[Example]] = {name: [] for name in fractions}
    for example in examples:
        splits[split_of(example, fractions=fractions, seed=seed)].append(example)
    return splits


def home(splits: dict[str, list[Example]]) -> dict[str, str]:
    return {e.example_id: name for name, examples in splits.items() for e in examples}


def test_split_partitions_in_order_and_near_the_fractions() -> None:
    examples: list[Example] = [triple(i, f"Knit {i} hats?") for i in range(2000)]
    splits = split_examples(examples, fractions=FRACTIONS, seed=0)
    assert list(splits) == ["train", "validation", "test"]
    assert sorted(home(splits)) == sorted(e.example_id for e in examples)
    for name, members in splits.items():
        numbers = [int(e.example_id[2:]) for e in members]
        assert numbers == sorted(numbers)
        # Four standard deviations of a binomial count: 4 * sqrt(2000 / 4) = 90 at most.
        assert abs(len(members) - 2000 * FRACTIONS[name]) < 90


def test_split_of_a_row_is_moved_by_no_other_row() -> None:
    examples: list[Example] = [triple(i, f"Knit {i} hats?") for i in range(200)]
    whole = home(split_examples(examples, fractions=FRACTIONS, seed=3))
    part = home(split_examples(examples[150:30:-3], fractions=FRACTIONS, seed=3))
    assert part.items() <= whole.items()


def test_split_keeps_equal_prompts_and_continuations_together() -> None:
    examples: list[Example] = []
    for i in range(50):
        text = f"Knit {i} hats?"
        examples += [
            triple(4 * i, text),
            triple(4 * i + 1, f" knit {i}  HATS?"),
            Conversation(f"s:{4 * i + 2}", (user(text), assistant("Yes."))),
            Conversation(
                f"s:{4 * i + 3}",
                (
                    {"role": "system", "content": "Be brief."},
                    user(text),
                    assistant("Yes."),
                    user(f"And {i} caps?"),
                    assistant("No."),
                ),
            ),
        ]
    found = home(split_examples(examples, fractions=FRACTIONS, seed=0))
    assert set(found.values()) == set(FRACTIONS)
    for i in range(50):
        assert len({found[f"s:{4 * i + k}"] for k in range(4)}) == 1


def test_split_follows_the_seed() -> None:
    examples: list[Example] = [triple(i, f"Knit {i} hats?") for i in range(200)]
    first, again, other = (
        home(split_examples(examples, fractions=FRACTIONS, seed=seed)) for seed in (0, 0, 1)
    )
    assert first == again != other


def test_split_is_fixed_across_versions() -> None:
    # blake2b of "0\nknit a hat?", first 8 bytes big endian, over 2**64.
    import hashlib

    point = (
        int.from_bytes(hashlib.blake2b(b"0\nknit a hat?", digest_size=8).digest(), "big") / 2**64
    )
    for fraction, expected in [(point - 0.01, "b"), (point + 0.01, "a")]:
        fractions = {"a": fraction, "b": 1 - fraction}
        splits = split_examples([triple(0, "Knit a hat?")], fractions=fractions, seed=0)
        assert [name for name, members in splits.items() if members] == [expected]


def test_split_of_fraction_zero_stays_empty() -> None:
    examples: list[Example] = [triple(i, f"Knit {i} hats?") for i in range(50)]
    splits = split_examples(examples, fractions={"train": 1.0, "test": 0.0}, seed=0)
    assert (len(splits["train"]), len(splits["test"])) == (50, 0)


@pytest.mark.parametrize("fractions", [{}, {"train": 0.5}, {"train": 1.5, "test": -0.5}])
def test_split_fractions_must_be_shares(fractions: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"data\.split"):
        check_fractions(fractions)
