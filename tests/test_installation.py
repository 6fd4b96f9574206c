"""What is said where a package is missing: a command that works for the copy of alnico that says it."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import alnico
from alnico import installation
from alnico.errors import AlnicoError

SOURCE = Path(alnico.__file__).parent
FILES = ("__init__.py", "_package.py", "_version.py", "errors.py", "installation.py")

GIT: dict[str, Any] = {"url": "https://example.com/team/alnico.git", "vcs_info": {"vcs": "git", "commit_id": "c0ffee"}}  # fmt: skip
AT_GIT = "alnico{} @ git+https://example.com/team/alnico.git@c0ffee"
ARCHIVE: dict[str, Any] = {"url": "https://example.com/alnico-0.1.0.tar.gz", "archive_info": {}}
PACKAGES = "Run: pip install 'no-such-package>=2' 'no-such-other[all]>=1,<2'"


def installed(site: Path, record: Any) -> Path:
    """An installed copy of alnico: the files that give hints, metadata, and pip's record of where it came from."""
    (site / "alnico").mkdir(parents=True)
    for name in FILES:
        shutil.copy(SOURCE / name, site / "alnico" / name)
    info = site / "alnico-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        "Metadata-Version: 2.4\nName: alnico\nVersion: 0.1.0\nProvides-Extra: eval\nRequires-Dist: numpy>=1\n"
        "Requires-Dist: no-such-package>=2; extra == 'eval'\n"
        "Requires-Dist: no-such-other[all]<2,>=1; python_version > '3' and extra == 'eval'\n"
        "Requires-Dist: pytest; extra == 'eval'\n".replace("<2,>=1", ">=1,<2")
    )
    if record is not None:
        (info / "direct_url.json").write_text(record if isinstance(record, str) else json.dumps(record))
    return site


def said(site: Path, where: Path, *flags: str) -> tuple[str, str]:
    """The hint and the public address of an installed copy, in a working directory."""
    code = "from alnico.installation import *; print(install_hint('eval')); print(public_requirement())"
    done = subprocess.run(
        [sys.executable, *flags, "-c", code], cwd=where, capture_output=True, text=True, check=True, env={"PYTHONPATH": str(site)}
    )  # fmt: skip
    hint, address = done.stdout.splitlines()
    return hint, address


def checkout(path: Path) -> Path:
    path.mkdir(parents=True)
    (path / "pyproject.toml").write_text(
        '[project]\nname = "alnico"\n[project.optional-dependencies]\neval = ["other-package>=3; python_version > \'3\'"]\n'
    )
    return path


@pytest.mark.parametrize(
    ("record", "place", "address"),
    [
        (GIT, AT_GIT.format("[eval]"), AT_GIT.format("")),
        (
            {**GIT, "subdirectory": "python"},
            AT_GIT.format("[eval]") + "#subdirectory=python",
            AT_GIT.format("") + "#subdirectory=python",
        ),
        (
            ARCHIVE,
            "alnico[eval] @ https://example.com/alnico-0.1.0.tar.gz",
            "alnico @ https://example.com/alnico-0.1.0.tar.gz",
        ),
        (
            {**GIT, "url": "ssh://git@example.com/a.git"},
            "alnico[eval] @ git+ssh://git@example.com/a.git@c0ffee",
            "None",
        ),
        (
            {**GIT, "url": "https://user:pw@example.com/a.git"},
            "alnico[eval] @ git+https://user:pw@example.com/a.git@c0ffee",
            "None",
        ),
        (
            {**ARCHIVE, "url": "https://example.com/a.whl?token=1"},
            "alnico[eval] @ https://example.com/a.whl?token=1",
            "None",
        ),
        (
            {**GIT, "url": "https://gitlab.corp/a.git"},
            "alnico[eval] @ git+https://gitlab.corp/a.git@c0ffee",
            "None",
        ),
        (
            {**GIT, "url": "https://10.0.0.1/a.git"},
            "alnico[eval] @ git+https://10.0.0.1/a.git@c0ffee",
            "None",
        ),
        (
            {**GIT, "url": "http://example.com/a.git"},
            "alnico[eval] @ git+http://example.com/a.git@c0ffee",
            "None",
        ),
    ],
    ids=["git", "part", "archive", "ssh", "password", "query", "corp", "number", "http"],
)
def test_a_copy_from_an_address_names_it_and_publishes_only_public_ones(
    tmp_path: Path, record: Any, place: str, address: str
) -> None:
    hint, public = said(installed(tmp_path / "site", record), tmp_path)
    assert hint == f"Run: pip install '{place}' (it adds no-such-package>=2, no-such-other[all]>=1,<2)"
    assert public == address


def test_a_copy_from_a_checkout_names_it_and_publishes_nothing(tmp_path: Path) -> None:
    made = checkout(tmp_path / "a check's out")
    site = installed(tmp_path / "site", {"url": made.as_uri(), "dir_info": {}})
    hint, public = said(site, tmp_path)
    command = hint.removeprefix("Run: ").partition(" (it adds")[0]
    assert shlex.split(command) == ["pip", "install", f"{made}[eval]"]
    assert public == "None"
    assert said(site, made)[0].startswith("Run: pip install '.[eval]' (it adds no-such-package>=2,")


def test_a_wheel_that_is_still_there_is_named(tmp_path: Path) -> None:
    wheel = tmp_path / "alnico-0.1.0-py3-none-any.whl"
    wheel.touch()
    site = installed(tmp_path / "site", {"url": wheel.as_uri(), "archive_info": {}})
    assert said(site, tmp_path) == (
        f"Run: pip install '{wheel}[eval]' (it adds no-such-package>=2, no-such-other[all]>=1,<2)",
        "None",
    )
    wheel.unlink()
    assert said(site, tmp_path) == (PACKAGES, "None")


@pytest.mark.parametrize("record", [None, "no json", "[]", {"url": 3}, {"url": "https://example.com/x"}, {"url": "file:///gone"}, {"url": "what://x"}])  # fmt: skip
def test_without_a_place_the_packages_are_named(tmp_path: Path, record: Any) -> None:
    assert said(installed(tmp_path / "site", record), tmp_path) == (PACKAGES, "None")


def test_without_metadata_the_checkout_is_asked_for(tmp_path: Path) -> None:
    site = installed(tmp_path / "site", None)
    shutil.rmtree(site / "alnico-0.1.0.dist-info")
    without_ours = "-S"  # no site-packages, which may have metadata of alnico
    assert said(site, tmp_path, without_ours) == (
        "In a checkout of alnico, run: pip install '.[eval]'",
        "None",
    )


def test_code_that_runs_in_a_checkout_names_it(tmp_path: Path) -> None:
    made = checkout(tmp_path / "made")
    site = installed(made / "src", None)
    assert said(site, tmp_path)[0] == f"Run: pip install -e '{made}[eval]' (it adds other-package>=3)"
    assert said(site, made)[0] == "Run: pip install -e '.[eval]' (it adds other-package>=3)"


def test_every_extra_that_is_named_in_a_hint_is_there() -> None:
    import ast
    import tomllib

    extras = tomllib.loads((SOURCE.parents[1] / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    named = set()
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("import_extra", "install_hint"):
                last = node.args[-1]
                named |= {last.value} if isinstance(last, ast.Constant) else set()
    assert named == {"cuda", "eval", "report", "search", "ray", "remote", "sign", "torch"}
    assert named < set(extras)


def test_a_package_that_cannot_be_imported_is_not_called_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_package.py").write_text("from json import no_such_name\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(
        AlnicoError,
        match=r"^a test needs broken_package, which cannot be imported \(cannot import name .*\); expected versions that fit",
    ):
        installation.import_extra("broken_package", "a test", "eval")
