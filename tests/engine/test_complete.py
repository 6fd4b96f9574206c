"""A fine-tune gets what its training program left out and its base has: by name, byte for byte, and said."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import alnico
from alnico.errors import MismatchError, RecipeError
from made import Tensors, llama_config, llama_shapes, read_file, save_model

MTP = {"mtp.fc.weight": (16, 32), "mtp.norm.weight": (16,), "mtp.layers.0.mlp.up_proj.weight": (48, 16)}
VISION = {"model.visual.patch_embed.proj.weight": (8, 3, 2, 2), "model.visual.blocks.0.norm1.bias": (8,)}
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def written(
    name: str,
    seed: int,
    shapes: Mapping[str, tuple[int, ...]],
    config: Mapping[str, Any] | None = None,
    files: Mapping[str, str] | None = None,
) -> Tensors:
    """Write a model of random values in bfloat16, with side files."""
    random = np.random.default_rng(seed)
    tensors: Tensors = {n: ("BF16", random.standard_normal(s).astype(np.float32)) for n, s in shapes.items()}
    save_model(Path(name), tensors, {**llama_config(), **(config or {})})
    for file, text in (files or {}).items():
        (Path(name) / file).write_text(text)
    return tensors


def stored(folder: str) -> dict[str, tuple[str, bytes]]:
    """The dtype and bytes of every tensor of a model, without alnico."""
    return {
        name: (dtype, values.tobytes())
        for file in sorted(Path(folder).glob("*.safetensors"))
        for name, (dtype, values) in read_file(file).items()
    }


def config_of(folder: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((Path(folder) / "config.json").read_text())
    return found


def test_tensors_of_the_base_are_added_by_name_and_byte_for_byte() -> None:
    written("base", 0, {**llama_shapes(), **MTP, **VISION}, {"num_nextn_predict_layers": 1})
    written("tuned", 1, llama_shapes(), {"num_nextn_predict_layers": 0, "rope_theta": 5e5})
    result = alnico.complete("tuned", "base", "out", max_shard_size="10kB")
    assert len(list(Path("out").glob("*.safetensors"))) > 1
    base, tuned = stored("base"), stored("tuned")
    assert stored("out") == {**tuned, **{name: base[name] for name in (*MTP, *VISION)}}
    assert config_of("out") == {**config_of("tuned"), "num_nextn_predict_layers": 1}
    assert {job.kind for job in result.plan.jobs} == {"copy"}
    assert "base completes the output: 2 tensors model.visual.*, 3 tensors mtp.*." in result.plan.notes
    assert "config.json: num_nextn_predict_layers comes from base." in result.plan.notes
    assert not result.plan.dropped
    assert alnico.verify("out", against_inputs=True).unchecked == ()
    assert alnico.reproduce("out").tensors == 25
    card = Path("out/README.md").read_text()
    assert "completes the output" in card


def test_side_files_are_added_where_the_fine_tune_has_none_of_their_name() -> None:
    files = {
        "preprocessor_config.json": "{}",
        "chat_template.jinja": "{{ base }}",
        "tokenizer.json": '{"of": "base"}',
    }
    written("base", 0, {**llama_shapes(), **MTP}, files=files)
    written("tuned", 1, llama_shapes())
    alnico.complete("tuned", "base", "out")
    assert {name: (Path("out") / name).read_text() for name in files} == files
    Path("tuned/tokenizer.json").write_text('{"of": "tuned"}')
    result = alnico.complete("tuned", "base", "own")
    assert Path("own/tokenizer.json").read_text() == '{"of": "tuned"}'
    assert Path("own/preprocessor_config.json").read_text() == "{}"
    assert not Path("own/chat_template.jinja").exists()  # it belongs to the tokenizer of the base
    assert "base completes the output: preprocessor_config.json." in result.plan.notes
    assert alnico.verify("own").unchecked == ()


def test_side_files_alone_complete_a_model_too() -> None:
    written("base", 0, llama_shapes(), files={"preprocessor_config.json": "{}"})
    written("tuned", 1, llama_shapes())
    alnico.complete("tuned", "base", "out")
    assert stored("out") == stored("tuned")
    assert Path("out/preprocessor_config.json").exists()


def test_a_model_that_lacks_nothing_is_refused() -> None:
    written("base", 0, llama_shapes())
    written("tuned", 1, llama_shapes())
    with pytest.raises(MismatchError) as caught:
        alnico.complete("tuned", "base", "out")
    assert str(caught.value) == (
        "tuned: has all 20 tensors and the side files of base, so nothing is missing; expected a model that lacks some. "
        "Use it as it is."
    )
    assert not Path("out").exists()


def test_a_tensor_that_the_base_lacks_is_refused() -> None:
    written("base", 0, {**llama_shapes(), **MTP})
    written("tuned", 1, {**llama_shapes(), "score.weight": (2, 16)})
    with pytest.raises(MismatchError) as caught:
        alnico.complete("tuned", "base", "out")
    assert str(caught.value) == (
        "score.weight: tuned has it, base lacks it (1 such tensors); expected only tensors of base, which completes the "
        "output. Use the model that tuned was tuned from."
    )


def test_shapes_that_differ_are_refused() -> None:
    written("base", 0, {**llama_shapes(), **MTP})
    written("tuned", 1, llama_shapes(vocabulary=40))
    with pytest.raises(MismatchError) as caught:
        alnico.complete("tuned", "base", "out")
    assert str(caught.value) == (
        "model.embed_tokens.weight: tuned is (40, 16), base, which completes the output, is (32, 16); expected one "
        "shape. Use the model that tuned was tuned from."
    )


def test_a_head_of_its_own_stays() -> None:
    written("base", 0, {**llama_shapes(tied=True), **MTP}, {"tie_word_embeddings": True})
    written("tuned", 1, llama_shapes(tied=False), {"tie_word_embeddings": False})
    alnico.complete("tuned", "base", "out")
    assert stored("out").keys() == {*llama_shapes(tied=False), *MTP}
    assert stored("out")["lm_head.weight"] == stored("tuned")["lm_head.weight"]
    assert config_of("out")["tie_word_embeddings"] is False


def test_a_tied_head_that_the_base_stores_is_not_added() -> None:
    written("base", 0, {**llama_shapes(tied=False), **MTP}, {"tie_word_embeddings": True})
    written("tuned", 1, llama_shapes(tied=True), {"tie_word_embeddings": True})
    result = alnico.complete("tuned", "base", "out")
    assert stored("out").keys() == {*llama_shapes(tied=True), *MTP}
    assert [d.name for d in result.plan.dropped] == ["lm_head.weight"]


def llava(names: Mapping[str, tuple[int, ...]], text: str) -> dict[str, tuple[int, ...]]:
    return {name.replace("model.", text, 1): shape for name, shape in names.items()}


def test_names_of_another_version_are_known() -> None:
    tower = {"vision_tower.layers.0.w.weight": (8, 8), "multi_modal_projector.w.weight": (8, 16)}
    written("base", 0, {**llava(llama_shapes(), "language_model.model."), **tower}, {"vision_config": {}})
    written("tuned", 1, llava(llama_shapes(), "model.language_model."), {})
    alnico.complete("tuned", "base", "out")
    added = {f"model.{name}": stored("base")[name] for name in tower}
    assert stored("out") == {**stored("tuned"), **added}
    assert config_of("out")["vision_config"] == {}


def test_a_text_decoder_is_completed_to_the_whole_model() -> None:
    whole = llava(llama_shapes(), "model.language_model.")
    config = {
        "model_type": "two",
        "architectures": ["TwoForConditionalGeneration"],
        "text_config": llama_config(),
    }
    tokens = {"tokenizer.json": '{"of": "base"}', "vocab.json": "{}"}
    written("base", 0, {**whole, **VISION, **MTP}, config, {"preprocessor_config.json": "{}", **tokens})
    written("tuned", 1, llama_shapes(), {"model_type": "two_text"}, {"tokenizer.json": '{"of": "tuned"}'})
    result = alnico.complete("tuned", "base", "out")
    base, tuned = stored("base"), stored("tuned")
    text = {name: tuned[name.replace("model.language_model.", "model.", 1)] for name in whole}
    assert stored("out") == {**text, **{name: base[name] for name in (*VISION, *MTP)}}
    assert config_of("out")["model_type"] == "two"
    assert (
        "config.json is that of base (model_type two), since tuned is a part of it (model_type two_text)."
    ) in result.plan.notes
    assert Path("out/tokenizer.json").read_text() == '{"of": "tuned"}'
    assert Path("out/preprocessor_config.json").exists()
    assert not Path("out/vocab.json").exists()


def test_a_merge_of_fine_tunes_is_completed_by_a_line_of_the_recipe() -> None:
    written("base", 0, {**llama_shapes(), **MTP})
    for seed, name in enumerate("ab"):
        written(name, seed + 1, llama_shapes())
    for more in ({}, {"base_model": "base"}):
        method = "task_arithmetic" if more else "linear"
        recipe = {
            "merge_method": method,
            "models": ["a", "b"],
            "complete_from": "base",
            "unrelated": "allow",
            **more,
        }
        result = alnico.merge(recipe, "out", overwrite=True)
        kinds = {job.name: job.kind for job in result.plan.jobs}
        assert {kinds[name] for name in MTP} == {"copy"}
        assert {kinds[name] for name in llama_shapes()} == {"mix"}
        assert {name: stored("out")[name] for name in MTP} == {name: stored("base")[name] for name in MTP}


def test_slices_are_completed_after_they_are_merged() -> None:
    slices = [{"sources": [{"model": "a", "layer_range": [0, 1]}]}]
    with pytest.raises(RecipeError) as caught:
        alnico.load_recipe({"merge_method": "passthrough", "slices": slices, "complete_from": "base"})
    assert (
        "complete_from completes models that are merged whole; found slices. Merge these first, and complete the output: "
        "alnico complete OUT --from MODEL COMPLETED."
    ) in str(caught.value)


def test_the_command_says_what_it_added(run: Run) -> None:
    written("base", 0, {**llama_shapes(), **MTP})
    written("tuned", 1, llama_shapes())
    code, stdout, stderr = run("complete", "tuned", "--from", "base", "out")
    assert code == 0, stderr
    assert "note: base completes the output: 3 tensors mtp.*." in stderr
    assert stdout.startswith("out: 23 tensors")
    code, _, stderr = run("complete", "tuned", "out2")
    assert code == 2
    assert "--from" in stderr


# ---- what a plan offers -----------------------------------------------------------------------------------------------


def test_a_plan_offers_to_copy_what_a_program_left_out() -> None:
    written("base", 0, {**llama_shapes(), **MTP})
    written("tuned", 1, llama_shapes())
    with pytest.raises(MismatchError) as caught:
        alnico.plan({"merge_method": "linear", "models": ["base", "tuned"]})
    assert caught.value.args == (
        "mtp.fc.weight: base has it, tuned lacks it; expected it in all models.",
        "mtp.layers.0.mlp.up_proj.weight: base has it, tuned lacks it; expected it in all models.",
        "mtp.norm.weight: base has it, tuned lacks it; expected it in all models.",
        "tuned lacks 3 tensors mtp.* that base has; programs that train often leave these out when they save. Set "
        "missing: copy in the recipe to take them from base, or complete tuned first: alnico complete tuned --from base "
        "OUT.",
    )
    offered = alnico.plan({"merge_method": "linear", "models": ["base", "tuned"], "missing": "copy"})
    assert [job.name for job in offered.jobs if job.kind == "copy"] == sorted(MTP)


def test_the_offer_is_in_the_words_of_the_command(run: Run) -> None:
    written("base", 0, {**llama_shapes(), **VISION})
    written("tuned", 1, llama_shapes())
    code, _, stderr = run("plan", "base", "tuned")
    assert code == 5
    assert (
        "Set --missing copy to take them from base, or complete tuned first: alnico complete tuned" in stderr
    )


@pytest.mark.parametrize("own", [{"extra.weight": (2, 2)}, {"model.layers.2.mlp.up_proj.weight": (48, 16)}])
def test_nothing_is_offered_where_more_than_that_differs(own: dict[str, tuple[int, ...]]) -> None:
    written("base", 0, {**llama_shapes(), **MTP})
    written("tuned", 1, {**llama_shapes(), **own})
    with pytest.raises(MismatchError) as caught:
        alnico.plan({"merge_method": "linear", "models": ["base", "tuned"]})
    assert "alnico complete" not in str(caught.value)
