"""How long does it take to start? Whole processes, in turns, medians.

python benchmarks/startup.py [--rounds 7] [--output benchmarks/results/startup.json]
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

from common import write_result

COMMANDS = {
    "python": ["-c", ""],
    "megapd --help": ["-m", "megapd", "--help"],
    "import megapd": ["-c", "import megapd"],
    "import torch": ["-c", "import torch"],
    "import megapd.models": ["-c", "import megapd.models"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/startup.json"))
    arguments = parser.parse_args()
    seconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for number in range(arguments.rounds + 1):
        for name, command in COMMANDS.items():
            began = time.perf_counter()
            subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            if number:  # the first reads the files into memory
                seconds[name].append(time.perf_counter() - began)
    medians = {name: round(statistics.median(values), 3) for name, values in seconds.items()}
    for name, median in medians.items():
        print(f"{name:22} {median:6.3f} s")
    write_result(arguments.output, "how long a process takes to start", arguments, ("torch",), seconds=medians)


if __name__ == "__main__":
    main()
