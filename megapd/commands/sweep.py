"""`megapd sweep` and `megapd table`: a grid of runs, and what it says."""

from __future__ import annotations

import csv
import io
import signal
import sys
from importlib import resources
from pathlib import Path

from tqdm import tqdm

from megapd.errors import UserError
from megapd.experiments import load_sweep
from megapd.experiments.report import report
from megapd.experiments.results import figure, rows_of, table
from megapd.experiments.runner import run_sweep
from megapd.files import machine_cores, write_atomic


def sweep_runs(path: Path, jobs: int | None) -> int:
    """Make what is missing, then print the table."""
    sweep = load_sweep(path)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # its processes end with it, each with a checkpoint
    signal.signal(signal.SIGINT, signal.default_int_handler)  # also under nohup
    with tqdm(unit=" steps", unit_scale=True, file=sys.stderr, dynamic_ncols=True) as bar:

        def told(done: int, total: int, running: str) -> None:
            bar.total = total
            bar.update(done - bar.n)
            bar.set_postfix_str(running)

        run_sweep(sweep, jobs or machine_cores(), told)
    return show_table(path, None)


def reproduce(name: str, scale: str, jobs: int | None) -> int:
    """Make a sweep of megapd.configs.sweeps, and write NAME.md beside its table."""
    sweeps = resources.files("megapd.configs") / "sweeps"
    shipped = sorted(file.name.removesuffix(".yaml") for file in sweeps.iterdir() if file.name.endswith(".yaml"))
    wanted = f"{name}_{scale}"
    if wanted not in shipped:
        raise UserError(f"reproduce: there is no {wanted}; there are {', '.join(shipped)}, as NAME and --scale")
    with resources.as_file(sweeps / f"{wanted}.yaml") as path:
        sweep_runs(path, jobs)
        sweep = load_sweep(path)
    target = sweep.folder / f"{sweep.name}.md"
    write_atomic(target, report(sweep, f"megapd reproduce {name} --scale {scale}", Path(f"{sweep.name}.png")))
    print(target)
    return 0


def show_table(path: Path, output: Path | None) -> int:
    """Print the table, and write all runs as CSV and the curves as PNG into the sweep's folder."""
    sweep = load_sweep(path)
    print(table(sweep))
    picture = figure(sweep, output or sweep.folder / f"{sweep.name}.png")
    numbers = picture.with_suffix(".csv")
    text, rows = io.StringIO(), list(rows_of(sweep))
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomic(numbers, text.getvalue())
    print(f"{picture}\n{numbers}")
    return 0
