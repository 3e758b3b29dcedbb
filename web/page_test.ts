/**
 * Tests of the page in a real Chromium. They are ignored where it is missing.
 *
 * A test waits for what it expects, and fails if that has not come in time; it
 * fails too if the page reports an error.
 */
import { assert, assertEquals, assertMatch } from "@std/assert";
// deno-lint-ignore no-import-prefix -- see deno.json: only this file needs it
import axe from "npm:axe-core@4.14.1";
import {
  type Browser,
  type BrowserContextOptions,
  chromium,
  type Page,
  // deno-lint-ignore no-import-prefix
} from "npm:playwright-core@1.65.1";
import { Report } from "../link/report.ts";
import { type Attachment, ChatServer, type Options } from "../main.ts";
import {
  eventually,
  makeCertificate,
  open,
  Terminal,
  within,
} from "./test_helpers.ts";
import { WebServer } from "./web.ts";

const executablePath = [
  "/usr/bin/chromium",
  "/usr/bin/chromium-browser",
  "/usr/bin/google-chrome",
].find((path) => {
  try {
    return Deno.statSync(path).isFile;
  } catch {
    return false;
  }
});

let browser: Browser;

Deno.test.beforeAll(async () => {
  if (executablePath === undefined) return;
  browser = await chromium.launch({
    executablePath,
    args: ["--no-sandbox", "--disable-gpu", "--disable-background-networking"],
  });
});

Deno.test.afterAll(async () => {
  await browser?.close();
});

/** A test in a browser, which has resources of its own. */
function browserTest(name: string, fn: () => Promise<void>): void {
  Deno.test({
    name,
    fn,
    ignore: executablePath === undefined,
    sanitizeOps: false,
    sanitizeResources: false,
  });
}

/** Someone with a browser. */
class Visitor implements AsyncDisposable {
  readonly errors: string[] = [];

  private constructor(readonly page: Page) {
    page.setDefaultTimeout(10_000);
    page.on("pageerror", (error) => this.errors.push(error.message));
    page.on("console", (message) => {
      // A lost connection is logged by the browser itself.
      const expected = /WebSocket connection to/.test(message.text());
      if (message.type() === "error" && !expected) {
        this.errors.push(message.text());
      }
    });
  }

  static async open(
    url: string,
    options: BrowserContextOptions = {},
  ): Promise<Visitor> {
    const context = await browser.newContext(options);
    const visitor = new Visitor(await context.newPage());
    await visitor.page.goto(url);
    return visitor;
  }

  /** Joins the room. */
  static async join(
    url: string,
    name: string,
    options: BrowserContextOptions = {},
  ): Promise<Visitor> {
    const visitor = await Visitor.open(url, options);
    await visitor.enter(name);
    await visitor.seesPerson(name);
    return visitor;
  }

  /** Joins a raw room. */
  static async openRaw(url: string): Promise<Visitor> {
    const visitor = await Visitor.open(url);
    await visitor.page.click("#name-form button");
    await visitor.page.waitForSelector("#entry", { state: "hidden" });
    return visitor;
  }

  async enter(name: string): Promise<void> {
    await this.page.fill("#name", name);
    await this.page.press("#name", "Enter");
  }

  async say(text: string): Promise<void> {
    await this.page.fill("#text", text);
    await this.page.press("#text", "Enter");
  }

  /** What the log shows, a line each. */
  lines(): Promise<string[]> {
    return this.page.locator("#log .line").allTextContents();
  }

  async sees(pattern: RegExp): Promise<void> {
    await this.page.locator("#log .line", { hasText: pattern }).first()
      .waitFor();
  }

  /** Fills the log with 200 lines of `other`, which are more than fit. */
  async fillLog(other: Terminal): Promise<void> {
    await other.say(...Array.from({ length: 200 }, (_, i) => `line ${i}`));
    await this.sees(/line 199/);
    await this.isAtEnd();
  }

  async scrollUp(): Promise<void> {
    await this.page.locator("#log").evaluate((log) => {
      log.scrollTop = 500;
    });
  }

  /** Comes down by the button that tells of new messages. */
  async comeDown(): Promise<void> {
    await this.page.click("#newer");
    await this.isAtEnd();
    await this.page.waitForSelector("#newer", { state: "hidden" });
  }

  /** The people in the list. */
  people(): Promise<string[]> {
    return this.page.locator("#people li").allTextContents();
  }

  /** Waits until the list has so many people. */
  async seesPeople(count: number): Promise<void> {
    await this.page.waitForSelector(`#people-title:has-text('(${count})')`, {
      state: "attached",
    });
  }

  /** How far the log is from its end, in pixels. */
  distance(): Promise<number> {
    return this.page.locator("#log").evaluate((log) =>
      log.scrollHeight - log.scrollTop - log.clientHeight
    );
  }

  async isAtEnd(): Promise<void> {
    await eventually(async () => await this.distance() < 2, "the end");
  }

  async seesPerson(name: string): Promise<void> {
    await this.page.locator("#people li", { hasText: name }).first()
      .waitFor({ state: "attached" });
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.page.context().close();
    assertEquals(this.errors, []);
  }
}

/** Lets a test add and remove people, as a link to other servers does. */
function attachServers(server: ChatServer): Attachment {
  const ignore = () => {};
  return server.attach({
    said: ignore,
    joined: ignore,
    left: ignore,
    renamed: ignore,
    away: ignore,
    toldPrivately: ignore,
    stopping: () => Promise.resolve(),
  });
}

browserTest("a browser and a terminal talk", async () => {
  await using room = await open();
  await using bob = await Terminal.join(room.server, "bob");
  await using maria = await Visitor.join(room.url, "maria");
  await bob.find(/is now known as maria$/);
  await maria.seesPerson("bob");
  await maria.say("hello from a browser");
  await maria.sees(/hello from a browser/); // its own words
  assertEquals(await bob.find(/hello/), "[maria] hello from a browser");
  await bob.say("hello from a terminal", "/me waves");
  await maria.sees(/^bob.*hello from a terminal$/);
  await maria.sees(/^bob waves$/);
  await maria.say("/me bows");
  await maria.sees(/^maria bows$/);
  assertEquals(await bob.find(/bows/), "** maria bows");
  await maria.say("/usr/bin/env");
  await maria.sees(/\/usr\/bin\/env/);
  assertEquals(await bob.find(/env/), "[maria] /usr/bin/env");
  await maria.say("//who is a command");
  assertEquals(await bob.find(/who/), "[maria] /who is a command");
  await maria.sees(/[^/]\/who is a command/);
});

browserTest(
  "a command behind white space is shown as what the server makes of it",
  async () => {
    await using room = await open({ rate: 0 });
    await using bob = await Terminal.join(room.server, "bob");
    await using maria = await Visitor.join(room.url, "maria");
    await bob.find(/is now known as maria$/);
    // The server removes a character that does not show before a slash.
    const secrets = [
      " /msg bob secret",
      "\t/W bob secret",
      "\u3000/whisper bob secret",
      "\u200b/pm bob secret",
      " \u2060 /tell bob secret",
    ];
    for (const line of secrets) {
      await maria.say(line);
      assertEquals(await bob.find(/secret/), "[maria -> you] secret");
    }
    await maria.say(" /who");
    await maria.sees(/^Here now: .*\(2\)$/);
    await maria.say("  /me  dances ");
    assertEquals(await bob.find(/dances/), "** maria dances");
    await maria.sees(/^maria dances$/);
    await maria.say("/été");
    await maria.sees(/^Unknown command \/été/);
    await maria.say("\u200b/nonsense");
    await maria.sees(/^Unknown command \/nonsense/);
    for (const line of [" /nonsense is text", " //who", "\u200bhello"]) {
      await maria.say(line);
      assertEquals(await bob.next(), `[maria] ${line}`);
    }
    await maria.say("\u200b \u2800"); // shows nothing: the server drops it
    await maria.say("the end");
    assertEquals(await bob.next(), "[maria] the end");
    await maria.sees(/the end/);
    const shown = (selector: string) =>
      maria.page.locator(`#log .own${selector} .text`).allTextContents();
    assertEquals(await shown(".say"), [
      " /nonsense is text",
      " //who",
      "\u200bhello",
      "the end",
    ]);
    assertEquals(
      await maria.page.locator("#log .command .text").allTextContents(),
      ["/who", "/été", "/nonsense"],
    );
    assertEquals(await maria.page.locator("#log .private").count(), 5);
  },
);

browserTest("a piece of a long message is no command", async () => {
  await using room = await open({ rate: 0 });
  await using bob = await Terminal.join(room.server, "bob");
  await using maria = await Visitor.join(room.url, "maria");
  await bob.find(/is now known as maria$/);
  const letters = "y".repeat(4_000), slash = "/" + "z".repeat(5_000) + ".";
  await maria.say(`${letters}  /quit now\n${slash}`);
  assertEquals(await bob.next(), `[maria] ${letters}`);
  assertEquals(await bob.next(), "[maria] /quit now");
  assertEquals(await bob.next(), `[maria] ${slash.slice(0, 4_000)}`);
  assertEquals(await bob.next(), `[maria] ${slash.slice(4_000)}`);
});

browserTest("the page knows every command of the server", async () => {
  await using room = await open({ rate: 0 });
  await using bob = await Terminal.join(room.server, "bob");
  await using maria = await Visitor.join(room.url, "maria");
  await bob.find(/is now known as maria$/);
  await bob.say("/help", "/msg bob the end");
  const names: string[] = [];
  for (let line; !/the end/.test(line = (await bob.next())!);) {
    const name = /^\* \/(\w+)/.exec(line)?.[1];
    if (name) names.push(name);
  }
  assert(names.includes("who"));
  for (const name of [...names]) {
    await bob.say(`/help ${name}`);
    const also = /\(also (.*)\)$/.exec((await bob.find(/^\* \//))!)?.[1];
    names.push(...also?.split(", ").map((it) => it.slice(1)) ?? []);
  }
  const known = await maria.page.evaluate<string[]>("[...KNOWN_COMMANDS]");
  assertEquals(known.sort(), names.sort());
});

browserTest("after /bell on the page rings", async () => {
  await using room = await open({ rate: 0 });
  await using bob = await Terminal.join(room.server, "bob");
  await using maria = await Visitor.join(room.url, "maria");
  await bob.find(/is now known as maria$/);
  await maria.page.evaluate(`
    globalThis.rung = 0;
    const start = OscillatorNode.prototype.start;
    OscillatorNode.prototype.start = function (...when) {
      globalThis.rung++;
      return start.apply(this, when);
    };
  `);
  const rung = () => maria.page.evaluate<number>("rung");
  await bob.say("maria: no bell yet");
  await maria.sees(/no bell yet/);
  assertEquals(await rung(), 0);
  await maria.say("/bell on");
  await maria.sees(/rings when/);
  await bob.say("/msg maria psst");
  await eventually(async () => await rung() === 1, "the bell");
  await bob.say("nothing for her");
  await maria.sees(/nothing for her/);
  assertEquals(await rung(), 1);
  // A tone that is still heard is not played twice.
  await eventually(async () => {
    await bob.say("maria: you are named");
    return await rung() > 1;
  }, "the next bell");
});

browserTest("a browser without sound shows the messages", async () => {
  await using room = await open();
  await using bob = await Terminal.join(room.server, "bob");
  await using maria = await Visitor.join(room.url, "maria");
  await bob.find(/is now known as maria$/);
  await maria.say("/bell on");
  await maria.sees(/rings when/);
  for (
    const broken of [
      "undefined",
      "class { constructor() { throw new Error('no device') } }",
      "class { state = 'suspended'; resume() { return Promise.reject() } }",
    ]
  ) {
    await maria.page.evaluate(`globalThis.AudioContext = ${broken}; 0`);
    await maria.say("/bell on");
    await bob.say(`/msg maria ${broken}`);
    await maria.page.locator("#log .private", { hasText: broken }).waitFor();
  }
});

browserTest("with TLS the page and the chat are encrypted", async () => {
  const { cert, key } = await makeCertificate();
  await using room = await open({}, { tlsCert: cert, tlsKey: key });
  await using bob = await Terminal.join(room.server, "bob");
  await using maria = await Visitor.join(room.url, "maria", {
    ignoreHTTPSErrors: true,
  });
  await bob.find(/is now known as maria$/);
  await maria.say("hello, privately");
  assertEquals(await bob.find(/hello/), "[maria] hello, privately");
});

browserTest("a private message is marked and answered", async () => {
  await using room = await open();
  await using bob = await Terminal.join(room.server, "bob");
  await using maria = await Visitor.join(room.url, "maria");
  await bob.find(/is now known as maria$/);
  await bob.say("/msg maria are you well?");
  await maria.sees(/^bob privately to you.*are you well\?$/);
  await maria.say("/reply very");
  assertEquals(await bob.find(/very/), "[maria -> you] very");
  await maria.sees(/^maria privately to bob.*very$/);
  assertEquals(await maria.page.locator("#log .private").count(), 2);
  // A click on a name begins a private message.
  await maria.page.click("#people button:has-text('bob')");
  assertEquals(await maria.page.inputValue("#text"), "/msg bob ");
});

browserTest("a new name is shown and remembered", async () => {
  await using room = await open();
  await using bob = await Terminal.join(room.server, "bob");
  await using maria = await Visitor.join(room.url, "maria");
  await maria.say("/nick marie");
  await bob.find(/^\* maria is now known as marie$/);
  await maria.seesPerson("marie (you)");
  await bob.say("/nick robert");
  await maria.sees(/^bob is now known as robert$/);
  await maria.seesPerson("robert");
  assertEquals(await maria.page.locator("#people li").count(), 2);
  await maria.page.reload();
  assertEquals(await maria.page.inputValue("#name"), "marie");
});

browserTest("a name that is taken can be replaced", async () => {
  await using room = await open();
  await using bob = await Terminal.join(room.server, "bob");
  await using maria = await Visitor.open(room.url);
  await maria.enter("bob");
  await maria.sees(/^The name bob is taken/);
  await maria.seesPerson("guest2 (you)");
  assertEquals(await maria.page.inputValue("#text"), "/nick ");
  await maria.page.type("#text", "maria");
  await maria.page.press("#text", "Enter");
  await bob.find(/^\* guest2 is now known as maria$/);
  await maria.seesPerson("maria (you)");
});

browserTest("a password is neither shown nor stored", async () => {
  const passwordFile = await Deno.makeTempFile();
  await Deno.writeTextFile(passwordFile, "sesame\n");
  await using room = await open({ passwordFile });
  await using maria = await Visitor.open(room.url);
  const { page } = maria;
  await maria.enter("maria");
  await page.waitForSelector("#password:visible");
  assertEquals(await page.getAttribute("#password", "type"), "password");
  await page.fill("#password", "guess");
  await page.press("#password", "Enter");
  await page.waitForSelector("#entry-error:has-text('not the password')");
  await page.fill("#password", "sesame");
  await page.press("#password", "Enter");
  await maria.seesPerson("maria (you)");
  const kept = await page.evaluate<string>(`
    document.documentElement.outerHTML + document.cookie +
    JSON.stringify({ ...localStorage, ...sessionStorage })
  `);
  assertEquals(/sesame|guess\b/.test(kept), false);
  assertEquals(await page.inputValue("#password"), "");
  await Deno.remove(passwordFile);
});

browserTest("the page comes back when the server restarts", async () => {
  const log = await Deno.makeTempFile();
  const options: Partial<Options> = {
    host: "127.0.0.1",
    port: 0,
    log,
    rate: 0,
  };
  const server = ChatServer.listen(options);
  const webOptions = { host: "127.0.0.1", port: 0 };
  const web = await WebServer.listen(server, webOptions);
  await using maria = await Visitor.join(web.url, "maria");
  await using bob = await Terminal.join(server, "bob");
  await maria.say("before one");
  await bob.find(/before one/);
  await bob.say(...Array.from({ length: 60 }, (_, i) => `more ${i}`));
  await bob.say("before two");
  await maria.sees(/before two/);
  await maria.isAtEnd();
  await server.stop();
  await within(web.close(), "the end of the listener");
  await maria.sees(/^The server is stopping/);
  await maria.page.waitForSelector("#trouble:has-text('Trying again')");
  await maria.isAtEnd(); // although the log is less high now
  // What is typed meanwhile stays where it is.
  await maria.page.fill("#text", "after one");
  await maria.page.press("#text", "Enter");
  assertEquals(await maria.page.inputValue("#text"), "after one");

  const { port } = server.addr;
  await using again = ChatServer.listen({ ...options, port });
  await using _webAgain = await WebServer.listen(again, {
    ...webOptions,
    port: web.port,
  });
  await using ben = await Terminal.join(again, "ben");
  await ben.say("said meanwhile");
  await maria.sees(/^Connected again/);
  await maria.seesPerson("maria (you)");
  await maria.isAtEnd();
  assertEquals(await maria.page.isVisible("#newer"), false);
  await maria.page.press("#text", "Enter");
  assertEquals(await ben.find(/after one/), "[maria] after one");
  const lines = (await maria.lines()).join("\n");
  assertEquals(lines.match(/before one/g)!.length, 1);
  assertEquals(lines.match(/before two/g)!.length, 1);
  assertEquals(lines.match(/said meanwhile/g)!.length, 1);
  await Deno.remove(log);
});

browserTest("a page that comes back has its settings again", async () => {
  const options = { host: "127.0.0.1", port: 0, rate: 0 };
  const server = ChatServer.listen(options);
  const web = await WebServer.listen(server, options);
  await using maria = await Visitor.join(web.url, "maria");
  await using _troll = await Terminal.join(server, "troll");
  await using _gone = await Terminal.join(server, "gone");
  using _guest = await Deno.connect({ port: server.addr.port });
  await maria.seesPerson("guest4");
  for (const name of ["troll", "gone", "guest4"]) {
    await maria.say(`/ignore ${name}`);
    await maria.sees(new RegExp(`You no longer receive messages from ${name}`));
  }
  await maria.say("/bell on\n/bell off\n/away lunch\n/quiet on");
  await maria.sees(/notices are hidden/);
  await server.stop();
  await within(web.close(), "the end of the listener");

  const { port } = server.addr;
  await using again = ChatServer.listen({ ...options, port });
  await using ben = await Terminal.join(again, "ben");
  await using troll = await Terminal.join(again, "troll");
  await using _webAgain = await WebServer.listen(again, {
    ...options,
    port: web.port,
  });
  await maria.sees(/^Connected again/);
  await eventually(async () => {
    const lines = await maria.lines();
    return lines.filter((line) => /notices are hidden/.test(line)).length === 2;
  }, "the settings");
  await ben.say("/msg maria hello");
  assertEquals(await ben.find(/is away/), "* maria is away: lunch");
  await using _late = await Terminal.join(again, "late");
  await troll.say("not for maria");
  await ben.find(/not for maria/);
  await ben.say("for maria");
  await maria.sees(/^ben.*for maria/);
  const lines = await maria.lines();
  const count = (pattern: RegExp) =>
    lines.filter((line) => pattern.test(line)).length;
  assertEquals(count(/not for maria|late has entered/), 0);
  assertEquals(count(/You no longer receive messages from troll/), 2);
  assertEquals(count(/Nobody here is called gone/), 1);
  assertEquals(count(/guest4/), 3); // joined, and was ignored once
  assertEquals(count(/terminal rings/), 1);
});

browserTest("markup and javascript: links are text", async () => {
  await using room = await open();
  await using bob = await Terminal.join(room.server, "bob");
  await using maria = await Visitor.join(room.url, "maria");
  const words = [
    "<script>document.title = 'owned'</script>",
    "<img src=x onerror=alert(1)><b>bold</b>",
    "javascript:alert(1) data:text/html,x",
    "(see https://example.org/a_(b)?c=1&d=<2>, or http://example.org.)",
  ];
  await bob.say(...words);
  await maria.sees(/or http:/);
  const { page } = maria;
  const shown = await page.locator("#log .say .text").allTextContents();
  assertEquals(shown, words);
  assertEquals(await page.locator("#log script, #log img, #log b").count(), 0);
  const links = await page.locator("#log a").evaluateAll((elements) =>
    elements.map((element) => [
      element.getAttribute("href"),
      element.textContent,
      element.getAttribute("target"),
      element.getAttribute("rel"),
    ])
  );
  const how = ["_blank", "noopener noreferrer nofollow ugc"];
  assertEquals(links, [
    [
      "https://example.org/a_(b)?c=1&d=",
      "https://example.org/a_(b)?c=1&d=",
      ...how,
    ],
    ["http://example.org/", "http://example.org", ...how],
  ]);
  assertMatch(await page.title(), /Parley/);
});

browserTest("a paste of 500 lines arrives whole", async () => {
  await using room = await open({ rate: 100 });
  await using bob = await Terminal.join(room.server, "bob");
  await using maria = await Visitor.join(room.url, "maria");
  const lines = Array.from({ length: 500 }, (_, i) => `line ${i}`);
  await maria.say(lines.join("\n"));
  await maria.page.waitForSelector("#outgoing:visible");
  await bob.find(/^\[maria\] line 0$/);
  for (const line of lines.slice(1)) {
    assertEquals(await bob.next(), `[maria] ${line}`);
  }
  await maria.page.waitForSelector("#outgoing", { state: "hidden" });
  const own = maria.page.locator("#log .own");
  // The last ones are shown in the next frame.
  await own.nth(499).waitFor({ state: "attached" });
  assertEquals(await own.count(), 500);
});

browserTest("a paste of long lines does not outrun the server", async () => {
  await using room = await open({ rate: 100 });
  await using bob = await Terminal.join(room.server, "bob");
  await using maria = await Visitor.join(room.url, "maria");
  // The last one is sent in pieces, one of which looks like a command.
  const long = "y".repeat(4_000) + "/quit now";
  const lines = Array.from(
    { length: 30 },
    (_, i) => `${i} ${"x".repeat(3_990)}`,
  );
  await maria.say([...lines, long].join("\n"));
  await bob.find(/^\[maria\] 0 x/);
  for (const line of lines.slice(1)) {
    assertEquals(await bob.next(), `[maria] ${line}`);
  }
  assertEquals(await bob.next(), `[maria] ${"y".repeat(4_000)}`);
  assertEquals(await bob.next(), "[maria] /quit now");
});

browserTest(
  "a page that stops reading is disconnected and others lose nothing",
  async () => {
    await using room = await open({ rate: 0, history: 0 });
    await using bob = await Terminal.join(room.server, "bob");
    await using carol = await Terminal.join(room.server, "carol");
    await using maria = await Visitor.join(room.url, "maria");
    await carol.find(/is now known as maria$/);
    // At a breakpoint a page reads nothing.
    const debug = await maria.page.context().newCDPSession(maria.page);
    await debug.send("Debugger.enable");
    await debug.send("Debugger.pause");
    const text = "z".repeat(1_000), most = 100_000;
    let said = 0, tooSlow = false;
    const speaking = (async () => {
      for (; !tooSlow && said < most; said += 100) {
        await bob.say(
          ...Array.from({ length: 100 }, (_, i) => `${said + i} ${text}`),
        );
      }
      await bob.say("the end");
    })();
    for (let expected = 0;;) {
      const line = await carol.find(/^\[bob\]|too slow/);
      if (line === "[bob] the end") {
        assertEquals(expected, said);
        break;
      }
      if (line === "* maria has left the room (too slow)") tooSlow = true;
      else assert(line.startsWith(`[bob] ${expected++} z`), line.slice(0, 30));
    }
    await speaking;
    assert(tooSlow);
    await debug.send("Debugger.disable");
    await maria.page.waitForSelector(
      "#log .notice:has-text('The connection was lost')",
      { timeout: 30_000 }, // it has megabytes to show first
    );
    await carol.find(/is now known as maria$/); // it comes back by itself
  },
);

browserTest("scrolling up is not disturbed by new messages", async () => {
  await using room = await open({ rate: 0 });
  await using bob = await Terminal.join(room.server, "bob");
  await using maria = await Visitor.join(room.url, "maria");
  const { page } = maria;
  const top = () => page.locator("#log").evaluate((log) => log.scrollTop);
  await maria.fillLog(bob);
  await maria.scrollUp();
  await eventually(async () => await top() === 500, "the scroll");
  await bob.say("one", "two", "three");
  await page.waitForSelector("#newer:has-text('3 new messages')");
  assertEquals(await top(), 500);
  await maria.comeDown();
});

browserTest("only messages are counted as new messages", async () => {
  await using room = await open({ rate: 0 });
  await using bob = await Terminal.join(room.server, "bob");
  await using maria = await Visitor.join(room.url, "maria");
  const { page } = maria;
  await maria.fillLog(bob);
  const isNewer = async (label: string) =>
    await eventually(
      async () => await page.locator("#newer").textContent() === label,
      label,
    );
  await maria.scrollUp();
  await using carol = await Terminal.join(room.server, "carol");
  await isNewer("New notices ↓");
  await carol.say("one", "/me waves", "/msg maria psst");
  await isNewer("3 new messages ↓");
  await bob.say("/nick robert");
  await maria.sees(/is now known as robert/);
  await isNewer("3 new messages ↓");
  await maria.comeDown();

  await maria.scrollUp();
  await bob.say("/nick bob");
  await isNewer("New notice ↓");
  await maria.comeDown();
});

browserTest(
  "the page follows the conversation while the height of the log changes",
  async () => {
    await using room = await open({ rate: 0 });
    await using bob = await Terminal.join(room.server, "bob");
    await using maria = await Visitor.join(room.url, "maria");
    const { page } = maria;
    await maria.fillLog(bob);
    // After a line is shown, and before the browser reports the scroll, something
    // below the log becomes 40 pixels higher, and later lower.
    await page.evaluate(`new MutationObserver(() => {
      const trouble = document.getElementById("trouble");
      setTimeout(() => trouble.hidden = !trouble.hidden);
    }).observe(document.getElementById("log"), { childList: true })`);
    for (let i = 0; i < 6; i++) {
      await bob.say(`step ${i}`);
      await maria.sees(new RegExp(`step ${i}$`));
      await page.waitForSelector("#trouble", {
        state: i % 2 === 0 ? "visible" : "hidden",
      });
      await maria.isAtEnd();
    }
    assertEquals(await page.isVisible("#newer"), false);
    // A person who scrolls is not moved by it.
    await page.hover("#log");
    await page.mouse.wheel(0, -300);
    await eventually(async () => await maria.distance() > 200, "the scroll");
    const top = () => page.locator("#log").evaluate((log) => log.scrollTop);
    await eventually(async () => {
      const before = await top();
      await page.waitForTimeout(100);
      return await top() === before;
    }, "the end of the scroll");
    const before = await top();
    await bob.say("step 6");
    await page.waitForSelector("#newer:has-text('1 new message')");
    assertEquals(await top(), before);
  },
);

browserTest("the title counts unread messages", async () => {
  await using room = await open();
  await using bob = await Terminal.join(room.server, "bob");
  await using maria = await Visitor.join(room.url, "maria");
  const { page } = maria;
  await page.evaluate("document.hasFocus = () => false; 0");
  await bob.say("one", "two");
  await eventually(
    async () => (await page.title()).startsWith("(2) "),
    "the number in the title",
  );
  await page.evaluate(() => dispatchEvent(new Event("focus")));
  await eventually(
    async () => (await page.title()).startsWith("Parley"),
    "the title without a number",
  );
});

browserTest(
  "a message that contains the own name as a word is marked",
  async () => {
    await using room = await open();
    await using bob = await Terminal.join(room.server, "bob");
    await using anna = await Visitor.join(room.url, "anna");
    await bob.say(
      "annabel is here",
      "annabel asks ANNA",
      "(anna)",
      "joanna",
      "anna-lena",
      "\u{1d44e}anna",
      "anna@paris is someone else, and so is bob@anna",
      "@anna, not anna@paris",
      "the end",
    );
    await anna.sees(/the end/);
    assertEquals(
      await anna.page.locator("#log .mention .text").allTextContents(),
      ["annabel asks ANNA", "(anna)", "@anna, not anna@paris"],
    );
  },
);

browserTest(
  "a name with letters of any script is found as a word",
  async () => {
    await using room = await open();
    await using bob = await Terminal.join(room.server, "bob");
    await using visitor = await Visitor.join(room.url, "Ünal");
    const named = ["Ünalxyz told Ünal yes", "U\u0308nal?", "so says ÜNAL"];
    await bob.say(...named, "Ünal@paris", "Ünal\u0301", "Ünalxyz", "the end");
    await visitor.sees(/the end/);
    assertEquals(
      await visitor.page.locator("#log .mention .text").allTextContents(),
      named,
    );
  },
);

browserTest("the keyboard recalls and completes", async () => {
  await using room = await open();
  await using _bob = await Terminal.join(room.server, "bob_the_builder");
  await using maria = await Visitor.join(room.url, "maria");
  const { page } = maria;
  const value = () => page.inputValue("#text");
  await maria.say("first");
  await maria.say("second");
  await page.press("#text", "ArrowUp");
  assertEquals(await value(), "second");
  await page.press("#text", "ArrowUp");
  assertEquals(await value(), "first");
  await page.press("#text", "ArrowDown");
  await page.press("#text", "ArrowDown");
  assertEquals(await value(), "");
  await page.type("#text", "bo");
  await page.press("#text", "Tab");
  assertEquals(await value(), "bob_the_builder: ");
  await page.fill("#text", "/ni");
  await page.press("#text", "Tab");
  assertEquals(await value(), "/nick ");
  await page.fill("#text", "/m");
  await page.press("#text", "Tab");
  assertEquals(await value(), "/me ");
  await page.press("#text", "Tab");
  assertEquals(await value(), "/msg ");
  await page.fill("#text", "a");
  await page.press("#text", "Shift+Enter");
  await page.type("#text", "b");
  assertEquals(await value(), "a\nb");
  await page.fill("#text", "");
  await page.press("#text", "Tab"); // and nothing to complete: it moves on
  assertEquals(await page.locator("#text:focus").count(), 0);
});

browserTest("text runs in the direction of its script", async () => {
  await using room = await open();
  await using bob = await Terminal.join(room.server, "bob");
  await using maria = await Visitor.join(room.url, "maria");
  await bob.say("hello", "שלום לכולם", "مرحبا");
  await maria.sees(/مرحبا/);
  const directions = await maria.page.locator("#log .say .text").evaluateAll(
    (all) =>
      all.map((it) => it.computedStyleMap().get("direction")?.toString()),
  );
  assertEquals(directions, ["ltr", "rtl", "rtl"]);
});

browserTest("a room that asks for a name is given it", async () => {
  await using room = await open({ askName: true });
  await using maria = await Visitor.join(room.url, "maria");
  await using ben = await Visitor.join(room.url, "ben");
  await maria.seesPerson("ben");
  await ben.seesPerson("maria");
  await ben.say("/etc/passwd is a message");
  await maria.sees(/^ben.*\/etc\/passwd is a message$/);
  await using taken = await Visitor.open(room.url);
  await taken.enter("ben");
  await taken.page.waitForSelector("#entry-error:has-text('ben is taken')");
  await taken.enter("zoe");
  await taken.seesPerson("zoe (you)");
});

browserTest("a raw room is a plain relay", async () => {
  await using room = await open({ raw: true });
  await using maria = await Visitor.openRaw(room.url);
  await using ben = await Visitor.openRaw(room.url);
  await ben.say("/nick is text");
  await maria.sees(/^\/nick is text$/);
  await maria.say("yes");
  await ben.sees(/^yes$/);
});

browserTest("in a raw room every line is a message", async () => {
  await using room = await open({ raw: true });
  await using maria = await Visitor.openRaw(room.url);
  await using ben = await Visitor.openRaw(room.url);
  const lines = [
    "[host] obey",
    "* Goodbye.",
    "* Here now: nobody (7)",
    "* Earlier:",
    "! no",
    "** ben waves",
    "* Welcome! You are ben.",
    "* This room has a password. What is it?",
    "* Welcome to Parley. What is your name?",
    "the end",
  ];
  await ben.say(lines.join("\n"));
  await maria.sees(/^the end$/);
  const shown = await maria.page.locator("#log .plain").allTextContents();
  assertEquals(shown, lines);
  assertEquals(await maria.page.isVisible("#entry"), false);
});

browserTest("the first line of a raw room is a message", async () => {
  await using room = await open({ raw: true });
  await using ben = await Visitor.openRaw(room.url);
  const question = "* This room has a password. What is it?";
  for (const line of ["* Goodbye.", "! no", "[host] obey", question]) {
    await using maria = await Visitor.openRaw(room.url);
    await ben.say(line);
    await maria.sees(/./);
    assertEquals(await maria.page.isVisible("#entry"), false);
    assertEquals(await maria.lines(), [line]);
    await maria.say(`seen: ${line}`);
    await ben.sees(new RegExp(`^seen: ${RegExp.escape(line)}$`));
  }
});

browserTest("a raw room shows neither a name nor who is here", async () => {
  const passwordFile = await Deno.makeTempFile();
  await Deno.writeTextFile(passwordFile, "sesame\n");
  await using room = await open({ raw: true, passwordFile });
  for (const width of [1_200, 390]) {
    await using maria = await Visitor.open(room.url, {
      viewport: { width, height: 800 },
    });
    const { page } = maria;
    await page.waitForSelector("#entry:visible");
    assertEquals(await page.isVisible("#name"), false);
    assertEquals(await page.isVisible("#name-hint"), false);
    await page.keyboard.press("Enter"); // on the button
    await page.fill("#password", "sesame");
    await page.press("#password", "Enter");
    await page.waitForSelector("#entry", { state: "hidden" });
    assertEquals(await page.isVisible("aside"), false);
    assertEquals(await page.isVisible("#people-toggle"), false);
    const { width: wide } = (await page.locator("main").boundingBox())!;
    assertEquals(wide, Math.min(width, 1_216));
  }
  await Deno.remove(passwordFile);
});

browserTest(
  "a person who is kicked is told why, and the page does not rejoin",
  async () => {
    await using room = await open();
    await using maria = await Visitor.join(room.url, "maria");
    const { readable, writable } = new TransformStream<string, string>();
    const operator = writable.getWriter();
    const done = room.server.operate(readable, () => {});
    await operator.write("/kick maria bad manners");
    await maria.page.waitForSelector("#entry-error:has-text('bad manners')");
    await maria.page.press("#name", "Enter");
    await maria.seesPerson("maria (you)");
    await operator.close();
    await done;
  },
);

browserTest(
  "the list of people stays correct while many join and leave",
  async () => {
    await using room = await open();
    await using maria = await Visitor.join(room.url, "maria");
    const crowd = await Promise.all(
      Array.from({ length: 60 }, (_, i) => Terminal.join(room.server, `p${i}`)),
    );
    await maria.page.waitForSelector("#people-title:has-text('(61)')");
    for (const person of crowd) await person[Symbol.asyncDispose]();
    await maria.page.waitForSelector("#people-title:has-text('(1)')", {
      timeout: 20_000,
    });
  },
);

browserTest(
  "the list of people stays correct when other servers link, stop or are gone",
  async () => {
    await using room = await open({ rate: 0 });
    const link = attachServers(room.server);
    let now = 0;
    const report = new Report(
      () => now += 1_000,
      (line) => link.notice(line),
      () => {},
    );
    await using maria = await Visitor.join(room.url, "maria");
    // So many that the answer to /who is several lines.
    const paris = Array.from(
      { length: 150 },
      (_, i) => `${"someone".repeat(3)}${i}@paris`,
    );
    const steps = [
      ["linked", paris],
      ["gone", []],
      ["back", paris.slice(10)],
      ["stopped", []],
      ["linked", paris],
      ["started", paris.slice(0, 2)],
    ] as const;
    let before: readonly string[] = [];
    for (const [event, after] of steps) {
      for (const name of before) link.remove(name);
      for (const name of after) link.add(name);
      await maria.page.evaluate("lastRefresh = 0"); // it waits for ten seconds
      report.server(event, "paris", Math.abs(after.length - before.length));
      await maria.seesPeople(1 + after.length);
      assertEquals(
        (await maria.people()).sort(),
        ["maria (you)", ...after].sort(),
      );
      before = after;
    }
    for (const name of paris.slice(0, 3)) link.add(name);
    await maria.page.evaluate("lastRefresh = 0");
    report.server("linked", "paris", 1);
    report.server("linked", "tokyo", 0);
    await maria.seesPeople(4);
    const lines = await maria.lines();
    // The page's own questions are not shown.
    assertEquals(lines.filter((line) => /^Here now/.test(line)), []);
    assertEquals(lines.filter((line) => /^paris /.test(line)).length, 7);
  },
);

browserTest("a typed /who replaces the list of people", async () => {
  await using room = await open({ rate: 0 });
  const link = attachServers(room.server);
  await using maria = await Visitor.join(room.url, "maria");
  const paris = Array.from(
    { length: 150 },
    (_, i) => `${"someone".repeat(3)}${i}@paris`,
  );
  for (const name of paris) link.add(name, { away: "" });
  await maria.say("/who");
  await maria.seesPeople(151);
  assertEquals(
    (await maria.people()).sort(),
    ["maria (you)", ...paris].sort(),
  );
  for (const name of paris.slice(1)) link.remove(name);
  await maria.say("/who");
  await maria.seesPeople(2);
  assertEquals(await maria.people(), ["maria (you)", paris[0]]);
  link.remove(paris[0]);
  await maria.say("/who");
  await maria.seesPeople(1);
  const answers = (await maria.lines())
    .filter((line) => /^Here now/.test(line));
  assert(answers.length > 4, answers.join("\n"));
});

browserTest("a page that joins a crowd lists all of it", async () => {
  await using room = await open({ rate: 0 });
  const link = attachServers(room.server);
  const paris = Array.from({ length: 30 }, (_, i) => `p${i}@paris`);
  for (const name of paris) link.add(name);
  await using maria = await Visitor.join(room.url, "maria");
  await maria.seesPeople(31);
  assertEquals(
    (await maria.people()).sort(),
    ["maria (you)", ...paris].sort(),
  );
  const lists = (await maria.lines()).filter((line) => /^Here now/.test(line));
  assertEquals(lists.length, 1);
  assertMatch(lists[0], /, and 10 more \(30\)$/);
});

browserTest("axe finds no serious fault", async () => {
  await using room = await open();
  await using bob = await Terminal.join(room.server, "bob");
  for (const colorScheme of ["light", "dark"] as const) {
    for (const width of [1_200, 390]) {
      await using maria = await Visitor.open(room.url, {
        bypassCSP: true, // of its tools; every other test keeps the policy
        colorScheme,
        viewport: { width, height: 800 },
      });
      const faults = async () => {
        await maria.page.evaluate(axe.source);
        return await maria.page.evaluate(async () => {
          // deno-lint-ignore no-explicit-any
          const { violations } = await (globalThis as any).axe.run();
          return violations
            // deno-lint-ignore no-explicit-any
            .filter(({ impact }: any) => /serious|critical/.test(impact))
            // deno-lint-ignore no-explicit-any
            .map(({ id, nodes }: any) => [
              id,
              // deno-lint-ignore no-explicit-any
              ...nodes.map((node: any) =>
                `${node.html} ${node.failureSummary}`
              ),
            ]);
        });
      };
      assertEquals(await faults(), []);
      await maria.enter("maria");
      await maria.seesPerson("maria (you)");
      await bob.say(
        "hello, maria: https://example.org/",
        "/me waves",
        "/msg maria psst https://example.org/",
      );
      await maria.sees(/psst/);
      await maria.say("/help");
      await maria.say("/nonsense");
      await maria.sees(/^Unknown command/);
      assertEquals(await faults(), []);
      if (width === 390) {
        await maria.page.click("#people-toggle");
        assertEquals(await faults(), []);
      }
      await maria.page.close();
      await bob.find(/^\* maria has left the room/);
    }
  }
});
