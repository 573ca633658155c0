"""The optimizer builder: what it accepts, what it refuses, and that what it builds is torch's."""
import copy
import functools
import importlib
import io
import itertools
import json
import os
import re
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from trainkit import optim, optimizers
from trainkit.composite import CompositeOptimizer
from trainkit.optim import OptimBuilder, as_builder, register_optimizer, register_scheduler
from trainkit.schedule import Schedule

TORCH = optim.torch_optimizers()
ACCEPTED = sorted(TORCH.keys() - {"lbfgs"})
FUSED = sorted(name for name in ACCEPTED if "fused" in optim.keywords(TORCH[name]))


def network(order=torch.contiguous_format, dtype=torch.float32):
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 16, 2)
    return nn.Sequential(*layers).to(memory_format=order, dtype=dtype)


def flat(net):
    return torch.cat([p.detach().reshape(-1).clone() for p in net.parameters()])


def train(net, opt, steps=5, schedule=None, seed=1):
    g = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        x = torch.randn(4, 3, 6, 6, generator=g).to(net[0].weight.dtype)
        opt.zero_grad()
        F.cross_entropy(net(x), torch.tensor([0, 1, 0, 1])).backward()
        opt.step()
        if schedule:
            schedule.advance()
    return flat(net)


def params_for(name):
    "Parameters that this optimizer takes, and a function that gives them gradients."
    if name == "sparseadam":
        net = nn.Embedding(5, 3, sparse=True)
        return net, lambda: net(torch.tensor([1, 2])).square().sum().backward()
    net = nn.Linear(3, 2, bias=name != "muon")
    return net, lambda: net(torch.ones(4, 3)).square().sum().backward()


def steps(net, backward, opt, n=3):
    for _ in range(n):
        opt.zero_grad()
        backward()
        opt.step()
    return flat(net)


# ---------------------------------------------------------------- what is built is torch's


@pytest.mark.parametrize("name", ACCEPTED)
def test_every_torch_optimizer_by_name_trains_as_built_by_hand(name):
    torch.manual_seed(0)
    net, backward = params_for(name)
    other = copy.deepcopy(net)
    built = OptimBuilder(name.upper(), lr=0.01, fused=False).build(net)
    assert type(built) is TORCH[name]
    torch.manual_seed(0)
    theirs, their_backward = params_for(name)
    theirs.load_state_dict(other.state_dict())
    by_hand = TORCH[name](theirs.parameters(), lr=0.01)
    assert torch.equal(steps(net, backward, built), steps(theirs, their_backward, by_hand))


@pytest.mark.parametrize("name", ACCEPTED)
def test_the_state_of_every_torch_optimizer_survives_a_checkpoint(name):
    net, backward = params_for(name)
    builder = OptimBuilder(name, lr=0.01)
    opt = builder.build(net)
    steps(net, backward, opt)
    torch.save({"net": net.state_dict(), "opt": opt.state_dict()}, file := io.BytesIO())
    on = steps(net, backward, opt)

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again, backward = params_for(name)
    again.load_state_dict(saved["net"])
    restored = builder.build(again)
    restored.load_state_dict(saved["opt"])
    assert torch.equal(steps(again, backward, restored), on)


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name, options", [
    ("adam", {}), ("adam", {"amsgrad": True, "weight_decay": 0.1}), ("adamw", {}),
    ("adamw", {"lr": torch.tensor(0.01)}),
    ("sgd", {}), ("sgd", {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}), ("adagrad", {}),
])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fused_on_cpu_trains_as_unfused(name, options, order, dtype):
    options = {"lr": 0.01, **options}
    fused, plain = (OptimBuilder(name, fused=f, **options) for f in ("auto", False))
    a, b = network(order, dtype), network(order, dtype)
    opts = fused.build(a), plain.build(b)
    assert [o.param_groups[0]["fused"] for o in opts] == [True, None]
    torch.testing.assert_close(train(a, opts[0], 10), train(b, opts[1], 10), rtol=1e-4, atol=1e-6)


def test_all_of_torchs_fused_optimizers_are_used_fused():
    assert {"adam", "adamw", "sgd"} <= set(FUSED)
    for name in ACCEPTED:
        net, _ = params_for(name)
        assert OptimBuilder(name).build(net).param_groups[0].get("fused") == (True if name in FUSED else None)


# ---------------------------------------------------------------- where fused kernels are wrong


@pytest.mark.parametrize("name", FUSED)
def test_a_gradient_in_another_order_is_applied_rightly(name):
    """torch 2.13's fused CPU kernels ignore strides: unaligned, the elements are mixed up without a word."""
    grad = torch.arange(1.0, 17).view(2, 2, 2, 2)
    found = []
    for fused, order in itertools.product(("auto", False), (torch.contiguous_format, torch.channels_last)):
        p = nn.Parameter(torch.ones(2, 2, 2, 2).to(memory_format=order))
        opt = OptimBuilder(name, lr=0.1, fused=fused).build([p])
        for k in range(3):
            turned = torch.contiguous_format if k % 2 else torch.channels_last
            p.grad = (grad * (k + 1)).to(memory_format=turned)
            opt.step()
        found.append(p.detach().contiguous())
    for other in found[1:]:
        torch.testing.assert_close(found[0], other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", FUSED)
def test_a_state_from_a_model_in_another_order_is_applied_rightly(name):
    options = {"momentum": 0.9} if name == "sgd" else {}
    straight, turned = network(), network()
    builder = OptimBuilder(name, lr=0.01, **options)
    opt = builder.build(straight)
    train(straight, opt)
    turned.load_state_dict(straight.state_dict())
    turned.to(memory_format=torch.channels_last)
    other = builder.build(turned)
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    torch.testing.assert_close(train(straight, opt), train(turned, other), rtol=1e-4, atol=1e-5)


def test_how_a_step_is_computed_is_not_taken_from_a_checkpoint():
    a, b = network(), network()
    fused, plain = OptimBuilder("adam").build(a), OptimBuilder("adam", fused=False).build(b)
    train(a, fused)
    b.load_state_dict(a.state_dict())
    plain.load_state_dict(copy.deepcopy(fused.state_dict()))
    assert plain.param_groups[0]["fused"] is None
    torch.testing.assert_close(train(a, fused), train(b, plain), rtol=1e-4, atol=1e-6)
    fused.load_state_dict(copy.deepcopy(plain.state_dict()))
    assert fused.param_groups[0]["fused"] is True


@pytest.mark.parametrize("name", ["sgd", "adagrad"])
def test_a_sparse_gradient_falls_back(name):
    found = []
    for fused in "auto", False:
        torch.manual_seed(0)
        net = nn.Embedding(6, 2, sparse=True)
        found.append(steps(net, lambda: net(torch.tensor([0, 4])).square().sum().backward(),
                           OptimBuilder(name, lr=0.1, fused=fused).build(net)))  # fmt: skip
    assert torch.equal(*found)


@pytest.mark.parametrize("params, options", [
    ([torch.zeros(3, dtype=torch.bfloat16)], {}),  # SGD with momentum loses these gradients when fused
    ([torch.zeros(3, dtype=torch.float16)], {}),
    ([torch.zeros(3, dtype=torch.complex64)], {}),
    ([torch.zeros(4, 6)[:, ::2]], {}),
    ([torch.zeros(3), torch.zeros(3, dtype=torch.bfloat16)], {}),
    ([torch.zeros(3)], {"foreach": True}),
    ([torch.zeros(3)], {"foreach": False}),
    ([torch.zeros(3)], {"differentiable": True}),
])  # fmt: skip
def test_auto_leaves_the_fused_kernel_alone(params, options):
    opt = OptimBuilder("sgd", momentum=0.9, **options).build([nn.Parameter(p) for p in params])
    group = opt.param_groups[0]
    assert not group["fused"] and group["foreach"] == options.get("foreach")


def test_a_kernel_that_is_not_there_falls_back_silently_and_one_asked_for_does_not(monkeypatch, recwarn):
    class Picky(torch.optim.SGD):
        def __init__(self, params, lr=0.1, fused=None):
            if fused:
                raise RuntimeError("no kernel")
            super().__init__(params, lr)

    assert OptimBuilder(Picky).build(network()).param_groups[0]["fused"] is None
    assert not recwarn.list
    with pytest.raises(ValueError, match="no kernel"):
        OptimBuilder(Picky, fused=True).build(network())


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA here")
def test_fused_on_cuda_restores_a_cpu_state():
    builder = OptimBuilder("adam", lr=0.01)
    cpu, gpu = network(), network().cuda()
    a, b = builder.build(cpu), builder.build(gpu)
    train(cpu, a)
    b.load_state_dict(copy.deepcopy(a.state_dict()))
    for p in gpu.parameters():
        p.grad = torch.ones_like(p)
    b.step()
    assert b.param_groups[0]["fused"] is True


def test_fp16_scaler_with_a_fused_optimizer_skips_and_steps():
    net = nn.Linear(2, 1)
    opt = OptimBuilder("adam", lr=0.1).build(net)
    scaler = torch.amp.GradScaler("cpu")
    before = flat(net)
    scaler.scale(net(torch.full((1, 2), float("inf"))).sum()).backward()
    scaler.step(opt)
    scaler.update()
    assert torch.equal(before, flat(net))
    opt.zero_grad()
    scaler.scale(net(torch.ones(1, 2)).sum()).backward()
    scaler.step(opt)
    torch.testing.assert_close(flat(net), before - 0.1, rtol=1e-3, atol=1e-4)


# ---------------------------------------------------------------- parameters


def ids(opt):
    return [[id(p) for p in g["params"]] for g in opt.param_groups]


def test_parameters_in_every_form_give_the_same_optimizer():
    net = network()
    own = [id(p) for p in net.parameters()]
    forms = (net, net.parameters(), list(net.parameters()), net.named_parameters(), dict(net.named_parameters()),
             [{"params": net.parameters()}], [{"params": net}], iter(net.parameters()))  # fmt: skip
    assert all(ids(OptimBuilder("sgd").build(form)) == [own] for form in forms)


def test_frozen_parameters_are_in_and_integers_are_not():
    net = network()
    net[0].weight.requires_grad_(False)
    net.register_parameter("table", nn.Parameter(torch.zeros(2, dtype=torch.int8), requires_grad=False))
    opt = OptimBuilder("adamw", lr=0.01).build(net)
    assert len(ids(opt)[0]) == len(list(net.parameters())) - 1
    frozen = net[0].weight.detach().clone()
    train(net, opt)
    assert torch.equal(net[0].weight, frozen)  # no decay either
    net[0].weight.requires_grad_(True)
    train(net, opt)
    assert not torch.equal(net[0].weight, frozen)


def test_shared_parameters_are_counted_once():
    net = nn.Sequential(a := nn.Linear(2, 2), nn.ReLU(), a)
    for form in net, [*a.parameters(), *a.parameters()], [*net.named_parameters(remove_duplicate=False)]:
        assert ids(OptimBuilder("sgd").build(form)) == [[id(a.weight), id(a.bias)]]


def test_group_options_hold_and_are_checked():
    net = network()
    groups = [{"params": net[0], "lr": 1.0, "name": "trunk"}, {"params": net[4]}]
    opt = OptimBuilder("sgd", lr=0.1, momentum=0.9).build(groups)
    assert [g["lr"] for g in opt.param_groups] == [1.0, 0.1] and opt.param_groups[0]["name"] == "trunk"
    nesterov = OptimBuilder("sgd", momentum=0.9).build([{"params": net, "nesterov": True}])
    assert nesterov.param_groups[0]["nesterov"]
    with pytest.raises(TypeError, match="unknown option 'weight_deacy'.*weight_decay"):
        OptimBuilder("sgd").build([{"params": net, "weight_deacy": 0}])


def test_groups_by_pattern_and_by_function():
    net = network()
    opt = OptimBuilder("adamw", params={r"^1\.": {"lr": 0.0}, "bias$": {"weight_decay": 0.0}}).build(net)
    names = [g["param_names"] for g in opt.param_groups]
    assert names == [["0.weight", "4.weight"], ["1.weight", "1.bias"], ["4.bias"]]
    assert [(g["lr"], g["weight_decay"]) for g in opt.param_groups] == [(1e-3, 0.01), (0.0, 0.01), (1e-3, 0.0)]

    def matrices(pairs):
        return [{"params": [(n, p) for n, p in pairs if (p.ndim > 1) == big], "weight_decay": big} for big in (1, 0)]

    opt = OptimBuilder("adamw", params=matrices).build(net)
    assert [len(g["params"]) for g in opt.param_groups] == [2, 3]


def one(pairs):
    return [{"params": pairs[:1]}]


def twice(pairs):
    return [{"params": pairs}, {"params": pairs[-1:]}]


@pytest.mark.parametrize(
    "params, plan, message",
    [
        (nn.ReLU(), {}, "there is nothing to optimize: ReLU has no floating-point parameter"),
        ([], {}, "there is nothing to optimize: list has no floating-point parameter"),
        ([{"params": []}], {}, "group 0 has no floating-point parameter"),
        (nn.LazyLinear(2), {}, "parameter 'weight' has no shape yet"),
        (None, {}, "parameters come as a module or an iterable of tensors; received None"),
        (3, {}, "received 3"),
        (torch.zeros(2), {}, "an iterable of tensors; received tensor"),
        ([1, 2], {}, "a parameter is a tensor or a pair (name, tensor); received 1"),
        ([torch.ones(1, requires_grad=True) * 2], {}, "sgd: can't optimize a non-leaf Tensor"),
        (network(), {"params": {"nrom": {}}}, "pattern 'nrom' takes no parameter; names: 0.weight, 1.weight"),
        (list(network().parameters()), {"params": {"bias": {}}}, "groups by name need names; 5 parameters have none"),
        ([{"params": network()}, {"params": nn.Linear(1, 1)}], {"params": {"bias": {}}}, "only one can hold"),
        (nn.Linear(2, 2), {"params": one}, "put these parameters in no group: 'bias'"),
        (nn.Linear(2, 2), {"params": twice}, "parameter 'bias' is in two groups: 0 and 1"),
        (network(), {"name": "muon"}, "(these are not: '0.weight', '1.weight', '1.bias', '4.bias')"),
        ([nn.Parameter(torch.zeros(3))], {"name": "muon"}, "(these are not: an unnamed one of shape (3,))"),
    ],
)
def test_parameters_that_do_not_go_are_named(params, plan, message):
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        OptimBuilder(**{"name": "sgd", **plan}).build(params)


# ---------------------------------------------------------------- the plan


@pytest.mark.parametrize(
    "plan, message",
    [
        ({"name": "adamm"}, "unknown optimizer 'adamm'; accepted (nearest first): adam"),
        ({"name": "LBFGS"}, "optimizer 'lbfgs' must evaluate the loss several times per step, through a closure"),
        ({"name": torch.optim.LBFGS}, "through a closure"),
        ({"name": 3}, "an optimizer is given as a name, an Optimizer class, a function of param"),
        ({"name": "torch.optim.Nothing"}, "'torch.optim.Nothing' can't be found"),
        ({"name": "adam", "beta": 0.5}, "adam: unknown option 'beta'; accepted (nearest first): betas"),
        ({"name": "sgd", "momentum": "0.9"}, "sgd: momentum must be a number 0 <= x < 1; received '0.9'"),
        ({"name": "sgd", "momentum": -1}, "sgd: momentum must be a number 0 <= x < 1; received -1"),
        ({"name": "sgd", "nesterov": True}, "Nesterov momentum requires a momentum"),
        ({"lr": -1e-3}, "adamw: lr must be a number >= 0; received -0.001"),
        ({"lr": float("inf")}, "received inf"),
        ({"lr": float("nan")}, "received nan"),
        ({"lr": torch.tensor(-1.0)}, "adamw: lr must be a number >= 0"),
        ({"lr": True}, "received True"),
        ({"lr": "1e-3"}, "received '1e-3'"),
        ({"betas": (0.9, 1.5)}, "adamw: betas must be two numbers 0 <= b < 1; received (0.9, 1.5)"),
        ({"betas": 0.9}, "betas must be a pair of numbers 0 <= b < 1; received 0.9"),
        ({"betas": (0.9,)}, "received (0.9,)"),
        ({"weight_decay": -0.1}, "adamw: weight_decay must be a number >= 0; received -0.1"),
        ({"eps": -1e-8}, "adamw: eps must be a number >= 0"),
        ({"name": "rmsprop", "alpha": -1}, "rmsprop: Invalid alpha value: -1"),
        ({"fused": "yes"}, "fused must be True, False or 'auto'; received 'yes'"),
        ({"fused": True, "foreach": True}, "fused and foreach are two ways to do the same"),
        ({"name": "rmsprop", "fused": True}, "rmsprop: unknown option 'fused'"),
        ({"schedule": "cosin"}, "unknown scheduler 'cosin'; accepted (nearest first): cosine"),
        ({"schedule": {"name": "cosine", "power": 2}}, "scheduler 'cosine': unknown option 'power'"),
        ({"schedule": {"name": "cosine", "end": -1}}, "end must be a multiplier >= 0"),
        ({"warmup": -1}, "warmup must be a whole number of updates >= 0 or a fraction"),
        ({"warmup": 50, "total": 50}, "warmup=50 leaves nothing of total=50"),
        ({"total": 0}, "total must be a whole number of updates >= 1"),
        ({"schedule": {"name": "linear", "warmup": 5}, "warmup": 6}, "warmup is given twice: 5 in the schedule, and 6"),
        ({"params": 3}, "params must be {pattern: options} or a function"),
        ({"params": {"bias": {"weight_decay": -1}}}, "weight_decay must be a number >= 0; received -1"),
    ],
)
def test_what_is_wrong_is_said_at_construction(plan, message):
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        OptimBuilder(**plan)


def a_factory(params, lr=0.1, betas=(0.5, 0.9)):
    return torch.optim.Adam(params, lr=lr, betas=betas)


def a_shape(update, total):
    return 1 - (update / total) ** 2


PLANS = [
    OptimBuilder(),
    OptimBuilder("SGD", lr=0.1, momentum=0.9, nesterov=True, fused=False),
    OptimBuilder(torch.optim.Adam, betas=[0.5, 0.999], schedule="cosine", warmup=0.05, total=100),
    OptimBuilder("adamw", schedule={"name": "cosine_restarts", "cycles": 3, "end": 0.1}, warmup=7),
    OptimBuilder("adamw", params={"bias|norm": {"weight_decay": 0.0}}),
    OptimBuilder("adamw", params=one, schedule=a_shape),
    OptimBuilder(a_factory, lr=0.2),
    OptimBuilder(f"{__name__}.a_factory", betas=(0.1, 0.2)),
    OptimBuilder(functools.partial(torch.optim.SGD, lr=0.3, momentum=0.5)),
]


@pytest.mark.parametrize("plan", PLANS, ids=repr)
def test_a_plan_comes_back_from_its_dict_its_json_and_its_code(plan):
    assert OptimBuilder.from_dict(plan.to_dict()) == plan
    assert OptimBuilder.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    again = eval(repr(plan))
    assert again == plan and again.to_dict() == plan.to_dict()
    assert plan.with_() == plan


def test_partial_and_name_are_the_same_plan():
    assert PLANS[-1] == OptimBuilder("sgd", lr=0.3, momentum=0.5)
    assert OptimBuilder(functools.partial(torch.optim.SGD, lr=0.3), lr=0.1).lr == 0.1
    assert OptimBuilder("adam") != OptimBuilder("adamw")


def test_a_plan_without_names_can_be_used_but_not_written():
    plan = OptimBuilder(lambda params: torch.optim.SGD(params, lr=0.5), schedule=lambda u, total=None: 0.5)
    opt = plan.build(network())
    assert plan.schedule_for(opt).lr == [0.25]
    with pytest.raises(ValueError, match="<lambda> can't be found by its name"):
        plan.to_dict()


def test_with_changes_a_copy():
    plan = OptimBuilder("adam", lr=0.1, betas=(0.5, 0.9), schedule="linear")
    other = plan.with_(lr=0.2, schedule={"name": "cosine", "end": 0.5})
    assert (plan.lr, plan.shape, other.lr, other.shape) == (0.1, "linear", 0.2, "cosine")
    assert other.options["betas"] == (0.5, 0.9)
    with pytest.raises(TypeError, match="sgd: unknown option 'betas'"):
        plan.with_(name="sgd")


def test_numpy_numbers_do_not_reach_the_state():
    opt = OptimBuilder("adam", lr=np.float32(0.5), betas=[np.float64(0.5), 0.9]).build(network())
    torch.save(opt.state_dict(), file := io.BytesIO())
    file.seek(0)
    assert torch.load(file, weights_only=True)["param_groups"][0]["betas"] == (0.5, 0.9)


def test_settings_sections():
    section = {"name": "adamw", "lr": 3e-4, "weight_decay": None, "betas": (0.9, 0.95), "momentum": None, "fused": "no"}
    plan = OptimBuilder.from_settings(section, {"name": "cosine", "warmup": 0.05, "total": None, "end": 0.1})
    assert plan == OptimBuilder("adamw", lr=3e-4, betas=(0.9, 0.95), fused=False, warmup=0.05,
                                schedule={"name": "cosine", "end": 0.1})  # fmt: skip
    assert OptimBuilder.from_settings({"fused": "auto"}) == OptimBuilder()
    with pytest.raises(TypeError, match="sgd: unknown option 'betas'"):
        OptimBuilder.from_settings({"name": "sgd", "betas": (0.9, 0.95)})


def test_as_builder_takes_whatever_describes_one():
    adam = OptimBuilder("adam")
    assert all(as_builder(x) == adam for x in ("Adam", torch.optim.Adam, {"name": "adam"}, adam))
    assert as_builder(adam) is adam and as_builder(None) == OptimBuilder() and as_builder({"lr": 1.0}).lr == 1.0
    assert as_builder(a_factory).build(network()).param_groups[0]["betas"] == (0.5, 0.9)


@pytest.mark.parametrize("bad, received", [
    (3, "int 3"), (True, "bool True"), (1e-3, "float 0.001"), (("adam", {}), "tuple ('adam', {})"),
    ([torch.zeros(1)], "list [tensor([0.])]"), (nn.MSELoss, "the class MSELoss"), (nn.MSELoss(), "MSELoss MSELoss()"),
    (functools.partial(nn.MSELoss, reduction="sum"), "the class MSELoss"), ("torch.nn.MSELoss", "the class MSELoss"),
    ("os.sep", "str '/'"), (torch.optim.lr_scheduler.StepLR, "the class StepLR"), (torch.zeros(1), "Tensor tensor([0.])"),
])  # fmt: skip
def test_what_makes_no_optimizer_is_refused_with_what_is_accepted(bad, received):
    accepted = "an optimizer is given as a name, an Optimizer class, a function of parameters that makes one, a dict with 'name'"
    with pytest.raises(TypeError, match=re.escape(f"{accepted}, or an OptimBuilder; received {received}")):
        as_builder(bad)


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_an_optimizer_that_is_made_is_refused_with_what_to_pass(name):
    made = TORCH[name]([nn.Parameter(torch.zeros(1))])
    cls = type(made).__name__
    say = f"already made, of class {cls}: pass the class ({cls}), or a builder with its options (OptimBuilder({cls}, lr=…))"
    with pytest.raises(TypeError, match=re.escape(say) + ".*once modules are on their device"):
        as_builder(made)


# ---------------------------------------------------------------- registry and factories


@pytest.fixture
def registry(monkeypatch):
    fresh = {}
    for module in (optim, optimizers):
        monkeypatch.setattr(module, "_REGISTERED", fresh)


def test_a_registered_optimizer_goes_by_its_name(registry):
    register_optimizer("My-Adam")(a_factory)
    plan = OptimBuilder("my_adam", lr=0.3)
    assert plan.to_dict() == {"name": "my_adam", "lr": 0.3}
    assert OptimBuilder(a_factory) == OptimBuilder("my_adam")
    assert plan.build(network()).param_groups[0]["lr"] == 0.3
    with pytest.raises(ValueError, match="already .*a_factory"):
        register_optimizer("my_adam")(one)


def test_torchs_names_are_taken_unless_said(registry):
    with pytest.raises(ValueError, match="'AdamW' is already torch.optim.adamw.AdamW"):
        register_optimizer("AdamW")
    register_optimizer("adamw", overwrite=True)(a_factory)
    assert type(OptimBuilder("adamw").build(network())) is torch.optim.Adam


def test_a_factory_gets_bare_parameters_and_must_make_an_optimizer():
    seen = []

    def nothing(params):
        seen.extend(params)

    net = network()
    with pytest.raises(TypeError, match="must make a torch.optim.Optimizer; it made None"):
        OptimBuilder(nothing).build(net)
    assert [id(p) for p in seen] == [id(p) for p in net.parameters()]
    with pytest.raises(ValueError, match="through a closure"):
        OptimBuilder(lambda params: torch.optim.LBFGS(params)).build(net)


# ---------------------------------------------------------------- schedules


def test_the_schedule_of_a_plan():
    plan = OptimBuilder("sgd", lr=0.4, schedule={"name": "linear", "end": 0.5}, warmup=1, params={"bias": {"lr": 0.2}})
    opt = plan.build(nn.Linear(2, 1))
    schedule = plan.schedule_for(opt)
    assert isinstance(schedule, Schedule) and schedule.needs_total and schedule.total is None
    schedule.set_total(5)
    assert schedule.lr == pytest.approx([0.2, 0.1])
    assert plan.with_(total=8).schedule_for(opt, total=5).total == 8
    assert plan.schedule_for(opt, total=5).total == 5


def test_interrupted_training_with_a_schedule_goes_on_exactly():
    plan = OptimBuilder("adamw", lr=0.05, schedule="cosine", warmup=4, total=12)

    def fresh():
        net = network()
        opt = plan.build(net)
        return net, opt, plan.schedule_for(opt)

    net, opt, schedule = fresh()
    train(net, opt, 3, schedule)
    torch.save([x.state_dict() for x in (net, opt, schedule)], file := io.BytesIO())
    straight = train(net, opt, 6, schedule, seed=2)
    file.seek(0)
    again = fresh()
    for part, state in zip(again, torch.load(file, weights_only=True)):
        part.load_state_dict(state)
    assert torch.equal(straight, train(*again[:2], 6, again[2], seed=2))


def test_a_tensor_rate_is_each_groups_own():
    rate = torch.tensor(0.1)
    plan = OptimBuilder("adam", lr=rate, schedule="linear", total=2, params={"bias": {"weight_decay": 0.1}})
    a, b = plan.build(nn.Linear(2, 1)), plan.build(nn.Linear(2, 1))
    plan.schedule_for(a).advance()
    assert [float(g["lr"]) for g in (*a.param_groups, *b.param_groups)] == pytest.approx([0.05, 0.05, 0.1, 0.1])
    assert rate.item() == pytest.approx(0.1)


# ---------------------------------------------------------------- plug-ins


def trained(plan, n=12):
    "First and last loss of a regression under a plan."
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1)), torch.randn(32, 3)
    opt, losses = plan.build(net), []
    for _ in range(n):
        getattr(opt, "train", bool)()
        opt.zero_grad()
        loss = F.mse_loss(net(x), x.sum(1, keepdim=True))
        loss.backward()
        opt.step()
        losses.append(loss.item())
    return losses[0], losses[-1], opt


@pytest.mark.parametrize("name, package", [
    ("lamb", "pytorch_optimizer"), ("LION", "pytorch_optimizer"), ("prodigy", "pytorch_optimizer"),
    ("AdamWScheduleFree", "schedulefree"), ("sgdschedulefree", "schedulefree"),
])  # fmt: skip
def test_an_installed_packages_optimizer_goes_by_its_name_and_trains(name, package):
    plan = OptimBuilder(name, lr=0.01 if name != "prodigy" else 1.0)
    first, last, opt = trained(plan, 30)
    assert type(opt).__module__.split(".")[0] == package and last < first
    assert plan.to_dict()["name"] == name.lower() and eval(repr(plan)) == plan == OptimBuilder.from_dict(plan.to_dict())
    assert plan.with_(lr=0.5).name == name.lower()


def test_every_name_of_a_package_makes_an_optimizer_or_is_refused_with_its_reason():
    from pytorch_optimizer import get_supported_optimizers

    refused = {}
    for name in get_supported_optimizers():
        try:
            opt = OptimBuilder(name, lr=1e-3).build(nn.Linear(3, 3))
            assert isinstance(opt, torch.optim.Optimizer), name
        except (TypeError, ValueError) as error:
            refused[name] = str(error)
    assert all(name in message for name, message in refused.items())
    assert {"lbfgs", "lomo", "ranger21"} < refused.keys() and len(refused) < 20


def test_lamb_by_name_is_lamb_by_hand():
    from pytorch_optimizer import Lamb

    net, other = (nn.Linear(3, 2) for _ in range(2))
    other.load_state_dict(net.state_dict())
    opts = OptimBuilder("lamb", lr=0.01, weight_decay=0.1).build(net), Lamb(other.parameters(), lr=0.01, weight_decay=0.1)
    weights = [steps(m, lambda m=m: m(torch.ones(4, 3)).square().sum().backward(), opt) for m, opt in zip((net, other), opts)]
    assert torch.equal(*weights)


@pytest.mark.parametrize("name, message", [
    ("lambb", "unknown optimizer 'lambb'; accepted (nearest first): lamb"),
    ("schedulefreadamw", "(nearest first): schedulefreeadamw"),
    ("qqqq", "pytorch_optimizer has"), ("qqqq", "timm.optim, torchao.optim would be looked in if installed"),
    ("alig", "optimizer 'alig' must evaluate the loss in its step, through a closure"),
    ("adamwschedulefreeclosure", "'adamwschedulefreeclosure' must evaluate the loss several times per step"),
    ("sam", "sam: SAM.__init__() missing 1 required positional argument: 'base_optimizer'"),
    ("adahessian", "'adahessian' needs second derivatives"),
])  # fmt: skip
def test_plug_in_names_that_do_not_go(name, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        OptimBuilder(name)


def test_misspelt_options_of_plug_ins_that_swallow_any():
    with pytest.raises(TypeError, match=re.escape("lamb: unknown option 'weight_decy'; accepted (nearest first): weight_decay")):
        OptimBuilder("lamb", weight_decy=0.1)
    with pytest.raises(ValueError, match="lamb: lr must be a number >= 0; received -1"):
        OptimBuilder("lamb", lr=-1)


def test_trying_a_plug_in_out_leaves_the_random_numbers_alone():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    OptimBuilder("vsgd"), OptimBuilder("sgdw")
    assert torch.equal(torch.rand(2), expected)


TIMM = """
    from functools import partial
    from torch.optim import SGD
    class Lamb(SGD):
        def __init__(self, params, lr=1e-3, trust_clip=False): super().__init__(params, lr); self.trust_clip = trust_clip
    _known = {"sgd": SGD, "lamb": Lamb, "lambc": partial(Lamb, trust_clip=True), "fusedlamb": "apex"}
    def list_optimizers(filter="", exclude_filters=None, with_description=False): return sorted(_known)
    def get_optimizer_class(name_or_info, bind_defaults=False):
        found = _known[name_or_info]
        if isinstance(found, str): raise ImportError("APEX optimizers require apex to be installed")
        return found if bind_defaults else getattr(found, "func", found)
"""
TORCHAO = """
    from torch.optim import AdamW, Optimizer
    class AdamW8bit(AdamW):
        def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2, amsgrad=False, *, block_size=256,
                     bf16_stochastic_round=False): super().__init__(params, lr, betas, eps, weight_decay, amsgrad)
    class _AdamW(AdamW): pass
    class CPUOffloadOptimizer(Optimizer):
        def __init__(self, params, optimizer_class, *, offload_gradients=False, minimal_size=4096, **kwargs): pass
"""


@pytest.fixture
def packages(tmp_path, monkeypatch):
    "Puts packages on the path: packages({'timm/optim/__init__.py': text})."
    def put(files):
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            (path.parent.parent / "__init__.py").touch() if path.parent.name == "optim" else None
            path.write_text(textwrap.dedent(text))
        monkeypatch.syspath_prepend(str(tmp_path))
        importlib.invalidate_caches()

    yield put
    for name in [m for m in sys.modules if m.split(".")[0] in ("timm", "torchao", "mine")]:
        del sys.modules[name]


def test_timm_and_torchao_when_they_are_there(packages):
    packages({"timm/optim/__init__.py": TIMM, "torchao/optim/__init__.py": TORCHAO})
    assert OptimBuilder("lamb").factory.__module__.startswith("pytorch_optimizer")  # the first that has it
    opt = OptimBuilder("lambc", lr=0.5).build(nn.Linear(1, 1))
    assert (type(opt).__module__, opt.trust_clip, opt.param_groups[0]["lr"]) == ("timm.optim", True, 0.5)
    eight = OptimBuilder("adamw8bit", lr=0.01, block_size=128)
    assert trained(eight)[1] < trained(eight)[0] and eval(repr(eight)) == eight
    with pytest.raises(TypeError, match="unknown option 'blocksize'; accepted .nearest first.: block_size"):
        OptimBuilder("adamw8bit", blocksize=128)
    with pytest.raises(ValueError, match="'fusedlamb' of timm.optim can't be loaded: APEX optimizers require apex"):
        OptimBuilder("fusedlamb")
    with pytest.raises(ValueError, match=re.escape("(nearest first): adamw8bit, ")) as said:
        OptimBuilder("adamw9bit")
    assert "would be looked in" not in str(said.value) and "timm.optim has 4 more" in str(said.value)


def test_a_broken_package_is_named_and_does_not_stop_the_others(packages):
    packages({"timm/optim/__init__.py": "import no_such_thing", "torchao/optim/__init__.py": TORCHAO})
    said = "timm.optim is installed, but can't be imported (ModuleNotFoundError: No module named 'no_such_thing')"
    assert OptimBuilder("lion").name == "lion"  # found before it
    with pytest.warns(UserWarning, match=re.escape(f"'adamw8bit' is taken from torchao.optim: {said}")):
        OptimBuilder("adamw8bit")
    with pytest.raises(ValueError, match=re.escape(said)):
        OptimBuilder("lambc")


def test_an_entry_point_comes_before_plug_ins_and_after_what_is_registered(packages, registry):
    points = "[trainkit.optimizers]\nlamb = mine:Lamb\nlost = mine:Lost\nadam = mine:Lamb\n"
    packages({"mine/__init__.py": "from torch.optim import SGD\nclass Lamb(SGD): pass",
              "mine-1.dist-info/METADATA": "Name: mine\nVersion: 1\n", "mine-1.dist-info/entry_points.txt": points})  # fmt: skip
    assert type(OptimBuilder("LAMB", lr=0.1).build(nn.Linear(1, 1))).__module__ == "mine"
    assert OptimBuilder("adam").factory is torch.optim.Adam
    with pytest.raises(ValueError, match="optimizer 'lost' can't be loaded from mine:Lost of mine: AttributeError"):
        OptimBuilder("lost")
    with pytest.raises(ValueError, match=re.escape("(nearest first): lost, ")):
        OptimBuilder("lomst")
    register_optimizer("lamb")(a_factory)
    assert OptimBuilder("lamb").factory is a_factory


def test_no_plug_in_is_imported_for_a_name_that_is_known():
    code = ("import sys; from trainkit.optim import OptimBuilder; OptimBuilder('adamw', schedule='cosine'); "
            "print(sorted({'pytorch_optimizer', 'schedulefree', 'timm', 'torchao', 'matplotlib'} & set(sys.modules)))")
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ))
    assert told.stdout.strip() == "[]", told.stderr


# ---------------------------------------------------------------- every way to write a plan


def test_toml_and_json_files(tmp_path):
    (tmp_path / "plan.toml").write_text("""
        [optimizer]
        name = "muon"
        lr = 0.02
        only = "matrices"
        schedule = {name = "cosine", end = 0.1}
        [optimizer.rest]
        name = "adamw"
        betas = [0.9, 0.95]
        params = ["no_decay", {bias = {lr = 1e-3}}]
        [gan.critic]
        name = "adam"
        [settings]
    """)
    plan = OptimBuilder("muon", lr=0.02, only="matrices", schedule={"name": "cosine", "end": 0.1},
                        rest=OptimBuilder("adamw", betas=(0.9, 0.95), params=["no_decay", {"bias": {"lr": 1e-3}}]))  # fmt: skip
    if sys.version_info >= (3, 11):
        assert OptimBuilder.from_file(tmp_path / "plan.toml") == plan
        assert OptimBuilder.from_file(str(tmp_path / "plan.toml"), table="gan.critic") == OptimBuilder("adam")
    (tmp_path / "plan.json").write_text(json.dumps(plan.to_dict()))
    assert OptimBuilder.from_file(tmp_path / "plan.json", table=None) == plan


@pytest.mark.parametrize("file, table, message", [
    ("a.yaml", "optimizer", "a plan is read from a .toml or .json file; received 'a.yaml'"),
    ("settings.ini", "optimizer", "the section of a settings.ini goes through from_settings"),
    ("a.json", "optimiser", "a.json: unknown table 'optimiser'; accepted (nearest first): optimizer, other; table=None takes"),
    ("a.json", "other.inner", "a.json: unknown table 'inner'; accepted: none"),
    ("a.json", "optimizer", "a.json: adam: unknown option 'lrr'; accepted (nearest first): lr"),
    ("broken.json", None, "broken.json: Expecting"), ("list.json", None, "list.json: a plan is a table of options; received [1]"),
    ("absent.json", None, "No such file"),
])  # fmt: skip
def test_files_that_do_not_go(tmp_path, file, table, message):
    texts = {"a.json": '{"optimizer": {"name": "adam", "lrr": 1}, "other": {"x": 1}}', "broken.json": "{", "list.json": "[1]"}
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    with pytest.raises((TypeError, ValueError, OSError), match=re.escape(message)):
        OptimBuilder.from_file(tmp_path / file, table)


def test_toml_without_a_reader_says_what_to_do(tmp_path, monkeypatch):
    def missing(name):
        raise ModuleNotFoundError(name)

    (tmp_path / "plan.toml").write_text("[optimizer]")
    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(ImportError, match=re.escape("needs Python 3.11 or later, or the package tomli (pip install tomli)")):
        OptimBuilder.from_file(tmp_path / "plan.toml")


rates = st.floats(1e-6, 1.0)
schedules = st.sampled_from(["constant", "cosine", {"name": "linear", "end": 0.25}, {"name": "wsd", "decay": 0.5},
    {"name": "piecewise", "boundaries": (3, 7), "values": (1.0, 0.5, 0.1)}, {"name": "StepLR", "step_size": 3, "by": "epoch"},
    {"name": "plateau", "monitor": "valid/loss", "patience": 3}, "CosineAnnealingLR", a_shape,
    {"name": "cosine", "to": 1e-7}])  # fmt: skip
rules = st.sampled_from([None, "no_decay", {"rule": "layer_decay", "decay": 0.75}, {"rule": "no_decay", "embeddings": True}, one,
    {"bias|norm": {"weight_decay": 0.0, "lr_scale": 0.5}}, ["no_decay", {"rule": "layer_decay", "head": "^4"}, one]])  # fmt: skip


@st.composite
def plans(draw, depth=1):
    name = draw(st.sampled_from(["adamw", "Adam", torch.optim.NAdam, "torch.optim.adamw.AdamW", "lamb"]))
    plan = {"lr": draw(rates), "betas": [draw(st.floats(0, 0.99)), 0.95], "params": draw(rules),
            "fused": draw(st.sampled_from(["auto", False]))}  # fmt: skip
    if depth == 1:
        further = st.dictionaries(st.sampled_from(["weight_decay", "momentum"]), schedules, max_size=2)
        plan |= {"schedule": draw(schedules), "warmup": draw(st.sampled_from([0, 5])), "schedules": draw(further),
                 "total": draw(st.sampled_from([None, 100]))}  # fmt: skip
        if draw(st.booleans()):
            choices = ["matrices", {"rule": "hidden", "head": "4"}, r"^0\.", {"function": f"{__name__}.is_big"}, is_big]
            plan |= {"only": draw(st.sampled_from(choices)), "rest": draw(plans(depth=0))}
    if name == "lamb":
        plan.pop("fused")
    return OptimBuilder(name, **plan)


def is_big(name, p):
    return p.numel() > 100


@settings(max_examples=60, deadline=None)
@given(plans())
def test_every_plan_comes_back_from_its_code_its_dict_and_its_json(plan):
    again = eval(repr(plan))
    assert again == plan and repr(again) == repr(plan) and again.to_dict() == plan.to_dict()
    assert OptimBuilder.from_dict(plan.to_dict()) == plan
    assert OptimBuilder.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    assert plan.with_() == plan


def test_a_choice_by_function_prints_as_what_finds_it_again():
    plan = OptimBuilder("adam", only=is_big, rest="sgd")
    assert plan.to_dict()["only"] == {"function": f"{__name__}.is_big"} and plan.to_dict()["rest"] == {"name": "sgd"}
    assert OptimBuilder.from_dict(plan.to_dict()) == plan == eval(repr(plan))
    with pytest.raises(ValueError, match="<lambda> can't be found by its name"):
        OptimBuilder("adam", only=lambda n, p: True, rest="sgd").to_dict()


@pytest.mark.parametrize("plan, message", [
    ({"shedule": "cosine"}, "unknown option 'shedule'; accepted (nearest first): schedule"),
    ({"warmpu": 3}, "(nearest first): warmup"),
    ({"schedules": {"dampening": "linear"}}, "adamw: schedules['dampening']: unknown option"),
    ({"name": "sgd", "schedules": {"betas": "linear"}}, "sgd: schedules['betas']"),
    ({"name": "rprop", "schedules": {"weight_decay": "linear"}}, "rprop: schedules['weight_decay']: unknown option"),
    ({"schedules": {"weight_decay": "lineal"}}, "schedules['weight_decay']: unknown scheduler 'lineal'"),
    ({"schedules": {"weight_decay": {"name": "linear", "warmup": 9, "total": 9}}}, "warmup=9 leaves nothing of total=9"),
    ({"schedules": {"weight_decay": {"name": "linear", "to": -1}}}, "schedules['weight_decay']"),
    ({"schedule": "cosine", "schedules": {"lr": "linear"}}, "the schedule of lr is given twice: 'cosine', and 'linear'"),
    ({"schedule": {"name": "cosine", "by": "hour"}}, "by must be one of"),
    ({"schedule": {"name": "plateau"}}, "monitor='valid/loss'"),
    ({"schedule": {"name": "steplr"}}, "missing a required argument: 'step_size'"),
    ({"schedule": {"name": "multisteplr", "milestones": [3, 60]}, "total": 50}, "60 will not be reached with total=50"),
    ({"schedules": "cosine"}, "adamw: schedules must be {option: schedule}; received 'cosine'"),
    ({"fused": 1}, "adamw: fused must be True, False or 'auto'; received 1"),
    ({"schedule": None}, "a scheduler is a name or a function"), ({"name": None}, "received NoneType None"),
    ({"only": "matrices"}, "give both, or neither; received only='matrices', rest=None"),
    ({"rest": "sgd"}, "give both, or neither; received only=None, rest='sgd'"),
    ({"only": 3, "rest": "sgd"}, "only must be one of matrices, hidden (or {'rule': name, …}), a pattern of names"),
    ({"only": "(", "rest": "sgd"}, "only='(' is no regular expression"),
    ({"only": {"rule": "matrix"}, "rest": "sgd"}, "unknown choice 'matrix'; accepted (nearest first): matrices"),
    ({"only": "matrices", "rest": "sdg"}, "unknown optimizer 'sdg'"),
    ({"only": "matrices", "rest": {"name": "sgd", "schedule": "cosine", "warmup": 3}}, "schedule, warmup of rest"),
])  # fmt: skip
def test_contradictions_are_errors_when_they_are_written(plan, message):
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        OptimBuilder(**{"name": "adamw", **plan})


# ---------------------------------------------------------------- two optimizers, one plan


def pair(fused=False, **kw):
    rest = OptimBuilder("adamw", lr=3e-3, weight_decay=0.1, params="no_decay", fused=fused)
    return OptimBuilder("muon", lr=0.02, only="matrices", rest=rest, **kw)


def by_hand(net):
    big, other = ([p for p in net.parameters() if (p.ndim == 2) is want] for want in (True, False))
    conv, small = ([p for p in other if (p.ndim > 1) is want] for want in (True, False))
    groups = [{"params": conv}, {"params": small, "weight_decay": 0.0}]
    return torch.optim.Muon(big, lr=0.02), torch.optim.AdamW(groups, lr=3e-3, weight_decay=0.1)


def test_muon_and_adamw_in_one_plan_train_bit_for_bit_as_two_optimizers():
    a, b = network(), network()
    one, two = pair().build(a), by_hand(b)
    assert isinstance(one, CompositeOptimizer) and [type(p) for p in one.parts] == [torch.optim.Muon, torch.optim.AdamW]
    assert [(g["name"], g["lr"]) for g in one.param_groups] == [("muon", 0.02), ("adamw: decay", 3e-3), ("adamw: no_decay", 3e-3)]
    g = torch.Generator().manual_seed(1)
    for _ in range(6):
        x = torch.randn(4, 3, 6, 6, generator=g)
        for net, opts in (a, [one]), (b, two):
            for opt in opts:
                opt.zero_grad()
            F.cross_entropy(net(x), torch.tensor([0, 1, 0, 1])).backward()
            for opt in opts:
                opt.step()
    assert torch.equal(flat(a), flat(b))


def test_one_schedule_moves_both_each_from_its_own_rate():
    plan = pair(schedule="linear", total=4, schedules={"weight_decay": {"name": "linear", "end": 0.5}})
    opt = plan.build(network())
    made = plan.schedules_for(opt)
    assert list(made) == ["lr", "weight_decay"]
    for schedule in made.values():
        schedule.advance()
    assert [g["lr"] for g in opt.param_groups] == pytest.approx([0.015, 2.25e-3, 2.25e-3])
    assert [g["weight_decay"] for g in opt.param_groups] == pytest.approx([0.0875, 0.0875, 0.0])
    assert [g["lr"] for part in opt.parts for g in part.param_groups] == [g["lr"] for g in opt.param_groups]
    torch.optim.lr_scheduler.StepLR(opt, 1)  # torch takes it for an optimizer


@pytest.mark.parametrize("fused", [False, "auto"])
def test_a_composite_restored_from_a_checkpoint_goes_on_exactly(fused):
    plan = pair(fused=fused, schedule="cosine", total=12)

    def fresh():
        net = network()
        opt = plan.build(net)
        return net, opt, plan.schedule_for(opt)

    net, opt, schedule = fresh()
    train(net, opt, 3, schedule)
    torch.save([x.state_dict() for x in (net, opt, schedule)], file := io.BytesIO())
    straight = train(net, opt, 6, schedule, seed=2)
    file.seek(0)
    again = fresh()
    for part, state in zip(again, torch.load(file, weights_only=True)):
        part.load_state_dict(state)
    assert torch.equal(straight, train(*again[:2], 6, again[2], seed=2))
    assert len(again[1].state) == len(opt.state) == 5
    same = copy.deepcopy(again[1])
    assert [len(g["params"]) for g in same.param_groups] == [len(g["params"]) for g in opt.param_groups]
    assert all(a is b for a, b in zip(same.param_groups, [g for p in same.parts for g in p.param_groups]))


def test_a_composites_state_that_does_not_fit_changes_nothing():
    net = network()
    opt = pair().build(net)
    train(net, opt, 2)
    before = copy.deepcopy(opt.state_dict())
    with pytest.raises(ValueError, match=re.escape("groups of [2] tensors, and this optimizer groups of [1, 1, 3]")):
        opt.load_state_dict(torch.optim.SGD(nn.Linear(1, 1).parameters()).state_dict())
    assert str(opt.state_dict()) == str(before)


def test_a_composite_under_a_gradient_scaler():
    found = []
    for scaled in (False, True):
        net = network()
        opt, scaler = pair(fused="auto").build(net), torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=scaled)
        x = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(0))
        for spoilt in (False, True, False):
            opt.zero_grad()
            scaler.scale(F.cross_entropy(net(x), torch.tensor([0, 1, 0, 1]))).backward()
            if spoilt:
                if not scaled:
                    continue
                net[0].weight.grad[0] = float("inf")
            scaler.step(opt)
            scaler.update()
        found.append(flat(net))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


def test_hooks_and_closures_of_a_composite():
    net, seen = network(), []
    opt = pair().build(net)
    opt.register_step_pre_hook(lambda *_: seen.append("step"))
    opt.register_state_dict_post_hook(lambda o, state: {**state, "note": 1})
    opt.register_load_state_dict_pre_hook(lambda o, state: seen.append("load"))
    opt.register_load_state_dict_post_hook(lambda o: seen.append("loaded"))
    net(torch.ones(1, 3, 6, 6)).sum().backward()
    assert opt.step(lambda: seen.append("loss") or 2.0) == 2.0
    state = opt.state_dict()
    opt.load_state_dict(state)
    assert seen == ["step", "loss", "load", "loaded"] and state["note"] == 1


def test_groups_added_to_a_composite():
    net, late, wide = network(), nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2, 2))
    plan = pair(schedule="linear", total=10)
    opt = plan.build(net)
    schedule = plan.schedule_for(opt)
    opt.add_param_group({"params": [("late", late)], "lr": 1.0, "name": "late"})
    opt.add_param_group({"params": [("wide", wide)], "part": 0, "name": "wide"})
    assert [len(part.param_groups) for part in opt.parts] == [2, 3] and len(opt.param_groups) == 5
    schedule.advance()
    assert [g["lr"] for g in opt.param_groups] == pytest.approx([0.018, 2.7e-3, 2.7e-3, 0.9, 0.018])
    late.grad, wide.grad = torch.ones(3), torch.ones(2, 2)
    opt.step()
    assert not torch.equal(late, torch.ones(3)) and not torch.equal(wide, torch.ones(2, 2))
    opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert [g["name"] for g in opt.param_groups][3:] == ["late", "wide"] and opt.param_groups[4] is opt.parts[0].param_groups[1]
    with pytest.raises(ValueError, match="more than one parameter group"):
        opt.add_param_group({"params": [net[4].weight]})


def test_three_optimizers_and_modes():
    last = OptimBuilder("adamwschedulefree", lr=0.1, only="4.bias", rest="sgd")
    net = network()
    opt = OptimBuilder("muon", lr=0.02, only="matrices", rest=last).build(net)
    assert [g["name"] for g in opt.param_groups] == ["muon", "adamwschedulefree", "sgd"]
    opt.train()
    assert torch.isfinite(train(net, opt, 2)).all()
    opt.eval()
    assert opt.param_groups[1]["train_mode"] is False


def test_plans_with_only_take_no_groups():
    with pytest.raises(ValueError, match="the parameters come in groups, and the plan has only="):
        pair().build([{"params": network(), "lr": 1.0}])


# ---------------------------------------------------------------- schedules of a plan, previews, and a rate of zero


def test_a_preview_is_what_a_run_does_and_touches_nothing(tmp_path):
    plan = OptimBuilder("adamw", lr=0.4, weight_decay=0.2, schedule="cosine", warmup=2, params={"bias": {"lr_scale": 0.5}},
                        schedules={"weight_decay": {"name": "linear", "end": 0.5}, "momentum": "constant"})  # fmt: skip
    net = nn.Linear(2, 1)
    before, rng = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    seen = plan.preview(net, total=10, plot=tmp_path / "plan.png")
    assert (tmp_path / "plan.png").stat().st_size > 1000
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), before.values()))
    assert torch.equal(rng, torch.get_rng_state()) and all(p.grad is None for p in net.parameters())
    assert list(seen) == ["lr", "weight_decay", "momentum"] and all(list(lines) == ["other", "bias"] for lines in seen.values())
    opt = plan.build(net)
    made = plan.schedules_for(opt, total=10)
    for u in range(10):
        for option, key in (("lr", "lr"), ("weight_decay", "weight_decay")):
            assert [line[u] for line in seen[option].values()] == pytest.approx([g[key] for g in opt.param_groups])
        for schedule in made.values():
            schedule.advance()
    assert set(seen["momentum"]["bias"]) == {0.9} and seen["lr"]["bias"].dtype == np.float64
    shown = repr(seen).splitlines()
    assert len(shown) == 6 and shown[1].split() == ["lr", "bias", "0.06667", "→", f"{seen['lr']['bias'][-1]:.4g}", "10", "values"]


def test_a_preview_by_epoch_and_one_without_a_length():
    plan = OptimBuilder("sgd", lr=1.0, schedule={"name": "MultiStepLR", "milestones": [2, 4], "by": "epoch"})
    net = nn.Linear(1, 1)
    assert plan.preview(net, epochs=5, plot=False)["lr"]["group 0"] == pytest.approx([1, 1, 0.1, 0.1, 0.01])
    with pytest.raises(ValueError, match="the preview of lr must know how many epochs to look at: give epochs="):
        plan.preview(net, total=5, plot=False)
    with pytest.raises(ValueError, match="must know how many updates to look at: give total="):
        OptimBuilder("sgd", schedule="cosine").preview(net, plot=False)
    with pytest.raises(ValueError, match="total must be a whole number of updates >= 1; received 0"):
        OptimBuilder("sgd", schedule="cosine").preview(net, total=0, plot=False)
    waits = OptimBuilder("sgd", lr=1.0, schedule={"name": "plateau", "monitor": "valid/loss"}, warmup=2)
    assert waits.preview(net, total=4, plot=False)["lr"]["group 0"] == pytest.approx([1 / 3, 2 / 3, 1, 1])  # nothing observed
    assert len(OptimBuilder("sgd", schedule="cosine", total=7).preview(net, plot=False)["lr"]["group 0"]) == 7


def test_the_rates_schedule_can_stand_among_the_others():
    among = OptimBuilder("sgd", schedules={"lr": {"name": "cosine", "warmup": 3}})
    assert among == OptimBuilder("sgd", schedule="cosine", warmup=3)


def test_a_function_s_options_are_unknown_until_it_made_an_optimizer():
    plan = OptimBuilder(a_factory, schedules={"beta2": "linear", "momentum": "linear", "alpha": "linear"})
    opt = plan.build(nn.Linear(1, 1))
    with pytest.raises(ValueError, match="unknown option of the optimizer that is a number 'alpha'"):
        plan.schedules_for(opt)


def test_a_rate_of_zero_is_allowed_and_said_once():
    with pytest.warns(UserWarning, match="sgd: the learning rate is 0 everywhere: nothing will move there") as said:
        OptimBuilder("sgd", lr=0).build(nn.Linear(1, 1))
    assert len(said) == 1
    with pytest.warns(UserWarning, match="the learning rate is 0 in group bias: nothing"):
        OptimBuilder("sgd", lr=0.1, params={"bias": {"lr": 0.0}}).build(nn.Linear(1, 1))


# ---------------------------------------------------------------- what other builders get wrong (seeds A4, A6, T6, B8, B16)


def test_an_unknown_scheduler_is_said_at_construction_and_not_none_later():
    with pytest.raises(ValueError, match="unknown scheduler 'constant_schedule_with_warmup'"):
        OptimBuilder("adamw", schedule="constant_schedule_with_warmup")


def test_a_warm_up_starts_above_zero_and_a_cosine_stays_down():
    seen = OptimBuilder("sgd", lr=1.0, schedule="cosine", warmup=4, total=20).preview(nn.Linear(1, 1), 40, False)["lr"]["group 0"]
    assert seen[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0]) and (seen[20:] == 0).all() and (np.diff(seen[4:]) <= 0).all()


def test_torchs_multistep_is_restored_with_its_place():
    plan = OptimBuilder("sgd", lr=1.0, schedule={"name": "MultiStepLR", "milestones": [2, 4], "by": "epoch"})
    first, second = (plan.build(nn.Linear(1, 1)) for _ in range(2))
    one, two = plan.schedules_for(first)["lr"], plan.schedules_for(second)["lr"]
    for _ in range(3):
        one.advance()
    two.load_state_dict(one.state_dict())
    seen = [two.lr[0]]
    for _ in range(2):
        two.advance()
        seen.append(two.lr[0])
    assert seen == pytest.approx([0.1, 0.01, 0.01])


def test_the_registries_are_where_people_look_for_them():
    assert register_scheduler.__module__ == "trainkit.shapes" and register_optimizer.__module__ == "trainkit.optimizers"


# ---------------------------------------------------------------- every argument


@pytest.mark.parametrize(
    "plan, message",
    [
        ({"name": "adam", "amsgrad": "no"}, "adam: amsgrad must be True or False; received 'no'"),
        ({"name": "adam", "amsgrad": 1}, "received 1"),
        ({"name": "adam", "maximize": None}, "maximize must be True or False; received None"),
        ({"name": "adam", "foreach": "yes"}, "foreach must be True or False; received 'yes'"),
        ({"name": "sgd", "nesterov": "no", "momentum": 0.9}, "sgd: nesterov must be True or False; received 'no'"),
        ({"name": "sgd", "momentum": 1.5}, "sgd: momentum must be a number 0 <= x < 1; received 1.5"),
        ({"name": "sgd", "momentum": 1}, "received 1"),
        ({"name": "rmsprop", "alpha": "x"}, "rmsprop: alpha must be a number; received 'x'"),
        ({"name": "adam", "betas": (0.9, 0.99, 0.999)}, "adam: betas must be 2 numbers; received (0.9, 0.99, 0.999)"),
        ({"name": "rprop", "etas": (0.5,)}, "rprop: etas must be 2 numbers; received (0.5,)"),
        ({"params": {"bias": {"amsgrad": "no"}}}, "amsgrad must be True or False"),
        ({"params": {"bias": {"betas": (0.9, 0.9, 0.9)}}}, "betas must be 2 numbers"),
    ],
)
def test_values_of_another_kind_are_refused(plan, message):
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        OptimBuilder(**plan)
    if "params" not in plan:
        with pytest.raises((TypeError, ValueError), match=re.escape(message)):
            OptimBuilder.from_dict(plan)


def test_values_of_the_right_kind_are_taken():
    OptimBuilder("adam", amsgrad=np.True_, foreach=None, eps=1, weight_decay=torch.tensor(0.1))
    OptimBuilder("adafactor", eps=(None, 1e-3))


@pytest.mark.parametrize("plan", [[1], None, "adam", 3, {1: 2}])
def test_a_plan_is_a_dictionary(plan):
    with pytest.raises(TypeError, match="a plan is a dictionary {'name': …, option: …}; received " + re.escape(repr(plan))):
        OptimBuilder.from_dict(plan)


def test_sparse_adam_is_refused_for_dense_weights():
    net = nn.Sequential(nn.Embedding(4, 3, sparse=True), nn.Linear(3, 1))
    plan = OptimBuilder("sparseadam", lr=0.1)
    with pytest.raises(ValueError, match="made with sparse=True; the gradients of these are dense: 1.weight, 1.bias"):
        plan.build(net)
    with pytest.raises(ValueError, match="are dense: 1.weight, 1.bias"):
        plan.build(net.named_parameters(), modules=net)
    plan.build(net[0])
    both = OptimBuilder("sparseadam", only="^0", rest="sgd").build(net)
    net(torch.tensor([1, 2])).sum().backward()
    both.step()


@pytest.mark.parametrize(
    "name, plan, message",
    [
        ("adam", {"schedules": {"beta1": "linear", "momentum": "constant"}}, "momentum is betas[0] of the optimizer"),
        ("adam", {"schedules": {"momentum": "linear", "beta1": "constant"}}, "is moved by the schedule of momentum"),
        ("adam", {"schedule": "OneCycleLR", "schedules": {"beta1": "linear"}}, "the schedule of lr, which cycles the momentum"),
        ("sgd", {"schedule": "onecyclelr", "schedules": {"momentum": "linear"}, "momentum": 0.9}, "momentum is momentum of"),
    ],
)
def test_two_schedules_for_one_number_are_refused(name, plan, message):
    with pytest.raises(ValueError, match=f"{name}: two schedules can't move one number: .*" + re.escape(message)):
        OptimBuilder(name, **plan)


def test_schedules_of_numbers_beside_each_other_are_taken():
    plan = OptimBuilder("adam", schedule="one_cycle", schedules={"beta1": "linear", "beta2": "constant"})
    assert len(plan.schedules_for(plan.build(nn.Linear(1, 1)), 10)) == 3
    free = {"name": "OneCycleLR", "cycle_momentum": False}
    OptimBuilder("adam", schedule=free, schedules={"momentum": "linear"})


def test_two_schedules_for_one_number_of_a_function_are_refused_when_it_is_there():
    plan = OptimBuilder(a_factory, schedules={"beta1": "linear", "momentum": "constant"})
    with pytest.raises(ValueError, match="two schedules can't move one number"):
        plan.schedules_for(plan.build(nn.Linear(1, 1)), 10)


def test_no_decay_stays_none_on_the_way_to_a_value():
    plan = OptimBuilder("adamw", weight_decay=0.01, params="no_decay", schedules={"weight_decay": {"name": "linear", "to": 0.1}})
    net = nn.Linear(3, 2)
    seen = plan.preview(net, 10, plot=False)["weight_decay"]
    assert seen["decay"][-1] == pytest.approx(0.091) and set(seen["no_decay"]) == {0.0}
    optimizer = plan.build(net)
    schedule = plan.schedules_for(optimizer, 10)["weight_decay"]
    for _ in range(10):
        schedule.advance()
    assert [g["weight_decay"] for g in optimizer.param_groups] == [pytest.approx(0.1), 0.0]


class Falling:
    def __init__(self, power):
        self.power = power

    def __call__(self, update, total):
        return (1 - update / total) ** self.power

    def method(self, update, total):
        return self(update, total)


def test_functions_without_a_path_of_their_own_are_compared_as_they_are():
    one_, half = (lambda u, t=None: 1.0), (lambda u, t=None: 0.5)
    assert OptimBuilder(schedule=one_) != OptimBuilder(schedule=half)
    assert OptimBuilder(schedule=one_) == OptimBuilder(schedule=one_)
    makers = [lambda p, lr=rate: torch.optim.SGD(p, lr) for rate in (0.1, 0.2)]
    assert OptimBuilder(makers[0]) != OptimBuilder(makers[1]) and OptimBuilder(makers[0]) == OptimBuilder(makers[0])
    first, second = Falling(1), Falling(2)
    assert OptimBuilder(schedule=first) != OptimBuilder(schedule=second)
    assert OptimBuilder(schedule=first) == OptimBuilder(schedule=first)
    assert OptimBuilder(schedule=first.method) != OptimBuilder(schedule=second.method)
    parts = [functools.partial(Falling.__call__, Falling(n)) for n in (1, 2)]
    assert OptimBuilder(schedule=parts[0]) != OptimBuilder(schedule=parts[1])
    assert OptimBuilder(schedule=parts[0]) == OptimBuilder(schedule=parts[0])
    table = {"name": "LambdaLR", "lr_lambda": [one_]}
    assert OptimBuilder(schedule=table) != OptimBuilder(schedule={**table, "lr_lambda": [half]})
    rests = [OptimBuilder("muon", only="matrices", rest=OptimBuilder(maker)) for maker in makers]
    assert rests[0] != rests[1]


@pytest.mark.parametrize("shape", [Falling(1), Falling(1).method, functools.partial(Falling.__call__, Falling(1))],
                         ids=["made", "bound", "partial"])  # fmt: skip
def test_what_no_path_leads_back_to_is_not_written(shape):
    with pytest.raises(ValueError, match="can't be found by its name: define it in a module, or register it"):
        OptimBuilder(schedule=shape).to_dict()


def test_a_plateau_asks_for_values_of_its_series_to_preview():
    plan = OptimBuilder(schedule={"name": "plateau", "monitor": "valid/loss"})
    with pytest.raises(ValueError, match="how many values of valid/loss to look at: give total="):
        plan.preview(nn.Linear(1, 1))


@pytest.mark.parametrize("schedule", [{"name": "cosine_restarts", "cycles": 0}, {"name": "StepLR", "step_size": 0},
                                      {"name": "plateau", "monitor": "valid/q"}, lambda u, total: 1 - u / 10])  # fmt: skip
def test_a_schedule_that_would_fail_later_is_refused_in_the_plan(schedule):
    with pytest.raises(ValueError, match=r"cycles must be|step_size must be|is more of monitor='valid/q' better|at update 11"):
        OptimBuilder(schedule=schedule, total=50)
    with pytest.raises(ValueError, match=r"schedules\['weight_decay'\]: .*(cycles|step_size|valid/q|update 11)"):
        OptimBuilder(schedules={"weight_decay": schedule}, total=50)
