"""The architectures of GANs: sizes counted by hand, layers written out, gradients, labels, and what is refused."""
import copy
import re
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.testing import assert_close

from trainkit.gan.autoencoding import (
    AAEDecoder,
    AAEEncoder,
    BEGANDiscriminator,
    BEGANGenerator,
    EBGANDiscriminator,
    EnergyDiscriminator,
    LatentDiscriminator,
    mlp,
    with_classes,
)
from trainkit.gan.codes import AuxiliaryClassifier, Codes, MutualInformation
from trainkit.gan.energy import BoundaryEquilibrium, PullingAway
from trainkit.gan.features import FeatureMatching, on_pairs
from trainkit.gan.heads import ACGANDiscriminator, ACGANGenerator, InfoGANDiscriminator, InfoGANGenerator
from trainkit.gan.layers import SelfAttention2d
from trainkit.gan.learner import GANLearner
from trainkit.gan.models import DCGANDiscriminator, DCGANGenerator, LatentGenerator, check_sides, near
from trainkit.gan.norms import ConditionalBatchNorm2d
from trainkit.gan.residual import (
    PLANS,
    GeneratorBlock,
    ResNetPlan,
    SAGANDiscriminator,
    SAGANGenerator,
    SNGANDiscriminator,
    SNGANGenerator,
    discriminator_block,
    plan_for,
    quarter,
)
from trainkit.gan.translation import (
    PATCHES,
    CycleGANGenerator,
    Dropout,
    PatchGANDiscriminator,
    UNetGenerator,
    receptive_field,
)

quick = settings(max_examples=20, deadline=None)
K, CODES, NORM = 3, Codes(noise=4, categorical=(3, 2), continuous=2), nn.InstanceNorm2d
Y = torch.tensor([0, 2, 1, 1])


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def n_params(model):
    return sum(p.numel() for p in model.parameters())


def images(channels=1, size=16, n=4):
    return torch.rand(n, channels, size, size) * 2 - 1


def on_meta(make):
    with torch.device("meta"):
        return make()


# --- every network ----------------------------------------------------------------------------------------------------

# name -> (a new small network, its inputs, the shape it gives)
NETS = {
    "sngan g": (lambda: SNGANGenerator(5, 16, 1, 8), lambda: (torch.randn(4, 5),), (4, 1, 16, 16)),
    "sngan g, labels": (lambda: SNGANGenerator(5, 16, 1, 8, K), lambda: (torch.randn(4, 5), Y), (4, 1, 16, 16)),
    "sngan d": (lambda: SNGANDiscriminator(16, 1, 8), lambda: (images(),), (4,)),
    "sngan d, labels": (lambda: SNGANDiscriminator(16, 1, 8, K), lambda: (images(), Y), (4,)),
    "sagan g": (lambda: SAGANGenerator(5, 16, 1, 8, K), lambda: (torch.randn(4, 5), Y), (4, 1, 16, 16)),
    "sagan d": (lambda: SAGANDiscriminator(16, 1, 8, K), lambda: (images(), Y), (4,)),
    "cyclegan": (lambda: CycleGANGenerator(1, 2, 4, 2), lambda: (images(),), (4, 2, 16, 16)),
    "unet": (lambda: UNetGenerator(1, 2, 4, 4), lambda: (images(),), (4, 2, 16, 16)),
    "patches": (lambda: PatchGANDiscriminator(1, 34, 4), lambda: (images(),), (4, 1, 2, 2)),
    "patches, given": (lambda: PatchGANDiscriminator(1, 16, 4, 2), lambda: (images(), images(2)), (4, 1, 6, 6)),
    "pixels": (lambda: PatchGANDiscriminator(1, 1, 4), lambda: (images(),), (4, 1, 16, 16)),
    "ebgan d": (lambda: EBGANDiscriminator(1, 4, 2), lambda: (images(),), (4,)),
    "began g": (lambda: BEGANGenerator(5, 16, 1, 4), lambda: (torch.rand(4, 5),), (4, 1, 16, 16)),
    "began d": (lambda: BEGANDiscriminator(16, 1, 4, 5), lambda: (images(),), (4,)),
    "aae encoder": (lambda: AAEEncoder((1, 16, 16), 3, (9,), True, std=0.1), lambda: (images(),), (4, 3)),
    "aae decoder": (lambda: AAEDecoder((1, 16, 12), 3, (9,), K, 0.1), lambda: (torch.randn(4, 3), Y), (4, 1, 16, 12)),
    "aae d": (lambda: LatentDiscriminator(3, (9,), K, 0.1), lambda: (torch.randn(4, 3), Y), (4,)),
    "acgan g": (lambda: ACGANGenerator(K, 5, 16, 1, 4), lambda: (torch.randn(4, 5), Y), (4, 1, 16, 16)),
    "acgan d": (lambda: ACGANDiscriminator(K, 16, 1, 4), lambda: (images(), Y), (4,)),
    "infogan g": (lambda: InfoGANGenerator(CODES, 16, 1, 4), lambda: (torch.randn(4, CODES.width),), (4, 1, 16, 16)),
    "infogan d": (lambda: InfoGANDiscriminator(CODES, 16, 1, 4), lambda: (images(),), (4,)),
}
every = pytest.mark.parametrize("name", NETS)


def built(name):
    make, inputs, shape = NETS[name]
    net = make()
    for m in net.modules():
        if isinstance(m, SelfAttention2d):
            nn.init.constant_(m.gamma, 0.7)  # it starts closed
    return net, inputs(), shape


def answer(net, inputs):
    "All that a network can be asked, in a row."
    torch.manual_seed(7)
    asked = [net, *(getattr(net, m) for m in ("classify", "codes") if callable(getattr(type(net), m, None)))]
    return torch.cat([f(*inputs if f is net else inputs[:1]).flatten() for f in asked])


@every
def test_shapes_and_gradients_flow_to_every_weight_and_to_the_input(name):
    net, inputs, shape = built(name)
    x = inputs[0].clone().requires_grad_()
    assert net(x, *inputs[1:]).shape == shape
    out = answer(net, (x, *inputs[1:]))
    (out * torch.randn_like(out)).sum().backward()
    slopes = {n: p.grad for n, p in net.named_parameters()}
    assert not [n for n, g in slopes.items() if g is None or not 1e-7 < g.abs().max() < torch.inf]
    assert x.grad.abs().amax(tuple(range(1, x.ndim))).min() > 0


@every
def test_a_copy_and_a_state_give_the_same_answers(name):
    net, inputs, _ = built(name)
    answer(net, inputs)  # batch norms and power iterations have moved
    twin, loaded = copy.deepcopy(net), NETS[name][0]()
    loaded.load_state_dict(net.state_dict())
    for other in (twin, loaded):
        assert torch.equal(answer(other.eval(), inputs), answer(net.eval(), inputs))
    for p in twin.parameters():
        p.data.mul_(1.5).add_(0.1)
    assert torch.equal(answer(loaded, inputs), answer(net, inputs)) and not torch.equal(answer(twin, inputs), answer(net, inputs))


@every
def test_channels_last_and_double_give_the_same(name):
    net, inputs, _ = built(name)
    before = answer(net.eval(), inputs)
    last = [t.contiguous(memory_format=torch.channels_last) if t.ndim == 4 else t for t in inputs]
    assert_close(answer(net.to(memory_format=torch.channels_last), last), before, atol=1e-5, rtol=1e-4)
    wide = [t.double() if t.is_floating_point() else t for t in inputs]
    assert_close(answer(net.double(), wide).float(), before, atol=1e-5, rtol=1e-4)


@every
def test_finite_and_near_in_bfloat16(name):
    net, inputs, _ = built(name)
    before = answer(net.eval(), inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        after = answer(net, inputs)
    assert after.isfinite().all() and (after.float() - before).norm() < 0.1 * before.norm() + 0.05


CONDITIONAL = ["sngan g, labels", "sngan d, labels", "sagan g", "sagan d", "aae decoder", "aae d", "acgan g"]


@pytest.mark.parametrize("name", CONDITIONAL)
def test_labels_matter_and_are_required(name):
    net, (x, _), _ = built(name)
    for m in net.modules():
        if isinstance(m, ConditionalBatchNorm2d):
            nn.init.normal_(m.weight)  # every class begins alike
    x, label = net.eval() and x[:1].expand(K, *x.shape[1:]), torch.arange(K)
    assert len(net(x, label).reshape(K, -1).unique(dim=0)) == K
    assert_close(net(x, label.flip(0)), net(x, label).flip(0), atol=1e-5, rtol=1e-4)
    for bad, says in [(None, "num_classes=3 and needs labels"), (label.float(), "integer labels"),
                      (label[:2], r"shape \(3,\), got \(2,\)")]:  # fmt: skip
        with pytest.raises(ValueError, match=f"{type(net).__name__} .*{says}"):
            net(x, bad)


@pytest.mark.parametrize("name", ["sngan g", "sngan d", "ebgan d", "began g", "began d", "aae encoder"])
def test_labels_are_refused_where_there_are_no_classes(name):
    net, inputs, _ = built(name)
    with pytest.raises(ValueError, match=f"{type(net).__name__} was built without classes"):
        net(*inputs, Y)


@pytest.mark.parametrize("name", [n for n in NETS if isinstance(NETS[n][0](), LatentGenerator)])
def test_noise(name):
    net, inputs, shape = built(name)
    own = [net.sample_latent(200, generator=torch.Generator().manual_seed(3)) for _ in range(2)]
    assert torch.equal(*own) and own[0].shape == (200, net.latent_dim)
    state = torch.get_rng_state()
    net.sample_latent(3, generator=torch.Generator())
    assert torch.equal(state, torch.get_rng_state()) and not torch.equal(net.sample_latent(3), net.sample_latent(3))
    if "infogan" not in name:
        assert own[0].std() == pytest.approx((1 / 3) ** 0.5 if "began" in name else 1, rel=0.1)
        assert (own[0].abs().max() <= 1) == ("began" in name)
    with pytest.raises(ValueError, match=rf"noise has shape \(4, {net.latent_dim + 1}\); expected \(batch, {net.latent_dim}\)"):
        net(F.pad(inputs[0], (0, 1)), *inputs[1:])


# --- two steps with the loss that goes with them ----------------------------------------------------------------------

def began():
    G = BEGANGenerator(5, 16, 1, 4)
    return (G, BEGANDiscriminator(16, 1, 4, 5), images(), BoundaryEquilibrium()), dict(latent=G.sample_latent)


def acgan():
    ac = AuxiliaryClassifier()
    return (ACGANGenerator(K, 5, 16, 1, 4), ACGANDiscriminator(K, 16, 1, 4), (images(), Y), "nonsaturating"), dict(
        labels="sampled", discriminator_terms={"class": ac.discriminator},
        generator_terms={"class": ac.generator, "match": FeatureMatching()})  # fmt: skip


def infogan():
    mi = MutualInformation(CODES)
    return (InfoGANGenerator(CODES, 16, 1, 4), InfoGANDiscriminator(CODES, 16, 1, 4), images(), "nonsaturating"), dict(
        latent=CODES, generator_terms={"codes": mi}, discriminator_terms={"codes": mi})


def pix2pix():
    shown = images(2, 32)
    return (UNetGenerator(2, 1, 4, 5), PatchGANDiscriminator(1, 34, 4), images(1, 32), "nonsaturating"), dict(
        latent=lambda n, device: shown, generator_terms={"l1": (on_pairs(F.l1_loss), 100)})


def aae():
    shown = images()
    return (AAEEncoder((1, 16, 16), 3, (9,)), LatentDiscriminator(3, (9,)), torch.randn(4, 3), "nonsaturating"), dict(
        latent=lambda n, device: shown)


LEARNERS = {
    "sngan": lambda: ((SNGANGenerator(5, 16, 1, 8), SNGANDiscriminator(16, 1, 8), images(), "hinge"), dict(n_critic=2)),
    "projection": lambda: ((SNGANGenerator(5, 16, 1, 8, K), SNGANDiscriminator(16, 1, 8, K), (images(), Y), "hinge"),
                           dict(labels="sampled", generator_terms={"match": FeatureMatching()})),
    "sagan": lambda: ((SAGANGenerator(5, 16, 1, 8, K), SAGANDiscriminator(16, 1, 8, K), (images(), Y), "hinge"),
                      dict(labels="dataset", reuse_forward=True)),
    "cyclegan": lambda: ((CycleGANGenerator(1, 1, 4, 1), PatchGANDiscriminator(1, 16, 4, norm=NORM), images(), "lsgan"),
                         dict(latent=lambda n, device: images())),
    "pix2pix": pix2pix, "began": began, "acgan": acgan, "infogan": infogan, "aae": aae,
    "ebgan": lambda: ((DCGANGenerator(5, 16, 1, 4), EBGANDiscriminator(1, 4, 2), images(), "ebgan"),
                      dict(generator_terms={"pull": (PullingAway(), 0.1)})),
}  # fmt: skip


@pytest.mark.parametrize("name", LEARNERS)
def test_two_steps_of_a_learner(name):
    (G, D, batch, loss), options = LEARNERS[name]()
    gan = GANLearner(G, D, [batch] * 2, loss, front="none", seed=0, **options)
    before = [p.detach().clone() for net in (G, D) for p in net.parameters()]
    gan.fit(steps=2)
    after = [p.detach() for net in (G, D) for p in net.parameters()]
    moved = [not torch.equal(a, b) for a, b in zip(before, after)]
    assert sum(moved) > 0.8 * len(moved) and all(p.isfinite().all() for p in after)
    wanted = {"train/generator/", "train/discriminator/"}
    assert {p for p in wanted for n in gan.history.names() if n.startswith(p)} == wanted


# --- SNGAN and SAGAN --------------------------------------------------------------------------------------------------

TABLES = {  # of Miyato et al. 2018 (4, 5, 6), and the 64×64 of the authors' code: (side, G's widths), (D's halving, D's other)
    32: ((4, [256] * 4), ([128, 128], [128, 128])),
    48: ((6, [512, 256, 128, 64]), ([64, 128, 256, 512], [1024])),
    64: ((4, [1024, 512, 256, 128, 64]), ([64, 128, 256, 512, 1024], [])),
    128: ((4, [1024, 1024, 512, 256, 128, 64]), ([64, 128, 256, 512, 1024], [1024])),
}


def sngan_count(size, classes=0):
    (side, up), (down, same) = TABLES[size]
    copies = classes or 1
    g = (128 + 1) * side * side * up[0] + 2 * up[-1] + up[-1] * 3 * 9 + 3
    g += sum(i * o * 9 + o * o * 9 + i * o + copies * 2 * (i + o) for i, o in pairwise(up))
    d = (3 * down[0] * 9 + down[0]) + (down[0] ** 2 * 9 + down[0]) + (3 * down[0] + down[0])
    for j, (i, o) in enumerate(pairwise(down + same), 1):
        d += (i * i * 9 + i) + (i * o * 9 + o) + ((i * o + o) if j < len(down) or i != o else 0)
    return g, d + (down + same)[-1] * (1 + classes) + 1


@pytest.mark.parametrize("size", TABLES)
@pytest.mark.parametrize("classes", [0, 10])
def test_sngan_is_the_papers_tables(size, classes):
    nets = on_meta(lambda: (SNGANGenerator(out_size=size, num_classes=classes),
                            SNGANDiscriminator(size, num_classes=classes, spectral=False)))
    assert tuple(map(n_params, nets)) == sngan_count(size, classes)
    y = torch.zeros(2, dtype=torch.long, device="meta") if classes else None
    x = nets[0](torch.empty(2, 128, device="meta"), y)
    assert x.shape == (2, 3, size, size) and nets[1](x, y).shape == (2,)


def test_the_usual_sizes_in_round_numbers():
    assert sngan_count(32) == (4_274_435, 1_053_825)  # as SNGAN's networks for CIFAR-10 are usually quoted: 4.3 and 1.1 million


def test_a_generator_block_written_out():
    block, x, y = GeneratorBlock(6, 4, K), torch.randn(3, 6, 5, 5), torch.tensor([2, 0, 2])
    for m in (block.norm1, block.norm2):
        nn.init.normal_(m.weight), nn.init.normal_(m.bias)

    def norm(m, h):
        return F.batch_norm(h, None, None, training=True) * m.weight[y][:, :, None, None] + m.bias[y][:, :, None, None]

    def up(h):
        return h.repeat_interleave(2, 2).repeat_interleave(2, 3)

    h = F.conv2d(up(norm(block.norm1, x).relu()), block.conv1.weight, padding=1)
    h = F.conv2d(norm(block.norm2, h).relu(), block.conv2.weight, padding=1)
    assert_close(block(x, y), h + F.conv2d(up(x), block.shortcut.weight))


@pytest.mark.parametrize("down", [True, False])
@pytest.mark.parametrize("first", [True, False])
def test_a_discriminator_block_written_out(down, first):
    block, x = discriminator_block(3, 5, down, first), torch.randn(2, 3, 6, 6)
    keep = x.clone()
    one, two, sc = [m for m in block.modules() if isinstance(m, nn.Conv2d)]
    for m in (one, two, sc):
        nn.init.normal_(m.bias)
    h = two(one(x if first else x.relu()).relu())
    assert_close(block(x), F.avg_pool2d(h + sc(x), 2) if down else h + sc(x))
    assert torch.equal(x, keep) and one.out_channels == (5 if first else 3)


def test_without_a_change_of_shape_the_shortcut_is_the_identity():
    block, x = discriminator_block(4, 4, down=False), torch.randn(2, 4, 6, 6)
    nn.init.zeros_(block.body[-1].weight)
    assert torch.equal(block(x), x)


def test_glorot_weights():
    G, D = SNGANGenerator(), SNGANDiscriminator(num_classes=64, spectral=False)
    for conv, gain in [(G.blocks[0].conv1, 2), (G.blocks[0].conv2, 2), (G.blocks[0].shortcut, 1), (G.first[0], 1),
                       (D.blocks[1].body[1], 2), (D.blocks[1].shortcut[-1], 1), (D.embed, 1)]:  # fmt: skip
        area = conv.weight[0, 0].numel() if conv.weight.ndim == 4 else 1
        bound = (gain * 6 / (area * (conv.weight.shape[0] + conv.weight.shape[1]))) ** 0.5
        assert conv.weight.abs().max().item() == pytest.approx(bound, rel=0.02) and conv.weight.mean().abs() < bound / 50
        assert getattr(conv, "bias", None) is None or conv.bias.eq(0).all()


def weighted(net):
    return [m for m in net.modules() if isinstance(m, (nn.Linear, nn.Conv2d, nn.Embedding))]


@pytest.mark.parametrize("name", ["sngan d", "sngan d, labels", "sagan g", "sagan d"])
def test_spectral_norms_are_one_after_a_while(name):
    net, inputs, _ = built(name)
    assert all(parametrize.is_parametrized(m, "weight") for m in weighted(net))
    for p in net.parameters():
        p.data.mul_(5)
    with torch.no_grad():
        for _ in range(60):
            net(*inputs)
    norms = [torch.linalg.svdvals(m.weight.flatten(1))[0].item() for m in weighted(net)]
    assert max(norms) <= 1.01 and min(norms) >= 0.99
    state = {k: v.clone() for k, v in net.state_dict().items()}
    net.eval()(*inputs)
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())


def test_where_spectral_norm_is_not():
    for net in (SNGANGenerator(5, 16, 1, 4), SNGANDiscriminator(16, 1, 4, spectral=False)):
        assert not any(parametrize.is_parametrized(m) for m in net.modules())


def test_the_logit_is_the_projection_of_the_paper():
    D, x = SNGANDiscriminator(16, 1, 8, K).eval(), images()
    phi = D.features(x).sum((2, 3))
    assert D.features(x).min() == 0 and torch.equal(D.features(x), D.features(x, Y))
    assert_close(D(x, Y), phi @ D.to_logit.weight[0] + D.to_logit.bias + (phi * D.embed.weight[Y]).sum(1))


@pytest.mark.parametrize("size", PLANS)
def test_attention_sits_where_it_is_said(size):
    for net, x in (SAGANGenerator(8, size, 1, 1), torch.randn(2, 8)), (SAGANDiscriminator(size, 1, 1), images(1, size, 2)):
        sides = []
        layer, = [m for m in net.modules() if isinstance(m, SelfAttention2d)]
        layer.register_forward_hook(lambda m, args, out: sides.append(args[0].shape[-1]))
        net(x)
        assert sides == [quarter(size)] == [max(8, size // 4)]
    D = SNGANDiscriminator(32, 1, 2, attention=8)  # maps of 16, 8, 8, 8: it follows the first of that size
    assert [isinstance(m, SelfAttention2d) for m in D.blocks] == [False, False, True, False, False]


def test_attention_adds_its_weights_and_begins_closed():
    torch.manual_seed(1)
    plain, net = SNGANDiscriminator(32, 1, 16, spectral=False), SNGANDiscriminator(32, 1, 16, attention=16, spectral=False)
    assert n_params(net) - n_params(plain) == 4 * 16 * 2 + 1
    values = iter(plain.state_dict().values())
    net.load_state_dict({k: v if "blocks.1." in k else next(values) for k, v in net.state_dict().items()})
    x = images(1, 32)
    assert torch.equal(net(x), plain(x))
    nn.init.ones_(net.blocks[1].gamma)
    assert not torch.equal(net(x), plain(x))


@quick
@given(st.integers(-5, 300))
def test_other_sizes_are_refused_with_their_neighbours(size):
    if size in PLANS:
        assert plan_for(size).size == size
        return
    below, above = sorted(sorted(PLANS, key=lambda s: abs(s - size))[:2])
    says = rf"image size {size} .*accepted are 16, 32, 48, 64, 128; near it: {below} and {above};"
    for build in (lambda: SNGANGenerator(out_size=size), lambda: SAGANDiscriminator(size)):
        with pytest.raises(ValueError, match=says):
            build()


def test_plans_of_ones_own():
    plan = ResNetPlan(5, (4, 2, 1), (1, 2), (2,), (6, 8))
    G, D = SNGANGenerator(3, 20, 2, plan=plan), SNGANDiscriminator(20, 2, plan=plan)
    assert D(G(G.sample_latent(2))).shape == (2,) and D.features(torch.randn(1, 2, 20, 20)).shape == (1, 16, 5, 5)
    for build, says in [(lambda: SNGANGenerator(out_size=32, plan=plan), "the plan makes 20"),
                        (lambda: SNGANDiscriminator(20, plan=ResNetPlan(5, (4, 2, 1), (1, 1, 1))), "halves it 3 times"),
                        (lambda: SNGANDiscriminator("big"), "image size 'big' has no residual network here; accepted are 16"),
                        (lambda: SNGANGenerator(out_size=32, attention=7), "attention=7: .* are 8, 16, 32"),
                        (lambda: SNGANDiscriminator(32, attention=4), "attention=4: .* are 16, 8, 8, 8"),
                        (lambda: SNGANDiscriminator(16, 1, 8)(images(3)), r"expected \(batch, 1, 16, 16\)")]:  # fmt: skip
        with pytest.raises(ValueError, match=says):
            build()


# --- image to image ---------------------------------------------------------------------------------------------------

def test_translators_counted_from_the_papers():
    conv = 2 * 3 * 64 * 49 + 2 * (64 * 128 + 128 * 256) * 9
    for blocks in (6, 9):
        assert n_params(on_meta(lambda: CycleGANGenerator(blocks=blocks))) == conv + blocks * 2 * 256 * 256 * 9 + 3  # noqa: B023
    # Zhu's code prints 11.378 M for nine blocks: these, and the biases before each instance norm
    assert conv + 9 * 2 * 256 * 256 * 9 + 3 + (2 * (64 + 128) + 256 + 18 * 256) == 11_378_179
    # and Isola's 54.414 M for the U-Net of 256×256, whose first and innermost convolutions have no bias
    assert n_params(on_meta(UNetGenerator)) == 54_413_955 + 64 + 512
    # and 2.769 M for the discriminator of pairs
    assert n_params(on_meta(lambda: PatchGANDiscriminator(given_channels=3))) == 2_768_705


def test_normal_weights():
    for net in (CycleGANGenerator(blocks=1), UNetGenerator(channels=16, depth=5), PatchGANDiscriminator(channels=16),
                EBGANDiscriminator(), ACGANDiscriminator(10), InfoGANDiscriminator(CODES)):  # fmt: skip
        std = 0.002 if isinstance(net, EBGANDiscriminator) else 0.02
        for m in net.modules():
            if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d)) and m.weight.numel() > 5000:
                assert m.weight.mean().abs() < std / 10 and m.weight.std().item() == pytest.approx(std, rel=0.1)
            if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d)):
                assert m.bias is None or m.bias.eq(0).all()


@quick
@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from(["cyclegan", "unet", "ebgan"]))
def test_sides_are_kept_or_refused(height, width, which):
    net = {"cyclegan": lambda: CycleGANGenerator(1, 1, 1, 1), "unet": lambda: UNetGenerator(1, 1, 1, 3),
           "ebgan": lambda: EBGANDiscriminator(1, 1, 3)}[which]().eval()  # fmt: skip
    multiple = 4 if which == "cyclegan" else 8
    x = torch.randn(2, 1, height, width)
    if height % multiple or width % multiple or min(height, width) < 8:
        says = rf"{type(net).__name__}: (height|width) \d+ is not a multiple of {multiple} from 8; near it: "
        with pytest.raises(ValueError, match=says) as info:
            net(x)
        below, above = map(int, re.findall(r"near it: (\d+) and (\d+)", str(info.value))[0])
        assert below % multiple == 0 and above - below == multiple and below >= 8
    else:
        assert (net.reconstruct(x) if which == "ebgan" else net(x)).shape == x.shape


def test_a_unet_is_a_ladder_of_maps_handed_across():
    net, x = UNetGenerator(1, 1, 4, 5).eval(), images(1, 32)

    def inside(i, x):
        h = net.down[i](x)
        return h if i == 4 else torch.cat([net.up[3 - i](inside(i + 1, h)), h], 1)

    assert torch.equal(net(x), net.to_image(inside(0, x)))
    ends = [[(m.in_channels, m.out_channels) for m in block.modules() if isinstance(m, nn.ConvTranspose2d)] for block in net.up]
    assert ends == [[(32, 32)], [(64, 16)], [(32, 8)], [(16, 4)]]
    normed = [any(isinstance(m, nn.BatchNorm2d) for m in block) for block in net.down]
    assert normed == [False, True, True, True, False]


def test_a_unet_takes_one_image_down_to_one_pixel():
    net = UNetGenerator(1, 1, 4, 4).train()
    deepest = []
    net.down[-1].register_forward_hook(lambda m, args, out: deepest.append(out))
    net(images(n=1))
    assert deepest[0].shape == (1, 32, 1, 1) and deepest[0].abs().max() > 0


def test_dropout_as_noise():
    x = images(1, 32)
    plain, noisy = UNetGenerator(1, 1, 4, 5).eval(), UNetGenerator(1, 1, 4, 5, always_drop=True).eval()
    assert torch.equal(plain(x), plain(x)) and not torch.equal(noisy(x), noisy(x)) and not torch.equal(plain.train()(x), plain(x))
    nets = [UNetGenerator(channels=1, depth=d) for d in (5, 6, 7, 8)]
    assert [sum(isinstance(m, Dropout) for m in net.modules()) for net in nets] == [1, 2, 3, 3]


def test_a_mirrored_border_has_no_edge():
    net = CycleGANGenerator(1, 1, 2, 1, norm=nn.Identity)
    y = net.layers[0](torch.full((1, 1, 12, 12), 0.3))
    assert_close(y, y[:, :, 5:6, 5:6].expand_as(y))


@quick
@given(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 2)), min_size=1, max_size=4))
def test_receptive_field_is_what_the_gradient_reaches(stack):
    layers = [nn.Conv1d(1, 1, 1)] + [nn.Conv2d(1, 1, k, s, dilation=d) for k, s, d in stack]
    net = nn.Sequential(*layers[1:])
    for p in net.parameters():
        nn.init.ones_(p)
    side = receptive_field(net)
    x = torch.zeros(1, 1, side, side, requires_grad=True)
    out = net(x)
    assert out.shape[2:] == (1, 1)  # fewer pixels would not give a single number
    out.sum().backward()
    reached = x.grad[0, 0].ne(0)
    assert reached[0, 0] and reached[-1, -1]


@pytest.mark.parametrize("patch", PATCHES)
def test_patches_are_as_large_as_they_are_called(patch):
    D = PatchGANDiscriminator(1, patch, 1, norm=None)
    size = max(8, 3 * patch // 2)
    x = torch.randn(1, 1, size, size, requires_grad=True)
    logits = D(x)
    n = logits.shape[-1] // 2
    for p in D.parameters():
        p.data.abs_()
    D(x)[0, 0, n, n].backward()
    rows = x.grad[0, 0].ne(0).any(1).nonzero().flatten()
    padded = (rows[0] == 0) or (rows[-1] == size - 1)
    assert receptive_field(D) == patch and (len(rows) == patch or (padded and len(rows) < patch))


@pytest.mark.parametrize("patch", [p for p in PATCHES if p < 142])
def test_the_smallest_image_with_a_patch(patch):
    D = PatchGANDiscriminator(1, patch, 1)
    assert D.eval()(images(1, D.least)).numel() >= 4
    with pytest.raises(ValueError, match="(too small; accepted are sides from|expects)"):
        D(torch.randn(4, 1, D.least, D.least - 1)) if D.least > 1 else D(images(2, 4))
    if D.least > 1:
        with pytest.raises(RuntimeError):
            D.to_logits(D.blocks(torch.randn(1, 1, D.least - 1, D.least - 1)))  # refused for a reason


def test_translators_refuse_by_name():
    D = PatchGANDiscriminator(1, 16, 2, given_channels=2)
    for call, says in [
        (lambda: PatchGANDiscriminator(patch=64), "patch=64: accepted are 1, 16, 34, 70, 142, 286; near it: 34 and 70"),
        (lambda: PatchGANDiscriminator(patch=1000), "near it: 142 and 286"),
        (lambda: D(images()), r"given images have shape None; expected \(4, 2, 16, 16\)"),
        (lambda: D(images(), images(2, 12)), r"have shape \(4, 2, 12, 12\)"),
        (lambda: PatchGANDiscriminator(1, 16, 2)(images(), images()), "expected None"),
        (lambda: CycleGANGenerator(3)(images()), r"\(4, 1, 16, 16\); CycleGANGenerator expects \(batch, 3, height, width\)"),
        (lambda: CycleGANGenerator(blocks=-1), "blocks=-1"),
        (lambda: UNetGenerator(depth=1), "depth=1: expected a whole number of halvings, 2 or more"),
        (lambda: EBGANDiscriminator(depth=0), "depth=0"),
        (lambda: check_sides(torch.zeros(2, 3), 3, 4, "net"), "net expects"),
    ]:
        with pytest.raises(ValueError, match=says):
            call()


def test_the_given_image_matters():
    D, x = PatchGANDiscriminator(1, 16, 4, 1).eval(), images()
    assert not torch.equal(D(x, images()), D(x, images()))
    assert_close(D(x, x), D.to_logits(D.features(x, x)))


# --- autoencoders -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("distance", "reference"), [
    ("l2", lambda d: d.square().sum((1, 2, 3)).sqrt()), ("l1", lambda d: d.abs().mean((1, 2, 3))),
    ("mse", lambda d: d.square().mean((1, 2, 3))),
])
def test_energies(distance, reference):
    for D in (EBGANDiscriminator(1, 4, 2, distance), BEGANDiscriminator(16, 1, 4, 5, distance)):
        x = images()
        assert_close(D.eval()(x), reference(D.reconstruct(x) - x))
        assert_close(D.reconstruct(x), D.decoder(D.encode(x)))


def test_the_energy_of_a_perfect_reconstruction_has_a_gradient():
    x = images().requires_grad_()
    layer = nn.Conv2d(1, 1, 1)
    nn.init.ones_(layer.weight), nn.init.zeros_(layer.bias)
    energy = EnergyDiscriminator(layer, nn.Identity())(x)
    energy.sum().backward()
    assert energy.eq(0).all() and layer.weight.grad.isfinite().all()


def test_autoencoders_counted_by_hand():
    assert n_params(EBGANDiscriminator()) == 2 * 16 * (3 * 64 + 64 * 128 + 128 * 256) + 64 + 3 + 2 * (128 + 256 + 128 + 64)
    for size, levels in ((16, 2), (32, 3), (64, 4), (128, 5)):
        n, h, c = 8, 5, 3
        conv = [(c, n), *[(n * i, n * i) for i in range(1, levels + 1)] * 2, *[(n * i, n * i + n) for i in range(1, levels)]]
        g = (h + 1) * n * 64 + 2 * levels * (n * n * 9 + n) + n * c * 9 + c
        d = sum(i * o * 9 + o for i, o in conv) + (levels * n * 64 + 1) * h
        nets = on_meta(lambda: (BEGANGenerator(h, size, c, n), BEGANDiscriminator(size, c, n, h)))  # noqa: B023
        assert tuple(map(n_params, nets)) == (g, g + d)
        x = nets[0](torch.empty(2, h, device="meta"))
        assert x.shape == (2, c, size, size) and nets[1].encode(x).shape == (2, h) and nets[1].reconstruct(x).shape == x.shape
    assert n_params(AAEEncoder((1, 28, 28), 8)) == 785 * 1000 + 1001 * 1000 + 1001 * 8
    assert n_params(AAEDecoder((1, 28, 28), 8)) == 9 * 1000 + 1001 * 1000 + 1001 * 784
    assert n_params(LatentDiscriminator(8)) == 9 * 1000 + 1001 * 1000 + 1001


def test_began_is_unbounded_and_shares_nothing():
    G, D = BEGANGenerator(5, 16, 1, 4), BEGANDiscriminator(16, 1, 4, 5)
    assert G(1000 * torch.rand(4, 5)).abs().max() > 1
    assert [p.shape for p in G.parameters()] == [p.shape for p in D.decoder.parameters()]
    assert not any(isinstance(m, (nn.BatchNorm2d, nn.ReLU, nn.Tanh)) for m in [*G.modules(), *D.modules()])
    for size in (8, 24, 48):
        for build in (lambda: BEGANGenerator(5, size), lambda: BEGANDiscriminator(size)):  # noqa: B023
            with pytest.raises(ValueError, match=f"image size {size} is not a power of two from 16"):
                build()


def test_pulling_away_reads_the_codes():
    D, x = EBGANDiscriminator(1, 4, 2).eval(), images()
    codes = F.normalize(D.encode(x).flatten(1), dim=1)
    cosines = [(codes[i] @ codes[j]) ** 2 for i in range(4) for j in range(4) if i != j]

    class Round:
        discriminator, fake, fake_labels, fake_outputs = D, x, None, {}

    assert_close(PullingAway()(Round), torch.stack(cosines).mean())
    D.outputs = True
    energies, Round.fake_outputs = D(x)
    D.encode = None  # nobody asks
    assert_close(PullingAway()(Round), torch.stack(cosines).mean())
    D.outputs = False
    del D.encode
    assert_close(D(x), energies)


def test_stochastic_codes_are_normal():
    E, x = AAEEncoder((1, 4, 4), 2, (8,), stochastic=True, std=0.5), images(1, 4, 1)
    mean, log_var = E.layers(x.flatten(1)).chunk(2, 1)
    codes = E(x.expand(20_000, -1, -1, -1))
    assert_close(codes.mean(0), mean[0], atol=0.05, rtol=0)
    assert_close(codes.var(0), log_var[0].exp(), atol=0, rtol=0.05)
    assert torch.equal(E.eval()(x), mean)


def test_weights_of_the_adversarial_autoencoder():
    for m in mlp([50, 400, 400, 30]):
        if isinstance(m, nn.Linear):
            assert m.weight.std().item() == pytest.approx(0.01, rel=0.05) and m.bias.eq(0).all()
    for net in (AAEEncoder((1, 20, 20), 20, (300,), std=0.3), AAEDecoder((1, 20, 20), 20, (300,), std=0.3),
                LatentDiscriminator(20, (300,), std=0.3)):  # fmt: skip
        assert net.layers[0].weight.std().item() == pytest.approx(0.3, rel=0.05)
    net = AAEDecoder((1, 4, 4), 2, (5, 6))
    assert [type(m).__name__ for m in net.layers] == ["Linear", "ReLU", "Linear", "ReLU", "Linear"]


def test_labels_go_in_as_one_hot():
    z = torch.randn(3, 2)
    assert torch.equal(with_classes(z, torch.tensor([2, 0, 1]), 3, "D"), torch.cat([z, torch.eye(3)[[2, 0, 1]]], 1))
    assert with_classes(z, None, 0, "D") is z
    with pytest.raises(ValueError, match=r"codes have shape \(3, 2\); expected \(batch, 5\)"):
        LatentDiscriminator(5)(z)


# --- heads ------------------------------------------------------------------------------------------------------------

def test_heads_stand_on_the_dcgan():
    plain, x = DCGANDiscriminator(16, 1, 4), images()
    for D in (ACGANDiscriminator(K, 16, 1, 4), InfoGANDiscriminator(CODES, 16, 1, 4)):
        missing, unexpected = D.load_state_dict(plain.state_dict(), strict=False)
        assert not unexpected and all(k.startswith(("to_classes", "to_codes")) for k in missing)
        assert torch.equal(D.eval()(x), plain.eval()(x)) and torch.equal(D.features(x), plain.features(x))
    assert n_params(ACGANDiscriminator(K, 16, 1, 4)) == n_params(plain) + K * (8 * 16 + 1)
    assert n_params(InfoGANDiscriminator(CODES, 16, 1, 4)) == n_params(plain) + 8 * 16 * 128 + 2 * 128 + 129 * CODES.parameters
    assert n_params(InfoGANGenerator(CODES, 16, 1, 4)) == n_params(DCGANGenerator(CODES.width, 16, 1, 4))


def test_acgan_asks_and_is_not_told():
    D, x = ACGANDiscriminator(K, 16, 1, 4).eval(), images()
    for f in (D, D.classify, D.features):
        assert torch.equal(f(x, Y), f(x))
    assert D.classify(x).shape == (4, K) and InfoGANDiscriminator(CODES, 16, 1, 4).codes(x).shape == (4, CODES.parameters)
    G = ACGANGenerator(K, 5, 16, 1, 4)
    assert torch.equal(G.embed.weight, torch.eye(K)) and G.embed.weight.requires_grad
    for build in (lambda: ACGANGenerator(1), lambda: ACGANDiscriminator(0), lambda: ACGANDiscriminator(True)):
        with pytest.raises(ValueError, match=r"ACGAN\w+ tells classes apart: num_classes=(0|1|True) must be a whole"):
            build()


@pytest.mark.parametrize(("make", "name", "method"), [
    (lambda **o: ACGANDiscriminator(K, 16, 1, 4, **o), "classes", "classify"),
    (lambda **o: InfoGANDiscriminator(CODES, 16, 1, 4, **o), "codes", "codes"),
])
def test_all_answers_of_one_forward(make, name, method):
    plain, D, x = make().eval(), make(outputs=True).eval(), images()
    D.load_state_dict(plain.state_dict())
    calls = []
    D.blocks.register_forward_hook(lambda m, args, out: calls.append(out))
    logits, outputs = D(x)
    assert len(calls) == 1 and {*outputs} == {name, "features"}
    assert torch.equal(logits, plain(x)) and torch.equal(outputs[name], getattr(plain, method)(x))
    assert torch.equal(outputs["features"], plain.features(x))


def test_one_forward_serves_a_learner():
    D = ACGANDiscriminator(K, 16, 1, 4, outputs=True)
    told = {"classes": lambda r: F.cross_entropy(r.fake_outputs["classes"], r.fake_labels)}
    gan = GANLearner(ACGANGenerator(K, 5, 16, 1, 4), D, [(images(), Y)] * 2, labels="sampled", generator_terms=told,
                     discriminator_terms=told, front="none", seed=0)  # fmt: skip
    calls = []
    D.blocks.register_forward_hook(lambda m, args, out: calls.append(len(out)))
    gan.fit(steps=2)
    assert calls == [4] * 3 * 2 and gan.history.last("train/generator/classes") > 0  # real and fake, then fake


def test_infogan_without_batch_norm():
    D = InfoGANDiscriminator(CODES, 16, 1, 4, batchnorm=False)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in D.modules())
    assert D.to_codes[0].bias is not None and D.to_codes[-2].bias is not None


def test_labels_are_no_part_of_infogan():
    with pytest.raises(ValueError, match="InfoGANDiscriminator was built without classes"):
        InfoGANDiscriminator(CODES, 16, 1, 4)(images(), Y)


def test_drawing_codes_leaves_the_learners_draw_alone():
    codes = Codes(noise=4, categorical=(3, 2), continuous=2)
    G = InfoGANGenerator(codes, 16, 1, 4)
    last = codes(5)
    z = G.sample_latent(300)
    assert codes.last is last and z.shape == (300, codes.width)
    (three, two), continuous = codes.split(z)
    assert torch.equal(z[:, 4:7], F.one_hot(three, 3).float()) and torch.equal(z[:, 7:9], F.one_hot(two, 2).float())
    assert continuous.abs().max() <= 1 and z[:, :4].abs().max() > 1.5


def test_near():
    assert near(40, [16, 32, 48]) == "accepted are 16, 32, 48; near it: 32 and 48"
    assert near(None, [16, 32]) == "accepted are 16, 32"
