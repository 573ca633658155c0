"Models that forecast: against closed forms, against what they are said to be blind to, and with wrong shapes."

import numpy as np
import pytest
import torch
from torch import nn

from trainkit.forecast.models import (
    DLinear,  # fmt: skip
    NLinear,
    Normalised,
    PatchTST,
    SeasonalNaive,
    TimeLinear,
    equations,
    least_squares,
    moving_average,
)

SMALL = {"width": 16, "heads": 2, "layers": 2}
ALL = {"naive": lambda i, o: SeasonalNaive(o, 8), "time": TimeLinear, "nlinear": NLinear, "dlinear": DLinear,
       "own": lambda i, o: NLinear(i, o, individual=3), "patch": lambda i, o: PatchTST(i, o, **SMALL)}  # fmt: skip


@pytest.fixture
def x():
    return torch.randn(5, 48, 3, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ALL)
def test_shapes_batches_and_variables(name, x):
    torch.manual_seed(0)
    model = ALL[name](48, 12).eval()
    found = model(x)
    assert found.shape == (5, 12, 3) and found.isfinite().all()
    assert torch.allclose(model(x[2:4]), found[2:4], atol=1e-5), "no window sees another"
    other = x.clone()
    other[:, :, 1] += torch.randn(5, 48, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(model(other)[:, :, [0, 2]], found[:, :, [0, 2]], atol=1e-5), "no variable sees another"
    assert not torch.allclose(model(other)[:, :, 1], found[:, :, 1], atol=1e-3)


@pytest.mark.parametrize("name", [name for name in ALL if name != "naive"])
def test_every_weight_is_trained(name, x):
    torch.manual_seed(0)
    model = ALL[name](48, 12)
    model(x).square().mean().backward()
    unmoved = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not unmoved


@pytest.mark.parametrize("name", ["naive", "nlinear", "own", "patch"])
def test_a_level_that_moves_moves_the_forecast(name, x):
    torch.manual_seed(0)
    model = ALL[name](48, 12).eval()
    assert torch.allclose(model(x + 5), model(x) + 5, atol=1e-3)


def test_seasonal_naive_repeats_the_last_period_exactly(x):
    found = SeasonalNaive(50, 24)(x)
    for h in range(50):
        assert torch.equal(found[:, h], x[:, 24 + h % 24])
    pattern = torch.arange(6.0).repeat(20)[None, :, None]
    assert torch.equal(SeasonalNaive(30, 6)(pattern[:, :90]), pattern[:, 90:]), "what is periodic is forecast without error"


def test_dlinear_is_two_linear_maps_of_trend_and_rest(x):
    torch.manual_seed(0)
    model = DLinear(48, 12, kernel=5)
    padded = np.pad(x.numpy(), ((0, 0), (2, 2), (0, 0)), mode="edge")
    trend = np.stack([padded[:, i : i + 5].mean(1) for i in range(48)], 1)
    assert np.allclose(moving_average(x, 5), trend, atol=1e-6)
    a, b = (layer.maps[0] for layer in (model.trend, model.rest))
    wanted = a(torch.tensor(trend).transpose(1, 2)) + b(x.transpose(1, 2) - torch.tensor(trend).transpose(1, 2))
    assert torch.allclose(model(x), wanted.transpose(1, 2), atol=1e-5)


def test_patches_are_the_papers(x):
    "(L - P) / S + 2 patches: the last value is repeated S times at the end (Nie et al. 2023, section 3.1)."
    model = PatchTST(48, 12, patch=16, stride=8, **SMALL)
    seen = []
    model.model.encoder.embed.register_forward_hook(lambda m, i, o: seen.append(i[0]))
    model(x)
    assert model.model.encoder.patches == (48 - 16) // 8 + 2 == 6 and seen[0].shape == (15, 6, 16)
    alone = (x - x.mean(1, keepdim=True)) / (x.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
    series = torch.cat([alone, alone[:, -1:].repeat(1, 8, 1)], 1).transpose(1, 2).flatten(0, 1)
    for k in range(6):
        assert torch.allclose(seen[0][:, k], series[:, 8 * k : 8 * k + 16], atol=1e-5)


def test_normalised_gives_scale_and_level_back(x):
    assert torch.allclose(Normalised(nn.Identity())(x * 30 + 7), x * 30 + 7, atol=1e-3)


@pytest.mark.parametrize("kind", [NLinear, TimeLinear])
@pytest.mark.parametrize("ridge", [0.0, 0.5])
def test_least_squares_is_numpys(kind, ridge, x):
    g = torch.Generator().manual_seed(3)
    past, future = torch.randn(80, 10, 2, generator=g), torch.randn(80, 4, 2, generator=g)
    future[5, 1, 0] = float("nan")
    model = least_squares(kind(10, 4), [(past[:50], future[:50]), (past[50:], future[50:])], ridge=ridge)
    last = past[:, -1:] if kind is NLinear else 0 * past[:, -1:]
    a = (past - last).transpose(1, 2).reshape(-1, 10).double().numpy()
    b = (future - last).transpose(1, 2).reshape(-1, 4).double().numpy()
    keep = ~np.isnan(b).any(1)
    assert keep.sum() == 159 == len(equations(model, past, future)[0])
    a, b = a[keep], b[keep]
    a = np.hstack([a, np.ones((len(a), 1))])
    extra = np.sqrt(ridge * len(a)) * np.eye(11)[:10]  # rows that pull the weights, and not the bias, to zero
    wanted = np.linalg.lstsq(np.vstack([a, extra]), np.vstack([b, np.zeros((10, 4))]), rcond=None)[0]
    assert np.allclose(model.maps[0].weight.detach().numpy(), wanted[:-1].T, atol=1e-5)
    assert np.allclose(model.maps[0].bias.detach().numpy(), wanted[-1], atol=1e-5)


def test_nothing_trained_fits_better_than_least_squares():
    g = torch.Generator().manual_seed(0)
    past, future = torch.randn(200, 12, 1, generator=g), torch.randn(200, 3, 1, generator=g)
    model = least_squares(NLinear(12, 3), [(past, future)])
    best = (model(past) - future).square().mean().item()
    opt = torch.optim.LBFGS(model.parameters(), max_iter=50)

    def closure():
        opt.zero_grad()
        loss = (model(past) - future).square().mean()
        loss.backward()
        return loss

    opt.step(closure)
    assert (model(past) - future).square().mean().item() > best - 1e-6


@pytest.mark.parametrize("make,said", [
    (lambda: SeasonalNaive(0), "outputs is a whole number"), (lambda: NLinear(10, 2.0), "outputs is a whole number"),
    (lambda: NLinear(10, 2, individual=0), "individual is a whole number"), (lambda: DLinear(10, 2, kernel=4), "odd number"),
    (lambda: PatchTST(10, 2), "patches of 16 must fit 10 inputs"), (lambda: PatchTST(32, 2, heads=3), "3 heads divide"),
    (lambda: least_squares(NLinear(5, 2, individual=2), []), "share one map"),
    (lambda: least_squares(NLinear(5, 2), [], ridge=-1), "ridge >= 0"), (lambda: least_squares(NLinear(5, 2), []), "no window"),
    (lambda: NLinear(5, 2)(torch.zeros(1, 6, 1)), r"\(batch, 5, variables\); received \(1, 6, 1\)"),
    (lambda: PatchTST(32, 2, **SMALL)(torch.zeros(2, 31, 1)), r"received \(2, 31, 1\)"),
    (lambda: SeasonalNaive(5)(torch.zeros(2, 23, 1)), "24 at least")])  # fmt: skip
def test_what_cannot_be(make, said):
    with pytest.raises(ValueError, match=said):
        make()
