"""Builds the folder that the text task reads: tokenizer.model, train.arrow, heldout.arrow, meta.json."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megapd import __version__
from megapd import config as settings
from megapd.corpus import tokenizer as tokenizers
from megapd.corpus.pack import BlockWriter, PackCounts, Packer
from megapd.corpus.sources import TextSource
from megapd.corpus.tokenizer import SentencePieceTokenizer
from megapd.errors import UserError
from megapd.files import commit_folder, temporary_folder, write_atomic
from megapd.tasks.blocks import FORMAT, META, MODEL, read_meta

SPLITS = ("train", "heldout")
ENCODE_CHARS = 1 << 21  # characters tokenised at once; larger buys no speed

log = logging.getLogger(__name__)


def prepare(config: settings.Config, progress: bool = True) -> Path:
    """Build corpus.output from corpus.sources and return it; nothing is there until all of it is.

    The held-out split takes a share of the documents, by a hash of their text keyed by corpus.seed: duplicates stay on one side,
    and adding sources moves no document. The tokenizer is trained on documents of the training split.

    Raises UserError for sources that cannot be read or are empty, text that does not fit the vocabulary, splits without a whole
    block, and an output folder made with other settings. progress: bars on stderr.
    """
    corpus = config.corpus
    if not corpus.sources:
        raise UserError("corpus.sources: empty; name at least one: {path: FILE_FOLDER_OR_GLOB} or {hub: DATA_SET}")
    output = corpus.output
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        _check_same(corpus)
        print(f"{output}: already prepared", file=sys.stderr)
        return output
    sources = [TextSource(source, number) for number, source in enumerate(corpus.sources)]
    with temporary_folder(output) as temporary:
        tokenizer = _tokenizer(corpus, sources, progress)
        write_atomic(temporary / MODEL, tokenizer.model)
        splits, per_source = _pack(corpus, sources, tokenizer, temporary, progress)
        meta = {
            "format": FORMAT,
            "megapd": __version__,
            "config": settings.public_tree(corpus),
            "tokenizer": {name: getattr(tokenizer, name) for name in ("digest", "style", "vocab_size", "special")},
            **splits,
            "sources": per_source,
        }
        write_atomic(temporary / META, json.dumps(meta, indent=1) + "\n")
        commit_folder(temporary, output)
    return output


def is_heldout(text: str, fraction: float, seed: int) -> bool:
    """Whether a document belongs to the held-out split: a keyed 64-bit hash of its text lies below `fraction`."""
    digest = hashlib.blake2b(text.encode(), digest_size=8, key=str(seed).encode()).digest()
    return int.from_bytes(digest, "little") < fraction * 2.0**64


def _check_same(corpus: settings.CorpusConfig) -> None:
    """Raise UserError unless corpus.output was made from these settings."""
    output = corpus.output
    if not (output / META).is_file():
        raise UserError(f"corpus.output: {output} exists and holds no corpus; choose another folder, or remove it")
    made = settings.flatten({**read_meta(output)["config"], "output": None})
    wanted = settings.flatten({**settings.public_tree(corpus), "output": None})
    different = sorted(name for name in made.keys() | wanted.keys() if made.get(name) != wanted.get(name))
    if different:
        names = ", ".join(f"corpus.{name}" for name in different)
        raise UserError(f"corpus.output: {output} was made with another {names}; choose another folder, or remove it")


def _tokenizer(corpus: settings.CorpusConfig, sources: list[TextSource], progress: bool) -> SentencePieceTokenizer:
    wanted = corpus.tokenizer
    if wanted.model is not None:
        tokenizer = tokenizers.load(wanted.model, wanted.style)
        if "vocab_size" in wanted.model_fields_set and wanted.vocab_size != tokenizer.vocab_size:
            log.warning("corpus.tokenizer.vocab_size: ignored, %s has %d pieces", wanted.model, tokenizer.vocab_size)
        return tokenizer
    with _bar("training the tokenizer", "document", progress, _training_documents(corpus, sources)) as documents:
        return tokenizers.train(wanted, documents)


def _training_documents(corpus: settings.CorpusConfig, sources: list[TextSource]) -> Iterator[str]:
    """Training documents, the sources taking turns, so that a bounded sample sees them all."""
    turns = [iter(source) for source in sources]
    while turns:
        for turn in list(turns):
            document = next(turn, None)
            if document is None:
                turns.remove(turn)
            elif not is_heldout(document, corpus.heldout_fraction, corpus.seed):
                yield document


def _pack(
    corpus: settings.CorpusConfig, sources: list[TextSource], tokenizer: SentencePieceTokenizer, folder: Path, progress: bool
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Write both splits; their counts and digests, and the counts of each source."""
    length = corpus.block_length
    packers = {split: Packer(length, tokenizer.separator, tokenizer.opener) for split in SPLITS}
    per_source: list[dict[str, Any]] = []
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1  # that it may run on
    with (
        BlockWriter(folder / "train.arrow", length, tokenizer.vocab_size) as train,
        BlockWriter(folder / "heldout.arrow", length, tokenizer.vocab_size) as heldout,
        _bar("tokenising", "token", progress) as bar,
    ):
        writers = {"train": train, "heldout": heldout}
        for source in sources:
            counts = {"documents": 0, "characters": 0, "tokens": 0}
            for texts in _grouped(source, ENCODE_CHARS):
                encoded = tokenizer.encode(texts, cores)
                sides = [is_heldout(text, corpus.heldout_fraction, corpus.seed) for text in texts]
                for split in SPLITS:
                    packers[split].add([ids for ids, held in zip(encoded, sides, strict=True) if held == (split == "heldout")])
                    if packers[split].ready:
                        writers[split].append(*packers[split].take())
                tokens = sum(map(len, encoded))
                counts["documents"] += len(texts)
                counts["characters"] += sum(map(len, texts))
                counts["tokens"] += tokens
                bar.update(tokens)
            per_source.append({"name": source.name, **counts})
    closed = {split: packers[split].close() for split in SPLITS}
    _check_filled(corpus, closed)
    return {split: {**asdict(closed[split]), "sha256": writers[split].digest} for split in SPLITS}, per_source


def _check_filled(corpus: settings.CorpusConfig, splits: dict[str, PackCounts]) -> None:
    documents = sum(counts.documents for counts in splits.values())
    if documents == 0:
        raise UserError(f"corpus.sources: empty: no text in {', '.join(s.path or str(s.hub) for s in corpus.sources)}")
    for split, setting in (("train", "add text"), ("heldout", "raise corpus.heldout_fraction, add text, or set window_chars")):
        counts = splits[split]
        if counts.blocks == 0:
            raise UserError(
                f"corpus.sources: the {split} split has {counts.documents} of {documents} documents and {counts.tokens} tokens, "
                f"too few for one block of corpus.block_length {corpus.block_length}; {setting}"
            )


def _grouped(documents: TextSource, chars: int) -> Iterator[list[str]]:
    """Lists of documents of about `chars` characters together."""
    group: list[str] = []
    held = 0
    for document in documents:
        group.append(document)
        held += len(document)
        if held >= chars:
            yield group
            group, held = [], 0
    if group:
        yield group


def _bar(name: str, unit: str, progress: bool, counted: Iterator[str] | None = None) -> tqdm:
    return tqdm(counted, desc=name, unit=f" {unit}s", unit_scale=True, disable=not progress, file=sys.stderr, dynamic_ncols=True)
