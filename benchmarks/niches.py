"""Exact neighbours and niche means: stfm against squidpy, scikit-learn and scipy, in turns within one run.

Ratios hold on a busy machine, absolute times do not.

    python benchmarks/niches.py [--sizes 5000 100000 1000000] [--rounds 2] [--parts search] [--out benchmarks/results]
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp
from _common import best_of, in_new_process, table, write

K = 6
# times squidpy at 1 M and at 100 k, in order or shuffled
GOALS = {1_000_000: {"lattice": 20.0, "random": 15.0}, 100_000: {"lattice": 15.0, "random": 8.0}}
PARTS = ("means", "first_call", "search")
MEAN_GOALS = {"batches of 4096": 10.0, "random batches of 512": 7.0}

FIRST_CALL = """
import json, sys, time, warnings
warnings.simplefilter("ignore")
import numpy as np
who, n, warm = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "numba"
points = np.random.default_rng(0).random((n, 2)) * 1e4
import anndata, scipy.sparse, scipy.spatial
adata = anndata.AnnData(scipy.sparse.csr_matrix((n, 1), dtype=np.float32), obsm={"spatial": points})
if warm:
    import numba
if who == "squidpy":
    import squidpy
    call = lambda: squidpy.gr.spatial_neighbors(adata, coord_type="generic", n_neighs=6)
elif who == "cKDTree":
    call = lambda: scipy.spatial.cKDTree(points).query(points, 7, workers=-1)
elif who == "knn":
    from stfm.slide.niches import knn
    call = lambda: knn(points, 6)
else:
    import stfm
    stfm.pp.build_niches
    call = lambda: stfm.pp.build_niches(adata, 6)
before = peak_mb()
start = time.perf_counter()
call()
print(json.dumps({"seconds": time.perf_counter() - start, "before_mb": before}))
"""


def layouts(n: int, seed: int) -> dict[str, np.ndarray]:
    """Return points as they come: on a lattice, scattered, clustered, with one far outlier, in 3-D."""
    rng = np.random.default_rng(seed)
    side = int(np.sqrt(n))
    row, column = np.divmod(np.arange(side * side), side)
    lattice = np.column_stack([(column + 0.5 * (row % 2)) * 100.0, row * 50 * np.sqrt(3)])
    centers = rng.random((max(n // 2000, 5), 2)) * 1e4
    outlier = rng.permutation(lattice)
    outlier[0] = 1e9
    return {
        "lattice": lattice,
        "lattice, shuffled": rng.permutation(lattice),
        "random": rng.random((n, 2)) * 1e4,
        "clustered": centers[rng.integers(0, len(centers), n)] + rng.normal(0, 10, (n, 2)),
        "one far outlier": outlier,
        "random, 3-D": rng.random((n, 3)) * 1e4,
    }


def searches(points: np.ndarray) -> dict[str, Callable[[], object]]:
    """Return every way to the neighbours of the points."""
    import anndata
    import squidpy
    from scipy.spatial import cKDTree
    from sklearn.neighbors import NearestNeighbors

    import stfm as sf
    from stfm.slide.niches import knn

    adata = anndata.AnnData(sp.csr_matrix((len(points), 1), dtype=np.float32), obsm={"spatial": points})
    return {
        "build_niches": lambda: sf.pp.build_niches(adata, K),
        "knn": lambda: knn(points, K),
        "squidpy": lambda: squidpy.gr.spatial_neighbors(adata, coord_type="generic", n_neighs=K),
        "sklearn": lambda: (
            NearestNeighbors(n_neighbors=K, algorithm="kd_tree", n_jobs=-1).fit(points).kneighbors_graph()
        ),
        "cKDTree": lambda: cKDTree(points).query(points, K + 1, workers=-1),
    }


def exact(points: np.ndarray) -> bool:
    """Return whether the distances are those of scipy."""
    from scipy.spatial import cKDTree

    from stfm.slide.niches import knn

    return bool(
        np.allclose(knn(points, K).distance, cKDTree(points).query(points, K + 1, workers=-1)[0][:, 1:], rtol=1e-6)
    )


def search_rows(sizes: list[int], rounds: int, seed: int) -> list[dict[str, Any]]:
    """Time all searches on all layouts."""
    from stfm.slide.niches import knn

    knn(np.random.default_rng(seed).random((60_000, 2)), K)  # small inputs, too, then take the compiled search
    rows = []
    for n in sizes:
        for layout, points in layouts(n, seed).items():
            calls = searches(points)
            for name in ("build_niches", "knn"):
                calls[name]()  # compiled code is loaded; the first call is measured on its own
            turns = rounds if n >= 10**6 else 2 * rounds + 1 if n > 10**4 else 20  # milliseconds need many
            seconds = best_of(calls, turns)
            rows.append({"n": n, "layout": layout, "seconds": seconds, "exact": exact(points)})
            print(n, layout, {name: round(1e3 * s, 1) for name, s in seconds.items()}, flush=True)
    return rows


def first_calls(n: int) -> list[dict[str, Any]]:
    """Time the first call of a process and its peak memory, stfm with and without numba loaded against others."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        # bytecode is kept as in any installation, also where the environment forbids it
        os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
        os.environ["PYTHONPYCACHEPREFIX"] = folder
        for who in ("build_niches", "knn", "squidpy"):
            in_new_process(FIRST_CALL, who, "60000", "cold")  # leaves compiled code and bytecode in their caches
        for size in (5000, n):
            for who, state in product(("squidpy", "cKDTree", "knn", "build_niches"), ("cold", "numba")):
                if state == "numba" and who in ("squidpy", "cKDTree"):
                    continue
                found = in_new_process(FIRST_CALL, who, str(size), state)
                ours = who in ("knn", "build_niches")
                name = f"{who}, numba {'loaded' if state == 'numba' else 'not loaded'}" if ours else who
                rows.append({"who": name, "n": size, **found, "added_mb": found["peak_mb"] - found["before_mb"]})
        del os.environ["PYTHONPYCACHEPREFIX"]
    return rows


def mean_rows(n: int, genes: int, rounds: int, seed: int) -> list[dict[str, Any]]:
    """Time niche means in dense batches against the sparse product."""
    from stfm.slide.niches import knn, niche_mean

    rng = np.random.default_rng(seed)
    per_row = genes // 10
    columns = np.arange(per_row) * 10 + rng.integers(0, 10, (n, per_row))
    data = rng.integers(1, 20, n * per_row).astype(np.float32)
    indptr = np.arange(0, n * per_row + 1, per_row)
    counts = sp.csr_matrix((data, columns.ravel().astype(np.int32), indptr.astype(np.int32)), shape=(n, genes))
    points = rng.random((n, 2))
    table = knn(points, K)
    average = table.to_csr()[0] * np.float32(1 / K)
    rows = []
    for name, size, order in (
        ("batches of 4096", 4096, np.arange(n)),
        ("random batches of 512", 512, rng.permutation(n)[:51_200]),
    ):
        batches = [order[lo : lo + size] for lo in range(0, len(order), size)]
        buffer = np.empty((size, genes), np.float32)

        def ours(batches=batches, buffer=buffer) -> None:
            for batch in batches:
                niche_mean(counts, table, batch, out=buffer)

        def plain(batches=batches) -> None:
            for batch in batches:
                (average[batch] @ counts).toarray()

        ours()
        same = np.allclose(niche_mean(counts, table, batches[0]), (average[batches[0]] @ counts).toarray(), rtol=1e-5)
        rows.append({"what": name, "seconds": best_of({"stfm": ours, "scipy": plain}, rounds), "equal": bool(same)})
    return rows


def report(result: dict[str, Any]) -> str:
    """Return the tables."""
    search = [
        [
            f"{r['n']:,}", r["layout"], *(1e3 * s for s in r["seconds"].values()),
            r["seconds"]["squidpy"] / r["seconds"]["build_niches"], r["seconds"]["cKDTree"] / r["seconds"]["knn"],
            r["seconds"]["cKDTree"] / r["seconds"]["build_niches"], r["exact"],
        ]
        for r in result["search"]
    ]  # fmt: skip
    head = ["points", "layout", "build_niches ms", "knn ms", "squidpy ms", "sklearn ms", "cKDTree ms"]
    head += ["squidpy / build_niches", "cKDTree / knn", "cKDTree / build_niches", "exact"]
    first = [[r["who"], f"{r['n']:,}", 1e3 * r["seconds"], r["added_mb"]] for r in result["first_call"]]
    means = [
        [r["what"], 1e3 * r["seconds"]["stfm"], 1e3 * r["seconds"]["scipy"],
         r["seconds"]["scipy"] / r["seconds"]["stfm"], r["equal"]]
        for r in result["means"]
    ]  # fmt: skip
    measured = [[part, *found.values()] for part, found in result["measured"].items()]
    return "\n\n".join(
        [
            "The load of the machine while it was measured, in processes that want a core. Where it exceeds the number "
            "of cores, two threads get little more than one does, and less of an advantage over peers that use one.",
            table(["part", "began", "load at the start", "load at the end"], measured),
            f"Neighbours, k = {K}. squidpy and build_niches read and write an AnnData, the others arrays.",
            table(head, search),
            "First call of a fresh process (random points; imports of the packages not counted, but numba's where "
            "it is not loaded; bytecode and compiled code cached). squidpy and build_niches read and write an AnnData, "
            "the others arrays. Below 50,000 points knn takes scipy's tree then.",
            table(["who", "points", "ms", "memory added, MB"], first),
            "Niche means of 100,000 spots × 3,000 genes, 10 % dense, against rows of the sparse product made dense.",
            table(["how", "stfm ms", "scipy ms", "ratio", "equal"], means),
        ]
    )


def missed(result: dict[str, Any]) -> list[str]:
    """Return which goals were missed."""
    lines = []
    for r in result["search"]:
        s = r["seconds"]
        goal = GOALS.get(r["n"], {}).get(r["layout"].partition(",")[0]) if "3-D" not in r["layout"] else None
        if goal is not None and s["squidpy"] / s["build_niches"] < goal:
            lines.append(f"{r['n']:,} {r['layout']}: {s['squidpy'] / s['build_niches']:.1f} times squidpy, goal {goal}")
        if s["knn"] > s["cKDTree"]:
            lines.append(f"{r['n']:,} {r['layout']}: slower than cKDTree")
        if not r["exact"]:
            lines.append(f"{r['n']:,} {r['layout']}: not exact")
    first = {(r["who"], r["n"]): r["seconds"] for r in result["first_call"]}
    for (who, n), seconds in first.items():
        ratio = first["squidpy", n] / seconds
        goal = GOALS.get(n, {}).get("random")
        if who.startswith("build_niches") and goal is not None and ratio < goal:
            lines.append(f"first call, {n:,} random points, {who}: {ratio:.1f} times squidpy, goal {goal}")
        if who.startswith("knn") and seconds > first["cKDTree", n]:
            lines.append(f"first call, {n:,} random points, {who}: slower than cKDTree")
    for r in result["means"]:
        ratio = r["seconds"]["scipy"] / r["seconds"]["stfm"]
        if ratio < MEAN_GOALS[r["what"]]:
            lines.append(f"niche means, {r['what']}: {ratio:.1f} times scipy, goal {MEAN_GOALS[r['what']]}")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[5000, 100_000, 1_000_000])
    parser.add_argument("--rounds", type=int, default=2, help="turns at a million points; smaller sets get more")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--parts", nargs="+", default=[*PARTS], choices=PARTS, help="the others stay as they were")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    start = time.perf_counter()
    result: dict[str, Any] = {"measured": {}, **{part: [] for part in PARTS}}
    kept = options.out / "niches.json"
    if kept.exists():
        before = json.loads(kept.read_text("utf-8"))
        result.update({key: before[key] for key in result if key in before})
    short: list[str] = []
    parts: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "means": lambda: mean_rows(100_000, 3000, options.rounds + 1, options.seed),
        "first_call": lambda: first_calls(max(options.sizes)),
        "search": lambda: search_rows(options.sizes, options.rounds, options.seed),
    }
    for part in options.parts:  # written after each, should the next take too long
        began, load = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"), os.getloadavg()[0]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the peers
            result[part] = parts[part]()
        result["measured"][part] = {"began": began, "load": load, "load_after": os.getloadavg()[0]}
        short = missed(result)
        text = report(result) + "\n\n" + ("Goals missed:\n\n- " + "\n- ".join(short) if short else "All goals are met.")
        record = {**result, "missed": short, "wall_s": time.perf_counter() - start}
        write(options.out / "niches", record, text, seed=options.seed)
    print(text)
    for line in short:
        print("missed:", line, file=sys.stderr)
    return 1 if short else 0


if __name__ == "__main__":
    sys.exit(main())
