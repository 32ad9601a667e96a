"""DeepSpeed's compiled operators: a folder for each environment, and no process that waits for a dead one.

Real compilations of torch's, by processes that can be killed. The compiler is a script that waits for a file first.
"""

import multiprocessing
import os
import shutil
import signal
import sys
import sysconfig
import time
from importlib import metadata
from pathlib import Path

import pytest
from torch.utils import cpp_extension, file_baton

from pipeline.errors import UserError
from pipeline.training import operators

LIMIT_S = 60
COMPILER = """#!/bin/sh
case "$*" in *" -c "*) echo compiles >>{log}; until [ -e {gate} ]; do sleep 0.05; done;; esac
exec {compiler} "$@"
"""


class Site:
    """A folder for operators, and the source of one."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.gate, self.log = folder, folder / "gate", folder / "compilations"
        self.lock = folder / "extensions" / "small" / "lock"
        self.processes: list[multiprocessing.Process] = []
        self.lock.parent.mkdir(parents=True)
        (folder / "small.cpp").write_text('extern "C" int answer() { return 42; }\n')
        compiler = folder / "compiler"
        compiler.write_text(COMPILER.format(log=self.log, gate=self.gate, compiler=shutil.which("c++")))
        compiler.chmod(0o755)

    def start(self, name: str, target=None) -> multiprocessing.Process:
        """A process that loads the operator, or does something else; what it says goes to `name`."""
        (self.folder / name).touch()
        process = multiprocessing.get_context("fork").Process(target=self._run, args=(name, target or self._load))
        process.start()
        self.processes.append(process)
        return process

    def _run(self, name, target):
        with (self.folder / name).open("w", buffering=1) as sys.stderr:
            os.environ |= {
                "CXX": str(self.folder / "compiler"),
                "TORCH_EXTENSIONS_DIR": str(self.folder / "extensions"),
            }
            operators.FIRST_WORD_S = operators.WORD_EVERY_S = 0.1
            target()

    def _load(self):
        operators.prepare()
        cpp_extension.load("small", [str(self.folder / "small.cpp")], is_python_module=False)

    def compilations(self) -> int:
        return len(self.log.read_text().splitlines()) if self.log.exists() else 0

    def said(self, name: str) -> str:
        return (self.folder / name).read_text()


def wait_until(condition) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def succeeded(*processes: multiprocessing.Process) -> bool:
    for process in processes:
        process.join(LIMIT_S)
    return [process.exitcode for process in processes] == [0] * len(processes)


@pytest.fixture
def site(tmp_path):
    site = Site(tmp_path)
    yield site
    site.gate.touch()  # a compiler that outlived its process ends
    for process in site.processes:
        process.kill()


def test_processes_that_start_together_compile_once(site):
    together = [site.start(f"process-{n}") for n in range(3)]
    wait_until(lambda: site.compilations() == 1 and sum("waits" in site.said(f"process-{n}") for n in range(3)) == 2)
    site.gate.touch()
    assert succeeded(*together)
    assert site.compilations() == 1
    assert not site.lock.exists()


def test_a_killed_compilation_is_done_by_the_next_process(site):
    """Another process was waiting already: it does it."""
    killed = site.start("killed")
    wait_until(lambda: site.compilations() == 1)
    waiting = site.start("waiting")
    wait_until(lambda: f"process {killed.pid} on {os.uname().nodename} compiles" in site.said("waiting"))
    os.kill(killed.pid, signal.SIGKILL)
    killed.join()
    # Its ninja still works in the folder, and is let be.
    wait_until(lambda: f"process {killed.pid} " not in site.said("waiting").splitlines()[-1])
    assert site.lock.exists()
    site.gate.touch()
    assert succeeded(waiting)
    assert not site.lock.exists()


def test_a_lock_that_nobody_holds_is_removed_though_others_live(site):
    """Torch waits for this file for ever."""
    site.gate.touch()
    other = site.start("other", lambda: (operators.prepare(), time.sleep(LIMIT_S)))
    site.lock.touch()
    loading = site.start("loading")
    assert succeeded(loading) and site.said("loading") == ""
    assert not site.lock.exists() and other.is_alive()


def test_a_program_that_knows_only_torchs_lock_is_waited_for(site):
    def compile_slowly():
        baton = file_baton.FileBaton(str(site.lock))
        assert baton.try_acquire()
        wait_until(site.gate.exists)
        baton.release()

    theirs = site.start("theirs", compile_slowly)
    wait_until(site.lock.exists)
    ours = site.start("ours")
    wait_until(lambda: f"process {theirs.pid} on" in site.said("ours"))
    assert site.compilations() == 0
    site.gate.touch()
    assert succeeded(theirs, ours)
    assert site.compilations() == 1


def test_no_wait_is_without_end(site, monkeypatch):
    holder = site.start("holder")
    wait_until(lambda: site.compilations() == 1)
    monkeypatch.setattr(operators, "MOST_S", 0.2)
    message = (
        f"process {holder.pid} on .* compiles this operator.* End that process if it hangs, or set TORCH_EXTENSIONS"
    )
    with pytest.raises(UserError, match=message):
        operators.Baton(str(site.lock)).try_acquire()
    site.gate.touch()
    assert succeeded(holder)


def test_each_environment_has_its_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    here = operators.own_folder()
    assert here == operators.own_folder()
    assert here.parent == tmp_path / "clkd" / "operators"
    with monkeypatch.context() as patch:
        patch.setattr(sys, "prefix", "/elsewhere/.venv")
        elsewhere = operators.own_folder()
    with monkeypatch.context() as patch:
        patch.setattr(metadata, "version", lambda name: "9.9.9+cu999")
        newer = operators.own_folder()
    assert len({here, elsewhere, newer}) == 3
    assert newer.name.startswith("torch-9.9.9-")


def test_the_folder_is_used_unless_the_user_chose_one(monkeypatch, tmp_path):
    monkeypatch.setattr(cpp_extension, "FileBaton", file_baton.FileBaton)  # put back afterwards
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", os.environ["PATH"])
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "chosen")
    operators.prepare()
    assert os.environ["TORCH_EXTENSIONS_DIR"] == "chosen"
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR")
    operators.prepare()
    assert cpp_extension._get_build_directory("x", False) == str(operators.own_folder() / "x")


def test_this_environments_ninja_comes_first(monkeypatch, tmp_path):
    """The log of another version is not read, and everything compiled again."""
    monkeypatch.setattr(cpp_extension, "FileBaton", file_baton.FileBaton)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    other = tmp_path / "ninja"
    other.write_text("#!/bin/sh\nexit 1\n")
    other.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    operators.prepare()
    assert shutil.which("ninja") == os.path.join(sysconfig.get_path("scripts"), "ninja")


def test_a_cache_that_cannot_be_written_is_left_to_torch(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(cpp_extension, "FileBaton", file_baton.FileBaton)
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setenv("PATH", os.environ["PATH"])
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    operators.prepare()
    assert "TORCH_EXTENSIONS_DIR" not in os.environ
    assert "Not a directory" in capsys.readouterr().err
