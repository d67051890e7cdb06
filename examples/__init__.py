"""Scripts that show the library at work, `enwik8` and `from_torch`, and what the first is made of."""
