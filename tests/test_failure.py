"""Errors: what they say, that they let go of everything, and that the batch can be run again."""

import copy
import gc
import sys
import traceback
import warnings
import weakref

import pytest
import torch
from steered import until
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from ways import ENDINGS, Ending, same, same_weights

from trainkit.callback import Callback, On
from trainkit.callbacks.average import EMA
from trainkit.failure import bytes_of, chain_of, is_out_of_memory, memory_by, tensors_in
from trainkit.gan.learner import GANLearner
from trainkit.learner import Learner
from trainkit.optim import OptimBuilder
from trainkit.player import Player

X = torch.randn(48, 4, generator=torch.Generator().manual_seed(0))
DATA = TensorDataset(X, X.sum(1, keepdim=True))


class Bomb(nn.Module):
    "Fails in a forward, on what it likes."

    def __init__(self, error=None, at=5, training=True):
        super().__init__()
        self.body, self.at, self.when, self.count = nn.Linear(4, 1), at, training, 0
        self.error = error or RuntimeError("the bomb")

    def forward(self, x):
        h = self.body(x)
        if self.training == self.when:
            self.count += 1
            if self.count >= self.at:
                activations = h * 2  # alive as long as this frame is
                ALIVE.extend(map(weakref.ref, (h, activations, x)))
                raise self.error
        return h


ALIVE = []


def learner(module=None, cbs=(), workers=0, opt="adam", **kw):
    torch.manual_seed(0)
    module = Bomb() if module is None else module
    train = DataLoader(DATA, 8, shuffle=True, num_workers=workers)
    return Learner(module, (train, DataLoader(DATA, 8)), "mse", opt, front="none", cbs=cbs, seed=1, **kw)


def failing(learn, background=False, **kw):
    "The error with which a fit fails."
    with pytest.raises(Exception) as caught:
        learn.fit(**(kw or {"epochs": 3}), background=background)
        learn.wait()
    return caught.value


def players_for(where):
    "Two players, of whom the second fails."

    def step(name):
        def run(learn, batch):
            net = next(iter(learn.player_named(name).modules.values()))
            loss = (net(batch[0]) - batch[1]).square().mean() * (1 + torch.rand(()))
            if where == name and learn.step == 4:
                raise ValueError(f"{loss.item():.6f}")
            return loss

        return run

    return [Player(name, nn.Linear(4, 1), opt="adam", step=step(name)) for name in ("first", "second")]


# ---- what an error says


@pytest.mark.parametrize("event", ["before_fit", "before_epoch", "before_batch", "before_turn", "after_forward",
                                   "after_loss", "before_backward", "after_backward", "before_step", "after_step",
                                   "after_turn", "after_batch",
                                   "before_validate", "before_validate_batch", "after_validate_batch", "after_validate",
                                   "after_epoch", "cleanup_turn", "cleanup_batch", "cleanup_epoch",
                                   "cleanup_validate"])  # fmt: skip
def test_every_event_and_the_callback_are_named(event):
    class Clumsy(Callback):
        pass

    setattr(Clumsy, event, lambda self, learn: 1 / 0)
    learn = learner(nn.Linear(4, 1), cbs=[Clumsy()])
    error = failing(learn)
    found = learn.failure
    assert (found.event, found.callback, found.epoch) == (event, "Clumsy", 1)
    in_turn = event.split("_")[1] in ("turn", "forward", "loss", "backward", "step")
    assert found.player == ("model" if in_turn else "")
    assert (found.batch_idx == 1) == (in_turn or event.endswith("_batch") and "validate" not in event)
    if found.batch_idx:
        assert (found.step, found.batches, len(found.batch[0])) == (1, 6, 8)
        assert f"{event} of Clumsy" in str(found) and "batch 1 of 6" in str(found)
    assert error.__notes__ == [f"({found}; learn.replay_batch() runs the batch again)" if found.batch else f"({found})"]
    assert [m.data["where"] for m in learn.history.marks if m.kind == "failed"] == [str(found)]
    assert learn.status()["error"] == f"ZeroDivisionError: division by zero ({found})"


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tracebacks show notes from 3.11 on")
def test_the_place_is_printed_below_the_message():
    error = failing(learner())
    assert "".join(traceback.format_exception(error)).splitlines()[-1].startswith("(forward, turn of player 'model'; step 5")


def test_a_function_at_an_event_is_named():
    learn = learner(nn.Linear(4, 1), cbs=[On("before_step", lambda learn: 1 / 0)])
    failing(learn)
    assert learn.failure.callback == "On('before_step', <lambda>)"


class Backward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 1

    @staticmethod
    def backward(ctx, g):
        raise RuntimeError("in the backward")


class Broken(torch.optim.SGD):
    def step(self, closure=None):
        raise RuntimeError("in the step")


@pytest.mark.parametrize(("what", "event"), [("backward", "backward"), ("step", "optimizer step"), ("valid", "validation"),
                                             ("load", "loading of the next batch")])  # fmt: skip
def test_what_the_loop_itself_did_is_named(what, event):
    class Net(nn.Linear):
        def forward(self, x):
            h = super().forward(x)
            return Backward.apply(h) if what == "backward" else h

    class Data(torch.utils.data.Dataset):
        def __len__(self):
            return 16

        def __getitem__(self, i):
            if what == "load" and i == 9:
                raise KeyError(i)
            return X[i], X[i].sum(0, keepdim=True)

    net = Bomb(at=2, training=False) if what == "valid" else Net(4, 1)
    loader = DataLoader(Data(), 4)
    learn = Learner(net, (loader, loader), "mse", OptimBuilder(Broken if what == "step" else "sgd", lr=0.1), front="none")
    failing(learn)
    assert (learn.failure.event, learn.failure.callback) == (event, "")
    assert (learn.failure.loader, learn.failure.batch is None) == ("valid" if what == "valid" else "", what == "load")


def test_the_player_is_named():
    learn = Learner(players_for("second"), DataLoader(DATA, 8), front="none")
    failing(learn)
    assert (learn.failure.player, learn.failure.step, learn.failure.batch_idx) == ("second", 5, 5)


def test_a_later_error_in_the_tidying_up_does_not_hide_the_place():
    learn = learner(cbs=[On("cleanup_fit", lambda learn: 1 / 0)])
    error = failing(learn)
    assert isinstance(error, ZeroDivisionError) and learn.error is error
    assert learn.failure.event == "forward" and "bomb" in learn.failure.error


def test_the_next_fit_forgets_the_failure():
    learn = learner(Bomb(at=3))
    failing(learn)
    assert learn.failure is not None
    learn.model.at = 10**6
    learn.fit()
    assert learn.failure is None and learn.status()["error"] == ""


def test_a_cancelled_or_finished_fit_has_no_failure():
    for ending in ("finish", "stop", "cancel_fit", "cancel_batch"):
        learn = learner(nn.Linear(4, 1), cbs=[Ending(ending, 3)])
        learn.fit(epochs=1)
        assert learn.failure is None and learn.error is None


def test_an_error_that_takes_no_note_travels_all_the_same():
    class Bare(Exception):
        def __setattr__(self, name, value):
            if name == "__notes__":
                raise AttributeError(name)
            super().__setattr__(name, value)

    learn = learner(Bomb(Bare("bare")))
    assert isinstance(failing(learn), Bare)
    assert learn.failure.event == "forward"


def test_a_place_that_cannot_be_told_does_not_replace_the_error():
    class Odd(Callback):
        def before_step(self, learn):
            self.bad = True
            raise ValueError("mine")

        def __eq__(self, other):
            raise TypeError("odd")

        __hash__ = object.__hash__

    learn = learner(nn.Linear(4, 1), cbs=[Odd()])
    learn._on["before_step"] = ((lambda learn: (_ for _ in ()).throw(ValueError("mine")), "Odd"),)
    assert "mine" in str(failing(learn))


# ---- nothing stays alive


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("workers", [0, 2])
def test_the_traceback_keeps_no_tensor(background, workers, capsys):
    ALIVE.clear()
    learn = learner(Bomb(), workers=workers)
    error = failing(learn, background)
    assert error.__traceback__ is not None and learn.error is error and len(ALIVE) == 3
    gc.collect()
    kept = list(tensors_in(learn.failure.batch))
    assert [ref() for ref in ALIVE if ref() is not None and not any(ref() is t for t in kept)] == []
    assert all(p.grad is None for p in learn.model.parameters())
    assert (learn.batch, learn.pred, learn.loss, learn.losses, learn._raw) == (None, None, None, {}, None)
    if workers == 0:
        learn.model.at = 10**6
        learn.fit()
        assert learn.state == "finished"


def test_the_causes_keep_none_either():
    def first():
        big = torch.zeros(3)
        ALIVE.append(weakref.ref(big))
        raise KeyError("first")

    def both(learn):
        try:
            first()
        except KeyError as error:
            raise ValueError("second") from error

    ALIVE.clear()
    learn = learner(nn.Linear(4, 1), cbs=[On("after_loss", both)])
    error = failing(learn)
    gc.collect()
    assert len(chain_of(error)) == 2 and ALIVE[0]() is None


def test_a_failed_learner_is_freed():
    learn = learner(cbs=[EMA()])
    try:
        learn.fit(epochs=1)
    except RuntimeError:
        pass
    refs = [weakref.ref(learn), weakref.ref(next(learn.model.parameters()))]
    del learn
    gc.collect()
    assert [ref() for ref in refs] == [None, None]


# ---- out of memory


@pytest.mark.parametrize("error", [RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"),
                                   RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
                                   torch.OutOfMemoryError("oom"), MemoryError()])  # fmt: skip
@pytest.mark.parametrize("background", [False, True])
def test_out_of_memory_says_what_used_it_and_leaks_nothing(error, background):
    ALIVE.clear()
    learn = learner(Bomb(error, at=4), cbs=[EMA()])
    assert failing(learn, background) is error
    said = learn.failure.memory
    assert error.__notes__[-2] == said
    for what in ("parameters", "gradients", "optimizers", "ema", "batch"):
        assert what in said, said
    del error.__notes__
    gc.collect()
    kept = list(tensors_in(learn.failure.batch))
    assert not [ref for ref in ALIVE if ref() is not None and not any(ref() is t for t in kept)]
    assert all(p.grad is None for p in learn.model.parameters())
    learn.model.at = 10**6
    learn.fit()
    assert learn.state == "finished"


def test_memory_is_counted_as_it_is():
    learn = learner(nn.Linear(4, 1), cbs=[EMA()])
    learn.fit(epochs=1)
    used = memory_by(learn, X)
    assert used["parameters"] == used["gradients, when all are there"] == 5 * 4
    assert used["optimizers"] == 2 * 5 * 4 + 2 * 4  # Adam's two moments, and a step count for each tensor
    assert used["ema"] >= 5 * 4 and used["batch"] == X.numel() * 4
    tied = nn.Linear(3, 3)
    assert bytes_of([tied.weight, tied.weight.T, tied.weight.detach()]) == 36


def test_other_errors_are_not_taken_for_it():
    assert not is_out_of_memory(ValueError("out of memory")) and not is_out_of_memory(RuntimeError("shapes"))
    learn = learner()
    failing(learn)
    assert learn.failure.memory == ""


# ---- once more


def state_of(learn):
    state = copy.deepcopy(learn.state_dict())
    return {k: v for k, v in state.items() if k != "identity"}


class Drop(nn.Module):
    "Fails on what the dropout leaves, so that the error's text depends on the random numbers."

    def __init__(self, at=5):
        super().__init__()
        self.body, self.drop, self.norm, self.at, self.count = nn.Linear(4, 8), nn.Dropout(0.5), nn.BatchNorm1d(8), at, 0
        self.head = nn.Linear(8, 1)

    def forward(self, x):
        h = self.drop(self.norm(self.body(x)))
        if self.training and h[0, 0] == 0 and h[1, 0] == 0 and h[2, 0] == 0:
            raise ValueError(f"{h.sum().item():.9f}")
        return self.head(h)


@pytest.mark.parametrize("seed", [None, 1, 5])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_same_error_again_and_nothing_changed(seed, accumulate):
    torch.manual_seed(11)
    learn = Learner(Drop(), (DataLoader(DATA, 8, shuffle=True), DataLoader(DATA, 8)), "mse", "adam", front="none", seed=seed,
                    accumulate=accumulate, cbs=[EMA()])  # fmt: skip
    error = failing(learn, epochs=20)
    before, rng, text = state_of(learn), torch.get_rng_state(), str(learn.failure)
    attributes = {k: v for k, v in vars(learn).items() if not k.startswith("__")}
    for _ in range(2):
        with pytest.raises(ValueError) as again:
            learn.replay_batch()
        assert str(again.value) == str(error)
        same(state_of(learn), before)
        assert torch.equal(torch.get_rng_state(), rng)
        assert {k: v for k, v in vars(learn).items() if not k.startswith("__")}.keys() == attributes.keys()
        assert str(learn.failure) == text and learn.error is error and learn.state == "failed"
        assert all(p.grad is None for p in learn.model.parameters()) or learn.players[0].window
    learn.model.drop.p = 0.0
    learn.fit()
    assert learn.state == "finished"


def test_a_replay_does_not_change_how_the_run_goes_on():
    def run(again):
        torch.manual_seed(3)
        learn = Learner(Drop(), DataLoader(DATA, 8, shuffle=True), "mse", "adam", front="none", seed=5)
        failing(learn, epochs=20)
        if again:
            with pytest.raises(ValueError):
                learn.replay_batch()
        learn.model.drop.p = 0.0
        learn.fit(epochs=1)
        return learn

    same_weights(run(True), run(False))


@pytest.mark.parametrize("who", ["first", "second"])
def test_with_several_players_the_failing_turn_sees_what_it_saw(who):
    torch.manual_seed(0)
    learn = Learner(players_for(who), DataLoader(DATA, 8, shuffle=True), front="none", seed=2)
    error = failing(learn)
    before = state_of(learn)
    with pytest.raises(ValueError) as again:
        learn.replay_batch()
    assert str(again.value) == str(error)
    same(state_of(learn), before)


@pytest.mark.parametrize("reuse", [False, True])
def test_a_gans_turn_again(reuse):
    torch.manual_seed(0)

    class G(nn.Module):
        latent_dim = 3

        def __init__(self):
            super().__init__()
            self.body, self.norm = nn.Linear(3, 4), nn.BatchNorm1d(4)

        def forward(self, z):
            return self.norm(self.body(z))

    def trouble(learn):
        if learn.step == 4 and learn.player.name == "generator":
            raise ValueError(f"{learn.loss.item():.9f}")

    gan = GANLearner(G(), nn.Sequential(nn.Linear(4, 1), nn.Flatten(0)), DataLoader(DATA, 8, shuffle=True), opt="adam", seed=4,
                     cbs=[On("after_loss", trouble)], reuse_forward=reuse, front="none")  # fmt: skip
    error = failing(gan)
    before = state_of(gan)
    with pytest.raises(ValueError) as again:
        gan.replay_batch()
    # batch norm's running means don't enter in training mode, so this is exact
    assert str(again.value) == str(error)
    same(state_of(gan), before)


def test_the_last_batch_of_an_epoch_and_one_of_a_validation():
    learn = learner(Bomb(at=6))
    failing(learn)
    assert learn.failure.batch_idx == 6
    with pytest.raises(RuntimeError, match="the bomb"):
        learn.replay_batch()
    learn = learner(Bomb(at=2, training=False))
    failing(learn)
    assert learn.failure.loader == "valid"
    before = state_of(learn)
    with pytest.raises(RuntimeError, match="the bomb"):
        learn.replay_batch()
    same(state_of(learn), before)


def test_a_batch_that_goes_through_now_gives_its_losses():
    learn = learner()
    failing(learn)
    learn.model.at = 10**6
    before = state_of(learn)
    losses = learn.replay_batch()
    assert losses["train/loss"] > 0 and losses.keys() == {"train/loss"}
    same(state_of(learn), before)
    learn = learner(Bomb(at=6))
    failing(learn)
    learn.model.at = 10**6
    assert learn.replay_batch()["train/loss"] > 0  # the last of an epoch


def test_a_debugger_finds_the_variables_of_a_replay():
    learn = learner()
    failing(learn)
    with pytest.raises(RuntimeError) as caught:
        learn.replay_batch()
    frames = [frame for frame, _ in traceback.walk_tb(caught.value.__traceback__)]
    assert any("activations" in frame.f_locals for frame in frames)


def test_nothing_to_run_again_is_said():
    learn = learner(nn.Linear(4, 1))
    with pytest.raises(ValueError, match="did not fail"):
        learn.replay_batch()
    learn.add(On("before_epoch", lambda learn: 1 / 0))
    failing(learn)
    with pytest.raises(ValueError, match=r"outside of one \(before_epoch of On"):
        learn.replay_batch()
    seen = []

    def inside(learn):
        with pytest.raises(RuntimeError, match="between two fits"):
            learn.replay_batch()
        seen.append(1)

    learn = learner(nn.Linear(4, 1), cbs=[On("after_batch", inside)])
    learn.fit(steps=1)
    assert seen == [1]


def test_slow_batches_have_python_and_numpys_random_numbers_too():
    import random
    import time

    import numpy as np

    def trouble(learn):
        time.sleep(0.012)
        if learn.step == 3:
            raise ValueError(f"{random.random()} {np.random.rand()} {torch.rand(()).item()}")

    learn = learner(nn.Linear(4, 1), cbs=[On("before_step", trouble)])
    error = failing(learn)
    for _ in range(2):
        with pytest.raises(ValueError) as again:
            learn.replay_batch()
        assert str(again.value) == str(error)


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("background", [False, True])
def test_after_every_ending_a_fit_can_go_on(ending, background, tmp_path):
    learn = learner(nn.Linear(4, 1), run=tmp_path / "run")
    learn.add(way := Ending(ending, 3))
    if background and ending.startswith("interrupt"):
        pytest.skip("nobody waits for a signal here; tests/test_background.py")
    try:
        learn.fit(epochs=2, background=background)
        learn.wait()
    except (RuntimeError, KeyboardInterrupt):
        pass
    assert (learn.failure is not None) == (ending in ("error", "validation_error"))
    learn.remove(way)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        learn.fit(epochs=1)
    assert learn.state == "finished" and until(lambda: not learn._fitting)
