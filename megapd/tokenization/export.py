"""A corpus' tokenizer as the files that transformers' AutoTokenizer reads."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

import numpy as np

from megapd.tokenization.base import CONFIG, JSON, VOCAB, Tokenizer
from megapd.tokenization.convert import converted
from megapd.tokenization.folder import tree_of
from megapd.tokenization.gigatoken import SAMPLE
from megapd.tokenization.hugging_face import HuggingFaceTokenizer, bert_template, wordpiece_json
from megapd.tokenization.roles import Roles
from megapd.tokenization.sentence_piece import SentencePieceTokenizer

CLASS = "PreTrainedTokenizerFast"  # reads tokenizer.json as it is, whatever the version
NAMES = ("bos", "eos", "pad", "cls", "sep")  # tokens whose ids a config.json tells


def transformers_files(tokenizer: Tokenizer, roles: Roles, style: str, length: int | None) -> dict[str, bytes]:
    """The files to write beside a model: those that the tokenizer was read from, as they are, and what transformers needs more.

    length: tokens that the model takes; None: no limit. Of a sentencepiece model a tokenizer.json is made, which gives the same
    ids; the model lies beside it. Raises UserError for sentencepiece models that transformers could not read.
    """
    files = dict(tokenizer.files)
    if isinstance(tokenizer, SentencePieceTokenizer):
        own = converted(tokenizer)
        if style == "bert" and roles.opener is not None:  # as blocks and documents are in the corpus
            own.post_processor = bert_template([(tokenizer.token_of(i), i) for i in (roles.opener, roles.separator)])
        files[JSON] = own.to_str(pretty=True).encode()
    elif JSON not in files:
        files[JSON] = wordpiece_json(files[VOCAB], tree_of(files, CONFIG), VOCAB)
    config = {"tokenizer_class": CLASS, "clean_up_tokenization_spaces": False, **tree_of(files, CONFIG)}
    config |= {name: token for name, token in _named(tokenizer, roles, style).items() if not config.get(name)}
    if length is not None:
        config["model_max_length"] = length
    files[CONFIG] = (json.dumps(config, indent=1, ensure_ascii=False) + "\n").encode()
    return files


def special_ids(tokenizer: Tokenizer, roles: Roles, style: str) -> dict[str, int]:
    """What config.json of the model says of its special tokens, where there are such: ids of beginning, end and padding, and
    BERT's two."""
    named = _named(tokenizer, roles, style)
    found = {name: tokenizer.id_of(named[f"{name}_token"]) for name in NAMES if f"{name}_token" in named}
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
