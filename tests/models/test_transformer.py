"""Bodies: who sees whom, initial values, checkpointing, compilation."""

import copy

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megapd.batch import Batch
from megapd.config import MLPConfig, TransformerConfig
from megapd.errors import UserError
from megapd.models import MLP, Learner, LossHead, Transformer, build_model, parameter_count
from megapd_kernels import LossOptions

VOCAB, LENGTH = 29, 12
KINDS = ["gpt", "bert"]


def config(kind="gpt", **changes):
    return TransformerConfig(**{"kind": kind, "layers": 2, "heads": 2, "hidden": 16, "ffn": 40, **changes})


def build(model_config, seed=0, *, vocab=VOCAB, classes=None, length=LENGTH):
    return build_model(model_config, vocab_size=vocab, classes=classes or vocab, length=length, options=LossOptions(), seed=seed)


def make_batch(seed=0, samples=3, *, segments=False, share=0.5, length=LENGTH, vocab=VOCAB):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(vocab, (samples, length), generator=generator)
    positions = (torch.rand(samples * length, generator=generator) < share).nonzero().flatten()
    labels = torch.randint(vocab, (positions.numel(),), generator=generator)
    # Documents of 5, 4 and 3 tokens.
    documents = torch.tensor([0] * 5 + [1] * 4 + [2] * 3).expand(samples, -1) if segments else None
    return Batch(ids, documents, positions, labels, torch.arange(samples))


def test_a_token_reaches_only_what_may_see_it():
    """Change one token and see at which positions the hidden state moves."""
    ids = make_batch().ids[:1]
    changed = ids.clone()
    changed[0, 6] = (ids[0, 6] + 1) % VOCAB
    documents = torch.tensor([[0] * 5 + [1] * 4 + [2] * 3])
    reached = {
        ("gpt", None): range(6, LENGTH),
        ("bert", None): range(LENGTH),
        ("gpt", "documents"): range(6, 9),
        ("bert", "documents"): range(5, 9),
    }
    for (kind, masked), positions in reached.items():
        body = build(config(kind)).body
        segments = documents if masked else None
        with torch.no_grad():
            difference = (body(ids, segments) - body(changed, segments)).abs().amax(-1)[0]
        assert (difference > 0).nonzero().flatten().tolist() == list(positions), (kind, masked)


@pytest.mark.parametrize("kind", KINDS)
def test_one_document_equals_no_documents(kind):
    body = build(config(kind)).body
    ids = make_batch().ids
    torch.testing.assert_close(body(ids, torch.full_like(ids, 3)), body(ids, None), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_positions_run_on_through_the_block(kind):
    """The same document at another place of the row has other hidden states: its positions are the row's."""
    body = build(config(kind)).body
    with torch.no_grad():
        body.positions.weight.mul_(10)
        row = torch.tensor([[1, 2, 3, 1, 2, 3]])
        hidden = body(row, torch.tensor([[0, 0, 0, 1, 1, 1]]))
    assert (hidden[0, :3] - hidden[0, 3:]).abs().max() > 1e-2


@pytest.mark.parametrize("kind", KINDS)
def test_activation_checkpointing_gives_the_same_gradients_and_recomputes(kind):
    batch = make_batch(segments=True)
    gradients, calls = [], []
    for checkpointing in (False, True):
        learner = build(config(kind, activation_checkpointing=checkpointing))
        count = []
        learner.body.blocks[0].up.register_forward_hook(lambda *_, count=count: count.append(1))
        loss, _ = learner(batch)
        loss.backward()
        gradients.append({name: p.grad for name, p in learner.named_parameters()})
        calls.append(len(count))
    assert calls == [1, 2]
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name
        assert kind == "bert" or gradient.abs().sum() > 0, name


@pytest.mark.full
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # dynamo looks at it
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_blocks_equal_plain_ones(kind, checkpointing):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    batch = make_batch(segments=kind == "bert")
    plain = build(config(kind))
    compiled = build(config(kind, compile=True, activation_checkpointing=checkpointing))
    for learner in (plain, compiled, copy.deepcopy(compiled)):
        loss, _ = learner(batch)
        loss.backward()
        expected, _ = plain(batch)
        torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
        for (name, ours), (_, theirs) in zip(learner.named_parameters(), plain.named_parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-5, rtol=1e-4, msg=name)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1, "all blocks share one compilation"
    assert list(compiled.state_dict()) == list(plain.state_dict())


# ------------------------------------------------------------------------------------------------------- initial values


@pytest.mark.parametrize("kind", KINDS)
def test_initial_values(kind):
    learner = build(config(kind, layers=8, hidden=64, ffn=256), vocab=500)
    scaled = ("attention.out.weight", "down.weight")
    for name, parameter in learner.named_parameters():
        values = parameter.detach()
        if name.endswith("norm.weight"):
            assert (values == 1).all(), name
        elif name.endswith("bias"):
            assert (values == 0).all(), name
        else:
            std = 0.02 / 4 if kind == "gpt" and name.endswith(scaled) else 0.02  # 4 = sqrt(2 * 8 layers)
            error = 5 / (2 * values.numel()) ** 0.5  # five standard errors of a standard deviation
            assert abs(values.std().item() / std - 1) < error, name
            assert abs(values.mean().item()) < 5 * std / values.numel() ** 0.5, name


def test_initial_values_of_the_mlp():
    learner = build(MLPConfig(width=400), vocab=2, classes=2, length=50)
    for name, fan_in in {"body.linear.weight": 50, "body.linear.bias": 50, "head.weight": 400, "head.bias": 400}.items():
        values = learner.get_parameter(name).detach()
        bound = fan_in**-0.5
        assert values.abs().max() <= bound, name
        assert values.numel() < 100 or abs(values.std().item() * 3**0.5 / bound - 1) < 0.15, name
        assert values.unique().numel() > 1


def test_initial_values_depend_on_seed_name_and_shape_alone():
    torch.manual_seed(7)
    state = torch.get_rng_state()
    first = dict(build(config(), seed=1).named_parameters())
    assert torch.equal(torch.get_rng_state(), state), "the global generator is left alone"
    again = dict(build(config(), seed=1).named_parameters())
    other = dict(build(config(), seed=2).named_parameters())
    untied = dict(build(config(tied=False), seed=1).named_parameters())
    for name, parameter in first.items():
        assert torch.equal(parameter, again[name]), name
        assert torch.equal(parameter, untied[name]), name
        assert parameter.ndim == 1 or not torch.equal(parameter, other[name]), name
    assert not torch.equal(first["body.blocks.0.up.weight"], first["body.blocks.1.up.weight"])
    assert not torch.equal(untied["head.weight"], untied["body.tokens.weight"])


@pytest.mark.parametrize("kind", [*KINDS, "mlp"])
def test_a_narrow_model_is_no_part_of_a_wide_one(kind):
    if kind == "mlp":
        narrow, wide = (build(MLPConfig(width=width), vocab=2, classes=2, length=50) for width in (20, 200))
    else:
        narrow, wide = (build(config(kind, hidden=hidden)) for hidden in (16, 32))
    for name, parameter in narrow.named_parameters():
        first = wide.get_parameter(name).flatten()[: parameter.numel()]
        if first.unique().numel() > 1 and parameter.shape != wide.get_parameter(name).shape:
            assert not torch.equal(parameter.flatten(), first), name
            assert abs(torch.corrcoef(torch.stack([parameter.flatten(), first]))[0, 1].item()) < 5 / parameter.numel() ** 0.5


# --------------------------------------------------------------------------------------------------- the learner, sizes


def test_mlp_reads_signs():
    mlp = MLP(3, 2)
    with torch.no_grad():
        mlp.linear.weight.copy_(torch.tensor([[1.0, 2.0, 4.0], [-1.0, -1.0, -1.0]]))
        mlp.linear.bias.zero_()
    assert mlp(torch.tensor([[1, 0, 1], [0, 0, 0]])).tolist() == [[[3.0, 0.0]], [[0.0, 3.0]]]
    assert mlp.bfloat16()(torch.tensor([[1, 0, 1]])).dtype == torch.bfloat16


def test_learner_gathers_labelled_rows():
    learner = build(config("bert"))
    batch = make_batch(share=0.3)
    everything = make_batch(share=2.0)
    assert everything.labelled == everything.tokens
    assert 0 < batch.labelled < batch.tokens
    torch.testing.assert_close(learner(batch, mode="hidden"), learner(everything, mode="hidden")[batch.positions])
    torch.testing.assert_close(learner(batch, mode="logits"), learner(everything, mode="logits")[batch.positions])
    torch.testing.assert_close(
        learner(batch, mode="hidden") @ learner.head.weight.T + learner.head.bias, learner(batch, mode="logits")
    )


def test_mlp_has_one_row_a_sample():
    learner = build(MLPConfig(width=7), vocab=2, classes=2, length=LENGTH)
    ids = torch.randint(2, (4, LENGTH))
    last = torch.arange(1, 5) * LENGTH - 1
    for positions in (last, last - LENGTH + 1):
        batch = Batch(ids, None, positions, torch.zeros(4, dtype=torch.int64), torch.arange(4))
        torch.testing.assert_close(learner(batch, mode="hidden"), learner.body(ids).squeeze(1))
    second = Batch(ids, None, last[1:2], torch.zeros(1, dtype=torch.int64), torch.arange(4))
    torch.testing.assert_close(learner(second, mode="hidden"), learner.body(ids)[1])


def test_parameter_count():
    # The published GPT-2 of 124,439,808 parameters: 50257 tokens, 1024 positions.
    with torch.device("meta"):
        gpt2 = TransformerConfig(kind="gpt", layers=12, heads=12, hidden=768)
        body = Transformer(gpt2, 50257, 1024)
        head = LossHead(768, 50257, bias=False, options=LossOptions(), embedding=body.tokens)
        total, without = parameter_count(Learner(body, None, head))
    assert total == 124_439_808
    assert without == total - (50257 + 1024) * 768
    tied, untied = (parameter_count(build(config(tied=tied))) for tied in (True, False))
    assert untied.total - tied.total == untied.without_embeddings - tied.without_embeddings == VOCAB * 16


@pytest.mark.parametrize("kind", KINDS)
def test_flops_per_token_are_those_torch_counts(kind):
    learner, batch = build(config(kind)), make_batch()
    with FlopCounterMode(display=False) as counter:
        hidden = learner(batch, mode="logits")
        hidden.sum().backward()
    share = batch.labelled / batch.tokens
    ours = config(kind).flops_per_token(classes=VOCAB, length=LENGTH, labelled_share=share) * batch.tokens
    # Attention apart: torch counts all keys of a causal query, and has no formula for every fused kernel.
    keys = LENGTH if kind == "bert" else (LENGTH + 1) / 2
    attention = 12 * config().layers * 16 * keys * batch.tokens
    counted = {str(op): flops for op, flops in counter.get_flop_counts()["Global"].items()}
    matrices = sum(flops for op, flops in counted.items() if "attention" not in op)
    assert matrices == pytest.approx(ours - attention, rel=1e-6)


def test_flops_per_token_of_the_mlp():
    learner = build(MLPConfig(width=7), vocab=2, classes=2, length=LENGTH)
    batch = Batch(torch.randint(2, (4, LENGTH)), None, torch.arange(4) * LENGTH, torch.zeros(4).long(), torch.arange(4))
    with FlopCounterMode(display=False) as counter:
        learner(batch, mode="logits").sum().backward()
    ours = MLPConfig(width=7).flops_per_token(classes=2, length=LENGTH, labelled_share=1 / LENGTH)
    assert counter.get_total_flops() == pytest.approx(ours * batch.tokens)


def test_impossible_models_are_refused_by_name():
    with pytest.raises(UserError, match=r"model\.max_length.* 8 .* 12 tokens"):
        build(config(max_length=8))
    with pytest.raises(UserError, match=r"set model\.tied=false"):
        build(config(), classes=8)
    assert build(config(tied=False), classes=8).head.weight.shape == (8, 16)
    assert build(config(max_length=20)).body.positions.num_embeddings == 20
