"""Gene tables of published encoders: every format, wrong files, the real ones."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from stfm._errors import DataIntegrityError
from stfm.encoders import build_encoder
from stfm.encoders.gene._tables import read_table, rows_of
from stfm.slide.genes import Vocabulary


def test_gene_tables_of_every_format(tmp_path: Path):
    (tmp_path / "a.tsv").write_text("gene_name\tindex\nA\t0\nB\t1\n")
    (tmp_path / "b.csv").write_text("id,symbol\n5,A\n6,B\n")
    (tmp_path / "c.json").write_text(json.dumps({"var_names": ["a", "b"]}))
    (tmp_path / "d.json").write_text(json.dumps({"A": 4, "a": 2}))
    assert read_table(tmp_path / "a.tsv") == read_table(tmp_path / "b.csv") == {"A": 0, "B": 1}
    assert read_table(tmp_path / "c.json") == {"a": 0, "b": 1}
    table, genes = read_table(tmp_path / "d.json"), Vocabulary(np.array(["a", "Q"]))
    assert rows_of(genes, table, source="d", n_rows=5, option="n") == [4, -1]
    assert rows_of(genes, table, source="d", n_rows=5, option="n", lower=True) == [2, -1]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", "not json", "is no JSON file"),
        ("a.json", "[1, 2]", "must hold a mapping"),
        ("a.json", '{"A": "first"}', "no table of gene symbols"),
        ("a.tsv", "x\ty\n1\t2\n", "has no column gene_name"),
        ("a.tsv", "gene\nA\nA\n", "names 1 genes twice"),
    ],
)
def test_files_that_are_no_gene_table(tmp_path: Path, name: str, text: str, message: str):
    (tmp_path / name).write_text(text)
    with pytest.raises(DataIntegrityError, match=message):
        read_table(tmp_path / name)


def test_real_gene_tables_meet_a_real_panel():
    folder = Path(__file__).resolve().parents[3] / "shared" / "weights" / "genes"
    if not folder.is_dir():
        pytest.skip("the gene tables of ../shared/weights are not here")
    genes = Vocabulary(np.array(["ERBB2", "CD74", "IGKC", "KRT8", "not-a-gene"]))
    index = read_table(folder / "OS_scRNA_gene_index.19264.tsv")
    assert len(index) == 19264
    encoder = build_encoder(
        "scfoundation",
        n_genes=5,
        options={"genes": str(folder / "OS_scRNA_gene_index.19264.tsv"), "width": 16, "depth": 1, "heads": 4},
    ).bind(genes)
    assert encoder.backbone.positions.tolist() == [index.get(n, -1) for n in genes.names]
    vocab = read_table(folder / "scgpt_gene_vocab.json")
    encoder = build_encoder(
        "scgpt",
        n_genes=5,
        options={"vocab": str(folder / "scgpt_gene_vocab.json"), "n_ids": 48295, "width": 16, "depth": 1, "heads": 4},
    ).bind(genes)
    assert encoder.backbone.gene_ids[:2].tolist() == [vocab["ERBB2"], vocab["CD74"]]
    assert encoder.backbone.special_ids.tolist() == [48292, 48293]
