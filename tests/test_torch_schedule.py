"""torch's schedulers on a shadow against torch's own, plateaus, and the plans that name either kind of scheduler."""
import math
import re
import sys
import warnings
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_shapes import install, registry  # noqa: F401 - fixtures
from torch import nn
from torch.optim import lr_scheduler as torchs

from trainkit.checkpoint import check_plain
from trainkit.schedule import AttributeKnob, OptionKnob, Schedule
from trainkit.shapes import register_scheduler
from trainkit.torch_schedule import PlateauSchedule, TorchSchedule, check_schedule, make_schedule, torch_schedulers


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def sgd(*lrs, momentum=0.9, kind=torch.optim.SGD, **kw):
    kw |= {} if kind is not torch.optim.SGD else {"momentum": momentum}
    return kind([{"params": [nn.Parameter(torch.zeros(1))], "lr": lr} for lr in lrs or (0.1,)], **kw)


def halves(epoch):
    return 0.5 ** (epoch // 4)


def three(opt):
    parts = [torchs.ConstantLR(opt, 0.5, 4), torchs.ExponentialLR(opt, 0.8), torchs.CosineAnnealingLR(opt, 8)]
    return torchs.SequentialLR(opt, parts, [4, 10])


def chained(opt):
    return torchs.ChainedScheduler([torchs.ConstantLR(opt, 0.5, 4), torchs.ExponentialLR(opt, 0.9)])


PLANS = {  # plan -> what torch does over 30 updates
    "LambdaLR": {"lr_lambda": halves}, "MultiplicativeLR": {"lr_lambda": lambda epoch: 0.9}, "StepLR": {"step_size": 4},
    "MultiStepLR": {"milestones": [3, 9, 9]}, "ConstantLR": {"factor": 0.5, "total_iters": 6}, "LinearLR": {"total_iters": 30},
    "ExponentialLR": {"gamma": 0.9}, "CosineAnnealingLR": {"T_max": 30, "eta_min": 0.01},
    "CosineAnnealingWarmRestarts": {"T_0": 4, "T_mult": 2}, "PolynomialLR": {"total_iters": 30, "power": 2.0},
    "OneCycleLR": {"max_lr": 0.3, "total_steps": 31}, "CyclicLR": {"base_lr": 0.01, "max_lr": 0.2, "step_size_up": 5},
}  # fmt: skip
FACTORIES = {"SequentialLR": three, "ChainedScheduler": chained}


def test_every_scheduler_of_torch_is_tested_here():
    assert {*PLANS, *FACTORIES, "ReduceLROnPlateau"} == {cls.__name__ for cls in torch_schedulers().values()}


def plan_for(name):
    return {"name": name, **PLANS[name]} if name in PLANS else FACTORIES[name]


def options_of(opt):
    return [(g["lr"], g.get("momentum"), g.get("betas")) for g in opt.param_groups]


def walk(schedule, n):
    rows = []
    for _ in range(n):
        rows.append(options_of(schedule.optimizer))
        schedule.optimizer.step()
        schedule.advance()
    return rows


# ---------------------------------------------------------------- equality with torch


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("name", [*PLANS, *FACTORIES])
def test_equals_torch_over_all_updates_and_for_all_groups(name, kind):
    theirs = sgd(0.1, 0.02, kind=kind)
    reference = torchs.__dict__[name](theirs, **PLANS[name]) if name in PLANS else FACTORIES[name](theirs)
    rows = walk(make_schedule(sgd(0.1, 0.02, kind=kind), plan_for(name)), 31 if name != "SequentialLR" else 19)
    for mine in rows:
        assert mine == options_of(theirs)
        theirs.step()
        reference.step()


@pytest.mark.parametrize("spelt", ["CosineAnnealingLR", "cosineannealinglr", "cosine_annealing_lr", "COSINEANNEALINGLR",
                                   torchs.CosineAnnealingLR, "torch.optim.lr_scheduler.CosineAnnealingLR",
                                   partial(torchs.CosineAnnealingLR), lambda opt: torchs.CosineAnnealingLR(opt, 10),
                                   lambda optimizer, n=10: torchs.CosineAnnealingLR(optimizer, n)])  # fmt: skip
def test_every_way_to_name_it(spelt):
    schedule = make_schedule(sgd(1.0), spelt, total=10)
    assert type(schedule) is TorchSchedule
    assert [row[0][0] for row in walk(schedule, 11)] == pytest.approx([0.5 * (1 + math.cos(math.pi * u / 10)) for u in range(11)])


@pytest.mark.parametrize(
    "ours, theirs",
    [
        ("cosine", "CosineAnnealingLR"),
        ("linear", {"name": "LinearLR", "start_factor": 1.0, "end_factor": 0.0}),
        ({"name": "polynomial", "power": 3}, {"name": "polynomiallr", "power": 3}),
    ],
)
@pytest.mark.parametrize("warmup", [0, 5, 0.2])
def test_warm_up_and_length_from_the_run_are_as_with_a_shape(ours, theirs, warmup):
    a, b = make_schedule(sgd(0.1), ours, 30, warmup), make_schedule(sgd(0.1), theirs, 30, warmup)
    for _ in range(45):
        assert b.lr == pytest.approx(a.lr, abs=1e-12)
        a.advance(), b.advance()


def test_one_cycle_by_two_shapes_is_torchs():
    opt = sgd(0.3, momentum=0.95)
    schedules = make_schedule(opt, "one_cycle", 25), make_schedule(OptionKnob(opt, "momentum"), "one_cycle_momentum", 25)
    reference = walk(make_schedule(sgd(0.3, momentum=0.95), "OneCycleLR", 25), 25)
    for row in reference:
        assert options_of(opt)[0][:2] == pytest.approx(row[0][:2], rel=1e-9)
        for s in schedules:
            s.advance()


@pytest.mark.parametrize("plan", [{"name": "CosineAnnealingLR", "T_max": 10}, "CosineAnnealingLR", "OneCycleLR", "LinearLR",
                                  lambda opt: torchs.CosineAnnealingLR(opt, 10), "PolynomialLR"])  # fmt: skip
def test_held_at_the_end(plan):
    """The wrong behaviour: torch's cosine is back at the full rate after twice its length, and one-cycle refuses to go on."""
    schedule = make_schedule(sgd(1.0), plan, total=10)
    rates = [row[0][0] for row in walk(schedule, 40)]
    assert len({*rates[10:]}) == 1 and schedule.done
    assert rates[10] == rates[9] or plan != "OneCycleLR"  # that one is at its end in the last update
    reference = torchs.CosineAnnealingLR(theirs := sgd(1.0), 10)
    for _ in range(20):
        theirs.step(), reference.step()
    assert theirs.param_groups[0]["lr"] == pytest.approx(1.0)  # so this test could fail


def test_a_sequence_of_torchs_is_held_at_the_end_of_its_last_part():
    rates = [row[0][0] for row in walk(make_schedule(sgd(1.0), three), 60)]
    assert rates[18:] == [0.0] * 42 and rates[17] > 0


def test_constant_lr_keeps_torchs_own_length():
    schedule = make_schedule(sgd(0.3), "constantlr", total=100)
    assert not schedule.needs_total
    assert [row[0][0] for row in walk(schedule, 7)] == pytest.approx([0.1] * 5 + [0.3] * 2)


# ---------------------------------------------------------------- the shadow


def test_the_real_optimizer_is_left_alone():
    opt = sgd(0.1)
    step, keys = opt.step, {*opt.param_groups[0]}
    schedule = make_schedule(opt, "OneCycleLR", 10)
    assert opt.step == step and {*opt.param_groups[0]} - keys <= {"initial_lr", "initial_momentum"}
    before = dict(opt.param_groups[0]), schedule.state_dict()
    assert len(schedule.values()["group 0"]) == len(schedule.preview()) == 10
    schedule.values(40), schedule.multiplier(7)
    assert (dict(opt.param_groups[0]), schedule.state_dict()) == before


@pytest.mark.parametrize("name", [*PLANS, *FACTORIES])
def test_values_are_what_will_be_written(name):
    schedule = make_schedule(sgd(0.1, 0.02), plan_for(name), warmup=3)
    planned = schedule.values(25)
    rows = walk(schedule, 25)
    assert [[lr for lr, *_ in row] for row in rows] == [list(pair) for pair in zip(*planned.values())]


@given(st.integers(0, 20), st.integers(0, 20), st.floats(0, 3), st.booleans(), st.sampled_from([*PLANS, *FACTORIES]))
def test_a_hand_never_disturbs_the_scheduler(at, length, size, times, name):
    """Chained forms (StepLR, ExponentialLR, MultiplicativeLR …) would take an overridden rate as the one to go on from."""
    schedule, plain = (make_schedule(sgd(0.1), plan_for(name), warmup=2) for _ in range(2))
    for u in range(30):
        if u == at:
            schedule.override(**({"times": size} if times else {"value": size}))
        if u == at + length:
            schedule.release()
        if at <= u < at + length:
            assert schedule.lr == pytest.approx([plain.lr[0] * size] if times else [size])
        else:
            assert schedule.lr == plain.lr
        schedule.advance(), plain.advance()


def test_other_knobs_go_by_torchs_schedulers_too():
    opt, weights = sgd(0.1, weight_decay=0.2), {"penalty": 4.0}
    decay = make_schedule(OptionKnob(opt, "weight_decay"), {"name": "StepLR", "step_size": 2, "gamma": 0.5})
    penalty = make_schedule(AttributeKnob(weights, "penalty"), {"name": "ExponentialLR", "gamma": 0.5, "by": "epoch"})
    for _ in range(2):
        decay.advance(), penalty.advance()
    assert opt.param_groups[0]["weight_decay"] == pytest.approx(0.1) and weights == {"penalty": 1.0} and penalty.by == "epoch"
    assert opt.param_groups[0]["lr"] == 0.1
    with pytest.raises(ValueError, match="scheduler 'OneCycleLR' can't be made: optimizer must support momentum"):
        make_schedule(OptionKnob(opt, "weight_decay"), {"name": "OneCycleLR", "cycle_momentum": True}, 10)


@pytest.mark.parametrize("plan", ["OneCycleLR", {"name": "CyclicLR", "base_lr": 0.1, "max_lr": 0.4, "step_size_up": 3}])
def test_where_there_is_no_momentum_none_is_cycled(plan):
    weights, opt = {"noise": 0.3}, torch.optim.Adagrad([nn.Parameter(torch.zeros(1))], lr=0.3)
    for knob in AttributeKnob(weights, "noise"), opt:
        rates = make_schedule(knob, plan, 10).values(10)
        assert len(rates) == 1
        theirs = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.3)
        reference = (torchs.OneCycleLR(theirs, 0.3, 10, cycle_momentum=False) if plan == "OneCycleLR" else
                     torchs.CyclicLR(theirs, 0.1, 0.4, 3, cycle_momentum=False))  # fmt: skip
        expected = []
        for _ in range(10):
            expected.append(reference.get_last_lr()[0])
            theirs.step()
            if len(expected) < 10:
                reference.step()
        assert [*rates.values()][0] == pytest.approx(expected)


@pytest.mark.parametrize(
    "plan, message",
    [
        ({"name": "CosineAnnealingLR", "T_max": -3}, "T_max must be a whole number >= 1; received -3"),
        ({"name": "CosineAnnealingLR", "T_max": 0}, "received 0"),
        ({"name": "CosineAnnealingLR", "eta_min": -1}, "eta_min must be a number >= 0; received -1"),
        ({"name": "StepLR", "step_size": 0}, "step_size must be a whole number >= 1; received 0"),
        ({"name": "StepLR", "step_size": 2.5}, "received 2.5"),
        ({"name": "ExponentialLR", "gamma": -1}, "gamma must be a number > 0; received -1"),
        ({"name": "MultiStepLR", "milestones": [3.5]}, "milestones must be a list of whole numbers >= 0; received [3.5]"),
        ({"name": "PolynomialLR", "power": -1}, "power must be a number > 0; received -1"),
        ({"name": "ConstantLR", "total_iters": 0}, "total_iters must be a whole number >= 1; received 0"),
        ({"name": "OneCycleLR", "final_div_factor": -4}, "final_div_factor must be a number > 0; received -4"),
        ({"name": "OneCycleLR", "max_lr": [0.1, -1]}, "max_lr must be a number >= 0, or a list of them"),
        ({"name": "plateau", "monitor": "valid/loss", "factor": -1}, "factor must be a number 0 <= x <= 1; received -1"),
        ({"name": "plateau", "monitor": "valid/loss", "patience": 1.5}, "patience must be a whole number >= 0; received 1.5"),
        ({"name": "LambdaLR", "lr_lambda": lambda u: 1 - u / 50}, "at update 51 must be >= 0; received -"),
        ({"name": "LambdaLR", "lr_lambda": lambda u: [1, 1][u]}, "at update 2: list index out of range"),
        ({"name": "LambdaLR", "lr_lambda": lambda u: 1 - u / 50, "total": 60}, "at update 51 of 60 must be >= 0"),
        ({"name": "MultiplicativeLR", "lr_lambda": lambda u: -0.5}, "at update 1 must be >= 0; received -"),
        ({"name": "CosineAnnealingWarmRestarts", "T_0": 0}, "T_0 must be a whole number >= 1; received 0"),
    ],
)
def test_what_would_fail_or_mean_nothing_is_refused_at_once(plan, message):
    opt = sgd(1.0, 1.0)
    for use in check_schedule, partial(make_schedule, opt):
        with pytest.raises(ValueError, match=f"scheduler '{plan['name']}'.*" + re.escape(message)):
            use(plan)
    assert [group["lr"] for group in opt.param_groups] == [1.0, 1.0]


def test_what_a_knob_cannot_take_is_found_on_the_way():
    with pytest.raises(ValueError, match="'ExponentialLR' gives with gamma=2.5 at update 2 must be >= 0 and < 5"):
        make_schedule(AttributeKnob({"noise": 1.0}, "noise", 0, 5), {"name": "ExponentialLR", "gamma": 2.5})
    make_schedule(AttributeKnob({"noise": 1.0}, "noise", 0, 5), {"name": "ExponentialLR", "gamma": 2.5}, total=2, warmup=1)


def test_a_length_told_later_is_run_through():
    schedule = make_schedule(sgd(1.0), {"name": "LambdaLR", "lr_lambda": lambda u: 1.0 if u < 1500 else -1.0, "warmup": 0.1})
    schedule.set_total(900)
    fails = make_schedule(sgd(1.0), {"name": "CosineAnnealingLR", "eta_min": 0.1}, warmup=3)
    with pytest.raises(ValueError, match="warmup=3 leaves nothing of total=3"):
        fails.check_total(3)


def test_options_that_are_refused_are_not_offered():
    with pytest.raises(TypeError, match="unknown option 'stepsize'") as caught:
        check_schedule({"name": "StepLR", "stepsize": 3})
    assert "last_epoch" not in str(caught.value)


def test_tensor_rates_are_filled_in_place():
    opt = sgd(torch.tensor(1.0))
    rate = opt.param_groups[0]["lr"]
    schedule = make_schedule(opt, {"name": "ExponentialLR", "gamma": 0.5})
    schedule.advance()
    assert opt.param_groups[0]["lr"] is rate and rate.item() == 0.5
    check_plain(schedule.state_dict())


def test_a_group_added_meanwhile_goes_with_the_first():
    schedule = make_schedule(sgd(0.1, 0.2), {"name": "ExponentialLR", "gamma": 0.5})
    walk(schedule, 1)
    schedule.optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))], "lr": 1.0})
    schedule.advance()
    assert schedule.lr == pytest.approx([0.025, 0.05, 0.25])
    other = make_schedule(sgd(0.1, 0.2, 1.0), {"name": "ExponentialLR", "gamma": 0.5})
    other.load_state_dict(check_plain(schedule.state_dict()))
    assert [row[2][0] for row in walk(other, 2)] == pytest.approx([0.25, 0.125])
    assert [r for r in walk(schedule, 3)][2] == options_of(other.optimizer)


# ---------------------------------------------------------------- state


def test_multi_step_by_epoch_goes_on_where_it_was():
    """The wrong behaviour, schedulers that aren't saved: 1, 1, .1 | .1, .1, .01 with a stop after 3 of 6 epochs."""
    def plan():
        return make_schedule(sgd(1.0), {"name": "MultiStepLR", "milestones": [2, 4], "by": "epoch"})

    first, second = plan(), plan()
    rates = [row[0][0] for row in walk(first, 3)]
    second.load_state_dict(check_plain(first.state_dict()))
    assert rates + [row[0][0] for row in walk(second, 3)] == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])


@pytest.mark.parametrize("name", [*PLANS, *FACTORIES])
def test_leaving_at_any_update_and_going_on_is_the_same(name):
    def plan():
        return make_schedule(sgd(0.1, 0.02), plan_for(name), warmup=3)

    expected = walk(plan(), 25)
    for left_at in range(25):
        first, second = plan(), plan()
        walk(first, left_at)
        state = check_plain(first.state_dict())
        second.load_state_dict(state)
        assert second.state_dict() == first.state_dict() == state
        assert walk(second, 25 - left_at) == expected[left_at:]


@pytest.mark.parametrize("name", ["SequentialLR", "StepLR", "MultiStepLR", "LinearLR"])
def test_telling_a_scheduler_only_its_epoch_is_not_enough(name):
    """The wrong behaviour: a resume that pokes `last_epoch`, and so loses what the rate had come to."""
    expected = walk(make_schedule(sgd(0.1), plan_for(name)), 19)
    poked = make_schedule(sgd(0.1), plan_for(name))
    poked._made.scheduler.last_epoch = 12
    assert walk(poked, 7)[1:] != expected[13:]


def test_parts_of_a_scheduler_get_their_own_types_back():
    def plan():
        return make_schedule(sgd(0.1), lambda opt: torchs.ChainedScheduler([torchs.MultiStepLR(opt, [2, 4])]))

    first, second = plan(), plan()
    second.load_state_dict(check_plain(first.state_dict()))
    (ours,), (theirs,) = (s._made.scheduler._schedulers for s in (second, first))
    assert type(ours.milestones) is type(theirs.milestones) and [*ours.milestones.elements()] == [2, 4]


def test_the_momentum_is_put_back_too():
    def plan(kind):
        return make_schedule(sgd(0.3, kind=kind), {"name": "CyclicLR", "base_lr": 0.01, "max_lr": 0.2, "step_size_up": 4})

    for kind in torch.optim.SGD, torch.optim.Adam:
        first, second = plan(kind), plan(kind)
        walk(first, 3)
        second.load_state_dict(first.state_dict())
        assert options_of(second.optimizer) == options_of(first.optimizer)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"name": "StepLR"}, "the state is of scheduler 'StepLR', and this one is 'MultiStepLR'"),
        ({"knob": "momentum"}, "of knob 'momentum'"),
        ({"by": "epoch"}, "of unit 'epoch'"),
        ({"monitor": "valid/loss"}, "the state follows 'valid/loss', and this schedule ''"),
        ({"bases": [0.1]}, "1 base values of lr, and there are 2 places"),
        ({"bases": []}, "not more than there are base values"),
        ({"update": -1}, "update must be a whole number of updates >= 0; received -1"),
        ({"warmup": -1}, "warmup must be a whole number"),
        ({"total": 0}, "total must be a whole number"),
        ({"options": {"milestone": [1]}}, "unknown option 'milestone'; accepted (nearest first): milestones"),
        ({"options": {"milestones": 7}}, "milestones must be a list of whole numbers >= 0; received 7"),
        ({"overridden": {"value": -1}}, "override by value must be >= 0; received -1"),
        ({"made": None}, "the state lacks the counters of scheduler 'MultiStepLR'"),
        ({"made": [1]}, "the counters of a torch scheduler are a 'scheduler' and its 'groups'"),
        ({"made": {"scheduler": {}, "groups": [{}]}}, "the scheduler's state lacks base_lrs"),
        ({"made": {"scheduler": {}, "groups": [{}] * 3}}, "not more than there are base values"),
    ],
)
def test_a_state_that_does_not_fit_changes_nothing(change, message):
    schedule = make_schedule(sgd(0.1, 0.2), {"name": "MultiStepLR", "milestones": [2, 4]}, warmup=2)
    walk(schedule, 5)
    before, rates = schedule.state_dict(), schedule.lr
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        schedule.load_state_dict({**before, "update": 9, **change})
    assert (schedule.state_dict(), schedule.lr) == (before, rates)
    with pytest.raises(ValueError, match="a schedule state lacks"):
        schedule.load_state_dict({k: v for k, v in before.items() if k != "made"})
    assert walk(schedule, 3)[2][0][0] == pytest.approx(0.001)


def test_a_scheduler_that_can_not_be_saved_is_refused_before_the_run():
    class Odd(torchs.LRScheduler):
        def __init__(self, optimizer):
            self.stream = sys.stdout
            super().__init__(optimizer)

        def get_lr(self):
            return self.base_lrs

    with pytest.raises(ValueError, match=r"Odd' can't be used: its state can't be stored: scheduler/stream is a|can't be used"):
        make_schedule(sgd(0.1), Odd)


def test_the_state_is_a_copy():
    schedule = make_schedule(sgd(0.1), {"name": "MultiStepLR", "milestones": [2, 4]})
    state = schedule.state_dict()
    state["made"]["scheduler"]["milestones"].clear()
    state["options"]["milestones"].clear()
    walk(schedule, 4)
    assert schedule.lr == pytest.approx([0.001])


# ---------------------------------------------------------------- length


def test_the_length_may_come_later_and_be_changed():
    schedule = make_schedule(sgd(1.0), "CosineAnnealingLR", warmup=0.5)
    assert schedule.needs_total and not schedule.done and schedule.lr == [1.0]
    for act in schedule.advance, schedule.values:
        with pytest.raises(ValueError, match="scheduler 'CosineAnnealingLR' must know its length"):
            act()
    unknown = schedule.state_dict()
    schedule.set_total(20)
    assert schedule.lr == pytest.approx([1 / 11])
    with pytest.raises(ValueError, match="already runs over 20 updates; received 30"):
        schedule.set_total(30)
    walk(schedule, 20)
    assert schedule.lr == pytest.approx([0], abs=1e-12)
    schedule.stretch(40)
    assert schedule.lr == pytest.approx([1.0]) and not schedule.done  # its warm-up is over just now
    schedule.restart(4)
    assert (schedule.lr, schedule.update) == (pytest.approx([1 / 3]), 0)
    for act, bad in (schedule.stretch, 0), (schedule.restart, 0), (schedule.restart, 1.5):
        before = schedule.state_dict()
        with pytest.raises(ValueError):
            act(bad)
        assert schedule.state_dict() == before
    late = make_schedule(sgd(1.0), "CosineAnnealingLR", warmup=0.5)
    late.load_state_dict(check_plain(unknown))
    late.set_total(4)
    assert late.lr == pytest.approx([1 / 3])


def test_a_stretched_cosine_is_the_longer_one_from_here():
    schedule, longer = make_schedule(sgd(1.0), "CosineAnnealingLR", 20, 4), make_schedule(sgd(1.0), "CosineAnnealingLR", 40, 4)
    walk(schedule, 10), walk(longer, 10)
    schedule.stretch(40)
    assert [r[0][0] for r in walk(schedule, 40)] == pytest.approx([r[0][0] for r in walk(longer, 40)])


# ---------------------------------------------------------------- plateaus


@pytest.mark.parametrize(
    "options", [{}, {"mode": "max"}, {"threshold_mode": "abs", "threshold": 0.1}, {"cooldown": 2, "min_lr": 0.01}]
)
@given(st.lists(st.floats(-3, 3), min_size=1, max_size=25))
def test_a_plateau_is_torchs(options, values):
    theirs = sgd(0.1, 0.2)
    reference = torchs.ReduceLROnPlateau(theirs, factor=0.5, patience=2, **options)
    mine = make_schedule(sgd(0.1, 0.2), {"name": "plateau", "monitor": "valid/loss", "factor": 0.5, "patience": 2, **options})
    for value in values:
        mine.observe(value), reference.step(value)
        assert options_of(mine.optimizer) == options_of(theirs)


@pytest.mark.parametrize("mode", ["min", "max"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_no_number_is_no_improvement(mode, bad):
    """The wrong behaviour: NaN compares false, and so never counts; an infinite score is the best there ever was."""
    schedule = make_schedule(sgd(1.0), {"name": "plateau", "monitor": "valid/x", "mode": mode, "factor": 0.5, "patience": 2})
    rates = []
    for value in [1.0, bad, bad, bad, 1.0, bad, bad]:
        schedule.observe(value)
        rates += schedule.lr
    assert rates == [1, 1, 1, 0.5, 0.5, 0.5, 0.25]
    schedule.observe(0.5 if mode == "min" else 2.0)
    assert schedule._made.scheduler.num_bad_epochs == 0  # a real improvement counts


def test_a_plateau_goes_on_with_its_counters():
    def plan():
        counters = {"factor": 0.5, "patience": 2, "cooldown": 1}
        return make_schedule(sgd(1.0), {"name": "ReduceLROnPlateau", "monitor": "valid/loss", **counters})

    values = [1.0, 1.1, 0.9, 0.95, math.nan, 1.0, 1.0, 0.8, 0.9, 0.9, 0.9, 0.9, 0.9]
    whole, expected = plan(), []
    for value in values:
        whole.observe(value)
        expected.append(whole.lr)
    assert len({*map(tuple, expected)}) > 2
    for left_at in range(len(values)):
        first, second = plan(), plan()
        for value in values[:left_at]:
            first.observe(value)
        second.load_state_dict(check_plain(first.state_dict()))
        rates = []
        for value in values[left_at:]:
            second.observe(value)
            rates.append(second.lr)
        assert rates == expected[left_at:]


def test_a_plateau_is_warmed_up_by_what_it_is_told():
    by_values = make_schedule(sgd(1.0), {"name": "plateau", "monitor": "m", "mode": "min", "warmup": 1})
    assert (by_values.by, by_values.monitor, by_values.lr) == ("metric", "m", [0.5])
    by_values.observe(1.0)
    assert by_values.lr == [1.0]
    hasty = {"name": "plateau", "monitor": "m", "mode": "min", "warmup": 3, "by": "update", "patience": 0, "factor": 0.5}
    updates = make_schedule(sgd(1.0), hasty)
    updates.advance()
    updates.observe(1.0), updates.observe(1.0)
    assert (updates.lr, updates.update) == ([0.25], 1)  # half of 2/4
    updates.advance(), updates.advance(), updates.advance()
    assert updates.lr == [0.5] and not updates.done
    updates.override(times=0.1)
    updates.observe(1.0)
    assert updates.lr == pytest.approx([0.025]) and repr(updates).endswith("overridden by times=0.1, by m")
    fraction = make_schedule(sgd(1.0), {"name": "plateau", "monitor": "m", "mode": "min", "warmup": 0.5, "by": "update"})
    assert fraction.needs_total
    fraction.set_total(10)
    assert fraction.lr == pytest.approx([1 / 6])


@pytest.mark.parametrize("monitor, mode, better", [("valid/accuracy", None, 1), ("valid/loss", None, -1),
                                                   ("valid/q", "max", 1), ("valid/accuracy", "min", -1)])  # fmt: skip
def test_a_plateau_knows_what_is_better_from_the_name(monitor, mode, better):
    plan = {"name": "plateau", "monitor": monitor, "patience": 0, "factor": 0.5, **({"mode": mode} if mode else {})}
    assert check_schedule(plan) == plan  # as it was typed
    schedule = make_schedule(sgd(1.0), plan)
    for value in (0.1, 0.2, 0.3, 0.4):
        schedule.observe(better * value)
    assert schedule.lr == [1.0]
    again = make_schedule(sgd(1.0), plan)
    again.load_state_dict(schedule.state_dict())
    for one in schedule, again:
        one.observe(better * 0.3)
        assert one.lr == [0.5]


def test_a_plateau_knows_if_it_has_heard_anything():
    schedule = make_schedule(sgd(1.0), {"name": "plateau", "monitor": "valid/lss", "mode": "min"})
    assert not schedule.heard and make_schedule(sgd(1.0), "cosine", 5).heard and make_schedule(sgd(1.0), "linearlr", 5).heard
    assert "unknown monitor 'valid/lss'; accepted (nearest first): valid/loss" in schedule.unheard(["train/loss", "valid/loss"])
    schedule.observe(math.nan)
    again = make_schedule(sgd(1.0), {"name": "plateau", "monitor": "valid/lss", "mode": "min"})
    again.load_state_dict(schedule.state_dict())
    assert schedule.heard and again.heard


@pytest.mark.parametrize(
    "plan, message",
    [
        ("plateau", "plateau must know which series of the history to follow: monitor='valid/loss'; received None"),
        ({"name": "plateau", "monitor": ""}, "received ''"),
        ({"name": "plateau", "monitor": 3}, "received 3"),
        ({"name": "plateau", "monitor": "m", "warmup": 0.1}, "a warm-up of 0.1 has no whole to be a part of"),
        ({"name": "plateau", "monitor": "m"}, "is more of monitor='m' better, or less? Say mode='max' or mode='min'"),
        ({"name": "plateau", "monitor": "x/loss", "patiense": 1}, "unknown option 'patiense'; accepted (nearest"),
        ({"name": "plateau", "monitor": "m", "mode": "up"}, "scheduler 'plateau' can't be made: mode up is unknown"),
        ({"name": "plateau", "monitor": "a/loss", "factor": 1.5}, "factor must be a number 0 <= x <= 1; received 1.5"),
        ({"name": "cosine", "monitor": "m"}, "unknown option 'monitor'"),
        ({"name": "cosine", "by": "metric"}, "by='metric' is for plateau: scheduler 'cosine' follows no series"),
        ({"name": "StepLR", "step_size": 3, "by": "metric"}, "by='metric' is for plateau"),
        ({"name": "StepLR", "step_size": 3, "monitor": "m"}, "unknown option 'monitor'"),
    ],
)
def test_bad_plateaus(plan, message):
    for use in check_schedule, partial(make_schedule, sgd(1.0)):
        with pytest.raises((TypeError, ValueError), match=re.escape(message)):
            use(plan)


# ---------------------------------------------------------------- plans


@pytest.mark.parametrize(
    "plan, message",
    [
        ("CosineAnealingLR", "unknown scheduler 'CosineAnealingLR'; accepted (nearest first): CosineAnnealingLR"),
        ("platau", "(nearest first): plateau"),
        ("no.such.Scheduler", "'no.such.Scheduler' can't be found"),
        (None, "a scheduler is a name or a function (update, total) -> multiplier; received None"),
        ("StepLR", "missing a required argument: 'step_size'"),
        ({"name": "StepLR", "stepsize": 2}, "unknown option 'stepsize'; accepted (nearest first): step_size"),
        ({"name": "StepLR", "step_size": 2, "end": 0.1}, "unknown option 'end'"),
        ({"name": "StepLR", "step_size": 2, "last_epoch": 3}, "where it is, is told by its state; received last_epoch=3"),
        ({"name": "CosineAnnealingLR", "warmup": 1.5}, "warmup must be a whole number"),
        ({"name": "CosineAnnealingLR", "total": 0}, "total must be a whole number"),
        ({"name": "CosineAnnealingLR", "by": "hour"}, "by must be one of"),
        ({"name": "LinearLR", "start_factor": 2}, "start_factor must be a number 0 < x <= 1; received 2"),
        ({"name": "OneCycleLR", "anneal_strategy": "cosine"}, "scheduler 'OneCycleLR' can't be made: anneal_strategy must be"),
        ({"name": "OneCycleLR", "pct_start": 2.0}, "pct_start must be a number 0 <= x <= 1; received 2.0"),
        ({"name": "LambdaLR"}, "missing a required argument: 'lr_lambda'"),
        ("SequentialLR", "SequentialLR is made of schedulers that have an optimizer already: use 'sequence'"),
        ({"name": "ChainedScheduler"}, "use 'sequence'"),
        (partial(torchs.StepLR, step=3), "unknown option 'step'"),
    ],
)
def test_a_bad_plan_is_refused_without_an_optimizer(plan, message):
    for use in check_schedule, partial(make_schedule, sgd(1.0)):
        with pytest.raises((TypeError, ValueError), match=re.escape(message)):
            use(plan)


def test_what_is_said_twice():
    for kw in {"total": 4}, {"warmup": 2}:
        (key, value), = kw.items()
        with pytest.raises(ValueError, match=f"{key} is given twice: 3 in the schedule, and {value}"):
            check_schedule({"name": "cosine", key: 3}, **kw)
        assert check_schedule({"name": "cosine", key: value}, **kw) == {"name": "cosine", **kw}


@pytest.mark.parametrize("plan", [*PLANS, *FACTORIES, "cosine", "plateau"])
def test_a_checked_plan_makes_the_same_schedule(plan):
    said = {"name": "plateau", "monitor": "loss"} if plan == "plateau" else plan if plan == "cosine" else plan_for(plan)
    checked = check_schedule(said, total=40)
    assert check_schedule(checked) == checked and checked["total"] == 40
    assert make_schedule(sgd(0.1), checked).values(20) == make_schedule(sgd(0.1), said, total=40).values(20)


def test_lists_for_several_groups_are_checked_too():
    plan = {"name": "OneCycleLR", "max_lr": [0.1, 0.2, 0.3]}
    assert check_schedule(plan) == plan
    assert make_schedule(sgd(1.0, 1.0, 1.0), plan, 10).values(10)["group 2"][2] == pytest.approx(0.3)
    with pytest.raises(ValueError, match="scheduler 'OneCycleLR' can't be made"):
        make_schedule(sgd(1.0), plan, 10)


def test_a_factory_that_makes_something_else_or_nothing():
    for factory, message in (lambda opt: 3, "it made 3"), (lambda opt: {}["no"], "can't be made: 'no'"):
        assert callable(check_schedule(factory)["name"])  # not called without an optimizer
        with pytest.raises((TypeError, ValueError), match=re.escape(message)):
            make_schedule(sgd(1.0), factory)


def test_torchs_kind_may_be_registered_or_installed(registry, install):  # noqa: F811
    register_scheduler("my_steps")(lambda opt: torchs.StepLR(opt, 2, 0.5))
    install("steppy", """
        from torch.optim.lr_scheduler import StepLR
        class Steppy(StepLR): pass
        """, "steppy = steppy:Steppy")  # fmt: skip
    for plan in "my-steps", {"name": "steppy", "step_size": 2, "gamma": 0.5}:
        schedule = make_schedule(sgd(1.0), check_schedule(plan))
        assert isinstance(schedule, TorchSchedule) and [r[0][0] for r in walk(schedule, 5)] == [1, 1, 0.5, 0.5, 0.25]
    with pytest.raises(TypeError, match=re.escape("unknown option 'stepsize'; accepted (nearest first): step_size")):
        check_schedule({"name": "steppy", "stepsize": 2})


def test_shapes_are_made_too():
    schedule = make_schedule(sgd(0.1), {"name": "cosine", "end": 0.1}, total=10, warmup=2)
    assert type(schedule) is Schedule and schedule.end == 0.1 and schedule.warmup == 2
    assert type(make_schedule(sgd(0.1), lambda u, total=None: 1.0)) is Schedule
    assert type(make_schedule(sgd(0.1))) is Schedule and make_schedule(sgd(0.1)).name == "constant"
    with pytest.raises(TypeError, match="'cosine' is a shape and none of torch's kind"):
        TorchSchedule(sgd(0.1), "cosine")
    with pytest.raises(ValueError, match="must know which series"):
        PlateauSchedule(sgd(0.1))
