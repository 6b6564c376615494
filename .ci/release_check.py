"""Check what a release would upload: sdist and wheels, in fresh environments, with their tests.

For the oldest and the newest torch, and each Python from 3.10 on that is installed here, the wheel
with the compiled core is used where only torch is installed; then the test suite of the sdist runs
against it. The pure wheel is used once, and the sdist is built with and without a compiler. A
combination that fails does not stop the others: the last lines say what became of each, and the
exit status is 0 only if all passed. `--python` and `--torch` choose some of them, to repeat one
alone or to go on where a run was stopped.
"""

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

from check_wheel import Environment, check_contents, is_compiled, use_all

PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
OLDEST = "2.4.1"
OLDEST_RUNS_ON = ("3.10", "3.11", "3.12")  # what that release of torch has wheels for


class CheckError(Exception):
    """Says in one line what did not pass."""


def installed_pythons() -> dict[str, str]:
    """Return the interpreters that are installed here, by version."""
    found = {}
    for version in PYTHONS:
        for folder in os.get_exec_path():
            path = shutil.which(f"python{version}", path=folder)
            # A shim of that name may do no more than to say which versions are not installed.
            if (
                path
                and not subprocess.run([path, "-c", "import venv"], capture_output=True).returncode
            ):
                found.setdefault(version, path)
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
    """Return constraints for another version of torch, whose builds for CUDA ask for a triton."""
    text = constraint.read_text()
    if f"torch=={torch}\n" not in text:
        text = re.sub(r"^triton==.*\n", "", text, flags=re.MULTILINE)
        text = re.sub(r"^torch==.*$", f"torch=={torch}", text, flags=re.MULTILINE)
    path = folder / "constraints.txt"
    path.write_text(text)
    return path


def run_tests(environment: Environment, tests: Path) -> str:
    """Run the test suite in an environment and return its counts."""
    report = environment.folder / "tests.xml"
    pytest = [environment.python, "-m", "pytest", "-q", f"--junitxml={report}"]
    pytest += ["--numprocesses=auto", "--maxprocesses=8", "--dist=worksteal"]
    what = ["--collect-in-virtualenv", "tests", "--pyargs", "multialign"]
    status = subprocess.run([*pytest, *what], cwd=tests).returncode
    if not report.exists():
        raise CheckError(f"pytest ended with {status} before its report")
    suite = ElementTree.parse(report).getroot()[0].attrib
    bad = {kind: int(suite[kind]) for kind in ("failures", "errors")}
    skipped = int(suite["skipped"])
    passed = int(suite["tests"]) - skipped - sum(bad.values())
    counts = f"{passed} passed, {skipped} skipped"
    if status:
        raise CheckError(f"{bad['failures']} failed, {bad['errors']} errors, {counts}")
    return counts


def check_files(folder: Path, constraint: Path) -> str:
    """Use the wheels, and the sdist with and without a compiler, where only torch is installed."""
    with tempfile.TemporaryDirectory() as name:
        use_all(folder, Environment(Path(name) / "environment", constraint))
    return "installed and used"


def check_combination(python: str, torch: str, wheel: Path, sdist: Path, constraint: Path) -> str:
    """Use the wheel where only torch is installed, then run the test suite of the sdist on it."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        constraint = constraints_with(torch, constraint, folder)
        tests = unpacked_tests(sdist, folder / "sdist")
        # In the folder of the tests, whose conftest.py then serves the docstrings as well.
        environment = Environment(tests / "environment", constraint, python)
        environment.install(str(wheel.resolve()))
        environment.use(is_compiled(wheel))
        environment.install(f"{wheel.resolve()}[test,example]")
        return run_tests(environment, tests)


def main() -> None:
    """Check the sdist and the wheels in a folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="holds one sdist and its wheels")
    parser.add_argument("--constraint", type=Path, required=True)
    parser.add_argument("--torch", nargs="+", help="versions; default: the oldest and the newest")
    parser.add_argument("--python", nargs="+", choices=PYTHONS, help="default: all there are")
    arguments = parser.parse_args()
    (sdist,) = arguments.folder.glob("*.tar.gz")
    wheels = sorted(arguments.folder.glob("*.whl"), key=is_compiled)
    constraint = arguments.constraint
    newest = re.search(r"^torch==(\S+)", constraint.read_text(), re.MULTILINE)[1]

    for wheel in wheels:
        check_contents(wheel)
    twine = [sys.executable, "-m", "twine", "check", "--strict"]
    subprocess.run([*twine, *map(str, [*wheels, sdist])], check=True)

    lines, failed = [], False

    def record(name: str, check: Callable[..., str], *rest: object) -> None:
        nonlocal failed
        print(f"== {name}", flush=True)
        started = time.monotonic()
        try:
            outcome = f"passed: {check(*rest)}"
        except (CheckError, subprocess.CalledProcessError) as error:
            failed = True
            command = getattr(error, "cmd", None)
            # The last word says what was installed; the lines before the summary say the rest.
            reason = f"{shlex.join(command[1:4])} ... {command[-1][-60:]!r}" if command else error
            outcome = f"FAILED: {reason}"
        lines.append(f"{name}: {outcome} ({time.monotonic() - started:.0f} s)")
        print(lines[-1], flush=True)

    record("The wheels and the sdist", check_files, arguments.folder, constraint)
    pythons = installed_pythons()
    for torch in arguments.torch or (OLDEST, newest):
        for version in arguments.python or PYTHONS:
            name = f"Python {version}, torch {torch}"
            if torch == OLDEST and version not in OLDEST_RUNS_ON:
                lines.append(f"{name}: not checked, there is no such build of torch")
            elif version not in pythons:
                lines.append(f"{name}: not checked, this Python is not installed here")
                failed |= arguments.python is not None  # it was asked for by name
            else:
                best = wheels[-1]
                record(name, check_combination, pythons[version], torch, best, sdist, constraint)
    print("\n".join(["", "Summary", *lines]))
    sys.exit(failed)


if __name__ == "__main__":
    main()
