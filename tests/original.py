"""The PyTorch original (`local-attention`) for tests: our weights under its names, its outputs as NumPy arrays.

Functions that need torch import it, so that names and weights can be used without it.
"""

import re
import zlib

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

ORIGINAL_NAMES = (
    (r"^layers_(\d+)/attn/to_v_gate/", r"layers.\1.0.branch.to_v_gate.0."),
    (r"^layers_(\d+)/attn/", r"layers.\1.0.branch."),
    (r"^layers_(\d+)/ff/norm/", r"layers.\1.1.branch.0."),
    (r"^layers_(\d+)/ff/to_hidden/", r"layers.\1.1.branch.1."),
    (r"^layers_(\d+)/ff/to_out/", r"layers.\1.1.branch.4."),
    (r"^layers_(\d+)/attn_streams/", r"layers.\1.0."),
    (r"^layers_(\d+)/ff_streams/", r"layers.\1.1."),
    (r"^layers_(\d+)/global_attn/", r"global_layers.\1.branch."),
    (r"^layers_(\d+)/global_streams/", r"global_layers.\1."),
    (r"^dynamic_pos_bias/dense_0/", r"dynamic_pos_bias.mlp.0."),
    (r"^dynamic_pos_bias/dense_1/", r"dynamic_pos_bias.mlp.2."),
    (r"^dynamic_pos_bias/dense_2/", r"dynamic_pos_bias.mlp.4."),
    (r"^to_logits/", r"to_logits.1."),
    (r"^norm/", r"to_logits.0."),
    (r"^(token|pos)_emb/embedding$", r"\1_emb.weight"),
    (r"\bgamma$", r"norm.gamma"),
    (r"(kernel|\bscale)$", r"weight"),
    (r"/", r"."),
)
"""Replacements, in order, from a path in our parameter tree to the name in the original's state dict."""

PLACES = {
    "LocalTransformer": ("", ""),
    "LocalMHA": ("layers_0/attn/", "layers.0.0.branch."),
    "FeedForward": ("layers_0/ff/", "layers.0.1.branch."),
    "HyperConnection": ("layers_0/attn_streams/", "layers.0.0."),
    "DynamicPositionBias": ("dynamic_pos_bias/", "dynamic_pos_bias."),
}
"""Prefix of each module in a transformer, ours and the original's; a module on its own lacks it."""


def normal(seed: int, *shape: int) -> np.ndarray:
    """Draw unit normals from NumPy's `RandomState`: the same on every machine."""
    return np.random.RandomState(seed).standard_normal(shape).astype(np.float32)


def fill(params, seed: int = 0):
    """Fill every parameter with random values of a trained model's size, seeded by its name.

    Values that start at zero or one (norms, residual streams) change too, so that a test depends on each of them.
    """

    def draw(path, leaf) -> jax.Array:
        names = [key.key for key in path]
        noise = normal(zlib.crc32("/".join(names).encode()) % 2**31 + seed, *leaf.shape)
        if names[-1] == "kernel":
            return jnp.asarray(noise * leaf.shape[0] ** -0.5)
        if names[-1] == "embedding":
            return jnp.asarray(noise)
        if names[-1] == "static_alpha":  # columns that sum to about one: equal streams that cancel are ill-conditioned
            return jnp.asarray(1 / leaf.shape[0] + 0.2 * noise)
        around_one = names[-1] in ("scale", "q_scale", "k_scale", "static_beta")
        return jnp.asarray(around_one + 0.3 * noise)

    return jax.tree_util.tree_map_with_path(draw, params)


def filled_variables(module, *inputs) -> dict:
    """Return a Linen module's variables with `fill`ed parameters, without running its initialisers."""
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), *inputs))
    return {"params": fill(shapes["params"])}


def original_name(path: str, kind: str = "LocalTransformer") -> str:
    """Translate a parameter path of the module `kind` to the original's name."""
    ours, theirs = PLACES[kind]
    name = ours + path
    for pattern, replacement in ORIGINAL_NAMES:
        name = re.sub(pattern, replacement, name)
    return name.removeprefix(theirs)


def by_original_name(params, kind: str = "LocalTransformer") -> dict[str, np.ndarray]:
    """Flatten parameters or their gradients to the original's names and layout, where a Linear is [out, in]."""
    named = {}
    for path, leaf in flatten_dict(params, sep="/").items():
        values = np.asarray(leaf)
        named[original_name(path, kind)] = values.T if path.endswith("kernel") else values
    return named


def load(module, params, kind: str = "LocalTransformer"):
    """Copy our parameters into a module of the original by name; the names must match exactly."""
    import torch

    named = {name: torch.tensor(values) for name, values in by_original_name(params, kind).items()}
    wanted = dict(module.named_parameters())
    assert sorted(named) == sorted(wanted)
    module.load_state_dict(named, strict=False)
    return module.eval()


def to_torch(values, grad: bool = False):
    """Copy an array to a tensor; None stays None."""
    import torch

    if values is None:
        return None
    return torch.tensor(np.asarray(values), requires_grad=grad)


def output_and_gradients(call, inputs, cotangent, module=None):
    """Run `call(*inputs)` in torch and pull back `cotangent`.

    Returns the output, the gradients of the inputs (None where an input is None), and those of the module's
    parameters by name.
    """
    tensors = [to_torch(values, grad=True) for values in inputs]
    out = call(*tensors)
    out.backward(to_torch(cotangent))
    gradients = [None if tensor is None else tensor.grad.numpy() for tensor in tensors]
    named = {} if module is None else {name: p.grad.numpy() for name, p in module.named_parameters()}
    return out.detach().numpy(), gradients, named
