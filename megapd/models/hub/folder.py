"""Hugging Face in and out: a folder holds config.json and the weights.

The weights are model.safetensors, or shards named by model.safetensors.index.json, or (read only) the same as
pytorch_model.bin. Both directions walk one table, the links of a layout: each of our parameters, seen through a view in their
layout, is copied to or from. Models of other architectures are pretrained.py's, for teaching alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import ValidationError
from safetensors.torch import save_file
from torch import Tensor

from megapd.config import LanguageModelConfig, ModelConfig
from megapd.errors import UserError
from megapd.files import commit_folder, temporary_folder
from megapd.models.build import Learner, build_model
from megapd.models.hub.gpt_bert import BERT, BIAS, DECODER, DECODER_BIAS, GPT2
from megapd.models.hub.layout import Layout, Link
from megapd.models.hub.llama import Decoder, GPTNeoX, OLMo2, Qwen3
from megapd.models.hub.modernbert import ModernBERT
from megapd.models.weights import read_json, stored_tensors
from megapd.slices import take
from megapd_kernels import LossOptions

LAYOUTS: tuple[Layout, ...] = (GPT2(), BERT(), Decoder(), Qwen3(), OLMo2(), GPTNeoX(), ModernBERT())
HEAD = ("lm_head.weight", "embed_out.weight", "decoder.weight", DECODER, DECODER_BIAS)  # what a tied model's files may hold twice


# ------------------------------------------------------------------------------------------------------------ reading


def load_hugging_face(folder: str | Path, options: LossOptions | None = None) -> tuple[LanguageModelConfig, Learner]:
    """A model that transformers (or `save_hugging_face`) saved, as (its configuration, a learner in fp32 on the CPU).

    options: the loss of the learner's head; the default's if None. Vocabulary and classes are config.json's vocab_size.
    Raises UserError for missing or damaged files, another architecture, and options that megapd's models do not have.
    """
    folder = Path(folder)
    own = described(read_json(folder / "config.json"), folder / "config.json")
    learner = build_model(own.section, **own.sizes, options=options or LossOptions(), seed=0)
    _fill(learner, own, folder)
    return own.section, learner


class OwnArchitecture(NamedTuple):
    """How a published model is one of megapd's: layout of its files, configuration, and sizes as build_model takes them."""

    layout: Layout
    section: LanguageModelConfig
    sizes: dict[str, int]


def described(settings: Mapping[str, Any], path: Path) -> OwnArchitecture:
    """The model that a config.json describes. Raises UserError if it is none of ours."""
    layout = next((layout for layout in LAYOUTS if layout.model_type == settings.get("model_type")), None)
    if layout is None:
        known = ", ".join(layout.model_type for layout in LAYOUTS)
        raise UserError(f"{path}: model_type {settings.get('model_type')!r} is not supported; use one of {known}")
    layout.check_options(settings, path)
    if "vocab_size" not in settings:
        raise UserError(f"{path}: vocab_size is missing; save the model again with save_pretrained")
    vocab_size = settings["vocab_size"]
    if not isinstance(vocab_size, int) or vocab_size < 1:
        raise UserError(f"{path}: vocab_size must be a positive integer, got {vocab_size!r}")
    try:
        section = layout.section(settings, path)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{path}: {'.'.join(map(str, first['loc'])) or 'sizes'}: {first['msg']}") from error
    if section.max_length is None:
        raise UserError(f"{path}: max_position_embeddings is missing; save the model again with save_pretrained")
    return OwnArchitecture(layout, section, {"vocab_size": vocab_size, "classes": vocab_size, "length": section.max_length})


@torch.no_grad()
def _fill(learner: Learner, architecture: OwnArchitecture, folder: Path) -> None:
    """Copy the folder's tensors over the learner's; each of ours must come, and each of theirs have its place."""
    parameters = dict(learner.named_parameters())
    shapes = {name: tuple(p.shape) for name, p in parameters.items()}
    twice: dict[str, Tensor] = {}
    for link, source in linked(architecture, folder, shapes, twice):
        tensor = take(source, None)
        link.own(parameters).copy_(tensor if link.pick is None else link.pick(tensor))
    if architecture.section.tied:
        _check_tied(learner, twice, folder)


def linked(
    architecture: OwnArchitecture, folder: Path, shapes: Mapping[str, tuple[int, ...]], twice: dict[str, Tensor] | None = None
) -> Iterator[tuple[Link, Any]]:
    """Each link of a model with what the folder's files hold for it: a tensor, or a slice of an open file (see slices.take).

    shapes: of our parameters. twice: filled with the head's tensors of a tied model, where the files hold them as well as what
    they are tied to; None: they are not read. Raises UserError for a tensor without a place, of another shape, or missing; that
    after the last.
    """
    layout = architecture.layout
    empty = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    links: dict[str, list[Link]] = {}
    for link in layout.links(architecture.section):
        links.setdefault(link.theirs, []).append(link)
    missing = set(links)
    bias: Any = None
    for path, stored, source in stored_tensors(folder):
        name = layout.canonical(stored)
        if name is None:
            continue
        if name in HEAD and architecture.section.tied:
            if twice is not None:
                twice[name] = take(source, None)
            continue
        if name not in links:
            raise UserError(f"{path}: tensor {stored} has no place in megapd's {layout.kind}; is config.json this model's?")
        shape = tuple(source.shape if isinstance(source, Tensor) else source.get_shape())
        for link in links[name]:
            if shape != (wanted := link.their_shape(empty)):
                told = f"{shape}, but config.json asks for {wanted}"
                raise UserError(f"{path}: {stored} has shape {told}; is config.json this model's?")
            if name == DECODER_BIAS:  # untied, transformers adds this bias and leaves the other one unused, whatever their order
                bias = link, take(source, None)
            else:
                yield link, source
        missing.discard(name)
    if bias is not None:
        yield bias
        missing.discard(BIAS)
    elif BIAS not in missing:
        missing.discard(DECODER_BIAS)
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


# ------------------------------------------------------------------------------------------------------------ writing


def layout_of(section: ModelConfig) -> Layout:
    """The layout that a model of ours has in transformers. Raises UserError where there is none."""
    of_kind = [layout for layout in LAYOUTS if layout.kind == section.kind]
    if not of_kind:
        known = ", ".join(dict.fromkeys(layout.kind for layout in LAYOUTS))
        raise UserError(f"model.kind: an {section.kind} has no Hugging Face layout; export one of {known}")
    assert isinstance(section, LanguageModelConfig)  # as all that have a layout
    misfits = {layout.model_type: layout.misfit(section) for layout in of_kind}
    for layout in of_kind:
        if not misfits[layout.model_type]:
            return layout
    told = ", ".join(f"{name} has another model.{setting}" for name, setting in misfits.items())
    raise UserError(f"model: no architecture of transformers has these settings together: {told}")


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
    Raises UserError for a model without a layout, a head with other classes than tokens, and a folder that exists and is not
    empty.
    """
    folder, layout = Path(folder), layout_of(model_config)
    assert isinstance(model_config, LanguageModelConfig)
    tokens: Any = learner.body.tokens
    vocab_size, classes = tokens.num_embeddings, learner.head.weight.shape[0]
    if classes != vocab_size:
        raise UserError(f"model: {classes} classes over {vocab_size} tokens have no Hugging Face layout; export a language model")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: exists already; remove it or choose another folder")
    parameters = dict(learner.named_parameters())
    assert all(p.numel() for p in parameters.values()), "partitioned by ZeRO-3: load the trajectory into a fresh learner"

    with temporary_folder(folder) as temporary:
        config = {
            "architectures": [layout.architecture],
            "model_type": layout.model_type,
            "vocab_size": vocab_size,
            **layout.settings(model_config, learner),
            **{option: allowed[0] for option, allowed in layout.options.items()},
            "tie_word_embeddings": model_config.tied,
            "torch_dtype": str(learner.head.weight.dtype).removeprefix("torch."),
            # Not left to transformers' defaults, which are ids of the published vocabularies.
            **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),
            **(special_tokens or {}),
        }
        (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        _write_weights(layout.links(model_config), parameters, temporary, shard_bytes)
        for name, data in (beside or {}).items():
            (temporary / name).write_bytes(data)
        commit_folder(temporary, folder)


def _write_weights(links: list[Link], parameters: Mapping[str, Tensor], folder: Path, shard_bytes: int) -> None:
    tensors: dict[str, list[Link]] = {}
    for link in links:
        tensors.setdefault(link.theirs, []).append(link)
    shards: list[list[str]] = [[]]
    filled = total = 0
    for name, parts in tensors.items():
        size = sum(link.own(parameters).nbytes for link in parts)
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled, total = filled + size, total + size
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        # Copies: safetensors takes neither views of shared storage nor transposed ones. One shard of them at a time.
        save_file({name: _assembled(tensors[name], parameters) for name in shard}, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, file))
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _assembled(links: list[Link], parameters: Mapping[str, Tensor]) -> Tensor:
    """One of their tensors, of all that is linked to it, on the host."""
    first = links[0].own(parameters)
    out = torch.empty(links[0].their_shape(parameters), dtype=first.dtype)
    for link in links:
        (out if link.pick is None else link.pick(out)).copy_(link.own(parameters))
    return out
