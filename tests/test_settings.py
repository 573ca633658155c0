"""trainkit.settings: file, environment and arguments, and what one is told when they can't be understood."""
import dataclasses
import math
import pickle
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainkit.settings import KEYS, Settings, SettingsError, as_text, find_settings, load_settings, settings_ini

ROOT = Path(__file__).resolve().parent.parent

@pytest.fixture
def ini(tmp_path):
    "Writes a settings file into `tmp_path` and returns its path."
    def write(text, folder=tmp_path):
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "settings.ini"
        path.write_text(text, encoding="utf-8")
        return path
    return write

def values(settings):
    sections = {"trainkit": settings, "optimizer": settings.optimizer, "scheduler": settings.scheduler}
    return {(section, name): getattr(sections[section], name) for section, name in KEYS}

def test_the_projects_file_states_the_defaults():
    assert (ROOT / "settings.ini").read_text(encoding="utf-8") == settings_ini()
    settings = load_settings(ROOT)
    assert settings == Settings()
    assert {settings.source(*key) for key in KEYS} == {str(ROOT / "settings.ini")}

def test_agreed_defaults():
    assert values(Settings()) == {
        ("trainkit", "device"): "auto", ("trainkit", "precision"): "fp32", ("trainkit", "channels_last"): "auto",
        ("trainkit", "batch_size"): 64, ("trainkit", "seed"): None, ("trainkit", "runs"): "runs",
        ("trainkit", "save_every"): "epoch", ("trainkit", "keep"): 3,
        ("trainkit", "keep_best"): 1, ("trainkit", "keep_every"): None, ("trainkit", "monitor"): "", ("trainkit", "signals"): "",
        ("trainkit", "mode"): "auto", ("trainkit", "front"): "trainkit.ui.front:front", ("trainkit", "refresh"): 1.0,
        ("optimizer", "name"): "adamw", ("optimizer", "lr"): 1e-3, ("optimizer", "weight_decay"): None,
        ("optimizer", "betas"): None, ("optimizer", "momentum"): None, ("optimizer", "fused"): "auto",
        ("optimizer", "params"): None, ("scheduler", "end"): None, ("scheduler", "monitor"): None, ("scheduler", "by"): None,
        ("scheduler", "name"): "constant", ("scheduler", "warmup"): 0, ("scheduler", "total"): None}

def test_without_a_file_everything_is_default(tmp_path):
    settings = load_settings(tmp_path)
    assert settings == Settings()
    assert {settings.source(*key) for key in KEYS} == {"default"}

def test_arguments_over_environment_over_file(ini, tmp_path, monkeypatch):
    path = ini("[trainkit]\nkeep = 4\nseed = 1\nrefresh = 2\n[optimizer]\nlr = 0.5\n[scheduler]\ntotal = 100\n")
    monkeypatch.setenv("TRAINKIT_KEEP", "5")
    monkeypatch.setenv("TRAINKIT_SEED", "2")
    monkeypatch.setenv("TRAINKIT_OPTIMIZER_LR", "0.25")
    monkeypatch.setenv("TRAINKIT_SCHEDULER_WARMUP", "10")
    settings = load_settings(tmp_path, keep=6)
    assert (settings.keep, settings.source("trainkit", "keep")) == (6, "argument")
    assert (settings.seed, settings.source("trainkit", "seed")) == (2, "environment TRAINKIT_SEED")
    assert (settings.refresh, settings.source("trainkit", "refresh")) == (2.0, str(path))
    assert settings.optimizer.lr == 0.25
    assert (settings.scheduler.total, settings.scheduler.warmup) == (100, 10)
    assert settings.source("trainkit", "device") == "default"

def test_an_empty_environment_variable_is_the_empty_value(ini, tmp_path, monkeypatch):
    ini("[trainkit]\nseed = 7\n")
    monkeypatch.setenv("TRAINKIT_SEED", "")
    assert load_settings(tmp_path).seed is None

def test_the_working_directory_is_where_the_search_begins(ini, tmp_path, monkeypatch):
    ini("[trainkit]\nkeep = 9\n")
    deep = tmp_path / "a" / "b"
    deep.mkdir(parents=True)
    monkeypatch.chdir(deep)
    assert load_settings().keep == 9
    ini("[trainkit]\nkeep = 8\n", deep)
    assert load_settings().keep == 8  # the nearest alone counts: files are not merged
    ini("[trainkit]\nkeep = 7\n", deep)
    assert load_settings().keep == 7  # and nothing is cached

def test_the_nearest_file_is_not_merged_with_one_above(ini, tmp_path):
    ini("[trainkit]\nkeep = 9\n")
    ini("[trainkit]\nseed = 3\n", tmp_path / "a")
    settings = load_settings(tmp_path / "a")
    assert (settings.seed, settings.keep) == (3, 3)

@pytest.mark.parametrize("foreign", [
    "[DEFAULT]\nlib_name = x\nkeep = 99\n", "[settings]\nDEBUG = on\n", "",
    "DEBUG = on\nseed = 3\n", "just some text\n", "port: 80\n# [trainkit]\n",  # no section header
    "[app]\nport = 1\nport = 2\n", "[app]\na = 1\n[app]\na = 2\n", "[app]\nport\n  x"])  # not what configparser takes
def test_another_tools_file_is_passed_over(ini, tmp_path, foreign):
    ours = ini("[trainkit]\nkeep = 9\n")
    ini(foreign, tmp_path / "a")
    assert find_settings(tmp_path / "a")[0] == ours
    assert load_settings(tmp_path / "a").keep == 9

def test_another_tools_file_in_another_encoding_is_passed_over(ini, tmp_path):
    ours = ini("[trainkit]\nkeep = 9\n")
    (tmp_path / "a").mkdir()
    for raw in "[app]\nname = Jürgen\n".encode("latin-1"), "[app]\nname = x\n".encode("utf-16"), bytes(range(256)):
        (tmp_path / "a" / "settings.ini").write_bytes(raw)
        assert find_settings(tmp_path / "a")[0] == ours

def test_line_ends_of_another_system(tmp_path):
    (tmp_path / "settings.ini").write_bytes(b"[trainkit]\r\nkeep = 9\r\n\r\n[optimizer]\r\nname = sgd\r\n")
    settings = load_settings(tmp_path)
    assert (settings.keep, settings.optimizer.name) == (9, "sgd")

def test_how_files_are_written(ini, tmp_path):
    ini("\ufeff# a comment\n[trainkit]\nRUNS = my runs/50%   ; another\nseed:3\n\n[optimizer]\nbetas = .5 .999\n")
    settings = load_settings(tmp_path)
    assert (settings.runs, settings.seed, settings.optimizer.betas) == ("my runs/50%", 3, (0.5, 0.999))

BAD = [  # section, key, text, a part of what is accepted
    ("trainkit", "device", "", "auto"), ("trainkit", "precision", "fp64", "fp32, bf16, fp16"),
    ("trainkit", "channels_last", "maybe", "auto, yes, no"), ("trainkit", "batch_size", "0", ">= 1"),
    ("trainkit", "batch_size", "1.5", "whole"), ("trainkit", "seed", "-1", "empty"),
    ("trainkit", "seed", str(2**32), "4294967295"), ("trainkit", "runs", "", "folder"),
    ("trainkit", "save_every", "0", "epoch"), ("trainkit", "save_every", "sometimes", "epoch"),
    ("trainkit", "keep", "1", ">= 2"), ("trainkit", "mode", "median", "min"), ("trainkit", "refresh", "0", "> 0"),
    ("trainkit", "refresh", "inf", "> 0"), ("optimizer", "lr", "-1e-3", ">= 0"), ("optimizer", "lr", "nan", ">= 0"),
    ("optimizer", "lr", "", ">= 0"), ("optimizer", "weight_decay", "-1", ">= 0"),
    ("optimizer", "betas", "0.9", "two of"), ("optimizer", "betas", "0.9, 1", "f < 1"),
    ("optimizer", "betas", "0.1 0.2 0.3", "two of"), ("optimizer", "momentum", "lots", ">= 0"),
    ("optimizer", "fused", "1", "auto"), ("scheduler", "warmup", "1.0", "f < 1"),
    ("scheduler", "warmup", "-5", ">= 0"), ("scheduler", "total", "0", ">= 1"), ("scheduler", "name", "", "cosine")]

@pytest.mark.parametrize("section, key, text, accepted", BAD)
def test_a_bad_value_names_place_section_key_and_the_accepted(section, key, text, accepted, ini, tmp_path, monkeypatch):
    variable = f"TRAINKIT_{key}" if section == "trainkit" else f"TRAINKIT_{section}_{key}"
    path = ini(f"[{section}]\n{key} = {text}\n")
    with pytest.raises(SettingsError) as from_file:
        load_settings(tmp_path)
    path.unlink()
    monkeypatch.setenv(variable.upper(), text)
    with pytest.raises(SettingsError) as from_environment:
        load_settings(tmp_path)
    for raised, place in (from_file, str(path)), (from_environment, variable.upper()):
        for part in place, f"[{section}] {key}", repr(text), accepted:
            assert part in str(raised.value)

@pytest.mark.parametrize("override", [
    {"batch_size": True}, {"batch_size": 1.5}, {"seed": -1}, {"refresh": math.inf}, {"optimizer_lr": math.nan},
    {"optimizer_betas": (0.5,)}, {"optimizer_betas": 0.5}, {"scheduler_warmup": 2.5}, {"runs": ""}, {"runs": "a\nb"}])
def test_a_bad_argument(override, tmp_path):
    with pytest.raises(SettingsError, match="argument"):
        load_settings(tmp_path, **override)

def test_arguments_are_objects(tmp_path):
    settings = load_settings(tmp_path, runs=Path("a") / "b", channels_last=False, optimizer_betas=[0.5, 0.9],
                             save_every=100, scheduler_warmup=0.1, seed=None)
    assert (Path(settings.runs), settings.channels_last, settings.optimizer.betas) == (Path("a/b"), "no", (0.5, 0.9))
    assert (settings.save_every, settings.scheduler.warmup, settings.seed) == (100, 0.1, None)
    assert settings.source("trainkit", "seed") == "default"  # None is: not given

@pytest.mark.parametrize("key", ["save_every", "front"])
def test_none_is_none_where_none_is_a_value(key, ini, tmp_path):
    path = ini(f"[trainkit]\n{key} = None\n")
    by_file, by_argument = load_settings(tmp_path), load_settings(tmp_path, **{key: None})
    assert getattr(by_file, key) == getattr(by_argument, key) == "none"
    assert (by_file.source("trainkit", key), by_argument.source("trainkit", key)) == (str(path), "argument")

def test_none_elsewhere_is_not_given(tmp_path):
    names = [name if section == "trainkit" else f"{section}_{name}" for section, name in KEYS]
    rest = {name: None for name in names if name not in ("save_every", "front")}
    settings = load_settings(tmp_path, **rest)
    assert settings == Settings() and {settings.source(*key) for key in KEYS} == {"default"}

def test_blame_says_where_a_value_came_from(ini, tmp_path, monkeypatch):
    path = ini("[trainkit]\ndevice = gpu\nkeep = 5\n[optimizer]\nname = adamm\n")
    monkeypatch.setenv("TRAINKIT_FRONT", "nowhere")
    settings = load_settings(tmp_path, scheduler_name="cosin", keep=7)
    assert settings.blame("optimizer", "name") == f" (settings: {path} [optimizer] name)"
    assert settings.blame("trainkit", "device") == f" (settings: {path} [trainkit] device)"
    assert settings.blame("trainkit", "front") == " (settings: environment TRAINKIT_FRONT [trainkit] front)"
    for key in ("scheduler", "name"), ("trainkit", "keep"), ("trainkit", "seed"):  # arguments, a default
        assert settings.blame(*key) == ""
    with pytest.raises(KeyError, match="trainkit device"):
        settings.blame("trainkit", "devise")

@pytest.mark.parametrize("text, parts", [
    ("[trainkit]\nprecison = bf16\n", ["'precison'", "[trainkit]", "nearest first: precision"]),
    ("[optimizer]\nlerning_rate = 1\n", ["'lerning_rate'", "[optimizer]", "betas", "lr"]),
    ("[optimizer]\ndevice = cpu\n", ["'device'", "[optimizer]"]),
    ("[trainkit]\noptimizer = adam\n", ["'optimizer'", "[trainkit]"]),
    ("[trainkit]\n_sources = 1\n", ["'_sources'"]),
    ("[optimiser]\nlr = 1\n", ["[optimiser]", "nearest first: optimizer"]),
    ("[trainkit]\nkeep = 3\n[model]\n", ["[model]", "trainkit", "optimizer", "scheduler"]),
    ("[trainkit]\nkeep = 3\n[DEFAULT]\nkeep = 4\n", ["[DEFAULT]"]),
    ("[trainkit]\nkeep = 3\nkeep = 4\n", ["keep", "already exists"]),
    ("[trainkit]\nkeep\n", ["not a settings file"]),
    ("keep = 3\nSEED: 4  # ours alone\n", ["not a settings file", "no section headers"]),  # the header was forgotten
    ("  [Optimiser] ; misspelt\nlr = 1\n", ["[Optimiser]", "nearest first: optimizer"]),
    ("[app]\na = 1\na = 2\n[scheduler]\nwarmup = 2\n", ["not a settings file", "already exists"]),
    ("[trainkit]\ndevice = auto\n  keep = 4\n", ["[trainkit] device", "keep = 4"])])
def test_a_file_that_is_wrong(text, parts, ini, tmp_path):
    path = ini(text)
    with pytest.raises(SettingsError) as raised:
        load_settings(tmp_path)
    for part in str(path), *parts:
        assert part in str(raised.value)

def test_a_file_that_is_no_text(tmp_path):
    (tmp_path / "settings.ini").write_bytes(b"[trainkit]\nruns = \xff\xfe\n")
    with pytest.raises(SettingsError, match="not a settings file"):
        load_settings(tmp_path)

def test_unknown_names_in_environment_and_arguments(tmp_path, monkeypatch):
    with pytest.raises(SettingsError, match="argument: unknown key 'kep'.*nearest first: keep"):
        load_settings(tmp_path, kep=3)
    with pytest.raises(SettingsError, match=r"argument: unknown key 'learning' in \[optimizer\]"):
        load_settings(tmp_path, optimizer_learning=3)
    monkeypatch.setenv("TRAINKIT_SCHEDULER_WARM_UP", "3")
    with pytest.raises(SettingsError, match=r"TRAINKIT_SCHEDULER_WARM_UP: unknown key 'warm_up'.*first: warmup"):
        load_settings(tmp_path)

def test_source_of_an_unknown_key():
    with pytest.raises(KeyError, match="optimizer lr"):
        Settings().source("optimizer", "lrr")

def test_the_table_shows_every_value_and_its_source(ini, tmp_path):
    lines = repr(load_settings(tmp_path, keep=5)).splitlines()
    assert len(lines) == len(KEYS)
    keep, = (line for line in lines if "] keep " in line)
    assert keep.split() == ["[trainkit]", "keep", "5", "argument"]

def test_frozen_comparable_hashable_picklable(tmp_path):
    settings = load_settings(tmp_path, keep=5)
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.keep = 6
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.optimizer.lr = 6.0
    assert settings == Settings(keep=5) != Settings()
    assert hash(settings) == hash(Settings(keep=5))
    back = pickle.loads(pickle.dumps(settings))
    assert back == settings and back.source("trainkit", "keep") == "argument"

finite = st.floats(0, 1e300, allow_nan=False)
below_one = st.floats(0, 1, exclude_max=True)

@given(batch_size=st.integers(1, 10**9), seed=st.none() | st.integers(0, 2**32 - 1), keep=st.integers(2),
       save_every=st.sampled_from(["epoch", "none"]) | st.integers(1), optimizer_lr=finite,
       optimizer_betas=st.none() | st.tuples(below_one, below_one), optimizer_weight_decay=st.none() | finite,
       scheduler_warmup=st.integers(0) | below_one, scheduler_total=st.none() | st.integers(1))
def test_every_way_in_reads_the_same(tmp_path_factory, **given):
    "What is written into a file as text comes back equal to what is given as an argument, floats to the last bit."
    empty = tmp_path_factory.mktemp("empty")
    by_argument = load_settings(empty, **given)
    lines = {"trainkit": [], "optimizer": [], "scheduler": []}
    for name, value in given.items():
        section, _, key = name.partition("_")
        section, key = (section, key) if section in lines else ("trainkit", name)
        lines[section].append(f"{key} = {as_text(value)}")
    folder = tmp_path_factory.mktemp("full")
    (folder / "settings.ini").write_text("\n".join(f"[{s}]\n" + "\n".join(rows) for s, rows in lines.items()))
    by_file = load_settings(folder)
    assert by_file == by_argument
    assert by_argument.optimizer.lr == given["optimizer_lr"]
    assert by_argument.scheduler.warmup == given["scheduler_warmup"]
