"""Carried out of megapd/signal.py."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import xxhash
from numpy.typing import NDArray

from megapd.signals.arrow import _ARROW, _host
from megapd.signals.signal import Head, SignalDamaged, SignalMismatch
from megapd.signals.spec import DTYPES

HEAD_FORMAT = "megapd-head/1"


HEAD_CHUNK_BYTES = 4 << 20  # of the head's weight a record batch


# --------------------------------------------------------------------------------------------------------------- heads


def encode_head(head: Head, teacher: str) -> tuple[pa.Schema, Iterator[pa.RecordBatch]]:
    """The head as record batches of rows of its weight: columns weight fixed_size_list[D] and, where it has one, bias."""
    weight, bias = _host(head.weight), None if head.bias is None else _host(head.bias)
    dtype = next(name for name, known in DTYPES.items() if known == head.weight.dtype)
    checksum = xxhash.xxh3_64(weight.reshape(-1).view(np.uint8).data)
    fields = [pa.field("weight", pa.list_(_ARROW[dtype], weight.shape[1]), nullable=False)]
    if bias is not None:
        assert head.bias is not None
        assert head.bias.dtype == head.weight.dtype
        checksum.update(bias.view(np.uint8).data)
        fields.append(pa.field("bias", _ARROW[dtype], nullable=False))
    metadata = {"format": HEAD_FORMAT, "teacher": teacher, "dtype": dtype, "classes": str(len(weight))}
    schema = pa.schema(fields, metadata={**metadata, "checksum": checksum.hexdigest()})

    def batches() -> Iterator[pa.RecordBatch]:
        rows = max(1, HEAD_CHUNK_BYTES // (weight.shape[1] * weight.itemsize))
        for start in range(0, len(weight), rows):
            part = weight[start : start + rows]
            flat = pa.Array.from_buffers(_ARROW[dtype], part.size, [None, pa.py_buffer(part)])
            arrays = [pa.FixedSizeListArray.from_arrays(flat, type=schema.field("weight").type)]
            if bias is not None:
                piece = bias[start : start + rows]
                arrays.append(pa.Array.from_buffers(_ARROW[dtype], len(piece), [None, pa.py_buffer(piece)]))
            yield pa.RecordBatch.from_arrays(arrays, schema=schema)

    return schema, batches()


def decode_head(schema: pa.Schema, batches: Iterable[pa.RecordBatch], teacher: str) -> Head:
    """Raises SignalMismatch for another teacher's head, SignalDamaged if it is not whole or not as it was encoded."""
    metadata = {key.decode(errors="replace"): value.decode(errors="replace") for key, value in (schema.metadata or {}).items()}
    dtype = metadata.get("dtype", "")
    try:
        names = schema.names
    except UnicodeDecodeError as error:
        raise SignalDamaged("head: its columns have no names") from error
    if metadata.get("format") != HEAD_FORMAT or dtype not in DTYPES or names not in (["weight"], ["weight", "bias"]):
        raise SignalDamaged("head: not of this format")
    if metadata.get("teacher") != teacher:
        raise SignalMismatch(f"head of teacher {metadata.get('teacher')}, but the schedule names {teacher}")
    weight_type = schema.field("weight").type
    typed = pa.types.is_fixed_size_list(weight_type) and weight_type.value_type == _ARROW[dtype]
    if not typed or ("bias" in names and schema.field("bias").type != _ARROW[dtype]):
        raise SignalDamaged("head: not of the type that its metadata names")
    parts: dict[str, list[NDArray[Any]]] = {name: [] for name in names}
    for batch in batches:
        if not batch.schema.equals(schema):
            raise SignalDamaged("head: its parts have other columns than its schema")
        try:
            batch.validate()
        except pa.ArrowInvalid as error:
            raise SignalDamaged(f"head: {error}") from error
        for name, found in parts.items():
            column = batch.column(name)
            leaf = column.flatten() if name == "weight" else column
            if column.null_count or leaf.null_count:
                raise SignalDamaged("head: it has nulls")
            width = weight_type.list_size if name == "weight" else 1
            found.append(leaf.to_numpy(zero_copy_only=True).reshape(len(column), width))
    arrays = {name: np.concatenate(found) if found else np.empty((0, 1)) for name, found in parts.items()}
    checksum = xxhash.xxh3_64()
    for array in arrays.values():
        checksum.update(array.reshape(-1).view(np.uint8).data)
    if str(len(arrays["weight"])) != metadata.get("classes") or checksum.hexdigest() != metadata.get("checksum"):
        raise SignalDamaged("head: its checksum is wrong, or rows are missing")
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    if dtype == "bf16":
        tensors = {name: tensor.view(torch.bfloat16) for name, tensor in tensors.items()}
    return Head(tensors["weight"], tensors["bias"].squeeze(1) if "bias" in tensors else None)
