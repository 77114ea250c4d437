"""Pack a folder of image pairs: ``python pipeline/pack.py --source ... --out ...``."""

from pipeline.command_line import parse_settings, user_errors
from pipeline.data.packing import PackSettings, pack


def main() -> None:
    """Read the options, pack, and print what was packed and where it is."""
    settings = parse_settings(PackSettings, description="Pack a folder of image pairs into shards for training.")
    with user_errors():
        print(pack(settings))


if __name__ == "__main__":
    main()
