"""ZeRO stages, accumulation, tied heads, non-finite steps, a callback's state on two ranks, all cases in one launch."""

import json
import math

import pytest

from tests.forked import run_ranks

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    output = tmp_path_factory.mktemp("zero") / "results.json"
    run_ranks("tests.training.worker", [str(output)])
    return json.loads(output.read_text())


def difference(a, b):
    return max(abs(x - y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("variant", ["", "-untied", "-clip", "-sgd"])
def test_stages_agree(results, variant):
    runs = [results[f"stage{s}{variant}"] for s in range(4) if f"stage{s}{variant}" in results]
    assert len(runs) >= 3
    for run in runs[1:]:
        assert difference(run["losses"], runs[0]["losses"]) < 1e-4
        assert difference(run["norms"], runs[0]["norms"]) < 1e-4
    assert max(runs[0]["norms"]) > 1e-3


@pytest.mark.parametrize("stage", range(4))
def test_accumulation_changes_nothing(results, stage):
    one, four = results[f"stage{stage}"], results[f"stage{stage}-accumulate"]
    assert difference(one["losses"], four["losses"]) < 1e-5
    assert difference(one["norms"], four["norms"]) < 1e-5


@pytest.mark.parametrize("stage", range(4))
def test_recomputed_logits_change_nothing(results, stage):
    """In backward the head's weight must be there again, also at stage 3."""
    kept, again = results[f"stage{stage}"], results[f"stage{stage}-recompute"]
    assert difference(kept["losses"], again["losses"]) < 1e-5
    assert difference(kept["norms"], again["norms"]) < 1e-5


@pytest.mark.parametrize("recompute", ["false", "true"])
def test_the_loss_works_under_ddp(results, recompute):
    assert results[f"ddp-{recompute}"]["difference"] < 1e-5 * results[f"ddp-{recompute}"]["size"]


def test_training_moves_the_loss(results):
    losses = results["stage1"]["losses"]
    assert len(set(losses)) == len(losses)
    assert abs(losses[0] - math.log(2)) < 0.1


def test_tied_and_untied_differ(results):
    assert "head.weight" not in results["stage1"]["weights"]
    assert "head.weight" in results["stage1-untied"]["weights"]
    assert difference(results["stage1"]["losses"], results["stage1-untied"]["losses"]) > 1e-6


def test_gathered_weights_agree_across_stages(results):
    for stage in (1, 2, 3):
        ours, reference = results[f"stage{stage}"]["weights"], results["stage0"]["weights"]
        assert ours.keys() == reference.keys()
        assert difference(ours.values(), reference.values()) < 1e-2
    evaluations = [results[f"stage{stage}"]["evaluation"] for stage in range(4)]
    assert all(abs(e["loss"] - evaluations[0]["loss"]) < 1e-4 for e in evaluations)
    assert evaluations[0]["samples"] == 1024


@pytest.mark.parametrize("stage", range(4))
def test_bf16_follows_fp32(results, stage):
    assert difference(results[f"stage{stage}-bf16"]["losses"], results[f"stage{stage}"]["losses"]) < 0.05


@pytest.mark.parametrize("stage", range(4))
def test_the_first_bf16_update_has_the_size_of_the_fp32_one(results, stage):
    """DeepSpeed's stage 0 would begin AdamW's step count at 1, and the first update be a quarter too small."""
    ours, reference = (results[name]["first_update"] for name in (f"stage{stage}-bf16", "stage1"))
    assert ours == pytest.approx(reference, rel=0.1)


@pytest.mark.parametrize("stage", range(4))
def test_bf16_sums_micro_batches_and_ranks_in_fp32(results, stage):
    """32 micro-batches a rank. Sums in bf16, DeepSpeed's own default, are off by 0.008; a single micro-batch is by 0.004."""
    assert results[f"error{stage}"] < 0.006


@pytest.mark.parametrize("precision", ["", "-half"])
@pytest.mark.parametrize("stage", range(4))
def test_a_nonfinite_loss_on_one_rank_skips_the_step_on_all(results, stage, precision):
    for rank in results[f"nonfinite{stage}{precision}"]:
        assert rank["applied"] is False
        assert rank["before"] == rank["after"]
        assert rank["recovered"] is True
        assert math.isfinite(rank["moved"])
        assert rank["moved"] != rank["after"]


@pytest.mark.parametrize("precision", ["", "-half"])
def test_the_state_of_a_callback_is_resumed_bitwise_on_all_ranks(results, precision):
    runs = results[f"callbacks{precision}"]
    assert runs["stopped"] == runs["whole"]
    assert [record["step"] for record in runs["whole"] if record["kind"] == "train"] == list(range(1, 11))
