"""Vocabulary shards on two and three ranks, unequal, against the loss of one process. The cases are in shard_worker.py."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest
import torch
import torch.multiprocessing

from megapd_kernels import LossOptions, VocabularyShard, linear_distillation_loss, softmax_kl, topk_logits

from . import shard_worker
from .shard_worker import PARTS, WORLD, Errors, V

pytestmark = pytest.mark.slow

FAMILIES = [(name, world) for world in PARTS for name in dict.fromkeys(n.split()[0] for n, _ in shard_worker.names(world))]


@pytest.fixture(scope="module")
def errors(tmp_path_factory: pytest.TempPathFactory) -> list[dict[int, dict[str, Errors]]]:
    """Of each rank. One start of three processes for all cases; one that fails takes the others with it."""
    folder = tmp_path_factory.mktemp("shards")
    # Ranks are forked from a server that has imported once what takes seconds; this process has run backward and cannot be.
    multiprocessing.set_forkserver_preload(["torch._dynamo", "megapd_kernels"])
    torch.multiprocessing.start_processes(shard_worker.main, (str(folder),), nprocs=WORLD, start_method="forkserver")
    return [torch.load(Path(folder, f"rank{rank}.pt")) for rank in range(WORLD)]


@pytest.mark.parametrize(("family", "world"), FAMILIES)
def test_shards_give_the_whole(errors: list[dict[int, dict[str, Errors]]], world: int, family: str) -> None:
    checked = [name for name, _ in shard_worker.names(world) if name.split()[0] == family]
    wrong = {
        (rank, name, what): error
        for rank in range(world)
        for name in checked
        for what, error in errors[rank][world][name].items()
        if not error < (2e-5 if "float32" in name else 1e-11)
    }
    assert checked
    assert wrong == {}


def test_the_parts_are_unequal_and_whole() -> None:
    for world, parts in PARTS.items():
        assert len(set(parts)) == len(parts) == world
        assert sum(parts) == V


def test_arguments_without_a_meaning_are_refused() -> None:
    """Before any rank is spoken to: there is no group here."""
    hidden, weight, labels = torch.zeros(4, 3), torch.zeros(5, 3), torch.zeros(4, dtype=torch.int64)
    for shard, classes in ((VocabularyShard("none", 6, 10), 5), (VocabularyShard("none", 10, 10), 0)):
        message = rf"^shard: {classes} classes from {shard.start} on, but all ranks together have 10"
        with pytest.raises(ValueError, match=message):
            linear_distillation_loss(hidden, weight[:classes], labels=labels, shard=shard)
        with pytest.raises(ValueError, match=message):
            softmax_kl(torch.zeros(4, classes), labels=labels, shard=shard)
        with pytest.raises(ValueError, match=message):
            topk_logits(hidden, weight[:classes], 2, shard=shard)
    with pytest.raises(ValueError, match=r"^common_vocabulary: cannot be combined with a vocabulary shard"):
        softmax_kl(
            torch.zeros(4, 5),
            torch.zeros(4, 5),
            shard=VocabularyShard("none", 0, 10),
            options=LossOptions(common_vocabulary=True),
        )
    with pytest.raises(ValueError, match=r"^start: must lie in \[0, 10\], got 11"):
        VocabularyShard.of(None, 11, 10)  # type: ignore[arg-type]
