"""The presets: their figures against their sources, their groups against counts by hand, and that they run and resume."""
import io
import json
import math
import warnings

import pytest
import torch
from torch import nn
from ways import resumes

from trainkit import presets
from trainkit.learner import Learner
from trainkit.optim import OptimBuilder
from trainkit.presets import audiozen, basicts, edsr, muon_adamw, nanogpt, srgan, srgan_generator, wdsr

ALL = [nanogpt, muon_adamw, edsr, wdsr, srgan, srgan_generator, basicts, audiozen]


class Net(nn.Module):
    "Embedding, two hidden layers with a norm between them, and a head."

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(3, 4)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)) for _ in range(2))
        self.head = nn.Linear(4, 1)

    def forward(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = torch.tanh(block(x))
        return self.head(x)


def values(plan, total=None, epochs=None):
    return plan.preview(Net(), total, plot=False, epochs=epochs)["lr"]


@pytest.mark.parametrize("preset", ALL, ids=lambda f: f.__name__)
def test_a_preset_is_an_ordinary_builder_that_prints_as_code_and_can_be_changed(preset):
    plan = preset()
    assert type(plan) is OptimBuilder and eval(repr(plan)) == plan
    assert OptimBuilder.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    assert preset(lr=0.5).lr == 0.5 and preset(total=400_000).total == 400_000
    assert preset(fused=False).fused is False
    with pytest.raises(TypeError, match="unknown option 'momentun'"):
        preset(momentun=0.9)
    with pytest.raises(ValueError, match="lr must be a number >= 0; received -1"):
        preset(lr=-1)
    assert "github.com" in preset.__doc__ or "arXiv" in preset.__doc__


def test_nanogpt_against_its_own_formula():
    """Rate at update i (counted from 0): up over W updates, a cosine from lr to lr / 10 over the rest."""
    lr, total, warmup = 6e-4, 200, 10
    found = values(nanogpt(lr, warmup=warmup), total)
    assert list(found) == ["decay", "no_decay"]
    for i, rate in enumerate(found["decay"]):
        if i >= warmup:
            part = (i - warmup) / (total - warmup)
            assert rate == pytest.approx(lr / 10 + 0.5 * (1 + math.cos(math.pi * part)) * (lr - lr / 10))
        else:
            assert 0 < rate < lr
    assert nanogpt().options == {"lr": 6e-4, "weight_decay": 0.1, "betas": (0.9, 0.95)}


def test_nanogpt_is_fused_where_that_is_right():
    assert all(g["fused"] for g in nanogpt().build(Net()).param_groups)
    assert not any(g["fused"] for g in nanogpt().build(Net().to(torch.bfloat16)).param_groups)


def test_muon_gets_the_hidden_matrices_and_adamw_the_rest():
    opt = muon_adamw().build(Net())
    groups = {g["name"]: g for g in opt.param_groups}
    assert groups["muon"]["param_names"] == ["blocks.0.0.weight", "blocks.1.0.weight"]
    assert groups["adamw: decay"]["param_names"] == ["embed.weight", "head.weight"]
    assert len(groups["adamw: no_decay"]["params"]) == 8
    assert [(g["lr"], g["weight_decay"]) for g in opt.param_groups] == [(0.02, 0.01), (3e-4, 0.01), (3e-4, 0.0)]
    assert groups["muon"]["momentum"] == 0.95 and groups["adamw: decay"]["betas"] == (0.9, 0.95)
    with pytest.raises(ValueError, match="only='hidden' takes no parameter"):
        muon_adamw().build(nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1)))


@pytest.mark.parametrize("preset, first, boundary, second", [
    (edsr, 1e-4, 200_000, 5e-5), (wdsr, 1e-3, 200_000, 5e-4), (srgan, 1e-4, 100_000, 1e-5), (srgan_generator, 1e-4, 10**6, 1e-4),
])  # fmt: skip
def test_super_resolutions_boundary_belongs_to_the_first_rate(preset, first, boundary, second):
    plan = preset()
    schedule = plan.schedule_for(plan.build(nn.Linear(1, 1)))
    assert not schedule.needs_total
    rates = [schedule.base_lrs[0] * schedule.multiplier(u) for u in (0, boundary, boundary + 1, 10**7)]
    assert rates == pytest.approx([first, first, second, second])
    assert plan.name == "adam" and plan.options["eps"] == 1e-7


def test_basicts_halves_by_epoch():
    found = values(basicts(), epochs=60)["group 0"]
    reference = torch.optim.Adam(nn.Linear(1, 1).parameters(), lr=2e-4)
    theirs, seen = torch.optim.lr_scheduler.MultiStepLR(reference, [25, 50], 0.5), []
    for _ in range(60):
        seen.append(reference.param_groups[0]["lr"])
        reference.step()
        theirs.step()
    assert found == pytest.approx(seen) and basicts().options["weight_decay"] == 5e-4


def test_audiozens_linear_schedule():
    """Multiplier (T - s) / (T - W) behind the warm-up; the warm-up itself starts above 0 here."""
    found = values(audiozen(lr=1.0, schedule="linear", warmup=10), 100)["group 0"]
    assert [found[s] for s in (10, 55, 99)] == pytest.approx([1.0, 0.5, 1 / 90]) and found[0] > 0
    assert (values(audiozen(lr=1.0, warmup=10), 100)["group 0"][10:] == 1.0).all()


@pytest.mark.parametrize("plan", [
    muon_adamw(schedule="cosine", warmup=2), nanogpt(lr=0.01), OptimBuilder("lamb", lr=0.01, schedule="linear"),
    muon_adamw(rest=OptimBuilder("adamwschedulefree", lr=0.01)),
    OptimBuilder("adamw", params=["no_decay", {"rule": "layer_decay", "decay": 0.5}], schedules={"weight_decay": "cosine"}),
], ids=["muon", "nanogpt", "lamb", "schedulefree", "layers"])  # fmt: skip
def test_a_learner_resumes_exactly_under_a_plan(plan, tmp_path):
    x = torch.randn(32, 3, generator=torch.Generator().manual_seed(0))

    def make(run):
        torch.manual_seed(0)
        return Learner(Net(), (x, x.sum(1, keepdim=True)), "mse", opt=plan, run=run, front="none")

    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        resumes(make, tmp_path, steps=6, at=(3,))


def test_a_presets_state_needs_no_unpickling():
    opt = muon_adamw().build(Net())
    torch.save(opt.state_dict(), file := io.BytesIO())
    file.seek(0)
    assert torch.load(file, weights_only=True)["param_groups"][0]["name"] == "muon"


def test_every_preset_is_public():
    assert {f.__name__ for f in ALL} < set(presets.__all__)
