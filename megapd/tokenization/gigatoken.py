"""gigatoken, where it is installed and gives the ids that tokenizers gives: BPE at many times the speed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

log = logging.getLogger(__name__)

COMPARED_TEXTS = 64  # of a corpus, before gigatoken encodes the rest of it
Encode = Callable[[list[str]], list[NDArray[np.int32]]]

# Scripts, digits, blanks, line ends, controls, emoji, broken characters, contractions, code: where cutters differ.
SAMPLE = (
    "The quick brown fox doesn't jump over 12345.678 lazy dogs; they'll see.",
    "  two  blanks\n\n\ttabs\r\nlines \n end  ",
    "Ünïcödé straße ﬁne Å Å ½ ① １２",  # noqa: RUF001 - other forms of the same letters
    "漢字かな交じり文。한국어 텍스트 ไทย العربية עברית हिन्दी",
    "😀👩‍👩‍👧‍👦 🇩🇪 \u200b\u200d\ufeff\x00\x07\x1b �",
    "def f(x):\n    return x**2 + 1e-5  # comment\n",
    "<s> </s> <0x41> ▁▁ ## [UNK",
    "",
    " ",
    "a" * 300,
)


class Encoder:
    """Encodes with gigatoken, or without it where it is not installed, does not read the tokenizer, or gives other ids: for
    SAMPLE when it is made, or for the first texts that come.

    A text in which a special token is written always goes to the plain encoder, which takes it for text.
    engine: what encodes, as for a person.
    """

    def __init__(self, name: str, plain: Encode, special: Iterable[str], of: Callable[[Any], Any]) -> None:
        """name: of the plain encoder; of: gigatoken's tokenizer, made from its class."""
        self.engine, self._name = name, name
        self._plain, self._special, self._fast, self._compared = plain, tuple(special), None, False
        try:
            import gigatoken
        except ImportError:
            return
        try:
            self._fast = of(gigatoken.Tokenizer)
            if not self._agrees(SAMPLE):
                self._drop("it cuts a sample of text otherwise")
            else:
                self.engine = f"gigatoken ({name})"
        except Exception as error:  # of its own: it reads BPE alone
            self._drop(" ".join(str(error).split())[:100])

    def encode(self, texts: list[str]) -> list[NDArray[np.int32]]:
        """Ids of each text."""
        if self._fast is not None and texts and not self._compared:
            self._compared = True
            if not self._agrees(texts[:COMPARED_TEXTS]):
                self._drop("its ids of the first texts are others")
        return self._plain(texts) if self._fast is None else self._encode(texts)

    def _encode(self, texts: Sequence[str]) -> list[NDArray[np.int32]]:
        assert self._fast is not None
        found = [np.array(ids, dtype=np.int32) for ids in self._fast.encode_batch_list(list(texts))]
        written = [place for place, text in enumerate(texts) if any(token in text for token in self._special)]
        for place, ids in zip(written, self._plain([texts[place] for place in written]), strict=True):
            found[place] = ids
        return found

    def _agrees(self, texts: Sequence[str]) -> bool:
        return all(np.array_equal(a, b) for a, b in zip(self._encode(texts), self._plain(list(texts)), strict=True))

    def _drop(self, why: str) -> None:
        self._fast, self.engine = None, self._name
        log.info("gigatoken is not used, %s is: %s", self._name, why)
