"""Does a change leave the numbers as they were? Metrics of a fixed set of tiny runs at two commits, compared bitwise.

    python benchmarks/same_numbers.py REF [--only NAME ...] [--keep FOLDER]

REF (a commit, a branch) is checked out beside this tree and installed into a temporary folder. The same runs are made with both,
by the command line alone: parity (MLP), BERT and GPT; every kind of signal and divergence; ZeRO 0-3, accumulation and sharded
teachers on two ranks; teachers served over TCP and in shared memory; a recorded cache; adaptive and following schedules. Compared
are all lines of metrics.jsonl, which may have gained numbers, but for what depends on the clock, and the digests of the teachers'
checkpoints. Exit code 1 where a run differs, with its first difference. Four minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
CLOCK = ("seconds", "tok_per_sec", "mfu", "data_wait", "teacher_wait")
ALWAYS = ["--telemetry.every=1", "--telemetry.wandb=disabled", "--telemetry.progress=false", "--evaluation.samples=16"]
SYLLABLES = ("ka", "lo", "mi", "ter", "un", "pra", "sen", "vo", "gul", "is", "est", "or")

Runs = dict[str, list[str]]  # a run's name -> its settings


def parity(*settings: str) -> list[str]:
    task = ["--task.kind=parity", "--task.dimension=10", "--task.degree=2", "--model.kind=mlp", "--training.global_batch=16"]
    return [*ALWAYS, *task, "--optimizer.kind=adamw", "--optimizer.lr=0.01", "--evaluation.every=10", *settings]


def corpus(kind: str) -> list[str]:
    tokenizer = {"bert": "{kind: unigram, style: bert, vocab_size: 320}", "gpt": "{kind: bpe, style: gpt, vocab_size: 320}"}[kind]
    place = [f"--corpus.output=corpus_{kind}", "--corpus.sources=[{path: text.jsonl}]", f"--corpus.tokenizer={tokenizer}"]
    objective = "mlm" if kind == "bert" else "clm"
    blocks = ["--corpus.block_length=32", "--corpus.heldout_fraction=0.2"]
    return [*place, *blocks, "--task.kind=text", f"--task.objective={objective}", f"--model.kind={kind}"]


def text(kind: str, *settings: str, hidden: int = 16) -> list[str]:
    model = ["--model.layers=2", f"--model.hidden={hidden}", "--model.heads=2"]
    training = ["--training.global_batch=8", "--optimizer.lr=0.003", "--evaluation.every=10", "--lr.warmup=2"]
    return [*ALWAYS, *corpus(kind), *model, *training, *settings]


def taught(by: str, *settings: str) -> list[str]:
    return [f"--teacher.trajectory=runs/{by}/trajectory", *settings]


STEPS, SHORT = "--training.steps=20", "--training.steps=10"
ROTATES = ["--schedule.policy=matched", "--schedule.refresh=5"]
TEACHERS: Runs = {
    "parity_teacher": parity("--model.width=32", STEPS, "--trajectory.every=5"),
    "bert_teacher": text("bert", STEPS, "--trajectory.every=5", hidden=32),
    "gpt_teacher": text("gpt", STEPS, "--trajectory.every=5", hidden=32),
}
ALONE: Runs = {
    "parity_labels": parity("--model.width=8", STEPS),
    "parity_student": parity("--model.width=8", STEPS, *taught("parity_teacher", *ROTATES, "--loss.teacher_temperature=1.0e-4")),
    "parity_follow": parity(
        "--model.width=8",
        STEPS,
        *taught("parity_teacher", "--schedule.policy=follow", "--schedule.refresh=5", "--schedule.last=20"),
    ),
    "parity_adaptive": parity(
        "--model.width=8",
        "--training.steps=60",
        *taught("parity_teacher", "--schedule={policy: adaptive, teachers: [5, 10, 20], window: 2, min_dwell: 4, lead: 4}"),
        "--evaluation.every=2",
    ),
    "gpt_hidden": text("gpt", STEPS, *taught("gpt_teacher", *ROTATES, "--teacher.signal=hidden", "--loss.alpha=0.3")),
    "gpt_int8": text("gpt", SHORT, *taught("gpt_teacher", *ROTATES, "--teacher.signal=hidden", "--teacher.encoding=int8")),
    "gpt_dense": text("gpt", SHORT, *taught("gpt_teacher", *ROTATES, "--teacher.signal=dense", "--loss.divergence=jsd")),
    "gpt_topk": text("gpt", SHORT, *taught("gpt_teacher", *ROTATES, "--teacher.signal=topk", "--teacher.k=8")),
    "gpt_sampled": text("gpt", SHORT, *taught("gpt_teacher", *ROTATES, "--teacher.signal=sampled", "--loss.z_loss=0.001")),
    "gpt_bf16": text("gpt", SHORT, *taught("gpt_teacher", *ROTATES), "--training.precision=bf16", "--training.clip=1.0"),
    "bert_argmax": text("bert", STEPS, *taught("bert_teacher", *ROTATES, "--loss.teacher_temperature=0")),
    "bert_reverse": text("bert", SHORT, *taught("bert_teacher", *ROTATES, "--loss.divergence=reverse_kl")),
    "bert_tvd": text(
        "bert", SHORT, *taught("bert_teacher", "--schedule={policy: equal, checkpoints: 2, steps: 5}", "--loss.divergence=tvd")
    ),
}
ON_TWO_RANKS: Runs = {
    **{
        f"gpt_zero{stage}": text(
            "gpt", SHORT, *taught("gpt_teacher", *ROTATES), f"--training.zero_stage={stage}", "--training.micro_batch=2"
        )
        for stage in range(4)
    },
    "bert_zero1": text("bert", SHORT, *taught("bert_teacher", *ROTATES), "--training.zero_stage=1"),
    "parity_zero1": parity("--model.width=8", STEPS, *taught("parity_teacher", *ROTATES), "--training.zero_stage=1"),
    "gpt_teacher_zero": text("gpt", SHORT, *taught("gpt_teacher", *ROTATES, "--teacher.sharding=zero")),
    "gpt_teacher_tensor": text("gpt", SHORT, *taught("gpt_teacher", *ROTATES, "--teacher.sharding=tensor")),
}
RECORDED = ["--teacher.carrier=cached", "--teacher.cache=signals"]
CACHED: Runs = {"bert_cached": text("bert", SHORT, *taught("bert_teacher", *ROTATES, *RECORDED))}


def served(port: int) -> Runs:
    def run(carrier: str) -> list[str]:
        endpoint = [f"--teacher.carrier={carrier}", f"--teacher.endpoints=[grpc://127.0.0.1:{port}]"]
        return text("gpt", SHORT, *taught("gpt_teacher", *ROTATES, *endpoint))

    return {"gpt_served": run("served"), "gpt_shared_memory": run("shared_memory")}


# ---------------------------------------------------------------------------------------------------- in one tree's processes


def perform(verb: str, runs: Runs) -> None:
    """`megapd VERB` for each run, in this process: `runs` are lists of settings."""
    from megapd.cli import main

    for name, settings in runs.items():
        assert main([verb, f"--name={name}", *settings]) == 0, name


# ----------------------------------------------------------------------------------------------------------------- the trees


class Tree:
    """The runs of one tree, below `folder`. path: what goes first on PYTHONPATH."""

    def __init__(self, folder: Path, path: list[Path], only: list[str]) -> None:
        self._folder, self._only = folder, only
        folder.mkdir(parents=True)
        self._environment = {
            **{key: value for key, value in os.environ.items() if not key.startswith("MEGAPD_")},
            "PYTHONPATH": os.pathsep.join(map(str, path)),
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
        }

    def train(self, runs: Runs, *, ranks: int = 1) -> None:
        self._perform("train", {name: runs[name] for name in runs if not self._only or name in self._only}, ranks)

    def perform(self, verb: str, runs: Runs) -> None:
        self._perform(verb, runs, 1)

    def _perform(self, verb: str, runs: Runs, ranks: int) -> None:
        if not runs:
            return
        given = json.dumps({"verb": verb, "runs": runs})
        world = {} if ranks == 1 else {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        processes = []
        for rank in range(ranks):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}
            processes.append(self._start([str(Path(__file__).resolve()), "--perform", given], {**world, **own}))
        codes = [process.wait() for process in processes]
        assert not any(codes), f"{verb} failed: see {self._folder}/log"

    @contextmanager
    def teacher(self, port: int) -> Iterator[None]:
        """A replica that answers each request alone: answered together, sums are rounded otherwise."""
        settings = [f"--teacher.server.port={port}", "--teacher.server.token_budget=1"]
        settings += text("gpt", SHORT, *taught("gpt_teacher", *ROTATES))
        process = self._start(["-m", "megapd", "teacher", *settings], {})
        try:
            deadline = time.monotonic() + 120
            while not answers(port):
                assert process.poll() is None, f"the teacher ended: see {self._folder}/log"
                assert time.monotonic() < deadline, "the teacher did not come up"
                time.sleep(0.2)
            yield
        finally:
            process.terminate()
            process.wait()

    def _start(self, arguments: list[str], environment: dict[str, str]) -> subprocess.Popen[bytes]:
        with (self._folder / "log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, *arguments],
                cwd=self._folder,
                env={**self._environment, **environment},
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def numbers(self) -> dict[str, list[Any]]:
        """Run -> its lines of metrics, and the digests of its trajectory."""
        found: dict[str, list[Any]] = {}
        for path in sorted(self._folder.glob("runs/*/metrics.jsonl")):
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            numbers = [line for line in lines if line["kind"] != "run"]  # the first names the run by a random id
            found[path.parent.name] = [{k: v for k, v in line.items() if k not in CLOCK} for line in numbers]
            for meta in sorted(path.parent.glob("trajectory/*/meta.json")):
                found[path.parent.name].append({meta.parent.name: json.loads(meta.read_text())["digest"]})
        return found


def make(folder: Path, path: list[Path], only: list[str]) -> dict[str, list[Any]]:
    started, tree = time.perf_counter(), Tree(folder, path, only)
    draw = random.Random(0)
    words = ["".join(draw.choices(SYLLABLES, k=draw.randint(1, 3))) for _ in range(300)]
    with (folder / "text.jsonl").open("w") as file:
        for number in range(60):
            body = " ".join(draw.choices(words, k=draw.randint(40, 200)))
            file.write(json.dumps({"text": f"number {number}\n\n{body}."}) + "\n")
    tree.perform("prepare", {"bert": corpus("bert"), "gpt": corpus("gpt")})
    tree.perform("train", TEACHERS)
    tree.train(ALONE)
    tree.train(ON_TWO_RANKS, ranks=2)
    if not only or "bert_cached" in only:
        tree.perform(
            "record", {"bert_recorded": text("bert", SHORT, *taught("bert_teacher", *ROTATES, "--teacher.cache=signals"))}
        )
        tree.train(CACHED)
    port = free_port()
    if not only or set(served(port)) & set(only):
        with tree.teacher(port):
            tree.train(served(port))
    numbers = tree.numbers()
    print(f"{folder.name}: {len(numbers)} runs in {time.perf_counter() - started:.0f} s", flush=True)
    return numbers


def checkout(ref: str, folder: Path) -> list[Path]:
    """REF's packages, installed without what they depend on: what goes on PYTHONPATH."""
    tree, site = folder / "tree", folder / "site"
    subprocess.run(["git", "-C", str(ROOT), "worktree", "add", "--quiet", "--detach", str(tree), ref], check=True)
    try:
        packages = [str(tree), *(str(kernels) for kernels in [tree / "kernels"] if (kernels / "pyproject.toml").exists())]
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), *packages]
        subprocess.run(pip, check=True)
    finally:
        subprocess.run(["git", "-C", str(ROOT), "worktree", "remove", "--force", str(tree)], check=True)
    return [site]


def answers(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1.0)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def differences(before: dict[str, list[Any]], now: dict[str, list[Any]]) -> list[str]:
    found = [f"{name}: only {'before' if name in before else 'now'}" for name in sorted(before.keys() ^ now.keys())]
    for name in sorted(before.keys() & now.keys()):
        known = [{key: b[key] for key in b if key in a} for a, b in zip(before[name], now[name], strict=False)]
        if before[name] != known or len(known) != len(now[name]):
            pair = next(((a, b) for a, b in zip(before[name], known, strict=False) if a != b), None)
            found.append(
                f"{name}: {len(before[name])} and {len(now[name])} lines"
                if pair is None
                else f"{name}: {pair[0]}\n    now {pair[1]}"
            )
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ref", metavar="REF", nargs="?", default="HEAD")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="of the students' runs; default: all")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="a new folder for both trees' runs; default: a temporary one")
    parser.add_argument("--perform", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.perform is not None:
        perform(**json.loads(arguments.perform))
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.keep or Path(temporary)
        path = checkout(arguments.ref, Path(temporary))
        before = make(folder / "before", path, arguments.only)
        now = make(folder / "now", [ROOT, ROOT / "kernels"], arguments.only)
    problems = differences(before, now)
    print("\n".join(problems) or f"{len(now)} runs: bitwise as at {arguments.ref}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
