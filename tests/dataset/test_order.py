from __future__ import annotations

from collections import Counter
from random import Random

from stages.dataset.order import BatchOrder, PhasedOrder, batches

ITEMS = [(f"{number:032x}", ((512, 512), (576, 448), (448, 576))[number % 3]) for number in range(50)]
BUCKET = dict(ITEMS)


def test_every_item_comes_once_an_epoch_in_batches_of_one_bucket() -> None:
    for batch_size in (1, 4, 100):
        for epoch in range(3):
            epoch_batches = batches(ITEMS, batch_size, 42, epoch)
            assert Counter(item for batch in epoch_batches for item in batch) == Counter(list(BUCKET))
            assert all(len({BUCKET[item] for item in batch}) == 1 for batch in epoch_batches)
            assert all(1 <= len(batch) <= batch_size for batch in epoch_batches)


def test_only_the_last_batch_of_a_bucket_is_small() -> None:
    small = Counter(BUCKET[batch[0]] for batch in batches(ITEMS, 4, 42, 0) if len(batch) < 4)
    assert all(count == 1 for count in small.values())


def test_order_depends_on_seed_and_epoch_but_not_on_how_items_are_listed() -> None:
    shuffled = list(ITEMS)
    Random(1).shuffle(shuffled)
    assert batches(ITEMS, 4, 42, 0) == batches(shuffled, 4, 42, 0)
    assert batches(ITEMS, 4, 42, 0) != batches(ITEMS, 4, 42, 1)
    assert batches(ITEMS, 4, 42, 0) != batches(ITEMS, 4, 43, 0)


def test_buckets_and_small_batches_are_spread_over_the_epoch() -> None:
    late = [len(batches(ITEMS, 4, seed, 0)[-1]) for seed in range(60)]
    assert 5 < sum(size < 4 for size in late) < 40
    firsts = Counter(BUCKET[batches(ITEMS, 4, seed, 0)[0][0]] for seed in range(60))
    assert len(firsts) == 3


def test_any_step_can_be_asked_for_in_any_order() -> None:
    straight = BatchOrder(ITEMS, 4, 42)
    expected = [batch for epoch in range(3) for batch in batches(ITEMS, 4, 42, epoch)]
    assert len(expected) == 3 * straight.batches_per_epoch
    steps = list(range(len(expected)))
    Random(5).shuffle(steps)
    jumping = BatchOrder(list(reversed(ITEMS)), 4, 42)
    assert all(jumping.at(step) == expected[step] for step in steps)


def test_order_is_the_same_on_every_machine() -> None:
    # Recorded once: a change here changes every resumed run.
    assert [item[-2:] for item in batches(ITEMS, 4, 42, 0)[0]] == ["28", "07", "01", "19"]


def test_each_phase_begins_an_epoch_of_its_own_over_its_own_items() -> None:
    small = ITEMS[:12]
    order = PhasedOrder([(0, small), (7, ITEMS)], 4, 42)
    assert [order.at(step) for step in range(7)] == [BatchOrder(small, 4, 42).at(step) for step in range(7)]
    assert [order.at(step) for step in range(7, 40)] == [BatchOrder(ITEMS, 4, 42).at(step) for step in range(33)]
    assert order.at(3) == BatchOrder(small, 4, 42).at(3)
