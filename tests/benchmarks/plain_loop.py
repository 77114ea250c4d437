"""The method as a plain loop trains it: torch's own operators, nothing of the project.

What the engine is measured against. ``fast`` is what such a loop gains by two lines: channels_last, and autocast to
bf16.
"""

import copy
from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ENCODER, DECODER, PROJECTED, HEAD = (64, 128, 256, 512, 512), (512, 256, 128, 64), (256, 128, 64, 32), 32
BETA, MIRROR_WEIGHT, LEARNING_RATE, EMA_RATE = 0.6, 0.8, 2e-4, 0.999
LUMINANCE = (0.299, 0.587, 0.114)


class Attention(nn.Module):
    """CBAM."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = max(channels // 16, 8)
        self.mlp = nn.Sequential(nn.Linear(channels, hidden), nn.ReLU(), nn.Linear(hidden, channels))
        self.pixels = nn.Conv2d(2, 1, 7, padding=3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate = torch.sigmoid(self.mlp(x.mean((2, 3)))) + torch.sigmoid(self.mlp(x.amax((2, 3))))
        x = x * gate[:, :, None, None]
        pooled = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)
        return x * torch.sigmoid(self.pixels(pooled))


def down(inside: int, outside: int, attention: bool) -> nn.Sequential:
    """A level of the encoder."""
    convolution = nn.Conv2d(inside, outside, 3, 2, 1, bias=False)
    rest = [Attention(outside)] if attention else []
    return nn.Sequential(convolution, nn.BatchNorm2d(outside), nn.LeakyReLU(0.2), *rest)


def up(inside: int, outside: int) -> nn.Sequential:
    """What doubles the size in a level of the decoder."""
    convolution = nn.ConvTranspose2d(inside, outside, 3, 2, 1, 1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outside), nn.ReLU())


class Encoder(nn.ModuleList):
    """Five levels."""

    def __init__(self, channels: Sequence[int]) -> None:
        pairs = zip([3, *channels], channels, strict=False)
        super().__init__(down(inside, outside, index > 0) for index, (inside, outside) in enumerate(pairs))

    def forward(self, image: Tensor) -> list[Tensor]:
        maps = [image]
        for level in self:
            maps.append(level(maps[-1]))
        return maps[1:]


class Decoder(nn.Module):
    """Four levels, their projections, and the head."""

    def __init__(self, encoder: Sequence[int], decoder: Sequence[int], projected: Sequence[int], head: int) -> None:
        super().__init__()
        joined = [outside + skip for outside, skip in zip(decoder, encoder[-2::-1], strict=True)]
        inside = [encoder[-1], *joined[:-1]]
        self.ups = nn.ModuleList(map(up, inside, decoder))
        self.attentions = nn.ModuleList(map(Attention, joined))
        self.projections = nn.ModuleList(nn.Conv2d(i, o, 1) for i, o in zip(joined, projected, strict=True))
        self.last = nn.ConvTranspose2d(joined[-1], head, 3, 2, 1, 1)
        self.refine = nn.Sequential(nn.Conv2d(head + 3, head, 3, 1, 1), nn.ReLU(), nn.Conv2d(head, 3, 3, 1, 1))

    def forward(self, pyramid: Sequence[Tensor], image: Tensor) -> tuple[Tensor, list[Tensor]]:
        *skips, x = pyramid
        maps = []
        for enlarge, attend, project in zip(self.ups, self.attentions, self.projections, strict=True):
            x = attend(torch.cat([enlarge(x), skips.pop()], 1))
            maps.append(project(x))
        residual = self.refine(torch.cat([F.relu(self.last(x)), image], 1))
        return (image + residual).clamp(0, 1), maps


class PlainLoop:
    """Student, teacher and Adam.

    Args:
        width: scales all channels.
        fast: channels_last and bf16.
        distributed: under DistributedDataParallel, with the worker's own batch normalisation.
    """

    def __init__(self, width: float, fast: bool, distributed: bool = False) -> None:
        torch.manual_seed(0)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        encoder, decoder, projected, (head,) = (
            [round(count * width) for count in counts] for counts in (ENCODER, DECODER, PROJECTED, (HEAD,))
        )
        self.fast = fast
        self.layout = torch.channels_last if fast else torch.contiguous_format
        student = nn.ModuleDict({"encoder": Encoder(encoder), "decoder": Decoder(encoder, decoder, projected, head)})
        student.to(self.device, memory_format=self.layout)  # type: ignore[call-overload]
        self.encoder, self.decoder = student["encoder"], student["decoder"]
        self.teacher = copy.deepcopy(self.decoder).requires_grad_(False)
        self.optimizer = torch.optim.Adam(student.parameters(), LEARNING_RATE)
        network = Network(self.encoder, self.decoder)
        self.network = nn.parallel.DistributedDataParallel(network) if distributed else network
        self.updates = 0

    def step(self, low: Tensor, clean: Tensor) -> None:
        """One optimizer step on a batch of uint8 images, (B, 3, H, W), on the device."""
        low, clean = (images.float().div(255).contiguous(memory_format=self.layout) for images in (low, clean))
        with self.autocast():
            output, maps = self.network(low)
        for module in (self.encoder, self.teacher):
            module.eval()
        with torch.no_grad(), self.autocast():
            _, clean_maps = self.teacher(self.encoder(clean), clean)
        self.encoder.train()
        output = output.float()
        loss = ((output - clean).square() + 1e-6).sqrt().mean() + 1 - similarity(output, clean)
        loss = loss + MIRROR_WEIGHT * mirror(maps, clean_maps, low)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.follow()

    @torch.no_grad()
    def follow(self) -> None:
        """Move the teacher."""
        rate = min(EMA_RATE, 1 - (1 + self.updates) ** -0.75)
        self.updates += 1
        for average, value in zip(self.teacher.state_dict().values(), self.decoder.state_dict().values(), strict=True):
            if average.is_floating_point():
                average.lerp_(value, 1 - rate)
            else:
                average.copy_(value)

    def autocast(self) -> AbstractContextManager[None]:
        """To bf16, where it is to be fast."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.fast)


class Network(nn.Module):
    """The student as one module, which DistributedDataParallel needs."""

    def __init__(self, encoder: nn.Module, decoder: nn.Module) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder, decoder

    def forward(self, image: Tensor) -> tuple[Tensor, list[Tensor]]:
        output: tuple[Tensor, list[Tensor]] = self.decoder(self.encoder(image), image)
        return output


def mirror(students: Sequence[Tensor], teachers: Sequence[Tensor], low: Tensor) -> Tensor:
    """The mirror loss, its scales weighted alike."""
    luminance = (low * low.new_tensor(LUMINANCE).view(1, 3, 1, 1)).sum(1, keepdim=True)
    least, most = luminance.amin((2, 3), keepdim=True), luminance.amax((2, 3), keepdim=True)
    emphasis = 1 + BETA * (1 - (luminance - least) / (most - least + 1e-7))
    losses = [
        (F.interpolate(emphasis, u.shape[2:], mode="bilinear") * (standard(u) - standard(t)).abs()).mean()
        for u, t in zip(students, teachers, strict=True)
    ]
    return torch.stack(losses).mean()


def standard(x: Tensor) -> Tensor:
    """Each sample's map with mean 0 and deviation 1."""
    x = x.float()
    return (x - x.mean((1, 2, 3), keepdim=True)) / (x.std((1, 2, 3), keepdim=True) + 1e-6)


def similarity(a: Tensor, b: Tensor) -> Tensor:
    """Mean SSIM with an 11x11 Gaussian window of 1.5 pixels."""
    line = torch.exp(-((torch.arange(11.0, device=a.device) - 5) ** 2) / (2 * 1.5**2))
    line /= line.sum()
    window = (line[:, None] * line).expand(3, 1, 11, 11)

    def blur(image: Tensor) -> Tensor:
        return F.conv2d(image, window, groups=3)

    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b = blur(a * a) - mean_a.square(), blur(b * b) - mean_b.square()
    covariance = blur(a * b) - mean_a * mean_b
    numerator = (2 * mean_a * mean_b + 1e-4) * (2 * covariance + 9e-4)
    return (numerator / ((mean_a.square() + mean_b.square() + 1e-4) * (var_a + var_b + 9e-4))).mean()
