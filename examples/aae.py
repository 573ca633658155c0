"""Digits as points under a bell, as a script: the autoencoders of nbs/tutorials/09a_aae.ipynb, with the same figures.

    python examples/aae.py                     # less than a minute on one core
    python examples/aae.py --code 8 --seed 1
    python examples/aae.py --full --run runs/aae-full   # the paper's networks; keeps checkpoints
"""

import argparse

import torch
from torch import Tensor, nn

from trainkit.datasets import mnist_5k
from trainkit.device import seed_everything
from trainkit.gan.aae import AAELearner
from trainkit.gan.autoencoding import AAEDecoder, AAEEncoder, LatentDiscriminator
from trainkit.gan.distances import features_of, fid, frechet_distance, moments_of
from trainkit.gan.judge import train_judge
from trainkit.learner import Learner
from trainkit.optim import OptimBuilder

SHORT = {"epochs": 25, "hidden": (256, 256), "lr": 3e-3, "std": 0.1}
FULL = {"epochs": 1000, "hidden": (1000, 1000), "lr": 2e-4, "std": 0.01}
SHAPE = (1, 28, 28)


def networks(code: int, size: dict, seed: int) -> tuple[nn.Module, nn.Module, nn.Module]:
    "Encoder, decoder, and who tells codes from draws."
    seed_everything(seed)
    made = {"hidden": size["hidden"], "std": size["std"]}
    return AAEEncoder(SHAPE, code, **made), AAEDecoder(SHAPE, code, **made), LatentDiscriminator(code, **made)


def plan(size: dict) -> OptimBuilder:
    "Adam, whose rate falls to zero with the last step."
    return OptimBuilder("adam", lr=size["lr"], betas=(0.5, 0.999), schedule="linear")


def make(images: Tensor, size: dict, code: int = 2, seed: int = 0, **options) -> AAELearner:
    "An adversarial autoencoder; without a discriminator, see `plain`."
    encoder, decoder, judge = networks(code, size, seed)
    return AAELearner(encoder, decoder, judge, images, opt=plan(size), batch_size=100, seed=seed, **options)


def plain(images: Tensor, size: dict, code: int = 2, seed: int = 0, **options) -> Learner:
    "The same autoencoder from the same weights, whose codes may lie where they like."
    encoder, decoder, _ = networks(code, size, seed)
    return Learner(nn.Sequential(encoder, decoder), (images, images), "mse", plan(size), batch_size=100, seed=seed, **options)


@torch.no_grad()
def told_apart(codes: Tensor, draws: Tensor) -> float:
    "How often the nearest other point is of one's own kind: 0.5 for two sets from one distribution, 1 for sets apart."
    both = torch.cat([codes, draws])
    apart = torch.cdist(both, both).fill_diagonal_(torch.inf)
    kind = torch.arange(len(both)) < len(codes)
    return (kind[apart.argmin(1)] == kind).float().mean().item()


@torch.no_grad()
def row(encoder: nn.Module, decoder: nn.Module, judge: nn.Module, real: Tensor) -> dict[str, float]:
    "How well digits come back, how well codes match N(0, 1), and what decoded draws are like."
    encoder.eval(), decoder.eval()
    codes = encoder(real)
    draws = torch.randn(len(real), codes.shape[1], generator=torch.Generator().manual_seed(0))
    m = moments_of(codes)
    far = frechet_distance(torch.zeros(len(m.mean)), torch.eye(len(m.mean)), m.mean, m.cov)
    judged = [features_of(judge.features, x) for x in (real, decoder(draws))]
    return {"error": (decoder(codes) - real).square().mean().item(), "Fréchet": far, "told apart": told_apart(codes, draws),
            "FID": float(fid(*judged))}  # fmt: skip


def said(rows: dict[str, dict[str, float]]) -> str:
    "The rows, one line each."
    return "\n".join(f"{name:<12}" + ", ".join(f"{key} {value:.3f}" for key, value in row.items()) for name, row in rows.items())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="the full-size recipe")
    parser.add_argument("--epochs", type=int, help=f"without it {SHORT['epochs']}, or {FULL['epochs']} with --full")
    parser.add_argument("--code", type=int, default=2, help="how many numbers a digit becomes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--run", help="folder for the adversarial one's checkpoints and history; without it nothing is written")
    args = parser.parse_args()

    torch.set_num_threads(1)
    size = {**(FULL if args.full else SHORT), **({"epochs": args.epochs} if args.epochs else {})}
    images, labels = mnist_5k()
    judge = train_judge(images[:4000], labels[:4000])
    auto = plain(images[:4000], size, args.code, args.seed, front="none", save_every="none")
    auto.fit(size["epochs"])
    aae = make(images[:4000], size, args.code, args.seed, run=args.run)
    aae.fit(size["epochs"])
    nets = {"plain": [*auto.model], "adversarial": [aae.encoder, aae.decoder]}
    print(said({name: row(*net, judge, images[4000:]) for name, net in nets.items()}))
