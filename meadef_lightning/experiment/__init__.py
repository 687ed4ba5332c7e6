"""Experiments: the specification, its stages on disk, the pipeline through them, and the report.

`meadef_lightning.experiment.spec` is what a YAML may say, `meadef_lightning.experiment.load` reads it, `meadef_lightning.experiment.pipeline`
runs it, and `meadef_lightning.experiment.stages` decides what is done already and what is resumed.
`meadef_lightning.experiment.report` is the schema of ``report.json``, `meadef_lightning.experiment.render` and
`meadef_lightning.experiment.gallery` are its forms for people. `meadef_lightning.experiment.grid` is a product of experiments. The other
commands: `meadef_lightning.experiment.judge` (``verify``), `meadef_lightning.experiment.keys`, `meadef_lightning.experiment.bundles`
(``evidence``) and `meadef_lightning.experiment.serve`. `meadef_lightning.experiment.tracking` logs to Weights & Biases.
"""
