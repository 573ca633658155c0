"Recent states in memory: going back is exact, and what is lost already is no place to go back to."

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from ways import ENDINGS, end_by, resumes, same, same_weights

from trainkit.callback import On
from trainkit.callbacks.average import EMA
from trainkit.callbacks.guards import SkipBadSteps
from trainkit.callbacks.recent import Recent, cut, lengths
from trainkit.gan.learner import GANLearner
from trainkit.learner import Learner
from trainkit.optim import OptimBuilder

X = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
Y = X.sum(1, keepdim=True)


def learner(run=None, cbs=(), **kw):
    torch.manual_seed(0)
    dls = DataLoader(TensorDataset(X, Y), batch_size=4, shuffle=True)
    model = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.3), nn.Linear(8, 1))
    opt = OptimBuilder("adamw", lr=0.01, schedule="cosine", total=60)
    return Learner(model, (dls, dls), "mse", opt, cbs=[Recent(every=4, keep=3), EMA(0.9), *cbs], front="none", run=run, **kw)


def gan(**kw):
    torch.manual_seed(0)
    g, d = nn.Linear(2, 3), nn.Sequential(nn.Linear(3, 1), nn.Dropout(0.1), nn.Flatten(0))
    dls = DataLoader(TensorDataset(X), batch_size=4, shuffle=True)
    return GANLearner(g, d, dls, latent=2, n_critic=3, cbs=[Recent(every=4, keep=3)], front="none", **kw)


@pytest.mark.parametrize("make", [learner, lambda: learner(accumulate=3), gan])
@pytest.mark.parametrize("steps", [1, 6])
def test_back_and_on_is_as_if_nothing_had_been(make, steps):
    straight = make()
    straight.fit(steps=30)
    after, other = torch.get_rng_state(), make()
    other.fit(steps=22)
    assert other.cbs.get(Recent).steps == [12, 16, 20]
    torch.rand(5)
    assert other.cbs.get(Recent).back(other, steps) == (20 if steps == 1 else 16) == other.step
    other.fit()
    other.fit(steps=30 - other.step)
    same_weights(straight, other)
    same(straight.history.state_dict()["columns"], other.history.state_dict()["columns"])
    assert torch.equal(after, torch.get_rng_state())


def test_it_can_be_gone_back_to_the_same_state_twice():
    learn = learner()
    learn.fit(steps=20)
    recent = learn.cbs.get(Recent)
    recent.back(learn, 4)
    first = [p.clone() for p in learn.model.parameters()]
    learn.fit(steps=3)
    recent.back(learn, 1)
    same(first, [p.clone() for p in learn.model.parameters()])


def poison(step):
    def act(learn):
        if learn.step == step:
            with torch.no_grad():
                next(learn.model.parameters()).fill_(torch.nan)

    return On("after_batch", act, order=80)


def test_what_is_lost_already_is_not_kept():
    learn = learner(cbs=[poison(8)])
    learn.fit(steps=17)
    assert learn.cbs.get(Recent).steps == [4]


def test_a_guard_that_gives_up_leads_back():
    learn = learner(cbs=[poison(18), SkipBadSteps(patience=2)])
    with pytest.raises(FloatingPointError):
        learn.fit(steps=30)
    assert (learn.state, learn.step) == ("failed", 16) and all(torch.isfinite(p).all() for p in learn.model.parameters())
    assert [m.text for m in learn.history.marks if m.kind == "back"][0].startswith("from step ")
    learn.remove("On")
    learn.fit()
    assert (learn.state, learn.step) == ("finished", 30)


def test_only_for_numbers_gone_wrong_and_only_if_wanted():
    def fail(error):
        return On("before_step", lambda l: (_ for _ in ()).throw(error) if l.step == 10 else None)

    for error, by_itself in ((RuntimeError("x"), True), (FloatingPointError("x"), False)):
        learn = learner(cbs=[fail(error)])
        learn.cbs.get(Recent).by_itself = by_itself
        with pytest.raises(type(error)):
            learn.fit(steps=20)
        assert learn.step == 11


@pytest.mark.parametrize("ending", ENDINGS)
def test_every_ending(ending):
    learn = learner()
    end_by(learn, ending, at=6)
    steps = learn.cbs.get(Recent).steps
    assert all(step % 4 == 0 for step in steps) and len(steps) <= 3
    step = learn.cbs.get(Recent).back(learn, 1)
    learn.fit(steps=2)
    assert learn.step == step + 2


def test_it_takes_no_part_in_a_checkpoint(tmp_path):
    resumes(learner, tmp_path, steps=12, at=(3, 8))
    assert "recent" not in learner().state_dict()["callbacks"]


def test_refusals():
    learn = learner()
    with pytest.raises(ValueError, match="no state is kept that is 1 steps older than step 0"):
        learn.cbs.get(Recent).back(learn)
    learn.add(On("after_batch", lambda l: l.cbs.get(Recent).back(l)))
    with pytest.raises(RuntimeError, match="while training"):
        learn.fit(steps=5)
    for bad in ({"every": 0}, {"every": 2.5}, {"keep": 0}, {"keep": True}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            Recent(**bad)


def test_a_history_is_cut_where_it_was():
    learn = learner()
    learn.fit(steps=5)
    kept, before = lengths(learn.history), learn.history.state_dict()
    learn.fit(steps=8)
    same(cut(learn.history.state_dict(), kept), before)
    assert len(learn.history.scalars["train/loss"][0]) == 13


def test_a_restore_makes_later_states_another_time(tmp_path):
    learn = learner(tmp_path / "run", save_every=6, keep=9)
    learn.fit(steps=14)
    learn.restore(6)
    learn.fit(steps=1)
    assert learn.cbs.get(Recent).steps == [4]
