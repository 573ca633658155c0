"Every number of a run that can be moved, by its name; and nothing else."

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from trainkit.callback import Callback
from trainkit.callbacks.batches import AuxLoss, LabelSmoothing, MixUp
from trainkit.gan.learner import GANLearner
from trainkit.gan.penalties import R1
from trainkit.knobs import Adjustable, Number, ScheduledKnob, knob, knobs, set_knob
from trainkit.learner import Learner
from trainkit.optim import OptimBuilder
from trainkit.player import Player

X = torch.randn(16, 3, generator=torch.Generator().manual_seed(0))
Y = torch.arange(16) % 4


def learner(*cbs, opt=None, loss="cross_entropy", run=None, **kw):
    torch.manual_seed(0)
    opt = opt or OptimBuilder("adamw", lr=0.01, weight_decay=0.1)
    data = DataLoader(TensorDataset(X, Y), batch_size=4)
    return Learner(nn.Linear(3, 4), data, loss, opt, cbs=cbs, run=run, front="none", **kw)


def own_step(learn, batch):
    pred = learn.player.modules[learn.player.name](batch[0])
    return {"fit": F.cross_entropy(pred, batch[1]), "size": pred.square().mean()}


def two_players(*cbs, **kw):
    torch.manual_seed(0)
    a = Player("a", nn.Linear(3, 4), step=own_step, opt=OptimBuilder("sgd", lr=0.1, momentum=0.9), **kw)
    b = Player("b", nn.Linear(3, 4), step=own_step, opt=OptimBuilder("adam", lr=0.2))
    return Learner([a, b], DataLoader(TensorDataset(X, Y), batch_size=4), cbs=cbs, front="none")


@pytest.mark.parametrize("opt,options", [
    (OptimBuilder("adamw", lr=0.1), {"lr", "weight_decay", "eps", "beta1", "beta2"}),
    (OptimBuilder("sgd", lr=0.1, momentum=0.9), {"lr", "weight_decay", "momentum", "dampening"}),
])  # fmt: skip
def test_the_options_of_an_optimizer_that_are_numbers(opt, options):
    assert {name for name in knobs(learner(opt=opt)) if "." not in name} == options


@pytest.mark.parametrize("name,where", [
    ("weight_decay", lambda g: g["weight_decay"]), ("momentum", lambda g: g["betas"][0]), ("beta1", lambda g: g["betas"][0]),
    ("beta2", lambda g: g["betas"][1]), ("eps", lambda g: g["eps"]), ("lr", lambda g: g["lr"]),
])  # fmt: skip
def test_an_option_is_set_in_every_group_and_trained_with(name, where):
    learn = learner(opt=OptimBuilder("adamw", lr=0.01, params={"bias": {"lr": 0.1}}))
    set_knob(knob(learn, name), 0.25)
    assert [where(group) for group in learn.players[0].opt.param_groups] == [0.25, 0.25]
    assert knob(learn, name).read() == [0.25, 0.25]
    learn.fit(steps=2)
    assert where(learn.players[0].opt.param_groups[0]) == 0.25


def test_a_hand_on_a_scheduled_rate_lies_over_the_curve():
    learn = learner(opt=OptimBuilder("sgd", lr=0.4, schedule="linear", total=8))
    learn.fit(steps=2)
    lr = knob(learn, "lr")
    assert isinstance(lr, ScheduledKnob) and lr.owner == "the plan of player 'model'" and lr.read() == pytest.approx([0.3])
    set_knob(lr, 0.05)
    learn.fit(steps=2)
    assert lr.read() == [0.05] and lr.schedule.overridden == {"value": 0.05}
    lr.schedule.release()
    assert lr.read() == pytest.approx([0.2])
    with pytest.raises(ValueError, match="lr is moved by the plan of player 'model': it takes one value for all its places"):
        lr.write([0.1, 0.2])


def test_weights_of_terms_are_found_and_used_also_after_a_restore(tmp_path):
    loss = {"ce": F.cross_entropy, "mse": (lambda pred, y: pred.square().mean(), 0.5)}
    learn = learner(loss=loss, run=tmp_path / "run")
    learn.fit(steps=1)
    weight = knob(learn, "weights.mse")
    assert weight.read() == [0.5] and {"weights.ce", "weights.mse"} < {*knobs(learn)}
    entry = learn.save()
    set_knob(weight, 3.0)
    learn.fit(steps=1)
    last = learn.history.last
    assert last("train/loss") == pytest.approx(last("train/ce") + 3 * last("train/mse"), rel=1e-5)
    learn.restore(entry)
    assert weight.read() == [0.5]
    set_knob(weight, 7.0)  # the player's dictionary is another one now
    assert learn.players[0].weights["mse"] == 7.0


def test_terms_of_ones_own_step_are_known_once_it_was_made():
    learn = two_players(AuxLoss(lambda learn: learn.player.modules[learn.player.name].weight.square().sum()))
    assert not [name for name in knobs(learn) if name.startswith("weights.")]
    with pytest.raises(ValueError, match=r"unknown knob 'weights.fit'.*known once it was made, or by Player\(weights="):
        knob(learn, "weights.fit", "b")
    learn.fit(steps=1)
    for name in "weights.fit", "weights.size":
        assert knob(learn, name, "b").read() == [1.0]
    assert "weights.auxiliary" not in knobs(learn) and "weights.loss" not in knobs(learn)
    set_knob(knob(learn, "weights.size", "b"), 0.0)
    learn.fit(steps=1)
    last = learn.history.last
    assert last("train/b/loss") == pytest.approx(last("train/b/fit") + last("train/b/auxiliary"), rel=1e-5)


class Counting(Callback):
    def __init__(self, rate=0.5, patience=3, name_of=None, flag=True):
        self.rate, self.patience, self.flag, self.best, self.seen = rate, patience, flag, 1.5, 0


class Sharper(Counting):
    def __init__(self, power=2.0, **kw):
        super().__init__(**kw)
        self.power = float(power)


def test_of_a_callback_what_its_constructor_takes_and_not_what_it_counts():
    names = [name for name in knobs(learner(Sharper(), MixUp(), AuxLoss(len), AuxLoss(len, name="b"))) if "." in name]
    assert sorted(names) == ["aux_loss b.weight", "aux_loss.weight", "mix_up.alpha", "mix_up.probability", "sharper.power",
                             "sharper.rate", "weights.loss"]  # fmt: skip


def test_bounds_of_a_callbacks_number_hold_and_one_is_among_them():
    smooth = LabelSmoothing(0.1)
    amount = knob(learner(smooth), "label_smoothing.amount")
    set_knob(amount, 1.0)
    assert smooth.amount == 1.0
    for bad in 1.0000001, -0.1, math.nan, math.inf:
        with pytest.raises(ValueError):
            set_knob(amount, bad)
    for bad in "0.5", None, True, [0.5]:
        with pytest.raises(TypeError, match="must be a number; received"):
            set_knob(amount, bad)
    assert smooth.amount == 1.0


def test_any_number_of_any_object_and_nothing_else():
    learn, settings, dropout = learner(), {"temperature": 2, "name": "x"}, nn.Dropout(0.5)
    set_knob(knob(learn, (settings, "temperature")), 3)
    set_knob(knob(learn, (dropout, "p")), 0.1)
    assert settings["temperature"] == 3 and dropout.p == 0.1
    for holder, name in ((settings, "temprature"), (dropout, "q")):
        with pytest.raises(ValueError, match=f"'{name}'; accepted"):
            knob(learn, (holder, name))
    for holder, name in ((settings, "name"), (dropout, "training")):
        with pytest.raises(TypeError, match="must be a number"):
            knob(learn, (holder, name))


@pytest.mark.parametrize("name,player,error,message", [
    ("lrr", None, ValueError, r"unknown knob 'lrr'; accepted \(nearest first\): lr"),
    ("mix_up.alfa", None, ValueError, r"unknown knob 'mix_up.alfa'; accepted \(nearest first\): mix_up.alpha"),
    ("mixup.alpha", None, ValueError, "nearest first.: mix_up.alpha"),
    ("initial_lr", None, ValueError, "unknown knob"),
    ("", None, ValueError, "unknown knob ''"),
    ("lr", "critic", ValueError, "there is no player 'critic'; there are: model"),
    (3, None, TypeError, r"a knob is a name or a pair \(object, 'attribute'\); received 3"),
    (("lr",), None, TypeError, "a knob is a name or a pair"),
    ((nn.Linear(1, 1), 3), None, TypeError, "a knob is a name or a pair"),
])  # fmt: skip
def test_what_is_no_knob_is_answered_with_the_nearest(name, player, error, message):
    with pytest.raises(error, match=message):
        knob(learner(MixUp()), name, player)


def test_with_several_players_one_is_named():
    learn = two_players(MixUp(num_classes=4), weights={"fit": 2.0})
    with pytest.raises(ValueError, match="'lr' is a knob of several players: say player= one of 'a', 'b'"):
        knob(learn, "lr")
    assert knob(learn, "lr", "b").read() == [0.2] and knob(learn, "momentum", "b").read() == [0.9]
    assert knob(learn, "dampening").read() == [0.0] and knob(learn, "weights.fit").read() == [2.0]  # only one player has it
    assert knob(learn, "mix_up.alpha", "a").read() == knob(learn, "mix_up.alpha").read() == [0.2]
    assert "dampening" in knobs(learn, "a") and "dampening" not in knobs(learn, "b")


def test_momentum_is_also_called_so_where_it_is_a_beta():
    learn = two_players()
    with pytest.raises(ValueError, match="'momentum' is a knob of several players"):
        knob(learn, "momentum")
    set_knob(knob(learn, "momentum", "b"), 0.5)
    assert knob(learn, "beta1").read() == [0.5] and knob(learn, "momentum", "a").read() == [0.9]
    assert "momentum" in knobs(learn) and "momentum" not in knobs(learn, "b")


def test_a_gans_terms():
    gan = GANLearner(nn.Linear(2, 3), nn.Sequential(nn.Linear(3, 1), nn.Flatten(0)), [X], latent=2, penalties=R1(), front="none")
    names = [name for name in knobs(gan) if name.startswith("weights.")]
    assert names == ["weights.adversarial", f"weights.{R1().name}", "weights.loss"]
    set_knob(knob(gan, names[1]), 0.0)
    gan.fit(steps=1)
    last = gan.history.last
    assert last("train/discriminator/loss") == pytest.approx(last("train/discriminator/adversarial"))


def test_asking_changes_nothing():
    learn = learner(MixUp())
    learn.fit(steps=1)
    before = repr(learn.state_dict()["players"]), repr(learn.state_dict()["callbacks"])
    for name in knobs(learn):
        knob(learn, name).read()
    assert (repr(learn.state_dict()["players"]), repr(learn.state_dict()["callbacks"])) == before


class Warm(Adjustable):
    low, free = Number(1), Number()

    def __init__(self):
        self.low, self.free = 1, -3


class Warmer(Warm):
    high = Number(0, 2)

    def __init__(self):
        super().__init__()
        self.high = 2


def test_numbers_are_inherited_and_loaded_all_or_none():
    warm = Warmer()
    assert warm.state_dict() == {"low": 1.0, "free": -3.0, "high": 2.0}
    with pytest.raises(ValueError, match="warmer: low must be a finite number >= 1; received 0"):
        warm.load_state_dict({"high": 1.0, "free": 5.0, "low": 0})
    assert warm.state_dict() == {"low": 1.0, "free": -3.0, "high": 2.0}
    with pytest.raises(ValueError, match="Warmer: free must be a finite number; received inf"):
        warm.free = math.inf


@dataclasses.dataclass(frozen=True)
class Frozen:
    amount: float = 0.3


def test_what_cannot_be_set_says_so():
    with pytest.raises(AttributeError, match="cannot assign to field 'amount'"):
        set_knob(knob(learner(), (Frozen(), "amount")), 0.5)
