"""metrics.jsonl keeps every good line, whatever happens to its bytes."""

import json

import pytest

from megapd.errors import UserError
from megapd.training.folder import METRICS, MetricsFile


def written(folder, steps, run="r"):
    """A run's file of a line each step; the digest that a checkpoint after its last step names."""
    file = MetricsFile(folder, run, 0, 1)
    for step in range(1, steps + 1):
        file.write("train", step, {"loss": 1 / step})
    file.close()
    return file.digest


def lines(folder):
    return [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]


def resumed(folder, step, digest="", run="r"):
    MetricsFile(folder, run, step, 1, (step, digest)).close()
    return [line["step"] for line in lines(folder)]


def test_the_first_line_names_the_run(tmp_path):
    written(tmp_path, 2)
    assert lines(tmp_path)[0] == {"kind": "run", "step": 0, "id": "r"}
    with pytest.raises(UserError, match="belongs to run r, not to other"):
        resumed(tmp_path, 2, run="other")


def test_a_resumed_run_goes_on_from_its_checkpoint(tmp_path, caplog):
    digest = written(tmp_path, 3)
    file = MetricsFile(tmp_path, "r", 3, 1, (3, digest))
    file.write("train", 4, {"loss": float("nan")})
    file.close()
    assert lines(tmp_path)[-1] == {"kind": "train", "step": 4, "loss": None}
    assert resumed(tmp_path, 3, digest) == [0, 1, 2, 3]
    assert caplog.text == ""


@pytest.mark.parametrize("junk", [b"\xff\n", b"\0" * 50 + b"\n", b"[1]\n", b'{"kind": "train"}\n', b"[" * 9000 + b"\n", b"\n"])
def test_a_bad_line_costs_no_good_one(tmp_path, caplog, junk):
    digest = written(tmp_path, 4)
    content = (tmp_path / METRICS).read_bytes().splitlines(keepends=True)
    damaged = b"".join([*content[:2], junk, *content[2:]])
    (tmp_path / METRICS).write_bytes(damaged)
    assert resumed(tmp_path, 4, digest) == [0, 1, 2, 3, 4]
    assert (tmp_path / f"{METRICS}.damaged-1").read_bytes() == damaged
    assert "line 3 is damaged, its good lines are kept; the file as it was: metrics.jsonl.damaged-1" in caplog.text
    assert resumed(tmp_path, 4, digest) == [0, 1, 2, 3, 4]
    assert not (tmp_path / f"{METRICS}.damaged-2").exists()


def test_lines_that_lack_are_told(tmp_path, caplog):
    written(tmp_path, 6)
    content = (tmp_path / METRICS).read_text().splitlines(keepends=True)
    (tmp_path / METRICS).write_text("".join([*content[:3], *content[5:]]))
    assert resumed(tmp_path, 6) == [0, 1, 2, 5, 6]
    assert "it lacks lines of steps 3 to 4; they are lost, the run is not" in caplog.text


def test_lines_that_changed_are_told(tmp_path, caplog):
    digest = written(tmp_path, 3)
    (tmp_path / METRICS).write_text((tmp_path / METRICS).read_text().replace("0.5", "0.7"))
    assert resumed(tmp_path, 3, digest) == [0, 1, 2, 3]
    assert "its lines up to step 3 are not those that the run wrote" in caplog.text


def test_a_last_line_without_its_end_is_a_kill(tmp_path, caplog):
    digest = written(tmp_path, 3)
    with (tmp_path / METRICS).open("ab") as file:
        file.write(b'{"kind": "tra')
    assert resumed(tmp_path, 3, digest) == [0, 1, 2, 3]
    assert caplog.text == ""
