"""The pairs that runs train on, packed."""

from pathlib import Path

from pipeline.packing.darkening import darken_folder
from pipeline.packing.photographs import export_photographs
from pipeline.packing.shard_writer import pack
from pipeline.settings.darkening import DarkenSettings
from pipeline.settings.packing import PackSettings


def pack_pairs(root: Path, pairs: Path | None) -> str:
    """URL of the packed pairs, or of scikit-image's photographs darkened; a fifth of the training pairs for dev."""
    if pairs is None:
        export_photographs(root / "photographs")
        pairs = root / "pairs"
        darken_folder(DarkenSettings(source=root / "photographs", out=pairs, variants=3))
    pack(PackSettings(source=pairs, out=str(root / "shards"), dev_fraction=0.2))
    return str(root / "shards")
