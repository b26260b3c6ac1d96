"""Contract 4: whatever holds the teacher and carries its signals, two ranks learn the same."""

from __future__ import annotations

import itertools
import json

import pytest

from megapd.processes.local import free_port
from tests.corpus import corpora
from tests.forked import run_ranks
from tests.teacher.launching import Server
from tests.teacher.teachers import write_text_trajectory
from tests.training.runs import metrics

pytestmark = pytest.mark.slow

STEPS = 50
SHARDINGS = ("whole", "zero", "tensor")
CARRIERS = ("colocated", "served", "shared_memory")
SIGNALS = {"gpt": ["--teacher.signal=hidden"], "bert": ["--teacher.signal=dense"]}


@pytest.fixture(scope="module", params=["gpt", "bert"])
def losses(request, tmp_path_factory):
    """Losses of every run, by name, and the cache that the first one wrote."""
    style = request.param
    folder = tmp_path_factory.mktemp(style)
    corpora.prepared(folder, style)
    write_text_trajectory(folder / "trajectory", folder / "corpus", style, steps=(10, 20, 30, 40))
    common = [
        "--task.kind=text",
        f"--task.objective={'mlm' if style == 'bert' else 'clm'}",
        f"--task.corpus={folder / 'corpus'}",
        "--task.document_mask=true",
        f"--model={{kind: {style}, layers: 1, hidden: 16, heads: 2}}",
        f"--runs_dir={folder}",
        f"--training.steps={STEPS}",
        "--training.global_batch=8",
        "--training.micro_batch=2",
        "--optimizer.lr=0.01",
        "--telemetry={every: 1, wandb: disabled, progress: false}",
        "--evaluation.samples=16",
        f"--teacher.trajectory={folder / 'trajectory'}",
        "--schedule.policy=matched",
        "--schedule.refresh=10",
        *SIGNALS[style],
    ]
    servers, runs = {}, {}
    try:
        for sharding in SHARDINGS:
            ranks = 1 if sharding == "whole" else 2
            servers[sharding] = Server([*common, f"--teacher.sharding={sharding}"], free_port(), ranks)
        for sharding in SHARDINGS:
            servers[sharding].wait()
            for carrier in CARRIERS:
                own = [f"--name={sharding}-{carrier}", f"--teacher.carrier={carrier}", f"--teacher.sharding={sharding}"]
                if carrier != "colocated":
                    own.append(f"--teacher.endpoints=[{servers[sharding].endpoint}]")
                if carrier == "served":
                    own.append(f"--teacher.cache={folder / 'cache' / sharding}")
                runs[f"{sharding}-{carrier}"] = [*common, *own]
            cached = [f"--name={sharding}-cached", "--teacher.carrier=cached", f"--teacher.cache={folder / 'cache' / sharding}"]
            runs[f"{sharding}-cached"] = [*common, *cached]
        (folder / "runs.json").write_text(json.dumps(runs))
        run_ranks("tests.teacher.students_worker", [str(folder / "runs.json")])
    finally:
        for server in servers.values():
            server.stop()
    return {name: [m["loss"] for m in metrics(folder / name) if m["kind"] == "train"] for name in runs}


def test_every_step_was_taught(losses):
    assert all(len(values) == STEPS for values in losses.values())


@pytest.mark.parametrize("sharding", SHARDINGS)
def test_a_recorded_run_is_repeated_bitwise(losses, sharding):
    assert losses[f"{sharding}-cached"] == losses[f"{sharding}-served"]


@pytest.mark.parametrize("carrier", CARRIERS)
@pytest.mark.parametrize("sharding", SHARDINGS)
def test_streams_are_interchangeable(losses, sharding, carrier):
    assert losses[f"{sharding}-{carrier}"] == pytest.approx(losses["whole-colocated"], abs=1e-5)


def test_the_rotations_are_felt(losses):
    """Else the comparison above would prove little: another teacher changes the loss far more than a carrier does."""
    values = losses["whole-colocated"]
    jumps = [abs(b - a) for a, b in itertools.pairwise(values)]
    assert min(jumps[step - 1] for step in (10, 20, 30)) > 1e-3
