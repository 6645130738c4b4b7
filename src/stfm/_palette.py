"""Colours of categories: told apart by colour-blind readers, and on pink tissue."""

from __future__ import annotations

from typing import Final

#: Okabe and Ito's colours without black, then Tol's muted scheme, then darker and lighter ones of other hues.
CATEGORIES: Final = (
    "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442",
    "#332288", "#117733", "#882255", "#44AA99", "#999933", "#AA4499", "#661100",
    "#6699CC", "#AA4466", "#4B4B4B", "#B8DE6F", "#7F3C8D", "#A5AA99",
)  # fmt: skip
#: spots without a category
MISSING: Final = "#D9D9D9"


def category_colors(n: int) -> list[str]:
    """Return ``n`` colours; beyond twenty they repeat."""
    return [CATEGORIES[i % len(CATEGORIES)] for i in range(n)]
