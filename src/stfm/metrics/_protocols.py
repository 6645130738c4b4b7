"""Every protocol by name: which sections train, which test, which genes, which target.

One data set has many incompatible protocols (her2st alone has five in the literature), so a number without its
protocol's id is no number. ``protocols()`` is the table; a benchmark or a paper quotes the id.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from scipy import sparse

from stfm._errors import InputError
from stfm._registry import Registry
from stfm._validate import check_choice, check_count, check_range
from stfm.slide.normalise import log_normalise

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True)
class Fold:
    """Sections that train and sections that are tested; under a spot-wise protocol the same section is both."""

    train: tuple[str, ...]
    test: tuple[str, ...]


@dataclass(frozen=True)
class Protocol:
    """How a number is made.

    Attributes
    ----------
    name
        The id that is quoted beside the number.
    task
        ``"expression"`` (from H&E) or ``"domains"``.
    dataset
        Data set as :mod:`stfm.datasets` calls it.
    folds
        Training and test sections; the score is the mean over the test sections.
    unit
        What is held out: ``"spot"``, ``"section"``, ``"animal"`` or ``"patient"``. Only the last two say something
        about another individual.
    genes
        Gene set, chosen on the training sections: ``"hvg250"``, ``"hvg50"``, ``"hmg250"`` or ``"none"``.
    target
        What is predicted or found.
    score
        The score, with its scope and its rule for constants.
    contexts_um
        Sides of the tiles of the base row, in µm.
    test_fraction
        Share of held-out spots of a spot-wise protocol, else 0.
    ceiling
        Noise ceiling of the target, where measured; NaN where not.
    note
        What a reader of the number must know.
    """

    name: str
    task: Literal["expression", "domains"]
    dataset: str
    folds: tuple[Fold, ...]
    unit: Literal["spot", "section", "animal", "patient"]
    genes: str = "hvg250"
    target: str = "log1p(1e4 * c / sum c), unsmoothed"
    score: str = "Pearson r per gene inside the test section, constant = 0, mean over genes, then sections"
    contexts_um: tuple[float, ...] = (112.0, 224.0, 448.0)
    test_fraction: float = 0.0
    ceiling: float = float("nan")
    note: str = ""

    @property
    def sections(self) -> tuple[str, ...]:
        """All sections that the protocol reads, in order."""
        return tuple(dict.fromkeys(name for fold in self.folds for name in (*fold.train, *fold.test)))


#: gene set -> number of genes, and what they are ranked by
GENE_SETS: dict[str, tuple[int, Literal["variance", "mean"]]] = {
    "hvg250": (250, "variance"),
    "hvg50": (50, "variance"),
    "hmg250": (250, "mean"),
}


def _leave_one_out(*sections: str) -> tuple[Fold, ...]:
    return tuple(Fold(tuple(s for s in sections if s != held), (held,)) for held in sections)


def _register(registry: Registry[Protocol]) -> None:
    her2st, mob, dlpfc = ("C2", "C3", "C4", "C5"), ("1", "2", "3"), ("151673", "151674", "151675")
    cortex = (448.0, 1120.0)
    for protocol in (
        Protocol("her2st-C-loso", "expression", "her2st", _leave_one_out(*her2st), "section", ceiling=0.690,
                 note="consecutive sections of one tumour: says nothing about other patients"),
        Protocol("her2st-C-to-B4", "expression", "her2st", (Fold(her2st, ("B4",)),), "patient", ceiling=0.609,
                 note="another patient"),
        Protocol("mob-loso", "expression", "mob", _leave_one_out(*mob), "section", ceiling=0.659,
                 note="sections 1 and 2 are one animal; the 1000 genes were preselected by the authors"),
        Protocol("mob-animal1-to-2", "expression", "mob", (Fold(("1", "2"), ("3",)),), "animal", ceiling=0.644,
                 note="another animal; the 1000 genes were preselected by the authors"),
        Protocol("mob-animal2-to-1", "expression", "mob", (Fold(("3",), ("1", "2")),), "animal", ceiling=0.650,
                 note="another animal, one training section"),
        Protocol("dlpfc-loso", "expression", "dlpfc", _leave_one_out(*dlpfc), "section", contexts_um=cortex,
                 ceiling=0.516,
                 note="one donor, low-resolution H&E; coordinates alone are strong, so that row stands beside it"),
        Protocol("spots-80-20", "expression", "any", (), "spot", test_fraction=0.2,
                 note="the ST-Align paper's own: random spots of the same slide, whose neighbours train; it leaks"),
        Protocol("dlpfc-domains", "domains", "dlpfc", tuple(Fold((), (s,)) for s in dlpfc), "section", genes="none",
                 target="layers L1-L6 and WM (7 domains)", contexts_um=cortex,
                 score="ARI over labelled spots (unlabelled ones take part in clustering); median over sections, "
                       "mean over five seeds", note="one donor; no layer is used to choose anything"),
    ):  # fmt: skip
        registry.register(protocol.name, protocol)


PROTOCOLS: Registry[Protocol] = Registry("protocol", entry_points_group="stfm.protocols")
_register(PROTOCOLS)


def get_protocol(name: str) -> Protocol:
    """Return a protocol by its id.

    Parameters
    ----------
    name
        Id, as :func:`protocols` lists it.

    Returns
    -------
    The protocol, with its folds, gene set, target and score.

    Raises
    ------
    MissingKeyError
        There is no protocol of that name; the nearest ones are named.

    Examples
    --------
    >>> from stfm import metrics
    >>> metrics.get_protocol("dlpfc-domains").task
    'domains'
    """
    return PROTOCOLS.get(name)


def protocols() -> pd.DataFrame:
    """List the protocols.

    Returns
    -------
    DataFrame with a row an id and a column a field of :class:`Protocol`.

    Examples
    --------
    >>> from stfm import metrics
    >>> "dlpfc-domains" in metrics.protocols().index
    True
    """
    return PROTOCOLS.frame()


def select_genes(
    counts: Sequence[Any],
    n_genes: int | str = "hvg250",
    *,
    totals: Sequence[ArrayLike] | None = None,
    by: Literal["variance", "mean"] = "variance",
    min_detected: float = 0.1,
    target_sum: float = 1e4,
) -> NDArray[np.int64]:
    """Choose the genes of a protocol on its training sections.

    Parameters
    ----------
    counts
        Raw counts of the TRAINING sections ``(n_i, g)``, dense or sparse, all with the same columns.
    n_genes
        Number of genes, or the name of a gene set: ``"hvg250"``, ``"hvg50"`` (highest variance), ``"hmg250"``
        (highest mean).
    totals
        Counts of every spot over all genes that its section measured; the row sums of ``counts`` by default. Give
        them where the columns are a common subset.
    by
        ``"variance"`` or ``"mean"`` of ``log1p(target_sum * c / total)`` over all training spots; ignored where
        ``n_genes`` names a set.
    min_detected
        Share of the training spots that must hold more than zero counts (exclusive).
    target_sum
        Counts that a spot is scaled to.

    Returns
    -------
    Columns in falling order, int64 ``(n,)``; fewer than asked for where fewer genes are detected often enough.

    Raises
    ------
    InputError
        No section, columns that differ, or no gene that is detected often enough.

    Examples
    --------
    >>> import stfm as sf
    >>> adata = sf.datasets.toy(n_spots=60, image=False)
    >>> columns = sf.metrics.select_genes([adata.X], "hvg50")
    >>> adata.var_names[columns[:2]].tolist()
    ['AGR2', 'SCD']
    """
    if isinstance(n_genes, str):
        n_genes, by = GENE_SETS[check_choice("n_genes", n_genes, GENE_SETS)]
    check_count("n_genes", n_genes)
    check_choice("by", by, ("variance", "mean"))
    check_range("min_detected", min_detected, 0.0, 1.0)
    if not len(counts) or len({table.shape[1] for table in counts}) != 1:
        msg = f"counts must be training sections with the same genes, got shapes {[t.shape for t in counts]}."
        raise InputError(msg)
    n_obs = sum(table.shape[0] for table in counts)
    detected, first, second = (np.zeros(counts[0].shape[1]) for _ in range(3))
    for i, table in enumerate(counts):
        rows = sparse.csr_matrix(table)
        total = np.asarray(rows.sum(axis=1)).ravel() if totals is None else np.asarray(totals[i])
        values = sparse.csr_matrix(log_normalise(rows, total, target_sum=target_sum)).astype(np.float64)
        detected += np.asarray((values > 0).sum(axis=0)).ravel()
        first += np.asarray(values.sum(axis=0)).ravel()
        second += np.asarray(values.multiply(values).sum(axis=0)).ravel()
    mean = first / n_obs
    rank = mean if by == "mean" else second / n_obs - mean**2
    often = detected > min_detected * n_obs
    if not often.any():
        msg = f"no gene is detected in more than {min_detected:.0%} of the {n_obs} training spots; lower min_detected."
        raise InputError(msg)
    order = np.argsort(-np.where(often, rank, -np.inf), kind="stable")
    return order[: min(n_genes, int(often.sum()))].astype(np.int64)
