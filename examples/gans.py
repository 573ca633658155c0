"""GANs of digits, as a script: those of nbs/tutorials/07_gans.ipynb, with the same figures at the end.

    python examples/gans.py --gan cgan                                # half a minute on one core
    python examples/gans.py --gan acgan --digits 2026 --draw 2026.png
    python examples/gans.py --gan bgan --seed 1 --movie bgan.gif      # a loss of one's own
    python examples/gans.py --gan dcgan --full --run runs/dcgan-full  # wider networks, for much longer: for a GPU
"""

import argparse
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from trainkit.datasets import mnist_5k
from trainkit.device import seed_everything
from trainkit.gan.codes import AuxiliaryClassifier
from trainkit.gan.heads import ACGANDiscriminator, ACGANGenerator
from trainkit.gan.judge import digits_judge
from trainkit.gan.learner import GANLearner
from trainkit.gan.losses import Minimax
from trainkit.gan.metrics import class_probabilities, classifier_score
from trainkit.gan.models import DCGANDiscriminator, DCGANGenerator
from trainkit.optim import OptimBuilder
from trainkit.ui.movie import movie
from trainkit.ui.samples import Samples, sample_grid

NAMES = {"dcgan": "DCGAN", "cgan": "cGAN", "acgan": "ACGAN", "bgan": "BGAN"}
SHORT = {"width": 16, "fakes": 1000, "dcgan": 600, "cgan": 400, "acgan": 300, "bgan": 600}
FULL = {"width": 64, "fakes": 5000, "dcgan": 30_000, "cgan": 30_000, "acgan": 30_000, "bgan": 30_000}


class BoundarySeeking(Minimax):
    "Fakes belong where the discriminator is in two minds; Hjelm et al. 2017."

    def generator(self, fake_logits: Tensor, real_logits: Tensor | None = None) -> Tensor:
        return 0.5 * fake_logits.square().mean()


def make(kind: str, width: int, seed: int, **more: Any) -> GANLearner:
    "One of the GANs and its data, seeded: 4,000 digits to learn from."
    images, labels = mnist_5k(size=32)
    digits = {"train": (images[:4000], labels[:4000])}
    adam = OptimBuilder("adam", lr=0.002, betas=(0.5, 0.999), schedule="linear")
    seed_everything(seed)
    more |= {"opt": adam, "seed": seed, "labels": "dataset" if kind in ("cgan", "acgan") else "none"}
    if kind == "acgan":
        aux = AuxiliaryClassifier()
        return GANLearner(
            ACGANGenerator(10, out_channels=1, channels=width),
            ACGANDiscriminator(10, in_channels=1, channels=width, outputs=True),
            digits,
            generator_terms={"class": aux.generator},
            discriminator_terms={"class": aux.discriminator},
            discriminator_labels=False,
            **more,
        )
    classes = 10 if kind == "cgan" else 0
    g = DCGANGenerator(out_channels=1, channels=width, num_classes=classes)
    d = DCGANDiscriminator(in_channels=1, channels=width, num_classes=classes)
    return GANLearner(g, d, digits, BoundarySeeking() if kind == "bgan" else "nonsaturating", **more)


def said(gan: GANLearner, fakes: int) -> str:
    "What the judge says, in one line."
    wanted = torch.arange(fakes) % 10
    pictures = gan.sample(fakes, labels=None if gan.labels == "none" else wanted, seed=1)
    probs = class_probabilities(digits_judge(), pictures)
    read = probs.argmax(1)
    digits = int((read.bincount(minlength=10) >= fakes / 50).sum())
    asked = 100 * (read == wanted).float().mean().item()
    return f"classifier score {float(classifier_score(probs)):.2f}, digits {digits}, as asked {asked:.2f} %"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gan", choices=NAMES, default="dcgan")
    parser.add_argument("--steps", type=int, help="without it those of the notebook, or 30,000 with --full")
    parser.add_argument("--width", type=int, help=f"channels of the widest maps; {SHORT['width']}, or {FULL['width']}")
    parser.add_argument("--fakes", type=int, help=f"for the judge; {SHORT['fakes']}, or {FULL['fakes']}")
    parser.add_argument("--full", action="store_true", help="the full-size recipe")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--run", help="folder for checkpoints, history, samples and curves; without it nothing is written")
    parser.add_argument("--digits", default="0123456789", help="which to draw; DCGAN and BGAN draw as many of their own choice")
    parser.add_argument("--draw", metavar="PATH", help="write these digits to this picture")
    parser.add_argument("--movie", metavar="PATH", help="write the samples of the run to this .gif, .webp or .mp4")
    args = parser.parse_args()
    if not args.digits.isdecimal():
        parser.error(f"--digits takes digits; received {args.digits!r}")

    torch.set_num_threads(1)
    size = FULL if args.full else SHORT
    gan = make(args.gan, args.width or size["width"], args.seed, cbs=[Samples()] if args.movie else [], run=args.run)
    gan.fit(steps=args.steps or size[args.gan])
    print(f"{NAMES[args.gan]}, seed {args.seed}: {said(gan, args.fakes or size['fakes'])}")
    if args.draw:
        asked = None if gan.labels == "none" else [int(digit) for digit in args.digits]
        pictures = gan.sample(len(args.digits), labels=asked, seed=1)
        Image.fromarray(sample_grid(pictures, nrow=len(args.digits), value_range=(-1, 1))).save(args.draw)
    if args.movie:
        print("movie:", movie(gan, args.movie, seconds=5).path)
