"""Make dark images of photographs: ``python pipeline/darken.py --source ... --out ...``."""

from pipeline.command_line import parse_settings, user_errors
from pipeline.data.darkening import DarkenSettings, darken_folder


def main() -> None:
    """Read the options, darken the photographs, and print where the pairs are."""
    settings = parse_settings(DarkenSettings, description="Make pairs of dark and clean images from photographs.")
    with user_errors():
        print(darken_folder(settings))


if __name__ == "__main__":
    main()
