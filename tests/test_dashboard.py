"""The page at GET /, in a real browser: headless Chromium, driven as a person would use it."""

import base64
import contextlib
import hashlib
import http.client
import re
import signal
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from conftest import require_tools, wait_until
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from counter import __version__

SWITCHES = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-dev-shm-usage",
    "--host-resolver-rules=MAP evil.example 127.0.0.1",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
# Scripts that return what is wrong with the elements that a selector finds.
CUT = """return [...document.querySelectorAll(arguments[0])]
    .filter(element => element.clientWidth && element.scrollWidth > element.clientWidth + 1)
    .map(element => element.outerHTML)"""
OVERLAPPING = """
    const boxes = [...document.querySelectorAll(arguments[0])].filter(element => element.checkVisibility())
        .map(element => [element.outerHTML, element.getBoundingClientRect()]);
    const overlap = (a, b) =>
        a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 1 && b.top < a.bottom - 1;
    return boxes.flatMap(([html, box], i) =>
        boxes.slice(i + 1).filter(([_, other]) => overlap(box, other)).map(([other, _]) => [html, other]))"""
BROKEN = """return [...document.querySelectorAll(arguments[0])].filter(element => {
        const range = document.createRange();
        range.selectNodeContents(element);
        return new Set([...range.getClientRects()].map(box => box.top)).size > 1;
    }).map(element => element.outerHTML)"""
PHONE, DESKTOP = (390, 844), (1280, 800)
PREFIX = "/counters"  # under which the proxy shows its node


class Proxy(ThreadingHTTPServer):
    """A proxy before a node, which it shows under PREFIX; on demand it swallows answers."""

    daemon_threads = True
    request_queue_size = 100

    def __init__(self, node):
        super().__init__(("127.0.0.1", 0), ProxiedRequest)
        self.node, self.swallows = node, False  # whether answers to a POST get lost
        self.address = f"127.0.0.1:{self.server_address[1]}{PREFIX}"
        self._thread = threading.Thread(target=self.serve_forever, args=(0.05,), name="proxy")
        self._thread.start()

    def close(self):
        self.shutdown()
        self._thread.join()
        self.server_close()

    def handle_error(self, *_):
        pass  # the browser went on to another page


class ProxiedRequest(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 10

    def do_GET(self):
        if not self.path.startswith(f"{PREFIX}/"):
            self.send_error(404)
            return
        answer = self.server.node.ask(self.command, self.path.removeprefix(PREFIX), headers=dict(self.headers))
        if self.command == "POST" and self.server.swallows:
            self.close_connection = True
            return
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            if name.lower() not in ("date", "server"):
                self.send_header(name, value)
        self.end_headers()
        self.wfile.write(answer.body)

    do_POST = do_GET

    def log_message(self, *_):
        pass


@pytest.fixture
def start_proxy():
    """Start proxies by calling it with a node."""
    with contextlib.ExitStack() as stack:

        def start(node):
            return stack.enter_context(contextlib.closing(Proxy(node)))

        yield start


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    require_tools("chromium", "chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = "/usr/bin/chromium"
    for switch in (*SWITCHES, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(switch)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service("/usr/bin/chromedriver"))
    yield driver
    driver.quit()


class Page:
    """What a person sees of the dashboard, and does with it."""

    def __init__(self, driver):
        self.driver = driver

    def open(self, node, hash=""):
        self.driver.get("about:blank")  # another hash alone would not load it anew
        self.driver.get(f"http://{node.address}/{hash}")
        wait_until(lambda: self.text("live") == "live")

    def element(self, id):
        return self.driver.find_element(By.ID, id)

    def text(self, id):
        return self.element(id).text

    def said(self):
        """Return what a screen reader was told last."""
        return self.element("say").get_attribute("textContent")

    def table(self, id):
        """Return the rows of a table's body, each a list of its cells' texts."""
        cells = "row => [...row.cells].map(cell => cell.innerText)"
        return self.driver.execute_script(f"return [...document.querySelectorAll('#{id} tr')].map({cells})")

    def counters(self):
        """Return {name: count as text} of the counters listed."""
        return {name: count for name, count, _ in self.table("rows")}

    def button(self, label):
        return self.driver.find_element(By.CSS_SELECTOR, f'button[aria-label="{label}"]')

    def search(self, text):
        self.element("search").send_keys(Keys.CONTROL, "a")
        self.element("search").send_keys(text or Keys.DELETE)

    def resize(self, width, height, scheme="light"):
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    def errors(self):
        """Return what the console says, all of it, since this was asked last."""
        return [entry["message"] for entry in self.driver.get_log("browser")]


@pytest.fixture
def page(driver, start_node):
    """A page at desktop width, left before its node ends.  After every test the console must be empty."""
    page = Page(driver)
    page.errors()
    page.resize(*DESKTOP)
    yield page
    driver.get("about:blank")
    assert page.errors() == []


def test_only_the_page_itself_may_run(start_node):
    """The policy allows exactly the script and style in the file, and requests to its node."""
    answer = start_node().ask("GET", "/")
    assert (answer.status, answer.headers["Content-Type"]) == (200, "text/html; charset=utf-8")
    policy = dict(part.split(" ", 1) for part in answer.headers["Content-Security-Policy"].split("; "))
    for tag in ("script", "style"):
        inline = re.findall(rf"<{tag}[^>]*>(.*?)</{tag}>".encode(), answer.body, re.DOTALL)
        hashes = [f"'sha256-{base64.b64encode(hashlib.sha256(text).digest()).decode()}'" for text in inline]
        assert policy[f"{tag}-src"].split() == hashes != []
    assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == policy["form-action"] == "'none'"
    assert policy["connect-src"] == "'self'"
    assert not re.search(rb'\b(src|href)="(?!data:|[a-z]+")', answer.body)
    assert answer.headers["X-Content-Type-Options"] == "nosniff"


def test_the_count_goes_up(page, start_node):
    """By the large button and by the one beside a name; a screen reader is told the result."""
    node = start_node()
    node.increment("/increment/visits?amount=1233")
    page.open(node)
    assert page.text("count") == "0"
    page.element("plus").click()
    wait_until(lambda: page.text("count") == "1" and page.said() == "default is 1")
    page.button("+1 to visits").click()
    wait_until(lambda: page.counters() == {"default": "1", "visits": "1,234"})
    assert page.said() == "visits is 1,234"
    assert (node.count(), node.count("visits")) == (1, 1234)


def asked_for(node, route):
    """Return how many requests to a route a node has answered."""
    text = node.ask("GET", "/metrics").body.decode()
    found = re.search(rf'requests_total\{{route="{route}",status="200"\}} (\d+)', text)
    return int(found[1]) if found else 0


def watchers(node):
    return int(re.search(r"counter_watchers (\d+)", node.ask("GET", "/metrics").body.decode())[1])


def test_the_count_is_watched_and_not_asked_for(page, start_cluster):
    """What is counted elsewhere is seen by a stream; another name has another one."""
    one, two = start_cluster(2)
    page.open(one)
    wait_until(lambda: watchers(one) == 1)
    before = asked_for(one, "/count")
    for count in range(1, 4):
        two.increment()
        wait_until(lambda count=count: page.text("count") == str(count))
    assert asked_for(one, "/count") == before
    two.increment("/increment/other?amount=7")
    page.driver.execute_script("location.hash = 'other'")
    wait_until(lambda: page.text("count") == "7" and watchers(one) == 1)
    two.increment("/increment/other?amount=-8")
    wait_until(lambda: page.text("count") == "-1")


def test_where_no_stream_comes_through_the_page_asks(page, start_node, start_proxy):
    """As behind a proxy that waits for the end of an answer before it passes it on."""
    node = start_node()
    page.open(start_proxy(node))
    for count in range(1, 4):
        node.increment()
        wait_until(lambda count=count: page.text("count") == str(count))
    assert watchers(node) <= 1
    assert asked_for(node, "/count") >= 3


def test_the_page_works_behind_a_proxy_under_a_path_of_its_own(page, start_node, start_proxy):
    """All its requests and links stay under that path."""
    node = start_node()
    node.increment("/increment/visits")
    page.open(start_proxy(node))
    page.element("plus").click()
    wait_until(lambda: page.text("count") == "1" and page.counters() == {"default": "1", "visits": "1"})
    assert page.text("self-id") == node.get("/peers")["self"]["id"]
    for link in page.driver.find_elements(By.CSS_SELECTOR, ".links a"):
        assert f"{PREFIX}/{link.text.lower().replace('readiness', 'readyz')}" in link.get_attribute("href")


def test_an_increment_without_an_answer_is_sent_again_until_there_is_one(page, start_node, start_proxy):
    """Always with the same key, so it counts once, however many answers are lost."""
    node = start_node()
    proxy = start_proxy(node)
    page.resize(*PHONE)
    page.open(proxy)
    proxy.swallows = True
    page.element("plus").click()
    wait_until(lambda: page.text("refused").startswith("No answer yet for +1 to default; sending it again"))
    wait_until(lambda: node.get("/counts")["counts"] == {"default": 1})
    proxy.swallows = False
    wait_until(lambda: page.said() == "default is 1")
    assert not page.element("refused").is_displayed()
    assert (node.count(), page.text("count")) == (1, "1")
    assert all("net::ERR_" in message for message in page.errors())


def test_increments_wait_for_a_node_that_is_away(page, start_cluster, start_node):
    """Each is counted once when the node is back."""
    one, two = start_cluster(2)
    page.open(one)
    one.kill()
    for _ in range(3):
        page.element("plus").click()
    wait_until(lambda: page.text("refused").startswith("No answer yet for 3 increments; sending them again"))
    start_node(port=one.port, peers=[two])
    wait_until(lambda: page.text("count") == "3" and not page.element("refused").is_displayed())
    assert two.count() == 3
    assert all("net::ERR_" in message for message in page.errors())


def test_a_name_is_shown_large(page, start_node):
    """One chosen from the list, or named in the address after #, is shown with its rate."""
    node = start_node()
    for path in ("/increment/a?amount=7", "/increment/b?amount=-9007199254740991", "/increment/b?amount=-9"):
        node.increment(path)
    page.open(node, "#a")
    assert (page.text("name"), page.text("count")) == ("a", "7")
    wait_until(lambda: len(page.counters()) == 2)
    page.driver.find_elements(By.CSS_SELECTOR, ".pick")[1].click()
    wait_until(lambda: page.text("name") == "b" and page.text("count") == "-9,007,199,254,741,000")
    assert page.driver.current_url.endswith("/#b")
    wait_until(lambda: page.text("rate") == "0/s")
    node.increment("/increment/b?amount=100")
    wait_until(lambda: page.text("peak").startswith("peak ") and page.text("peak") != "peak 0/s")
    assert "at most" in page.element("plot").get_attribute("aria-label")


def test_of_a_windowed_counter_the_chart_has_the_counts_of_windows(page, start_node):
    """A bar for each window that is kept, up to 60; another counter has its rate again."""
    node = start_node()
    node.increment("/increment/plain?amount=7")
    page.open(node, "#seen@1d:29")
    page.button("+1 to seen@1d:29").click()
    node.increment("/increment/seen@1d:29?amount=4")
    wait_until(lambda: page.text("count") == "5" and page.text("rate") == "5 in 30 windows")
    assert (page.text("charted"), page.text("peak")) == ("Per 1d", "peak 5")
    area = page.driver.find_element(By.CSS_SELECTOR, "#plot .area").get_attribute("d")
    assert area.count("M") == 30
    assert "5" in page.element("plot").get_attribute("aria-label")
    wait_until(lambda: page.counters() == {"plain": "7", "seen@1d:29": "5"})
    page.search("seen@")
    wait_until(lambda: list(page.counters()) == ["seen@1d:29"])
    page.search("new@1h")
    wait_until(lambda: page.counters() == {"new@1h": "0"})
    page.button("+1 to new@1h").click()
    wait_until(lambda: page.counters() == {"new@1h": "1"})
    page.search("plain")
    wait_until(lambda: list(page.counters()) == ["plain"])
    page.driver.find_elements(By.CSS_SELECTOR, ".pick")[0].click()
    wait_until(lambda: page.text("charted") == "Rate" and page.text("rate") == "0/s")


def test_the_cluster_is_shown(page, start_cluster):
    """Increments at another node, peers with their state, and this node's own id and address."""
    one, two, three = start_cluster(3)
    page.open(one)
    two.increment("/increment?amount=42")
    wait_until(lambda: page.text("count") == "42")
    addresses = sorted([two.address, three.address])
    wait_until(lambda: [row[:2] for row in page.table("peer-rows")] == [[address, "active"] for address in addresses])
    assert page.text("summary") == "2 active"
    about = one.get("/peers")["self"]
    assert (page.text("self-address"), page.text("self-id")) == (one.address, about["id"])
    assert page.text("version") == about["version"]
    wait_until(lambda: re.fullmatch(r"\d+ s", page.text("uptime")))
    three.kill()
    one.increment()
    wait_until(lambda: [row[1] for row in page.table("peer-rows") if row[0] == three.address] == ["lost"])
    assert [row[3:] for row in page.table("peer-rows") if row[0] == three.address] == [["1", __version__]]
    assert page.text("summary") == "1 active, 1 lost"
    assert page.said() == f"Peer {three.address} is lost"


def test_a_data_file_is_shown_and_that_it_fails(page, start_node, tmp_path):
    """Without one there is no line about it."""
    page.open(start_node())
    wait_until(lambda: page.text("version") == __version__)
    assert not page.element("data").is_displayed()
    folder = tmp_path / "volume"
    folder.mkdir()
    node = start_node("--data", folder / "counter.db")
    page.open(node)
    wait_until(lambda: page.text("data") == "saved")
    folder.rename(tmp_path / "unmounted")
    node.increment()
    wait_until(lambda: page.text("data").startswith("failing: "))
    assert page.text("data").endswith("; 1 to save")
    assert page.said() == "The data file fails"
    (tmp_path / "unmounted").rename(folder)
    wait_until(lambda: page.text("data") == "saved", 30)
    assert page.said() == "The data file works again"


def test_the_page_recovers_when_its_node_is_back(page, start_cluster, start_node):
    """It says that the node is gone, and goes on by itself when it is back."""
    one, two = start_cluster(2)
    one.increment()
    wait_until(lambda: two.count() == 1)
    page.open(one)
    wait_until(lambda: page.text("count") == "1")
    id = wait_until(lambda: page.text("self-id"))
    one.kill()
    wait_until(lambda: page.text("live") == "not answering" and page.element("gone").is_displayed())
    assert page.said() == "This node does not answer"
    two.increment()
    start_node(port=one.port, peers=[two])
    wait_until(lambda: page.text("live") == "live" and not page.element("gone").is_displayed())
    assert page.said() == "This node answers again"
    wait_until(lambda: page.text("count") == "2" and page.text("self-id") != id)
    # The browser itself reports every failed request.
    assert all("net::ERR_" in message for message in page.errors())


def test_thousands_of_counters_are_searched_and_turned_over(page, start_node):
    """The node sends a page at a time; a name that does not exist yet can be created."""
    node = start_node()
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", node.port, timeout=10)) as connection:
        for i in range(5000):
            connection.request("POST", f"/increment/user:{i:04}")
            connection.getresponse().read()
    page.open(node)
    first = [f"user:{i:04}" for i in range(20)]
    wait_until(lambda: list(page.counters()) == first)
    page.element("next").click()
    wait_until(lambda: list(page.counters()) == [f"user:{i:04}" for i in range(20, 40)])
    assert page.text("page") == "page 2"
    assert page.said() == "Page 2, from user:0020 to user:0039"
    page.element("previous").click()
    wait_until(lambda: list(page.counters()) == first)
    page.search("user:499")
    wait_until(lambda: list(page.counters()) == [f"user:{i}" for i in range(4990, 5000)])
    assert not page.element("pager").is_displayed()
    page.search("new")
    wait_until(lambda: page.counters() == {"new": "0"})
    wait_until(lambda: page.text("note") == page.said() == "There is no new yet; +1 creates it.")
    page.button("+1 to new").click()
    wait_until(lambda: page.counters() == {"new": "1"} and not page.text("note"))
    page.search("constructor")  # which every object of JavaScript has
    wait_until(lambda: page.counters() == {"constructor": "0"})
    page.search("no/name")
    wait_until(lambda: page.element("search").get_attribute("aria-invalid") == "true")


def test_pages_are_turned_one_by_one_however_fast(page, start_node):
    """A click before the last one was answered is ignored, and the focus stays on the button."""
    node = start_node()
    for i in range(41):
        node.increment(f"/increment/c{i:02}")
    page.open(node)
    wait_until(lambda: len(page.counters()) == 20)
    page.driver.execute_script("const next = document.getElementById('next'); next.focus(); next.click(); next.click()")
    wait_until(lambda: next(iter(page.counters())) == "c20")
    assert page.text("page") == "page 2"
    page.driver.switch_to.active_element.send_keys(Keys.ENTER)
    wait_until(lambda: list(page.counters()) == ["c40"])
    assert page.text("page") == "page 3"
    assert page.driver.switch_to.active_element == page.element("next")
    page.driver.switch_to.active_element.send_keys(Keys.ENTER)  # there is no further one
    page.element("previous").click()
    wait_until(lambda: next(iter(page.counters())) == "c20")


def test_what_was_not_counted_is_said_where_it_is_seen(page, start_node):
    """For long enough to read it, or until an increment succeeds."""
    node = start_node("--max-counters", "1")
    node.increment("/increment/a")
    page.resize(*PHONE)
    page.open(node, "#b")
    page.element("plus").click()
    wait_until(lambda: page.text("refused").startswith("b was not counted: this node has --max-counters"))
    assert page.said() == page.text("refused")
    box, height = page.element("refused").rect, page.driver.execute_script("return innerHeight")
    assert 0 <= box["y"] < box["y"] + box["height"] <= height
    page.button("+1 to a").click()
    wait_until(lambda: not page.element("refused").is_displayed())
    assert page.counters()["a"] == "2"
    assert all("507" in message for message in page.errors())  # the browser itself reports that answer


def test_everything_can_be_reached_by_keyboard(page, start_node):
    """In the order shown, each with a name that says what it does; the focus stays."""
    node = start_node()
    node.increment("/increment/visits")
    page.open(node)
    wait_until(page.counters)
    reached = []
    for _ in range(8):
        page.driver.switch_to.active_element.send_keys(Keys.TAB)
        reached.append(page.driver.switch_to.active_element.accessible_name)
    assert reached == [
        "+1 to default",
        "Show counters whose name begins with",
        "visits",
        "+1 to visits",
        "Counts",
        "Peers",
        "Metrics",
        "Readiness",
    ]
    button = page.button("+1 to visits")
    page.driver.execute_script("arguments[0].focus()", button)
    for count in ("2", "3"):
        page.driver.switch_to.active_element.send_keys(Keys.ENTER)
        wait_until(lambda count=count: page.counters()["visits"] == count)
    node.increment("/increment/a-new-one")
    wait_until(lambda: len(page.counters()) == 2)
    assert page.driver.switch_to.active_element == button


def test_a_hidden_page_asks_nothing(page, start_node):
    """A hidden tab sends no requests, and goes on when it is seen again."""
    node = start_node()
    page.open(node)
    seen = page.driver.current_window_handle
    page.driver.switch_to.new_window("tab")
    try:

        def asked():
            return asked_for(node, "/counts")

        before, since = asked(), time.monotonic()
        wait_until(lambda: time.monotonic() > since + 2.5)
        assert asked() <= before + 1  # which was under way
        assert watchers(node) == 0
    finally:
        page.driver.close()
        page.driver.switch_to.window(seen)
    wait_until(lambda: asked() > before + 1)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [PHONE, DESKTOP], ids=["phone", "desktop"])
def test_nothing_is_cut_and_nothing_overlaps(page, start_node, size, scheme):
    """On a phone and on a desktop, light and dark, with the longest names and counts."""
    node = start_node()
    for host in ("counter-0.counter-nodes.default.svc.cluster.local", "[2001:db8:1234:5678:9abc:def0:1234:5678]"):
        start_node("--advertise", f"{host}:8080", peers=[node])
    for name in ["W" * 128] * 120 + [f"checkout.completed.{i}" for i in range(20)]:
        node.increment(f"/increment/{name}?amount=-9007199254740991")
    page.resize(*size, scheme)
    page.open(node, f"#{'W' * 128}")
    wait_until(lambda: len(page.counters()) >= 10 and page.text("count") == "-1,080,863,910,568,918,920")
    wait_until(lambda: len(page.table("peer-rows")) == 2)
    sees = page.driver.execute_script
    assert sees("return matchMedia('(prefers-color-scheme: dark)').matches") == (scheme == "dark")
    assert sees("return document.documentElement.scrollWidth <= innerWidth")
    shown = ":is(h1, h2, p, span, th, td, dt, dd, button, input, a):not(.unseen, .unseen *, [hidden] *)"
    assert sees(CUT, shown) == []
    assert sees(OVERLAPPING, "#count, #name, #plus, #rate, #plot, #peers :is(td, th), #rows :is(td, th), dd, dt") == []
    if size == DESKTOP:  # a phone breaks the longest numbers
        assert sees(BROKEN, "#rows td:nth-child(2), dd") == []


def test_a_page_asks_for_a_token_and_keeps_it_for_the_tab(page, start_node, tmp_path):
    """It is sent with every request, outlives a reload, and is forgotten where the person or the node says so."""
    file = tmp_path / "tokens"
    file.touch(0o600)
    file.write_text("read just+looking\nwrite all~of/it=\n")
    node = start_node("--token-file", file)

    def asks(why):
        wait_until(lambda: page.text("live") == "asks for a token" and page.text("asking-why") == why)
        assert not page.element("gone").is_displayed()

    def show(token):
        page.element("token").send_keys(token, Keys.ENTER)

    page.driver.get(f"http://{node.address}/")
    asks("This node asks for a token.")
    assert page.said() == "This node asks for a token."
    show("wrong")
    asks("This node does not know that token, or no longer.")
    show("no token at all")  # which the browser does not take
    show(Keys.CONTROL + "a" + Keys.NULL + "just+looking")
    wait_until(lambda: page.text("live") == "live" and page.text("count") == "0")
    assert not page.element("asking").is_displayed()
    assert not page.element("links").is_displayed()
    page.element("plus").click()
    wait_until(lambda: page.text("refused") == "default was not counted: this token may only read")
    page.element("forget").click()
    asks("This node asks for a token.")
    show("all~of/it=")
    wait_until(lambda: page.text("live") == "live")
    page.element("plus").click()
    wait_until(lambda: page.text("count") == "1")
    page.driver.refresh()
    wait_until(lambda: page.text("live") == "live" and page.text("count") == "1")
    file.write_text("read just+looking\n")
    node.send_signal(signal.SIGHUP)
    asks("This node does not know that token, or no longer.")
    assert all(" 401 " in message or " 403 " in message for message in page.errors())
    page.driver.execute_script("sessionStorage.clear()")


def test_a_page_whose_name_comes_to_mean_this_machine_gets_nothing(page, start_node):
    """Its origin is that of the node, so the browser lets it ask; the node does not answer by that name."""
    node = start_node()
    node.increment("/increment/private")
    page.driver.get(f"http://evil.example:{node.port}/counts")
    assert "private" not in page.driver.page_source
    statuses = page.driver.execute_async_script("""
        const [done] = arguments, requests = {"/counts": "GET", "/increment": "POST", "/internal/gossip": "POST"};
        const status = ([path, method]) => fetch(path, {method}).then(answer => answer.status);
        Promise.all(Object.entries(requests).map(status)).then(done)""")
    assert statuses == [421, 421, 421]
    assert node.get("/counts")["counts"] == {"private": 1}
    assert len(page.errors()) >= 3  # the browser's complaints of these answers
