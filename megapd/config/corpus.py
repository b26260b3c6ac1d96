"""Section `corpus`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from megapd.config.base import Section


class SourceConfig(Section):
    """One input of a corpus: local files (parquet, JSONL or text, by suffix; globs allowed) or a data set of the hub."""

    path: str | None = Field(None, description="file, folder or glob of local files")
    hub: str | None = Field(None, description="name of a data set on the Hugging Face hub, e.g. wikimedia/wikipedia")
    hub_config: str | None = Field(None, description="configuration of the hub data set, e.g. 20231101.en")
    split: str = "train"
    text_column: str = "text"
    window_chars: int | None = Field(
        None, ge=1000, description="split longer documents (books) into windows of about this many characters"
    )

    @model_validator(mode="after")
    def _one_origin(self) -> SourceConfig:
        if (self.path is None) == (self.hub is None):
            raise ValueError("give exactly one of path and hub")
        return self


class TokenizerConfig(Section):
    """The sentencepiece model that `prepare` trains, or an existing one that it copies."""

    kind: Literal["unigram", "bpe"] = "unigram"
    style: Literal["bert", "gpt"] = Field("bert", description="special tokens: [PAD] [UNK] [CLS] [SEP] [MASK], or <|endoftext|>")
    vocab_size: int = Field(8192, ge=64)
    model: Path | None = Field(None, description="use this sentencepiece model instead of training one")
    training_sentences: int = Field(1_000_000, ge=100, description="lines that the tokenizer is trained on at most")


class CorpusConfig(Section):
    """What `megapd prepare` builds."""

    output: Path = Path("corpora/default")
    sources: tuple[SourceConfig, ...] = ()
    tokenizer: TokenizerConfig = TokenizerConfig()
    block_length: int = Field(128, ge=8, description="tokens a block")
    heldout_fraction: float = Field(0.01, gt=0.0, lt=0.5, description="share of the documents kept for evaluation")
    seed: int = 0
