"""Scripts that show the library at work, `enwik8` and `from_torch`, what the first is made of, and `recipes`."""
