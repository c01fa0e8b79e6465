# SPDX-License-Identifier: Apache-2.0
"""Files appear whole, under names that nobody else can have, and leave nothing behind."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import threading
import time

import pytest

from grcsf_kernels.common import atomic_files as files
from grcsf_kernels.common import locks
from grcsf_kernels.common.atomic_files import remove_leftovers, write_whole
from grcsf_kernels.engine import InputError


def text(content):
    return lambda temporary: temporary.write_text(content)


def leftovers(folder):
    return list(folder.glob(".*"))


@pytest.fixture
def process():
    """Starts functions in processes of their own, which are killed at the end."""
    context, started = multiprocessing.get_context("fork"), []

    def start(function, *arguments):
        ours, theirs = context.Pipe()
        started.append(context.Process(target=function, args=(theirs, *arguments), daemon=True))
        started[-1].start()
        assert ours.recv() == "ready"
        return started[-1]

    yield start
    for one in started:
        one.kill()
        one.join()


def write_half(ready, path):
    def half(temporary):
        temporary.write_text("half")
        ready.send("ready")
        time.sleep(60)

    write_whole(path, half)


def run_in(ready, folder):
    with locks.only_run_in(folder):
        ready.send("ready")
        time.sleep(60)


@pytest.mark.parametrize("name", ["a.nii.gz", "m.safetensors", "n" * 248 + ".nii.gz", "plain"])
def test_any_name_that_fits_the_system_can_be_written(tmp_path, name):
    """The temporary name does not grow with it, and has the suffixes by which writers choose."""
    seen = []
    path = write_whole(tmp_path / "new" / name, lambda t: seen.append(t) or t.write_text("x"))
    assert path.read_text() == "x" and leftovers(path.parent) == []
    assert seen[0].name.endswith("".join(seen[0].suffixes)) and name.endswith(seen[0].suffix)
    assert seen[0].suffixes[-2:] == path.suffixes[-2:]


def test_a_name_that_is_too_long_is_an_error_before_anything_is_computed(tmp_path):
    with pytest.raises(OSError, match="File name too long") as error:
        write_whole(tmp_path / ("n" * 256), lambda t: pytest.fail("it was computed"))
    assert error.value.errno == errno.ENAMETOOLONG
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError):
        write_whole(tmp_path / "folder", lambda t: pytest.fail("it was computed"))


def test_nothing_is_written_through_a_link(tmp_path):
    """Of a guessed temporary name, or of the file's own name: the link is replaced."""
    victim = tmp_path / "victim"
    victim.write_text("mine")
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / f".{os.getpid()}.tmp.a.txt").symlink_to(victim)
    (folder / "a.txt").symlink_to(victim)
    write_whole(folder / "a.txt", text("new"))
    assert victim.read_text() == "mine"
    assert (folder / "a.txt").read_text() == "new" and not (folder / "a.txt").is_symlink()


def test_two_processes_of_one_number_do_not_meet(tmp_path, monkeypatch):
    """Containers number their processes alike: here two threads stand for them."""
    monkeypatch.setattr(os, "getpid", lambda: 1)
    path, both = tmp_path / "a.txt", threading.Barrier(2)

    def write(content):
        def half(temporary):
            temporary.write_text(content)
            both.wait(10)
            assert temporary.read_text() == content
            both.wait(10)

        write_whole(path, half)

    problems = []

    def run(content):
        try:
            write(content)
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=run, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == [] and path.read_text() in "ab" and leftovers(tmp_path) == []


def test_the_umask_is_honored_and_never_changed(tmp_path, monkeypatch):
    before = os.umask(0o027)
    try:
        monkeypatch.setattr(os, "umask", lambda mask: pytest.fail("the umask was changed"))
        path = write_whole(tmp_path / "a.txt", text("x"))

        def private(temporary):
            temporary.write_text("x")
            temporary.chmod(0o600)

        other = write_whole(tmp_path / "b.txt", private)
    finally:
        monkeypatch.undo()
        os.umask(before)
    assert path.stat().st_mode & 0o777 == other.stat().st_mode & 0o777 == 0o640


def test_what_a_killed_process_left_is_removed_and_what_lives_is_kept(tmp_path, process):
    killed = process(write_half, tmp_path / "a.txt")
    process(write_half, tmp_path / "b.txt")
    killed.kill()
    killed.join()
    assert killed.exitcode == -signal.SIGKILL and len(leftovers(tmp_path)) == 2
    write_whole(tmp_path / "c.txt", text("x"))
    (left,) = leftovers(tmp_path)
    assert (left / "new.txt").read_text() == "half"


def test_what_another_machine_writes_is_kept_for_a_day(tmp_path, monkeypatch):
    """Its lock may not be seen from here."""
    place = tmp_path / ".grcsf-abc.tmp"
    place.mkdir()
    (place / "lock").write_text("another")
    remove_leftovers(tmp_path)
    assert place.is_dir()
    now = time.time()
    monkeypatch.setattr(files.time, "time", lambda: now + 25 * 3600)
    remove_leftovers(tmp_path)
    assert not place.exists()


@pytest.mark.parametrize("kind", ["full", "killed"])
def test_the_former_file_is_kept(tmp_path, kind):
    path = write_whole(tmp_path / "a.txt", text("former"))
    error = OSError(errno.ENOSPC, "No space left on device") if kind == "full" else SystemExit()

    def fail(temporary):
        temporary.write_text("half")
        raise error

    with pytest.raises(type(error)):
        write_whole(path, fail)
    assert path.read_text() == "former" and leftovers(tmp_path) == []


def test_an_error_names_the_file_and_not_the_temporary_one(tmp_path):
    with pytest.raises(OSError) as error:
        write_whole(tmp_path / "a.txt", lambda temporary: temporary.read_text())
    assert error.value.filename == str(tmp_path / "a.txt")


def test_a_folder_has_one_run_at_a_time_and_a_kill_frees_it(tmp_path, process):
    other = process(run_in, tmp_path / "run")
    message = rf"run: another run writes there \(process {other.pid} on .*, since 2"
    with pytest.raises(InputError, match=message), locks.only_run_in(tmp_path / "run"):
        pytest.fail("two runs")
    other.kill()
    other.join()
    with locks.only_run_in(tmp_path / "run"):
        # A forked process, such as a worker that outlives a killed run for seconds, holds nothing.
        process(lambda ready: ready.send("ready") or time.sleep(60))
    with locks.only_run_in(tmp_path / "run"):
        pass
    assert leftovers(tmp_path / "run") == []
