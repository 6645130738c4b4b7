"""Tissue of the demo: slides to learn from, and one that is only measured on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from stfm._errors import InputError

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData

TOY: dict[str, Any] = {"n_spots": 400, "n_patients": 6, "n_genes": 600}
LIBRARY, TRUTH = "library_id", "domain"


@dataclass
class Tissue:
    """Training slides and one held-out slide.

    Parameters
    ----------
    train
        Slides to learn from.
    test
        One slide that is only measured on.
    truth
        Column of ``obs`` with known domains, or None.
    words
        What is trained on and what is held out.
    """

    train: list[AnnData]
    test: AnnData
    truth: str | None
    words: str


def open_tissue(dataset: str, seed: int) -> Tissue:
    """Return training and held-out slides: another patient of the toy, or the other sections of a real one."""
    return _toy(seed) if dataset == "toy" else _real(dataset)


def _toy(seed: int) -> Tissue:
    from stfm import datasets

    adata = datasets.toy(**TOY, rng=seed)
    *seen, held_out = (_library(adata, name) for name in adata.obs[LIBRARY].cat.categories)
    words = f"Simulated tumour: trained on {len(seen)} patients, measured on another one (other stain, other batch)."
    return Tissue(seen, held_out, TRUTH, words)


def _library(adata: AnnData, name: str) -> AnnData:
    """Return one library as an object of its own, with its own image only."""
    part = adata[adata.obs[LIBRARY] == name].copy()
    part.obs[LIBRARY] = part.obs[LIBRARY].cat.remove_unused_categories()
    part.uns["spatial"] = {name: adata.uns["spatial"][name]}
    return part


def _real(dataset: str) -> Tissue:
    from stfm import datasets

    table = datasets.list_datasets()
    table = table[table["image"].astype(bool) & (table.index != "toy")]
    if dataset not in table.index:
        raise InputError(
            f"The demo has no data set {dataset!r}; there are toy and, with H&E, {', '.join(table.index)}."
        )
    others = _others(table, dataset)
    patients = dict(zip(table.index, table["patient"], strict=True))
    same = all(patients[name] == patients[dataset] for name in others)
    note = "sections of the same patient, so this tells nothing about other patients" if same else "another patient"
    title = dict(zip(table.index, table["title"], strict=True))[dataset]
    words = f"{title}: trained on {', '.join(others)}, measured on {dataset} ({note})."
    return Tissue([datasets.load(name) for name in others], datasets.load(dataset), None, words)


def _others(table: pd.DataFrame, dataset: str) -> list[str]:
    """Return the other sections of the same patient, or, where there are none, of the same study."""
    study = table[table.index.str.startswith(dataset.partition(":")[0] + ":") & (table.index != dataset)]
    same = study[study["patient"] == table.loc[dataset, "patient"]]
    return list((same if len(same) else study).index)
