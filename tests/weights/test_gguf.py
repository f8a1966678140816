"""The GGUF reader: against the `gguf` package, and against files that lie."""

from __future__ import annotations

import struct
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest

from batchwright.errors import ModelFormatError, ModelNotFoundError, UnsupportedModelError
from batchwright.weights.gguf import MAX_ARRAY_DEPTH, MAX_OBJECTS, read_gguf


def test_smollm2_equals_the_reference_reader(
    smollm2: Path, smollm2_reference: gguf.GGUFReader
) -> None:
    ours, reference = read_gguf(smollm2), smollm2_reference
    theirs = {key: value for key, value in reference.fields.items() if not key.startswith("GGUF.")}
    assert list(ours.metadata) == list(theirs)
    for key, value in ours.metadata.items():
        want = theirs[key].contents()
        np.testing.assert_array_equal(np.asarray(value), np.asarray(want), err_msg=key)
    assert [t.name for t in reference.tensors] == list(ours.tensors)
    for tensor in reference.tensors:
        info = ours.tensors[tensor.name]
        assert info.shape == tuple(int(dim) for dim in reversed(tensor.shape))
        assert (info.ggml_type.name, info.offset) == (tensor.tensor_type.name, tensor.data_offset)
        assert info.nbytes == tensor.n_bytes
        raw = tensor.data.reshape(-1).view(np.uint8)
        np.testing.assert_array_equal(ours.raw(tensor.name), raw)
    assert ours.data_offset == reference.data_offset
    assert ours.header().size == ours.data_offset


def test_values_have_plain_types(tiny_gguf: Path) -> None:
    metadata = read_gguf(tiny_gguf).metadata
    assert metadata["general.architecture"] == "llama"
    assert metadata["tokenizer.ggml.tokens"][3] == "tök3"
    assert metadata["tokenizer.ggml.add_bos_token"] is False
    assert type(metadata["llama.block_count"]) is int
    assert type(metadata["llama.rope.freq_base"]) is float
    assert metadata["tokenizer.ggml.token_type"].dtype == np.int32
    assert metadata["test.flags"].tolist() == [True, False, True]
    assert metadata["test.flags"].dtype == np.bool_


def test_raw_is_a_read_only_view_and_knows_its_names(tiny_gguf: Path) -> None:
    file = read_gguf(tiny_gguf)
    raw = file.raw("output_norm.weight")
    assert raw.size == 128
    assert not raw.flags.writeable
    assert not raw.flags.owndata
    with pytest.raises(ModelFormatError, match=r"no tensor 'blk\.9"):
        file.raw("blk.9.x.weight")


# --- files made by hand -------------------------------------------------------------------------


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def key(name: str | bytes, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def info(name: str, dims: list[int], kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def file_of(
    keys: list[bytes], infos: list[bytes], data: bytes = b"\0" * 4096, *, magic: bytes = b"GGUF",
    version: int = 3, num_infos: int | None = None, num_keys: int | None = None, pad: int = 32,
) -> bytes:  # fmt: skip
    head = magic + struct.pack(
        "<IQQ",
        version,
        len(infos) if num_infos is None else num_infos,
        len(keys) if num_keys is None else num_keys,
    )
    head += b"".join(keys) + b"".join(infos)
    return head + b"\0" * (-len(head) % pad) + data


def array(kind: int, count: int, body: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, count) + body


def nested(depth: int) -> bytes:
    return array(9, 1) * (depth - 1) + array(4, 1, b"\0\0\0\0")


U32 = struct.Struct("<I").pack
A = info("a", [8])

DAMAGED = {
    "empty": (b"", "0 bytes is too short"),
    "too short": (b"GGUF\3\0\0\0", "8 bytes is too short"),
    "magic": (file_of([], [], magic=b"GGML"), r"starts with b'GGML'"),
    "key count": (file_of([], [], num_keys=1 << 60), r"1152921504606846976 metadata keys cannot"),
    "tensor count": (file_of([], [], num_infos=1 << 63), r"tensors cannot fit"),
    "missing tensors": (file_of([], [A], data=b"", num_infos=2, pad=1), r"tensors cannot fit"),
    "key too long": (file_of([text("x" * 70_000)], []), r"has 70000 bytes, the limit is 65535"),
    "key past the end": (file_of([struct.pack("<Q", 60_000)], []), r"needs 60000 bytes"),
    "key not UTF-8": (file_of([key(b"k\xff", 4, U32(1))], []), "key 0 is not UTF-8"),
    "string not UTF-8": (file_of([key("k", 8, text(b"ab\xff"))], []), r"'k' is not UTF-8"),
    "string length": (file_of([key("k", 8, U32(0) + U32(1 << 20))], []), "the limit is"),
    "value type": (file_of([key("k", 13, b"\0" * 8)], []), "has type 13, known types"),
    "boolean": (file_of([key("k", 7, b"\x02")], []), "holds 2 where a boolean"),
    "key twice": (file_of([key("k", 4, U32(1))] * 2, []), "'k' appears twice"),
    "array length": (file_of([key("k", 9, array(4, 1 << 61))], []), r"needs \d+ bytes"),
    "array type": (file_of([key("k", 9, array(99, 1))], []), "has type 99"),
    "string array length": (file_of([key("k", 9, array(8, 1 << 62))], []), r"needs \d+ bytes"),
    "string in array": (
        file_of([key("k", 9, array(8, 2, text("a") + struct.pack("<Q", 1 << 63)))], []),
        "element 1 of 2, ends after the file",
    ),
    "array not UTF-8": (file_of([key("k", 9, array(8, 1, text(b"\x80")))], []), "element 0, is no"),
    "array of arrays": (file_of([key("k", 9, array(9, 1 << 61))], []), r"needs \d+ bytes"),
    "nesting": (
        file_of([key("k", 9, nested(MAX_ARRAY_DEPTH + 1))], []),
        f"nests arrays {MAX_ARRAY_DEPTH + 1} deep, the limit is {MAX_ARRAY_DEPTH}",
    ),
    "alignment type": (file_of([key("general.alignment", 8, text("32"))], []), "alignment is 32"),
    "alignment value": (file_of([key("general.alignment", 4, U32(48))], []), "alignment is 48"),
    "alignment zero": (file_of([key("general.alignment", 4, U32(0))], []), "alignment is 0"),
    "alignment huge": (file_of([key("general.alignment", 4, U32(1 << 31))], []), "power of two"),
    "name too long": (file_of([], [info("n" * 300, [8])]), "has 300 bytes, the limit is 256"),
    "no dimensions": (file_of([], [info("a", [])]), "has 0 dimensions"),
    "rank": (file_of([], [info("a", [1] * 5)]), "has 5 dimensions, 1 to 4"),
    "zero dimension": (file_of([], [info("a", [8, 0])]), r"shape \[0, 8\], every dimension"),
    "overflow": (file_of([], [info("a", [1 << 32, 1 << 32])]), "ends at byte 73786976294838"),
    "overflow to zero": (file_of([], [info("a", [1 << 63, 2])]), "ends at byte"),
    "past the end": (file_of([], [info("a", [2048])]), r"ends at byte \d+, the file at byte"),
    "offset past the end": (file_of([], [info("a", [8], offset=1 << 63)]), "ends at byte"),
    "offset": (file_of([], [info("a", [8], offset=4)]), "offset 4, no multiple of 32"),
    "row": (file_of([], [info("a", [33], kind=2)]), "rows of 33 values, Q4_0 needs a multiple"),
    "tensor twice": (file_of([], [A, info("a", [8], offset=32)]), "'a' appears twice"),
    "overlap": (
        file_of([], [info("a", [16]), info("b", [8], offset=32)]),
        r"'b' starts at byte \d+, inside 'a'",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("content", "message"), DAMAGED.values(), ids=DAMAGED)
def test_damaged_files(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelFormatError, match=message) as caught:
        read_gguf(path)
    assert str(path) in str(caught.value)


def test_the_same_files_undamaged(tmp_path: Path) -> None:
    """What the damaged files were made of is sound: each of the errors above has its own cause."""
    path = tmp_path / "good.gguf"
    for keys, infos in (
        ([], []),
        ([key("k", 9, nested(MAX_ARRAY_DEPTH)), key("general.alignment", 4, U32(32))], [A]),
        ([], [info("a", [16]), info("b", [8], offset=64), info("c", [32], kind=2, offset=96)]),
    ):
        for version in (2, 3):
            path.write_bytes(file_of(keys, infos, version=version))
            assert len(read_gguf(path).tensors) == len(infos)


def test_unsupported_kinds(tmp_path: Path) -> None:
    path = tmp_path / "other.gguf"
    for content, message in (
        (file_of([], [], version=1), "GGUF version 1"),
        (file_of([], [], version=3 << 24), "a big-endian file is not supported"),
        (file_of([key("split.count", 2, b"\3\0")], []), "one of 3 parts.*llama-gguf-split --merge"),
        (file_of([], [info("a", [8], kind=99)]), "type 99, which this version does not know"),
    ):
        path.write_bytes(content)
        with pytest.raises(UnsupportedModelError, match=message):
            read_gguf(path)
    path.write_bytes(file_of([key("split.count", 2, b"\1\0")], []))
    read_gguf(path)


def test_missing_file(tmp_path: Path) -> None:
    for path in (tmp_path / "none.gguf", tmp_path):
        with pytest.raises(ModelNotFoundError, match="no such file"):
            read_gguf(path)


def test_objects_in_arrays_are_capped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("batchwright.weights.gguf.MAX_OBJECTS", 10)
    path = tmp_path / "many.gguf"
    six = array(8, 6, text("") * 6)
    path.write_bytes(file_of([key("a", 9, six), key("b", 9, six)], []))
    with pytest.raises(ModelFormatError, match="values in arrays to 12, the limit is 10"):
        read_gguf(path)
    assert MAX_OBJECTS >= 1 << 23  # room for every published vocabulary


def test_memory_is_a_small_multiple_of_the_file(tmp_path: Path) -> None:
    """The worst amplification: two-letter strings, an object of 51 bytes for 10 in the file."""
    path = tmp_path / "strings.gguf"
    words = b"".join(text(f"{index % 90 + 10}") for index in range(100_000))
    path.write_bytes(file_of([key("k", 9, array(8, 100_000, words))], []))
    tracemalloc.start()
    try:
        read_gguf(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 8 * path.stat().st_size


def test_torch_is_not_imported() -> None:
    modules = ("gguf", "ggml_types", "dequantize", "gguf_config", "gguf_names", "locate")
    imports = ", ".join(f"batchwright.weights.{module}" for module in modules)
    code = f"import sys, {imports}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_file_the_writer_made_with_another_alignment(
    make_tiny_gguf: Callable[..., Path],
) -> None:
    path = make_tiny_gguf(lambda writer: writer.add_custom_alignment(256))
    file = read_gguf(path)
    assert file.data_offset % 256 == 0
    reference = gguf.GGUFReader(path)
    for tensor in reference.tensors:
        raw = tensor.data.reshape(-1).view(np.uint8)
        np.testing.assert_array_equal(file.raw(tensor.name), raw)
