"""Real photographs to try the pipeline with: those that scikit-image's wheel carries, no download needed."""

from importlib.util import find_spec
from pathlib import Path

from pipeline import storage
from pipeline.images.codecs import encode_png, read_rgb
from pipeline.terminal import bar

# The two motorcycles are a stereo pair of one scene, so they stay on one side. The rocket at dusk is the
# hard case among those held out. Left out: drawings, text, and pictures that are mostly black.
PHOTOGRAPHS = {
    "train": [
        "astronaut.png",
        "brick.png",
        "camera.png",
        "coins.png",
        "grass.png",
        "gravel.png",
        "ihc.png",
        "moon.png",
        "motorcycle_left.png",
        "motorcycle_right.png",
    ],
    "test": ["chelsea.png", "coffee.png", "rocket.jpg"],
}


def export_photographs(out: Path) -> int:
    """Write the photographs as RGB PNG below ``out/train`` and ``out/test``; gives their number.

    Raises:
        ValueError: scikit-image is not installed, its release lacks one of them, or ``out`` holds something already.
    """
    spec = find_spec("skimage")
    if spec is None or spec.origin is None:
        raise ValueError("the photographs come with scikit-image: pip install scikit-image")
    data = Path(spec.origin).parent / "data"
    sources = [(split, data / name) for split, names in PHOTOGRAPHS.items() for name in names]
    missing = [path.name for _, path in sources if not path.is_file()]
    if missing:
        raise ValueError(f"this release of scikit-image lacks {', '.join(missing)} in {data}; install 0.25 or later")
    if storage.listdir(str(out)):
        raise ValueError(f"out {out} is not empty; choose another folder, or empty it first")
    for split, path in bar(sources, title="writing", total=len(sources), unit="photo"):
        storage.write_bytes(str(out / split / f"{path.stem}.png"), encode_png(read_rgb(path)))
    return len(sources)
