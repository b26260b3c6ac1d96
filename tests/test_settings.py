"""megapd settings: what can be set, from the tree itself."""

from megapd.cli import main
from megapd.commands.settings import settings
from megapd.registry import models, policies, tasks


def _is_own(kind):
    return kind.__module__.startswith("megapd.")


def test_every_setting_has_a_meaning():
    """Of megapd's own kinds: other tests register theirs."""
    own = {name for registry in (models, policies, tasks) for name in registry.names() if _is_own(registry.get(name))}
    found = [one for one in settings() if not one.kind or set(one.kind.split(", ")) & own]
    assert len(found) > 120
    assert [one.name for one in found if not one.meaning] == []
    assert [one.name for one in found if not one.type] == []


def test_a_section(capsys):
    assert main(["settings", "optimizer"]) == 0
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split() == ["setting", "type", "default", "meaning"]
    assert [line.split()[0] for line in lines][:2] == ["optimizer.kind", "optimizer.lr"]
    assert "AdamW: decay of its two moments" in lines[2]
    assert "0.001" in lines[1]


def test_kinds_of_a_section(capsys):
    assert main(["settings", "schedule"]) == 0
    told = capsys.readouterr().out
    assert "schedule.refresh (follow, matched)" in told
    assert "schedule.gain (adaptive)" in told
    assert main(["settings", "training.steps"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_a_section_that_there_is_not(capsys):
    assert main(["settings", "optimzer"]) == 2
    assert "there is no section or setting optimzer; did you mean optimizer?" in capsys.readouterr().err
