"""Penalties against closed forms of linear and quadratic discriminators."""
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from ways import resumes, same_weights

from trainkit.callback import On
from trainkit.gan import models
from trainkit.gan.learner import GANLearner
from trainkit.gan.penalties import (
    DRAGAN,
    R1,
    R2,
    GradientPenalty,
    Lazy,
    LipschitzPenalty,
    ZeroCentered,
    input_gradients,
    interpolate,
    perturb,
    uncompiled,
)
from trainkit.optim import OptimBuilder

ALL = [GradientPenalty(), LipschitzPenalty(target=0), ZeroCentered(), DRAGAN(), R1(), R2()]


def by_name(penalty):
    return penalty.name


@given(st.integers(1, 9), st.integers(1, 9), st.floats(0.05, 4), st.floats(0, 20), st.floats(0, 3), st.integers(0, 999))
@settings(max_examples=25, deadline=None)
def test_linear_critic_closed_form(n_real, n_fake, norm, weight, target, seed):
    torch.manual_seed(seed)
    w = torch.randn(12)
    w = w / w.norm() * norm
    critic = lambda x: x.flatten(1) @ w  # noqa: E731
    real, fake = torch.randn(n_real, 3, 2, 2), 50 * torch.randn(n_fake, 3, 2, 2)
    gp = GradientPenalty(weight, target)(critic, real, fake)
    torch.testing.assert_close(gp, torch.tensor(weight * (norm - target) ** 2), rtol=1e-4, atol=1e-4)
    for penalty, expected in [
        (LipschitzPenalty(weight, target), weight * max(0, norm - target) ** 2), (ZeroCentered(weight), weight * norm**2),
        (DRAGAN(weight, target), weight * (norm - target) ** 2),
        (R1(weight), weight / 2 * norm**2), (R2(weight), weight / 2 * norm**2),
    ]:  # fmt: skip
        torch.testing.assert_close(penalty(critic, real, fake), torch.tensor(expected), rtol=1e-4, atol=1e-4)


def test_norm_is_taken_per_sample_then_averaged():
    slopes = torch.tensor([1.0, 3.0, 5.0])  # a critic whose slope differs from sample to sample
    critic = lambda x, labels: slopes[labels] * x.flatten(1)[:, 0]  # noqa: E731
    x = torch.randn(3, 1, 4, 4)
    labels = torch.tensor([0, 1, 2])
    assert GradientPenalty()(critic, x, x, labels).item() == pytest.approx(10 * (0 + 4 + 16) / 3)
    assert R1(2.0)(critic, x, labels=labels).item() == pytest.approx((1 + 9 + 25) / 3)
    assert LipschitzPenalty(target=2)(critic, x, x, labels).item() == pytest.approx(10 * (0 + 1 + 9) / 3)
    assert ZeroCentered()(critic, x, x, labels).item() == pytest.approx(10 * (1 + 9 + 25) / 3)
    assert DRAGAN()(critic, x, x, labels).item() == pytest.approx(10 * (0 + 4 + 16) / 3)


def test_quadratic_critic_has_the_slope_of_its_point():
    x = torch.randn(4, 5, dtype=torch.float64)
    gradient = input_gradients(lambda x: x.square().sum(1) / 2, x)
    torch.testing.assert_close(gradient, x)
    torch.testing.assert_close(R1(2.0)(lambda x: x.square().sum(1) / 2, x), x.square().sum(1).mean())


@pytest.mark.parametrize("penalty", ALL, ids=by_name)
def test_second_derivative_matches_numerical_one(penalty):
    torch.manual_seed(0)
    real, fake, w = (torch.randn(s, dtype=torch.float64) for s in ((3, 4), (3, 4), (4, 4)))

    def value(w):
        torch.manual_seed(1)
        return penalty(lambda x: torch.tanh(x @ w).sum(1), real, fake)

    assert torch.autograd.gradcheck(value, w.requires_grad_())


def test_each_is_taken_at_its_own_place():
    "A bowl's slope is the place itself, so the penalties say where they looked."
    def bowl(x):
        return x.square().flatten(1).sum(1) / 2

    torch.manual_seed(0)
    real, fake = 3 + torch.randn(6, 1, 4, 4, dtype=torch.float64), torch.randn(4, 1, 4, 4, dtype=torch.float64)
    places = {}
    for name, make in (("between", lambda: interpolate(real, fake)), ("around", lambda: perturb(real, 0.5))):
        torch.manual_seed(1)
        places[name] = make().flatten(1).norm(dim=1)
    for penalty, expected in [
        (GradientPenalty(), 10 * (places["between"] - 1).square().mean()),
        (ZeroCentered(), 10 * places["between"].square().mean()),
        (LipschitzPenalty(target=5), 10 * (places["between"] - 5).clamp(min=0).square().mean()),
        (DRAGAN(), 10 * (places["around"] - 1).square().mean()),
        (R1(), 5 * real.flatten(1).square().sum(1).mean()), (R2(), 5 * fake.flatten(1).square().sum(1).mean()),
    ]:  # fmt: skip
        torch.manual_seed(1)
        torch.testing.assert_close(penalty(bowl, real, fake), expected)


def test_perturbation_is_normal_around_each_pixel():
    torch.manual_seed(0)
    x = torch.randn(400, 3, 8, 8, requires_grad=True)
    delta = (perturb(4 * x, 0.25) - 4 * x).detach()
    assert not perturb(x).requires_grad and delta.mean().abs() < 0.01
    assert delta.std().item() == pytest.approx(0.25 * 4 * x.std().item(), rel=0.02)
    assert (delta.pow(4).mean() / delta.var() ** 2).item() == pytest.approx(3, abs=0.1)
    assert torch.corrcoef(delta.flatten(1)[:, :2].T)[0, 1].abs() < 0.15  # pixels of one image move by themselves


def test_r2_takes_the_labels_of_the_fakes():
    slopes = torch.tensor([1.0, 3.0, 5.0])
    critic = lambda x, labels: slopes[labels] * x.flatten(1)[:, 0]  # noqa: E731
    x, zeros = torch.randn(3, 1, 2, 2), torch.zeros(3, dtype=torch.long)
    assert R2(2.0)(critic, x, x, zeros).item() == pytest.approx(1)
    assert R2(2.0)(critic, x, x, zeros, zeros + 2).item() == pytest.approx(25)
    assert R1(2.0)(critic, x, x, zeros, zeros + 2).item() == pytest.approx(1)
    with pytest.raises(ValueError, match="there are none"):
        R2()(critic, x)


def test_interpolation_draws_one_place_per_sample():
    mix = interpolate(torch.ones(500, 2, 3, 3), torch.zeros(500, 2, 3, 3)).flatten(1)
    assert (mix == mix[:, :1]).all() and len(mix[:, 0].unique()) > 450
    own = torch.ones(2, 3, requires_grad=True)
    assert not interpolate(own, own).requires_grad
    assert 0 <= mix.min() and mix.max() <= 1 and abs(mix.mean() - 0.5) < 0.06


@pytest.mark.parametrize("penalty", ALL, ids=by_name)
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


@pytest.mark.parametrize("penalty", ALL, ids=by_name)
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


def value_and_gradients(penalty, D, real, fake, scale=1.0):
    torch.manual_seed(1)
    D.zero_grad()
    value = penalty(D, real, fake)
    (scale * value).backward()
    return value.detach(), [p.grad / scale for p in D.parameters() if p.grad is not None]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float32_under_autocast_and_for_half_precision_images(dtype):
    torch.manual_seed(0)
    D = models.DCGANDiscriminator(16, 1, 2, batchnorm=False)
    real, fake = torch.randn(4, 1, 16, 16), torch.randn(4, 1, 16, 16)
    for penalty in ALL:
        plain, grads = value_and_gradients(penalty, D, real, fake)
        with torch.autocast("cpu", dtype):
            assert D(real).dtype == dtype  # the weights are in autocast's cache now
            mixed, mixed_grads = value_and_gradients(penalty, D, real, fake)
            assert torch.is_autocast_enabled("cpu")
        assert mixed.dtype == torch.float32 and torch.equal(mixed, plain) and all(map(torch.equal, grads, mixed_grads))
        assert penalty(D, real.to(dtype), fake.to(dtype)).dtype == torch.float32


@pytest.mark.parametrize("penalty", ALL, ids=by_name)
def test_a_grad_scaler_scales_the_penalty_once(penalty):
    "The slope inside is not scaled, so a scaled penalty has gradients that unscaling puts right."
    torch.manual_seed(0)
    D, images = models.DCGANDiscriminator(16, 1, 2, batchnorm=False), torch.randn(2, 4, 1, 16, 16)
    _, plain = value_and_gradients(penalty, D, *images)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    with torch.autocast("cpu", torch.float16):
        torch.manual_seed(1)
        D.zero_grad()
        scaler.scale(penalty(D, *images)).backward()
    opt = torch.optim.SGD(D.parameters())
    scaler.unscale_(opt)
    for p, expected in zip((p for p in D.parameters() if p.grad is not None), plain):
        torch.testing.assert_close(p.grad, expected)


@pytest.mark.parametrize("penalty", ALL, ids=by_name)
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


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_compiled_discriminator_gives_the_same(wrapped):
    "aot_autograd can't be derived twice: the penalty calls the network as it was before."
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 1))
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 1))
    if wrapped:
        net = torch.compile(net, backend="aot_eager")
    else:
        net.compile(backend="aot_eager")
    x, y = torch.randn(5, 6), torch.randn(5, 6)
    for penalty in ALL:
        torch.manual_seed(1)
        expected = penalty(plain, x, y)
        torch.manual_seed(1)
        value = penalty(net, x, y)
        torch.testing.assert_close(value, expected)
        for p, q in zip(net.parameters(), plain.parameters()):
            p.grad = q.grad = None
        value.backward()
        expected.backward()
        torch.testing.assert_close(net.get_parameter("_orig_mod.0.weight" if wrapped else "0.weight").grad, plain[0].weight.grad)
    assert uncompiled(torch.relu) is torch.relu


class Critic(nn.Sequential):
    "Code of ours, or there is nothing that `compile()` in place would compile."

    def forward(self, x):
        return super().forward(x)


@pytest.mark.parametrize("what", ["a part", "a function", "in place"])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_parts_and_functions_give_the_same_and_stay_compiled(what, backend):
    torch._dynamo.reset()
    torch.manual_seed(0)
    net, images = Critic(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 1)), torch.randn(2, 5, 6)
    expected = [value_and_gradients(penalty, net, *images) for penalty in ALL]
    compiled = 0

    def counting(graph, inputs):
        nonlocal compiled
        compiled += 1
        return torch._dynamo.lookup_backend(backend)(graph, inputs)

    if what == "in place":
        net.compile(backend=counting)
    elif what == "a part":
        net[0] = torch.compile(net[0], backend=counting)
    called = torch.compile(lambda x: net(x), backend=counting) if what == "a function" else net
    called(images[0]).sum().backward()
    assert compiled == 1
    for penalty, (value, grads) in zip(ALL, expected):
        torch.manual_seed(1)
        net.zero_grad()
        mine = penalty(called, *images)
        mine.backward()
        torch.testing.assert_close(mine.detach(), value)
        torch.testing.assert_close([p.grad for p in net.parameters() if p.grad is not None], grads)
    called(images[0]).sum().backward()
    assert compiled == 1  # nothing was compiled for the penalties, and nothing anew afterwards


def test_a_discriminator_that_says_more_and_one_that_says_nothing():
    x, y, w = torch.randn(4, 3), torch.randn(4, 3), torch.tensor([3.0, 0, 4])
    for penalty in ALL:
        torch.manual_seed(1)
        plain = penalty(lambda x: x @ w, x, y)
        torch.manual_seed(1)
        assert torch.equal(penalty(lambda x: (x @ w, {"features": x}), x, y), plain)
        for said in {"logits": 1}, 3.0, ():
            with pytest.raises(TypeError, match="a discriminator returns logits, or"):
                penalty(lambda x, said=said: said, x, y)
        with pytest.raises(ValueError, match="have no slope"):
            penalty(lambda x: torch.ones(4), x, y)


POINTS = torch.randn(64, 2, generator=torch.Generator().manual_seed(0))


def gan(dls=None, **kw):
    torch.manual_seed(0)
    g = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 2))
    d = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1), nn.Flatten(0))
    dls = [*POINTS.split(8)] if dls is None else dls
    return GANLearner(g, d, dls, **({"opt": OptimBuilder("adam", lr=1e-3), "latent": 2, "front": "none", "seed": 0} | kw))


def test_all_in_a_learner_under_bf16_with_accumulation():
    "In bf16 the penalties are float32's, and no gradient of theirs reaches the generator."
    learn = gan(penalties=[*ALL], precision="bf16", accumulate={"discriminator": 2})
    seen = []
    learn.add(On("after_loss", lambda learn: seen.append({n: v.dtype for n, v in learn.losses.items()})),
              On("after_backward", lambda learn: seen.append(
                  learn.player.name == "generator" or all(p.grad is None for p in learn.generator.parameters()))))
    learn.fit(steps=4)
    assert all(types[p.name] == torch.float32 for types in seen[::4] for p in ALL) and all(seen[1::2])
    assert [p.updates for p in learn.players] == [2, 4]
    for penalty in ALL:
        values = learn.history.scalars[f"train/discriminator/{penalty.name}"][1]
        assert len(values) == 4 and (values >= 0).all()


def test_bf16_penalty_in_a_learner_is_that_of_float32():
    values = []
    for precision in ("fp32", "bf16"):
        learn = gan(penalties=R1(), precision=precision)
        learn.fit(steps=1)
        values.append(learn.history.last("train/discriminator/r1"))
    assert values[0] == values[1] > 0


def test_accumulated_penalty_is_that_of_the_whole_batch():
    "Two turns of 8 make the step of one turn of 16: neither R1 nor this loss draws anything."
    grads = []
    for size, accumulate in ((16, 1), (8, 2)):
        learn = gan([*POINTS[:16].split(size)], penalties=R1(), accumulate={"discriminator": accumulate},
                    loss=(lambda fake: fake.mean(), lambda real, fake: real.square().mean()))  # fmt: skip
        learn.add(On("before_step", lambda learn: learn.player.name == "discriminator" and grads.append(
            [p.grad.clone() for p in learn.player.parameters()])))
        learn.fit(epochs=1)
    assert len(grads) == 2
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b)


class Counting:
    "A penalty that notes the sizes at which it was asked."

    name = "counting"

    def __init__(self):
        self.calls = 0

    def __call__(self, discriminator, real, *args):
        self.calls += 1
        return R1(2.0)(discriminator, real)


@pytest.mark.parametrize("accumulate, active", [(1, [0, 3, 6]), (2, [0, 1, 6, 7])])
def test_lazy_counts_optimizer_steps(accumulate, active):
    "With accumulation, all turns that make one step have the penalty, or none has."
    lazy = Lazy(inner := Counting(), every=3)
    learn = gan(penalties=lazy, cbs=lazy, accumulate={"discriminator": accumulate})
    direct = []
    learn.add(On("after_forward", lambda learn: learn.player.name == "discriminator" and direct.append(
        3 * R1(2.0)(learn.discriminator, learn.pred.real).item())))
    learn.fit(steps=8)
    assert inner.calls == len(active)
    series = learn.history.scalars["train/discriminator/counting"][1]
    assert [i for i, v in enumerate(series) if v] == active
    assert [series[i] for i in active] == pytest.approx([direct[i] for i in active])


def test_lazy_of_one_and_lazy_without_learner_are_the_penalty_itself():
    lazy = Lazy(R1(), every=1)
    a, b = gan(penalties=R1()), gan(penalties=lazy, cbs=lazy)
    a.fit(steps=5), b.fit(steps=5)
    same_weights(a, b)
    critic = nn.Linear(2, 1)
    assert Lazy(R1(), every=9)(critic, POINTS) == R1()(critic, POINTS)


def test_lazy_goes_on_in_its_rhythm_after_a_restore(tmp_path):
    def make(run):
        lazy = Lazy(GradientPenalty(), every=3)
        return gan(penalties=lazy, cbs=lazy, run=run)

    resumes(make, tmp_path, steps=10, at=(1, 4, 6))


def test_lazy_refuses_what_it_cant_mean():
    for every in (0, 1.5, True):
        with pytest.raises(ValueError, match="every must be a whole number"):
            Lazy(R1(), every)
    for penalty in (R1, "r1", lambda *a: 0):
        with pytest.raises(TypeError, match="Lazy takes a penalty"):
            Lazy(penalty)
    with pytest.raises(ValueError, match="critic"):
        gan(cbs=Lazy(R1(), player="critic")).fit(1)
