"""A corpus is known by its content: what changed on the disk is found when read, what changed at its sources when prepared."""

import json
import random
import shutil

import numpy as np
import pytest

from megapd.cli import main
from megapd.corpus import prepare, verify
from megapd.corpus.prepare import is_heldout
from megapd.corpus.tokenizer import load
from megapd.errors import DataDamaged, UserError
from megapd.files import sealed
from megapd.tasks import blocks as stored
from megapd.tasks import build_task
from megapd.tasks.blocks import Blocks, Split, content_digest, read_meta
from tests.corpus import corpora

FILES = ("train.arrow", "train.checks", "heldout.arrow", "heldout.checks", "meta.json", "tokenizer.model")


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return corpora.prepared(tmp_path_factory.mktemp("corpus"), "gpt")


def batches(config):
    task = build_task(config)
    whole = [task.batch(step, range(16)) for step in range(12)] + [task.heldout(range(task.heldout_samples))]
    return [task.data_digest, *(batch.digest for batch in whole)]


def placed(config, folder):
    return config.model_copy(update={"corpus": config.corpus.model_copy(update={"output": folder})})


@pytest.mark.parametrize("name", FILES)
def test_no_changed_bit_changes_a_batch(config, tmp_path, name):
    """Of each file a sample of bits: refused as damaged, or of no effect on any batch."""
    folder = tmp_path / "corpus"
    shutil.copytree(config.corpus.output, folder)
    moved, right = placed(config, folder), batches(config)
    assert batches(moved) == right
    whole, draw, refused = (folder / name).read_bytes(), random.Random(name), 0
    for _ in range(40):
        place = draw.randrange(len(whole) * 8)
        damaged = bytearray(whole)
        damaged[place // 8] ^= 1 << place % 8
        (folder / name).write_bytes(damaged)
        try:
            found = batches(moved)
        except UserError as error:
            found = str(error)
        refused += isinstance(found, str)
        assert found == right or str(folder) in found, f"bit {place} of {name}"
    assert refused >= 10


def test_verify_reads_everything(config, tmp_path, capsys):
    folder = tmp_path / "corpus"
    shutil.copytree(config.corpus.output, folder)
    assert verify(folder) == sum(read_meta(folder)[split]["blocks"] for split in ("train", "heldout"))
    assert main(["corpus", "verify", str(folder)]) == 0
    assert "blocks as they were written" in capsys.readouterr().out
    content = bytearray((folder / "train.arrow").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "train.arrow").write_bytes(content)
    assert main(["corpus", "verify", str(folder)]) == 2
    assert "train.arrow: block" in capsys.readouterr().err
    assert main(["corpus", "verify", str(tmp_path)]) == 2
    assert "holds no prepared corpus" in capsys.readouterr().err


def test_blocks_that_changed_places_are_found(tmp_path):
    """Each block's check is of its own number."""
    ids = np.arange(40 * 8).reshape(40, 8) % 50
    corpora.write_blocks(tmp_path, 50, ids, np.zeros_like(ids))
    whole = bytearray((tmp_path / "train.arrow").read_bytes())
    first, second = ids[3].astype(np.uint16).tobytes(), ids[4].astype(np.uint16).tobytes()
    place = whole.index(first + second)
    whole[place : place + len(first + second)] = second + first
    (tmp_path / "train.arrow").write_bytes(whole)
    blocks = Blocks(tmp_path / "train.arrow")
    assert np.array_equal(blocks.ids(np.array([2, 5])), ids[[2, 5]])
    with pytest.raises(DataDamaged, match="block 3 is not the one that was written"):
        blocks.ids(np.array([2, 3]))


def test_pages_of_checks_are_held_against_their_digests(tmp_path, monkeypatch):
    monkeypatch.setattr(stored, "PAGE_BLOCKS", 16)
    monkeypatch.setattr("megapd.corpus.pack.PAGE_BLOCKS", 16)
    ids = np.arange(40 * 8).reshape(40, 8) % 50
    corpora.write_blocks(tmp_path, 50, ids, np.zeros_like(ids), chunk=7)
    path = tmp_path / "train.checks"
    assert path.stat().st_size == 40 * 16 + 3 * 16
    content = bytearray(path.read_bytes())
    content[20 * 16] ^= 1  # of block 20
    path.write_bytes(content)
    blocks = Blocks(tmp_path / "train.arrow")
    assert np.array_equal(blocks.ids(np.array([39, 0])), ids[[39, 0]])
    with pytest.raises(DataDamaged, match="page 1 is damaged"):
        blocks.ids(np.array([25]))


def test_a_split_reads_over_its_shards(tmp_path):
    ids = np.arange(50 * 8).reshape(50, 8) % 60
    shards = []
    for name, part in (("a", ids[:20]), ("b", ids[20:])):
        writer = corpora.write_blocks(tmp_path / name, 60, part, np.zeros_like(part))
        for suffix in ("arrow", "checks"):
            shutil.copy(tmp_path / name / f"train.{suffix}", tmp_path / f"{name}.{suffix}")
        shards.append({**writer.shard, "file": f"{name}.arrow"})
    meta = {**read_meta(tmp_path / "a"), "train": {"shards": shards}}
    shutil.copy(tmp_path / "a" / "tokenizer.model", tmp_path)
    (tmp_path / "meta.json").write_text(sealed({**meta, "heldout": {"shards": []}}))
    split = Split(tmp_path, meta, "train")
    rows = np.array([49, 0, 19, 20, 3])
    assert len(split) == 50
    assert np.array_equal(split.ids(rows), ids[rows])


# -------------------------------------------------------------------------------------------------------------- held out


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A corpus of two sources, of which the second has documents that are cut into windows."""
    folder = tmp_path_factory.mktemp("two")
    texts = corpora.documents(400)
    corpora.write_jsonl(folder / "short.jsonl", texts[:200])
    corpora.write_jsonl(folder / "long.jsonl", ["\n\n".join(texts[first : first + 10]) for first in range(200, 400, 10)])
    sources = f"[{{path: {folder / 'short.jsonl'}}}, {{path: {folder / 'long.jsonl'}, window_chars: 1000, name: books}}]"
    config = corpora.settings(folder, "", "gpt", f"--corpus.sources={sources}", "--corpus.heldout_fraction=0.3")
    prepare(config, progress=False)
    return config


def test_the_first_samples_are_of_every_source(two):
    task = build_task(two)
    whole = task.heldout_by_source(task.heldout_samples)
    assert list(whole) == ["short", "books"]
    assert sorted(np.concatenate(list(whole.values())).tolist()) == list(range(task.heldout_samples))
    first = task.heldout_by_source(task.heldout_samples // 3)
    share = len(whole["books"]) / task.heldout_samples
    assert 0.2 < share < 0.8
    assert len(first["books"]) / (task.heldout_samples // 3) == pytest.approx(share, abs=0.15)


def test_windows_stay_with_their_document(two):
    meta = read_meta(two.corpus.output)
    source = {entry["name"]: entry for entry in meta["sources"]}["books"]
    assert source["documents"] > 100  # windows
    decode = load(two.corpus.output / "tokenizer.model", "gpt").decode
    sides = [Blocks(two.corpus.output / f"{split}.arrow") for split in ("train", "heldout")]
    found = [set(decode(side.ids(np.arange(len(side))).reshape(-1)).split("number ")[1:]) for side in sides]
    numbers = [{int(text.split(maxsplit=1)[0]) for text in side if text.split()[0].isdigit()} for side in found]
    of_books = [{number // 10 for number in side if number >= 200} for side in numbers]
    assert all(of_books)
    assert not of_books[0] & of_books[1]


def test_the_loss_of_each_source(two, tmp_path):
    held = build_task(two).heldout_samples
    small = ["--model={kind: gpt, layers: 1, hidden: 16, heads: 2}", "--training.steps=2", f"--evaluation.samples={held}"]
    sources = f"[{{path: {two.corpus.output.parent / 'short.jsonl'}}}]"
    arguments = [f"--corpus={{output: {two.corpus.output}, sources: {sources}}}", "--task={kind: text, objective: clm}", *small]
    arguments += [f"--runs_dir={tmp_path}", "--name=s", "--training.global_batch=16", "--telemetry.wandb=disabled"]
    assert main(["train", *arguments]) == 0
    (line,) = [r for r in map(json.loads, (tmp_path / "s/metrics.jsonl").read_text().splitlines()) if r["kind"] == "eval"]
    assert line["loss"] == pytest.approx((line["loss/short"] + line["loss/books"]) / 2, rel=0.1)
    assert line["loss/short"] != line["loss/books"]
    assert main(["train", *arguments, "--name=t", f"--evaluation.samples={held + 1}"]) == 2
    assert not (tmp_path / "t").exists()


def test_names_of_sources(tmp_path):
    path = corpora.write_jsonl(tmp_path / "a.jsonl", corpora.documents())
    sources = f"[{{path: {path}}}, {{path: {path}, name: a}}]"
    with pytest.raises(UserError, match=r"corpus\.sources\[1\]\.name: another source is called 'a' too"):
        prepare(corpora.settings(tmp_path, "", "bert", f"--corpus.sources={sources}"), progress=False)


def test_documents_that_are_all_held_out_are_no_empty_source(tmp_path):
    seed = next(seed for seed in range(64) if is_heldout("a document", 0.4, seed))
    (tmp_path / "one.txt").write_text("a document")
    own = ["--corpus.heldout_fraction=0.4", f"--corpus.seed={seed}"]
    with pytest.raises(UserError, match=r"corpus\.sources: 1 documents, all of which fell into the held-out split"):
        prepare(corpora.settings(tmp_path, tmp_path / "one.txt", "bert", *own), progress=False)


# --------------------------------------------------------------------------------------------------------------- sources


def test_other_text_is_not_already_prepared(tmp_path, capsys, caplog):
    (tmp_path / "text").mkdir()
    texts = corpora.documents()
    corpora.write_jsonl(tmp_path / "text" / "a.jsonl", texts[:30])
    corpora.write_jsonl(tmp_path / "text" / "b.jsonl", texts[30:])
    config = corpora.settings(tmp_path, tmp_path / "text")
    digest = content_digest(read_meta(prepare(config, progress=False)))
    (tmp_path / "text" / "a.jsonl").touch()  # another time, the same text
    prepare(config, progress=False)
    assert "already prepared" in capsys.readouterr().err
    corpora.write_jsonl(tmp_path / "text" / "a.jsonl", texts[:29])
    corpora.write_jsonl(tmp_path / "text" / "c.jsonl", texts[29:30])
    (tmp_path / "text" / "b.jsonl").unlink()
    with pytest.raises(UserError) as told:
        prepare(config, progress=False)
    for what in ("changed: ", "a.jsonl; added: ", "c.jsonl; gone: ", "b.jsonl)", "corpus.sources[0]"):
        assert what in str(told.value)
    shutil.rmtree(tmp_path / "text")  # what a cluster has is the corpus
    assert content_digest(read_meta(prepare(config, progress=False))) == digest
    assert "is not here any more" in caplog.text


def test_a_setting_that_its_megapd_lacked_is_no_other(tmp_path):
    config = corpora.prepared(tmp_path)
    path = config.corpus.output / "meta.json"
    meta = read_meta(config.corpus.output)
    del meta["config"]["tokenizer"]["training_sentences"]
    path.write_text(sealed(meta))
    prepare(config, progress=False)
