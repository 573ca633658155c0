"Weights in and out, a look at the past, a branch."

import copy

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from ways import same, same_weights

from trainkit.callbacks.average import EMA
from trainkit.checkpoint import CheckpointError, Checkpoints
from trainkit.gan.learner import GANLearner
from trainkit.history import History
from trainkit.learner import Learner
from trainkit.optim import OptimBuilder
from trainkit.replay import replay
from trainkit.travel import Matching, compare_weights, read_weights

X = torch.randn(24, 3, generator=torch.Generator().manual_seed(0))
Y = X.sum(1, keepdim=True)


class Net(nn.Module):
    def __init__(self, out=1):
        super().__init__()
        self.body, self.norm, self.head = nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, out)

    def forward(self, x):
        return self.head(self.norm(self.body(x)))


def learner(run=None, model=None, **kw):
    torch.manual_seed(0)
    dls = DataLoader(TensorDataset(X, Y), batch_size=4, shuffle=True)
    opt = OptimBuilder("adamw", lr=0.05, schedule="cosine")
    return Learner(model or Net(), (dls, dls), "mse", opt, front="none", run=run, **kw)


def gan(run=None, **kw):
    torch.manual_seed(0)
    g, d = nn.Linear(2, 3), nn.Sequential(nn.Linear(3, 1), nn.Flatten(0))
    return GANLearner(g, d, DataLoader(TensorDataset(X), batch_size=4), latent=2, front="none", run=run, **kw)


# ------------------------------------------------------------------------------------------------------------- weights


def test_weights_that_fit_are_taken_whole():
    a, b = learner(), learner(model=Net())
    a.fit(1)
    assert b.load_weights(a.model).complete
    same_weights(a, b)


@pytest.mark.parametrize("wrap", [lambda n: f"module.{n}", lambda n: f"_orig_mod.{n}", lambda n: f"module._orig_mod.{n}"])
def test_prefixes_of_wrappers_are_no_difference(wrap):
    report, _ = compare_weights(Net(), {wrap(n): t for n, t in Net().state_dict().items()})
    assert report.complete


def test_what_does_not_fit_is_listed_and_nothing_changes():
    learn, other = learner(), Net(out=2)
    weights = dict(other.state_dict())
    weights["extra"] = weights.pop("body.bias")
    before = {n: t.clone() for n, t in learn.model.state_dict().items()}
    with pytest.raises(ValueError, match="nothing was changed: .*missing: body.bias; unexpected: extra; of another shape: head"):
        learn.load_weights(weights)
    same(before, {n: t for n, t in learn.model.state_dict().items()})
    report = learn.load_weights(weights, strict=False)
    assert (report.missing, report.unexpected, len(report.misshapen)) == (["body.bias"], ["extra"], 2)
    assert torch.equal(learn.model.body.weight, other.body.weight) and torch.equal(learn.model.body.bias, before["body.bias"])


def test_nothing_that_fits_is_an_error_even_when_not_strict():
    with pytest.raises(ValueError, match="0 tensors match"):
        learner().load_weights({"a": torch.ones(1)}, strict=False)


@pytest.mark.parametrize("content,message", [
    ({"model": {"a": 1}}, "holds no weights"), ([1, 2], "holds no weights"), ({}, "holds no weights"), (b"x", "cannot read"),
])  # fmt: skip
def test_files_without_weights(tmp_path, content, message):
    path = tmp_path / "x.pt"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises((ValueError, CheckpointError), match=message):
        read_weights(path)


def test_a_file_that_would_run_code_is_refused(tmp_path):
    class Payload:
        def __reduce__(self):
            return open, (str(tmp_path / "owned"), "w")

    torch.save({"model": Payload()}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="cannot read"):
        read_weights(tmp_path / "x.pt")
    assert not (tmp_path / "owned").exists()


def test_from_a_checkpoint_and_from_one_of_several_modules(tmp_path):
    trained = gan(tmp_path / "gan")
    trained.fit(1)
    fresh = gan()
    with pytest.raises(ValueError, match="which module"):
        fresh.load_weights(trained.checkpoints.find("last"))
    fresh.load_weights(trained.checkpoints.find("last"), module="generator")
    assert torch.equal(fresh.generator.weight, trained.generator.weight)
    assert not torch.equal(fresh.discriminator[0].weight, trained.discriminator[0].weight)


def test_export_and_back(tmp_path):
    learn = learner()
    learn.fit(1)
    path = learn.export_weights(tmp_path / "deep" / "net.safetensors")
    twin = learner(model=Net())
    assert twin.load_weights(path).complete
    same_weights(learn, twin)
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(CheckpointError, match="cannot read .*net.safetensors"):
        twin.load_weights(path)
    same_weights(learn, twin)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.out = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
        self.out.weight = self.embed.weight


class Untied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.out = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)


def test_tied_weights_travel_to_tied_and_to_untied_ones(tmp_path):
    tied = Learner(Tied(), None, "cross_entropy", front="none")
    file = tied.export_weights(tmp_path / "tied.safetensors")
    for net in Tied(), Untied():
        learn = Learner(net, None, "cross_entropy", front="none")
        assert learn.load_weights(file).complete
        assert torch.equal(net.embed.weight, tied.model.embed.weight) and torch.equal(net.out.weight, net.embed.weight)
    from_torch = Learner(Tied(), None, "cross_entropy", front="none")  # a file that has tied weights once, and doesn't say so
    assert from_torch.load_weights({"embed.weight": torch.ones(5, 3)}).complete
    assert torch.equal(from_torch.model.out.weight, torch.ones(5, 3))
    untied = Learner(Untied(), None, "cross_entropy", front="none")
    with pytest.raises(ValueError, match="missing: out.weight"):
        untied.load_weights({"embed.weight": torch.ones(5, 3)})


def test_broken_safetensors_name_the_file(tmp_path):
    file = learner().export_weights(tmp_path / "net.safetensors")
    file.write_bytes(file.read_bytes()[:-3])
    for path in file, tmp_path / "none.safetensors":
        with pytest.raises(CheckpointError, match=path.name):
            learner().load_weights(path)


# ---------------------------------------------------------------------------------------------------------- pretrained


def test_a_learner_begins_with_the_weights_it_is_given(tmp_path):
    a = learner(tmp_path / "run")
    a.fit(1)
    torch.save({"state_dict": a.model.state_dict()}, tmp_path / "theirs.pt")
    sources = [a.model, a.model.state_dict(), a.export_weights(tmp_path / "net.safetensors"), tmp_path / "theirs.pt",
               a.checkpoints.find("last"), a.checkpoints.find("last").path, str(tmp_path / "run"), {"model": a.model},
               {"model": tmp_path / "theirs.pt"}]  # fmt: skip
    for source in sources:
        b = learner(pretrained=source)
        assert b.pretrained["model"].complete and b.step == 0
        same_weights(a, b)
    assert learner().pretrained == {}


def test_pretrained_is_strict_by_default_and_partial_on_request(capsys):
    donor, net = Net(out=2), Net()
    before = {n: t.clone() for n, t in net.state_dict().items()}
    with pytest.raises(ValueError, match=r"the weights don't fit 'model', nothing was changed: .*Matching\(…\) around them"):
        learner(model=net, pretrained=donor)
    same(before, dict(net.state_dict()))
    learn = learner(model=net, pretrained=Matching(donor))
    report = learn.pretrained["model"]
    assert report.matched == [n for n in net.state_dict() if not n.startswith("head")] and len(report.misshapen) == 2
    assert torch.equal(net.body.weight, donor.body.weight) and torch.equal(net.head.weight, before["head.weight"])
    assert capsys.readouterr().out == f"pretrained model: {report}\n"
    with pytest.raises(ValueError, match="0 tensors match"):
        learner(pretrained=Matching({"a": torch.ones(1)}))


def test_training_goes_on_from_pretrained_weights_as_from_ones_own(tmp_path):
    start = Net()
    a, b = learner(model=copy.deepcopy(start)), learner(pretrained=start)
    for learn in a, b:
        torch.manual_seed(1)
        learn.fit(2)
    same_weights(a, b)
    compiled = learner(pretrained=start, compile={"backend": "eager"})
    torch.manual_seed(1)
    compiled.fit(2)
    same_weights(a, compiled)


def test_a_restore_wins_over_pretrained_weights(tmp_path):
    a = learner(tmp_path / "run")
    a.fit(1)
    b = learner(tmp_path / "run", pretrained=Net())
    b.restore("last")
    same_weights(a, b)
    torch.manual_seed(1)
    a.fit(1, schedule="hold")
    torch.manual_seed(1)
    b.fit(1, schedule="hold")
    same_weights(a, b)


def test_several_modules_get_theirs_together_or_none_does(tmp_path):
    trained = gan(tmp_path / "gan")
    trained.fit(1)
    for source in trained.checkpoints.find("last"), tmp_path / "gan":
        twin = gan(pretrained=source)
        same_weights(trained, twin)
        assert {*twin.pretrained} == {"generator", "discriminator"}
    half = gan(pretrained={"generator": trained.generator})
    assert torch.equal(half.generator.weight, trained.generator.weight) and {*half.pretrained} == {"generator"}
    assert torch.equal(half.discriminator[0].weight, gan().discriminator[0].weight)
    with pytest.raises(ValueError, match="some of discriminator, generator; received a dict with weight, bias"):
        gan(pretrained=trained.generator.state_dict())
    with pytest.raises(ValueError, match="some of .*; received a dict with generator, critic"):
        gan(pretrained={"generator": trained.generator, "critic": trained.discriminator})
    with pytest.raises(ValueError, match="some of .*; received Linear"):
        gan(pretrained=trained.generator)
    generator = nn.Linear(2, 3)
    before = generator.weight.clone()
    with pytest.raises(ValueError, match="don't fit 'discriminator', nothing was changed"):
        GANLearner(generator, nn.Sequential(nn.Linear(4, 1), nn.Flatten(0)), None, latent=2, front="none", pretrained=trained.run)
    assert torch.equal(generator.weight, before)


def test_the_journal_tells_of_pretrained_weights_and_a_replay_begins_with_them():
    def make():
        return learner(pretrained=Matching({"body.weight": torch.ones_like(Net().body.weight)}))

    first, again = make(), make()
    assert [(e.what, e.values) for e in first.journal.entries] == [("load_weights", {"module": "model", "strict": False})]
    torch.manual_seed(2)
    first.fit(1)
    torch.manual_seed(2)
    replay(again, first.journal)
    same_weights(first, again)


def test_what_is_exported_is_what_is_evaluated(tmp_path):
    learn = learner(cbs=[EMA(0.5)])
    learn.fit(1)
    twin = learner(model=Net())
    twin.load_weights(learn.export_weights(tmp_path / "average.safetensors"))
    torch.testing.assert_close(twin.predict(X), learn.predict(X))
    assert not torch.equal(twin.model.body.weight, learn.model.body.weight)


# ------------------------------------------------------------------------------------------------------------ the past


def test_a_look_back_leaves_no_trace(tmp_path):
    straight, looking = learner(cbs=[EMA(0.5)]), learner(tmp_path / "run", cbs=[EMA(0.5)])
    straight.fit(3)
    looking.fit(1)
    then = looking.predict(X)
    with looking.at("last") as entry:
        assert entry.step == 6 and torch.equal(looking.predict(X), then)
        torch.rand(5)
        looking.validate(DataLoader(TensorDataset(X, Y), batch_size=8))
    state = looking.state_dict()
    with looking.at(6):
        pass
    same(state["players"], looking.state_dict()["players"])
    same(state["rng"], looking.state_dict()["rng"])


def test_the_past_is_another_one(tmp_path):
    learn = learner(tmp_path / "run", keep=9)
    learn.fit(epochs=1)
    first = learn.predict(X)
    learn.fit(epochs=2, schedule="hold")
    now = learn.predict(X)
    with learn.at(6):
        assert torch.equal(learn.predict(X), first)
    assert torch.equal(learn.predict(X), now) and not torch.equal(first, now) and learn.step == 18


def test_an_error_inside_comes_back_to_the_present(tmp_path):
    learn = learner(tmp_path / "run", keep=9)
    learn.fit(epochs=2)
    now = learn.predict(X)
    with pytest.raises(KeyError), learn.at(6):
        raise KeyError
    assert torch.equal(learn.predict(X), now)


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    learner(tmp_path / "run").fit(1)
    other = learner(tmp_path / "run", model=Net(out=3))
    before = other.predict(X)
    with pytest.raises(ValueError, match="doesn't fit this learner"), other.at("last"):
        pass
    assert torch.equal(other.predict(X), before)


# ----------------------------------------------------------------------------------------------------------- the branch


def test_a_branch_is_a_run_of_its_own(tmp_path):
    learn = learner(tmp_path / "run", keep=9)
    learn.fit(epochs=3)
    files = {p.name: p.read_bytes() for p in (tmp_path / "run" / "checkpoints").iterdir() if p.suffix == ".pt"}
    log = (tmp_path / "run" / "history.jsonl").read_bytes()
    end = learn.predict(X)
    learn.branch(12, "other")
    assert (learn.step, learn.run, learn.epoch) == (12, tmp_path / "other", 2)
    learn.fit()
    assert torch.equal(learn.predict(X), end)  # the same future, as nothing was changed
    assert [e.id for e in learn.checkpoints] == ["12", "18"] and learn.checkpoints.find(12).info["parent"] == "run/12"
    assert learn.checkpoints.find(12).pinned and learn.checkpoints.find(18).info["parent"] == "12"
    assert {p.name: p.read_bytes() for p in (tmp_path / "run" / "checkpoints").iterdir() if p.suffix == ".pt"} == files
    assert (tmp_path / "run" / "history.jsonl").read_bytes() == log
    read = History.read(tmp_path / "other" / "history.jsonl")
    assert read.scalars["train/loss"][0].tolist() == list(range(1, 19))
    assert [m.text for m in read.marks if m.kind == "branch"] == ["run/12"]


def test_a_branch_that_fails_leaves_the_learner_where_it_was(tmp_path, monkeypatch):
    learn = learner(tmp_path / "run", keep=9)
    learn.fit(epochs=2)
    now = learn.predict(X)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with pytest.raises(ValueError, match="isn't empty"):
        learn.branch(6, tmp_path / "full")
    with pytest.raises(CheckpointError, match="there is no checkpoint 7"):
        learn.branch(7, "b")
    learn.checkpoints.find(6).path.write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match="000000006"):
        learn.branch(6, "b")
    assert learn.run == tmp_path / "run" and torch.equal(learn.predict(X), now)
    assert len(learn.history.scalars["train/loss"][0]) == 12
    assert not (tmp_path / "b").exists()
    learn.fit(epochs=1, schedule="hold")
    assert Checkpoints(tmp_path / "run" / "checkpoints").find("last").step == 18


def test_a_branch_of_a_gan(tmp_path):
    learn = gan(tmp_path / "run")
    learn.fit(steps=5)
    learn.save()
    end = learn.sample_fixed(4)
    learn.branch("last", "b")
    assert torch.equal(learn.sample_fixed(4), end)
    learn.fit(steps=2)
    assert learn.step == 7
