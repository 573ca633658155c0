"""How long the training waits for a checkpoint

    python -m benchmarks.checkpoints

A learner with AdamW, whose whole state (weights and two averages) has so many bytes. `learn.save(background=True)` returns
when the state is copied; the rest is done beside the training. It is compared with one copy in memory of the same tensors
(`clone` of each, let go at once), in turn; seconds by the clock; nothing is being written when it begins.
"""
from __future__ import annotations

import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import common
from benchmarks.common import Table, median, quiet, spread
from trainkit.learner import Learner

SIDE = 512  # of a layer's weights: 1 MB


def learner(megabytes: float, folder: Path) -> Learner:
    "A learner with a state of that size, trained for a step."
    layers = max(1, round(megabytes / 3))
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Linear(SIDE, SIDE, bias=False) for _ in range(layers)))
    data = [(torch.randn(4, SIDE), torch.randn(4, SIDE))]
    learn = Learner(net, data, "mse", run=folder / "run", front="none", save_every="none", keep=2)
    learn.fit(1)
    return learn


def tensors(state: Any) -> Iterator[Tensor]:
    "All of them in a nest of dicts and lists."
    if isinstance(state, Tensor): yield state
    for item in state.values() if isinstance(state, dict) else state if isinstance(state, (list, tuple)) else ():
        yield from tensors(item)


def row(megabytes: float, runs: int, folder: Path) -> tuple[common.Cell, ...]:
    learn = learner(megabytes, folder)
    store = learn.checkpoints
    assert store is not None
    size, waits, copies, writes = sum(t.nbytes for t in tensors(learn.state_dict())), [], [], []
    for _ in range(runs + 1):
        copies.append(clocked(lambda: [t.clone() for t in tensors(learn.state_dict())]))
        waits.append(clocked(lambda: learn.save(background=True)))
        writes.append(clocked(store.wait))
    ratios = [wait / copy for wait, copy in zip(waits[1:], copies[1:])]
    return (f"{size / 1e6:.0f} MB", median(copies[1:]) * 1e3, median(waits[1:]) * 1e3, median(ratios), spread(ratios), "1.3",
            median(writes[1:]) * 1e3)


def clocked(work: Any) -> float:
    return common.seconds(work, time.perf_counter)


def at_once(megabytes: float, saves: int, folder: Path) -> str:
    "Several saves in a row: how many are written at a time?"
    learn, most, over = learner(megabytes, folder), [0], threading.Event()

    def watch() -> None:
        while not over.wait(0.0005):
            most[0] = max(most[0], sum(thread.name == "trainkit-checkpoint" for thread in threading.enumerate()))

    watcher = threading.Thread(target=watch)
    watcher.start()
    for _ in range(saves): learn.save(background=True)
    assert learn.checkpoints is not None
    learn.checkpoints.wait()
    over.set()
    watcher.join()
    return f"{saves} saves in a row of {megabytes:.0f} MB: {most[0]} in flight at most."


def measure(tiny: bool = False) -> list[Table]:
    head = ("state", "one copy, ms", "the training waits, ms", "ratio", "middle half", "to reach", "then written in, ms")
    table = Table("Waiting for a save in the background", head)
    with quiet():
        for megabytes, runs in [(3.0, 1)] if tiny else [(10.0, 9), (100.0, 7), (500.0, 5)]:
            folder = Path(tempfile.mkdtemp())
            table.rows.append(row(megabytes, runs, folder))
            shutil.rmtree(folder)
        folder = Path(tempfile.mkdtemp())
        table.notes.append(at_once(3.0 if tiny else 50.0, 4, folder))
        shutil.rmtree(folder)
    return [table]


if __name__ == "__main__":
    common.main("checkpoints", measure, __doc__)
