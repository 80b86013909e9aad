"""JupyterLab as `make lab` starts it: it serves the whole repository and saves notebooks without outputs."""

from pathlib import Path

from jupyter_client.kernelspec import KernelSpecManager


def without_outputs(model, **_):
    """Takes outputs out of a notebook that is saved, a moment after one typed; the browser goes on showing them."""
    if model["type"] != "notebook" or model["content"]["nbformat"] != 4:
        return
    for cell in model["content"]["cells"]:
        if cell["cell_type"] == "code":
            cell["outputs"], cell["execution_count"] = [], None
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}  # without its version
    model["content"]["metadata"] = {"kernelspec": kernel, "language_info": {"name": "python"}}


class ThisPython(KernelSpecManager):
    """This Python's kernel, whichever python3 comes first on JUPYTER_PATH."""

    def _kernel_dirs_default(self) -> list[str]:
        return []


c = get_config()  # type: ignore[name-defined]  # noqa: F821
c.ServerApp.root_dir = str(Path(__file__).resolve().parents[1])
c.LabApp.default_url = "/lab/tree/notebooks/07_claims.ipynb"
c.FileContentsManager.pre_save_hook = without_outputs
c.ServerApp.kernel_spec_manager_class = ThisPython
