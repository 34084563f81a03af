"""The operator's page in a real browser: it shows a running system, and the failures of its parts."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from msgspec import structs

from hbserve import __version__
from hbserve.config import SchedulerConfig, ServerConfig
from hbserve.pd_disagg import DisaggregatedLLM, PdDisaggConfig
from hbserve.server import create_app, live_page, serve
from hbserve.server.fair_gate import FairGate
from hbserve.server.guard import Guard
from hbserve.server.keys import Keys
from tests.support.paths import ROOT
from tests.support.scripted_scheduler import DEADLINE_S

DEMO_MODEL = ROOT / "examples" / "models" / "hbserve-demo"
KEY, ADMIN = "sk-user-12345", "sk-admin-12345"


class System:
    """A running system and its server."""

    llm: DisaggregatedLLM
    url: str
    stop: asyncio.Event


@pytest.fixture
async def system(request: pytest.FixtureRequest) -> AsyncIterator[System]:
    system = System()
    mode = getattr(request, "param", "disaggregated")
    roles = {"prefill-0": "prefill", "decode-0": "decode", "decode-1": "decode"}
    workers: list[dict[str, Any]] = [
        {"instance_id": name, "instance_type": role, "num_threads": 1} for name, role in roles.items()
    ]
    config = PdDisaggConfig.from_arguments(
        str(DEMO_MODEL),
        mode=mode,
        device="cpu",
        dtype="float32",
        num_blocks=256,
        log_level="ERROR",
        **({"gpu_instances": workers, "host_bytes": 4 << 20} if mode == "disaggregated" else {}),
    )
    async with DisaggregatedLLM(config) as llm:
        system.llm, system.stop = llm, asyncio.Event()
        app = create_app(llm.engine, llm.client, "demo", supervisors=llm.supervisors)
        shown = structs.replace(llm.config, scheduler=SchedulerConfig(ttft_ms=5000.0, tpot_ms=0.001))
        assert llm.running_plan is not None
        if mode == "semi_pd":
            llm.running_plan.plan = structs.replace(llm.running_plan.plan, chosen_by="auto")
        live_page.install(app, shown, llm.running_plan, llm.engine, llm.client, FairGate(), None, system.stop)
        guard = Guard(app, ServerConfig(), Keys({KEY: "user"}, ADMIN), FairGate(), system.stop)
        listening: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        serving = asyncio.create_task(serve(guard, ServerConfig(port=0), system.stop, listening.set_result, 1))
        system.url = f"http://127.0.0.1:{await asyncio.wait_for(listening, DEADLINE_S)}"
        yield system
        system.stop.set()
        await asyncio.wait_for(serving, DEADLINE_S)


@pytest.fixture
async def page() -> AsyncIterator[Any]:
    playwright = pytest.importorskip("playwright.async_api", reason="playwright is not installed")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("chromium is not installed: scripts/install_debian_packages.sh --browser")
    async with playwright.async_playwright() as driver:
        browser = await driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = await browser.new_page(viewport={"width": 390, "height": 844})  # a phone
        page.set_default_timeout(DEADLINE_S * 1000)
        yield page
        await browser.close()


async def ask(url: str) -> None:
    messages = [{"role": "user", "content": "Remember: dog parrot, eagle maple. " * 12 + "Count from 3 to 9."}]
    async with httpx.AsyncClient(base_url=url, timeout=DEADLINE_S, headers={"Authorization": f"Bearer {KEY}"}) as http:
        answer = await http.post("/v1/chat/completions", json={"model": "demo", "messages": messages})
        assert answer.status_code == 200, answer.text


BEGIN_OF_BARS = "track => parseFloat(track.querySelector('i')?.style.left.match(/[0-9.]+/)[0] ?? '0')"
CUT_OFF = """[...document.querySelectorAll('.tile *, header *, .card *, .events *, .requests *')].filter(
    (element) => element.clientWidth && element.scrollWidth > element.clientWidth + 1
).map((element) => element.outerHTML)"""


async def files(system: System) -> None:
    async with httpx.AsyncClient(base_url=system.url, timeout=DEADLINE_S) as http:
        page = await http.get("/")
        assert page.status_code == 200
        assert "default-src 'self'" in page.headers["Content-Security-Policy"]
        for name in ("app.js", "charts.js", "style.css", "icon.svg", "vendor/uPlot.min.js", "vendor/uPlot.min.css"):
            assert (await http.get(f"/page/{name}")).status_code == 200
        for name in (
            "../live_page.py",
            "%2e%2e/live_page.py",
            "nothing",
            "..%2f..%2fconfig.py",
            "",
            "app.js%00",
            "a" * 5000,
        ):
            assert (await http.get(f"/page/{name}")).status_code in (401, 404)
        assert (await http.get("/live")).status_code == 401
        assert (await http.post("/admin/drain")).status_code == 401


async def check_data(system: System) -> None:
    async with httpx.AsyncClient(base_url=system.url, timeout=DEADLINE_S) as http:
        data = (await http.get("/live", headers={"Authorization": f"Bearer {KEY}"})).json()
        [request] = data["stats"]["recent"]["requests"]
        assert request["success"] is True
        times = [request[name] for name in ("arrived", "admitted", "prefilled", "decode_began", "ended")]
        assert times == sorted(times, reverse=True)
        assert len(request["chunks"]) >= 1
        assert [event["kind"] for event in data["stats"]["recent"]["events"]] == ["ready"] * 3


async def test_page(system: System, page: Any) -> None:
    await files(system)
    problems: list[str] = []
    asked: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    await page.goto(system.url)

    # The page asks for the key, and then shows the system. What has not been measured is no number.
    await page.get_by_label("Key", exact=True).fill(KEY)
    await page.keyboard.press("Enter")
    await page.locator("#status.ready").wait_for()
    header = await page.locator("body > header").inner_text()
    assert all(word in header for word in ("demo", "disaggregated", "as configured", f"HBServe {__version__}"))
    assert await page.locator(".card").count() == 3
    assert await page.locator(".u-wrap").count() == 5
    assert await page.locator("#shares-title").inner_text() == "Busy share"
    assert "host" in await page.locator("#tiers tbody tr").inner_text()
    for name in ("TTFT", "TPOT"):
        assert await page.locator(".tile", has_text=name).locator(".value").inner_text() == "–"
    assert await page.locator(".tile.late").count() == 0

    # A request's timeline, opened by keyboard. All requests lie on one axis.
    await ask(system.url)
    await check_data(system)
    row = page.locator("#requests button").first
    await row.wait_for()
    for phase in ("prefill", "transfer", "decode"):
        await row.locator(f".track .{phase}").wait_for(state="attached")
    await page.keyboard.press("j")
    await page.keyboard.press("Enter")
    details = page.locator(".details")
    await details.get_by_text("TTFT").wait_for()
    assert "TPOT" in await details.inner_text()
    await page.locator(".tile.late", has_text="target 0 ms").wait_for()  # TPOT; TTFT keeps its target
    assert await page.locator(".tile.late").count() == 1
    await ask(system.url)
    await page.locator("#requests button").nth(1).wait_for()
    begins = [await page.locator("#requests .track").nth(index).evaluate(BEGIN_OF_BARS) for index in (0, 1)]
    assert begins[0] > begins[1], "the newer request is further right"

    # Nothing is wider than the phone, and no text is cut off.
    assert await page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    assert await page.evaluate(CUT_OFF) == []

    # A worker dies and comes back: the page shows both, and the system goes on.
    pid = system.llm.get_system_stats()["gpu_instances"]["decode-0"]["pid"]
    os.kill(pid, signal.SIGKILL)
    await page.locator("#events .lost").first.wait_for()
    assert "decode-0" in await page.locator("#events .lost").first.inner_text()
    await page.locator("#events li.ready").nth(3).wait_for()

    # So does the scheduler; what the page knew stays, also when it is loaded again.
    os.kill(system.llm.launcher.scheduler.pid, signal.SIGKILL)
    await page.locator("#events .scheduler_lost", has_text="it was killed by SIGKILL").wait_for()
    await page.locator("#events .scheduler_restarted", has_text="scheduler restarted").wait_for()
    await page.locator("#status.ready").wait_for()
    await page.locator("#events .lost").first.wait_for()
    await page.reload()
    await page.locator("#status.ready").wait_for()
    await page.locator("#events .lost").first.wait_for()
    assert "1970" not in await page.content()
    history = await page.evaluate("JSON.parse(sessionStorage.history)")
    assert any(value for value in history["ttft"]["values"]["p95"])

    # Administration needs its own key.
    await page.keyboard.press("Escape")
    await page.keyboard.press("a")
    await page.get_by_label("Admin key").fill(KEY)
    await page.get_by_text("Drain and end").click()
    await page.get_by_text("Refused: this needs the admin key").wait_for()
    assert not system.stop.is_set()
    await page.get_by_label("Admin key").fill(ADMIN)
    await page.locator("#role-instance").select_option("decode-1")
    await page.get_by_text("Change the role").click()
    await page.get_by_text("Done.").wait_for()
    await page.locator("#events .role", has_text="decode-1: decode to prefill").wait_for()
    assert system.llm.get_system_stats()["gpu_instances"]["decode-1"]["role"] == "prefill"
    await page.keyboard.press("Escape")

    # The scheduler has ended: the page shows this and the reason.
    system.llm.client.declare_dead("the scheduler ended with exit code 1")
    await page.locator("#problem").get_by_text("the scheduler ended with exit code 1").wait_for()
    assert "dead" in (await page.locator("#status").get_attribute("class") or "")
    await page.keyboard.press("a")
    await page.get_by_label("Admin key").fill(ADMIN)
    await page.get_by_text("Drain and end").click()
    await asyncio.wait_for(system.stop.wait(), DEADLINE_S)
    assert problems == []
    assert all(url.startswith(system.url) for url in asked)


@pytest.mark.parametrize("system", ["semi_pd"], indirect=True)
async def test_page_changes_the_split_and_shows_the_rotation(system: System, page: Any) -> None:
    await page.goto(system.url)
    await page.get_by_label("Key", exact=True).fill(KEY)
    await page.keyboard.press("Enter")
    await page.locator("#status.ready").wait_for()
    assert await page.locator(".level", has_text="25 %").count() == 0
    assert await page.locator("#shares-title").inner_text() == "Split over time"
    assert not await page.locator("#tiers").is_visible()
    assert await page.locator("#mode").inner_text() == "semi_pd, chosen for this machine"
    await page.keyboard.press("a")
    await page.get_by_label("Admin key").fill(ADMIN)
    await page.get_by_label("Prefill, % of the SMs").fill("75")
    await page.get_by_label("Decode, % of the SMs").fill("25")
    await page.get_by_text("Change the split").click()
    await page.get_by_text("Done.").wait_for()
    await page.keyboard.press("Escape")
    event = page.locator("#events .rotation", has_text="prefill 75 %, decode 25 %")
    await event.wait_for()
    await page.locator(".level", has_text="25 %").wait_for()
    await ask(system.url)
    await page.locator("#requests .track .decode").first.wait_for(state="attached")
    await page.keyboard.press("a")
    assert await page.get_by_label("Prefill, % of the SMs").input_value() == "75"
