"""What a loop costs over the five lines that people write

    python -m benchmarks.loop                the table, in benchmarks/results/loop.md
    python -m benchmarks.loop --trainkit     without the peers, shown only
    python -m benchmarks.loop --profile      where a bare step of trainkit's spends its time
    python -m benchmarks.loop --profile-all  where a step does that has everything on

An MLP 16-32-1, batches of 32, 1,000 of them prepared in a list, SGD. A fit of four epochs: the CPU time (of all threads)
from the beginning of the second epoch to that of the last one, per step, and what the fit takes beyond four such epochs,
once. Each was measured right beside the plain loop, in turn; medians of the differences and of the ratios of such pairs.
"""
from __future__ import annotations

import cProfile
import os
import pstats
import sys
import tempfile
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks import common
from benchmarks.common import Maker, Table, Work, median, present, spread, version, versus
from benchmarks.peers import PEERS, Batches, mlp, plain, regression
from trainkit.learner import Learner
from trainkit.optim import OptimBuilder

BARE, ALL = "trainkit, bare", "trainkit, defaults in a "  # script, terminal
SAVING = "the plain loop, with torch.save"
LESS = ", but no checkpoints"  # what is left is paid at every step; a checkpoint is paid once an epoch
TARGETS = {BARE: "8", f"{ALL}script": "15", f"{ALL}terminal": "15", f"{ALL}script{LESS}": "15"}


def bare(data: Batches) -> Work:
    learn = Learner(mlp(), data, F.mse_loss, OptimBuilder(torch.optim.SGD, lr=0.01), front="none")
    return partial(learn.fit, data.epochs)


def all_on(data: Batches, folder: str, where: str, **but: str) -> Work:
    "History, progress, commands, a checkpoint every epoch, and what else is on when nothing is said but run=."
    run = Path(tempfile.mkdtemp(dir=folder)) / "run"
    learn = Learner(mlp(), data, F.mse_loss, OptimBuilder(torch.optim.SGD, lr=0.01), run=run, **but)

    def work() -> None:
        with patch.dict(os.environ, TRAINKIT_WHERE=where): learn.fit(data.epochs)

    return work


def plain_saving(data: Batches, folder: str) -> Work:
    "The plain loop that writes what it needs to go on, safely, after every epoch: the least that a checkpoint costs."
    place = Path(tempfile.mkdtemp(dir=folder))

    def save(model: nn.Module, opt: torch.optim.Optimizer) -> None:
        with open(place / "new", "wb") as file:
            torch.save({"model": model.state_dict(), "opt": opt.state_dict(), "rng": torch.get_rng_state()}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(place / "new", place / "checkpoint.pt")

    return plain(data, save=save)


def ours(data: Batches, folder: str) -> dict[str, Maker]:
    every = {ALL + where: partial(all_on, data, folder, where) for where in ("script", "terminal")}
    return {BARE: partial(bare, data), **every, f"{ALL}script{LESS}": partial(all_on, data, folder, "script", save_every="none")}


def overhead(data: Batches, runs: int, folder: str, peers: bool) -> Table:
    "Microseconds a step over the plain loop, and milliseconds a fit."
    head = ("", "version", "µs a step over the plain loop", "middle half", "ratio", "to reach, µs", "once a fit, ms")
    table = Table(f"{len(data)} steps an epoch", head)
    usable, lacking = present(PEERS if peers else {}, data)
    others = {"the plain loop again": partial(plain, data), SAVING: partial(plain_saving, data, folder), **ours(data, folder),
              **usable}
    found = versus(partial(plain, data), others, runs, data.parts)
    for name, pairs in found.items():
        over = [(other[0] - base[0]) * 1e6 for base, other in pairs]
        times = median(other[0] / base[0] for base, other in pairs)
        once = median(other[1] for _, other in pairs) * 1e3
        package = version("trainkit" if name in TARGETS else name)
        table.rows.append((name, package, median(over), spread(over), times, TARGETS.get(name), once))
    table.rows += [(name, why, None, None, None, None, None) for name, why in lacking.items()]
    base = median(base[0] for pairs in found.values() for base, _ in pairs) * 1e6
    table.notes.append(f"A step of the plain loop: {base:.1f} µs. {runs} pairs each.")
    return table


def measure(tiny: bool = False, peers: bool = True) -> list[Table]:
    with tempfile.TemporaryDirectory() as folder:
        return [overhead(regression(20 if tiny else 1000), 1 if tiny else 9, folder, peers)]


def profile(everything: bool, lines: int = 40) -> None:
    "Where ten epochs spend their time."
    data, profiler = regression(1000, epochs=10), cProfile.Profile()
    with tempfile.TemporaryDirectory() as folder:
        for name, make in ours(data, folder).items():
            if name == (f"{ALL}script" if everything else BARE): profiler.runcall(make())
    pstats.Stats(profiler).sort_stats("tottime").print_stats(lines)


if __name__ == "__main__":
    torch.set_num_threads(1)
    if "--profile" in sys.argv or "--profile-all" in sys.argv: profile("--profile-all" in sys.argv)
    elif "--trainkit" in sys.argv: print(common.machine(), *measure(peers=False), sep="\n\n")
    else: common.main("loop", measure, __doc__)
