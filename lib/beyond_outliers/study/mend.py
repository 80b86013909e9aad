"""Before a study goes on: what its tables would leave out, because it is not what was written, is made again.

Only what can be made again from what is there is taken away; a run's folder is kept beside, under another name. Weights
are not looked at here but when they are read: at large sizes that would take hours.
"""

import shutil
from typing import TYPE_CHECKING

from beyond_outliers import checksums, paths

if TYPE_CHECKING:
    from beyond_outliers.study.study import Study


def mend(study: "Study") -> list[str]:
    """Clears away damaged runs that have ended, measurements and rates, and what says that they are done.

    Returns a sentence on each. DamagedFile where the sums of the study's own tables are damaged themselves.
    """
    said = []
    for result in sorted(study.runs_folder.glob("[!.]*/result.json")):
        folder = result.parent
        try:
            checksums.check(folder, "config.json", "result.json", "metrics.csv")
        except checksums.DamagedFile as damage:
            aside = folder.with_name(f".damaged-{folder.name}")
            shutil.rmtree(aside, ignore_errors=True)
            folder.rename(aside)
            said.append(f"{damage}; the run is made again, what there was of it is in {aside}")
            continue
        for measured in [*sorted(folder.glob("measure-*")), *folder.glob("trajectory.csv")]:
            try:
                checksums.check(*((measured,) if measured.is_dir() else (folder, measured.name)))
            except checksums.DamagedFile as damage:
                shutil.rmtree(measured) if measured.is_dir() else measured.unlink()
                said.append(f"{damage}; it is measured again")
    done = ["measured-*", "collected-*"] if said else []
    rates = paths.own_results(study.scale) / "learning_rates.csv"
    if rates.exists():
        checksums.read_sums(rates.parent)  # where they are damaged, nothing says that the rates are
        try:
            checksums.check(rates.parent, rates.name)
        except checksums.DamagedFile as damage:
            rates.unlink()
            done.append("chosen-*")
            said.append(f"{damage}; rates are chosen again")
    for marker in [file for pattern in done for file in study.runs_folder.glob(pattern)]:
        marker.unlink()
    return said
