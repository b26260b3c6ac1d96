"""ModernBERT: equal to transformers' model both ways, near and far attention, documents, and the usual."""

from __future__ import annotations

import json

import pytest
import torch
import transformers

from megapd.config import ModernBertConfig
from megapd.errors import UserError
from megapd.models import build_model, load_hugging_face, save_hugging_face
from megapd_kernels import LossOptions

from .sequences import assert_documents_alone, assert_same, documents, everywhere, gradients, logits, spread

VOCAB, LENGTH = 90, 14
IDS = torch.randint(VOCAB, (3, LENGTH), generator=torch.Generator().manual_seed(5))
SEGMENTS = documents(LENGTH)
SPECIAL = dict.fromkeys(("pad_token_id", "eos_token_id", "bos_token_id", "cls_token_id", "sep_token_id"))


def theirs(**changes):
    sizes = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": VOCAB}
    common = {"max_position_embeddings": 16, "local_attention": 6, **SPECIAL, **sizes}
    model = transformers.ModernBertForMaskedLM(transformers.ModernBertConfig(**{**common, **changes}))
    return spread(model, 11).eval()


def section(**options):
    common = {"layers": 4, "heads": 4, "hidden": 32, "ffn": 40, "local_window": 6}
    return ModernBertConfig(**{**common, **options})


def build(**options):
    learner = build_model(section(**options), vocab_size=VOCAB, classes=VOCAB, length=LENGTH, options=LossOptions(), seed=0)
    return spread(learner, 13)


# --------------------------------------------------------------------------------------------------- transformers, both ways


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": False}, {"local_attention": 100}])
def test_their_model_becomes_ours_and_goes_back(tmp_path, changes):
    model = theirs(**changes)
    model.save_pretrained(tmp_path / "theirs")
    own_section, learner = load_hugging_face(tmp_path / "theirs")
    with torch.no_grad():
        wanted = model(IDS).logits
    assert wanted.std() > 0.3
    torch.testing.assert_close(logits(learner, IDS), wanted, atol=1e-5, rtol=1e-5)
    save_hugging_face(learner, own_section, tmp_path / "ours", shard_bytes=1 << 14)
    again = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "ours").eval()
    assert type(again) is type(model)
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, wanted)


@pytest.mark.parametrize("options", [{}, {"global_every": 1}, {"global_every": 2, "tied": False}, {"local_theta": 77.0}])
def test_our_model_becomes_theirs(tmp_path, options):
    learner = build(**options)
    save_hugging_face(learner, section(**options), tmp_path / "out")
    model = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, logits(learner, IDS), atol=1e-5, rtol=1e-5)


def test_config_json_in_the_spelling_before_transformers_5(tmp_path):
    model = theirs()
    model.save_pretrained(tmp_path)
    tree = json.loads((tmp_path / "config.json").read_text())
    del tree["rope_parameters"], tree["layer_types"]
    former = {"global_attn_every_n_layers": 3, "global_rope_theta": 160000.0, "local_rope_theta": 10000.0}
    (tmp_path / "config.json").write_text(json.dumps({**tree, **former}))
    _, learner = load_hugging_face(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(logits(learner, IDS), model(IDS).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rope_scaling": {"rope_type": "yarn"}}, "rope_type 'yarn' of rope_scaling"),
        ({"norm_bias": True}, "norm_bias True is not supported"),
        ({"hidden_activation": "silu"}, "hidden_activation 'silu' is not supported"),
        ({"layer_types": ["sliding_attention"] * 4}, "layer_types are not full attention at every n-th layer"),
        ({"num_attention_heads": 5}, "heads"),
        ({"rope_parameters": {"full_attention": {"rope_type": "yarn"}}}, "rope_type 'yarn' of full_attention"),
    ],
)
def test_what_is_not_ours_is_refused(tmp_path, changes, words):
    theirs().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(UserError, match=words):
        load_hugging_face(tmp_path)


# --------------------------------------------------------------------------------------------------------------- what it does


def test_near_attention_reaches_half_its_window():
    """Of one block that sees near tokens alone; the first block is made to add nothing."""
    learner = build(layers=2, global_every=2)
    with torch.no_grad():
        learner.body.blocks[0].attention.out.weight.zero_()
    changed = IDS.clone()
    changed[:, 6] = (changed[:, 6] + 1) % VOCAB
    moved = (logits(learner, IDS) != logits(learner, changed)).any(-1).any(0)
    assert moved.tolist() == [3 <= place <= 9 for place in range(LENGTH)]


@pytest.mark.parametrize("restart", [True, False])
def test_documents_do_not_see_each_other(restart):
    learner = build(restart_positions=restart)
    assert_documents_alone(learner, IDS, SEGMENTS, 3e-5)


def test_checkpointing_changes_nothing():
    wanted, got = gradients(build(), IDS, SEGMENTS), gradients(build(activation_checkpointing=True), IDS, SEGMENTS)
    assert_same(got, wanted)


@pytest.mark.full
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # dynamo looks at it
def test_compiled_blocks_equal_plain_ones():
    torch._dynamo.reset()
    for a, b in zip(gradients(build(compile=True), IDS, SEGMENTS), gradients(build(), IDS, SEGMENTS), strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)


def test_half_precision_is_near():
    learner = build()
    wanted = logits(learner, IDS)
    got = logits(learner.bfloat16(), IDS)
    assert got.dtype == torch.bfloat16
    assert (got.float() - wanted).abs().max() < 0.06 * wanted.abs().max()
    learner(everywhere(IDS))[0].backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in learner.parameters())


def test_flops_by_hand():
    """Layers 0 and 3 of 4 see all 14 tokens, the others 7; D 32, F 40, V 90."""
    blocks, keys, head = 4 * (8 * 32**2 + 6 * 32 * 40), 2 * 14 + 2 * 7, 2 * 32 * 90 + 2 * 32**2
    wanted = 3 * (blocks + 4 * 32 * keys + 0.5 * head)
    assert section().flops_per_token(classes=90, length=14, labelled_share=0.5) == wanted


def test_sizes_that_do_not_fit():
    with pytest.raises(ValueError, match="heads"):
        section(heads=32)
    with pytest.raises(ValueError, match="local_window"):
        section(local_window=7)
    sizes = {"vocab_size": VOCAB, "length": LENGTH, "options": LossOptions(), "seed": 0}
    with pytest.raises(UserError, match=r"model.max_length: 8 is below"):
        build_model(section(max_length=8), classes=VOCAB, **sizes)
    with pytest.raises(UserError, match=r"model.tied"):
        build_model(section(), classes=VOCAB + 1, **sizes)
