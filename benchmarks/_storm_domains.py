"""Spatial domains with STORM: cortex (DLPFC), breast cancer labelled by a pathologist (her2st), olfactory bulb, toy.

One setting for all slides (``GENES``, ``CLUSTER``, ``RECIPE``), genes alone but for the rows that say otherwise. It was
chosen on 151673, 151674, B1, H1 and toy tissue; 151675, G2 and the bulb are scored and no more (docs/decisions.md).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import _domains as simple
import numpy as np
import pandas as pd
from _common import table as markdown
from _expression import read_dlpfc

import stfm as sf
from stfm.slide import Slide, as_slides
from stfm.training.recipes import RECIPES, Recipe

Save = Callable[[pd.DataFrame], None]
SCORES = ("ARI", "NMI", "AMI")
#: slides of a data set, which train for one another
SETS = {
    "DLPFC": ("151673", "151674", "151675"),
    "her2st": ("B1", "G2", "H1"),
    "MOB": ("rep11",),
    "toy": ("toy 1", "toy 2"),
}
#: most variable genes that STORM reads, among those detected in this share of the spots
GENES, DETECTED = 2000, 0.1
CLUSTER: Mapping[str, Any] = {"method": "consensus", "n_init": 6}
RECIPE = RECIPES["storm-small"].replace(max_steps=100)
CORTEX_UM = (448.0, 1120.0)
RESULTS = Path(__file__).parent / "results"
NOTE = """Goals of one setting for all slides: ARI .62 on DLPFC (median, none below .50), .42 on her2st (mean), .65
on rep11. Settings were chosen on 151673, 151674, B1, H1 and toy tissue; 151675, G2 and rep11 were scored and no more.
The column of seeds is the largest number of a row; its slides may have fewer. Simple rows and ST-Align on DLPFC are
those of st_align_domains. Peers come from benchmarks/peers; a slide without a number was not run."""
RENAMED = {"image only (handcrafted)": "H&E alone (handcrafted features)", "ST-Align": "ST-Align, zero-shot"}


@dataclass(frozen=True)
class Storm:
    """A row that STORM makes: what it is trained on, what of it is clustered, what is taken away."""

    mode: str = "self"
    config: Mapping[str, Any] = field(default_factory=dict)
    recipe: Recipe = RECIPE
    use_rep: str = "X_stfm"
    image: bool = False


def storm_rows() -> dict[str, Storm]:
    """STORM by what it was trained on."""
    return {
        "STORM, zero-shot": Storm("zero-shot"),
        "STORM, trained on the slide": Storm(),
        "STORM as it starts (gene table and field, no step)": Storm(recipe=RECIPE.replace(epochs=1, lr=1e-12)),
    }


def ablation_rows() -> dict[str, Storm]:
    """STORM trained on the slide, with one thing taken away."""
    return {
        "STORM without neighbours": Storm(config={"ablation": "no-neighbours"}),
        "STORM, tokens after the spatial level": Storm(config={"joint": "concat"}),
        "STORM, mean of the window's tokens": Storm(use_rep="X_stfm_niche"),
        "STORM with H&E": Storm(image=True),
        "STORM, H&E alone": Storm(config={"ablation": "no-gene"}, image=True),
    }


def domain_table(data: Path, seeds: Sequence[int], save: Save) -> pd.DataFrame:
    """Score every row on every slide; what there is is saved after each seed.

    Rows with STORM come first for all seeds, then the ablations seed by seed.
    """
    slides = read_slides(data)
    parts = [recorded_scores()]
    for rows in (storm_rows(), ablation_rows()):
        for seed in seeds:
            for name, adata in slides.items():
                if rows.keys() == storm_rows().keys() and name not in SETS["DLPFC"]:
                    parts.append(_simple(name, adata, seed))
                for title, row in rows.items():
                    parts.append(_learned(slides, name, title, row, seed))
                print(name, seed, pd.concat(parts[-4:]).set_index("row")["ARI"].round(3).to_dict(), flush=True)
            save(pd.concat(parts, ignore_index=True))
    return pd.concat(parts, ignore_index=True)


def read_slides(data: Path) -> dict[str, Any]:
    """Read all slides; ``obs["label"]`` holds the truth, empty where there is none."""
    import anndata as ad

    slides = {}
    with sf.settings.override(cache_dir=data / "cache", offline=True):
        for name in SETS["her2st"]:
            adata = sf.datasets.her2st(name, image=False)
            adata.obs["label"] = adata.obs["label"].where(adata.obs["label"] != "undetermined")
            slides[name] = adata
    bulb = ad.read_h5ad(data / "h5ad" / "mob_rep11.h5ad")
    bulb.obsm["spatial"] = bulb.obsm["spatial"] * 200.0  # array positions, 200 µm apart
    bulb.obs["library_id"] = "rep11"
    slides["rep11"] = bulb
    for number, name in enumerate(SETS["toy"]):
        adata = sf.datasets.toy(n_spots=900, image=False, rng=11 + number)
        adata.obs["label"], adata.obs["library_id"] = adata.obs["domain"], name
        slides[name] = adata
    return slides | {name: read_dlpfc(data, name) for name in SETS["DLPFC"]}


def _slide(name: str, adata: Any) -> Slide:
    if name in SETS["DLPFC"]:
        return as_slides(adata)[0]
    return as_slides(adata, modalities=("gene",), mpp=1.0 if name == "rep11" else None)[0]


def _simple(name: str, adata: Any, seed: int) -> pd.DataFrame:
    """Rows that need no training."""
    return simple.run_domains({name: adata}, simple.simple_rows(), n_domains=n_domains(adata), seeds=[seed])


def n_domains(adata: Any) -> int:
    """Return the number of labels of a slide."""
    return int(adata.obs["label"].dropna().nunique())


def variable_genes(slides: Sequence[Slide]) -> list[str]:
    """Return the genes whose log expression varies most, by their mean rank over slides."""
    ranks: dict[str, list[float]] = {}
    for slide in slides:
        counts = slide.counts.rows(np.arange(slide.n_obs)).toarray()
        total = np.maximum(counts.sum(axis=1, keepdims=True), 1)
        spread = np.log1p(1e4 * counts / total).var(axis=0)
        there = (counts > 0).mean(axis=0) > DETECTED
        place = np.argsort(np.argsort(-np.where(there, spread, 0.0)))
        for gene in np.flatnonzero(there):
            ranks.setdefault(str(slide.panel.names[gene]), []).append(float(place[gene]))
    last = float(max(max(r) for r in ranks.values()))
    mean = {gene: (sum(r) + last * (len(slides) - len(r))) / len(slides) for gene, r in ranks.items()}
    return sorted(mean, key=mean.__getitem__)[:GENES]


def _training(slides: Mapping[str, Any], name: str, mode: str) -> Iterator[Slide]:
    """Yield what trains for a slide: itself, or the others of its data set."""
    (group,) = (names for names in SETS.values() if name in names)
    for other in group:
        if (other == name) == (mode == "self"):
            yield _slide(other, slides[other])


def _learned(slides: Mapping[str, Any], name: str, title: str, row: Storm, seed: int) -> pd.DataFrame:
    """Train, embed, cluster, score; nothing where there is no slide to train on or no H&E to read."""
    train = list(_training(slides, name, row.mode))
    if not train or (row.image and name not in SETS["DLPFC"]):
        return pd.DataFrame()
    config = {"linear_blend": 0.0, **({"contexts_um": CORTEX_UM} if row.image else {"image": None}), **row.config}
    model = sf.tl.train(
        train, "storm-small", stage="mask", config=config, genes=variable_genes(train), validation=None, rng=seed,
        recipe=row.recipe,
    )  # fmt: skip
    embedded = slides[name].copy()
    sf.tl.embed(embedded, model, **({"mpp": 1.0} if name == "rep11" else {}))
    one = {title: simple.DomainRow(simple.from_obsm(row.use_rep), {k: v for k, v in CLUSTER.items() if k != "n_init"})}
    return simple.run_domains(
        {name: embedded}, one, n_domains=n_domains(embedded), seeds=[seed], n_init=CLUSTER["n_init"]
    )


def recorded_scores() -> pd.DataFrame:
    """Rows of other runs: cortex by simple rows and ST-Align (benchmarks/st_align.py), and peers (benchmarks/peers)."""
    parts = []
    path = RESULTS / "st_align_domains.json"
    if path.exists():
        scores = pd.DataFrame(json.loads(path.read_text("utf-8"))["scores"])
        learned = (scores["mode"] == "zero-shot") & (scores["row"] == "ST-Align")
        parts.append(scores[(scores["mode"] == "no training") | learned].replace({"row": RENAMED}))
    path = RESULTS / "storm_domains_peers.json"
    if path.exists():
        parts.append(pd.DataFrame(json.loads(path.read_text("utf-8"))["scores"]))
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()


def show(scores: pd.DataFrame) -> str:
    """Return a table for each score: mean ± spread over seeds, and the median or mean that the goals are set for."""
    names = [name for group in SETS.values() for name in group if name in set(scores["slide"])]
    order = list(dict.fromkeys(scores["row"]))
    text = []
    for score in SCORES:
        cells = scores.groupby(["row", "slide"])[score].agg(["mean", "std", "count"])
        lines = []
        for row in order:
            found = {name: cells.loc[(row, name)] for name in names if (row, name) in cells.index}
            shown = [
                f"{found[n]['mean']:.3f} ± {np.nan_to_num(found[n]['std']):.3f}" if n in found else "" for n in names
            ]
            most = int(max(one["count"] for one in found.values()))
            lines.append([row, most, *shown, _over(found, "DLPFC", np.median), _over(found, "her2st", np.mean)])
        head = ["row", "seeds", *names, "DLPFC, median", "her2st, mean"]
        text.append(f"## {score}\n\n" + markdown(head, lines))
    return "\n\n".join([NOTE, *text])


def _cell(one: Any) -> str:
    return "" if one is None else f"{one['mean']:.3f} ± {np.nan_to_num(one['std']):.3f}"


def _over(found: Mapping[str, Any], group: str, how: Callable[[list[float]], Any]) -> str:
    means = [found[name]["mean"] for name in SETS[group] if name in found]
    return f"{how(means):.3f}" if len(means) == len(SETS[group]) else ""


def export(data: Path, folder: Path) -> None:
    """Write the slides as h5ad for packages that run elsewhere: counts, labels and coordinates."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, adata in read_slides(data).items():
        one = adata.copy()
        one.uns, one.varm, one.obsm = {}, {}, {"spatial": adata.obsm["spatial"]}
        one.obs = one.obs[["label"]].astype(str).astype("category")
        one.write_h5ad(folder / f"{name}.h5ad")


if __name__ == "__main__":
    export(*map(Path, sys.argv[1:3]))
