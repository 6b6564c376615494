"""Check wheels and sdist, with and without the compiled core, where only torch is installed."""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from email.parser import Parser
from pathlib import Path

LARGEST = 400_000  # bytes

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
from multialign.ops._native import core_state, native_function

assert (native_function("exp") is not None) == (sys.argv[1] == "True"), core_state()
multialign.show_versions()
"""


def is_compiled(wheel: Path) -> bool:
    """Return whether a wheel is for one platform, and so holds the compiled core."""
    return not wheel.name.endswith("-none-any.whl")


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
    library = "dll" if "-win" in wheel.name else "so"
    core = [f"multialign/ops/_native/core.{library}"] if is_compiled(wheel) else []
    if data != core:
        sys.exit(f"{wheel.name} must hold code and {core}; got {data}")
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

    def install(self, *options: str, compiler: bool = True) -> None:
        """Install with pip, under the constraints; without `compiler`, where every one fails."""
        pip = [self.python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        environment = os.environ if compiler else {**os.environ, "CC": "/bin/false"}
        command = [*pip, "--constraint", str(self.constraint), *options]
        subprocess.run(command, check=True, env=environment)

    def use(self, compiled: bool) -> None:
        """Run a few lines with what is installed, from a folder without the source."""
        command = [self.python, "-c", USE, str(compiled)]
        subprocess.run(command, check=True, cwd=self.folder)


def use_all(folder: Path, environment: Environment) -> None:
    """Install and use each wheel of a folder, then its sdist with and without a compiler."""
    (sdist,) = folder.glob("*.tar.gz")
    wheels = sorted(folder.glob("*.whl"))
    compiled = any(map(is_compiled, wheels))
    if shutil.which("cc") and not compiled:
        sys.exit(f"{folder} holds no wheel with the compiled core")
    again = ("--force-reinstall", "--no-deps")
    for wheel in wheels:
        environment.install(*again, str(wheel.resolve()))
        environment.use(is_compiled(wheel))
    # A wheel that pip built from this sdist before would hide what the compiler does.
    for compiler in (True, False):
        environment.install(*again, "--no-cache-dir", str(sdist.resolve()), compiler=compiler)
        environment.use(compiled and compiler)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="holds one sdist and its wheels")
    parser.add_argument("--constraint", type=Path, required=True)
    arguments = parser.parse_args()
    for wheel in arguments.folder.glob("*.whl"):
        check_contents(wheel)
    with tempfile.TemporaryDirectory() as name:
        use_all(arguments.folder, Environment(Path(name) / "environment", arguments.constraint))
