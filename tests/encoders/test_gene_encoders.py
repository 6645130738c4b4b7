"""Gene encoders of others: the published layout loads strictly, a wrong file is refused, features are the reference's.

The arrays in ``reference/`` are what the published code gave (``make_gene_reference.py``) on weights that are drawn
from the tensors' names, here as there.
"""

from __future__ import annotations

import ast
import json
import re
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import sparse

from stfm._errors import DataIntegrityError, InputError, MissingKeyError
from stfm.encoders import ENCODERS, build_encoder
from stfm.encoders.gene.novae import novae_options
from stfm.encoders.gene.novae_graph import NicheGraphs, grouped_softmax, with_self_loops
from stfm.encoders.gene.scgpt import scgpt_options
from stfm.models import create, load
from stfm.slide.genes import Vocabulary

REFERENCE = Path(__file__).parent / "reference"
PUBLISHED = ["scgpt", "scfoundation", "novae"]
# The sizes of the reference arrays.
SMALL = {
    "scgpt": {"n_ids": 43, "width": 16, "depth": 2, "heads": 4, "hidden": 24},
    "scfoundation": {"n_table": 40, "width": 16, "depth": 2, "heads": 4, "n_bins": 7},
    "novae": {
        "n_rows": 31, "width": 12, "hidden": 16, "depth": 3, "heads": 4, "out_width": 8, "prototypes": 5,
        "histology": 3,
    },
}  # fmt: skip
G = {"scgpt": 40, "scfoundation": 40, "novae": 30}


def values_of(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    drawn = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape) * 0.3
    scale = "norm" in name and name.endswith("weight")
    return torch.from_numpy((drawn + (1.0 if scale else 0.0)).astype(np.float32))


def reference(name: str) -> dict[str, np.ndarray]:
    with np.load(REFERENCE / f"gene_{name}.npz", allow_pickle=False) as arrays:
        return dict(arrays)


def published(name: str) -> dict[str, torch.Tensor]:
    """The whole state of the published code's network, its heads and decoders included."""
    state = {}
    for line in reference(name)["state_names"]:
        key, shape = re.fullmatch(r"(\S+) (\(.*\))", str(line)).groups()  # type: ignore[union-attr]
        state[key] = values_of(key, ast.literal_eval(shape))
    if name == "scfoundation":  # as models.ckpt holds it
        state = {"cell": {"config": {}, "state_dict": {f"model.{k}": v for k, v in state.items()}}}
    return state


def wrapped(name: str, state: dict) -> dict[str, torch.Tensor]:
    return state["cell"]["state_dict"] if name == "scfoundation" else state


def small(name: str, **options):
    torch.manual_seed(0)
    return build_encoder(name, n_genes=G[name], options={**SMALL[name], **options}).eval()


def symbols(name: str, path: Path) -> tuple[Path, Vocabulary]:
    """A gene table in the encoder's own format, and the model's genes (one of which it lacks)."""
    names = [f"G{i}" for i in range(G[name])]
    if name == "scgpt":
        file = path / "vocab.json"
        file.write_text(json.dumps({n: i + 3 for i, n in enumerate(names)} | {"<pad>": 0, "<cls>": 1, "<eoc>": 2}))
    elif name == "novae":
        file = path / "config.json"
        file.write_text(json.dumps({"var_names": [n.lower() for n in names] + ["absent"], "embedding_size": 12}))
    else:
        file = path / "genes.tsv"
        file.write_text("gene_name\tindex\n" + "".join(f"{n}\t{i}\n" for i, n in enumerate(names)))
    return file, Vocabulary(np.array([*names[:-1], "elsewhere"]))


def bound(name: str, path: Path, **options):
    file, vocabulary = symbols(name, path)
    encoder = small(name, **{"vocab" if name == "scgpt" else "genes": str(file)}, **options)
    return encoder.load_weights(published(name)).bind(vocabulary)


# -- every row ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PUBLISHED)
def test_row_says_what_a_reader_must_know(name: str):
    spec = ENCODERS.get(name)
    assert spec.source == "published"
    assert spec.mode == "frozen"
    assert spec.licence
    assert spec.citation
    assert not spec.gated
    assert spec.certainty
    assert spec.notes


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_layout_loads_whole(name: str, tmp_path: Path):
    encoder = bound(name, tmp_path)
    theirs = {k.removeprefix("model."): v for k, v in wrapped(name, published(name)).items()}
    own = dict(encoder.backbone.named_parameters())
    assert own
    for key, value in own.items():
        torch.testing.assert_close(value.detach(), theirs[key])


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_layout_loads_from_files(name: str, tmp_path: Path):
    from safetensors.torch import save_file

    torch.save(published(name), tmp_path / "w.ckpt")
    save_file(wrapped(name, published(name)), tmp_path / "w.safetensors")
    first, second = (small(name).load_weights(tmp_path / f"w.{kind}") for kind in ("ckpt", "safetensors"))
    assert first.fingerprint() == second.fingerprint() == small(name).load_weights(published(name)).fingerprint()


@pytest.mark.parametrize("name", PUBLISHED)
def test_wrong_file_is_refused_in_words(name: str):
    state = published(name)
    flat = wrapped(name, state)
    first, second = next(k for k in flat if "embedding.weight" in k or "emb.weight" in k), list(flat)[5]
    flat[first] = flat[first][:-1]
    del flat[second]
    flat["something.else"] = torch.zeros(2)
    encoder = small(name)
    before = encoder.fingerprint()
    with pytest.raises(DataIntegrityError, match=rf"encoder '{name}'") as error:
        encoder.load_weights(state)
    for word in ("1 missing", "1 of another shape", "1 unknown"):
        assert word in str(error.value)
    with pytest.raises(DataIntegrityError, match=rf"encoder '{name}'"):
        encoder.load_weights({"conv1.weight": torch.zeros(4, 3, 3, 3)})
    assert encoder.fingerprint() == before


@pytest.mark.parametrize("name", PUBLISHED)
def test_genes_are_found_by_symbol_and_missing_ones_left_out(name: str, tmp_path: Path):
    encoder = bound(name, tmp_path)
    x = torch.from_numpy(reference(name)["x"])
    with torch.no_grad():
        out = encoder(x)
        assert out.shape == (len(x), encoder.width)
        other = x.clone()
        other[:, -1] = 5.0  # the gene that the encoder does not know
        torch.testing.assert_close(encoder(other), out)
        mask = torch.ones(x.shape[1], dtype=torch.bool)
        mask[:9] = False
        measured = encoder(x, mask)
        other[:, :9] = 3.0  # what was not measured is not read
        torch.testing.assert_close(encoder(other, mask), measured)
        assert not torch.allclose(measured, out)
        assert torch.isfinite(encoder(torch.zeros(2, x.shape[1]))).all()
        assert torch.isfinite(encoder(x[:2], torch.zeros(x.shape[1], dtype=torch.bool))).all()


@pytest.mark.parametrize("name", PUBLISHED)
def test_genes_of_another_kind_are_refused(name: str, tmp_path: Path):
    file, vocabulary = symbols(name, tmp_path)
    option = "vocab" if name == "scgpt" else "genes"
    encoder = small(name, **{option: str(file)})
    with pytest.raises(InputError, match="none of the model's 40 genes|none of the model's 30 genes"):
        encoder.bind(Vocabulary(np.array([f"ENSG{i:011d}" for i in range(G[name])])))
    with pytest.raises(MissingKeyError, match="no gene table"):
        small(name, **{option: str(tmp_path / "nothing.tsv")}).bind(vocabulary)
    size = {"scgpt": "n_ids", "scfoundation": "n_table", "novae": "n_rows"}[name]
    with pytest.raises(InputError, match=f"set option {size}"):
        small(name, **{option: str(file), size: 12}).bind(vocabulary)
    with pytest.raises(InputError, match="do not fit in"):
        small(name, **{size: 12})


ROWS = {
    **SMALL,
    "ae-gene": {"width": 16, "depth": 1, "heads": 4, "n_tokens": 5},
    "ae-gene-small": {},
    "gene-mlp": {"width": 16},
    "gene-groups": {"width": 16, "n_groups": 6},
    "pca": {"width": 8},
}


@pytest.mark.parametrize("name", ROWS)
def test_every_row_keeps_its_weights_and_refuses_others(name: str):
    def make(seed: int):
        torch.manual_seed(seed)
        return build_encoder(name, n_genes=G.get(name, 40), options=ROWS[name]).eval()

    first, second = make(0), make(1)
    x = torch.from_numpy(reference(name if name in G else "scgpt")["x"])
    first.fit(x)
    second.load_weights(first.backbone.state_dict())
    if name == "novae":  # its statistics of genes are no part of the published layout
        second.fit(x)
    mask = torch.arange(x.shape[1]) % 4 > 0
    with torch.no_grad():
        out = first(x, mask)
        torch.testing.assert_close(second(x, mask), out)
    assert out.shape == (len(x), first.width)
    assert torch.isfinite(out).all()
    state = first.backbone.state_dict()
    wrong = next(k for k, v in state.items() if v.is_floating_point() and v.ndim == 2)
    state[wrong] = torch.zeros(3, 3)
    with pytest.raises(DataIntegrityError, match="1 of another shape"):
        make(2).load_weights(state)


@pytest.mark.parametrize("name", PUBLISHED)
def test_saved_models_load_without_the_gene_table(name: str, tmp_path: Path):
    file, vocabulary = symbols(name, tmp_path)
    torch.save(published(name), tmp_path / "w.ckpt")
    options = {**SMALL[name], "vocab" if name == "scgpt" else "genes": str(file)}
    gene = {"name": name, "weights": str(tmp_path / "w.ckpt"), "options": options}
    model = create("storm-tiny", vocabulary, gene=gene).eval()
    x = torch.from_numpy(reference(name)["x"][:4])
    with torch.no_grad():
        expected = model.gene_encoder(x)
    model.save(tmp_path / "m")
    file.unlink()
    (tmp_path / "w.ckpt").unlink()
    with torch.no_grad():
        torch.testing.assert_close(load(tmp_path / "m").eval().gene_encoder(x), expected)


# -- features of the published code ------------------------------------------------------------------------------------


def test_scgpt_is_the_reference():
    stored = reference("scgpt")
    encoder = small("scgpt").load_weights(published("scgpt"))
    encoder.backbone.gene_ids.copy_(torch.arange(3, 43))
    encoder.backbone.special_ids.copy_(torch.tensor([0, 1]))
    with torch.no_grad():
        out = encoder(torch.from_numpy(stored["x"]))
    np.testing.assert_allclose(out.numpy(), stored["features"], atol=1e-5)


@pytest.mark.parametrize("pooling", ["all", "max"])
def test_scfoundation_is_the_reference(pooling: str):
    stored = reference("scfoundation")
    encoder = small("scfoundation", pooling=pooling).load_weights(published("scfoundation"))
    with torch.no_grad():
        out = encoder(torch.from_numpy(stored["x"]))
    assert encoder.width == (64 if pooling == "all" else 16)
    np.testing.assert_allclose(out.numpy(), stored[pooling], atol=2e-5)


@pytest.mark.parametrize("histology", [False, True])
def test_novae_niches_are_the_reference(histology: bool):
    stored = reference("novae")
    x = torch.from_numpy(stored["x"])
    encoder = small("novae").load_weights(published("novae")).fit(x)
    valid = np.flatnonzero(stored["valid"])
    graphs = NicheGraphs(sparse.csr_array(stored["distances"]), valid, n_hops=2)
    pictures = torch.from_numpy(stored["histology"][valid]) if histology else None
    with torch.no_grad():
        z = encoder.backbone.niches(x[graphs.nodes], graphs, histology=pictures)
    key = "latent_histology" if histology else "latent"
    assert len(valid) > 60
    np.testing.assert_allclose(z.numpy(), stored[key][valid], atol=2e-5)
    cosine = encoder.backbone.prototypes(z)
    assert cosine.shape == (len(valid), 5)
    assert float(cosine.detach().abs().max()) <= 1.0 + 1e-5


def test_novae_cell_embedding_by_hand():
    stored = reference("novae")
    x = stored["x"].astype(np.float64)
    state = {k: v.numpy().astype(np.float64) for k, v in published("novae").items()}
    genes = state["cell_embedder.embedding.weight"][:30] @ state["cell_embedder.linear.weight"].T
    genes += state["cell_embedder.linear.bias"]
    measured = np.arange(30) % 3 > 0
    z = (x - x.mean(axis=0)) / x.std(axis=0)
    expected = z[:, measured] @ (genes[measured] / np.linalg.norm(genes[measured], axis=0))
    encoder = small("novae").load_weights(published("novae")).fit(torch.from_numpy(stored["x"]))
    with torch.no_grad():
        out = encoder(torch.from_numpy(stored["x"]), torch.from_numpy(measured))
    np.testing.assert_allclose(out.numpy(), expected, atol=1e-4)


# -- scGPT -------------------------------------------------------------------------------------------------------------


def test_scgpt_reads_sizes_from_its_folder(tmp_path: Path):
    (tmp_path / "vocab.json").write_text(json.dumps({f"G{i}": i for i in range(40)}))
    args = {"embsize": 16, "nheads": 4, "d_hid": 24, "nlayers": 2, "dropout": 0.2, "pad_value": -2, "n_layers_cls": 3}
    (tmp_path / "args.json").write_text(json.dumps(args))
    options = scgpt_options(tmp_path)
    assert options["n_ids"] == 43  # three special tokens follow where the file has none
    encoder = build_encoder("scgpt", n_genes=40, options=options, weights=published("scgpt"))
    encoder.bind(Vocabulary(np.array([f"g{i}" for i in range(40)])))
    assert encoder.width == 16
    assert encoder.backbone.special_ids.tolist() == [40, 41]
    with pytest.raises(MissingKeyError, match="no gene table"):
        scgpt_options(tmp_path / "elsewhere")


@pytest.mark.parametrize("layout", ["Wqkv", "_impl.Wqkv"])
def test_scgpt_reads_flash_attention_names(layout: str):
    state = {}
    for key, value in published("scgpt").items():
        key = key.replace("self_attn.in_proj_", f"self_attn.{layout}.")
        state[key.replace("self_attn.out_proj", "self_attn._impl.out_proj") if "_impl" in layout else key] = value
    expected = small("scgpt").load_weights(published("scgpt")).fingerprint()
    assert small("scgpt").load_weights(state).fingerprint() == expected


@pytest.mark.parametrize("kept", ["highest", "sample"])
def test_scgpt_keeps_as_many_genes_as_fit(kept: str):
    x = torch.from_numpy(reference("scgpt")["x"])
    encoder = small("scgpt", max_length=9, kept=kept)
    whole = small("scgpt")
    with torch.no_grad():
        torch.testing.assert_close(encoder(x), encoder(x))
        assert not torch.allclose(encoder(x), whole(x))
        order = x[0] if kept == "highest" else encoder.backbone.order * (x[0] > 0)
        low = order.argsort(descending=True)[8:]
        fewer = x[:1].clone()
        fewer[:, low] = fewer[:, low] * 1.0001  # bins are of all expressed genes, tokens of those kept
        torch.testing.assert_close(encoder(fewer), encoder(x[:1]), atol=1e-4, rtol=1e-4)
    with pytest.raises(InputError, match="kept='first' is unknown"):
        small("scgpt", kept="first")


# -- scFoundation ------------------------------------------------------------------------------------------------------


def test_scfoundation_values_are_normalised_over_its_own_genes(tmp_path: Path):
    counts = np.random.RandomState(1).poisson(3.0, (4, 40)).astype(np.float32)
    x = torch.from_numpy(np.log1p(1e4 * counts / counts.sum(axis=1, keepdims=True)))
    encoder = bound("scfoundation", tmp_path)
    values, places, padding = encoder.backbone.tokens(x)
    inside = counts[:, :-1]
    expected = np.log1p(1e4 * inside / inside.sum(axis=1, keepdims=True))
    for i in range(4):
        at = places[i, :-2][~padding[i, :-2]]
        np.testing.assert_allclose(values[i, :-2][~padding[i, :-2]].numpy(), expected[i, at], rtol=1e-5)
        assert sorted(at.tolist()) == np.flatnonzero(inside[i]).tolist()
    assert places[:, -2:].tolist() == [[40, 41]] * 4
    torch.testing.assert_close(values[:, -2], torch.full((4,), 4.0))
    np.testing.assert_allclose(values[:, -1].numpy(), np.log10(expected.sum(axis=1)), rtol=1e-5)
    fixed = bound("scfoundation", tmp_path, depth_token=3.5, target=4.5, max_genes=6)
    values, _, _ = fixed.backbone.tokens(x)
    assert values.shape == (4, 8)
    assert values[:, -2:].tolist() == [[4.5, 3.5]] * 4


def test_scfoundation_versions():
    state = published("scfoundation")
    with pytest.raises(DataIntegrityError, match="holds weights cell, and version='rde'"):
        small("scfoundation", version="rde").load_weights(state)
    state["rde"] = state.pop("cell")
    assert small("scfoundation", version="rde").load_weights(state)
    with pytest.raises(InputError, match="version='bulk' is unknown"):
        small("scfoundation", version="bulk")
    with pytest.raises(InputError, match="pooling='mean' is unknown"):
        small("scfoundation", pooling="mean")


# -- Novae -------------------------------------------------------------------------------------------------------------


def test_novae_reads_sizes_from_its_folder(tmp_path: Path):
    sizes = {
        "embedding_size": 12,
        "hidden_size": 16,
        "num_layers": 3,
        "heads": 4,
        "output_size": 8,
        "num_prototypes": 5,
    }
    names = [f"g{i}" for i in range(30)] + ["absent"]
    (tmp_path / "config.json").write_text(json.dumps({**sizes, "histo_embedding_size": 3, "var_names": names}))
    options = novae_options(tmp_path)
    assert options == {**SMALL["novae"], "genes": str(tmp_path / "config.json")}
    assert build_encoder("novae", n_genes=30, options=options, weights=published("novae")).width == 12


def test_novae_checkpoints_without_histology_and_with_leftovers():
    state = {k: v for k, v in published("novae").items() if "mlp_fusion" not in k}
    state |= {"swav_head.queue": torch.zeros(2, 5), "swav_head._kmeans_prototypes": torch.zeros(5, 8)}
    with pytest.raises(DataIntegrityError, match="histology=0"):
        small("novae").load_weights(state)
    encoder = small("novae", histology=0).load_weights(state)
    graphs = NicheGraphs(sparse.csr_array((3, 3)), [0, 1, 2])
    with torch.no_grad(), pytest.raises(InputError, match="no part that reads H&E"):
        encoder.backbone.niches(torch.zeros(3, 30), graphs, histology=torch.zeros(3, 3))
    with pytest.raises(InputError, match="each of the 3 nodes"):
        encoder.backbone.niches(torch.zeros(2, 30), graphs)


def test_novae_genes_that_do_not_vary_say_nothing():
    x = torch.from_numpy(reference("novae")["x"]).clone()
    x[:, 4] = 1.5
    encoder = small("novae").fit(x)
    other = x.clone()
    other[:, 4] = 9.0
    torch.testing.assert_close(encoder(other), encoder(x))


def dense_graph_layer(x, weight, adjacency, layer):
    """GATv2 written out for every pair of nodes; ``adjacency[i, j]``: an edge from i to j."""
    n = len(x)
    left, right = (lin(x).view(n, layer.heads, layer.size) for lin in (layer.lin_l, layer.lin_r))
    edge = layer.lin_edge(weight.reshape(-1, 1)).view(n, n, layer.heads, layer.size)
    score = (torch.nn.functional.leaky_relu(left[:, None] + right[None] + edge, 0.2) * layer.att[0]).sum(-1)
    score = score.masked_fill(~adjacency[..., None], -torch.inf).softmax(dim=0)
    out = torch.einsum("ijh,ihc->jhc", score, left)
    return (out.flatten(1) if layer.concatenate else out.mean(dim=1)) + layer.bias


def test_novae_graph_against_every_pair_of_nodes():
    encoder = small("novae").load_weights(published("novae")).backbone.encoder.double()
    rng = np.random.RandomState(0)
    near = np.triu(rng.uniform(size=(9, 9)) < 0.4, 1)
    lengths = np.triu(rng.uniform(10, 60, (9, 9)), 1) * near
    distances = lengths + lengths.T
    everyone = NicheGraphs(sparse.csr_array(distances), [0], n_hops=9)
    nodes = everyone.nodes.numpy()
    x = torch.from_numpy(rng.standard_normal((len(nodes), 12)))
    everyone.lengths = everyone.lengths.double()
    out = encoder(x, everyone)

    weight = torch.from_numpy(distances[np.ix_(nodes, nodes)] / 20.0)
    adjacency = weight > 0
    own = weight.sum(dim=0) / adjacency.sum(dim=0).clamp_min(1)
    weight = weight + torch.diag(own)
    adjacency = adjacency | torch.eye(len(nodes), dtype=torch.bool)
    h = x
    for i, layer in enumerate(encoder.gnn.convs):
        h = dense_graph_layer(h, weight, adjacency, layer)
        h = torch.nn.functional.elu(h) if i < 2 else h
    parts = encoder.node_aggregation.attention_aggregation
    expected = (parts.gate_nn(h).softmax(dim=0) * parts.nn(h)).sum(dim=0)
    torch.testing.assert_close(out[0], expected, atol=1e-5, rtol=1e-5)


def test_niches_are_the_spots_that_few_steps_reach():
    line = sparse.diags_array([np.full(5, 30.0), np.full(5, 30.0)], offsets=[-1, 1], shape=(6, 6))
    graphs = NicheGraphs(line.tocsr(), [0, 3])
    assert graphs.nodes.tolist() == [0, 1, 2, 1, 2, 3, 4, 5]
    assert graphs.niche.tolist() == [0, 0, 0, 1, 1, 1, 1, 1]
    assert graphs.n_niches == 2
    assert sorted(map(tuple, graphs.edges.T.tolist()))[:4] == [(0, 1), (1, 0), (1, 2), (2, 1)]
    assert graphs.edges.shape == (2, 12)
    torch.testing.assert_close(graphs.lengths, torch.full((12, 1), 1.5))
    assert NicheGraphs(line.tocsr(), [3], n_hops=1).nodes.tolist() == [2, 3, 4]
    alone = NicheGraphs(sparse.csr_array((4, 4)), [2])
    assert alone.nodes.tolist() == [2]
    assert alone.edges.shape == (2, 0)
    with pytest.raises(InputError, match=r"must be \(n, n\)"):
        NicheGraphs(sparse.csr_array((2, 3)), [0])


def test_self_loops_and_softmax_of_groups():
    edges, lengths = torch.tensor([[0, 1, 2, 2], [1, 0, 1, 2]]), torch.tensor([[1.0], [2.0], [3.0], [9.0]])
    edges, lengths = with_self_loops(edges, lengths, 3)
    assert edges.tolist() == [[0, 1, 2, 0, 1, 2], [1, 0, 1, 0, 1, 2]]
    assert lengths.flatten().tolist() == [1.0, 2.0, 3.0, 2.0, 2.0, 0.0]
    weights = grouped_softmax(torch.tensor([1.0, 2.0, 300.0]), torch.tensor([0, 0, 1]), 2)
    torch.testing.assert_close(weights, torch.tensor([0.26894, 0.73106, 1.0]), atol=1e-4, rtol=0)
