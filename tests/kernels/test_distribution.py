"""The kernels as a distribution of its own: what it imports and asks for, and that its README tells the truth."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch

from megapd_kernels import softmax_kl

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "kernels"
FILES = sorted((FOLDER / "megapd_kernels").rglob("*.py"))


def test_torch_and_triton_are_all_it_needs() -> None:
    found = set()
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                assert node.module is not None
                found.add(node.module.split(".")[0])
    # The benchmark names what it may measure beside, and goes on without it.
    assert found - set(sys.stdlib_module_names) - {"liger_kernel", "trl"} == {"torch", "triton"}
    project = tomllib.loads((FOLDER / "pyproject.toml").read_text())
    assert [re.split(r"\W", asked)[0] for asked in project["project"]["dependencies"]] == ["torch", "triton"]
    folders = {".".join(file.parent.relative_to(FOLDER).parts) for file in FILES}
    assert set(project["tool"]["setuptools"]["packages"]) == folders
    assert (FOLDER / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()


def test_the_readmes_examples_run() -> None:
    pages = [FOLDER / "README.md", *sorted((FOLDER / "docs").glob("*.md"))]
    examples = [
        found for page in pages for found in re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    ]
    assert len(examples) >= 3
    for example in examples:
        names: dict[str, Any] = {"__name__": __name__}
        exec(compile(example, "README.md", "exec"), names)
        assert "options" in names or names["weight"].grad.norm() > 0


def test_the_folder_is_not_taken_for_the_package_named_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the repository's root on the path `import kernels` finds the folder: transformers must not take it for `kernels`."""
    transformers = pytest.importorskip("transformers")
    monkeypatch.syspath_prepend(str(ROOT))
    transformers.utils.is_kernels_available.cache_clear()
    import kernels  # found only now

    assert kernels.__file__ is None
    assert not transformers.utils.is_kernels_available()
    assert softmax_kl(torch.zeros(2, 3), torch.zeros(2, 3)).loss.item() == 0
