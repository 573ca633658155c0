"Bounds on gradients and weights: against torch and closed forms, on the gradient that the optimizer really uses."

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from ways import ENDINGS, end_by, resumes, same_weights

from trainkit.callback import CancelStep, On
from trainkit.callbacks.clip import AdaptiveClip, AutoClip, ClampWeights, ClipGradNorm, ClipGradValue, adaptive_clip_, unit_norms
from trainkit.knobs import knob
from trainkit.learner import Learner
from trainkit.optim import OptimBuilder
from trainkit.player import Player

X = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
Y = 10 * X.sum(1, keepdim=True)


def net():
    return nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Dropout(0.1), nn.Linear(5, 1))


def line():
    torch.manual_seed(1)
    return nn.Linear(3, 1)


def learner(*cbs, model=None, loss="mse", opt=None, **kw):
    torch.manual_seed(0)
    dls = kw.pop("dls", DataLoader(TensorDataset(X, Y), batch_size=8, shuffle=True))
    opt = OptimBuilder("sgd", lr=0.01, momentum=0.9) if opt is None else opt
    return Learner(net() if model is None else model, dls, loss, opt, cbs=cbs, front="none", **kw)


def trained(*cbs, **kw):
    learn = learner(*cbs, **kw)
    learn.fit(epochs=1)
    return learn


def pair(*cbs, **kw):
    "Two players with gradients of very different lengths; the second moves in every other batch."
    def step(scale):
        return lambda learn, batch: scale * F.mse_loss(learn.player.modules[learn.player.name](batch[0]), batch[1])

    torch.manual_seed(0)
    opt = OptimBuilder("sgd", lr=0.01)
    players = [Player("a", net(), step=step(1.0), opt=opt), Player("b", net(), step=step(100.0), opt=opt, every=2)]
    return Learner(players, DataLoader(TensorDataset(X, Y), batch_size=8), front="none", cbs=cbs, **kw)


def grads(learn):
    return [p.grad.clone() for p in learn.player.parameters()]


class Grads(On):
    "The gradients the optimizer is going to use, behind all clipping."

    def __init__(self, order=80):
        self.seen = []
        super().__init__("before_step", lambda learn: self.seen.append(grads(learn)), order)


def weights(learn):
    return torch.cat([p.detach().flatten() for player in learn.players for p in player.parameters()])


MADE = {
    "norm": lambda: ClipGradNorm(0.5),
    "value": lambda: ClipGradValue(0.05),
    "adaptive": lambda: AdaptiveClip(0.05, skip=r"^4\."),
    "auto": lambda: AutoClip(30, window=4),
    "clamp": lambda: ClampWeights(0.1),
}

# ---------------------------------------------------------------------------------------------------------- by norm


def test_the_clip_reaches_the_step():
    "A1: elsewhere a clip of 1e-9 and one of 1e9 end in the same weights, since it comes behind the step."
    start = weights(learner())
    tight, loose, none = trained(ClipGradNorm(1e-9)), trained(ClipGradNorm(1e9)), trained()
    assert (weights(tight) - start).abs().max() < 1e-7
    assert torch.equal(weights(loose), weights(none))
    assert (weights(loose) - start).abs().max() > 0.01


@pytest.mark.parametrize("wrong", [0, 0.0, -1, None, math.nan, "1", True, -math.inf, 1j])
def test_no_clipping_is_no_callback(wrong):
    "A2: elsewhere max_norm=0 means no clipping, and fails at the first batch."
    with pytest.raises(ValueError, match="takes a number above 0; received"):
        ClipGradNorm(wrong)


@pytest.mark.parametrize("norm_type", [1.0, 2.0, 3.5, math.inf])
def test_against_torch(norm_type):
    raw, clipped = Grads(order=0), Grads()
    learn = learner(raw, ClipGradNorm(0.5, norm_type), clipped)
    learn.fit(epochs=1)
    steps, recorded = learn.history.scalars["train/grad_norm"]
    assert steps.tolist() == [1, 2, 3, 4, 5]
    for before, after, norm in zip(raw.seen, clipped.seen, recorded):
        twins = [nn.Parameter(torch.zeros_like(g)) for g in before]
        for twin, g in zip(twins, before):
            twin.grad = g.clone()
        assert norm == pytest.approx(nn.utils.clip_grad_norm_(twins, 0.5, norm_type).item(), rel=1e-6)
        assert all(torch.equal(a, twin.grad) for a, twin in zip(after, twins))


def test_infinity_records_and_changes_nothing():
    plain, recording = trained(), trained(ClipGradNorm(math.inf))
    same_weights(plain, recording)
    assert len(recording.history.scalars["train/grad_norm"][0]) == 5


def test_infinity_spreads_no_nan():
    "torch's own clip_grad_norm_(max_norm=inf) makes NaN of every gradient when one is infinite."
    clipped = Grads()
    poison = On("after_backward", lambda learn: learn.model[0].bias.grad.fill_(math.inf))
    learner(ClipGradNorm(math.inf), poison, clipped, On("before_step", skip, order=90)).fit(steps=1)
    assert clipped.seen[0][0].isfinite().all()


def skip(learn):
    raise CancelStep


def test_the_mean_gradient_is_clipped():
    "With accumulation: once per step, on the mean over the window, also on what is left over at the epoch's end."
    seen, large = Grads(), Grads()
    small = learner(ClipGradNorm(0.5), seen, accumulate=2, model=line(), dls=DataLoader(TensorDataset(X, Y), 8))
    small.fit(epochs=1)
    assert len(small.history.scalars["train/grad_norm"][0]) == len(seen.seen) == 3
    norms = [torch.cat([g.flatten() for g in gs]).norm() for gs in seen.seen]
    assert all(norm == pytest.approx(0.5, rel=1e-4) for norm in norms)
    whole = learner(ClipGradNorm(0.5), large, model=line(), dls=DataLoader(TensorDataset(X, Y), 16))
    whole.fit(epochs=1)
    torch.testing.assert_close(weights(small), weights(whole))
    assert small.history.scalars["train/grad_norm"][1] == pytest.approx(whole.history.scalars["train/grad_norm"][1], rel=1e-5)


def test_gradients_are_unscaled_first():
    "In fp16 the norm on record is that of the true gradient, not 65536 times it."
    def small(pred, target):
        return 1e-3 * F.mse_loss(pred, target)

    half = trained(ClipGradNorm(0.01), seen := Grads(), model=line(), loss=small, precision="fp16")
    full = trained(ClipGradNorm(0.01), model=line(), loss=small)
    norms, expected = (learn.history.scalars["train/grad_norm"][1] for learn in (half, full))
    assert expected.min() > 0.01 and norms == pytest.approx(expected, rel=0.02)
    for gs in seen.seen:
        assert torch.cat([g.flatten() for g in gs]).norm() == pytest.approx(0.01, rel=1e-4)
    torch.testing.assert_close(weights(half), weights(full), rtol=0.01, atol=1e-4)


def test_fp16_and_an_error_for_infinite_norms():
    learn = learner(ClipGradNorm(1.0, error_if_nonfinite=True), precision="fp16")
    with pytest.raises(ValueError, match="error_if_nonfinite=True and fp16"):
        learn.fit(steps=1)


def test_error_if_nonfinite():
    def poisoned(*cbs):
        return learner(*cbs, On("after_backward", lambda learn: learn.model[0].bias.grad.fill_(math.nan)))

    with pytest.raises(RuntimeError, match="non-finite"):
        poisoned(ClipGradNorm(1.0, error_if_nonfinite=True)).fit(steps=1)
    learn = poisoned(ClipGradNorm(1.0))
    learn.fit(steps=1)
    assert math.isnan(learn.history.last("train/grad_norm"))


def test_each_player_by_itself():
    norms = {"a": [], "b": []}
    note = On("before_step", lambda learn: norms[learn.player.name].append(nn.utils.get_total_norm(grads(learn))), 80)
    learn = pair(ClipGradNorm(0.3, player="a"), ClipGradNorm(7.0, player="b"), note)
    learn.fit(epochs=2)
    assert max(norms["a"]) == pytest.approx(0.3, rel=1e-4) and max(norms["b"]) == pytest.approx(7.0, rel=1e-4)
    scalars = learn.history.scalars
    assert scalars["train/a/grad_norm"][0].tolist() == [*range(1, 11)]
    assert scalars["train/b/grad_norm"][0].tolist() == [2, 4, 6, 8, 10]


def test_one_player_only():
    learn = pair(ClipGradNorm(0.3, player="a"))
    learn.fit(steps=2)
    assert not any(name.startswith("train/b/grad_norm") for name in learn.history.names())


@pytest.mark.parametrize("cb", [lambda: ClipGradNorm(1, player="c"), lambda: ClipGradValue(1, player="c"),
                                lambda: AdaptiveClip(player="c"), lambda: ClampWeights(1, player="c")])  # fmt: skip
def test_unknown_players(cb):
    learn = pair(cb())
    with pytest.raises(ValueError, match="no player 'c'; there are: a, b"):
        learn.fit(epochs=1)
    assert learn.step == 0


@pytest.mark.parametrize("one, other", [
    (ClipGradNorm(1), ClipGradNorm(2, player="b")), (ClipGradNorm(1), AutoClip()), (AutoClip(player="b"), ClipGradNorm(1)),
    (ClipGradValue(1), ClipGradValue(2)), (AdaptiveClip(), AdaptiveClip(0.1, player="b"))])  # fmt: skip
def test_two_of_a_kind_on_one_player(one, other):
    with pytest.raises(ValueError, match="both act on player '[ab]'"):
        pair(one, other).fit(epochs=1)


def test_a_moved_bound_is_checked_and_kept(tmp_path):
    learn = learner(cb := ClipGradNorm(1.0), run=tmp_path / "r")
    learn.fit(steps=2)
    knob(learn, "clip_grad_norm.max_norm").write([0.25])
    with pytest.raises(ValueError, match="max_norm takes a number above 0; received 0"):
        cb.max_norm = 0.0
    learn.save()
    other = learner(ClipGradNorm(1.0), run=tmp_path / "r")
    other.restore("last")
    assert other.cbs.get(ClipGradNorm).max_norm == cb.max_norm == 0.25


# --------------------------------------------------------------------------------------------------------- by value


def test_value_against_torch():
    raw, clipped = Grads(order=0), Grads()
    learner(raw, ClipGradValue(0.05), clipped).fit(epochs=1)
    for before, after in zip(raw.seen, clipped.seen):
        assert any((g.abs() > 0.05).any() for g in before)
        assert all(torch.equal(a, b.clamp(-0.05, 0.05)) for a, b in zip(after, before))


# --------------------------------------------------------------------------------------------------------- adaptive


def agc(w, g, factor=0.01, eps=1e-3):
    "Brock et al. 2021, eq. 3, unit by unit as it is written there; units along the first dimension."
    if w.ndim <= 1:
        rows, weights_ = [g], [w]
    else:
        rows, weights_ = list(g), list(w)
    out = []
    for row, unit in zip(rows, weights_):
        norm, bound = row.double().norm(), max(unit.double().norm(), eps)
        out.append(row * (factor * bound / norm) if norm / bound > factor else row)
    return out[0] if w.ndim <= 1 else torch.stack(out).to(g.dtype)


@pytest.mark.parametrize("shape", [(), (7,), (4, 6), (1, 6), (6, 1), (3, 4, 5), (4, 3, 2, 2), (2, 3, 2, 2, 2)])
def test_agc_by_hand(shape):
    torch.manual_seed(0)
    w = torch.randn(shape, requires_grad=True)
    w.grad = torch.randn(shape) * torch.rand(shape[:1] + (1,) * (len(shape) - 1) if shape else ()) * 0.05
    if w.ndim > 1:
        w.data[0] = 0  # eps counts here
        w.grad[-1] = 1e-7  # not clipped
    expected = agc(w.detach(), w.grad)
    clipped = adaptive_clip_(w)
    torch.testing.assert_close(w.grad, expected.to(w.grad.dtype), rtol=1e-5, atol=1e-9)
    if w.ndim > 1:
        assert clipped.shape == (len(w),) + (1,) * (w.ndim - 1) and not clipped[-1].any()


def test_agc_in_a_run():
    raw, clipped, before = Grads(order=0), Grads(), []
    note = On("before_step", lambda learn: before.append([p.detach().clone() for p in learn.player.parameters()]))
    learn = learner(raw, note, AdaptiveClip(0.02, skip=r"^4\."), clipped)
    learn.fit(epochs=1)
    names = [name for name, _ in learn.players[0].named_parameters()]
    for ws, gs, after in zip(before, raw.seen, clipped.seen):
        for name, w, g, a in zip(names, ws, gs, after):
            torch.testing.assert_close(a, g if name.startswith("4.") else agc(w, g, 0.02), rtol=1e-5, atol=1e-9)
    share = learn.history.scalars["train/clipped"][1]
    assert ((0 < share) & (share <= 1)).all()


def test_agc_knows_where_a_transposed_convolution_has_its_outputs():
    model = nn.Sequential(nn.ConvTranspose2d(2, 3, 2), nn.ConvTranspose2d(3, 4, 1, groups=1), nn.Flatten(), nn.LazyLinear(1))
    x, y = torch.randn(8, 2, 4, 4), torch.randn(8, 1)
    model(x)
    seen = []

    def note(learn):
        seen.append((learn.model[0].weight.detach().clone(), learn.model[0].weight.grad.clone()))

    learner(AdaptiveClip(1e-4), On("before_step", note, 80), model=model, dls=[(x, y)]).fit(steps=1)
    weight, grad = seen[0]
    assert (unit_norms(grad, 1) <= 1e-4 * unit_norms(weight, 1) * (1 + 1e-5)).all()
    assert unit_norms(grad, 1).shape == (1, 3, 1, 1)


@pytest.mark.parametrize("make, message", [
    (lambda: AdaptiveClip(0), "clip_factor.* above 0; received 0"), (lambda: AdaptiveClip(eps=-1), "eps.*received -1"),
    (lambda: AdaptiveClip(math.inf), "received inf"), (lambda: AdaptiveClip(skip="("), "regular expression; received '\\('"),
    (lambda: AutoClip(-1), "from 0 to 100; received -1"), (lambda: AutoClip(100.5), "received 100.5"),
    (lambda: AutoClip(window=0), ">= 1; received 0"), (lambda: AutoClip(window=2.0), "received 2.0"),
    (lambda: ClipGradNorm(1, 0), "norm_type.*received 0"), (lambda: ClipGradValue(0), "received 0"),
    (lambda: ClipGradValue(math.inf), "received inf"), (lambda: ClampWeights(0), "above 0; received 0"),
    (lambda: ClampWeights((1, -1)), "low < high; received \\(1, -1\\)"), (lambda: ClampWeights((1,)), "received \\(1,\\)"),
    (lambda: ClampWeights((math.nan, 1)), "low < high"), (lambda: ClampWeights(("a", 1)), "received \\('a', 1\\)")])  # fmt: skip
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("cls, args", [(ClipGradNorm, (1,)), (ClipGradValue, (1,)), (AdaptiveClip, ()), (AutoClip, ()),
                                       (ClampWeights, (1,))])  # fmt: skip
def test_a_player_is_a_name(cls, args):
    with pytest.raises(TypeError, match="takes True or False; received 'no'"):
        ClipGradNorm(1.0, error_if_nonfinite="no")
    with pytest.raises(TypeError, match="takes the name of a player, or None for all; received 3"):
        cls(*args, player=3)


@pytest.mark.parametrize("cb", [lambda: AdaptiveClip(skip="head"), lambda: ClampWeights(1, params="head")])
def test_names_that_match_nothing(cb):
    learn = learner(cb())
    with pytest.raises(ValueError, match="='head' matches no parameter; there are: 0.weight, 0.bias"):
        learn.fit(epochs=1)
    with pytest.raises(TypeError, match="regular expression on the names"):
        AdaptiveClip(skip=3)


# ------------------------------------------------------------------------------------------------- by the norms so far


@pytest.mark.parametrize("window", [3, 100])
def test_auto_clip_by_hand(window):
    raw, clipped = Grads(order=0), Grads()
    learn = learner(raw, AutoClip(25, window=window), clipped)
    learn.fit(epochs=2)
    norms = []
    for before, after in zip(raw.seen, clipped.seen):
        flat = torch.cat([g.flatten() for g in before]).double()
        norms.append(flat.norm().item())
        bound = torch.tensor(norms[-window:], dtype=torch.float64).quantile(0.25).item()
        expected = flat * min(1.0, bound / norms[-1])
        torch.testing.assert_close(torch.cat([g.flatten() for g in after]).double(), expected, rtol=1e-5, atol=1e-7)
    assert learn.history.scalars["train/grad_norm"][1] == pytest.approx(norms, rel=1e-5)


def test_auto_clip_outlives_bad_and_vanishing_gradients():
    values = iter([0.0, math.nan, 1.0, math.inf, 2.0])
    fill = On("after_backward", lambda learn: [p.grad.fill_(value) for value in [next(values)] for p in learn.model.parameters()])
    seen = Grads()
    learn = learner(fill, cb := AutoClip(50), seen, On("before_step", skip, order=90))
    learn.fit(epochs=1)
    assert all((g == 0).all() for g in seen.seen[0])  # not 0 / 0
    assert seen.seen[4][0].isfinite().all()
    assert cb.state_dict()["norms"]["model"].isnan().tolist() == [False, True, False, True, False]


def test_auto_clip_refuses_another_window():
    learn = learner(cb := AutoClip(window=3))
    learn.fit(epochs=1)
    with pytest.raises(ValueError, match="AutoClip\\(window=4\\): the saved one kept 3 norms"):
        AutoClip(window=4).load_state_dict(cb.state_dict())


# ---------------------------------------------------------------------------------------------------------- weights


def test_weights_are_within_bounds_after_the_step():
    "T16: elsewhere the clamp comes before the step, and leaves up to 0.0121 behind a step with a clip of 0.01."
    largest = []
    note = On("after_step", lambda learn: largest.append(max(p.abs().max().item() for p in learn.player.parameters())), 80)
    learn = learner(ClampWeights(0.01), note)
    learn.fit(epochs=2)
    assert len(largest) == 10 and max(largest) <= 0.01
    assert weights(learn).abs().max() <= 0.01 and (weights(learn).abs() == torch.tensor(0.01)).any()


def test_clamp_of_a_player_and_a_part():
    learn = pair(ClampWeights((-0.01, 0.02), player="b", params=r"^0\."))
    learn.players[1].modules["b"][0].bias.requires_grad_(False)
    with torch.no_grad():
        learn.players[1].modules["b"][0].bias.fill_(3)  # frozen: its owner's business
    learn.fit(epochs=1)
    a, b = (player.modules[player.name] for player in learn.players)
    assert -0.01 <= b[0].weight.min() and b[0].weight.max() <= 0.02 and (b[0].bias == 3).all()
    assert b[4].weight.abs().max() > 0.02 and a[0].weight.abs().max() > 0.02


def test_no_step_no_clamp():
    learn = learner(ClampWeights(0.01), On("before_step", skip))
    start = weights(learn)
    learn.fit(epochs=1)
    assert torch.equal(weights(learn), start)


# ------------------------------------------------------------------------------------------- endings, resumption, words


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("made", MADE)
def test_every_ending(made, ending):
    dls = [DataLoader(TensorDataset(X, Y), 8), DataLoader(TensorDataset(X, Y), 8)]
    learn = end_by(learner(MADE[made](), dls=dls), ending)
    assert all(p.grad is None for p in learn.model.parameters())
    assert not any(m._forward_hooks or m._backward_hooks for m in learn.model.modules())
    learn.fit(epochs=1)
    assert learn.state == "finished"


@pytest.mark.parametrize("made", MADE)
def test_resumes(made, tmp_path):
    def make(run):
        return learner(MADE[made](), run=run)

    resumes(make, tmp_path)


def test_reprs_say_what_was_asked_for():
    said = {
        "ClipGradNorm(1)": ClipGradNorm(1),
        "ClipGradNorm(inf, norm_type=1, player='a')": ClipGradNorm(math.inf, 1, player="a"),
        "ClipGradValue(0.5)": ClipGradValue(0.5),
        "AdaptiveClip(0.01, skip='4')": AdaptiveClip(skip="4"),
        "AutoClip(10)": AutoClip(),
        "ClampWeights(0.01)": ClampWeights(0.01),
        "ClampWeights((0, 1), params='w')": ClampWeights((0, 1), params="w"),
    }
    assert [*said] == [*map(repr, said.values())]


@pytest.mark.parametrize("make", [lambda: ClipGradNorm(math.inf), lambda: ClipGradValue(1.0), AdaptiveClip, AutoClip,
                                  lambda: ClampWeights(1.0)])  # fmt: skip
def test_a_fresh_state_can_be_loaded(make):
    cb = make()
    cb.load_state_dict(cb.state_dict())
    assert cb.state_dict() == make().state_dict()
