"""Reads what W&B wrote offline, without W&B's own reader: the ``.wandb`` file is a LevelDB log of protocol buffers."""

import json
from pathlib import Path

import wandb
from wandb.proto import wandb_internal_pb2

BLOCK = 32768
HEADER = 7
FULL, LAST = 1, 4


def records(path):
    data, position, parts = path.read_bytes(), HEADER, b""
    assert data.startswith(b":W&B")
    while position + HEADER <= len(data):
        left = BLOCK - position % BLOCK
        if left < HEADER:
            position += left
            continue
        length, kind = int.from_bytes(data[position + 4 : position + 6], "little"), data[position + 6]
        if kind == 0:
            position += left
            continue
        if position + HEADER + length > len(data):
            return  # the process was killed while it wrote
        parts += data[position + HEADER : position + HEADER + length]
        position += HEADER + length
        if kind in (FULL, LAST):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


class OfflineRun:
    """One attempt at a run, as it stands on disk."""

    def __init__(self, path):
        self.directory = path.parent
        self.config, self.summary, self.history, self.artifacts, self.kinds = {}, {}, [], {}, []
        for record in records(path):
            kind = record.WhichOneof("record_type")
            self.kinds.append(kind)
            if kind == "run":
                run = record.run
                self.id, self.group, self.name, self.kind = run.run_id, run.run_group, run.display_name, run.job_type
                self.project, self.sweep, self.resume = run.project, run.sweep_id, run.resume
                self.config |= {item.key: json.loads(item.value_json) for item in run.config.update}
            elif kind == "config":
                self.config |= {item.key: json.loads(item.value_json) for item in record.config.update}
            elif kind == "history":
                self.history.append(values(record.history.item))
            elif kind == "summary":
                self.summary |= values(record.summary.update)
            elif kind == "artifact":
                files = {entry.path: Path(entry.local_path) for entry in record.artifact.manifest.contents}
                self.artifacts[record.artifact.name] = (record.artifact.type, files)

    def rows(self, *without):
        """The rows of metrics, each without its time."""
        hidden = {"_timestamp", "_runtime", "_wandb", *without}
        return [{name: value for name, value in row.items() if name not in hidden} for row in self.history]

    def table(self, name):
        """Rows of a logged table as mappings."""
        (row,) = [row for row in self.history if name in row]
        table = json.loads((self.directory / "files" / row[name]["path"]).read_text())
        return [dict(zip(table["columns"], line, strict=True)) for line in table["data"]]

    def pictures(self):
        """Names and files of logged pictures."""
        found = {}
        for row in self.history:
            for name, value in row.items():
                if isinstance(value, dict) and "image" in value.get("_type", ""):
                    found[name] = [self.directory / "files" / path for path in value["filenames"]]
        return found


def values(items):
    """Values by name; those of a picture or table, which come one by one, as a mapping."""
    found = {}
    for item in items:
        *outer, name = item.nested_key or [item.key]
        inner = found
        for part in outer:
            inner = inner.setdefault(part, {})
        inner[name] = json.loads(item.value_json)
    return found


def offline_runs(output):
    """All attempts below an output directory, in the order of their start."""
    wandb.teardown()  # `finish` comes back before W&B's helper process has written everything
    paths = (Path(output) / "wandb").glob("offline-run-*/*.wandb")
    return [
        OfflineRun(path) for path in sorted(paths, key=lambda path: (path.parent.name[:27], path.stat().st_mtime_ns))
    ]
