"Horizons that grow and networks that thaw, by closed forms, after every restart and every ending."

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from ways import ENDINGS, end_by, resumes, same_weights

from trainkit.callback import Callback, On
from trainkit.callbacks.curriculum import (
    Curriculum,  # fmt: skip
    Unfreeze,
    checked_plan,
    cut,
    fits,
    horizon,
    norms_of,
    stage_of,
    stage_of_norm,
)
from trainkit.learner import Learner
from trainkit.player import Player

SERIES = torch.randn(32, 14, generator=torch.Generator().manual_seed(0))
X, Y = SERIES[:, :8], SERIES[:, 8:]  # 6 values to predict


def forecaster(*cbs, epochs_of=4, **kw):
    torch.manual_seed(0)
    data = {"train": DataLoader(TensorDataset(X, Y), batch_size=32 // epochs_of, shuffle=True), "valid": (X, Y)}
    return Learner(nn.Sequential(nn.Linear(8, 6), nn.Dropout(0.1)), data, "mse", "adam", cbs=cbs, front="none", **kw)


def values(learn, name):
    steps, column = learn.history.scalars[name]
    return dict(zip(steps.tolist(), column.tolist()))


# ----------------------------------------------------------------------------------------------------------- curriculum


@given(st.integers(0, 60), st.integers(1, 30), st.integers(1, 5), st.integers(1, 4), st.integers(0, 6))
def test_horizon_is_that_of_basicts(unit, length, step, every, warmup):
    "Seen from its source: epochs count from 1, and the first horizon is the step."
    epoch = unit + 1
    full = epoch - 1 < warmup
    expected = length if full else min(length, ((epoch - 1 - warmup) // every + 1) * step)
    assert horizon(unit, length, start=min(step, length), step=step, every=every, warmup=warmup) == expected


@given(st.integers(1, 30), st.integers(1, 5), st.integers(1, 4), st.integers(0, 6))
def test_horizon_only_grows_after_the_warmup(length, step, every, warmup):
    found = [horizon(u, length, 1, step, every, warmup) for u in range(warmup + length * every + 1)]
    assert found[:warmup] == [length] * warmup and found[warmup] == 1
    rest = found[warmup:]
    assert rest == sorted(rest) and rest[-1] == length


def test_cut():
    x, label = torch.arange(24.0).reshape(2, 6, 2), torch.zeros(2)
    assert torch.equal(cut(x, 2, 6, 1), x[:, :2]) and torch.equal(cut(x, 2, 6, -2), x[:, :2])
    one, two, three = cut((x, label, "name"), 2, 6, 1)
    assert one.shape == (2, 2, 2) and two is label and three == "name"
    assert cut([x], 3, 6, 1)[0].shape == (2, 3, 2) and cut(x, 2, 5, 1) is x and cut(x, 2, 6, 7) is x
    assert fits((label, x), 6, 1) and not fits((label,), 6, 1) and not fits(None, 6, 1) and not fits(x, 6, 7)


def test_the_loss_is_of_the_horizon_alone():
    "Gradients and loss are those of the first values; the far ones have none."
    learn = forecaster(Curriculum(6, start=2, step=3, every=2), opt_steps := Steps())
    learn.fit(epochs=5)
    assert values(learn, "train/horizon") == {1: 2, 9: 5, 17: 6}
    for step, (pred, target, loss, grad) in opt_steps.seen.items():
        n = 2 if step <= 8 else 5 if step <= 16 else 6
        assert pred.shape == target.shape == (8, n)
        assert loss == pytest.approx((pred - target).square().mean().item())
        assert grad[:n].abs().min() > 0 and (grad[n:] == 0).all()
    assert len(values(learn, "valid/loss")) == 5 and set(opt_steps.valid) == {(32, 6)}


class Steps(Callback):
    "What the loss was made of, and the gradient of the last layer's bias."

    def __init__(self):
        self.seen, self.valid = {}, []

    def before_step(self, learn):
        bias = learn.model[0].bias.grad.clone()
        self.seen[learn.step + 1] = learn.pred.detach(), learn.targets[0], learn.loss.item(), bias

    def after_validate_batch(self, learn):
        self.valid.append(tuple(learn.pred.shape))


def test_by_step_and_warmup():
    learn = forecaster(Curriculum(6, start=1, step=2, every=2, warmup=3, by="step"))
    learn.fit(steps=12)
    assert values(learn, "train/horizon") == {1: 6, 4: 1, 6: 3, 8: 5, 10: 6}


def test_other_axes_several_targets_and_callbacks_that_come_later():
    torch.manual_seed(0)
    x, y, weight = torch.randn(16, 4), torch.randn(16, 3, 6), torch.rand(16)
    shapes = []

    class Net(nn.Linear):
        def forward(self, x):
            return super().forward(x).reshape(-1, 3, 6)

    def loss(pred, y, weight):
        return ((pred - y).square().mean((1, 2)) * weight).mean()

    learn = Learner(Net(4, 18), DataLoader(TensorDataset(x, y, weight), batch_size=8), loss, front="none", cbs=[
        On("after_forward", lambda learn: shapes.append((learn.pred.shape[2], [t.shape for t in learn.targets]))),
        Curriculum(6, start=2, dim=-1)], split=lambda b: ((b[0],), {}, (b[1], b[2])))  # fmt: skip
    learn.fit(epochs=1)
    assert shapes == [(2, [(8, 3, 2), (8,)])] * 2


def test_one_of_several_players():
    class Two(Learner):
        def training_step(self, batch):
            (net,) = self.player.modules.values()
            self.targets = (batch[1],)
            self.forward_done(net(batch[0]))
            return F.mse_loss(self.pred, *self.targets)

    learn = Two([Player("a", nn.Linear(8, 6)), Player("b", nn.Linear(8, 6))], DataLoader(TensorDataset(X, Y), batch_size=16),
                cbs=Curriculum(6, player="b"), front="none")  # fmt: skip
    shapes = []
    learn.add(On("after_forward", lambda learn: shapes.append((learn.player.name, learn.pred.shape[1]))))
    learn.fit(epochs=2)
    assert shapes == [("a", 6), ("b", 1)] * 2 + [("a", 6), ("b", 2)] * 2
    assert "train/a/horizon" not in learn.history.names() and values(learn, "train/b/horizon") == {1: 1, 3: 2}


@pytest.mark.parametrize("by", ["epoch", "step"])
def test_curriculum_resumes(by, tmp_path):
    resumes(lambda run: forecaster(Curriculum(6, start=1, step=2, every=1 if by == "epoch" else 3, by=by), run=run), tmp_path)


def test_going_back_shortens_it_again(tmp_path):
    learn = forecaster(Curriculum(6), run=tmp_path / "run", keep=9)
    learn.fit(epochs=3)
    learn.restore(8)
    learn.fit(epochs=1)
    assert values(learn, "train/horizon") == {1: 1, 5: 2, 9: 3}
    learn.restore(4)
    learn.fit(epochs=1)
    assert values(learn, "train/horizon") == {1: 1, 5: 2}


@pytest.mark.parametrize("ending", ENDINGS)
def test_curriculum_after_every_ending(ending):
    learn = forecaster(Curriculum(6, start=2, step=2))
    end_by(learn, ending, at=6, epochs=2)
    assert learn.predict((X, Y)).shape == (32, 6)
    learn.fit(epochs=1)
    assert set(values(learn, "train/horizon").values()) <= {2, 4, 6} and learn.state == "finished"


def test_extending_it_takes_a_trial_along():
    assert Curriculum(6).probing and Unfreeze({1: "a"}).probing


@pytest.mark.parametrize("given,message", [
    ({"length": 0}, "length must be a whole number >= 1; received 0"),
    ({"start": 0}, "start must be a whole number >= 1"),
    ({"start": 7}, "start=7 is beyond the length of 6"),
    ({"step": 1.5}, "step must be a whole number >= 1; received 1.5"),
    ({"every": -1}, "every must be a whole number >= 1; received -1"),
    ({"warmup": -1}, "warmup must be a whole number >= 0; received -1"),
    ({"by": "batch"}, "by is 'epoch' or 'step'; received 'batch'"),
    ({"dim": None}, "a whole number; received None"),
])  # fmt: skip
def test_bad_curricula(given, message):
    with pytest.raises(ValueError, match=message):
        Curriculum(**{"length": 6} | given)


@pytest.mark.parametrize("make,message", [
    (lambda: forecaster(Curriculum(5)), r"axis 1 of the prediction should have the length 5; received \(8, 6\)"),
    (lambda: forecaster(Curriculum(6, dim=2)), r"axis 2 of the prediction should have the length 6; received \(8, 6\)"),
    (lambda: forecaster(Curriculum(6, player="b")), "no player 'b'; there are: model"),
    (lambda: Learner(Player("m", nn.Linear(8, 6), step=lambda learn, b: learn.players[0].modules["m"](b[0]).mean()), (X, Y),
                     cbs=Curriculum(6), front="none"), "axis 1 of the prediction should have the length 6; received NoneType"),
    (lambda: Learner(nn.Linear(8, 6), (X, Y[:, 0]), lambda p, y: (p[:, 0] - y).square().mean(), cbs=Curriculum(6), front="none"),
     r"axis 1 of the targets should have the length 6; received \(32,\)"),
])  # fmt: skip
def test_what_can_not_be_cut(make, message):
    with pytest.raises(ValueError, match=message):
        make().fit(epochs=1)


# ------------------------------------------------------------------------------------------------------------- unfreeze


class Tower(nn.Module):
    def __init__(self):
        super().__init__()
        self.low, self.norm, self.mid = nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 8)
        self.plain, self.head = nn.BatchNorm1d(8, affine=False), nn.Linear(8, 6)
        self.head.bias.requires_grad_(False)  # its owner's wish

    def forward(self, x):
        return self.head(self.plain(self.mid(self.norm(self.low(x)).relu()).relu()))


PLAN = {1: "mid|plain", 2: ["low", "norm"]}


def tower(*cbs, model=None, opt="adamw", **kw):
    torch.manual_seed(0)
    data = {"train": DataLoader(TensorDataset(X, Y), batch_size=8, shuffle=True), "valid": (X, Y)}
    return Learner(Tower() if model is None else model, data, "mse", opt, cbs=cbs, front="none", **kw)


def flags(learn):
    return {name: p.requires_grad for p_ in learn.players for name, p in p_.named_parameters()}


class Moved(Callback):
    "After each step: which parts have changed in it."

    order = 90

    def __init__(self):
        self.parts = {}

    def before_batch(self, learn):
        self.state = {n: v.clone() for n, v in learn.model.state_dict().items()}

    def after_batch(self, learn):
        moved = {n.split(".")[0] for n, v in learn.model.state_dict().items() if not torch.equal(v, self.state[n])}
        self.parts[learn.step] = "".join(sorted(part[0] for part in moved))


def test_what_is_frozen_does_not_move():
    "Neither its weights nor its running statistics, with an optimizer that decays weights; from its epoch on both do."
    learn = tower(Unfreeze(PLAN), moved := Moved())
    learn.fit(epochs=3)
    assert moved.parts == {s: "h" if s <= 4 else "hmp" if s <= 8 else "hlmnp" for s in range(1, 13)}
    assert values(learn, "train/frozen") == {1: 72 + 72 + 16, 5: 72 + 16, 9: 0}
    assert flags(learn) == flags(tower())


def test_norms_may_go_on():
    learn = tower(Unfreeze(PLAN, norms=False), moved := Moved())
    learn.fit(epochs=1)
    assert set(moved.parts.values()) == {"hnp"}


def test_it_is_like_freezing_by_hand():
    torch.manual_seed(0)
    by_hand = tower(opt="sgd")
    for name, p in by_hand.model.named_parameters():
        if not name.startswith("head"):
            p.requires_grad_(False)
    by_hand.add(On("before_fit", lambda learn: [learn.model.norm.eval(), learn.model.plain.eval()]))
    by_hand.fit(epochs=1)
    learn = tower(Unfreeze(PLAN), opt="sgd")
    learn.fit(epochs=1)
    same_weights(learn, by_hand)


def test_by_step():
    learn = tower(Unfreeze({2: "mid|plain", 3: "low|norm"}, by="step"), moved := Moved())
    learn.fit(steps=5)
    assert list(moved.parts.values()) == ["h", "h", "hmp", "hlmnp", "hlmnp"]


def test_the_earliest_pattern_counts_and_zero_is_from_the_start():
    plan = checked_plan({0: ["head"], 2: [""], 1: ["mid"]})
    assert [*plan] == [0, 1, 2]
    assert [stage_of(n, plan) for n in ("head.weight", "mid.bias", "low.weight")] == [0, 1, 2]
    learn = tower(Unfreeze(plan), moved := Moved())
    learn.fit(epochs=2)
    assert moved.parts[1] == "h" and moved.parts[5] == "hm"


def test_norms_by_their_names():
    norms = norms_of(Player("net", Tower()))
    assert {n: stage_of_norm(n, m, PLAN_) for n, m in norms.items()} == {"norm": 2, "plain": 1}
    assert [*norms_of(Player("p", {"a": Tower(), "b": nn.Sequential(nn.BatchNorm2d(1))}))] == ["p.a.norm", "p.a.plain", "p.b.0"]


PLAN_ = checked_plan(PLAN)


@pytest.mark.parametrize("by", ["epoch", "step"])
def test_unfreeze_resumes(by, tmp_path):
    plan = PLAN if by == "epoch" else {3: "mid|plain", 7: ["low", "norm"]}
    resumes(lambda run: tower(Unfreeze(plan, by=by), run=run), tmp_path, at=(1, 4, 5, 8))


def test_flags_follow_from_the_epoch_not_from_what_they_were(tmp_path):
    learn = tower(Unfreeze(PLAN), run=tmp_path / "run")
    learn.fit(epochs=2)
    again = tower(Unfreeze(PLAN), moved := Moved(), run=tmp_path / "run")
    again.restore(4)  # one epoch back
    again.fit(epochs=2)
    assert moved.parts[5] == "hmp" and moved.parts[9] == "hlmnp"


def test_what_its_owner_froze_thaws_by_the_plan_and_is_given_back():
    learn = tower(Unfreeze({1: "head.bias"}))
    seen = []
    learn.add(On("before_step", lambda learn: seen.append(learn.model.head.bias.requires_grad)))
    learn.fit(epochs=2)
    assert seen == [False] * 4 + [True] * 4 and not learn.model.head.bias.requires_grad
    model = Tower()
    model.head.weight.requires_grad_(False)
    learn = tower(Unfreeze({0: "head", 1: ""}), moved := Moved(), model=model)
    learn.fit(epochs=1)
    assert set(moved.parts.values()) == {"h"} and not model.head.weight.requires_grad


def test_what_its_owner_put_into_evaluation_stays_there():
    model = Tower()
    model.plain.eval()
    tower(Unfreeze(PLAN), moved := Moved(), model=model).fit(epochs=3)
    assert set(moved.parts.values()) == {"h", "hm", "hlmn"}


def test_what_no_optimizer_holds_is_named():
    learn = tower(Unfreeze({1: "mid"}))
    group = learn.players[0].opt.param_groups[0]
    group["params"] = [p for p in group["params"] if p is not learn.model.mid.bias]
    with pytest.raises(ValueError, match=r"the optimizer of player 'model' was made without mid\.bias"):
        learn.fit(epochs=1)


@pytest.mark.parametrize("ending", ENDINGS)
def test_every_ending_gives_flags_and_modes_back(ending):
    model = Tower()
    model.train()
    model.plain.eval()  # its owner's wish
    learn = tower(Unfreeze(PLAN), model=model)
    before = flags(learn)
    end_by(learn, ending, at=3, epochs=3)
    assert flags(learn) == before and not learn.model.plain.training and learn.model.norm.training
    learn.add(moved := Moved())
    epoch = learn.epoch + learn.drawn  # after a failed validation, that is made first
    learn.fit(epochs=1)
    first = next(iter(moved.parts.values()))
    assert first.replace("p", "") == {0: "h", 1: "hm"}.get(epoch, "hlmn")
    assert flags(learn) == before


class Breaks(Callback):
    order = 10

    def before_fit(self, learn):
        raise RuntimeError("at the start")


def test_flags_come_back_when_the_fit_does_not_begin():
    learn = tower(Unfreeze(PLAN), Breaks())
    before = flags(learn)
    with pytest.raises(RuntimeError, match="at the start"):
        learn.fit(epochs=1)
    assert flags(learn) == before and learn.model.norm.training


class Two(Learner):
    "b is trained on what a makes."

    def training_step(self, batch):
        a, b = (player.modules[player.name] for player in self.players)
        return F.mse_loss(a(batch[0]), batch[1]) if self.player.name == "a" else F.mse_loss(b(a(batch[0])), batch[1])

    def validation_step(self, batch):
        return F.mse_loss(self.players[0].modules["a"](batch[0]), batch[1])


def test_turns_freeze_the_others_as_before():
    seen = []

    def look(learn):
        seen.append((learn.epoch, learn.player.name, "".join(n[0] for n, flag in flags(learn).items() if flag)))

    torch.manual_seed(0)
    a = nn.ModuleDict({"x": nn.Linear(8, 8, bias=False), "y": nn.Linear(8, 6, bias=False)})
    a.forward = lambda v: a["y"](a["x"](v))
    b = nn.ModuleDict({"z": nn.Linear(6, 6, bias=False)})
    b.forward = lambda v: b["z"](v)
    learn = Two([Player("a", a), Player("b", b)], DataLoader(TensorDataset(X, Y), batch_size=16), front="none",
                cbs=[Unfreeze({1: "x"}, player="a"), On("before_step", look)])  # fmt: skip
    before = flags(learn)
    learn.fit(epochs=2)
    assert seen == [(0, "a", "y"), (0, "b", "z")] * 2 + [(1, "a", "xy"), (1, "b", "z")] * 2
    assert flags(learn) == before and values(learn, "train/a/frozen") == {1: 64, 3: 0}
    assert "train/b/frozen" not in learn.history.names()


@pytest.mark.parametrize("plan,message", [
    ({}, r"\{epoch: patterns of parameter names\}; received \{\}"),
    ([("a", 1)], "received"),
    ({1.5: "a"}, "each key must be a whole number >= 0; received 1.5"),
    ({"1": "a"}, "received '1'"),
    ({-1: "a"}, "received -1"),
    ({1: "a("}, r"'a\(' is not a regular expression"),
    ({1: [3]}, "3 is not a regular expression"),
    ({1: 3}, "3 is not a regular expression"),
    ({1: []}, r"at 1, nothing becomes trainable: give patterns of names; received \{1: \[\]\}"),
])  # fmt: skip
def test_bad_plans(plan, message):
    with pytest.raises((TypeError, ValueError), match=message):
        Unfreeze(plan)


@pytest.mark.parametrize("kw,message", [
    ({"plan": {1: "encoder"}}, "no parameter matches 'encoder'; there are: low.weight"),
    ({"plan": {1: ["mid", "lo.weight"]}}, "no parameter matches 'lo.weight'; did you mean low.weight"),
    ({"plan": {1: "mid"}, "player": "critic"}, "no player 'critic'; there are: model"),
    ({"plan": {1: ""}}, "nothing of player 'model' would be trainable at epoch 0: low.weight, low.bias, .*…"),
    ({"plan": {3: "weight", 5: "bias"}, "by": "step"}, "nothing of player 'model' would be trainable at step 0"),
])  # fmt: skip
def test_plans_that_do_not_fit_change_nothing(kw, message):
    model = Tower()
    model.head.bias.requires_grad_(True)
    learn = tower(Unfreeze(**kw), model=model)
    with pytest.raises(ValueError, match=message):
        learn.fit(epochs=1)
    assert all(flags(learn).values()) and learn.step == 0


def test_by_is_checked():
    with pytest.raises(ValueError, match="by is 'epoch' or 'step'; received 'update'"):
        Unfreeze(PLAN, by="update")


def test_norms_and_player_are_checked():
    with pytest.raises(TypeError, match=r"Unfreeze\(norms=…\) takes True or False; received 'no'"):
        Unfreeze(PLAN, norms="no")
    for make in lambda: Unfreeze(PLAN, player=3), lambda: Curriculum(6, player=3):
        with pytest.raises(TypeError, match="player is the name of one, or None for all; received 3"):
            make()
