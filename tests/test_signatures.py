"""Signatures and docstrings of every public function follow one habit."""

from __future__ import annotations

import inspect
import re
from importlib import import_module
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parents[1] / "docs"
PACKAGES = ("pp", "tl", "pl", "get", "datasets", "metrics", "models", "encoders", "slide", "weights")
ON_DATA = {"pp", "tl", "pl", "get"}  # their first argument is the data
FOREIGN_NAMES = {"seed", "random_state", "inplace", "n_cpus", "num_workers", "save", "show", "batch_key", "sample_key"}
OPEN_KEYWORDS = {"models.create", "datasets.load"}  # fields of a config, arguments of a loader: checked by name


def _public(package: str) -> list[tuple[str, object]]:
    module = import_module(f"stfm.{package}")
    return [(f"{package}.{name}", getattr(module, name)) for name in module.__all__]


OBJECTS = [pair for package in PACKAGES for pair in _public(package)]
FUNCTIONS = [(name, obj) for name, obj in OBJECTS if inspect.isfunction(obj)]
CLASSES = [(name, obj) for name, obj in OBJECTS if inspect.isclass(obj)]
POSITIONAL = {inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD}

each_function = pytest.mark.parametrize(("name", "function"), FUNCTIONS, ids=[name for name, _ in FUNCTIONS])


def _sections(doc: str) -> dict[str, str]:
    parts = re.split(r"^(\w[\w ]*)\n-{3,}\n", inspect.cleandoc(doc), flags=re.MULTILINE)
    return {"": parts[0], **dict(zip(parts[1::2], parts[2::2], strict=True))}


@each_function
def test_data_first_then_two_positionals(name: str, function):
    parameters = list(inspect.signature(function).parameters.values())
    positional = [p for p in parameters if p.kind in POSITIONAL]
    assert len(positional) <= 3, f"{name} takes {len(positional)} positional arguments"
    if name.split(".")[0] in ON_DATA and not name.split(".")[1].startswith("list_"):
        assert positional, f"{name} takes no data"
        assert positional[0].default is inspect.Parameter.empty, f"{name}: the data come first and have no default"
    if name not in OPEN_KEYWORDS:
        hidden = [p.name for p in parameters if p.kind is inspect.Parameter.VAR_KEYWORD]
        assert hidden == [], f"{name}: nothing vanishes in **{hidden}"


@each_function
def test_flags_are_keyword_only(name: str, function):
    for parameter in inspect.signature(function).parameters.values():
        flag = isinstance(parameter.default, bool) or parameter.annotation in {"bool", bool}
        if flag or parameter.name in {"copy", "key_added", "library_key", "layer", "rng", "n_jobs"}:
            assert parameter.kind is inspect.Parameter.KEYWORD_ONLY, f"{name}({parameter.name})"
        if parameter.name == "copy":
            assert parameter.default is False, f"{name}: copy=False is the default"


@each_function
def test_one_name_for_one_thing(name: str, function):
    parameters = inspect.signature(function).parameters
    assert FOREIGN_NAMES.isdisjoint(parameters), f"{name}: {sorted(FOREIGN_NAMES & set(parameters))}"
    if "ax" in parameters:
        assert parameters["ax"].default is None


@each_function
def test_everything_is_annotated(name: str, function):
    signature = inspect.signature(function)
    bare = [p.name for p in signature.parameters.values() if p.annotation is inspect.Parameter.empty]
    assert bare == [], f"{name}: {bare}"
    assert signature.return_annotation is not inspect.Signature.empty, name


@each_function
def test_docstring_has_the_numpydoc_sections(name: str, function):
    sections = _sections(function.__doc__ or "")
    assert sections[""].strip(), f"{name} has no summary"
    parameters = [p.lstrip("*") for p in inspect.signature(function).parameters]
    if parameters:
        listed = re.findall(r"^(\*{0,2}\w[\w, *]*?)\s*(:.*)?$", sections.get("Parameters", ""), flags=re.MULTILINE)
        names = {part.strip().lstrip("*") for entry, _ in listed for part in entry.split(",")}
        assert set(parameters) <= names, f"{name}: {sorted(set(parameters) - names)} not documented"
        typed = [entry for entry, kind in listed if kind]
        assert typed == [], f"{name}: types stand in the signature only: {typed}"
    if inspect.signature(function).return_annotation not in {"None", None}:
        assert "Returns" in sections or "Yields" in sections, f"{name} does not say what it returns"


@pytest.mark.parametrize(("name", "cls"), CLASSES, ids=[name for name, _ in CLASSES])
def test_classes_have_docstrings(name: str, cls: type):
    doc = cls.__doc__ or ""
    assert doc.strip(), name
    assert not doc.startswith(f"{cls.__name__}("), f"{name} has only the generated docstring"


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_has_its_api_entry(package: str):
    page = (DOCS / "api" / f"{package}.md").read_text(encoding="utf-8")
    entries = set(re.findall(r"^\s+(\w+)$", page, flags=re.MULTILINE))
    public = {name.split(".")[1] for name, _ in _public(package)}
    assert public - entries == set(), f"docs/api/{package}.md lacks {sorted(public - entries)}"
    assert entries - public == set(), f"docs/api/{package}.md lists {sorted(entries - public)}, which are not public"
