"Mixed inputs, soft and noisy targets, auxiliary losses: against the papers' formulas, left and resumed, and for every ending."

import dataclasses
import math
import warnings
from collections import UserDict, namedtuple
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from ways import ENDINGS, end_by, resumes, same_weights

from trainkit.callback import On
from trainkit.callbacks.batches import (
    AuxLoss,
    CutMix,
    InstanceNoise,
    LabelNoise,
    LabelSmoothing,
    MixUp,
    draw_beta,
    draw_box,
    exchange,
)
from trainkit.callbacks.guards import SkipBadSteps
from trainkit.gan.learner import GANLearner
from trainkit.gan.penalties import R1, GradientPenalty
from trainkit.learner import Learner
from trainkit.optim import OptimBuilder
from trainkit.player import Player

G = torch.Generator().manual_seed(0)
X = torch.randn(22, 2, 6, 8, generator=G)
Y = torch.randint(5, (22,), generator=G)
MIXING = [lambda **kw: MixUp(alpha=1.0, **kw), lambda **kw: CutMix(alpha=1.0, **kw)]


def net(classes=5):
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(96, 8), nn.Tanh(), nn.Linear(8, classes))


def learner(cbs=(), run=None, y=Y, loss="cross_entropy", classes=5, valid=True, lr=0.05, **kw):
    model, data = net(classes), TensorDataset(X, y)
    train = DataLoader(data, batch_size=4, shuffle=valid)
    dls = (train, DataLoader(data, batch_size=11)) if valid else train
    return Learner(model, dls, loss, OptimBuilder("sgd", lr=lr, momentum=0.9), cbs=cbs, run=run, front="none", seed=3, **kw)


class Kept:
    "Keeps what the turns of a fit used."

    def __init__(self):
        self.x, self.y = [], []
        self.cb = On("after_forward", self.keep, order=99)

    def keep(self, learn):
        inputs, named, targets = learn.split(learn.batch)
        self.x.append([*inputs, *named.values()][0])
        self.y += (learn.targets or targets)[:1]


def used(*cbs, steps=6, **kw):
    kept = Kept()
    learn = learner([*cbs, kept.cb], **kw)
    learn.fit(steps=steps)
    return kept


# ------------------------------------------------------------------------------------------------------- the draws


@pytest.mark.parametrize("alpha,cdf", [
    (0.5, lambda x: 2 / math.pi * torch.asin(x.sqrt())), (1.0, lambda x: x), (2.0, lambda x: 3 * x**2 - 2 * x**3),
])  # fmt: skip
def test_shares_follow_the_beta_distribution(alpha, cdf):
    torch.manual_seed(0)
    n = 4000
    x = torch.tensor([draw_beta(alpha) for _ in range(n)], dtype=torch.float64).sort().values
    distance = (cdf(x) - (torch.arange(n) + 0.5) / n).abs().max()
    assert distance < 1.63 / n**0.5  # Kolmogorov and Smirnov, 1 %


@pytest.mark.parametrize("alpha", [1e-3, 1e-2, 0.2, 4.0, 100.0])
def test_their_variance_is_the_closed_form_also_where_torchs_sampler_fails(alpha):
    torch.manual_seed(0)
    x = torch.tensor([draw_beta(alpha) for _ in range(4000)], dtype=torch.float64)
    assert x.mean().item() == pytest.approx(0.5, abs=4 * x.std().item() / 4000**0.5)
    assert x.var().item() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.08)
    if alpha == 1e-3:
        torchs = torch.distributions.Beta(alpha, alpha).sample((4000,))
        assert ((torchs > 0.01) & (torchs < 0.99)).float().mean() > 0.1 > 0.02 > ((x > 0.01) & (x < 0.99)).double().mean()


def test_extreme_alphas_give_shares():
    assert all(0 <= draw_beta(alpha) <= 1 for alpha in (1e-300, 1e-30, 1e-8, 1e6, 1e12) for _ in range(20))


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99, 1.0])
def test_a_box_lies_in_the_image_around_any_point(share):
    torch.manual_seed(0)
    boxes = [draw_box(7, 10, share) for _ in range(600)]
    tall, wide = int(7 * math.sqrt(1 - share)), int(10 * math.sqrt(1 - share))
    assert all(0 <= b.start <= b.stop <= 7 and 0 <= c.start <= c.stop <= 10 for b, c in boxes)
    assert max(b.stop - b.start for b, _ in boxes) == tall and max(c.stop - c.start for _, c in boxes) == wide
    if tall and wide:
        covered = torch.zeros(7, 10)
        for box in boxes:
            covered[box] += 1
        assert covered.min() > 0  # up to the corners


# ------------------------------------------------------------------------------------------------------- mixing


@pytest.mark.parametrize("num_classes", [None, 5])
def test_mixup_is_the_papers_formula(num_classes):
    mixup, shares = MixUp(0.8, num_classes=num_classes), []
    note = On("after_forward", lambda learn: shares.append((mixup._share, mixup._others)))
    kept, plain = used(mixup, note, valid=False), used(valid=False)
    assert len(kept.x) == 6 and len({share for share, _ in shares}) == 6
    for x, y, mixed_x, mixed_y, (share, others) in zip(plain.x, plain.y, kept.x, kept.y, shares):
        assert sorted(others.tolist()) == list(range(len(x)))
        one_hot = torch.eye(5)[y]
        torch.testing.assert_close(mixed_x, share * x + (1 - share) * x[others])
        torch.testing.assert_close(mixed_y, share * one_hot + (1 - share) * one_hot[others])
        torch.testing.assert_close(mixed_y.sum(1), torch.ones(len(x)))
    assert len({str(others.tolist()) for _, others in shares}) > 2


def test_the_loss_is_the_mean_of_both_losses():
    mixup, shares = MixUp(1.0), []
    note = On("after_forward", lambda learn: shares.append((mixup._share, mixup._others, learn.pred.detach())))
    learn, y = learner([mixup, note], valid=False), Y[:4]
    learn.fit(steps=1)
    share, others, pred = shares[0]
    expected = share * F.cross_entropy(pred, y) + (1 - share) * F.cross_entropy(pred, y[others])
    assert learn.history.last("train/loss") == pytest.approx(expected.item(), rel=1e-5)


def test_cutmix_pastes_one_box_and_counts_its_pixels():
    cutmix, boxes = CutMix(1.0), []
    kept = used(cutmix, On("after_forward", lambda learn: boxes.append((cutmix._box, cutmix._others))), valid=False)
    plain = used(valid=False)
    for x, y, cut_x, cut_y, (box, others) in zip(plain.x, plain.y, kept.x, kept.y, boxes):
        inside = torch.zeros(6, 8, dtype=torch.bool)
        inside[box] = True
        assert torch.equal(cut_x, torch.where(inside, x[others], x))
        share = 1 - inside.sum().item() / 48
        torch.testing.assert_close(cut_y, share * torch.eye(5)[y] + (1 - share) * torch.eye(5)[y[others]])
    assert len({str(box) for box, _ in boxes}) > 2
    assert torch.equal(torch.cat(plain.x), X)  # the data themselves are left alone


@pytest.mark.parametrize("make", MIXING)
def test_float_targets_are_mixed_linearly(make):
    target, mixing, shares = torch.randn(22, 3), make(), []
    kept = used(mixing, On("after_forward", lambda learn: shares.append((mixing._share, mixing._others))),
                y=target, loss="mse", classes=3, valid=False, steps=5)  # fmt: skip
    for i, (y, (share, others)) in enumerate(zip(kept.y, shares)):
        old = target[4 * i : 4 * i + 4]
        torch.testing.assert_close(y, share * old + (1 - share) * old[others])


@pytest.mark.parametrize("make", MIXING)
def test_a_class_for_each_pixel_and_truths(make):
    mixing = make(num_classes=3)
    mixing._draw([X[:4]])
    soft = mixing.change(torch.randint(3, (4, 6, 8)), 3)
    assert soft.shape == (4, 3, 6, 8) and torch.allclose(soft.sum(1), torch.ones(4, 6, 8))
    true = torch.ones(4, 2, dtype=torch.bool)
    assert mixing.ready(true) and mixing.change(true, None).unique().tolist() == [1.0]


@pytest.mark.parametrize("make", MIXING)
@pytest.mark.parametrize("off", [{"alpha": 0.0}, {"probability": 0.0}])
def test_switched_off_nothing_is_mixed(make, off):
    mixing = make()
    for name, value in off.items():
        setattr(mixing, name, value)
    a, b = learner(mixing, valid=False), learner(valid=False)
    a.fit(steps=4)
    b.fit(steps=4)
    same_weights(a, b)


def test_a_batch_is_mixed_with_its_probability():
    kept = used(MixUp(1.0, probability=0.4, num_classes=5), steps=300, valid=False, lr=0.0)
    mixed = sum(y.is_floating_point() for y in kept.y)
    assert abs(mixed - 120) < 4 * math.sqrt(300 * 0.4 * 0.6)


def test_smoothing_noise_and_mixing_come_in_this_order():
    noise, mix, smooth = LabelNoise(1.0), MixUp(1.0), LabelSmoothing(0.2)
    kept = used(smooth, mix, noise, valid=False, steps=1)  # however they are attached
    hot = (kept.y[0] - 0.2 / 5) / 0.8
    wrong = [i for i in range(4) if hot[i, Y[i]] < 0.999]
    torch.testing.assert_close(hot.sum(1), torch.ones(4))
    assert wrong and kept.y[0].min() == pytest.approx(0.04)


# ------------------------------------------------------------------------------------------------------- kinds of batches

Pair = namedtuple("Pair", "image label")


@dataclasses.dataclass(frozen=True)
class Sample:
    image: torch.Tensor
    label: torch.Tensor


def own_step(learn, batch):
    inputs, named, (y,) = learn.split(batch)
    return F.cross_entropy(next(iter(learn.player.modules.values()))(*inputs, *named.values()), y)


BATCHES = {
    "tuple": ((X[:4], Y[:4]), None), "list": ([X[:4], Y[:4]], None), "namedtuple": (Pair(X[:4], Y[:4]), None),
    "dict": ({"x": X[:4], "y": Y[:4]}, None), "own mapping": (UserDict(x=X[:4], y=Y[:4]), None),
    "dataclass": (Sample(X[:4], Y[:4]), lambda b: ((b.image,), {}, (b.label,))),
    "nested": ({"views": [X[:4], "left"], "meta": (3, {"label": Y[:4]})},
               lambda b: ((), {"input": b["views"][0]}, (b["meta"][1]["label"],))),
}  # fmt: skip


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = net()

    def forward(self, input):
        return self.inner(input)


@pytest.mark.parametrize("kind", BATCHES)
@pytest.mark.parametrize("make", [*MIXING, lambda **kw: LabelSmoothing(0.3, **kw), lambda **kw: LabelNoise(1.0, **kw)])
@pytest.mark.parametrize("own", [True, False])
def test_batches_of_every_kind_keep_their_kind(kind, make, own):
    batch, split = BATCHES[kind]
    x, y = X[:4].clone(), Y[:4].clone()
    batches, kept = [], Kept()
    model = Player("net", Net(), **({"step": own_step} if own else {"loss": "cross_entropy"}))
    note = On("before_turn", lambda learn: batches.append(learn.batch))
    learn = Learner(model, [batch], cbs=[make(num_classes=5), kept.cb, note], front="none", **({"split": split} if split else {}))
    learn.fit(steps=2)
    assert type(batches[0]) is type(batch) and not torch.equal(kept.y[0].float(), y.float())
    if kind == "nested":
        assert batches[0]["views"][1] == "left" and batches[0]["meta"][0] == 3
    parts = learn.split(batch)
    assert torch.equal([*parts[0], *parts[1].values()][0], x) and torch.equal(parts[2][0], y)


def test_what_a_split_function_makes_itself_is_refused():
    learn = learner(MixUp(), valid=False, split=lambda b: ((b[0] * 2,), {}, (b[1],)))
    with pytest.raises(TypeError, match=r"MixUp can't put Tensor \(4, 2, 6, 8\) float32 back into a batch that is list of 2"):
        learn.fit(steps=1)


def test_exchange_shares_what_it_need_not_change():
    inner, x = [1, "a", None], torch.ones(1)
    batch = (x, {"inner": inner, "x": x})
    made = exchange(batch, {id(x): "new"})
    assert made == ("new", {"inner": inner, "x": "new"}) and batch[1]["x"] is x
    assert exchange(5, {}) == 5 and exchange(Pair, {}) is Pair


@pytest.mark.parametrize("make", MIXING)
@pytest.mark.parametrize("x,received", [
    (torch.ones(4, 2, 6, 8, dtype=torch.long), r"received Tensor \(4, 2, 6, 8\) int64"), (["a"] * 4, "received list of 4"),
    (torch.tensor(1.0), r"received Tensor \(\) float32"),
])  # fmt: skip
def test_inputs_that_cannot_be_mixed_are_named(make, x, received):
    learn = Learner(net(), [(x, Y[:4])], "cross_entropy", cbs=make(), front="none")
    with pytest.raises(TypeError, match=f"(MixUp|CutMix) mixes inputs that are float tensors of one length; {received}"):
        learn.fit(steps=1)


@pytest.mark.parametrize("shapes", [[(4, 6)], [(4, 2, 6)], [(4, 2, 6, 8), (4, 2, 3, 8)], [(4, 2, 2, 6, 8)]])
def test_cutmix_takes_images_of_one_size(shapes):
    with pytest.raises(TypeError, match=r"CutMix cuts images \(n, channels, height, width\), of one size; received"):
        CutMix()._draw([torch.ones(shape) for shape in shapes])


def test_mixup_takes_batches_without_targets_and_inputs_of_several_kinds():
    seen = []

    def step(learn, batch):
        seen.append(batch)
        return learn.player.modules["net"](batch["a"]).square().mean()

    batch = {"a": X[:4], "b": torch.arange(4.0)}
    mixup = MixUp(1.0)
    Learner(Player("net", net(), step=step), [batch], cbs=mixup, front="none").fit(steps=1)
    share, others = mixup._share, mixup._others
    torch.testing.assert_close(seen[0]["b"], share * batch["b"] + (1 - share) * batch["b"][others])


@pytest.mark.parametrize("make", [*MIXING, lambda **kw: LabelSmoothing(0.3, **kw), lambda **kw: LabelNoise(1.0, **kw)])
def test_a_step_of_ones_own_is_not_passed_over_in_silence(make):
    learn = Learner(Player("net", net(), step=own_step), [(X[:4], Y[:4])], cbs=make(), front="none")
    with pytest.raises(ValueError, match="can't reach the targets of player 'net', whose step computes its losses itself: give"):
        learn.fit(steps=1)


# ------------------------------------------------------------------------------------------------------- targets


@pytest.mark.parametrize("amount", [0.0, 0.1, 0.7, 1.0])
@pytest.mark.parametrize("num_classes", [None, 5])
def test_smoothing_is_that_of_torchs_cross_entropy(amount, num_classes):
    a = learner(LabelSmoothing(amount, num_classes), valid=False)
    b = learner(loss=lambda pred, y: F.cross_entropy(pred, y, label_smoothing=amount), valid=False)
    a.fit(steps=8)
    b.fit(steps=8)
    torch.testing.assert_close(a.model[3].weight, b.model[3].weight)


def test_soft_and_binary_targets_are_smoothed():
    smooth = LabelSmoothing(0.2)
    torch.testing.assert_close(smooth.change(torch.tensor([[0.5, 0.5, 0.0, 0.0]]), 4), torch.tensor([[0.45, 0.45, 0.05, 0.05]]))
    for binary in (torch.tensor([0.0, 1.0]), torch.tensor([[0.0], [1.0]]), torch.tensor([False, True])):
        assert smooth.change(binary, None).flatten().tolist() == pytest.approx([0.1, 0.9])
    several = LabelSmoothing(0.2, num_classes=2)  # each of three labels may hold or not
    torch.testing.assert_close(several.change(torch.tensor([[1.0, 0, 1]]), 2), torch.tensor([[0.9, 0.1, 0.9]]))


def test_a_regressions_targets_are_not_smoothed():
    with pytest.raises(ValueError, match="smooths class numbers or probabilities; received float targets from"):
        learner(LabelSmoothing(0.1), y=torch.randn(22, 5), loss="mse").fit(steps=1)


@pytest.mark.parametrize("classes", [2, 5, 10])
@pytest.mark.parametrize("probability", [0.0, 0.3, 1.0])
def test_as_many_labels_are_wrong_as_was_said_and_all_others_are_as_likely(classes, probability):
    torch.manual_seed(0)
    clean = torch.arange(classes).repeat(20_000 // classes)
    noisy = LabelNoise(probability).change(clean, classes)
    n, wrong = len(clean), int((noisy != clean).sum())
    assert abs(wrong - n * probability) <= 4 * math.sqrt(n * probability * (1 - probability))
    assert 0 <= noisy.min() and noisy.max() < classes
    counts = torch.bincount(noisy[(clean == 1) & (noisy != 1)], minlength=classes).double()
    others, m = counts[torch.arange(classes) != 1], counts.sum()
    p = 1 / (classes - 1)
    assert counts[1] == 0 and (others - m * p).abs().max() <= 4.5 * math.sqrt(m * p * (1 - p)) + 1e-9


def test_ignored_labels_stay_ignored():
    assert LabelNoise(1.0).change(torch.full((50,), -100), 4).unique().tolist() == [-100]


@pytest.mark.parametrize("cb,y,message", [
    (LabelNoise(0.5), torch.rand(22, 5), "LabelNoise needs class numbers, of 2 classes at least; received Tensor"),
    (LabelSmoothing(0.5), Y + 5, "class numbers must be from 0 to 4; received some from"),
    (MixUp(), Y - 5, "class numbers must be from 0 to 4; received some from"),
])  # fmt: skip
def test_targets_that_make_no_sense_are_named(cb, y, message):
    with pytest.raises(ValueError, match=message):
        learner(cb, y=y).fit(steps=6)


def test_targets_must_be_there_and_be_tensors():
    with pytest.raises(ValueError, match=r"LabelSmoothing changes targets, and the batch \(Tensor .* float32\) has none"):
        Learner(net(), [X[:4]], lambda p: p.mean(), cbs=LabelSmoothing(), front="none").fit(steps=1)
    with pytest.raises(TypeError, match="LabelNoise changes targets that are a tensor; received dict of 1"):
        Learner(net(), [(X[:4], {"y": Y[:4]})], "mse", cbs=LabelNoise(), front="none").fit(steps=1)
    with pytest.raises(ValueError, match="can't be told from the prediction: give num_classes"):
        Learner(nn.Sequential(net(), nn.Flatten(0)), [(X[:4], Y[:4])], "mse", cbs=LabelSmoothing(), front="none").fit(steps=1)


# ------------------------------------------------------------------------------------------------------- all of them

ALL = {
    "mixup": lambda: MixUp(0.5), "mixup, batch": lambda: MixUp(0.5, num_classes=5), "cutmix": lambda: CutMix(probability=0.7),
    "smoothing": lambda: LabelSmoothing(0.2), "noise": lambda: LabelNoise(0.5), "noise, batch": lambda: LabelNoise(0.5, 5),
    "aux": lambda: AuxLoss(lambda learn: learn.pred.square().mean(), 0.3), "instance": lambda: InstanceNoise(0.3, player="model"),
}  # fmt: skip


@pytest.mark.parametrize("kind", ALL)
def test_left_and_resumed_it_goes_on_as_if_nothing_had_happened(kind, tmp_path):
    resumes(lambda run: learner(ALL[kind](), run=run), tmp_path, steps=9, at=(1, 5, 7))


@pytest.mark.parametrize("kind", ALL)
def test_it_changes_the_training_and_not_the_validation(kind):
    a, b = learner(ALL[kind]()), learner()
    assert a.validate() == b.validate()
    torch.manual_seed(0)
    a.fit(steps=4)
    torch.manual_seed(0)
    b.fit(steps=4)
    assert not torch.equal(a.model[1].weight, b.model[1].weight)
    b.model.load_state_dict(a.model.state_dict())
    assert a.validate() == b.validate() and torch.equal(a.predict(X), b.predict(X))


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("kind", ALL)
def test_nothing_is_left_behind(kind, ending):
    cb = ALL[kind]()
    before = cb.state_dict()
    learn = end_by(learner(cb), ending)
    assert cb.state_dict() == before
    assert not getattr(cb, "_waiting", False) and not any(m._forward_pre_hooks for m in learn.modules())
    learn.fit(steps=2)


def test_the_numbers_are_state_and_are_checked():
    cb = MixUp(0.2)
    cb.alpha = 0.7
    other = MixUp(0.2)
    other.load_state_dict(cb.state_dict())
    assert other.alpha == 0.7 and repr(other) == "MixUp(alpha=0.7, probability=1)"
    for bad in ({"alpha": 1.0}, {"alpha": -1.0, "probability": 0.5}, {"alpha": 1.0, "probability": 2.0}, {}):
        with pytest.raises(ValueError):
            other.load_state_dict(bad)
        assert other.state_dict() == cb.state_dict()


@pytest.mark.parametrize("make,message", [
    (lambda: MixUp(-0.1), "MixUp: alpha must be a finite number >= 0; received -0.1"),
    (lambda: MixUp("1"), "alpha must be a finite number >= 0; received '1'"),
    (lambda: CutMix(float("inf")), "CutMix: alpha must be a finite number >= 0; received inf"),
    (lambda: CutMix(True), "received True"),
    (lambda: MixUp(probability=1.5), "probability must be a finite number from 0 to 1; received 1.5"),
    (lambda: MixUp(num_classes=1), "num_classes must be a whole number >= 2; received 1"),
    (lambda: LabelNoise(num_classes=2.0), "num_classes must be a whole number >= 2; received 2.0"),
    (lambda: LabelNoise(float("nan")), "LabelNoise: probability must be a finite number from 0 to 1; received nan"),
    (lambda: LabelSmoothing(1.1), "LabelSmoothing: amount must be a finite number from 0 to 1; received 1.1"),
    (lambda: InstanceNoise(-1), "InstanceNoise: std must be a finite number >= 0; received -1"),
    (lambda: AuxLoss(len, weight=None), "AuxLoss: weight must be a finite number; received None"),
    (lambda: AuxLoss(len, name="loss"), "a term's name is a non-empty string without '/', other than 'loss'; received 'loss'"),
    (lambda: AuxLoss(len, name="a/b"), "received 'a/b'"),
    (lambda: learner([MixUp(), CutMix()]), "MixUp and CutMix can't work together"),
    (lambda: learner(AuxLoss(len, player="critic")).fit(steps=1), "there is no player 'critic'; there are: model"),
    (lambda: learner(InstanceNoise()).fit(steps=1), "there is no player 'discriminator'; there are: model"),
    (lambda: learner(InstanceNoise(player="model"), compile={"backend": "eager"}).fit(steps=1), "whose module is compiled"),
])  # fmt: skip
def test_bad_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("bad", [None, 3, nn.MSELoss])
def test_an_auxiliary_loss_is_a_function(bad):
    with pytest.raises(TypeError, match="AuxLoss takes a function learner -> scalar tensor; received"):
        AuxLoss(bad)


# ------------------------------------------------------------------------------------------------------- auxiliary losses


def penalty(learn):
    return sum(p.square().sum() for p in learn.player.parameters())


def test_an_auxiliary_loss_changes_the_weights_as_if_it_were_in_the_loss():
    """BasicTS's AddAuxiliaryLoss adds it to a local variable: with a thousand times the loss, the weights stay the same."""
    learn = learner(AuxLoss(penalty, 0.2), valid=False, lr=0.01)
    model = net()
    opt = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    for i in range(0, 22, 4):
        opt.zero_grad()
        (F.cross_entropy(model(X[i : i + 4]), Y[i : i + 4]) + 0.2 * sum(p.square().sum() for p in model.parameters())).backward()
        opt.step()
    learn.fit(epochs=1)
    for mine, theirs in zip(learn.model.parameters(), model.parameters()):
        torch.testing.assert_close(mine, theirs)
    thousand = learner(AuxLoss(penalty, 200.0), valid=False, lr=0.01)
    thousand.fit(steps=1)
    learn = learner(AuxLoss(penalty, 0.2), valid=False, lr=0.01)
    learn.fit(steps=1)
    assert not torch.equal(thousand.model[1].weight, learn.model[1].weight)


def test_it_is_on_record_as_a_term_and_in_the_sum():
    learn = learner([AuxLoss(penalty, 0.5, "norm"), AuxLoss(lambda learn: -learn.pred.mean(), -2.0, "mean")], valid=False)
    plain = learner(valid=False)
    plain.fit(steps=1)
    learn.fit(steps=1)
    last = learn.history.last
    total = plain.history.last("train/loss") + 0.5 * last("train/norm") - 2 * last("train/mean")
    assert last("train/loss") == pytest.approx(total, rel=1e-5)
    assert last("train/norm") == pytest.approx(sum(p.square().sum().item() for p in net().parameters()), rel=1e-5)


def test_with_accumulation_it_counts_as_in_the_large_batch():
    many = learner(AuxLoss(lambda learn: learn.pred.square().mean(), 2.0), valid=False, accumulate=3)
    many.fit(steps=3)
    whole = TensorDataset(X[:12], Y[:12])
    large = Learner(net(), DataLoader(whole, batch_size=12), "cross_entropy", OptimBuilder("sgd", lr=0.05, momentum=0.9),
                    cbs=AuxLoss(lambda learn: learn.pred.square().mean(), 2.0), front="none")  # fmt: skip
    large.fit(steps=1)
    torch.testing.assert_close(many.model[1].weight, large.model[1].weight)


@pytest.mark.parametrize("fn,message", [
    (lambda learn: 3.0, "auxiliary loss 'extra' must be a scalar tensor; received float"),
    (lambda learn: None, "must be a scalar tensor; received NoneType"),
    (lambda learn: learn.pred, r"must be a scalar tensor; received Tensor \(4, 5\) float32"),
    (lambda learn: learn.pred.mean().detach(), "does not depend on any trainable parameter of player 'model'"),
])  # fmt: skip
def test_what_is_no_loss_is_named_and_changes_nothing(fn, message):
    learn = learner(AuxLoss(fn, name="extra"))
    before = [p.clone() for p in learn.model.parameters()]
    with pytest.raises(ValueError, match=message):
        learn.fit(steps=1)
    assert all(torch.equal(p, q) for p, q in zip(learn.model.parameters(), before))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_an_auxiliary_loss_that_is_not_finite_is_left_to_the_guards(bad):
    learn = learner([SkipBadSteps(), AuxLoss(lambda learn: learn.pred.mean() * (bad if learn.step == 1 else 1.0))], valid=False)
    learn.fit(steps=4)
    assert learn.cbs.get(SkipBadSteps).skipped == {"model": 1} and learn.players[0].updates == 3
    assert all(p.isfinite().all() for p in learn.model.parameters())


def test_an_auxiliary_loss_reads_nothing_from_the_device(monkeypatch):
    reads, learn = [], learner(aux := AuxLoss(penalty), valid=False)
    learn.player, learn.loss, learn.losses = learn.players[0], penalty(SimpleNamespace(player=learn.players[0])), {}
    for name in ("tolist", "item", "__bool__", "__float__"):
        monkeypatch.setattr(torch.Tensor, name, lambda self, *args, name=name: reads.append(name))
    aux.after_loss(learn)
    assert reads == [] and "auxiliary" in learn.losses


def test_weights_of_auxiliary_losses_are_saved_by_term_and_player():
    saved = two_players([AuxLoss(penalty, 1.0, player="a"), AuxLoss(penalty, 2.0, player="b"), AuxLoss(penalty, 3.0, "more")])
    state = saved.state_dict()
    assert [*state["callbacks"]] == ["aux_loss a", "aux_loss b", "aux_loss more"]
    other = two_players([AuxLoss(penalty, 0.5, "more"), AuxLoss(penalty, 0.5, player="b"), AuxLoss(penalty, 0.5, player="a")])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the checkpoint's settings are used
        other.load_state_dict(state)
    assert [cb.weight for cb in other.cbs if isinstance(cb, AuxLoss)] == [3.0, 2.0, 1.0]


@pytest.mark.parametrize("make", [lambda: AuxLoss(len, player=3), lambda: InstanceNoise(player=None)])
def test_players_are_names(make):
    with pytest.raises(TypeError, match="player is the name of one"):
        make()


def test_a_name_that_is_taken_is_refused():
    for cbs in ([AuxLoss(penalty), AuxLoss(penalty)], [AuxLoss(penalty, name="ce")]):
        with pytest.raises(ValueError, match="player 'model' has a term '(auxiliary|ce)' already"):
            learner(cbs, loss={"ce": F.cross_entropy, "half": (F.cross_entropy, 0.5)}).fit(steps=1)


def two_players(cbs, run=None):
    torch.manual_seed(0)
    step = lambda learn, batch: F.cross_entropy(learn.player.modules[learn.player.name](batch[0]), batch[1])
    players = [Player(name, net(), step=step, opt=OptimBuilder("sgd", lr=0.1)) for name in ("a", "b")]
    return Learner(players, DataLoader(TensorDataset(X, Y), batch_size=4), cbs=cbs, run=run, front="none")


def test_with_several_players_it_is_one_players_or_everybodys():
    everybody, one = two_players(AuxLoss(penalty)), two_players(AuxLoss(penalty, player="b"))
    everybody.fit(steps=2)
    one.fit(steps=2)
    assert {"train/a/auxiliary", "train/b/auxiliary"} <= {*everybody.history.names()}
    assert "train/a/auxiliary" not in one.history.names() and "train/b/auxiliary" in one.history.names()
    a, b = (dict(learn.players[1].named_parameters()) for learn in (everybody, one))
    assert all(torch.equal(a[name], b[name]) for name in a)


# ------------------------------------------------------------------------------------------------------- GANs


class Judge(nn.Sequential):
    def __init__(self, saw):
        super().__init__(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1), nn.Flatten(0))
        self.saw = saw

    def forward(self, x):
        self.saw.append(x.detach().clone())
        return super().forward(x)


def gan(cbs=(), run=None, saw=None, n=8, **kw):
    torch.manual_seed(0)
    data, judge = DataLoader(torch.ones(4 * n, 3), batch_size=n), Judge([] if saw is None else saw)
    return GANLearner(nn.Linear(2, 3), judge, data, latent=2,
                      opt=OptimBuilder("sgd", lr=0.05), cbs=cbs, run=run, front="none", seed=1, **kw)  # fmt: skip


def test_the_discriminator_sees_noise_on_real_and_fake_in_both_turns():
    saw, fakes = [], []
    learn = gan(InstanceNoise(0.5), saw=saw, n=4000)
    learn.add(On("after_forward", lambda learn: fakes.append(learn.pred.fake.detach())))
    learn.fit(steps=1)
    real, fake, again = saw
    for noise in (real - 1, fake - fakes[0], again - fakes[1]):
        assert noise.mean().abs() < 0.03 and noise.std() == pytest.approx(0.5, abs=0.02)
        assert torch.corrcoef(noise.T).fill_diagonal_(0).abs().max() < 0.06
    assert abs(torch.corrcoef(torch.stack([(real - 1).flatten(), (fake - fakes[0]).flatten()]))[0, 1]) < 0.04
    saw.clear()
    learn.sample(4)
    learn.validate(torch.ones(8, 3))
    assert torch.equal(saw[0], torch.ones(8, 3))


def test_without_noise_it_changes_nothing():
    noisy = gan(InstanceNoise(0.0))
    noisy.fit(steps=4)
    plain = gan()
    plain.fit(steps=4)
    same_weights(noisy, plain)


@pytest.mark.parametrize("penalty", [R1(), GradientPenalty()])
def test_penalties_are_those_of_the_discriminator_with_its_noise(penalty):
    saw = []
    learn = gan(InstanceNoise(0.3), saw=saw, loss="wasserstein", penalties=penalty)
    learn.fit(steps=1)
    assert len(saw) == 4 and all(torch.isfinite(p).all() for p in learn.discriminator.parameters())
    assert len({str(x) for x in saw}) == 4


@pytest.mark.parametrize("cb", [lambda: InstanceNoise(0.3), lambda: AuxLoss(penalty, player="generator"), lambda: MixUp(1.0)])
def test_gans_resume_with_them(cb, tmp_path):
    resumes(lambda run: gan(cb(), run=run, n_critic=2), tmp_path, steps=6, at=(1, 4))


@pytest.mark.parametrize("ending", ENDINGS)
def test_no_hook_stays(ending):
    learn = end_by(gan(InstanceNoise(0.3)), ending)
    assert not any(module._forward_pre_hooks for module in learn.modules())
