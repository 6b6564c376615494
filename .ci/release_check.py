"""Check what a release would upload: sdist and wheel, in fresh environments, with their own tests.

For the oldest and the newest torch, and each Python from 3.10 on that is installed here, the wheel
is used where only torch is installed; then the test suite of the sdist runs against it. The sdist
itself is built and used once.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from check_wheel import Environment, check_contents

PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
OLDEST = "2.4.1"
OLDEST_RUNS_ON = ("3.10", "3.11", "3.12")  # what that release of torch has wheels for


def installed_pythons() -> dict[str, str]:
    """Return the interpreters that are installed here, by version."""
    found = {}
    for version in PYTHONS:
        path = shutil.which(f"python{version}")
        # Something of that name may be there and do no more than to say which versions are not.
        if path and not subprocess.run([path, "-c", "import venv"], capture_output=True).returncode:
            found[version] = path
    found.setdefault(f"{sys.version_info.major}.{sys.version_info.minor}", sys.executable)
    return found


def unpacked_tests(sdist: Path, folder: Path) -> Path:
    """Unpack the sdist without its package, so that its tests can only find the installed one."""
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    (root,) = folder.iterdir()
    shutil.rmtree(root / "multialign")
    return root


def constraints_with(torch: str, constraint: Path, folder: Path) -> Path:
    """Return constraints for another version of torch."""
    text = re.sub(r"^torch==.*$", f"torch=={torch}", constraint.read_text(), flags=re.MULTILINE)
    path = folder / "constraints.txt"
    path.write_text(text)
    return path


def main() -> None:
    """Check the sdist and the wheel in a folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="holds one sdist and one wheel")
    parser.add_argument("--constraint", type=Path, required=True)
    parser.add_argument("--torch", nargs="+", help="versions; default: the oldest and the newest")
    arguments = parser.parse_args()
    (wheel,), (sdist,) = (list(arguments.folder.glob(kind)) for kind in ("*.whl", "*.tar.gz"))
    newest = re.search(r"^torch==(\S+)", arguments.constraint.read_text(), re.MULTILINE)[1]

    check_contents(wheel)
    subprocess.run(
        [sys.executable, "-m", "twine", "check", "--strict", str(wheel), str(sdist)], check=True
    )
    with tempfile.TemporaryDirectory() as name:
        environment = Environment(Path(name) / "environment", arguments.constraint)
        environment.install(str(sdist.resolve()))
        environment.use()

    pythons, done = installed_pythons(), []
    for torch in arguments.torch or (OLDEST, newest):
        for version, python in pythons.items():
            if torch == OLDEST and version not in OLDEST_RUNS_ON:
                continue
            print(f"== Python {version}, torch {torch}", flush=True)
            with tempfile.TemporaryDirectory() as name:
                folder = Path(name)
                constraint = constraints_with(torch, arguments.constraint, folder)
                environment = Environment(folder / "environment", constraint, python)
                environment.install(str(wheel.resolve()))
                environment.use()
                environment.install(f"{wheel.resolve()}[test,example]")
                tests = unpacked_tests(sdist, folder / "sdist")
                subprocess.run(
                    [environment.python, "-m", "pytest", "-q", "tests", "--pyargs", "multialign"],
                    check=True,
                    cwd=tests,
                )
            done.append(f"Python {version} with torch {torch}")
    missing = [version for version in PYTHONS if version not in pythons]
    print(f"Passed on {'; '.join(done)}.")
    if missing:
        print(f"Not checked, as it is not installed here: Python {', '.join(missing)}.")


if __name__ == "__main__":
    main()
