"""The public interface is written down, and changes only together with the changelog.

``tests/api.txt`` holds every public name with its signature, and for classes their public methods
and attributes. Its first line is the digest of the changelog's newest section. A change of the
interface thus needs both: an entry in ``CHANGELOG.md`` that says so, and

    python -m tests.test_api_snapshot

which writes the file anew. Alone, neither is enough.
"""

import dataclasses
import hashlib
import inspect
import re
import sys
from pathlib import Path

import pytest
import torch

import multialign

ROOT = Path(__file__).parents[1]
SNAPSHOT = Path(__file__).parent / "api.txt"


def _signature(item):
    """Return the parameters and defaults, without annotations, whose spelling depends on Python."""
    signature = inspect.signature(item)
    parameters = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
    return str(signature.replace(parameters=parameters, return_annotation=signature.empty))


def _solution():
    costs = {(0, 1): torch.zeros(2, 2)}
    return multialign.multi_marginal_sinkhorn(costs, [torch.ones(2)] * 2, 1.0)


# What users get and never build: recorded without its constructor, but with what an instance holds.
RETURNED = {"TransportSolution": _solution}


def _members(cls):
    """Return a line for each public member that is not inherited from outside of multialign."""
    ours = [base for base in cls.__mro__ if base.__module__.startswith("multialign")]
    names = {name for base in ours for name in vars(base) if not name.startswith("_")}
    fields = (
        {field.name for field in dataclasses.fields(cls)}
        if dataclasses.is_dataclass(cls)
        else set()
    )
    if cls.__name__ in RETURNED:
        fields |= {name for name in vars(RETURNED[cls.__name__]()) if not name.startswith("_")}
    for name in sorted((names | fields) - {"extra_repr"}):
        item = inspect.getattr_static(cls, name, None)
        item = item.__func__ if isinstance(item, (classmethod, staticmethod)) else item
        yield f"  .{name}{_signature(item) if inspect.isfunction(item) else ''}"


def interface():
    """Return the public interface as lines of text."""
    lines = []
    for name in multialign.__all__:
        item = getattr(multialign, name)
        if inspect.isclass(item) and issubclass(item, BaseException):
            lines.append(f"{name}({item.__bases__[0].__name__})")
        elif name in RETURNED:
            lines.append(name)
        else:
            lines.append(f"{name}{_signature(item)}")
        if inspect.isclass(item):
            lines += _members(item)
    return lines


def changelog():
    """Return the newest section of the changelog."""
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    return re.split(r"^## ", text, flags=re.MULTILINE)[1].strip()


def test_interface_is_as_recorded():
    head, *recorded = SNAPSHOT.read_text(encoding="utf-8").splitlines()
    assert head.startswith("# changelog ")
    assert interface() == recorded, (
        "the public interface has changed: say so in CHANGELOG.md, "
        "then run `python -m tests.test_api_snapshot`"
    )


def test_a_change_cannot_be_recorded_without_the_changelog(tmp_path):
    before = "# changelog 0123456789abcdef\nname(x)\n"
    with pytest.raises(SystemExit, match=r"CHANGELOG\.md"):
        record(before, digest="0123456789abcdef", lines=["name(x, y)"])
    assert record(before, digest="fedcba9876543210", lines=["name(x, y)"]).endswith("name(x, y)\n")
    assert record(before, digest="0123456789abcdef", lines=["name(x)"]) == before


def test_signatures_see_names_order_and_defaults():
    def first(x, *, epsilon: float = 0.1): ...

    def second(x, *, epsilon: float = 0.2): ...

    assert _signature(first) == "(x, *, epsilon=0.1)"
    assert _signature(first) != _signature(second)
    assert any(line.startswith("  .solve(") for line in _members(multialign.PrototypeAlignmentLoss))
    assert not any("state_dict" in line for line in _members(multialign.MMDLoss))
    assert issubclass(multialign.MMDLoss, torch.nn.Module)


def record(before, digest, lines):
    """Return the new content of the file; exit where the changelog says nothing of the change."""
    head, *recorded = before.splitlines()
    if recorded != lines and head == f"# changelog {digest}":
        sys.exit(
            "the interface has changed and CHANGELOG.md has not: say there what a user can do now"
        )
    if recorded == lines:
        return before
    return "\n".join([f"# changelog {digest}", *lines, ""])


if __name__ == "__main__":
    old = SNAPSHOT.read_text(encoding="utf-8") if SNAPSHOT.exists() else "# changelog none\n"
    digest = hashlib.sha256(changelog().encode()).hexdigest()[:16]
    SNAPSHOT.write_text(record(old, digest, interface()), encoding="utf-8")
