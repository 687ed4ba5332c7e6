"""The benchmarks of cost run at tiny sizes, and what they say of times, ratios and memory is checked; no speed is."""

import json
import shlex
import sys

import pytest
import torch
from jsonargparse import ArgumentParser
from meadef_lightning.experiments.benchmarks import measuring, memory, page, ssl_step, throughput
from meadef_lightning.experiments.benchmarks.measuring import Section


@pytest.fixture
def in_process(monkeypatch):
    """Runs in this process what would be measured in fresh ones, each of which takes seconds to import torch."""
    ran = []

    def run(setup, work):
        names = {}
        exec(f"{setup}\n{work}", names)  # noqa: S102 - our own code
        ran.append(work)
        return 7.0

    for module in (ssl_step, memory):
        monkeypatch.setattr(module, "peak_memory", run)
    return ran


def cells(section):
    return [dict(zip(section.columns, row, strict=True)) for row in section.rows]


def test_ratios_are_taken_within_a_round():
    compared = measuring.compared({"plain": [1.0, 10.0, 2.0], "mine": [3.0, 20.0, 4.0]}, "plain")
    assert compared["plain"] == {"median": 2.0, "ratio": 1.0, "ratio_min": 1.0, "ratio_max": 1.0}
    # the ratio of the medians would be 2 as well, but that of the means 2.08
    assert compared["mine"] == {"median": 4.0, "ratio": 2.0, "ratio_min": 2.0, "ratio_max": 3.0}
    assert measuring.spread(compared["mine"]) == ("2.00", "2.00 to 3.00")


def test_turns_are_taken_and_the_first_round_does_not_count():
    order = []

    def measure(name):
        order.append(name)
        return float(len(order))

    values = measuring.in_turns({name: lambda name=name: measure(name) for name in "ab"}, 2)
    assert order == list("ababab")
    assert values == {"a": [3.0, 5.0], "b": [4.0, 6.0]}


def test_seconds_of_one_thread_are_the_processors(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for threads, counted in ((1, 1.0), (2, 3.0)):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        for name, step in (("process_time", 1.0), ("perf_counter", 3.0)):
            times = iter((0.0, step))
            monkeypatch.setattr(measuring.time, name, lambda times=times: next(times))
        assert measuring.seconds(lambda: None) == counted


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
def test_peak_memory_is_that_of_the_work_alone():
    setup = "kept = torch.ones(64 << 18)"  # 64 MiB that do not count
    peak = measuring.peak_memory(setup, "torch.ones(32 << 18); torch.ones(48 << 18)")
    if not torch.cuda.is_available():
        assert 47 < peak < 60
        # by itself, glibc keeps these 64 MiB, which no longer tensor fits into
        freed = "pairs = [(torch.ones(1 << 18), torch.ones(1 << 12)) for _ in range(64)]; few = [b for _, b in pairs]; del pairs"
        assert 63 < measuring.peak_memory("", f"{freed}; torch.ones(60 << 18)") < 80
    with pytest.raises(RuntimeError, match=r"failed:(.|\n)*no such thing"):
        measuring.peak_memory("", "raise OSError('no such thing')")


def test_a_section_is_a_table_with_its_command():
    text = Section("Title", "python -m this", ("a", "b"), [("1", "2"), ("3", "4")], "How to read it.").markdown()
    assert text == (
        "### Title\n\nHow to read it.\n\n```bash\npython -m this\n```\n\n| a | b |\n|---|---|\n| 1 | 2 |\n| 3 | 4 |\n"
    )


def test_an_ssl_step(tmp_path, in_process):
    size = {"batch_size": 20, "image_size": 16, "network": "DigitsCNN", "rounds": 1, "steps": 1}
    section = ssl_step.main(**size, output=str(tmp_path))
    plain, watermarked = cells(section)
    assert (plain["SimCLR"], plain["ratio"], watermarked["SimCLR"]) == ("plain", "1.00", "watermarked")
    assert len(in_process) == 2
    found = json.loads((tmp_path / "ssl_step.json").read_text())
    assert found["variants"]["watermarked"]["peak_mib"] == 7.0
    assert found["variants"]["watermarked"]["median"] > 0


def test_a_watermark_that_did_not_run_is_no_measurement(monkeypatch):
    class Late(ssl_step.FeatureWatermarkCallback):
        def __init__(self, key):
            super().__init__(key, start=0.9)

    monkeypatch.setattr(ssl_step, "FeatureWatermarkCallback", Late)
    with pytest.raises(RuntimeError, match="Only 1 steps were watermarked, fewer than the 4 timed"):
        ssl_step.measure("watermarked", "DigitsCNN", 20, 16, 4)


def test_throughput(tmp_path):
    queries, students, verdicts = throughput.main(
        64, rounds=1, steps=1, sizes=(("DigitsCNN", 16),), classes=(4, 7), output=str(tmp_path)
    )
    assert len(queries.rows) == 6
    assert [row["training"] for row in cells(students)] == [
        "supervised training",
        "student, soft answers",
        "student, hard answers",
    ]
    few, many = cells(verdicts)
    # 4·3·2 targets x 8 ways; 12 pairs x 8 ways x 32 composites, 2·200 triggers and controls, 1,000 natural
    assert (few["keys compared"], few["queries"]) == ("all 192", f"{12 * 8 * 32 + 400 + 1000:,}")
    assert many["keys compared"] == "all 1,680"
    found = json.loads((tmp_path / "throughput.json").read_text())["verification"]
    assert found["4"]["keys"] == 192
    assert found["7"]["verdict"] > found["7"]["statistic"] > 0


def test_memory_runs_every_case(tmp_path, in_process):
    section = memory.main(16, (10, 1100), 64, str(tmp_path))
    assert in_process == [case.call for case in memory.cases(16, (10, 1100), 64)]
    assert {row["peak MiB"] for row in cells(section)} == {"7"}
    assert any("1,100 classes, 999 decoys" in row["kept"] for row in cells(section))


def test_generated_images_are_as_many_as_one_likes():
    task = memory.LargeTask(1000, 8, test=30)
    x, y = task.tensors("verification")
    assert x.shape == (2000, 3, 8, 8)
    assert torch.bincount(y).tolist() == [2] * 1000
    assert torch.equal(x[torch.tensor([3, 19])][0], x[torch.tensor([3, 19])][1])
    labels = memory.AnyLabel(1000)(x[torch.arange(16)])
    assert 0 <= int(labels.min()) < int(labels.max()) < 1000


def test_the_page_carries_commands_that_are_understood(tmp_path, monkeypatch, in_process):
    settings = {
        "ssl_step": {"batch_size": 20, "image_size": 16, "network": "DigitsCNN", "rounds": 1, "steps": 1, "memory": False},
        "memory": {"image_size": 16, "classes": [10, 12], "queries": 64},
    }  # fmt: skip
    # this installation has no such benchmark, and the others go on
    monkeypatch.setattr(page, "BENCHMARKS", (*page.BENCHMARKS, "not_here"))
    text = page.main(("ssl_step", "not_here", "memory"), settings, str(tmp_path))
    assert text == (tmp_path / "page.md").read_text()
    assert text.startswith(f"Measured on: {measuring.machine()}.")
    assert text.index("### A step of self-supervised") < text.index("### Memory of large tasks")
    commands = [line for line in text.splitlines() if line.startswith("python -m ")]
    for module, line in zip((ssl_step, memory), commands, strict=True):
        words = shlex.split(line)
        assert words[:3] == ["python", "-m", module.__name__]
        parser = ArgumentParser()
        parser.add_function_arguments(module.main)
        parsed = vars(parser.parse_args(words[3:]))
        wanted = settings[module.__name__.rpartition(".")[2]]
        assert {name: parsed[name] for name in wanted} == wanted


def test_numbers_of_older_benchmarks_become_sections():
    ratio = {"ratio": 1.2, "ratio_min": 1.1, "ratio_max": 1.3}
    (step,) = page.sections_of("step_time", {"default": {"ms": 12.3, **ratio, "peak_mib": 9.0, "memory_ratio": 1.5}})
    assert list(step.rows[0]) == ["default", "12", "1.20", "1.10 to 1.30", "9", "1.50"]
    (http,) = page.sections_of("http_throughput", {"in_process": 20_000.0, "over_http": 9_000.0, **ratio})
    assert list(http.rows[1]) == ["over HTTP", "9,000", "1.20", "1.10 to 1.30"]
    with pytest.raises(TypeError, match="scaling returned dict; it must return sections"):
        page.sections_of("scaling", {"a": 1})


def test_unknown_benchmarks_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no benchmark 'speed'; choose from step_time, ssl_step"):
        page.main(("speed",), output=str(tmp_path))
    with pytest.raises(ValueError, match="no benchmark 'memroy'"):
        page.main(("memory",), {"memroy": {}}, output=str(tmp_path))
