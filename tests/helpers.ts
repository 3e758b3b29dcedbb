/**
 * What the tests share: clients on sockets and in memory, the server in this
 * process or in one of its own, files, and a certificate.
 */
import { assertMatch } from "@std/assert";
import { TextLineStream as UntypedLineStream } from "@std/streams/text-line-stream";
import { ChatServer, type Connection, type Options } from "../main.ts";

// The npm build of @std has no types.
const TextLineStream: new () => TransformStream<string, string> =
  UntypedLineStream;

const encoder = new TextEncoder();

/** How long a test waits for anything, in milliseconds. */
export const WAIT_MILLISECONDS = 8_000;

export const LINUX = Deno.build.os === "linux";

/** The commands of telnet (RFC 854) that the tests send. */
export const IAC = 255, DONT = 254, DO = 253, WONT = 252, WILL = 251, SB = 250;
/** Interrupt Process and the end of a subnegotiation. */
export const IP = 244, SE = 240;
/** Are You There, Erase Character, Erase Line, No Operation, Data Mark. */
export const AYT = 246, EC = 247, EL = 248, NOP = 241, DM = 242;
/** An option (RFC 856). */
export const BINARY = 0;

/** The last line to a client that leaves or is disconnected. */
export const GOODBYE =
  "* Goodbye. If your client stays open, press Enter or Ctrl-C.";

/** The most bytes of a message; a longer one is passed on in pieces. */
export const LINE_BYTES = 4_096;

/** How far behind, in bytes, a client may be before it is too slow. */
export const WINDOW_BYTES = 64 * 65_536;

/** The most bytes that wait for one client alone before it is too slow. */
export const PRIVATE_BYTES = 65_536;

/** What no line may contain: control characters other than TAB, line and
 * paragraph separators, bidirectional controls, the byte order mark. */
export const FORBIDDEN = /(?!\t)[\p{Cc}\u2028-\u202e\u2066-\u2069\ufeff]/u;

// -- waiting

/** Resolves like `promise`, or fails when that takes too long. */
export async function within<T>(
  promise: Promise<T>,
  what: string,
  milliseconds = WAIT_MILLISECONDS,
): Promise<T> {
  let timer;
  const error = new Error(`Late: ${what}`); // here, so that it says which test line
  const late = new Promise<never>((_, reject) => {
    timer = setTimeout(() => reject(error), milliseconds);
  });
  try {
    return await Promise.race([promise, late]);
  } finally {
    clearTimeout(timer);
  }
}

/** Waits until `check` returns true. */
export async function eventually(
  check: () => boolean | Promise<boolean>,
  what: string,
): Promise<void> {
  const end = performance.now() + WAIT_MILLISECONDS;
  while (!await check()) {
    if (performance.now() > end) throw new Error(`Late: ${what}`);
    await new Promise((resolve) => setTimeout(resolve, 10));
  }
}

/** Resolves when everything else that is ready has run. */
export function turn(): Promise<void> {
  return new Promise((resolve) => setImmediate(resolve));
}

export function never(): Promise<never> {
  return new Promise(() => {});
}

/** Makes each timer of `milliseconds` that is set in this process fire after a
 * tenth of a second, until it is disposed of. */
export function hurry(milliseconds: number): Disposable {
  const { setTimeout } = globalThis;
  globalThis.setTimeout = ((run: () => void, delay: number) =>
    setTimeout(
      run,
      delay === milliseconds ? 100 : delay,
    )) as typeof setTimeout;
  return {
    [Symbol.dispose]() {
      globalThis.setTimeout = setTimeout;
    },
  };
}

/** Lets the clock of this process, `performance.now`, run `factor` times as fast,
 * until it is disposed of. Timers keep their time. */
export function fastClock(factor = 10): Disposable {
  const { now } = performance, start = performance.now();
  performance.now = () => start + factor * (now.call(performance) - start);
  return {
    [Symbol.dispose]() {
      performance.now = now;
    },
  };
}

// -- lines

/** `n` different lines: the prefix with the numbers from 0 on. */
export function numbered(n: number, prefix = ""): string[] {
  return Array.from({ length: Math.ceil(n) }, (_, i) => prefix + i);
}

/** The lines of a stream, one by one. */
export class Lines implements AsyncDisposable {
  #reader: ReadableStreamDefaultReader<string>;

  constructor(bytes: ReadableStream<Uint8Array<ArrayBuffer>>) {
    this.#reader = bytes.pipeThrough(new TextDecoderStream())
      .pipeThrough(new TextLineStream()).getReader();
  }

  /** The next line; `null` at the end, and after a reset. */
  async next(): Promise<string | null> {
    try {
      const { done, value } = await within(this.#reader.read(), "a line");
      return done ? null : value;
    } catch (error) {
      if (error instanceof Deno.errors.ConnectionReset) return null;
      throw error;
    }
  }

  /** The next line that matches; lines before it are skipped. */
  async find(pattern: RegExp): Promise<string> {
    const skipped: string[] = [];
    for (let line; (line = await this.next()) !== null;) {
      if (pattern.test(line)) return line;
      skipped.push(line);
    }
    throw new Error(`No line ${pattern} in: ${skipped.join(" | ")}`);
  }

  /** All lines until the end. */
  async rest(): Promise<string[]> {
    const lines: string[] = [];
    for (let line; (line = await this.next()) !== null;) lines.push(line);
    return lines;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.#reader.cancel().catch(() => {});
  }
}

// -- clients

/** A client on a socket. */
export class Guest extends Lines {
  private constructor(readonly conn: Deno.TcpConn) {
    super(conn.readable);
  }

  static async connect(port: number): Promise<Guest> {
    const conn = await Deno.connect({ hostname: "127.0.0.1", port });
    conn.setNoDelay(true);
    return new Guest(conn);
  }

  /** Connects, reads the greeting, and takes the name if one is given. */
  static async join(port: number, name?: string): Promise<Guest> {
    const guest = await Guest.connect(port);
    await guest.find(/^\* (Here now: |Nobody else is here yet)/);
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
    await this.say("/settled");
    await this.find(/^! Unknown command \/settled/);
  }

  /** Fails if the server has sent a line that was not read yet. */
  async receivesNothing(): Promise<void> {
    await this.say("/settled");
    assertMatch((await this.next())!, /^! Unknown command \/settled/);
  }
}

/** The size of a line of {@linkcode flood}, in bytes, unless it is given. */
export const FLOOD_LINE_BYTES = 1_000;

/** How many lines of {@linkcode flood} fill the window. */
export const WINDOW_LINES = WINDOW_BYTES / FLOOD_LINE_BYTES;

/** Sends so many long lines that they fill the socket of a client that does not
 * read. */
export async function flood(
  from: Guest,
  lines: number,
  size = FLOOD_LINE_BYTES,
): Promise<void> {
  const all = numbered(lines, "x".repeat(size) + " ");
  for (let sent = 0; sent < all.length; sent += 100) {
    await from.say(...all.slice(sent, sent + 100));
  }
}

/** Fills a raw room with clients that never read, which joined a megabyte apart:
 * however much the system buffers, some have unsent lines at the end and are not
 * too slow yet. */
export async function stall(program: Program): Promise<Deno.TcpConn[]> {
  const megabyte = 1_000_000 / FLOOD_LINE_BYTES;
  // A socket's buffers hold up to 10 MB, and the server's window the rest.
  const count = Math.floor((10_000_000 + WINDOW_BYTES) / 1_000_000);
  const stalled: Deno.TcpConn[] = [];
  const sender = await Guest.connect(program.port);
  for (let i = 0; i < count; i++) {
    const conn = await Deno.connect({ port: program.port });
    stalled.push(conn);
    await program.output.find(new RegExp(`:${conn.localAddr.port} `));
    await flood(sender, megabyte);
  }
  await sender[Symbol.asyncDispose]();
  await program.output.find(new RegExp(`by .*:${sender.conn.localAddr.port} `));
  return stalled;
}

/** A client in memory, from any address. */
export class Visitor extends Lines {
  #typed: Uint8Array[] = [];
  #ended = false;
  #wake: (() => void) | null = null;

  private constructor(output: ReadableStream<Uint8Array<ArrayBuffer>>) {
    super(output);
  }

  /** Connects to the room as if from `hostname`. */
  static admit(server: ChatServer, hostname: string): Visitor {
    const output = new TransformStream<
      Uint8Array<ArrayBuffer>,
      Uint8Array<ArrayBuffer>
    >(undefined, undefined, { highWaterMark: Infinity });
    const writer = output.writable.getWriter();
    writer.closed.catch(() => {});
    const visitor = new Visitor(output.readable);
    server.admit({
      read: (buffer) => visitor.#read(buffer),
      write(bytes) {
        writer.write(bytes.slice()).catch(() => {}); // nobody reads it any more
        return Promise.resolve(bytes.length);
      },
      close() {
        writer.close().catch(() => {});
        visitor.end();
      },
    }, { hostname, port: 1 });
    return visitor;
  }

  async #read(buffer: Uint8Array): Promise<number | null> {
    while (this.#typed.length === 0) {
      if (this.#ended) return null;
      await new Promise<void>((resolve) => this.#wake = resolve);
    }
    const bytes = this.#typed.shift()!, part = bytes.subarray(0, buffer.length);
    buffer.set(part);
    if (part.length < bytes.length) {
      this.#typed.unshift(bytes.subarray(part.length));
    }
    return part.length;
  }

  say(...lines: string[]): void {
    this.#typed.push(encoder.encode(lines.map((line) => line + "\n").join("")));
    this.#wake?.();
  }

  /** Ends its input. */
  end(): void {
    this.#ended = true;
    this.#wake?.();
  }
}

/** Where the connections in memory say that they come from. */
export const FAKE_ADDRESS = { hostname: "192.0.2.1", port: 1 };

/** A connection in memory. */
export interface FakeConnection extends Connection {
  /** Resolves when the server has closed it. */
  readonly closed: Promise<void>;
  /** What the server has written to it, unless `write` was given. */
  readonly received: string;
}

/** A connection in memory that sends nothing, takes whatever is written to it and
 * does not half-close; `methods` replace its own. */
export function fakeConnection(
  methods: Partial<Connection> = {},
): FakeConnection {
  const closed = Promise.withResolvers<void>();
  const decoder = new TextDecoder();
  let received = "";
  return {
    read: never,
    write(bytes) {
      received += decoder.decode(bytes, { stream: true });
      return Promise.resolve(bytes.length);
    },
    close: () => closed.resolve(),
    ...methods,
    closed: closed.promise,
    get received() {
      return received;
    },
  };
}

/** Admits a {@linkcode fakeConnection} to the room. */
export function admit(
  server: ChatServer,
  methods: Partial<Connection> = {},
  { hostname = FAKE_ADDRESS.hostname } = {},
): FakeConnection {
  const connection = fakeConnection(methods);
  server.admit(connection, { ...FAKE_ADDRESS, hostname });
  return connection;
}

// -- servers

/** Opens a room in this process. */
export function open(options: Partial<Options> = {}, printed: string[] = []) {
  const server = ChatServer.listen(
    { host: "127.0.0.1", port: 0, history: 0, ...options },
    { print: (line) => printed.push(line) },
  );
  return Object.assign(server, { port: server.addr.port });
}

/** The path of main.ts. */
export const MAIN = new URL("../main.ts", import.meta.url).pathname;

/** The server in a process of its own, as a person starts it. */
export class Program implements AsyncDisposable {
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
    const words = [Deno.execPath(), "run", ...permissions, MAIN, ...args];
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

  /** Starts it on a free port; `shell` is run before it by bash. */
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
    this.#input ??= this.child.stdin.getWriter();
    const text = lines.map((line) => line + "\n").join("");
    await this.#input.write(encoder.encode(text));
  }

  /** Ends its standard input. */
  async typeEnd(): Promise<void> {
    await this.#input?.close();
    this.#input = null;
  }

  #input: WritableStreamDefaultWriter<Uint8Array> | null = null;

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
    // SIGTERM first: a process that is killed reports no coverage.
    const kill = (signal: Deno.Signal) => {
      try {
        this.child.kill(signal);
      } catch { /* it has ended already */ }
    };
    kill("SIGTERM");
    const timer = setTimeout(() => kill("SIGKILL"), WAIT_MILLISECONDS);
    await this.child.status;
    clearTimeout(timer);
    await this.#input?.close().catch(() => {});
    await this.output[Symbol.asyncDispose]();
    await this.errors[Symbol.asyncDispose]();
  }
}

/** Runs the server's program until it exits. */
export async function run(
  args: string[],
  permissions?: string[],
): Promise<{ code: number; output: string; errors: string }> {
  const command = Program.command(args, permissions);
  return await within(finished(command), "the exit");
}

/** Runs a command until it exits, and returns what it printed. */
export async function finished(
  command: Deno.Command,
): Promise<{ code: number; output: string; errors: string }> {
  const { code, stdout, stderr } = await command.output();
  const text = (bytes: Uint8Array) => new TextDecoder().decode(bytes);
  return { code, output: text(stdout), errors: text(stderr) };
}

// -- the machine

/** Whether this machine has a program, such as a client. */
export function installed(name: string): boolean {
  const { code } = new Deno.Command("bash", {
    args: ["-c", 'command -v "$0"', name],
    stdout: "null",
  }).outputSync();
  return code === 0;
}

/** A file that is removed when it is disposed of. */
export class TemporaryFile implements Disposable {
  readonly path = Deno.makeTempFileSync();

  constructor(content: string) {
    Deno.writeTextFileSync(this.path, content);
  }

  /** Its whole lines. */
  get lines(): string[] {
    return Deno.readTextFileSync(this.path).split("\n").slice(0, -1);
  }

  [Symbol.dispose](): void {
    Deno.removeSync(this.path);
  }
}

/** The lines of a log file without their times, which are checked. */
export function logged(file: TemporaryFile): string[] {
  return file.lines.map((line) => {
    assertMatch(line, /^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z /);
    const age = Math.abs(Date.parse(line.slice(0, 24)) - Date.now());
    if (!(age < 60_000)) throw new Error(`Wrong time: ${line}`);
    return line.slice(25);
  });
}

// -- TLS

/** Whether certificates can be made: tests with TLS are ignored without it. */
export const OPENSSL = installed("openssl");

/** The files of a certificate and its key. */
export interface Certificate {
  cert: string;
  key: string;
}

/** Makes a certificate for localhost, which is removed with the test module. */
export async function makeCertificate(): Promise<Certificate> {
  const directory = await Deno.makeTempDir();
  addEventListener("unload", () => {
    Deno.removeSync(directory, { recursive: true });
  });
  const [cert, key] = [`${directory}/cert.pem`, `${directory}/key.pem`];
  const { code, errors } = await finished(
    new Deno.Command("openssl", {
      // deno-fmt-ignore: an option a line
      args: [
        "req", "-x509", "-nodes", "-days", "2",
        "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1",
        "-subj", "/CN=localhost",
        "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1",
        "-addext", "basicConstraints=critical,CA:FALSE",
        "-keyout", key, "-out", cert,
      ],
    }),
  );
  if (code !== 0) throw new Error(`Cannot make a certificate: ${errors}`);
  return { cert, key };
}

let shared: Promise<Certificate> | undefined;

/** The certificate of all tests of a module, made when the first asks for it. */
export function certificate(): Promise<Certificate> {
  return shared ??= makeCertificate();
}

/** The options of a room that speaks TLS. */
export async function tlsOptions(): Promise<Partial<Options>> {
  const { cert, key } = await certificate();
  return { tlsCert: cert, tlsKey: key };
}

/** What a client needs to connect to a room that speaks TLS. */
export async function tlsClientOptions(): Promise<
  { hostname: string; caCerts: string[] }
> {
  const { cert } = await certificate();
  return { hostname: "localhost", caCerts: [await Deno.readTextFile(cert)] };
}

/** Connects with TLS. */
export async function connectTls(port: number): Promise<Deno.TlsConn> {
  const conn = await Deno.connectTls({ ...await tlsClientOptions(), port });
  await conn.handshake();
  return conn;
}
