"""The mirror loss against numpy."""

import numpy as np
import pytest
import torch

from iaml import mirror_loss

SHAPES = [(5, 4, 6), (3, 8, 12), (2, 16, 24)]
LOW = (16, 24)  # the finest scale has the image's size, so that numpy can resize by plain averaging


def z(features):
    return (features - features.mean()) / (features.std(ddof=1) + 1e-6)


def halve(image):
    """Bilinear halving without aligned corners: each pixel is the mean of four."""
    return image.reshape(image.shape[0] // 2, 2, image.shape[1] // 2, 2).mean(axis=(1, 3))


def expected_loss(student, teacher, low, weights, beta, gamma):
    total = 0.0
    for scale, weight in enumerate(weights):
        per_sample = []
        for u, t, image in zip(student[scale], teacher[scale], low, strict=True):
            y = 0.299 * image[0] + 0.587 * image[1] + 0.114 * image[2]
            emphasis = 1 + beta * (1 - (y - y.min()) / (y.max() - y.min() + 1e-7)) ** gamma
            while emphasis.shape != u.shape[1:]:
                # a factor of four samples between the middle two pixels, which halving twice would not
                factor = emphasis.shape[0] // u.shape[1]
                if factor == 4:
                    rows, columns = (np.arange(length) * 4 + 1 for length in u.shape[1:])
                    emphasis = np.mean(
                        [emphasis[np.ix_(rows + i, columns + j)] for i in (0, 1) for j in (0, 1)], axis=0
                    )
                else:
                    emphasis = halve(emphasis)
            per_sample.append((emphasis * np.abs(z(u) - z(t))).mean())
        total += weight * np.mean(per_sample)
    return total


@pytest.mark.parametrize(
    ("weights", "beta", "gamma"),
    [([1 / 3] * 3, 0.6, 1.0), ([0.7, 0.0, 0.3], 0.6, 2.0), ([0.1, 0.2, 0.7], 1.5, 0.4), ([1.0, 0.0, 0.0], 0.0, 1.0)],
)
def test_equals_arithmetic(weights, beta, gamma):
    draw = np.random.default_rng(0)
    student, teacher = ([draw.normal(3, 2, (2, *shape)) for shape in SHAPES] for _ in range(2))
    low = draw.random((2, 3, *LOW)) * 0.3
    found = mirror_loss(
        [torch.from_numpy(u).float() for u in student],
        [torch.from_numpy(t).float() for t in teacher],
        torch.from_numpy(low).float(),
        scale_weights=weights,
        beta=beta,
        gamma=gamma,
    )
    assert float(found) == pytest.approx(expected_loss(student, teacher, low, weights, beta, gamma), rel=1e-4)


def test_no_gradient_reaches_the_teacher():
    student, teacher = (torch.randn(2, 4, 8, 8, requires_grad=True) for _ in range(2))
    mirror_loss([student], [teacher], torch.rand(2, 3, 16, 16), scale_weights=[1.0], beta=0.6, gamma=1.0).backward()
    assert teacher.grad is None
    assert student.grad is not None and student.grad.abs().sum() > 0


def test_stays_float32_under_autocast():
    maps = [torch.randn(2, 4, 8, 8) * 1e-3 + 5]
    low = torch.rand(2, 3, 16, 16)
    plain = mirror_loss(maps, [maps[0].flip(0)], low, scale_weights=[1.0], beta=0.6, gamma=1.0)
    with torch.autocast("cpu", torch.bfloat16):
        cast = mirror_loss(maps, [maps[0].flip(0)], low, scale_weights=[1.0], beta=0.6, gamma=1.0)
    assert cast.dtype == torch.float32 and float(cast) == float(plain)


def test_counts_must_agree():
    with pytest.raises(ValueError, match="1 student maps, 1 teacher maps and 2 scale weights"):
        maps = [torch.rand(1, 2, 4, 4)]
        mirror_loss(maps, maps, torch.rand(1, 3, 8, 8), scale_weights=[0.5, 0.5], beta=0.6, gamma=1.0)
