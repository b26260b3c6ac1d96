"""Sections of the model families of today: `model.kind` llama and modernbert."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from megapd.config.base import problem
from megapd.config.learning import LanguageModelConfig
from megapd.registry import models


@models.register("llama")
class LlamaConfig(LanguageModelConfig):
    """Llama (Touvron et al. 2023), and by its options the decoders like it: GPT-NeoX / Pythia, OLMo-2, Qwen3."""

    builder = "megapd.models.llama:build"

    kind: Literal["llama"] = "llama"
    heads: int = Field(4, ge=1, description="of queries, in each block")
    kv_heads: int | None = Field(None, ge=1, description="of keys and values, shared by as many queries each; default: heads")
    head_size: int | None = Field(None, ge=2, description="of a head; default hidden / heads")
    ffn: int | None = Field(None, ge=1, description="width of the MLP; default 8/3 hidden (swiglu), up to 64; 4 hidden (gelu)")
    mlp: Literal["swiglu", "gelu"] = Field("swiglu", description="three matrices, gated; or two, as NeoX")
    norm: Literal["rms", "layer"] = Field("rms", description="RMSNorm, or LayerNorm with bias, as NeoX")
    norm_eps: float = Field(1e-5, gt=0.0, description="added to what the norm divides by")
    norm_place: Literal["before", "after"] = Field("before", description="of a sublayer; after it, inside the residual: OLMo-2")
    parallel: bool = Field(False, description="attention and MLP read the same hidden states, as NeoX")
    qk_norm: Literal["none", "whole", "head"] = Field("none", description="RMSNorm of queries and keys: OLMo-2 whole, Qwen3 head")
    biases: bool = Field(False, description="of all matrices, as NeoX")
    rope_theta: float = Field(10_000.0, gt=1.0, description="base of the rotary frequencies")
    rotary_share: float = Field(1.0, gt=0.0, le=1.0, description="of a head's width that is rotated; Pythia: 0.25")
    restart_positions: bool = Field(False, description="count from 0 at each document, where task.document_mask keeps them apart")
    tied: bool = Field(False, description="the head shares the embedding's weight")

    @model_validator(mode="after")
    def _fits(self) -> LlamaConfig:
        if self.head_size is None and self.hidden % self.heads:
            raise problem("heads", f"{self.heads} do not divide model.hidden {self.hidden}; or set model.head_size", self.heads)
        if self.heads % self.key_heads:
            raise problem("kv_heads", f"{self.key_heads} do not divide model.heads {self.heads}", self.kv_heads)
        if self.rotated % 2 or self.rotated < 2:
            what = f"{self.rotated} of {self.width_of_head} features would be rotated, which must be an even number of them"
            raise problem("rotary_share", what, self.rotary_share)
        if self.parallel and self.norm_place == "after":
            raise problem("parallel", "norms after the sublayers are for sublayers one after the other; set it to false", True)
        return self

    @property
    def key_heads(self) -> int:
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def width_of_head(self) -> int:
        return self.hidden // self.heads if self.head_size is None else self.head_size

    @property
    def rotated(self) -> int:
        return int(self.width_of_head * self.rotary_share)

    @property
    def ffn_width(self) -> int:
        if self.ffn is not None:
            return self.ffn
        return 4 * self.hidden if self.mlp == "gelu" else -(-8 * self.hidden // (3 * 64)) * 64

    @property
    def causal(self) -> bool:
        return True

    def flops_per_token(self, *, classes: int, length: int, labelled_share: float) -> float:
        """3 * (layers * (2 D (H + 2 K) E + 2 H E D + 4 H E (length + 1) / 2 + M D F) + s * 2 D V), with H and K heads of width E,
        D hidden, F ffn, M 6 for swiglu's three matrices and 4 for two, V classes, s labelled_share."""
        attended, keyed = self.heads * self.width_of_head, self.key_heads * self.width_of_head
        attention = 2.0 * self.hidden * (2 * attended + 2 * keyed) + 2.0 * attended * (length + 1)
        mlp = (6.0 if self.mlp == "swiglu" else 4.0) * self.hidden * self.ffn_width
        return 3.0 * (self.layers * (attention + mlp) + labelled_share * 2.0 * self.hidden * classes)

    def activations(self, length: int) -> int:
        """With a fused attention a layer keeps its input, the residual and both norms' results (4 D); queries, keys and values
        as attention reads them, repeated where they are shared, and what it gives (4 H E); and the MLP's products and what
        comes of them (4 F or 2 F). An RMSNorm that is not fused also keeps what it normalised: 2 D, and with those of queries
        and keys, which keep their input too, 2 (H + K) E."""
        attended, keyed = self.heads * self.width_of_head, self.key_heads * self.width_of_head
        norms = (2 * self.hidden if self.norm == "rms" else 0) + (0 if self.qk_norm == "none" else 2 * (attended + keyed))
        mlp = (4 if self.mlp == "swiglu" else 2) * self.ffn_width
        return self._kept(length, 4 * self.hidden + 4 * attended + norms + mlp)


@models.register("modernbert")
class ModernBertConfig(LanguageModelConfig):
    """ModernBERT (Warner et al. 2024): rotary positions, GeGLU, every third block sees all tokens, the others near ones."""

    builder = "megapd.models.modernbert:build"

    kind: Literal["modernbert"] = "modernbert"
    layers: int = Field(6, ge=1, description="blocks of attention and MLP")
    ffn: int | None = Field(None, ge=1, description="width of the gated MLP; default 3/2 hidden, up to 64")
    global_every: int = Field(3, ge=1, description="every so many blocks, the first included, attend to all tokens")
    local_window: int = Field(128, ge=2, description="tokens that the others attend to: half before, half after")
    norm_eps: float = Field(1e-5, gt=0.0, description="added to what the norm divides by")
    global_theta: float = Field(160_000.0, gt=1.0, description="base of the rotary frequencies where all tokens are seen")
    local_theta: float = Field(10_000.0, gt=1.0, description="and where near ones are")
    restart_positions: bool = Field(False, description="count from 0 at each document, where task.document_mask keeps them apart")

    @model_validator(mode="after")
    def _fits(self) -> ModernBertConfig:
        if self.hidden % (2 * self.heads):
            raise problem(
                "heads", f"twice {self.heads} does not divide model.hidden {self.hidden}, and features turn in pairs", None
            )
        if self.local_window % 2:
            raise problem("local_window", f"{self.local_window} has no halves; make it even", self.local_window)
        return self

    @property
    def ffn_width(self) -> int:
        return self.ffn if self.ffn is not None else -(-3 * self.hidden // (2 * 64)) * 64

    @property
    def causal(self) -> bool:
        return False

    def seen(self, layer: int, length: int) -> int:
        """Tokens that one in the middle of a row attends to."""
        return length if layer % self.global_every == 0 else min(length, self.local_window + 1)

    def flops_per_token(self, *, classes: int, length: int, labelled_share: float) -> float:
        """3 * (sum over layers of (8 D^2 + 6 D F + 4 D K) + s * (2 D V + 2 D^2)), with D hidden, F ffn, V classes, s
        labelled_share, and K the tokens that the layer attends to: all, or the window, as far as the row is that long."""
        keys = sum(self.seen(layer, length) for layer in range(self.layers))
        blocks = self.layers * (8.0 * self.hidden**2 + 6.0 * self.hidden * self.ffn_width) + 4.0 * self.hidden * keys
        return 3.0 * (blocks + labelled_share * (2.0 * self.hidden * classes + 2.0 * self.hidden**2))

    def activations(self, length: int) -> int:
        """With a fused attention a layer keeps its input, the residual and both norms' results (4 D), queries and keys before and
        after the rotation, values and what attention gives (6 D), and the MLP's products and what comes of them (4 F)."""
        return self._kept(length, 10 * self.hidden + 4 * self.ffn_width)
