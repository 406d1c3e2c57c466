"""Disturb a run again and again, and prove that nothing is lost: `python -m tests.chaos --minutes 60 --seed 1`.

    undisturbed run ----------------------------------------------------------> losses, weights
    disturbed run   --fault--> look --damage--> resume --fault--> look ... ----> the same losses and weights, bit by bit

Every attempt is launch.run with two CPU ranks of tests/faulty_train.py. When a disturbed run has completed, another
begins in a new folder, until the time is up or there were --faults faults. The last line counts the faults and what
went wrong; the exit code is 0 only if nothing did. A seed repeats the plan; the moments are the machine's as well.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil

from launch.environment import describe_checkout, package_versions, utc_now
from launch.run_config import REPO_ROOT
from tests import chaos_evidence as evidence
from tests.faults import MAIN_PHASES, NOTES, PLAN, RUN_DIR, SIGNALS, SLOT, WRITER_PHASES, Fault, plan_as_text

SCRIPT = REPO_ROOT / "tests" / "faulty_train.py"
CONFIG = REPO_ROOT / "ds_configs" / "moe_tiny.json"
LAUNCH = "import sys, pathlib, launch.run; sys.exit(launch.run.main(sys.argv[2:], script=pathlib.Path(sys.argv[1])))"
CACHE = Path(tempfile.gettempdir()) / "moelab_chaos_inductor"  # what Muon compiles, kept from attempt to attempt
STEPS, SAVE_EVERY, KEEP_LAST = 120, 8, 3
HANG_TIMEOUT_S = 12
HANG_TIMEOUT = f"run.train.hang_timeout_s={HANG_TIMEOUT_S}"
SETTINGS = (
    "train_batch_size=4",
    f"run.train.num_steps={STEPS}",
    f"run.train.save_every={SAVE_EVERY}",
    f"run.train.keep_last={KEEP_LAST}",
    "run.train.log_every=1",
    "run.train.max_skipped_steps=0",  # a skipped step would be another run
    "run.train.eval_every=20",
)
VARIANTS = {
    "AdamW, ZeRO-1, EP 2": (HANG_TIMEOUT,),
    "AdamW, ZeRO-2, EP 1": (HANG_TIMEOUT, "run.launch.ep_size=1", "zero_optimization.stage=2"),
    "Muon, bf16, EP 2": (  # DeepSpeed compiles in its first update, which is no hang
        "gradient_clipping=0",
        "bf16.enabled=true",
        'optimizer={"type": "Muon", "params": {"lr": null, "muon_lr": 0.02, "adam_lr": 0.003, "weight_decay": 0.1}}',
        "run.train.router_optimizer=adamw",
    ),
}
TARGETS = ("rank 0", "rank 1", "launch.py", "deepspeed", "launch.run")
STOP_S = 30.0  # a stop that was asked for takes no longer than this
STOP_STEPS = 30  # nor more steps, of some 20 ms: a request travels between the ranks in a second or less
PATIENCE_S = 240.0  # an attempt that lasts longer is a finding
POLL_S = 0.02
KINDS = ("lost", "silent loads", "orphans", "leaked folders", "mismatches", "false ends")


@dataclass(frozen=True)
class Signal:
    """A signal that comes from outside at some moment, whatever the run is doing then."""

    kind: str
    target: str
    seconds: float
    after: str  # "launch", or "first step" of this attempt

    def __str__(self) -> str:
        return f"{self.kind} to {self.target}, {self.seconds:.2f} s after the {self.after}"


@dataclass
class Plan:
    """What one attempt is to meet."""

    faults: list[Fault] = field(default_factory=list)
    signal: Signal | None = None


@dataclass
class Outcome:
    """How one attempt went; a line of the JSON."""

    life: int
    attempt: int
    variant: str
    before: list[str]  # damage done between the last attempt and this one
    planned: list[str]
    happened: list[dict[str, Any]] = field(default_factory=list)
    began_at: str | None = None  # the checkpoint that it continued
    latest: str | None = None
    code: int | None = None
    status: str | None = None
    reason: str | None = None
    seconds: float = 0.0
    seconds_after_fault: float | None = None
    findings: list[str] = field(default_factory=list)

    @property
    def faults(self) -> int:
        return len(self.before) + len(self.happened)


# --- one attempt ----------------------------------------------------------------------------------------------------


class Attempt:
    """launch.run, from its start until nothing of it is left."""

    def __init__(self, folder: Path, run_dir: Path, settings: list[str], plan: Plan) -> None:
        self.notes, self.temporary, self.run_dir, self.plan = folder / "notes", folder / "tmp", run_dir, plan
        self.notes.mkdir(parents=True)
        self.temporary.mkdir()
        self.mark, self.output = f"{folder}", folder / "output"
        environment = {
            **os.environ,
            PLAN: plan_as_text(plan.faults),
            NOTES: str(self.notes),
            RUN_DIR: str(run_dir),
            evidence.MARK: self.mark,
            "PYTHONPATH": str(REPO_ROOT),
            "TMPDIR": str(self.temporary),
            "TORCHINDUCTOR_CACHE_DIR": str(CACHE),
            "OMP_NUM_THREADS": "1",  # sums are taken in another order by other numbers of threads
            "DS_ACCELERATOR": "cpu",
            "CUDA_VISIBLE_DEVICES": "",
        }
        arguments = [str(CONFIG), "--run_dir", str(run_dir), "--set", *settings]
        self.started = time.time()
        with open(self.output, "wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-c", LAUNCH, str(SCRIPT), *arguments],
                env=environment,
                cwd=REPO_ROOT,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        self.named = [evidence.latest(run_dir)]  # by `latest`, one after the other; the first may be damaged by us
        self.sent: dict[str, Any] | None = None
        self.killed_launcher = False

    def wait(self) -> tuple[int | None, list[psutil.Process]]:
        """Until launch.run has ended, and what it can no longer end itself; the exit code, and what is left then."""
        try:
            return self.watch()
        except BaseException:  # somebody ends this program: what it has started goes with it
            for process in evidence.processes_of(self.mark):
                process.kill()
            raise

    def watch(self) -> tuple[int | None, list[psutil.Process]]:
        while self.process.poll() is None and time.time() - self.started < PATIENCE_S:
            self.look()
            time.sleep(POLL_S)
        self.look()
        code = self.process.poll()
        self.killed_launcher = code == -signal.SIGKILL
        left = evidence.processes_of(self.mark)
        ended = time.time()
        while self.killed_launcher and left and time.time() - ended < 2 * STOP_S:
            self.look()
            time.sleep(0.2)
            left = evidence.processes_of(self.mark)
        return code, left

    def look(self) -> None:
        name = evidence.latest(self.run_dir)
        if name != self.named[-1]:
            self.named.append(name)
        if self.plan.signal is not None and self.sent is None:
            self.send_when_due(self.plan.signal)

    def send_when_due(self, planned: Signal) -> None:
        began = self.started if planned.after == "launch" else self.first_step
        if began is None or time.time() < began + planned.seconds:
            return
        process = self.find(planned.target)
        if process is None:
            return
        doing = self.phases()  # before: the signal may change it at once
        try:
            process.send_signal(signal.Signals[planned.kind])
        except psutil.NoSuchProcess:
            return
        step = (evidence.results(self.run_dir) or [{"step": 0}])[-1]["step"]
        self.sent = {"time": time.time(), "fault": str(planned), "phase": doing, "step": step}

    @property
    def first_step(self) -> float | None:
        """When rank 0 was first seen to compute."""
        if not hasattr(self, "stepped") and self.phases()[:1] not in ([], ["build"], ["load"]):
            self.stepped = time.time()
        return getattr(self, "stepped", None)

    def phases(self) -> list[str]:
        """What the ranks are doing, and the threads of theirs that save."""
        texts = [path.read_text() for path in sorted(self.notes.glob("phase?"))]
        return [phase.strip() for text in texts for phase in (text[:SLOT], text[SLOT:]) if phase.strip()]

    def find(self, target: str) -> psutil.Process | None:
        if target == "launch.run":
            return psutil.Process(self.process.pid) if self.process.poll() is None else None
        for process in evidence.processes_of(self.mark):
            command = evidence.command_of(process)
            if target.startswith("rank "):
                fits = str(SCRIPT) in command and f"--local_rank={target[-1]}" in command
            else:
                module = {"launch.py": "deepspeed.launcher.launch", "deepspeed": "deepspeed.launcher.runner"}[target]
                fits = module in command
            if fits and process.pid != self.process.pid:
                return process
        return None

    def happened(self) -> list[dict[str, Any]]:
        """The faults that did happen, in their order."""
        path = self.notes / "faults.jsonl"
        noted = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return sorted([*noted, *([self.sent] if self.sent else [])], key=lambda note: note["time"])

    def printed(self) -> str:
        return self.output.read_text(encoding="utf-8", errors="replace")


# --- plans ----------------------------------------------------------------------------------------------------------


def make_plan(rng: random.Random, hangs: bool) -> Plan:
    """What the next attempt meets, at random."""
    rank = rng.randrange(2)
    drawn = rng.choices(
        ["signal", "signal at a phase", "full", "nan", "hang", "slow", "damage", "power"], [30, 30, 8, 6, 6, 8, 6, 6]
    )[0]
    outside = Signal(
        rng.choice(SIGNALS), rng.choice(TARGETS), rng.uniform(0, 4), "launch" if rng.random() < 0.2 else "first step"
    )
    if outside.after == "launch":
        outside = Signal(outside.kind, outside.target, rng.uniform(0, 9), outside.after)
    match drawn:
        case "signal at a phase":
            phase, times = draw_phase(rng)
            target = rng.choice(["rank", "rank", "launch.py", "deepspeed", "launch.run"])
            return Plan([Fault(rng.choice(SIGNALS), rank, phase, times, target=target)])
        case "full":
            file = rng.choice(["checkpoints", ""])
            return Plan([Fault("full", rank, "save: copy", rng.randint(1, 4), bytes=rng.randrange(60_000), file=file)])
        case "nan":
            return Plan([Fault("nan", rank, step=rng.randint(1, STEPS))])
        case "hang" if hangs:
            phase, times = draw_phase(rng, training=True)
            return Plan([Fault("hang", rank, phase, times)])
        case "slow":
            phase, times = draw_phase(rng, training=True)
            return Plan([Fault("slow", rank, phase, times, seconds=rng.uniform(0.5, 2.5))], outside)
        case "damage":
            kind = rng.choice(["flip", "truncate"])
            file = f"checkpoints/saving_step_*/rank_0000{rank}.safetensors"
            times, size = rng.randint(2, 4), rng.randrange(1000)
            spoil = Fault(kind, 0, "save: manifest", times, bytes=size, file=file)
            return Plan([spoil, Fault("SIGKILL", 0, "save: retention", times)])
        case "power":
            return Plan([Fault("power", rank, rng.choice(WRITER_PHASES), rng.randint(1, 5))])
    return Plan(signal=outside)


def draw_phase(rng: random.Random, training: bool = False) -> tuple[str, int]:
    """A phase, and how many times it is to be reached first: never so often that the run is over before."""
    phase = rng.choice((*MAIN_PHASES, *WRITER_PHASES))
    if phase == "sample" or (training and phase in ("build", "load")):
        phase = rng.choice(WRITER_PHASES)
    if phase in ("build", "load"):
        return phase, 1
    if phase.startswith("save: "):
        return phase, rng.randint(1, 5)
    return phase, rng.randint(1, 8 if phase == "validation" else 60)


# --- one run, again and again ---------------------------------------------------------------------------------------


class Life:
    """One run folder, from its first attempt until it has completed."""

    def __init__(self, number: int, folder: Path, variant: str, settings: list[str]) -> None:
        self.number, self.folder, self.variant, self.settings = number, folder, variant, settings
        self.run_dir = folder / "run"
        self.attempts = 0
        self.accepted: set[str] = set()  # named by `latest` at any time
        self.damaged: dict[str, int] = {}  # by us, and the inode of what was damaged: it may be saved anew
        self.owed_buffers: list[str] = []  # whose launch.run was killed: the next one has to remove them
        self.before: list[str] = []

    def trusted(self) -> list[str]:
        """The checkpoints that can be continued from, oldest first."""
        return [
            path.name
            for path in evidence.checkpoints(self.run_dir)
            if self.damaged.get(path.name) != path.stat().st_ino and evidence.is_whole(path)
        ]

    def disturb_the_folder(self, rng: random.Random) -> None:
        """Sometimes: damage the newest checkpoint if there is an older one to fall back to, or leave a stray file."""
        whole = self.trusted()
        if len(whole) > 1 and rng.random() < 0.45:
            newest = self.run_dir / "checkpoints" / whole[-1]
            done, names = evidence.damage(self.run_dir, newest, rng)
            self.before.append(done)
            self.damaged |= {name: newest.stat().st_ino for name in names - {"latest"}}
        if (self.run_dir / "checkpoints").is_dir() and rng.random() < 0.15:
            self.before.append(evidence.leave_stray(self.run_dir, rng))

    def attempt(self, plan: Plan, undisturbed: list[dict[str, Any]]) -> Outcome:
        """Start or resume the run, let the plan happen, and look at what is left."""
        self.attempts += 1
        planned = [str(fault) for fault in plan.faults] + ([str(plan.signal)] if plan.signal else [])
        outcome = Outcome(self.number, self.attempts, self.variant, self.before, planned)
        self.before = []
        whole, stray = self.trusted(), evidence.unfinished(self.run_dir)
        attempt = Attempt(self.folder / f"attempt_{self.attempts:03d}", self.run_dir, self.settings, plan)
        outcome.code, left = attempt.wait()
        outcome.seconds = time.time() - attempt.started
        outcome.happened = attempt.happened()
        if outcome.happened:
            outcome.seconds_after_fault = time.time() - outcome.happened[0]["time"]
        summary = json.loads(text) if (text := read(self.run_dir / "summary.json")) else {}
        outcome.status, outcome.reason = summary.get("status"), summary.get("reason")
        outcome.latest = evidence.latest(self.run_dir)
        new = {name for name in attempt.named[1:] if name is not None}
        found = outcome.findings
        found += self.leftovers(attempt, left, stray if new else {})
        found += self.beginning(attempt, outcome, whole)
        self.accepted |= new
        found += self.losses(attempt)
        if difference := evidence.first_difference(evidence.results(self.run_dir), undisturbed, whole=False):
            found.append(f"mismatches: {difference}")
        found += self.ending(attempt, outcome, summary)
        return outcome

    def leftovers(self, attempt: Attempt, left: list[psutil.Process], stray: dict[int, str]) -> list[str]:
        """Processes, folders and memory that outlive the attempt."""
        found = []
        for process in left:
            found.append(f"orphans: {process.pid} {' '.join(evidence.command_of(process))[:200]}")
        for process in left:
            process.kill()
        if attempt.process.poll() is None:
            attempt.process.kill()
            attempt.process.wait()
            found.append(f"false ends: launch.run had not ended after {PATIENCE_S:.0f} s")
        buffers = evidence.buffers_of(attempt.notes)
        if attempt.killed_launcher:  # nobody is left to remove them
            self.owed_buffers += buffers
        else:
            owed = [name for name in self.owed_buffers if (evidence.SHARED_MEMORY / name).exists()]
            found += [f"leaked folders: {evidence.SHARED_MEMORY / name}" for name in (*buffers, *owed)]
            left_over = [path for path in attempt.temporary.iterdir() if path.is_dir()]  # killed compilers leave files
            found += [f"leaked folders: {path}" for path in left_over if not path.name.startswith("torchinductor_")]
            self.owed_buffers = []
        still = evidence.unfinished(self.run_dir).keys() & stray.keys()
        return found + [f"leaked folders: checkpoints/{stray[inode]}, after a later save" for inode in still]

    def beginning(self, attempt: Attempt, outcome: Outcome, whole: list[str]) -> list[str]:
        """It continued the newest whole checkpoint, or a newer one than `latest` named, and said which it left out.

        An older one only if a bit of `latest` made it name that, and then it says that there are later ones.
        """
        printed = attempt.printed()
        continued = re.search(r"continued from (step_\d+)", printed)
        outcome.began_at = continued[1] if continued else None
        owed = [name for name in whole if name in self.accepted]
        if outcome.code == 2:
            return [f"lost: refused to continue: {last_line(printed)}"]
        if continued and continued[1] not in whole:
            return [f"silent loads: continued from {continued[1]}, whole were {', '.join(whole) or 'none'}"]
        began = continued or "\nstep 0/" in printed
        pointed_at = continued is not None and attempt.named[0] == continued[1]
        misled = pointed_at and "though later ones are there" in printed
        if began and owed and not misled and (not continued or continued[1] < owed[-1]):
            return [f"lost: began at {outcome.began_at}, though {owed[-1]} was whole"]
        return []

    def losses(self, attempt: Attempt) -> list[str]:
        """What was accepted, and not damaged by us, is there, or was removed behind a newer one that is whole.

        A damaged one counts among the KEEP_LAST that stay.
        """
        now, found = self.trusted(), []
        present = {path.name for path in evidence.checkpoints(self.run_dir)}
        for name in sorted(self.accepted):
            path = self.run_dir / "checkpoints" / name
            spoilt = name in self.damaged and (not path.exists() or path.stat().st_ino == self.damaged[name])
            replaced = now[-1:] > [name] and len([other for other in present if other > name]) >= KEEP_LAST
            if name not in now and not spoilt and not (replaced and not path.exists()):
                found.append(f"lost: {name} was accepted, and is {'damaged' if path.exists() else 'gone'}")
        self.accepted = {name for name in self.accepted if name in now}
        spoilt_in_flight = any(fault.kind in ("flip", "truncate") for fault in attempt.plan.faults)
        return [] if spoilt_in_flight else found

    def ending(self, attempt: Attempt, outcome: Outcome, summary: dict[str, Any]) -> list[str]:
        """The status and the exit code are those of what happened."""
        found, status, code = [], outcome.status, outcome.code
        if attempt.killed_launcher or code is None:
            return []
        if {0: "completed", 3: "stopped"}.get(code, "") != (status if status in ("completed", "stopped") else ""):
            found.append(f"false ends: exit code {code} with status {status}")
        if status == "running":
            found.append("false ends: nothing runs, and the summary says that it does")
        final = f"step_{STEPS:08d}"
        if status == "completed" and (final not in self.trusted() or len(evidence.results(self.run_dir)) <= STEPS):
            found.append(f"false ends: completed without {final} or without all losses")
        if status == "stopped" and f"step_{summary['step']:08d}" not in self.trusted():
            found.append(f"false ends: stopped at step {summary['step']}, which is not saved")
        if not outcome.happened and status != "completed":
            found.append(f"false ends: {status} ({outcome.reason}), and nothing had happened")
        return found + self.end_of_a_stop(attempt, outcome)

    def end_of_a_stop(self, attempt: Attempt, outcome: Outcome) -> list[str]:
        """Whoever is asked to stop in training saves and stops, in time. Before that it is enough that it ends."""
        happened = [note["fault"].split()[0] for note in outcome.happened]
        if not happened or any(kind not in SIGNALS or kind == "SIGKILL" for kind in happened):
            return []
        found = []
        if outcome.seconds_after_fault and outcome.seconds_after_fault > STOP_S:
            found.append(f"false ends: took {outcome.seconds_after_fault:.0f} s to stop")
        trained = attempt.first_step is not None and outcome.happened[0]["phase"] not in ("build", "load")
        if trained and outcome.status not in ("stopped", "completed"):
            found.append(f"false ends: asked to stop, and ended as {outcome.status} ({outcome.reason})")
        if outcome.status == "completed" and outcome.happened[0]["step"] < STEPS - STOP_STEPS:
            found.append(f"false ends: asked to stop at step {outcome.happened[0]['step']}, and took all steps")
        return found


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def last_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[-1]


# --- all of it ------------------------------------------------------------------------------------------------------


class Chaos:
    """Runs that are disturbed, beside the same runs undisturbed."""

    def __init__(self, folder: Path, seed: int, variants: int = len(VARIANTS)) -> None:
        self.folder, self.seed, self.rng = folder, seed, random.Random(seed)
        self.variants = list(VARIANTS)[:variants]
        self.undisturbed: dict[str, tuple[list[dict[str, Any]], dict[str, str]]] = {}
        self.outcomes: list[Outcome] = []

    def settings_of(self, variant: str) -> list[str]:
        return [*SETTINGS, *VARIANTS[variant]]

    def run_undisturbed(self, variant: str) -> None:
        """The run as it should be. Raises RuntimeError if it fails: then there is nothing to compare with."""
        folder = self.folder / f"undisturbed_{len(self.undisturbed)}"
        attempt = Attempt(folder, folder / "run", self.settings_of(variant), Plan())
        code, _ = attempt.wait()
        if code != 0:
            raise RuntimeError(f"{variant}: the undisturbed run failed ({folder}): {last_line(attempt.printed())}")
        final = folder / "run" / "checkpoints" / f"step_{STEPS:08d}"
        self.undisturbed[variant] = (evidence.results(folder / "run"), evidence.tensors_of(final))
        print(f"undisturbed: {variant}, {time.time() - attempt.started:.0f} s", flush=True)

    def live(self, number: int, deadline: float, faults: int) -> None:
        """One run folder until it has completed; undisturbed as soon as there were enough faults."""
        variant = self.variants[(number - 1) % len(self.variants)]
        if variant not in self.undisturbed:
            self.run_undisturbed(variant)
        losses, weights = self.undisturbed[variant]
        life = Life(number, self.folder / f"life_{number:03d}", variant, self.settings_of(variant))
        while True:
            enough = time.time() > deadline or self.faults >= faults
            if not enough:
                life.disturb_the_folder(self.rng)
            plan = Plan() if enough else make_plan(self.rng, hangs=HANG_TIMEOUT in VARIANTS[variant])
            outcome = life.attempt(plan, losses)
            self.outcomes.append(outcome)
            if outcome.status == "completed":
                outcome.findings += compare(life.run_dir, losses, weights)
            self.tell(outcome)
            if outcome.status == "completed" or (enough and outcome.findings):
                break
        if not any(outcome.findings for outcome in self.outcomes if outcome.life == number):
            evidence.remove(life.folder)

    def tell(self, outcome: Outcome) -> None:
        for what in (*outcome.before, *(f"{note['fault']} ({note['phase']})" for note in outcome.happened)):
            print(f"  {what}")
        ended = f"exit code {outcome.code}, {outcome.status} ({outcome.reason})"
        where = f"life {outcome.life}, attempt {outcome.attempt} from {outcome.began_at} to {outcome.latest}"
        print(f"{self.faults:4d} faults | {where} | {outcome.seconds:.0f} s | {ended}", flush=True)
        for finding in outcome.findings:
            print(f"FOUND {finding} (seed {self.seed}, life {outcome.life}, attempt {outcome.attempt})", flush=True)

    @property
    def faults(self) -> int:
        return sum(outcome.faults for outcome in self.outcomes)

    def counts(self) -> Counter[str]:
        return Counter(finding.split(":")[0] for outcome in self.outcomes for finding in outcome.findings)


def compare(run_dir: Path, losses: list[dict[str, Any]], weights: dict[str, str]) -> list[str]:
    """The completed run against the undisturbed one: every line of metrics.jsonl, every bit of the last checkpoint."""
    found = []
    if difference := evidence.first_difference(evidence.results(run_dir), losses, whole=True):
        found.append(f"mismatches: {difference}")
    if evidence.tensors_of(run_dir / "checkpoints" / f"step_{STEPS:08d}") != weights:
        found.append("mismatches: the weights or moments of the last step differ")
    left = evidence.unfinished(run_dir).values()
    return found + [f"leaked folders: checkpoints/{name}, after the run has completed" for name in left]


def write_record(path: Path, chaos: Chaos, command: list[str], started: str) -> None:
    record = {
        "command": " ".join(["python -m tests.chaos", *command]),
        **describe_checkout(REPO_ROOT),
        "started": started,
        "ended": utc_now(),
        "packages": package_versions(),
        "cores": len(os.sched_getaffinity(0)),
        "faults": chaos.faults,
        "findings": {kind: chaos.counts()[kind] for kind in KINDS},
        "runs": len({outcome.life for outcome in chaos.outcomes}),
        "attempts": [asdict(outcome) for outcome in chaos.outcomes],
    }
    text = json.dumps(record, indent=1).replace(str(chaos.folder), "FOLDER").replace(str(path), path.name)
    path.write_text(text + "\n", encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0, help="no fault after this time; the run still completes")
    parser.add_argument("--faults", type=int, default=10**9, help="stop after so many")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--variants", type=int, default=len(VARIANTS), help="of the run: the first so many")
    parser.add_argument("--folder", type=Path, help="of the runs; default: a temporary one, kept if anything fails")
    parser.add_argument("--out", type=Path, help="write all that happened as JSON")
    command = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(command)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))
    folder = args.folder or Path(tempfile.mkdtemp(prefix="moelab_chaos_"))
    chaos, started, deadline = (
        Chaos(folder.resolve(), args.seed, args.variants),
        utc_now(),
        time.time() + 60 * args.minutes,
    )
    life = 0
    while life == 0 or (time.time() < deadline and chaos.faults < args.faults):
        life += 1
        chaos.live(life, deadline, args.faults)
    counts = chaos.counts()
    if args.out is not None:
        write_record(args.out, chaos, command, started)
    if counts:
        print(f"kept: {folder}")
    elif args.folder is None:
        evidence.remove(folder)
    print(", ".join([f"{chaos.faults} faults", *(f"{counts[kind]} {kind}" for kind in KINDS)]))
    return 1 if counts else 0


if __name__ == "__main__":
    sys.exit(main())
