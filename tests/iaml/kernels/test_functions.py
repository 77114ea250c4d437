"""Each kernel against torch's operators in float64: values and gradients, of odd shapes too."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from workers import run_workers

from iaml import AutoEncoder, NetworkSettings, kernels
from iaml.mirror import standardise
from iaml.network import CBAM
from iaml.similarity import structural_similarity

pytestmark = pytest.mark.skipif(bool(kernels.problem()), reason=f"no kernels: {kernels.problem()}")

SHAPES = [(2, 3, 5, 7), (1, 16, 32, 32), (3, 20, 9, 33), (2, 160, 4, 2), (1, 1, 1, 1)]
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 5e-3}  # of a bfloat16 map, which has 8 bits; sums are float32
both_types = pytest.mark.parametrize("dtype", TOLERANCE)


def draw(shape, dtype=torch.float32, seed=0):
    """Values that bfloat16 holds exactly, many of them equal, as the maxima of activated maps are."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).mul(8).round().div(8)
    return values.to(dtype, memory_format=torch.channels_last)


def difference(found: Tensor, expected: Tensor) -> float:
    """The greatest, relative to the greatest value."""
    return float((found.double() - expected).abs().max() / expected.abs().max().clamp(min=1e-3))


def gradients(function, inputs, upstream):
    """What a function gives, and the gradients by its inputs."""
    inputs = [value.clone().requires_grad_() for value in inputs]
    output = function(*inputs)
    output.backward(upstream.to(output.dtype))
    return [output.detach(), *(value.grad for value in inputs)]


def assert_near(found, expected, tolerance):
    for number, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert difference(one, other) < tolerance, f"value {number}"


@both_types
@pytest.mark.parametrize("shape", SHAPES)
def test_to_image(shape, dtype):
    torch.manual_seed(0)
    batch, channels, height, width = shape
    reference = nn.Sequential(nn.ReLU(), nn.Conv2d(channels, 3, 3, padding=1)).double()
    weights = [value.detach().float() for value in reference.parameters()]
    x, upstream = draw(shape, dtype), draw((batch, 3, height, width), seed=1)
    found = gradients(kernels.to_image, [x, *weights], upstream)
    assert found[0].dtype == torch.float32
    inputs = x.double().requires_grad_()
    output = reference(inputs)
    output.backward(upstream.double())
    expected = [output.detach(), inputs.grad, *(value.grad for value in reference.parameters())]
    assert_near(found[:1] + found[2:], expected[:1] + expected[2:], TOLERANCE[torch.float32])  # computed in float32
    assert_near(found[1:2], expected[1:2], TOLERANCE[dtype])


@both_types
@pytest.mark.parametrize("shape", SHAPES)
def test_attention(shape, dtype):
    torch.manual_seed(0)
    reference = CBAM(shape[1]).double()
    weights = [value.detach().float() for value in reference.parameters()]
    x, upstream = draw(shape, dtype).clamp(0, 0.5), draw(shape, seed=1)  # several values of a channel are its maximum
    found = gradients(kernels.attend, [x, *weights], upstream)
    inputs = x.double().requires_grad_()
    output = reference(inputs)
    output.backward(upstream.double())
    expected = [output.detach(), inputs.grad, *(value.grad for value in reference.parameters())]
    assert_near(found[:2], expected[:2], TOLERANCE[dtype])
    if dtype == torch.float32:  # bfloat16 decides otherwise which of nearly equal values is the maximum
        assert_near(found[2:], expected[2:], 1e-4)


def test_weights_may_lie_in_any_layout():
    weights = [value.detach() for value in CBAM(8).parameters()]
    elsewhere = [value.t().contiguous().t() if value.dim() == 2 else value for value in weights[:-1]]
    x, last = draw((2, 8, 6, 6)), weights[-1].contiguous(memory_format=torch.channels_last)
    assert difference(kernels.attend(x, *elsewhere, last), kernels.attend(x, *weights).double()) < 1e-6


@both_types
@pytest.mark.parametrize("slope", [1.0, 0.2, 0.0])
@pytest.mark.parametrize("shape", SHAPES[:-1])
def test_batch_normalisation_with_activation(shape, slope, dtype):
    x, upstream = draw(shape, dtype) + 3, draw(shape, seed=1)
    weight, bias = torch.linspace(-1, 2, shape[1]), torch.linspace(-1, 1, shape[1])

    def with_kernels(x, weight, bias):
        count = x.numel() // x.shape[1]
        return kernels.batch_norm(x, *kernels.moments(x), weight, bias, 1e-5, slope, count, lambda sums: sums)

    def with_torch(x, weight, bias):
        return F.leaky_relu(F.batch_norm(x, None, None, weight, bias, training=True, eps=1e-5), slope)

    found = gradients(with_kernels, [x, weight, bias], upstream)
    expected = gradients(with_torch, [x.double(), weight.double(), bias.double()], upstream)
    before = F.batch_norm(x.double(), None, None, weight.double(), bias.double(), training=True)
    assert (before.abs() > 1e-4).all(), "a value so near the activation's bend may fall on either side"
    assert_near(found, expected, TOLERANCE[dtype] if dtype == torch.bfloat16 else 1e-5)


@both_types
def test_normalisation_by_given_statistics(dtype):
    x, mean, var = draw((2, 6, 5, 4), dtype), torch.linspace(-1, 1, 6), torch.linspace(0.5, 2, 6)
    weight, bias = torch.linspace(-1, 2, 6), torch.linspace(-1, 1, 6)
    found = kernels.normalise(x, mean, var, weight, bias, 1e-5, 0.2)
    doubles = [value.double() for value in (x, mean, var, weight, bias)]
    expected = F.leaky_relu(F.batch_norm(*doubles, eps=1e-5), 0.2)
    assert difference(found, expected) < TOLERANCE[dtype] and found.dtype == dtype


@both_types
def test_moments_of_values_far_from_zero(dtype):
    x = draw((3, 5, 8, 6), dtype) * 0.125 + 100
    mean, var = kernels.moments(x)
    expected_var, expected_mean = torch.var_mean(x.double(), dim=(0, 2, 3), correction=0)
    assert difference(mean, expected_mean) < 1e-6 and difference(var, expected_var) < 1e-4


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("shape", [(2, 3, 11, 11), (3, 3, 12, 40), (1, 1, 33, 17), (2, 3, 64, 64)])
def test_similarity(shape, layout):
    clean = torch.rand(shape, generator=torch.Generator().manual_seed(0)).contiguous(memory_format=layout)
    image = (clean + 0.1 * draw(shape)).clamp(0, 1).contiguous(memory_format=layout)
    upstream = torch.linspace(-1, 1, shape[0])
    found = gradients(lambda a: kernels.similarity(a, clean, 1.5, 1e-4, 9e-4), [image], upstream)
    expected = gradients(lambda a: structural_similarity(a, clean.double(), data_range=1.0), [image.double()], upstream)
    assert_near(found, expected, 1e-5)


@both_types
@pytest.mark.parametrize("shape", SHAPES[:-1])
def test_mirror(shape, dtype):
    u, t = draw(shape, dtype), (draw(shape, seed=1) * 0.5 + 1).to(dtype)
    emphasis = 1 + torch.rand(shape[0], 1, *shape[2:], generator=torch.Generator().manual_seed(0))
    upstream = torch.linspace(0.5, 1, shape[0])

    def with_torch(u):
        return (emphasis.double() * (standardise(u) - standardise(t.double())).abs()).mean(dim=(1, 2, 3))

    found = gradients(lambda u: kernels.mirror(u, t, emphasis, 1e-6), [u], upstream)
    assert_near(found, gradients(with_torch, [u.double()], upstream), TOLERANCE[dtype])


def test_maps_of_one_value_have_no_gradient_through_their_deviation():
    u = torch.ones(1, 4, 3, 3).requires_grad_()
    kernels.mirror(u, draw((1, 4, 3, 3)), torch.ones(1, 1, 3, 3), 1e-6).sum().backward()
    assert torch.isfinite(u.grad).all()


@both_types
def test_what_is_not_finite_stays_so(dtype):
    for value in (torch.nan, torch.inf):
        x = draw((1, 8, 6, 6), dtype)
        x[0, 3, 2, 2] = value
        weights = [parameter.detach() for parameter in CBAM(8).parameters()]
        assert kernels.attend(x, *weights)[0, 3].isnan().any()
        assert not kernels.moments(x)[1].isfinite().all()
        ones = torch.ones(8)
        assert not kernels.normalise(x, ones, ones, ones, ones, 1e-5, 0.0).isfinite().all()
        assert not kernels.mirror(x, draw((1, 8, 6, 6), dtype), torch.ones(1, 1, 6, 6), 1e-6).isfinite().all()
    images = torch.rand(2, 1, 3, 16, 16)
    images[0, 0, 1, 8, 8] = torch.nan
    assert kernels.similarity(*images, 1.5, 1e-4, 9e-4).isnan().all()


def test_bfloat16_is_rounded_to_even_as_torch_rounds():
    x = torch.randn(4096, generator=torch.Generator().manual_seed(0)).view(1, 1, 64, 64)
    one, zero = torch.ones(1), torch.zeros(1)
    halves = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, 2.0**-126, 3e38]).repeat(1, 1, 1, 1)
    for values in (x, halves):
        scaled = kernels.normalise(values.bfloat16(), zero, one, one * 1.0078125, zero, 0.0, 1.0)
        assert torch.equal(scaled, (values.bfloat16().float() * 1.0078125).bfloat16())


def on_threads(threads):
    """Gradients of a whole network on so many threads."""
    import torch

    from iaml import NetworkSettings, TeacherStudent, use_global_batch_norm

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    task = TeacherStudent(NetworkSettings(width=1 / 8))
    use_global_batch_norm(task)
    low, clean = torch.rand(2, 2, 3, 64, 64)
    attention = task.student.decoder.levels[3].attention
    maps = torch.randn(2, 16, 32, 32, requires_grad=True)
    (attention(maps) * torch.randn(maps.shape, generator=torch.Generator().manual_seed(1))).sum().backward()
    return [maps.grad, *(value.grad for value in attention.parameters()), low, clean]


def test_the_bits_are_the_same_on_any_number_of_threads():
    (one,), (two,) = (run_workers(1, on_threads, threads) for threads in (1, 2))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_kernels_are_for_cpus_and_types_that_they_know():
    assert kernels.usable(torch.zeros(1)) and kernels.usable(torch.zeros(1, dtype=torch.bfloat16))
    assert not kernels.usable(torch.zeros(1, dtype=torch.float64))
    assert not kernels.usable(torch.zeros(1, device="meta"))


def test_a_compiler_sees_torchs_operators():
    network = AutoEncoder(NetworkSettings(width=1 / 16)).eval()
    image = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        exported = torch.export.export(network, (image,)).module()(image)
        assert difference(exported, network(image).double()) < 1e-5


def test_a_plain_network_is_evaluated_with_kernels_as_without(monkeypatch):
    network = AutoEncoder(NetworkSettings(width=1 / 8))
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.running_mean), nn.init.uniform_(layer.running_var, 0.5, 2)
    image = torch.rand(2, 3, 64, 96)
    with torch.no_grad():
        assert difference(network.eval()(image), network.double()(image.double())) < 1e-5
