"""Tables that fit, pictures that are drawn from little, and a page that needs nothing else."""

import copy
import re
from html.parser import HTMLParser

import pytest
from made_up import TITLES, made_up_results, made_up_scenario

from projgrad.evaluate import draw, table, write_report
from projgrad.evaluate.pictures import PICTURES, confidences, curves, overview, study, tradeoff
from projgrad.evaluate.style import styles, svg
from projgrad.evaluate.tables import columns

pytestmark = pytest.mark.same_without_extension

for package in ("rich", "matplotlib", "sklearn", "jinja2"):
    pytest.importorskip(package)


def printed(scenario, width=200):
    from rich.console import Console

    console = Console(width=width)
    with console.capture() as capture:
        console.print(table(scenario, TITLES))
    return capture.get()


def test_table_has_every_method_in_order_with_spread_and_costs():
    text = printed(made_up_scenario())
    rows = [
        line for line in text.splitlines() if any(line.strip().startswith(title + "  ") for title in TITLES.values())
    ]
    assert [row.strip().split("  ")[0] for row in rows] == list(TITLES.values())
    assert all("±" in row for row in rows)
    assert "12.3" in rows[2]  # ms
    assert "32.0" in rows[2]  # MiB
    assert "3/12" in rows[2]
    assert "over 2 seeds" in text
    assert "1,000 trainable" in text


def test_a_method_of_the_study_alone_has_no_row():
    scenario = made_up_scenario(methods=("original", "scrub"))
    assert "SCRUB" in printed(scenario) and "OrthoGrad" not in printed(scenario)


def test_a_method_without_forget_accuracy_is_left_out_of_the_overview():
    results = made_up_results()
    for run in results["scenarios"]["digits"]["runs"]:
        if run["method"] == "scrub":
            run["scores"]["forget"] = None
    assert overview(results, TITLES) is not None


def test_table_says_when_there_is_one_seed_or_little_data():
    assert "one seed" in printed(made_up_scenario(seeds=(0,)))
    assert "±" not in "".join("".join(c.cells) for c in columns(made_up_scenario(seeds=(0,)), TITLES))
    assert "Small" in printed(made_up_scenario(small=True))


@pytest.mark.parametrize("rates", [0, 1, 3, 4])
def test_table_fits_120_columns_with_word_error_rates(rates):
    scenario = made_up_scenario()
    for run in scenario["runs"]:
        run["scores"] |= {f"wer_part_{i}": 1.0 + run["seed"] for i in range(rates)}
    text = printed(scenario)
    assert max(map(len, map(str.rstrip, text.splitlines()))) <= 120
    assert text.count("WER") == rates
    assert text.count("150.0±70.7") == rates * len(TITLES)
    assert "ToW" in text
    assert sum(column.title.startswith("WER") for column in columns(scenario, TITLES)) == rates


def test_a_method_keeps_its_look_and_shares_it_with_nobody():
    variants = [f"variant{i}" for i in range(4)]
    methods = ["original", "retrained", *(f"m{i}" for i in range(9)), *variants]
    found = styles(methods, variants)
    assert len({(look["color"], look["marker"]) for look in found.values()}) == len(methods)
    assert len({look["marker"] for name, look in found.items() if name.startswith("m")}) == 9

    def colours(scenario):
        handles = tradeoff(scenario, TITLES).legends[0].legend_handles
        return {handle.get_label(): handle.get_color() for handle in handles}

    everyone = colours(made_up_scenario())
    for some in (("retrained", "orthograd_tensor"), ("orthograd_tensor", "scrub")):
        few = colours(made_up_scenario(methods=some))
        assert few == {TITLES[m]: everyone[TITLES[m]] for m in TITLES if m in some}


def test_pictures_are_files_and_change_nothing_global(tmp_path):
    import matplotlib

    before = dict(matplotlib.rcParams)
    files = draw(made_up_results(), TITLES, tmp_path / "new")
    assert [path.name for path in files] == ["overview.png", *(f"digits-{name}.png" for name in PICTURES)]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in files)
    assert dict(matplotlib.rcParams) == before


def test_pictures_show_the_numbers():
    scenario = made_up_scenario(methods=("orthograd",))
    scenario["runs"][0]["scores"] |= {"forget": 0.2, "test": 0.9}
    scenario["runs"][1]["scores"] |= {"forget": 0.4, "test": 0.7}
    (point,) = tradeoff(scenario, TITLES).axes[0].containers
    assert point.lines[0].get_xydata().tolist() == [[pytest.approx(30), pytest.approx(80)]]
    titles = [ax.get_title() for ax in curves(scenario, TITLES).axes]
    assert {"forget loss", "retain loss", "preserved norm", "residual"} <= set(titles)
    shares = [patch.get_data().values.sum() for patch in confidences(scenario, TITLES).axes[0].patches]
    assert shares == [pytest.approx(100)] * 4  # outline and fill of two parts
    ax = next(ax for ax in study(scenario, TITLES).axes if ax.get_title() == "ms per step")
    assert ax.containers[0].lines[0].get_xydata().tolist() == [[4, pytest.approx(12.3)], [8, pytest.approx(12.3)]]


def test_curves_stop_where_seeds_do():
    """A mean over fewer and fewer seeds would jump."""
    scenario = made_up_scenario(methods=("scrub",))
    scenario["runs"][0]["curve"] = scenario["runs"][0]["curve"][:2]
    line = curves(scenario, TITLES).axes[0].lines[0]
    assert len(line.get_xdata()) == 2


def test_nothing_known_is_no_picture():
    empty = made_up_scenario(methods=(), study=[])
    assert [picture(empty, TITLES) for picture in PICTURES.values()] == [None] * 4
    assert overview({"scenarios": {"digits": empty}}, TITLES) is None


def test_tables_and_pictures_are_made_of_the_little_that_is_known():
    """One seed, no retrained model, no curves, histograms or ToW, a method without a title."""
    scenario = made_up_scenario(methods=("scrub", "mine"), seeds=(0,), study=[])
    for run in scenario["runs"]:
        run |= {"curve": [], "confidence": {}}
        run["scores"] = {"forget": 0.5, "test": 0.5, "tow": None}
    assert "mine" in printed(scenario)
    assert [picture(scenario, TITLES) is None for picture in PICTURES.values()] == [False, True, True, True]


def test_svg_is_the_same_every_time_and_takes_the_colour_of_the_page():
    first, second = (svg(tradeoff(made_up_scenario(), TITLES), "digits") for _ in range(2))
    assert first == second
    assert ">$x$</text>" in svg(tradeoff(made_up_scenario(), {**TITLES, "scrub": "$x$"}), "")  # a name, no formula
    assert "currentColor" in first
    assert all(name.startswith("digits-") for name in re.findall(r'\bid="([^"]*)', first))
    targets = re.findall(r'(?:href="#|url\(#)([^")]*)', first)
    assert targets and set(targets) <= set(re.findall(r'\bid="([^"]*)', first))


class Page(HTMLParser):
    VOID = ("meta", "link", "br", "hr", "img", "input")

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.tags, self.words = [], [], set(), []
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        for name, value in attributes:
            if name == "id":
                self.ids.append(value)
            if name in ("href", "src", "xlink:href"):
                assert value.startswith("#"), f"{tag} asks for {value}"
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def written(tmp_path, results, titles=TITLES):
    return write_report(results, titles, tmp_path / "out" / "report.html").read_text(encoding="utf-8")


def test_the_report_needs_no_other_file_and_no_network(tmp_path):
    other = made_up_scenario(methods=("scrub", "orthograd"), seeds=(0,), small=True, title="faces")
    other["runs"][1]["stopped"] = "diverged at step 41"
    text = written(tmp_path, made_up_results(faces=other))
    page = Page(text)
    assert not re.search(r"https?:|//[a-z]|@import|url\((?!#)", text)
    assert not page.tags & {"script", "link", "iframe", "img"}
    assert len(page.ids) == len(set(page.ids))
    assert {"digits", "faces"} <= set(page.ids)
    assert text.count("<svg") == 1 + 2 * len(PICTURES)
    assert "prefers-color-scheme: dark" in text and 'name="viewport"' in text
    words = " ".join(" ".join(page.words).split())
    for what in (
        "projgrad compare --fast",
        "pip install 'some-news==1.0'",
        "torch 2.13",
        "cuda not there",
        "diverged at step 41",
        "By ToW",
        "lr 0.01",
        "OrthoGrad, per tensor",
        "12.5000",  # the distance, among all scores
    ):
        assert what in words, what


def test_report_of_an_unfinished_comparison_says_so(tmp_path):
    results = made_up_results(digits=made_up_scenario(methods=(), study=[], title="not begun"))
    assert "not finished" not in written(tmp_path, results)
    text = written(tmp_path, {**results, "finished": False})
    assert "not finished" in text
    assert "Still to come: not begun" in text


def test_names_cannot_inject_markup(tmp_path):
    nasty = "<script>alert(1)</script> $x$ & \"'"
    results = made_up_results(digits=made_up_scenario(methods=("scrub", "orthograd"), seeds=(0,)))
    results["scenarios"]["digits"] |= {"title": nasty, "credit": nasty, "forget_title": nasty}
    text = written(tmp_path, {**results, "command": nasty}, {**TITLES, "scrub": nasty})
    assert "script" not in Page(text).tags
    assert "&lt;script&gt;" in text


def test_report_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    results = made_up_results(digits=made_up_scenario(methods=(), study=[]))
    before = written(tmp_path, results)
    broken = copy.deepcopy(results)
    del broken["scenarios"]["news"]["title"]
    with pytest.raises(Exception, match="title"):
        written(tmp_path, broken)
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("killed")))
    with pytest.raises(OSError, match="killed"):
        written(tmp_path, {**results, "command": "another"})
    assert (tmp_path / "out" / "report.html").read_text(encoding="utf-8") == before
