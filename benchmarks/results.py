"""docs/results.md, from what `megapd reproduce` has written: `python benchmarks/results.py FOLDER [FOLDER ...]`.

FOLDER   of a sweep that was made: its report.md, curves.png and curves.csv. The figure goes to docs/images, the rows of all runs
         to benchmarks/results, the report into the page, in the order given.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HEAD = """# Results

What the paper's experiments come to here ("Progressive distillation induces an implicit curriculum", arXiv 2410.05464), with its
numbers beside them. Each section is the report of one sweep ([experiments.md](experiments.md) says how to read its table), made by
the command that it names; `benchmarks/results/` has the rows of all its runs.

"""


def main() -> None:
    text = HEAD
    for folder in map(Path, sys.argv[1:]):
        name = f"results_{folder.name}"
        shutil.copy(folder / "curves.png", ROOT / "docs" / "images" / f"{name}.png")
        shutil.copy(folder / "curves.csv", ROOT / "benchmarks" / "results" / f"{folder.name}.csv")
        text += (folder / "report.md").read_text().replace("(curves.png)", f"(images/{name}.png)")
    (ROOT / "docs" / "results.md").write_text(text)


if __name__ == "__main__":
    main()
