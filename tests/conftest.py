"""Fixtures that every test gets: no network, no window, no foreign cache, one thread."""

from __future__ import annotations

import os
from pathlib import Path

for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(_name, "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ["MPLBACKEND"] = "Agg"

import pytest  # noqa: E402  (the thread settings above must come before anything that starts threads)

ROOT = Path(__file__).resolve().parents[1]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--internet", action="store_true", help="also run the tests that need a network")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--internet"):
        offline = pytest.mark.skip(reason="needs a network (--internet)")
        for item in items:
            if item.get_closest_marker("internet"):
                item.add_marker(offline)
    if any(item.get_closest_marker("gpu") for item in items):
        import torch

        if not (torch.cuda.is_available() or torch.backends.mps.is_available()):
            missing = pytest.mark.skip(reason="needs a CUDA or MPS device")
            for item in items:
                if item.get_closest_marker("gpu"):
                    item.add_marker(missing)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real public data, or a skip that says how to name it."""
    folder = Path(os.environ.get("STFM_SHARED_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real data in {folder}; set STFM_SHARED_DATA")
    return folder


@pytest.fixture(scope="session")
def _cache_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("stfm-cache")


@pytest.fixture(autouse=True)
def _isolated(monkeypatch: pytest.MonkeyPatch, _cache_root: Path):
    """An own cache folder, no downloads, quiet; open figures are closed afterwards."""
    import sys

    from stfm._settings import settings

    monkeypatch.setenv("STFM_CACHE", str(_cache_root))
    monkeypatch.setenv("STFM_OFFLINE", "1")
    with settings.override(cache_dir=_cache_root, offline=True):
        yield
    if "matplotlib.pyplot" in sys.modules:
        sys.modules["matplotlib.pyplot"].close("all")
