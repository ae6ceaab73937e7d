// The console page in a real browser: node .ci/console.mjs [directory for screenshots]
// Wants Debian's chromium, and npm for playwright-core and axe-core; without them it skips. Exits 1 if a check fails.
import {execFileSync, spawn} from "node:child_process";
import {mkdtempSync, readFileSync, rmSync, writeFileSync} from "node:fs";
import {createRequire} from "node:module";
import {tmpdir} from "node:os";
import {join, resolve} from "node:path";

const shots = process.argv[2];
const work = mkdtempSync(join(tmpdir(), "console-"));
const chromium = process.env.CHROMIUM || "/usr/bin/chromium";
let server, browser, failed = 0;

function check(name, good, seen = "") {
  console.log(`${name}: ${good ? "ok" : "FAILED " + JSON.stringify(seen)}`);
  failed += !good;
}

async function until(what, seconds = 15) {
  for (const end = Date.now() + 1000 * seconds; Date.now() < end; await new Promise(done => setTimeout(done, 100))) {
    if (await what()) return true;
  }
  return false;
}

const MODULE = `
import time, httpd

def nap(seconds: float = 3.0):
    """Sleeps in a thread."""
    time.sleep(seconds)
    return {"slept": seconds}

def sums(first: int, second: int = 2):
    """Adds <b>two</b> numbers."""
    return [first + second, "<script>alert(1)</script>"]

def work(request, page):
    if request.query == "fail":
        raise httpd.HTTPError(404, "nothing")
    page.write("x" * 999)

def mod_init(params):
    httpd.register_mi("nap", nap, threads=True)
    httpd.register_mi("sums", sums)
    httpd.register_httpdcb("tried", "tried", work)
`;

async function start() {
  writeFileSync(join(work, "tried.py"), MODULE);
  writeFileSync(join(work, "test.cfg"), `[httpd]\nip = 127.0.0.1\nport = 0\nauth_realm = "<b>realm</b>"
[mi_html]\n[mi_http]\n[prometheus]\n[tried]\n`);
  server = spawn("python3", ["httpd.py", join(work, "test.cfg")], {stdio: ["ignore", "pipe", "inherit"]});
  return await new Promise((done, fail) => {
    server.stdout.on("data", data => { const found = /http:\S+/.exec(data); if (found) done(found[0] + "/"); });
    server.on("exit", () => fail(new Error("httpd.py has ended")));
  });
}

async function open(url, options) {
  const context = await browser.newContext(options);
  const page = await context.newPage(), complaints = [], strangers = [];
  page.on("console", message => { if (["error", "warning"].includes(message.type())) complaints.push(message.text()); });
  page.on("pageerror", error => complaints.push(String(error)));
  page.on("request", request => { if (!request.url().startsWith(url) && !request.url().startsWith("data:")) strangers.push(request.url()); });
  await page.goto(url);
  return {context, page, complaints, strangers};
}

async function checkAll(url, axe) {
  const {context, page, complaints, strangers} = await open(url, {viewport: {width: 1200, height: 900}});
  check("the page is opened", (await page.title()).startsWith("httpd.py"), await page.title());
  check("it is live", await until(async () => await page.textContent("#state") === "live"), await page.textContent("#state"));
  const before = await page.getAttribute("#line-rate", "d");
  for (let n = 0; n < 40; n++) await fetch(`${url}tried?${n % 8 ? "" : "fail"}`);
  check("plots move", await until(async () => await page.getAttribute("#line-rate", "d") !== before
    && Number(await page.textContent("#requests")) > 40), await page.textContent("#requests"));
  check("errors are seen", await until(async () => /,(?!40\.0|50)/.test(await page.getAttribute("#line-errors", "d"))),
    await page.getAttribute("#line-errors", "d"));
  const element = name => page.locator(`#c-${name}`);
  await element("sums").locator("summary").focus();
  await page.keyboard.press("Enter");
  await page.keyboard.press("Tab");
  await page.keyboard.type("40");
  await page.keyboard.press("Enter");
  const sum = element("sums").locator("output");
  check("a command is run by keyboard, its answer read", await until(async () => (await sum.textContent()).startsWith("[\n  42,")),
    await sum.textContent());
  check("the answer is text", await page.locator("output script").count() === 0);
  await element("nap").locator("summary").click();
  await element("nap").locator("button").click();
  const button = element("nap").locator("button"), slept = element("nap").locator("output");
  check("a command of three seconds shows that it runs", await until(async () => /Running, [12] s/.test(await button.textContent())),
    await button.textContent());
  await element("sums").locator("input").last().fill("3");
  await element("sums").locator("button").click();
  check("others run meanwhile", await until(async () => (await sum.textContent()).startsWith("[\n  43,"), 2) && /Running/.test(await button.textContent()),
    await sum.textContent());
  check("and it ends", await until(async () => /"slept": 3/.test(await slept.textContent())) && await button.textContent() === "Run",
    await slept.textContent());
  for (const scheme of ["light", "dark"]) {
    for (const width of [1200, 400]) {
      await page.emulateMedia({colorScheme: scheme});
      await page.setViewportSize({width, height: 900});
      await page.waitForTimeout(200);
      const wide = await page.evaluate(() => document.documentElement.scrollWidth);
      check(`fits into ${width} pixels, ${scheme}`, wide <= width, wide);
      const {passes, violations} = await page.evaluate(axe + "; axe.run()");
      check(`axe-core, ${width} pixels, ${scheme}`, passes.length > 20 && violations.length === 0, violations.map(v => [v.id, v.nodes[0].html, v.nodes[0].failureSummary]));
      if (shots) await page.screenshot({path: join(shots, `${scheme}-${width}.png`), fullPage: true});
    }
  }
  check("no console error", complaints.length === 0, complaints);
  check("no request to elsewhere", strangers.length === 0, strangers);
  await context.close();
}

async function checkWithoutScript(url) {
  const {context, page, complaints} = await open(url, {javaScriptEnabled: false});
  const text = await page.textContent("main");
  const wanted = ["/tried", "httpd.memory_budget", "4194304", "test.cfg:4", "<b>realm</b>", "get_statistics", "Sleeps in a thread"];
  check("JavaScript off: what is read is there", wanted.every(word => text.includes(word)), wanted.filter(word => !text.includes(word)));
  check("JavaScript off: plots are drawn", (await page.getAttribute("#line-rate", "d")).startsWith("M"));
  await page.locator("#c-sums summary").click();
  await page.locator("#c-sums input[required]").fill("5");
  await page.locator("#c-sums button").click();
  const answer = await page.locator("#c-sums output").textContent();
  check("JavaScript off: a command's answer comes with the page", answer.startsWith("[\n  7,"), answer);
  check("JavaScript off: no console error", complaints.length === 0, complaints);
  await context.close();
}

try {
  let playwright, axe;
  try {
    execFileSync(chromium, ["--version"], {stdio: "ignore"});
    execFileSync("npm", ["install", "--silent", "--no-audit", "--no-fund", "--prefix", work, "playwright-core", "axe-core"], {stdio: "ignore"});
    playwright = createRequire(join(work, "package.json"))("playwright-core");
    axe = readFileSync(join(work, "node_modules/axe-core/axe.min.js"), "utf8");
  } catch (error) {
    console.log(`skipped: chromium or npm is not to be had (${error.message.split("\n")[0]})`);
  }
  if (playwright) {
    const url = await start();
    browser = await playwright.chromium.launch({executablePath: resolve(chromium), args: [
      "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update",
      "--disable-sync"]});
    await checkAll(url, axe);
    await checkWithoutScript(url);
  }
} catch (error) {
  check("the run", false, String(error));
} finally {
  if (browser) await browser.close();
  if (server) { server.removeAllListeners("exit"); server.kill("SIGTERM"); }
  rmSync(work, {recursive: true, force: true});
}
process.exit(failed ? 1 : 0);
