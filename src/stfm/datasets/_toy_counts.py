"""Counts of the toy tissue: cells under every spot, their programmes, the batch, and the noise of capture."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.spatial import cKDTree

from stfm.datasets._toy_genes import PROGRAMMES, GenePlan
from stfm.datasets._toy_tissue import ADIPOSE, CELL_TYPES, DOMAINS, HYPOXIC, LYMPHOID, TUMOR, Cells, Tissue, mixture

#: RNA of a cell, relative to a fibroblast
_RNA = {
    "tumor": 1.7, "epithelium": 1.3, "fibroblast": 1.0, "endothelium": 0.8, "smooth muscle": 0.9, "T cell": 0.45,
    "B cell": 0.5, "plasma cell": 1.1, "macrophage": 1.1, "adipocyte": 0.9,
}  # fmt: skip
RNA = np.array([_RNA[name] for name in CELL_TYPES])
#: share of the molecules that come from anywhere in the section
_AMBIENT = 0.12
#: negative binomial size of a gene: variance = mean + mean² / size
_SIZE = 4.0
_BLOCK = 2048


@dataclass(frozen=True)
class Batch:
    """What is special about a patient or section: log-change a gene, factor on the depth."""

    log_change: NDArray[np.float64]
    depth: float


def make_batch(rng: np.random.Generator, n_genes: int, effect: float) -> Batch:
    """Draw a batch; ``effect`` 1 gives changes of 0.25 (natural log) and depths within about 20 %."""
    return Batch(rng.normal(0.0, 0.25 * effect, n_genes), float(np.exp(rng.normal(0.0, 0.18 * effect))))


def surroundings(domain: NDArray[np.int8]) -> NDArray[np.float64]:
    """Cell types of what lies between the nuclei of a spot (cytoplasm, cells cut above or below), ``(n, types)``."""
    names = {TUMOR: "nest", HYPOXIC: "nest", LYMPHOID: "lymphoid", ADIPOSE: "adipose"}
    table = np.array([mixture(names.get(code, "stroma")) for code in range(len(DOMAINS))])
    return table[np.clip(domain, 0, None)]


def cells_under(
    cells: Cells, yx_um: NDArray[np.float64], radius_um: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Cell content of every spot: summed size by type, and number of cells by type; both ``(n, n_types)``."""
    content = np.zeros((len(yx_um), len(CELL_TYPES)))
    number = np.zeros_like(content)
    if len(cells.kind):
        inside = cKDTree(yx_um).sparse_distance_matrix(cKDTree(cells.yx_um), radius_um, output_type="coo_matrix")
        kind = cells.kind[inside.col]
        np.add.at(content, (inside.row, kind), cells.size[inside.col])
        np.add.at(number, (inside.row, kind), 1.0)
    return content, number


def draw_counts(
    rng: np.random.Generator,
    content: NDArray[np.float64],
    programmes: NDArray[np.float64],
    plan: GenePlan,
    batches: list[Batch],
    depth: float,
) -> sparse.csr_matrix:
    """Draw counts, float32 CSR ``(n, n_genes)``.

    Parameters
    ----------
    content
        RNA-weighted amount of every cell type under every spot.
    programmes
        Level of every programme at every spot.
    plan
        Panel with profiles and loadings.
    batches
        Patient and section.
    depth
        Mean total counts a spot.
    """
    change = sum((batch.log_change for batch in batches), np.zeros(len(plan.names)))
    profiles = plan.profiles * np.exp(change)
    ambient = content.mean(axis=0) @ profiles
    ambient /= ambient.sum()
    amount = content.sum(axis=1) ** 0.8  # capture saturates
    amount *= rng.lognormal(0.0, 0.22, len(amount))
    scale = depth * float(np.prod([batch.depth for batch in batches])) / max(float(amount.mean()), 1e-9)
    parts = []
    for start in range(0, len(content), _BLOCK):
        rows = slice(start, start + _BLOCK)
        expected = content[rows] @ profiles
        expected *= np.exp(programmes[rows] @ plan.loadings)
        expected /= np.maximum(expected.sum(axis=1, keepdims=True), 1e-12)
        expected = (1 - _AMBIENT) * expected + _AMBIENT * ambient
        expected *= (amount[rows] * scale)[:, None]
        expected *= rng.gamma(_SIZE, 1.0 / _SIZE, expected.shape)
        parts.append(sparse.csr_matrix(rng.poisson(expected).astype(np.float32)))
    return sparse.csr_matrix(sparse.vstack(parts))


def programme_levels(tissue: Tissue, yx_um: NDArray[np.float64]) -> NDArray[np.float64]:
    """Level of every programme at positions, ``(n, n_programmes)``."""
    return np.stack([tissue.at(tissue.maps[name], yx_um) for name in PROGRAMMES], axis=1).astype(np.float64)
