"""Tensor parallelism on the two ranks that test_sharding.py starts: sharded models against whole ones, errors left as JSON.

One start for all cases, since importing transformers takes longer than they do.
"""

from __future__ import annotations

import json
import math
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn

from megapd.batch import Batch
from megapd.config import LlamaConfig, ModernBertConfig, TransformerConfig
from megapd.errors import UserError
from megapd.models import build_model
from megapd.models.pretrained import Pretrained, build_pretrained, check_head, read_pretrained
from megapd.models.sharding import allocate, plan_for, shard, sum_over_ranks, vocabulary_shard
from megapd.trajectory import Trajectory
from megapd.trajectory.writer import write_checkpoint
from megapd_kernels import LossOptions, linear_distillation_loss

RANKS = 2
LENGTH = 12
OWN = [
    *((kind, tied, vocab) for kind in ("gpt", "bert") for tied in (True, False) for vocab in (30, 37)),
    ("llama", False, 37),
    ("neox", True, 30),
    ("olmo2", False, 37),
    ("modernbert", True, 37),
]
LLAMAS = {
    "llama": {"kv_heads": 2},
    "neox": {"mlp": "gelu", "norm": "layer", "parallel": True, "biases": True, "rotary_share": 0.25},
    "olmo2": {"qk_norm": "whole", "norm_place": "after"},
}
THEIRS = [("gpt_neox", torch.float32), ("bert", torch.float32), ("llama", torch.float32), ("gpt_neox", torch.bfloat16)]
SIZES = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32, "intermediate_size": 64}
CONFIGS = {
    "gpt_neox": {"architectures": ["GPTNeoXForCausalLM"], "max_position_embeddings": 16},
    "bert": {"architectures": ["BertForMaskedLM"], "max_position_embeddings": 16},
    "llama": {"architectures": ["LlamaForCausalLM"], "num_key_value_heads": 2, "tie_word_embeddings": True},
}


def names() -> list[str]:
    own = [f"{kind} {'tied' if tied else 'untied'} {vocab}" for kind, tied, vocab in OWN]
    return [*own, *(f"transformers {kind} {str(dtype).removeprefix('torch.')}" for kind, dtype in THEIRS), "sum"]


def config_json(kind: str, vocab: int = 37) -> dict:
    special = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    return {"model_type": kind, "vocab_size": vocab, **SIZES, **CONFIGS[kind], **special}


def make_batch(vocab: int, segments: bool) -> Batch:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(vocab, (3, LENGTH), generator=generator)
    ids[0, 0], ids[0, 1] = 0, vocab - 1  # on either side of every split
    positions = (torch.rand(ids.numel(), generator=generator) < 0.5).nonzero().flatten()
    documents = torch.tensor([0] * 5 + [1] * 4 + [2] * 3).expand(3, -1) if segments else None
    return Batch(ids, documents, positions, ids.flatten()[positions], torch.arange(3))


@torch.no_grad()
def fill(model: nn.Module, seed: int) -> nn.Module:
    """Values that leave no bias or norm neutral and no logit small."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        shift = 1.0 if "norm" in name.lower() and name.endswith("weight") else 0.0
        parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator) + shift)
    return model


@torch.no_grad()
def copy(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    own = dict(model.named_parameters())
    assert own.keys() == tensors.keys()
    for name, parameter in own.items():
        assert parameter.shape == tensors[name].shape, name
        parameter.copy_(tensors[name])


def error(found: Tensor, wanted: Tensor) -> float:
    return math.inf if found.shape != wanted.shape else ((found - wanted).abs().max() / wanted.abs().max()).item()


def gathered(part: Tensor) -> list[Tensor]:
    parts: list[Tensor] = [torch.empty(0)] * RANKS
    dist.all_gather_object(parts, part)
    return parts


@torch.no_grad()
def compare(model: nn.Module, whole: nn.Module, vocab: int, rank: int) -> dict[str, float]:
    """Errors of hidden states, logits and head; whether both ranks have the same bits; the share of parameters on this rank."""
    errors = {}
    for segments in (False, True):
        batch = make_batch(vocab, segments)
        wanted = whole(batch, mode="hidden")
        hidden, again = model(batch, mode="hidden"), model(batch, mode="hidden")
        errors[f"hidden, segments {segments}"] = error(hidden.float(), wanted.float())
        same = all(torch.equal(hidden, other) for other in [again, *gathered(hidden)])
        errors[f"bits, segments {segments}"] = 0.0 if same else math.inf
        logits = torch.cat(gathered(model(batch, mode="logits")), dim=1)
        errors[f"logits, segments {segments}"] = error(logits.float(), whole(batch, mode="logits").float())
    for name, own in (("weight", model.head.weight), ("bias", model.head.bias)):
        wanted = getattr(whole.head, name)
        if wanted is not None:
            errors[f"head {name}"] = 0.0 if torch.equal(torch.cat(gathered(own.detach())), wanted) else math.inf
    shard_ = vocabulary_shard(vocab, rank, RANKS, None)
    teacher = hidden.float()
    arguments = {"labels": batch.labels, "teacher_hidden": teacher}
    parts, full = [
        [head.weight.detach().float(), None if head.bias is None else head.bias.detach().float()]
        for head in (model.head, whole.head)
    ]
    loss = linear_distillation_loss(
        2.0 * teacher, parts[0], bias=parts[1], **arguments, teacher_weight=parts[0], teacher_bias=parts[1], shard=shard_
    )
    wanted = linear_distillation_loss(
        2.0 * teacher, full[0], bias=full[1], **arguments, teacher_weight=full[0], teacher_bias=full[1]
    )
    errors["loss of the shards"] = error(loss.loss, wanted.loss)
    return errors


def held(model: nn.Module, whole: nn.Module) -> float:
    """Values of this rank's matrices against those of the whole."""
    sizes = [sum(p.numel() for p in m.parameters() if p.ndim == 2 and min(p.shape) > 2) for m in (model, whole)]
    return sizes[0] / sizes[1]


def own_model(kind: str, tied: bool, vocab: int, rank: int, folder: Path) -> dict[str, float]:
    common = {"layers": 2, "heads": 4, "hidden": 32, "ffn": 64, "tied": tied, "max_length": 16}
    if kind == "modernbert":
        config = ModernBertConfig(**common, local_window=4)
    else:
        config = LlamaConfig(**common, **LLAMAS[kind]) if kind in LLAMAS else TransformerConfig(kind=kind, **common)
    sizes = {"vocab_size": vocab, "classes": vocab, "length": LENGTH, "options": LossOptions(), "seed": 0}
    first, second = (fill(build_model(config, **sizes), seed).eval() for seed in (1, 2))
    if rank == 0:
        for step, learner in ((1, first), (2, second)):
            write_checkpoint(folder, step, learner.named_parameters(), config={}, vocabulary="v", metrics={}, shard_bytes=1 << 12)
    dist.barrier()
    model = fill(build_model(config, **sizes), 1).eval()
    parts = shard(model, plan_for(model), rank, RANKS, None)
    errors = compare(model, first, vocab, rank)
    assert (model.head.weight is model.body.tokens.weight) == tied
    trajectory = Trajectory(folder)
    copy(model, trajectory.read(2, parts))
    return errors | {f"swapped: {k}": v for k, v in compare(model, second, vocab, rank).items()} | {"held": held(model, first)}


def their_model(kind: str, dtype: torch.dtype, rank: int, folder: Path) -> dict[str, float]:
    """From the meta device: what a rank allocates is its own part alone."""
    settings = config_json(kind)
    whole = []
    for seed in (1, 2):
        whole.append(fill(build_pretrained(settings, dtype, torch.device("cpu")), seed))
        path = folder / f"step_{seed}"
        if rank == 0:
            path.mkdir(parents=True)
            tensors = {name.removeprefix("network."): p.detach() for name, p in whole[-1].named_parameters()}
            save_file(tensors, path / "model.safetensors")
            # The second as transformers writes it.
            if seed == 2:
                restore = whole[-1].network
                restore.save_pretrained(path)
    dist.barrier()
    model = build_pretrained(settings, dtype, torch.device("meta"))
    parts = shard(model, plan_for(model), rank, RANKS, dist.group.WORLD)
    assert all(p.is_meta for p in model.parameters())
    allocate(model, torch.device("cpu"))
    assert isinstance(model, Pretrained)
    errors = {}
    for number, reference in enumerate(whole, start=1):
        copy(model, read_pretrained(model, folder / f"step_{number}", parts))
        errors |= {f"revision {number}: {k}": v for k, v in compare(model, reference, settings["vocab_size"], rank).items()}
    check_head(model, make_batch(settings["vocab_size"], False))
    return errors | {"held": held(model, whole[0])}


def sums(rank: int) -> dict[str, float]:
    """Sizes that the ranks do not divide; a sum in half precision is rounded once."""
    errors = {}
    for shape in ((), (1,), (7,), (3, 5, 1), (4, 2)):
        for dtype in (torch.float32, torch.bfloat16):
            own = [torch.randn(shape, generator=torch.Generator().manual_seed(i)).to(dtype) for i in range(RANKS)]
            result = sum_over_ranks(own[rank].clone(), None)
            wanted = sum(x.double() for x in own).to(dtype)
            errors[f"{shape} {dtype}"] = 0.0 if torch.equal(result, wanted) else error(result, wanted)
    return errors


def refusals(rank: int) -> dict[str, str]:
    """What the user is told, and that nothing was changed before."""
    sizes = {"vocab_size": 5, "classes": 5, "length": LENGTH, "options": LossOptions(), "seed": 0}
    learner = build_model(TransformerConfig(kind="gpt", layers=1, heads=3, hidden=24, ffn=64), **sizes)
    wide = build_model(TransformerConfig(kind="gpt", layers=1, heads=4, hidden=24, ffn=63), **sizes)
    few = build_model(TransformerConfig(kind="gpt", layers=1, heads=4, hidden=24, ffn=64), **sizes)
    neox = build_pretrained(config_json("gpt_neox") | {"num_attention_heads": 2}, torch.float32, torch.device("meta"))
    llama = build_pretrained(config_json("llama") | {"num_key_value_heads": 1}, torch.float32, torch.device("meta"))
    cases = {"heads": (learner, 2), "features": (wide, 2), "classes": (few, 4), "their heads": (neox, 4), "key-value": (llama, 2)}
    told = {}
    for name, (model, ranks) in cases.items():
        before = {key: id(p) for key, p in model.named_parameters()}
        try:
            shard(model, plan_for(model), rank, ranks, None)
        except UserError as error:
            told[name] = str(error)
        assert before == {key: id(p) for key, p in model.named_parameters()}
    return told


def main(folder: str) -> None:
    torch.set_num_threads(1)
    path = Path(folder)
    dist.init_process_group("gloo", timeout=timedelta(seconds=120))
    rank = dist.get_rank()
    found: dict[str, dict] = {}
    left = iter(names())
    for case in OWN:
        name = next(left)
        found[name] = own_model(*case, rank, path / name)
    for kind, dtype in THEIRS:
        name = next(left)
        found[name] = their_model(kind, dtype, rank, path / name)
    found[next(left)] = sums(rank)
    found["refusals"] = refusals(rank)
    (path / f"rank{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
