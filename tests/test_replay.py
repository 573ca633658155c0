"""A session that was steered by hand is told again from its journal, bit for bit, by a learner that nobody touches."""

import random
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from ways import same, same_weights

from trainkit.callback import Callback, CancelFit, On
from trainkit.callbacks.average import EMA
from trainkit.callbacks.stopping import EarlyStopping
from trainkit.gan.learner import GANLearner
from trainkit.journal import Journal
from trainkit.knobs import knobs
from trainkit.learner import Learner
from trainkit.optim import OptimBuilder
from trainkit.replay import ReplayError, lineage, replay, session, weights_digest
from trainkit.script import sliced, to_script

ROOT = Path(__file__).resolve().parent.parent

G = torch.Generator().manual_seed(0)
X = torch.randn(44, 3, generator=G)
DATA = TensorDataset(X, X.sum(1, keepdim=True).sin())


def loaders(**kw):
    return DataLoader(DATA, 8, shuffle=True, **kw), DataLoader(DATA, 16)


def supervised(run=None, schedule="cosine", cbs=(), **kw):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.2), nn.Linear(6, 1))
    plan = OptimBuilder("adamw", lr=0.05, schedule=schedule)
    return Learner(net, loaders(), "mse", plan, seed=1, front="none", run=run, cbs=[EMA(0.9), *cbs], **kw)


def plateau(run=None):
    return supervised(run, {"name": "plateau", "patience": 0, "factor": 0.5, "monitor": "valid/loss"}, save_every="none")


def gathering(run=None):
    return supervised(run, "cosine_restarts", accumulate=2, save_every=4)


class Make(nn.Module):
    latent_dim = 2

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 6), nn.ReLU(), nn.Linear(6, 3))

    def forward(self, z):
        return self.net(z)


def gan(run=None):
    torch.manual_seed(0)
    judge = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Dropout(0.1), nn.Linear(6, 1), nn.Flatten(0))
    plan = OptimBuilder("adam", lr=0.01, schedule="cosine")
    return GANLearner(Make(), judge, loaders(), opt=plan, n_critic=3, seed=1, front="none", run=run,
                      cbs=[EMA(0.9, player="generator")])  # fmt: skip


class Hand(Callback):
    "Asks for thirty things at random moments, from the training thread and from another one, as a panel would."

    def __init__(self, seed, chance=0.5):
        self.rng, self.left, self.chance, self.saved = random.Random(seed), 30, chance, []

    def knob(self, learn):
        own = [name for name in knobs(learn) if name.endswith(".decay") or name in ("n_critic", "n_gen")]
        name = self.rng.choice(["lr", "lr", "lr", "weight_decay", *own])
        several = len(learn.players) > 1 and name not in own
        return {"name": name, "player": self.rng.choice([p.name for p in learn.players]) if several else None}

    def value(self, name, rng):
        if name in ("n_critic", "n_gen"):
            return {"value": float(rng.randint(1, 4))}
        if name == "lr" and rng.random() < 0.4:
            return {"times": rng.choice([0.5, 2.0])}
        return {"value": rng.choice([0.9, 0.8]) if "." in name else rng.choice([0.001, 0.01, 0.03])}

    def command(self, learn, what):
        knob = self.knob(learn)
        values = {"set": lambda: {**knob, **self.value(knob["name"], self.rng)}, "release": lambda: knob,
                  "stop": lambda: {"after": self.rng.choice(["step", "step", "epoch"])},
                  "step": lambda: {"n": self.rng.randint(1, 3)},
                  "restore": lambda: {"which": self.place(learn)}, "note": lambda: {"text": "look"}}  # fmt: skip
        return values.get(what, dict)()

    def place(self, learn):
        ids = [entry.id for entry in learn.checkpoints] if learn.checkpoints else []
        return self.rng.choice(ids) if ids else "last"

    def ask(self, learn, *names):
        what = self.rng.choice(names)
        values, self.left = self.command(learn, what), self.left - 1

        def send():
            try:
                learn.send(what, source="panel", **values)
            except (TypeError, ValueError):
                pass  # it is refused at once

        if self.rng.random() < 0.3:
            thread = threading.Thread(target=send)
            thread.start()
            thread.join()
        else:
            send()

    TOUCHES = ("set", "set", "set", "set", "release", "undo")

    def after_batch(self, learn):
        while self.left > 0 and self.rng.random() < self.chance:
            self.ask(learn, *self.TOUCHES, "validate", "save", "save", "restore", "pause", "note", "stop", "resume")

    def after_validate_batch(self, learn):
        if self.left > 0 and self.rng.random() < 0.05:
            self.ask(learn, "stop")

    def before_pause(self, learn):
        while self.left > 0 and self.rng.random() < 0.7:
            self.ask(learn, *self.TOUCHES, "validate", "save", "restore")
        learn.send(self.rng.choice(["resume", "step", "step", "stop"]), source="panel")


def steer(learn, seed):
    "Several fits with thirty commands in them and between them."
    learn.add(hand := Hand(seed))
    rng = hand.rng
    for _ in range(40):
        if hand.left <= 0 and learn.epoch >= 2:
            break
        try:
            long = [{"epochs": 1}, {"epochs": 2}, {"steps": rng.randint(1, 9)}, {"steps": 7, "validate_every": 3}, {}]
            learn.fit(**rng.choice(long), **rng.choice([{}, {"schedule": "restart"}, {"schedule": "hold"}]))
        except ValueError:
            pass  # no open fit to go on with, or a schedule that ends before
        while rng.random() < 0.4:
            hand.ask(learn, *Hand.TOUCHES, "save", "restore", "note")
    learn.remove(hand)
    return learn


def same_run(a, b):
    "Two learners have the same weights, optimizers, schedules, random states, averages and curves."
    same_weights(a, b)
    one, two = a.state_dict(), b.state_dict()
    for part in ("players", "rng", "stream"):
        same(one[part], two[part], part)
    same({k: v for k, v in one["callbacks"].items() if k in two["callbacks"] and k != "auto_save"},
         {k: v for k, v in two["callbacks"].items() if k != "auto_save"}, "callbacks")  # fmt: skip
    assert {*a.history.scalars} == {*b.history.scalars}
    for name, (steps, values) in a.history.scalars.items():
        assert b.history.scalars[name][0].tolist() == steps.tolist(), name
        np.testing.assert_array_equal(b.history.scalars[name][1], values, name)


MAKERS = {"cosine": supervised, "plateau": plateau, "gathering": gathering, "gan": gan}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.filterwarnings("ignore")
def test_thirty_random_commands_told_again_give_the_same_run(tmp_path, kind, seed):
    make = MAKERS[kind]
    learn = steer(make(tmp_path / "run"), seed)
    assert len([e for e in Journal.read(tmp_path / "run" / "journal.jsonl").entries if e.source == "panel"]) >= 20
    if learn.journal.entries and learn.step:
        last = learn.save("the end")
        for kept in learn.journal, tmp_path / "run" / "journal.jsonl", last.path, tmp_path / "run":
            other = make()
            report = replay(other, kept)
            assert report.same in (True, None), report
            same_run(learn, other)


def sends(step, what, event="after_batch", **values):
    return On(event, lambda learn: learn.step == step and learn.send(what, source="panel", **values))


def untouched(learn):
    while learn.cbs.get(On):
        learn.remove(On)


def told_again(learn, make, kept=None):
    other = make()
    report = replay(other, kept or learn.journal)
    same_run(learn, other)
    return report


@pytest.mark.parametrize("every", [None, 4])
@pytest.mark.parametrize("step", [4, 6, 8])
def test_a_fit_that_was_stopped_in_a_validation_is_ended_there(step, every):
    cut = On("after_validate_batch", lambda learn: learn.step == step and learn.send("stop", source="panel"))
    learn = supervised(cbs=[cut])
    learn.fit(epochs=2, validate_every=every)
    learn.remove(cut)
    learn.set("lr", 0.01)
    stood = learn.position()
    told_again(learn, supervised)
    other = supervised()
    replay(other, learn.journal)
    for key in "step", "epoch", "drawn", "owed":
        assert other.position()[key] == stood[key]
    learn.fit(schedule="hold") if not learn._complete() else learn.fit(epochs=1, schedule="hold")
    told_again(learn, supervised)


def test_a_restore_to_an_earlier_fit_goes_on_to_where_the_running_fit_was_to_end(tmp_path):
    learn = supervised(tmp_path / "a", "constant", save_every="none")
    learn.add(sends(3, "save"), sends(11, "set", name="lr", value=0.001))
    learn.fit(epochs=1)
    gone = []

    def back(learn):
        if learn.step == 9 and not gone:
            gone.append(learn.send("restore", source="panel", which=3))

    learn.add(On("after_batch", back))
    learn.fit(steps=9, validate_every=4)
    assert learn.step == 15
    assert [(e.what, e.step) for e in learn.journal.entries] == [
        ("fit", 0), ("fit", 3), ("restore", 3), ("set", 11), ("end", 15)]  # fmt: skip
    for kept in learn.journal, tmp_path / "a" / "journal.jsonl":
        other = supervised(schedule="constant")
        replay(other, kept)
        same_weights(learn, other)
        assert [e.values["target"] for e in other.journal.entries if e.what == "fit"][-1] == {
            "epoch": None, "step": 15, "validate_every": 4, "schedule": None}  # fmt: skip


def test_what_the_runs_own_code_asks_for_is_not_asked_for_twice():
    def own(learn):
        learn.send("set", name="lr", times=0.5)

    def make():
        return supervised(cbs=[On("after_epoch", own), EarlyStopping(patience=1, min_delta=10.0, monitor="valid/loss")])

    learn = make()
    learn.add(hand := sends(6, "set", name="weight_decay", value=0.2))
    learn.fit(epochs=6)
    learn.remove(hand)
    assert learn.state == "stopped" and {e.source for e in learn.journal.entries if e.what == "set"} == {"callback", "panel"}
    report = told_again(learn, make)
    assert [e.source for e in report.applied] == ["panel", "code"]


def test_a_branch_has_its_whole_past_in_its_file(tmp_path):
    learn = supervised(tmp_path / "a", save_every="none")
    learn.set("lr", times=0.5)
    learn.fit(epochs=1)
    learn.save()
    learn.fit(epochs=1, schedule="restart")
    learn.branch(6, tmp_path / "b")
    learn.set("weight_decay", 0.3)
    learn.fit(epochs=1, schedule="hold")
    way = lineage(Journal.read(tmp_path / "b" / "journal.jsonl").entries)
    assert [e.what for e in way] == ["set", "fit", "end", "set", "fit", "end"]
    learn.save()
    for kept in tmp_path / "b" / "journal.jsonl", tmp_path / "b":
        assert told_again(learn, supervised, kept).same


def test_a_learner_in_another_process_goes_on_in_the_same_file(tmp_path):
    first = supervised(tmp_path / "a", save_every=2)
    first.add(sends(3, "set", name="lr", value=0.001), sends(5, "stop"))
    first.fit(epochs=2)
    second = supervised(tmp_path / "a", save_every=2)
    second.restore(4)
    second.fit()
    report = told_again(second, supervised, tmp_path / "a" / "journal.jsonl")
    assert report.same and str(report).count("the same weights") == 1


def test_what_is_torn_is_named(tmp_path):
    def tear(learn):
        if learn.step == 4:
            raise KeyboardInterrupt

    learn = supervised(cbs=[On("after_backward", tear)])
    with pytest.raises(KeyboardInterrupt):
        learn.fit(epochs=1)
    untouched(learn)
    learn.fit()
    other = supervised()
    report = replay(other, learn.journal)
    assert report.doubts == ["the fit that began at step 0 was interrupted inside the batch of step 5"]
    assert other.step == learn.step and weights_digest(other) != weights_digest(learn)


def test_an_error_of_the_runs_own_code_happens_again(tmp_path):
    def make():
        def fail(learn):
            if learn.step == 4:
                raise OSError("disk on fire")

        return supervised(cbs=[On("before_step", fail)])

    learn = make()
    with pytest.raises(OSError, match="disk on fire"):
        learn.fit(epochs=1)
    learn.fit()
    assert told_again(learn, make).doubts == []


def test_a_fit_that_was_cancelled_or_interrupted_ends_there():
    for leave in (lambda learn: learn.stop(), lambda learn: learn._interrupted()):
        learn = supervised(cbs=[On("after_batch", lambda learn, leave=leave: learn.step == 7 and leave(learn))])
        try:
            learn.fit(epochs=2)
        except KeyboardInterrupt:
            pass
        untouched(learn)
        learn.fit()
        told_again(learn, supervised)

    def cancel(learn):
        if learn.step == 7:
            raise CancelFit

    learn = supervised(cbs=[On("after_batch", cancel)])
    learn.fit(epochs=2)
    other = supervised(cbs=[On("after_batch", cancel)])
    replay(other, learn.journal)
    same_run(learn, other)


def test_another_learner_is_found_out(tmp_path):
    learn = supervised(tmp_path / "a")
    learn.fit(epochs=1)
    learn.fit(epochs=1, schedule="restart")
    with pytest.raises(ReplayError, match="when a fit began, the session was at step 6"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        short = Learner(nn.Linear(3, 1), DataLoader(DATA, 11), "mse", OptimBuilder("adam", schedule="cosine"), front="none")
        replay(short, learn.journal)
    assert len(short.queue) == 0
    with pytest.raises(ReplayError, match="by a fresh learner; this one is at step 12"):
        replay(learn, learn.journal)
    with pytest.raises(ReplayError, match="the journal begins at step 6"):
        session(learn.journal.entries[2:])


def test_a_replay_leaves_the_runs_folder_alone(tmp_path):
    learn = supervised(tmp_path / "a")
    learn.fit(epochs=1)
    before = sorted(p.name for p in tmp_path.rglob("*"))
    twin = supervised(tmp_path / "a")
    assert replay(twin, tmp_path / "a").same
    assert sorted(p.name for p in tmp_path.rglob("*")) == before and twin.run != learn.run and twin.run.exists()


def test_touches_of_one_knob_at_one_step_are_all_told():
    def twice(learn):
        if learn.step == 3:
            learn.send("pause", source="panel")

    def hold(learn):
        for values in {"value": 0.001}, {"value": 0.002}:
            learn.send("set", source="panel", name="lr", **values)
            learn.send("note", source="panel", text="so?")
        learn.send("undo", source="panel")
        learn.send("resume", source="panel")

    learn = supervised(cbs=[On("after_batch", twice), On("before_pause", hold)])
    learn.fit(epochs=1)
    untouched(learn)
    told_again(learn, supervised)


def run_script(text, path):
    path.write_text(text)
    done = subprocess.run([sys.executable, path.name], capture_output=True, text=True, cwd=path.parent, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def built():
    return supervised("told")  # a relative folder, of wherever the script runs


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_script_does_it_all_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    learn = steer(built(), 3)
    before = sorted(p.name for p in tmp_path.rglob("*"))
    text = to_script(learn, tmp_path / "again.py", built)
    assert text == (tmp_path / "again.py").read_text() and "def gan(" not in text and "import pytest" not in text
    assert run_script(text, tmp_path / "again.py").strip().endswith("the same weights")
    assert sorted(p.name for p in tmp_path.rglob("*") if p.name != "again.py") == before
    assert "OTHER weights" in run_script(text.replace("lr=0.05", "lr=0.04"), tmp_path / "again.py")


SESSION = """
import sys; sys.path.insert(0, {root!r})
from IPython.core.interactiveshell import InteractiveShell
shell = InteractiveShell.instance()
for cell in {cells!r}:
    shell.run_cell(cell, store_history=True)
"""
CELLS = [
    "%matplotlib inline",
    "import torch, os\nfrom torch import nn\nfrom trainkit.learner import Learner",
    "torch.manual_seed(3)",
    "WIDTH = 4\nunused = [1, 2]",
    "x = torch.randn(32, 3)",
    "x = torch.rand(32, 3)\nx += 1",
    "!echo hello",
    "def net():\n    return nn.Sequential(nn.Linear(3, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 1))",
    "this is no python",
    "data = (x, x.sum(1, keepdim=True))\nmodel = net()\nnn.init.zeros_(model[2].bias); print(model)",
    "mine = Learner(model, data, 'mse', 'adam', batch_size=8, seed=1, front='none')",
    "mine.set('lr', 0.05)",
    "mine.fit(epochs=2)",
    "mine.undo(); mine.fit(steps=3)",
    "from trainkit.script import to_script\ntext = to_script(mine, 'mine.py')",
]


@pytest.mark.parametrize("more", [False, True])
def test_the_cells_of_a_session_become_a_script(tmp_path, more):
    cells = [*CELLS[:-1], "from trainkit.callbacks.average import EMA\nmine.add(EMA(0.9)); mine.fit(steps=1)"] * more or CELLS
    cells = [*cells, *CELLS[-1:]] if more else cells
    code = SESSION.format(root=str(ROOT), cells=cells)
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True)
    text = (tmp_path / "mine.py").read_text()
    for left_out in "unused", "get_ipython", "print(model)", "to_script", "hello":
        assert left_out not in text
    assert ("# left out: done after the first fit, and no command: mine.add(EMA(0.9))" in text) == more
    assert 'mine.send("set", name="lr", value=0.05)' in text and "mine.fit(epochs=2)" in text
    assert run_script(text, tmp_path / "mine.py").strip().endswith("the same weights")


def test_what_only_reads_the_learner_is_no_loss(tmp_path):
    reads = "mine.resume_report()\nmine.identity()\nmine.state_dict(); mine.export_weights('a.safetensors')"
    found = sliced([*CELLS[:-1], reads, "mine.load_weights('b.pt')"], "mine")
    assert found.later == ["mine.load_weights('b.pt')"], "what changes the weights and is no command, is told"


def test_a_script_counts_what_was_done():
    learn = supervised()
    learn.set("lr", 0.01)
    learn.fit(epochs=1)
    assert to_script(learn, build=supervised).splitlines()[0].endswith(", told again: 1 command and 1 fit, to step 6.\"")
    learn.fit(epochs=1, schedule="hold")
    assert "told again: 1 command and 2 fits, to step 12." in to_script(learn, build=supervised)


def test_what_a_script_cannot_have_is_said():
    learn = supervised()
    learn.fit(epochs=1)
    with pytest.raises(ValueError, match="takes a function that returns the learner, or a text of code"):
        to_script(learn)
    with pytest.raises(ValueError, match="called without arguments, and steer needs learn, seed"):
        to_script(learn, build=steer)
    with pytest.raises(ValueError, match="a lambda has no text"):
        to_script(learn, build=lambda: supervised())
    with pytest.raises(ValueError, match="this one makes nothing"):
        to_script(learn, build="print(1)")
    width = 3

    def inner():
        return supervised(accumulate=width)

    with pytest.warns(UserWarning, match="the script can't be complete: width"):
        text = to_script(learn, build=inner)
    assert "# not found: width: no statement of the session makes it" in text and "(not found were: width)" in text
    learn.add(On("before_fit", lambda learn: to_script(learn, build=supervised)))
    with pytest.raises(ReplayError, match="between two fits"):
        learn.fit(epochs=1, schedule="hold")


def test_a_learner_that_is_built_with_weights_from_elsewhere():
    def make():
        torch.manual_seed(0)
        batches = [(torch.ones(4, 2), torch.ones(4, 1))] * 3
        learn = Learner(nn.Linear(2, 1), batches, "mse", {"name": "sgd", "lr": 0.1}, front="none")
        learn.load_weights({"weight": torch.ones(1, 2), "bias": torch.zeros(1)})
        return learn

    first, again = make(), make()
    first.fit(1)
    first.set("lr", 0.01)
    first.fit(1)
    replay(again, first.journal)
    assert weights_digest(again) == weights_digest(first) and again.step == first.step == 6
    with pytest.raises(ReplayError, match="fresh learner"):
        replay(again, first.journal)
