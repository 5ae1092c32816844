"""Signals end a command at once, whatever it is doing, with one sentence and nothing left; what is held off waits."""

from __future__ import annotations

import signal
import subprocess
import time
from pathlib import Path

import pytest
from helpers.killed import signalled

NOTHING = "nothing unfinished is left behind"
# A command whose every exception is lost, as in destructors and in code of others.
WORKING = """
command_begins()
owned = Owned(Path(sys.argv[1]))
owned.__enter__()
owned.inside.mkdir()
for number in range(500):
    (owned.inside / str(number)).write_bytes(b"1")
print("ready", flush=True)
while True:
    try:
        time.sleep(60)
    except BaseException:
        pass
"""


def sender(*numbers: signal.Signals, gap: float = 0.0):
    def send(child: subprocess.Popen) -> None:
        for number in numbers:
            child.send_signal(number)
            time.sleep(gap)

    return send


@pytest.mark.parametrize(
    ("number", "said"),
    [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "ended by SIGTERM"), (signal.SIGHUP, "ended by SIGHUP")],
)
def test_a_signal_ends_a_command_that_loses_exceptions(tmp_path: Path, number: signal.Signals, said: str) -> None:
    ended = signalled(WORKING, tmp_path, sender(number))
    assert (ended.code, ended.err) == (128 + number, f"error {said}; {NOTHING}.\n")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("gap", [0.001, 0.01])
def test_a_second_signal_does_not_cut_off_cleaning_up(tmp_path: Path, gap: float) -> None:
    ended = signalled(WORKING, tmp_path, sender(signal.SIGINT, signal.SIGINT, signal.SIGINT, gap=gap))
    assert (ended.code, ended.err) == (130, f"error interrupted; {NOTHING}.\n")
    assert list(tmp_path.iterdir()) == []


def test_what_is_ignored_stays_ignored(tmp_path: Path) -> None:
    """As under nohup, and in the background of a shell."""
    quiet = (signal.SIGHUP, signal.SIGINT)
    ended = signalled(WORKING, tmp_path, sender(*quiet, signal.SIGTERM, gap=0.05), ignored=quiet)
    assert ended.code == 143 and "SIGTERM" in ended.err


def test_a_signal_waits_for_what_is_held(tmp_path: Path) -> None:
    script = """
command_begins()
with held():
    print("ready", flush=True)
    time.sleep(0.3)
    Path(sys.argv[1], "whole").touch()
Path(sys.argv[1], "more").touch()
"""
    ended = signalled(script, tmp_path, sender(signal.SIGTERM))
    assert ended.code == 143 and [path.name for path in tmp_path.iterdir()] == ["whole"]


def test_what_is_published_is_told_at_the_end(tmp_path: Path) -> None:
    script = 'command_begins(); has_published(Path("a\\nb")); print("ready", flush=True); time.sleep(60)'
    ended = signalled(script, tmp_path, sender(signal.SIGINT))
    assert (ended.code, ended.err) == (130, "error interrupted; a\\nb had been written before, complete.\n")


def test_a_signal_after_the_end_changes_nothing(tmp_path: Path) -> None:
    script = """
command_begins()
Owned(Path(sys.argv[1])).last()
command_ends(3)
print("ready", flush=True)
time.sleep(60)
"""
    ended = signalled(script, tmp_path, sender(signal.SIGINT))
    assert (ended.code, ended.err) == (3, "") and list(tmp_path.iterdir()) == []


def test_a_worker_that_is_ended_leaves_its_parents_files_alone(tmp_path: Path) -> None:
    script = """
command_begins()
with Owned(Path(sys.argv[1])) as owned:
    owned.inside.mkdir()
    began, begin = os.pipe()
    if not (child := os.fork()):
        os.write(begin, b"1")  # a signal that came before would be lost in the fork
        time.sleep(60)
        os._exit(1)
    os.read(began, 1)
    os.kill(child, signal.SIGTERM)
    _, status = os.waitpid(child, 0)
    print("ready", os.waitstatus_to_exitcode(status) == -signal.SIGTERM and owned.inside.is_dir(), sep="\\n")
"""
    ended = signalled(script, tmp_path, sender())
    assert (ended.code, ended.out, ended.err) == (0, "True\n", "")


def test_children_die_with_a_command(tmp_path: Path) -> None:
    """One that would hear nothing else: it holds standard output open, for whose end this test waits."""
    script = """
import subprocess
command_begins()
deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('ready', flush=True); time.sleep(600)"
subprocess.run([sys.executable, "-c", deaf])
"""
    assert signalled(script, tmp_path, sender(signal.SIGTERM)).code == 143


def test_from_python_signals_are_exceptions_as_ever(tmp_path: Path) -> None:
    script = """
with caught(), Owned(Path(sys.argv[1])):
    try:
        print("ready", flush=True)
        time.sleep(60)
    except KeyboardInterrupt:
        print("interrupt")
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)
"""
    ended = signalled(script, tmp_path, sender(signal.SIGINT))
    assert (ended.code, ended.out) == (143, "interrupt\n") and list(tmp_path.iterdir()) == []
