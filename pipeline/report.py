"""Writes the report of a run, or of several runs beside each other, as one HTML page.

python pipeline/report.py ~/iaml-runs/lol_v1
python pipeline/report.py ~/iaml-runs/lol_v1 ~/iaml-runs/half --out comparison.html
"""

from pipeline import storage
from pipeline.reporting.run_report import REPORT, write_report
from pipeline.run.history import Run
from pipeline.settings.command_line import argument_parser, user_errors


def main() -> None:
    """Read the runs, write the page, and print where it is."""
    parser = argument_parser(__doc__ or "")
    parser.usage = "%(prog)s RUN... [--out FILE]"
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder or s3:// URL of a run")
    parser.add_argument(
        "--out",
        default=None,
        metavar="FILE",
        help=f"file or s3:// URL to write [default {REPORT} in the run's folder, or here for several runs]",
    )
    options = parser.parse_args()
    with user_errors():
        urls = [storage.absolute(url) for url in options.runs]
        default = storage.join(urls[0], REPORT) if len(urls) == 1 else REPORT
        out = storage.absolute(options.out or default)
        write_report([Run.load(url) for url in urls], out)
        print(f"report: {out}")


if __name__ == "__main__":
    main()
