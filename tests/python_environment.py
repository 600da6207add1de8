"""Virtual environments for the scripts here and in benches/peers, below target/."""

import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]


def enter(name, *requirements):
    """Goes on in the environment target/NAME with what pip makes of `requirements`, which is made
    where it is not there: the running script starts anew in it."""
    folder = ROOT / "target" / name
    python = folder / "bin/python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    if pathlib.Path(sys.prefix) == folder:
        return
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, *requirements], check=True)
    os.execv(python, [python, *sys.argv])


def model_folder(name):
    """A model of the model cache, or None."""
    cache = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    home = os.environ.get("BESPOKE_HOME") or pathlib.Path(cache) / "bespoke"
    folder = pathlib.Path(home) / "models" / name
    return folder if folder.is_dir() else None
