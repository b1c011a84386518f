"""The head of a GGUF file: its metadata and where each tensor lies, read without believing a single number in it.

`gguf`'s own reader makes an object of every element of every array and takes counts, lengths and offsets as they are
given: a file of a few bytes keeps it busy or fills the memory. Here a count is compared with the bytes that are left
before anything is made of it. Format: ggml's docs/gguf.md, versions 2 and 3, little-endian.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from distill.errors import CheckpointError

Value = bool | int | float | str | list[str] | np.ndarray

VERSIONS = (2, 3)
MAX_HEAD_BYTES = 2**28  # the largest vocabularies known, with their merges, take 20 MB
MAX_ELEMENTS = 2**22  # of one array
MAX_DIMENSIONS = 4

_SCALARS = {
    GGUFValueType.UINT8: "<B",
    GGUFValueType.INT8: "<b",
    GGUFValueType.UINT16: "<H",
    GGUFValueType.INT16: "<h",
    GGUFValueType.UINT32: "<I",
    GGUFValueType.INT32: "<i",
    GGUFValueType.UINT64: "<Q",
    GGUFValueType.INT64: "<q",
    GGUFValueType.FLOAT32: "<f",
    GGUFValueType.FLOAT64: "<d",
    GGUFValueType.BOOL: "<?",
}
_LEAST_FIELD_BYTES = 8 + 4 + 1  # a key's length, a type, a value
_LEAST_TENSOR_BYTES = 8 + 4 + 8 + 4 + 8  # a name's length, dimensions, one of them, a type, an offset


class GgufTensor(NamedTuple):
    """A tensor as the file describes it; `offset` is from the beginning of the file, `shape` has rows first."""

    type: GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int

    @property
    def row_bytes(self) -> int:
        block, size = GGML_QUANT_SIZES[self.type]
        return self.shape[-1] // block * size

    @property
    def num_rows(self) -> int:
        return prod(self.shape[:-1])

    @property
    def bits_per_weight(self) -> float:
        block, size = GGML_QUANT_SIZES[self.type]
        return 8 * size / block


@dataclass(frozen=True)
class GgufFile:
    """Metadata and tensors of one file. The readers of single fields raise CheckpointError naming file and field."""

    path: Path
    metadata: dict[str, Value]
    tensors: dict[str, GgufTensor]

    def fault(self, message: str, field: str) -> CheckpointError:
        """The error for what is wrong with a field or a tensor, whose name is the file's own text."""
        return CheckpointError(message, where=self.path, field=_shown(field)[1:-1])

    def integer(self, key: str, default: int | None = None, *, least: int = 0, most: int = 2**31 - 1) -> int:
        value = self.metadata.get(key, default)
        if value is None:
            raise self.fault("required, but not given", key)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise self.fault(f"must be a whole number from {least} to {most}, got {_shown(value)}", key)
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A positive, finite number."""
        value = self.metadata.get(key, default)
        if value is None:
            raise self.fault("required, but not given", key)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
            raise self.fault(f"must be a positive number, got {_shown(value)}", key)
        return float(value)

    def text(self, key: str, default: str | None = None) -> str:
        value = self.metadata.get(key, default)
        if value is None:
            raise self.fault("required, but not given", key)
        if not isinstance(value, str):
            raise self.fault(f"must be a string, got {_shown(value)}", key)
        return value

    def switch(self, key: str, default: bool) -> bool:
        value = self.metadata.get(key, default)
        if not isinstance(value, bool):
            raise self.fault(f"must be true or false, got {_shown(value)}", key)
        return value

    def texts(self, key: str) -> list[str]:
        value = self.metadata.get(key)
        if value is None:
            raise self.fault("required, but not given", key)
        if not isinstance(value, list):
            raise self.fault(f"must be an array of strings, got {_shown(value)}", key)
        return value

    def numbers(self, key: str, length: int) -> np.ndarray | None:
        """An array of `length` numbers, or None where there is none."""
        value = self.metadata.get(key)
        if value is None:
            return None
        if not isinstance(value, np.ndarray) or len(value) != length:
            raise self.fault(f"must be an array of {length} numbers, got {_shown(value)}", key)
        return value


def read_gguf(path: Path) -> GgufFile:
    """Read and judge a file's head.

    Raises CheckpointError for a file that is truncated or no GGUF file, for what occurs twice, for counts, lengths and
    shapes that its bytes cannot hold, for types that nobody knows, and for tensors that overlap.
    """
    try:
        with path.open("rb") as file:
            return _Reader(path, file).read()
    except OSError as exc:
        raise CheckpointError(f"cannot be read ({exc.strerror or exc})", where=path) from exc


class _Reader:
    def __init__(self, path: Path, file: BinaryIO) -> None:
        self._path = path
        self._file = file
        self._size = path.stat().st_size
        self._at = 0

    def read(self) -> GgufFile:
        if self._size < 24 or self._bytes(4, "magic") != b"GGUF":
            raise CheckpointError("is truncated or not a GGUF file", where=self._path)
        version = self._number("<I", "version")
        if version not in VERSIONS:
            raise self._fault(f"must be {' or '.join(map(str, VERSIONS))}, little-endian; got {version}", "version")
        num_tensors = self._count("tensor_count", _LEAST_TENSOR_BYTES)
        num_fields = self._count("metadata_kv_count", _LEAST_FIELD_BYTES)
        metadata: dict[str, Value] = {}
        for _ in range(num_fields):
            key = self._string("a metadata key")
            if key in metadata:
                raise self._fault("occurs twice", key)
            metadata[key] = self._value(self._type(key), key)
        head = GgufFile(self._path, metadata, {})
        if (parts := head.integer("split.count", 1)) > 1:
            message = f"is one of {parts} parts; join them first (llama-gguf-split --merge)"
            raise self._fault(message, "split.count")
        tensors = dict(self._tensor_infos(num_tensors))
        alignment = head.integer("general.alignment", 32, least=1, most=2**20)
        if alignment & (alignment - 1):
            raise self._fault(f"must be a power of two, got {alignment}", "general.alignment")
        begin = -(-self._at // alignment) * alignment
        return GgufFile(self._path, metadata, self._placed(tensors, begin, alignment))

    def _tensor_infos(self, count: int) -> dict[str, GgufTensor]:
        found: dict[str, GgufTensor] = {}
        for _ in range(count):
            name = self._string("a tensor's name")
            if name in found:
                raise self._fault("occurs twice", name)
            num_dimensions = self._number("<I", name)
            if not 1 <= num_dimensions <= MAX_DIMENSIONS:
                raise self._fault(f"must have 1 to {MAX_DIMENSIONS} dimensions, got {num_dimensions}", name)
            # The file names the fastest dimension first.
            shape = tuple(self._number("<Q", name) for _ in range(num_dimensions))[::-1]
            found[name] = GgufTensor(self._quantisation(name), shape, self._number("<Q", name))
        return found

    def _quantisation(self, name: str) -> GGMLQuantizationType:
        number = self._number("<I", name)
        try:
            return GGMLQuantizationType(number)
        except ValueError as exc:
            raise self._fault(f"has a quantisation that nobody knows: type {number}", name) from exc

    def _placed(self, tensors: dict[str, GgufTensor], begin: int, alignment: int) -> dict[str, GgufTensor]:
        """The tensors with their offsets from the beginning of the file, judged by the bytes that are there."""
        placed: dict[str, GgufTensor] = {}
        free = begin
        for name, tensor in sorted(tensors.items(), key=lambda item: item[1].offset):
            block, _ = GGML_QUANT_SIZES[tensor.type]
            shape = list(tensor.shape)
            if min(shape) < 1 or shape[-1] % block:
                raise self._fault(f"has shape {shape}; {tensor.type.name} needs rows of a multiple of {block}", name)
            offset = begin + tensor.offset
            if tensor.offset % alignment or offset < free:
                raise self._fault(f"begins within another tensor, or not at a multiple of {alignment}", name)
            free = offset + tensor.num_rows * tensor.row_bytes
            if free > self._size:
                raise self._fault(
                    f"is truncated: {tensor.type.name} {shape} ends {free - self._size} bytes later", name
                )
            placed[name] = tensor._replace(offset=offset)
        return placed

    def _value(self, kind: GGUFValueType, key: str) -> Value:
        if kind == GGUFValueType.STRING:
            return self._string(key)
        if kind != GGUFValueType.ARRAY:
            return self._scalar(_SCALARS[kind], key)
        kind = self._type(key)
        if kind == GGUFValueType.ARRAY:
            raise self._fault("is an array of arrays, which no model needs", key)
        width = 8 if kind == GGUFValueType.STRING else struct.calcsize(_SCALARS[kind])
        length = self._count(key, width)
        if length > MAX_ELEMENTS:
            raise self._fault(f"has {length:,} elements; at most {MAX_ELEMENTS:,} are read", key)
        if kind == GGUFValueType.STRING:
            return [self._string(f"{key}[{index}]") for index in range(length)]
        return np.frombuffer(self._bytes(length * width, key), dtype=_SCALARS[kind])

    def _type(self, key: str) -> GGUFValueType:
        number = self._number("<I", key)
        try:
            return GGUFValueType(number)
        except ValueError as exc:
            raise self._fault(f"has a type that nobody knows: {number}", key) from exc

    def _count(self, field: str, least_bytes: int) -> int:
        """A count of things that take at least `least_bytes` each."""
        count = self._number("<Q", field)
        if count * least_bytes > self._size - self._at:
            raise self._fault(f"is {count}, more than the file's {self._size} bytes can hold", field)
        return count

    def _string(self, field: str) -> str:
        raw = self._bytes(self._number("<Q", field), field)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as exc:
            raise self._fault("is not UTF-8", field) from exc

    def _number(self, form: str, field: str) -> int:
        return int(self._scalar(form, field))

    def _scalar(self, form: str, field: str) -> bool | int | float:
        value: bool | int | float
        (value,) = struct.unpack(form, self._bytes(struct.calcsize(form), field))
        return float(str(np.float32(value))) if form == "<f" else value  # 1e-5, not 9.999999747378752e-06

    def _bytes(self, length: int, field: str) -> bytes:
        if length > self._size - self._at:
            raise self._fault(f"is truncated: {length} bytes wanted, {self._size - self._at} left", field)
        self._at += length
        if self._at > MAX_HEAD_BYTES:
            raise self._fault(f"ends past {MAX_HEAD_BYTES:,} bytes, where no head does", field)
        data = self._file.read(length)
        if len(data) != length:
            raise self._fault("is truncated while it is read", field)
        return data

    def _fault(self, message: str, field: str) -> CheckpointError:
        return GgufFile(self._path, {}, {}).fault(message, field)


def _shown(value: object) -> str:
    """A wrong value in a line: its beginning, or the kind and length of an array."""
    if isinstance(value, list | np.ndarray):
        return f"an array of {len(value)}"
    text = repr(value)
    return text if len(text) < 80 else f"{text[:79]}…"
