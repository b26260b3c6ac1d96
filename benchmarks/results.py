"""docs/results.md, from what `megapd reproduce` has written: `python benchmarks/results.py NAME.md [NAME.md ...]`.

The figure beside each goes to docs/images, the rows of all runs to benchmarks/results, the report into the page, in the order
given.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HEAD = """# Results

What the paper's experiments come to here ("Progressive distillation induces an implicit curriculum", arXiv 2410.05464), with its
numbers beside them. Each section is the report of one sweep ([experiments.md](experiments.md) says how to read its table), made
by the command that it names; `benchmarks/results/` has the rows of all its runs.

"""


def main() -> None:
    text = HEAD
    for report in map(Path, sys.argv[1:]):
        shutil.copy(report.with_suffix(".png"), ROOT / "docs" / "images" / f"results_{report.stem}.png")
        shutil.copy(report.with_suffix(".csv"), ROOT / "benchmarks" / "results" / f"{report.stem}.csv")
        text += report.read_text().replace(f"({report.stem}.png)", f"(images/results_{report.stem}.png)") + "\n"
    (ROOT / "docs" / "results.md").write_text(text.rstrip() + "\n")


if __name__ == "__main__":
    main()
