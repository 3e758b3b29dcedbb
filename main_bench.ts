/**
 * Measures Parley beside the chat server of every tutorial, and beside
 * `ncat --chat` where it is installed, on this machine:
 *
 * ```sh
 * deno task bench
 * ```
 *
 * It takes a minute. Each group is one load on all servers, and its summary says
 * how many times faster Parley is:
 *
 * - _fan-out_: ten clients say ten lines each, at once, and an iteration ends
 *   when all the others have them. So `time/iter` by 100 is the cost of one line
 *   among many, and by the clients that hear it too, of one delivery.
 * - _one line_: one client says one line in a silent room, and an iteration ends
 *   when the others have it. Nothing can be gathered: expect about 1x.
 *
 * Figures differ from machine to machine and, where others use it, from run to
 * run: compare the ratios. The load is a process of its own, but in Deno too, and
 * is as busy as Parley is: from a load in C the larger rooms show a higher ratio.
 *
 * @module
 */
import { TextLineStream as UntypedLineStream } from "@std/streams/text-line-stream";
import { ChatServer } from "./main.ts";

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

// -- the benches: one room at a time, opened by the first iteration

let room: Room | null = null;
addEventListener("unload", () => room?.close());

if (import.meta.main) await main(Deno.args);
const names = Object.keys(SERVERS).concat(await hasNcat() ? ["ncat"] : []);

for (
  const [group, listeners, senders, lines] of [
    ["fan-out to 10 clients", 10, 10, 10],
    ["fan-out to 100 clients", 100, 10, 10],
    ["fan-out to 1,000 clients", 1_000, 10, 10],
    ["one line to 1 client", 1, 1, 1],
    ["one line to 100 clients", 100, 1, 1],
  ] as const
) {
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
        if (own !== null) return await own.say(senders, lines);
        room?.close();
        room = null;
        room = own = await Room.open(name, listeners + 1);
        const warm = performance.now() + WARM_MILLISECONDS;
        while (performance.now() < warm) await own.say(senders, lines);
      },
    });
  }
}
