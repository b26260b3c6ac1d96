"""Sentencepiece models: megapd's own, Llama's or T5's tokenizer.model."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np
import sentencepiece
from numpy.typing import NDArray

from megapd.errors import UserError
from megapd.tokenization.base import MODEL, Tokenizer
from megapd.tokenization.gigatoken import Encoder


class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece model, told apart by its content: the file holds pieces, scores, normaliser and special pieces.

    Control and unknown pieces are special: sentencepiece itself makes none of them of text.
    """

    def __init__(self, model: bytes, where: str, named: Mapping[str, str] | None = None) -> None:
        """where: names the model in errors; named: what files beside it add to its roles. UserError if it is no such model."""
        try:
            self.processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise UserError(f"{where}: not a sentencepiece model") from error
        self.model, self.files = model, {MODEL: model}
        self.digest = hashlib.sha256(model).hexdigest()
        processor = self.processor
        self.size = int(processor.get_piece_size())
        ids = [i for i in range(self.size) if processor.is_control(i) or processor.is_unknown(i)]
        self.special = {processor.id_to_piece(i): i for i in ids}
        roles = {role: getattr(processor, f"{role}_id")() for role in ("bos", "eos", "pad", "unk")}
        own = {f"{role}_token": processor.id_to_piece(i) for role, i in roles.items() if i >= 0}
        # Which of its control pieces is what, sentencepiece says of four roles only: BERT's others go by their names.
        by_name = {"cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
        own |= {role: piece for role, piece in by_name.items() if piece in self.special}
        self.named = {**own, **{role: token for role, token in (named or {}).items() if self.id_of(token) is not None}}

        self._threads = 1
        self._encoder = Encoder(
            "sentencepiece", self._encode, self.special, lambda gigatoken: gigatoken.from_sentencepiece(model)
        )

    @property
    def engine(self) -> str:
        return self._encoder.engine

    def id_of(self, token: str) -> int | None:
        number = int(self.processor.piece_to_id(token))
        return number if self.processor.id_to_piece(number) == token else None

    def token_of(self, number: int) -> str:
        return str(self.processor.id_to_piece(int(number)))

    def encode(self, texts: list[str], threads: int = 1) -> list[NDArray[np.int32]]:
        self._threads = threads
        return self._encoder.encode(texts)

    def _encode(self, texts: list[str]) -> list[NDArray[np.int32]]:
        if hasattr(self.processor, "EncodeAsNumpy"):  # sentencepiece >= 0.2.2; a fifth faster than lists
            encoded: list[NDArray[np.int32]] = self.processor.EncodeAsNumpy(texts, num_threads=self._threads)
            return encoded
        return [np.array(ids, dtype=np.int32) for ids in self.processor.encode(texts, num_threads=self._threads)]

    def decode(self, ids: NDArray[np.int64]) -> str:
        return str(self.processor.decode(ids.tolist()))
