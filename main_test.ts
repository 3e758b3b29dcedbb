/**
 * Tests of Parley: on real sockets, and on real processes where it is about
 * signals, exit status, what is printed, permissions or limits of the system.
 *
 * A test waits for what it expects, and fails if that has not come in time.
 */
import { assert, assertEquals, assertMatch, assertThrows } from "@std/assert";
import fc from "fast-check";
import { TextLineStream as UntypedLineStream } from "@std/streams/text-line-stream";
import config from "./deno.json" with { type: "json" };
import {
  ChatServer,
  cleanLine,
  type Connection,
  normalizeName,
  type Options,
  parseOptions,
  UsageError,
} from "./main.ts";

// The npm build of @std has no types.
const TextLineStream: new () => TransformStream<string, string> =
  UntypedLineStream;

const encoder = new TextEncoder();
const WAIT_MILLISECONDS = 8_000;
const LINUX = Deno.build.os === "linux";

/** Resolves like `promise`, or fails when that takes too long. */
async function within<T>(
  promise: Promise<T>,
  what: string,
  milliseconds = WAIT_MILLISECONDS,
): Promise<T> {
  let timer;
  const late = new Promise<never>((_, reject) => {
    timer = setTimeout(() => reject(new Error(`Late: ${what}`)), milliseconds);
  });
  try {
    return await Promise.race([promise, late]);
  } finally {
    clearTimeout(timer);
  }
}

/** Waits until `check` holds. */
async function eventually(
  check: () => boolean | Promise<boolean>,
  what: string,
): Promise<void> {
  const end = performance.now() + WAIT_MILLISECONDS;
  while (!await check()) {
    if (performance.now() > end) throw new Error(`Late: ${what}`);
    await new Promise((resolve) => setTimeout(resolve, 10));
  }
}

/** The lines of a stream, to be waited for one by one. */
class Lines implements AsyncDisposable {
  #reader: ReadableStreamDefaultReader<string>;

  constructor(bytes: ReadableStream<Uint8Array<ArrayBuffer>>) {
    this.#reader = bytes.pipeThrough(new TextDecoderStream())
      .pipeThrough(new TextLineStream()).getReader();
  }

  /** The next line; `null` at the end, however it came. */
  async next(): Promise<string | null> {
    try {
      const { done, value } = await within(this.#reader.read(), "a line");
      return done ? null : value;
    } catch (error) {
      if (error instanceof Deno.errors.ConnectionReset) return null;
      throw error;
    }
  }

  /** The next line that matches, whatever stands before it. */
  async find(pattern: RegExp): Promise<string> {
    const passed: string[] = [];
    for (let line; (line = await this.next()) !== null;) {
      if (pattern.test(line)) return line;
      passed.push(line);
    }
    throw new Error(`No line ${pattern} in: ${passed.join(" | ")}`);
  }

  async rest(): Promise<string[]> {
    const lines: string[] = [];
    for (let line; (line = await this.next()) !== null;) lines.push(line);
    return lines;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.#reader.cancel().catch(() => {});
  }
}

/** Someone at a terminal. */
class Guest extends Lines {
  private constructor(readonly conn: Deno.TcpConn) {
    super(conn.readable);
  }

  static async connect(port: number): Promise<Guest> {
    const conn = await Deno.connect({ hostname: "127.0.0.1", port });
    conn.setNoDelay(true);
    return new Guest(conn);
  }

  /** Comes in, and has read the greeting. */
  static async join(port: number, name?: string): Promise<Guest> {
    const guest = await Guest.connect(port);
    await guest.find(/^\* The room contains: /);
    if (name) {
      await guest.say(`/nick ${name}`);
      await guest.find(new RegExp(`is now known as ${name}$`));
    }
    return guest;
  }

  async say(...lines: string[]): Promise<void> {
    await this.send(lines.map((line) => line + "\n").join(""));
  }

  async send(content: string | number[] | Uint8Array): Promise<void> {
    let bytes = typeof content === "string"
      ? encoder.encode(content)
      : Uint8Array.from(content);
    while (bytes.length) bytes = bytes.subarray(await this.conn.write(bytes));
  }

  /** Waits until the server has read everything that was sent before. */
  async settle(): Promise<void> {
    await this.say("/settled?");
    await this.find(/^! There is no command \/settled\?/);
  }

  /** Makes sure that nothing more has come. */
  async heardAll(): Promise<void> {
    await this.say("/settled?");
    assertMatch((await this.next())!, /^! There is no command \/settled\?/);
  }
}

/** A room in this process. */
function open(options: Partial<Options> = {}, printed: string[] = []) {
  const server = ChatServer.listen(
    { host: "127.0.0.1", port: 0, history: 0, ...options },
    { print: (line) => printed.push(line) },
  );
  return Object.assign(server, { port: server.addr.port });
}

/** A room in a process of its own, as a person starts it. */
class Program implements AsyncDisposable {
  readonly output: Lines;
  readonly errors: Lines;

  private constructor(
    readonly child: Deno.ChildProcess,
    readonly port: number,
    output: Lines,
  ) {
    this.output = output;
    this.errors = new Lines(child.stderr);
  }

  static command(
    args: string[],
    permissions = ["--allow-net"],
    shell = "",
    stdin: "null" | "piped" = "null",
  ) {
    const main = new URL("main.ts", import.meta.url).pathname;
    const words = [Deno.execPath(), "run", ...permissions, main, ...args];
    const options = {
      stdin,
      stdout: "piped",
      stderr: "piped",
      env: { NO_COLOR: "1" },
    } as const;
    return shell
      ? new Deno.Command("bash", {
        args: ["-c", `${shell} exec "$@"`, "bash", ...words],
        ...options,
      })
      : new Deno.Command(words[0], { args: words.slice(1), ...options });
  }

  static async start(
    args: string[] = [],
    { shell = "", permissions = ["--allow-net"], typing = false } = {},
  ): Promise<Program> {
    const child = Program.command(
      ["--host", "127.0.0.1", "--port", "0", ...args],
      permissions,
      shell,
      typing ? "piped" : "null",
    ).spawn();
    const output = new Lines(child.stdout);
    const line = await output.find(/^Listening on /);
    return new Program(child, Number(/:(\d+)\. Join/.exec(line)![1]), output);
  }

  /** Types lines on its standard input. */
  async type(...lines: string[]): Promise<void> {
    this.#typist ??= this.child.stdin.getWriter();
    const text = lines.map((line) => line + "\n").join("");
    await this.#typist.write(encoder.encode(text));
  }

  /** Ends its standard input. */
  async typeEnd(): Promise<void> {
    await this.#typist?.close();
    this.#typist = null;
  }

  #typist: WritableStreamDefaultWriter<Uint8Array> | null = null;

  /** How many descriptors the process has open. */
  async descriptors(): Promise<number> {
    return (await Array.fromAsync(Deno.readDir(`/proc/${this.child.pid}/fd`)))
      .length;
  }

  /** Its resident memory, in MiB. */
  async memory(): Promise<number> {
    const status = await Deno.readTextFile(`/proc/${this.child.pid}/status`);
    return Number(/VmRSS:\s+(\d+)/.exec(status)![1]) / 1_024;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    // The gentle signal first: a process that is killed reports no coverage.
    const kill = (signal: Deno.Signal) => {
      try {
        this.child.kill(signal);
      } catch { /* it has ended already */ }
    };
    kill("SIGTERM");
    const timer = setTimeout(() => kill("SIGKILL"), WAIT_MILLISECONDS);
    await this.child.status;
    clearTimeout(timer);
    await this.#typist?.close().catch(() => {});
    await this.output[Symbol.asyncDispose]();
    await this.errors[Symbol.asyncDispose]();
  }
}

/** Lets so many milliseconds of the servers in this process, which they wait for
 * something, pass in a tenth of a second. */
function hurry(awaited: number): Disposable {
  const { setTimeout } = globalThis;
  globalThis.setTimeout =
    ((run: () => void, milliseconds: number) =>
      setTimeout(
        run,
        milliseconds === awaited ? 100 : milliseconds,
      )) as typeof setTimeout;
  return {
    [Symbol.dispose]() {
      globalThis.setTimeout = setTimeout;
    },
  };
}

/** Lets everything else that is ready run first. */
function turn(): Promise<void> {
  return new Promise((resolve) => setImmediate(resolve));
}

/** Whether this machine has a program, such as a client. */
function installed(name: string): boolean {
  const { code } = new Deno.Command("bash", {
    args: ["-c", 'command -v "$0"', name],
    stdout: "null",
  }).outputSync();
  return code === 0;
}

/** Runs the program to its end. */
async function run(
  args: string[],
  permissions?: string[],
): Promise<{ code: number; output: string; errors: string }> {
  const command = Program.command(args, permissions);
  const { code, stdout, stderr } = await within(command.output(), "the end");
  const text = (bytes: Uint8Array) => new TextDecoder().decode(bytes);
  return { code, output: text(stdout), errors: text(stderr) };
}

// -- the classic system

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

Deno.test("comings and goings are printed with their count", async () => {
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

/** Has so much said that the receive buffer of one who does not read is full. */
async function flood(from: Guest, lines: number, size = 1_000): Promise<void> {
  const line = "x".repeat(size);
  for (let sent = 0; sent < lines; sent += 100) {
    await from.say(
      ...Array.from(
        { length: Math.min(100, lines - sent) },
        (_, i) => `${sent + i} ${line}`,
      ),
    );
  }
}

/** Fills the room with people who never read, a megabyte apart: whatever the
 * system's buffers hold, some are stalled by the end and not too slow yet. */
async function stall(program: Program): Promise<Deno.TcpConn[]> {
  const stalled: Deno.TcpConn[] = [];
  const talker = await Guest.connect(program.port);
  for (let megabyte = 0; megabyte < 14; megabyte++) {
    stalled.push(await Deno.connect({ port: program.port }));
    await program.output.find(
      new RegExp(`:${stalled.at(-1)!.localAddr.port} `),
    );
    await flood(talker, 1_000);
  }
  await talker[Symbol.asyncDispose]();
  await program.output.find(new RegExp(`by .*:${talker.conn.localAddr.port} `));
  return stalled;
}

Deno.test("clients that never read delay the end by a second at most", async () => {
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
  assertEquals(code, 130); // 128 + SIGINT, as shells have it; 0 after the wait
  for (const conn of stalled) conn.close();
});

// -- a room with names

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
  await t.step("/ignore silences one person until it is repeated", async () => {
    await alice.find(/carol has left/);
    await bob.find(/carol has left/);
    await bob.say("/ignore alice");
    assertMatch((await bob.next())!, /^\* You do not hear alice now\./);
    await alice.say("unheard", "/me unseen", "/msg bob unread");
    await alice.find(/^\[you -> bob\] unread$/);
    await alice.say("/nick noise", "/nick alice");
    assertEquals(await bob.next(), "* alice is now known as noise");
    assertEquals(await bob.next(), "* noise is now known as alice");
    await bob.say("/ignore alice");
    assertEquals(await bob.next(), "* You hear alice again.");
    await alice.say("heard");
    assertEquals(await bob.next(), "[alice] heard");
  });
  await t.step("/quiet silences comings and goings", async () => {
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
    await carol.say("/quit Too slow"); // it was not the server who said so
    await alice.find(/^\* carol has left the room \("Too slow"\)$/);
  });
});

Deno.test("what cannot be done is answered to its sender alone", async () => {
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

Deno.test("a newcomer is shown the last public lines", async () => {
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
  await using server = open({ history: 10_000, rate: 0 });
  await using alice = await Guest.join(server.port, "alice");
  await flood(alice, 400, 4_000);
  await alice.settle();
  await using bob = await Guest.join(server.port);
  await alice.say("the last");
  const shown = [await bob.next()];
  while (!shown.at(-1)!.endsWith(" the last")) shown.push(await bob.next());
  assert(shown.length > 200 && shown.length < 270, `${shown.length} lines`);
});

Deno.test("the time of day stands before what is said", async () => {
  await using server = open({ timestamps: true, history: 1 });
  await using alice = await Guest.join(server.port, "alice");
  await using bob = await Guest.join(server.port, "bob");
  await alice.say("hello", "/me waves");
  assertMatch((await bob.next())!, /^([01]\d|2[0-3]):[0-5]\d \[alice\] hello$/);
  assertMatch((await bob.next())!, /^\d\d:\d\d \*\* alice waves$/);
  await using carol = await Guest.join(server.port);
  assertMatch((await carol.next())!, /^\d\d:\d\d \*\* alice waves$/);
});

Deno.test("the list of who is here counts those past twenty", async () => {
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

Deno.test("a crowd hears of comings and goings in one line a second", async () => {
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

/** Where those come from whose connections are in memory. */
const ELSEWHERE = { hostname: "192.0.2.1", port: 1 };

function never(): Promise<never> {
  return new Promise(() => {});
}

/** Many who hear in memory, of whom some never take what they are written. */
function admitCrowd(server: ChatServer, size: number, stalled = 0): void {
  for (let i = 0; i < size; i++) {
    server.admit({
      read: never,
      write: (bytes) => i < stalled ? never() : Promise.resolve(bytes.length),
      close() {},
    }, ELSEWHERE);
  }
}

Deno.test("a crowd hears how many of those who left were too slow", async () => {
  using _hurry = hurry(1_000);
  await using server = open({ rate: 0 });
  await using alice = await Guest.join(server.port, "alice");
  admitCrowd(server, 60, 2);
  await alice.find(/people have entered/);
  await flood(alice, 5_000);
  assertEquals(
    await alice.find(/left/),
    "* 2 people have left the room (2 too slow)",
  );
});

Deno.test("nobody is always the last to hear", async () => {
  await using server = open({ raw: true, rate: 0 });
  let heard = 0, last = Promise.withResolvers<number>();
  for (let i = 0; i < 5; i++) {
    server.admit({
      read: never,
      write(bytes) {
        if (++heard % 5 === 0) last.resolve(i);
        return Promise.resolve(bytes.length);
      },
      close() {},
    }, ELSEWHERE);
  }
  await using alice = await Guest.connect(server.port);
  const wereLast = new Set<number>();
  for (let line = 0; line < 100; line++) {
    last = Promise.withResolvers();
    await alice.say("hi");
    wereLast.add(await within(last.promise, "the line"));
  }
  assertEquals(wereLast.size, 5);
});

Deno.test("a thousand people can be ignored, and no more", async () => {
  await using server = open({ rate: 0 });
  admitCrowd(server, 1_001);
  await using alice = await Guest.join(server.port, "alice");
  const guests = Array.from({ length: 1_001 }, (_, i) => `guest${i + 1}`);
  await alice.say(...guests.map((guest) => `/ignore ${guest}`));
  await alice.find(/^! You ignore 1000 people, which is the most\.$/);
});

Deno.test("thousands of things done, one by one, arrive in order", async () => {
  await using server = open({ rate: 0 });
  await using alice = await Guest.join(server.port, "alice");
  await using bob = await Guest.join(server.port);
  const deeds = Array.from({ length: 5_000 }, (_, i) => `waves ${i}`);
  await alice.say(...deeds.map((deed) => `/me ${deed}`));
  for (const deed of deeds) assertEquals(await bob.next(), `** alice ${deed}`);
});

Deno.test("thousands of short lines by a long name arrive whole, in order", async () => {
  await using server = open({ rate: 0 });
  const name = "𐐷".repeat(24); // the most letters, of the most bytes
  await using alice = await Guest.join(server.port, name);
  await using bob = await Guest.join(server.port);
  const lines = Array.from({ length: 5_000 }, (_, i) => String(i));
  const said = alice.say(...lines);
  for (const line of lines) assertEquals(await bob.next(), `[${name}] ${line}`);
  await said;
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
  await nobody[Symbol.asyncDispose](); // leaves in silence
  await bob.say("bob");
  assertEquals(await bob.next(), "* The room contains: alice");
  assertEquals(await bob.next(), "[alice] bob has not come in yet"); // history
  assertEquals(await alice.next(), "* bob has entered the room");
  await bob.say("hi alice");
  assertEquals(await alice.next(), "[bob] hi alice");
  await bob.conn.closeWrite();
  assertEquals(await alice.next(), "* bob has left the room");
  for (
    const name of ["", "alice", "no spaces", "host", "x".repeat(25)].slice(1)
  ) {
    await using guest = await Guest.connect(server.port);
    await guest.next();
    await guest.say(name);
    assertMatch((await guest.next())!, /^! /);
    assertEquals(await guest.next(), null);
  }
  await alice.heardAll();
});

// -- framing and cleaning

const IAC = 255, DO = 253, WILL = 251, SB = 250, SE = 240;

/** A stream with all that may cut or hide a line, and the lines in it. */
const STREAM = [
  ...encoder.encode("plain\ncr lf\r\ncr nul\r\0"),
  ...[IAC, DO, 10, IAC, WILL, 31],
  ...encoder.encode("naïve 🌍"),
  ...[IAC, SB, 31, 0, 10, 0, IAC, IAC, 10, IAC, SE],
  ...encoder.encode(" tail\n\n\r\n"),
  ...[0xe2, 0x82, 10, 0x61, 0xff, 0xff, 0x62, 10],
  ...encoder.encode("last words"),
];
const STREAM_LINES = [
  "plain",
  "cr lf",
  "cr nul",
  "naïve 🌍 tail",
  "\ufffd",
  "a\ufffdb",
  "last words",
];

Deno.test("any split of the stream gives the same lines", async () => {
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

Deno.test("a telnet that waits for an answer to its options gets a refusal", async () => {
  await using server = open({ raw: true });
  using conn = await Deno.connect({ port: server.port });
  await conn.write(Uint8Array.of(IAC, 244, IAC, DO, 6)); // Ctrl-C: RFC 860
  const buffer = new Uint8Array(10);
  assertEquals(await within(conn.read(buffer), "the answer"), 3);
  assertEquals([...buffer.slice(0, 3)], [IAC, 252, 6]);
});

Deno.test("what could disturb a terminal is taken out of a line", async () => {
  await using server = open({ rate: 0 });
  await using alice = await Guest.join(server.port, "alice");
  await using bob = await Guest.join(server.port, "bob");
  const lines: [typed: string, heard: string][] = [
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
  for (const [typed, heard] of lines) {
    await alice.say(typed);
    assertEquals(
      await bob.next(),
      heard ? `[alice] ${heard}` : "** alice has a mark",
    );
  }
  await alice.say("\x07\x1b[0m", "", "end");
  assertEquals(await bob.next(), "[alice] end");
});

Deno.test("a line too long is passed on in pieces, cut between characters", async () => {
  await using server = open({ raw: true, rate: 0 });
  await using alice = await Guest.connect(server.port);
  await using bob = await Guest.connect(server.port);
  await alice.say(
    "x".repeat(4_096),
    "y".repeat(4_097),
    "z" + "é".repeat(4_000),
  );
  assertEquals(await bob.next(), "x".repeat(4_096));
  assertEquals(await bob.next(), "y".repeat(4_096));
  assertEquals(await bob.next(), "y");
  assertEquals(await bob.next(), "z" + "é".repeat(2_047)); // 4,095 bytes
  assertEquals(await bob.next(), "é".repeat(1_953));
  await alice.send([...new Uint8Array(5_000).fill(0x80), 10]); // no UTF-8
  assertEquals(await bob.next(), "\ufffd".repeat(4_096));
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
    let got = 0;
    while (got < size) {
      const line = (await bob.next())!;
      assert(line.length <= 4_096);
      assertEquals(line[0], String(got % 10));
      got += line.length;
    }
    await sending;
    assertEquals(got, size);
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

Deno.test("a TLS handshake, or an over-long HTTP request, is not talk", async () => {
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

Deno.test("an answer goes to the last who was heard, not to one ignored", async () => {
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

Deno.test("bytes that make no line neither block nor evict anyone", async () => {
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

// -- slow readers, pace and limits

Deno.test({
  name:
    "a client that never reads delays nobody, and is closed when it is too slow",
  ignore: !LINUX,
  async fn() {
    await using program = await Program.start(["--rate", "0"]);
    await using alice = await Guest.join(program.port, "alice");
    await using bob = await Guest.join(program.port, "bob");
    await alice.find(/known as bob/);
    const descriptors = await program.descriptors();
    const before = await program.memory();
    const deaf = await Deno.connect({ port: program.port });
    await alice.find(/entered the room/);
    let heard = 0, told = false;
    for (let sent = 0; !told && sent < 40_000; sent += 100) {
      await flood(alice, 100);
      while (heard < sent + 100) {
        const line = (await bob.find(/^\[alice\]|too slow/))!;
        if (line.startsWith("[")) heard++;
        else {
          assertEquals(line, "* guest3 has left the room (too slow)");
          told = true;
        }
      }
    }
    assert(told, "it was never told");
    assertMatch(
      await program.output.find(/too slow/),
      /^Connection closed by .* \(guest3, too slow, 2 here\)$/,
    );
    // Although its write, and its read, never end:
    await eventually(
      async () => await program.descriptors() === descriptors,
      "the descriptor is closed",
    );
    assert(await program.memory() - before < 60);
    deaf.close();
  },
});

Deno.test("little memory waits for the next words of one who was busy", async () => {
  await using server = open({ raw: true, rate: 0 });
  const sizes: number[] = [], ended = Promise.withResolvers<void>();
  server.admit({
    async read(buffer) {
      await turn();
      buffer.fill(10);
      switch (sizes.push(buffer.length)) {
        case 9: // the last of much
          return buffer.length - 1;
        case 10: // and a word after it
          return 1;
        case 11:
          return null;
      }
      return buffer.length;
    },
    write: (bytes) => Promise.resolve(bytes.length),
    close: () => ended.resolve(),
  }, ELSEWHERE);
  await within(ended.promise, "the end");
  assertEquals(sizes.slice(8), [65_536, 2_048, 256]);
});

Deno.test("a pasted page arrives whole at the given pace, while others talk", async () => {
  await using server = open({ rate: 20 });
  await using alice = await Guest.join(server.port, "alice");
  await using bob = await Guest.join(server.port, "bob");
  await using carol = await Guest.join(server.port, "carol");
  await bob.find(/known as carol/);
  const page = Array.from({ length: 130 }, (_, i) => `line ${i}`);
  const started = performance.now();
  await alice.say(...page); // the command /nick was one more
  const heard: string[] = [], times: number[] = [];
  while (heard.length < page.length) {
    heard.push((await bob.find(/^\[alice\]/)).replace("[alice] ", ""));
    times.push(performance.now() - started);
    if (heard.length === 110) {
      await carol.say("free to talk");
      await carol.settle();
    }
  }
  assertEquals(heard, page);
  assert(times[95] < 500, `96 lines took ${times[95]} ms`);
  assert(times[129] > 1_000, `all took ${times[129]} ms only`);
});

Deno.test("what was pasted before leaving still arrives", async () => {
  await using server = open({ rate: 20 });
  await using bob = await Guest.join(server.port);
  const alice = await Guest.join(server.port, "alice");
  await alice.say(...Array.from({ length: 120 }, (_, i) => `line ${i}`));
  await alice[Symbol.asyncDispose]();
  await bob.find(/line 119$/);
  assertEquals(await bob.next(), "* alice has left the room");
});

Deno.test("one more than --max-clients is told that the room is full", async () => {
  await using server = open({ maxClients: 2 });
  await using alice = await Guest.join(server.port);
  await using bob = await Guest.join(server.port);
  await using carol = await Guest.connect(server.port);
  assertEquals(await carol.rest(), ["! The room is full. Try again later."]);
  await bob.say("/quit");
  await alice.find(/guest2 has left/);
  await using _dave = await Guest.join(server.port);
});

Deno.test("who is refused but has gone already is closed", async () => {
  await using server = open({ maxClients: 1 });
  await using _alice = await Guest.join(server.port);
  const gone = () => Promise.reject(new Deno.errors.ConnectionReset());
  const closed = Promise.withResolvers<void>();
  server.admit(
    { read: gone, write: gone, close: () => closed.resolve() },
    ELSEWHERE,
  );
  await within(closed.promise, "the close");
});

Deno.test("one more than --max-per-address is told so", async () => {
  await using server = open({ maxPerAddress: 1 });
  await using _alice = await Guest.join(server.port);
  await using bob = await Guest.connect(server.port);
  assertMatch((await bob.next())!, /^! Too many here are from your address\./);
  assertEquals(await bob.next(), null);
});

Deno.test({
  name: "out of descriptors, the room goes on and newcomers wait",
  ignore: !LINUX,
  async fn() {
    await using program = await Program.start([], { shell: "ulimit -n 64;" });
    await using alice = await Guest.join(program.port, "alice");
    const crowd: Deno.TcpConn[] = [];
    for (let i = 0; i < 70; i++) {
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
    assertEquals(await program.errors.rest(), []); // said once
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

Deno.test("who reads no answer to what is asked first is too slow as well", async () => {
  using file = new TemporaryFile("sesame");
  await using server = open({ passwordFile: file.path, rate: 0 });
  const closed = Promise.withResolvers<void>();
  server.admit({
    async read(buffer) {
      await turn();
      for (const i of buffer.keys()) buffer[i] = [IAC, DO, 1][i % 3];
      return buffer.length - buffer.length % 3;
    },
    write: never,
    close: () => closed.resolve(),
  }, ELSEWHERE);
  await within(closed.promise, "the end of it");
});

Deno.test("who is thrown out on entering leaves no name behind", async () => {
  await using server = open({ askName: true, rate: 0 });
  let reads = 0;
  server.admit({
    async read(buffer) {
      await turn();
      const asks = new Array(64).fill([IAC, DO, 1]).flat();
      // As much as is kept for who does not take it; the next is too much.
      const bytes = reads++ < 342 ? asks : encoder.encode("ghost\n");
      buffer.set(bytes);
      return reads < 345 ? bytes.length : await never();
    },
    write: never,
    close() {},
  }, ELSEWHERE);
  await eventually(() => reads > 342, "the name");
  await using alice = await Guest.connect(server.port);
  await alice.say("ghost");
  assertMatch((await alice.next())!, /name\?$/);
  assertEquals(await alice.next(), "* The room contains: ");
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
  for (let i = 0; i < 1_500; i++) { // more than a pipe holds
    const guest = await Guest.connect(program.port);
    await guest.next();
    await guest[Symbol.asyncDispose]();
  }
  await eventually(async () => {
    await using guest = await Guest.connect(program.port);
    return (await guest.next())!.startsWith("* Welcome");
  }, "a place in the room");
  program.child.kill("SIGINT");
  assertEquals((await within(program.child.status, "the exit", 2_500)).code, 0);
});

Deno.test("lines that nobody took from standard output are counted", async () => {
  await using program = await Program.start(["--console", "--rate", "0"]);
  await using alice = await Guest.join(program.port);
  const lines = Array.from({ length: 20_000 }, (_, i) => `line ${i}`);
  await alice.say(...lines);
  await alice.settle();
  // All are told of, one way or the other.
  let shown = 0, missed = 0;
  while (shown + missed < lines.length) {
    const line = await program.output.next();
    if (/^\[guest1\] line \d+$/.test(line!)) shown++;
    missed += Number(/^\((\d+) lines not shown\)$/.exec(line!)?.[1] ?? 0);
  }
  assert(missed > 0);
});

// -- who gets in

/** A file that is gone at the end. */
class TemporaryFile implements Disposable {
  readonly path = Deno.makeTempFileSync();

  constructor(content: string) {
    Deno.writeTextFileSync(this.path, content);
  }

  get lines(): string[] {
    return Deno.readTextFileSync(this.path).split("\n").slice(0, -1);
  }

  [Symbol.dispose](): void {
    Deno.removeSync(this.path);
  }
}

const ASKED = "* This room has a password. What is it?";

Deno.test("nothing is seen or heard before the password is given", async () => {
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
  await alice.heardAll();

  await using bob = await Guest.connect(server.port);
  await bob.say("open sesame", "thanks"); // at once, as a script does
  assertEquals(await alice.next(), "* guest2 has entered the room");
  assertEquals(await alice.next(), "[guest2] thanks");
  await bob.find(/^\[guest1\] a secret$/);
  await bob.heardAll();
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

Deno.test("who gives no password in time is sent away", async () => {
  using file = new TemporaryFile("x");
  using _hurry = hurry(30_000);
  await using server = open({ passwordFile: file.path });
  await using alice = await Guest.connect(server.port);
  assertEquals(await alice.rest(), [ASKED, "! That took too long."]);
});

/** A certificate for localhost, or `null` where there is no openssl. */
async function makeCertificate(): Promise<
  { cert: string; key: string } | null
> {
  const directory = await Deno.makeTempDir();
  const [cert, key] = [`${directory}/cert.pem`, `${directory}/key.pem`];
  try {
    const { success } = await new Deno.Command("openssl", {
      args:
        "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost -addext subjectAltName=DNS:localhost,IP:127.0.0.1 -addext basicConstraints=critical,CA:FALSE"
          .split(" ").concat("-keyout", key, "-out", cert),
      stderr: "null",
      stdout: "null",
    }).output();
    return success ? { cert, key } : null;
  } catch {
    return null;
  }
}

const certificate = await makeCertificate();

/** The options of a room that speaks TLS. */
function tls(): Partial<Options> {
  return { tlsCert: certificate!.cert, tlsKey: certificate!.key };
}

async function connectTls(port: number): Promise<Deno.TlsConn> {
  const caCerts = [await Deno.readTextFile(certificate!.cert)];
  const conn = await Deno.connectTls({ hostname: "localhost", port, caCerts });
  await conn.handshake();
  return conn;
}

Deno.test({
  name: "people talk over TLS, whoever else stalls or errs at the handshake",
  ignore: !certificate,
  async fn() {
    const printed: string[] = [];
    await using server = open(tls(), printed);
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
  name: "a handshake that never ends is given up",
  ignore: !certificate,
  async fn() {
    using _hurry = hurry(30_000);
    await using server = open(tls());
    await using silent = await Guest.connect(server.port);
    assertEquals(await silent.next(), null);
  },
});

Deno.test({
  name: "who is banned during the handshake does not come in after it",
  ignore: !certificate,
  async fn() {
    const printed: string[] = [];
    await using server = open(tls(), printed);
    const conn = await Deno.connect({
      hostname: "127.0.0.1",
      port: server.port,
    });
    await eventually(() => printed.length === 1, "the connection");
    await server.operate(ReadableStream.from(["/ban 127.0.0.1"]), () => {});
    const caCerts = [await Deno.readTextFile(certificate!.cert)];
    const options = { hostname: "localhost", caCerts };
    using banned = await Deno.startTls(conn, options);
    await using lines = new Lines(banned.readable);
    assertEquals(await lines.rest(), ["! You were banned."]);
  },
});

Deno.test({
  name: "over TLS too, one too many is told that the room is full",
  ignore: !certificate,
  async fn() {
    await using server = open({ ...tls(), maxClients: 1 });
    using first = await connectTls(server.port);
    await using alice = new Lines(first.readable);
    await alice.find(/^\* The room contains/);
    using second = await connectTls(server.port);
    await using bob = new Lines(second.readable);
    assertEquals(await bob.rest(), ["! The room is full. Try again later."]);
  },
});

Deno.test({
  name: "last words over TLS arrive without its goodbye",
  ignore: !certificate,
  async fn() {
    await using server = open(tls());
    using conn = await connectTls(server.port);
    await using alice = new Lines(conn.readable);
    await alice.find(/^\* The room contains/);
    const client = new Deno.Command("openssl", {
      args: ["s_client", "-quiet", "-connect", `127.0.0.1:${server.port}`],
      stdin: "piped",
      stdout: "piped",
      stderr: "null",
    }).spawn();
    const typist = client.stdin.getWriter();
    await using output = new Lines(client.stdout);
    await output.find(/^\* The room contains/);
    await typist.write(encoder.encode("one\nlast"));
    await alice.find(/^\[guest2\] one$/);
    client.kill("SIGKILL");
    await alice.find(/^\[guest2\] last$/);
    await alice.find(/guest2 has left the room$/);
    await client.status;
    await typist.close().catch(() => {});
  },
});

Deno.test({
  name: "a room with TLS that was out of descriptors has them all back",
  ignore: !LINUX || !certificate,
  async fn() {
    await using program = await Program.start(
      ["--tls-cert", certificate!.cert, "--tls-key", certificate!.key],
      { shell: "ulimit -n 64;", permissions: ["--allow-net", "--allow-read"] },
    );
    using first = await connectTls(program.port);
    await using alice = new Lines(first.readable);
    await alice.find(/^\* The room contains/);
    const before = await program.descriptors();
    for (let wave = 0; wave < 2; wave++) {
      const crowd = await Promise.all(
        Array.from({ length: 60 }, () => Guest.connect(program.port)),
      );
      // Some have to go, as there is no descriptor for their TLS.
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

Deno.test("only the networks that are allowed come in, and others without a word", async () => {
  await using server = open({
    allow: ["::ffff:10.0.0.0/104", "127.0.0.2", "::1/128"],
    host: "::",
  });
  const from = async (address: string) => {
    const rest: string[] = [];
    const conn = {
      read: () => new Promise<null>(() => {}),
      write: (bytes: Uint8Array) => {
        rest.push(new TextDecoder().decode(bytes));
        return Promise.resolve(bytes.length);
      },
      closed: Promise.withResolvers<string>(),
      close() {
        this.closed.resolve(rest.join());
      },
    };
    server.admit(conn, { hostname: address, port: 1 });
    return await Promise.race([
      conn.closed.promise,
      eventually(() => rest.length > 0, "an answer").then(() => rest.join()),
    ]);
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

// -- who keeps order

Deno.test("the operator speaks as host, hears the room, and keeps order", async (t) => {
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
  await t.step("hears what everyone hears, and nothing private", async () => {
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
  await t.step("is told what cannot be done", async () => {
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
  });
  await t.step("kicks", async () => {
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
  await t.step("bans and unbans", async () => {
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
    // Its IPv4-mapped form is the same address, and octal digits are none.
    await program.type("/banned", "/ban ::ffff:7f00:1", "/ban 0177.0.0.1");
    await output.find(/^\* Nobody is banned\.$/);
    await output.find(/^\* 127\.0\.0\.1 is banned\.$/);
    await output.find(/^! Nobody here is called 0177\.0\.0\.1, and it is no/);
    await program.type("/unban 127.0.0.1");
    await output.find(/no longer/);
  });
  await t.step("ends its input, and the room goes on", async () => {
    await program.typeEnd();
    await using carol = await Guest.join(program.port, "carol");
    await carol.settle();
  });
});

Deno.test("the operator stops the server", async () => {
  await using program = await Program.start(["--console"], { typing: true });
  await program.type("/who");
  await program.output.find(/^\* Nobody is here\.$/);
  await using alice = await Guest.join(program.port);
  await program.type("/quit");
  await program.output.find(/^Shutdown Server \.{6}$/);
  assertEquals(await alice.rest(), ["* Shutdown Server"]);
  assertEquals((await within(program.child.status, "the exit")).code, 0);
});

Deno.test("without --console standard input is left alone", async () => {
  await using program = await Program.start([], { typing: true });
  await using alice = await Guest.join(program.port);
  await program.type("hello", "/quit");
  await program.typeEnd();
  await alice.heardAll();
});

// -- what is kept

/** The transcript without its times, which are checked. */
function spoken(file: TemporaryFile): string[] {
  return file.lines.map((line) => {
    assertMatch(line, /^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z /);
    assert(Math.abs(Date.parse(line.slice(0, 24)) - Date.now()) < 60_000);
    return line.slice(25);
  });
}

Deno.test("what is said is in the transcript, and is the next room's history", async () => {
  using file = new TemporaryFile("");
  const options = { log: file.path, history: 2, timestamps: true };
  const first = open(options);
  const alice = await Guest.join(first.port, "alice");
  await alice.say("one", "/msg alice private", "/me waves", "/nick bob", "two");
  await alice.find(/known as bob/);
  await first.stop();
  await alice[Symbol.asyncDispose]();
  assertEquals(spoken(file), ["[alice] one", "** alice waves", "[bob] two"]);

  await using second = open(options);
  await using carol = await Guest.join(second.port);
  assertMatch((await carol.next())!, /^\d\d:\d\d \*\* alice waves$/);
  assertMatch((await carol.next())!, /^\d\d:\d\d \[bob\] two$/);
  await carol.say("three");
  await eventually(() => file.lines.length === 4, "the line in the file");

  await using third = open({ ...options, history: 0 });
  await using dave = await Guest.join(third.port);
  await dave.heardAll();
});

Deno.test("a transcript is read from its end, and a broken last line is no harm", async () => {
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

Deno.test("a line in the transcript that is too long for the history is left out", async () => {
  const old = "2026-01-31T12:34:56.789Z [old] ";
  using file = new TemporaryFile(
    `${old}one\n${old}${"x".repeat(1_100_000)}\n${old}two\n`,
  );
  await using server = open({ log: file.path, history: 200 });
  await using alice = await Guest.join(server.port);
  assertEquals(await alice.next(), "[old] two");
});

Deno.test("no part of a line in the transcript passes for a line", async () => {
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
    await alice.heardAll();
  }
});

Deno.test({
  name: "a disk that is too slow is said once, and the room goes on",
  ignore: !LINUX,
  async fn() {
    const path = `${await Deno.makeTempDir()}/fifo`; // that nobody reads
    await new Deno.Command("mkfifo", { args: [path] }).output();
    await using program = await Program.start(
      ["--log", path, "--rate", "0"],
      { permissions: ["--allow-all"] },
    );
    await using alice = await Guest.join(program.port);
    await flood(alice, 10_000); // twice the window and more
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
  name: "a full disk is said once, and the room goes on",
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

Deno.test("a file that cannot be used is one line and status 1", async (t) => {
  using empty = new TemporaryFile("\n"), file = new TemporaryFile("x");
  using unicode = new TemporaryFile("x\0y\0\n\0"); // as if in UTF-16
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
    name: "certificates that are none, or have another key",
    ignore: !certificate,
    async fn() {
      const address = ["--host", "127.0.0.1", "-p", "0"];
      const other = await makeCertificate();
      for (const cert of [file.path, other!.cert]) {
        const { code, errors } = await run(
          [...address, "--tls-cert", cert, "--tls-key", certificate!.key],
          ["--allow-net", "--allow-read"],
        );
        assertEquals(code, 1);
        assertMatch(errors, /^parley: Cannot use \S+ with \S+: .*PEM.*\n$/);
      }
    },
  });
});

// -- the clients that people have

/** A client that people have, as a process: its lines are what it prints. */
class Terminal extends Lines {
  readonly #child: Deno.ChildProcess;
  readonly #typist: WritableStreamDefaultWriter<Uint8Array>;

  private constructor(child: Deno.ChildProcess) {
    super(showReturns(child.stdout));
    this.#child = child;
    this.#typist = child.stdin.getWriter();
  }

  static start(command: string): Terminal {
    return new Terminal(
      new Deno.Command("sh", {
        args: ["-c", `exec ${command}`],
        stdin: "piped",
        stdout: "piped",
        stderr: "null",
      }).spawn(),
    );
  }

  async type(text: string): Promise<void> {
    await this.#typist.write(encoder.encode(text));
  }

  /** Ends its standard input. */
  async typeEnd(): Promise<void> {
    await this.#typist.close();
  }

  /** Waits until it ends by itself. */
  async ended(): Promise<void> {
    await within(this.#child.status, "the client's end");
  }

  override async [Symbol.asyncDispose](): Promise<void> {
    try {
      this.#child.kill("SIGKILL");
    } catch { /* it has ended already */ }
    await this.#child.status;
    await this.#typist.close().catch(() => {});
    await super[Symbol.asyncDispose]();
  }
}

/** Shows a carriage return as `^`: a line stream takes CR LF for LF, and would
 * hide one that the server should not have sent. */
function showReturns(bytes: ReadableStream<Uint8Array<ArrayBuffer>>) {
  return bytes.pipeThrough(
    new TransformStream<Uint8Array<ArrayBuffer>, Uint8Array<ArrayBuffer>>({
      transform: (chunk, controller) =>
        controller.enqueue(chunk.map((byte) => byte === 13 ? 94 : byte)),
    }),
  );
}

/** Opens a room in which guest1 is, and the client becomes guest2. */
async function meet(command: string, { encrypted = false, piped = "" } = {}) {
  await using opened = new AsyncDisposableStack();
  const server = opened.use(open(encrypted ? tls() : {}));
  const conn = opened.use(
    encrypted
      ? await connectTls(server.port)
      : await Deno.connect({ hostname: "127.0.0.1", port: server.port }),
  );
  const room = opened.use(new Lines(showReturns(conn.readable)));
  await room.find(/^\* The room contains: /);
  const client = opened.use(
    Terminal.start(command.replace("PORT", String(server.port))),
  );
  if (piped) {
    await client.type(piped);
    await client.typeEnd();
  }
  assertEquals(await room.next(), "* guest2 has entered the room");
  const all = opened.move();
  return {
    client,
    /** What guest1 hears. */
    room,
    /** Lets guest1 say a line. */
    say: (line: string) => conn.write(encoder.encode(line + "\n")),
    [Symbol.asyncDispose]: () => all.disposeAsync(),
  };
}

interface TestedClient {
  name: string;
  /** How a person starts it. */
  command: string;
  /** How it is started at the end of a pipe, to end when that does. */
  piped?: string[];
  encrypted?: boolean;
  /** It closes both ways then, and does not hear what is still due to it. */
  hasty?: boolean;
}

// deno-fmt-ignore: a line each
const CLIENTS: TestedClient[] = [
  { name: "nc.openbsd", command: "nc.openbsd 127.0.0.1 PORT",
    piped: ["nc.openbsd -N 127.0.0.1 PORT", "nc.openbsd -q 1 127.0.0.1 PORT"] },
  { name: "nc.traditional", command: "nc.traditional 127.0.0.1 PORT",
    piped: ["nc.traditional -q 1 127.0.0.1 PORT"] },
  { name: "ncat", command: "ncat 127.0.0.1 PORT",
    piped: ["ncat 127.0.0.1 PORT"] },
  { name: "ncat -C", command: "ncat -C 127.0.0.1 PORT",
    piped: ["ncat -C 127.0.0.1 PORT"] },
  { name: "ncat --ssl", command: "ncat --ssl 127.0.0.1 PORT", encrypted: true,
    piped: ["ncat --ssl 127.0.0.1 PORT"] },
  { name: "telnet", command: "telnet 127.0.0.1 PORT" },
  { name: "socat", command: "socat - TCP:127.0.0.1:PORT",
    piped: ["socat - TCP:127.0.0.1:PORT"] },
  { name: "plink -raw", command: "plink -batch -raw -P PORT 127.0.0.1",
    piped: ["plink -batch -raw -P PORT 127.0.0.1"] },
  { name: "plink -telnet", command: "plink -batch -telnet -P PORT 127.0.0.1" },
  { name: "openssl s_client", encrypted: true, hasty: true,
    command: "openssl s_client -quiet -connect 127.0.0.1:PORT",
    piped: ["openssl s_client -quiet -no_ign_eof -connect 127.0.0.1:PORT"] },
];

for (const { name, command, piped = [], encrypted, hasty } of CLIENTS) {
  Deno.test({
    name: `${name} talks and hears`,
    ignore: !installed(command.split(" ")[0]) || (encrypted && !certificate),
    async fn(t) {
      await t.step("typed", async () => {
        await using meeting = await meet(command, { encrypted });
        const { client, room, say } = meeting;
        await client.find(/^\* Welcome, guest2\./);
        assertEquals(await client.next(), "* The room contains: guest1");
        await client.type("Ça va? 你好 🙂\n");
        assertEquals(await room.next(), "[guest2] Ça va? 你好 🙂");
        await say("Grüße, 世界 🙂");
        assertEquals(await client.next(), "[guest1] Grüße, 世界 🙂");
        await client.type("/quit bye\n");
        assertEquals(await room.next(), "* guest2 has left the room (bye)");
        await client.typeEnd(); // some wait for it, whatever the server does
        await client.ended();
        assertEquals(await client.rest(), []);
      });

      for (const command of piped) {
        await t.step(`... | ${command}`, async () => {
          const piped = "one\n/who\ntwo";
          await using meeting = await meet(command, { encrypted, piped });
          const { client, room } = meeting;
          assertEquals(await room.next(), "[guest2] one");
          assertEquals(await room.next(), "[guest2] two");
          assertEquals(await room.next(), "* guest2 has left the room");
          await client.ended();
          if (hasty) return;
          assertEquals((await client.rest()).slice(1), [
            "* The room contains: guest1",
            "* The room contains: guest1, guest2",
          ]);
        });
      }
    },
  });
}

Deno.test({
  name: "telnet's interrupt does not silence it",
  ignore: !LINUX || !installed("telnet") || !installed("script"),
  async fn() {
    const command = "script -qfc 'telnet 127.0.0.1 PORT' /dev/null"; // a terminal
    await using meeting = await meet(command);
    const { client, room, say } = meeting;
    await client.find(/^\* The room contains: guest1/);
    // Ctrl-C sends a question too, and nothing is shown before its answer.
    await client.type("\x03one\n");
    assertEquals(await room.next(), "[guest2] one");
    await say("still there?");
    await client.find(/^\[guest1\] still there\?/);
    await client.type("/quit\n");
    assertEquals(await room.next(), "* guest2 has left the room");
    await client.ended();
  },
});

Deno.test({
  name: "plink -telnet may end lines by Return alone, and its input end early",
  ignore: !installed("plink"),
  async fn() {
    await using meeting = await meet("plink -batch -telnet -P PORT 127.0.0.1");
    const { client, room, say } = meeting;
    await client.type("one\rtwo\r\nthr"); // CR NUL, CR NUL LF on the wire
    assertEquals(await room.next(), "[guest2] one");
    assertEquals(await room.next(), "[guest2] two");
    await client.type("ee\n");
    await client.typeEnd(); // which it tells by a telnet command, and stays
    assertEquals(await room.next(), "[guest2] three");
    await say("still there?");
    await client.find(/^\[guest1\] still there\?$/);
  },
});

Deno.test({
  name: "openssl s_client -quiet takes no line for a command of its own",
  ignore: !installed("openssl") || !certificate,
  async fn() {
    await using meeting = await meet(
      "openssl s_client -quiet -connect 127.0.0.1:PORT",
      { encrypted: true },
    );
    const { client, room, say } = meeting;
    await client.type("Quite\nRight\n");
    assertEquals(await room.next(), "[guest2] Quite");
    assertEquals(await room.next(), "[guest2] Right");
    await client.typeEnd(); // which it does not mind
    await say("still there?");
    await client.find(/^\[guest1\] still there\?$/);
  },
});

// -- the command line

Deno.test("a command line that cannot be used is one line and status 2", async (t) => {
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

Deno.test("a room that cannot be opened is one line and status 1", async (t) => {
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
      "the address is none",
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

/** Whether `deno compile` can have the runtime that it puts into a binary. */
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

Deno.test({
  name: "the compiled binary serves, helps and refuses like the script",
  ignore: !await canCompile(),
  async fn() {
    const directory = await Deno.makeTempDir();
    const deno = (...args: string[]) =>
      new Deno.Command(Deno.execPath(), { args, stderr: "null" }).output();
    // With a file of its own in place of the task's.
    const command = config.tasks.compile.command
      .replace("--output parley", `--quiet --output ${directory}/parley`)
      .replace("main.ts", new URL("main.ts", import.meta.url).pathname);
    assert((await deno(...command.split(" ").slice(1))).success);
    const parley = async (...args: string[]) => {
      const binary = new Deno.Command(`${directory}/parley`, { args });
      const { code, stdout, stderr } = await binary.output();
      const text = (bytes: Uint8Array) => new TextDecoder().decode(bytes);
      return { code, output: text(stdout), errors: text(stderr) };
    };
    assertEquals(
      (await parley("--version")).output,
      `parley ${config.version}\n`,
    );
    assertMatch(
      (await parley("--help")).output,
      /^Usage: +parley \[OPTIONS\]$/m,
    );
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
    assertEquals(spoken(log), ["[guest1] hello"]);
    await child.stdin.close();
    await Deno.remove(directory, { recursive: true });
  },
});

Deno.test("--version is the one in deno.json", async () => {
  const { code, output } = await run(["-V"], []);
  assertEquals([code, output], [0, `parley ${config.version}\n`]);
});

Deno.test("--quiet prints no comings and goings", async () => {
  await using program = await Program.start(["--quiet"]);
  await using alice = await Guest.join(program.port);
  await alice.settle();
  program.child.kill("SIGINT");
  assertEquals(await program.output.rest(), ["Shutdown Server ......"]);
});

// -- as a library

Deno.test("several rooms in one process do not touch each other", async () => {
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

Deno.test("options that cannot be used are refused to a program too", () => {
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
    ] as [Partial<Options>, string][] // as a program in JavaScript may
  ) assertThrows(() => ChatServer.listen(options), UsageError, message);
});

Deno.test("an option that is undefined has its default", async () => {
  await using server = open({ rate: undefined, maxClients: undefined });
  await using alice = await Guest.join(server.port);
  await using bob = await Guest.join(server.port);
  await alice.say("hello");
  assertEquals(await bob.next(), "[guest1] hello");
});

Deno.test("an error of the program that listens is its own", async () => {
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

Deno.test("a door that fails costs its own place only", async () => {
  await using server = open();
  const fails = (): never => {
    throw new Error("it is gone");
  };
  server.admit({ read: never, write: fails, close: fails }, ELSEWHERE);
  const read = () => Promise.reject(new Error("it is gone"));
  server.admit({ read, write: never, close: fails }, ELSEWHERE);
  const door = { write: never, close: fails, closeWrite: fails };
  server.admit({ ...door, read: fails }, ELSEWHERE);
  server.admit({ ...door, read: () => Promise.resolve(null) }, ELSEWHERE);
  await using alice = await Guest.join(server.port, "alice");
  await alice.settle();
});

Deno.test("an operator who comes after the end does not hold it up", async () => {
  const printed: string[] = [];
  const server = open({}, printed);
  server.admit({
    read: never,
    write: never,
    close() {},
  }, ELSEWHERE);
  await eventually(() => printed.length === 1, "the client");
  const stopped = server.stop();
  await new Promise((resolve) => setTimeout(resolve));
  await server.operate(ReadableStream.from(["hello"]), () => {});
  await within(stopped, "the end");
});

Deno.test("a room that was empty once stops like any other", async () => {
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

/** Lets something go wrong in a room where alice is, which must leave the room
 * as it was: descriptors, people, memory, nothing on standard error. */
function withstands(
  name: string,
  fault: (program: Program, alice: Guest) => Promise<void>,
): void {
  Deno.test({
    name,
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

withstands(
  "twenty who stop in the middle of a line",
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
      await alice.find(/^\[guest\d+\] half a li$/); // it was all they had to say
      await alice.find(/^\* guest\d+ has left the room$/);
    }
  },
);

withstands("resets in the middle of writes", async (program, alice) => {
  const conns: Deno.TcpConn[] = [];
  for (let i = 0; i < 20; i++) {
    conns.push(await Deno.connect({ port: program.port }));
    await alice.find(/has entered the room$/);
  }
  await flood(alice, 3_000); // more than their buffers take
  await alice.settle();
  for (const conn of conns) conn.close(); // with all of it unread: a reset
  for (let left = 0; left < 20; left++) await alice.find(/has left the room$/);
});

withstands("noise instead of text", async (program, alice) => {
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

Deno.test("a SIGTERM in the middle of a flood loses nothing that was said", async () => {
  using file = new TemporaryFile("");
  await using program = await Program.start(
    ["--rate", "0", "--log", file.path],
    { permissions: ["--allow-net", "--allow-read", "--allow-write"] },
  );
  await using alice = await Guest.join(program.port, "alice");
  await using bob = await Guest.join(program.port, "bob");
  const flooding = (async () => {
    for (let number = 0;; number += 100) {
      await alice.say(
        ...Array.from({ length: 100 }, (_, i) => `line ${number + i}`),
      );
    }
  })().catch(() => {}); // it ends with the server
  const begun = [await bob.next()];
  while (begun.length < 5_000) begun.push(await bob.next());
  program.child.kill("SIGTERM");
  const heard = begun.concat(await bob.rest());
  assertEquals((await within(program.child.status, "the exit")).code, 0);
  await flooding;
  assertEquals(heard.pop(), "* Shutdown Server");
  assertEquals(heard, heard.map((_, number) => `[alice] line ${number}`));
  assertEquals(spoken(file), heard);
  assertEquals(await program.errors.rest(), []);
});

Deno.test("a clock that jumps neither holds anyone up nor lets anyone rush", async () => {
  await using server = open({ rate: 100, timestamps: true });
  await using alice = await Guest.join(server.port, "alice");
  await using bob = await Guest.join(server.port, "bob");
  const { now } = Date;
  try {
    // Of the first, 500 are in hand; the others have to be earned.
    for (const [hours, lines] of [[-24, 530], [48, 30]]) {
      Date.now = () => now() + hours * 3_600_000;
      const started = performance.now();
      await alice.say(...Array.from({ length: lines }, (_, i) => `line ${i}`));
      await bob.find(new RegExp(` \\[alice\\] line ${lines - 1}$`));
      assert(performance.now() - started > 250, "they were paced");
    }
  } finally {
    Date.now = now;
  }
});

// -- what holds for any input

const SLASH = 47, LONGEST = 4_096;

/** What no line may hold. */
const FORBIDDEN = /(?!\t)[\p{Cc}\u2028-\u202e\u2066-\u2069\ufeff]/u;

// fast-check reduces an input that fails, and tells the seed and the path that
// bring it back. The limit ends that where each try waits for what never comes.
fc.configureGlobal({
  numRuns: 250,
  interruptAfterTimeLimit: 2 * WAIT_MILLISECONDS,
  markInterruptAsFailure: true,
});

/** Tests what holds for any inputs. */
function law<Inputs extends [unknown, ...unknown[]]>(
  name: string,
  inputs: { [Key in keyof Inputs]: fc.Arbitrary<Inputs[Key]> },
  holds: (...inputs: Inputs) => Promise<void> | void,
): void {
  const check = async (...inputs: Inputs) => await holds(...inputs);
  Deno.test(name, () => fc.assert(fc.asyncProperty(...inputs, check)));
}

type Words = string | Iterable<number>;
function bytesOf(...words: Words[]): Uint8Array {
  const bytes = (it: Words) => typeof it === "string" ? encoder.encode(it) : it;
  return Uint8Array.from(words.flatMap((it) => [...bytes(it)]));
}

/** Someone whose words come in reads of the sizes that a test chooses. */
class Seat implements Connection {
  readonly #done = Promise.withResolvers<void>();
  /** Resolves when all that it said was dealt with. */
  readonly done = this.#done.promise;
  readonly #written: number[] = [];
  #reads = 0;

  /** @param sizes of its reads, in turn; with none it stays, to listen */
  constructor(public words: Uint8Array, readonly sizes: number[] = []) {}

  /** What it was sent but the answers to telnet options, which come with each
   * read, and up to a bound. Nothing else may hold a byte 255. */
  get heard(): string {
    const bytes = [...this.#written];
    for (let at; (at = bytes.indexOf(IAC)) >= 0;) bytes.splice(at, 3);
    const decoder = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true });
    return decoder.decode(Uint8Array.from(bytes));
  }

  read(buffer: Uint8Array): Promise<number | null> {
    const size = this.sizes[this.#reads++ % this.sizes.length] ?? Infinity;
    const count = Math.min(size, buffer.length, this.words.length);
    buffer.set(this.words.subarray(0, count));
    this.words = this.words.subarray(count);
    if (count > 0) return Promise.resolve(count);
    if (this.sizes.length > 0) return Promise.resolve(null);
    this.#done.resolve();
    return never();
  }

  write(bytes: Uint8Array): Promise<number> {
    const count = Math.ceil(bytes.length / 2); // a write may take only some
    this.#written.push(...bytes.subarray(0, count));
    return Promise.resolve(count);
  }

  close = (): void => this.#done.resolve();
}

/** A room, and the first words in it: of one who listens, and of a speaker. */
type Scene = [Partial<Options>, listener?: string, speaker?: string];

/** What the listener (`guest1`) and the speaker (`guest2`) hear. */
async function hear(
  [options, listener = "", speaker = ""]: Scene,
  words: Words,
  sizes: number[],
): Promise<string[]> {
  await using server = open({ rate: 0, ...options });
  const said = bytesOf(speaker, words);
  const seats = [new Seat(bytesOf(listener)), new Seat(said, sizes)];
  for (const seat of seats) {
    server.admit(seat, { hostname: "127.0.0.1", port: 0 });
    await within(seat.done, "the end of the words");
  }
  await server.stop();
  return seats.map(({ heard }) => heard);
}

/** The lines that a raw room hears. */
async function relayed(words: Words, sizes: number[]): Promise<string[]> {
  const [heard] = await hear([{ raw: true }], words, sizes);
  return heard.split("\n").slice(0, -2); // "Shutdown Server" is the last
}

const anySize = fc.oneof(fc.nat(2), fc.nat(299), fc.nat(19_999))
  .map((less) => less + 1);
const anySizes = fc.array(anySize, { minLength: 1, maxLength: 6 });

const anyTelnet = fc.oneof(
  fc.integer({ min: SE, max: 249 }).map((command) => [IAC, command]),
  fc.tuple(fc.constant(IAC), fc.integer({ min: WILL, max: 254 }), fc.nat(255)),
  fc.array(fc.constantFrom([0], [10], [13], [65], [SE], [IAC, IAC]))
    .map((data) => [IAC, SB, 31, ...data.flat(), IAC, SE]),
);
const anyPrintable = fc.string({ unit: "grapheme", minLength: 1 })
  .filter((text) => !FORBIDDEN.test(text));
const anyLong = fc.constantFrom("x", "é", "€", "🌍")
  .map((it) => it.repeat(LONGEST / bytesOf(it).length));

// deno-fmt-ignore: by kind
const anyWords = fc.array(fc.oneof<fc.MaybeWeightedArbitrary<Words>[]>(
  { weight: 5, arbitrary: anyPrintable },
  { weight: 5, arbitrary: fc.constantFrom(
    "\n", "\r\n", "\r\0", "\r", "\0", "\t", "\x1b[31m", "\x1b]0;", "\x07",
    "\x9b", "\u2028", "\u202e", "\ufeff", "* host ", "[guest1] ", "! ",
    "\nGET / HTTP/1.1\n", "a") },
  { weight: 4, arbitrary: fc.constantFrom(
    "\n//", "\n/", "\n/me ", "\n/nick ", "\n/nick host", "\n/msg guest1 ",
    "\n/msg guest2 ", "\n/reply ", "\n/ignore guest1\n", "\n/who\n",
    "\n/help\n", "\n/quiet\n", "\n/quit ") },
  { weight: 3, arbitrary: anyTelnet },
  { weight: 3, arbitrary: fc.constantFrom( // broken off
    [IAC], [IAC, IAC], [IAC, DO], [IAC, SB], [0xc3], [0xe2, 0x82],
    [0xf0, 0x9f, 0x8c], [0x80], [0xc0, 0xaf], [0xed, 0xa0, 0x80]) },
  { weight: 1, arbitrary: fc.uint8Array({ maxLength: 9 }) },
  { weight: 1, arbitrary: anyLong },
), { maxLength: 12 }).map((parts) => bytesOf(...parts));

const anyScene = fc.constantFrom<Scene[]>(
  [{ raw: true }],
  [{}],
  [{}, "", "\x16\x03\x01 how TLS begins\n"],
  [{ askName: true }, "guest1\n", "guest2\n"],
);

law(
  "however a stream is cut into reads, the same is heard",
  [anyScene, anyWords, anySizes, anySizes],
  async (scene, words, one, other) =>
    assertEquals(
      await hear(scene, words, one),
      await hear(scene, words, other),
    ),
);

const anyLine = fc.oneof({ weight: 3, arbitrary: anyPrintable }, anyLong);
const anyEnd = fc.constantFrom("\n", "\r\n", "\r\0");
const anyLines = fc.array(fc.tuple(anyLine, anyEnd), { maxLength: 6 });

law(
  "lines arrive as they are, whatever telnet puts between their bytes",
  [anyLines, fc.array(fc.tuple(fc.nat(), anyTelnet)), anySizes],
  async (lines, strewn, sizes) => {
    const parts = [...bytesOf(lines.flat().join(""))].map((byte) => [byte]);
    for (const [place, telnet] of strewn) {
      parts.splice(place % (parts.length + 1), 0, telnet);
    }
    assertEquals(await relayed(parts.flat(), sizes), lines.map(([it]) => it));
  },
);

law(
  "a line that is too long arrives in pieces that lose nothing",
  [fc.array(anyLine, { maxLength: 8 }), anySizes],
  async (parts, sizes) => {
    const text = "no web request: " + parts.join("");
    const pieces = await relayed(text, sizes);
    assertEquals(pieces.join(""), text);
    for (const piece of pieces) assert(bytesOf(piece).length <= LONGEST);
  },
);

law(
  "no line of a person can pass for another's or the server's",
  [anyWords, anySizes],
  async (words, sizes) => {
    const [heard] = await hear([{}], words, sizes);
    const lines = heard.split("\n").slice(3, -2); // between coming and the end
    const commands = words.includes(SLASH);
    let name = "guest2";
    for (const line of lines) {
      assert(!FORBIDDEN.test(line), JSON.stringify(line));
      const [, old, next] = /^\* (\S+) is now known as (\S+)$/.exec(line) ?? [];
      if (commands && old === name) {
        name = next;
        assert(!/^(guest1|host|you|server)$/i.test(name), line);
      } else {
        const starts = [`[${name}] `, `* ${name} has left the room`];
        if (commands) starts.push(`** ${name} `, `[${name} -> you] `);
        assert(starts.some((start) => line.startsWith(start)), line);
      }
    }
  },
);

const anyText = fc.string({
  unit: fc.oneof(
    anyPrintable,
    fc.oneof(fc.nat(0xff), fc.nat(0xffff)).map((it) => String.fromCharCode(it)),
    fc.constantFrom(..."\x1b\x9b\x9c\x07[];\\\t\u2028\u202e\u2066\ufeff"),
    fc.constantFrom(..."abXY09-_*! ßｘﬁ\u0301\u200d\u3164"),
  ),
});

law("what is forbidden is cleaned away, and only that", [anyText], (text) => {
  const clean = cleanLine(text);
  assert(!FORBIDDEN.test(clean));
  assertEquals(cleanLine(clean), clean);
  // deno-lint-ignore no-control-regex
  if (/[\x1b\x80-\x9f]/.test(text)) return; // an escape sequence goes whole
  assertEquals(clean, text.replace(new RegExp(FORBIDDEN, "gu"), ""));
});

const anyLetter = fc.constantFrom(..."aI-0iıİßẞsſςσΣµμΐΐŉǰΩΩЖжաև");
const anyLetters = fc.string({ unit: anyLetter, maxLength: 27, size: "max" });

law(
  "a name shows all of itself, and nothing that the server writes",
  [fc.oneof(anyText, anyLetters)],
  (typed) => {
    const name = normalizeName(typed);
    if (name === null) return assert(!/^[\w-]{1,24}$/.test(typed), "refused");
    assertMatch(name, /^[\p{L}\p{Nd}_\-][\p{L}\p{M}\p{Nd}_\-]{0,23}$/u);
    assert(!/[\p{DI}\p{C}]/u.test(name));
    assertEquals([name.normalize("NFKC"), normalizeName(name)], [name, name]);
  },
);

law(
  "no two people have names that differ in case alone",
  [anyLetters, fc.constantFrom("toString", "toLowerCase", "toUpperCase")],
  async (name, inCase) => {
    const wish = `/nick ${name[inCase]()}\n/who\n`;
    const [, heard] = await hear([{}, `/nick ${name}\n`], wish, [99]);
    const list = heard.match(/(?<=^\* The room contains: ).*$/gm)!.at(-1)!;
    for (const names of [list, list.toLowerCase(), list.toUpperCase()]) {
      assertEquals(new Set(names.split(", ")).size, 2, list);
    }
  },
);

const FLAGS =
  " - -- --host= --port= --port -p --raw --raw= --no-raw --history=" +
  " --allow= --tls-key= --log= -h -hp= --prot --__proto__= --host.x=";
const anyFlag = fc.constantFrom(...FLAGS.split(" "));
const anyValue = fc.oneof(anyText, fc.constantFrom("", "0", "-1", "true"));
const anyArguments = fc.array(fc.tuple(anyFlag, anyValue));

law("arguments are read, or refused in one line", [anyArguments], (pairs) => {
  try {
    const { port = 0 } = parseOptions(pairs.map((it) => it.join(""))).options;
    assert(Number.isInteger(port) && port >= 0 && port <= 65_535);
  } catch (error) {
    if (!(error instanceof UsageError)) throw error;
    assert(!FORBIDDEN.test(error.message), JSON.stringify(error.message));
  }
});

// -- a simulated room

/** Whole numbers from 0 to less than `sides`. */
type Dice = (sides: number) => number;

/** The same dice for the same seed, wherever they are thrown: Mulberry32. */
function diceOf(seed: number): Dice {
  return (sides) => {
    seed = (seed + 0x6d2b79f5) | 0;
    let mixed = Math.imul(seed ^ (seed >>> 15), seed | 1);
    mixed ^= mixed + Math.imul(mixed ^ (mixed >>> 7), mixed | 61);
    return Math.floor(((mixed ^ (mixed >>> 14)) >>> 0) / 2 ** 32 * sides);
  };
}

function pick<T>(dice: Dice, things: readonly T[]): T {
  return things[dice(things.length)];
}

/** All or the last few, lest a few people never have to do with each other. */
function lately<T>(dice: Dice, things: readonly T[]): readonly T[] {
  return dice(3) ? things.slice(-4) : things;
}

/** Someone who hears the room, and what the model knows of it. */
class Person {
  name = "";
  here = true;
  quiet = false;
  /** What was typed of a line that has not ended. */
  typed = "";
  correspondent?: Person;
  readonly ignored = new Set<Person>();
  /** What has been heard and found right, the end of it. */
  past = "";
  /** What must come next, and what has come. */
  due = "";
  heard = "";

  constructor(readonly origin: string) {}
}

const NEEDED: Record<string, string> = {
  ...{ nick: "NAME", me: "ACTION", msg: "NAME TEXT" },
  ...{ reply: "TEXT", ignore: "NAME" },
};

/** Who must hear what, in the simplest way that can be thought of. */
class Model {
  /** Those who have a name; who took one last is the last. */
  people: Person[] = [];
  /** Who reads what the server prints. */
  readonly operator = new Person("the operator");
  #said: string[] = [];
  #here = 0;
  #guests = 0;

  constructor(readonly askName: boolean, readonly history: number) {}

  join(origin: string): Person {
    const person = new Person(origin);
    this.#here++;
    if (this.askName) tell(person, "* Welcome to Parley. What is your name?");
    else {
      let name;
      do name = `guest${++this.#guests}`; while (this.find(name));
      const help = "Type to talk, /nick NAME for a name, /help for more.";
      tell(person, `* Welcome, ${name}. ${help}`);
      this.#enter(person, name);
    }
    this.#print("New Connection from", person);
    return person;
  }

  /** `text`, of which only ASCII may make a line longer than 4,096 bytes. */
  type(person: Person, text: string): void {
    const lines = (person.typed + text).split("\n")
      .map((line) => line.match(/.{1,4096}/gs) ?? [""]);
    person.typed = lines.at(-1)!.pop()!;
    // deno-lint-ignore no-control-regex
    const unheard = /\x1b\[\d+m|[\x00-\x08\n-\x1f]/g;
    for (const typed of lines.flat()) {
      const line = typed.replace(unheard, "");
      if (line && person.here) this.#hear(person, line);
    }
  }

  leave(person: Person, reason = ""): undefined {
    if (!person.here) return;
    person.here = false;
    this.#here--;
    this.people = this.people.filter((other) => other !== person);
    if (person.name) this.#coming(person, "left", reason && ` (${reason})`);
    this.#print("Connection closed by", person, reason);
  }

  find(name: string): Person | undefined {
    const key = (name: string) => name.normalize("NFKC").toLowerCase();
    return this.people.find((person) => key(person.name) === key(name));
  }

  #hear(person: Person, line: string): void {
    const [, command, text] = /^\/(\S*)\s*(.*?)\s*$/.exec(line) ?? [];
    if (person.name === "") this.#takeName(person, line.trim());
    else if (command === undefined || command.startsWith("/")) {
      this.#say(person, `[${person.name}] ${line.replace(/^\//, "")}`);
    } else {
      const answer = this.#obey(person, command, text);
      if (answer) tell(person, answer);
    }
  }

  #takeName(person: Person, wanted: string): void {
    const name = wanted.normalize("NFKC");
    const refusal = this.#refusal(person, name);
    if (refusal) {
      tell(person, `! ${refusal} Join again with another.`);
      this.leave(person, "no name");
    } else {
      this.#enter(person, name);
      this.#print("Name given by", person);
    }
  }

  #enter(person: Person, name: string): void {
    const nobody = this.people.length || this.askName ? "" : "nobody else yet";
    tell(person, this.#whoIsHere + nobody, ...this.#said);
    person.name = name;
    this.#coming(person, "entered");
    this.people.push(person);
  }

  get #whoIsHere(): string {
    const names = this.people.map((person) => person.name);
    const more = names.length > 20 ? ` and ${names.length - 20} more` : "";
    return `* The room contains: ${names.slice(0, 20).join(", ")}${more}`;
  }

  #refusal(person: Person, name: string): string | undefined {
    if (!/^[\p{L}\d_-]{1,24}$/u.test(name)) {
      return "A name is 1 to 24 letters, digits, _ or -.";
    }
    if (/^(host|you|server)$/i.test(name)) {
      return `The name ${name} is reserved.`;
    }
    const owner = this.find(name) ?? person;
    return owner === person ? undefined : `The name ${name} is taken.`;
  }

  /** Does what a command says, and tells what it is answered with. */
  #obey(person: Person, typed: string, text: string): string | undefined {
    const { name, correspondent } = person, command = typed.toLowerCase();
    const [, to, message] = /^(\S+)\s+(.*)$/.exec(text) ?? [];
    const called = command === "msg" ? to : text;
    if (command in NEEDED && !called) {
      return `! Type /${command} ${NEEDED[command]}.`;
    }
    const whom = this.find(called)!;
    if (/^(msg|ignore)$/.test(command) && !whom) {
      return `! Nobody here is called ${called}. Type /who for who is here.`;
    }
    switch (command) {
      case "nick": {
        const wanted = text.normalize("NFKC");
        const refusal = this.#refusal(person, wanted);
        if (refusal) return `! ${refusal} Choose one with /nick NAME.`;
        if (wanted === name) return `! You are ${name} already.`;
        tell(this.people, `* ${name} is now known as ${wanted}`);
        this.people = this.people.filter((other) => other !== person);
        this.people.push(person);
        person.name = wanted;
        return;
      }
      case "who":
        return this.#whoIsHere;
      case "me":
        return this.#say(person, `** ${name} ${text}`);
      case "msg":
        return this.#whisper(person, whom, message);
      case "reply":
        if (!correspondent) {
          return "! Nobody has spoken to you alone. Type /msg NAME TEXT.";
        }
        return correspondent.here
          ? this.#whisper(person, correspondent, text)
          : `! ${correspondent.name} has left the room.`;
      case "ignore":
        if (whom === person) return "! That is you. Type another's name.";
        if (person.ignored.delete(whom)) {
          return `* You hear ${whom.name} again.`;
        }
        person.ignored.add(whom);
        if (correspondent === whom) person.correspondent = undefined;
        text = `Type /ignore ${whom.name} to stop that.`;
        return `* You do not hear ${whom.name} now. ${text}`;
      case "quiet":
        person.quiet = !person.quiet;
        if (!person.quiet) return "* You hear who enters and leaves again.";
        return "* You do not hear who enters and leaves now. Type /quiet to stop that.";
      case "quit":
        return this.leave(person, text);
    }
    typed = typed.slice(0, 24);
    return `! There is no command /${typed}. Type /help for a list, //${typed} to say it.`;
  }

  #say(from: Person, line: string): undefined {
    const others = this.#hearers(from).filter((person) => person !== from);
    tell(others, line);
    this.#said = [...this.#said, line].slice(-this.history);
  }

  #whisper(from: Person, to: Person, text: string): string {
    if (!to.ignored.has(from)) {
      tell(to, `[${from.name} -> you] ${text}`);
      to.correspondent = from;
    }
    return `[you -> ${to.name}] ${text}`;
  }

  #coming(person: Person, what: string, why = ""): void {
    const line = `* ${person.name} has ${what} the room${why}`;
    tell(this.#hearers(person).filter(({ quiet }) => !quiet), line);
  }

  /** Those who do not ignore `from`. */
  #hearers(from: Person): Person[] {
    return this.people.filter(({ ignored }) => !ignored.has(from));
  }

  #print(what: string, { name, origin }: Person, reason = ""): void {
    const who = [name, reason, `${this.#here} here`].filter(Boolean);
    tell(this.operator, `${what} ${origin} (${who.join(", ")})`);
  }
}

function tell(who: Person | Person[], ...lines: string[]): void {
  const text = lines.map((line) => line + "\n").join("");
  for (const person of [who].flat()) person.due += text;
}

/** A connection in memory, and as unreliable as one through a network. */
class Wire implements Connection {
  /** Takes nothing for now. */
  stalled = false;
  /** Refuses what is written. */
  deaf = false;
  /** Fails whatever is done with it. */
  reset = false;
  /** The client will send no more. */
  ended = false;
  /** The server will write no more. */
  over = false;
  closed = false;
  /** Whether the server has looked at all that was sent and waits for more. */
  idle = false;
  closeWrite?: () => Promise<void>;
  #unread: Uint8Array = new Uint8Array(0);
  #changed = Promise.withResolvers<void>();
  readonly #decoder = new TextDecoder();

  /** @param dice its own, as how often the server reads and writes depends on
   * the time, and what comes after shall not */
  constructor(readonly person: Person, readonly dice: Dice) {
    if (dice(2)) this.closeWrite = () => this.#endWrite();
  }

  async read(buffer: Uint8Array): Promise<number | null> {
    this.idle = this.#unread.length === 0;
    while (!this.#unread.length && !this.reset && !this.ended) {
      await this.#changed.promise;
    }
    if (this.reset) throw new Deno.errors.ConnectionReset();
    if (!this.#unread.length) return null;
    const count = this.#some(Math.min(this.#unread.length, buffer.length));
    buffer.set(this.#unread.subarray(0, count));
    this.#unread = this.#unread.subarray(count);
    return count;
  }

  async write(bytes: Uint8Array): Promise<number> {
    if (this.dice(4) === 0) await turn();
    while (this.stalled && !this.deaf && !this.reset) {
      await this.#changed.promise;
    }
    if (this.deaf || this.reset) throw new Deno.errors.BrokenPipe();
    // Taken now, as a socket does it: what was changed meanwhile is found out.
    const taken = bytes.subarray(0, this.#some(bytes.length));
    this.person.heard += this.#decoder.decode(taken, { stream: true });
    return taken.length;
  }

  close(): void {
    if (this.closed) throw new Deno.errors.BadResource();
    this.change({ over: true, closed: true, reset: true });
  }

  async #endWrite(): Promise<void> {
    this.over = true;
    await turn();
    this.change({ ended: true }); // as nc does
  }

  #some(most: number): number {
    return this.dice(3) ? most : 1 + this.dice(most);
  }

  send(text: string): void {
    this.idle = false;
    const bytes = encoder.encode(text);
    this.#unread = new Uint8Array([...this.#unread, ...bytes]);
    this.change({});
  }

  change(to: Partial<Wire>): void {
    Object.assign(this, to);
    this.#changed.resolve();
    this.#changed = Promise.withResolvers();
  }
}

const NAMES = [
  ...["alice", "Alice", "bob", "BOB", "zoë", "ＺＯË", "Ольга"],
  ...["you", "Server", "no space", "semi;colon", "x".repeat(25), "-", "👋"],
];

/** People who come, type and go at random, fewer than the crowd of 50 that is
 * told of it by the clock. */
class Simulation {
  readonly #dice: Dice;
  readonly #model: Model;
  readonly #server: ChatServer;
  #wires: Wire[] = [];
  #joined = 0;
  #typed = 0;
  readonly #steps: string[] = [];
  #error: unknown;

  constructor(readonly seed: number, askName: boolean) {
    this.#dice = diceOf(seed);
    this.#model = new Model(askName, 5);
    const { operator } = this.#model;
    this.#server = ChatServer.listen(
      { host: "127.0.0.1", port: 0, rate: 0, history: 5, askName },
      { print: (line) => operator.heard += line + "\n" },
    );
  }

  async run(steps: number): Promise<void> {
    const caught = (event: Event) => {
      event.preventDefault();
      const { error } = event as ErrorEvent;
      this.#error ??= error ?? (event as PromiseRejectionEvent).reason;
    };
    const kinds = ["error", "unhandledrejection"];
    for (const kind of kinds) addEventListener(kind, caught);
    try {
      while (this.#steps.length < steps) await this.#step();
      await this.#stop();
    } finally {
      for (const wire of this.#wires) wire.change({ reset: true });
      // What went wrong may keep it from stopping, and is the better message.
      await within(this.#server.stop(), "the end").catch(() => {});
      for (const kind of kinds) removeEventListener(kind, caught);
    }
  }

  async #step(): Promise<void> {
    const dice = this.#dice, most = 45, roll = dice(100);
    const here = this.#wires.filter(({ person }) => person.here);
    // The more are here, the more often one of them leaves.
    const leaver = roll < 15 ? here[dice(most)] : undefined;
    let wire = leaver ?? pick(dice, lately(dice, here));
    if (leaver) await this.#leave(leaver);
    else if (!wire || (roll < 30 && here.length < most)) wire = this.#join();
    else if (roll < 45) {
      this.#note(wire, wire.stalled ? "reads on" : "stalls");
      wire.change({ stalled: !wire.stalled });
    } else {
      const lines = Array.from(
        { length: 1 + dice(4) },
        () => this.#line(wire.person),
      );
      if (wire.person.name === "") lines.unshift(this.#name());
      const unfinished = pick(dice, ["", "", "", "and ", "/me "]);
      await this.#type(wire, lines.join("\n") + "\n" + unfinished);
    }
    const { person } = wire, { operator } = this.#model;
    await this.#until(() => operator.due === "" && (wire.idle || !person.here));
    // One who has left reads on now or never, lest it race with its deadline.
    if (!person.here && dice(2)) wire.change({ stalled: false });
    if (dice(3) === 0) await this.#settle();
  }

  #join(): Wire {
    const remote = { hostname: "192.0.2.1", port: ++this.#joined };
    const person = this.#model.join(`${remote.hostname}:${remote.port}`);
    const wire = new Wire(person, diceOf(this.#dice(2 ** 32)));
    wire.stalled = this.#dice(8) === 0;
    this.#note(wire, wire.stalled ? "joins, stalled" : "joins");
    this.#wires.push(wire);
    this.#server.admit(wire, remote);
    return wire;
  }

  async #leave(wire: Wire): Promise<void> {
    const how = pick(this.#dice, ["ends", "hangs up", "resets", "is deaf"]);
    if (how === "ends") await this.#type(wire, this.#line(wire.person));
    this.#note(wire, how);
    const ended = how === "ends" || how === "hangs up";
    if (ended) this.#model.type(wire.person, "\n");
    if (how !== "is deaf") this.#model.leave(wire.person);
    const deaf = wire.deaf || how !== "ends", reset = how === "resets";
    wire.change({ deaf, reset, ended });
  }

  async #type(wire: Wire, text: string): Promise<void> {
    if (/\/(ignore|quiet)/.test(text)) {
      // Whom one hears is looked at when a line is written, not when it is said:
      // nothing may be on the way.
      wire.change({ stalled: false });
      await this.#settle();
      await turn();
    }
    this.#note(wire, `types ${JSON.stringify(text)}`);
    this.#model.type(wire.person, text);
    wire.send(text);
  }

  #line({ correspondent }: Person): string {
    const dice = this.#dice, number = ++this.#typed;
    const person = dice(3)
      ? pick(dice, lately(dice, this.#model.people))
      : correspondent;
    const name = person?.name ?? "nobody";
    const somebody = pick(dice, [name, name, name.toUpperCase(), "nobody"]);
    const wanted = this.#name();
    return pick(dice, [
      `hello ${number}`,
      `日本 👋 ${number}`,
      ` /well ${number}`,
      `//slashed ${number}`,
      pick(dice, ["", "\r", " ", "/", "//", "\x07\t", "\x1b[1mbold\x1b[0m\r"]),
      "x".repeat(dice(9_000)),
      `/me waves ${number}`,
      `/ME  is there\r`,
      `/msg ${somebody}  in private ${number} \r`,
      `/msg ${somebody} psst ${number}`,
      `/reply of course ${number}`,
      `/reply no ${number}`,
      `/nick ${wanted}`,
      `/Nick  ${wanted} `,
      `/nick ${somebody}`,
      pick(dice, ["/who", "/WHO", "/who  cares ", "/help-me please"]),
      pick(dice, ["/nick", "/me", "/msg x", "/reply ", "/ignore"]),
      `/ignore ${somebody}`,
      "/quiet",
      pick(dice, ["/quit", "/quit tired", "/quit  of you  "]),
    ]);
  }

  #name(): string {
    const dice = this.#dice, guest = `guest${this.#joined + dice(9)}`;
    return pick(dice, [`person${++this.#typed}`, pick(dice, NAMES), guest]);
  }

  async #stop(): Promise<void> {
    for (const wire of this.#wires) {
      if (wire.person.here) wire.change({ stalled: false });
      else if (wire.stalled) wire.change({ reset: true });
    }
    await this.#settle();
    this.#steps.push("The server stops");
    const wires = this.#wires, here = wires.filter(({ person }) => person.here);
    tell(here.map(({ person }) => person), "* Shutdown Server");
    tell(this.#model.operator, "Shutdown Server ......");
    let stopped = false;
    this.#server.stop().then(() => stopped = true);
    await this.#until(() => stopped && wires.every(({ closed }) => closed));
  }

  /** Waits until everyone who listens has heard all, and its end if it left. */
  async #settle(): Promise<void> {
    await this.#until(() => this.#wires.every((wire) => this.#settled(wire)));
    this.#wires = this.#wires.filter(({ closed }) => !closed);
  }

  #settled({ person, stalled, deaf, over }: Wire): boolean {
    return stalled || deaf || (person.due === "" && over !== person.here);
  }

  async #until(check: () => boolean): Promise<void> {
    const end = performance.now() + WAIT_MILLISECONDS;
    for (;;) {
      if (this.#error) throw new Error(this.#story, { cause: this.#error });
      for (const { person, stalled, deaf, over } of this.#wires) {
        this.#verify(person, over && !stalled && !deaf);
      }
      this.#verify(this.#model.operator);
      if (check()) return;
      if (performance.now() > end) break;
      await turn();
    }
    const late = this.#wires.find((wire) => !this.#settled(wire));
    this.#verify(late?.person ?? this.#model.operator, true);
    throw new Error(`Late: ${this.#story}`);
  }

  /** Looks at what has come since the last time, and whether it is all. */
  #verify(person: Person, all = false): void {
    const { name, origin, past, heard, due } = person;
    if (heard === "" && !(all && due)) return;
    if (!due.startsWith(heard) || (all && due !== heard)) {
      const shown = (past + heard).split("\n").length + 2;
      const lines = (text: string) => (past + text).split("\n", shown);
      const what = `What ${name || origin} heard. ${this.#story}`;
      assertEquals(lines(heard), lines(due), what);
      assertEquals(heard, due, what);
    }
    person.past = (past + heard).slice(-400);
    person.due = due.slice(heard.length);
    person.heard = "";
  }

  #note({ person: { name, origin } }: Wire, what: string): void {
    this.#steps.push(`${name || origin} ${what}`.slice(0, 200));
  }

  get #story(): string {
    return `Step ${this.#steps.length} with the seed ${this.seed}. Again:\n` +
      `PARLEY_SEED=${this.seed} deno test --allow-all --filter simulated\n` +
      `The last steps:\n  ${this.#steps.slice(-12).join("\n  ")}\n`;
  }
}

for (const askName of [false, true]) {
  const kind = askName ? " that asks for names" : "";
  Deno.test(`in a simulated room${kind} everyone hears what the model says`, async () => {
    const seed = Deno.env.get("PARLEY_SEED") ?? Math.random() * 2 ** 32;
    await new Simulation(Number(seed) >>> 0, askName).run(5_000);
  });
}
