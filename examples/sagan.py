"""A GAN that looks across the image, as a script: SAGAN as in nbs/tutorials/09_sagan.ipynb, with the same figures.

    python examples/sagan.py                        # about a minute on one core
    python examples/sagan.py --no-attention         # the same networks without attention
    python examples/sagan.py --full --run runs/sagan-full   # the paper's rates and a wider network, for a GPU
"""

import argparse

import torch
from PIL import Image
from torch import Tensor, nn

from trainkit.datasets import mnist_5k
from trainkit.device import seed_everything
from trainkit.gan.distances import features_of, fid, kid
from trainkit.gan.judge import train_judge
from trainkit.gan.layers import SelfAttention2d, spectral_norm
from trainkit.gan.learner import GANLearner
from trainkit.gan.metrics import class_probabilities, classifier_score
from trainkit.gan.models import DCGANDiscriminator, DCGANGenerator
from trainkit.optim import OptimBuilder
from trainkit.ui.samples import sample_grid

SHORT = {"steps": 400, "batch": 32, "width": 16, "rates": (1e-3, 4e-3), "judged": 6}
FULL = {"steps": 100_000, "batch": 64, "width": 64, "rates": (1e-4, 4e-4), "judged": 20}


def with_attention(net: nn.Module, at: int, channels: int) -> nn.Module:
    "A network with self-attention behind the block whose map has so many channels, and spectral norm on all weights."
    if at:
        net.blocks.insert(at, SelfAttention2d(channels, channels // 4, pool=2))
    return spectral_norm(net)


def make(images: Tensor, size: dict, seed: int = 0, attention: bool = True, rates=None, **options) -> GANLearner:
    "DCGAN's networks with spectral norm in both, attention on maps of 16x16, hinge loss, and two rates."
    seed_everything(seed)
    width = size["width"]
    g, d = DCGANGenerator(64, 32, 1, width), DCGANDiscriminator(32, 1, width, batchnorm=False)
    g, d = (with_attention(net, at if attention else 0, width) for net, at in ((g, 3), (d, 1)))
    slow, fast = (OptimBuilder("adam", lr=lr, betas=(0.0, 0.9), schedule="linear") for lr in rates or size["rates"])
    return GANLearner(g, d, images, "hinge", {"generator": slow, "discriminator": fast}, reuse_forward=True,
                      batch_size=size["batch"], seed=seed, n_samples=32, **options)  # fmt: skip


def attention_of(net: nn.Module) -> SelfAttention2d | None:
    "The attention layer of a network, if it has one."
    return next((m for m in net.modules() if isinstance(m, SelfAttention2d)), None)


def gammas(learn: GANLearner) -> list[float]:
    "How much of what attention finds is added to the map, in the generator and in the discriminator."
    layers = (attention_of(net) for net in (learn.generator, learn.discriminator))
    return [layer.gamma.item() for layer in layers if layer is not None]


def line(learn: GANLearner, judge: nn.Module, real: Tensor, n: int = 1000) -> str:
    "Fakes against held-out digits, in one line."
    fakes = learn.sample(n, seed=1)
    score = float(classifier_score(class_probabilities(judge, fakes)))
    features = [features_of(judge.features, x) for x in (real, fakes)]
    return f"FID {float(fid(*features)):.2f}, KID {float(kid(*features)):.3f}, classifier score {score:.2f}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="the full-size recipe")
    parser.add_argument("--steps", type=int, help=f"without it {SHORT['steps']}, or {FULL['steps']} with --full")
    parser.add_argument("--judged", type=int, metavar="EPOCHS", help="how long the judge is trained")
    parser.add_argument("--no-attention", dest="attention", action="store_false", help="the same networks without attention")
    parser.add_argument("--rate", type=float, help="one rate for both players")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--run", help="folder for checkpoints, history and curves; without it nothing is written")
    parser.add_argument("--picture", metavar="PATH", help="write fifty fakes to this .png file")
    args = parser.parse_args()

    torch.set_num_threads(1)
    size = {**(FULL if args.full else SHORT), **{k: v for k in ("steps", "judged") if (v := getattr(args, k))}}
    images, labels = mnist_5k(size=32)
    judge = train_judge(images[:4000], labels[:4000], epochs=size["judged"])
    rates = (args.rate, args.rate) if args.rate else None
    learn = make(images[:4000], size, args.seed, args.attention, rates, run=args.run)
    learn.fit(steps=size["steps"])
    print(line(learn, judge, images[4000:]))
    print("gamma:", *(f"{gamma:.3f}" for gamma in gammas(learn)))
    if args.picture:
        Image.fromarray(sample_grid(learn.sample(50, seed=1), nrow=10, value_range=(-1, 1))).save(args.picture)
