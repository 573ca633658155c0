"The ways a run can end, and the test that leaving and coming back makes no difference."

import os
import signal

import torch

from trainkit.callback import (
    Callback,  # fmt: skip
    CancelBatch,
    CancelEpoch,
    CancelFit,
    CancelStep,
    CancelTurn,
)

# how a fit is ended -> (event at which it happens, what is raised there; None: something else is done)
ENDINGS = {
    "finish": ("after_batch", None),
    "stop": ("after_batch", None),
    "cancel_turn": ("after_loss", CancelTurn),
    "cancel_step": ("after_loss", CancelStep),
    "cancel_batch": ("after_loss", CancelBatch),
    "cancel_epoch": ("after_batch", CancelEpoch),
    "cancel_fit": ("before_step", CancelFit),
    "error": ("before_step", RuntimeError),
    "validation_error": ("before_validate_batch", RuntimeError),
    "interrupt": ("before_step", None),
    "interrupt_twice": ("before_step", None),
}
STATES = {"stop": "stopped", "cancel_fit": "stopped", "error": "failed", "validation_error": "failed",
          "interrupt": "interrupted", "interrupt_twice": "interrupted"}  # fmt: skip  # the others finish


class Ending(Callback):
    "Makes a fit end in one of the ways, once, in the first event after step `at` has begun."

    order = 50

    def __init__(self, ending, at):
        self.ending, self.at, self.done = ending, at, False
        event, self.error = ENDINGS[ending]
        setattr(self, event, self.act)

    def act(self, learn):
        if self.done or learn.step + 1 < self.at or self.ending == "finish":
            return
        self.done = True
        if self.ending == "stop":
            learn.stop()
        elif self.ending.startswith("interrupt"):
            for _ in range(2 if self.ending == "interrupt_twice" else 1):
                os.kill(os.getpid(), signal.SIGINT)
        else:
            raise self.error(self.ending)


def end_by(learn, ending, at=3, epochs=3):
    "Run a fit that ends so in the batch of step `at`; what must travel to the caller does, and is swallowed here."
    learn.add(way := Ending(ending, at))
    try:
        learn.fit(epochs=epochs)
    except (KeyboardInterrupt, RuntimeError) as error:
        assert isinstance(error, KeyboardInterrupt) == ending.startswith("interrupt")
        assert ending in ("error", "validation_error", "interrupt", "interrupt_twice"), error
    finally:
        learn.remove(way)
    needs_valid = ending == "validation_error" and not learn.loaders.valid
    assert way.done or ending == "finish" or needs_valid, "the fit was over before it could be ended so"
    assert learn.state == ("finished" if needs_valid else STATES.get(ending, "finished"))
    return learn


def same(a, b, where="state"):
    "Two nested states are equal to the last bit (NaN equals NaN)."
    assert type(a) is type(b), f"{where}: {type(a).__name__} and {type(b).__name__}"
    if isinstance(a, torch.Tensor):
        equal = a.shape == b.shape and a.dtype == b.dtype
        assert equal and torch.equal(torch.nan_to_num(a, 7e7), torch.nan_to_num(b, 7e7)), where
    elif isinstance(a, dict):
        assert list(a) == list(b), f"{where}: {sorted(map(str, a.keys() ^ b.keys())) or 'the order of keys'}"
        for key in a:
            same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), f"{where}: lengths {len(a)} and {len(b)}"
        for i, (x, y) in enumerate(zip(a, b)):
            same(x, y, f"{where}[{i}]")
    else:
        assert a == b or (a != a and b != b), f"{where}: {a!r} and {b!r}"


def same_weights(a, b):
    "Two learners have the same weights and buffers, to the last bit."
    for one, other in zip(a.players, b.players, strict=True):
        for (name, module), twin in zip(one.modules.items(), other.modules.values(), strict=True):
            same(dict(module.state_dict()), dict(twin.state_dict()), name)


def resumes(make, tmp_path, steps=12, at=(1, 5, 8)):
    "Left at each of the steps, restored by a fresh learner and taken to the end, a run is bit for bit the uninterrupted one."
    straight = make(None)
    straight.fit(steps=steps)
    for step in at:
        first = make(tmp_path / f"at{step}")
        first.add(stop := Stop(step))
        first.fit(steps=steps)
        assert first.step == step, "a callback of its own ended the fit earlier"
        first.remove(stop)
        torch.rand(7)  # what somebody did in between
        second = make(tmp_path / f"at{step}")
        second.restore("last")
        second.fit()
        assert second.step == straight.step
        same_weights(straight, second)
        a, b = straight.state_dict(), second.state_dict()
        for part in ("players", "callbacks", "rng"):
            mine = {k: v for k, v in b[part].items() if k != "auto_save"}
            same({k: v for k, v in a[part].items()}, mine, f"left at {step}: {part}")
        for name, (steps_, values) in straight.history.scalars.items():
            assert second.history.scalars[name][0].tolist() == steps_.tolist(), f"left at {step}: steps of {name}"
            same(torch.tensor(values), torch.tensor(second.history.scalars[name][1]), f"left at {step}: {name}")


class Stop(Callback):
    "Stops the fit after a step."

    order = 60

    def __init__(self, at):
        self.at = at

    def after_batch(self, learn):
        if learn.step == self.at:
            learn.stop()
