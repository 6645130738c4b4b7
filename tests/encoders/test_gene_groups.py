"""Groups of genes: by pathway or learned."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from stfm._errors import InputError
from stfm.encoders.build import build_encoder
from stfm.models import create, load
from stfm.slide.genes import Vocabulary

NAMES = np.array([f"GENE{i}" for i in range(12)])
PATHWAYS = {"first": ["gene0", "GENE1", "elsewhere"], "second": ["GENE1", "GENE5"]}


def test_a_pathway_reads_its_own_genes_alone():
    encoder = build_encoder("gene-groups", n_genes=12, options={"pathways": PATHWAYS, "width": 4}).eval()
    encoder.bind(Vocabulary(NAMES))
    assert encoder.backbone.members.sum(dim=0).tolist() == [2.0, 2.0]
    x = torch.rand(3, 12)
    other = x.clone()
    other[:, 7] = 9.0
    assert torch.equal(encoder(x), encoder(other))
    other[:, 1] = 9.0
    assert not torch.equal(encoder(x), encoder(other))


def test_a_gene_that_was_not_measured_does_not_shrink_its_group():
    encoder = build_encoder("gene-groups", n_genes=12, options={"pathways": {"all": list(NAMES)}}).eval()
    encoder.bind(Vocabulary(NAMES))
    mask = torch.ones(1, 12, dtype=torch.bool)
    mask[:, 6:] = False
    x = torch.ones(1, 12)
    size = encoder.backbone.layers[0].weight
    few, many = (encoder.backbone.scaler(x, m).sum() / m.sum().sqrt() for m in (mask, torch.ones_like(mask)))
    assert float(few) == pytest.approx(6**0.5)
    assert float(many) == pytest.approx(12**0.5)
    assert size.shape[1] == 1


def test_pathways_of_another_species_are_refused():
    encoder = build_encoder("gene-groups", n_genes=12, options={"pathways": {"none": ["Xyz"]}})
    with pytest.raises(InputError, match="another species"):
        encoder.bind(Vocabulary(NAMES))


@pytest.mark.parametrize("options", [{"n_groups": 5}, {"pathways": PATHWAYS}])
def test_storm_reads_groups_of_genes(options, tmp_path):
    torch.manual_seed(0)
    model = create("storm-tiny", Vocabulary(NAMES), gene={"name": "gene-groups", "options": options}).eval()
    x = torch.rand(4, 12)
    token = model.gene_token(model.gene_encoder(x))
    model.save(tmp_path / "m")
    again = load(tmp_path / "m")
    assert torch.equal(again.gene_token(again.gene_encoder(x)), token)
