"""Try the installed package by itself, outside the repository: attention, a model, generation and decoding."""

import sys
from importlib import metadata, util

import jax
import jax.numpy as jnp
import numpy as np

import flax_local_attention
from flax_local_attention import LocalTransformer, Window, generate, local_attention

DISTRIBUTION = "flax-local-attention"


def check_files():
    """Check that the package came as a wheel of typed code and nothing else."""
    files = metadata.files(DISTRIBUTION)
    folders = {path.parts[0] for path in files}
    version = metadata.version(DISTRIBUTION)
    assert folders == {"flax_local_attention", f"flax_local_attention-{version}.dist-info"}, folders
    assert "flax_local_attention/py.typed" in map(str, files)
    assert flax_local_attention.__version__ == version
    assert "site-packages" in flax_local_attention.__file__
    assert not [name for name in ("tests", "examples", "benchmarks") if util.find_spec(name)]


def check_attention():
    """Compare attention and its gradient with the dense definition."""
    q, k, v, cotangent = jax.random.normal(jax.random.key(0), (4, 2, 3, 61, 8))

    def attend(implementation):
        def run(q, k, v):
            return local_attention(q, k, v, window=Window.sliding(7), implementation=implementation)

        out, pullback = jax.vjp(jax.jit(run), q, k, v)
        return out, pullback(cotangent)

    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), attend(None), attend("dense"))


def check_model():
    """Compare a model's decoding with its forward pass, and generate from it."""
    model = LocalTransformer(
        num_tokens=17,
        max_seq_len=64,
        dim=16,
        depth=1,
        heads=2,
        dim_head=8,
        local_attn_window_size=5,
        num_residual_streams=1,
    )
    tokens = jax.random.randint(jax.random.key(1), (2, 13), 0, 17)
    variables = jax.jit(model.init)(jax.random.key(2), tokens)
    apply = jax.jit(model.apply, static_argnames="return_loss")
    loss, gradient = jax.value_and_grad(apply)(variables, tokens, return_loss=True)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((loss, gradient)))

    logits, cache, steps = apply(variables, tokens), model.init_cache(batch=2), []
    for token in jnp.split(tokens, 13, axis=1):
        step, cache = apply(variables, token, cache=cache)
        steps.append(step)
    np.testing.assert_allclose(jnp.concatenate(steps, axis=1), logits, atol=1e-5)

    new, lengths = generate(model, variables, tokens, 6, temperature=0.0)
    assert new.shape == (2, 6)
    assert lengths.tolist() == [6, 6]
    assert new[:, 0].tolist() == logits[:, -1].argmax(axis=-1).tolist()


check_files()
check_attention()
check_model()
python = sys.version.split()[0]
print(f"flax_local_attention {flax_local_attention.__version__} works on Python {python} with JAX {jax.__version__}")
