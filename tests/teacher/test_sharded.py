"""Teachers sharded over two ranks, asked by each of them and through a replica: all cases in one launch."""

import json

import pytest

from tests.forked import run_ranks
from tests.teacher.teachers import MODELS, STEPS, write_trajectory

pytestmark = pytest.mark.slow

CASES = [f"{model}-{sharding}" for model in MODELS for sharding in ("zero", "tensor") if (model, sharding) != ("mlp", "tensor")]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    for model in MODELS:
        write_trajectory(folder / model, model)
    write_trajectory(folder / "damaged")
    shard = max((folder / "damaged" / f"step_{STEPS[1]}").glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    run_ranks("tests.teacher.sharded_worker", [str(folder)])
    return json.loads((folder / "results.json").read_text())


def check(gaps):
    assert gaps["argmax"] == gaps["sampled"] == 0.0
    assert all(gaps[kind] < 1e-5 for kind in ("hidden", "dense", "topk"))


@pytest.mark.parametrize("case", CASES)
def test_a_sharded_teacher_answers_as_the_whole_one(results, case):
    for rank in results[case]:
        check(rank)


@pytest.mark.parametrize("case", CASES)
def test_a_replica_of_two_ranks_answers_as_one(results, case):
    check(results[f"{case}-replica"][0])


def test_older_checkpoints_stay_resident(results):
    for rank in results["resident"]:
        check(rank)
        assert rank["resident"] == 2


@pytest.mark.parametrize("sharding", ["zero", "tensor"])
def test_damage_that_one_rank_finds_is_refused_by_all(results, sharding):
    first, second = results[f"damaged-{sharding}"]
    assert any("sha256" in rank["refused"] for rank in (first, second))
    assert any("another rank" in rank["refused"] for rank in (first, second))
    assert first["held"] == second["held"] == STEPS[0]
