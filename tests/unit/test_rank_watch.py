"""The watch over a rank, with ranks that are processes without torch; test_stopping.py has the real ones."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from launch.ancestors import launcher_name, launchers_above
from launch.rank_watch import Peer, RankWatch
from launch.run_config import REPO_ROOT

WATCHED_RANK = Path(__file__).parent / "watched_rank.py"
SHORT = (  # as the module has them, but for waiting
    "import sys, runpy; import launch.rank_watch as watch; "
    "watch.TICK_SECONDS, watch.REPEAT_SECONDS = 0.1, 0.5; "
    "watch.BOUNDARY_SECONDS = watch.PEER_SECONDS = watch.SAVE_SECONDS = watch.NOTES_SECONDS = 0.5; "
    "watch.FINISH_SECONDS = 1; "
    "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
)


class Rank:
    def __init__(self, command: list[str]) -> None:
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "PYTHONPATH": str(REPO_ROOT)},
        )
        self.patience = threading.Timer(30, self.process.kill)  # a test that waits for it fails then
        self.patience.start()

    def await_line(self, line: str) -> None:
        assert self.process.stdout is not None
        while (said := self.process.stdout.readline()).strip() != line:
            assert said, f"ended without saying {line!r}"

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def code(self) -> int:
        return self.process.wait()


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    for name in ("run", "meeting"):
        (tmp_path / name).mkdir()
    return tmp_path / "run"


Start = Callable[..., list[Rank]]


@pytest.fixture
def start(run_dir: Path) -> Iterator[Start]:
    """start("meet saved wait", "meet wait", hang=1): two ranks, and what each does in turn (words_apart: "a_b")."""
    ranks: list[Rank] = []

    def start_ranks(*scripts: str, hang: float = 0) -> list[Rank]:
        for rank, script in enumerate(scripts):
            commands = [command.replace("_", " ") for command in script.split()]
            place = [str(WATCHED_RANK), str(rank), str(len(scripts)), str(run_dir), str(hang)]
            ranks.append(Rank([sys.executable, "-c", SHORT, *place, *commands]))
        return ranks

    yield start_ranks
    for rank in ranks:
        rank.patience.cancel()
        rank.process.kill()
        rank.process.wait()


def summary(run_dir: Path) -> tuple[str, str]:
    content = json.loads((run_dir / "summary.json").read_text())
    return content["status"], content.get("reason", "")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
def test_what_one_rank_hears_all_ranks_know(start: Start, number: signal.Signals) -> None:
    first, second = start("meet ready boundary", "meet ready boundary wait")
    second.await_line("reached ready")
    second.send(number)
    first.await_line(f"agreed: {number.name} to rank 1")
    second.await_line("waiting")


def test_a_stop_while_nothing_is_lost_ends_a_run_whose_ranks_are_far_from_a_boundary(
    start: Start, run_dir: Path
) -> None:
    first, second = start("meet saved forward compute", "meet forward wait")
    first.await_line("computing")
    second.await_line("waiting")
    second.send(signal.SIGTERM)
    assert (first.code(), second.code()) == (3, 3)
    assert summary(run_dir) == ("stopped", "SIGTERM to rank 1, in 'forward', with nothing new to save")


def test_after_an_update_has_begun_the_watch_waits_for_the_boundary(start: Start, run_dir: Path) -> None:
    first, _ = start("meet saved update wait", "meet saved wait")
    first.await_line("waiting")
    first.send(signal.SIGTERM)
    time.sleep(1.5)  # longer than it gives the main thread
    assert first.process.poll() is None
    assert summary(run_dir) == ("running", "")


def test_a_watch_that_fails_ends_the_run_rather_than_leave_it_deaf(start: Start) -> None:
    (first,) = start("meet watch_fails boundary wait")
    first.await_line("RuntimeError: the watch over this rank has failed: nobody would hear a stop")
    assert first.code() == 1


def test_a_line_of_requests_that_two_hosts_wrote_over_each_other_is_passed_over(start: Start, run_dir: Path) -> None:
    first, second = start("meet ready boundary", "meet ready boundary wait")
    first.await_line("reached ready")
    with open(run_dir / "requests.jsonl", "ab") as file:
        file.write(b'7\n{"att\n')
    second.await_line("reached ready")
    second.send(signal.SIGTERM)
    first.await_line("agreed: SIGTERM to rank 1")
    second.await_line("waiting")


def test_a_checkpoint_that_does_not_reach_the_disk_is_no_stop(start: Start, run_dir: Path) -> None:
    (first,) = start("meet never_saved wait")
    first.await_line("waiting")
    first.send(signal.SIGTERM)
    assert first.code() == 4
    assert summary(run_dir) == ("failed", "SIGTERM to rank 0, and the checkpoint was not on disk 0.5 s later")


def test_a_second_interrupt_ends_at_once_and_one_that_comes_twice_is_one(start: Start, run_dir: Path) -> None:
    first, second = start("meet update compute", "meet wait")
    first.await_line("computing")
    second.await_line("waiting")
    first.send(signal.SIGINT)
    time.sleep(0.1)
    first.send(signal.SIGINT)  # passed on by a launcher
    time.sleep(1)
    assert first.process.poll() is None
    first.send(signal.SIGINT)
    assert first.code() == 4
    assert second.code() == 4
    assert summary(run_dir) == ("failed", "killed by a second SIGINT")


def test_a_peers_end_is_no_request_and_is_found_out_where_the_main_thread_does_not(start: Start, run_dir: Path) -> None:
    first, second = start("meet saved backward wait", "meet wait")
    first.await_line("waiting")
    second.await_line("waiting")
    second.send(signal.SIGKILL)
    second.code()
    first.send(signal.SIGTERM)  # as launch.py does then
    assert first.code() == 4
    status, reason = summary(run_dir)
    assert status == "failed"
    assert re.fullmatch(r"rank 1 \(process \d+ on .*\) ended, and this rank did not notice in 'backward'", reason)


def test_where_rank_0_was_killed_the_first_that_is_left_says_so(start: Start, run_dir: Path) -> None:
    first, second, third = start("meet wait", "meet wait", "meet wait")
    for rank in (first, second, third):
        rank.await_line("waiting")
    running = {"status": "running", "started": "2026-01-01T00:00:00+00:00"}
    (run_dir / "summary.json").write_text(json.dumps(running))
    first.send(signal.SIGKILL)
    first.code()
    assert (second.code(), third.code()) == (4, 4)
    status, reason = summary(run_dir)
    assert status == "failed"
    assert re.fullmatch(r"rank 0 \(process \d+ on .*\) ended, and this rank did not notice in 'start'", reason)


def test_a_frozen_rank_0_is_a_hang_of_which_rank_1_tells(start: Start, run_dir: Path) -> None:
    first, second = start("meet forward wait", "meet forward wait", hang=1)
    first.await_line("waiting")
    second.await_line("waiting")
    running = {"status": "running", "started": "2026-01-01T00:00:00+00:00"}
    (run_dir / "summary.json").write_text(json.dumps(running))
    first.send(signal.SIGSTOP)
    assert second.code() == 4
    assert summary(run_dir) == ("hang", "no rank got on for 1 s; no word from rank 0; see rank*.stacks")


def test_what_launch_py_sends_after_a_peers_end_brings_no_rank_to_a_save(start: Start, run_dir: Path) -> None:
    first, second = start("meet ready boundary", "meet wait")
    first.await_line("reached ready")
    second.await_line("waiting")
    second.send(signal.SIGKILL)
    second.code()
    first.send(signal.SIGTERM)
    assert first.code() == 4, "it would have ended with 0 at a boundary"
    assert summary(run_dir)[0] == "failed"


def test_a_fault_that_a_rank_elsewhere_wrote_down_is_a_peers_end(start: Start, run_dir: Path) -> None:
    (run_dir / "rank5.err").write_text("of an earlier attempt")
    (first,) = start("meet ready wait")
    first.await_line("waiting")
    (run_dir / "rank7.err").write_text("Traceback")
    first.send(signal.SIGTERM)
    assert first.code() == 4
    assert summary(run_dir)[1] == "rank7 ended, and this rank did not notice in 'ready'"


def test_a_fault_of_an_earlier_attempt_is_no_end_of_a_peer(start: Start, run_dir: Path) -> None:
    (run_dir / "rank1.err").write_text("Traceback")
    first, _ = start("start_slowly meet saved wait", "meet wait")
    first.await_line("waiting")
    first.send(signal.SIGTERM)
    assert first.code() == 3
    assert summary(run_dir)[0] == "stopped"


@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_ranks_whose_launcher_is_gone_are_asked_to_stop(run_dir: Path, tmp_path: Path, launcher: str) -> None:
    (tmp_path / launcher).write_text("import subprocess, sys; subprocess.run(sys.argv[1:])")
    rank = [sys.executable, str(WATCHED_RANK), "0", "1", str(run_dir), "0", "meet", "ready", "boundary"]
    above = Rank([sys.executable, str(tmp_path / launcher), *rank])
    above.await_line("reached ready")
    above.send(signal.SIGKILL)
    above.await_line(f"agreed: its launcher is gone ({launcher})")
    above.patience.cancel()


@pytest.mark.parametrize("hung", [0, 1])
def test_a_hang_leaves_stacks_of_all_ranks_and_names_the_one_that_is_behind(
    start: Start, run_dir: Path, hung: int
) -> None:
    scripts = ["meet forward backward wait"] * 2
    scripts[hung] = "meet forward wait"
    ranks = start(*scripts, hang=1)
    assert [rank.code() for rank in ranks] == [4, 4]
    status, reason = summary(run_dir)
    assert status == "hang"
    assert reason == f"no rank got on for 1 s; furthest behind: rank {hung} (in 'forward'); see rank*.stacks"
    for rank in (0, 1):
        assert "watched_rank.py" in (run_dir / f"rank{rank}.stacks").read_text()


def test_a_rank_that_is_frozen_is_named_by_the_others(start: Start, run_dir: Path) -> None:
    first, second = start("meet forward wait", "meet forward wait", hang=1)
    first.await_line("waiting")
    second.await_line("waiting")
    second.send(signal.SIGSTOP)
    assert first.code() == 4
    assert summary(run_dir) == ("hang", "no rank got on for 1 s; no word from rank 1; see rank*.stacks")


def test_a_hang_ends_in_bounded_time_where_no_stack_can_be_written(start: Start, run_dir: Path) -> None:
    (run_dir / "rank0.stacks").mkdir()  # as good as a full disk
    (first,) = start("meet forward wait", hang=1)
    assert first.code() == 4
    assert summary(run_dir)[0] == "hang"
    assert first.process.stdout is not None
    assert "watched_rank.py" in first.process.stdout.read()


def test_a_watch_that_fails_while_it_ends_the_run_lets_nobody_wait_for_it(start: Start, run_dir: Path) -> None:
    (first,) = start("meet broken_save forward wait")
    first.await_line("waiting")
    first.send(signal.SIGTERM)
    assert first.code() == 4


def test_a_line_that_two_hosts_wrote_at_once_silences_nobody(start: Start, run_dir: Path) -> None:
    first, second = start("meet ready boundary", "meet ready boundary wait")
    first.await_line("reached ready")
    second.await_line("reached ready")
    with open(run_dir / "requests.jsonl", "ab") as file:
        file.write(b'{"attempt": \0\0\0p", "why"\n')
    time.sleep(0.5)
    second.send(signal.SIGTERM)
    first.await_line("agreed: SIGTERM to rank 1")


def test_a_process_of_another_container_is_not_looked_for_here(run_dir: Path) -> None:
    """Containers may share a host's name, and number their processes alike."""
    parent = psutil.Process(os.getppid())
    watch = RankWatch(0, run_dir)
    here = Peer(1, watch.me.host, parent.pid, parent.create_time() + 1)
    elsewhere = Peer(2, watch.me.host, parent.pid, parent.create_time() - 60)
    watch.meet(lambda me: [me, here, elsewhere], lambda *_: None, collectives_block=True)
    assert list(watch.neighbours) == [here]


def test_time_in_which_all_ranks_stood_still_is_no_hang(start: Start, run_dir: Path) -> None:
    (first,) = start("meet forward wait", hang=4)
    first.await_line("waiting")
    time.sleep(0.5)  # so that the watch knows of "forward"
    first.send(signal.SIGSTOP)
    time.sleep(5)
    first.send(signal.SIGCONT)
    time.sleep(1)
    assert first.process.poll() is None


def test_before_the_ranks_have_met_a_request_ends_them(start: Start, run_dir: Path) -> None:
    (first,) = start("forward wait")
    first.await_line("waiting")
    first.send(signal.SIGTERM)
    assert first.code() == 4
    assert not (run_dir / "requests.jsonl").exists()


def test_once_the_main_thread_writes_the_end_the_watch_leaves_it_alone(start: Start, run_dir: Path) -> None:
    (first,) = start("meet saved end")
    first.await_line("ended")
    first.send(signal.SIGTERM)
    assert first.code() == 0
    assert summary(run_dir) == ("completed", "done")


def test_a_fault_that_a_request_to_stop_brings_about_is_a_stop(start: Start, run_dir: Path) -> None:
    """launch.py and a terminal signal the compiler's processes too."""
    (first,) = start("meet saved forward await_request fault")
    first.await_line("reached forward")
    first.send(signal.SIGTERM)
    assert first.code() == 3
    assert summary(run_dir)[0] == "stopped"


def test_a_save_that_fails_after_a_request_to_stop_is_a_fault_all_the_same(start: Start, run_dir: Path) -> None:
    (first,) = start("meet failed_save await_request fault")
    first.await_line("reached failed save")
    first.send(signal.SIGTERM)
    assert first.code() == 4
    assert summary(run_dir) == ("failed", "a fault")


def test_a_request_of_an_earlier_attempt_is_none_of_this_one(start: Start, run_dir: Path) -> None:
    line = {"attempt": "host:1:2.0", "rank": 1, "what": "stop", "why": "long ago"}
    (run_dir / "requests.jsonl").write_text(json.dumps(line) + "\n")
    first, _ = start("meet ready boundary", "meet ready wait")
    first.await_line("reached ready")
    with open(run_dir / "requests.jsonl", "a") as file:
        file.write(json.dumps(line) + "\n")
    time.sleep(0.5)
    assert first.process.poll() is None


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("python -u -m deepspeed.launcher.launch --world_info=e30= train.py", "deepspeed.launcher.launch"),
        ("/venv/bin/python3.11 /venv/bin/deepspeed --num_gpus 2 train.py", "deepspeed"),
        ("python -W ignore -m launch.run ds_configs/demo.json", "launch.run"),
        ("/venv/bin/python /venv/bin/torchrun --nproc_per_node 2 train.py", "torchrun"),
        ("python -m launch.ablate run suite.json", None),
        ("python train.py --config launch.run", None),
        ("bash -c python -m launch.run x & sleep 9", None),
        ("", None),
    ],
)
def test_launchers_are_known_by_their_command_lines(line: str, name: str | None) -> None:
    assert launcher_name(line.split()) == name


def test_this_test_hangs_from_no_launcher() -> None:
    assert launchers_above(psutil.Process()) == {}
