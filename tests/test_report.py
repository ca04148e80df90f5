"""`jitjax report`: what is on the page, and the page in a real browser."""

import base64
import json
import re
import shutil

import numpy as np
import pytest
from conftest import small_settings
from PIL import Image

from jitjax import cli, report
from jitjax.errors import UserError
from jitjax.monitor import Monitor, save_grid
from jitjax.settings import to_dict

pytest.importorskip("plotly", reason="needs the plotly package")


def make_run(workdir, steps=300, facts=True, **overrides):
    """A workdir as a run of `steps` leaves it, with a preview every 100 steps whose colour tells its step."""
    workdir.mkdir()
    recorded = {"device_kind": "cpu", "devices": 2, "effective_batch": 4, "steps_per_epoch": 50, "planned_steps": 400}
    config = to_dict(small_settings(**overrides)) | (recorded if facts else {})
    (workdir / "config.json").write_text(json.dumps(config))
    (workdir / "versions.json").write_text(json.dumps({"python": "3.11", "jax": f"0.{len(workdir.name)}"}))
    seconds = {"step": 60.0, "compile": 30.0, "preview": 10.0}
    (workdir / "time.json").write_text(json.dumps({"starts": 2, "step": steps, "unsaved": 0, "seconds": seconds}))
    monitor = Monitor(workdir, total_steps=400)
    for step in range(1, steps + 1):
        loss = float("nan") if step == 7 else 50.0 if step == 150 else 1 / step
        speed = {"time/step": 0.5, "train/samples_per_second": 8.0, "perf/data_wait": 0.25} if step % 50 == 0 else {}
        metrics = {"train/loss": loss, "train/grad_norm": 0.5, "train/learning_rate": 1e-3, **speed}
        monitor.write(step, metrics, epoch_start=step - 50 if step % 50 == 0 else None)
        if step % 100 == 0:
            save_grid(workdir / "samples" / f"step_{step:08d}.png", np.full((4, 8, 8, 3), step // 2 % 256, np.uint8))
    monitor.note("<script>a note</script>")
    monitor.close()
    scored = [(100, 9.0), (200, 5.0), (300, 99.0), (200, 4.0), (250, 3.0), (900, 1.0)]  # went back to 100, and to 250
    scored.insert(1, (150, float("nan")))  # as versions before wrote it
    lines = [
        {"step": s, "ema": "0.9", "eval/fid": v, "eval/kid": v / 9, "eval/kid_std": 0.5, "eval/loss": v} for s, v in scored
    ]
    (workdir / "scores.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (workdir / "best.json").write_text(json.dumps({"step": 250, "metric": "eval/fid", "value": 3.0}))
    return workdir


def data_of(page):
    def refuse(constant):
        raise ValueError(f"{constant} is no JSON")

    text = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, flags=re.S)[1]
    return json.loads(text, parse_constant=refuse)


def panels_of(page):
    return {panel["name"]: panel for panel in data_of(page)["panels"]}


def test_the_page_has_the_runs_numbers_grids_and_differences(tmp_path, capsys):
    one = make_run(tmp_path / "a", total_steps=400)
    other = make_run(tmp_path / "second", 100, total_steps=400, optim__lr=0.5, model__name="JiT-nano/<2>")
    assert cli.main(["report", str(one), str(other), "--out", str(tmp_path / "both.html")]) == 0
    assert capsys.readouterr().out.endswith(f"\n{tmp_path}/both.html\n")
    page = (tmp_path / "both.html").read_text()
    panels, data = panels_of(page), data_of(page)
    # Scores of steps that the run made again, or has not reached, are not shown.
    (fid, _), (kid, _) = panels["eval/fid"]["traces"], panels["eval/kid"]["traces"]
    assert (fid["x"], fid["y"]) == ([100, 200, 250], [9.0, 4.0, 3.0])
    assert kid["error"] == [0.5] * 3 and "eval/kid_std" not in panels
    faint, mean, *_ = panels["train/loss"]["traces"]
    assert 7 not in faint["x"] and len(faint["x"]) == 299 and faint["y"][148] == 50.0
    assert "mean of 5 steps" in mean["name"] and 10 < max(mean["y"]) < 11  # the spike of 50, spread over five steps
    assert [trace["run"] for trace in panels["train/epoch_loss"]["traces"]] == [0, 1]
    assert data["units"] == [{"images": 4, "epochs": 1 / 50}] * 2
    assert [[grid["step"] for grid in grids] for grids in data["grids"]] == [[100, 200, 300], [100]]
    assert base64.b64decode(data["grids"][0][2]["src"].partition(",")[2]) == (one / "samples/step_00000300.png").read_bytes()
    differing = page.split("What differs between the runs:")[1].split("<details>")[0]
    assert [re.sub("<.*?>", " ", row).split() for row in re.findall("<tr>.*?</tr>", differing)] == [
        ["a", "second"],
        ["model.name", "JiT-nano/4", "JiT-nano/&lt;2&gt;"],
        ["optim.lr", "0.001", "0.5"],
    ]
    text = re.sub(r"\s+", " ", re.sub("<.*?>", " ", page.split("<script")[0]))
    for fact in ("step 300 of 400 (75%)", "fid 3 at step 250", "images seen 1,200 400", "0:01:40 in 2 starts"):
        assert fact in text
    assert "training steps 60.0% 0:01:00" in text and "compiling 30.0% 0:00:30" in text
    assert "steps without a finite loss 1 1" in text and "jax 0.1 0.6" in text
    assert "&lt;script&gt;a note" in page and "<script>a note" not in page


def test_a_long_run_is_thinned_without_losing_a_spike_and_large_grids_become_smaller(tmp_path):
    workdir = make_run(tmp_path / "a", 9000)
    noise = np.random.default_rng(0).integers(0, 256, (64, 256, 256, 3), dtype=np.uint8)
    save_grid(workdir / "samples" / "step_00000100.png", noise[:1])
    save_grid(workdir / "samples" / "step_00009000.png", noise)
    page = report.write_report([workdir]).read_text()
    loss = panels_of(page)["train/loss"]["traces"]
    assert all(len(trace["x"]) <= report.MOST_POINTS + 2 for trace in loss)
    assert loss[0]["x"][0] == 1 and loss[0]["x"][-1] == 9000 and 50.0 in loss[0]["y"]
    (grids,) = data_of(page)["grids"]
    assert len(grids) == report.MOST_GRIDS and grids[0]["step"] == 100 and grids[-1]["step"] == 9000
    last = tmp_path / "last"
    last.write_bytes(base64.b64decode(grids[-1]["src"].partition(",")[2]))
    with Image.open(last) as image:
        assert image.format == "WEBP" and max(image.size) == report.LARGEST_SIDE
    assert "What differs from the defaults:" in page and (workdir / "report.html").stat().st_size < 16e6


def test_a_run_that_has_just_begun_and_one_of_an_older_version_have_a_report(tmp_path):
    workdir = make_run(tmp_path / "a", 1, facts=False)
    for name in ("scores.jsonl", "time.json", "versions.json", "best.json", "log.txt"):
        (workdir / name).unlink()
    shutil.rmtree(workdir / "samples", ignore_errors=True)
    page = report.write_report([workdir], tmp_path / "r.html").read_text()
    assert panels_of(page)["train/loss"]["traces"][0]["x"] == [1] and data_of(page)["grids"] == [[]]
    (workdir / "metrics.jsonl").unlink()  # not at its first step
    assert panels_of(report.write_report([workdir], tmp_path / "r.html").read_text()) == {}


def test_a_preview_that_cannot_be_read_costs_that_grid_alone(tmp_path, monkeypatch):
    run = make_run(tmp_path / "a")
    whole = (run / "samples" / "step_00000200.png").read_bytes()
    name = whole.index(b"IDAT")
    monkeypatch.setattr(report, "LARGEST_PNG", 0)  # all are decoded
    for damaged in (b"", whole[:20], b"no picture", whole[:-30], whole[:name] + b"\xff\xd9\0L" + whole[name + 4 :]):
        (run / "samples" / "step_00000200.png").write_bytes(damaged)
        page = report.write_report([run]).read_text()
        assert [grid["step"] for grid in data_of(page)["grids"][0]] == [100, 300]


def test_mistakes_are_one_line(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="config.json.*give the workdir of a run"):
        report.write_report([tmp_path])
    for text in ("[]", '{"geometry": {}}', "{"):  # that of an exported folder is the second
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(UserError, match="config.json.*give the workdir of a run"):
            report.write_report([tmp_path])
    workdir = make_run(tmp_path / "a", 1)
    spent = (workdir / "time.json").read_text()
    (workdir / "time.json").write_text("[]")
    with pytest.raises(UserError, match="time.json cannot be read"):
        report.write_report([workdir])
    (workdir / "time.json").write_text(spent)
    with pytest.raises(UserError, match="--out=.*nosuch.* cannot be written"):
        report.write_report([workdir], tmp_path / "nosuch" / "r.html")
    before = (workdir / "config.json").read_bytes()
    for out in ("", workdir / "config.json"):
        with pytest.raises(UserError, match="--out=.*: use FILE.html"):
            report.write_report([workdir], out)
    assert (workdir / "config.json").read_bytes() == before
    monkeypatch.setitem(__import__("sys").modules, "plotly.offline", None)
    with pytest.raises(UserError, match=r"pip install -e '\.\[report\]'"):
        report.write_report([workdir])


# ---------------------------------------------------------------- in a browser


@pytest.fixture(scope="module")
def browser():
    """Headless Chromium without a network."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs the selenium package")
    binary = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")
    driver = shutil.which("chromedriver")
    if not binary or not driver:
        pytest.skip("needs Chromium and its driver (Debian: apt-get install chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--host-resolver-rules=MAP * ~NOTFOUND"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield browser
    browser.quit()


@pytest.mark.parametrize("width, scheme", [(360, "dark"), (1280, "light")])
def test_in_a_browser_curves_are_drawn_and_the_slider_moves_the_grids(tmp_path, browser, width, scheme):
    one, other = make_run(tmp_path / "a"), make_run(tmp_path / "b", 200, optim__lr=0.5)
    page = report.write_report([one, other])
    device = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", device)
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]})
    browser.get(page.as_uri())
    js = browser.execute_script
    # Every panel has a visible line of each run inside its frame, and nothing is wider than the screen.
    panels = js("""return [...document.querySelectorAll(".plot")].map(plot => ({
        lines: [...plot.querySelectorAll(".scatterlayer .js-line")].filter(line => line.getAttribute("d").length > 9).length,
        right: plot.getBoundingClientRect().right, text: getComputedStyle(plot.querySelector(".xtick text")).fill}))""")
    assert len(panels) == len(data_of(page.read_text())["panels"]) and all(panel["lines"] >= 2 for panel in panels)
    assert all(panel["right"] <= width for panel in panels) and js("return document.documentElement.scrollWidth") <= width
    # Text and paper: dark on light, or light on dark.
    paper = js("return getComputedStyle(document.body).backgroundColor")
    for text, least in ((panels[0]["text"], 7), (js("return getComputedStyle(document.querySelector('p')).color"), 4.5)):
        assert contrast(text, paper) >= least
    assert (luminance(paper) < 0.5) == (scheme == "dark")
    # The slider: at the end, then one back, then the button.
    shown = """return [...document.querySelectorAll("figure")].map(figure => {
        const image = figure.querySelector("img"), canvas = document.createElement("canvas");
        canvas.getContext("2d").drawImage(image, 0, 0);
        return [figure.innerText.trim(), canvas.getContext("2d").getImageData(0, 0, 1, 1).data[0], image.naturalWidth];})"""
    decoded = "return Promise.all([...document.querySelectorAll('figure img')].map(image => image.decode()))"
    slider = browser.find_element("id", "slider")
    for move, steps in ((None, (300, 200)), ("\ue012", (200, 200)), ("button", (100, 100))):
        if move == "button":
            browser.find_element("id", "earlier").click()
        elif move:
            slider.send_keys(move)  # the left arrow key
        js(decoded)
        assert js(shown) == [[f"{name}, step {step}", step // 2, 18] for name, step in zip("ab", steps, strict=True)]
    # Other units on the axis, and one run alone.
    last_tick = "return [...document.querySelectorAll('.plot')][0].querySelectorAll('.js-line').length"
    browser.find_element("css selector", "input[value=images]").click()
    assert js("return document.querySelector('.plot')._fullLayout.xaxis.range[1]") >= 4 * 300
    before = js(last_tick)
    browser.find_element("css selector", "#legend input").click()
    assert js(last_tick) < before
    assert [entry for entry in browser.get_log("browser") if entry["level"] != "INFO"] == []
    requests = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = [m["params"]["request"]["url"] for m in requests if m["method"] == "Network.requestWillBeSent"]
    assert urls and all(url.startswith(("file:", "data:", "blob:")) for url in urls)


def luminance(colour):
    """Of "rgb(1, 2, 3)", as WCAG defines it."""
    channels = [int(value) / 255 for value in re.findall(r"\d+", colour)[:3]]
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
    return sum(weight * value for weight, value in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one, other):
    low, high = sorted(map(luminance, (one, other)))
    return (high + 0.05) / (low + 0.05)
