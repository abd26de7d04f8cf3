"""The structure of the source: packages are imported through their `__init__` alone, whose two lists of names agree."""

import ast
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "src" / "codistill"
PACKAGES = sorted(path.parent.name for path in ROOT.glob("*/__init__.py"))
FACES = [name for name in PACKAGES if name != "cli"]


def imports(path: Path) -> list[tuple[int, str]]:
    """Return (line, module) of every import in a file, type-checking blocks included."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            found += [(node.lineno, f"{node.module}.{name.name}") for name in node.names]
        elif isinstance(node, ast.Import):
            found += [(node.lineno, name.name) for name in node.names]
    return found


def is_module(dotted: str) -> bool:
    path = ROOT.parent.joinpath(*dotted.split("."))
    return path.with_suffix(".py").exists() or path.is_dir()


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_import_each_others_faces(package):
    past = []
    for path in (ROOT / package).rglob("*.py"):
        for line, dotted in imports(path):
            parts = dotted.split(".")
            if path.name == "__init__.py" and dotted == "codistill.utils.lazy.lazy_names":
                continue  # what makes the packages' `__init__`, that of utils too
            other = len(parts) > 2 and parts[0] == "codistill" and parts[1] in FACES and parts[1] != package
            if other and (len(parts) > 3 or is_module(dotted)):
                past.append(f"{path.relative_to(ROOT)}:{line} {dotted}")
    assert not past


@pytest.mark.parametrize("package", PACKAGES)
def test_imported_names_exist(package):
    """The type checker cannot see it: a package that loads names when they are used could have any."""
    missing = []
    for path in (ROOT / package).rglob("*.py"):
        for line, dotted in imports(path):
            package_name, _, name = dotted.rpartition(".")
            if package_name in [f"codistill.{face}" for face in FACES] and not is_module(dotted):
                found = hasattr(importlib.import_module(package_name), name)
                missing += [] if found else [f"{path.relative_to(ROOT)}:{line} {dotted}"]
    assert not missing


@pytest.mark.parametrize("package", FACES)
def test_faces_list_what_they_load(package):
    tree = ast.parse((ROOT / package / "__init__.py").read_text())
    typed = {
        (node.module.removeprefix(f"codistill.{package}."), name.name)
        for block in tree.body
        if isinstance(block, ast.If)
        for node in block.body
        for name in node.names
    }
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == "lazy_names"]
    loaded = {
        (module, name)
        for call in calls
        for module, names in ast.literal_eval(call.args[1]).items()
        for name in names.split()
    }
    assert loaded
    assert typed == loaded
    module = importlib.import_module(f"codistill.{package}")
    for _, name in loaded:
        assert getattr(module, name) is not None
        assert name in dir(module)
