"""Heads in Arrow form: what hidden states are multiplied with travels once a rotation, and lies once in a cache's folder.

Record batches of rows of the weight, with columns weight fixed_size_list[D] and, where there is one, bias; bf16 as its bits in
int16. The schema's metadata holds format, teacher, dtype, classes and the xxh3 of weight and bias.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import xxhash
from numpy.typing import NDArray

from megapd.errors import SignalDamaged, SignalMismatch
from megapd.signals.arrow import ARROW_TYPES, to_numpy
from megapd.signals.spec import DTYPES, Head

HEAD_FORMAT = "megapd-head/1"
HEAD_CHUNK_BYTES = 4 << 20  # of the head's weight a record batch


def encode_head(head: Head, teacher: str) -> tuple[pa.Schema, Iterator[pa.RecordBatch]]:
    """The head as record batches of some of its rows each."""
    weight = to_numpy(head.weight)
    dtype = next(name for name, known in DTYPES.items() if known == head.weight.dtype)
    arrow_type = ARROW_TYPES[dtype]
    arrays = {"weight": pa.FixedSizeListArray.from_arrays(_flat(weight, arrow_type), weight.shape[1])}
    fields = [pa.field("weight", pa.list_(arrow_type, weight.shape[1]), nullable=False)]
    checksum = xxhash.xxh3_64(weight.reshape(-1).view(np.uint8).data)
    if head.bias is not None:
        assert head.bias.dtype == head.weight.dtype
        bias = to_numpy(head.bias)
        arrays["bias"] = _flat(bias, arrow_type)
        fields.append(pa.field("bias", arrow_type, nullable=False))
        checksum.update(bias.view(np.uint8).data)
    about = {"format": HEAD_FORMAT, "teacher": teacher, "dtype": dtype, "classes": str(len(weight))}
    schema = pa.schema(fields, metadata={**about, "checksum": checksum.hexdigest()})
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


def _flat(data: NDArray[Any], arrow_type: pa.DataType) -> pa.Array:
    return pa.Array.from_buffers(arrow_type, data.size, [None, pa.py_buffer(data)])


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
