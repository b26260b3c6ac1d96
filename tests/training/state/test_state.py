"""Checkpoints: bitwise on the same ranks, equal on others and at other stages, read whole by anybody, executing nothing."""

import json
import os
import pickle
import shutil

import pytest
import torch

from megapd.errors import UserError
from megapd.training import start_world
from megapd.training.state.files import StateReader
from tests.forked import run_ranks
from tests.training.state import worker

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    found = tmp_path_factory.mktemp("state")
    run_ranks("tests.training.state.worker", [str(found)])
    return found


@pytest.fixture(scope="module")
def results(folder):
    return json.loads((folder / "results.json").read_text())


@pytest.mark.parametrize("kind", ["ours", "former"])
@pytest.mark.parametrize("case", worker.CASES)
def test_what_was_saved_is_restored_bitwise(results, case, kind):
    """former: DeepSpeed's own checkpoint, of a run that an older megapd began."""
    for rank in results[case]:
        restored = rank[kind]
        assert restored["losses"] == rank["losses"]
        assert (restored["read"], restored["end"]) == (rank["saved"], rank["whole"])
        carried = (
            {"text": "t", "numbers": [1, 0.1 + 0.2, None], "tensor": {"at": [[0, 1, 2]]}} if kind == "ours" else {"known": [1]}
        )
        assert {key: restored["carried"][key] for key in (*carried, "step")} == {**carried, "step": worker.SAVED}


# Half of the pairs: every stage reads every other.
PAIRS = [(case, stage) for number, case in enumerate(worker.CASES) for stage in range(4) if (stage + number) % 2 == 0]


@pytest.mark.parametrize(("case", "stage"), PAIRS)
def test_one_rank_goes_on_from_two_at_any_stage(folder, results, case, stage):
    world, config = start_world(), worker.settings(case, seed=1)
    training = config.training.model_copy(update={"zero_stage": stage})
    config = config.model_copy(update={"training": training})
    engine = worker.engine_of(config, world)
    assert worker.store(folder / case, world).restore(engine)["step"] == worker.SAVED
    losses = worker.steps(engine, worker.settings(case), world, worker.SAVED, worker.STEPS)
    engine.destroy()
    bar = 1e-5 if config.training.precision == "fp32" else 2e-3
    assert losses == pytest.approx(results[case][0]["losses"], abs=bar)


def test_whole_weights_are_read_by_name(folder):
    """The same whatever wrote them."""
    whole = {}
    for stage in range(4):
        with StateReader(folder / f"fp32-{stage}" / "step_3") as state:
            whole[stage] = dict(state.weights())
    assert all(tensor.dtype == torch.float32 for tensor in whole[0].values())
    for stage in (1, 2, 3):
        assert whole[stage].keys() == whole[0].keys()
        for name, tensor in whole[stage].items():
            assert tensor.shape == whole[0][name].shape
            assert torch.allclose(tensor, whole[0][name], atol=1e-4)


def test_a_foreign_pickle_is_not_executed(folder, tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    copy = tmp_path / "checkpoints"
    shutil.copytree(folder / "fp32-0-former", copy)
    step = copy / "step_3"
    (path,) = step.glob("*.pt")
    torch.save({**torch.load(path, weights_only=False), "more": Bomb()}, path, pickle_module=pickle)
    tree = json.loads((step / "manifest.json").read_text())
    tree["layout"]["ranks"] = 1
    tree["files"][path.name] = {"bytes": path.stat().st_size, "sha256": worker.sha256_file(path)}
    (step / "manifest.json").write_text(json.dumps(tree))
    world = start_world()
    engine = worker.engine_of(worker.settings("fp32-0"), world)
    with pytest.raises(UserError, match="it would execute what is no part of a checkpoint"):
        worker.store(copy, world).restore(engine)
    engine.destroy()
    assert not (tmp_path / "executed").exists()


def test_what_a_checkpoint_cannot_carry_is_told(tmp_path):
    world = start_world()
    engine = worker.engine_of(worker.settings("fp32-0"), world)
    for state, told in (({"a": {"b": [object()]}}, r"a\.b\[0\] is of object"), ({"a": {1: 2}}, "a has a key that is no text")):
        with pytest.raises(UserError, match=told):
            worker.store(tmp_path, world).save(engine, 1, state)
    engine.destroy()
    assert not (tmp_path / "step_1").exists()


def test_what_was_just_written_stays(tmp_path):
    """Also beside later ones of another run; and only the last are kept."""
    world = start_world()
    engine = worker.engine_of(worker.settings("fp32-0"), world)
    store = worker.store(tmp_path, world)
    (tmp_path / "step_90").mkdir()
    (tmp_path / "step_100").mkdir()
    for step in (1, 2, 3):
        store.save(engine, step, {})
    engine.destroy()
    assert store.steps() == [2, 3, 90, 100]
