"""The optimizer builder: what it accepts, what it refuses, and that what it builds is torch's."""
import copy
import functools
import io
import itertools
import json
import re

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from trainkit import optim
from trainkit.optim import OptimBuilder, as_builder, register_optimizer
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
        ({"name": "sgd", "momentum": "0.9"}, "sgd: momentum must be a number >= 0; received '0.9'"),
        ({"name": "sgd", "momentum": -1}, "sgd: momentum must be a number >= 0; received -1"),
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
        ({"schedule": {"name": "cosine", "end": 2}}, "end must be a multiplier from 0 to 1"),
        ({"warmup": -1}, "warmup must be a whole number of updates >= 0 or a fraction"),
        ({"warmup": 50, "total": 50}, "warmup=50 leaves nothing of total=50"),
        ({"total": 0}, "total must be a whole number of updates >= 1"),
        ({"schedule": {"name": "linear", "warmup": 5}, "warmup": 6}, "warmup is given twice: 5 in schedule, and 6"),
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
    monkeypatch.setattr(optim, "_REGISTERED", {})


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
