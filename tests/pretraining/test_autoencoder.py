"""The small autoencoder: its loss, and weights that are spread, rounded and whitened after training."""

from __future__ import annotations

from typing import Any, cast

import mlx.core as mx
import numpy as np
import pytest

from schemas.pretrain import Autoencoder as Spec
from stages.flux2.autoencoder import Autoencoder
from stages.pretraining import autoencoder as making
from stages.pretraining.trainer import Trainer
from stages.world.render import from_bytes
from stages.world.scenes import palette
from tests.pretraining import tiny


def module_of(spec: Spec) -> Autoencoder:
    mx.random.seed(11)
    return Autoencoder(making.config_of(spec))


def value(**changes: Any) -> float:
    spec = tiny.recipe(**changes).autoencoder
    module, held = module_of(spec), making.pictures_of(tiny.recipe().autoencoder, 0)
    return cast(float, making.loss_of(module, spec, mx.float32)(mx.random.key(1), held[0][:4]).item())


def test_pools_hold_things_and_then_wide_scenes_of_their_size() -> None:
    spec = tiny.recipe(wide=0.5).autoencoder
    held = making.pictures_of(spec, 0)
    assert [array.shape for array in held] == [(24, 32, 32, 3), (8, 32, 48, 3)]
    named = np.rint(palette().reshape(-1, 3) * 255)
    corners = np.array(held[0])[:, 0, 0]
    known = (np.abs(corners[:, None] - named).max(axis=-1) <= 1).any(axis=1)
    assert known[:12].all()
    assert 0 < known[12:].mean() < 1
    for wide in (0.0, 1.0):
        (only, _) = making.pictures_of(tiny.recipe(wide=wide).autoencoder, 0)
        assert only.shape == held[0].shape
    assert not np.array_equal(np.array(held[0]), np.array(making.pictures_of(spec, 1)[0]))


def test_loss_falls_and_gradients_reach_both_halves() -> None:
    own = tiny.recipe(learning_rate=5e-3)
    module = module_of(own.autoencoder)
    before = [np.array(module.encoder.conv_in.weight), np.array(module.decoder.conv_out.weight)]
    held = making.pictures_of(own.autoencoder, 0)
    trainer = Trainer(module, making.loss_of(module, own.autoencoder, mx.float32), own.autoencoder, own)
    draw = making.draws(trainer.schedule, held)
    first = trainer.step(5e-3, mx.random.key(0), draw(0, 0)).item()
    for step in range(30):
        last = trainer.step(5e-3, mx.random.key(step), draw(0, 0)).item()
    assert last < 0.8 * first
    trainer.assign_average()
    after = [np.array(module.encoder.conv_in.weight), np.array(module.decoder.conv_out.weight)]
    assert not any(np.array_equal(*pair) for pair in zip(before, after, strict=True))


def test_edges_and_kl_count_by_their_weights() -> None:
    plain = value(edges=0.0, kl=0.0)
    for name in ("edges", "kl"):
        once, twice = (value(**{"edges": 0.0, "kl": 0.0, name: weight}) - plain for weight in (1.0, 2.0))
        assert once > 1e-3
        assert twice == pytest.approx(2 * once, rel=1e-3)


def test_spreading_gives_every_channel_its_own_scale_and_changes_no_picture() -> None:
    spec = tiny.recipe(latent_channels=6).autoencoder
    module = module_of(spec)
    pictures = from_bytes(making.pictures_of(spec, 0)[0])

    def mean() -> mx.array:
        return module.encoder(pictures)[..., :6]

    before, found = module.decoder(mean()), mean()
    logvars = module.encoder(pictures)[..., 6:]
    making.spread(module, mx.sqrt(found.var(axis=(0, 1, 2))))
    spread = np.array(mean().std(axis=(0, 1, 2)))
    ratio = spread / np.resize(making.DEVIATIONS, 6)
    assert ((ratio > 0.7) & (ratio < 1.42)).all()
    np.testing.assert_allclose(np.array(module.decoder(mean())), np.array(before), atol=1e-4)
    moved = module.encoder(pictures)[..., 6:] - logvars
    expected = 2 * np.log(spread / np.array(found.std(axis=(0, 1, 2))))
    np.testing.assert_allclose(np.array(moved.mean(axis=(0, 1, 2))), expected, atol=1e-3)


def test_kept_weights_are_bfloat16_and_whiten_what_they_were_measured_on() -> None:
    own = tiny.recipe(latent_channels=4)
    module = module_of(own.autoencoder)
    pictures = making.measured_pictures(own, 20)
    deviations = making.finish(module, pictures)
    assert len(deviations) == 4
    assert min(deviations) > 0
    for half in (module.encoder, module.decoder):
        weight = half.conv_in.weight
        np.testing.assert_array_equal(np.array(weight), np.array(weight.astype(mx.bfloat16).astype(mx.float32)))
    latents = making.encoded(module, pictures)
    assert latents.shape == (20, 16, 2, 2)
    np.testing.assert_allclose(np.array(latents.mean(axis=(0, 2, 3))), 0, atol=1e-3)
    # The batch norm's epsilon shrinks small channels a little.
    np.testing.assert_allclose(np.array(latents.var(axis=(0, 2, 3))), 1, atol=0.01)
    assert module.bn.running_var.max().item() > 50 * module.bn.running_var.min().item()


def test_pictures_are_the_same_however_many_are_encoded_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    own = tiny.recipe()
    module, held = module_of(own.autoencoder), making.pictures_of(own.autoencoder, 0)[0]
    whole = making.decoded(module, making.encoded(module, held))
    monkeypatch.setattr(making, "ENCODE_PIXELS", 5 * 32 * 32)
    again = making.decoded(module, making.encoded(module, held))
    assert whole.shape == (24, 32, 32, 3)
    np.testing.assert_allclose(np.array(again), np.array(whole), atol=1e-4)
