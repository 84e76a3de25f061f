"""`[validate]`: the folder of pictures and how each becomes a training item."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, ClassVar, Literal

from msgspec import Meta

from schemas.base import TEXT, Strict

Resolution = Annotated[int, Meta(ge=32, le=4096, multiple_of=16)]
MaskSource = Literal["alpha", "files"]
Colour = Annotated[str, Meta(pattern=r"^#[0-9a-fA-F]{6}\Z")]


class Tags(Strict, frozen=True):
    """`[validate.tags]`: captions that are lists of tags become `variants` texts each, one of them drawn per visit.

    The first `keep_first` tags stay where they are; of the others each is left out with probability `dropout`, and
    with `shuffle` they change places. `seed` and the caption alone decide, so that embeddings are cached.
    """

    separator: Annotated[str, Meta(min_length=1, max_length=8)] = ","
    variants: Annotated[int, Meta(ge=1, le=64)] = 4
    shuffle: bool = True
    dropout: Annotated[float, Meta(ge=0.0, lt=1.0)] = 0.0
    keep_first: Annotated[int, Meta(ge=0, le=1024)] = 0
    seed: Annotated[int, Meta(ge=0, lt=2**32)] = 0


class Repeat(Strict, frozen=True):
    """`[[validate.repeats]]`: pictures whose path matches `pattern` come `times` times an epoch.

    `*` stands for any characters, `/` too; where several patterns match, the last one counts.
    """

    pattern: Annotated[str, Meta(min_length=1, max_length=256)]
    times: Annotated[int, Meta(ge=1, le=1000)]


class Validate(Strict, frozen=True):
    """Keyed as a whole except `dataset` and `class_dataset` (paths; the contents are keyed instead).

    With `captions` "lines" each line of a caption that is not blank is a caption of its own. `class_dataset` is a
    second folder, of pictures of the class, whose captions get no trigger. `masks` say where pictures train: where
    they are opaque ("alpha"), or where the file name.mask.png beside name.jpg is white ("files").
    """

    NEUTRAL: ClassVar[Mapping[str, object]] = MappingProxyType(
        {"captions": "one", "tags": None, "repeats": (), "class_dataset": None, "masks": None}
    )

    dataset: Annotated[str, Meta(min_length=1)]
    trigger: Annotated[str, Meta(max_length=64, pattern=TEXT)] = ""
    resolutions: Annotated[tuple[Resolution, ...], Meta(min_length=1, max_length=8)] = (512,)
    upscale: bool = False
    background: Colour = "#ffffff"
    max_megapixels: Annotated[float, Meta(gt=0, le=500)] = 64.0
    allow_empty_captions: bool = False
    skip_bad: bool = False
    captions: Literal["one", "lines"] = "one"
    tags: Tags | None = None
    repeats: Annotated[tuple[Repeat, ...], Meta(max_length=64)] = ()
    class_dataset: Annotated[str, Meta(min_length=1)] | None = None
    masks: MaskSource | None = None
