"""What is declared, what is pinned and what is imported agree."""

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
RUNTIME = [Requirement(text) for text in PROJECT["dependencies"]]
EXTRAS = {name: [Requirement(text) for text in texts] for name, texts in PROJECT["optional-dependencies"].items()}
PINS = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]


def test_every_constraint_is_one_exact_version() -> None:
    for line in PINS:
        assert re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][0-9A-Za-z.]*", line), line


def test_every_declared_dependency_is_pinned_within_its_bounds() -> None:
    pins = (line.split("==") for line in PINS)
    pinned = {canonicalize_name(name): version for name, version in pins}
    for requirement in [*RUNTIME, *EXTRAS["dev"], *EXTRAS["ray"]]:
        version = pinned[canonicalize_name(requirement.name)]
        assert version in requirement.specifier, f"{requirement} against {version}"


def test_every_import_is_declared() -> None:
    """A package that comes along with another may go away with it: what we import, we name."""
    declared = {canonicalize_name(r.name) for r in [*RUNTIME, *EXTRAS["ray"], *EXTRAS["keyring"]]} | {"fedscan", "ray"}
    providers = packages_distributions()
    for room in ("app", "client", "server", "models", "core"):
        for path in (ROOT / room).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Import):
                    names = {alias.name for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                    names = {node.module}
                else:
                    continue
                for name in {name.split(".")[0] for name in names} - sys.stdlib_module_names:
                    if name.startswith("fedscan"):
                        continue
                    owners = {canonicalize_name(owner) for owner in providers.get(name, [])}
                    assert owners & declared, f"{path} imports {name}: not declared"
