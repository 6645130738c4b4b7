"""Run every tutorial from top to bottom, as CI does, and keep the executed copies.

python tutorials/execute.py [--out DIR] [NOTEBOOK ...]
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).resolve().parent


def find_data() -> None:
    """Let public files that lie beside the checkout (as in CI) stand in for downloads, in a cache folder of their own.

    ``STFM_SHARED_DATA`` names the folder; its ``cache`` is linked, not copied, and nothing is written to it.
    """
    shared = Path(os.environ.get("STFM_SHARED_DATA", HERE.parents[1] / "shared" / "data")).resolve()
    if not shared.is_dir():
        return
    os.environ["STFM_SHARED_DATA"] = str(shared)
    cache = Path(os.environ.setdefault("STFM_CACHE", tempfile.mkdtemp(prefix="stfm-tutorials-")))
    cache.mkdir(parents=True, exist_ok=True)
    for folder in (shared / "cache").iterdir():
        if not (cache / folder.name).exists():
            (cache / folder.name).symlink_to(folder)


def execute(path: Path, out: Path, timeout: int) -> float:
    """Run one notebook in its own folder and return the seconds it took; a cell that fails raises."""
    notebook = nbformat.read(path, as_version=4)
    started = time.perf_counter()
    client = NotebookClient(
        notebook, timeout=timeout, kernel_name="python3", resources={"metadata": {"path": str(HERE)}}
    )
    client.execute()
    out.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, out / path.name)
    return time.perf_counter() - started


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebooks", nargs="*", type=Path)
    parser.add_argument("--out", type=Path, default=HERE / "_executed")
    parser.add_argument("--timeout", type=int, default=900, help="seconds a cell may take")
    options = parser.parse_args()
    notebooks = options.notebooks or sorted(HERE.glob("*.ipynb"))
    if not notebooks:
        print(f"no notebooks in {HERE}", file=sys.stderr)
        return 1
    find_data()
    for path in notebooks:
        print(f"{path.name}: {execute(path, options.out, options.timeout):.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
