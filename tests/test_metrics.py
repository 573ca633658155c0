"Metrics against torchmetrics, torch's own functions and the value over all of the data."

import functools
import math
from collections import namedtuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchmetrics
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from trainkit.metrics import (
    FunctionMetric,
    Mean,
    MetricSet,
    StatefulMetric,
    accuracy,
    as_metric,
    binary_accuracy,
    detached,
    mae,
    metric_name,
    mse,
)


def run(metrics, *arrays, batch_size=4):
    "Feed (pred, target) in batches; the last one is shorter."
    for pred, *targets in zip(*(a.split(batch_size) for a in arrays)):
        metrics.update(pred, tuple(targets), len(pred))
    return metrics.compute()


# --- means -----------------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.floats(-1e6, 1e6), st.integers(1, 100)), min_size=1, max_size=20))
def test_mean_is_the_weighted_mean(pairs):
    mean, tensors = Mean(), Mean()
    for value, n in pairs:
        mean.update(value, n)
        tensors.update(torch.tensor(value, dtype=torch.float64), n)
    expected = np.average([v for v, _ in pairs], weights=[n for _, n in pairs])
    assert mean.compute() == pytest.approx(expected, abs=1e-9)
    assert tensors.compute() == pytest.approx(expected, abs=1e-9)


def test_mean_keeps_float64_over_many_small_values():
    mean = Mean()
    mean.update(torch.tensor(1e8), 1)
    for _ in range(1000):
        mean.update(torch.tensor(1.0), 1)
    assert mean.compute() * 1001 == pytest.approx(1e8 + 1000, abs=0.01)  # a float32 sum stays at 1e8


def test_mean_without_values_and_with_nan():
    mean = Mean()
    assert math.isnan(mean.compute())
    mean.update(1.0, 0)
    assert math.isnan(mean.compute())
    mean.update(1.0)
    mean.update(torch.tensor(float("nan")))
    mean.update(1.0)
    assert math.isnan(mean.compute())
    mean.reset()
    mean.update(2.0)
    assert mean.compute() == 2.0


def test_mean_refuses():
    with pytest.raises(ValueError, match="weights >= 0"):
        Mean().update(1.0, -1)
    with pytest.raises(ValueError, match=r"shape \(3, 2\)"):
        Mean().update(torch.zeros(3, 2))


def test_mean_keeps_no_graph():
    mean = Mean()
    mean.update(torch.ones((), requires_grad=True) * 2)
    assert not mean.total.requires_grad


# --- functions -------------------------------------------------------------------------------------------------------


@given(n=st.integers(1, 30), classes=st.integers(2, 6), batch_size=st.integers(1, 9), seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_accuracy_is_torchmetrics(n, classes, batch_size, seed):
    g = torch.Generator().manual_seed(seed)
    pred, target = torch.randn(n, classes, generator=g), torch.randint(classes, (n,), generator=g)
    theirs = torchmetrics.functional.accuracy(pred, target, task="multiclass", num_classes=classes)
    assert run(MetricSet("accuracy"), pred, target, batch_size=batch_size)["accuracy"] == pytest.approx(theirs.item())


def test_binary_accuracy_and_dense_accuracy():
    pred, target = torch.randn(20), torch.randint(2, (20,))
    theirs = torchmetrics.functional.accuracy(pred.sigmoid(), target, task="binary")
    assert binary_accuracy(pred, target) == theirs
    scores, labels = torch.randn(3, 5, 4, 4), torch.randint(5, (3, 4, 4))
    assert accuracy(scores, labels) == (scores.argmax(1) == labels).float().mean()
    assert accuracy(labels, labels) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_errors_are_torchs_own_in_float32_or_better(dtype):
    a, b = torch.randn(50, 3).to(dtype), torch.randn(50, 3).to(dtype)
    assert mse(a, b) == pytest.approx(F.mse_loss(a.double(), b.double()).item(), rel=1e-5)
    assert mae(a, b) == pytest.approx(F.l1_loss(a.double(), b.double()).item(), rel=1e-5)


@pytest.mark.parametrize("f", [mse, mae, binary_accuracy])
def test_shapes_that_would_broadcast_are_refused(f):
    with pytest.raises(ValueError, match=r"\(4, 1\) and a target \(4,\)"):
        f(torch.zeros(4, 1), torch.zeros(4))


@pytest.mark.parametrize(
    "pred, target",
    [
        (torch.zeros(4, 1), torch.zeros(4)),
        (torch.zeros(4), torch.zeros(4).long()),
        (torch.zeros(4, 3), torch.zeros(5).long()),
        (torch.zeros(4, 3), torch.zeros(4, 3).long()),
        (torch.zeros(4, 3, 2), torch.zeros(4).long()),
    ],
)
def test_accuracy_refuses(pred, target):
    with pytest.raises(ValueError, match="accuracy (takes|compares)"):
        accuracy(pred, target)


@pytest.mark.parametrize("name", ["accuracy", "binary_accuracy", "mse", "mae"])
def test_metrics_only_look(name):
    "They change neither the tensors, nor their gradients, nor the random state."
    if name == "accuracy":
        pred, target = torch.randn(8, 3, requires_grad=True), torch.randint(3, (8,))
    else:
        pred, target = torch.randn(8, requires_grad=True), (torch.rand(8) > 0.5).float()
    before = pred.detach().clone(), target.clone(), torch.get_rng_state()
    metrics = MetricSet(name)
    metrics.update(pred, (target,), 8)
    assert torch.equal(pred, before[0]) and torch.equal(target, before[1])
    assert torch.equal(torch.get_rng_state(), before[2])
    assert pred.grad is None and not metrics.metrics[0].mean.total.requires_grad


def test_a_mean_over_uneven_batches_is_that_over_the_data():
    pred, target = torch.randn(11, 2), torch.randn(11, 2)
    full = F.mse_loss(pred, target).item()
    ours = run(MetricSet(mse), pred, target, batch_size=4)["mse"]
    plain = sum(mse(p, t).item() for p, t in zip(pred.split(4), target.split(4))) / 3
    assert ours == pytest.approx(full, rel=1e-6) and plain != pytest.approx(full, rel=1e-3)


def test_nothing_is_computed_with_gradients():
    seen = []

    def metric(pred, target):
        seen.append((torch.is_grad_enabled(), pred["a"][0].requires_grad))
        return pred["a"][0].sum()

    MetricSet(metric).update({"a": [torch.ones(2, requires_grad=True)]}, (None,), 2)
    assert seen == [(False, False)]


@pytest.mark.parametrize("value", [3, 3.0, True, np.float32(3), np.array(3.0), torch.tensor(3), torch.tensor([[3.0]])])
def test_whatever_is_one_number_is_taken(value):
    assert run(MetricSet({"it": lambda p, t: value}), torch.ones(2), torch.ones(2))["it"] == float(value)


@pytest.mark.parametrize("value", [None, "3", torch.ones(2), np.ones(2), torch.ones(0), [1.0], {"a": 1.0}])
def test_whatever_is_not_is_refused_by_name(value):
    with pytest.raises(ValueError, match="'it' should give one number"):
        run(MetricSet({"it": lambda p, t: value}), torch.ones(2), torch.ones(2))


def test_unlabelled_batches():
    spread = MetricSet({"spread": lambda pred: pred.std()})
    assert run(spread, torch.arange(4.0))["spread"] == pytest.approx(torch.arange(4.0).std().item())
    with pytest.raises(TypeError, match="'mse' got a prediction only, as the batch has no target"):
        run(MetricSet("mse"), torch.ones(2))

    def broken(pred, target):
        raise TypeError("a mistake of its own")

    with pytest.raises(TypeError, match="^a mistake of its own$"):
        run(MetricSet(broken), torch.ones(2), torch.ones(2))


def test_detached_keeps_the_form():
    Pair = namedtuple("Pair", "a b")
    x = torch.ones(1, requires_grad=True)
    out = detached(Pair([x], ({"k": x}, "s", 1)))
    assert type(out) is Pair and type(out.a) is list and type(out.b) is tuple
    assert not out.a[0].requires_grad and not out.b[0]["k"].requires_grad and out.b[1:] == ("s", 1)


# --- stateful --------------------------------------------------------------------------------------------------------


def test_torchmetrics_over_batches_equal_the_whole():
    pred, target = torch.randn(30, 4).softmax(1), torch.randint(4, (30,))
    f1 = torchmetrics.F1Score(task="multiclass", num_classes=4, average="macro")
    auc = torchmetrics.AUROC(task="multiclass", num_classes=4)
    values = run(MetricSet({"f1": f1, "auc": auc}), pred, target, batch_size=7)
    assert values["f1"] == pytest.approx(
        torchmetrics.functional.f1_score(pred, target, task="multiclass", num_classes=4, average="macro").item()
    )
    assert values["auc"] == pytest.approx(torchmetrics.functional.auroc(pred, target, task="multiclass", num_classes=4).item())
    assert f1._update_count == 0  # the caller's object was not used


def test_a_collection_is_taken_apart():
    pred, target = torch.randn(10, 3), torch.randint(3, (10,))

    def collection():
        return torchmetrics.MetricCollection(
            [
                torchmetrics.Accuracy(task="multiclass", num_classes=3),
                torchmetrics.F1Score(task="multiclass", num_classes=3),
            ]
        )

    assert set(run(MetricSet([collection()]), pred, target)) == {"MulticlassAccuracy", "MulticlassF1Score"}
    assert set(run(MetricSet({"a": collection()}), pred, target)) == {"a_MulticlassAccuracy", "a_MulticlassF1Score"}
    assert set(run(MetricSet({"a": collection()}).for_loader("v"), pred, target)) == {
        "a_MulticlassAccuracy",
        "a_MulticlassF1Score",
    }
    with pytest.raises(ValueError, match="two metrics give a value called 'MulticlassAccuracy'"):
        run(MetricSet([collection(), Doubled()]), pred, target)


class Doubled:
    "Gives a dict under somebody else's name."

    def reset(self):
        pass

    def update(self, pred, target):
        pass

    def compute(self):
        return {"MulticlassAccuracy": 1.0}


def test_a_value_per_class_is_refused_by_name_and_shape():
    per_class = torchmetrics.Accuracy(task="multiclass", num_classes=3, average=None)
    with pytest.raises(ValueError, match=r"'multiclass_accuracy' should give one .* of shape \(3,\)"):
        run(MetricSet(per_class), torch.randn(5, 3), torch.randint(3, (5,)))


def test_loaders_do_not_mix():
    metrics = MetricSet([torchmetrics.MeanSquaredError(), "mae"])
    zero, one = torch.zeros(4), torch.ones(4)
    a, b = metrics.for_loader("a"), metrics.for_loader("b")
    a.update(zero, (zero,), 4)
    b.update(one, (zero,), 4)
    assert a.compute() == {"mean_squared_error": 0.0, "mae": 0.0}
    assert b.compute() == {"mean_squared_error": 1.0, "mae": 1.0}
    again = metrics.for_loader("a")
    again.update(one * 2, (zero,), 4)
    assert again.compute() == {"mean_squared_error": 4.0, "mae": 2.0}  # nothing left from the last round


def test_seen_counts_the_batches_since_the_last_reset():
    metrics = MetricSet(["mse", torchmetrics.MeanSquaredError()])
    here, there = metrics.for_loader("here"), metrics.for_loader("there")
    x = torch.ones(3)
    for _ in range(4):
        here.update(x, (x,), 3)
    with pytest.raises(ValueError):
        there.update(x, (x[:, None],), 3)
    assert (metrics.seen, here.seen, there.seen) == (0, 4, 0)
    assert metrics.for_loader("here").seen == 0  # the same ones, emptied
    here.update(x * math.nan, (x,), 3)
    assert math.isnan(here.compute()["mse"]) and here.seen == 1  # a NaN that isn't for want of batches
    here.reset()
    assert here.seen == 0 and MetricSet(here).seen == 0


def test_nothing_seen_is_nan_and_silent(recwarn):
    values = MetricSet([torchmetrics.MeanSquaredError(), "mae"]).compute()
    assert all(math.isnan(v) for v in values.values()) and len(values) == 2 and not recwarn.list


# --- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "metric, name",
    [
        ("mse", "mse"),
        (accuracy, "accuracy"),
        (functools.partial(functools.partial(accuracy)), "accuracy"),
        (nn.L1Loss(), "l1_loss"),
        (torchmetrics.MeanSquaredError(), "mean_squared_error"),
        (torchmetrics.R2Score(), "r2_score"),
        (lambda p, t: 0.0, "lambda"),
    ],
)
def test_names(metric, name):
    assert metric_name(metric) == as_metric(metric).name == name
    assert as_metric(metric, "mine").name == "mine"
    assert as_metric(as_metric(metric), "mine").fresh().name == "mine"


@pytest.mark.parametrize(
    "bad, message",
    [
        ([mse, functools.partial(mse)], "'mse' stands twice"),
        ({"": mse}, "'' is no name"),
        ({1: mse}, "1 is no name"),
        ({"loss": mse}, "is the name of the loss"),
        ("msee", "did you mean 'mse'"),
        ("qqq", "there is no metric called 'qqq' By name there are accuracy"),
        ([torchmetrics.MeanSquaredError], "pass MeanSquaredError"),
        ([None], "received NoneType"),
        (5, "received int"),
    ],
)
def test_bad_metrics_are_named(bad, message):
    with pytest.raises((ValueError, TypeError), match=message):
        MetricSet(bad)


def test_forms_of_a_set():
    assert len(MetricSet(None)) == len(MetricSet(())) == 0
    one = MetricSet(torchmetrics.MeanSquaredError())
    assert [m.name for m in MetricSet(one).metrics] == ["mean_squared_error"]
    assert isinstance(one.metrics[0], StatefulMetric) and isinstance(as_metric("mae"), FunctionMetric)
