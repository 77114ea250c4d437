"""Inference on images of any size, whole and in tiles."""

import pytest
import torch
from torch import Tensor, nn

from iaml import AutoEncoder, NetworkSettings, enhance, multiplies_bf16_fast


class Recorded(nn.Module):
    """Runs a function of the image and keeps the sizes it was given."""

    def __init__(self, function):
        super().__init__()
        self.function = function
        self.sizes = []

    def forward(self, image: Tensor) -> Tensor:
        self.sizes.append(tuple(image.shape[-2:]))
        return self.function(image)


def brighten(image: Tensor) -> Tensor:
    return image**0.4


def mean_of_blocks(image: Tensor) -> Tensor:
    """Sees the same as long as tiles start where blocks of 32x32 do."""
    return nn.functional.interpolate(nn.functional.avg_pool2d(image, 32), scale_factor=32.0)


@pytest.mark.parametrize("size", [(32, 32), (33, 47), (64, 31), (5, 100)])
def test_enhance_takes_any_size(size):
    network = AutoEncoder(NetworkSettings(width=1 / 16)).eval()
    low = torch.rand(1, 3, *size)
    for tile in (None, 32):
        enhanced = enhance(network, low, tile=tile, overlap=0)
        assert enhanced.shape == low.shape
        assert 0 <= float(enhanced.min()) <= float(enhanced.max()) <= 1


def test_enhance_equals_the_network_where_no_padding_is_needed():
    network = AutoEncoder(NetworkSettings(width=1 / 16)).eval()
    low = torch.rand(1, 3, 64, 32)
    with torch.inference_mode():
        torch.testing.assert_close(enhance(network, low, precision="float32"), network(low), rtol=0, atol=1e-6)


def test_bf16_stays_within_a_level_of_float32():
    """Of a network that brightens as a trained one does: its residual is far from 0."""
    torch.manual_seed(0)
    network = AutoEncoder(NetworkSettings(width=1 / 4)).eval()
    torch.nn.init.constant_(network.decoder.head.refine[2].bias, 0.3)
    torch.nn.init.normal_(network.decoder.head.refine[2].weight, std=0.05)
    low = torch.rand(1, 3, 96, 128) / 4
    reference, found = (enhance(network, low, precision=precision) for precision in ("float32", "bf16"))
    assert reference.std() > 0.05
    assert 0 < (found - reference).abs().max() < 1 / 255
    assert torch.equal(enhance(network, low), found if multiplies_bf16_fast(low.device) else reference)
    assert found.dtype == torch.float32


def test_images_within_one_tile_are_enhanced_whole():
    network = AutoEncoder(NetworkSettings(width=1 / 16)).eval()
    low = torch.rand(2, 3, 96, 50)
    assert torch.equal(enhance(network, low, tile=96, overlap=32), enhance(network, low))


@pytest.mark.parametrize("function", [nn.Identity(), brighten, mean_of_blocks])
@pytest.mark.parametrize("size", [(64, 65), (320, 224), (333, 97), (40, 500), (97, 33)])
@pytest.mark.parametrize(("tile", "overlap"), [(64, 0), (96, 33), (128, 64), (256, 224)])
def test_tiles_change_nothing_for_a_local_network(function, size, tile, overlap):
    low = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0))
    network = Recorded(function)
    torch.testing.assert_close(
        enhance(network, low, tile=tile, overlap=overlap), enhance(Recorded(function), low), rtol=0, atol=1e-6
    )
    assert max(max(seen) for seen in network.sizes) <= tile


def test_tiles_are_blended_linearly_over_at_least_the_overlap():
    """A network that tells its tiles apart: each is a flat gray, 0.1 darker than the one before."""
    levels = iter(torch.linspace(0.9, 0.1, 9))
    network = Recorded(lambda image: next(levels).expand_as(image))
    column = enhance(network, torch.rand(1, 3, 700, 32), tile=256, overlap=96)[0, 0, :, 0]
    assert network.sizes == [(256, 32)] * 4
    assert column[0].item() == pytest.approx(0.9) and column[-1].item() == pytest.approx(0.6)
    slopes = -column.diff()
    assert slopes.min() > -1e-6 and slopes.max() < 0.1 / 96 + 1e-6
    # 320 pixels are shared, as the tiles hold 4 x 256 - 4 of 700; a ramp begins and ends with half a step
    assert 320 <= (slopes > 1e-5).sum() <= 320 + 3


def test_tiling_a_real_network_leaves_no_seam():
    torch.manual_seed(0)
    network = AutoEncoder(NetworkSettings(width=1 / 16)).eval()
    ramp = torch.linspace(0.1, 0.9, 256)
    low = (ramp[:, None] * ramp.flip(0)).expand(1, 3, -1, -1)
    whole, tiled = enhance(network, low), enhance(network, low, tile=128, overlap=64)
    assert 0 < (whole - tiled).abs().max() < 0.05
    for dim in (-2, -1):
        assert (tiled - whole).diff(dim=dim).abs().max() < 0.01


def test_tiling_keeps_a_nan_in_sight():
    low = torch.rand(1, 3, 160, 64)
    low[0, 0, 100, 10] = torch.nan
    assert enhance(Recorded(nn.Identity()), low, tile=64, overlap=32).isnan().sum() == 1


@pytest.mark.parametrize(("tile", "overlap"), [(0, 0), (-32, 0), (100, 0), (128, 128), (128, 97), (128, -1)])
def test_refuses_impossible_tiles(tile, overlap):
    with pytest.raises(ValueError, match=r"tile must be a positive multiple of 32|overlap must be from 0 to"):
        enhance(Recorded(nn.Identity()), torch.rand(1, 3, 32, 32), tile=tile, overlap=overlap)
