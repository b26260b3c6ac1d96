"""Tensor parallelism on two ranks against whole models; the cases are in sharding_worker.py. And plans, which need no ranks."""

import json

import pytest
import torch
from torch import nn

from megapd.config import MLPConfig
from megapd.errors import UserError
from megapd.models.pretrained import build_pretrained
from megapd.models.sharding import allocate, plan_for, plan_of, shard, whole_shape
from megapd.slices import Ranges
from tests.forked import run_ranks

from . import sharding_worker
from .sharding_worker import RANKS, config_json
from .test_transformer import build, config

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Of each rank."""
    folder = tmp_path_factory.mktemp("sharding")
    run_ranks("tests.models.sharding_worker", [str(folder)], RANKS)
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(RANKS)]


@pytest.mark.parametrize("name", sharding_worker.names())
def test_two_ranks_give_the_whole(found, name):
    bound = 2e-2 if "bfloat16" in name else 1e-5
    for rank in range(RANKS):
        errors = {what: value for what, value in found[rank][name].items() if what != "held"}
        assert len(errors) >= 10
        assert {what: value for what, value in errors.items() if not value <= bound} == {}


@pytest.mark.parametrize("name", sharding_worker.names()[:-1])
def test_a_rank_holds_its_share(found, name):
    """Positions and BERT's transform are whole everywhere: of these tiny models they are up to a fifth; so is OLMo-2's attention,
    whose norms need all heads."""
    shares = [found[rank][name]["held"] for rank in range(RANKS)]
    assert all(0.49 <= share <= (0.7 if "olmo2" in name else 0.62) for share in shares), shares


def test_what_cannot_be_divided_is_told(found):
    told = found[0]["refusals"]
    assert told == found[1]["refusals"]
    assert all(message.startswith("teacher.sharding: ") for message in told.values())
    expected = {
        "heads": "3 attention heads cannot be divided by 2 ranks",
        "features": "63 features of body.blocks.0.up cannot be divided by 2 ranks",
        "classes": "5 classes of body.tokens leave one of 4 ranks none",
        "their heads": "2 attention heads cannot be divided by 4 ranks",
        "key-value": "1 key-value heads cannot be divided by 2 ranks",
    }
    assert told.keys() == expected.keys()
    assert [name for name, text in expected.items() if text not in told[name]] == []


def test_parts_are_slices_of_what_is_stored():
    learner = build(config("gpt", heads=2, tied=False), vocab=29, classes=9)
    whole = {name: p.detach().clone() for name, p in learner.named_parameters()}
    parts = shard(learner, plan_for(learner), 1, 2, None)
    assert parts.keys() == whole.keys()
    assert parts["body.blocks.0.attention.qkv.weight"] == Ranges(0, ((8, 16), (24, 32), (40, 48)))
    assert parts["body.blocks.1.attention.qkv.bias"] == Ranges(0, ((8, 16), (24, 32), (40, 48)))
    assert parts["body.blocks.0.attention.out.weight"] == Ranges(1, ((8, 16),))
    assert parts["body.blocks.0.down.weight"] == Ranges(1, ((20, 40),))
    assert parts["body.tokens.weight"] == Ranges(0, ((15, 29),))
    assert parts["head.weight"] == Ranges(0, ((5, 9),))
    for name in ("body.positions.weight", "body.norm.bias", "body.blocks.0.attention.out.bias", "body.blocks.0.down.bias"):
        assert parts[name] is None
    for name, parameter in learner.named_parameters():
        part = parts[name]
        pieces = [whole[name].narrow(part.dim, a, b - a) for a, b in part.ranges] if part else [whole[name]]
        assert torch.equal(parameter, torch.cat(pieces, part.dim if part else 0))
        assert whole_shape(parameter) == whole[name].shape
        assert not parameter.requires_grad
    assert [block.attention.heads for block in learner.body.blocks] == [1, 1]


def test_one_rank_keeps_the_whole():
    learner = build(config("bert"))
    before = {name: id(p) for name, p in learner.named_parameters()}
    assert shard(learner, plan_for(learner), 0, 1, None) == dict.fromkeys(before)
    assert before == {name: id(p) for name, p in learner.named_parameters()}


def test_plans():
    assert plan_for(build(config("bert"))) == dict(build(config("bert")).body.plan)
    for kind in ("gpt_neox", "bert"):
        model = build_pretrained(config_json(kind), torch.float32, torch.device("meta"))
        plan = plan_for(model)
        assert plan == {f"network.{name}": style for name, style in plan_of(model.network).items()}
        assert sorted(set(plan.values())) == ["colwise", "rowwise", "vocabulary", "vocabulary_head"]


def test_what_has_no_plan_is_told():
    with pytest.raises(UserError, match=r"^teacher\.sharding: an MLP cannot be split"):
        plan_for(build(MLPConfig(width=3), vocab=2))
    gpt2 = build_pretrained({"model_type": "gpt2", "vocab_size": 9, "n_embd": 8, "n_layer": 1, "n_head": 2}, torch.float32, META)
    with pytest.raises(UserError, match=r"^teacher\.sharding: gpt2 brings no plan for tensor; .*zero"):
        plan_for(gpt2)
    neox = build_pretrained(config_json("gpt_neox"), torch.float32, META)
    neox.network.config.base_model_tp_plan = {"layers.*.mlp.dense_h_to_4h": "packed_colwise"}
    with pytest.raises(UserError, match=r"^teacher\.sharding: the plan of gpt_neox has packed_colwise for gpt_neox.*zero"):
        plan_for(neox)
    learner = build(config("gpt"))
    with pytest.raises(ValueError, match=r"^plan: no module is called body\.block"):
        shard(learner, {"body.block.*.up": "colwise"}, 0, 2, None)
    with pytest.raises(UserError, match=r"^teacher\.sharding: body\.norm is a LayerNorm, which tensor cannot split"):
        shard(learner, {"body.norm": "colwise"}, 0, 2, None)


META = torch.device("meta")


def test_allocate_keeps_ties_and_buffers():
    with META:
        model = nn.ModuleDict({"a": nn.Embedding(5, 3), "b": nn.Linear(3, 5, bias=False), "c": nn.BatchNorm1d(3)})
    model["b"].weight = model["a"].weight
    for name in list(model["c"]._buffers):
        model["c"]._buffers[name] = torch.full((3,), 2.0)
    model["c"].bias = nn.Parameter(torch.arange(3.0))
    allocate(model, torch.device("cpu"))
    assert model["a"].weight is model["b"].weight
    assert not model["a"].weight.is_meta
    assert model["c"].running_var.tolist() == [2.0] * 3
    assert model["c"].bias.tolist() == [0.0, 1.0, 2.0]
