"""Speech out of noise, as a script: the network of nbs/tutorials/11_speech.ipynb, with the same figures at the end.

    python examples/speech.py                              # some three minutes on one core
    python examples/speech.py --seed 1 --epochs 12
    python examples/speech.py --full --run runs/speech-full  # the paper's network, for longer
"""

import argparse

import torch
from torch.utils.data import DataLoader

from trainkit.callbacks.clip import ClipGradNorm
from trainkit.callbacks.stopping import EarlyStopping
from trainkit.device import seed_everything
from trainkit.learner import Learner
from trainkit.optim import OptimBuilder
from trainkit.speech.data import TRACKS, FixedMixtures, NoisySpeech, babble, music, recordings, split_recordings
from trainkit.speech.features import SpectralLoss
from trainkit.speech.metrics import column_means, mean_table, per_file, si_sdr, stoi, write_csv
from trainkit.speech.models import FullSubNet

SHORT = {"epochs": 6, "samples": 160, "batch": 4, "accumulate": 2, "seconds": 1.5, "files": 16, "lr": 4e-3,
         "net": {"full": 96, "sub": 32, "layers": 1, "neighbours": 7, "n_fft": 256, "hop": 128, "cell": "gru"}}  # fmt: skip
FULL = {"epochs": 100, "samples": 8000, "batch": 16, "accumulate": 1, "seconds": 3.0, "files": None, "lr": 1e-3,
        "net": {"n_fft": 256, "hop": 128}}  # fmt: skip
HEARD, UNHEARD, SNRS, spectral = ("allison", "carlo", "ivrvoice"), "june", (-3, 0, 3, 6), SpectralLoss()


def sets(size: dict) -> dict:
    "Mixtures to train on; two validation sets of held-out sentences; two test sets of a voice that is never trained on."
    clips, tracks = {voice: recordings(voice) for voice in (*HEARD, UNHEARD)}, music()
    train, held = zip(*(split_recordings(clips[voice]) for voice in HEARD))
    valid, test = zip(*(split_recordings(sentences, 16) for sentences in held))

    def noises(speakers: tuple, names: tuple, seed: int) -> dict:
        return {"music": {name: tracks[name] for name in names}, "babble": {"crowd": babble(speakers, seed=seed)}}

    def together(speakers: tuple) -> dict:
        return {f"{voice}/{name}": clip for voice, of in zip(HEARD, speakers) for name, clip in of.items()}

    def fixed(clips: dict, kinds: dict) -> dict:
        clips = dict(sorted(clips.items(), key=lambda item: item[0].split("/")[-1]))  # voices in turn
        return {kind: FixedMixtures(clips, sounds, size["seconds"], SNRS, size["files"]) for kind, sounds in kinds.items()}

    return {"train": NoisySpeech(together(train), noises(train, TRACKS[:3], 0), size["samples"], size["seconds"], spoken=0.5),
            "valid": fixed(together(valid), noises(valid, TRACKS[3:4], 1)),
            "test": fixed(clips[UNHEARD], noises(test, TRACKS[4:], 2))}  # fmt: skip


def loaders(data: dict, size: dict) -> dict:
    "A loader for each set."
    of = {split: {kind: DataLoader(mixtures, 8) for kind, mixtures in data[split].items()} for split in ("valid", "test")}
    return {"train": DataLoader(data["train"], size["batch"]), **of}


class Enhancement(Learner):
    "Learns to enhance speech; a validation's score is the SI-SDR, summed over the sets."

    data: dict  # the sets, whose files have names

    def training_step(self, batch):
        noisy, clean = batch
        enhanced = self.model(noisy)
        return {"si_sdr": -si_sdr(enhanced, clean).mean(), "spectral": 5 * spectral(enhanced, clean)}

    def validation_step(self, batch):
        noisy, clean = batch
        before, after = si_sdr(noisy, clean), si_sdr(self.model(noisy), clean)
        return {"noisy": before, "si_sdr": after, "gain": after - before}

    def test_step(self, batch):
        noisy, clean = batch
        intelligible = {"stoi_noisy": stoi(noisy, clean), "stoi": stoi(self.model(noisy), clean)}
        return self.validation_step(batch) | intelligible

    def validation_epoch_end(self, outputs):
        means = {kind: column_means(table) for kind, table in self.tables("valid", outputs).items()}
        return {"score": sum(m["si_sdr"] for m in means.values()), **{f"gain_{kind}": m["gain"] for kind, m in means.items()}}

    def test_epoch_end(self, outputs):
        self.tested = self.tables("test", outputs)
        means = {kind: column_means(table) for kind, table in self.tested.items()}
        return {f"{measure}_{kind}": means[kind][measure] for kind in means for measure in ("gain", "stoi_noisy", "stoi")}

    def tables(self, split, outputs):
        files = {kind: self.data[split][kind] for kind in outputs}
        found = {kind: per_file(found, files[kind].names, snr=files[kind].snrs) for kind, found in outputs.items()}
        if self.run:
            folder = self.run / "metrics" / (split if split == "test" else f"step-{self.step}")
            for kind, table in found.items():
                write_csv(folder / f"{kind}.csv", table)
            (folder / "means.md").write_text(mean_table(found))
        return found


def make(data: dict, size: dict, seed: int, **options) -> Learner:
    "The network and its plan: warm-up, linear decay, accumulation, clipping, early stopping."
    seed_everything(seed)
    plan = OptimBuilder("adamw", lr=size["lr"], schedule="linear", warmup=0.1)
    cbs = [ClipGradNorm(5.0), EarlyStopping("valid/score", "max", patience=3)]
    learn = Enhancement(FullSubNet(**size["net"]), loaders(data, size), opt=plan, cbs=cbs, accumulate=size["accumulate"],
                        monitor="valid/score", mode="max", seed=seed, **options)  # fmt: skip
    learn.data = data
    return learn


def said(learn: Learner) -> str:
    "What was gained on the voice that was never heard."
    found = learn.test()
    gains = (f"{found[f'test/gain_{kind}']:+.2f} dB in {kind}" for kind in learn.data["test"])
    return f"SI-SDR of an unheard voice: {', '.join(gains)}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, help=f"without it {SHORT['epochs']}, or {FULL['epochs']} with --full")
    parser.add_argument("--samples", type=int, help=f"mixtures in an epoch; {SHORT['samples']}, or {FULL['samples']}")
    parser.add_argument("--full", action="store_true", help="the full-size recipe")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--run", help="folder for checkpoints, history, and a table of each test file; the best epoch is tested")
    args = parser.parse_args()

    torch.set_num_threads(1)
    size = FULL if args.full else SHORT
    size = size | {key: value for key in ("epochs", "samples") if (value := getattr(args, key))}
    learn = make(sets(size), size, args.seed, run=args.run)
    learn.fit(epochs=size["epochs"])
    if args.run:
        learn.restore("best", only="weights")
    print(said(learn))
    print(mean_table(learn.tested))
