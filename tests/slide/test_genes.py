"""Panels, vocabularies, matching, the count check and normalisation."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import sparse

from stfm.errors import InputError, MissingKeyError, StfmWarning
from stfm.slide.gene_match import match_genes
from stfm.slide.genes import Panel, Vocabulary, detect_species
from stfm.slide.normalise import check_counts, log_normalise

HUMAN = ["EPCAM", "COL1A1", "CD3E", "C1orf112", "MT-CO1", "ACTB"]
MOUSE = ["Epcam", "Col1a1", "Cd3e", "0610007N19Rik", "mt-Co1", "Actb"]
HUMAN_IDS = [f"ENSG0000000000{i}" for i in range(6)]


def test_species_is_told_from_names():
    assert detect_species(HUMAN) == "human"
    assert detect_species(MOUSE) == "mouse"
    assert detect_species(["ENSG00000000001.4", "ENSG00000000002"]) == "human"
    assert detect_species(["ENSMUSG00000064339.1"]) == "mouse"
    assert detect_species(["ENSDARG00000064339"]) is None
    assert detect_species(HUMAN + MOUSE) is None
    assert detect_species([]) is None
    assert detect_species(["GRCh38_EPCAM", "GRCh38_ACTB"]) == "human"


def test_match_by_symbol_ignores_case_and_pairs_the_right_columns():
    match = match_genes(Panel(HUMAN), Vocabulary(["actb", "KRT8", "epcam", "C1ORF112"], species="human"))
    assert match.source_index.tolist() == [5, 0, 3]
    assert match.target_index.tolist() == [0, 2, 3]
    assert (match.n_matched, match.n_vocabulary, match.via, match.species_note) == (3, 4, "symbol", None)
    assert match.fraction == 0.75
    assert match.mask.tolist() == [True, False, True, True]
    assert "3 of 4" in match.report


def test_match_by_ensembl_id_strips_versions():
    panel = Panel([f"{name}.7" for name in HUMAN_IDS])
    match = match_genes(panel, Vocabulary(HUMAN, HUMAN_IDS[::-1]))
    assert match.via == "ensembl id"
    assert match.source_index.tolist() == [5, 4, 3, 2, 1, 0]


def test_ids_go_first_and_symbols_fill_in():
    panel = Panel(["SEPT9", "ACTB"], ["ENSG00000184640", ""])
    vocabulary = Vocabulary(["SEPTIN9", "ACTB"], ["ENSG00000184640", "ENSG00000075624"])
    match = match_genes(panel, vocabulary)
    assert match.n_matched == 2
    assert match.via == "ensembl id and symbol"


def test_mouse_panel_meets_human_vocabulary_by_symbol_and_says_so():
    match = match_genes(Panel(MOUSE), Vocabulary(HUMAN))
    assert match.n_matched == 5
    assert "mouse genes taken as human orthologues" in match.report


def test_mouse_ids_without_symbols_cannot_meet_a_human_vocabulary():
    panel = Panel([f"ENSMUSG0000006433{i}.1" for i in range(5)])
    with pytest.raises(InputError, match=r"by symbol only.*var_names"):
        match_genes(panel, Vocabulary(HUMAN))


def test_ids_and_symbols_alone_cannot_meet():
    with pytest.raises(InputError, match=r"one has Ensembl ids only, the other symbols only: .*var_names"):
        match_genes(Panel(HUMAN_IDS), Vocabulary(HUMAN))


def test_too_few_matches_name_examples():
    with pytest.raises(InputError, match=r"only 0 of 2 genes match.*FOO1, BAR2.*EPCAM.*var_names"):
        match_genes(Panel(["FOO1", "BAR2"]), Vocabulary(HUMAN))
    panel = Panel(["EPCAM", *[f"XX{i}" for i in range(9)]])
    vocabulary = Vocabulary(["EPCAM", *[f"YY{i}" for i in range(9)]])
    with pytest.raises(InputError, match=r"lower min_fraction"):
        match_genes(panel, vocabulary, can_lower=True)
    with pytest.raises(InputError, match=r"only 1 of 10 genes match((?!min_fraction).)*$"):
        match_genes(panel, vocabulary)
    assert match_genes(panel, vocabulary, min_fraction=0.1).n_matched == 1
    with pytest.raises(InputError, match="between 0 and 1"):
        match_genes(panel, vocabulary, min_fraction=2)


def test_small_panel_in_large_vocabulary_is_a_full_match():
    vocabulary = Vocabulary([f"GENE{i}" for i in range(5000)])
    assert match_genes(Panel(["GENE7", "GENE4000"]), vocabulary).fraction == 1.0


def test_genes_listed_twice_count_once():
    vocabulary = Vocabulary(["EPCAM", "ACTB"])
    with pytest.warns(StfmWarning, match=r"2 of 5 genes are listed twice or more \('Actb' first\)") as told:
        match = match_genes(Panel(["ACTB", "Actb", "EPCAM", "KRT8", "epcam"]), vocabulary, min_fraction=0.0)
    assert len(told) == 1
    assert match.source_index.tolist() == [2, 0]


def test_genes_of_one_symbol_and_two_ids_are_two_genes():
    panel = Panel(["TBCE", "TBCE"], ["ENSG00000116957", "ENSG00000284770"])
    both = Vocabulary(["TBCE", "TBCE2"], ["ENSG00000116957", "ENSG00000284770"])
    assert match_genes(panel, both).n_matched == 2  # warnings are errors
    with pytest.warns(StfmWarning, match="1 of 2 genes are listed twice"):
        assert match_genes(panel, Vocabulary(["TBCE"])).source_index.tolist() == [0]


def test_no_genes():
    with pytest.raises(InputError, match=r"the data have no genes to match \(n_vars is 0\)"):
        match_genes(Panel([], species="human"), Vocabulary(["EPCAM"]))


def test_take_orders_columns_like_the_vocabulary():
    counts = sparse.random(7, 6, density=0.5, format="csr", random_state=0, dtype=np.float32)
    match = match_genes(Panel(HUMAN), Vocabulary(["ACTB", "KRT8", "EPCAM", "CD3E"]))
    dense = counts.toarray()
    expected = np.stack([dense[:, 5], np.zeros(7), dense[:, 0], dense[:, 2]], axis=1)
    np.testing.assert_array_equal(match.take(counts).toarray(), expected)


def test_panel_from_var_finds_the_columns():
    var = pd.DataFrame({"gene_ids": HUMAN_IDS, "n_cells": range(6)}, index=HUMAN)
    panel = Panel.from_var(var)
    assert panel.id_keys == HUMAN_IDS
    assert panel.symbol_keys[3] == "C1ORF112"
    swapped = Panel.from_var(pd.DataFrame({"Gene_Name": HUMAN}, index=HUMAN_IDS))
    assert swapped.id_keys == HUMAN_IDS
    assert swapped.symbol_keys[0] == "EPCAM"
    assert swapped.names[0] == HUMAN_IDS[0]
    assert Panel.from_var(pd.DataFrame({"gene_id": ["1", "2"]}, index=["ACTB", "EPCAM"])).ids is None
    same = Panel.from_var(pd.DataFrame({"gene_id": HUMAN_IDS}, index=HUMAN_IDS))
    assert same.symbols is None


def test_panel_from_a_chosen_column():
    var = pd.DataFrame({"mine": HUMAN, "ens": HUMAN_IDS}, index=[f"probe{i}" for i in range(6)])
    assert Panel.from_var(var, var_key="mine").symbol_keys[0] == "EPCAM"
    assert Panel.from_var(var, var_key="ens").id_keys == HUMAN_IDS
    with pytest.raises(MissingKeyError, match="'symbol' is no column of var"):
        Panel.from_var(var, var_key="symbol")


def test_panel_refuses_unequal_lengths():
    with pytest.raises(InputError, match="2 names but 1 ids"):
        Panel(["A", "B"], ["ENSG00000184640"])


def test_vocabulary_of_panels():
    one = Panel(["EPCAM", "ACTB"], ["ENSG00000119888", "ENSG00000075624"])
    two = Panel(["ENSG00000075624.3", "ENSG00000153563"])
    union = Vocabulary.from_panels([one, two])
    assert union.names.tolist() == ["EPCAM", "ACTB", "ENSG00000153563"]
    assert union.species == "human"
    assert Vocabulary.from_panels([one, two], mode="intersection").names.tolist() == ["ACTB"]
    with pytest.raises(InputError, match="share no gene"):
        Vocabulary.from_panels([Panel(["A1"]), Panel(["B1"])], mode="intersection")
    with pytest.raises(InputError, match="at least one panel"):
        Vocabulary.from_panels([])
    with pytest.raises(InputError, match="choose 'union'"):
        Vocabulary.from_panels([one], mode="both")


def test_vocabulary_refuses_doubles_and_nothing():
    with pytest.raises(InputError, match="unique up to case.*ACTB"):
        Vocabulary(["ACTB", "Actb"])
    with pytest.raises(InputError, match="at least one gene"):
        Vocabulary([])


@pytest.mark.parametrize("ids", [None, ["ENSG00000184640", ""]])
def test_vocabulary_file_round_trip(tmp_path, ids):
    vocabulary = Vocabulary(["SEPT9", "C1orf112"], ids, "human")
    vocabulary.save(tmp_path / "genes.txt")
    loaded = Vocabulary.load(tmp_path / "genes.txt")
    assert loaded == vocabulary
    assert hash(loaded) == hash(vocabulary)
    assert loaded != Vocabulary(["SEPT9"])
    with pytest.raises(InputError, match="no gene list at"):
        Vocabulary.load(tmp_path / "nothing.txt")


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        (np.array([[1.0, -0.5]]), "negative.*scaled.*layer="),
        (np.array([[1.0, np.nan]]), "nan.*layer="),
        (np.array([[1.0, np.inf]]), "infinite"),
        (np.log1p(np.array([[1.0, 5.0]])), "log-normalised.*layer="),
        (np.array([[100.5, 5.0]]), "looks normalised"),
        (sparse.csr_matrix([[0.5, 0.0]]), "log-normalised"),
    ],
)
def test_what_is_not_counts_is_refused(matrix, message):
    with pytest.raises(InputError, match=message):
        check_counts(matrix)


def test_count_check_names_the_layers():
    with pytest.raises(InputError, match=r"layers\['x'\] holds.*layers here: 'counts'"):
        check_counts(np.array([[0.5]]), where="layers['x']", layers=["counts"])


@pytest.mark.parametrize("dtype", [np.int32, np.float32, np.uint8, bool])
def test_counts_pass(dtype):
    counts = np.array([[0, 1], [1, 0], [1, 1]], dtype=dtype)
    check_counts(counts, block=2)
    check_counts(sparse.csr_matrix(counts))
    check_counts(counts[:0])


def test_log_normalise_uses_the_given_total():
    counts = np.array([[1, 3, 0], [0, 0, 0]], dtype=np.float32)
    total = np.array([8.0, 0.0])
    expected = np.log1p([[1250.0, 3750.0, 0.0], [0.0, 0.0, 0.0]])
    np.testing.assert_allclose(log_normalise(counts, total), expected, rtol=1e-6)
    rows = log_normalise(sparse.csr_matrix(counts), total)
    assert rows.dtype == np.float32
    np.testing.assert_allclose(rows.toarray(), expected, rtol=1e-6)
    with pytest.raises(InputError, match="1 values for 2 rows"):
        log_normalise(counts, [1.0])


@given(st.lists(st.integers(0, 60), unique=True, min_size=1), st.lists(st.integers(0, 60), unique=True, min_size=1))
def test_matches_are_the_common_genes(mine, theirs):
    panel = Panel([f"gene{i}" for i in mine])
    vocabulary = Vocabulary([f"GENE{i}" for i in theirs])
    common = set(mine) & set(theirs)
    if not common:
        with pytest.raises(InputError, match="only 0"):
            match_genes(panel, vocabulary, min_fraction=0)
        return
    match = match_genes(panel, vocabulary, min_fraction=0)
    assert {mine[i] for i in match.source_index} == common
    assert [mine[i] for i in match.source_index] == [theirs[i] for i in match.target_index]
    assert all(a < b for a, b in pairwise(match.target_index.tolist()))


class TestOrthologues:
    VOCABULARY = Vocabulary(
        np.array(["ACTB", "MBP", "GFAP"]),
        np.array(["ENSG00000075624", "", "ENSG00000131095"]),
        "human",
        np.array(["ENSMUSG00000029580", "ENSMUSG00000041607", ""]),
    )

    def test_mouse_ids_meet_a_human_vocabulary(self):
        panel = Panel(np.array(["ENSMUSG00000041607.3", "ENSMUSG00000029580.1", "ENSMUSG00000000001.1"]))
        match = match_genes(panel, self.VOCABULARY)
        assert match.source_index.tolist() == [1, 0]
        assert match.target_index.tolist() == [0, 1]
        assert match.via == "orthologue's ensembl id"
        assert match.species_note == "mouse genes taken as human orthologues by Ensembl id"

    def test_they_are_saved_and_read(self, tmp_path):
        self.VOCABULARY.save(tmp_path / "genes.txt")
        assert Vocabulary.load(tmp_path / "genes.txt") == self.VOCABULARY
        assert (tmp_path / "genes.txt").read_text().splitlines()[2] == "MBP\t\tENSMUSG00000041607"

    def test_vocabularies_that_differ_in_them_differ(self):
        names, ids, species = self.VOCABULARY.names, self.VOCABULARY.ids, self.VOCABULARY.species
        assert Vocabulary(names, ids, species) != self.VOCABULARY

    def test_one_a_gene(self):
        with pytest.raises(InputError, match="3 names but 1 orthologues"):
            Vocabulary(self.VOCABULARY.names, None, "human", np.array(["ENSMUSG00000029580"]))
