"Recordings and mixtures: files against the standard library, ratios against their definition, the same mixtures after a resume."

import subprocess
import sys
import wave
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader

from trainkit.learner import Learner
from trainkit.seeds import SeededStream
from trainkit.speech import data as sd

torch.set_num_threads(1)
rng = np.random.default_rng(0)
CLIPS = {name: torch.from_numpy(rng.normal(size=n).astype("f4")) for name, n in [("a", 3000), ("b", 9000), ("c", 20000)]}
NOISES = {"one": {"x": 0.2 * torch.randn(30000)}, "two": {"y": 3 * torch.randn(25000), "z": torch.randn(40000)}}


def ratio(clean, noise):
    "10 log10 of the powers, by NumPy."
    return 10 * np.log10((clean.double().numpy() ** 2).mean(-1) / (noise.double().numpy() ** 2).mean(-1))


def test_every_voice_and_track_is_there():
    voices = {voice: sd.recordings(voice) for voice in sd.VOICES}
    for voice, clips in voices.items():
        lengths = np.array([len(clip) for clip in clips.values()]) / sd.RATE
        assert len(clips) > 250 and lengths.min() >= 1 and lengths.sum() > 15 * 60, voice
        assert not set(clips) & set(sd.NOT_SPEECH)
        assert all(clip.abs().max() <= 1 and sd.level(clip) > 0 for clip in clips.values())
    assert len(set.intersection(*map(set, voices.values()))) > 200, "the same announcements in every language"
    assert not torch.equal(voices["june"]["vm-intro"], voices["allison"]["vm-intro"])
    assert all(len(track) > 60 * sd.RATE for track in sd.music().values())


def test_read_as_the_standard_library_does(tmp_path):
    path = sd.sounds_folder("moh") / "manolo_camp-morning_coffee.wav"
    with wave.open(str(path)) as file:
        numbers = np.frombuffer(file.readframes(1000), "<i2")
    assert np.array_equal(sd.read_wav(path)[:1000].numpy() * 32768, numbers)
    sd.write_wav(tmp_path / "x.wav", torch.from_numpy(numbers.astype(np.float32)) / 32768)
    assert np.array_equal(sd.read_wav(tmp_path / "x.wav").numpy() * 32768, numbers)
    with wave.open(str(tmp_path / "stereo.wav"), "wb") as file:
        file.setnchannels(2), file.setsampwidth(2), file.setframerate(8000), file.writeframes(b"\0" * 8)
    with pytest.raises(ValueError, match="2 channels of 16 bits at 8000 Hz"):
        sd.read_wav(tmp_path / "stereo.wav")
    with pytest.raises(ValueError, match=r"samples \(n,\)"):
        sd.write_wav(tmp_path / "y.wav", torch.zeros(2, 8))


def test_where_there_are_no_recordings(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"tools/recordings\.sh .* asterisk-core-sounds-en-wav .*-moh-opsound-wav"):
        sd.sounds_folder("moh", [tmp_path])
    (tmp_path / "usr/share/asterisk/moh").mkdir(parents=True)
    assert sd.sounds_folder("moh", ["/nowhere", tmp_path]) == tmp_path / "usr/share/asterisk/moh"
    with pytest.raises(ValueError, match="there is no track 'reno', did you mean|There are: macroform"):
        sd.music(["reno"])


@settings(max_examples=25, deadline=None)
@given(st.floats(-30, 40), st.integers(1, 500), st.integers(0, 2**20))
def test_the_ratio_is_what_was_asked_for(snr, n, seed):
    g = torch.Generator().manual_seed(seed)
    clean, noise = torch.randn(2, 3, n, generator=g).double()
    noise *= 7
    np.testing.assert_allclose(ratio(clean, sd.mix(clean, noise, snr) - clean), snr, atol=1e-6)


def test_ratios_of_a_batch_and_silence():
    clean, noise = torch.randn(2, 3, 100)
    snrs = torch.tensor([-5.0, 0.0, 10.0])
    np.testing.assert_allclose(ratio(clean, sd.mix(clean, noise, snrs) - clean), snrs, atol=1e-4)
    for pair in (clean, noise * torch.tensor([[1.0], [0], [1]])), (0 * clean, noise):
        with pytest.raises(ValueError, match="silence"):
            sd.mix(*pair, 0.0)


def test_the_split_is_by_sentence():
    sides = [sd.split_recordings(sd.recordings(voice)) for voice in sd.VOICES]
    train, held = (set().union(*(side[i] for side in sides)) for i in (0, 1))
    assert not train & held and 20 < len(held) < len(train) / 4


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 60), st.integers(1, 60), st.integers(0, 2**20))
def test_the_loudest_piece(m, n, seed):
    x = torch.randn(m, generator=torch.Generator().manual_seed(seed))
    start = sd.loudest(x, n)
    powers = [float(x[i : i + n].double().square().sum()) for i in range(max(m - n, 0) + 1)]
    assert powers[start] >= max(powers) - 1e-9 and len(sd.piece(x, n, start)) == n


def test_pieces_have_as_much_speech_as_was_asked_for():
    pauses = torch.cat([torch.randn(2000), 0.001 * torch.randn(30000), torch.randn(6000)])
    data = sd.NoisySpeech({"pauses": pauses, "mute": pauses[2000:34000]}, NOISES, length=40, seconds=1.0, spoken=0.5)
    assert len(data.clips) == 1, "the other has a quarter of a second of sound"
    torch.manual_seed(0)
    for _, clean in (data[i] for i in range(40)):
        frames = clean.numpy().reshape(40, 200)
        powers = (frames**2).sum(1)
        assert (powers > 1e-4 * powers.max()).sum() * 0.025 >= 0.5
    with pytest.raises(ValueError, match=r"no clip has 1.0 seconds of which spoken=0.9"):
        sd.NoisySpeech({"pauses": pauses}, NOISES, seconds=1.0, spoken=0.9)


def test_mixtures_keep_their_promises():
    data = sd.NoisySpeech(CLIPS, NOISES, length=60, seconds=1.0, snr=(-3, 6))
    torch.manual_seed(0)
    found = np.array([ratio(clean, noisy - clean) for noisy, clean in (data[i] for i in range(60))])
    assert found.min() >= -3.01 and found.max() <= 6.01 and found.std() > 1.5, "uniform: a standard deviation of 2.6"
    short = sd.NoisySpeech({"a": CLIPS["a"]}, NOISES, length=3, seconds=1.0)[0][1]
    assert torch.equal(short[:3000], CLIPS["a"]) and not short[3000:].any()
    with pytest.raises(IndexError):
        data[60]


@pytest.mark.parametrize("workers", [0, 2])
def test_the_same_mixtures_after_a_resume(workers):
    "Whatever the number of workers, and in the middle of an epoch."
    data = sd.NoisySpeech(CLIPS, NOISES, length=24, seconds=0.5)
    whole = SeededStream(DataLoader(data, 4, shuffle=True), seed=3)
    torch.manual_seed(0)  # of the order
    epochs = [[noisy for noisy, _ in whole] for _ in range(2)]
    assert not torch.equal(torch.cat(epochs[0]), torch.cat(epochs[1]))
    first = SeededStream(DataLoader(data, 4, shuffle=True), seed=3)
    torch.manual_seed(0)
    for i, _ in enumerate(first):
        if i == 2:
            break
    other = SeededStream(DataLoader(data, 4, shuffle=True, num_workers=workers), seed=3)
    other.load_state_dict(first.state_dict())
    rest = [noisy for noisy, _ in other]
    assert torch.equal(torch.cat(rest), torch.cat(epochs[0][3:]))


def test_a_run_goes_on_with_the_mixtures_it_would_have_had(tmp_path):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv1d(1, 1, 9, padding=4)

        def forward(self, x):
            return self.conv(x[:, None])[:, 0]

    def make(run=None):
        torch.manual_seed(0)  # of the weights
        data = sd.NoisySpeech(CLIPS, NOISES, length=20, seconds=0.25)
        return Learner(Net(), DataLoader(data, 4), "mse", seed=1, run=run, front="none")

    straight, broken = make(), make(tmp_path / "run")
    straight.fit(steps=13)
    broken.fit(steps=7)
    broken.save()
    again = make(tmp_path / "run")
    again.restore("last")
    again.fit(steps=6)
    assert all(torch.equal(a, b) for a, b in zip(straight.model.parameters(), again.model.parameters()))


def test_fixed_mixtures_follow_from_names():
    sounds = NOISES["two"]
    fixed = sd.FixedMixtures(CLIPS, sounds, seconds=1.0, snrs=(-3, 9))
    assert fixed.names == ["b", "c"] and fixed.snrs == [-3, 9], "a is too short"
    for (noisy, clean), snr, name in zip(fixed, fixed.snrs, fixed.names):
        assert abs(ratio(clean, noisy - clean) - snr) < 1e-3
        assert torch.equal(clean, CLIPS[name][(i := sd.loudest(CLIPS[name], 8000)) : i + 8000])
    torch.manual_seed(9)
    alone = sd.FixedMixtures({"c": CLIPS["c"]}, sounds, seconds=1.0, snrs=(9,))
    assert torch.equal(alone[0][0], fixed[1][0])


def test_bad_sets_are_named():
    for wrong, match in (
        (lambda: sd.NoisySpeech({}, NOISES), r"clips must be sounds .*; received none"),
        (lambda: sd.NoisySpeech({"s": torch.zeros(9000)}, NOISES), "aren't silent"),
        (lambda: sd.NoisySpeech(CLIPS, {"k": {"x": torch.ones(10)}}), "noises of the kind 'k'"),
        (lambda: sd.NoisySpeech(CLIPS, NOISES, length=0), "length=0"),
        (lambda: sd.FixedMixtures(CLIPS, NOISES["one"], seconds=3.0), "none of 3 recordings has 3.0 seconds"),
        (lambda: sd.FixedMixtures(CLIPS, NOISES["one"], snrs=()), "snrs= is empty"),
        (lambda: sd.babble([CLIPS], talkers=0), "talkers=0"),
    ):
        with pytest.raises(ValueError, match=match):
            wrong()


def test_importing_loads_neither_notebook_nor_plots():
    code = ("import sys, trainkit.speech.data, trainkit.speech.features, trainkit.speech.models, trainkit.speech.metrics\n"
            "print([m for m in ('matplotlib', 'IPython', 'pandas', 'scipy', 'torchmetrics') if m in sys.modules])")  # fmt: skip
    said = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert said.stdout.strip() == "[]"
