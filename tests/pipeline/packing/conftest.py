"""A folder of pairs that all tests of packing read."""

from pathlib import Path

import pytest
from source_pairs import add_pair


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Ten scenes of two pairs each for training and three pairs for testing."""
    folder = tmp_path / "set"
    for number in range(20):
        add_pair(folder, "our485", f"{number}.png", seed=number // 2, noise=4 * (number % 2))
    for number in range(3):
        add_pair(folder, "eval15", f"{number}.png", seed=100 + number)
    return folder
