"The learning rate finder: what it reads from a curve, that it is right where the answer is known, and that it leaves no trace."

import copy
import os
import signal
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from ways import ENDINGS, Ending, same

from trainkit.callback import Callback, CancelStep, On
from trainkit.callbacks.average import EMA
from trainkit.callbacks.clip import ClipGradNorm
from trainkit.callbacks.scheduled import Scheduled
from trainkit.finder import late_interrupt, lr_find
from trainkit.gan.learner import GANLearner
from trainkit.knobs import knob
from trainkit.learner import Learner
from trainkit.lr_curve import LRFind, find_descent, ladder, suggest
from trainkit.optim import OptimBuilder
from trainkit.ui.plots import Curves
from trainkit.ui.progress import Progress

X = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
Y = X.sum(1, keepdim=True) + 0.1 * torch.randn(40, 1, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    "Dropout, batch norm, a buffer that no state holds, and a bias its owner froze."

    def __init__(self):
        super().__init__()
        self.norm, self.drop, self.out = nn.BatchNorm1d(3), nn.Dropout(0.2), nn.Linear(3, 1)
        self.out.bias.requires_grad_(False)
        self.register_buffer("calls", torch.zeros(()), persistent=False)

    def forward(self, x):
        if self.training:
            self.calls += 1
        return self.out(self.drop(self.norm(x)))


class Endless(IterableDataset):
    def __iter__(self):
        for i in torch.randperm(40).tolist():
            yield X[i], Y[i]


def shuffled(**kw):
    return DataLoader(TensorDataset(X, Y), batch_size=8, shuffle=True, **kw)


def supervised(dls=None, **kw):
    torch.manual_seed(0)
    kw = {"opt": OptimBuilder("adamw", lr=0.01, schedule="cosine", warmup=0.2), "front": "none"} | kw
    return Learner(Net(), shuffled() if dls is None else dls, "mse", **kw)


def own_generator(**kw):
    return supervised(shuffled(generator=torch.Generator().manual_seed(5)), **kw)


def endless(**kw):
    return supervised(DataLoader(Endless(), batch_size=8), **kw)


def accumulating(**kw):
    return supervised(accumulate=3, **kw)


def averaged(**kw):
    return supervised(cbs=[EMA(decay=0.9), ClipGradNorm(1.0)], **kw)


def grouped(**kw):
    return supervised(opt=OptimBuilder("sgd", lr=0.1, momentum=0.9, schedule="linear", params={"norm": {"lr": 0.01}}), **kw)


def validated(**kw):
    return supervised((shuffled(), DataLoader(TensorDataset(X, Y), batch_size=20)), metrics=["mae"], **kw)


def gan(**kw):
    torch.manual_seed(0)
    g = nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    d = nn.Sequential(nn.Linear(3, 8), nn.LeakyReLU(0.2), nn.Dropout(0.1), nn.Linear(8, 1), nn.Flatten(0))
    kw = {"opt": OptimBuilder("adam", lr=1e-3, schedule="linear"), "latent": 2, "front": "none", "n_critic": 2} | kw
    return GANLearner(g, d, DataLoader(TensorDataset(X), batch_size=8, shuffle=True), **kw)


MAKERS = [supervised, own_generator, endless, accumulating, averaged, grouped, validated, gan]


def find(learn, **kw):
    player = "generator" if len(learn.players) > 1 else None
    return lr_find(learn, player, **({"start": 1e-4, "end": 1.0, "steps": 13, "plot": False} | kw))


def everything(learn):
    "The state, and what no state holds."
    loose = {name: buffer.clone() for p in learn.players for m in p.modules.values() for name, buffer in m.named_buffers()}
    frozen = [p.requires_grad for player in learn.players for p in player.parameters()]
    modes = [m.training for m in learn.modules()]
    attributes = {k: v for k, v in vars(learn).items() if type(v) in (int, str, bool, list, dict) and k != "_on"}
    where = {k: getattr(learn, k) for k in ("state", "error", "run", "fit_start", "fit_steps", "_fitting", "_stopping")}
    rates = [[{k: v for k, v in g.items() if k != "params"} for g in p.opt.param_groups] for p in learn.players]
    return copy.deepcopy({"state": learn.state_dict(), "loose": loose, "frozen": frozen, "modes": modes, "where": where,
                          "rates": rates, "names": sorted(attributes), "cbs": [repr(cb) for cb in learn.cbs]})  # fmt: skip


# ------------------------------------------------------------------------------------------------------ it leaves no trace


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("before", [0, 3, 5, 7])  # an epoch has 5 batches
def test_everything_is_as_before_and_goes_on_as_without(make, before):
    straight, learn = make(), make()
    for each in (straight, learn):
        torch.manual_seed(1)
        if before:
            each.fit(steps=before)
    torch.manual_seed(before)
    numbers = torch.rand(2)
    for each in (straight, learn):
        torch.manual_seed(before)
        if each is learn:
            was = everything(learn)
            found = find(learn)
            assert len(found.losses) > 4
            same(everything(learn), was)
        assert torch.equal(torch.rand(2), numbers)
        torch.manual_seed(before + 1)
        each.fit(steps=8, schedule="stretch")
    same(everything(straight)["state"]["players"], everything(learn)["state"]["players"])
    for part in ("callbacks", "stream", "position", "rng"):
        same(straight.state_dict()[part], learn.state_dict()[part], part)
    for name, (steps, values) in straight.history.scalars.items():
        same(torch.tensor(values), torch.tensor(learn.history.scalars[name][1]), name)


@pytest.mark.parametrize("make", [supervised, accumulating, averaged, validated, gan])
@pytest.mark.parametrize("ending", ENDINGS)
def test_everything_is_as_before_however_the_trial_ends(make, ending):
    learn = make()
    learn.fit(steps=4)
    learn.add(Ending(ending, at=7))
    was = everything(learn)
    interrupted = False
    try:
        find(learn)
    except (KeyboardInterrupt, RuntimeError) as error:
        interrupted = isinstance(error, KeyboardInterrupt)
        assert interrupted or ending == "error"
    assert interrupted == ending.startswith("interrupt")
    same(everything(learn), was)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_stopping_gives_what_was_measured(monkeypatch):
    learn = supervised()
    learn.add(On("after_batch", lambda learn: learn.stop() if learn.step == 9 else None))
    found = find(learn)
    assert found.ended == "stopped" and len(found.losses) == 8 and "it was stopped" in str(found)
    monkeypatch.setenv("TRAINKIT_WHERE", "notebook")  # where fit gives the cell back
    learn = supervised(cbs=On("after_batch", lambda learn: os.kill(os.getpid(), signal.SIGINT) if learn.step == 9 else None))
    assert find(learn).ended == "interrupted"
    assert learn.state == "idle"


def test_an_interrupt_of_the_restoration_waits():
    done = []
    with pytest.raises(KeyboardInterrupt), late_interrupt():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        done.append(True)
    assert done
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_error_before_the_first_step():
    learn = Learner(Net(), None, "mse", front="none")
    was = everything(learn)
    with pytest.raises(ValueError, match="nothing to train on"):
        lr_find(learn)
    same(everything(learn), was)


@pytest.mark.parametrize("after", [0, 3])
def test_nothing_is_written(tmp_path, after):
    def files():
        return {p.relative_to(tmp_path): p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}

    learn = supervised(run=tmp_path / "run", save_every=1)
    if after:
        learn.fit(steps=after)
    before = files()
    find(learn)
    assert files() == before and bool(before) == bool(after)
    learn.fit(steps=1, schedule="hold")
    if after:
        assert [entry.step for entry in learn.checkpoints][-1] == after + 1 and not list(tmp_path.glob("run.*"))


def test_another_run_in_the_folder_stays(tmp_path):
    supervised(run=tmp_path / "run").fit(steps=2)
    before = sorted(tmp_path.rglob("*"))
    find(supervised(run=tmp_path / "run"))
    assert sorted(tmp_path.rglob("*")) == before


def test_restored_learners(tmp_path):
    first = validated(run=tmp_path / "run", save_every=1)
    first.fit(steps=7)
    entry = first.save(pin=True)
    one, two = (validated(run=tmp_path / "run") for _ in range(2))
    one.restore(entry)
    find(one)
    one.fit(steps=6, schedule="stretch")
    two.restore(entry)
    two.fit(steps=6, schedule="stretch")
    same(one.state_dict()["players"], two.state_dict()["players"])


def test_workers():
    learn, other = (supervised(shuffled(num_workers=1)) for _ in range(2))
    for each in (learn, other):
        torch.manual_seed(3)
        each.fit(steps=2)
        if each is learn:
            find(each)
        each.fit(steps=2, schedule="stretch")
    same(learn.state_dict()["players"], other.state_dict()["players"])


def test_a_rate_set_by_hand_stays():
    learn = grouped()
    learn.fit(steps=3)
    for player, lr in zip(learn.players[0].opt.param_groups, (0.123, 0.456)):
        player["lr"] = lr
    find(learn)
    assert [group["lr"] for group in learn.players[0].opt.param_groups] == [0.123, 0.456]


def test_an_override_stays():
    learn = supervised()
    learn.players[0].schedule.override(value=0.07)
    find(learn)
    assert learn.players[0].schedule.overridden == {"value": 0.07} and learn.players[0].schedule.lr == [0.07]


# ------------------------------------------------------------------------------------------------------------- callbacks


class Remembers(Callback):
    "Has no state before its first fit."

    def __init__(self):
        self.seen, self.shadow = [], {}

    def after_batch(self, learn):
        self.seen.append(learn.step)
        self.shadow["step"] = learn.step

    def state_dict(self):
        return dict(self.shadow)


class Silent(Remembers):
    probing = False


def test_callbacks_take_part_as_copies_and_remember_nothing():
    steps = []
    learn = supervised(cbs=[one := Remembers(), two := Silent(), On("after_step", lambda learn: steps.append(learn.step))])
    find(learn)
    assert one.seen == two.seen == [] and one.state_dict() == {}
    assert len(steps) == 13  # what a function does outside of its callback is its own affair
    assert learn.cbs.get(Remembers) is one
    learn.fit(steps=2)
    assert one.seen == two.seen == [1, 2]


def test_a_callback_that_cannot_be_copied_is_left_out():
    class Writes(Remembers):
        def __init__(self):
            super().__init__()
            self.file = open(os.devnull, "w")  # noqa: SIM115

    learn = supervised(cbs=[cb := Writes()])
    with pytest.warns(UserWarning, match="can't be copied"):
        find(learn)
    assert cb.seen == []


def test_views_and_fronts_do_not_appear():
    learn = supervised(front="no.such:front", cbs=[bar := Progress(), curves := Curves()])
    assert not bar.probing and not curves.probing
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        find(learn)
    with pytest.warns(UserWarning, match="nothing shows this run"):
        learn.fit(steps=1)


class Thing:
    margin = 2.0


@pytest.mark.parametrize("begun", [0, 3])
@pytest.mark.parametrize("what", ["weight_decay", "weights.loss", "clip_grad_norm.max_norm", "own"])
def test_scheduled_numbers(what, begun):
    thing = Thing()
    cb = Scheduled((thing, "margin") if what == "own" else what, "linear", to=0.1, total=20)
    learn = supervised(opt=OptimBuilder("adamw", lr=0.01), cbs=[ClipGradNorm(1.0), cb])
    if begun:
        learn.fit(steps=begun)
    was, before = everything(learn), knob(learn, what).read() if what != "own" else thing.margin
    weights = learn.players[0].weights
    find(learn)
    same(everything(learn), was)
    assert before == (knob(learn, what).read() if what != "own" else thing.margin)
    assert learn.players[0].weights is weights and (cb.schedule is None) == (not begun)
    learn.fit(steps=2)
    assert cb.schedule.update == begun + 2


@pytest.mark.parametrize("plan", ["plateau", "OneCycleLR", "cosine"])
def test_any_schedule_is_set_aside(plan):
    how = {"plateau": {"monitor": "valid/loss"}, "OneCycleLR": {"max_lr": 0.1}}.get(plan, {})
    learn = validated(opt=OptimBuilder("sgd", lr=0.02, momentum=0.9, schedule={"name": plan, **how}))
    learn.fit(epochs=2)
    was = everything(learn)
    found = find(learn)
    same(everything(learn), was)
    np.testing.assert_allclose(found.lrs, ladder(1e-4, 1.0, 13)[: len(found.lrs)])


def test_clipping_counts():
    "What callbacks do to the gradients is part of the answer."
    assert find(bowl([2.0], opt="sgd"), steps=40).suggestion.lr is not None
    clipped = find(bowl([2.0], opt="sgd", cbs=[ClipGradNorm(1e-9)]), steps=40)
    assert clipped.suggestion.lr is None and "no descent" in str(clipped)


def test_a_skipped_step_repeats_its_rate():
    class Skips(Callback):
        def __init__(self):
            self.rates = []

        def before_step(self, learn):
            seen.append(learn.player.opt.param_groups[0]["lr"])
            if len(seen) in (4, 5):
                raise CancelStep

    seen = []
    found = find(supervised(cbs=[Skips()]))
    assert len(found.losses) == 13
    rates = ladder(1e-4, 1.0, 13)
    np.testing.assert_allclose(seen[:7], [*rates[:4], rates[3], rates[3], rates[4]])


# ---------------------------------------------------------------------------------------------- where the answer is known


class Bowl(nn.Module):
    def __init__(self, curvature):
        super().__init__()
        self.curvature, self.at = torch.tensor(curvature), nn.Parameter(torch.ones(len(curvature)))

    def forward(self, x):
        return (0.5 * self.curvature * self.at**2).sum() + 0 * x.sum()


def bowl(curvature, **kw):
    dls = DataLoader(TensorDataset(torch.ones(4, 1), torch.ones(4, 1)), batch_size=4)
    return Learner(Bowl(curvature), dls, lambda pred, y: pred, front="none", **kw)


@pytest.mark.parametrize("curvature", [[1.0], [0.01, 0.1], [1.0, 5.0, 50.0], [300.0]])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_quadratics(curvature, momentum):
    "Gradient descent diverges beyond 2 (1 + momentum) / curvature (Polyak 1964)."
    edge = 2 * (1 + momentum) / max(curvature)
    found = lr_find(bowl(curvature, opt=OptimBuilder("sgd", lr=1.0, momentum=momentum)), start=edge * 1e-5, end=edge * 1e3,
                    steps=200, plot=False)  # fmt: skip
    assert found.ended == "diverged"
    assert found.suggestion.lr < edge < found.diverged_at
    assert found.suggestion.steepest <= found.suggestion.minimum and found.suggestion.tenth < edge
    assert found.initial == pytest.approx(sum(curvature) / 2)


def test_the_losses_follow_their_rates():
    "Each loss is the one right after the step with its rate, by hand."
    found = lr_find(bowl([2.0], opt="sgd"), start=1e-3, end=0.5, steps=20, plot=False)
    at = np.cumprod(1 - 2 * found.lrs)
    np.testing.assert_allclose(found.losses, at**2, rtol=1e-4)


def test_accumulation_means_over_the_window():
    whole = lr_find(supervised(DataLoader(TensorDataset(X[:32], Y[:32]), batch_size=32), opt="sgd"), start=1e-3, steps=12,
                    end=1.0, plot=False)  # fmt: skip
    assert len(whole.losses) == 12
    learn = bowl([2.0], opt="sgd", accumulate=4)
    found = lr_find(learn, start=1e-3, end=0.5, steps=20, plot=False)
    np.testing.assert_allclose(found.losses, np.cumprod(1 - 2 * found.lrs) ** 2, rtol=1e-4)


def test_groups_keep_their_ratios():
    seen = []
    learn = grouped(cbs=On("after_step", lambda learn: seen.append([g["lr"] for g in learn.player.opt.param_groups])))
    find(learn, end=1e-2)
    rates = ladder(1e-4, 1e-2, 13)
    np.testing.assert_allclose(sorted(np.array(seen).T.tolist()), [rates / 10, rates])


def test_regression():
    data = torch.randn(512, 8, generator=torch.Generator().manual_seed(2))
    target = data @ torch.arange(1.0, 9)[:, None]
    edge = 2 / torch.linalg.eigvalsh(2 * data.T @ data / 512).max().item()
    torch.manual_seed(0)
    loader = DataLoader(TensorDataset(data, target), batch_size=128, shuffle=True)
    learn = Learner(nn.Linear(8, 1), loader, "mse", "sgd", front="none")
    found = lr_find(learn, plot=False)
    assert found.suggestion.lr < edge < found.diverged_at and found.suggestion.lr > edge / 300
    assert lr_find(learn, plot=False).losses.tolist() == found.losses.tolist()  # the same question, the same answer


# -------------------------------------------------------------------------------------------------------------------- GANs


@pytest.mark.parametrize("name", ["discriminator", "generator"])
def test_the_other_player_is_held_still(name):
    moved = []
    learn = gan(cbs=On("after_step", lambda learn: moved.append(learn.player.name)))
    found = lr_find(learn, name, plot=False)
    assert {*moved} == {name} and found.player == name
    assert "held still" in str(found)
    assert found.suggestion.lr is not None and 1e-5 < found.suggestion.lr < 1
    moved.clear()
    both = lr_find(learn, name, steps=12, others="train", plot=False)
    assert {*moved} == {"discriminator", "generator"} and "trained on" in str(both)


def test_a_discriminator_that_wins_ends_the_trial():
    learn = gan(opt=OptimBuilder("adam", lr=1e-3))
    with torch.no_grad():
        learn.generator[-1].bias.add_(50.0)  # fakes that a child can tell
    found = lr_find(learn, "discriminator", plot=False)
    assert found.ended == "won" and found.lrs[-1] < 10 and "beaten" in str(found)


def test_several_players_must_be_told_apart():
    with pytest.raises(ValueError, match="which of discriminator, generator"):
        lr_find(gan())


def test_a_loss_without_a_bound():
    learn = gan(loss="wasserstein", opt="adam")
    found = lr_find(learn, "discriminator", plot=False)
    assert found.ended == "unbounded" and found.suggestion.lr is None and "every bound" in str(found)


# ---------------------------------------------------------------------------------------------------------- reading a curve

RATES = ladder(1e-6, 10.0, 120)


def made_up(centre=-2.5, edge=-0.5, noise=0.0, seed=0):
    x = np.log10(RATES)
    fall = 2.3 - 1.8 / (1 + np.exp(-4 * (x - centre))) + np.where(x > edge, (x - edge) * 8, 0)
    return fall + noise * np.random.default_rng(seed).standard_normal(len(x))


@given(st.floats(-4.5, -1.5), st.floats(0.1, 100), st.integers(0, 50))
@settings(max_examples=40, deadline=None)
def test_a_suggestion_does_not_depend_on_the_unit_of_the_loss(centre, factor, seed):
    losses = made_up(centre, noise=0.05, seed=seed)
    one = suggest(RATES, find_descent(RATES, losses, 2.3))
    two = suggest(RATES, find_descent(RATES, losses * factor, 2.3 * factor))
    assert one.lr is not None and one.lr == pytest.approx(two.lr)
    assert abs(np.log10(one.lr) - centre) < 0.5 and one.lr <= one.minimum


@given(st.floats(0.01, 1.0), st.floats(-3, 3))
@settings(max_examples=30, deadline=None)
def test_noise_is_no_descent(noise, level):
    rng = np.random.default_rng(int(noise * 1e6))
    curves = [LRFind("model", RATES, level + noise * rng.standard_normal(120), level) for _ in range(20)]
    assert sum(found.suggestion.lr is not None for found in curves) <= 2


def test_what_comes_behind_the_explosion_does_not_count():
    losses = made_up()
    losses[-8:] = 0.01  # a network that has collapsed
    assert suggest(RATES, find_descent(RATES, losses, 2.3)).minimum < 1


@pytest.mark.parametrize("losses,ended,words", [
    (np.ones(120), "finished", "no descent"),
    (1 + np.arange(120.0), "finished", "rises from the first"),
    ([5.0, 900.0], "diverged", "exploded at once"),
    ([], "diverged", "the loss was nan before any step"),
])  # fmt: skip
def test_no_suggestion(losses, ended, words):
    found = LRFind("model", RATES[: len(losses)], losses, 1.0 if len(losses) else float("nan"), ended,
                   bound=RATES[len(losses) - 1] if len(losses) else None)  # fmt: skip
    assert found.suggestion.lr is None and words in str(found)
    assert found.suggestion.steepest is found.suggestion.minimum is None
    assert found.png().startswith(b"\x89PNG")


def test_a_loss_that_is_nan_from_the_start():
    learn = supervised()
    learn.players[0].terms[0].fn = lambda pred, y: pred.mean() * float("nan")
    found = find(learn)
    assert found.suggestion.lr is None and "nan before any step" in str(found) and learn.step == 0


# ------------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("wrong,message", [
    ({"start": 0.0}, "start"), ({"start": -1e-3}, "start"), ({"start": float("nan")}, "start"), ({"start": True}, "start"),
    ({"end": float("inf")}, "end"), ({"end": "10"}, "end"), ({"start": 1.0, "end": 1.0}, "start=1.0 and end=1.0"),
    ({"steps": 9}, "steps"), ({"steps": 20.0}, "steps"), ({"steps": True}, "steps"),
    ({"stop_at": 1.0}, "stop_at"), ({"stop_at": float("nan")}, "stop_at"), ({"others": "freeze"}, "others"),
    ({"player": "critic"}, "no player 'critic'"),
])  # fmt: skip
def test_bad_input(wrong, message):
    learn = supervised()
    was = everything(learn)
    with pytest.raises(ValueError, match=message):
        lr_find(learn, **wrong)
    same(everything(learn), was)


def test_a_learner_that_is_training():
    errors = []

    def probe(learn):
        try:
            lr_find(learn)
        except RuntimeError as error:
            errors.append(str(error))

    supervised(cbs=On("after_batch", probe)).fit(steps=1)
    assert errors and "training" in errors[0]


def test_a_generator_cannot_be_rewound():
    learn = supervised(batch for batch in [(X, Y)])
    with pytest.raises(ValueError, match="can't be rewound"):
        lr_find(learn)


def test_the_finding_is_printed(capsys):
    found = find(supervised(), plot=True)
    assert capsys.readouterr().out.strip() == str(found)
