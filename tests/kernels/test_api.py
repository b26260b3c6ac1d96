"""The public face: unknown names are refused with the nearest one, and the arguments have one order everywhere."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import megapd_kernels
from megapd_kernels import LossOptions, VocabularyShard, distillation_loss, linear_distillation_loss, softmax_kl

from .cases import Case, make_case

Function = Callable[..., Any]
PUBLIC = [getattr(megapd_kernels, name) for name in megapd_kernels.__all__]
FUNCTIONS: list[Function] = [*filter(inspect.isfunction, PUBLIC), VocabularyShard.of]
SETTINGS: list[Any] = [LossOptions, VocabularyShard]
LOSSES = [function for function in FUNCTIONS if "options" in inspect.signature(function).parameters]
WITH_HEADS = [function for function in FUNCTIONS if "weight" in inspect.signature(function).parameters]

# fmt: off
POSITIONAL = ("student_logits", "hidden", "weight", "teacher_logits", "teacher_hidden", "teacher_weight",
              "teacher_ids", "teacher_logprobs", "labels", "k")
NAMED = ("bias", "teacher_logits", "teacher_hidden", "teacher_weight", "teacher_bias", "teacher_ids", "teacher_logprobs",
         "teacher_log_rest", "convention", "labels", "token_weights", "class_weights", "ignore_index", "denominator", "options",
         "temperature", "chunk_bytes", "shard", "in_place")
# fmt: on


def names(function: Function, *kinds: inspect._ParameterKind) -> list[str]:
    return [name for name, parameter in inspect.signature(function).parameters.items() if not kinds or parameter.kind in kinds]


def arguments(function: Function, case: Case) -> dict[str, Any]:
    """All that `function` needs."""
    logits = {"student_logits": F.linear(case.hidden, case.weight, case.bias), "teacher_logits": case.teacher_logits()}
    if function in (softmax_kl, distillation_loss):
        return logits
    if function is linear_distillation_loss:
        return {"hidden": case.hidden, "weight": case.weight, **case.teacher("hidden")}
    given = {**vars(case), **case.teacher("ids"), "k": 3}
    required = [p.name for p in inspect.signature(function).parameters.values() if p.default is p.empty]
    return {name: given[name] for name in required}


def test_the_lists_are_complete() -> None:
    assert (len(FUNCTIONS), len(SETTINGS), len(LOSSES), len(WITH_HEADS)) == (10, 2, 6, 5)


@pytest.mark.parametrize("function", [*FUNCTIONS, *SETTINGS], ids=lambda function: function.__qualname__)
def test_an_unknown_name_is_refused_with_the_nearest(function: Function) -> None:
    known = names(function)
    for name in known:
        with pytest.raises(TypeError, match=rf"^\w+(\.\w+)?\(\) got an unexpected .* '{name}_'; did you mean .*'{name}'"):
            function(**{f"{name}_": 1})
    with pytest.raises(TypeError, match=rf"got an unexpected keyword argument 'banana'; it takes {', '.join(known)}$"):
        function(banana=3)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_field_of_the_options_is_named_as_one(loss: Function) -> None:
    for field in dataclasses.fields(LossOptions):
        with pytest.raises(TypeError, match=rf"'{field.name}'; did you mean options=LossOptions\({field.name}=\.\.\.\)"):
            loss(**{field.name: 4.0})
    both = (
        r"did you mean options=LossOptions\(teacher_temperature=\.\.\.\) or options=LossOptions\(student_temperature=\.\.\.\)\?$"
    )
    with pytest.raises(TypeError, match=both):
        loss(temperature=4.0)
    with pytest.raises(TypeError, match=r"'normaliser'; it takes "):
        loss(normaliser="sum")


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__qualname__)
def test_the_order_of_arguments_is_the_same_everywhere(function: Function) -> None:
    if function not in [*LOSSES, *WITH_HEADS]:
        return
    kind = inspect.Parameter
    for order, found in (
        (POSITIONAL, names(function, kind.POSITIONAL_OR_KEYWORD)),
        (NAMED, names(function, kind.KEYWORD_ONLY)),
    ):
        assert found == [name for name in order if name in found]
    assert not names(function, kind.POSITIONAL_ONLY, kind.VAR_POSITIONAL, kind.VAR_KEYWORD)
    given = inspect.signature(function).parameters
    for name, default in {"options": None, "ignore_index": -100, "bias": None, "labels": None, "shard": None}.items():
        if name in given and given[name].kind is kind.KEYWORD_ONLY:
            assert given[name].default == default, name


@pytest.mark.parametrize("function", WITH_HEADS)
def test_the_bias_has_to_be_named(function: Function) -> None:
    case = make_case()
    needed = arguments(function, case)
    positional = [needed.pop(name) for name in names(function, inspect.Parameter.POSITIONAL_OR_KEYWORD) if name in needed]
    function(*positional, **needed, bias=case.bias)
    if function.__name__ == "linear_sparse_kl":
        positional.append(None)
    with pytest.raises(TypeError, match=r"takes .* positional arguments? but .* given"):
        function(*positional, case.bias, **needed)


@pytest.mark.parametrize("loss", LOSSES)
def test_no_options_are_the_default_ones(loss: Function) -> None:
    case = make_case().to(torch.float32)
    results = []
    for options in ({}, {"options": None}, {"options": LossOptions()}):
        result = loss(**arguments(loss, case), **options)
        leaves: list[Tensor] = [case.hidden, case.weight]
        results.append((*result[:4], *torch.autograd.grad(result.loss, leaves)))
    for other in results[1:]:
        for value, wanted in zip(other, results[0], strict=True):
            assert torch.equal(value, wanted)
