"""A sentencepiece model as the tokenizer.json of the tokenizers library, which gives the same ids."""

from __future__ import annotations

from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from megapd.errors import UserError
from megapd.tokenization.sentence_piece import SentencePieceTokenizer

BLANK = "▁"
_UNIGRAM, _BPE, _CHAR = 1, 2, 4  # trainer_spec.model_type of sentencepiece's model
# Pieces that sentencepiece never makes of text stand in the library's table like any other, and would be found in it.
_NEVER = -1e6


def converted(tokenizer: SentencePieceTokenizer) -> Any:
    """As a tokenizers.Tokenizer. Raises UserError for models of whole words, and those that say blanks otherwise.

    The whole text is one word: sentencepiece itself finds the best cut of all of it, not of what is between blanks.
    """
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto.FromString(tokenizer.model)
    kind, norm = proto.trainer_spec.model_type, proto.normalizer_spec
    if kind not in (_UNIGRAM, _BPE, _CHAR) or proto.trainer_spec.treat_whitespace_as_suffix or not norm.escape_whitespaces:
        what = "is neither unigram, BPE nor of characters, with blanks before words"
        raise UserError(
            f"corpus.tokenizer.model: this sentencepiece model {what}, so transformers cannot read it; choose another"
        )
    pieces, unknown = list(proto.pieces), proto.trainer_spec.unk_id
    types = type(pieces[0])
    special = [p.piece for p in pieces if p.type in (types.CONTROL, types.UNKNOWN)]
    # One character that no other piece has is cut off by itself; longer ones the library has to look for beforehand.
    defined = [p.piece for p in pieces if p.type == types.USER_DEFINED and len(p.piece) > 1]
    own = tokenizers.Tokenizer(_unigram(pieces, unknown) if kind == _UNIGRAM else _bpe(pieces, unknown))
    steps: list[Any] = [normalizers.Precompiled(norm.precompiled_charsmap)] if norm.precompiled_charsmap else []
    if norm.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(" {2,}"), " "), normalizers.Strip()]
    if defined:  # what stands after one gets no blank; the price: nor does a text that begins with one
        scheme = "first" if norm.add_dummy_prefix else "never"
        own.pre_tokenizer = pre_tokenizers.Metaspace(BLANK, prepend_scheme=scheme, split=False)
    else:
        steps += [normalizers.Prepend(BLANK)] if norm.add_dummy_prefix else []
        steps.append(normalizers.Replace(" ", BLANK))
    if steps:
        own.normalizer = normalizers.Sequence(steps)
    strip = [decoders.Strip(" ", 1, 0)] if norm.add_dummy_prefix else []
    own.decoder = decoders.Sequence([decoders.Replace(BLANK, " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    own.add_special_tokens([AddedToken(piece, special=True, normalized=False) for piece in special])
    own.add_tokens([AddedToken(piece.replace(BLANK, " "), special=False, normalized=False) for piece in defined])
    return own


def _unigram(pieces: list[Any], unknown: int) -> Any:
    types = type(pieces[0])
    table = [(p.piece, p.score if p.type in (types.NORMAL, types.USER_DEFINED) else _NEVER) for p in pieces]
    return models.Unigram(table, unk_id=unknown, byte_fallback=any(p.type == types.BYTE for p in pieces))


def _bpe(pieces: list[Any], unknown: int) -> Any:
    """Sentencepiece merges the two neighbours whose union has the best score; so of each piece every cut in two is a merge, and
    they are ranked by the score of the union. Of characters there are none."""
    types = type(pieces[0])
    table = {p.piece: i for i, p in enumerate(pieces)}
    score = {p.piece: p.score for p in pieces if p.type == types.NORMAL}
    merges = []
    for piece, value in score.items():
        cuts = [(piece[:k], piece[k:]) for k in range(1, len(piece))]
        merges += [(value, table[a], table[b], (a, b)) for a, b in cuts if a in score and b in score]
    merges.sort(key=lambda merge: (-merge[0], merge[1], merge[2]))
    return models.BPE(
        table,
        [pair for *_, pair in merges],
        unk_token=pieces[unknown].piece,
        fuse_unk=True,
        byte_fallback=any(p.type == types.BYTE for p in pieces),
    )
