"""A prepared corpus as tasks read it: meta.json and memory-mapped blocks.

It lies here and not in megapd.corpus, which writes it, because training reads corpora and imports nothing that makes them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from megapd.errors import UserError
from megapd.files import sha256_file

META = "meta.json"
MODEL = "tokenizer.model"
FORMAT = 1  # of the folder; raised when older readers would misread it


class Blocks:
    """Random access to the blocks of one Arrow IPC file.

    Columns: ids, fixed-size list of uint16 or uint32 [L]; segments, fixed-size list of uint8, uint16 or uint32 [L], the
    number of a token's document within its block, from 0. The file is mapped, never read as a whole: opening costs a few
    microseconds a record batch, and rows cost the pages they lie on.
    """

    def __init__(self, path: Path) -> None:
        """Raises UserError where the file is missing or damaged."""
        try:
            self._buffer = pa.memory_map(str(path)).read_buffer()
            reader = pa.ipc.open_file(pa.BufferReader(self._buffer))
            batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
        except (OSError, pa.ArrowInvalid) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{path}: not a readable file of blocks ({reason}); run `megapd prepare` again") from error
        self.length = reader.schema.field("ids").type.list_size
        starts = np.cumsum([0] + [batch.num_rows for batch in batches])
        self._len = int(starts[-1])
        self._rows_a_batch = batches[0].num_rows if batches else 1
        assert all(batch.num_rows == self._rows_a_batch for batch in batches[:-1]), "record batches of equal size but the last"
        self._ids, self._id_offsets = self._column(reader.schema, batches, "ids")
        self._segments, self._segment_offsets = self._column(reader.schema, batches, "segments")

    def __len__(self) -> int:
        return self._len

    def ids(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Token ids [len(rows), L] of any rows, in the order asked for."""
        return self._gather(self._ids, self._id_offsets, rows)

    def segments(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Document numbers within the block [len(rows), L]."""
        return self._gather(self._segments, self._segment_offsets, rows)

    def _column(self, schema: pa.Schema, batches: list[pa.RecordBatch], name: str) -> tuple[NDArray[Any], NDArray[np.int64]]:
        """The whole file as one array of the column's dtype, and where in it each batch's values begin: both without a copy."""
        dtype = np.dtype(schema.field(name).type.value_type.to_pandas_dtype())
        whole = np.frombuffer(self._buffer, dtype=dtype, count=self._buffer.size // dtype.itemsize)
        offsets = np.zeros(len(batches), dtype=np.int64)
        for i, batch in enumerate(batches):
            values = batch.column(name).flatten()
            # Arrow aligns buffers to 8 bytes within the file, so offsets are whole elements.
            offsets[i] = (values.buffers()[1].address - self._buffer.address) // dtype.itemsize + values.offset
        return whole, offsets

    def _gather(self, whole: NDArray[Any], offsets: NDArray[np.int64], rows: NDArray[np.int64]) -> NDArray[np.int64]:
        assert ((rows >= 0) & (rows < self._len)).all(), f"rows outside range({self._len})"
        batch, within = np.divmod(rows, self._rows_a_batch)
        begin = offsets[batch] + within * self.length
        gathered: NDArray[np.int64] = whole[begin[:, None] + np.arange(self.length)].astype(np.int64)
        return gathered


def read_meta(folder: Path) -> dict[str, Any]:
    """meta.json of a prepared corpus, its tokenizer verified against the digest there. Raises UserError naming the fix."""
    path = folder / META
    if not path.is_file():
        raise UserError(f"task.corpus: {folder} holds no prepared corpus; run `megapd prepare` first, or correct task.corpus")
    try:
        meta: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: damaged ({error}); run `megapd prepare` again into an empty folder") from error
    if meta.get("format") != FORMAT:
        found = meta.get("format")
        raise UserError(
            f"{path}: corpus format {found}, this version reads {FORMAT}; run `megapd prepare` again into an empty folder"
        )
    model = folder / MODEL
    if not model.is_file() or sha256_file(model) != meta["tokenizer"]["digest"]:
        raise UserError(f"{model}: missing or not the tokenizer the corpus was made with; run `megapd prepare` again")
    return meta
