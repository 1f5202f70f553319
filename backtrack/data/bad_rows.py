"""Rows that give no example, and how many of them an error lists."""

import bisect
from collections.abc import Callable
from typing import NamedTuple

NUM_LISTED = 20
"""Bad rows that an error lists; it gives their total as well."""
NUM_CHARACTERS_REPEATED = 160
"""A longer problem (the list of all formats) is spelt out once."""


class BadRow(NamedTuple):
    """A row that gives no example. Lines count from 1; Parquet and hub rows have row numbers."""

    file: str
    line: int
    problem: str


Note = Callable[[BadRow], None]
"""Is told of each row that gives no example."""


class Listing:
    """How many bad rows there are, and the first `NUM_LISTED` of them by line.

    As text, one line a row, and how many more there are.
    """

    def __init__(self) -> None:
        """Begin with none."""
        self.total = 0
        self._first: list[BadRow] = []

    def add(self, row: BadRow) -> None:
        """Count `row`; memory does not grow with their number."""
        self.total += 1
        bisect.insort(self._first, row, key=lambda row: row.line)
        del self._first[NUM_LISTED:]

    def __str__(self) -> str:
        lines: list[str] = []
        first_line: dict[str, int] = {}
        for row in self._first:
            first = first_line.setdefault(row.problem, row.line)
            is_repeated = first != row.line and len(row.problem) > NUM_CHARACTERS_REPEATED
            problem = f"as line {first}" if is_repeated else row.problem
            lines.append(f"  {row.file}:{row.line}: {problem}")
        if self.total > len(self._first):
            lines.append(f"  ... and {self.total - len(self._first)} more, {self.total} in all")
        return "\n".join(lines)
