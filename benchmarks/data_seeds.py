"""What seeds for samples cost

    python -m benchmarks.data_seeds

CPU time of a batch, with and without seeds, and of coming to stand in the middle of an epoch. CPU time of this process (and,
where it says so, of the workers, user and system), one thread; the least of several runs.
"""
from __future__ import annotations

import resource
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset

from benchmarks import common
from benchmarks.common import Table
from trainkit.data import BatchStream
from trainkit.randomness import RandomState
from trainkit.seeds import SeededStream, seed_sample

BATCH, PER_EPOCH = 64, 100


class Noise(Dataset):
    "About the cheapest random transform there is: a few numbers and as many random ones."

    def __init__(self, n: int) -> None:
        self.x = torch.randn(n, 16)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> torch.Tensor:
        return self.x[i] + torch.randn(16)


class Pictures(Dataset):
    "Crop, flip and noise on a small picture, in torch."

    def __init__(self, n: int) -> None:
        self.x = torch.randn(n, 3, 40, 40)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> torch.Tensor:
        top, left, flip = torch.randint(9, (3,)).tolist()
        x = self.x[i, :, top:top + 32, left:left + 32]
        return (x.flip(-1) if flip > 4 else x) + 0.1 * torch.randn(3, 32, 32)


def children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def cpu(work: Callable[[], Any], runs: int) -> tuple[float, float]:
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


def batches(n: int, runs: int) -> Table:
    head = "samples", "workers", "bare", "seeded", "bare, with workers", "seeded, with workers"
    table, noise, pictures = Table(f"A batch of {BATCH}, µs", head), Noise(BATCH * n), Pictures(BATCH * n)
    arrays = TensorDataset(torch.randn(BATCH * n, 16))
    for name, data, workers in (("arrays", arrays, 0), ("noise", noise, 0), ("pictures", pictures, 0), ("noise", noise, 2),
                                ("pictures", pictures, 2)):  # fmt: skip
        loader = DataLoader(data, BATCH, shuffle=True, num_workers=workers)
        bare, ours = ([1e6 * t / n for t in cpu(partial(epoch, cls, loader), runs)] for cls in (BatchStream, SeededStream))
        table.rows.append((name, workers, bare[0], ours[0], *((bare[1], ours[1]) if workers else (None, None))))
    return table


def again(stream: BatchStream) -> None:
    stream.close()
    stream.fast_forward()


def places(n: int, runs: int) -> Table:
    at = 9 * n // 10
    table = Table(f"To stand at batch {at} of {n} again, ms", ("samples", "bare", "seeded"))
    for name, data in ("noise", Noise(BATCH * n)), ("pictures", Pictures(BATCH * n)):
        found = []
        for cls in BatchStream, SeededStream:
            stream = cls(DataLoader(data, BATCH, shuffle=True))
            for _ in range(at):
                stream.next_batch()
            found.append(cpu(partial(again, stream), runs)[0] * 1e3)
        table.rows.append((name, *found))
    return table


def details(n: int, runs: int) -> Table:
    state, table = RandomState(3), Table("In it, µs", ("what", "each"))

    def wear() -> None:
        with state.wear():
            pass

    seeding = partial(seed_sample, 2**63)
    for name, work, times in ("seeding for one sample", seeding, 200 * n), ("a fit's random state", wear, 5 * n):
        table.rows.append((name, cpu(partial(repeated, work, times), runs)[0] / times * 1e6))
    return table


def repeated(work: Callable[[], Any], n: int) -> None:
    for _ in range(n):
        work()


def measure(tiny: bool = False) -> list[Table]:
    n, runs = (10, 1) if tiny else (PER_EPOCH, 7)
    return [batches(n, runs), places(n, runs), details(n, runs)]


if __name__ == "__main__":
    common.main("data_seeds", measure, __doc__)
