"""encode-latents: fragments and index as promised, and what it says to pictures and models that are not there."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from schemas.errors import RejectedInput
from schemas.tables import LATENT_INDEX
from stages import encode_latents
from stages.console.progress import Progress
from stages.contract.job import Job
from stages.flux2.autoencoder import Autoencoder
from stages.flux2.variants import MICRO
from stages.stores.tensors import Tensor, load, save
from tests.stages.project import Project, draw, edit, listing, new_project, rows, truncate, undefined


def test_index_leads_to_arrays_that_zarr_itself_reads(finished: Project) -> None:
    import zarr

    index = rows(finished.run("encode-latents").folder / "index.parquet")
    assert set(index[0]) == set(LATENT_INDEX.columns)
    assert len({row["item_id"] for row in index}) == len(index) == 4
    for row in index:
        record = zarr.open_array(finished.store / row["fragment"], mode="r")[row["row"]]
        assert record.shape == (row["channels"], row["height"], row["width"])
        assert record.shape == (MICRO.autoencoder.packed_channels, 2, 2)
        assert record.dtype == np.float32
        assert np.isfinite(record).all()


def test_mirrored_twins_are_encoded_beside_what_is_there(project: Project) -> None:
    ran = project.make("encode-latents", sets=("encode_latents.flip=true",))["encode-latents"]
    assert ran.counts == {"total": 8, "encoded": 4, "reused": 4}
    assert sorted(row["flip"] for row in rows(ran.folder / "index.parquet")) == [False] * 4 + [True] * 4


def test_another_type_or_size_is_encoded_anew_and_the_old_stays_usable(project: Project) -> None:
    sets = ("encode_latents.dtype=bfloat16",)
    assert project.make("encode-latents", sets=sets)["encode-latents"].counts["encoded"] == 4
    sets = ("validate.resolutions=[48]",)
    ran = project.make("validate", "encode-latents", sets=sets)
    assert ran["encode-latents"].counts == {"total": 4, "encoded": 4, "reused": 0}
    assert {each.status for each in project.make("validate", "encode-latents").values()} == {"up to date"}


def test_exact_duplicate_is_encoded_once(project: Project) -> None:
    shutil.copyfile(project.pictures / "ada.png", project.pictures / "eve.png")
    shutil.copyfile(project.pictures / "ada.txt", project.pictures / "eve.txt")
    ran = project.make("validate", "encode-latents")["encode-latents"]
    assert ran.counts == {"total": 4, "encoded": 0, "reused": 4}
    assert len(rows(ran.folder / "index.parquet")) == 5


def test_forced_run_gives_the_same_digest(project: Project) -> None:
    before = project.run("encode-latents")
    forced = project.run("encode-latents", "--force")
    assert forced.counts == {"total": 4, "encoded": 4, "reused": 0}
    assert forced.result["digest"] == before.result["digest"]


def test_stopped_encoding_keeps_every_finished_fragment(tmp_path: Path) -> None:
    project = new_project(tmp_path / "project")
    edit(project.config, "resolutions = [32]", "resolutions = [48]")
    for name in ("eve", "fay"):
        picture = draw(project.pictures, name, (ord(name[0]), 120, 120))
        with Image.open(picture) as square:
            square.resize((96, 32)).save(picture)
    project.make("validate")
    advance = Progress.advance

    def stop_at_last(bar: Progress, steps: int = 1, *, note: str = "") -> None:
        advance(bar, steps, note=note)
        if bar.done == bar.total:
            signal.raise_signal(signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Progress, "advance", stop_at_last)
        stopped = project.run("encode-latents")
    assert (stopped.code, stopped.error) == (143, "run.stopped")
    assert not any((project.store / ".tmp").iterdir())
    assert not (project.results / "encode-latents.json").exists()
    ran = project.make("encode-latents")["encode-latents"]
    # Two shapes of pictures make two fragments; the first one was whole.
    assert ran.counts == {"total": 6, "encoded": 2, "reused": 4}


def test_other_store_is_read_and_never_written(project: Project, tmp_path: Path) -> None:
    before = listing(project.store)
    mine = Project(tmp_path / "mine")
    shutil.copytree(project.pictures, mine.pictures)
    shutil.copyfile(project.config, mine.config)
    assert mine.run("validate", "--also", str(project.store)).status == "up to date"
    draw(mine.pictures, "eve", (0, 120, 120))
    assert mine.run("validate", "--also", str(project.store)).status == "built"
    ran = mine.run("encode-latents", "--also", str(project.store))
    assert ran.counts == {"total": 5, "encoded": 1, "reused": 4}
    assert listing(project.store) == before


def test_picture_changed_since_validate_is_not_encoded(project: Project) -> None:
    draw(project.pictures, "ada", (9, 9, 9))
    ran = project.run("encode-latents")
    assert (ran.code, ran.error) == (5, "input.stale")
    assert ran.result["error"]["fix"].startswith("flux2-lora validate ")


def test_it_needs_validate(project: Project) -> None:
    shutil.rmtree(project.store / "validate")
    shutil.rmtree(project.results)
    ran = project.run("encode-latents")
    assert (ran.code, ran.error) == (5, "input.missing")


def test_absent_model_folder_is_named(own_model: Project) -> None:
    edit(own_model.config, 'source = "model"', 'source = "models/elsewhere/deep"')
    ran = own_model.run("encode-latents")
    assert (ran.code, ran.error) == (7, "model.absent")
    assert "models/elsewhere/deep" in ran.result["error"]["where"]


def test_hub_model_that_is_not_here_is_fetched_by_command(own_model: Project) -> None:
    edit(own_model.config, 'source = "model"', 'source = "black-forest-labs/FLUX.2-klein-base-4B"')
    ran = own_model.run("encode-latents")
    assert (ran.code, ran.error) == (7, "model.absent")
    assert ran.result["error"]["fix"] == "flux2-lora fetch black-forest-labs/FLUX.2-klein-base-4B"


def test_latent_that_is_not_finite_is_refused_and_not_stored(own_model: Project) -> None:
    undefined(own_model.root / "model" / "vae" / "diffusion_pytorch_model.safetensors", "encoder.conv_in.weight")
    before = listing(own_model.store / "fragments")
    ran = own_model.run("encode-latents")
    assert (ran.code, ran.error) == (3, "latents.not_finite")
    assert ran.stderr.count("error[latents.not_finite]") == len(list(own_model.pictures.glob("*.png")))
    assert listing(own_model.store / "fragments") == before


def test_pictures_without_a_latent_are_all_named_and_the_others_kept(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    latent, wrong = encode_latents._latent, ("ada.png", "cyd.png")

    def some(job: Job, autoencoder: Autoencoder, each: Any) -> np.ndarray:
        if each.item["path"] in wrong:
            raise RejectedInput("latents.not_finite", "the latent is not finite", where=each.item["path"])
        return latent(job, autoencoder, each)

    sets = ("validate.resolutions=[48]",)
    project.make("validate", sets=sets)
    with monkeypatch.context() as patch:
        patch.setattr(encode_latents, "_latent", some)
        ran = project.run("encode-latents", sets=sets)
    assert (ran.code, [name in ran.stderr for name in wrong]) == (3, [True, True])
    again = project.make("encode-latents", sets=sets)["encode-latents"]
    assert (again.counts["encoded"], again.counts["reused"]) == (2, 2)


def test_picture_that_finds_no_memory_ends_it_with_7_and_training_takes_no_part_for_the_whole(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise RuntimeError("[malloc_or_wait] Unable to allocate 99 bytes.")

    draw(project.pictures, "eve", (9, 99, 199))
    project.make("validate", "encode-text")
    with monkeypatch.context() as patch:
        patch.setattr("stages.encode_latents._latent", full)
        ran = project.run("encode-latents")
    assert (ran.code, ran.error) == (7, "memory.full")
    assert "flux2-lora plan --config" in ran.result["error"]["fix"]
    assert (project.run("train").code, project.make("encode-latents")["encode-latents"].counts["encoded"]) == (5, 1)


def test_damaged_autoencoder_is_refused(own_model: Project) -> None:
    truncate(own_model.root / "model" / "vae" / "diffusion_pytorch_model.safetensors")
    assert own_model.run("encode-latents").code == 4


@pytest.mark.parametrize(("tensor", "encoded"), [("encoder.conv_in.weight", 4), ("decoder.conv_in.weight", 0)])
def test_only_the_encoder_s_weights_decide_what_is_encoded_anew(
    own_model: Project, tensor: str, encoded: int
) -> None:
    path = own_model.root / "model" / "vae" / "diffusion_pytorch_model.safetensors"
    file = load(path)
    path.unlink()
    one = file.tensors[tensor]
    changed = Tensor(one.dtype, one.data ^ 1)
    save(path, {**file.tensors, tensor: changed}, file.metadata)
    assert own_model.make("encode-latents")["encode-latents"].counts["encoded"] == encoded
