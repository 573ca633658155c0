"The super-resolution tutorial: its notebook and its script say the same, also when killed, and its stored claims hold."

import re
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
import torch
from torch import nn
from tutorials import cpu_minutes, pictures, shortened, text_of

from trainkit.gan.features import Perceptual
from trainkit.sr.data import unit
from trainkit.sr.tiles import upscale_tiled
from trainkit.sr.vgg import VGG

ROOT = Path(__file__).parents[1]
NOTEBOOK, SCRIPT = ROOT / "nbs/tutorials/10_super_resolution.ipynb", ROOT / "examples/super_resolution.py"
RATES, STEPS, EVERY = {0: 1e-3, 120: 5e-4, 170: 1e-4}, 200, 100
MARGIN = 0.8  # dB on Y by which EDSR has to beat bicubic with a = -½, as the notebook says
SHORTER = {  # a line of the notebook -> the same one for a short run
    '"every": 200,': f'"every": {EVERY},',
    '"rates": {0: 1e-3, 500: 5e-4, 800: 1e-4}, "steps": 1000}': f'"rates": {RATES}, "steps": {STEPS}}}',
    '"rates": {0: 5e-3, 500: 2e-3, 700: 5e-4}, "steps": 800}': '"rates": {0: 5e-3}, "steps": 100}',
    '"rates": {0: 1e-3, 600: 5e-4, 800: 1e-4}, "steps": 1000}': '"rates": {0: 1e-3}, "steps": 100}',
    '"rates": {0: 2e-4, 70: 5e-5}, "steps": 100, "every": 50}': '"rates": {0: 2e-4}, "steps": 10, "every": 10}',
    '"look": {"widths": (16, 32, 64), "steps": 200}': '"look": {"widths": (8, 16, 32), "steps": 20}',
}
SAID = r"([\d.]+) dB on Y, ([\d.]+) dB in colour; beside bicubic ([+-][\d.]+) dB \(a = -½\)"


def module() -> dict:
    "The script's functions."
    return runpy.run_path(str(SCRIPT))


def started(*args, cwd):
    return subprocess.Popen([sys.executable, SCRIPT, *args], cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def script(*args, cwd):
    process = started(*args, cwd=cwd)
    said, problems = process.communicate()
    assert process.returncode == 0, problems
    return said


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    "The notebook, run with smaller numbers: its folder and what it printed."
    folder = tmp_path_factory.mktemp("notebook")
    return folder, shortened(NOTEBOOK, SHORTER, folder, timeout=600)


def test_the_notebook_in_short(done):
    folder, nb = done
    said = text_of(nb)
    assert "step 151: the power is gone\ncheckpoint '100': step 100" in said, "it broke off, and went on from the last"
    assert "the same weights, bit by bit: True" in said, "as those of a run without a break"
    assert pictures(nb) >= 3 and re.search(r"below 1e-5.*: True", said)
    assert re.search(r"EDSR beats bicubic by ([\d.]+) dB", said) and len(re.findall(r" to SRGAN\S*.*: [+-]", said)) == 3
    for name in ("edsr", "wdsr", "srresnet", "srresnet-gan", "edsr-gan", "wdsr-gan"):
        assert len([*(folder / "runs/super-resolution" / name / "checkpoints").glob("*.pt")]) >= 1, name
    ours = float(re.search(rf"EDSR: best at step \d+, {SAID}", said)[3])
    assert ours > 0.3, "two seeds gave +0.57 and +0.60"


def weights_in(run: Path) -> dict[str, torch.Tensor]:
    "Of the last checkpoint in a run's folder."
    last = max((run / "checkpoints").glob("ckpt-*.pt"))
    return torch.load(last, weights_only=True)["state"]["players"]["model"]["modules"]["model"]


def test_killed_it_goes_on_by_itself(done, tmp_path):
    "The script, killed behind its first checkpoint and started again, has in the end what a run without a break has."
    functions = module()
    size = {**functions["SHORT"], "every": EVERY}
    unbroken = functions["make"]("edsr", {**size, "edsr": {**size["edsr"], "rates": RATES}}, 0, None)
    unbroken.fit(steps=STEPS, validate_every=EVERY)

    said = re.search(rf"EDSR: best at step (\d+), {SAID}", text_of(done[1]))
    rates = [f"{step}:{rate}" for step, rate in RATES.items()]
    args = "edsr", "--run", "runs/killed", "--steps", str(STEPS), "--every", str(EVERY), "--rates", *rates
    first, began = started(*args, cwd=tmp_path), time.monotonic()
    while not [*(tmp_path / "runs/killed/checkpoints").glob("ckpt-*.json")]:
        assert first.poll() is None, first.communicate()
        assert time.monotonic() - began < 300, "no checkpoint"
        time.sleep(0.05)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    ours = script(*args, cwd=tmp_path)
    assert re.search(r"checkpoint '\d+': step \d00", ours), "it has gone on"
    assert re.search(rf"best at step (\d+)\n{SAID}", ours).groups() == said.groups()
    found = weights_in(tmp_path / "runs/killed")
    wanted = unbroken.model.state_dict()
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in found), "bit by bit"
    again = script(*args, cwd=tmp_path)
    assert again.splitlines()[-1] == ours.splitlines()[-1], "nothing is left to do"


def test_srgan_and_a_picture(tmp_path):
    from PIL import Image

    torch.manual_seed(0)
    torch.save(VGG("relu2_1", (1, 1), (4, 4)).state_dict(), tmp_path / "vgg.pth")
    script("srresnet", "--steps", "2", "--every", "2", "--run", "runs/pixels", cwd=tmp_path)
    picture = torch.randint(256, (40, 33, 3), dtype=torch.uint8)
    Image.fromarray(picture.numpy()).save(tmp_path / "small.png")
    said = script("srresnet", "--steps", "2", "--every", "2", "--run", "runs/gan", "--pretrained", "runs/pixels",
                  "--vgg", "vgg.pth", "--layer", "relu2_1", "--enlarge", "small.png", "large.png", cwd=tmp_path)  # fmt: skip
    assert "best at" not in said and re.search(SAID, said) and "large.png: 66 × 80" in said
    functions = module()
    content = functions["content_by"](tmp_path / "vgg.pth", None, "relu2_1")
    assert [*content] == ["seen"] and content["seen"][1] == pytest.approx(0.006, abs=2e-4), "the paper's, and no term of pixels"
    generator = functions["network"]("srresnet", functions["SHORT"])
    state = torch.load(next((tmp_path / "runs/gan/checkpoints").glob("*.pt")), weights_only=True)["state"]
    generator.load_state_dict(state["players"]["generator"]["modules"]["generator"])
    with Image.open(tmp_path / "large.png") as image:
        large = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).reshape(80, 66, 3)
    wanted = upscale_tiled(generator, unit(picture.permute(2, 0, 1))).permute(1, 2, 0).clamp(0, 1) * 255
    assert (large.float() - wanted).abs().max() < 0.51
    refused = started("edsr", "--vgg", "vgg.pth", cwd=tmp_path)
    assert "go together" in refused.communicate()[1] and refused.returncode == 2


def test_the_script_says_of_srgan_what_the_table_says(done, tmp_path):
    "Both judge its last weights, and the notebook's stand-in is what looks."
    folder, nb = done
    runs = folder / "runs/super-resolution"
    said = script("srresnet", "--steps", "10", "--every", "10", "--rates", "0:2e-4", "--pretrained", str(runs / "srresnet"),
                  "--looks", str(runs / "looks.pth"), cwd=tmp_path)  # fmt: skip
    row = tables(text_of(nb))["SRGAN"]
    assert [float(n) for n in re.search(SAID, said).groups()[:2]] == pytest.approx([row["PSNR-Y"], row["PSNR"]], abs=0.0051)
    assert not [*tmp_path.iterdir()], "without --run nothing is written"


def test_full_networks_fit_their_data():
    "A step of each, with two crops in a batch; VGG-19 has random weights."
    functions = module()
    size = {**functions["FULL"], "batch": 2}
    torch.manual_seed(0)
    looks = Perceptual(VGG("relu5_4"))
    assert sum(isinstance(m, nn.Conv2d) for m in looks.network.modules()) == 16
    for name, parameters in {"edsr": 1_517_571, "wdsr": 615_088, "srresnet": 1_550_000}.items():  # the first two are krasserm's
        learn = functions["make"](name, size, 0, None)
        assert sum(p.numel() for p in learn.model.parameters()) == pytest.approx(parameters, rel=0.01)
        learn.fit(steps=1)
    gan = functions["make_gan"]("srresnet", size, 0, None, learn.model.state_dict(), {"seen": (looks, 1 / 12.75**2)})
    before = [p.detach().clone() for p in gan.generator.parameters()]
    gan.fit(steps=1)
    assert all(torch.isfinite(p).all() and not torch.equal(p, b) for p, b in zip(gan.generator.parameters(), before))


def test_script_and_notebook_have_the_same_recipes():
    sizes = {}
    for source in (SCRIPT.read_text(), "\n".join(c.source for c in nbformat.read(NOTEBOOK, as_version=4).cells)):
        for name in ("SHORT", "FULL"):
            found = eval(re.search(rf"^{name} = (\{{.*?^\}})", source, re.MULTILINE | re.DOTALL)[1])
            found.pop("look", None)
            assert sizes.setdefault(name, found) == found, name


def tables(said: str) -> dict[str, dict[str, float]]:
    "The rows of the large table."
    columns = ["parameters", "PSNR-Y", "SSIM-Y", "PSNR", "SSIM", "sharpness", "seen", "judged"]
    header = re.search(r"^ +parameters .* judged$", said, re.MULTILINE)
    assert header[0].split() == columns
    rows = re.findall(r"^(.+?)  +(\d+ +[\d.]+ +[\d. ]+)$", said[header.end() :], re.MULTILINE)
    return {name: dict(zip(columns, map(float, numbers.split()))) for name, numbers in rows}


def test_the_stored_notebook():
    "What a reader sees: the margin that the project states, and a table from which the sentences below it follow."
    nb = nbformat.read(NOTEBOOK, as_version=4)
    said = text_of(nb)
    table = tables(said)
    networks = ["EDSR", "WDSR-B", "SRResNet", "SRGAN", "SRGAN, EDSR", "SRGAN, WDSR-B"]
    assert [*table] == ["bicubic, a = -½", "bicubic, a = -¾", *networks]
    matlab, other = (table[f"bicubic, a = -{a}"] for a in "½¾")
    assert matlab["PSNR-Y"] == pytest.approx(32.720, abs=0.002) and matlab["SSIM-Y"] == pytest.approx(0.906, abs=0.001)
    assert table["EDSR"]["PSNR-Y"] - matlab["PSNR-Y"] >= MARGIN, "the margin that is stated"
    assert f"the margin, {MARGIN} dB over a = -½, is reached: True" in said and "the same weights, bit by bit: True" in said
    assert f"{MARGIN} dB on Y over MATLAB's" in "".join(c.source for c in nb.cells if c.cell_type == "markdown")
    assert all(re.search(rf"^{name}: best at step \d+, ", said, re.MULTILINE) for name in ("EDSR", "WDSR-B", "SRResNet"))
    for name in ("EDSR", "WDSR-B"):
        for score in ("PSNR-Y", "SSIM-Y", "PSNR", "SSIM"):
            assert table[name][score] > max(matlab[score], other[score]), (name, score)
    stated = float(re.search(r"EDSR beats bicubic by ([\d.]+) dB", said)[1])
    assert stated == pytest.approx(table["EDSR"]["PSNR-Y"] - matlab["PSNR-Y"], abs=0.006)
    for before, after in (("SRResNet", "SRGAN"), ("EDSR", "SRGAN, EDSR"), ("WDSR-B", "SRGAN, WDSR-B")):
        assert table[after]["PSNR-Y"] < table[before]["PSNR-Y"] and table[after]["parameters"] == table[before]["parameters"]
        assert table[before]["sharpness"] + 0.1 < table[after]["sharpness"] < 1
        assert table[after]["seen"] < table[before]["seen"], "nearer for the network in the loss"
    far = float(re.search(r"largest difference ([\d.e+-]+);", said)[1])
    assert 0 <= far < 1e-5
    assert pictures(nb) >= 3 and NOTEBOOK.stat().st_size < 400_000 and cpu_minutes(nb) < 4.5
