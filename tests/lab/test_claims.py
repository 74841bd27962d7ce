import math

import numpy as np
import pytest

from thalweg.errors import ConfigError
from thalweg.lab.claims import Claim, judge
from thalweg.lab.plain import canonical, plain


def claim(check):
    return Claim("rank", "The rank grows.", "2", "at least 2", check)


@pytest.mark.parametrize(("value", "verdict"), [(2, "holds"), (1, "fails"), (None, "untested")])
def test_a_claim_is_held_against_its_criterion(value, verdict):
    (result,) = judge([claim(lambda m: m >= 2)], {"rank": value})
    assert (result.verdict, result.measured) == (verdict, value)


def test_a_missing_value_leaves_a_claim_untested():
    assert judge([claim(lambda m: True)], {})[0].verdict == "untested"


def test_a_check_that_answers_none_leaves_a_claim_untested():
    result = judge([claim(lambda m: None)], {"rank": 1})[0]
    assert (result.verdict, result.reason) == ("untested", "not testable at this size")


def test_a_check_that_raises_fails_with_the_reason():
    result = judge([claim(lambda m: m["slope"])], {"rank": {}})[0]
    assert (result.verdict, result.reason) == ("fails", "the check raised KeyError: 'slope'")


def test_a_value_of_an_unknown_claim_is_refused():
    with pytest.raises(ConfigError, match=r"Got rnak. Use the id of the claim"):
        judge([claim(bool)], {"rnak": 1})


def test_the_check_sees_the_raw_value_and_the_result_a_plain_one():
    result = judge([claim(lambda m: bool(np.isinf(m).all()))], {"rank": np.array([math.inf])})[0]
    assert (result.verdict, result.measured) == ("holds", ["inf"])


def test_numbers_that_json_lacks_are_read_back_by_float():
    assert [float(x) for x in plain([math.inf, -math.inf, 1.5])] == [math.inf, -math.inf, 1.5]
    assert math.isnan(float(plain(math.nan)))


def test_a_value_without_a_json_form_is_refused():
    with pytest.raises(ConfigError, match=r"Got object. Convert it in the recipe"):
        canonical({"a": object()})


@pytest.mark.parametrize("value", [math.nan, [1.0, math.nan], {"slope": np.float64("nan")}])
def test_nan_never_holds(value):
    result = judge([claim(lambda m: True)], {"rank": value})[0]
    assert (result.verdict, result.reason) == ("fails", "NaN was measured")


@pytest.mark.parametrize("answer", [math.nan, "yes", 1, []])
def test_a_check_must_answer_true_false_or_none(answer):
    result = judge([claim(lambda m: answer)], {"rank": 1})[0]
    assert result.verdict == "fails"
    assert "neither true nor false nor None" in result.reason
