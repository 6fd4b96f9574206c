"""tasks.yml: what it says, and what is said of mistakes in it."""

from __future__ import annotations

import io
import json
import os
import zipfile

import numpy as np
import pytest

from alnico.errors import EvaluationError
from alnico.evaluation.examples import read_examples, read_text
from alnico.evaluation.task_file import EXPECTED, read_tasks
from made_tasks import TASKS, save_tasks, save_texts

ROWS = [{"text": "a cat", "label": "cat"}, {"text": "a dog", "label": "dog"}]


def told(source, folder="."):
    with pytest.raises(EvaluationError) as caught:
        read_tasks(source, folder, allow_code=True)
    assert caught.value.exit_code == 12
    return str(caught.value)


def task(folder, data="rows.jsonl", **keys):
    save_texts(folder / "rows.jsonl", ROWS)
    return {"tasks": [{"name": "pets", "type": "classification", "data": data, **keys}]}


def test_a_file_says_all_of_its_tasks(made):
    tasks = read_tasks(made.valid)
    assert [(t.name, t.goal, t.size, t.weight) for t in tasks] == [(name, "max", 60, 1.0) for name in TASKS]
    assert [t.classes for t in tasks] == list(TASKS.values())
    shared = [
        one.digests() & other.digests() for one, other in zip(tasks, read_tasks(made.test), strict=True)
    ]
    assert not any(shared)
    assert all(
        one.digests() == same.digests() for one, same in zip(tasks, read_tasks(str(made.valid)), strict=True)
    )


def test_paths_are_the_folders_and_limits_take_the_first(tmp_path):
    (one,) = read_tasks(task(tmp_path, limit=1, weight=2), tmp_path)
    assert (one.size, one.weight) == (1, 2.0)
    assert one.digests() < read_tasks(task(tmp_path), tmp_path)[0].digests()


def test_csv_and_jsonl_say_the_same(tmp_path):
    (tmp_path / "rows.csv").write_text("body,kind,label\na cat,1,x\na dog,2,y\n\n")
    found = read_examples(tmp_path / "rows.csv", "body", "kind")
    assert (list(found.inputs), found.labels) == (["a cat", "a dog"], ("1", "2"))
    (tmp_path / "rows.jsonl").write_text('{"body": "a cat", "kind": 1}\n\n{"body": "a dog", "kind": 2}\n')
    same = read_examples(tmp_path / "rows.jsonl", "body", "kind")
    assert (same.inputs, same.labels, same.places[1]) == (
        found.inputs,
        found.labels,
        f"{tmp_path / 'rows.jsonl'}:3",
    )


def test_labels_may_be_left_out_by_name(tmp_path):
    assert read_tasks(task(tmp_path, label=None), tmp_path)[0].size == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", f"tasks.yml:1: is empty; expected {EXPECTED}."),
        ("tasks: []\n", f"tasks.yml:1: tasks is an empty list; expected {EXPECTED}."),
        ("tasks: 3\n", f"tasks.yml:1: tasks is 3; expected {EXPECTED}."),
        (
            "task: [a]\n",
            "tasks.yml:1: tasks[0] is 'a'; expected a mapping such as {name: news, type: classification, data: news.jsonl}.\n"
            "tasks.yml:1: the file has the unknown key 'task'. Did you mean tasks?",
        ),
        ("- a\n", f"tasks.yml:1: the file is a list; expected {EXPECTED}."),
        ("tasks: [3]\n", "tasks.yml:1: tasks[0] is 3; expected a mapping such as {name: news, type: classification, data: news.jsonl}."),
        ("tasks:\n- name: a\n", "tasks.yml:2: tasks[0].type is missing; expected classification, perplexity, call or lm_eval."),
        (
            "tasks:\n- name: a\n  type: classificaton\n",
            "tasks.yml:3: tasks[0].type is 'classificaton'; expected classification, perplexity, call or lm_eval. Did you mean classification?",
        ),
        ("tasks: [\n", "tasks.yml:2: is not YAML (while parsing a flow node, expected the node content, but found '<stream end>'). Correct this line or the one before it."),
    ],
)  # fmt: skip
def test_a_file_of_no_tasks_is_told(tmp_path, monkeypatch, text, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tasks.yml").write_text(text)
    assert told("tasks.yml") == message


def test_a_file_that_is_not_there_is_told(tmp_path):
    assert (
        told(tmp_path / "t.yml")
        == f"{tmp_path}/t.yml: cannot be read (No such file or directory). Check the path of the tasks."
    )
    (tmp_path / "t.yml").write_bytes(b"\xff")
    assert (
        told(tmp_path / "t.yml")
        == f"{tmp_path}/t.yml: is not UTF-8 text; expected YAML. Give the YAML file of the tasks."
    )


def test_all_mistakes_are_told_with_their_lines(tmp_path):
    save_texts(tmp_path / "rows.jsonl", ROWS)
    (tmp_path / "t.yml").write_text(
        "tasks:\n- {name: a, type: classification, data: rows.jsonl, max_lenght: 3}\n"
        "- {name: a, type: classification, data: rows.jsonl, batch_size: 0, pooling: max, weight: -1}\n"
        "- {name: b, type: classification, data: rows.jsonl, head: names, labels: [cat]}\n"
        "- {name: c, type: classification, data: rows.jsonl, head: own, labels: [cat, cow]}\n"
    )
    where = tmp_path / "t.yml"
    assert told(where).splitlines() == [
        f"{where}:2: tasks[0] has the unknown key 'max_lenght'. Did you mean max_length?",
        f"{where}:3: tasks[1].batch_size is 0; expected a whole number of at least 1.",
        f"{where}:3: tasks[1].name is 'a', like tasks[0].name; expected different names.",
        f"{where}:3: tasks[1].pooling is 'max'; expected mean or cls.",
        f"{where}:3: tasks[1].weight is -1; expected a number above 0.",
        f"{where}:4: tasks[2].encoder is missing; expected text.",
        f"{where}:4: tasks[2].labels is one class; expected at least two classes, a list or {{name: words}}.",
        f"{where}:5: tasks[3]: c: {tmp_path}/rows.jsonl:2: the label is 'dog'; expected a class of the head: cat, cow. "
        "Add it to labels, or remove the example.",
    ]


def test_a_mapping_has_no_lines(tmp_path):
    assert told(task(tmp_path, head="names", encoder="base"), tmp_path) == (
        "tasks: tasks[0].labels is missing; head: names needs the classes, for example {earn: company earnings}."
    )


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("r.jsonl", "text\n", "{}:1: is not JSON (Expecting value: line 1 column 1 (char 0)); expected an object on each line. Convert the file."),
        ("r.jsonl", '{"text": "a", "label": "b"}\n[1]\n', "{}:2: is a list; expected an object on each line. Convert the file."),
        ("r.jsonl", '{"text": "a", "class": "b"}\n', "{}:1: has no field 'label'; found 'text', 'class'. Name the field of the label, for example `label: text`."),
        ("r.jsonl", '{"text": null, "label": "b"}\n', "{}:1: text is null; expected text. Correct the line, or remove it."),
        ("r.jsonl", '{"text": "a", "label": 0.5}\n', "{}:1: label is a number; expected text or a whole number. Correct the line, or remove it."),
        ("r.jsonl", "\n", "{}: contains no examples; expected at least one. Check the file."),
        ("r.csv", "text,label\na\n", "{}:2: has 1 values, but the header has 2; expected the same number. Correct the line."),
        ("r.csv", "text,text,label\na,b,c\n", "{}:1: the header has 'text' twice; expected each name once. Rename one of the columns."),
        ("r.jsonl", '{"text": "\\ud800", "label": "x"}\n', "{}:1: contains half of a surrogate pair, expected Unicode text. Correct the line, or remove it."),
        ("r.jsonl", '{"text": "a", "label": "\\udfff"}\n', "{}:1: contains half of a surrogate pair, expected Unicode text. Correct the line, or remove it."),
        ("r.csv", "text,kind\na,b\n", "{}:2: has no field 'label'; found 'text', 'kind'. Name the field of the label, for example `label: text`."),
        ("r.txt", "a\n", "{}: ends in '.txt'; expected .jsonl, .csv, .npz. Convert the examples to one of these."),
        ("r.npz", "a\n", "{}: is not an npz file of plain arrays"),
        ("r.jsonl", None, "{}: cannot be read (No such file or directory). Check the path and its permissions."),
    ],
)  # fmt: skip
def test_data_that_cannot_be_read_is_told(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(EvaluationError) as caught:
        read_examples(tmp_path / name)
    assert str(caught.value).startswith(message.format(tmp_path / name))


def test_images_of_another_shape_are_told(tmp_path):
    path = tmp_path / "i.npz"
    np.savez(path, images=np.zeros((2, 8, 8), np.uint8), labels=np.zeros(2, np.int64))
    with pytest.raises(EvaluationError) as caught:
        read_examples(path)
    assert str(caught.value) == (
        f"{path}: images are uint8 of shape (2, 8, 8); expected floating-point pixels as the model takes them, (n, channels, height, width). "
        "Run the model's image processor on them first."
    )
    np.savez(path, images=np.zeros((2, 3, 8, 8), np.float32))
    with pytest.raises(EvaluationError, match="has no array 'labels'; found 'images'"):
        read_examples(path)
    assert len(read_examples(path, label=None, limit=1).inputs) == 1


def test_tasks_can_be_written_as_json(made, tmp_path):
    document = {
        "tasks": [
            {"name": "pets", "type": "classification", "data": str(made.valid.parent / "pets.valid.jsonl")}
        ]
    }
    (tmp_path / "tasks.json").write_text(json.dumps(document))
    assert read_tasks(tmp_path / "tasks.json")[0].size == 60
    assert read_tasks(save_tasks(tmp_path / "tasks.yml", document["tasks"]))[0].size == 60


def test_the_tasks_of_the_documentation_are_read_but_for_their_files(tmp_path):
    """They fail for files that are not there, and for no key."""
    from alnico.evaluation import task_file

    assert task_file.__doc__ is not None
    lines = task_file.__doc__.splitlines()
    listed = [line[4:] for line in lines[lines.index("    tasks:") :] if line.startswith("    ")]
    (tmp_path / "tasks.yml").write_text("\n".join(listed))
    (tmp_path / "wiki.txt").write_text("some words")
    (tmp_path / "scoring.py").write_text("def accuracy(path): ...\n")
    where = tmp_path / "tasks.yml"
    assert told(where) == (
        f"{where}:2: tasks[0]: {tmp_path}/r8.valid.jsonl: cannot be read (No such file or directory). Check the path and its permissions."
    )


def packed(path, shape, held=b"", method=zipfile.ZIP_DEFLATED):
    """An npz whose images claim a shape."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": shape})
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("images.npy", header.getvalue() + held)
    return path


def test_pictures_that_claim_more_than_the_file_holds_are_refused(tmp_path):
    path = packed(tmp_path / "i.npz", (10**9, 3, 1000, 1000))
    with pytest.raises(
        EvaluationError,
        match=r"is not an npz file of plain arrays \(images.npy claims the shape \(1000000000, 3",
    ):
        read_examples(path, label=None)
    packed(path, (64, 4, 256, 256), bytes(4 * 64 * 4 * 256 * 256))
    with pytest.raises(
        EvaluationError,
        match=r"images.npy is \d+ bytes compressed and 67108992 bytes uncompressed; expected at most 100 times",
    ):
        read_examples(path, label=None)
    packed(path, (2, 3, 4, 4), bytes(4 * 2 * 3 * 4 * 4))
    assert read_examples(path, label=None).inputs.shape == (2, 3, 4, 4)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("images", b"no array")
    with pytest.raises(EvaluationError, match="is not an npz file of plain arrays"):
        read_examples(path, label=None)


@pytest.mark.parametrize("name", ["data.jsonl", "data.csv", "data.npz", "text.txt"])
def test_data_that_would_be_waited_for_are_refused(tmp_path, name):
    os.mkfifo(tmp_path / name)
    with pytest.raises(EvaluationError, match="is a pipe or a device; expected a regular file"):
        read_text(tmp_path / name) if name == "text.txt" else read_examples(tmp_path / name)
    with pytest.raises(EvaluationError, match="is a pipe or a device"):
        read_text("/dev/zero")
