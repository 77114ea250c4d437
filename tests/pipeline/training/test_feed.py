"""Crops on the device that trains."""

import pytest
import torch

from pipeline.data.loader import Batch
from pipeline.training.feed import feed

STEPS = 6


def steps(pinned=False):
    """Steps of two micro-batches, channels last as the loader makes them, from memory that nobody holds after them."""
    for step in range(STEPS):
        yield step, [Batch(*crops(step, number, pinned)) for number in range(2)]


def crops(step, number, pinned=False):
    numbers = torch.Generator().manual_seed(2 * step + number)
    pairs = torch.randint(0, 256, (2, 4, 64, 64, 3), dtype=torch.uint8, generator=numbers)
    return (pairs.pin_memory() if pinned else pairs).permute(0, 1, 4, 2, 3)


def test_cpus_train_on_the_crops_where_they_lie():
    given = list(steps())
    assert [batches for _, batches in feed(iter(given), torch.device("cpu"))] == [batches for _, batches in given]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_gpu_gets_each_step_whole_while_it_computes_and_nothing_waits():
    ballast, received = torch.rand(4096, 4096, device="cuda"), []
    source = steps(pinned=True)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step, batches in feed(source, torch.device("cuda", 0)):
            for _ in range(20):
                ballast = (ballast @ ballast).clamp(0, 1)  # the device falls behind, so that copies overtake it
            received.append((step, [Batch(*(images.clone() for images in batch)) for batch in batches]))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert [step for step, _ in received] == list(range(STEPS))
    for step, batches in received:
        for number, batch in enumerate(batches):
            assert all(images.is_contiguous(memory_format=torch.channels_last) for images in batch)
            assert torch.equal(torch.stack(list(batch)).cpu(), crops(step, number))
