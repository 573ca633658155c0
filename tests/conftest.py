"""What every test starts from: one torch thread, no settings of the person who runs it, and nobody watching."""
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read once, when torch is first imported

import pytest
from hypothesis import settings

settings.register_profile("trainkit", settings.default, deadline=None)  # no test judges time
settings.load_profile("trainkit")


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch, tmp_path_factory):
    "No `TRAINKIT_*` but the statement that this is a script, and a working directory that holds no settings."
    for name in [name for name in os.environ if name.startswith("TRAINKIT_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("TRAINKIT_WHERE", "script")
    monkeypatch.chdir(tmp_path_factory.mktemp("here"))
