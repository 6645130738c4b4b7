from __future__ import annotations

from dataclasses import dataclass

import pytest

from stfm._errors import InputError, MissingKeyError
from stfm._registry import Registry


@dataclass(frozen=True)
class Spec:
    name: str
    size: int


@pytest.fixture
def registry() -> Registry[Spec]:
    table: Registry[Spec] = Registry("thing")
    table.register("alpha", Spec("alpha", 1), aliases=("a",))
    table.register("beta", Spec("beta", 2))
    return table


def test_a_name_or_its_alias_finds_the_spec(registry):
    assert registry.get("a") is registry.get("alpha")
    assert registry.names() == ["alpha", "beta"]
    assert "a" in registry
    assert "gamma" not in registry


def test_a_wrong_name_gets_advice(registry):
    with pytest.raises(MissingKeyError, match=r"no thing 'alpa'\. Did you mean 'alpha'"):
        registry.get("alpa")


def test_a_name_is_taken_once(registry):
    with pytest.raises(InputError, match="registered already"):
        registry.register("a", Spec("a", 3))


def test_the_table_has_a_row_a_name(registry):
    table = registry.frame()
    assert table.loc["beta", "size"] == 2
    assert table.index.name == "thing"
    assert "name" not in table


def test_the_loader_runs_once_and_late():
    calls = []
    table: Registry[Spec] = Registry("thing", loader=lambda: calls.append(table.register("x", Spec("x", 0))))
    assert calls == []
    assert table.names() == ["x"]
    table.names()
    assert len(calls) == 1
