"""What each rank of a distributed test does: `torchrun ranks.py FOLDER NAME…`, one after another in one process group.

Rank 0 writes what it found to FOLDER/NAME.pt, where the test reads it; `python ranks.py FOLDER NAME…` does the same alone.
"""
import atexit
import contextlib
import faulthandler
import io
import os
import random
import signal
import sys
import time
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from trainkit.callback import Callback, CancelBatch, CancelEpoch, CancelFit, CancelStep, CancelTurn, CancelValidate, On
from trainkit.callbacks.average import EMA
from trainkit.callbacks.guards import SkipBadSteps
from trainkit.callbacks.stopping import EarlyStopping
from trainkit.distributed import Distributed
from trainkit.finder import lr_find
from trainkit.gan.learner import GANLearner
from trainkit.gan.penalties import GradientPenalty
from trainkit.launch import free_port
from trainkit.learner import Learner
from trainkit.optim import OptimBuilder
from trainkit.schedule import Knob
from trainkit.settings import Settings
from trainkit.storage import write_atomically
from trainkit.team import RankError
from trainkit.ui.telling import Writer
from trainkit.ui.view import View
from trainkit.ui.writers import EpochFile

DDP = Distributed(listen_every=0.0)
FRONT = Settings().front  # what shows a run unless somebody says otherwise
X = torch.randn(22, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = (X @ torch.tensor([[1.0], [-2.0], [0.5]], dtype=torch.float64)).sin()
VALID = TensorDataset(X[:13] * 1.5, Y[:13])


def net(*, norm=False, drop=0.0, seed=1):
    torch.manual_seed(seed)
    parts = [nn.Linear(3, 8), *([nn.BatchNorm1d(8)] if norm else []), nn.Tanh(), nn.Dropout(drop), nn.Linear(8, 1)]
    return nn.Sequential(*parts).double()


def loader(batch_size=4, **kw):
    return DataLoader(TensorDataset(X, Y), batch_size=batch_size, shuffle=True, **kw)


def learner(model=None, dls=None, opt=None, **kw):
    kw = {"front": "none", "device": "cpu", "seed": 5, "distributed": DDP, **kw}
    return Learner(model or net(), dls or (loader(), DataLoader(VALID, batch_size=3)), "mse",
                   opt or OptimBuilder("sgd", lr=0.1, momentum=0.9), **kw)  # fmt: skip


def told(learn, **more):
    "What every rank has, gathered: weights, history, where it stands."
    return learn.team.gather({**told_alone(learn), **more})


def told_alone(learn):
    return {"weights": {p.name: {k: v.clone() for k, v in m.state_dict().items()} for p in learn.players
                        for m in p.modules.values()},
            "history": {k: (s.tolist(), v.tolist()) for k, (s, v) in learn.history.scalars.items()},
            "step": learn.step, "epoch": learn.epoch, "state": learn.state,
            "opt": [p.opt.state_dict() for p in learn.players]}  # fmt: skip


# ------------------------------------------------------------------------------------------------------ one joint batch


def plain(folder):
    "Shards of unequal size, momentum, validation, a learning rate that follows the validation."
    learn = learner(opt=OptimBuilder("sgd", lr=0.1, momentum=0.9, schedule="cosine"), metrics=["mae"])
    learn.fit(3)
    return told(learn)


def follows(folder):
    "A rate that falls where rank 0 sees no progress in a series that differs from rank to rank."
    plan = {"name": "plateau", "monitor": "train/own", "mode": "min", "factor": 0.5, "patience": 0}
    learn = learner(opt=OptimBuilder("sgd", lr=0.1, schedule=plan))
    learn.add(On("after_batch", lambda learn: learn.history.add("train/own", 1 - 0.1 * learn.step * learn.rank, learn.step)))
    learn.fit(4)
    return told(learn, lr=learn.players[0].opt.param_groups[0]["lr"])


def adamw(folder):
    learn = learner(opt=OptimBuilder("adamw", lr=0.01), dls=loader())
    learn.fit(3)
    return told(learn)


def accumulated(folder):
    learn = learner(dls=loader(), accumulate=4)
    team, sent = learn.team, []
    learn.add(On("after_turn", lambda learn: sent.append((learn.step, team.bytes, learn.stepped))))
    learn.fit(2)
    return told(learn, sent=sent)


def whole_numbers(folder):
    "Every number is a small multiple of a power of two: sums come out the same in any order."
    torch.manual_seed(0)
    x, y = torch.randint(-4, 5, (16, 3)).float(), torch.randint(-4, 5, (16, 1)).float()
    model = nn.Linear(3, 1)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, -1.0, 2.0]])), model.bias.zero_()
    learn = learner(model, DataLoader(TensorDataset(x, y), batch_size=8), OptimBuilder("sgd", lr=0.125))
    learn.fit(1)
    return told(learn)


class Crops(Dataset):
    "Random transforms: their numbers belong to the sample."

    def __len__(self):
        return 22

    def __getitem__(self, i):
        return X[i] + 0.1 * torch.randn(3, dtype=torch.float64), Y[i]


def random_samples(folder):
    learn = learner(dls=DataLoader(Crops(), batch_size=4, shuffle=True, num_workers=1))
    learn.fit(2)
    return told(learn)


def batches_in_a_list(folder):
    learn = learner(dls=[*DataLoader(TensorDataset(X, Y), batch_size=5)])
    learn.fit(2)
    return told(learn)


# ----------------------------------------------------------------------------------------------------------- several players


class Half(nn.Module):
    "A part of its parameters is used by some samples only, another never."

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.a, self.b, self.never = nn.Linear(3, 1), nn.Linear(3, 1), nn.Linear(3, 1)
        self.double()

    def forward(self, x):
        wanted = (x[:, :1] > 0.7).double()
        return self.a(x) + (self.b(x) * wanted if wanted.any() else 0)


def unused(folder):
    learn = learner(Half(), loader(), OptimBuilder("adamw", lr=0.01, weight_decay=0.1))
    learn.fit(2)
    return told(learn)


def gan_parts(seed=0):
    torch.manual_seed(seed)
    g = nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)).double()
    d = nn.Sequential(nn.Linear(3, 8), nn.LeakyReLU(0.2), nn.Linear(8, 1), nn.Flatten(0)).double()
    return g, d


class Given(GANLearner):
    "The noise is a part of the batch, so that it is the same however the batch is shared out."

    def draw(self, n, labels):
        z = self.batch[1]
        return super().draw(n, labels)._replace(fake=self.generator(z), noise=z)


def gan(folder, batch_norm=False, **kw):
    g, d = gan_parts()
    if not batch_norm:
        g[1] = nn.Identity()
    z = torch.randn(22, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    data = DataLoader(TensorDataset(X, z), batch_size=11 if batch_norm else 4, shuffle=True)
    learn = Given(g, d, data, "wasserstein", OptimBuilder("sgd", lr=0.05), latent=lambda n, device: torch.zeros(n, 2).double(),
                  device="cpu", seed=5, front="none", distributed=DDP, **kw)  # fmt: skip
    learn.fit(2)
    return told(learn)


def gan_every(folder):
    return gan(folder, n_critic=2)


def gan_at_once(folder):
    return gan(folder, updates="simultaneous")


class HalfWay:
    "A gradient penalty half way between real and fake, and not at random places."

    name = "half_way"

    def __call__(self, d, real, fake, *labels):
        x = ((real + fake) / 2).detach().requires_grad_()
        (grad,) = torch.autograd.grad(d(x).sum(), x, create_graph=True)
        return 10 * (grad.norm(dim=1) - 1).square().mean()


def gan_penalty(folder):
    return gan(folder, penalties=[HalfWay()])


def gan_gp(folder):
    "The usual penalty of WGAN-GP: random places between real and fake, other ones on each rank; a double backward."
    return gan(folder, penalties=[GradientPenalty()], n_critic=2)


class Thawing(Callback):
    "The first layer stands still for an epoch, and for a step later on."

    def before_batch(self, learn):
        for p in learn.model[0].parameters():
            p.requires_grad_(learn.step >= 6 and learn.step != 8)


def frozen_turns(folder):
    learn = learner(dls=loader(), cbs=Thawing(), opt=OptimBuilder("adamw", lr=0.01, weight_decay=0.1))
    learn.fit(2)
    return told(learn)


def gan_norms(folder):
    return gan(folder, batch_norm=True)


# ------------------------------------------------------------------------------------------------------ looking on


def looked(folder):
    "Metrics by function and with a state of their own, several loaders, predictions, a test, an epoch's own score."
    import torchmetrics

    class Scored(Learner):
        def validation_epoch_end(self, outputs):
            return {"first": float(outputs["valid"][0]["loss"]), "n": len(outputs["valid"])}

    torch.manual_seed(0)
    data = {"train": loader(), "valid": DataLoader(VALID, batch_size=3), "other": [*DataLoader(VALID, batch_size=9)]}
    learn = Scored(net(), data, "mse", OptimBuilder("sgd", lr=0.1), seed=5, device="cpu", front="none", distributed=DDP,
                   metrics={"mae": "mae", "r2": torchmetrics.R2Score()})  # fmt: skip
    learn.fit(1)
    seen = []
    learn.add(On("after_predict_batch", lambda learn: seen.append(learn.pred)))
    return told(learn, predicted=learn.predict(DataLoader(VALID, batch_size=5)), seen=seen, tested=learn.test(VALID),
                again=learn.validate(DataLoader(VALID, batch_size=4)))  # fmt: skip


def averaged(folder):
    "EMA counts each step once, and every rank evaluates with it."
    learn = learner(cbs=EMA(0.9, warmup=False))
    learn.fit(2)
    ema = learn.cbs.get(EMA)
    return told(learn, averages=ema.averages["model"], counts=ema.counts)


def norms(folder):
    learn = learner(net(norm=True), loader(11))
    learn.fit(2)
    return told(learn)


# ---------------------------------------------------------------------------------------------------------- together


def early(folder):
    learn = learner(opt=OptimBuilder("sgd", lr=0.0), cbs=EarlyStopping(patience=2))
    learn.fit(9)
    return told(learn)


def stopped_by_one(folder):
    "The last rank wants to stop, after its fourth step."
    learn = learner()
    last = learn.team.size - 1
    learn.add(On("after_batch", lambda learn: learn.stop() if learn.rank == last and learn.step == 4 else None))
    learn.fit(9)
    return told(learn)


class Steering(Callback):
    "Sends commands on rank 0, as somebody with a panel would."

    def after_batch(self, learn):
        if learn.rank == 0:
            if learn.step == 2:
                learn.send("set", source="panel", name="lr", value=0.01)
                learn.send("validate", source="panel")
                learn.send("save", source="panel", note="here")
            if learn.step == 5:
                learn.send("undo", source="panel")
                learn.send("pause", source="panel")
                learn.send("resume", source="panel")
            if learn.step == 8:
                learn.send("restore", source="panel", which="here")
                learn.send("stop", source="panel", at=(5, 0))


def steered(folder):
    "Whatever is asked of rank 0 happens on all ranks, before the same step."
    learn = learner(run=folder / "steered", cbs=Steering())
    rates = []
    learn.add(On("after_turn", lambda learn: rates.append((learn.step, learn.player.opt.param_groups[0]["lr"]))))
    learn.add(On("after_batch", lambda learn: learn.cbs.get(Steering) and learn.step == 8 and learn.remove(Steering)))
    learn.fit(9)
    asked = [(e.what, e.step, e.error) for e in learn.journal.entries if e.id and e.source == "panel"]
    return told(learn, rates=rates, asked=asked, files=sorted(p.name for p in (folder / "steered").iterdir()))


class Noting(Writer):
    "Somebody's own writer: what it was told to do."

    def __init__(self):
        super().__init__(every=1e-3)
        self.told = []

    def begin(self, about):
        self.told.append("begin")
        return ""

    def scalars(self, rows):
        self.told += [name for _, values in rows for name in values]

    def end(self, state):
        self.told.append(state)


class Picture(View):
    "Somebody's own view."

    def after_epoch(self, learn):
        print("a picture of epoch", learn.epoch)


def watched(folder):
    "A fit that is shown, in a terminal and in a notebook: what there is of it on each rank. Each is given a folder of its own."
    found = {}
    for where in "script", "notebook":
        os.environ["TRAINKIT_WHERE"], said, noting = where, io.StringIO(), Noting()
        run = folder / f"watched on {os.environ['RANK']}, {where}"
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            learn = learner(front=FRONT, run=run, cbs=[noting, Picture(), EpochFile()], metrics=["mae"])
            learn.fit(2)
            learn.validate()
            learn.fit(1)
        views = [type(cb).__name__ for cb in learn.cbs if isinstance(cb, View)]
        files = sorted(p.name for p in run.rglob("*")) if run.exists() else None
        found[where] = {"views": views, "said": said.getvalue(), "told": noting.told, "files": files}
    os.environ["TRAINKIT_WHERE"] = "script"
    return learn.team.gather(found)


def seldom(folder):
    "With councils four times a second, a stop still comes at the same step everywhere."
    learn = learner(distributed="ddp")
    councils, original = [], learn._council
    learn._council = lambda *a: councils.append(learn.step) or original(*a)
    learn.add(On("after_batch", lambda learn: learn.stop() if learn.rank == 0 and learn.step == 300 else None))
    learn.fit(steps=10**5)
    return told(learn, councils=len(councils))


def asked_for(folder):
    "What each rank warns of when `accelerate launch` was told of a precision, and the learner of this or that one."
    found = {}
    for asked in "bf16", "no":
        os.environ["ACCELERATE_MIXED_PRECISION"] = asked
        for given in "fp32", "bf16":
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                data = DataLoader(TensorDataset(X.float(), Y.float()), batch_size=4)
                learn = learner(net().float(), data, precision=given)
                learn.fit(1)
            found[asked, given] = [(str(w.message), Path(w.filename).name) for w in said if "accelerate launch" in str(w.message)]
    del os.environ["ACCELERATE_MIXED_PRECISION"]
    return learn.team.gather(found)


# ---------------------------------------------------------------------------------------------------------- coming back


def saved(folder):
    "Three epochs in one go; and the same with a save inside the second epoch, and a restore by others."
    kw = {"opt": OptimBuilder("adamw", lr=0.01, schedule="cosine"), "accumulate": 3, "model": net(drop=0.2), "cbs": EMA(0.9)}
    learn = learner(run=folder / "saved", save_every=4, keep="all", **kw)
    noise = []
    learn.add(On("after_forward", lambda learn: noise.append(learn.pred.sum().item())))
    learn.fit(3)
    return told(learn, noise=noise, lines=(folder / "saved" / "history.jsonl").read_text().splitlines())


def resumed(folder):
    kw = {"opt": OptimBuilder("adamw", lr=0.01, schedule="cosine"), "accumulate": 3, "cbs": EMA(0.9)}
    learn = learner(net(drop=0.2, seed=9), run=folder / "saved", save_every=4, keep="all", **kw)
    learn.restore(8)
    start = learn.step
    learn.fit()
    return told(learn, start=start)


def calm(folder):
    "As `saved`, without dropout: to be gone on with by any number of ranks."
    learn = learner(run=folder / "calm", save_every=4, accumulate=3, opt=OptimBuilder("sgd", lr=0.1, momentum=0.9), keep="all")
    learn.fit(3)
    return told(learn)


def calm_resumed(folder):
    learn = learner(net(seed=9), run=folder / "calm", save_every=4, accumulate=3, opt=OptimBuilder("sgd", lr=0.1, momentum=0.9),
                    keep="all")  # fmt: skip
    learn.restore(8)
    learn.fit()
    return told(learn)


def missing(folder):
    "What rank 0 can't read, nobody restores; what it can, only for weights."
    learn, words = learner(run=folder / "calm"), []
    for which in ("never saved", 8):
        try:
            learn.restore(which, only="weights")
            words.append("restored")
        except Exception as error:
            words.append(f"{type(error).__name__}: {error}")
    return told(learn, words=words)


# ---------------------------------------------------------------------------------------------------------- apart


def refused(folder):
    "Ranks that differ, and loaders that share out by themselves, are refused, by name."
    from torch.utils.data.distributed import DistributedSampler

    from trainkit.team import Deciding

    team, words = Deciding(True), []

    def attempt(make):
        try:
            make()
            words.append("nothing")
        except Exception as error:
            words.append(f"{type(error).__name__}: {error}")

    attempt(lambda: learner(nn.Linear(3, 1 + team.rank)))
    attempt(lambda: learner(dls=DataLoader(VALID, sampler=DistributedSampler(VALID, 2, 0))))
    attempt(lambda: learner().fit(1, background=True))
    attempt(lambda: learner(dls=[(X[team.rank :][:4], Y[:4])]).fit(1))

    def of(x, **kw):
        return DataLoader(TensorDataset(x, x[:, :1]), batch_size=4, **kw)

    attempt(lambda: learner(dls=of(X[team.rank :])).fit(1))
    attempt(lambda: learner(dls=of(X + team.rank)).fit(1))
    attempt(lambda: learner(dls=(loader(), of(X[: 8 + team.rank]))).fit(1))
    attempt(lambda: learner(dls=DataLoader(TensorDataset(X, Y), batch_size=4, sampler=Own(team.rank))).fit(1))
    attempt(lambda: learner().validate(of(X[: 8 + team.rank])))
    return team.gather(words)


class Own(torch.utils.data.Sampler):
    "Draws from random numbers that nobody else knows of."

    def __init__(self, seed):
        self.random = random.Random(seed)

    def __len__(self):
        return 22

    def __iter__(self):
        return iter(self.random.sample(range(22), 22))


# ------------------------------------------------------------------------------------------------------ one cancels

PLACES = [(CancelTurn, ("before_turn", "after_forward", "after_loss", "after_backward", "before_step", "after_step")),
          (CancelStep, ("after_loss", "before_backward", "after_backward", "before_step")),
          (CancelBatch, ("before_batch", "before_turn", "before_step", "after_turn", "after_batch")),
          (CancelEpoch, ("before_epoch", "before_batch", "after_backward", "after_batch", "cleanup_batch",
                         "before_validate_batch")),
          (CancelValidate, ("before_validate", "after_validate_batch")),
          (CancelFit, ("before_fit", "before_turn", "after_batch", "after_validate", "after_epoch", "after_fit"))]  # fmt: skip


class Cancels(Callback):
    "Cancels once, after some steps: on the last rank, or on all."

    def __init__(self, kind, event, at=2, everybody=False, player=""):
        self.kind, self.at, self.everybody, self.player, self.done = kind, at, everybody, player, False
        setattr(self, event, self.cancel)

    def cancel(self, learn):
        mine = self.everybody or learn.rank == learn.team.size - 1
        if mine and not self.done and learn.step >= self.at and self.player in ("", getattr(learn.player, "name", "")):
            self.done = True
            raise self.kind


def places(every, step=3):
    "All of them for one and two ranks; for four some, as each costs its time."
    return every[:: step if int(os.environ.get("WORLD_SIZE", 1)) > 2 else 1]


def cancels(folder):
    "What one rank cancels, and what all do, at every place."
    found = {}
    for kind, events in PLACES:
        for event in places(events):
            for everybody in (False, True) if event in ("before_turn", "after_backward", "after_batch") else (False,):
                at = 0 if event in ("before_fit", "before_epoch") else 2
                learn = learner(cbs=Cancels(kind, event, at, everybody))
                learn.fit(2)
                found[kind.__name__, event, everybody] = told(learn, updates=learn.players[0].updates)
    return found


def cancels_windows(folder):
    "The same where turns gather gradients, and where players move at the same time."
    found = {}
    for kind, event in places([(CancelTurn, "before_turn"), (CancelTurn, "after_backward"), (CancelStep, "after_loss"),
                               (CancelBatch, "before_batch"), (CancelEpoch, "after_batch")]):  # fmt: skip
        for everybody in False, True:
            learn = learner(cbs=Cancels(kind, event, 1, everybody), dls=loader(), accumulate=3)
            learn.fit(2)
            found["accumulated", kind.__name__, event, everybody] = told(learn, updates=learn.players[0].updates)
    for kind, event, who in places([(CancelBatch, "before_batch", ""), (CancelBatch, "before_turn", "generator"),
                                    (CancelBatch, "after_turn", "discriminator"), (CancelTurn, "before_turn", "discriminator"),
                                    (CancelTurn, "after_backward", "generator"), (CancelStep, "before_backward", "generator"),
                                    (CancelStep, "before_step", "discriminator"),
                                    (CancelEpoch, "before_step", "generator")]):  # fmt: skip
        for updates in "alternating", "simultaneous":
            found[updates, kind.__name__, event, who] = gan(folder, updates=updates, cbs=Cancels(kind, event, 2, False, who))
    return found


def mse_with_a_bomb(pred, y):
    "Infinite, with a finite gradient, where one sample is in the batch."
    return (pred - y).square().mean() + torch.where((y == Y[7]).any(), torch.inf, 0.0)


def bad_steps(folder):
    "A step that is bad on one rank is bad."
    found = {}
    for accumulate in 1, 2:
        learn = Learner(net(), loader(), mse_with_a_bomb, "sgd", seed=5, device="cpu", front="none", distributed=DDP,
                        cbs=SkipBadSteps(), accumulate=accumulate)  # fmt: skip
        learn.fit(2)
        found[accumulate] = told(learn, skipped=learn.cbs.get(SkipBadSteps).skipped)
    return found


# ------------------------------------------------------------------------------------------------------ endings


def anew(folder, name):
    "Another process group in the same processes, as if they had been started once more; at a port that is free now."
    from accelerate import PartialState

    if dist.is_initialized():
        dist.destroy_process_group()
    PartialState._reset_state()
    place = Path(folder, f"port of {name}")
    if os.environ["RANK"] == "0":
        write_atomically(place, lambda file: file.write(str(free_port()).encode()))
    while not place.exists():
        time.sleep(0.01)
    os.environ.update(TORCHELASTIC_USE_AGENT_STORE="False", MASTER_PORT=place.read_text())


def at(event, step, do, rank=1):
    return On(event, lambda learn: do(learn) if learn.rank == rank and learn.step == step else None)


def alone_saves(folder):
    only_first = at("after_batch", 2, lambda learn: learn.save(), 0)
    learner(run=folder / "alone_saves", save_every="none", accumulate=4, cbs=only_first).fit(2)


def alone_validates(folder):
    learner(cbs=at("after_batch", 3, lambda learn: learn.validate(), 0)).fit(2)


def others_do(folder):
    learn = learner()
    learn.fit(1) if learn.rank == 0 else learn.predict(VALID)


def freezes(folder):
    learner(cbs=at("before_batch", 3, lambda learn: learn.model[0].requires_grad_(False))).fit(2)


class Stream:
    "Nobody knows how long it is; one batch less on rank 1."

    def __iter__(self):
        yield from [*DataLoader(TensorDataset(X, Y), batch_size=4)][: 5 - (os.environ["RANK"] == "1")]


def ends_early(folder):
    learner(dls=Stream()).fit(2)


def interrupted_looking(folder):
    learn = learner(cbs=at("before_predict_batch", 0, lambda learn: signal.raise_signal(signal.SIGINT)))
    learn.predict(DataLoader(VALID, batch_size=3))


def interrupted_twice(folder):
    "The second one comes as the gradients that wait are put together for the last checkpoint."
    first = at("after_batch", 2, lambda learn: signal.raise_signal(signal.SIGINT))
    learn = learner(run=folder / "twice", accumulate=4, cbs=first)
    collect = learn._collect

    def struck(player):
        if learn.rank == 1 and learn._agreed:
            signal.raise_signal(signal.SIGINT)
        collect(player)

    learn._collect = struck
    learn.fit(2)


def too_few(folder):
    "Two samples on each rank but the last."
    learner(net(norm=True), DataLoader(TensorDataset(X, Y), batch_size=2 * int(os.environ["WORLD_SIZE"]) - 1)).fit(1)


class Fragile(Callback):
    "Has a knob that rank 1 can't turn."

    knobs = (Knob("strength", 0.0, 3.0),)

    @property
    def strength(self):
        return 1.0

    @strength.setter
    def strength(self, value):
        if os.environ["RANK"] == "1":
            raise OSError("rank 1 has no such file")


def turns_alone(folder):
    turn = at("before_batch", 3, lambda learn: learn.send("set", name="fragile.strength", value=2.0), 0)
    learner(cbs=[Fragile(), turn]).fit(2)


def drifts(folder):
    "A schedule that goes on on one rank alone."

    def go_on(learn):
        next(iter(learn.player.schedules.values())).advance()

    learner(opt=OptimBuilder("sgd", lr=0.1, schedule="cosine"), cbs=at("before_step", 3, go_on)).fit(2)


class Uneven(Learner):
    "Tells a term more on rank 1, from the fourth step on."

    def training_step(self, batch):
        x, y = batch
        self.pred = self.model(x)
        losses = {"squared": (self.pred - y).square().mean()}
        return {**losses, **{name: losses["squared"] * 0 for name in self.more()}}

    def more(self):
        return ["more"] if self.rank and self.step > 2 else []


class Many(Uneven):
    def more(self):
        return [f"term {i}" for i in range(40)]


def tells_more(folder):
    Uneven(net(), loader(), None, "sgd", front="none", device="cpu", distributed=DDP).fit(1)


def tells_much(folder):
    Many(net(), loader(), None, "sgd", front="none", device="cpu", distributed=DDP).fit(1)


ENDINGS = (alone_saves, alone_validates, others_do, freezes, ends_early, interrupted_looking, interrupted_twice, too_few,
           turns_alone, drifts, tells_more, tells_much)


def endings(folder):
    "Mistakes that would make ranks wait for each other: what each rank ends with, and after how many seconds."
    words = {}
    for act in ENDINGS:
        anew(folder, act.__name__)
        began = time.monotonic()
        try:
            act(folder)
            words[act.__name__] = "nothing", 0.0
        except BaseException as error:
            words[act.__name__] = f"{type(error).__name__}: {error}", time.monotonic() - began
    torch.save(words, folder / f"endings.{os.environ['RANK']}.pt")


def all_cancel(folder):
    "A turn that everybody sits out is no fault."

    def cancel(learn):
        if learn.step == 2:
            raise CancelTurn

    learn = learner(cbs=On("before_turn", cancel))
    learn.fit(1)
    return told(learn)


def fails(folder):
    "Rank 1's fourth step fails; what both of them end with goes to a file."

    def fault(learn):
        if learn.rank == 1 and learn.step == 3:
            raise ValueError("the disk is on fire")

    return ending(folder, "fails", fault)


def fails_and_killed(folder):
    "Two ends of the same processes, one after the other."
    with contextlib.suppress(ValueError, RankError):
        fails(folder)
    anew(folder, "killed")
    killed(folder)


def searches(folder):
    "What decides by one rank's losses is refused."
    lr_find(learner())


def balances(folder):
    learner(cbs=type("BoundaryEquilibrium", (Callback,), {})()).fit(1)


def killed(folder):
    def fault(learn):
        if learn.rank == 1 and learn.step == 3:
            os.kill(os.getpid(), 9)

    return ending(folder, "killed", fault)


def ending(folder, name, fault):
    learn = learner(cbs=On("before_batch", fault))
    try:
        learn.fit(9)
    except Exception as error:
        Path(folder, f"{name}.{learn.rank}.txt").write_text(f"{type(error).__name__}: {error}")
        raise


def endless(folder):
    "Trains until somebody says stop through the run's folder."
    learn = learner(run=folder / "endless", distributed=Distributed(listen_every=0.05), save_every="none")
    rates = []

    def look(learn):
        rate = learn.player.opt.param_groups[0]["lr"]
        if rate != (rates[-1][1] if rates else 0.1):
            rates.append((learn.step, rate))

    learn.add(On("before_turn", look))
    learn.fit(steps=10**7)
    return told(learn, lr=learn.players[0].opt.param_groups[0]["lr"], changed=rates)


SCENARIOS = {f.__name__: f for f in (
    plain, adamw, follows, accumulated, whole_numbers, random_samples, batches_in_a_list, unused, gan_every, gan_at_once,
    gan_penalty, gan_gp, frozen_turns, cancels, cancels_windows, bad_steps, endings, gan_norms, looked, averaged, norms,
    early, stopped_by_one, steered, watched, asked_for, seldom, saved, resumed, calm, calm_resumed, missing, refused, all_cancel,
    fails, fails_and_killed, searches, balances, endless)}  # fmt: skip


def main(scenarios=SCENARIOS):
    faulthandler.dump_traceback_later(600, exit=True)  # nobody may be there any more who would end it
    folder, *names = sys.argv[1:]
    if rank := os.environ.get("RANK"):  # what was registered first is called last
        atexit.register(lambda: Path(folder, f"connected.{rank}.txt").write_text(str(dist.is_initialized())))
    for name in names:
        found = scenarios[name](Path(folder))
        if found is not None and os.environ.get("RANK", "0") == "0":
            torch.save(found, Path(folder, f"{name}.pt"))


if __name__ == "__main__":
    main()
