"""Encoding on all cores: chunks of examples go out, record batches come back in order."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from itertools import islice
from multiprocessing.connection import wait
from threading import Thread
from typing import TYPE_CHECKING, Any, NamedTuple

from backtrack.data.cache import to_batch
from backtrack.data.encode import encode_example

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from transformers import PreTrainedTokenizerBase

    from backtrack.data.encode import Limits
    from backtrack.data.types import EncodedExample, Example


class Encoder(NamedTuple):
    """What turns an example into ids; see `encode_example`.

    Attributes:
        tokenizer: With a chat template.
        limits: Of prompts and answers, in tokens.
        refusal: `worst` of conversations without ranks.
        on_bad_row: `raise` or `skip` an example that cannot be encoded.
    """

    tokenizer: PreTrainedTokenizerBase
    limits: Limits
    refusal: str
    on_bad_row: str


class EncodedChunk(NamedTuple):
    """Encoded examples, and what was wrong with the others.

    Attributes:
        batches: Record batches by split.
        problems: `(example id, problem)`.
        num_examples: Those that were to be encoded.
    """

    batches: dict[str, Any]
    problems: list[tuple[str, str]]
    num_examples: int


def num_cores() -> int:
    """Return the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def encode_chunk(encoder: Encoder, chunk: Sequence[tuple[str, Example]]) -> EncodedChunk:
    """Return the examples of `chunk`, each with its split, as record batches."""
    encoded: dict[str, list[EncodedExample]] = {}
    problems = []
    for split, example in chunk:
        try:
            ids = encode_example(
                example, encoder.tokenizer, limits=encoder.limits, refusal=encoder.refusal
            )
        except ValueError as error:
            problems.append((example.example_id, str(error)))
        else:
            encoded.setdefault(split, []).append(ids)
    batches = {split: to_batch(examples) for split, examples in encoded.items()}
    return EncodedChunk(batches, problems, len(chunk))


def encode_chunks(
    chunks: Iterable[Sequence[tuple[str, Example]]], encoder: Encoder, *, num_processes: int
) -> Iterator[EncodedChunk]:
    """Yield `chunks` encoded, in their order, whatever the number of processes.

    Args:
        chunks: Read no further ahead than the processes can use.
        encoder: See `Encoder`.
        num_processes: 1 encodes here.
    """
    if num_processes == 1:
        for chunk in chunks:
            yield encode_chunk(encoder, chunk)
        return
    rest = iter(chunks)
    with _serial_tokenizers():
        pool = ProcessPoolExecutor(num_processes, initializer=_start, initargs=(encoder,))
        try:
            first = islice(rest, 2 * num_processes)
            pending = deque(pool.submit(_encode_there, chunk) for chunk in first)
            for chunk in rest:
                pending.append(pool.submit(_encode_there, chunk))
                yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


@contextmanager
def _serial_tokenizers() -> Iterator[None]:
    """Let the processes that are started meanwhile use one thread each.

    Tokenizers have threads of their own, which do not survive a fork.
    """
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ[name] = "false"
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


_encoder_here: Encoder | None = None
"""Of a process of the pool."""


def _start(encoder: Encoder) -> None:
    global _encoder_here
    _encoder_here = encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C: the process that reads ends the pool
    Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this process where the one that reads was killed; otherwise it would wait for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _encode_there(chunk: Sequence[tuple[str, Example]]) -> EncodedChunk:
    assert _encoder_here is not None
    return encode_chunk(_encoder_here, chunk)
