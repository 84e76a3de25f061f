"""What pictures cannot show, numbers do: every break fails a comparison with what was recorded from the reference.

The comparisons are the very tests of tests/flux2 and tests/training, called on the broken code.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest

from schemas.train import Train
from stages.flux2.sampler import Sampling
from stages.lora.merge import attach
from tests.bars import Measured
from tests.flux2 import test_autoencoder, test_sampler, test_transformer
from tests.flux2.text import test_qwen3
from tests.golden import tiny
from tests.learning import breaks
from tests.training import test_objective

Comparison = Callable[[], None]


def training_loss() -> None:
    model = tiny.transformer("klein")
    attach(model, Train(rank=4, alpha=2.0), seed=1)
    test_objective.test_loss_and_gradients_of_every_target_are_those_of_peft(model, checkpoint=False)


def noise_levels() -> None:
    for tokens, steps in product((1024, 4096, 4301), (4, 50)):
        test_sampler.test_noise_levels_are_those_of_diffusers(tokens, steps)


COMPARISONS: dict[str, Comparison] = {
    "velocity": lambda: test_transformer.test_velocity_of_a_batch_on_an_oblong_grid_is_that_of_diffusers("klein"),
    "noise levels": noise_levels,
    "drawn latent": lambda: test_sampler.test_drawn_latent_is_that_of_diffusers(
        "guided", Sampling(steps=6, guidance=4.0, distilled=False)
    ),
    "token ids": lambda: test_qwen3.test_token_ids_equal_transformers("short"),
    "embeddings": lambda: test_qwen3.test_embeddings_of_all_512_positions_equal_diffusers("short"),
    "encoded pictures": lambda: test_autoencoder.test_encoded_pictures_equal_diffusers("klein"),
    "decoded latents": lambda: test_autoencoder.test_decoded_latents_equal_diffusers("klein"),
    "training loss and gradients": training_loss,
}
# Without B's updates nothing is computed wrongly; tests/training/test_loop.py holds that such a training is ended.
VISIBLE = breaks.DRAWING | {name: each for name, each in breaks.TRAINING.items() if "B" not in name}
BREAKS = breaks.NUMERIC | VISIBLE


def failing() -> list[str]:
    """Return the names of the comparisons that fail now."""
    found = []
    for name, comparison in COMPARISONS.items():
        try:
            comparison()
        except AssertionError:
            found.append(name)
    return found


def test_every_comparison_holds_as_it_is() -> None:
    assert failing() == []


@pytest.mark.bar("L7")
@pytest.mark.parametrize("name", [*breaks.NUMERIC, *(pytest.param(name, marks=pytest.mark.full) for name in VISIBLE)])
def test_every_break_fails_a_comparison_with_the_reference(
    name: str, monkeypatch: pytest.MonkeyPatch, measured: Measured
) -> None:
    BREAKS[name](monkeypatch)
    caught = failing()
    measured("L7", f"{name}: {', '.join(caught) or 'NOT CAUGHT'}")
    assert caught
