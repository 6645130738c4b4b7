"""Features that the published code of gene encoders gives on seeded weights; written to ``gene_<name>.npz`` beside it.

Run once in an environment of its own, not part of the tests, which only read the arrays:

    pip install novae==1.1.2 einops
    python make_gene_reference.py novae
    python make_gene_reference.py scgpt <checkout of bowang-lab/scGPT @ cebd6fa>
    python make_gene_reference.py scfoundation <checkout of biomap-research/scFoundation @ d09626a>

No published weights take part: every tensor is drawn from its own name, here and in ``test_gene_encoders.py`` alike.
"""

from __future__ import annotations

import sys
import types
import zlib
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).parent


def values_of(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Return the values of a tensor of that name: seeded, around 1 for scales of normalisations."""
    drawn = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape) * 0.3
    scale = "norm" in name and name.endswith("weight")
    return torch.from_numpy((drawn + (1.0 if scale else 0.0)).astype(np.float32))


def fill(module: torch.nn.Module) -> torch.nn.Module:
    state = module.state_dict()
    module.load_state_dict({k: values_of(k, tuple(v.shape)) for k, v in state.items()})
    return module.eval()


def counts(n: int, g: int) -> np.ndarray:
    """Return expression without ties, two of five values zero."""
    rng = np.random.RandomState(7)
    return (rng.uniform(1.0, 60.0, (n, g)) * (rng.uniform(size=(n, g)) > 0.4)).astype(np.float32)


def log_normalised(c: np.ndarray) -> np.ndarray:
    return np.log1p(1e4 * c / c.sum(axis=1, keepdims=True)).astype(np.float32)


def make_novae() -> dict[str, np.ndarray]:
    import anndata as ad
    import novae
    from novae._constants import Keys

    c = counts(80, 30)
    x = log_normalised(c)
    rng = np.random.RandomState(3)
    coords = rng.uniform(0, 200, (80, 2))
    histology = rng.standard_normal((80, 3)).astype(np.float32)
    names = [f"Gene{i}" for i in range(30)]
    out = {"x": x, "coords": coords, "histology": histology}
    for key in ("latent", "latent_histology"):
        adata = ad.AnnData(x.copy(), obsm={"spatial": coords.copy()})
        adata.var_names = names
        if key == "latent_histology":
            adata.obsm[Keys.HISTO_EMBEDDINGS] = histology
        novae.spatial_neighbors(adata, radius=[0, 60])
        sizes = {"embedding_size": 12, "hidden_size": 16, "num_layers": 3, "output_size": 8, "heads": 4}
        model = novae.Novae(
            var_names=[*names, "absent"], num_prototypes=5, histo_embedding_size=3, **sizes
        )  # fmt: skip
        fill(model)
        model.mode.as_pretrained()
        model.mode.multimodal = key == "latent_histology"
        model.compute_representations(adata, accelerator="cpu")
        out[key] = adata.obsm[Keys.REPR]
        out["distances"] = adata.obsp[Keys.ADJ].toarray().astype(np.float32)
        out["valid"] = adata.obs[Keys.IS_VALID_OBS].to_numpy()
    out["state_names"] = np.array([f"{k} {tuple(v.shape)}" for k, v in model.state_dict().items()])
    return out


def package(name: str, folder: Path) -> None:
    """Name a package without running its __init__, which imports what is not needed here."""
    module = types.ModuleType(name)
    module.__path__ = [str(folder)]
    sys.modules[name] = module


def make_scgpt(checkout: Path) -> dict[str, np.ndarray]:
    package("scgpt", checkout / "scgpt")
    package("scgpt.model", checkout / "scgpt" / "model")
    sys.modules["scgpt"].logger = types.SimpleNamespace(warning=print)
    package("scgpt.tokenizer", checkout / "scgpt" / "tokenizer")
    from scgpt.data_collator import DataCollator
    from scgpt.model.model import TransformerModel

    vocab = {f"G{i}": i + 3 for i in range(40)} | {"<pad>": 0, "<cls>": 1, "<eoc>": 2}
    model = TransformerModel(
        ntoken=43, d_model=16, nhead=4, d_hid=24, nlayers=2, vocab=vocab, dropout=0.2, pad_token="<pad>", pad_value=-2,
        do_mvc=True, use_fast_transformer=False, n_cls=1,
    )  # fmt: skip
    fill(model)
    x = log_normalised(counts(6, 40))
    examples = []
    for i, row in enumerate(x):
        at = np.flatnonzero(row)
        genes = torch.tensor([1, *(at + 3)])
        examples.append({"id": i, "genes": genes, "expressions": torch.tensor([-2.0, *row[at]])})
    collator = DataCollator(
        do_padding=True, pad_token_id=0, pad_value=-2, do_mlm=False, do_binning=True, max_length=1200, sampling=True,
        keep_first_n_tokens=1,
    )  # fmt: skip
    batch = collator(examples)
    with torch.no_grad():
        out = model._encode(batch["gene"], batch["expr"], src_key_padding_mask=batch["gene"].eq(0))[:, 0].numpy()
    names = np.array([f"{k} {tuple(v.shape)}" for k, v in model.state_dict().items()])
    return {"x": x, "features": out / np.linalg.norm(out, axis=1, keepdims=True), "state_names": names}


def make_scfoundation(checkout: Path) -> dict[str, np.ndarray]:
    sys.path.insert(0, str(checkout / "model"))
    sys.modules["pretrainmodels.performer"] = types.ModuleType("pretrainmodels.performer")
    sys.modules["pretrainmodels.performer"].PerformerModule = None
    package("pretrainmodels", checkout / "model" / "pretrainmodels")
    from pretrainmodels.mae_autobin import MaeAutobin
    from pretrainmodels.transformer import pytorchTransformerModule

    g = 40
    model = MaeAutobin(
        num_tokens=1, max_seq_len=g + 2, embed_dim=16, decoder_embed_dim=8, bin_alpha=1.0, bin_num=7, pad_token_id=103,
        mask_token_id=102,
    )  # fmt: skip
    model.encoder = pytorchTransformerModule(max_seq_len=g + 2, dim=16, depth=2, heads=4)
    model.decoder = torch.nn.Linear(2, 2)
    fill(model)
    x = log_normalised(counts(6, g))
    features = {"all": [], "max": []}
    for row in x:  # one cell at a time, as the published script does
        tokens = torch.tensor([*row, 4.0, np.log10(row.sum())])[None]
        at = torch.nonzero(tokens[0] > 0)[:, 0]
        with torch.no_grad():
            embedded = model.token_emb(tokens[:, at, None].float(), output_weight=0) + model.pos_emb(at[None])
            out = model.encoder(embedded, torch.zeros(1, len(at), dtype=torch.bool))
        pooled = [out[:, -1], out[:, -2], out[:, :-2].max(dim=1).values, out[:, :-2].mean(dim=1)]
        features["all"].append(torch.cat(pooled, dim=1)[0].numpy())
        features["max"].append(out.max(dim=1).values[0].numpy())
    names = np.array([f"{k} {tuple(v.shape)}" for k, v in model.state_dict().items()])
    return {"x": x, **{k: np.stack(v) for k, v in features.items()}, "state_names": names}


def main() -> None:
    name = sys.argv[1]
    makers = {"novae": make_novae, "scgpt": make_scgpt, "scfoundation": make_scfoundation}
    arrays = makers[name](*map(Path, sys.argv[2:]))
    np.savez_compressed(HERE / f"gene_{name}.npz", **arrays)


if __name__ == "__main__":
    main()
