"The speech tutorial: its notebook and its script say the same, and what its stored outputs claim holds."

import csv
import re
import runpy
from pathlib import Path

import nbformat
import torch
from tutorials import moved, outputs, said_by, shortened, text_of

ROOT = Path(__file__).parents[1]
NOTEBOOK, SCRIPT = ROOT / "nbs/tutorials/11_speech.ipynb", ROOT / "examples/speech.py"
SHORTER = {'SHORT = {"epochs": 6, "samples": 160,': 'SHORT = {"epochs": 2, "samples": 64,',
           "SEEDS, TUNING = SHORT, (0, 1), 24": "SEEDS, TUNING = SHORT, (0,), 2",
           '{"files": 160, "steps": 160}': '{"files": 8, "steps": 8}'}  # fmt: skip
SAID = r"SI-SDR of an unheard voice: ([+-][\d.]+) dB in music, ([+-][\d.]+) dB in babble"
MEANS = r"^\| (music|babble) \| (\d+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$"


def test_notebook_and_script_say_the_same(tmp_path):
    nb = shortened(NOTEBOOK, SHORTER, here := tmp_path / "notebook")
    said = text_of(nb)
    ours = said_by(SCRIPT, "--epochs", "2", "--samples", "64", "--run", "runs/speech", cwd=tmp_path)
    assert re.search(SAID, ours)[0] == re.search(SAID, said)[0]
    assert (means := re.findall(MEANS, ours, re.MULTILINE)) == re.findall(MEANS, said, re.MULTILINE) != []
    assert all(float(gain) > 0.2 for gain in re.search(SAID, ours).groups()), "three seeds gave +0.39 to +0.82 dB"
    for kind, files, snr, noisy, found, *_ in re.findall(MEANS, ours, re.MULTILINE):
        with (tmp_path / "runs/speech/metrics/test" / f"{kind}.csv").open(newline="") as file:
            rows = [*csv.DictReader(file)]
        assert len(rows) == int(files) == 16 and {row["snr"] for row in rows} == {"-3.0", "0.0", "3.0", "6.0"}
        for name, mean in ("snr", snr), ("noisy", noisy), ("si_sdr", found):
            assert abs(sum(float(row[name]) for row in rows) / len(rows) - float(mean)) < 0.006, name
        for part in "test", "step-16", "step-32":
            tables = [folder / f"runs/speech/metrics/{part}/{kind}.csv" for folder in (here, tmp_path)]
            assert tables[0].read_text() == tables[1].read_text() != ""
    assert re.findall(MEANS, (tmp_path / "runs/speech/metrics/test/means.md").read_text(), re.MULTILINE) == means
    assert len([*(here / "runs/speech/enhanced").glob("*.wav")]) == 32


def test_the_full_recipe():
    "Two steps of the paper's network, with the data and settings of the recipe, one mixture at a time."
    functions = runpy.run_path(str(SCRIPT))
    size = {**functions["FULL"], "batch": 1, "samples": 4}
    learn = functions["make"](functions["sets"]({**size, "files": 1}), size, seed=0, front="none")
    assert sum(p.numel() for p in learn.model.parameters()) > 5e6, "as large as the paper's"
    assert moved(learn, 2) > 0.8
    assert learn.model(torch.zeros(1, 8000)).shape == (1, 8000)


def test_the_stored_notebook():
    "What a reader sees: a voice that was never heard, more than a decibel cleaner, from two seeds."
    nb = nbformat.read(NOTEBOOK, as_version=4)
    said = text_of(nb)
    ideal = re.search(r"ideal ratio mask: \+([\d.]+) dB in music, \+([\d.]+) dB in babble", said)
    trained = re.findall(r"^[01] +trained +([\d.]+) +([\d.]+) +(\S+) +(\S+)$", said, re.MULTILINE)
    assert len(trained) == 2
    for _, _, music, babble in trained:
        assert 1.5 < float(music) < float(ideal[1]) and 1.0 < float(babble) < float(ideal[2])
    best = [*map(float, re.search(SAID, said).groups())]
    assert best[0] > 1.5 and best[1] > 1
    means = {row[0]: row[1:] for row in re.findall(MEANS, said, re.MULTILINE)}
    for kind, gain in zip(("music", "babble"), best):
        assert abs(float(means[kind][3]) - float(means[kind][2]) - gain) < 0.02
    tuned = re.findall(r"^ +\+ steps( with a critic)? +([\d.]+) +([\d.]+) +(\S+) +(\S+)$", said, re.MULTILINE)
    controls, critics = ([[*map(float, row[1:3])] for row in tuned if bool(row[0]) is critic] for critic in (False, True))
    changes = [b - a for pair in zip(controls, critics) for a, b in zip(*pair)]
    higher, of, mean = re.search(r"STOI is higher in (\d) of (\d) comparisons, by ([+-][\d.]+) on average", said).groups()
    assert (int(of), sum(c > 0 for c in changes)) == (len(changes), int(higher)) and abs(sum(changes) / 4 - float(mean)) < 2e-4
    taught, mean = map(float, re.search(r"it hasn't heard: ([\d.]+); of one who says the mean: ([\d.]+)", said).groups())
    assert taught < 0.6 * mean, "the critic knows more than a number"
    masks, network = map(float, re.findall(r"^the (?:masks|network) changed STOI .* has correlation (\S+)$", said, re.MULTILINE))
    assert masks > 0.6 and abs(network) < masks / 2
    halves = re.search(r": (\S+) in the first half .*, (\S+) in the second; of one who says the mean: (\S+)", said)
    first, second, mean = map(float, halves.groups())
    assert max(first, second) < 0.8 * mean
    assert len(outputs(nb, "image/png")) >= 2 and outputs(nb, "text/html")[-1].count("<audio") == 3
    assert NOTEBOOK.stat().st_size < 400_000
