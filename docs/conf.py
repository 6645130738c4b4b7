"""Sphinx configuration; the build is nitpicky and needs no network."""

from __future__ import annotations

import os
import shutil
from importlib import import_module
from pathlib import Path

import stfm

HERE = Path(__file__).resolve().parent
project = "stfm"
author = "stfm developers"
copyright = "2026, stfm developers"
version = release = stfm.__version__

extensions = [
    "myst_nb",
    "numpydoc",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.intersphinx",
    "sphinx.ext.mathjax",
    "sphinxcontrib.bibtex",
]
source_suffix = {".rst": "restructuredtext", ".md": "myst-nb", ".ipynb": "myst-nb"}  # autosummary writes the first kind
exclude_patterns = ["_build", "_generated", "**.ipynb_checkpoints"]
templates_path = ["_templates"]
nitpicky = True

html_theme = "sphinx_book_theme"
html_title = "stfm"
html_static_path = ["_static"]
html_css_files = ["custom.css"]
html_theme_options = {"show_toc_level": 2, "home_page_in_toc": True}

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # tutorials are executed by tutorials/execute.py in CI

autosummary_generate = True
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "undoc-members": False, "show-inheritance": True}
python_maximum_signature_line_length = 88
python_use_unqualified_type_names = True
numpydoc_show_class_members = False
numpydoc_xref_param_type = False

bibtex_bibfiles = ["references.bib"]
bibtex_reference_style = "author_year"

# Inventories live on the network: links to other projects are made on Read the Docs, and are plain text elsewhere.
intersphinx_mapping = {
    "python": ("https://docs.python.org/3", None),
    "anndata": ("https://anndata.readthedocs.io/en/stable/", None),
    "matplotlib": ("https://matplotlib.org/stable/", None),
    "numpy": ("https://numpy.org/doc/stable/", None),
    "pandas": ("https://pandas.pydata.org/docs/", None),
    "scanpy": ("https://scanpy.readthedocs.io/en/stable/", None),
    "scipy": ("https://docs.scipy.org/doc/scipy/", None),
    "torch": ("https://docs.pytorch.org/docs/stable/", None),
}
if os.environ.get("READTHEDOCS") != "True":
    intersphinx_mapping = {}

suppress_warnings = [
    "ref.citation",  # numpydoc numbers References that the text does not point to
    "ref.footnote",
]


def _bring_tutorials() -> None:
    """Copy the notebooks under the pages; the executed ones (tutorials/execute.py) where they are."""
    source = HERE.parent / "tutorials"
    target = HERE / "tutorials"
    target.mkdir(exist_ok=True)
    for path in source.glob("*.ipynb"):
        executed = source / "_executed" / path.name
        shutil.copyfile(executed if executed.is_file() else path, target / path.name)


def _bring_benchmarks() -> None:
    """Write the committed tables (benchmarks/results/*.md) as one page to include; none of them has to be there."""
    parts = []
    for path in sorted((HERE.parent / "benchmarks" / "results").glob("*.md")):
        title, *lines = path.read_text(encoding="utf-8").splitlines()
        name = title.removeprefix("# ").strip()
        levels = [len(line) - len(line.lstrip("#")) for line in lines]
        deeper = "#" * (3 - min(filter(None, levels), default=3))  # below the title
        body = [f"{deeper}{line}" if level else line for line, level in zip(lines, levels, strict=True)]
        parts.append("\n".join([f"## {name}", *body]).rstrip())
    text = "\n\n".join(parts) if parts else "No table is committed yet."
    target = HERE / "_generated"
    target.mkdir(exist_ok=True)
    (target / "benchmarks.md").write_text(text + "\n", encoding="utf-8")


PUBLIC = ("datasets", "encoders", "errors", "get", "metrics", "models", "pl", "pp", "slide", "tl")


def _public_homes() -> dict[str, str]:
    """Where a class or function is documented, by its own module path and by its bare name."""
    homes: dict[str, str] = {}
    for package in PUBLIC:
        module = import_module(f"stfm.{package}")
        for name in getattr(module, "__all__", ()):
            thing = getattr(module, name)
            if hasattr(thing, "__qualname__"):
                homes[f"{thing.__module__}.{thing.__qualname__}"] = f"stfm.{package}.{name}"
                homes.setdefault(name, f"stfm.{package}.{name}")
    return homes


def _resolve(app, env, node, contnode):
    """Lead names of stfm to their public page; leave names of other packages as plain text."""
    if node.get("refdomain") != "py":
        return None
    target = node.get("reftarget", "")
    home = app.stfm_homes.get(target)
    if home is not None:
        domain = env.get_domain("py")
        for kind in ("class", "func", "exc", "obj"):
            found = domain.resolve_xref(env, node.get("refdoc", ""), app.builder, kind, home, node, contnode)
            if found is not None:
                return found
    if target.startswith("stfm."):
        return contnode if _exists(target) else None  # a name of ours that leads nowhere is an error
    return contnode if node.get("reftype") in {"class", "obj", "data", "exc"} or "." in target else None


def _exists(target: str) -> bool:
    """Whether a dotted name of stfm that has no page of its own is there (a class that a signature names)."""
    module, _, name = target.rpartition(".")
    try:
        return hasattr(import_module(module), name)
    except ImportError:
        return False


def setup(app):
    _bring_tutorials()
    _bring_benchmarks()
    app.stfm_homes = _public_homes()
    app.connect("missing-reference", _resolve, priority=900)
