"""Schedules against closed forms and torch's own, and the laws they keep."""
import io
import math
import re
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.optim import lr_scheduler as torchs

from trainkit import schedule as sch
from trainkit import shapes
from trainkit.checkpoint import check_plain
from trainkit.schedule import (
    AttributeKnob,
    Curve,
    Knob,
    OptionKnob,
    PlannedCurve,
    Schedule,
    find_scheduler,
    register_scheduler,
)

DECAYING = {  # every shape that comes with the toolkit and never rises, with options it needs
    "constant": {}, "linear": {}, "cosine": {}, "polynomial": {"power": 3}, "wsd": {"decay": 0.3},
    "inverse_sqrt": {"timescale": 10}, "exponential": {"gamma": 0.9}, "step": {"every": 7, "gamma": 0.5},
    "piecewise": {"boundaries": [5, 9], "values": [1, 0.5, 0.1]},
}  # fmt: skip


def make(shape="cosine", lrs=(0.1,), **kw):
    return Schedule(torch.optim.SGD([{"params": [nn.Parameter(torch.zeros(1))], "lr": lr} for lr in lrs]), shape, **kw)


def walk(schedule, n):
    rates = []
    for _ in range(n):
        rates.append(schedule.lr[0])
        schedule.optimizer.step()
        schedule.advance()
    return rates


# ---------------------------------------------------------------- numbers


def test_the_fixtures_at_a_length_of_100_and_a_warm_up_of_10():
    cosine, linear = (PlannedCurve(name, 100, 10).multiplier for name in ("cosine", "linear"))
    for curve in cosine, linear:
        assert [curve(u) for u in (10, 55, 100)] == pytest.approx([1, 0.5, 0], abs=1e-12)
    assert cosine(32) == pytest.approx(0.5 * (1 + math.cos(math.pi * 22 / 90)))
    assert linear(32) == pytest.approx(1 - 22 / 90)


@pytest.mark.parametrize("warmup", [1, 4, 10])
def test_warm_up_starts_above_zero_and_reaches_one_exactly_once(warmup):
    values = PlannedCurve("linear", 100, warmup).preview()
    assert values[: warmup + 1] == pytest.approx([(u + 1) / (warmup + 1) for u in range(warmup + 1)])
    assert values[0] > 0 and values.count(1.0) == 1 and values.index(1.0) == warmup


def test_a_cosine_does_not_rise_behind_its_end():
    """BasicTS's CosineWarmup(10, 100) is at .117 of the rate in update 120."""
    curve = PlannedCurve("cosine", 100, 10)
    assert [curve.multiplier(u) for u in (100, 101, 120, 10_000)] == [0, 0, 0, 0]
    schedule = make("cosine", total=10)
    assert walk(schedule, 30)[10:] == [0.0] * 20 and schedule.done


def test_no_update_is_made_at_rate_zero():
    """audiozen's warm-up of 4 begins 0, 0, .025, .05; its linear decay is used up before the run ends."""
    assert min(walk(make("linear", total=16, warmup=4), 16)) > 0


TORCH = {
    "cosine": (lambda o: torchs.CosineAnnealingLR(o, 30), {}),
    "linear": (lambda o: torchs.LinearLR(o, 1.0, 1e-12, 30), {}),
    "polynomial": (lambda o: torchs.PolynomialLR(o, 30, power=3), {"power": 3}),
    "exponential": (lambda o: torchs.ExponentialLR(o, 0.8), {"gamma": 0.8}),
    "step": (lambda o: torchs.StepLR(o, 7, 0.3), {"every": 7, "gamma": 0.3}),
    "cosine_restarts": (lambda o: torchs.CosineAnnealingWarmRestarts(o, 10), {"cycles": 3}),
    # torch's milestones take effect at the boundary, these after it
    "piecewise": (lambda o: torchs.MultiStepLR(o, [6, 21], 0.5), {"boundaries": [5, 20], "values": [1, 0.5, 0.25]}),
}


@pytest.mark.parametrize("name", TORCH)
def test_equals_torch(name):
    build, options = TORCH[name]
    schedule = make(name, total=30, **options)
    theirs = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    reference = build(theirs)
    for mine in walk(schedule, 30):
        assert mine == pytest.approx(reference.get_last_lr()[0], rel=1e-6, abs=1e-9)
        theirs.step()
        reference.step()


@pytest.mark.parametrize("name", ["linear", "cosine", "wsd"])
def test_equals_lambda_lr_of_its_own_multiplier_for_all_groups(name):
    schedule = make(name, lrs=(0.3, 0.01), total=20, warmup=0.25, end=0.1)
    theirs = torch.optim.SGD([{"params": [nn.Parameter(torch.zeros(1))], "lr": lr} for lr in (0.3, 0.01)])
    reference = torchs.LambdaLR(theirs, schedule.multiplier)
    for _ in range(25):
        assert schedule.lr == pytest.approx(reference.get_last_lr())
        theirs.step()
        reference.step()
        schedule.advance()


# ---------------------------------------------------------------- laws


@given(st.sampled_from(sorted(DECAYING)), st.integers(1, 200), st.floats(0, 0.99), st.floats(0, 1), st.integers(0, 400))
def test_rises_in_the_warm_up_falls_after_it_and_stays_in_bounds(name, total, warmup, end, extra):
    curve = PlannedCurve(name, total, warmup, end, **DECAYING[name])
    peak = curve.warmup_updates
    assert 0 <= peak < total
    values = [curve.multiplier(u) for u in range(total + extra + 1)]
    assert all(a < b for a, b in zip(values[:peak], values[1 : peak + 1]))
    assert all(a >= b - 1e-12 for a, b in zip(values[peak:], values[peak + 1 :]))
    assert values[peak] == pytest.approx(1) and values[0] > 0
    assert all(end - 1e-9 <= v <= 1 + 1e-12 for v in values[peak:])


ENDING = ["linear", "cosine", "polynomial", "wsd", "cosine_restarts"]


@given(st.sampled_from(ENDING), st.integers(2, 99), st.floats(0, 1))
def test_ends_at_end_and_stays(name, total, end):
    curve = PlannedCurve(name, total, 1, end)
    assert [curve.multiplier(total + k) for k in (0, 1, 50)] == pytest.approx([end] * 3, abs=1e-9)


@given(st.sampled_from(sorted(DECAYING)), st.integers(0, 40), st.integers(2, 30), st.floats(0, 0.9))
def test_a_restored_schedule_goes_on_exactly(name, done, total, warmup):
    schedule = make(name, total=total, warmup=warmup, end=0.05, **DECAYING[name])
    walk(schedule, done)
    torch.save(schedule.state_dict(), file := io.BytesIO())
    file.seek(0)
    other = make(name, lrs=(7.0,), **DECAYING[name])
    other.load_state_dict(torch.load(file, weights_only=True))
    assert other.lr == schedule.lr and other.state_dict() == schedule.state_dict()
    assert walk(other, 10) == walk(schedule, 10)


# ---------------------------------------------------------------- bound to an optimizer


def test_the_first_update_has_the_first_rate():
    p = nn.Parameter(torch.zeros(1))
    opt = torch.optim.SGD([p], lr=1.0)
    Schedule(opt, "constant", warmup=3)
    p.grad = torch.ones(1)
    opt.step()
    assert p.item() == -0.25


def test_the_length_may_come_later_and_only_once():
    schedule = make("linear", warmup=0.5)
    assert schedule.needs_total and not schedule.done and schedule.lr == [0.1]
    with pytest.raises(ValueError, match="scheduler 'linear' must know its length"):
        schedule.advance()
    assert schedule.update == 0
    schedule.set_total(4)
    assert schedule.lr == pytest.approx([0.1 / 3])
    schedule.set_total(4)
    with pytest.raises(ValueError, match="already runs over 4 updates; received 5"):
        schedule.set_total(5)
    with pytest.raises(ValueError, match="warmup=4 leaves nothing of total=3"):
        make("linear", warmup=4).set_total(3)


def test_a_curve_without_an_end_needs_no_length_and_is_never_done():
    schedule = make("step", every=10, warmup=2)
    walk(schedule, 50)
    assert not schedule.needs_total and not schedule.done
    assert schedule.lr[0] == pytest.approx(0.1 * 0.1**4)
    fraction = make("constant", total=10, warmup=0.3)
    assert fraction.warmup_updates == 3 and not fraction.needs_total
    assert walk(fraction, 30)[-1] == 0.1


def test_a_second_schedule_starts_from_the_base_rate():
    first = make("linear", total=2)
    walk(first, 2)
    assert first.lr == [0.0] and Schedule(first.optimizer, "constant").lr == [0.1]


def test_a_group_added_meanwhile_joins():
    schedule = make("linear", total=4)
    walk(schedule, 2)
    schedule.optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))], "lr": 1.0})
    schedule.advance()
    assert schedule.lr == pytest.approx([0.025, 0.25])


def test_a_tensor_rate_is_filled_in_place():
    opt = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=torch.tensor(0.5))
    rate = opt.param_groups[0]["lr"]
    schedule = Schedule(opt, "linear", total=2)
    schedule.advance()
    assert opt.param_groups[0]["lr"] is rate and rate.item() == 0.25


def test_optimizer_state_saved_before_or_after_makes_no_difference():
    """A scheduled rate lies in the optimizer's state, too; whichever is loaded last, the rates are the schedule's."""
    a = make("cosine", total=10)
    walk(a, 4)
    saved = a.optimizer.state_dict(), a.state_dict()
    for order in (0, 1), (1, 0):
        b = make("cosine", lrs=(3.0,), total=10)
        for part in order:
            (b.optimizer, b)[part].load_state_dict(saved[part])
        assert b.lr == a.lr and walk(b, 3) == walk(make_at(a), 3)


def make_at(schedule):
    other = make(schedule.name, total=schedule.total)
    other.load_state_dict(schedule.state_dict())
    return other


def naive(schedule, updates):
    "The rates that come of asking for the multiplier of every update."
    return [base * schedule.multiplier(u) for u in updates for base in schedule.base_lrs]


@given(st.sampled_from(sorted(DECAYING)), st.integers(2, 12), st.sampled_from([0, 1, 0.5]), st.floats(0, 1), st.integers(0, 20))
def test_what_is_left_out_makes_no_difference(name, total, warmup, end, jump):
    """Flat stretches are not evaluated and equal rates not written: the rates are the naive ones to the last bit."""
    schedule = make(name, lrs=(0.3,), total=total, warmup=warmup, end=end, **DECAYING[name])
    assert walk(schedule, 20) == naive(schedule, range(20))
    schedule.stretch(total + 20)
    assert walk(schedule, 25) == naive(schedule, range(20, 45))
    schedule.restart(total)
    assert walk(schedule, 20) == naive(schedule, range(20))
    schedule.update = jump  # by hand: takes effect at the next update
    schedule.advance()
    assert schedule.lr == naive(schedule, [jump + 1])


class Counted(dict):
    "A parameter group that counts how often its rate is set."

    writes = 0

    def __setitem__(self, key, value):
        self.writes += key == "lr"
        super().__setitem__(key, value)


def counted(schedule):
    groups = schedule.optimizer.param_groups
    groups[:] = map(Counted, groups)
    return groups


@pytest.mark.parametrize("warmup", [0, 3])
def test_a_constant_rate_costs_nothing_behind_its_warm_up(warmup, monkeypatch):
    schedule = make("constant", lrs=(0.1, 0.2), warmup=warmup)
    groups, asked = counted(schedule), []
    monkeypatch.setattr(schedule, "_value", lambda *args: asked.append(args) or 1.0)
    walk(schedule, 20)
    assert len(asked) == warmup and [group.writes for group in groups] == [warmup, warmup]
    assert schedule.update == 20 and schedule.lr == [0.1, 0.2]


def test_a_shape_is_asked_once_for_an_update_and_never_behind_its_end():
    asked = []
    schedule = make(lambda u, total: asked.append(u) or 1 - u / total, total=5)
    groups = counted(schedule)
    asked.clear()
    walk(schedule, 12)
    assert asked == [1, 2, 3, 4, 5] and groups[0].writes == 5
    steps = make("step", every=10, gamma=0.5)
    groups = counted(steps)
    walk(steps, 25)
    assert groups[0].writes == 2 and steps.lr == [0.025]


def test_flat_rates_follow_what_changes_around_them():
    schedule = make("constant", lrs=(0.1,))
    walk(schedule, 3)
    schedule.optimizer.param_groups[0]["lr"] = 7.0  # somebody's hand, or the optimizer's restored state
    schedule.advance()
    assert schedule.lr == [0.1]
    schedule.optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))], "lr": 1.0})
    schedule.advance()
    assert schedule.lr == [0.1, 1.0] and schedule.base_lrs == [0.1, 1.0]
    schedule.base_lrs[0] = 0.5
    schedule.advance()
    assert schedule.lr == [0.5, 1.0]


def test_a_tensor_rate_that_was_exchanged_is_filled():
    opt = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=torch.tensor(0.5))
    schedule = Schedule(opt, "constant")
    schedule.advance()
    rate = opt.param_groups[0]["lr"]
    version = rate._version
    schedule.advance()
    assert rate._version == version  # not written again
    opt.param_groups[0]["lr"] = torch.tensor(3.0)
    schedule.advance()
    assert opt.param_groups[0]["lr"].item() == 0.5


def test_a_state_without_a_length_ends_a_flat_stretch():
    late = make("constant", warmup=0.5)
    schedule = make("constant")
    schedule.load_state_dict(late.state_dict())
    with pytest.raises(ValueError, match="must know its length"):
        schedule.advance()
    schedule.set_total(4)
    assert schedule.lr == pytest.approx([0.1 / 3])


def test_restart_and_stretch():
    schedule = make("cosine", total=10, warmup=2)
    walk(schedule, 10)
    schedule.stretch(20)
    assert not schedule.done and schedule.lr[0] == pytest.approx(0.1 * sch.cosine(8, 18))
    schedule.restart(6)
    assert schedule.update == 0 and schedule.lr[0] == pytest.approx(0.1 / 3)
    walk(schedule, 3)
    for act, bad in (schedule.stretch, 2), (schedule.restart, 0), (schedule.restart, 2), (schedule.stretch, True):
        before = schedule.state_dict(), schedule.lr
        with pytest.raises(ValueError):
            act(bad)
        assert (schedule.state_dict(), schedule.lr) == before


@pytest.mark.parametrize(
    "change, message",
    [
        ({"name": "linear"}, "of scheduler 'linear', and this one is 'cosine'"),
        ({"bases": [0.1, 0.2]}, "2 base values of lr, and there are 1 places for them"),
        ({"bases": [float("nan")]}, "a base value must be a finite number; received nan"),
        ({"bases": []}, "no base values of lr"),
        ({"knob": "momentum"}, "of knob 'momentum', and this one is 'lr'"),
        ({"by": "epoch"}, "of unit 'epoch', and this one is 'update'"),
        ({"to": "high"}, "to must be a number"),
        ({"overridden": {"value": -1.0}}, "override by value must be >= 0; received -1.0"),
        ({"overridden": {"times": float("nan")}}, "times must be a finite number; received nan"),
        ({"overridden": {"plus": 1.0}}, "override by plus must be a finite number"),
        ({"update": -1}, "update must be a whole number of updates >= 0; received -1"),
        ({"total": 0}, "total must be a whole number"),
        ({"warmup": 12}, "warmup=12 leaves nothing of total=10"),
        ({"options": {"cycles": 2}}, "unknown option 'cycles'"),
        ({"end": -3}, "end must be a multiplier >= 0; received -3"),
    ],
)
def test_a_state_that_does_not_fit_changes_nothing(change, message):
    schedule = make("cosine", total=10, warmup=2)
    walk(schedule, 3)
    before = schedule.state_dict(), schedule.lr
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        schedule.load_state_dict(schedule.state_dict() | {"update": 7} | change)
    assert (schedule.state_dict(), schedule.lr) == before


def test_the_state_is_a_copy():
    schedule = make("piecewise", boundaries=[1], values=[1, 0.5])
    schedule.state_dict()["options"]["values"][0] = 99
    schedule.state_dict()["bases"].append(1)
    assert schedule.multiplier(0) == 1 and len(schedule.base_lrs) == 1


# ---------------------------------------------------------------- names and bad input


@pytest.fixture
def registry(monkeypatch):
    monkeypatch.setattr(shapes, "_SHAPES", dict(shapes._SHAPES))


def test_a_registered_shape_is_found_by_name(registry):
    @register_scheduler("Square-Root")
    def square_root(update, total, power=0.5):
        return (1 - update / total) ** power

    assert find_scheduler("square_root") == ("square_root", square_root)
    assert make("SQUARE-ROOT", total=4, power=1).multiplier(1) == 0.75
    with pytest.raises(ValueError, match="already .*square_root; overwrite=True"):
        register_scheduler("square_root")(sch.cosine)
    register_scheduler("square_root", overwrite=True)(sch.cosine)
    assert find_scheduler("square_root")[1] is sch.cosine


def test_any_function_will_do():
    assert make(lambda u, total: 2 - u / total, total=4).multiplier(2) == 1.5
    halves = make(partial(sch.step, every=2, gamma=0.5))
    assert not halves.needs_total and halves.multiplier(4) == 0.25
    assert make("math.pow", total=4).shape is math.pow


@pytest.mark.parametrize(
    "args, kw, message",
    [
        (("cosin", 10), {}, "unknown scheduler 'cosin'; accepted (nearest first): cosine"),
        ((3, 10), {}, "a scheduler is a name or a function (update, total) -> multiplier; received 3"),
        (("nothing.here", 10), {}, "'nothing.here' can't be found"),
        (("cosine", 0), {}, "total must be a whole number of updates >= 1; received 0"),
        (("cosine", 10.0), {}, "received 10.0"),
        (("cosine", True), {}, "received True"),
        (("cosine", 10, -1), {}, "warmup must be a whole number of updates >= 0 or a fraction 0 <= f < 1; received -1"),
        (("cosine", 10, 1.0), {}, "received 1.0"),
        (("cosine", 10, float("nan")), {}, "received nan"),
        (("cosine", 10, "3"), {}, "received '3'"),
        (("cosine", 10, 10), {}, "warmup=10 leaves nothing of total=10 updates"),
        (("cosine", 10, 0, -1.5), {}, "end must be a multiplier >= 0; received -1.5"),
        (("cosine", 10, 0, float("nan")), {}, "received nan"),
        (("polynomial", 10), {"pwer": 2}, "unknown option 'pwer'; accepted (nearest first): power"),
        (("polynomial", 10), {"power": "2"}, "power must be a number > 0; received '2'"),
        (("step",), {}, "argument: 'every'"),
        (("piecewise",), {"boundaries": [3], "values": [1]}, "received [1] for the boundaries [3]"),
        ((lambda u: 1, 10), {}, "must take (update, total)"),
        ((lambda u, total: -1.0, 10), {}, "gave -1.0 at update 0"),
    ],
)
def test_bad_arguments_are_named_at_construction(args, kw, message):
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        Curve(*args, **kw)


def test_a_shape_that_turns_bad_is_named_and_leaves_the_rates_alone():
    turned = []
    schedule = make(lambda u, total: math.nan if u == 2 and turned else 1.0, total=5)
    schedule.advance()
    turned.append(True)
    with pytest.raises(ValueError, match="gave nan at update 2 of 5"):
        schedule.advance()
    assert schedule.update == 1 and schedule.lr == [0.1]


@pytest.mark.parametrize(
    "shape, kw, message",
    [
        (lambda u, total: 1 - u / 50, {"total": 60}, "at update 51 of 60"),
        (lambda u, total: 1 - u / 50, {"total": 60, "warmup": 5, "by": "epoch"}, "at epoch 51 of 55"),
        (lambda u, total=None: [1.0, 0.5, 0.1][u], {}, "failed at update 3: list index out of range"),
        (lambda u, total: 1 / (total - u), {"total": 7}, "failed at update 7 of 7: division by zero"),  # where it stays
        (lambda u, total, cut=0: 1 - u / (total - cut), {"total": 9, "cut": 2}, "with cut=2 at update 8 of 9"),
        (lambda u, total=None: -1.0 if u > 900 else 1.0, {}, "gave -1.0 at update 901"),
        ("sequence", {"parts": [{"name": "constant", "length": 1500}, lambda u, t=None: 1 - u / 400]}, "at update 401"),
    ],
)
def test_the_whole_curve_is_tried_before_anything_is_written(shape, kw, message):
    opt = torch.optim.Adam([nn.Parameter(torch.zeros(1))], lr=0.3)
    with pytest.raises(ValueError, match=re.escape(message)):
        Schedule(opt, shape, **kw)
    assert opt.param_groups[0]["lr"] == 0.3


def test_a_curve_is_tried_again_when_its_length_is_told():
    schedule = make(lambda u, total: 1.0 if total != 7 else 1 - u / 5)
    for set_to in schedule.check_total, schedule.set_total, schedule.restart:
        with pytest.raises(ValueError, match="at update 6 of 7"):
            set_to(7)
    assert schedule.total is None
    schedule.set_total(8)


def test_an_endless_curve_by_epoch_is_tried_for_a_hundred():
    make(lambda u, total=None: 1.0 if u <= 100 else -1.0, by="epoch")


def test_preview_is_what_will_be():
    schedule = make("cosine", total=12, warmup=0.25, end=0.1)
    assert [0.1 * m for m in schedule.preview()] == pytest.approx(walk(schedule, 12))
    assert len(schedule.preview(40)) == 40
    assert repr(schedule) == "Schedule('cosine', total=12, warmup=0.25, end=0.1)"


# ---------------------------------------------------------------- knobs


class Holder:
    def __init__(self, **values):
        vars(self).update(values)


def adam(**kw):
    return torch.optim.Adam([nn.Parameter(torch.zeros(1))], lr=0.1, **kw)


def test_any_option_of_an_optimizer_is_a_knob():
    groups = [{"params": [nn.Parameter(torch.zeros(1))], "weight_decay": w} for w in (0.1, 0.0)]
    opt = torch.optim.SGD(groups, lr=1.0, momentum=0.9)
    decay = Schedule(OptionKnob(opt, "weight_decay"), "linear", total=4, to=0.3)
    momentum = Schedule(OptionKnob(opt, "momentum"), "constant", warmup=2)
    rows = []
    for _ in range(5):
        rows.append([(g["weight_decay"], g["momentum"], g["lr"]) for g in opt.param_groups])
        decay.advance(), momentum.advance()
    assert [r[0][0] for r in rows] == pytest.approx([0.1, 0.15, 0.2, 0.25, 0.3])
    assert [r[1][0] for r in rows] == [0] * 5  # no decay stays none
    assert decay.values(5) == {"group 0": pytest.approx([0.1, 0.15, 0.2, 0.25, 0.3]), "group 1": [0] * 5}
    assert [r[0][1] for r in rows] == pytest.approx([0.3, 0.6, 0.9, 0.9, 0.9]) and {r[0][2] for r in rows} == {1.0}


def test_to_goes_up_from_0_where_nothing_else_is_there():
    opt = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    rising = Schedule(OptionKnob(opt, "momentum"), "linear", total=2, to=0.8)
    assert rising.values(3)["group 0"] == pytest.approx([0, 0.4, 0.8])
    weights = {"penalty": 0.0}
    assert Schedule(AttributeKnob(weights, "penalty"), "linear", total=2, to=4).values(3)["penalty"] == [0, 2, 4]


def test_a_hand_reaches_groups_that_stay_at_0():
    groups = [{"params": [nn.Parameter(torch.zeros(1))], "weight_decay": w} for w in (0.1, 0.0)]
    schedule = Schedule(OptionKnob(torch.optim.SGD(groups, lr=1.0), "weight_decay"), "linear", total=4, to=0.3)
    schedule.override(0.2)
    assert schedule.lr == [0.2, 0.2]
    schedule.override(times=2)
    assert schedule.lr == [0.2, 0.0]
    schedule.release()
    assert schedule.lr == [0.1, 0.0]


def test_a_momentum_of_1_is_refused_ahead():
    opt = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0, momentum=0.9)
    with pytest.raises(ValueError, match="momentum: to must be >= 0 and < 1; received 1.0"):
        Schedule(OptionKnob(opt, "momentum"), "linear", total=4, to=1.0)
    with pytest.raises(ValueError, match="momentum: the value at update .* must be >= 0 and < 1"):
        Schedule(OptionKnob(opt, "momentum"), "linear", total=4, end=2.0)
    assert opt.param_groups[0]["momentum"] == 0.9


def test_a_lower_bound_is_looked_at_ahead():
    knob = AttributeKnob(there := {"x": 1.0}, "x", low=0.5)
    with pytest.raises(ValueError, match="x: the value at update 6 must be >= 0.5"):
        Schedule(knob, "linear", total=10)
    assert there == {"x": 1.0}


@pytest.mark.parametrize("option, at", [("momentum", 0), ("beta1", 0), ("beta2", 1)])
def test_betas_one_by_one(option, at):
    opt = adam(betas=(0.8, 0.9))
    schedule = Schedule(OptionKnob(opt, option), "linear", total=2)
    schedule.advance()
    expected = [0.8, 0.9]
    expected[at] /= 2
    assert opt.param_groups[0]["betas"] == pytest.approx(expected) and isinstance(opt.param_groups[0]["betas"], tuple)
    opt.step()  # torch takes them
    again = Schedule(OptionKnob(opt, option), "constant")
    assert again.lr == [[0.8, 0.9][at]]  # from the base value


def test_beta1_by_its_other_name_has_the_same_base():
    opt = adam(betas=(0.8, 0.9))
    first = Schedule(OptionKnob(opt, "momentum"), "linear", total=2)
    first.advance()
    assert Schedule(OptionKnob(opt, "beta1")).lr == [0.8]


def test_tensor_options_are_filled_in_place():
    betas = torch.tensor(0.8), torch.tensor(0.9)
    opt = adam(betas=betas, foreach=False)
    Schedule(OptionKnob(opt, "beta1"), "linear", total=2).advance()
    assert opt.param_groups[0]["betas"][0] is betas[0] and betas[0].item() == pytest.approx(0.4)


def test_an_attribute_and_an_entry_are_knobs():
    """The decay of an average from 0.996 to 1, the weight of a loss from 0 to 10."""
    average, weights = Holder(decay=0.996), {"penalty": 0}
    decay = Schedule(AttributeKnob(average, "decay", 0.0), "cosine", total=10, to=1.0)
    penalty = Schedule(AttributeKnob(weights, "penalty"), "linear", total=10, to=10.0, by="epoch")
    seen = []
    for u in range(12):
        seen.append((average.decay, weights["penalty"]))
        decay.advance(), penalty.advance()
    assert [d for d, _ in seen] == pytest.approx([1 - 0.004 * math.cos(math.pi * min(u, 10) / 20) ** 2 for u in range(12)])
    assert [w for _, w in seen] == pytest.approx([min(u, 10) for u in range(12)])
    assert penalty.by == "epoch" and decay.by == "update" and repr(penalty).startswith("penalty: Schedule('linear', total=10")
    with pytest.raises(AttributeError, match="penalty belongs to no optimizer"):
        penalty.optimizer


def test_a_buffer_is_filled_in_place():
    module = nn.Module()
    module.register_buffer("temperature", torch.tensor(2.0))
    before = module.temperature
    Schedule(AttributeKnob(module, "temperature"), "linear", total=4).advance()
    assert module.temperature is before and before.item() == 1.5


@pytest.mark.parametrize(
    "make_knob, message",
    [
        (lambda: OptionKnob(nn.Linear(1, 1)), "an OptionKnob is of a torch.optim.Optimizer; received Linear"),
        (lambda: OptionKnob(adam(), "momentun"), "unknown option of the optimizer that is a number 'momentun'"),
        (lambda: OptionKnob(adam(), "amsgrad"), "'amsgrad'"),
        (lambda: OptionKnob(adam(), "betas"), "'betas'"),
        (lambda: OptionKnob(adam(), "params"), "'params'"),
        (lambda: OptionKnob(adam(), None), "None"),
        (lambda: OptionKnob(make("linear", total=2).optimizer, "initial_lr"), "'initial_lr'"),
        (lambda: AttributeKnob({"a": 1}, "b"), "unknown entry 'b'; accepted: a"),
        (lambda: AttributeKnob(Holder(alpha=1), "alpah"), "unknown attribute of Holder 'alpah'; accepted (nearest first): alpha"),
        (lambda: AttributeKnob(Holder(a="x"), "a"), "a must be a number to be a knob; it is 'x'"),
        (lambda: AttributeKnob(Holder(a=True), "a"), "it is True"),
        (lambda: AttributeKnob(Holder(a=torch.zeros(2)), "a"), "a must be a number"),
        (lambda: Schedule("lr"), "a schedule moves a Knob, or the learning rates of an optimizer; received 'lr'"),
        (lambda: Schedule(adam(), "linear", to=-1.0), "lr: to must be >= 0; received -1.0"),
        (lambda: Schedule(OptionKnob(adam(), "beta1"), "linear", 100, end=1.2), "beta1: the value at update"),
        (lambda: Schedule(OptionKnob(adam(), "beta1"), "linear", 100, to=1.0), "beta1: to must be >= 0 and < 1; received 1.0"),
    ],
)
def test_bad_knobs(make_knob, message):
    with pytest.raises((TypeError, ValueError, AttributeError), match=re.escape(message)):
        make_knob()


def test_labels_are_names_where_there_are_any():
    opt = torch.optim.SGD([{"params": [nn.Parameter(torch.zeros(1))], **kw} for kw in ({"name": "a"}, {}, {"name": "a"})], lr=1.0)
    assert OptionKnob(opt).labels == ["a (0)", "group 1", "a (2)"]


def test_values_are_what_will_be_written_and_change_nothing():
    schedule = make("cosine", lrs=(0.1, 0.2), warmup=3, end=0.1)
    groups = [dict(g) for g in schedule.optimizer.param_groups]
    ahead = schedule.values(2) if not schedule.needs_total else None
    assert ahead is None and schedule.bases == []
    with pytest.raises(ValueError, match="must know its length"):
        schedule.values(2)
    assert [dict(g) for g in schedule.optimizer.param_groups] == groups
    schedule.set_total(12)
    planned = schedule.values(15)
    seen = []
    for _ in range(15):
        seen.append(schedule.lr)
        schedule.advance()
    assert [*zip(*seen)] == [*map(tuple, planned.values())] and [*planned] == ["group 0", "group 1"]
    state = schedule.state_dict()
    schedule.override(0.5)
    assert schedule.values(15) == planned and schedule.lr == [0.5, 0.5]
    schedule.release()
    assert schedule.state_dict() == state


def test_a_knob_of_ones_own():
    class Dial(Knob):
        name, low = "dial", 0.0
        at = [4.0, 8.0]
        labels = ["left", "right"]

        def read(self):
            return [*self.at]

        def write(self, values):
            self.at[:] = values

    schedule = Schedule(dial := Dial(), "linear", total=4)
    schedule.advance()
    assert dial.at == [3.0, 6.0] and schedule.values(2) == {"left": [4.0, 3.0], "right": [8.0, 6.0]}
    schedule.override(times=2)
    assert dial.at == [6.0, 12.0]


# ---------------------------------------------------------------- by hand


def test_a_hand_is_laid_over_the_curve_and_taken_away():
    schedule, plain = make("cosine", lrs=(0.1, 0.2), total=20, warmup=4), make("cosine", lrs=(0.1, 0.2), total=20, warmup=4)
    for u in range(30):
        if u == 2:
            schedule.override(0.05)
        if u == 6:
            schedule.override(times=0.5)
        if u == 12:
            schedule.release()
        expected = [0.05, 0.05] if 2 <= u < 6 else [0.5 * lr for lr in plain.lr] if 6 <= u < 12 else plain.lr
        assert schedule.lr == pytest.approx(expected, abs=1e-15) and schedule.update == plain.update == u
        schedule.advance(), plain.advance()
    assert schedule.state_dict() == plain.state_dict()


@given(st.integers(0, 25), st.integers(0, 25), st.floats(0, 3), st.booleans(), st.sampled_from(sorted(DECAYING)))
def test_a_hand_never_disturbs_the_curve(at, length, size, times, name):
    schedule, plain = (make(name, total=15, warmup=3, **DECAYING[name]) for _ in range(2))
    for u in range(40):
        if u == at:
            schedule.override(**({"times": size} if times else {"value": size}))
        if u == at + length:
            schedule.release()
        if not at <= u < at + length:
            assert schedule.lr == plain.lr
        schedule.advance(), plain.advance()


def test_a_hand_is_state_and_seen():
    schedule = make("cosine", total=20, warmup=4)
    walk(schedule, 3)
    for hand, text in ({"value": 0.03}, "overridden by value=0.03"), ({"times": 0.5}, "overridden by times=0.5"):
        schedule.override(**hand)
        assert schedule.overridden == hand
        assert repr(schedule) == f"Schedule('cosine', total=20, warmup=4), {text}"
        other = make("cosine", total=20, warmup=4)
        other.load_state_dict(check_plain(schedule.state_dict()))
        assert other.lr == schedule.lr and other.overridden == hand
        other.release()
        assert other.lr == [0.1 * schedule.multiplier(3)]
    schedule.release()
    assert schedule.overridden is None and repr(schedule) == "Schedule('cosine', total=20, warmup=4)"
    other.load_state_dict(schedule.state_dict())
    assert other.overridden is None


@pytest.mark.parametrize("hand", [{"value": 0.3}, {"times": 2.0}])
def test_a_hand_may_be_laid_before_the_length_is_known(hand):
    schedule = make("linear")
    schedule.override(**hand)
    assert schedule.lr == [0.3 if "value" in hand else 0.2]
    schedule.set_total(4)
    walk(schedule, 2)
    assert schedule.lr == [0.3 if "value" in hand else 0.1]
    schedule.release()
    assert schedule.lr == [0.05]
    unplanned = make("linear")
    unplanned.override(**hand)
    unplanned.release()
    assert unplanned.lr == [0.1]


@pytest.mark.parametrize(
    "args, kw, error, message",
    [
        ((), {}, TypeError, "override takes a value or times=, one of them; received value=None, times=None"),
        ((1.0,), {"times": 2.0}, TypeError, "received value=1.0, times=2.0"),
        ((math.nan,), {}, ValueError, "lr: value must be a finite number; received nan"),
        ((math.inf,), {}, ValueError, "received inf"),
        ((-0.1,), {}, ValueError, "lr: value must be >= 0; received -0.1"),
        (("0.1",), {}, TypeError, "lr: value must be a number; received '0.1'"),
        ((True,), {}, TypeError, "received True"),
        ((), {"times": math.nan}, ValueError, "times must be a finite number; received nan"),
        ((), {"times": -1.0}, ValueError, "times must be a multiplier >= 0; received -1.0"),
        ((), {"times": "2"}, TypeError, "times must be a number; received '2'"),
        ((), {"times": False}, TypeError, "received False"),
    ],
)
def test_a_bad_hand_is_refused_without_change(args, kw, error, message):
    schedule = make("cosine", total=20)
    walk(schedule, 3)
    schedule.override(times=0.5)
    before = schedule.state_dict(), schedule.lr
    with pytest.raises(error, match=re.escape(message)):
        schedule.override(*args, **kw)
    assert (schedule.state_dict(), schedule.lr) == before


def test_a_factor_that_leads_out_of_bounds_later_is_refused_now():
    opt = adam(betas=(0.5, 0.9))
    schedule = Schedule(OptionKnob(opt, "beta1"), "linear", total=100, to=0.9)
    schedule.override(times=1.1)
    with pytest.raises(ValueError, match=r"beta1: the value at update \d+ must be >= 0 and < 1"):
        schedule.override(times=1.5)
    assert schedule.overridden == {"times": 1.1} and opt.param_groups[0]["betas"][0] == pytest.approx(0.55)


def test_zero_is_allowed_by_hand():
    schedule = make("constant")
    schedule.override(0)
    walk(schedule, 3)
    assert schedule.lr == [0.0] and schedule.overridden == {"value": 0.0}
    schedule.release()
    assert schedule.lr == [0.1]


def test_a_held_value_costs_no_shape_and_a_group_joins_it(monkeypatch):
    schedule = make("cosine", total=100)
    schedule.override(0.3)
    groups = counted(schedule)
    walk(schedule, 5)
    assert groups[0].writes == 0
    schedule.optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))], "lr": 1.0})
    schedule.advance()
    assert schedule.lr == [0.3, 0.3]
    schedule.release()
    assert schedule.lr == pytest.approx([0.1 * schedule.multiplier(6), schedule.multiplier(6)])


# ---------------------------------------------------------------- wrong behaviours seen elsewhere


def test_a_schedule_that_counts_updates_lasts_a_run_with_accumulation():
    """The wrong behaviour: with 2 micro-batches to an update, a linear schedule is at 0 for the last 6 of 16 batches."""
    opt = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule, rates = Schedule(opt, "linear", total=8), []
    for batch in range(16):
        rates.append(schedule.lr[0])
        if batch % 2:
            opt.step()
            schedule.advance()
    assert min(rates) == pytest.approx(1 / 8) and rates[-6:] == pytest.approx([0.375, 0.375, 0.25, 0.25, 0.125, 0.125])


def test_an_unknown_name_fails_when_it_is_said():
    """The wrong behaviour: None now, and an AttributeError in the first batch."""
    with pytest.raises(ValueError, match=r"unknown scheduler 'linaer_with_warmup'; accepted"):
        make("linaer_with_warmup")


def test_a_run_that_is_longer_than_asked_for_stays_at_the_end():
    """The wrong behaviour behind S3: a target that is passed already trains on for ever, at whatever rate comes."""
    schedule = make("wsd", total=5, end=0.1)
    assert walk(schedule, 400)[5:] == pytest.approx([0.01] * 395)
    for shorter in 4, 399:
        with pytest.raises(ValueError, match="total must be a whole number of updates >= 400"):
            schedule.stretch(shorter)
    assert (schedule.update, schedule.total) == (400, 5)


RESUMED = {
    **DECAYING, "cosine_restarts": {"cycles": 3}, "one_cycle": {}, "one_cycle_momentum": {},
    "sequence": {"parts": [{"name": "linear", "length": 0.3, "warmup": 2, "end": 0.5}, {"name": "cosine", "level": 0.5}]},
}  # fmt: skip


@pytest.mark.parametrize("name", RESUMED)
def test_leaving_at_any_update_and_going_on_is_the_same(name):
    """In the warm-up, in a restart, in the second part, behind the end: bit for bit."""
    def plan():
        return make(name, total=24, warmup=5, end=0.05, **RESUMED[name])

    expected = walk(plan(), 30)
    for left_at in range(30):
        first, second = plan(), plan()
        walk(first, left_at)
        second.load_state_dict(check_plain(first.state_dict()))
        assert walk(second, 30 - left_at) == expected[left_at:]


def test_a_sequence_in_a_state_decides_over_that_of_the_code():
    parts = [{"length": 3, "level": 0.5}, {"name": "linear"}]
    saved = make("sequence", total=10, parts=parts)
    other = make("sequence", total=10, parts=["constant"])
    other.load_state_dict(check_plain(saved.state_dict()))
    assert walk(other, 10) == walk(saved, 10) and other.options == {"parts": parts}


def test_a_state_whose_values_the_knob_can_not_take_changes_nothing():
    schedule = Schedule(OptionKnob(adam(betas=(0.5, 0.9)), "beta1"), "linear", total=10)
    schedule.advance()
    before, values = schedule.state_dict(), schedule.lr
    for change in {"end": 3.0, "update": 9}, {"overridden": {"times": 9.0}}, {"bases": [4.0]}:
        with pytest.raises(ValueError, match="beta1: the value at update .* must be >= 0 and < 1"):
            schedule.load_state_dict({**before, **change})
        assert (schedule.state_dict(), schedule.lr) == (before, values)


def test_a_function_among_the_options_needs_no_name_to_be_restored():
    def plan():
        return make("sequence", total=10, parts=[{"name": lambda u, total: 1 - u / total, "length": 4}, "constant"])

    first, second = plan(), plan()
    walk(first, 2)
    second.load_state_dict(check_plain(first.state_dict()))
    assert walk(second, 5) == walk(first, 5)


@given(st.integers(1, 30), st.integers(0, 40), st.sampled_from(sorted(RESUMED)))
def test_a_stretch_and_a_restart_leave_all_or_nothing(total, done, name):
    schedule = make(name, total=40, warmup=3, **RESUMED[name])
    walk(schedule, done)
    for act in schedule.stretch, schedule.restart:
        before = schedule.state_dict(), schedule.lr
        try:
            act(total)
        except ValueError:
            assert (schedule.state_dict(), schedule.lr) == before
        else:
            assert schedule.total == total and schedule.lr == naive(schedule, [schedule.update])
