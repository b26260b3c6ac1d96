"""Hugging Face in and out: the file layouts of GPT2LMHeadModel and BertForMaskedLM.

A folder holds config.json and the weights: model.safetensors, or shards named by model.safetensors.index.json, or (read
only) the same as pytorch_model.bin. Both directions walk one table, `_links`: each of our parameters, seen through a
view in their layout, is copied to or from. Models of other architectures are pretrained.py's, for teaching alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import ValidationError
from safetensors.torch import save_file
from torch import Tensor

from megapd.config import ModelConfig, TransformerConfig
from megapd.errors import UserError
from megapd.files import commit_folder, temporary_folder
from megapd.models.build import Learner, build_model
from megapd.models.transformer import LAYER_NORM_EPS, TOKEN_TYPES, Transformer
from megapd.models.weights import read_json, stored_tensors
from megapd.slices import take
from megapd_kernels import LossOptions

# config.json: our setting -> theirs, by kind.
_SIZES = {
    "gpt": {"layers": "n_layer", "heads": "n_head", "hidden": "n_embd", "ffn": "n_inner", "max_length": "n_positions"},
    "bert": {
        "layers": "num_hidden_layers",
        "heads": "num_attention_heads",
        "hidden": "hidden_size",
        "ffn": "intermediate_size",
        "max_length": "max_position_embeddings",
    },
}

# Options of theirs that change the function, with the values it has here; absent from config.json, an option has the
# first. reorder_and_upcast_attn is not among them: it changes the rounding alone.
_OPTIONS: dict[str, dict[str, tuple[Any, ...]]] = {
    "gpt": {
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
        "layer_norm_epsilon": (LAYER_NORM_EPS["gpt"],),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
    },
    "bert": {
        "hidden_act": ("gelu",),
        "layer_norm_eps": (LAYER_NORM_EPS["bert"],),
        "position_embedding_type": ("absolute",),
        "type_vocab_size": (TOKEN_TYPES,),
        "is_decoder": (False,),
        "add_cross_attention": (False,),
    },
}
_DROPOUT = {"gpt": ("resid_pdrop", "embd_pdrop", "attn_pdrop"), "bert": ("hidden_dropout_prob", "attention_probs_dropout_prob")}
_MODEL_TYPE = {"gpt": "gpt2", "bert": "bert"}
_ARCHITECTURE = {"gpt": "GPT2LMHeadModel", "bert": "BertForMaskedLM"}
_BIAS, _DECODER_BIAS = "cls.predictions.bias", "cls.predictions.decoder.bias"
_HEAD = ("lm_head.weight", "cls.predictions.decoder.weight", _DECODER_BIAS)
_PREFIX = {"gpt": "transformer.", "bert": "bert."}


class _Link(NamedTuple):
    """theirs is `ours` transposed (Conv1D stores [in, out]), or the part-th third of its rows (query, key, value)."""

    theirs: str
    ours: str
    transposed: bool = False
    part: int | None = None

    def view(self, parameters: Mapping[str, Tensor]) -> Tensor:
        own = parameters[self.ours].detach()
        if self.part is not None:
            own = own.chunk(3)[self.part]
        return own.t() if self.transposed else own


def _links(model_config: TransformerConfig) -> list[_Link]:
    links: list[_Link] = []

    def pair(theirs: str, ours: str, transposed: bool = False, part: int | None = None) -> None:
        links.append(_Link(f"{theirs}.weight", f"{ours}.weight", transposed, part))
        links.append(_Link(f"{theirs}.bias", f"{ours}.bias", False, part))

    if model_config.kind == "gpt":
        links.append(_Link("transformer.wte.weight", "body.tokens.weight"))
        links.append(_Link("transformer.wpe.weight", "body.positions.weight"))
        for layer in range(model_config.layers):
            theirs, ours = f"transformer.h.{layer}", f"body.blocks.{layer}"
            pair(f"{theirs}.ln_1", f"{ours}.attention_norm")
            pair(f"{theirs}.attn.c_attn", f"{ours}.attention.qkv", transposed=True)
            pair(f"{theirs}.attn.c_proj", f"{ours}.attention.out", transposed=True)
            pair(f"{theirs}.ln_2", f"{ours}.ffn_norm")
            pair(f"{theirs}.mlp.c_fc", f"{ours}.up", transposed=True)
            pair(f"{theirs}.mlp.c_proj", f"{ours}.down", transposed=True)
        pair("transformer.ln_f", "body.norm")
        if not model_config.tied:
            links.append(_Link("lm_head.weight", "head.weight"))
        return links
    for theirs, ours in (("word", "tokens"), ("position", "positions"), ("token_type", "types")):
        links.append(_Link(f"bert.embeddings.{theirs}_embeddings.weight", f"body.{ours}.weight"))
    pair("bert.embeddings.LayerNorm", "body.norm")
    for layer in range(model_config.layers):
        theirs, ours = f"bert.encoder.layer.{layer}", f"body.blocks.{layer}"
        for part, projection in enumerate(("query", "key", "value")):
            pair(f"{theirs}.attention.self.{projection}", f"{ours}.attention.qkv", part=part)
        pair(f"{theirs}.attention.output.dense", f"{ours}.attention.out")
        pair(f"{theirs}.attention.output.LayerNorm", f"{ours}.attention_norm")
        pair(f"{theirs}.intermediate.dense", f"{ours}.up")
        pair(f"{theirs}.output.dense", f"{ours}.down")
        pair(f"{theirs}.output.LayerNorm", f"{ours}.ffn_norm")
    pair("cls.predictions.transform.dense", "transform.dense")
    pair("cls.predictions.transform.LayerNorm", "transform.norm")
    links.append(_Link(_BIAS, "head.bias"))
    if not model_config.tied:
        links.append(_Link("cls.predictions.decoder.weight", "head.weight"))
        links.append(_Link(_DECODER_BIAS, "head.bias"))
    return links


# ------------------------------------------------------------------------------------------------------------ reading


def load_hugging_face(folder: str | Path, options: LossOptions | None = None) -> tuple[TransformerConfig, Learner]:
    """A model that transformers (or `save_hugging_face`) saved, as (its configuration, a learner in fp32 on the CPU).

    options: the loss of the learner's head; the default's if None. Vocabulary and classes are config.json's vocab_size.
    Raises UserError for missing or damaged files, another architecture, and options that megapd's models do not have.
    """
    folder = Path(folder)
    settings = read_json(folder / "config.json")
    model_config, vocab_size = _model_config(settings, folder / "config.json")
    assert model_config.max_length is not None
    sizes = {"vocab_size": vocab_size, "classes": vocab_size, "length": model_config.max_length}
    learner = build_model(model_config, **sizes, options=options or LossOptions(), seed=0)
    _fill(learner, model_config, folder)
    return model_config, learner


def _model_config(settings: dict[str, Any], path: Path) -> tuple[TransformerConfig, int]:
    kinds = {model_type: kind for kind, model_type in _MODEL_TYPE.items()}
    kind = kinds.get(settings.get("model_type", ""))
    if kind is None:
        raise UserError(f"{path}: model_type {settings.get('model_type')!r} is not supported; use a gpt2 or bert model")
    for option, allowed in _OPTIONS[kind].items():
        if settings.get(option, allowed[0]) not in allowed:
            raise UserError(f"{path}: {option} {settings[option]!r} is not supported; megapd's {kind} has {allowed[0]!r}")
    sizes = {ours: settings.get(theirs) for ours, theirs in _SIZES[kind].items()}
    missing = [_SIZES[kind][ours] for ours, size in sizes.items() if size is None and not (kind == "gpt" and ours == "ffn")]
    if "vocab_size" not in settings:
        missing.append("vocab_size")
    if missing:
        raise UserError(f"{path}: {missing[0]} is missing; save the model again with save_pretrained")
    vocab_size = settings["vocab_size"]
    if not isinstance(vocab_size, int) or vocab_size < 1:
        raise UserError(f"{path}: vocab_size must be a positive integer, got {vocab_size!r}")
    try:
        return TransformerConfig(kind=kind, tied=settings.get("tie_word_embeddings", True), **sizes), vocab_size
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{path}: {'.'.join(map(str, first['loc'])) or 'sizes'}: {first['msg']}") from error


@torch.no_grad()
def _fill(learner: Learner, model_config: TransformerConfig, folder: Path) -> None:
    """Copy the folder's tensors over the learner's; each of ours must come, and each of theirs have its place."""
    parameters = dict(learner.named_parameters())
    views = {link.theirs: link.view(parameters) for link in _links(model_config)}
    missing = set(views)
    twice: dict[str, Tensor] = {}  # the head's, where the files hold it as well as what it is tied to
    for path, stored, source in stored_tensors(folder):
        name = _canonical(stored, model_config)
        if name is None:
            continue
        tensor = take(source, None)
        if name in _HEAD and (model_config.tied or name == _DECODER_BIAS):
            twice[name] = tensor
            continue
        if name not in views:
            raise UserError(f"{path}: tensor {stored} has no place in megapd's {model_config.kind}; is config.json this model's?")
        if tensor.shape != views[name].shape:
            shapes = f"{tuple(tensor.shape)}, but config.json asks for {tuple(views[name].shape)}"
            raise UserError(f"{path}: {stored} has shape {shapes}; is config.json this model's?")
        views[name].copy_(tensor)
        missing.discard(name)
    if model_config.tied:
        _check_tied(learner, twice, folder)
    elif _DECODER_BIAS in twice:
        # After the files, whatever their order: untied, transformers adds this bias and leaves the other one unused.
        views[_DECODER_BIAS].copy_(twice[_DECODER_BIAS])
        missing -= {_BIAS, _DECODER_BIAS}
    elif _BIAS not in missing:
        missing.discard(_DECODER_BIAS)
    if missing:
        raise UserError(f"{folder}: {len(missing)} tensors are missing, e.g. {min(missing)}; save the model with its head")


def _check_tied(learner: Learner, copies: dict[str, Tensor], folder: Path) -> None:
    """Files of a tied model may hold its head as well; were it another, the model would not be the one they describe."""
    for name, copy in copies.items():
        own = learner.head.bias if name.endswith("bias") else learner.head.weight
        assert own is not None
        if copy.shape != own.shape or not torch.equal(copy.to(own.dtype), own):
            raise UserError(
                f"{folder}: {name} differs from the tensor it is tied to; set tie_word_embeddings to false in config.json"
            )


def _canonical(stored: str, model_config: TransformerConfig) -> str | None:
    """The name in today's layout of a stored tensor; None for buffers and heads that megapd does not have."""
    name = stored
    if name.endswith((".gamma", ".beta")):  # BERT's layer norms in TensorFlow's words, as in the published files
        name = name.removesuffix(".gamma").removesuffix(".beta") + (".weight" if name.endswith(".gamma") else ".bias")
    heads = ("lm_head.", "cls.")
    if not name.startswith((_PREFIX[model_config.kind], *heads)):
        name = _PREFIX[model_config.kind] + name  # saved from the bare body
    unused = (".attn.bias", ".attn.masked_bias", "embeddings.position_ids", "embeddings.token_type_ids")
    if name.endswith(unused) or name.startswith(("bert.pooler.", "cls.seq_relationship.")):
        return None
    return name


# ------------------------------------------------------------------------------------------------------------ writing


def save_hugging_face(
    learner: Learner,
    model_config: ModelConfig,
    folder: str | Path,
    *,
    shard_bytes: int = 5 << 30,
    special_tokens: Mapping[str, int] | None = None,
    beside: Mapping[str, bytes] | None = None,
) -> None:
    """Write the learner so that transformers' from_pretrained reads it: config.json and safetensors, in its dtype.

    shard_bytes: most bytes of a file, larger tensors excepted; several files get an index. special_tokens: ids for
    config.json, e.g. {"pad_token_id": 0, "eos_token_id": 1}. beside: contents of further files by name. The folder appears
    whole or not at all.
    Raises UserError for an mlp, a head with other classes than tokens, and a folder that exists and is not empty.
    """
    folder = Path(folder)
    body = learner.body
    if not isinstance(model_config, TransformerConfig) or not isinstance(body, Transformer):
        raise UserError(f"model.kind: an {model_config.kind} has no Hugging Face layout; export a gpt or bert")
    vocab_size, classes = body.tokens.num_embeddings, learner.head.weight.shape[0]
    if classes != vocab_size:
        raise UserError(f"model: {classes} classes over {vocab_size} tokens have no Hugging Face layout; export a language model")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: exists already; remove it or choose another folder")
    parameters = dict(learner.named_parameters())
    assert all(p.numel() for p in parameters.values()), "partitioned by ZeRO-3: load the trajectory into a fresh learner"

    with temporary_folder(folder) as temporary:
        config = _settings(model_config, body, learner.head.weight.dtype, special_tokens or {})
        (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        _write_weights(_links(model_config), parameters, temporary, shard_bytes)
        for name, data in (beside or {}).items():
            (temporary / name).write_bytes(data)
        commit_folder(temporary, folder)


def _settings(
    model_config: TransformerConfig, body: Transformer, dtype: torch.dtype, special_tokens: Mapping[str, int]
) -> dict[str, Any]:
    kind = model_config.kind
    sizes = {**model_config.model_dump(), "ffn": model_config.ffn_width, "max_length": body.positions.num_embeddings}
    return {
        "architectures": [_ARCHITECTURE[kind]],
        "model_type": _MODEL_TYPE[kind],
        "vocab_size": body.tokens.num_embeddings,
        **{theirs: sizes[ours] for ours, theirs in _SIZES[kind].items()},
        **{option: allowed[0] for option, allowed in _OPTIONS[kind].items()},
        **dict.fromkeys(_DROPOUT[kind], 0.0),
        "tie_word_embeddings": model_config.tied,
        "torch_dtype": str(dtype).removeprefix("torch."),
        # Not left to transformers' defaults, which are ids of the published vocabularies.
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),
        **special_tokens,
    }


def _write_weights(links: list[_Link], parameters: Mapping[str, Tensor], folder: Path, shard_bytes: int) -> None:
    shards: list[list[_Link]] = [[]]
    filled = total = 0
    for link in links:
        size = link.view(parameters).nbytes
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(link)
        filled, total = filled + size, total + size
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        # Copies: safetensors takes neither views of shared storage nor transposed ones. One shard of them at a time.
        tensors = {
            link.theirs: link.view(parameters).to("cpu", copy=True, memory_format=torch.contiguous_format) for link in shard
        }
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, name))
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
