"""Names to what is registered under them: by decorator, by entry points of packages, and what goes wrong with either."""

import sys

import pytest

from megapd.errors import UserError
from megapd.registry import Registry, _installed, imported

GROUP = "megapd.tests"


@pytest.fixture
def registry():
    return Registry(GROUP, "thing")


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Puts a package of one empty module on the path, with entry points of GROUP."""
    monkeypatch.syspath_prepend(tmp_path)

    def install(package, **points):
        module = package.replace("-", "_")
        (tmp_path / f"{module}.py").write_text("found = object()\n")
        metadata = tmp_path / f"{module}-1.0.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        lines = [f"{name} = {value}" for name, value in points.items()]
        (metadata / "entry_points.txt").write_text("\n".join([f"[{GROUP}]", *lines, ""]))
        _installed.cache_clear()
        return module

    yield install
    _installed.cache_clear()
    for module in ("first_package", "second_package"):
        sys.modules.pop(module, None)


def test_a_decorator_registers_what_it_decorates(registry):
    @registry.register("a")
    class A:
        pass

    assert registry.get("a") is A
    assert registry.names() == ["a"]


def test_a_name_is_registered_once(registry):
    registry.register("a")(dict)
    with pytest.raises(UserError, match=r"builtins\.dict is thing 'a' already; register builtins\.list under another"):
        registry.register("a")(list)
    assert registry.get("a") is dict


def test_an_unknown_name_offers_the_nearest(registry):
    with pytest.raises(UserError, match="unknown thing 'x'; there is none"):
        registry.get("x")
    for name in ("parity", "text", "copy"):
        registry.register(name)(name)
    with pytest.raises(UserError, match="unknown thing 'txt'; the nearest is 'text', of copy, parity, text"):
        registry.get("txt")


def test_an_entry_point_is_loaded_when_it_is_asked_for(registry, install):
    install("first-package", outside="first_package:found", other="first_package:found")
    registry.register("own")(dict)
    assert registry.names() == ["other", "outside", "own"]
    assert registry.get("own") is dict
    assert "first_package" not in sys.modules
    found = registry.get("outside")
    assert found is sys.modules["first_package"].found
    assert registry.get("outside") is found


@pytest.mark.parametrize("value", ["first_package:missing", "no_such_module:found"])
def test_a_broken_entry_point_names_its_package(registry, install, value):
    install("first-package", broken=value, sound="first_package:found")
    with pytest.raises(UserError, match=r"thing 'broken' of package first-package .* cannot be loaded: .*; correct or uninstall"):
        registry.get("broken")
    assert registry.get("sound") is sys.modules["first_package"].found


def test_two_packages_may_not_bring_one_name(registry, install):
    install("first-package", same="first_package:found")
    install("second-package", same="second_package:found")
    with pytest.raises(UserError, match="first-package and second-package all bring thing 'same'"):
        registry.get("same")


def test_a_package_may_not_replace_what_is_registered(registry, install):
    install("first-package", own="first_package:found")
    registry.register("own")(dict)
    with pytest.raises(UserError, match=r"first-package brings thing 'own', which is builtins\.dict already"):
        registry.get("own")


def test_imported():
    assert imported("megapd.registry:Registry") is Registry
