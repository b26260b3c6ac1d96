"""Documents, one by one, from parquet, JSONL and text files or from a data set of the Hugging Face hub.

A parquet or JSONL row is a document; a text file is one document. With window_chars, each document is split at paragraph
boundaries and every window counts as a document of its own from there on. Memory is bounded by the longest document,
and for text files with window_chars by the window.
"""

from __future__ import annotations

import glob
import gzip
import json
import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from megapd import config as settings
from megapd.errors import UserError

PARQUET, JSONL, TEXT = (".parquet",), (".jsonl", ".jsonl.gz"), (".txt", ".txt.gz")
SUFFIXES = PARQUET + JSONL + TEXT
ROWS_A_READ = 32  # parquet rows decoded at once: at a book's 1 MB each, 32 MB
READ_CHARS = 1 << 20

_SURROGATE = re.compile("[\ud800-\udfff]")


class TextSource:
    """One entry of corpus.sources; iterate it for its documents, in the files' order, as often as needed."""

    def __init__(self, source: settings.SourceConfig, number: int) -> None:
        """number: its place in corpus.sources. Raises UserError where a path matches nothing that can be read."""
        self._source, self._setting = source, f"corpus.sources[{number}]"
        self.name = source.path if source.path is not None else f"hub:{source.hub}"
        self._files = find_files(source.path, self._setting) if source.path is not None else []

    def __iter__(self) -> Iterator[str]:
        """Documents: line ends as \\n, no blanks at the ends, never empty, always encodable as UTF-8."""
        size = self._source.window_chars
        for pieces in self._pieces():
            for document in ["".join(pieces)] if size is None else windows(pieces, size):
                text = document.replace("\r\n", "\n").replace("\r", "\n") if "\r" in document else document
                if text := text.strip():
                    yield text

    def _pieces(self) -> Iterator[Iterable[str]]:
        """Each document in pieces: those of files are not read as a whole."""
        if self._source.hub is not None:
            yield from ([document] for document in self._hub())
        for file in self._files:
            if file.name.endswith(TEXT):
                yield self._text(file)
            else:
                rows = self._parquet(file) if file.name.endswith(PARQUET) else self._jsonl(file)
                yield from ([document] for document in rows)

    def _parquet(self, path: Path) -> Iterator[str]:
        column = self._source.text_column
        try:
            # Buffered ahead, every column chunk read would stay in memory until the file is closed.
            with pq.ParquetFile(path, pre_buffer=False) as file:
                self._check_column(file.schema_arrow.names, str(path))
                for batch in file.iter_batches(batch_size=ROWS_A_READ, columns=[column], use_threads=False):
                    for value in batch.column(column):
                        yield self._text_of(value.as_py(), str(path))
        except (pa.ArrowInvalid, OSError) as error:
            raise UserError(f"{path}: not a readable parquet file ({_line(error)})") from error

    def _jsonl(self, path: Path) -> Iterator[str]:
        with _open(path) as file:
            for number, line in enumerate(_checked(file, path), start=1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    raise UserError(f"{path}, line {number}: not valid JSON ({error})") from error
                if not isinstance(row, dict):
                    raise UserError(f"{path}, line {number}: expected a JSON object a line, got a {type(row).__name__}")
                self._check_column(list(row), f"{path}, line {number}")
                # JSON alone can write halves of surrogate pairs, which have no UTF-8; decoded files and Arrow hold none.
                yield _SURROGATE.sub("\ufffd", self._text_of(row[self._source.text_column], f"{path}, line {number}"))

    def _text(self, path: Path) -> Iterator[str]:
        with _open(path) as file:
            yield from _checked(iter(lambda: file.read(READ_CHARS), ""), path)

    def _hub(self) -> Iterator[str]:
        import datasets  # takes seconds, and local files do not need it

        source = self._source
        try:
            rows = iter(datasets.load_dataset(source.hub, source.hub_config, split=source.split, streaming=True))
        except (OSError, ValueError) as error:  # offline, unknown data set, configuration or split
            raise UserError(f"{self._setting}: {source.hub} cannot be loaded: {_line(error)}") from error
        for row in rows:
            self._check_column(list(row), str(source.hub))
            yield self._text_of(row[source.text_column], str(source.hub))

    def _check_column(self, columns: list[str], where: str) -> None:
        if self._source.text_column not in columns:
            found = ", ".join(columns) or "none"
            raise UserError(
                f"{self._setting}.text_column: {where} has no column {self._source.text_column!r}; its columns are {found}"
            )

    def _text_of(self, value: Any, where: str) -> str:
        if value is None:
            return ""
        if not isinstance(value, str):
            column = self._source.text_column
            raise UserError(f"{self._setting}.text_column: {column!r} of {where} is not text but {type(value).__name__}")
        return value


def find_files(path: str, setting: str) -> list[Path]:
    """The files that a path, folder (searched recursively) or glob names, sorted. Raises UserError where there is none."""
    pattern = Path(path).expanduser()
    if pattern.is_dir():
        files = [file for file in pattern.rglob("*") if file.is_file() and file.name.endswith(SUFFIXES)]
        what = f"folder {path} holds no file that ends in"
    elif pattern.is_file():
        files = [pattern] if pattern.name.endswith(SUFFIXES) else []
        what = f"{path} does not end in"
    else:
        matches = [Path(match) for match in glob.glob(str(pattern), recursive=True)]
        if not matches:
            raise UserError(f"{setting}.path: no file matches {path}")
        files = [file for file in matches if file.is_file() and file.name.endswith(SUFFIXES)]
        what = f"no match of {path} ends in"
    if not files:
        raise UserError(f"{setting}.path: {what} {', '.join(SUFFIXES)}")
    return sorted(files)


def windows(pieces: Iterable[str], size: int) -> Iterator[str]:
    """Cut a text, given in pieces, into windows of size / 2 to size characters (the last may be shorter).

    The cut falls after the last paragraph (blank line) that leaves half a window, else after the last line, else after the last
    space, else anywhere. The windows' concatenation is the text.
    """
    text = ""
    for piece in pieces:
        text += piece
        begin = 0
        while len(text) - begin > size:
            end = begin + size
            for mark in ("\n\n", "\n", " "):
                found = text.rfind(mark, begin + size // 2, end)
                if found >= 0:
                    end = found + len(mark)
                    break
            yield text[begin:end]
            begin = end
        text = text[begin:]
    if text:
        yield text


def _open(path: Path) -> IO[str]:
    try:
        return gzip.open(path, "rt", encoding="utf-8") if path.name.endswith(".gz") else path.open(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error


def _checked(pieces: Iterator[str] | IO[str], path: Path) -> Iterator[str]:
    """Pass pieces on; a file that cannot be decoded becomes a UserError."""
    try:
        yield from pieces
    except (UnicodeDecodeError, EOFError, OSError, zlib.error) as error:  # gzip reports damage by the last three
        raise UserError(f"{path}: not readable as UTF-8 text ({_line(error)})") from error


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())
