"""Published models on the public API of `flax_local_attention`, one file a model."""
