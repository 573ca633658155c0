"""What looking on costs: bars, curves, samples and controls, against nothing at all

    python -m benchmarks.view

The DCGAN of `benchmarks.gan` (32 base channels, batches of 64) trains in a real kernel, in turns with the dashboard at its
default rate and with front="none"; nobody draws what is sent. A fit's first tenth, in which the display is made, is left out.
Medians of such pairs, torch with one thread. The last row has no dashboard: beside the training, a process that has nothing to
do with it paints such curves once a second, which shows what cores that share a processor cost each other.
"""
from __future__ import annotations

import json
import os
import tempfile
from functools import reduce
from pathlib import Path
from typing import Any

from benchmarks import common
from benchmarks.common import Table, median

CELL = """
import json, resource, subprocess, sys, time
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

def beside():
    stranger = subprocess.Popen([sys.executable, "-c", PAINTS])
    try: return fit(front="none")
    finally:
        stranger.kill()
        stranger.wait()

fit(front="none")
kinds, found = [fit, lambda: fit(front="none"), beside], []
for i in range(PAIRS):
    one = {k: kinds[k]() for k in (0, 1, 2)[:: 1 if i % 2 else -1]}
    found.append([one[k] for k in (0, 1, 2)])
json.dump(found, open("pairs.json", "w"))
"""


PAINTS = """
import os, time
import numpy as np
from trainkit.ui.paint import Drawing, Face, Frame, Line, Painting
os.nice(10)
x = np.arange(250.0)
frame = Frame("loss", ("a/loss", "b/loss"), ("a", "b"), ("#0072B2", "#D55E00"))
face = Face([Line((x, np.sin(x)), raw=(x, np.cos(x)))] * 2, ["a", "b"], (0, 250), (-1, 1))
painting = Painting()
while True:
    painting.paint(Drawing((6.2, 2.8), (frame, frame), [face, face]))
    painting.pixels()
    time.sleep(1)
"""


def groups_of(channels: int, steps: int, pairs: int) -> list[Any]:
    """With the dashboard, without, and without but beside somebody else who paints: seconds of a step by the clock, of the thread
    that trains, of the process; share of views; seconds of other processes; seconds of the fit."""
    from jupyter_client.manager import start_new_kernel

    root = repr(str(Path(__file__).resolve().parent.parent))
    said = {"ROOT": root, "PAINTS": repr(PAINTS), "CHANNELS": channels, "STEPS": steps, "PAIRS": pairs}
    cell = reduce(lambda text, word: text.replace(word, str(said[word])), said, CELL)
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
    found = groups_of(*((4, 30, 1) if tiny else (32, 250, 4)))
    table = Table("A step with and without the dashboard", ("", "with", "without", "more", "middle half", "to reach"))

    def compare(name: str, to_reach: str, which: int, value: int) -> None:
        mine, alone = ([1e3 * group[k][value] for group in found] for k in (which, 1))
        more = sorted(100 * (a / b - 1) for a, b in zip(mine, alone))
        middle = f"{more[len(more) // 4]:+.1f} – {more[-1 - len(more) // 4]:+.1f} %"
        table.rows.append((name, median(mine), median(alone), f"{median(more):+.1f} %", middle, to_reach))

    compare("time of a step, ms", "2 %", 0, 0)
    compare("CPU of the thread that trains, ms", "–", 0, 1)
    compare("CPU of all threads, ms", "–", 0, 2)
    compare("time of a step beside a process that only paints, ms", "–", 2, 0)
    looking = 100 * median(a[3] for a, *_ in found)
    cpu, wall = median(a[4] - b[4] for a, b, _ in found), median(a[5] for a, *_ in found)
    table.notes.append(f"The process that paints had {cpu:.2f} s of CPU in a fit of {wall:.1f} s, its beginning included; it "
                       "stands back (`nice`) where cores are few.")
    table.notes.append(f"By `learn.timings()`, views and commands had {looking:.1f} % of a fit with the dashboard, its making "
                       f"and the last picture included. {len(found)} pairs.")  # fmt: skip
    return [table]


if __name__ == "__main__":
    common.main("view", measure, __doc__)
