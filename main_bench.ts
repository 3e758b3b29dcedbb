/**
 * Measures Parley beside the chat server of every tutorial, and beside
 * `ncat --chat` where it is installed, on this machine:
 *
 * ```sh
 * deno task bench
 * ```
 *
 * It takes three minutes. Each group is one load on all servers, and its summary
 * says how many times faster Parley is:
 *
 * - _fan-out_: ten clients send ten lines each, at once, and an iteration ends
 *   when all the others have received them. So `time/iter` by 100 is the cost of
 *   one line among many; divided by the number of recipients too, the cost of one
 *   delivery. These figures are drawn as `docs/bench.svg`.
 * - _one line_: one client sends one line in a silent room, and an iteration ends
 *   when the others have received it. Nothing can be gathered: expect about 1x.
 *
 * The groups after these measure no sockets, but the input that costs each parser
 * the most: an iteration is 4,096 bytes of it. Their baseline is the same amount
 * of plain text, so the summary says how many times plain text each input costs.
 * Cleaning plain text takes next to nothing: look at the microseconds there, of which
 * no input takes more than 20 a kilobyte. Commands cost more, but `--rate` counts each
 * line.
 *
 * Figures differ from machine to machine and, where others use it, from run to
 * run: compare the ratios. The load is a process of its own, but in Deno too, and
 * is as busy as Parley is: from a load in C the larger rooms show a higher ratio.
 *
 * @module
 */
import { TextLineStream as UntypedLineStream } from "@std/streams/text-line-stream";
import {
  ChatServer,
  cleanLine,
  type Connection,
  normalizeName,
  type Options,
} from "./main.ts";

// The npm build of @std has no types.
const TextLineStream: new () => TransformStream<string, string> =
  UntypedLineStream;

const encoder = new TextEncoder();
const HOST = "127.0.0.1";

// -- the textbook server: web-stream framing, one write a client a line

async function serveTextbook(listener: Deno.TcpListener): Promise<void> {
  const clients = new Set<Deno.TcpConn>();
  for await (const conn of listener) {
    // As Parley does: a line would wait up to 40 ms for the acknowledgement of
    // the one before (RFC 896), and waiting is not what is measured.
    conn.setNoDelay(true);
    clients.add(conn);
    relay(conn, clients);
  }
}

async function relay(
  conn: Deno.TcpConn,
  clients: Set<Deno.TcpConn>,
): Promise<void> {
  const lines = conn.readable
    .pipeThrough(new TextDecoderStream())
    .pipeThrough(new TextLineStream());
  try {
    for await (const line of lines) {
      const bytes = encoder.encode(line + "\n");
      for (const other of clients) {
        if (other !== conn) other.write(bytes).catch(() => {});
      }
    }
  } catch { /* the connection broke */ }
  clients.delete(conn);
}

// -- the servers: this file as a program, such as `main_bench.ts textbook`

const SERVERS: Record<string, () => Deno.NetAddr> = {
  parley() {
    const options = { raw: true, rate: 0, history: 0, quiet: true };
    return ChatServer.listen({ host: HOST, port: 0, ...options }).addr;
  },
  textbook() {
    const listener = Deno.listen({ hostname: HOST, port: 0 });
    serveTextbook(listener);
    return listener.addr;
  },
};

async function main([name]: string[]): Promise<void> {
  if (!Object.hasOwn(SERVERS, name)) {
    console.error("Run this with: deno task bench");
    Deno.exit(2);
  }
  console.log(SERVERS[name]().port);
  // Standard input ends when the bench does, however that comes about.
  for await (const _ of Deno.stdin.readable);
  Deno.exit();
}

/** The command for a server, which writes its port and ends with its input. */
function command(name: string): Deno.Command {
  const [program, ...args] = name === "ncat"
    ? ["sh", "-c", `echo $0; ${NCAT} & cat; kill $!`, `${freePort()}`]
    : [Deno.execPath(), "run", "--allow-net", import.meta.filename!, name];
  return new Deno.Command(program, { args, stdin: "piped", stdout: "piped" });
}

const NCAT = `ncat -l ${HOST} $0 --chat --max-conns 2000 </dev/null`;

async function hasNcat(): Promise<boolean> {
  const args = ["--version"];
  return await new Deno.Command("ncat", { args, stderr: "null" }).output()
    .then(({ success }) => success, () => false);
}

function freePort(): number {
  using listener = Deno.listen({ hostname: HOST, port: 0 });
  return listener.addr.port;
}

// -- the load: a room full of clients, all in the process of the bench

const LINE = "x".repeat(63) + "\n";

/** How long to wait for what was said before it counts as lost. */
const DEADLINE_MILLISECONDS = 20_000;

/** How long a room is used before it is measured, for the compilers' sake. */
const WARM_MILLISECONDS = 1_000;

/** What all read into: of what comes, only the number of bytes matters. */
const sink = new Uint8Array(65_536);

interface Client {
  conn: Deno.TcpConn;
  due: number; // bytes that it has yet to hear
}

class Room {
  #clients: Client[] = [];
  /** How many clients have yet to hear something. */
  #waiting = 0;
  #heard = Promise.withResolvers<void>();

  private constructor(
    readonly server: Deno.ChildProcess,
    /** Whether the server adds words of its own, in which there is no x. */
    readonly adds: boolean,
  ) {}

  /** Starts a server and lets clients in. */
  static async open(name: string, size: number): Promise<Room> {
    const server = command(name).spawn();
    const room = new Room(server, name === "ncat");
    try {
      const { value } = await server.stdout.getReader().read();
      const port = Number(new TextDecoder().decode(value));
      while (room.#clients.length < size) {
        const conn = await connect(port);
        conn.setNoDelay(true);
        room.#clients.unshift({ conn, due: 0 });
        room.#hear(room.#clients[0]);
      }
      await room.say(1, 1); // who came last is heard: all are in
      return room;
    } catch (cause) {
      room.close();
      throw new Error(
        `Cannot open a room for ${size}: ${(cause as Error).message} ` +
          `(does ulimit -n permit ${size + 50} file descriptors?)`,
      );
    }
  }

  async #hear(client: Client): Promise<void> {
    const buffer = this.adds ? new Uint8Array(65_536) : sink;
    try {
      for (let n; (n = await client.conn.read(buffer)) !== null;) {
        client.due -= this.adds ? countLetters(buffer.subarray(0, n)) : n;
        if (client.due === 0 && --this.#waiting === 0) this.#heard.resolve();
      }
      throw new Error("The server closed a connection");
    } catch (error) {
      this.#heard.reject(error);
    }
  }

  /** Clients say lines, and all others hear them: every one, and no more. */
  async say(senders: number, lines: number): Promise<void> {
    const bytes = encoder.encode(LINE.repeat(lines));
    const size = bytes.length - (this.adds ? lines : 0); // without the newlines
    this.#heard = Promise.withResolvers();
    this.#waiting = 0;
    this.#clients.forEach((client, i) => {
      if (client.due < 0) throw new Error("More was heard than was said");
      client.due += size * (i < senders ? senders - 1 : senders);
      if (client.due > 0) this.#waiting++;
    });
    const late = setTimeout(
      () =>
        this.#heard.reject(new Error(`${this.#waiting} clients miss lines`)),
      DEADLINE_MILLISECONDS,
    );
    for (const { conn } of this.#clients.slice(0, senders)) {
      conn.write(bytes).catch(this.#heard.reject);
    }
    await this.#heard.promise.finally(() => clearTimeout(late));
  }

  close(): void {
    this.#heard.promise.catch(() => {}); // nobody waits for it any more
    for (const { conn } of this.#clients) conn.close();
    this.server.stdin.close().catch(() => {}); // and so ends the server
  }
}

/** Connects, and waits for a server that has only just begun. */
async function connect(port: number): Promise<Deno.TcpConn> {
  for (let tries = 0;; tries++) {
    try {
      return await Deno.connect({ hostname: HOST, port });
    } catch (error) {
      if (tries === 20) throw error;
      await new Promise((resolve) => setTimeout(resolve, 50));
    }
  }
}

/** How many letters x there are. */
function countLetters(bytes: Uint8Array): number {
  let letters = 0;
  for (const byte of bytes) if (byte === 120) letters++;
  return letters;
}

// -- fan-out and single lines: one room at a time, opened by the first iteration

let room: Room | null = null;

/** Seconds and iterations of each server, by the size of the room. */
const figures = new Map<string, Map<number, { time: number; count: number }>>();

/** How many clients talk at once in a fan-out, and how many lines each sends. */
const SENDERS = 10, LINES = 10;

const ROOM_SIZES = [10, 30, 100, 300, 1_000];

if (import.meta.main) await main(Deno.args);
const { drawChart } = await import("./docs/bench.ts");
const names = Object.keys(SERVERS).concat(await hasNcat() ? ["ncat"] : []);

addEventListener("unload", () => {
  room?.close();
  writeChart();
});

for (const size of ROOM_SIZES) {
  const group = `fan-out to ${size.toLocaleString("en")} clients`;
  benchServers(group, size, SENDERS, LINES);
}
benchServers("one line to 1 client", 1, 1, 1);
benchServers("one line to 100 clients", 100, 1, 1);

function benchServers(
  group: string,
  listeners: number,
  senders: number,
  lines: number,
): void {
  for (const name of names) {
    let own: Room | null = null;
    Deno.bench({
      name,
      group,
      baseline: name === "parley",
      warmup: 1,
      // At a second an iteration, five must do. Otherwise it is ten and more.
      n: name !== "parley" && listeners === 1_000 ? 5 : undefined,
      async fn() {
        if (own !== null) {
          const start = performance.now();
          await own.say(senders, lines);
          if (senders > 1) count(name, listeners, performance.now() - start);
          return;
        }
        room?.close();
        room = null;
        room = own = await Room.open(name, listeners + 1);
        const warm = performance.now() + WARM_MILLISECONDS;
        while (performance.now() < warm) await own.say(senders, lines);
      },
    });
  }
}

function count(name: string, size: number, milliseconds: number): void {
  const bySize = figures.get(name) ?? new Map();
  figures.set(name, bySize);
  const { time, count } = bySize.get(size) ?? { time: 0, count: 0 };
  bySize.set(size, { time: time + milliseconds / 1_000, count: count + 1 });
}

/** Draws the figures, unless `--filter` has left some out. */
function writeChart(): void {
  const shown = Object.entries({
    parley: "Parley",
    ncat: "ncat --chat",
    textbook: "textbook",
  }).filter(([name]) => names.includes(name));
  const drawn = shown.flatMap(([name, server]) =>
    ROOM_SIZES.map((size) => {
      const { time, count } = figures.get(name)?.get(size) ??
        { time: 1, count: 0 };
      return { server, size, rate: count * SENDERS * LINES * size / time };
    })
  );
  if (drawn.some(({ rate }) => rate === 0)) return;
  const { hardwareConcurrency } = navigator;
  const note = `Lines of 64 bytes. Deno ${Deno.version.deno}; servers and ` +
    `clients share ${hardwareConcurrency} cores.`;
  Deno.writeTextFileSync(
    new URL("docs/bench.svg", import.meta.url),
    drawChart(drawn, note),
  );
}

// -- the worst input of each parser, 4,096 bytes of it

const BYTES = 4_096;

/** A pattern over and over, up to {@linkcode BYTES}. */
function filled(pattern: string | number[], last = ""): Uint8Array {
  const bytes = typeof pattern === "string"
    ? encoder.encode(pattern)
    : Uint8Array.from(pattern);
  const end = encoder.encode(last);
  const times = Math.floor((BYTES - end.length) / bytes.length);
  const whole = new Uint8Array(times * bytes.length + end.length);
  for (let i = 0; i < times; i++) whole.set(bytes, i * bytes.length);
  whole.set(end, times * bytes.length);
  return whole;
}

/** The same as text. */
function text(pattern: string): string {
  return new TextDecoder().decode(filled(pattern));
}

const PLAIN = "plain text";

/** Inputs of a parser by name; {@linkcode PLAIN} is the baseline. */
type Inputs<Input> = Record<string, Input>;

function benchInputs<Input>(
  group: string,
  inputs: Inputs<Input>,
  bench: (input: Input) => Omit<Deno.BenchDefinition, "name">,
): void {
  for (const [name, input] of Object.entries(inputs)) {
    const baseline = name === PLAIN;
    Deno.bench({ name, group, baseline, ...bench(input) });
  }
}

benchInputs("cleanLine", {
  [PLAIN]: text("x"),
  "plain words in Greek": text("\u03bb\u03cc\u03b3\u03bf\u03c2 "),
  "escape sequences": text("\x1b[0m"),
  "ESC alone": text("\x1b"),
  "CSI without an end": text("\x1b["),
  "CSI with one long end": "\x1b[" + text("0").slice(2),
  "OSC without an end": text("\x1b]"),
  "Backspace": text("\b"),
  "letters and Backspace": text("x\b"),
  "letters and Ctrl-U": text("x\x15"),
  "marks, then Backspace": text("\u0301").slice(1_024) +
    text("\b").slice(2_048),
  "TABs": text("\t"),
  "letters and TABs": text("x\t"),
  "combining marks": text("\u0301"),
  "Hangul fillers": text("\u3164"),
  "unassigned, then a slash": text("\u{e0fff}").slice(2) + "/",
  "control characters": text("\x01"),
  "bidirectional controls": text("\u202e"),
}, (line) => ({
  fn() {
    cleanLine(line);
  },
}));

/** As many names of `length` characters as {@linkcode BYTES} characters are. */
function manyNames(character: string, length: number): string[] {
  return Array(Math.floor(BYTES / length)).fill(character.repeat(length));
}

const MARK = "\u0301", LIGATURE = "\ufdfa"; // it becomes 18 letters

benchInputs("normalizeName", {
  [PLAIN]: manyNames("x", 24),
  "one name of letters": manyNames("x", BYTES),
  "one name of marks": manyNames(MARK, BYTES),
  "one name of ligatures": manyNames(LIGATURE, BYTES),
  "names of 200 letters": manyNames("x", 200),
  "names of 200 marks": manyNames(MARK, 200),
  "names of 200 ligatures": manyNames(LIGATURE, 200),
  "names of 200 spaces": manyNames(" ", 200),
}, (names) => ({
  fn() {
    for (const name of names) normalizeName(name);
  },
}));

/** A client in memory that sends when it is told to. */
class Sender implements Connection {
  #bytes = encoder.encode("");
  #sent = Promise.withResolvers<void>();
  #given = Promise.withResolvers<void>();
  #closed = false;

  /** Sends bytes; resolves when they are handled: the server asks for more. */
  async send(bytes: Uint8Array): Promise<void> {
    this.#bytes = Uint8Array.from(bytes);
    this.#sent = Promise.withResolvers();
    this.#given.resolve();
    await this.#sent.promise;
  }

  async read(buffer: Uint8Array): Promise<number | null> {
    if (this.#bytes.length === 0) {
      this.#given = Promise.withResolvers();
      this.#sent.resolve();
      await this.#given.promise;
    }
    if (this.#closed) return null;
    const part = this.#bytes.subarray(0, buffer.length);
    buffer.set(part);
    this.#bytes = this.#bytes.subarray(part.length);
    return part.length;
  }

  write(bytes: Uint8Array): Promise<number> {
    return Promise.resolve(bytes.length);
  }

  close(): void {
    this.#closed = true;
    this.#sent.resolve();
    this.#given.resolve();
  }
}

const MEMORY = { hostname: "192.0.2.1", port: 1 };

/** The room in memory that is measured. */
let server: ChatServer | null = null;

/** Opens a room with one listener. */
async function openRoom(options: Partial<Options>): Promise<ChatServer> {
  room?.close();
  room = null;
  await server?.stop();
  server = ChatServer.listen({ host: HOST, port: 0, rate: 0, ...options });
  server.admit(new Sender(), MEMORY);
  return server;
}

/** Benches of what one client sends to a room, over and over. */
function inRoom(options: Partial<Options> = {}) {
  return (bytes: Uint8Array) => {
    let sender: Sender | null = null;
    return {
      warmup: 10,
      async fn() {
        if (sender !== null) return await sender.send(bytes);
        sender = new Sender();
        (await openRoom({ history: 0, ...options })).admit(sender, MEMORY);
        await sender.send(bytes);
      },
    };
  };
}

const PLAIN_LINES = { [PLAIN]: filled(LINE) };
const IAC = 255, NOP = 241, AYT = 246, SB = 250, SE = 240, WILL = 251, DO = 253;

benchInputs("telnet", {
  ...PLAIN_LINES,
  "IAC NOP": filled([IAC, NOP]),
  "IAC NOP in letters": filled([IAC, NOP, 120], "\n"),
  "IAC alone": filled([IAC]),
  "IAC and a letter": filled([IAC, 120], "\n"),
  "options that are refused": filled([IAC, DO, 1, IAC, WILL, 1]),
  "IAC AYT": filled([IAC, AYT]),
  "short sub-negotiations": filled([IAC, SB, IAC, SE]),
  "a sub-negotiation without an end": filled([IAC, SB, 0, 0, 0]),
}, inRoom());

benchInputs("line ends", {
  ...PLAIN_LINES,
  "LF": filled("\n"),
  "CR": filled("\r"),
  "CR LF": filled("\r\n"),
  "CR NUL": filled("\r\0"),
  "lines of one letter": filled("x\n"),
  "lines of one letter, CR LF": filled("x\r\n"),
  "lines of one space": filled(" \n"),
  "lines of one Hangul filler": filled("\u3164\n"),
  "lines of one mark": filled("\u0301\n"),
  "lines of one ESC": filled("\x1b\n"),
  "lines of one TAB": filled("x\t\n"),
  "a line that never ends": filled("x"),
  "no UTF-8": filled([0x80]),
  "no UTF-8, in lines": filled([0x80, 10]),
}, inRoom());

benchInputs("raw room", {
  ...PLAIN_LINES,
  "LF": filled("\n"),
  "CR LF": filled("\r\n"),
  "lines of one letter": filled("x\n"),
  "lines of one Hangul filler": filled("\u3164\n"),
  "a line that never ends": filled("x"),
}, inRoom({ raw: true }));

const MARKS = MARK.repeat(199), LIGATURES = LIGATURE.repeat(200);

benchInputs("commands", {
  ...PLAIN_LINES,
  "unknown ones": filled("/x\n"),
  "unknown ones, long": filled(`/${"x".repeat(40)}\n`),
  "an unknown one, the longest": encoder.encode(`/${"x".repeat(4_094)}\n`),
  "slashes": filled("/\n"),
  "//who": filled("//who\n"),
  "/h": filled("/h\n"),
  "/h x": filled("/h x\n"),
  "/h nick": filled("/h nick\n"),
  "/names": filled("/names\n"),
  "/who of one person": filled("/who guest1\n"),
  "/name of another": filled("/name a\n/name b\n"),
  "/name that is taken": filled("/name guest1\n"),
  "/name of marks": filled(`/name x${MARKS}\n`),
  "/name of ligatures": filled(`/name ${LIGATURES}\n`),
  "/name, the longest": filled(`/name ${"x".repeat(4_080)}\n`),
  "/w to nobody": filled("/w x y\n"),
  "/w to marks": filled(`/w x${MARKS} y\n`),
  "/w to ligatures": filled(`/w ${LIGATURES} y\n`),
  "/w to somebody": filled("/w guest1 x\n"),
  "/r without a message": filled("/r x\n"),
  "/me": filled("/me x\n"),
  "/ignore, alone": filled("/ignore\n"),
  "/ignore, on and off": filled("/ignore guest1\n"),
  "/ignore of marks": filled(`/ignore x${MARKS}\n`),
  "/quiet": filled("/quiet\n"),
  "/bell": filled("/bell\n"),
  "/bell, then plain words": filled("/bell on\n" + "word ".repeat(800) + "\n"),
  "/away": filled("/away\n"),
  "/away with a reason": filled("/away x\n"),
  "/away with ligatures": filled(`/away ${LIGATURES}\n`),
  "a command that is too long": encoder.encode(`/me ${"x".repeat(BYTES)}\n`),
}, inRoom());

benchInputs("history of 10,000 lines, timestamps", {
  ...PLAIN_LINES,
  "long lines": filled("x".repeat(2_047) + "\n"),
  "lines of one letter": filled("x\n"),
  "lines of one letter that are said apart": filled("x\n//x\n"),
}, inRoom({ history: 10_000, timestamps: true }));

benchInputs("first line: HTTP and the like", {
  [PLAIN]: filled("x", "\n"),
  "a request without an end": filled("GET " + "x".repeat(3_000)),
  "a method without an end": filled("GET", "\n"),
  "words": filled("GET ", "\n"),
  "two words": encoder.encode(`GET ${"/".repeat(4_089)} H\n`),
  "half a version": encoder.encode(`GET ${"/".repeat(4_080)} HTTP/\n`),
  "spaces": encoder.encode(`GET${" ".repeat(4_092)}\n`),
  "a request": encoder.encode(`GET ${"/".repeat(4_080)} HTTP/1.1\n`),
  "an SSH banner": filled("SSH-2.0-", "\n"),
  "a TLS handshake": filled([0x16, 0x03]),
}, (bytes) => {
  let own: ChatServer | null = null;
  return {
    warmup: 10,
    async fn() {
      own ??= await openRoom({ history: 0 });
      const sender = new Sender();
      const sent = sender.send(bytes);
      own.admit(sender, MEMORY);
      await sent;
      sender.close();
    },
  };
});

const STAMP = "2026-01-02T03:04:05.678Z ";

// A file of 64 KB: opening a room takes longer than 4 KB of it.
benchInputs("64 KB of a log file", {
  [PLAIN]: filled(`${STAMP}[alice] ${"x".repeat(31)}\n`),
  "no line of a log": filled(LINE),
  "one line": filled("x"),
  "no UTF-8": filled([0x80]),
  "empty lines": filled("\n"),
  "lines of one letter": filled("x\n"),
  "stamps alone": filled(STAMP + "\n"),
  "stamps and a letter": filled(STAMP + "x\n"),
  "stamps that are no time": filled("9999-99-99T99:99:99.999Z x\n"),
  "escape sequences": filled(`${STAMP}${"\x1b[0m".repeat(16)}\n`),
  "ESC alone": filled(`${STAMP}${"\x1b".repeat(64)}\n`),
  "Backspace": filled(`${STAMP}${"x\b".repeat(32)}\n`),
  "combining marks": filled(`${STAMP}${"\u0301".repeat(32)}\n`),
}, (bytes) => {
  let path = "";
  return {
    warmup: 10,
    async fn(bench) {
      if (path === "") {
        path = Deno.makeTempFileSync();
        addEventListener("unload", () => Deno.removeSync(path));
        await openRoom({});
      }
      const file = new Uint8Array(16 * bytes.length);
      for (let i = 0; i < 16; i++) file.set(bytes, i * bytes.length);
      Deno.writeFileSync(path, file);
      bench.start();
      const restored = ChatServer.listen({
        host: HOST,
        port: 0,
        history: 10_000,
        log: path,
      });
      bench.end();
      await restored.stop();
    },
  };
});
