"""Models of the study for other tools: folders that `transformers` loads."""

from beyond_outliers.export.folder import NotExported, export, load_exported, open_run

__all__ = ["NotExported", "export", "load_exported", "open_run"]
