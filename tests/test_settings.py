"""Every setting and the test that shows its effect; a setting without one fails here.

A new field is one line in SHOWN. One that is in no key is also one in UNKEYED: the test that it changes no result.
"""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from msgspec import inspect

from schemas.run import Config

TESTS = Path(__file__).parent

EFFECTS, STAGES = "test_settings_effects.py", "stages/test_settings.py"
ITEMS, TAGS = "dataset/test_items.py", "dataset/test_tags.py"
LATENTS, MASKS, PRESERVATION = "stages/test_encode_latents.py", "stages/test_masks.py", "stages/test_preservation.py"
OBJECTIVE, OPTIMIZERS = "training/test_objective.py", "training/test_optimizers.py"
TRACKERS = "stages/test_trackers.py"
VALIDATION = "stages/test_validation_loss.py"
SCHEDULES, TIMESTEPS = "training/test_schedules.py", "training/test_timesteps.py"
ACTS = f"{EFFECTS}::test_setting_acts_first_where_it_should"
ADAPTER = f"{EFFECTS}::test_every_setting_of_an_adapter_trains_another_one"
STRATA = f"{EFFECTS}::test_strata_of_every_kind_of_timesteps_each_get_one_of_sixteen_draws"
SHIFT = f"{EFFECTS}::test_mean_and_std_of_shifted_timesteps_move_and_stretch_the_logits"
OPTIMIZER = f"{OPTIMIZERS}::test_every_setting_changes_the_factors"
STEPS = f"{OPTIMIZERS}::test_every_step_is_that_of_the_reference_implementation"
CONSTANT = f"{SCHEDULES}::test_learning_rate_warms_up_linearly_and_stays"
DECAY = f"{SCHEDULES}::test_decay_goes_from_the_peak_to_the_least_share"
POWER = f"{SCHEDULES}::test_polynomial_of_power_one_is_linear_and_a_higher_one_lies_below"
RISING = "training/test_sweep.py::test_rates_rise_by_the_same_factor_up_to_the_highest"
RATES = f"{SCHEDULES}::test_rates_are_those_of_transformers_with_the_warm_up_one_step_sooner"
DRAWN = f"{TIMESTEPS}::test_timesteps_follow_their_distribution"
WINDOW = f"{TIMESTEPS}::test_a_window_keeps_the_shape_and_piles_nothing_up_at_its_ends"
WEIGHTS = "training/test_weighting.py::test_weights_are_those_of_diffusers"
CLASS_WEIGHT = f"{OBJECTIVE}::test_preservation_is_the_change_under_the_class_captions_by_its_weight"
CLASS_WORD = f"{PRESERVATION}::test_another_class_word_encodes_the_class_captions_again_and_nothing_else"
QUANTIZE = "stages/test_quantize.py"
PHASES = "training/test_visits.py::test_phase_draws_its_sizes_and_keeps_pictures_that_are_too_small"
ROTATION = "training/test_rotation.py::test_rule_names_what_goes"
PART = f"{STAGES}::test_part_of_a_model_is_read_where_the_setting_says"
PICTURE = f"{STAGES}::test_every_setting_of_previews_draws_another_picture_of_the_same_lora"
UP_TO_DATE = f"{STAGES}::test_setting_in_no_key_leaves_a_training_up_to_date"
COLLAPSE = "training/test_guards.py::test_collapse_factor_and_collapse_patience_say_what_a_collapse_is"
COLLAPSES = f"{VALIDATION}::test_collapsing_training_is_warned_of_and_ends_with_exit_8_and_whole_checkpoints"
NOISE = f"{STAGES}::test_seed_of_validation_draws_another_noise_and_trains_the_same"
ANY_PLACE = "stages/test_chain.py::test_run_name_and_places_change_no_digest"

SHOWN = {
    "validate.dataset": "contract/test_runner.py::test_relative_dataset_starts_from_the_configuration_file",
    "validate.trigger": f"{ITEMS}::test_each_setting_that_shapes_items_moves_ids",
    "validate.resolutions": f"{ITEMS}::test_each_setting_that_shapes_items_moves_ids",
    "validate.upscale": f"{STAGES}::test_picture_too_small_for_a_resolution_fills_it_only_by_upscaling",
    "validate.background": f"{STAGES}::test_background_shows_where_a_picture_is_transparent",
    "validate.max_megapixels": f"{STAGES}::test_picture_above_the_limit_of_megapixels_is_rejected",
    "validate.allow_empty_captions": f"{STAGES}::test_empty_caption_is_rejected_unless_allowed",
    "validate.skip_bad": "stages/test_validate.py::test_skip_bad_goes_on_without_them_and_records_them",
    "validate.captions": f"{ITEMS}::test_every_line_of_a_caption_is_an_item_of_the_same_picture",
    "validate.tags.separator": f"{TAGS}::test_separator_is_kept_with_a_space_where_it_has_none",
    "validate.tags.variants": "stages/test_variants.py::test_tag_variants_are_a_fixed_number_of_cached_texts",
    "validate.tags.shuffle": f"{TAGS}::test_dropout_leaves_out_its_share_and_never_everything",
    "validate.tags.dropout": f"{TAGS}::test_dropout_leaves_out_its_share_and_never_everything",
    "validate.tags.keep_first": f"{TAGS}::test_shuffle_keeps_every_tag_and_the_first_ones_in_place",
    "validate.tags.seed": f"{TAGS}::test_variants_depend_on_seed_and_caption_alone",
    "validate.repeats[].pattern": f"{ITEMS}::test_repeats_count_by_the_last_pattern_that_matches_and_move_no_id",
    "validate.repeats[].times": "stages/test_variants.py::test_repeats_encode_nothing_and_lengthen_the_epoch",
    "validate.class_dataset": f"{MASKS}::test_class_pictures_are_cached_rows_that_count_by_their_weight",
    "validate.masks": f"{MASKS}::test_masks_act_on_training_only_where_it_asks_for_them",
    "run.name": "contract/test_runner.py::test_run_is_named_by_the_table_or_the_file",
    "run.seed": f"{EFFECTS}::test_another_seed_is_another_order_start_and_draw_of_everything",
    "model.source": "flux2/test_folder.py::test_folder_is_relative_to_the_configuration",
    "model.revision": "flux2/test_folder.py::test_revision_names_the_branch_tag_or_commit_that_is_opened",
    "model.variant": "flux2/test_folder.py::test_single_file_needs_a_variant",
    "model.transformer": PART,
    "model.autoencoder": PART,
    "model.text_encoder": PART,
    "model.tokenizer": PART,
    "model.quantize": f"{QUANTIZE}::test_every_format_trains_draws_and_verifies",
    "model.allow_distilled": "stages/test_train.py::test_distilled_model_is_refused_unless_allowed",
    "encode_latents.dtype": f"{LATENTS}::test_another_type_or_size_is_encoded_anew_and_the_old_stays_usable",
    "encode_latents.flip": f"{LATENTS}::test_mirrored_twins_are_encoded_beside_what_is_there",
    "encode_text.dtype": "stages/test_encode_text.py::test_another_type_is_encoded_anew",
    "encode_text.quantize": f"{QUANTIZE}::test_every_format_of_the_text_encoder_is_an_embedding_of_its_own",
    "train.steps": "stages/test_train.py::test_more_steps_continue_and_fewer_steps_go_back",
    "train.batch_size": ACTS,
    "train.gradient_accumulation": ACTS,
    "train.learning_rate": ACTS,
    "train.rank": ACTS,
    "train.alpha": ACTS,
    "train.targets": ACTS,
    "train.exclude": ACTS,
    "train.overrides[].pattern": ACTS,
    "train.overrides[].rank": ACTS,
    "train.overrides[].alpha": ACTS,
    "train.adapter[lora]": "lora/test_layer.py::test_adapter_adds_the_scaled_low_rank_product",
    "train.adapter[lora].init": ADAPTER,
    "train.adapter[lora].rslora": ADAPTER,
    "train.adapter[lora].dropout": ADAPTER,
    "train.adapter[lora].rank_dropout": ADAPTER,
    "train.adapter[lora].module_dropout": ADAPTER,
    "train.adapter[lora].max_norm": ADAPTER,
    "train.adapter[dora]": "lora/test_dora.py::test_loss_and_gradients_of_every_factor_are_those_of_peft",
    "train.adapter[dora].init": ADAPTER,
    "train.adapter[dora].rslora": ADAPTER,
    "train.adapter[dora].dropout": ADAPTER,
    "train.adapter[dora].rank_dropout": ADAPTER,
    "train.adapter[dora].module_dropout": ADAPTER,
    "train.adapter[dora].max_norm": ADAPTER,
    "train.adapter[lokr]": "lora/test_lokr.py::test_it_adds_the_scaled_kronecker_product",
    "train.adapter[lokr].factor": ADAPTER,
    "train.adapter[lokr].dropout": ADAPTER,
    "train.adapter[lokr].module_dropout": ADAPTER,
    "train.adapter[lokr].max_norm": ADAPTER,
    "train.init_lora": "stages/test_adapters.py::test_training_goes_on_from_a_file_whatever_it_is_called",
    "train.checkpoint_every": "training/test_loop.py::test_checkpoints_fall_on_every_nth_step_and_the_last",
    "train.rotation.keep_last": ROTATION,
    "train.rotation.keep_every": ROTATION,
    "train.rotation.max_age_days": ROTATION,
    "train.rotation.max_gigabytes": ROTATION,
    "train.rotation.pin": ROTATION,
    "train.rotation.keep_best": "training/test_rotation.py::test_best_is_kept_and_of_equals_the_later",
    "train.gradient_checkpointing": f"{EFFECTS}::test_gradient_checkpointing_is_asked_of_the_transformer",
    "train.compile": f"{EFFECTS}::test_compile_traces_gradient_and_update_and_its_absence_neither",
    "train.caption_dropout": ACTS,
    "train.clip_norm": ACTS,
    "train.save_dtype": f"{STAGES}::test_lora_is_saved_in_the_type_asked_for",
    "train.optimizer[adamw]": STEPS,
    "train.optimizer[adamw].beta1": OPTIMIZER,
    "train.optimizer[adamw].beta2": OPTIMIZER,
    "train.optimizer[adamw].eps": OPTIMIZER,
    "train.optimizer[adamw].weight_decay": OPTIMIZER,
    "train.optimizer[adamw].lora_plus_ratio": OPTIMIZER,
    "train.optimizer[adamw8bit]": f"{OPTIMIZERS}::test_eight_bit_moments_follow_those_in_float32_for_a_hundred_steps",
    "train.optimizer[adamw8bit].beta1": OPTIMIZER,
    "train.optimizer[adamw8bit].beta2": OPTIMIZER,
    "train.optimizer[adamw8bit].eps": OPTIMIZER,
    "train.optimizer[adamw8bit].weight_decay": OPTIMIZER,
    "train.optimizer[adamw8bit].lora_plus_ratio": OPTIMIZER,
    "train.optimizer[adafactor]": STEPS,
    "train.optimizer[adafactor].beta1": OPTIMIZER,
    "train.optimizer[adafactor].decay_rate": OPTIMIZER,
    "train.optimizer[adafactor].clip_threshold": OPTIMIZER,
    "train.optimizer[adafactor].scale_parameter": OPTIMIZER,
    "train.optimizer[adafactor].weight_decay": OPTIMIZER,
    "train.optimizer[adafactor].lora_plus_ratio": OPTIMIZER,
    "train.optimizer[lion]": STEPS,
    "train.optimizer[lion].beta1": OPTIMIZER,
    "train.optimizer[lion].beta2": OPTIMIZER,
    "train.optimizer[lion].weight_decay": OPTIMIZER,
    "train.optimizer[lion].lora_plus_ratio": OPTIMIZER,
    "train.optimizer[prodigy]": STEPS,
    "train.optimizer[prodigy].beta1": OPTIMIZER,
    "train.optimizer[prodigy].beta2": OPTIMIZER,
    "train.optimizer[prodigy].beta3": OPTIMIZER,
    "train.optimizer[prodigy].eps": OPTIMIZER,
    "train.optimizer[prodigy].weight_decay": OPTIMIZER,
    "train.optimizer[prodigy].d0": OPTIMIZER,
    "train.optimizer[prodigy].d_coef": OPTIMIZER,
    "train.optimizer[prodigy].growth_rate": OPTIMIZER,
    "train.optimizer[prodigy].use_bias_correction": OPTIMIZER,
    "train.optimizer[prodigy].safeguard_warmup": OPTIMIZER,
    "train.optimizer[muon]": STEPS,
    "train.optimizer[muon].momentum": OPTIMIZER,
    "train.optimizer[muon].nesterov": OPTIMIZER,
    "train.optimizer[muon].ns_steps": OPTIMIZER,
    "train.optimizer[muon].weight_decay": OPTIMIZER,
    "train.optimizer[muon].lora_plus_ratio": OPTIMIZER,
    "train.optimizer[schedule_free]": STEPS,
    "train.optimizer[schedule_free].beta1": OPTIMIZER,
    "train.optimizer[schedule_free].beta2": OPTIMIZER,
    "train.optimizer[schedule_free].eps": OPTIMIZER,
    "train.optimizer[schedule_free].weight_decay": OPTIMIZER,
    "train.optimizer[schedule_free].r": OPTIMIZER,
    "train.optimizer[schedule_free].weight_lr_power": OPTIMIZER,
    "train.optimizer[schedule_free].lora_plus_ratio": OPTIMIZER,
    "train.tracking.kinds": f"{TRACKERS}::test_tensorboard_hears_every_line_and_sees_every_picture",
    "train.tracking.project": f"{TRACKERS}::test_weights_and_biases_is_told_the_project_and_whether_to_send",
    "train.tracking.online": f"{TRACKERS}::test_weights_and_biases_is_told_the_project_and_whether_to_send",
    "train.schedule[constant]": CONSTANT,
    "train.schedule[constant].warmup_steps": CONSTANT,
    "train.schedule[linear]": RATES,
    "train.schedule[linear].warmup_steps": DECAY,
    "train.schedule[linear].min_ratio": DECAY,
    "train.schedule[cosine]": RATES,
    "train.schedule[cosine].warmup_steps": DECAY,
    "train.schedule[cosine].min_ratio": DECAY,
    "train.schedule[cosine_restarts]": RATES,
    "train.schedule[cosine_restarts].warmup_steps": DECAY,
    "train.schedule[cosine_restarts].min_ratio": DECAY,
    "train.schedule[cosine_restarts].cycles": "training/test_schedules.py::test_every_restart_is_at_the_peak",
    "train.schedule[polynomial]": RATES,
    "train.schedule[polynomial].warmup_steps": DECAY,
    "train.schedule[polynomial].min_ratio": DECAY,
    "train.schedule[polynomial].power": POWER,
    "train.schedule[rex]": "training/test_schedules.py::test_rex_is_the_formula_of_its_paper",
    "train.schedule[rex].warmup_steps": DECAY,
    "train.schedule[rex].min_ratio": DECAY,
    "train.schedule[rising]": RISING,
    "train.schedule[rising].warmup_steps": RISING,
    "train.schedule[rising].min_ratio": RISING,
    "train.ema.decay": "training/test_ema.py::test_the_average_moves_by_one_minus_decay",
    "train.ema.warmup": "training/test_ema.py::test_warm_up_forgets_the_start_and_ends_at_the_decay",
    "train.timesteps[uniform]": DRAWN,
    "train.timesteps[uniform].minimum": WINDOW,
    "train.timesteps[uniform].maximum": WINDOW,
    "train.timesteps[uniform].stratified": STRATA,
    "train.timesteps[balanced]": DRAWN,
    "train.timesteps[balanced].minimum": WINDOW,
    "train.timesteps[balanced].maximum": WINDOW,
    "train.timesteps[balanced].stratified": STRATA,
    "train.timesteps[weighted]": "training/test_weighting.py::test_weighted_timesteps_bring_the_bell",
    "train.timesteps[weighted].minimum": WINDOW,
    "train.timesteps[weighted].maximum": WINDOW,
    "train.timesteps[weighted].stratified": STRATA,
    "train.timesteps[logit_normal]": DRAWN,
    "train.timesteps[logit_normal].minimum": WINDOW,
    "train.timesteps[logit_normal].maximum": WINDOW,
    "train.timesteps[logit_normal].stratified": STRATA,
    "train.timesteps[logit_normal].mean": DRAWN,
    "train.timesteps[logit_normal].std": DRAWN,
    "train.timesteps[sigmoid]": DRAWN,
    "train.timesteps[sigmoid].minimum": WINDOW,
    "train.timesteps[sigmoid].maximum": WINDOW,
    "train.timesteps[sigmoid].stratified": STRATA,
    "train.timesteps[sigmoid].scale": DRAWN,
    "train.timesteps[shift]": DRAWN,
    "train.timesteps[shift].minimum": WINDOW,
    "train.timesteps[shift].maximum": WINDOW,
    "train.timesteps[shift].stratified": STRATA,
    "train.timesteps[shift].mean": SHIFT,
    "train.timesteps[shift].std": SHIFT,
    "train.timesteps[mode]": "training/test_timesteps.py::test_mode_is_that_of_diffusers",
    "train.timesteps[mode].minimum": WINDOW,
    "train.timesteps[mode].maximum": WINDOW,
    "train.timesteps[mode].stratified": STRATA,
    "train.timesteps[mode].scale": "training/test_timesteps.py::test_mode_is_that_of_diffusers",
    "train.timesteps[content]": DRAWN,
    "train.timesteps[content].minimum": WINDOW,
    "train.timesteps[content].maximum": WINDOW,
    "train.timesteps[content].stratified": STRATA,
    "train.timesteps[style]": DRAWN,
    "train.timesteps[style].minimum": WINDOW,
    "train.timesteps[style].maximum": WINDOW,
    "train.timesteps[style].stratified": STRATA,
    "train.weighting[none]": "training/test_weighting.py::test_no_weighting_is_one_everywhere",
    "train.weighting[bell]": "training/test_weighting.py::test_the_bell_is_ai_toolkits_table",
    "train.weighting[sigma_sqrt]": WEIGHTS,
    "train.weighting[cosmap]": WEIGHTS,
    "train.loss[mse]": f"{OBJECTIVE}::test_the_loss_takes_its_kind",
    "train.loss[huber]": f"{OBJECTIVE}::test_the_loss_takes_its_kind",
    "train.loss[huber].delta": f"{OBJECTIVE}::test_huber_is_twice_that_of_torch",
    "train.noise_offset": ACTS,
    "train.mask.outside": f"{OBJECTIVE}::test_masked_loss_is_the_mean_of_the_cells_by_their_weights",
    "train.mask.keep_base": f"{OBJECTIVE}::test_keeping_the_base_outside_a_mask_pulls_as_two_losses_do",
    "train.preservation[output]": f"{PRESERVATION}::test_training_is_another_from_the_second_step_on",
    "train.preservation[output].class_word": CLASS_WORD,
    "train.preservation[output].every": f"{PRESERVATION}::test_the_class_is_held_only_at_every_nth_step",
    "train.preservation[output].weight": CLASS_WEIGHT,
    "train.preservation[prior]": f"{MASKS}::test_class_pictures_are_cached_rows_that_count_by_their_weight",
    "train.preservation[prior].weight": f"{MASKS}::test_class_pictures_are_cached_rows_that_count_by_their_weight",
    "train.resolutions[].sizes": PHASES,
    "train.resolutions[].until": PHASES,
    "train.validation.every": f"{VALIDATION}::test_loss_is_measured_at_the_start_and_every_n_steps",
    "train.validation.pictures": f"{VALIDATION}::test_pictures_of_the_class_are_never_held_out",
    "train.validation.names": f"{VALIDATION}::test_held_out_picture_is_not_trained_on",
    "train.validation.seed": NOISE,
    "train.validation.sigmas": f"{VALIDATION}::test_loss_is_the_mean_over_the_noise_levels_of_the_settings",
    "train.validation.collapse_factor": COLLAPSE,
    "train.validation.collapse_patience": COLLAPSE,
    "preview.distilled": (
        "stages/test_preview.py::test_distilled_sibling_draws_in_four_steps_without_guidance_after_training"
    ),
    "preview.prompts": "stages/test_preview.py::test_several_prompts_give_single_pictures_and_a_grid",
    "preview.seed": PICTURE,
    "preview.size": f"{STAGES}::test_previews_have_the_size_asked_for",
    "preview.steps": PICTURE,
    "preview.guidance": PICTURE,
    "preview.ema": "stages/test_ema.py::test_previews_of_the_average_are_other_pictures",
    "preview.during_training": "stages/test_preview.py::test_pictures_are_the_same_whether_training_drew_them_or_not",
}
UNKEYED = {
    "train.tracking.kinds": f"{TRACKERS}::test_tracking_changes_no_key_and_no_bit",
    "train.tracking.project": f"{TRACKERS}::test_tracking_changes_no_key_and_no_bit",
    "train.tracking.online": f"{TRACKERS}::test_tracking_changes_no_key_and_no_bit",
    "validate.dataset": ANY_PLACE,
    "validate.class_dataset": f"{MASKS}::test_class_folder_moved_is_found_again_without_encoding",
    "run.name": ANY_PLACE,
    "model.source": "flux2/test_weights.py::test_every_spelling_of_the_same_weights_has_the_same_digest",
    "model.revision": "stages/test_hub_models.py::test_pinned_commit_stays_when_the_branch_moves",
    "model.variant": PART,
    "model.transformer": PART,
    "model.autoencoder": PART,
    "model.text_encoder": PART,
    "model.tokenizer": PART,
    "model.allow_distilled": UP_TO_DATE,
    "train.init_lora": "stages/test_adapters.py::test_training_goes_on_from_a_file_whatever_it_is_called",
    "train.checkpoint_every": "training/test_loop.py::test_number_of_checkpoints_changes_nothing",
    "train.rotation.keep_last": UP_TO_DATE,
    "train.rotation.keep_every": UP_TO_DATE,
    "train.rotation.max_age_days": UP_TO_DATE,
    "train.rotation.max_gigabytes": UP_TO_DATE,
    "train.rotation.pin": UP_TO_DATE,
    "train.rotation.keep_best": UP_TO_DATE,
    "train.validation.every": f"{VALIDATION}::test_how_often_and_where_it_is_measured_changes_no_bit",
    "train.validation.seed": NOISE,
    "train.validation.sigmas": f"{VALIDATION}::test_how_often_and_where_it_is_measured_changes_no_bit",
    "train.validation.collapse_factor": COLLAPSES,
    "train.validation.collapse_patience": COLLAPSES,
    "preview.during_training": UP_TO_DATE,
}


def fields(info: inspect.Type, path: str = "") -> Iterator[str]:
    """Yield the dotted name of every setting below a type: `a.b`, `a.b[kind]` and `a.b[kind].c`, `a.rows[].d`."""
    match info:
        case inspect.Metadata(type=inner):
            yield from fields(inner, path)
        case inspect.UnionType(types=types):
            for each in types:
                yield from fields(each, path)
        case inspect.ListType(item_type=inner) | inspect.VarTupleType(item_type=inner):
            yield from fields(inner, f"{path}[]")
        case inspect.StructType(tag=tag, fields=own):
            kind = f"{path}[{tag}]" if tag else path
            yield from [kind] if tag else []
            for field in own:
                name = f"{kind}.{field.encode_name}".lstrip(".")
                below = list(fields(field.type, name))
                # A table stands for nothing but its fields, and [verify] has none.
                yield from below or ([] if isinstance(field.type, inspect.StructType) else [name])
        case _:
            return


@functools.cache
def source(file: str) -> str:
    return (TESTS / file).read_text(encoding="utf-8")


@functools.cache
def names_in(file: str) -> set[str]:
    """Return the names of the tests of a file."""
    return {node.name for node in ast.parse(source(file)).body if isinstance(node, ast.FunctionDef)}


def test_every_setting_names_the_test_of_its_effect() -> None:
    found = set(fields(inspect.type_info(Config)))
    assert sorted(found - set(SHOWN)) == [], "settings whose effect no test is named for"
    assert sorted(set(SHOWN) - found) == [], "no such settings"
    assert sorted(set(UNKEYED) - found) == [], "no such settings"


@pytest.mark.parametrize("table", [SHOWN, UNKEYED], ids=["shown", "unkeyed"])
def test_every_named_test_exists(table: dict[str, str]) -> None:
    named = {field: test.partition("::") for field, test in table.items()}
    assert {field: file for field, (file, _, test) in named.items() if test not in names_in(file)} == {}


def test_every_named_file_speaks_of_its_setting() -> None:
    def word(field: str) -> str:
        return field.rstrip("[]").rpartition("[" if field.endswith("]") else ".")[2].replace("_", "")

    silent = {
        field: test
        for field, test in SHOWN.items()
        if not re.search(word(field), source(test.partition("::")[0]).replace("_", ""), re.IGNORECASE)
    }
    assert silent == {}


def test_settings_are_found_at_every_depth() -> None:
    found = list(fields(inspect.type_info(Config)))
    assert len(found) == len(set(found))
    assert {"run.seed", "validate.tags.seed", "validate.repeats[].times", "train.adapter[lokr].factor"} < set(found)
    assert {"train.loss[mse]", "train.optimizer[lion].beta1", "preview.prompts", "model.tokenizer"} < set(found)
    assert not {"train", "verify", "train.ema", "train.optimizer", "train.overrides"} & set(found)
