"""What an operator starts with is read by those who will read it: DeepSpeed's launcher, and megapd's settings."""

from pathlib import Path

from deepspeed.launcher.runner import fetch_hostfile

from megapd.config import load

LAUNCH = Path(__file__).parents[2] / "launch"


def test_deepspeed_takes_the_hostfile():
    assert dict(fetch_hostfile(str(LAUNCH / "hostfile"))) == {"node-1": 8, "node-2": 8}


def test_the_environment_is_a_variable_a_line_and_megapd_knows_its_own(monkeypatch):
    # The launcher splits every line at its first "=": a comment or a blank line would end it.
    variables = dict(line.split("=", maxsplit=1) for line in (LAUNCH / "environment").read_text().splitlines())
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    config = load(None)
    assert str(config.runs_dir) == variables["MEGAPD_RUNS_DIR"]
    assert config.telemetry.project == variables["MEGAPD_TELEMETRY__PROJECT"]
