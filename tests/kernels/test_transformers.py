"""Students and teachers of Gemma's, Cohere's and Granite's kind: transformers' own forward and torch's loss against the losses of
hidden states with a cap and a scale, both sides."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megapd_kernels import LossOptions, linear_softmax_kl
from megapd_kernels.compat import transformers as compat
from megapd_kernels.compat.conventions import head_of, logit_shape
from megapd_kernels.compat.trl import hidden_states_for_logits

from .cases import relative

transformers = pytest.importorskip("transformers")
V = 47
SHAPES: dict[str, dict[str, Any]] = {
    "Gemma2": {"final_logit_softcapping": 0.7, "head_dim": 8},
    "Cohere": {"logit_scale": 0.3},
    "Granite": {"logits_scaling": 3.0},
    "FalconH1": {"lm_head_multiplier": 0.4, "mamba_d_ssm": 16, "mamba_n_heads": 2, "mamba_d_head": 8, "mamba_chunk_size": 4},
    "Llama": {},
}


def model(kind: str, width: int, seed: int, settings: dict[str, Any] | None = None) -> Any:
    torch.manual_seed(seed)
    sizes = {"vocab_size": V, "hidden_size": width, "intermediate_size": 24, "num_hidden_layers": 2, "pad_token_id": 0}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2}
    built = getattr(transformers, f"{kind}ForCausalLM")(
        getattr(transformers, f"{kind}Config")(**sizes | (SHAPES[kind] if settings is None else settings))
    )
    with torch.no_grad():  # logits large enough for a cap of 0.7 to bend them
        built.get_output_embeddings().weight.mul_(20)
    return built.eval()


def parts(built: Any, ids: Tensor) -> tuple[Tensor, Tensor, float, float | None]:
    hidden = built.base_model(input_ids=ids).last_hidden_state
    return hidden, head_of(built)[0], *logit_shape(built.config.get_text_config())


def parameters(built: nn.Module) -> list[Tensor]:
    return [p for p in built.parameters() if p.requires_grad]


@pytest.mark.parametrize("student_kind", SHAPES)
@pytest.mark.parametrize("teacher_kind", SHAPES)
def test_distillation_equals_their_forward_and_torchs_loss(student_kind: str, teacher_kind: str) -> None:
    student, teacher = model(student_kind, 16, 0), model(teacher_kind, 32, 1)
    ids = torch.randint(3, V, (2, 7))
    with torch.no_grad():
        log_q = teacher(input_ids=ids).logits.float().log_softmax(-1)
        teacher_hidden, teacher_weight, teacher_scale, teacher_cap = parts(teacher, ids)
    log_p = student(input_ids=ids).logits.float().log_softmax(-1)
    wanted = F.kl_div(log_p, log_q, log_target=True, reduction="none").sum(-1).mean()
    expected = torch.autograd.grad(wanted, parameters(student))
    hidden, weight, scale, cap = parts(student, ids)
    options = LossOptions(logit_scale=scale, soft_cap=cap, teacher_logit_scale=teacher_scale, teacher_soft_cap=teacher_cap)
    loss = linear_softmax_kl(hidden, weight, teacher_hidden, teacher_weight, options=options).loss
    assert wanted > 0.01
    assert relative(loss, wanted) < 1e-5
    for value, want in zip(torch.autograd.grad(loss, parameters(student)), expected, strict=True):
        assert relative(value, want) < 2e-5


@pytest.mark.parametrize("kind", SHAPES)
def test_causal_lm_losses_equal_the_models_own(kind: str) -> None:
    built = model(kind, 16, 0)
    ids = torch.randint(3, V, (2, 7))
    labels = ids.clone()
    labels[0, :4] = -100
    for items in (None, torch.tensor(11)):
        wanted = built(input_ids=ids, labels=labels, num_items_in_batch=items).loss
        expected = torch.autograd.grad(wanted, parameters(built))
        hidden = built.base_model(input_ids=ids).last_hidden_state
        patched = compat.patch(model(kind, 16, 0))
        by_logits = patched(input_ids=ids, labels=labels, num_items_in_batch=items).loss
        by_hidden = compat.causal_lm_loss_from_hidden(built, hidden, labels, items)
        for loss, leaves in ((by_logits, parameters(patched)), (by_hidden, parameters(built))):
            assert relative(loss, wanted) < 1e-5
            for value, want in zip(torch.autograd.grad(loss, leaves), expected, strict=True):
                assert relative(value, want) < 2e-5


@pytest.mark.parametrize("kind", SHAPES)
def test_hidden_states_in_the_logits_places(kind: str) -> None:
    built = model(kind, 16, 0)
    ids = torch.randint(3, V, (2, 7))
    before = built(input_ids=ids).logits
    cap = logit_shape(built.config)[1]
    with hidden_states_for_logits(built):
        hidden = built(input_ids=ids).logits
        weight, bias = head_of(built)
    assert hidden.shape == (2, 7, 16)
    assert bias is None
    logits = hidden @ weight.T
    assert relative(logits if cap is None else cap * torch.tanh(logits / cap), before) < 1e-5
    assert torch.equal(built(input_ids=ids).logits, before)
    with pytest.raises(KeyError), hidden_states_for_logits(built):
        raise KeyError
    assert torch.equal(built(input_ids=ids).logits, before)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("RecurrentGemma", {"logits_soft_cap": 0.7, "lru_width": 16, "head_dim": 8, "block_types": ["recurrent", "attention"]}),
        ("NanoChat", {"final_logit_softcapping": 0.7}),
    ],
)
def test_caps_under_other_names(kind: str, settings: dict[str, Any]) -> None:
    """The loss of hidden states applies them; a model that caps always cannot give hidden states in its logits' places."""
    built = model(kind, 16, 0, settings)
    ids = torch.randint(3, V, (2, 7))
    wanted = built(input_ids=ids, labels=ids).loss
    hidden = built.base_model(input_ids=ids).last_hidden_state
    found = compat.causal_lm_loss_from_hidden(built, hidden, ids)
    assert logit_shape(built.config) == (1.0, 0.7)
    assert relative(found, wanted) < 1e-5
    assert abs(F.cross_entropy((hidden @ head_of(built)[0].T)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()) - wanted) > 0.1
    if kind == "RecurrentGemma":
        with (
            pytest.raises(ValueError, match=r"^model: RecurrentGemmaForCausalLM caps its logits"),
            hidden_states_for_logits(built),
        ):
            pass


def test_a_cap_or_a_head_of_an_unknown_kind_is_refused() -> None:
    built = model("Llama", 16, 0)
    built.config.last_logits_cap = 3.0
    with pytest.raises(ValueError, match=r"^model: its configuration caps logits by last_logits_cap"):
        logit_shape(built.config)
    built.set_output_embeddings(nn.Sequential(built.get_output_embeddings()))
    with pytest.raises(ValueError, match=r"^model: its head is a Sequential, not a torch.nn.Linear"):
        head_of(built)
    biased = model("Cohere", 16, 0)
    biased.get_output_embeddings().bias = nn.Parameter(torch.zeros(V))
    with (
        pytest.raises(ValueError, match=r"^model: CohereForCausalLM scales its logits and their bias"),
        hidden_states_for_logits(biased),
    ):
        pass


def test_a_model_without_a_head_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^model: LlamaModel has no output embedding"):
        head_of(model("Llama", 16, 0).base_model)
