"""Builds the folder that the text task reads, see megapd.tasks.blocks."""

from __future__ import annotations

import hashlib
import logging
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from megapd import __version__
from megapd import config as settings
from megapd.corpus import tokenizer as tokenizers
from megapd.corpus.pack import BlockWriter, PackCounts, Packer, RowPacker, total
from megapd.corpus.sources import TextSource, find_files, fingerprint, names
from megapd.corpus.tokenizer import CorpusTokenizer
from megapd.errors import UserError
from megapd.files import commit_folder, machine_cores, sealed, temporary_folder, write_atomic
from megapd.hub import HUB
from megapd.rng import Stream, bits, permute
from megapd.tasks.blocks import FORMAT, META, ROWS_FORMAT, read_meta
from megapd.tokenization import open_tokenizer

Told = Callable[[str, int], object]
ENCODE_CHARS = 1 << 21  # characters tokenised at once; larger buys no speed

log = logging.getLogger(__name__)


def prepare(config: settings.Config, progress: bool = True, told: Told = lambda what, done: None) -> Path:
    """Build corpus.output from corpus.sources and return it; nothing is there until all of it is.

    The held-out split takes a share of the documents, by a hash of their text keyed by corpus.seed: duplicates, and the windows
    of one document, stay on one side, and adding sources moves no document. The tokenizer is trained on documents of the training
    split.

    Raises UserError for sources that cannot be read or are empty, text that does not fit the vocabulary, splits without a whole
    block, and an output folder made with other settings or of other text. progress: bars on stderr. told: called now and then
    with what is done and how far it is, documents or tokens.
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
    names(sources)
    with temporary_folder(output) as temporary:
        # Before they are read: what changes meanwhile is then found to be another file.
        files = [[fingerprint(file) for file in source.files] for source in sources]
        tokenizer = _tokenizer(corpus, sources, progress, told)
        for name, data in tokenizer.own.files.items():
            write_atomic(temporary / name, data)
        splits, per_source = _pack(corpus, sources, tokenizer, temporary, progress, told)
        origins = [{"revision": source.revision, "files": known} for source, known in zip(sources, files, strict=True)]
        meta = {
            "format": FORMAT if corpus.packing == "concatenate" else ROWS_FORMAT,
            "megapd": __version__,
            "config": settings.public_tree(corpus),
            "tokenizer": tokenizer.described(),
            **splits,
            "sources": [{**counts, **origin} for counts, origin in zip(per_source, origins, strict=True)],
        }
        write_atomic(temporary / META, sealed(meta))
        commit_folder(temporary, output)
    return output


def is_heldout(text: str, fraction: float, seed: int) -> bool:
    """Whether a document belongs to the held-out split: a keyed 64-bit hash of its key, see TextSource, lies below `fraction`."""
    digest = hashlib.blake2b(text.encode(), digest_size=8, key=str(seed).encode()).digest()
    return int.from_bytes(digest, "little") < fraction * 2.0**64


def _check_same(corpus: settings.CorpusConfig) -> None:
    """Raise UserError unless corpus.output was made from these settings, and of the text that is there now."""
    output = corpus.output
    if not (output / META).is_file():
        raise UserError(f"corpus.output: {output} exists and holds no corpus; choose another folder, or remove it")
    meta = read_meta(output)
    made = settings.flatten(settings.complete({"corpus": {**meta["config"], "output": "."}})[0]["corpus"])
    wanted = settings.flatten({**settings.public_tree(corpus), "output": "."})
    # Its default is the tokenizer's own size, and formerly it counted for a trained one alone: what was made is compared.
    made["tokenizer.vocab_size"] = meta["tokenizer"]["vocab_size"]
    if corpus.tokenizer.vocab_size is None:
        wanted["tokenizer.vocab_size"] = (
            corpus.tokenizer.trained_size if corpus.tokenizer.model is None else made["tokenizer.vocab_size"]
        )
    different = sorted(name for name in made.keys() | wanted.keys() if made.get(name) != wanted.get(name))
    if different:
        names = ", ".join(f"corpus.{name}" for name in different)
        raise UserError(f"corpus.output: {output} was made with another {names}; choose another folder, or remove it")
    _check_tokenizer(corpus, meta["tokenizer"]["digest"])
    for number, (source, made_of) in enumerate(zip(corpus.sources, meta["sources"], strict=True)):
        _check_files(corpus, source, f"corpus.sources[{number}]", {known["path"]: known for known in made_of["files"]})


def _check_tokenizer(corpus: settings.CorpusConfig, digest: str) -> None:
    """Raise UserError where a tokenizer on this machine is another one now."""
    model = corpus.tokenizer.model
    if model is None or model.startswith(HUB):
        return
    if not Path(model).exists():
        log.warning("corpus.tokenizer.model: %s is not here any more, so it was not compared with what was prepared", model)
        return
    if (now := open_tokenizer(model).digest) != digest:
        what = f"{model} is now tokenizer {now[:12]}, but {corpus.output} was made with {digest[:12]}"
        raise UserError(f"corpus.tokenizer.model: {what}; choose another corpus.output, or remove this one")


def _check_files(corpus: settings.CorpusConfig, source: settings.SourceConfig, setting: str, known: dict[str, Any]) -> None:
    """Raise UserError where the source's files are others than those that were prepared."""
    if source.path is None:
        return
    try:
        files = {str(file): file for file in find_files(source.path, setting)}
    except UserError:
        log.warning("%s: %s is not here any more, so it was not compared with what was prepared", setting, source.path)
        return
    changes = {
        "changed": [p for p in files if p in known and fingerprint(files[p], known[p])["sha256"] != known[p]["sha256"]],
        "added": [path for path in files if path not in known],
        "gone": [path for path in known if path not in files],
    }
    told = "; ".join(f"{what}: {', '.join(paths[:3])}{' ...' * (len(paths) > 3)}" for what, paths in changes.items() if paths)
    if told:
        raise UserError(
            f"{setting}: {corpus.output} was made of other text ({told}); choose another corpus.output, or remove this one"
        )


def _tokenizer(corpus: settings.CorpusConfig, sources: list[TextSource], progress: bool, told: Told) -> CorpusTokenizer:
    wanted = corpus.tokenizer
    if wanted.model is not None:
        return tokenizers.existing(wanted)
    with _bar("training the tokenizer", "document", progress, _training_documents(corpus, sources)) as documents:
        return tokenizers.train(wanted, _counted(documents, told))


def _counted(documents: Iterable[str], told: Told) -> Iterator[str]:
    for number, document in enumerate(documents, start=1):
        told("documents for the tokenizer", number)
        yield document
    told("training the tokenizer", 0)


def _training_documents(corpus: settings.CorpusConfig, sources: list[TextSource]) -> Iterator[str]:
    """Training texts, the sources taking turns, each with its files in a fixed random order, so that a bounded sample sees of
    them all."""

    held = 0

    def texts(source: TextSource, number: int) -> Iterator[str]:
        nonlocal held
        count = len(source.files)
        key = bits(corpus.seed, Stream.SAMPLE_ORDER, number)
        order = [source.files[place] for place in permute(np.arange(count), count, key)] if count else None
        for document, parts in source.documents(order):
            if is_heldout(document, corpus.heldout_fraction, corpus.seed):
                held += 1
            else:
                yield from parts

    none = True
    turns = [texts(source, number) for number, source in enumerate(sources)]
    while turns:
        for turn in list(turns):
            text = next(turn, None)
            if text is None:
                turns.remove(turn)
            else:
                none = False
                yield text
    if none and held:
        what = f"{held} documents, all of which fell into the held-out split"
        raise UserError(f"corpus.sources: {what}; add text, lower corpus.heldout_fraction, or choose another corpus.seed")


def _pack(
    corpus: settings.CorpusConfig,
    sources: list[TextSource],
    tokenizer: CorpusTokenizer,
    folder: Path,
    progress: bool,
    told: Told,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Write both splits; what meta.json says of them, and the counts of each source.

    The training split has one packer; the held-out one has one for each source, whose blocks are its own.
    """
    length = corpus.block_length

    def packer_of() -> Packer | RowPacker:
        if corpus.packing == "concatenate":
            return Packer(length, tokenizer.separator, tokenizer.opener)
        padding = tokenizer.roles.padding
        return RowPacker(length, tokenizer.separator, tokenizer.opener, tokenizer.separator if padding is None else padding)

    train_packer = packer_of()
    held_counts: list[PackCounts] = []
    per_source: list[dict[str, Any]] = []
    done = 0
    cores = machine_cores()
    with (
        BlockWriter(folder / "train.arrow", length, tokenizer.vocab_size) as train,
        BlockWriter(folder / "heldout.arrow", length, tokenizer.vocab_size) as heldout,
        _bar("tokenising", "token", progress) as bar,
    ):
        for source in sources:
            counts = {"documents": 0, "characters": 0, "tokens": 0}
            held_packer = packer_of()
            for group in _grouped(source, corpus):
                encoded = tokenizer.encode([text for text, _ in group], cores)
                for packer, writer, side in ((train_packer, train, False), (held_packer, heldout, True)):
                    packer.add([ids for ids, (_, held) in zip(encoded, group, strict=True) if held == side])
                    if packer.ready:
                        writer.append(*packer.take())
                tokens = sum(map(len, encoded))
                counts["documents"] += len(group)
                counts["characters"] += sum(len(text) for text, _ in group)
                counts["tokens"] += tokens
                bar.update(tokens)
                done += tokens
                told("tokens packed", done)
            held_counts.append(held_packer.close())
            per_source.append({"name": source.name, **counts})
    closed = {"train": train_packer.close(), "heldout": total(held_counts)}
    _check_filled(corpus, closed)
    blocks = [(source.name, counts.blocks) for source, counts in zip(sources, held_counts, strict=True) if counts.blocks]
    entries: dict[str, dict[str, Any]] = {
        "train": {"shards": [train.shard]},
        "heldout": {"shards": [heldout.shard], "sources": blocks},
    }
    return {split: {**asdict(closed[split]), **entry} for split, entry in entries.items()}, per_source


def _check_filled(corpus: settings.CorpusConfig, splits: dict[str, PackCounts]) -> None:
    documents = sum(counts.documents for counts in splits.values())
    if documents == 0:
        raise UserError(f"corpus.sources: empty: no text in {', '.join(s.path or str(s.hub) for s in corpus.sources)}")
    for split, setting in (("train", "add text"), ("heldout", "raise corpus.heldout_fraction, or add text")):
        counts = splits[split]
        if counts.blocks == 0:
            raise UserError(
                f"corpus.sources: the {split} split has {counts.documents} of {documents} documents and {counts.tokens} tokens, "
                f"too few for one block of corpus.block_length {corpus.block_length}; {setting}"
            )


def _grouped(source: TextSource, corpus: settings.CorpusConfig) -> Iterator[list[tuple[str, bool]]]:
    """Lists of texts of about ENCODE_CHARS characters together, each with whether it is held out, as its document is."""
    group: list[tuple[str, bool]] = []
    size = 0
    for document, texts in source.documents():
        held = is_heldout(document, corpus.heldout_fraction, corpus.seed)
        for text in texts:
            group.append((text, held))
            size += len(text)
            if size >= ENCODE_CHARS:
                yield group
                group, size = [], 0
    if group:
        yield group


def _bar(name: str, unit: str, progress: bool, counted: Iterator[str] | None = None) -> tqdm:
    return tqdm(counted, desc=name, unit=f" {unit}s", unit_scale=True, disable=not progress, file=sys.stderr, dynamic_ncols=True)
