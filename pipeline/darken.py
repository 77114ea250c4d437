"""Makes pairs of dark and clean images from photographs.

python pipeline/darken.py --source photographs --out pairs --variants 3
python pipeline/darken.py --source photographs --out pairs --max-side 1024 --camera.most-stops 6
"""

from pipeline.packing.darkening import darken_folder
from pipeline.settings.command_line import parse_settings, user_errors
from pipeline.settings.darkening import DarkenSettings


def main() -> None:
    """Read the options, darken the photographs, and print where the pairs are."""
    settings = parse_settings(DarkenSettings, description=__doc__ or "")
    with user_errors():
        print(darken_folder(settings))


if __name__ == "__main__":
    main()
