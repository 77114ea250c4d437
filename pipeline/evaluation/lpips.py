"""LPIPS v0.1, whose backbone is a file with a known checksum, or there is no score.

The linear heads are those that the `lpips` package ships. The backbone is found first (`find_backbone`), then loaded
strictly (`Lpips`) into layers that are built here: the package would import torchvision, and with it torch's compiler,
which takes the driver and each evaluation actor 2.5 s of CPU time, and would draw random weights for whole classifiers.
"""

import importlib.util
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.evaluation.lpips_weights import Backbone, BackboneWeights, LpipsUnavailable

SMALLEST_SIDES: dict[Backbone, int] = {"alex": 31, "vgg": 16}  # below these, a pooling layer is left without pixels
IMAGENET_MEAN, IMAGENET_STD = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # LPIPS' own, of images in [-1, 1]


class Lpips:
    """Perceptual distance between images: 0 for equal images, larger for less alike.

    Where PyTorch lets a GPU's convolutions run in TF32, its default, expect values that differ from the CPU's
    in the fourth decimal.

    Attributes:
        backbone: "alex" or "vgg".
        source: the path or URL that the backbone's weights came from.
        sha256: the checksum of the file there.
    """

    def __init__(self, weights: BackboneWeights, device: torch.device | str = "cpu") -> None:
        """Build the metric on `device`.

        Raises:
            ValueError: if the weights do not fit the backbone.
            LpipsUnavailable: if the `lpips` package, which holds the linear heads, is not installed.
        """
        self.backbone = weights.backbone
        self.source = weights.source
        self.sha256 = weights.sha256
        self._device = torch.device(device)
        self._slices = [layers.to(self._device) for layers in _build_slices(weights)]
        self._heads = [head.to(self._device) for head in _read_heads(weights.backbone)]
        self._mean, self._std = (
            torch.tensor(each, device=self._device)[:, None, None] for each in (IMAGENET_MEAN, IMAGENET_STD)
        )

    def __call__(self, prediction: Tensor, target: Tensor) -> Tensor:
        """LPIPS of whole images, none resized or clamped.

        Args:
            prediction: (B, 3, H, W), float, RGB in [0, 1]; H and W at least 31 for alex, 16 for vgg.
            target: as `prediction`, of the same shape.

        Returns:
            (B,), float32, on the metric's device.

        Raises:
            ValueError: for other shapes.
        """
        self._check(prediction, target)
        a, b = (image.to(self._device, torch.float32) * 2 - 1 for image in (prediction, target))
        with torch.no_grad(), torch.autocast(self._device.type, enabled=False):
            return self._distance(a, b)

    def _distance(self, a: Tensor, b: Tensor) -> Tensor:
        """(B,) for images in [-1, 1]; each layer of both is let go once it is compared.

        Keeping them until the end, as the package does, takes 2.0 GiB, not 0.7, for vgg at 1280x720.
        """
        a, b = ((image - self._mean) / self._std for image in (a, b))
        total = a.new_zeros(len(a))
        for layers, head in zip(self._slices, self._heads, strict=True):
            a, b = layers(a), layers(b)
            difference = _of_unit_length(a).sub_(_of_unit_length(b)).square_()
            total += F.conv2d(difference, head).mean(dim=(1, 2, 3))
        return total

    def _check(self, prediction: Tensor, target: Tensor) -> None:
        smallest_side = SMALLEST_SIDES[self.backbone]
        if prediction.shape != target.shape or prediction.ndim != 4 or prediction.shape[1] != 3:
            raise ValueError(
                f"LPIPS compares two (B, 3, H, W) batches of one shape, not {tuple(prediction.shape)} "
                f"and {tuple(target.shape)}"
            )
        if min(prediction.shape[-2:]) < smallest_side:
            raise ValueError(
                f"LPIPS with {self.backbone} needs images of at least {smallest_side}x{smallest_side}, "
                f"not {prediction.shape[-2]}x{prediction.shape[-1]}"
            )


def _build_slices(weights: BackboneWeights) -> list[nn.Module]:
    """The backbone, cut after each activation that LPIPS compares."""
    with torch.device("meta"):  # draws no random weights
        features, ends = _alex() if weights.backbone == "alex" else _vgg()
    state = {name.removeprefix("features."): value for name, value in weights.state.items()}
    try:
        features.load_state_dict(state, strict=True, assign=True)
    except RuntimeError as error:
        raise ValueError(f"{weights.source} does not fit the backbone {weights.backbone}: {error}") from error
    features.eval().requires_grad_(False)
    return [features[begin:end] for begin, end in zip((0, *ends), ends, strict=False)]


def _alex() -> tuple[nn.Sequential, tuple[int, ...]]:
    """AlexNet's `features`, as torchvision numbers them, and before which of them LPIPS compares."""
    layers = (
        *(nn.Conv2d(3, 64, 11, stride=4, padding=2), nn.ReLU(inplace=True)),
        *(nn.MaxPool2d(3, 2), nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(inplace=True)),
        *(nn.MaxPool2d(3, 2), nn.Conv2d(192, 384, 3, padding=1), nn.ReLU(inplace=True)),
        *(nn.Conv2d(384, 256, 3, padding=1), nn.ReLU(inplace=True)),
        *(nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(inplace=True)),
    )
    return nn.Sequential(*layers), (2, 5, 8, 10, 12)


def _vgg() -> tuple[nn.Sequential, tuple[int, ...]]:
    """VGG16's `features`, likewise."""
    layers: list[nn.Module] = []
    ends, channels = [], 3
    for width, convolutions in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        if layers:
            layers.append(nn.MaxPool2d(2, 2))
        for _ in range(convolutions):
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(inplace=True)]
            channels = width
        ends.append(len(layers))
    return nn.Sequential(*layers), tuple(ends)


def _read_heads(backbone: Backbone) -> list[Tensor]:
    """The weights of each layer's channels, (1, C, 1, 1), from the package's file."""
    package = importlib.util.find_spec("lpips")
    if package is None or package.origin is None:
        raise LpipsUnavailable("the package lpips is not installed: pip install lpips==0.1.4")
    file = Path(package.origin).parent / "weights" / "v0.1" / f"{backbone}.pth"
    heads = torch.load(file, map_location="cpu", weights_only=True)
    return [heads[f"lin{number}.model.1.weight"] for number in range(5)]


def _of_unit_length(features: Tensor) -> Tensor:
    """Each pixel's feature vector divided by its length; (B, C, H, W)."""
    length: Tensor = torch.linalg.vector_norm(features, dim=1, keepdim=True)
    return features / (length + 1e-10)
