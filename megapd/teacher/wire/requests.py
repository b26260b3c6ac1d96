"""What a student asks a served teacher about a batch. Labels never travel.

A request is an Arrow stream (messages.py) of one record batch of one row a sample:

    sample     fixed_size_binary[16]    Batch.sample_digests; the teacher computes them again from what it received
    ids        fixed_size_list[L] of uint8, uint16 or uint32, the smallest that fits
    segments   the same, where attention stops at document boundaries
    lengths    tokens of each row before its padding, the smallest unsigned type that fits, where rows are of several lengths
    positions  list of the sample's labelled positions, increasing, the smallest unsigned type that fits

Its schema's metadata: format, request (an id that a repeated request shares), step and teacher (the checkpoint's step and
digest, as the student's schedule names them), parameters (SignalSpec.parameters), and memory, JSON, where the answer goes into
the client's shared memory. The answer is megapd.signals.arrow's record batch.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from functools import lru_cache

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from megapd.batch import DIGEST_BYTES, Batch
from megapd.errors import SignalDamaged
from megapd.models import Shape
from megapd.signals import SignalSpec
from megapd.teacher.limits import excess
from megapd.teacher.wire.calls import parse_json, parse_teacher
from megapd.teacher.wire.messages import read_record
from megapd.teacher.wire.refusals import MAX_ANSWER_BYTES, Refused

FORMAT = "megapd-request/1"
COLUMNS = ("sample", "ids", "segments", "lengths", "positions")
OPTIONAL = ("segments", "lengths")

# What one request may hold. A micro-batch of 1,024 samples of 2,048 tokens is 2M tokens, 4 MiB as uint16.
MAX_SAMPLES = 1 << 16
MAX_TOKENS = 1 << 24
MAX_BYTES = 256 << 20
QUESTION_BYTES = MAX_BYTES + (1 << 20)  # with its schema
_LIMITS = tuple((int(np.iinfo(dtype).max), dtype, pa.from_numpy_dtype(dtype)) for dtype in (np.uint8, np.uint16, np.uint32))
_ARROW_TYPES = tuple(kind for *_, kind in _LIMITS)


@dataclass(frozen=True)
class Memory:
    """Where a client wants its answer: file descriptor `fd` of process `pid`, a memfd of that name and at least that size."""

    pid: int
    fd: int
    name: str
    bytes: int


@dataclass(frozen=True)
class Request:
    """One question. batch: on the host, its labels and sample ids are zeros. memory: None where the answer travels."""

    id: str
    step: int
    teacher: str
    spec: SignalSpec
    batch: Batch
    memory: Memory | None


def request_id(teacher: str, spec: SignalSpec, batch: Batch) -> str:
    """Names the question, 32 hexadecimal digits: repeated or asked by another rank, it is the same."""
    text = f"{teacher} {batch.digest} {spec.parameters}"
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def encode_request(step: int, teacher: str, spec: SignalSpec, batch: Batch) -> pa.RecordBatch:
    """The question for `batch` about the checkpoint of teacher step `step`, digest `teacher`. Ids are not negative."""
    samples, length = batch.ids.shape
    ends = np.zeros(samples + 1, dtype=np.int32)
    np.cumsum(batch.counts, out=ends[1:])
    matrices = [_small(tensor.numpy(force=True).reshape(-1)) for tensor in (batch.ids, batch.segments) if tensor is not None]
    lengths = [] if batch.lengths is None else [_small(batch.lengths.numpy(force=True))]
    positions = _small(batch.places)
    schema = _request_schema(
        length, tuple(matrix.type for matrix in matrices), tuple(column.type for column in lengths), positions.type
    )
    sample, *lists, places = schema.types
    columns = [
        pa.Array.from_buffers(sample, samples, [None, pa.py_buffer(batch.sample_digests.tobytes())], 0),
        *(pa.Array.from_buffers(kind, samples, [None], 0, children=[part]) for kind, part in zip(lists, matrices, strict=False)),
        *lengths,
        pa.Array.from_buffers(places, samples, [None, pa.py_buffer(ends)], 0, children=[positions]),
    ]
    about = {"format": FORMAT, "request": request_id(teacher, spec, batch), "step": str(step), "teacher": teacher}
    metadata = {**about, "parameters": spec.parameters}
    return pa.RecordBatch.from_arrays(columns, schema=schema.with_metadata(metadata))


@lru_cache(maxsize=256)
def _request_schema(
    length: int, matrices: tuple[pa.DataType, ...], lengths: tuple[pa.DataType, ...], positions: pa.DataType
) -> pa.Schema:
    fields = {
        "sample": pa.binary(DIGEST_BYTES),
        **{name: pa.list_(kind, length) for name, kind in zip(("ids", "segments"), matrices, strict=False)},
        **dict(zip(("lengths",), lengths, strict=False)),
        "positions": pa.list_(positions),
    }
    return pa.schema([pa.field(name, kind, nullable=False) for name, kind in fields.items()])


def with_memory(record: pa.RecordBatch, memory: Memory) -> pa.RecordBatch:
    """The same question, answered into shared memory."""
    return record.replace_schema_metadata({**record.schema.metadata, b"memory": json.dumps(asdict(memory)).encode()})


def decode_request(data: pa.Buffer) -> Request:
    """The question in an Arrow stream of what `encode_request` makes, whoever sent it; Refused, kind invalid, for anything else.
    Nothing is decoded of more than QUESTION_BYTES, nor of compressed buffers."""
    if data.size > QUESTION_BYTES:
        raise Refused("invalid", f"request: {data.size} bytes, {QUESTION_BYTES} at most; lower the micro-batch")
    try:
        return _decode(read_record(data))
    except (ValueError, SignalDamaged, pa.ArrowException) as error:  # names that are no UTF-8, for one
        raise Refused("invalid", f"request: {error}") from error


def _decode(record: pa.RecordBatch) -> Request:
    metadata = {bytes(key): bytes(value) for key, value in (record.schema.metadata or {}).items()}
    if metadata.get(b"format") != FORMAT.encode():
        raise Refused("invalid", f"request: its format is not {FORMAT}; student and teacher run different versions of megapd")
    step, teacher = parse_teacher(_text(metadata, b"step"), _text(metadata, b"teacher"))
    spec = SignalSpec.parse(_text(metadata, b"parameters"))
    names = record.schema.names
    if names != [name for name in COLUMNS if name in names or name not in OPTIONAL]:
        raise Refused("invalid", f"request: unknown columns {', '.join(names)[:200]}")
    record.validate(full=True)
    samples = record.num_rows
    if not 1 <= samples <= MAX_SAMPLES or record.nbytes > MAX_BYTES:
        limits = f"between 1 and {MAX_SAMPLES} samples and {MAX_BYTES} bytes"
        raise Refused("invalid", f"request: {samples} samples, {record.nbytes} bytes; it may hold {limits}")
    ids = _matrix(record.column("ids"), "ids")
    length = ids.shape[1]
    segments = _matrix(record.column("segments"), "segments") if "segments" in names else None
    if segments is not None and segments.shape != ids.shape:
        raise Refused("invalid", f"request: segments of length {segments.shape[1]}, but ids of length {length}")
    lengths = _lengths(record.column("lengths"), length) if "lengths" in names else None
    positions, places, counts = _positions(record.column("positions"), length)
    if lengths is not None and (places >= np.repeat(lengths, counts)).any():
        raise Refused("invalid", "request: a position in the padding of its row")
    batch = Batch(
        ids=torch.from_numpy(ids),
        segments=None if segments is None else torch.from_numpy(segments),
        positions=torch.from_numpy(positions),
        labels=torch.zeros(len(positions), dtype=torch.int64),
        sample_ids=torch.zeros(samples, dtype=torch.int64),
        lengths=None if lengths is None else torch.from_numpy(lengths),
    )
    batch.__dict__.update(counts=counts, places=places)
    if _digests(record.column("sample")) != batch.sample_digests.tobytes():
        raise Refused("invalid", "request: the samples' digests are not those of the ids that arrived; it was damaged on its way")
    if spec.k * len(positions) * 4 > MAX_ANSWER_BYTES:
        raise Refused("invalid", f"request: k {spec.k} at {len(positions)} positions is more than {MAX_ANSWER_BYTES} bytes")
    identity = request_id(teacher, spec, batch)
    if _text(metadata, b"request") != identity:
        raise Refused("invalid", "request: its id is not that of its content; it was damaged on its way")
    return Request(identity, step, teacher, spec, batch, _memory(metadata.get(b"memory")))


def check_request(request: Request, shape: Shape) -> None:
    """Refused, kind invalid, where a model of that shape cannot take the ids (teacher/limits.py) or make the answer."""
    largest = int(request.batch.ids.numpy().max())  # torch's gives the interpreter away meanwhile
    if what := excess(shape, largest, request.batch.ids.shape[1]):
        raise Refused("invalid", f"request: {what}")
    classes = shape.classes
    spec = request.spec
    if spec.definition.distinct and spec.k > classes:
        raise Refused("invalid", f"request: teacher.k {spec.k}, but the teacher has {classes} classes")
    size = 0 if spec.definition.with_head else request.batch.labelled * spec.bytes_per_position(classes, 0)
    if size > MAX_ANSWER_BYTES:
        raise Refused("invalid", f"request: its answer takes {size:.0f} bytes, {MAX_ANSWER_BYTES} at most; lower the micro-batch")


def _small(values: NDArray[np.int64]) -> pa.Array:
    # As unsigned, a negative number is larger than any that fits.
    largest = int(values.view(np.uint64).max()) if len(values) else 0
    found = next((both for limit, *both in _LIMITS if largest <= limit), None)
    if found is None:
        smallest = int(values.min())
        negative = f"ids: {smallest} is negative; token ids and segments count from 0"
        raise ValueError(negative if smallest < 0 else f"ids: {largest} does not fit into 32 bits")
    dtype, kind = found
    return pa.Array.from_buffers(kind, len(values), [None, pa.py_buffer(values.astype(dtype))], 0)


def _matrix(column: pa.Array, name: str) -> NDArray[np.int64]:
    """int64 [B, L] of a column of fixed-size lists."""
    kind = column.type
    if not pa.types.is_fixed_size_list(kind) or kind.value_type not in _ARROW_TYPES or kind.list_size < 1:
        raise Refused("invalid", f"request: {name} is of type {kind}")
    tokens = len(column) * kind.list_size
    if tokens > MAX_TOKENS:
        raise Refused("invalid", f"request: {tokens} tokens, {MAX_TOKENS} at most; lower the micro-batch")
    return _values(column, name).reshape(-1, kind.list_size)


def _lengths(column: pa.Array, length: int) -> NDArray[np.int64]:
    """int64 [B], each between 1 and `length`."""
    if column.type not in _ARROW_TYPES or column.null_count:
        raise Refused("invalid", f"request: lengths is of type {column.type}, or has nulls")
    values: NDArray[np.int64] = column.to_numpy().astype(np.int64)
    if values.min() < 1 or values.max() > length:
        raise Refused("invalid", f"request: rows of {values.min()} to {values.max()} tokens, in a width of {length}")
    return values


def _positions(column: pa.Array, length: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """(indices into the flattened B * L, their places in the samples, int64 [N]; how many each sample has, int64 [B])."""
    if not pa.types.is_list(column.type) or column.type.value_type not in _ARROW_TYPES:
        raise Refused("invalid", f"request: positions is of type {column.type}")
    values = _values(column, "positions")
    offsets = column.offsets.to_numpy()
    counts = np.diff(offsets).astype(np.int64)
    if len(values) and values.max() >= length:
        raise Refused("invalid", f"request: position {values.max()} in samples of {length} tokens")
    flat = np.repeat(np.arange(len(column), dtype=np.int64) * length, counts) + values
    if (flat[1:] <= flat[:-1]).any():
        raise Refused("invalid", "request: the positions of a sample do not increase")
    return flat, values, counts


def _values(column: pa.Array, name: str) -> NDArray[np.int64]:
    # What `flatten` gives, in a fifth of the time: 130 us of 4,096 tokens.
    if pa.types.is_fixed_size_list(column.type):
        first, last = column.offset * column.type.list_size, (column.offset + len(column)) * column.type.list_size
    else:
        first, last = column.offsets[0].as_py(), column.offsets[-1].as_py()
    leaf = column.values.slice(first, last - first)
    if column.null_count or leaf.null_count:
        raise Refused("invalid", f"request: {name} has nulls")
    values: NDArray[np.int64] = leaf.to_numpy(zero_copy_only=True).astype(np.int64)
    return values


def _digests(column: pa.Array) -> bytes:
    if column.type != pa.binary(DIGEST_BYTES) or column.null_count:
        raise Refused("invalid", f"request: sample is of type {column.type}, or has nulls")
    buffer: pa.Buffer = column.buffers()[1]
    return bytes(buffer[column.offset * DIGEST_BYTES : (column.offset + len(column)) * DIGEST_BYTES])


def _text(metadata: dict[bytes, bytes], key: bytes) -> str:
    value = metadata.get(key, b"")
    if len(value) > 1024:
        raise Refused("invalid", f"request: {key.decode()} has {len(value)} bytes")
    return value.decode(errors="replace")


def _memory(value: bytes | None) -> Memory | None:
    if value is None:
        return None
    tree = parse_json(value)
    pid, fd, name, size = (tree.get(key) for key in ("pid", "fd", "name", "bytes"))
    if type(pid) is not int or type(fd) is not int or type(size) is not int or not isinstance(name, str):
        raise Refused("invalid", "request: memory needs pid, fd, name and bytes")
    if pid < 1 or fd < 0 or not 0 < size < 1 << 48:
        raise Refused("invalid", "request: pid, fd or bytes of its memory out of range")
    return Memory(pid, fd, name, size)
