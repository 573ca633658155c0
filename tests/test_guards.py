"Bad steps are left out and explained; numbers are traced; and nothing stays behind."

import math
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from ways import ENDINGS, end_by, resumes, same, same_weights

from trainkit.callback import Callback, CancelBatch, CancelStep, On
from trainkit.callbacks.average import EMA
from trainkit.callbacks.guards import (
    Buffers,  # fmt: skip
    Frame,
    NumericsTracer,
    SkipBadSteps,
    finite,
    first_bad,
    frame_of,
    loss_and_norm,
    parts_of,
    tensors_in,
    trouble,
    watching,
)
from trainkit.gan.learner import GANLearner
from trainkit.learner import Learner
from trainkit.player import Player

X = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
Y = X.sum(1, keepdim=True)
BAD = X.clone()
BAD[17, 1] = math.nan  # in the third batch of eight, when nothing is shuffled


def net():
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.2), nn.Linear(4, 1))


def learner(*cbs, x=X, model=None, opt="adamw", shuffle=False, valid=True, **kw):
    torch.manual_seed(0)
    train = DataLoader(TensorDataset(x, Y), batch_size=8, shuffle=shuffle)
    dls = {"train": train, "valid": (X, Y)} if valid else train
    return Learner(net() if model is None else model, dls, "mse", opt, cbs=cbs, front="none", **kw)


class Two(Learner):
    "b is trained on what a makes; each player's loss may be spoilt at a step."

    spoil: dict = {}

    def training_step(self, batch):
        a, b = (player.modules[player.name] for player in self.players)
        loss = F.mse_loss(a(batch[0]), batch[1]) if self.player.name == "a" else F.mse_loss(b(a(batch[0])), batch[1])
        return loss * math.nan if (self.step + 1) in self.spoil.get(self.player.name, ()) else loss

    def validation_step(self, batch):
        return F.mse_loss(self.players[0].modules["a"](batch[0]), batch[1])


def two(*cbs, spoil, **kw):
    torch.manual_seed(0)
    players = [Player("a", net(), opt="sgd"), Player("b", nn.Linear(1, 1), opt="adam")]
    learn = Two(players, {"train": DataLoader(TensorDataset(X, Y), batch_size=8), "valid": (X, Y)}, cbs=cbs, front="none", **kw)
    learn.spoil = spoil
    return learn


def hooks(learn):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in learn.modules())


class Fail(nn.Module):
    "Gives something else than it should from its n-th call on."

    def __init__(self, do, at=0):
        super().__init__()
        self.do, self.at, self.calls = do, at, 0

    def forward(self, x):
        self.calls += 1
        return self.do(x) if self.calls > self.at else x


# ---------------------------------------------------------------------------------------------------------- small parts


def test_tensors_in_any_wrapping():
    x, n = torch.ones(1), torch.ones(1, dtype=torch.long)
    assert [len([*tensors_in(v)]) for v in (x, n, (x, [n, {"a": x}]), {"b": (x, x)}, None, "text", 3.0)] == [1, 0, 2, 2, 0, 0, 0]
    assert finite((x, n)) and not finite([x, x / 0]) and finite(torch.ones(1, dtype=torch.complex64))


def test_names_are_the_checkpoints():
    shared = nn.Linear(1, 1)
    names = [*parts_of([Player("a", {"x": shared, "y": nn.Sequential(nn.ReLU())}), Player("b", nn.Sequential(shared))])]
    assert names == ["a.x", "a.y", "a.y.0", "b"]


def test_hooks_go_also_when_the_watched_fails():
    model = net()
    with pytest.raises(RuntimeError, match="by the watcher"), watching(parts_of([Player("m", model)]), watcher):
        model(X)
    assert not any(m._forward_hooks for m in model.modules())


def watcher(name, module, inputs, output):
    raise RuntimeError("by the watcher")


@pytest.mark.parametrize("spoil,answer", [
    (lambda m, x: None, ""),
    (lambda m, x: x.fill_(math.inf), r"m\.0 \(Linear\) .*its input already wasn't finite"),
    (lambda m, x: m[3].weight.data.fill_(math.nan), r"m\.3 \(Linear\) .*its weight already had"),
    (lambda m, x: (m[0].weight.data.fill_(math.nan), m[0].bias.data.fill_(math.nan)), r"m\.0 .*its weight and bias already had"),
    (lambda m, x: setattr(m[2], "forward", lambda x: x / 0), r"m\.2 \(Dropout\) .*its weights and its input were finite"),
    (lambda m, x: setattr(m[2], "forward", lambda x: 1 / [][0]), "the forward failed with IndexError"),
    (lambda m, x: setattr(m[2], "forward", lambda x: x[0, 99] / 0), "the forward failed with IndexError"),
])  # fmt: skip
def test_the_first_bad_module(spoil, answer):
    model, x = net(), X.clone()
    spoil(model, x)
    found = first_bad(parts_of([Player("m", model)]), lambda: model(x))
    assert re.search(answer, found) if answer else found == ""


def test_what_a_function_inside_a_module_does_is_the_modules():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(3, 3)

        def forward(self, x):
            return self.inner(x).square().neg().log()

    model = Outer()
    assert first_bad(parts_of([Player("m", model)]), lambda: model(X)).startswith("m (Outer) gave")


def test_loss_and_norm_is_the_total_norm():
    model = net()
    loss = F.mse_loss(model(X), Y)
    loss.backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
    assert loss_and_norm(loss, model.parameters()) == pytest.approx([loss.item(), expected.item()])
    table = nn.Embedding(5, 2, sparse=True)
    table(torch.tensor([1, 1])).sum().backward()
    assert loss_and_norm(loss, table.parameters())[1] == pytest.approx(math.sqrt(8))  # (2, 2) in one row
    assert loss_and_norm(loss, []) == [pytest.approx(loss.item()), 0.0]


def test_buffers_that_were_replaced_are_put_back():
    norm = nn.BatchNorm1d(2)
    buffers = Buffers([norm])
    copies = buffers.copies()
    norm.running_mean = torch.full((2,), 7.0)
    buffers.put_back(copies)
    assert norm.running_mean.tolist() == [0, 0] and not buffers.fit(copies[:2]) and not buffers.fit([*copies[:2], torch.ones(3)])


# -------------------------------------------------------------------------------------------------------- skipping steps


def test_a_bad_step_is_as_if_it_had_not_been():
    "Weights, optimizer state, schedule and buffers are those of a run without the bad batches."
    def without_dropout():
        torch.manual_seed(1)
        return nn.Sequential(*[m for m in net() if not isinstance(m, nn.Dropout)])

    guarded, clean = learner(SkipBadSteps(), x=BAD, model=without_dropout()), learner(model=without_dropout())

    def drop(learn):
        if learn.batch_idx == 3:
            raise CancelBatch

    steps = []
    guarded.add(On("before_step", lambda learn: steps.append(learn.step + 1)))
    clean.add(On("before_batch", drop))
    for learn in (guarded, clean):
        learn.fit(epochs=2)
    assert steps == [1, 2, 4, 5, 6, 7, 9, 10], "what clips or records gradients doesn't see them"
    same_weights(guarded, clean)
    same(guarded.players[0].opt.state_dict(), clean.players[0].opt.state_dict())
    assert guarded.cbs.get(SkipBadSteps).skipped == {"model": 2} and guarded.players[0].updates == 8 == clean.players[0].updates
    assert all(math.isfinite(v) for v in guarded.history.scalars["valid/loss"][1])
    marks = [(m.step, m.text) for m in guarded.history.marks if m.kind == "skipped"]
    assert marks == [(3, "model: loss nan, gradient norm nan"), (8, "model: loss nan, gradient norm nan")]


def test_without_the_guard_the_model_is_lost():
    learn = learner(x=BAD)
    learn.fit(epochs=1)
    assert all(p.isnan().all() for p in learn.model[0].parameters())


@pytest.mark.parametrize("event,spoil", [
    ("after_loss", lambda learn: setattr(learn, "loss", learn.loss + math.nan)),  # the gradients are finite
    ("after_loss", lambda learn: setattr(learn, "loss", learn.loss * math.inf)),
    ("after_backward", lambda learn: learn.model[0].weight.grad.fill_(math.inf)),  # the loss is
    ("after_backward", lambda learn: learn.model[0].weight.grad.fill_(1e30)),  # every number is, the norm isn't
])  # fmt: skip
def test_loss_or_gradient(event, spoil):
    learn = learner(SkipBadSteps(), On(event, lambda learn: spoil(learn) if learn.step == 1 else None))
    learn.fit(epochs=1)
    assert learn.cbs.get(SkipBadSteps).skipped == {"model": 1} and all(p.isfinite().all() for p in learn.model.parameters())


def test_per_player():
    "Each player has its own count; what the other does is not interrupted."
    guard = SkipBadSteps(patience=3)
    learn = two(guard, spoil={"a": {1, 2, 4, 5}, "b": {2}})
    learn.fit(epochs=1)
    assert guard.skipped == {"a": 4, "b": 1} and guard.in_a_row == {"a": 2, "b": 0}
    assert [p.updates for p in learn.players] == [1, 4]
    with pytest.raises(FloatingPointError, match="3 steps in a row of player 'b'"):
        two(SkipBadSteps("b", patience=3), spoil={"a": set(range(9)), "b": {2, 3, 4}}).fit(epochs=1)
    only_b = two(SkipBadSteps("b"), spoil={"a": {2}, "b": {2}})
    only_b.fit(steps=2)
    assert only_b.cbs.get(SkipBadSteps).skipped == {"b": 1} and not finite([*only_b.players[0].parameters()])


@pytest.mark.parametrize("reuse", [False, True])
def test_a_gan_also_one_that_reuses_a_forward(reuse):
    "The generator's backward goes through a forward whose buffers were put back in the discriminator's turn."
    torch.manual_seed(0)
    g = nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
    d = nn.Sequential(nn.Linear(2, 8), nn.LeakyReLU(0.2), nn.Linear(8, 1), nn.Flatten(0))
    data = DataLoader(TensorDataset(X[:, :2]), batch_size=8)
    guard = SkipBadSteps(patience=2)
    gan = GANLearner(g, d, data, latent=2, cbs=[guard, On("after_loss", spoil_one)], reuse_forward=reuse, front="none")
    gan.fit(steps=4)
    assert guard.skipped == {"discriminator": 1, "generator": 1} and [p.updates for p in gan.players] == [3, 3]
    with torch.no_grad():
        g[0].weight[0] = math.nan
    with pytest.raises(FloatingPointError, match=r"generator\.0 \(Linear\) gave .*; its weight already had"):
        gan.fit(steps=3)


def spoil_one(learn):
    if (learn.player.name, learn.step) in {("discriminator", 1), ("generator", 2)}:
        learn.loss = learn.loss * math.nan


def test_the_error_names_the_module_and_changes_nothing():
    root = Fail(torch.sqrt)
    learn = learner(SkipBadSteps(patience=2), model=nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), root,
                                                                    nn.Linear(4, 1)))  # fmt: skip
    before = {k: v.clone() for k, v in learn.model.state_dict().items()}
    rng = []
    learn.add(On("after_backward", lambda learn: rng.append(torch.get_rng_state()), order=90))
    with pytest.raises(FloatingPointError, match=r"2 steps in a row of player 'model' were bad, the last with loss nan") as found:
        learn.fit(epochs=1)
    assert "model.3 (Fail) gave values that aren't finite; its weights and its input were finite" in str(found.value)
    assert "gradients that aren't finite: 0.weight, 0.bias, 1.weight, 1.bias and 2 more" in str(found.value)
    assert torch.equal(rng[-1], torch.get_rng_state()), "the diagnosis drew random numbers"
    assert root.calls == 3 and hooks(learn) == 0 and learn.state == "failed" and learn.error is found.value
    same(dict(learn.model.state_dict()), before)


@pytest.mark.parametrize("spoil,words", [
    (lambda learn: learn.batch[0].fill_(math.nan), ["the batch has values", "model.0 (Linear)", "its input already wasn't"]),
    (lambda learn: learn.model[3].bias.data.fill_(math.inf), ["model.3 (Linear)", "its bias already had"]),
    (lambda learn: None, []),
])  # fmt: skip
def test_what_the_error_says(spoil, words):
    learn = learner(SkipBadSteps(patience=1), On("before_batch", spoil, order=-100))
    if not words:
        learn.add(On("after_backward", lambda learn: learn.model[0].weight.grad.fill_(math.nan)))
        words = ["every module's output is finite in one more forward", "gradients that aren't finite: 0.weight"]
    with pytest.raises(FloatingPointError) as found:
        learn.fit(epochs=1)
    assert all(word in str(found.value) for word in words), str(found.value)


def test_patience_counts_in_a_row():
    learn = learner(SkipBadSteps(patience=2), x=BAD)
    learn.fit(epochs=3)
    assert learn.cbs.get(SkipBadSteps).skipped == {"model": 3}
    worse = BAD.clone()
    worse[24:26] = math.inf
    with pytest.raises(FloatingPointError, match="the batch has values that aren't finite"):
        learner(SkipBadSteps(patience=2), x=worse).fit(epochs=1)


def test_every_looks_by_updates():
    "After two updates the third is looked at; when it is bad, the next one is, too."
    looks = []
    guard = SkipBadSteps(every=3)
    old = guard.bad
    guard.bad = lambda player: (looks.append(learn.step + 1), old(player))[1]
    x = X.clone()
    x[24:32] = math.nan  # the fourth batch, in which the fourth update (number 3) is due
    learn = learner(guard, x=x)
    learn.fit(epochs=1)
    assert looks == [1, 4, 5] and guard.skipped == {"model": 1} and finite([*learn.model.parameters()])


def test_one_transfer_for_an_ordinary_step(monkeypatch):
    "What costs is reading numbers: one list for a step."
    reads = []
    for name in ("tolist", "item", "__bool__", "__float__"):
        old = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda self, *args, old=old, name=name: (reads.append(name), old(self, *args))[1])
    guard, learn = SkipBadSteps(), learner(opt="sgd", valid=False)
    guard.before_fit(learn)
    learn.player = learn.players[0]
    guard.before_turn(learn)
    learn.loss = F.mse_loss(learn.model(X), Y)
    learn.loss.backward()
    reads.clear()
    guard.before_step(learn)
    assert reads == ["tolist"]


def test_accumulated_turns_are_one_step():
    "A bad loss in any turn of a window drops the window, also the one that is left over."
    torch.manual_seed(0)
    x = X.clone()
    x[33] = math.nan  # the fifth batch, alone in the last window
    guard = SkipBadSteps()
    learn = Learner(net(), DataLoader(TensorDataset(x, Y), batch_size=8), "mse", "sgd", cbs=guard, front="none", accumulate=2)
    learn.fit(epochs=2)
    assert guard.skipped == {"model": 2} and learn.players[0].updates == 4 and finite([*learn.model.state_dict().values()])
    guard, model = SkipBadSteps(), nn.Linear(3, 1)
    learn = Learner(model, DataLoader(TensorDataset(BAD, Y), batch_size=8), "mse", "sgd", cbs=guard, front="none", accumulate=2)
    learn.fit(epochs=1)
    assert guard.skipped == {"model": 1} and learn.players[0].updates == 2 and finite([*model.parameters()])


def test_a_turn_that_is_skipped_before_its_backward_leaves_the_window_alone():
    "Its bad loss is of no gradient."

    def skip(learn):
        if learn.step == 2:
            learn.loss = learn.loss * math.nan
            raise CancelStep

    guard = SkipBadSteps()
    learn = Learner(nn.Linear(3, 1), DataLoader(TensorDataset(X, Y), batch_size=8), "mse", "sgd", front="none", accumulate=3,
                    cbs=[guard, On("after_loss", skip)])  # fmt: skip
    learn.fit(epochs=1)
    assert guard.skipped == {} and learn.players[0].updates == 2


@pytest.mark.parametrize("at", [1, 2, 5])
def test_a_bad_loss_with_good_gradients_in_any_turn_of_a_window(at):
    def spoil(learn):
        if learn.step + 1 == at:
            learn.loss = learn.loss + math.nan

    guard = SkipBadSteps()
    learn = Learner(nn.Linear(3, 1), DataLoader(TensorDataset(X, Y), batch_size=8), "mse", "sgd", front="none", accumulate=2,
                    cbs=[guard, On("after_loss", spoil)])  # fmt: skip
    learn.fit(epochs=1)
    assert guard.skipped == {"model": 1} and learn.players[0].updates == 2
    (mark,) = [m for m in learn.history.marks if m.kind == "skipped"]
    assert mark.step == (2 if at < 3 else 5)
    assert mark.text.startswith("model: loss nan, gradient norm") and "norm nan" not in mark.text


def test_fp16_warms_its_scale_up_without_being_counted():
    learn = learner(SkipBadSteps(patience=1), valid=False, model=nn.Linear(3, 1), precision="fp16", opt="sgd")
    (player,) = learn.players
    player.scaler.load_state_dict({**player.scaler.state_dict(), "scale": 2.0**126})  # far too large
    learn.fit(epochs=2)
    assert learn.cbs.get(SkipBadSteps).skipped == {} and player.updates < 10, "the scaler left steps out by itself"
    learn = learner(SkipBadSteps(), valid=False, x=BAD, model=nn.Linear(3, 1), precision="fp16", opt="sgd")
    learn.fit(epochs=1)
    assert learn.cbs.get(SkipBadSteps).skipped == {"model": 1} and finite([*learn.model.parameters()])
    learn = learner(SkipBadSteps(patience=2), valid=False, model=nn.Linear(3, 1), precision="fp16", opt="sgd")
    learn.add(On("after_backward", lambda learn: learn.model.weight.grad.fill_(math.nan)))
    with pytest.raises(FloatingPointError, match="gradient norm nan"):
        learn.fit(epochs=10)
    assert 17 <= learn.step <= 19, "from 65536 to 1 by halves, and then two in a row"


def test_resumption_is_exact(tmp_path):
    resumes(lambda run: learner(SkipBadSteps(patience=4), x=BAD, shuffle=True, run=run), tmp_path, at=(3, 5, 8))
    resumes(lambda run: two(SkipBadSteps(patience=3), spoil={"a": {2, 3, 6, 7}, "b": {5}}, run=run), tmp_path / "two", at=(2, 6))


def uneven(*cbs, run=None, accumulate=2, every=1, valid=False):
    "Epochs of five batches, the second and the last of which are bad; windows of two, with one batch left over."
    torch.manual_seed(0)
    x = X.clone()
    x[[9, 35]] = math.nan
    loader = DataLoader(TensorDataset(x, Y), batch_size=8)
    cbs = [SkipBadSteps(every=every), EMA(0.5), *cbs]
    return Learner(net(), (loader, (X, Y)) if valid else loader, "mse", "adamw", cbs=cbs, front="none", accumulate=accumulate,
                   run=run)  # fmt: skip


def critics(run=None, accumulate=2):
    "Three turns of the critic for one of the generator, whose batch norm all of them move; windows of both overlap."
    torch.manual_seed(0)
    g = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))
    d = nn.Sequential(nn.Linear(2, 4), nn.LeakyReLU(0.2), nn.Linear(4, 1), nn.Flatten(0))
    x = X[:, :2].clone()
    x[9] = math.nan  # the second of five batches
    spoil = On("before_backward", lambda learn: setattr(learn, "loss", learn.loss * (1 if learn.step % 7 else math.nan)), -90)
    return GANLearner(g, d, DataLoader(TensorDataset(x), batch_size=8), latent=2, cbs=[SkipBadSteps(), EMA(0.5), spoil],
                      n_critic=3, accumulate=accumulate, run=run, front="none")  # fmt: skip


SWEPT = {
    "a leftover": (lambda run=None: uneven(run=run), 10),
    "windows of three": (lambda run=None: uneven(run=run, accumulate=3), 10),
    "each second update": (lambda run=None: uneven(run=run, every=2), 10),
    "validated": (lambda run=None: uneven(run=run, valid=True), 10),
    "a GAN": (critics, 15),
    "a GAN, one of them": (lambda run=None: critics(run, {"discriminator": 2}), 15),
}


@pytest.mark.filterwarnings("ignore:gradients wait for more turns")
@pytest.mark.parametrize("what", SWEPT)
def test_left_after_any_step_it_ends_the_same(what, tmp_path):
    "In the middle of a window, before a leftover step, at an epoch's end: going on, and restored by another learner."
    make, steps = SWEPT[what]
    resumes(make, tmp_path, steps=steps, at=range(1, steps))
    straight = make()
    straight.fit(steps=steps)
    assert straight.cbs.get(SkipBadSteps).skipped
    assert what == "each second update" or finite([dict(m.state_dict()) for m in straight.modules()])
    for at in range(1, steps):
        paused = make()
        paused.fit(steps=at)
        paused.fit(steps=steps - at)
        same_weights(straight, paused)
        same(straight.state_dict()["callbacks"], paused.state_dict()["callbacks"])


@pytest.mark.parametrize("event", ["before_validate", "after_batch", "before_turn", "after_forward", "before_step", "after_turn"])
def test_stopped_anywhere_in_a_turn_it_ends_the_same(event):
    "Also when the first thing that happens then is the step that was left over."
    straight = uneven(valid=True)
    straight.fit(epochs=2, validate_every=5)
    for at in range(10):
        asked = []

        def once(learn, at=at, asked=asked):
            if learn.step >= at and not asked:
                asked.append(learn.stop())

        paused = uneven(On(event, once), valid=True)
        paused.fit(epochs=2, validate_every=5)
        if paused.state == "stopped":
            paused.fit()
        same_weights(straight, paused)
        same(straight.state_dict()["callbacks"], paused.state_dict()["callbacks"])


def test_a_window_that_is_undone_takes_those_inside_it_along():
    "a is spoilt in its first of two turns; b's window is opened after that, and must not bring the bad statistics back."
    for spoil in {"a": {1}, "b": {2}}, {"a": {1}, "b": {3}}, {"a": {3}, "b": {1, 4}}:
        learn = two(SkipBadSteps(), spoil={}, accumulate={"a": 2, "b": 3})

        def bad_batch(learn, spoil=spoil):
            if (learn.step + 1) in spoil.get(learn.player.name, ()):
                learn.batch = [learn.batch[0] * math.nan, learn.batch[1]]

        learn.add(On("before_turn", bad_batch))
        learn.fit(epochs=2)
        assert learn.cbs.get(SkipBadSteps).skipped.keys() == {"a", "b"}
        assert finite([dict(m.state_dict()) for m in learn.modules()])


@pytest.mark.filterwarnings("ignore:gradients wait for more turns")
def test_one_that_joins_in_the_middle_of_a_window_looks_from_there():
    learn = Learner(net(), DataLoader(TensorDataset(X, Y), batch_size=8), "mse", "sgd", front="none", accumulate=4)
    learn.fit(steps=3)
    learn.add(SkipBadSteps())
    learn.fit(epochs=1)
    assert learn.cbs.get(SkipBadSteps).skipped == {} and learn.players[0].updates == 2


def test_a_fresh_state_can_be_loaded():
    guard = SkipBadSteps()
    guard.load_state_dict(guard.state_dict())
    assert guard.state_dict() == {"skipped": {}, "in_a_row": {}, "open": {}}


def test_the_count_goes_on_after_a_restart(tmp_path):
    first = two(SkipBadSteps(patience=3), spoil={"a": {4, 5}}, run=tmp_path / "run")
    first.fit(steps=5)
    second = two(SkipBadSteps(patience=3), spoil={"a": {6}}, run=tmp_path / "run")
    second.restore()
    with pytest.raises(FloatingPointError, match="3 steps in a row of player 'a'"):
        second.fit(steps=1)


@pytest.mark.parametrize("ending", ENDINGS)
def test_every_ending_of_a_guarded_fit(ending):
    guard = SkipBadSteps()
    learn = learner(guard, NumericsTracer(batches=[2], show=lambda table: None), x=X)
    end_by(learn, ending)
    assert hooks(learn) == 0 and guard._open == {} and guard._buffers.places == []
    learn.fit(epochs=1)
    assert hooks(learn) == 0 and learn.state == "finished" and guard.skipped == {}


@pytest.mark.parametrize("kw,message", [
    ({"patience": 0}, "SkipBadSteps: patience must be a whole number >= 1; received 0"),
    ({"every": 1.5}, "SkipBadSteps: every must be a whole number >= 1; received 1.5"),
    ({"player": "critic"}, "there is no player 'critic'; there are: model"),
    ({"player": 5}, r"player is the name of one, or None for all; received 5 \(patience=5\?\)"),
    ({"player": ["model"]}, r"player is the name of one, or None for all; received \['model'\]$"),
])  # fmt: skip
def test_bad_arguments_of_the_guard(kw, message):
    with pytest.raises((TypeError, ValueError), match=message):
        learner(SkipBadSteps(**kw)).fit(epochs=1)


# --------------------------------------------------------------------------------------------------------------- tracer


def test_a_frame_is_the_range_of_absolute_values():
    linear = nn.Linear(2, 2)
    linear.weight.data, linear.bias.data = torch.tensor([[1.0, -4.0], [0.5, 2.0]]), torch.tensor([-3.0, 0.0])
    x = torch.tensor([[1.0, 1.0], [-2.0, 0.5]])
    inputs, output = ((x,), {"mask": torch.ones(1, dtype=torch.bool)}), {"out": linear(x), "empty": torch.ones(0)}
    frame = frame_of(3, "m", linear, inputs, output)
    rows = {"weight weight": (0.5, 4.0), "weight bias": (0.0, 3.0), "input 0": (0.5, 2.0), "output 0": (0.0, 7.0)}
    assert {what: (low, high) for what, low, high in frame.rows} == rows  # outputs -6, 2.5, -7, 0
    assert frame.module == "m (Linear)" and "5.000e-01  4.000e+00  weight weight" in str(frame)
    both = torch.tensor([1.0, math.nan], dtype=torch.float16), torch.ones(1).double() * 1e300
    half = frame_of(3, "m", nn.Identity(), (), both)
    assert math.isnan(half.rows[0][2]) and half.rows[1][2] == 1e300


@pytest.mark.parametrize("high,what,dtype,words", [
    (math.nan, "output 0", None, "is nan"), (math.inf, "weight w", None, "is infinite"), (math.inf, "input 0", None, ""),
    (1e38, "output 0", None, ""), (65504.0, "output 0", torch.float16, ""), (65520.0, "output 0", torch.float16, "overflow"),
    (65520.0, "weight w", torch.float16, "overflow"), (65520.0, "output 0", torch.bfloat16, ""),
    (6.2e-5, "output 0", torch.float16, ""), (6.0e-5, "output 0", torch.float16, "underflow"),
    (6.0e-5, "weight w", torch.float16, ""), (0.0, "output 0", torch.float16, ""), (6.0e-5, "output 0", torch.bfloat16, ""),
])  # fmt: skip
def test_trouble(high, what, dtype, words):
    found = trouble(Frame(1, "m", ((what, 0.0, high),)), dtype)
    assert words in found and bool(words) == bool(found)


def test_stops_at_the_first_bad_module_with_the_last_frames():
    tracer = NumericsTracer(frames=5)
    learn = learner(tracer, model=nn.Sequential(nn.Linear(3, 4), nn.Tanh(), Fail(lambda x: x / 0, at=2), nn.Linear(4, 1)))
    with pytest.raises(FloatingPointError, match=r"model\.2 \(Fail\): output 0 is (infinite|nan), at step 3 in the turn of") as e:
        learn.fit(epochs=1)
    assert learn.step == 3 and learn.players[0].updates == 2 and hooks(learn) == 0
    assert [f.module.split()[0] for f in tracer.frames] == ["model.3", "model", "model.0", "model.1", "model.2"]
    assert str(e.value).count("(Linear)") == 2 and "The last 5 forwards" in str(e.value)


def test_frames_stay_bounded_after_a_dump():
    "audiozen's tracer keeps everything from the first dump on (A12)."
    tracer = NumericsTracer(frames=4)
    learn = learner(tracer, model=nn.Sequential(nn.Linear(3, 4), Fail(lambda x: x / 0, at=1), nn.Linear(4, 1)))
    for _ in range(2):
        with pytest.raises(FloatingPointError):
            learn.fit(epochs=1)
        assert 2 <= len(tracer.frames) <= 4 and tracer.frames.maxlen == 4
    learn.model[1].at = 100
    learn.fit(epochs=2)
    assert len(tracer.frames) == 4
    assert NumericsTracer().batches is not NumericsTracer().batches


def test_bad_weights_are_found_before_a_step():
    model = net()
    model[3].bias.data.fill_(math.nan)
    with pytest.raises(FloatingPointError, match=r"model\.3 \(Linear\): weight bias is nan, at step 1"):
        learner(NumericsTracer(), model=model).fit(epochs=1)


def test_a_masks_infinities_are_no_reason_to_stop():
    model = nn.MultiheadAttention(4, 1, batch_first=True)
    mask = nn.Transformer.generate_square_subsequent_mask(3)

    def step(learn, batch):
        return model(batch[0], batch[0], batch[0], attn_mask=mask)[0].square().mean()

    data = torch.randn(8, 3, 4)
    Learner(Player("m", model, step=step), (data, data), cbs=NumericsTracer(), front="none").fit(epochs=1)


def test_what_would_not_fit_a_smaller_type():
    with pytest.raises(FloatingPointError, match=r"output 0 goes up to .* 6\.55e\+04 \(overflow\)"):
        learner(NumericsTracer(fits=torch.float16), model=nn.Sequential(Fail(lambda x: x * 1e6), nn.Linear(3, 1))).fit(epochs=1)
    with pytest.raises(FloatingPointError, match="underflow"):
        learner(NumericsTracer(fits=torch.float16), model=nn.Sequential(Fail(lambda x: x * 1e-7), nn.Linear(3, 1))).fit(epochs=1)
    learner(NumericsTracer(), model=nn.Sequential(Fail(lambda x: x * 1e-7), nn.Linear(3, 1))).fit(epochs=1)


def test_traced_steps_are_shown_and_not_judged():
    tables = []
    tracer = NumericsTracer(batches=[2, 3], show=tables.append)
    learn = learner(tracer, model=nn.Sequential(nn.Linear(3, 4), Fail(lambda x: x / 0, at=2), nn.Linear(4, 1)), opt="sgd")
    with pytest.raises(FloatingPointError, match="at step 4"):  # the third made the weights nan
        learn.fit(epochs=1)
    assert len(tables) == 2 and [*tracer.traced] == [2, 3] and all(len(frames) == 4 for frames in tracer.traced.values())
    assert tables[0] == tracer.report(2) and "inf" in tables[1] and "inf" not in tables[0]


def test_abort_after():
    learn = learner(NumericsTracer(abort_after=3))
    learn.fit(epochs=2)
    assert (learn.step, learn.state) == (3, "stopped") and hooks(learn) == 0


def test_only_turns_are_traced():
    "Validation, and somebody who looks at the model between two steps, leave no frames."
    tracer = NumericsTracer(frames=1000)
    learn = learner(tracer, On("after_batch", lambda learn: learn.model(X)))
    learn.fit(epochs=1)
    assert len(tracer.frames) == 5 * 5 and {f.step for f in tracer.frames} == {1, 2, 3, 4, 5}


def test_several_players_are_traced_and_training_is_the_same():
    tracer = NumericsTracer(frames=1000)
    traced = two(tracer, spoil={})
    traced.fit(epochs=2)
    plain = two(spoil={})
    plain.fit(epochs=2)
    same_weights(traced, plain)
    per_step = [f.module for f in tracer.frames if f.step == 1]
    a = ["a.0 (Linear)", "a.1 (BatchNorm1d)", "a.2 (Dropout)", "a.3 (Linear)", "a (Sequential)"]
    assert per_step == [*a, *a, "b (Linear)"]


def test_a_traced_run_resumes(tmp_path):
    resumes(lambda run: learner(NumericsTracer(), shuffle=True, run=run), tmp_path, at=(1, 5))


class BreaksAtTheStart(Callback):
    order = 10

    def before_fit(self, learn):
        raise RuntimeError("at the start")


def test_hooks_go_when_the_fit_does_not_begin():
    learn = learner(NumericsTracer(), BreaksAtTheStart())
    with pytest.raises(RuntimeError, match="at the start"):
        learn.fit(epochs=1)
    assert hooks(learn) == 0


def test_compiled_models_are_looked_into():
    "Compiled code doesn't call hooks that came later, so it is not used while they are there."
    learn = learner(model=nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)), compile={"backend": "eager"}, valid=False)
    learn.fit(steps=1)  # it is compiled now
    learn.model[2].weight.data.fill_(math.nan)
    learn.add(NumericsTracer())
    with pytest.raises(FloatingPointError, match=r"model\.2 \(Linear\): weight weight is nan"):
        learn.fit(epochs=1)
    learn.remove(NumericsTracer)
    learn.add(SkipBadSteps(patience=2))
    with pytest.raises(FloatingPointError, match=r"model\.2 \(Linear\) gave .*; its weight already had"):
        learn.fit(epochs=1)
    seen = []
    with watching(parts_of(learn.players), lambda name, *_: seen.append(name)):
        learn.model(X)
    assert seen == ["model.0", "model.1", "model.2", "model"]


@pytest.mark.parametrize("kw,message", [
    ({"frames": 0}, "frames must be a whole number >= 1; received 0"),
    ({"batches": [0]}, "each of batches must be a whole number >= 1; received 0"),
    ({"abort_after": 0}, "abort_after must be a whole number >= 1; received 0"),
    ({"fits": "float16"}, "fits takes a floating-point torch.dtype or None; received 'float16'"),
    ({"fits": torch.int32}, "received torch.int32"),
    ({"batches": 3}, r"batches takes the steps to trace, as in \[3\]; received 3"),
    ({"show": 3}, "show takes a function of a table; received 3"),
])  # fmt: skip
def test_bad_arguments_of_the_tracer(kw, message):
    with pytest.raises((TypeError, ValueError), match=message):
        NumericsTracer(**kw)
