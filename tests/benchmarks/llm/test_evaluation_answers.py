"""Answers found in a model's words and graded, against tables made by hand."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from benchmarks.llm.evaluation.grading import Grader
from iwsft.language.verification import extract_answer, parse_integer, parse_letter


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{\frac{1}{2}} it is", r"\frac{1}{2}"),
        (r"first \boxed{3}, no: $\boxed{4}$. I hope it is correct", "4"),
        (r"\boxed{\{1,2\}} and \fbox {7}", "7"),
        (r"\boxed{\left\{ x : x > \frac{1}{2} \right\}}", r"\left\{ x : x > \frac{1}{2} \right\}"),
        (r"the last is not closed: \boxed{5}, \boxed{6", "5"),
        ("**Answer:** 42.", "42"),
        ("Final Answer: (3, 4)\nThanks", "(3, 4)"),
        ("Answer: 3\nWait, that is wrong.\nAnswer: 4", "4"),
        ("**Final Answer**: C", "C"),
        ("Therefore the answer is 18 dollars.", "18 dollars"),
        ("Answer:\n\n 7 apples", "7 apples"),
        ("2+2=4\n#### 1,234", "1,234"),
        ("#### 5\nAnswer: 6", "6"),
        ("Answer: 6\n#### 5", "5"),
        (r"Answer: 6, that is \boxed{5}", "5"),
        (r"<think>it may be \boxed{3}</think>Answer: 5", "5"),
        ("<|im_start|>think\nAnswer: 3\n<|im_start|>answer\nFinal Answer: 10<|im_end|>", "10"),
        # Cut in its thinking: what it has so far counts.
        (r"<|im_start|>think\nI get \boxed{9} and", "9"),
        ("", None),
        ("I cannot say.", None),
        (r"\boxed{}", None),
        ("Answer:", None),
    ],
)
def test_extract(text: str, answer: str | None) -> None:
    assert extract_answer(text) == answer


@pytest.mark.parametrize(
    ("answer", "number"),
    [
        ("18", 18),
        ("073", 73),
        ("-5", -5),
        ("1,234", 1234),
        ("1{,}234{,}567", 1234567),
        (r"\$18", 18),
        ("18 dollars", 18),
        ("18.00", 18),
        (r"25\text{ cm}", 25),
        (r"90^\circ", 90),
        (r"50\%", 50),
        ("3 * 6 = 18", 18),
        ("n = 7", 7),
        ("12.5", None),
        ("1/2", None),
        (r"\frac{1}{2}", None),
        (r"5\sqrt{2}", None),
        (r"5\pi", None),
        ("5x", None),
        ("5!", None),
        ("2^{10}", None),
        ("2e3", None),
        ("10-5", None),
        ("1,23", None),
        ("3 or 4", None),
        ("eighteen", None),
        ("", None),
    ],
)
def test_integer(answer: str, number: int | None) -> None:
    assert parse_integer(answer) == number


@pytest.mark.parametrize(
    ("answer", "choice"),
    [
        ("C", "C"),
        ("(C)", "C"),
        ("c", "C"),
        ("C.", "C"),
        ("C) 12 MeV", "C"),
        ("(D) none of them", "D"),
        ("B: the second", "B"),
        ("**A**", "A"),
        (r"\text{B}", "B"),
        (r"$\mathrm{D}$", "D"),
        ("option A", "A"),
        ("A proton", None),
        ("Both A and B", None),
        ("E", None),
        ("CD", None),
        ("12 MeV", None),
    ],
)
def test_letter(answer: str, choice: str | None) -> None:
    assert parse_letter(answer) == choice


@pytest.fixture(scope="module")
def grader() -> Iterator[Grader]:
    # Far longer than a comparison takes: a busy machine must not decide a test.
    with Grader(seconds=100) as grader:
        yield grader
        assert grader.problems == []


@pytest.mark.parametrize(
    ("correct", "answer", "right"),
    [
        (r"\frac{1}{2}", "0.5", True),
        (r"\frac{3}{4}", r"\frac34", True),
        (r"\frac{3}{4}", r"\dfrac{3}{4}", True),
        (r"\left( 3, \frac{\pi}{2} \right)", r"(3,\pi/2)", True),
        ("p - q", "-q+p", True),
        ("x^2+2x+1", "(x+1)^2", True),
        (r"\sqrt{8}", r"2\sqrt{2}", True),
        ("2^{10}", "1024", True),
        ("58,500", "58500", True),
        (r"(-\infty, 2) \cup (3, \infty)", r"(-\infty,2)\cup(3,\infty)", True),
        (r"\{1,2,3\}", r"\{3,2,1\}", True),
        (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}", True),
        (r"\text{Evelyn}", "Evelyn", True),
        (r"\text{(C)}", "C", True),
        (r"11\text{ cm}", "11", True),
        (r"90^\circ", "90", True),
        (r"\$5.50", "5.50", True),
        ("3", "x=3", True),
        ("5", "The answer is $5$", True),
        ("12345", "12346", False),
        (r"\frac{1}{2}", r"\frac{1}{3}", False),
        ("(1,2)", "(2,1)", False),
        ("[0,1]", "(0,1)", False),
        ("x+1", "x-1", False),
        (r"\pi", "3.14", False),
        ("10", "10!", False),
        (r"\text{Evelyn}", "Carla", False),
        (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix}1\\3\end{pmatrix}", False),
        ("1", r"\frac{", False),
        ("1", "", False),
    ],
)
def test_math(grader: Grader, correct: str, answer: str, right: bool) -> None:
    assert grader.compare_math(correct, answer) is right
    assert grader.choose_comparison("math")(correct, answer) is right


def test_integers_and_letters_need_no_process() -> None:
    grader = Grader(compare="no_such_module:compare")
    same = grader.choose_comparison("integer")
    assert same("73", "073") and same("18", r"\$18.00") and not same("18", "19")
    assert not same("18", "many")
    same = grader.choose_comparison("letter")
    assert same("C", "C") and not same("C", "D") and not same("C", "many")
