"What a checkpoint says of what made it, and what a restore says of what has changed since."

import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from trainkit.identity import changes, digest_of
from trainkit.learner import Learner
from trainkit.state import RestoreError

X = torch.randn(24, 3, generator=torch.Generator().manual_seed(0))
Y = X.sum(1, keepdim=True)


class Net(nn.Module):
    def __init__(self, width=1):
        super().__init__()
        self.out = nn.Linear(3, width)

    def forward(self, x):
        return self.out(x)


class Twin(Net):
    def forward(self, x):
        return self.out(x).relu()


class Own(Learner):
    def training_step(self, batch):
        return (self.model(batch[0]) - batch[1]).square().mean()


def learner(run, model=None, rows=24, batch_size=4, loss="mse", cls=Learner, **kw):
    torch.manual_seed(0)
    dls = DataLoader(TensorDataset(X[:rows], Y[:rows]), batch_size=batch_size)
    return cls(model or Net(), dls, loss, "sgd", front="none", run=run, **kw)


@pytest.fixture
def run(tmp_path):
    learner(tmp_path / "run").fit(epochs=1)
    return tmp_path / "run"


def test_nothing_has_changed_and_nothing_is_said(run):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        learner(run).restore()


@pytest.mark.parametrize("change,said", [
    ({"rows": 16}, "training data: 24 samples in 6 batches of 4 then, 16 samples in 4 batches of 4 now"),
    ({"batch_size": 8}, "24 samples in 6 batches of 4 then, 24 samples in 3 batches of 8 now"),
    ({"loss": "l1"}, "model's loss was rewritten"),
    ({"model": Twin()}, "class Twin is new; class Net is gone"),
    ({"cls": Own}, "Own.training_step is new"),
])  # fmt: skip
def test_what_has_changed_is_said(run, change, said):
    with pytest.warns(UserWarning) as found:
        learner(run, **change).restore()
    assert any(said in str(w.message) and "since the checkpoint was made" in str(w.message) for w in found)


def test_versions_are_compared(run, monkeypatch):
    monkeypatch.setattr(torch, "__version__", "9.9.0+cpu")
    with pytest.warns(UserWarning, match="torch: .* then, 9.9.0 now"):
        learner(run).restore()


def test_digests_follow_the_text():
    assert digest_of(Net) == digest_of(Net) != digest_of(Twin)
    assert digest_of(torch.add) == "" and digest_of(learner)
    assert changes({}, {"code": {"class A": "x"}}) == ["class A is new"]
    assert changes({"code": {"class A": "x"}}, {"code": {}}) == ["class A is gone"]


def test_only_the_weights(run):
    trained = learner(run)
    trained.restore()
    fresh = learner(run)
    entry = fresh.restore("last", only="weights")
    assert torch.equal(fresh.model.out.weight, trained.model.out.weight) and entry.step == 6
    assert fresh.step == 0 and len(fresh.history) == 0 and fresh.players[0].updates == 0
    with pytest.raises(RestoreError, match="nothing was changed"):
        learner(run, model=Net(2)).restore(only="weights")
    with pytest.raises(ValueError, match="received 'optimizer'"):
        fresh.restore(only="optimizer")


def test_a_refusal_names_the_choices(run):
    with pytest.raises(RestoreError, match="only='weights'"):
        learner(run, model=Net(2)).restore()
