from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path

import pytest

from schemas.errors import BadConfig, Damaged, NoResources, StageError
from schemas.run import Model
from stages.flux2.folder import ModelFiles, open_model, require_trainable
from stages.flux2.variants import MICRO, VARIANTS, AutoencoderConfig
from stages.hub.cache import VARIABLES, hub_cache
from tests.flux2.published import build, change, transformer_json, write


def no_builtin(name: str) -> Path:
    raise AssertionError(name)


def opened(folder: Path, **fields: str) -> ModelFiles:
    return open_model(Model(source=str(folder), **fields), folder.parent, no_builtin)


def fault(kind: type[StageError], folder: Path, **fields: str) -> str:
    with pytest.raises(kind) as error:
        opened(folder, **fields)
    assert all(fault.fix for fault in error.value.faults)
    return str(error.value)


@pytest.fixture
def klein(tmp_path: Path) -> Path:
    return build(tmp_path / "klein", "klein-base-4b")


@pytest.mark.parametrize("name", VARIANTS)
def test_every_published_model_is_told_from_its_configuration(tmp_path: Path, name: str) -> None:
    assert opened(build(tmp_path / "m", name)).variant == VARIANTS[name]
    assert opened(tmp_path / "m", variant=name).variant == VARIANTS[name]


def test_files_are_listed_with_the_index_before_its_shards(klein: Path) -> None:
    model = opened(klein)
    assert model.transformer == (klein / "transformer" / "diffusion_pytorch_model.safetensors",)
    assert model.autoencoder == (klein / "vae" / "diffusion_pytorch_model.safetensors",)
    assert [path.name for path in model.text_encoder] == [
        "model.safetensors.index.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]
    assert model.tokenizer == klein / "tokenizer" / "tokenizer.json"


def test_folder_is_relative_to_the_configuration(klein: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    assert open_model(Model(source="klein"), klein.parent, no_builtin).transformer[0].is_file()


def test_builtin_name_gives_the_folder_made_for_it(tmp_path: Path) -> None:
    model = open_model(Model(), tmp_path, lambda name: build(tmp_path / name, name))
    assert model.variant == MICRO
    assert model.transformer[0].is_relative_to(tmp_path / "flux2-micro")


def test_missing_guidance_embeds_means_true(tmp_path: Path) -> None:
    folder = build(tmp_path / "dev", "dev")
    config = transformer_json(VARIANTS["dev"])
    del config["guidance_embeds"]
    write(folder / "transformer" / "config.json", config)
    assert opened(folder).variant.transformer.guidance_embeds


def test_rope_theta_is_read_from_both_transformers_spellings(klein: Path) -> None:
    path = klein / "text_encoder" / "config.json"
    change(path, rope_theta=None, rope_parameters={"rope_theta": 1e6, "rope_type": "default"})
    assert opened(klein).variant == VARIANTS["klein-base-4b"]
    change(path, rope_parameters={"rope_theta": 1e6, "rope_type": "yarn"})
    assert "yarn" in fault(Damaged, klein)


def test_other_dimensions_are_a_model_of_their_own(klein: Path) -> None:
    change(klein / "transformer" / "config.json", num_layers=3)
    variant = opened(klein).variant
    assert (variant.name, variant.transformer.num_layers, variant.preview_steps) == ("custom", 3, 50)
    change(klein / "model_index.json", is_distilled=True)
    variant = opened(klein).variant
    assert (variant.name, variant.distilled, variant.preview_steps, variant.preview_guidance) == (
        "custom",
        True,
        4,
        1.0,
    )


def test_distilled_micro_keeps_its_text_length(tmp_path: Path) -> None:
    folder = build(tmp_path / "micro", "flux2-micro")
    change(folder / "model_index.json", is_distilled=True)
    variant = opened(folder).variant
    assert variant.distilled
    assert variant.text_encoder == MICRO.text_encoder


def test_small_decoder_is_kept(klein: Path) -> None:
    change(klein / "vae" / "config.json", decoder_block_out_channels=[96, 192, 384, 384])
    expected = AutoencoderConfig(decoder_block_out_channels=(96, 192, 384, 384))
    for variant in (opened(klein).variant, opened(klein, variant="klein-base-4b").variant):
        assert variant.name == "klein-base-4b"
        assert variant.autoencoder == expected


def test_explicit_variant_must_agree_with_the_folder(klein: Path) -> None:
    wrong = fault(BadConfig, klein, variant="klein-base-9b")
    assert "num_layers: expected 8, found 5" in wrong
    assert "the folder is a base model" in fault(BadConfig, klein, variant="klein-4b")


def test_single_file_needs_a_variant(klein: Path) -> None:
    (klein.parent / "bfl.safetensors").touch()
    assert "base or distilled" in fault(BadConfig, klein, transformer="bfl.safetensors")
    model = opened(klein, transformer="bfl.safetensors", variant="klein-4b")
    assert model.variant == VARIANTS["klein-4b"]
    assert model.transformer == (klein.parent / "bfl.safetensors",)
    assert model.autoencoder[0].parent.name == "vae"


def test_folder_of_single_files_says_how_to_name_them(tmp_path: Path) -> None:
    for name in ("ae.safetensors", "flux-2-klein-base-4b.safetensors"):
        (tmp_path / name).touch()
    line = fault(BadConfig, tmp_path)
    assert "no model_index.json, but ae.safetensors, flux-2-klein-base-4b.safetensors" in line
    assert "fix: name the files as model.transformer" in line


def test_parts_alone_need_no_source(klein: Path) -> None:
    (klein.parent / "bfl.safetensors").touch()
    (klein.parent / "ae.safetensors").touch()
    spec = Model(
        variant="klein-base-4b",
        transformer="bfl.safetensors",
        autoencoder="ae.safetensors",
        text_encoder="klein/text_encoder",
        tokenizer="klein/tokenizer/tokenizer.json",
    )
    model = open_model(spec, klein.parent, no_builtin)
    assert model.variant == VARIANTS["klein-base-4b"]
    assert len(model.text_encoder) == 3


def test_part_of_another_size_is_refused(klein: Path) -> None:
    build(klein.parent / "large", "klein-base-9b")
    wrong = fault(BadConfig, klein, text_encoder="large/text_encoder", variant="klein-base-4b")
    assert "hidden_size: expected 2560, found 4096" in wrong
    assert "joint_attention_dim" in fault(Damaged, klein, text_encoder="large/text_encoder")


def test_absent_path_of_a_part_is_said(klein: Path) -> None:
    assert "model.absent" in fault(NoResources, klein, autoencoder="nowhere.safetensors")


@pytest.mark.parametrize(
    "source", ["./nowhere", "/nowhere/at/all", "a/b/c", "../x", "~/no-such-folder", "~no-such-user/x"]
)
def test_absent_folder_is_said(tmp_path: Path, source: str) -> None:
    with pytest.raises(NoResources, match=r"model\.absent.*does not exist"):
        open_model(Model(source=source), tmp_path, no_builtin)


def test_unknown_name_lists_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(BadConfig, match=r"flux2-micro, black-forest-labs/FLUX\.2-klein-base-4B"):
        open_model(Model(source="flux2-mirco"), tmp_path, no_builtin)


def test_source_that_is_a_file_is_explained(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").touch()
    with pytest.raises(BadConfig, match=r"model\.transformer"):
        open_model(Model(source="a.safetensors"), tmp_path, no_builtin)


HUB_ID = "black-forest-labs/FLUX.2-klein-base-4B"


def cache_model(cache: Path, revision: str = "abc123") -> Path:
    repository = cache / "models--black-forest-labs--FLUX.2-klein-base-4B"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(revision)
    return build(repository / "snapshots" / "abc123", "klein-base-4b")


@pytest.mark.parametrize(
    ("variable", "value", "below"),
    [
        ("HF_HUB_CACHE", "hub", "hub"),
        ("HUGGINGFACE_HUB_CACHE", "hub", "hub"),
        ("HF_HOME", "hf", "hf/hub"),
        ("XDG_CACHE_HOME", "cache", "cache/huggingface/hub"),
        ("HOME", "me", "me/.cache/huggingface/hub"),
    ],
)
def test_hub_id_is_found_where_the_hub_tools_keep_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, below: str
) -> None:
    for name, _ in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, str(tmp_path / value))
    assert hub_cache() == tmp_path / below
    snapshot = cache_model(tmp_path / below)
    model = open_model(Model(source=HUB_ID), tmp_path, no_builtin)
    assert model.transformer[0].is_relative_to(snapshot)
    assert (model.source, model.commit) == (HUB_ID, "abc123")


def test_revision_names_the_branch_tag_or_commit_that_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    snapshots = cache_model(tmp_path).parent
    build(snapshots / ("f" * 40), "klein-4b")
    (snapshots.parent / "refs" / "pr").mkdir()
    (snapshots.parent / "refs" / "pr" / "1").write_text("f" * 40)
    for revision, name in (("main", "klein-base-4b"), ("pr/1", "klein-4b"), ("f" * 40, "klein-4b")):
        assert open_model(Model(source=HUB_ID, revision=revision), tmp_path, no_builtin).variant.name == name
    for revision in ("v2", "e" * 40, "../refs/main", "", "/"):
        with pytest.raises(NoResources, match=f"fix: flux2-lora fetch {HUB_ID} --revision {revision}"):
            open_model(Model(source=HUB_ID, revision=revision), tmp_path, no_builtin)


def test_revision_of_a_folder_is_refused(klein: Path) -> None:
    assert "only a model from the hub has revisions" in fault(BadConfig, klein, revision="v2")


@pytest.mark.parametrize("revision", ["", "def456", "../../..", "..", "/"])
def test_hub_id_not_in_the_cache_names_the_command_that_fetches_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, revision: str
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(NoResources, match=f"fix: flux2-lora fetch {HUB_ID}"):
        open_model(Model(source=HUB_ID), tmp_path, no_builtin)
    cache_model(tmp_path, revision)
    with pytest.raises(NoResources, match=f"fix: flux2-lora fetch {HUB_ID}"):
        open_model(Model(source=HUB_ID), tmp_path, no_builtin)


@pytest.mark.parametrize(
    ("source", "fix"),
    [
        ("klein-base-4b", 'set model.source = "black-forest-labs/FLUX.2-klein-base-4B"'),
        ("flux2-micr", 'set model.source = "flux2-micro"'),
        ("sdxl", "correct model.source"),
    ],
)
def test_name_of_no_folder_is_an_error_that_says_what_to_call_the_model(
    tmp_path: Path, source: str, fix: str
) -> None:
    with pytest.raises(BadConfig) as error:
        open_model(Model(source=source), tmp_path, no_builtin)
    assert (error.value.faults[0].code, error.value.faults[0].fix) == ("model.unknown", fix)


JSON_FILES = (
    "model_index.json",
    "transformer/config.json",
    "vae/config.json",
    "text_encoder/config.json",
    "text_encoder/model.safetensors.index.json",
)


@pytest.mark.parametrize("name", JSON_FILES)
def test_truncated_or_missing_json_is_refused_wherever_it_is_cut(klein: Path, name: str) -> None:
    good = (klein / name).read_bytes()
    for size in range(len(good)):
        (klein / name).write_bytes(good[:size])
        assert name in fault(Damaged, klein)
    (klein / name).write_bytes(b"[" * 100_000)
    assert name in fault(Damaged, klein)
    (klein / name).unlink()
    if "index.json" in name and "text" in name:
        assert len(opened(klein).text_encoder) == 2
    else:
        assert "incomplete" in fault(Damaged, klein)


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("model_index.json", "_class_name", "FluxPipeline"),
        ("model_index.json", "is_distilled", "yes"),
        ("transformer/config.json", "_class_name", "FluxTransformer2DModel"),
        ("transformer/config.json", "num_layers", "5"),
        ("transformer/config.json", "num_layers", 5.0),
        ("transformer/config.json", "num_layers", True),
        ("transformer/config.json", "num_layers", 0),
        ("transformer/config.json", "num_layers", 10**9),
        ("transformer/config.json", "patch_size", 2),
        ("transformer/config.json", "out_channels", 64),
        ("transformer/config.json", "in_channels", 64),
        ("transformer/config.json", "joint_attention_dim", 4096),
        ("transformer/config.json", "axes_dims_rope", [16, 56, 56]),
        ("transformer/config.json", "axes_dims_rope", [32, 32, 32, 30]),
        ("vae/config.json", "_class_name", "AutoencoderKL"),
        ("vae/config.json", "latent_channels", 16),
        ("vae/config.json", "norm_num_groups", 48),
        ("vae/config.json", "decoder_block_out_channels", [96, 192]),
        ("vae/config.json", "act_fn", "relu"),
        ("vae/config.json", "use_quant_conv", False),
        ("text_encoder/config.json", "model_type", "t5"),
        ("text_encoder/config.json", "num_hidden_layers", 26),
        ("text_encoder/config.json", "num_key_value_heads", 7),
        ("text_encoder/config.json", "rope_theta", None),
        ("text_encoder/config.json", "rope_scaling", {"type": "yarn"}),
        ("text_encoder/config.json", "attention_bias", True),
    ],
)
def test_wrong_field_is_refused(klein: Path, name: str, field: str, value: object) -> None:
    change(klein / name, **{field: value})
    assert str(klein) in fault(Damaged, klein)


@pytest.mark.parametrize("field", ["num_layers", "num_attention_heads", "joint_attention_dim", "axes_dims_rope"])
def test_missing_field_is_named(klein: Path, field: str) -> None:
    config = transformer_json(VARIANTS["klein-base-4b"])
    del config[field]
    write(klein / "transformer" / "config.json", config)
    assert field in fault(Damaged, klein)


def test_missing_weights_are_named(klein: Path) -> None:
    (klein / "text_encoder" / "model-00002-of-00002.safetensors").unlink()
    assert "1 of 2 weight files are absent: model-00002-of-00002.safetensors" in fault(Damaged, klein)
    (klein / "vae" / "diffusion_pytorch_model.safetensors").rename(klein / "vae" / "diffusion_pytorch_model.bin")
    assert "no .safetensors file" in fault(Damaged, klein)
    (klein / "tokenizer" / "tokenizer.json").unlink()
    assert "incomplete" in fault(Damaged, klein)


def test_failing_read_names_the_model(klein: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(_path: Path, _mode: str) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(Path, "open", failing)
    assert f"({klein})" in fault(NoResources, klein)


def test_link_to_a_blob_that_is_gone_is_incomplete(klein: Path) -> None:
    path = klein / "transformer" / "diffusion_pytorch_model.safetensors"
    path.unlink()
    path.symlink_to(klein / "blobs" / "gone")
    assert "incomplete" in fault(Damaged, klein)


@pytest.mark.parametrize(
    "name", ["../../secret.safetensors", "/etc/passwd", "model.bin", "", "..", "a/b.safetensors"]
)
def test_index_never_leads_out_of_its_folder(klein: Path, name: str) -> None:
    write(klein / "text_encoder" / "model.safetensors.index.json", {"weight_map": {"a": name}})
    assert "model.index" in fault(Damaged, klein)


def test_pickle_is_never_a_weight_file(klein: Path) -> None:
    (klein.parent / "ae.pt").touch()
    assert "pickles" in fault(Damaged, klein, autoencoder="ae.pt")


def test_two_indices_in_a_folder_are_refused(klein: Path) -> None:
    write(klein / "text_encoder" / "other.safetensors.index.json", {"weight_map": {}})
    assert "several indices" in fault(Damaged, klein)


def test_distilled_model_trains_only_when_allowed(tmp_path: Path) -> None:
    model = opened(build(tmp_path / "m", "klein-4b"))
    require_trainable(model, allow_distilled=True)
    with pytest.raises(
        BadConfig, match=r'model\.distilled.*model\.source = "black-forest-labs/FLUX\.2-klein-base-4B"'
    ):
        require_trainable(model, allow_distilled=False)
    require_trainable(opened(build(tmp_path / "b", "klein-base-4b")), allow_distilled=False)


def test_opening_a_model_imports_nothing_heavy() -> None:
    code = "import sys, stages.flux2.folder; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "stages.flux2.folder" in loaded
    assert not {"numpy", "mlx", "mlx.core", "zarr", "pyarrow", "PIL", "tokenizers"} & set(loaded)
