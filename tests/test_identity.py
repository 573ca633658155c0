"What a checkpoint says of what made it, and what a restore says of what has changed since."

import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from trainkit.identity import architecture_of, changes, digest_of
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


def built(*parts, **kw):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), *parts, nn.Linear(4, 1), **kw)


@pytest.mark.parametrize("one,other", [(nn.ReLU(), nn.Tanh()), (nn.Dropout(0.1), nn.Dropout(0.2)), (nn.ReLU(), nn.Identity())])
def test_an_activation_that_was_exchanged_is_said(tmp_path, one, other):
    "The tensors are the same, and there is no code of one's own."
    learner(tmp_path / "run", model=built(one)).fit(epochs=1)
    with pytest.warns(UserWarning, match="since the checkpoint was made: model is built otherwise"):
        learner(tmp_path / "run", model=built(other)).restore()


def test_what_is_held_at_another_address_is_no_other_architecture(tmp_path):
    class Held(nn.Linear):
        def __init__(self): super().__init__(3, 1); self.f = lambda x: x
        def extra_repr(self): return f"f={self.f}, at={object()}"

    assert architecture_of(Held()) == architecture_of(Held()) != architecture_of(nn.Linear(3, 1))
    learner(tmp_path / "run", model=Held()).fit(epochs=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        learner(tmp_path / "run", model=Held()).restore()


def test_an_architecture_that_nobody_knows_is_passed_over():
    "A checkpoint of an older version has none, nor has a module that waits for its first batch, or can't be printed."
    class Mute(nn.Linear):
        def extra_repr(self): raise ZeroDivisionError

    assert architecture_of(nn.LazyLinear(3)) == architecture_of(Mute(3, 1)) == ""
    assert changes({"code": {}}, {"code": {}, "architecture": {"model": "x"}}) == []
    assert changes({"architecture": {"model": "x"}}, {"architecture": {}}) == []
    assert changes({"architecture": {"model": "x"}}, {"architecture": {"model": "y"}}) == ["model is built otherwise"]


def test_a_wrapper_is_no_other_architecture():
    net = built(nn.ReLU())
    assert architecture_of(net) == architecture_of(nn.DataParallel(net)) == architecture_of(net.eval().requires_grad_(False))
    untied, tied = (nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)) for _ in range(2))
    tied[1].weight = tied[0].weight
    assert len({architecture_of(m) for m in (net, built(nn.ReLU()).double(), untied, tied)}) == 4
