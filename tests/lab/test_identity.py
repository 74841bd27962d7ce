from hypothesis import given, settings
from hypothesis import strategies as st

from thalweg.lab.runs.identity import run_id

scalars = st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text() | st.booleans() | st.none()
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3), max_leaves=5)
parameters = st.dictionaries(st.text(max_size=8), values, max_size=6)
fixed = settings(deadline=None, derandomize=True)


@fixed
@given(parameters, st.randoms(use_true_random=False))
def test_the_order_of_the_keys_does_not_matter(values, random):
    items = list(values.items())
    random.shuffle(items)
    assert run_id("a", 1, dict(items)) == run_id("a", 1, values)


@fixed
@given(parameters, st.text(max_size=8), values)
def test_any_change_of_a_parameter_changes_the_id(values, key, value):
    changed = values | {key: value}
    is_same = repr(sorted(changed.items())) == repr(sorted(values.items()))
    assert (run_id("a", 1, changed) == run_id("a", 1, values)) == is_same


def test_recipe_version_and_seed_enter_the_id():
    ids = {run_id(r, v, {"seed": s}) for r in ("a", "b") for v in (1, 2) for s in (0, 1)}
    assert len(ids) == 8


def test_the_id_is_the_sha256_of_the_canonical_text():
    # sha256 of {"parameters":{"seed":0,"widths":[2,3]},"recipe":"a/b","version":1}, computed with sha256sum
    expected = "d0ea441c88899fce17522f44a0fd4f0e6d572523935122434c667e021fa3b0bf"
    assert run_id("a/b", 1, {"widths": (2, 3), "seed": 0}) == expected
