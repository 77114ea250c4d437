"""Names of the pictures beside a checkpoint: of its best, its worst and some fixed images, and a grid of the latter."""

from collections.abc import Mapping

from pipeline import storage
from pipeline.settings.evaluation import Split
from pipeline.terminal import log_once

VIEWS = ("low", "gamma", "enhanced", "clean", "error")  # of an image, as pictures show it
BRIGHTEST_ERROR = 0.5  # mean difference over the channels at which the map of errors ends
PICTURE = "webp"
PICTURES = rf".+\.({'|'.join(VIEWS)})\.{PICTURE}"  # names of all that there may be
EXTREMES = 2  # best and worst images, of which there are pictures


def pictures_folder(split: Split) -> str:
    """Name of the folder beside a checkpoint with pictures of some images of ``split``: ``KEY.VIEW.webp``."""
    return f"pictures-{split}"


def grid_file(split: Split) -> str:
    """Name of the picture beside a checkpoint that shows images of ``split``."""
    return f"grid-{split}.png"


def find_pictures(checkpoint: str, split: Split) -> Mapping[str, Mapping[str, str]]:
    """URLs of a checkpoint's pictures of ``split``, by image and view; other files are ignored and named."""
    folder = storage.join(checkpoint, pictures_folder(split))
    urls: dict[str, dict[str, str]] = {}
    others = []
    for file in storage.listdir(folder):
        key, _, view = file.removesuffix(f".{PICTURE}").rpartition(".")
        if key and view in VIEWS and file.endswith(f".{PICTURE}"):
            urls.setdefault(key, {})[view] = storage.join(folder, file)
        else:
            others.append(file)
    if others:
        log_once(f"{folder}: ignored {', '.join(others)}: no pictures of a checkpoint")
    return urls
