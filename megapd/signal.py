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

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
import xxhash
from numpy.typing import NDArray
from torch import Tensor

from megapd.batch import DIGEST_BYTES, Batch

Kind = Literal["dense", "hidden", "topk", "sampled", "argmax"]
Encoding = Literal["fp32", "bf16", "fp16", "int8"]

FORMAT = "megapd-signal/1"
HEAD_FORMAT = "megapd-head/1"
# What Arrow's readers raise for bytes that are none of its own; a failure of the disk is an OSError too, when the file is opened.
NO_ARROW = (pa.ArrowException, OSError, ValueError, KeyError, TypeError, IndexError, OverflowError, NotImplementedError)
HEAD_CHUNK_BYTES = 4 << 20  # of the head's weight a record batch
TEACHER_DIGEST_BYTES = 32

DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "int8": torch.int8}
_ARROW = {"fp32": pa.float32(), "bf16": pa.int16(), "fp16": pa.float16(), "int8": pa.int8()}


class SignalMismatch(RuntimeError):
    """A signal of another teacher, or for other tokens, than the step asks for."""


class SignalDamaged(RuntimeError):
    """A record whose bytes are not those that were written."""


@dataclass(frozen=True)
class SignalSpec:
    """What a run asks its teacher for; the same for every batch.

    encoding     type of dense and hidden values and of topk's log probabilities; int8 for hidden alone
    k            classes of topk, draws of sampled; 0 for the other kinds
    temperature  the teacher's, of topk and sampled
    seed         of sampled: a draw is a pure function of (seed, sample, position)
    """

    kind: Kind
    encoding: Encoding = "fp32"
    k: int = 0
    temperature: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        sparse = self.kind in ("topk", "sampled")
        if (self.k > 0) != sparse:
            raise ValueError(f"k: {self.k} with kind {self.kind}; topk and sampled need at least 1, other kinds have none")
        if sparse and not self.temperature > 0:
            raise ValueError(f"temperature: {self.temperature} with kind {self.kind}; choose argmax for 0")
        if self.encoding == "int8" and self.kind != "hidden":
            raise ValueError(f"encoding: int8 is for hidden states, not for {self.kind}; choose fp16")

    @cached_property
    def parameters(self) -> str:
        """Canonical JSON of the kind and what matters to it: signals of equal parameters can stand for each other."""
        chosen: dict[str, Any] = {"kind": self.kind}
        if self.kind in ("dense", "hidden", "topk"):
            chosen["encoding"] = self.encoding
        if self.kind in ("topk", "sampled"):
            chosen |= {"k": self.k, "temperature": self.temperature}
        if self.kind == "sampled":
            chosen["seed"] = self.seed
        return json.dumps(chosen, sort_keys=True)

    @staticmethod
    @lru_cache(maxsize=64)
    def parse(parameters: str | bytes) -> SignalSpec:
        """The spec of what `parameters` returned; ValueError for anything else."""
        try:
            tree = json.loads(parameters)
        except RecursionError as error:
            raise ValueError("parameters: nested too deep") from error
        if not isinstance(tree, dict) or tree.keys() - {"kind", "encoding", "k", "temperature", "seed"}:
            raise ValueError("parameters: not those of a signal")
        kinds, encodings = ("dense", "hidden", "topk", "sampled", "argmax"), tuple(DTYPES)
        if tree.get("kind") not in kinds or tree.get("encoding", "fp32") not in encodings:
            raise ValueError(f"parameters: kind must be one of {', '.join(kinds)}, encoding one of {', '.join(encodings)}")
        numbers = [tree.get("k", 0), tree.get("seed", 0), tree.get("temperature", 1.0)]
        if not all(type(number) is int for number in numbers[:2]) or type(numbers[2]) not in (int, float):
            raise ValueError("parameters: k and seed are integers, temperature is a number")
        if not 0 <= numbers[0] < 1 << 20 or not 0 <= numbers[1] < 1 << 63 or not 0 < numbers[2] < float("inf"):
            raise ValueError("parameters: k, seed or temperature out of range")
        return SignalSpec(**tree)

    def bytes_per_position(self, classes: int, width: int) -> float:
        """Bytes that the signal of one labelled position takes; for hidden without the head."""
        size, ids = DTYPES[self.encoding].itemsize, _id_type(classes).itemsize
        return {
            "dense": classes * size,
            "hidden": width * size + (4 if self.encoding == "int8" else 0),
            "topk": self.k * (ids + size) + size,
            "sampled": self.k * ids,
            "argmax": ids,
        }[self.kind]


@dataclass(frozen=True)
class Head:
    """The teacher's output layer: weight [V, D], bias [V] or None. Travels once a rotation."""

    weight: Tensor
    bias: Tensor | None

    def to(self, device: torch.device) -> Head:
        return Head(self.weight.to(device), None if self.bias is None else self.bias.to(device))


@dataclass(frozen=True)
class Signal:
    """One teacher's answer for the labelled positions of one batch.

    spec      what was asked for
    teacher   digest of the checkpoint that answered
    samples   digest of the batch it answers (Batch.digest)
    values    dense: logits [N, V]; hidden: final hidden states [N, D]; topk, sampled: class ids [N, K] int64; argmax: [N] int64;
              N = the batch's labelled positions
    head      for hidden alone
    logprobs  for topk alone [N, K]: log probabilities of the classes; log_rest [N]: log of the mass of the others
    scale     of packed int8 alone (`pack`), float32 [N]: `values` are the integers that it is to be multiplied with
    """

    spec: SignalSpec
    teacher: str
    samples: str
    values: Tensor
    head: Head | None = None
    logprobs: Tensor | None = None
    log_rest: Tensor | None = None
    scale: Tensor | None = None

    def __post_init__(self) -> None:
        assert (self.kind == "hidden") == (self.head is not None), "hidden states travel with a head, other kinds without"
        assert (self.kind == "topk") == (self.logprobs is not None) == (self.log_rest is not None)

    @property
    def kind(self) -> Kind:
        return self.spec.kind

    def check(self, teacher: str, batch: Batch) -> None:
        """Raise SignalMismatch unless this signal is `teacher`'s answer for `batch`."""
        if self.teacher != teacher:
            raise SignalMismatch(f"signal of teacher {self.teacher}, but the schedule names {teacher}")
        if self.samples != batch.digest:
            raise SignalMismatch(f"signal for batch {self.samples}, but this batch is {batch.digest}")
        if self.values.shape[0] != batch.labelled:
            raise SignalMismatch(f"signal for {self.values.shape[0]} positions, but the batch labels {batch.labelled}")

    def to(self, device: torch.device) -> Signal:
        """The same signal on a device; the head stays where it is, since it moves once a rotation."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=True))

    def map(self, change: Callable[[Tensor], Tensor]) -> Signal:
        """With each tensor but the head's changed; their first dimension is the positions."""
        logprobs, log_rest, scale = (None if t is None else change(t) for t in (self.logprobs, self.log_rest, self.scale))
        return replace(self, values=change(self.values), logprobs=logprobs, log_rest=log_rest, scale=scale)


def negotiate(
    classes: int, width: int, teacher_temperature: float, divergence: str, positions_per_rotation: float = float("inf")
) -> Kind:
    """The cheapest kind that is exact for the loss: argmax where it alone counts, else logits or hidden states.

    Hidden states cost `width` values a position and the head, `classes` x `width`, once a rotation.
    """
    if teacher_temperature == 0.0 and divergence in ("forward_kl", "soft_cross_entropy"):
        return "argmax"
    return "dense" if classes <= width * (1.0 + classes / positions_per_rotation) else "hidden"


# ------------------------------------------------------------------------------------------------------------- signals


def quantize(values: Tensor, encoding: Encoding) -> tuple[Tensor, Tensor | None]:
    """(values in the encoding's type, scale float32 [N] for int8 or None); values [N, D] floating point."""
    if encoding != "int8":
        return values.to(DTYPES[encoding]), None
    # The scale has 16 significant bits: its products with up to 127 are exact, so that to quantize what was quantized changes
    # nothing.
    scale = values.abs().amax(-1).float() / 127.0
    rounded = ((scale.view(torch.int32) + 0xFF) & ~0xFF).view(torch.float32)
    scale = torch.where(scale.isfinite(), rounded, scale)  # the sum of a GPU's NaN, 0x7fffffff, would be finite
    steps = (values.float() / scale.clamp_min(torch.finfo(torch.float32).tiny)[:, None]).round_().clamp_(-127, 127)
    return steps.to(torch.int8), scale


def pack(signal: Signal) -> Signal:
    """The signal in the types of its encoding, as a record holds it; what is packed, or was rounded before, keeps its values.

    int8 as integers and scale: it is rounded where the values are, once (18 ms a 6 MiB signal on a core), and moves in a byte a
    value.
    """
    if signal.kind == "topk":
        assert signal.logprobs is not None
        assert signal.log_rest is not None
        dtype = DTYPES[signal.spec.encoding]
        return replace(signal, logprobs=signal.logprobs.to(dtype), log_rest=signal.log_rest.to(dtype))
    if signal.kind not in ("dense", "hidden") or signal.scale is not None:
        return signal
    values, scale = quantize(signal.values, signal.spec.encoding)
    return replace(signal, values=values, scale=scale)


def as_sent(signal: Signal) -> Signal:
    """The signal as a student decodes it: rounded to its encoding, so that all carriers give the same values."""
    packed = pack(signal)
    return packed if packed.scale is None else replace(packed, values=_product(packed.values, packed.scale), scale=None)


def _product(steps: Tensor, scale: Tensor) -> Tensor:
    # In place, which takes a third of the time of a product apart: both allocate, and large memory is new to the process.
    return steps.float().mul_(scale[:, None])


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


def _id_type(classes: int) -> np.dtype[Any]:
    return np.dtype(np.uint16 if classes <= 1 << 16 else np.uint32)


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
