"""Settings of a page: what is said to be changed was changed, and nothing else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import msgspec

from schemas.train import Train
from stages.contract.artifacts import keyed
from stages.pages.record import Record, Training
from stages.pages.settings import Setting, differing, settings_of


def record(**train: object) -> Record:
    """A training under way with those settings."""
    params = {**keyed(msgspec.convert(train, Train)), "seed": 42}
    del params["checkpoint_every"]
    training = Training(msgspec.to_builtins(params), {}, {}, finished=False, under_way=True)
    return Record("cat", Path(), (), {}, {}, training, [], None, None, Path(), [])


def changed(**train: object) -> dict[str, tuple[str, str]]:
    return {each.name: (each.value, each.default) for each in settings_of(record(**train)) if each.changed}


def test_defaults_are_not_changed() -> None:
    assert changed() == {}
    assert Setting("train.rank", "16", "16", changed=False) in settings_of(record())


def test_changed_setting_stands_beside_its_default() -> None:
    assert changed(rank=4, gradient_checkpointing=False, targets=["a*", "b"]) == {
        "train.rank": ("4", "16"),
        "train.gradient_checkpointing": ("no", "yes"),
        "train.targets": ("a*, b", "blocks"),
    }


def test_another_kind_has_defaults_of_its_own() -> None:
    assert changed(optimizer={"kind": "lion"}) == {"train.optimizer.kind": ("lion", "adamw")}
    assert changed(optimizer={"kind": "lion", "beta2": 0.5}).keys() == {
        "train.optimizer.kind",
        "train.optimizer.beta2",
    }


def test_what_is_off_by_default_is_changed_when_on() -> None:
    assert "train.ema.decay" in changed(ema={})


def test_other_seed_is_changed() -> None:
    one = record()
    assert one.training is not None
    other = replace(one, training=replace(one.training, params={**one.training.params, "seed": 7}))
    assert [each.name for each in settings_of(other) if each.changed] == ["train.seed"]
    assert differing([one, other]) == [("train.seed", ["42", "7"])]


def test_runs_differ_in_what_one_of_them_lacks() -> None:
    found = dict(differing([record(), record(optimizer={"kind": "adafactor"}, rank=4), record(rank=4)]))
    assert found["train.rank"] == ["16", "4", "4"]
    assert found["train.optimizer.kind"] == ["adamw", "adafactor", "adamw"]
    assert found["train.optimizer.beta2"] == ["0.999", "not set", "0.999"]
    assert "train.alpha" not in found
