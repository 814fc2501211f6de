"""Answers found in a model's words and read, against tables made by hand."""

from __future__ import annotations

import time

import pytest

from iwsft.language.verification import extract_answer, parse_integer, parse_letter

MINUS, EN_DASH, DASH = "\u2212", "\u2013", "\u2014"


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{\frac{1}{2}} it is", r"\frac{1}{2}"),
        (r"first \boxed{3}, no: $\boxed{4}$. I hope it is correct", "4"),
        (r"\boxed{\{1,2\}}. Then \fbox {7}", "7"),
        (r"\boxed{\left\{ x : x > \frac{1}{2} \right\}}", r"\left\{ x : x > \frac{1}{2} \right\}"),
        (r"the last is not closed: \boxed{5}, \boxed{6", "5"),
        (r"an open one around it: \boxed{x = \boxed{6}", "6"),
        (r"\boxed{x = \boxed{6}}", "x = {6}"),
        (r"$\boxed 6$", "6"),
        (r"\boxed{5}. As asked, it is inside \boxed{}.", "5"),
        # Neighbours are one answer.
        (r"\boxed{3} and $\boxed{4}$", "3, 4"),
        (r"$x=\boxed{3}$ or $x=\boxed{4}$, or \(\boxed{3}\)", "3, 4"),
        ("\\boxed{3}\n\n\\boxed{3}", "3"),
        ("**Answer:** 42.", "42"),
        ("Final Answer: (3, 4)\nThanks", "(3, 4)"),
        ("Answer: 3\nWait, that is wrong.\nAnswer: 4", "4"),
        ("**Final Answer**: C", "C"),
        ("### Final answer\n\n**5**\n", "5"),
        ("Answer:\n\\[\n5\n\\]", "5"),
        ("Therefore the answer is 18 dollars.", "18 dollars"),
        ("The answer to part (a) is 18. I hope it is correct.", "18"),
        ("The answer should be 7", "7"),
        ("Answer (in cm) = 7", "7"),
        ("Answer:\n\n 7 apples", "7 apples"),
        ("2+2=4\n#### 1,234", "1,234"),
        ("The answer is 5.\n\n#### Verification\n\n#### 1. First", "5"),
        ("#### 5\nAnswer: 6", "6"),
        ("Answer: 6\n#### 5", "5"),
        (r"Answer: 6, that is \boxed{5}", "5"),
        ("<answer>\n5\n</answer>", "5"),
        (r"<think>it may be \boxed{3}</think>Answer: 5", "5"),
        ("<|im_start|>think\nAnswer: 3\n<|im_start|>answer\nFinal Answer: 10<|im_end|>", "10"),
        # Cut in its thinking: what it has so far counts.
        (r"<|im_start|>think\nI get \boxed{9} and", "9"),
        # An explanation is not part of the answer.
        ("Answer: $x^2$, because $x=7$ fails", "$x^2$"),
        (f"Answer: 5 {DASH} 7 fails", "5"),
        ("Answer: (3, 4), as claimed", "(3, 4)"),
        ("Answer: x - y", "x - y"),
        (f"Answer: {MINUS}\uff15\u00b2", "-5^{2}"),
        ("Answer: \u00bd\u221a2", r"\frac{1}{2}\sqrt{2}"),
        ("", None),
        ("I cannot say.", None),
        (r"\boxed{}", None),
        ("Answer:", None),
        ("<answer></answer>", None),
    ],
)
def test_extract(text: str, answer: str | None) -> None:
    assert extract_answer(text) == answer


INTEGERS: dict[int | None, tuple[str, ...]] = {
    33: (
        *("33", "033", "+33", "33.", "33.00", "(33)", "{33}", r"\(33\)", r"\[33\]", "$33$"),
        *(r"\text{33}", r"\mathbf{33}", r"\underline{\text{ 33 }}", r"\left(33\right)", "**33**"),
        *(r"\boldsymbol{33}", r"\rm 33"),
        *(r"\displaystyle 33", r"33\quad", "33\\\\", r"\textcolor{red}{33}", r"\{33\}"),
        # Digits of other scripts, fullwidth, bold.
        *("\u0663\u0663", "\uff13\uff13", "\U0001d7d1\U0001d7d1"),
        *(r"33 \pmod{1000}", r"33 \bmod 1000", r"33 (\text{mod } 1000)", "33 mod 1000"),
        *("n = 33", "20+13 = 33", "33 = 20 + 13", "33 = x", "m + n = 20+13 = 33", r"x \approx 33"),
        *(r"33\text{ cm}^2", r"33\,\mathrm{m}^2", "33 cm\u00b2", "33cm", "33 m/s^2", "33 ways"),
        *(r"33^\circ", "33\u00b0", r"33^{\circ}\text{C}", r"33\%", "33 percent"),
        *(r"\$33.00", "$33", "33 dollars", "\u00a333", "33 \u20ac", "US$33"),
        *(r"\text{The answer is } 33", "about 33", "Tom and Ann have 33", "33 (since 7 fails)"),
        *(r"33 \text{ because } x = 7 \text{ fails}", "33, not 7", "33; 7 fails"),
        *("33\u200b", "33.\u200b", "\ufeff33", "\u206833\u2069", "\u201c33\u201d", r"33\tag{1}"),
        *(r"33\checkmark", "33 for n = 7", "33 when x = 7", "33 at x = 7", "33 (thirty-three)"),
        *("33 millimeters", "33 bills", "33 (base case)"),
        *("33, assuming x = 7", "33, i.e. x = 7", "33, that is, 3 times 11", "33 K", "33 minutes"),
        *("f(6) = 33", "a_6 = 33", r"3 \times 11 = 33", "3 * 11 = 33", r"\log_2 8 + 30 = 33"),
    ),
    -33: (
        *("-33", f"{MINUS}33", "- 33", f"{EN_DASH}33", "{-}33", "-{33}", r"-\text{33}", "x = - 33"),
        *("minus 33", "negative 33", r"-\$33"),
    ),
    1234: (
        *("1,234", "1{,}234", r"1\,234", r"1\ 234", "1\u2009234", "1\u202f234", "1\u00a0234"),
        *("1 234", "1'234", "1,234.00"),
    ),
    1234567: ("1{,}234{,}567",),
    None: (
        # Several, or two readings.
        *("3 or 4", "3, 4", "1, 234", r"3 \text{ and } 4", "x = 33, y = 2", "x=3 or x=-3", "2 = 3"),
        *(r"\pm 3", "\u00b13", "(33, 2)", "[0, 33]", r"\{3, 4\}", "3 - 4", f"3{EN_DASH}4", "3:34"),
        *("3 out of 4", "3 of the 4", "3 feet 2 inches", "1,23", "12,5", "12,345,67", "1.234,5"),
        # Not that number, or a bound.
        *(
            "not 33",
            "less than 33",
            "33 or more",
            r"x \le 33",
            "x > 33",
            r"x \neq 33",
            "at least 33",
        ),
        # Other terms.
        *("12.5", "1/2", "3 1/2", "\u00bd", r"\frac{66}{2}", r"5\sqrt{2}", r"5\pi", "5 pi", "5x"),
        *("2*3", "10**2", "2 * 3", "log 6", "sin 6", "ln 6", "33 squared", "33 choose 2", "33..."),
        # A part of a value, a bound, a condition, a refusal.
        *("5 times", "5 times as many", "2 thirds", "33 tenths", "33 and half", "half of 33"),
        *("twice 33", "square root of 33", "one of 33", "up to 33", "almost 33", "33 plus tax"),
        *(
            "33 minus one",
            "33 if even",
            "33 if x = 7, 34 otherwise",
            "33 unless odd",
            "33 is wrong",
        ),
        *("33 cannot be", "33 fails", "33 is", "33. No, 34", "33? Wait, 34", "33K", "33rd"),
        *("5 x", "5!", "5^2", "5\u00b2", "2^{10}", "2e3", r"3 \times 10^2", "3\u00d710", "33_4"),
        *("33 (base 4)", "33 (in base four)", "33 in base 4", "33 thousandths", "33 trillion"),
        *("33\u2084", "|-33|", "5 million", "2 dozen", "10-5"),
        *("thirty-three", "none", "N/A", "?", "no solution", "", "5" * 5000, "33; 34"),
        *(r"3\\4", r"3 \\ 400", r"3\\-4"),
    ),
}


@pytest.mark.parametrize(
    ("answer", "number"),
    [(answer, number) for number, answers in INTEGERS.items() for answer in answers],
)
def test_integer(answer: str, number: int | None) -> None:
    assert parse_integer(answer) == number
    assert parse_integer(extract_answer(rf"So it is $\boxed{{{answer}}}$.") or "") == number


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("Answer: 5, because x=7 fails", 5),
        ("Answer: 5 - because 7 fails", 5),
        ("Answer: 5. Check: 2+3=5", 5),
        ("Answer: 5 (not 7)", 5),
        (r"Answer: \(5\), where 7 was excluded", 5),
        (f"#### {MINUS}$5", -5),
        ("Answer:\u200b 5", 5),
        ("Answer: - 5 apples", -5),
        ("Answer:\n- 5 apples", 5),
        ("### Final answer\n\n - **5**", 5),
        ("Answer:\n-5", -5),
        ("Answer: 5? Yes", 5),
        ("Answer: 5<end_of_turn>", 5),
        ("The answer is 5. Actually, the answer is 6.", 6),
        ("The answer is 5. The answer is not 6.", 5),
        ("Answer: 5. No, 6", None),
        ("Answer: 5 is not right", None),
        ("The answer is not 5", None),
        ("Answer: 5 (or 7)", None),
        ("Answer: x=5, y=7", None),
        (r"$x=\boxed{3}$, $y=\boxed{4}$", None),
    ],
)
def test_integer_of_a_text(text: str, number: int | None) -> None:
    assert parse_integer(extract_answer(text) or "") == number


LETTERS: dict[str | None, tuple[str, ...]] = {
    "C": (
        *("C", "(C)", "c", "C.", "[C]", '"C"', "**C**", "_C_", r"\(C\)", r"$\mathrm{C}$"),
        *(r"\text{C}", r"\textbf{(C)}", r"\text{(C) 12 MeV}", "\uff23", "option C", "choice (C)"),
        *("C) 12 MeV", "C: 12 MeV", "C, 12 MeV", "C. 12 MeV", "C (12 MeV)", "C - 12 MeV"),
        *(f"C {EN_DASH} 12 MeV", f"C {DASH} 12 MeV", "C - because 12 MeV", "C because A fails"),
        *("C, not A", "C (not A)", "C. A is wrong.", "C; A is wrong", "C is right, B is not"),
        *("C) A proton", "C) Both A and B", "The correct option is C", "C instead of A"),
        *(
            "C!",
            "C and not A",
            "I choose C",
            "C?",
            "C\u200b",
            "\u200bC",
            "C, D is wrong",
            "C is best",
        ),
        *("C, A proton", "C: A is wrong", "C rather than A", "C. The answer is not A"),
        *("C, a vitamin B12", "C) then B", "C, then 12 MeV"),
    ),
    None: (
        *("A, C", "A and C", "(A) or (C)", "A/C", "A & C", "AC", "A, B, and C", "both A and C"),
        *("A proton", "Calcium", "C-12", "B cells", "not C", "E", "12 MeV", "none of the above"),
        *("I don't know", "X", "", "C, D are wrong", "C, E"),
        *("C, then B", "C, or maybe (D).", "C is wrong", "C is not correct"),
        *(
            "C is incorrect, D is correct",
            "C. No, D",
            "C? Wait, D",
            "C isn't right",
            "C = 5",
            "C vs D",
        ),
    ),
}


@pytest.mark.parametrize(
    ("answer", "choice"),
    [(answer, choice) for choice, answers in LETTERS.items() for answer in answers],
)
def test_letter(answer: str, choice: str | None) -> None:
    assert parse_letter(answer) == choice
    assert parse_letter(extract_answer(f"So.\n\nAnswer: {answer}", letter=True) or "") == choice


def test_the_letter_of_a_text_with_boxed_numbers() -> None:
    assert extract_answer("\\boxed{5.2}\nAnswer: C", letter=True) == "C"
    assert extract_answer(r"Answer: C, as E = \boxed{5.2}", letter=True) == "C"
    assert extract_answer(r"Answer: B. No, it is \boxed{C}", letter=True) == "C"
    assert extract_answer("The answer is C. So the answer is D.", letter=True) == "D"
    assert parse_letter(extract_answer(r"\boxed{A} or \boxed{C}", letter=True) or "") is None


@pytest.mark.parametrize(
    "piece", ["\\boxed{", "####", " ", "<answer>", "answer to ", "1,234", "(a ", ". A", "5 for "]
)
def test_long_repetitions_take_no_time(piece: str) -> None:
    """Models repeat themselves; twice the text takes about twice the time."""
    text = piece * (40_000 // len(piece))
    start = time.process_time()
    for around in ("", "Answer: 5", "\\boxed{"):
        answer = extract_answer(f"{around}{text}}} x")
        parse_integer(answer or "")
    assert time.process_time() - start < 5
