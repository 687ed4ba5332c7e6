"""What asking over HTTP costs: the same queries to a model in this process and to a served one, in turns.

    python -m meadef_lightning.experiments.benchmarks.http_throughput [--help]

Each round asks new queries of both, one after the other, so that a busy machine slows both alike; the ratio of the throughputs is
taken within a round, and the median over rounds is reported with the range. Both keep their ledgers in files, the server (a process
of its own, on the loopback interface) and its client one each. Writes ``http_throughput.json`` and prints a table.
"""

import multiprocessing
import statistics
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from meadef_lightning.experiment.artifacts import make_directory, write_json_atomic
from meadef_lightning.oracle import BlackBox, HTTPOracle, Oracle, QueryLedger
from meadef_lightning.victims.networks import DigitsCNN

API_KEY = "only-for-this-benchmark"


def victim() -> torch.nn.Module:
    """Returns an untrained network for handwritten digits, always the same."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return DigitsCNN(10, 1).eval()


def serve(directory: str, image_size: int, rows_per_request: int, threads: int, port: Connection) -> None:
    """Serves the network on a free port of the loopback interface, until it is terminated."""
    from meadef_lightning.oracle.clients import ServerLimits
    from meadef_lightning.oracle.server import create_app, listen, server

    torch.set_num_threads(threads)
    app = create_app(
        victim(),
        image_shape=(1, image_size, image_size),
        num_classes=10,
        api_keys={"benchmark": API_KEY},
        directory=directory,
        limits=ServerLimits(rows_per_request=rows_per_request),
    )
    with listen() as listener:
        port.send(listener.getsockname()[1])
        server(app).run(sockets=[listener])


def rows_per_second(oracle: BlackBox, x: torch.Tensor) -> float:
    """Returns the throughput of one query of all rows of ``x``."""
    start = time.perf_counter()
    oracle.query(x)
    return len(x) / (time.perf_counter() - start)


def main(
    queries: int = 10_000,
    batch_size: int = 512,
    image_size: int = 16,
    rounds: int = 5,
    output: str = "runs/benchmarks",
) -> dict[str, float]:
    """Measures the throughput of an oracle over HTTP against one in the same process.

    Args:
        queries: Rows asked of each per round.
        batch_size: Rows per request, and per batch in the process.
        image_size: Height and width of the images, of one channel.
        rounds: Rounds, after a short one that is not counted.
        output: Directory of ``http_throughput.json``.
    """
    directory, console = make_directory(Path(output)), Console()
    context = multiprocessing.get_context("spawn")
    mine, theirs = context.Pipe(duplex=False)
    speeds: dict[str, list[float]] = {"in process": [], "over HTTP": []}
    with tempfile.TemporaryDirectory() as folder:
        process = context.Process(
            target=serve,
            args=(f"{folder}/server", image_size, batch_size, torch.get_num_threads(), theirs),
            daemon=True,
        )
        process.start()
        try:
            theirs.close()
            oracles: dict[str, BlackBox] = {
                "in process": Oracle(victim(), ledger=QueryLedger(f"{folder}/local.sqlite"), batch_size=batch_size),
                "over HTTP": HTTPOracle(
                    f"http://127.0.0.1:{mine.recv()}", API_KEY, QueryLedger(f"{folder}/client.sqlite"), batch_size
                ),
            }
            generator = torch.Generator().manual_seed(0)
            for number in range(rounds + 1):
                console.print(f"round {number} of {rounds}" if number else "warming up")
                size = queries if number else 2 * batch_size
                x = torch.randn(size, 1, image_size, image_size, generator=generator)
                for name, oracle in oracles.items():
                    speed = rows_per_second(oracle, x)
                    if number:
                        speeds[name].append(speed)
        finally:
            process.terminate()
            process.join()
    ratios = sorted(http / local for local, http in zip(*speeds.values(), strict=True))
    result = {
        "in_process": statistics.median(speeds["in process"]),
        "over_http": statistics.median(speeds["over HTTP"]),
        "ratio": statistics.median(ratios),
        "ratio_min": ratios[0],
        "ratio_max": ratios[-1],
    }
    table = Table("oracle", "queries per second", "ratio", "range")
    table.add_row("in process", f"{result['in_process']:.0f}", "1", "")
    table.add_row(
        "over HTTP", f"{result['over_http']:.0f}", f"{result['ratio']:.2f}", f"{ratios[0]:.2f} to {ratios[-1]:.2f}"
    )
    hardware = f"CPU, {torch.get_num_threads()} threads"
    console.print(table)
    console.print(
        f"{hardware}, torch {torch.__version__}, {queries} queries of 1x{image_size}x{image_size} in requests of {batch_size}, DigitsCNN"
    )
    write_json_atomic(
        directory / "http_throughput.json",
        {"hardware": hardware, "torch": torch.__version__, "queries": queries, **result},
    )
    return result


if __name__ == "__main__":
    from jsonargparse import CLI

    CLI(main)
