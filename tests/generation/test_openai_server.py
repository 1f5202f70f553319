"""The engine `openai` against real llama-server: the answers are those of the embedded engine."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from backtrack.generation import openai
from backtrack.generation.engine import HFEngine
from backtrack.generation.frontier import approximate_frontier, frontier
from tests.generation.llama_server import llama_server
from tests.generation.stub_server import R, asked, engine_at, tokenizer_with_reset
from tests.tiny import START_ID, tiny_model

pytestmark = pytest.mark.slow
PROMPTS = [(START_ID, 97 + i, 98) for i in range(6)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    for package in ("gguf", "xllamacpp"):
        pytest.importorskip(package, reason=f"the test's server needs {package} (extra dev)")
    return tmp_path_factory.mktemp("llama")


@pytest.fixture(scope="module")
def server(folder):
    """Its words are ASCII, whatever they stand for: it names no byte within a character."""
    tokenizer, path = tokenizer_with_reset(), folder / "plain.gguf"
    words = [f"<{token}>" for token in range(len(tokenizer))]
    with llama_server(tiny_model(), tokenizer, path, words=words) as address:
        yield address


@pytest.fixture(scope="module")
def embedded():
    return HFEngine(tiny_model(), tokenizer_with_reset(), batch_size=8)


def words_of(completion):
    """All of a completion that is not time or margin."""
    return replace(completion, ttft_s=None, seconds=0.0, reset_margins=(), closest_choice=math.inf)


def test_openai_real_server_answers_as_the_embedded_engine_does(server, embedded):
    requests = [
        asked(prompt, prefill, max_new_tokens=24, reset_bias=bias, max_resets=max_resets)
        for prompt in PROMPTS
        for prefill in ((), (99, 100))
        for bias in (-math.inf, 0.0, 1.0, 2.0)
        for max_resets in (1, 2)
    ]
    remote, local = engine_at(server).generate(requests), embedded.generate(requests)
    assert min(completion.closest_choice for completion in local) > 1e-5
    assert [words_of(c) for c in remote] == [words_of(c) for c in local]
    assert {completion.num_resets for completion in local} == {0, 1, 2}
    known = [
        (there, here)
        for a, b in zip(remote, local, strict=True)
        for there, here in zip(a.reset_margins, b.reset_margins, strict=True)
        if there > -math.inf
    ]
    assert len(known) > 100
    assert all(there == pytest.approx(here, abs=1e-4) for there, here in known)


def test_openai_real_server_ends_at_the_end_of_turn(server, embedded):
    """A bias on [RESET] of 100 resets at once; the budget ends, and nothing is shown."""
    requests = [asked(PROMPTS[0], max_new_tokens=n, reset_bias=100.0) for n in (1, 5)]
    remote = engine_at(server).generate(requests)
    assert [words_of(c) for c in remote] == [words_of(c) for c in embedded.generate(requests)]
    assert [c.finish_reason for c in remote] == ["length_after_reset", "length"]
    assert not any(R in c.visible_ids for c in remote)


def test_openai_real_server_frontier_is_that_of_separate_runs(server, embedded, monkeypatch):
    # A random model of 260 words is so flat that [RESET] is seldom among 20.
    monkeypatch.setattr(openai, "NUM_LOGPROBS", (260,))
    requests = [asked(prompt, max_new_tokens=24) for prompt in PROMPTS]
    biases = (-math.inf, 0.0, 0.5, 1.0, 2.0, 4.0)
    remote = approximate_frontier(engine_at(server), requests, biases)
    local = frontier(embedded, requests, biases)
    assert (remote.is_exact, local.is_exact) == (False, True)
    for there, here in zip(remote.completions, local.completions, strict=True):
        assert [words_of(c) for c in there] == [words_of(c) for c in here]
    resets = [sum(c.num_resets for c in row) for row in remote.completions]
    assert resets[0] == 0 < resets[-1]


def test_openai_real_server_samples_are_drawn_apart(server):
    requests = [
        asked(PROMPTS[0], sample=i, temperature=1.0, max_new_tokens=12, reset_bias=2.0)
        for i in range(16)
    ]
    first = engine_at(server, concurrency=1).generate(requests)
    assert len({c.visible_ids for c in first}) == 16
    assert {c.num_resets for c in first} == {0, 1}
    assert (
        engine_at(server, concurrency=1).generate(requests[:2])[0].visible_ids
        == first[0].visible_ids
    )


def test_openai_real_server_that_leaves_tokens_out_is_refused(folder):
    tokenizer, path = tokenizer_with_reset(), folder / "bytes.gguf"
    words = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    problem = r"names \d+ of 24 tokens.*--special"
    with llama_server(tiny_model(), tokenizer, path, words=words) as address:
        engine = engine_at(address)
        with pytest.raises(ValueError, match=problem):
            engine.generate([asked(prompt, max_new_tokens=24) for prompt in PROMPTS])
