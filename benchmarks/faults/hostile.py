"Files made by somebody who means harm: code, paths, gigantic sizes, depths, lies. And files mutated at random."

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import random
import resource
import shutil
import signal
import struct
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from trainkit.checkpoint import CheckpointError, Checkpoints, read_checkpoint, read_entry
from trainkit.travel import read_weights

from .nursery import Nursery
from .row import Row
from .subjects import digest, supervised

NAME = "ckpt-000000024.pt"  # of the hostile file; it lies beside honest ones
GROWTH = 100  # MB that looking at a hostile file may cost, and twice its size
SECONDS = 20  # after which a process counts as hanging
META = json.dumps({"step": 24, "seq": 9, "time": 1.0, "info": {}})
Records = list[tuple[str, bytes]]


# --------------------------------------------------------------------------------------------------- pickles, by hand


def glob(name: str) -> bytes:
    "The opcode that fetches `module.name`."
    module, _, last = name.rpartition(".")
    return f"c{module}\n{last}\n".encode()


def text(x: str) -> bytes:
    "The opcode of a string."
    return b"X" + struct.pack("<I", len(x.encode())) + x.encode()


def number(x: int) -> bytes:
    "The opcode of an integer."
    data = x.to_bytes(x.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def numbers(*x: int) -> bytes:
    "The opcodes of a tuple of integers."
    return b"(" + b"".join(map(number, x)) + b"t"


def storage(n: int, kind: str = "torch.FloatStorage", key: str = "0", place: str = "cpu") -> bytes:
    "The opcodes of a storage that claims to have n elements."
    return b"(" + text("storage") + glob(kind) + text(key) + text(place) + number(n) + b"tQ"


def tensor(held: bytes, shape: tuple[int, ...] = (4,), stride: tuple[int, ...] = (1,), offset: int = 0) -> bytes:
    "The opcodes of a tensor on a storage."
    view = number(offset) + numbers(*shape) + numbers(*stride)
    return glob("torch._utils._rebuild_tensor_v2") + b"(" + held + view + b"\x89" + glob("collections.OrderedDict") + b")RtR"


def content(state: bytes, meta: bytes = text(META)) -> bytes:
    "The pickled part of a checkpoint with this state."
    return b"\x80\x02}(" + text("format") + b"K\x01" + text("meta") + meta + text("state") + state + b"u."


def archive(path: Path, pickled: bytes, data: bytes = bytes(16), more: Records = (), top: str = "archive", **kw: Any) -> None:
    "A file as torch would write it, around a pickled part of one's own."
    records = [(f"{top}/data.pkl", pickled), (f"{top}/byteorder", b"little"), (f"{top}/data/0", data), (f"{top}/version", b"3\n")]
    zipped(path, [*records, *more], **kw)


def zipped(path: Path, records: Records, compression: int = zipfile.ZIP_STORED) -> None:
    "A zip file of these records, in order, whatever they are called."
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w", compression) as file:
        warnings.simplefilter("ignore")
        for name, data in records:
            file.writestr(zipfile.ZipInfo(name), data, compress_type=compression)


# ---------------------------------------------------------------------------------------------------------- code to run


class Calls:
    "Is pickled as a call."

    def __init__(self, function: Any, *args: Any):
        self.call = function, args

    def __reduce__(self) -> tuple[Any, tuple]:
        return self.call

    def __call__(self) -> None:
        "So that it may itself be what is called."


def codes(canary: Path) -> Iterator[tuple[str, Any]]:
    "Objects whose unpickling would create the canary."
    import cProfile
    import runpy
    import subprocess
    import timeit

    touch, write = f"touch {canary}", f"open({str(canary)!r}, 'w')"
    script = canary.with_suffix(".py")
    script.write_text(write)
    inner = io.BytesIO()
    torch.save(Calls(os.system, touch), inner)
    yield "os.system", Calls(os.system, touch)
    yield "eval", Calls(eval, write)
    yield "exec", Calls(exec, write)
    yield "open", Calls(open, str(canary), "w")
    yield "subprocess.check_call", Calls(subprocess.check_call, ["touch", str(canary)])
    yield "runpy.run_path", Calls(runpy.run_path, str(script))
    yield "timeit.timeit", Calls(timeit.timeit, write)
    yield "cProfile.run", Calls(cProfile.run, write)
    yield "shutil.copy", Calls(shutil.copy, str(script), str(canary))
    yield "pickle.loads", Calls(pickle.loads, pickle.dumps(Calls(os.system, touch)))
    yield "torch.storage._load_from_bytes", Calls(torch.storage._load_from_bytes, inner.getvalue())
    yield "getattr of an import", Calls(Calls(getattr, Calls(__import__, "os"), "system"), touch)
    yield "torch's own list of the harmless", [Calls(torch.serialization.add_safe_globals, [os.system]), Calls(os.system, touch)]


def opcodes(canary: Path) -> Iterator[tuple[str, bytes]]:
    "The same by rarer opcodes."
    touch = text(f"touch {canary}")
    name = os.system.__module__
    yield "STACK_GLOBAL", b"\x8c" + bytes([len(name)]) + name.encode() + b"\x8c\x06system\x93" + touch + b"\x85R"
    yield "INST", b"(" + touch + f"i{name}\nsystem\n".encode()
    yield "OBJ", b"(" + glob(f"{name}.system") + touch + b"o"
    yield "NEWOBJ", glob(f"{name}.system") + touch + b"\x85\x81"
    yield "NEWOBJ_EX", glob(f"{name}.system") + touch + b"\x85}\x92"
    yield "EXT1", b"\x82\x01" + touch + b"\x85R"
    yield "BUILD on a class", glob("torch.FloatStorage") + b"}(" + text("__setstate__") + touch + b"ub"
    yield "a function as the kind of a storage", b"(" + text("storage") + glob(f"{name}.system") + touch + text("cpu") + number(4) + b"tQ"
    yield "PERSID", b"P" + f"touch {canary}\n".encode()


# ------------------------------------------------------------------------------------------- sizes, paths, depths, lies


def bytearray_of(n: int) -> bytes:
    "What `weights_only` lets through: a call that makes n bytes out of nothing."
    return glob("builtins.bytearray") + number(n) + b"\x85R"


def forms() -> Iterator[tuple[str, bytes]]:
    "States that lie about sizes, kinds and depths; each is put into a sound archive."
    yield "bytearray of 1.5 GB", bytearray_of(1_500_000_000)
    yield "a storage of 10^12 numbers", tensor(storage(10**12))
    yield "a storage of one number too many", tensor(storage(5), (5,))
    yield "a storage of -1 numbers", tensor(storage(-1))
    yield "an offset of 10^12", tensor(storage(4), offset=10**12)
    yield "an offset of -4", tensor(storage(4), offset=-4)
    yield "a stride of 10^12", tensor(storage(4), (2,), (10**12,))
    yield "a stride of -1", tensor(storage(4), (4,), (-1,))
    yield "10^9 numbers in one", tensor(storage(4), (10**9,), (0,))
    yield "a shape whose product overflows", tensor(storage(4), (2**62, 4), (0, 0))
    yield "a shape of -1", tensor(storage(4), (-1,), (1,))
    yield "1000 dimensions", tensor(storage(4), (1,) * 1000, (1,) * 1000)
    yield "a shape and no stride", tensor(storage(4), (4,), ())
    yield "doubles for floats", tensor(storage(4, "torch.DoubleStorage"))
    yield "a storage of an unknown kind", tensor(storage(4, "torch.SystemStorage"))
    yield "a dtype for a storage", tensor(storage(4, "torch.float32"))
    yield "a storage on no device", tensor(storage(4, place="nowhere:7"))
    yield "a storage without values", tensor(storage(4, place="meta"))
    yield "a storage that isn't there", tensor(storage(4, key="../../0"))
    yield "no storage at all", tensor(b"K\x01")
    sparse = b"(" + b"(" + tensor(storage(4), (1, 1), (1, 1)) + tensor(storage(4), (1,)) + numbers(1) + b"\x88t"
    yield "a sparse tensor that points outside", glob("torch._utils._rebuild_sparse_tensor") + sparse + b"tR"
    yield "a string that claims 2^60 bytes", b"\x8d" + struct.pack("<Q", 2**60) + b"x"
    yield "a string that claims 4 GB", b"X" + struct.pack("<I", 2**32 - 1) + b"x"
    yield "a number that claims 2 GB", b"\x8b" + struct.pack("<i", 2**31 - 1) + b"1"
    yield "a memo of 2^31", b"K\x01r" + struct.pack("<I", 2**31) + b"0K\x01"
    yield "lists, 200,000 deep", b"]" * 200_000 + b"a" * 199_999
    yield "tuples, 200,000 deep", b")" + b"\x85" * 200_000
    yield "dictionaries, 200,000 deep", (b"}" + text("a")) * 100_000 + b"K\x01" + b"s" * 100_000
    yield "a list in itself", b"]q\x00h\x00a"
    laugh = b"".join(b"](h" + bytes([i, 104, i]) + b"eq" + bytes([i + 1]) for i in range(60))
    yield "2^60 references to one list", b"](]q\x00" + laugh + b"e"
    yield "an empty pickle", b""
    yield "a stack that runs empty", b"0000"
    yield "a dictionary of wrong keys", b"}((K\x01tK\x01u"


def metas() -> Iterator[tuple[str, Any]]:
    "What a checkpoint says of itself, to be shown in lists."
    fine = json.loads(META)
    yield "no text", 5
    yield "a list", "[1]"
    yield "null", "null"
    yield "nested 100,000 deep", "[" * 100_000
    yield "a place at infinity", '{"step": 24, "seq": 1e999}'
    yield "a place that is a list", '{"step": 24, "seq": []}'
    yield "a score of 400 digits", json.dumps(fine | {"info": {"score": 10**400}})
    yield "a note that steers the terminal", json.dumps(fine | {"info": {"note": "\x1b]0;owned\x07\r\x1b[2J"}})
    yield "a note that is a script", json.dumps(fine | {"info": {"note": "<script>owned</script>"}})
    yield "an epoch that is a script", json.dumps(fine | {"info": {"epoch": "<script>owned</script>"}})
    yield "a thumbnail that isn't one", json.dumps(fine | {"thumbnail": '"><script>owned</script>'})
    yield "another step", json.dumps(fine | {"step": 7})
    yield "a time beyond time", json.dumps(fine | {"time": 1e300})


def _damaged_state(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path, Path], None]:
    "An honest checkpoint, and then."

    def build(path: Path, canary: Path) -> None:
        honest = torch.load(sorted(path.parent.glob("ckpt-*.pt"))[0], weights_only=True)
        change(honest["state"])
        torch.save(honest | {"meta": META}, path)

    return build


def _adam(state: dict[str, Any]) -> dict[str, Any]:
    return state["players"]["model"]["optimizer"]["state"][0]


def _columns(n: int, make: Callable[[], torch.Tensor]) -> Callable[[dict[str, Any]], Any]:
    return lambda state: state["history"]["columns"].update({f"c{i}": {"steps": make(), "values": make()} for i in range(n)})


def states() -> Iterator[tuple[str, Callable[[dict[str, Any]], Any]]]:
    "Lies that only the learner can see."
    many = torch.arange(500_000)
    yield "moments of another kind", lambda s: _adam(s).update(exp_avg=_adam(s)["exp_avg"].int())
    yield "moments of another shape", lambda s: _adam(s).update(exp_avg=torch.zeros(7))
    yield "moments that are text", lambda s: _adam(s).update(exp_avg="x")
    yield "moments spread out from one number", lambda s: _adam(s).update(exp_avg=torch.zeros(1).double().expand(200_000_000))
    yield "a history spread out from one number", _columns(1, lambda: torch.zeros(1, dtype=torch.int64).expand(200_000_000))
    yield "200 columns that are views of one", _columns(100, lambda: many[:])
    yield "400 columns that are one tensor", _columns(200, lambda: many)
    yield "weights of another kind", lambda s: s["players"]["model"]["modules"]["model"].update({"head.bias": torch.zeros(1).int()})
    yield "a random state of floats", lambda s: s["rng"].update(torch=torch.zeros(5056))
    yield "a random state that is short", lambda s: s["rng"].update(torch=torch.zeros(3, dtype=torch.uint8))
    yield "betas that are text", lambda s: s["players"]["model"]["optimizer"]["param_groups"][0].update(betas="xy")
    yield "a step before the first", lambda s: s["position"].update(step=-4)
    yield "no word of what the code said", lambda s: s["players"]["model"].update(said={})
    yield "an identity that is a number", lambda s: s.update(identity=5)
    yield "callbacks' words that are a list", lambda s: s.update(said=[1])


def _bomb(compression: int) -> Callable[[Path, Path], None]:
    return lambda path, canary: archive(path, content(tensor(storage(4))), bytes(200_000_000), compression=compression)


def _overlapping(path: Path, canary: Path) -> None:
    "Forty storages of 20 MB in 20 MB: each record contains the next one's header, with checksums that are right."
    import zlib

    n, inside = 40, bytes(20_000_000)
    locals_, central = b"", b""
    bodies: list[tuple[str, bytes]] = []
    for i in reversed(range(n)):  # the innermost first: a body is the next record's header and body
        name = f"archive/data/{i:03d}"
        body = inside if not bodies else bodies[-1][1]
        header = struct.pack("<IHHHHHIIIHH", 0x04034B50, 20, 0, 0, 0, 0x21, zlib.crc32(body), len(body), len(body), len(name), 2)
        bodies.append((name, header + name.encode() + b"\0\0" + body))  # 48 bytes more: a whole number of floats
    whole = bodies[-1][1]
    for name, data in bodies:
        body = data[30 + len(name) + 2 :]
        at = len(whole) - len(data)
        central += struct.pack("<IHHHHHHIIIHHHHHII", 0x02014B50, 20, 20, 0, 0, 0, 0x21, zlib.crc32(body), len(body), len(body),
                               len(name), 0, 0, 0, 0, 0, at) + name.encode()  # fmt: skip
    pickled = content(b"](" + b"".join(tensor(storage(5_000_000 + 12 * (n - 1 - i), key=f"{i:03d}")) for i in range(n)) + b"e")
    for name, body in (("archive/data.pkl", pickled), ("archive/version", b"3\n")):
        at, crc = len(whole) + len(locals_), zlib.crc32(body)
        locals_ += struct.pack("<IHHHHHIIIHH", 0x04034B50, 20, 0, 0, 0, 0x21, crc, len(body), len(body), len(name), 0) + name.encode() + body
        central += struct.pack("<IHHHHHHIIIHHHHHII", 0x02014B50, 20, 20, 0, 0, 0, 0x21, crc, len(body), len(body), len(name), 0, 0, 0, 0,
                               0, at) + name.encode()  # fmt: skip
    end = struct.pack("<IHHHHIIH", 0x06054B50, 0, 0, n + 2, n + 2, len(central), len(whole) + len(locals_), 0)
    path.write_bytes(whole + locals_ + central + end)


def _larger_inside(path: Path, canary: Path) -> None:
    "The table of contents says 1 TB for a record of 16 bytes."
    archive(path, content(tensor(storage(4))))
    data = bytearray(path.read_bytes())
    at = data.rindex(b"archive/data/0") - 46
    data[at + 24 : at + 28] = struct.pack("<I", 2**32 - 2)
    path.write_bytes(data)


def _renamed(pairs: dict[str, str]) -> Callable[[Path, Path], None]:
    def build(path: Path, canary: Path) -> None:
        archive(path, content(bytearray_of(1_500_000_000)))
        with zipfile.ZipFile(path) as file:
            records = [(pairs.get(name, name), file.read(name)) for name in file.namelist()]
        zipped(path, records)

    return build


def _twice(first: bytes, last: bytes) -> Callable[[Path, Path], None]:
    def build(path: Path, canary: Path) -> None:
        zipped(path, [("archive/data.pkl", first), ("archive/version", b"3\n"), ("archive/data/0", bytes(16)),
                      ("archive/data.pkl", last)])  # fmt: skip

    return build


def _with_record(name: str) -> Callable[[Path, Path], None]:
    return lambda path, canary: archive(path, content(tensor(storage(4))), more=[(name.replace("CANARY", str(canary)), b"owned")])


def _beside(name: str, size: int) -> Callable[[Path, Path], None]:
    "An honest file, and a gigantic one (all holes) beside it."

    def build(path: Path, canary: Path) -> None:
        with open(path.parent / name, "wb") as file:
            file.truncate(size)

    return build


def _torchscript(path: Path, canary: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), str(path))


def archives() -> Iterator[tuple[str, Callable[[Path, Path], None]]]:
    "Files that are strange as files."
    fine, bomb = content(tensor(storage(4))), content(bytearray_of(1_500_000_000))
    for name in ("../../canary", "CANARY", "archive/../../canary", "..\\..\\canary", "C:\\canary", "archive/", "archive/data/x",
                 "archive/code/__torch__.py", "archive/constants.pkl", "archive/data/0\u0430"):  # fmt: skip
        yield f"a record {name!r}", _with_record(name)
    yield "a top folder '..'", lambda path, canary: archive(path, fine, top="..")
    yield "a folder in a folder", lambda path, canary: archive(path, fine, top="a/b")
    yield "two top folders", lambda path, canary: archive(path, fine, more=[("other/data.pkl", bomb)])
    yield "DATA.PKL", _renamed({"archive/data.pkl": "archive/DATA.PKL"})
    yield "the pickle twice, the harmful first", _twice(bomb, fine)
    yield "the pickle twice, the harmful last", _twice(fine, bomb)
    yield "two pickles that differ in case", lambda path, canary: archive(path, fine, more=[("archive/Data.pkl", bomb)])
    yield "a deflate bomb", _bomb(zipfile.ZIP_DEFLATED)
    yield "a bzip2 bomb", _bomb(zipfile.ZIP_BZIP2)
    yield "an LZMA bomb", _bomb(zipfile.ZIP_LZMA)
    yield "40 records in one another", _overlapping
    yield "a record of 4 GB in 16 bytes", _larger_inside
    yield "100,000 records", lambda path, canary: archive(path, fine, more=[(f"archive/data/{i}", b"") for i in range(1, 100_000)])
    yield "a file of 1 TB of nothing", lambda path, canary: _beside(path.name, 2**40)(path, canary)
    yield "a description of 3 GB", lambda path, canary: (archive(path, fine), _beside(path.stem + ".json", 3 * 2**30)(path, canary))
    yield "an owner of 3 GB", lambda path, canary: (archive(path, fine), _beside("owner.json", 3 * 2**30)(path, canary))
    yield "a raw pickle", lambda path, canary: path.write_bytes(pickle.dumps(Calls(os.system, f"touch {canary}")))
    yield "torch's old format", lambda path, canary: torch.save(Calls(os.system, f"touch {canary}"), path,
                                                               _use_new_zipfile_serialization=False)  # fmt: skip
    yield "TorchScript", _torchscript
    yield "a pipe", lambda path, canary: os.mkfifo(path)
    yield "a link to /dev/zero", lambda path, canary: path.symlink_to("/dev/zero")
    yield "a link to itself", lambda path, canary: path.symlink_to(path)
    yield "a name that is a script", lambda path, canary: archive(path.with_name("ckpt-24-<script>owned.pt"), fine)


Build = Callable[[Path, Path], Any]


def cases() -> dict[str, Build]:
    "Everything, by name: what writes the file."
    found: dict[str, Build] = {}
    here = Path("/nowhere/canary")
    with contextlib.suppress(OSError):
        found |= {f"code: {name}": _coded(i) for i, name in enumerate(NAMES)}
    found |= {f"code: opcode {name}": _by_opcode(name) for name, _ in opcodes(here)}
    found |= {f"form: {name}": lambda path, canary, state=state: archive(path, content(state)) for name, state in forms()}
    found |= {f"archive: {name}": build for name, build in archives()}
    found |= {f"meta: {name}": _said(meta) for name, meta in metas()}
    return found | {f"state: {name}": _damaged_state(change) for name, change in states()}


NAMES = ("os.system", "eval", "exec", "open", "subprocess.check_call", "runpy.run_path", "timeit.timeit", "cProfile.run", "shutil.copy",
         "pickle.loads", "torch.storage._load_from_bytes", "getattr of an import", "torch's own list of the harmless")  # fmt: skip


def _coded(i: int) -> Build:
    "Code in the state, in what it says of itself, or instead of everything."

    def build(path: Path, canary: Path) -> None:
        name, payload = list(codes(canary))[i]
        assert name == NAMES[i]
        honest = {"format": 1, "meta": META, "state": {}}
        torch.save([honest | {"state": [{"x": payload}]}, honest | {"meta": payload}, payload][i % 3], path)

    return build


def _by_opcode(name: str) -> Build:
    return lambda path, canary: archive(path, content(dict(opcodes(canary))[name]))


def _said(meta: Any) -> Build:
    return lambda path, canary: torch.save({"format": 1, "meta": meta, "state": {}}, path)


# ------------------------------------------------------------------------------------------------------- in the child


def _memory() -> dict[str, int]:
    "Largest sizes so far, in MB: what was asked for, what was used."
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return {key: int(lines[key].split()[0]) // 1024 for key in ("VmPeak", "VmHWM")}


def _guarded() -> None:
    "A process that takes too much or too long is ended by the kernel, so that the machine lives."
    size = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (size + 4 * 2**30, resource.RLIM_INFINITY))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(SECONDS)


def make(tell: Callable[..., None], folder: str, case: str) -> None:
    "A run with a hostile file in it; made by another process than the one whose memory is looked at."
    supervised(Path(folder) / "run", save_every="epoch").fit(epochs=1)
    cases()[case](Path(folder) / "run" / "checkpoints" / NAME, Path(folder) / "canary")
    (Path(folder) / "canary").unlink(missing_ok=True)


def look(tell: Callable[..., None], folder: str) -> None:
    "Everything that one may do with a hostile file that somebody sent."
    store, canary = Path(folder) / "run" / "checkpoints", Path(folder) / "canary"
    os.chdir(folder)
    path = store / NAME
    found = next((p for p in store.glob("ckpt-*24*.pt")), path)
    learn = supervised(Path(folder) / "run")
    before, size = digest(learn.state_dict()), min(found.stat().st_size if found.is_file() else 0, 2**28)
    start = _memory()
    _guarded()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        answers = {name: _answer(act) for name, act in _ways(learn, store, found).items()}
    grown = {key: value - start[key] for key, value in _memory().items()}
    signal.alarm(0)
    tell(answers=answers, same=digest(learn.state_dict()) == before, grown=grown, size=size >> 20, canary=canary.exists(),
         shown=_shown(store))  # fmt: skip


def _ways(learn: Any, store: Path, path: Path) -> dict[str, Callable[[], Any]]:
    foreign = store / "weights.pt"
    with contextlib.suppress(OSError):
        os.link(path, foreign)
    return {
        "list": lambda: (repr(Checkpoints(store)), Checkpoints(store)._repr_html_()),
        "entry": lambda: read_entry(path) if path.is_file() else None,
        "read": lambda: read_checkpoint(path),
        "weights": lambda: read_weights(foreign if foreign.exists() else path),
        "restore": lambda: learn.restore(path),
        "look": lambda: learn.at(path).__enter__(),
    }


def _answer(act: Callable[[], Any]) -> str:
    try:
        act()
    except CheckpointError as error:
        return f"refused: {str(error)[-300:]}"
    except ValueError as error:  # among them RestoreError
        return f"refused: {str(error)[-300:]}"
    except RecursionError:
        return "RecursionError"
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:200]}"
    return "taken"


def _shown(store: Path) -> list[str]:
    "What a list lets through of what is meant for a terminal or a browser."
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        shelf = Checkpoints(store)
        return ["an escape sequence"] * ("\x1b" in repr(shelf)) + ["a script"] * ("<script" in shelf._repr_html_())


def unsafe(tell: Callable[..., None], folder: str, case: str) -> None:
    "The control: would the code have run, if it had been unpickled?"
    path, canary = Path(folder) / "x.pt", Path(folder) / "canary"
    Path(folder).mkdir(parents=True)
    cases()[case](path, canary)
    for handle in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), handle)
    with contextlib.suppress(Exception):
        torch.load(path, weights_only=False)
    tell(ran=canary.exists())


def mutated(tell: Callable[..., None], folder: str, first: int, last: int) -> None:
    "Checkpoints whose pickled part has a few bytes changed at random, with checksums that are right."
    store = Path(folder) / "run" / "checkpoints"
    supervised(Path(folder) / "run", save_every="epoch").fit(epochs=1)
    learn, path = supervised(Path(folder) / "run"), store / "ckpt-000000006.pt"
    with zipfile.ZipFile(path) as file:
        records = [(name, file.read(name)) for name in file.namelist()]
    before, start = digest(learn.state_dict()), _memory()
    for seed in range(first, last):
        _guarded()
        tell(began=seed)
        rng = random.Random(seed)
        zipped(path, [(name, _mutant(data, rng) if name.endswith("data.pkl") else data) for name, data in records])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            answer = _answer(lambda: learn.restore(path))
        grown = max(value - start[key] for key, value in _memory().items())
        if answer == "taken":  # nothing that counts was hit, or a number was
            learn = supervised(Path(folder) / "run")
        tell(seed=seed, answer=answer, same=digest(learn.state_dict()) == before, grown=grown)


def _mutant(data: bytes, rng: random.Random) -> bytes:
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        at = rng.randrange(len(out))
        how = rng.randrange(4)
        if how == 0:
            out[at] ^= 1 << rng.randrange(8)
        elif how == 1:
            out[at] = rng.choice(b"(.0123]}tQR\x85\x86\x87\x93\x81bcihjqrXK\x8aJM\x8dus")
        elif how == 2:
            out[at:at] = bytes(rng.randrange(256) for _ in range(rng.randrange(1, 5)))
        else:
            del out[at : at + rng.randrange(1, 9)]
    return bytes(out)


# ------------------------------------------------------------------------------------------------------ in the parent


MAY_BE_TAKEN = {  # odd, and harmless
    "archive: a description of 3 GB", "archive: an owner of 3 GB", "meta: a note that steers the terminal",
    "meta: a note that is a script", "meta: an epoch that is a script"}  # fmt: skip


def _judge(case: str, told: dict[str, Any], row: Row) -> None:
    assert not told["canary"], "its code was run"
    assert max(told["grown"].values()) <= GROWTH + 2 * told["size"], f"the memory grew by {told['grown']} MB, the file has {told['size']}"
    wrong = {way: answer for way, answer in told["answers"].items() if not answer.startswith(("refused", "taken"))}
    assert not wrong, f"not refused in an orderly way: {wrong}"
    assert told["answers"]["list"] == "taken", f"a list can't be shown: {told['answers']['list']}"
    assert told["answers"]["entry"] == "taken", f"an entry can't be read: {told['answers']['entry']}"
    assert not told["shown"], f"a list shows {told['shown']}"
    assert case in MAY_BE_TAKEN or told["answers"]["restore"].startswith("refused"), "it was restored"
    assert told["same"] or told["answers"]["restore"] == "taken", "refused, and the memory has changed"
    row.met["refused" if told["answers"]["restore"].startswith("refused") else "harmless"] += 1


def rows(folder: Path, nursery: Nursery, every: int = 1, mutants: int = 1000) -> list[Row]:
    "Each case (or each `every`-th), and so many mutants."
    row = Row("hostile pickles and archives: code, paths, gigantic sizes, depths, lies", "refused without running anything, without "
              f"growing by {GROWTH} MB or hanging; lists are shown; memory untouched")  # fmt: skip
    control = Row("the same code, unpickled by torch.load(weights_only=False)", "it runs: the payloads are real")
    for case in [*cases()][::every]:
        with row.attempt(case):
            try:
                nursery.start("hostile", "make", folder=str(folder / "a"), case=case).done()
                _judge(case, nursery.start("hostile", "look", folder=str(folder / "a")).done(3 * SECONDS)[-1], row)
            finally:
                shutil.rmtree(folder / "a", ignore_errors=True)
        if case.removeprefix("code: ") in NAMES:
            control.tries += 1
            told = nursery.start("hostile", "unsafe", folder=str(folder / "b"), case=case).done()
            control.met["ran"] += told[-1]["ran"]
            shutil.rmtree(folder / "b")
    return [row, control, _fuzz(folder, nursery, mutants)]


def _fuzz(folder: Path, nursery: Nursery, n: int) -> Row:
    row = Row("the pickled part mutated at random, checksums right", "refused, or taken without harm; no crash, no other error")
    seed = 0
    while seed < n:
        child = nursery.start("hostile", "mutated", folder=str(folder / "m"), first=seed, last=n)
        with contextlib.suppress(TimeoutError):
            child.wait(3 * SECONDS + n)
        told = child.told()
        for line in (line for line in told if "seed" in line):
            with row.attempt(f"mutant {line['seed']}"):
                answer = line["answer"]
                row.met["refused" if answer.startswith("refused") else "taken"] += 1
                assert answer == "taken" or answer.startswith("refused"), answer
                assert line["same"], "the memory has changed"
                assert line["grown"] <= GROWTH, f"the memory grew by {line['grown']} MB"
        began = max((line["began"] for line in told if "began" in line), default=seed)
        if child.status != 0:
            with row.attempt(f"mutant {began}"):
                raise AssertionError(f"the process ended with {child.status}: {str(told[-1:])[-300:]}")
        seed = began + 1
        shutil.rmtree(folder / "m", ignore_errors=True)
    return row


assert sys.platform != "win32", "the fault suite forks, limits and mounts"
