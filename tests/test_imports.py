"""What the model code needs: torch, transformers, peft and safetensors, and nothing of the pipeline around it."""

import subprocess
import sys

from tests.conftest import ROOT

BLOCKED = ("cv2", "datasets", "dvc", "great_expectations", "hydra", "omegaconf", "pandas", "prefect", "pyarrow", "trl")
PROGRAM = f"""
import importlib, pkgutil, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {BLOCKED!r}:
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Absent())
import clear.model, clear.reasoning
for package in (clear.model, clear.reasoning):
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{{package.__name__}}.{{module.name}}")
importlib.import_module("clear.training.rl.scoring")
"""


def test_the_model_imports_without_the_pipelines_libraries():
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
