"""The auto-encoder: strided encoder, decoder with skip connections, CBAM attention, residual head."""

from collections.abc import Sequence
from typing import Literal, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from iaml import kernels
from iaml.normalization import Normalise, normalise_by_layer
from iaml.settings import Settings

ENCODER_CHANNELS = (64, 128, 256, 512, 512)
DECODER_CHANNELS = (512, 256, 128, 64)
MIRROR_CHANNELS = (256, 128, 64, 32)
HEAD_CHANNELS = 32
SCALES = len(DECODER_CHANNELS)
STRIDE = 2 ** len(ENCODER_CHANNELS)  # sides of the input must be multiples of this


class NetworkSettings(Settings):
    """The auto-encoder."""

    width: float = Field(
        1.0, gt=0, le=4, description="scales all channels; 1 is the published size of 10.0 M parameters"
    )
    head: Literal["clamp", "sigmoid"] = Field(
        "clamp", description="bounds the output: clamp(x + r, 0, 1) or sigmoid(x + r) of the predicted residual r"
    )


class ChannelAttention(nn.Module):
    """Scales each channel by a gate from its average and its maximum over the pixels."""

    def __init__(self, channels: int, reduction: int = 16) -> None:
        super().__init__()
        hidden = max(channels // reduction, 8)
        self.mlp = nn.Sequential(nn.Linear(channels, hidden), nn.ReLU(), nn.Linear(hidden, channels))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the same shape."""
        gate: Tensor = self.mlp(x.mean(dim=(2, 3))).sigmoid() + self.mlp(x.amax(dim=(2, 3))).sigmoid()
        return x * gate[:, :, None, None]


class SpatialAttention(nn.Module):
    """Scales each pixel by a gate from the mean and the maximum over its channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 1, 7, padding=3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the same shape."""
        pooled = torch.cat([x.mean(dim=1, keepdim=True), x.amax(dim=1, keepdim=True)], dim=1)
        gate: Tensor = self.conv(pooled).sigmoid()
        return x * gate


class CBAM(nn.Sequential):
    """Channel attention, then spatial attention."""

    def __init__(self, channels: int) -> None:
        super().__init__(ChannelAttention(channels), SpatialAttention())

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the same shape."""
        of_channels, of_pixels = cast(ChannelAttention, self[0]), cast(SpatialAttention, self[1])
        if not kernels.usable(x):
            return cast(Tensor, of_pixels(of_channels(x)))
        first, _, second = cast(tuple[nn.Linear, nn.ReLU, nn.Linear], tuple(of_channels.mlp))
        return kernels.attend(x, first.weight, first.bias, second.weight, second.bias, of_pixels.conv.weight)


class Block(nn.Sequential):
    """A convolution, the normalisation of its ``channels`` maps, their activation, and what follows."""

    def __init__(self, convolution: nn.Module, channels: int, slope: float, *rest: nn.Module) -> None:
        super().__init__(convolution, nn.BatchNorm2d(channels), nn.LeakyReLU(slope), *rest)

    def forward(self, x: Tensor, normalise: Normalise = normalise_by_layer) -> Tensor:
        """(B, C, H, W) to (B, channels, H', W'), normalised and activated by ``normalise``."""
        convolution, layer, activation, *rest = self
        slope = cast(nn.LeakyReLU, activation).negative_slope
        x = normalise(cast(nn.BatchNorm2d, layer), convolution(x), slope)
        for module in rest:
            x = module(x)
        return x


class Encoder(nn.Module):
    """``S_E``: five levels, each half the size of the one before; attention on all but the first."""

    def __init__(self, channels: Sequence[int]) -> None:
        super().__init__()
        self.levels = nn.ModuleList(
            Block(
                nn.Conv2d(inside, outside, 3, stride=2, padding=1, bias=False),
                outside,
                0.2,
                CBAM(outside) if index > 0 else nn.Identity(),
            )
            for index, (inside, outside) in enumerate(zip([3, *channels], channels, strict=False))
        )

    def forward(
        self, image: Tensor, norms: Sequence[Normalise] = (normalise_by_layer,) * len(ENCODER_CHANNELS)
    ) -> list[Tensor]:
        """The image's maps at each level.

        Args:
            image: RGB in [0, 1], float, shape (B, 3, H, W), H and W multiples of 32.
            norms: how each level normalises; as its own layer does by default.

        Returns:
            Five maps, finest (H/2, W/2) first.

        Raises:
            ValueError: the image has another shape, or is not float.
        """
        _check(image)
        pyramid = []
        x = image
        for level, normalise in zip(self.levels, norms, strict=True):
            x = level(x, normalise)
            pyramid.append(x)
        return pyramid


class DecoderLevel(nn.Module):
    """Doubles the size, joins the encoder's map of that size, attends to the result."""

    def __init__(self, inside: int, outside: int, skip: int) -> None:
        super().__init__()
        self.up = Block(
            nn.ConvTranspose2d(inside, outside, 3, stride=2, padding=1, output_padding=1, bias=False),
            outside,
            0.0,
        )
        self.attention = CBAM(outside + skip)

    def forward(self, x: Tensor, skip: Tensor, normalise: Normalise = normalise_by_layer) -> Tensor:
        """(B, C, H, W) and the skip (B, S, 2H, 2W) to (B, outside + S, 2H, 2W)."""
        joined: Tensor = self.attention(torch.cat([self.up(x, normalise), skip], dim=1))
        return joined


class Head(nn.Module):
    """Turns the finest features and the input image into the enhanced image."""

    def __init__(self, inside: int, channels: int, bound: Literal["clamp", "sigmoid"]) -> None:
        super().__init__()
        self.bound = bound
        self.up = nn.ConvTranspose2d(inside, channels, 3, stride=2, padding=1, output_padding=1)
        self.refine = nn.Sequential(
            nn.Conv2d(channels + 3, channels, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(channels, 3, 3, padding=1)
        )

    def forward(self, features: Tensor, image: Tensor) -> Tensor:
        """Features (B, C, H/2, W/2) and image (B, 3, H, W) to an image of the same shape in [0, 1]."""
        detailed = self.up(features).relu_()
        # in the features' type: under autocast the joined maps would be float32 otherwise, and be converted back
        maps = self.refine[0](torch.cat([detailed, image.to(detailed.dtype)], dim=1))
        last = cast(nn.Conv2d, self.refine[2])
        if kernels.usable(maps):
            assert last.bias is not None
            residual = kernels.to_image(maps, last.weight, last.bias)
        else:
            residual = last(self.refine[1](maps))
        output: Tensor = image + residual
        return output.clamp(0, 1) if self.bound == "clamp" else output.sigmoid()


class Decoder(nn.Module):
    """``S_D`` or ``T_D``: four levels, a projection of each for the mirror loss, and the head."""

    def __init__(self, encoder: Sequence[int], decoder: Sequence[int], mirror: Sequence[int], head: Head) -> None:
        super().__init__()
        skips = list(reversed(encoder[:-1]))
        joined = [outside + skip for outside, skip in zip(decoder, skips, strict=True)]
        self.levels = nn.ModuleList(
            DecoderLevel(inside, outside, skip)
            for inside, outside, skip in zip([encoder[-1], *joined], decoder, skips, strict=False)
        )
        self.projections = nn.ModuleList(
            nn.Conv2d(inside, outside, 1) for inside, outside in zip(joined, mirror, strict=True)
        )
        self.head = head

    def forward(
        self, pyramid: Sequence[Tensor], norms: Sequence[Normalise] = (normalise_by_layer,) * SCALES
    ) -> list[Tensor]:
        """The features of each level.

        Args:
            pyramid: the encoder's maps, finest first.
            norms: how each level normalises; as its own layer does by default.

        Returns:
            Four maps (B, C_i, H/2^(5 - i), W/2^(5 - i)), coarsest first.
        """
        *skips, x = pyramid
        features = []
        for level, skip, normalise in zip(self.levels, reversed(skips), norms, strict=True):
            x = level(x, skip, normalise)
            features.append(x)
        return features

    def mirror_maps(self, features: Sequence[Tensor]) -> list[Tensor]:
        """The maps ``u_i`` (or ``t_i``) that the mirror loss compares, coarsest first."""
        return [project(x) for project, x in zip(self.projections, features, strict=True)]


def _check(image: Tensor) -> None:
    """Refuse what the network can't take; shape and type are known without waiting for the device."""
    if image.ndim != 4 or image.shape[1] != 3:
        raise ValueError(f"image: must be RGB of shape (B, 3, H, W), not {tuple(image.shape)}")
    height, width = image.shape[2:]
    if height % STRIDE or width % STRIDE or not height or not width:
        sides = f"height and width must be multiples of {STRIDE}, not {height} and {width}"
        raise ValueError(f"image: {sides}; iaml.enhance takes any size")
    if not image.is_floating_point():
        raise ValueError(f"image: must be float in [0, 1], not {image.dtype}; divide 8-bit images by 255")


class AutoEncoder(nn.Module):
    """The student ``S = S_D . S_E``: enhances a low-light image.

    Args:
        settings: width and head; the published size by default.
    """

    def __init__(self, settings: NetworkSettings | None = None) -> None:
        super().__init__()
        self.settings = settings or NetworkSettings()
        encoder, decoder, mirror = map(self._scale, (ENCODER_CHANNELS, DECODER_CHANNELS, MIRROR_CHANNELS))
        (head,) = self._scale([HEAD_CHANNELS])
        self.encoder = Encoder(encoder)
        finest = decoder[-1] + encoder[0]
        self.decoder = Decoder(encoder, decoder, mirror, Head(finest, head, self.settings.head))

    def forward(self, image: Tensor) -> Tensor:
        """Enhance images.

        Args:
            image: RGB in [0, 1], float, shape (B, 3, H, W), H and W multiples of 32 (``iaml.enhance`` pads).

        Returns:
            Float tensor of the same shape in [0, 1].

        Raises:
            ValueError: the image has another shape, or is not float.
        """
        features = self.decoder(self.encoder(image))
        enhanced: Tensor = self.decoder.head(features[-1], image)
        return enhanced

    def _scale(self, channels: Sequence[int]) -> list[int]:
        return [max(round(count * self.settings.width), 4) for count in channels]
