"""The reference's table on disk: hit, stale, damaged, killed half way, shared by processes."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
from dataclasses import replace
from threading import Timer

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose

from backtrack.data.module import BatchSettings
from backtrack.data.types import EncodedExample
from backtrack.modules import reference
from backtrack.modules.reference import compute_table, reference_table
from backtrack.modules.reference_table import CHECKSUM, INDEX, VALUES, PartialTable, index_trees
from tests.modules.builders import PAD, sft_module, some_examples, some_trees
from tests.modules.test_reference import compute
from tests.tiny import tiny_model


def damaged(content):
    """Ways in which a file can be broken."""
    middle = len(content) // 2
    return {
        "empty": b"",
        "text": b"not a table",
        "short head": content[:30],
        "cut in half": content[:middle],
        "without its end": content[:-10],
        "flipped bits": content[:middle]
        + bytes(b ^ 255 for b in content[middle:][:40])
        + content[middle + 40 :],
        "zeros": bytes(len(content)),
    }


@pytest.mark.parametrize("name", [VALUES, INDEX, CHECKSUM])
@pytest.mark.parametrize("kind", list(damaged(b"")))
def test_damaged_cache_file_is_computed_again(tmp_path, kind, name, caplog):
    module, trees = sft_module(tiny_model("llama")), some_trees("dpo")
    expected = contents(cached(tmp_path, module, trees), trees)
    folder = folder_of(tmp_path)
    before = files_of(folder)
    (folder / name).write_bytes(damaged(before[name])[kind])
    assert_same(contents(cached(tmp_path, module, trees), trees), expected)
    assert "is not used" in caplog.text
    assert files_of(folder) == before  # repaired


def folder_of(cache_dir):
    """The one table there is."""
    (folder,) = (path for path in (cache_dir / "reference").iterdir() if path.is_dir())
    return folder


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def contents(table, trees):
    return {(tree.epoch, tree.example_id): table[tree.epoch, tree.example_id] for tree in trees}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for key, values in expected.items():
        assert found[key].dtype == np.float32
        assert found[key].tobytes() == values.tobytes()


def cached(folder, module, trees, fingerprint="weights"):
    return reference_table(
        module,
        trees,
        cache_dir=folder,
        address=fingerprint,
        batches=BatchSettings(1, 100, "forest", PAD, 0),
    )


@pytest.fixture
def passes(monkeypatch):
    """Example ids of each window that is computed; windows of two trees."""
    made = []

    def spy(module, trees, **settings):
        made.append([tree.example_id for tree in trees])
        return compute_table(module, trees, **settings)

    monkeypatch.setattr(reference, "compute_table", spy)
    monkeypatch.setattr(reference, "WINDOW", 2)
    return made


def test_table_holds_what_was_computed_for_each_tree(tmp_path, passes):
    module, trees = sft_module(tiny_model("llama")), some_trees("dpo_backtrack")
    trees[1] = replace(trees[1], example_id="tea \u2615:2")
    later = [replace(tree, epoch=1) for tree in trees]
    table = cached(tmp_path, module, trees + later)
    assert len(table) == 10
    for tree in trees + later:
        found = table[tree.epoch, tree.example_id]
        assert found.shape == (len(tree.paths),)
        assert found.dtype == np.float32
        alone = compute(module, [tree])[tree.epoch, tree.example_id]
        assert_allclose(found, alone, rtol=0, atol=1e-4)
    with pytest.raises(KeyError):
        table[2, trees[0].example_id]
    copy = pickle.dumps(table)
    assert len(copy) < 500, "a copy for another process maps the files"
    assert_same(contents(pickle.loads(copy), trees), contents(table, trees))


def test_table_refuses_two_examples_with_one_id(tmp_path):
    # A validation source named like the training source: both have a line 3.
    module, trees = sft_module(tiny_model("llama")), some_trees("dpo")
    with pytest.raises(ValueError, match=r"data\.sources: two examples have the id 'kettles:3'"):
        cached(tmp_path, module, [*trees, replace(trees[0], example_id="kettles:3")])
    table = cached(tmp_path, module, [*trees, trees[3]])  # one example twice is one example
    assert_allclose(table[0, "kettles:3"], compute(module, trees)[0, "kettles:3"], atol=1e-4)


def test_table_refuses_what_is_not_a_number(tmp_path):
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="log-probs of 'kettles:0' are not numbers"):
        cached(tmp_path, sft_module(model), some_trees("dpo"))


def test_interrupted_pass_goes_on_and_ends_with_the_same_bytes(tmp_path, passes, monkeypatch):
    module, trees = sft_module(tiny_model("llama")), some_trees("dpo_backtrack")
    cached(tmp_path / "whole", module, trees)
    ids = [[tree.example_id for tree in trees[first : first + 2]] for first in (0, 2, 4)]
    assert passes == ids
    write = PartialTable.write

    def fail(partial, window, values):
        if window.start == 2:
            values = values.copy()
            values[-1] = float("nan")  # as where only a part reached the disk
        write(partial, window, values)
        if window.start == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(PartialTable, "write", fail)
    with pytest.raises(KeyboardInterrupt):
        cached(tmp_path / "cut", module, trees)
    monkeypatch.setattr(PartialTable, "write", write)
    assert not (folder_of(tmp_path / "cut") / CHECKSUM).exists()
    del passes[:]
    cached(tmp_path / "cut", module, trees)
    assert passes == ids[1:]
    assert files_of(folder_of(tmp_path / "cut")) == files_of(folder_of(tmp_path / "whole"))


@pytest.mark.parametrize("name", [VALUES, INDEX])
def test_interrupted_pass_that_was_damaged_begins_anew(tmp_path, passes, monkeypatch, name):
    module, trees = sft_module(tiny_model("llama")), some_trees("dpo")
    monkeypatch.setattr(PartialTable, "finish", pytest.fail)
    with pytest.raises(pytest.fail.Exception):
        cached(tmp_path, module, trees)
    monkeypatch.undo()
    path = folder_of(tmp_path) / name
    path.write_bytes(path.read_bytes()[:-4])
    cached(tmp_path, module, trees)
    assert files_of(folder_of(tmp_path)).keys() >= {VALUES, INDEX, CHECKSUM}


def rank_that_dies(folder, trees, how):
    """A process that computes one window: is killed then, or sleeps with the next one claimed."""
    torch.set_num_threads(1)
    reference.WINDOW = 2
    module, made = sft_module(tiny_model("llama")), []

    def compute_some(module, trees, **settings):
        made.append(trees)
        if len(made) == 2:
            os.kill(os.getpid(), signal.SIGKILL if how == "killed" else signal.SIGSTOP)
        return compute_table(module, trees, **settings)

    reference.compute_table = compute_some
    cached(folder, module, trees)


def start(*args):
    process = multiprocessing.get_context("spawn").Process(target=rank_that_dies, args=args)
    process.start()
    return process


@pytest.mark.slow
def test_killed_pass_goes_on_and_ends_with_the_same_bytes(tmp_path, passes):
    module, trees = sft_module(tiny_model("llama")), some_trees("dpo_backtrack")
    cached(tmp_path / "whole", module, trees)
    process = start(tmp_path / "killed", trees, "killed")
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    del passes[:]
    cached(tmp_path / "killed", module, trees)
    assert len(passes) == 2
    assert files_of(folder_of(tmp_path / "killed")) == files_of(folder_of(tmp_path / "whole"))


@pytest.mark.slow
@pytest.mark.distributed
def test_pass_is_shared_between_processes(tmp_path, passes):
    module, trees = sft_module(tiny_model("llama")), some_trees("dpo_backtrack")
    alone = contents(cached(tmp_path / "alone", module, trees), trees)
    process = start(tmp_path / "both", trees, "stopped")
    try:
        os.waitpid(process.pid, os.WUNTRACED)  # it holds the second of three windows
        del passes[:]
        timer = Timer(1.0, os.kill, (process.pid, signal.SIGCONT))
        timer.start()
        table = cached(tmp_path / "both", module, trees)
        assert passes == [[trees[4].example_id]]
        assert_same(contents(table, trees), alone)
    finally:
        os.kill(process.pid, signal.SIGCONT)
        process.join(120)
    assert files_of(folder_of(tmp_path / "both")) == files_of(folder_of(tmp_path / "alone"))


def test_cache_hit_computes_nothing(tmp_path, passes):
    module, trees = sft_module(tiny_model("llama")), some_trees("dpo_backtrack")
    first = cached(tmp_path, module, trees)
    assert len(passes) == 3
    assert_same(contents(cached(tmp_path, module, trees), trees), contents(first, trees))
    assert len(passes) == 3


def test_stale_cache_is_not_used(tmp_path, passes):
    module, trees = sft_module(tiny_model("llama")), some_trees("dpo_backtrack")
    for changed in (
        lambda: cached(tmp_path, module, trees),
        lambda: cached(tmp_path, module, trees, fingerprint="other weights"),
        lambda: cached(tmp_path, module, trees[1:]),
        lambda: cached(tmp_path, module, some_trees("dpo")),
        lambda: cached(tmp_path, module.double(), trees),
    ):
        before = len(passes)
        changed()
        assert len(passes) > before


def test_cache_key_moves_with_weights_dtype_and_every_token():
    examples = some_examples()
    trees = some_trees("dpo", examples)
    first = examples[0]

    def key(trees, fingerprint="w", dtype="torch.float32"):
        return index_trees(trees, fingerprint=fingerprint, dtype=dtype).key

    def changed(**values):
        fields = {name: getattr(first, name) for name in EncodedExample.__slots__}
        return some_trees("dpo", [EncodedExample(**{**fields, **values}), *examples[1:]])

    keys = [
        key(trees),
        key(trees, fingerprint="v"),
        key(trees, dtype="torch.bfloat16"),
        key(trees[:-1]),
        key(changed(example_id="kettles:99")),
        key(changed(safe=(*first.safe[:-1], 250))),
        key(changed(unsafe=(*first.unsafe, 7))),
        key(changed(safe=first.unsafe, unsafe=first.safe)),
        key([trees[0].__class__(first.example_id, 1, *_shape(trees[0])), *trees[1:]]),
    ]
    assert len({*keys}) == len(keys)
    assert key(some_trees("dpo", some_examples())) == keys[0]


def _shape(tree):
    return tree.segments, tree.paths, tree.pairs


def test_pass_says_how_far_it_is_where_no_bar_is_shown(tmp_path, passes, monkeypatch, caplog):
    now = [0.0]
    monkeypatch.setattr(reference.time, "perf_counter", lambda: now[0])
    compute_some = reference.compute_table

    def take_half_a_minute(*args, **settings):
        now[0] += 30.0
        return compute_some(*args, **settings)

    monkeypatch.setattr(reference, "compute_table", take_half_a_minute)
    with caplog.at_level("INFO"):
        cached(tmp_path, sft_module(tiny_model("llama")), some_trees("dpo"))
    said = [text for text in caplog.messages if text.startswith("reference: ")]
    assert said == ["reference: 4 of 5 trees, 0.1 a second, 15 s left"]
