"""Write `golden/*.npz`: the original's outputs and gradients on small cases, for tests without torch.

    PYTHONPATH=. python tests/make_golden.py

Inputs and weights are not stored: both sides draw them from NumPy's `RandomState` (`tests/original.py`).
"""

import pathlib

import numpy as np

from flax_local_attention import DynamicPositionBias, FeedForward, LocalMHA, LocalTransformer
from flax_local_attention.residual_streams import HyperConnection
from tests.original import filled_variables, load, normal, output_and_gradients, to_torch

GOLDEN = pathlib.Path(__file__).parent / "golden"

ATTENTION = {
    "causal": ((1, 2, 10, 4), {"window_size": 5, "causal": True, "dim": 4}),
    "exact_xpos": (
        (2, 7, 4),
        {
            "window_size": 2,
            "causal": True,
            "exact_windowsize": True,
            "look_backward": 2,
            "autopad": True,
            "dim": 4,
            "use_xpos": True,
        },
    ),
    "both_shared": ((1, 2, 9, 4), {"window_size": 3, "look_backward": 0, "shared_qk": True, "scale": 0.3}),
    "forward": ((2, 10, 4), {"window_size": 5, "look_forward": 1, "dim": 4, "reference_rotary": True}),
    "exact_forward": (
        (2, 9, 4),
        {
            "window_size": 3,
            "look_backward": 0,
            "look_forward": 2,
            "exact_windowsize": True,
            "dim": 4,
            "reference_rotary": True,
        },
    ),
}
"""The shape of q, k and v, and our fields of `LocalAttention`; the original has all but `reference_rotary`.

Windows that look forward divide the length: otherwise queries of the original see its padding.
"""

MHA = {
    "dim": 6,
    "window_size": 4,
    "dim_head": 4,
    "heads": 2,
    "causal": True,
    "prenorm": True,
    "qk_rmsnorm": True,
    "gate_values_per_head": True,
}
FEED_FORWARD = {"dim": 7, "mult": 3}
POSITION_BIAS = {"dim": 5, "heads": 2}
STREAMS = {"num_streams": 3, "dim": 6, "index": 1}
TRANSFORMER = {
    "num_tokens": 11,
    "max_seq_len": 16,
    "dim": 8,
    "depth": 2,
    "dim_head": 4,
    "heads": 2,
    "local_attn_window_size": 3,
}


def transformer_tokens() -> np.ndarray:
    """Draw tokens [b, n]; the last label of the first row is the ignored one."""
    tokens = np.random.RandomState(0).randint(0, TRANSFORMER["num_tokens"], (2, 8))
    tokens[0, -1] = -1
    return tokens


def attention() -> dict[str, np.ndarray]:
    """Compute the output and the gradients of every case of `ATTENTION`, stacked."""
    from local_attention import LocalAttention

    golden = {}
    for name, (shape, options) in ATTENTION.items():
        q, k, v, cotangent = (normal(seed, *shape) for seed in range(4))
        fields = {field: value for field, value in options.items() if field != "reference_rotary"}
        out, gradients, _ = output_and_gradients(LocalAttention(**fields), (q, k, v), cotangent)
        golden[name] = np.stack([out, *gradients])
    return golden


def modules() -> dict[str, np.ndarray]:
    """Compute the outputs of the modules, and the transformer's logits and loss."""
    from local_attention import DynamicPositionBias as TheirBias
    from local_attention import LocalMHA as TheirMHA
    from local_attention import LocalTransformer as TheirTransformer
    from local_attention.transformer import FeedForward as TheirFeedForward

    def run(ours, theirs, kind, inputs, options=None):
        load(theirs, filled_variables(ours, *inputs)["params"], kind)
        tensors = [to_torch(x) if isinstance(x, np.ndarray) else x for x in inputs]
        return theirs(*tensors, **(options or {})).detach().numpy()

    x, tokens = normal(0, 2, 7, 6), transformer_tokens()
    model = LocalTransformer(**TRANSFORMER), TheirTransformer(**TRANSFORMER), "LocalTransformer"
    return {
        "mha": run(LocalMHA(**MHA), TheirMHA(**MHA), "LocalMHA", [x]),
        "feed_forward": run(
            FeedForward(**FEED_FORWARD), TheirFeedForward(**FEED_FORWARD), "FeedForward", [normal(0, 3, 7)]
        ),
        "position_bias": run(
            DynamicPositionBias(**POSITION_BIAS), TheirBias(**POSITION_BIAS), "DynamicPositionBias", [3, 6]
        ),
        "logits": run(*model, [tokens[:, :-1]]),
        "streams": streams(),
        "loss": run(*model, [tokens], {"return_loss": True}),
    }


def streams() -> np.ndarray:
    """Compute streams [r, b, n, e] after a hyper-connection whose branch is the sine."""
    from hyper_connections import HyperConnections

    r, e = STREAMS["num_streams"], STREAMS["dim"]
    residual = normal(0, r, 2, 4, e)
    variables = filled_variables(HyperConnection(**STREAMS), residual)
    theirs = load(HyperConnections(r, dim=e), variables["params"], "HyperConnection")
    x, write = theirs(to_torch(residual).transpose(0, 1).flatten(0, 1))
    return write(x.sin()).unflatten(0, (2, r)).transpose(0, 1).detach().numpy()


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    np.savez_compressed(GOLDEN / "attention.npz", **attention())
    np.savez_compressed(GOLDEN / "modules.npz", **modules())
