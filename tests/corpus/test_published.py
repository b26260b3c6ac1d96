"""Published tokenizers: ids as transformers gives them, what text says stays text, roles, digests, sizes, refusals."""

from __future__ import annotations

import json
import random
import shutil

import numpy as np
import pytest
import transformers

from megapd.config import TokenizerConfig
from megapd.corpus import prepare
from megapd.corpus.tokenizer import existing, load, train
from megapd.errors import UserError
from megapd.files import sealed
from megapd.tasks import build_task
from megapd.tasks.blocks import Blocks, content_digest, read_meta, token_roles
from megapd.tokenization import choose_roles, digests, open_tokenizer
from megapd.tokenization.export import same_ids, special_ids, transformers_files
from megapd.tokenization.gigatoken import SAMPLE, Encoder
from megapd.trajectory.hugging_face import HuggingFaceTrajectory
from tests import standins
from tests.corpus import corpora

HARD = "a [MASK] [CLS] <unk> <|endoftext|><s></s>\n\n  indented\tline \n 漢字 é 😀 1234  x   y    z"
FAMILIES = ("pythia", "llama", "bert")
KINDS = {"pythia": "gpt_neox", "llama": "llama", "bert": "bert"}


def texts(count=1000):
    """Words of many scripts, digits, runs of blanks and line ends; none begins with a blank, where sentencepiece puts another
    before it and transformers' Llama does not."""
    draw, alphabets = (
        random.Random(5),
        ["abcdefghij", "ABCDE", "0123456789", "éüñßÅ", "漢字かな", "😀👩‍👩‍👧", "-.,;:!?'\"()", "क्षि"],
    )
    found = []
    for document in corpora.documents(count, seed=3):
        words = ["".join(draw.choices(draw.choice(alphabets), k=draw.randint(1, 9))) for _ in range(30)]
        gaps = [draw.choice([" ", " ", " ", "  ", "    ", "\n", "\n\n", "\t", ""]) for _ in words]
        found.append(document + " " + "".join(word + gap for word, gap in zip(words, gaps, strict=True)))
    return found


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Each family's tokenizer as its repository has it."""
    root = tmp_path_factory.mktemp("tokenizers")
    for family in FAMILIES:
        standins.SAVE_TOKENIZER[family](root / family, corpora.documents(200))
        (root / family / "config.json").write_text(json.dumps({"model_type": KINDS[family], "vocab_size": 500}))
    return root


@pytest.mark.parametrize("family", FAMILIES)
def test_ids_are_those_of_transformers(folders, family):
    own, theirs = open_tokenizer(str(folders / family)), transformers.AutoTokenizer.from_pretrained(folders / family)
    many = [*texts(), HARD]
    wanted = theirs(many, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    got = own.encode(many)
    assert len(many) > 1000
    assert sum(len(ids) for ids in wanted) > 100_000
    assert [ids.tolist() for ids in got] == wanted
    assert not set(own.special.values()) - {own.id_of("[UNK]")} & set(np.concatenate(got).tolist())
    assert own.size == len(theirs)


@pytest.mark.parametrize(
    ("family", "style", "roles"),
    [
        ("pythia", "gpt", ("<|endoftext|>", None, None, "<|padding|>")),
        ("llama", "gpt", ("</s>", None, None, None)),
        ("bert", "bert", ("[SEP]", "[CLS]", "[MASK]", "[PAD]")),
    ],
)
def test_roles_are_the_tokenizers_own(folders, family, style, roles):
    loaded = load(folders / family, style)
    assert tuple(None if i is None else loaded.own.token_of(i) for i in loaded.roles) == roles
    for name in ("tokenizer.json", "tokenizer.model", "vocab.txt"):
        if (folders / family / name).is_file():
            assert load(folders / family / name, style).roles == loaded.roles


def test_roles_by_settings(folders, caplog):
    own = existing(TokenizerConfig(model=str(folders / "llama"), style="gpt", separator="<s>", opener="<s>"))
    assert (own.separator, own.opener) == (1, 1)
    assert "separator: <s>, where the tokenizer's own files name </s>" in caplog.text
    with pytest.raises(UserError, match=r"corpus.tokenizer.mask: '<mask>' is no token of it.*<unk>, <s>, </s>"):
        existing(TokenizerConfig(model=str(folders / "llama"), style="gpt", mask="<mask>"))
    with pytest.raises(UserError, match=r"corpus.tokenizer.mask: its files name none, which style bert needs"):
        load(folders / "llama", "bert")
    roles, notes = choose_roles(own.own, "gpt", {})
    assert (roles.separator, notes) == (2, [])


# --------------------------------------------------------------------------------------------------------------- digests


@pytest.mark.parametrize("family", FAMILIES)
def test_the_digest_is_of_what_ids_mean(folders, family, tmp_path):
    """Not of how the file is written: transformers writes it anew, and differently."""
    own = open_tokenizer(str(folders / family))
    assert digests(folders / family) == (own.digest,)
    again = transformers.AutoTokenizer.from_pretrained(folders / family)
    again.save_pretrained(tmp_path)
    if family == "llama":  # another format, which is not proved to be the same
        assert digests(tmp_path) != (own.digest,)
        shutil.copy(folders / family / "tokenizer.model", tmp_path)
        assert own.digest in digests(tmp_path)
    else:
        assert digests(tmp_path) == (own.digest,)


def changed_tokenizer(folder, target, change):
    shutil.copytree(folder, target)
    tree = json.loads((target / "tokenizer.json").read_text())
    change(tree)
    (target / "tokenizer.json").write_text(json.dumps(tree))
    return digests(target)


def swap(tree):
    merges = tree["model"]["merges"]
    merges[10], merges[11] = merges[11], merges[10]


def old_spelling(tree):
    tree["model"]["merges"] = [merge if isinstance(merge, str) else " ".join(merge) for merge in tree["model"]["merges"]]
    del tree["model"]["byte_fallback"], tree["model"]["ignore_merges"]


@pytest.mark.parametrize(
    ("same", "change"),
    [
        (False, swap),
        (False, lambda tree: tree["model"]["merges"].pop()),
        (False, lambda tree: tree["normalizer"].update(type="NFD")),
        (False, lambda tree: tree["pre_tokenizer"].update(add_prefix_space=True)),
        (False, lambda tree: tree["added_tokens"][0].update(special=False)),
        (False, lambda tree: tree["added_tokens"][2].update(normalized=False)),
        (True, lambda tree: tree.update(truncation=None, padding=None)),
        (True, lambda tree: tree.update(post_processor=None)),
        (True, old_spelling),
    ],
)
def test_one_change_is_another_tokenizer(folders, tmp_path, same, change):
    found = changed_tokenizer(folders / "pythia", tmp_path / "other", change)
    assert (found == digests(folders / "pythia")) is same


def test_a_checkpoint_says_which_tokenizer_it_has(folders, tmp_path):
    for family in FAMILIES:
        shutil.copytree(folders / family, tmp_path / family)
        standins.save_model(tmp_path / family, family, 1)
        checkpoint = HuggingFaceTrajectory(str(tmp_path / family)).checkpoint(1)
        assert checkpoint.speaks(open_tokenizer(str(folders / family)).digest)
        assert not checkpoint.speaks("0" * 64)
    (tmp_path / "bert" / "vocab.txt").write_bytes(b"\xff\xfe")
    assert HuggingFaceTrajectory(str(tmp_path / "bert")).describe(1).vocabulary == ""


# --------------------------------------------------------------------------------------------------------------- corpora


def published_corpus(folder, model, style, *overrides):
    folder.mkdir(exist_ok=True)
    path = corpora.write_jsonl(folder / "text.jsonl", [*corpora.documents(), HARD])
    tokenizer = f"--corpus.tokenizer={{model: '{model}', style: {style}}}"
    config = corpora.settings(folder, path, style, tokenizer, *overrides)
    prepare(config, progress=False)
    return config


@pytest.mark.parametrize(("family", "style"), [("pythia", "gpt"), ("llama", "gpt"), ("bert", "bert")])
def test_a_corpus_with_a_published_tokenizer(folders, tmp_path, family, style):
    config = published_corpus(tmp_path, folders / family, style)
    output, own = config.corpus.output, open_tokenizer(str(folders / family))
    meta = read_meta(output)
    assert open_tokenizer(str(output)).digest == meta["tokenizer"]["digest"] == own.digest
    roles = token_roles(meta)
    blocks = [Blocks(output / f"{split}.arrow") for split in ("train", "heldout")]
    ids = np.concatenate([side.ids(np.arange(len(side))).reshape(-1) for side in blocks])
    separators = np.count_nonzero(ids == roles["separator"])
    documents = sum(meta[split]["documents"] for split in ("train", "heldout"))
    assert documents - 4 <= separators <= documents  # HARD writes them all, and they stay text
    task = build_task(config)
    assert task.vocabulary_digest == own.digest
    batch = task.batch(0, range(16))
    if style == "bert":
        assert np.count_nonzero(batch.ids.numpy() == roles["mask"]) > 0
        assert (batch.ids.numpy()[:, 0] == roles["opener"]).all()
    prepare(config, progress=False)  # prepared already


def test_padded_rows_are_never_drawn(folders, tmp_path):
    """A vocabulary as large as a padded model's: its further rows stand for nothing, in batches too."""
    plain = published_corpus(tmp_path / "a", folders / "bert", "bert")
    padded = published_corpus(tmp_path / "b", folders / "bert", "bert", "--corpus.tokenizer.vocab_size=4000")
    tasks = [build_task(config) for config in (plain, padded)]
    assert [task.vocab_size for task in tasks] == [320, 4000]
    assert tasks[0].vocabulary_digest == tasks[1].vocabulary_digest
    assert tasks[0].data_digest != tasks[1].data_digest
    for step in range(20):
        a, b = (task.batch(step, range(16)) for task in tasks)
        assert np.array_equal(a.ids, b.ids)


def test_a_smaller_model(folders, tmp_path):
    """Ids that the text never has may be cut off; others are named."""
    size = open_tokenizer(str(folders / "pythia")).size
    config = published_corpus(tmp_path / "a", folders / "pythia", "gpt", f"--corpus.tokenizer.vocab_size={size - 1}")
    assert build_task(config).vocab_size == size - 1
    with pytest.raises(UserError, match=rf"corpus.tokenizer.vocab_size: the text has '.*', id \d+, which 300 ids.*{size}"):
        published_corpus(tmp_path / "b", folders / "pythia", "gpt", "--corpus.tokenizer.vocab_size=300")


def test_another_tokenizer_in_its_place_is_found(folders, tmp_path):
    shutil.copytree(folders / "pythia", tmp_path / "tokenizer")
    config = published_corpus(tmp_path, tmp_path / "tokenizer", "gpt")
    changed_tokenizer(folders / "pythia", tmp_path / "other", swap)
    shutil.copy(tmp_path / "other" / "tokenizer.json", tmp_path / "tokenizer")
    with pytest.raises(UserError, match=r"corpus.tokenizer.model: .* is now tokenizer [0-9a-f]{12}, but"):
        prepare(config, progress=False)


def test_a_corpus_of_format_2_is_read(tmp_path):
    """As megapd wrote it before there were other tokenizers: the same task, under the same digests."""
    config = corpora.prepared(tmp_path, "bert")
    meta, path = read_meta(config.corpus.output), config.corpus.output / "meta.json"
    task = build_task(config)
    old = {key: meta["tokenizer"][key] for key in ("digest", "style", "vocab_size", "special")}
    del meta["config"]["tokenizer"]["separator"]
    path.write_text(sealed({**{k: v for k, v in meta.items() if k != "sha256"}, "format": 2, "tokenizer": old}))
    former = build_task(config)
    assert (former.data_digest, former.vocabulary_digest) == (task.data_digest, task.vocabulary_digest)
    assert content_digest(read_meta(config.corpus.output)) == content_digest(meta)
    assert former.batch(3, range(16)).digest == task.batch(3, range(16)).digest
    prepare(config, progress=False)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", "{}", "not a tokenizer.json that tokenizers reads"),
        ("tokenizer.json", "no json", "not a tokenizer.json that tokenizers reads"),
        ("vocab.txt", "a\na\n", "no vocabulary of WordPiece"),
        ("vocab.txt", "a\nb\n", r"needs a token a line, each once, and \[UNK\]"),
        ("tokenizer.model", "pieces", "not a sentencepiece model"),
        ("README.md", "nothing", r"holds no tokenizer \(tokenizer.json, tokenizer.model, vocab.txt\)"),
    ],
)
def test_what_is_no_tokenizer(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        open_tokenizer(str(tmp_path))
    assert "corpus.tokenizer.model" in str(caught.value)
    assert "\n" not in str(caught.value)


# --------------------------------------------------------------------------------------------------------------- out


@pytest.mark.parametrize("kind", ["unigram", "bpe", "char"])
@pytest.mark.parametrize("style", ["bert", "gpt"])
def test_a_trained_tokenizer_leaves_for_transformers(tmp_path, kind, style):
    section = TokenizerConfig(kind=kind, style=style, vocab_size=30 if kind == "char" else 420)
    own = train(section, corpora.documents(200))
    files = transformers_files(own.own, own.roles, style, 32)
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2" if style == "gpt" else "bert"}))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    many = texts(300)
    got = theirs(many, add_special_tokens=False)["input_ids"]
    assert got == [ids.tolist() for ids in own.encode(many)]
    if kind != "char":  # what is unknown is spelt in another way
        assert [theirs.decode(ids) for ids in got[:50]] == [own.decode(np.array(ids)) for ids in got[:50]]
    if style == "gpt" and kind != "char":
        assert [theirs.decode(ids) for ids in got[:50]] == many[:50]
    assert theirs.model_max_length == 32
    if style == "bert":
        assert theirs("ka lo").input_ids[0] == own.opener
        assert theirs("ka lo").input_ids[-1] == own.separator
        assert theirs.mask_token_id == own.roles.mask
        masked = theirs("ka [MASK] lo", add_special_tokens=False).input_ids
        assert masked == [*own.encode(["ka"])[0].tolist(), own.roles.mask, *own.encode(["lo"])[0].tolist()]
    else:
        assert theirs.eos_token_id == own.separator
    ids = special_ids(own.own, own.roles, style)
    assert ids["eos_token_id"] == own.separator
    assert (ids.get("cls_token_id"), ids.get("sep_token_id")) == (
        (own.opener, own.separator) if style == "bert" else (None, None)
    )
    assert own.digest in digests(tmp_path)


@pytest.mark.parametrize(("family", "style"), [("pythia", "gpt"), ("llama", "gpt"), ("bert", "bert")])
def test_a_published_tokenizer_leaves_as_it_came(folders, tmp_path, family, style):
    loaded = load(folders / family, style)
    files = transformers_files(loaded.own, loaded.roles, style, 32)
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    assert digests(folders / family)[0] in digests(tmp_path)
    (tmp_path / "config.json").write_text((folders / family / "config.json").read_text())
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    many = [text.strip() for text in texts(200)]
    assert theirs(many, add_special_tokens=False)["input_ids"] == [ids.tolist() for ids in loaded.encode(many)]
    assert same_ids(files, loaded.own, many) == 0


# --------------------------------------------------------------------------------------------------------------- gigatoken


class Faster:
    """gigatoken in small: ids of a plain encoder, wrong for one text."""

    def __init__(self, plain, wrong=None):
        self.plain, self.wrong, self.asked = plain, wrong, []

    def encode_batch_list(self, many):
        self.asked += many
        return [[0] if text == self.wrong else ids.tolist() for text, ids in zip(many, self.plain(many), strict=True)]


@pytest.mark.parametrize(("wrong", "used"), [(None, True), (SAMPLE[0], False), ("third", False), ("a <s> b", True)])
def test_gigatoken_is_used_where_its_ids_are_equal(folders, monkeypatch, wrong, used):
    own = open_tokenizer(str(folders / "llama"))
    faster = Faster(own._encode, wrong)
    monkeypatch.setitem(__import__("sys").modules, "gigatoken", type("module", (), {"Tokenizer": None}))
    encoder = Encoder("plain", own._encode, own.special, lambda _: faster)
    many = ["first", "second", "third", "a <s> b"]
    got = [ids.tolist() for ids in encoder.encode(many)]
    assert got == [ids.tolist() for ids in own._encode(many)]
    assert encoder.engine == ("gigatoken (plain)" if used else "plain")


def test_gigatoken_itself(folders):
    pytest.importorskip("gigatoken")
    for family in ("pythia", "llama"):
        own = open_tokenizer(str(folders / family))
        assert own.engine.startswith("gigatoken")
        many = [*texts(200), HARD]
        assert [ids.tolist() for ids in own.encode(many)] == [ids.tolist() for ids in own._encode(many)]
        assert own.engine.startswith("gigatoken")
