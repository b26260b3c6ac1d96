"""The tokenizer of a corpus: an existing one, or a sentencepiece model trained with the special tokens of BERT or GPT."""

from __future__ import annotations

import hashlib
import io
import logging
import re
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
from numpy.typing import NDArray

from megapd import config as settings
from megapd.errors import UserError
from megapd.tokenization import Roles, Tokenizer, choose_roles, open_tokenizer
from megapd.tokenization.sentence_piece import SentencePieceTokenizer

log = logging.getLogger(__name__)

SENTENCE_CHARS = 1000  # sentencepiece leaves out lines of more than 4192 bytes; 1000 characters have at most 4000
# sentencepiece adds up expected counts by thread, so the model depends on their number: a constant, never the machine's.
TRAINING_THREADS = 8

_SENTENCE = re.compile(rf".{{1,{SENTENCE_CHARS}}}(?:\s|$)|\S{{{SENTENCE_CHARS}}}")

_STYLE: dict[str, dict[str, Any]] = {
    # Runs of blanks and line ends become one space, compatibility forms are unified (NFKC): such a model reads, it never writes.
    "bert": {
        "pad_id": 0,
        "unk_id": 1,
        "bos_id": 2,
        "eos_id": 3,
        "pad_piece": "[PAD]",
        "unk_piece": "[UNK]",
        "bos_piece": "[CLS]",
        "eos_piece": "[SEP]",
        "control_symbols": ["[MASK]"],
        "normalization_rule_name": "nmt_nfkc",
    },
    # Lossless: decoding gives the text back, line ends and runs of blanks too.
    "gpt": {
        "unk_id": 0,
        "eos_id": 1,
        "pad_id": -1,
        "bos_id": -1,
        "unk_piece": "<unk>",
        "eos_piece": "<|endoftext|>",
        "user_defined_symbols": ["\n"],
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True,
        "split_digits": True,
    },
}


class CorpusTokenizer:
    """A tokenizer in its use: what its tokens do in a corpus of a style.

    own         the tokenizer itself
    roles       ids of the tokens that separate, open, mask and pad
    vocab_size  ids are below it: the tokenizer's own size, or what corpus.tokenizer.vocab_size pads or cuts it to
    """

    def __init__(self, own: Tokenizer, section: settings.TokenizerConfig) -> None:
        """Raises UserError where it lacks a token that the style needs, or vocab_size leaves one of those out."""
        self.own, self.style = own, section.style
        self.roles, notes = choose_roles(own, section.style, {role: getattr(section, role) for role in Roles._fields})
        for note in notes:
            log.warning(note)
        self.vocab_size = own.size if section.model is None or section.vocab_size is None else section.vocab_size
        for role, number in self.roles._asdict().items():
            if number is not None and number >= self.vocab_size:
                what = f"{self.vocab_size} leave out {own.token_of(number)} (id {number}), its {role}"
                raise UserError(f"corpus.tokenizer.vocab_size: {what}; raise it, or name another corpus.tokenizer.{role}")

    @property
    def digest(self) -> str:
        return self.own.digest

    @property
    def special(self) -> dict[str, int]:
        """Special tokens and those with a role, below vocab_size."""
        found = dict(self.own.special) | {self.own.token_of(i): i for i in self.roles if i is not None}
        return {token: number for token, number in found.items() if number < self.vocab_size}

    @property
    def separator(self) -> int:
        """The id that ends every document."""
        return self.roles.separator

    @property
    def opener(self) -> int | None:
        """The id that opens every block, if the style has one."""
        return self.roles.opener

    def encode(self, texts: list[str], threads: int = 1) -> list[NDArray[np.int32]]:
        """See Tokenizer. Raises UserError for an id that vocab_size leaves out."""
        encoded = self.own.encode(texts, threads)
        if self.vocab_size < self.own.size:
            for ids in encoded:
                if len(ids) and (largest := int(ids.max())) >= self.vocab_size:
                    what = f"the text has {self.own.token_of(largest)!r}, id {largest}, which {self.vocab_size} ids leave out"
                    raise UserError(f"corpus.tokenizer.vocab_size: {what}; raise it to {self.own.size}, or choose other text")
        return encoded

    def decode(self, ids: NDArray[np.int64]) -> str:
        return self.own.decode(ids)

    def described(self) -> dict[str, Any]:
        """What a corpus' meta.json says of it; see megapd.tasks.blocks."""
        return {
            "digest": self.digest,
            "style": self.style,
            "vocab_size": self.vocab_size,
            "tokens": min(self.own.size, self.vocab_size),
            "special": self.special,
            "roles": self.roles._asdict(),
            "files": {name: hashlib.sha256(data).hexdigest() for name, data in sorted(self.own.files.items())},
            "engine": self.own.engine,
        }


def load(model: str | Path, style: str) -> CorpusTokenizer:
    """An existing tokenizer in a style, its roles as it names them. See `open_tokenizer` and CorpusTokenizer."""
    return existing(settings.TokenizerConfig(model=str(model), style=style))


def existing(section: settings.TokenizerConfig) -> CorpusTokenizer:
    """The one that corpus.tokenizer.model names."""
    assert section.model is not None
    return CorpusTokenizer(open_tokenizer(section.model), section)


def train(tokenizer: settings.TokenizerConfig, documents: Iterable[str]) -> CorpusTokenizer:
    """Train on the first training_sentences lines of `documents`, held in memory; the same lines give the same bytes.

    Text outside the vocabulary falls back to bytes; of characters it is unknown. Raises UserError if the text is empty or does
    not fit the vocab_size.
    """
    output = io.BytesIO()
    failures: list[Exception] = []
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=islice(sentences(_kept(documents, failures)), tokenizer.training_sentences),
            model_writer=output,
            model_type=tokenizer.kind,
            vocab_size=tokenizer.trained_size,
            byte_fallback=tokenizer.kind != "char",
            num_threads=TRAINING_THREADS,
            minloglevel=2,
            **_options(tokenizer),
        )
    except (RuntimeError, SystemError) as error:
        if failures:
            raise failures[0] from None
        if isinstance(error, SystemError):
            raise
        raise _explain(error, tokenizer.trained_size) from error
    if failures:  # it takes an iterator that fails for one that has ended
        raise failures[0]
    return CorpusTokenizer(SentencePieceTokenizer(output.getvalue(), "corpus.tokenizer"), tokenizer)


def _options(tokenizer: settings.TokenizerConfig) -> dict[str, Any]:
    """Sentencepiece's options, in its words: the style's, and over them what is set. What is not set is not passed on, for the
    model's file, whose sha256 is its digest, keeps what was."""
    options = dict(_STYLE[tokenizer.style])
    theirs = {
        "character_coverage": tokenizer.character_coverage,
        "normalization_rule_name": tokenizer.normalization,
        "split_digits": tokenizer.split_digits,
        "max_sentencepiece_length": tokenizer.max_piece_length,
    }
    options |= {name: value for name, value in theirs.items() if value is not None}
    if tokenizer.symbols:
        options["user_defined_symbols"] = [*options.get("user_defined_symbols", ()), *tokenizer.symbols]
    return options


def _kept(documents: Iterable[str], failures: list[Exception]) -> Iterator[str]:
    """Documents, and what their iterator raises kept for `train`: sentencepiece hands on an error of its own in its place."""
    try:
        yield from documents
    except Exception as error:
        failures.append(error)
        raise


def sentences(documents: Iterable[str]) -> Iterator[str]:
    """Lines of the documents, those above SENTENCE_CHARS characters cut at blanks."""
    for document in documents:
        for line in document.split("\n"):
            if len(line) > SENTENCE_CHARS:
                yield from _SENTENCE.findall(line)
            elif line and not line.isspace():
                yield line


def _explain(error: RuntimeError, vocab_size: int) -> Exception:
    """sentencepiece's complaints about the vocabulary as UserErrors; anything else unchanged."""
    message = str(error)
    setting = "corpus.tokenizer.vocab_size"
    if high := re.search(r"too high \(\d+\)\. Please set it to a value <= (\d+)", message):
        return UserError(f"{setting}: the text supports at most {high[1]} pieces, not {vocab_size}; lower it, or add text")
    if low := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        needed = f"the text's characters, 256 bytes and special tokens need {low[1]} or more, not {vocab_size}"
        return UserError(f"{setting}: {needed}; raise it, or lower corpus.tokenizer.character_coverage: rare ones become bytes")
    if "!sentences_.empty()" in message:
        return UserError("corpus.sources: empty: no text to train a tokenizer on")
    return error
