"""Tokenizers of transformers: tokenizer.json of any kind, and BERT's vocab.txt."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import numpy as np
import tokenizers
from numpy.typing import NDArray
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from megapd.errors import UserError
from megapd.tokenization.base import Tokenizer
from megapd.tokenization.gigatoken import Encoder

ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_BERT = {"unk_token": "[UNK]", "sep_token": "[SEP]", "pad_token": "[PAD]", "cls_token": "[CLS]", "mask_token": "[MASK]"}
_WORD_CHARS = 100  # BERT's: longer words are unknown


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer that the tokenizers library reads.

    Added tokens that are special, and those that have a role, are never made of text: `encode_special_tokens`, which
    transformers calls split_special_tokens. Padding, truncation and the tokens that a template would add are left out.
    """

    def __init__(self, data: bytes, where: str, named: Mapping[str, str], files: Mapping[str, bytes]) -> None:
        """data: the content of a tokenizer.json; named: the roles that files beside it give, over those that its special tokens
        tell by their names. Raises UserError that names `where` for anything else."""
        with _reading(where):
            self._tokenizer = tokenizers.Tokenizer.from_str(data.decode("utf-8"))
        own = self._tokenizer
        self.digest, self.files = canonical_digest(data, where), files
        table: dict[str, int] = own.get_vocab(with_added_tokens=True)
        self.size = max(table.values(), default=-1) + 1
        added = {token.content: token.special for token in own.get_added_tokens_decoder().values()}
        marked = {token for token, special in added.items() if special}
        named = {**_named_by_content(marked), **named}
        self.named = {role: token for role, token in named.items() if role in ROLES and token in table}
        if missing := sorted((added.keys() - marked).intersection(self.named.values())):
            own.add_special_tokens(missing)
        own.no_padding()
        own.no_truncation()
        own.encode_special_tokens = True
        self.special = {token: table[token] for token in sorted({*marked, *self.named.values()}, key=lambda t: (table[t], t))}
        kind = f"tokenizers, {type(own.model).__name__}"
        self._encoder = Encoder(kind, self._encode, self.special, lambda gigatoken: gigatoken(own))

    @property
    def engine(self) -> str:
        return self._encoder.engine

    def id_of(self, token: str) -> int | None:
        number: int | None = self._tokenizer.token_to_id(token)
        return number

    def token_of(self, number: int) -> str:
        return str(self._tokenizer.id_to_token(int(number)))

    def encode(self, texts: list[str], threads: int = 1) -> list[NDArray[np.int32]]:
        """threads: not heeded, the library takes the cores that it may run on."""
        return self._encoder.encode(texts)

    def decode(self, ids: NDArray[np.int64]) -> str:
        return str(self._tokenizer.decode(ids.tolist(), skip_special_tokens=True))

    def _encode(self, texts: list[str]) -> list[NDArray[np.int32]]:
        encoded = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(one.ids, dtype=np.int32) for one in encoded]


def wordpiece_json(vocabulary: bytes, config: Mapping[str, Any], where: str) -> bytes:
    """The tokenizer.json of BERT's WordPiece over a vocab.txt (Devlin et al. 2018), which has a token a line.

    config: of tokenizer_config.json: do_lower_case (default true), strip_accents, tokenize_chinese_chars, and special tokens.
    """
    try:
        tokens = vocabulary.decode("utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8; a vocab.txt has a token a line") from error
    while tokens and not tokens[-1]:
        tokens.pop()
    named = {**_BERT, **named_in(config)}
    table = {token: number for number, token in enumerate(tokens)}
    if len(table) != len(tokens) or named["unk_token"] not in table:
        raise UserError(f"{where}: no vocabulary of WordPiece: it needs a token a line, each once, and {named['unk_token']}")
    lower = config.get("do_lower_case", True)
    own = tokenizers.Tokenizer(models.WordPiece(table, unk_token=named["unk_token"], max_input_chars_per_word=_WORD_CHARS))
    own.normalizer = normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=config.get("tokenize_chinese_chars", True),
        strip_accents=config.get("strip_accents"),
        lowercase=lower,
    )
    own.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    own.decoder = decoders.WordPiece(prefix="##")
    own.add_special_tokens([token for token in named.values() if token in table])
    ends = [(named[role], table[named[role]]) for role in ("cls_token", "sep_token") if named[role] in table]
    if len(ends) == 2:
        own.post_processor = bert_template(ends)
    return bytes(own.to_str().encode())


def bert_template(ends: list[tuple[str, int]]) -> Any:
    """[CLS] text [SEP], and of two texts [CLS] a [SEP] b [SEP], as a post-processor; ends: both tokens with their ids."""
    (opener, _), (separator, _) = ends
    return processors.TemplateProcessing(f"{opener} $A {separator}", f"{opener} $A {separator} $B:1 {separator}:1", ends)


def named_in(*trees: Mapping[str, Any]) -> dict[str, str]:
    """The roles that tokenizer_config.json or special_tokens_map.json name, of several the last."""
    found: dict[str, str] = {}
    for tree in trees:
        for role in ROLES:
            token = tree.get(role)
            content = token.get("content") if isinstance(token, Mapping) else token
            if isinstance(content, str):
                found[role] = content
    return found


def _named_by_content(contents: Collection[str]) -> dict[str, str]:
    """The roles that special tokens tell alone: those of BERT, or by names of which there is one."""
    found = {role: token for role, token in _BERT.items() if token in contents}
    names: dict[str, tuple[str, ...]] = {
        "eos_token": ("</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>"),
        "bos_token": ("<s>", "<|begin_of_text|>", "<bos>"),
        "pad_token": ("<pad>", "<|padding|>", "<|pad|>"),
        "mask_token": ("<mask>",),
        "unk_token": ("<unk>",),
    }
    for role, known in names.items():
        present = [token for token in known if token in contents]
        if len(present) == 1:
            found.setdefault(role, present[0])
    return found


def canonical_digest(data: bytes, where: str) -> str:
    """Hexadecimal sha256 of what a tokenizer.json makes of text: table of ids, merges or scores, normaliser, pre-tokenizer,
    special tokens; not of how the file is written, of templates, padding, truncation and decoder, which change no id of a text.

    The library reads the file first, so that its older spellings (merges as strings) are today's; what is false, empty or null
    is left out, for versions of the library differ in which defaults they write.
    """
    with _reading(where):
        return _canonical_digest(data)


@lru_cache(maxsize=4)  # a trajectory has the same tokenizer at each of its steps
def _canonical_digest(data: bytes) -> str:
    tree = json.loads(tokenizers.Tokenizer.from_str(data.decode("utf-8")).to_str())
    kept = {name: tree.get(name) for name in ("normalizer", "pre_tokenizer", "model")}
    kept["added_tokens"] = sorted(tree.get("added_tokens") or (), key=lambda token: int(token["id"]))
    compact = json.dumps(_bare(kept), sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(compact.encode()).hexdigest()


def _bare(tree: Any) -> Any:
    """Without keys whose value says nothing. A table of tokens keeps id 0; a list its places."""
    if isinstance(tree, dict):
        found = {key: _bare(value) for key, value in tree.items()}
        return {key: value for key, value in found.items() if not (value is None or value is False or value in ("", [], {}))}
    return [_bare(value) for value in tree] if isinstance(tree, list) else tree


@contextmanager
def _reading(where: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # the library raises Exception itself
        raise UserError(f"{where}: not a tokenizer.json that tokenizers reads: {' '.join(str(error).split())[:200]}") from error
