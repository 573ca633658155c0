"When a fit ends by itself, and what the best of several loaders is."

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from ways import ENDINGS, end_by, resumes

from trainkit.callback import CancelValidate, On
from trainkit.callbacks.stopping import EarlyStopping, Patience, Score, nearest, whole
from trainkit.learner import Learner
from trainkit.player import Player

X = torch.randn(16, 3, generator=torch.Generator().manual_seed(0))
Y = X.sum(1, keepdim=True)
NAN, INF = math.nan, math.inf


class Told(Learner):
    "Its validation losses are told in advance: one for each epoch, or for each validation by the number of steps."

    told: dict

    def validation_step(self, batch):
        return self.told[self.loader][self.epoch if self.target.validate_every is None else self.step - 1]


def told(losses, *cbs, run=None, players=None, **kw):
    torch.manual_seed(0)
    losses = losses if isinstance(losses, dict) else {"valid": losses}
    data = {"train": (X, Y), **{name: (X, Y) for name in losses}}
    model, loss = (nn.Linear(3, 1), "mse") if players is None else (players, None)
    learn = Told(model, data, loss, cbs=cbs, front="none", batch_size=8, run=run, **kw)
    learn.told = losses
    return learn


def trained(*cbs, run=None, batch_size=4, **kw):
    "Really validates; four steps an epoch."
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.2), nn.Linear(4, 1))
    data = {"train": (X, Y), "a": (X[:8], Y[:8]), "b": (X[8:], Y[8:])}
    return Learner(net, data, "mse", "adam", cbs=cbs, front="none", batch_size=batch_size, run=run, **kw)


# ------------------------------------------------------------------------------------------------------- early stopping


def reference(values, mode, patience, min_delta):
    "After how many values the rule ends, by looking at the whole list each time."
    sign = -1 if mode == "min" else 1
    for end in range(1, len(values) + 1):
        best, since = None, 0
        for value in values[:end]:
            if math.isfinite(value) and (best is None or sign * (value - best) > min_delta):
                best, since = value, 0
            else:
                since += 1
        if since >= patience:
            return end
    return None


@given(st.lists(st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0, NAN, INF, -INF]), min_size=1, max_size=12),
       st.sampled_from(["min", "max"]), st.integers(1, 4), st.sampled_from([0.0, 0.25]))  # fmt: skip
def test_patience_is_the_rule(values, mode, patience, min_delta):
    rule, end = Patience("", mode, patience, min_delta), None
    for i, value in enumerate(values):
        rule.take(value, mode)
        if rule.stopped:
            end = i + 1
            break
    assert end == reference(values, mode, patience, min_delta)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.sampled_from([0.0, 0.5, 1.0, NAN]), min_size=6, max_size=6), st.integers(1, 3), st.booleans())
def test_a_fit_ends_by_the_rule(values, patience, by_steps):
    learn = told(values, EarlyStopping(patience=patience))
    learn.fit(**({"steps": 6, "validate_every": 1} if by_steps else {"epochs": 6}))
    end = reference(values, "min", patience, 0.0)
    assert (learn.step if by_steps else learn.epoch) == (end or 6)
    assert learn.state == ("finished" if end in (None, 6) else "stopped")
    marks = [m for m in learn.history.marks if m.kind == "early_stopping"]
    assert len(marks) == (end is not None)


def test_nan_is_no_improvement():
    "BasicTS resets the patience at each NaN and never stops after a divergence (B7)."
    learn = told([1.0] + [NAN] * 9, EarlyStopping(patience=3))
    learn.fit(epochs=10)
    assert learn.epoch == 4
    (mark,) = [m for m in learn.history.marks if m.kind == "early_stopping"]
    assert "valid/loss: nothing better than 1 in 3 validations" in mark.text


def test_a_later_fit_has_a_fresh_patience_and_the_same_best(tmp_path):
    learn = told([1.0, 0.5, 0.6, 0.6, 0.7, 0.7, 0.4, 0.8], EarlyStopping(patience=2), run=tmp_path / "run")
    learn.fit(epochs=8)
    assert learn.epoch == 4
    again = told(learn.told, EarlyStopping(patience=2), run=tmp_path / "run")
    again.restore("last")
    for one in (learn, again):  # at once, or by somebody who comes back
        one.fit()
        assert (one.epoch, one.cbs.get(EarlyStopping).best) == (6, 0.5)
        one.fit()
        assert (one.epoch, one.state, one.cbs.get(EarlyStopping).best) == (8, "finished", 0.4)


def test_patience_survives_a_restart(tmp_path):
    "audiozen forgets how long it has waited (A7)."
    losses = [1.0, 0.5, 0.6, 0.6, 0.6, 0.6]
    first = told(losses, EarlyStopping(patience=4), run=tmp_path / "run")
    first.fit(epochs=4)
    second = told(losses, EarlyStopping(patience=4), run=tmp_path / "run")
    second.restore()
    assert (second.cbs.get(EarlyStopping).waited, second.cbs.get(EarlyStopping).best) == (2, 0.5)
    second.fit(epochs=9)
    assert second.epoch == 6


def test_going_back_takes_the_patience_along(tmp_path):
    learn = told([1.0, 0.5, 0.6, 0.6, 0.4, 0.4], EarlyStopping(patience=2), run=tmp_path / "run")
    learn.fit(epochs=6)
    learn.restore("best")
    assert (learn.epoch, learn.cbs.get(EarlyStopping).waited) == (2, 0)
    learn.told = {"valid": [1.0, 0.5, 0.3, 0.4, 0.4, 0.4]}
    learn.fit(epochs=4)
    assert (learn.epoch, learn.cbs.get(EarlyStopping).best) == (5, 0.3)


def test_resumption_is_exact(tmp_path):
    resumes(lambda run: trained(EarlyStopping("valid.a/loss", patience=100), Score({"valid.a/loss": 1.0, "valid.b/loss": 2.0}),
                                run=run), tmp_path, at=(1, 4, 6))  # fmt: skip


@pytest.mark.parametrize("ending", ENDINGS)
def test_every_ending_leaves_it_ready(ending):
    "Whatever ends a fit, a validation afterwards is not counted, and the next fit is."
    learn = told([1.0, 0.5, 0.75, 0.75, 0.75, 0.75, 0.75, 0.75, 0.75], stopper := EarlyStopping(patience=3))
    end_by(learn, ending, at=3, epochs=2)
    seen = stopper.best, stopper.waited
    learn.validate()
    assert (stopper.best, stopper.waited) == seen
    learn.fit(epochs=6)
    assert stopper.best == 0.5 and learn.epoch <= 5


def test_what_is_counted():
    "A look at other data and a cancelled validation are no validations of the run."
    stopper = EarlyStopping(patience=2)
    learn = told([1.0] * 5, stopper)
    learn.add(On("after_epoch", lambda learn: learn.validate((X, Y)), order=-1))

    def cancel(learn):
        if learn.epoch == 1:
            raise CancelValidate

    learn.add(On("before_validate", cancel))
    learn.fit(epochs=4)
    assert learn.epoch == 4 and len(learn.history.scalars["valid/loss"][1]) == 3


def test_without_validation_a_training_series_counts_by_its_mean():
    torch.manual_seed(0)
    told_losses = iter([4.0, 0.0, 3.0, 0.5, 1.0, 2.5, 2.0, 2.0])  # the means of two steps: 2, 1.75, 1.75, 2

    def replace(learn):
        learn.loss = learn.loss * 0 + next(told_losses)

    learn = Learner(nn.Linear(3, 1), (X, Y), "mse", cbs=[EarlyStopping(patience=2), On("after_loss", replace)], front="none",
                    batch_size=8)  # fmt: skip
    learn.fit(epochs=4)
    assert (learn.epoch, learn.cbs.get(EarlyStopping).best) == (4, 1.75)
    assert any("2 epochs" in m.text for m in learn.history.marks if m.kind == "early_stopping")


def test_which_series():
    learn = told([1.0, 2.0, 3.0], EarlyStopping(patience=1), monitor="valid/loss", mode="max")
    learn.fit(epochs=3)
    assert learn.epoch == 3, "the learner's own monitor, and its mode"
    learn = told({"a": [1.0, 2.0, 3.0], "b": [1.0, 0.5, 0.25]}, EarlyStopping("valid.b/loss", patience=1))
    learn.fit(epochs=3)
    assert learn.epoch == 3
    learn = told({"a": [1.0, 2.0, 3.0], "b": [1.0, 0.5, 0.25]}, EarlyStopping("valid.a/loss", patience=1))
    learn.fit(epochs=3)
    assert learn.epoch == 2
    with pytest.raises(ValueError, match=r"which series\? .*attach a Score.*valid\.a/loss"):
        told({"a": [1.0], "b": [1.0]}, EarlyStopping()).fit(epochs=1)


def test_a_score_that_comes_later_begins_anew():
    stopper = EarlyStopping(patience=2)
    learn = told([0.1, 0.2, 5.0, 5.0, 5.0, 5.0], stopper)
    learn.fit(epochs=1)
    assert (stopper.series, stopper.best) == ("valid/loss", 0.1)
    learn.add(Score({"valid/loss": -1.0}))
    learn.fit(epochs=1)
    assert (stopper.series, stopper.best, stopper.waited) == ("valid/score", -0.2, 0)


def test_what_is_recorded_at_the_end_of_an_epoch_is_in_time():
    learn = told([1.0] * 4, EarlyStopping("valid/fid", patience=2))
    learn.add(On("after_epoch", lambda learn: learn.history.add("valid/fid", 3.0, learn.step)))
    learn.fit(epochs=4)
    assert learn.epoch == 3


@pytest.mark.parametrize("how", [{"epochs": 3}, {"steps": 6, "validate_every": 1}])
def test_an_unknown_monitor_is_named(how):
    learn = told([1.0] * 6, EarlyStopping("valid/los", "min"))
    with pytest.raises(ValueError, match=r"monitor='valid/los' is not recorded; did you mean valid/loss"):
        learn.fit(**how)
    assert learn.step == 2 and learn.state == "failed"
    learn.add(EarlyStopping(patience=1))  # the cell again, put right
    learn.fit(epochs=3)
    assert learn.cbs.get(EarlyStopping).stopped


def test_several_players():
    class Two(Told):
        def training_step(self, batch):
            (net,) = self.player.modules.values()
            return (net(batch[0]) - batch[1]).square().mean()

    torch.manual_seed(0)
    learn = Two([Player("a", nn.Linear(3, 1)), Player("b", nn.Linear(3, 1), every=2)], {"train": (X, Y), "valid": (X, Y)},
                cbs=EarlyStopping(patience=1), front="none", batch_size=8)  # fmt: skip
    learn.told = {"valid": [1.0, 1.0, 1.0]}
    learn.fit(epochs=3)
    assert learn.epoch == 2


@pytest.mark.parametrize("kw,message", [
    ({"patience": 0}, "patience must be a whole number >= 1; received 0"),
    ({"patience": 2.0}, "received 2.0"),
    ({"patience": True}, "received True"),
    ({"min_delta": -0.1}, "min_delta must be a number >= 0; received -0.1"),
    ({"min_delta": NAN}, "received nan"),
    ({"min_delta": "much"}, "received 'much'"),
    ({"mode": "maximum"}, "mode is 'min', 'max' or ''.*received 'maximum'"),
    ({"monitor": "valid/entropy"}, "is more of it better, or less"),
    ({"monitor": 3}, "the name of a series; received 3"),
])  # fmt: skip
def test_bad_arguments(kw, message):
    with pytest.raises((TypeError, ValueError), match=message):
        EarlyStopping(**kw)


def test_helpers():
    assert whole("A", "b", torch.tensor(3), 0) == 3
    assert nearest("x", []) == "there are: none"


# ---------------------------------------------------------------------------------------------------------------- score

A, B = [1.0, 0.2, 0.1, 0.4], [1.0, 0.3, 0.9, 0.3]  # each loader has a best epoch of its own; the sum is least in the second


@pytest.mark.parametrize("of", [{"valid.a/loss": -1.0, "valid.b/loss": -1.0},
                                lambda found: -found["valid.a/loss"] - found["valid.b/loss"]])  # fmt: skip
def test_the_best_is_the_best_by_the_score(of, tmp_path):
    learn = told({"a": A, "b": B}, Score(of), run=tmp_path / "run")
    learn.fit(epochs=4)
    steps, values = learn.history.scalars["valid/score"]
    assert steps.tolist() == [2, 4, 6, 8] and values == pytest.approx([-a - b for a, b in zip(A, B)])
    again = told({"a": A, "b": B}, Score(of), run=tmp_path / "run")
    assert again.restore("best").step == 4 and again.epoch == 2


def test_the_best_survives_a_restart(tmp_path):
    "super-resolution saves -1 for the best score and audiozen -inf: there, the first validation after a restart wins (S1, A7)."
    def make(losses):
        return told(losses, Score({"valid.a/loss": -0.5, "valid.b/loss": -0.5}), run=tmp_path / "run")

    first = make({"a": [0.5, 0.1], "b": [0.5, 0.1]})
    first.fit(epochs=2)
    second = make({"a": [0, 0, 0.3, 0.2], "b": [0, 0, 0.3, 0.2]})
    second.restore()
    second.fit(epochs=2)
    assert second.checkpoints.best.step == 4 and second.checkpoints.best.score == pytest.approx(-0.1)
    third = make({"a": [0] * 4 + [0.05], "b": [0] * 4 + [0.05]})
    third.restore()
    third.fit(epochs=1)
    assert make({"a": A, "b": B}).restore("best").step == 10


def test_the_best_is_not_the_last(tmp_path):
    "super-resolution's restore takes the latest checkpoint for the best one (S2)."
    learn = told({"a": A, "b": B}, Score({"valid.a/loss": 1.0, "valid.b/loss": 1.0}, "valid/loss"), EarlyStopping(patience=2),
                 run=tmp_path / "run")  # fmt: skip
    learn.fit(epochs=4)
    assert (learn.restore("last").step, learn.restore("best").step) == (8, 4)


def test_the_score_is_there_before_it_is_needed():
    "Early stopping and saving see this validation's score, whatever the order of attachment."
    learn = told({"a": A, "b": B}, EarlyStopping(patience=1))
    learn.add(Score({"valid.a/loss": -1.0, "valid.b/loss": -1.0}))
    learn.fit(epochs=4)
    assert (learn.epoch, learn.cbs.get(EarlyStopping).best) == (3, pytest.approx(-0.5))


def test_what_is_saved_at_a_validation_knows_it(tmp_path):
    "Score, early stopping, saving: in this order, also for validations inside an epoch."
    losses = {"a": [0.5, 0.25, 0.25, 0.125, 0.25, 0.25], "b": [0.5, 0.25, 0.5, 0.125, 0.25, 0.25]}

    def make():
        cbs = [EarlyStopping(patience=9), Score({"valid.a/loss": -1.0, "valid.b/loss": -1.0})]
        return told(losses, *cbs, run=tmp_path / "run", save_every=1, keep=9)

    make().fit(steps=6, validate_every=1)
    found = {}
    for step in (1, 2, 3, 5):
        learn = make()
        learn.restore(step)
        stopper = learn.cbs.get(EarlyStopping)
        found[step] = stopper.best, stopper.waited
    assert found == {1: (-1.0, 0), 2: (-0.5, 0), 3: (-0.5, 1), 5: (-0.25, 1)}
    assert make().restore("best").step == 4


def test_a_restore_that_knows_nothing_of_it_begins_anew(tmp_path):
    stopper = EarlyStopping(patience=3)
    learn = told([0.9, 0.2, 0.1, 0.1], run=tmp_path / "run")
    learn.fit(epochs=1)
    learn.add(stopper)
    learn.fit(epochs=2)
    assert stopper.best == 0.1
    learn.restore(2)
    learn.told = {"valid": [0.9, 0.8, 0.7, 0.6]}
    learn.fit(epochs=1)
    assert (stopper.best, stopper.waited) == (0.8, 0)


def test_metrics_of_other_callbacks_are_part_of_it_and_several_scores():
    scores = [Score({"valid/loss": 1.0, "valid/fid": 2.0}, "valid/sum"), Score({"valid/loss": 1.0}, "valid/copy")]
    learn = told([0.5, 0.25], *scores, On("after_validate", lambda learn: learn.history.add("valid/fid", 3.0, learn.step)))
    learn.fit(epochs=2)
    assert learn.history.scalars["valid/sum"][1].tolist() == [6.5, 6.25]
    assert learn.history.scalars["valid/copy"][1].tolist() == [0.5, 0.25]
    learn.told = {"valid": [0, 0, 1.0]}
    learn.validate()  # by hand, recorded
    learn.validate((X, Y))  # of other data, not recorded
    assert learn.history.scalars["valid/sum"][1].tolist() == [6.5, 6.25, 7.0]


@pytest.mark.parametrize("of", [{"valid.a/los": 1.0}, lambda found: found["valid.a/los"]])
def test_a_missing_series_is_named(of):
    with pytest.raises(ValueError, match=r"'valid.a/los' is not among what the validation found; did you mean valid.a/loss"):
        told({"a": [1.0], "b": [1.0]}, Score(of)).fit(epochs=1)


def test_a_key_error_of_the_functions_own_is_its_own():
    weights = {"a": 1.0}
    with pytest.raises(KeyError, match="^'b'"):
        told({"a": [1.0], "b": [1.0]}, Score(lambda found: weights["b"] * found["valid.b/loss"])).fit(epochs=1)


def test_a_series_that_is_recorded_already():
    with pytest.raises(ValueError, match="'valid/loss' is recorded already"):
        told([1.0], Score(lambda found: 0.0, "valid/loss")).fit(epochs=1)
    with pytest.raises(ValueError, match="'valid/score' is recorded already"):
        told([1.0], Score({"valid/loss": 1.0}), Score({"valid/loss": 2.0})).fit(epochs=1)


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_score_after_every_ending(ending):
    learn = told({"a": [1.0] * 5, "b": [2.0] * 5}, Score({"valid.a/loss": 1.0, "valid.b/loss": 1.0}))
    end_by(learn, ending, at=3, epochs=2)
    learn.fit(epochs=1)
    steps = learn.history.scalars["valid/score"][0].tolist()
    assert steps == learn.history.scalars["valid.a/loss"][0].tolist() and steps[-1] == learn.step


@pytest.mark.parametrize("args,message", [
    (({},), "received {}"),
    ((["valid/loss"],), "or a function"),
    (({"valid/loss": NAN},), "the weight of 'valid/loss' must be a finite number; received nan"),
    (({"valid/loss": True},), "received True"),
    (({"valid/score": 1.0},), "a name of its own; received 'valid/score'"),
    (({"valid/loss": 1.0}, ""), "received ''"),
])  # fmt: skip
def test_bad_scores(args, message):
    with pytest.raises((TypeError, ValueError), match=message):
        Score(*args)
