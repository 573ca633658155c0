"""Modes counted, as a script: the table of nbs/tutorials/04_modes.ipynb, one line for each run.

    python examples/modes.py                      # about a minute and a half on one core
    python examples/modes.py --steps 300 --seed 1
"""

import argparse
import time

import torch
from torch import Tensor, nn

from trainkit.device import seed_everything
from trainkit.gan.diversity import count_modes, grid, ring
from trainkit.gan.learner import GANLearner
from trainkit.gan.penalties import R1, R2, ZeroCentered
from trainkit.gan.schemes import WGANGPLearner
from trainkit.optim import OptimBuilder

CENTRES, STD, N = {"ring": ring(), "grid": grid()}, 0.2, 2500
STEPS = {"ring": 600, "grid": 2400}
FAMILIES = {
    "non-saturating + R1": (GANLearner, lambda: {"loss": "nonsaturating", "penalties": [R1(0.2)]}),
    "WGAN-GP": (WGANGPLearner, lambda: {"weight": 1.0, "n_critic": 1}),
    "relativistic + R1 + R2": (GANLearner, lambda: {"loss": "relativistic_pair", "penalties": [R1(0.2), R2(0.2)]}),
    "hinge + zero-centred": (GANLearner, lambda: {"loss": "hinge", "penalties": [ZeroCentered(0.2)]}),
    "minimax (control)": (GANLearner, lambda: {"loss": "minimax"}),
}


class Waves(nn.Module):
    "The input, and random sines and cosines of it."

    def __init__(self, width: int, n: int = 32):
        super().__init__()
        self.register_buffer("frequencies", torch.randn(width, n))

    def forward(self, x: Tensor) -> Tensor:
        phase = x @ self.frequencies
        return torch.cat([x, phase.sin(), phase.cos()], 1)


def mlp(outputs: int, width: int = 64) -> nn.Sequential:
    "A perceptron with three hidden layers, of points in the plane."
    first = [Waves(2), nn.Linear(66, width)]
    hidden = [layer for _ in range(2) for layer in (nn.LeakyReLU(0.2), nn.Linear(width, width))]
    return nn.Sequential(*first, *hidden, nn.LeakyReLU(0.2), nn.Linear(width, outputs))


def points(target: str, n: int) -> Tensor:
    "Samples of the true mixture."
    draw, centres = torch.Generator().manual_seed(0), CENTRES[target]
    return centres[torch.randint(len(centres), (n,), generator=draw)] + STD * torch.randn(n, 2, generator=draw)


def line(family: str, target: str, steps: int, seed: int) -> str:
    "Train one GAN and count its modes."
    seed_everything(seed)
    kind, options = FAMILIES[family]
    players = mlp(2), nn.Sequential(mlp(1), nn.Flatten(0))
    plan = OptimBuilder("adam", lr=3e-3, betas=(0.5, 0.99), schedule="linear")
    gan = kind(*players, [*points(target, 64 * 128).split(128)], opt=plan, latent=2, seed=seed, front="none", **options())
    began, modes = time.perf_counter(), len(CENTRES[target])
    gan.fit(steps=steps)
    found = count_modes(gan.sample(N, seed=1), CENTRES[target], STD, at_least=N // modes // 4)
    solved = "solved" if found.hit == modes and found.high_quality >= 0.6 else ""
    return (f"{target:<7}{family:<24}{found.hit:>3} of {modes:<4}{float(found.high_quality):>12.0%}{found.kl:>8.2f}"
            f"{time.perf_counter() - began:>9.0f}  {solved}")  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, help="for each run; without it, 600 on the ring and 2400 on the grid")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.set_num_threads(1)
    print(f"{'target':<7}{'loss':<24}{'modes hit':>10}{'high quality':>13}{'KL':>8}{'seconds':>9}")
    for target in CENTRES:
        for family in FAMILIES:
            print(line(family, target, args.steps or STEPS[target], args.seed), flush=True)
