"""Where tokenizers come from: a file, a folder that transformers saved, or a repository of the hub."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megapd.errors import UserError
from megapd.hub import HUB, fetch
from megapd.tokenization.base import CONFIG, JSON, MODEL, SPECIAL_MAP, VOCAB, Tokenizer

FORMS = (JSON, MODEL, VOCAB)  # of several that a folder holds, transformers takes the first; so does megapd
FILES = (*FORMS, CONFIG, SPECIAL_MAP)


def open_tokenizer(spec: str, setting: str = "corpus.tokenizer.model") -> Tokenizer:
    """The tokenizer that a sentencepiece model, tokenizer.json, vocab.txt, folder, or hf:REPO[@REVISION] is.

    Files of the usual names take their roles from tokenizer_config.json and special_tokens_map.json beside them. setting: what
    named it, for messages. Raises UserError where there is none, or it cannot be read.
    """
    if spec.startswith(HUB):
        return _of_folder(fetch(spec, FILES, setting), f"{setting}: {spec}")
    path = Path(spec)
    if path.is_dir():
        return _of_folder(path, f"{setting}: {path}")
    beside = _trees(path.parent) if path.name in FORMS else {}
    return _of_file(path, beside, setting)


def digests(folder: Path) -> tuple[str, ...]:
    """Of each form of its tokenizer that a folder holds, in the order of FORMS; empty: it holds none.

    Of tokenizer.json and vocab.txt the canonical digest (see hugging_face), of a sentencepiece model the file's sha256: the file
    is nothing but pieces, scores, normaliser and how it was trained. Raises UserError for files that cannot be read.
    """
    found = []
    for form in FORMS:
        path = folder / form
        if not path.is_file():
            continue
        if form == MODEL:
            found.append(hashlib.sha256(_read(path, str(path))).hexdigest())
        else:
            from megapd.tokenization import hugging_face  # takes 0.2 s, and most trajectories are megapd's own

            data = _read(path, str(path))
            if form == VOCAB:
                data = hugging_face.wordpiece_json(data, tree_of(_trees(folder), CONFIG), str(path))
            found.append(hugging_face.canonical_digest(data, str(path)))
    return tuple(dict.fromkeys(found))


def _of_folder(folder: Path, where: str) -> Tokenizer:
    form = next((name for name in FORMS if (folder / name).is_file()), None)
    if form is None:
        raise UserError(f"{where} holds no tokenizer ({', '.join(FORMS)}); name the repository or file that has it")
    return _of_file(folder / form, _trees(folder), where)


def _of_file(path: Path, beside: Mapping[str, bytes], setting: str) -> Tokenizer:
    where = f"{setting}: {path}"
    data = _read(path, where)
    if path.suffix not in (".json", ".txt"):
        from megapd.tokenization.sentence_piece import SentencePieceTokenizer

        return SentencePieceTokenizer(data, where, _named(beside))
    from megapd.tokenization.hugging_face import HuggingFaceTokenizer, wordpiece_json

    files = {JSON if path.suffix == ".json" else VOCAB: data, **beside}
    if path.suffix == ".txt":
        data = wordpiece_json(data, tree_of(beside, CONFIG), where)
    return HuggingFaceTokenizer(data, where, _named(beside), files)


def _trees(folder: Path) -> dict[str, bytes]:
    return {name: _read(folder / name, str(folder / name)) for name in (CONFIG, SPECIAL_MAP) if (folder / name).is_file()}


def _named(beside: Mapping[str, bytes]) -> dict[str, str]:
    from megapd.tokenization.hugging_face import named_in

    return named_in(*(tree_of(beside, name) for name in (SPECIAL_MAP, CONFIG)))


def tree_of(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    """The object in a JSON file of these; empty where there is no such file. Raises UserError where it is damaged."""
    if name not in files:
        return {}
    try:
        tree = json.loads(files[name])
    except ValueError as error:
        raise UserError(f"{name} beside the tokenizer: damaged, not valid JSON ({error}); fetch it again") from error
    if not isinstance(tree, dict):
        raise UserError(f"{name} beside the tokenizer: damaged, no JSON object; fetch it again")
    return tree


def _read(path: Path, where: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{where}: cannot be read: {error.strerror}") from error
