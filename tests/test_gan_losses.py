"""GAN losses and terms against torch's own functions, pinned values and the laws they obey."""
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from ways import resumes

from trainkit.callback import CancelStep, On
from trainkit.callbacks.clip import ClampWeights
from trainkit.gan import losses as L
from trainkit.gan.codes import AuxiliaryClassifier, Codes, MutualInformation, code_surprise
from trainkit.gan.cycle import CycleConsistency, IdentityMapping
from trainkit.gan.energy import BoundaryEquilibrium, PullingAway, equilibrium_measure, equilibrium_step, pulling_away
from trainkit.gan.features import FeatureMatching, Perceptual, feature_matching, on_pairs, read
from trainkit.gan.historical import HistoricalAverage, historical_distance
from trainkit.gan.learner import GANLearner, Round
from trainkit.optim import OptimBuilder

REAL = torch.tensor([1.3, 2.9, 8.4, 6.3])
FAKE = torch.tensor([4.8, 1.2, -3.5, 5.9])
NAMES = sorted(L.LOSSES)
ENERGIES = {"energy", "ebgan"}  # low means real
logits = st.lists(st.floats(-50, 50), min_size=1, max_size=9).map(lambda v: torch.tensor(v, dtype=torch.float64))


@pytest.mark.parametrize("name, generator, discriminator", [
    ("nonsaturating", 0.9509911, 3.1251488),
    ("minimax", -3.0509911, 3.1251488),
    ("lsgan", 7.3425, 19.76125),
    ("wgan", -2.1, -2.625),
    ("hinge", -2.1, (5.8 + 2.2 + 0 + 6.9) / 4),
    ("logistic", 0.9509911, 3.1251488),
    ("softplus", 0.9509911, 3.1251488),
    ("ebgan", 2.1, 4.725 + (5.2 + 8.8 + 13.5 + 4.1) / 4),
])
def test_pinned_values(name, generator, discriminator):
    loss = L.get_loss(name)
    assert loss.generator(FAKE).item() == pytest.approx(generator, rel=1e-6)
    assert loss.discriminator(REAL, FAKE).item() == pytest.approx(discriminator, rel=1e-6)


@given(logits, logits, st.floats(0, 0.9))
@settings(max_examples=50, deadline=None)
def test_minimax_is_binary_cross_entropy_with_one_sided_smoothing(real, fake, smoothing):
    bce = F.binary_cross_entropy_with_logits
    loss = L.NonSaturating(smoothing)
    expected = bce(real, torch.full_like(real, 1 - smoothing)) + bce(fake, torch.zeros_like(fake))
    torch.testing.assert_close(loss.discriminator(real, fake), expected)
    torch.testing.assert_close(loss.generator(fake), bce(fake, torch.ones_like(fake)))
    torch.testing.assert_close(L.Minimax().generator(fake), -bce(fake, torch.zeros_like(fake)))


@given(logits, logits, st.floats(0, 0.4), st.floats(0, 0.5))
@settings(max_examples=50, deadline=None)
def test_two_sided_smoothing_is_binary_cross_entropy_with_both_targets(real, fake, of_real, of_fake):
    bce = F.binary_cross_entropy_with_logits
    expected = bce(real, torch.full_like(real, 1 - of_real)) + bce(fake, torch.full_like(fake, of_fake))
    torch.testing.assert_close(L.Minimax(of_real, of_fake).discriminator(real, fake), expected)


@given(logits, logits)
@settings(max_examples=50, deadline=None)
def test_relativistic_average_in_both_turns(real, fake):
    "Real images count in the generator's loss, and fakes in the discriminator's reference."
    bce, one, zero = F.binary_cross_entropy_with_logits, torch.ones_like, torch.zeros_like
    loss = L.RelativisticAverage()
    d = bce(real - fake.mean(), one(real)) + bce(fake - real.mean(), zero(fake))
    g = bce(fake - real.mean(), one(fake)) + bce(real - fake.mean(), zero(real))
    torch.testing.assert_close(loss.discriminator(real, fake), d)
    torch.testing.assert_close(loss.generator(fake, real), g)
    torch.testing.assert_close(L.relativistic_discriminator(real, fake), d)
    torch.testing.assert_close(L.relativistic_generator(fake, real), g)
    hinge = L.RelativisticAverage(L.Hinge())
    expected = F.relu(1 + (real - fake.mean())).mean() + F.relu(1 - (fake - real.mean())).mean()
    torch.testing.assert_close(hinge.generator(fake, real), expected)


@given(logits, logits)
@settings(max_examples=50, deadline=None)
def test_relativistic_pairs_are_torchs_soft_margin_loss(real, fake):
    n = min(len(real), len(fake))
    loss, ones = L.RelativisticPair(), torch.ones(n, dtype=real.dtype)
    torch.testing.assert_close(loss.discriminator(real, fake), F.soft_margin_loss(real[:n] - fake[:n], ones))
    torch.testing.assert_close(loss.generator(fake, real), F.soft_margin_loss(fake[:n] - real[:n], ones))


@pytest.mark.parametrize("loss", [L.RelativisticAverage(), L.RelativisticPair()])
def test_relativistic_gradients_flow_through_both_sides(loss):
    real, fake = torch.tensor([0.3, -0.2], requires_grad=True), torch.tensor([0.4, 0.1], requires_grad=True)
    to_real, to_fake = torch.autograd.grad(loss.discriminator(real, fake), (real, fake))
    torch.testing.assert_close(to_real.sum(), -to_fake.sum())  # only differences count
    to_real, to_fake = torch.autograd.grad(loss.generator(fake, real), (real, fake))
    assert (to_real > 0).all() and (to_fake < 0).all()
    with pytest.raises(ValueError, match="needs the real logits"):
        loss.generator(fake)
    assert loss.needs_real


@given(logits.map(torch.abs), logits.map(torch.abs), st.floats(0.1, 60))
@settings(max_examples=50, deadline=None)
def test_energy_is_torchs_hinge_embedding_loss(real, fake, margin):
    loss = L.EnergyBased(margin)
    expected = F.hinge_embedding_loss(real, torch.ones_like(real)) + F.hinge_embedding_loss(fake, -torch.ones_like(fake), margin)
    torch.testing.assert_close(loss.discriminator(real, fake), expected)
    torch.testing.assert_close(loss.generator(fake), fake.mean())


def test_energies_go_the_other_way():
    real, fake = torch.tensor([0.3, 0.2], requires_grad=True), torch.tensor([0.4, 20.0], requires_grad=True)
    to_real, to_fake = torch.autograd.grad(L.EnergyBased().discriminator(real, fake), (real, fake))
    assert to_real.tolist() == [0.5, 0.5] and to_fake.tolist() == [-0.5, 0]  # beyond the margin, a fake is left alone
    assert torch.autograd.grad(L.EnergyBased().generator(fake), fake)[0].tolist() == [0.5, 0.5]


@given(logits, logits, *[st.floats(-2, 2)] * 3)
@settings(max_examples=50, deadline=None)
def test_least_squares_is_half_of_mse(real, fake, a, b, c):
    def half(x, target):
        return F.mse_loss(x, torch.full_like(x, target)) / 2

    loss = L.LeastSquares(a, b, c)
    torch.testing.assert_close(loss.discriminator(real, fake), half(real, b) + half(fake, a))
    torch.testing.assert_close(loss.generator(fake), half(fake, c))


@given(logits, logits)
@settings(max_examples=50, deadline=None)
def test_hinge_is_torchs_margin_loss(real, fake):
    def margin(x, sign):
        return F.margin_ranking_loss(x, torch.zeros_like(x), torch.full_like(x, sign), margin=1.0)

    torch.testing.assert_close(L.Hinge().discriminator(real, fake), margin(real, 1.0) + margin(fake, -1.0))


@pytest.mark.parametrize("name", sorted({*NAMES} - ENERGIES))
def test_gradients_push_the_players_apart(name):
    loss = L.get_loss(name)
    real, fake = torch.tensor([0.3, -0.2], requires_grad=True), torch.tensor([0.4, 0.1], requires_grad=True)
    to_real, to_fake = torch.autograd.grad(loss.discriminator(real, fake), (real, fake))
    assert (to_real < 0).all() and (to_fake > 0).all()  # a step down raises real logits and lowers fake ones
    to_fake, = torch.autograd.grad(loss.generator(fake, real), fake)
    assert (to_fake < 0).all()  # the generator raises them


def test_saturating_vanishes_where_nonsaturating_does_not():
    fake = torch.tensor([-20.0], requires_grad=True)
    flat, = torch.autograd.grad(L.Minimax().generator(fake), fake)
    steep, = torch.autograd.grad(L.NonSaturating().generator(fake), fake)
    assert abs(flat.item()) < 1e-8 and steep.item() == pytest.approx(-1)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(4,), (4, 1), (4, 1, 3, 3)])
def test_any_shape_gives_a_scalar_mean(name, shape):
    loss, real, fake = L.get_loss(name), torch.randn(shape), torch.randn(shape)
    twice = loss.discriminator(torch.cat([real, real]), fake)
    assert twice.shape == () and loss.generator(fake, real).shape == ()
    torch.testing.assert_close(twice, loss.discriminator(real, fake))  # each side is averaged on its own


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [1e4, -1e4])
def test_extreme_logits_stay_finite(name, size):
    real, fake = torch.full((2,), size, requires_grad=True), torch.full((2,), size, requires_grad=True)
    total = L.get_loss(name).discriminator(real, fake) + L.get_loss(name).generator(fake, real)
    total.backward()
    assert total.isfinite() and real.grad.isfinite().all() and fake.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("loss", [*map(L.get_loss, NAMES), L.RelativisticAverage(L.Hinge()), BoundaryEquilibrium(k=0.5)], ids=str)
def test_half_precision_logits_are_counted_in_float32(loss, dtype):
    "The mean of logits near 100 is off by up to a half in bfloat16, and the square of 1e4 is infinite in float16."
    torch.manual_seed(0)
    real, fake = ((100 + 3 * torch.randn(64)).to(dtype).requires_grad_() for _ in range(2))
    for mine, expected in ((loss.discriminator(real, fake), loss.discriminator(real.double(), fake.double())),
                           (loss.generator(fake, real), loss.generator(fake.double(), real.double()))):  # fmt: skip
        assert mine.dtype == torch.float32 and expected.dtype == torch.float64
        torch.testing.assert_close(mine.double(), expected, rtol=1e-5, atol=1e-5)
        mine.backward()
    assert fake.grad.dtype == dtype
    huge = torch.full((2,), 1e4, dtype=dtype)
    assert loss.discriminator(huge, -huge).isfinite() and loss.generator(-huge, huge).isfinite()


def test_objects_are_values_with_both_methods():
    for name in NAMES:
        assert isinstance(L.get_loss(name), L.GANLoss) and L.get_loss(name) == L.get_loss(name)
    assert L.NonSaturating() != L.Minimax() and L.NonSaturating(0.1) != L.NonSaturating()


class Mine:
    def __init__(self, scale=1.0, **rest):
        self.scale, self.rest = scale, rest

    def generator(self, fake_logits, real_logits=None):
        return self.scale * fake_logits.mean()

    def discriminator(self, real_logits, fake_logits):
        return real_logits.mean()


def test_own_objects_classes_and_pairs_are_accepted():
    mine = Mine()
    assert L.get_loss(mine) is mine
    assert L.get_loss(Mine, scale=2.0, anything=1).rest == {"anything": 1}
    pair = L.get_loss((L.wasserstein_generator, L.hinge_discriminator))
    assert pair.generator(FAKE, REAL) == L.Wasserstein().generator(FAKE)
    assert pair.discriminator(REAL, FAKE) == L.Hinge().discriminator(REAL, FAKE)


def test_a_pair_asks_for_real_logits_only_when_its_generator_requires_them():
    assert not L.LossPair(lambda fake: fake.mean(), L.hinge_discriminator).needs_real
    assert not L.LossPair(lambda fake, scale=2: scale * fake.mean(), L.hinge_discriminator).needs_real
    pair = L.LossPair(lambda fake, real: (real - fake).mean(), L.hinge_discriminator)
    assert pair.needs_real and pair.generator(FAKE, REAL).item() == pytest.approx((REAL - FAKE).mean().item())


@pytest.mark.parametrize("bad, error, says", [
    ("non-saturating", ValueError, "did you mean 'nonsaturating'"),
    ("Hinge", ValueError, "did you mean 'hinge'"),
    ("zzz", ValueError, "known are minimax, nonsaturating"),
    (3, TypeError, "got 3"),
    ((F.relu,), TypeError, "pair of functions"),
    (F.mse_loss, TypeError, "methods generator and"),
])
def test_bad_losses_are_named(bad, error, says):
    with pytest.raises(error, match=says):
        L.get_loss(bad)


def test_bad_options_are_named():
    for real, fake in ((0.0, -0.1), (0.2, 0.8), (0.0, 1.0), (0.0, float("nan"))):
        with pytest.raises(ValueError, match="fake_smoothing"):
            L.NonSaturating(real, fake)
    for margin in (0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="margin"):
            L.get_loss("ebgan", margin=margin)
    with pytest.raises(TypeError, match="received 'hinge'"):
        L.get_loss("relativistic", of="hinge")
    with pytest.raises(ValueError, match="LeastSquares has no option 'd'; it accepts a, b, c"):
        L.get_loss("lsgan", d=1)
    with pytest.raises(ValueError, match="Hinge has no option 'margin'; it accepts none"):
        L.get_loss("hinge", margin=2)
    with pytest.raises(ValueError, match="given by name or class"):
        L.get_loss(L.Hinge(), margin=2)
    for smoothing in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match="label_smoothing"):
            L.get_loss("nonsaturating", label_smoothing=smoothing)


# Terms, and losses with a memory

POINTS = torch.randn(64, 2, generator=torch.Generator().manual_seed(0))


class Judge(nn.Module):
    "A discriminator of points with features, classes and codes."

    def __init__(self, heads=3):
        super().__init__()
        self.body, self.real, self.head = nn.Sequential(nn.Linear(2, 8), nn.Tanh()), nn.Linear(8, 1), nn.Linear(8, heads)

    def forward(self, x, labels=None):
        return self.real(self.body(x)).flatten()

    def features(self, x, labels=None):
        return self.body(x)

    def classify(self, x):
        return self.head(self.body(x))

    codes = classify


class Energy(nn.Module):
    def __init__(self):
        super().__init__()
        self.encode, self.decode = nn.Linear(2, 1), nn.Linear(1, 2)

    def forward(self, x):
        return (self.decode(self.encode(x)) - x).abs().mean(1)


def gan(discriminator=Judge, latent=2, **kw):
    torch.manual_seed(0)
    width = latent if isinstance(latent, int) else latent.width
    g = nn.Sequential(nn.Linear(width, 8), nn.ReLU(), nn.Linear(8, 2))
    defaults = {"opt": OptimBuilder("adam", lr=1e-2), "front": "none", "seed": 0}
    return GANLearner(g, discriminator(), [*POINTS.split(8)], latent=latent, **(defaults | kw))


def view(labels=None, fakes=5):
    torch.manual_seed(1)
    g, d = nn.Linear(2, 2), Judge()
    return Round(g, d, POINTS[:6], g(POINTS[:fakes]), labels, None if labels is None else labels.flip(0)[:fakes])


@pytest.mark.parametrize("limit, low, high", [(0.01, -0.01, 0.01), ((-0.02, 0.01), -0.02, 0.01)])
def test_a_clamped_critic_is_within_its_bounds_whenever_it_is_used(limit, low, high):
    "torchgan clamped before the step, and the critic was used outside of its bounds (T16)."
    learn = gan(loss="wasserstein", cbs=ClampWeights(limit, player="discriminator"))
    inside = []
    learn.add(On("after_batch", lambda learn: inside.append(
        all(low <= p.min() and p.max() <= high for p in learn.discriminator.parameters()))))
    learn.fit(steps=5)
    assert inside == [True] * 5
    assert any(p.abs().max() > high for p in learn.generator.parameters())


@given(st.integers(1, 6), st.integers(1, 4), st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_pulling_away_is_the_mean_squared_cosine_of_pairs(n, width, seed):
    "torchgan kept the diagonal and normalised the wrong axis (T14)."
    torch.manual_seed(seed)
    codes = torch.randn(n, width, 2, 2, dtype=torch.float64)
    pairs = [F.cosine_similarity(codes[i].flatten(), codes[j].flatten(), 0) ** 2 for i in range(n) for j in range(n) if i != j]
    expected = torch.stack(pairs).mean() if pairs else torch.zeros((), dtype=torch.float64)
    torch.testing.assert_close(pulling_away(codes), expected)
    torch.testing.assert_close(pulling_away(7 * codes), expected)


def test_pulling_away_reads_the_codes_and_changes_nothing():
    d = Energy()
    r = Round(None, d, POINTS[:4], POINTS[4:8].clone().requires_grad_())
    before = dict(vars(d))
    value = PullingAway(lambda d, x: x * torch.tensor([1.0, 2.0]))(r)
    torch.testing.assert_close(value, pulling_away(r.fake * torch.tensor([1.0, 2.0])))
    value.backward()
    assert r.fake.grad.abs().sum() > 0 and vars(d) == before
    assert PullingAway("encode")(r).item() == pytest.approx(1)  # codes of one number are all parallel
    learn = gan(Energy, loss="ebgan", generator_terms={"pull": (PullingAway("encode"), 0.1)})
    learn.fit(steps=2)
    assert learn.history.last("train/generator/pull") == pytest.approx(1)


@given(st.floats(0, 1), st.floats(0, 50), st.floats(0, 50), st.floats(0, 1), st.floats(0, 0.1))
@settings(max_examples=50, deadline=None)
def test_equilibrium_follows_the_papers_equations(k, real, fake, gamma, rate):
    t = lambda v: torch.tensor(v, dtype=torch.float64)  # noqa: E731
    assert equilibrium_step(t(k), t(real), t(fake), gamma, rate).item() == pytest.approx(
        min(1, max(0, k + rate * (gamma * real - fake))))
    assert equilibrium_measure(t(real), t(fake), gamma).item() == pytest.approx(real + abs(gamma * real - fake))


def began_gan(gamma=0.7, rate=0.05, k=0.1, **kw):
    began = BoundaryEquilibrium(gamma, rate, k)
    return began, gan(Energy, loss=began, cbs=kw.pop("cbs", [began]), **kw)


def test_k_moves_after_each_step_by_that_steps_energies():
    began, learn = began_gan()
    k, expected, losses = 0.1, [], []

    def hear(learn):
        nonlocal k
        if learn.player.name == "discriminator":
            real, fake = learn.pred.real_logits.mean().item(), learn.pred.fake_logits.mean().item()
            losses.append(real - k * fake)
            k = min(1, max(0, k + 0.05 * (0.7 * real - fake)))
            expected.append((k, real + abs(0.7 * real - fake)))

    learn.add(On("after_forward", hear))
    learn.fit(steps=10)
    series = learn.history.scalars
    steps, ks = series["train/discriminator/k"]
    assert steps.tolist() == [*range(1, 11)] and len({*ks}) > 5
    assert ks.tolist() == pytest.approx([k for k, _ in expected], abs=1e-6)
    assert series["train/discriminator/convergence"][1].tolist() == pytest.approx([m for _, m in expected], abs=1e-5)
    assert series["train/discriminator/loss"][1].tolist() == pytest.approx(losses, abs=1e-5)
    assert began.k.item() == pytest.approx(expected[-1][0], abs=1e-6)


def test_k_stays_where_no_step_was_made_and_while_validating():
    began, learn = began_gan()

    def cancel(learn):
        raise CancelStep

    learn.add(stop := On("before_step", cancel))
    learn.fit(steps=3)
    assert began.k.item() == pytest.approx(0.1)
    learn.remove(stop)
    learn.fit(steps=1)
    k = began.k.clone()
    assert k.item() != pytest.approx(0.1)
    learn.loaders.valid["valid"] = [POINTS[:8]]
    learn.validate()
    assert torch.equal(began.k, k)


def test_accumulated_turns_move_k_once_by_their_mean():
    began, learn = began_gan(accumulate={"discriminator": 2})
    heard = []
    learn.add(On("after_forward", lambda learn: learn.player.name == "discriminator" and heard.append(
        (learn.pred.real_logits.mean().item(), learn.pred.fake_logits.mean().item()))))
    learn.fit(steps=4)
    k = 0.1
    for (r1, f1), (r2, f2) in (heard[:2], heard[2:]):
        k += 0.05 * (0.7 * (r1 + r2) / 2 - (f1 + f2) / 2)
    assert learn.history.scalars["train/discriminator/k"][0].tolist() == [2, 4] and began.k.item() == pytest.approx(k, abs=1e-6)


@pytest.mark.filterwarnings("ignore:gradients wait for more turns")
@pytest.mark.parametrize("accumulate", [None, {"discriminator": 3}])
def test_k_survives_a_restore_bit_for_bit(tmp_path, accumulate):
    resumes(lambda run: began_gan(run=run, accumulate=accumulate)[1], tmp_path, steps=10, at=(1, 5))


def test_equilibrium_refuses_what_it_cant_mean():
    for bad in (dict(gamma=-0.1), dict(gamma=2), dict(rate=-1), dict(k=1.5), dict(k=float("nan")), dict(k="0"), dict(k=True)):
        with pytest.raises(ValueError, match=next(iter(bad))):
            BoundaryEquilibrium(**bad)
    with pytest.raises(ValueError, match="critic"):
        gan(Energy, cbs=BoundaryEquilibrium(player="critic")).fit(1)
    began = BoundaryEquilibrium(k=0.5)
    with pytest.raises(ValueError, match="gamma"):
        began.load_state_dict({**BoundaryEquilibrium().state_dict(), "gamma": 3.0})
    assert began.k == 0.5


def test_auxiliary_classifier_in_both_turns():
    r, ac = view(torch.tensor([0, 1, 2, 0, 1, 2])), AuxiliaryClassifier()
    on_fake, on_real = F.cross_entropy(r.discriminator.classify(r.fake), r.fake_labels), F.cross_entropy(
        r.discriminator.classify(r.real), r.real_labels)  # fmt: skip
    torch.testing.assert_close(ac.discriminator(r), on_real + on_fake)
    torch.testing.assert_close(ac.generator(r), on_fake)
    ac.discriminator(r).backward()
    assert r.generator.weight.grad is None and r.discriminator.head.weight.grad.abs().sum() > 0
    ac.generator(r).backward()
    assert r.generator.weight.grad.abs().sum() > 0
    with pytest.raises(ValueError, match="needs labels"):
        ac.discriminator(view())


@given(st.lists(st.integers(2, 5), max_size=3), st.integers(0, 3), st.integers(1, 6), st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_code_surprise_is_that_of_torchs_distributions(categorical, continuous, n, seed):
    if not categorical and not continuous:
        return
    torch.manual_seed(seed)
    codes = Codes(2, categorical, continuous)
    z, p = codes(n), torch.randn(n, codes.parameters)
    assert z.shape == (n, codes.width)
    at, place, log_q = 0, 2, torch.zeros(n)
    for k in categorical:
        one_hot = z[:, place : place + k]
        assert (one_hot.sum(1) == 1).all()
        log_q += torch.distributions.OneHotCategorical(logits=p[:, at : at + k]).log_prob(one_hot)
        at, place = at + k, place + k
    if continuous:
        mean, log_var = p[:, at : at + continuous], p[:, at + continuous :]
        log_q += torch.distributions.Normal(mean, (log_var / 2).exp()).log_prob(z[:, place:]).sum(1)
        nll = F.gaussian_nll_loss(mean, z[:, place:], log_var.exp(), full=True, reduction="none").sum(1).mean()
        torch.testing.assert_close(nll, code_surprise(p[:, at:], z[:, place:], Codes(0, (), continuous)))
    torch.testing.assert_close(code_surprise(p, z, codes), -log_q.mean(), rtol=1e-4, atol=1e-5)


def test_mutual_information_reaches_generator_and_q():
    "torchgan's lost its graph and could not train (T13)."
    codes = Codes(1, (3,), 1)
    mi = MutualInformation(codes)
    learn = gan(lambda: Judge(codes.parameters), latent=codes, generator_terms={"mi": mi}, discriminator_terms={"mi": mi},
                loss=(lambda fake: 0 * fake.sum(), lambda real, fake: 0 * real.sum()))  # fmt: skip
    q, g, got = learn.discriminator.head.weight, learn.generator[0].weight, []
    learn.add(On("after_backward", lambda learn: got.append((g if learn.player.name == "generator" else q).grad.norm().item())))
    learn.fit(steps=150)
    assert all(norm > 0 for norm in got)
    series = learn.history.scalars["train/generator/mi"][1]
    assert series[-20:].mean() < 0.7 * series[:10].mean()
    entropy = math.log(3) + math.log(2)
    assert series[-20:].mean() < entropy  # the bound of the mutual information is above 0
    with pytest.raises(ValueError, match="weren't made from Codes"):
        MutualInformation(Codes())(view())


def test_codes_are_those_that_the_round_was_made_from():
    "Whoever draws codes in between changes nothing."
    codes = Codes(1, (3,), 1)
    z, d = codes(5), Judge(codes.parameters)
    codes(5)
    r = Round(None, d, POINTS[:5], POINTS[5:10], noise=z)
    torch.testing.assert_close(MutualInformation(codes)(r), code_surprise(d.codes(r.fake), z, codes))
    for bad in (z[:4], z[:, 1:], "z"):
        with pytest.raises(ValueError, match="weren't made from Codes"):
            MutualInformation(codes)(Round(None, d, POINTS[:5], POINTS[5:10], noise=bad))


@pytest.mark.parametrize("size", [1e4, -1e4, 100.0, -100.0])
def test_a_q_that_is_too_sure_has_a_gradient(size):
    codes = Codes(1, (3,), 2)
    z, said = codes(4), torch.full((4, codes.parameters), size, requires_grad=True)
    value = code_surprise(said, z, codes)
    value.backward()
    assert value.isfinite() and said.grad.isfinite().all() and said.grad[:, 3:].abs().sum() > 0


class Telling(Judge):
    "Says everything in one forward."

    def forward(self, x, labels=None):
        h = self.body(x)
        return self.real(h).flatten(), {"features": h, "classes": self.head(h), "codes": self.head(h)}


class Labelled(nn.Sequential):
    def forward(self, z, labels):
        return super().forward(z)


def test_terms_ask_for_nothing_that_was_said_already():
    "The generator's turn needs one forward more than the loss, for the features of the real points."
    counts, series = [], []
    for judge in Judge, Telling:
        codes, ac, forwards = Codes(1, (), 1), AuxiliaryClassifier(), {"generator": 0, "discriminator": 0}
        mi = MutualInformation(codes)
        torch.manual_seed(0)
        learn = GANLearner(Labelled(nn.Linear(codes.width, 2)), judge(2), [(x, x[:, 0].gt(0).long()) for x in POINTS.split(8)],
                           latent=codes, labels="dataset", discriminator_labels=False, opt="adam", front="none", seed=0,
                           discriminator_terms={"class": ac.discriminator, "codes": mi},
                           generator_terms={"class": ac.generator, "codes": mi, "matching": FeatureMatching(),
                                            "pull": PullingAway("features")})  # fmt: skip
        learn.discriminator.body.register_forward_hook(lambda *_: forwards.update(
            {learn.player.name: forwards[learn.player.name] + 1}))
        learn.fit(steps=1)
        counts.append(forwards)
        series.append({name: values.tolist() for name, (_, values) in learn.history.scalars.items()})
    assert counts == [{"generator": 6, "discriminator": 5}, {"generator": 2, "discriminator": 2}]
    assert series[0] == series[1]


def test_codes_that_cant_be_meant():
    for bad in (dict(categorical=(1,)), dict(noise=-1), dict(continuous=-1), dict(categorical=(), continuous=0)):
        with pytest.raises(ValueError, match="Codes"):
            Codes(**bad)
    with pytest.raises(ValueError, match=r"Q gave \(3, 2\); Codes.* needs \(3, 14\)"):
        code_surprise(torch.zeros(3, 2), Codes()(3), Codes())


@given(st.integers(1, 5), st.integers(1, 5), st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_feature_matching_is_mse_of_means_or_of_samples(n_real, n_fake, seed):
    torch.manual_seed(seed)
    real, fake = torch.randn(n_real, 3, 2), torch.randn(n_fake, 3, 2)
    torch.testing.assert_close(feature_matching(real, fake), (real.mean(0) - fake.mean(0)).square().mean())
    n = min(n_real, n_fake)
    torch.testing.assert_close(feature_matching(real, fake, per_sample=True), F.mse_loss(fake[:n], real[:n]))


def test_feature_matching_sends_its_gradient_through_the_fakes_only():
    r = view()
    r.real = r.real.clone().requires_grad_()
    for per_sample in (False, True):
        r.generator.zero_grad()
        value = FeatureMatching(per_sample=per_sample)(r)
        body = r.discriminator.body
        torch.testing.assert_close(value, feature_matching(body(r.real), body(r.fake), per_sample))
        value.backward(retain_graph=True)
        assert r.real.grad is None and r.generator.weight.grad.abs().sum() > 0
    with pytest.raises(TypeError, match="Judge has no method 'nothing'"):
        FeatureMatching("nothing")(r)
    assert read(torch.compile(r.discriminator), "features", r.real).shape == (6, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert FeatureMatching()(r).dtype == torch.float32


def test_perceptual_is_frozen_and_leaves_the_network_alone():
    net = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Dropout(), nn.Linear(4, 3)).train()
    loss, x, y = Perceptual(net, ["0", "4"]), POINTS[:4].clone().requires_grad_(), POINTS[4:8].clone().requires_grad_()
    still = loss.network
    out = [still[0](x), still(x)], [still[0](y), still(y)]
    value = loss(x, y)
    torch.testing.assert_close(value, sum(F.mse_loss(a, b) for a, b in zip(*out)))
    value.backward()
    assert x.grad.abs().sum() > 0 and y.grad is None and all(p.grad is None for p in still.parameters())
    assert net.training and all(p.requires_grad for p in net.parameters()) and net[1].num_batches_tracked == 0
    torch.testing.assert_close(Perceptual(net, distance="l1")(x, y), F.l1_loss(still(x), still(y)))
    assert not any(m._forward_hooks for m in still.modules())
    for bad, error in ((dict(layers=["9"]), ValueError), (dict(distance="cosine"), ValueError)):
        with pytest.raises(error, match="9|cosine"):
            Perceptual(net, **bad)
    with pytest.raises(TypeError, match="nn.Module"):
        Perceptual(F.relu)


def test_perceptual_and_pairs_in_a_learner(tmp_path):
    terms = {"seen": Perceptual(nn.Linear(2, 3)), "l1": F.l1_loss}
    learn = gan(generator_terms={n: on_pairs(f) for n, f in terms.items()}, run=tmp_path / "run")
    learn.fit(steps=3)
    assert learn.history.last("train/generator/l1") > 0 and learn.history.last("train/generator/seen") > 0
    assert all(not player["losses"] for player in learn.state_dict()["players"].values())  # nobody's network is saved


def test_cycle_and_identity_closed_forms():
    a, b = torch.randn(3, 2, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)
    there, back = nn.Linear(2, 2).double(), nn.Linear(2, 2).double()
    expected = F.l1_loss(back(there(a)), a) + F.l1_loss(there(back(b)), b)
    cycle = CycleConsistency(there, back)
    torch.testing.assert_close(cycle(a, b), expected)
    torch.testing.assert_close(cycle(a, b, there(a), back(b)), expected)
    torch.testing.assert_close(IdentityMapping(there, back)(a, b), F.l1_loss(there(b), b) + F.l1_loss(back(a), a))
    cycle(a, b).backward()
    assert there.weight.grad.abs().sum() > 0 and back.weight.grad.abs().sum() > 0
    with torch.no_grad():
        back.weight.copy_(there.weight.inverse())
        back.bias.copy_(-back.weight @ there.bias)
    assert cycle(a, b).item() == pytest.approx(0, abs=1e-12)


def test_historical_average_is_the_mean_of_all_weights_so_far():
    average = HistoricalAverage(0.5, player="generator")
    learn = gan(cbs=average)
    seen = [{n: p.detach().clone() for n, p in learn.generator.named_parameters()}]
    terms = []

    def note(learn):
        if learn.player.name == "generator":
            mean = {n: torch.stack([w[n] for w in seen]).mean(0) for n in seen[0]}
            now = dict(learn.generator.named_parameters())
            terms.append((historical_distance(now, mean).item(), learn.loss.item(), learn.losses["historical"].item()))
            torch.testing.assert_close(average.means["generator"], mean)

    learn.add(On("after_loss", note, order=50), On("after_step", lambda learn: learn.player.name == "generator" and seen.append(
        {n: p.detach().clone() for n, p in learn.generator.named_parameters()})))
    learn.fit(steps=6)
    assert terms[0][0] == 0 and terms[-1][0] > 0 and len(terms) == 6
    for expected, _, value in terms:
        assert value == pytest.approx(expected, rel=1e-4, abs=1e-9)
    series = learn.history.scalars
    assert series["train/generator/historical"][1].tolist() == pytest.approx([t[0] for t in terms], rel=1e-4, abs=1e-9)
    assert "train/discriminator/historical" not in series and average.seen == {"generator": 7}


def test_historical_gradient_is_twice_the_distance():
    average = HistoricalAverage(3.0, player="discriminator")
    learn = gan(cbs=average, loss=(lambda fake: fake.mean(), lambda real, fake: 0 * real.sum()))
    learn.fit(steps=1)
    with torch.no_grad():
        learn.discriminator.head.bias += 1
    grads = []
    learn.add(On("after_backward", lambda learn: learn.player.name == "discriminator" and grads.append(
        learn.player.modules["discriminator"].head.bias.grad.clone())))
    learn.fit(steps=1)
    torch.testing.assert_close(grads[0], torch.full((3,), 6.0))


def test_historical_means_survive_a_restore_bit_for_bit(tmp_path):
    resumes(lambda run: gan(cbs=HistoricalAverage(0.1), run=run), tmp_path, steps=8, at=(1, 5))


def test_historical_refuses_what_it_cant_mean():
    with pytest.raises(ValueError, match="weight"):
        HistoricalAverage(-1)
    with pytest.raises(ValueError, match="both act on player 'generator'"):
        gan(cbs=[HistoricalAverage(), HistoricalAverage(player="generator")]).fit(1)
    average = HistoricalAverage()
    gan(cbs=average).fit(steps=1)
    with pytest.raises(ValueError, match="other parameters than player 'discriminator'"):
        gan(Energy, cbs=average).fit(1)
