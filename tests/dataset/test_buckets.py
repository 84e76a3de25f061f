from __future__ import annotations

import random

import pytest

from stages.dataset.buckets import MAX_ASPECT, MIN_SIDE_PX, choose, fills, grid, shape_fault, step_px

SIZES = (64, 96, 128, 256, 512, 768, 1024, 1536)


def drawn(count: int) -> list[tuple[int, int, tuple[int, ...]]]:
    """Random pictures that `shape_fault` lets pass, each with one to three resolutions."""
    rng = random.Random(7)
    cases: list[tuple[int, int, tuple[int, ...]]] = []
    while len(cases) < count:
        width, height = (round(2 ** rng.uniform(5, 12)) for _ in range(2))
        if shape_fault("", width, height) is None:
            cases.append((width, height, tuple(rng.sample(SIZES, rng.randint(1, 3)))))
    return cases


CASES = drawn(1500)


@pytest.mark.parametrize("upscale", [False, True])
def test_sides_are_multiples_of_16_and_areas_stay_under_the_largest_resolution(*, upscale: bool) -> None:
    for width, height, sizes in CASES:
        for bucket in choose(width, height, sizes, upscale=upscale, text_length=512):
            assert bucket.width % 16 == bucket.height % 16 == 0
            assert min(bucket.width, bucket.height) >= MIN_SIDE_PX
            assert bucket.width * bucket.height <= max(sizes) ** 2


def test_nothing_is_ever_enlarged_unless_asked() -> None:
    for width, height, sizes in CASES:
        for bucket in choose(width, height, sizes, upscale=False, text_length=512):
            x0, y0, x1, y1 = bucket.crop
            assert x1 - x0 >= bucket.width
            assert y1 - y0 >= bucket.height


def test_crop_is_centred_inside_the_picture_and_has_the_buckets_aspect_within_a_pixel() -> None:
    for width, height, sizes in CASES:
        for bucket in choose(width, height, sizes, upscale=True, text_length=512):
            x0, y0, x1, y1 = bucket.crop
            assert 0 <= x0 < x1 <= width
            assert 0 <= y0 < y1 <= height
            assert width - x1 - x0 in (0, 1)
            assert height - y1 - y0 in (0, 1)
            crop_width, crop_height = x1 - x0, y1 - y0
            assert crop_width == width or crop_height == height
            exact_width, exact_height = height * bucket.width / bucket.height, width * bucket.height / bucket.width
            assert abs(crop_width - min(width, exact_width)) < 1
            assert abs(crop_height - min(height, exact_height)) < 1


def test_each_filled_resolution_gives_its_own_bucket_of_at_least_three_quarters_of_the_area() -> None:
    for width, height, sizes in CASES:
        filled = [size for size in sorted(sizes) if fills(width, height, size)]
        buckets = choose(width, height, sizes, upscale=False, text_length=512)
        if filled:
            assert len(buckets) <= len(filled)
            assert all(any(0.75 * s * s <= b.width * b.height <= s * s for s in filled) for b in buckets)


def test_photo_formats_lose_at_most_a_tenth_and_square_ones_nothing() -> None:
    for resolution in (256, 512, 768, 1024):
        for width, height in ((6000, 6000), (6000, 4500), (6000, 4000), (6400, 3600), (3600, 6400)):
            (bucket,) = choose(width, height, (resolution,), upscale=False, text_length=512)
            x0, y0, x1, y1 = bucket.crop
            assert (x1 - x0) * (y1 - y0) >= 0.9 * width * height
    (square,) = choose(3000, 3000, (768,), upscale=False, text_length=512)
    assert (square.width, square.height) == (768, 768)


def test_pictures_of_like_shape_share_few_buckets() -> None:
    rng = random.Random(3)
    shapes = set()
    for _ in range(500):
        aspect = 2 ** rng.uniform(-1, 1)
        (bucket,) = choose(
            round(4000 * aspect**0.5), round(4000 / aspect**0.5), (512,), upscale=False, text_length=512
        )
        shapes.add((bucket.width, bucket.height))
    assert len(shapes) <= 11


def test_picture_joins_only_the_sizes_it_can_fill() -> None:
    joined = [(b.width, b.height) for b in choose(700, 700, (1024, 512, 768), upscale=False, text_length=512)]
    assert joined == [(512, 512)]
    joined = [(b.width, b.height) for b in choose(700, 700, (1024, 512, 768), upscale=True, text_length=512)]
    assert joined == [(512, 512), (768, 768), (1024, 1024)]


def test_picture_too_small_for_every_size_keeps_its_own_rounded_down() -> None:
    assert not fills(333, 250, 512)
    (bucket,) = choose(333, 250, (512, 768), upscale=False, text_length=512)
    assert (bucket.width, bucket.height, bucket.crop) == (320, 240, (0, 0, 333, 249))


def test_nearly_equal_shapes_are_decided_by_the_token_count() -> None:
    (plain,) = choose(6000, 4500, (1536,), upscale=False, text_length=511)
    (fused,) = choose(6000, 4500, (1536,), upscale=False, text_length=512)
    assert (plain.width, plain.height) == (1728, 1344)
    assert (fused.width, fused.height) == (1792, 1280)
    assert (fused.width // 16 * (fused.height // 16) + 512) % 128 == 0


def test_long_strip_that_misses_every_bucket_stays_under_the_area() -> None:
    assert not fills(2370, 311, 848)
    (bucket,) = choose(2370, 311, (848,), upscale=False, text_length=512)
    assert bucket.width * bucket.height <= 848**2


def test_long_and_tiny_pictures_are_faults() -> None:
    too_long, too_small = shape_fault("a.png", 801, 100), shape_fault("a.png", 31, 100)
    assert too_long is not None
    assert too_long.code == "picture.too_long"
    assert too_small is not None
    assert too_small.code == "picture.too_small"
    assert shape_fault("a.png", 800, 100) is None
    assert shape_fault("a.png", 32, 32) is None


def test_grid_is_symmetric_and_within_its_bounds() -> None:
    for resolution in (32, 48, *SIZES):
        shapes = grid(resolution)
        assert {(height, width) for width, height in shapes} == set(shapes)
        for width, height in shapes:
            assert width % step_px(resolution) == 0
            assert max(width, height) <= MAX_ASPECT * min(width, height)
