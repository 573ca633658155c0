"""The layers of GANs against closed forms, loops and torch's own functions, and what is refused."""
import copy
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset
from ways import resumes

from trainkit.gan import layers as L
from trainkit.gan.augment import (
    along,
    between,
    brightness,
    contrast,
    cutout,
    saturation,
    shifted,
    translation,
    whole_number,
)
from trainkit.gan.blocks import down_conv, make_activation, up_conv
from trainkit.gan.learner import GANLearner
from trainkit.gan.models import DCGANDiscriminator, DCGANGenerator
from trainkit.gan.norms import fan_in
from trainkit.gan.penalties import R1

quick = settings(max_examples=20, deadline=None)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def seed(n=0):
    return torch.Generator().manual_seed(n)


def zeroed(block):
    for p in block.body.parameters():
        nn.init.zeros_(p)
    return block


def open_gate(layer):
    "Self-attention with γ away from 0."
    nn.init.constant_(layer.gamma, 0.7)
    return layer


def with_reference(layer, n=3):
    layer.references = n
    return layer


# --- every layer ------------------------------------------------------------------------------------------------------

# name -> (a new layer, the shape it makes of (6, 16, 8, 8) and labels)
LAYERS = {
    "residual": (lambda: L.ResidualBlock2d((16, 8, 24), (3, 4), (1, 2)), (6, 24, 4, 4)),
    "residual up": (lambda: L.ResidualBlockTranspose2d((16, 8, 4), (3, 4), (1, 2)), (6, 4, 16, 16)),
    "basic": (lambda: L.BasicBlock2d(16, 5), (6, 21, 8, 8)),
    "bottleneck": (lambda: L.BottleneckBlock2d(16, 5), (6, 21, 8, 8)),
    "dense": (lambda: L.DenseBlock2d(3, 16, 5, L.BottleneckBlock2d), (6, 31, 8, 8)),
    "transition": (lambda: L.TransitionBlock2d(16), (6, 8, 4, 4)),
    "transition up": (lambda: L.TransitionBlockTranspose2d(16, 6), (6, 6, 16, 16)),
    "pixel norm": (L.PixelNorm, (6, 16, 8, 8)),
    "conditional": (lambda: L.ConditionalBatchNorm2d(16, 3), (6, 16, 8, 8)),
    "virtual": (lambda: with_reference(L.VirtualBatchNorm2d(16)), (6, 16, 8, 8)),
    "attention": (lambda: open_gate(L.SelfAttention2d(16)), (6, 16, 8, 8)),
    "pooled attention": (lambda: open_gate(L.SelfAttention2d(16, 4, pool=2)), (6, 16, 8, 8)),
    "minibatch std": (lambda: L.MinibatchStd(features=2), (6, 18, 8, 8)),
    "minibatch": (lambda: nn.Sequential(nn.Flatten(), L.MinibatchDiscrimination(1024, 3)), (6, 1027)),
    "spectral": (lambda: L.spectral_norm(down_conv(16, 4)), (6, 4, 8, 8)),
    "equalised": (lambda: L.equalized_lr(up_conv(16, 4), multiplier=0.1), (6, 4, 16, 16)),
    "augment": (L.DiffAugment, (6, 16, 8, 8)),
}
each_layer = pytest.mark.parametrize("name", LAYERS)


def call(layer, x):
    return layer(x, torch.arange(len(x)) % 3) if isinstance(layer, L.ConditionalBatchNorm2d) else layer(x)


def seeded_call(layer, x):
    torch.manual_seed(5)
    return call(layer, x)


@each_layer
def test_shapes_gradients_and_types(name):
    layer, shape = LAYERS[name][0](), LAYERS[name][1]
    x = torch.randn(6, 16, 8, 8, requires_grad=True)
    y = call(layer, x)
    assert y.shape == shape and y.dtype == torch.float32
    y.square().sum().backward()
    assert x.grad.abs().sum() > 0
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())
    assert call(layer.double(), x.detach().double()).dtype == torch.float64


@each_layer
def test_a_state_dict_brings_all_of_it_back(name):
    old, new = LAYERS[name][0](), LAYERS[name][0]()
    for layer in (old, new):
        call(layer, torch.randn(6, 16, 8, 8))  # statistics and power iterations move
    new.load_state_dict(old.state_dict())
    x = torch.randn(6, 16, 8, 8)
    assert torch.equal(seeded_call(old, x), seeded_call(new, x))
    assert torch.equal(seeded_call(old.eval(), x), seeded_call(new.eval(), x))
    assert torch.equal(seeded_call(copy.deepcopy(old), x), seeded_call(old, x))


@each_layer
def test_channels_last_gives_the_same(name):
    layer, x = LAYERS[name][0](), torch.randn(6, 16, 8, 8)
    other = copy.deepcopy(layer).to(memory_format=torch.channels_last)
    assert_close(seeded_call(other, x.to(memory_format=torch.channels_last)), seeded_call(layer, x), rtol=1e-4, atol=1e-5)


@each_layer
def test_autocast_comes_near_and_trains(name):
    layer, x = LAYERS[name][0](), torch.randn(6, 16, 8, 8)
    exact = seeded_call(copy.deepcopy(layer), x)
    for given_x in (x, x.bfloat16()):
        with torch.autocast("cpu", torch.bfloat16):
            y = seeded_call(layer, given_x)
        assert (y.float() - exact).norm() < 0.03 * exact.norm()
        if list(layer.parameters()):
            y.float().sum().backward()
            assert all(p.grad.isfinite().all() and p.grad.dtype == torch.float32 for p in layer.parameters())


@pytest.mark.parametrize("name", ["attention", "minibatch std", "spectral", "equalised", "augment"])
def test_a_whole_graph_for_compile(name):
    layer, x = LAYERS[name][0](), torch.randn(6, 16, 8, 8)
    compiled = torch.compile(copy.deepcopy(layer), backend="eager", fullgraph=True)
    torch.manual_seed(5)
    labels = (torch.arange(6) % 3,) if name == "conditional" else ()
    assert_close(compiled(x, *labels), seeded_call(layer, x))


@pytest.mark.parametrize("name", ["attention", "pooled attention", "minibatch std", "pixel norm", "virtual", "conditional"])
def test_second_derivatives_for_gradient_penalties(name):
    layer = LAYERS[name][0]().double()
    x = torch.randn(6, 16, 2, 2, dtype=torch.double, requires_grad=True)
    f = lambda x: call(layer, x)[:, ::5]
    assert torch.autograd.gradcheck(f, x, fast_mode=True) and torch.autograd.gradgradcheck(f, x, fast_mode=True)


# --- residual and dense blocks ----------------------------------------------------------------------------------------

@quick
@given(k=st.integers(1, 7), s=st.integers(1, 4), cells=st.integers(1, 4))
def test_default_paddings_divide_and_multiply_the_side(k, s, cells):
    x = torch.randn(1, 1, cells * s, cells * s)
    if s == 1 and k % 2 == 0:
        for conv in (down_conv, up_conv):
            with pytest.raises(ValueError, match=f"kernel={k} with stride 1 has no padding that keeps the size"):
                conv(1, 1, k, s)
        assert up_conv(1, 1, k, s, 0)(x).shape[-1] == cells + k - 1  # with a padding it is torch's own
    else:
        assert down_conv(1, 1, k, s)(x).shape[-1] == cells and up_conv(1, 1, k, s)(x).shape[-1] == cells * s * s


def test_residual_block_is_its_formula():
    block = L.ResidualBlock2d((4, 6, 8), (3, 5), (2, 1), last_activation=nn.Tanh).eval()
    conv1, bn1, act, conv2, bn2 = block.body
    for bn in (bn1, bn2, block.shortcut[1]):
        nn.init.normal_(bn.weight), nn.init.normal_(bn.bias), nn.init.uniform_(bn.running_var, 0.5, 2)
    norm = lambda bn, x: F.batch_norm(x, bn.running_mean, bn.running_var, bn.weight, bn.bias)
    x = torch.randn(2, 4, 8, 8)
    body = norm(bn1, F.conv2d(x, conv1.weight, stride=2, padding=1))
    body = norm(bn2, F.conv2d(F.leaky_relu(body, 0.2), conv2.weight, padding=2))
    skip = norm(block.shortcut[1], F.conv2d(x, block.shortcut[0].weight, stride=2))
    assert_close(block(x), torch.tanh(body + skip))
    assert act.negative_slope == 0.2 and conv1.bias is None


@pytest.mark.parametrize("make, same", [
    (lambda: L.ResidualBlock2d((4, 9, 4), (3, 5), batchnorm=False), lambda x: x),
    (lambda: L.ResidualBlock2d((4, 4), 3, shortcut=nn.Identity()), lambda x: x),
    (lambda: L.ResidualBlockTranspose2d((4, 9, 4), (3, 4), (1, 2), batchnorm=False), lambda x: F.interpolate(x, scale_factor=2)),
    (lambda: L.ResidualBlockTranspose2d((4, 9, 4), 3, 1, batchnorm=False), lambda x: x),
    (lambda: L.ResidualBlock2d((4, 4), shortcut=nn.MaxPool2d(2), strides=2), lambda x: F.max_pool2d(x, 2)),
])
def test_an_idle_body_leaves_the_shortcut(make, same):
    x = torch.randn(2, 4, 6, 6)
    assert torch.equal(zeroed(make())(x), same(x))


def test_the_up_projection_reaches_every_pixel():
    block = zeroed(L.ResidualBlockTranspose2d((4, 2), 4, 2, batchnorm=False))
    x, conv = torch.randn(1, 4, 3, 3), block.shortcut[1]
    assert_close(block(x), F.interpolate(F.conv2d(x, conv.weight, conv.bias), scale_factor=2))


def test_activations_are_never_shared():
    block = L.ResidualBlock2d((4, 4, 4, 4), activation=nn.PReLU, last_activation=nn.PReLU)
    dense = L.DenseBlock2d(3, 4, 2, L.BottleneckBlock2d, activation=nn.PReLU)
    for module, n in ((block, 3), (dense, 6)):
        assert len({id(m.weight) for m in module.modules() if isinstance(m, nn.PReLU)}) == n
    assert isinstance(make_activation(None), nn.Identity)


@pytest.mark.parametrize("inplace", [False, True])
def test_the_input_is_left_as_it_was(inplace):
    act, x = partial(nn.ReLU, inplace=inplace), torch.randn(2, 4, 6, 6)
    before = x.clone()
    for block in (L.ResidualBlock2d((4, 8, 4), activation=act, last_activation=act), L.DenseBlock2d(2, 4, 2, activation=act)):
        block(x)
        assert torch.equal(x, before)


def test_a_dense_block_is_its_formula():
    block = L.DenseBlock2d(2, 4, 3, batchnorm=False)
    x = torch.randn(2, 4, 5, 5)
    y = x
    for layer in block:
        conv = layer.layers[-1]
        y = torch.cat([y, F.conv2d(y.relu(), conv.weight, conv.bias, padding=1)], 1)
    assert_close(block(x), y)
    assert block.out_channels == 10


def test_bottlenecks_are_four_times_the_growth():
    for n_in in (8, 80):
        narrow, wide = (m for m in L.BottleneckBlock2d(n_in, 6).modules() if isinstance(m, nn.Conv2d))
        assert narrow.weight.shape == (24, n_in, 1, 1) and wide.weight.shape == (6, 24, 3, 3)
    order = [type(m).__name__ for m in L.BottleneckBlock2d(8, 6).layers]
    assert order == ["BatchNorm2d", "ReLU", "Conv2d"] * 2  # the paper's


def test_a_transition_is_its_formula():
    block = L.TransitionBlock2d(6, 4, scale=3, batchnorm=False)
    x = torch.randn(2, 6, 9, 9)
    assert_close(block(x), F.avg_pool2d(F.conv2d(x.relu(), block[1].weight, block[1].bias), 3))
    assert L.TransitionBlock2d(7)(torch.randn(2, 7, 4, 4)).shape == (2, 3, 2, 2)
    for scale in (1, 2, 3, 4):
        assert L.TransitionBlockTranspose2d(6, 4, scale)(x).shape == (2, 4, 9 * scale, 9 * scale)


# --- normalisation of activations -------------------------------------------------------------------------------------

@quick
@given(c=st.integers(1, 20), scale=st.floats(1e-2, 1e4))
def test_pixel_norm_has_unit_root_mean_square(c, scale):
    x = scale * (torch.rand(3, c, 2, 5) + 0.5)
    assert_close(L.PixelNorm()(x).square().mean(1), torch.ones(3, 2, 5), rtol=1e-3, atol=1e-3)
    assert_close(L.PixelNorm()(x), F.rms_norm(x.movedim(1, -1), (c,), eps=1e-8).movedim(-1, 1))


def test_pixel_norm_of_half_precision_and_of_nothing():
    x = 300 * torch.randn(2, 8, 3, 3).half()  # its square is infinite in float16
    assert_close(L.PixelNorm()(x).float(), L.PixelNorm()(x.float()), rtol=2e-3, atol=2e-3)
    assert L.PixelNorm()(torch.zeros(2, 8, 3, 3).half()).eq(0).all()
    assert L.PixelNorm()(torch.randn(4, 8)).square().mean(1).sub(1).abs().max() < 1e-5  # a latent vector


def test_conditional_batch_norm_is_one_batch_norm_per_class():
    layer, x, y = L.ConditionalBatchNorm2d(4, 3), torch.randn(8, 4, 3, 3), torch.randint(3, (8,))
    nn.init.normal_(layer.weight), nn.init.normal_(layer.bias)
    shared = F.batch_norm(x, None, None, training=True)
    expected = torch.stack([layer.weight[k][:, None, None] * s + layer.bias[k][:, None, None] for s, k in zip(shared, y)])
    assert_close(layer(x, y), expected)
    assert_close(layer(x, F.one_hot(y, 3).float()), expected)
    torchs = nn.BatchNorm2d(4)
    torchs(x), torchs(x)
    assert_close(layer.norm.running_mean, torchs.running_mean)
    layer.eval(), torchs.eval()
    assert_close(layer(x, torch.zeros(8, dtype=torch.long)),
                 torchs(x) * layer.weight[0][:, None, None] + layer.bias[0][:, None, None])


@quick
@given(n=st.integers(1, 5), b=st.integers(1, 4), side=st.integers(2, 4), offset=st.floats(-50, 50))
def test_virtual_batch_norm_is_batch_norm_of_reference_and_sample(n, b, side, offset):
    ref, x = torch.randn(n, 3, side, side) + offset, 2 * torch.randn(b, 3, side, side)
    layer = with_reference(L.VirtualBatchNorm2d(3), n)
    nn.init.normal_(layer.weight), nn.init.normal_(layer.bias)
    by_torch = partial(F.batch_norm, running_mean=None, running_var=None, weight=layer.weight, bias=layer.bias, training=True)
    y = layer(torch.cat([ref, x]))
    assert_close(y[:n], by_torch(ref), rtol=1e-4, atol=1e-4)
    for i in range(b):
        assert_close(y[n + i], by_torch(torch.cat([ref, x[i:i + 1]]))[-1], rtol=1e-3, atol=1e-3)


def test_a_virtual_batch_makes_samples_independent_and_depends_on_its_reference():
    ref, x = torch.randn(5, 1, 16, 16), torch.randn(4, 1, 16, 16)
    D = L.VirtualBatch(L.virtual_batchnorm(DCGANDiscriminator(16, 1, 4)), ref)
    ours = D(x)
    assert ours.shape == (4,)
    assert_close(torch.cat([D(one[None]) for one in x]), ours, rtol=1e-4, atol=1e-5)
    assert_close(D.eval()(x), ours)  # training and evaluation do the same, and no call changes the next
    other = L.VirtualBatch(D.network, 3 * ref)
    assert not torch.allclose(other(x), ours)
    other.load_state_dict(D.state_dict())
    assert_close(other(x), ours)
    assert [n for n, _ in D.named_buffers()] == ["reference0"] and torch.equal(D.reference[0], ref)
    ref.zero_()
    assert_close(D(x), ours)  # its own copy


def test_gradients_reach_weights_through_the_reference():
    conv, ref, x = nn.Conv2d(1, 2, 2), torch.randn(4, 1, 3, 3), torch.randn(2, 1, 3, 3)
    target = torch.randn(2, 2, 2, 2)
    net = L.VirtualBatch(nn.Sequential(conv, L.VirtualBatchNorm2d(2)), ref)
    ours = torch.autograd.grad((net(x) * target).sum(), conv.weight)[0]
    each = [F.batch_norm(conv(torch.cat([ref, one[None]])), None, None, training=True)[-1] for one in x]
    assert_close(ours, torch.autograd.grad((torch.stack(each) * target).sum(), conv.weight)[0], rtol=1e-3, atol=1e-4)


def test_a_virtual_batch_with_labels():
    labels = torch.arange(4) % 3
    D = L.VirtualBatch(L.virtual_batchnorm(DCGANDiscriminator(16, 1, 4, 3)), torch.randn(4, 1, 16, 16), labels)
    x = torch.randn(3, 1, 16, 16)
    assert len(D(x[:1].expand(3, -1, -1, -1), torch.arange(3)).unique()) == 3
    assert D.reference[1].dtype == torch.int64


def test_conversion_keeps_scales_and_shifts():
    G = DCGANGenerator(5, 16, 1, 4)
    scales = [m.weight for m in G.modules() if isinstance(m, nn.BatchNorm2d)]
    assert L.virtual_batchnorm(G) is G
    virtual = [m for m in G.modules() if isinstance(m, L.VirtualBatchNorm2d)]
    assert [m.weight for m in virtual] == scales and not any(isinstance(m, nn.BatchNorm2d) for m in G.modules())
    assert isinstance(L.virtual_batchnorm(nn.BatchNorm2d(4, affine=False)), L.VirtualBatchNorm2d)


# --- normalisation of weights -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("make", [
    lambda: nn.Linear(8, 5), lambda: nn.Conv1d(4, 8, 3), lambda: nn.Conv2d(4, 8, 3), lambda: nn.Embedding(7, 5),
    lambda: nn.ConvTranspose2d(4, 8, 3), lambda: nn.Conv2d(4, 8, 3, groups=2),
])
def test_spectral_norm_against_a_decomposition(make):
    layer = make()
    rows = lambda w: (w.transpose(0, 1) if isinstance(layer, nn.ConvTranspose2d) else w).flatten(1)
    weight = layer.weight.detach().clone()
    L.spectral_norm(layer, n_power_iterations=200)
    expected = weight / torch.linalg.svdvals(rows(weight))[0]
    assert_close(layer.weight, expected, rtol=1e-3, atol=1e-4)


def test_spectral_norm_is_torchs_own_on_every_layer():
    ours, theirs = DCGANDiscriminator(16, 1, 4), None
    theirs = copy.deepcopy(ours)
    torch.manual_seed(1)
    L.spectral_norm(ours)
    torch.manual_seed(1)
    for m in [m for m in theirs.modules() if isinstance(m, nn.Conv2d)]:
        nn.utils.parametrizations.spectral_norm(m)
    x = torch.randn(3, 1, 16, 16)
    for _ in range(3):
        assert torch.equal(ours(x), theirs(x))
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in DCGANDiscriminator(16, 1, 4).parameters())


def test_power_iteration_moves_in_training_only():
    layer = L.spectral_norm(nn.Linear(30, 30))
    u = lambda: layer.parametrizations.weight[0]._u.clone()
    with torch.no_grad():
        layer.parametrizations.weight.original.normal_()
    first = u()
    layer.eval()(torch.randn(2, 30))
    assert torch.equal(u(), first)
    layer.train()(torch.randn(2, 30))
    assert not torch.equal(u(), first)


def test_a_spectral_network_is_a_contraction():
    net = L.spectral_norm(nn.Sequential(nn.Linear(8, 32), nn.LeakyReLU(0.2), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 1)), 50)
    net(torch.randn(2, 8))
    x, y = torch.randn(200, 8), torch.randn(200, 8)
    assert ((net(x) - net(y)).norm(dim=1) <= (x - y).norm(dim=1) * 1.001).all()


def test_spectral_norm_leaves_out_what_it_is_told_and_class_scales():
    net = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3), "c": L.ConditionalBatchNorm2d(3, 2), "d": nn.BatchNorm2d(3)})
    L.spectral_norm(net, where=lambda name, layer: name != "b")
    assert [n for n, m in net.items() if parametrize.is_parametrized(m)] == ["a"]


@quick
@given(kind=st.sampled_from(["linear", "conv", "grouped", "up", "up3"]), gain=st.sampled_from([1.0, 2**0.5]),
       multiplier=st.sampled_from([1.0, 0.01]))
def test_equalised_layers_put_out_the_variance_of_their_gain(kind, gain, multiplier):
    layer = {"linear": nn.Linear(200, 300), "conv": nn.Conv2d(20, 200, 3), "grouped": nn.Conv2d(64, 200, 3, groups=2),
             "up": nn.ConvTranspose2d(64, 200, 4, 2), "up3": nn.ConvTranspose2d(64, 200, 3, 1)}[kind]
    assert L.equalized_lr(layer, gain, multiplier) is layer
    y = layer(torch.randn(64, 200) if kind == "linear" else torch.randn(8, layer.in_channels, 9, 9))
    y = y if y.ndim == 2 else y[:, :, 2:-2, 2:-2]
    assert y.var().item() == pytest.approx(gain**2, rel=0.12)
    original = layer.parametrizations.weight.original
    assert original.std().item() == pytest.approx(1 / multiplier, rel=0.1) and layer.bias.eq(0).all()


def test_equalised_weights_move_by_rate_times_scale():
    for width, multiplier in ((10, 1.0), (1000, 1.0), (50, 0.01)):
        layer = L.equalized_lr(nn.Linear(width, 3), multiplier=multiplier)
        before = [p.detach().clone() for p in (layer.weight, layer.bias)]
        opt = torch.optim.Adam(layer.parameters(), lr=0.01, eps=1e-30)
        layer(torch.randn(4, width)).square().sum().backward()
        opt.step()
        scale = multiplier * (2 / width) ** 0.5
        assert_close((layer.weight - before[0]).abs(), torch.full((3, width), 0.01 * scale), rtol=2e-2, atol=1e-8)
        assert_close((layer.bias - before[1]).abs(), torch.full((3,), 0.01 * multiplier), rtol=1e-3, atol=0)


def test_equalising_can_keep_the_weights():
    model, x = DCGANDiscriminator(16, 1, 4).eval(), torch.randn(2, 1, 16, 16)
    before = model(x)
    assert_close(L.equalized_lr(model, init=False)(x), before)
    layer = L.equalized_lr(nn.Linear(4, 2))
    layer.weight = torch.ones(2, 4)
    assert_close(layer.weight, torch.ones(2, 4))
    assert L.equalized_lr(nn.Linear(4, 2, bias=False), multiplier=0.1).bias is None


@pytest.mark.parametrize("wrap", [L.spectral_norm, L.equalized_lr])
def test_wrapping_twice_is_refused_before_anything_changes(wrap):
    net = nn.Sequential(nn.Linear(3, 3), wrap(nn.Linear(3, 3)))
    state = copy.deepcopy(net.state_dict())
    for again in (L.spectral_norm, L.equalized_lr):
        with pytest.raises(ValueError, match="the weight of 1 has a parametrization already"):
            again(net)
    assert net.state_dict().keys() == state.keys() and all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
    wrap(net, where=lambda name, layer: name == "0")


# --- self-attention ---------------------------------------------------------------------------------------------------

@quick
@given(c=st.integers(1, 24), h=st.integers(1, 5), w=st.integers(1, 5), scale=st.floats(0.01, 30))
def test_attention_rows_sum_to_one(c, h, w, scale):
    layer = L.SelfAttention2d(c, channels=2)
    beta = layer.attention(scale * torch.randn(2, c, h, w))
    assert beta.shape == (2, h * w, h * w) and (beta >= 0).all()
    assert_close(beta.sum(-1), torch.ones(2, h * w))


@pytest.mark.parametrize("pool", [1, 2])
def test_attention_against_torchs_own(pool):
    layer, x = open_gate(L.SelfAttention2d(16, pool=pool)), torch.randn(2, 16, 4, 6)
    pooled = lambda t: (F.max_pool2d(t, 2) if pool == 2 else t).flatten(2).mT
    o = F.scaled_dot_product_attention(layer.g(x).flatten(2).mT, pooled(layer.f(x)), pooled(layer.h(x)), scale=1.0)
    assert_close(layer(x), x + 0.7 * layer.v(o.mT.reshape(2, 2, 4, 6)))


def test_attention_starts_as_the_identity_and_can_leave_it():
    layer, x = L.SelfAttention2d(16), torch.randn(2, 16, 4, 4)
    assert torch.equal(layer(x), x) and layer.gamma == 0
    layer(x).square().sum().backward()
    assert layer.gamma.grad != 0 and layer.v.weight.grad.eq(0).all()


def test_attention_knows_no_places():
    layer, x = open_gate(L.SelfAttention2d(16)), torch.randn(2, 16, 3, 4)
    order = torch.randperm(12)
    moved = x.flatten(2)[:, :, order].view_as(x)
    assert_close(layer(moved), layer(x).flatten(2)[:, :, order].view_as(x))


# --- the batch --------------------------------------------------------------------------------------------------------

def test_minibatch_discrimination_against_loops():
    layer, x = L.MinibatchDiscrimination(7, 3, 4), torch.randn(5, 7)
    T, X = layer.T.detach().numpy(), x.numpy()
    expected = np.zeros((5, 3))
    for i in range(5):
        for j in set(range(5)) - {i}:
            for b in range(3):
                expected[i, b] += np.exp(-np.abs((X[i] - X[j]) @ T[:, b]).sum())
    assert_close(layer(x)[:, 7:], torch.tensor(expected).float())
    assert torch.equal(layer(x)[:, :7], x)


def test_minibatch_discrimination_sees_company():
    layer, x = L.MinibatchDiscrimination(7, 3), torch.randn(6, 7)
    assert_close(layer(x[:1])[:, 7:], torch.zeros(1, 3))
    assert_close(layer(x[:1].expand(6, -1))[:, 7:], torch.full((6, 3), 5.0))
    order = torch.randperm(6)
    assert_close(layer(x[order]), layer(x)[order])
    far = L.MinibatchDiscrimination(100, 50)(torch.randn(64, 100))[:, 100:]
    assert 0.2 < far.mean() / 63 < 0.5  # starts where the exponential is steep: near exp(-2/√π) = 0.32


@quick
@given(n=st.integers(1, 13), group=st.sampled_from([None, 2, 4]), features=st.sampled_from([1, 2, 3]))
def test_minibatch_std_against_numpy(n, group, features):
    x = torch.randn(n, 6, 2, 3)
    y = L.MinibatchStd(group, features)(x)
    assert y.shape == (n, 6 + features, 2, 3) and torch.equal(y[:, :6], x)
    groups = max(1, n // group) if group else 1
    for i in range(n):
        std = x.numpy()[i % groups::groups].std(0)
        for k, part in enumerate(np.split(std, features)):
            assert_close(y[i, 6 + k], torch.full((2, 3), float(part.mean())), rtol=1e-4, atol=2e-4)


def test_minibatch_std_of_equal_samples_has_a_gradient():
    x = torch.ones(4, 2, 2, 2, requires_grad=True)
    y = L.MinibatchStd()(x)
    assert y[:, 2].max() < 2e-4
    y.sum().backward()
    assert x.grad.isfinite().all()


def test_minibatch_std_keeps_to_its_groups():
    x = torch.randn(8, 2, 2, 2)
    changed = x.clone()
    changed[3] *= 5
    same = (L.MinibatchStd()(x)[:, 2, 0, 0] == L.MinibatchStd()(changed)[:, 2, 0, 0]).tolist()
    assert same == [True, False] * 4


# --- DiffAugment ------------------------------------------------------------------------------------------------------

TRANSFORMS = [brightness, saturation, contrast, translation, cutout]


def test_colours_are_their_formulas():
    x = torch.rand(5, 3, 4, 4)
    u = lambda: torch.rand(5, 1, 1, 1, generator=seed(3))
    assert_close(brightness(x, 0.5, seed(3)), x + u() - 0.5)
    grey, mean = x.mean(1, keepdim=True), x.mean((1, 2, 3), keepdim=True)
    assert_close(saturation(x, 1.0, seed(3)), (x - grey) * 2 * u() + grey)
    assert_close(contrast(x, 0.5, seed(3)), (x - mean) * (0.5 + u()) + mean)


@quick
@given(h=st.integers(1, 9), w=st.integers(1, 9), dy=st.integers(-9, 9), dx=st.integers(-9, 9))
def test_shifts_against_slices(h, w, dy, dx):
    x = torch.randn(1, 2, h, w)
    wide = F.pad(x, (9, 9, 9, 9))
    expected = wide[..., 9 - dy:9 - dy + h, 9 - dx:9 - dx + w]
    assert torch.equal(shifted(shifted(x, torch.tensor([[dy]]), -2), torch.tensor([[dx]]), -1), expected)


def test_translations_reach_an_eighth_each_way_and_no_more():
    x = torch.zeros(2000, 1, 17, 32)
    x[:, :, 8, 16] = 1
    y = translation(x, generator=seed())
    assert (y.sum((1, 2, 3)) == 1).all()
    rows, cols = y[:, 0].sum(0).sum(1).nonzero().flatten() - 8, y[:, 0].sum(0).sum(0).nonzero().flatten() - 16
    assert rows.tolist() == list(range(-2, 3)) and cols.tolist() == list(range(-4, 5))


@quick
@given(h=st.integers(1, 9), w=st.integers(1, 9), ratio=st.sampled_from([0.0, 0.25, 0.5, 1.0]))
def test_cutouts_are_one_rectangle(h, w, ratio):
    hole = cutout(torch.ones(50, 2, h, w), ratio) == 0
    for one in hole[:, 0]:
        rows, cols = one.any(1), one.any(0)
        assert torch.equal(one, rows[:, None] & cols)
        for line, side in ((rows, h), (cols, w)):
            width = int(side * ratio + 0.5)
            assert line.sum() <= width and line.int().diff().abs().sum() <= 2  # one stretch
    assert torch.equal(hole[:, 0], hole[:, 1])


def test_cutouts_are_centred_everywhere():
    hole = cutout(torch.ones(4000, 1, 8, 8), generator=seed()) == 0
    share = hole.float().mean((0, 1))
    by_row = share.sum(1) / share.sum()
    expected = torch.tensor([sum(abs(2 * (i + 0.5) - 2 * c) < 4 for c in range(9)) for i in range(8)]).float()
    assert_close(by_row, expected / expected.sum(), atol=0.01, rtol=0)
    assert_close(share, share.T, atol=0.04, rtol=0)


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_samples_do_not_touch_each_other(transform):
    x = torch.rand(6, 3, 8, 8)
    changed = x.clone()
    changed[2] = torch.rand(3, 8, 8)
    same = (transform(x, generator=seed()) == transform(changed, generator=seed())).flatten(1).all(1)
    assert same.tolist() == [True, True, False, True, True, True]
    equal = transform(x[:1].expand(32, -1, -1, -1), generator=seed())
    assert len(equal.flatten(1).unique(dim=0)) > 4  # each draws its own


@pytest.mark.parametrize("transform", [*TRANSFORMS, lambda x, generator: L.DiffAugment(generator=generator)(x)])
def test_augmentation_passes_gradients(transform):
    x = torch.rand(2, 3, 4, 4, dtype=torch.double, requires_grad=True)
    f = lambda x: transform(x, generator=seed())
    assert torch.autograd.gradcheck(f, x, fast_mode=True) and torch.autograd.gradgradcheck(f, x, fast_mode=True)


def test_augmentation_draws_from_torchs_generator_or_its_own():
    x, own = torch.rand(4, 3, 8, 8), L.DiffAugment(generator=seed(1))
    torch.manual_seed(3)
    state, first = torch.get_rng_state(), L.DiffAugment()(x)
    assert not torch.equal(torch.get_rng_state(), state)
    torch.set_rng_state(state)
    assert torch.equal(L.DiffAugment()(x), first)
    torch.set_rng_state(state)
    a = own(x)
    assert torch.equal(torch.get_rng_state(), state) and not torch.equal(own(x), a)
    assert torch.equal(L.DiffAugment(generator=seed(1))(x), a)


def test_policies():
    x = torch.rand(4, 3, 8, 8)
    def chain(x, g): return cutout(translation(x, 0.25, g), 0.5, g)
    assert torch.equal(L.DiffAugment(["cutout", "translation"], translation=0.25, generator=seed())(x), chain(x, seed()))
    assert torch.equal(L.DiffAugment().eval()(x), x)
    assert L.DiffAugment("cutout")(x.bfloat16()).dtype == torch.bfloat16
    assert "color, translation, cutout" in repr(L.DiffAugment())


def test_an_augmented_discriminator():
    D = L.Augmented(DCGANDiscriminator(16, 1, 4, 3, batchnorm=False))
    x, y = torch.randn(3, 1, 16, 16, requires_grad=True), torch.arange(3)
    a = D(x, y)
    a.sum().backward()
    assert x.grad.flatten(1).abs().sum(1).min() > 0 and not torch.equal(D(x, y), a)
    assert torch.equal(D.eval()(x, y), D.network(x, y))
    assert torch.equal(L.Augmented(DCGANDiscriminator(16, 1, 4), nn.Identity()).eval()(x).isfinite(), torch.ones(3).bool())


def test_a_gan_of_these_layers_resumes_exactly(tmp_path):
    def make(run):
        torch.manual_seed(0)
        up = L.equalized_lr(nn.Sequential(
            nn.Unflatten(1, (8, 1, 1)), L.ResidualBlockTranspose2d((8, 8), 4, 4), L.PixelNorm(),
            nn.ConvTranspose2d(8, 1, 4, 2, 1)))
        down = L.spectral_norm(nn.Sequential(
            nn.Conv2d(1, 8, 4, 2, 1), open_gate(L.SelfAttention2d(8)), L.MinibatchStd(), nn.Flatten(),
            L.MinibatchDiscrimination(9 * 16, 2), nn.Linear(9 * 16 + 2, 1), nn.Flatten(0)))
        loader = DataLoader(TensorDataset(torch.randn(20, 1, 8, 8, generator=seed())), batch_size=6, shuffle=True)  # 6 6 6 2
        return GANLearner(up, L.Augmented(down), loader, "hinge", latent=8, penalties=R1(), run=run, seed=0, front="none")

    resumes(make, tmp_path, steps=6, at=(3,))


def test_random_numbers():
    x = torch.zeros(3000, 1, 1, 1, dtype=torch.double)
    assert between(x, -2, 1).dtype == torch.double and -2 <= between(x, -2, 1).min() < -1.9
    counts = (whole_number(x, -2, 1) + 2).flatten().bincount()
    assert len(counts) == 4 and counts.min() > 600
    assert along(torch.zeros(2, 5), -2).shape == (2, 1, 5, 1) and along(torch.zeros(2, 5), -1).shape == (2, 1, 1, 5)


# --- what is refused --------------------------------------------------------------------------------------------------

x4 = torch.zeros(2, 8, 4, 4)
REFUSED = [
    (lambda: L.ResidualBlock2d((4,)), r"channels=\(4,\): expected two widths or more"),
    (lambda: L.ResidualBlock2d(4), "channels=4: expected two widths"),
    (lambda: L.ResidualBlock2d((4, 0)), r"channels=\(4, 0\)"),
    (lambda: L.ResidualBlock2d((4, 4, 4), kernels=(3, 3, 3)), r"kernels=\(3, 3, 3\): .* or 2 of them"),
    (lambda: L.ResidualBlock2d((4, 4), strides=0), "strides=0: expected a whole number >= 1"),
    (lambda: L.ResidualBlock2d((4, 4), paddings=-1), "paddings=-1: expected a whole number >= 0"),
    (lambda: L.ResidualBlock2d((8, 8), paddings=0)(x4), r"make \(2, 8, 2, 2\), the shortcut \(2, 8, 4, 4\)"),
    (lambda: L.ResidualBlockTranspose2d((8, 8), shortcut=nn.Identity(), strides=2)(x4), "the shortcut"),
    (lambda: L.BasicBlock2d(4, 2, kernel=2), "kernel=2: .* must be odd"),
    (lambda: L.BasicBlock2d(4, 2, batchnorm=False, activation=partial(nn.ReLU, True)), "would overwrite the block's input"),
    (lambda: L.DenseBlock2d(0, 4, 2), "depth=0"),
    (lambda: L.TransitionBlock2d(4, scale=0), "scale=0"),
    (lambda: L.ConditionalBatchNorm2d(8, 3)(x4, torch.zeros(3).long()), r"shape \(3,\) and type torch.int64; expected"),
    (lambda: L.ConditionalBatchNorm2d(8, 3)(x4, torch.zeros(2, 2)), r"weights of the classes \(2, 3\)"),
    (lambda: L.ConditionalBatchNorm2d(8, 3)(x4, torch.zeros(2)), r"expected integers \(2,\)"),
    (lambda: L.VirtualBatchNorm2d(8)(x4), r"VirtualBatch\(network, reference\)"),
    (lambda: with_reference(L.VirtualBatchNorm2d(8))(x4), "2 samples, 3 of them reference"),
    (lambda: L.VirtualBatch(nn.Conv2d(8, 8, 1), x4), r"Conv2d has no VirtualBatchNorm2d; virtual_batchnorm\(network\)"),
    (lambda: L.VirtualBatch(L.VirtualBatchNorm2d(8)), r"equally many samples of each input; received \[\]"),
    (lambda: L.VirtualBatch(L.VirtualBatchNorm2d(8), x4, x4[:1]), r"received \[2, 1\]"),
    (lambda: L.VirtualBatch(L.VirtualBatchNorm2d(8), x4)(x4, x4), "received 2 inputs; the reference batch has 1"),
    (lambda: L.spectral_norm(nn.ReLU()), "nothing to wrap in ReLU; accepted are Linear, Embedding, Conv1d"),
    (lambda: L.spectral_norm(nn.Linear(2, 2), 0), "n_power_iterations=0"),
    (lambda: L.equalized_lr(nn.Embedding(2, 2)), "nothing to wrap in Embedding"),
    (lambda: L.equalized_lr(nn.Linear(2, 2), gain=0), "gain=0, multiplier=1.0: both must be greater than 0"),
    (lambda: fan_in(nn.Embedding(2, 2)), "Embedding has no fan-in"),
    (lambda: L.SelfAttention2d(7), "from fewer than 8, say channels="),
    (lambda: L.SelfAttention2d(8, pool=0), "pool=0"),
    (lambda: L.MinibatchDiscrimination(8, 0), "out_features=0: expected a whole number from 1"),
    (lambda: L.MinibatchDiscrimination(8, 2)(x4), r"expected \(batch, 8\): flatten maps first"),
    (lambda: L.MinibatchStd(1), "group_size=1"),
    (lambda: L.MinibatchStd(features=3)(x4), "C a multiple of 3"),
    (lambda: L.MinibatchStd()(x4[0]), r"expected \(B, C, H, W\)"),
    (lambda: L.DiffAugment("translate"), "there are color, translation, cutout; did you mean 'translation'"),
    (lambda: L.DiffAugment(""), "no augmentation ''"),
    (lambda: L.DiffAugment(["cutout", "cutout"]), "each once"),
    (lambda: L.DiffAugment(cutout=1.5), "cutout=1.5: a part of the image's side, from 0 to 1"),
    (lambda: L.DiffAugment(translation=-0.1), "translation=-0.1"),
]


@pytest.mark.parametrize("make, says", REFUSED, ids=range(len(REFUSED)))
def test_misuse_is_named(make, says):
    with pytest.raises(ValueError, match=says):
        make()


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("x", [torch.zeros(3, 8, 8), torch.zeros(2, 3, 8, 8, dtype=torch.uint8)])
def test_what_is_no_batch_of_images_is_refused(transform, x):
    with pytest.raises(ValueError, match=r"expected floating point images \(B, C, H, W\)"):
        transform(x)


def test_an_activation_that_is_made_already_is_refused():
    for build in (lambda a: L.ResidualBlock2d((4, 4), activation=a), lambda a: L.BasicBlock2d(4, 2, activation=a)):
        with pytest.raises(TypeError, match="give what makes one, such as nn.ReLU"):
            build(nn.ReLU())
