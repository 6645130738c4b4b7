"""The pages of the docs name what the code has: options, slots, scripts of benchmarks."""

from __future__ import annotations

import doctest
import importlib
import inspect
import re
from dataclasses import fields
from pathlib import Path

import pytest

from stfm import _keys
from stfm.models import STAlignConfig

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"

WITH_EXAMPLES = ("pp", "tl", "pl", "get", "metrics")  # every function there shows how it is called
PACKAGES = (*WITH_EXAMPLES, "datasets", "models", "encoders", "slide", "weights")
PUBLIC = {
    f"{package}.{name}": getattr(importlib.import_module(f"stfm.{package}"), name)
    for package in PACKAGES
    for name in importlib.import_module(f"stfm.{package}").__all__
}
EXAMPLES = {
    name: test
    for name, thing in PUBLIC.items()
    for test in doctest.DocTestFinder(recurse=False).find(thing, name, globs={})
    if test.examples
}

pages = pytest.mark.skipif(not DOCS.is_dir(), reason="the docs are not part of an installed package")


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_do_what_they_say(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Each example stands alone: it imports what it uses and makes its own data."""
    monkeypatch.chdir(tmp_path)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    said: list[str] = []
    result = runner.run(EXAMPLES[name], out=said.append)
    assert result.failed == 0, "".join(said)


def test_every_function_shows_how_it_is_called():
    functions = [name for name, thing in PUBLIC.items() if inspect.isfunction(thing)]
    wanted = {name for name in functions if name.partition(".")[0] in WITH_EXAMPLES}
    assert wanted - set(EXAMPLES) == set()
    skipped = {name for name, test in EXAMPLES.items() if any("+SKIP" in one.source for one in test.examples)}
    assert skipped == set(), "an example that is not run is not held"


def page(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


@pages
def test_every_option_of_st_align_is_explained():
    text = page("concepts/st_align.md")
    slots = {"spot_image", "niche_image", "spot_gene", "niche_gene"}  # described as the four slots
    absent = [f.name for f in fields(STAlignConfig) if f.name not in slots and f"`{f.name}" not in text]
    assert absent == []


@pages
def test_rows_that_docstrings_point_to_are_in_the_table_of_open_choices():
    rows = {int(n) for n in re.findall(r"^\| (\d+) \|", page("concepts/st_align.md"), flags=re.MULTILINE)}
    parameters = STAlignConfig.__doc__ or ""
    pointed = {int(n) for group in re.findall(r"\((\d+(?:, \d+)*)\)", parameters) for n in group.split(", ")}
    assert pointed
    assert pointed <= rows


@pages
def test_table_of_small_says_what_the_preset_is():
    text = page("concepts/st_align.md")
    small = STAlignConfig.preset("small")
    for slot in ("spot_image", "niche_image", "spot_gene", "niche_gene"):
        assert f"`{getattr(small, slot).name}`" in text
    for name in ("n_neighbors", "centre", "joint", "lambda1"):
        (row,) = re.findall(rf"^\| `{name}`.*$", text.split("## Where the text")[0], flags=re.MULTILINE)
        value = getattr(small, name)
        assert (f'"{value}"' if isinstance(value, str) else str(value)) in row.split("|")[3]


@pages
def test_slots_page_names_every_slot():
    text = page("slots.md")
    slots = [_keys.SPATIAL, _keys.EMBEDDING, _keys.DOMAIN, _keys.PREDICTED, *_keys.niche_keys()]
    slots += [_keys.part_key(_keys.EMBEDDING, part) for part in _keys.PARTS]
    assert [slot for slot in slots if f'["{slot}"]' not in text] == []


@pages
def test_every_benchmark_is_listed():
    listed = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    scripts = [path.name for path in (ROOT / "benchmarks").glob("[!_]*.py")]
    assert [name for name in scripts if name not in listed] == []
