"Averages of weights: their numbers against independent ones, and that looking through them leaves the weights alone."

import copy
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn, get_swa_multi_avg_fn, update_bn
from torch.utils.data import DataLoader, TensorDataset
from ways import ENDINGS, end_by, resumes, same, same_weights

from trainkit.callback import Callback, CancelStep, On
from trainkit.callbacks.average import EMA, SWA, recompute_batch_norm, weights_of
from trainkit.callbacks.clip import AdaptiveClip, ClampWeights, ClipGradNorm
from trainkit.callbacks.scheduled import Scheduled
from trainkit.gan.learner import GANLearner
from trainkit.knobs import all_knobs
from trainkit.learner import Learner
from trainkit.optim import OptimBuilder
from trainkit.player import Player

X = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
Y = X.sum(1, keepdim=True)


class Net(nn.Module):
    "Buffers of both kinds, dropout, a frozen parameter, two names for one tensor."

    def __init__(self, norm=True):
        super().__init__()
        self.first, self.tied = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
        self.tied.weight = self.first.weight
        self.norm = nn.BatchNorm1d(3) if norm else nn.Identity()
        self.drop, self.out = nn.Dropout(0.2), nn.Linear(3, 1)
        self.out.bias.requires_grad_(False)
        self.register_buffer("cache", torch.ones(2), persistent=False)

    def forward(self, x):
        return self.out(self.drop(self.norm(self.tied(self.first(x).relu()))))


def loader(**kw):
    return DataLoader(TensorDataset(X, Y), **{"batch_size": 8, "shuffle": True, **kw})


def learner(*cbs, model=None, dls=None, lr=0.05, **kw):
    torch.manual_seed(0)
    dls = (loader(), loader(shuffle=False)) if dls is None else dls
    opt = OptimBuilder("sgd", lr=lr, momentum=0.9)
    return Learner(Net() if model is None else model, dls, "mse", opt, cbs=cbs, front="none", **kw)


def trained(*cbs, epochs=2, **kw):
    learn = learner(*cbs, **kw)
    learn.fit(epochs=epochs)
    return learn


def live(learn):
    return {f"{p.name}/{n}": t.detach().clone() for p in learn.players for n, t in weights_of(p).items()}


class Track(Callback):
    "The weights after each step, in double precision."

    order = 70

    def __init__(self):
        self.seen = []

    def after_step(self, learn):
        weights = weights_of(learn.player).items()
        self.seen.append({n: t.detach().to(torch.float64 if t.is_floating_point() else t.dtype, copy=True) for n, t in weights})


# ------------------------------------------------------------------------------------------------------- EMA's numbers


@pytest.mark.parametrize("decay, warmup, every, start", [
    (0.9, False, 1, 0), (0.9, True, 1, 0), (0.25, True, 1, 0), (0.999, True, 2, 3), (0.0, False, 1, 0),
    (1.0, False, 1, 1)])  # fmt: skip
def test_the_recurrence(decay, warmup, every, start):
    learn = learner(ema := EMA(decay, warmup=warmup, every=every, start=start), track := Track())
    learn.fit(epochs=3)
    taken = [w for i, w in enumerate(track.seen, 1) if i > start and (i - start) % every == 0]
    assert len(track.seen) == 15 and ema.counts == {"model": len(taken)}
    expected = dict(taken[0])
    for n, w in enumerate(taken[1:], 1):
        d = min(decay, (1 + n) / (10 + n)) if warmup else decay
        expected = {k: d * expected[k] + (1 - d) * v if v.is_floating_point() else v for k, v in w.items()}
    assert ema.averages["model"].keys() == expected.keys()
    for name, value in ema.averages["model"].items():
        torch.testing.assert_close(value.to(expected[name].dtype), expected[name], rtol=1e-5, atol=1e-7)


def test_against_torch_to_the_last_bit():
    learn = learner(ema := EMA(0.9, warmup=False))
    by_hand = AveragedModel(learn.model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    learn.add(On("after_step", lambda learn: by_hand.update_parameters(learn.model)))
    learn.fit(epochs=3)
    theirs = by_hand.module.state_dict()
    for name, value in ema.averages["model"].items():
        if name != "norm.num_batches_tracked":  # averaged and rounded there, copied here
            assert torch.equal(value, theirs[name]), name
    assert ema.averages["model"]["norm.num_batches_tracked"] == learn.model.norm.num_batches_tracked == 15


def test_what_belongs_to_it():
    learn = trained(ema := EMA())
    norm = [f"norm.{name}" for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")]
    names = ["first.weight", *norm, "out.weight", "out.bias"]  # not the tied weight again, not the cache
    assert [*ema.averages["model"]] == names
    assert torch.equal(ema.averages["model"]["out.bias"], learn.model.out.bias)  # frozen: the same to the last bit


def test_half_precision_is_averaged_in_single():
    "In bfloat16 an average of decay 0.999 never moves."
    model = nn.Linear(3, 1).to(torch.bfloat16)
    data = [(X.to(torch.bfloat16), Y.to(torch.bfloat16))] * 30
    learn = learner(ema := EMA(0.999, warmup=False), track := Track(), model=model, dls=data, lr=1e-3)
    learn.fit(epochs=1)
    expected = track.seen[0]["weight"]
    for w in track.seen[1:]:
        expected = 0.999 * expected + 0.001 * w["weight"]
    torch.testing.assert_close(ema.averages["model"]["weight"].double(), expected, rtol=1e-6, atol=1e-7)
    raw = live(learn)
    with ema.applied(learn):
        assert model.weight.dtype == torch.bfloat16
        assert torch.equal(model.weight, ema.averages["model"]["weight"].to(torch.bfloat16))
    same(live(learn), raw)


def test_only_real_steps_count():
    "Neither a turn that gathers gradients, nor one whose step was cancelled, nor one that the scaler left out."
    def odd(learn):
        if learn.step % 2:
            raise CancelStep

    learn = trained(ema := EMA(), On("before_step", odd), epochs=1)
    assert ema.counts["model"] == learn.players[0].updates == 3
    learn = trained(ema := EMA(), epochs=1, accumulate=2)
    assert ema.counts["model"] == learn.players[0].updates == 3  # 2 + 2 + the one that was left over
    model = nn.Linear(3, 1)
    poison = On("after_backward", lambda learn: model.weight.grad.fill_(math.inf) if learn.step == 1 else None)
    learn = trained(ema := EMA(), poison, model=model, epochs=1, precision="fp16")
    assert ema.counts["model"] == learn.players[0].updates <= 4


def test_clamped_weights_are_averaged_clamped():
    learn = trained(EMA(0.5), ClampWeights(0.01), model=nn.Linear(3, 1))
    ema = learn.cbs.get(EMA)
    assert max(t.abs().max() for t in ema.averages["model"].values()) <= 0.01


def test_decay_can_be_moved_while_it_runs():
    def move(learn):
        ema.decay = 0.1 * (learn.step + 1)

    learn = learner(On("before_step", move), ema := EMA(0.5, warmup=False), track := Track())
    learn.fit(steps=5)
    expected = track.seen[0]["out.weight"]
    for n, w in enumerate(track.seen[1:], 2):
        expected = 0.1 * n * expected + (1 - 0.1 * n) * w["out.weight"]
    torch.testing.assert_close(ema.averages["model"]["out.weight"].double(), expected, rtol=1e-5, atol=1e-7)
    with pytest.raises(ValueError, match="from 0 to 1; received 1.2"):
        ema.decay = 1.2
    assert ema.decay == pytest.approx(0.5)


def test_decay_can_be_scheduled(tmp_path):
    def make(run):
        return learner(ema := EMA(0.8, warmup=False), Scheduled((ema, "decay"), "linear", to=0.99), run=run)

    learn = make(None)
    learn.fit(epochs=2)
    assert learn.cbs.get(EMA).decay == pytest.approx(0.99) and "ema.decay" in all_knobs(learn)
    resumes(make, tmp_path)


# ---------------------------------------------------------------------------------------------------- looking through it


def test_evaluations_see_the_average():
    learn = trained(ema := EMA(0.8), metrics=["mae"])
    twin = Net()
    twin.load_state_dict(ema.averages["model"], strict=False)
    twin.tied.weight = twin.first.weight
    other = learner(model=twin, metrics=["mae"])
    assert learn.validate() == other.validate()
    assert learn.test(loader(shuffle=False)) == other.test(loader(shuffle=False))
    assert torch.equal(learn.predict(X), other.predict(X))
    assert learn.validate() != trained(metrics=["mae"]).validate()


def test_without_evaluate_they_see_the_weights():
    assert trained(EMA(0.8, evaluate=False)).validate() == trained().validate()


def test_before_the_first_value_they_see_the_weights():
    learn, plain = learner(EMA(0.8, start=100)), learner()
    assert learn.validate() == plain.validate()
    learn.fit(epochs=1)
    with learn.cbs.get(EMA).applied(learn):
        pass
    with pytest.raises(RuntimeError, match="nothing was averaged yet"):
        learn.cbs.get(EMA).copy_to(learn)


def test_training_goes_on_as_if_nobody_looked():
    def look(learn):
        learn.validate(loader(shuffle=False))
        learn.predict(X)
        with learn.cbs.get(EMA).applied(learn):
            learn.validate(loader(shuffle=False))

    watched, plain = trained(EMA(0.8), On("after_batch", look)), trained()
    same_weights(watched, plain)
    same(watched.players[0].opt.state_dict(), plain.players[0].opt.state_dict())


def test_it_can_be_looked_at_within_a_turn():
    "Between forward and backward: the graph still finds the weights that it was made with."
    watched = trained(EMA(0.8), On("after_loss", lambda learn: learn.predict(X)), epochs=1)
    same_weights(watched, trained(epochs=1))


def test_no_memory_is_needed_and_nesting_is_harmless():
    learn = trained(ema := EMA(0.8))
    weight, before = learn.model.first.weight, learn.model.first.weight.data_ptr()
    average = ema.averages["model"]["first.weight"]
    with ema.applied(learn):
        assert weight.data_ptr() == average.data_ptr() and learn.model.tied.weight is weight
        with ema.applied(learn), learn.observing("validating"):
            assert weight.data_ptr() == average.data_ptr()
        assert weight.data_ptr() == average.data_ptr()
        with pytest.raises(RuntimeError, match="in their place only for now"):
            ema.copy_to(learn)
    assert weight.data_ptr() == before


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_half_way(error, monkeypatch):
    learn = trained(ema := EMA(0.8))
    raw, pairs = live(learn), ema.pairs(learn)

    def broken(learn):
        yield from pairs[:3]
        raise error

    with pytest.raises(error), ema.applied(learn):
        raise error
    same(live(learn), raw)
    monkeypatch.setattr(ema, "pairs", broken)
    with pytest.raises(error), ema.applied(learn):
        raise AssertionError("unreachable")
    same(live(learn), raw)
    assert ema._aside == []


@pytest.mark.parametrize("make", [lambda: EMA(0.8), lambda: SWA(0.0)])
@pytest.mark.parametrize("ending", ENDINGS)
def test_every_ending(ending, make):
    averaged, plain = learner(cb := make()), learner()
    for learn in (averaged, plain):
        torch.manual_seed(1)
        end_by(learn, ending)
    same_weights(averaged, plain)
    assert cb._aside == [] and not averaged.players[0].schedule.overridden
    assert [m.training for m in averaged.modules()] == [m.training for m in plain.modules()]
    for learn in (averaged, plain):
        torch.manual_seed(2)
        learn.fit(epochs=1)
    same_weights(averaged, plain)


def test_copy_to():
    learn = trained(ema := EMA(0.8))
    expected = learn.validate()
    pointers = [p.data_ptr() for p in learn.model.parameters()]
    ema.copy_to(learn)
    assert all(torch.equal(t, ema.averages["model"][n]) for n, t in weights_of(learn.players[0]).items())
    assert [p.data_ptr() for p in learn.model.parameters()] == pointers
    learn.remove(EMA)
    assert learn.validate() == expected


# ---------------------------------------------------------------------------------------------------- kinds of modules


def test_channels_last():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 1))
    images = [(torch.randn(8, 3, 4, 4), torch.randn(8, 1)) for _ in range(4)]
    learn = trained(ema := EMA(0.8), model=model, dls=(images, images[:1]), channels_last="yes", epochs=1)
    assert ema.averages["model"]["0.weight"].is_contiguous(memory_format=torch.channels_last)
    twin = copy.deepcopy(model)
    twin.load_state_dict(ema.averages["model"])
    expected = F.mse_loss(twin(images[0][0]), images[0][1]).item()
    assert learn.validate()["valid/loss"] == pytest.approx(expected, rel=1e-5)


def test_compiled():
    learn = trained(ema := EMA(0.8), compile={"backend": "eager"}, epochs=1)
    assert not any("_orig_mod" in name for name in ema.averages["model"])
    plain = trained(other := EMA(0.8), epochs=1)
    same(ema.averages, other.averages)
    assert learn.validate() == pytest.approx(plain.validate())


def several(*cbs, **kw):
    "Player a has two modules, player b moves in every other batch and shares one of them."
    torch.manual_seed(0)
    shared, head, own = nn.Linear(3, 4), nn.Linear(4, 1), nn.Linear(4, 1)

    def a(learn, batch):
        return F.mse_loss(head(shared(batch[0])), batch[1])

    def b(learn, batch):
        return F.mse_loss(own(shared(batch[0])), -batch[1])

    class Several(Learner):
        def validation_step(self, batch):
            return {"a": F.mse_loss(head(shared(batch[0])), batch[1]), "b": F.mse_loss(own(shared(batch[0])), -batch[1])}

    opt = OptimBuilder("sgd", lr=0.05)
    players = [Player("a", {"body": shared, "head": head}, step=a, opt=opt), Player("b", [shared, own], step=b, opt=opt, every=2)]
    return Several(players, (loader(), loader(shuffle=False)), cbs=cbs, front="none", **kw)


def test_several_modules_and_players():
    learn = several(ema := EMA(0.8))
    learn.fit(epochs=2)
    assert [*ema.averages["a"]] == ["a.body.weight", "a.body.bias", "a.head.weight", "a.head.bias"]
    assert ema.counts == {"a": 10, "b": 5}
    raw = live(learn)
    with ema.applied(learn):
        shown = live(learn)
        assert torch.equal(shown["a/a.body.weight"], ema.averages["a"]["a.body.weight"])  # shared: the first player's
        assert torch.equal(shown["b/b.1.weight"], ema.averages["b"]["b.1.weight"])
    same(live(learn), raw)


def test_one_player_of_two():
    learn = several(ema := EMA(0.8, player="b"))
    learn.fit(epochs=1)
    assert [*ema.averages] == ["b"]
    raw = live(learn)
    with ema.applied(learn):
        assert torch.equal(live(learn)["a/a.head.weight"], raw["a/a.head.weight"])
    with pytest.raises(ValueError, match="no player 'c'; there are: a, b"):
        several(EMA(player="c")).fit(epochs=1)


def circle():
    torch.manual_seed(0)
    angle = 2 * torch.pi * torch.rand(64)
    real = torch.stack([angle.cos(), angle.sin()], 1)
    g = nn.Sequential(nn.Linear(2, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 2))
    d = nn.Sequential(nn.Linear(2, 16), nn.BatchNorm1d(16), nn.LeakyReLU(0.2), nn.Linear(16, 1), nn.Flatten(0))
    return g, d, [real[i : i + 16] for i in range(0, 64, 16)]


def gan(*cbs):
    g, d, batches = circle()
    return GANLearner(g, d, batches, opt=OptimBuilder("adam", lr=0.01), latent=2, seed=0, front="none", cbs=cbs)


def test_a_generator_is_sampled_through_its_average():
    watched = gan(ema := EMA(0.8, player="generator"), On("after_batch", lambda learn: learn.sample_fixed(4)))
    watched.fit(epochs=3)
    plain = gan()
    plain.fit(epochs=3)
    same_weights(watched, plain)
    average = copy.deepcopy(plain.generator)
    average.load_state_dict(ema.averages["generator"])
    torch.manual_seed(0)
    expected = average.eval()(torch.randn(8, 2))
    torch.testing.assert_close(watched.sample(8, seed=0), expected.detach())
    assert not torch.allclose(watched.sample(8, seed=0), plain.sample(8, seed=0))


# ------------------------------------------------------------------------------------------------- state and conflicts


@pytest.mark.parametrize("make", [
    lambda: EMA(0.9), lambda: EMA(0.9, every=2, start=3, warmup=False), lambda: SWA(1), lambda: SWA(0.3, lr=0.01),
    lambda: SWA(0.0, lr=0.5, anneal=2)])  # fmt: skip
def test_resumes(make, tmp_path):
    resumes(lambda run: learner(make(), run=run), tmp_path)


def test_resumes_with_several_players(tmp_path):
    resumes(lambda run: several(EMA(0.9, player="a"), EMA(0.5, player="b"), run=run), tmp_path)


def test_a_moved_decay_is_kept(tmp_path):
    learn = learner(ema := EMA(0.9), run=tmp_path / "r")
    learn.fit(steps=3)
    ema.decay = 0.95
    learn.save()
    other = learner(EMA(0.9), run=tmp_path / "r")
    other.restore("last")
    assert other.cbs.get(EMA).decay == 0.95


def test_a_restored_learner_evaluates_the_average(tmp_path):
    learn = trained(EMA(0.9), run=tmp_path / "r")
    other = learner(EMA(0.9), run=tmp_path / "r")
    other.restore("last")
    assert other.validate() == learn.validate()


def test_a_checkpoint_made_in_a_validation_holds_the_weights(tmp_path):
    learn = learner(EMA(0.9), run=tmp_path / "r", save_every=2)
    learn.fit(steps=4, validate_every=2)
    state, entry = learn.checkpoints.load(2)
    plain = learner()
    plain.fit(steps=2)
    assert entry.step == 2
    same(dict(state["players"]["model"]["modules"]["model"]), dict(plain.model.state_dict()))


def test_an_average_of_other_weights():
    learn = trained(ema := EMA(0.9))
    other = learner(mine := EMA(0.9), model=nn.Linear(3, 1))
    mine.load_state_dict(copy.deepcopy(ema.state_dict()))
    with pytest.raises(ValueError, match="other weights than those of player 'model'"):
        other.validate()
    with pytest.raises(ValueError, match="other weights than those of player 'model'"):
        other.fit(epochs=1)
    assert learn.validate() and other.state == "idle" and other.step == 0


@pytest.mark.parametrize("one, other", [(EMA(), SWA()), (SWA(player="b"), EMA()), (EMA(), EMA(0.5, player="a"))])
def test_two_averages_of_one_player(one, other):
    with pytest.raises(ValueError, match=r"average the same player, '[ab]', .* give the other evaluate=False") as caught:
        several(one, other).fit(epochs=1)
    assert repr(one) in str(caught.value) and repr(other) in str(caught.value)


def test_two_averages_of_which_one_is_looked_at():
    learn = trained(fast := EMA(0.5, evaluate=False), slow := EMA(0.99), SWA(1, evaluate=False))
    assert learn.validate() == trained(EMA(0.99)).validate()
    with fast.applied(learn):
        inside = learn.model.out.weight.detach().clone()
    assert torch.equal(inside, fast.averages["model"]["out.weight"])
    assert not torch.equal(inside, slow.averages["model"]["out.weight"])


@pytest.mark.parametrize("make, message", [
    (lambda: EMA(1.01), "from 0 to 1; received 1.01"), (lambda: EMA(-0.1), "received -0.1"),
    (lambda: EMA(None), "received None"), (lambda: EMA(math.nan), "received nan"), (lambda: EMA("0.9"), "received '0.9'"),
    (lambda: EMA(every=0), "every.* >= 1; received 0"), (lambda: EMA(start=-1), "start.* >= 0; received -1"),
    (lambda: EMA(every=1.5), "received 1.5"), (lambda: SWA(1.0), "received 1.0"), (lambda: SWA(-1), "received -1"),
    (lambda: SWA(True), "received True"), (lambda: SWA(lr=0), "above 0; received 0"), (lambda: SWA(lr=-1), "received -1"),
    (lambda: SWA(anneal=-1), "anneal.*received -1"), (lambda: SWA("half"), "received 'half'"),
    (lambda: EMA(warmup="no"), r"EMA\(warmup=…\) takes True or False; received 'no'"), (lambda: EMA(warmup=1), "received 1"),
    (lambda: SWA(forward=3), r"SWA\(forward=…\) takes a function \(learn, batch\), or None; received 3"),
    (lambda: SWA(loader=3), r"SWA\(loader=…\) takes batches that can be gone through, or None; received 3"),
    (lambda: SWA(loader="train"), "received 'train'")])  # fmt: skip
def test_bad_arguments(make, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make()


@pytest.mark.parametrize("cls", [EMA, SWA])
def test_wrong_kinds(cls):
    with pytest.raises(TypeError, match="takes True or False; received 'yes'"):
        cls(evaluate="yes")
    with pytest.raises(TypeError, match="takes the name of a player, or None for all; received 3"):
        cls(player=3)


def test_reprs_say_what_was_asked_for():
    said = {
        "EMA(0.999)": EMA(),
        "EMA(0.9, warmup=False, every=2, start=3, player='a', evaluate=False)":
            EMA(0.9, "a", warmup=False, every=2, start=3, evaluate=False),
        "SWA(0.75)": SWA(),
        "SWA(3, lr=0.1, anneal=2, player='a')": SWA(3, 0.1, "a", anneal=2),
    }  # fmt: skip
    assert [*said] == [*map(repr, said.values())]


# --------------------------------------------------------------------------------------------------------------- SWA


def normed():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 1))


def swa_by_hand(first, epochs, **kw):
    "The plain mean over the ends of epochs with torch's tools; what trainkit's run ends in is the same run."
    learn = learner(model=normed(), **kw)
    average = AveragedModel(learn.model, multi_avg_fn=get_swa_multi_avg_fn())
    learn.add(On("after_epoch", lambda learn: average.update_parameters(learn.model) if learn.epoch > first else None))
    learn.fit(epochs=epochs)
    update_bn([(X[i : i + 8], Y[i : i + 8]) for i in range(0, 40, 8)], average)
    return average.eval()


@pytest.mark.parametrize("start, first", [(2, 2), (0.5, 2), (0, 0), (0.0, 0), (0.99, 3)])
def test_swa_by_hand(start, first):
    batches = [(X[i : i + 8], Y[i : i + 8]) for i in range(0, 40, 8)]
    learn = trained(swa := SWA(start), model=normed(), dls=(batches, batches), epochs=4)
    average = swa_by_hand(first, 4, dls=(batches, batches))
    for name, value in average.module.state_dict().items():
        torch.testing.assert_close(swa.averages["model"][name], value, rtol=1e-6, atol=1e-7)
    assert swa.counts == {"model": 4 - first} and swa.ready
    expected = sum(F.mse_loss(average(x), y).item() for x, y in batches) / 5
    assert learn.validate()["valid/loss"] == pytest.approx(expected, rel=1e-5)


def test_during_the_fit_the_weights_are_looked_at():
    averaged, plain = trained(SWA(1), epochs=4), trained(epochs=4)
    assert averaged.history.scalars["valid/loss"][1].tolist() == plain.history.scalars["valid/loss"][1].tolist()
    assert averaged.validate() != plain.validate()


def test_a_fit_that_goes_on():
    learn = trained(swa := SWA(0.5), epochs=4)
    finished = learn.validate()
    seen = []
    learn.add(On("before_validate_batch", lambda learn: seen.append(torch.equal(learn.model.out.weight, raw[-1]))))
    raw = []
    learn.add(On("after_batch", lambda learn: raw.append(learn.model.out.weight.detach().clone())))
    learn.fit(epochs=2)
    assert all(seen) and swa.counts == {"model": 4} and swa.first == 2
    assert learn.validate() != finished


@pytest.mark.parametrize("make", [
    lambda: loader(generator=torch.Generator().manual_seed(3)), lambda: loader(),
    lambda: loader(num_workers=1, persistent_workers=True)])  # fmt: skip
def test_the_pass_for_the_statistics_leaves_no_trace(make):
    "Neither in the order of the data nor in a random generator."
    averaged, plain = trained(SWA(0.0), dls=make(), epochs=2), trained(dls=make(), epochs=2)
    for learn in (averaged, plain):
        torch.manual_seed(5)
        learn.fit(epochs=1)
    same_weights(averaged, plain)


def test_the_pass_counts_every_batch_and_the_split():
    "Dict batches with named inputs; the statistics are the plain mean over batches."
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.out = nn.BatchNorm1d(3), nn.Linear(3, 1)

        def forward(self, a, b):
            return self.out(self.norm(a + b))

    batches = [{"a": x, "b": 2 * x, "y": y} for x, y in zip(X.split(8), Y.split(8))]
    learn = trained(swa := SWA(0.0), model=Named(), dls=batches, epochs=1)
    torch.testing.assert_close(swa.averages["model"]["norm.running_mean"], 3 * X.mean(0))
    assert swa.averages["model"]["norm.num_batches_tracked"] == 5
    other = trained(swa := SWA(0.0, loader=batches[:2]), model=Named(), dls=batches, epochs=1)
    torch.testing.assert_close(swa.averages["model"]["norm.running_mean"], 3 * X[:16].mean(0))
    assert learn.model.norm.momentum == other.model.norm.momentum == 0.1


def test_a_pass_that_fails_leaves_modes_and_momenta():
    learn = learner(model=normed())
    learn.model[1].eval()

    def forward(batch):
        learn.predict_step(batch)
        raise OSError("gone")

    modes = [m.training for m in learn.modules()]
    with pytest.raises(OSError, match="gone"):
        recompute_batch_norm(learn, learn.players[0], learn.loaders.train, forward)
    assert learn.model[1].momentum == 0.1 and [m.training for m in learn.modules()] == modes


def test_a_gan_must_say_what_a_forward_is():
    with pytest.raises(ValueError, match=r"player 'generator' has batch norm.*SWA\(forward=lambda learn, batch"):
        gan(SWA(player="generator")).fit(epochs=1)

    def forward(learn, batch):
        return learn.generator(learn.latent(len(batch), learn.device))

    learn = gan(swa := SWA(0.0, player="generator", forward=forward))
    learn.fit(epochs=2)
    plain = gan()
    plain.fit(epochs=2)
    same_weights(learn, plain)  # the discriminator's statistics, too
    with swa.applied(learn):
        torch.testing.assert_close(learn.generator[0].weight, swa.averages["generator"]["0.weight"])
    assert swa.averages["generator"]["1.num_batches_tracked"] == 4
    assert not torch.allclose(learn.sample(8, seed=0), plain.sample(8, seed=0))


def test_a_loader_that_can_be_gone_through_once():
    with pytest.raises(ValueError, match="a generator can't be gone through once more"):
        learner(SWA(1), dls=(b for b in loader())).fit(steps=2)
    trained(SWA(0), dls=(b for b in loader()), model=nn.Linear(3, 1), epochs=1)  # no batch norm, no pass


def test_a_share_of_unknown_length():
    class Endless:
        def __iter__(self):
            return iter(loader())

    learn = learner(SWA(0.5), dls=Endless(), model=nn.Linear(3, 1))
    with pytest.raises(ValueError, match="nobody can tell how many epochs"):
        learn.fit(steps=20)
    learn.fit(epochs=2)
    assert learn.cbs.get(SWA).first == 1


def test_a_fit_in_steps():
    learn = learner(swa := SWA(0.5))
    learn.fit(steps=18)  # three epochs of five and a part
    assert swa.first == 2 and swa.counts == {"model": 1} and swa.ready


def test_nothing_averaged_is_said():
    with pytest.warns(UserWarning, match=r"SWA\(5\) averaged nothing: no epoch was finished after the first 5"):
        learn = trained(SWA(5), epochs=2)
    assert learn.validate() == trained(epochs=2).validate()


def test_a_stopped_fit_looks_at_the_weights():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        learn = learner(swa := SWA(0), On("after_batch", lambda learn: learn.stop() if learn.step == 12 else None))
        learn.fit(epochs=4)
    assert learn.state == "stopped" and not swa.ready and swa.counts == {"model": 2}
    plain = learner()
    plain.fit(steps=12)
    assert learn.validate() == plain.validate()
    learn.remove(On)
    learn.fit()
    assert swa.ready and swa.counts == {"model": 4}


def test_copy_to_brings_the_statistics():
    learn = learner(swa := SWA(0), On("after_batch", lambda learn: learn.stop() if learn.step == 12 else None))
    learn.fit(epochs=4)
    swa.copy_to(learn)
    assert learn.model.norm.num_batches_tracked == 5
    other = learner(SWA(0))
    with pytest.raises(RuntimeError, match="nothing was averaged yet"):
        other.cbs.get(SWA).copy_to(other)


def test_the_last_checkpoint_holds_the_finished_average(tmp_path):
    learn = trained(SWA(0.5), epochs=4, run=tmp_path / "r")
    other = learner(swa := SWA(0.5), run=tmp_path / "r")
    other.restore("last")
    assert swa.ready and other.validate() == learn.validate()


# ------------------------------------------------------------------------------------------------ SWA's learning rate


def rates(learn):
    steps, values = learn.history.scalars["lr/model"]
    return {int(s): pytest.approx(v) for s, v in zip(steps, values)}


def test_the_rate_is_held_and_released():
    learn = learner(SWA(0.5, lr=0.02), lr=0.08)
    learn.fit(epochs=4)
    assert rates(learn) == {1: 0.08, 11: 0.02}
    schedule = learn.players[0].schedule
    assert not schedule.overridden and learn.players[0].opt.param_groups[0]["lr"] == 0.08


def test_the_schedule_goes_on_below():
    opt = OptimBuilder("sgd", lr=0.08, schedule="linear")
    torch.manual_seed(0)
    learn = Learner(nn.Linear(3, 1), loader(), "mse", opt, cbs=SWA(2, lr=0.05), front="none")
    learn.fit(epochs=4)
    assert learn.history.scalars["lr/model"][1][-1] == pytest.approx(0.05)
    assert learn.players[0].opt.param_groups[0]["lr"] == 0.0  # the end of the line


@pytest.mark.parametrize("anneal", [1, 2, 3])
def test_annealing_is_torchs(anneal):
    learn = learner(SWA(1, lr=0.02, anneal=anneal), lr=0.08)
    learn.fit(epochs=6)
    opt = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.08)
    theirs = SWALR(opt, 0.02, anneal_epochs=anneal)
    expected = [0.08]
    for _ in range(5):
        opt.step()
        theirs.step()
        expected.append(opt.param_groups[0]["lr"])
    changed = {1 + 5 * i: v for i, v in enumerate(expected) if i == 0 or v != expected[i - 1]}
    assert changed == rates(learn)


@pytest.mark.parametrize("ending", ENDINGS)
def test_the_rate_is_released_by_every_ending(ending):
    learn = end_by(learner(SWA(0, lr=0.01), lr=0.02), ending)
    assert not learn.players[0].schedule.overridden and learn.players[0].opt.param_groups[0]["lr"] == 0.02


def test_a_rate_set_by_hand_stays():
    def by_hand(learn):
        if learn.step == 7:
            learn.players[0].schedule.override(value=0.003)

    learn = learner(SWA(1, lr=0.02), On("after_batch", by_hand), lr=0.08)
    learn.fit(epochs=2)
    assert learn.players[0].schedule.overridden == {"value": 0.003}


def layered(*cbs, schedule="constant", epochs=6, **kw):
    "Two groups with rates of their own, and the rates with which each step was made."
    torch.manual_seed(0)
    used, opt = [], OptimBuilder("sgd", lr=0.1, params={"^0": {"lr": 0.01}}, schedule=schedule, momentum=0.9)
    look = On("before_step", lambda learn: used.append([group["lr"] for group in learn.player.opt.param_groups]), order=90)
    learn = Learner(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1)), loader(), "mse", opt, cbs=[*cbs, look], front="none", **kw)
    learn.used = used
    return learn


@pytest.mark.parametrize("schedule", ["constant", "linear", {"name": "cosine", "by": "epoch"}, {"name": "StepLR", "step_size": 3},
                                      {"name": "OneCycleLR", "pct_start": 0.5}])  # fmt: skip
@pytest.mark.parametrize("anneal", [0, 1, 4])
def test_each_group_goes_over_from_its_own_rate_as_torchs(anneal, schedule):
    learn, plain = layered(SWA(2, lr=0.05, anneal=anneal), schedule=schedule), layered(schedule=schedule)
    for one in learn, plain:
        one.fit(epochs=6)
    before = plain.used[10]  # the rates with which the third epoch would begin
    params = [{"params": [torch.zeros(1, requires_grad=True)], "lr": lr} for lr in before]
    opt = torch.optim.SGD(params)
    theirs = SWALR(opt, 0.05, anneal_epochs=anneal)
    assert learn.used[:10] == plain.used[:10] and len({*before}) == 2
    for epoch in range(2, 6):
        opt.step()
        theirs.step()
        expected = [group["lr"] for group in opt.param_groups] if anneal else [0.05, 0.05]
        for used in learn.used[5 * epoch : 5 * epoch + 5]:
            assert used == pytest.approx(expected, rel=1e-9)
    same(learn.players[0].schedule.state_dict(), plain.players[0].schedule.state_dict())
    assert [g["lr"] for g in learn.players[0].opt.param_groups] == [g["lr"] for g in plain.players[0].opt.param_groups]


@pytest.mark.parametrize("hand, held", [({"times": 0.5}, [0.5 * 0.02, 0.5 * 0.02]), ({"value": 0.3}, [0.3, 0.3]),
                                        ({"times": 0.0}, [0.0, 0.0])])  # fmt: skip
@pytest.mark.parametrize("when", ["before the fit", "in an averaged epoch"])
def test_a_hand_lies_over_swas_rate_and_survives(hand, held, when, tmp_path):
    at = 0 if when == "before the fit" else 7
    put = On("before_batch", lambda learn: learn.players[0].schedule.override(**hand) if 0 < learn.step == at else None)
    learn = layered(SWA(1, lr=0.02, anneal=1), put, run=tmp_path / "run")
    schedule = learn.players[0].schedule
    if not at:
        schedule.override(**hand)
    learn.fit(epochs=3)
    assert all(used == pytest.approx(held) for used in learn.used[max(at, 5) :])
    assert schedule.overridden == hand
    there = [hand.get("value", hand.get("times", 1) * lr) for lr in (0.1, 0.01)]
    assert schedule.knob.read() == pytest.approx(there)
    schedule.release()
    assert schedule.knob.read() == pytest.approx([0.1, 0.01])


@pytest.mark.filterwarnings("ignore:.*averaged nothing")
def test_the_rates_before_are_those_without_the_hand():
    learn = layered(swa := SWA(1, lr=0.02, anneal=2))
    learn.players[0].schedule.override(times=0.5)
    learn.fit(epochs=2)
    assert swa.bases["model"] == pytest.approx([0.1, 0.01])


@pytest.mark.filterwarnings("ignore:.*averaged nothing")
def test_checkpoints_hold_what_the_learner_has(tmp_path):
    "SWA's rate is nobody's override, in the middle of an averaged epoch nor at the end."
    for steps in 7, 15:
        learn = layered(SWA(1, lr=0.02), run=tmp_path / f"{steps}")
        learn.fit(steps=steps)
        state, _ = learn.checkpoints.load("last")
        saved = state["players"]["model"]
        same(saved["schedules"], learn.state_dict()["players"]["model"]["schedules"])
        same(saved["optimizer"]["param_groups"], learn.players[0].opt.state_dict()["param_groups"])
        assert saved["schedules"]["lr"]["overridden"] is None


@pytest.mark.parametrize("schedule", ["linear", {"name": "StepLR", "step_size": 3}])
def test_layered_rates_resume(schedule, tmp_path):
    make = lambda run: layered(SWA(1, lr=0.05, anneal=3), schedule=schedule, run=run)
    resumes(make, tmp_path, steps=15, at=(3, 5, 7, 10, 12))


@pytest.mark.filterwarnings("ignore:the checkpoint's settings are used")
@pytest.mark.parametrize("kind, values", [(EMA, (0.9, 0.5)), (ClipGradNorm, (1.0, 3.0)), (AdaptiveClip, (0.1, 0.2))])
def test_in_another_order_each_finds_its_own_state(kind, values):
    "What acts on a player is saved under its name."
    cbs = [kind(value, player=name) for value, name in zip(values, ("a", "b"))]
    saved = several(*cbs)
    saved.fit(steps=4)
    again = [kind(value, player=name) for value, name in zip((0.3, 0.3), ("b", "a"))]
    other = several(*again)
    other.load_state_dict(saved.state_dict())
    same([cb.state_dict() for cb in reversed(again)], [cb.state_dict() for cb in cbs])
    assert [cb.name for cb in cbs] == [f"{kind(1.0).name} a", f"{kind(1.0).name} b"]
    assert [*several(EMA(0.9, "a"), EMA(0.5, "a", evaluate=False)).cbs.keyed()] == ["ema a", "ema a.1"]


def test_a_fresh_state_can_be_loaded():
    for make in EMA, SWA:
        cb = make()
        cb.load_state_dict(cb.state_dict())
        same(cb.state_dict(), make().state_dict())
