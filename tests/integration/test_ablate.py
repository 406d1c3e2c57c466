"""The queue of a suite as a program: killed at any moment, started again, refused, retried. Runs are fake_launch.py."""

import contextlib
import csv
import json
import os
import pty
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from launch.experiment import TOKEN, Experiment, processes_with_token
from launch.results import read_lines
from launched import PATIENCE, TINY, environment

FAKE_LAUNCH = Path(__file__).parent / "fake_launch.py"
ABLATE_FAKE = (
    "import sys, launch.ablate, launch.run_queue; launch.run_queue.POLL_SECONDS = 0.05; "
    "sys.exit(launch.ablate.main(sys.argv[2:], launcher=[sys.executable, sys.argv[1]], reporter=['true']))"
)
LEGS = {
    "base": {"question": "The baseline"},
    "cap_1": {"question": "No slots to spare?", "patch": {"run": {"model": {"moe": {"capacity_factor": 1.0}}}}},
}


def write_suite(folder: Path, **changed: Any) -> Path:
    suite = {
        "question": "Does the queue keep its promises?",
        "base": str(TINY),
        "patch": {"run": {"train": {"num_steps": 20}}},
        "baseline": "base",
        "repeats": 1,
        "legs": LEGS,
        "gates": [{"metric": "tail50_tok_per_sec", "at_least": "1.03x baseline"}],
    }
    path = folder / "suite.json"
    path.write_text(json.dumps({**suite, **changed}))
    return path


class Ablation:
    """launch.ablate over a suite in a folder, with fake runs."""

    def __init__(self, folder: Path, fake: dict[str, Any] | None = None, **suite: Any) -> None:
        self.suite, self.exp_dir = write_suite(folder, **suite), folder / "exp"
        self.variables = {"FAKE_LEGS": json.dumps(fake or {}), "FAKE_SECONDS": "0.02"}

    def start(self, command: str, *arguments: str) -> "subprocess.Popen[str]":
        line = [sys.executable, "-c", ABLATE_FAKE, str(FAKE_LAUNCH), command, str(self.suite)]
        return subprocess.Popen(
            [*line, "--exp_dir", str(self.exp_dir), *arguments],
            env=environment(**self.variables),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def start_slowly(self, command: str, *arguments: str) -> "subprocess.Popen[str]":
        """With runs of some seconds, so that the next queue finds the first of them at work."""
        quick, self.variables["FAKE_SECONDS"] = self.variables["FAKE_SECONDS"], "0.15"
        try:
            return self.start(command, *arguments)
        finally:
            self.variables["FAKE_SECONDS"] = quick

    def __call__(self, command: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
        process = self.start(command, *arguments)
        out, err = process.communicate(timeout=PATIENCE)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    @property
    def experiment(self) -> Experiment:
        return Experiment(self.exp_dir)

    def statuses(self) -> dict[str, str]:
        return {state.run.name: state.status for state in self.experiment.states()}

    def events(self, name: str) -> list[dict[str, Any]]:
        return [event for event in self.experiment.events() if event["event"] == name]

    def alive(self) -> list[str]:
        return [folder for folder, _ in processes_with_token() if folder.startswith(str(self.exp_dir))]

    def kill_runs(self) -> None:
        """SIGKILL to every run, until none is left: a process lives on for a moment after it."""
        deadline = time.monotonic() + PATIENCE
        while left := [process for folder, process in processes_with_token() if folder in self.alive()]:
            assert time.monotonic() < deadline, left
            for process in left:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            time.sleep(0.01)

    def await_step(self, step: int) -> Path:
        """Wait until some run has logged a step; its folder."""
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            for path in self.exp_dir.glob("legs/*/*/metrics.jsonl"):
                lines = read_lines(path)
                if lines and lines[-1]["step"] >= step and str(path.parent) in self.alive():
                    return path.parent
            time.sleep(0.05)
        raise AssertionError(f"no run reached step {step}")


def steps_of(folder: Path) -> list[int]:
    return [line["step"] for line in read_lines(folder / "metrics.jsonl")]


def test_every_run_completes_once_in_interleaved_order_and_a_second_call_starts_nothing(tmp_path: Path) -> None:
    ablation = Ablation(tmp_path, repeats=2)
    done = ablation("run")
    assert done.returncode == 0, done.stderr
    started = [event["run"] for event in ablation.events("run_started")]
    assert started == ["base/repeat1", "cap_1/repeat1", "cap_1/repeat2", "base/repeat2"]
    assert set(ablation.statuses().values()) == {"completed"}
    assert ablation("run").returncode == 0
    assert [event["run"] for event in ablation.events("run_started")] == started
    assert all("time" in event for event in ablation.experiment.events())


def test_queues_and_runs_killed_at_random_moments_lose_nothing_and_run_nothing_twice(tmp_path: Path) -> None:
    ablation = Ablation(tmp_path, repeats=2)
    ablation.variables["FAKE_SECONDS"] = "0.1"
    draws = random.Random(int(os.environ.get("CHAOS_SEED", "3")))
    kills = 0
    while (queue := ablation.start("run")) and kills < int(os.environ.get("CHAOS_KILLS", "7")):
        time.sleep(draws.uniform(0.8, 3.0))
        if queue.poll() is not None:
            break
        running = [process for folder, process in processes_with_token() if folder in ablation.alive()]
        if running and draws.random() < 0.5:
            draws.choice(running).kill()  # a run, behind the queue's back
        if draws.random() < 0.7:
            queue.kill()
        else:
            queue.send_signal(draws.choice([signal.SIGINT, signal.SIGTERM]))
        queue.communicate()
        kills += 1
    queue.communicate()
    for _ in range(5):  # a run that was killed waits for the next queue
        if ablation("run").returncode == 0:
            break
    assert set(ablation.statuses().values()) == {"completed"}, ablation.experiment.events()
    assert ablation.alive() == []
    for run in ablation.experiment.runs:
        folders = [path.parent for path in ablation.exp_dir.glob(f"legs/{run.leg}/repeat{run.repeat}_*/summary.json")]
        completed = [
            each for each in folders if json.loads((each / "summary.json").read_text())["status"] == "completed"
        ]
        assert len(completed) == 1
        assert steps_of(completed[0]) == list(range(1, 21))
    ends = [event["run"] for event in ablation.events("run_ended") if event["status"] == "completed"]
    assert len(ends) == len(set(ends))


def test_an_interrupted_run_continues_from_its_checkpoint_in_the_same_folder(tmp_path: Path) -> None:
    ablation = Ablation(tmp_path)
    queue = ablation.start("run")
    folder = ablation.await_step(6)
    queue.send_signal(signal.SIGTERM)
    assert queue.wait(timeout=PATIENCE) == 3
    assert ablation.statuses()["base/repeat1"] == "stopped"
    assert ablation("run").returncode == 0
    env = json.loads((folder / "env.json").read_text())
    assert len(env["attempts"]) == 1
    assert steps_of(folder) == list(range(1, 21))
    assert not (folder.parent / "repeat1_attempt2").exists()


def test_a_terminal_that_is_closed_asks_to_stop_and_every_run_is_seen_to_its_end(tmp_path: Path) -> None:
    gates = [{"metric": "train/loss", "no_worse_than": "baseline + 2 sigma"}]
    ablation = Ablation(tmp_path, measure="quality", slots=2, gates=gates)
    ablation.variables["FAKE_SECONDS"] = "0.1"
    terminal, end_of_queue = pty.openpty()
    line = [sys.executable, "-c", ABLATE_FAKE, str(FAKE_LAUNCH), "run", str(ablation.suite)]
    queue = subprocess.Popen(
        [*line, "--exp_dir", str(ablation.exp_dir)],
        env=environment(**ablation.variables),
        stdin=end_of_queue,
        stdout=end_of_queue,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    os.close(end_of_queue)
    ablation.await_step(2)
    os.close(terminal)
    queue.send_signal(signal.SIGHUP)
    assert (queue.communicate(timeout=PATIENCE)[1], queue.returncode) == ("", 3)
    assert {event["run"] for event in ablation.events("run_ended")} == {"base/repeat1", "cap_1/repeat1"}
    assert set(ablation.statuses().values()) == {"stopped"}
    assert len(ablation.events("queue_ended")) == 1


def test_ctrl_c_does_not_reach_the_report(tmp_path: Path) -> None:
    ablation = Ablation(tmp_path)
    (ablation.exp_dir.parent / "reporter.py").write_text("import time; time.sleep(2); open('made', 'w')")
    program = ABLATE_FAKE.replace("['true']", f"[sys.executable, '{tmp_path / 'reporter.py'}']")
    queue = subprocess.Popen(
        [sys.executable, "-c", program, FAKE_LAUNCH, "run", ablation.suite, "--exp_dir", ablation.exp_dir],
        env=environment(**ablation.variables),
        cwd=tmp_path,
        start_new_session=True,
    )
    while not (ablation.exp_dir / "report.log").exists():
        time.sleep(0.05)
    os.killpg(queue.pid, signal.SIGINT)
    assert queue.wait(timeout=PATIENCE) == 3
    assert (tmp_path / "made").exists()


def test_a_run_killed_before_its_first_checkpoint_begins_again_in_a_fresh_folder(tmp_path: Path) -> None:
    ablation = Ablation(tmp_path, {"base": {"saves": False}})
    queue = ablation.start("run")
    folder = ablation.await_step(4)
    queue.kill()
    queue.communicate()
    ablation.kill_runs()
    assert ablation.statuses()["base/repeat1"] == "interrupted"
    assert ablation("run").returncode == 0
    assert folder.is_dir()
    assert steps_of(folder.parent / "repeat1_attempt2") == list(range(1, 21))


def test_a_run_that_outlives_its_queue_is_watched_on(tmp_path: Path) -> None:
    ablation = Ablation(tmp_path)
    queue = ablation.start_slowly("run")
    folder = ablation.await_step(2)
    queue.kill()
    queue.communicate()
    assert ablation.alive() == [str(folder)]
    assert ablation("run").returncode == 0
    assert ablation.events("run_adopted")[0]["folder"] == str(folder)
    assert json.loads((folder / "env.json").read_text())["attempts"] == []  # it was not started again
    assert steps_of(folder) == list(range(1, 21))


def test_a_run_that_outlives_its_queue_is_found_by_another_name_of_the_folder(tmp_path: Path) -> None:
    ablation = Ablation(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path)
    queue = ablation.start_slowly("run", "--exp_dir", str(tmp_path / "link" / "exp"))
    folder = ablation.await_step(6)
    queue.kill()
    queue.communicate()
    assert ablation.statuses()["base/repeat1"] == "running"
    assert ablation("run", "--exp_dir", str(tmp_path / "link" / ".." / tmp_path.name / "exp")).returncode == 0
    assert ablation.events("run_adopted")[0]["folder"] == str(folder)
    assert not (folder.parent / "repeat1_attempt2.txt").exists()


def test_statuses_stay_when_the_folder_moves_and_a_run_whose_folder_is_gone_is_not_completed(tmp_path: Path) -> None:
    legs = {**LEGS, "refuse": {"question": "?", "patch": {"run": {"train": {"warmup_steps": 3}}}}}
    ablation = Ablation(tmp_path, {"refuse": {"end": "refuse"}}, legs=legs)
    assert ablation("run").returncode == 4
    shutil.rmtree(ablation.exp_dir / "legs" / "cap_1" / "repeat1_attempt1")
    ablation.exp_dir.rename(tmp_path / "moved")
    ablation.exp_dir = tmp_path / "moved"
    assert ablation.statuses() == {
        "base/repeat1": "completed",
        "cap_1/repeat1": "interrupted",
        "refuse/repeat1": "refused",
    }
    assert ablation("run", "--legs", "base,cap_1").returncode == 0


def test_a_second_queue_is_refused_while_the_first_works_and_status_sees_the_first(tmp_path: Path) -> None:
    ablation = Ablation(tmp_path)
    ablation.variables["FAKE_SECONDS"] = "0.5"
    queue = ablation.start("run")
    ablation.await_step(1)
    second = ablation("run")
    assert second.returncode == 2
    assert f"another queue works on it (process {queue.pid} on " in second.stderr
    seen = ablation("status")
    assert (seen.returncode, "a queue works on it" in seen.stdout, "running" in seen.stdout) == (0, True, True)
    queue.send_signal(signal.SIGINT)
    assert queue.wait(timeout=PATIENCE) == 3
    assert "no queue works on it" in ablation("status").stdout


def test_statuses_are_told_apart_and_only_what_failed_is_retried_on_request(tmp_path: Path) -> None:
    names = ("crash", "nan", "die", "refuse")
    legs = {"base": LEGS["base"]} | {
        name: {"question": "?", "patch": {"run": {"train": {"warmup_steps": 3 + i}}}} for i, name in enumerate(names)
    }
    ablation = Ablation(tmp_path, {name: {"end": name} for name in names}, legs=legs)
    assert ablation("run").returncode == 4
    assert ablation.statuses() == {
        "base/repeat1": "completed",
        "crash/repeat1": "failed",
        "nan/repeat1": "nan",
        "die/repeat1": "interrupted",
        "refuse/repeat1": "refused",
    }
    assert any(
        event.get("reason", "").startswith("ConfigError: run.data.train") for event in ablation.events("run_ended")
    )
    before = len(ablation.events("run_started"))
    assert ablation("run").returncode == 4
    assert [event["run"] for event in ablation.events("run_started")][before:] == ["die/repeat1"]

    ablation.variables["FAKE_LEGS"] = "{}"  # whatever was wrong is mended
    done = ablation("run", "--retry", "failed", "--legs", "crash,nan")
    assert done.returncode == 0, done.stdout
    assert [ablation.statuses()[f"{name}/repeat1"] for name in ("crash", "nan", "refuse")] == [
        "completed",
        "completed",
        "refused",
    ]


def test_a_run_stopped_or_killed_before_it_began_is_continued_and_one_that_failed_is_not(tmp_path: Path) -> None:
    ends = {"stopped": (241, 1), "killed": (247, 0), "orphaned": (0, 0), "failed": (1, 0)}
    legs = {"base": LEGS["base"]} | {
        name: {"question": "?", "patch": {"run": {"train": {"warmup_steps": 3 + i}}}} for i, name in enumerate(ends)
    }
    ablation = Ablation(tmp_path, {name: {"never_begins": end} for name, end in ends.items()}, legs=legs)
    assert ablation("run").returncode == 4
    assert [ablation.statuses()[f"{name}/repeat1"] for name in ends] == [*["interrupted"] * 3, "failed"]

    ablation.variables["FAKE_LEGS"] = "{}"
    assert ablation("run").returncode == 4
    assert [ablation.statuses()[f"{name}/repeat1"] for name in ends] == [*["completed"] * 3, "failed"]


def test_a_damaged_summary_is_as_good_as_none_and_hurts_no_other_run(tmp_path: Path) -> None:
    ablation = Ablation(tmp_path)
    assert ablation("run").returncode == 0
    (ablation.exp_dir / "legs/base/repeat1_attempt1/summary.json").write_text('{"status": "comp')
    assert ablation("status").returncode == 0
    assert ablation.statuses() == {"base/repeat1": "interrupted", "cap_1/repeat1": "completed"}
    assert ablation("run").returncode == 0
    assert steps_of(ablation.exp_dir / "legs/base/repeat1_attempt2") == list(range(1, 21))


def test_a_checkpoint_that_is_refused_is_left_alone_and_the_run_begins_afresh(tmp_path: Path) -> None:
    ablation = Ablation(tmp_path, {"base": {"end": "refuse to continue"}})
    queue = ablation.start("run", "--legs", "base")
    folder = ablation.await_step(6)
    queue.send_signal(signal.SIGTERM)
    queue.communicate()
    assert ablation("run", "--legs", "base").returncode == 0
    assert (folder / "checkpoints" / "latest").exists()
    assert steps_of(folder.parent / "repeat1_attempt2") == list(range(1, 21))


def test_a_run_whose_data_are_away_keeps_its_steps_until_they_are_back(tmp_path: Path) -> None:
    ablation = Ablation(tmp_path)
    queue = ablation.start("run", "--legs", "base")
    folder = ablation.await_step(6)
    queue.send_signal(signal.SIGTERM)
    queue.communicate()
    ablation.variables["FAKE_LEGS"] = json.dumps({"base": {"end": "refuse"}})
    assert ablation("run", "--legs", "base").returncode == 4
    assert ablation.statuses()["base/repeat1"] == "stopped"
    ablation.variables["FAKE_LEGS"] = "{}"
    assert ablation("run", "--legs", "base").returncode == 0
    assert steps_of(folder) == list(range(1, 21))
    assert not (folder.parent / "repeat1_attempt2.txt").exists()


def test_a_changed_suite_is_refused_with_what_changed_and_nothing_runs(tmp_path: Path) -> None:
    ablation = Ablation(tmp_path)
    assert ablation("run", "--legs", "base").returncode == 0
    gates = [{"metric": "tail50_tok_per_sec", "at_least": "1.01x baseline"}]
    write_suite(tmp_path, gates=gates)
    done = ablation("run")
    assert done.returncode == 2
    assert "was begun with another suite (gates changed; hash" in done.stderr
    assert len(ablation.events("run_started")) == 1


def test_a_folder_that_holds_something_else_is_refused(tmp_path: Path) -> None:
    ablation = Ablation(tmp_path)
    ablation.exp_dir.mkdir()
    (ablation.exp_dir / "thesis.tex").touch()
    done = ablation("run")
    assert (done.returncode, "is not empty and holds no experiment" in done.stderr) == (2, True)
    assert "holds no experiment (no suite.json)" in ablation("report").stderr
    assert sorted(path.name for path in ablation.exp_dir.iterdir()) == ["thesis.tex"]


def test_more_slots_than_there_is_room_for_are_refused_and_nothing_is_created(tmp_path: Path) -> None:
    gates = [{"metric": "val/loss", "no_worse_than": "baseline + 2 sigma"}]
    patch = {"run": {"train": {"num_steps": 20}, "data": {"train": "builtin", "val": "builtin"}}}
    ablation = Ablation(tmp_path, measure="quality", slots=999, gates=gates, patch=patch)
    done = ablation("run")
    assert (done.returncode, "slots=999, but this machine has" in done.stderr) == (2, True)
    assert not ablation.exp_dir.exists()


def test_of_queues_that_begin_at_once_one_writes_the_suite_and_runs_it(tmp_path: Path) -> None:
    ablation = Ablation(tmp_path)
    ablation.exp_dir.mkdir()
    with ablation.experiment.owned():  # the other has not written suite.json yet
        done = ablation("run")
    assert (done.returncode, "another queue works on it" in done.stderr) == (2, True)
    assert not (ablation.exp_dir / "suite.json").exists()


def test_a_queue_killed_while_it_wrote_the_suite_can_begin_again(tmp_path: Path) -> None:
    ablation = Ablation(tmp_path)
    ablation.exp_dir.mkdir()
    (ablation.exp_dir / ".suite.json.4711.tmp").write_text('{"hash": "3')
    (ablation.exp_dir / ".queue.lock").touch()
    assert ablation("run", "--legs", "base").returncode == 0


def test_what_is_asked_of_another_suite_or_an_unknown_leg_is_refused(tmp_path: Path) -> None:
    ablation = Ablation(tmp_path)
    assert ablation("run", "--legs", "base").returncode == 0
    done = ablation("status", "--legs", "base,nope")
    assert (done.returncode, "--legs nope: no such leg in suite. Use some of base, cap_1." in done.stderr) == (2, True)
    ablation.suite = ablation.suite.rename(tmp_path / "other.json")
    for command in ("status", "report"):
        done = ablation(command)
        assert (done.returncode, "holds the experiment of suite, not of other." in done.stderr) == (2, True)


def test_quality_runs_go_side_by_side_each_with_its_share_of_the_cores(tmp_path: Path) -> None:
    gates = [{"metric": "val/loss", "no_worse_than": "baseline + 2 sigma"}]
    patch = {"run": {"train": {"num_steps": 20}, "data": {"train": "builtin", "val": "builtin"}}}
    ablation = Ablation(tmp_path, measure="quality", slots=2, gates=gates, patch=patch)
    queue = ablation.start("run")
    ablation.await_step(1)
    most = 0
    while queue.poll() is None:
        shares = set()
        for folder, process in processes_with_token():
            with contextlib.suppress(psutil.Error):  # it may end between the two looks
                if folder in ablation.alive():
                    shares.add(process.environ().get("OMP_NUM_THREADS"))
        most = max(most, len(set(ablation.alive())))
        assert shares <= {"1"}
        time.sleep(0.05)
    assert most == 2
    assert queue.returncode == 0
    config = json.loads(next(ablation.exp_dir.glob("legs/base/*/config.json")).read_text())
    assert config["run"]["launch"]["num_gpus"] == 1


@pytest.mark.parametrize("keep", [True, False])
def test_checkpoints_of_completed_runs_are_removed_only_if_the_suite_says_so(tmp_path: Path, keep: bool) -> None:
    ablation = Ablation(tmp_path, {"cap_1": {"end": "crash"}}, keep_checkpoints=keep)
    assert ablation("run").returncode == 4
    assert (ablation.exp_dir / "legs/base/repeat1_attempt1/checkpoints/latest").exists() is keep
    assert (ablation.exp_dir / "legs/cap_1/repeat1_attempt1/checkpoints/latest").exists()  # to be continued from


def test_throughput_runs_are_alone_on_the_machine(tmp_path: Path) -> None:
    ablation = Ablation(tmp_path)
    queue = ablation.start("run")
    most = 0
    while queue.poll() is None:
        most = max(most, len(set(ablation.alive())))
        time.sleep(0.05)
    assert (most, queue.returncode) == (1, 0)


def test_half_a_line_in_the_record_of_the_queue_is_cut_off_and_nothing_else(tmp_path: Path) -> None:
    ablation = Ablation(tmp_path)
    assert ablation("run", "--legs", "base").returncode == 0
    before = ablation.experiment.events()
    with open(ablation.exp_dir / "queue.jsonl", "a") as file:
        file.write('{"time": "2026-')
    assert ablation("run").returncode == 0
    events = ablation.experiment.events()
    assert events[: len(before)] == before
    assert events[len(before)]["event"] == "queue_started"
    assert TOKEN not in os.environ


def read_csv(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("arguments", [("plan",), ("plan", "--legs", "cap_1")])
def test_plan_resolves_every_leg_and_starts_nothing(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    ablation = Ablation(tmp_path)
    done = ablation(*arguments)
    assert done.returncode == 0, done.stderr
    assert "run.model.moe.capacity_factor 1.25 -> 1.0" in done.stdout
    assert ("2 runs: 2 legs x 1 repeat," in done.stdout) == (len(arguments) == 1)
    assert not ablation.exp_dir.exists()
