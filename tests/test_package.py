"""The package: what tools/wheel.py finds wrong with an sdist or a wheel, and the names that a completion offers.

That the wheel works where nothing else is installed takes a minute and a half: `make wheel`.
"""
import importlib.util
import inspect
import io
import os
import pkgutil
import re
import subprocess
import sys
import tarfile
import types
import zipfile
from pathlib import Path

import pytest

import trainkit

ROOT = Path(__file__).resolve().parent.parent
SPEC = importlib.util.spec_from_file_location("trainkit_tools_wheel", ROOT / "tools" / "wheel.py")
wheel = sys.modules[SPEC.name] = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(wheel)

MODULES = [found.name for found in pkgutil.walk_packages(trainkit.__path__, "trainkit.")]
PROJECT = '''
[project]
name = "trainkit"
requires-python = ">=3.10"
license = "Apache-2.0"
license-files = ["LICENSE"]
dependencies = [
    "torch>=2.10",
]
[project.optional-dependencies]
cli = ["click>=8.1"]
'''
METADATA = """\
Metadata-Version: 2.4
Name: trainkit
Version: 0.1.0
License-Expression: Apache-2.0
Requires-Python: >=3.10
Description-Content-Type: text/markdown
License-File: LICENSE
Requires-Dist: torch>=2.10
Provides-Extra: cli
Requires-Dist: click>=8.1; extra == "cli"

# trainkit – and more
"""
INFO = "trainkit-0.1.0.dist-info"
ENTRY = "[console_scripts]\ntrainkit = trainkit.cli:main\n"


@pytest.fixture
def root(tmp_path):
    "A small project."
    files = {"pyproject.toml": PROJECT, "README.md": "# trainkit – and more\n", "trainkit/__init__.py": '__version__ = "0.1.0"\n',
             "trainkit/cli.py": "", "trainkit/part/one.py": "", "trainkit/py.typed": "", "LICENSE": "", "CHANGELOG.md": "",
             "MANIFEST.in": "", "examples/quickstart.py": ""}  # fmt: skip
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path


def wheel_of(root, **changes):
    "A wheel as it should be, with files changed, added, or (None) left out."
    files = {name: "" for name in wheel.package_files(root)}
    about = {"METADATA": METADATA, "entry_points.txt": ENTRY, "licenses/LICENSE": "", "RECORD": ""}
    files |= {f"{INFO}/{name}": text for name, text in about.items()}
    path = root / "x.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in (files | changes).items():
            if text is not None:
                archive.writestr(name, text)
    return path


def sdist_of(root, *more, without=()):
    names = {*wheel.package_files(root), *wheel.BESIDE, "examples/quickstart.py", "trainkit.egg-info/SOURCES.txt", *more}
    path = root / "x.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for name in names - set(without):
            archive.addfile(tarfile.TarInfo(f"trainkit-0.1.0/{name}"), io.BytesIO())
    return path


def test_what_is_as_it_should_be(root):
    assert wheel.wheel_problems(wheel_of(root), root) == []
    assert wheel.sdist_problems(sdist_of(root), root) == []


@pytest.mark.parametrize("name", ["tests/test_x.py", "nbs/00c_settings.ipynb", "benchmarks/loop.py", "trainkit/old.py", "x.txt"])
def test_what_has_no_business_there_is_found(name, root):
    assert wheel.wheel_problems(wheel_of(root, **{name: ""}), root) == [f"the wheel has {name}"]
    assert wheel.sdist_problems(sdist_of(root, name), root) == [f"the sdist has {name}"]


@pytest.mark.parametrize("name", ["trainkit/py.typed", "trainkit/part/one.py"])
def test_what_is_missing_is_found(name, root):
    assert wheel.wheel_problems(wheel_of(root, **{name: None}), root) == [f"the wheel lacks {name}"]
    assert wheel.sdist_problems(sdist_of(root, without=[name]), root) == [f"the sdist lacks {name}"]


@pytest.mark.parametrize("old, new, said", [
    ("Version: 0.1.0", "Version: 0.2.0", "its version is '0.2.0', not '0.1.0'"),
    ("Requires-Python: >=3.10", "Requires-Python: >=3.9", "requires-python is '>=3.9'"),
    ("Requires-Dist: torch>=2.10\n", "", "its requirements is [], not ['torch>=2.10']"),
    ("torch>=2.10", "torch", "its requirements is ['torch']"),
    ('Provides-Extra: cli\nRequires-Dist: click>=8.1; extra == "cli"\n', "", "its extras is []"),
    ("License-Expression: Apache-2.0\n", "", "its licence is None"),
    ("text/markdown", "text/plain", "README's type is 'text/plain'"),
    ("and more", "and less", "its README is"),
    ("Name: trainkit\n", "", "name"),
    ("License-Expression: Apache-2.0", "License-Expression: whatever", "license"),
    ("Requires-Python: >=3.10", "Requires-Python: soon", "soon"),
])  # fmt: skip
def test_what_it_says_of_itself_is_checked(old, new, said, root):
    assert METADATA.count(old) == 1
    found = wheel.wheel_problems(wheel_of(root, **{f"{INFO}/METADATA": METADATA.replace(old, new)}), root)
    assert len(found) == 1 and found[0].startswith("METADATA") and said in found[0], found


def test_a_lost_command_and_a_lost_licence_are_found(root):
    files = {f"{INFO}/entry_points.txt": "", f"{INFO}/licenses/LICENSE": None}
    assert [("licence file" in line, "command" in line) for line in wheel.wheel_problems(wheel_of(root, **files), root)] == \
           [(True, False), (False, True)]  # fmt: skip


def test_what_only_an_extra_asks_for():
    found = wheel.optional(ROOT)
    assert {"nbdev", "ipykernel", "matplotlib", "click", "accelerate", "pytorch-optimizer"} <= found
    assert not {"torch", "numpy"} & found


def test_a_command_that_fails_is_told_with_what_it_said(tmp_path):
    env = object.__new__(wheel.Environment)
    env.work, env.variables = tmp_path, {}
    assert env.run(sys.executable, "-c", "print(1)") == "1\n"
    with pytest.raises(wheel.Wrong, match="(?s)exit status 3.*what it said"):
        env.run(sys.executable, "-c", "print('what it said'); raise SystemExit(3)")


@pytest.mark.parametrize("code, said", [("1", "works, or pretends to"), ("import nothing_like_it", "says")])
def test_what_does_not_name_what_it_lacks_is_found(code, said):
    def tried(**needing):
        return subprocess.run([sys.executable, "-c", wheel.MISSED, wheel.json.dumps(needing)], capture_output=True, text=True)
    assert tried(nothing_like_it="import nothing_like_it", click="raise SystemExit('needs click')").returncode == 0
    wrong = tried(pandas=code)
    assert wrong.returncode == 1 and said in wrong.stderr


# --- what needs a system that isn't there ---------------------------------------------------------------------------------

def test_recordings_say_what_they_need(tmp_path):
    "Where there is no apt-get, in a few lines: what is missing, what to do, and what works without."
    command = ["/bin/bash", str(ROOT / "tools/recordings.sh"), str(tmp_path / "into"), "some-sounds", "more-sounds"]
    done = subprocess.run(command, env={"PATH": str(tmp_path)}, capture_output=True, text=True)
    assert done.returncode == 1 and not done.stdout and len(done.stderr.splitlines()) == 5
    for word in ("no apt-get", "Debian", f"touch {tmp_path}/into/.recordings", "some-sounds more-sounds", "make demo"):
        assert word in done.stderr
    assert subprocess.run(command[:3], capture_output=True).returncode == 2


# --- the Pythons it is tried with -------------------------------------------------------------------------------------

CUDA = ["jinja2", 'nvidia-cudnn-cu13==9.20; platform_system != "Nowhere" and python_version > "3.2"']


@pytest.fixture
def pythons(tmp_path, monkeypatch):
    "A PATH with a Python of this version, a stand-in that only complains, and one that can't make environments."
    own = f"3.{sys.version_info.minor}"
    scripts = {own: f'exec "{sys.executable}" "$@"', "3.98": "echo 'python3.98: command not found' >&2; exit 127",
               "3.99": f'exec "{sys.executable}" -S -c "import no_such_venv"'}  # fmt: skip
    for version, script in scripts.items():
        (tmp_path / f"python{version}").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / f"python{version}").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path / "pyenv"))
    return own


@pytest.mark.skipif(sys.platform == "win32", reason="its stand-ins are shell scripts")
def test_an_interpreter_is_one_that_works(pythons, tmp_path):
    assert wheel.interpreter_of(pythons) == str(tmp_path / f"python{pythons}")
    assert [wheel.interpreter_of(v) for v in ("3.97", "3.98", "3.99")] == [None] * 3
    (tmp_path / f"python{pythons}").rename(tmp_path / "away")
    (tmp_path / f"pyenv/versions/{pythons}.4/bin").mkdir(parents=True)
    (tmp_path / "away").rename(there := tmp_path / f"pyenv/versions/{pythons}.4/bin/python")
    assert wheel.interpreter_of(pythons) == str(there)


@pytest.mark.parametrize("requirements, brings", [
    ([], False), (["jinja2", "nvidia-ml-py; extra == 'x'"], False), (CUDA, True), (["cuda-bindings<14"], True),
    (["nvidia-nccl-cu13; python_version < '3.2'"], False), (["cuda-bindings; platform_system == 'Nowhere'"], False)])  # fmt: skip
def test_what_brings_cuda(requirements, brings):
    assert wheel.brings_cuda(requirements, "3.13") == brings


def test_other_pythons_are_tried_where_that_costs_little(monkeypatch, tmp_path, capsys):
    "The oldest and the newest, but for this one; what isn't tried is said in a line."
    versions = [f"3.{minor}" for minor in (1, sys.version_info.minor, 97, 98)]
    text = "".join(f'    "Programming Language :: Python :: {v}",\n' for v in ["3", *versions[::-1]])
    (tmp_path / "pyproject.toml").write_text(f"[project]\nclassifiers = [\n{text}]\n")
    assert wheel.supported(tmp_path) == versions
    monkeypatch.setattr(wheel, "interpreter_of", lambda version: f"/bin/python{version}")
    monkeypatch.setattr(wheel, "torch_for", lambda version: CUDA if version == "3.98" else [])
    assert wheel.others(tmp_path) == ["/bin/python3.1"]
    assert capsys.readouterr().out == "  Python 3.1 to 3.98 are what the package supports: later ones are not tried\n" \
        "  Python 3.98 is not tried: its torch comes with CUDA, some gigabytes: make wheel WHEEL=--cuda\n"  # fmt: skip
    assert wheel.others(tmp_path, cuda=True) == ["/bin/python3.1", "/bin/python3.98"]
    monkeypatch.setattr(wheel, "interpreter_of", lambda version: None)
    assert wheel.others(tmp_path, cuda=True) == [] and capsys.readouterr().out.count("is not tried: it isn't found") == 2
    monkeypatch.undo()
    (tmp_path / "pyproject.toml").write_text(f'[project]\nclassifiers = ["Programming Language :: Python :: {versions[1]}"]\n')
    assert wheel.others(tmp_path) == [] and "is not tried" not in capsys.readouterr().out


RETRIED = """WARNING: Retrying (Retry(total=0, connect=None, read=None, redirect=None, status=None)) after connection broken by \
'NewConnectionError('<pip._vendor.urllib3.connection.HTTPSConnection object at 0x7fce328d04d0>: Failed to establish a new \
connection: [Errno 111] Connection refused')': /simple/torch/
"""
NONE = """ERROR: Could not find a version that satisfies the requirement torch (from versions: none)
ERROR: No matching distribution found for torch
"""
CONFLICT = """ERROR: Cannot install torch because these package versions have conflicting dependencies.
ERROR: ResolutionImpossible: for help visit https://pip.pypa.io/en/latest/topics/dependency-resolution/#dealing-with-conflicts
"""
HUNG = """ERROR: Exception:
Traceback (most recent call last):
  File "/venv/lib/python3.11/site-packages/pip/_vendor/urllib3/response.py", line 443, in _error_catcher
    raise ReadTimeoutError(self._pool, None, "Read timed out.")
pip._vendor.urllib3.exceptions.ReadTimeoutError: HTTPSConnectionPool(host='127.0.0.1', port=443): Read timed out.
"""
CRASH = """ERROR: Exception:
Traceback (most recent call last):
  File "/venv/lib/python3.11/site-packages/pip/_internal/resolution/resolvelib/factory.py", line 9, in make
KeyError: 'torch'
"""
REFUSED = """ERROR: Could not install packages due to an OSError: HTTPSConnectionPool(host='127.0.0.1', port=443): Max retries \
exceeded with url: /torch-2.13.0.whl (Caused by ProxyError('Unable to connect to proxy', OSError('Tunnel connection failed')))
"""
BUILD = """  error: subprocess-exited-with-error
  × python setup.py bdist_wheel did not run successfully.
ERROR: Could not build wheels for torch, which is required to install pyproject.toml-based projects
"""
FULL = "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device\n"
NONE_OF_OTHERS = NONE.replace("torch", "sympy>=1.13.3")


@pytest.mark.parametrize("said, reason", [
    (NONE, "has none for it"), (NONE.replace("torch\n", "torch==2.13.0\n"), "has none for it"),
    (RETRIED + NONE, "can't be reached"), (HUNG, "can't be reached"), (RETRIED + REFUSED, "can't be reached"),
    (CONFLICT, ""), (RETRIED + CONFLICT, ""), (CRASH, ""), (RETRIED + CRASH, ""), (BUILD, ""), (FULL, "has no room for it"),
    (NONE_OF_OTHERS, ""), (NONE.replace("torch", "torch-extras"), ""),
    ("Fatal Python error: Segmentation fault\n", "")])  # fmt: skip
def test_what_cannot_be_had_is_told_from_what_is_wrong(said, reason, tmp_path, monkeypatch, capsys):
    "By the words in which pip fails, whether it is asked what torch needs or to install it."
    (tmp_path / "said").write_text(said)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python").write_text(f"#!/bin/sh\ncat {tmp_path}/said >&2; exit 1\n")
    (tmp_path / "bin/python").chmod(0o755)
    monkeypatch.setattr(wheel, "interpreter_of", lambda version: version)
    monkeypatch.setattr(wheel, "supported", lambda root: ["3.98"])
    monkeypatch.setattr(wheel.sys, "executable", str(tmp_path / "bin/python"))

    def fake(env, interpreter, folder):
        env.work, env.bin, env.variables = tmp_path, tmp_path / "bin", dict(os.environ)

    monkeypatch.setattr(wheel.Environment, "__init__", fake)
    monkeypatch.setattr(wheel.Environment, "python", lambda env, code: "3.98")
    attempts = [lambda: wheel.others(ROOT), lambda: wheel.check_with("python3.98", tmp_path / "x.whl", (), patience=60)]
    for attempt in attempts:
        if reason:
            assert not attempt()
            line = capsys.readouterr().out.splitlines()[-1]
            assert "is not tried" in line and line.endswith(reason)
        else:
            with pytest.raises(wheel.Wrong, match=re.escape(said.splitlines()[-1][:60])):
                attempt()


# --- names ------------------------------------------------------------------------------------------------------------

def test_what_the_package_offers():
    offered = {name for name in dir(trainkit) if not name.startswith("_")}
    assert offered - {name.split(".")[1] for name in MODULES} == {"attach"} == {*trainkit.__all__}


@pytest.mark.parametrize("name", MODULES)
def test_a_module_offers_what_it_defines(name):
    "Nothing imported is offered as a module's own, nothing twice, nothing that isn't there, nothing private."
    module = importlib.import_module(name)
    offered = getattr(module, "__all__", [])
    assert len(offered) == len({*offered})
    for each in offered:
        thing = getattr(module, each)
        assert not each.startswith("_") and not isinstance(thing, types.ModuleType), each
        alias = isinstance(thing, types.GenericAlias)  # which Python 3.10 takes for a class
        if not alias and inspect.isclass(thing) or inspect.isfunction(thing):
            assert thing.__module__ == name, f"{each} comes from {thing.__module__}"


def test_what_takes_too_long_is_given_up(tmp_path):
    env = object.__new__(wheel.Environment)  # without making one
    env.work, env.variables = tmp_path, dict(os.environ)
    with pytest.raises(wheel.TooLong, match="time.sleep.30.: not done after 0.2 s"):
        env.run(sys.executable, "-c", "import time; time.sleep(30)", seconds=0.2)
    assert env.run(sys.executable, "-c", "print('there')", seconds=60) == "there\n"


def test_a_python_whose_torch_does_not_come_is_told_of(tmp_path, monkeypatch, capsys):
    def install(env, *what, seconds=None):
        raise wheel.TooLong(f"no {what[0]} within {seconds} s")

    monkeypatch.setattr(wheel.Environment, "install", install)
    wheel.check_with(sys.executable, tmp_path / "x.whl", (), patience=3)
    assert "is not tried, as torch can't be had: time ran out" in capsys.readouterr().out
    with pytest.raises(wheel.Wrong, match="no .*x.whl"):
        wheel.check_with(sys.executable, tmp_path / "x.whl", ())
