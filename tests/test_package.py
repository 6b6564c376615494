"""The package as a whole: who may import whom, the public names, and what importing it needs."""

import ast
import importlib.metadata
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import multialign
from tests.losses import LOSSES

ROOT = Path(__file__).parents[1]
PACKAGE = Path(multialign.__file__).parent  # an installed wheel, where that is what is tested
MODULES = sorted(
    path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py" or path.parent != PACKAGE
)

# What each part of the package may import of the others. A folder is one part, whose files import
# each other freely; the public face, multialign/__init__.py, imports them all.
ALLOWED = {
    "_validation": set(),
    "_distributed": set(),
    "_versions": {"", "ops"},  # __version__
    "_samples": {"_distributed"},
    "_draws": set(),
    "ops": {"_validation"},
    "costs": {"_validation", "ops"},
    "decoupling": {"_validation", "_samples"},
    "moments": {"_validation", "_distributed", "_samples"},
    "kernels": {"_validation", "_samples", "ops", "costs"},
    "mmd": {"_validation", "_distributed", "_samples", "_draws", "kernels"},
    "hsic": {"_validation", "_distributed", "_samples", "ops", "costs", "kernels"},
    "two_sample": {"_validation", "_samples", "_draws", "kernels"},
    "mixture": {"_validation", "_distributed", "_samples", "_draws", "ops", "costs"},
    "diagnose": {"_validation"},
    "transport": {"_validation", "ops"},
    "_clouds": {"_validation", "_samples", "costs"},
    "sinkhorn": {"_validation", "_samples", "_clouds", "ops", "transport"},
    "matching_gap": {"_validation", "_distributed", "_samples", "_clouds", "ops", "transport"},
    "prototypes": {
        "_validation",
        "_distributed",
        "_samples",
        "ops",
        "costs",
        "mixture",
        "transport",
    },
}


def _place(path):
    return str(path.relative_to(PACKAGE))


def _imports(path):
    """Return the (module, name) pairs that a file imports anywhere, name "" for a whole module."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute here"
            found += [(node.module, alias.name) for alias in node.names]
        elif (
            isinstance(node, ast.Call)
            and getattr(node.func, "attr", getattr(node.func, "id", "")) == "import_module"
            and isinstance(node.args[0], ast.Constant)
        ):
            found.append((node.args[0].value, ""))
    return found


def _part(module, name):
    """Return which part of the package is meant by `from module import name`."""
    parts = [*module.split("."), name]
    return parts[1] if len(parts) > 2 or (PACKAGE / f"{name}.py").exists() else ""


def _exported(module):
    """Return the names in a module's `__all__`, read from its source."""
    path = PACKAGE.parent.joinpath(*module.split("."))
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return ast.literal_eval(node.value)
    return []


@pytest.mark.parametrize("path", MODULES, ids=_place)
def test_imports_run_one_way(path):
    part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    assert part in ALLOWED, f"say in ALLOWED what {part} may import"
    for module, name in _imports(path):
        if module.split(".")[0] != "multialign":
            continue
        target = _part(module, name)
        assert target == part or target in ALLOWED[part], f"{part} must not import {target}"


@pytest.mark.parametrize("path", [PACKAGE / "__init__.py", *MODULES], ids=_place)
def test_parts_import_only_what_others_export(path):
    part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    inside = [
        f"{name or module} of {module}"
        for module, name in _imports(path)
        if module.split(".")[0] == "multialign"
        and _part(module, name) not in ("", part)
        and name not in _exported(module)
    ]
    assert not inside, f"{part} imports what is not exported: {', '.join(inside)}"


@pytest.mark.parametrize("path", MODULES, ids=_place)
def test_modules_export_names_that_they_have(path):
    """Every module has a docstring and `__all__`, whose names it defines or imports."""
    module = ".".join(["multialign", *path.relative_to(PACKAGE).with_suffix("").parts])
    module = module.removesuffix(".__init__")
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree)
    names = _exported(module)
    assert names, f"{module} has no __all__"
    bound = {node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    bound |= {name for _, name in _imports(path)}
    bound |= {
        ast.unparse(target)
        for node in tree.body
        if isinstance(node, (ast.Assign, ast.AnnAssign))
        for target in getattr(node, "targets", [getattr(node, "target", None)])
    }
    assert set(names) <= bound


@pytest.mark.parametrize("path", MODULES, ids=_place)
def test_files_are_short(path):
    limit = 600 if path.parent == PACKAGE / "ops" / "_triton" else 500
    assert len(path.read_text(encoding="utf-8").splitlines()) <= limit


def test_import_rules_have_no_cycle():
    order = []
    while len(order) < len(ALLOWED):
        free = [part for part in ALLOWED if part not in order and ALLOWED[part] <= {"", *order}]
        assert free, f"a cycle among {sorted(ALLOWED.keys() - set(order))}"
        order += free


@pytest.mark.parametrize("path", MODULES, ids=_place)
def test_imports_nothing_but_torch_and_the_standard_library(path):
    allowed = {"multialign", "torch", *sys.stdlib_module_names}
    if path.parent == PACKAGE / "ops" / "_triton":
        allowed.add("triton")
    foreign = {module.split(".")[0] for module, _ in _imports(path)} - allowed
    assert not foreign


def test_triton_kernels_are_imported_only_when_chosen():
    kernels = PACKAGE / "ops" / "_triton"
    for path in [PACKAGE / "__init__.py", *[path for path in MODULES if path.parent != kernels]]:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in tree.body:  # statements that run on import
            text = ast.unparse(node) if isinstance(node, (ast.Import, ast.ImportFrom)) else ""
            assert "_triton" not in text, f"{path.relative_to(PACKAGE)} imports the kernels at once"


@pytest.mark.parametrize("folder", ["examples", "benchmarks"])
def test_only_public_names_are_used_outside(folder):
    for path in (ROOT / folder).rglob("*.py"):
        for module, name in _imports(path):
            if module.split(".")[0] != "multialign":
                continue
            if path.name in ("gpu.py", "transport.py") and module == "multialign.ops":
                continue  # the kernels and the core by themselves are what they measure
            assert module == "multialign", f"{path.relative_to(ROOT)} imports {module}"
            assert not name or name in multialign.__all__, f"{path.relative_to(ROOT)}: {name}"


def test_public_face_only_re_exports():
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    assert ast.get_docstring(tree)
    for node in tree.body[1:]:
        assert isinstance(node, (ast.ImportFrom, ast.Assign)), ast.unparse(node)
        if isinstance(node, ast.Assign):
            assert ast.unparse(node.targets[0]) in ("__version__", "__all__")


def test_public_names_are_sorted_and_complete():
    names = multialign.__all__
    assert isinstance(names, list)
    assert names == sorted(set(names))
    imported = {
        name for module, name in _imports(PACKAGE / "__init__.py") if module != "__future__"
    }
    assert imported == set(names)


@pytest.mark.parametrize("name", multialign.__all__)
def test_public_name_is_documented(name):
    item = getattr(multialign, name)
    text = inspect.getdoc(item)
    assert text
    first = text.splitlines()[0]
    assert first.endswith("."), f"{name} must open with one sentence; got {first!r}"
    if not (inspect.isclass(item) and issubclass(item, BaseException)):
        assert re.search(r"^Example:\n +>>> ", text, re.MULTILINE), f"{name} has no example"


@pytest.mark.parametrize("name", multialign.__all__)
def test_public_name_is_on_one_api_page(name):
    pages = "\n".join(
        path.read_text(encoding="utf-8") for path in (ROOT / "docs/api").glob("*.rst")
    )
    entries = re.findall(
        rf"^ +{name}$|^\.\. auto\w+:: (?:multialign\.)?{name}$", pages, re.MULTILINE
    )
    assert len(entries) == 1


def test_every_loss_is_in_the_registry():
    modules = {name for name in multialign.__all__ if name.endswith("Loss")}
    functions = {name for name in multialign.__all__ if name.endswith("_loss")}
    assert {loss.module.__name__ for loss in LOSSES.values()} == modules
    assert {loss.function.__name__ for loss in LOSSES.values()} == functions


def test_imports_quietly_where_triton_is_missing():
    code = (
        "import sys, warnings\n"
        "sys.modules['triton'] = None\n"
        "import multialign\n"
        "assert sys.modules['triton'] is None\n"
        "for name in multialign.__all__: getattr(multialign, name)\n"
    )
    command = [sys.executable, "-W", "error", "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    assert result.stdout == result.stderr == ""


def test_import_does_not_import_triton():
    code = (
        "import sys, torch\n"
        "before = set(sys.modules)\n"
        "import multialign\n"
        "new = {name.split('.')[0] for name in set(sys.modules) - before}\n"
        "assert 'triton' not in new, new\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr


def test_torch_is_the_only_requirement():
    try:
        requirements = importlib.metadata.requires("multialign")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("multialign is not installed here")
    assert [text for text in requirements if "extra ==" not in text] == ["torch>=2.4"]


def test_citation_names_this_version():
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert re.search(r"^version: (\S+)$", citation, re.MULTILINE)[1] == multialign.__version__


def test_is_typed():
    assert (PACKAGE / "py.typed").exists()
