"""Documents, one by one, from parquet, JSONL and text files or from a data set of the Hugging Face hub.

A parquet or JSONL row is a document; a text file is one document. With window_chars, each document is cut at paragraph
boundaries into windows, which stay on one side of the split with it. Memory is bounded by the longest document, and for text
files with window_chars by the window.
"""

from __future__ import annotations

import glob
import gzip
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from megapd import config as settings
from megapd.corpus.hub import newest_revision, rows_of
from megapd.errors import UserError
from megapd.files import sha256_file

PARQUET, JSONL, TEXT = (".parquet",), (".jsonl", ".jsonl.gz"), (".txt", ".txt.gz")
SUFFIXES = PARQUET + JSONL + TEXT
ROWS_A_READ = 32  # parquet rows decoded at once: at a book's 1 MB each, 32 MB
READ_CHARS = 1 << 20
KEY_CHARS = 1 << 16  # of a document's text that decide on its side; of most it is the whole

_SURROGATE = re.compile("[\ud800-\udfff]")


class TextSource:
    """One entry of corpus.sources; iterate it for its texts, in the files' order, as often as needed.

    name      what it is called in metrics
    files     that it reads; none of a data set of the hub
    revision  of the hub data set, the same for all readings; None: not known
    """

    def __init__(self, source: settings.SourceConfig, number: int) -> None:
        """number: its place in corpus.sources. Raises UserError where a path matches nothing that can be read."""
        self._source, self._setting = source, f"corpus.sources[{number}]"
        self.name = source.name or default_name(source)
        self.files = find_files(source.path, self._setting) if source.path is not None else []
        self.revision = source.revision if source.hub is None or source.revision else newest_revision(source.hub)

    def __iter__(self) -> Iterator[str]:
        """Texts, whole documents or their windows: line ends as \\n, no blanks at the ends, never empty, always encodable as
        UTF-8."""
        for _, texts in self.documents():
            yield from texts

    def documents(self, order: Sequence[Path] | None = None) -> Iterator[tuple[str, Iterator[str]]]:
        """Each document's key, which says on which side of a split it is, and its texts, to be taken before the next document.

        The key is its text, of a long one the first KEY_CHARS characters: what is cut into windows is not read as a whole.
        order: of the files, another than theirs.
        """
        for pieces in self._pieces(self.files if order is None else order):
            taken = iter(pieces)
            head = ""
            for piece in taken:
                head += piece
                if len(head.lstrip()) >= KEY_CHARS:
                    break
            yield _plain(head)[:KEY_CHARS], self._texts(chain([head], taken))

    def _texts(self, pieces: Iterable[str]) -> Iterator[str]:
        size = self._source.window_chars
        for document in ["".join(pieces)] if size is None else windows(pieces, size):
            if text := _plain(document):
                yield text

    def _pieces(self, files: Sequence[Path]) -> Iterator[Iterable[str]]:
        """Each document in pieces: those of files are not read as a whole."""
        if self._source.hub is not None:
            yield from ([document] for document in self._hub(self._source.hub))
        for file in files:
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
                        yield self._text_of(_python(value), str(path))
        except (pa.ArrowInvalid, OSError) as error:
            raise UserError(f"{path}: not a readable parquet file ({_line(error)})") from error

    def _jsonl(self, path: Path) -> Iterator[str]:
        with _open(path) as file:
            for number, line in enumerate(_checked(file, path), start=1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError) as error:  # numbers of more than 4,300 digits, and deep nesting, too
                    raise UserError(f"{path}, line {number}: not JSON that can be read ({_line(error)})") from error
                if not isinstance(row, dict):
                    raise UserError(f"{path}, line {number}: expected a JSON object a line, got a {type(row).__name__}")
                self._check_column(list(row), f"{path}, line {number}")
                # JSON alone can write halves of surrogate pairs, which have no UTF-8; decoded files and Arrow hold none.
                yield _SURROGATE.sub("\ufffd", self._text_of(row[self._source.text_column], f"{path}, line {number}"))

    def _text(self, path: Path) -> Iterator[str]:
        with _open(path) as file:
            yield from _checked(iter(lambda: file.read(READ_CHARS), ""), path)

    def _hub(self, name: str) -> Iterator[str]:
        source = self._source
        for row in rows_of(name, source.hub_config, source.split, self.revision, self._setting):
            self._check_column(list(row), name)
            yield _SURROGATE.sub("\ufffd", self._text_of(row[source.text_column], name))

    def _check_column(self, columns: list[str], where: str) -> None:
        if columns.count(self._source.text_column) > 1:
            raise UserError(f"{self._setting}.text_column: {where} has several columns {self._source.text_column!r}; rename one")
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


def default_name(source: settings.SourceConfig) -> str:
    """Of the file without its endings, of the folder, or of the data set; of a glob, the pattern."""
    if source.hub is not None:
        return source.hub.rpartition("/")[2]
    assert source.path is not None
    name = Path(source.path).name
    return next((name.removesuffix(suffix) for suffix in SUFFIXES if name.endswith(suffix)), name) or source.path


def names(sources: Sequence[TextSource]) -> list[str]:
    """One a source. Raises UserError where two are called the same."""
    found = [source.name for source in sources]
    for number, name in enumerate(found):
        if name in found[:number]:
            raise UserError(f"corpus.sources[{number}].name: another source is called {name!r} too; give one another name")
    return found


def fingerprint(file: Path, known: dict[str, Any] | None = None) -> dict[str, Any]:
    """Size, time and sha256 of a source's file. known: a former one, whose digest holds while size and time are the same."""
    status = file.stat()
    same = known is not None and (known["bytes"], known["mtime_ns"]) == (status.st_size, status.st_mtime_ns)
    digest = known["sha256"] if known is not None and same else sha256_file(file)
    return {"path": str(file), "bytes": status.st_size, "mtime_ns": status.st_mtime_ns, "sha256": digest}


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
    try:  # utf-8-sig: a byte order mark, which some editors write, is no part of the text
        return gzip.open(path, "rt", encoding="utf-8-sig") if path.name.endswith(".gz") else path.open(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error


def _checked(pieces: Iterator[str] | IO[str], path: Path) -> Iterator[str]:
    """Pass pieces on; a file that cannot be decoded becomes a UserError."""
    try:
        yield from pieces
    except (UnicodeDecodeError, EOFError, OSError, zlib.error) as error:  # gzip reports damage by the last three
        raise UserError(f"{path}: not readable as UTF-8 text ({_line(error)})") from error


def _plain(text: str) -> str:
    """With line ends as \\n and no blanks at the ends."""
    return (text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text).strip()


def _python(value: pa.Scalar) -> Any:
    """A parquet value; bytes that are no UTF-8, which other writers leave in text, become U+FFFD."""
    try:
        return value.as_py()
    except UnicodeDecodeError:
        return value.as_buffer().to_pybytes().decode("utf-8", "replace")


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())
