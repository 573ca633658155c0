"""How often the GAN doctor is right about runs that did not calibrate it: other data, networks and seeds.

    python -m benchmarks.doctor                      writes benchmarks/results/doctor.md
    python -m benchmarks.doctor --seeds 202 203      other seeds
    python -m benchmarks.doctor --print --only moons shows some runs only
    python -m benchmarks.doctor --keep found.jsonl   goes on where it was interrupted

Whether a run is healthy is not the doctor's word: `off` is the energy distance between a thousand fakes and a thousand
samples that nobody trained on, as a share of twice the mean distance between them: 0 for the same distribution, 1 for two
points apart. A healthy run should end near 0 and raise no alarm, a failing one should raise one of those named.
"""
from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
import argparse
import json
import platform
import statistics
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trainkit.callbacks.average import EMA
from trainkit.datasets import mnist_5k
from trainkit.device import seed_everything
from trainkit.gan.doctor import Doctor
from trainkit.gan.learner import GANLearner
from trainkit.gan.losses import RelativisticPair
from trainkit.gan.penalties import R1, R2, GradientPenalty
from trainkit.optim import OptimBuilder

RESULTS = Path(__file__).resolve().parent / "results" / "doctor.md"
SEEDS = (200, 201)
FAR = 0.1  # `off` beyond which a run isn't healthy


# --- data -------------------------------------------------------------------------------------------------------------


def moons(n: int, seed: int) -> Tensor:
    "Two half circles that reach into each other."
    draw = torch.Generator().manual_seed(seed)
    upper, angle = torch.rand(n, generator=draw) < 0.5, torch.pi * torch.rand(n, generator=draw)
    x = torch.where(upper, angle.cos(), 1 - angle.cos())
    y = torch.where(upper, angle.sin(), 0.5 - angle.sin())
    return torch.stack([x, y], 1) + 0.08 * torch.randn(n, 2, generator=draw)


def five(n: int, seed: int) -> Tensor:
    "Five Gaussians on a circle of radius 5."
    draw = torch.Generator().manual_seed(seed)
    angle = 2 * torch.pi * torch.randint(5, (n,), generator=draw) / 5
    return 5 * torch.stack([angle.cos(), angle.sin()], 1) + 0.4 * torch.randn(n, 2, generator=draw)


@cache
def every_digit() -> Tensor:
    "The packaged digits at 8 x 8 pixels, in [-1, 1], in an order of their own."
    images = nn.functional.avg_pool2d(mnist_5k(size=32)[0], 4)
    return images[torch.randperm(len(images), generator=torch.Generator().manual_seed(0))]


def digits(n: int, seed: int) -> Tensor:
    "Digits to train on; under seed -1 those that nobody trains on."
    return every_digit()[4000 : 4000 + n] if seed < 0 else every_digit()[:4000][seed % 4 * 8 :][:n]


# --- networks: none of those that the doctor was calibrated with --------------------------------------------------------


def perceptrons(shape: tuple[int, ...], latent: int) -> tuple[nn.Module, nn.Module]:
    "SiLU in the generator, ELU in the discriminator, two hidden layers of 96."
    size = torch.Size(shape).numel()
    g = [nn.Linear(latent, 96), nn.SiLU(), nn.Linear(96, 96), nn.SiLU(), nn.Linear(96, size), nn.Unflatten(1, shape)]
    d = [nn.Flatten(), nn.Linear(size, 96), nn.ELU(), nn.Linear(96, 96), nn.ELU(), nn.Linear(96, 1), nn.Flatten(0)]
    return nn.Sequential(*g, *[nn.Tanh()] * (size > 2)), nn.Sequential(*d)


def convolutions(shape: tuple[int, ...], latent: int) -> tuple[nn.Module, nn.Module]:
    "Three layers each; group norm in the generator, none in the discriminator."
    g = [nn.Linear(latent, 32 * 4), nn.Unflatten(1, (32, 2, 2)), nn.GroupNorm(4, 32), nn.ReLU(), nn.Upsample(scale_factor=2),
         nn.Conv2d(32, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.ReLU(), nn.Upsample(scale_factor=2),
         nn.Conv2d(16, 1, 3, padding=1), nn.Tanh()]  # fmt: skip
    d = [nn.Conv2d(1, 16, 4, 2, 1), nn.LeakyReLU(0.2), nn.Conv2d(16, 32, 4, 2, 1), nn.LeakyReLU(0.2), nn.Flatten(),
         nn.Linear(32 * 4, 1), nn.Flatten(0)]  # fmt: skip
    return nn.Sequential(*g), nn.Sequential(*d)


class Heart(nn.Module):
    "Returns samples that it was given, moved by next to nothing."

    def __init__(self, samples: Tensor):
        super().__init__()
        self.register_buffer("samples", samples)
        self.offset = nn.Parameter(1e-3 * torch.randn(samples.shape[1:]))

    def forward(self, z: Tensor) -> Tensor:
        return self.samples[(1e4 * z[:, 0]).long() % len(self.samples)] + self.offset  # type: ignore[index]


def by_heart(shape: tuple[int, ...], latent: int) -> tuple[nn.Module, nn.Module]:
    "A generator that knows the moons to train on, whatever the seed: they are those of seed 0."
    return Heart(moons(500, 0)), perceptrons(shape, latent)[1]


def adam(lr: float, betas: tuple[float, float] = (0.5, 0.9)) -> OptimBuilder:
    return OptimBuilder("adam", lr=lr, betas=betas)


def unequal(generator: float, discriminator: float) -> dict[str, OptimBuilder]:
    return {"generator": adam(generator), "discriminator": adam(discriminator)}


def whisper(n: int, device: torch.device) -> Tensor:
    "Noise that hardly differs: whatever is made of it is nearly the same."
    return 1e-3 * torch.randn(n, 8, device=device)


# --- runs ---------------------------------------------------------------------------------------------------------------


@dataclass
class Run:
    "A way to train, and the alarms of which one should be raised; none for a healthy one."

    title: str
    data: Callable[[int, int], Tensor]
    options: Callable[[], dict[str, Any]]
    expected: tuple[str, ...] = ()
    nets: Callable[[tuple[int, ...], int], tuple[nn.Module, nn.Module]] = perceptrons
    n: int = 2048  # samples to train on
    decay: float = 0.99  # of the averaged weights
    steps: int = 1600
    copies: bool = True  # the doctor is given the samples, too


LEFT = ("saturation", "vanishing gradient", "starved generator")  # a generator that is left behind, one way or other
LOST = ("mode collapse", "oscillation")
ANY = (*LEFT, *LOST)


def fair(loss: Any, *penalties: Any, **kw: Any) -> Callable[[], dict[str, Any]]:
    "Options of a healthy run: both players with 1e-3."
    return lambda: {"loss": loss, "penalties": [*penalties], "opt": adam(1e-3), **kw}


def sick(**kw: Any) -> Callable[[], dict[str, Any]]:
    return lambda: {"loss": "nonsaturating", "opt": adam(1e-3), **kw}


HEALTHY = [
    Run("moons, non-saturating + R1", moons, fair("nonsaturating", R1(0.1))),
    Run("moons, hinge + R1", moons, fair("hinge", R1(0.1))),
    Run("moons, WGAN-GP", moons, fair("wasserstein", GradientPenalty(1.0), n_critic=2), steps=2400),
    Run("five Gaussians, least squares + R1", five, fair("lsgan", R1(0.1))),
    Run("five Gaussians, relativistic pairs + R1 + R2", five, fair(RelativisticPair(), R1(0.1), R2(0.1))),
    Run("digits, perceptrons, non-saturating + R1", digits, fair("nonsaturating", R1(1.0))),
    Run("digits, convolutions, non-saturating + R1", digits, fair("nonsaturating", R1(1.0)), nets=convolutions),
    Run("digits, convolutions, hinge + R1, reused fakes", digits, fair("hinge", R1(1.0), reuse_forward=True), nets=convolutions),
    Run("digits, convolutions, WGAN-GP", digits, fair("wasserstein", GradientPenalty(10.0), n_critic=2), nets=convolutions,
        steps=2400),
]  # fmt: skip
FAILING = [
    Run("moons, D 500 times as fast", moons, sick(opt=unequal(1e-5, 5e-3)), LEFT, steps=600),
    Run("digits, D 500 times as fast", digits, sick(opt=unequal(1e-5, 5e-3)), LEFT, steps=600),
    Run("digits, convolutions, D 500 times as fast", digits, sick(opt=unequal(1e-5, 5e-3)), LEFT, convolutions, steps=600),
    Run("five Gaussians, minimax, D 50 times as fast", five, sick(loss="minimax", opt=unequal(1e-4, 5e-3)), LEFT, steps=600),
    Run("five Gaussians, G in each fiftieth batch", five, sick(n_critic=50), LEFT, steps=600),
    Run("digits, convolutions, G in each hundredth batch", digits, sick(n_critic=100), LEFT, convolutions, steps=600),
    Run("moons, learning rate 0.1", moons, sick(opt=adam(0.1)), ANY),
    Run("digits, learning rate 0.1", digits, sick(opt=adam(0.1)), ANY),
    Run("digits, convolutions, learning rate 0.1", digits, sick(opt=adam(0.1)), ANY, convolutions),
    Run("five Gaussians, D in each fifth batch", five, sick(opt=adam(2e-3), n_gen=5), LOST),
    Run("digits, D in each tenth batch", digits, sick(opt=adam(2e-3), n_gen=10), LOST),
    Run("moons, noise that hardly differs", moons, sick(latent=whisper, penalties=[R1(0.1)]), LOST),
    Run("digits, noise that hardly differs", digits, sick(latent=whisper, penalties=[R1(1.0)]), LOST, convolutions),
    Run("moons, a generator that has 500 samples by heart", moons, sick(opt=adam(1e-5)), ("memorisation",), by_heart, n=500),
    Run("digits, 16 samples to train on", digits, sick(opt=adam(2e-3), penalties=[R1(0.05)]), ("memorisation",), n=16,
        steps=2400),
    Run("five Gaussians, an average of 20 000 steps", five, fair("lsgan", R1(0.1)), ("lagging average",), decay=0.99995),
]  # fmt: skip


@dataclass
class Outcome:
    "What became of the runs of one kind."

    run: Run
    off: list[float] = field(default_factory=list)
    raised: list[list[str]] = field(default_factory=list)  # alarms of each run, each once
    first: list[int] = field(default_factory=list)  # step of the first alarm, of the wanted ones where some are

    @property
    def right(self) -> int:
        "Runs about which the doctor was right: one of the wanted alarms, or none where none is wanted."
        return sum(bool({*names} & {*self.run.expected}) if self.run.expected else not names for names in self.raised)


def off_by(fakes: Tensor, real: Tensor) -> float:
    "Energy distance over twice the mean distance between the two: 0 for equal distributions, at most 1."
    def apart(a: Tensor, b: Tensor) -> float:
        return torch.cdist(a.flatten(1), b.flatten(1)).mean().item()

    if not fakes.isfinite().all(): return float("nan")
    between = apart(fakes, real)
    return (2 * between - apart(fakes, fakes) - apart(real, real)) / (2 * between)


def train(run: Run, seed: int) -> tuple[GANLearner, Doctor, Tensor]:
    "One run with a doctor that looks each 50 steps, and samples that nobody trained on."
    samples, unseen = run.data(run.n, 0 if run.nets is by_heart else seed), run.data(1000, -1)
    doctor = Doctor(every=50, warn=False, **({"train": samples, "heldout": unseen} if run.copies else {}))
    seed_everything(seed)
    batches = samples[torch.randint(len(samples), (64, 64))]  # 64 batches of 64
    options = {"latent": 8, **run.options()}
    learn = GANLearner(*run.nets(tuple(samples.shape[1:]), 8), [*batches], seed=seed, front="none",
                       cbs=[doctor, EMA(run.decay)], save_every="none", **options)  # fmt: skip
    learn.fit(steps=run.steps)
    return learn, doctor, unseen


def outcome(run: Run, seeds: tuple[int, ...]) -> Outcome:
    found = Outcome(run)
    for seed in seeds:
        learn, doctor, unseen = train(run, seed)
        found.off.append(off_by(learn.sample(1000, seed=1), unseen))
        found.raised.append(sorted({alarm.name for alarm in doctor.alarms}))
        wanted = [a.step for a in doctor.alarms if a.name in run.expected or not run.expected]
        found.first += wanted[:1]
    return found


def kept(run: Run, seeds: tuple[int, ...], path: Path | None) -> Outcome:
    "An outcome from a file, or else made, and appended to it."
    key = [run.title, *seeds]
    for line in path.read_text().splitlines() if path is not None and path.exists() else ():
        said = json.loads(line)
        if said["key"] == key: return Outcome(run, said["off"], said["raised"], said["first"])
    found = outcome(run, seeds)
    if path is not None:
        with path.open("a") as file:
            file.write(json.dumps({"key": key, "off": found.off, "raised": found.raised, "first": found.first}) + "\n")
    return found


def row(o: Outcome) -> str:
    names = sorted({name for names in o.raised for name in names})
    alarms = ", ".join(f"{name} ({sum(name in names for names in o.raised)})" for name in names) or "none"
    first = f"{statistics.median(o.first):.0f}" if o.first else ""
    return f"| {o.run.title} | {statistics.median(o.off):.2f} | {o.right} of {len(o.raised)} | {first} | {alarms} |"


def table(title: str, outcomes: list[Outcome], right: str) -> list[str]:
    head = f"| {title} | off, median | {right} | first alarm at step | alarms (in how many runs) |"
    return [head, "|---|---|---|---|---|", *map(row, outcomes), ""]


def report(healthy: list[Outcome], failing: list[Outcome], seeds: tuple[int, ...]) -> str:
    quiet, runs = sum(o.right for o in healthy), sum(len(o.raised) for o in healthy)
    hits, sick = sum(o.right for o in failing), sum(len(o.raised) for o in failing)
    silent = sum(off > FAR and not names for o in healthy for off, names in zip(o.off, o.raised))
    nothing = sum(off <= FAR and not names for o in failing for off, names in zip(o.off, o.raised))
    return "\n".join([
        f"torch {torch.__version__}, Python {platform.python_version()}, one thread; seed{'s' * (len(seeds) > 1)} "
        f"{', '.join(map(str, seeds))}",
        "",
        f"**False alarms: in {runs - quiet} of {runs} healthy runs. Found: {hits} of {sick} failing runs.** "
        "`off` says how far the fakes are from samples that nobody trained on: 0 is no difference, 1 two points. Of the runs "
        f"meant to be healthy, {silent} ended with more than {FAR} and no alarm: the doctor has missed something; of those meant "
        f"to fail, {nothing} ended with less and no alarm: there was nothing to be found at the end.",
        "",
        *table("healthy", healthy, "quiet"),
        *table("failing", failing, "found by one of the right alarms"),
    ])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--only", default="", help="part of the titles of the runs to be made")
    parser.add_argument("--keep", type=Path, help="a file for what was found, to go on with later")
    parser.add_argument("--print", action="store_true", help="don't write the file")
    args = parser.parse_args()

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    seeds = tuple(args.seeds)
    done: list[list[Outcome]] = [[], []]
    for kind, runs in zip(done, (HEALTHY, FAILING)):
        for run in runs:
            if args.only in run.title:
                kind.append(kept(run, seeds, args.keep))
                print(row(kind[-1]), flush=True)
    text = report(*done, seeds)
    print(text)
    if not args.print:
        RESULTS.parent.mkdir(exist_ok=True)
        head = "# The GAN doctor on runs that it doesn't know\n\nWritten by `python -m benchmarks.doctor`."
        RESULTS.write_text(f"{head}\n\n{text}")
