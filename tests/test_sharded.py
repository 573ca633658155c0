"""Sharded parameters (FSDP2 over gloo, real processes): what one process and ddp do, in parts; saved whole and in parts.

What the ranks do stands in sharded_ranks.py.
"""
import pickle
import shutil
from functools import partial
from pathlib import Path

import pytest
import sharded_ranks
import test_distributed
import torch
from ranks import net
from test_distributed import EXACT, apart, assert_one, ended, finished, found, unlaunched
from torch import nn

from trainkit.converter import PARTS, PartsError, convert
from trainkit.distributed import Distributed
from trainkit.sharded import Divided
from trainkit.storage import read_checkpoint

SAME = ["plain", "adamw", "accumulated", "unused", "gan_every", "gan_at_once", "gan_penalty", "averaged", "steered", "saved",
        "early", "frozen_turns", "bounded", "spectral", "tied"]  # fmt: skip
BOTH = ["bad_steps", "cancels", "cancels_others", "interrupted"]
TWO = [*SAME, *BOTH, "ddp", "wrapped", "gan_norms", "commanded", "whole_numbers", "resumed", "saved_apart", "behind",
       "falls_back", "resumed_apart", "resumed_alone", "mixed", "narrow", "asked_for", "refused"]  # fmt: skip
FOUR = ["plain", "adamw", "gan_penalty", *BOTH, "early", "commanded", "behind", "narrow", "resumed", "falls_back",
        "resumed_apart"]  # fmt: skip


launch = partial(test_distributed.launch, script="sharded_ranks.py")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    one, two, four = (tmp_path_factory.mktemp(name) for name in ("one", "two", "four"))
    finished(launch(1, one, *SAME, *BOTH, "whole_numbers", "alone", "narrow"))
    shutil.copytree(one / "alone", two / "alone")
    finished(launch(2, two, *TWO))
    for name in "saved", "apart":
        shutil.copytree(two / name, four / name)
    finished(launch(4, four, *FOUR))
    return {1: one, 2: two, 4: four}


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


def test_whatever_is_gathered_at_a_time(runs):
    (alone,) = found(runs, 1, "adamw")
    for every in found(runs, 2, "wrapped"):
        assert_one(every)
        assert apart(every[0], alone) < EXACT


def test_norms_in_parts_do_what_they_do_under_ddp(runs):
    norms = found(runs, 2, "gan_norms")
    assert_one(norms["fsdp"])
    assert apart(norms["fsdp"][0], norms["ddp"][0]) < 1e-6  # statistics travel as float32


@pytest.mark.parametrize("n", [2, 4])
def test_a_step_that_is_infinite_on_one_rank_is_left_out_on_all(runs, n):
    every, alone = found(runs, n, "bad_steps"), found(runs, 1, "bad_steps")
    for accumulate, ours in every.items():
        assert_one(ours)
        assert apart(ours[0], alone[accumulate][0]) < EXACT
        assert [r["skipped"] for r in ours] == n * [alone[accumulate][0]["skipped"]] and ours[0]["skipped"] == {"model": 2}


def test_where_sums_are_exact_so_are_the_weights(runs):
    assert apart(found(runs, 2, "whole_numbers")[0], found(runs, 1, "whole_numbers")[0]) == 0


def test_tied_weights_stay_one(runs):
    "In a file, and in parts: there once, though the second rank has nothing of them."
    (alone,) = found(runs, 1, "tied")
    for mine in found(runs, 2, "tied"):
        for there in mine["weights"]["model"], mine["second"]:
            assert torch.equal(there["first.weight"], there["second.weight"])
            assert all((v - alone["weights"]["model"][k]).abs().max() < EXACT for k, v in there.items())
    newest = max((runs[2] / "tied apart" / "checkpoints").glob("*.pt"))
    modules = read_checkpoint(newest, whole=False)["state"]["players"]["model"]["modules"]["model"]
    assert modules["first.weight"] == modules["second.weight"] and modules["last.weight"] != modules["first.weight"]


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


@pytest.mark.parametrize("n", [2, 4])
def test_commands_through_the_run_folder_act_on_all_ranks_at_once(runs, n):
    first, *others = every = found(runs, n, "commanded")
    assert_one(every)
    (_, rate), (changed, lower) = first["changes"]
    assert (rate, lower) == (0.1, 0.025) and changed >= 2 and first["state"] == "stopped" and first["step"] < 5000
    for other in others:
        assert all(first[what] == other[what] for what in ("changes", "state", "step"))
    saved = [p.name for p in (runs[n] / "commanded" / "checkpoints").iterdir()]
    assert any(name.endswith(".parts") for name in saved)


@pytest.mark.parametrize("n", [2, 4])
def test_what_one_rank_cancels_while_all_look_on_all_cancel(runs, n):
    every, alone = found(runs, n, "cancels"), found(runs, 1, "cancels")
    assert {*every} <= {*alone} and len(every) == (2 * len(sharded_ranks.LOOKING) + 4) // (n // 2)
    for key, ours in every.items():
        assert_one(ours)
        assert apart(ours[0], alone[key][0]) < EXACT, key
        for what in "step", "epoch", "state":
            assert ours[0][what] == alone[key][0][what], (key, what)
        steps = [{name: steps for name, (steps, _) in r["history"].items()} for r in (ours[0], alone[key][0])]
        assert steps[0] == steps[1], key  # what was cut off is recorded nowhere


@pytest.mark.parametrize("n", [2, 4])
def test_tests_and_predictions_are_cancelled_together(runs, n):
    (first,) = found(runs, 1, "cancels_others")
    assert found(runs, n, "cancels_others") == n * [first] and {word for *_, word in first} == {"CancelFit"}


@pytest.mark.parametrize("n", [2, 4])
def test_an_interrupt_of_one_rank_is_everybodys_and_leaves_a_checkpoint(runs, n):
    every, (alone,) = found(runs, n, "interrupted"), found(runs, 1, "interrupted")
    assert [(r["state"], r["at"]) for r in every] == n * [("interrupted", 4)] and "saved as 4" in every[0]["said"]
    assert_one(every)
    assert apart(every[0], alone) < EXACT


# ------------------------------------------------------------------------------------------------------- coming back


@pytest.mark.parametrize("n", [2, 4])
def test_parts_are_written_behind_the_training(runs, n):
    "What was saved is what was there then; what one rank can't write is no checkpoint, and costs none of the others."
    for r in found(runs, n, "behind"):
        assert r["there"] == []  # three steps later, the first is still being written
        assert all(torch.equal(v, r["back"][k]) for k, v in r[2].items()) and not torch.equal(r[8]["0.weight"], r[2]["0.weight"])
        stems = [f"ckpt-{step:09d}.{kind}" for step in (2, 12) for kind in ("json", "parts", "pt")]
        assert r["files"] == stems
    first = found(runs, n, "behind")[0]
    assert first["notes"] == ["after 2", "at last"]
    assert "could not write" in first["problem"] and "rank 1: OSError: [Errno 28] No space left" in first["problem"]


@pytest.mark.parametrize("n", [2, 4])
def test_where_the_newest_has_lost_a_part_all_ranks_take_the_one_before(runs, n):
    "Two ranks wrote it; of four, one has none of its files to look at, and another finds the damage."
    first, *others = found(runs, n, "falls_back")
    assert [f[:2] for f in first[:3]] == [(18, 18), (16, 16), (12, 12)] and [len(f[2]) for f in first[:3]] == [0, 1, 2]
    again = "" if n == 2 else "-1"  # the four find what two have saved, restored and saved again
    newest = f"ckpt-000000018{again}.parts: __1_0.distcp isn't what was written"
    assert f"{newest}. Going back to the checkpoint before it" in first[1][2][0]
    assert f"ckpt-000000016{again}.parts, are not beside it" in first[2][2][1]
    assert len(others) == n - 1 and len({f[3] for f in first[:3]}) == 3
    for other in others:
        assert [(f[0], f[3]) for f in first[:3]] == [(s[0], s[3]) for s in other[:3]] and first[3] == other[3]
    assert newest in first[3]


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
    assert apart(found(runs, 1, "alone"), found(runs, 2, "resumed_alone")[0]) < EXACT


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


def test_a_fault_of_parts_goes_from_rank_to_rank():
    error = pickle.loads(pickle.dumps(PartsError(Path("ckpt-1.parts"), "torn")))
    assert str(error) == "cannot read ckpt-1.parts: torn" and error.path == Path("ckpt-1.pt") and error.fault.endswith("torn")


@pytest.mark.parametrize("n", [2, 4])
def test_a_rank_that_dies_ends_the_others_and_leaves_the_checkpoint_before(tmp_path, n):
    """It fails, and is killed, while parts are written behind the training; of two it is also killed while all wait for them.

    The others hear of it while everybody is still there who is left, and whatever learners those keep.
    """
    dying = {"fails_and_killed": ["killed"], "dies": ["dies"] * (n == 2)}
    every = [unlaunched(n, tmp_path, name, "sharded_ranks.py") for name, ends in dying.items() if ends]
    for processes in every:
        said = ended(processes)
        assert [process.returncode for process in processes] == [-9 if rank == 1 else 1 for rank in range(n)], said
    others = {*range(n)} - {1}
    told = [(tmp_path / f"fails_behind.{rank}.txt").read_text() for rank in range(n)]
    assert all("rank 1 failed: RuntimeError: no process group puts the disk out" in told[rank] for rank in others)
    assert told[1].startswith("RuntimeError: no process group puts the disk out")
    for name, there in ("fails_behind", {1, *others}), ("killed", others):
        assert [(tmp_path / f"{name} without.{rank}.txt").read_text() for rank in there] == ["[]"] * len(there)
    learn = sharded_ranks.learner(net(seed=9), run=tmp_path / "fails_behind", distributed=None, save_every="none")
    assert learn.restore("in flight").step == 6
    for name in sum(dying.values(), []):
        assert all("a rank was lost without a word" in (tmp_path / f"{name}.{rank}.txt").read_text() for rank in others)
        folder = tmp_path / name / "checkpoints"
        there = {p.name for p in folder.glob("ckpt-*")} - {"ckpt-000000012.parts.new"}  # litter, until somebody saves again
        assert there == {"ckpt-000000006.json", "ckpt-000000006.parts", "ckpt-000000006.pt"}
        learn = sharded_ranks.learner(net(seed=9), run=tmp_path / name, distributed=None, save_every="none")
        assert learn.restore("last").step == learn.step == 6


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


@pytest.mark.parametrize("n", [2, 4])
@pytest.mark.parametrize("precision, left_out", [("bf16", 0), ("fp16", 1)])
@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_narrow_types_over_ranks_are_those_of_one_process(runs, mode, precision, left_out, n):
    """Unequal parts of each joint batch; in fp16 (torch has its autocast on CPUs, too) with a scaler, and a step left out.

    The forward is that of one process, sample by sample. But a gradient is rounded to the narrow type once on each rank, and
    once in one process: by half of `eps` (0.4 % in bf16, 0.05 % in fp16) of itself, which is up to 0.3 % of the largest one here.
    What float32 computes is another 14 % away: errors that are a few roundings large come out otherwise.
    """
    every, (alone,) = found(runs, n, "narrow"), found(runs, 1, "narrow")
    (one, stepped), (full, _) = alone[mode, precision, precision], alone[mode, precision, "fp32"]
    largest = float(one.abs().max())
    assert len(every) == n and stepped.count(False) == left_out and largest > 0
    for mine, theirs in (r[mode, precision, precision] for r in every):
        assert theirs == stepped and float((mine - one).abs().max()) < 0.01 * largest
        assert float((mine - full).abs().max()) > 0.1 * largest


def test_what_parts_cannot_do_is_refused_by_name(runs):
    optimizer, compiled, clip, history, doctor, export, load, penalty = found(runs, 2, "refused")
    assert history.startswith("ValueError: HistoricalAverage and") and doctor.startswith("ValueError: Doctor and")
    assert "Adafactor takes means of rows and columns" in optimizer and "compile=" in compiled
    assert clip.startswith("ValueError: AdaptiveClip and distributed='fsdp'") and "trainkit export" in export
    assert "pretrained=" in load and "Distributed('fsdp', hold=True)" in penalty


def test_a_precision_that_only_the_launcher_was_told_of_is_named_where_the_learner_is_made(runs):
    ((words, where),) = found(runs, 2, "asked_for")[0]["bf16", "fp32"]
    assert "accelerate launch asked for bf16" in words and where == "ranks.py"


def test_an_older_torch_is_named(monkeypatch):
    from torch.distributed.fsdp import FSDPModule

    monkeypatch.delattr(FSDPModule, "set_reduce_scatter_unused_params")
    module = nn.Linear(2, 2)
    with pytest.raises(RuntimeError, match="needs torch 2.13 or newer"):
        Divided(module, None)
    assert type(module) is nn.Linear


@pytest.mark.parametrize("wrong, words", [({"checkpoint": "many"}, "accepted: 'single' and 'sharded'"),
                                          ({"mode": "ddp", "hold": True}, "are for sharded parameters")])  # fmt: skip
def test_settings_that_are_none(wrong, words):
    with pytest.raises(ValueError, match=words):
        Distributed(**{"mode": "fsdp", **wrong})
