"""A prepared corpus as tasks read it: meta.json and memory-mapped blocks, each checked when it is read.

It lies here and not in megapd.corpus, which writes it, because training reads corpora and imports nothing that makes them.

    meta.json            settings, tokenizer, sources with their files' digests, splits with their shards; carries its own digest
    tokenizer.model      or what else the tokenizer was read from: tokenizer.json, vocab.txt, and the files that belong to them
    SPLIT.arrow          a shard: blocks in an Arrow IPC file
    SPLIT.checks         a check a block and column, then a digest a page of checks; the sha256 of the digests is in meta

So what is opened is small whatever the corpus' size (8 MB of digests for 100 GB of blocks of 128 tokens), and every block that is
read is held, through its check, its page and the root, against meta.json.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from megapd.errors import DataDamaged, UserError
from megapd.files import sha256_file, unsealed
from megapd.rng import Stream, bits, permute
from megapd.tokenization.base import MODEL

META = "meta.json"
FORMAT = 3  # of the folder; raised when older readers would misread it
ROWS_FORMAT = 4  # the same, but blocks hold a document each: segment 1 is padding, which format 3 has not
READ_FORMATS = (2, FORMAT, ROWS_FORMAT)  # 2: tokenizer.model alone, whose sha256 is its digest, and roles by their names
COLUMNS = ("ids", "segments")
PAGE_BLOCKS = 512  # whose checks have one digest: 8 KB
DIGEST_BYTES = 16  # of a page
AGAIN = "run `megapd prepare` again into an empty folder, or restore the file"


# ------------------------------------------------------------------------------------------------------------- checks


def check_weights(length: int) -> NDArray[np.uint64]:
    """Odd weights of a block's places [length], and of its number [1], for `checks`."""
    return bits(0, Stream.CHECK, np.arange(length + 1)) | np.uint64(1)


def checks(values: NDArray[np.int64], numbers: NDArray[np.int64], weights: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """A check [B] of each row of `values` [B, L], block `numbers` [B] of its shard: sum of weight * value modulo 2^64.

    Multilinear hashing (Carter and Wegman 1979; Lemire and Kaser, "Strongly universal string hashing is fast", 2014): any one
    value that differs is found, as odd weights are invertible, and several but for a chance of 2^-32 or less. One pass over
    arrays that are in memory anyway, where a hash a row would cost a call each.
    """
    numbered = (numbers + 1).astype(np.uint64) * weights[-1]
    # einsum takes 17 us of 256 x 128 values, @ 28.
    found: NDArray[np.uint64] = numbered + np.einsum("ij,j->i", values.view(np.uint64), weights[:-1])
    return found


def page_digests(whole: NDArray[np.uint64]) -> bytes:
    """The digests, one after the other, of the pages of checks [B, 2]."""
    pages = (whole[first : first + PAGE_BLOCKS] for first in range(0, len(whole), PAGE_BLOCKS))
    return b"".join(_page_digest(page) for page in pages)


def _page_digest(page: NDArray[np.uint64]) -> bytes:
    return hashlib.blake2b(np.ascontiguousarray(page).tobytes(), digest_size=DIGEST_BYTES).digest()


# ------------------------------------------------------------------------------------------------------------- blocks


class Blocks:
    """Random access to the blocks of one shard.

    Columns: ids, fixed-size list of uint16 or uint32 [L]; segments, fixed-size list of uint8, uint16 or uint32 [L], the
    number of a token's document within its block, from 0. The file is mapped, never read as a whole: opening costs a few
    microseconds a record batch, and rows cost the pages they lie on.
    """

    def __init__(self, path: Path) -> None:
        """path: of a shard beside its meta.json. Raises DataDamaged where a file is missing or not what meta.json says."""
        self._path = path
        shard = _shard(path)
        try:
            self._buffer = pa.memory_map(str(path)).read_buffer()
            reader = pa.ipc.open_file(pa.BufferReader(self._buffer))
            batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
            self.length = int(reader.schema.field("ids").type.list_size)
            rows = [batch.num_rows for batch in batches]
            if sum(rows) != shard["blocks"] or len(set(rows[:-1])) > 1 or self.length != shard["length"]:
                raise ValueError(f"{sum(rows)} blocks of {self.length} tokens, where meta.json counts {shard['blocks']}")
            self._len: int = sum(rows)
            self._rows_a_batch = rows[0] if rows else 1
            self._columns = {name: self._column(reader.schema, batches, name) for name in COLUMNS}
        except (OSError, pa.ArrowException, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            raise DataDamaged(f"{path}: damaged ({' '.join(str(error).split())}); {AGAIN}") from error
        self._open_checks(path.with_suffix(".checks"), shard["root"])

    def __len__(self) -> int:
        return self._len

    def ids(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Token ids [len(rows), L] of any rows, in the order asked for. DataDamaged where they are not what was written."""
        return self.read("ids", rows)

    def segments(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Document numbers within the block [len(rows), L]. DataDamaged as `ids`."""
        return self.read("segments", rows)

    def _open_checks(self, path: Path, root: str) -> None:
        pages = -(-self._len // PAGE_BLOCKS)
        size = self._len * len(COLUMNS) * 8
        found = path.stat().st_size if path.exists() else 0
        mapped = np.memmap(path, dtype=np.uint8, mode="r") if found else np.empty(0, dtype=np.uint8)
        whole = mapped.view(np.ndarray)  # a memmap's own indexing is twice as slow
        self._digests = whole[size:].tobytes()
        if found != size + pages * DIGEST_BYTES or hashlib.sha256(self._digests).hexdigest() != root:
            raise DataDamaged(f"{path}: missing, or not what meta.json says; {AGAIN}")
        self._checks = whole[:size].view(np.uint64).reshape(-1, len(COLUMNS))
        self._known = np.zeros(pages, dtype=np.bool_)  # pages that were held against their digest
        self._weights = check_weights(self.length)

    def _column(self, schema: pa.Schema, batches: list[pa.RecordBatch], name: str) -> tuple[NDArray[Any], NDArray[np.int64]]:
        """The whole file as one array of the column's dtype, and where in it each batch's values begin: both without a copy."""
        dtype = np.dtype(schema.field(name).type.value_type.to_pandas_dtype())
        whole = np.frombuffer(self._buffer, dtype=dtype, count=self._buffer.size // dtype.itemsize)
        offsets = np.zeros(len(batches), dtype=np.int64)
        for i, batch in enumerate(batches):
            values = batch.column(name).flatten()
            # Arrow aligns buffers to 8 bytes within the file, so offsets are whole elements.
            offsets[i] = (values.buffers()[1].address - self._buffer.address) // dtype.itemsize + values.offset
            if not 0 <= offsets[i] <= len(whole) - batch.num_rows * self.length:
                raise ValueError(f"record batch {i} lies outside the file")
        return whole, offsets

    def read(self, name: str, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """A column's values [len(rows), L]."""
        assert ((rows >= 0) & (rows < self._len)).all(), f"rows outside range({self._len})"
        whole, offsets = self._columns[name]
        batch, within = np.divmod(rows, self._rows_a_batch)
        begin = offsets[batch] + within * self.length
        gathered: NDArray[np.int64] = whole[begin[:, None] + np.arange(self.length)].astype(np.int64)
        wrong = checks(gathered, rows, self._weights) != self._checks[rows, COLUMNS.index(name)]
        pages = rows // PAGE_BLOCKS
        if not self._known[pages].all():
            for page in np.unique(pages[~self._known[pages]]).tolist():
                self._check_page(page)
        if wrong.any():
            raise DataDamaged(f"{self._path}: block {rows[wrong][0]} is not the one that was written ({name}); {AGAIN}")
        return gathered

    def _check_page(self, page: int) -> None:
        found = _page_digest(self._checks[page * PAGE_BLOCKS : (page + 1) * PAGE_BLOCKS])
        if found != self._digests[page * DIGEST_BYTES : (page + 1) * DIGEST_BYTES]:
            raise DataDamaged(f"{self._path.with_suffix('.checks')}: page {page} is damaged; {AGAIN}")
        self._known[page] = True


class Split:
    """The blocks of a split, over its shards.

    order    held-out blocks lie source by source, and are read in one fixed random order, so that any first few are of all
    sources  names, and blocks of each, in the order in which they lie; of the held-out split
    """

    def __init__(self, folder: Path, meta: dict[str, Any], name: str, *, shuffled: bool = False) -> None:
        """Raises DataDamaged."""
        shards = [Blocks(folder / shard["file"]) for shard in meta[name]["shards"]]
        self._shards = [shard for shard in shards if len(shard)]
        self._ends = np.cumsum([len(shard) for shard in self._shards])
        self._len, self.length, self._shuffled = int(self._ends[-1]), self._shards[0].length, shuffled
        self.sources: list[tuple[str, int]] = [(source, blocks) for source, blocks in meta[name].get("sources", ())]

    def __len__(self) -> int:
        return self._len

    def ids(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """See Blocks."""
        return self._read("ids", rows)

    def segments(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        return self._read("segments", rows)

    def source_of(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """The place in `sources` of each row [len(rows)]."""
        ends = np.cumsum([blocks for _, blocks in self.sources])
        return np.searchsorted(ends, self._places(rows), side="right")

    def _places(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        return permute(rows, self._len, bits(0, Stream.HELDOUT_ORDER, 0)) if self._shuffled else rows

    def _read(self, name: str, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        places = self._places(rows)
        if len(self._shards) == 1:
            return self._shards[0].read(name, places)
        found = np.empty((len(rows), self.length), dtype=np.int64)
        owners = np.searchsorted(self._ends, places, side="right")
        for owner in np.unique(owners).tolist():
            mine = owners == owner
            first = 0 if owner == 0 else int(self._ends[owner - 1])
            found[mine] = self._shards[owner].read(name, places[mine] - first)
        return found


# --------------------------------------------------------------------------------------------------------------- meta


def read_meta(folder: Path) -> dict[str, Any]:
    """meta.json of a prepared corpus, its tokenizer verified against the digest there. Raises UserError naming the fix."""
    path = folder / META
    if not path.is_file():
        raise UserError(f"task.corpus: {folder} holds no prepared corpus; run `megapd prepare` first, or correct task.corpus")
    try:
        meta = unsealed(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataDamaged(f"{path}: damaged ({error}); {AGAIN}") from error
    if meta.get("format") not in READ_FORMATS:
        found, reads = meta.get("format"), " and ".join(map(str, READ_FORMATS))
        raise UserError(
            f"{path}: corpus format {found}, this version reads {reads}; run `megapd prepare` again into an empty folder"
        )
    for name, digest in tokenizer_files(meta).items():
        file = folder / name
        if not file.is_file() or sha256_file(file) != digest:
            raise DataDamaged(f"{file}: missing or not the tokenizer the corpus was made with; {AGAIN}")
    return meta


def tokenizer_files(meta: dict[str, Any]) -> dict[str, str]:
    """Name -> sha256 of the files in the corpus' folder that its tokenizer was read from."""
    tokenizer = meta["tokenizer"]
    return dict(tokenizer.get("files") or {MODEL: tokenizer["digest"]})


def token_roles(meta: dict[str, Any]) -> dict[str, int | None]:
    """The ids of separator, opener, mask and padding, or None."""
    tokenizer = meta["tokenizer"]
    return dict(tokenizer["roles"]) if "roles" in tokenizer else _roles_by_name(tokenizer)


def _roles_by_name(tokenizer: dict[str, Any]) -> dict[str, int | None]:
    names = {"separator": "[SEP]" if tokenizer["style"] == "bert" else "<|endoftext|>", "opener": "[CLS]"}
    return {role: tokenizer["special"].get(name) for role, name in {**names, "mask": "[MASK]", "padding": "[PAD]"}.items()}


def content_digest(meta: dict[str, Any]) -> str:
    """Hexadecimal sha256 of what a corpus holds, wherever it lies: its tokenizer and blocks; roles and size where they are not
    those that the tokenizer alone would have, which is all that there was in format 2."""
    tokenizer = meta["tokenizer"]
    shards = (shard["sha256"] for split in ("train", "heldout") for shard in meta[split]["shards"])
    own = [tokenizer["digest"]]
    if (
        token_roles(meta) != _roles_by_name(tokenizer)
        or tokenizer.get("tokens", tokenizer["vocab_size"]) != tokenizer["vocab_size"]
    ):
        own += [f"{role}={number}" for role, number in sorted(token_roles(meta).items())] + [f"size={tokenizer['vocab_size']}"]
    return hashlib.sha256(" ".join([*own, *shards]).encode()).hexdigest()


def _shard(path: Path) -> dict[str, Any]:
    """What meta.json beside a shard says of it, with the blocks' length."""
    meta = read_meta(path.parent)
    for split in ("train", "heldout"):
        for shard in meta[split]["shards"]:
            if shard["file"] == path.name:
                return {**shard, "length": meta["config"]["block_length"]}
    raise DataDamaged(f"{path}: meta.json beside it names no such shard; {AGAIN}")
