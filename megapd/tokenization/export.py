"""A corpus' tokenizer as the files that transformers' AutoTokenizer reads."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from megapd.tokenization.base import Tokenizer
from megapd.tokenization.folder import CONFIG, JSON, VOCAB, tree_of
from megapd.tokenization.gigatoken import SAMPLE
from megapd.tokenization.hugging_face import HuggingFaceTokenizer, wordpiece_json
from megapd.tokenization.roles import Roles
from megapd.tokenization.sentence_piece import SentencePieceTokenizer

CLASS = "PreTrainedTokenizerFast"  # reads tokenizer.json as it is, whatever the version

log = logging.getLogger(__name__)


def transformers_files(tokenizer: Tokenizer, roles: Roles, style: str, length: int | None) -> dict[str, bytes]:
    """The files to write beside a model: those that the tokenizer was read from, as they are, and what transformers needs more.

    length: tokens that the model takes; None: no limit. Of a sentencepiece model a tokenizer.json is made, which gives the same
    ids; the model lies beside it. Raises UserError for sentencepiece models that transformers could not read.
    """
    files = dict(tokenizer.files)
    if isinstance(tokenizer, SentencePieceTokenizer):
        from megapd.tokenization.convert import tokenizer_json

        files[JSON] = _text(_framed(tokenizer_json(tokenizer), tokenizer, roles, style))
    elif JSON not in files:
        files[JSON] = wordpiece_json(files[VOCAB], tree_of(files, CONFIG), VOCAB)
    config = {"tokenizer_class": CLASS, "clean_up_tokenization_spaces": False, **tree_of(files, CONFIG)}
    config |= {name: token for name, token in _named(tokenizer, roles, style).items() if not config.get(name)}
    if length is not None:
        config["model_max_length"] = length
    files[CONFIG] = _text(config)
    return files


def special_ids(tokenizer: Tokenizer, roles: Roles, style: str) -> dict[str, int]:
    """What config.json of the model says of its special tokens: ids of beginning, end and padding, where there are such."""
    named = _named(tokenizer, roles, style)
    found = {name: tokenizer.id_of(named[f"{name}_token"]) for name in ("bos", "eos", "pad") if f"{name}_token" in named}
    return {f"{name}_token_id": number for name, number in found.items() if number is not None}


def same_ids(files: Mapping[str, bytes], tokenizer: Tokenizer, texts: Sequence[str]) -> int:
    """Of the texts, and a sample of what tokenizers cut differently, how many the exported tokenizer.json encodes otherwise.

    Texts in which special tokens are written are left out: transformers takes those for what they name. Unigram models may cut
    long runs of one character at another place where both cuts have the same score.
    """
    exported = HuggingFaceTokenizer(files[JSON], JSON, {}, {})
    checked = [text for text in (*SAMPLE, *texts) if not any(token in text for token in (*tokenizer.special, "<0x"))]
    pairs = zip(tokenizer.encode(checked), exported.encode(checked), strict=True)
    return sum(not np.array_equal(own, theirs) for own, theirs in pairs)


def _named(tokenizer: Tokenizer, roles: Roles, style: str) -> dict[str, str]:
    """The tokens by transformers' names: what the corpus used, and else what the tokenizer's own files say."""
    chosen: dict[str, int | None] = {"pad_token": roles.padding, "mask_token": roles.mask}
    if style == "bert":
        chosen |= {"sep_token": roles.separator, "cls_token": roles.opener}
    else:
        chosen |= {"eos_token": roles.separator, "bos_token": roles.opener}
    return {**tokenizer.named, **{name: tokenizer.token_of(i) for name, i in chosen.items() if i is not None}}


def _framed(tree: dict[str, Any], tokenizer: Tokenizer, roles: Roles, style: str) -> dict[str, Any]:
    """With BERT's template: [CLS] text [SEP], as blocks and documents are in the corpus."""
    if style != "bert" or roles.opener is None:
        return tree
    from tokenizers import Tokenizer as Library
    from tokenizers import processors

    own = Library.from_str(json.dumps(tree))
    ends = [(tokenizer.token_of(i), i) for i in (roles.opener, roles.separator)]
    (opener, _), (separator, _) = ends
    own.post_processor = processors.TemplateProcessing(
        f"{opener} $A {separator}", f"{opener} $A {separator} $B:1 {separator}:1", ends
    )
    framed: dict[str, Any] = json.loads(own.to_str())
    return framed


def _text(tree: Mapping[str, Any]) -> bytes:
    return (json.dumps(tree, indent=1, ensure_ascii=False) + "\n").encode()
