"""The page in Debian's Chromium: keyboard, pointer, live progress, phones and both schemes."""

import os
import re
import shutil
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest
import uvicorn
from playwright.sync_api import expect, sync_playwright

from optimizer.service.app import Parts, Settings, make_parts, make_service
from optimizer.service.auth import LOCAL, Oidc, Scope
from optimizer.service.provider_login import LoginClient
from tests.optimizer.service import told
from tests.optimizer.service.conftest import a_spec, uploaded
from tests.optimizer.service.test_provider_login import AUDIENCE, CLIENT, SECRET, a_provider
from tests.optimizer.study_result import large, met

pytestmark = pytest.mark.full
WAIT_MS = 20_000


@dataclass
class Site:
    """A service that listens, and what is in it."""

    url: str
    parts: Parts

    def submit(self, name: str) -> str:
        ops = self.parts.operations
        spec = a_spec(
            uploaded(ops, "m.onnx"), uploaded(ops, "d.npz"), slo=met().slo.to_dict(), name=name,
            budget={"wall_clock_s": 600, "trials": 60},
        )  # fmt: skip
        return ops.submit(LOCAL, spec)[0].id

    def ended(self, name: str, n: int = 0) -> str:
        job_id = self.submit(name)
        claim = told.taken(self.parts, job_id)
        told.succeed(self.parts, claim, large(n) if n else met())
        return job_id


@contextmanager
def serving(parts: Parts, settings: Settings) -> Iterator[Site]:
    with a_listener() as listener, listening(listener, parts, settings) as site:
        yield site


@contextmanager
def a_listener() -> Iterator[socket.socket]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        yield listener


@contextmanager
def listening(listener: socket.socket, parts: Parts, settings: Settings) -> Iterator[Site]:
    app = make_service(parts, settings)
    config = uvicorn.Config(app, log_config=None, ws="none", timeout_graceful_shutdown=2)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    try:
        yield Site(f"http://127.0.0.1:{listener.getsockname()[1]}", parts)
    finally:
        server.should_exit = True
        app.state.feed.close()
        thread.join(30)


@pytest.fixture
def site(parts: Parts, settings: Settings) -> Iterator[Site]:
    with serving(parts, settings) as site:
        yield site


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    expect.set_options(timeout=WAIT_MS)
    program = shutil.which("chromium")
    if program is None:
        message = "want Debian's package chromium (.ci/packages)"
        assert not os.environ.get("CI"), message
        pytest.skip(message)
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as started:
        browser = started.chromium.launch(executable_path=program, args=arguments)
        yield browser
        browser.close()


class Visit:
    """A tab that remembers what went wrong in it, and what it asked for elsewhere."""

    def __init__(self, browser: Any, url: str, **options: Any) -> None:
        self.context = browser.new_context(base_url=url, **options)
        self.context.set_default_timeout(WAIT_MS)
        self.page = self.context.new_page()
        self.wrong: list[str] = []
        self.page.on("console", self._said)
        self.page.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.page.on("request", lambda asked: self._asked(asked.url, url))

    def _said(self, message: Any) -> None:
        if message.type in ("error", "warning"):
            self.wrong.append(message.text)

    def _asked(self, address: str, own: str) -> None:
        if not address.startswith(own):
            self.wrong.append(address)


@contextmanager
def visiting(browser: Any, url: str, **options: Any) -> Iterator[Any]:
    visit = Visit(browser, url, **options)
    try:
        yield visit.page
        assert visit.wrong == []
    finally:
        visit.context.close()


def every_page(site: Site) -> list[str]:
    """An address of each kind of page, with something on it."""
    ended, many = site.ended("cifar10-resnet56"), site.ended("a-study-of-many-variants", 90)
    published = site.parts.operations.publish(LOCAL, ended, "prod")
    test, _ = site.parts.operations.load_test(LOCAL, published.id)
    claim = told.taken(site.parts, test.id)
    told.tell(site.parts, claim, [("load_test", told.LOAD_TEST)], "a line of the log " * 40)
    site.parts.ledger.succeed(test.id, claim.lease.token, "met")
    running = site.submit("running")
    told.tell(site.parts, told.taken(site.parts, running), told.trials(met(), met().variants[:5]))
    compared = "&".join(f"variant={one.id}" for one in met().variants[:6])
    return [
        "/", f"/jobs/{ended}", f"/jobs/{many}", f"/jobs/{test.id}", f"/jobs/{running}",
        f"/jobs/{ended}/compare?{compared}",
    ]  # fmt: skip


# --- for everybody


def test_no_page_scrolls_sideways_on_a_phone(site: Site, chromium: Any) -> None:
    with visiting(chromium, site.url, viewport={"width": 360, "height": 740}) as page:
        for path in every_page(site):
            page.goto(path)
            page.wait_for_selector("html.js")
            page.evaluate("for (const one of document.querySelectorAll('details')) one.open = true")
            assert page.evaluate("document.documentElement.scrollWidth") <= 360, path


CONTRASTS = """() => {
  const channel = (value) => (value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4);
  const numbers = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => {
    const [x, y, z] = [r, g, b].map((one) => channel(one / 255));
    return 0.2126 * x + 0.7152 * y + 0.0722 * z;
  };
  const behind = (element) => {
    for (let one = element; one; one = one.parentElement) {
      const found = numbers(getComputedStyle(one).backgroundColor);
      if (found.length === 3 || found[3] === 1) return found;
    }
    return [255, 255, 255];
  };
  const texts = "h1, h2, p, dt, dd, td, th, .soft, .pill, a, button:not(:disabled), pre, output";
  return [...document.querySelectorAll(texts)].filter((one) => one.offsetParent).map((one) => {
    const [a, b] = [light(numbers(getComputedStyle(one).color)), light(behind(one))];
    return [(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), one.outerHTML.slice(0, 80)];
  });
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_words_can_be_read_in_both_schemes(scheme: str, site: Site, chromium: Any) -> None:
    with visiting(chromium, site.url, color_scheme=scheme) as page:
        for path in every_page(site):
            page.goto(path)
            page.wait_for_selector("html.js")
            background = page.evaluate("getComputedStyle(document.body).backgroundColor")
            brightness = sum(map(int, re.findall(r"\d+", background)[:3])) / 3
            assert (brightness < 60) == (scheme == "dark")
            faint = [text for ratio, text in page.evaluate(CONTRASTS) if ratio < 4.5]
            assert faint == [], path


UNNAMED = """() => [...document.querySelectorAll("a[href], button, input, select, [tabindex='0']")]
  .filter((one) => one.type !== "hidden")
  .filter((one) => !(one.getAttribute("aria-label") || one.textContent.trim()
    || [...(one.labels ?? [])].some((label) => label.textContent.trim())))
  .map((one) => one.outerHTML.slice(0, 90))"""


def test_everything_that_can_be_operated_has_a_name(site: Site, chromium: Any) -> None:
    with visiting(chromium, site.url) as page:
        for path in every_page(site):
            page.goto(path)
            page.wait_for_selector("html.js")
            assert page.evaluate(UNNAMED) == [], path
            assert page.locator("h1").count() == 1, path
            assert page.locator("section.card:not(:has(h2))").count() == (path == "/"), path
            ids = page.evaluate("[...document.querySelectorAll('[id]')].map((one) => one.id)")
            assert len(ids) == len(set(ids)), path


def test_all_is_there_when_scripts_are_off(site: Site, chromium: Any) -> None:
    job_id = site.submit("running")
    told.tell(site.parts, told.taken(site.parts, job_id), told.trials(met(), met().variants[:5]))
    with visiting(chromium, site.url, java_script_enabled=False) as page:
        page.goto(f"/jobs/{job_id}")
        expect(page.locator(".mark")).to_have_count(5)
        expect(page.locator("#slo-answer")).to_contain_text("openvino int8 (percentile) wins")
        expect(page.locator("#slo-line")).to_be_hidden()
        expect(page.get_by_role("link", name="reload")).to_be_visible()
        for one in page.locator("#variants input").all()[:2]:
            one.check()
        page.locator("#compare").click()
        expect(page.locator("h1")).to_have_text("2 variants beside each other")
        page.go_back()
        page.locator("#cancel").click()
        expect(page.locator(".pill").first).to_have_text("cancelling")


# --- the front


def test_keys_move_the_slo_line_and_another_variant_wins(site: Site, chromium: Any) -> None:
    job_id = site.ended("study")
    with visiting(chromium, site.url) as page:
        page.goto(f"/jobs/{job_id}")
        answer, line = page.locator("#slo-answer"), page.get_by_role("slider")
        expect(answer).to_contain_text("p99 within 50 ms: openvino int8 (percentile) wins")
        expect(answer).to_contain_text("It is the study's best.")
        expect(page.locator("#slo-reset")).to_be_hidden()
        line.focus()
        said = ["p99 within 50 ms: openvino int8 (percentile) wins"]
        for _ in range(200):
            page.keyboard.press("ArrowLeft")
            now = line.get_attribute("aria-valuetext")
            if now.split(": ")[1] != said[-1].split(": ")[1]:
                said.append(now)
        # Its measured bound is 14.9 ms; the next is predicted at 12.6 ms, 14 with the margin.
        assert [re.sub(r".*: ", "", one) for one in said] == [
            "openvino int8 (percentile) wins",
            "openvino int8 (entropy) wins",
            "no variant keeps it",
        ]
        limits = [float(one.split(" ")[2]) for one in said]
        assert limits[0] > 14.9 > limits[1] > 13.9 > limits[2]
        expect(answer).to_contain_text("no variant keeps it")
        assert (
            page.locator("#mark-" + met().variants[4].id[:16])
            .get_attribute("class")
            .endswith("late")
        )
        page.locator("#slo-reset").click()
        expect(answer).to_contain_text("openvino int8 (percentile) wins")
        expect(line).to_be_focused()


def test_the_slo_line_follows_the_pointer(site: Site, chromium: Any) -> None:
    job_id = site.ended("study")
    with visiting(chromium, site.url) as page:
        page.goto(f"/jobs/{job_id}")
        page.wait_for_selector("html.js")
        plot = page.locator(".plot")
        plot.scroll_into_view_if_needed()
        box, grip = plot.bounding_box(), page.locator("#slo-handle .slo-line").bounding_box()
        y = box["y"] + 0.9 * box["height"]
        page.mouse.move(grip["x"], y)
        page.mouse.down()
        page.mouse.move(box["x"] + 0.1 * box["width"], y, steps=8)
        page.mouse.up()
        expect(page.locator("#slo-answer")).to_contain_text("no variant keeps it")
        assert page.get_by_role("slider").input_value() == "100"
        moved = page.locator("#slo-handle .slo-line").bounding_box()
        assert abs(moved["x"] - box["x"] - 0.1 * box["width"]) < 3


def test_a_mark_shows_its_recipe_to_pointer_and_keys(site: Site, chromium: Any) -> None:
    job_id = site.ended("study")
    with visiting(chromium, site.url) as page:
        page.goto(f"/jobs/{job_id}")
        page.wait_for_selector("html.js")
        recipe = page.locator("#recipe")
        page.locator("#mark-" + met().variants[1].id[:16]).hover()
        expect(recipe).to_contain_text("openvino fp32")
        expect(recipe).to_contain_text("export opset 20")
        page.mouse.move(5, 5)
        expect(recipe).to_be_hidden()
        assert page.locator(".mark[tabindex='0']").count() == 1
        page.locator(".mark[data-order='0']").focus()
        expect(recipe).to_contain_text("openvino int8 (percentile)")
        expect(recipe).to_contain_text("quantization calibration percentile, per channel True")
        page.keyboard.press("End")
        expect(page.locator(".mark[data-order='5']")).to_be_focused()
        expect(recipe).to_contain_text("onnxruntime fp32")
        page.keyboard.press("ArrowLeft")
        expect(page.locator(".mark[data-order='4']")).to_be_focused()
        page.keyboard.press("Escape")
        expect(recipe).to_be_hidden()


# --- live


def test_progress_arrives_and_leaves_alone_what_the_reader_did(site: Site, chromium: Any) -> None:
    job_id, variants = site.submit("running"), met().variants
    claim = told.taken(site.parts, job_id)
    events = told.trials(met(), variants)
    told.tell(site.parts, claim, events[:7], "epoch 1\n")
    with visiting(chromium, site.url) as page:
        page.goto(f"/jobs/{job_id}")
        expect(page.locator(".mark")).to_have_count(2)
        expect(page.locator("#spent")).to_contain_text("2 of 60 trials")
        page.locator("#pick-" + variants[1].id[:16]).check()
        page.locator("#spec-text summary").click()
        page.get_by_role("slider").focus()
        page.keyboard.press("PageDown")
        moved = page.get_by_role("slider").input_value()
        page.locator("#pick-" + variants[1].id[:16]).focus()

        told.tell(site.parts, claim, [("phase", {"name": "something else"})])
        expect(page.locator("#now")).to_have_text("something else")
        told.tell(site.parts, claim, [("step", {"message": "epoch 3.4 of 20, loss 0.52"})])
        expect(page.locator("#now")).to_have_text("something else: epoch 3.4 of 20, loss 0.52")
        told.tell(site.parts, claim, events[7:16], "epoch 2\n")
        expect(page.locator(".mark")).to_have_count(5)
        expect(page.locator("#spent")).to_contain_text("5 of 60 trials")
        expect(page.locator("#now")).to_contain_text("timing")
        expect(page.locator("#log")).to_contain_text("epoch 2")
        expect(page.locator("#pick-" + variants[1].id[:16])).to_be_checked()
        expect(page.locator("#pick-" + variants[1].id[:16])).to_be_focused()
        expect(page.locator("#spec-text")).to_have_attribute("open", "")
        assert page.locator("#slo-reset").is_visible()
        assert page.get_by_role("slider").input_value() == moved or page.locator(
            "#slo-answer"
        ).inner_text().startswith("p99 within 4")

        told.succeed(site.parts, claim, met())
        expect(page.locator("h1")).to_contain_text("keeps p99 within 50 ms")
        expect(page.locator("#ablation")).to_be_visible()
        expect(page.locator("#cancel")).to_have_count(0)
        expect(page.locator("#retry")).to_be_visible()


def test_the_list_follows_its_jobs(site: Site, chromium: Any) -> None:
    job_id = site.submit("waiting")
    with visiting(chromium, site.url) as page:
        page.goto("/")
        expect(page.locator("#jobs .pill")).to_have_text("queued")
        site.parts.operations.cancel(LOCAL, job_id)
        expect(page.locator("#jobs .pill")).to_have_text("cancelled", timeout=WAIT_MS)
        page.get_by_role("link", name="cancelled 1").click()
        page.get_by_role("link", name="waiting").click()
        expect(page.locator("h1")).to_have_text("waiting")


# --- buttons


def test_a_study_is_published_and_load_tested_by_its_buttons(site: Site, chromium: Any) -> None:
    job_id = site.ended("study")
    with visiting(chromium, site.url) as page:
        page.goto(f"/jobs/{job_id}")
        page.get_by_label("to", exact=True).select_option("prod")
        page.get_by_label("as", exact=True).fill("renamed")
        page.get_by_role("button", name="Publish").click()
        expect(page.locator("#published")).to_contain_text("prod/renamed/1")
        page.get_by_role("button", name="Start a load test").click()
        page.wait_for_url(re.compile(rf"/jobs/(?!{job_id})[0-9a-f]{{16}}$"))
        test_id = page.url.rpartition("/")[2]
        expect(page.locator("#now")).to_have_text("Waits for a worker.")
        claim = told.taken(site.parts, test_id)
        told.tell(site.parts, claim, [("load_test", told.LOAD_TEST)])
        site.parts.ledger.succeed(test_id, claim.lease.token, "met")
        expect(page.locator("#verdict")).to_contain_text("Verdict: met")
        page.get_by_role("link", name=job_id).click()
        expect(page.locator("#published")).to_contain_text("load test met")


def test_a_job_is_cancelled_and_retried_by_its_buttons(site: Site, chromium: Any) -> None:
    job_id = site.submit("waiting")
    with visiting(chromium, site.url) as page:
        page.goto(f"/jobs/{job_id}")
        page.get_by_role("button", name="Cancel").click()
        expect(page.locator("#top .pill")).to_have_text("cancelled")
        page.get_by_role("button", name="Retry").click()
        expect(page.locator("#top .pill")).to_have_text("queued")
        expect(page.locator("#progress dd").first).to_have_text("2")  # of its runs


def test_variants_are_compared_when_some_are_ticked(site: Site, chromium: Any) -> None:
    job_id = site.ended("study")
    with visiting(chromium, site.url) as page:
        page.goto(f"/jobs/{job_id}")
        button = page.locator("#compare")
        expect(button).to_be_disabled()
        for one in (met().variants[4], met().variants[0]):
            page.locator(f"#pick-{one.id[:16]}").press("Space")
        expect(button).to_be_enabled()
        button.press("Enter")
        expect(page.locator("h1")).to_have_text("2 variants beside each other")
        expect(page.locator("tr", has_text="cost per million").locator(".best")).to_contain_text(
            "0.0546"
        )


def test_a_browser_logs_in_with_the_keyboard_and_out(settings: Settings, chromium: Any) -> None:
    guarded = replace(settings, keys=True)
    parts = make_parts(guarded)
    assert parts.authenticator.keys is not None
    _, key = parts.authenticator.keys.make("ann", [Scope.READ])
    with serving(parts, guarded) as site:
        job_id = site.submit("running")
        claim = told.taken(parts, job_id)
        visit = Visit(chromium, site.url)
        page = visit.page
        page.goto(f"/jobs/{job_id}")
        expect(page.locator("#key")).to_be_focused()
        page.keyboard.type("ts_wrong")
        page.keyboard.press("Enter")
        expect(page.get_by_role("alert")).to_have_text("this is no API key")
        expect(page.locator("#key")).to_be_focused()
        page.keyboard.type(key)
        page.keyboard.press("Enter")
        expect(page.locator("h1")).to_have_text("running")
        assert page.evaluate("document.cookie") == ""
        assert page.locator("main form[method=post]").count() == 0
        told.tell(parts, claim, told.trials(met(), met().variants[:2]))
        expect(page.locator(".mark")).to_have_count(2)
        page.get_by_role("button", name="Log out").click()
        expect(page.locator("h1")).to_have_text("Log in")
        page.goto("/")
        expect(page.locator("h1")).to_have_text("Log in")
        # The one refusal that was asked for; nothing else went wrong.
        assert all("401" in one for one in visit.wrong), visit.wrong
        visit.context.close()
    parts.database.close()


def test_a_browser_comes_back_from_the_provider_logged_in_and_logs_out(
    chromium: Any, settings: Settings
) -> None:
    # Another site than the service's, as a provider is: localhost.
    with a_provider("localhost") as provider, a_listener() as listener:
        provider.site = f"http://127.0.0.1:{listener.getsockname()[1]}"
        guarded = replace(
            settings,
            oidc=Oidc(provider.issuer, AUDIENCE, f"{provider.issuer}/jwks"),
            login=LoginClient(CLIENT, SECRET, provider.site),
        )
        parts = make_parts(guarded)
        with listening(listener, parts, guarded) as site:
            job_id = site.submit("running")
            visit = Visit(chromium, site.url)
            page = visit.page
            page.goto(f"/jobs/{job_id}")
            page.get_by_role("link", name="company's account").click()
            expect(page.locator("h1")).to_have_text("running")
            expect(page.locator(".who")).to_have_text(f"ann@{provider.issuer}")
            assert page.evaluate("document.cookie") == ""
            page.get_by_role("button", name="Log out").click()
            expect(page.locator("h1")).to_have_text("Log in")
            page.goto(f"/jobs/{job_id}")
            expect(page.locator("h1")).to_have_text("Log in")
            visit.context.close()
        parts.database.close()


def test_a_page_says_that_its_progress_ends_when_its_key_is_revoked(
    chromium: Any, settings: Settings
) -> None:
    guarded = replace(settings, keys=True, recheck_s=0.1)
    parts = make_parts(guarded)
    keys = parts.authenticator.keys
    assert keys is not None
    made, key = keys.make("ann", [Scope.READ])
    with serving(parts, guarded) as site:
        job_id = site.submit("running")
        claim = told.taken(parts, job_id)
        told.tell(parts, claim, [("phase", {"name": "searching"})])
        visit = Visit(chromium, site.url)
        page = visit.page
        page.goto(f"/jobs/{job_id}")
        page.locator("#key").fill(key)
        page.keyboard.press("Enter")
        expect(page.locator("#now")).to_have_text("searching")
        # The page is drawn with it: what comes later comes by the stream, which is open then.
        told.tell(parts, claim, [("phase", {"name": "measuring"})])
        expect(page.locator("#now")).to_have_text("measuring")
        keys.revoke(made.id)
        expect(page.locator("#now")).to_have_text("You are logged out: reload the page.")
        page.reload()
        expect(page.locator("h1")).to_have_text("Log in")
        visit.context.close()
    parts.database.close()
