"""`python -m beyond_outliers.export RUN --to FOLDER`: a run's model as a folder of `transformers`."""

import argparse
import sys
from pathlib import Path

from beyond_outliers.export.folder import NotExported, export
from beyond_outliers.quantizers.formats import QuantSpec


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m beyond_outliers.export", description=__doc__)
    parser.add_argument("run", help="a run's folder or name, or a committed checkpoint (.safetensors)")
    parser.add_argument("--to", type=Path, required=True, help="a new folder")
    parser.add_argument("--spec", help="round it first, for instance W4A4 or W4g32+gptq; default: as trained")
    given = parser.parse_args(arguments)
    try:
        folder = export(given.run, given.to, QuantSpec.named(given.spec) if given.spec else None)
    except (ValueError, NotExported) as error:
        parser.exit(1, f"{error}\n")
    print(f"AutoModelForCausalLM.from_pretrained({str(folder)!r}, trust_remote_code=True)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
