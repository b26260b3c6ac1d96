"""LossHead and Learner: which teacher reaches the loss, what is shared, what the gradients are."""

import math

import pytest
import torch
from torch.nn import functional as F

from megapd.config import MLPConfig
from megapd.models import LossHead, build_model
from megapd.signals import Head, Signal, SignalSpec, TeacherOutput
from megapd_kernels import LossOptions

from .test_transformer import KINDS, VOCAB, build, config, make_batch


def signal(kind, values, batch, head=None):
    return Signal(spec=SignalSpec(kind), teacher="t", samples=batch.digest, values=values, head=head)


def with_options(kind, **options):
    return build_model(config(kind), vocab_size=VOCAB, classes=VOCAB, length=12, options=LossOptions(**options), seed=0).double()


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_signal_the_loss_is_the_cross_entropy(kind):
    learner, batch = build(config(kind)).double(), make_batch()
    loss, stats = learner(batch)
    logits = learner(batch, mode="logits")
    expected = F.cross_entropy(logits, batch.labels)
    torch.testing.assert_close(loss.double(), expected, atol=1e-6, rtol=1e-6)
    correct = (logits.argmax(-1) == batch.labels).sum().item()
    assert stats.tolist() == pytest.approx([0.0, expected.item() * batch.labelled, correct], rel=1e-6)
    assert stats.dtype == torch.float64
    assert not stats.requires_grad
    torch.testing.assert_close(learner(batch, None, 7)[0].double(), expected * batch.labelled / 7, atol=1e-6, rtol=1e-6)


def test_sparse_signals_have_the_teachers_temperature_already():
    """All classes as the top k give the dense teacher's loss; draws give its cross entropy on average."""
    teacher, batch = build(config("gpt"), seed=3).double(), make_batch(1)
    with torch.no_grad():
        logits, hidden = 30 * teacher(batch, mode="logits"), 30 * teacher(batch, mode="hidden")
    student = with_options("gpt", teacher_temperature=2.0)
    dense, _ = student(batch, signal("dense", logits, batch))
    head = Head(teacher.head.weight.detach(), None)
    found = {}
    for spec in (SignalSpec("topk", "fp32", VOCAB, 2.0), SignalSpec("sampled", "fp32", 20_000, 2.0)):
        values, logprobs, log_rest = spec.answer(batch, TeacherOutput(hidden, head))
        sparse = Signal(spec, "t", batch.digest, values, None, logprobs, log_rest)
        found[spec.kind] = student(batch, sparse)[0].item()
    assert found["topk"] == pytest.approx(dense.item(), rel=1e-4)
    probabilities = (logits / 2.0).softmax(-1)
    entropy = -(probabilities * probabilities.log()).sum(-1).mean().item()
    assert found["sampled"] == pytest.approx(dense.item() + entropy, rel=0.02)


@pytest.mark.parametrize("kind", KINDS)
def test_signals_reach_the_loss_by_kind(kind):
    """Dense logits and hidden states of one teacher give one loss, the reference's; argmax its class's cross entropy."""
    teacher, batch = build(config(kind, hidden=32), seed=3).double(), make_batch(1)
    with torch.no_grad():
        logits, hidden = 30 * teacher(batch, mode="logits"), 30 * teacher(batch, mode="hidden")
        bias = None if teacher.head.bias is None else 30 * teacher.head.bias
    student = with_options(kind, alpha=0.25)
    own = student(batch, mode="logits").log_softmax(-1)
    cross = F.nll_loss(own, batch.labels)
    divergence = F.kl_div(own, logits.log_softmax(-1), log_target=True, reduction="batchmean")
    expected = 0.25 * cross + 0.75 * divergence
    head = Head(teacher.head.weight.detach(), bias)
    for given in (signal("dense", logits, batch), signal("hidden", hidden, batch, head)):
        loss, stats = student(batch, given)
        torch.testing.assert_close(loss.double(), expected, atol=1e-6, rtol=1e-6)
        assert stats[0].item() == pytest.approx(divergence.item() * batch.labelled, rel=1e-5)
        assert stats[1].item() == pytest.approx(cross.item() * batch.labelled, rel=1e-5)
    ids = logits.argmax(-1)
    loss, _ = with_options(kind, teacher_temperature=0.0)(batch, signal("argmax", ids, batch))
    torch.testing.assert_close(loss.double(), F.nll_loss(own, ids), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tied", [True, False])
def test_gradients_are_autograds(kind, tied):
    learner, batch = build(config(kind, tied=tied)).double(), make_batch()
    loss, _ = learner(batch)
    loss.backward()
    ours = {name: p.grad.clone() for name, p in learner.named_parameters() if p.grad is not None}
    learner.zero_grad()
    F.cross_entropy(learner(batch, mode="logits"), batch.labels).backward()
    assert ours.keys() == {name for name, _ in learner.named_parameters()}
    for name, parameter in learner.named_parameters():
        torch.testing.assert_close(ours[name], parameter.grad, atol=1e-6, rtol=1e-5, msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_a_tied_head_is_the_embedding_itself(kind):
    tied, untied = build(config(kind)), build(config(kind, tied=False))
    for learner in (tied, tied.to(torch.bfloat16)):
        assert learner.head.weight is learner.body.tokens.weight
    assert "head.weight" not in dict(tied.named_parameters())
    assert untied.head.weight is not untied.body.tokens.weight
    assert (tied.head.bias is None) == (kind == "gpt")


@pytest.mark.parametrize("model_config", [config("gpt"), config("bert"), MLPConfig(width=7)], ids=["gpt", "bert", "mlp"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_cast_learner_computes_in_its_dtype(model_config, dtype):
    vocab = 2 if model_config.kind == "mlp" else VOCAB
    learner = build(model_config, vocab=vocab).to(dtype)
    batch = make_batch(share=0.2, vocab=vocab)
    loss, stats = learner(batch)
    loss.backward()
    assert math.isfinite(loss.item())
    assert stats.dtype == torch.float64
    assert learner(batch, mode="hidden").dtype == learner(batch, mode="logits").dtype == dtype
    assert all(p.grad is not None and p.grad.dtype == dtype for p in learner.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_no_labelled_positions_give_zero_gradients(kind):
    """A micro-batch may select no position; under ZeRO its backward must run all the same."""
    learner, batch = build(config(kind)), make_batch(share=-1.0)
    assert batch.labelled == 0
    loss, stats = learner(batch, None, 5)
    loss.backward()
    assert loss.item() == 0.0
    assert stats.tolist() == [0.0, 0.0, 0.0]
    assert all(p.grad is not None and p.grad.abs().sum() == 0 for p in learner.parameters())


def test_only_modules_own_parameters_by_their_calls():
    """What ZeRO-3 relies on: in every mode a module runs under __call__ before its own parameters are read."""
    for mode in ("loss", "hidden", "logits"):
        learner, called = build(config("bert", tied=False)), set()
        for name, module in learner.named_modules():
            module.register_forward_pre_hook(lambda *_, name=name, called=called: called.add(name))
        learner(make_batch(), mode=mode)
        owners = {name.rpartition(".")[0] for name, _ in learner.named_parameters()}
        assert owners - called == ({"head"} if mode == "hidden" else set())


def test_head_logits():
    head = LossHead(4, 3, bias=True, options=LossOptions())
    with torch.no_grad():
        head.weight.copy_(torch.arange(12.0).view(3, 4))
        head.bias.copy_(torch.tensor([1.0, 2.0, 3.0]))
    assert head(torch.tensor([[1.0, 0.0, 0.0, 1.0]]), mode="logits").tolist() == [[4.0, 13.0, 22.0]]
