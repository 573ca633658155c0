"""What a run leaves in a notebook, and what it sends there

    python -m benchmarks.bytes

A small GAN on digits trains in a real kernel with everything on that a notebook shows: bars, curves, samples, controls. A
client takes the messages as a front end does, and keeps what would be saved with the notebook: outputs as they were last
updated. Bytes of the messages' content and of their buffers, and when they came.
"""
from __future__ import annotations

import json
import os
import textwrap
import time
from pathlib import Path
from typing import Any

from jupyter_client.manager import start_new_kernel

from benchmarks import common
from benchmarks.common import Table

ROOT = Path(__file__).resolve().parent.parent
SETUP = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import torch
from torch import nn
from trainkit.datasets import mnist_5k
from trainkit.gan.learner import GANLearner
torch.set_num_threads(1)
digits = mnist_5k(size=28)[0]

def gan():
    torch.manual_seed(0)
    g = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 784), nn.Tanh(), nn.Unflatten(1, (1, 28, 28)))
    d = nn.Sequential(nn.Flatten(), nn.Linear(784, 64), nn.LeakyReLU(0.2), nn.Linear(64, 1), nn.Flatten(0))
    return GANLearner(g, d, [*digits[:32 * BATCHES].split(32)], latent=16, seed=1, device="cpu", n_samples=64)
"""


class Page:
    "The outputs of a cell, as a front end saves them, and the bytes that came for it."

    def __init__(self) -> None:
        self.outputs: list[dict[str, Any]] = []
        self.came: list[tuple[float, int]] = []

    def receive(self, message: dict[str, Any]) -> None:
        kind, content = message["msg_type"], message["content"]
        size = len(json.dumps(content, default=str)) + sum(len(memoryview(part)) for part in message.get("buffers", ()))
        self.came.append((time.monotonic(), size))
        if kind == "error": raise RuntimeError("\n".join(content["traceback"]))
        if kind == "clear_output": self.outputs.clear()
        elif kind == "stream" and self.outputs and self.outputs[-1].get("name") == content["name"]:
            self.outputs[-1]["text"] += content["text"]
        elif kind in ("stream", "display_data", "execute_result"): self.outputs.append(dict(content))
        elif kind == "update_display_data":
            for output in self.outputs:
                if output.get("transient", {}).get("display_id") == content["transient"]["display_id"]:
                    output["data"] = content["data"]

    @property
    def saved(self) -> int:
        "Bytes in the file."
        return len(json.dumps([{k: v for k, v in output.items() if k != "transient"} for output in self.outputs], indent=1))

    def fastest(self, seconds: float) -> float:
        "The most bytes a second in a stretch of so many seconds, once the display is there."
        begin = self.came[0][0] + 2
        live = [(at, size) for at, size in self.came if at > begin]
        return max((sum(size for when, size in live if at <= when < at + seconds) / seconds for at, _ in live), default=0.0)


def shown(client: Any, source: str) -> Page:
    page = Page()
    client.execute_interactive(textwrap.dedent(source), allow_stdin=True, output_hook=page.receive, timeout=1200)
    return page


def measure(tiny: bool = False) -> list[Table]:
    head = ("", "left in the file, KB", "to reach", "sent, KB", "messages", "s", "KB a second", "in the busiest 5 s", "to reach")
    table = Table("A cell with a fit", head)
    env = {key: value for key, value in os.environ.items() if not key.startswith("TRAINKIT_")} | {"OMP_NUM_THREADS": "1"}
    manager, client = start_new_kernel(kernel_name="python3", env=env)
    try:
        shown(client, SETUP.replace("BATCHES", "2"))
        fits = {f"{n} epoch{'s' * (n > 1)} of 2 batches": f"fit({n})" for n in ((1, 3) if tiny else (1, 100, 10_000))}
        if not tiny: fits["as many steps as there are in half a minute"] = "fit(steps=10**7)"
        for name, fit in fits.items():
            ending = "import threading; threading.Timer(30, learn.stop).start()\n" if "10**7" in fit else ""
            page = shown(client, f"learn = gan()\n{ending}learn.{fit}")
            sent, took = sum(size for _, size in page.came), page.came[-1][0] - page.came[0][0]
            table.rows.append((name, page.saved / 1e3, "300", sent / 1e3, len(page.came), took, sent / took / 1e3,
                               page.fastest(5) / 1e3 if took > 7 else None, "250"))
    finally:
        manager.shutdown_kernel(now=True)
    table.notes.append("The last columns leave out the first two seconds, in which the display is made.")
    return [table]


if __name__ == "__main__":
    common.main("bytes", measure, __doc__)
