"""Published models built from the public API of `flax_local_attention`, one file per model."""
