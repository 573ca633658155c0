"Files made by somebody who means harm, by name: code, paths, gigantic sizes, depths, lies."

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import struct
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from .pickles import META, archive, bytearray_of, content, forms, glob, number, record, storage, tensor, text, zipped

Build = Callable[[Path, Path], Any]  # writes the file, given its path and that of a canary that its code would create


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
    kind = glob(f"{name}.system") + touch + text("cpu") + number(4)
    yield "a function as the kind of a storage", b"(" + text("storage") + kind + b"tQ"
    yield "PERSID", b"P" + f"touch {canary}\n".encode()


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


def _damaged_state(change: Callable[[dict[str, Any]], Any]) -> Build:
    "An honest checkpoint, and then."

    def build(path: Path, canary: Path) -> None:
        honest = torch.load(sorted(path.parent.glob("ckpt-*.pt"))[0], weights_only=True)
        change(honest["state"])
        torch.save(honest | {"meta": META}, path)

    return build


def _adam(state: dict[str, Any]) -> dict[str, Any]:
    return state["players"]["model"]["optimizer"]["state"][0]


def _model(state: dict[str, Any]) -> dict[str, Any]:
    return state["players"]["model"]["modules"]["model"]


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
    yield "weights of another kind", lambda s: _model(s).update({"head.bias": torch.zeros(1).int()})
    yield "a random state of floats", lambda s: s["rng"].update(torch=torch.zeros(5056))
    yield "a random state that is short", lambda s: s["rng"].update(torch=torch.zeros(3, dtype=torch.uint8))
    yield "betas that are text", lambda s: s["players"]["model"]["optimizer"]["param_groups"][0].update(betas="xy")
    yield "a step before the first", lambda s: s["position"].update(step=-4)
    yield "no word of what the code said", lambda s: s["players"]["model"].update(said={})
    yield "an identity that is a number", lambda s: s.update(identity=5)
    yield "callbacks' words that are a list", lambda s: s.update(said=[1])


def _bomb(compression: int) -> Build:
    return lambda path, canary: archive(path, content(tensor(storage(4))), bytes(200_000_000), compression=compression)


def _overlapping(path: Path, canary: Path) -> None:
    "Forty storages of 20 MB in 20 MB: each record contains the next one's header, with checksums that are right."
    n, step = 40, 48  # a header's length: a whole number of floats
    whole, central = bytes(20_000_000), b""
    for i in reversed(range(n)):  # the innermost first
        header, line = record(f"archive/data/{i:03d}", whole, step * i, b"\0\0")
        assert len(header) == step, len(header)
        whole, central = header + whole, central + line
    held = [storage(5_000_000 + step // 4 * (n - 1 - i), key=f"{i:03d}") for i in range(n)]
    pickled = content(b"](" + b"".join(map(tensor, held)) + b"e")
    for name, data in (("archive/data.pkl", pickled), ("archive/version", b"3\n")):
        header, line = record(name, data, len(whole))
        whole, central = whole + header + data, central + line
    end = struct.pack("<IHHHHIIH", 0x06054B50, 0, 0, n + 2, n + 2, len(central), len(whole), 0)
    path.write_bytes(whole + central + end)


def _larger_inside(path: Path, canary: Path) -> None:
    "The table of contents says 1 TB for a record of 16 bytes."
    archive(path, content(tensor(storage(4))))
    data = bytearray(path.read_bytes())
    at = data.rindex(b"archive/data/0") - 46
    data[at + 24 : at + 28] = struct.pack("<I", 2**32 - 2)
    path.write_bytes(data)


def _renamed(pairs: dict[str, str]) -> Build:
    def build(path: Path, canary: Path) -> None:
        archive(path, content(bytearray_of(1_500_000_000)))
        with zipfile.ZipFile(path) as file:
            records = [(pairs.get(name, name), file.read(name)) for name in file.namelist()]
        zipped(path, records)

    return build


def _twice(first: bytes, last: bytes) -> Build:
    def build(path: Path, canary: Path) -> None:
        zipped(path, [("archive/data.pkl", first), ("archive/version", b"3\n"), ("archive/data/0", bytes(16)),
                      ("archive/data.pkl", last)])  # fmt: skip

    return build


def _with_record(name: str) -> Build:
    return lambda path, canary: archive(path, content(tensor(storage(4))), more=[(name.replace("CANARY", str(canary)), b"owned")])


def _beside(name: str, size: int) -> Build:
    "An honest file, and a gigantic one (all holes) beside it."

    def build(path: Path, canary: Path) -> None:
        with open(path.parent / name, "wb") as file:
            file.truncate(size)

    return build


def _torchscript(path: Path, canary: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), str(path))


def archives() -> Iterator[tuple[str, Build]]:
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
    many = [(f"archive/data/{i}", b"") for i in range(1, 100_000)]
    yield "100,000 records", lambda path, canary: archive(path, fine, more=many)
    yield "a file of 1 TB of nothing", lambda path, canary: _beside(path.name, 2**40)(path, canary)
    yield "a description of 3 GB", lambda path, canary: (archive(path, fine), _beside(path.stem + ".json", 3 << 30)(path, canary))
    yield "an owner of 3 GB", lambda path, canary: (archive(path, fine), _beside("owner.json", 3 << 30)(path, canary))
    yield "a raw pickle", lambda path, canary: path.write_bytes(pickle.dumps(Calls(os.system, f"touch {canary}")))
    yield "torch's old format", lambda path, canary: torch.save(Calls(os.system, f"touch {canary}"), path,
                                                               _use_new_zipfile_serialization=False)  # fmt: skip
    yield "TorchScript", _torchscript
    yield "a pipe", lambda path, canary: os.mkfifo(path)
    yield "a link to /dev/zero", lambda path, canary: path.symlink_to("/dev/zero")
    yield "a link to itself", lambda path, canary: path.symlink_to(path)
    yield "a name that is a script", lambda path, canary: archive(path.with_name("ckpt-24-<script>owned.pt"), fine)


def cases() -> dict[str, Build]:
    "Everything, by name: what writes the file."
    found = {f"code: {name}": _coded(i) for i, name in enumerate(NAMES)}
    found |= {f"code: opcode {name}": _by_opcode(name) for name, _ in opcodes(Path("canary"))}
    found |= {f"form: {name}": lambda path, canary, state=state: archive(path, content(state)) for name, state in forms()}
    found |= {f"archive: {name}": build for name, build in archives()}
    found |= {f"meta: {name}": _said(meta) for name, meta in metas()}
    return found | {f"state: {name}": _damaged_state(change) for name, change in states()}


NAMES = ("os.system", "eval", "exec", "open", "subprocess.check_call", "runpy.run_path", "timeit.timeit", "cProfile.run",
         "shutil.copy", "pickle.loads", "torch.storage._load_from_bytes", "getattr of an import",
         "torch's own list of the harmless")  # fmt: skip


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
    def build(path: Path, canary: Path) -> None:
        honest = torch.load(sorted(path.parent.glob("ckpt-*.pt"))[0], weights_only=True)
        torch.save(honest | {"meta": meta}, path)

    return build
