"""Curriculum metrics: each against a computation by hand in float64, and the walk over a trajectory that keeps them."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch

from megapd.analysis.curriculum import Metric, analyse, metrics_of
from megapd.batch import Batch
from megapd.config import load
from megapd.errors import UserError
from megapd.models import build_model
from megapd.registry import metrics as registered
from megapd.tasks import build_task
from megapd.trajectory.measured import FILE
from megapd.trajectory.reader import Trajectory, read_meta
from megapd.trajectory.writer import write_checkpoint
from megapd_kernels import LossOptions
from tests.corpus import corpora
from tests.models.sequences import spread

GRAMMAR = "--task={kind: grammar, root: 15, heldout_samples: 40}"
BERT = "--model={kind: bert, layers: 1, heads: 2, hidden: 16}"
PARITY = "--task={kind: parity, dimension: 9, degree: 3}"


def made(*settings):
    """A task and a model of it, in float64."""
    config = load(None, list(settings))
    task = build_task(config)
    sizes = {"vocab_size": task.vocab_size, "classes": task.classes, "length": task.length}
    model = spread(build_model(config.model, **sizes, options=LossOptions(), seed=0), 3).double().eval()
    return task, model.requires_grad_(False)


def measured(task, model, name, samples=None):
    (metric,) = metrics_of(task, [name], samples).values()
    return metric.measure(model)


def probabilities(model, ids, place):
    """Of one row without padding, at one place."""
    batch = Batch(torch.tensor([ids]), None, torch.tensor([place]), torch.tensor([0]), torch.tensor([0]))
    return model(batch, mode="logits").softmax(-1)[0]


@pytest.mark.parametrize("bos", ["true", "false"])
@pytest.mark.parametrize("window", [(2, -1, 0), (3, -1, 1), (4, -2, 1), (5, -2, 2)])
def test_context(window, bos):
    task, model = made(GRAMMAR.replace("root: 15", f"root: 15, bos: {bos}"), BERT)
    found = measured(task, model, "context", 12)
    n, first, last = window
    rows = task.heldout_rows(range(12))
    robust, close = [], []
    for row, length in zip(rows.ids.tolist(), rows.lengths.tolist(), strict=True):
        ids = row[:length]
        free = [place for place, token in enumerate(ids) if token < 3]
        place = free[len(free) // 2]
        alone, without, only = list(ids), list(ids), list(ids)
        alone[place] = task.mask_token
        for other in free:
            if place + first <= other <= place + last:
                without[other] = task.mask_token
            else:
                only[other] = task.mask_token
        only[place] = task.mask_token
        p, q, r = (probabilities(model, each, place) for each in (alone, without, only))
        robust.append(0.5 * (p - q).abs().sum().item())
        close.append(0.5 * (p - r).abs().sum().item())
    for name, values in ((f"m_robust_{n}", robust), (f"m_close_{n}", close)):
        assert found[name] == pytest.approx(np.median(values), abs=1e-12)
        assert found[f"{name}_mean"] == pytest.approx(np.mean(values), abs=1e-12)
        assert found[f"{name}_sd"] == pytest.approx(np.std(values), abs=1e-12)
        assert found[f"{name}_p75"] == pytest.approx(np.percentile(values, 75), abs=1e-12)
    assert found[f"m_robust_{n}"] > 1e-3


@pytest.mark.parametrize("packing", ["concatenate", "single"])
def test_context_of_text(tmp_path, packing):
    """Positions each 30 of long rows, documents kept apart."""
    config = corpora.prepared(tmp_path, "bert", "--corpus.block_length=128", f"--corpus.packing={packing}")
    section = f"--task={{kind: text, corpus: {config.corpus.output}, document_mask: true}}"
    task, model = made(section, BERT)
    found = measured(task, model, "context", 3)
    rows = task.heldout_rows(range(3))
    values = []
    for number in range(3):
        length = int(rows.lengths[number])
        ids = torch.tensor(rows.ids[number, :length])
        segments = None if rows.segments is None else torch.tensor(rows.segments[number, :length])[None]
        free = np.flatnonzero(~task.special[ids.numpy()])
        for place in (free[29::30] if len(free) >= 60 else free[len(free) // 2 :][:1]).tolist():
            sides = []
            for near in ([place], [place - 1, place, place + 1]):
                masked = ids.clone()
                masked[[other for other in near if 0 <= other < length and not task.special[ids[other]]]] = task.mask_token
                batch = Batch(masked[None], segments, torch.tensor([place]), torch.tensor([0]), torch.tensor([0]))
                sides.append(model(batch, mode="logits").softmax(-1)[0])
            values.append(0.5 * (sides[0] - sides[1]).abs().sum().item())
    assert found["m_robust_3"] == pytest.approx(np.median(values), abs=1e-12)
    assert found["m_robust_3_mean"] == pytest.approx(np.mean(values), abs=1e-12)


def test_monomials():
    task, model = made(PARITY, "--model={kind: mlp, width: 5}")
    found = measured(task, model, "monomials", 700)
    batch = task.heldout(range(700))
    x = (2 * batch.ids.double() - 1).numpy()
    p = model(batch, mode="logits").softmax(-1)[:, 1].numpy()
    p = p - p.mean()
    for degree in (1, 2, 3):
        sets = combinations(sorted(task.supports[0].tolist()), degree)
        wanted = np.mean([abs(np.mean(x[:, list(each)].prod(1) * p)) for each in sets])
        assert found[f"degree_{degree}"] == pytest.approx(wanted, abs=1e-12)
    floor = np.sqrt(2 / np.pi) * p.std() / np.sqrt(700)
    assert found["floor"] == pytest.approx(floor, abs=1e-12)
    ratios = [found[f"degree_{degree}"] / max(found[f"degree_{degree}_out"], floor) for degree in (1, 2)]
    assert found["support"] == pytest.approx(max(ratios), abs=1e-12)


def answering(function):
    """A model of parity whose probability of class 1 is a function of the signs [N, d]."""

    def model(batch, mode):
        upper = function(2.0 * batch.ids.double() - 1.0)
        return torch.stack([1 - upper, upper], -1).log()

    return model


def test_monomials_of_models_that_are_known():
    task, _ = made(PARITY, "--model={kind: mlp, width: 5}")
    i, j, k = task.supports[0].tolist()
    right = measured(task, answering(lambda x: 0.5 + 0.49 * x[:, [i, j, k]].prod(-1)), "monomials", 4000)
    assert right["degree_3"] == pytest.approx(0.49, rel=0.01)
    assert right["degree_1"] < 3 * right["floor"]
    assert right["floor"] == pytest.approx(np.sqrt(2 / np.pi) * 0.49 / 4000**0.5, rel=0.01)
    noise = np.mean([right["degree_1_out"], right["degree_2_out"], right["degree_3_out"]])
    assert noise == pytest.approx(right["floor"], rel=0.3)
    half = measured(task, answering(lambda x: 0.5 + 0.1 * x[:, i] + 0.1 * x[:, j]), "monomials", 4000)
    assert half["degree_1"] == pytest.approx(0.2 / 3, rel=0.1)
    assert half["support"] > 10 > right["support"]


@pytest.mark.parametrize("objective", ["mlm", "clm"])
def test_boundaries(objective):
    kind = {"mlm": "bert", "clm": "gpt"}[objective]
    task, model = made(GRAMMAR.replace("root", f"objective: {objective}, root"), BERT.replace("bert", kind))
    found = measured(task, model, "boundaries", 40)
    right, asked = {}, {}
    for number in range(40):
        batch = task.heldout(range(number, number + 1))
        length = int(batch.lengths[0])
        alone = Batch(batch.ids[:, :length], None, batch.positions, batch.labels, batch.sample_ids)
        guesses = model(alone, mode="logits").argmax(-1).tolist()
        grown = task.heldout_sentences(np.array([number]), trees=True)
        for place, label, guess in zip(batch.positions.tolist(), batch.labels.tolist(), guesses, strict=True):
            token = place - 1 if objective == "mlm" else place
            assert grown.ids[0, token] == label
            level = max([0, *(1 + which for which in range(3) if grown.ends[which, 0, token])])
            right[level] = right.get(level, 0) + (guess == label)
            asked[level] = asked.get(level, 0) + 1
    assert found == pytest.approx({f"boundary_{level}": right[level] / asked[level] for level in asked})


def test_nonterminals_are_read_off_states_that_hold_them():
    """Chance of three symbols is a third; a model whose states spell the symbols out is read."""
    from megapd.analysis.curriculum.nonterminals import Nonterminals

    task, model = made(GRAMMAR.replace("heldout_samples: 40", "heldout_samples: 400"), BERT)
    by_chance = measured(task, model, "nonterminals", 80)
    assert set(by_chance) == {"nonterminal_1", "nonterminal_2"}
    assert all(0.2 < value < 0.75 for value in by_chance.values())

    def telling(batch, mode):
        rows = task.heldout_rows(range(400)).ids
        numbers = [int(np.flatnonzero((rows[:, : batch.ids.shape[1]] == row).all(1))[0]) for row in batch.ids.numpy()]
        grown = task.heldout_sentences(np.array(numbers), trees=True)
        states = torch.zeros(*batch.ids.shape, 24)
        for level in range(3):
            width = min(batch.ids.shape[1] - 1, grown.ids.shape[1])
            states[:, 1 : 1 + width] += torch.nn.functional.one_hot(torch.tensor(grown.ancestors[level, :, :width]), 24)
        return states.flatten(0, 1)

    told = Nonterminals(task, 400).measure(telling)
    assert min(told.values()) > 0.9


# ------------------------------------------------------------------------------------------------------------- the walk


@pytest.fixture
def trajectory(tmp_path):
    config = load(None, [PARITY, "--model={kind: mlp, width: 5}"])
    task = build_task(config)
    sizes = {"vocab_size": task.vocab_size, "classes": task.classes, "length": task.length}
    for step in (5, 10):
        model = build_model(config.model, **sizes, options=LossOptions(), seed=step)
        write_checkpoint(
            tmp_path / "trajectory",
            step,
            model.named_parameters(),
            config={"model": config.model.model_dump(mode="json"), "shapes": sizes},
            vocabulary=task.vocabulary_digest,
            metrics={"eval/loss": 1.0 / step},
            shard_bytes=1 << 20,
        )
    return task, Trajectory(tmp_path / "trajectory")


def test_what_was_measured_is_kept_with_the_checkpoints(trajectory):
    task, there = trajectory
    before = read_meta(there.folder / "step_5")
    asked, told = metrics_of(task, ["monomials"], 100), []
    found = analyse(there, task, asked, lambda step, name: told.append((step, name)))
    assert told == [(5, "monomials"), (10, "monomials")]
    assert analyse(there, task, asked, lambda step, name: told.append((step, name))) == found
    assert len(told) == 2, "measured again"
    now = read_meta(there.folder / "step_5")
    assert now.digest == before.digest
    assert now.metrics["eval/loss"] == 0.2
    assert now.metrics["curriculum/degree_1"] == found[5]["degree_1"]
    assert there.verify() == []
    other = analyse(there, task, metrics_of(task, ["monomials"], 50), lambda step, name: told.append((step, name)))
    assert len(told) == 4
    assert other[5]["floor"] != found[5]["floor"]


def test_an_analysis_that_was_stopped_goes_on(trajectory):
    task, there = trajectory
    asked, told = metrics_of(task, ["monomials"], 100), []

    def stops(step, name):
        if step == 10:
            raise KeyboardInterrupt
        told.append(step)

    with pytest.raises(KeyboardInterrupt):
        analyse(there, task, asked, stops)
    analyse(there, task, asked, lambda step, name: told.append(step))
    assert told == [5, 10]


def test_a_record_of_other_weights_is_none_and_a_damaged_one_is_told(trajectory):
    task, there = trajectory
    asked = metrics_of(task, ["monomials"], 100)
    analyse(there, task, asked)
    five, ten = (there.folder / f"step_{step}" / FILE for step in (5, 10))
    ten.write_bytes(five.read_bytes())
    assert "curriculum/degree_1" not in read_meta(there.folder / "step_10").metrics
    told = []
    analyse(there, task, asked, lambda step, name: told.append(step))
    assert told == [10]
    five.write_text(five.read_text().replace("0.0", "0.1", 1))
    with pytest.raises(UserError, match=r"measured\.json: damaged .*remove it"):
        read_meta(there.folder / "step_5")


def test_which_metrics_are_for_which_task():
    parity, grammar = (made(*settings)[0] for settings in ((PARITY, "--model={kind: mlp, width: 5}"), (GRAMMAR, BERT)))
    assert set(metrics_of(parity)) == {"monomials"}
    assert set(metrics_of(grammar)) == {"boundaries", "context"}
    with pytest.raises(UserError, match="--metrics: context: the task lacks a mask token"):
        metrics_of(parity, ["context"])
    with pytest.raises(UserError, match="unknown metric 'contexts'; the nearest is 'context'"):
        metrics_of(grammar, ["contexts"])


def test_a_metric_from_outside(trajectory, monkeypatch):
    class Mean(Metric):
        def __init__(self, task, samples):
            self.task, self.settings = task, {"version": 1}

        def measure(self, model):
            return {"mean_1": model(self.task.heldout(range(8)), mode="logits").softmax(-1)[:, 1].mean().item()}

    monkeypatch.setattr(registered, "_entries", {**registered._entries, "mean": Mean})
    task, there = trajectory
    found = analyse(there, task, metrics_of(task, ["mean"]))
    assert 0 < found[5]["mean_1"] != found[10]["mean_1"]
    monkeypatch.setattr(Mean, "measure", lambda self, model: {"mean_1": float("nan")})
    monkeypatch.setattr(Mean, "convention", "x")
    (there.folder / "step_5" / FILE).unlink()
    with pytest.raises(UserError, match="mean: mean_1 is nan"):
        analyse(there, task, metrics_of(task, ["mean"]))
