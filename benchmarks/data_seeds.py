"""What seeds for samples cost: CPU time of a batch, with and without, and of coming to stand in the middle of an epoch.

    OMP_NUM_THREADS=1 python benchmarks/data_seeds.py

CPU time of this process (and, where it says so, of the workers, user and system), one thread; the least of several runs.
"""
from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
import resource
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset

from trainkit.data import BatchStream
from trainkit.randomness import RandomState
from trainkit.seeds import SeededStream, seed_sample

N, BATCH = 6400, 64


class Noise(Dataset):
    "About the cheapest random transform there is: a few numbers and as many random ones."

    def __init__(self) -> None:
        self.x = torch.randn(N, 16)

    def __len__(self) -> int:
        return N

    def __getitem__(self, i: int) -> torch.Tensor:
        return self.x[i] + torch.randn(16)


class Pictures(Dataset):
    "Crop, flip and noise on a small picture, in torch."

    def __init__(self) -> None:
        self.x = torch.randn(N, 3, 40, 40)

    def __len__(self) -> int:
        return N

    def __getitem__(self, i: int) -> torch.Tensor:
        top, left, flip = torch.randint(9, (3,)).tolist()
        x = self.x[i, :, top:top + 32, left:left + 32]
        return (x.flip(-1) if flip > 4 else x) + 0.1 * torch.randn(3, 32, 32)


def children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def cpu(work: Callable[[], Any], runs: int = 7) -> tuple[float, float]:
    "Least CPU time in seconds: of this process, and of it and the children that ended in it."
    own, all_ = [], []
    for _ in range(runs):
        start, before = time.process_time(), children()
        work()
        own.append(time.process_time() - start)
        all_.append(own[-1] + children() - before)
    return min(own), min(all_)


def epoch(cls: type[BatchStream], loader: DataLoader) -> None:
    stream = cls(loader)
    for _ in stream:
        pass
    stream.close()


def batches() -> None:
    print(f"\nCPU time of a batch of {BATCH}, in microseconds (bare -> seeded)")
    rows = [("arrays", TensorDataset(torch.randn(N, 16)), 0), ("noise", Noise(), 0), ("pictures", Pictures(), 0),
            ("noise", Noise(), 2), ("pictures", Pictures(), 2)]  # fmt: skip
    for name, data, workers in rows:
        loader = DataLoader(data, BATCH, shuffle=True, num_workers=workers)
        (bare, bare_all), (ours, ours_all) = (cpu(partial(epoch, cls, loader)) for cls in (BatchStream, SeededStream))
        us = 1e6 * BATCH / N
        print(f"  {name:9} {workers} workers  this process {bare * us:6.0f} -> {ours * us:6.0f}"
              + f"   with workers {bare_all * us:6.0f} -> {ours_all * us:6.0f}" * bool(workers))


def again(stream: BatchStream) -> None:
    stream.close()
    stream.fast_forward()


def places() -> None:
    print("\nCPU time to stand at batch 90 of 100 again, in milliseconds (bare -> seeded)")
    for name, data in ("noise", Noise()), ("pictures", Pictures()):
        found = []
        for cls in BatchStream, SeededStream:
            stream = cls(DataLoader(data, BATCH, shuffle=True))
            for _ in range(90):
                stream.next_batch()
            found.append(cpu(partial(again, stream))[0] * 1e3)
        print(f"  {name:9} {found[0]:7.2f} -> {found[1]:5.2f}")


def parts() -> None:
    print("\nParts, in microseconds")
    state = RandomState(3)

    def wear() -> None:
        with state.wear():
            pass
    seeding = ("seeding for one sample", partial(seed_sample, 2**63), 20_000)
    for name, work, n in seeding, ("one fit's own random state", wear, 500):
        print(f"  {name:28} {cpu(partial(repeated, work, n))[0] / n * 1e6:7.1f}")


def repeated(work: Callable[[], Any], n: int) -> None:
    for _ in range(n):
        work()


if __name__ == "__main__":
    batches()
    places()
    parts()
