import json
import os
import socket
import subprocess
import sys
import time

from pipeline.targets.container.folders import LocalFolder
from pipeline.targets.container.leases import ShardLeases, lease_name


def test_a_shard_has_one_holder_at_a_time(tmp_path):
    with ShardLeases(LocalFolder(tmp_path)) as first, ShardLeases(LocalFolder(tmp_path)) as second:
        assert first.claim(3)
        assert not second.claim(3)
        assert second.claim(4)
        first.release(3)
        assert second.claim(3)
    assert list(tmp_path.iterdir()) == [], "leases are given back at the end"


def write_lease(path, pid, host, age_s):
    path.write_text(json.dumps({"host": host, "pid": pid}))
    os.utime(path, (time.time() - age_s,) * 2)


def test_a_dead_process_on_this_machine_loses_its_lease_at_once(tmp_path):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    write_lease(tmp_path / lease_name(0), gone.pid, socket.gethostname(), age_s=0)
    write_lease(tmp_path / lease_name(1), os.getpid(), socket.gethostname(), age_s=0)
    with ShardLeases(LocalFolder(tmp_path)) as leases:
        assert leases.claim(0)
        assert not leases.claim(1), "this process lives"


def test_a_worker_elsewhere_is_dead_after_a_while_without_a_sign(tmp_path):
    write_lease(tmp_path / lease_name(0), 1, "another-node", age_s=5)
    write_lease(tmp_path / lease_name(1), 1, "another-node", age_s=500)
    (tmp_path / lease_name(2)).write_text("")  # killed between creating and writing
    with ShardLeases(LocalFolder(tmp_path), lease_s=100) as leases:
        assert [leases.claim(shard) for shard in (0, 1, 2)] == [False, True, False]


def test_a_lease_that_is_held_is_kept_alive(tmp_path):
    with ShardLeases(LocalFolder(tmp_path), lease_s=0.2) as leases:
        leases.claim(0)
        taken = (tmp_path / lease_name(0)).stat().st_mtime
        deadline = time.monotonic() + 10
        while (tmp_path / lease_name(0)).stat().st_mtime <= taken and time.monotonic() < deadline:
            time.sleep(0.02)
        assert (tmp_path / lease_name(0)).stat().st_mtime > taken
