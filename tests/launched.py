"""Starts worker scripts as ``torchrun`` would: two gloo processes on the CPU, and lone ones beside them."""

import os
import socket
import subprocess
import sys
from pathlib import Path

ALONE = {
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "PYTHONWARNINGS": "ignore",
    # what stands beside this file is for workers, too
    "PYTHONPATH": os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")])),
}
"""What every worker's environment holds besides this process's."""


def two_ranks() -> list[dict[str, str]]:
    """The environments of two processes that find each other at a free port of this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "GROUP_RANK": "0",
        "TORCHELASTIC_RUN_ID": "tests",
    }
    return [{**ALONE, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]


def run_workers(
    script: Path, folder: Path, workers: list[tuple[dict[str, str], list[str]]], timeout: float = 300
) -> dict[str, str]:
    """Runs a script in several processes at once, each with an environment and arguments after the folder.

    Returns:
        The end of what each wrote, by ``log.NUMBER``: the reason where its results are missing. None outlives the call.
    """
    running = []
    try:
        for number, (env, arguments) in enumerate(workers):
            with (folder / f"log.{number}").open("w") as log:
                command = [sys.executable, str(script), str(folder), *arguments]
                running.append(
                    subprocess.Popen(
                        command, env={**os.environ, **env}, cwd=folder, stdout=log, stderr=subprocess.STDOUT
                    )
                )
        for process in running:
            process.wait(timeout)
    except subprocess.TimeoutExpired:
        pass  # what is missing is reported with the logs
    finally:
        for process in running:
            process.kill()
            process.wait()
    return {path.name: path.read_text()[-3000:] for path in sorted(folder.glob("log.*"))}
