"""Signal: what a teacher says about a batch, and its Arrow form: the one format on the wire, in shared memory and on disk.

A record batch has one row a sample, so that a signal can be cut and put together at samples, whatever micro-batch asked:

    sample    fixed_size_binary[16]   what was asked about the sample, Batch.sample_digests
    teacher   fixed_size_binary[32]   digest of the checkpoint that answered
    checksum  uint64                  xxh3 of the row: parameters, teacher, sample, then the bytes of the columns below
    values    large_list of the sample's labelled positions:
              dense     fixed_size_list[V] of logits
              hidden    fixed_size_list[D] of final hidden states; the head travels apart, once a rotation
              topk      fixed_size_list[K] of class ids by falling probability, uint16 where V fits, else uint32
              sampled   fixed_size_list[K] of class ids, drawn with replacement from the teacher's distribution
              argmax    class ids
    scale     large_list of float32, int8 alone: a position's values are scale times the integers
    logprobs  large_list of fixed_size_list[K], topk alone: log softmax of logits / temperature, over all V classes
    log_rest  large_list, topk alone: log of the mass of the other classes

bf16 is stored as its bits in int16. The schema's metadata holds format and parameters (SignalSpec.parameters).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import torch
import xxhash
from numpy.typing import NDArray
from torch import Tensor

from megapd.batch import DIGEST_BYTES, Batch
from megapd.signals.signal import Head, Signal, SignalDamaged, SignalMismatch, _product, pack
from megapd.signals.spec import SignalSpec, _id_type

FORMAT = "megapd-signal/1"


# What Arrow's readers raise for bytes that are none of its own; a failure of the disk is an OSError too, when the file is opened.
NO_ARROW = (pa.ArrowException, OSError, ValueError, KeyError, TypeError, IndexError, OverflowError, NotImplementedError)


TEACHER_DIGEST_BYTES = 32


_ARROW = {"fp32": pa.float32(), "bf16": pa.int16(), "fp16": pa.float16(), "int8": pa.int8()}


def encode(signal: Signal, batch: Batch, classes: int) -> pa.RecordBatch:
    """The signal of `batch`, packed or not, as a record batch of one row a sample. classes: of the teacher's head; ids are below
    it."""
    signal, spec = pack(signal), signal.spec
    columns: dict[str, tuple[Any, pa.DataType]] = {}
    if spec.kind in ("dense", "hidden"):
        columns["values"] = (_host(signal.values), _ARROW[spec.encoding])
        if signal.scale is not None:
            columns["scale"] = (_host(signal.scale), pa.float32())
    else:
        ids = _id_type(classes)
        columns["values"] = (_host(signal.values).astype(ids), pa.from_numpy_dtype(ids))
    if spec.kind == "topk":
        assert signal.logprobs is not None
        assert signal.log_rest is not None
        columns["logprobs"] = (_host(signal.logprobs), _ARROW[spec.encoding])
        columns["log_rest"] = (_host(signal.log_rest), _ARROW[spec.encoding])
    counts = batch.counts
    assert counts.sum() == signal.values.shape[0]
    teacher = bytes.fromhex(signal.teacher)
    checksums = _checksums(spec, teacher, batch.sample_digests.tobytes(), counts, [data for data, _ in columns.values()])
    fields: dict[str, pa.Array] = {
        "sample": pa.FixedSizeBinaryArray.from_buffers(
            pa.binary(DIGEST_BYTES), batch.samples, [None, pa.py_buffer(batch.sample_digests.tobytes())]
        ),
        "teacher": pa.FixedSizeBinaryArray.from_buffers(
            pa.binary(TEACHER_DIGEST_BYTES), batch.samples, [None, pa.py_buffer(teacher * batch.samples)]
        ),
        "checksum": pa.Array.from_buffers(pa.uint64(), batch.samples, [None, pa.py_buffer(checksums)]),
    }
    ends = np.concatenate([[0], np.cumsum(counts)])
    offsets = pa.Array.from_buffers(pa.int64(), len(ends), [None, pa.py_buffer(ends)])
    for name, (data, arrow_type) in columns.items():
        flat = pa.Array.from_buffers(arrow_type, data.size, [None, pa.py_buffer(np.ascontiguousarray(data))])
        rows = flat if data.ndim == 1 else pa.FixedSizeListArray.from_arrays(flat, data.shape[1])
        fields[name] = pa.LargeListArray.from_arrays(offsets, rows)
    metadata = {"format": FORMAT, "parameters": spec.parameters}
    schema = pa.schema([pa.field(name, array.type, nullable=False) for name, array in fields.items()], metadata=metadata)
    return pa.RecordBatch.from_arrays(list(fields.values()), schema=schema)


def decode(record: pa.RecordBatch, spec: SignalSpec, teacher: str, batch: Batch, head: Head | None = None) -> Signal:
    """The signal in `record`, which must answer `batch` by `teacher` and hold what `spec` asks for.

    Tensors are on the host and, where the type allows, views of the record's memory. Raises SignalMismatch if the record is of
    another teacher, batch or spec, SignalDamaged if its bytes are not those that were encoded.
    """
    if not check_form(record):
        raise SignalDamaged("signal: the record batch is not of this format")
    found = record.schema.metadata[b"parameters"].decode(errors="replace")
    if found != spec.parameters:
        raise SignalMismatch(f"signal: its parameters are {found}, but {spec.parameters} were asked for")
    samples, teachers = _binary(record.column("sample"), DIGEST_BYTES), _binary(record.column("teacher"), TEACHER_DIGEST_BYTES)
    if samples != batch.sample_digests.tobytes():
        raise SignalMismatch(f"signal: its {record.num_rows} samples are not those of batch {batch.digest}")
    wanted = bytes.fromhex(teacher)
    if teachers != wanted * record.num_rows:
        others = {teachers[i : i + TEACHER_DIGEST_BYTES] for i in range(0, len(teachers), TEACHER_DIGEST_BYTES)} - {wanted}
        raise SignalMismatch(f"signal of teacher {others.pop().hex()}, but the schedule names {teacher}")
    counts = batch.counts
    columns = {name: _rows(record.column(name), counts) for name in record.schema.names[3:]}
    checksums = _checksums(spec, wanted, samples, counts, [_numpy(*column) for column in columns.values()])
    stored = record.column("checksum").to_numpy()
    if not np.array_equal(stored, checksums):
        wrong = np.flatnonzero(stored != checksums)
        raise SignalDamaged(f"signal: the checksums of {len(wrong)} of {len(stored)} samples are wrong")
    tensors = {name: _tensor(*column) for name, column in columns.items()}
    values = tensors["values"]
    if "scale" in tensors:
        values = _product(values, tensors["scale"])
    return Signal(
        spec,
        teacher,
        batch.digest,
        values,
        head if spec.kind == "hidden" else None,
        tensors.get("logprobs"),
        tensors.get("log_rest"),
    )


def valid_rows(record: pa.RecordBatch) -> NDArray[np.bool_]:
    """Which rows of a well-formed record (`check_form`) hold the bytes that were written, bool [B], whoever they answer."""
    spec = SignalSpec.parse(record.schema.metadata[b"parameters"])
    counts = np.diff(record.column("values").offsets.to_numpy())
    columns = [_numpy(*_rows(record.column(name), counts)) for name in record.schema.names[3:]]
    samples, teachers = _binary(record.column("sample"), DIGEST_BYTES), _binary(record.column("teacher"), TEACHER_DIGEST_BYTES)
    return record.column("checksum").to_numpy() == _checksums(spec, teachers, samples, counts, columns)


def check_form(record: pa.RecordBatch) -> bool:
    """Whether the record batch has the columns and types of its parameters, no nulls, and buffers as long as they must be."""
    metadata = record.schema.metadata or {}
    if metadata.get(b"format") != FORMAT.encode():
        return False
    try:
        record.validate()
        spec = SignalSpec.parse(metadata.get(b"parameters", b""))
        found = record.schema.names  # UnicodeDecodeError, a ValueError, where a name's bytes are no text
    except (ValueError, pa.ArrowInvalid):
        return False
    names = {"hidden": ["values", "scale"] if spec.encoding == "int8" else ["values"], "topk": ["values", "logprobs", "log_rest"]}
    columns = names.get(spec.kind, ["values"])
    if found != ["sample", "teacher", "checksum", *columns] or any(c.null_count for c in record.columns):
        return False
    fixed = [pa.binary(DIGEST_BYTES), pa.binary(TEACHER_DIGEST_BYTES), pa.uint64()]
    if [column.type for column in record.columns[:3]] != fixed:
        return False
    return all(_check_column(record.column(name), name, spec) for name in columns)


def _check_column(column: pa.Array, name: str, spec: SignalSpec) -> bool:
    if not pa.types.is_large_list(column.type):
        return False
    inner, width = column.type.value_type, None
    if pa.types.is_fixed_size_list(inner):
        inner, width = inner.value_type, inner.list_size
    flat = name in ("scale", "log_rest") or spec.kind == "argmax"
    if (width is None) != flat or width == 0 or (spec.k and not flat and width != spec.k):
        return False
    if name == "values" and spec.kind in ("topk", "sampled", "argmax"):
        allowed = [pa.uint16(), pa.uint32()]
    else:
        allowed = [pa.float32() if name == "scale" else _ARROW[spec.encoding]]
    offsets = column.offsets.to_numpy()
    leaf = column.values
    ends = offsets[0] >= 0 and (np.diff(offsets) >= 0).all() and offsets[-1] <= len(leaf)
    nulls = leaf.null_count + (leaf.values.null_count if width is not None else 0)
    return bool(inner in allowed and ends and nulls == 0)


def _checksums(
    spec: SignalSpec, teachers: bytes, samples: bytes, counts: NDArray[np.int64], columns: list[NDArray[Any]]
) -> NDArray[np.uint64]:
    """teachers: one digest, or one a row."""
    start = xxhash.xxh3_64(spec.parameters.encode())
    each = len(teachers) != TEACHER_DIGEST_BYTES
    if not each:
        start.update(teachers)
    views = [column.reshape(-1).view(np.uint8).data for column in columns]
    sizes = [column.nbytes // len(column) if len(column) else 0 for column in columns]
    checksums = []
    first = 0
    for row, count in enumerate(counts.tolist()):
        checksum = start.copy()
        if each:
            checksum.update(teachers[row * TEACHER_DIGEST_BYTES : (row + 1) * TEACHER_DIGEST_BYTES])
        checksum.update(samples[row * DIGEST_BYTES : (row + 1) * DIGEST_BYTES])
        last = first + count
        for view, size in zip(views, sizes, strict=True):
            checksum.update(view[first * size : last * size])
        checksums.append(checksum.intdigest())
        first = last
    return np.array(checksums, dtype=np.uint64)


def _rows(column: pa.LargeListArray, counts: NDArray[np.int64]) -> tuple[pa.Array, int | None]:
    """(values of all samples as one flat array, values a position, None: one alone), a view of the column.

    Raises SignalDamaged unless the samples have `counts` positions.
    """
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
    data = leaf.to_numpy(zero_copy_only=True)
    return data if width is None else data.reshape(-1, width)


def _binary(column: pa.Array, width: int) -> bytes:
    buffer = column.buffers()[1]
    return b"" if buffer is None else buffer[column.offset * width : (column.offset + len(column)) * width].to_pybytes()


def _tensor(leaf: pa.Array, width: int | None) -> Tensor:
    """On the array's own memory (class ids alone are widened to int64); nothing here writes to a signal."""
    if pa.types.is_unsigned_integer(leaf.type):
        return torch.from_numpy(_numpy(leaf, width).astype(np.int64))
    tensor = torch.from_dlpack(leaf) if len(leaf) else torch.empty(0, dtype=torch.from_numpy(_numpy(leaf, None).copy()).dtype)
    tensor = tensor.view(torch.bfloat16) if tensor.dtype == torch.int16 else tensor
    return tensor if width is None else tensor.view(-1, width)


def _host(tensor: Tensor) -> NDArray[Any]:
    tensor = tensor.detach().to("cpu").contiguous()
    return (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
