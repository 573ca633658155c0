"""A history of a million steps

    python -m benchmarks.growth

Four series of 10⁶ steps, added one value after the other as a loop does, in memory and with a journal on disk; then the
live plot of all of them, with spikes of a single step. CPU time.
"""
from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np

from benchmarks import common
from benchmarks.common import Table, median, seconds
from trainkit.history import History
from trainkit.ui.plots import Plot, decimate

NAMES = ("train/loss", "train/generator/loss", "train/discriminator/loss", "valid/loss")
SPIKE = 50.0


def values(steps: int) -> tuple[np.ndarray, np.ndarray]:
    "A falling, noisy curve, and where it has a spike of one step."
    rng = np.random.default_rng(0)
    spikes = rng.choice(steps, 20, replace=False)
    curve = np.exp(-np.arange(steps) / steps) + 0.05 * rng.standard_normal(steps)
    curve[spikes] = SPIKE
    return curve, spikes


def added(history: History, curve: np.ndarray, begin: int, end: int) -> float:
    "Microseconds a value, over these steps."
    numbers = curve[begin:end].tolist()

    def add() -> None:
        for step, number in enumerate(numbers, begin):
            for name in NAMES: history.add(name, number, step)
        history.drain()

    return seconds(add) / len(NAMES) / len(numbers) * 1e6


def appended(steps: int, path: Path | None) -> tuple[tuple[common.Cell, ...], History]:
    history, (curve, _), part = History(path), values(steps), max(200, steps // 100)
    costs = [added(history, curve, begin, begin + part) for begin in range(0, steps - part + 1, part)]
    tenth = max(1, len(costs) // 10)
    first, last, size = median(costs[:tenth]), median(costs[-tenth:]), history.nbytes / len(history)
    history.close()
    file = None if path is None else path.stat().st_size / len(history)
    where = "in memory" if path is None else "with a journal"
    return (where, len(history), size, "16", first, last, last / first, file), history


def redrawn(history: History, steps: int, runs: int) -> Table:
    "The plot that a notebook shows, when a value has come."
    table = Table("The live plot", ("", "CPU ms", "to reach"))
    plot = Plot()

    def first() -> None:
        plot.update(history.snapshot())
        plot.pixels()

    def again() -> None:
        for name in NAMES: history.add(name, 1.0, int(history.scalars[name][0][-1]) + 1)
        first()

    table.rows.append(("for the first time", seconds(first) * 1e3, None))
    table.rows.append(("again, one more step", median(seconds(again) for _ in range(runs)) * 1e3, "50"))
    parts = {"the snapshot": history.snapshot, "what is drawn": lambda: plot.update(history.snapshot()), "pixels": plot.pixels}
    table.rows += [(f"of which {name}", median(seconds(part) for _ in range(runs)) * 1e3, None) for name, part in parts.items()]
    _, spikes = values(steps)
    at, drawn = decimate(*history.scalars[NAMES[0]], points=400)
    kept = len({*spikes.tolist()} & {*at[drawn == SPIKE].tolist()})
    stretches = len({int(spike) * 200 // steps for spike in spikes})
    table.notes.append(f"{kept} of {len(spikes)} spikes are among the {len(at)} points of {steps} (a stretch shows its highest: "
                       f"they lie in {stretches} of 200).")
    return table


def measure(tiny: bool = False) -> list[Table]:
    steps = 2000 if tiny else 10**6
    head = ("", "values", "bytes a value", "to reach", "µs a value, first tenth", "last tenth", "ratio", "bytes a value on disk")
    table = Table(f"{steps} steps of {len(NAMES)} series", head)
    with tempfile.TemporaryDirectory() as folder:
        row, history = appended(steps, None)
        table.rows += [row, appended(steps, Path(folder) / "history.jsonl")[0]]
    table.notes.append("Medians of stretches of ten thousand steps; the journal's writing is in them.")
    return [table, redrawn(history, steps, 2 if tiny else 9)]


if __name__ == "__main__":
    common.main("growth", measure, __doc__)
