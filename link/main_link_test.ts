/**
 * `main.ts --link`, from the outside: processes, and clients on sockets. Ignored
 * until `main.ts` has the option.
 *
 * @module
 */
import { assert, assertEquals } from "@std/assert";
import { freePort, hasNatsServer, NatsServer } from "./nats_server.ts";

const MAIN = new URL("../main.ts", import.meta.url);
const hasOption = (await Deno.readTextFile(MAIN)).includes("link-as");
const ignore = !hasOption || !await hasNatsServer();

function test(name: string, run: () => Promise<void>): void {
  Deno.test({ name: `--link: ${name}`, ignore, fn: run });
}

/** Lines of a stream, which can be waited for. */
class Lines {
  readonly all: string[] = [];
  #next = 0;
  #changed = Promise.withResolvers<void>();
  readonly ended: Promise<void>;

  constructor(stream: ReadableStream<Uint8Array>) {
    this.ended = this.#read(stream);
  }

  async #read(stream: ReadableStream<Uint8Array>): Promise<void> {
    const decoder = new TextDecoder();
    let rest = "";
    try {
      for await (const chunk of stream) {
        const lines = (rest + decoder.decode(chunk, { stream: true })).split(
          "\n",
        );
        rest = lines.pop()!;
        this.all.push(...lines);
        this.#changed.resolve();
        this.#changed = Promise.withResolvers();
      }
    } catch { /* closed */ }
  }

  /** Waits for the next line like `expected`; those before it are passed. */
  async next(expected: string | RegExp, seconds = 10): Promise<string> {
    const isIt = (line: string) =>
      typeof expected === "string" ? line === expected : expected.test(line);
    const end = performance.now() + 1000 * seconds;
    for (;;) {
      while (this.#next < this.all.length) {
        const line = this.all[this.#next++];
        if (isIt(line)) return line;
      }
      const left = end - performance.now();
      if (left <= 0) {
        throw new Error(
          `Not in ${seconds} s: ${expected}; came:\n${this.all.join("\n")}`,
        );
      }
      let timer;
      const late = new Promise<void>((resolve) => {
        timer = setTimeout(resolve, left);
      });
      await Promise.race([this.#changed.promise, late]);
      clearTimeout(timer);
    }
  }
}

/** A server in a process of its own. */
class Server implements AsyncDisposable {
  readonly #process: Deno.ChildProcess;
  readonly output: Lines;
  readonly errors: Lines;
  port = 0;

  constructor(...args: string[]) {
    this.#process = new Deno.Command(Deno.execPath(), {
      args: ["run", "--allow-net", MAIN.href, "--host", "127.0.0.1", ...args],
      stdin: "null",
      stdout: "piped",
      stderr: "piped",
      env: { NO_COLOR: "1" },
    }).spawn();
    this.output = new Lines(this.#process.stdout);
    this.errors = new Lines(this.#process.stderr);
  }

  /** Starts one on a free port, linked as `as`. */
  static async linked(
    nats: NatsServer,
    as: string,
    ...args: string[]
  ): Promise<Server> {
    if (!args.includes("--port")) args.push("--port", "0");
    const server = new Server("--link", nats.url, "--link-as", as, ...args);
    const line = await server.output.next(/:\d+/, 20);
    server.port = Number(/:(\d+)/.exec(line)![1]);
    await server.output.next(/^Linked as/);
    return server;
  }

  get status(): Promise<Deno.CommandStatus> {
    return this.#process.status;
  }

  /** All that it has printed. */
  get text(): string {
    return [...this.output.all, ...this.errors.all].join("\n");
  }

  kill(signal: Deno.Signal): void {
    this.#process.kill(signal);
  }

  async [Symbol.asyncDispose](): Promise<void> {
    try {
      this.kill("SIGKILL");
    } catch { /* it has ended */ }
    await this.status;
    await Promise.all([this.output.ended, this.errors.ended]);
  }
}

class Client implements Disposable {
  readonly lines: Lines;

  private constructor(readonly conn: Deno.TcpConn) {
    this.lines = new Lines(conn.readable);
  }

  static async join(port: number, name?: string): Promise<Client> {
    const client = new Client(
      await Deno.connect({ hostname: "127.0.0.1", port }),
    );
    await client.lines.next(/^\* Welcome!/);
    if (name) {
      await client.say(`/nick ${name}`);
      await client.lines.next(new RegExp(`^\\* .*\\b${name}\\b`));
    }
    return client;
  }

  async say(line: string): Promise<void> {
    await this.conn.write(new TextEncoder().encode(line + "\n"));
  }

  /** Waits until a person is here, who may be elsewhere. */
  async meets(name: string): Promise<void> {
    for (let tries = 0; tries < 50; tries++) {
      await this.say("/who");
      const line = await this.next(/^\* Here now: /);
      if (new RegExp(`[ ,]${name}[ ,]`).test(line)) return;
      await new Promise((resolve) => setTimeout(resolve, 100));
    }
    throw new Error(`${name} is not here`);
  }

  next(expected: string | RegExp, seconds?: number): Promise<string> {
    return this.lines.next(expected, seconds);
  }

  [Symbol.dispose](): void {
    try {
      this.conn.close();
    } catch { /* the stream has closed it */ }
  }
}

test("clients of two servers are in one room", async () => {
  await using nats = await NatsServer.start();
  await using tokyo = await Server.linked(nats, "tokyo");
  await using paris = await Server.linked(nats, "paris");
  using alice = await Client.join(tokyo.port, "alice");
  using bob = await Client.join(paris.port, "bob");
  await alice.meets("bob@paris");
  await bob.meets("alice@tokyo");

  await alice.say("hello");
  await bob.next("[alice@tokyo] hello");
  await bob.say("/me waves");
  await alice.next("** bob@paris waves");
  await bob.say("/who");
  await bob.next("* Here now: bob, alice@tokyo (2)");

  await alice.say("/msg bob@paris psst");
  await alice.next("[you -> bob@paris] psst");
  await bob.next("[alice@tokyo -> you] psst");
  await bob.say("/reply yes?");
  await alice.next("[bob@paris -> you] yes?");
  await bob.say("/away lunch");
  await bob.say("I am off"); // in order: alice's server knows of it now
  await alice.next("[bob@paris] I am off");
  await alice.say("/msg bob@paris there?");
  await alice.next(/lunch/);

  await bob.say("/ignore alice@tokyo");
  await bob.next(/^\* You no longer receive messages from alice@tokyo\./);
  using erin = await Client.join(tokyo.port, "erin");
  await alice.say("can you read this?");
  await erin.next("[alice] can you read this?");
  await erin.say("done"); // behind the line of alice on its way to paris
  await bob.next("[erin@tokyo] done");
  await bob.say("/ignore alice@tokyo");
  await bob.next("* You receive messages from alice@tokyo again.");
  await alice.say("and this?");
  await bob.next("[alice@tokyo] and this?");
  await alice.say("/nick carol");
  await bob.next("* alice@tokyo is now known as carol@tokyo");
  assert(!bob.lines.all.includes("[alice@tokyo] can you read this?"));

  // The history holds lines from elsewhere.
  using dave = await Client.join(paris.port);
  await dave.next("* Earlier:");
  await dave.next("[alice@tokyo] hello");

  await alice.say("/quit bye");
  await bob.next("* carol@tokyo has left the room (bye)");
});

test("no local name has an @, and a person elsewhere cannot be kicked by name", async () => {
  await using nats = await NatsServer.start();
  await using tokyo = await Server.linked(nats, "tokyo");
  using alice = await Client.join(tokyo.port);
  await alice.say("/nick bob@paris");
  await alice.next(/^! /);
});

test("processes that share a port are one room", async () => {
  if (Deno.build.os !== "linux") return;
  await using nats = await NatsServer.start();
  const port = `${freePort()}`;
  await using _one = await Server.linked(
    nats,
    "one",
    "--port",
    port,
    "--reuse-port",
  );
  await using _two = await Server.linked(
    nats,
    "two",
    "--port",
    port,
    "--reuse-port",
  );
  const clients: Client[] = [];
  try {
    for (let i = 0; i < 12; i++) {
      clients.push(await Client.join(Number(port), `c${i}`));
    }
    for (const [i, client] of clients.entries()) {
      await client.meets(`c${(i + 1) % 12}(@\\w+)?`);
    }
    await clients[0].say("hello everyone");
    for (const client of clients.slice(1)) {
      await client.next(/^\[c0(@\w+)?\] hello everyone$/);
    }
  } finally {
    for (const client of clients) client[Symbol.dispose]();
  }
});

test("a name in use ends the second start with a clear error", async () => {
  await using nats = await NatsServer.start();
  await using _tokyo = await Server.linked(nats, "tokyo");
  await using second = new Server(
    ...["--port", "0", "--link", nats.url, "--link-as", "tokyo"],
  );
  await second.errors.next(/Cannot link as tokyo: that name is in use/, 20);
  assert(!(await second.status).success);
});

test("one warning, without the password, says that NATS cannot be reached", async () => {
  const url = `nats://tom:secret@127.0.0.1:${freePort()}`;
  await using tokyo = new Server(
    ...["--port", "0", "--link", url, "--link-as", "tokyo"],
  );
  const line = await tokyo.output.next(/:\d+/, 20);
  using alice = await Client.join(Number(/:(\d+)/.exec(line)![1]), "alice");
  await alice.say("anybody?");
  await tokyo.errors.next(/^.*Cannot link through 127\.0\.0\.1/);
  assertEquals(tokyo.text.match(/Cannot link/g)?.length, 1);
  assert(!tokyo.text.includes("secret"), tokyo.text);
});

test("other servers are told that a server stops", async () => {
  await using nats = await NatsServer.start();
  await using tokyo = await Server.linked(nats, "tokyo");
  await using paris = await Server.linked(nats, "paris");
  using alice = await Client.join(tokyo.port, "alice");
  using _bob = await Client.join(paris.port, "bob");
  await alice.meets("bob@paris");
  paris.kill("SIGTERM");
  await alice.next("* paris has stopped: 1 person has left");
  assertEquals((await paris.status).code, 0);
});
