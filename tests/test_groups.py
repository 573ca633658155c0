"""Parameter groups: which rule puts what where, against counts and closed forms made by hand."""
import copy
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from trainkit import groups
from trainkit.groups import (
    by_pattern,
    choose,
    depths,
    divide,
    groups_of,
    hidden,
    kinds_of,
    matrices,
    named,
    with_dense_gradients,
)  # fmt: skip
from trainkit.optim import OptimBuilder


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.ln_1, self.attn, self.ln_2 = nn.LayerNorm(width), nn.Linear(width, width, bias=False), nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))


class GPT(nn.Module):
    "The parts of a language model; `tied` shares the embedding with the head, as nanoGPT does."

    def __init__(self, width=4, layers=3, vocabulary=11, tied=True):
        super().__init__()
        self.transformer = nn.ModuleDict({
            "wte": nn.Embedding(vocabulary, width), "wpe": nn.Embedding(5, width),
            "h": nn.ModuleList(Block(width) for _ in range(layers)), "ln_f": nn.LayerNorm(width)})  # fmt: skip
        self.lm_head = nn.Linear(width, vocabulary, bias=False)
        if tied:
            self.lm_head.weight = self.transformer["wte"].weight


class ViT(nn.Module):
    def __init__(self, width=4, layers=3):
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 5, width))
        self.patch_embed = nn.Conv2d(3, width, 2)
        self.blocks, self.norm = nn.ModuleList(Block(width) for _ in range(layers)), nn.LayerNorm(width)
        self.head = nn.Linear(width, 2)


def names_of(opt):
    return [(g.get("name"), g["param_names"]) for g in opt.param_groups]


# ---------------------------------------------------------------- no decay


@pytest.mark.parametrize("tied", [True, False])
def test_nanogpt_grouping_against_a_count_by_hand(tied):
    """Width w, n layers: a block has 3 matrices, of w*w and twice 4*w*w, and vectors: 4 of w (norms), 4*w and w (biases)."""
    w, n, v = 4, 3, 11
    net = GPT(w, n, v, tied)
    opt = OptimBuilder("adamw", weight_decay=0.1, params="no_decay").build(net)
    decay, spared = opt.param_groups
    assert (decay["name"], decay["weight_decay"], spared["name"], spared["weight_decay"]) == ("decay", 0.1, "no_decay", 0.0)
    assert len(decay["params"]) == 2 + 3 * n + (not tied) and len(spared["params"]) == 6 * n + 2
    assert sum(p.numel() for p in decay["params"]) == v * w + 5 * w + n * 9 * w * w + (not tied) * v * w
    assert sum(p.numel() for p in spared["params"]) == n * (4 * w + 4 * w + w) + 2 * w


def test_groups_made_by_the_rule_train_bit_for_bit_as_groups_made_by_hand():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 1))
    other = copy.deepcopy(net)
    by_rule = OptimBuilder("adamw", lr=0.01, weight_decay=0.3, params="no_decay", fused=False).build(net)
    big, small = ([p for p in other.parameters() if (p.ndim > 1) is want] for want in (True, False))
    by_hand = torch.optim.AdamW([{"params": big}, {"params": small, "weight_decay": 0.0}], lr=0.01, weight_decay=0.3)
    for opt, model in (by_rule, net), (by_hand, other):
        for i in range(5):
            opt.zero_grad()
            model(torch.full((2, 3), i / 3.0)).square().sum().backward()
            opt.step()
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), other.parameters()))
    assert not torch.equal(net[0].weight, torch.zeros_like(net[0].weight))


def test_modules_tell_norms_and_embeddings_that_names_and_dimensions_do_not():
    net = nn.ModuleDict({"a": nn.LayerNorm((2, 3)), "b": nn.Embedding(4, 3), "c": nn.Linear(3, 2)})
    rule = {"rule": "no_decay", "embeddings": True}
    plan = OptimBuilder("adamw", params=rule)
    assert names_of(plan.build(net))[0][1] == ["c.weight"]
    assert names_of(plan.build([*net.named_parameters()]))[0][1] == ["a.weight", "b.weight", "c.weight"]
    assert names_of(plan.build([*net.named_parameters()], modules=net))[0][1] == ["c.weight"]
    assert names_of(plan.build([*net.named_parameters()], modules=[net["a"], net["b"]]))[0][1] == ["c.weight"]
    with pytest.raises(TypeError, match="modules is a module, or several in a list or dict; received 3"):
        plan.build(net, modules=[3])


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(3), nn.GroupNorm(1, 3), nn.InstanceNorm1d(3, affine=True), nn.RMSNorm((2, 3)),
                                  nn.LayerNorm((2, 3)), nn.SyncBatchNorm(3)])  # fmt: skip
def test_every_norm_is_spared(norm):
    assert set(kinds_of(norm).values()) == {"norm"}
    opt = OptimBuilder("adamw", params="no_decay").build(norm)
    assert [g["weight_decay"] for g in opt.param_groups] == [0.0]


def test_scalars_biases_and_unnamed_parameters():
    scalar, table = nn.Parameter(torch.tensor(1.0)), nn.Parameter(torch.zeros(2, 2))
    opt = OptimBuilder("adamw", params="no_decay").build([("scale", scalar), ("relative.bias", table)])
    assert [(g["name"], len(g["params"])) for g in opt.param_groups] == [("no_decay", 2)]
    opt = OptimBuilder("adamw", params="no_decay").build([scalar, table])
    assert [len(g["params"]) for g in opt.param_groups] == [1, 1]


def test_frozen_parameters_go_in_and_shared_ones_once():
    net = GPT()
    net.transformer["wte"].requires_grad_(False)
    opt = OptimBuilder("adamw", params=["no_decay", {"rule": "layer_decay", "decay": 0.5}]).build(net)
    held = [id(p) for g in opt.param_groups for p in g["params"]]
    assert len(held) == len(set(held)) == len(list(net.parameters()))
    assert id(net.lm_head.weight) in held


# ---------------------------------------------------------------- layer decay


def rates(opt):
    return {name: g["lr"] for g in opt.param_groups for name in g["param_names"]}


def test_layer_decay_of_a_vit_against_the_closed_form():
    """Embedding 0, blocks 1 to n, head n + 1: the rate of layer i is lr * decay ** (n + 1 - i)."""
    n, lr, d = 3, 0.1, 0.75
    found = rates(OptimBuilder("adamw", lr=lr, params={"rule": "layer_decay", "decay": d}).build(ViT(layers=n)))
    for name, rate in found.items():
        at = n + 1 if name.startswith("head") else int(name.split(".")[1]) + 1 if name.startswith("blocks") else 0
        at = n if name.startswith("norm") else at  # the last norm goes with the block before it
        assert rate == pytest.approx(lr * d ** (n + 1 - at), rel=1e-12), name


@given(n=st.integers(1, 8), d=st.floats(0.1, 1.0))
def test_layer_decay_of_a_sequential(n, d):
    net = nn.Sequential(*[m for _ in range(n) for m in (nn.Linear(2, 2), nn.BatchNorm1d(2), nn.ReLU())])
    found = rates(OptimBuilder("sgd", lr=1.0, params={"rule": "layer_decay", "decay": d}).build(net))
    for name, rate in found.items():
        assert rate == pytest.approx(d ** (n - 1 - int(name.split(".")[0]) // 3))


def test_layer_decay_of_nested_models():
    stages = nn.ModuleList(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)) for _ in range(2))
    body = nn.ModuleDict({"stem": nn.Conv2d(3, 2, 1), "stages": stages})
    net = nn.ModuleDict({"body": body, "head": nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))})

    def layers(**options):
        opt = OptimBuilder("sgd", lr=1.0, params={"rule": "layer_decay", "decay": 0.5, **options}).build(net)
        return {name.removesuffix(".weight"): rate for name, rate in rates(opt).items() if name.endswith("weight")}

    one = {"body.stem": 2**-4, "body.stages.0.0": 2**-3, "body.stages.0.1": 2**-3, "body.stages.1.0": 2**-2,
           "body.stages.1.1": 2**-2, "head.0": 0.5, "head.2": 1.0}  # fmt: skip
    assert layers() == one
    assert layers(head="^head") == {k: 1.0 if k.startswith("head") else v * 2 for k, v in one.items()}
    two = {"body.stem": 2**-5, "body.stages.0.0": 2**-4, "body.stages.0.1": 2**-3, "body.stages.1.0": 2**-2}
    assert layers(levels=2, head="^head") == {**two, "body.stages.1.1": 0.5, "head.0": 1.0, "head.2": 1.0}


def test_depth_of_a_resnet_follows_its_blocks():
    names = ["conv1", "bn1", "layer1.0.conv1", "layer1.0.bn1", "layer1.1.conv1", "layer2.0.conv1", "layer2.0.downsample.0", "fc"]
    pairs = [(f"{n}.weight", torch.zeros(2) if "bn" in n else torch.zeros(2, 2)) for n in names]
    assert depths(pairs) == [0, 0, 1, 1, 2, 3, 3, 4]


def test_layer_decay_multiplies_whatever_rate_a_group_has():
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    rules = [{"rule": "layer_decay", "decay": 0.5}, {"bias": {"lr": 4.0}}, {"^0": {"lr_scale": 0.1}}]
    found = rates(OptimBuilder("sgd", lr=1.0, params=rules).build(net))
    assert found == pytest.approx({"0.weight": 0.05, "0.bias": 0.2, "1.weight": 1.0, "1.bias": 4.0})
    default = rates(OptimBuilder("adamw", params={"rule": "layer_decay", "decay": 0.5}).build(net))
    assert default["0.weight"] == pytest.approx(5e-4)  # of the optimizer's own rate
    tensor = OptimBuilder("adamw", lr=torch.tensor(1.0), params={"^0": {"lr_scale": 0.5}}).build(net)
    assert [float(g["lr"]) for g in tensor.param_groups] == [1.0, 0.5]


# ---------------------------------------------------------------- several rules, and what is refused


def test_both_rules_together_against_each_alone():
    net = ViT()
    rules = ["no_decay", {"rule": "layer_decay", "decay": 0.5}]
    both = OptimBuilder("adamw", lr=0.1, weight_decay=0.2, params=rules).build(net)
    depth = rates(OptimBuilder("adamw", lr=0.1, params=rules[1]).build(net))
    for g in both.param_groups:
        for name, p in zip(g["param_names"], g["params"]):
            assert g["lr"] == depth[name] and g["weight_decay"] == (0.2 if p.ndim > 1 else 0.0)
    assert sum(len(g["params"]) for g in both.param_groups) == len(depth) == len(list(net.parameters()))
    assert len({g["name"] for g in both.param_groups}) == len(both.param_groups)
    assert rates(OptimBuilder("adamw", lr=0.1, params=rules[::-1]).build(net)) == rates(both)


def test_the_later_rule_has_the_last_word():
    net = nn.Linear(2, 2)
    table = {"bias": {"weight_decay": 0.5}}
    for rules, decay in ((["no_decay", table], 0.5), ([table, "no_decay"], 0.0)):
        opt = OptimBuilder("adamw", params=rules).build(net)
        assert [g["weight_decay"] for g in opt.param_groups] == [0.01, decay]


@given(st.data())
def test_whatever_the_rules_every_parameter_is_in_one_group(data):
    net = data.draw(st.sampled_from([ViT(), GPT(), GPT(tied=False)]))
    pool = ["no_decay", {"rule": "layer_decay", "decay": 0.7}, {"ln|norm": {"lr": 0.5}}, {"weight": {"lr_scale": 2.0}}]
    rules = data.draw(st.lists(st.sampled_from(pool), min_size=1, max_size=4))
    found = divide(groups_of(net), rules, kinds_of(net))
    assert sorted(n for g in found for n, _ in g["params"]) == sorted(n for n, _ in net.named_parameters())
    assert all(g["params"] for g in found)


def some(pairs):
    return [{"params": pairs[:1]}]


def none(pairs):
    return [{"params": pairs}, {"params": []}]


def twice(pairs):
    return [{"params": pairs}, {"params": pairs[:1]}]


@pytest.mark.parametrize("rule, message", [
    ("no_decays", "unknown rule 'no_decays'; accepted (nearest first): no_decay"),
    ({"rule": "layer_decay", "decay": 0}, "decay must be a number 0 < d <= 1; received 0"),
    ({"rule": "layer_decay", "decay": True}, "decay must be a number 0 < d <= 1; received True"),
    ({"rule": "layer_decay", "levels": 0}, "levels must be a whole number >= 1; received 0"),
    ({"rule": "layer_decay", "deacy": 0.5}, "unknown option 'deacy'; accepted (nearest first): decay"),
    ({"rule": "no_decay", "embeddings": "yes"}, "embeddings must be True or False; received 'yes'"),
    ({"rule": "layer"}, "unknown rule 'layer'; accepted (nearest first): layer_decay"),
    ([], "received an empty list"), ({}, "received an empty table"), ([3], "received 3"),
    ({"(": {}}, "'(' is no regular expression"), ({"bias": 3}, "params must be {pattern: options}; received 'bias': 3"),
    ({"bias": {"lr_scale": "x"}}, "lr_scale must be a number >= 0; received 'x'"),
    (["no_decay", {"bias": {"momentum": 1}}], "unknown option 'momentum'"),
    ("nowhere.at_all", "'nowhere.at_all' can't be found"),
])  # fmt: skip
def test_a_bad_rule_is_an_error_when_it_is_written(rule, message):
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        OptimBuilder("adamw", params=rule)


@pytest.mark.parametrize("rule, message", [
    (some, "some put these parameters in no group: '0.bias', '1.weight'"), (none, "group 1 has no floating-point parameter"),
    (twice, "parameter '0.weight' is in two groups: 0 and 1"), ({"norm": {}}, "pattern 'norm' takes no parameter"),
    ({"rule": "layer_decay", "head": "tail"}, "head='tail' takes no parameter"),
])  # fmt: skip
def test_parameters_that_do_not_fit_a_rule_are_named(rule, message):
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, bias=False))
    with pytest.raises(ValueError, match=re.escape(message)):
        OptimBuilder("adamw", params=rule).build(net)


def test_rules_by_name_need_names():
    with pytest.raises(ValueError, match="groups by name need names; 2 parameters have none"):
        OptimBuilder("adamw", params={"rule": "layer_decay"}).build(nn.Linear(2, 2).parameters())


def test_a_rule_for_an_option_that_the_optimizer_lacks_is_refused():
    with pytest.raises(TypeError, match="rprop: unknown option 'weight_decay'"):
        OptimBuilder("rprop", params="no_decay")
    with pytest.raises(ValueError, match="lr_scale=0.5 needs a rate to multiply: give lr="):
        OptimBuilder(lambda params, lr: torch.optim.SGD(params, lr), params={"bias": {"lr_scale": 0.5}})


# ---------------------------------------------------------------- choices


def test_hidden_matrices():
    def taken(net, choice, **options):
        pairs = named(net)
        return {n for (n, _), yes in zip(pairs, choice(pairs, kinds_of(net), **options)) if yes}

    inside = {f"transformer.h.{i}.{part}.weight" for i in range(3) for part in ("attn", "mlp.0", "mlp.2")}
    assert taken(GPT(), hidden) == taken(GPT(tied=False), hidden) == inside
    assert taken(GPT(tied=False), matrices) == inside | {"transformer.wte.weight", "transformer.wpe.weight", "lm_head.weight"}
    assert taken(ViT(), hidden) == {n.removeprefix("transformer.").replace("h.", "blocks.") for n in inside}
    assert taken(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 1)), hidden) == {"0.weight", "1.weight"}
    assert taken(nn.Sequential(nn.Conv2d(1, 1, 1), nn.Linear(1, 1)), hidden) == set()


@pytest.mark.parametrize("only, message", [
    ("matrix$", "only='matrix$' takes no parameter; there are 'weight', 'bias'"),
    (".", "only='.' takes every parameter, and leaves nothing for rest"),
    (lambda name, p: False, "<lambda>' takes no parameter"),
])  # fmt: skip
def test_a_choice_of_nothing_or_everything_is_said(only, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        choose(only, named(nn.Linear(2, 2)), {})


def test_every_rule_has_a_source_or_a_sentence():
    assert all(rule.__doc__ for rule in (*groups.RULES.values(), *groups.CHOICES.values()))


def test_a_parameter_of_two_patterns_goes_by_the_first():
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    rules = {"bias$": {"lr": 0.1}, "^0": {"lr": 0.2, "weight_decay": 0.3}, ".": {"lr": 0.4}}
    found = {name: g["lr"] for g in by_pattern(named(net), rules) for name, _ in g["params"]}
    assert found == {"0.bias": 0.1, "1.bias": 0.1, "0.weight": 0.2, "1.weight": 0.4}
    other_way = dict([*rules.items()][1::-1])
    turned = {name: g["lr"] for g in by_pattern(named(net), other_way) for name, _ in g["params"] if "lr" in g}
    assert turned == {"1.bias": 0.1, "0.weight": 0.2, "0.bias": 0.2}


def test_a_pattern_behind_a_wider_one_is_named():
    net = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="'bias' takes no parameter: those before it took 0.bias"):
        by_pattern(named(net), {"^0": {}, "bias": {}})


def test_a_list_of_tables_adds_up():
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    groups = divide([{"params": named(net)}], [{"bias$": {"weight_decay": 0.0}}, {"^0": {"lr": 0.2}}])
    both = next(g for g in groups if [name for name, _ in g["params"]] == ["0.bias"])
    assert (both["lr"], both["weight_decay"]) == (0.2, 0.0)


def test_unnamed_parameters_are_told_by_their_place():
    a, b = nn.Parameter(torch.zeros(8, 4)), nn.Parameter(torch.zeros(8, 4))
    message = "the parameter at place 1 of group 1, of shape (8, 4), is in two groups: 0 and 1"
    with pytest.raises(ValueError, match=re.escape(message)):
        groups_of([{"params": [a]}, {"params": [b, a]}])


def test_what_has_dense_gradients():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.out = nn.Parameter(torch.zeros(3, 2)), nn.Linear(2, 1)

    sparse, dense, own = nn.Embedding(3, 2, sparse=True), nn.Embedding(3, 2), Own()
    found = with_dense_gradients({"a": sparse, "b": dense, "c": own})
    assert found == {id(p) for p in (dense.weight, own.out.weight, own.out.bias)}  # of `table` nobody knows
    tied = nn.Linear(2, 3, bias=False)
    tied.weight = sparse.weight
    assert with_dense_gradients([sparse, tied]) == set() == with_dense_gradients(None)
