"""Writes the photographs that scikit-image carries, to try the pipeline with.

python pipeline/demo_photographs.py --out photographs
python pipeline/demo_photographs.py --out ~/photographs
"""

from pipeline.packing.photographs import export_photographs
from pipeline.settings.command_line import parse_settings, user_errors
from pipeline.settings.darkening import PhotographSettings


def main() -> None:
    """Read the option, write the photographs, and print where they are."""
    settings = parse_settings(PhotographSettings, description=__doc__ or "")
    with user_errors():
        print(f"{export_photographs(settings.out)} photographs in {settings.out}")


if __name__ == "__main__":
    main()
