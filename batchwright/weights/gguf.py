"""A bounded reader of GGUF files: metadata and tensor positions, over a memory map.

Every count, length, offset and size is checked against the file (and against a fixed limit where
the file could be huge) before anything is allocated or read by it: the file is untrusted input
(CVE-2024-23605, CVE-2026-33298). Nothing is dequantised here and no tensor byte is read.

Layout (GGUF v3, v2 is the same to a reader): magic, version, tensor count, key count; then keys
(name, type, value); then tensor infos (name, dimensions, type, offset); then padding to
`general.alignment`, after which tensor offsets count.
"""

from __future__ import annotations

import itertools
import mmap
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import numpy.typing as npt

from batchwright.errors import ModelFormatError, ModelNotFoundError, UnsupportedModelError
from batchwright.weights.ggml_types import GGML_TYPES, GgmlType

Uint8Array = npt.NDArray[np.uint8]

MAX_KEY_BYTES = 65_535  # the specification's limit
MAX_NAME_BYTES = 256  # the specification says 64; a few converters go beyond
MAX_STRING_BYTES = 1 << 28  # the longest real strings are embedded tokenizer.json files, ~30 MB
MAX_DIMS = 4
MAX_ARRAY_DEPTH = 4
MAX_ALIGNMENT = 1 << 20
# Strings and nested arrays become Python objects, ~60 bytes each: this caps them near 1 GiB in all.
MAX_OBJECTS = 1 << 24
DEFAULT_ALIGNMENT = 32

_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")
_BOOL, _STRING, _ARRAY = 7, 8, 9
_NUMBER_DTYPES: dict[int, np.dtype[Any]] = {
    0: np.dtype("<u1"),
    1: np.dtype("<i1"),
    2: np.dtype("<u2"),
    3: np.dtype("<i2"),
    4: np.dtype("<u4"),
    5: np.dtype("<i4"),
    6: np.dtype("<f4"),
    _BOOL: np.dtype("<u1"),
    10: np.dtype("<u8"),
    11: np.dtype("<i8"),
    12: np.dtype("<f8"),
}
_MIN_KEY_BYTES = 8 + 4 + 1  # name length, type, a one-byte value
_MIN_INFO_BYTES = 8 + 4 + 8 + 4 + 8  # name length, rank, one dimension, type, offset


class GgufTensorInfo(NamedTuple):
    """Where one tensor lies.

    shape is in row-major (numpy, torch) order, the reverse of the file's; offset is in bytes from
    the start of the file; nbytes is the stored size, scales included.
    """

    name: str
    shape: tuple[int, ...]
    ggml_type: GgmlType
    offset: int
    nbytes: int


@dataclass(frozen=True)
class GgufFile:
    """An open GGUF file. It stays mapped as long as this object or an array from `raw` lives.

    metadata holds Python scalars, str, lists (of str, or of nested arrays), and numpy arrays for
    arrays of numbers or booleans. data_offset is where tensor data starts, so [0, data_offset) is
    the header.
    """

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensorInfo]
    data_offset: int
    nbytes: int
    _data: Uint8Array = field(repr=False, compare=False)  # [nbytes] uint8

    def header(self) -> Uint8Array:
        """Return everything before the tensor data: a read-only [data_offset] uint8 view."""
        return self._data[: self.data_offset]

    def raw(self, name: str) -> Uint8Array:
        """Return the stored bytes of a tensor: a read-only [nbytes] uint8 view of the map.

        Raises:
            ModelFormatError: the file has no such tensor.
        """
        info = self.tensors.get(name)
        if info is None:
            raise ModelFormatError(f"{self.path}: there is no tensor {name!r} in this file")
        return self._data[info.offset : info.offset + info.nbytes]


def read_gguf(path: Path) -> GgufFile:
    """Map a GGUF file and read its header.

    Raises:
        ModelNotFoundError: there is no file at path.
        ModelFormatError: the file is damaged, truncated or lies about its sizes.
        UnsupportedModelError: another version or byte order, one part of a split file, or a tensor
            type that is not known.
    """
    path = Path(path)
    if not path.is_file():
        raise ModelNotFoundError(f"{path}: there is no such file; give the path of a .gguf file")
    with path.open("rb") as file:
        size = file.seek(0, 2)
        if size < 24:
            raise ModelFormatError(
                f"{path}: {size} bytes is too short for a GGUF file (24 or more)"
            )
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    # The map's own length is the limit, should the file have grown or shrunk meanwhile.
    header = _Header(path, mapped)
    num_tensors, num_keys = header.read_start()
    metadata = header.read_metadata(num_keys)
    _reject_split(path, metadata)
    alignment = _alignment(path, metadata)
    infos = header.read_tensor_infos(num_tensors)
    data_offset = -(-header.pos // alignment) * alignment
    tensors = _place_tensors(path, infos, data_offset, alignment, header.size)
    data = np.frombuffer(mapped, np.uint8)
    return GgufFile(path, metadata, tensors, data_offset, header.size, data)


class _Header:
    """A cursor over the mapped header; every read is checked against the end of the file."""

    def __init__(self, path: Path, mapped: mmap.mmap) -> None:
        self.path = path
        self.mapped = mapped
        self.size = len(mapped)
        self.pos = 0
        self.num_objects = 0

    def fail(self, what: str) -> NoReturn:
        raise ModelFormatError(
            f"{self.path}: {what} (at byte {self.pos} of {self.size}); "
            "the file is damaged or incomplete, fetch it again"
        )

    def need(self, num_bytes: int, what: str) -> None:
        """Fail unless num_bytes more bytes exist."""
        if num_bytes > self.size - self.pos:
            self.fail(f"{what} needs {num_bytes} bytes, {self.size - self.pos} are left")

    def u32(self, what: str) -> int:
        self.need(4, what)
        (value,) = _U32.unpack_from(self.mapped, self.pos)
        self.pos += 4
        return int(value)

    def u64(self, what: str) -> int:
        self.need(8, what)
        (value,) = _U64.unpack_from(self.mapped, self.pos)
        self.pos += 8
        return int(value)

    def string(self, what: str, limit: int) -> str:
        length = self.u64(f"the length of {what}")
        if length > limit:
            self.fail(f"{what} has {length} bytes, the limit is {limit}")
        self.need(length, what)
        raw = self.mapped[self.pos : self.pos + length]
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            self.fail(f"{what} is not UTF-8: {error.reason} at its byte {error.start}")
        self.pos += length
        return text

    def count_objects(self, count: int, what: str) -> None:
        self.num_objects += count
        if self.num_objects > MAX_OBJECTS:
            self.fail(
                f"{what} brings the values in arrays to {self.num_objects}, "
                f"the limit is {MAX_OBJECTS}"
            )

    def read_start(self) -> tuple[int, int]:
        """Read magic, version and the two counts; return (number of tensors, number of keys)."""
        if self.mapped[:4] != b"GGUF":
            self.fail(f"the file starts with {self.mapped[:4]!r}, a GGUF file with b'GGUF'")
        self.pos = 4
        version = self.u32("the version")
        if version not in (2, 3):
            big_endian = (
                "a big-endian file" if version & 0xFFFF == 0 and version else "this version"
            )
            raise UnsupportedModelError(
                f"{self.path}: GGUF version {version}, {big_endian} is not supported; "
                "supported: versions 2 and 3, little-endian; convert the model again"
            )
        num_tensors, num_keys = self.u64("the number of tensors"), self.u64("the number of keys")
        left = self.size - self.pos
        if num_keys > left // _MIN_KEY_BYTES:
            self.fail(f"{num_keys} metadata keys cannot fit in the {left} bytes left")
        if num_tensors > left // _MIN_INFO_BYTES:
            self.fail(f"{num_tensors} tensors cannot fit in the {left} bytes left")
        return num_tensors, num_keys

    def read_metadata(self, num_keys: int) -> dict[str, Any]:
        metadata: dict[str, Any] = {}
        for index in range(num_keys):
            key = self.string(f"the name of metadata key {index}", MAX_KEY_BYTES)
            if key in metadata:
                self.fail(f"metadata key {key!r} appears twice")
            what = f"metadata key {key!r}"
            metadata[key] = self.value(self.u32(f"the type of {what}"), what)
        return metadata

    def value(self, kind: int, what: str) -> Any:
        if kind == _STRING:
            return self.string(what, MAX_STRING_BYTES)
        if kind == _ARRAY:
            return self.array(what, depth=1)
        return self.numbers(kind, 1, what)[0].item()

    def array(self, what: str, depth: int) -> Any:
        """Read an array: numbers as numpy, strings and nested arrays as lists."""
        if depth > MAX_ARRAY_DEPTH:
            self.fail(f"{what} nests arrays {depth} deep, the limit is {MAX_ARRAY_DEPTH}")
        kind = self.u32(f"the element type of {what}")
        count = self.u64(f"the length of {what}")
        if kind == _STRING:
            return self.strings(count, what)
        if kind == _ARRAY:
            self.need(12 * count, what)
            self.count_objects(count, what)
            return [self.array(what, depth + 1) for _ in range(count)]
        return self.numbers(kind, count, what)

    def numbers(self, kind: int, count: int, what: str) -> npt.NDArray[Any]:
        """Read `count` numbers as an aligned copy in host memory; booleans must be 0 or 1."""
        dtype = _NUMBER_DTYPES.get(kind)
        if dtype is None:
            self.fail(f"{what} has type {kind}, known types are 0 to 12")
        self.need(dtype.itemsize * count, what)
        values = np.frombuffer(self.mapped, dtype, count, self.pos).copy()
        if kind == _BOOL:
            if values.size and values.max() > 1:
                self.fail(f"{what} holds {values.max()} where a boolean (0 or 1) is expected")
            values = values.astype(np.bool_)
        self.pos += dtype.itemsize * count
        return values

    def strings(self, count: int, what: str) -> list[str]:
        """Read `count` strings; inlined because vocabularies hold hundreds of thousands."""
        self.need(8 * count, what)
        self.count_objects(count, what)
        mapped, size, pos, unpack = self.mapped, self.size, self.pos, _U64.unpack_from
        out: list[str] = []
        try:
            for _ in range(count):
                if pos + 8 > size:
                    break
                start = pos + 8
                pos = start + unpack(mapped, pos)[0]
                if pos > size:
                    break
                out.append(mapped[start:pos].decode("utf-8"))
        except UnicodeDecodeError as error:
            self.fail(f"{what}, element {len(out)}, is not UTF-8: {error.reason}")
        if len(out) < count:
            self.fail(f"{what}, element {len(out)} of {count}, ends after the file")
        self.pos = pos
        return out

    def read_tensor_infos(self, num_tensors: int) -> list[tuple[str, tuple[int, ...], int, int]]:
        """Read (name, row-major shape, type id, offset) of every tensor, still unchecked."""
        self.need(_MIN_INFO_BYTES * num_tensors, f"{num_tensors} tensor infos")
        infos = []
        for index in range(num_tensors):
            name = self.string(f"the name of tensor {index}", MAX_NAME_BYTES)
            num_dims = self.u32(f"the rank of tensor {name!r}")
            if not 1 <= num_dims <= MAX_DIMS:
                self.fail(f"tensor {name!r} has {num_dims} dimensions, 1 to {MAX_DIMS} are allowed")
            dims = [self.u64(f"the shape of tensor {name!r}") for _ in range(num_dims)]
            kind = self.u32(f"the type of tensor {name!r}")
            offset = self.u64(f"the offset of tensor {name!r}")
            infos.append((name, tuple(reversed(dims)), kind, offset))
        return infos


def _reject_split(path: Path, metadata: dict[str, Any]) -> None:
    count = metadata.get("split.count", 1)
    if isinstance(count, int) and count > 1:
        raise UnsupportedModelError(
            f"{path}: this is one of {count} parts of a split GGUF, which is not supported; "
            "supported: one file; join the parts with `llama-gguf-split --merge`"
        )


def _alignment(path: Path, metadata: dict[str, Any]) -> int:
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    is_number = isinstance(alignment, int) and not isinstance(alignment, bool)
    if not is_number or not 8 <= alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
        raise ModelFormatError(
            f"{path}: general.alignment is {str(alignment)[:40]}, it must be a power of two from 8 "
            f"to {MAX_ALIGNMENT}; the file is damaged, fetch it again"
        )
    return int(alignment)


def _place_tensors(
    path: Path,
    infos: list[tuple[str, tuple[int, ...], int, int]],
    data_offset: int,
    alignment: int,
    file_size: int,
) -> dict[str, GgufTensorInfo]:
    """Check every tensor's type, shape and extent, alone and against the others."""
    tensors: dict[str, GgufTensorInfo] = {}
    for name, shape, kind, offset in infos:
        if name in tensors:
            raise _bad_tensor(path, name, "appears twice")
        if offset % alignment:
            raise _bad_tensor(path, name, f"has offset {offset}, no multiple of {alignment}")
        ggml_type = GGML_TYPES.get(kind)
        if ggml_type is None:
            known = ", ".join(known.name for known in GGML_TYPES.values())
            raise UnsupportedModelError(
                f"{path}: tensor {name!r} has type {kind}, which this version does not know; "
                f"known types: {known}; convert the model to one of them"
            )
        nbytes = _stored_bytes(path, name, shape, ggml_type)
        start = data_offset + offset
        if start + nbytes > file_size:
            raise _bad_tensor(
                path, name, f"ends at byte {start + nbytes}, the file at byte {file_size}"
            )
        tensors[name] = GgufTensorInfo(name, shape, ggml_type, start, nbytes)
    _reject_overlaps(path, tensors)
    return tensors


def _stored_bytes(path: Path, name: str, shape: tuple[int, ...], ggml_type: GgmlType) -> int:
    num_values = 1
    for dim in shape:
        num_values *= dim  # Python integers: no overflow, and at most 4 x 64 bits
    if num_values == 0:
        raise _bad_tensor(path, name, f"has shape {list(shape)}, every dimension must be 1 or more")
    if shape[-1] % ggml_type.block_size:
        raise _bad_tensor(
            path,
            name,
            f"has rows of {shape[-1]} values, {ggml_type.name} needs a multiple of "
            f"{ggml_type.block_size}",
        )
    return num_values // ggml_type.block_size * ggml_type.block_bytes


def _reject_overlaps(path: Path, tensors: dict[str, GgufTensorInfo]) -> None:
    ordered = sorted(tensors.values(), key=lambda info: info.offset)
    for left, right in itertools.pairwise(ordered):
        if left.offset + left.nbytes > right.offset:
            raise _bad_tensor(
                path,
                right.name,
                f"starts at byte {right.offset}, inside {left.name!r} which ends at "
                f"{left.offset + left.nbytes}",
            )


def _bad_tensor(path: Path, name: str, what: str) -> ModelFormatError:
    return ModelFormatError(
        f"{path}: tensor {name!r} {what}; the file is damaged or incomplete, fetch it again"
    )
