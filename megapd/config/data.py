"""Sections `corpus`, `task` and `model`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from megapd.config.base import Section

# ---------------------------------------------------------------------------------------------------------- corpus


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


# ------------------------------------------------------------------------------------------------------------ task


class ParityConfig(Section):
    """Sparse parity: x uniform in {-1,+1}^dimension, y the product over a hidden support of `degree` coordinates."""

    kind: Literal["parity"] = "parity"
    dimension: int = Field(50, ge=1)
    degree: int = Field(5, ge=1)
    seed: int = Field(0, description="chooses the hidden support; teacher and student must share it")

    @model_validator(mode="after")
    def _support_fits(self) -> ParityConfig:
        if self.degree > self.dimension:
            raise ValueError(f"degree {self.degree} exceeds dimension {self.dimension}")
        return self


class HierarchicalParityConfig(Section):
    """A binary tree of parities with disjoint supports; the label is the leaf whose path agrees best."""

    kind: Literal["hierarchical_parity"] = "hierarchical_parity"
    dimension: int = Field(100, ge=1)
    degree: int = Field(5, ge=1)
    labels: int = Field(8, ge=2)
    seed: int = 0

    @model_validator(mode="after")
    def _supports_fit(self) -> HierarchicalParityConfig:
        if self.labels & (self.labels - 1):
            raise ValueError(f"labels must be a power of two, got {self.labels}")
        needed = (self.labels - 1) * self.degree
        if needed > self.dimension:
            raise ValueError(
                f"{self.labels - 1} disjoint supports of degree {self.degree} need dimension >= {needed}, got {self.dimension}"
            )
        return self


class TextConfig(Section):
    """Masked (mlm) or next-token (clm) prediction over a prepared corpus."""

    kind: Literal["text"] = "text"
    objective: Literal["mlm", "clm"] = "mlm"
    corpus: Path | None = Field(None, description="folder that `megapd prepare` wrote; default: corpus.output")
    mask_rate: float = Field(0.3, gt=0.0, lt=1.0, description="share of the positions selected for prediction (mlm)")
    mask_token_share: float = Field(0.8, ge=0.0, le=1.0, description="of the selected, share replaced by the mask token")
    random_token_share: float = Field(0.1, ge=0.0, le=1.0, description="of the selected, share replaced at random")
    document_mask: bool = Field(False, description="attention does not cross document boundaries")

    @model_validator(mode="after")
    def _shares_fit(self) -> TextConfig:
        if self.mask_token_share + self.random_token_share > 1.0 + 1e-9:
            raise ValueError("mask_token_share + random_token_share must not exceed 1")
        return self


TaskConfig = Annotated[ParityConfig | HierarchicalParityConfig | TextConfig, Field(discriminator="kind")]


# ----------------------------------------------------------------------------------------------------------- model


class MLPConfig(Section):
    """One hidden ReLU layer over +-1 inputs."""

    kind: Literal["mlp"] = "mlp"
    width: int = Field(50, ge=1)


class TransformerConfig(Section):
    """GPT (causal, pre-LN) or BERT (bidirectional, post-LN)."""

    kind: Literal["gpt", "bert"]
    layers: int = Field(4, ge=1)
    heads: int = Field(4, ge=1)
    hidden: int = Field(256, ge=1)
    ffn: int | None = Field(None, ge=1, description="width of the feed-forward layer; default 4 * hidden")
    max_length: int | None = Field(None, ge=1, description="learned positions; default: the task's length")
    tied: bool = Field(True, description="the head shares the embedding's weight")
    activation_checkpointing: bool = False
    compile: bool = Field(False, description="torch.compile each block")

    @model_validator(mode="after")
    def _heads_divide(self) -> TransformerConfig:
        if self.hidden % self.heads:
            raise ValueError(f"hidden {self.hidden} is not a multiple of heads {self.heads}")
        return self

    @property
    def ffn_width(self) -> int:
        return self.ffn if self.ffn is not None else 4 * self.hidden


ModelConfig = Annotated[MLPConfig | TransformerConfig, Field(discriminator="kind")]
