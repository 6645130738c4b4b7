"""What this machine has: versions, device, cache, extras, weights; what is missing, and what mends it."""

from __future__ import annotations

import os
import platform
import sys
import tempfile
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from stfm._optional import EXTRAS
from stfm._settings import settings
from stfm._version import __version__

PACKAGES = ("torch", "lightning", "numpy", "scipy", "pandas", "scikit-learn", "numba", "anndata", "scanpy", "zarr")
STATES = {"ok": "green", "note": "yellow", "missing": "red"}


@dataclass(frozen=True)
class Finding:
    """One row of the doctor's table."""

    part: str
    name: str
    value: str
    state: str = "ok"
    advice: str = ""


def examine() -> list[Finding]:
    """Look at everything; nothing is changed, downloaded or left behind."""
    return [*_versions(), *_device(), *_threads(), *_cache(), *_extras(), *_weights()]


def _versions() -> list[Finding]:
    rows = [
        Finding("versions", "stfm", __version__),
        Finding("versions", "python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
    ]
    for name in PACKAGES:
        try:
            rows.append(Finding("versions", name, version(name)))
        except PackageNotFoundError:
            rows.append(Finding("versions", name, "not installed", "missing", f"pip install '{name}'"))
    return rows


def _device() -> list[Finding]:
    import torch

    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(0)
        count = torch.cuda.device_count()
        name = f"cuda: {count} x {gpu.name}, {gpu.total_memory / 2**30:.0f} GiB each"
        return [Finding("device", "found", name), _precision("bf16" if torch.cuda.is_bf16_supported() else "fp32")]
    if torch.backends.mps.is_available():
        return [Finding("device", "found", "mps (Apple)"), _precision("fp32")]
    advice = "small and tiny models train here; for full size use a machine with a GPU"
    built = torch.version.cuda
    if built is not None:
        advice = f"torch is built for CUDA {built} but finds no driver or GPU; {advice}"
    rows = [Finding("device", "found", f"cpu ({torch.backends.cpu.get_cpu_capability()})", "note", advice)]
    if settings.device not in {"auto", "cpu"}:
        advice = 'stfm.settings.device = "auto" takes what is there'
        rows.append(Finding("device", "asked for", settings.device, "missing", advice))
    return [*rows, _precision("fp32")]


def _precision(name: str) -> Finding:
    return Finding("device", "precision", name, "ok", "" if name == "bf16" else "bf16 pays off on recent GPUs only")


def _threads() -> list[Finding]:
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = torch.get_num_threads()
    over = threads > cores
    policy = os.environ.get("OMP_WAIT_POLICY", "not set")
    passive = policy.upper() == "PASSIVE"
    return [
        Finding("threads", "cores", str(cores)),
        Finding(
            "threads",
            "torch",
            str(threads),
            "note" if over else "ok",
            f"export OMP_NUM_THREADS={cores}" if over else "",
        ),
        Finding(
            "threads",
            "OMP_WAIT_POLICY",
            policy,
            "ok" if passive else "note",
            "" if passive else "export OMP_WAIT_POLICY=PASSIVE where other work shares the cores",
        ),
    ]


def _cache() -> list[Finding]:
    folder = settings.cache_dir
    there = folder.is_dir()
    probe = next(path for path in (folder, *folder.parents) if path.is_dir())
    writable = _is_writable(probe)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if there else 0
    offline = Finding("network", "offline", "yes" if settings.offline else "no")
    if settings.offline:
        advice = "only cached files are used; unset STFM_OFFLINE to fetch others"
        offline = Finding("network", "offline", "yes", "note", advice)
    own = Finding("network", "folder of weights", str(settings.weights_dir or "none (STFM_WEIGHTS)"))
    if settings.weights_dir is not None and not settings.weights_dir.is_dir():
        own = Finding("network", own.name, f"{own.value} (no such folder)", "note", "mend or unset STFM_WEIGHTS")
    return [
        Finding("cache", "folder", f"{folder} ({size / 2**20:.0f} MiB)" if there else f"{folder} (made on first use)"),
        Finding(
            "cache",
            "writable",
            "yes" if writable else "no",
            "ok" if writable else "missing",
            "" if writable else "set STFM_CACHE to a folder that you may write",
        ),
        offline,
        Finding("network", "mirror", settings.mirror or "none (public repositories)"),
        own,
    ]


def _is_writable(folder: Path) -> bool:
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def _is_there(module: str) -> bool:
    return module in sys.modules or find_spec(module) is not None


def _extras() -> list[Finding]:
    rows = []
    for extra, (purpose, modules) in EXTRAS.items():
        gone = [module for module in modules if not _is_there(module)]
        if gone:
            value = f"no ({', '.join(gone)})"
            rows.append(Finding("extras", extra, value, "note", f"for {purpose}: pip install 'stfm[{extra}]'"))
        else:
            rows.append(Finding("extras", extra, "yes"))
    return rows


def _weights() -> list[Finding]:
    """Say which named weights are here, and what else lies in the cache."""
    from stfm.weights import WEIGHTS, list_weights, path

    rows = []
    for name, there in list_weights()["there"].items():
        if there:
            rows.append(Finding("weights", str(name), f"{WEIGHTS.get(str(name)).label} in {path(str(name))}"))
        else:
            rows.append(Finding("weights", str(name), "not here", "note", _how_to_get(str(name))))
    folder = settings.cache_dir / "weights"
    found = sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*.safetensors"))
    others = [name for name in found if name.split("/")[0] not in WEIGHTS]
    return [*rows, *(Finding("weights", name, str(folder / name)) for name in others)]


def _how_to_get(name: str) -> str:
    from stfm.weights import WEIGHTS

    if WEIGHTS.get(name).packaged:
        return "not in this version; models train from scratch with stfm.tl.train, a saved one is named by its folder"
    return f"stfm weights fetch {name}"


def show(*, as_json: bool = False) -> None:
    """Print what :func:`examine` finds, as a table or as JSON."""
    from rich.console import Console

    findings = examine()
    console = Console()
    if as_json:
        import json

        console.out(json.dumps([asdict(finding) for finding in findings], indent=2), highlight=False)
        return
    from rich.table import Table
    from rich.text import Text

    table = Table(title="stfm doctor", title_justify="left")
    for column in ("", "what", "found", "what to do"):
        table.add_column(column, overflow="fold")
    last = ""
    for row in findings:
        if last and row.part != last:
            table.add_section()
        part = row.part if row.part != last else ""
        table.add_row(part, row.name, Text(row.value, style=STATES[row.state]), Text(row.advice))
        last = row.part
    console.print(table)
    broken = [row.name for row in findings if row.state == "missing"]
    console.print(f"To mend: {', '.join(broken)}." if broken else "Nothing to mend: stfm can run here.")
