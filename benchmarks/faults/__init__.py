"""What can happen to a run, made to happen: each module is a row or two of the table that `python -m benchmarks.faults`
writes. tests/test_faults.py runs the same code with fewer tries."""

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is first imported
ROOT = Path(__file__).parents[2]
if str(ROOT / "tests") not in sys.path:
    sys.path.append(str(ROOT / "tests"))  # ways.py: how runs end, and what it means that two are the same
