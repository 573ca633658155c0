"""trainkit.environment: the four answers, each asked where it is true."""
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pexpect
import pytest
from nbclient import NotebookClient

from trainkit.environment import where

ROOT = Path(__file__).resolve().parent.parent
ASK = "import sys; from trainkit.environment import where; print('where:', where(), 'IPython' in sys.modules)"

@pytest.fixture
def env(monkeypatch):
    "An environment for child processes in which nothing is stated."
    monkeypatch.delenv("TRAINKIT_WHERE", raising=False)
    return {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "dumb"}

def on_screen(args, env):
    "What python with `args` writes to a terminal."
    child = pexpect.spawn(sys.executable, args, env=env, timeout=60, encoding="utf-8")
    child.expect(pexpect.EOF)
    return child.before


def test_a_pipe_is_a_script_and_asking_imports_nothing(env):
    said = subprocess.run([sys.executable, "-c", ASK], env=env, capture_output=True, text=True, check=True).stdout
    assert said.split() == ["where:", "script", "False"]

def test_ipython_imported_by_a_script_is_still_a_script(env):
    said = subprocess.run([sys.executable, "-c", "import IPython; " + ASK], env=env, capture_output=True, text=True)
    assert said.stdout.split() == ["where:", "script", "True"]

def test_a_screen_is_a_terminal(env):
    said = on_screen(["-c", ASK], env)
    assert said.split() == ["where:", "terminal", "False"]

def test_ipython_in_a_terminal(env):
    said = on_screen(["-m", "IPython", "--colors=NoColor", "--no-banner", "-c", ASK], env)
    assert "where: ipython True" in said

def test_ipython_into_a_pipe_is_a_script(env):
    said = subprocess.run([sys.executable, "-m", "IPython", "-c", ASK], env=env, capture_output=True, text=True)
    assert "where: script True" in said.stdout

def test_a_kernel_is_a_notebook(env, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(ASK)])
    NotebookClient(nb, timeout=60, kernel_name="python3").execute()
    assert nb.cells[0].outputs[0].text.split() == ["where:", "notebook", "True"]

@pytest.mark.parametrize("stated", ["notebook", "ipython", "terminal", "script"])
def test_stated(stated, monkeypatch):
    monkeypatch.setenv("TRAINKIT_WHERE", stated)
    assert where() == stated

def test_a_misspelt_statement(monkeypatch):
    monkeypatch.setenv("TRAINKIT_WHERE", "jupyter")
    with pytest.raises(ValueError, match="'jupyter'.*notebook, ipython, terminal, script"):
        where()

@pytest.mark.parametrize("stream", [None, object()])
def test_no_usable_output(stream, monkeypatch):
    monkeypatch.delenv("TRAINKIT_WHERE", raising=False)
    monkeypatch.setattr(sys, "stdout", stream)
    assert where() == "script"
