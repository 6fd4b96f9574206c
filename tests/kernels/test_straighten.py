"""A straightened function gives what the plain Python function gives, or is refused with its reason."""

import functools
import math

import numpy as np
import pytest

from alnico.errors import MethodError
from alnico.kernels.scalar_source import check_pure, straighten

OUTSIDE = 3.0


def run_straight(function):
    """The straightened function, with ``select`` in its plain meaning: both sides are computed, one is taken."""
    names = {"REAL": np.float64, "select": lambda c, a, b: a if c else b, "math": math}
    exec("\n\n".join(straighten(function, "mix")), names)
    return names["mix"]


# Functions that have a straight-line form.


def if_else(x, t):
    """A docstring."""
    y = x[0]
    if x[1] > t:
        y = x[1] + 1
    elif x[1] < -t:
        y = y - 2
    else:
        y = t
    return y * 2


def nested_if(x, t):
    y = 0.0
    z = 1.0
    if x[0] > 0:
        z = 5.0
        if x[1] > 0:
            y = x[1]
            if x[2] > t:
                y += 10
        else:
            y = -z
            z = y
    return y + z * 100


def set_in_all_branches(x, t):
    if x[0] > t:
        y = x[0]
    elif x[1] > t:
        if x[2] > 0:
            y = 1.0
        else:
            y = 2.0
    else:
        y = x[2]
    return y


def changed_condition(x, t):
    a = x[0]
    if a > 0:
        a = -a
        t = 7.0
    else:
        a = a - t
    return a + t


def augmented(x, t):
    y = x[0]
    y += x[1]
    y -= 2
    y *= t
    if y > 0:
        y /= 4
        y += 1
    return y


def chained(x, t):
    return 1.0 if -t < x[0] <= x[1] < t else 0.0


def joined(x, t):
    if (x[0] > 0 and x[1] > 0) or not (x[2] > t or x[2] < -t):
        y = 1
    else:
        y = 2
    return y


def ternaries(x, t):
    a = x[0] if x[1] > 0 else (x[2] if x[2] > t else t)
    return (a if (a > 0 if t > 0 else a < 0) else -a) + 0.5


def loops(x, t):
    total = 0.0
    best = -math.inf
    for i in range(len(x)):
        if x[i] > t or i == 1:
            total += x[i]
        best = max(best, x[i])
        for j in range(i + 1, len(x)):
            total += x[i] * x[j] if i < j else 0.0
    return total + min(best, 2) / 3


def kept_from_earlier_rounds(x, t):
    last = t
    for i in range(len(x)):
        if x[i] > 0:
            last = x[i]
    return last


def calls(x, t):
    return (
        math.sqrt(abs(x[0])) + math.copysign(1.0, x[1]) + math.fabs(x[2]) + double(clipped(x[0], t)) * math.pi
    )


def clipped(x, limit):
    return max(-limit, min(x, limit))


def double(x):
    return 2 * same(x)


def same(x):
    return x


def average(x, t):
    total = t
    for i in range(len(x)):
        total += x[i]
    return total / len(x)


def unary(x, t):
    return -x[0] + (+x[1]) if not x[2] > t else -t


STRAIGHT = [if_else, nested_if, set_in_all_branches, changed_condition, augmented, chained, joined, ternaries, loops,
            kept_from_earlier_rounds, calls, average, unary]  # fmt: skip


@pytest.mark.parametrize("function", STRAIGHT, ids=lambda f: f.__name__)
def test_a_straight_line_gives_what_the_function_gives(function):
    random = np.random.default_rng(0)
    straight = run_straight(function)
    seen = set()
    for case in range(2000):
        x = tuple(random.choice([-1.0, 0.0, 0.5, 1.0], 3) if case % 2 else random.standard_normal(3))
        t = float(random.choice([0.0, 0.5, 1.0, abs(random.standard_normal())]))
        seen.add(function(x, t))
        assert straight(x, t) == function(x, t)
    assert len(seen) > 1


@pytest.mark.parametrize("function", STRAIGHT, ids=lambda f: f.__name__)
def test_no_branch_is_left_and_every_number_is_real(function):
    text = "\n".join(straighten(function, "mix"))
    assert " if " not in text
    assert " and " not in text
    assert " or " not in text
    assert "elif" not in text


def test_a_length_is_a_number_of_the_working_precision():
    # To numba float32 / int64 is float64: what one kernel measures another would not find again.
    assert "REAL(len(x))" in straighten(average, "mix")[0]


def sign(x):
    return -x


def elect(x):
    return sign(x) + 1


def elect_sign(x):
    return x * 100


def two_names_that_join_to_one(x):
    return elect(x) + elect_sign(x)


def test_functions_of_functions_keep_their_own_names():
    assert run_straight(two_names_that_join_to_one)(3.0) == 298.0
    sources = straighten(two_names_that_join_to_one, "mix")
    names = [s.partition("(")[0] for s in sources]
    assert names[-1] == "def mix"
    assert len(set(names)) == len(names) == 4


def test_a_captured_function_is_brought_along():
    def inner(x):
        return x + 1

    def outer(x):
        return inner(x) * 2

    assert run_straight(outer)(1.0) == 4.0


# What is refused.


def refusal(function, call=straighten) -> str:
    with pytest.raises(MethodError) as caught:
        call(function, "mix") if call is straighten else call(function)
    return str(caught.value)


def while_loop(x):
    while x > 0:
        x = x - 1
    return x


def two_targets(x):
    a, b = x, x
    return a + b


def early_return(x):
    if x > 0:
        return x
    return -x


def no_return(x):
    x = x + 1


def empty_function(x):
    """Nothing."""


def bare_return(x):
    x = x + 1
    return


def loop_in_if(x):
    y = 0.0
    if x[0] > 0:
        for i in range(len(x)):
            y += x[i]
    return y


def loop_over_values(x):
    y = 0.0
    for v in x:
        y += v
    return y


def broken_loop(x):
    for i in range(3):
        if x > 0:
            break
        x = x + i
    return x


def one_branch(x):
    if x > 0:
        y = x
    return y


def one_branch_with_else(x):
    z = 0.0
    if x > 0:
        y = x
    else:
        z = 1.0
    return y + z


def one_branch_of_three(x):
    if x > 0:
        y = x
    elif x < -1:
        y = -x
    return y


def left_from_an_earlier_round(x):
    count = 0.0
    for i in range(len(x)):
        if x[i] > 0:
            last = x[i]
        else:
            count += 1
    return last + count


def text(x):
    return x if x > 0 else "nothing"


def exponential(x):
    return math.exp(x)


def a_sum(x):
    return sum(x)


def keyword(x):
    return clipped(x, limit=1.0)


def power(x):
    return x**2


def walrus(x):
    y = 0.0
    return (y := x) + y


def listed(x):
    return max([v + 1 for v in x])


def truth_of_numbers(x):
    y = 0.0
    for i in range(len(x)):
        if i and x[i] > 0:
            y += x[i]
    return y


def defaulted(x, t=2.0):
    return x + t


def starred(*x):
    return x[0]


def attribute(x):
    return x.real


LONG_LOOP = "a loop inside an if has no straight-line form; put the if inside the loop."
ALLOWED = "abs, min, max, len, range, math.copysign, math.fabs, math.sqrt and pure functions"


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (
            while_loop,
            "line 2 of it: While has no straight-line form; use assignments, if, and for over range.",
        ),
        (
            two_targets,
            "line 2 of it: Assign has no straight-line form; use assignments, if, and for over range.",
        ),
        (
            early_return,
            "line 3 of it: a return inside an if; write `return a if condition else b` at the end.",
        ),
        (no_return, "line 1 of it: a scalar function must end with its only return."),
        (empty_function, "line 1 of it: a scalar function must end with its only return."),
        (
            bare_return,
            "line 3 of it: Return has no straight-line form; use assignments, if, and for over range.",
        ),
        (loop_in_if, f"line 4 of it: {LONG_LOOP}"),
        (
            loop_over_values,
            "line 3 of it: For has no straight-line form; use assignments, if, and for over range.",
        ),
        (
            broken_loop,
            "line 4 of it: Break has no straight-line form; use assignments, if, and for over range.",
        ),
        (one_branch, "line 2 of it: y is set in one branch only; set it before the if."),
        (one_branch_with_else, "line 3 of it: y is set in one branch only; set it before the if."),
        (one_branch_of_three, "line 2 of it: y is set in one branch only; set it before the if."),
        (left_from_an_earlier_round, "line 4 of it: last is set in one branch only; set it before the if."),
        (text, "line 2 of it: the constant 'nothing' is not a number."),
        (exponential, f"line 2 of it: calls math.exp; it may call {ALLOWED}."),
        (a_sum, f"line 2 of it: calls sum; it may call {ALLOWED}."),
        (keyword, "line 2 of it: calls clipped with keywords; pass all values in order."),
        (
            power,
            "line 2 of it: a power rounds differently from machine to machine; write x * x, or math.sqrt(x).",
        ),
        (walrus, "line 3 of it: NamedExpr has no straight-line form; use numbers, comparisons and calls."),
        (listed, "line 2 of it: ListComp has no straight-line form; use numbers, comparisons and calls."),
        (truth_of_numbers, "line 4 of it: i is joined by and/or; they join comparisons: write x != 0."),
        (
            defaulted,
            "line 1 of it: expected plain parameters, without defaults and stars; all values are passed in order.",
        ),
        (
            starred,
            "line 1 of it: expected plain parameters, without defaults and stars; all values are passed in order.",
        ),
        (attribute, "line 2 of it: uses x.real, which is not a number."),
    ],
    ids=lambda p: getattr(p, "__name__", ""),
)
def test_what_has_no_straight_line_form_is_refused(function, message):
    assert refusal(function) == f"{__name__}.{function.__name__}, {message}"


def test_a_captured_value_is_refused():
    captured = 2.0

    def scaled(x):
        return x * captured

    def by_a_global(x):
        return x * OUTSIDE

    def through_another(x):
        return by_a_global(x)

    message = "{} uses {}, a float from outside; it may use its arguments and pure functions only. Pass the value as an argument."
    for call in (check_pure, straighten):
        assert refusal(scaled, call) == message.format("scaled", "captured")
        assert refusal(by_a_global, call) == message.format("by_a_global", "OUTSIDE")
        assert refusal(through_another, call) == message.format("by_a_global", "OUTSIDE")


def test_another_module_is_refused():
    def with_numpy(x):
        return np.abs(x)

    assert refusal(with_numpy, check_pure).startswith("with_numpy uses np, a module from outside; ")
    check_pure(exponential)  # math is known; that exp is not allowed is said when it is straightened


def endless(x):
    return endless_too(x)


def endless_too(x):
    return endless(x)


def test_a_function_that_calls_itself_is_refused():
    assert (
        refusal(endless, check_pure)
        == "endless calls itself; expected a function without recursion. Write a loop over range."
    )


@pytest.mark.parametrize(
    ("value", "found"),
    [(abs, "builtin_function_or_method"), (functools.partial(same, 1), "partial"), (3, "int")],
    ids=["abs", "partial", "3"],
)
def test_what_is_no_plain_function_is_refused(value, found):
    assert refusal(value, check_pure) == f"{value!r} is a {found}, expected a plain function of numbers."


def doubled(function):
    @functools.wraps(function)
    def wrapper(x):
        return function(x) * 2

    return wrapper


@doubled
def decorated(x):
    return x


def test_a_function_whose_source_is_not_its_meaning_is_refused():
    names = {}
    exec("def typed_in(x):\n    return x", names)
    named_lambda = lambda x: x  # noqa: E731
    message = "{}: expected a function written with def, without decorators, in a file."
    assert refusal(named_lambda) == message.format("<lambda>")
    assert refusal(names["typed_in"]).startswith("typed_in: its source is not available")
    assert refusal(decorated) == message.format("decorated")
