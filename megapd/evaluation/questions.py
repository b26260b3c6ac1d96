"""Questions with a right answer, from JSONL in the layouts of HellaSwag, ARC, PIQA and BLiMP, with lm-eval's prompts."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from megapd.config import DownstreamConfig
from megapd.errors import UserError


class Question(NamedTuple):
    """A model answers with the option to which it gives the largest probability.

    options  (context, continuation) each: of a minimal pair two sentences without context
    answer   which option is right
    """

    options: tuple[tuple[str, str], ...]
    answer: int


def read_questions(section: DownstreamConfig) -> list[Question]:
    """The first section.samples of a file, all if None. UserError that names file and line for what is in none of the layouts."""
    found = list(_read(section.path, section.samples))
    if not found:
        raise UserError(f"evaluation.tasks: {section.path} holds no questions; name another file, or leave it out")
    return found


def _read(path: Path, count: int | None) -> Iterator[Question]:
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if count is not None and number > count:
                    return
                yield _question(line, f"{path}:{number}")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"evaluation.tasks: {path} cannot be read: {error}") from error


def _question(line: str, where: str) -> Question:
    try:
        tree = json.loads(line)
    except ValueError as error:
        raise UserError(f"evaluation.tasks: {where}: not valid JSON: {error}") from error
    for keys, layout in _LAYOUTS.items():
        if isinstance(tree, dict) and all(key in tree for key in keys):
            try:
                question = layout(tree)
                if len(question.options) > 1 and 0 <= question.answer < len(question.options):
                    return question
            except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
                raise UserError(f"evaluation.tasks: {where}: not as its layout ({', '.join(keys)}) is: {error}") from error
            raise UserError(f"evaluation.tasks: {where}: it needs two options or more, and the number of the right one")
    known = "; ".join(", ".join(keys) for keys in _LAYOUTS)
    raise UserError(f"evaluation.tasks: {where}: its keys are those of no layout ({known}); write it in one of them")


def _pair(tree: dict[str, Any]) -> Question:
    return Question((("", str(tree["sentence_good"])), ("", str(tree["sentence_bad"]))), 0)


def _hellaswag(tree: dict[str, Any]) -> Question:
    """The label of the activity, if there is one, opens the context; marks such as [header] of its source are taken out."""
    label = f"{tree['activity_label']}: " if tree.get("activity_label") else ""
    context = _cleaned(label + str(tree["ctx"]))
    return Question(tuple((context, f" {_cleaned(str(ending))}") for ending in tree["endings"]), int(tree["label"]))


def _cleaned(text: str) -> str:
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def _arc(tree: dict[str, Any]) -> Question:
    context, choices = f"Question: {tree['question']}\nAnswer:", tree["choices"]
    return Question(tuple((context, f" {text}") for text in choices["text"]), choices["label"].index(tree["answerKey"]))


def _piqa(tree: dict[str, Any]) -> Question:
    context = f"Question: {tree['goal']}\nAnswer:"
    return Question(tuple((context, f" {tree[name]}") for name in ("sol1", "sol2")), int(tree["label"]))


def _plain(tree: dict[str, Any]) -> Question:
    return Question(tuple((str(tree["context"]), str(option)) for option in tree["options"]), int(tree["answer"]))


_LAYOUTS: dict[tuple[str, ...], Callable[[dict[str, Any]], Question]] = {
    ("sentence_good", "sentence_bad"): _pair,
    ("ctx", "endings", "label"): _hellaswag,
    ("question", "choices", "answerKey"): _arc,
    ("goal", "sol1", "sol2", "label"): _piqa,
    ("context", "options", "answer"): _plain,
}
