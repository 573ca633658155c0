"""Penalties against closed forms of linear and quadratic discriminators."""
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from trainkit.gan import models
from trainkit.gan.penalties import R1, GradientPenalty, input_gradients, interpolate

BOTH = [GradientPenalty(), R1()]


def by_name(penalty):
    return penalty.name


@given(st.integers(1, 9), st.integers(1, 9), st.floats(0.05, 4), st.floats(0, 20), st.floats(0, 3), st.integers(0, 999))
@settings(max_examples=40, deadline=None)
def test_linear_critic_closed_form(n_real, n_fake, norm, weight, target, seed):
    torch.manual_seed(seed)
    w = torch.randn(12)
    w = w / w.norm() * norm
    critic = lambda x: x.flatten(1) @ w  # noqa: E731
    real, fake = torch.randn(n_real, 3, 2, 2), 50 * torch.randn(n_fake, 3, 2, 2)
    gp = GradientPenalty(weight, target)(critic, real, fake)
    torch.testing.assert_close(gp, torch.tensor(weight * (norm - target) ** 2), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(R1(weight)(critic, real, fake), torch.tensor(weight / 2 * norm**2), rtol=1e-4, atol=1e-4)


def test_norm_is_taken_per_sample_then_averaged():
    slopes = torch.tensor([1.0, 3.0, 5.0])  # a critic whose slope differs from sample to sample
    critic = lambda x, labels: slopes[labels] * x.flatten(1)[:, 0]  # noqa: E731
    x = torch.randn(3, 1, 4, 4)
    labels = torch.tensor([0, 1, 2])
    assert GradientPenalty()(critic, x, x, labels).item() == pytest.approx(10 * (0 + 4 + 16) / 3)
    assert R1(2.0)(critic, x, labels=labels).item() == pytest.approx((1 + 9 + 25) / 3)


def test_quadratic_critic_has_the_slope_of_its_point():
    x = torch.randn(4, 5, dtype=torch.float64)
    gradient = input_gradients(lambda x: x.square().sum(1) / 2, x)
    torch.testing.assert_close(gradient, x)
    torch.testing.assert_close(R1(2.0)(lambda x: x.square().sum(1) / 2, x), x.square().sum(1).mean())


@pytest.mark.parametrize("penalty", BOTH, ids=by_name)
def test_second_derivative_matches_numerical_one(penalty):
    torch.manual_seed(0)
    real, fake, w = (torch.randn(s, dtype=torch.float64) for s in ((3, 4), (3, 4), (4, 4)))

    def value(w):
        torch.manual_seed(1)
        return penalty(lambda x: torch.tanh(x @ w).sum(1), real, fake)

    assert torch.autograd.gradcheck(value, w.requires_grad_())


def test_interpolation_draws_one_place_per_sample():
    mix = interpolate(torch.ones(500, 2, 3, 3), torch.zeros(500, 2, 3, 3)).flatten(1)
    assert (mix == mix[:, :1]).all() and len(mix[:, 0].unique()) > 450
    own = torch.ones(2, 3, requires_grad=True)
    assert not interpolate(own, own).requires_grad
    assert 0 <= mix.min() and mix.max() <= 1 and abs(mix.mean() - 0.5) < 0.06


@pytest.mark.parametrize("penalty", BOTH, ids=by_name)
@pytest.mark.parametrize("num_classes", [0, 3])
def test_gradient_reaches_the_discriminator_only(penalty, num_classes):
    torch.manual_seed(0)
    G = models.DCGANGenerator(4, 16, 1, 2, num_classes)
    D = models.DCGANDiscriminator(16, 1, 2, num_classes, batchnorm=False)
    labels = torch.randint(num_classes, (5,)) if num_classes else None
    real = torch.randn(5, 1, 16, 16, requires_grad=True)
    penalty(D, real, G(G.sample_latent(5), labels), labels).backward()
    assert all(p.grad is None for p in G.parameters()) and real.grad is None
    grads = {n: p.grad for n, p in D.named_parameters()}
    assert grads["to_logit.weight"].abs().sum() > 0 and all(g.isfinite().all() for g in grads.values() if g is not None)


@pytest.mark.parametrize("penalty", BOTH, ids=by_name)
def test_partial_batches_labels_and_layouts(penalty):
    torch.manual_seed(0)
    D = models.DCGANDiscriminator(16, 3, 2, 5, batchnorm=False)
    real, fake, labels = torch.randn(8, 3, 16, 16), torch.randn(3, 3, 16, 16), torch.randint(5, (8,))
    torch.manual_seed(1)
    plain = penalty(D, real, fake, labels)
    torch.manual_seed(1)
    last = penalty(D.to(memory_format=torch.channels_last), *[
        t.to(memory_format=torch.channels_last) for t in (real, fake)], labels)
    torch.testing.assert_close(plain, last)
    assert plain.shape == () and plain > 0


def test_float32_under_autocast_and_for_half_precision_images():
    torch.manual_seed(0)
    D = models.DCGANDiscriminator(16, 1, 2, batchnorm=False)
    real, fake = torch.randn(4, 1, 16, 16), torch.randn(4, 1, 16, 16)
    for penalty in BOTH:
        torch.manual_seed(1)
        plain = penalty(D, real, fake)
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16):
            mixed = penalty(D, real, fake)
            assert torch.is_autocast_enabled("cpu")
        assert mixed.dtype == torch.float32 and torch.equal(mixed, plain)
        assert penalty(D, real.bfloat16(), fake.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("penalty", BOTH, ids=by_name)
def test_works_without_gradients_around_and_at_zero_slope(penalty):
    critic = nn.Linear(3, 1)
    with torch.no_grad():
        assert penalty(critic, torch.randn(2, 3), torch.randn(2, 3)) >= 0
    nn.init.zeros_(critic.weight)
    penalty(critic, torch.randn(2, 3), torch.randn(2, 3)).backward()
    assert critic.weight.grad.isfinite().all()  # the norm has no derivative at zero


def test_weight_is_a_knob():
    gp, w = GradientPenalty(), torch.tensor([3.0, 4.0])
    assert (gp.name, gp.weight, gp.target, R1().name) == ("gradient_penalty", 10.0, 1.0, "r1")
    gp.weight = 1.0
    assert gp(lambda x: x @ w, torch.randn(2, 2), torch.randn(2, 2)).item() == pytest.approx(16)


def test_bad_input_is_named():
    x = torch.randn(4, 1, 8, 8)
    for bad in (dict(weight=-1), dict(target=-0.5), dict(weight=float("nan"))):
        with pytest.raises(ValueError, match=next(iter(bad))):
            GradientPenalty(**bad)
    with pytest.raises(ValueError, match="weight=-1"):
        R1(weight=-1)
    with pytest.raises(ValueError, match=r"differ in shape: \(4, 1, 8, 8\) and \(4, 1, 4, 4\)"):
        GradientPenalty()(nn.Identity(), x, x[..., :4, :4])
    with pytest.raises(ValueError, match="2 labels for 4 images"):
        GradientPenalty()(nn.Identity(), x, x, torch.zeros(2))
