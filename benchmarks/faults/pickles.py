"Pickles and archives by hand: what torch would never write, byte by byte."

from __future__ import annotations

import json
import struct
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

META = json.dumps({"step": 24, "seq": 9, "time": 1.0, "info": {}})
Records = list[tuple[str, bytes]]


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


def record(name: str, data: bytes, at: int, extra: bytes = b"") -> tuple[bytes, bytes]:
    "A record's header and its line in the table of contents, for an archive made by hand."
    fields = struct.pack("<HHHIIIHH", 0, 0, 0x21, zlib.crc32(data), len(data), len(data), len(name), len(extra))
    header = struct.pack("<IHH", 0x04034B50, 20, 0) + fields + name.encode() + extra
    fields = struct.pack("<HHHIIIHH", 0, 0, 0x21, zlib.crc32(data), len(data), len(data), len(name), 0)
    return header, struct.pack("<IHHH", 0x02014B50, 20, 20, 0) + fields + struct.pack("<HHHII", 0, 0, 0, 0, at) + name.encode()


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
