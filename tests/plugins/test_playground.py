"""The page in a real browser: ask, see the stream, the tool call, the probabilities, the errors, the engine at work."""

import json
import shutil
import tempfile
import time

import httpx
import jsonschema
import pytest

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
FLAGS = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
FLAGS += " --disable-component-update --disable-sync --window-size=1440,900"
PLUGINS = ("playground", "tool_calling", "guided_decoding")
KEY = "secret"
SCHEMA = {
    "type": "object",
    "properties": {"town": {"enum": ["Kyiv", "Rome"]}, "year": {"type": "integer", "minimum": 1900, "maximum": 2100}},
    "required": ["town", "year"],
    "additionalProperties": False,
}
ENTER, HOME, RIGHT = "\ue007", "\ue011", "\ue014"
needs_browser = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="no Chromium here (Debian and Ubuntu: apt install chromium chromium-driver)"
)


@pytest.fixture(scope="module")
def server(start_server):
    return start_server("--api-key", KEY, *(word for name in PLUGINS for word in ("--set", f"plugins.{name}=true")))


@pytest.fixture(scope="module")
def http(server):
    with httpx.Client(base_url=server.url, headers={"authorization": f"Bearer {KEY}"}, timeout=60) as client:
        yield client


class Page:
    """A page in a browser, by ids."""

    def __init__(self, driver, url):
        self.driver, self.url = driver, url

    def open(self):
        self.driver.get(self.url)
        if not self["key"].get_attribute("value"):
            self["key"].send_keys(KEY + ENTER)
        self.until(lambda: self["state"].text == "live")

    def __getitem__(self, id):
        return self.driver.find_element("id", id)

    def all(self, selector):
        return self.driver.find_elements("css selector", selector)

    def until(self, condition):
        from selenium.common.exceptions import StaleElementReferenceException
        from selenium.webdriver.support.ui import WebDriverWait

        wait = WebDriverWait(self.driver, 30, 0.05, ignored_exceptions=[StaleElementReferenceException])
        return wait.until(lambda _: condition())

    def ask(self, text):
        self["input"].send_keys(text + ENTER)

    def answer(self, number=-1):
        self.until(lambda: not self.all(".running") and self.all(".message.assistant .meta"))
        return self.all(".message.assistant")[number]


@pytest.fixture(scope="module")
def driver():
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        for flag in [*FLAGS.split(), f"--user-data-dir={profile}"]:
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
        yield driver
        driver.quit()


@pytest.fixture
def page(server, driver):
    page = Page(driver, f"{server.url}/")
    page.open()
    yield page
    severe = [entry["message"] for entry in driver.get_log("browser") if entry["level"] == "SEVERE"]
    assert not [message for message in severe if "400 (Bad Request)" not in message and "401 (Unauthorized)" not in message]


def test_files_are_public_and_strict_and_data_is_not(server, http):
    index = httpx.get(f"{server.url}/")
    assert index.status_code == 200 and "http://" not in index.text and "https://" not in index.text
    policy = index.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "script-src 'self'" in policy
    head = httpx.head(f"{server.url}/")
    assert head.status_code == 200 and not head.content and head.headers["content-length"] == str(len(index.content))
    assert "onclick=" not in index.text and "<style" not in index.text and " style=" not in index.text
    assert httpx.get(f"{server.url}/playground/app.js").headers["content-type"].startswith("text/javascript")
    for path in ("view", "about"):
        assert httpx.get(f"{server.url}/playground/{path}").status_code == 401
        found = http.get(f"/playground/{path}")
        assert found.status_code == 200
    assert "plugin playground: kernel-playground" in "\n".join(found.json()["explanation"])
    assert http.get("/playground/view?since=x").status_code == 400


def test_the_view_follows_a_request_and_all_is_free_afterwards(http):
    view = http.get("/playground/view").json()
    body = {"prompt": "Hello", "max_tokens": 400, "ignore_eos": True, "n": 2, "temperature": 1, "stream": True}
    with http.stream("POST", "/v1/completions", json=body) as stream:
        lines = stream.iter_lines()
        next(lines)
        busy = http.get(f"/playground/view?since={view['count']}").json()
        assert busy["num_running"] == 2 and {row["limit"] for row in busy["running"]} == {400}
        assert busy["blocks"]["free"] < busy["blocks"]["total"]
        assert "2" in busy["blocks"]["cells"] or "3" in busy["blocks"]["cells"]
        numbers = [step[0] for step in busy["steps"]]
        assert numbers == list(range(view["count"] + 1, busy["count"] + 1))
    while (after := http.get("/playground/view").json())["num_running"]:
        time.sleep(0.05)
    assert after["blocks"]["free"] == after["blocks"]["total"] and set(after["blocks"]["cells"]) <= {"0", "1"}
    assert after["ended"] == view["ended"] + 2


@needs_browser
def test_without_the_key_the_page_says_so_and_with_it_it_works(page):
    page.driver.execute_script("sessionStorage.clear()")
    page.driver.get(page.url)
    page.until(lambda: page["state"].text == "no engine" and "API key" in page["summary"].text)
    assert "API key" in page["engine-error"].text
    page.open()
    page.until(lambda: page["model"].text == "tiny-chat" and not page["engine-error"].is_displayed())


@needs_browser
def test_a_question_is_answered_in_a_stream_and_shown_as_text(page):
    page["temperature"].send_keys(HOME)  # 0
    page.ask("What does os.path.join do?")
    assert "Join two or more pathname components" in page.answer().text
    assert "tokens" in page.all(".meta")[-1].text
    page.until(lambda: page.all("#steps rect"))
    page.until(lambda: page.all("#blocks .c1") and "ended so far" in page["sequences"].text)
    page.ask("<img src=x onerror=alert(1)> <b>Hi</b>")
    page.answer()
    assert page.all(".message.user")[-1].text == "<img src=x onerror=alert(1)> <b>Hi</b>" and not page.all(
        ".message img, .message b"
    )


@needs_browser
def test_probabilities_show_on_hover_and_with_the_arrow_keys(page):
    page["logprobs"].click()
    page.ask("What does os.getcwd do?")
    page.answer()
    first, second = page.all(".token")[:2]
    page.driver.execute_script("arguments[0].focus()", first)
    page.until(lambda: page["tip"].is_displayed() and len(page.all("#tip div")) in (5, 6) and "%" in page["tip"].text)
    first.send_keys(RIGHT)
    assert page.driver.switch_to.active_element == second


@needs_browser
def test_a_tool_is_called_and_its_result_is_answered(page):
    page["temperature"].send_keys(HOME)
    page["example-tools"].click()
    page.ask("Call math.sqrt with 16")
    answer = page.answer()
    assert "math.sqrt" in answer.text and json.loads(answer.find_element("css selector", "pre").text) == {"x": 16}
    answer.find_element("css selector", "input").send_keys("4.0" + ENTER)
    page.until(lambda: len(page.all(".message.assistant .meta")) == 2)
    assert "4" in page.all(".message.assistant .text")[-1].text


@needs_browser
def test_an_answer_fits_the_schema_that_was_typed(page):
    page["schema"].send_keys(json.dumps(SCHEMA))
    page.ask("Hello!")
    answer = page.answer().find_element("css selector", ".text").text
    jsonschema.validate(json.loads(answer), SCHEMA)


@needs_browser
def test_a_bad_schema_is_an_error_that_says_why_and_the_chat_goes_on(page):
    page["schema"].send_keys('{"type": ')
    page.ask("Hello!")
    page.until(lambda: page.all("#messages .error"))
    assert "JSON schema: this is not JSON" in page.all("#messages .error")[-1].text
    page["schema"].clear()
    page["schema"].send_keys('{"type": "nonsense"}')
    page.ask("Hello!")
    page.until(lambda: len(page.all("#messages .error")) == 2)
    assert len(page.all("#messages .error")[-1].text) > 20
    page["schema"].clear()
    page.ask("Hello!")
    assert page.answer().text and len(page.all("#messages .error")) == 2


@needs_browser
def test_a_long_answer_can_be_stopped(page, http):
    page["schema"].send_keys('{"type": "string", "minLength": 2000}')  # it does not end by itself
    page.driver.execute_script("document.getElementById('max_tokens').value = 900")
    page.ask("Tell me everything")
    page.until(lambda: page["stop-button"].is_displayed() and page.all(".running .text")[0].text)
    page["stop-button"].click()
    page.answer()
    assert "stopped" in page.all(".message.assistant .meta")[-1].text
    page.until(page["send"].is_displayed)
    page.until(lambda: http.get("/playground/view").json()["num_running"] == 0)


@needs_browser
def test_light_and_dark_and_a_phone(page):
    def background():
        return page.driver.execute_script("return getComputedStyle(document.body).backgroundColor")

    before = background()
    page["theme"].click()
    assert background() != before
    page.open()
    assert background() != before  # it is remembered
    page["theme"].click()
    size = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
    page.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        page.open()
        for view, visible in [("chat", "input"), ("engine", "blocks"), ("settings", "temperature")]:
            page.all(f"nav [data-show={view}]")[0].click()
            assert page[visible].is_displayed()
            assert sum(page[name].is_displayed() for name in ("chat", "engine", "settings")) == 1
            assert page.driver.execute_script("return document.documentElement.scrollWidth") <= 390
    finally:
        page.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
