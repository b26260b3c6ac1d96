"""Sources: every format gives the same documents; what cannot be read is told in one line."""

from __future__ import annotations

import gzip
import json
import os

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megapd.config import SourceConfig
from megapd.corpus.sources import TextSource, windows
from megapd.errors import UserError

TEXTS = ["one\n\ntwo", "drei ß vier", "fünf\nsechs", "sieben"]


def read(path, **settings) -> list[str]:
    return list(TextSource(SourceConfig(path=str(path), **settings), 0))


def refused(path, *words, **settings) -> None:
    with pytest.raises(UserError) as caught:
        read(path, **settings)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def write(path, texts, column="text") -> None:
    rows = [{"id": i, column: text} for i, text in enumerate(texts)]
    if path.name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)
    elif path.name.endswith(".jsonl"):
        path.write_text("\n\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    elif path.name.endswith(".jsonl.gz"):
        path.write_bytes(gzip.compress("\n".join(json.dumps(row) for row in rows).encode()))


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl", "a.jsonl.gz"])
def test_tables(tmp_path, name):
    write(tmp_path / name, TEXTS)
    assert read(tmp_path / name) == TEXTS
    write(tmp_path / name, TEXTS, "body")
    assert read(tmp_path / name, text_column="body") == TEXTS
    refused(tmp_path / name, "corpus.sources[0].text_column", "'text'", "id, body", name)


def test_a_source_can_be_read_again(tmp_path):
    write(tmp_path / "a.jsonl", TEXTS)
    source = TextSource(SourceConfig(path=str(tmp_path / "a.jsonl")), 0)
    assert list(source) == list(source) == TEXTS


def test_a_text_file_is_a_document(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"eins\r\nzwei\rdrei\n\n")
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress("vier ß fünf".encode()))
    assert read(tmp_path / "a.txt") == ["eins\nzwei\ndrei"]
    assert read(tmp_path) == ["eins\nzwei\ndrei", "vier ß fünf"]


def test_folders_and_globs(tmp_path):
    (tmp_path / "deep").mkdir()
    write(tmp_path / "b.parquet", TEXTS[2:])
    write(tmp_path / "deep" / "c.jsonl", TEXTS[:1])
    write(tmp_path / "a.jsonl", TEXTS[:2])
    (tmp_path / "notes.md").write_text("not text to train on")
    assert read(tmp_path) == TEXTS[:2] + TEXTS[2:] + TEXTS[:1]
    assert read(tmp_path / "*.jsonl") == TEXTS[:2]
    assert read(tmp_path / "**" / "*.jsonl") == TEXTS[:2] + TEXTS[:1]
    refused(tmp_path / "*.md", "corpus.sources[0].path", ".parquet")
    refused(tmp_path / "notes.md", "corpus.sources[0].path", ".parquet")
    refused(tmp_path / "none.txt", "corpus.sources[0].path", "none.txt")
    refused(tmp_path / "*.txt", "corpus.sources[0].path", "*.txt")
    (tmp_path / "bare").mkdir()
    refused(tmp_path / "bare", "corpus.sources[0].path", "bare")


def test_blank_and_null_documents_are_left_out(tmp_path):
    write(tmp_path / "a.parquet", ["a", None, " \n", "b"])
    write(tmp_path / "b.jsonl", ["", None, " c "])
    assert read(tmp_path) == ["a", "b", "c"]


def test_lone_surrogates_become_replacement_characters(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a\\ud800b \\ud83d\\ude00"}')
    assert read(tmp_path) == ["a\ufffdb 😀"]


def test_damaged_files(tmp_path):
    file = tmp_path / "a.parquet"
    write(file, TEXTS)
    file.write_bytes(file.read_bytes()[:-20])
    refused(file, str(file))
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "a"}\n{"text": \n')
    refused(file, str(file), "line 2")
    file.write_text('{"text": "a"}\n["b"]\n')
    refused(file, str(file), "line 2", "list")
    file.write_text('{"text": 5}\n')
    refused(file, str(file), "corpus.sources[0].text_column", "int")
    file = tmp_path / "a.txt"
    file.write_bytes(b"caf\xe9")
    refused(file, str(file), "UTF-8")
    file = tmp_path / "a.jsonl.gz"
    content = gzip.compress(b'{"text": "a"}\n' * 5000)
    for damaged in (content[:-20], b"plain", content[:20] + b"\xff" * 20 + content[40:]):
        file.write_bytes(damaged)
        refused(file, str(file))


def test_parquet_is_read_in_bounded_memory(tmp_path):
    texts = [os.urandom(10_000).hex() for _ in range(300)]
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet", row_group_size=10)
    before = pa.total_allocated_bytes()
    held = [pa.total_allocated_bytes() - before for _ in TextSource(SourceConfig(path=str(tmp_path / "a.parquet")), 0)]
    assert len(held) == 300
    assert max(held) < 2_000_000  # of 6 MB


def test_numbers_in_parquet(tmp_path):
    pq.write_table(pa.table({"text": [1, 2]}), tmp_path / "a.parquet")
    refused(tmp_path / "a.parquet", "corpus.sources[0].text_column", "int")


@given(text=st.text(alphabet="ab \n", max_size=400), size=st.integers(10, 60), piece=st.integers(1, 100))
def test_windows_are_the_text(text, size, piece):
    whole = list(windows([text], size))
    assert "".join(whole) == text
    assert all(size // 2 <= len(window) <= size for window in whole[:-1])
    assert all(0 < len(window) <= size for window in whole)
    pieces = list(windows((text[i : i + piece] for i in range(0, len(text), piece)), size))
    assert pieces == whole


def test_windows_prefer_paragraphs_then_lines_then_spaces():
    assert list(windows(["aaaaa\n\nb\nb b bbbb"], 10)) == ["aaaaa\n\n", "b\nb b bbbb"]
    assert list(windows(["aaaaa\nbb bbbb"], 10)) == ["aaaaa\n", "bb bbbb"]
    assert list(windows(["a" * 25], 10)) == ["a" * 10, "a" * 10, "a" * 5]


@pytest.mark.parametrize("name", ["a.txt", "a.parquet", "a.jsonl"])
def test_long_documents_are_windowed(tmp_path, name):
    paragraphs = [f"paragraph {i} " + "word " * 60 for i in range(40)]
    text = "\n\n".join(p.strip() for p in paragraphs)
    if name == "a.txt":
        (tmp_path / name).write_text(text)
    else:
        write(tmp_path / name, [text, "short"])
    documents = read(tmp_path / name, window_chars=1000)
    if name != "a.txt":
        assert documents.pop() == "short"
    assert len(documents) > 10
    assert all(len(document) <= 1000 and document.startswith("paragraph") for document in documents)
    assert "\n\n".join(documents) == text


def test_a_hub_data_set(monkeypatch):
    seen = []

    def load_dataset(*arguments, **settings):
        seen.append((arguments, settings))
        return datasets.Dataset.from_dict({"body": TEXTS}).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr("megapd.corpus.sources.newest_revision", lambda name: "abc")
    source = SourceConfig(hub="org/set", hub_config="en", split="validation", text_column="body")
    assert list(TextSource(source, 0)) == TEXTS
    assert seen == [(("org/set", "en"), {"split": "validation", "revision": "abc", "streaming": True})]
    with pytest.raises(UserError, match=r"corpus.sources\[2\].text_column: org/set has no column 'text'"):
        list(TextSource(SourceConfig(hub="org/set"), 2))


def test_an_unreachable_hub():
    with pytest.raises(UserError, match=r"corpus.sources\[1\]: nobody/nothing cannot be loaded") as caught:
        list(TextSource(SourceConfig(hub="nobody/nothing"), 1))
    assert "\n" not in str(caught.value)


def test_a_byte_order_mark_is_no_text(tmp_path):
    for name in ("a.txt", "a.jsonl"):
        text = "first line" if name == "a.txt" else json.dumps({"text": "first line"}) + "\n"
        (tmp_path / name).write_text(text, encoding="utf-8-sig")
        assert read(tmp_path / name) == ["first line"]


def test_bytes_in_parquet_that_are_no_utf8(tmp_path):
    raw = pa.array([b"before", b"caf\xe9 \xed\xa0\x80", b"after"], pa.binary())
    column = pa.Array.from_buffers(pa.string(), 3, raw.buffers())
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    before, between, after = read(tmp_path / "a.parquet")
    assert (before, after) == ("before", "after")
    assert between.startswith("caf\ufffd")


@pytest.mark.parametrize("row", ['{"text": "a", "n": ' + "9" * 5000 + "}", '{"text": ' + "[" * 200_000, '{"text": 1e999}', "[1]"])
def test_rows_that_cannot_be_read(tmp_path, row):
    (tmp_path / "a.jsonl").write_text('{"text": "good"}\n' + row + "\n")
    with pytest.raises(UserError, match=r"a\.jsonl"):
        read(tmp_path / "a.jsonl")


def test_two_columns_of_one_name(tmp_path):
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(UserError, match="several columns 'text'"):
        read(tmp_path / "a.parquet")


class Dropping:
    """Rows of a hub whose server hangs up after every second one, `times` times."""

    def __init__(self, times, rows=9):
        self.times, self.rows = times, rows

    def __iter__(self):
        for number in range(self.rows):
            if number % 2 and self.times:
                self.times -= 1
                raise ConnectionError("Server disconnected")
            yield {"text": f"row {number}"}


def test_a_hub_that_drops_is_asked_again(monkeypatch, caplog):
    waited = []
    monkeypatch.setattr("megapd.corpus.hub.time.sleep", waited.append)
    monkeypatch.setattr("megapd.corpus.sources.newest_revision", lambda name: "abc")
    source = Dropping(3)
    asked = []
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **settings: asked.append(settings["revision"]) or source)
    assert list(TextSource(SourceConfig(hub="org/set"), 0)) == [f"row {number}" for number in range(9)]
    assert waited == [1.0, 1.0, 1.0] or waited == [1.0, 3.0, 9.0]
    assert set(asked) == {"abc"}
    assert "broke off after" in caplog.text
    source.times = 1000
    with pytest.raises(UserError, match="org/set broke off after 1 rows, and 3 further attempts were in vain"):
        list(TextSource(SourceConfig(hub="org/set"), 0))
