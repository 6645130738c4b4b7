"""Genes and expression programmes of the toy tissue: well-known markers, programmes, housekeepers and fillers."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

#: cell type -> markers (general knowledge of the field, listed from memory)
MARKERS: dict[str, str] = {
    "tumor": "ERBB2 GRB7 KRT19 MUC1 CEACAM6 TFF1 TFF3 AGR2 CD24 S100P CRABP2 PGAP3 MIEN1 CLDN4 SCD FASN",
    "epithelium": "KRT5 KRT14 KRT17 LTF ELF5 KIT SLPI PIGR MMP7 KRT15 OXTR SCGB1D2 SCGB2A2 WFDC2 PROM1 AQP5",
    "fibroblast": "COL1A1 COL1A2 COL3A1 DCN LUM FBLN1 SFRP2 PDGFRA POSTN FAP CCDC80 CTHRC1 MMP2 SFRP4 C1S C1R",
    "endothelium": "PECAM1 VWF CDH5 CLDN5 PLVAP RAMP2 EMCN ENG EGFL7 ESAM TIE1 ACKR1",
    "smooth muscle": "ACTA2 TAGLN MYH11 CNN1 DES MYLK RGS5 NOTCH3 PDGFRB CSPG4 ACTG2 LMOD1",
    "T cell": "CD3D CD3E CD3G CD2 TRAC TRBC1 IL7R CD8A CD8B GZMK CCL5 CD4 LTB CCR7 CD27 ICOS",
    "B cell": "MS4A1 CD79A CD79B CD19 CD22 BANK1 TCL1A FCRL1 CXCR5 PAX5 CR2 VPREB3 FCER2 CD83",
    "plasma cell": "IGKC IGHG1 IGHA1 JCHAIN MZB1 XBP1 DERL3 TNFRSF17 SDC1 IGLC2 POU2AF1 SSR4",
    "macrophage": "CD68 CD163 CD14 C1QA C1QB C1QC AIF1 LYZ MRC1 MS4A7 FCGR3A TYROBP APOE SPP1 MARCO CSF1R",
    "adipocyte": "ADIPOQ PLIN1 PLIN4 FABP4 LPL LEP CIDEC CIDEA G0S2 GPD1 SAA1 AQP7 THRSP PNPLA2",
}

#: programme -> genes; they rise and fall over the tissue and cannot be seen in the image
PROGRAMMES: dict[str, str] = {
    "hypoxia": "CA9 VEGFA SLC2A1 LDHA PGK1 ENO1 ALDOA NDRG1 ADM BNIP3 ANKRD37 PDK1 P4HA1 EGLN3 HILPDA AK4 ERO1A KDM3A",
    "interferon": "IFIT1 IFIT2 IFIT3 ISG15 MX1 MX2 OAS1 OAS2 OAS3 IFI6 IFI44 IFI44L STAT1 RSAD2 IRF7 CXCL10",
    "stress": "FOS FOSB JUN JUNB EGR1 ATF3 DUSP1 IER2 HSPA1A HSPA1B DNAJB1 HSPB1 ZFP36 NR4A1 BTG2 KLF6",
    "cycle": "MKI67 TOP2A CDK1 CCNB1 CCNB2 BIRC5 UBE2C CENPF TYMS PCNA MCM2 MCM5 RRM2 AURKA TPX2 HMGB2",
}

_RIBOSOMAL = {
    "RPL": "3 4 5 6 7 7A 8 9 10 10A 11 12 13 13A 14 15 17 18 18A 19 21 22 23 24 26 27 28 29 30 31 32 34 35 36 37 38 39",
    "RPS": "2 3 3A 5 6 7 8 9 10 11 12 13 14 15 15A 16 17 18 19 20 21 23 24 25 26 27 27A 28 29",
}
_MITOCHONDRIAL = "MT-CO1 MT-CO2 MT-CO3 MT-ND1 MT-ND2 MT-ND3 MT-ND4 MT-ND4L MT-ND5 MT-CYB MT-ATP6 MT-ATP8"
_HOUSEKEEPING = (
    "ACTB GAPDH B2M EEF1A1 EEF2 TMSB4X TMSB10 FTL FTH1 UBC UBB PPIA TUBA1B TPT1 NACA FAU MALAT1 NEAT1 H3-3B H3-3A CFL1 "
    "PFN1 MYL6 MYL12B YWHAZ HSP90AB1 HSPA8 CALM1 CALM2 SERF2 OAZ1 TPI1 PKM EIF1 EIF4A1 HNRNPA1 NPM1 PTMA HLA-A HLA-B"
)
#: families of genes that are expressed about everywhere; in the order in which they fill a panel
_FILLERS = {
    "PSMA": "1 2 3 4 5 6 7", "PSMB": "1 2 3 4 5 6 7", "PSMC": "1 2 3 4 5 6", "PSMD": "1 2 3 4 6 7 8 11 12 13 14",
    "NDUFA": "1 2 3 4 5 6 8 9 10 11 12 13", "NDUFB": "1 2 3 4 5 6 7 8 9 10 11", "NDUFS": "1 2 3 4 5 6 7 8",
    "COX": "4I1 5A 5B 6A1 6B1 6C 7A2 7B 7C 8A", "UQCR": "B C1 C2 FS1 H Q", "ATP5F1": "A B C D E",
    "ATP5M": "C1 C2 C3 E G", "EIF3": "A B C D E F G H I K L M", "EIF4": "A2 A3 B E G1 G2 H",
    "HNRNP": "A2B1 A3 C D F H1 H3 K L M R U", "SNRP": "A A1 B B2 C D1 D2 D3 E F G N", "SRSF": "1 2 3 4 5 6 7 9 10 11",
    "POLR2": "A B C D E F G H I J K L", "CCT": "2 3 4 5 7 8", "ARPC": "1B 2 3 4 5", "CAP": "ZA1 ZA2 ZB NS1 N2",
    "RAB": "1A 1B 2A 5A 5B 5C 7A 8A 10 11A 14 18", "VPS": "4A 4B 11 16 18 25 28 29 35 36 41 45",
    "COP": "A B1 B2 E G1 S3 S5 S6 Z1", "SEC": "13 22B 23A 23B 24A 24C 31A 61B", "TMED": "1 2 3 4 5 7 9 10",
    "AP1": "B1 G1 M1 S1 S2", "AP2": "A1 B1 M1 S1", "ATP6V0": "B C D1 E1", "ATP6V1": "A D E1 F G1 H",
    "UBE2": "A B D2 D3 E1 E3 H I J1 K L3 M N R2 V1 V2", "USP": "1 3 4 5 7 8 9X 10 14 15 16 22 25 33 47 48",
    "MRPL": "1 2 3 4 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 "
    "24 27 28 30 32 33 34 35 36 37 38 40 41 42 43 44 45 46 47",
    "MRPS": "2 5 6 7 9 10 11 12 14 15 16 17 18A 18B 18C 21 22 23 24 25 26 27 28 30 31 33 34 35",
    "DDX": "1 3X 5 6 10 17 18 19A 21 23 24 27 39A 39B 41 42 46 47", "KIF": "1B 2A 3A 3B 5B 13B 16B",
    "ANAPC": "1 2 4 5 7 10 11 13 15 16", "SLC25A": "1 3 5 6 11 13 20 24 36 39",
    "TIMM": "8B 9 10 13 17A 17B 22 23 44 50", "TOMM": "5 6 7 20 22 34 40 70",
    "ZNF": "22 24 32 33A 34 37A 44 62 74 76 80 84 91 92 106 131 "
    "138 140 142 146 148 207 212 217 236 263 264 266 274 277 280 282",
    "TMEM": "9 14A 14B 14C 19 30A 33 41A 43 45A 50A 50B 59 60 62 "
    "63A 70 87A 97 106B 109 120A 123 126A 127 128 129 131 134 147 165",
    "MED": "1 4 6 7 8 10 11 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27 28 29 30 31",
    "NUP": "35 37 42 43 50 54 58 62 85 88 93 98 107 133 153 155 160 188 205 210 214",
    "GTF2": "A1 A2 B E1 E2 F1 F2 H1 H2 H3 H4 H5 I", "TAF": "1 2 3 4 5 6 7 8 9 10 11 12 13 15",
    "SNX": "1 2 3 4 5 6 7 9 11 12 13 14 15 17 18 19 27 29 33", "CHMP": "1A 1B 2A 2B 3 4A 4B 5 6 7",
    "EXOSC": "1 2 3 4 5 6 7 8 9 10", "SF3": "A1 A2 A3 B1 B2 B3 B4 B5 B6", "PRPF": "3 4 6 8 18 19 31 38A 38B 39 40A",
    "DNAJC": "1 2 3 5 7 8 9 10 11 13 14 15 16 17 19 21 24 25", "STX": "2 4 5 6 7 8 10 12 16 17 18",
    "LAMTOR": "1 2 3 4 5", "ARF": "1 3 4 5 6", "KPNA": "1 2 3 4 6", "POLR3": "A B C D E F GL H K",
    "PPP2R": "1A 1B 2A 2D 3C 5A 5B 5C 5D 5E", "PPP1R": "7 8 10 11 12A 13B 15B 21 37",
    "CDK": "5 7 8 9 10 11A 11B 12 13 16 17", "TRAPPC": "1 2 3 4 5 6A 6B 8 9 10 11 12", "EXOC": "1 2 3 4 5 6 7 8",
}  # fmt: skip


@dataclass(frozen=True)
class GenePlan:
    """Genes of a panel and what drives each.

    Attributes
    ----------
    names
        Human symbols.
    driver
        Cell type, programme, or ``"ribosomal"``, ``"mitochondrial"``, ``"housekeeping"``, ``"filler"``.
    profiles
        Expected share of every gene in the RNA of every cell type, float64 ``(n_types, n_genes)``; rows sum to 1.
    loadings
        log-change a unit of every programme, float64 ``(n_programmes, n_genes)``.
    """

    names: NDArray[np.str_]
    driver: NDArray[np.str_]
    profiles: NDArray[np.float64]
    loadings: NDArray[np.float64]


def _families(families: dict[str, str]) -> list[str]:
    return [stem + suffix for stem, suffixes in families.items() for suffix in suffixes.split()]


@cache
def all_genes() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Every gene and its driver: markers, programmes and housekeepers first, fillers last."""
    names: list[str] = []
    drivers: list[str] = []
    groups: list[tuple[str, list[str]]] = [(kind, genes.split()) for kind, genes in (MARKERS | PROGRAMMES).items()]
    groups += [
        ("ribosomal", _families(_RIBOSOMAL)),
        ("mitochondrial", _MITOCHONDRIAL.split()),
        ("housekeeping", _HOUSEKEEPING.split()),
        ("filler", _families(_FILLERS)),
    ]
    for kind, genes in groups:
        names += genes
        drivers += [kind] * len(genes)
    return tuple(names), tuple(drivers)


def minimum_genes() -> int:
    """Genes of a panel without fillers."""
    return sum(driver != "filler" for driver in all_genes()[1])


#: share of the RNA of a cell that each group of genes makes up; a cell type's own markers come on top
_SHARE = {"ribosomal": 0.42, "mitochondrial": 0.13, "housekeeping": 0.2, "filler": 0.17, "programme": 0.05}
_MARKER_SHARE = 0.085
#: markers that leak into other cell types, relative to their own
_LEAK = 0.03
_LOADING = {"hypoxia": 0.75, "interferon": 0.55, "stress": 0.55, "cycle": 0.5}


def plan_genes(n_genes: int) -> GenePlan:
    """Choose a panel and fix its programmes.

    The tissue is one and the same for every seed (sections and patients differ, biology does not), hence the fixed
    seed of the expression levels.
    """
    names, drivers = (np.array(part) for part in all_genes())
    names, drivers = names[:n_genes], drivers[:n_genes]
    rng = np.random.default_rng(20_26)
    level = rng.lognormal(0.0, 0.8, len(names))
    types = list(MARKERS)
    profiles = np.zeros((len(types), len(names)))
    group = np.where(np.isin(drivers, list(PROGRAMMES)), "programme", drivers)
    for name, share in _SHARE.items():
        inside = group == name
        if inside.any():
            profiles[:, inside] = share * level[inside] / level[inside].sum()
    for row, name in enumerate(types):
        own = drivers == name
        amount = _MARKER_SHARE * level[own] / level[own].sum()
        profiles[:, own] += _LEAK * amount
        profiles[row, own] = amount
    # cell types differ a little in everything, as they do
    profiles *= rng.lognormal(0.0, 0.12, profiles.shape)
    profiles /= profiles.sum(axis=1, keepdims=True)
    loadings = np.zeros((len(PROGRAMMES), len(names)))
    for row, name in enumerate(PROGRAMMES):
        inside = drivers == name
        loadings[row, inside] = _LOADING[name] * rng.uniform(0.6, 1.4, int(inside.sum()))
    return GenePlan(names, drivers, profiles, loadings)
