"""The classifier score against the paper's formula, torchmetrics and its bounds."""
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from trainkit.device import evaluating
from trainkit.gan.estimates import Deal
from trainkit.gan.metrics import ClassifierScore, answers_of, classifier_score


def papers_formula(p):
    p = p.double()
    return (p * (p / p.mean(0)).log()).sum(1).mean().exp()


def score_of(images, classifier, **options):
    score = ClassifierScore(classifier, **options)
    score.update(images)
    return score.compute()


def test_pinned_value():
    logits = torch.tensor([[1, 2, 3], [-1, 5, 3.1]])
    assert classifier_score(logits.softmax(1)).item() == pytest.approx(1.24357, abs=1e-5)
    assert score_of(logits, nn.Identity()) == pytest.approx(1.24357, abs=1e-5)


@given(st.integers(1, 30), st.integers(1, 8), st.floats(0.01, 30), st.integers(0, 9999))
@settings(max_examples=60, deadline=None)
def test_formula_and_bounds(n, k, scale, seed):
    logits = scale * torch.randn(n, k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    p = logits.softmax(1).clamp(min=1e-300)
    value = classifier_score(p)
    torch.testing.assert_close(value, papers_formula(p))
    assert 1 - 1e-9 <= value <= min(n, k) + 1e-9


@given(st.lists(st.integers(1, 20), min_size=1, max_size=8), st.integers(1, 4), st.integers(1, 7))
@settings(max_examples=40, deadline=None)
def test_any_stream_gives_the_value_of_the_whole(sizes, splits, batch_size):
    logits = 3 * torch.randn(sum(sizes), 5, generator=torch.Generator().manual_seed(sum(sizes)))
    score = ClassifierScore(nn.Identity(), splits=splits, batch_size=batch_size)
    for part in logits.split(sizes):
        score.update(part)
    if len(logits) < splits:
        with pytest.raises(ValueError, match=f"{splits} splits need"):
            score.compute()
        return
    part = Deal(splits)(len(logits))
    expected = torch.stack([papers_formula(logits[part == i].double().softmax(1)) for i in range(splits)])
    torch.testing.assert_close(score.compute_splits(), expected)
    assert score.compute() == pytest.approx(expected.mean().item())


def test_agrees_with_torchmetrics():
    image = pytest.importorskip("torchmetrics.image.inception")
    torch.manual_seed(0)
    classifier, images = nn.Sequential(nn.Flatten(), nn.Linear(12, 7)), 5 * torch.randn(200, 3, 2, 2)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        reference = image.InceptionScore(feature=classifier, splits=1)
        reference.update(images)
        expected = reference.compute()[0].item()
    assert score_of(images, classifier) == pytest.approx(expected, rel=1e-5)


def test_extremes():
    assert classifier_score(torch.eye(10)).item() == pytest.approx(10)
    assert classifier_score(torch.eye(10)[[4] * 6]).item() == pytest.approx(1)
    assert score_of(torch.eye(10) * 1e4, nn.Identity()) == pytest.approx(10)  # probabilities of exactly zero
    certain = torch.full((10, 10), -torch.inf).fill_diagonal_(0)
    assert score_of(certain, nn.Identity()) == pytest.approx(10)


def test_a_broken_image_shows_and_reset_forgets_it():
    score = ClassifierScore(nn.Identity())
    score.update(torch.tensor([[torch.nan, 1.0], [0.0, 1.0]]))
    assert score.compute() != score.compute()
    score.reset()
    score.update(torch.eye(2) * 50)
    assert score.compute() == pytest.approx(2)


def test_the_score_says_how_many_and_how_sure():
    "The error is that of repetition."
    torch.manual_seed(0)
    scores = [score_of(2 * torch.randn(400, 5), nn.Identity(), splits=8) for _ in range(60)]
    spread, said = torch.tensor(scores).std(), torch.tensor([s.error for s in scores]).mean()
    assert 0.7 < said / spread < 1.4
    alone = score_of(torch.randn(30, 5), nn.Identity())
    assert scores[0].n_fake == 400 and alone.n_fake == 30 and alone.error != alone.error


def test_logits_are_no_probabilities():
    "torchgan took logits here; ours does in `ClassifierScore`."
    good = torch.eye(3)[[0, 1, 2, 0]]
    for bad in (torch.tensor([1.0, 2.0, 3.0]), torch.tensor([-0.5, 1.0, 0.5]), torch.tensor([0.3, 0.3, 0.3])):
        with pytest.raises(ValueError, match="1 of 5 rows are no probabilities"):
            classifier_score(torch.cat([good, bad[None]]))
    assert classifier_score(torch.full((4, 3), 1 / 3).half()).item() == pytest.approx(1, abs=1e-3)


def test_float64_sums_do_not_drift():
    score, part = ClassifierScore(nn.Identity()), torch.tensor([[2.0, 0.0], [0.0, 3.0]])
    for _ in range(3000):
        score.update(part)
    assert score.compute() == pytest.approx(papers_formula(part.double().softmax(1)).item(), rel=1e-11)
    assert score.sums.probs.shape == (1, 2) and score.sums.n.item() == 6000


class Judge(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.drop, self.out = nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 3)
        self.seen = []

    def forward(self, x):
        self.seen.append((len(x), self.training, self.norm.training, torch.is_grad_enabled(), x.device.type))
        return self.out(self.drop(self.norm(x)))


def test_the_classifier_is_only_looked_at():
    torch.manual_seed(0)
    judge, images = Judge(), torch.randn(10, 4, requires_grad=True)
    judge.norm.eval()
    state = {k: v.clone() for k, v in judge.state_dict().items()}
    rng = torch.get_rng_state()
    score_of(images, judge, batch_size=4)
    assert [s[0] for s in judge.seen] == [4, 4, 2] and not any(s[1] or s[2] or s[3] for s in judge.seen)
    assert judge.training and judge.drop.training and not judge.norm.training and torch.is_grad_enabled()
    assert all(torch.equal(v, state[k]) for k, v in judge.state_dict().items())
    assert torch.equal(rng, torch.get_rng_state())
    assert images.grad is None and all(p.grad is None for p in judge.parameters())


def test_modes_come_back_after_an_error():
    judge = Judge()
    with pytest.raises(RuntimeError):
        score_of(torch.randn(5, 9), judge)
    assert judge.training and judge.norm.training and torch.is_grad_enabled()
    with pytest.raises(KeyError), evaluating(judge):
        raise KeyError
    assert judge.training


def test_a_failed_update_changes_nothing():
    score = ClassifierScore(nn.Identity())
    score.update(torch.randn(4, 3))
    before = score.compute()
    for bad in (torch.randn(4, 5), torch.randn(4), torch.randn(2, 3, 4)):
        with pytest.raises(ValueError, match="classifier"):
            score.update(bad)
    score.update(torch.zeros(0, 3))
    assert score.compute() == before and score.sums.n.item() == 4


def test_images_go_where_the_classifier_is_and_are_transformed():
    seen = []
    judge = nn.Linear(4, 3, dtype=torch.float64)

    def transform(x):
        seen.append(x.device)
        return x.double().flatten(1)

    assert score_of(torch.zeros(2, 2, 2), judge, transform=transform) == pytest.approx(1)
    assert seen == [judge.weight.device]


def test_bad_arguments_are_named():
    for bad in (dict(splits=0), dict(batch_size=0)):
        with pytest.raises(ValueError, match=f"{next(iter(bad))}=0"):
            ClassifierScore(nn.Identity(), **bad)
    with pytest.raises(ValueError, match="seen 0"):
        ClassifierScore(nn.Identity()).compute()
    for bad in (torch.ones(3), torch.ones(0, 3), torch.ones(2, 3, 4)):
        with pytest.raises(ValueError, match="expected"):
            classifier_score(bad)


@given(st.lists(st.integers(0, 200), min_size=1, max_size=8), st.integers(1, 12))
@settings(max_examples=40, deadline=None)
def test_deals_are_fair_and_do_not_depend_on_the_batches(sizes, splits):
    whole, deal = Deal(splits)(sum(sizes)), Deal(splits)
    assert torch.equal(torch.cat([deal(n) for n in sizes]), whole)
    shares = whole.bincount(minlength=splits)
    assert shares.max() - shares.min() <= 1
    rounds = whole[: len(whole) // splits * splits].view(-1, splits)
    assert (rounds.sort(1).values == torch.arange(splits)).all()


def test_a_pattern_in_the_stream_is_no_pattern_in_the_splits():
    "Classes that come in turn, as many as splits: dealt in turn, every split would hold one class and score 1."
    certain = 50 * torch.eye(10).repeat(100, 1)
    for splits in (2, 5, 10):
        assert score_of(certain, nn.Identity(), splits=splits) > 9


def test_measuring_is_in_the_networks_own_precision():
    torch.manual_seed(0)
    net, x = nn.Linear(4, 3), torch.randn(9, 4).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        answers = answers_of(net, x, batch_size=4)
    torch.testing.assert_close(answers, nn.functional.linear(x.float(), net.weight, net.bias), rtol=0, atol=0)
    assert not answers.requires_grad
    for bad in ([1.0, 2.0], torch.tensor(3.0)):
        with pytest.raises(TypeError, match="samples are a tensor"):
            answers_of(net, bad)


def test_labels_are_not_looked_at():
    with_labels, without = ClassifierScore(nn.Identity()), ClassifierScore(nn.Identity())
    with_labels.update(torch.eye(3), torch.arange(3))
    without.update(torch.eye(3))
    assert with_labels.compute() == without.compute()
