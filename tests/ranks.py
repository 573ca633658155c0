"""What each rank of a distributed test does: `torchrun ranks.py FOLDER NAME…`, one after another in one process group.

Rank 0 writes what it found to FOLDER/NAME.pt, where the test reads it; `python ranks.py FOLDER NAME…` does the same alone.
"""
import faulthandler
import sys
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from trainkit.callback import Callback, CancelTurn, On
from trainkit.callbacks.average import EMA
from trainkit.callbacks.stopping import EarlyStopping
from trainkit.distributed import Distributed
from trainkit.finder import lr_find
from trainkit.gan.learner import GANLearner
from trainkit.learner import Learner
from trainkit.optim import OptimBuilder

DDP = Distributed(listen_every=0.0)
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
    return told(learn, predicted=learn.predict(DataLoader(VALID, batch_size=5)), tested=learn.test(VALID),
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


def seldom(folder):
    "With councils four times a second, a stop still comes at the same step everywhere."
    learn = learner(distributed="ddp")
    councils, original = [], learn._council
    learn._council = lambda *a: councils.append(learn.step) or original(*a)
    learn.add(On("after_batch", lambda learn: learn.stop() if learn.rank == 0 and learn.step == 300 else None))
    learn.fit(steps=10**5)
    return told(learn, councils=len(councils))


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

    def cancel(learn):
        if learn.rank == 1 and learn.step == 2:
            raise CancelTurn

    attempt(lambda: learner(cbs=On("before_turn", cancel)).fit(1))
    return team.gather(words)


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


def searches(folder):
    "What decides by one rank's losses is refused."
    lr_find(learner())


def balances(folder):
    learner(cbs=type("BoundaryEquilibrium", (Callback,), {})()).fit(1)


def killed(folder):
    def fault(learn):
        if learn.rank == 1 and learn.step == 3:
            import os

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
    learn.fit(steps=10**7)
    return told(learn, lr=learn.players[0].opt.param_groups[0]["lr"])


SCENARIOS = {f.__name__: f for f in (
    plain, adamw, accumulated, whole_numbers, random_samples, batches_in_a_list, unused, gan_every, gan_at_once, gan_penalty,
    gan_norms, looked, averaged, norms, early, stopped_by_one, steered, seldom, saved, resumed, calm, calm_resumed, missing,
    refused, all_cancel, fails, searches, balances, killed, endless)}  # fmt: skip


def main():
    faulthandler.dump_traceback_later(600, exit=True)  # nobody may be there any more who would end it
    folder, *names = sys.argv[1:]
    for name in names:
        found = SCENARIOS[name](Path(folder))
        from accelerate import PartialState

        if PartialState().is_main_process:
            torch.save(found, Path(folder, f"{name}.pt"))


if __name__ == "__main__":
    main()
