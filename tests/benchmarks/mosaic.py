"""MosaicML Streaming: its package, and the pairs in its own format."""

import functools
import importlib
from pathlib import Path
from types import ModuleType

from torchvision_operators import let_torchvision_import

SIDES = ("low", "high")


@functools.cache
def streaming() -> ModuleType:
    """The package, which imports torchvision and so needs a remedy."""
    let_torchvision_import()
    return importlib.import_module("streaming")


def write_mds(folder: Path, out: Path) -> None:
    """Write the pairs of PNG files in ``folder/{low,high}`` to ``out``, byte for byte.

    Its ``png`` columns would encode the images anew, into files that take Pillow longer to decode.
    """
    with streaming().MDSWriter(out=str(out), columns=dict.fromkeys(SIDES, "bytes"), progress_bar=False) as writer:
        for low in sorted((folder / "low").iterdir()):
            writer.write({side: (folder / side / low.name).read_bytes() for side in SIDES})
