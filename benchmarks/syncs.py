"""How often a step waits for the device

    python -m benchmarks.syncs

Whatever needs a tensor's value makes the program wait for a GPU: `item`, `float`, `bool`, `tolist`, `cpu`, `numpy`,
`nonzero`. Here networks and data lie on torch's `meta` device, where tensors have shapes and no values; each time a value
is asked for, by Python code or inside torch, it is counted, with the line that asks, and answered with zero. What is read
in batches, when so many numbers have gathered, is one read. (A checkpoint reads everything, and is left out.)
"""
from __future__ import annotations

import os
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import common
from benchmarks.common import Table, Work, present, quiet
from benchmarks.gan import ours as gan
from benchmarks.peers import PEERS, Batches, mlp, plain, regression
from trainkit.learner import Learner
from trainkit.optim import OptimBuilder

ANSWERS: dict[Any, Callable[[Tensor], Any]] = {
    Tensor.item: lambda x: 0.0, Tensor.__float__: lambda x: 0.0, Tensor.__int__: lambda x: 0, Tensor.__index__: lambda x: 0,
    Tensor.__bool__: lambda x: False, Tensor.tolist: lambda x: torch.zeros(x.shape, device="cpu").tolist(),
    Tensor.cpu: lambda x: torch.zeros(x.shape, device="cpu"), Tensor.numpy: lambda x: torch.zeros(x.shape, device="cpu").numpy(),
}  # fmt: skip
INSIDE = {torch.ops.aten._local_scalar_dense: 0.0, torch.ops.aten.equal: True, torch.ops.aten.is_nonzero: False}


def place() -> str:
    "The nearest line that is neither torch's nor this file's."
    frame, here = sys._getframe(1), ("/torch/", "benchmarks/syncs.py")
    while frame.f_back and any(part in frame.f_code.co_filename for part in here): frame = frame.f_back
    return "/".join(Path(frame.f_code.co_filename).parts[-2:]) + f":{frame.f_lineno}"


class InPython(TorchFunctionMode):
    "Counts what Python code reads."

    def __init__(self, places: Counter[str]) -> None:
        self.places = places

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        x = args[0] if args else None
        if isinstance(x, Tensor) and x.is_meta:
            answer = ANSWERS.get(function)
            if function is Tensor.to and "cpu" in map(str, args): answer = ANSWERS[Tensor.cpu]
            if answer is not None:
                self.places[place()] += 1
                return answer(x)
        return function(*args, **(kwargs or {}))


class InTorch(TorchDispatchMode):
    "Counts what torch's own code reads."

    def __init__(self, places: Counter[str]) -> None:
        super().__init__()
        self.places = places

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.overloadpacket in INSIDE and args[0].is_meta:
            self.places[place()] += 1
            return INSIDE[function.overloadpacket]
        return function(*args, **(kwargs or {}))


def counted(work: Work) -> Counter[str]:
    "How often each line has asked for a value."
    places = Counter[str]()
    with quiet(), InPython(places), InTorch(places):
        work()
    return places


def far(make: Callable[..., Any], *args: Any) -> Any:
    "What is made, on the far device."
    with torch.device("meta"): return make(*args)


def ours(data: Batches, **settings: Any) -> Work:
    learn = Learner(far(mlp), data, F.mse_loss, OptimBuilder(torch.optim.SGD, lr=0.01), device="meta", **settings)
    return partial(learn.fit, data.epochs)


def placed(make: Callable[..., Work], *args: Any, **kwargs: Any) -> Work:
    "A learner on a device that learners refuse, as nothing can be trained there."
    with patch("trainkit.learner.pick_device", torch.device): return make(*args, **kwargs)


def measure(tiny: bool = False) -> list[Table]:
    table = Table("Reads of values", ("", "steps", "reads", "a step", "to reach", "by"))
    steps = 20 if tiny else 500
    others = {name: partial(far, PEERS[name]) for name in ("pytorch-ignite", "fastai")}
    with tempfile.TemporaryDirectory() as folder:
        data, pictures = far(regression, steps), Batches([torch.zeros(64, 1, 32, 32, device="meta")] * (steps // 5))
        usable, lacking = present({} if tiny else others, data)
        works = {"the plain loop": (data, partial(far, plain, data)),
                 "trainkit, bare": (data, partial(placed, ours, data, front="none")),
                 "trainkit, history on disk and progress": (
                     data, partial(placed, ours, data, run=f"{folder}/run", save_every="none")),
                 "trainkit, a GAN": (pictures, partial(placed, gan, pictures, 4, device="meta")),
                 **{name: (data, make) for name, make in usable.items()}}
        for name, (batches, make) in works.items():
            n, places = len(batches) * batches.epochs, counted(make())
            total = sum(places.values())
            by = ", ".join(f"{line} ({count})" for line, count in places.most_common(3))
            table.rows.append((name, n, total, total / n, "0" if name.startswith("trainkit") else None, by or "nobody"))
    table.rows += [(name, None, None, None, None, why) for name, why in lacking.items()]
    return [table]


if __name__ == "__main__":
    os.environ.setdefault("TRAINKIT_WHERE", "script")
    common.main("syncs", measure, __doc__)
