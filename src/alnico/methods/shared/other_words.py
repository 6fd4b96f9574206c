"""Lists words that people know from elsewhere: those that work here, and answers to the others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

SynonymKind = Literal["method", "option", "command", "flag", "function"]


@dataclass(frozen=True)
class Synonym:
    """A word that works in the place of alnico's own ``words``.

    An option is the first of ``words`` that a method has. ``relation`` says how its values become values of
    that option: the ``same``, ``complement`` for 1 - value, or ``pair`` for the weights [1 - value, value] of
    two models.
    """

    word: str
    kind: SynonymKind
    words: tuple[str, ...]
    meaning: str
    relation: Literal["same", "complement", "pair"] = "same"

    def describe(self, option: str) -> str:
        """What the word is, where it stands for ``option``.

        >>> OPTION_SYNONYMS["drop_rate"].describe("density"), OPTION_SYNONYMS["alpha"].describe("weight")
        ('1 - density', 'weight [1 - alpha, alpha]')
        """
        return {
            "same": option,
            "complement": f"1 - {option}",
            "pair": f"{option} [1 - {self.word}, {self.word}]",
        }[self.relation]


SYNONYMS = (
    Synonym("dare", "method", ("dare_linear",), "the merge method `dare_linear`"),
    Synonym("trim_ratio", "option", ("trim", "density"), "1 - `density`: the share that is trimmed; under `dare_ties`, 1 - `trim`", "complement"),
    Synonym("drop_rate", "option", ("density",), "1 - `density`: the share that is dropped", "complement"),
    Synonym("scaling_factor", "option", ("scale",), "`scale`, which mergekit calls `lambda`"),
    Synonym("alpha", "option", ("weight",), "the weights [1 - alpha, alpha] of exactly two models, for a method that has no `alpha` itself", "pair"),
    Synonym("weights", "command", ("norm-weights",), "the command `alnico norm-weights`"),
    Synonym("weights", "function", ("norm_weights",), "the function `alnico.norm_weights`"),
    Synonym("open", "function", ("open_model",), "the function `alnico.open_model`"),
    Synonym("--outdir", "flag", ("out",), "the option of a command for the folder that it writes, mostly `--out`"),
)  # fmt: skip
"""The one table of them. docs/recipes.md lists it."""


def synonyms(kind: SynonymKind) -> Mapping[str, Synonym]:
    """Return the synonyms of one kind, by word."""
    return {synonym.word: synonym for synonym in SYNONYMS if synonym.kind == kind}


METHOD_SYNONYMS, OPTION_SYNONYMS = synonyms("method"), synonyms("option")


@dataclass(frozen=True)
class OtherWord:
    """``words`` for one thing: the sentence that says what does it here, the page about it, and the method if it is one."""

    words: tuple[str, ...]
    answer: str
    page: str = ""
    method: str = ""


def _method(words: str, method: str, page: str = "") -> OtherWord:
    name = method.partition(",")[0]
    return OtherWord(
        tuple(words.split()),
        f"It is the merge method {method}: alnico merge MODEL MODEL... OUT --method {name.partition(' ')[0]}.",
        page,
        method,
    )


def _answer(words: str, answer: str, page: str = "", method: str = "") -> OtherWord:
    return OtherWord(tuple(words.split()), answer, page, method)


OTHER_WORDS = (
    _answer(
        "passthrough frankenmerge frankenmerging stack stack-layers self-merge franken stacking concat upscale depth-up-scaling slices bakllama layers",
        "Write a recipe with slices and merge_method: passthrough, and give it to `alnico merge`.",
        "docs/how-to/stack-layers.md",
        "passthrough, with `slices`",
    ),
    _answer("store-remove store-delete store-uninstall", "`alnico store rm NAME` removes a task vector from the store.", "docs/store.md"),
    _answer("store-add store-save store-publish store-upload", "`alnico store create FINETUNED --base BASE` adds a task vector, and `alnico store push NAME ADDRESS` shares it.", "docs/store.md"),
    _answer("store-get store-install store-download", "`alnico store pull NAME --from ADDRESS` gets a task vector.", "docs/store.md"),
    _method("averaging avg mean weight-average wise-ft uniform weighted-average weighted-mean lerp interpolate uniform-soup model-soup model-soups fedavg swa", "linear"),
    _answer("soup", "It is the merge method linear; `alnico soup` finds which models to average.", method="linear"),
    _answer("average", "It is the merge method linear; `alnico average RUN OUT` averages the checkpoints of a training run.", method="linear"),
    _answer("average-checkpoints checkpoints checkpoint-averaging lawa wsm pma sma ema", "`alnico average RUN OUT` averages the checkpoints of a training run.", "docs/how-to/average-checkpoints.md"),
    _answer("chat-vector param-delta", "`alnico recipe chat_vector --old-base OLD --tuned TUNED --new-base NEW` writes the recipe.", "docs/how-to/chat-vector.md"),
    _answer("add-difference", "`alnico recipe add_difference --a A --b B --c C` writes the recipe.", "docs/how-to/add-difference.md"),
    _answer("retain", "`alnico recipe retain --pretrained BEFORE --finetuned AFTER` writes the recipe.", "docs/how-to/retain.md"),
    _method("dare drop-and-rescale", "dare_ties or dare_linear"),
    _method("ties-merging ties-merge trim-elect-merge", "ties"),
    _method("task-vector task-vectors task-vector-arithmetic addition negation ta", "task_arithmetic"),
    _method("spherical spherical-linear slerp-merge", "slerp"),
    _method("stock", "model_stock"),
    _method("fusion arcee", "arcee_fusion"),
    _method("copy identity", "passthrough"),
    _method("consensus-ta tall-mask tall-masks", "consensus"),
    _method("fisher-merging", "fisher"),
    _method("regression-mean", "regmean"),
    _method("karcher-mean frechet-mean", "karcher"),
    _method("tsv-m tsv-merge task-singular-vectors", "tsv"),
    _method("dc directional-consistency", "dc_merge"),
    _method("aswudi swudi-a wudi wudi-merging", "swudi"),
    _method("iso isotropic isotropic-merging", "iso_c or iso_cts"),
    _method("svd-merge truncated-svd low-rank", "svd"),
    _answer("mergekit mergekit-yaml mergekit-multi mergekit-pytorch mergekit-legacy mergekit-mega", "`alnico merge RECIPE OUT` reads mergekit's recipes.", "docs/how-to/from-mergekit.md"),
    _answer("mergekit-extract-lora extract extract-lora lora-extract", "`alnico lora extract FINETUNED BASE OUT` writes the difference of two models as an adapter.", "docs/how-to/merge-a-lora.md"),
    _answer("fold merge-lora lora-merge fuse bake unload merge-and-unload apply-lora lora adapter adapters peft", "`alnico lora fold BASE ADAPTER... OUT` merges adapters into their base.", "docs/how-to/merge-a-lora.md"),
    _answer("combine combine-lora combine-loras lora-combine add-weighted-adapter", "`alnico lora combine ADAPTER ADAPTER... OUT` makes one adapter of several.", "docs/how-to/merge-a-lora.md"),
    _answer("mergekit-evolve evolve evolution optimize optimise tune hpo sweep grid optuna", "`alnico search RECIPE` searches the values that a recipe leaves open.", "docs/tuning.md"),
    _answer("mergekit-layershuffle layershuffle", "Write a recipe with slices.", "docs/how-to/stack-layers.md"),
    _answer("mergekit-tokensurgeon tokensurgeon transplant retokenise", "`alnico retokenize MODEL OUT --tokenizer DONOR` gives a model the vocabulary of another.", "docs/how-to/different-tokenizers.md"),
    _answer("tokenizer vocabulary vocab", "`alnico merge` takes --tokenizer, and recipes have the key tokenizer.", "docs/how-to/different-tokenizers.md"),
    _answer("mergekit-moe mixture clown-moe clowncar mixture-of-experts build-mixture", "`alnico moe RECIPE OUT` builds a mixture of experts from dense models.", "docs/how-to/build-a-mixture.md"),
    _answer("quantize quantise gguf awq gptq", "alnico does not quantise. `alnico merge MODEL OUT --dtype bfloat16` writes a model in another dtype."),
    _answer("convert cast dtype to-safetensors", "`alnico merge MODEL OUT --dtype bfloat16` writes a model as safetensors, in another dtype."),
    _answer("train training finetune finetuning distill", "alnico trains nothing. `alnico merge` combines models that are trained; `alnico adamerge` learns their coefficients.", "docs/tuning.md"),
    _answer("run build make create mix blend", "`alnico merge RECIPE OUT` merges by a recipe, `alnico merge MODEL MODEL... OUT` without one.", "docs/first-merge.md"),
    _answer("validate check lint dry-run explain preview", "`alnico plan RECIPE` checks a recipe and its models; `alnico verify MERGED` checks a finished merge."),
    _answer("fingerprint hash checksum sha256 integrity", "`alnico verify MERGED` compares a merge with its hashes; `alnico diff A B` compares two models."),
    _answer("stats statistic info show describe summary ls list headers", "`alnico inspect MODEL` summarizes one model; `alnico analyze MODEL... --base BASE` compares models.", "docs/analysis.md"),
    _answer("similarity distance distances cosine interference conflict conflicts report", "`alnico analyze MODEL... --base BASE` measures how far models are from each other.", "docs/analysis.md"),
    _answer("eval score scores bench benchmark benchmarks lm-eval test perplexity", "`alnico evaluate MODEL... --tasks TASKS` scores models on tasks.", "docs/tuning.md"),
    _answer("recommend advise advice choose which new init template", "`alnico suggest MODEL... --base BASE` suggests a recipe.", "docs/how-to/choose-a-method.md"),
    _answer("recipes config yaml", "`alnico merge MODEL MODEL... --method NAME --print-recipe` prints a recipe.", "docs/recipes.md"),
    _answer("upload publish release deploy", "`alnico push MERGED OWNER/NAME` uploads a finished merge.", "docs/how-to/publish.md"),
    _answer("download pull fetch clone", "Give the id of a model in place of a path: alnico merge OWNER/NAME OWNER/OTHER OUT.", "docs/hub.md"),
    _answer("hub huggingface login token", "alnico uses the login of huggingface_hub: `hf auth login`.", "docs/hub.md"),
    _answer("gui ui web app serve webui dashboard", "alnico has no graphical interface. `alnico analyze MODEL... --base BASE -o FOLDER` writes pages for a browser."),
    _answer("signature sigstore", "`alnico sign MERGED --key KEY` signs a merge; `alnico verify MERGED --key KEY` checks the signature."),
    _answer("repeat rerun rebuild", "`alnico reproduce MERGED` repeats a merge and compares every byte."),
    _answer("resume continue restart", "The same command resumes an interrupted merge; --restart begins again."),
    _answer("help man docs usage", "`alnico --help` lists the commands, `alnico COMMAND --help` describes one."),
    _answer("version", "`alnico --version` prints the version."),
    _answer("completion completions", "`alnico --install-completion` installs completion for your shell."),
    _answer("cite citation bibtex", "CITATION.cff says how to cite alnico.", "docs/how-to/cite.md"),
    _answer("notebook jupyter python api", "In Python: import alnico; alnico.merge(recipe, out).", "docs/how-to/notebook.md"),
    _answer("method", "`alnico methods` lists the merge methods."),
    _answer("example examples quickstart tutorial", "`alnico demo` merges two small models; examples/ has recipes.", "docs/first-merge.md"),
)  # fmt: skip
"""The one table of them. A word of a command or of a method is not among them, except where it means another thing too."""


def plain_word(word: str) -> str:
    """Return a word without case, hyphens, underscores and spaces."""
    return "".join(letter for letter in word.casefold() if letter.isalnum())


def find_word(word: str) -> OtherWord | None:
    """Return what a word means, whatever its case and its hyphens.

    >>> find_word("Franken_Merge").method, find_word("slerpp")
    ('passthrough, with `slices`', None)
    """
    plain = plain_word(word)
    return next((entry for entry in OTHER_WORDS if plain in map(plain_word, entry.words)), None)
