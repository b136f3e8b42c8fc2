"""CI runs a part of the exhaustive lists that the commit chooses; every test has its turn."""

import pytest

from chosen import is_chosen, selects_only_gpu, slow_but


def test_a_commit_chooses_about_one_in_so_many() -> None:
    tests = [f"tests/test_a.py::test_b[{i}]" for i in range(2000)]
    assert 150 < sum(is_chosen(test, "commit", 10) for test in tests) < 250
    assert all(is_chosen(test, "commit", 1) for test in tests)


def test_another_commit_chooses_others() -> None:
    commits = [str(i) for i in range(200)]
    assert any(is_chosen("test", commit, 10) for commit in commits)
    assert not all(is_chosen("test", commit, 10) for commit in commits)


def test_all_but_the_fast_cases_are_slow() -> None:
    fast, slow = slow_but(["a"], ["a", "b"])
    assert fast == "a"
    assert slow.values == ("b",)
    assert [mark.name for mark in slow.marks] == ["slow"]
    with pytest.raises(AssertionError):
        slow_but(["c"], ["a", "b"])


@pytest.mark.parametrize("expression", ["gpu", "gpu and slow", "gpu and not slow", " gpu and not (ranks or cluster)"])
def test_expressions_that_select_gpu_tests_alone(expression: str) -> None:
    assert selects_only_gpu(expression)


@pytest.mark.parametrize("expression", ["", "not gpu", "slow", "not slow", "gpu or slow", "not slow and not gpu"])
def test_expressions_that_select_other_tests(expression: str) -> None:
    assert not selects_only_gpu(expression)
