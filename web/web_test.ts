/**
 * Tests of the web listener without a browser: with `fetch`, `WebSocket`, and TCP
 * connections for tests of single frames.
 *
 * A test waits for what it expects, and fails if that has not come in time.
 */
import { assert, assertEquals, assertMatch, assertRejects } from "@std/assert";
import {
  eventually,
  makeCertificate,
  open,
  Terminal,
  within,
} from "./test_helpers.ts";
import { WebServer } from "./web.ts";
import type { ChatServer } from "../main.ts";

const encoder = new TextEncoder(), decoder = new TextDecoder();

const KEY = "dGhlIHNhbXBsZSBub25jZQ=="; // RFC 6455, 1.3, and its answer
const ACCEPT = "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=";

const CONTINUATION = 0, TEXT = 1, BINARY = 2, CLOSE = 8, PING = 9, PONG = 10;

/** A frame of a client (RFC 6455, 5.2). */
function frame(
  opcode: number,
  payload: string | Uint8Array,
  { final = true, masked = true, reserved = 0 } = {},
): Uint8Array {
  const bytes = typeof payload === "string" ? encoder.encode(payload) : payload;
  const head = [(final ? 0x80 : 0) | reserved | opcode];
  const bit = masked ? 0x80 : 0, { length } = bytes;
  if (length < 126) head.push(bit | length);
  else if (length < 65_536) head.push(bit | 126, length >> 8, length & 255);
  else {
    head.push(bit | 127, 0, 0, 0, 0);
    for (const shift of [24, 16, 8, 0]) head.push((length >> shift) & 255);
  }
  const mask = [1, 2, 3, 4];
  return Uint8Array.from([
    ...head,
    ...masked ? mask : [],
    ...masked ? bytes.map((byte, i) => byte ^ mask[i % 4]) : bytes,
  ]);
}

interface Frame {
  opcode: number;
  final: boolean;
  payload: Uint8Array;
}

/** A WebSocket on a TCP connection, which can send what a browser does not. */
class Client implements Disposable {
  #buffer = new Uint8Array(0);
  #lines: string[] = [];

  private constructor(readonly conn: Deno.TcpConn, readonly head: string) {}

  /** Sends a request, and reads the head of the answer. */
  static async request(
    url: string,
    headers: Record<string, string> = {},
    path = "/chat",
  ): Promise<Client> {
    const { hostname, port, host } = new URL(url);
    const conn = await Deno.connect({ hostname, port: Number(port) });
    const all = {
      Host: host,
      Connection: "Upgrade",
      Upgrade: "websocket",
      "Sec-WebSocket-Version": "13",
      "Sec-WebSocket-Key": KEY,
      ...headers,
    };
    const lines = Object.entries(all).map((entry) => entry.join(": "));
    await writeAll(
      conn,
      encoder.encode([`GET ${path} HTTP/1.1`, ...lines, "", ""].join("\r\n")),
    );
    const client = new Client(conn, "");
    let end;
    while ((end = decoder.decode(client.#buffer).indexOf("\r\n\r\n")) < 0) {
      assert(await client.#fill(), "the answer ends early");
    }
    const head = decoder.decode(client.#buffer.subarray(0, end));
    const opened = new Client(conn, head);
    opened.#buffer = client.#buffer.slice(end + 4);
    return opened;
  }

  /** Joins the room, and reads the greeting. */
  static async join(
    url: string,
    headers: Record<string, string> = {},
  ): Promise<Client> {
    const client = await Client.request(url, headers);
    assertMatch(client.head, /^HTTP\/1\.1 101 /);
    await client.find(/^\* (?:Here now|Nobody else)/);
    return client;
  }

  get status(): number {
    return Number(this.head.split(" ")[1]);
  }

  async #fill(): Promise<boolean> {
    const chunk = new Uint8Array(65_536);
    const count = await within(this.conn.read(chunk), "bytes")
      .catch((error) => {
        if (error instanceof Deno.errors.ConnectionReset) return null;
        throw error;
      });
    if (count === null) return false;
    const more = new Uint8Array(this.#buffer.length + count);
    more.set(this.#buffer);
    more.set(chunk.subarray(0, count), this.#buffer.length);
    this.#buffer = more;
    return true;
  }

  async send(...frames: Uint8Array[]): Promise<void> {
    for (const bytes of frames) await writeAll(this.conn, bytes);
  }

  /** The next frame; `null` at the end. */
  async frame(): Promise<Frame | null> {
    for (;;) {
      const bytes = this.#buffer;
      const short = bytes.length < 2 ? 0 : bytes[1];
      const headLength = short === 127 ? 10 : short === 126 ? 4 : 2;
      if (bytes.length >= headLength) {
        const view = new DataView(bytes.buffer);
        const length = short === 127
          ? Number(view.getBigUint64(2))
          : short === 126
          ? view.getUint16(2)
          : short;
        if (bytes.length >= headLength + length) {
          this.#buffer = bytes.slice(headLength + length);
          return {
            opcode: bytes[0] & 0x0f,
            final: (bytes[0] & 0x80) !== 0,
            payload: bytes.slice(headLength, headLength + length),
          };
        }
      }
      if (!await this.#fill()) return null;
    }
  }

  /** The next line, whatever control frames come before it. */
  async next(): Promise<string | null> {
    while (this.#lines.length === 0) {
      const next = await this.frame();
      if (next === null || next.opcode === CLOSE) return null;
      if (next.opcode !== BINARY) continue;
      const text = decoder.decode(next.payload);
      assert(text.endsWith("\n"), "a message is whole lines");
      this.#lines = text.split("\n").slice(0, -1);
    }
    return this.#lines.shift()!;
  }

  async find(pattern: RegExp): Promise<string> {
    const passed: string[] = [];
    for (let line; (line = await this.next()) !== null;) {
      if (pattern.test(line)) return line;
      passed.push(line);
    }
    throw new Error(`No line ${pattern} in: ${passed.join(" | ")}`);
  }

  /** The code and the reason of the close frame; lines before it are passed. */
  async closed(): Promise<[code: number, reason: string]> {
    const { payload } = await this.frameOf(CLOSE);
    return [payload[0] << 8 | payload[1], decoder.decode(payload.slice(2))];
  }

  /** The next frame of a kind, whatever comes before it. */
  async frameOf(opcode: number): Promise<Frame> {
    for (let next; (next = await this.frame()) !== null;) {
      if (next.opcode === opcode) return next;
    }
    throw new Error(`The connection ended without a frame of kind ${opcode}`);
  }

  /** Waits for the end of the connection. */
  async ended(): Promise<void> {
    while (await this.frame() !== null);
  }

  [Symbol.dispose](): void {
    try {
      this.conn.close();
    } catch { /* it is closed */ }
  }
}

async function writeAll(conn: Deno.TcpConn, bytes: Uint8Array): Promise<void> {
  while (bytes.length > 0) bytes = bytes.subarray(await conn.write(bytes));
}

const hash = async (text: string) => {
  const digest = await crypto.subtle.digest("SHA-256", encoder.encode(text));
  return new Uint8Array(digest).toBase64();
};

// -- HTTP

Deno.test("the page permits its own script and style and nothing else", async () => {
  await using room = await open();
  const response = await fetch(room.url);
  const page = await response.text();
  assertEquals(response.status, 200);
  const { headers } = response;
  assertEquals(headers.get("content-type"), "text/html; charset=utf-8");
  assertEquals(headers.get("x-content-type-options"), "nosniff");
  assertEquals(headers.get("referrer-policy"), "no-referrer");
  const policy = headers.get("content-security-policy")!;
  const script = /<script>(.*?)<\/script>/s.exec(page)![1];
  const style = /<style>(.*?)<\/style>/s.exec(page)![1];
  assertEquals(policy.split("; "), [
    "default-src 'none'",
    `script-src 'sha256-${await hash(script)}'`,
    `style-src 'sha256-${await hash(style)}'`,
    "connect-src 'self'",
    "img-src data:",
    "base-uri 'none'",
    "form-action 'none'",
    "frame-ancestors 'none'",
    "require-trusted-types-for 'script'",
  ]);
  assertEquals(page.match(/<script/g)!.length, 1);
  assertEquals(/ on\w+=|style=/.test(page.replace(script, "")), false);
});

Deno.test("the page is sent once, and compressed if the browser accepts that", async () => {
  await using room = await open({}, { rate: 7 });
  const { headers } = await fetch(room.url, { method: "HEAD" });
  const tag = headers.get("etag")!;
  for (const known of [tag, `"other", ${tag}`, "*"]) {
    const again = await fetch(room.url, {
      headers: { "If-None-Match": known },
    });
    assertEquals(again.status, 304);
    assertEquals(await again.text(), "");
  }
  const other = await fetch(room.url, { headers: { "If-None-Match": '"x"' } });
  assertEquals(other.status, 200);
  assertMatch(await other.text(), /<body data-rate="7">/);

  const get = async (accept: string) => {
    using client = await Client.request(
      room.url,
      { Connection: "close", Upgrade: "", "Accept-Encoding": accept },
      "/",
    );
    return client.head;
  };
  assertMatch(await get("br, gzip"), /content-encoding: gzip/i);
  assertEquals(/content-encoding/i.test(await get("br, gzip;q=0")), false);
  assertEquals(/content-encoding/i.test(await get("identity")), false);
});

Deno.test("other paths and methods are refused, and health is answered", async () => {
  await using room = await open();
  const status = async (path: string, method = "GET") => {
    const response = await fetch(room.url + path, { method });
    await response.text();
    return response.status;
  };
  assertEquals(await (await fetch(`${room.url}/health`)).text(), "ok\n");
  assertEquals(await status("/?room=1"), 200);
  assertEquals(await status("/chat"), 426);
  assertEquals(await status("/favicon.ico"), 404);
  assertEquals(await status("/main.ts"), 404);
  assertEquals(await status("/..%2fmain.ts"), 404);
  assertEquals(await status("/", "POST"), 405);
  assertEquals(await status("/health", "DELETE"), 405);
  assertEquals(await status("/chat", "PUT"), 405);
});

Deno.test("the page is told whether the room is raw", async () => {
  for (const raw of [true, false]) {
    await using room = await open({ raw });
    const page = await (await fetch(room.url)).text();
    assertEquals(/<body[^>]* data-raw>/.test(page), raw);
  }
});

Deno.test("a request that offers another upgrade gets the page", async () => {
  await using room = await open();
  using client = await Client.request(
    room.url,
    { Upgrade: "h2c", "HTTP2-Settings": "AAMAAABkAAQCAAAAAAIAAAAA" },
    "/",
  );
  assertEquals(client.status, 200);
});

Deno.test("the answer to HEAD has no content, even if an upgrade is refused", async () => {
  await using room = await open();
  const { hostname, port, host } = new URL(room.url);
  for (const connection of ["close", "Upgrade\r\nUpgrade: websocket"]) {
    const conn = await Deno.connect({ hostname, port: Number(port) });
    const head = [`Host: ${host}`, `Connection: ${connection}`].join("\r\n");
    await writeAll(conn, encoder.encode(`HEAD / HTTP/1.1\r\n${head}\r\n\r\n`));
    const answer = await within(
      new Response(conn.readable).text(),
      "an answer",
    );
    assertMatch(answer, /^HTTP\/1\.1 200 .*\r\n\r\n$/s);
  }
});

Deno.test("a connection that sends no whole request is closed", async () => {
  await using room = await open({}, { requestMilliseconds: 200 });
  const { port } = room.web;
  for (const sent of ["", "GET / HTTP/1.1\r\nHost: x\r\nX-"]) {
    using conn = await Deno.connect({ hostname: "127.0.0.1", port });
    await writeAll(conn, encoder.encode(sent));
    await within(new Response(conn.readable).text(), "the end");
  }
});

Deno.test("connections without a request do not keep clients out", async () => {
  await using room = await open();
  const { port } = room.web;
  using client = await Client.join(room.url);
  const idle = await Promise.all(
    Array.from(
      { length: 500 },
      () => Deno.connect({ hostname: "127.0.0.1", port }),
    ),
  );
  using refused = await Deno.connect({ hostname: "127.0.0.1", port });
  const end = within(refused.read(new Uint8Array(1)), "the refusal")
    .catch(() => null);
  assertEquals(await end, null);
  await client.send(frame(TEXT, "/who"));
  await client.find(/^\* Here now: guest1 /);
  for (const conn of idle) conn.close();
  await eventually(
    () =>
      fetch(`${room.url}/health`).then((it) => it.text(), () => "")
        .then((text) => text === "ok\n"),
    "an answer",
  );
});

Deno.test("with TLS the page and the chat are encrypted", async () => {
  const { cert, key } = await makeCertificate();
  await using room = await open({}, { tlsCert: cert, tlsKey: key });
  assertMatch(room.url, /^https:\/\/127\.0\.0\.1:/);
  using client = Deno.createHttpClient({ caCerts: [cert] });
  const response = await fetch(`${room.url}/health`, { client });
  assertEquals(await response.text(), "ok\n");

  const { port } = room.web;
  using conn = await Deno.connectTls({
    hostname: "localhost",
    port,
    caCerts: [cert],
  });
  await conn.write(encoder.encode(
    `GET /chat HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\n` +
      `Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\n` +
      `Sec-WebSocket-Key: ${KEY}\r\n\r\n`,
  ));
  let text = "";
  const buffer = new Uint8Array(4_096);
  while (!text.includes("Nobody else is here yet.")) {
    const count = await within(conn.read(buffer), "the greeting");
    text += decoder.decode(buffer.subarray(0, count!));
  }
  assertMatch(text, /^HTTP\/1\.1 101 /);
});

// -- the handshake

Deno.test("a handshake is answered as RFC 6455 says", async () => {
  await using room = await open();
  using client = await Client.request(room.url, {
    Connection: "keep-alive, Upgrade",
    Upgrade: "WebSocket",
  });
  assertEquals(client.status, 101);
  assert(client.head.includes(`Sec-WebSocket-Accept: ${ACCEPT}`));
});

Deno.test("an invalid handshake is refused", async () => {
  await using room = await open();
  const status = async (headers: Record<string, string>, path = "/chat") => {
    using client = await Client.request(room.url, headers, path);
    return client.status;
  };
  assertEquals(await status({ "Sec-WebSocket-Version": "8" }), 426);
  assertEquals(await status({ "Sec-WebSocket-Key": "short" }), 400);
  assertEquals(await status({ Upgrade: "h2c" }), 426);
  assertEquals(await status({}, "/elsewhere"), 404);
});

Deno.test("a page of another origin cannot open the chat", async () => {
  await using room = await open();
  const { port } = room.web;
  const status = async (origin: string, host = `127.0.0.1:${port}`) => {
    using client = await Client.request(room.url, {
      Host: host,
      Origin: origin,
    });
    return client.status;
  };
  assertEquals(await status("https://evil.example"), 403);
  assertEquals(await status("null"), 403);
  assertEquals(await status(`http://127.0.0.1:${port + 1}`), 403);
  assertEquals(await status(`http://127.0.0.1.evil.example:${port}`), 403);
  assertEquals(await status(`http://127.0.0.1:${port}`), 101);
  // Behind a proxy that ends TLS.
  assertEquals(await status("https://chat.example", "chat.example"), 101);
  assertEquals(await status("https://chat.example", "Chat.Example:443"), 101);
});

// -- talking

Deno.test("a browser and a terminal talk", async () => {
  await using room = await open();
  await using bob = await Terminal.join(room.server, "bob");
  const socket = new WebSocket(room.url.replace("http", "ws") + "/chat");
  socket.binaryType = "arraybuffer";
  const lines: string[] = [];
  socket.onmessage = ({ data }) =>
    lines.push(...decoder.decode(data).split("\n").slice(0, -1));
  await eventually(() => lines.length >= 2, "the greeting");
  assertMatch(lines[0], /^\* Welcome! You are guest2\./);
  assertEquals(lines[1], "* Here now: bob (1)");
  socket.send("/nick alice");
  socket.send("hello, bob");
  assertEquals(
    await bob.find(/hello/),
    "[alice] hello, bob",
  );
  await bob.say("hello, alice");
  await eventually(() => lines.includes("[bob] hello, alice"), "the answer");
  const closed = new Promise((resolve) => socket.onclose = resolve);
  socket.close();
  await within(closed, "the close");
  await bob.find(/^\* alice has left the room/);
});

Deno.test("each line of a text message is a line of its own", async () => {
  await using room = await open();
  await using bob = await Terminal.join(room.server, "bob");
  using client = await Client.join(room.url);
  await client.send(frame(TEXT, "one\ntwo\r\nthree\n"), frame(TEXT, ""));
  await client.send(frame(TEXT, "four, ünï"));
  assertEquals(await bob.find(/one/), "[guest2] one");
  assertEquals(await bob.next(), "[guest2] two");
  assertEquals(await bob.next(), "[guest2] three");
  assertEquals(await bob.next(), "[guest2] four, ünï");
});

Deno.test("messages arrive whole however they are fragmented and cut", async () => {
  await using room = await open();
  await using bob = await Terminal.join(room.server, "bob");
  using client = await Client.join(room.url);
  client.conn.setNoDelay(true);
  const euro = encoder.encode("€");
  const frames = [
    frame(TEXT, "frag", { final: false }),
    frame(PING, "are you there?"),
    frame(CONTINUATION, euro.subarray(0, 1), { final: false }),
    frame(CONTINUATION, euro.subarray(1)),
    frame(TEXT, "x".repeat(300)),
    frame(TEXT, "end"),
  ];
  for (const bytes of frames) {
    for (const byte of bytes) await client.send(Uint8Array.of(byte));
  }
  assertEquals(await bob.find(/frag/), "[guest2] frag€");
  assertEquals(await bob.next(), `[guest2] ${"x".repeat(300)}`);
  assertEquals(await bob.next(), "[guest2] end");
  const pong = await client.frameOf(PONG);
  assertEquals(decoder.decode(pong.payload), "are you there?");
});

Deno.test("a ping within a message does not count towards its length", async () => {
  await using room = await open();
  using client = await Client.join(room.url);
  await client.send(
    frame(TEXT, "x".repeat(65_500), { final: false }),
    frame(PING, "y".repeat(125)),
  );
  assertEquals((await client.frameOf(PONG)).payload.length, 125);
});

Deno.test("a frame that no client may send closes the connection with the right code", async () => {
  await using room = await open();
  const code = async (bytes: Uint8Array) => {
    using client = await Client.join(room.url);
    await client.send(bytes);
    const [code, reason] = await client.closed();
    assert(reason.length > 0);
    await client.ended();
    return code;
  };
  assertEquals(await code(frame(TEXT, "x", { masked: false })), 1002);
  assertEquals(await code(frame(TEXT, "x", { reserved: 0x40 })), 1002);
  assertEquals(await code(frame(3, "x")), 1002);
  assertEquals(await code(frame(CONTINUATION, "x")), 1002);
  assertEquals(await code(frame(PING, "x", { final: false })), 1002);
  assertEquals(await code(frame(PING, "x".repeat(126))), 1002);
  assertEquals(await code(frame(BINARY, "x")), 1003);
  assertEquals(await code(frame(TEXT, Uint8Array.of(0xff))), 1007);
  assertEquals(await code(frame(TEXT, "x".repeat(65_536))), 1009);
  const huge = Uint8Array.of(0x81, 0xff, 127, 1, 2, 3, 4, 5, 6, 7, 1, 2, 3, 4);
  assertEquals(await code(huge), 1009);
  const fragments = [frame(TEXT, "x".repeat(40_000), { final: false })];
  fragments.push(frame(CONTINUATION, "x".repeat(40_000)));
  assertEquals(await code(concatenate(fragments)), 1009);
});

function concatenate(parts: Uint8Array[]): Uint8Array {
  return Uint8Array.from(parts.flatMap((part) => [...part]));
}

Deno.test("input that outruns the rate is bounded, and the reason is given", async () => {
  await using room = await open({ rate: 1 });
  await using bob = await Terminal.join(room.server, "bob");
  using client = await Client.join(room.url);
  await client.send(frame(TEXT, "first"));
  await bob.find(/^\[guest2\] first$/);
  const line = frame(TEXT, "y".repeat(1_000));
  await client.send(concatenate(Array(80).fill(line)));
  const [code, reason] = await client.closed();
  assertEquals(code, 1008);
  assertEquals(reason, "Too much at once: send more slowly");
  await bob.find(/^\* guest2 has left the room/);
});

Deno.test("a flood of pings ends the connection", async () => {
  await using room = await open();
  using client = await Client.join(room.url);
  await client.send(concatenate(Array(1_001).fill(frame(PING, "x"))));
  assertEquals(await client.closed(), [1008, "Too many pings or fragments"]);
});

Deno.test("a client that vanishes is found by the pings", async () => {
  await using room = await open({}, { pingMilliseconds: 300 });
  await using bob = await Terminal.join(room.server, "bob");
  using silent = await Client.join(room.url);
  await bob.find(/^\* guest2 has entered the room/);
  const start = performance.now();
  await bob.find(/^\* guest2 has left the room/);
  assert(performance.now() - start < 1_200);
  await silent.ended();
});

Deno.test("a client that answers the pings stays", async () => {
  await using room = await open({}, { pingMilliseconds: 100 });
  using client = await Client.join(room.url);
  for (let pings = 0; pings < 5; pings++) {
    const { payload } = await client.frameOf(PING);
    await client.send(frame(PONG, payload));
  }
});

const LINUX = Deno.build.os === "linux";

async function descriptors(): Promise<number> {
  return (await Array.fromAsync(Deno.readDir("/proc/self/fd"))).length;
}

Deno.test({
  name: "a client that stops reading is disconnected and others lose nothing",
  ignore: !LINUX,
  async fn() {
    await using room = await open({ rate: 0, history: 0 });
    await using bob = await Terminal.join(room.server, "bob");
    const before = await descriptors();
    using stalled = await Client.join(room.url);
    using reader = await Client.join(room.url);
    const lines = 20_000, text = "z".repeat(1_000);
    for (let i = 0; i < lines; i++) {
      // No faster than the reader in this process takes them.
      if (i % 100 === 0) {
        await bob.say(
          ...Array.from({ length: 100 }, (_, j) => `${i + j} ${text}`),
        );
      }
      let line;
      do line = await reader.find(/^\[bob\]|too slow/); while (
        line.includes("too slow")
      );
      assert(
        line.startsWith(`[bob] ${i} z`),
        `line ${i}: ${line.slice(0, 20)}`,
      );
    }
    await bob.find(/^\* guest2 has left the room \(too slow\)/);
    // Two sockets of the reader, and the one that the stalled client still has.
    await eventually(
      async () => await descriptors() <= before + 3,
      "the descriptor of the stalled client",
    );
    assertEquals(stalled.status, 101);
  },
});

// -- the end

Deno.test("a server that stops says so, and closes with code 1001", async () => {
  const room = await open();
  using client = await Client.join(room.url);
  const stopped = room.server.stop();
  await client.find(/^\* Shutdown Server$/);
  const [code] = await client.closed();
  assertEquals(code, 1001);
  await within(stopped, "the stop");
  await within(room.web.close(), "the end of the listener");
  const { port } = room.web;
  await assertRejects(() => Deno.connect({ hostname: "127.0.0.1", port }));
});

Deno.test("a web listener that is closed alone closes its connections", async () => {
  await using room = await open();
  await using bob = await Terminal.join(room.server, "bob");
  using client = await Client.join(room.url);
  const closed = room.web.close();
  assertEquals((await client.closed())[0], 1001);
  await within(closed, "the end of the listener");
  await bob.find(/^\* guest2 has left the room/);
});

Deno.test("a client that quits is told goodbye, and closed with code 1000", async () => {
  await using room = await open();
  using client = await Client.join(room.url);
  await client.send(frame(TEXT, "/quit"));
  await client.find(/^\* Goodbye\./);
  const [code] = await client.closed();
  assertEquals(code, 1000);
  await client.ended();
});

Deno.test("lines sent before a close frame are still delivered", async () => {
  await using room = await open();
  await using bob = await Terminal.join(room.server, "bob");
  using client = await Client.join(room.url);
  await client.send(
    frame(TEXT, "last words"),
    frame(CLOSE, Uint8Array.of(3, 232)),
  );
  assertEquals(await bob.find(/last/), "[guest2] last words");
  const [code] = await client.closed();
  assertEquals(code, 1000);
  await client.ended();
});

// -- limits of the room

Deno.test("an address that is not allowed is refused with a reason", async () => {
  await using room = await open({ allow: ["10.0.0.0/8"] });
  using client = await Client.request(room.url);
  const [code, reason] = await client.closed();
  assertEquals(code, 1008);
  assertEquals(reason, "You cannot join from this address");
  await client.ended();
});

Deno.test("web clients count towards the limits like others", async () => {
  await using room = await open({ maxClients: 2 });
  await using _bob = await Terminal.join(room.server, "bob");
  using _client = await Client.join(room.url);
  using third = await Client.request(room.url);
  await third.find(/^! .*full/);
});

Deno.test("web clients are asked for the password", async () => {
  const passwordFile = await Deno.makeTempFile();
  await Deno.writeTextFile(passwordFile, "sesame\n");
  await using room = await open({ passwordFile });
  using client = await Client.request(room.url);
  assertEquals(
    await client.next(),
    "* This room has a password. What is it?",
  );
  await client.send(frame(TEXT, "sesame"));
  await client.find(/^\* Welcome!/);
  await Deno.remove(passwordFile);
});

// -- behind a proxy

/** The address by which the room knows a client with these headers. */
async function addressSeen(
  trustProxy: string[],
  forwarded: string,
  host = "127.0.0.1",
): Promise<string> {
  await using room = await open({}, { trustProxy, host });
  const url = `http://127.0.0.1:${room.web.port}`;
  using _client = await Client.join(url, { "X-Forwarded-For": forwarded });
  const line = room.printed.find((line) => line.startsWith("New Connection"))!;
  return /from (.*):\d+ /.exec(line)![1];
}

Deno.test("the address comes from a trusted proxy's last hop alone", async () => {
  const trusted = ["127.0.0.0/8"];
  assertEquals(await addressSeen([], "192.0.2.1"), "127.0.0.1");
  assertEquals(await addressSeen(["10.0.0.0/8"], "192.0.2.1"), "127.0.0.1");
  assertEquals(await addressSeen(trusted, "192.0.2.1"), "192.0.2.1");
  assertEquals(
    await addressSeen(trusted, "198.51.100.9, 192.0.2.1"),
    "192.0.2.1",
  );
  assertEquals(await addressSeen(trusted, "192.0.2.1:4711"), "192.0.2.1");
  assertEquals(await addressSeen(trusted, "2001:DB8::0:1"), "[2001:db8::1]");
  assertEquals(await addressSeen(trusted, "[2001:db8::1]:99"), "[2001:db8::1]");
  assertEquals(await addressSeen(trusted, "::ffff:192.0.2.1"), "192.0.2.1");
  assertEquals(await addressSeen(trusted, "unknown"), "127.0.0.1");
  assertEquals(await addressSeen(trusted, ""), "127.0.0.1");
  // On :: the system gives the proxy's address in its mapped form.
  assertEquals(await addressSeen(trusted, "192.0.2.1", "::"), "192.0.2.1");
  const mapped = ["::ffff:127.0.0.0/104"];
  assertEquals(await addressSeen(mapped, "192.0.2.1"), "192.0.2.1");
});

Deno.test("options that cannot be used are reported", async () => {
  const chat = { stopping: new AbortController().signal } as ChatServer;
  const problem = async (options: Record<string, unknown>) => {
    const error = await assertRejects(() =>
      WebServer.listen(chat, { host: "127.0.0.1", port: 0, ...options })
    ) as Error;
    return error.message;
  };
  for (const network of ["nowhere", "10.0.0.0/33", "::/129", "", "10.0.0/8"]) {
    assertEquals(
      await problem({ trustProxy: [network] }),
      `Cannot use ${network} for --trust-proxy: ` +
        "give a network, such as 10.0.0.0/8",
    );
  }
  using taken = Deno.listen({ hostname: "127.0.0.1", port: 0 });
  const { port } = taken.addr as Deno.NetAddr;
  assertEquals(
    await problem({ port }),
    `Cannot listen on 127.0.0.1:${port}: ` +
      "the port is in use (choose another with --web)",
  );
});

// -- as a program

Deno.test("--web opens the page with the network permission alone", async () => {
  const main = new URL("../main.ts", import.meta.url).pathname;
  const child = new Deno.Command(Deno.execPath(), {
    // deno-fmt-ignore: an option and its value
    args: [
      "run", "--allow-net", main,
      "--host", "127.0.0.1", "--port", "0", "--web", "0",
    ],
    stdout: "piped",
    env: { NO_COLOR: "1" },
  }).spawn();
  const reader = child.stdout.pipeThrough(new TextDecoderStream()).getReader();
  let output = "";
  const read = async (pattern: RegExp) => {
    while (!pattern.test(output)) {
      const { done, value } = await within(reader.read(), String(pattern));
      assert(!done, output);
      output += value;
    }
    return pattern.exec(output)!;
  };
  const [, url] = await read(/^Web page: (http:\S+)\n/m);
  using client = await Client.join(url);
  child.kill("SIGTERM");
  await client.find(/^\* Shutdown Server$/);
  assertEquals((await client.closed())[0], 1001);
  await read(/Shutdown Server \.{6}/);
  assertEquals((await within(child.status, "the end")).code, 0);
  await reader.cancel();
});
