"""Any change of a file is read or refused: the targets of tests/fuzz, with what they watch, driven by hypothesis."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fuzz.harness import Run, mutated_json
from fuzz.run import TARGETS, import_readers


@pytest.fixture(scope="module", params=TARGETS)
def run(request: pytest.FixtureRequest) -> Iterator[Run]:
    import_readers()
    made = Run(importlib.import_module(f"fuzz.fuzz_{request.param}").TARGET)
    yield made
    made.close()


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_changed_file_is_read_or_refused_and_nothing_else_happens(run: Run, data: st.DataObject) -> None:
    seeds = run.target.seeds()
    content = seeds[data.draw(st.integers(0, len(seeds) - 1))]
    draw: Random = data.draw(st.randoms(use_true_random=False))
    for _ in range(data.draw(st.integers(1, 3))):
        changed = (run.target.mutate or mutated_json)(content, draw, run.target.words)
        if changed is None:  # no mutation of its own: some bytes
            at = draw.randrange(len(content) + 1)
            changed = content[:at] + draw.randbytes(draw.randrange(5)) + content[at + draw.randrange(5) :]
        content = changed
    run(content)
