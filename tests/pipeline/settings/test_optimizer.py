"""The optimizer's schedule."""

import pytest
from command_lines import parsed


def test_learning_rate_warms_up_and_follows_a_cosine():
    optimizer = parsed("--config", "demo").optimizer.model_copy(
        update={"learning_rate": 1.0, "final_learning_rate": 0.1, "warmup_steps": 4}
    )
    assert [optimizer.rate_at(step, 104) for step in (0, 1, 3, 4)] == [0.25, 0.5, 1.0, 1.0]
    assert optimizer.rate_at(54, 104) == pytest.approx(0.55)
    assert optimizer.rate_at(103, 104) == pytest.approx(0.1, abs=1e-3)
