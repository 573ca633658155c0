"""Digits classified, or drawn by a GAN, in several processes: the code of nbs/tutorials/13_scale_out.ipynb as a script.

    python examples/scale_out.py                                           # one process
    torchrun --nproc-per-node 2 examples/scale_out.py --into runs/two       # two ranks: the same, but for rounding
    accelerate launch --multi_gpu --num_processes 2 examples/scale_out.py   # the same
    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-endpoint HOST:29500 --rdzv-backend c10d examples/scale_out.py --full
    torchrun --nproc-per-node 4 examples/scale_out.py --into runs/two --resume   # goes on with another number of ranks

What runs somewhere is steered through its folder: python -m trainkit.control runs/two set lr=1e-3
"""

import argparse

import torch
from torch import nn

from trainkit.datasets import mnist_5k
from trainkit.device import seed_everything
from trainkit.gan.learner import GANLearner
from trainkit.learner import Learner
from trainkit.optim import OptimBuilder

SHORT, FULL = {"epochs": 3, "width": 8, "batch_size": 64}, {"epochs": 30, "width": 64, "batch_size": 512}


def classifier(size: dict[str, int], run: str | None = None, **options) -> Learner:
    "4,000 digits to learn from, 1,000 held out; `batch_size` is that of all ranks together."
    images, labels = mnist_5k()
    seed_everything(0)
    width = size["width"]
    net = nn.Sequential(nn.Conv2d(1, width, 3, 2, 1), nn.ReLU(), nn.Conv2d(width, 2 * width, 3, 2, 1), nn.ReLU(),
                        nn.Flatten(), nn.Linear(49 * 2 * width, 10))  # fmt: skip
    data = (images[:4000], labels[:4000]), (images[4000:], labels[4000:])
    return Learner(net, data, "cross_entropy", OptimBuilder("adamw", lr=3e-3, schedule="cosine"), metrics=["accuracy"], run=run,
                   seed=0, batch_size=size["batch_size"], distributed="ddp", **options)  # fmt: skip


def gan(size: dict[str, int], run: str | None = None, **options) -> GANLearner:
    "Two players: each has its turn, and its gradients travel in its own turn only."
    images, _ = mnist_5k()
    seed_everything(0)
    width = 8 * size["width"]
    g = nn.Sequential(nn.Linear(16, width), nn.ReLU(), nn.Linear(width, 784), nn.Tanh(), nn.Unflatten(1, (1, 28, 28)))
    d = nn.Sequential(nn.Flatten(), nn.Linear(784, width), nn.LeakyReLU(0.2), nn.Linear(width, 1), nn.Flatten(0))
    return GANLearner(g, d, images[:4000], "nonsaturating", OptimBuilder("adam", lr=2e-3, betas=(0.5, 0.9)), latent=16, run=run,
                      seed=0, batch_size=size["batch_size"], distributed="ddp", **options)  # fmt: skip


def said(learn: Learner) -> str:
    "How it stands, in one line."
    names = [name for name in learn.history.names() if name.endswith(("loss", "accuracy"))]
    found = ", ".join(f"{name} {learn.history.last(name):.4f}" for name in names)
    return f"{learn.team.size} ranks, step {learn.step}: {found}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", choices=["classifier", "gan"], default="classifier")
    parser.add_argument("--epochs", type=int, help=f"without it {SHORT['epochs']}, or {FULL['epochs']} with --full")
    parser.add_argument("--full", action="store_true", help="the full-size recipe")
    parser.add_argument("--device", default="auto", help="auto: a GPU for each rank, where there are some")
    parser.add_argument("--into", metavar="FOLDER", help="folder for checkpoints and history; without it nothing is written")
    parser.add_argument("--resume", action="store_true", help="go on from the run's last checkpoint")
    args = parser.parse_args()

    if not torch.cuda.is_available():
        torch.set_num_threads(1)  # one for each rank
    size = FULL if args.full else SHORT
    learn = {"classifier": classifier, "gan": gan}[args.what](size, args.into, device=args.device)
    if args.resume:
        learn.restore("last")
    learn.fit(epochs=args.epochs or size["epochs"], schedule="restart" if args.resume else None)
    if learn.rank == 0:
        print(said(learn))
