"""Models of the study for other tools: folders that `transformers` loads."""

from beyond_outliers import lazily

__getattr__, __all__ = lazily(__name__, folder="NotExported export load_exported open_run")
