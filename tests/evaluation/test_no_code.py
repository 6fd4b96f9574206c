"""No code of a model runs when it is scored, measured or searched, and no call into other packages could run it."""

from __future__ import annotations

import ast
import contextlib
import functools
import io
import json
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import alnico
from alnico.errors import AlnicoError, ModelError
from alnico.evaluation.extras import quiet_transformers
from alnico.evaluation.loaded_model import open_subject
from alnico.evaluation.loading import load_module, load_tokenizer, without_code
from made_tasks import Made

SOURCES = Path(alnico.__file__).parent

CODE = """
from pathlib import Path
Path({mark!r}).write_text("ran")
from transformers import BertConfig as Config, BertModel as Model, PreTrainedTokenizerFast as Tokenizer
Config.model_type = "strange"
"""


@pytest.fixture
def answered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody on a pipe says yes to everything."""
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 100))


@pytest.fixture
def strange(made: Made, tmp_path: Path) -> Callable[..., Path]:
    """A copy of the base with code beside it, and keys in its configs."""

    def write(
        config: dict[str, Any] | None = None, tokenizer: dict[str, Any] | None = None, name: str = "strange"
    ) -> Path:
        folder = tmp_path / name
        shutil.copytree(made.base, folder)
        (folder / "evil.py").write_text(CODE.format(mark=str(tmp_path / "mark")))
        (folder / "custom_generate").mkdir()
        shutil.copy(folder / "evil.py", folder / "custom_generate" / "generate.py")
        for file, keys in (("config.json", config), ("tokenizer_config.json", tokenizer)):
            held = json.loads((folder / file).read_text()) | (keys or {})
            (folder / file).write_text(
                json.dumps({key: value for key, value in held.items() if value is not None})
            )
        return folder

    return write


AUTO = {"AutoConfig": "evil.Config", "AutoModel": "evil.Model", "AutoModelForCausalLM": "evil.Model"}


def commands(model: Path, made: Made, out: Path) -> dict[str, list[str]]:
    search = out.parent / "search.yml"
    search.write_text(
        f"merge_method: task_arithmetic\nbase_model: {model}\nmodels:\n"
        f"- {{model: {made.references[0]}, parameters: {{weight: {{search: [0, 1]}}}}}}\n"
        f"search: {{tasks: {made.valid}, trials: 1, sampler: random, failures: 1}}\n"
    )
    tasks = ["--tasks", str(made.valid)]
    return {
        "evaluate": ["evaluate", str(model), *tasks],
        "evaluate --base": ["evaluate", made.references[0], "--base", str(model), *tasks],
        "evaluate BASE+ADAPTER": ["evaluate", "--merged", str(model), *tasks],
        "soup": ["soup", str(model), made.references[0], *tasks, "--unrelated", "allow"],
        "adamerge": ["adamerge", made.references[0], "--base", str(model), *tasks, "--steps", "1"],
        "statistics fisher": ["statistics", "fisher", str(model), *tasks, "--out", str(out)],
        "statistics gram": ["statistics", "gram", str(model), *tasks, "--out", str(out)],
        "search": ["search", str(search), "--out", str(out)],
    }


@pytest.mark.usefixtures("answered")
def test_no_command_runs_the_code_of_a_model(
    run, made: Made, strange: Callable[..., Path], tmp_path: Path
) -> None:
    model = strange(
        {"model_type": "strange", "auto_map": AUTO}, {"auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]}}
    )
    for name, words in commands(model, made, tmp_path / "out").items():
        code, _, err = run(*words)
        assert code == 4, (name, err)
        assert "auto_map in config.json names code (evil.Config)" in err, name
        assert "alnico does not run a model's code" in err, name
    assert not (tmp_path / "mark").exists()


@pytest.mark.usefixtures("answered")
def test_a_model_that_transformers_knows_is_loaded_by_it(
    made: Made, strange: Callable[..., Path], tmp_path: Path
) -> None:
    model = strange({"auto_map": AUTO}, {"auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]}})
    own, known = open_subject(model), open_subject(made.base)
    for name, value in own.module("encoder").state_dict().items():
        assert torch.equal(value, known.module("encoder").state_dict()[name])
    text = "a cat0 noise1"
    assert own.tokenizer()(text)["input_ids"] == known.tokenizer()(text)["input_ids"]
    with pytest.raises(ModelError, match=r"lacks|auto_map in config\.json names code"):
        own.module("causal")
    assert not (tmp_path / "mark").exists()


@pytest.mark.usefixtures("answered")
@pytest.mark.parametrize(
    ("tokenizer", "told"),
    [
        ({"auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]}, "tokenizer_class": "Strange"}, None),
        ({"auto_map": ["evil.Tokenizer", None], "tokenizer_class": None}, None),
        ({"tokenizer_class": "AutoModel"}, "tokenizer_class is 'AutoModel', expected a tokenizer class"),
        (
            {"tokenizer_class": "AutoTokenizer"},
            "tokenizer_class is 'AutoTokenizer', expected a tokenizer class",
        ),
        ({"tokenizer_class": "pipeline"}, "tokenizer_class is 'pipeline', expected a tokenizer class"),
    ],
)
def test_no_tokenizer_runs_code(
    strange: Callable[..., Path], tmp_path: Path, tokenizer: dict[str, Any], told: str | None
) -> None:
    model = strange({"auto_map": AUTO, "model_type": "strange"}, tokenizer)
    if (
        told is None
    ):  # code is passed over, or the tokenizer refused: what is in tokenizer.json is enough for some versions of transformers
        with contextlib.suppress(ModelError):
            load_tokenizer(model, "strange")
    else:
        with pytest.raises(ModelError, match=told):
            load_tokenizer(model, "strange")
    assert not (tmp_path / "mark").exists()


@pytest.mark.usefixtures("answered")
@pytest.mark.parametrize(
    ("config", "tokenizer"),
    [
        ({"tokenizer_class": "AutoModel"}, {"tokenizer_class": ""}),
        ({"tokenizer_class": "AutoModel"}, {}),
        ({}, {"tokenizer_class": "AutoModelFast"}),
        ({}, {"tokenizer_class": "RagTokenizer"}),
        ({"model_type": "rag"}, {"tokenizer_class": ""}),
    ],
)
def test_nothing_but_a_tokenizer_is_loaded_as_one(
    strange: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    config: dict[str, Any],
    tokenizer: dict[str, Any],
) -> None:
    """A model that is loaded as a tokenizer takes the memory that its config claims, and has its pickles read by torch."""
    model = strange(
        {**config, "question_encoder": {"model_type": "bert"}, "generator": {"model_type": "bert"}}, tokenizer
    )
    if not tokenizer:
        held = json.loads((model / "tokenizer_config.json").read_text())
        (model / "tokenizer_config.json").write_text(json.dumps({**held, "tokenizer_class": None}))
    monkeypatch.setattr(
        "transformers.AutoModel.from_pretrained", lambda *_, **__: pytest.fail("a model was loaded")
    )
    with pytest.raises(ModelError, match="expected a tokenizer class"):
        load_tokenizer(model, "strange")


@pytest.mark.parametrize("longest", [-1, 0, "x", [], True, float("nan")])
def test_a_length_that_no_tokenizer_has_is_refused(strange: Callable[..., Path], longest: Any) -> None:
    with pytest.raises(ModelError, match=r"model_max_length is .*, expected a number of at least 1"):
        load_tokenizer(strange({}, {"model_max_length": longest}), "strange")


def test_a_tokenizer_that_makes_texts_longer_without_end_is_refused(strange: Callable[..., Path]) -> None:
    model = strange()
    held = json.loads((model / "tokenizer.json").read_text())
    step = {"type": "Replace", "pattern": {"String": "a"}, "content": "aaaaaaaaaa"}
    for normalizer in (
        {"type": "Sequence", "normalizers": [step] * 12},
        {**step, "content": "a" * 10_000},
        [{**step, "pattern": {"Regex": "b*"}, "content": "a"}] * 40,
    ):
        (model / "tokenizer.json").write_text(json.dumps({**held, "normalizer": normalizer}))
        with pytest.raises(
            ModelError, match=r"the normalizer of tokenizer\.json may make a text at least \d+ times as long"
        ):
            load_tokenizer(model, "strange")
    fine = [
        {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": "▁"},
        {"type": "Replace", "pattern": {"String": "``"}, "content": '"'},
    ] * 20
    (model / "tokenizer.json").write_text(
        json.dumps({**held, "normalizer": {"type": "Sequence", "normalizers": fine}})
    )
    load_tokenizer(model, "strange")


def test_whatever_a_tokenizer_raises_is_an_error_of_the_evaluation(
    run, made: Made, strange: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise OverflowError("can't convert negative int to unsigned")

    model = strange()
    monkeypatch.setattr("transformers.PreTrainedTokenizerBase.__call__", fails)
    code, _, err = run("evaluate", str(model), "--tasks", str(made.valid))
    assert code == 12
    assert "the evaluation raised OverflowError: can't convert negative int to unsigned" in err


def test_transformers_prints_no_values_of_a_config(strange: Callable[..., Path]) -> None:
    model = strange({"use_return_dict": "\nalnico: forged"})
    code = "import sys; sys.argv[0] = 'alnico'; from alnico.evaluation.loading import load_module; from pathlib import Path\n"
    code += f"try: load_module(Path({str(model)!r}), 'encoder', 'strange')\nexcept Exception as error: print(type(error).__name__)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert (found.stdout.strip(), found.stderr) == ("ModelError", "")


@pytest.mark.usefixtures("answered")
def test_transformers_never_asks_whether_code_may_run(strange: Callable[..., Path], tmp_path: Path) -> None:
    model = strange({"model_type": "strange", "auto_map": AUTO})
    with quiet_transformers() as transformers, pytest.raises(ValueError, match="custom code"):
        transformers.AutoConfig.from_pretrained(model)  # as a call inside transformers that is not told
    assert not (tmp_path / "mark").exists()


def test_what_a_config_says_of_kernels_and_files_is_left_out(
    made: Made, strange: Callable[..., Path]
) -> None:
    keys = {
        "attn_implementation": "kernels-community/flash-attn", "_attn_implementation": {"": "someone/evil"},
        "_attn_implementation_internal": "someone/evil", "experts_implementation": "someone/evil",
        "transformers_weights": "evil.safetensors", "configuration_files": ["config.4.0.0.json"], "custom_pipelines": {"x": {"impl": "evil.P"}},
    }  # fmt: skip
    model = strange(keys)
    (model / "config.4.0.0.json").write_text(json.dumps({"model_type": "strange", "auto_map": AUTO}))
    module = load_module(model, "encoder", "strange")
    assert (
        module.config._attn_implementation
        == load_module(made.base, "encoder", "base").config._attn_implementation
    )
    assert without_code({"text_config": keys, "attn_implementation": "eager"}) == {
        "text_config": {},
        "attn_implementation": "eager",
    }


def test_a_model_with_an_adapter_beside_it_is_refused(strange: Callable[..., Path], tmp_path: Path) -> None:
    model = strange()
    (model / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "base_model_name_or_path": str(tmp_path / "evil")})
    )
    with pytest.raises(
        ModelError, match=r"has both config\.json and adapter_config\.json; expected a model or an adapter"
    ):
        load_module(model, "encoder", "strange")


def test_a_pickle_is_read_by_alnico_and_never_by_torch(
    made: Made, strange: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = strange()
    known = load_module(made.base, "encoder", "base").state_dict()
    (model / "model.safetensors").unlink()
    torch.save(known, model / "pytorch_model.bin")
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("torch read the pickle"))
    found = load_module(model, "encoder", "strange").state_dict()
    assert all(torch.equal(found[name], value) for name, value in known.items())


def test_the_files_that_are_read_are_those_that_a_merge_reads(
    made: Made, strange: Callable[..., Path]
) -> None:
    """Of an index and ``model.safetensors`` transformers would take the file."""
    model = strange()
    module = load_module(made.base, "encoder", "base")
    shutil.move(model / "model.safetensors", model / "model-00001-of-00001.safetensors")
    index = {
        "metadata": {},
        "weight_map": dict.fromkeys(module.state_dict(), "model-00001-of-00001.safetensors"),
    }
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    from safetensors.torch import save_file

    save_file(
        {n: torch.zeros_like(v) for n, v in module.state_dict().items()},
        model / "model.safetensors",
        {"format": "pt"},
    )
    found = load_module(model, "encoder", "strange")
    assert all(torch.equal(found.state_dict()[name], value) for name, value in module.state_dict().items())


# ---- every call that could run code ---------------------------------------------------------------------------------------

GUARDED = {
    "from_pretrained": ("trust_remote_code", False),
    "from_config": ("trust_remote_code", False),
    "HFLM": ("trust_remote_code", False),
    "simple_evaluate": ("confirm_run_unsafe_code", False),
    "np.load": ("allow_pickle", False),
}
"""Calls that need a word which keeps them from running code."""

RISKY = frozenset({
    "import_module", "__import__", "exec", "eval", "compile", "exec_module", "spec_from_file_location", "loads", "load", "load_adapter",
    "load_dataset", "load_dataset_builder", "TaskManager", "manager", "pipeline", "SentenceTransformer", "get_class_from_dynamic_module",
    "get_kernel", "set_use_kernels", "run_path", "run_module", "system", "popen", "Popen", "run", "check_output", "check_call", "CDLL",
    "entry_points", "RDBStorage", "load_study", "Unpickler", "read_pickle", "load_extension", "generate",
})  # fmt: skip
"""Last names of calls that could run code of a file, a package or the hub."""

PLAIN = (
    "json.loads",
    "tomllib.loads",
    "re.compile",
    "run",
    "self.run",
    "crew.run",
    "self._crew.run",
    "cluster.run",
    "self._cluster.run",
    "self.cluster.run",
    "module.eval",
)

LISTED = {
    # where: {call: how many}; each with the reason why no stranger decides what is run
    "_package.py": {"importlib.import_module": 2},  # names of alnico's own modules
    "libraries.py": {"compile": 1},  # the source of an installed package that is imported
    "demo/models.py": {"subprocess.Popen": 1},  # pip, which downloads what it does not run
    "engine/warm.py": {"subprocess.Popen": 1},  # this Python, on texts of alnico's own kernels
    "kernels/tiles.py": {"builder.load": 3},  # instructions of LLVM that load a vector
    "installation.py": {"importlib.import_module": 1},  # packages that alnico names
    "devices.py": {"importlib.import_module": 3},  # torch, numba.cuda and numba_cuda
    "methods/__init__.py": {"importlib.import_module": 1, "importlib.metadata.entry_points": 1, "entry.load": 1},  # installed packages
    "checkpoint/page_cache.py": {"ctypes.CDLL": 1},  # the C library
    "checkpoint/durable.py": {"ctypes.CDLL": 1},  # the C library
    "checkpoint/patterns.py": {"sre_compiler.compile": 1},  # regular expressions
    "checkpoint/quota.py": {"ctypes.CDLL": 1},  # the C library
    "cluster/pool.py": {"pickle.loads": 2},  # what the driver of the same user sends over Ray
    "checkpoint/pickles.py": {
        "Unpickler": 3, "load": 5, "Unpickler(file, size, storages.find, storages.persistent, _set_state).load": 1,
        "Unpickler(io.BytesIO(text), len(text), storages.find, storages.persistent, _set_state).load": 1,
        "Unpickler(io.BytesIO(data), len(data), names.find, names.persistent, _set_state).load": 1,
    },  # alnico's own, which calls nothing
    "cli/command.py": {"importlib.import_module": 1},  # the public function of a command
    "cli/completion.py": {"subprocess.run": 1},  # PowerShell, which alone knows where its profile is
    "checkpoint/gguf/block_types.py": {"importlib.import_module": 2},  # names of alnico's own modules
    "cli/main.py": {"importlib.import_module": 1},  # the file of a command
    "kernels/build.py": {"compile": 1, "exec": 1, "ctypes.CDLL": 1},  # the code of merge methods, which are installed
    "kernels/array_source.py": {"compile": 1, "exec": 1},  # the same code, for numpy
    "kernels/cuda/elements.py": {"importlib.import_module": 1},  # names of alnico's own modules
    "kernels/cuda/instructions.py": {"builder.load": 2},  # llvmlite's instruction that reads memory
    "kernels/cuda/compiled.py": {"compile": 2, "exec": 2},  # the same code, for a GPU
    "kernels/cuda/memory.py": {"importlib.import_module": 3},  # numba.cuda and its parts
    "numerics/arrays.py": {"importlib.import_module": 1},  # torch
    "engine/matrix_gpu.py": {"importlib.import_module": 1},  # torch
    "evaluation/candidates.py": {"self._filled.eval": 1},  # a copy of the caller's module
    "evaluation/memory_subject.py": {"plain_copy(self._model).eval": 1},  # a copy of the caller's module
    "evaluation/user_function.py": {
        "importlib.import_module": 1, "importlib.util.spec_from_file_location": 1, "spec.loader.exec_module": 1,
    },  # functions of tasks files, with allow_code
    "evaluation/harness.py": {"manager": 2},  # tasks of lm-eval itself; others with allow_code
    "store/model_pair.py": {"TaskVector.load": 1},  # tensors in safetensors, never a pickle
    "tune/search/study.py": {"optuna.load_study": 1, "optuna.storages.RDBStorage": 1},  # plain values; the address needs allow_code
    "testing/checks.py": {"subprocess.run": 1},  # this Python, on a merge of the tests
    "verification/sign.py": {"check_output": 1},  # alnico's own, which starts nothing
    "verification/verify.py": {"check_output": 2},
    "store/unequip.py": {"check_output": 1},
    "tune/search/workers.py": {"pickle.loads": 1},  # what this process wrote itself
}  # fmt: skip


@functools.cache
def calls_of(path: Path) -> list[tuple[str, ast.Call]]:
    return [
        (ast.unparse(node.func), node)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
    ]


def test_every_call_that_could_run_code_is_guarded() -> None:
    for path in sorted(SOURCES.rglob("*.py")):
        for name, call in calls_of(path):
            word = GUARDED.get(name, GUARDED.get(name.rpartition(".")[2]))
            if word is None or "GenerationConfig" in name:  # JSON, of which no key names code
                continue
            given = {k.arg: k.value for k in call.keywords}
            if (
                word[0] not in given and None in given
            ):  # **options: the dict literal in the same file must have it
                assert f'"{word[0]}": {word[1]}' in path.read_text(), (
                    f"{path}:{call.lineno}: {name} without {word[0]}"
                )
                continue
            value: Any = given.get(word[0])
            assert isinstance(value, ast.Constant), (
                f"{path}:{call.lineno}: {name} without {word[0]}={word[1]}"
            )
            assert value.value is word[1], f"{path}:{call.lineno}: {name} without {word[0]}={word[1]}"


def test_benchmarks_and_examples_run_no_code_of_a_model() -> None:
    """Also in programs that they hold as text. PEFT's own loader takes no such word, and reads an adapter alone."""
    root = Path(__file__).parents[2]
    checked = 0
    for path in sorted([*root.glob("benchmarks/**/*.py"), *root.glob("examples/**/*.py")]):
        tree = ast.parse(path.read_text())
        held = [n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
        trees = [tree, *(ast.parse(text) for text in held if ".from_pretrained(" in text)]
        for call in (node for one in trees for node in ast.walk(one) if isinstance(node, ast.Call)):
            name = ast.unparse(call.func)
            if name.rpartition(".")[2] not in GUARDED or name.startswith("PeftModel.") or name == "np.load":
                continue
            word, expected = GUARDED[name.rpartition(".")[2]]
            found = [k.value for k in call.keywords if k.arg == word]
            assert [ast.unparse(v) for v in found] == [str(expected)], (
                f"{path}:{call.lineno}: {name} without {word}={expected}"
            )
            checked += 1
    assert checked >= 7


def test_an_old_datasets_which_runs_scripts_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from alnico.evaluation import harness

    asked = []
    monkeypatch.setattr(harness, "version", lambda name: asked.append(name) or "3.6.0")
    with pytest.raises(
        AlnicoError, match=r"^arc: datasets 3\.6\.0 runs scripts .*; expected 4 or later\. Run: pip install"
    ):
        harness.Harness("arc", ["arc_easy"], "acc,none").evaluate(None)  # type: ignore[arg-type]
    assert asked == ["datasets"]


def test_every_other_call_that_could_run_code_is_listed() -> None:
    """A new one stands in LISTED, with the reason why no file of a stranger decides what it runs."""
    found: dict[str, Counter[str]] = {}
    for path in sorted(SOURCES.rglob("*.py")):
        for name, _ in calls_of(path):
            if name.rpartition(".")[2] in RISKY and name not in PLAIN and name not in GUARDED:
                found.setdefault(path.relative_to(SOURCES).as_posix(), Counter())[name] += 1
    assert {where: dict(calls) for where, calls in found.items()} == LISTED


def test_packages_that_could_run_code_are_imported_where_they_are_guarded() -> None:
    packages = (
        "transformers",
        "lm_eval",
        "datasets",
        "sentence_transformers",
        "peft",
        "joblib",
        "dill",
        "cloudpickle",
        "evaluate",
        "kernels",
    )
    found = set()
    for path in sorted(SOURCES.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if isinstance(node, ast.Call) and ast.unparse(node.func) in (
                "import_extra",
                "importlib.import_module",
            ):
                names += [a.value for a in node.args[:1] if isinstance(a, ast.Constant)]
            found |= {
                (path.relative_to(SOURCES).as_posix(), n.partition(".")[0])
                for n in names
                if n.partition(".")[0] in packages
            }
    # of evaluate the harness replaces what loads the code of metrics
    assert found == {
        ("evaluation/extras.py", "transformers"),
        ("evaluation/harness.py", "lm_eval"),
        ("evaluation/harness.py", "evaluate"),
    }


def test_a_model_without_a_tokenizer_is_refused_with_what_to_copy(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ModelError) as caught:
        load_tokenizer(tmp_path, "models/a")
    assert str(caught.value) == (
        "models/a: has no tokenizer, which reading text needs; expected tokenizer.json or the files of its kind. "
        "Copy them from the model that it was tuned from."
    )
