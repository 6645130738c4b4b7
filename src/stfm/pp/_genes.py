"""How the genes of a data set meet those of a model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from stfm._errors import WrongTypeError
from stfm._logging import get_logger
from stfm._validate import check_choice
from stfm.slide.gene_match import GeneMatch
from stfm.slide.gene_match import match_genes as match_panel
from stfm.slide.genes import Panel, Vocabulary

if TYPE_CHECKING:
    from anndata import AnnData

logger = get_logger(__name__)


def match_genes(
    adata: AnnData,
    vocabulary: Vocabulary | Sequence[str] | str | Path | Any,
    *,
    var_key: str | None = None,
    species: Literal["human", "mouse"] | None = None,
    min_fraction: float = 0.2,
) -> GeneMatch:
    """Match the genes of an object to those of a model, and report how many there are.

    By Ensembl id first (version stripped), then by symbol (case-insensitive). A mouse panel meets a human vocabulary by
    orthologue symbol, and the report says so. The object is not changed.

    Parameters
    ----------
    adata
        Object whose ``var`` names the genes.
    vocabulary
        A model, its vocabulary, a list of genes, or the path of a ``genes.txt``.
    var_key
        Column of ``var`` with symbols or Ensembl ids; by default ``var_names`` and the usual columns are looked at.
    species
        Species of ``adata``, where it should not be told from the names.
    min_fraction
        Smallest acceptable share of the genes of the smaller side.

    Returns
    -------
    The match; its ``report`` is one line for a person, ``source_index`` (columns of ``adata``) and ``target_index``
    (positions in the vocabulary) are int64 ``(n_matched,)``, ``mask`` is bool ``(n_vocabulary,)``.

    Raises
    ------
    InputError
        Less than ``min_fraction`` matched; the message shows genes of either side.
    MissingKeyError
        ``var_key`` is no column.

    Examples
    --------
    >>> import stfm as sf
    >>> adata = sf.datasets.toy(n_spots=20, image=False)
    >>> sf.pp.match_genes(adata, ["epcam", "ERBB2", "CD3E", "COL1A1"]).n_matched
    3
    """
    if species is not None:
        check_choice("species", species, ("human", "mouse"))
    if not hasattr(adata, "var"):
        raise WrongTypeError(f"adata must be AnnData, got {type(adata).__name__}.")
    panel = Panel.from_var(adata.var, var_key=var_key, species=species)
    match = match_panel(panel, _vocabulary(vocabulary), min_fraction=min_fraction, can_lower=True)
    logger.info(match.report)
    return match


def _vocabulary(value: Any) -> Vocabulary:
    """Return the vocabulary of a model, a file, or a list of genes."""
    value = getattr(value, "vocabulary", value)
    if isinstance(value, Vocabulary):
        return value
    if isinstance(value, (str, Path)):
        return Vocabulary.load(value)
    if value is None:
        raise WrongTypeError("the model has no vocabulary; it reads no genes, or was never trained")
    if isinstance(value, Sequence) or hasattr(value, "tolist"):
        return Vocabulary(np.array([str(name) for name in value], dtype=np.str_))
    raise WrongTypeError(f"vocabulary must be a model, a Vocabulary, genes or a path, got {type(value).__name__}.")
