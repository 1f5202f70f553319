"""torch.compile for the layers of a model: one compilation, used by all of them.

The layers of a model have the same code, so compiling each by itself takes the time of one and
leaves embedding, head and everything around them as they are. It pays in long runs: on a GPU the
steps between the matrix products become one kernel; on a CPU a step gets a few percent shorter
after half a minute of compiling.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


def compile_layers(model: PreTrainedModel | PeftModel, *, has_fixed_shapes: bool) -> None:
    """Let every layer of `model` be compiled at its first call, in place; no name changes.

    Args:
        model: Under LoRA or not.
        has_fixed_shapes: Whether all batches have the same shape (rows on a GPU have); otherwise
            sizes are symbols, so that no new length compiles again.

    Raises:
        ValueError: If transformers does not say which modules of this architecture are layers.
    """
    names = set(getattr(model, "_no_split_modules", None) or ())
    layers = [module for module in model.modules() if type(module).__name__ in names]
    if not layers:
        raise ValueError(
            f"trainer.compile_layers: the layers of {model.config.model_type} are not known to "
            "transformers (`_no_split_modules`); set it to false"
        )
    for layer in layers:
        layer.compile(dynamic=None if has_fixed_shapes else True)
