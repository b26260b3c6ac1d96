"""The house's measures: rooms of about ten files, files below 500 lines, functions below 80."""

import ast
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]
FILES = 12  # in a room, its face (__init__, __main__) aside
LINES = 500  # of a file
FUNCTION_LINES = 80

# A verb a file; a migration a file.
ROOMS_OF_ANY_SIZE = {"megapd/commands", "megapd/scheduler/store/migrations/versions"}
# Kernels are one program each, the reference is a page of formulas, a migration is a list.
LONG_FUNCTIONS = ("kernels/megapd_kernels/rows/", "kernels/megapd_kernels/reference.py", "megapd/scheduler/store/migrations/")


def sources() -> list[Path]:
    paths = (path.relative_to(ROOT) for root in ("megapd", "kernels", "launch") for path in (ROOT / root).rglob("*"))
    return [path for path in paths if path.suffix in (".py", ".js", ".css", ".html") and "build" not in path.parts]


def test_a_room_holds_about_ten_files():
    rooms = Counter(path.parent.as_posix() for path in sources() if not path.stem.startswith("__"))
    assert {room: files for room, files in rooms.items() if files > FILES and room not in ROOMS_OF_ANY_SIZE} == {}


def test_a_file_is_read_in_one_go():
    lines = {path.as_posix(): len((ROOT / path).read_text().splitlines()) for path in sources()}
    assert {path: count for path, count in lines.items() if count > LINES} == {}


def test_a_function_fits_on_a_screen():
    found = {}
    for path in sources():
        if path.suffix != ".py" or path.as_posix().startswith(LONG_FUNCTIONS):
            continue
        for node in ast.walk(ast.parse((ROOT / path).read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno - node.lineno >= FUNCTION_LINES:
                found[f"{path}:{node.name}"] = node.end_lineno - node.lineno + 1
    assert found == {}
