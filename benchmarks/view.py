"""What looking on costs: bars, curves, samples and controls, against nothing at all

    python -m benchmarks.view

The DCGAN of `benchmarks.gan` (32 base channels, batches of 64) trains in a real kernel, in turns with the dashboard at its
default rate and with front="none"; nobody draws what is sent. A fit's first tenth, in which the display is made, is left out.
Medians of such pairs, torch with one thread.
"""
from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import common
from benchmarks.common import Table, median

CELL = """
import json, resource, sys, time
sys.path.insert(0, ROOT)
import torch
torch.set_num_threads(1)
from benchmarks.gan import ADAM, BATCH, pair
from trainkit.callback import On
from trainkit.datasets import mnist_5k
from trainkit.gan.learner import GANLearner
from trainkit.optim import OptimBuilder

data = mnist_5k(size=32)[0][: BATCH * 8].split(BATCH)
seen = []
note = On("after_batch", lambda learn: seen.append((time.perf_counter(), time.thread_time(), time.process_time())))

def fit(**front):
    learn = GANLearner(*pair(CHANNELS), data, opt=OptimBuilder("adam", **ADAM), reuse_forward=True, cbs=note, seed=0, **front)
    seen.clear()
    before = [sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2]), time.perf_counter()]
    learn.fit(steps=STEPS)
    elsewhere, wall = sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2]) - before[0], time.perf_counter() - before[1]
    first, last = seen[STEPS // 10], seen[-1]
    timings = learn.timings()
    looking = timings.share("views") + timings.share("commands")
    return [(b - a) / (STEPS - 1 - STEPS // 10) for a, b in zip(first, last)] + [looking, elsewhere, wall]

fit(front="none")
pairs = []
for i in range(PAIRS):
    both = {}
    for front in ({}, {"front": "none"})[:: 1 if i % 2 else -1]: both[len(front)] = fit(**front)
    pairs.append([both[0], both[1]])
json.dump(pairs, open("pairs.json", "w"))
"""


def pairs_of(channels: int, steps: int, pairs: int) -> list[Any]:
    "With the dashboard, and without: seconds of a step by the clock, of the thread that trains, of the process; share of views."
    from jupyter_client.manager import start_new_kernel

    root = repr(str(Path(__file__).resolve().parent.parent))
    cell = CELL.replace("ROOT", root).replace("CHANNELS", str(channels)).replace("STEPS", str(steps)).replace("PAIRS", str(pairs))
    with tempfile.TemporaryDirectory() as folder:
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        manager, client = start_new_kernel(kernel_name="python3", cwd=folder)
        try:
            errors: list[Any] = []
            look = lambda message: errors.append(message["content"]) if message["msg_type"] == "error" else None
            client.execute_interactive(cell, allow_stdin=True, output_hook=look, timeout=3600)
            if errors: raise RuntimeError("\n".join(errors[0]["traceback"]))
            return json.loads((Path(folder) / "pairs.json").read_text())
        finally:
            manager.shutdown_kernel(now=True)


def measure(tiny: bool = False) -> list[Table]:
    found = pairs_of(*((4, 30, 1) if tiny else (32, 250, 4)))
    head = ("", "with", "without", "more", "middle half", "to reach")
    table = Table("A step with and without the dashboard", head)
    for i, (name, goal) in enumerate([("time of a step, ms", "2 %"), ("CPU of the thread that trains, ms", "–"),
                                      ("CPU of all threads, ms", "–")]):  # fmt: skip
        more = [100 * (a[i] / b[i] - 1) for a, b in found]
        spread = sorted(more)[len(more) // 4], sorted(more)[-1 - len(more) // 4]
        table.rows.append((name, median(1e3 * a[i] for a, _ in found), median(1e3 * b[i] for _, b in found),
                           f"{median(more):+.1f} %", f"{spread[0]:+.1f} – {spread[1]:+.1f} %", goal))  # fmt: skip
    looking = 100 * median(a[3] for a, _ in found)
    cpu, wall = median(a[4] - b[4] for a, b in found), median(a[5] for a, _ in found)
    table.notes.append(f"The process that paints had {cpu:.2f} s of CPU in a fit of {wall:.1f} s, its beginning included; it "
                       "stands back (`nice`) where cores are few.")
    table.notes.append(f"By `learn.timings()`, views and commands had {looking:.1f} % of a fit with the dashboard, its making "
                       f"and the last picture included. {len(found)} pairs.")  # fmt: skip
    return [table]


if __name__ == "__main__":
    common.main("view", measure, __doc__)
