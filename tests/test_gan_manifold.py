"Precision, recall, density and coverage against the definitions written out, and against closed forms."
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainkit.gan.manifold import (
    DensityCoverage,
    PrecisionRecall,
    balls,
    density_coverage,
    distances,
    expected_coverage,
    neighbour_radii,
    precision_recall,
    shares,  # fmt: skip
)


def points(n, d, seed, scale=1.0, shift=0.0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed)) * scale + shift


def norm(a, b):
    return math.sqrt(sum((float(x) - float(y)) ** 2 for x, y in zip(a, b)))


def by_definition(real, fake, k):
    "The papers' sums, sample by sample."
    def radii(x):
        return [sorted(norm(a, b) for j, b in enumerate(x) if j != i)[k - 1] for i, a in enumerate(x)]

    rr, rf = radii(real), radii(fake)
    precise = [any(norm(y, x) <= r for x, r in zip(real, rr)) for y in fake]
    recalled = [any(norm(y, x) <= r for y, r in zip(fake, rf)) for x in real]
    density = sum(norm(y, x) <= r for y in fake for x, r in zip(real, rr)) / (k * len(fake))
    covered = [any(norm(y, x) <= r for y in fake) for x, r in zip(real, rr)]
    return {"precision": sum(precise) / len(fake), "recall": sum(recalled) / len(real), "density": density,
            "coverage": sum(covered) / len(real)}  # fmt: skip


@given(st.integers(4, 14), st.integers(4, 14), st.integers(1, 4), st.integers(1, 3), st.integers(0, 999), st.integers(1, 20))
@settings(max_examples=40, deadline=None)
def test_the_definitions(n, m, d, k, seed, chunk):
    real, fake = points(n, d, seed), points(m, d, seed + 1000, 1.3, 0.3)
    expected = by_definition(real, fake, k)
    assert shares(real, fake, k, chunk) == pytest.approx(expected)
    pr, dc = precision_recall(real, fake, k, chunk=chunk), density_coverage(real, fake, k, chunk=chunk)
    assert pr | dc == pytest.approx(expected)
    assert all((v.n_real, v.n_fake) == (n, m) for v in (pr | dc).values())


def test_the_papers_edges():
    x = points(50, 3, 0)
    assert precision_recall(x, x) == {"precision": 1, "recall": 1}
    assert density_coverage(x, x, 5) == pytest.approx({"density": 6 / 5, "coverage": 1})  # the k neighbours, and the copy itself
    assert precision_recall(x, x + 1e4) == {"precision": 0, "recall": 0}
    assert density_coverage(x, x + 1e4) == {"density": 0, "coverage": 0}
    swapped = precision_recall(points(40, 3, 1), x)
    assert precision_recall(x, points(40, 3, 1)) == {"precision": swapped["recall"], "recall": swapped["precision"]}


def test_copies_are_at_distance_zero_even_far_from_the_origin():
    x = points(60, 32, 0, shift=1e4)
    assert (distances(x, x).diag() == 0).all() and (distances(x, x) == distances(x, x).T).all()
    assert (neighbour_radii(torch.cat([x, x]), 1) == 0).all()
    found = balls(x, x, 3)
    assert found.holding.sum() == 60 * 4 and found.precise.all()  # no neighbour falls out of the ball that it defines


@given(st.integers(2, 30), st.integers(1, 40), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_radii_do_not_depend_on_chunks(n, chunk, seed):
    x = points(n, 2, seed)
    for k in (1, n - 1):
        full = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist").fill_diagonal_(torch.inf).sort(1).values
        assert torch.equal(neighbour_radii(x, k, chunk), full[:, k - 1])


def test_a_perfect_generator_has_the_expected_density_and_coverage():
    "Naeem et al. 2020: E[density] = 1, E[coverage] = 1 - (N-1)…(N-k) / (N+M-1)…(N+M-k), for any distribution."
    for n, m, k in ((40, 40, 5), (60, 30, 3), (20, 80, 1)):
        found = [shares(points(n, 2, i) ** 3, points(m, 2, 9999 + i) ** 3, k) for i in range(200)]
        for name, expected in ("density", 1.0), ("coverage", expected_coverage(n, m, k)):
            values = torch.tensor([f[name] for f in found])
            assert values.mean().item() == pytest.approx(expected, abs=4 * values.std().item() / 200**0.5)
    assert expected_coverage(2, 1, 1) == pytest.approx(1 - 1 / 2)  # the neighbour is the other real sample or the fake
    assert expected_coverage(1000, 1, 1) == pytest.approx(1 - 999 / 1000)


def test_errors_are_on_the_safe_side_and_not_by_far():
    found = [precision_recall(points(100, 4, 2 * i), points(100, 4, 2 * i + 1)) for i in range(60)]
    for name in ("precision", "recall"):
        spread = torch.tensor([f[name] for f in found]).std().item()
        said = torch.tensor([f[name].error for f in found]).square().mean().sqrt().item()
        assert 0.8 < said / spread < 2.2
    assert math.isnan(precision_recall(points(9, 2, 0), points(9, 2, 1), splits=1)["recall"].error)


def test_missing_and_bad_samples_are_told_apart():
    real = torch.cat([points(100, 2, 0, 0.1), points(100, 2, 1, 0.1, 5.0)])
    missing = points(200, 2, 2, 0.1)
    bad = torch.cat([points(150, 2, 3, 0.1), points(150, 2, 4, 0.1, 5.0), points(300, 2, 5, 0.1, 20.0)])
    m, b = shares(real, missing, 3), shares(real, bad, 3)
    assert m["precision"] > 0.85 and m["recall"] < 0.55 and m["coverage"] < 0.55
    assert b["precision"] == pytest.approx(0.5, abs=0.07) and b["density"] < 0.65 and b["coverage"] > 0.85 and b["recall"] > 0.85


@pytest.mark.parametrize("kind,function,k", [(PrecisionRecall, precision_recall, 3), (DensityCoverage, density_coverage, 5)])
def test_as_metrics_on_streams(kind, function, k):
    real, fake = points(60, 3, 0), points(50, 3, 1)
    metric = kind(None, [real[:20], (real[20:], "labels")])
    for part in fake.split(11):
        metric.update(part, torch.zeros(len(part)))
    found, expected = metric.compute(), function(real, fake)
    assert found == expected and [v.error for v in found.values()] == [v.error for v in expected.values()]
    assert metric.k == k and kind(None, real, k=7, splits=1).k == 7
    metric.reset()
    metric.update(fake[:k])
    with pytest.raises(ValueError, match=f"{k} fakes are too few: at least {k + 1}"):
        metric.compute()
    small = kind(None, real, keep=30)
    small.update(fake)
    assert {(v.n_real, v.n_fake) for v in small.compute().values()} == {(30, 30)}


def test_bad_input_is_named():
    x = points(5, 2, 0)
    for bad, message in ((x[:3], "3 fakes are too few: at least 4"), (x / 0, "not finite"), (x[:, :1], "2 features and fakes 1"),
                         (torch.ones(5), "expected")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            precision_recall(x, bad, 3)
    for k in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match=r"k="):
            neighbour_radii(x, k)
        with pytest.raises(ValueError, match=r"k="):
            PrecisionRecall(None, x, k=k)
    with pytest.raises(ValueError, match="from 1 to 4"):
        DensityCoverage(None, x, k=5)
    for bad in (dict(chunk=0), dict(splits=0)):
        with pytest.raises(ValueError, match="must be"):
            precision_recall(x, x, 1, **bad)
    for bad in ((5, 5, 5), (5, 0, 2), (5, 5, 0)):
        with pytest.raises(ValueError, match="k < n_real"):
            expected_coverage(*bad)
