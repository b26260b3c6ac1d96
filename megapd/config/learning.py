"""Sections `corpus` and `model`: the text there is, and which architecture learns."""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from megapd.config.base import OpenSection, Section, problem
from megapd.registry import Registry, models


class SourceConfig(Section):
    """One input of a corpus: local files (parquet, JSONL or text, by suffix; globs allowed) or a data set of the hub."""

    name: str | None = Field(None, description="what metrics call it (loss/NAME); default: its file, folder or data set")
    path: str | None = Field(None, description="file, folder or glob of local files")
    hub: str | None = Field(None, description="name of a data set on the Hugging Face hub, e.g. wikimedia/wikipedia")
    hub_config: str | None = Field(None, description="configuration of the hub data set, e.g. 20231101.en")
    revision: str | None = Field(None, description="commit, tag or branch of the hub data set; default: the newest, on record")
    split: str = Field("train", description="of the hub data set")
    text_column: str = Field("text", description="column or key that holds the text of a row")
    window_chars: int | None = Field(None, ge=1000, description="cut longer documents (books) into windows of about this length")

    @model_validator(mode="after")
    def _one_origin(self) -> SourceConfig:
        if (self.path is None) == (self.hub is None):
            raise ValueError("give exactly one of path and hub")
        return self


Token = Annotated[str, Field(min_length=1)]


class TokenizerConfig(Section):
    """The sentencepiece model that `prepare` trains, or an existing tokenizer that it copies."""

    style: Literal["bert", "gpt"] = Field(
        "bert", description="blocks that open with [CLS], with a mask token; or documents alone"
    )
    model: str | None = Field(
        None, description="an existing one: sentencepiece model, tokenizer.json, vocab.txt, their folder, or hf:REPO[@REVISION]"
    )
    vocab_size: int | None = Field(
        None, ge=16, description="ids; default 8192; of an existing one its own, to be padded (50277 to 50304) or cut"
    )
    separator: Token | None = Field(None, description="token that ends every document; default: as the tokenizer names it")
    opener: Token | None = Field(None, description="token that opens every block; default: bert's [CLS], of gpt none")
    mask: Token | None = Field(None, description="token that stands for a masked one; default: as the tokenizer names it")
    padding: Token | None = Field(None, description="token that fills rows; default: as the tokenizer names it, if it has one")
    kind: Literal["unigram", "bpe", "char"] = Field(
        "unigram", description="training: how sentencepiece chooses pieces; char: the commonest characters, others are unknown"
    )
    training_sentences: int = Field(1_000_000, ge=100, description="training: lines that are read at most")
    character_coverage: float | None = Field(
        None,
        ge=0.98,
        le=1.0,
        description="training: share of the text's characters with a piece, the rest are bytes; default 0.9995",
    )
    normalization: Literal["identity", "nfkc", "nmt_nfkc", "nfkc_cf", "nmt_nfkc_cf"] | None = Field(
        None, description="training: forms that are made one, cf: lower case too; default bert nmt_nfkc, gpt identity (lossless)"
    )
    split_digits: bool | None = Field(None, description="training: each digit a piece; default: gpt's are")
    max_piece_length: int | None = Field(None, ge=1, le=512, description="training: characters of a piece at most; default 16")
    symbols: tuple[Token, ...] = Field((), description="training: further strings that are always one piece")

    @property
    def trained_size(self) -> int:
        """Pieces of a tokenizer to be trained."""
        return self.vocab_size if self.vocab_size is not None else 8192

    @model_validator(mode="after")
    def _trains(self) -> TokenizerConfig:
        asked = [name for name in TRAINER_OPTIONS if getattr(self, name) not in (None, ())]
        if self.model is not None and asked:
            raise problem(asked[0], f"{self.model} is trained already; leave it out, or leave corpus.tokenizer.model out", None)
        return self


TRAINER_OPTIONS = ("character_coverage", "normalization", "split_digits", "max_piece_length", "symbols")


class CorpusConfig(Section):
    """What `megapd prepare` builds."""

    output: Path = Field(Path("corpora/default"), description="folder that `megapd prepare` makes and task text reads")
    sources: tuple[SourceConfig, ...] = ()
    tokenizer: TokenizerConfig = TokenizerConfig()
    block_length: int = Field(128, ge=8, description="tokens a block")
    packing: Literal["concatenate", "single"] = Field(
        "concatenate", description="blocks cut from one stream of documents; or a row a document, padded, long ones in several"
    )
    heldout_fraction: float = Field(0.01, gt=0.0, lt=0.5, description="share of the documents kept for evaluation")
    seed: int = Field(0, description="chooses the held-out documents")


class ModelConfig(OpenSection):
    """A student's architecture. `builder(section, vocab_size=, classes=, length=)` gives its megapd.models.Parts.

    FLOPs are those of forward and backward a token of input, for the model FLOPs utilisation (Chowdhery et al. 2022, app. B): a
    matrix product of [1, m] by [m, n] counts 2 m n, its backward twice that. Lookups, norms, activations and what activation
    checkpointing computes again count nothing.
    """

    registry: ClassVar[Registry[type[Any]]] = models
    tag: ClassVar[str] = "kind"

    kind: str
    initial: str | None = Field(
        None, description="weights to begin with: a run, a checkpoint's folder, hf:REPO[@REVISION]; of more layers every k-th"
    )

    @property
    @abstractmethod
    def head_width(self) -> int:
        """Width of the hidden states that the head multiplies."""

    @property
    @abstractmethod
    def causal(self) -> bool | None:
        """Whether a token sees the earlier ones alone (as next-token prediction needs); None: it reads no sequences of tokens."""

    @abstractmethod
    def flops_per_token(self, *, classes: int, length: int, labelled_share: float) -> float:
        """length: tokens a sample. labelled_share: labelled positions a token."""

    @abstractmethod
    def activations(self, length: int) -> int:
        """Values that a sample of `length` tokens keeps from forward to backward, roughly; without the loss."""


@models.register("mlp")
class MLPConfig(ModelConfig):
    """One hidden ReLU layer over +-1 inputs."""

    builder = "megapd.models.mlp:build"

    kind: Literal["mlp"] = "mlp"
    width: int = Field(50, ge=1, description="units of the hidden layer")

    @property
    def head_width(self) -> int:
        return self.width

    @property
    def causal(self) -> None:
        return None

    def flops_per_token(self, *, classes: int, length: int, labelled_share: float) -> float:
        """4 W + s * 6 W V with s = labelled_share, for the input needs no gradient; s = 1 / L where a sample has one label."""
        return 4.0 * self.width + labelled_share * 6.0 * self.width * classes

    def activations(self, length: int) -> int:
        return 2 * self.width


class LanguageModelConfig(ModelConfig):
    """What every transformer over token ids has."""

    layers: int = Field(4, ge=1, description="blocks of attention and MLP")
    heads: int = Field(4, ge=1, description="of attention, in each block; divide hidden")
    hidden: int = Field(256, ge=1, description="width of the hidden states")
    max_length: int | None = Field(None, ge=1, description="tokens a sample that an export names; default: the task's length")
    tied: bool = Field(True, description="the head shares the embedding's weight")
    activation_checkpointing: bool = Field(False, description="compute activations again in backward, to save their memory")
    compile: bool = Field(False, description="torch.compile each block")
    attention: Literal["sdpa", "flex"] = Field(
        "sdpa", description="documents and windows by dense masks; or on a GPU by FlexAttention, which skips what is not seen"
    )

    @property
    def head_width(self) -> int:
        return self.hidden

    def _kept(self, length: int, layer: int) -> int:
        """Activations of a sample, from those of a token and layer: checkpointing keeps the layers' inputs and one layer's."""
        return length * (layer + self.layers * self.hidden if self.activation_checkpointing else layer * self.layers)


@models.register("gpt")
@models.register("bert")
class TransformerConfig(LanguageModelConfig):
    """GPT (causal, pre-LN) or BERT (bidirectional, post-LN)."""

    builder = "megapd.models.transformer:build"

    kind: Literal["gpt", "bert"]
    ffn: int | None = Field(None, ge=1, description="width of the feed-forward layer; default 4 * hidden")
    max_length: int | None = Field(None, ge=1, description="learned positions; default: the task's length")

    @model_validator(mode="after")
    def _heads_divide(self) -> TransformerConfig:
        if self.hidden % self.heads:
            raise ValueError(f"hidden {self.hidden} is not a multiple of heads {self.heads}")
        return self

    @property
    def ffn_width(self) -> int:
        return self.ffn if self.ffn is not None else 4 * self.hidden

    @property
    def causal(self) -> bool:
        return self.kind == "gpt"

    def flops_per_token(self, *, classes: int, length: int, labelled_share: float) -> float:
        """3 * (layers * (8 D^2 + 4 D F + 4 D K) + s * (2 D V + [BERT] 2 D^2)), with D hidden, F ffn, V classes, s labelled_share.

        K is the mean number of keys a query sees: length for BERT, (length + 1) / 2 for GPT, where the cited paper counts length.
        A document mask is not subtracted.
        """
        keys = (length + 1) / 2 if self.causal else length
        block = 8.0 * self.hidden**2 + 4.0 * self.hidden * self.ffn_width + 4.0 * self.hidden * keys
        head = 2.0 * self.hidden * classes + (0.0 if self.causal else 2.0 * self.hidden**2)
        return 3.0 * (self.layers * block + labelled_share * head)

    def activations(self, length: int) -> int:
        """With a fused attention a layer keeps its input, the residual and both norms' results (4 D), queries, keys and values,
        what attention gives (4 D), and the feed-forward layer before and after GELU (2 F)."""
        return self._kept(length, 8 * self.hidden + 2 * self.ffn_width)
