"""Constants of all kernels."""

import jax.numpy as jnp
import numpy as np

FLOAT32 = jnp.float32
LEAST = float(jnp.finfo(FLOAT32).min)  # the least finite number
LN_2, LOG2_E = float(np.log(2)), float(np.log2(np.e))
