"""What exact resuming costs an epoch of data

    python -m benchmarks.loaders

One epoch of batches of 64, drawn from torch's DataLoader and from the same loader inside trainkit's stream, which knows
where it stands and gives every sample random numbers of its own. CPU time of this process, and with that of the workers;
each pair one right beside the other; medians of the ratios.
"""
from __future__ import annotations

import random
import resource
import time
from collections.abc import Callable
from functools import partial
from timeit import timeit

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset

from benchmarks import common
from benchmarks.common import Table, Work, median, spread, versus
from trainkit.datasets import mnist_5k
from trainkit.seeds import SeededStream, seed_sample

BATCH = 64


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


class Read(Dataset):
    "Pictures that are read and normalised: nothing random."

    def __init__(self, n: int) -> None:
        self.x = torch.randint(256, (n, 3, 64, 64), dtype=torch.uint8)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> torch.Tensor:
        x = self.x[i].float().div(255).sub(0.5)
        return torch.nn.functional.interpolate(x[None], (48, 48), mode="bilinear", antialias=True)[0]


def sets(n: int) -> dict[str, Dataset]:
    digits, labels = mnist_5k()
    return {"digits, as they are": TensorDataset(digits[:n], labels[:n]), "pictures, read and scaled": Read(n),
            "pictures, cropped, flipped and noisy": Pictures(n)}  # fmt: skip


def plain(loader: DataLoader) -> Work:
    def epoch() -> None:
        for _ in loader: pass

    return epoch


def ours(loader: DataLoader) -> Work:
    stream = SeededStream(loader)

    def epoch() -> None:
        while stream.next_batch() is not None: pass
        stream.close()

    return epoch


def both(work: Callable[[], object]) -> tuple[float, float, float]:
    "CPU seconds of this process, with those of workers that ended, and seconds by the clock."
    begin, before, clock = time.process_time(), children(), time.perf_counter()
    work()
    own = time.process_time() - begin
    return own, own + children() - before, time.perf_counter() - clock


def children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def measure(tiny: bool = False) -> list[Table]:
    head = ("data", "num_workers", "this process", "with the workers", "middle half", "by the clock", "to reach", "ms an epoch")
    table = Table("Time of an epoch over torch's DataLoader", head)
    for name, data in sets(128 if tiny else 3200).items():
        for workers in (0,) if tiny else (0, 2):
            loader: DataLoader = DataLoader(data, BATCH, shuffle=True, num_workers=workers)
            pairs = versus(partial(plain, loader), {"": partial(ours, loader)}, 1 if tiny else 9, both)[""]
            ratios = [[ours[i] / theirs[i] for theirs, ours in pairs] for i in range(3)]
            epoch = median(theirs[1] for theirs, _ in pairs) * 1e3
            table.rows.append((name, workers, median(ratios[0]), median(ratios[1]), spread(ratios[1]), median(ratios[2]), "1.03",
                               epoch))
    table.notes.append("The last column is torch's, with the workers.")
    return [table, floor(10 if tiny else 20_000)]


def floor(n: int) -> Table:
    "What the generators themselves take to begin anew."
    table = Table("Giving one sample random numbers of its own", ("generator", "µs"))
    seeds: dict[str, Callable[[], object]] = {
        "torch's": partial(torch.default_generator.manual_seed, 2**63 + 5), "NumPy's": partial(np.random.seed, 2**31 + 5),
        "Python's": partial(random.seed, 2**63 + 5),
        "all three, as a sample gets them": partial(seed_sample, 2**63 + 5)}  # fmt: skip
    table.rows += [(name, median(timeit(seed, number=n) / n * 1e6 for _ in range(5))) for name, seed in seeds.items()]
    table.notes.append("So that a sample is the same in any batch, in any worker, and after a restore. A dataset with "
                       "`__getitems__`, and tensors, are seeded once a batch.")
    return table


if __name__ == "__main__":
    common.main("loaders", measure, __doc__)
