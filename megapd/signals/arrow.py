"""The Arrow form of signals: the one format on the wire, in shared memory and on disk.

A record batch has one row a sample, so that a signal can be cut and put together at samples, whatever micro-batch asked:

    sample    fixed_size_binary[16]   what was asked about the sample, Batch.sample_digests
    teacher   fixed_size_binary[32]   digest of the checkpoint that answered
    checksum  uint64                  xxh3 of the row: parameters, teacher, sample, then the bytes of the columns below
    values    large_list of the sample's labelled positions, as the kind's columns say:
              dense     fixed_size_list[V] of logits
              hidden    fixed_size_list[D] of final hidden states; the head travels apart, once a rotation
              topk      fixed_size_list[K] of class ids by falling probability, uint16 where V fits, else uint32
              sampled   fixed_size_list[K] of class ids, drawn with replacement from the teacher's distribution
              argmax    class ids
    scale     large_list of float32, int8 alone: a position's values are scale times the integers
    logprobs  large_list of fixed_size_list[K], topk alone: log softmax of logits / temperature, over all V classes
    log_rest  large_list, topk alone: log of the mass of the other classes

bf16 is stored as its bits in int16. The schema's metadata holds format and parameters (SignalSpec.parameters).

A head, what hidden states are multiplied with, travels once a rotation, and lies once in a cache's folder: record batches of
rows of the weight, with columns weight fixed_size_list[D] and, where there is one, bias. The schema's metadata holds format,
teacher, dtype, classes and the xxh3 of weight and bias.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import xxhash
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from megapd.batch import DIGEST_BYTES, Batch
from megapd.errors import SignalDamaged, SignalMismatch
from megapd.signals.signal import DTYPES, Column, Head, Signal, SignalSpec, id_type, pack, product

FORMAT, HEAD_FORMAT = "megapd-signal/1", "megapd-head/1"
HEAD_CHUNK_BYTES = 4 << 20  # of the head's weight a record batch
TEACHER_DIGEST_BYTES = 32
ARROW_TYPES = {"fp32": pa.float32(), "bf16": pa.int16(), "fp16": pa.float16(), "int8": pa.int8()}

# What Arrow's readers raise for bytes that are none of its own; a failure of the disk is an OSError too, when the file is opened.
NO_ARROW = (pa.ArrowException, OSError, ValueError, KeyError, TypeError, IndexError, OverflowError, NotImplementedError)

# The first columns of every record; those of the kind follow.
_ABOUT = {"sample": pa.binary(DIGEST_BYTES), "teacher": pa.binary(TEACHER_DIGEST_BYTES), "checksum": pa.uint64()}

# A column's values of all samples as one flat array, and how many a position has; None: one alone.
Leaf = tuple[pa.Array, int | None]


def encode(signal: Signal, batch: Batch, classes: int) -> pa.RecordBatch:
    """The signal of `batch`, packed or not, as a record batch of one row a sample. classes: of the teacher's head; ids are below
    it."""
    signal, spec, counts = pack(signal), signal.spec, batch.counts
    assert counts.sum() == signal.values.shape[0]
    data = {column.name: _data(getattr(signal, column.name), column, classes) for column in spec.columns}
    samples = batch.sample_digests.view(np.uint8).reshape(-1, DIGEST_BYTES)
    teachers = np.tile(np.frombuffer(bytes.fromhex(signal.teacher), np.uint8), (batch.samples, 1))
    about = (samples, teachers, _checksums(spec, teachers, samples, counts, list(data.values())))
    columns = {
        name: pa.Array.from_buffers(arrow_type, batch.samples, [None, pa.py_buffer(np.ascontiguousarray(values))])
        for (name, arrow_type), values in zip(_ABOUT.items(), about, strict=True)
    }
    ends = np.concatenate([[0], np.cumsum(counts)])
    offsets = pa.Array.from_buffers(pa.int64(), len(ends), [None, pa.py_buffer(ends)])
    columns |= {name: pa.LargeListArray.from_arrays(offsets, _rows(values)) for name, values in data.items()}
    schema = _schema(columns, {"format": FORMAT, "parameters": spec.parameters})
    return pa.RecordBatch.from_arrays(list(columns.values()), schema=schema)


def decode(record: pa.RecordBatch, spec: SignalSpec, teacher: str, batch: Batch, head: Head | None = None) -> Signal:
    """The signal in `record`, which must answer `batch` by `teacher` and hold what `spec` asks for.

    Tensors are on the host and, where the type allows, views of the record's memory. Raises SignalMismatch if the record is of
    another teacher, batch or spec, SignalDamaged if its bytes are not those that were encoded.
    """
    if not check_form(record):
        raise SignalDamaged("signal: the record batch is not of this format")
    _check_asked(record, spec, teacher, batch)
    leaves = _leaves(record, spec, batch.counts)
    valid = _valid(record, spec, batch.counts, leaves)
    if not valid.all():
        raise SignalDamaged(f"signal: the checksums of {int((~valid).sum())} of {len(valid)} samples are wrong")
    tensors = {name: _tensor(*leaf) for name, leaf in leaves.items()}
    if "scale" in tensors:
        tensors["values"] = product(tensors["values"], tensors.pop("scale"))
    return Signal(spec, teacher, batch.digest, head=head if spec.definition.with_head else None, **tensors)


def valid_rows(record: pa.RecordBatch) -> NDArray[np.bool_]:
    """Which rows of a well-formed record (`check_form`) hold the bytes that were written, bool [B], whoever they answer."""
    spec = SignalSpec.parse(record.schema.metadata[b"parameters"])
    counts = np.diff(record.column("values").offsets.to_numpy())
    return _valid(record, spec, counts, _leaves(record, spec, counts))


def check_form(record: pa.RecordBatch) -> bool:
    """Whether the record batch has the columns and types of its parameters, no nulls, and buffers as long as they must be."""
    metadata = record.schema.metadata or {}
    if metadata.get(b"format") != FORMAT.encode():
        return False
    try:
        record.validate()
        spec = SignalSpec.parse(metadata.get(b"parameters", b""))
        names = record.schema.names  # UnicodeDecodeError, a ValueError, where a name's bytes are no text
    except (ValueError, pa.ArrowInvalid):
        return False
    if names != [*_ABOUT, *(column.name for column in spec.columns)] or any(column.null_count for column in record.columns):
        return False
    if any(record.column(name).type != arrow_type for name, arrow_type in _ABOUT.items()):
        return False
    return all(_check_column(record.column(column.name), column, spec) for column in spec.columns)


def digests_of(record: pa.RecordBatch, name: str) -> NDArray[np.bytes_]:
    """Column sample or teacher, [B] of as many bytes as its digests have; a view."""
    column = record.column(name)
    buffer, width = column.buffers()[1], column.type.byte_width
    return np.frombuffer(b"" if buffer is None else buffer, f"S{width}", len(column), column.offset * width if buffer else 0)


def to_numpy(tensor: Tensor) -> NDArray[Any]:
    """On the host, in one piece; bf16 as its bits in int16."""
    tensor = tensor.detach().to("cpu").contiguous()
    return (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


# ------------------------------------------------------------------------------------------------------------- writing


def _data(tensor: Tensor, column: Column, classes: int) -> NDArray[Any]:
    data = to_numpy(tensor)
    return np.ascontiguousarray(data.astype(id_type(classes)) if column.holds == "ids" else data)


def _rows(data: NDArray[Any]) -> pa.Array:
    """One row a position, of [N] or [N, width]; on the same memory."""
    flat = pa.Array.from_buffers(pa.from_numpy_dtype(data.dtype), data.size, [None, pa.py_buffer(data)])
    return flat if data.ndim == 1 else pa.FixedSizeListArray.from_arrays(flat, data.shape[1])


def _schema(columns: Mapping[str, pa.Array], metadata: dict[str, str]) -> pa.Schema:
    return pa.schema([pa.field(name, array.type, nullable=False) for name, array in columns.items()], metadata=metadata)


# ------------------------------------------------------------------------------------------------------------ checking


def _check_asked(record: pa.RecordBatch, spec: SignalSpec, teacher: str, batch: Batch) -> None:
    """SignalMismatch unless a well-formed record answers what was asked."""
    parameters = record.schema.metadata[b"parameters"].decode(errors="replace")
    if parameters != spec.parameters:
        raise SignalMismatch(f"signal: its parameters are {parameters}, but {spec.parameters} were asked for")
    if digests_of(record, "sample").tobytes() != batch.sample_digests.tobytes():
        raise SignalMismatch(f"signal: its {record.num_rows} samples are not those of batch {batch.digest}")
    teachers = digests_of(record, "teacher")
    others = np.flatnonzero(teachers != np.bytes_(bytes.fromhex(teacher)))
    if len(others):
        other = teachers[others[0] : others[0] + 1].tobytes().hex()
        raise SignalMismatch(f"signal of teacher {other}, but the schedule names {teacher}")


def _check_column(column: pa.Array, wanted: Column, spec: SignalSpec) -> bool:
    """Whether a column is a list of its values a sample, in the type they have, without nulls, its offsets within them."""
    if not pa.types.is_large_list(column.type):
        return False
    rows, offsets = column.values, column.offsets.to_numpy()
    listed = pa.types.is_fixed_size_list(rows.type)
    if listed != (wanted.each != "one"):
        return False
    if listed and (rows.type.list_size == 0 or (wanted.each == "k" and rows.type.list_size != spec.k)):
        return False
    leaf = rows.values if listed else rows
    types = {"encoded": (ARROW_TYPES[spec.encoding],), "ids": (pa.uint16(), pa.uint32()), "fp32": (pa.float32(),)}
    ends = offsets[0] >= 0 and (np.diff(offsets) >= 0).all() and offsets[-1] <= len(rows)
    return bool(leaf.type in types[wanted.holds] and ends and rows.null_count == 0 and leaf.null_count == 0)


def _valid(record: pa.RecordBatch, spec: SignalSpec, counts: NDArray[np.int64], leaves: Mapping[str, Leaf]) -> NDArray[np.bool_]:
    """Whether each row's checksum is the one it holds, bool [B]."""
    teachers = digests_of(record, "teacher").view(np.uint8).reshape(-1, TEACHER_DIGEST_BYTES)
    samples = digests_of(record, "sample").view(np.uint8).reshape(-1, DIGEST_BYTES)
    stored: NDArray[np.uint64] = record.column("checksum").to_numpy()
    valid: NDArray[np.bool_] = stored == _checksums(spec, teachers, samples, counts, [_numpy(*leaf) for leaf in leaves.values()])
    return valid


def _checksums(
    spec: SignalSpec,
    teachers: NDArray[np.uint8],
    samples: NDArray[np.uint8],
    counts: NDArray[np.int64],
    columns: list[NDArray[Any]],
) -> NDArray[np.uint64]:
    """xxh3 of each row, [B]; see the module's head. teachers, samples: digests as bytes, [B, 32] and [B, 16]."""
    start = xxhash.xxh3_64(spec.parameters.encode())
    names = np.concatenate([teachers, samples], 1)
    views = [column.reshape(-1).view(np.uint8).data for column in columns]
    sizes = [column.nbytes // len(column) if len(column) else 0 for column in columns]
    checksums = np.empty(len(counts), dtype=np.uint64)
    first = 0
    for row, count in enumerate(counts.tolist()):
        checksum = start.copy()
        checksum.update(names[row].data)
        last = first + count
        for view, size in zip(views, sizes, strict=True):
            checksum.update(view[first * size : last * size])
        checksums[row] = checksum.intdigest()
        first = last
    return checksums


# ------------------------------------------------------------------------------------------------------------- reading


def _leaves(record: pa.RecordBatch, spec: SignalSpec, counts: NDArray[np.int64]) -> dict[str, Leaf]:
    """The kind's columns, views of a well-formed record. SignalDamaged unless the samples have `counts` positions."""
    return {column.name: _leaf(record.column(column.name), counts) for column in spec.columns}


def _leaf(column: pa.LargeListArray, counts: NDArray[np.int64]) -> Leaf:
    offsets = column.offsets.to_numpy()
    if not np.array_equal(offsets[1:] - offsets[:-1], counts):
        raise SignalDamaged("signal: its samples have other numbers of labelled positions than the batch")
    # `flatten` would do the same through Arrow's compute functions, in three times the time: 60 us a column.
    inner, first, last = column.values, int(offsets[0]), int(offsets[-1])
    if not pa.types.is_fixed_size_list(inner.type):
        return inner.slice(first, last - first), None
    width = inner.type.list_size
    return inner.values.slice((inner.offset + first) * width, (last - first) * width), width


def _numpy(leaf: pa.Array, width: int | None) -> NDArray[Any]:
    data: NDArray[Any] = leaf.to_numpy(zero_copy_only=True)
    return data if width is None else data.reshape(-1, width)


def _tensor(leaf: pa.Array, width: int | None) -> Tensor:
    """On the array's own memory (class ids alone are widened to int64); nothing here writes to a signal."""
    if pa.types.is_unsigned_integer(leaf.type):
        return torch.from_numpy(_numpy(leaf, width).astype(np.int64))
    tensor = from_dlpack(leaf) if len(leaf) else torch.from_numpy(_numpy(leaf, None).copy())
    tensor = tensor.view(torch.bfloat16) if tensor.dtype == torch.int16 else tensor
    return tensor if width is None else tensor.view(-1, width)


# --------------------------------------------------------------------------------------------------------------- heads


def encode_head(head: Head, teacher: str) -> tuple[pa.Schema, Iterator[pa.RecordBatch]]:
    """The head as record batches of some of its rows each."""
    weight = to_numpy(head.weight)
    dtype = next(name for name, known in DTYPES.items() if known == head.weight.dtype)
    arrays = {"weight": _rows(weight)}
    checksum = xxhash.xxh3_64(weight.reshape(-1).view(np.uint8).data)
    if head.bias is not None:
        assert head.bias.dtype == head.weight.dtype
        bias = to_numpy(head.bias)
        arrays["bias"] = _rows(bias)
        checksum.update(bias.view(np.uint8).data)
    about = {"format": HEAD_FORMAT, "teacher": teacher, "dtype": dtype, "classes": str(len(weight))}
    schema = _schema(arrays, {**about, "checksum": checksum.hexdigest()})
    rows = max(1, HEAD_CHUNK_BYTES // (weight.shape[1] * weight.itemsize))
    whole = pa.RecordBatch.from_arrays(list(arrays.values()), schema=schema)
    return schema, (whole.slice(start, rows) for start in range(0, len(weight), rows))


def decode_head(schema: pa.Schema, batches: Iterable[pa.RecordBatch], teacher: str) -> Head:
    """Raises SignalMismatch for another teacher's head, SignalDamaged if it is not whole or not as it was encoded."""
    about = _check_schema(schema, teacher)
    pieces = [_columns(batch, schema) for batch in batches]
    arrays = [np.concatenate(parts) for parts in zip(*pieces, strict=True)] if pieces else [np.empty((0, 1))]
    checksum = xxhash.xxh3_64()
    for array in arrays:
        checksum.update(array.reshape(-1).view(np.uint8).data)
    if str(len(arrays[0])) != about.get("classes") or checksum.hexdigest() != about.get("checksum"):
        raise SignalDamaged("head: its checksum is wrong, or rows are missing")
    tensors = [torch.from_numpy(array) for array in arrays]
    if about["dtype"] == "bf16":
        tensors = [tensor.view(torch.bfloat16) for tensor in tensors]
    return Head(tensors[0], tensors[1] if len(tensors) > 1 else None)


def _check_schema(schema: pa.Schema, teacher: str) -> dict[str, str]:
    """The metadata; raises as `decode_head` does unless the schema is of this format, of one type, and of that teacher."""
    about = {key.decode(errors="replace"): value.decode(errors="replace") for key, value in (schema.metadata or {}).items()}
    try:
        names = schema.names
    except UnicodeDecodeError as error:
        raise SignalDamaged("head: its columns have no names") from error
    dtype = about.get("dtype", "")
    if about.get("format") != HEAD_FORMAT or dtype not in DTYPES or names not in (["weight"], ["weight", "bias"]):
        raise SignalDamaged("head: not of this format")
    if about.get("teacher") != teacher:
        raise SignalMismatch(f"head of teacher {about.get('teacher')}, but the schedule names {teacher}")
    weight, arrow_type = schema.field("weight").type, ARROW_TYPES[dtype]
    typed = pa.types.is_fixed_size_list(weight) and weight.value_type == arrow_type
    if not typed or ("bias" in names and schema.field("bias").type != arrow_type):
        raise SignalDamaged("head: not of the type that its metadata names")
    return about


def _columns(batch: pa.RecordBatch, schema: pa.Schema) -> list[NDArray[Any]]:
    """Some rows of the weight [R, D] and of the bias [R], views of a batch that is well-formed; SignalDamaged else."""
    if not batch.schema.equals(schema):
        raise SignalDamaged("head: its parts have other columns than its schema")
    try:
        batch.validate()
    except pa.ArrowInvalid as error:
        raise SignalDamaged(f"head: {error}") from error
    found = []
    for column in batch.columns:
        listed = pa.types.is_fixed_size_list(column.type)
        leaf = column.flatten() if listed else column
        if column.null_count or leaf.null_count:
            raise SignalDamaged("head: it has nulls")
        data = leaf.to_numpy(zero_copy_only=True)
        found.append(data.reshape(len(column), column.type.list_size) if listed else data)
    return found
