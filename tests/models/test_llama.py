"""The decoders of today: equal to transformers' models both ways, documents, positions, sharing of keys, and the usual."""

from __future__ import annotations

import json

import pytest
import torch
import transformers

from megapd.config import LlamaConfig
from megapd.errors import UserError
from megapd.models import build_model, load_hugging_face, save_hugging_face
from megapd.models.attention import within_documents
from megapd.models.layers import RMSNorm
from megapd_kernels import LossOptions

from .sequences import assert_documents_alone, assert_same, documents, gradients, logits, spread

VOCAB, LENGTH = 90, 12
IDS = torch.randint(VOCAB, (3, LENGTH), generator=torch.Generator().manual_seed(5))
SIZES = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
NONE = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None, "max_position_embeddings": 16}
MODELS = {
    "llama": {"num_key_value_heads": 2, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    "llama-tied": {"num_key_value_heads": 1, "tie_word_embeddings": True, "head_dim": 16},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 16},
    "olmo2": {"num_key_value_heads": 2},
    "gpt_neox": {},
    "gpt_neox-serial": {"use_parallel_residual": False, "tie_word_embeddings": True},
}
OURS = {
    "llama": {"kv_heads": 2},
    "pythia": {"mlp": "gelu", "norm": "layer", "parallel": True, "biases": True, "rotary_share": 0.25},
    "olmo2": {"qk_norm": "whole", "norm_place": "after", "kv_heads": 2},
    "qwen3": {"qk_norm": "head", "head_size": 16, "tied": True},
}


def theirs(name):
    kind = name.partition("-")[0]
    config = transformers.AutoConfig.for_model(kind, **SIZES, **NONE, **MODELS[name])
    model = transformers.AutoModelForCausalLM.from_config(config)
    return spread(model, 11).eval()


def section(family="llama", **options):
    return LlamaConfig(**{"layers": 2, "heads": 4, "hidden": 32, "ffn": 40, **OURS[family], **options})


def build(family="llama", seed=0, **options):
    learner = build_model(
        section(family, **options), vocab_size=VOCAB, classes=VOCAB, length=LENGTH, options=LossOptions(), seed=seed
    )
    return spread(learner, 13)


# --------------------------------------------------------------------------------------------------- transformers, both ways


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("shards", ["10GB", "10KB"])
def test_their_model_becomes_ours_and_goes_back(tmp_path, name, shards):
    model = theirs(name)
    model.save_pretrained(tmp_path / "theirs", max_shard_size=shards)
    own_section, learner = load_hugging_face(tmp_path / "theirs")
    with torch.no_grad():
        wanted = model(IDS).logits
    assert wanted.std() > 0.3
    torch.testing.assert_close(logits(learner, IDS), wanted, atol=1e-5, rtol=1e-5)
    save_hugging_face(learner, own_section, tmp_path / "ours", shard_bytes=1 << 14)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    assert type(again) is type(model)
    assert {key: value.shape for key, value in again.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, wanted)


@pytest.mark.parametrize("family", OURS)
def test_our_model_becomes_theirs(tmp_path, family):
    learner = build(family)
    save_hugging_face(learner, section(family), tmp_path / "out", special_tokens={"eos_token_id": 1})
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert model.config.eos_token_id == 1
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, logits(learner, IDS), atol=1e-5, rtol=1e-5)


def test_config_json_in_the_spelling_before_transformers_5(tmp_path):
    for name, former in (
        ("llama", {"rope_theta": 500.0}),
        ("gpt_neox", {"rotary_pct": 0.25, "rotary_emb_base": 10000}),
    ):
        model = theirs(name)
        folder = tmp_path / name
        model.save_pretrained(folder)
        tree = json.loads((folder / "config.json").read_text())
        del tree["rope_parameters"]
        (folder / "config.json").write_text(json.dumps({**tree, **former}))
        _, learner = load_hugging_face(folder)
        with torch.no_grad():
            torch.testing.assert_close(logits(learner, IDS), model(IDS).logits, atol=1e-5, rtol=1e-5)


def test_norm_eps_that_config_json_leaves_out(tmp_path):
    for name, eps in (("llama", 1e-6), ("olmo2", 1e-5)):
        theirs(name).save_pretrained(tmp_path / name)
        tree = json.loads((tmp_path / name / "config.json").read_text())
        del tree["rms_norm_eps"]
        (tmp_path / name / "config.json").write_text(json.dumps(tree))
        assert load_hugging_face(tmp_path / name)[0].norm_eps == eps
        assert transformers.AutoConfig.for_model(name).rms_norm_eps == eps


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("llama", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 500.0}}, "rope_type 'llama3' is not supported"),
        ("llama", {"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2}}, "rope_type 'linear'"),
        ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_type 'linear' is not supported"),
        ("llama", {"attention_bias": True}, "attention_bias True is not supported"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
        ("gpt_neox", {"hidden_act": "gelu_fast"}, "hidden_act 'gelu_fast' is not supported"),
        ("llama", {"num_key_value_heads": 3}, "kv_heads"),
        ("llama", {"num_hidden_layers": 3}, "tensors are missing"),
        ("llama", {"max_position_embeddings": None}, "max_position_embeddings is missing"),
        ("llama", {"intermediate_size": 41}, "has shape"),
    ],
)
def test_what_is_not_ours_is_refused(tmp_path, name, changes, words):
    theirs(name).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(UserError, match=words) as caught:
        load_hugging_face(tmp_path)
    assert "\n" not in str(caught.value)


def test_settings_that_no_architecture_has_together(tmp_path):
    odd = section(parallel=True)
    learner = build(parallel=True)
    with pytest.raises(UserError, match=r"no architecture of transformers has these settings.*llama has another model.parallel"):
        save_hugging_face(learner, odd, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --------------------------------------------------------------------------------------------------------------- what it does


@pytest.mark.parametrize("family", OURS)
def test_a_token_sees_only_what_came_before(family):
    learner, changed = build(family), IDS.clone()
    changed[:, 7] = (changed[:, 7] + 1) % VOCAB
    before, after = logits(learner, IDS), logits(learner, changed)
    assert torch.equal(before[:, :7], after[:, :7])
    assert not torch.equal(before[:, 7:], after[:, 7:])


SEGMENTS = documents(LENGTH)


def test_positions_within_documents():
    wanted = [[*range(5), *range(7)], [*range(12)], [*range(3), *range(4), *range(5)]]
    assert within_documents(SEGMENTS).tolist() == wanted


@pytest.mark.parametrize("family", OURS)
@pytest.mark.parametrize("restart", [True, False])
def test_documents_do_not_see_each_other(family, restart):
    """With positions that restart, a document is what it would be in a row of its own; without, rotations are relative, so in
    exact arithmetic it is too."""
    learner = build(family, restart_positions=restart)
    assert_documents_alone(learner, IDS, SEGMENTS, 2e-5)


@pytest.mark.parametrize("family", OURS)
def test_checkpointing_changes_nothing(family):
    wanted, got = gradients(build(family), IDS, SEGMENTS), gradients(build(family, activation_checkpointing=True), IDS, SEGMENTS)
    assert_same(got, wanted)


@pytest.mark.full
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # dynamo looks at it
@pytest.mark.parametrize("family", OURS)
def test_compiled_blocks_equal_plain_ones(family):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    wanted, got = gradients(build(family), IDS, SEGMENTS), gradients(build(family, compile=True), IDS, SEGMENTS)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1, "all blocks share one compilation"


@pytest.mark.parametrize("family", OURS)
def test_half_precision_is_near(family):
    learner = build(family)
    wanted = logits(learner, IDS)
    got = logits(learner.bfloat16(), IDS)
    assert got.dtype == torch.bfloat16
    assert (got.float() - wanted).abs().max() < 0.06 * wanted.abs().max()


def test_rms_norm_sums_in_fp32():
    norm = RMSNorm(4096, eps=1e-5).bfloat16()
    x = torch.full((1, 4096), 300.0, dtype=torch.bfloat16)  # squares beyond what bf16 adds up
    torch.testing.assert_close(norm(x), torch.ones_like(x))
    x = torch.randn(65536, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    small = RMSNorm(8, eps=1e-5).bfloat16()
    small(x).backward(torch.ones_like(x))
    exact = RMSNorm(8, eps=1e-5)
    exact(x.float()).backward(torch.ones(x.shape))
    torch.testing.assert_close(small.weight.grad.float(), exact.weight.grad, rtol=0.01, atol=2.0)


def test_initial_weights():
    learner = build_model(
        section(layers=8, hidden=64, ffn=96), vocab_size=500, classes=500, length=LENGTH, options=LossOptions(), seed=1
    )
    own = {name: p.detach() for name, p in learner.named_parameters()}
    assert own["body.tokens.weight"].std() == pytest.approx(0.02, rel=0.05)
    assert own["body.blocks.3.attention.query.weight"].std() == pytest.approx(0.02, rel=0.1)
    assert own["body.blocks.3.mlp.down.weight"].std() == pytest.approx(0.02 / 4, rel=0.1)
    assert own["body.blocks.3.attention.out.weight"].std() == pytest.approx(0.02 / 4, rel=0.1)
    assert torch.equal(own["body.norm.weight"], torch.ones(64))


def test_flops_by_hand():
    """Of a model small enough to count: 2 layers, D 32, H 4, K 2, E 8, F 40, V 90, L 12."""
    attention = 2 * 32 * 32 + 2 * 2 * 32 * 16 + 2 * 32 * 32 + 2 * 2 * 4 * 8 * 6.5
    swiglu, gelu, head = 3 * 2 * 32 * 40, 2 * 2 * 32 * 40, 2 * 32 * 90
    assert section().flops_per_token(classes=90, length=12, labelled_share=0.5) == 3 * (2 * (attention + swiglu) + 0.5 * head)
    plain = section("pythia", kv_heads=2)
    assert plain.flops_per_token(classes=90, length=12, labelled_share=1.0) == 3 * (2 * (attention + gelu) + head)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"heads": 5}, "heads"),
        ({"kv_heads": 3}, "kv_heads"),
        ({"rotary_share": 0.1}, "rotary_share"),
        ({"parallel": True, "norm_place": "after"}, "parallel"),
    ],
)
def test_sizes_that_do_not_fit(options, words):
    with pytest.raises(ValueError, match=words):
        section(**options)


def test_build_refuses_what_the_task_does_not_fit():
    sizes = {"vocab_size": VOCAB, "length": LENGTH, "options": LossOptions(), "seed": 0}
    with pytest.raises(UserError, match=r"model.max_length: 8 is below"):
        build_model(section(max_length=8), classes=VOCAB, **sizes)
    with pytest.raises(UserError, match=r"model.tied"):
        build_model(section(tied=True), classes=VOCAB + 1, **sizes)
