"""Answers compared with the right ones, against a table made by hand."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from iwsft.language.grading import Grader


@pytest.fixture(scope="module")
def grader() -> Iterator[Grader]:
    # Far longer than a comparison takes: a busy machine must not decide a test.
    with Grader(seconds=100) as grader:
        yield grader
        assert not grader.problems


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
        ("3", r"3\\4", False),
        ("3, 4", r"3\\4", True),
        ("1", "", False),
        ("123_4", "123_5", False),
        ("123_4", "123_{4}", True),
        ("2516_8", r"2516_{\text{eight}}", True),
        ("5", r"5 \pmod{7}", True),
        (r"5 \pmod{7}", r"5 \pmod{8}", False),
        # A base, a bound or a multiple makes another number.
        ("12", "12_{3}", False),
        ("12", r"12_{\text{base }3}", False),
        ("12", "12_{10}", True),
        ("12_3", "12_{10}", False),
        ("12_3 + 1", "12_4 + 1", False),
        ("x_1 + 1", "1 + x_{1}", True),
        ("3", r"\log_2 8", True),
        ("101", "101 (base 2)", False),
        ("101", r"101\text{ in base two}", False),
        ("101_2", r"101 \text{ (base 2)}", True),
        ("101_2", "101 (base two)", True),
        ("101_2", "101 (base 3)", False),
        # The question names the base.
        ("101_2", "101", True),
        ("7", r"\le 7", False),
        ("7", r"\not= 7", False),
        ("7", "7+", False),
        (r"x \le 7", r"7 \geq x", True),
        (r"\leq 7", r"\le 7", True),
        ("7", r"7\text{ million}", False),
        (r"7\text{ million}", "7", False),
        (r"7\text{ million}", r"7 \text{ million dollars}", True),
        ("7", r"7\text{ or more}", False),
        ("7", r"7\text{ millimeters}", True),
        ("1, 2", r"1, 2, \dots", False),
        # These answers are cut off.
        ("7", "7^", False),
        ("7", "7^{", False),
        ("7", "7_", False),
        ("7", "7-", False),
        ("7", "7 /", False),
        ("7", "7=", False),
        ("7", r"7\cdot", False),
        ("7", r"7\frac", False),
        ("7", r"7^{\circ}", True),
        ("7", "7^{1}", True),
        ("7", r"\approx 7", True),
    ],
)
def test_math(grader: Grader, correct: str, answer: str, right: bool) -> None:
    assert grader.equal("math", correct, answer) is right


def test_integers_and_letters_need_no_process() -> None:
    grader = Grader()
    for kind, correct, answer, right in (
        ("integer", "73", "073", True),
        ("integer", "18", r"\$18.00", True),
        ("integer", "18", "19", False),
        ("integer", "18", "many", False),
        ("integer", "101", "101 in base two", False),
        ("letter", "C", "C", True),
        ("letter", "C", "D", False),
        ("letter", "C", "many", False),
    ):
        assert grader.equal(kind, correct, answer) is right
    assert grader._pool is None
