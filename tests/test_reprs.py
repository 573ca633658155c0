"What people see when they type a name: words that help, neither an address nor a wall of numbers."

import re

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
    "random": (lambda learn: [learn.random, RandomState(3)], r"shared.*seed=3"),
    "player": (lambda learn: learn.players[0], r"Player\('model'"),
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


def test_what_is_rich_is_a_table_of_the_same(learn):
    for part, words in (("itself", ["Learner: step 6", "Player(&#x27;model&#x27;", "<td", "valid/mae"]),
                        ("history", ["valid/mae", f"{learn.history.last('valid/mae'):.4g}"]),
                        ("settings", ["batch_size", ">8<", ">argument<"]), ("runs", [">one<"]), ("comparison", ["valid/mae"]),
                        ("controls", ["<th", ">beta1<", "&gt;= 0, &lt; 1"]),
                        ("checkpoints", ["best"]), ("report", ["restored"])):  # fmt: skip
        text = PARTS[part][0](learn)._repr_html_()
        assert all(word in text for word in words) and text.count("<tr>") == text.count("</tr>"), text
    fresh = Learner(nn.Linear(3, 1), (X, X[:, :1]), "mse", front="none")
    assert "<table" not in fresh._repr_html_() and "step 0" in fresh._repr_html_()
