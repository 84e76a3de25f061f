"""The small world: what is drawn is what the words say, and the judge reads it back from the pixels."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest

from stages.world.captions import captions, full_captions
from stages.world.judge import Judge, Score, Verdict, score
from stages.world.outlines import BASE, MOST_EDGES, NEW, padded, random_outline
from stages.world.render import from_bytes, in_chunks, render, to_bytes
from stages.world.scenes import (
    PLACES,
    PLAIN,
    SIZES,
    Scenes,
    Things,
    draw_things,
    held_out,
    joined,
    palette,
    scenes_of,
    things_of_shape,
    wide_scenes,
)

PERFECT = Score(*[1.0] * 7)


def generator() -> np.random.Generator:
    return np.random.default_rng(5)


@cache
def judge_of(height: int, width: int) -> Judge:
    return Judge({**BASE, **NEW}, height, width)


def verdicts(scenes: Scenes, height: int, width: int) -> list[Verdict]:
    judge = judge_of(height, width)
    return [judge.judge(picture) for picture in np.array(in_chunks(scenes, height, width, 16))]


@pytest.mark.parametrize(("height", "width"), [(64, 64), (96, 128)])
def test_judge_is_right_about_every_real_picture(height: int, width: int) -> None:
    things = draw_things(generator(), 48)
    found = verdicts(scenes_of(things, BASE, generator()), height, width)
    assert score(found, things, list(BASE)) == PERFECT


@pytest.mark.parametrize("name", NEW)
def test_judge_tells_every_new_shape_from_all_others(name: str) -> None:
    things = things_of_shape(generator(), 6)
    found = verdicts(scenes_of(things, {name: NEW[name]}, generator()), 64, 64)
    assert score(found, things, [name]) == PERFECT


def test_judge_names_no_thing_where_there_is_none_and_no_shape_where_none_fits() -> None:
    grey = np.full((64, 64, 3), 245, np.uint8)
    assert judge_of(64, 64).judge(grey) == Verdict(None, None, None, None, PLAIN, 6, 0.0)
    bar = grey.copy()
    bar[30:34, 4:60] = (222, 38, 38)
    found = judge_of(64, 64).judge(bar)
    assert (found.shape, found.colour, found.ground) == (None, 0, 6)


def test_score_counts_each_respect_for_itself_and_all_together() -> None:
    things = Things(*(np.array(pair) for pair in ([0, 1], [2, 3], [0, 1], [4, 5], [0, 1], [6, 7])))
    right = [Verdict("circle", 2, 0, 4, 0, 6, 0.9), Verdict("square", 3, 1, 5, 1, 7, 0.9)]
    assert score(right, things, ["circle", "square"]) == PERFECT
    wrong = [right[0], Verdict("circle", 3, 1, 4, 1, 7, 0.9)]
    found = score(wrong, things, ["circle", "square"])
    assert (found.shape, found.place, found.colour, found.all) == (0.5, 0.5, 1.0, 0.5)


def test_areas_are_those_of_geometry() -> None:
    """Coverage adds up to the shape's area: edges are smooth, not merely present."""
    radius, side = 0.3, 64
    scenes = scenes_of(Things(*(np.zeros(2, int) + each for each in (0, 6, 0, 4, 0, 7))), BASE, generator())
    shapes = np.stack([padded(BASE["square"]), padded(BASE["ring"])])[:, None]
    scenes = scenes._replace(edges=shapes, radii=np.full((2, 1), radius, np.float32))
    picture = np.array(render(scenes, side, side))
    light, dark = palette()[6, 0, 0] * 2 - 1, palette()[7, 0, 0] * 2 - 1
    covered = ((picture[..., 0] - dark) / (light - dark)).sum(axis=(1, 2))
    round_32, round_24 = (n / 2 * np.sin(2 * np.pi / n) for n in (32, 24))
    expected = (radius * side) ** 2 * np.array([(2 * 0.86) ** 2, round_32 - 0.55**2 * round_24])
    np.testing.assert_allclose(covered, expected, rtol=0.01)


def test_edges_without_length_draw_nothing() -> None:
    things = things_of_shape(generator(), 4)
    scenes = scenes_of(things, {"ell": NEW["ell"]}, generator())
    bare = scenes._replace(edges=scenes.edges[:, :, : len(NEW["ell"])])
    np.testing.assert_array_equal(np.array(render(scenes, 32, 32)), np.array(render(bare, 32, 32)))
    with pytest.raises(ValueError, match=f"at most {MOST_EDGES}"):
        padded(np.zeros((MOST_EDGES + 1, 4)))


def test_wide_scenes_show_several_things_in_any_colours() -> None:
    scenes = wide_scenes(generator(), 24)
    pictures = np.array(in_chunks(scenes, 32, 32, 24))
    assert ((scenes.radii > 0).sum(axis=1) >= 1).all()
    assert {1, 2, 3} == set((scenes.radii > 0).sum(axis=1).tolist())
    colours = np.unique(pictures.reshape(-1, 3), axis=0)
    named = np.round(palette().reshape(-1, 3) * 255)
    assert (np.abs(colours[:, None] - named).max(axis=-1).min(axis=1) > 8).mean() > 0.3


def test_scenes_of_fewer_layers_look_the_same_beside_others() -> None:
    things = draw_things(generator(), 3)
    base, wide = scenes_of(things, BASE, generator()), wide_scenes(generator(), 2)
    both = np.array(in_chunks(joined(base, wide), 32, 32, 8))
    np.testing.assert_array_equal(both[:3], np.array(in_chunks(base, 32, 32, 8)))
    np.testing.assert_array_equal(both[3:], np.array(in_chunks(wide, 32, 32, 8)))


def test_random_outlines_fill_their_radius_and_differ() -> None:
    rng = generator()
    outlines = [random_outline(rng) for _ in range(200)]
    assert all(np.abs(outline).max() == pytest.approx(1) for outline in outlines)
    assert len({outline.tobytes() for outline in outlines}) > 150


def test_held_out_triples_are_a_tenth_and_never_drawn_unless_asked_for() -> None:
    assert 0.08 < held_out().mean() < 0.12
    for unseen in (False, True):
        things = draw_things(generator(), 500, unseen=unseen)
        assert (held_out()[things.shape, things.colour, things.place] == unseen).all()
    assert held_out().any(axis=(1, 2)).all()


def test_things_and_captions_are_drawn_from_the_seed_alone() -> None:
    things = draw_things(generator(), 200)
    np.testing.assert_array_equal(np.stack(things), np.stack(draw_things(generator(), 200)))
    assert captions(things, generator()) == captions(things, generator())
    assert (things.colour != things.ground).all()


def test_captions_say_what_the_thing_is_mostly_in_full() -> None:
    things = draw_things(generator(), 400)
    said, full = captions(things, generator()), full_captions(things)
    assert 0.5 < np.mean([a == b for a, b in zip(said, full, strict=True)]) < 0.7
    for short, whole in zip(said, full, strict=True):
        assert set(short.split()) <= {*whole.split(), "with"}
    first = full_captions(Things(*(np.array([each]) for each in (1, 0, 2, 0, 1, 2))), "zorb")
    assert first == ["a large red zorb at the top left on a striped blue background"]


def test_things_stay_within_the_picture() -> None:
    scenes = scenes_of(draw_things(generator(), 500), BASE, generator())
    reach = np.abs(scenes.centres[:, 0] - 0.5).max(axis=1) + scenes.radii[:, 0]
    assert reach.max() < 0.5
    assert len(SIZES) * len(PLACES) == 18


def test_bytes_and_floats_are_the_same_picture() -> None:
    pictures = in_chunks(wide_scenes(generator(), 2), 32, 32, 2)
    np.testing.assert_array_equal(np.array(to_bytes(from_bytes(pictures))), np.array(pictures))
