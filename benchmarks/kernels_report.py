"""Registers, shared memory and spills of every Triton kernel, compiled offline: no GPU needed.

    python benchmarks/kernels_report.py [--targets sm_80 sm_90 sm_100 gfx942] [--jobs 2]        (make kernels-report)

Compiles each kernel in the variants that the losses launch, for the vocabularies below; the number of classes is a run-time
argument, so that vocabularies share a binary where block and alignment agree, and each distinct one is compiled once. Exits with
1 if one spills or does not compile. AMD's compiler prints no such figures here: there the kernel compiles, or does not.
"""

from __future__ import annotations

import argparse
import itertools
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from megapd.files import write_atomic
from megapd_kernels import JSD, ForwardKL, LossOptions, Mixture, ReverseKL
from megapd_kernels.divergences import NAMES, Divergence
from megapd_kernels.rows.triton_dense import dense_rows
from megapd_kernels.rows.triton_math import launch_shape, unit
from megapd_kernels.rows.triton_student import student_rows

VOCABULARIES = (32768, 50304, 128256, 151936, 262144)
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
KERNELS = {"dense_rows": dense_rows, "student_rows": student_rows}
# (student's and teacher's logits, gradient): in the linear losses, and with logits in.
TYPES = (("fp32", "bf16"), ("fp32", "fp32"), ("bf16", "bf16"), ("fp16", "fp16"))


@dataclass(frozen=True)
class Variant:
    kernel: str
    name: str
    logits: str
    gradient: str
    block: int
    compiler: tuple[tuple[str, int], ...]
    flags: tuple[tuple[str, Any], ...]


def divergences() -> dict[str, Mixture]:
    """Every registered one that has Triton, JSD also where its logarithm needs care, and a weighted sum."""
    alone: dict[str, Divergence] = {name: kind() for name, kind in NAMES.items()}
    alone["jsd_ends"] = JSD(0.01)
    found = {name: LossOptions(one).mixture for name, one in alone.items() if one.element() is not None}
    return {**found, "forward_kl+reverse_kl": 0.7 * ForwardKL() + 0.3 * ReverseKL()}


def elements(mixture: Mixture) -> dict[str, Any]:
    """The kernel's constants that say which divergences it computes."""
    each = [element for _, member in mixture.members if (element := member.element()) is not None]
    return {
        "TERMS": tuple(element.term for element in each),
        "SLOPES": tuple(element.slope or unit for element in each),
        "ONLINE": each[0].online if len(each) == 1 else 0,
    }


def variants(registers: int | None = None) -> list[Variant]:
    """One row a kernel, divergence, type and phase: bare, and with everything that adds registers."""
    found: dict[Variant, None] = {}
    everything = {"LABELS": True, "WEIGHTS": True, "LABEL_WEIGHTS": True, "SMOOTH": True, "OUTPUTS": True, "SHAPE": 2}
    for classes, (logits, gradient), full in itertools.product(VOCABULARIES, TYPES, (False, True)):
        block, compiler = launch_shape(classes, two_softmaxes=full)
        if registers is not None:
            compiler = {**compiler, "maxnreg": registers}
        extras = everything if full else dict.fromkeys(everything, False)
        for divergence, mixture in divergences().items():
            common = {
                "DIVERGENCE": divergence,
                "SHARE": True,
                "ONE": full,
                "APART": full,
                **extras,
                "TEACHER_SHAPE": extras["SHAPE"],
            }
            for phase, flags in {
                "all": {"STATISTICS": True, "SUMS": True, "GRADIENT": True, "SCALE": False},
                "loss": {"STATISTICS": True, "SUMS": True, "GRADIENT": False, "SCALE": False},
                "statistics": {"STATISTICS": True, "SUMS": False, "GRADIENT": False, "SCALE": False},
                "sums": {"STATISTICS": False, "SUMS": True, "GRADIENT": False, "SCALE": False},
                "gradient": {"STATISTICS": False, "SUMS": False, "GRADIENT": True, "SCALE": True},
            }.items():
                if phase in ("statistics", "sums") and elements(mixture)["ONLINE"] > 0:
                    continue  # the KLs have their sum with the statistics
                name = f"{divergence} {phase}{' +labels +T' if full else ''}"
                found[
                    Variant(
                        "dense_rows", name, logits, gradient, block, tuple(compiler.items()), tuple({**common, **flags}.items())
                    )
                ] = None
        for phase, flags in {
            "cross entropy": {"STATISTICS": True, "GRADIENT": True, "FACTORS": False, "SCALE": False},
            "loss": {"STATISTICS": True, "GRADIENT": False, "FACTORS": False, "SCALE": False},
            "gradient": {"STATISTICS": False, "GRADIENT": True, "FACTORS": True, "SCALE": True},
        }.items():
            name = f"{phase}{' +labels +T' if full else ''}"
            found[
                Variant(
                    "student_rows",
                    name,
                    logits,
                    gradient,
                    block,
                    tuple(compiler.items()),
                    tuple({"APART": full, **extras, **flags}.items()),
                )
            ] = None
    return list(found)


def compile_variant(variant: Variant, target: str) -> tuple[int, int, int] | None:
    """(registers a thread, shared bytes a program, spilled bytes a thread), or None on AMD. Raises what the compiler raises."""
    kernel = KERNELS[variant.kernel]
    flags = {**dict(variant.flags), "BLOCK": variant.block}
    if "DIVERGENCE" in flags:  # by name: a kernel's function does not travel to another process
        flags |= elements(divergences()[flags.pop("DIVERGENCE")])
    pointers = dict.fromkeys(("statistics", "weights", "label_weights", "scale"), "*fp32")
    pointers |= {"labels": "*i64", "gradient": f"*{variant.gradient}"}
    members = len(flags.get("TERMS", ()))
    signature: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for place, name in enumerate(kernel.arg_names):
        if name in flags:
            signature[name] = "constexpr"
        elif name in ("student", "teacher"):
            signature[name] = f"*{variant.logits}"
        elif name in ("shares", "first_parameters", "second_parameters", "third_parameters"):
            signature[name] = ("fp32",) * members
        elif name in pointers or name.startswith("outside"):
            signature[name] = pointers.get(name, "*fp32")
        else:
            signature[name] = "i32" if name == "classes" or name.endswith("_stride") else "fp32"
        if signature[name] not in ("constexpr", "fp32", ("fp32",) * members):
            attributes[(place,)] = [["tt.divisibility", 16]]  # as Triton finds them: tensors' addresses and padded rows
    source = ASTSource(kernel, signature, constexprs=flags, attrs=attributes)
    options = dict(variant.compiler)
    if target.startswith("gfx"):
        triton.compile(source, target=GPUTarget("hip", target, 64), options={"num_warps": options["num_warps"]})
        return None
    gpu = GPUTarget("cuda", int(target.removeprefix("sm_")), 32)
    compiled = triton.compile(source, target=gpu, options=options)
    registers, spilled = assemble(compiled.asm["ptx"])
    return registers, compiled.metadata.shared, spilled


def assemble(ptx: str) -> tuple[int, int]:
    """(registers, spilled bytes) a thread, from the assembler that triton brings."""
    match = re.search(r"^\.target\s+(sm_\w+)", ptx, re.MULTILINE)
    assert match, "the compiler wrote PTX without a target"
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    blackwell = tools / "ptxas-blackwell"
    tool = blackwell if match[1].startswith("sm_1") and blackwell.exists() else tools / "ptxas"
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [str(tool), "-v", f"--gpu-name={match[1]}", file.name, "--output-file", "/dev/null"]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers = re.search(r"Used (\d+) registers", text)
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", text)
    assert registers is not None, text
    assert spills is not None, text
    return int(registers[1]), int(spills[1]) + int(spills[2])


def work(case: tuple[Variant, str]) -> tuple[Variant, str, tuple[int, int, int] | None, str]:
    variant, target = case
    try:
        return variant, target, compile_variant(variant, target), ""
    except Exception as error:  # the report goes on and ends with 1
        return variant, target, None, f"{type(error).__name__}: {error}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", default=list(TARGETS))
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--match", default="", help="only variants whose kernel, name and types fit this pattern")
    parser.add_argument("--registers", type=int, help="allow this many a thread, instead of what the launches allow")
    parser.add_argument("--output", type=Path, help="also write the rows to this CSV file")
    arguments = parser.parse_args()
    cases = [
        (variant, target)
        for variant, target in itertools.product(variants(arguments.registers), arguments.targets)
        if re.search(arguments.match, f"{variant.kernel} {variant.name} {variant.logits} {variant.gradient}")
    ]
    print(f"triton {triton.__version__}; vocabularies {', '.join(map(str, VOCABULARIES))} share these {len(cases)} binaries")
    columns = ("kernel", "variant", "logits", "grad", "block", "warps", "target", "regs", "smem", "spilled")
    print("{:13} {:38} {:6} {:5} {:>5} {:>5} {:7} {:>4} {:>5} {:>7}".format(*columns))
    failures, rows = 0, [",".join(columns)]
    with ProcessPoolExecutor(arguments.jobs) as pool:
        for variant, target, figures, error in pool.map(work, cases):
            registers, shared, spilled = figures or ("-", "-", "-")
            failures += bool(error) or (figures is not None and figures[2] > 0)
            print(
                f"{variant.kernel:13} {variant.name:38} {variant.logits:6} {variant.gradient:5} {variant.block:5} "
                f"{dict(variant.compiler)['num_warps']:5} "
                f"{target:7} {registers:>4} {shared:>5} {spilled:>7} {error}",
                flush=True,
            )
            name = [variant.kernel, variant.name, variant.logits, variant.gradient, variant.block]
            rows.append(",".join(map(str, [*name, dict(variant.compiler)["num_warps"], target, registers, shared, spilled])))
    if arguments.output is not None:
        write_atomic(arguments.output, "\n".join([f"# triton {triton.__version__}", *rows, ""]))
    print(f"{failures} of {len(cases)} spill or do not compile" if failures else f"no spill in {len(cases)} binaries")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
