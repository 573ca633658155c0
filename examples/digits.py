"""Digits classified, as a script: the network of nbs/tutorials/06_digits.ipynb, with the same figures at the end.

    python examples/digits.py                                # some seconds on one core
    python examples/digits.py --mixup 0.2 --seed 1
    python examples/digits.py --full --run runs/digits-full  # a larger network, for longer; keeps checkpoints
"""

import argparse

import torch
from torch import nn

from trainkit.callbacks.batches import LabelSmoothing, MixUp
from trainkit.datasets import mnist_5k
from trainkit.device import seed_everything
from trainkit.interpret import most_confused, predictions, top_losses
from trainkit.learner import Learner
from trainkit.optim import OptimBuilder

SHORT, FULL = {"epochs": 4, "width": 8}, {"epochs": 30, "width": 32}


def block(channels: int, out: int) -> nn.Sequential:
    "Half the size, other channels."
    return nn.Sequential(nn.Conv2d(channels, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU(), nn.MaxPool2d(2))


def network(width: int) -> nn.Sequential:
    "Images 1 x 28 x 28 to the scores of ten classes."
    blocks = block(1, width), block(width, 2 * width), block(2 * width, 4 * width)
    return nn.Sequential(*blocks, nn.Flatten(), nn.Linear(9 * 4 * width, 10))


def make(width: int, seed: int, lr: float, mixup: float, smoothing: float, run: str | None = None) -> Learner:
    "A classifier and its data, seeded: 4,000 digits to learn from, 1,000 held out."
    images, labels = mnist_5k()
    seed_everything(seed)
    cbs = [*([MixUp(mixup)] if mixup else []), *([LabelSmoothing(smoothing)] if smoothing else [])]
    data = (images[:4000], labels[:4000]), (images[4000:], labels[4000:])
    plan = OptimBuilder("adamw", lr=lr, schedule="one_cycle")
    return Learner(network(width), data, "cross_entropy", plan, metrics=["accuracy"], cbs=cbs, seed=seed, run=run)


def said(learn: Learner) -> str:
    "How good it is, in one line."
    accuracy, loss = learn.history.last("valid/accuracy"), learn.history.last("valid/loss")
    return f"held-out digits: {1 - accuracy:.1%} wrong, loss {loss:.4f}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, help=f"without it {SHORT['epochs']}, or {FULL['epochs']} with --full")
    parser.add_argument("--width", type=int, help=f"channels of the first block; {SHORT['width']}, or {FULL['width']}")
    parser.add_argument("--full", action="store_true", help="the full-size recipe")
    parser.add_argument("--lr", type=float, default=0.01, help="the highest of the one-cycle schedule")
    parser.add_argument("--mixup", type=float, default=0.0, help="alpha of the Beta distribution; 0 doesn't mix")
    parser.add_argument("--smoothing", type=float, default=0.0, help="of the labels: 0 <= amount < 1")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--run", help="folder for checkpoints, history and curves; without it nothing is written")
    parser.add_argument("--export", metavar="PATH", help="write the weights to this .safetensors file")
    args = parser.parse_args()

    torch.set_num_threads(1)
    size = FULL if args.full else SHORT
    learn = make(args.width or size["width"], args.seed, args.lr, args.mixup, args.smoothing, args.run)
    learn.fit(epochs=args.epochs or size["epochs"])
    print(said(learn))
    seen = predictions(learn)
    print("most confused:", *(f"{c.true} for {c.predicted} ({c.count})" for c in most_confused(seen, 3)))
    print("highest losses: digits", *(4000 + sample.index for sample in top_losses(seen, 5)))
    if args.export:
        print("weights:", learn.export_weights(args.export))
