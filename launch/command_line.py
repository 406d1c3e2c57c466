"""The command line that train.py and launch.run share."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import NoReturn

from launch.run_config import DEFAULT_CONFIG, REPO_ROOT
from launch.run_dir import EXIT_REFUSED


class OneLineParser(argparse.ArgumentParser):
    """A command line that cannot be read is refused like a bad run file: one line, from rank 0, and exit code 2."""

    def error(self, message: str) -> NoReturn:
        if os.environ.get("RANK", "0") == "0":
            print(f"ConfigError: {self.prog}: {message}. See --help.", file=sys.stderr)
        sys.exit(EXIT_REFUSED)


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """--run_dir, --resume and --set, which mean the same in train.py and launch.run."""
    parser.add_argument("--run_dir", type=Path, metavar="DIR", help="run folder (default: runs/<name of the run file>)")
    parser.add_argument(
        "--resume", default="auto", metavar="auto|STEP|never", help="continue an unfinished run folder (default: auto)"
    )
    parser.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        dest="assignments",
        metavar="KEY=VALUE",
        help="change any key of the run file: value is JSON, else a string; null deletes",
    )


def parse_train_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Arguments of train.py: config, run_dir, resume, assignments."""
    parser = OneLineParser(prog="train.py", description="Train one run file under deepspeed, torchrun or plain python.")
    parser.add_argument(
        "--config",
        "--deepspeed_config",
        type=Path,
        default=DEFAULT_CONFIG,
        metavar="FILE",
        help="run file (default: %(default)s)",
    )
    add_run_arguments(parser)
    parser.add_argument("--refusal_file", type=Path, help=argparse.SUPPRESS)  # launch.run reads why a run was refused
    parser.add_argument("--stop_file", type=Path, help=argparse.SUPPRESS)  # launch.run makes it to ask for a stop
    # srun started this rank. Not guessed from the environment: a shell or script in a Slurm job has the variables too
    parser.add_argument("--slurm_ranks", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument(
        "--local_rank", type=int, help=argparse.SUPPRESS
    )  # `deepspeed` passes it; LOCAL_RANK says the same
    args = parser.parse_args(argv)
    args.run_dir = args.run_dir or default_run_dir(args.config)
    return args


def default_run_dir(config: Path) -> Path:
    return REPO_ROOT / "runs" / config.stem


def parse_launch_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Arguments of launch.run: config, run_dir, resume, assignments, restarts, dry_run. Paths are absolute."""
    parser = OneLineParser(
        prog="python -m launch.run",
        description="Start one run file under deepspeed, with the ranks that it states, and watch it.",
    )
    parser.add_argument("config", type=Path, metavar="FILE", help="run file, such as ds_configs/demo.json")
    add_run_arguments(parser)
    parser.add_argument(
        "--restarts",
        type=int,
        default=0,
        metavar="N",
        help="start again up to N times after an error, a hang, a killed rank or want of memory (default: 0)",
    )
    parser.add_argument("--dry_run", action="store_true", help="print what would be started, and start nothing")
    args = parser.parse_args(argv)
    if args.restarts < 0:
        parser.error(f"argument --restarts: {args.restarts} is below 0")
    args.config = args.config.absolute()
    args.run_dir = (args.run_dir or default_run_dir(args.config)).absolute()
    return args
