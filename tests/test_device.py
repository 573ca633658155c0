"""Devices, precision, memory formats, names of weights, and random states."""
import copy
import dataclasses
import io
import os
import random
import re
import types
from collections import OrderedDict, UserDict, defaultdict, namedtuple
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_sequence
from torch.utils.data import DataLoader, Dataset

from trainkit import device as dev
from trainkit.device import (
    Precision,
    apply_channels_last,
    available_devices,
    clean_keys,
    compile_module,
    pick_device,
    preserve_rng,
    rng_state,
    seed_everything,  # fmt: skip
    seed_for,
    seed_worker,
    set_rng_state,
    to_device,
    wants_channels_last,
)

CPU = torch.device("cpu")


def cuda(test):
    "Marks a test that needs a CUDA device."
    return pytest.mark.cuda(pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA here")(test))


# ---------------------------------------------------------------- which device


def test_auto_is_the_first_of_those_that_are_here():
    assert available_devices()[-1] == "cpu"
    assert pick_device() == pick_device(None) == pick_device(available_devices()[0])
    assert pick_device("cpu") == pick_device(CPU) == pick_device("cpu:0") == CPU


def test_auto_prefers_the_accelerator_and_gives_it_an_index(monkeypatch):
    monkeypatch.setattr(dev, "available_devices", lambda: ["cuda:0", "cuda:1", "cpu"])
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 1)
    assert pick_device("auto") == pick_device("cuda") == torch.device("cuda:1")
    assert pick_device("cuda:0") == torch.device("cuda:0") and pick_device("cpu") == CPU
    with pytest.raises(ValueError, match="no device 'mps' here; accepted: auto, cuda:0, cuda:1, cpu"):
        pick_device("mps")


@pytest.mark.parametrize("bad", ["gpu", "", "cuda:99", "meta", 1.5, "cpu:x"])
def test_a_device_that_is_not_here_is_refused_with_those_that_are(bad):
    with pytest.raises(ValueError, match=f"there is no device {re.escape(repr(bad))}.*accepted: auto, .*cpu"):
        pick_device(bad)


@cuda
def test_cuda_tensors_answer_with_the_same_device():
    assert torch.ones(1, device=pick_device("cuda")).device == pick_device("cuda")


# ---------------------------------------------------------------- moving


Point = namedtuple("Point", "x y")


@dataclasses.dataclass
class Plain:
    x: object
    y: object = 3
    later: object = dataclasses.field(default=None, init=False)


@dataclasses.dataclass(frozen=True, slots=True)
class Frozen:
    x: object
    name: str = "n"


class Moves:
    def to(self, device):
        return ("moved", device)


class Wrapped(UserDict):
    pass


class OwnMapping(dict):
    pass


tensors = st.integers(0, 3).map(lambda n: torch.arange(n))
leaves = st.none() | st.integers() | st.text(max_size=3) | st.floats(allow_nan=False) | tensors
nested = st.recursive(leaves, lambda inner: st.one_of(
    st.lists(inner, max_size=3), st.tuples(inner, inner), st.dictionaries(st.text(max_size=2), inner, max_size=3),
    st.builds(Point, inner, inner), st.builds(Plain, inner), st.builds(Frozen, inner)))  # fmt: skip


def flatten(x):
    if isinstance(x, (list, tuple)):
        return [type(x).__name__, *[leaf for item in x for leaf in flatten(item)]]
    if isinstance(x, dict):
        return [type(x).__name__, *[leaf for k, v in x.items() for leaf in (k, *flatten(v))]]
    if dataclasses.is_dataclass(x):
        return [type(x).__name__, *[leaf for f in dataclasses.fields(x) for leaf in flatten(getattr(x, f.name))]]
    return [x]


@given(nested)
def test_what_is_already_there_comes_back_as_it_is(batch):
    before, after = flatten(batch), flatten(to_device(batch, "cpu"))
    assert len(before) == len(after)
    assert all(a is b or (not isinstance(a, torch.Tensor) and a == b) for a, b in zip(before, after))


@given(nested)
def test_every_tensor_moves_and_nothing_else_changes(batch):
    before, after = flatten(batch), flatten(to_device(batch, "meta"))
    for a, b in zip(before, after, strict=True):
        if isinstance(a, torch.Tensor):
            assert b.device.type == "meta" and b.shape == a.shape and a.device == CPU
        else:
            assert a == b


@pytest.mark.parametrize("dtype", "float32 float64 float16 int64 int32 uint8 uint16 bool complex64".split())
def test_numeric_arrays_become_tensors_of_their_type(dtype):
    array = np.arange(6).reshape(2, 3).astype(dtype)
    tensor = to_device([array], "cpu")[0]
    assert str(tensor.dtype) == f"torch.{dtype}" and np.array_equal(tensor.numpy(), array)


@pytest.mark.parametrize("array", [
    np.arange(6)[::-1], np.arange(6).reshape(2, 3).T, np.arange(3).astype(">i4"), np.array(2.5), np.zeros((0, 2)),
    np.broadcast_to(np.arange(3), (2, 3)),
])  # fmt: skip
def test_awkward_arrays_too(array):
    assert np.array_equal(to_device(array, "cpu").numpy(), array)


def test_a_read_only_array_is_copied(recwarn):
    array = np.zeros(3)
    array.flags.writeable = False
    to_device(array, "cpu").add_(1)
    assert array.sum() == 0 and not recwarn.list


@pytest.mark.parametrize("leaf", [np.array(["a"]), np.array([object()]), None, "s", b"b", 3, object(), int, {1, 2}])
def test_other_leaves_are_untouched(leaf):
    assert to_device((leaf,), "meta")[0] is leaf


def test_containers_keep_their_kind_and_the_batch_its_contents():
    t = torch.ones(1)
    boxes = [OrderedDict(a=t), defaultdict(list, a=t), OwnMapping(a=t), Wrapped(a=t)]
    for box in boxes:
        moved = to_device(box, "meta")
        assert type(moved) is type(box) and moved["a"].device.type == "meta" and box["a"] is t
    assert to_device(boxes[1], "meta")["new"] == []
    assert type(to_device(types.MappingProxyType({"a": t}), "meta")) is dict
    assert type(to_device(torch.Size([2, 3]), "meta")) is torch.Size


def test_objects_that_can_move_are_asked_to():
    assert to_device([Moves()], "cpu") == [("moved", CPU)]
    packed = to_device(pack_sequence([torch.ones(2), torch.ones(1)]), "meta")
    assert packed.data.device.type == "meta" and packed.batch_sizes.device == CPU


def test_channels_last_only_where_it_means_something():
    images, ints, flat = torch.randn(2, 3, 4, 4), torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.randn(2, 3)
    batch = {"x": (images, ints), "y": [flat, np.random.rand(2, 3, 4, 4)]}
    moved = to_device(batch, "cpu", channels_last=True)
    assert moved["x"][0].is_contiguous(memory_format=torch.channels_last) and torch.equal(moved["x"][0], images)
    assert moved["y"][1].is_contiguous(memory_format=torch.channels_last)
    assert moved["x"][1] is ints and moved["y"][0] is flat and images.is_contiguous()
    assert to_device(moved["x"][0], "cpu", channels_last=True) is moved["x"][0]
    assert to_device(moved["x"][0], "cpu") is moved["x"][0]


@cuda
def test_there_and_back():
    x = torch.randn(64, 3, 32, 32).pin_memory()
    there = to_device({"x": x}, "cuda", channels_last=True)["x"]
    assert there.is_cuda and there.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(to_device(there, "cpu"), x)


# ---------------------------------------------------------------- precision


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 2))


def train(precision, optimizer, steps=20, device=CPU, **kw):
    net = network().to(device)
    opt = getattr(torch.optim, optimizer)(net.parameters(), lr=0.01, **kw)
    scaler, g, losses = precision.scaler(), torch.Generator().manual_seed(1), []
    x, y = torch.randn(16, 1, 8, 8, generator=g).to(device), torch.randint(2, (16,), generator=g).to(device)
    for _ in range(steps):
        opt.zero_grad()
        with precision.autocast():
            out = net(x)
            loss = F.cross_entropy(out, y)
        assert out.dtype == precision.dtype
        if scaler is None:
            loss.backward()
            opt.step()
        else:
            scaler.scale(loss).backward()
            scaler.unscale_(opt)
            scaler.step(opt)
            scaler.update()
        losses.append(loss.item())
    assert all(p.dtype == torch.float32 for p in net.parameters())
    return losses


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("optimizer", ["Adam", "AdamW", "SGD"])
@pytest.mark.parametrize("name", ["bf16", "fp16"])
def test_mixed_precision_trains_on_the_cpu_as_full_precision_does(name, optimizer, fused):
    full = train(Precision("fp32", "cpu"), optimizer, fused=fused)
    assert train(Precision(name, "cpu"), optimizer, fused=fused) == pytest.approx(full, abs=0.03)
    assert full[-1] < full[0]


@pytest.mark.parametrize("unscale", [True, False])
@pytest.mark.parametrize("optimizer, kw", [("Adam", {"fused": True}), ("Adam", {}), ("SGD", {"fused": True})])
def test_the_scaler_leaves_out_a_step_with_infinite_gradients(optimizer, kw, unscale):
    net, scaler = network(), Precision("fp16", "cpu").scaler()
    opt = getattr(torch.optim, optimizer)(net.parameters(), lr=0.1, **kw)
    before, scale = copy.deepcopy(net.state_dict()), scaler.get_scale()
    for value in float("inf"), 1.0:
        opt.zero_grad()
        scaler.scale(net(torch.ones(2, 1, 8, 8)).sum() * value).backward()
        if unscale:
            scaler.unscale_(opt)
        scaler.step(opt)
        scaler.update()
        same = all(torch.equal(p, before[k]) for k, p in net.state_dict().items())
        assert same == (value != 1.0)
        assert scaler.get_scale() == scale / 2


def test_full_precision_enters_nothing():
    precision = Precision()
    with precision.autocast():
        assert not torch.is_autocast_enabled("cpu")
    assert precision.scaler() is None and precision.name == "fp32"


def test_the_context_cannot_stay_entered():
    precision = Precision("bf16", CPU)
    with pytest.raises(RuntimeError, match="inside"):
        with precision.autocast(), precision.autocast():
            raise RuntimeError("inside")
    assert not torch.is_autocast_enabled("cpu")


def test_what_a_device_cannot_do_is_refused_with_what_it_can():
    with pytest.raises(ValueError, match="precision 'fp8' is not supported on cpu; accepted: fp32, bf16, fp16"):
        Precision("fp8", "cpu")
    with pytest.raises(ValueError, match="precision 'fp16' is not supported on meta; accepted: fp32"):
        Precision("fp16", "meta")


@cuda
@pytest.mark.parametrize("name", ["bf16", "fp16"])
def test_mixed_precision_trains_on_cuda(name):
    where = torch.device("cuda")
    full = train(Precision("fp32", where), "AdamW", device=where)
    assert train(Precision(name, where), "AdamW", device=where) == pytest.approx(full, abs=0.05)


# ---------------------------------------------------------------- memory format, compiling, names


def test_channels_last_is_for_2d_convolutions():
    assert wants_channels_last(nn.Sequential(nn.ConvTranspose2d(1, 1, 1)), CPU)
    assert wants_channels_last(network(), torch.device("cuda"))
    assert not wants_channels_last(network(), torch.device("mps"))
    assert not wants_channels_last(nn.Sequential(nn.Conv1d(1, 1, 1), nn.Linear(1, 1)), CPU)


def test_channels_last_changes_the_layout_and_nothing_else():
    net, x = network(), torch.randn(2, 1, 8, 8, requires_grad=True)
    params, state, out = list(net.parameters()), copy.deepcopy(net.state_dict()), net(x)
    assert apply_channels_last(net) is net
    assert all(p is q for p, q in zip(params, net.parameters()))
    assert net[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert all(torch.equal(state[k], v) for k, v in net.state_dict().items())
    torch.testing.assert_close(net(x), out)


def test_the_gradient_of_a_gradient_is_the_same_channels_last():
    def penalty(net, x):
        (grad,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
        return torch.autograd.grad(((grad.flatten(1).norm(dim=1) - 1) ** 2).mean(), net[0].weight)[0]

    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 4, 2, 1), nn.Softplus(), nn.Conv2d(8, 1, 4)).double()
    x = torch.randn(2, 3, 8, 8, dtype=torch.double, requires_grad=True)
    expected = penalty(net, x)
    torch.testing.assert_close(penalty(apply_channels_last(net), to_device(x, CPU, channels_last=True)), expected)


class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = network()

    def forward(self, x):
        return self.inner(x) * 2


class OwnSequential(nn.Sequential):
    pass


@pytest.mark.parametrize("make", [network, Own, lambda: OwnSequential(network()), lambda: nn.Conv2d(1, 1, 3)])
def test_compiling_in_place_compiles_and_keeps_the_names(make):
    """torch 2.13's own Module.compile does nothing for nn.Sequential and other modules of torch's."""
    net, x, graphs = make(), torch.randn(2, 1, 8, 8), []
    net.register_forward_hook(lambda module, args, out: out * 3)
    keys, out = list(net.state_dict()), net(x)

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    assert compile_module(net, {"backend": backend}) is net
    torch.testing.assert_close(net(x), out)
    assert (n := len(graphs)) > 0 and list(net.state_dict()) == keys
    net(x)
    assert len(graphs) == n
    net.eval()(x).sum().backward()
    assert all(p.grad is not None for p in net.parameters())
    copy.deepcopy(net).load_state_dict(net.state_dict())


def test_compile_says_what_it_takes():
    net = network()
    assert compile_module(net, False) is net and net._compiled_call_impl is None
    compile_module(net, True)
    assert net._compiled_call_impl is not None
    for bad in "max", None, 1:
        with pytest.raises(TypeError, match=f"True, False or the options of torch.compile; received {bad!r}"):
            compile_module(net, bad)
    with pytest.raises(TypeError, match="bakend"):
        compile_module(net, {"bakend": "eager"})


def test_weights_from_wrapped_modules_load_into_bare_ones():
    state = network().state_dict()
    wrapped = nn.DataParallel(torch.compile(network(), backend="eager")).state_dict()
    assert clean_keys(wrapped).keys() == state.keys()
    network().load_state_dict(clean_keys(wrapped))
    assert clean_keys(state) == dict(state) and clean_keys({}) == {}


@given(st.lists(st.from_regex(r"[a-z]{1,6}(\.[a-z0-9]{1,3}){0,3}", fullmatch=True), unique=True, min_size=1))
def test_clean_keys_undoes_any_wrapping_and_is_stable(names):
    names = [n for n in names if not n.startswith("module.")] or ["a"]
    state = dict.fromkeys(names)
    compiled = {".".join(f"_orig_mod.{part}" for part in n.split(".")): None for n in names}
    assert clean_keys(compiled) == state
    assert clean_keys({f"module.module._orig_mod.{n}": None for n in names}) == state
    assert clean_keys(clean_keys(compiled)) == state


def test_a_name_of_ones_own_stays():
    assert clean_keys({"module.a": 1, "b": 2}) == {"module.a": 1, "b": 2}
    assert clean_keys({"module.a": 1}, like=["module.a"]) == {"module.a": 1}
    assert clean_keys({"x_orig_mod.a": 1, "y": 2}) == {"x_orig_mod.a": 1, "y": 2}
    with pytest.raises(ValueError, match="the state has 'a' twice"):
        clean_keys({"_orig_mod.a": 1, "a": 2})


# ---------------------------------------------------------------- randomness


@pytest.fixture(autouse=True)
def keep_rng():
    with preserve_rng():
        yield


def draw():
    return random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(2).tolist()


def saved(state):
    torch.save(state, file := io.BytesIO())
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_a_saved_state_gives_the_same_numbers_again():
    random.gauss(0, 1), np.random.randn()  # each leaves the second of a pair behind, which is state, too
    state = saved(rng_state())
    first = draw()
    assert draw() != first
    set_rng_state(state)
    assert draw() == first


def test_preserve_leaves_no_trace_even_of_an_error():
    set_rng_state(state := rng_state())
    expected = draw()
    set_rng_state(state)
    with pytest.raises(RuntimeError), preserve_rng():
        draw()
        seed_everything(5)
        raise RuntimeError
    assert draw() == expected


@pytest.mark.parametrize(
    "change, message",
    [
        ({"torch": torch.zeros(3)}, "can't be set, and nothing was changed"),
        ({"torch": None}, "can't be set, and nothing was changed"),
        ({"numpy": ("MT19937", torch.zeros(3), 0, 0, 0.0)}, "can't be set, and nothing was changed"),
        ({"python": (3, (1, 2), None)}, "can't be set, and nothing was changed"),
        ({"cuda": [torch.zeros(1)] * 99}, "of 99 CUDA devices"),
    ],
)
def test_a_state_that_cannot_be_set_changes_nothing(change, message):
    seed_everything(1)
    other = rng_state()
    seed_everything(2)
    with pytest.raises(ValueError, match=message):
        set_rng_state({**other, **change})
    after = draw()
    seed_everything(2)
    assert draw() == after


@pytest.mark.skipif(torch.backends.mps.is_available(), reason="MPS is here")
def test_a_state_of_a_device_that_is_not_here_is_refused():
    with pytest.raises(ValueError, match="of an MPS device, and there is none here"):
        set_rng_state({**rng_state(), "mps": torch.zeros(1)})
    with pytest.raises(ValueError, match="needs python, numpy and torch; numpy missing"):
        set_rng_state({k: v for k, v in rng_state().items() if k != "numpy"})


@cuda
def test_cuda_generators_take_part():
    torch.rand(1, device="cuda")
    state = saved(rng_state())
    assert len(state["cuda"]) == torch.cuda.device_count()
    first = torch.rand(2, device="cuda")
    with preserve_rng():
        torch.rand(5, device="cuda")
    second = torch.rand(2, device="cuda")
    set_rng_state(state)
    assert torch.equal(torch.rand(2, device="cuda"), first) and torch.equal(torch.rand(2, device="cuda"), second)


@given(st.integers(0, 2**32 - 1))
def test_a_seed_decides_all_generators(seed):
    seed_everything(seed)
    first = draw()
    seed_everything(seed)
    assert draw() == first


@pytest.mark.parametrize("bad", [-1, 2**32, 1.0, "1", True, None])
def test_bad_seeds_are_named_and_seed_nothing(bad):
    seed_everything(4)
    expected = draw()
    seed_everything(4)
    with pytest.raises(ValueError, match=r"seed must be a whole number from 0 to 2\*\*32 - 1; received"):
        seed_everything(bad)
    assert draw() == expected


def test_deterministic_is_asked_of_torch(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    was = torch.are_deterministic_algorithms_enabled()
    try:
        seed_everything(1)
        assert torch.are_deterministic_algorithms_enabled() == was
        seed_everything(1, deterministic=True)
        assert torch.are_deterministic_algorithms_enabled() and not torch.backends.cudnn.benchmark
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    finally:
        torch.use_deterministic_algorithms(was)


# ---------------------------------------------------------------- seeds


@pytest.mark.parametrize("seed, parts, expected", [
    (0, (), 2968811710), (0, (0,), 3757552657), (0, (0, 0), 4088532484), (0, (1, 0), 3953331965), (0, (0, 1), 3581274545),
    (3407, (1, 2, 3, 4), 1876889165), (2**64 - 1, (2**32 - 1,), 1616936421),
])  # fmt: skip
def test_a_seed_for_a_part_is_the_same_on_every_platform(seed, parts, expected):
    assert seed_for(seed, *parts) == seed_for(np.int64(seed) if seed < 2**63 else seed, *map(np.uint32, parts)) == expected


def test_parts_get_streams_that_have_nothing_to_do_with_each_other():
    parts = [(), *((rank,) for rank in range(30)), *((rank, worker) for rank in range(30) for worker in range(30))]
    keys = [(seed, *part) for seed in range(4) for part in parts]
    seeds = [seed_for(*key) for key in keys]
    assert len(set(seeds)) == len(keys)
    bits = (np.array(seeds, dtype=np.uint32)[:, None] >> np.arange(32, dtype=np.uint32)) & 1
    n = len(seeds)
    assert np.all(abs(bits.mean(0) - 0.5) < 5 * 0.5 / n**0.5)  # every bit is a fair coin …
    assert np.all(abs((bits[1:] ^ bits[:-1]).mean(0) - 0.5) < 5 * 0.5 / n**0.5)  # … also from one part to the next


@given(st.integers(0, 2**64 - 1), st.lists(st.integers(0, 2**32 - 1), max_size=4))
def test_a_zero_more_is_another_part(seed, parts):
    assert 0 <= seed_for(seed, *parts) < 2**32
    assert seed_for(seed, *parts) != seed_for(seed, *parts, 0)


@pytest.mark.parametrize("bad", [-1, 2**32, 1.5, "0", True, None])
def test_bad_parts_and_ranks_are_named(bad):
    with pytest.raises(ValueError, match=r"each part of a seed must be a whole number from 0 to 2\*\*32 - 1; received"):
        seed_for(3, 0, bad)
    expected = rng_state()["torch"]
    with pytest.raises(ValueError, match=r"rank must be a whole number from 0 to 2\*\*32 - 1; received"):
        seed_everything(3, rank=bad)
    assert torch.equal(rng_state()["torch"], expected)
    if bad != 2**32:
        with pytest.raises(ValueError, match=r"seed must be a whole number from 0 to 2\*\*64 - 1; received"):
            seed_for(bad)


def test_rank_0_is_seeded_as_without_ranks_and_the_others_differ():
    seed_everything(7)
    first = draw()
    random.seed(7), np.random.seed(7), torch.manual_seed(7)
    assert draw() == first
    drawn = []
    for rank in range(4):
        seed_everything(7, rank=rank)
        drawn.append(draw())
    assert drawn[0] == first and len({str(d) for d in drawn}) == 4


class Draws(Dataset):
    "Each sample: a number of Python's, NumPy's and torch's generator, and the worker it comes from."

    def __len__(self):
        return 4

    def __getitem__(self, i):
        worker = torch.utils.data.get_worker_info().id
        return torch.tensor([random.random(), np.random.rand(), torch.rand(()).item(), worker], dtype=torch.float64)


def two_epochs(how, init, persistent=False):
    loader = DataLoader(Draws(), num_workers=2, multiprocessing_context=how, worker_init_fn=init, persistent_workers=persistent,
                        generator=torch.Generator().manual_seed(0))  # fmt: skip
    return torch.stack([torch.cat([*loader]) for _ in range(2)])  # epoch, sample, generator


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_workers_draw_their_own_numbers_each_epoch_and_the_same_each_run():
    first = two_epochs("fork", seed_worker)
    assert sorted(first[0, :, 3].tolist()) == [0, 0, 1, 1]
    drawn = first[..., :3]
    assert len(drawn.unique()) == drawn.numel() == 24
    assert torch.equal(two_epochs("fork", seed_worker), first)
    other = two_epochs("fork", partial(seed_worker, rank=1))
    assert len(torch.cat([drawn, other[..., :3]]).unique()) == 48


def test_workers_that_are_spawned_draw_what_forked_ones_do():
    spawned = two_epochs("spawn", partial(seed_worker, rank=1), persistent=True)
    drawn = spawned[..., :3]
    assert len(drawn.unique()) == drawn.numel() == 24
    if hasattr(os, "fork"):
        assert torch.equal(spawned, two_epochs("fork", partial(seed_worker, rank=1), persistent=True))


def test_in_a_worker_all_three_generators_are_seeded_by_its_torch_seed():
    torch.manual_seed(2**40 + 1)
    seed_worker(1)
    first, seeded = draw(), torch.initial_seed()
    assert seeded == seed_for(2**40 + 1, 1, 0)
    seed_everything(seeded)
    assert draw() == first
