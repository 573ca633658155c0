"A run as one HTML page: what stands in it is what the folder says, whatever that is, and nothing in it is run or fetched."
from __future__ import annotations

import base64
import io
import json
import os
import re
import warnings
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from trainkit.callback import On
from trainkit.cli import main
from trainkit.compare import Outcome
from trainkit.history import History
from trainkit.learner import Learner
from trainkit.runs import runs
from trainkit.ui.page import (
    MOST,
    OPEN,
    POLICY,
    Event,
    Record,
    curves,
    document,
    drawn,
    folder_of,
    numbers_table,
    page,
    record_of,
    story_table,
)
from trainkit.ui.samples import sample_grid
from trainkit.ui.view import save_png

Image = pytest.importorskip("PIL.Image")
NASTY = "<script>alert('1')</script> & \"quotes\" <img src=x onerror=y> $x_1$"
LOUD = {"a", "audio", "base", "embed", "form", "iframe", "input", "link", "object", "script", "svg"}  # what no page here has


class Read(HTMLParser):
    "A page as a browser takes it: tags with attributes, texts, and the cells of its tables."

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.texts, self.tables, self.open = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in {"img", "meta"}:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in {"td", "th"}:
            self.tables[-1][-1].append(["", dict(attrs)])

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in {"style"}:
            self.texts.append(data)
        if {"td", "th"} & {*self.open[-2:]}:
            self.tables[-1][-1][-1][0] += data

    @property
    def text(self):
        return " ".join(self.texts)

    def table(self, *head):
        "The rows of the tables that begin so."
        return [row for table in self.tables if [cell for cell, _ in table[0]] == [*head] for row in table[1:]]


def read(text):
    "The page, which is whole and has nothing that acts."
    found = Read(text)
    assert found.open == [] and text.startswith("<!DOCTYPE html>")
    assert not LOUD & {tag for tag, _ in found.tags}
    assert not [name for _, attrs in found.tags for name in attrs if name.startswith("on")]
    outside = {"src", "href", "srcset", "poster", "data", "action"}
    assert all(value.startswith("data:") for _, attrs in found.tags for name, value in attrs.items() if name in outside)
    policies = [attrs for tag, attrs in found.tags if tag == "meta" and "http-equiv" in attrs]
    assert policies == [{"http-equiv": "Content-Security-Policy", "content": POLICY}]
    assert "url(" not in text.replace("data:", "") and "@import" not in text
    return found


def line(tmp_path, run="line", **how):
    torch.manual_seed(0)
    x = torch.randn(96, 4)
    y = x @ torch.tensor([[1.0], [-2.0], [0.5], [3.0]])
    return Learner(nn.Linear(4, 1), ((x[:64], y[:64]), (x[64:], y[64:])), "mse", {"name": "adam", "lr": 0.05}, metrics=["mae"],
                   run=tmp_path / run, front="none", batch_size=16, device="cpu", **how)  # fmt: skip


def test_numbers_are_the_historys(tmp_path):
    learn = line(tmp_path)
    learn.fit(epochs=5)
    rows = {row[0][0]: row[1:] for row in read(page(learn).html).table("series", "last", "best", "at step")}
    told = {name: history for name, history in learn.history.scalars.items()}
    assert rows.keys() == told.keys()
    for name in ("valid/loss", "valid/mae"):
        steps, values = told[name]
        last, best, at = rows[name]
        assert float(last[1]["title"]) == values[-1] and float(last[0]) == pytest.approx(values[-1], rel=1e-3)
        assert float(best[1]["title"]) == values.min() and int(at[0]) == steps[values.argmin()]
    of_batches = told["train/loss"][1]
    assert float(rows["train/loss"][0][1]["title"]) == pytest.approx(of_batches[-20:].mean(), rel=1e-12)
    assert [name for name in rows][:3] == ["valid/loss", "train/loss", "valid/mae"]  # what matters most stands first


NUMBERS = st.one_of(st.floats(-1e308, 1e308), st.sampled_from([np.inf, -np.inf, np.nan]))  # the largest ones round to inf


@settings(max_examples=40, deadline=None)
@given(NUMBERS, NUMBERS, st.one_of(st.none(), st.integers(0, 10**9)))
def test_any_number(last, best, step):
    cells = [cell for cell, _ in Read(numbers_table([("x", Outcome(last, best, step))])).tables[0][1]]
    assert cells[0] == "x" and cells[3] == ("" if step is None else str(step))
    for said, value in zip(cells[1:], (last, best)):
        assert said in {"", "nan"} if value != value else float(said) == pytest.approx(value, rel=1e-3)


def test_what_happened(tmp_path):
    learn = line(tmp_path)
    learn.fit(epochs=2)
    learn.save(note="a <good> one")
    learn.set("lr", 0.2)
    learn.fit(epochs=1)
    learn.restore("a <good> one")
    learn.fit(epochs=1)
    rows = [[cell for cell, _ in row] for row in read(page(learn).html).table("step", "time", "by", "what")]
    assert [(int(step), by, what) for step, _, by, what in rows] == [
        (0, "code", "fit epochs=2"), (8, "code", "finished"), (8, "run", "saved: a <good> one"), (8, "code", "lr: 0.05 → 0.2"),
        (8, "code", "fit epochs=1"), (12, "code", "finished"), (8, "code", "went back to 8-1"),
        (8, "code", "fit epochs=1"), (12, "code", "finished")]  # fmt: skip


def test_branch_and_list_of_runs(tmp_path):
    learn = line(tmp_path)
    learn.fit(epochs=2)
    learn.branch("last", "other")
    learn.fit(epochs=1)
    for run in runs(tmp_path):
        text = read(page(run).html).text
        assert run.name in text and ("a branch of line/8" in text) == (run.name == "other")


def test_failed(tmp_path):
    learn = line(tmp_path)
    learn.add(On("after_batch", lambda learn: learn.step == 6 and [][1 if learn.step else 0]))
    with pytest.raises(IndexError):
        learn.fit(epochs=4)
    found = read(page(tmp_path / "line").html)
    assert ("span", {"class": "state bad"}) in found.tags and "failed" in found.texts
    place = "after_batch of On('after_batch', <lambda>); step 6, epoch 2, batch 2 of 4"
    assert f"IndexError: list index out of range ({place})" in found.texts


def test_cut_off(tmp_path):
    learn = line(tmp_path)
    learn.fit(epochs=1)
    file = tmp_path / "line" / "status.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "listening": True, "pid": 2**22 + 7, "born": "1"}))
    found = read(page(tmp_path / "line").html)
    assert "cut off" in found.texts and "ended without a word, killed perhaps" in found.text


def test_empty(tmp_path):
    (tmp_path / "nothing").mkdir()
    with pytest.raises(FileNotFoundError, match="no run lies in"):
        page(tmp_path / "nothing")
    (tmp_path / "nothing" / "history.jsonl").write_text("")
    text = read(page(tmp_path / "nothing").html).text
    assert "Nothing was recorded." in text and "Nothing was written down." in text and "Nobody wrote it down." in text


def test_without_and_with_pictures(tmp_path):
    learn = line(tmp_path)
    learn.fit(epochs=1)
    assert "Samples" not in read(page(learn).html).texts
    kept = {}
    for step in (0, 1, 2, 3, 4):
        kept[step] = sample_grid(torch.rand(8, 3, 8, 8), 4)
        save_png(kept[step], learn.run / "samples" / f"step_{step:07d}.png")
        save_png(kept[0], learn.run / '"<spectra>"' / f"step_{step:07d}.png")
    found = read(page(learn).html)
    assert "Samples" in found.texts and '"<spectra>"' in found.texts
    shown = {attrs["alt"]: attrs["src"] for tag, attrs in found.tags if tag == "img"}
    last = base64.b64decode(shown["pictures at step 4"].split(",")[1])
    assert ("summary", {}) in found.tags and {"samples as a movie", '"<spectra>" as a movie'} <= shown.keys()
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(last)).convert("RGB")), kept[4])
    films = base64.b64decode(shown["samples as a movie"].split(",")[1])
    assert Image.open(io.BytesIO(films)).n_frames == 5


def test_a_movie_that_is_there_is_taken(tmp_path):
    learn = line(tmp_path)
    learn.fit(epochs=1)
    save_png(sample_grid(torch.rand(8, 1, 8, 8), 4), learn.run / "samples" / "step_0000001.png")
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(learn.run / "mine.gif", save_all=True, append_images=frames[1:])
    sources = [attrs["src"] for tag, attrs in read(page(learn).html).tags if tag == "img"]
    assert f"data:image/gif;base64,{base64.b64encode((learn.run / 'mine.gif').read_bytes()).decode()}" in sources


def test_many_series(monkeypatch):
    monkeypatch.setattr("trainkit.ui.page.svg_of", lambda figure, box: "data:,")  # the slow part, which another test has
    history = History()
    for step in range(1, 60):
        history.add("train/loss", 1 / step, step)
        for i in range(50):
            history.add(f"extra/number {i:02}", step * i, step)
            history.add(f"doctor/gauge {i:02}", i, step)
    snapshot = history.snapshot()
    titles = [title for title, _ in drawn(snapshot)]
    assert len(titles) == MOST and titles[0] == "loss" and not any(title.startswith("gauge") for title in titles)
    text = curves(snapshot)
    assert f"{MOST - OPEN} more panels" in text and f"{101 - MOST} more panels are not drawn" in text
    assert text.index("<details>") > [m.start() for m in re.finditer("<img", text)][OPEN - 1]


def test_panels_are_different_pictures(tmp_path):
    learn = line(tmp_path)
    learn.fit(epochs=3)
    found = [base64.b64decode(picture.split(",")[1]).decode() for _, picture in drawn(learn.history.snapshot())]
    assert len({*found}) == len(found) >= 2
    sizes = {re.search(r'viewBox="([^"]*)"', text)[1] for text in found}
    assert len(sizes) == 1 and [float(n) for n in sizes.pop().split()][2:] == pytest.approx([3.4 * 72, 2.7 * 72])


def test_nasty_names(tmp_path):
    learn = line(tmp_path, run="a<b>&'\"c")
    learn.fit(epochs=1)
    learn.history.add(f"valid/{NASTY}", 0.5, 4)
    learn.history.mark("alarm", 4, NASTY, suggestion=NASTY)
    learn.save(note=NASTY)
    for name, text in (("status.json", {"state": NASTY, "device": NASTY, NASTY: NASTY}),
                       ("identity.json", {"sessions": [{"configuration": {NASTY: NASTY}, NASTY: {"x": NASTY}}]})):  # fmt: skip
        (learn.run / name).write_text(json.dumps(text))
    found = read(page(learn).html)  # no tag, no attribute came out of it
    assert learn.run.name in found.text and found.text.count("<script>alert('1')</script>") >= 8


@settings(max_examples=30, deadline=None)
@given(st.text(max_size=40), st.text(max_size=40))
def test_any_text(who, what):
    found = Read(story_table([Event(0.0, 1, who, what)]))
    assert [cell for cell, _ in found.tables[0][1]][2:] == [who, what]


def test_what_is_damaged_is_said(tmp_path):
    learn = line(tmp_path)
    learn.fit(epochs=2)
    with open(learn.run / "journal.jsonl", "a") as file:
        file.write("{torn\n")
    (learn.run / "samples").mkdir()
    (learn.run / "samples" / "step_0000002.png").write_bytes(b"no picture")
    (learn.run / "identity.json").write_text("[")
    (learn.run / "status.json").write_text("7")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = read(page(learn.run).html)
    text = found.text
    assert "Not readable" in found.texts and "journal.jsonl: 1 lines can't be read" in text and "samples/step_0000002.png" in text
    assert str(tmp_path) not in text
    assert "finished" in text and "valid/mae" in text  # the rest is there


def test_reading_changes_nothing(tmp_path):
    learn = line(tmp_path)
    learn.fit(epochs=2)
    folder = learn.run

    def seen():
        return {p: (p.read_bytes(), os.stat(p).st_mtime_ns) for p in sorted(folder.rglob("*")) if p.is_file()}
    before = seen()
    page(folder)
    assert seen() == before


def test_from_a_terminal(tmp_path, capsys):
    learn = line(tmp_path)
    learn.fit(epochs=1)
    capsys.readouterr()
    file = tmp_path / "pages" / "line.html"
    assert main(["show", str(learn.run), "--html", str(file)]) == 0
    assert capsys.readouterr().out == f"{file}\n"
    read(file.read_text(encoding="utf-8"))
    assert main(["show", str(tmp_path / "nobody"), "--html", str(tmp_path / "no.html")]) != 0
    assert not (tmp_path / "no.html").exists()


def test_saved_whole(tmp_path):
    made = page(_finished(tmp_path))
    assert made.save(tmp_path) == tmp_path / "line.html"
    assert made.save(tmp_path / "x" / "y.html").read_text(encoding="utf-8") == made.html
    assert [p.name for p in (tmp_path / "x").iterdir()] == ["y.html"]


def _finished(tmp_path):
    learn = line(tmp_path)
    learn.fit(epochs=1)
    return learn


def test_sources(tmp_path):
    learn = _finished(tmp_path)
    for source in (learn, learn.run, str(learn.run), runs(tmp_path)[0]):
        assert folder_of(source) == learn.run
    with pytest.raises(ValueError, match="no folder"):
        folder_of(Learner(nn.Linear(1, 1)))
    with pytest.raises(TypeError, match="received list"):
        folder_of([])
    record = record_of(learn.run)
    assert isinstance(record, Record) and document(record)
