"""What the tests of signals share: batches, signals of every kind, and records whose bytes can be changed."""

import pyarrow as pa
import torch

from megapd.batch import Batch
from megapd.signals import Head, Signal, SignalSpec

TEACHER, OTHER = "0123456789abcdef" * 4, "fe" * 32
LENGTH, CLASSES, WIDTH = 6, 11, 5
SPECS = [
    *(SignalSpec("dense", encoding) for encoding in ("fp32", "bf16", "fp16")),
    *(SignalSpec("hidden", encoding) for encoding in ("fp32", "bf16", "fp16", "int8")),
    *(SignalSpec("topk", encoding, k=3, temperature=0.5) for encoding in ("fp32", "bf16", "fp16")),
    SignalSpec("sampled", k=4, temperature=2.0, seed=7),
    SignalSpec("argmax"),
]


def make_batch(counts, seed=0, segments=False):
    """A batch whose samples have `counts` labelled positions."""
    generator = torch.Generator().manual_seed(seed)
    places = [torch.randperm(LENGTH, generator=generator)[:count].sort().values + LENGTH * i for i, count in enumerate(counts)]
    positions = torch.cat([torch.empty(0, dtype=torch.int64), *places])
    ids = torch.randint(0, 50, (len(counts), LENGTH), generator=generator)
    return Batch(ids, ids // 25 if segments else None, positions, torch.zeros_like(positions), torch.arange(len(counts)))


def make_signal(spec, batch, seed=0, classes=CLASSES, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    n, k = batch.labelled, spec.k
    shape = {"dense": (n, classes), "hidden": (n, WIDTH), "argmax": (n,)}.get(spec.kind, (n, k))
    if spec.kind in ("dense", "hidden"):
        values = torch.randn(shape, generator=generator).to(dtype)
    else:
        values = torch.randint(0, classes, shape, generator=generator)
    head = Head(torch.randn(classes, WIDTH, generator=generator), None) if spec.kind == "hidden" else None
    topk = spec.kind == "topk"
    logprobs = torch.randn(n, k, generator=generator) if topk else None
    return Signal(spec, TEACHER, batch.digest, values, head, logprobs, torch.randn(n, generator=generator) if topk else None)


def through_stream(record):
    """The record batch as another process reads it from an Arrow IPC stream."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, record.schema) as writer:
        writer.write_batch(record)
    return pa.ipc.open_stream(sink.getvalue()).read_next_batch()


def bits(tensor):
    if tensor is None:
        return None
    same_size = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.dtype.itemsize]
    return tensor.dtype, tuple(tensor.shape), tensor.contiguous().view(same_size).numpy().tobytes()


def content(signal):
    tensors = (signal.values, signal.logprobs, signal.log_rest)
    return (signal.spec, signal.teacher, signal.samples, *map(bits, tensors))


class Mutable:
    """A record batch as it lies in an Arrow stream, whose bytes can be changed under it."""

    def __init__(self, record):
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, record.schema) as writer:
            writer.write_batch(record)
        self.data = bytearray(sink.getvalue())
        base = pa.py_buffer(self.data)
        self.record = pa.ipc.open_stream(base).read_next_batch()
        #: (column, first byte, bytes) of each buffer
        self.buffers = [
            (number, buffer.address - base.address, buffer.size)
            for number, column in enumerate(self.record.columns)
            for buffer in column.buffers()
            if buffer is not None
        ]
