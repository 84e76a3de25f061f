"""Pictures from saved LoRAs: the same for every layout of the file, proved when read, named by all that counts."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

from schemas.errors import Damaged, Diverged
from schemas.run import Model
from stages.flux2.autoencoder import Autoencoder
from stages.flux2.folder import open_model
from stages.flux2.load import load_autoencoder, load_transformer
from stages.flux2.micro import make_micro
from stages.flux2.sampler import Sampling
from stages.flux2.transformer import Transformer
from stages.flux2.variants import MICRO
from stages.lora.formats import bfl, diffusers
from stages.lora.layer import Factors
from stages.lora.targets import linear_shapes
from stages.stores.embeddings import write_embeddings
from stages.stores.tensors import from_mlx, save, tensor_digest
from stages.training.previews import NO_LORA, Painter, Scene, find_picture, picture_name, write_grid, write_sheet
from tests.training.corpus import key

CONFIG = MICRO.transformer


@dataclass(frozen=True)
class Models:
    transformer: Transformer
    decoder: Autoencoder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    folder = tmp_path_factory.mktemp("model") / "micro"
    make_micro(folder)
    model = open_model(Model(source=str(folder)), folder.parent, Path)
    return Models(load_transformer(model, mx.float32), load_autoencoder(model, encoder=False, decoder=True))


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    """Two prompts and the empty text, in the store that is `tmp_path`."""
    names = ("red", "blue", "empty")
    length, width = MICRO.text_encoder.length, CONFIG.joint_attention_dim
    texts = [np.random.default_rng(seed).standard_normal((length, width)).astype(np.float32) for seed in range(3)]
    records = [(key(name), length, text) for name, text in zip(names, texts, strict=True)]
    red, blue, empty = write_embeddings(tmp_path, records, "float32")
    sampling = Sampling(steps=2, guidance=4.0, distilled=False)
    return Scene([("red", red), ("blue", blue)], empty, 32, 1, sampling, {"transformer": "t", "decoder": "d"})


@pytest.fixture(scope="module")
def factors() -> Factors:
    """A LoRA of rank 2 on every linear, large enough to show."""
    made: Factors = {}
    for number, (name, (rows, columns)) in enumerate(linear_shapes(CONFIG).items()):
        made[f"{name}.lora_A"] = 0.3 * mx.random.normal((2, columns), key=mx.random.key(2 * number))
        made[f"{name}.lora_B"] = 0.3 * mx.random.normal((rows, 2), key=mx.random.key(2 * number + 1))
    return made


def painter(store: Path, scene: Scene, models: Models) -> Painter:
    return Painter([store], scene, lambda: models.transformer, lambda: models.decoder)


def saved(path: Path, tensors: Mapping[str, mx.array]) -> str:
    """Save a LoRA file and return its tensor digest."""
    held = {name: from_mlx(array) for name, array in tensors.items()}
    save(path, held, {})
    return tensor_digest(held)


def pictures(store: Path, scene: Scene, digest: str) -> list[np.ndarray]:
    found = [find_picture([store], each) for each in scene.keys(digest)]
    assert None not in found
    return [np.asarray(Image.open(path)) for path in found if path]


def kohya(factors: Factors, *, alpha: float) -> dict[str, mx.array]:
    """Spell factors as musubi-tuner does; what alpha / rank scales down is given larger."""
    parts = {"lora_A": ("lora_down", 1.0), "lora_B": ("lora_up", 2 / alpha)}
    tensors: dict[str, mx.array] = {}
    for name, factor in factors.items():
        module, _, part = name.rpartition(".")
        spelled = f"lora_unet_{module.replace('.', '_')}"
        tensors[f"{spelled}.{parts[part][0]}.weight"] = factor * parts[part][1]
        tensors[f"{spelled}.alpha"] = mx.array(alpha)
    return tensors


def spelled(factors: Factors) -> dict[str, mx.array]:
    """Spell factors as diffusers does: q, k and v have the same A, and a third of B's rows each."""
    tensors: dict[str, mx.array] = {}
    for name, (module, third) in diffusers.names(CONFIG).items():
        if f"{module}.lora_A" in factors:
            up = factors[f"{module}.lora_B"]
            tensors[f"transformer.{name}.lora_A.weight"] = factors[f"{module}.lora_A"]
            tensors[f"transformer.{name}.lora_B.weight"] = up if third is None else mx.split(up, 3)[third]
    return tensors


LAYOUTS: dict[str, Callable[[Factors], Mapping[str, mx.array]]] = {
    "diffusers": spelled,
    "kohya": lambda factors: kohya(factors, alpha=1.0),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_lora_in_a_foreign_layout_gives_the_same_pictures(
    tmp_path: Path, scene: Scene, models: Models, factors: Factors, layout: str
) -> None:
    ours = saved(tmp_path / "ours.safetensors", bfl.to_tensors(factors, dtype=mx.float32))
    theirs = saved(tmp_path / "theirs.safetensors", LAYOUTS[layout](factors))
    drawing = painter(tmp_path, scene, models)
    assert ours != theirs
    assert drawing.paint(tmp_path / "ours.safetensors", ours) == 2
    assert drawing.paint(tmp_path / "theirs.safetensors", theirs) == 2
    assert np.array_equal(pictures(tmp_path, scene, ours), pictures(tmp_path, scene, theirs))


def test_each_picture_is_drawn_once_and_differs_with_prompt_and_lora(
    tmp_path: Path, scene: Scene, models: Models, factors: Factors
) -> None:
    digest = saved(tmp_path / "x.safetensors", bfl.to_tensors(factors, dtype=mx.float32))
    drawing = painter(tmp_path, scene, models)
    assert (drawing.paint(None, NO_LORA), drawing.paint(tmp_path / "x.safetensors", digest)) == (2, 2)
    assert (drawing.paint(None, NO_LORA), drawing.paint(tmp_path / "x.safetensors", digest)) == (0, 0)
    four = [*pictures(tmp_path, scene, NO_LORA), *pictures(tmp_path, scene, digest)]
    assert len({each.tobytes() for each in four}) == 4
    assert {each.shape for each in four} == {(32, 32, 3)}


def test_lora_leaves_no_trace_in_the_transformer_it_was_shown_on(
    tmp_path: Path, scene: Scene, models: Models, factors: Factors
) -> None:
    digest = saved(tmp_path / "x.safetensors", bfl.to_tensors(factors, dtype=mx.float32))
    before = painter(tmp_path, scene, models)
    before.paint(None, NO_LORA)
    first = pictures(tmp_path, scene, NO_LORA)
    before.paint(tmp_path / "x.safetensors", digest)
    for each in scene.keys(NO_LORA):
        (tmp_path / picture_name(each)).unlink()
    assert painter(tmp_path, scene, models).paint(None, NO_LORA) == 2
    assert np.array_equal(pictures(tmp_path, scene, NO_LORA), first)


def test_nothing_is_drawn_from_other_tensors_than_the_digest_names(
    tmp_path: Path, scene: Scene, models: Models, factors: Factors
) -> None:
    saved(tmp_path / "x.safetensors", bfl.to_tensors(factors, dtype=mx.float32))
    with pytest.raises(Damaged, match=r"lora\.digest"):
        painter(tmp_path, scene, models).paint(tmp_path / "x.safetensors", "0" * 64)
    assert not (tmp_path / "fragments" / "previews").exists()


def test_lora_of_another_model_is_refused(tmp_path: Path, scene: Scene, models: Models) -> None:
    digest = saved(tmp_path / "x.safetensors", {"diffusion_model.elsewhere.lora_A.weight": mx.zeros((2, 2))})
    with pytest.raises(Damaged, match=r"lora\.unknown_key"):
        painter(tmp_path, scene, models).paint(tmp_path / "x.safetensors", digest)


def test_name_of_a_picture_moves_with_everything_that_shapes_it(scene: Scene) -> None:
    others = [
        replace(scene, size=48),
        replace(scene, seed=2),
        replace(scene, empty=scene.prompts[0][1]),
        replace(scene, weights={**scene.weights, "decoder": "other"}),
        replace(scene, weights={**scene.weights, "transformer": "other"}),
        replace(scene, sampling=replace(scene.sampling, steps=3)),
        replace(scene, sampling=replace(scene.sampling, guidance=1.0)),
        replace(scene, sampling=replace(scene.sampling, distilled=True)),
    ]
    names = [name for each in (scene, *others) for name in each.keys(NO_LORA)] + scene.keys("0" * 64)
    assert len(set(names)) == 2 * (len(others) + 2)


def damage_pixels(path: Path) -> None:
    """Write another picture with the text of the one that was there: a whole PNG, but not this one."""
    with Image.open(path) as picture:
        changed, text = np.array(picture), picture.info
    changed[0, 0, 0] ^= 1
    from stages.console.charts import save_png

    path.unlink()
    save_png(changed, path, {name: str(value) for name, value in text.items()})


def swap(path: Path) -> None:
    """Put the other prompt's picture there."""
    [other] = [each for each in path.parent.iterdir() if each != path]
    path.write_bytes(other.read_bytes())


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def pipe(path: Path) -> None:
    """Put there what waits for a writer when it is opened."""
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize("harm", [Path.unlink, cut, damage_pixels, swap, pipe, Path.touch])
def test_only_whole_pictures_of_that_name_are_found(
    tmp_path: Path, scene: Scene, models: Models, harm: Callable[[Path], None]
) -> None:
    drawing = painter(tmp_path, scene, models)
    drawing.paint(None, NO_LORA)
    path = tmp_path / picture_name(scene.keys(NO_LORA)[0])
    before = path.read_bytes()
    harm(path)
    assert len(drawing.missing(NO_LORA)) == (0 if harm is Path.touch else 1)
    drawing.paint(None, NO_LORA)
    assert path.read_bytes() == before


def test_picture_of_undefined_numbers_is_an_error_and_not_stored(
    tmp_path: Path, scene: Scene, models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode = Autoencoder.decode
    monkeypatch.setattr(Autoencoder, "decode", lambda model, latent: decode(model, latent) * mx.nan)
    with pytest.raises(Diverged, match=r"preview\.not_finite"):
        painter(tmp_path, scene, models).paint(None, NO_LORA)
    assert not list(tmp_path.rglob("*.png"))


def test_nothing_is_shown_in_the_place_of_a_damaged_picture(tmp_path: Path, scene: Scene, models: Models) -> None:
    painter(tmp_path, scene, models).paint(None, NO_LORA)
    shots = [(0, NO_LORA)]
    write_sheet([tmp_path], scene, shots, tmp_path / "sheet.png", complete=True)
    cut(tmp_path / picture_name(scene.keys(NO_LORA)[0]))
    with pytest.raises(Damaged, match=r"preview\.unreadable.*grid\.png"):
        write_grid([tmp_path], scene, NO_LORA, tmp_path / "grid.png")
    with pytest.raises(Damaged, match=r"preview\.unreadable.*whole\.png"):
        write_sheet([tmp_path], scene, shots, tmp_path / "whole.png", complete=True)
    # While training goes on, a step without its pictures is left out.
    write_sheet([tmp_path], scene, shots, tmp_path / "some.png")
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["sheet.png"]


def test_grid_shows_all_prompts_and_is_the_same_every_time(tmp_path: Path, scene: Scene, models: Models) -> None:
    painter(tmp_path, scene, models).paint(None, NO_LORA)
    for name in ("one.png", "two.png"):
        write_grid([tmp_path], scene, NO_LORA, tmp_path / name)
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()
    with Image.open(tmp_path / "one.png") as picture:
        assert picture.width > 2 * 32
