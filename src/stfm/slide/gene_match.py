"""How the genes of a slide are matched to those of a model.

By Ensembl id first (version stripped) and by symbol second (case-insensitive); a mouse panel meets a human vocabulary
by the id of the orthologue where the vocabulary has it, else by its symbol, that is the upper-cased one, and the report
says so.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy import sparse

from stfm._errors import InputError, StfmWarning
from stfm.slide.genes import first_places

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from stfm.slide.genes import Panel, Vocabulary

__all__ = ["GeneMatch", "match_genes"]


@dataclass(frozen=True)
class GeneMatch:
    """Which column of a slide's counts is which gene of a vocabulary.

    Attributes
    ----------
    source_index, target_index
        Columns of the counts and positions in the vocabulary, paired; int64, sorted by position.
    n_matched, n_panel, n_vocabulary
        Numbers of genes.
    fraction
        ``n_matched / min(n_panel, n_vocabulary)``: a 300-gene panel inside a vocabulary of 18,000 is a full match.
    via
        ``"ensembl id"``, ``"orthologue's ensembl id"``, ``"symbol"``, or several of these.
    species_note
        Said where panel and vocabulary are of two species, else ``None``.
    unmatched
        A few genes of the panel that have no place in the vocabulary.
    """

    source_index: NDArray[np.int64]
    target_index: NDArray[np.int64]
    n_matched: int
    n_panel: int
    n_vocabulary: int
    fraction: float
    via: str
    species_note: str | None
    unmatched: tuple[str, ...]

    @property
    def mask(self) -> NDArray[np.bool_]:
        """Bool ``(n_vocabulary,)``: the genes that the slide measured."""
        measured = np.zeros(self.n_vocabulary, dtype=bool)
        measured[self.target_index] = True
        return measured

    @property
    def report(self) -> str:
        """One line for a person: how many matched, by what, and what did not."""
        line = (
            f"{self.n_matched:,} of {self.n_vocabulary:,} vocabulary genes measured "
            f"({self.n_panel:,} in the panel; matched by {self.via})"
        )
        if self.species_note:
            line += f"; {self.species_note}"
        if self.unmatched:
            line += f"; not in the vocabulary: {', '.join(self.unmatched)}"
        return line

    def take(self, counts: sparse.csr_matrix | sparse.csr_array) -> sparse.csr_matrix:
        """Columns of CSR counts in the order of the vocabulary, absent genes empty: CSR ``(n, n_vocabulary)``."""
        target = np.full(counts.shape[1], -1, dtype=np.int64)
        target[self.source_index] = self.target_index
        columns = target[counts.indices]
        keep = columns >= 0
        row_of = np.repeat(np.arange(counts.shape[0]), np.diff(counts.indptr))[keep]
        indptr = np.concatenate([[0], np.cumsum(np.bincount(row_of, minlength=counts.shape[0]))])
        taken = sparse.csr_matrix(
            (counts.data[keep], columns[keep], indptr), shape=(counts.shape[0], self.n_vocabulary)
        )
        taken.sort_indices()
        return taken


def match_genes(
    panel: Panel, vocabulary: Vocabulary, *, min_fraction: float = 0.2, can_lower: bool = False
) -> GeneMatch:
    """Match the genes of a slide to those of a model.

    Parameters
    ----------
    panel
        Genes of the slide. Of a gene that is listed twice the first column counts.
    vocabulary
        Genes of the model.
    min_fraction
        Smallest acceptable share of ``min(n_panel, n_vocabulary)``.
    can_lower
        Whether the message may advise to lower ``min_fraction``: only where whoever reads it can give it.

    Raises
    ------
    InputError
        Less than ``min_fraction`` matched; the message shows genes of either side. The panel has no genes.

    Warns
    -----
    StfmWarning
        Several columns name one gene; the message says how many are left out.
    """
    if len(panel) == 0:
        raise InputError("the data have no genes to match (n_vars is 0); give an object with counts.")
    if not 0 <= min_fraction <= 1:
        raise InputError(f"min_fraction must lie between 0 and 1, not {min_fraction}")
    known = vocabulary.panel
    taken = np.full(len(vocabulary), -1, dtype=np.int64)  # column of the counts for every vocabulary gene
    used = np.zeros(len(panel), dtype=bool)
    routes = []
    doubled: dict[int, None] = {}  # columns whose gene an earlier one stands for
    for route, sources, targets in (
        ("ensembl id", panel.id_keys, known.id_keys),
        ("orthologue's ensembl id", panel.id_keys, vocabulary.orthologue_keys),
        ("symbol", panel.symbol_keys, known.symbol_keys),
    ):
        position = first_places(targets)
        before = int(used.sum())
        for column, key in enumerate(sources):
            place = position.get(key, -1) if key else -1
            if place >= 0 and taken[place] < 0 and not used[column]:
                taken[place], used[column] = column, True
            elif place >= 0 and not used[column]:
                doubled[column] = None
        if used.sum() > before:
            routes.append(route)
    _tell_doubled(panel, [column for column in doubled if not used[column]])
    target_index = np.flatnonzero(taken >= 0)
    smaller = min(len(panel), len(vocabulary))
    note = None
    if panel.species and vocabulary.species and panel.species != vocabulary.species:
        how = "Ensembl id" if "orthologue's ensembl id" in routes else "upper-cased symbol"
        note = f"{panel.species} genes taken as {vocabulary.species} orthologues by {how}"
    match = GeneMatch(
        source_index=taken[target_index],
        target_index=target_index.astype(np.int64),
        n_matched=len(target_index),
        n_panel=len(panel),
        n_vocabulary=len(vocabulary),
        fraction=len(target_index) / smaller if smaller else 0.0,
        via=" and ".join(routes) or "nothing",
        species_note=note,
        unmatched=tuple(str(name) for name in panel.names[~used][:5]),
    )
    if match.n_matched == 0 or match.fraction < min_fraction:
        raise InputError(_mismatch(match, panel, vocabulary, min_fraction if can_lower else None))
    return match


def _tell_doubled(panel: Panel, columns: list[int]) -> None:
    """Warn of columns that are left out because an earlier one has their gene."""
    if columns:
        name = panel.names[min(columns)] if panel.symbols is None else panel.symbols[min(columns)]
        msg = (
            f"{len(columns)} of {len(panel):,} genes are listed twice or more ({str(name)!r} first); of each the first "
            "column counts, the others are left out. Add their counts up beforehand if they should not be lost."
        )
        warnings.warn(msg, StfmWarning, stacklevel=3)


def _mismatch(match: GeneMatch, panel: Panel, vocabulary: Vocabulary, min_fraction: float | None) -> str:
    advice = "put the symbols or Ensembl ids that both have into adata.var_names, or a column gene_symbols or gene_ids"
    ids_only = not any(panel.symbol_keys) or not any(vocabulary.panel.symbol_keys)
    if match.species_note and ids_only and not any(vocabulary.orthologue_keys):
        advice = f"a {panel.species} panel meets a {vocabulary.species} vocabulary by symbol only: {advice}"
    elif ids_only and not (any(panel.id_keys) and any(vocabulary.panel.id_keys)):
        advice = f"one has Ensembl ids only, the other symbols only: {advice}"
    elif match.n_matched and min_fraction is not None:
        advice += f", or lower min_fraction (now {min_fraction})"
    return (
        f"only {match.n_matched} of {min(match.n_panel, match.n_vocabulary):,} genes match the vocabulary; the data "
        f"have {', '.join(match.unmatched) or 'no genes'}, the vocabulary {', '.join(vocabulary.names[:5])}; {advice}"
    )
