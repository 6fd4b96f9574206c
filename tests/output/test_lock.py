"""The lock is JSON that people can read, whatever it holds."""

import json

from hypothesis import given, settings
from hypothesis import strategies as st

from alnico.output.lock import LINE_LENGTH, format_json

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=300),
    lambda inner: st.lists(inner, max_size=30) | st.dictionaries(st.text(max_size=40), inner, max_size=30),
    max_leaves=60,
)


@settings(deadline=None)
@given(VALUES)
def test_what_is_laid_out_reads_back_as_it_was(value):
    assert json.loads(format_json(value)) == value


def test_a_tensor_has_a_line():
    output = {
        f"layer.{i}.weight": {"dtype": "BF16", "shape": [4, 4], "do": "mix", "digest": "0" * 32}
        for i in range(100)
    }
    lines = format_json({"output": output}).splitlines()
    assert len(lines) == 104
    assert max(map(len, lines)) <= LINE_LENGTH
    assert lines[2] == " " * 2 + '"layer.0.weight": ' + json.dumps(output["layer.0.weight"]) + ","
