"Fréchet and kernel distance against closed forms, torchmetrics, the papers' sums written out, and repetition."
import builtins
import copy
import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from trainkit.gan.distances import (
    FID,
    KID,
    Moments,
    checked_pair,
    covariance_root,
    distance_between,
    features_of,
    fid,
    frechet_distance,
    kid,
    moments_of,
    polynomial_mmd,  # fmt: skip
)
from trainkit.gan.learner import GANLearner
from trainkit.gan.manifold import PrecisionRecall
from trainkit.gan.metrics import ClassifierScore


def gen(seed):
    return torch.Generator().manual_seed(seed)


def points(n, d, seed, scale=1.0, shift=0.0):
    return torch.randn(n, d, generator=gen(seed)) * scale + shift


def root(c):
    "The symmetric root, by another way than the code's."
    values, vectors = torch.linalg.eigh(c)
    return vectors @ values.clamp(min=0).sqrt().diag() @ vectors.T


# --- moments -------------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 30), min_size=1, max_size=6), st.integers(1, 5), st.floats(-1e5, 1e5))
@settings(max_examples=50, deadline=None)
def test_moments_add_up_in_any_grouping(sizes, d, shift):
    x = points(sum(sizes), d, len(sizes), shift=shift).double()
    parts = [moments_of(p) for p in x.split(sizes)]
    left, right = sum(parts, Moments()), Moments()
    for part in reversed(parts):
        right = part + right
    for m in (left, right):
        assert m.n == len(x)
        torch.testing.assert_close(m.mean, x.mean(0))
        if len(x) > 1:
            torch.testing.assert_close(m.cov, x.T.cov().reshape(d, d), rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("mean, cov, n", [(torch.zeros(3), torch.eye(2), 5), (torch.zeros(2, 1), torch.eye(2), 5),
                                          (torch.zeros(2), torch.eye(2), 1), (torch.zeros(2), torch.zeros(2), 5)])
def test_known_moments_that_cannot_be(mean, cov, n):
    with pytest.raises(ValueError, match=r"a mean \(D,\), a covariance \(D, D\)"):
        Moments.known(mean, cov, n)


def test_moments_refuse_what_does_not_fit():
    with pytest.raises(ValueError, match="of 2 and of 3 features"):
        moments_of(torch.ones(4, 2)) + moments_of(torch.ones(4, 3))
    for n in (0, 1):
        with pytest.raises(ValueError, match=f"at least 2 samples; received {n}"):
            (moments_of(torch.ones(n, 2)) if n else Moments()).cov  # noqa: B018


# --- the Fréchet distance ------------------------------------------------------------------------------------------------


@given(st.integers(1, 12), st.integers(2, 40), st.integers(2, 40), st.integers(0, 999))
@settings(max_examples=50, deadline=None)
def test_frechet_is_the_papers_formula(d, n, m, seed):
    a, b = moments_of(points(n, d, seed)), moments_of(points(m, d, seed + 1000, 1.7, 0.3))
    ra = root(a.cov)
    formula = (a.mean - b.mean).square().sum() + (a.cov + b.cov - 2 * root(ra @ b.cov @ ra)).trace()
    value = frechet_distance(a.mean, a.cov, b.mean, b.cov)
    assert value == pytest.approx(formula.item(), abs=1e-5)
    assert value == pytest.approx(frechet_distance(b.mean, b.cov, a.mean, a.cov), abs=1e-8)
    assert frechet_distance(a.mean, a.cov, a.mean, a.cov) == pytest.approx(0, abs=1e-10)


def test_frechet_in_closed_form():
    "One dimension: (difference of means)² + (difference of deviations)²; scaled by s, s² times as much."
    one = lambda m, v: (torch.tensor([m]), torch.tensor([[v]]))
    assert frechet_distance(*one(1.0, 4.0), *one(4.0, 25.0)) == pytest.approx(9 + 9)
    assert frechet_distance(*one(10.0, 400.0), *one(40.0, 2500.0)) == pytest.approx(1800)
    assert frechet_distance(*one(0.0, 0.0), *one(3.0, 0.0)) == pytest.approx(9)  # two points
    c = covariance_root(torch.tensor([[2.0, 1.0], [1.0, 3.0]]).double())
    torch.testing.assert_close(c @ c.T, torch.tensor([[2.0, 1.0], [1.0, 3.0]]).double())


@pytest.mark.parametrize("n", [20, 300])  # fewer samples than features, and more
def test_fid_agrees_with_torchmetrics(n):
    image = pytest.importorskip("torchmetrics.image.fid")
    given_features = nn.Identity()
    given_features.num_features = 32
    real, fake = points(400, 32, 0), points(n, 32, 1, 1.3, 0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = image.FrechetInceptionDistance(feature=given_features).set_dtype(torch.float64)
        theirs.update(real.double(), real=True)
        theirs.update(fake.double(), real=False)
        expected = theirs.compute().item()
    assert fid(real, fake) == pytest.approx(expected, rel=1e-5)
    assert fid(real, fake, arithmetic="torchmetrics") == pytest.approx(expected, rel=1e-7)


def test_torch_alone_is_enough(monkeypatch):
    original = builtins.__import__

    def without(name, *args, **kwargs):
        if name.split(".")[0] == "torchmetrics":
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    monkeypatch.setattr("importlib.import_module", without)
    real, fake = points(50, 3, 0), points(50, 3, 1)
    assert fid(real, fake) > 0 and kid(real, fake, 3, 20) == kid(real, fake, 3, 20)
    for call in (lambda: fid(real, fake, arithmetic="torchmetrics"), lambda: kid(real, fake, 3, 20, "torchmetrics"),
                 lambda: FID(None, real, arithmetic="torchmetrics")):  # fmt: skip
        with pytest.raises(ImportError, match="pip install torchmetrics"):
            call()


@pytest.mark.parametrize("bad,message", [
    ((torch.zeros(2), torch.eye(2), torch.zeros(3), torch.eye(3)), "with one D; received"),
    ((torch.zeros(2), torch.eye(2), torch.zeros(2), -torch.eye(2)), "no negative eigenvalue"),
    ((torch.zeros(2), torch.eye(2), torch.zeros(2), torch.tensor([[1.0, 5.0], [0.0, 1.0]])), "symmetric"),
    ((torch.zeros(2), torch.eye(2) / 0, torch.zeros(2), torch.eye(2)), "finite square matrix"),
])
def test_frechet_refuses_what_is_no_covariance(bad, message):
    with pytest.raises(ValueError, match=message):
        frechet_distance(*bad)


# --- FID and its confidence ----------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 60), min_size=1, max_size=6), st.integers(1, 6))
@settings(max_examples=30, deadline=None)
def test_fid_of_any_stream_is_that_of_the_whole(sizes, splits):
    real, fake = points(80, 3, 0), points(sum(sizes), 3, 1, 2.0)
    metric = FID(None, real, splits=splits, batch_size=7)
    for part in fake.split(sizes):
        metric.update(part, torch.zeros(len(part)))
    if len(fake) < 2 * splits:
        with pytest.raises(ValueError, match=f"{len(fake)} fakes in {splits} splits are too few"):
            metric.compute()
        return
    value, whole = metric.compute(), fid(real, fake, splits)
    assert value == pytest.approx(distance_between(moments_of(real), moments_of(fake)), rel=1e-9)
    assert value == pytest.approx(whole, rel=1e-9) and (value.n_fake, value.n_real) == (len(fake), 80)
    assert math.isnan(value.error) == (splits == 1)
    assert splits == 1 or value.error == pytest.approx(whole.error, rel=1e-6)


def test_fids_error_is_that_of_repetition():
    found = [fid(points(2000, 4, 0), points(300, 4, 10 + i, shift=0.4)) for i in range(100)]
    spread, said = torch.tensor(found).std().item(), torch.tensor([v.error for v in found]).square().mean().sqrt().item()
    assert 0.7 < said / spread < 1.5


def test_at_infinity_the_bias_is_gone():
    "N(0, 1) in 16 dimensions against a shift of 0.2 each: 16 · 0.04 = 0.64, whatever the number of samples."
    truth = Moments.known(torch.zeros(16), torch.eye(16), 10**9)
    plain, limit = [], []
    for i in range(40):
        metric = FID(None, truth)
        metric.update(points(400, 16, i, shift=0.2))
        plain.append(metric.compute())
        limit.append(metric.at_infinity())
    plain, values = torch.tensor(plain), torch.tensor(limit)
    assert plain.mean() > 0.64 + 5 * plain.std() / 40**0.5 and plain.mean() - 0.64 > 0.1
    assert values.mean().item() == pytest.approx(0.64, abs=4 * values.std().item() / 40**0.5)
    assert 0.6 < torch.tensor([v.error for v in limit]).median() / values.std() < 1.8
    counts, means = metric.by_count()
    assert counts == [80, 160, 240, 320, 400] and means == sorted(means, reverse=True)
    assert means[-1] == pytest.approx(metric.compute())


def test_at_infinity_only_asks_samples_that_are_many_enough():
    "With 40 of 200 samples in 32 dimensions the bias is no line in 1/N: through them, the limit would be near -0.5."
    truth, limit = Moments.known(torch.zeros(32), torch.eye(32), 10**9), []
    for i in range(20):
        metric = FID(None, truth)
        metric.update(points(200, 32, i))
        limit.append(metric.at_infinity())
    assert abs(torch.tensor(limit).mean()) < 0.2


def test_at_infinity_needs_three_splits():
    with pytest.raises(ValueError, match="at least 3 splits"):
        fid(points(50, 2, 0), points(50, 2, 1), splits=2, at_infinity=True)
    for splits in (0, 9, True, 2.0):
        with pytest.raises(ValueError, match="splits="):
            FID(None, points(50, 2, 0), splits=splits)


# --- KID -----------------------------------------------------------------------------------------------------------------


@given(st.integers(2, 12), st.integers(2, 12), st.integers(1, 5), st.integers(0, 999))
@settings(max_examples=40, deadline=None)
def test_kid_is_the_papers_sum(n, m, d, seed):
    x, y = points(n, d, seed).double(), points(m, d, seed + 1000, shift=0.5).double()
    k = lambda a, b: ((a @ b.T) / d + 1) ** 3
    off = lambda t: (t.sum() - t.diag().sum()) / (len(t) * (len(t) - 1))
    value = kid(x, y)
    assert value == pytest.approx((off(k(x, x)) + off(k(y, y)) - 2 * k(x, y).mean()).item(), rel=1e-9, abs=1e-9)
    assert (value.n_real, value.n_fake) == (n, m)


def test_kid_agrees_with_torchmetrics():
    image = pytest.importorskip("torchmetrics.image.kid")
    real, fake = points(120, 16, 0), points(120, 16, 1, shift=0.3)
    given_features = nn.Identity()
    given_features.num_features = 16
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = image.KernelInceptionDistance(feature=given_features, subsets=2, subset_size=120)  # all: no draw matters
        theirs.update(real, real=True)
        theirs.update(fake, real=False)
        expected = theirs.compute()[0].item()
    assert kid(real, fake) == pytest.approx(expected, rel=1e-4)
    assert kid(real, fake, 5, 50) == pytest.approx(kid(real, fake, 5, 50, "torchmetrics"), rel=1e-9)
    with pytest.raises(ValueError, match="give a subset_size"):
        kid(real, fake, arithmetic="torchmetrics")


def test_kid_is_right_on_average_and_knows_its_error():
    for shift in (0.0, 0.3):
        found = [kid(points(50, 3, 2 * i), points(70, 3, 2 * i + 1, shift=shift)) for i in range(300)]
        values = torch.tensor(found)
        if not shift:
            assert abs(values.mean()) < 4 * values.std() / 300**0.5
            assert (values < 0).any()
        assert 0.7 < torch.tensor([v.error for v in found]).square().mean().sqrt() / values.std() < 1.6


@pytest.mark.parametrize("n,m", [(25, 400), (400, 25)])
def test_kids_error_is_that_of_the_smaller_set(n, m):
    found = [kid(points(n, 3, 2 * i), points(m, 3, 2 * i + 1, shift=0.8)) for i in range(200)]
    said = torch.tensor([v.error for v in found]).square().mean().sqrt()
    assert 0.75 < said / torch.tensor(found).std() < 1.4


def test_subsets_do_not_touch_the_random_state():
    real, fake, before = points(100, 4, 0), points(90, 4, 1), torch.get_rng_state()
    first = kid(real, fake, 10, 40)
    assert first == kid(real, fake, 10, 40) and first.error > 0
    assert torch.equal(before, torch.get_rng_state())
    assert math.isnan(kid(real, fake, 1, 40).error)
    for bad in (dict(subset_size=91), dict(subset_size=1), dict(subset_size=5, subsets=0)):
        with pytest.raises(ValueError, match="to the number of samples, 90"):
            kid(real, fake, **bad)


def test_kid_of_a_stream():
    real, fake = points(60, 3, 0), points(200, 3, 1)
    metric = KID(None, DataLoader(TensorDataset(real, torch.zeros(60)), batch_size=16), keep=500)
    for part in fake.split(33):
        metric.update(part)
    assert metric.compute() == pytest.approx(polynomial_mmd(real, fake), rel=1e-9)
    small = KID(None, real, keep=40)
    small.update(fake)
    assert (small.compute().n_real, small.compute().n_fake) == (40, 40)
    metric.reset()
    with pytest.raises(ValueError, match="0 fakes are too few"):
        metric.compute()


# --- networks, bad input, looking ----------------------------------------------------------------------------------------


class Body(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.drop, self.out = nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 3)
        self.seen = []

    def forward(self, x):
        self.seen.append((len(x), self.training, torch.is_grad_enabled()))
        return self.out(self.drop(self.norm(x.flatten(1))))


METRICS = [FID, KID, PrecisionRecall]


@pytest.mark.parametrize("kind", METRICS)
def test_looking_changes_nothing(kind):
    torch.manual_seed(0)
    net, real, fake = Body(), torch.randn(30, 1, 2, 2), torch.randn(20, 1, 2, 2, requires_grad=True)
    net.norm.eval()
    state, rng = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    metric = kind(net, real, batch_size=8)
    metric.update(fake)
    metric.compute()
    assert [s[0] for s in net.seen] == [8, 8, 8, 6, 8, 8, 4] and not any(s[1] or s[2] for s in net.seen)
    assert net.training and net.drop.training and not net.norm.training and torch.is_grad_enabled()
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items()) and torch.equal(rng, torch.get_rng_state())
    assert fake.grad is None and all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize("kind", METRICS)
def test_a_failed_update_changes_nothing(kind):
    metric = kind(None, points(40, 3, 0))
    metric.update(points(30, 3, 1))
    before = repr(metric.compute())
    broken = points(10, 3, 2)
    broken[4, 1] = torch.nan
    for bad, message in ((points(5, 2, 0), "2 features"), (broken, "not finite .* 1 of 10 rows")):
        with pytest.raises(ValueError, match=message):
            metric.update(bad)
    metric.update(torch.zeros(0, 3))
    assert repr(metric.compute()) == before
    metric.reset()
    with pytest.raises(ValueError, match="0 fakes"):
        metric.compute()


def test_bad_features_are_named():
    good = points(10, 3, 0)
    for bad, message in ((torch.zeros(4), r"shape \(4,\); expected \(samples, width\)"), (torch.zeros(4, 0), "expected"),
                         (torch.zeros(1, 3), "1 fakes are too few: at least 2"), ([1.0], "expected"),
                         (good / 0, "not finite")):  # fmt: skip
        for score in (fid, kid):
            with pytest.raises(ValueError, match=message):
                score(good, bad)
    with pytest.raises(ValueError, match="real samples have 3 features and fakes 2"):
        checked_pair(good, good[:, :2])
    with pytest.raises(ValueError, match="flatten or pool"):
        features_of(nn.Conv2d(1, 2, 3), torch.zeros(2, 1, 8, 8))
    for bad in (dict(network=lambda x: x), dict(network="inception")):
        with pytest.raises(TypeError, match="nn.Module or None"):
            FID(real=good, **bad)
    with pytest.raises(ValueError, match="batch_size=0"):
        FID(None, good, batch_size=0)
    with pytest.raises(ValueError, match="at least 2 samples; received 1"):
        FID(None, good[:1])


def test_real_samples_come_as_tensor_loader_or_moments():
    torch.manual_seed(0)
    net, real, fake = nn.Sequential(nn.Flatten(), nn.Linear(4, 3)), torch.randn(50, 1, 2, 2), torch.randn(30, 1, 2, 2)
    loader = DataLoader(TensorDataset(real, torch.zeros(50)), batch_size=16)
    values = []
    for given_real in (real, loader, [*real.split(20)], moments_of(features_of(net, real))):
        metric = FID(net, given_real)
        metric.update(fake)
        values.append(metric.compute())
    assert values == [pytest.approx(values[0], rel=1e-6)] * 4 and {v.n_real for v in values} == {50}


@pytest.mark.parametrize("labelled", [False, True])
def test_a_learner_measures_in_validation_and_trains_on_as_if_not(labelled):
    def learn(metrics):
        torch.manual_seed(0)
        g, d = nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 1), nn.Flatten(0))
        x = points(48, 2, 3)
        data = TensorDataset(x, torch.zeros(48).long()) if labelled else TensorDataset(x)
        dls = {"train": DataLoader(data, batch_size=16, shuffle=True), "valid": DataLoader(data, batch_size=16)}
        gan = GANLearner(g, d, dls, latent=2, front="none", metrics=metrics)
        gan.fit(2)
        return gan

    body = nn.Sequential(nn.Linear(2, 3), nn.Dropout())
    real = points(60, 2, 4)
    measured = learn([FID(body, real), KID(body, real), PrecisionRecall(body, real), ClassifierScore(body)])
    plain = learn([])
    for name in ("fid", "kid", "precision", "recall", "classifier_score"):
        steps, values = measured.history.scalars[f"valid/{name}"]
        assert len(values) == 2 and all(math.isfinite(v) for v in values)
    for a, b in zip(measured.generator.parameters(), plain.generator.parameters()):
        assert torch.equal(a, b)
    assert body.training
