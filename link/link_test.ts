/**
 * Several rooms, linked through a real `nats-server`.
 *
 * @module
 */
import { assert, assertEquals, assertRejects } from "@std/assert";
import { FakeServer } from "./fake_server.ts";
import { type Link, LinkError, type LinkOptions, linkRoom } from "./link.ts";
import { freePort, hasNatsServer, NatsServer } from "./nats_server.ts";
import {
  type NatsConnection,
  NatsConnectionImpl,
  nkeys,
  setTransportFactory,
} from "./nats.ts";
import { DenoTransport } from "./transport.ts";
import { GOODBYE, HELLO, Kind, RAW, Reader, Type, Writer } from "./wire.ts";

const ignore = !await hasNatsServer();

/** A linked room, and what its operator was told. */
class Room extends FakeServer implements AsyncDisposable {
  readonly warnings: string[] = [];
  readonly printed: string[] = [];
  link!: Link;

  static async open(
    nats: NatsServer | string,
    as: string,
    options: Partial<LinkOptions> = {},
  ): Promise<Room> {
    const room = new Room();
    room.link = await linkRoom(room, {
      servers: [typeof nats === "string" ? nats : nats.url],
      as,
      warn: (line) => room.warnings.push(line),
      print: (line) => room.printed.push(line),
      ...options,
    });
    return room;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.link.stop();
    assertEquals(this.mistakes, []);
  }
}

/** Two rooms that have met, with alice in tokyo and bob in paris. */
async function openTwo(
  nats: NatsServer,
  options: Partial<LinkOptions> = {},
): Promise<[Room, Room]> {
  const tokyo = await Room.open(nats, "tokyo", options);
  const paris = await Room.open(nats, "paris", options);
  await paris.sees(/^\* tokyo is linked/);
  await tokyo.sees(/^\* paris is linked/);
  tokyo.join("alice");
  paris.join("bob");
  await paris.sees("* alice@tokyo has entered the room");
  await tokyo.sees("* bob@paris has entered the room");
  return [tokyo, paris];
}

function test(name: string, run: () => Promise<void>): void {
  Deno.test({ name: `link: ${name}`, ignore, fn: run });
}

/** The numbers of the lines that a client saw of one person. */
function numbers(room: Room, name: string): number[] {
  const mark = `[${name}] `;
  return room.lines.flatMap((line) =>
    line.startsWith(mark) ? [parseInt(line.slice(mark.length))] : []
  );
}

/** A client saw all lines from 0 on, once and in order. */
function assertAll(room: Room, name: string, count: number): void {
  const seen = numbers(room, name);
  const wrong = seen.findIndex((number, i) => number !== i);
  assertEquals(wrong, -1, `line ${seen[wrong]} came at ${wrong}`);
  assertEquals(seen.length, count);
}

/** Says numbered lines without a pause until stopped; returns how many. */
function flood(
  room: Room,
  name: string,
  { size = 64, lines: count = 50 } = {},
): () => number {
  let number = 0;
  const timer = setInterval(() => {
    let lines = "";
    for (let i = 0; i < count; i++) {
      lines += `${number++} `.padEnd(size - 1, "x") + "\n";
    }
    room.sayLocal(name, lines.slice(0, -1));
  }, 2);
  return () => {
    clearInterval(timer);
    return number;
  };
}

const delay = (milliseconds: number) =>
  new Promise((resolve) => setTimeout(resolve, milliseconds));

test("people on two servers talk, act, join and leave as in one room", async () => {
  await using nats = await NatsServer.start();
  const [tokyo, paris] = await openTwo(nats);
  await using _tokyo = tokyo;
  await using _paris = paris;
  tokyo.sayLocal("alice", "hello\nall of you");
  await paris.sees("[alice@tokyo] hello");
  await paris.sees("[alice@tokyo] all of you");
  paris.sayLocal("bob", "waves", true);
  await tokyo.sees("** bob@paris waves");
  tokyo.renameLocal("alice", "zoë");
  await paris.sees("* alice@tokyo is now known as zoë@tokyo");
  tokyo.sayAway("zoë", "lunch");
  await paris.until(() => paris.here.get("zoë@tokyo") === "lunch", "away");
  tokyo.sayAway("zoë", null);
  await paris.until(() => paris.here.get("zoë@tokyo") === null, "back");
  tokyo.sayLocal("host", "hello from the operator");
  await paris.sees("[host@tokyo] hello from the operator");
  tokyo.leave("zoë", "bye");
  await paris.sees("* zoë@tokyo has left the room (bye)");
  assertEquals([...paris.here.keys()], ["bob"]);
  assertEquals([...tokyo.warnings, ...paris.warnings], []);
});

test("a new server learns who is there, and the people of a server that stops leave in one line", async () => {
  await using nats = await NatsServer.start();
  const [tokyo, paris] = await openTwo(nats);
  await using _paris = paris;
  tokyo.join("carol");
  tokyo.sayAway("carol", "asleep");
  await paris.sees("* carol@tokyo has entered the room");
  {
    await using oslo = await Room.open(nats, "oslo");
    await oslo.sees(/^\* tokyo is linked: 2 people have entered$/);
    await oslo.until(() => oslo.here.get("carol@tokyo") === "asleep", "away");
    await oslo.until(() => oslo.here.has("bob@paris"), "bob");
  }
  await tokyo.sees("* oslo has stopped");
  await paris.sees("* oslo has stopped");
  await tokyo.link.stop();
  await paris.sees("* tokyo has stopped: 2 people have left");
  assertEquals([...paris.here.keys()], ["bob"]);
  assertEquals([...tokyo.here.keys()], ["alice", "carol"]);
  assert(!tokyo.attached);
});

test("a private message reaches its recipient alone, or its sender is told", async () => {
  await using nats = await NatsServer.start();
  const [tokyo, paris] = await openTwo(nats);
  await using _tokyo = tokyo;
  await using _paris = paris;
  tokyo.message("alice", "bob@paris", "psst");
  await paris.sees("[alice@tokyo -> bob] psst");
  paris.message("bob", "alice@tokyo", "yes?");
  await tokyo.sees("[bob@paris -> alice] yes?");
  tokyo.message("alice", "nobody@paris", "hello?");
  await tokyo.sees("! (alice) nobody@paris is not here.");
  tokyo.message("alice", "bob@oslo", "hello?");
  await tokyo.sees("! (alice) bob@oslo is not here.");
  paris.message("host", "alice@tokyo", "from the operator");
  await tokyo.sees("[host@paris -> alice] from the operator");
});

test("raw rooms relay lines without names", async () => {
  await using nats = await NatsServer.start();
  await using tokyo = await Room.open(nats, "tokyo", { raw: true });
  await using paris = await Room.open(nats, "paris", { raw: true });
  await paris.sees("* tokyo is linked");
  await tokyo.sees("* paris is linked");
  tokyo.sayLocal("", "as it is");
  await paris.sees("as it is");
  await using oslo = await Room.open(nats, "oslo");
  await oslo.until(() => oslo.warnings.length > 0, "a warning");
  assert(/of a raw room/.test(oslo.warnings[0]), oslo.warnings[0]);
});

test("nothing is lost when NATS is killed and started again in a flood", async () => {
  await using nats = await NatsServer.start();
  const [tokyo, paris] = await openTwo(nats);
  await using _tokyo = tokyo;
  await using _paris = paris;
  const stops = [flood(tokyo, "alice"), flood(paris, "bob")];
  for (let i = 0; i < 3; i++) {
    await delay(300);
    await nats.kill();
    await delay(100);
    await nats.start();
  }
  await delay(300);
  const [alice, bob] = stops.map((stop) => stop());
  await paris.sees(new RegExp(`^\\[alice@tokyo\\] ${alice - 1} `), {
    within: 30,
  });
  await tokyo.sees(new RegExp(`^\\[bob@paris\\] ${bob - 1} `), { within: 30 });
  assertAll(paris, "alice@tokyo", alice);
  assertAll(tokyo, "bob@paris", bob);
  await tokyo.sees("* The link is down: this server goes on alone");
  await tokyo.sees("* This server is linked again");
});

test("nothing is lost when NATS is paused in a flood", async () => {
  await using nats = await NatsServer.start();
  const [tokyo, paris] = await openTwo(nats);
  await using _tokyo = tokyo;
  await using _paris = paris;
  const stop = flood(tokyo, "alice", { lines: 10 });
  await delay(200);
  nats.pause();
  await delay(10_000);
  nats.resume();
  const alice = stop();
  await paris.sees(new RegExp(`^\\[alice@tokyo\\] ${alice - 1} `), {
    within: 30,
  });
  assertAll(paris, "alice@tokyo", alice);
});

test("what an outage is too long for is counted, and the rest arrives", async () => {
  await using nats = await NatsServer.start();
  const [tokyo, paris] = await openTwo(nats);
  await using _tokyo = tokyo;
  await using _paris = paris;
  await nats.kill();
  await tokyo.sees("* The link is down: this server goes on alone");
  tokyo.join("carol");
  const line = "y".repeat(1_000), count = 8_000;
  for (let i = 0; i < count; i++) tokyo.sayLocal("alice", `${i} ${line}`);
  tokyo.leave("alice");
  await nats.start();
  await paris.sees(new RegExp(`^\\[alice@tokyo\\] ${count - 1} `), {
    within: 30,
  });
  const lost = /^\* (\d+) lines from tokyo were lost$/;
  const [, text] = lost.exec(await paris.sees(lost))!;
  const seen = numbers(paris, "alice@tokyo");
  assertEquals(seen.length + Number(text), count);
  assertEquals(seen[0], Number(text));
  assert(seen.length > 3_500, `${seen.length} of 4 MiB arrived`);
  await paris.until(() => !paris.here.has("alice@tokyo"), "alice left");
  assert(paris.here.has("carol@tokyo"));
});

test("a server that cannot reach NATS starts alone, warns once, and is linked later", async () => {
  const port = freePort();
  const secret = `nats://user:secret@127.0.0.1:${port}`;
  await using tokyo = await Room.open(secret, "tokyo");
  tokyo.join("alice");
  tokyo.sayLocal("alice", "anybody?");
  await delay(1_000);
  assertEquals(tokyo.warnings.length, 1);
  assert(
    tokyo.warnings[0].startsWith(`Cannot link through 127.0.0.1:${port}: `),
    tokyo.warnings[0],
  );
  await using nats = await NatsServer.start(undefined, port);
  await using paris = await Room.open(nats, "paris");
  await paris.sees(/^\* tokyo is linked/, { within: 20 });
  await paris.until(() => paris.here.has("alice@tokyo"), "alice");
  assertEquals(tokyo.warnings.length, 1);
  assertEquals(tokyo.printed, [`Linked as tokyo through 127.0.0.1:${port}`]);
  assert(!/secret/.test([...tokyo.warnings, ...tokyo.lines].join()));
});

test("the first NATS server that answers is used", async () => {
  await using nats = await NatsServer.start();
  const servers = [`nats://127.0.0.1:${freePort()}`, nats.url];
  await using tokyo = await Room.open(nats, "tokyo", { servers });
  assertEquals(tokyo.printed, [
    `Linked as tokyo through 127.0.0.1:${nats.port}`,
  ]);
});

test("a second server with the same name is refused", async () => {
  await using nats = await NatsServer.start();
  const [tokyo, paris] = await openTwo(nats);
  await using _tokyo = tokyo;
  await using _paris = paris;
  const error = await assertRejects(
    () => Room.open(nats, "tokyo"),
    LinkError,
  );
  assertEquals(
    error.message,
    "Cannot link as tokyo: that name is in use " +
      "(give another one with --link-as NAME)",
  );
  tokyo.sayLocal("alice", "still here");
  await paris.sees("[alice@tokyo] still here");
  // Of two that start at once one is refused.
  const both = await Promise.allSettled([
    Room.open(nats, "oslo"),
    Room.open(nats, "oslo"),
  ]);
  assertEquals(both.map((it) => it.status).sort(), ["fulfilled", "rejected"]);
  for (const it of both) {
    if (it.status === "fulfilled") await it.value.link.stop();
  }
});

// -- servers that crash

/** Another process with a linked room, which says what it is told to. */
class Child implements AsyncDisposable {
  readonly #process: Deno.ChildProcess;
  readonly #input: WritableStreamDefaultWriter<Uint8Array>;
  readonly #output: ReadableStreamDefaultReader<string>;

  /** @param ca the certificate that it trusts */
  constructor(url: string, as: string, ca?: string) {
    const trust = ca === undefined ? [] : ["--cert", ca];
    this.#process = new Deno.Command(Deno.execPath(), {
      args: ["run", "--allow-all", ...trust, import.meta.filename!, url, as],
      stdin: "piped",
      stdout: "piped",
    }).spawn();
    this.#output = this.#process.stdout.pipeThrough(new TextDecoderStream())
      .getReader();
    this.#input = this.#process.stdin.getWriter();
  }

  /** Waits for what its operator is told first. */
  async prints(line: RegExp): Promise<void> {
    const { value } = await this.#output.read();
    assert(line.test(value?.trimEnd() ?? ""), value);
  }

  async say(text: string): Promise<void> {
    await this.#input.write(new TextEncoder().encode(text + "\n"));
  }

  kill(signal: Deno.Signal): void {
    this.#process.kill(signal);
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.kill("SIGKILL");
    await this.#process.status;
    await this.#input.abort().catch(() => {});
    await this.#output.cancel();
  }
}

if (import.meta.main && Deno.args.length === 2) {
  const [url, as] = Deno.args;
  const room = await Room.open(url, as, { print: console.log });
  room.join("bob");
  const decoder = new TextDecoder();
  for await (const chunk of Deno.stdin.readable) {
    room.sayLocal("bob", decoder.decode(chunk).trimEnd());
  }
}

test("a server that crashes and starts again takes its name back, without ghosts", async () => {
  await using nats = await NatsServer.start();
  await using tokyo = await Room.open(nats, "tokyo");
  {
    await using paris = new Child(nats.url, "paris");
    await tokyo.sees("* bob@paris has entered the room");
    await paris.say("one");
    await tokyo.sees("[bob@paris] one");
  }
  await using paris = new Child(nats.url, "paris");
  await tokyo.sees("* paris has started again: 1 person has left");
  await paris.say("two");
  await tokyo.sees("[bob@paris] two");
  assertEquals([...tokyo.here.keys()], ["bob@paris"]);
  assertEquals(tokyo.warnings, []);
});

test("a paused server is gone after 15 s, delays no other, and goes on where it was", async () => {
  await using nats = await NatsServer.start();
  const [tokyo, oslo] = await openTwo(nats);
  await using _tokyo = tokyo;
  await using _oslo = oslo;
  await using paris = new Child(nats.url, "berlin");
  await tokyo.sees("* bob@berlin has entered the room");
  paris.kill("SIGSTOP");
  const stopped = performance.now();
  // Faster than 5 MB a second, NATS itself holds everyone back until it closes
  // the connection that takes nothing.
  const stop = flood(tokyo, "alice", { lines: 20 });
  await tokyo.sees("* berlin is gone: 1 person has left", { within: 17 });
  assert(performance.now() - stopped > 9_000);
  const alice = stop();
  await oslo.sees(new RegExp(`^\\[alice@tokyo\\] ${alice - 1} `), {
    within: 2,
  });
  assertAll(oslo, "alice@tokyo", alice);
  assert(!tokyo.here.has("bob@berlin"));
  paris.kill("SIGCONT");
  await tokyo.sees("* berlin is linked again: 1 person has entered");
  await paris.say("I was asleep");
  await tokyo.sees("[bob@berlin] I was asleep");
});

// -- broken and hostile peers

class Attacker implements AsyncDisposable {
  private constructor(readonly connection: NatsConnection) {}

  static async connect(nats: NatsServer): Promise<Attacker> {
    setTransportFactory({ factory: () => new DenoTransport() });
    const servers = `127.0.0.1:${nats.port}`;
    return new Attacker(await NatsConnectionImpl.connect({ servers }));
  }

  send(subject: string, message: Writer | Uint8Array): void {
    if (message instanceof Writer) message = message.done();
    this.connection.publish(`parley.parley.${subject}`, message);
  }

  hello(as: string, identity: string, next = 0, flags = HELLO): void {
    this.send(
      `log.${as}`,
      Writer.message(Kind.Heartbeat, flags, identity).u48(next).u48(0).u48(1),
    );
  }

  entries(
    as: string,
    identity: string,
    first: number,
    entries: Writer[],
  ): void {
    const message = Writer.message(Kind.Entries, 0, identity)
      .u48(first).u48(0).u32(entries.length);
    for (const entry of entries) message.raw(entry.done());
    this.send(`log.${as}`, message);
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.connection.drain();
  }
}

const EVIL = "0123456789abcdef";
const entry = {
  join: (name: string) => new Writer().u8(Type.Joined).string(name),
  say: (name: string, text: string, count = 1) => {
    const bytes = new TextEncoder().encode(text);
    return new Writer().u8(Type.Said).string(name).u16(count)
      .u16(bytes.length).raw(bytes);
  },
  rename: (from: string, to: string) =>
    new Writer().u8(Type.Renamed).string(from).string(to),
};

test("what does not follow the format is dropped, and told at most once a second", async () => {
  await using nats = await NatsServer.start("max_payload: 32MB");
  const [tokyo, paris] = await openTwo(nats);
  await using _tokyo = tokyo;
  await using _paris = paris;
  await using evil = await Attacker.connect(nats);
  const before = paris.lines.length;
  const started = performance.now();
  const subjects = ["log.evil", "to.paris.evil", "log.tokyo", "to.paris.tokyo"];
  for (let i = 0; i < 2_000; i++) {
    const bytes = crypto.getRandomValues(new Uint8Array(i % 200));
    // Half of them with a good header.
    if (i % 2) bytes.set([80, 1, i % 10, i % 8].slice(0, bytes.length));
    evil.send(subjects[i % 4], bytes);
  }
  evil.send("log.evil", new Uint8Array(10 * 1024 * 1024));
  evil.send("log.tokyo", new Uint8Array(10 * 1024 * 1024).fill(80));
  evil.send("log.with*wild", new Uint8Array(3));
  await evil.connection.flush();
  tokyo.sayLocal("alice", "hello");
  await paris.sees("[alice@tokyo] hello");
  await paris.until(() => paris.warnings.length > 0, "a warning");
  const most = 2 + (performance.now() - started) / 1_000;
  assert(paris.warnings.length <= most, paris.warnings.join("\n"));
  assertEquals(
    paris.lines.slice(before).filter((it) => !/ is linked$/.test(it)),
    ["[alice@tokyo] hello"],
  );
});

test("names that are none, and words of people who are not there, are dropped", async () => {
  await using nats = await NatsServer.start();
  const [tokyo, paris] = await openTwo(nats);
  await using _tokyo = tokyo;
  await using _paris = paris;
  await using evil = await Attacker.connect(nats);
  evil.hello("evil", EVIL);
  await paris.sees("* evil is linked");
  const names = [
    "",
    "[host]",
    "alice@tokyo",
    "a b",
    "* x",
    "x".repeat(25),
    "new\nline",
    "\x1b[31mred",
    "ａｌｉｃｅ",
  ];
  let number = 0;
  for (const name of names) {
    evil.entries("evil", EVIL, number++, [entry.join(name)]);
    evil.entries("evil", EVIL, number++, [entry.say(name, "forged\n")]);
  }
  evil.entries("evil", EVIL, number++, [entry.join("mallory")]);
  evil.entries("evil", EVIL, number++, [entry.rename("mallory", "[host]")]);
  evil.entries("evil", EVIL, number++, [entry.join("trent")]);
  evil.entries("evil", EVIL, number++, [entry.say("trent", "the last\n")]);
  await paris.sees("[trent@evil] the last");
  assertEquals(paris.lines.filter((it) => /forged/.test(it)), []);
  assertEquals([...paris.here.keys()].sort(), [
    "alice@tokyo",
    "bob",
    "trent@evil",
  ]);
  await paris.until(() => paris.warnings.length > 0, "a warning");
});

test("claims for another server change nothing", async () => {
  await using nats = await NatsServer.start();
  const [tokyo, paris] = await openTwo(nats);
  await using _tokyo = tokyo;
  await using _paris = paris;
  await using evil = await Attacker.connect(nats);
  for (const flags of [HELLO, GOODBYE, RAW, 0]) {
    evil.hello("tokyo", EVIL, 5, flags);
  }
  evil.entries("tokyo", EVIL, 0, [entry.say("alice", "forged\n")]);
  evil.entries("paris", EVIL, 0, [entry.say("bob", "forged\n")]);
  // Objections to a name that is held already.
  for (const name of ["tokyo", "paris"]) {
    evil.send(`to.${name}.${name}`, Writer.message(Kind.Claim, 0, EVIL));
    evil.send(
      `to.${name}.${name}`,
      Writer.message(Kind.Held, 0, EVIL).identity(EVIL),
    );
  }
  await evil.connection.flush();
  const end = performance.now() + 2_500;
  while (performance.now() < end) {
    evil.hello("tokyo", EVIL, 5);
    await delay(100);
  }
  tokyo.sayLocal("alice", "it is me");
  await paris.sees("[alice@tokyo] it is me");
  assertEquals(paris.lines.filter((it) => /forged|^\* tokyo /.test(it)), [
    "* tokyo is linked",
  ]);
  assert(
    tokyo.warnings.some((it) => /^Another server is linked as tokyo/.test(it)),
    tokyo.warnings.join("\n"),
  );
});

test("numbers that cannot be, and a crowd without an end, are bounded", async () => {
  await using nats = await NatsServer.start();
  const [tokyo, paris] = await openTwo(nats);
  await using _tokyo = tokyo;
  await using _paris = paris;
  await using evil = await Attacker.connect(nats);
  evil.hello("evil", EVIL, 2 ** 48 - 1);
  await paris.sees("* evil is linked");
  const asked: number[] = [];
  evil.connection.subscribe("parley.parley.to.evil.paris", {
    callback: () => void asked.push(performance.now()),
  });
  const entries = Writer.message(Kind.Entries, 0, EVIL).u48(2 ** 48 - 2).u48(0);
  evil.send("log.evil", entries.u32(2 ** 32 - 1));
  // Each message makes a thousand people.
  let number = 0;
  for (let message = 0; message < 70; message++) {
    const people = Array.from(
      { length: 1_000 },
      (_, i) => entry.join(`p${message}_${i}`),
    );
    evil.entries("evil", EVIL, number, people);
    number += people.length;
  }
  evil.entries("evil", EVIL, number, [entry.say("p0_0", "done\n")]);
  await paris.sees("[p0_0@evil] done");
  assertEquals(paris.here.size, 65_536 + 2);
  await paris.until(
    () => paris.warnings.some((it) => /more people/.test(it)),
    "a warning",
  );
  tokyo.sayLocal("alice", "hello");
  await paris.sees("[alice@tokyo] hello");
  for (let i = 0; i < 300; i++) {
    evil.hello(`e${i}`, EVIL.replace(/.../, `${100 + i}`));
  }
  await paris.until(
    () => paris.warnings.some((it) => /256 servers/.test(it)),
    "a warning",
  );
  assert(asked.length < 20, `${asked.length} questions`);
});

test("a forged goodbye is corrected by the next heartbeat", async () => {
  await using nats = await NatsServer.start();
  const [tokyo, paris] = await openTwo(nats);
  await using _tokyo = tokyo;
  await using _paris = paris;
  await using evil = await Attacker.connect(nats);
  const identity = Promise.withResolvers<string>();
  evil.connection.subscribe("parley.parley.log.tokyo", {
    callback: (_error, { data }) =>
      identity.resolve(new Reader(data).header().identity),
  });
  await evil.connection.flush();
  tokyo.sayLocal("alice", "before");
  await paris.sees("[alice@tokyo] before");
  evil.hello("tokyo", await identity.promise, 2, GOODBYE);
  await paris.sees("* tokyo has stopped: 1 person has left");
  await paris.sees("* tokyo is linked: 1 person has entered");
  tokyo.sayLocal("alice", "after");
  await paris.sees("[alice@tokyo] after");
});

// -- credentials

test("a user and password, and a token, let in and are never shown", async () => {
  for (
    const [config, good, bad] of [
      [
        'authorization { user: "tom", password: "s3:cr%t@" }',
        "tom:s3%3Acr%25t%40",
        "tom:wr0ng",
      ],
      ['authorization { token: "t0ken" }', "t0ken", "wr0ng"],
    ]
  ) {
    await using nats = await NatsServer.start(config);
    const address = `127.0.0.1:${nats.port}`;
    await using tokyo = await Room.open(`nats://${good}@${address}`, "tokyo");
    assertEquals(tokyo.printed, [`Linked as tokyo through ${address}`]);
    await using oslo = await Room.open(`nats://${bad}@${address}`, "oslo");
    assertEquals(oslo.warnings.length, 1);
    assert(/Authorization/i.test(oslo.warnings[0]), oslo.warnings[0]);
    assert(!/wr0ng|tom/.test(oslo.warnings[0]), oslo.warnings[0]);
  }
});

test("tls:// is encrypted, and needs a trusted certificate", async () => {
  const directory = await Deno.makeTempDir();
  const file = (name: string) => `${directory}/${name}`;
  const openssl = async (...args: string[]) => {
    const { success } = await new Deno.Command("openssl", {
      args,
      stdout: "null",
      stderr: "null",
    }).output();
    assert(success, `openssl ${args[0]}`);
  };
  const key = "-newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes".split(" ");
  await openssl(
    ...["req", "-x509", ...key, "-subj", "/CN=test", "-days", "2"],
    ...["-keyout", file("ca.key"), "-out", file("ca.pem")],
  );
  await openssl(
    ...["req", ...key, "-subj", "/CN=localhost"],
    ...["-keyout", file("key.pem"), "-out", file("request.pem")],
  );
  await Deno.writeTextFile(file("names"), "subjectAltName=IP:127.0.0.1");
  await openssl(
    ...["x509", "-req", "-in", file("request.pem"), "-days", "2"],
    ...["-CA", file("ca.pem"), "-CAkey", file("ca.key"), "-CAcreateserial"],
    ...["-extfile", file("names"), "-out", file("cert.pem")],
  );
  const tls = `cert_file: "${file("cert.pem")}", key_file: "${
    file("key.pem")
  }"`;
  await using nats = await NatsServer.start(`tls { ${tls} }`);
  const url = `tls://127.0.0.1:${nats.port}`;
  {
    await using tokyo = new Child(url, "tokyo", file("ca.pem"));
    await tokyo.prints(/^Linked as tokyo through 127\.0\.0\.1:\d+$/);
  }
  await using oslo = await Room.open(url, "oslo");
  assert(/certificate/.test(oslo.warnings[0]), oslo.warnings[0]);
  await using plain = await NatsServer.start();
  await using bergen = await Room.open(
    plain.url.replace("nats:", "tls:"),
    "bergen",
  );
  assert(/does not use TLS/.test(bergen.warnings[0]), bergen.warnings[0]);
  await Deno.remove(directory, { recursive: true });
});

test("permissions bind a name to a user", async () => {
  const permissions = (name: string) =>
    `{ user: ${name}, password: x, permissions: {
      publish: ["parley.*.log.${name}", "parley.*.to.*.${name}"]
      subscribe: ["parley.*.log.*", "parley.*.to.${name}.*"] } }`;
  await using nats = await NatsServer.start(
    `authorization { users: [ ${
      ["tokyo", "paris"].map(permissions).join(", ")
    } ] }`,
  );
  const url = (user: string) => `nats://${user}:x@127.0.0.1:${nats.port}`;
  await using tokyo = await Room.open(url("tokyo"), "tokyo");
  await using paris = await Room.open(url("paris"), "paris");
  await tokyo.sees("* paris is linked");
  paris.join("bob");
  await tokyo.sees("* bob@paris has entered the room");
  await using oslo = await Room.open(url("paris"), "oslo");
  await oslo.until(() => oslo.warnings.length > 0, "a warning");
  assert(
    /^NATS refuses .*Permissions/i.test(oslo.warnings[0]),
    oslo.warnings[0],
  );
});

test("a credentials file is accepted", async () => {
  const operator = nkeys.createOperator(), account = nkeys.createAccount();
  const user = nkeys.createUser();
  const token = (
    signer: typeof operator,
    subject: typeof operator,
    nats: Record<string, unknown>,
  ) => {
    const url = (bytes: string) =>
      btoa(bytes).replaceAll("+", "-").replaceAll("/", "_").replaceAll("=", "");
    const claims = {
      jti: crypto.randomUUID(),
      iat: Math.floor(Date.now() / 1000),
      iss: signer.getPublicKey(),
      name: "test",
      sub: subject.getPublicKey(),
      nats: { version: 2, ...nats },
    };
    const text = url(JSON.stringify({ typ: "JWT", alg: "ed25519-nkey" })) +
      "." + url(JSON.stringify(claims));
    const signature = signer.sign(new TextEncoder().encode(text));
    return `${text}.${url(String.fromCharCode(...signature))}`;
  };
  const all = { subs: -1, data: -1, payload: -1 };
  const limits = {
    ...all,
    imports: -1,
    exports: -1,
    conn: -1,
    leaf: -1,
    wildcards: true,
  };
  const operatorToken = token(operator, operator, { type: "operator" });
  const accountToken = token(operator, account, { type: "account", limits });
  const userToken = token(account, user, {
    type: "user",
    pub: {},
    sub: {},
    ...all,
  });
  const seed = new TextDecoder().decode(user.getSeed());
  const creds = `-----BEGIN NATS USER JWT-----
${userToken}
------END NATS USER JWT------

-----BEGIN USER NKEY SEED-----
${seed}
------END USER NKEY SEED------
`;
  await using nats = await NatsServer.start(
    `operator: ${operatorToken}
resolver: MEMORY
resolver_preload: { ${account.getPublicKey()}: ${accountToken} }`,
  );
  await using tokyo = await Room.open(nats, "tokyo", { creds });
  assertEquals(tokyo.warnings, []);
  assertEquals(tokyo.printed, [
    `Linked as tokyo through 127.0.0.1:${nats.port}`,
  ]);
});

test("invalid options are refused without showing a password", async () => {
  for (
    const [options, problem] of [
      [{ as: "to kyo" }, "Cannot use to kyo for --link-as: give"],
      [{ as: "x".repeat(25) }, "for --link-as: give 1 to 24 letters"],
      [{ room: "a.b" }, "Cannot use a.b for --link-room: give"],
      [{ servers: ["http://u:secret@h"] }, "Cannot link through h: give a URL"],
      [{ servers: ["ws://u:secret@h"] }, "Cannot link through h: give a URL"],
      [{ servers: ["tom:secret@h:1"] }, "Cannot link through h:1: give a URL"],
      [{ servers: ["nats://a:%zz@h"] }, "Cannot link through h: write %"],
      [{ creds: "nothing" }, "Cannot use --link-creds: it is not"],
    ] as [Partial<LinkOptions>, string][]
  ) {
    const error = await assertRejects(
      () => Room.open("nats://127.0.0.1:1", "tokyo", options),
      LinkError,
    );
    assert(error.message.includes(problem), error.message);
    assert(!error.message.includes("secret"), error.message);
  }
});
