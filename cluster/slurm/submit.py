"""Queues a command of this project as a Slurm job that starts Ray on all its nodes.

python cluster/slurm/submit.py --nodes 4 --gpus-per-node 8 --time 12:00:00 -- \\
    python pipeline/train.py --config lol_v1 --data.url s3://bucket/lol_v1
python cluster/slurm/submit.py --nodes 2 --cpus-per-node 16 --print -- \\
    python pipeline/train.py --config lol_v1 --data.url s3://bucket/lol_v1 --run.workers 4
"""

import argparse
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "cluster/slurm/job.sh"
TRAIN = "pipeline/train.py"
SBATCH = ("nodes", "gpus_per_node", "cpus_per_task", "time", "partition", "account", "qos", "job_name", "output")


def main() -> int:
    """Make the job's script, then queue or print it; returns the exit status."""
    arguments = parser().parse_args()
    try:
        check(arguments.command)
        script = job_script(arguments, arguments.command)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if arguments.print:
        print(script, end="")
        return 0
    Path(ROOT, arguments.output).parent.mkdir(parents=True, exist_ok=True)
    return queue(script)


class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults, and the examples as they are written."""


def parser() -> argparse.ArgumentParser:
    """The options."""
    summary, examples = (__doc__ or "\n\n").split("\n\n")
    made = argparse.ArgumentParser(
        description=summary,
        epilog=f"examples:\n{examples}",
        usage="%(prog)s [options] -- python pipeline/train.py ...",
        formatter_class=Formatter,
        allow_abbrev=False,
    )
    made.add_argument("--nodes", type=positive, default=1, help="nodes of the job, each of which runs Ray")
    made.add_argument("--gpus-per-node", type=positive, help="GPUs of each node; none by default")
    made.add_argument(
        "--cpus-per-node", dest="cpus_per_task", type=positive, help="CPU cores of each node; else the site's default"
    )
    made.add_argument("--time", help="limit, such as 12:00:00; the job is requeued and resumes when it is reached")
    made.add_argument("--partition", help="where to queue")
    made.add_argument("--account", help="whom to charge")
    made.add_argument("--qos", help="quality of service")
    made.add_argument("--job-name", default="iaml", help="name in the queue")
    made.add_argument("--output", default="slurm-logs/%x-%j.log", help="the log, appended to when the job is requeued")
    made.add_argument("--sbatch", action="append", default=[], metavar="OPTION", help="any other, --sbatch=--exclusive")
    made.add_argument("--print", action="store_true", help="print the script and queue nothing")
    made.add_argument("command", nargs="+", metavar="-- COMMAND", help="what runs on the job's Ray")
    return made


def positive(text: str) -> int:
    """A number of at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1: {text}")
    return number


def check(command: list[str]) -> None:
    """``ValueError`` when the command's script is not there."""
    for script in command[1:2]:
        if script.endswith(".py") and not Path(ROOT, script).is_file():
            raise ValueError(f"{script}: there is no such script in {ROOT}; give it as in `python {TRAIN} ...`")


def job_script(arguments: argparse.Namespace, command: list[str]) -> str:
    """``job.sh`` with the options and the command written into it.

    A training that does not say how many workers it has gets one for each GPU.
    """
    gpus = arguments.gpus_per_node
    if gpus and TRAIN in command and not any(word.split("=")[0] == "--run.workers" for word in command):
        command = [*command, "--run.workers", str(arguments.nodes * gpus)]
    given = {"chdir": ROOT, **{name: getattr(arguments, name) for name in SBATCH}}
    options = [f"--{name.replace('_', '-')}={value}" for name, value in given.items() if value is not None]
    body = SCRIPT.read_text().splitlines()
    header = next(number for number, line in enumerate(body) if not line.startswith("#"))
    # of options given twice sbatch takes the last
    return "\n".join(
        [
            *body[:header],
            *(f"#SBATCH {option}" for option in [*options, *arguments.sbatch]),
            f"set -- {shlex.join(command)}",
            *body[header:],
            "",
        ]
    )


def queue(script: str) -> int:
    """Hand the script to sbatch; returns its exit status."""
    try:
        return subprocess.run(["sbatch"], input=script, text=True).returncode
    except FileNotFoundError:
        print("error: there is no sbatch here; run this on a login node of the cluster", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
