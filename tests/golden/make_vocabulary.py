"""What mergekit 0.1.5 makes of vocabularies: for each case of ``made_tokenizers.py``, the row of each token in each model.

    pip install mergekit==0.1.5 torch==2.13.0
    python tests/golden/make_vocabulary.py

Writes ``vocabulary.json``: by case the tokens and, by model, the rows of the embedding by token, and the padding's.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from made import read_model  # noqa: E402
from made_tokenizers import CASES, EMBED, save_family  # noqa: E402


def gathered(case: dict[str, Any], folders: dict[str, Path]) -> dict[str, Any]:
    """Run mergekit's vocabulary alone, without a merge after it."""
    import torch
    from mergekit.common import ModelReference
    from mergekit.tokenizer import PermutedVocabulary, TokenizerConfig
    from mergekit.tokenizer.build import build_tokenizer

    def located(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: v if k == "token" else located(v) for k, v in value.items()}
        return (
            str(folders[value]) if isinstance(value, str) and value in folders and value != "base" else value
        )

    setting = dict(case["tokenizer"])
    tokens = {}
    for token, wish in setting.pop("tokens", {}).items():
        source = wish["source"]
        source = {**source, "model": str(folders[source["model"]])} if "model" in source else source
        tokens[token] = {**wish, "source": str(folders[source]) if isinstance(source, str) else source}
    config = TokenizerConfig(**located(setting), tokens=tokens)
    references = {n: ModelReference.parse(str(folders[n])) for n in case["models"]}
    base = references[case["base_model"]] if "base_model" in case else None
    info = build_tokenizer(base, list(references.values()), config.source, False, list(tokens))
    task = PermutedVocabulary.model_construct(
        tokens=config.tokens, pad_to_multiple_of=config.pad_to_multiple_of, base_model=base, vocabulary_axis=0
    )
    matrices = {r: torch.from_numpy(read_model(folders[n])[EMBED].copy()) for n, r in references.items()}
    out = task.execute(info, matrices)
    vocabulary = dict(sorted(info.tokenizer.get_vocab().items(), key=lambda item: item[1]))
    found = {n: {t: out[r][i].tolist() for t, i in vocabulary.items()} for n, r in references.items()}
    padding = {n: out[r][len(vocabulary) :].tolist()[:1] for n, r in references.items()}
    return {"size": len(out[references[case["models"][0]]]), "rows": found, "padding": padding}


def main() -> None:
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as work:
        folders = save_family(Path(work))
        found = {name: gathered(case, folders) for name, case in CASES.items()}
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(case)}" for name, case in found.items())
    (HERE / "vocabulary.json").write_text(f"{{\n{lines}\n}}\n")


if __name__ == "__main__":
    main()
