"""Towards thousands of devices

    python -m benchmarks.scale            measures and computes
    python -m benchmarks.scale --again    computes, and takes what was measured before

What a step and a checkpoint cost as ranks are added. First measured, with processes on this machine's cores: what the
exchange of a step, a council, and a message of each size take over gloo. Then computed, for devices that nobody has here:
a model of the communication, whose assumptions stand above its tables and whose formulas are the functions of this file. The
model says what to expect and where it ends; it is no measurement.
"""
from __future__ import annotations

import json
import math
import os
import socket
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from benchmarks import common
from benchmarks.common import Table

ROOT = Path(__file__).resolve().parent.parent
RANK = """
import json, sys, time, torch
from torch import nn
from trainkit.distributed import Distributed
from trainkit.learner import Learner
torch.set_num_threads(1)
width, steps, out = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
torch.manual_seed(0)
net = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1))
x = torch.randn(64 * 16, 64)
learn = Learner(net, (x, x[:, :1]), "mse", "sgd", seed=0, device="cpu", front="none", distributed=Distributed(listen_every=0.25))
learn.fit(1)
began = time.perf_counter()
learn.fit(steps=steps)
took, team = time.perf_counter() - began, learn.team
spent = learn.timings()
sizes = {}
for n in (1, 1000, 100_000, 1_000_000):
    t = torch.zeros(n)
    for _ in range(3): team.sum([t])
    start = time.perf_counter()
    for _ in range(20): team.sum([t])
    sizes[4 * n] = (time.perf_counter() - start) / 20 * 1e6
start = time.perf_counter()
for _ in range(20): team.gather(("", {"step": 1, "epoch": 1, "updates": {"model": 1}}, [], 1))
council = (time.perf_counter() - start) / 20 * 1e6
found = {"step": took / steps * 1e3, "sizes": sizes, "council": council, "parameters": sum(p.numel() for p in net.parameters()),
         "exchange": spent.seconds.get("other ranks", 0.0) / steps * 1e3}
if team.rank == 0: open(out, "w").write(json.dumps(found))
"""


def launched(ranks: int, width: int, steps: int) -> dict:
    "What rank 0 found, of a small perceptron in so many processes."
    with tempfile.TemporaryDirectory() as folder, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        Path(folder, "rank.py").write_text(RANK)
        start = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--master-port", str(port)] if ranks > 1 else []
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TRAINKIT_WHERE": "script"}
        subprocess.run([sys.executable, *start, f"{folder}/rank.py", str(width), str(steps), f"{folder}/out.json"], check=True,
                       env=env, capture_output=True)  # fmt: skip
        return json.loads(Path(folder, "out.json").read_text())


def measured(tiny: bool) -> list[Table]:
    counts, width, steps = ((1, 2), 32, 20) if tiny else ((1, 2, 4), 512, 400)
    found = {n: launched(n, width, steps) for n in counts}
    table = Table("Measured: a step on this machine", ("ranks", "ms a step", "of it, in the exchange", "µs a council"))
    for n, each in found.items():
        table.rows.append((n, each["step"], each["exchange"] if n > 1 else None, each["council"] if n > 1 else None))
    table.notes.append(f"A perceptron of {found[1]['parameters']:,} parameters, joint batch 64, one thread each; ranks beyond "
                       f"the {os.cpu_count()} cores share them. A council gathers one message; there are about four a second.")
    sizes = Table("Measured: the sum of one message", ("bytes", *(f"µs, {n} ranks" for n in counts if n > 1)))
    several = [each for n, each in found.items() if n > 1]
    for size in several[0]["sizes"]:
        sizes.rows.append((int(size), *(each["sizes"][size] for each in several)))
    return [table, sizes]


# ---------------------------------------------------------------------------------------------------------- the model


@dataclass(frozen=True)
class Cluster:
    "What the model assumes of the devices and of what joins them."

    flops: float = 400e12  # of a device, as trainings reach them (bf16)
    node: int = 8  # devices in a machine
    inside: float = 300e9  # bytes a second between devices of a machine, each way
    between: float = 50e9  # bytes a second from each device to other machines
    start: float = 5e-6  # seconds that a hop inside of a machine takes, whatever it carries
    hop: float = 15e-6  # and one between machines
    disk: float = 2e9  # bytes a second that one writer gets
    shelf: float = 200e9  # bytes a second that all writers get together
    pickled: float = 1e9  # bytes a second that are made ready to be handed out
    copy: float = 20e9  # bytes a second from a device to its host
    life: float = 50_000 * 3600  # seconds a device runs until it fails


def all_reduce(size: float, ranks: int, c: Cluster) -> float:
    "Seconds to sum `size` bytes: a ring in each machine, a tree of machines over each device's share."
    inner = min(ranks, c.node)
    nodes = math.ceil(ranks / c.node)
    ring = 2 * (inner - 1) / inner * size / c.inside + 2 * (inner - 1) * c.start
    tree = 2 * (nodes - 1) / nodes * (size / inner) / c.between + 2 * math.ceil(math.log2(nodes)) * c.hop if nodes > 1 else 0.0
    return ring + tree


def step(parameters: float, samples: float, tokens: float, ranks: int, c: Cluster, overlap: float = 0.0) -> tuple[float, float]:
    "Seconds of computing and of waiting in a step; `overlap`: the share of the backward behind which the exchange can hide."
    compute = 6 * parameters * tokens * max(samples / ranks, 1.0) / c.flops  # a sample can't be shared out
    return compute, max(0.0, all_reduce(4 * parameters, ranks, c) - overlap * compute * 2 / 3)


def sharded_step(parameters: float, samples: float, tokens: float, ranks: int, c: Cluster) -> tuple[float, float]:
    "Seconds of computing and of waiting: parameters are gathered (twice, bf16) and gradients scattered (float32) behind it."
    compute = 6 * parameters * tokens * max(samples / ranks, 1.0) / c.flops
    exchange = all_reduce(2 * parameters, ranks, c) + all_reduce(4 * parameters, ranks, c) / 2  # each is half of an all-reduce
    return compute, max(0.0, exchange - compute)


def gathered(size: float, ranks: int, c: Cluster) -> float:
    "Seconds until every device has been given `size` bytes that lie in parts: one after the other, each over its own link."
    return (ranks - 1) / ranks * size / (c.inside if ranks <= c.node else c.between)


def checkpoint(parameters: float, ranks: int, c: Cluster, mode: str, file: str) -> tuple[float, float, float]:
    "Seconds that a save holds the training up, that the writing takes behind it, and that a restore takes."
    size = 12 * parameters  # weights and Adam's two averages in float32
    if file == "one":
        held = size / c.copy + (gathered(size, ranks, c) if mode == "fsdp" else 0.0)
        return held, size / c.disk, size / c.disk + size / c.pickled + size / c.between
    speed = min(ranks * c.disk, c.shelf)
    return size / ranks / c.copy, size / speed, size / speed


def lost(save: float, restart: float, ranks: int, c: Cluster) -> tuple[float, float]:
    "The best time between two saves (Young 1974), and the share of the time that saves and failures then cost."
    between_failures = c.life / ranks
    every = math.sqrt(2 * save * between_failures)
    return every, save / every + (every / 2 + restart) / between_failures


COUNTS = (1, 8, 64, 512, 1024, 4096)
SAVES = ("ddp", "one"), ("fsdp", "one"), ("fsdp", "shards")
MODELS = {"100 M": (100e6, 4096, 256), "1 B": (1e9, 4096, 1024), "7 B": (7e9, 4096, 2048)}


def modelled() -> list[Table]:
    c = Cluster()
    said = (f"Assumed: {c.flops / 1e12:.0f} TFLOP/s a device, machines of {c.node}; {c.inside / 1e9:.0f} GB/s inside of one, "
            f"{c.between / 1e9:.0f} GB/s a device between them; {c.start * 1e6:.0f} and {c.hop * 1e6:.0f} µs a hop. Compute is 6 "
            "FLOP a parameter and token; the exchange sums float32 gradients.")  # fmt: skip
    steps = Table("Computed: the same joint batch on more devices", ("model", "devices", "ms computing", "ms exchange behind it",
                                                                     "efficiency", "with perfect overlap"))  # fmt: skip
    for name, (parameters, samples, tokens) in MODELS.items():
        alone = sum(step(parameters, samples, tokens, 1, c))
        for n in COUNTS:
            (work, wait), (_, hidden) = (step(parameters, samples, tokens, n, c, share) for share in (0.0, 1.0))
            steps.rows.append((name, n, work * 1e3, wait * 1e3 if n > 1 else None, f"{alone / n / (work + wait):.0%}",
                               f"{alone / n / (work + hidden):.0%}"))  # fmt: skip
    batches = ", ".join(f"{name}: {samples} of {tokens} tokens" for name, (_, samples, tokens) in MODELS.items())
    steps.notes += [said, f"Samples in a joint batch: {batches}. Efficiency: what one device alone would have needed, of the "
                    "devices' time. trainkit exchanges when the backward is over (fifth column); the last column is what hiding "
                    "the exchange behind it, as far as it goes, would give.",
                    "Weights, gradients and Adam's averages take 16 bytes a parameter on every device, and the gradients laid "
                    "end to end for the exchange 4 more (7 B: 140 GB, more than most have); with distributed='fsdp' all "
                    "devices share them."]  # fmt: skip
    parts = Table("Computed: sharded parameters", ("model", "devices", "GB a device, ddp", "GB a device, fsdp", "ms computing",
                                                   "ms waiting", "efficiency"))  # fmt: skip
    for name, (parameters, samples, tokens) in MODELS.items():
        for n in COUNTS[1:]:
            work, wait = sharded_step(parameters, samples, tokens, n, c)
            alone = sum(step(parameters, samples, tokens, 1, c))
            parts.rows.append((name, n, 20 * parameters / 1e9, 16 * parameters / n / 1e9, work * 1e3, wait * 1e3,
                               f"{alone / n / (work + wait):.0%}"))  # fmt: skip
    parts.notes.append("Without the block that is gathered at a time and without activations. The exchange hides behind forward "
                       "and backward as far as it goes, as torch's fully_shard is made for with several blocks on GPUs; the "
                       "four or five small sums of a turn are left out. Where turns gather gradients (accumulate), those wait "
                       "whole: 4 bytes a parameter more on every device.")
    saves = Table("Computed: checkpoints", ("model", "devices", "mode", "file", "s held up", "s writing", "s to restore",
                                            "min between saves", "time lost"))  # fmt: skip
    for name, (parameters, _, _) in MODELS.items():
        for n in (8, 512, 4096):
            for mode, file in SAVES:
                held, writing, back = checkpoint(parameters, n, c, mode, file)
                every, share = lost(max(held, 1e-3), back + 120, n, c)
                every = max(every, writing)  # one is written before the next begins
                saves.rows.append((name, n, mode, file, held, writing, back, every / 60, f"{share:.1%}"))
    saves.notes += [f"12 bytes a parameter (weights, Adam). One writer: {c.disk / 1e9:.0f} GB/s; all together at most "
                    f"{c.shelf / 1e9:.0f} GB/s; a copy to the host {c.copy / 1e9:.0f} GB/s, and the writing goes on behind the "
                    "training. Before one file of sharded parameters is copied, every device is given all of it, tensor by "
                    f"tensor: at {c.between / 1e9:.0f} GB/s, inside of a machine {c.inside / 1e9:.0f}. What rank 0 has read is "
                    f"pickled at {c.pickled / 1e9:.0f} GB/s and handed out.",
                    f"A device fails once in {c.life / 3600:,.0f} hours; a restart takes two minutes and a restore. One file, "
                    "from rank 0, is the usual way; shards are Distributed('fsdp', checkpoint='sharded')."]  # fmt: skip
    return [steps, parts, saves]


PARTS: dict[str, common.Part] = {"ranks": measured}


if __name__ == "__main__":
    common.main_in_parts("scale", PARTS, __doc__, modelled())
