"""The tokenizer that a prepared corpus carries, for whoever has text of its own: export, downstream tasks."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from megapd.config import Config, TextConfig
from megapd.errors import UserError
from megapd.tasks.blocks import read_meta, token_roles
from megapd.tokenization import Roles, Tokenizer, open_tokenizer


class CorpusVocabulary(NamedTuple):
    """A corpus' folder, its tokenizer, the ids of its roles there, and the corpus' style, bert or gpt."""

    folder: Path
    tokenizer: Tokenizer
    roles: Roles
    style: str


def corpus_vocabulary(config: Config, setting: str) -> CorpusVocabulary:
    """That of the run's corpus. Raises UserError that names `setting` for a task without text, and as read_meta does."""
    if not isinstance(config.task, TextConfig):
        raise UserError(f"{setting}: task.kind {config.task.kind} has no text; leave it out")
    folder: Path = config.task.corpus or config.corpus.output
    meta = read_meta(folder)
    separator, *others = (token_roles(meta)[role] for role in Roles._fields)
    assert separator is not None
    tokenizer = open_tokenizer(str(folder), "task.corpus")
    return CorpusVocabulary(folder, tokenizer, Roles(separator, *others), str(meta["tokenizer"]["style"]))
