"One kind of trouble: what is to be reached, how often it was tried, and what went wrong."

import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class Row:
    "Counts tries and keeps what went wrong in them."

    def __init__(self, fault: str, reach: str, control: bool = False):
        self.fault, self.reach = fault, reach
        self.control = control  # not a fault: shows that the suite would notice one
        self.tries, self.failures = 0, list[str]()
        self.met = Counter[str]()  # what the tries ran into, so that one sees that they were worth something
        self.seconds = 0.0

    @classmethod
    def of(cls, kept: dict[str, Any]) -> "Row":
        "One that was kept."
        row = cls(kept["fault"], kept["reach"], kept["control"])
        row.tries, row.failures, row.seconds = kept["tries"], kept["failures"], kept["seconds"]
        row.met.update(dict(kept["met"]))
        return row

    def kept(self, folder: str = "") -> dict[str, Any]:
        "To be kept: plain, in the order in which it was met, without the paths of a folder that will be gone."
        failures = [failure.replace(folder, "…") if folder else failure for failure in self.failures]
        return {**vars(self), "failures": failures, "met": [*self.met.items()], "seconds": round(self.seconds, 1)}

    @property
    def held(self) -> int:
        "Tries in which everything was reached."
        return self.tries - len(self.failures)

    @contextmanager
    def attempt(self, what: str) -> Iterator[None]:
        "One try; an exception inside is a failure of what is tested, and the next try goes on."
        self.tries += 1
        try:
            yield
        except Exception as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            place = f"{Path(last.filename).name}:{last.lineno}"
            self.failures.append(f"{what}: {type(error).__name__} at {place}: {' '.join(str(error).split())[-900:]}")

    def check(self) -> None:
        "AssertionError that lists the failures."
        listed = "\n  ".join(self.failures[:20])
        assert not self.failures, f"{self.fault}: {len(self.failures)} of {self.tries} tries failed:\n  {listed}"
        assert self.tries, f"{self.fault}: nothing was tried"

    def __str__(self) -> str:
        met = ", ".join(f"{n} {what}" for what, n in self.met.items())
        return f"{self.fault}: {self.held} of {self.tries} held" + (f" ({met})" if met else "")
