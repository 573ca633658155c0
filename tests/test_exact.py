"A run that was left and taken up again, or killed, or trained beside another, is bit for bit the run that was not."

import os
import random
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, WeightedRandomSampler
from ways import resumes, same, same_weights

from trainkit.callback import On
from trainkit.callbacks.average import EMA
from trainkit.callbacks.stopping import EarlyStopping
from trainkit.device import seed_everything
from trainkit.gan.learner import GANLearner
from trainkit.gan.penalties import GradientPenalty
from trainkit.learner import Learner
from trainkit.optim import OptimBuilder
from trainkit.seeds import unseeded

N = 22  # samples: 5 batches of 4, and one of 2
G = torch.Generator().manual_seed(0)
X = torch.randn(N, 3, generator=G)
Y = X.sum(1, keepdim=True).sin()


class Augmented(Dataset):
    "Rows with noise from all three generators."

    def __init__(self, targets=True):
        self.targets = targets

    def __len__(self):
        return N

    def __getitem__(self, i):
        x = X[i] + 0.1 * torch.randn(3) + 0.1 * np.random.normal() + 0.1 * random.gauss(0, 1)
        return (x.float(), Y[i]) if self.targets else x.float()


def net():
    return nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 1))


def loader(workers=0, sampler=None, data=None, **kw):
    return DataLoader(data or Augmented(), 4, shuffle=sampler is None, sampler=sampler, num_workers=workers, **kw)


def learner(run=None, train=None, opt="adamw", lr=0.01, **kw):
    seed_everything(0)
    valid = DataLoader(Augmented(), 16)
    dls = (loader() if train is None else train, valid)
    return Learner(net(), dls, "mse", OptimBuilder(opt, lr=lr, **kw.pop("plan", {})), run=run, front="none", **kw)


def gan(run=None, train=None, **kw):
    seed_everything(0)
    g, d = nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)), nn.Sequential(
        nn.Linear(3, 8), nn.LeakyReLU(0.2), nn.Dropout(0.1), nn.Linear(8, 1), nn.Flatten(0))  # fmt: skip
    terms = {"centre": (lambda r: r.fake.mean().square(), 0.5), "spread": lambda r: (r.fake.std() - 1).square()}
    train = loader(data=Augmented(targets=False)) if train is None else train
    more = {"loss": "wasserstein", "penalties": GradientPenalty(10.0), "generator_terms": terms, "n_critic": 5, "latent": 2}
    return GANLearner(g, d, train, opt=OptimBuilder("adam", lr=0.01), run=run, front="none", **{**more, **kw})


RUNS = {
    "supervised": learner,
    "a GAN with n_critic 5 and several terms": gan,
    "accumulation": lambda run=None: learner(run, accumulate=3),
    "EMA": lambda run=None: learner(run, cbs=[EMA(0.9)]),
    "cosine with restarts": lambda run=None: learner(
        run, plan={"schedule": {"name": "cosine_restarts", "cycles": 3}, "warmup": 2}),
    "plateau": lambda run=None: learner(
        run, plan={"schedule": {"name": "plateau", "monitor": "valid/loss", "factor": 0.5, "patience": 0, "threshold": 0.5}}),
    "early stopping": lambda run=None: learner(run, cbs=[EarlyStopping("valid/loss", patience=2, min_delta=0.2)]),
    "a seed of its own": lambda run=None: learner(run, seed=5),
    "everything": lambda run=None: gan(
        run, accumulate={"discriminator": 3}, seed=5, n_critic=2, cbs=[EMA(0.9, player="generator")]),
}  # fmt: skip


@pytest.mark.parametrize("kind", RUNS)
def test_left_and_taken_up(kind, tmp_path):
    "Inside the first epoch and the second, and between them; shuffled, with random transforms and dropout."
    long = kind == "early stopping"
    resumes(RUNS[kind], tmp_path, steps=60 if long else 16, at=(1, 5, 6, 10, 13))


def test_what_is_left_and_taken_up_does_something():
    "The plans above really plan: rates fall at a plateau and rise at a restart, early stopping stops, n_critic counts."
    runs = {kind: RUNS[kind]() for kind in ("plateau", "cosine with restarts", "early stopping")}
    for learn in runs.values():
        learn.fit(steps=60)
    rates = {kind: learn.history.scalars["lr/model"][1] for kind, learn in runs.items()}
    assert rates["plateau"][-1] < rates["plateau"][0] / 2
    assert (np.diff(rates["cosine with restarts"]) > 0).sum() >= 3  # two of the warm-up, one at each restart
    assert 13 < runs["early stopping"].step < 60


# --- data ------------------------------------------------------------------------------------------------------------


def weighted():
    return WeightedRandomSampler(torch.arange(1.0, N + 1), N)


class Stream(IterableDataset):
    "Rows through a buffer from which random ones are taken; it can tell its place."

    def __init__(self):
        self.at, self.buffer = 0, []

    def __iter__(self):
        while self.at < N or self.buffer:
            while self.at < N and len(self.buffer) < 6:
                self.buffer.append(self.at)
                self.at += 1
            i = self.buffer.pop(torch.randint(len(self.buffer), ()).item())
            yield X[i] + 0.1 * torch.randn(3), Y[i]
        self.at = 0

    def state_dict(self):
        return {"at": self.at, "buffer": list(self.buffer)}

    def load_state_dict(self, state):
        self.at, self.buffer = state["at"], list(state["buffer"])


class StatefulLoader:
    "A loader with the protocol of torchdata's StatefulDataLoader: shuffled anew each epoch, goes on from a loaded state."

    def __init__(self):
        self.order, self.i, self.loaded = None, 0, False

    def __len__(self):
        return 6

    def __iter__(self):
        if not self.loaded or self.order is None:
            self.order, self.i = torch.randperm(N).tolist(), 0
        self.loaded = False
        while self.i < N:
            rows = self.order[self.i : self.i + 4]
            self.i += 4
            yield X[rows] + 0.1 * torch.randn(len(rows), 3), Y[rows]
        self.order = None

    def state_dict(self):
        return {"order": self.order, "i": self.i}

    def load_state_dict(self, state):
        self.order, self.i, self.loaded = state["order"], state["i"], True


LOADERS = {
    "weighted": lambda: loader(sampler=weighted()),
    "a generator of its own": lambda: loader(generator=torch.Generator().manual_seed(3)),
    "2 workers": lambda: loader(2),
    "4 workers": lambda: loader(4),
    "2 persistent workers": lambda: loader(2, persistent_workers=True),
    "4 persistent workers, weighted": lambda: loader(4, weighted(), persistent_workers=True),
    "an iterable that tells its place": lambda: DataLoader(Stream(), 4),
    "an iterable without workers that starts anew": lambda: [(X[i : i + 4], Y[i : i + 4]) for i in range(0, N, 4)],
    "a stateful loader": StatefulLoader,
    "tensors": lambda: (X, Y),
    "kept out, without workers": lambda: unseeded(loader()),
    "kept out, 2 workers": lambda: unseeded(loader(2)),
}


def letting_go(learn):
    "Workers end with the fit: processes that others are forked beside are slow to end."
    learn.add(On("cleanup_fit", lambda learn: learn.stream.close()))
    return learn


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("kind", LOADERS)
def test_any_data_left_and_taken_up(kind, tmp_path):
    resumes(lambda run: letting_go(learner(run, LOADERS[kind]())), tmp_path, steps=13, at=(2, 6, 10))


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("before, after", [((0, False), (2, False)), ((2, False), (0, False)), ((2, True), (4, True))])
def test_left_with_so_many_workers_and_taken_up_with_others(before, after, tmp_path, recwarn):
    "Neither a bit nor a warning."
    def make(run):
        workers, persistent = (0, False) if run is None else after if run.exists() else before
        return letting_go(learner(run, loader(workers, persistent_workers=persistent)))

    resumes(make, tmp_path, steps=13, at=(2, 6, 10))
    assert not [str(w.message) for w in recwarn if "workers" in str(w.message)]


def test_random_transforms_of_what_is_validated_are_the_same_each_time(tmp_path):
    learn = learner()
    assert learn.validate() == learn.validate()
    persistent = learner(train=loader())
    own = DataLoader(Augmented(), 16, num_workers=2, persistent_workers=True)
    persistent.loaders.valid["valid"] = persistent.stream.beside(own, "valid")
    assert persistent.validate() == persistent.validate() == learn.validate()


# --- killed ----------------------------------------------------------------------------------------------------------

def to_be_killed(kind, run=None, **kw):
    "With two persistent workers, and gradients or turns that wait."
    train = loader(2, data=Augmented(kind == "learner"), persistent_workers=True)
    return gan(run, train, seed=4, n_critic=2, **kw) if kind == "gan" else learner(run, train, accumulate=3, **kw)


SCRIPT = """
import os, signal, sys, torch
sys.path.insert(0, {tests!r})
from test_exact import to_be_killed
from trainkit.callback import On

def kill(learn):
    if learn.step + 1 == at and learn.player is learn.players[0]:
        os.kill(os.getpid(), signal.SIGKILL)

if __name__ == "__main__":
    run, kind, at = sys.argv[1], sys.argv[2], int(sys.argv[3])
    learn = to_be_killed(kind, run, save_every=2)
    if learn.checkpoints:
        print("from step", learn.restore("last").step, flush=True)
    learn.add(On("after_backward", kill))
    learn.fit(steps=20) if learn.step == 0 else learn.fit()
    torch.save({{key: learn.state_dict()[key] for key in ("players", "rng", "position")}}, run + "/end.pt")
"""


@pytest.mark.parametrize("kind", [pytest.param("learner", marks=pytest.mark.slow), "gan"])
def test_killed_in_the_middle_of_a_step(kind, tmp_path):
    "SIGKILL between a backward and its step, in the first epoch and in the second; then to the end."
    script = tmp_path / "train.py"
    script.write_text(SCRIPT.format(tests=str(Path(__file__).parent)))

    def go(at):
        env = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent), "TRAINKIT_WHERE": "script"}
        with open(tmp_path / "said.txt", "w+") as said:  # not a pipe: workers of the killed one hold it open for a while
            done = subprocess.run([sys.executable, script, tmp_path / "run", kind, str(at)], env=env, timeout=120,
                                  stdout=said, stderr=subprocess.STDOUT)  # fmt: skip
        return done.returncode, Path(said.name).read_text()

    results = [go(at) for at in (5, 10, -1)]
    assert [code for code, _ in results] == [-signal.SIGKILL, -signal.SIGKILL, 0], results
    came_from = [int(re.search(r"from step (\d+)", said)[1]) for _, said in results[1:]]
    assert 0 < came_from[0] <= 4 < came_from[1] <= 9
    straight = letting_go(to_be_killed(kind))
    straight.fit(steps=20)
    killed = torch.load(tmp_path / "run" / "end.pt", weights_only=True)
    same({key: straight.state_dict()[key] for key in killed}, killed)


# --- two learners in one process -------------------------------------------------------------------------------------


def everything_of(learn):
    state = learn.state_dict()
    return {key: state[key] for key in ("players", "callbacks", "rng", "stream", "position")}


def alone(make, steps):
    seed_everything(1)
    learn = make()
    for n in steps:
        learn.fit(steps=n)
    return learn


TWO = {"one": lambda: learner(seed=5, cbs=[EMA(0.9)]), "other": lambda: gan(seed=6, n_critic=2)}


def test_two_learners_with_seeds_trained_in_turns():
    "With somebody who draws in between; each is what it is alone, and what is drawn in between is what it would be, too."
    steps = (3, 1, 4, 5)
    one, other = alone(TWO["one"], steps), alone(TWO["other"], steps)
    seed_everything(2)
    a, b = TWO["one"](), TWO["other"]()
    torch.manual_seed(3)
    between = []
    for n in steps:
        a.fit(steps=n)
        between.append(torch.rand(2))
        b.fit(steps=n)
        between.append(torch.rand(2))
        a.validate(), b.sample_fixed(4), a.state_dict()
    same(everything_of(one), everything_of(a))
    same(everything_of(other), everything_of(b))
    torch.manual_seed(3)
    same(torch.rand(2 * len(between)), torch.cat(between))


def test_one_learner_trained_inside_the_other():
    one, other = alone(TWO["one"], (8,)), alone(TWO["other"], (1,) * 8)
    a, b = TWO["one"](), TWO["other"]()
    a.add(On("after_forward", lambda learn: b.fit(steps=1)))
    a.fit(steps=8)
    same(everything_of(one), everything_of(a))
    same(everything_of(other), everything_of(b))


def test_a_learner_without_a_seed_shares_everybodys_random_state():
    "What `torch.manual_seed` says before a fit counts, as in any loop; with a seed it is the learner's own affair."
    def fit(shared, **kw):
        learn = learner(**kw)
        torch.manual_seed(shared)
        learn.fit(steps=4)
        return learn

    def loss(learn):
        return learn.history.scalars["train/loss"][1].tolist()

    first, again, other = fit(1), fit(1), fit(2)
    assert loss(first) == loss(again) != loss(other)
    own = [fit(n, seed=9) for n in (1, 2)]
    same_weights(*own)
    torch.manual_seed(7)
    expected = torch.rand(3)
    learn = learner(seed=9)
    torch.manual_seed(7)
    learn.fit(steps=2)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("how", ["stop", "error", "interrupt"])
def test_a_fit_that_ends_early_puts_the_random_state_back(how, monkeypatch):
    monkeypatch.setenv("TRAINKIT_WHERE", "notebook")
    learn = learner(seed=9)

    def act(learn):
        if how == "error":
            raise RuntimeError("enough")
        learn.stop() if how == "stop" else os.kill(os.getpid(), signal.SIGINT)

    learn.add(cb := On("after_batch", act))
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    try:
        learn.fit(steps=4)
    except RuntimeError:
        pass
    assert torch.equal(torch.rand(3), expected) and learn.step == 1
    learn.remove(cb)
    torch.rand(5)
    learn.fit()
    if how != "error":
        same_weights(learn, alone(lambda: learner(seed=9), (4,)))


def test_restoring_a_learner_with_a_seed_leaves_the_shared_state_alone(tmp_path):
    learn = learner(tmp_path / "run", seed=9)
    learn.fit(steps=3)
    learn.save()
    again = learner(tmp_path / "run", seed=10)
    torch.manual_seed(7)
    again.restore("last")
    drawn = torch.rand(3)
    torch.manual_seed(7)
    assert torch.equal(drawn, torch.rand(3))
    for x in (learn, again):
        x.fit(steps=5)
    same_weights(learn, again)


def test_the_seed_of_the_samples_comes_with_the_checkpoint(tmp_path):
    "Found at random by a learner without a seed, it belongs to the run."
    learn = learner(tmp_path / "run")
    learn.fit(steps=3)
    torch.manual_seed(98)
    again = Learner(net(), learn.loaders.train, "mse", OptimBuilder("adamw", lr=0.01), run=tmp_path / "run", front="none")
    assert again.stream.seed != learn.stream.seed
    again.restore("last")
    assert again.stream.seed == learn.stream.seed
