"""The page of `report`: what it loads (nothing), what it shows, the same bytes, other files refused; a real browser."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
import tiny
from plans import write_plan
from profiles import comparison, make_profile

from spd_calib.formats.drops import Point
from spd_calib.formats.files import dumps, read, sha256_of
from spd_calib.formats.plan import Latency, Plan
from spd_calib.formats.profile import Profile, Recovered
from spd_calib.formats.results import Results
from spd_calib.reporting.table import nats
from spd_calib.reporting.tables import blocks, rankings, task_losses, tasks, whole_plan

DEMO = Path(__file__).parent.parent / "results/demo"
VOID = {"meta", "link", "br", "img", "input", "hr"}
EVIL = "<script>alert(1)</script>\"'&$x$"


class Page(HTMLParser):
    """Elements in order with their attributes and their whole text."""

    def __init__(self, text: str):
        super().__init__()
        self.elements: list[tuple[str, dict, list[str]]] = []
        self.open: list[tuple[str, dict, list[str]]] = []
        self.feed(text)
        self.close()
        assert not self.open, [tag for tag, _, _ in self.open]

    def handle_starttag(self, tag, attrs):
        element = (tag, dict(attrs), [])
        self.elements.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs), []))

    def handle_endtag(self, tag):
        assert self.open and self.open[-1][0] == tag, (tag, [t for t, _, _ in self.open])
        self.open.pop()

    def handle_data(self, data):
        for _, _, text in self.open:
            text.append(data)

    def all(self, *tags: str) -> list[tuple[dict, str]]:
        return [(attrs, " ".join("".join(text).split())) for tag, attrs, text in self.elements if tag in tags]

    def rows(self, caption: str) -> list[list[str]]:
        """The body of the table whose caption begins so."""
        for i, (tag, _, text) in enumerate(self.elements):
            if tag == "caption" and "".join(text).startswith(caption):
                rest = [e[0] for e in self.elements[i + 1 :]]
                end = i + 1 + (rest.index("table") if "table" in rest else len(rest))
                rows: list[list[str]] = []
                for inner, attrs, words in self.elements[i + 1 : end]:
                    if inner == "tr":
                        rows.append([])
                    elif inner in ("td", "th") and attrs.get("scope") != "col":
                        rows[-1].append("".join(words))
                return [row for row in rows if len(row) > 1]
        raise AssertionError(f"no table {caption!r}")


@pytest.fixture
def run(tmp_path) -> Path:
    """A folder with everything: the shipped model's own files, and a plan that models latency."""
    folder = tmp_path / "run"
    folder.mkdir()
    shutil.copy(DEMO / "profile.json", folder)
    step = {"hardware": "h100-nvlink", "batch": 1, "context": 96, "all_reduce_seconds": 1e-5}
    found = [
        Latency(**step, phase="decode", dense_seconds=0.002, planned_seconds=0.0015, saved=0.25, ceiling=0.4321),
        Latency(**step, phase="prefill", dense_seconds=0.02, planned_seconds=0.019, saved=0.05, ceiling=0.1),
    ]
    plan = read(Plan, DEMO / "plan.json").model_copy(update={"latency": found})
    (folder / "plan.json").write_text(dumps(plan))
    results = read(Results, DEMO / "results.json")
    results = results.model_copy(update={"plan_sha256": sha256_of(folder / "plan.json")})
    (folder / "results.json").write_text(dumps(results))
    return folder


def made(spd, run: Path, *more) -> tuple[str, Page]:
    out = run.parent / "report.html"
    outcome = spd("report", run, "-o", out, *more)
    assert outcome.code == 0, outcome.err
    text = out.read_text(encoding="utf-8")
    return text, Page(text)


def check_form(text: str, page: Page) -> None:
    """What holds of every page: nothing from outside, no script, ids, headings and tables in order."""
    assert text.startswith("<!DOCTYPE html>\n") and page.all("html")[0][0]["lang"] == "en"
    for _, attrs, _ in page.elements:
        for key, value in attrs.items():
            assert not key.startswith("on"), key
            if key in ("src", "href", "xlink:href", "action", "srcset", "poster", "data"):
                assert value.startswith(("#", "data:,")), value
    assert not page.all("script", "iframe", "object", "embed", "img", "base", "form")
    css = " ".join(style for _, style in page.all("style"))
    assert "@import" not in css and "url(" not in css
    assert all(url.startswith("#") for url in re.findall(r"url\(([^)]*)\)", text))
    ids = [attrs["id"] for _, attrs, _ in page.elements if "id" in attrs]
    assert len(ids) == len(set(ids)), sorted(i for i in ids if ids.count(i) > 1)
    named = re.findall(r"url\(#([^)]+)\)", text)
    for _, attrs, _ in page.elements:
        named += attrs.get("href", "")[1:].split() if attrs.get("href", "").startswith("#") else []
        named += attrs.get("aria-labelledby", "").split()
    assert set(named) <= set(ids), set(named) - set(ids)
    levels = [int(tag[1]) for tag, _, _ in page.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(b <= a + 1 for a, b in pairwise(levels))
    (policy,) = [a["content"] for a, _ in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy"]
    directives = dict(part.split(None, 1) for part in policy.split("; "))
    assert directives["default-src"] == "'none'" and "script-src" not in directives
    assert not any("http" in value or "*" in value for value in directives.values())
    assert len(page.all("caption")) == len(page.all("table")) == len(page.all("thead"))
    assert all(a.get("scope") in ("row", "col") for a, _ in page.all("th"))
    colours = re.findall(r"#[0-9a-f]{6}\b", " ".join(re.findall(r"<svg.*?</svg>", text, re.S)))
    assert not colours, set(colours)  # the figures have the page's alone
    for attrs, _ in page.all("svg"):
        assert attrs["role"] == "img" and len(attrs["aria-labelledby"].split()) == 2
        assert attrs["viewbox"].startswith("0 0 ")


def test_the_page_shows_everything_and_loads_nothing(spd, run):
    text, page = made(spd, run)
    check_form(text, page)
    headings = [heading for _, heading in page.all("h2")]
    assert len(headings) == 7 and "Left out" not in text
    assert len(page.all("svg")) == 4 and len(page.all("title")) == 5
    body = page.all("body")[0][1]
    profile, plan = read(Profile, run / "profile.json"), read(Plan, run / "plan.json")
    for words in (profile.model.weight_fingerprint, profile.text.sha256, profile.verify_text.sha256):
        assert words in body
    for document in (profile, plan):
        assert document.provenance.command in body
        assert all(f"{what} {version}" in body for what, version in document.provenance.versions.items())
    for m in profile.measurements:
        row = [str(m.block), nats(m.kl, m.kl_stderr)]
        assert row in [r[:2] for r in page.rows(f"attention: {m.strategy}")]
    assert [r[:2] for r in page.rows("plan for demo")] == [[str(b.index), b.strategy] for b in plan.blocks]
    v = plan.verified
    predicted, verified = page.rows("the whole plan")
    assert verified[1:3] == [f"{v.kl:.4f} ± {v.kl_stderr:.4f}", f"{100 * v.ppl_increase:+.2f} %"]
    assert predicted[1] == f"{plan.predicted.kl:.4f}"
    for task in read(Results, run / "results.json").tasks:
        (row,) = [r for r in page.rows("7 attention") if r[0] == task.task]
        assert row[-1] == f"{task.difference:+.4f} ± {task.difference_stderr:.4f}"
    assert len(page.rows("the cheapest set of every size")) == 9
    assert page.rows("modelled latency on h100-nvlink")[0][-2:] == ["25.0 %", "43.2 %"]
    assert "43.2 % of a decode step, 10.0 % of a prefill step" in body


def test_text_in_figures_stays_text(spd, run):
    _, page = made(spd, run)
    shown = " ".join(text for _, text in page.all("svg"))
    for words in ("dropped alone: block_drop", "plan: keep_sync (1)", "spd_demo_where, acc", "the plan, predicted"):
        assert words in shown


def test_the_same_files_give_the_same_bytes(spd, run):
    first, _ = made(spd, run, "--png", run.parent / "a.png")
    second, _ = made(spd, run, "--png", run.parent / "b.png")
    assert first == second
    assert (run.parent / "a.png").read_bytes() == (run.parent / "b.png").read_bytes()
    assert (run.parent / "a.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_a_profile_alone_says_which_command_makes_the_rest(spd, tmp_path):
    shutil.copy(DEMO / "profile.json", tmp_path)
    out = tmp_path / "r.html"
    outcome = spd("report", tmp_path / "profile.json", "-o", out, "--json")
    assert outcome.code == 0, outcome.err
    assert json.loads(outcome.out) == {"written": [str(out)], "left_out": ["plan", "evaluation", "latency"]}
    page = Page(out.read_text(encoding="utf-8"))
    check_form(out.read_text(encoding="utf-8"), page)
    said = [text for attrs, text in page.all("p") if attrs.get("class") == "left-out"]
    assert [re.search("spd-calib [a-z]+", s)[0] for s in said] == ["spd-calib plan", "spd-calib eval", "spd-calib plan"]
    assert len(page.all("svg")) == 2 and len(page.rows("the cheapest set")) == 9


def evil(run: Path) -> None:
    """A model, texts and tasks whose names are markup; what refers to what stays whole."""
    profile, plan = read(Profile, run / "profile.json"), read(Plan, run / "plan.json")
    model = profile.model.model_copy(update={"id": EVIL + 300 * "x", "architecture": EVIL, "revision": EVIL})
    texts = {name: getattr(profile, name).model_copy(update={"source": EVIL}) for name in ("text", "verify_text")}
    provenance = profile.provenance.model_copy(update={"command": EVIL, "versions": {EVIL: EVIL}})
    (run / "profile.json").write_text(
        dumps(profile.model_copy(update={"model": model, "provenance": provenance, **texts}))
    )
    verified = plan.verified.model_copy(update={"text": texts["verify_text"]})
    blocks = [b.model_copy(update={"reason": EVIL}) for b in plan.blocks]
    step = plan.latency[0].model_copy(update={"hardware": EVIL})
    changes = {"model": model, "verified": verified, "blocks": blocks, "provenance": provenance, "latency": [step]}
    (run / "plan.json").write_text(dumps(plan.model_copy(update=changes)))
    results = read(Results, run / "results.json")
    tasks = [t.model_copy(update={"task": f"\x1b\x00{EVIL}\u4e2d", "metric": "</svg>"}) for t in results.tasks]
    sha = sha256_of(run / "plan.json")
    (run / "results.json").write_text(dumps(results.model_copy(update={"tasks": tasks, "plan_sha256": sha})))


@pytest.mark.filterwarnings("error")
def test_names_in_files_are_no_markup(spd, run):
    evil(run)
    text, page = made(spd, run, "--png", run.parent / "f.png")
    check_form(text, page)
    assert "<script" not in text.lower() and "\x00" not in text
    assert f"Sync-Point Drop: {EVIL}{300 * 'x'}, TP 4" in [t for _, t in page.all("h1")]
    assert page.rows("plan for")[0][-1] == EVIL
    shown = " ".join(text for _, text in page.all("svg"))
    assert f"{EVIL}\u4e2d, </svg>" in shown


def test_long_tables_are_folded_and_many_blocks_fit(spd, tmp_path):
    profile = make_profile([0.1 + 0.001 * b for b in range(60)], mlp=[0.2] * 59)
    (tmp_path / "profile.json").write_text(dumps(profile))
    out = tmp_path / "r.html"
    assert spd("report", tmp_path, "-o", out).code == 0
    text = out.read_text(encoding="utf-8")
    page = Page(text)
    check_form(text, page)
    assert [s for _, s in page.all("summary")] and "60 rows" in page.all("summary")[0][1]
    assert "of the MLP" in text and len(page.rows("MLP: block_drop")) == 59


def test_what_was_recovered_says_so(spd, run):
    profile = read(Profile, run / "profile.json")
    original = profile.model.model_copy(update={"id": "the-dense-one"})
    part = Recovered(
        recovered_from=original,
        plan_sha256="0" * 64,
        settled=[Point(block=7, sync_point="attention")],
        alone=comparison(0.0456),
    )
    kept = [m for m in profile.measurements if m.block != 7]
    (run / "profile.json").write_text(dumps(profile.model_copy(update={"recovered": part, "measurements": kept})))
    plan = read(Plan, run / "plan.json").model_copy(update={"recovered_from": original})
    (run / "plan.json").write_text(dumps(plan))
    text, page = made(spd, run)
    check_form(text, page)
    body = page.all("main")[0][1]
    assert "A recovered checkpoint, made from the-dense-one" in body and "KL 0.0456" in body
    assert "verified against the-dense-one" in body
    assert "results.json is there, but of another plan." in body


def test_predictors_are_counted(spd, tmp_path, llama, profile_file):
    folder = tmp_path / "run"
    folder.mkdir()
    shutil.copy(profile_file, folder / "profile.json")
    profile = read(Profile, profile_file)
    text = {"text": profile.verify_text}
    write_plan(folder / "plan.json", llama, 4, ["block_drop"] * 4, kinds=["mean", "mean", "full", None])
    plan = read(Plan, folder / "plan.json")
    verified = plan.verified.model_copy(update=text)
    (folder / "plan.json").write_text(dumps(plan.model_copy(update={"verified": verified, "model": profile.model})))
    _, page = made(spd, folder)
    assert "3 blocks have a predictor in place of what their MLP misses: 2 mean, 1 full." in page.all("main")[0][1]


def test_a_plan_verified_on_text_behind_that_of_its_profile_belongs_to_it(spd, run):
    """A repaired plan's text begins so many rounds further on; anything else is another profile's."""
    plan, kept = read(Plan, run / "plan.json"), read(Profile, run / "profile.json").verify_text
    behind = {"first": kept.first + 2 * kept.sequences, "sha256": "b" * 64}
    for changes, number, code in (
        (behind, 2, 0), (behind, 1, 2), (behind, 0, 2),
        ({**behind, "seq_len": 3}, 2, 2), ({**behind, "first": 0}, 2, 2),
    ):  # fmt: skip
        text = kept.model_copy(update=changes)
        verified = plan.verified.model_copy(update={"text": text, "round": number})
        (run / "plan.json").write_text(dumps(plan.model_copy(update={"verified": verified})))
        outcome = spd("report", run, "-o", run / "report.html")
        assert outcome.code == code, outcome.err
        assert code == 0 or "made from another profile" in outcome.err
        assert code == 2 or f"Verified on round 2 behind it: {kept.source}" in (run / "report.html").read_text()


def test_text_that_took_part_in_choosing_is_not_called_fresh(spd, run):
    plan = read(Plan, run / "plan.json")
    for seen, words in ((False, "sequences that nothing was chosen on"), (True, "that had shown the plan before it")):
        verified = plan.verified.model_copy(update={"reused": seen})
        (run / "plan.json").write_text(dumps(plan.model_copy(update={"verified": verified})))
        _, page = made(spd, run)
        assert words in page.all("body")[0][1]


def test_no_column_stands_twice():
    (single,) = rankings(make_profile([0.3, 0.1]))
    assert list(single.columns)[:3] == ["block", "KL", "ppl"] and single.rows[0][:2] == ["1", "0.1000 ± 0.0010"]
    (cumulative,) = rankings(make_profile([0.7, 0.4, 0.1], method="cumulative"))
    assert list(cumulative.columns)[:3] == ["block", "KL added", "KL"]
    assert [row[1] for row in cumulative.rows] == ["0.1000", "0.3000", "0.3000"]


def test_several_texts_are_shown_each(spd, llama, text, tmp_path):
    other = tiny.write_jsonl(tmp_path / "other.jsonl", tiny.stories(40, tiny.WORDS[:9], seed=3))
    folder = tmp_path / "run"
    folder.mkdir()
    sizes = ("--seq-len", 16, "--max-samples", 4, "--verify-samples", 2, "--device", "cpu", "--strategy", "block_drop")
    both = ("--data", text, "--data", other)
    assert spd("profile", llama, "--tp", 2, *both, *sizes, "-o", folder / "profile.json").code == 0
    assert spd("plan", folder / "profile.json", "--drop", 1, "--device", "cpu", "-o", folder / "plan.json").code == 0
    shown, page = made(spd, folder)
    check_form(shown, page)
    verified = read(Plan, folder / "plan.json").verified
    rows = [
        [t.source, f"{v.kl:.4f} ± {v.kl_stderr:.4f}"]
        for t, v in zip(verified.text.parts, verified.per_text, strict=True)
    ]
    assert [row[:2] for row in page.rows("verified, text by text")] == rows
    assert [row[0] for row in page.rows("text by text: the dense model")] == [str(text), str(other)]
    profile = read(Profile, folder / "profile.json")
    assert all(part.sha256 in shown for ref in (profile.text, profile.verify_text) for part in ref.parts)


def test_a_front_and_a_bench_beside_it_are_shown(spd, run):
    from spd_calib.formats.hardware import Collective, Hardware, TimedStep, Timing
    from spd_calib.planning.pareto import pareto_of

    profile = read(Profile, run / "profile.json")
    made_by = profile.provenance.model_copy(update={"command": "the front"})
    front = pareto_of(profile, provenance=made_by, strategies=["block_drop"])
    points = [p.model_copy(update={"measured_kl": 0.0123}) if p.drops == 3 else p for p in front.points]
    (run / "pareto.json").write_text(dumps(front.model_copy(update={"points": points})))
    time = Timing(median=0.001, p10=0.0005, p90=0.002, repeats=3)
    hardware = Hardware(
        model=profile.model,
        plan_sha256="0" * 64,
        tensor_parallel=profile.tensor_parallel,
        device="a processor",
        backend="gloo",
        nodes=1,
        collectives=[
            Collective(method=m, bits=bits, ranks=4, bytes=64, seconds=time)
            for m, bits in (("all_reduce", None), ("all_gather_and_sum", None), ("quantised_sync", 4))
        ],
        steps=[TimedStep(phase="decode", blocks="dense", dropped=0, batch=1, tokens=8, seconds=time)],
        provenance=profile.provenance,
    )
    (run / "hardware.json").write_text(dumps(hardware))
    _, page = made(spd, run)
    assert page.rows("the cheapest set of every size")[3][2] == "0.0123"
    assert page.rows("sum over 4 ranks, gloo, a processor") == [["64", *["1000.0 (500.0 to 2000.0)"] * 3]]
    assert [r[0] for r in page.rows("the files read")] == [
        "profile.json", "plan.json", "results.json", "hardware.json", "pareto.json"
    ]  # fmt: skip
    other = profile.model.model_copy(update={"config_hash": "0" * 64})
    (run / "pareto.json").write_text(dumps(front.model_copy(update={"model": other})))
    _, page = made(spd, run)
    assert "pareto.json is there, but of another model. This one is from the profile alone." in page.all("main")[0][1]


def luminance(colour: str) -> float:
    """Of a hexadecimal colour (WCAG 2, relative luminance)."""
    digits = colour[1:] if len(colour) == 7 else "".join(2 * c for c in colour[1:])
    shares = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [s / 12.92 if s <= 0.04045 else ((s + 0.055) / 1.055) ** 2.4 for s in shares]
    return sum(weight * value for weight, value in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(a: str, b: str) -> float:
    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_words_and_bars_stand_out_in_light_dark_and_print(spd, run):
    assert contrast("#000", "#ffffff") == pytest.approx(21) and contrast("#777777", "#fff") == pytest.approx(
        4.48, abs=0.01
    )
    text, _ = made(spd, run)
    schemes = [
        dict(re.findall(r"--(\w+): (#[0-9a-f]+)", block)) for block in re.findall(r":root \{(.*?)\}", text, re.S)
    ]
    assert len(schemes) == 3 and len({frozenset(scheme) for scheme in schemes}) == 1
    for scheme in schemes:
        for ground in (scheme["ground"], scheme["band"]):
            for words in ("text", "soft", "link"):
                assert contrast(scheme[words], ground) >= 4.5, (words, scheme)
        for bar in ("keep_sync", "block_drop", "plain_drop", "plan", "quiet"):
            assert contrast(scheme[bar], scheme["ground"]) >= 3, (bar, scheme)
    used = set(re.findall(r"var\(--(\w+)\)", text))
    assert used == set(schemes[0])


CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


def browse(folder: Path, page: Path, *more: str) -> tuple[str, str]:
    """The page as a browser holds it in the end, and what it had to say."""
    words = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'browser'}"]
    words += ["--enable-logging=stderr", "--log-level=0", "--dump-dom", *more]
    done = subprocess.run([*words, page.as_uri()], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium to look with")
def test_a_browser_shows_it_without_a_complaint(spd, run, tmp_path):
    evil(run)
    made(spd, run)
    page = run.parent / "report.html"
    shown, said = browse(tmp_path, page)
    assert shown.count("<svg") == 4 and shown.count("<table") == page.read_text().count("<table")
    assert "CONSOLE" not in said, said
    broken = tmp_path / "broken.html"
    broken.write_text(page.read_text().replace("</body>", '<img src="https://example.invalid/x.png"></body>'))
    _, said = browse(tmp_path, broken)
    assert "CONSOLE" in said and "Content Security Policy" in said  # the check can fail, and the policy holds


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium to look with")
@pytest.mark.parametrize("width", [360, 800])
def test_no_page_is_wider_than_its_screen(spd, run, tmp_path, width):
    evil(run)
    made(spd, run)
    outer = tmp_path / "outer.html"
    root = "this.contentDocument.documentElement"
    measure = f"document.title = {root}.scrollWidth + ' of ' + {root}.clientWidth"
    style = f"width: {width}px; height: 800px; border: 0"
    page = (run.parent / "report.html").as_uri()
    outer.write_text(f'<iframe src="{page}" style="{style}" onload="{measure}"></iframe>')
    shown, said = browse(tmp_path, outer, "--allow-file-access-from-files")
    found = re.search(r"<title>(\d+) of (\d+)</title>", shown)
    assert found and found[1] == found[2] and width - 20 <= int(found[1]) <= width, (found, said)  # less its scroll bar


def test_results_say_which_all_reduces_are_dropped():
    results = read(Results, DEMO / "results.json")
    assert tasks(results).title == "7 attention all-reduces dropped, TP 4" and "mlp_dropped" not in dumps(results)
    both = results.model_copy(update={"dropped": [1, 2], "mlp_dropped": [0]})
    assert tasks(both).title == "2 attention and 1 MLP all-reduces dropped, TP 4" and "mlp_dropped" in dumps(both)
    assert tasks(results.model_copy(update={"dropped": []})).title == "dense and planned, TP 4"


def test_what_is_said_of_a_recovered_plan(llama, tmp_path):
    """Its figures are no prediction; of tasks it has none; MLPs that were not profiled are dropped all the same."""
    strategies = ["block_drop", "keep_sync", "keep_sync", "keep_sync"]
    plan = read(Plan, write_plan(tmp_path / "plan.json", llama, 2, strategies, strategies))
    assert "MLP" in blocks(plan).columns and blocks(plan).rows[0][:3] == ["0", "block_drop", "block_drop"]
    assert [row[0] for row in whole_plan(plan).rows] == ["predicted from the profile", "verified, held-out text"]
    of_tasks = plan.budget.model_copy(update={"kind": "max_accuracy_drop", "tasks": ["arc_easy"]})
    recovered = plan.model_copy(update={"recovered_from": plan.model, "budget": of_tasks})
    assert whole_plan(recovered).rows[0][0] == "expected of the recovered model" and task_losses(recovered) == ""
    served = plan.model_copy(update={"verified": plan.verified.model_copy(update={"as_served": True})})
    assert "as it is served" in whole_plan(served).rows[1][0]
