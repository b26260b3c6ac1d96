"""Which keys a query sees, however that is told; in every family and in models of transformers."""

from __future__ import annotations

import pytest
import torch
import transformers

from megapd.batch import Batch
from megapd.config import LlamaConfig, ModernBertConfig, TransformerConfig
from megapd.errors import UserError
from megapd.models import attention, build_model
from megapd.models.attention import attend, block_mask, dense_mask, visible
from megapd.models.pretrained import Pretrained
from megapd_kernels import LossOptions

from .sequences import documents, spread

VOCAB, LENGTH = 90, 12
IDS = torch.randint(VOCAB, (3, LENGTH), generator=torch.Generator().manual_seed(5))
LENGTHS = torch.tensor([5, 12, 1])
SMALL = {"layers": 2, "heads": 4, "hidden": 32, "ffn": 40}
SECTIONS = {
    "gpt": TransformerConfig(kind="gpt", **SMALL),
    "bert": TransformerConfig(kind="bert", **SMALL),
    "llama": LlamaConfig(**SMALL, kv_heads=2),
    "modernbert": ModernBertConfig(**SMALL, local_window=6, global_every=2),
}


def build(kind, **changes):
    section = SECTIONS[kind].model_copy(update=changes)
    return spread(build_model(section, vocab_size=VOCAB, classes=VOCAB, length=16, options=LossOptions(), seed=0), 13)


def batch_of(ids, lengths=None, segments=None):
    """Every token that counts is labelled."""
    counted = torch.ones_like(ids, dtype=torch.bool) if lengths is None else torch.arange(ids.shape[1]) < lengths[:, None]
    positions = counted.flatten().nonzero().flatten()
    return Batch(ids, segments, positions, ids.flatten()[positions], torch.arange(len(ids)), lengths)


def logits(learner, *args):
    with torch.no_grad():
        return learner(batch_of(*args), mode="logits")


# ------------------------------------------------------------------------------------------------------------- the choice


def test_what_needs_no_mask_has_none():
    segments = documents(LENGTH)
    assert visible(IDS, None, None, causal=True) is None
    assert visible(IDS, None, None, causal=False) is None
    assert visible(IDS, None, LENGTHS, causal=True) is None  # padding comes last
    assert visible(IDS, None, None, causal=False, reach=LENGTH - 1) is None
    assert visible(IDS, None, LENGTHS, causal=False).shape == (3, 1, 1, LENGTH)
    assert visible(IDS, segments, None, causal=False).shape == (3, 1, LENGTH, LENGTH)
    assert visible(IDS, None, None, causal=False, reach=3).shape == (1, 1, LENGTH, LENGTH)
    assert isinstance(visible(IDS, segments, None, causal=False, flex=True), torch.Tensor)  # on a CPU


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("reach", [None, 3])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_a_query_sees_what_the_definition_says(causal, reach, padded, packed):
    segments, lengths = documents(LENGTH) if packed else None, LENGTHS if padded else None
    mask = visible(IDS, segments, lengths, causal=causal, reach=reach)
    told = torch.ones(3, 1, LENGTH, LENGTH, dtype=torch.bool) if mask is None else mask.expand(3, 1, LENGTH, LENGTH)
    if mask is None and causal:
        told = told.tril()
    for row in range(3):
        count = LENGTH if lengths is None else int(lengths[row])
        for query in range(count):
            for key in range(LENGTH):
                same = segments is None or bool(segments[row, query] == segments[row, key])
                near = reach is None or abs(query - key) <= reach
                wanted = key < count and same and near and (key <= query or not causal)
                assert bool(told[row, 0, query, key]) == wanted, (row, query, key)
        assert told[row].any(-1).all(), "a query that sees nothing has no softmax"


# ----------------------------------------------------------------------------------------------------------------- blocks


def packed(length, seed):
    """Documents of 1 to 300 tokens, numbered from 0, [2, length]."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(2):
        sizes = torch.randint(1, 300, (length,), generator=generator)
        rows.append(torch.repeat_interleave(torch.arange(length), sizes)[:length])
    return torch.stack(rows)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("reach", [None, 64, 200])
@pytest.mark.parametrize("length", [100, 384, 700])
def test_blocks_say_what_the_dense_mask_says(length, causal, reach):
    segments = attention.padding_apart(packed(length, length), torch.tensor([length - 90, length]))
    dense = dense_mask(segments, causal=causal, reach=reach)
    blocks = block_mask(segments, causal=causal, reach=reach)
    grid = -(-length // attention.BLOCK)
    padded = torch.zeros(2, 1, grid * attention.BLOCK, grid * attention.BLOCK, dtype=torch.bool)
    padded[..., :length, :length] = dense
    tiles = padded.unflatten(3, (grid, attention.BLOCK)).unflatten(2, (grid, attention.BLOCK))
    some, whole = tiles.any(5).any(3), tiles.all(5).all(3)

    def listed(counts, order):
        return (
            torch.zeros(2, 1, grid, grid).scatter_add_(3, order.long(), (torch.arange(grid) < counts[..., None]).float()).bool()
        )

    partial = listed(blocks.kv_num_blocks, blocks.kv_indices)
    full = listed(blocks.full_kv_num_blocks, blocks.full_kv_indices)
    assert not (partial & full).any()
    assert not (full & ~whole).any(), "a block that is not looked into has something to hide"
    assert not (some & ~(partial | full)).any(), "a block with something to see is left out"
    if reach is None and length == 700:
        assert (partial | full).float().mean() < 0.75, "nothing is skipped"
    query, key = torch.arange(length)[:, None], torch.arange(length)
    told = torch.stack([blocks.mask_mod(torch.tensor(row), torch.tensor(0), query, key) for row in range(2)])
    assert torch.equal(told, dense[:, 0])


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("causal", [False, True])
def test_attention_over_blocks_is_attention(causal):
    """On a CPU without gradients, which FlexAttention has on a GPU alone."""
    segments = packed(300, 1)
    q, k, v = torch.randn(3, 2, 2, 300, 8, generator=torch.Generator().manual_seed(2)).unbind()
    masks = (block(segments, causal=causal, reach=150) for block in (block_mask, dense_mask))
    ours, wanted = (attend(q, k, v, mask, causal=causal) for mask in masks)
    torch.testing.assert_close(ours, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("length", [256, 700])
@pytest.mark.parametrize("kind", SECTIONS)
def test_a_family_over_blocks_learns_the_same_on_a_gpu(kind, length):
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(VOCAB, (2, length), generator=generator)
    found = []
    for way in ("sdpa", "flex"):
        section = SECTIONS[kind].model_copy(update={"attention": way, "heads": 2})
        learner = build_model(section, vocab_size=VOCAB, classes=VOCAB, length=length, options=LossOptions(), seed=0).cuda()
        loss, _ = learner(batch_of(ids, torch.tensor([length - 90, length]), packed(length, 4)).to("cuda"))
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in learner.parameters())])
    for ours, wanted in zip(*found, strict=True):
        torch.testing.assert_close(ours, wanted, atol=1e-4, rtol=1e-3)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("kind", SECTIONS)
def test_a_family_over_blocks_is_the_family(kind, monkeypatch):
    arguments = IDS, LENGTHS, documents(LENGTH)
    wanted = logits(build(kind), *arguments)
    used = []
    monkeypatch.setattr(attention, "FLEX_DEVICES", ("cpu",))
    monkeypatch.setattr(attention, "block_mask", lambda *args, **named: used.append(1) or block_mask(*args, **named))
    torch.testing.assert_close(logits(build(kind, attention="flex"), *arguments), wanted, atol=1e-5, rtol=1e-5)
    assert used


# ---------------------------------------------------------------------------------------------------------------- padding


@pytest.mark.parametrize("kind", SECTIONS)
def test_a_padded_row_is_the_row_alone(kind):
    learner = build(kind)
    found = logits(learner, IDS, LENGTHS)
    alone = [logits(learner, ids[None, :length]) for ids, length in zip(IDS, LENGTHS.tolist(), strict=True)]
    torch.testing.assert_close(found, torch.cat(alone), atol=1e-5, rtol=1e-5)
    padding = torch.arange(LENGTH) >= LENGTHS[:, None]
    assert torch.equal(logits(learner, torch.where(padding, 3, IDS), LENGTHS), found)


@pytest.mark.parametrize("kind", SECTIONS)
def test_padding_has_no_gradient(kind):
    found = []
    for extra in (0, 4):
        learner = build(kind, tied=False)
        ids = torch.nn.functional.pad(IDS, (0, extra), value=VOCAB - 1)
        ids[IDS.new_tensor([0, 2]), -1] = VOCAB - 1
        keep = torch.where(IDS == VOCAB - 1, 0, IDS)
        ids[:, :LENGTH] = torch.where(torch.arange(LENGTH) < LENGTHS[:, None], keep, VOCAB - 1)
        loss, _ = learner(batch_of(ids, LENGTHS))
        loss.backward()
        assert not learner.body.tokens.weight.grad[VOCAB - 1].any()
        found.append([loss.detach(), *(p.grad for p in learner.parameters())])
    for shorter, longer in zip(*found, strict=True):
        torch.testing.assert_close(longer, shorter, atol=1e-5, rtol=1e-4)
        assert torch.isfinite(longer).all()


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama", "roberta"])
def test_a_padded_row_of_a_model_of_transformers(kind):
    if kind == "gpt2":
        settings = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 16}
    else:
        settings = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
        settings["max_position_embeddings"] = 18
    config = transformers.AutoConfig.for_model(kind, vocab_size=VOCAB, **settings)
    masked = kind in ("bert", "roberta")
    auto = transformers.AutoModelForMaskedLM if masked else transformers.AutoModelForCausalLM
    model = Pretrained(spread(auto.from_config(config), 11), causal=not masked)
    ids = 10 + IDS % 80  # special ids, of which RoBERTa's padding moves positions, aside
    found = logits(model, ids, LENGTHS)
    alone = [logits(model, row[None, :length]) for row, length in zip(ids, LENGTHS.tolist(), strict=True)]
    torch.testing.assert_close(found, torch.cat(alone), atol=1e-5, rtol=1e-5)
    assert torch.equal(logits(model, torch.where(torch.arange(LENGTH) < LENGTHS[:, None], ids, 11), LENGTHS), found)
    packed_rows = logits(model, ids, LENGTHS, documents(LENGTH))
    first = int((documents(LENGTH)[0, :5] == 0).sum())
    torch.testing.assert_close(packed_rows[:first], logits(model, ids[:1, :first]), atol=1e-5, rtol=1e-5)


def test_a_model_that_sees_padding_is_refused():
    config = transformers.BertConfig(vocab_size=VOCAB, hidden_size=32, intermediate_size=40, num_hidden_layers=1)
    config.num_attention_heads = 4
    model = Pretrained(transformers.BertForMaskedLM(config), causal=False)
    own = model.network.forward
    model.network.forward = lambda input_ids, attention_mask: own(input_ids=input_ids)
    with pytest.raises(UserError, match="bert does not leave the padding"):
        logits(model, IDS, LENGTHS)
