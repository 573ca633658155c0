"""Watch, steer, go back: interactive training for PyTorch, at home in Jupyter."""

import typing as _typing

if _typing.TYPE_CHECKING:
    from pathlib import Path

    from .attached import Attached

__version__ = "0.1.0"
__all__ = ["attach"]


def attach(run: "str | Path", wait: "float | None" = None) -> "Attached":
    "Steer a run that trains in another process, through its folder; `wait` so many seconds for it to listen."
    from .attached import attach

    return attach(run, wait)
