"""A run to be steered from a second terminal; nbs/tutorials/03_live_control.ipynb does the same in a notebook.

    python examples/live_control.py            # prints the commands to type in the other terminal
    python examples/live_control.py --resume   # goes on where it was stopped
"""

import argparse
import os

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

from trainkit.callback import Callback
from trainkit.datasets import mnist_5k
from trainkit.device import seed_everything
from trainkit.gan.learner import GANLearner
from trainkit.gan.models import DCGANDiscriminator, DCGANGenerator
from trainkit.optim import OptimBuilder
from trainkit.schedule import Knob

COMMANDS = """\
This run listens. In another terminal, in the same folder:

    python -m trainkit.control {run} status
    python -m trainkit.control {run} set lr=5e-4 player=discriminator
    python -m trainkit.control {run} set "lr*=2" player=generator
    python -m trainkit.control {run} undo
    python -m trainkit.control {run} set noisy_reals.amount=0.1
    python -m trainkit.control {run} pause
    python -m trainkit.control {run} step 3
    python -m trainkit.control {run} resume
    python -m trainkit.control {run} save "good ones" pin=true
    python -m trainkit.control {run} restore last
    python -m trainkit.control {run} journal
    python -m trainkit.control {run} watch
    kill -USR1 {pid}    # saves
    kill -TERM {pid}    # stops in good order
"""


class NoisyReals(Callback):
    "Puts noise on the real pictures; how much is a knob."

    knobs = (Knob("amount", 0.0, 0.3),)
    amount = 0.0

    def before_batch(self, learn: GANLearner) -> None:
        pictures, labels = learn.batch
        learn.batch = pictures + self.amount * torch.randn_like(pictures), labels


def make_gan(run: str) -> GANLearner:
    "Both players and their data, seeded; two signals carry a command."
    images, labels = mnist_5k(size=32)
    seed_everything(0)
    return GANLearner(
        DCGANGenerator(latent_dim=64, out_size=16, out_channels=1, channels=16, num_classes=10),
        DCGANDiscriminator(in_size=16, in_channels=1, channels=16, num_classes=10),
        DataLoader(TensorDataset(F.avg_pool2d(images, 2), labels), batch_size=64, shuffle=True),
        opt=OptimBuilder("adam", lr=1e-3, betas=(0.5, 0.999), schedule="linear"),
        labels="dataset",
        reuse_forward=True,
        cbs=NoisyReals(),
        run=run,
        signals="SIGUSR1=save SIGTERM=stop",
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=200)
    parser.add_argument("--run", default="runs/live-script", help="folder for checkpoints, history, journal, commands")
    parser.add_argument("--resume", action="store_true", help="go on with the run in that folder")
    args = parser.parse_args()

    gan = make_gan(args.run)
    print(COMMANDS.format(run=args.run, pid=os.getpid()), flush=True)
    if args.resume:
        gan.restore("last")
        if gan.target.reached(gan.epoch, gan.step):
            parser.exit(message="this run is finished\n")
        gan.fit()
    else:
        gan.fit(epochs=args.epochs)
    print(gan.journal)
