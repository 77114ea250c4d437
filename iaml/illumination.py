"""Where an image is dark: its luminance and the emphasis that the mirror loss puts on dark places."""

from torch import Tensor

EPSILON = 1e-7  # keeps the normalisation finite for an image of one brightness


def luminance(image: Tensor) -> Tensor:
    """BT.601 luminance ``Y = 0.299 R + 0.587 G + 0.114 B``.

    Args:
        image: RGB, float, shape (B, 3, H, W).

    Returns:
        Float tensor of shape (B, 1, H, W), in the range of ``image``.
    """
    red, green, blue = image.unbind(dim=1)
    return (0.299 * red + 0.587 * green + 0.114 * blue)[:, None]


def emphasis_map(low: Tensor, beta: float, gamma: float) -> Tensor:
    """The emphasis ``W = 1 + beta (1 - Yn)^gamma``, largest where the low-light image is darkest.

    ``Yn`` is the luminance stretched to [0, 1] over each image.

    Args:
        low: low-light images ``x``, RGB in [0, 1], float, shape (B, 3, H, W).
        beta: strength of the emphasis, at least 0; 0 gives 1 everywhere.
        gamma: the illumination exponent, above 0; larger values single out the darkest places.

    Returns:
        Float32 tensor of shape (B, 1, H, W) in [1, 1 + beta].
    """
    y = luminance(low.float())
    darkest, brightest = y.amin(dim=(1, 2, 3), keepdim=True), y.amax(dim=(1, 2, 3), keepdim=True)
    stretched = (y - darkest) / (brightest - darkest + EPSILON)
    return 1 + beta * (1 - stretched).pow(gamma)
