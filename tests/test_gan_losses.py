"""GAN losses against torch's own functions, pinned values and the laws they obey."""
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from trainkit.gan import losses as L

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
