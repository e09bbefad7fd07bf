"""The report and the viewer in a real browser: no errors, no network, tables that work, phone width."""

import json
import math
import shutil
import time

import nibabel as nib
import numpy as np
import pytest

from mednext_jax.evaluate import cohort, measure, provenance, report, summary, viewer

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
wait = pytest.importorskip("selenium.webdriver.support.wait")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="chromium or chromedriver is not installed")

LPS = np.array([[-1.0, 0, 0, 0], [0, -1, 0, 30], [0, 0, 1.5, 0], [0, 0, 0, 1]])
SETTINGS = measure.Settings({"WT": (1, 2, 3), "TC": (1, 3), "ET": (3,)})
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--enable-unsafe-swiftshader", "--window-size=1200,900",
)  # fmt: skip


def _labels(shift, size, enhancing=True):
    labels = np.zeros((28, 32, 24), np.uint8)
    centre = np.array((14, 15, 12)) + shift
    grid = np.stack(np.meshgrid(*map(np.arange, labels.shape), indexing="ij"), -1)
    radius = np.linalg.norm(grid - centre, axis=-1)
    labels[radius < size] = 2
    labels[radius < 0.7 * size] = 3 if enhancing else 1
    labels[radius < 0.4 * size] = 1
    return labels


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """Folder with the report and viewer of two arms, one of them with a missed and an absent region."""
    root = tmp_path_factory.mktemp("report")
    for name in ("truth", "first<b>", "second"):
        (root / name).mkdir()
    for i in range(4):
        truth = _labels((0, 0, 0), 6 + i, enhancing=i != 2)
        maps = {
            "truth": truth,
            "first<b>": _labels((1, 0, 0), 6 + i, enhancing=i != 2),
            "second": _labels((1, i, -1), 5, enhancing=i != 2) if i else np.zeros_like(truth),
        }
        for name, labels in maps.items():
            nib.save(nib.Nifti1Image(labels, LPS), root / name / f"case{i}.nii.gz")
        scan = np.where(_labels((0, 0, 0), 11) > 0, 300 + 100 * (truth > 0), 0).astype(np.int16)
        (root / "images").mkdir(exist_ok=True)
        nib.save(nib.Nifti1Image(scan, LPS), root / "images" / f"case{i}-t2f.nii.gz")
    folders = [cohort.open_folder(n, root / n) for n in ("truth", "first<b>", "second")]
    evaluation = cohort.evaluate(folders[1:], folders[0], SETTINGS)
    out = root / "out"
    out.mkdir()
    result = summary.summarise(evaluation.table)
    made, note = provenance.record(["test"]), "simulated <i>data</i>"
    report.write(out, evaluation, result, made, note, root / "images")
    return out


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def opened(browser, page):
    """The browser with the report freshly loaded at desktop width."""
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    _forget_logs(browser)
    browser.get((page / "report.html").as_uri())
    loaded = "return document.readyState === 'complete' && document.querySelectorAll('#percase tbody tr').length"
    wait.WebDriverWait(browser, 60).until(lambda driver: driver.execute_script(loaded))
    return browser


def _forget_logs(browser):
    """What the browser did before, such as loading its own start page, is not the report's doing."""
    browser.get_log("browser")
    browser.get_log("performance")


def _requests(browser):
    """Addresses the page asked for since the log was last read."""
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    sent = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    return [url for url in sent if not url.startswith(("data:", "blob:"))]


def _column(browser, index):
    script = """return Array.from(document.querySelectorAll('#percase tbody tr')).map(
        row => row.cells[arguments[0]].dataset.value ?? row.cells[arguments[0]].textContent)"""
    return browser.execute_script(script, index)


def _shown(browser):
    script = "return document.querySelectorAll('#percase tbody tr:not([hidden])').length"
    return browser.execute_script(script)


def _click_header(browser, text, table="percase"):
    script = """for (const b of document.querySelectorAll('#' + arguments[1] + ' thead button'))
        if (b.textContent === arguments[0]) b.click();"""
    browser.execute_script(script, text, table)


def test_report_opens_without_console_messages_or_network(opened, page):
    assert [entry for entry in opened.get_log("browser") if entry["level"] == "SEVERE"] == []
    assert _requests(opened) in ([], [(page / "report.html").as_uri()])
    assert opened.title.startswith("Comparison")


def test_names_and_notes_are_escaped(opened):
    banner = opened.execute_script("return document.querySelector('.banner').textContent")
    assert banner == "simulated <i>data</i>"
    assert "first<b>" in opened.execute_script("return document.querySelector('#summary').textContent")


def test_every_picture_is_shown_and_described(opened):
    script = "return Array.from(document.images).map(i => [i.naturalWidth, i.alt])"
    pictures = opened.execute_script(script)
    assert len(pictures) >= 7 + 3 + 3 + 6
    assert all(width > 0 and len(alt) > 30 for width, alt in pictures)


def test_columns_sort_up_and_down_with_undefined_last(opened):
    for sign in (1, -1):
        _click_header(opened, "Dice")
        values = [float(v) for v in _column(opened, 3)]
        defined = [v for v in values if not math.isnan(v)]
        assert len(values) == 2 * 4 * 3 and len(defined) < len(values)
        assert all(math.isnan(v) for v in values[len(defined) :])
        assert defined == sorted(defined, reverse=sign < 0)
    _click_header(opened, "Region")
    assert _column(opened, 2) == sorted(_column(opened, 2))


def test_comparisons_sort_by_their_p_value(opened):
    _click_header(opened, "Holm p", "compared")
    script = """return Array.from(document.querySelectorAll('#compared tbody tr')).map(
        row => Number(row.cells[10].dataset.value))"""
    values = opened.execute_script(script)
    assert len(values) == 7 * 4 and values == sorted(values)


def test_sorted_column_is_announced(opened):
    _click_header(opened, "Dice")
    script = "return Array.from(document.querySelectorAll('#percase th[aria-sort=ascending]')).length"
    assert opened.execute_script(script) == 1


def test_rows_are_filtered_by_text_arm_and_region(opened):
    def choose(field, value):
        script = """const e = document.querySelector('#cases .controls ' + arguments[0]);
            e.value = arguments[1]; e.dispatchEvent(new Event('input'));"""
        opened.execute_script(script, field, value)

    assert _shown(opened) == 24
    choose("input", "CASE2 wt")
    assert _shown(opened) == 2
    choose("input", "")
    choose("[data-field=arm]", "second")
    choose("[data-field=region]", "ET")
    assert _shown(opened) == 4
    count = opened.execute_script("return document.querySelector('#cases [role=status]').textContent")
    assert count == "4 of 24 rows"


@pytest.mark.parametrize("width", [390, 1024, 1280])
@pytest.mark.parametrize("name", ["report.html", "viewer.html"])
def test_page_fits_phones_and_desks_without_sideways_scrolling(browser, page, name, width):
    if not (page / name).exists():
        pytest.skip("the viewer package is not installed")
    screen = {"width": width, "height": 844, "deviceScaleFactor": 2, "mobile": width < 1000}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    browser.get((page / name).as_uri())
    browser.execute_script("document.querySelectorAll('details').forEach(d => d.open = true)")
    script = """const page = document.documentElement, boxes = Array.from(document.querySelectorAll('.scroll'));
        return [innerWidth, page.scrollWidth - page.clientWidth,
                Math.max(0, ...boxes.map(b => b.getBoundingClientRect().right)) <= page.clientWidth]"""
    assert browser.execute_script(script) == [width, 0, True]


@pytest.mark.skipif(viewer.bundle() is None, reason="the viewer package is not installed")
def test_viewer_shows_volumes_offline_or_says_why_not(browser, page):
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    _forget_logs(browser)
    browser.get((page / "viewer.html").as_uri())

    def status():
        for _ in range(200):
            text = browser.execute_script("return document.getElementById('status').textContent")
            if text != "loading":
                break
            time.sleep(0.1)
        return text

    webgl = browser.execute_script("return !!document.createElement('canvas').getContext('webgl2')")
    first = status()
    assert ("worst case, t2f" in first) if webgl else ("cannot run" in first)
    assert _requests(browser) in ([], [(page / "viewer.html").as_uri()])
    if webgl:
        script = """const e = document.getElementById('labels'); e.value = 'second';
            e.dispatchEvent(new Event('input')); document.getElementById('status').textContent = 'loading';"""
        browser.execute_script(script)
        assert "worst case" in status()
        assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []
