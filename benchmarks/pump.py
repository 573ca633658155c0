"""What the pump costs a training loop, and how long a click takes to its callback, in a real kernel.

    python -m benchmarks.pump            writes benchmarks/results/pump.md
    python -m benchmarks.pump --print    shows it only

The clicks come straight from a client on this machine, as a server passes them on; a browser adds a few milliseconds. Each
carries the time at which it was sent; the kernel's clock is the same.
"""
from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
import ast
import platform
import statistics
import sys
import textwrap
import time
from pathlib import Path

import ipykernel
from jupyter_client.manager import start_new_kernel

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results" / "pump.md"
CLICKS = 200
SETUP = f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
import comm
from trainkit.pump import Pump

late = []

def clicked(message):
    late.append(time.time() - message["content"]["data"])

button = comm.create_comm(target_name="button")
button.on_msg(clicked)

def least(work, n, runs=7):
    found = []
    for _ in range(runs):
        start = time.perf_counter()
        work(n)
        found.append((time.perf_counter() - start) / n)
    return min(found)
"""
COSTS = """
pump = Pump.here()

def not_due(n):
    pump._due = time.monotonic() + 60
    for _ in range(n): pump.poll()

def due(n):
    for _ in range(n):
        pump._due, pump._nudge_due = 0.0, time.monotonic() + 60
        pump.poll()

def due_with_nudge(n):
    for _ in range(n):
        pump._due = pump._nudge_due = 0.0
        pump.poll()

def empty(n):
    for _ in range(n): pass

def opened(n):
    for _ in range(n): Pump.here().close()

base = least(empty, 100_000)
print([least(not_due, 100_000) - base, least(due, 2_000), least(due_with_nudge, 500), least(opened, 100)])
pump.close()
"""
CLICKED = """
late.clear()
pump, end = Pump.here(), time.monotonic() + 30
while len(late) < {clicks} and time.monotonic() < end:
    step = time.perf_counter() + {step}
    while time.perf_counter() < step: pass      # a step that leaves the processor to nobody
    pump.poll()
pump.close()
print(late)
"""
HANDLING = """
late.clear()
pump = Pump.here()
pump.AT_ONCE = 1
time.sleep(1)                                   # until all have come
found = []
while len(late) < {clicks}:
    pump._due, start, before = 0.0, time.perf_counter(), len(late)
    pump.poll()
    if len(late) > before: found.append(time.perf_counter() - start)
pump.close()
print(found)
"""


class Kernel:
    def __init__(self) -> None:
        self.manager, self.client = start_new_kernel(kernel_name="python3")
        self.run(SETUP)
        self.button = self.run("print(repr(button.comm_id))")

    def run(self, code: str, clicks: int = 0, pause: float = 0.0):
        "What the code prints; `clicks` are sent while it runs."
        printed: list[str] = []

        def hook(message) -> None:
            kind, content = message["header"]["msg_type"], message["content"]
            if kind == "stream": printed.append(content["text"])
            if kind == "error": raise RuntimeError("\n".join(content["traceback"]))
            if kind == "execute_input":
                for _ in range(clicks):
                    time.sleep(pause)
                    data = {"comm_id": self.button, "data": time.time()}
                    self.client.shell_channel.send(self.client.session.msg("comm_msg", data))
        self.client.execute_interactive(textwrap.dedent(code), output_hook=hook, timeout=120, store_history=False)
        return ast.literal_eval("".join(printed)) if printed else None

    def close(self) -> None:
        self.client.stop_channels()
        self.manager.shutdown_kernel(now=True)


def spread(seconds: list[float]) -> str:
    "Median, 95th percentile and the most, in milliseconds."
    ordered = sorted(1e3 * s for s in seconds)
    return f"{statistics.median(ordered):.1f} | {ordered[int(0.95 * len(ordered))]:.1f} | {ordered[-1]:.1f}"


def measure() -> str:
    kernel = Kernel()
    try:
        not_due, due, nudge, opened = kernel.run(COSTS)
        handling = kernel.run(HANDLING.format(clicks=CLICKS), CLICKS)
        steps = {step: kernel.run(CLICKED.format(clicks=CLICKS, step=step), CLICKS, 0.02) for step in (0.001, 0.01, 0.05)}
    finally: kernel.close()
    return "\n".join([
        f"ipykernel {ipykernel.__version__}, Python {platform.python_version()}, {os.cpu_count()} cores, "
        f"load {os.getloadavg()[0]:.1f} at the end",
        "",
        "| poll() | µs |",
        "|---|---|",
        f"| not due | {1e6 * not_due:.2f} |",
        f"| due, nothing waits | {1e6 * due:.1f} |",
        f"| due, and the thread before it is asked to look again (at most 10 a second) | {1e6 * nudge:.0f} |",
        f"| `Pump.here()` and `close()` | {1e6 * opened:.0f} |",
        f"| one click handled, median | {1e6 * statistics.median(handling):.0f} |",
        "",
        f"With nothing to do, 50 polls and 10 requests a second cost {100 * (40 * due + 10 * nudge):.2f} % of the time.",
        "",
        f"| step of the loop | click → callback, median ms | 95 % | most | of {CLICKS} |",
        "|---|---|---|---|---|",
        *(f"| {1e3 * step:.0f} ms | {spread(late)} | {len(late)} |" for step, late in steps.items()),
    ])


if __name__ == "__main__":
    table = measure()
    print(table)
    if "--print" not in sys.argv:
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(f"# The pump\n\nWritten by `python -m benchmarks.pump`.\n\n{table}\n")
