"""The order: each sample once an epoch, the same global batches on every layout, exact continuation, few shards."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.order import MixedOrder, SampleOrder, WorkerShare

SHARDS = st.lists(st.integers(1, 9), min_size=1, max_size=12)
LAYOUTS = [(1, 1), (2, 1), (3, 1), (4, 1), (6, 1), (12, 1), (1, 2), (2, 2), (3, 2), (6, 2), (1, 12)]
ORDER_OF_SEED_7 = [
    (0, 0, 2, 0),
    (0, 0, 1, 0),
    (0, 0, 2, 1),
    (0, 0, 0, 2),
    (0, 0, 0, 1),
    (0, 0, 0, 0),
    (0, 1, 2, 0),
    (0, 1, 1, 0),
    (0, 1, 2, 1),
    (0, 1, 0, 0),
    (0, 1, 0, 2),
    (0, 1, 0, 1),
]


def rows(refs):
    """The refs as (data set, epoch, shard, sample), in order."""
    return list(zip(*(column.ravel().tolist() for column in refs), strict=True))


def samples_of(pairs):
    return [(shard, sample) for shard, count in enumerate(pairs) for sample in range(count)]


@given(pairs=SHARDS, seed=st.integers(0, 2**70), window=st.integers(1, 14), epoch=st.integers(0, 3))
def test_each_epoch_visits_each_sample_once(pairs, seed, window, epoch):
    size = sum(pairs)
    refs = rows(SampleOrder(np.array(pairs), seed, window).refs(epoch * size, (epoch + 1) * size))
    assert sorted((shard, sample) for _, _, shard, sample in refs) == samples_of(pairs)
    assert {(dataset, number) for dataset, number, _, _ in refs} == {(0, epoch)}


@given(pairs=SHARDS, window=st.integers(1, 14), start=st.integers(0, 150), length=st.integers(1, 60))
def test_continues_anywhere_whatever_was_asked_before(pairs, window, start, length):
    fresh, used = (SampleOrder(np.array(pairs), 3, window) for _ in range(2))
    whole = rows(used.refs(0, start + length))
    assert rows(fresh.refs(start, start + length)) == whole[start:]
    assert rows(used.refs(start, start + length)) == whole[start:]


def visited(order, layout, batch, start, stop):
    """What all workers of a layout visit in the steps ``start`` to ``stop``, by step and round."""
    workers, accumulation = layout
    shares = [WorkerShare(rank, workers, batch // workers // accumulation, accumulation) for rank in range(workers)]
    parts = [share.of(order, start, stop) for share in shares]
    assert all(part.sample.shape == (stop - start, accumulation, shares[0].micro_batch) for part in parts)
    return [
        [Counter(row for part in parts for row in rows(part.take((step, round_)))) for round_ in range(accumulation)]
        for step in range(stop - start)
    ]


@given(
    pairs=SHARDS,
    window=st.integers(1, 5),
    batch=st.sampled_from([12, 24, 60]),
    accumulation=st.sampled_from([1, 2]),
    steps=st.integers(1, 4),
)
def test_global_batches_and_their_rounds_hold_the_same_samples_on_every_layout(
    pairs, window, batch, accumulation, steps
):
    order = SampleOrder(np.array(pairs), 0, window)
    found = [visited(order, (workers, accumulation), batch, 0, steps) for workers in (1, 2, 3, 6)]
    assert all(one == found[0] for one in found)
    for step, rounds in enumerate(found[0]):
        assert sum(rounds, Counter()) == Counter(rows(order.refs(step * batch, (step + 1) * batch)))


@given(
    pairs=SHARDS,
    batch=st.sampled_from([12, 24]),
    before=st.sampled_from(LAYOUTS),
    after=st.sampled_from(LAYOUTS),
    at=st.integers(0, 4),
)
def test_a_run_resumed_on_other_workers_visits_what_the_undisturbed_one_does(pairs, batch, before, after, at):
    order = SampleOrder(np.array(pairs), 1, 2)
    resumed = visited(order, before, batch, 0, at) + visited(order, after, batch, at, 6)
    whole = visited(order, (1, 1), batch, 0, 6)
    assert [sum(rounds, Counter()) for rounds in resumed] == [sum(rounds, Counter()) for rounds in whole]


def test_a_window_ends_before_the_next_shards_are_needed():
    pairs = np.full(12, 5)
    refs = SampleOrder(pairs, 0, window=3).refs(0, 60)
    windows = [set(refs.shard[start : start + 15].tolist()) for start in range(0, 60, 15)]
    assert [len(window) for window in windows] == [3, 3, 3, 3]
    assert set.union(*windows) == set(range(12))
    assert refs.shard[:15].tolist() != sorted(refs.shard[:15].tolist())


def test_workers_read_different_shards_of_a_window():
    order = SampleOrder(np.full(16, 64), 0, window=16)
    shares = [WorkerShare(rank, 8, 32, 1) for rank in range(8)]
    needed = [len(set(share.of(order, 0, 4).shard.ravel().tolist())) for share in shares]
    assert sum(needed) < 0.5 * 8 * 16


@pytest.mark.parametrize("pairs", [[1000] * 100_000, [5], [1, 7] * 1000])
def test_any_number_of_shards_and_samples(pairs):
    size = sum(pairs)
    order = SampleOrder(np.array(pairs), 0, window=16)
    refs = order.refs(3 * size - 4, 3 * size + 4)
    assert refs.epoch.tolist() == [2] * 4 + [3] * 4
    assert all(0 <= sample < pairs[shard] for _, _, shard, sample in rows(refs))


def test_seeds_and_epochs_differ():
    pairs = np.array([25, 25])
    first, second = (rows(SampleOrder(pairs, 0, 2).refs(start, start + 50)) for start in (0, 50))
    other = rows(SampleOrder(pairs, 1, 2).refs(0, 50))
    assert [row[2:] for row in first] != [row[2:] for row in second]
    assert first != other


def test_order_is_the_same_for_good():
    """Written out, so that a change of numpy or of the code that would break running trainings is seen."""
    refs = SampleOrder(np.array([3, 1, 2]), 7, 2).refs(0, 12)
    assert rows(refs) == ORDER_OF_SEED_7


def test_drop_last_ends_an_epoch_with_its_last_whole_batch():
    order = SampleOrder(np.array([5, 6]), 0, 1, batch=4)
    refs = rows(order.refs(0, 80))
    epochs = [refs[start : start + 8] for start in range(0, 80, 8)]
    assert [{row[1] for row in epoch} for epoch in epochs] == [{number} for number in range(10)]
    assert all(len(set(epoch)) == 8 for epoch in epochs)
    assert {row[2:] for row in refs} == set(samples_of([5, 6])), "each epoch drops others"
    with pytest.raises(ValueError, match="11 training pairs do not fill one global batch of 12"):
        SampleOrder(np.array([5, 6]), 0, 1, batch=12)


@given(
    weights=st.lists(st.floats(0.05, 10), min_size=2, max_size=4), start=st.integers(0, 3000), seed=st.integers(0, 9)
)
def test_mixed_data_sets_keep_their_own_order_and_their_shares(weights, start, seed):
    orders = [SampleOrder(np.array([40, 60]) + n, seed, 2, dataset=n) for n in range(len(weights))]
    mixed = MixedOrder(orders, weights, seed)
    refs = rows(mixed.refs(0, 2048))
    for number, order in enumerate(orders):
        mine = [row for row in refs if row[0] == number]
        assert mine == rows(order.refs(0, len(mine)))
        assert abs(len(mine) - 2048 * weights[number] / sum(weights)) < 2
        assert 2 * len([row for row in refs[:1024] if row[0] == number]) == len(mine)
    assert rows(mixed.refs(start, start + 50)) == rows(mixed.refs(0, start + 50))[start:]


def test_a_share_that_is_too_small_is_refused():
    orders = [SampleOrder(np.array([3]), 0, 1, dataset=number) for number in range(2)]
    with pytest.raises(ValueError, match="less than one sample in 1024"):
        MixedOrder(orders, (1.0, 1e-4), 0)
