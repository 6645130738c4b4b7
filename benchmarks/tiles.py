"""How fast tiles come: from memory against numpy, squidpy and spatialdata, from disk, and with how much memory.

All rows are measured in one run, in turns, so that a busy machine slows them alike; ratios hold, absolute rates do not.

    python benchmarks/tiles.py [--side 8192] [--rounds 5] [--image slide.jpg] [--out benchmarks/results]
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from _common import best_of, table, write

if TYPE_CHECKING:
    from collections.abc import Callable

SIZES = (28, 112, 224)
GOALS = {"numpy": 0.8, "squidpy": 10.0, "spatialdata": 100.0}
MEAN, STD = np.full(3, 0.5, np.float32), np.full(3, 0.2, np.float32)


def rates(calls: dict[str, tuple[Callable[[], object], int]], rounds: int) -> dict[str, float]:
    """Call each in turns; return the best rate in tiles a second."""
    for call, _ in calls.values():
        call()  # compiles, and fills what is kept
    seconds = best_of({name: call for name, (call, _) in calls.items()}, rounds)
    return {name: n / seconds[name] for name, (_, n) in calls.items()}


def picture(side: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)


def from_memory(image: np.ndarray, size: int, seed: int) -> dict[str, tuple[Callable[[], object], int]]:
    """Rows of one tile size: numpy slices, ours, and the float rows."""
    from stfm.slide.tiles import TileReader, open_image

    rng = np.random.default_rng(seed)
    batch, n = (512, 8192) if size < 200 else (128, 2048)
    corner = rng.integers(0, image.shape[0] - size, (n, 2))
    reader = TileReader(open_image(image), corner + size / 2, 0.5)
    buffer = np.empty((batch, size, size, 3), np.uint8)
    floats = np.empty((batch, 3, size, size), np.float32)
    corners, index = corner.tolist(), np.arange(n)
    um = size * 0.5

    def slices() -> None:
        for start in range(0, n, batch):
            for i in range(batch):
                x, y = corners[start + i]
                buffer[i] = image[y : y + size, x : x + size]

    def ours() -> None:
        for start in range(0, n, batch):
            reader.read(index[start : start + batch], size_um=um, size_px=size, out=buffer)

    def per_tile() -> None:
        for start in range(0, n // 8, batch):
            tiles = []
            for x, y in corners[start : min(start + batch, n // 8)]:
                tile = image[y : y + size, x : x + size].transpose(2, 0, 1).astype(np.float32) / 255
                tiles.append((tile - MEAN[:, None, None]) / STD[:, None, None])
            np.stack(tiles)

    def fused() -> None:
        for start in range(0, n, batch):
            chosen = index[start : start + batch]
            reader.read_float(chosen, size_um=um, size_px=size, mean=MEAN, std=STD, out=floats)

    ours()
    last = corners[n - batch :]
    if not all((buffer[i] == image[y : y + size, x : x + size]).all() for i, (x, y) in enumerate(last)):
        raise SystemExit("the tiles are not the slices")
    return {"numpy": (slices, n), "stfm": (ours, n), "float per tile": (per_tile, n // 8), "stfm float": (fused, n)}


def squidpy_crops(image: np.ndarray, size: int, seed: int, n: int) -> Callable[[], object]:
    import anndata as ad
    import pandas as pd
    import squidpy as sq

    xy = np.random.default_rng(seed).integers(size, image.shape[0] - size, (n, 2)).astype(float)
    adata = ad.AnnData(obs=pd.DataFrame(index=[f"s{i}" for i in range(n)]), obsm={"spatial": xy})
    adata.uns["spatial"] = {"s": {"scalefactors": {"spot_diameter_fullres": float(size)}}}
    container = sq.im.ImageContainer(image, layer="image")
    return lambda: [crop.shape for crop in container.generate_spot_crops(adata, library_id="s", as_array="image")]


def spatialdata_tiles(image: np.ndarray, size: int, seed: int, n: int) -> Callable[[], object]:
    import spatialdata as sd
    from spatialdata.dataloader.datasets import ImageTilesDataset

    xy = np.random.default_rng(seed).integers(size, image.shape[0] - size, (n, 2)).astype(float)
    he = sd.models.Image2DModel.parse(image.transpose(2, 0, 1), dims=("c", "y", "x"))
    spots = sd.models.ShapesModel.parse(xy, geometry=0, radius=size / 2)
    sdata = sd.SpatialData(images={"he": he}, shapes={"spots": spots})
    data = ImageTilesDataset(sdata, {"spots": "he"}, {"spots": "global"}, tile_dim_in_units=float(size))
    return lambda: [np.asarray(data[i]["he"].data).shape for i in range(n)]


def from_disk(image: np.ndarray, rounds: int, seed: int) -> dict[str, float]:
    """224-px tiles in random order from a kept pyramid: one by one, and by blocks with and without blocks kept."""
    import zarr

    from stfm.slide.readers import keep_array
    from stfm.slide.readers.zarr import ZarrSource
    from stfm.slide.tiles import TileReader

    folder = keep_array(image)
    size, n = 224, 2048
    corner = np.random.default_rng(seed).integers(0, image.shape[0] - size, (n, 2))
    array = zarr.open_group(str(folder), mode="r")["0"]
    once = TileReader(ZarrSource(folder, kept_bytes=0), corner + size / 2, 0.5)
    kept = TileReader(ZarrSource(folder, kept_bytes=2 * image.nbytes), corner + size / 2, 0.5)

    def batches(reader: TileReader, batch: int) -> None:
        for start in range(0, n, batch):
            reader.read(np.arange(start, start + batch), size_um=112, size_px=size)

    calls = {
        "zarr, a tile at a time": (lambda: [array[y : y + size, x : x + size] for x, y in corner[:64].tolist()], 64),
        "stfm, 2048 at once, nothing kept": (lambda: batches(once, n), n),
        "stfm, batches of 128, blocks kept": (lambda: batches(kept, 128), n),
    }
    return rates(calls, rounds)


def peak_of(n_spots: int, folder: Path) -> float:
    """Peak memory in MB of a process that reads 200 batches of a slide with so many spots."""
    command = [sys.executable, __file__, "--peak", str(n_spots), str(folder)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def peak(n_spots: int, folder: str) -> None:
    from stfm.slide.tiles import TileReader, open_image

    source = open_image(folder)
    rng = np.random.default_rng(0)
    reader = TileReader(source, rng.uniform(300, source.shape[0] - 300, (n_spots, 2)), 0.5)
    buffer = np.empty((64, 224, 224, 3), np.uint8)
    for _ in range(200):
        reader.read(rng.integers(0, n_spots, 64), size_um=112, size_px=224, out=buffer)
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss would be that of the process this one was forked from
        print(next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM")) / 1024)
    else:
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def opening(path: Path) -> dict[str, float]:
    """Seconds of the first and the second opening of an image file."""
    from stfm.slide.readers import open_image

    seconds = {}
    for name in ("first, decoded", "second"):
        start = time.perf_counter()
        open_image(path)
        seconds[name] = time.perf_counter() - start
    return seconds


def measure(options: argparse.Namespace) -> dict[str, object]:
    from stfm.slide.readers import keep_array

    image = picture(options.side, options.seed)
    memory = {}
    for size in SIZES:
        calls = from_memory(image, size, options.seed)
        calls["squidpy"] = (squidpy_crops(image, size, options.seed, 200), 200)
        calls["spatialdata"] = (spatialdata_tiles(image, size, options.seed, 40), 40)
        memory[size] = rates(calls, options.rounds)
    result: dict[str, object] = {"side": options.side, "tiles_per_s": memory}
    result["disk_tiles_per_s"] = from_disk(image, options.rounds, options.seed)
    folder = keep_array(image)
    result["peak_mb"] = {str(n): peak_of(n, folder) for n in (10_000, 100_000, 1_000_000)}
    if options.image:
        result["open_s"] = opening(options.image)
    return result


def grid(rows: list[dict[str, object]]) -> str:
    """Return rows, which name their columns, as a table."""
    return table(list(rows[0]), [[row.get(name) for name in rows[0]] for row in rows])


def report(result: dict) -> str:
    """Return the tables in Markdown."""
    rows, floats = [], []
    for size, r in result["tiles_per_s"].items():
        peers = ("numpy", "squidpy", "spatialdata")
        counts = {name: f"{r[name]:,.0f}" for name in ("numpy", "stfm", "squidpy", "spatialdata")}
        rows.append({"tile px": size, **counts, **{f"stfm / {name}": r["stfm"] / r[name] for name in peers}})
        per_tile, fused = r["float per tile"], r["stfm float"]
        floats.append(
            {
                "tile px": size,
                "a tile at a time": f"{per_tile:,.0f}",
                "stfm": f"{fused:,.0f}",
                "ratio": fused / per_tile,
            }
        )
    rows.append({"tile px": "goal", **{f"stfm / {name}": f">= {goal:g}" for name, goal in GOALS.items()}})
    disk = [{"how": name, "tiles/s": f"{rate:,.0f}"} for name, rate in result["disk_tiles_per_s"].items()]
    peaks = [{"spots": f"{int(n):,}", "MB": f"{mb:.0f}"} for n, mb in result["peak_mb"].items()]
    parts = [
        "Tiles a second from an image in memory, uint8 into a buffer that is used again "
        "(numpy: slices; squidpy: generate_spot_crops, one px more a side; spatialdata: ImageTilesDataset).",
        grid(rows),
        "The same as normalised float32, channels first: numpy a tile at a time and stacked, stfm in one pass.",
        grid(floats),
        "Tiles of 224 px a second in random order from the pyramid on disk (zarr, lz4, blocks of 1024 px, noise).",
        grid(disk),
        "Peak memory of a process that reads 200 batches of 64 tiles of 224 px from disk.",
        grid(peaks),
    ]
    if "open_s" in result:
        opened = [{"opening": name, "s": f"{seconds:.2f}"} for name, seconds in result["open_s"].items()]
        parts += ["Opening a full-resolution JPEG.", grid(opened)]
    return "\n\n".join(parts)


def missed(result: dict) -> list[str]:
    """Return the goals that were not reached."""
    found = []
    for size, r in result["tiles_per_s"].items():
        found += [
            f"{size} px: {r['stfm'] / r[k]:.2f} x {k}, goal {g:g}" for k, g in GOALS.items() if r["stfm"] < g * r[k]
        ]
    few, *_, many = result["peak_mb"].values()
    if many > few + 64:
        found.append(f"memory grows with the spots: {few:.0f} -> {many:.0f} MB")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=8192, help="height and width of the picture in px")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--image", type=Path, help="an image file whose opening is timed too")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        peak(int(options.peak[0]), options.peak[1])
        return 0
    from stfm import settings

    with tempfile.TemporaryDirectory() as folder, settings.override(cache_dir=Path(folder)), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the peers
        result = measure(options)
    text = report(result)
    print(text)
    write(options.out / "tiles", result, text, seed=options.seed)
    short = missed(result)
    for line in short:
        print(line, file=sys.stderr)
    return 1 if short else 0


if __name__ == "__main__":
    sys.exit(main())
