"""A module takes no more memory than the files of its checkpoint explain, whatever its config claims."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from alnico.errors import ModelError
from alnico.evaluation.loading import check_claims, load_module, load_state, load_tokenizer
from made_tasks import Made

BIG = 10**9


@pytest.fixture
def claiming(tmp_path: Path, made: Made) -> Callable[..., Path]:
    """A folder with a config, and a file of weights that holds next to nothing."""

    def write(config: dict[str, Any], tensors: dict[str, torch.Tensor] | None = None) -> Path:
        folder = tmp_path / "claims"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(made.base / name, folder / name)
        (folder / "config.json").write_text(json.dumps(config))
        save_file(
            tensors or {"embeddings.word_embeddings.weight": torch.ones(4, 4)},
            folder / "model.safetensors",
            {"format": "pt"},
        )
        return folder

    return write


SMALL = {
    "model_type": "bert",
    "hidden_size": 8,
    "num_attention_heads": 2,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "vocab_size": 9,
}


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"model_type": "bert", "vocab_size": BIG}, "describes a module of"),
        ({"model_type": "llama", "hidden_size": 65536, "intermediate_size": 262144}, "describes a module of"),
        ({**SMALL, "hidden_size": 10**6}, "describes a module of"),
        ({**SMALL, "vocab_size": BIG}, r"embeddings\.word_embeddings\.weight is \(4, 4\) in the files, \(1000000000, 8\) in the module"),
        ({**SMALL, "max_position_embeddings": BIG}, "describes a module of"),
        ({**SMALL, "vocab_size": 10**18}, "cannot load it as an encoder|describes a module of"),
        ({**SMALL, "num_hidden_layers": BIG}, "num_hidden_layers is 1000000000; its files contain 1 tensors; expected at most 1000"),
        ({**SMALL, "num_hidden_layers": 1e9}, "num_hidden_layers is 1000000000"),
        ({**SMALL, "num_attention_heads": BIG, "hidden_size": BIG}, "num_attention_heads is 1000000000"),
        ({**SMALL, "num_labels": BIG}, "num_labels is 1000000000"),
        ({**SMALL, "num_hidden_layers": 1000, "intermediate_size": 4096}, "describes a module of"),
        ({"model_type": "mixtral", "num_local_experts": BIG}, "num_local_experts is 1000000000"),
        ({"model_type": "mixtral", "num_local_experts": 1000, "num_hidden_layers": 100}, "describes a module of"),
        ({"model_type": "gpt_neo", "max_position_embeddings": 10**6, "hidden_size": 8, "num_layers": 2, "num_heads": 2,
          "attention_types": [[["global"], 2]], "vocab_size": 9}, "describes a module of|describes buffers of"),
        ({"model_type": "m2m_100", "max_position_embeddings": BIG, "d_model": 8, "vocab_size": 9, "encoder_layers": 1, "decoder_layers": 1,
          "encoder_ffn_dim": 8, "decoder_ffn_dim": 8, "encoder_attention_heads": 2, "decoder_attention_heads": 2}, "describes buffers of"),
        ({"model_type": "llava", "text_config": {"model_type": "llama", "num_hidden_layers": BIG}}, r"text_config\.num_hidden_layers is"),
        ({"model_type": "llava", "text_config": {"model_type": "llama", "hidden_size": 65536}}, "describes a module of"),
        ({"model_type": "swin", "depths": [BIG, 2], "num_heads": [2, 2]}, r"depths\[0\] is 1000000000"),
        ({"model_type": "vit", "image_size": 10**6, "hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8, "num_hidden_layers": 1},
         "describes a module of"),
        ({"model_type": "longformer", "attention_window": [BIG]}, r"attention_window\[0\] is 1000000000"),
        ({"model_type": "reformer", "num_hashes": 10**6}, "num_hashes is 1000000"),
        ({"model_type": "reformer", "num_buckets": [BIG, 2]}, r"num_buckets\[0\] is 1000000000"),
        ({"model_type": "reformer", "lsh_attn_chunk_length": BIG}, "lsh_attn_chunk_length is 1000000000"),
        ({"model_type": "reformer", "lsh_num_chunks_before": 10**6}, "lsh_num_chunks_before is 1000000"),
        ({**SMALL, "num_hidden_layers": "1000000000"}, "cannot load it as an encoder"),
        ({**SMALL, "hidden_size": None}, "cannot load it as an encoder"),
        ({**SMALL, "hidden_size": -8}, "cannot load it as an encoder"),
        ({**SMALL, "hidden_size": [8]}, "cannot load it as an encoder"),
        ({**SMALL, "architectures": 3}, "cannot load it as|lacks"),
        ({"model_type": []}, "cannot load it as an encoder"),
        ({"model_type": "no such"}, "cannot load it as an encoder"),
        ({}, "cannot load it as an encoder"),
    ],
)  # fmt: skip
def test_a_config_that_claims_more_than_the_files_hold_is_refused_before_anything_is_allocated(
    claiming: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, config: dict[str, Any], told: str
) -> None:
    folder = claiming(config)
    made: list[int] = []
    empty_like = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: made.append(a[0].numel()) or empty_like(*a, **k))
    with pytest.raises(ModelError, match=told) as caught:
        load_module(folder, "encoder", "claims")
    assert caught.value.exit_code == 4
    assert str(caught.value).startswith("claims: ")
    with pytest.raises(ModelError):
        load_state(config, {"embeddings.word_embeddings.weight": torch.ones(4, 4)}, "encoder", "claims")
    assert max(made, default=0) < 10**7


@pytest.mark.parametrize("config", [{**SMALL, "num_hidden_layers": BIG}, {**SMALL, "num_labels": BIG}])
def test_a_tokenizer_makes_nothing_of_such_a_config(
    claiming: Callable[..., Path], config: dict[str, Any]
) -> None:
    with pytest.raises(ModelError, match="is 1000000000"):
        load_tokenizer(claiming(config), "claims")


def test_what_files_explain_is_loaded(made: Made) -> None:
    assert load_module(made.base, "encoder", "base").config.num_hidden_layers == 2
    config = json.loads((made.base / "config.json").read_text())
    assert not torch.nn.modules.module._global_parameter_registration_hooks
    check_claims(
        {**config, "rope_theta": 10**12, "seed": 2**63, "bos_token_id": BIG, "num_labels": 10_000}, {}, "base"
    )
    check_claims({"num_hidden_layers": 5_000}, {f"{i}": (1,) for i in range(5_000)}, "base")


def test_the_command_refuses_it_with_exit_code_4(run, made: Made, claiming: Callable[..., Path]) -> None:
    for config in ({"model_type": "bert", "vocab_size": BIG}, {"model_type": "gpt2", "n_layer": BIG}):
        code, _, err = run("evaluate", str(claiming(config)), "--tasks", str(made.valid))
        assert code == 4, err
        assert "config.json" in err
