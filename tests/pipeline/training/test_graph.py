"""Steps captured as a CUDA graph."""

import pytest
import torch

from pipeline.training.graph import EAGER_CALLS, CapturedFunction

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


def trainer():
    """A function that trains one weight by what it is given, as a step does, and gives its loss."""
    weight = torch.zeros(3, 1, 1, device="cuda", requires_grad=True)
    adam = torch.optim.Adam([weight], torch.tensor(0.1, device="cuda"), fused=True, capturable=True)

    def step(pairs):
        adam.zero_grad()
        loss = torch.stack([((low * weight.exp() - clean) ** 2).mean() for low, clean in pairs]).sum()
        loss.backward()
        adam.step()
        return [loss.detach(), weight.detach().sum()]

    return step


def pairs(number):
    numbers = torch.Generator().manual_seed(number)
    return [tuple(torch.rand(2, 2, 3, 4, 4, generator=numbers).cuda()) for _ in range(2)]


def test_replayed_calls_do_what_the_function_does():
    calls = range(EAGER_CALLS + 4)
    function, captured = trainer(), CapturedFunction(trainer())
    expected = [[float(value) for value in function(pairs(number))] for number in calls]
    found = [captured(pairs(number)) for number in calls]  # read only now: later calls leave what earlier ones gave
    assert [[float(value) for value in values] for values in found] == [pytest.approx(values) for values in expected]
    assert len({values[0] for values in expected}) == len(calls)


def test_nothing_waits_for_the_gpu():
    captured, results = CapturedFunction(trainer()), []
    given = [pairs(number) for number in range(EAGER_CALLS + 3)]
    for number, batches in enumerate(given):
        if number == EAGER_CALLS + 1:  # captured and replayed once
            torch.cuda.set_sync_debug_mode("error")
        try:
            results.append(captured(batches))  # raises where it waits
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert len({float(loss) for loss, _ in results}) == len(given)
