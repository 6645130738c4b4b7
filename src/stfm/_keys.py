"""Every slot name of stfm, written once (docs/slots.md shows the same table)."""

from __future__ import annotations

from typing import Final

SPATIAL: Final = "spatial"
NICHE: Final = "niche"
EMBEDDING: Final = "X_stfm"
PARTS: Final = ("image", "gene", "niche")
DOMAIN: Final = "spatial_domain"
PREDICTED: Final = "predicted_expression"
IMPUTED: Final = "imputed"
ATTRIBUTION: Final = "attribution"
UNS: Final = "stfm"
TILES: Final = "tiles"

#: obs columns that say where a spot comes from, in the order in which they are looked for.
LIBRARY_COLUMNS: Final = ("library_id", "library", "section", "sample")
#: name of the library of an object that names none
UNNAMED: Final = "slide"
PATIENT: Final = "patient"
STUDY: Final = "study"


def niche_keys(key_added: str = NICHE) -> tuple[str, str]:
    """Return the ``obsp`` names of a niche table: connectivities, distances."""
    return f"{key_added}_connectivities", f"{key_added}_distances"


def deviation_key(expression_key: str) -> str:
    """Return the ``obsm`` name of the deviations of predicted expression."""
    return f"{expression_key}_sd"


def part_key(embedding_key: str, part: str) -> str:
    """Return the ``obsm`` name of one part (image, gene, niche) of an embedding."""
    return f"{embedding_key}_{part}"
