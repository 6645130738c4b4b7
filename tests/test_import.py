"""``import stfm`` is light, and every public name can be reached."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import import_module

import pytest

import stfm

HEAVY = {
    "anndata",
    "dask",
    "lightning",
    "matplotlib",
    "matplotlib.pyplot",
    "numba",
    "scanpy",
    "sklearn",
    "spatialdata",
    "squidpy",
    "torch",
    "zarr",
}

PUBLIC_MODULES = [name for name in stfm.__all__ if name not in {"__version__", "settings"}]


def _modules_after(code: str) -> set[str]:
    script = f"{code}\nimport json, sys\nsys.stdout.write(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout))


def test_import_loads_nothing_heavy():
    loaded = _modules_after("import stfm")
    assert loaded & HEAVY == set()


def test_public_packages_load_nothing_heavy():
    code = "\n".join(f"import stfm.{name}" for name in ("pp", "tl", "pl", "get", "datasets", "metrics", "errors"))
    loaded = _modules_after(code + "\nimport stfm\ndir(stfm)\nstfm.settings")
    assert loaded & {"torch", "lightning", "squidpy", "spatialdata", "sklearn", "matplotlib.pyplot", "scanpy"} == set()


def test_command_line_loads_no_torch():
    assert "torch" not in _modules_after("import stfm.cli")


@pytest.mark.parametrize("name", PUBLIC_MODULES)
def test_every_public_name_resolves(name: str):
    module = import_module(f"stfm.{name}")
    assert module is getattr(stfm, name)
    for public in module.__all__:
        assert getattr(module, public) is not None


def test_wrong_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'qq'"):
        _ = stfm.qq


def test_version_is_the_one_of_the_package():
    from importlib.metadata import version

    assert stfm.__version__ == version("stfm")
    assert "__version__" in dir(stfm)
