"""Two and four ranks (gloo, real processes) do what one does with the joint batch; they stop, fail and come back together.

What the ranks do stands in ranks.py; every launch does many things, as starting torch is what takes the time.
"""
import functools
import os
import subprocess
import sys
import threading
import time
import warnings
import weakref
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch import nn

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
import ranks  # noqa: E402
from steered import until  # noqa: E402

from trainkit.attached import attach  # noqa: E402
from trainkit.distributed import Distributed, Parcel, as_distributed, pieces  # noqa: E402
from trainkit.launch import free_port  # noqa: E402
from trainkit.learner import Learner  # noqa: E402
from trainkit.ui.panel import Panel  # noqa: E402

EXACT = 1e-12  # float64: sums in another order
SAME = ["plain", "adamw", "accumulated", "random_samples", "batches_in_a_list", "unused", "gan_every", "gan_at_once",
        "gan_penalty", "frozen_turns", "looked", "averaged", "early", "steered", "calm"]  # fmt: skip
TOGETHER = ["cancels", "cancels_windows", "bad_steps"]
TWO = [*SAME, *TOGETHER, "whole_numbers", "norms", "gan_norms", "gan_gp", "stopped_by_one", "watched", "asked_for", "seldom",
       "saved", "follows", "resumed", "calm_resumed", "missing", "all_cancel", "refused"]  # fmt: skip
FOUR = ["plain", "accumulated", "gan_every", "gan_penalty", "looked", "early", "stopped_by_one", "steered", "calm_resumed",
        "whole_numbers", *TOGETHER, "saved", "resumed", "missing", "all_cancel"]  # fmt: skip


def environment(**more):
    own = {"OMP_NUM_THREADS": "1", "TRAINKIT_WHERE": "script", "PYTHONPATH": str(HERE.parent), "PYTHONWARNINGS": "ignore"}
    return {**os.environ, **own, **{key: str(value) for key, value in more.items()}}


def launch(n, folder, *names, script="ranks.py", **more):
    start = ["-m", "torch.distributed.run", "--nproc-per-node", str(n), "--master-port", str(free_port())] if n > 1 else []
    return subprocess.Popen([sys.executable, *start, str(HERE / script), str(folder), *names], env=environment(**more),
                            cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)  # fmt: skip


def finished(process, seconds=400):
    try:
        out, _ = process.communicate(timeout=seconds)
    except BaseException:
        process.terminate()  # not killed: torchrun ends its ranks
        process.communicate(timeout=60)
        raise
    assert process.returncode == 0, out[:3000] + out[-3000:]  # who failed says it first, torchrun last
    return out


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    "The folders of one, two and four ranks; two ranks' checkpoints are there for the others to go on with."
    one, two, four = (tmp_path_factory.mktemp(name) for name in ("one", "two", "four"))
    alone, both = launch(1, one, *SAME, *TOGETHER, "whole_numbers"), launch(2, two, *TWO)
    finished(alone), finished(both)
    for copy in one / "calm2", four / "calm":
        subprocess.run(["cp", "-r", str(two / "calm"), str(copy)], check=True)
    finished(launch(4, four, *FOUR))
    return {1: one, 2: two, 4: four}


def found(runs, n, name):
    return torch.load(runs[n] / f"{name}.pt", weights_only=False)


def apart(a, b):
    "The largest difference of two results' weights."
    return max(float((a["weights"][p][k] - b["weights"][p][k]).abs().max()) for p in a["weights"] for k in a["weights"][p])


def assert_one(every):
    "All ranks hold the same weights, optimizer state and history, to the bit."
    for other in every[1:]:
        assert apart(every[0], other) == 0 and other["history"] == every[0]["history"]
        for mine, theirs in zip(every[0]["opt"], other["opt"]):
            for key, kept in mine["state"].items():
                assert all(torch.equal(torch.as_tensor(v), torch.as_tensor(theirs["state"][key][k])) for k, v in kept.items())


# ------------------------------------------------------------------------------------------------------ one joint batch


@pytest.mark.parametrize("n, name", [*((2, name) for name in SAME), *((4, name) for name in FOUR if name in SAME)])
def test_ranks_do_what_one_process_does_with_the_joint_batch(runs, n, name):
    every, (alone,) = found(runs, n, name), found(runs, 1, name)
    assert len(every) == n
    assert_one(every)
    assert apart(every[0], alone) < EXACT
    for key in ("step", "epoch", "state"):
        assert every[0][key] == alone[key]
    assert every[0]["history"].keys() == alone["history"].keys()
    for series, (steps, values) in alone["history"].items():
        assert every[0]["history"][series][0] == steps
        torch.testing.assert_close(torch.tensor(every[0]["history"][series][1]), torch.tensor(values), rtol=0, atol=1e-5)


def test_a_schedule_follows_what_rank_0_sees(runs):
    "Of a series in which only rank 1 makes progress."
    every = found(runs, 2, "follows")
    assert_one([{**told, "history": {}} for told in every])
    assert [told["lr"] for told in every] == [0.0125, 0.0125]  # as the first epoch is the best: halved behind three


def test_two_machines_do_what_one_does(runs, tmp_path):
    "Two launchers that meet at an address, as on two machines; each starts one rank."
    meet = ["--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{free_port()}"]
    start = [sys.executable, "-m", "torch.distributed.run", *meet, str(HERE / "ranks.py"), str(tmp_path), "plain"]
    both = [subprocess.Popen(start, env=environment(), cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            for _ in range(2)]  # fmt: skip
    for process in both:
        finished(process)
    every = torch.load(tmp_path / "plain.pt", weights_only=False)
    assert len(every) == 2 and apart(every[0], found(runs, 2, "plain")[0]) == 0


@pytest.mark.parametrize("n", [2, 4])
def test_connections_are_closed_before_the_interpreter_ends(runs, n):
    "Or a thread of gloo that asks for the interpreter then aborts the process, and the launcher ends those still at work."
    assert [(runs[n] / f"connected.{rank}.txt").read_text() for rank in range(n)] == ["False"] * n


@pytest.mark.parametrize("n", [2, 4])
def test_where_sums_are_exact_so_are_the_weights(runs, n):
    (alone,) = found(runs, 1, "whole_numbers")
    assert apart(found(runs, n, "whole_numbers")[0], alone) == 0 and float(alone["weights"]["model"]["weight"].abs().sum()) > 0


def test_the_loss_of_one_shard_is_not_the_joint_one(runs):
    "What is recorded is the joint batch's: so it must differ from what rank 0 saw alone."
    saved = found(runs, 2, "saved")
    assert saved[0]["noise"] != saved[1]["noise"]  # what the ranks computed
    assert saved[0]["history"] == saved[1]["history"]  # what they say


def test_gradients_that_wait_stay_at_home(runs):
    "A turn without a step sends a few numbers; the gradients travel once a step."
    sent = found(runs, 2, "accumulated")[0]["sent"]
    grew = [(b[1] - a[1], b[2]) for a, b in zip(sent, sent[1:])]
    gradients = 8 * sum(p.numel() for p in ranks.net().parameters())
    assert {stepped for _, stepped in grew} == {True, False}
    assert all(more < 200 for more, stepped in grew if not stepped)
    assert all(gradients < more < gradients + 400 for more, stepped in grew if stepped)


@pytest.mark.parametrize("name", ["norms", "gan_norms"])
def test_running_statistics_are_one_and_everybodys(runs, name):
    every = found(runs, 2, name)
    assert_one(every)
    stats = [v for p in every[0]["weights"].values() for k, v in p.items() if "running" in k]
    assert stats and all(v.isfinite().all() and v.abs().sum() > 0 for v in stats)


def test_an_average_counts_each_step_once(runs):
    every, (alone,) = found(runs, 2, "averaged"), found(runs, 1, "averaged")
    for mine in every:
        assert mine["counts"] == alone["counts"] == {"model": 12}
        assert all((mine["averages"][k] - v).abs().max() < EXACT for k, v in alone["averages"].items())


@pytest.mark.parametrize("n", [2, 4])
def test_everything_is_looked_at_once(runs, n):
    "Each rank has what one process finds: predictions in order, metrics with and without a state, an epoch's own score."
    (alone,) = found(runs, 1, "looked")
    assert alone["predicted"].shape == (13, 1) and alone["again"]["valid/n"] == 4
    assert torch.equal(torch.cat(alone["seen"]), alone["predicted"])
    assert sum(len(pred) for mine in found(runs, n, "looked") for pred in mine["seen"]) == 13
    for mine in found(runs, n, "looked"):
        torch.testing.assert_close(mine["predicted"], alone["predicted"], rtol=0, atol=EXACT)
        for what in "tested", "again":
            assert mine[what].keys() == alone[what].keys()
            assert all(abs(mine[what][k] - v) < 1e-6 for k, v in alone[what].items())


# ------------------------------------------------------------------------------------------------------------ together


@pytest.mark.parametrize("n", [2, 4])
def test_what_one_rank_wishes_all_do_at_the_same_step(runs, n):
    assert {(r["step"], r["state"]) for r in found(runs, n, "stopped_by_one")} == {(4, "stopped")}


@pytest.mark.parametrize("n", [2, 4])
def test_early_stopping_ends_all(runs, n):
    every = found(runs, n, "early")
    assert len(every) == n and {(r["step"], r["epoch"], r["state"]) for r in every} == {(18, 3, "stopped")}


@pytest.mark.parametrize("n", [2, 4])
def test_commands_act_on_all_ranks_before_the_same_step(runs, n):
    every, (alone,) = found(runs, n, "steered"), found(runs, 1, "steered")
    for mine in every:
        assert mine["rates"] == alone["rates"] and mine["asked"] == alone["asked"]
    assert {0.1, 0.01} == {rate for _, rate in alone["rates"]} and ("restore", 2, "") in alone["asked"]


def test_only_rank_0_writes(runs):
    files = found(runs, 2, "steered")[0]["files"]
    assert {"checkpoints", "history.jsonl", "journal.jsonl"} <= set(files)
    lines = [line for line in found(runs, 2, "saved")[0]["lines"] if "train/loss" in line]
    assert len(lines) == len({*lines}) == 18  # two writers would have written everything twice


@pytest.mark.parametrize("where", ["script", "notebook"])
def test_only_rank_0_shows_anything(runs, where):
    "Lines, pictures, tables, views and writers of trainkit and of somebody's own: rank 1 has none, says nothing, has no folder."
    first, second = (told[where] for told in found(runs, 2, "watched"))
    assert second == {"views": [], "said": "", "told": [], "files": None}
    assert {"Noting", "Picture", "EpochFile", "Progress"} <= {*first["views"]} and "a picture of epoch 1" in first["said"]
    assert len(first["said"].splitlines()) > 4 + 3  # its own lines, besides the pictures'
    assert first["told"].count("begin") == first["told"].count("finished") == 2 and "train/loss" in first["told"]
    assert {"epochs.csv", "history.jsonl", "journal.jsonl", "checkpoints"} <= {*first["files"]}


def test_a_precision_that_only_the_launcher_was_told_of_is_named_once(runs):
    first, second = found(runs, 2, "asked_for")
    ((words, where),) = first.pop(("bf16", "fp32"))
    assert "accelerate launch asked for bf16" in words and "the learner computes in fp32: pass precision='bf16'" in words
    assert where == "ranks.py" and not any(first.values()) and not any(second.values()) and len(second) == 4


def test_councils_are_rare(runs):
    "Two at each epoch's end here, and some between; not one a step."
    every = found(runs, 2, "seldom")
    assert len({r["step"] for r in every}) == 1 and every[0]["state"] == "stopped" and every[0]["step"] >= 300
    assert every[0]["councils"] < 0.6 * every[0]["step"]


# --------------------------------------------------------------------------------------------------------- coming back


@pytest.mark.parametrize("n", [2, 4])
def test_resumed_by_as_many_ranks_nothing_has_changed(runs, n):
    "Dropout, a window of gradients that is open, an average, a schedule: to the bit."
    (through, *_), back = found(runs, n, "saved"), found(runs, n, "resumed")
    assert back[0]["start"] == 8 and through["step"] == back[0]["step"] == 18
    assert_one(back)
    assert apart(through, back[0]) == 0 and through["history"] == back[0]["history"]


@pytest.mark.parametrize("n, atol", [(2, 0.0), (4, EXACT)])
def test_resumed_by_another_number_of_ranks(runs, n, atol):
    back = found(runs, n, "calm_resumed")
    assert_one(back)
    assert apart(found(runs, 2, "calm")[0], back[0]) <= atol and back[0]["step"] == 18


def test_resumed_by_a_learner_that_knows_nothing_of_ranks(runs):
    learn = ranks.learner(ranks.net(seed=9), run=runs[1] / "calm2", accumulate=3, distributed=None, keep="all", save_every="none",
                          opt=ranks.OptimBuilder("sgd", lr=0.1, momentum=0.9))  # fmt: skip
    assert type(learn) is Learner
    learn.restore(8)
    learn.fit()
    assert apart(found(runs, 2, "calm")[0], ranks.told_alone(learn)) < EXACT


@pytest.mark.parametrize("n", [2, 4])
def test_what_rank_0_cannot_read_nobody_restores(runs, n):
    first, *others = (r["words"] for r in found(runs, n, "missing"))
    assert others == [first] * (n - 1) and "there is no checkpoint 'never saved'" in first[0] and first[1] == "restored"


# --------------------------------------------------------------------------------------------------------------- apart


def test_what_cannot_go_together_is_refused_by_name(runs):
    for words in found(runs, 2, "refused"):
        parameters, sampler, background, batches, length, content, valid, order, validated = words
        assert parameters.startswith("RankError: the ranks differ in the parameters") and "(2, 3)" in parameters
        assert sampler.startswith("ValueError: the train loader has a DistributedSampler")
        assert "attach(run)" in background
        assert "the ranks differ in the batches" in batches
        assert "in their train data: rank 0: '22 samples in 6 batches of 4'; rank 1: '21 samples" in length
        assert "in the first and the last sample of their train data" in content
        assert "in their valid data: rank 0: '8 samples in 2 batches of 4'" in valid
        assert "in the samples that an epoch begins with" in order and "in the loader 'valid'" in validated


@pytest.mark.parametrize("n", [2, 4])
def test_what_one_rank_cancels_all_cancel_at_the_same_step(runs, n):
    "At every place: the ranks do what one process does that cancels there, whether one of them wants it or all."
    every, one = found(runs, n, "cancels"), found(runs, 1, "cancels")
    assert len(one) > 35 and (every.keys() == one.keys() if n == 2 else {*every} < {*one} and len(every) > 12)
    for where, (alone,) in ((where, one[where]) for where in every):
        assert_one(every[where])
        assert len(every[where]) == n and apart(every[where][0], alone) < EXACT, where
        for key in ("step", "epoch", "state", "updates"):
            assert {mine[key] for mine in every[where]} == {alone[key]}, where
        for series, (steps, _) in alone["history"].items():
            assert every[where][0]["history"][series][0] == steps, (where, series)


@pytest.mark.parametrize("n", [2, 4])
def test_what_one_rank_cancels_in_a_window(runs, n):
    "With simultaneous updates as in one process; a window in which only one rank has cancelled is dropped by all."
    every, one = found(runs, n, "cancels_windows"), found(runs, 1, "cancels_windows")
    assert every.keys() == one.keys() if n == 2 else {*every} < {*one} and len(every) == 10
    for where, (alone,) in ((where, one[where]) for where in every):
        assert_one(every[where])
        dropped = where[0] == "accumulated" and not where[-1]
        assert all(mine["step"] == alone["step"] and mine["state"] == alone["state"] for mine in every[where])
        assert dropped or apart(every[where][0], alone) < EXACT, where
        if dropped:
            assert 1 <= every[where][0]["updates"] <= alone["updates"], where


@pytest.mark.parametrize("n", [2, 4])
def test_a_step_that_is_bad_on_one_rank_is_bad(runs, n):
    "An infinite loss with a finite gradient, of one sample: every rank leaves out the step."
    every, one = found(runs, n, "bad_steps"), found(runs, 1, "bad_steps")
    for accumulate, (alone,) in one.items():
        assert_one(every[accumulate])
        assert [mine["skipped"] for mine in every[accumulate]] == [alone["skipped"]] * n and sum(alone["skipped"].values()) == 2
        assert apart(every[accumulate][0], alone) < EXACT


def test_the_usual_gradient_penalty_over_ranks(runs):
    "Its places are each rank's own; what comes of it is everybody's."
    every = found(runs, 2, "gan_gp")
    assert_one(every)
    steps, values = every[0]["history"]["train/discriminator/gradient_penalty"]
    assert len(steps) == 12 and all(0 < value < 1e3 for value in values)


PARTED = {"alone_saves": ("rank 0 in save(), as gradients wait for more turns", "the end of step 2"),
          "alone_validates": ("rank 0 in before_validate", "the end of step 3"),
          "others_do": ("rank 0 in comparing their train data", "before_predict"),
          "freezes": ("rank 1 in the turn of 'model', after step 3 (248 bytes)", "the turn of 'model', after step 3 (512 bytes)"),
          "ends_early": ("rank 1 in after_epoch", "the turn of 'model', after step 4"),
          "turns_alone": ("rank 1 in the command set, which failed with OSError: rank 1 has no such file",
                          "the command set")}  # fmt: skip


@pytest.mark.parametrize("n", [2, 4])
def test_ranks_that_would_wait_for_each_other_end_by_name(tmp_path, n):
    "Each mistake ends all ranks within seconds, with a message that names both places."
    finished(launch(n, tmp_path, "endings"))
    both = [torch.load(tmp_path / f"endings.{rank}.pt", weights_only=False) for rank in range(n)]
    for words in both:
        assert max(seconds for _, seconds in words.values()) < 60  # the timeout is 600
    for name, (culprit, place) in PARTED.items():
        for rank, words in enumerate(both):
            said, other = words[name][0], max(rank, 1) if culprit.startswith("rank 0") else 0 if rank < 2 else rank
            assert said.startswith("RankError: ") and "the ranks are in different calls" in said, said
            assert culprit in said and f"rank {other} in {place}" in said, said
    for words in both:
        assert "the ranks have parted: rank 0 stands at" in words["drifts"][0] and "'lr': {'model': [0.0" in words["drifts"][0]
        assert "after step 3: the ranks tell different losses, this one squared" in words["tells_more"][0]
        assert "41 loss terms" in words["tells_much"][0] and "up to 30 are put together" in words["tells_much"][0]
    told = {"interrupted_looking": (1, "KeyboardInterrupt"), "interrupted_twice": (1, "KeyboardInterrupt"),
            "too_few": (n - 1, "ValueError: Expected more than 1 value per channel")}  # fmt: skip
    for name, (culprit, text) in told.items():
        for rank, words in enumerate(both):
            heard = text if rank == culprit else f"RankError: rank {rank} can't go on: rank {culprit} failed: {text}"
            assert words[name][0].startswith(heard), words[name]
    assert f"batch norm needs two samples on each rank: batches of at least {2 * n}" in both[0]["too_few"][0]


def test_layers_that_ranks_cannot_train_are_refused_by_name():
    net = nn.Sequential(nn.Linear(3, 4), nn.SyncBatchNorm(4), nn.Linear(4, 1))
    learn = Learner(net.double(), ranks.loader(), "mse", "sgd", device="cpu", front="none", distributed="ddp")
    with pytest.raises(ValueError, match="1 is a SyncBatchNorm, which torch has for GPUs only"):
        learn.fit(1)
    learn = Learner(nn.Embedding(3, 1, sparse=True), ranks.loader(), "mse", "sgd", device="cpu", front="none", distributed="ddp")
    learn._check_layers()  # alone, there is nobody to send anything to
    learn.team.size = 2
    with pytest.raises(ValueError, match="Embedding with sparse=True, and between ranks only dense gradients travel"):
        learn._check_layers()
    learn.players[0].named_parameters().__next__()[1].grad = torch.zeros(3, 1).to_sparse()
    with pytest.raises(ValueError, match="the gradient of weight is sparse"):
        learn._travelling(learn.players[0])


@pytest.mark.parametrize("loss", [nn.MSELoss(reduction="sum"), functools.partial(nn.functional.mse_loss, reduction="sum")])
def test_losses_that_are_sums_are_refused_by_name(loss):
    learn = Learner(ranks.net(), ranks.loader(), loss, "sgd", device="cpu", front="none", distributed="ddp")
    with pytest.raises(ValueError, match="player 'model': (MSELoss|partial) sums over its samples.*reduction='mean'"):
        learn._check_losses(learn.players[0])


@pytest.mark.parametrize("loss, warned", [
    (nn.CrossEntropyLoss(weight=torch.ones(3)), True), (nn.NLLLoss(ignore_index=0), True), (nn.CrossEntropyLoss(), False),
    (functools.partial(nn.functional.kl_div, reduction="batchmean"), False)])  # fmt: skip
def test_losses_that_divide_by_their_own_weights_are_told_of(loss, warned):
    learn = Learner(nn.Linear(3, 3), ranks.loader(), loss, "sgd", device="cpu", front="none", distributed="ddp")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        learn._check_losses(learn.players[0])
    assert ["divides by the weights of its own rank's targets" in str(w.message) for w in said] == [True] * warned


def test_signals_are_put_back_on_every_rank(monkeypatch):
    "The listeners of a rank that nobody listens to are closed all the same."
    import signal

    before = signal.getsignal(signal.SIGUSR1)
    learn = ranks.learner(distributed="ddp", signals="SIGUSR1=save")
    monkeypatch.setattr(type(learn.team), "together", property(lambda team: False))
    learn.team.rank = 1
    learn.fit(1)
    assert signal.getsignal(signal.SIGUSR1) is before


@pytest.mark.parametrize("n", [2, 4])
def test_a_turn_that_nobody_makes_is_no_fault(runs, n):
    every = found(runs, n, "all_cancel")
    assert_one(every)
    assert every[0]["state"] == "finished" and 3 not in every[0]["history"]["train/loss"][0]


def unlaunched(n, folder, name, script="ranks.py"):
    "Without a launcher, which would end the others by force."
    among = {"WORLD_SIZE": n, "LOCAL_WORLD_SIZE": n, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    start = [sys.executable, str(HERE / script), str(folder), name]
    return [subprocess.Popen(start, env=environment(RANK=rank, LOCAL_RANK=rank, **among), cwd=folder, stderr=subprocess.PIPE,
                             text=True) for rank in range(n)]  # fmt: skip


def ended(processes, seconds=300):
    "What each has said on stderr, once all have ended; nobody stays behind who hasn't."
    try:
        return [process.communicate(timeout=seconds)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()


@pytest.mark.parametrize("n", [2, 4])
def test_one_end_is_everybodys(tmp_path, n):
    "The others end by themselves: with the words of the rank that failed, and where one was killed, because it is gone."
    every = unlaunched(n, tmp_path, "fails_and_killed")
    said = ended(every)
    assert [process.returncode for process in every] == [-9 if rank == 1 else 1 for rank in range(n)], said
    ends = {"fails": "rank 1 failed: ValueError: the disk is on fire", "killed": "a rank was lost without a word (killed"}
    for name, words in ends.items():
        for rank in {*range(n)} - {1}:
            told = (tmp_path / f"{name}.{rank}.txt").read_text()
            assert told.startswith(f"RankError: rank {rank} can't go on: ") and words in told, said[rank][-2000:]


@pytest.mark.parametrize("name, words", [
    ("fails", "the disk is on fire"), ("searches", "Probe and several ranks: lr_find judges each rate by the loss at hand"),
    ("balances", "BoundaryEquilibrium and several ranks: BEGAN balances by the energies at hand")])  # fmt: skip
def test_a_launcher_tells_whose_fault_it_was(tmp_path, name, words):
    process = launch(2, tmp_path, name)
    out, _ = process.communicate(timeout=300)
    assert process.returncode != 0 and f"ValueError: {words}" in out


def at_work(folder):
    "The processes that run ranks.py in this folder, by their numbers."
    found = set()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            said = path.read_bytes().split(b"\0")
            found |= {int(path.parent.name)} if {str(HERE / "ranks.py").encode(), str(folder).encode()} <= {*said} else set()
        except OSError:  # it has ended meanwhile
            pass
    return found


def test_a_launched_job_is_steered_through_its_folder(tmp_path):
    process = launch(2, tmp_path, "endless")
    try:
        end = time.monotonic() + 200
        while not (tmp_path / "endless" / "status.json").exists():
            assert time.monotonic() < end and process.poll() is None, process.communicate()[0][-2000:]
            time.sleep(0.1)
        assert len(at_work(tmp_path)) >= 2
        run = attach(tmp_path / "endless")
        panel = Panel(run)
        assert panel.widget is not None  # as a notebook shows it
        panel.view.buttons.made["pause"].click()
        until(lambda: run.status()["paused"])
        dial, = (dial for (_, name, *_), dial in panel.view.deck.dials.items() if name == "lr")
        dial.field.value = "0.05"
        until(lambda: [c.values for c in run.controls() if c.name == "lr"] == [(0.05,)])
        panel.refresh()
        assert "lr of model: 0.1 → 0.05" in panel.view.message.text, panel.view.message.text
        panel.close()
        run.send("set", name="lr", value=0.025).wait(120)
        saved = run.save("before it goes on")
        assert run.status()["paused"] and saved.step == run.status()["step"]
        by_hand = subprocess.run([sys.executable, "-m", "trainkit.control", str(tmp_path / "endless"), "set", "lr=0.0125"],
                                 capture_output=True, text=True, env=environment())  # fmt: skip
        assert by_hand.returncode == 0, by_hand.stderr
        with pytest.raises(Exception, match="unknown knob 'no_such_knob'"):
            run.send("set", name="no_such_knob", value=1.0).wait(120)
        run.send("resume").wait(120)
        run.send("stop").wait(120)
        finished(process)
    finally:
        process.terminate()  # not killed: torchrun ends its ranks
        process.wait(60)
    both = torch.load(tmp_path / "endless.pt", weights_only=False)
    assert_one(both)
    assert {r["lr"] for r in both} == {0.0125} and {r["state"] for r in both} == {"stopped"}
    assert both[0]["changed"] == both[1]["changed"] == [(saved.step, 0.0125)]  # the next step after the pause, on both
    assert not at_work(tmp_path), "a rank has outlived its launcher"


# --------------------------------------------------------------------------------------------------------- one process


def test_whoever_asks_for_nothing_gets_nothing():
    script = "import sys, torch; from trainkit.learner import Learner; Learner(torch.nn.Linear(1, 1), front='none'); " \
             "print([m for m in ('accelerate', 'trainkit.distributed', 'trainkit.team') if m in sys.modules])"  # fmt: skip
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=HERE.parent)
    assert out.stdout.strip() == "[]", out.stderr


def test_launched_alone_it_is_the_learner_it_would_have_been(tmp_path):
    def weights(**kw):
        learn = ranks.learner(ranks.net(drop=0.3), **kw)
        learn.fit(2)
        return learn

    a, b = weights(run=tmp_path / "a"), weights(run=tmp_path / "b", distributed=None)
    assert type(a).__name__ == type(b).__name__ == "Learner" and a.rank == 0
    assert apart(ranks.told_alone(a), ranks.told_alone(b)) == 0
    assert repr(a).splitlines()[:-1] == repr(b).splitlines()[:-1]


@pytest.mark.parametrize("wrong, error, words", [("fsdp2", ValueError, "accepted: 'ddp'"), (2, TypeError, "received int"),
                                                 (nn.Linear(1, 1), TypeError, "received Linear")])  # fmt: skip
def test_other_ways_are_refused(wrong, error, words):
    with pytest.raises(error, match=words):
        Learner(nn.Linear(3, 1), distributed=wrong, front="none")
    assert as_distributed(False) is None


def test_strange_numbers_are_refused():
    for kw in ({"listen_every": -1}, {"timeout": 0}, {"bucket": 0}):
        with pytest.raises(ValueError, match="received Distributed"):
            Distributed(**kw)


def test_a_parcel_gives_back_what_was_put_in():
    generator = torch.Generator().manual_seed(0)
    shapes, kinds = [(3,), (2, 5), (), (4, 1, 2)], [torch.float32, torch.float64, torch.bfloat16]
    for most in (1, 64, 2**20):
        tensors = [torch.randn(s, generator=generator).to(kind) for s in shapes for kind in kinds]
        before = [t.clone() for t in tensors]
        parcel = Parcel(tensors, 4.0, torch.arange(3.0), most)
        assert parcel.open().tolist() == [0, 1, 2]
        parcel.unpack(torch.tensor(4.0))
        assert all(torch.equal(a, b) for a, b in zip(tensors, before))
        assert all(len({t.dtype for t in group}) == 1 and (len(group) == 1 or sum(t.nbytes for t in group) <= most)
                   for group in pieces(tensors, most))  # fmt: skip


def test_without_accelerate_it_says_what_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(ImportError, match="pip install accelerate"):
        Learner(nn.Linear(3, 1), distributed="ddp", front="none")


def test_a_word_reaches_whoever_waits():
    "The store is all that is needed to tell who failed: with threads in the place of ranks."
    from trainkit.team import Talking

    store = torch.distributed.HashStore()
    teams = [Talking(cpu=True) for _ in range(2)]
    for rank, team in enumerate(teams):
        team.rank, team.size, team.store = rank, 2, store
    teller = threading.Thread(target=teams[1].fail, args=("ValueError: no data",))
    teller.start()
    error = teams[0].lost(RuntimeError("Connection closed by peer"))
    teller.join()
    assert "rank 0 can't go on: rank 1 failed: ValueError: no data" in str(error)
    assert str(teams[0].lost(RuntimeError("again"))) == str(error)


def test_who_hears_of_an_end_lets_go_of_what_the_failed_call_holds():
    "Or a third rank, which waits for this one, would hear of it seconds later."
    from trainkit.team import Talking

    class Connection:
        pass

    def connect():
        connection = Connection()
        seen.append(weakref.ref(connection))
        raise RuntimeError("Connection closed by peer")

    def call():
        try:
            connect()
        except RuntimeError as error:
            raise RuntimeError("the ranks have parted") from error

    team, seen, held = Talking(cpu=True), [], []
    team.size, team.store = 1, torch.distributed.HashStore()
    team.store.set("trainkit/failed", "rank 2 failed: ValueError: no data")
    team._leave = lambda: held.append(seen[0]() is not None)
    try:
        call()
    except RuntimeError as error:
        team._leave()
        assert "rank 2 failed" in str(team.lost(error))
    assert held == [True, False]


def test_a_rank_that_is_in_another_call_and_says_nothing_is_not_waited_for(monkeypatch):
    "It was cut off, or killed, at this moment."
    from trainkit.team import Checked, RankError

    team = Checked(cpu=True)
    team.size, team.store, team.PATIENCE = 2, torch.distributed.HashStore(), timedelta(milliseconds=10)

    def all_gather(found, mine):
        for theirs, head in zip(found, (mine, mine + (1 << 32))):
            theirs.copy_(head)

    monkeypatch.setattr(torch.distributed, "all_gather", all_gather)
    monkeypatch.setattr(team, "fail", lambda why, word="": None)
    with pytest.raises(RankError, match="rank 1 in another call, of which it has said nothing, rank 0 in a test"):
        team.numbers(0, "a test")
