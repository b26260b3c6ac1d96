"""Checkpoints of a published model as a trajectory: folders that transformers saved, or revisions on the Hugging Face hub."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import threading
from collections.abc import Iterator, Sequence
from glob import escape, glob
from pathlib import Path
from typing import Any

from megapd import tokenization
from megapd.errors import UserError
from megapd.hub import HUB, fetch, hub_error
from megapd.trajectory.digests import Weights, equal_weights, known_digests, not_finite, read_digests
from megapd.trajectory.known_faults import known_fault_warnings
from megapd.trajectory.reader import META, Checkpoint, Checkpoints, File

log = logging.getLogger(__name__)

CONFIG = "config.json"
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
SMALL_FILES = (CONFIG, *tokenization.FILES)
SAFETENSORS = ("model.safetensors", "model-*.safetensors", "model.safetensors.index.json")
PICKLES = ("pytorch_model.bin", "pytorch_model-*.bin", "pytorch_model.bin.index.json")

FINISHED = 1  # the step of a model whose name has none

_PLACEHOLDERS = re.compile(r"\{(step|kstep)\}")
_NUMBER = r"(0|[1-9][0-9]*)"
_STEP_IN_NAME = re.compile(r"step[_-]?([0-9]+)(k?)(?![0-9A-Za-z])")


def is_hugging_face(spec: str) -> bool:
    """Whether teacher.trajectory names checkpoints of transformers: hf:REPO, a pattern with {step}, or a folder of one.

    A folder or pattern is one if a checkpoint that it stands for has a config.json and no meta.json, which megapd's own have;
    a pattern that nothing matches is one too, since megapd's own trajectories are named by their folder.
    """
    if spec.startswith(HUB):
        return True
    if not _PLACEHOLDERS.search(spec):
        return _is_checkpoint(Path(spec))
    found = [path for _, path in _matching(spec)]
    return not found or any(map(_is_checkpoint, found))


class HuggingFaceTrajectory(Checkpoints):
    """Published checkpoints, with the interface of Trajectory.

    spec    PATH or hf:REPO[@REVISION]; {step} stands for the step, {kstep} for thousands of steps: "runs/pythia/step_{step}",
            "hf:EleutherAI/pythia-160m@step{step}", "hf:google/multiberts-seed_0-step_{kstep}k". Without either it is one
            checkpoint, of the step in its name ("step3000", "step_20k"); a name without one is a finished model's, which is
            called step 1: of its training nothing is known but that it is over, and step 0 would be the random weights
    steps   which there are; empty: those of the folders that match, or of the hub's branches and tags if {step} is in REVISION

    `incomplete`: folders that lack a file of their weights; the hub has none. From the hub a checkpoint is fetched, into
    huggingface_hub's cache, when it is first asked for.
    """

    def __init__(self, spec: str, steps: tuple[int, ...] = ()) -> None:
        """Raises UserError if there is no checkpoint, or the steps have to be told and are not."""
        super().__init__()
        self.spec = spec
        self._hub = self.remote = spec.startswith(HUB)
        self._pattern = spec.removeprefix(HUB)
        self._placeholder = _PLACEHOLDERS.search(self._pattern) is not None
        self._given = tuple(sorted(set(steps)))
        self._folders: dict[int, Path] = {}
        self._weights: dict[int, Weights] = {}  # of the checkpoints looked at
        self._lock = threading.Lock()
        if len(self._given) > 1 and not self._placeholder:
            raise UserError(
                f"teacher.steps: {len(self._given)} steps, but teacher.trajectory {spec} has no {{step}}; write it in"
            )
        self.refresh()
        if not self.steps:
            incomplete = f" ({len(self.incomplete)} without all of their weights)" if self.incomplete else ""
            raise UserError(f"teacher.trajectory: no checkpoint of transformers matches {spec}{incomplete}; correct it")

    def refresh(self) -> tuple[int, ...]:
        """Look again which folders there are; returns `steps`. The hub's list is asked for once."""
        if not self._hub:
            self._list(self._local_steps())
        elif not self.steps:
            self.steps = self._given or self._hub_steps()
            for step in self.steps:
                self._name(step)  # raises for a step that {kstep} cannot write
        return self.steps

    def located(self, step: int) -> str:
        """Where the checkpoint of `step` is: a folder, or hf:REPO[@REVISION]."""
        return (HUB if self._hub else "") + self._name(step)

    def written(self, step: int) -> bool:
        """Whether the checkpoint of `step` is there now, whole; of the hub: whether it is one of `steps`."""
        if self._hub:
            return step in self.steps
        if self._given and step not in self._given:
            return False
        folder = Path(self._name(step))
        return (self._placeholder or step == self._only_step()) and _is_checkpoint(folder) and not _missing(folder)

    def describe(self, step: int) -> Checkpoint:
        self._require(step)
        folder = self._fetch(step, weights=False) if self._hub else Path(self._name(step))
        config, (vocabulary, *forms) = _read_json(folder / CONFIG), _tokenizers(folder)
        return Checkpoint(step, folder, "", vocabulary, {"hugging_face": config}, metrics={}, files={}, forms=tuple(forms))

    def checkpoint(self, step: int) -> Checkpoint:
        """Everything but the weights, in a folder on this machine. Its config is {"hugging_face": the tree of config.json}.

        digest: sha256 over the lines "NAME SHA256\\n" of the weight files, sorted by name. vocabulary: the digest of its
        tokenizer, as a corpus' of the same one (megapd.tokenization), else "": unknown. Raises UserError if the checkpoint is
        not there, cannot be fetched, or its files are incomplete or damaged.
        """
        self._require(step)
        folder = self._fetch(step) if self._hub else Path(self._name(step))
        config = _read_json(folder / CONFIG)
        missing = _missing(folder)
        if missing:
            raise UserError(f"{folder}: {missing[0]} is missing; fetch or copy the checkpoint again")
        weights = _weight_files(folder)
        names = [*weights, CONFIG, *(name for name in tokenization.FILES if (folder / name).is_file())]
        digests = {name: known_digests(folder / name) for name in names}
        self._compare(step, {name: digests[name] for name in weights})
        files = {name: File(digests[name].sha256, (folder / name).stat().st_size) for name in names}
        lines = "".join(f"{name} {files[name].sha256}\n" for name in sorted(weights))
        digest = hashlib.sha256(lines.encode()).hexdigest()
        vocabulary, *forms = _tokenizers(folder)
        tree = {"hugging_face": config}
        return Checkpoint(step, folder, digest, vocabulary, tree, metrics={}, files=files, forms=tuple(forms))

    def verify(self) -> list[str]:
        """Problems, one line each: incomplete or damaged checkpoints, weights that are not finite, and files or tensors that are
        equal at different steps (digests.py). Every file is read; from the hub every checkpoint is fetched.
        """
        self.refresh()
        problems = [f"{self._name(step)}: it lacks {_missing(Path(self._name(step)))[0]}" for step in self.incomplete]
        found: dict[int, Weights] = {}
        for step in self.steps:
            try:
                folder = self.checkpoint(step).path
                found[step] = {name: read_digests(folder / name, pickles=True) for name in _weight_files(folder)}
                problems += not_finite(self._name(step), step, found[step])
            except UserError as error:
                problems.append(str(error))
        return problems + equal_weights(self.spec, found)

    def _compare(self, step: int, weights: Weights) -> None:
        """Warn of a checkpoint that has weights of one that was looked at before: a schedule may be about to use both."""
        with self._lock:
            if step in self._weights:
                return
            told = set(equal_weights(self.spec, self._weights))
            self._weights[step] = weights
            for problem in equal_weights(self.spec, self._weights):
                if problem not in told:
                    log.warning(problem)

    def notes(self, teachers: Sequence[int]) -> tuple[str, ...]:
        if self._placeholder or self._given or self._step_in_name() is not None:
            return tuple(known_fault_warnings(self._pattern, teachers))
        what = f"{self.spec} names no training step: it teaches as one finished model, called step {FINISHED}"
        return (f"teacher.trajectory: {what}; teacher.steps can tell another, and {{step}} in the name stands for several",)

    def _require(self, step: int) -> None:
        if not self.written(step):
            fix = f"{self._nearest(step)}: change the schedule, or teacher.steps"
            raise UserError(f"teacher.trajectory: {self.spec} has no checkpoint of step {step}; {fix}")

    def _late(self, what: str) -> str:
        return f"{self.spec}: {what}"

    # -------------------------------------------------------------------------------------------------------------- names

    def _name(self, step: int) -> str:
        """The folder, or REPO[@REVISION], of a step."""
        if "{kstep}" in self._pattern and step % 1000:
            raise UserError(
                f"teacher.steps: {step} is no multiple of 1000, as {{kstep}} in teacher.trajectory needs; use {{step}}"
            )
        return self._pattern.replace("{step}", str(step)).replace("{kstep}", str(step // 1000))

    def _only_step(self) -> int:
        """The step of a trajectory without placeholder."""
        named = self._given[0] if self._given else self._step_in_name()
        return FINISHED if named is None else named

    def _step_in_name(self) -> int | None:
        found = list(_STEP_IN_NAME.finditer(self._pattern if self._hub else Path(self._pattern).name))
        return int(found[-1][1]) * (1000 if found[-1][2] else 1) if found else None

    def _local_steps(self) -> list[int]:
        if not self._placeholder:
            return [self._only_step()] if _is_checkpoint(Path(self._pattern)) else []
        found = sorted(step for step, path in _matching(self._pattern) if _is_checkpoint(path))
        return [step for step in found if not self._given or step in self._given]

    def _hub_steps(self) -> tuple[int, ...]:
        repo, _, revision = self._pattern.partition("@")
        if not self._placeholder:
            return (self._only_step(),)
        ask = "list the steps in teacher.steps"
        if _PLACEHOLDERS.search(repo):
            raise UserError(f"teacher.steps: {self.spec} is a repository a step, which the hub does not list together; {ask}")
        import huggingface_hub

        try:
            refs = huggingface_hub.HfApi().list_repo_refs(repo)
        except Exception as error:
            raise hub_error(error, f"teacher.trajectory: the revisions of {repo} cannot be listed", ask) from error
        expression = _expression(revision)
        steps = {step for ref in [*refs.branches, *refs.tags] if (step := _step_of(expression, ref.name)) is not None}
        if not steps:
            raise UserError(f"teacher.trajectory: no branch or tag of {repo} is called {revision}; correct it, or {ask}")
        return tuple(sorted(steps))

    def _fetch(self, step: int, *, weights: bool = True) -> Path:
        """The folder of a step's files in the hub's cache, fetched if they are not there; of what is small alone, if so asked."""
        with self._lock:
            if step not in self._folders:
                # Other files, and weights in a second format, can be many times as large.
                for files in (SAFETENSORS, PICKLES) if weights else ((),):
                    folder = fetch(self._name(step), [*SMALL_FILES, *files], "teacher.trajectory")
                    if any((folder / name).is_file() for name in WEIGHTS[:2]):
                        break
                if not weights:
                    return folder
                self._folders[step] = folder
            return self._folders[step]


def _tokenizers(folder: Path) -> tuple[str, ...]:
    """The digests of a checkpoint's tokenizer; ("",), and told, where it has none or one that cannot be read: unknown."""
    try:
        return tokenization.digests(folder) or ("",)
    except UserError as error:
        log.warning("%s; its vocabulary is not known", error)
        return ("",)


def _expression(pattern: str) -> re.Pattern[str]:
    pieces = _PLACEHOLDERS.split(pattern)  # literal, placeholder, literal, ..
    literals, names = pieces[::2], pieces[1::2]
    groups = [f"(?P={name})" if name in names[:i] else f"(?P<{name}>{_NUMBER})" for i, name in enumerate(names)]
    return re.compile("".join(re.escape(a) + b for a, b in zip(literals, [*groups, ""], strict=True)))


def _step_of(expression: re.Pattern[str], name: str) -> int | None:
    match = expression.fullmatch(name)
    if match is None:
        return None
    found = match.groupdict()
    step = int(found["step"]) if "step" in found else 1000 * int(found["kstep"])
    return step if "kstep" not in found or step == 1000 * int(found["kstep"]) else None


def _matching(pattern: str) -> Iterator[tuple[int, Path]]:
    """(step, folder) of the folders that a local pattern stands for."""
    literals = _PLACEHOLDERS.split(pattern)[::2]
    expression = _expression(pattern)
    for name in glob("*".join(map(escape, literals))):
        step = _step_of(expression, name)
        if step is not None and Path(name).is_dir():
            yield step, Path(name)


def _is_checkpoint(folder: Path) -> bool:
    return (folder / CONFIG).is_file() and not (folder / META).exists()


def _weight_files(folder: Path) -> list[str]:
    """Names of the files with weights, as the first of WEIGHTS that is there says; none if there is none."""
    present = [name for name in WEIGHTS if (folder / name).is_file()]
    if not present or not present[0].endswith(".json"):
        return present[:1]
    weight_map = _read_json(folder / present[0]).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(n, str) and Path(n).name == n for n in weight_map.values()):
        raise UserError(f"{folder / present[0]}: no usable weight_map; fetch or copy the checkpoint again")
    return sorted(set(weight_map.values()))


def _missing(folder: Path) -> list[str]:
    """What a whole checkpoint would have and this folder has not."""
    weights = _weight_files(folder)
    return [name for name in weights if not (folder / name).is_file()] if weights else [WEIGHTS[0]]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        tree = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise UserError(f"{path}: missing; fetch or copy the checkpoint again") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: damaged, not valid JSON ({error}); fetch or copy the checkpoint again") from error
    if not isinstance(tree, dict):
        raise UserError(f"{path}: damaged, no JSON object; fetch or copy the checkpoint again")
    return tree
