"""House rules that no type checker holds: who imports whom, what is light, what stays small."""

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = {
    "fedscan": ROOT / "app/fedscan",
    "fedscan_client": ROOT / "client/fedscan_client",
    "fedscan_server": ROOT / "server/fedscan_server",
    "fedscan_models": ROOT / "models/fedscan_models",
    "fedscan_core": ROOT / "core/fedscan_core",
}
# Every arrow points down. Client and server never meet; nothing imports the front door.
MAY_IMPORT = {
    "fedscan": {"fedscan_client", "fedscan_server", "fedscan_models", "fedscan_core"},
    "fedscan_client": {"fedscan_models", "fedscan_core"},
    "fedscan_server": {"fedscan_models", "fedscan_core"},
    "fedscan_models": {"fedscan_core"},
    "fedscan_core": set[str](),
}
HEAVY = {"torch", "flwr", "monai", "opacus", "ray"}
MAX_LINES = 400

# A developer's folders, and hosts that packages come from: both are the reader's own affair.
PRIVATE_TEXT = re.compile(
    r"(?<![\w.$}])/(?:home|Users|root|work|tmp/w)/|[A-Z]:\\Users\\"
    r"|pypi\.org|pythonhosted\.org|download\.pytorch\.org"
)
TEXT_SUFFIXES = {"", ".py", ".md", ".toml", ".txt", ".sh", ".service", ".html", ".css", ".csv"}
TEXT_FOLDERS = ("app", "client", "server", "models", "core", "configs", "scripts", "tests", ".ci")

SOURCES = sorted(path for folder in ROOMS.values() for path in folder.rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imported(tree: ast.AST) -> set[str]:
    """Top-level names of everything imported anywhere in the tree, also by name as a string."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            names |= {str(arg.value) for arg in node.args if isinstance(arg, ast.Constant)}
    return {name.split(".")[0] for name in names}


def run_python(code: str, cwd: Path) -> str:
    """Standard output of a fresh interpreter started in `cwd`."""
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, env=os.environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_sources_were_found() -> None:
    for room, folder in ROOMS.items():
        assert (folder / "__init__.py").is_file(), f"{room} is not where this file looks for it"
        assert (folder / "py.typed").is_file(), f"{room} does not tell its users that it is typed"


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_import_only_downwards(room: str) -> None:
    for path in ROOMS[room].rglob("*.py"):
        found = imported(ast.parse(path.read_text())) & ROOMS.keys()
        extra = found - MAY_IMPORT[room] - {room}
        assert not extra, f"{name_of(path)} imports {sorted(extra)}; see MAY_IMPORT"


def test_the_import_rule_catches_every_spelling() -> None:
    spellings = (
        "import fedscan_server",
        "import fedscan_server.app as x",
        "from fedscan_server.app import y",
        "def f():\n    from fedscan_server import z",
        "import importlib\nimportlib.import_module('fedscan_server.app')",
    )
    for code in spellings:
        assert "fedscan_server" in imported(ast.parse(code)), code


def module_level(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements that run when the module is imported, without those for type checkers only."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            continue
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        for inner in ("body", "orelse", "finalbody"):
            yield from module_level(getattr(node, inner, []))
        for handler in getattr(node, "handlers", []):
            yield from module_level(handler.body)


def test_core_imports_nothing_heavy_at_module_level() -> None:
    for path in ROOMS["fedscan_core"].rglob("*.py"):
        for node in module_level(ast.parse(path.read_text()).body):
            heavy = imported(node) & HEAVY
            assert not heavy, f"{name_of(path)}, line {node.lineno}: {sorted(heavy)}"


def test_importing_core_loads_nothing_heavy(tmp_path: Path) -> None:
    """The rule above, through other people's packages too."""
    core = ROOMS["fedscan_core"]
    modules = [
        ".".join(["fedscan_core", *path.relative_to(core).with_suffix("").parts])
        for path in core.rglob("*.py")
        if path.name != "__init__.py"
    ]
    loaded = run_python(f"import sys, {', '.join(modules)}; print(*sys.modules)", tmp_path).split()
    assert not HEAVY & set(loaded)


def test_help_loads_nothing_heavy(tmp_path: Path) -> None:
    """`fedscan --help` answers at once: a room is imported only when its command runs."""
    code = """
import sys
sys.argv = ["fedscan", "--help"]
from fedscan.cli import main
try:
    main()
except SystemExit as stop:
    assert not stop.code, stop.code
print("loaded:", *sys.modules)
"""
    answer, _, loaded = run_python(code, tmp_path).rpartition("loaded:")
    assert "simulate" in answer
    assert not HEAVY & set(loaded.split())


def test_room_folders_are_not_packages(tmp_path: Path) -> None:
    """`import client` must fail: a package of that name would collide with other people's."""
    code = """
from importlib.util import find_spec
for name in ("app", "client", "server", "models", "core"):
    spec = find_spec(name)
    print(*(spec.submodule_search_locations or [] if spec else []))
"""
    assert str(ROOT) not in run_python(code, tmp_path)


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_every_module_says_what_it_is(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text())), f"{name_of(path)} has no docstring"


@pytest.mark.parametrize("path", SOURCES + TESTS, ids=name_of)
def test_files_stay_small(path: Path) -> None:
    lines = len(path.read_text().splitlines())
    assert lines <= MAX_LINES, f"{name_of(path)} has {lines} lines: one subject per file"


def test_nothing_of_a_developers_machine_is_left_in_the_text() -> None:
    files = [path for path in ROOT.iterdir() if path.is_file() and path.name != ".git"]
    for folder in TEXT_FOLDERS:
        files += [path for path in (ROOT / folder).rglob("*") if path.is_file()]
    found = []
    for path in files:
        if path.suffix not in TEXT_SUFFIXES or "__pycache__" in path.parts:
            continue
        for number, line in enumerate(path.read_text().splitlines(), start=1):
            if PRIVATE_TEXT.search(line):
                found.append(f"{name_of(path)}:{number}: {line.strip()}")
    assert not found, "\n".join(found)
