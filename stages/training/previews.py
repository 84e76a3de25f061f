"""Pictures from a saved LoRA: the one function that training, at its checkpoints, and the preview stage both call.

A picture is named by everything that shapes it, so it is drawn once: `<store>/fragments/previews/<key>.png`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import mlx.core as mx
import numpy as np

from schemas import results
from schemas.errors import GIVEN, Damaged, Diverged
from schemas.tables import EMBEDDING_INDEX
from stages.console.charts import contact_sheet, grid, save_png
from stages.contract.artifacts import holder, restore_file
from stages.contract.digests import digest_of, sha256_bytes
from stages.contract.job import Job
from stages.contract.publish import publish_file, read_regular, workspace
from stages.contract.runner import upstream
from stages.dataset.captions import prompt_with_trigger
from stages.flux2.autoencoder import Autoencoder
from stages.flux2.identity import decoder_digest, drawing_model_of, model_of, quantization, transformer_digest
from stages.flux2.sampler import Sampling, initial_noise, sample, uses_empty_prompt
from stages.flux2.transformer import Transformer
from stages.lora.formats.read import read
from stages.lora.layer import Factors
from stages.lora.merge import applied
from stages.stores.embeddings import EmbeddingReader, EmbeddingRow
from stages.stores.tables import read_table
from stages.stores.tensors import load, tensor_digest, to_mlx
from stages.training.data import embedding_row, widened

VERSION = 1
FOLDER = "fragments/previews"
NO_LORA = "none"
# Of the contact sheet: 16 small pictures fill a wide screen twice.
MOST_COLUMNS = 16
PNG_END = bytes.fromhex("0000000049454e44ae426082")


@dataclass(frozen=True)
class Scene:
    """What is drawn: prompts with their embeddings, and how. `weights` are those of transformer and decoder."""

    prompts: Sequence[tuple[str, EmbeddingRow]]
    empty: EmbeddingRow
    size: int
    seed: int
    sampling: Sampling
    weights: Mapping[str, str]

    def keys(self, lora_digest: str) -> list[str]:
        """Return the key of each prompt's picture with the LoRA of that tensor digest (`NO_LORA` without)."""
        how = {
            "version": VERSION,
            "lora": lora_digest,
            "size": self.size,
            "seed": self.seed,
            "steps": self.sampling.steps,
            "guidance": self.sampling.guidance,
            "distilled": self.sampling.distilled,
            "empty": self.empty.sha256,
            **self.weights,
        }
        return [digest_of("picture", {**how, "prompt": row.sha256}) for _, row in self.prompts]


def scene_of(job: Job) -> Scene:
    """Return what the job's previews show. Raises Stale when its prompts have not been encoded."""
    _, folder = upstream(job, "encode-text")
    prompts = [prompt_with_trigger(text, job.config.validate.trigger) for text in job.config.preview.prompts]
    rows = read_table(folder / "index.parquet", EMBEDDING_INDEX)
    encoded = {row["text"]: embedding_row(row) for row in rows if row["role"] == "prompt"}
    model, drawing, settings = model_of(job), drawing_model_of(job), job.config.preview
    sampling = Sampling(
        steps=settings.steps or drawing.variant.preview_steps,
        guidance=drawing.variant.preview_guidance if settings.guidance is None else settings.guidance,
        distilled=drawing.variant.distilled,
    )
    return Scene(
        prompts=[(text, encoded[text]) for text in prompts],
        empty=next(embedding_row(row) for row in rows if row["role"] == "empty"),
        size=settings.size,
        seed=settings.seed,
        sampling=sampling,
        weights={
            "transformer": transformer_digest(job, drawing),
            "decoder": decoder_digest(job, model),
            **quantization(job),
        },
    )


def picture_name(key: str) -> str:
    """Return the path of a picture below the store."""
    return f"{FOLDER}/{key}.png"


class Painter:
    """Draws the pictures of a scene that no store has yet.

    `transformer` and `decoder` are called at the first picture that must be drawn: an unchanged scene loads nothing.
    """

    def __init__(
        self,
        stores: Sequence[Path],
        scene: Scene,
        transformer: Callable[[], Transformer],
        decoder: Callable[[], Autoencoder],
    ) -> None:
        self._stores = tuple(stores)
        self._scene = scene
        self._transformer = transformer
        self._decoder = decoder
        self._reader = EmbeddingReader(stores)

    def missing(self, lora_digest: str) -> list[str]:
        """Return the keys of the pictures that must be drawn for that LoRA, each once."""
        keys = dict.fromkeys(self._scene.keys(lora_digest))
        return [key for key in keys if find_picture(self._stores, key) is None]

    def paint(self, lora: Path | None, lora_digest: str, *, on_step: Callable[[int], None] | None = None) -> int:
        """Draw and store what is missing with the LoRA file `lora` (None: without); return how many were drawn.

        The file is read as a stranger's would be. Raises Damaged when it is not a LoRA of this model.
        """
        rows = [row for _, row in self._scene.prompts]
        missing = self.missing(lora_digest)
        wanted = {key: row for key, row in zip(self._scene.keys(lora_digest), rows, strict=True) if key in missing}
        if not wanted:
            return 0
        transformer = self._transformer()
        factors = {} if lora is None else load_lora(lora, transformer, lora_digest)
        with applied(transformer, factors):
            for key, row in wanted.items():
                self._store(key, self._picture(transformer, row, on_step))
        return len(wanted)

    def _picture(
        self, transformer: Transformer, prompt: EmbeddingRow, on_step: Callable[[int], None] | None
    ) -> np.ndarray:
        """Return one picture [H, W, 3] uint8. Raises Diverged when its numbers are not finite."""
        scene = self._scene
        side = scene.size // 16
        noise = initial_noise(scene.seed, transformer.config.in_channels, side, side)
        empty = self._embedding(scene.empty) if uses_empty_prompt(transformer, scene.sampling) else None
        latent = sample(transformer, noise, self._embedding(prompt), empty, scene.sampling, on_step)
        decoded = self._decoder().decode(latent)[0].transpose(1, 2, 0)
        picture = mx.round(mx.clip(decoded / 2 + 0.5, 0.0, 1.0) * 255).astype(mx.uint8)
        if not mx.isfinite(decoded).all().item():
            raise Diverged(
                "preview.not_finite",
                "the model draws no picture: its numbers are infinite or undefined",
                fix="train with a lower train.learning_rate; if it is so without a LoRA, the model is damaged",
            )
        return np.array(picture)

    def _embedding(self, row: EmbeddingRow) -> mx.array:
        return mx.array(widened(self._reader.read(row), row.dtype))[None]

    def _store(self, key: str, picture: np.ndarray) -> None:
        with workspace(self._stores[0]) as space:
            path = space / "picture.png"
            save_png(picture, path, {"key": key, "pixels": sha256_bytes(picture.tobytes())})
            publish_file(path, self._stores[0] / picture_name(key))


def load_lora(path: Path, transformer: Transformer, digest: str) -> Factors:
    """Return the factors of a LoRA file in any known format.

    Raises Damaged when its tensors are not those of `digest`, or do not fit the model.
    """
    file = load(path)
    if tensor_digest(file.tensors) != digest:
        # Pictures are kept under the digest: drawn from other tensors, they would be wrong for ever.
        raise Damaged(
            "lora.digest",
            "the LoRA's tensors changed since it was saved",
            where=str(path),
            why=f"expected tensor digest {digest}",
            fix=f"flux2-lora train {GIVEN} --force",
        )
    tensors = {name: to_mlx(tensor) for name, tensor in file.tensors.items()}
    return read(tensors, file.metadata, transformer.config, str(path))


def find_picture(stores: Sequence[Path], key: str) -> Path | None:
    """Return a stored picture, proved by the digest of its pixels that it carries; None when absent or damaged."""
    from PIL import Image

    path = holder(picture_name(key), stores) / picture_name(key)
    try:
        data = read_regular(path)
        with Image.open(BytesIO(data), formats=("PNG",)) as picture:
            picture.load()
            carried, pixels = picture.info, picture.tobytes()
    except (OSError, SyntaxError, ValueError):
        return None
    # Pillow shows a picture whose end is cut off.
    whole = data.endswith(PNG_END) and carried.get("key") == key and carried.get("pixels") == sha256_bytes(pixels)
    return path if whole else None


def write_grid(stores: Sequence[Path], scene: Scene, lora_digest: str, path: Path) -> None:
    """Write the labelled grid of a step's pictures; only several prompts have one. Raises Damaged."""
    pictures = [find_picture(stores, key) for key in scene.keys(lora_digest)]
    _require(all(pictures), path)
    save_png(grid([pixels(each) for each in pictures if each], [text for text, _ in scene.prompts]), path, {})


def write_sheet(
    stores: Sequence[Path], scene: Scene, shots: Sequence[tuple[int, str]], path: Path, *, complete: bool = False
) -> None:
    """Write the contact sheet of `shots`, (step, tensor digest of its LoRA): a row a prompt, a column a step.

    Steps that lack a picture are left out, or with `complete` are Damaged; of very many all but some are left out.
    """
    found = {step: [find_picture(stores, key) for key in scene.keys(digest)] for step, digest in _spread(shots)}
    columns = {step: [pixels(each) for each in pictures if each] for step, pictures in found.items() if all(pictures)}
    _require(not complete or len(columns) == len(found), path)
    if columns and scene.prompts:
        rows = [(text, [column[row] for column in columns.values()]) for row, (text, _) in enumerate(scene.prompts)]
        save_png(contact_sheet(rows, [f"step {step}" for step in columns]), path, {})


def _require(whole: bool, path: Path) -> None:  # noqa: FBT001
    if not whole:
        raise _unreadable(path)


def _unreadable(path: Path) -> Damaged:
    return Damaged(
        "preview.unreadable",
        "a picture that was drawn is gone or damaged",
        where=path.name,
        fix=f"flux2-lora preview {GIVEN} (it draws that one again)",
    )


def _spread(shots: Sequence[tuple[int, str]]) -> list[tuple[int, str]]:
    if len(shots) <= MOST_COLUMNS:
        return list(shots)
    gap = (len(shots) - 1) / (MOST_COLUMNS - 1)
    return [shots[round(number * gap)] for number in range(MOST_COLUMNS)]


def place(job: Job, scene: Scene, lora_digest: str, step: int) -> None:
    """Put a step's pictures into the run folder while training goes on, and make it the latest. Raises Damaged."""
    singles = results.previews(step, len(scene.prompts))
    whole = job.run_folder / results.preview(step)
    for name, key in zip(singles, scene.keys(lora_digest), strict=True):
        picture = find_picture(job.stores, key)
        if picture is None:
            raise _unreadable(whole)
        restore_file(picture, job.run_folder / name, job.digests)
    if len(singles) > 1:
        with workspace(job.store) as space:
            write_grid(job.stores, scene, lora_digest, space / whole.name)
            restore_file(space / whole.name, whole, job.digests)
    restore_file(whole, job.run_folder / results.LATEST_PREVIEW, job.digests)


def pixels(path: Path) -> np.ndarray:
    """Return a stored picture [H, W, 3] uint8. Raises Damaged."""
    from PIL import Image

    try:
        with Image.open(path, formats=("PNG",)) as picture:
            return np.array(picture.convert("RGB"))
    except (OSError, SyntaxError, ValueError) as error:
        raise _unreadable(path) from error
