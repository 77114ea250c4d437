"""Teacher and student: what moves, what does not, and every ablation from settings."""

import copy

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from iaml import NetworkSettings, ObjectiveSettings, TeacherSettings, TeacherStudent

SMALL = NetworkSettings(width=1 / 16)


def make_task(objective=None, **teacher):
    torch.manual_seed(0)
    return TeacherStudent(SMALL, ObjectiveSettings(**(objective or {})), TeacherSettings(**teacher))


def batch(seed=1):
    draw = torch.Generator().manual_seed(seed)
    clean = torch.rand(4, 3, 32, 32, generator=draw)
    return clean * 0.1, clean


def steps(task, count, learning_rate=1e-2):
    """Plain gradient steps; yields after each, before the teacher follows."""
    trained = [value for value in task.parameters() if value.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=learning_rate)
    for step in range(count):
        optimizer.zero_grad()
        task(*batch(step))["loss"].backward()
        optimizer.step()
        yield step
        task.after_optimizer_step()


def floats(module):
    return {
        name: value.double().numpy().copy() for name, value in module.state_dict().items() if value.is_floating_point()
    }


@pytest.mark.parametrize(("rate", "warmup"), [(0.9, 0.75), (0.5, 1.0), (0.999, 0.0)])
def test_average_of_parameters_and_buffers_equals_arithmetic(rate, warmup):
    task = make_task(ema_rate=rate, ema_warmup=warmup)
    expected = floats(task.teacher_decoder)
    for step in steps(task, 6):
        m = min(rate, 1 - (1 + step) ** -warmup) if warmup else rate
        assert task.ema_rate == pytest.approx(m)
        student = floats(task.student.decoder)
        expected = {name: m * value + (1 - m) * student[name] for name, value in expected.items()}
    found = floats(task.teacher_decoder)
    assert any("running_var" in name for name in found)
    for name, value in expected.items():
        assert np.allclose(found[name], value, atol=1e-5), name
    counted = {n: v for n, v in task.teacher_decoder.state_dict().items() if n.endswith("num_batches_tracked")}
    assert counted and all(int(value) == 6 for value in counted.values())


def test_average_moves_where_half_precision_would_not():
    task = make_task(ema_rate=0.999, ema_warmup=0).bfloat16()
    task.teacher_decoder.float()
    weight = task.teacher_decoder.head.refine[2].bias
    weight.data.fill_(0.1)
    task.student.decoder.head.refine[2].bias.data.fill_(0.18)
    for _ in range(1000):
        task.after_optimizer_step()
    assert float(weight[0]) == pytest.approx(0.18 - 0.08 * 0.999**1000, abs=1e-3)


def test_rate_0_makes_the_teacher_the_student_and_rate_1_freezes_it():
    follows, frozen = make_task(ema_rate=0), make_task(ema_rate=1)
    before = copy.deepcopy(frozen.teacher_decoder.state_dict())
    for task in (follows, frozen):
        list(steps(task, 3))
    student = follows.student.decoder.state_dict()
    assert all(torch.equal(value, student[name]) for name, value in follows.teacher_decoder.state_dict().items())
    after = frozen.teacher_decoder.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items() if value.is_floating_point())


@pytest.mark.parametrize("norm", ["running", "batch", "separate"])
def test_teacher_has_one_writer_and_no_gradient(norm):
    task = make_task(norm=norm)
    encoder, teacher = floats(task.student.encoder), floats(task.teacher_decoder)
    low, clean = batch()
    assert not any(t.requires_grad for t in task.teacher_maps(clean.requires_grad_()))
    assert all(np.array_equal(value, floats(task.student.encoder)[name]) for name, value in encoder.items())
    task(low, clean)["loss"].backward()
    assert all(value.grad is None for value in task.teacher_decoder.parameters())
    # a forward pass leaves the teacher as it was; after_optimizer_step alone moves it
    assert all(np.array_equal(value, floats(task.teacher_decoder)[name]) for name, value in teacher.items())


def first_norm_statistics(task, norm):
    """What the first encoder layer's normalisation should make of clean images, in numpy, before the activation."""
    _, clean = batch()
    convolution, layer = task.student.encoder.levels[0][0], task.student.encoder.levels[0][1]
    with torch.no_grad():
        x = convolution(clean).double().numpy()
    mean, var = x.mean(axis=(0, 2, 3)), x.var(axis=(0, 2, 3))
    count = x.size // x.shape[1]
    if norm == "running":
        mean, var = layer.running_mean.double().numpy(), layer.running_var.double().numpy()
    if norm == "separate":
        mean, var = 0.1 * mean, 0.9 + 0.1 * var * count / (count - 1)
    shape = (1, -1, 1, 1)
    return (x - mean.reshape(shape)) / np.sqrt(var.reshape(shape) + layer.eps)


@pytest.mark.parametrize("norm", ["running", "batch", "separate"])
def test_clean_images_are_normalised_as_the_settings_say(norm):
    task = make_task(norm=norm)
    task(*batch(7))  # the student's running statistics leave their initial values
    for statistics in task.clean_statistics:
        statistics.mean.zero_(), statistics.var.fill_(1)
    expected = first_norm_statistics(task, norm)
    seen = []
    first = task.student.encoder.levels[0]  # has no attention
    hook = first.register_forward_hook(lambda module, inputs, output: seen.append(output.clone()))
    task.teacher_maps(batch()[1])
    hook.remove()
    assert np.allclose(seen[0].numpy(), np.where(expected > 0, expected, 0.2 * expected), atol=1e-4)


@pytest.mark.parametrize("term", ["reconstruction", "ssim", "mirror"])
def test_each_term_alone_moves_parameters(term):
    task = make_task()
    losses = {}
    task.objective.total = lambda terms: losses.setdefault("alone", terms[term])
    task(*batch())["loss"].backward()
    moved = [
        name for name, value in task.student.named_parameters() if value.grad is not None and value.grad.abs().sum()
    ]
    assert any(name.startswith("encoder") for name in moved)
    assert any(name.startswith("decoder") for name in moved)
    assert ("decoder.head.up.weight" in moved) == (term != "mirror")


def numpy_total(losses, weights):
    return sum(weights[name] * float(value) for name, value in losses.items() if name != "loss")


@pytest.mark.parametrize(
    ("objective", "terms"),
    [
        ({}, {"reconstruction": 1, "ssim": 1, "mirror": 0.8}),
        ({"mirror_weight": 0}, {"reconstruction": 1, "ssim": 1}),
        ({"mirror_weight": 0, "ssim_weight": 0}, {"reconstruction": 1}),
        ({"beta": 0}, {"reconstruction": 1, "ssim": 1, "mirror": 0.8}),
        ({"scale_weights": (0, 0, 1, 0), "mirror_weight": 2}, {"reconstruction": 1, "ssim": 1, "mirror": 2}),
        ({"reconstruction": "mse", "ssim_weight": 0.5}, {"reconstruction": 1, "ssim": 0.5, "mirror": 0.8}),
    ],
)
def test_ablations_from_settings(objective, terms):
    losses = make_task(objective)(*batch())
    assert losses.keys() == {"loss", *terms}
    assert float(losses["loss"].detach()) == pytest.approx(numpy_total(losses, terms), rel=1e-5)


def test_reconstruction_equals_arithmetic():
    low, clean = batch()
    for name in ("charbonnier", "mse"):
        task = make_task({"reconstruction": name, "mirror_weight": 0, "ssim_weight": 0})
        found = float(task(low, clean)["reconstruction"])
        task = make_task({"reconstruction": name, "mirror_weight": 0, "ssim_weight": 0})
        difference = (task.student(low) - clean).detach().double().numpy()
        expected = np.sqrt(difference**2 + 1e-6).mean() if name == "charbonnier" else (difference**2).mean()
        assert found == pytest.approx(expected, rel=1e-4)


def test_emphasis_ablation_differs_from_the_full_loss():
    full, flat = make_task()(*batch()), make_task({"beta": 0})(*batch())
    assert float(flat["mirror"]) < float(full["mirror"])


def test_projections_without_weight_are_not_trained():
    task = make_task({"scale_weights": (0, 1, 0, 0)})
    trained = [all(p.requires_grad for p in projection.parameters()) for projection in task.student.decoder.projections]
    assert trained == [False, True, False, False]
    task(*batch())["loss"].backward()
    assert all(value.grad is not None for value in task.student.parameters() if value.requires_grad)


def test_averaged_student_joins_the_encoder_with_the_teachers_decoder():
    task = make_task(ema_rate=0.9)
    list(steps(task, 3))
    averaged = task.averaged_student().eval()
    low, _ = batch()
    with torch.no_grad():
        task.eval()
        features = task.teacher_decoder(task.student.encoder(low))
        assert torch.equal(averaged(low), task.teacher_decoder.head(features[-1], low))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mirror_weight": 0, "beta": 0.3}, "beta has no effect because mirror_weight is 0"),
        ({"beta": 0, "gamma": 2.0}, "gamma has no effect because beta is 0"),
        ({"scale_weights": (0, 0, 0, 0)}, "set mirror_weight to 0"),
        ({"scale_weights": (1, 1, 1)}, "at least 4"),
        ({"scale_weights": (1, 1, 1, -1)}, "must not be negative"),
        ({"gama": 2.0}, "gama"),
    ],
)
def test_settings_without_effect_or_sense_are_refused(settings, message):
    with pytest.raises(ValidationError, match=message):
        ObjectiveSettings(**settings)
