"""Classification: held against logits computed by torch and transformers alone."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTForImageClassification,
)

from alnico.errors import EvaluationError, ModelError, NonFiniteError
from alnico.evaluation.classification import Classification
from alnico.evaluation.loaded_model import ModuleSubject, open_subject
from alnico.evaluation.task_file import read_tasks
from alnico.evaluation.tasks import Differentiable
from made_tasks import TASKS, embedded, head_of, texts


def rows_of(task):
    rows = texts(task, 60, 1)
    return [r["text"] for r in rows], [r["label"] for r in rows]


@pytest.fixture(scope="session")
def classifier(made, tmp_path_factory):
    """A BERT with a head of its own, on disk."""
    folder = tmp_path_factory.mktemp("classifier")
    torch.manual_seed(1)
    config = BertConfig.from_pretrained(made.base, id2label=dict(enumerate(TASKS["pets"])))
    BertForSequenceClassification(config).save_pretrained(folder)
    PreTrainedTokenizerFast.from_pretrained(made.base).save_pretrained(folder)
    return folder


def test_a_frozen_head_scores_as_torch_does(made):
    task = read_tasks(made.valid)[0]
    assert isinstance(task, Differentiable)
    lines, labels = rows_of("pets")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(made.base)
    for path in (made.base, made.tuned["pets"]):
        model = BertModel.from_pretrained(path).eval()
        with torch.no_grad():
            expected = 20 * embedded(model, tokenizer, lines) @ head_of(made.base, "pets").T
        subject = open_subject(path)
        with torch.no_grad():
            torch.testing.assert_close(task.logits(subject, range(60)), expected, atol=2e-5, rtol=0)
        score = task.evaluate(subject)
        right = [
            TASKS["pets"][i] == label for i, label in zip(expected.argmax(1).tolist(), labels, strict=True)
        ]
        assert score.examples.tolist() == right
        assert score.value == sum(right) / 60


def test_specialists_are_better_than_their_base(made):
    for task, path in zip(read_tasks(made.valid), made.tuned.values(), strict=True):
        assert task.evaluate(open_subject(path)).value > task.evaluate(open_subject(made.base)).value + 0.2


def test_parts_pool_to_the_whole(made):
    task, subject = read_tasks(made.valid)[1], open_subject(made.base)
    whole = task.evaluate(subject)
    parts = [task.evaluate(subject, part) for part in (range(20), range(20, 57), range(57, 60))]
    assert task.pooled(parts).value == whole.value
    assert (task.pooled(parts).examples == whole.examples).all()
    assert (task.evaluate(subject, [41, 3, 17]).examples == whole.examples[[41, 3, 17]]).all()


def test_chosen_examples_come_in_the_order_asked(made):
    task, subject = read_tasks(made.valid)[2], open_subject(made.base)
    with torch.no_grad():
        whole = task.logits(subject, range(60))
        torch.testing.assert_close(
            task.logits(subject, [41, 3, 17, 3]), whole[[41, 3, 17, 3]], atol=2e-5, rtol=0
        )


def test_logits_carry_the_gradient_of_the_module_and_never_read_labels(made):
    lines, _ = rows_of("food")
    task = Classification("food", lines, None, classes=dict.fromkeys(TASKS["food"], "a word") | {"salty": "a salty"}, head="names",
                          encoder=open_subject(made.base))  # fmt: skip
    subject = open_subject(made.base)
    task.logits(subject, range(8)).logsumexp(1).sum().backward()
    module = subject.module("encoder")
    assert all(p.grad is not None for name, p in module.named_parameters() if not name.startswith("pooler."))
    with pytest.raises(
        EvaluationError, match=r"^food: has no labels, which a score needs\. Name the field of the labels\.$"
    ):
        Classification("food", lines, None).evaluate(ModuleSubject("m", torch.nn.Linear(1, 1)))


def test_texts_are_tokenised_once_for_equal_tokenizers(made, monkeypatch):
    task = read_tasks(made.valid)[0]
    counted = []
    original = PreTrainedTokenizerFast.__call__
    monkeypatch.setattr(
        PreTrainedTokenizerFast,
        "__call__",
        lambda self, *a, **k: counted.append(len(a[0])) or original(self, *a, **k),
    )
    for path in (made.base, made.tuned["pets"], made.tuned["food"]):
        task.evaluate(open_subject(path))
    assert counted == [3, 60]  # the words of the head, the texts


def test_an_own_head_takes_its_configs_classes(made, classifier):
    lines, labels = rows_of("pets")
    model = AutoModelForSequenceClassification.from_pretrained(classifier).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(made.base)
    with torch.no_grad():
        expected = torch.cat([model(**tokenizer([line], return_tensors="pt")).logits for line in lines])
    task = Classification("pets", lines, labels)
    subject = open_subject(classifier)
    with torch.no_grad():
        torch.testing.assert_close(task.logits(subject, range(60)), expected, atol=1e-5, rtol=0)
    right = [TASKS["pets"][i] == label for i, label in zip(expected.argmax(1).tolist(), labels, strict=True)]
    assert task.evaluate(subject).examples.tolist() == right
    numbered = Classification("pets", lines, [str(TASKS["pets"].index(label)) for label in labels])
    assert numbered.evaluate(subject).examples.tolist() == right
    named = Classification("pets", lines, labels, classes=TASKS["pets"])
    assert named.evaluate(subject).examples.tolist() == right


def test_the_first_token_is_another_embedding_than_the_mean(made):
    lines, labels = rows_of("pets")
    encoder = open_subject(made.base)
    task = Classification(
        "pets",
        lines,
        labels,
        classes={c: f"a {c}" for c in TASKS["pets"]},
        head="names",
        encoder=encoder,
        pooling="cls",
    )
    model, tokenizer = (
        BertModel.from_pretrained(made.base).eval(),
        PreTrainedTokenizerFast.from_pretrained(made.base),
    )

    def first(words):
        batch = tokenizer(words, padding=True, return_tensors="pt", return_token_type_ids=False)
        return torch.nn.functional.normalize(model(**batch).last_hidden_state[:, 0], dim=-1)

    with torch.no_grad():
        names = first([f"a {c}" for c in TASKS["pets"]])
        head = torch.nn.functional.normalize(names - names.mean(0), dim=-1)
        torch.testing.assert_close(
            task.logits(encoder, range(60)), 20 * first(lines) @ head.T, atol=2e-5, rtol=0
        )


def test_bfloat16_is_near_float32_and_not_it(made):
    lines, labels = rows_of("pets")
    both = [
        Classification("pets", lines, labels, classes={c: f"a {c}" for c in TASKS["pets"]}, head="names",
                       encoder=open_subject(made.base), precision=precision)
        for precision in ("float32", "bfloat16")
    ]  # fmt: skip
    with torch.no_grad():
        exact, rough = (task.logits(open_subject(made.tuned["pets"]), range(60)) for task in both)
    assert rough.dtype == torch.float32
    assert 0 < (exact - rough).abs().max() < 1


def test_images_are_classified_by_their_own_head(tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    model = ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, num_labels=3, **sizes)).eval()
    model.save_pretrained(tmp_path / "vit")
    images = np.random.default_rng(0).standard_normal((5, 3, 8, 8)).astype(np.float32)
    with torch.no_grad():
        best = model(pixel_values=torch.from_numpy(images)).logits.argmax(1).numpy()
    np.savez(tmp_path / "images.npz", images=images, labels=np.array([*best[:4], (best[4] + 1) % 3]))
    tasks = read_tasks(
        {"tasks": [{"name": "vit", "type": "classification", "data": "images.npz", "batch_size": 2}]},
        tmp_path,
    )
    assert tasks[0].evaluate(open_subject(tmp_path / "vit")).examples.tolist() == [1, 1, 1, 1, 0]


def test_a_label_outside_the_head_is_told_with_its_line(classifier):
    task = Classification(
        "pets", ["noise1", "noise2"], ["cat", "cow"], places=("pets.jsonl:1", "pets.jsonl:2")
    )
    with pytest.raises(EvaluationError) as caught:
        task.evaluate(open_subject(classifier))
    assert str(caught.value) == (
        "pets: pets.jsonl:2: the label is 'cow'; expected a class of the head: cat, dog, bird. Add it to labels, or remove the example."
    )


def test_a_head_of_another_size_is_told(classifier):
    with pytest.raises(EvaluationError) as caught:
        Classification("pets", ["noise1"], ["cat"], classes=("cat", "dog")).evaluate(open_subject(classifier))
    assert str(caught.value) == (
        f"pets: the head of {classifier} has 3 classes, labels has 2; expected the same number. Name the head's classes in its order."
    )


def test_a_nan_is_no_class(classifier):
    module = BertForSequenceClassification.from_pretrained(classifier).eval()
    module.classifier.bias.data[1] = torch.nan
    with pytest.raises(
        NonFiniteError, match=r"^classifier\.bias\[1\]: merged has NaN; expected finite numbers\."
    ):
        Classification("pets", ["noise1"], ["cat"]).evaluate(
            ModuleSubject("merged", module, open_subject(classifier).tokenizer())
        )
    module.classifier.bias.data[1] = 0
    module.classifier.weight.data[:] = 3e38  # finite, and its products are not
    subject = ModuleSubject("merged", module, open_subject(classifier).tokenizer())
    with pytest.raises(EvaluationError) as caught:
        Classification("pets", ["noise1"], ["cat"]).evaluate(subject)
    assert str(caught.value) == (
        "pets: merged gives logits that are not finite. Check the model for NaN: `alnico inspect`."
    )


def test_what_a_module_raises_is_told_with_task_and_model(made):
    class Broken(torch.nn.Linear):
        config = SimpleNamespace(id2label={0: "cat", 1: "dog"})

        def forward(self, **given):
            raise KeyError("pixel_values")

    subject = ModuleSubject("merged", Broken(1, 1), open_subject(made.base).tokenizer())
    with pytest.raises(EvaluationError) as caught:
        Classification("pets", ["noise1"], ["cat"]).evaluate(subject)
    assert str(caught.value) == (
        "pets: merged: the evaluation raised KeyError: 'pixel_values'; expected a score. Correct the called code, or the data."
    )


def test_a_checkpoint_without_the_head_is_refused_not_filled_at_random(made):
    with pytest.raises(ModelError) as caught:
        Classification("pets", ["noise1"], ["cat"]).evaluate(open_subject(made.base))
    assert str(caught.value) == (
        f"{made.base}: lacks 2 tensors of a classifier, the first is classifier.bias; they would be random. "
        "Give a checkpoint with them, or a task that does not need them."
    )


def test_a_module_in_memory_is_written_when_a_task_wants_a_directory(made):
    subject = open_subject(made.tuned["sky"])
    in_memory = ModuleSubject("merged", subject.module("encoder"), subject.tokenizer())
    again = open_subject(in_memory.directory)
    task = read_tasks(made.valid)[2]
    assert task.evaluate(again).value == task.evaluate(in_memory).value == task.evaluate(subject).value
    with pytest.raises(
        EvaluationError,
        match=r"^merged: contains no causal; a task needs a causal language model\. Give such a module\.$",
    ):
        in_memory.module("causal")
    with pytest.raises(
        EvaluationError,
        match=r"^merged: has no tokenizer; a task of texts needs one\. Give it with the module\.$",
    ):
        ModuleSubject("merged", subject.module("encoder")).tokenizer()
    with pytest.raises(
        EvaluationError,
        match=r"^merged: Linear cannot be written as a checkpoint; expected a transformers module\.",
    ):
        _ = ModuleSubject("merged", torch.nn.Linear(1, 1)).directory


def test_what_is_no_checkpoint_is_told(tmp_path):
    with pytest.raises(ModelError) as caught:
        open_subject(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path}: has no config.json; expected a transformers checkpoint. Give the directory of one."
    )
    with pytest.raises(ModelError, match="no such directory or file"):
        open_subject(tmp_path / "nowhere")
