"Diversity, modes and memorisation against torchmetrics, closed forms, chance, and cases made up to be found."
import math
import statistics
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from trainkit.gan.diversity import (
    SCALES,
    Diversity,
    Memorisation,
    Modes,
    count_modes,
    distance_by_label,
    expected_modes,
    grid,
    mean_distance,
    mean_similarity,
    memorisation,  # fmt: skip
    ms_ssim,
    nearest,
    ring,
    share_below,
    ssim_parts,
)


def points(n, d, seed, scale=1.0, shift=0.0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed)) * scale + shift


# --- distances among samples ---------------------------------------------------------------------------------------------


@given(st.integers(2, 40), st.integers(1, 4), st.integers(1, 50), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_mean_distance_is_over_all_pairs(n, d, chunk, seed):
    x = points(n, d, seed)
    found = mean_distance(x, chunk)
    assert found == pytest.approx(nn.functional.pdist(x.double()).mean().item(), rel=1e-5) and found.n_fake == n
    assert mean_distance(3 * x + 1, chunk) == pytest.approx(3 * found, rel=1e-4)


def test_mean_distance_in_closed_form_with_the_error_of_repetition():
    "Two draws from N(0, 1) are 2/√π apart on average."
    found = [mean_distance(points(80, 1, i)) for i in range(200)]
    values = torch.tensor(found)
    assert values.mean().item() == pytest.approx(2 / math.pi**0.5, abs=4 * values.std().item() / 200**0.5)
    assert 0.8 < torch.tensor([v.error for v in found]).mean() / values.std() < 1.25
    assert mean_distance(torch.ones(9, 3)) == 0 and math.isnan(mean_distance(points(2, 2, 0)).error)


def test_by_label_finds_a_class_that_collapsed():
    x, labels = points(90, 2, 0), torch.arange(90) % 3
    x[labels == 1] = 5.0
    found = distance_by_label(x, labels)
    assert [*found] == [0, 1, 2] and found[1] == 0
    assert found[0] == mean_distance(x[0::3]) and found[2].n_fake == 30
    assert [*distance_by_label(x[:4], torch.tensor([7, 7, 7, 2]))] == [7]
    metric = Diversity(None, by_label=True)
    for part, y in zip(x.split(13), labels.split(13)):
        metric.update(part, y)
    assert metric.compute() == pytest.approx((found[0] + found[2]) / 3) and metric.compute().n_fake == 90


def test_diversity_of_a_stream_keeps_within_its_limit():
    x = points(50, 3, 0)
    metric = Diversity(None, keep=30)
    for part in x.split(8):
        metric.update(part, "labels")
    assert metric.compute() == pytest.approx(mean_distance(x[:30])) and metric.compute().n_fake == 30
    metric.reset()
    with pytest.raises(ValueError, match="0 samples are too few"):
        metric.compute()
    metric.update(x[:5])
    with pytest.raises(ValueError, match="2 features, those before 3"):
        metric.update(x[:, :2])
    assert metric.compute() == pytest.approx(mean_distance(x[:5]))
    for bad, message in (
        (lambda: Diversity(None, keep=1), "keep=1"),
        (lambda: distance_by_label(x, torch.zeros(49)), "one label"),
        (lambda: Diversity(None, True).update(x), "needs update"),
        (lambda: mean_distance(x[:1]), "1 samples are"),
    ):
        with pytest.raises(ValueError, match=message):
            bad()


# --- MS-SSIM -------------------------------------------------------------------------------------------------------------


def smooth(n, c, size, seed):
    x = torch.rand(n, c, size, size, generator=torch.Generator().manual_seed(seed))
    return nn.functional.avg_pool2d(x, 5, 1, 2)


@pytest.mark.parametrize("size,channels", [(32, 1), (64, 3), (22, 1), (11, 1), (176, 1)])
def test_ms_ssim_agrees_with_torchmetrics(size, channels):
    image = pytest.importorskip("torchmetrics.functional.image")
    a = smooth(4, channels, size, 0).double()
    b = (a + 0.1 * smooth(4, channels, size, 1)).clamp(0, 1)
    scales = {11: 1, 22: 2, 32: 2, 64: 3, 176: 5}[size]
    betas = tuple(w / sum(SCALES[:scales]) for w in SCALES[:scales])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        x, y, expected = a, b, torch.ones(4).double()
        for i in range(scales):  # theirs takes SSIM's mean over reflected borders, too; the paper doesn't
            full = image.structural_similarity_index_measure(x, y, data_range=1.0, reduction="none", return_full_image=True)[1]
            inside = full.reshape(4, channels, *x.shape[2:])[..., 5:-5, 5:-5].flatten(1).mean(1)
            torch.testing.assert_close(ssim_parts(x, y)[0], inside, rtol=1e-4, atol=1e-5)
            structure = image.structural_similarity_index_measure(
                x, y, data_range=1.0, reduction="none", return_contrast_sensitivity=True)[1].reshape(4)  # fmt: skip
            torch.testing.assert_close(ssim_parts(x, y)[1], structure, rtol=1e-4, atol=1e-5)
            expected = expected * (inside if i == scales - 1 else structure) ** betas[i]
            x, y = nn.functional.avg_pool2d(x, 2), nn.functional.avg_pool2d(y, 2)
        torch.testing.assert_close(ms_ssim(a, b, (0.0, 1.0)), expected, rtol=1e-4, atol=1e-5)
        if size >= 64:
            theirs = image.multiscale_structural_similarity_index_measure(a, b, data_range=1.0, betas=betas, reduction="none")
            torch.testing.assert_close(ms_ssim(a, b, (0.0, 1.0)), theirs.reshape(4), rtol=5e-3, atol=5e-3)
    torch.testing.assert_close(ms_ssim(a, a, (0.0, 1.0)), torch.ones(4).double())
    assert (ms_ssim(a, b, (0.0, 1.0)) < 1).all()
    torch.testing.assert_close(ms_ssim(2 * a - 1, 2 * b - 1), expected, rtol=1e-4, atol=1e-5)


def test_mean_similarity_is_over_pairs_of_one_label():
    images = smooth(6, 1, 16, 0)
    twice = torch.cat([images, images])  # each label is a pair of equal images
    before = torch.get_rng_state()
    assert mean_similarity(twice, torch.arange(12) % 6, 40, (0.0, 1.0)) == pytest.approx(1, abs=1e-5)
    mixed = mean_similarity(twice, None, 3000, (0.0, 1.0))
    pairs = [float(ms_ssim(twice[i : i + 1], twice[j : j + 1], (0.0, 1.0))) for i in range(12) for j in range(12) if i != j]
    assert mixed == pytest.approx(statistics.mean(pairs), abs=4 * mixed.error) and mixed.n_fake == 12
    assert torch.equal(before, torch.get_rng_state())
    for bad, message in ((dict(labels=torch.arange(12)), "no pair of one label"), (dict(pairs=1), "pairs=1"),
                         (dict(labels=torch.zeros(3)), r"\(3,\) labels")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            mean_similarity(twice, **bad)
    for a, b in ((images, images[:3]), (images[..., :10], images[..., :10]), (images[0], images[0])):
        with pytest.raises(ValueError, match="at least 11 x 11"):
            ms_ssim(a, b)


# --- modes ---------------------------------------------------------------------------------------------------------------


def test_rings_and_grids():
    r, g = ring(8, 2.0), grid(5, 2.0)
    torch.testing.assert_close(r.norm(dim=1), torch.full((8,), 2.0))
    assert torch.cdist(r, r).fill_diagonal_(9).min() == pytest.approx(2 * 2 * math.sin(math.pi / 8), abs=1e-5)
    assert g.shape == (25, 2) and g.min() == -4 and g.max() == 4 and len(g.unique(dim=0)) == 25


def test_modes_by_hand():
    centres = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    samples = torch.tensor([[0.0, 0.29], [0.0, 0.31], [10.2, 0.2], [10.0, 0.0], [5.0, 5.0]])
    found = count_modes(samples, centres, 0.1)
    assert found.counts.tolist() == [1, 2, 0] and found.hit == 2 and found.high_quality == pytest.approx(3 / 5)
    assert found.kl == pytest.approx(math.log(3) + 1 / 3 * math.log(1 / 3) + 2 / 3 * math.log(2 / 3))
    assert count_modes(samples, centres, 0.1, at_least=2).hit == 1
    assert count_modes(samples, centres, 0.1, within=4.0).counts.tolist() == [2, 2, 0]
    assert math.isnan(count_modes(samples[4:], centres, 0.1).kl)


def test_a_perfect_mixture_has_the_share_of_the_normal_distribution():
    "In two dimensions, within r deviations: 1 - exp(-r²/2)."
    for r in (1.0, 3.0):
        found = count_modes(grid()[torch.arange(20000) % 25] + points(20000, 2, 0, 0.05), grid(), 0.05, r).high_quality
        assert found == pytest.approx(1 - math.exp(-(r**2) / 2), abs=4 * found.error)


@pytest.mark.parametrize("n,modes,q", [(10, 8, 1.0), (50, 25, 0.9)])
def test_expected_modes_is_chance(n, modes, q):
    g = torch.Generator().manual_seed(0)
    hits = []
    for _ in range(400):
        drawn = torch.randint(modes, (n,), generator=g)[torch.rand(n, generator=g) < q]
        hits.append(len(drawn.unique()))
    assert statistics.mean(hits) == pytest.approx(expected_modes(n, modes, q), abs=4 * statistics.stdev(hits) / 20)
    assert expected_modes(0, modes) == 0 and expected_modes(1, modes, q) == pytest.approx(q)


def test_modes_of_a_stream():
    x = ring()[torch.arange(300) % 5] + points(300, 2, 0, 0.1)
    metric, whole = Modes(ring(), 0.1), count_modes(x, ring(), 0.1)
    for part in x.split(37):
        metric.update(part)
    found = metric.compute()
    assert found == {"modes": 5, "high_quality": whole.high_quality, "mode_kl": whole.kl} and found["modes"].n_fake == 300
    for bad in (torch.ones(3, 3), torch.full((3, 2), torch.nan)):
        with pytest.raises(ValueError):
            metric.update(bad)
    assert metric.compute() == found
    metric.reset()
    with pytest.raises(ValueError, match="0 samples"):
        metric.compute()
    for bad in (dict(std=0), dict(std=1, within=-1), dict(std=1, at_least=0)):
        with pytest.raises(ValueError, match="must be positive"):
            Modes(ring(), **bad)


# --- memorisation --------------------------------------------------------------------------------------------------------


@given(st.integers(1, 20), st.integers(1, 20), st.integers(1, 30), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_nearest_is_brute_force(n, m, chunk, seed):
    x, y = points(n, 3, seed), points(m, 3, seed + 500)
    d, i = nearest(x, y, chunk)
    full = (x[:, None].double() - y.double()).norm(dim=2)
    torch.testing.assert_close(d.double(), full.min(1).values, rtol=1e-5, atol=1e-5)
    assert torch.equal(i, full.argmin(1))
    assert (nearest(y, y)[0] == 0).all()


@given(st.lists(st.integers(0, 5), min_size=1, max_size=12), st.lists(st.integers(0, 5), min_size=1, max_size=12))
@settings(max_examples=60, deadline=None)
def test_share_below_counts_pairs_with_ties_half(a, b):
    expected = sum((x < y) + 0.5 * (x == y) for x in a for y in b) / (len(a) * len(b))
    assert share_below(torch.tensor(a).float(), torch.tensor(b).float()) == pytest.approx(expected)


def test_an_honest_generator_is_not_accused():
    found = [memorisation(points(200, 2, 3 * i), points(300, 2, 3 * i + 1), points(200, 2, 3 * i + 2), 0.05) for i in range(150)]
    for values, expected in (([f.nearer for f in found], 0.5), ([f.near_copies for f in found], 0.05)):
        v = torch.tensor(values)
        assert v.mean().item() == pytest.approx(expected, abs=4 * v.std().item() / 150**0.5 + 0.002)
        assert 0.7 < torch.tensor([x.error for x in values]).mean() / v.std() < 1.4
    assert (found[0].nearer.n_fake, found[0].nearer.n_real, found[0].n_train) == (200, 200, 300)


def test_copies_are_found_and_shown():
    train, heldout, honest = points(400, 4, 0), points(300, 4, 1), points(180, 4, 2)
    fakes = torch.cat([honest, train[100:120] + 1e-4])
    found = memorisation(fakes, train, heldout)
    rows, sources, far = found.closest(20)
    assert sorted(rows.tolist()) == [*range(180, 200)] and torch.equal(sources, rows - 80) and (far < 1e-3).all()
    assert found.near_copies >= 0.1 and found.near_copies - 0.02 > 2 * found.near_copies.error
    everything = memorisation(train, train, heldout)
    assert everything.near_copies == 1 and everything.nearer == 1
    wrong = memorisation(honest + 50, train, heldout)
    assert wrong.near_copies == 0 and wrong.nearer == 0


def test_memorisation_of_a_stream_keeps_the_closest_pairs():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(4), nn.Linear(4, 3))
    train, heldout, fakes = torch.randn(60, 1, 2, 2), torch.randn(50, 1, 2, 2), torch.randn(40, 1, 2, 2)
    metric, rng = Memorisation(net, train.split(25), heldout, quantile=0.1, show=5), torch.get_rng_state()
    for part in fakes.split(9):
        metric.update(part, torch.zeros(len(part)))
    assert torch.equal(rng, torch.get_rng_state()) and net.training
    net.eval()
    with torch.no_grad():
        whole = memorisation(net(fakes), net(train), net(heldout), 0.1)
    assert metric.compute() == pytest.approx({"near_copies": whole.near_copies, "nearer": whole.nearer})
    rows, sources, far = whole.closest(5)
    assert torch.equal(metric.closest, fakes[rows]) and [row for row, _ in metric.pairs] == sources.tolist()
    assert [d for _, d in metric.pairs] == pytest.approx(far.tolist(), rel=1e-4)
    metric.reset()
    with pytest.raises(ValueError, match="0 fakes are too few"):
        metric.compute()


def test_bad_input_is_named():
    x = points(10, 2, 0)
    for q in (0, 1, 1.5):
        with pytest.raises(ValueError, match="quantile="):
            memorisation(x, x, x, q)
    for bad, message in (
        ((x, x[:0], x), "0 training samples"),
        ((x, x, x[:1]), "1 held-out samples"),
        ((x[:0], x, x), "0 fakes"),
        ((x / 0, x, x), "not finite"),
        ((x[:, :1], x, x), "features"),
    ):
        with pytest.raises(ValueError, match=message):
            memorisation(*bad)
    for bad in ((-1, 5), (5, 0), (5, 5, 2.0)):
        with pytest.raises(ValueError, match="expected n >= 0"):
            expected_modes(*bad)
