"""Where the time of a training step goes, and how near it comes to what it has to compute.

    python benchmarks/step_profile.py --objective dpo|sft --triples FILE.jsonl [--limit 16]
        [--size small|tiny] [--set trainer.compile_layers=true]

Trains three times over the first triples of FILE (`make_triples.py`): once to warm up, once against
the clock, once under torch's profiler, whose shares of time are printed by group.

The floor is the useful arithmetic at the rate of matrix products. Useful are, for a step,

    6 x parameters of the layers x tokens of its trees, each once
    + 6 x hidden x vocabulary x states that predict a supervised token, each once
    + 12 x hidden x layers x (query, key) pairs along the branches

(two operations a multiplication; forward once, backward twice). An answer's last token predicts
nothing and is not counted. The rate is measured in the same process on products of the same shapes:
every weight of the layers with a step's tokens, the head with its predictors, forward and both
products backward, each the median of five, weighted by its operations, before and after training;
the faster one counts. `useful_share` = useful operations / seconds / rate; the last line
is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from ours import StepLog, given_cuts, prepare, quiet
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function
from work import SETTINGS, SIZES, Triple, make_model, read_triples

FORWARD, BACKWARD, CLIPPING = "step: forward", "step: backward", "step: clipping"
PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm")


class Useful(NamedTuple):
    """What some triples make necessary: tokens, predictors, (query, key) pairs."""

    tokens: int
    predictors: int
    pairs: int


def useful(triple: Triple, objective: str) -> Useful:
    """Return what one triple makes necessary, each branch of its tree once."""
    prompt, safe, unsafe = (len(triple[name]) for name in ("prompt", "safe", "unsafe"))
    k, j = triple["unsafe_cut"], triple["safe_cut"]
    # (tokens above, tokens); a leaf is one token short, since its last token predicts nothing.
    spans = [(0, prompt), (prompt, k), (prompt + k, safe)]
    if objective == "sft":
        spans.append((prompt, safe - 1))
        predictors = 2 * safe + 1
    else:
        spans += [(prompt + k, unsafe - k - 1), (prompt, j), (prompt + j, safe - j - 1)]
        spans.append((prompt + j, unsafe))
        # The state at which a pair branches predicts both of its next tokens.
        predictors = (safe + 1 + unsafe - k - 1) + (safe - j + unsafe + 1 - 1)
    return Useful(
        tokens=sum(count for _, count in spans),
        predictors=predictors,
        pairs=sum(count * above + count * (count + 1) // 2 for above, count in spans),
    )


def total(triples: Iterable[Triple], objective: str) -> Useful:
    """Return the sum over triples."""
    return Useful(*map(sum, zip(*(useful(t, objective) for t in triples), strict=True)))


def layer_weights(model: Any) -> list[nn.Linear]:
    """Return the linear maps of the layers, without embedding and head."""
    return [part for part in model.model.modules() if isinstance(part, nn.Linear)]


def operations(model: Any, work: Useful) -> float:
    """Return the useful floating-point operations of `work`."""
    config = model.config
    parameters = sum(layer.weight.numel() for layer in layer_weights(model))
    return (
        6.0 * parameters * work.tokens
        + 6.0 * config.hidden_size * config.vocab_size * work.predictors
        + 12.0 * config.hidden_size * config.num_hidden_layers * work.pairs
    )


def usual_seconds(run: Callable[[], Any], num_times: int = 5) -> float:
    """Return the median seconds of several runs, after one that does not count."""
    run()
    seconds = []
    for _ in range(num_times):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def product_seconds(rows: int, inner: int, outer: int) -> float:
    """Return the seconds of y = x W^T and of both products that its gradient takes."""
    x, w, g = torch.randn(rows, inner), torch.randn(outer, inner), torch.randn(rows, outer)
    return sum(
        usual_seconds(partial(torch.mm, left, right, out=out))
        for left, right, out in (
            (x, w.t(), torch.empty(rows, outer)),
            (g, w, torch.empty(rows, inner)),
            (g.t(), x, torch.empty(outer, inner)),
        )
    )


def product_rate(model: Any, tokens: int, predictors: int) -> float:
    """Return operations a second of the model's own matrix products, weighted by operations."""
    counts = Counter((tokens, m.in_features, m.out_features) for m in layer_weights(model))
    counts[predictors, model.config.hidden_size, model.config.vocab_size] += 1
    done = sum(6.0 * rows * inner * outer * n for (rows, inner, outer), n in counts.items())
    return done / sum(product_seconds(*shape) * n for shape, n in counts.items())


class Profile(pl.Callback):
    """Profiles all steps from number `first` on."""

    def __init__(self, first: int) -> None:
        self.first = first
        self.profiler = profile(activities=[ProfilerActivity.CPU], record_shapes=True)

    def on_train_batch_end(self, *args: Any) -> None:
        """Start before the first step that counts."""
        if args[-1] + 1 == self.first:
            self.profiler.start()

    def on_train_end(self, *_: Any) -> None:
        """Stop after the last one."""
        self.profiler.stop()


def scoped(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """Return `function` under a name in the profile."""

    def inside(*args: Any, **kwargs: Any) -> Any:
        with record_function(name):
            return function(*args, **kwargs)

    return inside


def scopes(event: Any) -> list[str]:
    """Return the names around an event, nearest first, its own included."""
    names = []
    while event is not None:
        names.append(event.name)
        event = event.cpu_parent
    return names


def group_of(event: Any, vocabulary: int) -> str:
    """Return which part of a step an event of the profile belongs to."""
    around = scopes(event)
    if any("DataLoader" in name for name in around):
        return "data planning"
    # The optimizer runs the whole step as its closure, so what stands nearest decides.
    scope = next((n for n in around if n.startswith(("step: ", "Optimizer."))), "")
    if scope == CLIPPING or scope.startswith("Optimizer.step"):
        return "optimizer and clipping" if event.name.startswith("aten::") else "rest"
    if any("scaled_dot_product" in name or "_attention" in name for name in around):
        return "attention"
    if not event.name.startswith("aten::"):
        return "rest"
    if any("embedding" in name for name in around):
        return "embedding"
    is_head = any(vocabulary in shape for shape in event.input_shapes or () if shape)
    if event.name in PRODUCTS:
        return "head, products" if is_head else "layers, products"
    return "head, the rest" if is_head else "norms, elementwise, copies"


def shares(events: Iterable[Any], vocabulary: int, seconds: float) -> dict[str, float]:
    """Return the share of `seconds` of each group; Python and what is unnamed is the rest."""
    found: defaultdict[str, float] = defaultdict(float)
    for event in events:
        found[group_of(event, vocabulary)] += event.self_cpu_time_total / 1e6 / seconds
    found["rest"] = 1.0 - sum(value for name, value in found.items() if name != "rest")
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def measure(
    triples: list[Triple], objective: str, size: str, overrides: list[str]
) -> dict[str, Any]:
    """Return the result; `triples` fill whole steps."""
    model = make_model(**SIZES[size])
    num_steps = len(triples) // SETTINGS["triples_per_step"]
    work = total(triples, objective)
    shape = (work.tokens // num_steps, work.predictors // num_steps)
    rate = product_rate(model, *shape)
    rounds = triples * 3
    log, profiled = StepLog(), Profile(2 * num_steps)
    with given_cuts(rounds):
        job = prepare(model, rounds, objective, overrides)
        job.trainer.callbacks += [log, profiled]
        job.module.training_step = scoped(job.module.training_step, FORWARD)
        job.module.backward = scoped(job.module.backward, BACKWARD)
        job.module.configure_gradient_clipping = scoped(
            job.module.configure_gradient_clipping, CLIPPING
        )
        job.trainer.fit(job.module, datamodule=job.data)
    rate = max(rate, product_rate(model, *shape))
    timed, watched = log.seconds[num_steps : 2 * num_steps], log.seconds[2 * num_steps :]
    groups = shares(profiled.profiler.events(), model.config.vocab_size, sum(watched))
    return {
        "useful_share": round(operations(model, work) / sum(timed) / rate, 4),
        "step_seconds": round(sum(timed) / num_steps, 4),
        "floor_seconds": round(operations(model, work) / rate / num_steps, 4),
        "products_gflops_per_s": round(rate / 1e9, 2),
        "useful_gflops_per_step": round(operations(model, work) / num_steps / 1e9, 3),
        "tokens_per_step": shape[0],
        "predictors_per_step": shape[1],
        "profiled_step_seconds": round(sum(watched) / num_steps, 4),
        "shares": {name: round(value, 4) for name, value in groups.items()},
        "threads": torch.get_num_threads(),
    }


def main() -> None:
    """Print the table and the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--objective", choices=["sft", "dpo"], required=True)
    parser.add_argument("--triples", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=16, help="a multiple of a step's triples")
    parser.add_argument("--size", choices=list(SIZES), default="small", help="of the model")
    parser.add_argument("--set", nargs="*", default=[], help="of the configuration: key=value")
    args = parser.parse_args()
    triples = read_triples(args.triples, args.limit)
    if not triples or len(triples) % SETTINGS["triples_per_step"]:
        parser.error(f"--limit: {len(triples)} triples; steps take {SETTINGS['triples_per_step']}")
    quiet()
    result = measure(triples, args.objective, args.size, args.set)
    for name, share in result["shares"].items():
        print(f"{100 * share:6.1f} %  {name}")
    print(
        f"step {result['step_seconds']:.3f} s, floor {result['floor_seconds']:.3f} s at "
        f"{result['products_gflops_per_s']:.1f} GFLOP/s on {result['threads']} threads"
    )
    print(json.dumps({"objective": args.objective, "size": args.size, **result}))


if __name__ == "__main__":
    main()
