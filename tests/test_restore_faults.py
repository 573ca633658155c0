"A restore that can't be, and one that fails half-way: named, and nothing changed."

import copy

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from ways import same

from trainkit.callback import Callback
from trainkit.checkpoint import CheckpointError
from trainkit.learner import Learner
from trainkit.optim import OptimBuilder
from trainkit.state import PLAYER as KINDS
from trainkit.state import RestoreError, misshapen

X = torch.randn(24, 3, generator=torch.Generator().manual_seed(0))
Y = X.sum(1, keepdim=True)


class Keeps(Callback):
    n, fails = 0, False

    def after_step(self, learn):
        self.n += 1

    def state_dict(self):
        return {"n": self.n}

    def load_state_dict(self, state):
        if self.fails:
            raise OSError("mine")
        self.n = state["n"]


def learner(run):
    torch.manual_seed(0)
    dls = DataLoader(TensorDataset(X, Y), batch_size=4, shuffle=True)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    opt = OptimBuilder("adamw", lr=0.1, schedule="cosine", total=100)
    return Learner(model, dls, "mse", opt, cbs=Keeps(), front="none", run=run)


@pytest.fixture
def learn(tmp_path):
    learn = learner(tmp_path / "run")
    learn.fit(epochs=2)
    return learn


def cut(*path):
    def change(state):
        for key in path[:-1]:
            state = state[key]
        del state[path[-1]]

    return change


def put(value, *path):
    def change(state):
        for key in path[:-1]:
            state = state[key]
        state[path[-1]] = value

    return change


PLAYER = ("players", "model")
CHANGES = {
    **{f"without {p}": (cut(p), f"{p} is missing") for p in ("players", "position", "stream", "callbacks", "history", "rng")},
    **{f"without a player's {p}": (cut(*PLAYER, p), f"{p} is missing") for p in
       ("modules", "losses", "optimizer", "schedules", "optimizer_class", "terms", "said", "weights", "window", "gradients")},
    "a step that is text": (put("x", "position", "step"), "position's step is 'x'"),
    "a step below 0": (put(-4, "position", "step"), "position's step is -4"),
    "averages of another shape": (put(torch.zeros(7), *PLAYER, "optimizer", "state", 0, "exp_avg"), "exp_avg of a parameter"),
    "averages that are text": (put("x", *PLAYER, "optimizer", "state", 0, "exp_avg"), "exp_avg of a parameter of shape"),
    "betas that are text": (put("xy", *PLAYER, "optimizer", "param_groups", 0, "betas"), "betas is 'xy'"),
    "a rate that is text": (put("xy", *PLAYER, "optimizer", "param_groups", 0, "lr"), "lr is 'xy'"),
    "no players": (put({}, "players"), "players: the checkpoint has"),
    "players that are none": (put(3, "players"), "players is a int"),
    "a weight of another shape": (put(torch.zeros(2), *PLAYER, "modules", "model", "0.bias"), "0.bias"),
    "another schedule": (put({}, *PLAYER, "schedules"), "the schedule was"),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_a_state_that_is_none_of_ours(learn, name):
    change, message = CHANGES[name]
    state, before = copy.deepcopy(learn.state_dict()), copy.deepcopy(learn.state_dict())
    change(state)
    with pytest.raises(RestoreError, match=message):
        learn.load_state_dict(state)
    same(before, learn.state_dict())
    learn.fit(steps=2)


@pytest.mark.parametrize("state", [{}, [], None, 5, "x"])
def test_no_state_at_all(learn, state):
    assert misshapen(state)
    with pytest.raises(RestoreError, match="the state|is missing"):
        learn.load_state_dict(state)


PARTS = ["trainkit.state.load_player", "trainkit.randomness.set_rng_state", "trainkit.data.BatchStream.load_state_dict",
         "trainkit.history.History.load_state_dict", "trainkit.learner.Learner.go_to"]  # fmt: skip


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("error", [OSError("broken"), KeyboardInterrupt()])
def test_a_restore_that_fails_at_any_part_changes_nothing(learn, part, error, monkeypatch):
    entry = learn.checkpoints.list()[0]
    before = copy.deepcopy(learn.state_dict())
    calls = []
    owner, name = part.rsplit(".", 1)
    import pkgutil

    real = pkgutil.resolve_name(owner + ":" + name) if owner.islower() else getattr(pkgutil.resolve_name(owner), name)

    def fails_once(*args):
        calls.append(args)
        if len(calls) == 1:
            raise error
        return real(*args)

    monkeypatch.setattr(part, fails_once)
    with pytest.raises(KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else RestoreError):
        learn.restore(entry)
    monkeypatch.undo()
    after = learn.state_dict()
    for key in ("players", "position", "stream", "callbacks", "rng"):
        same(before[key], after[key], key)
    learn.restore(entry)
    assert learn.step == entry.step


def test_a_callback_that_can_never_load_is_said_and_passed_over(learn):
    entry = learn.checkpoints.list()[0]
    keeps = learn.cbs.get(Keeps)
    before, weight = copy.deepcopy(learn.state_dict()), learn.model[0].weight.clone()
    keeps.fails = True
    with pytest.raises(RestoreError, match="mine"), pytest.warns(UserWarning, match="could not be put back: mine"):
        learn.restore(entry)
    assert torch.equal(weight, learn.model[0].weight) and learn.step == 12
    same(before["rng"], learn.state_dict()["rng"])


def test_a_branch_that_cannot_be_saved_is_none(learn, monkeypatch, tmp_path):
    before, run = copy.deepcopy(learn.state_dict()), learn.run
    monkeypatch.setattr("trainkit.storage.os.replace", lambda *a: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(CheckpointError, match="No space left"):
        learn.branch(6, "other")
    monkeypatch.undo()
    assert learn.run == run and not (tmp_path / "other").exists() and learn.step == 12
    for key in ("players", "position", "callbacks", "rng"):
        same(before[key], learn.state_dict()[key], key)
    learn.fit(steps=6)
    assert learn.checkpoints.find("last").step == 18


def test_every_part_of_a_player_is_looked_for():
    "What `player_state` keeps and what a state is judged by are the same; nothing else may be missing unnoticed."
    learn = Learner(torch.nn.Linear(2, 1), (torch.ones(8, 2), torch.ones(8, 1)), "mse", front="none")
    learn.fit(1)
    state = learn.state_dict()
    kept = state["players"]["model"]
    assert {key: type(value) for key, value in kept.items()} == KINDS
    for key in KINDS:
        assert misshapen({**state, "players": {"model": {k: v for k, v in kept.items() if k != key}}})
