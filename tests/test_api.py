"""The Python API: what `import megapd` offers, and what it leaves for later."""

import subprocess
import sys

import pytest

import megapd


@pytest.mark.slow
def test_it_is_imported_when_it_is_asked_for():
    command = [sys.executable, "-X", "importtime", "-c", "import megapd"]
    imported = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    names = {line.rsplit("|", 1)[-1].strip() for line in imported.splitlines()}
    assert "megapd" in names
    assert not names & {"torch", "deepspeed", "numpy", "pydantic", "megapd.config"}
    assert {"Callback", "load", "train"} <= set(dir(megapd))
    assert all(getattr(megapd, name) is not None for name in dir(megapd))
    with pytest.raises(AttributeError, match="has no attribute 'trian'"):
        megapd.trian  # noqa: B018
