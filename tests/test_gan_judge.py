"The digits judge, and all scores in one table: what must be better is."
import math

import pytest
import torch
from torch import nn

from trainkit.datasets import mnist_5k
from trainkit.gan.distances import features_of, fid
from trainkit.gan.estimates import Estimate
from trainkit.gan.judge import DigitsJudge, Shift, as_table, scorecard, train_judge
from trainkit.gan.metrics import class_probabilities


@pytest.fixture(scope="module")
def trained():
    x, y = mnist_5k(size=28)
    rng = torch.get_rng_state()
    judge = train_judge(x[:2000], y[:2000], epochs=3)
    assert torch.equal(rng, torch.get_rng_state())
    return judge, x, y


def test_the_judge_knows_digits_and_is_left_frozen(trained):
    judge, x, y = trained
    right = (class_probabilities(judge, x[4000:]).argmax(1) == y[4000:]).float().mean()
    assert right > 0.9
    assert not any(m.training for m in judge.modules()) and not any(p.requires_grad for p in judge.parameters())
    features = features_of(judge.features, x[2000:3000])
    assert features.shape == (1000, 64) and 0.5 < features.var(0).mean() < 2  # of the size of 1, as KID's kernel wants them


def test_training_is_reproducible_and_takes_a_network_of_ones_own():
    x, y = mnist_5k(size=28)
    a, b, c = (train_judge(x[:128], y[:128], epochs=1, seed=s) for s in (1, 1, 2))
    pairs = lambda p, q: [torch.equal(v, w) for v, w in zip(p.state_dict().values(), q.state_dict().values())]
    assert all(pairs(a, b)) and not all(pairs(a, c))
    own = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
    before = own[1].weight.clone()
    assert train_judge(x[:128], y[:128], 1, own) is own and not torch.equal(own[1].weight, before)
    with pytest.raises(ValueError, match="128 images and 100 labels"):
        train_judge(x[:128], y[:100])


def test_the_network():
    judge = DigitsJudge(channels=3, classes=7, width=20)
    for size in (28, 32):
        x = torch.zeros(2, 3, size, size)
        assert judge(x).shape == (2, 7) and judge.features(x).shape == (2, 20)
    x = torch.arange(25.0).reshape(1, 1, 5, 5)
    torch.manual_seed(0)
    seen = {tuple(divmod(int(Shift(1)(x)[0, 0].argmin()), 5)) for _ in range(200)}
    assert seen == {(a % 5, b % 5) for a in (-1, 0, 1) for b in (-1, 0, 1)}
    assert torch.equal(Shift(1).eval()(x), x)


def test_the_scorecard_orders_what_must_be_ordered(trained):
    judge, x, y = trained
    real, other, train = x[4000:4400], x[4400:4800], x[:2000]
    noise = torch.rand(400, 1, 28, 28, generator=torch.Generator().manual_seed(0)) * 2 - 1
    sets = dict(other=other, blurred=nn.functional.avg_pool2d(other, 7, 1, 3), noise=noise, copies=train[:400],
                one=other[y[4400:4800] == 7][:1].repeat(400, 1, 1, 1) + 0.01 * noise)  # fmt: skip
    rng = torch.get_rng_state()
    c = {name: scorecard(judge, fakes, real, train) for name, fakes in sets.items()}
    assert torch.equal(rng, torch.get_rng_state())
    for name in ("FID", "FID at infinity", "KID"):
        assert c["other"][name] < c["blurred"][name] < c["noise"][name] and c["other"][name] < c["one"][name]
    for name in ("recall", "coverage", "classifier score", "diversity"):
        assert all(c["other"][name] > c[k][name] for k in ("blurred", "noise", "one"))
    assert c["noise"]["precision"] < 0.1 and c["one"]["coverage"] < 0.1 and c["one"]["diversity"] < 0.1 * c["other"]["diversity"]
    assert c["copies"]["near copies"] == 1 and c["other"]["near copies"] < 0.05
    assert all(v.n_fake == 400 for card in c.values() for v in card.values())
    assert not any(math.isnan(v.error) for v in c["other"].values())
    assert c["other"]["FID"] == fid(features_of(judge.features, real), features_of(judge.features, other))
    assert "near copies" not in scorecard(judge, other, real)


def test_the_table():
    rows = {"a": {"x": Estimate(12.345, 10, error=0.0123), "y": 3}, "b": {"x": Estimate(1200.4, 10, error=130.0), "z": 0.5}}
    lines = as_table(rows).split("\n")
    assert lines[0] == "|  | x | y | z |" and lines[2:] == ["| a | 12.345 ± 0.012 | 3 |  |", "| b | 1200 ± 130 |  | 0.5 |"]
    assert "±" not in as_table(rows, errors=False)
    with pytest.raises(ValueError, match="at least one row"):
        as_table({})


def test_bad_input_is_named(trained):
    judge, x, _ = trained
    with pytest.raises(TypeError, match="Flatten has none"):
        scorecard(nn.Flatten(), x[:20], x[20:40])
    with pytest.raises(ValueError, match="fakes are not finite"):
        scorecard(judge, x[:20] / 0 * torch.inf, x[20:40])
