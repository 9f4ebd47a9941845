"""Small Hugging Face models with attention masks: forward and gradient in JAX, forward on the native engine.

Needs ``pip install transformers``, which the extra ``test`` leaves out. Run with ``pytest -m slow``.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import Tensor

import popart_func as pf
from popart_func.interop.jax import to_jax, to_jax_function

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.usefixtures("unchecked"),
]

SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "vocab_size": 40,
    "max_position_embeddings": 32,
}
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "vocab_size": 40}
BART = {
    **{f"{part}_{name}": 2 for part in ("encoder", "decoder") for name in ("layers", "attention_heads")},
    **{"d_model": 16, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "vocab_size": 40, "max_position_embeddings": 32},
}
BY_POSITION = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "max_relative_positions": 16}
# The prefix of a model's classes, and its configuration.
MODELS: dict[str, dict[str, Any]] = {
    "Bert": SMALL,
    "Roberta": SMALL,
    "DistilBert": {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32, "vocab_size": 40},
    "Albert": {**SMALL, "embedding_size": 8},
    "Electra": {**SMALL, "embedding_size": 8},
    "GPT2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 40, "n_positions": 32},
    "OPT": {**SMALL, "ffn_dim": 32, "word_embed_proj_dim": 16},
    "GPTNeoX": SMALL,
    "Llama": {**SMALL, "num_key_value_heads": 1},
    "Mistral": {**SMALL, "num_key_value_heads": 1, "sliding_window": 4},
    "Qwen2": {**SMALL, "num_key_value_heads": 1},
    "Gemma": {**SMALL, "num_key_value_heads": 1, "head_dim": 8},
    "Phi": SMALL,
    "T5": T5,
    "Bart": BART,
    "DebertaV2": {**SMALL, **BY_POSITION, "position_buckets": 8},
    "Deberta": {**SMALL, **BY_POSITION},
    "XLNet": {"d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 32, "vocab_size": 40},
    "MPNet": SMALL,
}
IDS = torch.tensor([[3, 5, 7, 9, 11, 2], [4, 6, 8, 1, 1, 1]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])


@pytest.mark.parametrize("name", MODELS)
def test_a_model_with_a_mask(name: str) -> None:
    """To 1e-5 of the value, and of the greatest slope."""
    transformers = pytest.importorskip("transformers")
    make = lambda: getattr(transformers, f"{name}Model")(config).eval()  # noqa: E731
    config = getattr(transformers, f"{name}Config")(**MODELS[name])
    apply, params = pf.stateless(make()), pf.init_params(make, 0)
    options: dict[str, Any] = {"decoder_input_ids": IDS[:, :4]} if name in ("T5", "Bart") else {}
    if "use_cache" in config.to_dict():
        options["use_cache"] = False

    def loss(params: dict[str, Tensor], mask: Tensor) -> Tensor:
        outputs = apply(params, input_ids=IDS, attention_mask=mask, **options).last_hidden_state
        kept = outputs * mask[:, : outputs.shape[1], None]
        return 0.01 * (kept.square() + kept * torch.arange(kept.shape[-1])).sum()

    leaves = {key: value.clone().requires_grad_(key in apply.trainable) for key, value in params.items()}
    expected = loss(leaves, MASK)
    names = sorted(apply.trainable)
    slopes = torch.autograd.grad(expected, [leaves[key] for key in names], allow_unused=True)
    greatest = max(float(slope.abs().max()) for slope in slopes if slope is not None)

    arrays = to_jax(params, strict_dtype=False)
    rest = {key: value for key, value in arrays.items() if key not in names}
    in_jax = jax.value_and_grad(lambda trained, mask: to_jax_function(loss)({**trained, **rest}, mask))
    value, gradient = jax.jit(in_jax)({key: arrays[key] for key in names}, jnp.asarray(MASK.numpy()))
    np.testing.assert_allclose(float(value), float(expected), rtol=1e-5)
    for key, slope in zip(names, slopes, strict=True):
        slope = torch.zeros_like(leaves[key]) if slope is None else slope
        np.testing.assert_allclose(np.asarray(gradient[key]), slope.numpy(), atol=1e-5 * greatest, err_msg=key)

    with torch.no_grad():
        run = lambda carry, mask: (carry, loss(params, mask))  # noqa: E731
        _, ys = pf.scan_lanes(run, torch.zeros(1), MASK[None], shared=True, engine="native")
    np.testing.assert_allclose(float(ys), float(expected), rtol=1e-5)
