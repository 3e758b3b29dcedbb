/**
 * The specification of Parley, as tests: on real sockets, and on real processes
 * where it is about signals, exit status, output, permissions or limits of the
 * system. tests/ has the properties, the simulation and the real clients.
 *
 * A test waits for what it expects, and fails if that has not come in time.
 */
import { assert, assertEquals, assertMatch, assertThrows } from "@std/assert";
import config from "./deno.json" with { type: "json" };
import { ChatServer, type Options, UsageError } from "./main.ts";
import {
  admit,
  certificate,
  connectTls,
  DO,
  eventually,
  finished,
  flood,
  FORBIDDEN,
  Guest,
  hurry,
  IAC,
  installed,
  IP,
  LINE_BYTES,
  Lines,
  LINUX,
  logged,
  MAIN,
  makeCertificate,
  never,
  numbered,
  open,
  OPENSSL,
  PRIVATE_BYTES,
  Program,
  run,
  SB,
  SE,
  stall,
  TemporaryFile,
  tlsClientOptions,
  tlsOptions,
  turn,
  WILL,
  WINDOW_LINES,
  within,
  WONT,
} from "./tests/helpers.ts";

const encoder = new TextEncoder();

// -- the server

Deno.test("a raw room relays each line to everyone but its sender", async () => {
  await using server = open({ raw: true });
  await using alice = await Guest.connect(server.port);
  await using bob = await Guest.connect(server.port);
  await using carol = await Guest.connect(server.port);
  await alice.say("one");
  assertEquals(await bob.next(), "one");
  assertEquals(await carol.next(), "one");
  await bob.say("/two", "", "[x] three");
  assertEquals(await alice.next(), "/two"); // not "one"
  assertEquals(await alice.next(), "[x] three");
  assertEquals(await carol.next(), "/two");
  await server.stop();
  assertEquals(await alice.rest(), ["Shutdown Server"]);
});

Deno.test("joins and leaves are printed with the number of clients", async () => {
  const printed: string[] = [];
  await using server = open({}, printed);
  await using alice = await Guest.join(server.port);
  const { port } = alice.conn.localAddr;
  await using bob = await Guest.join(server.port, "bob");
  await bob.say("/quit tired");
  await alice.find(/^\* bob has left the room \(tired\)$/);
  assertEquals(
    printed[0],
    `New Connection from 127.0.0.1:${port} (guest1, 1 here)`,
  );
  assertMatch(
    printed[1],
    /^New Connection from 127\.0\.0\.1:\d+ \(guest2, 2 here\)$/,
  );
  assertMatch(
    printed[2],
    /^Connection closed by 127\.0\.0\.1:\d+ \(bob, tired, 1 here\)$/,
  );
});

Deno.test("a client may leave by close, half-close or reset", async () => {
  await using server = open();
  await using watcher = await Guest.join(server.port);
  const half = await Guest.join(server.port, "half");
  await half.send("last words");
  await half.conn.closeWrite();
  await watcher.find(/^\[half\] last words$/);
  await watcher.find(/^\* half has left the room$/);
  assertEquals((await half.rest()).slice(-1), []); // and is closed from here
  await half[Symbol.asyncDispose]();

  const closer = await Guest.join(server.port, "closer");
  await closer[Symbol.asyncDispose]();
  await watcher.find(/^\* closer has left the room$/);

  // Closing with something unread resets the connection.
  const conn = await Deno.connect({ port: server.port });
  await watcher.find(/^\* guest\d has entered the room$/);
  await watcher.say("unread");
  await conn.read(new Uint8Array(1));
  conn.close();
  await watcher.find(/^\* guest\d has left the room$/);
  await using late = await Guest.join(server.port);
  await late.say("still here");
  await watcher.find(/still here$/);
});

Deno.test("SIGINT and SIGTERM tell everyone and exit with status 0", async (t) => {
  for (const signal of ["SIGINT", "SIGTERM"] as const) {
    await t.step(signal, async () => {
      await using program = await Program.start();
      await using alice = await Guest.join(program.port);
      await using bob = await Guest.join(program.port);
      program.child.kill(signal);
      await program.output.find(/^Shutdown Server \.{6}$/);
      assertEquals((await alice.rest()).at(-1), "* Shutdown Server");
      assertEquals((await bob.rest()).at(-1), "* Shutdown Server");
      const { code } = await within(program.child.status, "the exit");
      assertEquals(code, 0);
      assertEquals(await program.errors.rest(), []);
    });
  }
});

Deno.test("clients that never read delay the shutdown by a second at most", async () => {
  await using program = await Program.start(["--raw", "--rate", "0"]);
  const stalled = await stall(program);
  program.child.kill("SIGINT");
  await program.output.find(/^Shutdown Server/);
  const started = performance.now();
  const { code } = await within(program.child.status, "the exit");
  const took = performance.now() - started;
  assertEquals(code, 0);
  assert(took > 700 && took < 2_000, `it took ${took} ms`);
  for (const conn of stalled) conn.close();
});

Deno.test("a second signal exits at once", async () => {
  await using program = await Program.start(["--raw", "--rate", "0"]);
  const stalled = await stall(program);
  program.child.kill("SIGINT");
  await program.output.find(/^Shutdown Server/);
  program.child.kill("SIGINT");
  const { code } = await within(program.child.status, "the exit");
  assertEquals(code, 130); // 128 + SIGINT, as in shells; 0 after the wait
  for (const conn of stalled) conn.close();
});

// -- names and commands

Deno.test("a newcomer is greeted, named and announced, and can talk at once", async () => {
  await using server = open();
  await using alice = await Guest.connect(server.port);
  assertMatch((await alice.next())!, /^\* Welcome, guest1\..*\/help/);
  assertEquals(await alice.next(), "* The room contains: nobody else yet");
  await using bob = await Guest.connect(server.port);
  await bob.say("hello");
  await bob.find(/^\* Welcome, guest2/);
  assertEquals(await bob.next(), "* The room contains: guest1");
  assertEquals(await alice.next(), "* guest2 has entered the room");
  assertEquals(await alice.next(), "[guest2] hello");
  await bob.conn.closeWrite();
  assertEquals(await alice.next(), "* guest2 has left the room");
  assertEquals(await bob.rest(), []); // nothing of its own came back
});

Deno.test("the commands do what /help says", async (t) => {
  await using server = open();
  await using alice = await Guest.join(server.port, "alice");
  await using bob = await Guest.join(server.port, "bob");
  await alice.find(/known as bob/);

  await t.step("/help lists them all", async () => {
    await alice.say("/help");
    for (
      const name of [
        "help",
        "nick NAME",
        "who",
        "me ACTION",
        "msg NAME TEXT",
        "reply TEXT",
        "ignore NAME",
        "quiet",
        "quit \\[REASON\\]",
        "/TEXT",
      ]
    ) {
      assert((await alice.find(new RegExp(`^\\* /${name}  `))).length < 80);
    }
    await alice.settle();
  });
  await t.step("/nick tells everyone", async () => {
    await alice.say("/nick Alïce");
    assertEquals(await bob.next(), "* alice is now known as Alïce");
    assertEquals(await alice.next(), "* alice is now known as Alïce");
    await alice.say("/nick alice");
    await alice.next();
    await bob.next();
  });
  await t.step("/who lists everyone", async () => {
    await bob.say("/WHO");
    assertEquals(await bob.next(), "* The room contains: bob, alice");
  });
  await t.step("/me acts", async () => {
    await alice.say("/me waves");
    assertEquals(await bob.next(), "** alice waves");
  });
  await t.step("//text says /text", async () => {
    await alice.say("//etc/hosts");
    assertEquals(await bob.next(), "[alice] /etc/hosts");
  });
  await t.step("/msg and /reply reach one person", async () => {
    await using carol = await Guest.join(server.port, "carol");
    await alice.find(/known as carol/);
    await bob.find(/known as carol/);
    await alice.say("/msg BOB psst: a b");
    assertEquals(await bob.next(), "[alice -> you] psst: a b");
    assertEquals(await alice.next(), "[you -> bob] psst: a b");
    await bob.say("/reply what?", "aloud");
    assertEquals(await alice.next(), "[bob -> you] what?");
    assertEquals(await bob.next(), "[you -> alice] what?");
    assertEquals(await carol.next(), "[bob] aloud");
    await alice.next();
  });
  await t.step(
    "/ignore hides one sender's lines until it is repeated",
    async () => {
      await alice.find(/carol has left/);
      await bob.find(/carol has left/);
      await bob.say("/ignore alice");
      assertMatch((await bob.next())!, /^\* You do not hear alice now\./);
      await alice.say("hidden", "/me hides", "/msg bob hidden too");
      await alice.find(/^\[you -> bob\] hidden too$/);
      await alice.say("/nick noise", "/nick alice");
      assertEquals(await bob.next(), "* alice is now known as noise");
      assertEquals(await bob.next(), "* noise is now known as alice");
      await bob.say("/ignore alice");
      assertEquals(await bob.next(), "* You hear alice again.");
      await alice.say("shown");
      assertEquals(await bob.next(), "[alice] shown");
    },
  );
  await t.step("/quiet hides join and leave notices", async () => {
    await bob.say("/quiet");
    assertMatch(
      (await bob.next())!,
      /^\* You do not hear who enters and leaves now\./,
    );
    const dave = await Guest.join(server.port, "dave");
    await dave[Symbol.asyncDispose]();
    await alice.find(/dave has left/);
    assertMatch((await bob.next())!, /is now known as dave$/);
    await bob.say("/quiet");
    assertEquals(await bob.next(), "* You hear who enters and leaves again.");
    await using _erin = await Guest.join(server.port);
    assertMatch((await bob.next())!, /has entered the room$/);
    await alice.next();
  });
  await t.step("/quit leaves with a reason", async () => {
    await alice.find(/has left the room$/);
    await bob.say("/quit so long");
    assertEquals(await alice.next(), "* bob has left the room (so long)");
    await bob.rest();
    await using carol = await Guest.join(server.port, "carol");
    await carol.say("/quit Too slow"); // quoted, as the server did not say it
    await alice.find(/^\* carol has left the room \("Too slow"\)$/);
  });
});

Deno.test("a command that cannot be carried out is answered to its sender alone", async () => {
  await using server = open();
  await using alice = await Guest.join(server.port, "alice");
  await using bob = await Guest.join(server.port, "bob");
  await alice.find(/known as bob/);
  const answers: [string, RegExp][] = [
    ["/nick ALICE", /^! The name ALICE is taken\. .*\/nick NAME/],
    ["/nick Host", /^! The name Host is reserved\./],
    ["/nick you", /^! The name you is reserved\./],
    ["/nick server", /^! The name server is reserved\./],
    ["/nick two words", /^! A name is 1 to 24 letters/],
    ["/nick " + "x".repeat(25), /^! A name is 1 to 24 letters/],
    ["/nick al\u3164ice", /^! A name is 1 to 24 letters/],
    ["/nick h\u043est", /^! The name h\u043est is reserved/], // Cyrillic o
    ["/nick \u029cost", /^! The name .ost is reserved/], // a small capital
    ["/nick \u0397\u043est", /^! The name .+st is reserved/], // Greek Eta
    ["/nick \u03a5\u039fU", /^! The name .+ is reserved/], // capital upsilon
    ["/nick \u03a5\u03bf\u03c5", /^! The name .+ is reserved/],
    ["/nick h\u0301ost", /^! The name .+ost is reserved/],
    ["/nick ]", /^! A name is 1 to 24 letters/],
    ["/nick", /^! Type \/nick NAME\.$/],
    ["/nick bob", /^! You are bob already\.$/],
    ["/me", /^! Type \/me ACTION\.$/],
    ["/msg", /^! Type \/msg NAME TEXT\.$/],
    ["/msg alice", /^! Type \/msg NAME TEXT\.$/],
    ["/msg zoe hi", /^! Nobody here is called zoe\. .*\/who/],
    ["/reply hi", /^! Nobody has spoken to you alone\./],
    ["/ignore zoe", /^! Nobody here is called zoe\./],
    ["/ignore bob", /^! That is you\./],
    ["/dance now", /^! There is no command \/dance\. .*\/help/],
    ["/ x", /^! There is no command \/\. /],
  ];
  for (const [typed, answer] of answers) {
    await bob.say(typed);
    assertMatch((await bob.next())!, answer);
  }
  await bob.say("done");
  assertEquals(await alice.next(), "[bob] done");
});

Deno.test("names are compared without case and in their composed form", async () => {
  await using server = open();
  await using alice = await Guest.join(server.port);
  await using bob = await Guest.join(server.port);
  await alice.say("/nick Ａｌｉｃｅ");
  await bob.find(/^\* guest1 is now known as Alice$/);
  for (const name of ["alice", "ＡLICE", "aLıce"]) {
    await bob.say(`/nick ${name}`);
    assertMatch((await bob.next())!, /^! The name .* is taken/);
  }
  for (const name of ["नमस्ते", "张三", "Çelik_7", "guest5"]) {
    await bob.say(`/nick ${name}`);
    assertMatch((await bob.next())!, / is now known as /);
  }
  for (let i = 3; i <= 6; i++) {
    await using guest = await Guest.connect(server.port);
    const name = i < 5 ? `guest${i}` : `guest${i + 1}`; // guest5 is taken
    assertMatch((await guest.next())!, new RegExp(`^\\* Welcome, ${name}\\.`));
  }
});

Deno.test("a newcomer receives the last public lines", async () => {
  await using server = open({ history: 3 });
  await using alice = await Guest.join(server.port, "alice");
  await using bob = await Guest.join(server.port, "bob");
  await alice.say("one", "two", "/msg bob secret", "/me three", "/who", "four");
  await bob.find(/four$/);
  await using carol = await Guest.join(server.port);
  assertEquals(await carol.next(), "[alice] two");
  assertEquals(await carol.next(), "** alice three");
  assertEquals(await carol.next(), "[alice] four");
  await bob.say("five");
  assertEquals(await carol.next(), "[bob] five");
});

Deno.test("a history of many long lines is bounded in bytes too", async () => {
  const size = 4_000, fit = 1_048_576 / size; // the history has at most 1 MiB
  await using server = open({ history: 10_000, rate: 0 });
  await using alice = await Guest.join(server.port, "alice");
  await flood(alice, 1.5 * fit, size);
  await alice.settle();
  await using bob = await Guest.join(server.port);
  await alice.say("the last");
  const shown = [await bob.next()];
  while (!shown.at(-1)!.endsWith(" the last")) shown.push(await bob.next());
  const count = shown.length;
  assert(count > 0.75 * fit && count < 1.03 * fit, `${count} lines`);
});

Deno.test("--timestamps puts the time of day before each message", async () => {
  await using server = open({ timestamps: true, history: 1 });
  await using alice = await Guest.join(server.port, "alice");
  await using bob = await Guest.join(server.port, "bob");
  await alice.say("hello", "/me waves");
  assertMatch((await bob.next())!, /^([01]\d|2[0-3]):[0-5]\d \[alice\] hello$/);
  assertMatch((await bob.next())!, /^\d\d:\d\d \*\* alice waves$/);
  await using carol = await Guest.join(server.port);
  assertMatch((await carol.next())!, /^\d\d:\d\d \*\* alice waves$/);
});

Deno.test("the list of who is here shows twenty names and counts the others", async () => {
  await using server = open();
  const crowd = await Promise.all(
    Array.from({ length: 23 }, () => Guest.join(server.port)),
  );
  await crowd[0].say("/who");
  const line = await crowd[0].find(
    /^\* The room contains: guest1, .*guest20 and 3 more$/,
  );
  assertEquals(line.split(", ").length, 20);
  for (const guest of crowd) await guest[Symbol.asyncDispose]();
});

Deno.test("a crowd is told of joins and leaves in one line a second", async () => {
  using _hurry = hurry(1_000);
  await using server = open();
  const crowd = [await Guest.join(server.port)];
  for (let i = 0; i < 59; i++) crowd.push(await Guest.join(server.port));
  assertEquals(
    await crowd[0].find(/people/),
    "* 10 people have entered the room",
  );
  await crowd.pop()![Symbol.asyncDispose]();
  assertEquals(await crowd[0].next(), "* guest60 has left the room");
  for (const guest of crowd) await guest[Symbol.asyncDispose]();
});

/** Admits clients in memory, of which the first `stalled` never take a write. */
function admitCrowd(server: ChatServer, size: number, stalled = 0): void {
  for (let i = 0; i < size; i++) {
    admit(server, i < stalled ? { write: never } : {});
  }
}

Deno.test("a crowd is told how many of the clients that left were too slow", async () => {
  using _hurry = hurry(1_000);
  await using server = open({ rate: 0 });
  await using alice = await Guest.join(server.port, "alice");
  admitCrowd(server, 60, 2);
  await alice.find(/people have entered/);
  await flood(alice, 1.2 * WINDOW_LINES);
  assertEquals(
    await alice.find(/left/),
    "* 2 people have left the room (2 too slow)",
  );
});

Deno.test("no client is always the last to receive a line", async () => {
  await using server = open({ raw: true, rate: 0 });
  const clients = 5;
  let received = 0, last = Promise.withResolvers<number>();
  for (let i = 0; i < clients; i++) {
    admit(server, {
      write(bytes) {
        if (++received % clients === 0) last.resolve(i);
        return Promise.resolve(bytes.length);
      },
    });
  }
  await using alice = await Guest.connect(server.port);
  const wereLast = new Set<number>();
  for (let line = 0; line < 100; line++) {
    last = Promise.withResolvers();
    await alice.say("hi");
    wereLast.add(await within(last.promise, "the line"));
  }
  assertEquals(wereLast.size, clients);
});

Deno.test("a thousand people can be ignored, and no more", async () => {
  await using server = open({ rate: 0 });
  admitCrowd(server, 1_001);
  await using alice = await Guest.join(server.port, "alice");
  const ignores = numbered(1_002, "/ignore guest").slice(1); // from guest1 on
  await alice.say(...ignores);
  await alice.find(/^! You ignore 1000 people, which is the most\.$/);
});

Deno.test("thousands of /me lines arrive whole and in order", async () => {
  await using server = open({ rate: 0 });
  await using alice = await Guest.join(server.port, "alice");
  await using bob = await Guest.join(server.port);
  const actions = numbered(5_000, "waves ");
  await alice.say(...actions.map((action) => `/me ${action}`));
  for (const action of actions) {
    assertEquals(await bob.next(), `** alice ${action}`);
  }
});

Deno.test("thousands of short lines from the longest name arrive whole and in order", async () => {
  await using server = open({ rate: 0 });
  const name = "𐐷".repeat(24); // 24 letters of 4 bytes
  await using alice = await Guest.join(server.port, name);
  await using bob = await Guest.join(server.port);
  const lines = numbered(5_000);
  const sending = alice.say(...lines);
  for (const line of lines) assertEquals(await bob.next(), `[${name}] ${line}`);
  await sending;
});

Deno.test("--ask-name is Protohackers' Budget Chat", async () => {
  await using server = open({ askName: true, history: 20 });
  await using alice = await Guest.connect(server.port);
  assertMatch((await alice.next())!, /name\?$/);
  await alice.say("alice");
  assertEquals(await alice.next(), "* The room contains: ");
  await using bob = await Guest.connect(server.port);
  await bob.next();
  await alice.say("bob has not come in yet");
  const nobody = await Guest.connect(server.port);
  await nobody.next();
  await nobody[Symbol.asyncDispose](); // without a notice, as it has no name
  await bob.say("bob");
  assertEquals(await bob.next(), "* The room contains: alice");
  assertEquals(await bob.next(), "[alice] bob has not come in yet"); // history
  assertEquals(await alice.next(), "* bob has entered the room");
  await bob.say("hi alice");
  assertEquals(await alice.next(), "[bob] hi alice");
  await bob.conn.closeWrite();
  assertEquals(await alice.next(), "* bob has left the room");
  for (const name of ["alice", "no spaces", "host", "x".repeat(25)]) {
    await using guest = await Guest.connect(server.port);
    await guest.next();
    await guest.say(name);
    assertMatch((await guest.next())!, /^! /);
    assertEquals(await guest.next(), null);
  }
  await alice.receivesNothing();
});

// -- framing and cleaning

/** A stream with everything that ends, splits or interrupts a line. */
const STREAM = [
  ...encoder.encode("plain\ncr lf\r\ncr nul\r\0"),
  ...[IAC, DO, 10, IAC, WILL, 31],
  ...encoder.encode("naïve 🌍"),
  ...[IAC, SB, 31, 0, 10, 0, IAC, IAC, 10, IAC, SE],
  ...encoder.encode(" tail\n\n\r\n"),
  ...[0xe2, 0x82, 10, 0x61, 0xff, 0xff, 0x62, 10],
  ...encoder.encode("last words"),
];
/** The lines in it. */
const STREAM_LINES = [
  "plain",
  "cr lf",
  "cr nul",
  "naïve 🌍 tail",
  "\ufffd",
  "a\ufffdb",
  "last words",
];

Deno.test("a stream has the same lines wherever it is cut into reads", async () => {
  await using server = open({ raw: true, rate: 0 });
  await using reader = await Guest.connect(server.port);
  for (let cut = 0; cut <= STREAM.length; cut++) {
    const conn = await Deno.connect({ port: server.port });
    conn.setNoDelay(true);
    const parts = cut === 0
      ? STREAM.map((byte) => [byte])
      : [STREAM.slice(0, cut), STREAM.slice(cut)].filter((part) => part.length);
    for (const part of parts) {
      await conn.write(Uint8Array.from(part));
      await new Promise((resolve) => setTimeout(resolve, 1)); // a read of its own
    }
    await conn.closeWrite();
    for (const line of STREAM_LINES) assertEquals(await reader.next(), line);
    conn.close();
  }
});

Deno.test("a telnet option is refused", async () => {
  await using server = open({ raw: true });
  using conn = await Deno.connect({ port: server.port });
  // What telnet sends for Ctrl-C; it prints nothing before the answer (RFC 860).
  const TIMING_MARK = 6;
  await conn.write(Uint8Array.of(IAC, IP, IAC, DO, TIMING_MARK));
  const buffer = new Uint8Array(10);
  assertEquals(await within(conn.read(buffer), "the answer"), 3);
  assertEquals([...buffer.slice(0, 3)], [IAC, WONT, TIMING_MARK]);
});

Deno.test("characters that could disturb a terminal are removed from a line", async () => {
  await using server = open({ rate: 0 });
  await using alice = await Guest.join(server.port, "alice");
  await using bob = await Guest.join(server.port, "bob");
  const lines: [typed: string, received: string][] = [
    ["\x1b[31mred\x1b[0m", "red"],
    ["\x1b]0;a new title\x07t", "t"],
    ["\x1b]8;;http://x/ y\x1b\\link", "link"],
    ["\x1bP1$r0m\x1b\\dcs", "dcs"],
    ["\x9b2Jc1", "c1"],
    ["\x1b#8double", "double"],
    ["\x1b]0;never ended", "0;never ended"],
    ["bell\x07 back\b\b del\x7f", "bell back del"],
    ["a\u2028b\u2029c\u0085d", "abcd"],
    ["\u202eevil\u2066x\u202c", "evilx"],
    ["tab\tstays", "tab\tstays"],
    ["cr\r[bob] forged", "cr[bob] forged"],
    ["\ufeff/me has a mark", ""],
    ["👩‍👩‍👧 مرحبا", "👩‍👩‍👧 مرحبا"],
  ];
  for (const [typed, received] of lines) {
    await alice.say(typed);
    assertEquals(
      await bob.next(),
      received ? `[alice] ${received}` : "** alice has a mark",
    );
  }
  await alice.say("\x07\x1b[0m", "", "end");
  assertEquals(await bob.next(), "[alice] end");
});

Deno.test("a line that is too long is passed on in pieces, cut between characters", async () => {
  await using server = open({ raw: true, rate: 0 });
  await using alice = await Guest.connect(server.port);
  await using bob = await Guest.connect(server.port);
  const half = LINE_BYTES / 2 - 1; // letters of two bytes after one of one byte
  await alice.say(
    "x".repeat(LINE_BYTES),
    "y".repeat(LINE_BYTES + 1),
    "z" + "é".repeat(half + 1_953),
  );
  assertEquals(await bob.next(), "x".repeat(LINE_BYTES));
  assertEquals(await bob.next(), "y".repeat(LINE_BYTES));
  assertEquals(await bob.next(), "y");
  assertEquals(await bob.next(), "z" + "é".repeat(half));
  assertEquals(await bob.next(), "é".repeat(1_953));
  const invalid = new Uint8Array(LINE_BYTES + 904).fill(0x80); // no UTF-8
  await alice.send([...invalid, 10]);
  assertEquals(await bob.next(), "\ufffd".repeat(LINE_BYTES));
  assertEquals(await bob.next(), "\ufffd".repeat(904));
});

Deno.test({
  name: "20 MB without a newline arrive whole, in flat memory",
  ignore: !LINUX,
  async fn() {
    await using program = await Program.start(["--raw", "--rate", "0"]);
    await using alice = await Guest.connect(program.port);
    await using bob = await Guest.connect(program.port);
    await program.output.find(/2 here/);
    const before = await program.memory(), size = 20_000_000;
    let most = before;
    const sending = (async () => {
      const part = encoder.encode("0123456789".repeat(10_000));
      for (let sent = 0; sent < size; sent += part.length) {
        await alice.send(part);
        if (sent % 2_000_000 === 0) {
          most = Math.max(most, await program.memory());
        }
      }
      await alice.say("");
    })();
    let received = 0;
    while (received < size) {
      const line = (await bob.next())!;
      assert(line.length <= LINE_BYTES);
      assertEquals(line[0], String(received % 10));
      received += line.length;
    }
    await sending;
    assertEquals(received, size);
    assert(most - before < 60, `${most - before} MiB more`);
  },
});

Deno.test("a first line that is an HTTP request is refused", async () => {
  await using server = open();
  await using alice = await Guest.join(server.port);
  await using page = await Guest.connect(server.port);
  await page.send("POST / HTTP/1.1\r\nHost: x\r\n\r\nI am a web page\r\n");
  assertEquals(await page.find(/^HTTP/), "HTTP/1.1 400 Bad Request");
  await page.find(/chat room, not a web site/);
  await page.rest();
  assertEquals(await alice.next(), "* guest2 has entered the room");
  assertEquals(
    await alice.next(),
    "* guest2 has left the room (a web request)",
  );
  await using bob = await Guest.join(server.port, "bob");
  await bob.say("GET / HTTP/1.1");
  await alice.find(/^\[bob\] GET \/ HTTP\/1\.1$/); // not a first line
});

Deno.test("a TLS handshake or an over-long HTTP request is refused, not passed on", async () => {
  await using server = open();
  await using alice = await Guest.join(server.port);
  await using secure = await Guest.connect(server.port);
  await secure.send([0x16, 0x03, 0x01, 10, 65, 66, 10]);
  await secure.rest();
  await alice.find(/left the room \(TLS, which is off\)$/);
  await using page = await Guest.connect(server.port);
  await page.send(`POST /${"a".repeat(6_000)} HTTP/1.1\r\n\r\nhello\r\n`);
  await alice.find(/left the room \(a web request\)$/);
});

Deno.test("/reply goes to the last sender of a private message who is not ignored", async () => {
  await using server = open();
  await using alice = await Guest.join(server.port, "alice");
  await using bob = await Guest.join(server.port, "bob");
  await using mallory = await Guest.join(server.port, "mallory");
  await bob.say("/ignore mallory");
  await bob.find(/do not hear mallory/);
  await alice.say("/msg bob our plan?");
  await bob.find(/our plan/);
  await mallory.say("/msg bob x");
  await mallory.find(/you -> bob/);
  await bob.say("/reply tomorrow");
  await alice.find(/^\[bob -> you\] tomorrow$/);
});

Deno.test("bytes that make no line neither delay nor disconnect anyone", async () => {
  await using server = open();
  await using alice = await Guest.join(server.port, "alice");
  for (const bytes of [[IAC, DO, 6], [10], [IAC, SB, 1]]) {
    const flooder = await Guest.connect(server.port);
    const flooding = flooder.send(
      Array.from({ length: 3_000_000 }, (_, i) => bytes[i % bytes.length]),
    ).catch(() => {});
    for (let i = 0; i < 5; i++) {
      await within(alice.settle(), "an answer", 1_000);
    }
    flooder.conn.close();
    await flooding;
  }
});

// -- slow clients, rate and limits

Deno.test({
  name:
    "a client that never reads delays nobody, is disconnected as too slow, and the room is told",
  ignore: !LINUX,
  async fn() {
    await using program = await Program.start(["--rate", "0"]);
    await using alice = await Guest.join(program.port, "alice");
    await using bob = await Guest.join(program.port, "bob");
    await alice.find(/known as bob/);
    const descriptors = await program.descriptors();
    const before = await program.memory();
    const slow = await Deno.connect({ port: program.port });
    await alice.find(/entered the room/);
    let received = 0, told = false;
    for (let sent = 0; !told && sent < 40_000; sent += 100) {
      await flood(alice, 100);
      while (received < sent + 100) {
        const line = (await bob.find(/^\[alice\]|too slow/))!;
        if (line.startsWith("[")) received++;
        else {
          assertEquals(line, "* guest3 has left the room (too slow)");
          told = true;
        }
      }
    }
    assert(told, "the room was never told");
    assertMatch(
      await program.output.find(/too slow/),
      /^Connection closed by .* \(guest3, too slow, 2 here\)$/,
    );
    // Although its write and its read never end:
    await eventually(
      async () => await program.descriptors() === descriptors,
      "the descriptor is closed",
    );
    assert(await program.memory() - before < 60);
    slow.close();
  },
});

Deno.test("the read buffer of a client shrinks when it sends little", async () => {
  const [most, resting, least] = [65_536, 2_048, 256]; // bytes
  await using server = open({ raw: true, rate: 0 });
  const sizes: number[] = [];
  const { closed } = admit(server, {
    async read(buffer) {
      await turn();
      buffer.fill(10);
      switch (sizes.push(buffer.length)) {
        case 9: // less than the whole buffer for the first time
          return buffer.length - 1;
        case 10: // one byte after that
          return 1;
        case 11:
          return null;
      }
      return buffer.length;
    },
  });
  await within(closed, "the end");
  assertEquals(sizes.slice(8), [most, resting, least]);
});

Deno.test("a rate-limited paste arrives whole while others talk", async () => {
  const rate = 20, burst = 5 * rate; // lines a second, lines at once
  await using server = open({ rate });
  await using alice = await Guest.join(server.port, "alice");
  await using bob = await Guest.join(server.port, "bob");
  await using carol = await Guest.join(server.port, "carol");
  await bob.find(/known as carol/);
  const page = numbered(burst + 1.5 * rate, "line ");
  const started = performance.now();
  await alice.say(...page); // the command /nick was one more
  const received: string[] = [], times: number[] = [];
  while (received.length < page.length) {
    received.push((await bob.find(/^\[alice\]/)).replace("[alice] ", ""));
    times.push(performance.now() - started);
    if (received.length === burst + 10) {
      await carol.say("free to talk");
      await carol.settle();
    }
  }
  assertEquals(received, page);
  const first = times[burst - 5], all = times.at(-1)!;
  assert(first < 500, `the burst took ${first} ms`);
  assert(all > 1_000, `all took ${all} ms only`);
});

Deno.test("lines that a client sent before it left still arrive, at its rate", async () => {
  await using server = open({ rate: 20 });
  await using bob = await Guest.join(server.port);
  const alice = await Guest.join(server.port, "alice");
  await alice.say(...numbered(120, "line "));
  await alice[Symbol.asyncDispose]();
  await bob.find(/line 119$/);
  assertEquals(await bob.next(), "* alice has left the room");
});

Deno.test("a client beyond --max-clients is told that the room is full", async () => {
  await using server = open({ maxClients: 2 });
  await using alice = await Guest.join(server.port);
  await using bob = await Guest.join(server.port);
  await using carol = await Guest.connect(server.port);
  assertEquals(await carol.rest(), ["! The room is full. Try again later."]);
  await bob.say("/quit");
  await alice.find(/guest2 has left/);
  await using _dave = await Guest.join(server.port);
});

Deno.test("a refused connection that has failed already is closed", async () => {
  await using server = open({ maxClients: 1 });
  await using _alice = await Guest.join(server.port);
  const fail = () => Promise.reject(new Deno.errors.ConnectionReset());
  const { closed } = admit(server, { read: fail, write: fail });
  await within(closed, "the close");
});

Deno.test("a client beyond --max-per-address is told so", async () => {
  await using server = open({ maxPerAddress: 1 });
  await using _alice = await Guest.join(server.port);
  await using bob = await Guest.connect(server.port);
  assertMatch((await bob.next())!, /^! Too many here are from your address\./);
  assertEquals(await bob.next(), null);
});

Deno.test({
  name: "without free descriptors the room goes on and newcomers wait",
  ignore: !LINUX,
  async fn() {
    const descriptors = 64;
    const shell = `ulimit -n ${descriptors};`;
    await using program = await Program.start([], { shell });
    await using alice = await Guest.join(program.port, "alice");
    const crowd: Deno.TcpConn[] = [];
    for (let i = 0; i < descriptors + 6; i++) {
      crowd.push(await Deno.connect({ port: program.port }));
    }
    assertMatch(
      await program.errors.find(/./),
      /^parley: Cannot accept connections for now: .*descriptor.*|.*open files/,
    );
    await alice.settle();
    await alice.say("/who");
    await alice.find(/^\* The room contains: /);
    for (const conn of crowd) conn.close();
    await using bob = await Guest.join(program.port, "bob");
    await alice.find(/known as bob/);
    await bob.say("hello");
    await alice.find(/^\[bob\] hello$/);
    program.child.kill("SIGINT");
    assertEquals(await program.errors.rest(), []); // printed once
  },
});

Deno.test({
  name: "connections that are reset before they are accepted delay nobody",
  ignore: !LINUX || !installed("socat"),
  async fn() {
    await using program = await Program.start();
    program.child.kill("SIGSTOP"); // it accepts nothing for the moment
    const target = `TCP:127.0.0.1:${program.port},linger=0`; // resets at the end
    for (let i = 0; i < 20; i++) {
      const args = ["-u", "/dev/null", target];
      await new Deno.Command("socat", { args }).output();
    }
    program.child.kill("SIGCONT");
    await using alice = await Guest.join(program.port);
    await alice.settle();
    program.child.kill("SIGTERM");
    assertEquals(await program.errors.rest(), []); // newcomers never had to wait
  },
});

/** A telnet request, and how many of them one read is answered for: the answers
 * to a read are at most 192 bytes. */
const REQUEST = [IAC, DO, 1], MOST_REQUESTS = 192 / 3;

Deno.test("a client that does not read telnet answers before it joins is too slow", async () => {
  using file = new TemporaryFile("sesame");
  await using server = open({ passwordFile: file.path, rate: 0 });
  const { closed } = admit(server, {
    async read(buffer) {
      await turn();
      for (const i of buffer.keys()) buffer[i] = REQUEST[i % 3];
      return buffer.length - buffer.length % 3;
    },
    write: never,
  });
  await within(closed, "the close");
});

Deno.test("a client that is disconnected while it joins leaves no name behind", async () => {
  await using server = open({ askName: true, rate: 0 });
  // Each client has a few more answers waiting than the one before when it sends its
  // name: for some, the greeting is the byte too much.
  const limit = Math.ceil(PRIVATE_BYTES / REQUEST.length);
  const here: string[] = [];
  let disconnected = 0;
  for (
    let requests = limit - MOST_REQUESTS / 2;
    requests <= limit + MOST_REQUESTS;
    requests += 4
  ) {
    const name = `ghost${requests}`;
    let left = requests, named = false, joined = false, closed = false;
    admit(server, {
      async read(buffer) {
        await turn();
        joined = named;
        if (joined) return await never();
        named = left === 0;
        const count = Math.min(left, MOST_REQUESTS);
        left -= count;
        const input = named
          ? encoder.encode(`${name}\n`)
          : new Array(count).fill(REQUEST).flat();
        buffer.set(input);
        return input.length;
      },
      write: never,
      close() {
        closed = true;
      },
    });
    await eventually(() => joined || closed, "the end of its input");
    if (!closed) here.push(name);
    else if (named) disconnected++;
  }
  assert(disconnected > 0, "none was disconnected after it sent its name");
  await using alice = await Guest.connect(server.port);
  await alice.say("alice");
  assertMatch((await alice.next())!, /name\?$/);
  assertEquals(await alice.next(), `* The room contains: ${here.join(", ")}`);
});

Deno.test("a closed standard output does not stop the room", async () => {
  await using program = await Program.start();
  await program.output[Symbol.asyncDispose]();
  for (let i = 0; i < 3; i++) {
    await using alice = await Guest.join(program.port, "alice");
    await alice.settle();
  }
});

Deno.test("a standard output that nobody reads does not stop the room", async () => {
  await using program = await Program.start(["--max-clients", "1"]);
  // The program prints two lines for each client, of at least 45 bytes; the pipe
  // holds 64 KiB, and the program as much.
  const clients = 65_536 / 45;
  for (let i = 0; i < clients; i++) {
    const guest = await Guest.connect(program.port);
    await guest.next();
    await guest[Symbol.asyncDispose]();
  }
  await eventually(async () => {
    await using guest = await Guest.connect(program.port);
    return (await guest.next())!.startsWith("* Welcome");
  }, "room for a client");
  program.child.kill("SIGINT");
  assertEquals((await within(program.child.status, "the exit", 2_500)).code, 0);
});

Deno.test("lines that standard output did not take are counted", async () => {
  await using program = await Program.start(["--console", "--rate", "0"]);
  await using alice = await Guest.join(program.port);
  const lines = numbered(20_000, "line ");
  await alice.say(...lines);
  await alice.settle();
  // Each line is either shown or counted.
  let shown = 0, missed = 0;
  while (shown + missed < lines.length) {
    const line = await program.output.next();
    if (/^\[guest1\] line \d+$/.test(line!)) shown++;
    missed += Number(/^\((\d+) lines not shown\)$/.exec(line!)?.[1] ?? 0);
  }
  assert(missed > 0);
});

// -- passwords, TLS and addresses

/** The question for the password. */
const ASKED = "* This room has a password. What is it?";

Deno.test("a client receives and sends nothing before it gives the password", async () => {
  using file = new TemporaryFile("open sesame\n");
  const printed: string[] = [];
  await using server = open({ passwordFile: file.path, history: 20 }, printed);
  await using alice = await Guest.connect(server.port);
  assertEquals(await alice.next(), ASKED);
  await alice.say("open sesame");
  assertMatch((await alice.next())!, /^\* Welcome, guest1/);
  assertEquals(await alice.next(), "* The room contains: nobody else yet");

  await using mallory = await Guest.connect(server.port);
  assertEquals(await mallory.next(), ASKED);
  await alice.say("a secret", "/who");
  assertEquals(await alice.next(), "* The room contains: guest1");
  await mallory.say("/who", "hello?", "open sesame!");
  for (let i = 0; i < 3; i++) {
    assertEquals(await mallory.next(), "! That is not the password.");
    if (i < 2) assertEquals(await mallory.next(), ASKED);
  }
  assertEquals(await mallory.next(), null);
  await alice.receivesNothing();

  await using bob = await Guest.connect(server.port);
  await bob.say("open sesame", "thanks"); // at once, as a script does
  assertEquals(await alice.next(), "* guest2 has entered the room");
  assertEquals(await alice.next(), "[guest2] thanks");
  await bob.find(/^\[guest1\] a secret$/);
  await bob.receivesNothing();
  assert(!printed.join().includes("sesame"));
  assertMatch(printed[3], /\(no password, 1 here\)$/);
});

Deno.test("the password is asked for before a name, and in a raw room", async () => {
  using file = new TemporaryFile("x y\r\n");
  await using named = open({ passwordFile: file.path, askName: true });
  await using alice = await Guest.connect(named.port);
  assertEquals(await alice.next(), ASKED);
  await alice.say("x y");
  assertMatch((await alice.next())!, /name\?$/);

  const printed: string[] = [];
  await using raw = open({ passwordFile: file.path, raw: true }, printed);
  await using bob = await Guest.connect(raw.port);
  await using carol = await Guest.connect(raw.port);
  await bob.say("x y");
  await eventually(() => printed.length === 3, "the password is taken");
  await carol.say("wrong", "x y", "hello");
  assertEquals(await bob.next(), ASKED);
  assertEquals(await bob.next(), "hello");
  await raw.stop();
  assertEquals(await carol.rest(), [ASKED, ASKED, "Shutdown Server"]);
});

Deno.test("a client that gives no password within 30 seconds is disconnected", async () => {
  using file = new TemporaryFile("x");
  using _hurry = hurry(30_000);
  await using server = open({ passwordFile: file.path });
  await using alice = await Guest.connect(server.port);
  assertEquals(await alice.rest(), [ASKED, "! That took too long."]);
});

Deno.test({
  name:
    "clients talk over TLS while another stalls and a third fails in the handshake",
  ignore: !OPENSSL,
  async fn() {
    const printed: string[] = [];
    await using server = open(await tlsOptions(), printed);
    const silent = await Deno.connect({ port: server.port });
    await using plain = await Guest.connect(server.port);
    await plain.say("hello in plain text");
    assertEquals((await plain.rest()).join().includes("Welcome"), false);
    await eventually(
      () => printed.some((line) => line.includes("(no TLS, ")),
      "the error",
    );

    using first = await connectTls(server.port);
    await using alice = new Lines(first.readable);
    await alice.find(/^\* The room contains/);
    using second = await connectTls(server.port);
    await using bob = new Lines(second.readable);
    await alice.find(/guest2 has entered/);
    await second.write(encoder.encode("over TLS\n"));
    assertEquals(await alice.next(), "[guest2] over TLS");
    silent.close();
    await server.stop();
    assertEquals((await bob.rest()).at(-1), "* Shutdown Server");
  },
});

Deno.test({
  name: "a TLS handshake that does not end within 30 seconds is abandoned",
  ignore: !OPENSSL,
  async fn() {
    using _hurry = hurry(30_000);
    await using server = open(await tlsOptions());
    await using silent = await Guest.connect(server.port);
    assertEquals(await silent.next(), null);
  },
});

Deno.test({
  name: "an address that is banned during a TLS handshake is refused after it",
  ignore: !OPENSSL,
  async fn() {
    const printed: string[] = [];
    await using server = open(await tlsOptions(), printed);
    const conn = await Deno.connect({
      hostname: "127.0.0.1",
      port: server.port,
    });
    await eventually(() => printed.length === 1, "the connection");
    await server.operate(ReadableStream.from(["/ban 127.0.0.1"]), () => {});
    using banned = await Deno.startTls(conn, await tlsClientOptions());
    await using lines = new Lines(banned.readable);
    assertEquals(await lines.rest(), ["! You were banned."]);
  },
});

Deno.test({
  name: "a client beyond --max-clients is told so over TLS too",
  ignore: !OPENSSL,
  async fn() {
    await using server = open({ ...await tlsOptions(), maxClients: 1 });
    using first = await connectTls(server.port);
    await using alice = new Lines(first.readable);
    await alice.find(/^\* The room contains/);
    using second = await connectTls(server.port);
    await using bob = new Lines(second.readable);
    assertEquals(await bob.rest(), ["! The room is full. Try again later."]);
  },
});

Deno.test({
  name:
    "a last line without its end arrives when a TLS connection ends without close_notify",
  ignore: !OPENSSL,
  async fn() {
    await using server = open(await tlsOptions());
    using conn = await connectTls(server.port);
    await using alice = new Lines(conn.readable);
    await alice.find(/^\* The room contains/);
    const client = new Deno.Command("openssl", {
      args: ["s_client", "-quiet", "-connect", `127.0.0.1:${server.port}`],
      stdin: "piped",
      stdout: "piped",
      stderr: "null",
    }).spawn();
    const input = client.stdin.getWriter();
    await using output = new Lines(client.stdout);
    await output.find(/^\* The room contains/);
    await input.write(encoder.encode("one\nlast"));
    await alice.find(/^\[guest2\] one$/);
    client.kill("SIGKILL");
    await alice.find(/^\[guest2\] last$/);
    await alice.find(/guest2 has left the room$/);
    await client.status;
    await input.close().catch(() => {});
  },
});

Deno.test({
  name: "every descriptor is freed after TLS clients used them all",
  ignore: !LINUX || !OPENSSL,
  async fn() {
    const descriptors = 64;
    const { cert, key } = await certificate();
    await using program = await Program.start(
      ["--tls-cert", cert, "--tls-key", key],
      {
        shell: `ulimit -n ${descriptors};`,
        permissions: ["--allow-net", "--allow-read"],
      },
    );
    using first = await connectTls(program.port);
    await using alice = new Lines(first.readable);
    await alice.find(/^\* The room contains/);
    const before = await program.descriptors();
    for (let wave = 0; wave < 2; wave++) {
      const crowd = await Promise.all(
        Array.from(
          { length: descriptors - 4 },
          () => Guest.connect(program.port),
        ),
      );
      // Some are refused, as there is no descriptor for their TLS.
      await Promise.race(crowd.map((guest) => guest.next()));
      for (const guest of crowd) await guest[Symbol.asyncDispose]();
      await eventually(
        async () => await program.descriptors() <= before + 1,
        "the descriptors",
      );
    }
    using last = await connectTls(program.port);
    await using bob = new Lines(last.readable);
    await bob.find(/^\* The room contains/);
  },
});

Deno.test("addresses outside the allowed networks are disconnected without a word", async () => {
  await using server = open({
    allow: ["::ffff:10.0.0.0/104", "127.0.0.2", "::1/128"],
    host: "::",
  });
  /** What a client from this address receives first: nothing if it is closed. */
  const from = async (hostname: string) => {
    const client = admit(server, {}, { hostname });
    let closed = false;
    client.closed.then(() => closed = true);
    await eventually(() => closed || client.received !== "", "an answer");
    return client.received;
  };
  for (const address of ["10.1.2.3", "::ffff:10.9.9.9", "127.0.0.2", "::1"]) {
    assertMatch(await from(address), /Welcome/);
  }
  for (const address of ["127.0.0.1", "11.0.0.1", "::ffff:127.0.0.3", "::2"]) {
    assertEquals(await from(address), "");
  }
  await using alice = await Guest.connect(server.port); // ::ffff:127.0.0.1
  assertEquals(await alice.next(), null);
});

// -- the operator

Deno.test("the operator speaks as host, sees the room, kicks and bans", async (t) => {
  await using program = await Program.start(["--console", "--quiet"], {
    typing: true,
  });
  const { output } = program;
  await using alice = await Guest.join(program.port, "alice");
  await using bob = await Guest.join(program.port, "bob");
  await alice.find(/known as bob/);
  await output.find(/^\* guest2 is now known as bob$/);

  await t.step("speaks as host", async () => {
    await program.type("hello all", "//path", "\x1b[31mred");
    assertEquals(await alice.next(), "[host] hello all");
    assertEquals(await alice.next(), "[host] /path");
    assertEquals(await alice.next(), "[host] red");
    await bob.find(/red/);
  });
  await t.step("sees messages to everyone, and no private ones", async () => {
    await alice.say("/msg bob secret", "hi", "/me waves");
    assertEquals(await output.next(), "[alice] hi");
    assertEquals(await output.next(), "** alice waves");
    await bob.find(/waves/);
    await alice.find(/secret/);
    await bob.say("/msg host hi", "/nick host");
    assertMatch((await bob.next())!, /^! Nobody here is called host/);
    assertMatch((await bob.next())!, /^! The name host is reserved/);
  });
  await t.step("lists who is here", async () => {
    await program.type("/who");
    assertMatch((await output.next())!, /^\* alice 127\.0\.0\.1:\d+, 0 min$/);
    assertMatch((await output.next())!, /^\* bob 127\.0\.0\.1:\d+, 0 min$/);
  });
  await t.step(
    "gets an answer to commands that cannot be carried out",
    async () => {
      await program.type(
        "/dance",
        "/kick",
        "/kick zoe",
        "/ban zoe",
        "/unban 1.2.3.4",
      );
      assertMatch((await output.next())!, /^! There is no command \/dance\./);
      assertEquals(await output.next(), "! Type /kick NAME [REASON].");
      assertMatch((await output.next())!, /^! Nobody here is called zoe/);
      assertMatch(
        (await output.next())!,
        /^! Nobody here is called zoe, and it is no address/,
      );
      assertMatch((await output.next())!, /^! 1\.2\.3\.4 is not banned/);
      await program.type("/help");
      for (const name of ["who", "kick", "ban", "unban", "banned", "quit"]) {
        await output.find(new RegExp(`^\\* /${name} `));
      }
      await output.find(/^\* TEXT /);
    },
  );
  await t.step("kicks a client", async () => {
    await program.type("/kick bob too loud");
    assertEquals(await bob.next(), "! You were kicked: too loud.");
    assertEquals(await bob.next(), null);
    assertEquals(
      await alice.next(),
      "* bob has left the room (kicked: too loud)",
    );
    assertEquals(
      await output.next(),
      "* bob has left the room (kicked: too loud)",
    );
  });
  await t.step("bans and unbans an address", async () => {
    await using bob = await Guest.join(program.port, "bob");
    await program.type("/ban 127.0.0.1", "/banned");
    await output.find(/^\* 127\.0\.0\.1 is banned\.$/);
    assert((await alice.rest()).includes("! You were banned."));
    assert((await bob.rest()).includes("! You were banned."));
    await output.find(/^\* 127\.0\.0\.1 is banned\.$/);
    await using carol = await Guest.connect(program.port);
    assertEquals(await carol.next(), null);
    await program.type("/unban 127.0.0.1");
    await output.find(/^\* 127\.0\.0\.1 is no longer banned\.$/);
    // The IPv4-mapped form is the same address; octal digits are no address.
    await program.type("/banned", "/ban ::ffff:7f00:1", "/ban 0177.0.0.1");
    await output.find(/^\* Nobody is banned\.$/);
    await output.find(/^\* 127\.0\.0\.1 is banned\.$/);
    await output.find(/^! Nobody here is called 0177\.0\.0\.1, and it is no/);
    await program.type("/unban 127.0.0.1");
    await output.find(/no longer/);
  });
  await t.step("may end standard input, and the room goes on", async () => {
    await program.typeEnd();
    await using carol = await Guest.join(program.port, "carol");
    await carol.settle();
  });
});

Deno.test("the operator stops the server with /quit", async () => {
  await using program = await Program.start(["--console"], { typing: true });
  await program.type("/who");
  await program.output.find(/^\* Nobody is here\.$/);
  await using alice = await Guest.join(program.port);
  await program.type("/quit");
  await program.output.find(/^Shutdown Server \.{6}$/);
  assertEquals(await alice.rest(), ["* Shutdown Server"]);
  assertEquals((await within(program.child.status, "the exit")).code, 0);
});

Deno.test("standard input is not read without --console", async () => {
  await using program = await Program.start([], { typing: true });
  await using alice = await Guest.join(program.port);
  await program.type("hello", "/quit");
  await program.typeEnd();
  await alice.receivesNothing();
});

// -- the log file

Deno.test("public messages are written to the log file, which is the history of the next room", async () => {
  using file = new TemporaryFile("");
  const options = { log: file.path, history: 2, timestamps: true };
  const first = open(options);
  const alice = await Guest.join(first.port, "alice");
  await alice.say("one", "/msg alice private", "/me waves", "/nick bob", "two");
  await alice.find(/known as bob/);
  await first.stop();
  await alice[Symbol.asyncDispose]();
  assertEquals(logged(file), ["[alice] one", "** alice waves", "[bob] two"]);

  await using second = open(options);
  await using carol = await Guest.join(second.port);
  assertMatch((await carol.next())!, /^\d\d:\d\d \*\* alice waves$/);
  assertMatch((await carol.next())!, /^\d\d:\d\d \[bob\] two$/);
  await carol.say("three");
  await eventually(() => file.lines.length === 4, "the line in the file");

  await using third = open({ ...options, history: 0 });
  await using dave = await Guest.join(third.port);
  await dave.receivesNothing();
});

Deno.test("a log file is read from its end, and an unfinished last line is ignored", async () => {
  using file = new TemporaryFile("");
  const old = "2026-01-31T12:34:56.789Z [old] ";
  const megabyte = (old + "x".repeat(100) + "\n").repeat(8_000);
  for (let i = 0; i < 30; i++) {
    await Deno.writeTextFile(file.path, megabyte, { append: true });
  }
  await Deno.writeTextFile(
    file.path,
    `not a line\n${old}last\n${old.slice(0, 20)}`,
    { append: true },
  );
  const started = performance.now();
  await using server = open({ log: file.path, history: 2 });
  assert(performance.now() - started < 200); // of 30 MB
  await using alice = await Guest.join(server.port);
  assertEquals(await alice.next(), "[old] " + "x".repeat(100));
  assertEquals(await alice.next(), "[old] last");
  await alice.say("new");
  await eventually(
    () => / \[guest1\] new$/.test(file.lines.at(-1)!),
    "the line",
  );
});

Deno.test("a line of the log file that is too long for the history is left out", async () => {
  const old = "2026-01-31T12:34:56.789Z [old] ";
  using file = new TemporaryFile(
    `${old}one\n${old}${"x".repeat(1_100_000)}\n${old}two\n`,
  );
  await using server = open({ log: file.path, history: 200 });
  await using alice = await Guest.join(server.port);
  assertEquals(await alice.next(), "[old] two");
});

Deno.test("no part of a line of the log file is taken for a line", async () => {
  const forged = "2026-01-31T12:34:56.789Z [host] The room has moved. ";
  using file = new TemporaryFile("");
  for (let cut = 0; cut < forged.length; cut++) {
    Deno.writeTextFileSync(
      file.path,
      "2026-01-31T12:34:56.789Z [eve] " + forged.repeat(1_000) + "\n" +
        "x".repeat(cut) + "\n",
    );
    await using server = open({ log: file.path, history: 1 });
    await using alice = await Guest.join(server.port);
    await alice.receivesNothing();
  }
});

Deno.test({
  name: "a disk that is too slow is reported once, and the room goes on",
  ignore: !LINUX,
  async fn() {
    const path = `${await Deno.makeTempDir()}/fifo`; // which nothing reads
    await new Deno.Command("mkfifo", { args: [path] }).output();
    await using program = await Program.start(
      ["--log", path, "--rate", "0"],
      { permissions: ["--allow-all"] },
    );
    await using alice = await Guest.join(program.port);
    await flood(alice, 2.4 * WINDOW_LINES);
    await alice.settle();
    program.child.kill("SIGTERM");
    assertEquals((await within(program.child.status, "the exit")).code, 0);
    const [warning, ...more] = await program.errors.rest();
    assertMatch(
      warning,
      /^parley: Some lines are lost: .*; the room goes on\)$/,
    );
    assertEquals(more, []);
  },
});

Deno.test({
  name: "a full disk is reported once, and the room goes on",
  ignore: !LINUX,
  async fn() {
    await using program = await Program.start(["--log", "/dev/full"], {
      permissions: ["--allow-all"], // as Deno wants it for a device
    });
    await using alice = await Guest.join(program.port, "alice");
    await using bob = await Guest.join(program.port, "bob");
    await alice.say("one");
    assertMatch(
      await program.errors.find(/./),
      /^parley: Cannot write: No space left on device.*\(--log \/dev\/full; the room goes on\)$/,
    );
    await alice.say("two");
    await bob.find(/two/);
    program.child.kill("SIGTERM");
    assertEquals(
      (await within(program.child.status, "the exit", 3_000)).code,
      0,
    );
    assertEquals(await program.errors.rest(), []);
  },
});

Deno.test("a file that cannot be used gives one line and exit status 1", async (t) => {
  using empty = new TemporaryFile("\n"), file = new TemporaryFile("x");
  using unicode = new TemporaryFile("x\0y\0\n\0"); // as in UTF-16
  const cases: [args: string[], permissions: string[], message: string][] = [
    [
      ["--password-file", file.path],
      [],
      `Cannot read ${file.path}: it is not permitted (run it with --allow-read=${file.path})`,
    ],
    [
      ["--password-file", empty.path],
      [`--allow-read=${empty.path}`],
      `Cannot use ${empty.path}: its first line is to be the password, at most 4096 bytes of UTF-8`,
    ],
    [
      ["--password-file", unicode.path],
      [`--allow-read=${unicode.path}`],
      `Cannot use ${unicode.path}: its first line is to be the password, at most 4096 bytes of UTF-8`,
    ],
    [
      ["--password-file", "/no/such"],
      ["--allow-read"],
      "Cannot read /no/such: there is no such file",
    ],
    [
      ["--tls-cert", file.path, "--tls-key", file.path],
      [],
      `Cannot read ${file.path}: it is not permitted (run it with --allow-read=${file.path})`,
    ],
    [
      ["--log", file.path],
      [],
      `Cannot open ${file.path}: it is not permitted (run it with --allow-read=${file.path} --allow-write=${file.path})`,
    ],
    [
      ["--log", "/"],
      ["--allow-read", "--allow-write"],
      "Cannot open /: Is a directory (os error 21): open '/'",
    ],
    [
      ["--log", "/no/such/file"],
      ["--allow-read", "--allow-write"],
      "Cannot open /no/such/file: there is no such file",
    ],
  ];
  for (const [args, permissions, message] of cases) {
    await t.step(message.replaceAll(/\/tmp\/\w+/g, "FILE"), async () => {
      assertEquals(
        await run(["--host", "127.0.0.1", "-p", "0", ...args], [
          "--allow-net",
          ...permissions,
        ]),
        { code: 1, output: "", errors: `parley: ${message}\n` },
      );
    });
  }
  await t.step({
    name: "a certificate that is invalid or has another key",
    ignore: !OPENSSL,
    async fn() {
      const address = ["--host", "127.0.0.1", "-p", "0"];
      const { key } = await certificate();
      const other = await makeCertificate();
      for (const cert of [file.path, other.cert]) {
        const { code, errors } = await run(
          [...address, "--tls-cert", cert, "--tls-key", key],
          ["--allow-net", "--allow-read"],
        );
        assertEquals(code, 1);
        assertMatch(errors, /^parley: Cannot use \S+ with \S+: .*PEM.*\n$/);
      }
    },
  });
});

// -- the command line

Deno.test("a command line that cannot be used gives one line and exit status 2", async (t) => {
  const cases: [args: string, message: string][] = [
    ["--prot 1", "Unknown option --prot (did you mean --port?)"],
    ["-x", "Unknown option -x (did you mean -p?)"],
    ["--port", "Option --port needs a value: --port PORT"],
    [
      "--port banana",
      "Cannot use banana for --port: give a whole number from 0 to 65535",
    ],
    [
      "--port 70000",
      "Cannot use 70000 for --port: give a whole number from 0 to 65535",
    ],
    [
      "--port -1",
      "Cannot use -1 for --port: give a whole number from 0 to 65535",
    ],
    [
      "--rate -3",
      "Cannot use -3 for --rate: give a whole number from 0 to 1000000",
    ],
    [
      "--history 1.5",
      "Cannot use 1.5 for --history: give a whole number from 0 to 10000",
    ],
    [
      "--max-clients 0",
      "Cannot use 0 for --max-clients: give a whole number from 1 to 1000000",
    ],
    [
      "--host not!one",
      "Cannot use not!one for --host: give an address, such as 127.0.0.1 or ::",
    ],
    ["--host ", "Option --host needs a value: --host ADDRESS"], // $HOST, unset
    ["--raw=no", "Option --raw takes no value"],
    ["-h=1", "Option --help takes no value"],
    ["--raw true", "Option --raw takes no value"],
    [
      "--host two\nlines",
      "Cannot use two lines for --host: give an address, such as 127.0.0.1 or ::",
    ],
    [
      "--raw --ask-name",
      "Cannot use --raw with --ask-name: a raw room relays lines as they are",
    ],
    [
      "--allow 10.0.0.0/33",
      "Cannot use 10.0.0.0/33 for --allow: give a network, such as 192.168.0.0/16",
    ],
    [
      "--allow ten",
      "Cannot use ten for --allow: give a network, such as 192.168.0.0/16",
    ],
    [
      "--tls-cert c.pem",
      "Cannot use --tls-cert alone: give --tls-key FILE too",
    ],
    ["--tls-key k.pem", "Cannot use --tls-key alone: give --tls-cert FILE too"],
    ["8008", "Unexpected argument 8008 (every option begins with --)"],
    ["0", "Unexpected argument 0 (every option begins with --)"],
  ];
  for (const [args, message] of cases) {
    await t.step(args, async () => {
      assertEquals(await run(args.split(" ")), {
        code: 2,
        output: "",
        errors: `parley: ${message}\n`,
      });
    });
  }
});

Deno.test("a room that cannot be opened gives one line and exit status 1", async (t) => {
  const fails = async (
    args: string[],
    pattern: RegExp,
    permissions?: string[],
  ) => {
    const { code, output, errors } = await run(args, permissions);
    assertEquals([code, output], [1, ""]);
    assertMatch(errors, pattern);
    assertEquals(errors.trim().split("\n").length, 1);
  };
  await t.step("the port is in use", async () => {
    await using server = open();
    await fails(
      ["--host", "127.0.0.1", "-p", `${server.port}`],
      /^parley: Cannot listen on 127\.0\.0\.1:\d+: the port is in use \(choose another with --port\)\n$/,
    );
  });
  const cases: [
    what: string,
    args: string[],
    RegExp,
    permissions?: string[],
  ][] = [
    [
      "the address is not this machine's",
      ["--host", "203.0.113.1"],
      /^parley: Cannot listen on 203\.0\.113\.1:8008: .*--host/,
    ],
    [
      "the address is invalid",
      ["--host", "999.1.1.1"],
      /^parley: Cannot listen on 999\.1\.1\.1:8008: .*--host/,
    ],
    [
      "the network is not permitted",
      [],
      /^parley: Cannot listen on 0\.0\.0\.0:8008: .*--allow-net\)\n$/,
      [],
    ],
  ];
  for (const [what, ...given] of cases) {
    await t.step(what, () => fails(...given));
  }
});

Deno.test("--help fits 80 columns and names every option and default", async () => {
  const { code, output } = await run(["--help"], []);
  assertEquals(code, 0);
  for (const line of output.split("\n")) assert(line.length <= 80, line);
  const flags: [string, string][] = [
    ["--host ADDRESS", "(0.0.0.0)"],
    ["-p, --port PORT", "(8008)"],
    ["--raw", ""],
    ["--ask-name", ""],
    ["--timestamps", ""],
    ["--history LINES", "(20)"],
    ["--rate LINES", "(20)"],
    ["--max-clients N", "(10000)"],
    ["--max-per-address N", "(0)"],
    ["--allow CIDR", "(all)"],
    ["--password-file FILE", "(none)"],
    ["--tls-cert FILE", "(none)"],
    ["--tls-key FILE", "(none)"],
    ["--log FILE", "(none)"],
    ["--console", ""],
    ["--quiet", ""],
    ["-h, --help", ""],
    ["-V, --version", ""],
  ];
  for (const [flag, value] of flags) {
    const line = output.split("\n").find((line) => line.includes(`${flag} `));
    assert(line?.includes(value), `${flag} ${value} in ${line}`);
  }
});

/** Whether `deno compile` can download the runtime that it puts into a binary. */
async function canCompile(): Promise<boolean> {
  using program = new TemporaryFile("");
  using binary = new TemporaryFile("");
  const { success } = await new Deno.Command(Deno.execPath(), {
    args: ["compile", "--quiet", "--ext=ts", "-o", binary.path, program.path],
    stdout: "null",
    stderr: "null",
    signal: AbortSignal.timeout(60_000),
  }).output();
  return success;
}

Deno.test("the compiled binary serves, helps and refuses like the script", async (t) => {
  await t.step({
    name: "compiled with a runtime that could be downloaded",
    ignore: !await canCompile(),
    fn: testBinary,
  });
});

async function testBinary(): Promise<void> {
  const directory = await Deno.makeTempDir();
  // Like the task, into a directory of its own.
  const command = config.tasks.compile.command
    .replace("--output parley", `--quiet --output ${directory}/parley`)
    .replace("main.ts", MAIN);
  const args = command.split(" ").slice(1);
  const compiled = new Deno.Command(Deno.execPath(), { args });
  assertEquals((await finished(compiled)).code, 0);
  const parley = (...args: string[]) =>
    finished(new Deno.Command(`${directory}/parley`, { args }));
  assertEquals(
    (await parley("--version")).output,
    `parley ${config.version}\n`,
  );
  assertMatch((await parley("--help")).output, /^Usage: +parley \[OPTIONS\]$/m);
  assertEquals((await parley("--prot")).code, 2);

  using log = new TemporaryFile("");
  using password = new TemporaryFile("sesame\n");
  const options = ["--log", log.path, "--password-file", password.path];
  const address = ["--host", "127.0.0.1", "--port", "0", "--console"];
  const child = new Deno.Command(`${directory}/parley`, {
    args: [...address, ...options, "--allow", "127.0.0.0/8"],
    stdin: "piped",
    stdout: "piped",
  }).spawn();
  await using output = new Lines(child.stdout);
  const line = await output.find(/^Listening on /);
  const port = Number(/:(\d+)\. Join/.exec(line)![1]);
  await using alice = await Guest.connect(port);
  await alice.say("sesame", "hello");
  await output.find(/^\[guest1\] hello$/);
  child.kill("SIGTERM");
  assertEquals((await child.status).code, 0);
  assertEquals(logged(log), ["[guest1] hello"]);
  await child.stdin.close();
  await Deno.remove(directory, { recursive: true });
}

Deno.test("--version prints the version in deno.json", async () => {
  const { code, output } = await run(["-V"], []);
  assertEquals([code, output], [0, `parley ${config.version}\n`]);
});

Deno.test("the server asks the npm registry for deno-std and nothing else", async () => {
  const asked = new Set<string>();
  await using registry = Deno.serve({
    hostname: "127.0.0.1",
    port: 0,
    onListen() {},
  }, ({ url }) => {
    asked.add(new URL(url).pathname.split("/")[1]);
    return new Response("", { status: 404 });
  });
  const home = await Deno.makeTempDir(); // without a cache and without an .npmrc
  const command = new Deno.Command(Deno.execPath(), {
    args: ["run", "--no-prompt", MAIN, "--version"],
    env: {
      HOME: home,
      DENO_DIR: home,
      NPM_CONFIG_REGISTRY: `http://127.0.0.1:${registry.addr.port}`,
    },
  });
  await within(finished(command), "the exit");
  await Deno.remove(home, { recursive: true });
  assertEquals([...asked], ["deno-std"]);
});

Deno.test("--quiet prints no joins and leaves", async () => {
  await using program = await Program.start(["--quiet"]);
  await using alice = await Guest.join(program.port);
  await alice.settle();
  program.child.kill("SIGINT");
  assertEquals(await program.output.rest(), ["Shutdown Server ......"]);
});

// -- embedding

Deno.test("several rooms in one process are independent", async () => {
  await using one = open();
  const two = open({ raw: true });
  await using alice = await Guest.join(one.port);
  await using bob = await Guest.connect(two.port);
  await bob.say("into the other room");
  await two.stop();
  await two.finished;
  assertEquals(await bob.rest(), ["Shutdown Server"]);
  await using carol = await Guest.join(one.port);
  await carol.say("hello");
  assertEquals(await alice.next(), "* guest2 has entered the room");
  assertEquals(await alice.next(), "[guest2] hello");
});

Deno.test("ChatServer.listen refuses options that cannot be used", () => {
  for (
    const [options, message] of [
      [{ port: 70_000 }, "Cannot use 70000 for --port"],
      [{ rate: NaN }, "Cannot use NaN for --rate"],
      [{ maxClients: 1.5 }, "Cannot use 1.5 for --max-clients"],
      [{ allow: ["nowhere"] }, "Cannot use nowhere for --allow"],
      [{ raw: true, askName: true }, "Cannot use --raw with --ask-name"],
      [{ host: null }, "Cannot use null for host: give a string"],
      [{ allow: "10.0.0.0/8" }, "Cannot use 10.0.0.0/8 for allow: give a list"],
      [{ raw: "false" }, "Cannot use false for raw: give a boolean"],
      [{ pasword: "x" }, "Unknown option pasword"],
    ] as [Partial<Options>, string][] // as JavaScript can pass them
  ) assertThrows(() => ChatServer.listen(options), UsageError, message);
});

Deno.test("an option that is undefined has its default", async () => {
  await using server = open({ rate: undefined, maxClients: undefined });
  await using alice = await Guest.join(server.port);
  await using bob = await Guest.join(server.port);
  await alice.say("hello");
  assertEquals(await bob.next(), "[guest1] hello");
});

Deno.test("an error thrown by a callback is reported to its program, and the room goes on", async () => {
  const errors: unknown[] = [];
  const caught = (event: ErrorEvent) => {
    event.preventDefault();
    errors.push(event.error);
  };
  addEventListener("error", caught);
  try {
    const mine = new Error("mine"), yours = new Error("yours");
    await using server = ChatServer.listen({ host: "127.0.0.1", port: 0 }, {
      print() {
        throw mine;
      },
    });
    await server.operate(ReadableStream.from([]), () => {
      throw yours;
    });
    await using alice = await Guest.join(server.addr.port);
    await alice.settle();
    assertEquals(errors, [mine, yours]);
  } finally {
    removeEventListener("error", caught);
  }
});

Deno.test("a connection whose methods throw disconnects its own client only", async () => {
  await using server = open();
  const fail = (): never => {
    throw new Error("it has failed");
  };
  admit(server, { write: fail, close: fail });
  const read = () => Promise.reject(new Error("it has failed"));
  admit(server, { read, write: never, close: fail });
  const methods = { write: never, close: fail, closeWrite: fail };
  admit(server, { ...methods, read: fail });
  admit(server, { ...methods, read: () => Promise.resolve(null) });
  await using alice = await Guest.join(server.port, "alice");
  await alice.settle();
});

Deno.test("console input that begins after the end does not delay it", async () => {
  const printed: string[] = [];
  const server = open({}, printed);
  admit(server, { write: never });
  await eventually(() => printed.length === 1, "the client");
  const stopped = server.stop();
  await new Promise((resolve) => setTimeout(resolve));
  await server.operate(ReadableStream.from(["hello"]), () => {});
  await within(stopped, "the end");
});

Deno.test("a room that was empty once stops as usual", async () => {
  const server = open();
  const alice = await Guest.join(server.port);
  await alice.say("/quit");
  await alice.rest();
  await using bob = await Guest.join(server.port);
  await within(server.stop(), "the end");
  assertEquals(await bob.rest(), ["* Shutdown Server"]);
});

Deno.test("a port can be used again as soon as its room is stopped", async () => {
  const first = open();
  await using alice = await Guest.join(first.port);
  await first.stop();
  await using second = open({ port: first.port });
  await using _bob = await Guest.join(second.port);
  await alice.rest();
});

// -- faults

/** Tests that a room in which alice is recovers from a fault: the same people and
 * descriptors, little more memory, nothing on standard error. */
function recovers(
  from: string,
  fault: (program: Program, alice: Guest) => Promise<void>,
): void {
  Deno.test({
    name: `the room recovers from ${from}`,
    ignore: !LINUX,
    async fn() {
      await using program = await Program.start(["--rate", "0"]);
      await using alice = await Guest.join(program.port, "alice");
      const descriptors = await program.descriptors();
      const memory = await program.memory();
      await fault(program, alice);
      await eventually(
        async () => await program.descriptors() <= descriptors,
        "the descriptors are back",
      );
      await alice.say("/who");
      await alice.find(/^\* The room contains: alice$/);
      const more = await program.memory() - memory;
      assert(more < 40, `${more} MiB more`);
      program.child.kill("SIGTERM");
      assertEquals((await within(program.child.status, "the exit")).code, 0);
      assertEquals(await program.errors.rest(), []);
    },
  });
}

recovers(
  "twenty clients that leave in the middle of a line",
  async (program, alice) => {
    const guests: Guest[] = [];
    for (let i = 0; i < 20; i++) {
      guests.push(await Guest.join(program.port));
      await guests[i].send("half a li");
    }
    await using bob = await Guest.join(program.port, "bob");
    await bob.say("a whole one");
    await alice.find(/^\[bob\] a whole one$/);
    for (const guest of guests) {
      await guest[Symbol.asyncDispose]();
      await alice.find(/^\[guest\d+\] half a li$/); // it was the end of the input
      await alice.find(/^\* guest\d+ has left the room$/);
    }
  },
);

recovers(
  "twenty connections that are reset in the middle of writes",
  async (program, alice) => {
    const conns: Deno.TcpConn[] = [];
    for (let i = 0; i < 20; i++) {
      conns.push(await Deno.connect({ port: program.port }));
      await alice.find(/has entered the room$/);
    }
    await flood(alice, 3_000); // more than their buffers take
    await alice.settle();
    for (const conn of conns) conn.close(); // with unread input: a reset
    for (let left = 0; left < 20; left++) {
      await alice.find(
        /has left the room$/,
      );
    }
  },
);

recovers("a client that sends random bytes", async (program, alice) => {
  await using mallory = await Guest.join(program.port, "mallory");
  const noise = new Uint8Array(65_536);
  for (let i = 0; i < 16; i++) {
    await mallory.send(crypto.getRandomValues(noise));
  }
  await mallory.conn.closeWrite();
  for (let line; !(line = (await alice.next())!).includes("has left");) {
    assert(!FORBIDDEN.test(line), JSON.stringify(line));
    assertMatch(
      line,
      /^\[mallory\] |^\* guest2 is now |^\* \S+ has (enter|left)/,
    );
  }
});

Deno.test("a SIGTERM in the middle of a flood loses no line that was sent to the room", async () => {
  using file = new TemporaryFile("");
  await using program = await Program.start(
    ["--rate", "0", "--log", file.path],
    { permissions: ["--allow-net", "--allow-read", "--allow-write"] },
  );
  await using alice = await Guest.join(program.port, "alice");
  using bob = await Deno.connect({ port: program.port });
  await alice.find(/has entered the room$/);

  // Bob's bytes are kept as they are and split into lines at the end: a busy
  // machine must not make him slower than the second that a shutdown gives him.
  const received: Uint8Array<ArrayBuffer>[] = [];
  let lines = 0, ended = false, progress = Promise.withResolvers<void>();
  const receiving = (async () => {
    const buffer = new Uint8Array(1_048_576);
    for (let count; (count = await bob.read(buffer)) !== null;) {
      const bytes = buffer.slice(0, count);
      received.push(bytes);
      for (const byte of bytes) if (byte === 10) lines++;
      progress.resolve();
      progress = Promise.withResolvers();
    }
    ended = true;
    progress.resolve();
  })();
  // For the same reason alice is never more than 100,000 lines, 2 MB, ahead of him.
  const batch = 1_000, ahead = 100 * batch;
  const flooding = (async () => {
    for (let sent = 0;; sent += batch) {
      while (sent - lines > ahead && !ended) await progress.promise;
      const numbers = Array.from({ length: batch }, (_, i) => sent + i);
      await alice.say(...numbers.map((number) => `line ${number}`));
    }
  })().catch(() => {}); // it fails when the server ends
  await eventually(() => lines > 20_000, "the first lines");
  program.child.kill("SIGTERM");
  assertEquals((await within(program.child.status, "the exit")).code, 0);
  await within(receiving, "the end of bob's connection");
  await within(flooding, "the end of alice's connection");

  const text = await new Blob(received).text();
  const [said, end] = text.split("* Shutdown Server\n");
  assertEquals(end, "", "after the last line");
  const messages = said.split("\n").slice(0, -1)
    .filter((line) => !line.startsWith("* ")); // the greeting
  assert(messages.length > 20_000);
  const expected = numbered(messages.length, "[alice] line ");
  assertEquals(messages, expected);
  assertEquals(logged(file), expected);
  assertEquals(await program.errors.rest(), []);
});

Deno.test("a system clock that jumps does not change the rate limit", async () => {
  const rate = 100, burst = 5 * rate;
  await using server = open({ rate, timestamps: true });
  await using alice = await Guest.join(server.port, "alice");
  await using bob = await Guest.join(server.port, "bob");
  const { now } = Date;
  try {
    // The first 500 lines are not paced, the others are: 30 lines in 300 ms.
    for (const [hours, lines] of [[-24, burst + 30], [48, 30]]) {
      Date.now = () => now() + hours * 3_600_000;
      const started = performance.now();
      await alice.say(...numbered(lines, "line "));
      await bob.find(new RegExp(` \\[alice\\] line ${lines - 1}$`));
      assert(performance.now() - started > 250, "they were paced");
    }
  } finally {
    Date.now = now;
  }
});
