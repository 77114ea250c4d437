"""Packs a folder of image pairs into shards for training.

python pipeline/pack.py --source LOLdataset --out s3://bucket/lol_v1
python pipeline/pack.py --source pairs --out shards --scene-pattern '^([0-9]+)_' --dev-fraction 0.2
"""

from pipeline.packing.shard_writer import pack
from pipeline.settings.command_line import parse_settings, user_errors
from pipeline.settings.packing import PackSettings


def main() -> None:
    """Read the options, pack, and print what was packed and where it is."""
    settings = parse_settings(PackSettings, description=__doc__ or "")
    with user_errors():
        print(pack(settings))


if __name__ == "__main__":
    main()
