"""Tokenizers: special tokens in their places, lossless where promised, the same bytes each time, clear refusals."""

from __future__ import annotations

import random

import pytest
from pydantic import ValidationError

from megapd.config import TokenizerConfig
from megapd.corpus import tokenizer as tokenizers
from megapd.errors import UserError
from tests.corpus import corpora

HARD = "a [MASK] [CLS] <unk> <|endoftext|>\n\n  indented\tline \n 漢字 é 😀 1234"


@pytest.fixture(scope="module")
def models():
    texts = corpora.documents()
    return {
        (kind, style): tokenizers.train(TokenizerConfig(kind=kind, style=style, vocab_size=330), texts)
        for kind in ("unigram", "bpe")
        for style in ("bert", "gpt")
    }


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_special_tokens(models, kind):
    assert models[kind, "bert"].special == {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4}
    assert models[kind, "gpt"].special == {"<unk>": 0, "<|endoftext|>": 1}
    assert (models[kind, "bert"].opener, models[kind, "bert"].separator) == (2, 3)
    assert (models[kind, "gpt"].opener, models[kind, "gpt"].separator) == (None, 1)
    for style in ("bert", "gpt"):
        model = models[kind, style]
        assert model.vocab_size == 330
        ids = model.encode([HARD])[0]
        assert not set(ids.tolist()) & set(model.special.values())  # bytes for the unknown, plain text for what looks special
        assert model.decode(ids) == (HARD if style == "gpt" else " ".join(HARD.split()))


def test_encoding_is_independent_of_threads_and_of_the_way(models, monkeypatch):
    model = models["unigram", "bert"]
    texts = [*corpora.documents(), ""]
    one = [ids.tolist() for ids in model.encode(texts)]
    assert [ids.tolist() for ids in model.encode(texts, threads=4)] == one
    assert one == model.own.processor.encode(texts)
    monkeypatch.delattr(type(model.own.processor), "EncodeAsNumpy", raising=False)
    assert [ids.tolist() for ids in model.encode(texts)] == one


def test_training_is_deterministic(models):
    again = tokenizers.train(TokenizerConfig(style="bert", vocab_size=330), corpora.documents())
    assert again.digest == models["unigram", "bert"].digest


def test_training_reads_no_more_than_its_share():
    def endless():
        while True:
            yield from corpora.documents()

    tokenizer = tokenizers.train(TokenizerConfig(vocab_size=330, training_sentences=200), endless())
    assert tokenizer.vocab_size == 330


def test_sentences_keep_every_word():
    long = " ".join(f"word{i}" for i in range(1000))
    glued = "x" * 2500
    texts = [f"a b\n\n  \n{long}\n{glued} end\nc"]
    cut = list(tokenizers.sentences(texts))
    assert all(len(sentence) <= tokenizers.SENTENCE_CHARS + 1 for sentence in cut)
    assert "".join("".join(cut).split()) == "".join(texts[0].split())
    assert " ".join(cut[1:-4]).split()[:1000] == long.split()


@pytest.mark.parametrize(
    ("texts", "vocab_size", "words"),
    [
        (["ab"], 5000, ["corpus.tokenizer.vocab_size", "5000", "at most"]),
        (corpora.documents(), 100, ["corpus.tokenizer.vocab_size", "100", "or more"]),
        ([], 300, ["corpus.sources", "empty"]),
    ],
)
@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_text_that_does_not_fit(kind, texts, vocab_size, words):
    with pytest.raises(UserError) as caught:
        tokenizers.train(TokenizerConfig(kind=kind, vocab_size=vocab_size), texts)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_existing_models(models, tmp_path):
    path = tmp_path / "m.model"
    path.write_bytes(models["bpe", "gpt"].own.model)
    assert tokenizers.load(path, "gpt").digest == models["bpe", "gpt"].digest
    with pytest.raises(
        UserError, match=r"corpus.tokenizer.opener: its files name none, which style bert needs.*<unk>, <\|endoftext\|>"
    ):
        tokenizers.load(path, "bert")
    with pytest.raises(UserError, match=r"corpus.tokenizer.model: .*none.model: cannot be read"):
        tokenizers.load(tmp_path / "none.model", "bert")
    path.write_bytes(b"not a model")
    with pytest.raises(UserError, match="not a sentencepiece model"):
        tokenizers.load(path, "bert")


@pytest.mark.parametrize("after", [1, 40])
def test_what_the_documents_raise_comes_out_as_it_is(after):
    def broken():
        yield from corpora.documents(after)
        raise UserError("b.parquet: not a readable parquet file")

    with pytest.raises(UserError, match=r"b\.parquet"):
        tokenizers.train(TokenizerConfig(vocab_size=320), broken())


def test_more_kinds_of_characters_than_pieces(tmp_path):
    """As Chinese has them: the message names what may be lowered, and with it the rare ones are bytes."""
    draw = random.Random(0)
    kinds = [chr(0x4E00 + i) for i in range(600)]
    texts = ["".join(draw.choices(kinds, [1 / (i + 1) for i in range(600)], k=300)) for _ in range(60)]
    with pytest.raises(UserError, match=r"corpus.tokenizer.vocab_size: .*lower corpus.tokenizer.character_coverage"):
        tokenizers.train(TokenizerConfig(style="gpt", vocab_size=780), texts)
    trained = tokenizers.train(TokenizerConfig(style="gpt", vocab_size=780, character_coverage=0.98), texts)
    assert [trained.decode(ids) for ids in trained.encode(texts)] == texts


def test_characters():
    """The most frequent ones; others are unknown, and no byte stands for them."""
    texts = ["aaaa bbb cc d"] * 50
    own = tokenizers.train(TokenizerConfig(kind="char", vocab_size=16, normalization="nfkc_cf"), [*texts, *"efghijklmnop"])
    pieces = [own.own.token_of(i) for i in range(own.vocab_size)]
    assert (own.vocab_size, pieces[:9]) == (16, ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "▁", "a", "b", "c"])
    assert [pieces[i] for i in own.encode(["Ab c☃d"])[0]] == ["▁", "a", "b", "▁", "c", "[UNK]", "d"]


def test_trainer_options_reach_the_trainer():
    texts = ["Straße 2024 <tool> ABBA " + text for text in corpora.documents(80)]

    def pieces(**options):
        own = tokenizers.train(TokenizerConfig(**{"style": "gpt", "vocab_size": 340, **options}), texts)
        return own, {own.own.token_of(i) for i in range(own.vocab_size)}

    plain, _ = pieces()
    assert plain.digest == pieces(character_coverage=None)[0].digest
    folded, _ = pieces(normalization="nfkc_cf")
    assert folded.decode(folded.encode(["ABBA ﬁne"])[0]) == "abba fine"
    assert "<tool>" in pieces(symbols=("<tool>",))[1]
    short = pieces(max_piece_length=3, vocab_size=310)[1]
    assert max(len(piece) for piece in short if not piece.startswith("<")) == 3
    numbers = [" ".join(str(1000 + i % 7) for i in range(200))] * 20 + texts
    for split in (True, False):
        own = tokenizers.train(TokenizerConfig(kind="bpe", style="gpt", vocab_size=340, split_digits=split), numbers)
        assert any(own.own.token_of(i).strip("▁")[:2].isdigit() for i in range(340) if own.own.token_of(i)[1:2]) is not split


def test_an_option_that_would_do_nothing_is_refused():
    with pytest.raises(ValidationError, match=r"m.model is trained already"):
        TokenizerConfig(model="m.model", character_coverage=0.99)
