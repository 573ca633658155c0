"""Digits from one hand to another, as a script: CycleGAN as in nbs/tutorials/08_cyclegan.ipynb, with the same figures.

    python examples/cyclegan.py                     # about a minute on one core
    python examples/cyclegan.py --cycle 0           # what becomes of it without the cycle loss
    python examples/cyclegan.py --full --run runs/cyclegan-full   # the paper's sizes, for a GPU; keeps checkpoints
"""

import argparse
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from trainkit.datasets import mnist_5k, uci_digits
from trainkit.device import seed_everything
from trainkit.gan.distances import features_of, fid
from trainkit.gan.judge import train_judge
from trainkit.gan.metrics import class_probabilities
from trainkit.gan.translation import CycleGANGenerator, PatchGANDiscriminator
from trainkit.gan.unpaired import CycleGANLearner, Unpaired
from trainkit.optim import OptimBuilder
from trainkit.ui.samples import sample_grid

SHORT = {"steps": 400, "batch": 8, "width": 8, "blocks": 3, "lr": 1e-3, "judged": (6, 12)}
FULL = {"steps": 800_000, "batch": 1, "width": 64, "blocks": 6, "lr": 2e-4, "judged": (20, 40)}
Kinds = dict[str, tuple[Tensor, Tensor]]


def kinds() -> tuple[Kinds, Kinds]:
    "Images and labels of both kinds: to train on, and held out."
    both, cut = {"a": mnist_5k(), "b": uci_digits(28)}, {"a": 4000, "b": 1400}
    seen = {key: (x[: cut[key]], y[: cut[key]]) for key, (x, y) in both.items()}
    return seen, {key: (x[cut[key] :], y[cut[key] :]) for key, (x, y) in both.items()}


def judges_of(seen: Kinds, epochs: tuple[int, int]) -> dict[str, nn.Module]:
    "Who reads digits of either kind, and who tells the kinds apart."
    judges = {key: train_judge(*seen[key], epochs=n) for key, n in zip("ab", epochs)}
    few = torch.cat([seen["a"][0][:1400], seen["b"][0]])
    return judges | {"kind": train_judge(few, torch.arange(2).repeat_interleave(1400), epochs=3)}


def make(seen: Kinds, size: dict, seed: int = 0, cycle: float = 5.0, **options) -> CycleGANLearner:
    "Four networks, seeded, and their learner, who sees no labels."
    seed_everything(seed)
    norm, width = nn.InstanceNorm2d, size["width"]
    there, back = (CycleGANGenerator(1, 1, width, size["blocks"]) for _ in "ab")
    judge_a, judge_b = (PatchGANDiscriminator(1, channels=2 * width, patch=16, norm=norm) for _ in "ab")
    plan = OptimBuilder("adam", lr=size["lr"], betas=(0.5, 0.999), schedule="linear")
    return CycleGANLearner(there, back, judge_a, judge_b, Unpaired(seen["a"][0], seen["b"][0]), opt=plan, cycle=cycle,
                           batch_size=size["batch"], seed=seed, **options)  # fmt: skip


def verdict(judges: dict[str, nn.Module], to: str, images: Tensor, labels: Tensor, real: Tensor) -> list[float]:
    "Of images as kind `to`: how many are read as what they were, how many are taken for the kind, and how far they are from it."
    read = class_probabilities(judges[to], images).argmax(1) == labels
    taken = class_probabilities(judges["kind"], images).argmax(1) == "ab".index(to)
    features = [features_of(judges[to].features, x) for x in (real, images)]
    return [read.float().mean().item(), taken.float().mean().item(), float(fid(*features))]


def line(judges: dict[str, nn.Module], unseen: Kinds, translate) -> str:
    "Both directions on held-out digits, and the cycle, in one line."
    said, apart = [], []
    for key, to in "ab", "ba":
        x, y = unseen[key]
        there = translate(x, to)
        read, taken, far = verdict(judges, to, there, y, unseen[to][0])
        said.append(f"{key} as {to}: {read:.1%} read as before, {taken:.1%} taken for {to}, FID {far:.2f}")
        apart.append((translate(there, key) - x).abs().mean().item())
    return "; ".join(said) + f"; there and back: {sum(apart) / 2:.3f} apart"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="the full-size recipe")
    parser.add_argument("--steps", type=int, help=f"without it {SHORT['steps']}, or {FULL['steps']} with --full")
    parser.add_argument("--judged", type=int, nargs=2, metavar="EPOCHS", help="how long the two readers are trained")
    parser.add_argument("--cycle", type=float, default=5.0, help="weight of the cycle loss; 0: without it, and the identity loss")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--run", help="folder for checkpoints, history and curves; without it nothing is written")
    parser.add_argument("--picture", metavar="PATH", help="write what becomes of eight digits of each kind to this .png file")
    args = parser.parse_args()

    torch.set_num_threads(1)
    size = {**(FULL if args.full else SHORT), **{k: v for k in ("steps", "judged") if (v := getattr(args, k))}}
    seen, unseen = kinds()
    judges = judges_of(seen, size["judged"])
    print("as they are:", line(judges, unseen, lambda x, to: x))
    examples = tuple(unseen[key][0][:8] for key in "ab")
    learn = make(seen, size, args.seed, args.cycle, examples=examples, run=args.run)
    learn.fit(steps=size["steps"])
    print("translated: ", line(judges, unseen, learn.translate))
    if args.picture:
        Image.fromarray(sample_grid(learn.sample_fixed())).save(Path(args.picture))
