"""Run tests with several versions of ipykernel.

    python tools/kernels.py [--versions=6.31,7.3,newest] [PATH or pytest option ...]     default: tests/test_pump.py

A version's environment lies in .venv/kernels/VERSION and is made when it is first needed: the development environment,
seen through a .pth file, with that one ipykernel in front of it. `newest` is asked for each time.
"""
from __future__ import annotations

import argparse
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VERSIONS = "6.31,7.3,newest"
TESTS = ["tests/test_pump.py"]
ASK = "import sys; from importlib.metadata import version; sys.stdout.write(version('ipykernel'))"


def python_of(folder: Path) -> Path:
    return folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def requirement(version: str) -> str:
    "What pip is asked for: `6.31` means any 6.31.x."
    return "ipykernel" if version == "newest" else f"ipykernel=={version}" + ".*" * (version.count(".") < 2)


def make(folder: Path) -> Path:
    "An environment that sees everything installed where this script runs; its own packages come first."
    python = python_of(folder)
    if not python.exists():
        venv.create(folder, with_pip=False, symlinks=os.name != "nt")
    names = {"base": str(folder), "platbase": str(folder)}
    own = Path(sysconfig.get_path("purelib", "venv" if "venv" in sysconfig.get_scheme_names() else None, vars=names))
    base = {sysconfig.get_path(name) for name in ("purelib", "platlib")}
    # not a line with the path: `addsitedir` also follows the .pth files there, such as that of an editable install
    (own / "development.pth").write_text("".join(f"import site; site.addsitedir({path!r})\n" for path in sorted(base)))
    return python


def install(python: Path, version: str) -> str:
    "Install that ipykernel and say which it is."
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "-qq", "--disable-pip-version-check"]
    subprocess.run([*pip, *(["--upgrade"] * (version == "newest")), requirement(version)], check=True)
    return subprocess.run([str(python), "-c", ASK], check=True, capture_output=True, text=True).stdout


def run(version: str, arguments: list[str]) -> bool:
    "Whether the tests pass with this version."
    python = make(Path(sys.prefix) / "kernels" / version)
    found = install(python, version)
    print(f"\n== ipykernel {found} ({version})", flush=True)
    if version != "newest" and not (found + ".").startswith(version + "."):
        print(f"this is not {version}")
        return False
    env = {name: value for name, value in os.environ.items() if name != "VIRTUAL_ENV"}
    env["PATH"] = f"{python.parent}{os.pathsep}{env.get('PATH', '')}"  # whoever calls `jupyter` gets this kernel
    here, there = (str(Path(prefix) / "share" / "jupyter") for prefix in (sys.prefix, python.parent.parent))
    env["JUPYTER_PATH"] = os.pathsep.join(filter(None, [there, here, env.get("JUPYTER_PATH")]))  # its kernel, our widgets
    env["JUPYTERLAB_DIR"] = str(Path(here) / "lab")  # the pages lie beside the package, not in it
    env["JUPYTER_PREFER_ENV_PATH"] = "1"
    return subprocess.run([str(python), "-m", "pytest", "-q", *arguments], cwd=ROOT, env=env).returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--versions", default=VERSIONS, help=f"default: {VERSIONS}")
    given, arguments = parser.parse_known_args()
    results = {version: run(version, arguments or TESTS) for version in given.versions.split(",")}
    print("\n" + "\n".join(f"ipykernel {version}: {'passed' if ok else 'FAILED'}" for version, ok in results.items()))
    return 0 if all(results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
