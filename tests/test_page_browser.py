"""The report in a real browser: it loads in silence, and its lists, tables and search work.

Without a browser these tests are skipped; what does not need one is in test_report.py. A browser
that is not on the path can be named by the environment variable CHROMIUM.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import browser
import pytest
import whole
from report_runs import ARMS, tree

from grpo_jax import main, report

if browser.find() is None:
    pytest.skip(
        f"no browser: none of {', '.join(browser.NAMES)} is on the path, and CHROMIUM is not set",
        allow_module_level=True,
    )


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[browser.Browser]:
    opened = browser.Browser(tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page of many arms in two groups."""
    return report.build(tree(tmp_path_factory.mktemp("page") / "run", samples=45))


@pytest.fixture
def page(chromium: browser.Browser, written: Path) -> Iterator[browser.Browser]:
    """The page, freshly loaded; whatever a test does, the page must not complain."""
    chromium.size(1300)
    chromium.open(written)
    yield chromium
    assert chromium.errors == []


def choose(page: browser.Browser, selector: str, value: str) -> None:
    """What picking an entry of a list, or typing, does."""
    event = "input" if selector == "#find" else "change"
    page.run(
        f"(() => {{ const at = document.querySelector({json.dumps(selector)});"
        f"at.value = {json.dumps(value)};"
        f"at.dispatchEvent(new Event('{event}', {{bubbles: true}})); }})()"
    )


def sources(page: browser.Browser) -> list[int]:
    """The numbers of the samples that are shown, in order."""
    found = page.run("[...document.querySelectorAll('.sample .source dd')].map(e => e.textContent)")
    return [int(text.split()[-1]) for text in found]


def test_page_loads_alone_and_in_silence(page: browser.Browser, written: Path) -> None:
    assert page.requests == [written.as_uri()]
    assert page.errors == []
    assert page.run("document.querySelectorAll('script').length") == 1
    assert page.run("document.querySelectorAll('article script, article b').length") == 0


def test_a_forbidden_script_would_be_noticed(chromium: browser.Browser, tmp_path: Path) -> None:
    """The silence above means something: a script that data smuggled in is refused, and named."""
    text = "<meta http-equiv='Content-Security-Policy' content=\"default-src 'none'\">"
    (tmp_path / "bad.html").write_text(text + "<script>1</script><img src='x.png'>")
    chromium.open(tmp_path / "bad.html")
    assert len(chromium.errors) >= 2 and "Content Security Policy" in chromium.errors[0]


def test_tax_plot_follows_its_lists(page: browser.Browser, written: Path) -> None:
    entries = json.loads((written.parent / "report.json").read_text())["tax"]
    axis = "#tax [data-key]:not([hidden]) svg[role=img]"
    seen = set()
    for entry in [e for e in entries if e["group"] == ""]:
        choose(page, "#tax select:nth-of-type(1)", entry["target"])
        choose(page, "#tax label + label select", entry["retention"])
        assert page.run(f"document.querySelectorAll('{axis}').length") == 1
        seen.add(page.run(f"document.querySelector('{axis}').getAttribute('aria-label')"))
        said = page.run("document.querySelector('#tax [data-key]:not([hidden]) desc').textContent")
        names = {a["name"]: a["title"] for a in
                 json.loads((written.parent / "report.json").read_text())["arms"]}  # fmt: skip
        assert said.endswith(f"front: {', '.join(names[a] for a in _ordered(entry))}.")
    assert len(seen) == 15  # three scores, five measures of what was kept


def _ordered(entry: dict) -> list[str]:
    return [point["arm"] for point in entry["points"] if point["arm"] in entry["front"]]


def test_comparisons_follow_the_chosen_arm(page: browser.Browser, written: Path) -> None:
    choose(page, "#results select", "grpo")
    shown = "document.querySelector('#results [data-panels] [data-key]:not([hidden])')"
    assert page.run(f"{shown}.querySelector('th').textContent") == "minus GRPO"
    found = json.loads((written.parent / "report.json").read_text())["comparisons"]
    (pair,) = (c for c in found if (c["first"], c["second"]) == ("sft-1e-6", "grpo"))
    rows = page.run(
        f"[...{shown}.querySelectorAll('tbody tr')].map(r => [r.cells[0].textContent, "
        "Number(r.cells[1].dataset.value)])"
    )
    # The other way round: what SFT has over GRPO.
    assert dict(rows)["sft-1e-6"] == pytest.approx(-pair["metrics"]["chrf++"]["difference"])
    choose(page, "#results label + label select", "Tasks")
    heads = page.run(f"[...{shown}.querySelectorAll('thead th')].map(h => h.textContent)")
    assert heads == ["minus GRPO", "multiple choice/accuracy"]


def test_tables_sort_by_their_headings(page: browser.Browser) -> None:
    table = "document.querySelector('#results table')"
    click = f"{table}.tHead.rows[1].cells[%d].querySelector('button').click()"
    names = f"[...{table}.tBodies[0].rows].map(r => r.cells[0].textContent)"
    given = page.run(names)
    values = f"[...{table}.tBodies[0].rows].map(r => r.cells[%d].dataset.value ?? null)"
    page.run(click % 1)
    first = [float(v) for v in page.run(values % 1)]
    assert first == sorted(first, reverse=True) and len(first) == 14
    assert page.run(f"{table}.tHead.rows[1].cells[1].getAttribute('aria-sort')") == "descending"
    page.run(click % 5)
    page.run(click % 5)
    kept = page.run(values % 5)
    assert kept[-2:] == [None, None]  # floors know nothing: gaps come last
    numbers = [float(v) for v in kept[:-2]]
    assert numbers == sorted(numbers)
    assert page.run("document.querySelectorAll('#results th[aria-sort]').length") == 1
    page.run(click % 5)
    assert page.run(names) == given
    page.run(click % 0)
    assert page.run(names) == sorted(given, key=str.casefold)


def test_samples_are_searched_sorted_and_filtered(page: browser.Browser, written: Path) -> None:
    rows = json.loads((written.parent / "report.json").read_text())["samples"]
    main = [row for row in rows if row["group"] == ""]
    count = "document.querySelector('#count').textContent"
    assert sources(page) == list(range(20)) and page.run(count) == "20 of 45"
    page.run("document.querySelector('#more').click()")
    page.run("document.querySelector('#more').click()")
    assert sources(page) == list(range(45)) and page.run("document.querySelector('#more').hidden")
    choose(page, "#find", "ཡིག་སྣོད")
    assert sources(page) == [i for i in range(45) if i % 5 == 1] and page.run(count) == "9 of 9"
    choose(page, "#find", "MADDA 44")  # of any case
    assert sources(page) == [44]
    choose(page, "#find", "<script>alert")
    assert set(sources(page)) == {i for i in range(45) if i % 7 == 0}
    choose(page, "#find", "")
    choose(page, "#order", "score:1")
    choose(page, "#arm", "grpo")
    cosine = [row["answers"]["grpo"]["similarity"] for row in main]
    assert sources(page) == sorted(range(45), key=lambda i: cosine[i])[:20]
    choose(page, "#order", "gain:-1")
    choose(page, "#against", "sft-1e-5")
    gain = [
        row["answers"]["sft-1e-5"]["similarity"] - c for row, c in zip(main, cosine, strict=True)
    ]
    assert sources(page) == sorted(range(45), key=lambda i: gain[i])[:20]
    page.run("document.querySelector('#picks input[value=grpo]').click()")
    shown = "[...document.querySelectorAll('.sample [data-arm]:not([hidden])')]"
    arms = set(page.run(f"{shown}.map(e => e.dataset.arm)"))
    assert "grpo" not in arms and "sft-1e-5" in arms and len(arms) == 12
    choose(page, "#group", "transfer")
    assert page.run(count) == "20 of 45"
    measured = {"base@transfer", "headline-sft", "headline-grpo", "tm@transfer"}
    assert set(page.run(f"{shown}.map(e => e.dataset.arm)")) == measured
    assert page.run("document.querySelector('#arm').value").startswith("headline")
    offered = "[...document.querySelectorAll('#picks label')].filter(e => !e.hidden).length"
    assert page.run(offered) == 4
    page.run("document.querySelector('#picks [data-pick=none]').click()")
    assert page.run(f"{shown}.length") == 0
    page.run("document.querySelector('#picks [data-pick=all]').click()")
    assert page.run(f"{shown}.length") == 4 * 20


def test_texts_run_in_their_own_direction(page: browser.Browser) -> None:
    choose(page, "#find", "ھۆججەت")
    style = "getComputedStyle(document.querySelector('.reference .text')).direction"
    assert page.run(style) == "rtl"
    left, right, edge = page.run(
        "(() => { const text = document.querySelector('.reference .text');"
        "const range = document.createRange(); range.selectNodeContents(text);"
        "const ink = range.getBoundingClientRect(), box = text.getBoundingClientRect();"
        "return [ink.left - box.left, box.right - ink.right, box.width]; })()"
    )
    assert right < 2 < left < edge  # the line begins at the right edge
    choose(page, "#find", "ཡིག་སྣོད")
    assert page.run(style) == "ltr"
    size = "parseFloat(getComputedStyle(document.querySelector('.reference .text')).fontSize)"
    assert page.run(size) > 16  # Tibetan is small for its point size


def test_a_curve_is_read_under_the_pointer(page: browser.Browser) -> None:
    found = page.run(
        "(() => { const hit = document.querySelector('#curves .hit');"
        "const box = hit.getBoundingClientRect(), figure = hit.closest('figure');"
        "const at = new PointerEvent('pointermove', {clientX: box.right, clientY: box.top});"
        "hit.dispatchEvent(at); const read = figure.querySelector('output').textContent;"
        "hit.dispatchEvent(new PointerEvent('pointerleave'));"
        "return [read, figure.querySelector('output').textContent]; })()"
    )
    assert found[0].startswith("sft-1e-") and "step 29: 0." in found[0] and found[1] == ""


def test_an_arm_of_the_legend_stands_out(page: browser.Browser) -> None:
    dimmed = page.run(
        "(() => { const block = [...document.querySelectorAll('[data-curves]')][1];"
        "const entry = block.querySelector('.legend [data-arm=grpo-bleu]');"
        "const dim = () => [...new Set([...block.querySelectorAll('g.dim')]"
        ".map(g => g.dataset.arm))];"
        "entry.dispatchEvent(new PointerEvent('pointerenter')); const on = dim();"
        "entry.dispatchEvent(new PointerEvent('pointerleave')); return [on, dim()]; })()"
    )
    assert dimmed == [["grpo", "grpo-no-gate", "grpo-beta-0", "grpo-shuffled"], []]


def test_tables_fit_a_wide_window(page: browser.Browser) -> None:
    """No table that is shown at first has to be scrolled sideways on a laptop's screen."""
    page.size(1400)
    wide = (
        "[...document.querySelectorAll('.scroll')].filter(e => e.clientWidth"
        " && e.scrollWidth > e.clientWidth + 1).map(e => e.textContent.slice(0, 40))"
    )
    assert page.run(wide) == []
    page.size(500)
    assert len(page.run(wide)) > 3


@pytest.mark.parametrize("width", [360, 768])
def test_narrow_screens_do_not_scroll_sideways(page: browser.Browser, width: int) -> None:
    page.size(width)
    assert page.run("document.documentElement.scrollWidth") <= width
    assert page.run("getComputedStyle(document.body).fontSize") == "15px"


def test_dark_and_print_have_enough_contrast(page: browser.Browser) -> None:
    """WCAG's contrast of every arm's colour with a card: 3 for marks, 4.5 for text."""
    for dark in (False, True):
        page.size(1300, dark=dark)
        colours = page.run(
            "(() => { const style = getComputedStyle(document.documentElement);"
            "const names = ['--card', '--ink', '--soft', '--faint', '--floor', '--base',"
            "...Array(8).keys()].map(n => typeof n === 'number' ? '--c' + n : n);"
            "return Object.fromEntries(names.map(n => [n, style.getPropertyValue(n).trim()])); })()"
        )
        ground = _luminance(colours.pop("--card"))
        for name, colour in colours.items():
            light, deep = sorted((_luminance(colour), ground), reverse=True)
            least = 3.0 if name == "--floor" else 4.5
            assert (light + 0.05) / (deep + 0.05) >= least, (name, colour, dark)
    page.size(700, dark=True, media="print")  # A4: black on white, nothing cut off
    ink = "getComputedStyle(document.documentElement).getPropertyValue('--ink').trim()"
    assert _luminance(page.run(ink)) < 0.1
    table = "document.querySelector('#results table')"
    assert page.run(f"{table}.getBoundingClientRect().right") <= 700
    hidden = (
        "['nav', '.tools', '#picks'].map(s => getComputedStyle(document.querySelector(s)).display)"
    )
    assert page.run(hidden) == ["none"] * 3


def _luminance(colour: str) -> float:
    """Relative luminance of #rrggbb (WCAG 2)."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_five_hundred_samples_of_twelve_arms_are_quick(
    chromium: browser.Browser, tmp_path: Path
) -> None:
    page = report.build(tree(tmp_path / "run", samples=500, steps=5, arms=ARMS[:11]))
    chromium.size(1300)
    assert chromium.open(page) < 15  # 0.7 s where nothing else runs
    assert page.stat().st_size < 8_000_000
    took = chromium.run(
        "(() => { const began = performance.now(); const find = document.querySelector('#find');"
        "find.value = 'madda 49'; find.dispatchEvent(new Event('input'));"
        "return performance.now() - began; })()"
    )
    assert took < 1000  # 5 ms where nothing else runs
    assert chromium.run("document.querySelector('#count').textContent") == "11 of 11"
    assert chromium.errors == []


# What a training sentence may try: each would set `hacked` in the page if it ran.
INJECTIONS = (
    "<script>hacked = 1</script>",
    "</script><script>hacked = 1</script><!--",
    "<img src=x onerror='hacked = 1'>",
    '"><svg/onload="hacked = 1">',
    "' onmouseover='hacked = 1' autofocus onfocus='hacked = 1",
    "a\u2028hacked = 1\u2029//",
    "{{constructor.constructor('hacked = 1')()}} ${hacked = 1} {{title}}",
    "<iframe srcdoc='<script>parent.hacked = 1</script>'></iframe>",
    "</textarea></style></title><style>@import 'x'</style>",
    "<a href='javascript:hacked = 1'>x</a><base href='//x'>",
    "\\u003cscript\\u003ehacked = 1 &lt;b&gt; &#60;b&#62;",
)


def test_nothing_that_a_run_reads_or_writes_is_run(
    chromium: browser.Browser, tmp_path: Path
) -> None:
    """From the data file through GRPO, its samples and the evaluation to the page."""
    rows = [(f"{text} q{i}", f"{text} a{i}") for i in range(4) for text in INJECTIONS]
    lines = [json.dumps({"source": source, "target": target}) for source, target in rows]
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
    cfg = whole.short_config()
    cfg.stages = ("grpo", "evaluate")
    cfg.data.train, cfg.data.group_field = str(tmp_path / "pairs.jsonl"), ""
    cfg.data.prompt = "<script>hacked = 1</script>{source}"
    cfg.data.max_prompt_length, cfg.data.max_completion_length = 128, 80  # bytes
    cfg.data.test_fraction = 0.4
    cfg.grpo.prompts_per_step, cfg.grpo.num_generations, cfg.grpo.max_steps = 4, 2, 1
    cfg.reward.tau, cfg.grpo.beta, cfg.evaluation.retention = 0.1, 0.0, ""
    with whole.machine(tmp_path):
        main.train(cfg, str(tmp_path / "run"))
    page = tmp_path / "run" / "report.html"
    chromium.open(page)
    for event in ("mouseover", "focus", "click", "load", "error"):
        chromium.run(
            f"document.querySelectorAll('*').forEach(e => e.dispatchEvent(new Event('{event}')))"
        )
    assert chromium.run("typeof hacked") == "undefined"
    assert chromium.errors == [] and chromium.requests == [page.as_uri()]
    assert chromium.run("document.querySelectorAll('script').length") == 1
    bad = "[...document.querySelectorAll('body *')].filter(e => ['IFRAME', 'IMG', 'BASE', 'STYLE']"
    handlers = (
        "[...e.attributes].some(a => a.name.startsWith('on') || /^javascript:/.test(a.value))"
    )
    assert chromium.run(f"{bad}.includes(e.tagName) || {handlers}).length") == 0
    shown = chromium.run("document.querySelector('main, body').textContent")
    samples = json.loads((page.parent / "report.json").read_text())["samples"]
    assert len(samples) >= 12
    known = {source: target for source, target in rows}
    for row in samples:  # held-out rows as sources, references, and answers of the floors
        assert known[row["source"]] == row["reference"]
        assert row["source"] in shown and row["reference"] in shown
        assert row["answers"]["copy"]["completion"] == row["source"]
    tried = {text for text in INJECTIONS for row in samples if row["source"].startswith(text)}
    assert len(tried) >= 6
    trained = [json.loads(line) for line in (page.parent / "samples.jsonl").open()]
    assert trained and all(row["reference"] in known.values() for row in trained)
