"""A suite of runs: `python -m launch.ablate plan|run|status|report SUITE`.

plan    every leg resolved, with what it changes; starts nothing
run     starts what is unfinished, watches it, writes the report after each run
status  where every run stands, from its folder; also from another terminal, while the queue runs
report  tables, figures and verdicts once more, from the run folders alone

Exit codes: 0 done; 2 refused; 3 stopped on request; 4 a run has failed or is unfinished.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from launch.command_line import OneLineParser
from launch.environment import utc_now
from launch.experiment import Experiment, RunState, existing_experiment, last_metrics, open_experiment
from launch.run import Plan, hosts_of, launch_plan
from launch.run_config import REPO_ROOT
from launch.run_dir import EXIT_COMPLETED, EXIT_FAILED, EXIT_REFUSED
from launch.run_log import thousands
from launch.run_queue import RunQueue, launch_command, number_of_slots
from launch.screen import turn_away
from launch.suite import Leg, Suite, load_suite
from launch.wandb_run import WandbFailure
from model.config import ConfigError, DataError
from model.flops import count_parameters, flops_per_token

STYLES = {
    "completed": "green", "running": "cyan", "pending": "dim", "stopped": "yellow", "interrupted": "yellow",
    "killed": "yellow",
}  # fmt: skip


def main(argv: list[str] | None = None, launcher: list[str] | None = None, reporter: list[str] | None = None) -> int:
    """`launcher` is the command of launch.run, `reporter` the one that writes the report; tests have their own."""
    args = parse_arguments(argv)
    args.launcher, args.reporter = launcher or launch_command(), reporter
    try:
        return args.command(args)
    except (ConfigError, DataError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return EXIT_REFUSED


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = OneLineParser(prog="python -m launch.ablate", description=(__doc__ or "").split("\n")[0])
    commands = parser.add_subparsers(metavar="plan|run|status|report", required=True)
    for name, command, help_text in (
        ("plan", plan, "resolve every leg and show what it changes; start nothing"),
        ("run", run, "run what is unfinished, and report after each run"),
        ("status", status, "show where every run stands"),
        ("report", report, "write tables, figures and verdicts from the run folders"),
    ):
        each = commands.add_parser(name, help=help_text)
        each.set_defaults(command=command)
        each.add_argument(
            "suite", type=Path, metavar="SUITE", help="suite file, such as ds_configs/suites/demo_capacity.json"
        )
        each.add_argument(
            "--exp_dir", type=Path, metavar="DIR", help="experiment folder (default: runs/<name of the suite>)"
        )
        each.add_argument("--legs", type=lambda text: text.split(","), metavar="A,B", help="these legs only")
        each.add_argument("--set", nargs="+", action="extend", default=[], dest="assignments", metavar="KEY=VALUE",
                          help="change the base of every leg, as in launch.run")  # fmt: skip
        if name == "run":
            each.add_argument("--retry", choices=["failed"], help="try again what has failed or was refused")
        if name in ("run", "report"):
            each.add_argument(
                "--log_wandb", action="store_true", help="log tables and figures to W&B, as a run of their own"
            )
    args = parser.parse_args(argv)
    args.suite = args.suite.absolute()
    args.exp_dir = (args.exp_dir or REPO_ROOT / "runs" / args.suite.stem).resolve()
    return args


# --- plan -----------------------------------------------------------------------------------------------------------


def plan(args: argparse.Namespace) -> int:
    suite = load_suite(args.suite, args.assignments)
    legs = [suite.legs[name] for name in chosen_legs(suite.name, suite.legs, args.legs)]
    print(describe_suite(suite, legs, plans_of(suite, legs)))
    return EXIT_COMPLETED


def chosen_legs(suite: str, legs: Iterable[str], names: list[str] | None) -> list[str]:
    """Those that --legs names, or all, in the suite's order."""
    known = list(legs)
    unknown = [name for name in names or [] if name not in known]
    if unknown:
        raise ConfigError(f"--legs {unknown[0]}: no such leg in {suite}. Use some of {', '.join(known)}.")
    return [name for name in known if names is None or name in names]


def plans_of(suite: Suite, legs: list[Leg]) -> dict[str, Plan]:
    """How launch.run would start each leg. Raises ConfigError for a leg that does not fit its ranks."""
    plans = {}
    for leg in legs:
        try:
            plans[leg.name] = launch_plan(leg.run)
        except ConfigError as error:
            raise ConfigError(f"legs.{leg.name}: {error}") from None
    return plans


def describe_suite(suite: Suite, legs: list[Leg], plans: dict[str, Plan]) -> str:
    """What `plan` prints."""
    config = suite.config
    runs = [run for run in suite.runs if run.leg in plans]
    steps = sum(suite.legs[run.leg].run.num_steps for run in runs)
    tokens = sum(suite.legs[run.leg].run.num_steps * suite.legs[run.leg].run.tokens_per_step for run in runs)
    how = (
        "alone on the machine"
        if config.measure == "throughput"
        else f"side by side, one rank each, slots {config.slots}"
    )
    lines = [f"{suite.name}: {config.question}", ""]
    for leg in legs:
        ranks, counts = plans[leg.name].topology, count_parameters(leg.run.model)
        lines += [
            f"{leg.name}{' (baseline)' if leg.name == config.baseline else ''}: {leg.question}",
            f"    {leg.difference_line or 'the base itself'}",
            f"    {ranks.ranks} rank{'s' * (ranks.ranks > 1)}, ep_size {ranks.ep_size}; {leg.run.num_steps:,} steps of "
            f"{leg.run.tokens_per_step:,} tokens; {counts.total:,} parameters, {counts.active:,} active; "
            f"{flops_per_token(leg.run.model):,} FLOPs per token",
        ]
    lines += ["", "gates, against the baseline" if suite.gates else ""]
    lines += [f"    {gate}" for gate in suite.gates]
    seeds = sorted({run.seed for run in runs})
    lines += [
        "",
        f"{len(runs)} runs: {len(legs)} leg{'s' * (len(legs) > 1)} x {config.repeats} "
        f"repeat{'s' * (config.repeats > 1)}, seeds {', '.join(map(str, seeds))}, {config.order}, {how}; "
        f"{steps:,} steps, {tokens:,} tokens in all; suite {suite.hash}",
    ]
    for name, each in plans.items():
        try:
            hosts_of(each)
        except ConfigError as refusal:
            lines.append(f"Not here: legs.{name}: {refusal}")
    if not config.keep_checkpoints:
        lines.append("Checkpoints of completed runs are removed.")
    if config.repeats == 1:
        lines.append("repeats=1: without repeats the noise is not known, and no leg can be told from another.")
    return "\n".join(lines)


# --- run ------------------------------------------------------------------------------------------------------------


def run(args: argparse.Namespace) -> int:
    suite = load_suite(args.suite, args.assignments)
    legs = [suite.legs[name] for name in chosen_legs(suite.name, suite.legs, args.legs)]
    for name, each in plans_of(suite, legs).items():
        try:
            hosts_of(each)
        except ConfigError as refusal:
            raise ConfigError(f"legs.{name}: {refusal}") from None
    slots = number_of_slots(suite.config.measure, suite.config.slots)
    report_again = ["report", str(args.suite), "--exp_dir", str(args.exp_dir)]
    with open_experiment(args.exp_dir, suite) as experiment:
        view = View(experiment)
        queue = RunQueue(
            experiment,
            legs=args.legs,
            slots=slots,
            retry_failed=args.retry == "failed",
            launcher=args.launcher,
            reporter=args.reporter or [sys.executable, "-m", "launch.ablate", *report_again],
            show=view.show,
            say=view.say,
        )
        with view:
            code = queue.run()
    tell(lambda: print(experiment.folder / "report.html", flush=True))
    return code if not args.log_wandb or log_to_wandb(experiment) or code else EXIT_FAILED


class View:
    """A table that stays in place on a terminal, with the transitions above it; elsewhere the transitions alone.

    Whoever reads may leave before the queue ends: a terminal is closed, a pipe breaks. queue.jsonl and `status` have
    the rest.
    """

    def __init__(self, experiment: Experiment) -> None:
        self.experiment = experiment
        self.console = Console()
        self.live = Live(console=self.console, auto_refresh=False)

    def say(self, text: str) -> None:
        if self.console.is_terminal:
            tell(lambda: self.console.print(text, markup=False, highlight=False))
        else:
            tell(lambda: print(f"{utc_now()[11:19]} {text}", flush=True))

    def show(self, states: list[RunState]) -> None:
        if self.console.is_terminal:
            tell(lambda: self.live.update(table_of(self.experiment, states), refresh=True))

    def __enter__(self) -> None:
        tell(self.live.start)

    def __exit__(self, *exception: object) -> None:
        tell(self.live.stop)


def tell(how: Callable[[], None]) -> None:
    """Write to stdout; once nobody reads it, to nowhere."""
    try:
        how()
    except OSError:
        turn_away(sys.stdout)


def table_of(experiment: Experiment, states: list[RunState]) -> Table:
    """One row a run, from the run folders."""
    table = Table(title=Text(f"{experiment.suite['name']}: {experiment.suite['question']}"))
    for name in ("leg", "repeat", "status"):
        table.add_column(name)
    for name in ("step", "loss", "tok/s", "minutes", "attempts"):
        table.add_column(name, justify="right")
    table.add_column("reason", overflow="fold")
    for state in states:
        figures = last_metrics(state.folder)
        table.add_row(
            state.run.leg,
            str(state.run.repeat),
            state.status,
            "" if state.status == "pending" else f"{state.step}/{state.run.num_steps}",
            shown(figures.get("train/loss"), "{:.3f}".format),
            shown(figures.get("tail50_tok_per_sec", figures.get("train/tok_per_sec")), thousands),
            shown(figures.get("total_time_min"), "{:.1f}".format),
            str(state.attempts or ""),
            Text("" if state.status == "completed" else state.reason),  # a reason may hold what rich reads as markup
            style=STYLES.get(state.status, "red"),
        )
    return table


def shown(value: float | None, how: Callable[[float], str]) -> str:
    return "" if value is None else how(value)


# --- status and report ----------------------------------------------------------------------------------------------


def status(args: argparse.Namespace) -> int:
    experiment = existing_experiment(args.exp_dir, args.suite.stem)
    legs = chosen_legs(experiment.suite["name"], experiment.suite["legs"], args.legs)
    states = [state for state in experiment.states() if state.run.leg in legs]
    console = Console()
    if not console.is_terminal:
        console = Console(width=160)
    console.print(table_of(experiment, states))
    alive = "a queue works on it" if experiment.queue_is_alive() else "no queue works on it"
    console.print(f"{experiment.folder}: {alive}", highlight=False, soft_wrap=True)
    return EXIT_COMPLETED


def report(args: argparse.Namespace) -> int:
    from launch.report import write_report

    experiment = existing_experiment(args.exp_dir, args.suite.stem)
    print(write_report(experiment))
    return EXIT_COMPLETED if not args.log_wandb or log_to_wandb(experiment) else EXIT_FAILED


def log_to_wandb(experiment: Experiment) -> bool:
    """Whether W&B took the report; a reason goes to stderr."""
    from launch.report import log_report

    try:
        print(log_report(experiment))
    except WandbFailure as failure:
        print(f"W&B did not take the report: {failure}", file=sys.stderr)
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
