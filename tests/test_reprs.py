"What people see when they type a name: words that help, neither an address nor a wall of numbers."

import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from trainkit.attached import attach
from trainkit.callback import Callback, On
from trainkit.compare import compare
from trainkit.curve import PlannedCurve
from trainkit.data import ArrayDataset
from trainkit.gan.distances import FID, KID
from trainkit.learner import Learner
from trainkit.optim import OptimBuilder
from trainkit.player import Player, Term
from trainkit.randomness import RandomState
from trainkit.runs import runs

X = torch.randn(24, 3, generator=torch.Generator().manual_seed(0))


class Own(Callback):
    pass


class Loss:
    def __call__(self, pred, target): return (pred - target).square().mean()


@pytest.fixture(scope="module")
def learn(tmp_path_factory):
    torch.manual_seed(0)
    dls = {"train": (X, X[:, :1]), "valid": (X, X[:, :1]), "far": DataLoader(TensorDataset(X, X[:, :1]), batch_size=5)}
    found = Learner(nn.Linear(3, 1), dls, "mse", OptimBuilder("adamw", lr=0.1, schedule="cosine"), metrics=["mae"], front="none",
                    cbs=[Own(), On("after_epoch", lambda learn: None)], batch_size=8, run=tmp_path_factory.mktemp("runs") / "one")
    found.fit(2)
    return found


PARTS = {
    "itself": (lambda learn: learn, r"Learner: step 6, epoch 2, finished, .*Player\('model', 4 parameters, OptimBuilder"),
    "settings": (lambda learn: learn.settings, r"\[trainkit\] batch_size +8 +argument"),
    "history": (lambda learn: learn.history, r"series .*train/loss"),
    "snapshot": (lambda learn: learn.history.snapshot(), r"Snapshot\(\d+ values, series .*train/loss.*marks\)"),
    "mark": (lambda learn: learn.history.marks[0], r"epoch"),
    "journal": (lambda learn: learn.journal, r"fit epochs=2"),
    "controls": (lambda learn: learn.controls(), r"player +name .*model +lr +\S+ +>= 0 +its schedule.*beta1 +0\.9 +>= 0, < 1"),
    "checkpoints": (lambda learn: learn.checkpoints, r"2 checkpoints in .*best"),
    "entry": (lambda learn: learn.checkpoints.list()[0], r"checkpoint '3': step 3"),
    "loaders": (lambda learn: learn.loaders, r"Loaders\(train=DataLoader of length 3, valid={.*'far': DataLoader of length 5"),
    "stream": (lambda learn: learn.stream, r"SeededStream\('train': batch 0 of epoch 2, from DataLoader of length 3\)"),
    "metrics": (lambda learn: learn.metrics, r"MetricSet\(.*'mae'"),
    "callbacks": (lambda learn: learn.cbs, r"Own.*AutoSave\('epoch'\)"),
    "callback": (lambda learn: learn.cbs.get("AutoSave"), r"AutoSave\('epoch'\)"),
    "random": (lambda learn: [learn.random, RandomState(3)], r"shared.*seed=3"),
    "player": (lambda learn: learn.players[0], r"Player\('model'"),
    "plan": (lambda learn: learn.players[0].builder, r"OptimBuilder\('adamw', lr=0.1, schedule='cosine'\)"),
    "terms": (lambda learn: learn.players[0].terms, r"\[Term\('loss', mse_loss\)\]"),
    "schedule": (lambda learn: learn.players[0].schedule, r"cosine"),
    "curves": (lambda learn: PlannedCurve("sequence", parts=[{"name": "linear", "length": 3}, "cosine"]), r"sequence"),
    "knob": (lambda learn: learn.players[0].schedule.knob, r"'lr', from 0 to below inf"),
    "timings": (lambda learn: learn.timings(), r"ms a step"),
    "runs": (lambda learn: runs(learn.run.parent), r"1 run in .*one +6"),
    "run": (lambda learn: runs(learn.run.parent)["one"], r"Run\('one': step 6, best [\d.]+, 2 checkpoints, in "),
    "comparison": (lambda learn: compare(learn.run), r"valid/mae"),
    "attached": (lambda learn: attach(learn.run), r"Attached to .*finished at step 6"),
    "report": (lambda learn: learn.resume_report(), r"restored exactly|not"),
    "dataset": (lambda learn: ArrayDataset(X, X[:, 0]), r"ArrayDataset\(Tensor \(24, 3\) float32, Tensor \(24,\) float32\)"),
    "distances": (lambda learn: [FID(None, X), KID(None, X)], r"FID\(on the samples themselves\).*KID"),
}


@pytest.mark.parametrize("part", PARTS)
def test_it_says_what_it_is(learn, part):
    make, words = PARTS[part]
    text = repr(make(learn))
    assert re.search(words, text, re.S), text
    assert not re.search(r"object at 0x|<function|<bound", text) and len(text) < 2000, text


def test_a_loss_that_is_an_object_has_no_address():
    player = Player("a", nn.Linear(1, 1), [Term("first", Loss()), Term("second", nn.L1Loss(), 0.5)])
    assert repr(player.terms) == "[Term('first', a Loss), Term('second', a L1Loss, weight=0.5)]"


RICH = {  # the text in the cells of its table, or in what stands above it
    "itself": ["Learner: step 6", "Player('model'", "valid/mae"],
    "history": ["series", "valid/mae"],
    "settings": ["batch_size", "8", "argument"],
    "journal": ["step", "by", "fit epochs=2"],
    "controls": ["beta1", ">= 0, < 1", "its schedule"],
    "checkpoints": ["best", "score", "6"],
    "entry": ["checkpoint 3", "step", "3", "epoch", "1", "file"],
    "loaders": ["valid: far", "DataLoader", "5", "ArrayDataset of length 24"],
    "metrics": ["mae", "FunctionMetric('mae')"],
    "callbacks": ["Own()", "after_epoch", "AutoSave('epoch')"],
    "callback": ["AutoSave('epoch')", "acts at", "after_epoch"],
    "player": ["player model", "Linear, 4 parameters", "loss", "optimizer", "OptimBuilder('adamw'", "updates made", "6"],
    "plan": ["OptimBuilder", "adamw", "lr", "0.1", "cosine"],
    "timings": ["in all", "ms a step", "model's turn"],
    "runs": ["1 run in", "one", "6"],
    "run": ["run one", "step", "6", "checkpoints", "2"],
    "comparison": ["one", "valid/mae"],
    "attached": ["attached to", "finished", "what can be moved", "beta1"],
    "report": ["restored"],
}  # fmt: skip


class Cells(HTMLParser):
    "What stands in a table's cells and above it; every element is closed by its own end."

    def __init__(self, text):
        super().__init__()
        self.open, self.said = [], [""]
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        self.said.append("")
        if tag not in ("br", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        self.said.append("")

    def handle_data(self, data):
        self.said[-1] += data


@pytest.mark.parametrize("part", RICH)
def test_where_a_notebook_shows_it_it_is_a_table(learn, part):
    made = PARTS[part][0](learn)
    html = made._repr_html_()
    said = [text for text in Cells(html).said if text.strip()]
    assert all(any(word in text for text in said) for word in RICH[part]), said
    assert not re.search(r"object at 0x|<function|<bound", " ".join(said)) and len(html) < 20_000, said


def test_what_has_many_facts_is_rich():
    short = {"snapshot", "mark", "stream", "random", "terms", "schedule", "curves", "knob", "dataset", "distances"}  # one line
    assert PARTS.keys() - RICH.keys() == short


@pytest.mark.parametrize("status, words", [({"losses": None, "controls": None}, ["attached"]),
                                           ({"losses": {"gan": None, "fit": 0.25}}, ["gan nan, fit 0.25"])])  # fmt: skip
def test_what_is_attached_to_is_shown_whatever_its_status_has(learn, status, words, monkeypatch):
    "A loss that is no number is the news of the day, and not left out."
    monkeypatch.setattr("trainkit.attached.read_status", lambda path: {"state": "training", "step": 3, **status})
    said = Cells(attach(learn.run)._repr_html_()).said
    assert all(any(word in text for text in said) for word in words), said


class Unsure:
    "A loader whose length can't be told."

    def __iter__(self): return iter([(X, X[:, :1])])
    def __len__(self): raise RuntimeError("nobody knows")


def test_what_is_not_known_yet_is_no_error():
    "A loader that doesn't know its length, a network that doesn't know its shape, a plan without schedules."
    learn = Learner(nn.Linear(3, 1), {"train": Unsure()}, "mse", front="none")
    assert "Unsure" in repr(learn.loaders) and "Unsure" in learn.loaders._repr_html_()
    lazy = Player("late", nn.LazyLinear(1), "mse")
    assert "0 parameters" in repr(lazy) and "LazyLinear" in lazy._repr_html_()


def test_a_learner_that_did_nothing_yet_has_no_table():
    fresh = Learner(nn.Linear(3, 1), (X, X[:, :1]), "mse", front="none")
    assert "<table" not in fresh._repr_html_() and "step 0" in fresh._repr_html_()
    assert fresh.journal._repr_html_() == "<p>an empty journal</p>"


COMPLETED = {  # what was typed before the tabulator -> what has to be among what is offered
    "from trainkit.": {"learner", "optim", "callback", "callbacks", "gan", "history", "runs"},
    "from trainkit import ": {"attach", "learner", "callbacks"},
    "from trainkit.callbacks.": {"clip", "stopping", "average"},
    "learn.": {"fit", "pause", "resume", "stop", "save", "restore", "branch", "validate", "test", "predict", "players", "history",
               "checkpoints", "journal", "timings", "controls", "resume_report"},
    "learn.players[0].": {"modules", "opt", "schedule", "terms"},
    "Learner(": {"cbs=", "metrics=", "run=", "distributed="},
    "learn.fit(": {"epochs=", "steps=", "background="},
    "found['": {"one"},
}  # fmt: skip
COMPLETER = """
import json, sys, tempfile
import torch
from IPython.core.completer import provisionalcompleter
from IPython.core.interactiveshell import InteractiveShell
from trainkit.learner import Learner
from trainkit.runs import runs
x, folder = torch.randn(8, 3), tempfile.mkdtemp()
learn = Learner(torch.nn.Linear(3, 1), (x, x[:, :1]), "mse", front="none", run=folder + "/one")
learn.fit(1)
shell = InteractiveShell.instance(user_ns={"learn": learn, "Learner": Learner, "found": runs(folder)})
with provisionalcompleter():
    offered = {text: [c.text for c in shell.Completer.completions(text, len(text))] for text in json.loads(sys.argv[1])}
print(json.dumps(offered))
"""


def test_names_are_found_by_the_tabulator(tmp_path):
    command = [sys.executable, "-c", COMPLETER, json.dumps([*COMPLETED])]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "IPYTHONDIR": str(tmp_path)})
    assert done.returncode == 0, done.stderr
    offered = json.loads(done.stdout.splitlines()[-1])
    assert {text: wanted - {*offered[text]} for text, wanted in COMPLETED.items()} == {text: set() for text in COMPLETED}
    assert not [name for name in offered["learn."] if name.startswith("_")]
