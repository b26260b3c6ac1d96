"""What a tokenizer is here: text to ids and back, the names its own files give to tokens, and a digest of what ids mean."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

# Files of tokenizers, as transformers names them.
JSON, MODEL, VOCAB = "tokenizer.json", "tokenizer.model", "vocab.txt"
CONFIG, SPECIAL_MAP = "tokenizer_config.json", "special_tokens_map.json"


class Tokenizer(ABC):
    """An existing tokenizer, whatever its format.

    size     ids are below it: the largest id + 1
    special  id of each special token: what no text is encoded to
    named    the roles that its own files give, in transformers' words: {"eos_token": "</s>", "mask_token": "[MASK]"}
    digest   hexadecimal sha256 of what an id stands for and how text is cut, see `folder.digests`
    files    what the tokenizer was read from, by file name, to be written elsewhere as it is
    engine   what encodes, as for a person
    """

    size: int
    special: Mapping[str, int]
    named: Mapping[str, str]
    digest: str
    files: Mapping[str, bytes]

    @property
    @abstractmethod
    def engine(self) -> str:
        """See above."""

    @abstractmethod
    def id_of(self, token: str) -> int | None:
        """The id of a token in the table; None: it has none."""

    @abstractmethod
    def token_of(self, number: int) -> str:
        """The token of an id below `size`."""

    @abstractmethod
    def encode(self, texts: list[str], threads: int = 1) -> list[NDArray[np.int32]]:
        """Ids of each text, special tokens not added; special tokens written in a text come out as plain text."""

    @abstractmethod
    def decode(self, ids: NDArray[np.int64]) -> str:
        """The text of ids, special tokens left out."""
