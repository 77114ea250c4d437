"""Augmentation: uniform numbers by visit alone, both images alike, all eight positions of a square."""

import numpy as np
import pytest

from pipeline.data.augmentation import TURNS, copy_turned, reflect_pad, uniform_draws
from pipeline.data.order import SampleRefs


def refs(count=1000, **fixed):
    columns = {"dataset": 0, "epoch": 1, "shard": 2, "sample": np.arange(count)} | fixed
    return SampleRefs(*(np.broadcast_to(value, count).astype(np.int64) for value in columns.values()))


def test_numbers_are_uniform_and_uncorrelated():
    numbers = uniform_draws(0, refs(20_000), 3)
    assert numbers.shape == (20_000, 3) and numbers.min() >= 0 and numbers.max() < 1
    for column in numbers.T:
        assert np.histogram(column, bins=10, range=(0, 1))[0] == pytest.approx(2000, rel=0.1)
    assert np.abs(np.corrcoef(numbers.T) - np.eye(3)).max() < 0.03


def test_numbers_depend_on_the_visit_and_not_on_its_company():
    together = uniform_draws(5, refs(), 3)
    shuffled = np.random.default_rng(0).permutation(1000)
    assert np.array_equal(uniform_draws(5, refs().take(shuffled), 3), together[shuffled])
    assert np.array_equal(uniform_draws(5, refs(4), 3), together[:4])
    assert np.array_equal(uniform_draws(5, refs().take(np.arange(6).reshape(2, 3)), 3), together[:6].reshape(2, 3, 3))


@pytest.mark.parametrize("changed", [{"dataset": 1}, {"epoch": 2}, {"shard": 3}, {"sample": 7}])
def test_each_part_of_a_visit_and_the_seed_matter(changed):
    one = uniform_draws(0, refs(1), 1)
    assert one != uniform_draws(0, refs(1, **changed), 1)
    assert one != uniform_draws(1, refs(1), 1)


def test_eight_turns_give_the_eight_positions_of_a_square():
    image = np.arange(4 * 4 * 3, dtype=np.uint8).reshape(4, 4, 3)
    results = np.empty((TURNS, 4, 4, 3), np.uint8)
    for turn, result in enumerate(results):
        copy_turned(image, turn, result)
    expected = {np.rot90(side, quarters).tobytes() for side in (image, image[:, ::-1]) for quarters in range(4)}
    assert {one.tobytes() for one in results} == expected
    assert np.array_equal(results[0], image)


def test_small_images_are_reflected_to_the_crop():
    image = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
    larger = reflect_pad(image, 5)
    assert larger.shape == (5, 5, 3)
    assert np.array_equal(larger[:2, :3], image)
    assert np.array_equal(larger[:, :, 0], image[:, :, 0][np.ix_([0, 1, 0, 1, 0], [0, 1, 2, 1, 0])])
    assert reflect_pad(image[:1], 4).shape == (4, 4, 3)
