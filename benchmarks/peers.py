"""Epochs over prepared batches by each peer, with as little switched on as it allows; nothing is imported before its turn."""
from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset

from benchmarks.common import seconds

LR = 0.01


class Batches(list):
    "Prepared batches that note the CPU time at which each epoch begins."

    def __init__(self, items: Iterable[Any], epochs: int = 4) -> None:
        super().__init__(items)
        self.epochs, self.begun = epochs, list[float]()

    def __iter__(self) -> Iterator[Any]:
        self.begun.append(time.process_time())
        return super().__iter__()

    def parts(self, work: Callable[[], Any]) -> tuple[float, float]:
        "CPU seconds of a step once the first epoch is over, and of what a fit has only once."
        self.begun.clear()
        total = seconds(work)
        epoch = (self.begun[-1] - self.begun[1 - self.epochs]) / (self.epochs - 2)
        return epoch / len(self), total - self.epochs * epoch


def regression(n: int, epochs: int = 4) -> Batches:
    torch.manual_seed(1)
    return Batches([(torch.randn(32, 16), torch.randn(32, 1)) for _ in range(n)], epochs)


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 1))


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=LR)


def plain(data: Batches, optimizer: Callable[[nn.Module], Any] = sgd,
          save: Callable[[nn.Module, Any], None] = lambda model, opt: None) -> Callable[[], None]:
    "The loop as people write it; `save` is called after every epoch."
    model = mlp()
    opt = optimizer(model)

    def run() -> None:
        for _ in range(data.epochs):
            for x, y in data:
                opt.zero_grad()
                loss = F.mse_loss(model(x), y)
                loss.backward()
                opt.step()
            save(model, opt)

    return run


def ignite(data: Batches) -> Callable[[], Any]:
    from ignite.engine import create_supervised_trainer

    model = mlp()
    trainer = create_supervised_trainer(model, sgd(model), F.mse_loss)
    return lambda: trainer.run(data, max_epochs=data.epochs)


def poutyne(data: Batches) -> Callable[[], Any]:
    import poutyne

    model = mlp()
    trainer = poutyne.Model(model, sgd(model), F.mse_loss)
    return lambda: trainer.fit_generator(data, epochs=data.epochs, verbose=False)


def skorch(data: Batches) -> Callable[[], Any]:
    from skorch import NeuralNet

    class Prepared(NeuralNet):
        def get_iterator(self, dataset: Any, training: bool = False) -> Iterable:
            return data

    net = Prepared(mlp(), nn.MSELoss, optimizer=torch.optim.SGD, lr=LR, max_epochs=data.epochs, train_split=None,
                   callbacks="disable")
    net.initialize()
    return lambda: net.partial_fit(data[0][0].numpy(), data[0][1].numpy())


def accelerate(data: Batches) -> Callable[[], Any]:
    from accelerate import Accelerator

    class Streamed(IterableDataset):
        def __iter__(self) -> Iterator:
            return iter(data)

    accelerator, bare = Accelerator(cpu=True), mlp()
    model, opt, batches = accelerator.prepare(bare, sgd(bare), DataLoader(Streamed(), batch_size=None))

    def run() -> None:
        for _ in range(data.epochs):
            for x, y in batches:
                opt.zero_grad()
                loss = F.mse_loss(model(x), y)
                accelerator.backward(loss)
                opt.step()

    return run


def lightning(data: Batches) -> Callable[[], Any]:
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = mlp()

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.mse_loss(self.model(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return sgd(self)

    trainer = lightning.Trainer(max_epochs=data.epochs, accelerator="cpu", devices=1, barebones=True)
    return lambda: trainer.fit(Module(), data)


def fastai(data: Batches) -> Callable[[], Any]:
    import fastai.callback.progress  # noqa: F401  # gives a learner no_bar
    from fastai.basics import SGD, DataLoaders, Learner

    class Prepared:
        "A list with the attributes of fastai's loaders."
        dataset, n_inp, device, bs = data, 1, torch.device("cpu"), 32

        def __iter__(self) -> Iterator:
            return iter(data)

        def __len__(self) -> int:
            return len(data)

        def to(self, *_: Any) -> Prepared:
            return self

    learn = Learner(DataLoaders(Prepared(), []), mlp(), loss_func=F.mse_loss, opt_func=SGD, lr=LR)

    def run() -> None:
        with learn.no_bar(), learn.no_logging():
            learn.fit(data.epochs)

    return run


PEERS = {"pytorch-ignite": ignite, "poutyne": poutyne, "skorch": skorch, "accelerate": accelerate, "lightning": lightning,
         "fastai": fastai}  # package -> maker
