"""Pretrained: a model of transformers as a teacher, without the logits of positions that nobody asked about.

Its output layer is replaced by one that takes the labelled rows of what it is given: these are the final hidden states, all
that a language model's head multiplies (for BERT what comes after its transform). transformers is imported where it is
needed, for that takes seconds.
"""

from __future__ import annotations

import pickle
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.module import register_module_parameter_registration_hook

from megapd.batch import Batch
from megapd.errors import UserError
from megapd.models.attention import dense_mask, padding_apart, padding_of
from megapd.models.sharding import allocate, whole_shape
from megapd.models.weights import stored_tensors
from megapd.slices import Part, take
from megapd_kernels.compat.conventions import logit_shape

PROBE_LOGIT = 64.0  # as large as logits get: a soft cap of 30 makes 29.2 of it
PROBE_TOKENS = 4  # of each of two documents

# Masked and causal models whose first token stands at position padding_idx + 1: fairseq's heritage (Ott et al. 2019). A test
# compares the list with transformers'.
_OFFSET = ("camembert", "data2vec-text", "esm", "ibert", "longformer", "luke", "mpnet", "roberta", "roberta-prelayernorm")
OFFSET_POSITIONS = (*_OFFSET, "xlm-roberta", "xlm-roberta-xl", "xmod")
_PADDING = 1  # their padding_idx, where config.json does not say
_RENAMED = {"lm_head.weight": "embed_out.weight"}  # GPT-NeoX's head in published files: transformers 5 calls it as others do
_WINDOWS = ("sliding_window", "attention_chunk_size")


def logit_form(config_json: Mapping[str, Any]) -> tuple[float, float | None]:
    """(scale, soft cap) that the model that a config.json describes applies to its head's logits; 1 and None: nothing.

    transformers fills in what the file leaves out. Raises UserError for a cap under a name that is not known.
    """
    return _form(_configuration(config_json).get_text_config())


def _form(text: Any) -> tuple[float, float | None]:
    try:
        return logit_shape(SimpleNamespace(**text.to_dict()))
    except ValueError as error:
        raise UserError(f"teacher.trajectory: {error}; choose another teacher") from error


def max_length(config_json: Mapping[str, Any]) -> int | None:
    """Tokens a sample at most of the model that a config.json describes; None: no limit that it tells."""
    positions = config_json.get("max_position_embeddings", config_json.get("n_positions"))
    if not isinstance(positions, int):
        return None
    padding = config_json.get("pad_token_id")
    offset = 1 + (_PADDING if padding is None else padding) if config_json.get("model_type") in OFFSET_POSITIONS else 0
    return positions - offset


class OutputLayer(nn.Module):
    """Stands for an output layer and owns its weight [V, D] and bias [V] or None, under their old names.

    It notes the hidden states that it gets. What it returns is for the network's forward alone, and not of the size of logits
    unless `answer` says so.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.hidden: Tensor | None = None
        self.answer: Tensor | Literal["nothing", "logits"] = "nothing"

    def forward(self, hidden: Tensor, mode: Literal["note", "logits"] = "note") -> Tensor:
        """note: [.., D] -> [.., 1], or the logits [.., V], or the tensor [V] that `answer` is at every position.

        logits: [.., D] -> [.., V] and nothing noted; through a call, so that ZeRO-3's hooks gather the weight.
        """
        if mode == "note":
            self.hidden = hidden
            if isinstance(self.answer, Tensor):
                return self.answer.expand(*hidden.shape[:-1], -1).clone()
            if self.answer == "nothing":
                return hidden[..., :1]
        return F.linear(hidden, self.weight, self.bias)


class Pretrained(nn.Module):
    """A causal or masked language model of transformers with the interface of a Learner: batch -> hidden states or logits.

    One forward at a time: the output layer keeps what it is given until the network returns.

    network   the model, its output layer replaced
    causal    whether a position sees only those before it
    """

    def __init__(self, network: Any, causal: bool) -> None:
        """network: a PreTrainedModel with a language modelling head; it is changed. Raises UserError for other models."""
        super().__init__()
        self.network, self.causal = network, causal
        self.kind: str = network.config.model_type
        output = network.get_output_embeddings()
        if type(output) is not nn.Linear:
            what = "no output layer" if output is None else f"a {type(output).__name__} for its output layer"
            raise UserError(f"teacher.trajectory: {self.kind} has {what}, not a linear one; choose another model")
        (self._head_name,) = [name for name, module in network.named_modules() if module is output]
        owner, _, leaf = self._head_name.rpartition(".")
        setattr(network.get_submodule(owner), leaf, OutputLayer(output))
        self._mask_form: str | None = None
        self._hides_padding = False  # not known yet
        text = network.config.get_text_config()
        self.max_length = max_length(text.to_dict())
        self.logit_scale, self.soft_cap = _form(text)
        windows = [getattr(text, name, None) for name in _WINDOWS if getattr(text, "use_sliding_window", True) is not False]
        self._window = min((size for size in windows if isinstance(size, int)), default=None)
        self.requires_grad_(False).eval()

    @property
    def head(self) -> OutputLayer:
        """The output layer: weight [V, D], bias [V] or None, or what a rank has of them."""
        head: OutputLayer = self.network.get_submodule(self._head_name)
        return head

    def forward(self, batch: Batch, mode: Literal["hidden", "logits"] = "hidden") -> Tensor:
        """mode hidden -> final hidden states [N, D]; logits -> [N, V], or a rank's classes of them; N labelled positions. What
        the head makes of hidden states is not `shaped`: the loss does that, by the teacher's scale and cap.

        Raises UserError for samples longer than the model's positions, and for a batch with segments or padding if the
        architecture does not keep documents, or padding, apart: the first such batch is preceded by a few tiny ones that find
        out.
        """
        hidden = self._run(batch.ids, self._mask_of(batch))
        if batch.labelled != batch.tokens:
            hidden = hidden.index_select(0, batch.positions)
        return hidden if mode == "hidden" else self.shaped(self.head(hidden, mode="logits"))

    def shaped(self, logits: Tensor) -> Tensor:
        """What the architecture makes of its head's logits: scaled (Cohere, Granite), then capped (Gemma)."""
        if self.logit_scale != 1.0:
            logits = logits * self.logit_scale
        return logits if self.soft_cap is None else self.soft_cap * torch.tanh(logits / self.soft_cap)

    def _run(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        """Final hidden states [B * L, D] of all positions."""
        if self.max_length is not None and ids.shape[1] > self.max_length:
            raise UserError(
                f"teacher.trajectory: {self.kind} has {self.max_length} positions, but samples have {ids.shape[1]} tokens; "
                "shorten corpus.block_length, or choose another teacher"
            )
        self._network_logits(ids, mask, "nothing")
        return self._take_hidden(ids)

    def _network_logits(self, ids: Tensor, mask: Tensor | None, answer: Tensor | Literal["nothing", "logits"]) -> Tensor:
        head = self.head
        head.answer = answer
        try:
            logits: Tensor = self.network(input_ids=ids, attention_mask=mask).logits
            return logits
        finally:
            head.answer = "nothing"

    def _take_hidden(self, ids: Tensor) -> Tensor:
        hidden, self.head.hidden = self.head.hidden, None
        if hidden is None or hidden.shape[:-1].numel() != ids.numel():
            what = "does not give every position to its output layer"
            raise UserError(f"teacher.trajectory: {self.kind} {what}; choose another model")
        return hidden.flatten(0, -2)

    def _apply(self, fn: Any, recurse: bool = True) -> Pretrained:
        """Casts parameters alone: rotary frequencies that were rounded to half precision would turn later positions wrongly."""
        kept = [(module, name, b) for module in self.modules() for name, b in module._buffers.items() if b is not None]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for module, name, buffer in kept:
            now = module._buffers[name]
            if now is not None and now.dtype != buffer.dtype:
                module._buffers[name] = buffer.to(now.device)
        return self

    # ------------------------------------------------------------------------------------------------ documents and padding

    def _mask_of(self, batch: Batch) -> Tensor | None:
        if batch.segments is not None:
            return self._document_mask(padding_apart(batch.segments, batch.lengths))
        if batch.lengths is None or self.causal:  # padding comes last
            return None
        if not self._hides_padding:
            self._check_padding(batch.ids.device)
        return (~padding_of(batch.ids, batch.lengths)).long()

    @torch.no_grad()
    def _check_padding(self, device: torch.device) -> None:
        """That a change of the padding does not move a bit of the tokens before it."""
        ids, first = self._probe(device)
        mask = first.long()[None]
        found = [self._run(torch.where(first, ids, other), mask)[first] for other in (ids, ids.flip(1))]
        if not torch.equal(*found):
            what = f"{self.kind} does not leave the padding of rows of several lengths out"
            raise UserError(f"teacher.trajectory: {what}; choose another teacher, or corpus.packing: concatenate")
        self._hides_padding = True

    def _probe(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Ids [1, L] that mean nothing to the model, and which places [L] are the first half's."""
        length = 2 * PROBE_TOKENS
        if self.max_length is not None:
            length = min(length, self.max_length)
        vocab = self.network.get_input_embeddings().num_embeddings
        # The highest ids, since special ones are low: a padding token moves the positions of RoBERTa's other tokens.
        return (-1 - torch.arange(length, device=device))[None] % vocab, torch.arange(length, device=device) < length // 2

    def _document_mask(self, segments_BL: Tensor) -> Tensor:
        if self._window is not None and segments_BL.shape[1] > self._window:
            raise UserError(
                f"task.document_mask: {self.kind} attends within {self._window} tokens, which a document mask would replace; "
                "set task.document_mask=false, or shorten corpus.block_length"
            )
        self._mask_form = self._mask_form or self._find_mask_form(segments_BL.device)
        return self._mask(segments_BL, self._mask_form)

    def _mask(self, segments_BL: Tensor, form: str) -> Tensor:
        """True where query (row) and key (column) are of one document, as the architecture wants to be told.

        bool [B, 1, L, L] is what scaled dot product attention takes; additive what code that adds it to the scores does;
        0 and 1 [B, L, L] what transformers' BERT turned into an additive one before release 5.
        """
        seen_B1LL = dense_mask(segments_BL, causal=self.causal)
        if form == "bool":
            return seen_B1LL
        dtype = next(p.dtype for p in self.parameters() if p.is_floating_point())
        if form == "additive":
            zero = torch.zeros((), dtype=dtype, device=seen_B1LL.device)
            return torch.where(seen_B1LL, zero, torch.finfo(dtype).min)
        return seen_B1LL.squeeze(1).to(dtype)

    @torch.no_grad()
    def _find_mask_form(self, device: torch.device) -> str:
        failures = []
        for form in ("bool", "additive", "0 and 1"):
            if (failure := self._mask_failure(form, device)) is None:
                return form
            failures.append(f"{form}: {failure}")
        fix = "set task.document_mask=false, or choose another teacher"
        raise UserError(f"task.document_mask: {self.kind} does not keep documents apart ({'; '.join(failures)}); {fix}")

    def _mask_failure(self, form: str, device: torch.device) -> str | None:
        """Why masks of this form do not do, None if they do: a change in one document must not move a bit of another, and a
        mask that hides nothing must change nothing."""
        ids, first = self._probe(device)
        vocab = self.network.get_input_embeddings().num_embeddings
        documents = self._mask(torch.where(first, 0, 1)[None], form)
        try:
            plain, open_ = self._run(ids, None), self._run(ids, self._mask(torch.zeros_like(ids), form))
            apart = self._run(ids, documents)
            changed = [self._run(torch.where(which, (ids - PROBE_TOKENS) % vocab, ids), documents) for which in (first, ~first)]
        except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
            return " ".join(str(error).split())[:100]
        scale = plain.abs().max().item()
        if not (open_ - plain).abs().max().item() <= 16 * torch.finfo(plain.dtype).eps * scale:
            return "a mask that hides nothing changes the output"
        for other, which in zip(changed, (first, ~first), strict=True):
            if not torch.equal(other[~which], apart[~which]):
                return "a document sees another"
        return None


@torch.no_grad()
def check_head(model: Pretrained, batch: Batch) -> None:
    """That the model's own logits are those of its head: hidden @ weight.T + bias, then its scale and cap, and nothing else.

    batch: small, for logits of all its positions are formed; all ranks that share the model check at once, and where classes are
    split each checks its own. Compared twice: with the model's weights, within 2^-5 of the largest logit (bf16), 2^-8 (fp16) or
    1e-5 (fp32), and with made-up logits of up to 64 in the head's place, which must come out as they are: a soft cap of 30 moves
    logits of 1 by 0.04 % only. Raises UserError that names the architecture and, if its configuration tells, what it does.
    """
    head = model.head
    own = model._network_logits(batch.ids, None, "logits").flatten(0, -2)
    hidden = model._take_hidden(batch.ids)
    wanted = model.shaped(head(hidden, mode="logits")).float()
    probe = torch.linspace(-PROBE_LOGIT, PROBE_LOGIT, wanted.shape[1], device=wanted.device).to(hidden.dtype)
    answered = model._network_logits(batch.ids, None, probe)
    model._take_hidden(batch.ids)
    tolerance = {torch.bfloat16: 2.0**-5, torch.float16: 2.0**-8}.get(hidden.dtype, 1e-5) * wanted.abs().max().item()
    near = own.shape == wanted.shape and (own.float() - wanted).abs().max().item() <= tolerance
    expected = model.shaped(probe).float().expand_as(answered)
    # Untouched they come out as they are; scaled or capped, in whatever type and order the architecture computes.
    exact = model.logit_scale == 1.0 and model.soft_cap is None
    slack = 0.0 if exact else {torch.bfloat16: 2.0**-6, torch.float16: 2.0**-9}.get(hidden.dtype, 1e-6) * PROBE_LOGIT
    if not near or not (answered.float() - expected).abs().max().item() <= slack:
        known = f"scale {model.logit_scale:g}, cap {model.soft_cap}"
        what = f"changes its logits after the head otherwise than its config.json says ({known})"
        raise UserError(f"teacher.trajectory: {model.kind} {what}; choose another teacher")


# --------------------------------------------------------------------------------------------------------------- building


def _configuration(config_json: Mapping[str, Any]) -> Any:
    """transformers' configuration of a config.json; UserError where it has none of that model_type, or refuses it."""
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = config_json.get("model_type")
    if kind not in CONFIG_MAPPING:
        raise UserError(f"teacher.trajectory: transformers {transformers.__version__} has no model_type {kind!r}; upgrade it")
    try:
        return CONFIG_MAPPING[kind].from_dict({k: v for k, v in config_json.items() if k != "quantization_config"})
    except Exception as error:  # transformers checks configurations with exceptions of several libraries
        raise UserError(f"teacher.trajectory: config.json of {kind}: {' '.join(str(error).split())[:200]}") from error


def build_pretrained(config_json: Mapping[str, Any], dtype: torch.dtype, device: torch.device) -> Pretrained:
    """The model that a config.json describes, its weights uninitialised: to be filled from `read_pretrained`.

    Parameters are of `dtype` on `device`, which may be meta; buffers have their contents, and are on the host then. Raises
    UserError for architectures that transformers has no causal or masked language model of, or only with code from the hub.
    """
    import transformers
    from transformers.models.auto import modeling_auto

    config, kind = _configuration(config_json), config_json.get("model_type")
    if "quantization_config" in config_json or getattr(config, "is_encoder_decoder", False):
        what = "quantized weights" if "quantization_config" in config_json else "an encoder and a decoder"
        raise UserError(f"teacher.trajectory: {kind} with {what} is not supported; choose another model")
    causal = _is_causal(config, modeling_auto)
    if causal is None:
        raise UserError(f"teacher.trajectory: transformers has no language model of model_type {kind!r}; choose another model")
    config.use_cache = False
    auto = transformers.AutoModelForCausalLM if causal else transformers.AutoModelForMaskedLM
    with _parameters_on_meta():
        try:
            network = auto.from_config(config, attn_implementation="sdpa")
        except ValueError as error:
            if "scaled_dot_product_attention" not in str(error):
                raise
            network = auto.from_config(config, attn_implementation="eager")
    for parameter in network.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    _promote_buffers(network)
    model = Pretrained(network, causal)
    return model if device.type == "meta" else allocate(model, device)  # type: ignore[return-value]


def _is_causal(config: Any, auto: Any) -> bool | None:
    """Whether to build its causal model (True) or its masked one; None: it has neither."""
    causal = config.model_type in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    masked = config.model_type in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    if causal and masked:  # BERT and its kin have both; published files say which, or are masked models without a head named
        named = " ".join(config.architectures or ())
        return "CausalLM" in named or "LMHeadModel" in named or bool(getattr(config, "is_decoder", False))
    return causal if causal or masked else None


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Parameters that this thread registers go to the meta device at once; buffers keep what the constructors compute.

    Under torch.device("meta") the buffers would be lost, and without it memory and time go to weights that are to be replaced.
    The constructors' torch.empty for a parameter costs nothing, since none of its pages is touched.
    """
    thread = threading.get_ident()

    def to_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or parameter.is_meta or threading.get_ident() != thread:
            return None  # as it is
        return nn.Parameter(parameter.detach().to("meta"), requires_grad=False)

    handle = register_module_parameter_registration_hook(to_meta)  # type: ignore[arg-type] # its type says that hooks return None
    try:
        yield
    finally:
        handle.remove()


def _promote_buffers(network: nn.Module) -> None:
    """Buffers that files hold and that are no integers become parameters, so that they are read, swapped and split like them."""
    for module in network.modules():
        for name, buffer in list(module._buffers.items()):
            if buffer is not None and buffer.is_floating_point() and name not in module._non_persistent_buffers_set:
                del module._buffers[name]
                module.register_parameter(name, nn.Parameter(buffer, requires_grad=False))


# ---------------------------------------------------------------------------------------------------------------- reading


def read_pretrained(model: nn.Module, folder: Path, wanted: Mapping[str, Part]) -> dict[str, Tensor]:
    """The parts of the folder's tensors that `wanted` asks for, by the names of the model's parameters; on the host, as stored.

    model: a Pretrained, also one that is sharded. Of safetensors files only those parts are read. A name may be stored with or
    without the base model's prefix, and a shared weight under any of its names. Files that torch.save wrote are mapped into
    memory where their format allows, and what has another name by now is left to transformers, which loads the whole model;
    neither runs code from a file. Raises UserError for tensors that are missing, or not of the model's shape.
    """
    names = _stored_names(model, wanted)
    shapes = {name: whole_shape(parameter) for name, parameter in model.named_parameters()}
    found: dict[str, Tensor] = {}
    for path, stored, source in stored_tensors(folder):
        own = names.get(stored)
        if own is None:
            continue
        shape = tuple(source.shape if isinstance(source, Tensor) else source.get_shape())
        if shape != shapes[own]:
            raise UserError(f"{path}: {stored} has shape {shape}, but config.json asks for {shapes[own]}; is it this model's?")
        tensor = take(source, wanted[own])
        if own in found and not torch.equal(tensor, found[own]):
            fix = "set tie_word_embeddings to false in config.json"
            raise UserError(f"{path}: {stored} differs from the tensor it is tied to; {fix}")
        # A view of a mapped file would keep all of it.
        found.setdefault(own, tensor.clone() if isinstance(source, Tensor) else tensor)
    return found if found.keys() == wanted.keys() else _read_renamed(model, folder, wanted, shapes)


def _stored_names(model: Any, wanted: Mapping[str, Part]) -> dict[str, str]:
    """Names that files may have -> the parameter's. Exact names go before the variants of others."""
    prefix = f"{model.network.base_model_prefix}."
    first: dict[int, str] = {}
    exact: dict[str, str] = {}
    for alias, parameter in model.named_parameters(remove_duplicate=False):
        own = first.setdefault(id(parameter), alias)
        if own in wanted:
            exact[alias.removeprefix("network.")] = own
    names = dict(exact)
    for alias, own in exact.items():
        names.setdefault(_RENAMED.get(alias, alias), own)
    for alias, own in exact.items():
        for variant in (alias, alias.removeprefix(prefix), prefix + alias):
            names.setdefault(variant, own)
            # Layer norms in TensorFlow's words, as in BERT's published files.
            for new, old in (("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta")):
                if variant.endswith(new):
                    names.setdefault(variant.removesuffix(new) + old, own)
    return names


def _read_renamed(
    model: Any, folder: Path, wanted: Mapping[str, Part], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Tensor]:
    """What `read_pretrained` returns, from the whole model as transformers loads it: it knows the names of older releases."""
    import transformers

    auto = transformers.AutoModelForCausalLM if model.causal else transformers.AutoModelForMaskedLM
    try:
        network, report = auto.from_pretrained(folder, output_loading_info=True, local_files_only=True)
    except (OSError, ValueError, RuntimeError, pickle.UnpicklingError) as error:
        raise UserError(f"{folder}: transformers cannot load it: {' '.join(str(error).split())[:300]}") from error
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise UserError(f"{folder}: {len(missing)} tensors are missing, e.g. {missing[0]}; save the model with its head")
    tensors = dict(network.named_parameters(remove_duplicate=False)) | dict(network.named_buffers())
    found = {}
    for own, part in wanted.items():
        tensor = tensors[own.removeprefix("network.")].detach()
        if tensor.shape != shapes[own]:
            raise UserError(f"{folder}: {own} has shape {tuple(tensor.shape)}, but config.json asks for {shapes[own]}")
        found[own] = take(tensor, part).clone()
    return found
