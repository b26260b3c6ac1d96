"""Downstream tasks: layouts, prompts, log-likelihoods that padding and batches do not move, in a run and by the verb."""

from __future__ import annotations

import json
from itertools import pairwise

import numpy as np
import pytest
import torch

from megapd.batch import Batch
from megapd.cli import main
from megapd.config import DownstreamConfig, load
from megapd.errors import UserError
from megapd.evaluation import label_logprobs, open_downstream
from megapd.evaluation.questions import Question, read_questions
from megapd.tasks import build_task
from megapd.tasks.tokenizer import corpus_vocabulary
from megapd.training import build_student
from megapd.world import join_world
from tests.corpus import corpora
from tests.training.runs import metrics

HELLASWAG = {"activity_label": "Rowing", "ctx": "A man [header] rows. [title] He", "endings": ["stops.", "flies  off.", "sinks."]}
LINES = {
    "hellaswag": {**HELLASWAG, "label": "1"},
    "arc": {"question": "What?", "choices": {"text": ["a", "b", "c"], "label": ["A", "B", "C"]}, "answerKey": "C"},
    "piqa": {"goal": "Sit", "sol1": "on a chair", "sol2": "on a knife", "label": 0},
    "blimp": {"sentence_good": "Cats sleep.", "sentence_bad": "Cats sleeps."},
    "plain": {"context": "x", "options": [" y", " z"], "answer": 1},
}
WANTED = {
    "hellaswag": Question(tuple(("Rowing: A man rows.. He", e) for e in (" stops.", " flies off.", " sinks.")), 1),
    "arc": Question(tuple(("Question: What?\nAnswer:", f" {x}") for x in "abc"), 2),
    "piqa": Question((("Question: Sit\nAnswer:", " on a chair"), ("Question: Sit\nAnswer:", " on a knife")), 0),
    "blimp": Question((("", "Cats sleep."), ("", "Cats sleeps.")), 0),
    "plain": Question((("x", " y"), ("x", " z")), 1),
}


def written(path, *lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.mark.parametrize("name", LINES)
def test_layouts(tmp_path, name):
    path = written(tmp_path / "t.jsonl", LINES[name], LINES[name])
    (first, _) = read_questions(DownstreamConfig(path=path))
    assert first == WANTED[name]
    assert len(read_questions(DownstreamConfig(path=path, samples=1))) == 1


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "holds no questions"),
        ("{}\n", "t.jsonl:1: its keys are those of no layout"),
        ("[1]\n", "t.jsonl:1: its keys are those of no layout"),
        ('{"a": \n', "t.jsonl:1: not valid JSON"),
        (json.dumps({**LINES["arc"], "answerKey": "Q"}) + "\n", "t.jsonl:1: not as its layout"),
        (json.dumps({**LINES["plain"], "answer": 5}) + "\n", "needs two options or more, and the number"),
        (json.dumps({**LINES["plain"], "options": [" y"]}) + "\n", "needs two options or more"),
    ],
)
def test_what_is_no_task(tmp_path, content, words):
    (tmp_path / "t.jsonl").write_text(content)
    with pytest.raises(UserError, match=words) as caught:
        read_questions(DownstreamConfig(path=tmp_path / "t.jsonl"))
    assert "evaluation.tasks" in str(caught.value)
    with pytest.raises(UserError, match="cannot be read"):
        read_questions(DownstreamConfig(path=tmp_path / "none.jsonl"))


# --------------------------------------------------------------------------------------------------------------- scores

STYLES = {
    "gpt": "--model={kind: gpt, layers: 1, hidden: 16, heads: 2}",
    "bert": "--model={kind: bert, layers: 1, hidden: 16, heads: 2}",
}


@pytest.fixture(scope="module", params=STYLES)
def setup(request, tmp_path_factory):
    """(style, configuration, task, learner with weights that disagree) over questions of several lengths."""
    folder, style = tmp_path_factory.mktemp(request.param), request.param
    corpora.prepared(folder, style)
    texts = [text.split("\n\n")[1][:60] for text in corpora.documents(8, seed=4)]
    plain = [{"context": a[:20], "options": [a[20:], b[5:25], b], "answer": i % 3} for i, (a, b) in enumerate(pairwise(texts))]
    pairs = [{"sentence_good": a, "sentence_bad": b[::-1]} for a, b in pairwise(texts)]
    written(folder / "plain.jsonl", *plain)
    written(folder / "pairs.jsonl", *pairs)
    tasks = f"--evaluation.tasks=[{{path: {folder}/plain.jsonl}}, {{path: {folder}/pairs.jsonl, name: grammar}}]"
    config = corpora.settings(folder, folder / "text.jsonl", style, STYLES[style], tasks)
    task = build_task(config)
    learner = build_student(config, task).eval()
    with torch.no_grad():
        for parameter in learner.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return style, config, task, learner


def by_hand(config, learner, length, context, continuation):
    """The log-likelihood of one option, alone and unpadded."""
    _, own, roles, style = corpus_vocabulary(config, "x")
    if style == "gpt":  # a blank between the two is the continuation's
        context, continuation = context.rstrip(), context[len(context.rstrip()) :] + continuation
    whole, before = own.encode([context + continuation])[0].tolist(), len(own.encode([context])[0])

    def logprobs(ids):
        batch = Batch(torch.tensor([ids]), None, torch.arange(len(ids)), torch.tensor(ids), torch.arange(1))
        with torch.no_grad():
            return learner(batch, mode="logits").log_softmax(-1)

    if style == "gpt":
        ids = whole if before else [roles.separator, *whole]
        before = before or 1
        cut = max(0, len(ids) - length)
        ids, before = ids[cut:], before - cut
        found = logprobs(ids)
        return sum(found[place - 1, ids[place]].item() for place in range(before, len(ids)))
    cut = max(0, len(whole) - (length - 2))
    ids, total = [roles.opener, *whole[cut:], roles.separator], 0.0
    for place in range(1 + max(0, before - cut), len(ids) - 1):
        total += logprobs([*ids[:place], roles.mask, *ids[place + 1 :]])[place, ids[place]].item()
    return total


def test_scores_are_log_likelihoods(setup):
    _, config, task, learner = setup
    for downstream, section in zip(open_downstream(config, task), config.evaluation.tasks, strict=True):
        questions = read_questions(section)
        likelihoods = [[by_hand(config, learner, task.length, *option) for option in q.options] for q in questions]
        right = np.mean([np.argmax(values) == q.answer for values, q in zip(likelihoods, questions, strict=True)])
        norm = [
            [v / max(1, len(o[1])) for v, o in zip(values, q.options, strict=True)]
            for values, q in zip(likelihoods, questions, strict=True)
        ]
        right_norm = np.mean([np.argmax(values) == q.answer for values, q in zip(norm, questions, strict=True)])
        for micro in (1, 3, 1000):
            with torch.no_grad():
                found = downstream.score(lambda batch: label_logprobs(learner, batch), join_world(), micro)
            assert found == {f"{downstream.name}/accuracy": right, f"{downstream.name}/accuracy_norm": right_norm}
        assert 0 < right < 1 or downstream.name == "grammar"


def test_padding_moves_no_likelihood(setup):
    """Of all rows together and each alone."""
    _, config, task, learner = setup
    for downstream in open_downstream(config, task):
        rows = downstream._rows
        with torch.no_grad():
            together = label_logprobs(learner, downstream._batch(rows))
            alone = torch.cat([label_logprobs(learner, downstream._batch([row])) for row in rows])
        torch.testing.assert_close(together, alone, atol=2e-5, rtol=2e-5)


@pytest.mark.slow
def test_a_run_and_the_verb_score_them(setup, tmp_path, capsys):
    style, config, _, _ = setup
    tasks = ", ".join(f"{{path: {section.path}}}" for section in config.evaluation.tasks)
    arguments = [
        f"--runs_dir={tmp_path}",
        "--name=r",
        f"--task={{kind: text, objective: {config.task.objective}, corpus: {config.corpus.output}}}",
        STYLES[style],
        "--training={steps: 4, global_batch: 8}",
        "--trajectory.every=4",
        "--telemetry={every: 1, wandb: disabled, progress: false}",
        f"--evaluation={{every: 2, samples: 4, tasks: [{tasks}]}}",
    ]
    assert main(["train", *arguments]) == 0
    lines = [line for line in metrics(tmp_path / "r") if line["kind"] == "eval"]
    names = {f"{task}/{measure}" for task in ("plain", "pairs") for measure in ("accuracy", "accuracy_norm")}
    assert [line["step"] for line in lines] == [2, 4]
    assert all(names <= line.keys() for line in lines)
    assert main(["evaluate", str(tmp_path / "r")]) == 0
    (found,) = json.loads((tmp_path / "r" / "evaluation.json").read_text())
    assert {name: found[name] for name in names} == {name: lines[-1][name] for name in names}


def test_bad_tasks_are_told_before_the_run(tmp_path, capsys):
    corpora.prepared(tmp_path, "gpt")
    base = [
        f"--runs_dir={tmp_path}",
        "--name=r",
        f"--task={{kind: text, objective: clm, corpus: {tmp_path}/corpus}}",
        STYLES["gpt"],
    ]
    assert main(["train", *base, "--evaluation={samples: 4, tasks: [{path: none.jsonl}]}"]) == 2
    assert "evaluation.tasks: none.jsonl cannot be read" in capsys.readouterr().err
    written(tmp_path / "t.jsonl", LINES["plain"])
    parity = load(None, [f"--evaluation.tasks=[{{path: {tmp_path}/t.jsonl}}]"])
    with pytest.raises(UserError, match=r"evaluation.tasks: task.kind parity has no text"):
        open_downstream(parity, build_task(parity))
    assert not (tmp_path / "r").exists()
