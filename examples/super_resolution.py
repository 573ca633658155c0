"""Super-resolution as a script: the networks of nbs/tutorials/10_super_resolution.ipynb, with the same figures at the end.

The same command again goes on with what it finds in the run's folder: after Ctrl-C, a crash or a power cut.

    python examples/super_resolution.py edsr --run runs/edsr                       # half a minute on one core
    python examples/super_resolution.py srresnet --run runs/srresnet
    python examples/super_resolution.py srresnet --run runs/srgan --pretrained runs/srresnet --vgg vgg19-dcbb9e9d.pth
    python examples/super_resolution.py edsr --run runs/edsr --enlarge photo.jpg large.png

What learns from pixels is judged by its best weights, SRGAN by its last.
"""

import argparse

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from trainkit.device import evaluating, seed_everything
from trainkit.gan.features import Perceptual
from trainkit.learner import Learner
from trainkit.optim import OptimBuilder
from trainkit.sr.data import CropPairs, Pair, eight_bit, photographs, split_photographs, unit, upscale, whole_pairs
from trainkit.sr.gan import SRGANLearner
from trainkit.sr.metrics import PSNR, SSIM, psnr
from trainkit.sr.models import EDSR, WDSR, SRGANDiscriminator, SRResNet
from trainkit.sr.tiles import upscale_tiled
from trainkit.sr.vgg import load_vgg

SHORT = {
    "scale": 2, "batch": 8, "patch": 24, "every": 200,
    "edsr": {"channels": 24, "blocks": 4, "loss": "mae", "rates": {0: 1e-3, 500: 5e-4, 800: 1e-4}, "steps": 1000},
    "wdsr": {"channels": 12, "blocks": 4, "loss": "mae", "rates": {0: 5e-3, 500: 2e-3, 700: 5e-4}, "steps": 800},
    "srresnet": {"channels": 24, "blocks": 3, "loss": "mse", "rates": {0: 1e-3, 600: 5e-4, 800: 1e-4}, "steps": 1000},
    "gan": {"channels": 8, "hidden": 32, "adversarial": 1e-3, "rates": {0: 2e-4, 70: 5e-5}, "steps": 100, "every": 50},
}  # fmt: skip
FULL = {  # krasserm's networks, steps and rates; tried for some steps, not trained to the end
    "scale": 4, "batch": 16, "patch": 24, "every": 1000,
    "edsr": {"channels": 64, "blocks": 16, "loss": "mae", "rates": {0: 1e-4, 200_000: 5e-5}, "steps": 300_000},
    "wdsr": {"channels": 32, "blocks": 32, "loss": "mae", "rates": {0: 1e-3, 200_000: 5e-4}, "steps": 300_000},
    "srresnet": {"channels": 64, "blocks": 16, "loss": "mse", "rates": {0: 1e-4}, "steps": 1_000_000},
    "gan": {"channels": 64, "hidden": 1024, "adversarial": 1e-3, "rates": {0: 1e-4, 100_000: 1e-5}, "steps": 200_000,
            "every": 1000},
}  # fmt: skip


def loaders(size: dict) -> tuple[DataLoader, list[Pair]]:
    "Random crops of seven photographs to learn from, and the three held-out ones as a whole."
    train, held_out = split_photographs(photographs())
    crops = CropPairs(train, size["scale"], size["patch"], length=1000 * size["batch"])
    return DataLoader(crops, size["batch"]), whole_pairs(held_out, size["scale"])


def stepwise(rates: dict[int, float]) -> OptimBuilder:
    "A rate after each of these steps."
    first, *later = rates.values()
    drops = {"name": "piecewise", "boundaries": [*rates][1:], "values": [1.0, *(rate / first for rate in later)]}
    return OptimBuilder("adam", lr=first, schedule=drops if later else "constant")


def network(name: str, size: dict) -> nn.Module:
    "One that enlarges."
    kinds = {"edsr": EDSR, "wdsr": WDSR, "srresnet": SRResNet}
    options = {} if name == "wdsr" else {"icnr": True}
    return kinds[name](size["scale"], size[name]["channels"], size[name]["blocks"], **options)


def make(name: str, size: dict, seed: int, run: str | None) -> Learner:
    "A network that learns from pixels."
    scale, (crops, pairs) = size["scale"], loaders(size)
    seed_everything(seed)
    return Learner(network(name, size), (crops, DataLoader(pairs, 1)), size[name]["loss"], stepwise(size[name]["rates"]), run=run,
                   metrics=[PSNR(scale, y=True), PSNR(), SSIM(scale, y=True)], monitor="valid/psnr_y",
                   save_every=size["every"], seed=seed)  # fmt: skip


def content_by(vgg: str | None, looks: str | None, layer: str | None) -> dict:
    "What must be kept: what VGG-19 sees, weighted as in the paper; or what the notebook's stand-in sees, and pixels."
    if vgg:
        return {"seen": (Perceptual(load_vgg(vgg, layer or "relu5_4")), 1 / 12.75**2)}
    return {"seen": Perceptual(load_vgg(looks, layer or "relu3_2")), "pixels": ("l1", 10.0)}


def make_gan(name: str, size: dict, seed: int, run: str | None, pretrained: str, content: dict) -> SRGANLearner:
    "The same one as SRGAN's generator, with weights that have learned from pixels."
    scale, (crops, pairs) = size["scale"], loaders(size)
    seed_everything(seed)
    gan, side = size["gan"], scale * size["patch"]
    return SRGANLearner(network(name, size), SRGANDiscriminator(side, gan["channels"], gan["hidden"]),
                        (crops, DataLoader(pairs, 1)), content, stepwise(gan["rates"]), adversarial=gan["adversarial"],
                        pretrained={"generator": pretrained}, metrics=[PSNR(scale, y=True)], run=run,
                        save_every=gan["every"], seed=seed)  # fmt: skip


def go_on(learn: Learner, steps: int, every: int) -> None:
    "Train to so many steps in all, from what lies in the run's folder."
    if learn.checkpoints is not None and len(learn.checkpoints):
        print(learn.restore("last"))
    if steps > learn.step:
        learn.fit(steps=steps - learn.step, validate_every=every)


def said(model: nn.Module, size: dict) -> str:
    "How good it is, in one line."
    scale, pairs = size["scale"], loaders(size)[1]
    with evaluating(model), torch.no_grad():
        found = [(model(low[None]), upscale(low[None], scale), high[None]) for low, high in pairs]
    ours, bicubic, colour = (sum(float(psnr(images[i], images[2], border, y)) for images in found) / len(found)
                             for i, border, y in ((0, scale, True), (1, scale, True), (0, 0, False)))  # fmt: skip
    return f"{ours:.2f} dB on Y, {colour:.2f} dB in colour; beside bicubic {ours - bicubic:+.2f} dB (a = -½)"


def enlarge(model: nn.Module, source: str, target: str) -> str:
    "A picture of any size, in tiles."
    from PIL import Image

    with Image.open(source) as image:
        small: Tensor = unit(torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1))
    large = eight_bit(upscale_tiled(model, small) * 255)
    Image.fromarray(large.permute(1, 2, 0).numpy()).save(target)
    return f"{target}: {large.shape[2]} × {large.shape[1]}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", choices=("edsr", "wdsr", "srresnet"))
    parser.add_argument("--steps", type=int, help="in all; without it the recipe's")
    parser.add_argument("--every", type=int, help="validate and save each so many steps")
    parser.add_argument("--rates", nargs="+", metavar="STEP:RATE", help="a rate after each of these steps, as 0:1e-3 500:5e-4")
    parser.add_argument("--full", action="store_true", help="the papers' sizes")
    parser.add_argument("--run", help="folder for checkpoints, history and curves; without it nothing is written")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pretrained", metavar="PATH", help="train as SRGAN's generator, from this run or file of weights")
    sees = parser.add_mutually_exclusive_group()
    sees.add_argument("--vgg", metavar="PATH", help="VGG-19's weights, for the paper's content loss; with --pretrained")
    sees.add_argument("--looks", metavar="PATH", help="weights of the notebook's stand-in for it; with --pretrained")
    parser.add_argument("--layer", help="whose maps are compared; relu5_4, or relu3_2 of the stand-in")
    parser.add_argument("--enlarge", nargs=2, metavar=("FROM", "TO"), help="then enlarge a picture")
    args = parser.parse_args()
    if bool(args.pretrained) != bool(args.vgg or args.looks):
        parser.error("--pretrained and --vgg or --looks go together: SRGAN needs weights to begin with, and a network that looks")

    torch.set_num_threads(1)
    size = dict(FULL if args.full else SHORT)
    recipe = "gan" if args.pretrained else args.network
    every = args.every or size[recipe].get("every", size["every"])
    size["every"], size["gan"] = every, {**size["gan"], "every": every}
    if args.rates:
        size[recipe] = {**size[recipe], "rates": {int(step): float(rate) for step, rate in (r.split(":") for r in args.rates)}}
    if args.pretrained:
        content = content_by(args.vgg, args.looks, args.layer)
        learn = make_gan(args.network, size, args.seed, args.run, args.pretrained, content)
        model = learn.generator
    else:
        learn = make(args.network, size, args.seed, args.run)
        model = learn.model
    go_on(learn, args.steps or size[recipe]["steps"], every)
    if args.run and not args.pretrained:
        print(f"best at step {learn.restore('best', only='weights').step}")
    print(said(model, size))
    if args.enlarge:
        print(enlarge(model, *args.enlarge))
