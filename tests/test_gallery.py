"Thumbnails, and the gallery that shows them: what is shown is what lies on the disk, and no button does harm."
import gc
import html as html_
import io
import json
import math
import os
import re
import subprocess
import sys
import threading
import warnings
import weakref
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from ways import resumes

from trainkit.callback import On
from trainkit.checkpoint import CheckpointError, Checkpoints, Entry
from trainkit.gan.learner import GANLearner
from trainkit.history import History
from trainkit.learner import Learner
from trainkit.ui.gallery import Board, Controls, Keeper, gallery, show
from trainkit.ui.sheet import chosen, differences, fields_of, first_best, more, ordered, paged, plain_json, whole_page
from trainkit.ui.thumbnails import MOST_BYTES, Thumbnails, encode_png, shrink, thumbnail_of

Image = pytest.importorskip("PIL.Image")


def decoded(png):
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


# ---- thumbnails

@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from(["noise", "flat", "ramp", "grey"]), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_png_is_what_was_given(h, w, kind, seed):
    rng = np.random.default_rng(seed)
    pixels = {"noise": rng.integers(0, 256, (h, w, 3)), "flat": np.full((h, w, 3), seed),
              "grey": rng.integers(0, 256, (h, w, 1)) + [0] * 3,
              "ramp": np.add.outer(np.arange(h) * 7, np.arange(w) * 3)[..., None] + [0, 1, 2]}[kind].astype(np.uint8)
    np.testing.assert_array_equal(decoded(encode_png(pixels)), pixels)


def test_png_is_about_as_small_as_others_make_it():
    waves = (127 + 127 * np.sin(np.add.outer(np.arange(128) / 9, np.arange(128) / 5)))[..., None].repeat(3, 2).astype(np.uint8)
    out = io.BytesIO()
    Image.fromarray(waves[..., 0]).save(out, "PNG", optimize=True)
    assert len(encode_png(waves)) < 1.3 * len(out.getvalue())


def test_shrinking_is_the_mean():
    images = np.random.default_rng(0).integers(0, 256, (3, 96, 64, 3), np.uint8)
    expected = nn.functional.avg_pool2d(torch.from_numpy(images).permute(0, 3, 1, 2).double(), 3).permute(0, 2, 3, 1).numpy()
    assert np.abs(shrink(images, 32) - expected).max() <= 0.51
    assert shrink(images, 96) is images and shrink(images, 50).shape == (3, 48, 32, 3)


@pytest.mark.parametrize("images", [torch.rand(64, 1, 28, 28), torch.rand(64, 3, 32, 32) * 2 - 1, torch.rand(3, 3, 256, 256),
                                    torch.rand(1, 1, 8, 8), np.zeros((900, 1400, 3), np.uint8), torch.rand(64, 3, 300, 20),
                                    np.random.default_rng(0).integers(0, 256, (512, 512, 3), np.uint8), torch.rand(500, 16, 16)])
def test_thumbnails_are_small_pngs(images):
    png = thumbnail_of(images)
    height, width, _ = decoded(png).shape
    assert len(png) <= MOST_BYTES and 1 <= min(height, width) and max(height, width) <= 640
    assert len(thumbnail_of(images, most=900)) <= 900 or max(decoded(thumbnail_of(images, most=900)).shape[:2]) <= 11


def gan(run=None, **kw):
    torch.manual_seed(0)
    generator = nn.Sequential(nn.Linear(4, 64), nn.BatchNorm1d(64), nn.Dropout(0.1), nn.Tanh(), nn.Unflatten(1, (1, 8, 8)))
    discriminator = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 1), nn.Flatten(0))
    data = torch.rand(32, 1, 8, 8) * 2 - 1
    kw = {"batch_size": 8, "seed": 3, "front": "none", "save_every": 2} | kw
    return GANLearner(generator, discriminator, data, latent=4, n_samples=16, run=run, **kw)


def trained(learn, steps=6, look=None):
    learn.fit(steps=steps)
    modules = [m for player in learn.players for m in player.modules.values()]
    return torch.cat([p.detach().flatten() for m in modules for p in m.state_dict().values()])


def test_a_thumbnail_leaves_no_trace_in_the_training():
    pictures, rates = [], []
    look = On("after_batch", lambda learn: pictures.append(Thumbnails().thumbnail(learn)))
    mode = On("after_batch", lambda learn: rates.append([m.training for m in learn.modules()]))
    watched = trained(gan(cbs=[look, mode]))
    after = torch.rand(3)
    unwatched = trained(gan())
    assert torch.equal(watched, unwatched) and torch.equal(after, torch.rand(3))
    assert len(pictures) == 6 and all(decoded(p).shape == (37, 37, 3) for p in pictures) and len({*pictures}) == 6
    assert all(all(modes) for modes in rates)


def test_checkpoints_carry_the_samples_of_their_step(tmp_path):
    learn = gan(tmp_path / "run", cbs=[Thumbnails()], keep_best=0)
    learn.fit(steps=6)
    newest = learn.checkpoints.find("last")
    assert newest.thumbnail == thumbnail_of(learn.sample_fixed())
    assert len({e.thumbnail for e in learn.checkpoints}) == len(learn.checkpoints) == 3
    data = torch.rand(16, 2), torch.rand(16, 1)
    plain = Learner(nn.Linear(2, 1), data, "mse", cbs=[Thumbnails()], run=tmp_path / "other", front="none")
    plain.fit(epochs=1)
    assert plain.checkpoints.find("last").thumbnail is None  # nothing to see, and nobody said what


def test_a_resumed_run_with_thumbnails_is_exact(tmp_path):
    resumes(lambda run: gan(run, cbs=[Thumbnails()]), tmp_path, steps=8, at=(1, 5))


def test_a_failing_source_costs_no_checkpoint(tmp_path):
    learn = gan(tmp_path / "run", cbs=[Thumbnails(lambda learn: learn.nothing)])
    with pytest.warns(UserWarning, match="without thumbnails: AttributeError") as caught: learn.fit(steps=4)
    assert len([w for w in caught if "thumbnails" in str(w.message)]) == 1
    assert len(learn.checkpoints) == 2 and learn.step == 4


def test_sources_of_thumbnails():
    class Points:
        players = ()
        def sample_fixed(self): return torch.rand(9, 2)

    assert Thumbnails().thumbnail(Points()) is None
    picture = np.full((20, 30, 3), 7, np.uint8)
    np.testing.assert_array_equal(decoded(Thumbnails(lambda learn: picture).thumbnail(Points())), picture)
    assert Thumbnails(lambda learn: None).thumbnail(Points()) is None
    with pytest.warns(UserWarning, match="ValueError"): assert Thumbnails(lambda learn: torch.rand(3)).thumbnail(Points()) is None
    with pytest.raises(TypeError, match="function learner -> images"): Thumbnails(3)
    def interrupt(learn): raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): Thumbnails(interrupt).thumbnail(Points())


# ---- what is shown

def png(seed=0, size=40):
    return encode_png(np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8))


@pytest.fixture
def store(tmp_path):
    store = Checkpoints(tmp_path / "runs" / "faces" / "checkpoints", keep=None)
    for step, loss in ((100, 0.9), (200, 0.3), (300, 0.5), (300, math.nan)):
        info = {"epoch": step // 100, "metrics": {"train/loss": loss, "valid/loss": loss, "lr/model": 0.1, "valid/acc": 1 - loss},
                "score": loss, "mode": "min", "note": "<script>alert(1)</script>" if step == 100 else "",
                "parent": str(step - 100) if step > 100 else ""}
        store.save({"x": torch.zeros(3)}, step, info, thumbnail=png(step))
    return store


def ids(entries): return [e.id for e in entries]


@given(st.lists(st.one_of(st.none(), st.floats(allow_nan=True), st.floats(0, 1)), min_size=1, max_size=9), st.booleans())
@settings(max_examples=60, deadline=None)
def test_sorting_by_a_column(losses, down):
    entries = [Entry(str(i), i, Path(f"{i}"), i, 1.0, 1, {} if v is None else {"metrics": {"train/loss": v}})
               for i, v in enumerate(losses)]
    field = next((f for f in fields_of(entries) if f.name == "train/loss"), None)
    if field is None:
        assert all(v is None for v in losses)
        return
    got = [losses[e.step] for e in ordered(entries, field, down)]
    numbers = [v for v in losses if v is not None and not math.isnan(v)]
    assert got[: len(numbers)] == sorted(numbers, reverse=down)
    assert all(v is None or math.isnan(v) for v in got[len(numbers):]) and len(got) == len(losses)


def test_columns(store):
    entries = store.list()
    assert [f.name for f in fields_of(entries)] == ["checkpoint", "epoch", "valid/loss", "valid/acc", "train/loss", "score", "MB",
                                                    "saved", "parent", "note"]
    metrics = {f"train/{n}": 1.0 for n in "abcdefgh"} | {"valid/x": 1, "train/loss": 2}
    many = Entry("1", 1, Path("x"), 0, 1.0, 1, {"metrics": metrics})
    assert chosen([many]) == ["valid/x", "train/loss", "train/a", "train/b", "train/c"]
    assert ids(first_best(entries)) == ["200", "300-1", "300", "100"]


@pytest.mark.parametrize("info", [{"metrics": 3}, {"metrics": {"a": "b", "c": None, "d": True}}, {"epoch": "x", "note": ["<b>"]},
                                  {"score": "good"}, {"score": math.inf, "metrics": {"a": math.inf}}, {"parent": {"a": 1}}])
def test_odd_descriptions(store, info, tmp_path, monkeypatch):
    first, *others = store.list()
    monkeypatch.setattr(store, "list", lambda: [replace(first, info=info), *others])
    shown = gallery(store)
    assert "300-1" in shown.text() and "<b>" not in shown.html()
    json.loads(data_of(shown.save(tmp_path / "x.html").read_text()))
    differences(*store.list()[:2])


def test_differences_are_of_the_second_to_the_first(store):
    rows = {row[0]: row[1:] for row in differences(*store.list()[:2])}
    assert rows["step"] == ("100", "200", "+100 (+100.0%)") and rows["train/loss"][2] == "−0.6000 (−66.7%)"
    assert rows["lr/model"][2] == "=" and "valid/acc" in rows
    assert [more(1.0, math.nan), more(math.inf, 1.0), more(0, 1)] == ["", "", "+1"]


class Check(HTMLParser):
    "Every element is closed, and nothing is fetched."

    def __init__(self): super().__init__(); self.open, self.pictures, self.text = [], [], ""

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if tag == "img": self.pictures.append(attrs["src"])
        assert not any(k.startswith("on") for k in attrs) and "href" not in attrs
        assert str(attrs.get("src", "data:")).startswith("data:")
        if tag not in ("img", "meta"): self.open.append(tag)

    def handle_endtag(self, tag): assert self.open.pop() == tag
    def handle_data(self, data): self.text += data


def checked(page):
    check = Check()
    check.feed(page)
    assert check.open == []
    return check


def data_of(page): return re.search(r'id="tk-data">(.*?)</script>', page, re.S)[1]


def test_the_file_is_whole_and_safe(store, tmp_path):
    page = gallery(store).save(tmp_path / "sub" / "page.html").read_text()
    check = checked(page)
    assert len(check.pictures) == 4 and "<script>alert" not in page and "<script>alert(1)</script>" in check.text
    data = json.loads(data_of(page))
    assert set(data) == {"100", "200", "300", "300-1"} and data["200"]["numbers"]["valid/loss"] == 0.3
    assert data["300-1"]["sort"]["score"] is None  # nan
    assert data["200"]["sort"]["valid/acc"] == pytest.approx(0.7)
    assert json.loads(plain_json({"</script>": "<!--"})) == {"</script>": "<!--"} and "<" not in plain_json({"</script>": "<!--"})
    empty = Checkpoints(tmp_path / "none")
    checked(whole_page([])), checked(gallery(empty).html())
    assert gallery(empty).text().startswith("0 checkpoints in ")


def test_a_terminal_shows_text(store, monkeypatch):
    monkeypatch.setenv("TRAINKIT_WHERE", "terminal")
    shown = gallery(store)
    with pytest.raises(NotImplementedError): shown._ipython_display_()  # so IPython takes the text
    assert repr(shown) == shown.text()
    lines = shown.text().splitlines()
    assert lines[0].startswith(f"4 checkpoints in {store.folder.parent}, 0.0") and len(lines) == 6
    assert lines[2].split()[0] == "200" and lines[2].endswith("best") and "0.3000" in lines[2]
    assert "\n  100" in shown.text()


def displayed(store, monkeypatch):
    "What a notebook gets to see."
    bundles = []
    monkeypatch.setenv("TRAINKIT_WHERE", "notebook")
    monkeypatch.setattr("IPython.display.display", lambda data, raw: bundles.append(data))
    show(store)
    return bundles


def test_a_notebook_keeps_a_still_table(store, monkeypatch):
    made, = displayed(store, monkeypatch)
    assert set(made) == {"text/plain", "text/html"}  # nobody looks: no widgets
    assert len(checked(made["text/html"]).pictures) == 4 and "<script" not in made["text/html"]


def test_a_damaged_checkpoint_is_shown_as_such(store):
    entry = store.find("300")
    entry.path.write_bytes(b"half")
    entry.path.with_suffix(".json").unlink()
    assert "unreadable" in gallery(store).text() and "unreadable" in gallery(store).html()


@pytest.mark.parametrize("n, size", [(40, 30), (300, 20), (9, 125), (3, 400)])
def test_pages_are_bounded(n, size):
    entries = [Entry(str(i), i, Path(f"{i}"), i, 1.0, 1, {}, png(i % 3, size)) for i in range(n)]
    pages = paged(entries)
    assert [e.id for p in pages for e in p] == ids(entries) and all(1 <= len(p) <= 12 for p in pages)
    assert max(sum(len(e.thumbnail or b"") for e in p) for p in pages) <= 110_000


def test_where_a_gallery_is_found(store, tmp_path, monkeypatch):
    for source in (store, store.folder, store.folder.parent, str(store.folder.parent)):
        assert ids(gallery(source).store.list()) == ["100", "200", "300", "300-1"]
    monkeypatch.chdir(tmp_path)
    assert len(gallery("faces").store) == 4 and len(gallery("runs/faces").store) == 4  # as Learner(run="faces") means it
    with pytest.raises(CheckpointError, match="no checkpoint in .*other, which is no folder"): gallery("runs/other")
    with pytest.raises(CheckpointError, match="no checkpoint in"): gallery(tmp_path)
    with pytest.raises(TypeError, match="got int"): gallery(3)
    with pytest.raises(ValueError, match="keeps no checkpoints"): gallery(learner(None))


# ---- what is done

def learner(run, **kw):
    torch.manual_seed(0)
    x = torch.randn(64, 3)
    y = x.sum(1, keepdim=True)
    kw = {"batch_size": 8, "seed": 1, "front": "none", "save_every": 4, "keep": 99} | kw
    return Learner(nn.Linear(3, 1), ((x, y), (x, y)), "mse", opt={"name": "sgd", "lr": 0.05}, run=run, **kw)


@pytest.fixture
def learn(tmp_path):
    learn = learner(tmp_path / "runs" / "first")
    learn.fit(steps=16)
    return learn


def files(folder): return {p.relative_to(folder): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


def test_nothing_is_done_during_a_fit(tmp_path):
    answers, keeper = [], None

    def press(learn):
        nonlocal keeper
        if learn.step == 6:
            learn.checkpoints.wait()
            keeper = Keeper(learn.checkpoints, learn)
            entry, before = learn.checkpoints.find("last"), files(learn.run)
            for what, how in (("pin", {}), ("delete", {}), ("restore", {}), ("branch", {"run": "x"})):
                answers.append(keeper.act(what, entry, learn.step, **how))
            assert files(learn.run) == before
    learn = learner(tmp_path / "run", cbs=[On("after_batch", press), On("after_validate_batch", press)])
    learn.fit(steps=12)
    assert learn.step == 12 and not any(done for done, _ in answers) and len(answers) == 4
    assert all(re.match("Not done: the learner is (training|validating); stop it", text) for _, text in answers)
    assert keeper.act("pin", learn.checkpoints.find("last"))[0]


def test_restoring(learn):
    keeper = Keeper(learn.checkpoints, learn)
    weights = {k: v.clone() for k, v in learn.checkpoints.load(8)[0]["players"]["model"]["modules"]["model"].items()}
    said = "The learner is at step 8 again; fit() goes on from there."
    assert keeper.act("restore", learn.checkpoints.find(8), 16) == (True, said)
    assert learn.step == 8 and all(torch.equal(v, weights[k]) for k, v in learn.model.state_dict().items())
    learn.fit(steps=2)
    done, text = keeper.act("restore", learn.checkpoints.find(4), 8)
    assert not done and "from step 8 to step 10 meanwhile" in text and learn.step == 10


def test_a_damaged_one_is_not_restored(learn):
    entry = learn.checkpoints.find(8)
    data = bytearray(entry.path.read_bytes())
    data[len(data) // 2] ^= 1
    entry.path.write_bytes(data)
    before = {k: v.clone() for k, v in learn.model.state_dict().items()}
    done, text = Keeper(learn.checkpoints, learn).act("restore", entry, 16)
    assert not done and text.startswith("Not done: ") and entry.path.name in text
    assert learn.step == 16 and all(torch.equal(v, before[k]) for k, v in learn.model.state_dict().items())


def test_branching(learn):
    keeper, old = Keeper(learn.checkpoints, learn), learn.checkpoints
    before = files(learn.run / "checkpoints")
    for name in ("", "  "):
        assert keeper.act("branch", old.find(8), 16, run=name) == (False, "Not done: a branch needs a name.")
    done, text = keeper.act("branch", old.find(8), 16, run="second")
    assert done and learn.step == 8 and learn.run.name == "second" and "step 8" in text
    assert {k: v for k, v in files(learn.run.with_name("first") / "checkpoints").items()} == before
    done, text = keeper.act("restore", old.find(4), 8)  # the old gallery, still on the screen
    assert not done and "another run now" in text and learn.step == 8
    done, text = Keeper(learn.checkpoints, learn).act("branch", learn.checkpoints.find("last"), 8, run="first")
    assert not done and "isn't empty" in text


def test_pinning_and_deleting(learn):
    store, keeper = learn.checkpoints, Keeper(learn.checkpoints, learn)
    assert keeper.act("pin", store.find(4))[0] and store.find(4).pinned
    done, text = keeper.act("delete", store.find(4))
    assert not done and "is pinned" in text and store.find(4)
    assert keeper.act("pin", store.find(4), pinned=False)[0]
    for step in (4, 8, 12): assert keeper.act("delete", store.find(step))[0]
    done, text = keeper.act("delete", store.find(16))
    assert not done and "only one" in text and ids(store) == ["16"]
    gone = store.find(16)
    gone.path.unlink()
    assert not keeper.act("pin", gone)[0]


def test_without_a_learner(learn):
    store = Checkpoints(learn.run / "checkpoints")
    keeper, entry = Keeper(store), store.find(8)
    for what, how in (("restore", {}), ("branch", {"run": "x"})):
        done, text = keeper.act(what, entry, **how)
        assert not done and "no learner is here" in text
    assert keeper.act("pin", entry)[0] and Checkpoints(store.folder).find(8).pinned


def test_another_process_that_trains_keeps_its_folder(learn):
    code = f"""
import sys, time
from trainkit.checkpoint import Checkpoints
store = Checkpoints({str(learn.checkpoints.folder)!r})
store.claim(); store.lock(); print("locked", flush=True); sys.stdin.readline()
"""
    other = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "locked\n"
        store = Checkpoints(learn.checkpoints.folder)
        for what in ("pin", "delete"):
            done, text = Keeper(store).act(what, store.find(8))
            assert not done and f"process {other.pid} is training" in text
        assert not store.find(8).pinned
    finally: other.communicate("\n", timeout=20)
    assert Keeper(store).act("pin", store.find(8))[0]  # it is over


def test_warnings_are_part_of_the_answer(learn):
    learn.restore = lambda entry: warnings.warn("the checkpoint's settings are used", stacklevel=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        done, text = Keeper(learn.checkpoints, learn).act("restore", learn.checkpoints.find(8))
    assert done and text.endswith("(the checkpoint's settings are used)")


# ---- the widgets, pressed without a browser

widgets = pytest.importorskip("ipywidgets")


def models(): return set(widgets.widgets.widget._instances)


def shown(controls): return [row.children[0].description for row in controls.rows.box.children]


def answer(controls): return html_.unescape(re.sub("<.*?>", "", controls.said.value))


def pick(controls, name, on=True):
    next(row for row in controls.rows.box.children if row.children[0].description == name).children[0].value = on


@pytest.fixture
def controls(learn):
    controls = Controls(widgets, Keeper(learn.checkpoints, learn))
    yield controls
    controls.close()


def test_sorting_and_selecting(controls):
    assert shown(controls)[1:] == [i for i in ["16", "12", "8", "4"] if i != shown(controls)[0]]
    start = models()
    controls.heads.made["checkpoint"].click()
    assert shown(controls) == ["4", "8", "12", "16"]
    controls.heads.made["checkpoint"].click()
    assert shown(controls) == ["16", "12", "8", "4"] and controls.heads.made["checkpoint"].description == "checkpoint ▾"
    pick(controls, "8")
    buttons = [controls.pin, controls.delete, controls.restore, controls.branch, controls.compare]
    assert [b.disabled for b in buttons] == [False] * 4 + [True]
    pick(controls, "4")
    assert [b.disabled for b in buttons] == [True] * 4 + [False]
    controls.compare.click()
    assert "<th>8</th><th>4</th><th>difference</th>" in controls.compared.value
    controls.heads.made["checkpoint"].click()  # the selection stays with the checkpoints
    assert [row.children[0].value for row in controls.rows.box.children] == [True, True, False, False]
    pick(controls, "16")  # of three, the first is let go
    assert [row.children[0].value for row in controls.rows.box.children] == [True, False, False, True]
    assert "<th>4</th><th>16</th>" in controls.compared.value  # and the comparison follows
    pick(controls, "16", False)
    assert controls.compared.value == "" and models() == start  # nothing was made anew


def test_deleting_asks_first(controls, learn):
    pick(controls, "8")
    assert controls.confirm.layout.display == "none"
    controls.delete.click()
    assert controls.confirm.layout.display == "flex" and "checkpoint 8 " in controls.question.value
    assert len(learn.checkpoints) == 4
    controls.confirm.children[2].click()
    assert controls.confirm.layout.display == "none" and len(learn.checkpoints) == 4
    controls.delete.click()
    pick(controls, "8", False)  # nobody may be asked about one and delete another
    pick(controls, "12")
    assert controls.confirm.layout.display == "none"
    controls.delete.click()
    controls.confirm.children[1].click()
    assert answer(controls) == "Checkpoint 12 is deleted." and sorted(shown(controls)) == ["16", "4", "8"]
    assert controls.board.picked == [] and controls.delete.disabled


def test_buttons_do_what_they_say(controls, learn):
    pick(controls, "4")
    controls.pin.click()
    assert learn.checkpoints.find(4).pinned and controls.pin.description == "Unpin"
    assert "pinned" in controls.rows.made[-1].children[1].value
    controls.pin.click()
    assert not learn.checkpoints.find(4).pinned and controls.pin.description == "Pin"
    controls.restore.click()
    assert learn.step == 4 and answer(controls).startswith("The learner is at step 4 again")
    learn.fit(steps=1)
    controls.restore.click()
    assert learn.step == 5 and "trained from step 4 to step 5 meanwhile" in answer(controls)
    controls.restore.click()
    assert learn.step == 4
    controls.branch.click()
    assert answer(controls) == "Not done: a branch needs a name."
    controls.name.value = "second"
    controls.branch.click()
    assert learn.run.name == "second" and controls.restore.layout.display == "none"  # it is no longer this run's


def test_no_learner_no_restore(learn):
    store = Checkpoints(learn.run / "checkpoints")
    controls = Controls(widgets, Keeper(store))
    assert controls.restore.layout.display == controls.branch.layout.display == "none"
    controls.close()


def test_during_a_fit_buttons_answer_with_the_reason(tmp_path):
    answers = []

    def press(learn):
        if learn.step == 6:
            controls = Controls(widgets, Keeper(learn.checkpoints, learn))
            pick(controls, "4")
            for button in (controls.pin, controls.restore): button.click()
            controls.delete.click()
            controls.confirm.children[1].click()
            answers.append(answer(controls))
            controls.close()
    learn = learner(tmp_path / "run", cbs=[On("after_batch", press)])
    learn.fit(steps=8)
    assert answers == ["Not done: the learner is training; stop it or wait for the end of the fit."] and learn.step == 8
    assert not learn.checkpoints.find(4).pinned


def test_work_is_done_by_the_thread_of_the_cells(controls, learn, monkeypatch):
    from trainkit.ui import gallery as module
    waiting, threads, restore = [], [], learn.restore

    class Kernel:
        class io_loop: add_callback = staticmethod(waiting.append)
    monkeypatch.setattr(module, "kernel", lambda: Kernel)
    monkeypatch.setattr(learn, "restore", lambda e: (threads.append(threading.current_thread()), restore(e)), raising=False)
    pick(controls, "8")
    clicker = threading.Thread(target=controls.restore.click)
    clicker.start()
    clicker.join()
    assert threads == [] and len(waiting) == 1 and answer(controls) == "As soon as no cell is running …"
    learn.fit(steps=1)  # and then a cell begins to train, before the loop has its turn
    waiting.pop()()
    assert threads == [] and "trained from step 16 to step 17" in answer(controls)
    clicker = threading.Thread(target=controls.restore.click)
    clicker.start()
    clicker.join()
    waiting.pop()()
    assert threads == [threading.main_thread()] and learn.step == 8


def test_an_error_in_a_button_is_told(controls, monkeypatch):
    monkeypatch.setattr(controls.board, "refresh", lambda: 1 / 0)
    controls.again.click()
    assert answer(controls) == "Not done: division by zero"


@pytest.fixture
def large(tmp_path):
    store = Checkpoints(tmp_path / "large" / "checkpoints", keep=None)
    for step in range(30):
        store.save({"x": torch.zeros(1)}, step, {"score": step % 7, "metrics": {f"valid/m{k}": step / 3 for k in range(9)}},
                   thumbnail=png(step, 125))  # 47 kB each
    return store


def state_of(new):
    from ipywidgets import Widget
    states = [o.get_state() for key, o in widgets.widgets.widget._instances.items() if key in new]
    assert all(isinstance(o, Widget) for key, o in widgets.widgets.widget._instances.items() if key in new)
    return len(json.dumps(states, default=str))


def test_the_state_in_a_notebook_stays_small(large):
    before = models()
    controls = Controls(widgets, Keeper(large))
    assert controls.turner.box.layout.display == "flex" and controls.turner.place.value.startswith("1 of ")
    seen = shown(controls)
    while not controls.turner.after.disabled:
        controls.turner.after.click()
        seen += shown(controls)
        for name in shown(controls)[:2]: pick(controls, name)
        controls.compare.click()
        assert state_of(models() - before) < 330_000
    assert sorted(map(int, seen)) == list(range(30)) and seen[0] in ("0", "7", "14", "21", "28")  # the best first
    controls.heads.made["checkpoint"].click()
    assert controls.turner.place.value.startswith("1 of ") and shown(controls)[0] == "0"
    assert len(gallery(large).html()) < 170_000 and "more; gallery" in gallery(large).html()
    controls.close()
    assert models() == before


def test_a_forgotten_gallery_leaves_nothing_behind(learn, monkeypatch):
    from trainkit.ui import gallery as module
    monkeypatch.setattr(module, "live_widgets", lambda: widgets)
    gc.collect()
    before = models()
    store = learn.checkpoints
    still, live = displayed(store, monkeypatch)
    made = models() - before
    for _ in range(5): assert displayed(store, monkeypatch) == [still, live]
    assert models() - before == made  # shown again: the same widgets
    name = re.match('<div class="(tk-still-\\w+)">', still["text/html"])[1]  # the table, which the living widgets hide
    assert f".{name} {{display: none}}" in vars(store)["gallery"]._controls.head.value and name not in str(live)
    alive = weakref.ref(store)
    learn.checkpoints = None
    del store
    gc.collect()
    assert alive() is None and models() == before


def test_the_gallery_keeps_no_learner_alive(learn):
    shown_, alive = gallery(learn), weakref.ref(learn)
    assert shown_.keeper.learner is learn
    del learn
    gc.collect()
    # pytest itself holds the fixture's value; what matters is that the gallery does not
    assert shown_.keeper._learner is not None and not any(o is shown_.keeper for o in gc.get_referrers(alive()) or ())


def test_other_ways_are_in_the_history(learn):
    "What the gallery's restore leaves behind is a tail."
    Keeper(learn.checkpoints, learn).act("restore", learn.checkpoints.find(8), 16)
    learn.fit(steps=2)
    assert [t.step for t in learn.history.tails] == [8] == [t.step for t in History.read(learn.history.path).tails]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written(store):
    store.folder.chmod(0o500)
    try: assert not Keeper(store).act("pin", store.find("100"))[0]
    finally: store.folder.chmod(0o700)


def test_boards_follow_the_folder(store):
    board = Board(Keeper(store))
    board.pick(board.entries[0])
    board.pick(board.entries[1])
    store.delete("100")
    board.refresh()
    assert ids(board.picked) == ["200"] and ids(board.entries) == ["200", "300", "300-1"]
