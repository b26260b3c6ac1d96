"""`megapd prepare` end to end: what lies on disk is the text, whole or not at all, the same each time."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from megapd.corpus import prepare
from megapd.corpus import tokenizer as tokenizers
from megapd.corpus.prepare import is_heldout
from megapd.errors import UserError
from megapd.files import sha256_file
from megapd.tasks.blocks import Blocks, read_meta
from tests.corpus import corpora

FILES = ["heldout.arrow", "heldout.checks", "meta.json", "tokenizer.model", "train.arrow", "train.checks"]


def stream(blocks: Blocks, opener: bool) -> list[int]:
    """The stream of a split's tokens, without the openers."""
    return blocks.ids(np.arange(len(blocks)))[:, 1 if opener else 0 :].reshape(-1).tolist()


@pytest.mark.parametrize("style", ["bert", "gpt"])
def test_the_blocks_hold_every_document_in_order(tmp_path, style):
    config = corpora.prepared(tmp_path, style)
    folder = config.corpus.output
    assert sorted(file.name for file in folder.iterdir()) == FILES
    meta = json.loads((folder / "meta.json").read_text())
    tokenizer = tokenizers.load(folder / "tokenizer.model", style)
    roles = {"bert": (3, 2, 4, 0), "gpt": (1, None, None, None)}[style]
    assert meta["tokenizer"] == {
        "digest": tokenizer.digest,
        "style": style,
        "vocab_size": 320,
        "tokens": 320,
        "special": tokenizer.special,
        "roles": dict(zip(("separator", "opener", "mask", "padding"), roles, strict=True)),
        "files": {"tokenizer.model": sha256_file(folder / "tokenizer.model")},
        "engine": "sentencepiece",
    }
    texts = corpora.documents()
    for split in ("train", "heldout"):
        chosen = [text for text in texts if is_heldout(text, 0.2, 0) == (split == "heldout")]
        assert chosen
        expected = [token for ids in tokenizer.encode(chosen) for token in [*ids.tolist(), tokenizer.separator]]
        blocks = Blocks(folder / f"{split}.arrow")
        got = stream(blocks, style == "bert")
        assert got == expected[: len(got)]
        counts = meta[split]
        assert len(expected) - len(got) == counts["dropped_tokens"] < 32
        assert (counts["documents"], counts["tokens"], counts["blocks"]) == (len(chosen), len(expected), len(blocks))
        (shard,) = counts["shards"]
        assert (shard["blocks"], shard["sha256"]) == (len(blocks), sha256_file(folder / f"{split}.arrow"))
    (source,) = meta["sources"]
    assert source["documents"] == 60
    assert source["characters"] == sum(len(text) for text in texts)
    assert source["tokens"] == meta["train"]["tokens"] + meta["heldout"]["tokens"] - 60
    assert meta["config"]["block_length"] == 32


def test_the_same_digests_twice(tmp_path):
    digests = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        config = corpora.settings(tmp_path / name, corpora.write_jsonl(tmp_path / "text.jsonl", corpora.documents()))
        prepare(config, progress=False)
        digests.append([sha256_file(config.corpus.output / file) for file in FILES if file != "meta.json"])
    assert digests[0] == digests[1]


def test_sources_are_counted_apart(tmp_path):
    texts = corpora.documents()
    corpora.write_jsonl(tmp_path / "a.jsonl", texts[:25])
    (tmp_path / "b.txt").write_text("\n\n".join(texts[25:]))
    sources = f"[{{path: {tmp_path / 'a.jsonl'}}}, {{path: {tmp_path / 'b.txt'}, window_chars: 1000}}]"
    config = corpora.settings(tmp_path, "", "bert", f"--corpus.sources={sources}")
    meta = json.loads((prepare(config, progress=False) / "meta.json").read_text())
    first, second = meta["sources"]
    assert (first["name"], first["documents"]) == ("a", 25)
    assert second["name"] == "b"
    assert [known["path"] for known in second["files"]] == [str(tmp_path / "b.txt")]
    assert second["files"][0]["sha256"] == sha256_file(tmp_path / "b.txt")
    assert second["documents"] >= len("\n\n".join(texts[25:])) // 1000


def test_the_split_is_by_text():
    texts = corpora.documents(2000, seed=3)
    held = [text for text in texts if is_heldout(text, 0.1, 0)]
    assert abs(len(held) / 2000 - 0.1) < 4.5 * np.sqrt(0.1 * 0.9 / 2000)
    assert all(is_heldout(text, 0.2, 0) for text in held)  # a larger share only adds documents
    other = [text for text in texts if is_heldout(text, 0.1, 1)]
    assert len(set(held) & set(other)) < 60


def test_duplicates_stay_on_one_side(tmp_path):
    texts = corpora.documents() * 3
    config = corpora.settings(tmp_path, corpora.write_jsonl(tmp_path / "text.jsonl", texts))
    folder = prepare(config, progress=False)
    tokenizer = tokenizers.load(folder / "tokenizer.model", "bert")
    sides = []
    for split in ("train", "heldout"):
        ids = stream(Blocks(folder / f"{split}.arrow"), opener=True)
        sides.append({document for document in tokenizer.decode(np.array(ids)).split("number ") if len(document) > 200})
    assert all(sides)
    assert not sides[0] & sides[1]


def test_the_tokenizer_never_sees_heldout_text(tmp_path, monkeypatch):
    seen = []

    def train(settings, documents):
        seen.extend(documents)
        return real(settings, iter(seen))

    real = tokenizers.train
    monkeypatch.setattr(tokenizers, "train", train)
    corpora.prepared(tmp_path)
    assert sorted(seen) == sorted(text for text in corpora.documents() if not is_heldout(text, 0.2, 0))


def test_prepared_once(tmp_path, capsys):
    config = corpora.prepared(tmp_path)
    before = (config.corpus.output / "train.arrow").stat().st_mtime_ns
    assert prepare(config, progress=False) == config.corpus.output
    assert "already prepared" in capsys.readouterr().err
    assert (config.corpus.output / "train.arrow").stat().st_mtime_ns == before
    other = corpora.settings(
        tmp_path, tmp_path / "text.jsonl", "bert", "--corpus.seed=4", "--corpus.tokenizer.training_sentences=500"
    )
    refused(other, "corpus.output", str(config.corpus.output), "corpus.seed", "corpus.tokenizer.training_sentences")
    assert (config.corpus.output / "train.arrow").stat().st_mtime_ns == before


def test_an_output_that_is_something_else(tmp_path):
    config = corpora.settings(tmp_path, corpora.write_jsonl(tmp_path / "text.jsonl", corpora.documents()))
    config.corpus.output.mkdir()
    (config.corpus.output / "precious.txt").write_text("mine")
    refused(config, "corpus.output", "holds no corpus")
    (config.corpus.output / "precious.txt").unlink()
    assert (prepare(config, progress=False) / "train.arrow").exists()


def test_an_existing_tokenizer_is_copied_and_padded(tmp_path):
    first = corpora.prepared(tmp_path).corpus.output
    (tmp_path / "second").mkdir()
    tokenizer = f"{{style: bert, model: {first / 'tokenizer.model'}, vocab_size: 500}}"
    config = corpora.settings(tmp_path / "second", tmp_path / "text.jsonl", "bert", f"--corpus.tokenizer={tokenizer}")
    second = prepare(config, progress=False)
    assert sha256_file(second / "train.arrow") == sha256_file(first / "train.arrow")
    assert sha256_file(second / "tokenizer.model") == sha256_file(first / "tokenizer.model")
    meta = read_meta(second)["tokenizer"]
    assert (meta["vocab_size"], meta["tokens"]) == (500, 320)


def refused(config, *words: str) -> None:
    """One line, and nothing left behind."""
    before = sorted(config.corpus.output.parent.iterdir())
    with pytest.raises(UserError) as caught:
        prepare(config, progress=False)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)
    assert sorted(config.corpus.output.parent.iterdir()) == before


def test_refusals(tmp_path):
    text = corpora.write_jsonl(tmp_path / "text.jsonl", corpora.documents())
    refused(corpora.settings(tmp_path, text, "bert", "--corpus.sources=[]"), "corpus.sources", "empty")
    refused(corpora.settings(tmp_path, tmp_path / "none.jsonl"), "corpus.sources[0].path", "none.jsonl")
    refused(corpora.settings(tmp_path, text, "bert", "--corpus.tokenizer.vocab_size=9000"), "corpus.tokenizer.vocab_size")
    refused(corpora.settings(tmp_path, text, "bert", "--corpus.tokenizer.vocab_size=100"), "corpus.tokenizer.vocab_size")
    sources = f"--corpus.sources=[{{path: {text}, text_column: body}}]"
    refused(corpora.settings(tmp_path, text, "bert", sources), "corpus.sources[0].text_column", "body")
    refused(corpora.settings(tmp_path, text, "bert", "--corpus.heldout_fraction=0.0001"), "corpus.heldout_fraction", "heldout")
    refused(corpora.settings(tmp_path, text, "bert", "--corpus.block_length=100000"), "corpus.block_length", "train")
    blank = tmp_path / "blank.txt"
    blank.write_text(" \n\n")
    refused(corpora.settings(tmp_path, blank), "corpus.sources", "empty")


def test_empty_sources_with_an_existing_tokenizer(tmp_path):
    model = corpora.prepared(tmp_path).corpus.output / "tokenizer.model"
    (tmp_path / "second").mkdir()
    blank = tmp_path / "blank.txt"
    blank.write_text(" \n\n")
    refused(
        corpora.settings(tmp_path / "second", blank, "bert", f"--corpus.tokenizer={{model: {model}}}"),
        "corpus.sources",
        "empty",
        "blank.txt",
    )


@pytest.mark.parametrize("where", ["train", "append", "commit"])
def test_an_interrupt_leaves_nothing(tmp_path, monkeypatch, where):
    config = corpora.settings(tmp_path, corpora.write_jsonl(tmp_path / "text.jsonl", corpora.documents()))

    def interrupt(*arguments):
        raise KeyboardInterrupt

    target = {
        "train": "megapd.corpus.tokenizer.train",
        "append": "megapd.corpus.pack.BlockWriter.append",
        "commit": "megapd.files.os.rename",
    }[where]
    with monkeypatch.context() as patch:
        patch.setattr(target, interrupt)
        with pytest.raises(KeyboardInterrupt):
            prepare(config, progress=False)
    assert [file.name for file in tmp_path.iterdir()] == ["text.jsonl"]
    assert (prepare(config, progress=False) / "meta.json").exists()


@pytest.mark.slow
def test_a_kill_leaves_no_output_and_the_next_run_cleans_up(tmp_path):
    """kill -9 amid the work; a pipe that is never written to holds the process there."""
    text = corpora.write_jsonl(tmp_path / "a.jsonl", corpora.documents())
    os.mkfifo(tmp_path / "fifo")
    config = corpora.settings(tmp_path, text)
    overrides = [
        f"--corpus.output={config.corpus.output}",
        f"--corpus.sources=[{{path: {text}}}]",
        "--corpus.tokenizer.vocab_size=320",
    ]
    process = subprocess.Popen([sys.executable, "-m", "tests.corpus.slow_worker", str(tmp_path / "fifo"), *overrides])
    try:
        deadline = time.monotonic() + 60
        while not any(".tmp-" in file.name for file in tmp_path.iterdir()):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not config.corpus.output.exists()
    prepare(config, progress=False)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.jsonl", "corpus", "fifo"]


def test_progress_goes_to_stderr(tmp_path, capsys):
    config = corpora.settings(tmp_path, corpora.write_jsonl(tmp_path / "text.jsonl", corpora.documents()))
    prepare(config)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "tokenising" in captured.err
