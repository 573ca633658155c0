"What shapes a step in the core: accumulation, a step left out, schedules of callbacks, looking with other weights."

import warnings
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from ways import ENDINGS, end_by, resumes, same, same_weights

from trainkit.callback import Callback, CancelBatch, CancelStep, CancelTurn, On
from trainkit.learner import Learner
from trainkit.optim import OptimBuilder
from trainkit.player import Player
from trainkit.schedule import Schedule

X = torch.randn(22, 3, generator=torch.Generator().manual_seed(0))
Y = X.sum(1, keepdim=True) ** 2


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1))


def learner(batch_size=4, opt=None, dls=None, run=None, cls=Learner, **kw):
    model = net()
    dls = DataLoader(TensorDataset(X, Y), batch_size=batch_size) if dls is None else dls
    return cls(model, dls, kw.pop("loss", "mse"), opt or OptimBuilder("sgd", lr=0.05, momentum=0.9), front="none", run=run, **kw)


def flat(learn):
    return torch.cat([p.detach().flatten() for p in learn.players[0].parameters()])


# ------------------------------------------------------------------------------------------------------- accumulation


def by_hand(windows, epochs, opt=lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9)):
    "The plain loop over the joined batches."
    model = net()
    optimizer = opt(model.parameters())
    for _ in range(epochs):
        for rows in windows:
            F.mse_loss(model(X[rows]), Y[rows]).backward()
            optimizer.step(); optimizer.zero_grad()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("accumulate,windows", [
    (2, [slice(0, 8), slice(8, 16), slice(16, 22)]),  # batches of 4, 4 | 4, 4 | 4, 2
    (4, [slice(0, 16), slice(16, 22)]),               # the 4 and the 2 left over make a step of their own
    (9, [slice(0, 22)]),
])  # fmt: skip
def test_accumulation_is_the_large_batch(accumulate, windows):
    learn = learner(accumulate=accumulate)
    learn.fit(epochs=3)
    assert learn.players[0].updates == 3 * len(windows)
    torch.testing.assert_close(flat(learn), by_hand(windows, 3), rtol=1e-5, atol=1e-6)
    assert learn.step == 18 and all(p.grad is None for p in learn.players[0].parameters())


class Endless(IterableDataset):
    "Batches whose number the loader can't tell."

    def __iter__(self):
        return iter(TensorDataset(X, Y))


def test_leftovers_of_a_loader_without_length():
    learn = learner(dls=DataLoader(Endless(), batch_size=4), accumulate=4)
    learn.fit(epochs=2)
    torch.testing.assert_close(flat(learn), by_hand([slice(0, 16), slice(16, 22)], 2), rtol=1e-5, atol=1e-6)


def test_dropping_the_mean_or_the_sizes_would_be_noticed():
    "The sum over the window (a known defect of others), and a mean that forgets the sizes, give other weights."
    right = by_hand([slice(0, 16), slice(16, 22)], 1)
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for window in ((slice(0, 4), slice(4, 8), slice(8, 12), slice(12, 16)), (slice(16, 20), slice(20, 22))):
        for rows in window:
            (F.mse_loss(model(X[rows]), Y[rows]) / len(window)).backward()
        optimizer.step(); optimizer.zero_grad()
    unweighted = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert not torch.allclose(right, unweighted, rtol=1e-4)


def test_the_schedule_counts_updates_not_batches():
    learn = learner(accumulate=4, opt=OptimBuilder("sgd", lr=1.0, schedule="linear"))
    learn.fit(epochs=2)
    schedule = learn.players[0].schedule
    assert (schedule.total, schedule.update) == (4, 4)
    assert learn.history.scalars["lr/model"][1].tolist() == [1.0, 0.75, 0.5, 0.25]


def test_events_while_accumulating():
    seen = []
    cbs = [On(e, lambda learn, e=e: seen.append((learn.step + 1, e, learn.stepped))) for e in
           ("before_turn", "after_backward", "before_step", "after_step", "after_turn")]  # fmt: skip
    learn = learner(accumulate=4, cbs=cbs)
    learn.fit(epochs=1)
    steps = [(step, stepped) for step, e, stepped in seen if e == "after_step"]
    assert steps == [(4, True), (7, True)]  # the second in a turn behind the sixth batch
    assert [s for s, e, _ in seen if e == "before_turn"] == [1, 2, 3, 4, 5, 6, 7]
    assert [s for s, e, _ in seen if e == "after_backward"] == [1, 2, 3, 4, 5, 6]
    assert [stepped for _, e, stepped in seen if e == "after_turn"] == [False] * 3 + [True] + [False] * 2 + [True]


def test_the_gradient_before_the_step_is_the_mean():
    norms = []
    keep = On("before_step", lambda learn: norms.append(learn.model[0].weight.grad))
    learn = learner(accumulate=4, cbs=keep)
    model = net()
    expected = torch.autograd.grad(F.mse_loss(model(X[:16]), Y[:16]), model[0].weight)[0]
    learn.fit(steps=4)
    torch.testing.assert_close(norms[0], expected)


def test_accumulation_resumes_inside_a_window(tmp_path):
    def make(run):
        torch.manual_seed(0)
        dls = DataLoader(TensorDataset(X, Y), batch_size=4, shuffle=True)
        return learner(accumulate=3, dls=dls, run=run, opt=OptimBuilder("adamw", lr=0.01, schedule="cosine"))

    resumes(make, tmp_path, steps=14, at=(1, 2, 3, 6, 7, 11))


def test_accumulation_with_half_precision_and_several_players():
    learn = learner(accumulate=4, precision="bf16")
    learn.fit(epochs=2)
    torch.testing.assert_close(flat(learn), by_hand([slice(0, 16), slice(16, 22)], 2), rtol=0.1, atol=0.1)
    half = learner(accumulate=4, precision="fp16")
    half.players[0].scaler = torch.amp.GradScaler("cpu", init_scale=16.0)  # no step is skipped on the way to a smaller one
    half.fit(epochs=2)
    assert half.players[0].updates == 4
    torch.testing.assert_close(flat(half), by_hand([slice(0, 16), slice(16, 22)], 2), rtol=0.05, atol=0.02)


class Two(Learner):
    def training_step(self, batch):
        a, b = (next(iter(p.modules.values())) for p in self.players)
        return F.mse_loss(a(batch[0]), batch[1]) if self.player.name == "a" else F.mse_loss(b(a(batch[0])), batch[1])


def two(run=None, **kw):
    players = [Player("a", net(), opt=OptimBuilder("sgd", lr=0.01)), Player("b", nn.Linear(1, 1), every=2)]
    return Two(players, DataLoader(TensorDataset(X, Y), batch_size=4), front="none", run=run, **kw)


def test_one_player_accumulates_while_the_other_moves(tmp_path):
    learn = two(accumulate={"a": 4})
    learn.fit(epochs=2)
    a, b = learn.players
    assert (a.updates, b.updates) == (4, 6)
    same({"a": 4}, {"a": a.accumulate})
    resumes(lambda run: two(run, accumulate={"a": 4}), tmp_path, steps=9, at=(2, 5))


@pytest.mark.parametrize("ending", ENDINGS)
def test_no_ending_leaves_half_a_window_behind(ending):
    learn = two(accumulate={"a": 3})
    end_by(learn, ending, at=5)
    player = learn.players[0]
    grads = [p.grad is not None for p in player.parameters()]
    assert all(grads) if player.window else not any(grads)
    learn.fit(epochs=1)
    assert all(p.grad is None for p in player.parameters()) and torch.isfinite(flat(learn)).all()


@pytest.mark.parametrize("error", [CancelTurn, CancelBatch, RuntimeError])
def test_a_turn_cut_off_after_its_backward_drops_the_window(error):
    def cut(learn):
        if learn.step == 1:
            raise error("x")

    learn = learner(accumulate=3, cbs=On("after_backward", cut))
    try:
        learn.fit(steps=2)
    except RuntimeError:
        pass
    assert learn.players[0].window == [] and all(p.grad is None for p in learn.players[0].parameters())


def test_a_cancelled_epoch_drops_its_window():
    from trainkit.callback import CancelEpoch

    cut = On("after_batch", lambda learn: (_ for _ in ()).throw(CancelEpoch()) if learn.step == 2 else None)
    learn = learner(accumulate=4, cbs=cut)
    learn.fit(epochs=1)
    assert learn.players[0].updates == 0 and learn.players[0].window == []


@pytest.mark.parametrize("accumulate,message", [
    (0, "accumulate must be a whole number of batches >= 1; received 0"), (1.5, "received 1.5"), (True, "received True"),
    ({"modell": 2}, r"accumulate names \['modell'\]; the players are model"),
])  # fmt: skip
def test_bad_accumulation(accumulate, message):
    with pytest.raises(ValueError, match=message):
        learner(accumulate=accumulate)


def test_shared_parameters_and_accumulation_are_refused():
    shared = nn.Linear(3, 3)
    players = [Player("a", [shared, nn.Linear(3, 1)], accumulate=2), Player("b", [shared])]
    with pytest.raises(ValueError, match="player 'a' has accumulate=2 and shares"):
        Learner(players, [(X, Y)], front="none")


def test_a_checkpoints_accumulation_overrules_the_code(tmp_path):
    first = learner(accumulate=2, run=tmp_path / "a")
    first.fit(steps=3)
    second = learner(accumulate=4, run=tmp_path / "a")
    with pytest.warns(UserWarning, match=r"accumulate 2 \(the code says 4\)"):
        second.restore()
    assert second.players[0].accumulate == 2 and len(second.players[0].window) == 1


# -------------------------------------------------------------------------------------------------- a step left out


@pytest.mark.parametrize("event", ["after_loss", "before_backward", "after_backward", "before_step"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_cancelled_step(event, precision, accumulate):
    def cancel(learn):
        if learn.step == 3:
            raise CancelStep

    seen, turns = [], []
    learn = learner(cbs=[On(event, cancel), On("after_step", lambda l: seen.append(l.step + 1)),
                         On("after_turn", lambda l: turns.append((l.step + 1, l.stepped)))],
                    precision=precision, accumulate=accumulate)  # fmt: skip
    if precision == "fp16":
        learn.players[0].scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    learn.fit(epochs=1)
    if accumulate == 1:
        assert seen == [1, 2, 3, 5, 6] and learn.players[0].updates == 5
        assert turns == [(n, n != 4) for n in range(1, 7)]
    elif event in ("after_loss", "before_backward"):  # the third batch waits for the fifth, the sixth makes a late step
        assert seen == [2, 5, 7] and learn.players[0].updates == 3
    else:  # what the third had gathered is lost with the fourth
        assert seen == [2, 6] and learn.players[0].updates == 2
    assert len(learn.history.scalars["train/loss"][0]) == 6  # the loss is on record, whatever became of the step
    assert learn.players[0].schedule.update == learn.players[0].updates


def test_a_cancelled_step_changes_nothing_but_the_position():
    def cancel(learn):
        if learn.step == 2:
            raise CancelStep

    learn = learner(cbs=On("before_step", cancel))
    learn.fit(steps=2)
    before = flat(learn), {k: v["momentum_buffer"].clone() for k, v in learn.players[0].opt.state_dict()["state"].items()}
    learn.fit(steps=1)
    assert torch.equal(flat(learn), before[0])
    same(before[1], {k: v["momentum_buffer"] for k, v in learn.players[0].opt.state_dict()["state"].items()})


# ------------------------------------------------------------------------------------------- schedules and callbacks


class Level(Callback):
    "Has a value that its schedule moves."

    def __init__(self, by, shape="linear", **options):
        self.values, self.by = [], by
        self.dummy = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        self.schedule = Schedule(self.dummy, shape, **options)
        self.schedule.by = by

    def schedules(self, learn):
        return {"level": (self.schedule, learn.players[0])}

    def before_batch(self, learn):
        self.values.append(round(self.schedule.lr[0], 6))

    def state_dict(self):
        return {"schedule": self.schedule.state_dict()}

    def load_state_dict(self, state):
        self.schedule.load_state_dict(state["schedule"])


@pytest.mark.parametrize("by,total", [("update", 6), ("step", 12), ("epoch", 2)])
def test_schedules_of_callbacks_are_planned_and_moved(by, total):
    learn = learner(accumulate=2, cbs=[level := Level(by)])
    learn.fit(epochs=2)
    assert (level.schedule.total, level.schedule.update) == (total, total)
    unit = {"update": 2, "step": 1, "epoch": 6}[by]
    assert level.values == [round(1 - (i // unit) / total, 6) for i in range(12)]


@pytest.mark.parametrize("by", ["update", "step", "epoch"])
def test_schedules_of_callbacks_resume(by, tmp_path):
    resumes(lambda run: learner(run=run, cbs=[Level(by, "cosine")]), tmp_path, steps=14, at=(1, 6, 7, 13))


def test_steps_that_are_cancelled_count_for_steps_only():
    cut = On("after_loss", lambda l: (_ for _ in ()).throw(CancelBatch()) if l.step == 1 else None)
    learn = learner(cbs=[cut, a := Level("step")])
    learn.fit(epochs=1)
    assert a.schedule.update == 6 and learn.players[0].schedule.update == 5


def test_setup_comes_before_anything():
    class Refuses(Callback):
        def setup(self, learn):
            raise ValueError("no such player")

    learn = learner(cbs=[Refuses()], opt=OptimBuilder("sgd", lr=0.1, schedule="cosine"))
    before = flat(learn)
    with pytest.raises(ValueError, match="no such player"):
        learn.fit(epochs=1)
    assert learn.step == 0 and learn.players[0].schedule.total is None and torch.equal(before, flat(learn))
    learn.remove("Refuses")
    learn.fit(epochs=1)
    assert learn.state == "finished"


class Zeroed(Callback):
    "Looks with weights of zero."

    entered = 0

    @contextmanager
    def observing(self, learn):
        self.entered += 1
        saved = [p.clone() for p in learn.players[0].parameters()]
        try:
            for p in learn.players[0].parameters():
                p.zero_()
            yield
        finally:
            for p, value in zip(learn.players[0].parameters(), saved):
                p.copy_(value)


def test_observing_surrounds_every_look():
    dls = DataLoader(TensorDataset(X, Y), batch_size=4)
    learn = learner(dls=(dls, dls), cbs=[zeroed := Zeroed()])
    learn.fit(epochs=2)
    assert zeroed.entered == 2
    assert learn.history.last("valid/loss") == pytest.approx(Y.square().mean().item(), rel=1e-5)
    assert flat(learn).abs().sum() > 0
    assert learn.predict(X).abs().sum() == 0 and zeroed.entered == 3
    with learn.observing("predicting"), learn.observing("validating"):
        assert zeroed.entered == 4 and flat(learn).abs().sum() == 0  # once, however deep
    assert flat(learn).abs().sum() > 0


def test_pred_and_targets_may_be_replaced_after_the_forward():
    def shorten(learn):
        learn.pred, learn.targets = learn.pred[:2], tuple(t[:2] for t in learn.targets)

    learn = learner(cbs=On("after_forward", shorten))
    learn.fit(steps=1)
    assert learn.history.last("train/loss") == pytest.approx(F.mse_loss(net()(X[:2]), Y[:2]).item())


def test_players_by_name():
    learn = two()
    assert learn.player_named("b") is learn.players[1] and learn.prefix(learn.players[1]) == "train/b/"
    with pytest.raises(ValueError, match="there is no player 'c'; there are: a, b"):
        learn.player_named("c")


def test_planned_units():
    found = {}
    learn = two(accumulate={"a": 4}, cbs=On("before_fit", lambda l: found.update(
        {(by, p.name): l.planned(by, p) for by in ("update", "step", "epoch") for p in l.players})))  # fmt: skip
    learn.fit(epochs=2)
    assert found == {("update", "a"): 4, ("step", "a"): 12, ("epoch", "a"): 2,
                     ("update", "b"): 6, ("step", "b"): 12, ("epoch", "b"): 2}  # fmt: skip
    assert [p.updates for p in learn.players] == [4, 6]


@pytest.mark.filterwarnings("ignore")
def test_optimizers_with_modes_are_told():
    "Schedule-free optimizers keep the weights they evaluate apart from those they train (arXiv 2405.15682)."
    from schedulefree import AdamWScheduleFree

    model, dls = net(), DataLoader(TensorDataset(X, Y), batch_size=4)
    learn = Learner(model, (dls, dls), "mse", OptimBuilder(AdamWScheduleFree, lr=0.02), front="none")
    learn.fit(epochs=3)
    twin = net()
    optimizer = AdamWScheduleFree(twin.parameters(), lr=0.02)
    optimizer.train()
    for _ in range(3):
        for rows in range(0, 22, 4):
            F.mse_loss(twin(X[rows : rows + 4]), Y[rows : rows + 4]).backward()
            optimizer.step(); optimizer.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters()))
    optimizer.eval()
    with torch.no_grad():
        expected = sum(F.mse_loss(twin(X[i : i + 4]), Y[i : i + 4], reduction="sum") for i in range(0, 22, 4)) / 22
    assert learn.history.last("valid/loss") == pytest.approx(float(expected), rel=1e-5)


def test_nothing_warns():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        learner(accumulate=3).fit(epochs=2)


def test_a_checkpoint_made_behind_a_validation_is_exact(tmp_path):
    "Neither the random state of the validation nor weights it was shown belong in it."

    def make(run):
        torch.manual_seed(0)
        dls = DataLoader(TensorDataset(X, Y), batch_size=4, shuffle=True), DataLoader(TensorDataset(X, Y), batch_size=4)
        model = nn.Sequential(nn.Linear(3, 5), nn.Dropout(0.5), nn.Linear(5, 1))
        return Learner(model, dls, "mse", OptimBuilder("adamw", lr=0.1), cbs=[Zeroed()], front="none", run=run,
                       save_every=2, keep=99)  # fmt: skip

    straight = make(None)
    straight.fit(steps=10, validate_every=2)
    first = make(tmp_path / "run")
    first.fit(steps=10, validate_every=2)
    same_weights(straight, first)
    for step in (2, 4, 8):
        again = make(tmp_path / "run")
        again.restore(step)
        again.fit()
        same_weights(straight, again)


def test_a_weight_that_a_term_was_given_later_comes_back(tmp_path):
    "A term of a step of one's own has no weight until somebody gives it one; that is no difference of the code."

    def make():
        def step(learn, batch):
            pred = learn.model(batch[0])
            return {"fit": F.mse_loss(pred, batch[1]), "size": pred.square().mean()}

        player = Player("model", net(), step=step, opt=OptimBuilder("sgd", lr=0.01))
        return Learner(player, DataLoader(TensorDataset(X, Y), batch_size=4), front="none", run=tmp_path / "run")

    first = make()
    first.fit(steps=1)
    first.players[0].weights["size"] = 0.25
    first.fit(steps=2)
    again = make()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # what a hand changed is no word of the code's
        again.restore()
    assert again.players[0].weights == {"size": 0.25}


@pytest.mark.parametrize("ending", ["error", "interrupt_twice", "cancel_fit", "cancel_batch"])
def test_a_step_that_ended_badly_counts_for_schedules_of_steps_too(ending):
    learn = learner(cbs=[level := Level("step")])
    end_by(learn, ending, at=5)
    assert level.schedule.update == learn.step


def test_settings_that_would_change_nothing_are_refused():
    with pytest.raises(TypeError, match="optimizer_lr would change nothing, as opt= is given"):
        learner(optimizer_lr=0.1)
    assert Learner(net(), [(X, Y)], "mse", optimizer_lr=0.125, front="none").players[0].schedule.lr == [0.125]


def test_a_schedule_may_follow_a_score():
    from trainkit.callbacks.stopping import Score

    dls = DataLoader(TensorDataset(X, Y), batch_size=4)
    model = net()
    opt = OptimBuilder("sgd", lr=0.0, schedule={"name": "plateau", "monitor": "valid/score", "patience": 0, "factor": 0.5})
    with pytest.warns(UserWarning, match="learning rate"):
        learn = Learner(model, (dls, dls), "mse", opt, cbs=Score({"valid/loss": 1.0}), front="none")
    learn.fit(epochs=3)
    assert learn.players[0].schedule.update == 3
    assert set(learn.validate()) == {"valid/loss", "valid/score"}


def test_a_plan_from_a_settings_file(tmp_path, monkeypatch):
    (tmp_path / "settings.ini").write_text(
        "[optimizer]\nname = adam\nlr = 0.5\nweight_decay = 0.1\nparams = no_decay\n"
        "[scheduler]\nname = plateau\nmonitor = valid/loss\n")  # fmt: skip
    monkeypatch.chdir(tmp_path)
    dls = DataLoader(TensorDataset(X, Y), batch_size=4)
    player = Learner(net(), (dls, dls), "mse", front="none").players[0]
    assert [g["weight_decay"] for g in player.opt.param_groups] == [0.1, 0.0] and player.schedule.monitor == "valid/loss"
    (tmp_path / "settings.ini").write_text("[scheduler]\nname = cosine\nend = 0.1\nby = epoch\n")
    schedule = Learner(net(), dls, "mse", front="none").players[0].schedule
    assert (schedule.end, schedule.by) == (0.1, "epoch")


# ---------------------------------------------------------------------------------------------------------- plateaus


def plateau(run=None, monitor="valid/loss", **options):
    plan = {"name": "plateau", "monitor": monitor, "patience": 1, "factor": 0.5, "threshold": 0.3, **options}
    dls = DataLoader(TensorDataset(X, Y), batch_size=4, shuffle=True)
    torch.manual_seed(3)
    return Learner(net(), (dls, dls), "mse", OptimBuilder("sgd", lr=0.2, schedule=plan), front="none", run=run)


@pytest.mark.parametrize("monitor", ["valid/loss", "train/loss"])
def test_a_plateau_in_a_fit_is_torchs_scheduler_on_the_recorded_values(monitor):
    learn = plateau(monitor=monitor)
    learn.fit(epochs=12)
    steps, values = learn.history.scalars[monitor]
    if monitor == "train/loss":  # an epoch's mean
        values = values.reshape(12, 6).mean(axis=1)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.2)
    theirs = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=1, factor=0.5, threshold=0.3)
    for value in values:
        theirs.step(value)
    assert learn.players[0].schedule.lr == [optimizer.param_groups[0]["lr"]] and optimizer.param_groups[0]["lr"] < 0.1


def test_a_plateau_resumes_with_its_counters(tmp_path):
    resumes(plateau, tmp_path, steps=45, at=(6, 13, 24, 31))


def test_a_plateau_looks_at_each_validation_once():
    learn = plateau()
    learn.fit(steps=12, validate_every=4)
    learn.validate()  # a look between fits is none of the training's
    assert learn.players[0].schedule.update == 3


def test_a_plateau_under_a_warm_up_in_updates():
    learn = plateau(by="update", warmup=4)
    seen = []
    learn.add(On("before_step", lambda l: seen.append(l.players[0].schedule.lr[0])))
    learn.fit(epochs=12)
    assert seen[:5] == pytest.approx([0.04, 0.08, 0.12, 0.16, 0.2])
    assert seen[-1] <= 0.1  # the plateau was heard of


def test_a_sequence_that_does_not_fit_is_refused_before_anything():
    plans = [OptimBuilder("sgd", lr=0.1, schedule="cosine"),
             OptimBuilder("sgd", lr=0.1, schedule={"name": "sequence", "parts": [
                 {"name": "constant", "length": 50}, {"name": "linear"}]})]  # fmt: skip
    players = [Player("a", net(), opt=plans[0]), Player("b", nn.Linear(1, 1), opt=plans[1])]
    learn = Two(players, DataLoader(TensorDataset(X, Y), batch_size=4), front="none")
    with pytest.raises(ValueError, match="player 'b'"):
        learn.fit(steps=20)
    assert [p.schedule.total for p in players] == [None, None]
    learn.fit(steps=60)
    assert learn.step == 60


# --------------------------------------------------------------------------------------- what a review had found


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_fit_may_begin_with_the_leftovers(precision, tmp_path):
    "Left between the last batch of an epoch and the step with what it left over."

    def make(run):
        dls = DataLoader(TensorDataset(X[:20], Y[:20]), batch_size=4)
        model = net()
        return Learner(model, (dls, dls), "mse", OptimBuilder("adamw", lr=0.01), front="none", run=run, accumulate=2,
                       precision=precision)  # fmt: skip

    straight, first = make(None), make(tmp_path / "run")
    straight.fit(2, validate_every=5)
    first.add(stop := On("before_validate", lambda l: l.stop()))
    first.fit(2, validate_every=5)
    first.remove(stop)
    assert first.players[0].window == [4] and first.state == "stopped"
    second = make(tmp_path / "run")
    second.restore()
    for learn in first, second:
        learn.fit()
        same_weights(straight, learn)


def test_only_schedules_that_would_run_out_are_laid_anew_where_some_do():
    players = [Player("a", net(), opt=OptimBuilder("sgd", lr=0.01, schedule="linear", total=100)),
               Player("b", nn.Linear(1, 1), opt=OptimBuilder("sgd", lr=0.01, schedule="linear"))]  # fmt: skip
    learn = Two(players, DataLoader(TensorDataset(X, Y), batch_size=4), front="none")
    learn.fit(steps=4)
    learn.fit(steps=4, schedule="stretch")
    assert [p.schedule.total for p in players] == [100, 8]
    learn.fit(steps=4, schedule="restart")
    assert [(p.schedule.total, p.schedule.update) for p in players] == [(100, 12), (4, 4)]


class Counter(Callback):
    def __init__(self, n=0):
        self.n = n

    def after_step(self, learn):
        self.n += 1

    def state_dict(self):
        return {"n": self.n}

    def load_state_dict(self, state):
        self.n = state["n"]

    def __repr__(self):
        return f"Counter({self.n})"


def test_a_restore_to_before_a_callback_existed_makes_it_new(tmp_path):
    learn = learner(run=tmp_path / "run")
    learn.fit(1)
    entry = learn.save()
    learn.add(counter := Counter(7))
    learn.fit(1)
    assert counter.n == 13
    learn.restore(entry)
    assert counter.n == 7


def test_a_callback_written_with_other_numbers_is_said(tmp_path):
    first = learner(run=tmp_path / "run", cbs=Counter(1))
    first.fit(1)
    with pytest.warns(UserWarning, match=r"Counter\(1\) \(the code says Counter\(2\)\)"):
        learner(run=tmp_path / "run", cbs=Counter(2)).restore()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        learner(run=tmp_path / "run", cbs=Counter(1)).restore()


def test_a_callback_that_is_gone_can_be_left_out(tmp_path):
    learner(run=tmp_path / "run", cbs=Counter()).fit(1)
    learn = learner(run=tmp_path / "run")
    with pytest.raises(ValueError, match=r"restore\(…, without='counter'\) leaves it out"):
        learn.restore()
    with pytest.raises(ValueError, match="has no state of a callback 'ema'; it has: auto_save|counter"):
        learn.restore(without="ema")
    learn.restore(without="counter")
    assert learn.step == 6


def test_gradients_that_wait_at_the_end_are_said():
    with pytest.warns(UserWarning, match="gradients wait for more turns before they make a step \\('model': 3 of 4\\)"):
        learner(accumulate=4).fit(steps=3)


def test_a_schedule_that_fails_is_no_torn_step():
    learn = learner()
    learn.players[0].schedule.advance = lambda: (_ for _ in ()).throw(ValueError("failed at update 1"))
    with warnings.catch_warnings(), pytest.raises(ValueError, match="failed at update"):
        warnings.simplefilter("error")
        learn.fit(1)
    assert learn.torn is None


def test_plans_for_players_that_are_not_there():
    from trainkit.gan.learner import GANLearner

    with pytest.raises(ValueError, match="one for each of generator, discriminator; received 'gen', 'discriminator'"):
        GANLearner(nn.Linear(2, 3), nn.Linear(3, 1), X, opt={"gen": "adam", "discriminator": "sgd"}, latent=2)


@pytest.mark.parametrize("monitor,valid", [("valid/lss", True), ("valid/loss", False), ("train/los", True)])
def test_a_plateau_that_would_never_hear_anything_is_said(monitor, valid):
    dls = DataLoader(TensorDataset(X, Y), batch_size=4)
    opt = OptimBuilder("sgd", lr=0.1, schedule={"name": "plateau", "monitor": monitor, "mode": "min"})
    learn = Learner(net(), (dls, dls) if valid else dls, "mse", opt, front="none")
    with pytest.raises(ValueError, match=monitor):
        learn.fit(epochs=3)
    assert learn.step == 6


def test_a_plateau_waits_for_a_late_validation():
    learn = plateau()
    learn.fit(steps=18, validate_every=9)
    assert learn.players[0].schedule.update == 2
