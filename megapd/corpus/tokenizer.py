"""Tokenizers: sentencepiece models with the special tokens of BERT or GPT."""

from __future__ import annotations

import hashlib
import io
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

SPECIAL = {"bert": ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"), "gpt": ("<unk>", "<|endoftext|>")}
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


class SentencePieceTokenizer:
    """A sentencepiece model, told apart by its content.

    vocab_size   pieces, special ones included
    special      id of each special token of the style
    digest       hexadecimal sha256 of the model file
    """

    def __init__(self, model: bytes, style: str, where: str) -> None:
        """where: names the model in errors. Raises UserError if it is no sentencepiece model or lacks a special token."""
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise UserError(f"{where}: not a sentencepiece model") from error
        self.model, self.style = model, style
        self.digest = hashlib.sha256(model).hexdigest()
        self.vocab_size: int = self._processor.get_piece_size()
        self.special: dict[str, int] = {}
        for piece in SPECIAL[style]:
            number = self._processor.piece_to_id(piece)
            if self._processor.id_to_piece(number) != piece:
                raise UserError(f"{where}: has no token {piece}, which corpus.tokenizer.style {style} needs")
            self.special[piece] = number

    @property
    def separator(self) -> int:
        """The id that ends every document."""
        return self.special["[SEP]" if self.style == "bert" else "<|endoftext|>"]

    @property
    def opener(self) -> int | None:
        """The id that opens every block, if the style has one."""
        return self.special.get("[CLS]")

    def encode(self, texts: list[str], threads: int = 1) -> list[NDArray[np.int32]]:
        """Ids of each text, special tokens not added; special tokens written in a text come out as plain text."""
        if hasattr(self._processor, "EncodeAsNumpy"):  # sentencepiece >= 0.2.2; a fifth faster than lists
            encoded: list[NDArray[np.int32]] = self._processor.EncodeAsNumpy(texts, num_threads=threads)
            return encoded
        return [np.array(ids, dtype=np.int32) for ids in self._processor.encode(texts, num_threads=threads)]

    def decode(self, ids: NDArray[np.int64]) -> str:
        return str(self._processor.decode(ids.tolist()))


def load(path: Path, style: str) -> SentencePieceTokenizer:
    """An existing model. Raises UserError if it cannot be read or lacks the style's special tokens."""
    try:
        model = path.read_bytes()
    except OSError as error:
        raise UserError(f"corpus.tokenizer.model: cannot read {path}: {error.strerror}") from error
    return SentencePieceTokenizer(model, style, f"corpus.tokenizer.model: {path}")


def train(tokenizer: settings.TokenizerConfig, documents: Iterable[str]) -> SentencePieceTokenizer:
    """Train on the first training_sentences lines of `documents`, held in memory; the same lines give the same bytes.

    Text outside the vocabulary falls back to bytes. Raises UserError if the text is empty or does not fit the vocab_size.
    """
    output = io.BytesIO()
    failures: list[Exception] = []
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=islice(sentences(_kept(documents, failures)), tokenizer.training_sentences),
            model_writer=output,
            model_type=tokenizer.kind,
            vocab_size=tokenizer.vocab_size,
            byte_fallback=True,
            num_threads=TRAINING_THREADS,
            minloglevel=2,
            **_STYLE[tokenizer.style],
        )
    except (RuntimeError, SystemError) as error:
        if failures:
            raise failures[0] from None
        if isinstance(error, SystemError):
            raise
        raise _explain(error, tokenizer.vocab_size) from error
    if failures:  # it takes an iterator that fails for one that has ended
        raise failures[0]
    return SentencePieceTokenizer(output.getvalue(), tokenizer.style, "corpus.tokenizer")


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
        return UserError(
            f"{setting}: the text's characters, 256 bytes and special tokens need {low[1]} or more, not {vocab_size}"
        )
    if "!sentences_.empty()" in message:
        return UserError("corpus.sources: empty: no text to train a tokenizer on")
    return error
