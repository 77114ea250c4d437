"""The network: its size and its shapes."""

import pytest
import torch
from pydantic import ValidationError

from iaml import AutoEncoder, NetworkSettings, TeacherStudent, kernels


def parameters(module):
    return sum(value.numel() for value in module.parameters())


def test_full_width_has_the_published_size():
    network = AutoEncoder()
    assert parameters(network) == pytest.approx(10.0e6, abs=0.1e6)
    assert parameters(network) - parameters(network.decoder.projections) == pytest.approx(9.7e6, abs=0.05e6)


def test_full_width_has_the_published_cost(monkeypatch):
    monkeypatch.setattr(kernels, "usable", lambda x: False)  # so that each convolution is a module's, which is counted
    network, macs = AutoEncoder(), []

    def count(module, inputs, output):
        positions = (inputs[0] if isinstance(module, torch.nn.ConvTranspose2d) else output)[0, 0].numel()
        macs.append(positions * module.weight.numel())

    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.ConvTranspose2d) and module.kernel_size != (7, 7):
            module.register_forward_hook(count)
    with torch.inference_mode():
        features = network.decoder(network.encoder(torch.rand(1, 3, 256, 256)))
        network.decoder.mirror_maps(features)
        network.decoder.head(features[-1], torch.rand(1, 3, 256, 256))
    assert sum(macs) == pytest.approx(4.64e9, rel=0.005)


def test_mirrored_maps_have_the_published_channels_coarsest_first():
    network = AutoEncoder()
    with torch.inference_mode():
        maps = network.decoder.mirror_maps(network.decoder(network.encoder(torch.rand(1, 3, 64, 96))))
    assert [tuple(u.shape[1:]) for u in maps] == [(256, 4, 6), (128, 8, 12), (64, 16, 24), (32, 32, 48)]


@pytest.mark.parametrize("head", ["clamp", "sigmoid"])
def test_head_bounds_the_output(head):
    torch.manual_seed(0)
    network = AutoEncoder(NetworkSettings(width=1 / 16, head=head)).eval()
    network.decoder.head.refine[2].bias.data.fill_(0.7)
    image = torch.rand(2, 3, 32, 64)
    features = network.decoder(network.encoder(image))
    residual = network.decoder.head.refine(torch.cat([network.decoder.head.up(features[-1]).relu(), image], dim=1))
    expected = (image + residual).clamp(0, 1) if head == "clamp" else torch.sigmoid(image + residual)
    torch.testing.assert_close(network(image), expected, rtol=0, atol=1e-6)
    assert (image + residual).max() > 1


@pytest.mark.parametrize("width", [0, -1, float("nan")])
def test_width_is_checked(width):
    with pytest.raises(ValidationError, match="width"):
        NetworkSettings(width=width)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (torch.rand(1, 3, 100, 64), "multiples of 32, not 100 and 64; iaml.enhance takes any size"),
        (torch.rand(1, 3, 64, 33), "multiples of 32, not 64 and 33; iaml.enhance"),
        (torch.rand(1, 3, 0, 64), "multiples of 32, not 0 and 64"),
        (torch.rand(3, 64, 64), r"must be RGB of shape \(B, 3, H, W\), not \(3, 64, 64\)"),
        (torch.rand(1, 1, 64, 64), r"must be RGB of shape \(B, 3, H, W\), not \(1, 1, 64, 64\)"),
        (torch.rand(1, 64, 64, 3), r"must be RGB of shape .* not \(1, 64, 64, 3\)"),
        (torch.zeros(1, 3, 64, 64, dtype=torch.uint8), "must be float in .0, 1., not torch.uint8; divide .* by 255"),
    ],
)
@pytest.mark.parametrize("module", [AutoEncoder, TeacherStudent])
def test_images_that_the_network_cannot_take_are_refused_in_words(module, image, message):
    network = module(NetworkSettings(width=1 / 16))
    with pytest.raises(ValueError, match=f"^image: .*{message}"):
        network(*[image] * (2 if module is TeacherStudent else 1))


@pytest.mark.slow
def test_the_network_can_be_exported_for_any_number_of_images():
    network = AutoEncoder(NetworkSettings(width=1 / 16)).eval()
    exported = torch.export.export(
        network, (torch.rand(2, 3, 32, 64),), dynamic_shapes=({0: torch.export.Dim("images")},)
    )
    images = torch.rand(3, 3, 32, 64)
    assert torch.allclose(exported.module()(images), network(images), atol=1e-6)
