"""A step of a GAN, against the tightest loop by hand

    python -m benchmarks.gan

DCGAN on digits of 32×32, 32 base channels, batches of 64, Adam for both. The tight loop is in fp32 and torch's usual memory
format: one forward of the generator serves both turns, the discriminator is frozen in the generator's, Adam is fused. CPU
time of all threads of a step (data included, which is prepared), each measured right beside the tight loop, in turn;
medians of the ratios of such pairs.
"""
from __future__ import annotations

import os
import sys
import tempfile
import types
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks import common
from benchmarks.common import Maker, Table, Work, median, present, spread, version, versus
from benchmarks.peers import Batches
from trainkit.datasets import mnist_5k
from trainkit.gan.learner import GANLearner
from trainkit.gan.models import DCGANDiscriminator, DCGANGenerator
from trainkit.optim import OptimBuilder

ADAM = {"lr": 2e-4, "betas": (0.5, 0.999)}
BATCH, LATENT = 64, 100


def pair(channels: int) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    return DCGANGenerator(LATENT, 32, 1, channels), DCGANDiscriminator(32, 1, channels)


def tight(data: Batches, channels: int, channels_last: bool = False, bf16: bool = False) -> Work:
    "By hand, nothing superfluous."
    g, d = pair(channels)
    if channels_last: g, d = g.to(memory_format=torch.channels_last), d.to(memory_format=torch.channels_last)
    opt_g, opt_d = (torch.optim.Adam(net.parameters(), fused=True, **ADAM) for net in (g, d))
    weights, cast = list(d.parameters()), partial(torch.autocast, "cpu", torch.bfloat16, enabled=bf16)

    def step(real: torch.Tensor) -> None:
        if channels_last: real = real.contiguous(memory_format=torch.channels_last)
        with cast():
            fake = g(torch.randn(len(real), LATENT))
            loss = F.softplus(-d(real)).mean() + F.softplus(d(fake.detach())).mean()
        loss.backward()
        opt_d.step()
        opt_d.zero_grad()
        for p in weights: p.requires_grad_(False)
        with cast():
            loss = F.softplus(-d(fake)).mean()
        loss.backward()
        opt_g.step()
        opt_g.zero_grad()
        for p in weights: p.requires_grad_(True)

    return lambda: [step(real) for _ in range(data.epochs) for real in data]


def tutorial(data: Batches, channels: int) -> Work:
    "As PyTorch's DCGAN tutorial has it: a backward for real and one for fake, nothing frozen, every number read in every step."
    g, d = pair(channels)
    criterion, ones, zeros = nn.BCEWithLogitsLoss(), torch.ones(BATCH), torch.zeros(BATCH)
    opt_g, opt_d = (torch.optim.Adam(net.parameters(), **ADAM) for net in (g, d))

    def step(real: torch.Tensor) -> None:
        d.zero_grad()
        output = d(real).view(-1)
        real_loss = criterion(output, ones)
        real_loss.backward()
        output.mean().item()
        fake = g(torch.randn(BATCH, LATENT))
        output = d(fake.detach()).view(-1)
        fake_loss = criterion(output, zeros)
        fake_loss.backward()
        output.mean().item(), (real_loss + fake_loss).item()
        opt_d.step()
        g.zero_grad()
        output = d(fake).view(-1)
        loss = criterion(output, ones)
        loss.backward()
        output.mean().item(), loss.item()
        opt_g.step()

    return lambda: [step(real) for _ in range(data.epochs) for real in data]


def ours(data: Batches, channels: int, **settings: Any) -> Work:
    learn = GANLearner(*pair(channels), data, opt=OptimBuilder("adam", **ADAM), reuse_forward=True, front="none", **settings)
    return partial(learn.fit, data.epochs)


def torchgan(data: Batches, channels: int) -> Work:
    "Its trainer with the same networks; nothing is saved or drawn at the end of an epoch."
    if version("torchvision") is None:
        vision = types.ModuleType("torchvision")
        vision.utils = types.SimpleNamespace(save_image=lambda *_: None, make_grid=lambda x, **_: x)  # type: ignore[attr-defined]
        sys.modules.setdefault("torchvision", vision)
    os.environ.update(CONSOLE_LOGGING="0", TENSORBOARD_LOGGING="0")
    from torchgan import losses, models, trainer

    class G(models.Generator):
        def __init__(self) -> None:
            super().__init__(LATENT, "none")
            self.net = pair(channels)[0]

        def forward(self, z: torch.Tensor) -> torch.Tensor:
            return self.net(z)

    class D(models.Discriminator):
        def __init__(self) -> None:
            super().__init__(1, "none")
            self.net = pair(channels)[1]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.net(x)

    how = {"optimizer": {"name": torch.optim.Adam, "args": ADAM}}
    nets = {"generator": {"name": G, **how}, "discriminator": {"name": D, **how}}
    folder = tempfile.mkdtemp()
    made = trainer.Trainer(nets, [losses.MinimaxGeneratorLoss(nonsaturating=True), losses.MinimaxDiscriminatorLoss()],
                           device=torch.device("cpu"), epochs=data.epochs, sample_size=BATCH, checkpoints=f"{folder}/gan",
                           recon=folder, log_dir=folder)
    made.batch_size = BATCH
    made.save_model = made.logger.run_end_epoch = lambda *_: None
    return partial(made.train, data)


def measure(tiny: bool = False) -> list[Table]:
    channels, runs = (4, 1) if tiny else (32, 5)
    data = Batches(mnist_5k(size=32)[0][: BATCH * (1 if tiny else 4)].split(BATCH), epochs=3)
    ways: dict[str, Callable[..., Work]] = {
        "the tight loop again": tight, "the tight loop, channels-last": partial(tight, channels_last=True),
        "the tight loop, channels-last, bf16": partial(tight, channels_last=True, bf16=True), "PyTorch's tutorial": tutorial,
        "trainkit, fp32": ours, "trainkit, bf16": partial(ours, precision="bf16")}  # fmt: skip
    usable, lacking = present({"torchgan": torchgan}, data, channels)
    others: dict[str, Maker] = {name: partial(way, data, channels) for name, way in ways.items()}
    found = versus(partial(tight, data, channels), {**others, **usable}, runs, data.parts)
    table = Table(f"{channels} base channels", ("", "ratio to the tight loop", "middle half", "to reach", "ms a step"))
    for name, pairs in found.items():
        ratios = [other[0] / base[0] for base, other in pairs]
        goal = {"trainkit, fp32": "0.90", "trainkit, bf16": "0.55"}.get(name)
        table.rows.append((name, median(ratios), spread(ratios), goal, median(other[0] for _, other in pairs) * 1e3))
    table.rows += [(name, None, why, None, None) for name, why in lacking.items()]
    table.notes.append(f"torchgan {version('torchgan') or common.ABSENT}. {runs} pairs each.")
    return [table]


if __name__ == "__main__":
    common.main("gan", measure, __doc__)
