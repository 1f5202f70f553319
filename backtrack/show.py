"""Print one training example as the tree it becomes: `python -m backtrack.show +experiment=NAME`.

Dim text is conditioned on, coloured text is learned: green what SFT raises or DPO prefers, red what
DPO rejects. [RESET] stands out wherever it is. No weights are loaded.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import hydra
from omegaconf import DictConfig
from rich.console import Console
from rich.text import Text
from rich.tree import Tree as Drawing

from backtrack import CONF_DIR
from backtrack.build import make_data, make_tokenizer
from backtrack.checks import check_values, method_of
from backtrack.config import ConfigError, check_command_line
from backtrack.data.examples import make_tree
from backtrack.data.forest import loss_segments
from backtrack.tokens import reset_token_id

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from backtrack.data.types import Tree

CONTEXT, LEARNED, CHOSEN, REJECTED = "dim", "green", "green", "red"
RESET = "bold reverse yellow"


def segment_styles(tree: Tree) -> dict[int, tuple[str, str]]:
    """Return `(style, role)` of every segment: context, supervised, chosen or rejected."""
    styles = dict.fromkeys(range(len(tree.segments)), (CONTEXT, "conditioned on"))
    sides = {chosen: (CHOSEN, "chosen") for chosen, _, _ in tree.pairs}
    sides |= {rejected: (REJECTED, "rejected") for _, rejected, _ in tree.pairs}
    for path, index, weight in loss_segments(tree):
        styles[index] = sides.get(path, (LEARNED, f"supervised, weight {weight:g}"))
    return styles


def draw_tree(tree: Tree, tokenizer: PreTrainedTokenizerBase) -> Drawing:
    """Return `tree` as a rich drawing, one branch a segment.

    Args:
        tree: Of `examples.make_tree`.
        tokenizer: That made its ids; special tokens are shown.
    """
    styles, reset_id = segment_styles(tree), reset_token_id(tokenizer)
    drawing = Drawing(Text(f"{tree.example_id}, epoch {tree.epoch}: {tree.num_tokens} tokens"))
    nodes: list[Drawing] = []
    for index, segment in enumerate(tree.segments):
        style, role = styles[index]
        label = Text(f"{role}, {len(segment.ids)} tokens: ", style="italic")
        run: list[int] = []
        for token in [*segment.ids, None]:
            if token is not None and token != reset_id:
                run.append(token)
                continue
            if run:
                label.append(str(tokenizer.decode(run, skip_special_tokens=False)), style=style)
                run = []
            if token is not None:
                label.append(str(tokenizer.decode([token])), style=RESET)
        parent = drawing if segment.parent < 0 else nodes[segment.parent]
        nodes.append(parent.add(label))
    return drawing


def show(cfg: DictConfig) -> Drawing:
    """Return the drawing of the example that `cfg` names.

    Raises:
        ConfigError: With every problem of the configuration.
        ValueError: If there is no such example.
    """
    problems = check_values(cfg)
    if problems:
        raise ConfigError(problems)
    tokenizer = make_tokenizer(cfg)
    with tempfile.TemporaryDirectory() as folder:
        data = make_data(cfg, tokenizer, Path(folder))
    number = cfg.example
    if not isinstance(number, int) or not 0 <= number < len(data.schedule.index):
        raise ValueError(f"example: {number!r}; expected 0 to {len(data.schedule.index) - 1}")
    source, index = int(data.schedule.source[number]), int(data.schedule.index[number])
    tree = make_tree(data.train[source][index], recipe=data.recipe, epoch=cfg.epoch)
    drawing = draw_tree(tree, tokenizer)
    drawing.label = Text(f"{method_of(cfg)}: ") + Text(str(drawing.label))
    return drawing


@hydra.main(version_base="1.3", config_path=CONF_DIR, config_name="show")
def _main(cfg: DictConfig) -> None:
    Console(soft_wrap=False).print(show(cfg))


def main() -> None:
    """Check the command line, then draw."""
    try:
        check_command_line("show", sys.argv[1:])
        _main()
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
