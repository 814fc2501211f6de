"""The two pages: equal numbers, no external files, and the provenance of the numbers."""

from __future__ import annotations

import base64
import contextlib
import html
import io
import itertools
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from benchmarks.report import figures
from benchmarks.report.__main__ import main
from benchmarks.report.document import shareable
from benchmarks.report.options import Options
from benchmarks.report.page import write_report
from benchmarks.report.scores import cells
from benchmarks.results import CONTROL, read_runs

if TYPE_CHECKING:
    from tests.benchmarks.report.conftest import MakeRun

PAGES = ("index.html", "report.md", "runs.json")
# Each has a panel for a dataset, a metric or an algorithm.
FIGURES = {
    "scores",
    *("learning_curves", "learning_curves_variants", "training", "training_variants"),
}


class Page(HTMLParser):
    """Tables as text, images, what is loaded, anchors and the links to them."""

    VOID = ("meta", "img", "link", "br", "hr", "input")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self.images: list[str] = []
        self.loads: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.tags: list[str] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        for key, value in attrs:
            assert value is not None
            if key == "id":
                self.ids.append(value)
            elif key == "href" and tag == "a":
                self.links.append(value)
            elif key == "src" and tag == "img":
                self.images.append(value)
            elif key in ("src", "href", "srcset", "data", "action", "poster", "background"):
                self.loads.append(value)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if {"td", "th"} & set(self.open):
            self.tables[-1][-1][-1] += data


def markdown_tables(text: str) -> list[list[list[str]]]:
    """Tables of markdown, as rows of cells."""
    tables: list[list[list[str]]] = [[]]
    for line in text.splitlines():
        if line.startswith("|"):
            row = [cell.strip().strip("*") for cell in line.strip("|").split(" | ")]
            if not row[0].startswith("---"):
                tables[-1].append(row)
        elif tables[-1]:
            tables.append([])
    return [table for table in tables if table]


def with_group_headings(table: list[list[str]]) -> list[list[str]]:
    """A table whose first column became headings of groups of rows."""
    heading, *rows = table
    groups = itertools.groupby(rows, key=lambda row: row[0])
    return [heading[1:], *(r for name, g in groups for r in ([name], *(row[1:] for row in g)))]


@pytest.fixture(scope="module")
def printed() -> list[str]:
    """What the command printed when it wrote the report of ``whole``."""
    return []


@pytest.fixture(scope="module")
def whole(
    tmp_path_factory: pytest.TempPathFactory,
    fill: Callable[[Path], None],
    make_run: MakeRun,
    printed: list[str],
) -> Path:
    """Runs that fill every part of the page, and their report."""
    runs = tmp_path_factory.mktemp("whole")
    fill(runs)
    for seed in range(3):
        make_run(runs, "hopper-medium-replay-v2", "cql", seed, 40.0, success_rate=0.5, steps=50)
        make_run(runs, "hopper-medium-replay-v2", "iql", seed, 4.0, published_steps=1000)
    (make_run(runs, "hopper-a", "dt", 0, 1.0) / "result.json").unlink()
    for k in (3, 10):
        # The rest of the settings is that of all runs here.
        fine_tuning = {"k": k, "alpha": 0.9}
        config = {"settings": {"lr": 1e-4, "fine_tuning": fine_tuning, "sync_every": 19}}
        rows = [{"step": s, "ESS": 0.3, "weight_q50": 1.0, "log_prob": -1.0} for s in (50, 100)]
        rows[0]["normalized_score"] = 30.0
        for seed in range(3):
            root = runs / f"k{k}"
            make_run(root, "hopper-a", "iw-sft-q", seed, 60.0 + seed, config=config, rows=rows)
    with contextlib.redirect_stdout(io.StringIO()) as output:
        main(Options(runs))
    printed.append(output.getvalue())
    return runs


def test_both_pages_say_the_same_numbers(whole: Path) -> None:
    html = Page((whole / "report/index.html").read_text())
    tables = markdown_tables((whole / "report/report.md").read_text())
    assert [[[cell.strip() for cell in row] for row in table] for table in html.tables] == [
        with_group_headings(table) if table[0][:2] == ["dataset", "algorithm"] else table
        for table in tables
    ]
    assert [table[0][2] for table in tables] == [
        *("hopper-a", "seeds", "less SFT(Q)", "IQM"),
    ]


def test_the_html_page_loads_nothing(whole: Path) -> None:
    text = (whole / "report/index.html").read_text()
    page = Page(text)
    assert page.loads == []
    assert not {"script", "link", "iframe", "object", "embed", "base"} & set(page.tags)
    assert "url(" not in text and "@import" not in text
    # The page tells the browser so too.
    assert "default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline'" in text
    folder = whole / "report"
    files = {path.read_bytes() for path in folder.glob("*.svg")}
    embedded = []
    for image in page.images:
        head, data = image.split(",", 1)
        assert head == "data:image/svg+xml;base64"
        embedded.append(base64.b64decode(data, validate=True))
    assert len(embedded) == len(files) and set(embedded) == files
    for image in embedded:
        # The image loads nothing either, and its text is text in the colour of the page.
        assert not re.findall(rb'(?:href|src)="(?!#|http://www\.w3\.org)', image)
        assert b"prefers-color-scheme: dark" in image and b"<text" in image
        assert b"currentColor" in image and b"#000000" not in image and b"#010203" not in image


def test_links_within_the_page_lead_somewhere(whole: Path) -> None:
    page = Page((whole / "report/index.html").read_text())
    assert len(page.ids) == len(set(page.ids))
    inner = {link[1:] for link in page.links if link.startswith("#")}
    assert inner and inner <= set(page.ids)
    assert {"scores", "missing-runs", "training"} <= inner
    assert all(link.startswith(("#", "https://")) or link == "runs.json" for link in page.links)
    markdown = (whole / "report/report.md").read_text()
    titles = re.findall(r"^## (.+)$", markdown, re.MULTILINE)
    slugs = {title.lower().replace(" ", "-") for title in titles}
    assert set(re.findall(r"\]\(#([^)]+)\)", markdown)) == slugs


def test_versions_and_commands_are_said_once(whole: Path) -> None:
    markdown = (whole / "report/report.md").read_text()
    made = markdown.split("## How these numbers were made")[1]
    for words in (
        f"`iwsft report {whole.name}`",
        "[runs.json](runs.json)",
        "mujoco 3.11.0",
        "some processor",
        "--algo iw-sft-q --dataset cheetah-b",
    ):
        assert markdown.count(words) == made.count(words) == 1


def test_the_top_says_what_was_run_and_what_is_best(whole: Path) -> None:
    top = (whole / "report/report.md").read_text().split("\n## ")[0]
    runs, best, pair = re.findall(r"^\*\*.*$", top, re.MULTILINE)
    assert runs.startswith("**Runs.** 24 runs of 6 algorithms on 3 datasets; 1 more are unfinished")
    assert "3 made fewer than half of the published updates" in runs
    assert best.startswith("**Highest.** iw-SFT(Q) 36.") and best.endswith("may be equal, a tie.")
    assert pair.startswith("**iw-SFT(Q) less SFT(Q).** +7.8 (-10.2 to 25.8) points")
    assert pair.endswith("they tie: the interval holds 0; 20 seeds would settle this.")
    matrix = {row[0]: row[1:] for row in markdown_tables(top)[0]}
    # 40 and 4 on the third dataset, of which the second is under-trained.
    assert matrix["k3/iw-SFT(Q)"] == ["-", "61.0 [2]", "-"]
    assert matrix["iw-SFT(Q)"][:2] == ["17.7 [2]", "60.0"]
    assert matrix["IQL"] == ["-", "-", "4.0 [1]"]
    # 14, 9, 30 against 10, 12, 11, and 60, 61, 62 twice: the highest, but not the best.
    assert set(re.findall(r"\*\*([\d.]+ \[2\])\*\*", top)) == {"17.7 [2]", "61.0 [2]"}


def test_a_second_of_a_higher_mean_is_no_tie(tmp_path: Path, make_run: MakeRun) -> None:
    """One of four datasets decides the means, and not the interquartile means."""
    for seed in range(3):
        for dataset, x, y in (("a", 41.0, 40.0), ("b", 51.0, 50.0), ("c", 61.0, 60.0)):
            make_run(tmp_path, dataset, "sft", seed, x + seed / 10)
            make_run(tmp_path, dataset, "bc", seed, y + seed / 10)
        make_run(tmp_path, "d", "sft", seed, 70.0 + seed / 10)
        make_run(tmp_path, "d", "bc", seed, 99.0 + seed / 10)
    write_report(tmp_path, tmp_path / "report")
    (best,) = re.findall(
        r"^\*\*(?:Best|Highest).*$", (tmp_path / "report/report.md").read_text(), re.M
    )
    assert best.startswith("**Highest.** SFT 56.") and ", then BC 55." in best
    assert best.endswith(": the second has the higher mean.")


@pytest.mark.parametrize("lr", [1e-4, 4e-5])
def test_another_learning_rate_is_told_beside_a_difference(
    tmp_path: Path, make_run: MakeRun, lr: float
) -> None:
    for algo, rate in (("sft-q", 4e-5), ("iw-sft-q", lr)):
        for seed in range(3):
            tuning = {"lr": rate, "warmup": 10, "steps": 100, "k": 1.0}
            config = {"settings": {"seed": seed, "algo": algo, "fine_tuning": tuning}}
            make_run(tmp_path, "a", algo, seed, 50.0 + seed**2 * (1 + lr), config=config)
    write_report(tmp_path, tmp_path / "report")
    markdown = (tmp_path / "report/report.md").read_text()
    told = "the weights alone: on a the learning rate" in markdown, "Not the weights" in markdown
    assert told == ((True, True) if lr == 1e-4 else (False, False))


def test_one_run_that_explodes_leaves_the_others_to_be_seen(
    tmp_path: Path, make_run: MakeRun
) -> None:
    for k, algo in enumerate(("bc", "sft", "iql", "cql")):
        for seed in range(3):
            score = 50.0 + 5 * k + seed
            wild = algo == "cql"
            rows = [
                {
                    "step": s,
                    "pred_value": score * (1e6**share if wild else 1),
                    "normalized_score": 1.0,
                }
                for s, share in ((1, 0.0), (50, 0.5), (99, 1.0))
            ]
            make_run(tmp_path, "hopper-a", algo, seed, -1e6 if wild else score, rows=rows)
    group = cells(read_runs(tmp_path, CONTROL))
    for figure, axis, reach in (
        (figures.draw_training_curves(group)["pred_value-hopper-a"], "y", "6.6e+07"),
        (figures.draw_scores(group)["hopper-a"], "x", "-1e+06"),
    ):
        (ax,) = figure.axes
        low, high = getattr(ax, f"get_{axis}lim")()
        assert 40 < low < 50 and 61 < high < 80
        assert [text.get_text() for text in ax.texts] == [reach]


def test_folders_of_the_machine_are_not_passed_on(whole: Path) -> None:
    for name in PAGES:
        text = (whole / "report" / name).read_text()
        assert "/home/me" not in text and str(whole.parent) not in text
    command = "python -m x --dataset '/home/me/my data.hdf5' --out=/tmp/runs --k 1e-3 runs/k10"
    assert shareable(command) == "python -m x --dataset 'my data.hdf5' --out=runs --k 1e-3 runs/k10"


def test_names_that_look_like_markup_stay_text(tmp_path: Path, make_run: MakeRun) -> None:
    make_run(tmp_path, "<img src=x>&b|c*d*_e_", "bc", 0, 1.0)
    page = Page(write_report(tmp_path, tmp_path / "report").page.read_text())
    assert page.tables[0][0][1] == page.tables[1][1][0] == "<img src=x>&b|c*d*_e_"
    assert all(image.startswith("data:") for image in page.images)


def test_page_figures_and_what_is_printed(whole: Path, printed: list[str]) -> None:
    out = whole / "report"
    page = (out / "report.md").read_text()
    files = {path.name for path in out.iterdir()} - {*PAGES}
    assert {name.partition("-")[0] for name in files} == FIGURES
    assert set(re.findall(r"^!\[.*\]\((.*)\)$", page, re.MULTILINE)) == files
    for line in ("| hopper-a | SFT(Q) | 3 | 20 | 51.0 | 11.5 |",):
        assert line in page
    assert "51.0" in printed[0] and f"Report: {out / 'index.html'}" in printed[0]
    assert "1 unfinished or damaged run left out:" in printed[0] and "dt/seed-0" in printed[0]


def test_the_records_are_the_runs(tmp_path: Path, make_run: MakeRun) -> None:
    """Every run once, with its score and settings; what each episode gave is left out."""
    make_run(tmp_path, "hopper-a", "bc", 0, 5.0, episode_scores=[4.0, 6.0], success_rate=0.5)
    make_run(tmp_path / "k10", "hopper-a", "iw-sft-q", 1, None)
    write_report(tmp_path, tmp_path / "out")
    first, second = json.loads((tmp_path / "out" / "runs.json").read_text())
    assert (first["algo"], first["seed"], first["normalized_score"]) == ("bc", 0, 5.0)
    assert first["success_rate"] == 0.5 and "episode_scores" not in first
    assert first["settings"] == {"lr": 1e-4, "seed": 0}
    assert first["command"] == "python -m benchmarks.d4rl --algo bc --dataset hopper-a"
    assert "variant" not in first and second["variant"] == "k10"
    assert second["normalized_score"] is None


def test_same_runs_give_the_same_pages(whole: Path, tmp_path: Path) -> None:
    write_report(whole, tmp_path)
    for name in PAGES:
        assert (tmp_path / name).read_bytes() == (whole / "report" / name).read_bytes()


def test_one_seed_has_no_aggregates(tmp_path: Path, make_run: MakeRun) -> None:
    make_run(tmp_path, "hopper-a", "bc", 0, 5.0)
    out = tmp_path / "elsewhere"
    write_report(tmp_path, out)
    page = (out / "report.md").read_text()
    assert {path.name for path in out.iterdir()} == {*PAGES, "scores-hopper-a.svg"}
    assert "aggregates" not in page.partition("Left out of the aggregates")[0]
    assert "learning_curves" not in page
    assert "BC: fewer than 3 seeds on hopper-a" in page
    for absent in ("IQM", "Differences"):
        assert absent not in page


def test_an_error_leaves_the_last_report_alone(tmp_path: Path, make_run: MakeRun) -> None:
    run = make_run(tmp_path, "hopper-a", "bc", 1, 5.0)
    page = write_report(tmp_path, tmp_path / "report").page
    before = page.read_bytes()
    (run / "result.json").write_text("{")
    with pytest.raises(SystemExit, match=r"^error: .*seed-1/result\.json"):
        main(Options(tmp_path))
    assert page.read_bytes() == before


def test_runs_without_a_config_are_reported(tmp_path: Path, make_run: MakeRun) -> None:
    for seed in range(3):
        (make_run(tmp_path, "hopper-a", "iw-sft-q", seed, 1.0) / "config.json").unlink()
    write_report(tmp_path, tmp_path / "report")
    page = (tmp_path / "report/report.md").read_text()
    assert "Hardware:\n\n- not recorded" in page and "| hopper-a | iw-SFT(Q) | 3 |" in page
    # One algorithm ties with nothing.
    assert "**Highest.** iw-SFT(Q) 1.0" in page and "tie" not in page


def test_critics_and_long_runs_are_drawn(tmp_path: Path, make_run: MakeRun) -> None:
    for seed in range(3):
        rows = [{"step": s, "pred_value": float(s), "normalized_score": 1.0} for s in (1, 500, 999)]
        make_run(tmp_path, "hopper-a", "iql", seed, 1.0, rows=rows, steps=1000)
        rows = [{"step": s, "log_prob": float(s), "normalized_score": 1.0} for s in (1, 5, 9)]
        make_run(tmp_path, "hopper-a", "bc", seed, 1.0, rows=rows, steps=10)
    group = cells(read_runs(tmp_path, CONTROL))
    panels = figures.draw_training_curves(group)
    assert list(panels) == ["log_prob-hopper-a", "pred_value-hopper-a"]
    assert [len(figure.axes[0].lines) for figure in panels.values()] == [1, 1]
    assert "Q(s, a)" in panels["pred_value-hopper-a"].axes[0].get_ylabel()
    # Ten updates and a thousand.
    (figure,) = figures.draw_learning_curves(group).values()
    assert figure.axes[0].get_xscale() == "log"


@pytest.mark.parametrize("length", [4, 24, 60])
def test_a_legend_lies_within_its_figure(length: int) -> None:
    colour = {f"{i}" + "n" * (length - 1): "#000000" for i in range(7)}
    figure = figures.make_panel("", 2.4, colour).figure
    figure.draw_without_rendering()
    shown = figure.legends[0].get_window_extent()
    # The legend of three columns of the longest names is wider than two figures.
    assert shown.x0 >= 0 and shown.x1 <= figure.bbox.x1 and shown.y0 >= 0
    assert figure.axes[0].get_window_extent().height > figure.dpi


@pytest.mark.parametrize("name", ["a$x^{2$", r"\bad{$ $", "[x](http://a.b) <b>|*_`", "a\x1b[2J\nb"])
def test_any_name_is_literal_in_page_figures_and_terminal(
    tmp_path: Path, make_run: MakeRun, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    for dataset in ("plain", "other"):
        for seed in range(3):
            folder = make_run(tmp_path, dataset, "bc", seed, 10.0 * seed)
            named = {"dataset": name, "algo": name} if dataset == "plain" else {}
            for path in (folder / "result.json", folder / "config.json"):
                path.write_text(json.dumps(json.loads(path.read_text()) | named))
    main(Options(tmp_path))
    shown = name.replace("\x1b", "\\x1b").replace("\n", "\\n")
    page, printed = (tmp_path / "report/index.html").read_text(), capsys.readouterr().out
    assert shown in html.unescape(page) and 'http://a.b"' not in page and "<b>" not in page
    assert "\x1b" not in page + printed and shown.split("]")[0] in printed
