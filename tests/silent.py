"""Options of a Trainer that writes nothing, neither to the screen nor to the disk."""

SILENT = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
