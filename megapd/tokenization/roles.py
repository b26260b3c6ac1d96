"""Which tokens separate documents, open blocks, mask and pad: by the settings, or as the tokenizer's own files name them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from megapd.errors import UserError
from megapd.tokenization.base import Tokenizer

# In this order of transformers' names. GPT's packed documents end with the end of text; BERT's with [SEP], after a [CLS].
_SOURCES: dict[str, dict[str, tuple[str, ...]]] = {
    "bert": {
        "separator": ("sep_token", "eos_token"),
        "opener": ("cls_token", "bos_token"),
        "mask": ("mask_token",),
        "padding": ("pad_token",),
    },
    "gpt": {"separator": ("eos_token", "sep_token"), "opener": (), "mask": ("mask_token",), "padding": ("pad_token",)},
}
_NEEDED = {"bert": ("separator", "opener", "mask"), "gpt": ("separator",)}


class Roles(NamedTuple):
    """Ids: of what ends every document, opens every block, stands for a masked token, fills a row; None: there is none."""

    separator: int
    opener: int | None
    mask: int | None
    padding: int | None


def choose_roles(tokenizer: Tokenizer, style: str, settings: Mapping[str, str | None]) -> tuple[Roles, list[str]]:
    """The roles in a corpus of that style, and a line for each that is not what the tokenizer's own files say.

    settings: role -> token, as corpus.tokenizer names them; None: the tokenizer's own. Raises UserError where a token is not in
    the table, or a role that the style needs has none.
    """
    chosen: dict[str, int | None] = {}
    notes = []
    for role, sources in _SOURCES[style].items():
        wanted = settings.get(role)
        own = next((tokenizer.named[name] for name in sources if name in tokenizer.named), None)
        token = own if wanted is None else wanted
        number = None if token is None else tokenizer.id_of(token)
        if number is None and (token is not None or role in _NEEDED[style]):
            what = f"{token!r} is no token of it" if token is not None else f"its files name none, which style {style} needs"
            there = ", ".join(tokenizer.special) or "no special tokens"
            raise UserError(
                f"corpus.tokenizer.{role}: {what}; name one of its own (it has {there}), or another corpus.tokenizer.style"
            )
        if wanted is not None and own is not None and own != wanted:
            notes.append(
                f"corpus.tokenizer.{role}: {wanted}, where the tokenizer's own files name {own}: its teacher saw that one"
            )
        chosen[role] = number
    separator = chosen["separator"]
    assert separator is not None
    return Roles(separator, chosen["opener"], chosen["mask"], chosen["padding"]), notes
