"The benchmarks in a tiny form: each gives its tables, with numbers where numbers belong; how fast anything is, is not asked."
import json
import math
import os
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import common
from benchmarks.common import ABSENT, Table, present, ratio, seconds, shown, versus
from benchmarks.peers import PEERS

ROOT = Path(__file__).resolve().parent.parent
NAMES = ["loop", "optim", "gan", "imports", "checkpoints", "growth", "loaders", "syncs", "bytes", "data_seeds"]
RESULTS = ROOT / "benchmarks" / "results"


@pytest.fixture(autouse=True)
def untouched():
    "Random state, environment and number of threads stay as they were."
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    env = {key: value for key, value in os.environ.items() if key.startswith("TRAINKIT")}
    yield
    torch.set_rng_state(state)
    torch.set_num_threads(threads)
    assert {key: value for key, value in os.environ.items() if key.startswith("TRAINKIT")} == env


@pytest.fixture(scope="module")
def tables():
    "What was measured, by program; each is asked once."
    found = {}

    def ask(name) -> list[Table]:
        if name not in found: found[name] = import_module(f"benchmarks.{name}").measure(True)
        return found[name]

    return ask


@pytest.mark.parametrize("name", NAMES)
def test_gives_tables(name, tables):
    for table in tables(name):
        assert table.rows, table.title
        for row in table.rows:
            assert len(row) == len(table.head), row
            assert isinstance(row[0], str) and row[0]
            assert all(cell is None or isinstance(cell, (str, int, float)) for cell in row), row
            assert all(math.isfinite(cell) for cell in row if isinstance(cell, float)), row
        text = str(table)
        assert text.count("\n| ") == len(table.rows) + 2 and all(note in text for note in table.notes)


def column(table, row, head):
    rows = {r[0]: r for r in table.rows}
    return rows[row][table.head.index(head)]


def test_loop(tables):
    table, = tables("loop")
    for name in ("trainkit, bare", "trainkit, defaults in a script", "trainkit, defaults in a terminal"):
        assert column(table, name, "ratio") > 0 and column(table, name, "to reach, µs") in ("8", "15")
    assert {row[0] for row in table.rows} >= set(PEERS)
    for name in PEERS:
        if common.version(name) is None: assert column(table, name, "version") == ABSENT and column(table, name, "ratio") is None


def test_syncs(tables):
    "The counter sees what a loop reads by hand, and nothing where nothing is read."
    from benchmarks.syncs import counted

    table, = tables("syncs")
    assert column(table, "the plain loop", "reads") == 0

    def reads():
        x = torch.ones(3, device="meta")
        return x[0].item(), float(x[1]), bool(x[2]), x.tolist(), x.cpu(), x.to("cpu"), x.numpy(), torch.equal(x, x + 1)

    places = counted(reads)
    assert sum(places.values()) == 8 and all("test_benchmarks.py" in place for place in places)
    assert not counted(lambda: torch.ones(3).sum().item())  # a tensor on the CPU is there already


def test_growth(tables):
    table, plot = tables("growth")
    assert [row[1] for row in table.rows] == [8000, 8000]
    assert all(row[table.head.index("bytes a value")] >= 16 for row in table.rows)
    assert table.rows[1][-1] > 5 and "spikes" in plot.notes[0]


def test_checkpoints(tables):
    table, = tables("checkpoints")
    assert table.rows[0][0] == "3 MB" and "1 in flight at most" in table.notes[0]


def test_bytes(tables):
    table, = tables("bytes")
    for row in table.rows:
        assert 1 < row[table.head.index("left in the file, KB")] < row[table.head.index("sent, KB")]


def test_imports(tables):
    table, = tables("imports")
    assert table.rows[0][0] == "`import trainkit`" and table.rows[0][-1] == "none of them"


def test_pairs():
    "The base is beside each of the others, before it or behind it in turn, and a first round is left out."
    done = []

    def maker(name):
        return lambda: lambda: done.append(name)

    found = versus(maker("base"), {"a": maker("a"), "b": maker("b")}, 2, lambda work: work() or len(done))
    assert [sorted(done[i:i + 2]) for i in range(0, len(done), 2)] == [["a", "base"], ["b", "base"]] * 3
    assert {name: len(pairs) for name, pairs in found.items()} == {"a": 2, "b": 2}
    assert all(abs(base - other) == 1 for pairs in found.values() for base, other in pairs)
    assert ratio([(1.0, 2.0), (2.0, 2.0), (4.0, 2.0)]) == 1.0


def test_seconds():
    ticks = iter([3.0, 10.0])
    assert seconds(lambda: None, lambda: next(ticks)) == 7.0


def test_lacking_peers(monkeypatch):
    "Absent ones, and ones that fail, become rows that say so."
    monkeypatch.setattr(common, "version", {"there": "1.0", "broken": "2.0"}.get)

    def broken(data):
        raise ImportError("no")

    usable, lacking = present({"there": lambda data: lambda: data, "broken": broken, "absent": broken}, 5)
    assert usable.keys() == {"there"} and usable["there"]()() == 5
    assert lacking == {"absent": ABSENT, "broken": "2.0, doesn't run here: ImportError"}


@pytest.mark.parametrize("cell, text", [(None, "–"), (1234.4, "1234"), (0.01234, "0.0123"), (7, "7"), ("x", "x")])
def test_cells(cell, text):
    assert shown(cell) == text


# --- programs, their pages, and the list -----------------------------------------------------------------------------------


def test_every_program_is_in_the_list_and_has_its_page():
    "`make bench` runs all of them, and nothing else has a page among the results."
    folder = ROOT / "benchmarks"
    programs = {p.stem for p in folder.glob("*.py")} - {"__init__", "common", "peers"}
    programs |= {p.parent.name for p in folder.glob("*/__main__.py")}
    listed = re.search(r"^BENCHMARKS \?= (.*)$", (ROOT / "Makefile").read_text(), re.M)[1].split()
    assert len(listed) == len({*listed}) > 12
    assert {*listed} == programs == {p.stem for p in RESULTS.glob("*.md")}


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.md")), ids=lambda path: path.stem)
def test_a_page_names_the_program_that_wrote_it(path):
    text = path.read_text()
    assert re.search(rf"`(python -m )?benchmarks[./]{path.stem}(\.py)?`", text)
    assert "by hand" not in re.sub("loops? by hand", "", text)


def test_pages_are_what_their_programs_make_of_what_they_kept():
    "So that nobody has put a figure in."
    from benchmarks import live, scale
    from benchmarks.faults import plan, report

    pages = {"live": common.page("live", live.PARTS, common.kept("live"), live.__doc__),
             "scale": common.page("scale", scale.PARTS, common.kept("scale"), scale.__doc__, scale.modelled()),
             "faults": report.page(common.kept("faults"))}  # fmt: skip
    assert pages == {name: (RESULTS / f"{name}.md").read_text() for name in pages}
    assert {*pages} == {p.stem for p in RESULTS.glob("*.json")}
    assert {*common.kept("live")} == {*live.PARTS} and {*common.kept("scale")} == {*scale.PARTS}
    assert {*common.kept("faults")} == {*plan.FAULTS}


@pytest.fixture
def in_parts(tmp_path, monkeypatch):
    "A program of two parts, that writes elsewhere; each measures 1, then 2, and so on, or fails when it is among `failing`."
    counts, failing = {"first": 0, "second": 0}, set()

    def part(name):
        def measure(tiny):
            if name in failing: raise RuntimeError(f"no {name} today")
            counts[name] += 1
            return [Table(f"The {name}", ("what", "found"), [("tiny" if tiny else "x", 1.5 * counts[name])], ["A note."])]
        return measure

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["benchmarks.it", *arguments])
        parts, about = {name: part(name) for name in counts}, "It\n\n    python\n\nAbout it."
        common.main_in_parts("it", parts, about, [Table("More", ("a",))])
        return (tmp_path / "it.md").read_text() if (tmp_path / "it.md").exists() else None

    run.counts, run.failing = counts, failing
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    return run


def test_parts_are_kept_and_measured_by_themselves(in_parts, capsys):
    assert in_parts("--tiny") is in_parts("--print") is None and "| tiny | 1.5 |" in capsys.readouterr().out
    page = in_parts("second")
    assert page.startswith("# It\n\nAbout it.\n\nWritten by `python -m benchmarks.it`.\n\nMeasured (first): not yet.\n\n")
    assert "## The second\n\n| what | found |\n| --- | --- |\n| x | 4.5 |\n\nA note.\n\nMeasured (second): 2" in page
    assert page.endswith("## More\n\n| a |\n| --- |\n")
    page = in_parts("first")
    assert "| x | 4.5 |\n\nA note.\n\nMeasured (first): 2" in page and "(second): 2" in page and page.count("| x | 4.5 |") == 2
    page = in_parts()
    assert page.count("| x | 6 |") == 2 and in_parts("--again") == page
    with pytest.raises(SystemExit):
        in_parts("third")
    assert "no part is called third; there are: first, second" in capsys.readouterr().err


def test_a_part_that_fails_leaves_json_and_page_together(in_parts, tmp_path):
    "The page has what was measured before it."
    in_parts.failing.add("second")
    with pytest.raises(RuntimeError, match="no second today"):
        in_parts()
    assert {*common.kept("it", *common.KEYS)} == {"first"}
    page = (tmp_path / "it.md").read_text()
    assert "| x | 1.5 |" in page and "Measured (second): not yet." in page and in_parts("--again") == page


@pytest.mark.parametrize("at", ["write_text", "replace"])
def test_what_was_kept_survives_a_write_that_fails(in_parts, tmp_path, monkeypatch, at):
    "Half of the text, or all of it, is written: the old files stay, whole."
    in_parts()
    before = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert before.keys() == {"it.json", "it.md"}
    write = Path.write_text

    def full(*given, **kw):
        if at == "write_text": write(given[0], given[1][:len(given[1]) // 2], encoding="utf-8")
        raise OSError("no space left")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="no space left"):
        patch.setattr(Path if at == "write_text" else os, at, full)
        in_parts("first")
    assert {name: (tmp_path / name).read_text() for name in before} == before


@pytest.mark.parametrize("text, said", [
    ('{"first": {"made": "2', "Unterminated string starting at: line 1 column 20"),
    ("[1, 2]", "'list' object has no attribute 'items'"),
    ('{"first": 3}', "'int' object has no attribute 'keys'"),
    ('{"first": {"made": "today"}}', "part 'first' lacks machine, tables; it has made"),
    ('{"first": {}}', "part 'first' lacks machine, made, tables; it has nothing"),
])  # fmt: skip
def test_what_cannot_be_used_is_told_before_anything_is_measured(in_parts, tmp_path, text, said):
    path = tmp_path / "it.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"^{re.escape(str(path))} can't be used: {re.escape(said)}.*made, tables, machine\. "):
        in_parts()
    assert not any(in_parts.counts.values()) and path.read_text() == text
    in_parts("--tiny"), in_parts("--print")  # what they show, nobody keeps
    assert in_parts.counts == {"first": 2, "second": 2}


def test_kept_without_tables_has_its_day(tmp_path, monkeypatch):
    "As the faults keep their lines: no keys but the day are asked for, if none are named."
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    assert common.keep("it", "first", rows=[1]) == common.kept("it") == common.kept("it", "rows")
    (tmp_path / "it.json").write_text(json.dumps({"first": {"rows": [1]}}))
    with pytest.raises(ValueError, match="part 'first' lacks made; it has rows"):
        common.kept("it")


@pytest.mark.parametrize("more", ["first", "--tiny"])
def test_again_measures_nothing(in_parts, capsys, more):
    with pytest.raises(SystemExit):
        in_parts("--again", more)
    assert f"--again measures nothing, and can't be given with {more}" in capsys.readouterr().err


def test_again_shows_the_page(in_parts, tmp_path, capsys):
    page = in_parts("second")
    (tmp_path / "it.md").unlink()
    capsys.readouterr()
    assert in_parts("--again", "--print") is None and capsys.readouterr().out == page + "\n"


def test_again_makes_the_folder(in_parts, tmp_path, monkeypatch):
    monkeypatch.setattr(common, "RESULTS", tmp_path / "new" / "results")
    in_parts("--again")
    page = (tmp_path / "new" / "results" / "it.md").read_text()
    assert page.count("not yet.") == 2 and page.startswith("# It\n\nAbout it.\n\nWritten by `python -m benchmarks.it`.\n\n")


def test_a_program_measures_in_one_way():
    "In parts, or all of it."
    texts = {path.stem: path.read_text() for path in (ROOT / "benchmarks").glob("*.py") if path.stem != "common"}
    in_parts = {name for name, text in texts.items() if "common.main_in_parts(" in text}
    assert in_parts == {"live", "scale"} and not [name for name in in_parts if "def measure(" in texts[name]]


def client(*said):
    "Of a kernel that says this while a cell runs; nobody asks it more than a few times."
    messages, asked = list(said), []

    def connected():
        asked.append(1)
        assert len(asked) < 9, "it would wait for ever"
        return SimpleNamespace(close=lambda: None)

    return SimpleNamespace(iopub_channel=SimpleNamespace(msg_ready=lambda: bool(messages)), connect_shell=connected,
                           get_iopub_msg=lambda timeout: messages.pop(0))  # fmt: skip


def test_a_cell_that_writes_nothing_is_not_awaited_for_ever(tmp_path, monkeypatch):
    from benchmarks import live

    clock = iter(range(99))
    monkeypatch.setattr(live, "time", SimpleNamespace(monotonic=lambda: next(clock), sleep=lambda seconds: None))
    file = tmp_path / "slider.json"
    with pytest.raises(TimeoutError, match="^the cell that is to write slider.json has not done so in 5 s, nor failed$"):
        live.await_file(file, client({"msg_type": "stream", "content": {}}), 5)
    with pytest.raises(RuntimeError, match="^a cell failed:\nIn line 1:\nno gan$"):
        live.await_file(file, client({"msg_type": "error", "content": {"traceback": ["In line 1:", "no gan"]}}), 5)
    file.write_text("{}")
    live.await_file(file, client(), 0)


def test_one_file_of_sharded_parameters_is_gathered_first():
    "In the model: 12 bytes a parameter over each device's link, and then the copy to the host."
    from benchmarks.scale import Cluster, checkpoint, modelled

    held = {(n, mode): checkpoint(7e9, n, Cluster(), mode, "one")[0] for n in (8, 4096) for mode in ("ddp", "fsdp")}
    assert held[4096, "fsdp"] - held[4096, "ddp"] == pytest.approx(84e9 * 4095 / 4096 / 50e9)
    assert held[8, "fsdp"] - held[8, "ddp"] == pytest.approx(84e9 * 7 / 8 / 300e9)
    rows = {row[:4]: row[4] for row in modelled()[-1].rows}
    assert rows["7 B", 4096, "fsdp", "one"] == held[4096, "fsdp"] > rows["7 B", 4096, "ddp", "one"] == 84e9 / 20e9
    assert rows["7 B", 4096, "fsdp", "shards"] == pytest.approx(84e9 / 4096 / 20e9)


def test_command_line(tmp_path):
    "A program run by name shows its table, and in the tiny form writes nothing."
    results = ROOT / "benchmarks" / "results" / "optim.md"
    before = results.read_bytes() if results.is_file() else None
    done = subprocess.run([sys.executable, "-m", "benchmarks.optim", "--tiny"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("# Adam and AdamW as they come") and "| trainkit, no opt given |" in done.stdout
    assert (results.read_bytes() if results.is_file() else None) == before
