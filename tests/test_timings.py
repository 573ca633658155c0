"Where the time of a training went: every moment is charged once, however the fit ends."

import threading
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from trainkit.callback import Callback, CancelBatch, CancelFit, CancelTurn, On
from trainkit.gan.learner import GANLearner
from trainkit.learner import Learner
from trainkit.timings import Ledger, Timings, timings_of

X = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))


class Steady:
    "A clock that moves when it is told to."

    now = 0.0

    def __call__(self):
        return self.now


def learner(clock=None, valid=True, **kw):
    torch.manual_seed(0)
    dl = [(X, X.sum(1, keepdim=True))] * 4
    learn = Learner(nn.Linear(3, 1), (dl, dl[:1]) if valid else dl, "mse", front="none", **kw)
    if clock is not None:
        learn.ledger.clock = clock
    return learn


class Wait(Callback):
    "Takes so many seconds, at each event of that name."

    many = True

    def __init__(self, clock, event, seconds):
        def wait(learn):
            clock.now += seconds

        setattr(self, event, wait)
        self.account = f"{event} {seconds:g}"


# ------------------------------------------------------------------------------------------------------------- ledger


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 9)), max_size=30))
def test_accounts_add_up_to_what_has_passed(moves):
    clock = Steady()
    ledger, expected, at = Ledger(clock), {"start": 0.0}, "start"
    ledger.begin("start")
    for account, seconds in moves:
        clock.now += seconds
        expected[at] = expected.get(at, 0.0) + seconds
        assert ledger.switch(account) == at
        at = account
    found = timings_of(ledger, len(moves))
    assert {k: v for k, v in found.seconds.items() if v} == {k: v for k, v in expected.items() if v}
    assert found.total == clock.now and found.steps == len(moves)


def test_nobodys_time_and_pauses_are_no_part_of_the_whole():
    clock = Steady()
    ledger = Ledger(clock)
    clock.now += 5
    ledger.switch("work")
    clock.now += 2
    with pytest.raises(KeyError), ledger.on("paused"):
        clock.now += 7
        raise KeyError
    found = timings_of(ledger, 0)
    assert found.seconds["paused"] == 7 and found.total == 2 and found.share("work") == 1 and ledger.at == "work"
    assert "paused" in repr(found).splitlines()[-1] and "ms a step" not in repr(found)


def test_what_is_shown():
    text = repr(Timings({"data": 0.5, "generator's turn": 1.5}, steps=100))
    assert [line.split() for line in text.splitlines()] == [
        ["generator's", "turn", "1.50", "s", "75.0%", "15.000", "ms", "a", "step"],
        ["data", "0.50", "s", "25.0%", "5.000", "ms", "a", "step"],
        ["in", "all", "2.00", "s", "20.000", "ms", "a", "step"],
    ]


# ---------------------------------------------------------------------------------------------------------------- fit


def test_each_moment_of_a_fit_is_charged_once(tmp_path):
    clock = Steady()
    learn = learner(clock, run=tmp_path / "run", save_every="none")
    learn.add(*[Wait(clock, event, 2.0**i) for i, event in enumerate(
        ("before_fit", "after_forward", "after_step", "before_validate", "after_validate_batch", "cleanup_fit"))])  # fmt: skip
    learn.add(On("after_epoch", lambda learn: learn.save()))
    learn.fit(3)
    found = learn.timings()
    assert dict(found.seconds) | {"data": 0.0} == {
        "before_fit 1": 1, "after_forward 2": 2 * 12, "after_step 4": 4 * 12, "before_validate 8": 8 * 3,
        "after_validate_batch 16": 16 * 3, "cleanup_fit 32": 32, "model's turn": 0, "the loop": 0, "validation": 0,
        "checkpoint": 0, "On": 0, "data": 0, "commands": 0}  # fmt: skip
    assert found.total == clock.now and found.steps == 12
    learn.fit(1, schedule="hold")
    assert learn.timings().steps == 4  # of the last fit


def test_loading_is_charged_to_data_and_a_model_to_its_turn():
    clock = Steady()

    class Loader:
        def __iter__(self):
            for _ in range(5):
                clock.now += 3
                yield X, X[:, :1]

    class Net(nn.Linear):
        def forward(self, x):
            clock.now += 0.5
            return super().forward(x)

    learn = Learner(Net(3, 1), Loader(), "mse", front="none")
    learn.ledger.clock = clock
    learn.fit(2)
    assert learn.timings().seconds["data"] == 30 and learn.timings().seconds["model's turn"] == 5


def test_players_have_accounts_of_their_own():
    g, d = nn.Linear(2, 3), nn.Sequential(nn.Linear(3, 1), nn.Flatten(0))
    learn = GANLearner(g, d, [X] * 6, latent=2, n_critic=3, front="none")
    learn.fit(1)
    assert {"generator's turn", "discriminator's turn"} <= {*learn.timings().seconds}


@pytest.mark.parametrize("cancel", [CancelTurn, CancelBatch, CancelFit, KeyboardInterrupt, ValueError])
@pytest.mark.parametrize("event", ["before_batch", "after_loss", "after_step", "before_validate", "cleanup_turn"])
def test_however_a_fit_ends_the_books_are_closed(cancel, event):
    clock = Steady()
    learn = learner(clock)

    def end(learn):
        clock.now += 1
        if learn.step == 2 or event == "before_validate":
            raise cancel

    learn.add(On(event, end))
    try:
        learn.fit(2)
    except BaseException as error:
        assert isinstance(error, cancel)
    spent = learn.timings().total
    clock.now += 100
    assert learn.timings().total == spent and learn.ledger.at == ""
    assert spent >= 1


def test_a_pause_is_not_training():
    learn = learner(valid=False)
    resumed = threading.Timer(0.5, lambda: learn.send("resume"))

    def pause(learn):
        if learn.step == 2:
            learn.send("pause")
            resumed.start()

    learn.add(On("after_batch", pause))
    learn.fit(2)
    resumed.join()
    assert learn.timings().seconds["paused"] > 0.2
    assert learn.timings().total < learn.timings().seconds["paused"] + 60 and "paused" in repr(learn.timings())


def test_they_can_be_read_while_it_trains():
    learn, seen = learner(), []
    learn.add(On("after_step", lambda learn: seen.append((learn.timings(), time.sleep(0.001)))))
    learn.fit(1)
    totals = [found.total for found, _ in seen]
    assert totals == sorted(totals) and totals[-1] > totals[0] and seen[-1][0].seconds["On"] > 0
