"""The house as a whole: imports go one way, methods are found, importing costs little, documents are true."""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.util
import inspect
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

import alnico
from alnico.methods import registry
from alnico.run_options import option_texts
from alnico.testing import MethodCase, check_docstring

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "alnico"

ROOMS = [
    "_package", "_version", "errors", "folders", "libraries", "installation", "notebook", "numerics", "events", "devices", "run_options", "threads", "kernels", "checkpoint", "cluster", "methods", "recipe", "vocabulary", "plan",
    "output", "engine", "verification", "models", "lora", "analysis", "evaluation", "tune", "values", "store", "api", "demo", "cli", "app", "testing",
]  # fmt: skip
"""As in docs/design.md, section 2; a room imports only rooms before it. ``api`` is the public functions over all rooms."""


def room_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


@functools.cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"))


def imported_rooms(path: Path) -> set[str]:
    """Rooms a file imports, imports inside functions included; the package itself counts as ``api``."""
    found = set()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = (
                [f"{node.module}.{alias.name}" for alias in node.names]
                if node.module == "alnico"
                else [str(node.module)]
            )
        else:
            continue
        found |= {name.split(".")[1] for name in names if name.startswith("alnico.")}
        found |= {"api" for name in names if name == "alnico"}
    return found


@pytest.mark.parametrize(
    "path",
    [p for p in SOURCE.rglob("*.py") if p.parent != SOURCE or p.stem in ROOMS],
    ids=lambda p: str(p.relative_to(SOURCE)),
)
def test_a_room_imports_only_rooms_above_it(path: Path) -> None:
    room = room_of(path)
    above = ROOMS[: ROOMS.index(room) + 1]
    assert imported_rooms(path) <= set(above), f"{path} imports from below"


def modules() -> dict[str, Path]:
    """All files of the source, by the name under which they are imported."""
    names = {
        ".".join(p.relative_to(SOURCE.parent).with_suffix("").parts).removesuffix(".__init__"): p
        for p in SOURCE.rglob("*.py")
    }
    return names


def imported_modules(path: Path, names: dict[str, Path]) -> set[str]:
    """The files that a file imports, imports inside functions included; a name of a package counts as its ``__init__``."""
    found: set[str] = set()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name in names}
        elif isinstance(node, ast.ImportFrom):
            wanted = [(f"{node.module}.{alias.name}", str(node.module)) for alias in node.names]
            found |= {
                name if name in names else module
                for name, module in wanted
                if name in names or module in names
            }
    return found


ALLOWED_CIRCLES: dict[tuple[str, str], str] = {
    ("alnico.analysis.results", "alnico.analysis.pictures"): "Analysis.plot draws the analysis",
    (
        "alnico.analysis.retention",
        "alnico.analysis.retention_pictures",
    ): "Retention.plot draws the comparison",
    ("alnico.tune.search.result", "alnico.tune.search.pictures"): "SearchResult.plot draws the search",
    ("alnico.tune.curve.result", "alnico.tune.curve.picture"): "Curve.plot draws the curve",
}
"""Imports that close a circle on purpose, each with its reason."""


def test_no_files_import_one_another_in_a_circle() -> None:
    names = modules()
    graph = {
        name: {
            other for other in imported_modules(path, names) - {name} if (name, other) not in ALLOWED_CIRCLES
        }
        for name, path in names.items()
    }
    while leaves := [name for name, others in graph.items() if not others & set(graph)]:
        for name in leaves:
            del graph[name]
    assert not graph, f"these files are on a circle, or import one: {sorted(graph)}"


def public_types(path: Path) -> list[str]:
    """Names of the classes and type aliases that a file defines at its top level; a leading underscore does not count."""
    names = []
    for node in tree_of(path).body:
        if isinstance(node, ast.ClassDef):
            names.append(node.name)
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            names.append(node.targets[0].id)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.append(node.target.id)
    plain = [name.lstrip("_") for name in names]
    return [
        name
        for name in plain
        if name[:1].isupper() and not name.isupper() and not name.replace("_", "").isupper()
    ]


def test_a_types_name_has_one_meaning() -> None:
    places: dict[str, list[str]] = {}
    for name, path in modules().items():
        for one in public_types(path):
            places.setdefault(one, []).append(name)
    assert {name: where for name, where in places.items() if len(where) > 1} == {}


MAKES_THREADS = {
    "numerics/arithmetic.py": "defines ieee_threads",
    "threads.py": "the one user of ieee_threads",
    "output/journal.py": "one thread writes the journal while others compute; it ends with its run",
    "output/shard_uploads.py": "sends shards to a URL while others are made; an interrupted run does not wait for its requests",
    "checkpoint/network.py": "downloads and uploads of the hub, which end with the process if they hang",
    "engine/reading_ahead.py": "threads that wait for servers; they end with the process if a server hangs",
    "engine/disk_ahead.py": "asks the system for what is read next, which waits where it has many requests; it ends with its run",
    "tune/search/workers.py": "a thread in each worker process waits for its parent's end",
}
"""Files that may make threads, each with its reason. All others use :class:`alnico.threads.Crew`, so that Ctrl-C has one behaviour."""


def test_threads_are_made_in_one_place() -> None:
    names = {"ThreadPoolExecutor", "ieee_threads", "Thread"}
    users = {
        str(path.relative_to(SOURCE))
        for path in SOURCE.rglob("*.py")
        for node in ast.walk(tree_of(path))
        if (isinstance(node, ast.Name) and node.id in names)
        or (isinstance(node, ast.Attribute) and node.attr in names)
        or (isinstance(node, ast.alias) and node.name in names)
    }
    assert users == set(MAKES_THREADS)


def test_the_rooms_are_the_designs() -> None:
    design = (ROOT / "docs" / "design.md").read_text()
    rooms = {
        p.name.removesuffix(".py")
        for p in SOURCE.iterdir()
        if not p.name.startswith("_") and p.name != "py.typed"
    }
    assert rooms <= set(ROOMS)
    listed = [
        r
        for r in ROOMS
        if r
        not in (
            "_package",
            "_version",
            "errors",
            "folders",
            "libraries",
            "installation",
            "notebook",
            "threads",
            "events",
            "devices",
            "run_options",
            "api",
            "cli",
            "app",
        )
    ]
    places = [design.index(f"      {room}/") for room in listed]
    assert places == sorted(places), "the list of rooms in docs/design.md has another order"


def test_the_design_lists_every_file() -> None:
    spec = importlib.util.spec_from_file_location("make_map", ROOT / "docs" / "make_map.py")
    assert spec is not None
    assert spec.loader is not None
    generator = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generator)
    text = (ROOT / "docs" / "design.md").read_text("utf-8")
    listed = set(re.findall(r"(?m)^ +(\w+\.py) ", text.partition("## 7.")[2]))
    assert {p.name for p in SOURCE.rglob("*.py") if p.stem not in ("__init__", "__main__")} == listed
    assert generator.page(text) == text, "docs/design.md is out of date: run `python docs/make_map.py`"


def test_the_first_line_of_a_file_fits_on_a_line_of_the_map() -> None:
    long = {
        str(path.relative_to(SOURCE)): len(line)
        for path in modules().values()
        if len(line := (ast.get_docstring(ast.parse(path.read_text("utf-8"))) or "").partition("\n")[0]) > 110
    }
    assert long == {}


def test_a_method_is_called_like_its_file() -> None:
    files = {
        p.stem for p in (SOURCE / "methods").glob("*.py") if not p.name.startswith("_") and p.stem != "base"
    }
    assert files == set(registry())


@pytest.mark.parametrize("name", list(registry()))
def test_a_methods_docstring_has_the_parts_of_the_style(name: str) -> None:
    method = registry()[name]
    check_docstring(MethodCase(method))
    for option in method.options.values():
        assert f"    {option.name}:" in method.documentation
        assert option.meaning or option.kind == "choice"


def test_importing_alnico_loads_neither_numba_nor_torch_nor_numpy() -> None:
    code = (
        "import alnico, sys; heavy = {'numba', 'torch', 'numpy', 'yaml', 'click', 'rich', 'transformers', 'huggingface_hub'}; "
        "print(sorted(heavy & set(sys.modules)))"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        == "[]\n"
    )


def test_planning_loads_no_numba(tmp_path: Path) -> None:
    from made import family

    base, tuned = family(tmp_path, 2)
    code = (
        "import alnico, sys; "
        f"alnico.plan({{'merge_method': 'ties', 'base_model': {str(base)!r}, 'models': {[str(t) for t in tuned]!r}}}); "
        "print('numba' in sys.modules)"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        == "False\n"
    )


def test_the_help_is_there_at_once() -> None:
    begin = time.perf_counter()
    shown = subprocess.run(
        [sys.executable, "-m", "alnico", "--help"], capture_output=True, text=True, check=True
    ).stdout
    print(f"{time.perf_counter() - begin:.2f} s")  # shown with -s; no test asserts a time
    assert all(verb in shown for verb in ("merge", "plan", "inspect", "push", "methods", "schema", "demo"))


def test_every_public_name_is_there_and_documented() -> None:
    for name in alnico.__all__:
        assert getattr(alnico, name).__doc__ if name != "__version__" else alnico.__version__
    with pytest.raises(
        AttributeError, match=r"module 'alnico' has no attribute 'mege'\. Did you mean 'merge'\?"
    ):
        alnico.mege  # noqa: B018
    with pytest.raises(
        AttributeError, match=r"slerp is a merge method: alnico\.merge_models\(models, 'slerp'\)"
    ):
        alnico.slerp  # noqa: B018


@pytest.mark.parametrize("package", ["alnico", "alnico.lora", "alnico.recipe"])
def test_type_checkers_see_the_names_that_are_imported_on_first_use(package: str) -> None:
    path = modules()[package]
    block = next(
        n for n in tree_of(path).body if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"
    )
    seen = {
        (a.name, "" if n.module == package else n.module)
        for n in block.body
        if isinstance(n, ast.ImportFrom)
        for a in n.names
    }
    assert seen == set(vars(importlib.import_module(package))["_modules_of"].items())


def test_functions_that_share_a_rooms_name_stay_functions() -> None:
    import alnico.methods.base
    import alnico.plan.build

    assert callable(alnico.plan)
    assert callable(alnico.methods)
    assert "ties" in alnico.methods()


def test_every_error_has_an_exit_code_of_its_own_and_is_in_the_tree() -> None:
    from alnico import errors

    classes = [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, errors.AlnicoError)]
    assert errors.__doc__ is not None
    for one in classes:
        assert one.__name__ in errors.__doc__
    codes = [c.exit_code for c in classes if c is not errors.MethodError]
    assert len(codes) == len(set(codes))


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda p: str(p.relative_to(SOURCE)))
def test_a_line_of_an_error_is_an_argument_of_it(path: Path) -> None:
    """AlnicoError escapes newlines in its arguments, so that no name forges a line: messages of several lines have several arguments."""
    for node in ast.walk(tree_of(path)):
        name = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
        if isinstance(node, ast.Call) and name.rpartition(".")[2].endswith("Error"):
            constants = [
                c.value
                for a in node.args
                for c in ast.walk(a)
                if isinstance(c, ast.Constant) and isinstance(c.value, str)
            ]
            assert not any("\n" in c for c in constants), (
                f"{path}:{node.lineno}: {name}(*lines), not a newline in an argument"
            )
            nested = [
                ast.unparse(a)
                for a in node.args
                if ast.unparse(a).startswith("str(") and "error" in ast.unparse(a)
            ]
            assert not nested or name == "ValueError", (
                f"{path}:{node.lineno}: {name}(*error.args), as an error may have several lines"
            )


def test_nothing_is_printed_but_by_the_functions_for_it() -> None:
    """``print`` fails where a stream does, and prints names as they are: alnico.cli.printing does neither."""
    calls = {
        str(path.relative_to(SOURCE))
        for path in SOURCE.rglob("*.py")
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) in ("print", "sys.stdout.write", "sys.stderr.write")
    }
    assert calls <= {"cli/entry.py"}


def test_every_option_of_a_public_function_is_described() -> None:
    """The command line takes its help from these texts."""
    for function in (getattr(alnico, name) for name in alnico.__all__):
        is_package = function in (alnico.lora, alnico.recipe)
        names = [name for name in dir(function) if name[:1].islower()] if is_package else []
        for one in [*(getattr(function, name) for name in names), function]:
            if "Options:\n" in (one.__doc__ or "") and not isinstance(one, type) and one is not alnico.method:
                missing = set(inspect.signature(one).parameters) - set(option_texts(one))
                assert missing <= {"watch"} | (
                    {"options"}
                    if one
                    in (
                        alnico.merge_state_dicts,
                        alnico.make_recipe,
                        alnico.search_weights,
                        alnico.curve,
                        alnico.equip,
                    )
                    else set()
                ), one


def test_no_file_names_an_index_of_packages_or_a_package_that_is_on_none() -> None:
    """alnico is on no index of packages until its release: commands take a checkout, ``pip install '.[eval]'``."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a checkout of git")
    # Written in pieces, so that this file does not name them either.
    hosts = "|".join(("py" + "pi", "python" + "hosted"))
    forbidden = re.compile(rf"{hosts}|pip3? (install|download) [^\n&;]*\b" + r"alnico(\[|=|['\"`]|\s(?!@)|$)")
    found = [
        f"{name}: {line.strip()[:80]}"
        for name in listed.stdout.split("\0")[:-1]
        if (ROOT / name).is_file()
        for line in (ROOT / name).read_text("utf-8", "replace").splitlines()
        if forbidden.search(line)
    ]
    assert found == []


def test_the_citation_is_of_this_version_and_invents_nothing() -> None:
    """CITATION.cff in the format CFF 1.2, whose required keys are these four."""
    import yaml

    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= set(cited)
    assert cited["cff-version"] == "1.2.0"
    assert (cited["type"], cited["title"], cited["license"]) == ("software", "alnico", "Apache-2.0")
    assert cited["version"] == alnico.__version__
    assert cited["authors"] == [{"name": "The alnico authors"}]
    allowed = {
        "cff-version",
        "message",
        "type",
        "title",
        "abstract",
        "authors",
        "version",
        "license",
        "keywords",
    }
    assert set(cited) <= allowed, "an address, a DOI or a date is added with the release that has it"
