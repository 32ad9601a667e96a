"""Peak memory of a command, read from /proc while it runs (Linux)."""

import os
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import UserError

POLL_S = 0.005


@dataclass(frozen=True, slots=True)
class Peak:
    """Peak bytes of a process, and the seconds that it ran."""

    held: int
    """Anonymous memory: what the kernel cannot drop."""
    resident: int
    """All resident memory: mapped files, which the kernel drops when memory is short, count as well."""
    seconds: float


def peak_of(command: Sequence[str]) -> Peak:
    """Run a command to its end. Raises UserError with its last words when it fails."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    started, held, resident = time.monotonic(), 0, 0
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=errors)
        while process.poll() is None:
            status = _status(process.pid)
            held, resident = max(held, status.get("RssAnon", 0)), max(resident, status.get("VmHWM", 0))
            time.sleep(POLL_S)
        errors.seek(0)
        if process.returncode:
            raise UserError(f"{' '.join(command)} ended with {process.returncode}: {errors.read()[-2000:]}")
    return Peak(held, resident, time.monotonic() - started)


def _status(pid: int) -> dict[str, int]:
    """Memory figures of a process in bytes; empty when it has just ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    fields = (line.partition(":") for line in lines)
    return {name: int(value.split()[0]) << 10 for name, _, value in fields if value.endswith("kB")}
