"""The autoencoder against diffusers' (AutoencoderKLFlux2 0.42.1, float32, random weights and statistics)."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from stages.flux2 import configs, names, weights
from stages.flux2.autoencoder import Autoencoder, patchify, unpatchify
from stages.flux2.shapes import autoencoder_shapes
from stages.flux2.variants import AutoencoderConfig
from tests.golden.tiny import GOLDEN, arrays

# max |a - b| / max |b|; measured 3e-7 to 3e-6 (5e-6 with OpenBLAS).
BOUND = 1e-5


def load(name: str, *, encoder: bool = True, decoder: bool = True) -> Autoencoder:
    folder = GOLDEN / f"tiny-{name}" / "vae"
    config = configs.read_autoencoder(folder / "config.json")
    layout = weights.resolve(
        [folder / "diffusion_pytorch_model.safetensors"],
        autoencoder_shapes(config, encoder=encoder, decoder=decoder),
        names.autoencoder(config, encoder=encoder, decoder=decoder),
    )
    model = Autoencoder(config, encoder=encoder, decoder=decoder)
    model.load_weights(list(weights.load(layout, mx.float32)), strict=True)
    return model


def error(got: mx.array, expected: mx.array) -> float:
    assert got.shape == expected.shape
    assert got.dtype == mx.float32
    return (mx.abs(got - expected).max() / mx.abs(expected).max()).item()


@pytest.mark.parametrize("name", ["klein", "dev"])
def test_encoded_pictures_equal_diffusers(name: str) -> None:
    golden = arrays("autoencoder")
    assert error(load(name, decoder=False).encode(golden["pictures"]), golden[f"{name}_encoded"]) < BOUND


@pytest.mark.parametrize("name", ["klein", "dev"])
def test_decoded_latents_equal_diffusers(name: str) -> None:
    golden = arrays("autoencoder")
    assert error(load(name, encoder=False).decode(golden["latents"]), golden[f"{name}_decoded"]) < BOUND


def test_attention_in_pieces_equals_attention_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    golden = arrays("autoencoder")
    model = load("klein")
    monkeypatch.setattr("stages.flux2.autoencoder.QUERY_ROWS", 7)
    assert error(model.encode(golden["pictures"]), golden["klein_encoded"]) < BOUND


def test_patch_channel_is_four_times_channel_plus_two_rows_plus_column() -> None:
    latents = np.arange(2 * 4 * 6 * 3).reshape(2, 4, 6, 3)
    patches = np.array(patchify(mx.array(latents)))
    for channel, row, column in np.ndindex(3, 2, 2):
        np.testing.assert_array_equal(
            patches[:, 4 * channel + 2 * row + column], latents[:, row::2, column::2, channel]
        )
    np.testing.assert_array_equal(np.array(unpatchify(mx.array(patches))), latents)


def test_published_configuration_has_the_published_parameter_count() -> None:
    def count(model: Autoencoder) -> int:
        return sum(array.size for name, array in tree_flatten(model.parameters()) if not name.startswith("bn."))

    config = AutoencoderConfig()
    assert count(Autoencoder(config, decoder=False)) == 34_421_696 + 64 * 64 + 64  # with quant_conv
    assert count(Autoencoder(config)) == 84_046_115


def test_halves_hold_only_their_own_parameters() -> None:
    config = AutoencoderConfig(block_out_channels=(4, 8), norm_num_groups=4)
    encoder = {name.split(".")[0] for name, _ in tree_flatten(Autoencoder(config, decoder=False).parameters())}
    decoder = {name.split(".")[0] for name, _ in tree_flatten(Autoencoder(config, encoder=False).parameters())}
    assert (encoder, decoder) == ({"encoder", "bn"}, {"decoder", "bn"})


def test_picture_of_odd_sides_is_refused() -> None:
    with pytest.raises(ValueError, match="multiples of 16"):
        load("klein").encode(mx.zeros((1, 3, 40, 32)))
