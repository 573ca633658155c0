"""Adam and AdamW as they come, against the loop as people write it

    python -m benchmarks.optim

The MLP of benchmarks/loop.py. The plain loop says `torch.optim.AdamW(model.parameters())`; trainkit's learner is told the
optimizer's name, or nothing at all. CPU time of all threads of a step, measured right beside the plain loop, in turn;
medians of the ratios of such pairs.
"""
from __future__ import annotations

from functools import partial

import torch
from torch.nn import functional as F

from benchmarks import common
from benchmarks.common import Maker, Table, Work, median, spread, versus
from benchmarks.peers import Batches, mlp, plain, regression
from trainkit.learner import Learner

CLASSES = {"Adam": torch.optim.Adam, "AdamW": torch.optim.AdamW}


def ours(data: Batches, opt: str | None) -> Work:
    learn = Learner(mlp(), data, F.mse_loss, opt, front="none")
    return partial(learn.fit, data.epochs)


def beside(data: Batches, runs: int, name: str) -> Table:
    "Ratios of a step's time to the plain loop's."
    base = partial(plain, data, lambda model: CLASSES[name](model.parameters()))
    others: dict[str, Maker] = {
        "the plain loop again": base,
        "the plain loop, fused=True": partial(plain, data, lambda model: CLASSES[name](model.parameters(), fused=True)),
        f"trainkit, opt={name.lower()!r}": partial(ours, data, name.lower()),
    }
    if name == "AdamW": others["trainkit, no opt given"] = partial(ours, data, None)
    table = Table(f"torch.optim.{name}", ("", "ratio to the plain loop", "middle half", "to reach", "µs a step"))
    found = versus(base, others, runs, data.parts)
    for who, pairs in found.items():
        ratios = [other[0] / plainly[0] for plainly, other in pairs]
        goal = "0.80" if who.startswith("trainkit") else None
        table.rows.append((who, median(ratios), spread(ratios), goal, median(other[0] for _, other in pairs) * 1e6))
    first = median(plainly[0] for pairs in found.values() for plainly, _ in pairs) * 1e6
    table.notes.append(f"A step of the plain loop: {first:.0f} µs. {runs} pairs each.")
    return table


def measure(tiny: bool = False) -> list[Table]:
    data = regression(20 if tiny else 500)
    return [beside(data, 1 if tiny else 7, name) for name in CLASSES]


if __name__ == "__main__":
    common.main("optim", measure, __doc__)
