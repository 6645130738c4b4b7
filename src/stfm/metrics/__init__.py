"""Scores, splits and protocols: every number says how it was made."""

from __future__ import annotations

from stfm import _lazy

__getattr__, __dir__, __all__ = _lazy.attach(
    __name__,
    {
        "Fold": "_protocols",
        "Protocol": "_protocols",
        "Split": "splits",
        "ami": "domains",
        "ari": "domains",
        "chaos": "domains",
        "check_leakage": "splits",
        "completeness": "domains",
        "coverage": "calibration",
        "domain_scores": "domains",
        "expression_scores": "expression",
        "fmi": "domains",
        "gene_mse": "expression",
        "gene_pearson": "expression",
        "get_protocol": "_protocols",
        "homogeneity": "domains",
        "k_fold": "splits",
        "leave_one_group_out": "splits",
        "nmi": "domains",
        "noise_ceiling": "expression",
        "pas": "domains",
        "protocols": "_protocols",
        "select_genes": "_protocols",
        "spots_within_slides": "splits",
        "thin": "expression",
    },
)
