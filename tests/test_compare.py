"""A score is compared with baselines on the same bytes, and with published ones only where that is fair."""

import hashlib
import re

import numpy as np
import pytest

from examples import compare, corpus
from examples.compare import COMPRESSORS, PUBLISHED

NOISE = np.random.default_rng(3).integers(0, 256, 20_000, dtype=np.uint8)
TEXT = np.frombuffer(b"the quick brown fox jumps over the lazy dog. " * 40, np.uint8)


@pytest.mark.parametrize("name", COMPRESSORS)
def test_noise_costs_its_eight_bits_and_what_was_seen_before_almost_none(name):
    compress = COMPRESSORS[name]
    assert 8 <= compare.compressed_bits(NOISE[:9000], NOISE[9000:], compress) < 8.1
    assert compare.compressed_bits(NOISE[:9000], NOISE, compress) < 0.5


@pytest.mark.parametrize("name", COMPRESSORS)
def test_only_the_last_bytes_before_are_seen(name, monkeypatch):
    monkeypatch.setattr(compare, "BEFORE_LIMIT", 11_000)
    assert compare.compressed_bits(NOISE[:9000], NOISE, COMPRESSORS[name]) > 7.9
    assert compare.compressed_bits(NOISE[11_000:], NOISE, COMPRESSORS[name]) < 0.5


@pytest.mark.parametrize("name", COMPRESSORS)
def test_without_bytes_before_text_costs_what_it_takes_alone(name):
    empty, alone = (len(COMPRESSORS[name](data)) for data in (b"", TEXT.tobytes()))
    got = compare.compressed_bits(TEXT, TEXT[:0], COMPRESSORS[name])
    assert got == pytest.approx((alone - empty) * 8 / len(TEXT))


def test_too_many_bytes_are_not_compressed(monkeypatch):
    assert set(compare.compress_all(TEXT, NOISE)) == set(COMPRESSORS)
    monkeypatch.setattr(compare, "DATA_LIMIT", len(TEXT) - 1)
    assert compare.compress_all(TEXT, NOISE) == {}


def test_the_xz_dictionary_covers_all_it_is_given():
    assert compare.BEFORE_LIMIT + compare.DATA_LIMIT <= 16 * 2**20  # preset 7


FIGURES = {"gzip": 2.806, "xz": 2.068}


def test_all_of_enwik8_is_set_beside_the_nearest_published_model():
    line = compare.describe_score(1.0321, "test", FIGURES, "whole")
    assert line == ("test 1.032; gzip 2.81, xz 2.07 given earlier bytes; published: Transformer-XL 88M 1.03")


@pytest.mark.parametrize(("split", "part"), [("test", "start"), ("test", None), ("validation", "whole")])
def test_no_published_figure_stands_beside_one_of_other_bytes(split, part):
    line = compare.describe_score(2.6405, split, FIGURES, part)
    assert "published" not in line
    assert not any(result.model in line for result in PUBLISHED)
    assert line.startswith(f"{split} 2.64")


@pytest.mark.parametrize(
    ("part", "is_demo", "expected"), [("start", True, True), ("start", False, False), (None, True, False)]
)
def test_the_originals_figure_stands_beside_one_of_the_same_bytes_and_sizes(part, is_demo, expected):
    line = compare.describe_score(2.6405, "test", FIGURES, part, is_demo)
    assert line.endswith(f"; the original's trainer {compare.ORIGINAL_BITS}") == expected


@pytest.mark.parametrize("part", ["whole", "start", None])
@pytest.mark.parametrize("split", ["test", "validation"])
def test_every_figure_and_its_place_fit_on_a_line(split, part):
    for bits in [result.bits for result in PUBLISHED] + [8.271, 12.5, float("nan")]:
        line = compare.describe_score(bits, split, {"gzip": 8.004, "xz": 8.001}, part, is_demo=True)
        assert len(line) <= 90
        assert "\n" not in line
    assert compare.describe_score(2.5, split, {}, None) == f"{split} 2.500"


def test_published_results_are_of_the_magnitude_known_and_name_their_source():
    assert all(0.9 < result.bits < 1.2 for result in PUBLISHED)
    assert all(re.search(r"arXiv:\d{4}\.\d{5}", result.source) for result in PUBLISHED)
    assert len({result[:2] for result in PUBLISHED}) == len(PUBLISHED)


def test_enwik8_and_its_start_are_known_by_their_bytes(monkeypatch):
    assert corpus.enwik8_part(TEXT) is None
    monkeypatch.setattr(corpus, "SIZE", len(NOISE))
    monkeypatch.setattr(corpus, "SHA256", hashlib.sha256(NOISE).hexdigest())
    monkeypatch.setattr(corpus, "START_SIZE", 500)
    monkeypatch.setattr(corpus, "START_SHA256", hashlib.sha256(NOISE[:500]).hexdigest())
    changed = NOISE.copy()
    changed[-1] ^= 1
    lengths = {len(NOISE): "whole", len(NOISE) - 1: "start", 500: "start", 499: None}
    assert {length: corpus.enwik8_part(NOISE[:length]) for length in lengths} == lengths
    assert corpus.enwik8_part(changed) is None
    assert corpus.enwik8_part(NOISE[1:]) is None
    assert corpus.enwik8_part(np.append(NOISE, NOISE)) is None
