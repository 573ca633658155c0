"Curves for any number of a run: their values, what they count, leaving and coming back, every ending, and what is refused."

import dataclasses
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from ways import ENDINGS, end_by, resumes, same_weights

from trainkit.callback import CancelStep, On
from trainkit.callbacks.batches import AuxLoss, InstanceNoise, LabelSmoothing, MixUp
from trainkit.callbacks.clip import ClipGradNorm
from trainkit.callbacks.scheduled import Scheduled
from trainkit.gan.learner import GANLearner
from trainkit.gan.losses import minimax_discriminator, nonsaturating_generator
from trainkit.knobs import ScheduledKnob, knob, set_knob
from trainkit.learner import Learner
from trainkit.optim import OptimBuilder
from trainkit.player import Player

X = torch.randn(24, 3, generator=torch.Generator().manual_seed(0))
Y = torch.arange(24) % 4
TERMS = {"ce": F.cross_entropy, "size": (lambda pred, y: pred.square().mean(), 2.0)}


def learner(*cbs, run=None, loss="cross_entropy", valid=True, **kw):
    "Epochs of 6 batches."
    torch.manual_seed(0)
    data = TensorDataset(X, Y)
    train = DataLoader(data, batch_size=4, shuffle=True)
    opt = OptimBuilder("adamw", lr=0.01, weight_decay=0.4, betas=(0.9, 0.99))
    dls = (train, DataLoader(data, batch_size=12)) if valid else train
    return Learner(nn.Linear(3, 4), dls, loss, opt, cbs=cbs, run=run, front="none", **kw)


def series(learn, name):
    "The value in each step, as it is on record: it stands until the next one."
    steps, values = learn.history.scalars[name]
    return [values[np.searchsorted(steps, step, "right") - 1] for step in range(1, learn.step + 1)]


def decay_of(learn):
    return learn.players[0].opt.param_groups[0]["weight_decay"]


# ------------------------------------------------------------------------------------------------------- values

SHAPES = {
    "linear": ({}, lambda u: 1 - u / 12), "cosine": ({"end": 0.5}, lambda u: 0.5 + 0.25 * (1 + math.cos(math.pi * u / 12))),
    "exponential": ({"gamma": 0.8}, lambda u: 0.8**u), "constant": ({"warmup": 4}, lambda u: min(1, (u + 1) / 5)),
    "piecewise": ({"boundaries": [3, 7], "values": [1, 0.5, 0.1]}, lambda u: 1 if u <= 3 else 0.5 if u <= 7 else 0.1),
    "StepLR": ({"step_size": 5, "gamma": 0.5}, lambda u: 0.5 ** (u // 5)),
}  # fmt: skip
PLACES = {
    "weight_decay": (lambda: [], "weight_decay", 0.4), "beta1": (lambda: [], "beta1", 0.9),
    "weights.size": (lambda: [], "weights.size", 2.0), "mix_up.alpha": (lambda: [MixUp(0.5, 4)], "mix_up.alpha", 0.5),
    "aux_loss.weight": (lambda: [AuxLoss(lambda learn: learn.pred.square().mean(), 0.3)], "aux_loss.weight", 0.3),
}  # fmt: skip


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("shape", SHAPES)
def test_any_shape_moves_any_number(shape, place):
    (options, curve), (cbs, name, base) = SHAPES[shape], PLACES[place]
    learn = learner(*cbs(), Scheduled(place, shape, **options), loss=TERMS)
    learn.fit(epochs=2)
    assert series(learn, name) == pytest.approx([base * curve(u) for u in range(12)], rel=1e-6)


def test_to_a_value_whatever_the_base():
    held = {"temperature": 3}
    learn = learner(Scheduled("weight_decay", to=0.1), Scheduled((held, "temperature"), "cosine", to=-1.0))
    learn.fit(epochs=2)
    assert series(learn, "weight_decay") == pytest.approx([0.4 + (0.1 - 0.4) * u / 12 for u in range(12)])
    assert series(learn, "temperature") == pytest.approx([-1 + 2 * (1 + math.cos(math.pi * u / 12)) for u in range(12)])
    assert held["temperature"] == pytest.approx(-1) and decay_of(learn) == pytest.approx(0.1)


def test_the_values_are_what_is_trained_with():
    learn = learner(Scheduled("weights.size", to=0.0), loss=TERMS)
    learn.fit(epochs=1)
    last = {name: learn.history.scalars[f"train/{name}"][1] for name in ("loss", "ce", "size")}
    np.testing.assert_allclose(last["loss"], last["ce"] + 2 * (1 - np.arange(6) / 6) * last["size"], rtol=1e-5)
    twin = learner()
    model, opt = twin.model, twin.players[0].opt
    scheduled = learner(Scheduled("weight_decay"), valid=False)
    torch.manual_seed(7)
    scheduled.fit(steps=6)
    torch.manual_seed(7)
    for i, (x, y) in enumerate(DataLoader(TensorDataset(X, Y), batch_size=4, shuffle=True)):
        opt.zero_grad()
        opt.param_groups[0]["weight_decay"] = 0.4 * (1 - i / 6)
        F.cross_entropy(model(x), y).backward()
        opt.step()
    torch.testing.assert_close(scheduled.model.weight, model.weight)


# ------------------------------------------------------------------------------------------------------- what is counted


@pytest.mark.parametrize("by,expected", [
    ("update", [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]), ("step", range(12)), ("epoch", [0] * 6 + [3] * 6),
])  # fmt: skip
def test_updates_steps_or_epochs(by, expected):
    learn = learner(Scheduled("weight_decay", by=by), accumulate=2)
    learn.fit(epochs=2)
    total = {"update": 6, "step": 12, "epoch": 6}[by]  # an epoch is half of two: three sixths
    assert series(learn, "weight_decay") == pytest.approx([0.4 * (1 - u / total) for u in expected])
    assert decay_of(learn) == 0


def test_a_step_that_was_left_out_does_not_count():
    def skip(learn):
        if learn.step in (1, 2, 6):
            raise CancelStep

    cb = Scheduled("weight_decay")
    learn = learner(On("after_loss", skip), cb)
    learn.fit(epochs=2)
    made = [0, 1, 1, 1, 2, 3, 4, 4, 5, 6, 7, 8]
    assert series(learn, "weight_decay") == pytest.approx([0.4 * (1 - u / 12) for u in made])
    assert cb.schedule.update == learn.players[0].updates == 9


def test_a_plateau_follows_a_series():
    cb = Scheduled("weight_decay", "plateau", monitor="valid/score", mode="max", patience=0, factor=0.5)

    class Worse(Learner):
        def validation_epoch_end(self, outputs):
            return -float(self.step)

    torch.manual_seed(0)
    learn = Worse(nn.Linear(3, 4), (TensorDataset(X, Y), TensorDataset(X, Y)), "cross_entropy",
                  OptimBuilder("adamw", lr=0.01, weight_decay=0.4), cbs=cb, front="none", batch_size=4)  # fmt: skip
    learn.fit(epochs=4)
    assert decay_of(learn) == pytest.approx(0.4 * 0.5**3) and cb.schedule.by == "metric"


def two_players(*cbs):
    torch.manual_seed(0)
    step = lambda learn, batch: {"ce": F.cross_entropy(learn.player.modules[learn.player.name](batch[0]), batch[1])}
    players = [Player(name, nn.Linear(3, 4), step=step, every=every, opt=OptimBuilder("adamw", lr=0.01, weight_decay=0.4),
                      weights={"ce": 1.0}) for name, every in (("a", 1), ("b", 3))]  # fmt: skip
    return Learner(players, DataLoader(TensorDataset(X, Y), batch_size=4), cbs=cbs, front="none")


def test_of_several_players_the_one_whose_number_it_is_counts():
    held = {"heat": 1.0}
    learn = two_players(Scheduled("weight_decay", player="a"), Scheduled("weight_decay", player="b"),
                        Scheduled("weights.ce", player="b"), Scheduled((held, "heat"), player="b", to=2.0))  # fmt: skip
    learn.fit(epochs=2)
    assert series(learn, "a/weight_decay") == pytest.approx([0.4 * (1 - u / 12) for u in range(12)])
    moves = [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert series(learn, "b/weight_decay") == pytest.approx([0.4 * (1 - u / 4) for u in moves])
    assert series(learn, "b/weights.ce") == pytest.approx([1 - u / 4 for u in moves])
    assert series(learn, "heat") == pytest.approx([1 + u / 4 for u in moves])
    assert learn.players[0].weights == {"ce": 1.0} and learn.players[1].weights == {"ce": 0.0}


def test_two_of_the_same_name_are_on_record_as_two():
    one, other = Loss(), Loss()
    learn = learner(Scheduled((one, "amount")), Scheduled((other, "amount"), to=0.9))
    learn.fit(epochs=1)
    assert series(learn, "Loss.amount")[-1] == pytest.approx(0.05) and series(learn, "Loss.amount.1")[-1] == pytest.approx(0.8)
    assert [*learn.state_dict()["callbacks"]] == ["scheduled Loss.amount", "scheduled Loss.amount.1"]


def test_only_changes_are_on_record():
    learn = learner(Scheduled("weight_decay", "piecewise", boundaries=[2], values=[1, 0.5]), Scheduled("eps", "constant"))
    learn.fit(epochs=2)
    steps, values = learn.history.scalars["weight_decay"]
    assert (steps.tolist(), values.tolist()) == ([1, 4], [0.4, 0.2])
    assert learn.history.scalars["eps"][0].tolist() == [1]


# ------------------------------------------------------------------------------------------------------- going on


@pytest.mark.parametrize("schedule,expected", [("hold", 0.0), ("restart", 0.4), ("stretch", 0.2)])
def test_behind_its_end_one_is_asked_and_the_base_is_the_first_one(schedule, expected):
    learn = learner(Scheduled("weight_decay"))
    learn.fit(epochs=1)
    assert decay_of(learn) == 0
    with pytest.raises(ValueError, match=r"scheduled weight_decay: its schedule 'linear' ends at update 6, .* schedule='hold'"):
        learn.fit(epochs=1)
    seen = []
    learn.add(On("before_batch", lambda learn: seen.append(decay_of(learn))))
    learn.fit(epochs=1, schedule=schedule)
    assert seen[0] == pytest.approx(expected) and decay_of(learn) == 0


def test_over_two_fits_it_is_one_curve():
    once = learner(Scheduled("weight_decay", total=12))
    once.fit(steps=12)
    twice = learner(Scheduled("weight_decay", total=12))
    twice.fit(steps=5)
    assert decay_of(twice) == pytest.approx(0.4 * 7 / 12)
    twice.fit(steps=7)
    same_weights(once, twice)
    assert series(once, "weight_decay") == series(twice, "weight_decay")


def test_one_callback_in_a_second_learner_begins_anew():
    cb = Scheduled("weight_decay")
    learner(cb).fit(steps=1)
    learn = learner(cb)
    learn.fit(epochs=1)
    assert learn.history.scalars["weight_decay"][0][0] == 1
    assert series(learn, "weight_decay") == pytest.approx([0.4 * (1 - u / 6) for u in range(6)])


class Loss:
    "A GAN's loss with a smoothing that can be set."

    amount = 0.3

    def generator(self, fake_logits, real_logits=None):
        return nonsaturating_generator(fake_logits)

    def discriminator(self, real_logits, fake_logits):
        return minimax_discriminator(real_logits, fake_logits, self.amount)


def gan(*cbs, run=None):
    torch.manual_seed(0)
    judge, loss = nn.Sequential(nn.Linear(3, 1), nn.Flatten(0)), Loss()
    cbs = [Scheduled((loss, "amount"), "cosine", player="discriminator"), *cbs]
    return GANLearner(nn.Linear(2, 3), judge, DataLoader(X, batch_size=4), loss, OptimBuilder("adamw", lr=0.01), latent=2,
                      run=run, cbs=cbs, front="none", n_critic=2)  # fmt: skip


def test_one_sided_smoothing_of_a_gan_is_faded_out():
    learn = gan()
    learn.fit(epochs=2)
    assert series(learn, "Loss.amount") == pytest.approx([0.15 * (1 + math.cos(math.pi * u / 12)) for u in range(12)])


def overridden(run):
    cb = Scheduled("weight_decay")
    put = On("before_batch", lambda learn: cb.schedule.override(times=0.5) if learn.step == 2 else None)
    return learner(cb, put, run=run)


LEFT = {
    "an option": lambda run: learner(Scheduled("weight_decay", "cosine", warmup=3), run=run),
    "a restart": lambda run: learner(Scheduled("beta1", "cosine_restarts", cycles=3, end=0.5), run=run),
    "a weight": lambda run: learner(Scheduled("weights.size", to=0.5), loss=TERMS, run=run),
    "a callback's": lambda run: learner(MixUp(0.8), Scheduled("mix_up.alpha", "cosine"), run=run),
    "by epochs": lambda run: learner(LabelSmoothing(0.4), Scheduled("label_smoothing.amount", by="epoch"), run=run),
    "by steps": lambda run: learner(Scheduled("weight_decay", by="step"), run=run, accumulate=4),
    "one of torch's": lambda run: learner(Scheduled("weight_decay", "OneCycleLR", max_lr=0.8, cycle_momentum=False), run=run),
    "a plateau": lambda run: learner(Scheduled("weight_decay", "plateau", monitor="train/loss", patience=0, threshold=0.9),
                                     run=run),
    "several": lambda run: learner(LabelSmoothing(0.4), Scheduled("weight_decay"), Scheduled("label_smoothing.amount"), run=run),
    "a hand": overridden,
    "a GAN's loss": lambda run: gan(run=run),
    "a GAN's noise": lambda run: gan(InstanceNoise(0.5), Scheduled("instance_noise.std", player="discriminator"), run=run),
}  # fmt: skip


@pytest.mark.parametrize("what", LEFT)
def test_left_and_resumed_it_is_the_same_curve(what, tmp_path):
    resumes(LEFT[what], tmp_path, steps=9, at=(1, 4, 6))


def test_going_back_puts_the_value_back_at_once(tmp_path):
    smooth = LabelSmoothing(0.4)
    learn = learner(smooth, Scheduled("label_smoothing.amount", total=12), run=tmp_path / "run")
    learn.fit(steps=3)
    entry = learn.save()
    learn.fit(steps=6)
    assert smooth.amount == pytest.approx(0.1)
    learn.restore(entry)
    assert smooth.amount == pytest.approx(0.3)
    learn.fit(steps=1)
    assert smooth.amount == pytest.approx(0.4 * 8 / 12)


def test_one_callback_restored_in_a_second_learner_goes_on_there(tmp_path):
    cb = Scheduled("weight_decay", total=12)
    learner(cb, run=tmp_path / "run").fit(steps=3)
    learn = learner(cb, run=tmp_path / "run")
    learn.restore("last")
    learn.fit(steps=1)
    assert decay_of(learn) == pytest.approx(0.4 * 8 / 12)
    fresh = learner(cb)
    fresh.fit(steps=1)
    assert decay_of(fresh) == pytest.approx(0.4 * 11 / 12)


def test_a_saved_curve_waits_for_the_fit_and_can_be_saved_again(tmp_path):
    learn = learner(Scheduled("weight_decay", total=12), run=tmp_path / "run")
    learn.fit(steps=3)
    second = learner(Scheduled("weight_decay", total=12), run=tmp_path / "run")
    second.restore("last")
    assert second.cbs.get(Scheduled).state_dict() == learn.cbs.get(Scheduled).state_dict()
    second.save(note="again")
    third = learner(Scheduled("weight_decay", total=12), run=tmp_path / "run")
    third.restore("last")
    third.fit(steps=1)
    assert decay_of(third) == pytest.approx(0.4 * 8 / 12)


def test_a_saved_curve_of_another_shape_is_refused(tmp_path):
    learn = learner(Scheduled("weight_decay", "linear", total=12), run=tmp_path / "run")
    learn.fit(steps=3)
    other = learner(Scheduled("weight_decay", "cosine", total=12), run=tmp_path / "run")
    other.restore("last")
    before = decay_of(other)
    with pytest.raises(ValueError, match="the state is of scheduler 'linear', and this one is 'cosine'"):
        other.fit(steps=1)
    assert decay_of(other) == before and other.step == 3


@pytest.mark.parametrize("ending", ENDINGS)
def test_however_a_fit_ends_the_curve_is_at_the_updates_made(ending):
    smooth = LabelSmoothing(0.4)
    by_update, by_step = Scheduled("label_smoothing.amount", total=30), Scheduled("weight_decay", by="step", total=30)
    learn = end_by(learner(smooth, by_update, by_step), ending)
    assert by_update.schedule.update == learn.players[0].updates
    assert smooth.amount == pytest.approx(0.4 * (1 - learn.players[0].updates / 30))
    assert decay_of(learn) == pytest.approx(0.4 * (1 - by_step.schedule.update / 30))
    assert by_step.schedule.update in (learn.step, learn.step - 1)
    learn.fit(steps=2)
    assert by_update.schedule.update == learn.players[0].updates


# ------------------------------------------------------------------------------------------------------- by hand; refused


def test_a_hand_lies_over_the_curve():
    learn = learner(Scheduled("weight_decay"))
    learn.add(On("before_batch", lambda learn: set_knob(knob(learn, "weight_decay"), 0.7) if learn.step == 2 else None))
    learn.add(On("after_batch", lambda learn: knob(learn, "weight_decay").schedule.release() if learn.step == 4 else None))
    learn.fit(epochs=1)
    found = knob(learn, "weight_decay")
    assert isinstance(found, ScheduledKnob) and found.owner == "callback 'scheduled weight_decay'"
    assert series(learn, "weight_decay")[3:] == pytest.approx([0.7, 0.4 * 2 / 6, 0.4 / 6])


@dataclasses.dataclass(frozen=True)
class Frozen:
    amount: float = 0.3


@pytest.mark.parametrize("cbs,error,message", [
    ([Scheduled("lr", "cosine")], ValueError, r"lr is moved by the plan of player 'model' already. .* OptimBuilder\(…, sched"),
    ([Scheduled("momentum"), Scheduled("beta1")], ValueError, "beta1 is moved by callback 'scheduled momentum' already"),
    ([Scheduled("weight_decay"), Scheduled("weight_decay", to=1.0)], ValueError, "weight_decay is moved by callback"),
    ([Scheduled("weightdecay")], ValueError, r"unknown knob 'weightdecay'; accepted \(nearest first\): weight_decay"),
    ([Scheduled("weight_decay", player="critic")], ValueError, "there is no player 'critic'; there are: model"),
    ([Scheduled("label_smoothing.amount", to=1.5)], ValueError, "to: LabelSmoothing: amount must .* received 1.5"),
    ([Scheduled("beta2", "constant", warmup=2), Scheduled("beta1", to=1.2)], ValueError, "beta1: to must be >= 0 and < 1"),
    ([Scheduled((Frozen(), "amount"))], TypeError, "Frozen.amount can't be set: cannot assign to field 'amount'"),
    ([Scheduled((Frozen(), "amounts"))], ValueError, "'amounts'; accepted .nearest first.: amount"),
    ([Scheduled("weight_decay", "OneCycleLR", cycle_momentum=False, max_lr=[1, 2])], ValueError, "max_lr"),
    ([Scheduled("weight_decay", warmup=9)], ValueError, "scheduled weight_decay: warmup=9 leaves nothing of total=6"),
])  # fmt: skip
def test_what_cannot_work_is_refused_before_anything_has_changed(cbs, error, message):
    smooth = LabelSmoothing(0.1)
    learn = learner(smooth, *cbs)
    before = [p.clone() for p in learn.model.parameters()]
    with pytest.raises(error, match=message):
        learn.fit(epochs=1)
    assert smooth.amount == 0.1 and learn.step == 0 and learn.state == "idle"
    assert all(torch.equal(p, q) for p, q in zip(before, learn.model.parameters()))


@pytest.mark.parametrize("make,error,message", [
    (lambda: Scheduled("weight_decay", "cosin"), ValueError, "unknown scheduler 'cosin'; accepted"),
    (lambda: Scheduled("weight_decay", "cosine", cicles=3), TypeError, "scheduler 'cosine': unknown option 'cicles'"),
    (lambda: Scheduled("weight_decay", by="batch"), ValueError, "batch"),
    (lambda: Scheduled("weight_decay", total=0), ValueError, "total must be a whole number of updates >= 1; received 0"),
    (lambda: Scheduled("weight_decay", warmup=-1), ValueError, "warmup must be a whole number"),
    (lambda: Scheduled("weight_decay", total=5, warmup=5), ValueError, "warmup=5 leaves nothing of total=5"),
    (lambda: Scheduled("weight_decay", end=-0.5), ValueError, "end must be"),
    (lambda: Scheduled("weight_decay", to=math.nan), ValueError, "to must be a finite number; received nan"),
    (lambda: Scheduled("weight_decay", to="0"), TypeError, "to must be a number; received '0'"),
    (lambda: Scheduled("x", end=0.1, to=3), ValueError, r"give end \(a multiplier\) or to \(a value\), not both; .* to=3"),
    (lambda: Scheduled("x", "StepLR", step_size=3, to=0.1), TypeError, "unknown option 'to'"),
    (lambda: Scheduled(3), TypeError, r"a knob is a name or a pair \(object, 'attribute'\); received 3"),
    (lambda: Scheduled(("x", 3)), TypeError, r"a knob is a name or a pair .* received \('x', 3\)"),
    (lambda: Scheduled("x", player=3), TypeError, "player is the name of one, or None; received 3"),
    (lambda: Scheduled("x", "OneCycleLR", max_lr=0.3, cycle_momentum=True), ValueError, "leave cycle_momentum out"),
    (lambda: Scheduled("weight_decay", "plateau"), ValueError, "plateau must know which series of the history to follow"),
    (lambda: Scheduled("weight_decay", lambda update, total: -1.0), ValueError, "accepted: .*>= 0"),
])  # fmt: skip
def test_bad_arguments_are_errors_when_they_are_written(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_in_a_gan_one_says_whose_updates_count():
    learn = gan(InstanceNoise(0.5), Scheduled("instance_noise.std"))
    with pytest.raises(ValueError, match="whose updates .* Say player= one of 'discriminator', 'generator', or by='step'"):
        learn.fit(steps=1)
    learn = gan(InstanceNoise(0.5), Scheduled("instance_noise.std", by="step"))
    learn.fit(epochs=1)
    assert series(learn, "instance_noise.std") == pytest.approx([0.5 * (1 - u / 6) for u in range(6)])
    with pytest.raises(ValueError, match="'weight_decay' is a knob of several players"):
        gan(Scheduled("weight_decay")).fit(steps=1)


def test_a_loader_without_a_length_is_told_so():
    learn = Learner(nn.Linear(3, 4), iter([(X, Y)] * 3), "cross_entropy", cbs=Scheduled("eps"), front="none")
    with pytest.raises(ValueError, match="scheduled eps: its schedule 'linear' must know its length"):
        learn.fit(epochs=1)


# ------------------------------------------------------------------------------------------------------- looked at ahead

BEYOND = {
    "the last value is 0": (lambda: ClipGradNorm(1.0), "clip_grad_norm.max_norm", {},
                            "update 12: .*a number above 0; received 0"),
    "above": (lambda: LabelSmoothing(0.5), "label_smoothing.amount", {"shape": lambda u, t: 1 + 2 * u / t},
              "update .* from 0 to 1"),
    "for one update": (lambda: LabelSmoothing(0.5), "label_smoothing.amount",
                       {"shape": "piecewise", "boundaries": [7, 8], "values": [1, 3, 1]}, "update 8: .*received 1.5"),
    "one of torch's": (lambda: LabelSmoothing(0.5), "label_smoothing.amount",
                       {"shape": "StepLR", "step_size": 5, "gamma": 1.5}, "update 10.*received 1.125"),
    "by epochs": (lambda: ClipGradNorm(1.0), "clip_grad_norm.max_norm", {"by": "epoch"}, "epoch 2: .*received 0"),
    "endless": (lambda: LabelSmoothing(0.5), "label_smoothing.amount", {"shape": lambda u, t=None: 1 + u / 11},
                "update 12: .*1.04"),
    "an option of the optimizer": (lambda: On("before_fit", lambda learn: None), "weight_decay",
                                   {"shape": lambda u, t: 1 + 3 * u / t, "to": 2.0}, "weight_decay: .* update .* >= 0"),
}  # fmt: skip


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("what", BEYOND)
def test_a_curve_that_would_leave_the_bounds_is_refused_before_a_step(what, known):
    cb, name, options, message = BEYOND[what]
    total = {"total": 2 if "by" in options else 12} if known and what not in ("one of torch's", "endless") else {}
    learn = learner(cb(), scheduled := Scheduled(name, **total, **options))
    before = knob(learn, name).read()
    with pytest.raises(ValueError, match=message):
        learn.fit(epochs=2)
    assert learn.step == 0 and knob(learn, name).read() == before
    learn.remove(scheduled)
    learn.fit(epochs=2)
    assert learn.state == "finished"


def test_a_curve_within_the_bounds_is_not():
    clip = ClipGradNorm(1.0)
    learn = learner(clip, LabelSmoothing(0.5), Scheduled("clip_grad_norm.max_norm", end=0.01),
                    Scheduled("label_smoothing.amount", lambda u, t: 1 + u / t))  # fmt: skip
    learn.fit(epochs=2)
    assert clip.max_norm == pytest.approx(0.01) and learn.cbs.get(LabelSmoothing).amount == 1.0


@pytest.mark.parametrize("name", ["OneCycleLR", "CyclicLR"])
def test_what_cycles_a_momentum_moves_its_number_only(name, tmp_path):
    options = {"OneCycleLR": {"max_lr": 0.3}, "CyclicLR": {"base_lr": 0.1, "max_lr": 0.3, "step_size_up": 3}}[name]
    resumes(lambda run: learner(LabelSmoothing(0.2), Scheduled("label_smoothing.amount", name, **options), run=run), tmp_path,
            steps=6, at=(2, 4))  # fmt: skip
    learn = learner(LabelSmoothing(0.2), Scheduled("label_smoothing.amount", name, **options))
    learn.fit(steps=6)
    theirs = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.2)
    scheduler = getattr(torch.optim.lr_scheduler, name)(theirs, **options, cycle_momentum=False,
                                                        **({"total_steps": 6} if name == "OneCycleLR" else {}))  # fmt: skip
    expected = []
    for _ in range(6):
        expected.append(theirs.param_groups[0]["lr"])
        theirs.step()
        scheduler.step() if len(expected) < 6 else None
    assert series(learn, "label_smoothing.amount") == pytest.approx(expected)
    assert learn.players[0].opt.param_groups[0]["betas"] == (0.9, 0.99)


def test_a_state_from_before_the_first_fit(tmp_path):
    "Fresh ones can be loaded; then the number stands where it stood, and the next fit begins a new curve."
    held = {"heat": 2.0}
    cb = Scheduled((held, "heat"))
    fresh = cb.state_dict()
    assert fresh == {"schedule": {}, "last": None}
    cb.load_state_dict(fresh)
    learn = learner(LabelSmoothing(0.4), Scheduled("label_smoothing.amount"), cb, Scheduled("weight_decay"), run=tmp_path / "run")
    entry = learn.save()
    learn.fit(epochs=1)
    straight = dict(learn.history.scalars)
    assert held["heat"] == 0 and decay_of(learn) == 0
    learn.restore(entry)
    assert (held["heat"], decay_of(learn), learn.cbs.get(LabelSmoothing).amount) == (2.0, 0.4, 0.4)
    assert cb.state_dict() == fresh
    learn.fit(epochs=1)
    for name in "heat", "weight_decay", "label_smoothing.amount":
        assert learn.history.scalars[name][1].tolist() == straight[name][1].tolist()
