"""What changed is made again, and nothing else: each kind of change, and exactly how many records it costs.

A row runs the stages in make's order on a finished project with one thing changed. What was encoded is counted twice:
by what the stage says, and by the records newly on disk.
"""

from __future__ import annotations

import json
import os
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from stages.flux2.text.prompts import QWEN3
from stages.stores.tensors import Tensor, load, save
from tests.faults.conftest import Measured
from tests.faults.judge import published
from tests.faults.staleness.changes import (
    FRAGMENTS,
    PICTURES,
    STAGES,
    TEXTS,
    UP_TO_DATE,
    Change,
    recaptioned,
    removed,
    renamed,
    repainted,
)
from tests.stages.project import Project, Ran, contents, draw, rows

NEW_RUN, REFUSED = "a new run", "exit 5"


@dataclass(frozen=True)
class Cost:
    """How many latents and texts are encoded again, and what train decides: by itself at once, then in its turn."""

    latents: int = 0
    text: int = 0
    alone: str = REFUSED
    train: str = NEW_RUN

    def __str__(self) -> str:
        return f"latents {self.latents}, text {self.text}; train {self.alone}, in its turn {self.train}"


NOTHING = Cost(alone=UP_TO_DATE, train=UP_TO_DATE)
# Validate has to look again, and finds what it knows.
ONLY_A_LOOK = Cost(train=UP_TO_DATE)


def cost(project: Project, *, sets: tuple[str, ...] = (), alone: bool = True) -> Cost:
    """Ask train by itself, then every stage in its turn; return what was done, as far as all agree on it."""
    before = decided(project)
    at_once = project.run("train", sets=sets) if alone else None
    before_turn = decided(project)
    again: dict[str, int] = {}
    for stage, kind in (("validate", ""), *FRAGMENTS.items()):
        there = published(project.store, kind)
        [ran] = project.make(stage, sets=sets).values()
        if kind:
            again[stage] = published(project.store, kind) - there
            assert ran.counts["encoded"] == again[stage], f"{stage} says another number than lies on disk"
    [ran] = project.make("train", sets=sets).values()
    whole_dataset(project)
    return Cost(
        again["encode-latents"],
        again["encode-text"],
        decision(at_once, before) if at_once is not None else "",
        decision(ran, before_turn),
    )


def decided(project: Project) -> dict[str, Any]:
    """Return what training was begun last, and what artifact the run shows."""
    note = json.loads((project.results / "trajectory.json").read_bytes())
    return {"trajectory": note["trajectory"], "key": json.loads((project.results / "train.json").read_bytes())["key"]}


def decision(ran: Ran, before: dict[str, Any]) -> str:
    """Return what train decided; a new run is another artifact, begun at step 0."""
    if ran.code == 5:
        return REFUSED
    assert ran.code == 0, ran.stderr
    if ran.status == UP_TO_DATE:
        return UP_TO_DATE if ran.result["key"] == before["key"] else "another run's LoRA"
    assert ran.result["key"] != before["key"]
    return NEW_RUN if ran.counts["resumed_from"] == 0 else "resumed"


def whole_dataset(project: Project) -> None:
    """Nothing is half taken over: tables, latents and embeddings speak of the same pictures and captions."""
    keys = {stage: json.loads((project.results / f"{stage}.json").read_bytes())["key"] for stage in STAGES}
    folders = {stage: project.store / stage / key for stage, key in keys.items()}
    items = rows(folders["validate"] / "dataset.parquet")
    latents = rows(folders["encode-latents"] / "index.parquet")
    captions = [row for row in rows(folders["encode-text"] / "index.parquet") if row["role"] == "caption"]
    assert {row["item_id"] for row in items} == {row["item_id"] for row in latents}
    assert {row["caption_id"] for row in items} == {row["caption_id"] for row in captions}


def other_weights(part: str, tensor: str) -> Change:
    """Change the numbers of one tensor of a part of the model; the file's name, size and time stay."""

    def change(project: Project) -> None:
        [path] = (project.root / "model" / part).glob("*.safetensors")
        kept, file = path.stat(), load(path)
        path.unlink()
        one = file.tensors[tensor]
        save(path, {**file.tensors, tensor: Tensor(one.dtype, one.data ^ 1)}, file.metadata)
        os.utime(path, ns=(kept.st_atime_ns, kept.st_mtime_ns))
        assert (path.stat().st_size, path.stat().st_mtime_ns) == (kept.st_size, kept.st_mtime_ns)

    return change


def appended(file: str, text: str = "\n") -> Change:
    return lambda project: (project.root / file).write_text((project.root / file).read_text() + text)


def other_ids(project: Project) -> None:
    """Let two letters of the tokenizer change places."""
    path = project.root / "model" / "tokenizer" / "tokenizer.json"
    content = json.loads(path.read_text())
    ids = content["model"]["vocab"]
    ids["d"], ids["z"] = ids["z"], ids["d"]
    path.write_text(json.dumps(content))


def reordered(project: Project) -> None:
    """Write the configuration with its tables and keys the other way round, comments, and other spellings."""
    tables = project.config.read_text().strip().split("\n\n")
    assert len(tables) == 5
    turned = [
        "\n".join([first, *reversed(keys)]) for first, *keys in (each.splitlines() for each in reversed(tables))
    ]
    text = "# as before\n" + "  # the same\n\n\n".join(turned).replace(
        "learning_rate = 1e-3", "learning_rate = 0.001"
    )
    assert text.count("0.001") == 1
    project.config.write_text(text.replace(" = ", "   =\t"))


@dataclass(frozen=True)
class Row:
    """A change of the project's files, settings or of the program itself, and its cost. `full`: with --full only."""

    cost: Cost
    change: Change = lambda _: None
    sets: tuple[str, ...] = ()
    patches: Mapping[str, object] = field(default_factory=dict[str, object])
    full: bool = False


ROWS = {
    "H1 pixels, with the same name, size and time": Row(Cost(latents=1), repainted),
    "H2 a picture touched": Row(NOTHING, lambda p: (p.pictures / "ada.png").touch()),
    "H2 everything touched": Row(NOTHING, lambda p: [path.touch() for path in p.root.rglob("*")] and None, full=True),
    "H3 a caption": Row(Cost(text=1), recaptioned("bob", lambda text: f"{text} with a hat".encode())),
    "H4 a final line end": Row(ONLY_A_LOOK, recaptioned("ada", lambda text: f"{text}\n".encode()), full=True),
    "H4 Windows line ends": Row(
        ONLY_A_LOOK, recaptioned("ada", lambda text: text.replace("\n", "\r\n").encode()), full=True
    ),
    "H4 a byte-order mark": Row(ONLY_A_LOOK, recaptioned("ada", lambda text: text.encode("utf-8-sig")), full=True),
    "H4 line ends and a byte-order mark": Row(
        ONLY_A_LOOK, recaptioned("ada", lambda text: f"{text}\n".replace("\n", "\r\n").encode("utf-8-sig"))
    ),
    "H4 NFD for NFC": Row(Cost(text=1), recaptioned("dot", lambda text: unicodedata.normalize("NFD", text).encode())),
    "H5 a picture renamed": Row(ONLY_A_LOOK, renamed),
    "H5 a picture moved": Row(ONLY_A_LOOK, lambda p: renamed(p, "bob", "deeper/bob"), full=True),
    "H6 a picture removed": Row(Cost(), removed),
    "H7 a picture added": Row(Cost(latents=1, text=1), lambda p: draw(p.pictures, "eve", (9, 99, 199))),
    "H8 the autoencoder": Row(Cost(latents=PICTURES), other_weights("vae", "encoder.conv_in.weight")),
    "H8 its other half": Row(NOTHING, other_weights("vae", "decoder.conv_in.weight"), full=True),
    "H9 the text encoder": Row(
        Cost(text=TEXTS), other_weights("text_encoder", "model.layers.0.self_attn.q_proj.weight")
    ),
    "H9 the tokenizer": Row(Cost(text=TEXTS), other_ids, full=True),
    # The same numbers as before come of another file: training has nothing to learn anew.
    "H9 the tokenizer's file, but not its ids": Row(
        Cost(text=TEXTS, train=UP_TO_DATE), appended("model/tokenizer/tokenizer.json"), full=True
    ),
    "H9 the template": Row(
        Cost(text=TEXTS),
        patches={
            "stages.encode_text.EncodeText.version": 2,
            "stages.flux2.text.prompts.QWEN3": replace(QWEN3, pieces=QWEN3.pieces[:-1]),
        },
        full=True,
    ),
    "H9 the template of other programs": Row(
        NOTHING, appended("model/tokenizer/tokenizer_config.json", " "), full=True
    ),
    "H10 the resolution": Row(Cost(latents=PICTURES), sets=("validate.resolutions=[48]",), full=True),
    "H10 one more bucket": Row(Cost(latents=PICTURES), sets=("validate.resolutions=[32,48]",), full=True),
    "H10 the crop": Row(
        Cost(latents=PICTURES),
        patches={"stages.validate.PLAN_VERSION": 2, "stages.dataset.pixels.PLAN_VERSION": 2},
        full=True,
    ),
    "H10 the type": Row(Cost(latents=PICTURES), sets=("encode_latents.dtype=bfloat16",)),
    "H11 the learning rate": Row(Cost(alone=NEW_RUN, train=UP_TO_DATE), sets=("train.learning_rate=2e-3",)),
    "H12 comments, order and spelling of the configuration": Row(NOTHING, reordered),
}


@pytest.mark.bar("Q14")
@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.full] * r.full) for n, r in ROWS.items()])
def test_change_costs_exactly_what_it_touches(
    project: Project, name: str, measured: Measured, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = ROWS[name]
    there = fragments(project)
    row.change(project)
    with monkeypatch.context() as patch:
        for each, value in row.patches.items():
            patch.setattr(each, value)
        found = cost(project, sets=row.sets)
    measured("Q14", f"{name}: {found}")
    assert found == row.cost
    # What was there serves whoever still wants it: of this run, once the change is taken back, all of it.
    assert there.items() <= fragments(project).items()
    if row.sets or row.patches:
        assert {each.status for each in project.make(*STAGES).values()} == {UP_TO_DATE}


def fragments(project: Project) -> dict[str, bytes]:
    """Return the bytes of all records."""
    return contents(project.store / "fragments")
