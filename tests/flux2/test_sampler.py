from __future__ import annotations

import dataclasses

import mlx.core as mx
import pytest

from stages.flux2.flow import inference_mu, interpolate, pack, sigmas, training_mu, unpack, velocity
from stages.flux2.sampler import Sampling, initial_noise, sample, uses_empty_prompt
from stages.flux2.transformer import Transformer
from tests.golden import tiny

# Latents of whole runs against diffusers 0.42.1's pipelines, float32; measured 5e-6.
LATENT_BOUND = 5e-5


@pytest.mark.parametrize("tokens", [1024, 4096, 4300, 4301])
@pytest.mark.parametrize("steps", [1, 4, 28, 50])
def test_noise_levels_are_those_of_diffusers(tokens: int, steps: int) -> None:
    expected = tiny.arrays("flow")[f"sigmas_{tokens}_{steps}"]
    assert tiny.error(mx.array(sigmas(tokens, steps)), expected) <= 1e-6


def test_inference_shift_jumps_above_4300_tokens_as_the_reference_does() -> None:
    assert inference_mu(4300, 4) == pytest.approx(2.308478, abs=1e-6)
    assert inference_mu(4301, 4) == inference_mu(4301, 50) == pytest.approx(1.184697, abs=1e-6)


def test_training_shift_is_linear_in_tokens() -> None:
    assert [training_mu(tokens) for tokens in (256, 1024, 4096)] == pytest.approx([0.5, 0.63, 1.15])


def test_time_one_is_noise_and_the_velocity_leads_there() -> None:
    latents, noise = mx.random.normal((2, 3, 2, 2)), mx.random.normal((2, 3, 2, 2))
    assert mx.array_equal(interpolate(latents, noise, mx.array([0.0, 1.0])), mx.stack([latents[0], noise[1]]))
    halfway = interpolate(latents, noise, mx.array([0.5, 0.5]))
    assert tiny.error(halfway + 0.5 * velocity(latents, noise), noise) <= 1e-6


def test_tokens_are_packed_row_by_row() -> None:
    latents = mx.arange(2 * 6).reshape(1, 2, 2, 3)
    assert pack(latents)[0, 4].tolist() == [4, 10]
    assert mx.array_equal(unpack(pack(latents), 2, 3), latents)


@pytest.mark.parametrize(
    ("name", "sampling"),
    [
        ("distilled", Sampling(steps=4, guidance=4.0, distilled=True)),
        ("guided", Sampling(steps=6, guidance=4.0, distilled=False)),
    ],
)
def test_drawn_latent_is_that_of_diffusers(name: str, sampling: Sampling) -> None:
    golden = tiny.arrays("flow")
    finished: list[int] = []
    found = sample(
        tiny.transformer("klein"), golden["noise"], golden["txt"], golden["empty"], sampling, finished.append
    )
    assert tiny.error(found, golden[name]) <= LATENT_BOUND
    assert finished == list(range(1, sampling.steps + 1))


def test_drawn_latent_of_dev_with_embedded_guidance_is_that_of_diffusers() -> None:
    golden, dev = tiny.arrays("dev"), tiny.transformer("dev", tiny.DEV)
    found = sample(dev, golden["noise"], golden["txt"], None, Sampling(6, 4.0, distilled=False))
    assert tiny.error(found, golden["drawn"]) <= LATENT_BOUND


def test_only_base_variants_without_embedded_guidance_need_the_empty_prompt() -> None:
    base = Transformer(tiny.KLEIN)
    dev = Transformer(tiny.DEV)
    guided = Sampling(steps=4, guidance=4.0, distilled=False)
    assert uses_empty_prompt(base, guided)
    assert not uses_empty_prompt(dev, guided)
    assert not uses_empty_prompt(base, dataclasses.replace(guided, distilled=True))
    assert not uses_empty_prompt(base, dataclasses.replace(guided, guidance=1.0))


def test_guidance_without_the_empty_prompt_is_refused() -> None:
    golden = tiny.arrays("flow")
    with pytest.raises(ValueError, match="empty prompt"):
        sample(tiny.transformer("klein"), golden["noise"], golden["txt"], None, Sampling(2, 4.0, distilled=False))


def test_embedded_guidance_changes_the_latent() -> None:
    golden = tiny.arrays("flow")
    dev = tiny.transformer("dev", tiny.DEV)
    low, high = (
        sample(dev, golden["noise"], golden["txt"], None, Sampling(2, guidance, distilled=False))
        for guidance in (1.0, 4.0)
    )
    assert tiny.error(low, high) > 1e-3


def test_noise_of_a_seed_is_always_the_same() -> None:
    noise = initial_noise(42, 8, 3, 5)
    assert noise.shape == (1, 8, 3, 5)
    assert mx.array_equal(noise, initial_noise(42, 8, 3, 5))
    assert not mx.array_equal(noise, initial_noise(43, 8, 3, 5))
