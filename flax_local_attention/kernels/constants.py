"""Numbers that all kernels use."""

import jax.numpy as jnp
import numpy as np

FLOAT32 = jnp.float32
LEAST = float(jnp.finfo(FLOAT32).min)
LN_2, LOG2_E = float(np.log(2)), float(np.log2(np.e))
