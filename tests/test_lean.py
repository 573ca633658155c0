"Backward, step and dropping gradients do what torch's own do, for whoever looks on."

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from trainkit.callback import On
from trainkit.device import Precision
from trainkit.learner import Learner
from trainkit.optim import OptimBuilder
from trainkit.player import Player, backward, drop_gradients, is_watched, make_step

X, Y = torch.randn(12, 3, generator=torch.Generator().manual_seed(0)), torch.ones(12, 1)
OPTIMIZERS = ["sgd", "adam", "adamw", "rmsprop", "adagrad", "nadam", "adafactor"]


def player(opt="sgd", net=None, **options):
    torch.manual_seed(0)
    found = Player("model", net or nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)), "mse",
                   opt=OptimBuilder(opt, lr=0.01, **options))  # fmt: skip
    found.build(Precision("fp32", torch.device("cpu")))
    return found


def net_of(player):
    return player.modules["model"]


def loss_of(player):
    return F.mse_loss(net_of(player)(X), Y)


def gradients(player):
    return [p.grad.clone() for p in player.parameters()]


# ----------------------------------------------------------------------------------------------------------- backward


def test_gradients_are_those_of_torch_and_are_added():
    a, b = player(), player()
    for _ in range(2):
        backward(a, loss_of(a))
        loss_of(b).backward()
    assert all(torch.equal(x, y) for x, y in zip(gradients(a), gradients(b)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_loss_of_another_type_gets_a_one_of_its_own(dtype):
    a, b = player(), player()
    for this in torch.float32, dtype, torch.float32:
        backward(a, loss_of(a).to(this))
        loss_of(b).to(this).backward()
        assert a.unit.dtype is this
    assert all(torch.equal(x, y) for x, y in zip(gradients(a), gradients(b)))


def test_hooks_of_tensors_and_parameters_are_called():
    a, seen = player(), []
    weight = net_of(a)[0].weight
    weight.register_hook(lambda g: seen.append("tensor") or g * 2)
    weight.register_post_accumulate_grad_hook(lambda p: seen.append("accumulated"))
    net_of(a)[0].register_full_backward_hook(lambda *_: seen.append("module"))
    backward(a, loss_of(a))
    assert sorted(seen) == ["accumulated", "module", "tensor"]
    b = player()
    loss_of(b).backward()
    torch.testing.assert_close(weight.grad, 2 * net_of(b)[0].weight.grad)


def test_what_torch_refuses_is_refused_with_torchs_words():
    a = player()
    for bad in net_of(a)(X), torch.ones(()), torch.ones(2).sum():
        with pytest.raises(RuntimeError) as theirs:
            bad.backward()
        with pytest.raises(RuntimeError) as ours:
            backward(a, bad)
        assert str(ours.value) == str(theirs.value)
    loss = loss_of(a)
    backward(a, loss)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        backward(a, loss)


def test_a_subclass_of_tensor_is_asked_itself():
    class Told(torch.Tensor):
        def backward(self, *args, **kw):
            told.append(1)
            return super().backward(*args, **kw)

    told, a = [], player()
    backward(a, loss_of(a).as_subclass(Told))
    assert told == [1] and net_of(a)[0].weight.grad is not None


def test_anomalies_are_found():
    a = player(net=nn.Linear(3, 1))
    with torch.autograd.detect_anomaly(check_nan=True), pytest.raises(RuntimeError, match="returned nan values"):
        backward(a, (net_of(a)(torch.zeros(1, 3)) * 0).sqrt().sum() * 0)


# --------------------------------------------------------------------------------------------------------------- step


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_is_torchs_step(name):
    a, b = player(name), player(name)
    assert not is_watched(a.opt)
    for _ in range(4):
        for p in a, b:
            loss_of(p).backward()
        make_step(a.opt)
        b.opt.step()
        for p in a, b:
            p.opt.zero_grad()
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters()))
    assert not torch.equal(next(a.parameters()), next(player(name).parameters()))


def test_whoever_looks_on_sees_every_step():
    a, seen = player(), []
    loss_of(a).backward()

    def sees(what, register):
        handle = register(lambda *_: seen.append(what))
        assert is_watched(a.opt)
        make_step(a.opt)
        handle.remove()
        assert not is_watched(a.opt)

    sees("pre", a.opt.register_step_pre_hook)
    sees("post", a.opt.register_step_post_hook)
    sees("pre of all", register_optimizer_step_pre_hook)
    sees("post of all", register_optimizer_step_post_hook)
    assert seen == ["pre", "post", "pre of all", "post of all"]
    with torch.autograd.profiler.profile(use_kineto=False) as profile:
        make_step(a.opt)
    assert any("Optimizer.step" in event.name for event in profile.function_events)
    torch.optim.lr_scheduler.StepLR(a.opt, 1)  # wraps `step`, to warn whoever calls in the wrong order
    make_step(a.opt)
    assert a.opt._opt_called


def test_an_optimizer_of_ones_own_makes_its_own_step():
    class Mine(torch.optim.Optimizer):
        def __init__(self, params, lr):
            super().__init__(params, {"lr": lr})

        @torch.no_grad()
        def step(self):
            calls.append("step")
            for group in self.param_groups:
                for p in group["params"]:
                    p.sub_(group["lr"] * p.grad.sign())

        def zero_grad(self, set_to_none=True):
            calls.append("zero_grad")
            super().zero_grad(set_to_none)

    calls, net = [], nn.Linear(3, 1)
    learn = Learner(net, [(X, Y)], "mse", OptimBuilder(Mine, lr=0.5), front="none")
    before = net.weight.detach().clone()
    learn.fit(1)
    assert calls == ["step", "zero_grad"]
    torch.testing.assert_close((net.weight - before).abs(), torch.full_like(before, 0.5))


def test_a_gradient_that_lies_otherwise_is_laid_right_before_the_step():
    net = nn.Conv2d(3, 2, 3).to(memory_format=torch.channels_last)
    a = player("adamw", net)
    start, grad = net.weight.detach().clone(), torch.randn(2, 3, 3, 3)
    net.weight.grad, net.bias.grad = grad.clone(), torch.zeros(2)  # contiguous; the weight is channels-last
    assert a.opt.param_groups[0]["fused"] and not is_watched(a.opt)
    make_step(a.opt)
    other = nn.Parameter(start.contiguous())
    other.grad = grad.clone()
    torch.optim.AdamW([other], lr=0.01).step()
    torch.testing.assert_close(net.weight.detach(), other.detach())


# ---------------------------------------------------------------------------------------------------------- gradients


def test_no_gradient_is_left_in_any_group():
    a = player("adamw", params="no_decay")
    loss_of(a).backward()
    assert len(a.opt.param_groups) == 2
    drop_gradients(a)
    assert all(p.grad is None for p in a.parameters())


def test_a_list_of_the_loaders_own_stays_the_loaders():
    batches = [[X, Y], [X, Y]]
    learn = Learner(nn.Linear(3, 1), batches, "mse", front="none")
    learn.add(On("before_batch", lambda learn: learn.batch.__setitem__(0, learn.batch[0] * 0)))
    learn.fit(2)
    assert all(torch.equal(x, X) for x, _ in batches)


def test_the_loop_is_profiled_as_any_other():
    learn = Learner(nn.Linear(3, 1), [(X, Y)] * 3, "mse", front="none")
    with torch.autograd.profiler.profile(use_kineto=False) as profile:
        learn.fit(1)
    names = [event.name for event in profile.function_events]
    assert sum("Optimizer.step" in name for name in names) == 3 and any("Backward" in name for name in names)
