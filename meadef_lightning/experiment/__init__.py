"""Experiments: the specification, its stages on disk, the pipeline through them, and the report."""
