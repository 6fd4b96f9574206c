"""Files made to harm: they are refused in bounded time and memory, nothing outside of the model is read, and nothing of them is run."""

from __future__ import annotations

import collections
import json
import math
import os
import pickle
import re
import struct
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import alnico
from alnico.analysis.results import SUMMARY, read_analysis
from alnico.checkpoint.open_model import open_model
from alnico.checkpoint.sidecars import copy_side_files
from alnico.checkpoint.statistics import open_statistics
from alnico.checkpoint.weight_files import INDEX
from alnico.errors import AlnicoError, ModelError, OutputError, RecipeError
from alnico.output.journal import FORM, NAME, format_line, read_journal
from alnico.plan.families import tied_heads
from alnico.tune.search.settings import read_search
from alnico.vocabulary.chat_template import template_of
from alnico.vocabulary.config_ids import changed_ids
from hostile.malformed import save, save_json
from hostile.pickle_files import spelled
from made import save_model
from made_pickles import pickled, tensor, zipped

ONE = {"w": ("F32", (2,))}
GOOD = tensor((2, 3), (3, 1))


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(AlnicoError) as caught:
        call()
    return str(caught.value)


@contextmanager
def memory_of_at_most(most: int) -> Iterator[None]:
    tracemalloc.start(1)
    try:
        yield
        taken = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert taken <= most


# Links, paths and things that are no files.


def outside(tmp_path: Path) -> tuple[Path, Path]:
    """A model, and a file beside it that is none of its."""
    (tmp_path / "private.txt").write_text("private")
    save(tmp_path / "model" / "model.safetensors", ONE)
    return tmp_path / "model", tmp_path / "private.txt"


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json", "README.md", "merges.txt", "anything.py"])
def test_a_side_file_that_links_out_of_the_model_is_refused_before_anything_is_merged(
    tmp_path: Path, name: str
) -> None:
    model, private = outside(tmp_path)
    (model / name).symlink_to(private)
    assert refusal(lambda: open_model(model)) == (
        f"{model / name}: is a link to {private}, outside the model's directory; expected a file inside it. "
        "If you trust the model, replace the link by the file itself; otherwise do not use the model."
    )
    with pytest.raises(ModelError, match="outside the model's directory"):
        copy_side_files(
            model, tmp_path / "out"
        ) if name != "README.md" and name != "config.json" else open_model(model)
    assert not (tmp_path / "out").exists()


def test_a_modules_folder_that_links_out_of_the_model_is_refused(tmp_path: Path) -> None:
    model, _ = outside(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "key.pem").write_text("private")
    (model / "1_Pooling").symlink_to(tmp_path / "folder")
    save_json(model / "modules.json", [{"path": "1_Pooling"}])
    assert "1_Pooling: is a link to" in refusal(lambda: open_model(model))


@pytest.mark.parametrize("path", ["../..", "..", "/etc", "a/../../b", "."])
def test_modules_json_names_no_folder_outside(tmp_path: Path, path: str) -> None:
    model, _ = outside(tmp_path)
    save_json(model / "modules.json", [{"path": path}])
    (tmp_path / "out").mkdir()
    open_model(model).close()
    copy_side_files(model, tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").rglob("*")] == ["modules.json"]


@pytest.mark.parametrize(
    "file",
    ["../private.safetensors", "/private.safetensors", "a/../../private.safetensors", "deep/s.safetensors"],
)
def test_an_index_reads_no_weights_outside(tmp_path: Path, file: str) -> None:
    save(tmp_path / "private" / "s.safetensors", ONE)
    save(tmp_path / "private.safetensors", ONE)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "deep").symlink_to(tmp_path / "private")
    save_json(tmp_path / "model" / INDEX, {"weight_map": {"w": file}})
    assert "outside the model's directory; expected a file inside it." in refusal(
        lambda: open_model(tmp_path / "model")
    )


def test_an_adapter_and_statistics_read_nothing_outside(tmp_path: Path) -> None:
    base, _ = outside(tmp_path)
    save(tmp_path / "private.safetensors", ONE)
    for name, summary in (("adapter", "adapter_config.json"), ("measured", "statistics.json")):
        (tmp_path / name).mkdir()
        save_json(
            tmp_path / name / summary, {"peft_type": "LORA", "schema": 1, "kind": "fisher", "tensors": {}}
        )
        (
            tmp_path
            / name
            / summary.replace("_config.json", "_model.safetensors").replace(".json", ".safetensors")
        ).symlink_to(tmp_path / "private.safetensors")
    assert "is a link to" in refusal(lambda: open_model(f"{base}+{tmp_path / 'adapter'}"))
    assert "is a link to" in refusal(lambda: open_statistics(str(tmp_path / "measured")))


def test_a_link_within_the_model_and_a_link_to_the_model_are_followed(tmp_path: Path) -> None:
    model, _ = outside(tmp_path)
    (model / "real.json").write_text('{"model_type": "llama"}')
    (model / "config.json").symlink_to("real.json")
    (tmp_path / "link").symlink_to(model)
    with open_model(tmp_path / "link") as opened:
        assert opened.config == {"model_type": "llama"}


@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.json", "tokenizer.json", "modules.json", INDEX]
)
def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(tmp_path: Path, name: str) -> None:
    model = save_model(
        tmp_path / "m",
        {"model.embed_tokens.weight": ("F32", np.ones((2, 2), np.float32))},
        {"model_type": "llama"},
    )
    (model / name).unlink(missing_ok=True)
    os.mkfifo(model / name)
    recipe = {"merge_method": "linear", "models": [str(model)], "tokenizer_source": "base"}
    assert refusal(lambda: alnico.plan(recipe)) != ""


# Pickles.


@pytest.mark.parametrize(
    "body",
    [
        pickle.BINUNICODE + struct.pack("<I", (1 << 32) - 1),
        pickle.BINUNICODE8 + struct.pack("<Q", 1 << 40),
        pickle.BINBYTES8 + struct.pack("<Q", 1 << 40),
        pickle.BYTEARRAY8 + struct.pack("<Q", 1 << 32),
        pickle.LONG4 + struct.pack("<i", (1 << 31) - 1),
        pickle.NONE + pickle.LONG_BINPUT + struct.pack("<I", (1 << 32) - 1),
        pickle.FRAME + struct.pack("<Q", 1 << 40),
    ],
)
def test_a_pickle_takes_no_memory_that_it_does_not_fill(tmp_path: Path, body: bytes) -> None:
    read = spelled(body)(tmp_path)
    with memory_of_at_most(1 << 20):
        try:
            read()
        except ModelError:
            return


def test_a_pickle_changes_nothing_of_this_process(tmp_path: Path) -> None:
    """A state is set on classes and functions that Python's unpickler finds: ``Counter.update = "gone"``."""
    state = pickle.MARK + pickle.NONE + pickled({"update": "gone"})[2:-1] + pickle.TUPLE
    for name in (b"ccollections\nCounter\n", b"ctorch._utils\n_rebuild_tensor_v2\n"):
        assert "a state for a name" in refusal(spelled(name + state + pickle.BUILD)(tmp_path))
    assert callable(collections.Counter.update)
    assert collections.Counter.__dict__["update"] is not None


def test_keys_that_take_for_ever_to_hash_are_refused(tmp_path: Path) -> None:
    deep = pickle.EMPTY_TUPLE + pickle.BINPUT + b"\0" + b"".join(
        pickle.POP + pickle.BINGET + b"\0" + pickle.BINGET + b"\0" + pickle.TUPLE2 + pickle.BINPUT + b"\0" for _ in range(60)
    )  # fmt: skip
    told = refusal(spelled(pickle.EMPTY_DICT + deep + pickle.NONE + pickle.SETITEM)(tmp_path))
    assert "(UnpicklingError: a key of the type tuple)" in told
    for name in (b"c__builtin__\nset\n", b"ccollections\nCounter\n", b"ctorch\nSize\n"):
        read = spelled(name + pickle.EMPTY_LIST + deep + pickle.APPEND + pickle.TUPLE1 + pickle.REDUCE)(
            tmp_path
        )
        try:
            read()
        except ModelError:
            continue


def test_shapes_that_take_for_ever_to_print_are_refused(tmp_path: Path) -> None:
    shape: tuple[Any, ...] = (1,)
    for _ in range(40):
        shape = (shape, shape)
    (tmp_path / "m.pt").write_bytes(zipped(pickled({"w": tensor(shape, shape)})))
    assert "a tensor without a storage, a dtype and non-negative sizes" in refusal(
        lambda: open_model(tmp_path / "m.pt")
    )


def test_a_state_dict_that_holds_itself_is_refused(tmp_path: Path) -> None:
    held: dict[str, Any] = {"w": GOOD}
    held["model"] = held
    (tmp_path / "m.pt").write_bytes(zipped(pickled(held)))
    assert refusal(lambda: open_model(tmp_path / "m.pt")) == (
        f"{tmp_path}/m.pt: its tensors are inside more than 8 wrappers, model.model.model and so on; expected a state dict in one or two. "
        "Save the model's state_dict() and use that file."
    )


def test_a_record_that_unpacks_to_much_is_not_unpacked(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "m.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(zipfile.ZipInfo("m/data.pkl"), pickled({"w": GOOD}), zipfile.ZIP_STORED)
        archive.writestr("m/byteorder", bytes(64 << 20))
    with memory_of_at_most(4 << 20):
        assert "m/byteorder has 67108864 bytes or is compressed" in refusal(
            lambda: open_model(tmp_path / "m.pt")
        )


# JSON.


def test_numbers_that_no_float_holds_are_refused(tmp_path: Path) -> None:
    big = "9" * 400
    save(tmp_path / "s" / "statistics.safetensors", ONE)
    told = f'{{"schema": 1, "kind": "fisher", "tensors": {{"w": {{"digest": "0", "mean": {big}}}}}}}'
    save_json(tmp_path / "s" / "statistics.json", told)
    with pytest.raises(ModelError, match="has no mean of w"):
        open_statistics(str(tmp_path / "s")).number("w", "mean")
    begun = format_line({"journal": FORM, "made": [], "fingerprint": {}})
    for fields in ({"fact": math.inf, "value": []}, {"norms": 0, "value": [int(big)]}, {"tensor": 1}):
        (tmp_path / NAME).write_text(begun + format_line(fields))
        with pytest.raises(OutputError, match="is damaged"):
            read_journal(tmp_path, {})
    (tmp_path / NAME).write_text(begun + "[" * 100_000 + "\n")
    assert not read_journal(
        tmp_path, {}
    )  # a line without its check was cut off: what follows it is not known
    (tmp_path / NAME).write_text(format_line({"journal": FORM, "made": [], "fingerprint": []}))
    with pytest.raises(OutputError, match="is damaged"):
        read_journal(tmp_path, {"recipe": 1})


def test_an_analysis_with_a_norm_that_no_float_holds_is_refused_by_a_merge(tmp_path: Path) -> None:
    for name in ("base", "a", "b"):
        save(tmp_path / name / "model.safetensors", ONE)
    tensors = [{"name": "w", "shape": [2], "changes": [{"l2": 10**400}, {"l2": 1.0}]}]
    summary = {
        "schema": 1,
        "base": {"reference": "base"},
        "models": [{"reference": "a"}, {"reference": "b"}],
        "tensors": tensors,
    }
    save_json(tmp_path / SUMMARY, summary)
    weight = {"from": "analysis", "path": str(tmp_path / SUMMARY)}
    recipe = {
        "merge_method": "task_arithmetic", "base_model": str(tmp_path / "base"), "models": [str(tmp_path / n) for n in "ab"],
        "parameters": {"weight": weight},
    }  # fmt: skip
    assert "summary.json: is damaged (" in refusal(lambda: alnico.plan(recipe))
    with pytest.raises(ModelError):
        read_analysis(tmp_path / SUMMARY)


def test_odd_values_of_configs_and_templates_are_passed_over(tmp_path: Path) -> None:
    assert tied_heads({"text_config": 5}, ["model.embed_tokens.weight"], ["lm_head.weight"]) == {}
    assert changed_ids({"eos_token_id": [{}, 1]}, lambda _, i: i + 1) == {"eos_token_id": [{}, 2]}
    save_json(
        tmp_path / "tokenizer_config.json",
        {"chat_template": [{"name": [1], "template": "a"}, {"name": "default", "template": "b"}]},
    )
    assert template_of(tmp_path) == "b"


def test_a_tokenizer_of_half_characters_is_refused_and_not_written(tmp_path: Path) -> None:
    save_json(tmp_path / "tokenizer_config.json", '{"chat_template": "\\ud83e"}')
    assert "contains half of a character (a lone surrogate); expected Unicode text" in refusal(
        lambda: template_of(tmp_path)
    )
    save_json(tmp_path / "tokenizer_config.json", '{"chat_template": "\\ud83e\\uddf2"}')
    assert template_of(tmp_path) == "\U0001f9f2"


def test_a_chat_template_is_text_that_is_carried_and_never_run(tmp_path: Path) -> None:
    """No Jinja is imported, whatever a template says."""
    import subprocess
    import sys

    mark = tmp_path / "mark"
    model = save_model(tmp_path / "m", {"w": ("F32", np.ones(4, np.float32))}, {"model_type": "llama"})
    template = (
        f"{{{{ ''.__class__.__mro__[1].__subclasses__() }}}}{{% for x in range(10**9) %}}{mark}{{% endfor %}}"
    )
    (model / "chat_template.jinja").write_text(template)
    code = (
        "import alnico, sys; alnico.merge({'merge_method': 'linear', 'models': [sys.argv[1]], 'chat_template': 'auto'}, sys.argv[2]); "
        "print('jinja2' in sys.modules)"
    )
    shown = subprocess.run(
        [sys.executable, "-c", code, str(model), str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert shown.stdout.splitlines()[-1] == "False"
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == template
    assert not mark.exists()


def test_a_search_of_too_many_values_is_refused() -> None:
    many = (
        "merge_method: linear\nmodels: [a, b]\nparameters:\n  weight: ["
        + "{search: [0, 1]}, " * 5_001
        + "1]\n"
    )
    with pytest.raises(RecipeError) as caught:
        read_search(many)
    assert (
        str(caught.value)
        == "recipe:4: more than 5000 values to search; expected fewer. Search one value for several tensors."
    )


def test_a_search_of_all_parameters_at_once_is_refused() -> None:
    with pytest.raises(
        RecipeError, match=r"recipe:4: parameters is 0\.1; expected a mapping of option names to values\."
    ):
        read_search("merge_method: ties\nbase_model: c\nmodels: [a, b]\nparameters: {search: [0.1, 1.0]}\n")


def test_no_part_of_alnico_unpickles_loads_yaml_of_any_type_or_renders_templates() -> None:
    """The only pickles that are loaded are those of workers that this process started itself, and of the driver of nodes."""
    from test_house import SOURCE

    found = {
        (path.relative_to(SOURCE).as_posix(), word)
        for path in SOURCE.rglob("*.py")
        for word in (
            "pickle.load",
            "pickle.Unpickler",
            "torch.load",
            "yaml.load(",
            "yaml.unsafe",
            "jinja2",
            "allow_pickle=True",
            "eval(",
        )
        if re.search(rf"(?<![\w.]){re.escape(word)}", path.read_text())
    }
    assert found == {("tune/search/workers.py", "pickle.load"), ("cluster/pool.py", "pickle.load")}


def test_json_of_any_kind_in_the_place_of_a_tokenizer_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "model.safetensors", {"model.embed_tokens.weight": ("F32", (2, 2))})
    recipe = {"merge_method": "linear", "models": [str(tmp_path)], "tokenizer_source": "base"}
    for value in ([1], "x", 5, None, True):
        (tmp_path / "tokenizer.json").write_text(json.dumps(value))
        assert "expected an object" in refusal(lambda: alnico.plan(recipe))


def test_the_ends_of_many_dimensions_are_not_looked_at_where_the_default_is_wrong(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each end reads the whole file again, so that a small file with a mistake took seconds."""
    from alnico.tune.search import space

    read = space.read_document
    times: list[int] = []
    monkeypatch.setattr(space, "read_document", lambda *given: times.append(1) or read(*given))
    many = (
        "merge_method: ties\nbase_model: b\nmodels: [a, c]\nparameters: ["
        + "{density: {search: [0.1, 1.0]}}, " * 300
        + "]\n"
    )
    with pytest.raises(RecipeError, match="parameters is a list"):
        read_search(many)
    assert len(times) == 1
