"""Check a wheel's contents, then install and use it where only torch is installed."""

import argparse
import subprocess
import sys
import tempfile
import zipfile
from email.parser import Parser
from pathlib import Path

LARGEST = 200_000  # bytes

USE = """
import importlib.metadata, pathlib, sys, warnings

warnings.filterwarnings("ignore", message="Failed to initialize NumPy")
import torch

warnings.simplefilter("error")
import multialign

assert "triton" not in sys.modules, "importing multialign imported triton"
assert pathlib.Path(sys.prefix) in pathlib.Path(multialign.__file__).parents, multialign.__file__
assert importlib.metadata.version("multialign") == multialign.__version__
features = [torch.randn(8, 3, requires_grad=True) for _ in range(3)]
losses = [
    multialign.CosineDecouplingLoss()(features, features[::-1]),
    multialign.GaussianMomentLoss()(features),
    multialign.MMDLoss()(features),
    multialign.PrototypeAlignmentLoss(2)(features),
    multialign.MultiMarginalSinkhornLoss()(features),
]
torch.stack(losses).sum().backward()
assert all(x.grad.isfinite().all() for x in features)
multialign.show_versions()
"""


def check_contents(wheel: Path) -> None:
    """Exit with a sentence if the wheel holds too much, too little or asks for too much."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        requirements = Parser().parsestr(archive.read(metadata).decode()).get_all("Requires-Dist")
    tops = {name.split("/")[0] for name in names}
    if not all(top == "multialign" or top.endswith(".dist-info") for top in tops):
        sys.exit(f"{wheel.name} holds more than multialign: {sorted(tops)}")
    if "multialign/py.typed" not in names:
        sys.exit(f"{wheel.name} lacks multialign/py.typed")
    code = (".py", ".typed")
    data = [n for n in names if n.startswith("multialign/") and not n.endswith(code)]
    if data:
        sys.exit(f"{wheel.name} holds more than code: {data}")
    tests = [name for name in names if "test" in Path(name).name]
    if tests:
        sys.exit(f"{wheel.name} holds tests: {tests}")
    size = wheel.stat().st_size
    if size > LARGEST:
        sys.exit(f"{wheel.name} has {size} bytes, more than {LARGEST}")
    always = [name for name in requirements or [] if "extra ==" not in name]
    if always != ["torch>=2.4"]:
        sys.exit(f"{wheel.name} requires {always}; expected torch alone")
    print(f"{wheel.name}: {len(names)} files, {size} bytes, requires {', '.join(always)}")


class Environment:
    """A fresh environment with torch and nothing else."""

    def __init__(self, folder: Path, constraint: Path, python: str = sys.executable) -> None:
        subprocess.run([python, "-m", "venv", str(folder)], check=True)
        self.folder, self.constraint = folder, constraint.resolve()
        self.python = str(folder / "bin" / "python")
        self.install("torch")

    def install(self, *requirements: str) -> None:
        """Install with pip, under the constraints."""
        pip = [self.python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, "--constraint", str(self.constraint), *requirements], check=True)

    def use(self) -> None:
        """Run a few lines with what is installed, from a folder without the source."""
        subprocess.run([self.python, "-c", USE], check=True, cwd=self.folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--constraint", type=Path, required=True)
    arguments = parser.parse_args()
    check_contents(arguments.wheel)
    with tempfile.TemporaryDirectory() as folder:
        environment = Environment(Path(folder) / "environment", arguments.constraint)
        environment.install(str(arguments.wheel.resolve()))
        environment.use()
