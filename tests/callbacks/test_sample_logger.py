"""Samples show what was said and nothing else changes; no text can leave its quotation."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugin_util import markdown_to_safe_html

from backtrack.callbacks import sample_logger
from backtrack.callbacks.sample_logger import (
    STRIKE,
    SampleLogger,
    harmful_first,
    quoted,
    sample_markdown,
)
from backtrack.data.types import EncodedExample, Turn
from backtrack.generation.types import Completion
from backtrack.tokens import add_reset_token
from tests.modules.builders import sft_module
from tests.tiny import byte_tokenizer, tiny_model
from tests.tiny_runs import random_states

SETTINGS = {
    "every_n_steps": 2,
    "num_prompts": 2,
    "reset_bias": 0.0,
    "max_resets": 1,
    "max_new_tokens": 5,
    "batch_size": 2,
}


TOKENIZER = byte_tokenizer()
add_reset_token(TOKENIZER, None)


def example(name, text, is_harmful):
    turns = (Turn(tuple(TOKENIZER.encode(text)), is_supervised=False),)
    return EncodedExample(name, is_harmful, turns, safe=(5, 258), unsafe=(6, 258))


EXAMPLES = [
    example("a", "knit a scarf", is_harmful=False),
    example("b", "break a kettle", is_harmful=True),
    example("c", "dent a kettle", is_harmful=True),
]


def trainer_of(folder, **changes):
    settings = {
        "datamodule": SimpleNamespace(validation=EXAMPLES, tokenizer=TOKENIZER),
        "loggers": [TensorBoardLogger(folder, name="", version="")],
        "precision_plugin": SimpleNamespace(),
        "accumulate_grad_batches": 2,
        "global_step": 0,
        "should_stop": False,
        "is_global_zero": True,
    }
    return SimpleNamespace(**{**settings, **changes})


def texts(trainer):
    """Tag -> (step, text) of each sample that was logged."""
    (logger,) = trainer.loggers
    logger.experiment.flush()
    board = EventAccumulator(logger.log_dir).Reload()
    found = {}
    for tag in board.Tags()["tensors"]:
        events = board.Tensors(tag)
        name = tag.removesuffix("/text_summary")
        found[name] = [(e.step, e.tensor_proto.string_val[0].decode()) for e in events]
    return found


def completion(visible="", discarded=(), reason="stop"):
    return Completion(
        visible_ids=(),
        visible_text=visible,
        discarded=(),
        discarded_texts=tuple(discarded),
        num_resets=len(discarded),
        finish_reason=reason,
        ttft_s=None,
        seconds=0.0,
        num_generated=0,
        num_discarded=0,
    )


def struck(text):
    return "".join(sign + STRIKE for sign in text)


def test_samples_are_logged_at_the_start_after_whole_steps_and_at_the_end(tmp_path):
    trainer, module = trainer_of(tmp_path), sft_module(tiny_model())
    callback = SampleLogger(**SETTINGS)
    callback.on_train_start(trainer, module)
    for batch_idx in range(7):  # micro-batches, two a step
        trainer.global_step += batch_idx % 2
        callback.on_train_batch_end(trainer, module, None, None, batch_idx)
    trainer.global_step = 5
    for _ in range(2):
        callback.on_train_end(trainer, module)
    found = texts(trainer)
    assert {name: [step for step, _ in events] for name, events in found.items()} == {
        "samples/0": [0, 2, 5],
        "samples/1": [0, 2, 5],
    }
    assert "break a kettle" in found["samples/0"][0][1]
    assert "dent a kettle" in found["samples/1"][0][1]


def test_samples_are_not_logged_twice_by_a_resumed_run_nor_after_ctrl_c(tmp_path):
    trainer, module = trainer_of(tmp_path, global_step=4), sft_module(tiny_model())
    callback = SampleLogger(**SETTINGS)
    callback.on_train_start(trainer, module)
    callback.on_train_batch_end(trainer, module, None, None, 0)  # half of step 5
    trainer.should_stop = True
    callback.on_train_end(trainer, module)
    assert texts(trainer) == {}


def test_samples_leave_modes_gradients_and_random_state_alone(tmp_path):
    module = sft_module(tiny_model()).train()
    module.model.lm_head.eval()
    before = random_states()
    trainer = trainer_of(tmp_path)
    SampleLogger(**SETTINGS).on_train_start(trainer, module)
    assert len(texts(trainer)) == 2
    assert random_states() == before
    assert [part for part in module.modules() if not part.training] == [module.model.lm_head]
    assert all(p.grad is None for p in module.parameters())


def test_samples_strike_what_the_bias_makes_the_model_take_back(tmp_path):
    trainer, module = trainer_of(tmp_path), sft_module(tiny_model())
    with torch.no_grad():  # says "x" and never resets by itself
        module.model.lm_head.weight.zero_()
    SampleLogger(**{**SETTINGS, "reset_bias": 1.0}).on_train_start(trainer, module)
    (_, reset), *_ = texts(trainer)["samples/0"]
    assert "**taken back**" in reset
    plain = trainer_of(tmp_path / "plain")
    SampleLogger(**{**SETTINGS, "reset_bias": -1.0}).on_train_start(plain, module)
    (_, never), *_ = texts(plain)["samples/0"]
    assert "**taken back**" not in never


def test_sample_shows_prompt_struck_parts_and_what_is_visible():
    text = sample_markdown("How?", completion("No", discarded=["Yes"]), True)
    assert text == (
        "**harmful prompt**\n\n> How?  \n\n"
        f"**taken back**\n\n> {struck('Yes')}  \n\n"
        "**visible** (stop)\n\n> No  "
    )
    empty = sample_markdown("How?", completion(discarded=["Y"], reason="length_after_reset"), False)
    assert empty.startswith("**benign prompt**")
    assert empty.endswith("**visible** (length after reset)\n\n> *(nothing)*")


@pytest.mark.parametrize(
    "text",
    [
        "<script>alert(1)</script><b>bold</b>",
        "</blockquote></td></tr></table>",
        "# head\n\n* item\n1. item\n---\nhead\n====",
        "**bold** _em_ `code` ~~struck~~ ![x](http://a/b.png) [y](javascript:z) <http://a>",
        "    indented\n\n    again",
        "```\nfenced\n```\n    indented\n\tindented",
        "| a | b |\n|---|---|\n| 1 | 2 |",
        "> quoted\n\n\nnot quoted\n\n[id]: http://a\n[id]",
        "&lt; &amp; &#42;x&#42; \\*x\\*",
        "a\x02wzxhzdk:0\x03\x00b\x1b[31m",
        "rtl \u202e gnp.exe \u2028 line \x85 next \r\n crlf \r cr",
        "half a pair \ud800",
    ],
)
@pytest.mark.parametrize("is_struck", [False, True])
def test_quoted_text_cannot_leave_its_quotation(text, is_struck):
    page = "**a**\n\n" + quoted(text, is_struck=is_struck) + "\n\n**b**"
    assert page.encode()  # as a protocol buffer wants it
    html = markdown_to_safe_html(page)
    before, _, rest = html.partition("<blockquote>")
    inside, _, after = rest.partition("</blockquote>")
    assert (before.strip(), after.strip()) == (
        "<p><strong>a</strong></p>",
        "<p><strong>b</strong></p>",
    )
    tags = {part.split(">")[0] for part in inside.split("<")[1:]}
    assert tags <= {"p", "/p", "br", "br/", "br /"}, tags


def test_quoted_text_reads_as_it_was_written():
    text = "1. Mix <b>*two*</b> & `three`: ~~x~~ [y](z)"
    html = markdown_to_safe_html(quoted(text))
    for entity, sign in (("&lt;", "<"), ("&gt;", ">"), ("&amp;", "&")):
        html = html.replace(entity, sign)
    codes = {f"&#{ord(sign)};": sign for sign in text}
    for code, sign in codes.items():
        html = html.replace(code, sign)
    assert text in html


def test_samples_take_harmful_prompts_first_each_in_its_order():
    assert [e.example_id for e in harmful_first(EXAMPLES)] == ["b", "c", "a"]


def test_an_error_warns_without_text_and_training_goes_on(tmp_path, monkeypatch, caplog):
    def fail(*args, **kwargs):
        raise RuntimeError("what the model said")

    monkeypatch.setattr(sample_logger, "sample_markdown", fail)
    trainer, module = trainer_of(tmp_path), sft_module(tiny_model())
    with caplog.at_level(logging.DEBUG):
        SampleLogger(**SETTINGS).on_train_start(trainer, module)
    (record,) = [r for r in caplog.records if r.name == sample_logger.__name__]
    assert record.levelname == "WARNING"
    assert "no samples at step 0: RuntimeError in fail" in record.getMessage()
    assert "what the model said" not in caplog.text
    assert texts(trainer) == {}


@pytest.mark.parametrize("changes", [{"is_global_zero": False}, {"loggers": []}])
def test_samples_are_decoded_by_rank_zero_and_for_a_board_only(tmp_path, monkeypatch, changes):
    monkeypatch.setattr(sample_logger, "engine_of", pytest.fail)
    callback = SampleLogger(**SETTINGS)
    callback.on_train_start(trainer_of(tmp_path, **changes), sft_module(tiny_model()))


@pytest.mark.parametrize("is_first", [True, False])
def test_samples_of_weights_that_are_spread_are_those_of_whole_ones(tmp_path, is_first):
    shown = []
    for is_spread in (False, True):
        folder = tmp_path / str(is_spread)
        trainer, module = trainer_of(folder, is_global_zero=is_first), sft_module(tiny_model())
        if is_spread:
            next(module.model.parameters()).ds_shape = torch.Size([1])  # as ZeRO-3 marks them
        SampleLogger(**SETTINGS).on_train_start(trainer, module)
        shown.append(texts(trainer))
    assert shown[0] == shown[1]
    assert bool(shown[0]) == is_first


@pytest.mark.parametrize(
    ("name", "value"), [("every_n_steps", 0), ("num_prompts", 0), ("max_new_tokens", 0)]
)
def test_settings_out_of_range_are_named(name, value):
    with pytest.raises(ValueError, match=rf"{name}: 0 is not allowed; expected"):
        SampleLogger(**{**SETTINGS, name: value})
