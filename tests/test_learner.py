"The loop's contract: what happens at every event, for every way of ending, with every kind of data."

import copy
import os
import random
import re
import signal
import subprocess
import sys
import threading
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from trainkit.callback import (
    EVENTS,  # fmt: skip
    FIT,
    PREDICT,
    TEST,
    Callback,
    CancelBatch,
    CancelEpoch,
    CancelFit,
    CancelPause,
    CancelTurn,
    CancelValidate,
    On,
)
from trainkit.checkpoint import CheckpointError, Checkpoints
from trainkit.learner import Learner, Target
from trainkit.optim import OptimBuilder
from trainkit.player import Player

X = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
Y = X.sum(1, keepdim=True)


class Net(nn.Module):
    "Dropout (a mode and a random state), batch norm (buffers), and a bias its owner froze."

    def __init__(self):
        super().__init__()
        self.norm, self.drop, self.out = nn.BatchNorm1d(3), nn.Dropout(0.2), nn.Linear(3, 1)
        self.out.bias.requires_grad_(False)

    def forward(self, x):
        return self.out(self.drop(self.norm(x)))


def learner(cls=Learner, *, model=None, dls=None, **kw):
    torch.manual_seed(0)
    model = Net() if model is None else model
    dls = DataLoader(TensorDataset(X, Y), batch_size=8, shuffle=True) if dls is None else dls
    kw = {"loss": "mse", "opt": OptimBuilder("adamw", lr=0.01), "front": "none"} | kw
    return cls(model, dls, **kw)


def fresh_and(steps, **kw):
    learn = learner(**kw)
    learn.fit(steps=steps)
    return learn


class TwoPlayers(Learner):
    def training_step(self, batch):
        a, b = (player.modules[player.name] for player in self.players)
        x, y = batch
        loss = F.mse_loss(a(x), y) if self.player.name == "a" else F.mse_loss(b(a(x)), y)
        return {"fit": loss, "small": 1e-3 * sum(p.square().sum() for p in self.player.parameters())}

    def validation_step(self, batch):
        self.pred = self.players[0].modules["a"](batch[0])
        return F.mse_loss(self.pred, batch[1])


def two_players(**kw):
    torch.manual_seed(0)
    valid = DataLoader(TensorDataset(X, Y), batch_size=16)
    dls = (DataLoader(TensorDataset(X, Y), batch_size=8, shuffle=True), valid)
    players = [Player("a", Net(), opt="sgd"), Player("b", nn.Sequential(nn.Linear(1, 1), nn.Dropout(0.1)), every=2)]
    return TwoPlayers(players, dls, front="none", **kw)


def weights(learn):
    return {f"{p.name}.{n}": v.clone() for p in learn.players for m in p.modules.values() for n, v in m.state_dict().items()}


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


class Record(Callback):
    "Every event in order."

    order = -100

    def __init__(self):
        self.seen = []
        for event in EVENTS:
            setattr(self, event, lambda learn, event=event: self.seen.append(event))


# ---------------------------------------------------------------------------------------------------- order of events


def expected(scope, counts, inside=None):
    "The events of a scope by the table: `counts[name]` times the scopes of that name."
    out = []
    for _ in range(counts.get(scope.name, 1)):
        out.append(f"before_{scope.name}")
        batch = [i for i in scope.inside if isinstance(i, str) and i in EVENTS]
        if scope.name in ("validate", "test", "predict"):
            out += batch * counts[scope.name + "_batches"]
        else:
            for item in scope.inside:
                if isinstance(item, str):
                    out += [item] if item in EVENTS and item != "after_command" else []  # nobody sends any
                else:
                    out += expected(item, counts)
        out += [f"after_{scope.name}", f"cleanup_{scope.name}"]
    return out


def test_the_loop_is_the_table():
    dls = (DataLoader(TensorDataset(X, Y), batch_size=8), DataLoader(TensorDataset(X, Y), batch_size=16))
    learn = learner(dls=dls, cbs=[record := Record()])
    learn.fit(epochs=2)
    assert record.seen == expected(FIT, {"epoch": 2, "batch": 5, "validate_batches": 3, "pause": 0})
    record.seen.clear()
    learn.test(dls[1])
    assert record.seen == expected(TEST, {"test_batches": 3})
    record.seen.clear()
    learn.predict(dls[1])
    assert record.seen == expected(PREDICT, {"predict_batches": 3})


def test_each_player_has_its_turn():
    learn = two_players(cbs=[On("before_turn", lambda learn: turns.append((learn.step, learn.player.name)))])
    turns = []
    learn.fit(steps=4)
    assert turns == [(0, "a"), (1, "a"), (1, "b"), (2, "a"), (3, "a"), (3, "b")]


# ---------------------------------------------------------------------------------------------- every way of ending

CANCEL = {"turn": CancelTurn, "pause": CancelPause, "batch": CancelBatch, "epoch": CancelEpoch, "validate": CancelValidate,
          "fit": CancelFit}  # fmt: skip
IN_TURN = ("after_forward", "after_loss", "before_backward", "after_backward", "before_step", "after_step")
INSIDE = dict.fromkeys(IN_TURN, "turn") | dict.fromkeys(("before_validate_batch", "after_validate_batch"), "validate")
INSIDE["after_command"] = "command"
FIT_EVENTS = [text for _, text in FIT.rows() if text in EVENTS]
OUTER = {"turn": ["turn", "batch", "epoch", "fit"], "batch": ["batch", "epoch", "fit"], "epoch": ["epoch", "fit"],
         "validate": ["validate", "epoch", "fit"], "pause": ["pause", "epoch", "fit"], "command": ["epoch", "fit"],
         "fit": ["fit"]}  # fmt: skip


def level(event):
    return INSIDE.get(event) or event.split("_", 1)[1]


class Bomb(Callback):
    "Raises at the n-th occurrence of an event."

    many = True

    def __init__(self, event, error, n=1):
        self.error, self.left, self.fired = error, n, False
        setattr(self, event, self.act)

    def act(self, learn):
        self.left -= 1
        if self.left == 0:
            self.fired = True
            raise self.error


class Nap(Callback):
    "Holds the run after its first steps, and lets it go on."

    def after_batch(self, learn):
        if learn.step in (1, 2):
            learn.send("pause")

    def before_pause(self, learn):
        learn.send("resume")


def assert_fresh(learn, modes, flags, handler):
    "Modes, frozen flags, gradients, autocast, signal handler, hooks are as a fresh learner's."
    modules = [m for p in learn.players for m in p.modules.values()]
    assert [m.training for module in modules for m in module.modules()] == modes
    assert [p.requires_grad for module in modules for p in module.parameters()] == flags
    assert all(p.grad is None for module in modules for p in module.parameters())
    assert not torch.is_autocast_enabled("cpu")
    assert torch.is_grad_enabled()
    assert signal.getsignal(signal.SIGINT) is handler
    assert not any(m._forward_hooks or m._forward_pre_hooks for module in modules for m in module.modules())
    assert learn.player is None and learn.loss is None and learn.pred is None
    assert learn.state in ("finished", "stopped", "interrupted", "failed")


def run_with(event, error, n, where, monkeypatch):
    monkeypatch.setenv("TRAINKIT_WHERE", where)
    learn = two_players(precision="bf16")
    modules = [m for p in learn.players for m in p.modules.values()]
    modules[0].drop.eval()  # a mode its owner chose
    modes = [m.training for module in modules for m in module.modules()]
    flags = [p.requires_grad for module in modules for p in module.parameters()]
    handler = signal.getsignal(signal.SIGINT)
    learn.add(record := Record(), bomb := Bomb(event, error, n), Nap())
    caught = None
    try:
        learn.fit(epochs=3)
    except BaseException as e:  # noqa: BLE001
        caught = e
    assert bomb.fired
    assert_fresh(learn, modes, flags, handler)
    for name in CANCEL:
        entered, cleaned = record.seen.count(f"before_{name}"), record.seen.count(f"cleanup_{name}")
        assert entered == cleaned, f"{name}: entered {entered} times, cleaned up {cleaned} times"
    return learn, record, caught


def assert_goes_on(learn):
    before, step = weights(learn), learn.step
    learn.remove("Bomb")
    learn.fit(steps=3)
    assert (learn.state, learn.step) == ("finished", step + 3)
    assert not torch.equal(before["a.out.weight"], weights(learn)["a.out.weight"])


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("event", FIT_EVENTS)
def test_exception_at_every_event(event, n, monkeypatch):
    n = 1 if level(event) == "fit" else n
    learn, _, caught = run_with(event, RuntimeError("boom"), n, "notebook", monkeypatch)
    assert isinstance(caught, RuntimeError) and str(caught) == "boom"
    assert learn.state == "failed" and learn.error is caught
    assert any(m.kind == "failed" and "boom" in m.text for m in learn.history.marks)
    assert_goes_on(learn)


@pytest.mark.parametrize("where", ["notebook", "script"])
@pytest.mark.parametrize("event", FIT_EVENTS)
def test_interrupt_at_every_event(event, where, monkeypatch):
    learn, _, caught = run_with(event, KeyboardInterrupt(), 1, where, monkeypatch)
    assert learn.state == "interrupted" and learn.error is None
    assert (caught is None) if where == "notebook" else isinstance(caught, KeyboardInterrupt)
    assert_goes_on(learn)


@pytest.mark.parametrize("event,scope", [(e, s) for e in FIT_EVENTS for s in OUTER[level(e)]])
def test_cancel_at_every_event(event, scope, monkeypatch):
    learn, record, caught = run_with(event, CANCEL[scope](), 1, "script", monkeypatch)
    assert caught is None
    assert learn.state == ("stopped" if scope == "fit" else "finished")
    if scope != "fit":
        assert learn.epoch == 3
        lost = 0  # steps that the cancelled epoch did not make: it was cancelled before its first, after it, or at its end
        if scope == "epoch":
            lost = 5 if event == "before_epoch" else 4 if level(event) in ("turn", "batch", "pause", "command") else 0
        assert learn.step == 15 - lost
    if event not in (f"after_{scope}", f"cleanup_{scope}"):
        assert record.seen.count(f"after_{scope}") == record.seen.count(f"before_{scope}") - 1
    assert_goes_on(learn)


def test_a_cancel_outside_its_scope_is_an_error():
    learn = learner(cbs=[Bomb("before_fit", CancelBatch())])
    with pytest.raises(CancelBatch):
        learn.fit(1)
    assert learn.state == "failed"


def test_cleanup_failure_while_failing_keeps_both():
    learn = learner(cbs=[Bomb("after_loss", ValueError("first")), Bomb("cleanup_batch", KeyError("second"))])
    with pytest.raises(KeyError) as caught:
        learn.fit(1)
    assert isinstance(caught.value.__context__, ValueError)


def test_always_cancelled_epochs_end():
    class Never(Callback):
        def before_epoch(self, learn):
            raise CancelEpoch

    learn = learner(cbs=[Never()])
    learn.fit(epochs=3)
    assert (learn.epoch, learn.step) == (3, 0)
    with pytest.raises(RuntimeError, match="no step"):
        learn.fit(steps=3)


# -------------------------------------------------------------------------------------------------- real interrupts


def interrupt_at(step, times=1):
    def act(learn):
        if learn.step == step:
            for _ in range(times):
                os.kill(os.getpid(), signal.SIGINT)

    return On("before_step", act)


def test_first_interrupt_finishes_the_step(monkeypatch):
    monkeypatch.setenv("TRAINKIT_WHERE", "notebook")
    straight = fresh_and(15)
    learn = learner(cbs=[interrupt_at(7)])
    learn.fit(epochs=3)
    assert (learn.state, learn.step, learn.epoch, learn.batch_idx) == ("interrupted", 8, 1, 3)
    learn.remove("On")
    learn.fit()
    assert (learn.state, learn.step, learn.epoch) == ("finished", 15, 3)
    assert_same(weights(learn), weights(straight))
    assert learn.history.scalars["train/loss"][1].tolist() == straight.history.scalars["train/loss"][1].tolist()


def test_second_interrupt_stops_at_once_and_a_script_ends(monkeypatch):
    monkeypatch.setenv("TRAINKIT_WHERE", "script")
    learn = learner(cbs=[interrupt_at(7, times=2)])
    with pytest.raises(KeyboardInterrupt):
        learn.fit(epochs=3)
    assert (learn.state, learn.step, learn.broken) == ("interrupted", 8, True)  # the broken batch counts
    learn = learner(cbs=[interrupt_at(7)])
    with pytest.raises(KeyboardInterrupt):
        learn.fit(epochs=3)
    assert (learn.state, learn.step) == ("interrupted", 8)


def test_an_interrupt_while_the_views_are_loading(monkeypatch):
    monkeypatch.setenv("TRAINKIT_WHERE", "notebook")
    learn = learner()
    monkeypatch.setattr(learn, "_attach_front", lambda: os.kill(os.getpid(), signal.SIGINT))
    learn.fit(1)
    assert (learn.state, learn.step) == ("interrupted", 0)
    monkeypatch.undo()
    learn.fit()
    assert (learn.state, learn.step) == ("finished", 5)


def test_a_refused_fit_inside_a_fit_does_not_end_it():
    def act(learn):
        with pytest.raises(RuntimeError, match="one fit at a time"):
            learn.fit(1)
        learn.stop()

    learn = learner(cbs=[On("after_batch", lambda learn: act(learn) if learn.step == 2 else None)])
    learn.fit(1)
    assert (learn.state, learn.step) == ("stopped", 2)


def test_interrupt_inside_the_optimizer_is_said(monkeypatch):
    monkeypatch.setenv("TRAINKIT_WHERE", "notebook")

    class Torn(torch.optim.SGD):
        def step(self, closure=None):
            super().step()
            raise KeyboardInterrupt

    learn = learner(opt=OptimBuilder(Torn, lr=0.1))
    with pytest.warns(UserWarning, match="inside the optimizer step of 'model'"):
        learn.fit(1)
    assert learn.torn == "model" and learn.broken


def test_stop_from_another_thread_and_from_a_callback():
    learn = learner(dls=[(X, Y)] * 1000)
    threading.Timer(0.2, learn.stop).start()
    learn.fit(epochs=1000)
    assert learn.state == "stopped" and 0 < learn.step < 10**6
    learn = learner(cbs=[On("after_epoch", lambda learn: learn.stop())])
    learn.fit(epochs=5)
    assert (learn.state, learn.epoch, learn.batch_idx) == ("stopped", 1, 0)
    learn.fit()
    assert learn.epoch == 2


def test_stop_during_validation_validates_again():
    class StopOnce(Callback):
        def before_validate_batch(self, learn):
            if learn.epoch == 0 and not getattr(self, "done", False):
                self.done = True
                learn.stop()

    learn = two_players(cbs=[StopOnce(), record := Record()])
    learn.fit(epochs=2)
    assert (learn.state, learn.epoch, learn.step, learn.drawn) == ("stopped", 0, 5, True)
    learn.fit()
    assert (learn.state, learn.epoch, learn.step) == ("finished", 2, 10)
    assert record.seen.count("after_validate") == 2


def validated():
    return DataLoader(TensorDataset(X, Y), batch_size=8), DataLoader(TensorDataset(X, Y), batch_size=16)


@pytest.mark.parametrize("ending", ["stopped", "interrupted", "failed"])
def test_looking_after_every_ending(ending, monkeypatch):
    monkeypatch.setenv("TRAINKIT_WHERE", "notebook")
    learn = learner(dls=validated())
    act = {"stopped": lambda learn: learn.stop(), "interrupted": lambda learn: os.kill(os.getpid(), signal.SIGINT),
           "failed": lambda learn: 1 / 0}[ending]  # fmt: skip
    learn.add(On("after_batch", lambda learn: act(learn) if learn.step == 3 else None))
    try:
        learn.fit(1)
    except ZeroDivisionError:
        pass
    assert learn.state == ending
    assert learn.validate()["valid/loss"] > 0 and len(learn.test(X_Y := [(X, Y)])) == 1 and learn.predict(X).shape == (40, 1), X_Y
    assert [m.kind for m in learn.history.marks if m.kind == ending] == [ending]


def test_a_stop_while_nothing_runs_is_nothing():
    learn = learner(dls=validated())
    learn.stop()
    learn.validate()
    learn.fit(1)
    assert learn.state == "finished"


def once(event, act):
    "A callback that acts the first time only."
    done = []
    return On(event, lambda learn: None if done else (done.append(1), act(learn)))


def test_stop_in_a_validation_with_a_schedule_goes_on():
    learn = learner(dls=validated(), opt=OptimBuilder("sgd", lr=0.1, schedule="cosine"))
    learn.add(once("after_validate_batch", lambda learn: learn.stop()))
    learn.fit(epochs=2)
    assert (learn.step, learn.drawn) == (5, True)
    learn.fit()
    assert (learn.state, learn.step, learn.fit_steps, learn.players[0].schedule.update) == ("finished", 10, 5, 10)


def test_an_owed_validation_is_made():
    learn = learner(dls=validated(), cbs=[once("after_validate_batch", lambda learn: learn.stop())])
    learn.fit(steps=8, validate_every=4)
    assert (learn.state, learn.step, learn.owed) == ("stopped", 4, True)
    learn.fit()
    assert (learn.state, learn.step) == ("finished", 8)
    assert learn.history.scalars["valid/loss"][0].tolist() == [4, 8]
    last = learner(dls=validated(), cbs=[once("after_validate_batch", lambda learn: learn.stop())])
    last.fit(steps=8, validate_every=8)
    assert (last.state, last.step) == ("stopped", 8)
    last.fit()
    assert (last.state, last.step, last.history.scalars["valid/loss"][0].tolist()) == ("finished", 8, [8])


def test_an_epoch_whose_batches_are_done_is_no_more_an_epoch_to_train():
    learn = learner(dls=validated(), cbs=[once("after_validate_batch", lambda learn: learn.stop())])
    learn.fit(epochs=1)
    assert learn.drawn
    learn.fit(epochs=1)
    assert (learn.step, learn.epoch) == (10, 2)


def test_fit_without_arguments_keeps_how_it_was_asked(tmp_path):
    learn = learner(dls=validated(), run=tmp_path / "run", opt=OptimBuilder("sgd", lr=0.1, schedule="linear"))
    learn.fit(steps=4)
    learn.add(stop := On("after_batch", lambda learn: learn.stop() if learn.step == 6 else None))
    learn.fit(steps=8, validate_every=2, schedule="hold")
    learn.remove(stop)
    again = learner(dls=validated(), run=tmp_path / "run", opt=OptimBuilder("sgd", lr=0.1, schedule="linear"))
    again.restore()
    for one in learn, again:
        one.fit()
        assert one.step == 12 and one.history.scalars["valid/loss"][0].tolist()[-4:] == [6, 8, 10, 12]


def test_a_hard_ending_inside_a_round_counts_the_batch_and_saves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("TRAINKIT_WHERE", "notebook")
    learn = two_players(run=tmp_path / "run")
    learn.add(Bomb("before_step", KeyboardInterrupt(), 4))  # a a b* : in b's turn of the second batch it has moved thrice
    learn.fit(epochs=1)
    assert (learn.state, learn.broken, len(learn.checkpoints)) == ("interrupted", True, 0)
    learn.remove("Bomb")
    learn.fit()
    assert (learn.state, learn.step, learn.epoch) == ("finished", 5, 1)
    steps = learn.history.scalars["train/a/loss"][0].tolist()
    assert steps == sorted(set(steps))


def test_a_part_in_eval_mode_stays_in_it():
    net = Net()
    net.norm.eval()
    before = net.norm.running_mean.clone()
    learn = learner(model=net)
    learn.fit(1)
    assert torch.equal(net.norm.running_mean, before) and not net.norm.training and net.training
    net.eval()
    learn.fit(1)
    assert not torch.equal(net.norm.running_mean, before) and not net.training


# ------------------------------------------------------------------------------------------------ how long a fit is


@pytest.mark.parametrize("pieces", [[15], [1] * 15, [4, 11], [5, 10], [7, 8]])
def test_pieces_are_the_whole(pieces):
    straight = learner()
    straight.fit(epochs=3)
    learn = learner()
    for n in pieces:
        learn.fit(steps=n)
        assert learn.state == "finished"
    assert (learn.step, learn.epoch) == (15, 3)
    assert_same(weights(learn), weights(straight))
    for a, b in zip(learn.history.scalars["train/loss"], straight.history.scalars["train/loss"]):
        assert a.tolist() == b.tolist()


def test_an_open_epoch_is_finished_first():
    learn = learner()
    learn.fit(steps=7)
    learn.fit(epochs=1)
    assert (learn.step, learn.epoch) == (10, 2)


def test_nothing_to_do():
    learn = learner(cbs=[record := Record()])
    learn.fit(0)
    learn.fit(steps=0)
    assert (learn.step, learn.state, record.seen) == (0, "idle", [])
    with pytest.raises(ValueError, match="no open fit to go on with"):
        learn.fit()


@pytest.mark.parametrize("kw,message", [
    ({"epochs": -1}, r"epochs=…\) takes a whole number >= 0; received -1"), ({"steps": 2.5}, "received 2.5"),
    ({"epochs": "3"}, "received '3'"), ({"epochs": True}, "received True"), ({"epochs": 1, "steps": 1}, "not both"),
    ({"epochs": 1, "validate_every": 0}, "validate_every"), ({"epochs": 1, "schedule": "again"}, "received 'again'"),
])  # fmt: skip
def test_bad_lengths(kw, message):
    learn = learner()
    with pytest.raises(ValueError, match=message):
        learn.fit(**kw)
    assert (learn.step, learn.state, learn.target) == (0, "idle", Target())


def test_fit_inside_fit_is_refused():
    learn = learner(cbs=[On("after_batch", lambda learn: learn.fit(1))])
    with pytest.raises(RuntimeError, match="one fit at a time"):
        learn.fit(1)


def test_validate_every():
    dls = (DataLoader(TensorDataset(X, Y), batch_size=8), DataLoader(TensorDataset(X, Y), batch_size=16))
    learn = learner(dls=dls)
    learn.fit(steps=12, validate_every=4)
    assert learn.history.scalars["valid/loss"][0].tolist() == [4, 8, 12]


# ----------------------------------------------------------------------------------------------------- kinds of data


class NoLen(IterableDataset):
    def __iter__(self):
        yield from zip(X, Y)


def forever():
    while True:
        yield X[:8], Y[:8]


class DictNet(Net):
    def forward(self, x, scale=1.0):
        return super().forward(x) * scale


KINDS = {
    "loader": (lambda: DataLoader(TensorDataset(X, Y), batch_size=8), 5),
    "partial last batch": (lambda: DataLoader(TensorDataset(X, Y), batch_size=16), 3),
    "drop_last": (lambda: DataLoader(TensorDataset(X, Y), batch_size=16, drop_last=True), 2),
    "dataset": (lambda: TensorDataset(X, Y), 1),
    "tensors": (lambda: (X, Y), 1),
    "arrays": (lambda: (X.numpy(), Y.numpy()), 1),
    "float64 arrays": (lambda: (X.double().numpy(), Y.double().numpy()), 1),
    "list of batches": (lambda: [(X[:8], Y[:8]), (X[8:], Y[8:])], 2),
    "batches of arrays": (lambda: [(X[:8].numpy(), Y[:8].numpy())], 1),
    "no length": (lambda: DataLoader(NoLen(), batch_size=8), 5),
    "workers": (lambda: DataLoader(TensorDataset(X, Y), batch_size=8, num_workers=1), 5),
    "dict batches": (lambda: [{"x": X, "y": Y}], 1),
    "dict batches with keywords": (lambda: [{"x": X, "scale": torch.tensor(2.0), "target": Y}], 1),
    "labels in a list": (lambda: [[X, Y]], 1),
}


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_data(kind):
    make, steps = KINDS[kind]
    learn = learner(model=DictNet(), dls=make())
    before = weights(learn)
    learn.fit(epochs=2)
    assert (learn.step, learn.epoch, learn.state) == (2 * steps, 2, "finished")
    assert not torch.equal(before["model.out.weight"], weights(learn)["model.out.weight"])


def test_infinite_loader_by_steps():
    learn = learner(dls=forever())
    learn.fit(steps=7)
    learn.fit(steps=5)
    assert (learn.step, learn.epoch) == (12, 0)


def test_generator_serves_one_epoch_and_then_says_so():
    learn = learner(dls=((X[:8], Y[:8]) for _ in range(3)))
    learn.fit(1)
    assert learn.step == 3
    with pytest.raises(ValueError, match="once"):
        learn.fit(1)


@pytest.mark.parametrize("dls", [[], DataLoader(TensorDataset(X[:3], Y[:3]), batch_size=8, drop_last=True), iter(())])
def test_empty_loader(dls):
    with pytest.raises(ValueError, match="empty|no batch|used up"):
        learner(dls=dls).fit(1)


def test_no_loader():
    learn = Learner(Net(), loss="mse", front="none")
    with pytest.raises(ValueError, match="no training loader"):
        learn.fit(1)
    assert learn.predict(X).shape == (40, 1)


def test_unlabelled_batches():
    with pytest.raises(ValueError, match=r"has no target.*split"):
        learner(dls=[X[:8], X[8:16]]).fit(1)
    auto = learner(model=nn.Linear(3, 3), dls=[X[:8], X[8:16]], split=lambda x: ((x,), {}, (x,)))
    auto.fit(1)
    assert auto.step == 2


def test_items_that_are_no_tensors():
    class Named(Learner):
        def training_step(self, batch):
            assert batch["name"] == ["a", "b"]
            return F.mse_loss(self.model(batch["x"]), batch["y"])

    learn = learner(Named, dls=[{"x": X[:2], "y": Y[:2], "name": ["a", "b"]}])
    learn.fit(1)
    assert learn.step == 1


# ------------------------------------------------------------------------------------------------- losses and metrics


@pytest.mark.parametrize("loss", ["mse", F.mse_loss, nn.MSELoss(), lambda p, y: ((p - y) ** 2).mean(), ["mse"],
                                  [("half", F.mse_loss, 0.5), ("other", "mse", 0.5)]])  # fmt: skip
def test_losses_of_every_kind(loss):
    learn, reference = fresh_and(5, loss=loss), fresh_and(5)
    for a, b in zip(weights(learn).values(), weights(reference).values()):
        torch.testing.assert_close(a, b)


def test_terms_are_recorded_and_weighted():
    learn = learner(loss={"l1": "l1", "l2": (F.mse_loss, 0.1)})
    learn.fit(1)
    s = {k: v[1] for k, v in learn.history.scalars.items()}
    np.testing.assert_allclose(s["train/loss"], s["train/l1"] + 0.1 * s["train/l2"], rtol=1e-5)


def test_a_callback_may_change_the_loss():
    learn = learner(cbs=[On("after_loss", lambda learn: setattr(learn, "loss", learn.loss * 0))])
    before = learn.model.out.weight.clone()
    learn.players[0].opt.param_groups[0]["weight_decay"] = 0
    learn.fit(1)
    assert torch.equal(learn.model.out.weight, before)
    assert learn.history.last("train/loss") == 0


@pytest.mark.parametrize("step,message", [
    (lambda learn, b: None, "must be a tensor; received None"), (lambda learn, b: {}, "returned no loss"),
    (lambda learn, b: learn.model(b[0]), r"shape \(8, 1\)"),
    (lambda learn, b: learn.model(b[0]).mean().detach(), "does not depend on any trainable parameter"),
])  # fmt: skip
def test_bad_losses(step, message):
    with pytest.raises(ValueError, match=message):
        Learner(Player("net", Net(), step=step), [(X[:8], Y[:8])], front="none").fit(1)


def test_validation_is_weighted_by_batch_size_and_changes_nothing():
    class Noisy:  # an observer that draws random numbers
        def __call__(self, pred, target):
            torch.rand(3), np.random.rand(3), random.random()
            return (pred - target).abs().mean()

    def run(valid):
        dls = (DataLoader(TensorDataset(X, Y), batch_size=8, shuffle=True), valid)
        learn = learner(dls=dls, metrics={"mae": Noisy()}) if valid else learner(dls=dls[0])
        learn.fit(epochs=3)
        return learn

    valid = DataLoader(TensorDataset(X, Y), batch_size=16, shuffle=True)  # 16 + 16 + 8
    watched, alone = run(valid), run(None)
    assert_same(weights(watched), weights(alone))
    with torch.no_grad():
        pred = watched.model.eval()(X)
    assert watched.history.last("valid/loss") == pytest.approx(F.mse_loss(pred, Y).item(), rel=1e-5)
    assert watched.history.last("valid/mae") == pytest.approx((pred - Y).abs().mean().item(), rel=1e-5)


def test_observers_leave_gradients_alone():
    learn = learner(dls=validated(), metrics=["mae"])
    for p in learn.model.parameters():
        p.grad = torch.full_like(p, 3.0)
    learn.validate(), learn.test([(X, Y)]), learn.predict(X)
    assert all(torch.equal(p.grad, torch.full_like(p, 3.0)) for p in learn.model.parameters())
    assert learn.batch is None and learn.pred is None


def test_observers_leave_masks_alone():
    mask = torch.tensor([[1.0], [0.0]]).repeat(20, 1)

    class Masked(Learner):
        def validation_step(self, batch):
            x, y, m = batch
            self.pred = self.model(x)
            return {"loss": ((self.pred - y) * m).abs().sum() / m.sum()}

    dls = {"train": (X, Y), "valid": [(X, Y, mask)]}
    learn = learner(Masked, dls=dls, split=lambda b: ((b[0],), {}, (b[1],)), metrics=["mse"])
    before = mask.clone(), X.clone(), Y.clone()
    learn.fit(2)
    assert all(torch.equal(a, b) for a, b in zip(before, (mask, X, Y)))


def test_several_validation_loaders_and_one_score():
    class Scored(Learner):
        def validation_step(self, batch):
            self.pred = self.model(batch[0])
            return {"mae": (self.pred - batch[1]).abs().mean(), "outputs": self.pred}

        def validation_epoch_end(self, outputs):
            return sum(torch.cat([o["outputs"] for o in batches]).numel() for batches in outputs.values())

    dls = {"train": (X, Y), "day": (X[:24], Y[:24]), "night": (X[24:], Y[24:])}
    learn = learner(Scored, dls=dls, monitor="valid/score", mode="max")
    learn.fit(1)
    assert {"valid.day/mae", "valid.night/mae", "valid/score"} <= {*learn.history.names()}
    assert learn.history.last("valid/score") == 40


def test_hooks_of_test_and_predict():
    class Hooked(Learner):
        def test_step(self, batch):
            return {"worst": (self.model(batch[0]) - batch[1]).abs().max()}

        def test_epoch_end(self, outputs):
            return {"n": sum(map(len, outputs.values()))}

        def predict_step(self, batch):
            return self.model(batch[0]).argmax(1), batch[1]

    learn = learner(Hooked, dls={"train": (X, Y), "test": [(X[:30], Y[:30]), (X[30:], Y[30:])]})
    results = learn.test()
    assert results["test/n"] == 2 and results["test/worst"] > 0
    best, y = learn.predict([(X[:30], Y[:30]), (X[30:], Y[30:])])
    assert best.shape == (40,) and torch.equal(y, Y)


def test_predict_matches_the_model_and_leaves_modes():
    learn = learner()
    out = learn.predict(X)
    assert all(m.training for m in learn.model.modules())
    torch.testing.assert_close(out, learn.model.eval()(X).detach())


def test_several_players_must_say_what_validation_is():
    dls = ((X, Y), (X, Y))
    learn = Learner([Player("a", Net(), "mse"), Player("b", Net(), "mse")], dls, front="none")
    with pytest.raises(ValueError, match="override validation_step"):
        learn.fit(1)


# ---------------------------------------------------------------------------------------------- precision, placement


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_trains(precision):
    kw = {"model": nn.Linear(3, 1), "opt": OptimBuilder("adam", lr=0.1)}
    full = fresh_and(60, **kw)
    low = fresh_and(60, **(kw | {"model": nn.Linear(3, 1)}), precision=precision)
    assert low.model.weight.dtype == torch.float32
    assert low.history.last("train/loss") < 0.01 and full.history.last("train/loss") < 0.01
    assert low.history.last("train/loss") != full.history.last("train/loss")


def test_fp16_skips_infinite_gradients():
    learn = learner(precision="fp16", opt=OptimBuilder("adamw", lr=0.01, schedule="linear"))
    learn.add(On("before_step", lambda learn: learn.model.out.weight.grad.fill_(float("inf")) if learn.step == 2 else None))
    learn.fit(epochs=1)
    assert all(torch.isfinite(v).all() for v in weights(learn).values() if v.is_floating_point())


def test_channels_last_and_compile_leave_no_trace_in_names():
    net = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Flatten(), nn.Linear(4 * 64, 1))
    plain = list(net.state_dict())
    data = [(torch.randn(4, 1, 8, 8), torch.randn(4, 1))] * 2
    learn = learner(model=net, dls=data, compile={"backend": "eager"})
    assert learn.channels_last and net[0].weight.is_contiguous(memory_format=torch.channels_last)
    learn.fit(1)
    assert list(learn.state_dict()["players"]["model"]["modules"]["model"]) == plain


# --------------------------------------------------------------------------------------------------------- schedules


def test_schedule_spans_the_fit_and_asks_when_it_ends():
    learn = learner(opt=OptimBuilder("sgd", lr=0.1, schedule="linear", warmup=2))
    learn.fit(epochs=2)
    steps, rates = learn.history.scalars["lr/model"]
    np.testing.assert_allclose(rates, [0.1 / 3, 0.2 / 3, *(0.1 * (1 - i / 8) for i in range(8))], rtol=1e-6)
    before = weights(learn)
    with pytest.raises(ValueError, match=r"ends at update 10.*go on to 15.*'hold'.*'restart'.*'stretch'"):
        learn.fit(epochs=1)
    assert_same(before, weights(learn))
    learn.fit(epochs=1, schedule="restart")
    assert learn.step == 15 and learn.history.scalars["lr/model"][1][10:].max() == pytest.approx(0.1)


def test_an_interrupted_schedule_goes_on():
    straight, pieces = (learner(opt=OptimBuilder("sgd", lr=0.1, schedule="cosine")) for _ in range(2))
    torch.manual_seed(1)
    straight.fit(epochs=3)
    torch.manual_seed(1)
    pieces.add(On("after_batch", lambda learn: learn.stop() if learn.step == 7 else None))
    pieces.fit(epochs=3)
    pieces.fit()
    assert_same(weights(straight), weights(pieces))


@pytest.mark.parametrize("beyond,peak", [("restart", 0.1), ("stretch", 0.08)])
def test_a_restart_that_is_asked_for_is_made(beyond, peak):
    learn = learner(opt=OptimBuilder("sgd", lr=0.1, schedule="linear", total=100))
    learn.fit(steps=4)
    learn.fit(steps=16, schedule=beyond)
    assert learn.history.scalars["lr/model"][1][4] == pytest.approx(peak)


def test_a_refused_plan_changes_no_schedule():
    players = [Player("often", Net(), "mse", opt=OptimBuilder("sgd", lr=0.1, schedule="cosine")),
               Player("seldom", Net(), "mse", opt=OptimBuilder("sgd", lr=0.1, schedule="cosine", warmup=3), every=5)]  # fmt: skip
    learn = Learner(players, DataLoader(TensorDataset(X, Y), batch_size=4), front="none")
    with pytest.raises(ValueError, match="player 'seldom': warmup=3 leaves nothing of total=2"):
        learn.fit(epochs=1)
    assert [p.schedule.total for p in players] == [None, None]
    learn.fit(epochs=3)
    assert [p.schedule.total for p in players] == [30, 6]


def test_a_player_without_a_turn_is_no_obstacle():
    players = [Player("a", Net(), "mse", opt=OptimBuilder("sgd", lr=0.1, schedule="linear")),
               Player("b", Net(), "mse", opt=OptimBuilder("sgd", lr=0.1, schedule="linear"), every=5)]  # fmt: skip
    learn = Learner(players, DataLoader(TensorDataset(X, Y), batch_size=4), front="none")
    learn.fit(steps=2)
    learn.fit(steps=8, schedule="stretch")
    assert [p.updates for p in players] == [10, 2]


def test_schedule_needs_a_length():
    learn = learner(dls=forever(), opt=OptimBuilder("sgd", lr=0.1, schedule="cosine"))
    with pytest.raises(ValueError, match="must know its length"):
        learn.fit(1)
    learn.fit(steps=4)


def test_schedule_counts_the_players_own_updates():
    torch.manual_seed(0)
    players = [Player("a", Net(), "mse", opt=OptimBuilder("sgd", lr=1.0, schedule="linear"), every=3),
               Player("b", Net(), "mse", opt="sgd")]  # fmt: skip
    learn = Learner(players, DataLoader(TensorDataset(X, Y), batch_size=4), front="none")
    learn.fit(epochs=3)  # 30 batches
    assert (players[0].updates, players[0].schedule.total, players[1].updates) == (10, 10, 30)


# ----------------------------------------------------------------------------------------------------------- players


def test_frozen_players_get_no_gradient_and_keep_their_flags():
    learn = two_players(cbs=[On("after_backward", lambda learn: seen.append(
        (learn.player.name, {p.name for p in learn.players if any(q.grad is not None for q in p.parameters())})))])  # fmt: skip
    seen = []
    learn.fit(steps=2)
    assert seen == [("a", {"a"}), ("a", {"a"}), ("b", {"b"})]


def test_all_frozen_is_said_before_the_start():
    net = Net()
    for p in net.parameters():
        p.requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable parameter"):
        learner(model=net).fit(1)


# ------------------------------------------------------------------------------------------------------------- state


@pytest.mark.parametrize("at", [1, 3, 5, 7, 12])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_resume_is_exact_inside_an_epoch(at, precision, tmp_path):
    kw = {"opt": OptimBuilder("adamw", lr=0.01, schedule="cosine", total=15), "precision": precision}
    straight = fresh_and(15, **kw)
    first = learner(run=tmp_path / "run", **kw)
    first.add(On("after_batch", lambda learn: learn.stop() if learn.step == at else None))
    first.fit(epochs=3)
    torch.rand(7)  # what somebody did in between
    second = learner(run=tmp_path / "run", **kw)
    entry = second.restore("last")
    assert (entry.step, second.step) == (at, at)
    second.fit()
    assert second.step == 15
    assert_same(weights(straight), weights(second))
    for name, (steps, values) in straight.history.scalars.items():
        assert second.history.scalars[name][0].tolist() == steps.tolist()
        assert second.history.scalars[name][1].tolist() == values.tolist()


def test_saves_by_epoch_by_step_and_at_the_end(tmp_path):
    def steps_saved(**kw):
        learn = learner(run=tmp_path / f"{random.random()}", keep=9, **kw)
        learn.add(On("after_batch", lambda learn: learn.stop() if learn.step == 13 else None))
        learn.fit(epochs=3)
        return [entry.step for entry in learn.checkpoints]

    assert sorted(steps_saved()) == [5, 10, 13]
    assert sorted(steps_saved(save_every=4)) == [4, 8, 12, 13]
    assert steps_saved(save_every="none") == []


def test_best_is_by_the_score(tmp_path):
    class Falling(Learner):
        def validation_epoch_end(self, outputs):
            return [3.0, 1.0, 2.0, 5.0, 4.0][self.epoch]

    learn = learner(Falling, dls=((X, Y), (X, Y)), run=tmp_path / "run", monitor="valid/score", mode="min", keep=2)
    learn.fit(epochs=5)
    assert learn.restore("best").step == 2
    assert learn.step == 2 and learn.history.last("valid/score") == 1.0
    assert learn.history.scalars["valid/score"][0].max() == 2


@pytest.mark.parametrize("kw", [{"fit": {"steps": 20, "validate_every": 5}}, {"fit": {"epochs": 4}}])
def test_saves_by_step_know_their_score(kw, tmp_path):
    learn = learner(dls=validated(), run=tmp_path / "run", save_every=5, keep=9)
    learn.fit(**kw["fit"])
    assert [(e.step, e.score is not None) for e in learn.checkpoints] == [(5, True), (10, True), (15, True), (20, True)]
    scores = {e.step: e.score for e in learn.checkpoints}
    assert learn.restore("best").step == min(scores, key=scores.get)


def test_a_branch_is_saved_like_any_run(tmp_path):
    learn = learner(run=tmp_path / "run", keep=9)
    learn.fit(epochs=2)
    learn.restore("5")
    learn.fit(epochs=1)
    assert [e.step for e in learn.checkpoints] == [5, 10, 10]
    mine = weights(learn)
    learn.restore("last")
    assert_same(mine, weights(learn))


def test_best_with_several_loaders_and_a_score(tmp_path):
    class Scored(Learner):
        def validation_epoch_end(self, outputs):
            return [1.0, 3.0, 2.0][self.epoch]

    learn = learner(Scored, dls={"train": (X, Y), "day": (X, Y), "night": (X, Y)}, run=tmp_path / "run")
    learn.fit(epochs=3)
    assert learn.restore("best").step == 2  # more of a score is better


def test_a_monitor_that_nobody_records_is_said(tmp_path):
    learn = learner(dls=validated(), run=tmp_path / "run", monitor="valid/acuracy", mode="max", metrics=["mae"])
    with pytest.warns(UserWarning, match="'valid/acuracy' is not recorded"):
        learn.fit(1)
    with pytest.raises(ValueError, match="is more of it better, or less"):
        learner(monitor="valid/frobs")


def test_a_look_at_other_data_is_not_the_runs_validation(tmp_path):
    learn = learner(dls=validated(), run=tmp_path / "run")
    learn.fit(1)
    before = learn.history.scalars["valid/loss"][1].tolist()
    assert learn.validate((X, Y * 0))["valid/loss"] != before[-1]
    assert learn.history.scalars["valid/loss"][1].tolist() == before


def test_metrics_that_see_nothing_are_said():
    with pytest.warns(UserWarning, match="this learner has none"):
        learner(metrics=["mae"]).fit(1)

    class Blind(Learner):
        def validation_step(self, batch):
            return {"mine": 1.0}

    with pytest.warns(UserWarning, match="sets self.pred"):
        learn = learner(Blind, dls=validated(), metrics=["mae"])
        learn.fit(1)
    assert "valid/mae" not in learn.history.names() and learn.history.last("valid/mine") == 1.0


def test_what_the_checkpoint_overrules_is_said(tmp_path):
    two = {"a": ("mse", 1.0), "b": ("l1", 1.0)}
    learner(loss=two, run=tmp_path / "run").fit(1)
    other = learner(loss={"a": ("mse", 5.0), "b": ("l1", 3.0)}, opt=OptimBuilder("adamw", lr=0.5), run=tmp_path / "run")
    with pytest.warns(UserWarning, match=r"lr=0.01.*the code says.*lr=0.5.*term weights"):
        other.restore()
    with pytest.raises(ValueError, match="the terms of the loss were"):
        learner(run=tmp_path / "run").restore()
    module = learner(loss=nn.MSELoss(), run=tmp_path / "m")
    module.fit(1)
    learner(loss="mse", run=tmp_path / "m").restore()


def test_a_bare_run_name_lies_with_the_other_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert learner(run="digits").run.as_posix() == "runs/digits"
    assert learner(run="elsewhere/digits").run.as_posix() == "elsewhere/digits"
    assert learner(run="digits", runs="kept").run.as_posix() == "kept/digits"


@pytest.mark.parametrize("text,message", [
    ("[optimizer]\nname = adamm", r"adamm.*settings.ini \[optimizer\] name"),
    ("[scheduler]\nname = cosin", r"cosin.*settings.ini \[scheduler\] name"),
    ("[trainkit]\ndevice = gpu", r"gpu.*settings.ini \[trainkit\] device"),
])  # fmt: skip
def test_what_a_settings_file_got_wrong_names_the_file(text, message, tmp_path, monkeypatch):
    (tmp_path / "settings.ini").write_text(text)
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, RuntimeError), match=message):
        Learner(Net(), [(X, Y)], "mse", front="none")


def test_settings_make_the_optimizer_only_where_none_is_given(tmp_path, monkeypatch):
    (tmp_path / "settings.ini").write_text("[optimizer]\nname = sgd\nmomentum = 0.9\n[scheduler]\nname = linear\n")
    monkeypatch.chdir(tmp_path)
    given, default = (Learner(Net(), [(X, Y)], "mse", opt, front="none").players[0] for opt in ("adam", None))
    assert type(given.opt).__name__ == "Adam" and given.schedule.name == "constant"
    assert default.opt.param_groups[0]["momentum"] == 0.9 and default.schedule.name == "linear"


def test_save_every_none_and_entries(tmp_path):
    learn = learner(run=tmp_path / "run", save_every=None, front=None)
    learn.fit(1)
    assert len(learn.checkpoints) == 0
    entry = learn.save()
    learn.fit(1)
    assert learn.restore(entry).step == 5 and learn.step == 5


def test_a_split_function_that_forgets_something():
    with pytest.raises(TypeError, match="should return"):
        learner(split=lambda b: ((b[0],), (b[1],))).fit(1)


@pytest.mark.parametrize("name,message", [
    ("metric", "did you mean metrics"), ("callbacks", "did you mean cbs"), ("lr", r"OptimBuilder\(…, lr=…\)"),
    ("devise", "device"), ("xyz", "accepted: model"),
])  # fmt: skip
def test_a_misspelt_argument(name, message):
    with pytest.raises(TypeError, match=message):
        learner(**{name: 1})


def test_messages_for_what_is_easily_got_wrong():
    with pytest.raises(ValueError, match="'loss' is the sum of the terms"):
        player = Player("p", Net(), step=lambda learn, b: {"loss": learn.model(b[0]).mean(), "acc": torch.tensor(1.0)})
        Learner(player, [(X, Y)], front="none").fit(1)
    with pytest.raises(ValueError, match="2 modules: give it a step="):
        Learner(Player("p", [nn.Linear(3, 1), nn.Linear(1, 1)], "mse"), [(X, Y)], front="none").fit(1)
    with pytest.raises(ValueError, match="override validation_step"):
        Learner([Player("a", Net(), "mse"), Player("b", Net(), "mse")], [(X, Y)], front="none").validate([(X, Y)])
    with pytest.raises(TypeError, match="one loader at a time"):
        learner().predict({"a": X, "b": X})

    class Words(Learner):
        def validation_step(self, batch):
            return "fine"

    with pytest.raises(TypeError, match="received str"):
        learner(Words, dls=validated()).fit(1)
    learner(cbs=On("after_epoch", lambda learn: None)).fit(np.int64(1))


@pytest.mark.parametrize("change,message", [
    ({"model": nn.Linear(3, 2)}, r"model: .*weight"), ({"opt": "sgd"}, "optimizer was AdamW, now SGD"),
    ({"opt": OptimBuilder("adamw", lr=0.01, schedule="cosine")}, "schedule was 'constant', now 'cosine'"),
])  # fmt: skip
def test_a_restore_that_does_not_fit_changes_nothing(change, message, tmp_path):
    first = learner(run=tmp_path / "run")
    first.fit(1)
    other = learner(run=tmp_path / "run", **change)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match=message):
        other.restore("last")
    after = other.state_dict()
    assert after["position"] == before["position"] and after["position"]["step"] == 0
    for name, value in before["players"]["model"]["modules"]["model"].items():
        assert torch.equal(value, after["players"]["model"]["modules"]["model"][name])
    assert torch.equal(before["rng"]["torch"], after["rng"]["torch"])


def test_a_load_that_fails_half_way_is_undone(tmp_path, monkeypatch):
    first = learner(run=tmp_path / "run")
    first.fit(1)
    other = learner(run=tmp_path / "run")
    before = weights(other)
    calls = []

    def fail(state):
        calls.append(state)
        if len(calls) == 1:
            raise ValueError("half way")

    monkeypatch.setattr(other.history, "load_state_dict", fail)
    with pytest.raises(ValueError, match="half way.*everything is as it was"):
        other.restore("last")
    assert other.step == 0
    assert_same(before, weights(other))


def test_callbacks_state_travels(tmp_path):
    class Counter(Callback):
        n = 0

        def after_step(self, learn):
            self.n += 1

        def state_dict(self):
            return {"n": self.n}

        def load_state_dict(self, state):
            self.n = state["n"]

    learner(run=tmp_path / "run", cbs=[Counter()]).fit(2)
    again = learner(run=tmp_path / "run", cbs=[counter := Counter()])
    again.restore()
    assert counter.n == 10
    with pytest.raises(ValueError, match="callback 'counter' has a state in the checkpoint"):
        learner(run=tmp_path / "run").restore()


def test_a_new_run_moves_the_old_one_aside(tmp_path):
    learner(run=tmp_path / "run").fit(1)
    with pytest.warns(UserWarning, match=r"is now .*run\.1"):
        learner(run=tmp_path / "run").fit(2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run", "run.1"]
    assert [e.step for e in learner(run=tmp_path / "run.1").checkpoints] == [5]


def test_save_and_restore_say_what_is_missing(tmp_path):
    with pytest.raises(ValueError, match="no run folder"):
        learner().save()
    with pytest.raises(ValueError, match="no run folder"):
        learner().restore()
    with pytest.raises(Exception, match="no checkpoint"):
        learner(run=tmp_path / "empty").restore()
    learn = learner(run=tmp_path / "run", cbs=[On("after_loss", lambda learn: learn.save())])
    with pytest.raises(RuntimeError, match="in the middle of player 'model'"):
        learn.fit(1)


def test_a_full_disk_does_not_end_the_training(tmp_path, monkeypatch):
    learn = learner(run=tmp_path / "run")
    monkeypatch.setattr(learn.checkpoints, "save", lambda *a, **k: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.warns(UserWarning, match="No space left"):
        learn.fit(2)
    assert learn.step == 10


# ----------------------------------------------------------------------------------------------- learners side by side


def test_the_same_cell_again_and_again():
    learn = learner()
    for _ in range(5):
        learn.add(On("after_epoch", lambda learn: None)) if not learn.cbs.get("On") else None
        learn.fit(1)
    assert len(learn.cbs) == 1 and threading.active_count() < 10


def test_repr_and_picture(capsys):
    learn = two_players()
    assert "step 0, epoch 0, idle" in repr(learn) and "'b'" in repr(learn)
    learn.add(Record())
    learn.show_loop()
    out = capsys.readouterr().out
    assert "cleanup_turn (always)" in out and out.count("← Record") == len(FIT_EVENTS)


def test_front_that_is_missing_is_said_once():
    learn = learner(front="no.such.module:front")
    with pytest.warns(UserWarning, match="nothing shows this run"):
        learn.fit(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        learn.fit(1)


@pytest.mark.parametrize("args,message", [
    (("resnet",), "received str"), ((nn.Linear(1, 1), None, 3), "a loss is a name"),
    ((nn.Linear(1, 1), None, nn.MSELoss), r"pass an instance: MSELoss\(\)"),
    ((nn.Linear(1, 1), None, nn.Linear(1, 1)), "no player would train"),
    (([Player("a", nn.Linear(1, 1)), Player("a", nn.Linear(1, 1))],), "distinct names"),
])  # fmt: skip
def test_bad_construction(args, message):
    with pytest.raises((TypeError, ValueError), match=message):
        Learner(*args)


# ------------------------------------------------------------------------------------------- one folder, two learners


def test_a_newer_learner_takes_the_folder_and_the_older_one_trains_on(tmp_path):
    old = learner(run=tmp_path / "run")
    old.fit(epochs=1)
    new = learner(run=tmp_path / "run")
    new.restore()
    old.fit(epochs=1)  # looking took nothing away
    new.restore()
    new.fit(epochs=1)
    ids = [entry.id for entry in new.checkpoints]
    with pytest.raises(CheckpointError, match="belongs to another learner"):
        old.fit(epochs=1)
    with pytest.raises(CheckpointError, match="belongs to another learner"):
        old.save()
    assert [entry.id for entry in new.checkpoints] == ids
    old.restore()
    old.fit(epochs=1)
    assert (old.step, old.state) == (new.step + 5, "finished")


def test_a_folder_is_not_taken_while_a_fit_runs(tmp_path):
    "Another learner of the same process is refused, and the one that trains keeps everything."
    old, new = learner(run=tmp_path / "run"), learner(run=tmp_path / "run")

    def take(_):
        if old.step == 7:
            old.checkpoints.wait()
            new.restore()
            with pytest.raises(CheckpointError, match="another learner of this process is training in"):
                new.save()

    old.add(On("after_batch", take))
    old.fit(epochs=3)
    assert old.state == "finished" and [entry.step for entry in old.checkpoints] == [5, 10, 15]


def test_a_checkpoint_is_found_by_its_note(tmp_path):
    learn = learner(run=tmp_path / "run", save_every="none")
    for note in ("first try", "second try", "first try"):
        learn.fit(steps=1)
        learn.save(note)
    learn.fit(steps=1)
    assert learn.restore("second try").step == learn.step == 2
    assert learn.restore("first try").step == learn.step == 3  # the newest of that note
    with pytest.raises(CheckpointError, match="no checkpoint 'third try'"):
        learn.restore("third try")
    assert learn.step == 3


def test_a_save_that_fails_keeps_nobody_out(tmp_path, monkeypatch):
    "Neither from the run's folder nor from that of a branch which came to nothing."
    learn = learner(run=tmp_path / "run")
    learn.fit(epochs=1)

    def full(*args, **kw):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        for ask in (learn.save, lambda: learn.branch("last", "branch")):
            with pytest.raises(CheckpointError, match="No space left"):
                ask()
    again = learner(run=tmp_path / "run")
    again.restore("last")
    again.fit(epochs=1)
    assert again.branch("last", "branch").step == again.step


def test_a_folder_in_which_another_process_trains(tmp_path):
    learn = learner(run=tmp_path / "run")
    learn.fit(epochs=1)
    code = f"""if True:
        import sys, fcntl
        file = open({str(tmp_path / "run" / "checkpoints" / "lock")!r}, "a")
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        print("inside", flush=True)
        sys.stdin.read()
    """
    other = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline().strip() == "inside"
        with pytest.raises(CheckpointError, match="is training in"):
            learn.fit(epochs=1)
        with pytest.raises(CheckpointError, match="is training in"):
            learner(run=tmp_path / "run").fit(epochs=1)  # nothing was moved aside either
        assert [p.name for p in tmp_path.iterdir()] == ["run"]
    finally:
        other.communicate()
    learn.fit(epochs=1)
    assert learn.state == "finished"


# --------------------------------------------------------------------------------------------- writing in the background


def test_what_goes_wrong_in_the_background_is_said_at_the_next_step(tmp_path, monkeypatch):
    before = {*threading.enumerate()}
    learn = learner(run=tmp_path / "run", save_every=3)
    real, calls = torch.save, []

    def slow_and_full(*args, **kw):
        calls.append(threading.current_thread() is threading.main_thread())
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        return real(*args, **kw)

    monkeypatch.setattr(torch, "save", slow_and_full)
    with pytest.warns(UserWarning, match="a checkpoint is missing, training goes on: .*ckpt-000000006.pt: .*No space left"):
        learn.fit(epochs=2)
    assert learn.state == "finished" and not any(calls) and "6" not in [e.id for e in learn.checkpoints]
    assert {*threading.enumerate()} <= before


def test_a_state_that_goes_on_changing_is_saved_as_it_was(tmp_path):
    learn = learner(run=tmp_path / "run", save_every=1, keep=99)
    seen = []
    learn.add(On("after_batch", lambda l: seen.append(copy.deepcopy(weights(l)))))
    learn.fit(epochs=1)
    for entry in learn.checkpoints:
        learn.restore(entry)
        assert_same(weights(learn), seen[entry.step - 1])


def test_a_process_that_ends_finishes_its_file(tmp_path):
    code = f"""if True:
        import time, torch
        from trainkit.checkpoint import Checkpoints, write_atomically
        import trainkit.checkpoint as c
        real = torch.save
        torch.save = lambda *a, **k: (time.sleep(0.5), real(*a, **k))
        Checkpoints({str(tmp_path / "c")!r}).save({{"x": torch.ones(3)}}, 7, background=True)
    """
    subprocess.run([sys.executable, "-c", code], check=True)
    assert Checkpoints(tmp_path / "c").load()[0]["x"].tolist() == [1, 1, 1]


@pytest.mark.parametrize("event", ["after_validate", "cleanup_validate"])
@pytest.mark.parametrize("how", [{}, {"validate_every": 5}])
def test_a_validation_that_is_on_record_is_not_made_again(event, how, tmp_path):
    learn = learner(dls=validated(), run=tmp_path / "run")
    learn.add(bomb := Bomb(event, KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        learn.fit(2, **how)
    learn.remove(bomb)
    again = learner(dls=validated(), run=tmp_path / "run")
    again.restore()
    for one in learn, again:
        one.fit()
        assert one.history.scalars["valid/loss"][0].tolist() == [5, 10] and (one.step, one.epoch) == (10, 2)


@pytest.mark.parametrize("event", ["after_fit", "cleanup_fit"])
def test_an_interrupt_while_the_end_is_tidied_up_is_not_lost(event):
    learn = learner(cbs=On(event, lambda learn: os.kill(os.getpid(), signal.SIGINT)))
    with pytest.raises(KeyboardInterrupt):
        learn.fit(1)
    assert (learn.state, learn.step) == ("finished", 5)


def test_all_checkpoints_may_be_kept(tmp_path):
    learn = learner(run=tmp_path / "run", keep="all", save_every=1)
    learn.fit(2)
    assert len(learn.checkpoints) == 10


def test_an_interrupted_wait_is_no_end_of_the_writing():
    from trainkit.storage import Background

    background, gate, done = Background(), threading.Event(), []
    background.start(lambda: (gate.wait(), done.append(1)))
    threading.Timer(0.1, lambda: signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        background.wait()
    threading.Timer(0.1, gate.set).start()
    background.wait()
    assert done == [1]


def test_a_save_between_fits_leaves_the_folder_open(tmp_path):
    learn = learner(run=tmp_path / "run")
    learn.save()
    code = f"""if True:
        import fcntl
        fcntl.lockf(open({str(tmp_path / "run" / "checkpoints" / "lock")!r}, "a"), fcntl.LOCK_EX | fcntl.LOCK_NB)
    """
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    learn.fit(1)
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_every_failed_write_is_said(tmp_path, monkeypatch):
    learn = learner(run=tmp_path / "run", save_every=1)
    real, calls = torch.save, []

    def full(*args, **kw):
        calls.append(1)
        if len(calls) in (2, 3, 5):
            raise OSError(28, "No space left on device")
        return real(*args, **kw)

    monkeypatch.setattr(torch, "save", full)
    with pytest.warns(UserWarning, match="No space left") as said:
        learn.fit(2)
    named = sorted(re.findall(r"ckpt-0+(\d+)", str(w.message))[0] for w in said if "No space" in str(w.message))
    assert named == ["2", "3", "5"] and learn.state == "finished"


def test_without_threads_it_is_written_here(tmp_path, monkeypatch):
    monkeypatch.setattr(threading.Thread, "start", lambda self: (_ for _ in ()).throw(RuntimeError("can't start new thread")))
    learn = learner(run=tmp_path / "run")
    learn.fit(2)
    assert [e.id for e in learn.checkpoints] == ["5", "10"]


def test_a_run_that_can_only_be_read_is_trained_on_unsaved(tmp_path, monkeypatch):
    learner(run=tmp_path / "run").fit(1)
    learn = learner(run=tmp_path / "run")
    learn.restore()

    def refuse(path, flags, *args, **kw):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("trainkit.storage._open_temp", lambda folder: refuse(folder, 0))
    with pytest.warns(UserWarning, match="can't be kept, training goes on"):
        learn.fit(1)
    assert (learn.state, learn.step) == ("finished", 10)
