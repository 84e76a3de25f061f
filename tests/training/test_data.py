"""What training reads: the right record for each sample, one window ahead, nothing damaged or undefined."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from schemas.errors import Damaged
from stages.dataset.draws import Draw
from stages.stores.embeddings import write_embeddings
from stages.stores.latents import write_latents
from stages.stores.tensors import from_mlx
from stages.training.data import Sample, TrainingData, ahead, widened
from tests.training import corpus


@pytest.fixture
def tables(tmp_path: Path) -> corpus.Tables:
    return corpus.write(tmp_path)


@pytest.fixture
def data(tmp_path: Path, tables: corpus.Tables) -> TrainingData:
    return corpus.data(tmp_path, tables)


def test_batch_holds_latents_and_captions_of_its_samples_in_order(data: TrainingData) -> None:
    batch = data.read([Sample("item-b", flip=False, dropped=False), Sample("item-a", flip=False, dropped=False)])
    assert np.array_equal(batch.latents, [corpus.latent("item-b"), corpus.latent("item-a")])
    assert np.array_equal(batch.text, [corpus.embedding("item-b"), corpus.embedding("item-a")])
    assert batch.latents.dtype == batch.text.dtype == np.float32


def test_mirrored_sample_is_the_twin_and_a_dropped_caption_the_empty_one(data: TrainingData) -> None:
    batch = data.read([Sample("item-a", flip=True, dropped=True)])
    assert np.array_equal(batch.latents[0], corpus.latent("item-a", flip=True))
    assert np.array_equal(batch.text[0], corpus.embedding(corpus.EMPTY))


def test_caption_variants_of_a_picture_share_its_draws(tmp_path: Path, tables: corpus.Tables) -> None:
    same = Draw(item_id="item-b", picture="item-a", times=2), Draw(item_id="item-a", picture="item-a", times=2)
    tables = replace(tables, draws={**tables.draws, **{draw.item_id: draw for draw in same}})
    data = corpus.data(tmp_path, tables)
    assert sorted(name for name, _ in data.buckets) == ["item-a", "item-a*1", "item-c", "item-d", "item-e"]
    samples = [Sample("item-a*1", flip=False, dropped=False, caption=share) for share in (0.1, 0.9)]
    batch = data.read(samples)
    assert np.array_equal(batch.latents, [corpus.latent("item-a")] * 2)
    assert np.array_equal(batch.text, [corpus.embedding("item-a"), corpus.embedding("item-b")])


def test_buckets_count_each_item_once(data: TrainingData) -> None:
    assert sorted(data.buckets) == sorted(corpus.SHAPES.items())
    assert data.flips


def test_no_twins_means_no_flips(tmp_path: Path) -> None:
    assert not corpus.data(tmp_path, corpus.write(tmp_path, flips=False)).flips


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_undefined_latent_is_refused_by_the_name_of_its_item(tmp_path: Path, value: float) -> None:
    tables = corpus.write(tmp_path)
    wrong = corpus.latent("item-a")
    wrong[0, 0, 0] = value
    [row] = write_latents(tmp_path, [(corpus.key("wrong"), wrong)], "float32")
    [first] = [each for each in tables.latents if each["item_id"] == "item-a" and not each["flip"]]
    first.update({name: getattr(row, name) for name in ("latent_key", "fragment", "row", "sha256")})
    with pytest.raises(Damaged, match="item-a"):
        corpus.data(tmp_path, tables).read([Sample("item-a", flip=False, dropped=False)])


@pytest.mark.parametrize("dropped", [False, True])
def test_undefined_embedding_is_refused_by_its_key(tmp_path: Path, *, dropped: bool) -> None:
    tables = corpus.write(tmp_path)
    wrong = corpus.embedding("item-a")
    wrong[0, 0] = np.nan
    [row] = write_embeddings(tmp_path, [(corpus.key("wrong"), corpus.LENGTH, wrong)], "float32")
    name = corpus.EMPTY if dropped else "item-a"
    [first] = [each for each in tables.embeddings if each["caption_id"] == name]
    first.update({name: getattr(row, name) for name in ("embedding_key", "fragment", "row", "sha256")})
    with pytest.raises(Damaged, match=rf"embeddings\.not_finite.*{corpus.key('wrong')}.*encode-text"):
        corpus.data(tmp_path, tables).read([Sample("item-a", flip=False, dropped=dropped)])


def test_bfloat16_bits_widen_to_the_very_numbers() -> None:
    numbers = mx.array([0.0, -1.5, 3.140625, 1e-38, 65280.0], dtype=mx.bfloat16)
    assert np.array_equal(widened(from_mlx(numbers).data, "bfloat16"), np.array(numbers.astype(mx.float32)))
    plain = np.ones(3, np.float32)
    assert widened(plain, "float32") is plain


def test_reading_is_one_ahead_and_in_order() -> None:
    made: list[int] = []

    def make(index: int) -> int:
        made.append(index)
        return index

    coming = ahead(make, 3, 7)
    assert next(coming) == 3
    assert next(coming) == 4
    coming.close()
    assert made == [3, 4, 5]
    assert list(ahead(make, 3, 7)) == [3, 4, 5, 6]
    assert list(ahead(make, 7, 7)) == []


def test_error_of_the_reading_thread_reaches_the_training() -> None:
    def make(index: int) -> int:
        if index == 1:
            raise Damaged("latents.digest", "the record's bytes differ")
        return index

    coming = ahead(make, 0, 3)
    assert next(coming) == 0
    with pytest.raises(Damaged, match=r"latents\.digest"):
        next(coming)
