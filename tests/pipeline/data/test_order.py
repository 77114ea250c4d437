"""The sample order: each sample once an epoch, the same global batches on every number of workers."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.order import SampleOrder, Share


@given(size=st.integers(1, 40), seed=st.integers(0, 5), epoch=st.integers(0, 5))
def test_each_epoch_visits_each_sample_once(size, seed, epoch):
    visits = list(SampleOrder(size, seed).visits(epoch * size, (epoch + 1) * size))
    assert sorted(visit.index for visit in visits) == list(range(size))
    assert {visit.epoch for visit in visits} == {epoch}


@given(size=st.integers(1, 40), start=st.integers(0, 100), length=st.integers(0, 60))
def test_continues_anywhere(size, start, length):
    order = SampleOrder(size, 3)
    assert list(order.visits(start, start + length)) == list(order.visits(0, start + length))[start:]


@given(step=st.integers(0, 20), layout=st.sampled_from([(1, 1), (2, 1), (4, 1), (1, 2), (2, 2), (8, 1), (1, 8)]))
def test_global_batches_are_the_same_on_every_layout(step, layout):
    workers, accumulation = layout
    shares = [Share(rank, workers, 8 // workers // accumulation, accumulation) for rank in range(workers)]
    positions = Counter(p for share in shares for span in share.spans(step) for p in range(*span))
    assert positions == Counter(range(step * 8, step * 8 + 8))


@pytest.mark.parametrize("changed", [{"seed": 1}, {"start": 50}])
def test_seeds_and_epochs_differ(changed):
    size, seed, start = 50, changed.get("seed", 0), changed.get("start", 0)
    one = [visit.index for visit in SampleOrder(size, 0).visits(0, size)]
    other = [visit.index for visit in SampleOrder(size, seed).visits(start, start + size)]
    assert one != other
