"The learners that the faults happen to: small, quick, and with every kind of state."

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from trainkit.callbacks.average import EMA
from trainkit.checkpoint import read_checkpoint
from trainkit.gan.learner import GANLearner
from trainkit.learner import Learner
from trainkit.optim import OptimBuilder

EPOCHS, PER_EPOCH = 3, 6  # of every run here
STEPS = EPOCHS * PER_EPOCH
X = torch.randn(4 * PER_EPOCH, 3, generator=torch.Generator().manual_seed(0))
Y = X.sum(1, keepdim=True)


class Net(nn.Module):
    "Weights, buffers, a random number in each forward, and as much ballast as a file should have."

    def __init__(self, ballast: int = 0):  # numbers of four bytes
        super().__init__()
        self.body, self.norm, self.drop, self.head = nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Linear(8, 1)
        self.register_buffer("ballast", torch.zeros(ballast))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(self.norm(self.body(x))).relu())


class Weighted(nn.Module):
    "A loss with a state of its own."

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor(1.0))

    def forward(self, pred: Tensor, y: Tensor) -> Tensor:
        return self.scale * nn.functional.mse_loss(pred, y)


def supervised(run: Any = None, ballast: int = 0, seed: int = 0, **kw: Any) -> Learner:
    "Shuffled data, validation, a schedule, accumulated gradients, an average of the weights."
    torch.manual_seed(seed)
    dls = DataLoader(TensorDataset(X, Y), batch_size=4, shuffle=True), DataLoader(TensorDataset(X, Y), batch_size=8)
    opt = OptimBuilder("adamw", lr=0.02, schedule="cosine", warmup=2)
    kw = {"accumulate": 2, "cbs": [EMA(0.9)], "front": "none", "keep": 99} | kw
    return Learner(Net(ballast), dls, Weighted(), opt, run=run, seed=seed, **kw)


def adversarial(run: Any = None, ballast: int = 0, seed: int = 0, **kw: Any) -> GANLearner:
    "Two players, one of them moving twice as often as the other."
    torch.manual_seed(seed)
    generator = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    generator.register_buffer("ballast", torch.zeros(ballast))
    discriminator = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.2), nn.Linear(4, 1), nn.Flatten(0))
    dls = DataLoader(TensorDataset(X), batch_size=4, shuffle=True)
    kw = {"n_critic": 2, "front": "none", "keep": 99} | kw
    return GANLearner(generator, discriminator, dls, latent=2, run=run, seed=seed, **kw)


SUBJECTS: dict[str, Callable[..., Learner]] = {"supervised": supervised, "adversarial": adversarial}


def _feed(to: Any, x: Any) -> None:
    if isinstance(x, Tensor):
        to.update(f"tensor {x.dtype} {tuple(x.shape)}".encode())
        to.update(x.detach().reshape(-1).view(torch.uint8).numpy().tobytes() if x.numel() else b"")
    elif isinstance(x, dict):
        to.update(f"dict {len(x)}".encode())
        for key, value in x.items():
            to.update(repr(key).encode())
            _feed(to, value)
    elif isinstance(x, (list, tuple)):
        to.update(f"{type(x).__name__} {len(x)}".encode())
        for item in x:
            _feed(to, item)
    else:
        to.update(f"{type(x).__name__} {x!r}".encode())


def digest(state: dict[str, Any]) -> str:
    "A number for everything in a learner's state that must come back: all of it but the times at which things happened."
    parts = {key: state[key] for key in ("players", "position", "stream", "callbacks", "rng")}
    if not state["stream"]["batch_idx"]:  # an epoch that is yet to begin takes the random state as it is then
        parts["stream"] = {**state["stream"], "source": sorted(state["stream"]["source"])}
    found = hashlib.sha256()
    _feed(found, parts | {"history": state["history"]["columns"]})
    return found.hexdigest()


def saved_digests(learn: Learner) -> dict[int, str]:
    "The digest of every checkpoint of a run, by step."
    return {entry.step: digest(read_checkpoint(entry.path)["state"]) for entry in learn.checkpoints}


def go_on(learn: Learner, background: bool = False) -> None:
    "To the end of the run, from wherever the learner is."
    if learn.step == 0 and learn.epoch == 0 and learn.target.epoch is None:
        learn.fit(epochs=EPOCHS, background=background)
    elif learn.epoch < EPOCHS:
        learn.fit(background=background)
    learn.wait()


@contextmanager
def slow_disk(seconds: float) -> Iterator[None]:
    "Inside, a checkpoint takes so long that the training is ahead of it."
    real = torch.save

    def save(*args: Any, **kw: Any) -> None:
        import time

        time.sleep(seconds)
        real(*args, **kw)

    torch.save = save
    try:
        yield
    finally:
        torch.save = real
