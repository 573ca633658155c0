"""Sharded parameters (FSDP2 over gloo, real processes): what one process and ddp do, in parts; saved whole and in parts.

What the ranks do stands in sharded_ranks.py.
"""
import shutil
import subprocess
import sys

import pytest
import sharded_ranks
import torch
from ranks import net
from test_distributed import EXACT, HERE, apart, assert_one, environment, finished, free_port

from trainkit.converter import PARTS, convert
from trainkit.distributed import Distributed
from trainkit.storage import read_checkpoint

SAME = ["plain", "adamw", "accumulated", "unused", "gan_every", "gan_at_once", "gan_penalty", "averaged", "steered", "saved"]
TWO = [*SAME, "ddp", "whole_numbers", "resumed", "saved_apart", "resumed_apart", "resumed_alone", "mixed", "refused"]
FOUR = ["plain", "adamw", "gan_penalty", "resumed", "resumed_apart"]


def launch(n, folder, *names):
    start = ["-m", "torch.distributed.run", "--nproc-per-node", str(n), "--master-port", str(free_port())] if n > 1 else []
    return subprocess.Popen([sys.executable, *start, str(HERE / "sharded_ranks.py"), str(folder), *names], cwd=folder,
                            env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    one, two, four = (tmp_path_factory.mktemp(name) for name in ("one", "two", "four"))
    finished(launch(1, one, *SAME, "whole_numbers", "alone"))
    shutil.copytree(one / "alone", two / "alone")
    finished(launch(2, two, *TWO))
    for name in "saved", "apart":
        shutil.copytree(two / name, four / name)
    finished(launch(4, four, *FOUR))
    return {1: one, 2: two, 4: four}


def found(runs, n, name):
    return torch.load(runs[n] / f"{name}.pt", weights_only=False)


@pytest.mark.parametrize("n, name", [*((2, name) for name in SAME), *((4, name) for name in FOUR if name in SAME)])
def test_parts_do_what_one_process_does_with_the_joint_batch(runs, n, name):
    every, (alone,) = found(runs, n, name), found(runs, 1, name)
    assert_one(every)
    assert len(every) == n and apart(every[0], alone) < EXACT
    assert (every[0]["step"], every[0]["state"]) == (alone["step"], alone["state"])
    assert every[0]["history"].keys() == alone["history"].keys()
    for series, (steps, values) in alone["history"].items():
        assert every[0]["history"][series][0] == steps
        torch.testing.assert_close(torch.tensor(every[0]["history"][series][1]), torch.tensor(values), rtol=0, atol=1e-5)


def test_parts_do_what_ddp_does(runs):
    assert apart(found(runs, 2, "adamw")[0], found(runs, 2, "ddp")[0]) < EXACT


def test_where_sums_are_exact_so_are_the_weights(runs):
    assert apart(found(runs, 2, "whole_numbers")[0], found(runs, 1, "whole_numbers")[0]) == 0


@pytest.mark.parametrize("n", [2, 4])
def test_a_rank_has_its_part_only(runs, n):
    numbers = {name: p.numel() for name, p in net().named_parameters()}
    parts = [r["parts"] for r in found(runs, n, "plain")]
    assert {name: sum(part[name] for part in parts) for name in numbers} == numbers
    assert all(part["0.weight"] == numbers["0.weight"] // n for part in parts)


@pytest.mark.parametrize("n", [2, 4])
def test_predictions_are_those_of_one_process(runs, n):
    (alone,) = found(runs, 1, "plain")
    for mine in found(runs, n, "plain"):
        torch.testing.assert_close(mine["predicted"], alone["predicted"], rtol=0, atol=EXACT)


def test_an_average_is_that_of_one_process(runs):
    every, (alone,) = found(runs, 2, "averaged"), found(runs, 1, "averaged")
    assert every[0]["counts"] == alone["counts"]
    assert all((every[0]["averages"][k] - v).abs().max() < EXACT for k, v in alone["averages"].items())


def test_commands_act_on_all_ranks_before_the_same_step(runs):
    every, (alone,) = found(runs, 2, "steered"), found(runs, 1, "steered")
    for mine in every:
        assert mine["rates"] == alone["rates"] and mine["asked"] == alone["asked"]
    assert ("restore", 2, "") in alone["asked"] and {0.1, 0.01} == {rate for _, rate in alone["rates"]}


# ------------------------------------------------------------------------------------------------------- coming back


@pytest.mark.parametrize("whole, again", [("saved", "resumed"), ("saved_apart", "resumed_apart")])
def test_resumed_by_as_many_ranks_nothing_has_changed(runs, whole, again):
    through, back = found(runs, 2, whole), found(runs, 2, again)
    assert back[0]["start"] == 8 and apart(through[0], back[0]) == 0 and through[0]["history"] == back[0]["history"]
    assert_one(back)


@pytest.mark.parametrize("again", ["resumed", "resumed_apart"])
def test_resumed_by_four_ranks(runs, again):
    back = found(runs, 4, again)
    assert_one(back)
    assert back[0]["start"] == 8 and apart(found(runs, 2, "saved")[0], back[0]) < EXACT


def test_resumed_from_one_process(runs):
    assert apart(found(runs, 1, "alone")[0] if isinstance(found(runs, 1, "alone"), list) else found(runs, 1, "alone"),
                 found(runs, 2, "resumed_alone")[0]) < EXACT  # fmt: skip


@pytest.mark.parametrize("name", ["saved", "apart"])
def test_resumed_in_one_process(runs, name, tmp_path):
    shutil.copytree(runs[2] / name, tmp_path / name)
    learn = sharded_ranks.kept(tmp_path, name, model=net(seed=9), distributed=None)
    learn.restore(8)
    learn.fit()
    assert apart(found(runs, 2, "saved")[0], sharded_ranks.ranks.told_alone(learn)) < EXACT


def test_every_rank_writes_its_part_and_one_form_becomes_the_other(runs, tmp_path):
    assert found(runs, 2, "saved_apart")[0]["files"] == [".metadata", "__0_0.distcp", "__1_0.distcp"]
    shutil.copytree(runs[2] / "apart", tmp_path / "apart")
    path = tmp_path / "apart" / "checkpoints" / "ckpt-000000008.pt"
    assert PARTS in read_checkpoint(path, whole=False)["state"]
    before = read_checkpoint(path)["state"]["players"]["model"]
    assert convert(path, "single") == path and not path.with_suffix(".parts").exists()
    after = read_checkpoint(path, whole=False)["state"]["players"]["model"]
    convert(path, "sharded", tmp_path / "ckpt-000000008.pt")
    again = read_checkpoint(tmp_path / "ckpt-000000008.pt")["state"]["players"]["model"]
    for other in after, again:
        for i, kept in before["optimizer"]["state"].items():
            assert all(torch.equal(v, other["optimizer"]["state"][i][k]) for k, v in kept.items())
        for kind in ("modules", "gradients"):
            there = before[kind]["model"] if kind == "modules" else before[kind]
            here = other[kind]["model"] if kind == "modules" else other[kind]
            assert there.keys() == here.keys() and all(torch.equal(v, here[k]) for k, v in there.items())
    with pytest.raises(ValueError, match="'single' or 'sharded'"):
        convert(path, "parquet")


def test_a_rank_that_dies_while_it_writes_leaves_the_checkpoint_before(tmp_path):
    process = launch(2, tmp_path, "dies")
    process.communicate(timeout=200)
    assert process.returncode != 0
    folder = tmp_path / "dies" / "checkpoints"
    assert sorted(p.name for p in folder.glob("ckpt-*")) == ["ckpt-000000006.json", "ckpt-000000006.parts", "ckpt-000000006.pt",
                                                              "ckpt-000000012.parts.new"]  # fmt: skip
    learn = sharded_ranks.learner(net(seed=9), run=tmp_path / "dies", distributed=None, save_every="none")
    assert learn.restore("last").info["note"] == "first" and learn.step == 6


# ------------------------------------------------------------------------------------------------------------- types


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_narrow_types_over_ranks(runs, mode):
    "Gradients are summed in float32; what is infinite on one rank leaves the step out, and halves the scale, on all."
    every = found(runs, 2, "mixed")
    for precision in "bf16", "fp16":
        first, second = (r[mode, precision] for r in every)
        assert first["types"] == {"torch.float32"} and first["stepped"] == second["stepped"] and first["scale"] == second["scale"]
        assert all(torch.equal(v, second["weights"][k]) and v.isfinite().all() for k, v in first["weights"].items())
    assert all(every[0][mode, "bf16"]["stepped"]) and every[0][mode, "bf16"]["scale"] is None
    half = every[0][mode, "fp16"]  # the first scale is too large for half precision, as in one process
    assert not half["stepped"][2] and half["scale"] == 2.0 ** (16 - half["stepped"].count(False)) and half["stepped"][-1]


def test_what_parts_cannot_do_is_refused_by_name(runs):
    optimizer, compiled, clip, export, load, penalty = found(runs, 2, "refused")
    assert "Adafactor takes means of rows and columns" in optimizer and "compile=" in compiled
    assert clip.startswith("ValueError: AdaptiveClip and distributed='fsdp'") and "trainkit export" in export
    assert "pretrained=" in load and "Distributed('fsdp', hold=True)" in penalty


@pytest.mark.parametrize("wrong, words", [({"checkpoint": "many"}, "accepted: 'single' and 'sharded'"),
                                          ({"mode": "ddp", "hold": True}, "are for sharded parameters")])  # fmt: skip
def test_settings_that_are_none(wrong, words):
    with pytest.raises(ValueError, match=words):
        Distributed(**{"mode": "fsdp", **wrong})
