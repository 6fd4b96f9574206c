"""The checks of the sweep: each merges small models of one architecture on disk, and holds what transformers then loads against torch.

A check returns an :class:`Outcome`: *equal*, *refused* (with the message), *wrong* (with what differs), or *untested* (with what transformers
or PEFT cannot do with this architecture).
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

sys.path[:0] = [p for p in (str(Path(__file__).parents[1]), str(Path(__file__).parent)) if p not in sys.path]

import architectures  # noqa: E402

VOCAB = 101
"""Prime, and no other size of the small models: a dimension of so many is one of the vocabulary."""
SPECIAL = 12
"""Tokens at the end of the vocabulary that stand for images and the like."""
MORE = 8
"""Rows beyond the tokens that a table may have: Mllama's for its image, Moshi's for its padding."""
WEIGHTS = (0.3, 0.7)


@dataclass(frozen=True)
class Outcome:
    what: str
    detail: str = ""


class Untested(Exception):
    """What the check needs cannot be had without alnico."""


class Wrong(Exception):
    """What alnico wrote is not what it should be."""


def quiet() -> None:
    import logging

    import torch
    import transformers

    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.disable(logging.ERROR)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


# --- Models of one architecture


class Case:
    """A base and two fine-tunes of it, as modules and as files."""

    def __init__(self, name: str, folder: Path, **options: Any) -> None:
        self.name, self.folder = name, folder
        self.options = {"vocab": VOCAB, **options}

    @cached_property
    def base(self) -> Any:
        try:
            made = architectures.make(self.name, **self.options)
        except Exception as error:
            raise Untested(f"cannot be made: {type(error).__name__}: {first_line(error)}") from None
        return self.saved(made, "base")

    @cached_property
    def a(self) -> Any:
        return self.saved(architectures.shaken(copy.deepcopy(self.base), 1, 0.02), "a")

    @cached_property
    def b(self) -> Any:
        return self.saved(architectures.shaken(copy.deepcopy(self.base), 2, 0.02), "b")

    @cached_property
    def files(self) -> tuple[Path, Path]:
        _ = self.a, self.b
        return self.folder / "a", self.folder / "b"

    def saved(self, module: Any, name: str) -> Any:
        """Write a module as transformers does, and make sure that transformers reads it back."""
        try:
            module.save_pretrained(self.folder / name)
        except Exception as error:
            raise Untested(f"transformers cannot save it: {first_line(error)}") from None
        if name == "base":
            try:
                back = self.loaded(self.folder / name)
            except Wrong as error:
                raise Untested(f"transformers does not load its own file: {error}") from None
            if found := differing(back.state_dict(), module.state_dict(), exact=True):
                raise Untested(f"transformers does not load its own file: {found}")
        return module

    def loaded(self, folder: Path) -> Any:
        """What transformers makes of a folder. Errors: Wrong, if it cannot, or does not find or use every tensor."""
        import transformers

        try:
            module, told = getattr(transformers, self.name).from_pretrained(folder, output_loading_info=True)
        except Exception as error:
            raise Wrong(f"cannot be loaded: {type(error).__name__}: {first_line(error)}") from None
        missing, extra = sorted(told["missing_keys"]), sorted(told["unexpected_keys"])
        if missing or extra or told.get("mismatched_keys"):
            raise Wrong(
                f"{len(missing)} tensors missing {missing[:2]}, {len(extra)} not used {extra[:2]}, {told.get('mismatched_keys')}"
            )
        return module.eval()

    def out(self) -> Path:
        shutil.rmtree(self.folder / "out", ignore_errors=True)
        return self.folder / "out"


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:300]


def tensors(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    found: dict[str, Any] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def differing(
    found: Mapping[str, Any], expected: Mapping[str, Any], *, exact: bool = False, rtol: float = 1e-5
) -> str:
    """What differs between two states, in words; empty if nothing does."""
    import torch

    if set(found) != set(expected):
        return f"names differ: {sorted(set(found) ^ set(expected))[:3]}"
    wrong = []
    for name, right in expected.items():
        value = found[name]
        if value.shape != right.shape:
            wrong.append(f"{name} {tuple(value.shape)} is not {tuple(right.shape)}")
        elif exact or not right.is_floating_point():
            if not torch.equal(torch.nan_to_num(value.double()), torch.nan_to_num(right.double())):
                wrong.append(f"{name} differs")
        else:
            gap = (value.double() - right.double()).abs()
            limit = rtol * right.double().abs() + 1e-6
            if bool((gap > limit).any()):
                wrong.append(f"{name} is off by {float(gap.max()):.1e}")
    return f"{len(wrong)} of {len(expected)} tensors: {'; '.join(wrong[:2])}" if wrong else ""


def same_forward(found: Any, expected: Any) -> None:
    """Compare a forward pass. Errors: Wrong; a pass that the expected module cannot make is left out."""
    import torch

    try:
        right = architectures.forward(expected)
    except Exception:
        return
    try:
        got = architectures.forward(found)
    except Exception as error:
        raise Wrong(f"forward pass fails: {type(error).__name__}: {first_line(error)}") from None
    if got.shape != right.shape:
        raise Wrong(f"forward pass gives {tuple(got.shape)}, not {tuple(right.shape)}")
    # Relative to the largest: a router may turn at a hair's breadth, which tensors that are equal rule out.
    if not torch.allclose(got, right, rtol=1e-3, atol=1e-4 * float(right.abs().max()) + 1e-6, equal_nan=True):
        raise Wrong(
            f"forward pass is off by {float((got - right).abs().max()):.1e}, of {float(right.abs().max()):.1e}"
        )


def mean(a: Any, b: Any, weights: tuple[float, float] = WEIGHTS) -> dict[str, Any]:
    """The weighted mean of two states in float64; what is no float is the same in both."""
    first, second = a.state_dict(), b.state_dict()
    return {
        n: (weights[0] * t.double() + weights[1] * second[n].double()).to(t.dtype)
        if t.is_floating_point()
        else t
        for n, t in first.items()
    }


def with_state(module: Any, state: Mapping[str, Any]) -> Any:
    made = copy.deepcopy(module)
    made.load_state_dict(state)
    return made


# --- The checks


def merged(recipe: Mapping[str, Any], out: Path) -> None:
    import alnico

    alnico.merge(recipe, out, threads=1)


def weighted(*models: Path | str) -> list[dict[str, Any]]:
    return [{"model": str(m), "parameters": {"weight": w}} for m, w in zip(models, WEIGHTS, strict=True)]


def checked_mean(case: Case, out: Path) -> None:
    found = case.loaded(out)
    expected = mean(case.a, case.b)
    if told := differing(found.state_dict(), expected):
        raise Wrong(told)
    same_forward(found, with_state(case.a, expected))


def average(case: Case) -> None:
    """``linear`` of two fine-tunes is the weighted mean of the modules' parameters."""
    a, b = case.files
    out = case.out()
    merged({"merge_method": "linear", "models": weighted(a, b)}, out)
    checked_mean(case, out)


def ties(case: Case) -> None:
    """``ties`` of two fine-tunes is the reference's, a tensor of the file at a time."""
    import torch

    import references.ties as reference

    a, b = case.files
    out = case.out()
    models = [
        {"model": str(m), "parameters": {"weight": w, "density": 0.6}}
        for m, w in zip((a, b), WEIGHTS, strict=True)
    ]
    merged({"merge_method": "ties", "base_model": str(case.folder / "base"), "models": models}, out)
    case.loaded(out)
    base, first, second, found = (tensors(p) for p in (case.folder / "base", a, b, out))
    if set(found) != set(base):
        raise Wrong(f"names differ: {sorted(set(found) ^ set(base))[:3]}")
    wrong = []
    for name, before in base.items():
        if not before.is_floating_point():
            right, unsure = before.double(), torch.zeros_like(before, dtype=torch.bool)
        else:
            deltas = [(m[name] - before).double().numpy() for m in (first, second)]
            zero = np.zeros_like(deltas[0])
            options = {"weight": list(WEIGHTS), "density": [0.6, 0.6]}
            if not zero.size:
                continue
            right = before.double() + torch.from_numpy(
                np.asarray(reference.merge(deltas, zero, options, None))
            )
            unsure = torch.from_numpy(np.asarray(reference.undecided(deltas, zero, options)))
        gap = torch.where(unsure, torch.zeros_like(right), (found[name].double() - right).abs())
        if bool((gap > 1e-5 * right.abs() + 1e-6).any()):
            wrong.append(f"{name} is off by {float(gap.max()):.1e}")
    if wrong:
        raise Wrong(f"{len(wrong)} of {len(base)} tensors: {'; '.join(wrong[:2])}")


def tied_copies(case: Case) -> None:
    """A fine-tune saved as ``torch.save(module.state_dict())``, tied copies and all, under the names of the module."""
    import torch

    a, b = case.files
    plain = case.folder / "b-state"
    if not plain.exists():
        plain.mkdir()
        torch.save(case.b.state_dict(), plain / "pytorch_model.bin")
        shutil.copy(b / "config.json", plain)
    out = case.out()
    merged({"merge_method": "linear", "models": weighted(a, plain)}, out)
    checked_mean(case, out)


def prefix(case: Case) -> None:
    """A fine-tune whose names all begin with the prefix of a wrapper."""
    from safetensors.torch import save_file

    a, b = case.files
    wrapped = case.folder / "b-prefix"
    if not wrapped.exists():
        wrapped.mkdir()
        save_file(
            {f"module.{n}": t for n, t in tensors(b).items()}, wrapped / "model.safetensors", {"format": "pt"}
        )
        shutil.copy(b / "config.json", wrapped)
    out = case.out()
    merged({"merge_method": "linear", "models": weighted(a, wrapped)}, out)
    checked_mean(case, out)


# --- Layer stacks

STACKED = 4


def stack_of(module: Any, layers: int) -> str:
    """The list of layers that a stack is made of: the only one of that length, or the only one of a text decoder."""
    import torch

    found = [
        n
        for n, m in module.named_modules()
        if isinstance(m, torch.nn.ModuleList) and len(m) == layers and any(True for _ in m.parameters())
    ]
    found = [n for n in found if not any(n.startswith(other + ".") for other in found if other != n)]
    if len(found) > 1:
        found = [
            n
            for n in found
            if not any(
                w in n for w in ("vis", "image", "audio", "encoder", "qformer", "perceiver", "resampler")
            )
        ]
    if len(found) != 1:
        raise Untested(f"no list of layers is the one to stack, of {len(found)}")
    return found[0]


def put_together(case: Case, order: list[tuple[Any, int]], path: str) -> Any:
    """The module a person would put together by hand: modules moved, not names; and lists by layer in configs in their order."""
    import torch

    hand = copy.deepcopy(case.a)
    moved = torch.nn.ModuleList(copy.deepcopy(m.get_submodule(path)[i]) for m, i in order)
    for place, layer in enumerate(moved):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = place
    parent, _, name = path.rpartition(".")
    setattr(hand.get_submodule(parent), name, moved)
    numbers = [i for _, i in order]
    seen: set[int] = set()
    for module in hand.modules():
        for key, value in list(vars(module).items()):
            if (
                isinstance(value, list)
                and len(value) == STACKED
                and all(isinstance(v, str | bool | int | float) for v in value)
            ):
                setattr(module, key, [value[i] for i in numbers])
        for config in _configs(getattr(module, "config", None)):
            if id(config) in seen:
                continue
            seen.add(id(config))
            if STACKED not in vars(config).values():
                continue
            for key, value in list(vars(config).items()):
                if isinstance(value, list) and len(value) == STACKED and "architectures" not in key:
                    vars(config)[key] = [value[i] for i in numbers]
                elif key in ("num_hidden_layers", "n_layer", "n_layers", "num_layers") and value == STACKED:
                    vars(config)[key] = len(order)
    return hand


def _configs(config: Any) -> Iterator[Any]:
    from transformers import PretrainedConfig

    if isinstance(config, PretrainedConfig):
        yield config
        for value in vars(config).values():
            yield from _configs(value)


def stack(case: Case) -> None:
    """Layers 0 to 2 of one model and 1 to 3 of another, loaded back and put together by hand."""
    deep = Case(case.name, case.folder / "deep", vocab=VOCAB, layers=STACKED)
    path = stack_of(deep.base, STACKED)
    # Outside of the layers both are alike, so that no question is which model gives what.
    first, second = deep.a, copy.deepcopy(deep.a)
    architectures.shaken(second.get_submodule(path), 3, 0.02)
    deep.saved(second, "second")
    out = deep.out()
    ranges = (("a", 0, 3), ("second", 1, 4))
    slices = [
        {"sources": [{"model": str(deep.folder / n), "layer_range": [low, high]}]} for n, low, high in ranges
    ]
    merged({"merge_method": "passthrough", "slices": slices}, out)
    found = deep.loaded(out)
    hand = put_together(
        deep, [(first, 0), (first, 1), (first, 2), (second, 1), (second, 2), (second, 3)], path
    )
    if told := differing(found.state_dict(), hand.state_dict(), exact=True):
        raise Wrong(told)
    same_forward(found, hand)


# --- Vocabularies


def save_tokenizer(folder: Path, turn: int) -> list[str]:
    """Write a tokenizer of whole words, turned by so many among those that are not special; return its tokens in order."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = [f"w{i}" for i in range(4, VOCAB - SPECIAL)]
    order = [
        "<pad>",
        "<s>",
        "</s>",
        "<unk>",
        *words[turn:],
        *words[:turn],
        *(f"x{i}" for i in range(VOCAB - SPECIAL, VOCAB)),
    ]
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(order)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"unk_token": "<unk>", "pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=made, **names).save_pretrained(folder)
    return order


def union(case: Case) -> None:
    """``tokenizer_source: union`` of models whose words are numbered otherwise: every token's rows are the mean of its rows."""
    import torch

    a, b = case.files
    if not any(VOCAB in t.shape for t in case.a.state_dict().values()):
        raise Untested("has no table of a vocabulary")
    pair = []
    for source, name, turn in ((a, "a-words", 0), (b, "b-words", 7)):
        folder = case.folder / name
        if not folder.exists():
            shutil.copytree(source, folder)
        pair.append(save_tokenizer(folder, turn))
    out = case.out()
    recipe = {"merge_method": "linear", "models": weighted(case.folder / "a-words", case.folder / "b-words")}
    merged({**recipe, "tokenizer_source": "union"}, out)
    ids = json.loads((out / "tokenizer.json").read_text())["model"]["vocab"]
    tokens = sorted(ids, key=ids.__getitem__)
    if len(tokens) != VOCAB:
        raise Wrong(f"the union has {len(tokens)} tokens, not {VOCAB}")
    rows = [torch.tensor([order.index(t) for t in tokens]) for order in pair]
    found = case.loaded(out)

    def arranged(module: Any, order: Any) -> dict[str, Any]:
        state = {}
        for name, value in module.state_dict().items():
            if name.startswith(
                "word_timestamp_head."
            ):  # of another tokenizer, with as many pieces only in the small model
                state[name] = value
                continue
            for axis, size in enumerate(value.shape):
                # Rows of prompts, or of codes of sounds, come after them.
                tokens_first = (
                    name.endswith(("cpmant.input_embedding.weight", "embed_tokens.embed_tokens.weight"))
                    and axis == 0
                )
                if (VOCAB <= size <= VOCAB + MORE or tokens_first) and value.is_floating_point():
                    value = value.index_select(axis, torch.cat([order, torch.arange(VOCAB, size)]))
            state[name] = value
        return state

    first, second = (arranged(m, order) for m, order in zip((case.a, case.b), rows, strict=True))
    expected = {
        n: (WEIGHTS[0] * t.double() + WEIGHTS[1] * second[n].double()).to(t.dtype)
        if t.is_floating_point()
        else t
        for n, t in first.items()
    }
    if told := differing(found.state_dict(), expected):
        raise Wrong(told)


# --- Adapters


def lora(case: Case) -> None:
    """A LoRA adapter of PEFT on every linear layer, folded as ``base+adapter``, against ``merge_and_unload``.

    Where an adapted layer shares its weight with another, PEFT's merge changes both and its live model one: then the live model is
    the reference.
    """
    import peft
    import torch

    _ = case.base
    adapter = case.folder / "adapter"
    try:
        wrapped = peft.get_peft_model(
            copy.deepcopy(case.base), peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
        )
        noise = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for name, value in wrapped.named_parameters():
                if "lora_" in name:
                    value.copy_(torch.randn(value.shape, generator=noise) * 0.05)
        wrapped.save_pretrained(adapter)
        counts = Counter(id(p) for _, p in wrapped.named_parameters(remove_duplicate=False))
        is_live = any(
            counts[id(m.base_layer.weight)] > 1 for m in wrapped.modules() if hasattr(m, "base_layer")
        )
        expected = wrapped.get_base_model() if is_live else wrapped.merge_and_unload()
        if not is_live and set(expected.state_dict()) != set(case.base.state_dict()):
            raise Untested("PEFT does not give the model's own names back")
    except Untested:
        raise
    except Exception as error:
        raise Untested(f"PEFT cannot adapt it: {first_line(error)}") from None
    out = case.out()
    merged(
        {
            "merge_method": "linear",
            "models": [{"model": f"{case.folder / 'base'}+{adapter}", "parameters": {"weight": 1.0}}],
        },
        out,
    )
    found = case.loaded(out)
    if not is_live and (told := differing(found.state_dict(), expected.state_dict())):
        raise Wrong(told)
    same_forward(found, expected)


# --- Coefficients learned from data


def adamerging(case: Case) -> None:
    """The entropies that AdaMerging tells are those of the model that its recipe makes."""
    import torch
    import transformers

    import alnico

    a, b = case.files
    labels = case.a.config.num_labels or 2
    if "ImageClassification" in case.name:
        given = architectures.inputs(case.a)
        if set(given) != {"pixel_values"}:
            raise Untested("is not called with images alone")
        data = {"images": torch.cat([given["pixel_values"]] * 2).numpy(), "labels": np.zeros(4, int)}
        np.savez(case.folder / "data.npz", **data)
        file = "data.npz"
        batch = {"pixel_values": torch.from_numpy(data["images"])}
    else:
        rows = [
            {"text": " ".join(f"w{(7 * i + 3 * k) % 60 + 4}" for k in range(6)), "label": str(i % labels)}
            for i in range(4)
        ]
        (case.folder / "data.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        for folder in (case.folder / "base", a, b):
            save_tokenizer(folder, 0)
        file = "data.jsonl"
        texts = [r["text"] for r in rows]
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            case.folder / "base"
        )  # some types cut words in a way of their own
        batch = {
            k: v
            for k, v in tokenizer(texts, return_tensors="pt", padding=True).items()
            if k in ("input_ids", "attention_mask")
        }
    try:
        case.a(**batch).logits.sum().backward()
    except Exception as error:
        raise Untested(f"its forward or backward pass needs more: {first_line(error)}") from None
    entry = {"name": "t", "type": "classification", "data": str(case.folder / file)}
    (case.folder / "tasks.yml").write_text(json.dumps({"tasks": [entry]}))
    learned = alnico.adamerge(
        [str(a), str(b)], base=str(case.folder / "base"), tasks=str(case.folder / "tasks.yml"), per="task", steps=1, batch_size=4,
        learning_rate=1e-9,
    )  # fmt: skip
    out = case.out()
    alnico.merge(learned.recipe, out, threads=1)
    module = case.loaded(out)
    with torch.no_grad():
        right = float(torch.distributions.Categorical(logits=module(**batch).logits.float()).entropy().mean())
    losses = learned.steps[0].losses
    told = float(next(iter(losses.values())) if isinstance(losses, Mapping) else losses[0])
    if not abs(told - right) <= 1e-3 * max(1.0, abs(right)):
        raise Wrong(f"entropy told {told:.5f}, that of the model {right:.5f}")


CHECKS: dict[str, Callable[[Case], None]] = {
    "average": average,
    "ties": ties,
    "tied copies": tied_copies,
    "prefix": prefix,
    "stack": stack,
    "union": union,
    "lora": lora,
    "adamerging": adamerging,
}
ONLY_FOR: dict[str, tuple[str, ...]] = {
    "stack": ("causal_lm", "masked_lm", "image_classification", "image_text_to_text"),
    "union": (
        "causal_lm", "masked_lm", "seq2seq_lm", "image_text_to_text", "multimodal_lm", "clip_like",
        "speech_seq2seq", "ctc", "text_encoding",
    ),
    "adamerging": ("image_classification", "sequence_classification"),
}  # fmt: skip
"""The kinds that a check is for; checks that are not listed are for all."""
NOT_FOR = {"tied copies": ("sequence_classification",), "prefix": ("sequence_classification",)}
"""Kinds that a check is not for: a classifier of texts has the layers and the names of its language model."""


@contextmanager
def at(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    folder.mkdir(parents=True, exist_ok=True)
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def outcomes(
    name: str, kind: str, folder: Path, checks: tuple[str, ...] = tuple(CHECKS)
) -> dict[str, Outcome]:
    """The outcome of each check that is for an architecture's kind."""
    from alnico.errors import AlnicoError

    case = Case(name, folder)
    found: dict[str, Outcome] = {}
    for check in checks:
        if kind not in ONLY_FOR.get(check, (kind,)) or kind in NOT_FOR.get(check, ()):
            continue
        try:
            with at(folder):
                CHECKS[check](case)
            found[check] = Outcome("equal")
        except Untested as error:
            found[check] = Outcome("untested", str(error))
        except Wrong as error:
            found[check] = Outcome("wrong", str(error))
        except AlnicoError as error:
            found[check] = Outcome("refused", " / ".join(str(error).splitlines())[:600])
        except Exception as error:  # a mistake of alnico's, or of the check's
            place = error.__traceback__
            while place is not None and place.tb_next is not None:
                place = place.tb_next
            where = f"{Path(place.tb_frame.f_code.co_filename).name}:{place.tb_lineno}" if place else ""
            found[check] = Outcome("wrong", f"{type(error).__name__} at {where}: {first_line(error)}")
    return found
