from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import msgspec
import pytest

from schemas.optimizers import Adafactor, AdamW, AdamW8bit, Lion, Muon, Optimizer, Prodigy, ScheduleFree
from schemas.train import Train
from stages.lora.layer import Factors
from stages.training.optimizers.choice import optimizer
from stages.training.optimizers.eight_bit import BLOCK, ROOT, SIGNED, UNSIGNED, decode, encode
from stages.training.optimizers.rule import State
from tests.golden import tiny
from tests.training.test_step import SETTINGS, batch, equal, trainer

# max|factor - theirs| / max|theirs| after every one of the recorded steps; 2.0e-6 at most when written.
BOUND = 1e-5
ALL = (AdamW(), AdamW8bit(), Adafactor(), Lion(), Prodigy(), Muon(), ScheduleFree())
WITH_LORA_PLUS = tuple(spec for spec in ALL if not isinstance(spec, Prodigy))
STOPS = 8


def name_of(value: object) -> str:
    return type(value).__name__


def start() -> Factors:
    golden = tiny.arrays("optimizers")
    return {name.removeprefix("start."): golden[name] for name in golden if name.startswith("start.")}


def walk(spec: Optimizer, rates: list[float]) -> list[tuple[Factors, State]]:
    """Factors and state after each update by the recorded gradients."""
    golden = tiny.arrays("optimizers")
    rule, factors, taken = optimizer(spec), start(), []
    state = rule.initial(factors)
    for step, rate in enumerate(rates):
        given = {name: golden[f"gradient.{name}"][step] for name in factors}
        factors, state = rule.update(given, factors, state, mx.array(rate))
        taken.append((factors, state))
    return taken


CONSTANT = [0.02] * 20
WARM = [0.02 * min(1.0, (step + 1) / 5) for step in range(20)]
CASES = {
    "adamw": (AdamW(beta2=0.99, eps=1e-7, weight_decay=0.1), CONSTANT),
    "adafactor": (
        Adafactor(beta1=0.8, clip_threshold=0.7, decay_rate=-0.6, weight_decay=0.1, scale_parameter=True),
        CONSTANT,
    ),
    "lion": (Lion(beta2=0.95, weight_decay=0.1), CONSTANT),
    "muon": (Muon(momentum=0.9, ns_steps=4, weight_decay=0.1), CONSTANT),
    "muon_plain": (Muon(nesterov=False), CONSTANT),
    "prodigy": (Prodigy(d0=1e-3), [1.0] * 20),
    "prodigy_all": (
        Prodigy(
            beta1=0.8,
            beta2=0.99,
            beta3=0.9,
            eps=1e-6,
            weight_decay=0.1,
            d0=1e-3,
            d_coef=2.0,
            growth_rate=1.2,
            use_bias_correction=True,
            safeguard_warmup=True,
        ),
        [0.5] * 20,
    ),
    "schedule_free": (ScheduleFree(), WARM),
    "schedule_free_all": (
        ScheduleFree(beta1=0.8, beta2=0.99, eps=1e-6, weight_decay=0.1, r=1.5, weight_lr_power=1.0),
        WARM,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_every_step_is_that_of_the_reference_implementation(case: str) -> None:
    """torch 2.13 (AdamW, Muon), transformers 5.23 (Adafactor), lion-pytorch, prodigyopt, schedulefree; float32."""
    golden, (spec, rates) = tiny.arrays("optimizers"), CASES[case]
    for step, (factors, _) in enumerate(walk(spec, rates)):
        for name, factor in factors.items():
            assert tiny.error(factor, golden[f"{case}.{name}"][step]) <= BOUND


@pytest.mark.parametrize("case", ["prodigy", "prodigy_all"])
def test_the_estimate_of_prodigy_is_the_reference_s(case: str) -> None:
    golden, (spec, rates) = tiny.arrays("optimizers"), CASES[case]
    found = mx.stack([state["d"] for _, state in walk(spec, rates)])
    assert (mx.abs(found / golden[f"{case}.d"] - 1)).max().item() <= BOUND
    assert found[-1].item() > found[0].item()


@pytest.mark.parametrize("case", ["schedule_free", "schedule_free_all"])
def test_schedule_free_evaluates_the_reference_s_average(case: str) -> None:
    golden, (spec, rates) = tiny.arrays("optimizers"), CASES[case]
    rule = optimizer(spec)
    for step, (factors, state) in enumerate(walk(spec, rates)):
        for name, factor in rule.evaluated(factors, state).items():
            assert tiny.error(factor, golden[f"{case}.{name}.evaluated"][step]) <= BOUND


CHANGED: dict[type, dict[str, float]] = {
    AdamW: {"beta1": 0.5, "beta2": 0.9, "eps": 1e-2, "weight_decay": 0.5, "lora_plus_ratio": 4.0},
    AdamW8bit: {"beta1": 0.5, "beta2": 0.9, "eps": 1e-2, "weight_decay": 0.5, "lora_plus_ratio": 4.0},
    Adafactor: {
        "beta1": 0.5,
        "decay_rate": -0.3,
        "clip_threshold": 0.5,
        "scale_parameter": True,
        "weight_decay": 0.5,
        "lora_plus_ratio": 4.0,
    },
    Lion: {"beta1": 0.5, "beta2": 0.5, "weight_decay": 0.5, "lora_plus_ratio": 4.0},
    Prodigy: {
        "beta1": 0.5,
        "beta2": 0.9,
        "beta3": 0.5,
        "eps": 1e-2,
        "weight_decay": 0.5,
        "d0": 1e-3,
        "d_coef": 3.0,
        "growth_rate": 1.01,
        "use_bias_correction": True,
        "safeguard_warmup": True,
    },
    Muon: {"momentum": 0.5, "nesterov": False, "ns_steps": 2, "weight_decay": 0.5, "lora_plus_ratio": 4.0},
    ScheduleFree: {
        "beta1": 0.5,
        "beta2": 0.9,
        "eps": 1e-2,
        "weight_decay": 0.5,
        "r": 2.0,
        "weight_lr_power": 0.0,
        "lora_plus_ratio": 4.0,
    },
}


@pytest.mark.parametrize("spec", ALL, ids=name_of)
def test_every_setting_changes_the_factors(spec: Optimizer) -> None:
    changed = CHANGED[type(spec)]
    assert set(changed) == set(spec.__struct_fields__)
    # Prodigy's rate is about 1: far below, its estimate never grows.
    rates = [50 * rate if isinstance(spec, Prodigy) else rate for rate in WARM[:8]]
    plain, _ = walk(spec, rates)[-1]
    for field, value in changed.items():
        other, _ = walk(msgspec.structs.replace(spec, **{field: value}), rates)[-1]
        assert not equal(other, plain), field


@pytest.mark.parametrize("spec", WITH_LORA_PLUS, ids=name_of)
def test_lora_plus_multiplies_the_rate_of_b_alone(spec: Optimizer) -> None:
    plain, _ = walk(spec, [0.01])[0]
    other, _ = walk(msgspec.structs.replace(spec, lora_plus_ratio=16.0), [0.01])[0]
    for name, factor in plain.items():
        if name.endswith("lora_A"):
            assert mx.array_equal(other[name], factor)
        else:
            assert tiny.error(other[name], 16 * factor) <= 1e-6


def test_the_rate_left_out_is_the_optimizer_s_own() -> None:
    rates = {name_of(spec): Train(optimizer=spec).learning_rate for spec in ALL}
    assert rates == {
        "AdamW": 1e-4,
        "AdamW8bit": 1e-4,
        "Adafactor": 1e-4,
        "Lion": 3e-5,
        "Prodigy": 1.0,
        "Muon": 1e-3,
        "ScheduleFree": 3e-4,
    }
    assert Train(optimizer=Lion(), learning_rate=1e-3).peak_rate == 1e-3
    assert msgspec.to_builtins(msgspec.convert({"optimizer": {"kind": "prodigy"}}, Train))["learning_rate"] == 1.0


def test_prodigy_refuses_a_rate_of_its_own_for_b() -> None:
    with pytest.raises(msgspec.ValidationError, match="lora_plus_ratio"):
        msgspec.convert({"kind": "prodigy", "lora_plus_ratio": 16.0}, Optimizer)


@pytest.mark.parametrize("spec", ALL, ids=name_of)
def test_factors_without_a_gradient_stay_where_they_are(spec: Optimizer) -> None:
    rule, factors = optimizer(spec), start()
    zeros = {name: mx.zeros_like(factor) for name, factor in factors.items()}
    undecayed = msgspec.structs.replace(spec, weight_decay=0.0)
    moved, state = optimizer(undecayed).update(zeros, factors, rule.initial(factors), mx.array(0.01))
    assert equal(moved, factors)
    assert all(mx.isfinite(array).all().item() for array in state.values())


def test_weight_decay_of_muon_shrinks_factors_by_rate_times_decay() -> None:
    factors = start()
    rule = optimizer(Muon(weight_decay=0.5))
    zeros = {name: mx.zeros_like(factor) for name, factor in factors.items()}
    moved, _ = rule.update(zeros, factors, rule.initial(factors), mx.array(0.01))
    assert equal(moved, {name: factor * (1 - mx.array(0.01) * 0.5) for name, factor in factors.items()})


@pytest.mark.parametrize("levels", [SIGNED, UNSIGNED])
def test_eight_bit_codes_keep_values_four_decades_below_the_greatest(levels: int) -> None:
    values = mx.power(10.0, -4 * mx.random.uniform(shape=(3, 1000), key=mx.random.key(1)))
    codes, scales = encode(values, levels)
    assert codes.shape == (-(-3000 // BLOCK), BLOCK)
    # Half a step of c at the smallest share, 1e-4: there c = levels * 1e-4^(1/5).
    step = ROOT * 0.5 / (levels * 1e-4 ** (1 / ROOT))
    found = decode(codes, scales, levels, (3, 1000))
    assert mx.abs(found / values - 1).max().item() <= step * 1.1


def test_eight_bit_moments_follow_those_in_float32_for_a_hundred_steps() -> None:
    """Gradients with a direction and noise of twice its size; magnitudes log-normal, a factor e^1.5 each way."""
    shape, steps = (16, 1000), 100
    spread, drift = (mx.random.normal(shape, key=mx.random.key(seed)) for seed in (1, 2))
    factors = {"w.lora_A": mx.zeros(shape)}
    rules = [optimizer(AdamW(weight_decay=0.0)), optimizer(AdamW8bit(weight_decay=0.0))]
    taken = [(factors, rule.initial(factors)) for rule in rules]
    for step in range(steps):
        noise = mx.random.normal(shape, key=mx.random.key(100 + step))
        given = {"w.lora_A": 1e-3 * mx.exp(1.5 * spread) * (drift + 2 * noise)}
        taken = [rule.update(given, *each, mx.array(1e-4)) for rule, each in zip(rules, taken, strict=True)]
    (exact, whole), (coded, small) = taken
    # 0.059 when written: relative to how far the weights went.
    assert tiny.distance(coded["w.lora_A"], exact["w.lora_A"]) <= 0.07
    sizes = [sum(array.nbytes for array in state.values()) for state in (whole, small)]
    assert sizes[1] <= 0.26 * sizes[0]


def test_a_second_moment_above_zero_never_rests_as_zero() -> None:
    rule, factors = optimizer(AdamW8bit()), {"w.lora_A": mx.zeros((1, BLOCK))}
    given = {"w.lora_A": mx.array([[1.0] + [1e-15] * (BLOCK - 1)])}
    _, state = rule.update(given, factors, rule.initial(factors), mx.array(1e-4))
    assert state["w.lora_A.v"].min().item() == 1


@pytest.mark.parametrize("spec", ALL, ids=name_of)
def test_a_training_stopped_anywhere_goes_on_bit_for_bit(spec: Optimizer, tmp_path: Path) -> None:
    settings = msgspec.structs.replace(SETTINGS, optimizer=spec)
    unbroken = trainer(settings)
    states = []
    for step in range(STOPS):
        states.append(unbroken.state())
        unbroken.step([batch(step)])
    states.append(unbroken.state())
    # One step on from every stop: equal to the unbroken training's next state, so equal to its last too.
    for stop in range(STOPS):
        mx.save_safetensors(str(tmp_path / "state.safetensors"), states[stop])
        resumed = trainer(settings)
        resumed.load_state(mx.load(str(tmp_path / "state.safetensors")))
        resumed.step([batch(stop)])
        assert equal(resumed.state(), states[stop + 1])


@pytest.mark.parametrize("spec", ALL, ids=name_of)
def test_a_step_that_is_not_finite_leaves_the_state_as_it_was(spec: Optimizer) -> None:
    taking = trainer(msgspec.structs.replace(SETTINGS, optimizer=spec))
    taking.step([batch(0)])
    before = taking.state()
    broken = batch(1)
    taking.step([broken._replace(latents=broken.latents + float("nan"))])
    assert equal(taking.state() | {"steps": before["steps"]}, before)


@pytest.mark.parametrize("spec", ALL, ids=name_of)
def test_training_at_the_own_rate_lowers_the_loss(spec: Optimizer) -> None:
    taking = trainer(Train(optimizer=spec, rank=4, alpha=4.0, gradient_checkpointing=False))
    losses = [taking.step([batch(0)]).loss.item() for _ in range(12)]
    assert losses[-1] < losses[0]


def test_schedule_free_trains_on_other_factors_than_it_saves() -> None:
    taking = trainer(msgspec.structs.replace(SETTINGS, optimizer=ScheduleFree()))
    for step in range(3):
        taking.step([batch(step)])
    trained = {name.removeprefix("lora."): a for name, a in taking.state().items() if name.startswith("lora.")}
    beta1 = ScheduleFree().beta1
    for name, saved in taking.factors.items():
        z = taking.state()[f"optimizer.{name}.z"]
        assert tiny.error(beta1 * saved + (1 - beta1) * z, trained[name]) <= 1e-6
    assert not equal(taking.factors, trained)
