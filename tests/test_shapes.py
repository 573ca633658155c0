"""Shapes and curves against closed forms and torch's schedulers; names, plug-ins, sequences."""
import importlib
import math
import re
import sys
import textwrap
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.optim import lr_scheduler as torchs

from trainkit import shapes
from trainkit.curve import Curve, Part, PlannedCurve
from trainkit.shapes import draw_schedules, find_scheduler, one_cycle, one_cycle_momentum, piecewise, register_scheduler

OPTIONS = {  # every shape that comes with the toolkit, with options it needs
    "constant": {}, "linear": {}, "cosine": {}, "cosine_restarts": {"cycles": 3}, "polynomial": {"power": 3},
    "wsd": {"decay": 0.3}, "inverse_sqrt": {"timescale": 10}, "exponential": {"gamma": 0.9}, "step": {"every": 7, "gamma": 0.5},
    "piecewise": {"boundaries": [5, 9], "values": [1, 0.5, 0.1]}, "one_cycle": {}, "one_cycle_momentum": {},
    "sequence": {"parts": [{"name": "linear", "length": 0.3, "end": 0.5}, {"name": "cosine", "level": 0.5}]},
}  # fmt: skip


def test_every_shape_is_tested_here():
    assert {*OPTIONS} == {*shapes._SHAPES}


# ---------------------------------------------------------------- closed forms

CLOSED = {
    "constant": lambda t: 1.0,
    "linear": lambda t: 1 - t,
    "cosine": lambda t: math.cos(math.pi * t / 2) ** 2,
    "cosine_restarts": lambda t: math.cos(math.pi * (3 * t % 1) / 2) ** 2 if t < 1 else 0.0,
    "polynomial": lambda t: (1 - t) ** 3,
    "wsd": lambda t: 1.0 if t <= 0.7 else (1 - t) / 0.3,
    "inverse_sqrt": lambda t: math.sqrt(10 / (10 + 90 * t)),
    "exponential": lambda t: math.exp(90 * t * math.log(0.9)),
    "step": lambda t: 0.5 ** math.floor(round(90 * t) / 7),
    "piecewise": lambda t: 1 if 90 * t <= 5 else 0.5 if 90 * t <= 9 else 0.1,
}


@pytest.mark.parametrize("name", CLOSED)
@pytest.mark.parametrize("warmup", [0, 10])
def test_closed_form_over_every_update(name, warmup):
    """A length of 90 after the warm-up, (u + 1)/(W + 1) of the first value within it, the last one behind the end."""
    curve = PlannedCurve(name, 90 + warmup, warmup, **OPTIONS[name])
    for u in range(warmup):
        assert curve.multiplier(u) == pytest.approx((u + 1) / (warmup + 1))
    for u in range(91):
        assert curve.multiplier(warmup + u) == pytest.approx(CLOSED[name](u / 90), abs=1e-12)
    if name not in ("inverse_sqrt", "exponential", "step", "piecewise"):
        assert {curve.multiplier(warmup + 90 + k) for k in (0, 1, 7, 1000)} == {curve.multiplier(warmup + 90)}


def test_fixtures_of_other_systems_with_their_warm_up_made_to_start_above_zero():
    """Known multipliers for W=10, T=100 are, at s = 0, 5, 10, 55, 100: 0, .5, 1, .5, 0 (cosine and linear alike).

    Theirs is s/W in the warm-up and 0 in the first update, which is a batch thrown away. Here it is (s+1)/(W+1): 1/11 and
    6/11 at s = 0 and 5. From the end of the warm-up on the numbers are the same.
    """
    for name in "cosine", "linear":
        curve = PlannedCurve(name, 100, 10)
        assert [curve.multiplier(s) for s in (0, 5, 10, 55, 100)] == pytest.approx([1 / 11, 6 / 11, 1, 0.5, 0], abs=1e-12)


def test_no_update_of_a_warm_up_is_made_at_zero():
    """The wrong behaviour: 0, 0, .025, .05 … for W=4, two updates without any effect."""
    assert PlannedCurve("constant", warmup=4).preview(6) == pytest.approx([0.2, 0.4, 0.6, 0.8, 1, 1])


def test_a_boundary_is_the_last_update_of_the_old_value():
    """As in super-resolution: with 200 000, update 200 000 is old and 200 001 new. At the boundary would be wrong."""
    at = [piecewise(u, boundaries=[200_000], values=[1e-4, 5e-5]) for u in (0, 199_999, 200_000, 200_001, 300_000)]
    assert at == [1e-4, 1e-4, 1e-4, 5e-5, 5e-5]


@pytest.mark.parametrize("anneal, torch_name", [("cosine", "cos"), ("linear", "linear")])
@pytest.mark.parametrize("total", [3, 7, 30, 101])
@pytest.mark.parametrize("pct_start", [0.23, 0.5, 0.9])
def test_one_cycle_equals_torch(anneal, torch_name, total, pct_start):
    theirs = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.3, momentum=0.95)
    options = {"pct_start": pct_start, "anneal_strategy": torch_name, "div_factor": 10, "final_div_factor": 50}
    reference = torchs.OneCycleLR(theirs, 0.3, total, **options)
    for u in range(total):
        group = theirs.param_groups[0]
        assert 0.3 * one_cycle(u, total, pct_start, 10, 50, anneal) == pytest.approx(group["lr"], rel=1e-9)
        assert 0.95 * one_cycle_momentum(u, total, pct_start, anneal=anneal) == pytest.approx(group["momentum"], rel=1e-9)
        theirs.step()
        reference.step()
    assert one_cycle(total + 5, total, pct_start, 10, 50, anneal) == pytest.approx(1 / 500)


@given(st.integers(1, 60), st.floats(0, 1), st.sampled_from(["cosine", "linear"]))
def test_a_cycle_of_any_length_stays_in_bounds(total, pct_start, anneal):
    for u in range(total + 3):
        assert 0 < one_cycle(u, total, pct_start, anneal=anneal) <= 1
        assert 17 / 19 - 1e-12 <= one_cycle_momentum(u, total, pct_start, anneal=anneal) <= 1


# ---------------------------------------------------------------- laws


@given(st.sampled_from(sorted(OPTIONS)), st.integers(4, 120), st.floats(0, 0.7), st.floats(0, 2), st.integers(1, 60))
def test_never_negative_above_zero_at_first_and_level_behind_the_end(name, total, warmup, end, extra):
    curve = PlannedCurve(name, total, warmup, end, **OPTIONS[name])
    values = curve.preview(total + extra)
    assert all(v >= 0 for v in values) and values[0] > 0
    if not curve._endless:
        assert len({*values[total:]} | {curve.multiplier(total)}) == 1
    else:  # those without an end go on, and never up again (with end <= 1)
        assert end > 1 or all(a >= b - 1e-12 for a, b in zip(values[curve.warmup_updates :], values[curve.warmup_updates + 1 :]))


@given(st.floats(0.01, 10), st.floats(0, 10), st.integers(1, 50), st.integers(0, 9))
def test_to_is_met_exactly_whatever_the_base(base, to, total, warmup):
    curve = PlannedCurve("cosine", total + warmup, warmup, to=to)
    values = [scale * base + offset for scale, offset in map(curve.line, range(total + warmup + 5))]
    assert values[warmup] == pytest.approx(base) and values[total + warmup :] == pytest.approx([to] * 5, abs=1e-9)
    low, high = sorted((base, to))
    assert all(low - 1e-9 <= v <= high + 1e-9 for v in values[warmup:])
    assert values[:warmup] == pytest.approx([base * (u + 1) / (warmup + 1) for u in range(warmup)])


def test_an_end_above_one_rises_and_stays():
    assert PlannedCurve("linear", 4, end=2).preview(7) == pytest.approx([1, 1.25, 1.5, 1.75, 2, 2, 2])


# ---------------------------------------------------------------- sequences


def test_a_sequence_is_its_parts_laid_end_to_end():
    last = {"name": "linear", "level": 0.2, "end": 0.5}
    parts = [{"name": "cosine", "length": 20, "warmup": 5}, {"length": 0.3, "level": 0.2}, last]
    whole = PlannedCurve("sequence", 100, parts=parts).preview(120)
    first, last = PlannedCurve("cosine", 20, 5), PlannedCurve("linear", 50, end=0.5)
    expected = first.preview(20) + [0.2] * 30 + [0.2 * v for v in last.preview(70)]
    assert whole == pytest.approx(expected)


def test_a_sequence_is_warmed_up_and_laid_over_a_new_length():
    curve = PlannedCurve("sequence", 10, 2, parts=[{"length": 0.5}, {"name": "linear"}])
    assert curve.preview() == pytest.approx([1 / 3, 2 / 3, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25])
    curve.total = 18
    assert [curve.multiplier(u) for u in (9, 10, 14, 18)] == pytest.approx([1, 1, 0.5, 0])


def test_a_sequence_of_shapes_without_end_has_none():
    stairs = {"name": "step", "every": 2, "gamma": 0.5, "length": 4}
    curve = PlannedCurve("sequence", parts=[stairs, {"name": "exponential", "gamma": 0.5}])
    assert not curve.needs_total and curve.preview(8) == [1, 1, 0.5, 0.5, 1, 0.5, 0.25, 0.125]
    assert PlannedCurve("sequence", parts=[{"length": 4}, "linear"]).needs_total
    assert PlannedCurve("sequence", parts=[{"length": 0.4}, "constant"]).needs_total


@pytest.mark.parametrize(
    "parts, message",
    [
        ("linear", "parts must be a list of shapes"),
        ([], "parts must be a list of shapes"),
        (3, "parts must be a list of shapes"),
        ({"name": "linear"}, "parts must be a list of shapes"),
        (["linear", "cosine"], "needs a length, and the last takes the rest; received lengths [None, None]"),
        ([{"length": 3}, {"length": 4}], "received lengths [3, 4]"),
        ([{"length": 0}, "linear"], "the length of part 'constant' must be a whole number >= 1 or a fraction"),
        ([{"length": 1.5}, "linear"], "received 1.5"),
        ([{"length": True}, "linear"], "received True"),
        ([{"length": 3, "level": -1}, "linear"], "the level of part 'constant' must be a multiplier >= 0; received -1"),
        ([{"length": 3, "level": math.inf}, "linear"], "received inf"),
        ([{"length": 3, "total": 4}, "linear"], "a part of a sequence takes no 'total'"),
        ([{"length": 3, "by": "epoch"}, "linear"], "a part of a sequence takes no 'by'"),
        ([{"length": 3, "nmae": "linear"}, "linear"], "unknown option 'nmae'"),
        ([{"name": "linaer", "length": 3}, "linear"], "unknown scheduler 'linaer'; accepted (nearest first): linear"),
        ([{"length": 60}, {"length": 0.4}, "linear"], "its parts of 60, 40 leave nothing of 100 to the last one"),
        ([{"name": "linear", "length": 20, "warmup": 20}, "linear"], "warmup=20 leaves nothing of total=20"),
    ],
)
def test_bad_sequences(parts, message):
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        Curve("sequence", 100, parts=parts)


def test_a_length_that_the_parts_do_not_fit_into_is_refused_before_it_is_taken():
    curve = PlannedCurve("sequence", parts=[{"length": 2000}, "linear"])
    for act in curve.check_total, curve.set_total:
        with pytest.raises(ValueError, match="its parts of 2000 leave nothing of 1500 to the last one"):
            act(1500)
    assert curve.total is None
    curve.set_total(4000)
    assert curve.multiplier(3000) == 0.5


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "kw, message",
    [
        ({"end": math.nan}, "end must be a multiplier >= 0; received nan"),
        ({"end": math.inf}, "received inf"),
        ({"end": "1"}, "received '1'"),
        ({"end": True}, "received True"),
        ({"end": None}, "received None"),
        ({"to": math.nan}, "to must be a number, the value at the end; received nan"),
        ({"to": "1"}, "received '1'"),
        ({"to": True}, "received True"),
        ({"end": 0.1, "to": 0.2}, "give end (a multiplier) or to (a value), not both"),
        ({"by": "batch"}, "by must be one of 'update', 'step', 'epoch', 'metric'; received 'batch'"),
        ({"by": None}, "received None"),
        ({"total": 0, "by": "epoch"}, "total must be a whole number of epochs >= 1; received 0"),
        ({"warmup": -1, "by": "epoch"}, "warmup must be a whole number of epochs"),
        ({"total": 3, "warmup": 3, "by": "epoch"}, "leaves nothing of total=3 epochs"),
    ],
)
def test_bad_arguments_of_a_curve(kw, message):
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        Curve("linear", **kw)


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("one_cycle", {"anneal": "cos"}, "anneal must be 'cosine' or 'linear'; received 'cos'"),
        ("one_cycle", {"pct_start": 1.5}, "pct_start must be a number 0 <= x <= 1; received 1.5"),
        ("one_cycle", {"div": 0}, "div must be a number >= 1; received 0"),
        ("one_cycle", {"final_div": -4}, "final_div must be a number > 0; received -4"),
        ("one_cycle_momentum", {"low": -3}, "low must be a number 0 <= x <= 1; received -3"),
        ("inverse_sqrt", {"timescale": 0}, "timescale must be a number > 0; received 0"),
        ("inverse_sqrt", {"timescale": -10}, "received -10"),
        ("exponential", {"gamma": "x"}, "gamma must be a number 0 < x <= 1; received 'x'"),
        ("exponential", {"gamma": 1.5}, "received 1.5"),
        ("exponential", {"gamma": -0.5}, "received -0.5"),
        ("cosine_restarts", {"cycles": -1}, "cycles must be a whole number >= 1; received -1"),
        ("cosine_restarts", {"cycles": 0}, "received 0"),
        ("cosine_restarts", {"cycles": 2.5}, "received 2.5"),
        ("cosine_restarts", {"cycles": "x"}, "received 'x'"),
        ("polynomial", {"power": -1}, "power must be a number > 0; received -1"),
        ("polynomial", {"power": math.nan}, "received nan"),
        ("wsd", {"decay": 2}, "decay must be a number 0 < x <= 1; received 2"),
        ("wsd", {"decay": 0}, "received 0"),
        ("step", {"every": -3}, "every must be a whole number >= 1; received -3"),
        ("step", {"every": True}, "received True"),
        ("step", {"every": 3, "gamma": 2}, "gamma must be a number 0 < x <= 1; received 2"),
        ("piecewise", {"boundaries": [10], "values": [1, -1]}, "values must be a list of multipliers >= 0; received [1, -1]"),
        ("piecewise", {"boundaries": [10], "values": [1, "a"]}, "received [1, 'a']"),
        ("piecewise", {"boundaries": [10, 10], "values": [1, 1, 1]}, "boundaries must be a list of rising numbers >= 0"),
        ("piecewise", {"boundaries": 10, "values": [1, 1]}, "received 10"),
        ("piecewise", {"boundaries": [10], "values": [1]}, "values must be one more than boundaries"),
    ],
)
@pytest.mark.parametrize("total", [None, 100])
def test_bad_options_of_a_shape(name, options, message, total):
    with pytest.raises(ValueError, match=f"scheduler '{name}': .*" + re.escape(message)):
        PlannedCurve(name, total, **options)
    with pytest.raises(ValueError, match=re.escape(message)):
        PlannedCurve(partial(find_scheduler(name)[1], **options), total)


def test_a_class_that_makes_no_shape():
    with pytest.raises(TypeError, match="scheduler 'torch.optim.lr_scheduler.StepLR' is no shape"):
        Curve(torchs.StepLR, step_size=3)


# ---------------------------------------------------------------- names and plug-ins


@pytest.fixture
def registry(monkeypatch):
    monkeypatch.setattr(shapes, "_SHAPES", dict(shapes._SHAPES))


@pytest.mark.parametrize("name", ["", "a.b", 3, None])
def test_bad_names_to_register(registry, name):
    with pytest.raises(ValueError, match="name is a non-empty string without dots"):
        register_scheduler(name)


@pytest.fixture
def install(tmp_path, monkeypatch):
    "Puts a package with entry points where the interpreter finds it; nothing of it is left behind."
    made = []

    def put(package, code, *points, group="trainkit.schedulers"):
        folder = tmp_path / package
        folder.mkdir()
        (folder / f"{package}.py").write_text(textwrap.dedent(code))
        info = folder / f"{package}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[{group}]\n" + "\n".join(points) + "\n")
        monkeypatch.syspath_prepend(folder)
        importlib.invalidate_caches()
        made.append(package)

    yield put
    for package in made:
        sys.modules.pop(package, None)


def test_an_installed_package_brings_a_scheduler(install, registry):
    with pytest.raises(ValueError, match="unknown scheduler 'saw-tooth'"):
        find_scheduler("saw-tooth")
    install("toothy", "def saw(update, total, teeth=2):\n    return 1 - teeth * update / total % 1\n", "Saw-Tooth = toothy:saw")
    assert "toothy" not in sys.modules
    name, fn = find_scheduler("saw_tooth")
    assert name == "saw_tooth" and fn is sys.modules["toothy"].saw
    assert PlannedCurve("SAW-TOOTH", 8, teeth=4).multiplier(1) == 0.5
    assert "saw_tooth" not in shapes._SHAPES  # nothing is kept here
    with pytest.raises(ValueError, match=r"unknown scheduler 'saw_toot'; accepted \(nearest first\): saw_tooth"):
        find_scheduler("saw_toot")


def test_a_known_name_does_not_ask_for_plug_ins(install, monkeypatch):
    install("thief", "raise RuntimeError('never imported')", "cosine = thief:cosine")
    monkeypatch.setattr(shapes, "entry_points", lambda **kw: pytest.fail("looked up"))
    assert find_scheduler("cosine") == ("cosine", shapes.cosine)


@pytest.mark.parametrize(
    "code, point, message",
    [
        ("raise RuntimeError('no licence')", "rusty = broken:fn", "RuntimeError: no licence"),
        ("import nothing_like_this", "rusty = broken:fn", "ModuleNotFoundError: No module named 'nothing_like_this'"),
        ("", "rusty = broken:fn", "AttributeError"),
    ],
)
def test_a_broken_plug_in_is_named(install, code, point, message):
    install("broken", code, point)
    with pytest.raises(ValueError, match="scheduler 'rusty' can't be loaded from broken:fn of broken: " + message):
        find_scheduler("rusty")
    assert find_scheduler("cosine")[0] == "cosine"


def test_a_broken_plug_in_does_not_hide_the_others(install):
    install("broken", "raise RuntimeError", "rusty = broken:fn")
    install("sound", "def fn(update, total): return 1.0\n", "shiny = sound:fn")
    assert find_scheduler("shiny")[0] == "shiny"
    with pytest.raises(ValueError, match=r"unknown scheduler 'shinny'; accepted \(nearest first\): shiny"):
        find_scheduler("shinny")


def test_two_packages_with_one_name(install):
    install("left", "def fn(update, total): return 1.0\n", "same = left:fn")
    install("right", "def fn(update, total): return 0.5\n", "same = right:fn")
    with pytest.raises(ValueError, match="scheduler 'same' is offered by several installed packages: .*; say which by its path"):
        find_scheduler("same")
    assert PlannedCurve("left.fn", 3).multiplier(0) == 1.0


def test_draw_schedules_draws_each_curve_once():
    ax = draw_schedules({"a": [1, 2], "b": [1, 2], "c": [0, 3]}, xlabel="epoch", ylabel="momentum")
    assert [(line.get_label(), [*line.get_ydata()]) for line in ax.get_lines()] == [("a, b", [1, 2]), ("c", [0, 3])]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("epoch", "momentum") and ax.get_ylim()[0] <= 0
    assert draw_schedules({"": [1]}, ax) is ax
    assert draw_schedules({}).get_legend() is None


def test_a_part_knows_its_length_and_level():
    part = Part("linear", 0.5, 2)
    assert (part.length, part.level, part.name) == (0.5, 2.0, "linear")
