"""The quickstart as a script: the GAN of nbs/tutorials/01_quickstart.ipynb, with the same weights at the end.

    python examples/quickstart.py                     # about a minute on two cores
    python examples/quickstart.py --epochs 2 --run runs/short
"""

import argparse

from torch.utils.data import DataLoader, TensorDataset

from trainkit.datasets import mnist_5k
from trainkit.device import seed_everything
from trainkit.gan.learner import GANLearner
from trainkit.gan.models import DCGANDiscriminator, DCGANGenerator
from trainkit.optim import OptimBuilder


def make_gan(run: str) -> GANLearner:
    "Both players and their data, seeded."
    images, labels = mnist_5k(size=32)
    seed_everything(0)
    return GANLearner(
        DCGANGenerator(latent_dim=64, out_size=32, out_channels=1, channels=16, num_classes=10),
        DCGANDiscriminator(in_size=32, in_channels=1, channels=16, num_classes=10),
        DataLoader(TensorDataset(images, labels), batch_size=64, shuffle=True, drop_last=True),
        loss="nonsaturating",
        opt=OptimBuilder("adam", lr=1e-3, betas=(0.5, 0.999), schedule="linear"),
        labels="dataset",
        reuse_forward=True,
        n_samples=80,
        run=run,
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--run", default="runs/digits-script", help="folder for checkpoints, history, samples, curves")
    parser.add_argument("--resume", action="store_true", help="go on with the run in that folder")
    args = parser.parse_args()

    gan = make_gan(args.run)
    if args.resume:
        gan.restore("last")
        if gan.target.reached(gan.epoch, gan.step):
            parser.exit(message="this run is finished\n")
        gan.fit()
    else:
        gan.fit(epochs=args.epochs)
    print(gan)
