"A script that trains in a process of its own, to be steered from the tests."

import subprocess
import sys
import time
from pathlib import Path

from trainkit.mailbox import read_status, silence

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = """
import sys, time, torch
from torch import nn
from trainkit.callback import Callback
from trainkit.learner import Learner

class Slow(Callback):
    "Slow enough that the history of a minute fits on a page."
    def after_batch(self, learn): time.sleep(0.002)

torch.manual_seed(0)
x = torch.randn(64, 4)
data = x, x.sum(1, keepdim=True)
learn = Learner(nn.Linear(4, 1), (data, data), "mse", run=sys.argv[1], cbs=[Slow()], batch_size=8, save_every="none",
                front="none")
if len(sys.argv) > 2: learn.restore(sys.argv[2])
learn.fit(steps=10**6)
print(learn.state, learn.step, learn.players[0].opt.param_groups[0]["lr"])
"""


def until(true, seconds=30):
    "Wait for something that is bound to happen."
    end = time.monotonic() + seconds
    while not (found := true()):
        assert time.monotonic() < end, "it has not happened"
        time.sleep(0.01)
    return found


def train(run, *which):
    "Start it, at a checkpoint perhaps, and return when it trains and listens."
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, str(run), *which], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    until(lambda: process.poll() is not None or (not silence(status := read_status(run)) and status.get("step", 0) > 0))
    assert process.poll() is None, "it ended before it was steered"
    return process


def end(process):
    "Whatever happened, it is gone."
    process.kill()
    return process.communicate()[0]
