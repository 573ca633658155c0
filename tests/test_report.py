"The report of what can't be restored exactly: each finding where its cause is, none where it isn't; and what it says is so."

import functools
import random
import types

import numpy as np
import pytest
import torch
from test_exact import LOADERS, RUNS, Augmented, Stream, gan, learner, letting_go, loader, net
from torch import nn
from torch.utils.data import DataLoader, IterableDataset
from ways import resumes

from trainkit.callback import Callback, On
from trainkit.callbacks.average import EMA
from trainkit.learner import Learner
from trainkit.optim import OptimBuilder
from trainkit.player import Player
from trainkit.report import EXACT, Finding, Report, carried, may_change, resume_report
from trainkit.seeds import unseeded


def whats(learn):
    return [finding.what for finding in resume_report(learn)]


# --- nothing to report -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", RUNS)
def test_runs_that_are_restored_exactly_have_an_empty_report(kind):
    "The very runs that tests/test_exact.py leaves and takes up."
    report = resume_report(RUNS[kind]())
    assert report.exact and len(report) == 0 and str(report).startswith(EXACT) and EXACT in report._repr_html_()


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("kind", LOADERS)
def test_loaders_that_are_restored_exactly_have_an_empty_report(kind):
    said = whats(learner(train=LOADERS[kind]()))
    assert said == (["the training loader's samples have no seeds"] if kind == "kept out, 2 workers" else [])


def test_it_can_be_asked_at_any_time_and_changes_nothing(tmp_path):
    learn = learner(tmp_path / "run", train=loader())
    learn.fit(steps=2)
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    assert resume_report(learn).exact and torch.equal(torch.rand(2), expected)
    learn.fit(steps=9)
    assert resume_report(learn).exact and resume_report(Learner(net(), None, "mse", front="none")).exact


def test_as_text_and_as_a_table():
    report = Report([Finding("<this>", "because " * 40, "do & that"), Finding("b", "c", "d")])
    text, table = str(report), report._repr_html_()
    assert text.startswith("2 things would not be restored exactly:\n1. <this>\n   because") and "\n   -> do & that\n2. b" in text
    assert max(map(len, text.splitlines())) <= 110 and repr(report) == text
    assert "&lt;this&gt;" in table and "do &amp; that" in table
    assert table.count("<tr>") == 3 and table.count("<td") == 6 and len(report) == 2


# --- data ------------------------------------------------------------------------------------------------------------


class Lines(IterableDataset):
    def __iter__(self):
        return iter(Augmented())


class Rewound:
    "An iterable of one's own."

    def __iter__(self):
        return iter(loader())


class Held(Augmented):
    "Draws from a generator of its own."

    def __init__(self):
        super().__init__()
        self.rng = np.random.default_rng(0)

    def __getitem__(self, i):
        x, y = super().__getitem__(i)
        return x + self.rng.normal(), y


class Iterating(DataLoader):
    def __iter__(self):
        yield from super().__iter__()


PERSISTENT = {"workers": 2, "persistent_workers": True}
DATA = {
    "a generator": (lambda: (batch for batch in loader()), ["the training loader is a generator"]),
    "an iterator": (lambda: iter([next(iter(loader()))]), ["the training loader is a list_iterator"]),
    "an iterable": (Rewound, ["the training loader is a Rewound without state"]),
    "an iterable dataset": (lambda: DataLoader(Lines(), 4), ["Lines doesn't tell its place"]),
    "one that tells, with workers": (lambda: DataLoader(Stream(), 4, num_workers=1), [
        "Stream doesn't tell its place", "the training loader's samples have no seeds"]),
    "workers in any order": (lambda: loader(2, in_order=False), ["the training loader has in_order=False"]),
    "kept out, persistent": (lambda: unseeded(loader(**PERSISTENT)), ["the training loader's persistent workers have no seeds"]),
    "kept out, workers": (lambda: unseeded(loader(2)), ["the training loader's samples have no seeds"]),
    "kept out": (lambda: unseeded(loader()), []),
    "iterating in its way": (lambda: Iterating(Augmented(), 4, num_workers=2, persistent_workers=True), [
        "the training loader's persistent workers have no seeds"]),
    "kept out, nothing random": (
        lambda: unseeded(DataLoader([torch.ones(3)] * 4, 4, num_workers=2, persistent_workers=True)), []),
    "own generator": (lambda: loader(data=Held()), []),
    "own generator, kept out": (lambda: unseeded(loader(data=Held())), ["the training loader holds a Generator (dataset.rng)"]),
    "a sampler's generator, kept out": (lambda: unseeded(loader(generator=torch.Generator())), []),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("kind", DATA)
def test_data(kind):
    make, expected = DATA[kind]
    assert whats(learner(train=make())) == expected


def test_loaders_to_look_at():
    def said(valid):
        return whats(Learner(net(), {"train": loader(), "valid": loader(), "other": valid}, "mse", front="none"))

    assert said(loader()) == said(loader(**PERSISTENT)) == said(DataLoader(Lines(), 4)) == []
    assert said(batch for batch in loader()) == ["the 'other' loader is a generator"]
    assert said(unseeded(loader(**PERSISTENT))) == ["the 'other' loader's persistent workers have no seeds"]


# --- kernels ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("benchmark", [True, False])
@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_kernels(device, benchmark, deterministic, monkeypatch):
    learn = learner()
    learn.device = torch.device(device)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", benchmark)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: deterministic)
    said = ["torch.backends.cudnn.benchmark is on"] * benchmark + ["CUDA kernels need not be deterministic"] * (not deterministic)
    assert whats(learn) == (said if device == "cuda" else [])


def test_compiled_modules():
    assert whats(learner(compile={"backend": "eager"})) == ["Sequential is compiled"]
    wrapped = Learner(torch.compile(net(), backend="eager"), loader(), "mse", front="none")
    assert whats(wrapped) == ["OptimizedModule is compiled"]
    assert whats(learner(compile=False)) == []


# --- callbacks -------------------------------------------------------------------------------------------------------


class Counter(Callback):
    "Changes the loss by how often it was asked."

    n = 0

    def after_loss(self, learn):
        self.n += 1
        learn.loss = learn.loss * (1 + 0.1 * self.n)


class Saved(Counter):
    def state_dict(self):
        return {"n": self.n}

    def load_state_dict(self, state):
        self.n = state["n"]


class Best(Callback):
    "In a branch, through a helper, inside a container."

    def __init__(self):
        self.best, self.seen, self.sums, self.pair = 1e9, [], {}, [0, 0]

    def after_validate(self, learn):
        self._look(learn.loss)

    def _look(self, loss, again=True):
        if loss is not None and loss < self.best:
            self.best = loss
        self.seen.append(loss)
        self.sums["all"] = 1
        self.pair[0] += 1
        if again:
            self._look(loss, False)


class Scratch(Callback):
    "Nothing here outlives a step: every value is set before it is looked at."

    def __init__(self, scale):
        self.scale, self.table = scale, {"a": 1}

    def before_fit(self, learn):
        self.fits = getattr(self, "fits", 0) + 1

    def before_batch(self, learn):
        self.factor = self.table["a"] * self.scale
        self.rows = []
        for i in range(3):
            self.rows.append(i)

    def after_loss(self, learn):
        with torch.no_grad():
            self.last = learn.loss * self.factor
        learn.loss = learn.loss + 0 * self.last + len(self.rows) * 0

    def after_epoch(self, learn):
        self.text = f"{self.last}"


class EpochMean(Callback):
    def before_epoch(self, learn):
        self.total, self.start = 0.0, learn.step

    def after_batch(self, learn):
        self.total += 1.0

    def after_epoch(self, learn):
        self.mean = self.total / (learn.step - self.start)


class Later(Callback):
    "Set at the end of an epoch, used in the next."

    factor = 1.0

    def after_loss(self, learn):
        learn.loss = learn.loss * self.factor

    def after_epoch(self, learn):
        self.factor = 0.5


class Unread(Callback):
    "Its source can't be had."


exec("def after_batch(self, learn): self.n = getattr(self, 'n', 0) + 1", unread := {})
Unread.after_batch = unread["after_batch"]


@pytest.mark.parametrize("cb, names", [
    (Counter(), "n"), (Best(), "best, pair, seen, sums"), (EpochMean(), "total"), (Later(), "factor"), (Saved(), ""),
    (Scratch(2), ""), (EMA(), ""), (On("after_batch", lambda learn: None), ""), (Unread(), "")])  # fmt: skip
def test_callbacks(cb, names):
    said = whats(learner(cbs=[cb]))
    assert said == ([f"{type(cb).__name__} changes {names} and has no state_dict"] if names else [])


class Accessing:
    def scratch(self):
        self.x = 1
        return self.x

    def swap(self):
        self.x, self.y = self.y, self.x

    def branch(self):
        if True:
            self.x = 1
        return self.x

    def loop(self):
        for self.x in range(3):
            pass

    def delete(self):
        del self.x

    def walrus(self):
        return [y for y in self.x if y] + [self.y]

    def nested(self):
        self.x.y.append(1)
        self.z[0].w = 2

    def other(self, it):
        it.x += 1

    def setter(self):
        setattr(self, "x", self.x + 1)


@pytest.mark.parametrize("method, expected", [
    ("scratch", []), ("swap", ["x", "y"]), ("branch", ["x"]), ("loop", []), ("delete", []), ("walrus", []), ("nested", []),
    ("other", []), ("none", [])])  # fmt: skip
def test_accesses_are_read_in_the_order_of_evaluation(method, expected):
    assert carried(Accessing(), [method]) == expected


# --- modules, generators, optimizers ---------------------------------------------------------------------------------


def batch_norm(trains=True):
    return nn.BatchNorm1d(1).train(trains).requires_grad_(False)


class Own(Learner):
    "Attributes of a subclass."

    def __init__(self, *args, **kw):
        super().__init__(*args, **kw)
        self.embed, self.noise, self.table = nn.Linear(3, 3), torch.Generator(), {"a": [random.Random(1)]}


def with_loss(loss, **kw):
    return Learner(net(), loader(), loss, front="none", **kw)


class Member(Callback):
    def __init__(self, net):
        self.net = net


class MemberSaved(Member):
    def state_dict(self):
        return dict(self.net.state_dict())


def step_with(extra):
    def step(learn, batch):
        return (learn.players[0].modules["model"](batch[0]) - batch[1]).square().mean() + 0 * extra(batch[1]).mean()
    return step


OUTSIDE = {
    "a closure": (lambda: with_loss((lambda n: lambda p, t: n(p - t).mean())(batch_norm())), ["Term.fn.n, a BatchNorm1d"]),
    "a partial": (lambda: with_loss(functools.partial(lambda p, t, net: net(p - t).mean(), net=batch_norm())), ["a BatchNorm1d"]),
    "a method": (lambda: with_loss(batch_norm().forward), ["a BatchNorm1d"]),
    "a step": (lambda: Learner([Player("a", net(), step=step_with(batch_norm()))], loader(), front="none"), ["a BatchNorm1d"]),
    "a callback": (lambda: learner(cbs=[Member(batch_norm())]), ["a BatchNorm1d"]),
    "a subclass": (lambda: Own(net(), loader(), "mse", front="none"), ["embed, a Linear", "noise is a", "is a random"]),
    "parameters": (lambda: learner(cbs=[Member(nn.Linear(1, 1))]), ["a Linear"]),
    "a callback that saves": (lambda: learner(cbs=[MemberSaved(batch_norm())]), []),
    "frozen": (lambda: learner(cbs=[Member(batch_norm(False))]), []),
    "a loss that is a module": (lambda: with_loss(nn.HuberLoss()), []),
    "a metric": (lambda: learner(metrics=["mae"]), []),
    "the player's own": (lambda: (lambda m: Learner(m, loader(), lambda p, t: m[0].weight.mean() * 0 + (p - t).mean(),
                                                   front="none"))(net()), []),
}  # fmt: skip


@pytest.mark.parametrize("kind", OUTSIDE)
def test_modules_and_generators_outside(kind):
    make, expected = OUTSIDE[kind]
    said = whats(make())
    assert len(said) == len(expected), said
    for text, part in zip(said, expected):
        assert part.removeprefix("Term") in text, said


def test_which_modules_may_change():
    assert may_change(nn.Linear(1, 1)) and may_change(batch_norm()) and not may_change(batch_norm(False))
    assert not may_change(nn.ReLU()) and not may_change(nn.Linear(1, 1).requires_grad_(False))


class Lookahead(torch.optim.SGD):
    "Keeps slow weights and a count in attributes."

    def __init__(self, params, lr=0.1):
        super().__init__(params, lr)
        self.slow, self.count = [p.detach().clone() for group in self.param_groups for p in group["params"]], 0

    def step(self, closure=None):
        super().step(closure)
        self.count += 1
        if self.count % 3 == 0:
            for slow, p in zip(self.slow, (p for group in self.param_groups for p in group["params"])):
                p.data.copy_(slow.lerp_(p.detach(), 0.5))


class Wrapping(torch.optim.SGD):
    def __init__(self, params, lr=0.1):
        super().__init__(params, lr)
        self.inner = torch.optim.Adam(self.param_groups[0]["params"])


class Own_state(Lookahead):
    def state_dict(self):
        return {**super().state_dict(), "slow": self.slow}


@pytest.mark.parametrize("opt, expected", [
    (Lookahead, "keeps slow[0], slow[1], slow[2], slow[3], slow[4], slow[5], count outside"), (Wrapping, "keeps inner outside"),
    (Own_state, ""), (torch.optim.LBFGS, ""), (torch.optim.AdamW, "")])  # fmt: skip
def test_optimizers(opt, expected):
    learn = learner()
    learn.players[0].opt = opt(learn.players[0].parameters())
    said = whats(learn)
    assert len(said) == bool(expected) and all(expected in text for text in said), said


@pytest.mark.parametrize("name", ["AdEMAMix", "AdaFactor", "Lion", "Ranger"])
def test_optimizers_of_others_that_keep_all_in_their_state(name):
    po = pytest.importorskip("pytorch_optimizer")
    assert whats(learner(opt=getattr(po, name))) == []


class Odd(Callback):
    def state_dict(self):
        return {"when": [types.SimpleNamespace()]}


def test_what_cannot_be_written():
    learn = learner(cbs=[Odd()])
    (finding,) = resume_report(learn)
    assert finding.what == "cannot save callbacks/odd/when[0]" and "It is a types.SimpleNamespace." == finding.why
    assert finding.do.startswith("a checkpoint holds tensors")


# --- what it says is so ----------------------------------------------------------------------------------------------


def with_optimizer(run, opt):
    learn = learner(run)
    learn.players[0].opt = opt(learn.players[0].parameters())
    learn.players[0].schedules = OptimBuilder("sgd", lr=0.1).schedules_for(learn.players[0].opt)
    return learn


def normalised(run):
    norm = batch_norm()
    learn = learner(run)
    learn.players[0].terms[0].fn = lambda p, t: (norm(p) - t).square().mean() + norm.running_mean.square().sum()
    return learn


LOST = {
    "a callback that counts": lambda run: learner(run, cbs=[Counter()]),
    "a generator of a dataset that was kept out": lambda run: learner(run, unseeded(loader(data=Held()))),
    "persistent workers that were kept out": lambda run: letting_go(learner(run, unseeded(loader(**PERSISTENT)))),
    "an optimizer with slow weights": lambda run: with_optimizer(run, Lookahead),
}


@pytest.mark.parametrize("kind", LOST)
def test_what_is_reported_is_really_lost(kind, tmp_path):
    assert not resume_report(LOST[kind](None)).exact
    with pytest.raises(AssertionError):
        resumes(LOST[kind], tmp_path, steps=10, at=(8,))


def test_and_what_was_done_about_it_helps(tmp_path):
    cured = {"callback": lambda run: learner(run, cbs=[Saved()]), "dataset": lambda run: learner(run, loader(data=Held())),
             "workers": lambda run: letting_go(learner(run, loader(**PERSISTENT)))}  # fmt: skip
    for kind, make in cured.items():
        assert resume_report(make(None)).exact
        resumes(make, tmp_path / kind, steps=10, at=(8,))


def test_a_gan_is_like_any_learner():
    assert resume_report(gan()).exact
    assert whats(gan(latent=(lambda g: lambda n, device: torch.randn(n, 2, generator=g))(torch.Generator()))) == [
        "latent.g is a random generator"]
