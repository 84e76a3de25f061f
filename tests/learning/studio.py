"""Where pictures are drawn and judged: the built-in model, with or without a LoRA, asked for things it never saw.

All prompts of one size are drawn in one batch; the judge reads the pixels.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import mlx.core as mx
import numpy as np
from PIL import Image

from schemas.pretrain import Evaluation, Pool
from schemas.quantize import Quantize
from schemas.run import Model
from stages.flux2 import load
from stages.flux2.autoencoder import Autoencoder
from stages.flux2.folder import ModelFiles, open_model
from stages.flux2.micro import make_micro
from stages.flux2.sampler import Sampling
from stages.flux2.text.tokenize import Tokenizer
from stages.flux2.transformer import Transformer
from stages.lora.formats.read import read
from stages.lora.layer import Factors
from stages.lora.merge import applied
from stages.pretraining.autoencoder import decoded
from stages.pretraining.evaluation import SEED, judge_transformer
from stages.pretraining.transformer import Reader, drawn
from stages.stores import tensors
from stages.stores.tensors import to_mlx
from stages.world.captions import full_captions
from stages.world.judge import Judge, Score, Verdict, score
from stages.world.outlines import BASE, NEW
from stages.world.render import to_bytes
from stages.world.scenes import draw_things, things_of_shape
from tests.learning import style

STEPS, GUIDANCE, SIZE = 8, 3.0, 128
WORD = "zorb"


@dataclass(frozen=True)
class Drawing:
    """How pictures are drawn: with which LoRA, on weights held how, at which guidance, how large."""

    lora: Path | None = None
    quantize: Quantize = "none"
    guidance: float = GUIDANCE
    size: int = SIZE

    @property
    def pool(self) -> Pool:
        return Pool(height=self.size, width=self.size, count=1, batch_size=1, share=1.0)


class Studio:
    """The built-in model, written into `folder`; what it needs is loaded once."""

    def __init__(self, folder: Path) -> None:
        if not folder.exists():
            make_micro(folder)
        self.folder = folder
        self.files: ModelFiles = open_model(Model(source=str(folder)), folder, lambda _: folder)
        self.transformer = cache(self._transformer)

    @cached_property
    def autoencoder(self) -> Autoencoder:
        return load.load_autoencoder(self.files, encoder=False, decoder=True)

    @cached_property
    def reader(self) -> Reader:
        tokenizer = Tokenizer(self.files.tokenizer, self.files.variant.text_encoder)
        return Reader(tokenizer, load.load_text_encoder(self.files, mx.float32))

    def _transformer(self, quantize: Quantize) -> Transformer:
        return load.load_transformer(self.files, mx.float32, quantize)

    def base_score(self, prompts: int, how: Drawing) -> Score:
        """Return how right pictures of held-out things of the world are."""
        with self._with_lora(how) as transformer:
            asked = Evaluation(prompts=prompts, steps=(STEPS,), guidance=how.guidance)
            [found], _ = judge_transformer(transformer, self.autoencoder, self.reader, how.pool, asked)
        return found.score

    def new_score(self, shape: str, seeds: int, how: Drawing) -> Score:
        """Return how right pictures of the new word, which means `shape`, are: each of another seed and caption."""
        things = things_of_shape(np.random.default_rng(SEED), seeds)
        pictures = self.draw(full_captions(things, WORD), how)
        return score(verdicts(pictures), things, [shape])

    def style_rate(self, seeds: int, how: Drawing) -> float:
        """Return the share of pictures of the new word as a texture that have the style."""
        things = draw_things(np.random.default_rng(SEED), seeds, unseen=True)
        pictures = self.draw(style.sentences(things, WORD), how)
        return float(np.mean([style.shows(*each) for each in zip(pictures, things.ground, strict=True)]))

    def draw(self, sentences: list[str], how: Drawing) -> np.ndarray:
        """Return the pictures [N, H, W, 3] uint8 of N sentences, each of another seed."""
        side = how.size // 16
        with self._with_lora(how) as transformer:
            shape = (len(sentences), transformer.config.in_channels, side, side)
            noise = mx.random.normal(shape, key=mx.random.key(SEED))
            text, empty = self.reader.features(sentences), self.reader.features([""])
            sampling = Sampling(steps=STEPS, guidance=how.guidance, distilled=False)
            latents = drawn(transformer, text, empty, noise, sampling)
            return np.array(to_bytes(decoded(self.autoencoder, latents)))

    @contextmanager
    def _with_lora(self, how: Drawing) -> Iterator[Transformer]:
        transformer = self.transformer(how.quantize)
        with applied(transformer, {} if how.lora is None else factors_of(how.lora, transformer)):
            yield transformer


def factors_of(lora: Path, transformer: Transformer) -> Factors:
    file = tensors.load(lora)
    return read({name: to_mlx(tensor) for name, tensor in file.tensors.items()}, file.metadata, transformer.config)


def verdicts(pictures: np.ndarray) -> list[Verdict]:
    judge = Judge({**BASE, **NEW}, *pictures.shape[1:3])
    return [judge.judge(picture) for picture in pictures]


def commonest_shape(folder: Path) -> str:
    """Return what the pictures of a folder show, as the judge sees them."""
    pictures = [np.asarray(Image.open(path).convert("RGB")) for path in sorted(folder.glob("*.png"))]
    [(shape, count)] = Counter(verdict.shape for verdict in verdicts(np.stack(pictures))).most_common(1)
    assert shape in NEW
    assert count == len(pictures)
    return shape
