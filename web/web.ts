/**
 * The chat room in a browser: one page, and a WebSocket that is a
 * {@linkcode Connection} like any other. `--web PORT` loads this module.
 *
 * ```sh
 * deno run --allow-net main.ts --web 8080
 * ```
 *
 * | request | answer |
 * | --- | --- |
 * | `GET /` | the page |
 * | `GET /chat` | the WebSocket: one line a text message in, whole lines as binary messages out |
 * | `GET /health` | `ok`, for a load balancer |
 *
 * HTTP is `node:http`, and the frames of the WebSocket (RFC 6455) are read and
 * written here. `Deno.upgradeWebSocket` would be shorter, but as measured with
 * Deno 2.9.6 it cannot end a connection whose other side does not answer: a page
 * that stops reading kept its descriptor and 6.8 MB until the process ended. It
 * also holds up to 64 MiB of a message in memory, and takes 29 KB an idle
 * connection where `node:http` takes 17.
 *
 * @module
 */
import { isUtf8 } from "node:buffer";
import { createHash } from "node:crypto";
import {
  createServer as createHttpServer,
  type IncomingMessage,
  type ServerResponse,
  STATUS_CODES,
} from "node:http";
import { createServer as createHttpsServer } from "node:https";
import { BlockList, isIP, type Socket } from "node:net";
import { gzipSync } from "node:zlib";
import type { ChatServer, Connection } from "../main.ts";
import pageSource from "./page.html" with { type: "text" };

/** What can be set of the web listener. */
export interface WebOptions {
  /** Address or host name to listen on; `::` is IPv4 and IPv6. */
  host: string;
  /** TCP port to listen on; 0 picks a free one. */
  port: number;
  /** The certificate chain for HTTPS (PEM); with `tlsKey`, or none. */
  tlsCert?: string;
  /** Its private key (PEM). */
  tlsKey?: string;
  /** Networks of reverse proxies, such as `10.0.0.0/8`: from these alone the
   * address of the client is taken from `X-Forwarded-For`. */
  trustProxy?: string[];
  /** Lines a second that a client may send, for the page to send no faster; 0 is
   * no limit. */
  rate?: number;
  /** How often a client is asked whether it is there, in milliseconds. One that
   * has not answered when the next question is due is disconnected. */
  pingMilliseconds?: number;
  /** How long a request may take to come, in milliseconds. */
  requestMilliseconds?: number;
}

// ---------------------------------------------------------------------------
// HTTP: the page, and what else is asked for.
// ---------------------------------------------------------------------------

/** How long a request may take to come, its TLS handshake included. */
const REQUEST_MILLISECONDS = 10_000;

/** How many connections may be without a WebSocket. They take no place in the
 * room, and could take all descriptors. */
const MOST_REQUESTS = 500;

const TEXT = "text/plain; charset=utf-8";

/** What a request is answered with. */
interface Answer {
  status: number;
  headers?: Record<string, string>;
  body?: string | Uint8Array;
}

/** Sent with every answer. */
const SAFE_HEADERS = {
  "X-Content-Type-Options": "nosniff",
  "Referrer-Policy": "no-referrer",
  // A connection serves one request, so that its deadline is that of the request.
  "Connection": "close",
};

/** The page as it is served. */
class Page {
  readonly #html: Uint8Array;
  readonly #compressed: Uint8Array;
  readonly #headers: Record<string, string>;

  /** @param rate lines a second that the page may send */
  constructor(rate: number) {
    // A checkout can have CR LF, which a browser hashes as LF.
    const html = pageSource.replaceAll("\r\n", "\n")
      .replace(/data-rate="\d+"/, `data-rate="${rate}"`);
    this.#html = new TextEncoder().encode(html);
    this.#compressed = gzipSync(this.#html, { level: 9 });
    this.#headers = {
      "Content-Type": "text/html; charset=utf-8",
      "Content-Security-Policy": contentSecurityPolicy(html),
      "ETag": `W/"${sha256(html)}"`,
      // Kept, but asked for each time: the page and the server belong together.
      "Cache-Control": "no-cache",
      "Vary": "Accept-Encoding",
    };
  }

  answer({ headers }: IncomingMessage): Answer {
    const known = (headers["if-none-match"] ?? "").split(",")
      .map((tag) => tag.trim());
    if (known.includes(this.#headers.ETag) || known.includes("*")) {
      return { status: 304, headers: this.#headers };
    }
    const compressed = /\bgzip\b(?!\s*;\s*q=0(?:\.0*)?\s*(?:,|$))/i.test(
      String(headers["accept-encoding"] ?? ""),
    );
    if (!compressed) {
      return { status: 200, headers: this.#headers, body: this.#html };
    }
    return {
      status: 200,
      headers: { ...this.#headers, "Content-Encoding": "gzip" },
      body: this.#compressed,
    };
  }
}

function sha256(text: string): string {
  return createHash("sha256").update(text).digest("base64");
}

/** Permits the page its own script and style, by their hashes (CSP 3, 2.3.1),
 * and its WebSocket; nothing else, whatever would get into it. */
function contentSecurityPolicy(html: string): string {
  const hashes = (element: string) =>
    Array.from(
      html.matchAll(new RegExp(`<${element}>(.*?)</${element}>`, "gs")),
      ([, content]) => `'sha256-${sha256(content)}'`,
    ).join(" ");
  return [
    "default-src 'none'",
    `script-src ${hashes("script")}`,
    `style-src ${hashes("style")}`,
    "connect-src 'self'",
    "img-src data:",
    "base-uri 'none'",
    "form-action 'none'",
    "frame-ancestors 'none'",
    "require-trusted-types-for 'script'",
  ].join("; ");
}

/** The path of a request, without its query. */
function pathOf(request: IncomingMessage): string {
  return (request.url ?? "").replace(/[?#].*$/s, "");
}

function answerOf(page: Page, request: IncomingMessage): Answer {
  const path = pathOf(request);
  if (!["/", "/chat", "/health"].includes(path)) {
    return plain(404, "There is nothing here. The chat room is at /");
  }
  if (request.method !== "GET" && request.method !== "HEAD") {
    return plain(405, "Only GET is served here", { Allow: "GET, HEAD" });
  }
  if (path === "/health") {
    return plain(200, "ok", { "Cache-Control": "no-store" });
  }
  if (path === "/chat") {
    return plain(426, "This is a WebSocket. The page is at /", {
      Upgrade: "websocket",
    });
  }
  return page.answer(request);
}

function plain(
  status: number,
  text: string,
  headers: Record<string, string> = {},
): Answer {
  return {
    status,
    headers: { "Content-Type": TEXT, ...headers },
    body: text + "\n",
  };
}

function respond(
  request: IncomingMessage,
  response: ServerResponse,
  { status, headers, body }: Answer,
): void {
  response.writeHead(status, {
    ...SAFE_HEADERS,
    ...headers,
    ...body === undefined ? {} : { "Content-Length": byteLength(body) },
  });
  response.end(request.method === "HEAD" ? undefined : body);
}

/** The same on a connection that asked for an upgrade and is refused it. */
function respondRaw(socket: Socket, { status, headers, body = "" }: Answer) {
  const all = {
    ...SAFE_HEADERS,
    ...headers,
    "Content-Length": byteLength(body),
  };
  const head = Object.entries(all).map(([name, value]) => `${name}: ${value}`);
  socket.write(
    [`HTTP/1.1 ${status} ${STATUS_CODES[status]}`, ...head, "", ""].join(
      "\r\n",
    ),
  );
  socket.end(body);
  destroyLater(socket);
}

function byteLength(body: string | Uint8Array): number {
  return typeof body === "string"
    ? new TextEncoder().encode(body).length
    : body.length;
}

/** How long the other side has to take the last bytes and close. */
const LINGER_MILLISECONDS = 1_000;

/** Lets what was written arrive, but waits for nobody longer than that. */
function destroyLater(socket: Socket): void {
  const timer = setTimeout(() => socket.destroy(), LINGER_MILLISECONDS);
  socket.once("close", () => clearTimeout(timer));
  socket.resume(); // its end is seen only if what comes before it is read
}

// ---------------------------------------------------------------------------
// Handshake: who may open a WebSocket, and from where (RFC 6455, section 4.2).
// ---------------------------------------------------------------------------

/** What RFC 6455, 1.3, appends to the key before it is hashed. */
const HANDSHAKE_GUID = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11";

/** Why a request for the WebSocket is refused, or `null`. */
function upgradeRefusal({ headers, httpVersion }: IncomingMessage) {
  if (!isOwnOrigin(headers.origin, headers.host)) {
    return plain(403, "This page may not open the chat of another site");
  }
  if (headers["sec-websocket-version"] !== "13") {
    return plain(426, "WebSocket version 13 is needed (RFC 6455)", {
      "Upgrade": "websocket",
      "Sec-WebSocket-Version": "13",
    });
  }
  const key = headers["sec-websocket-key"] ?? "";
  if (httpVersion !== "1.1" || !/^[A-Za-z\d+/]{22}==$/.test(key)) {
    return plain(400, "This is not a WebSocket handshake (RFC 6455)");
  }
  return null;
}

/** Whether a page of `origin` may speak with `host`: only one that came from
 * there. A program that is no browser sends no origin, and could send any. */
function isOwnOrigin(origin?: string, host?: string): boolean {
  if (origin === undefined) return true;
  const from = URL.parse(origin);
  if (from === null || !host) return false;
  // Parsed, so that letters of either case and the usual port compare equal.
  return from.host === URL.parse(`${from.protocol}//${host}`)?.host;
}

function acceptKey(key: string): string {
  return createHash("sha1").update(key + HANDSHAKE_GUID).digest("base64");
}

/** An address without a zone, and without the IPv4-mapped form (RFC 4291,
 * 2.5.5.2) that a listener on `::` gives; `null` if it is none. */
function plainAddress(text: string): string | null {
  const address = text.replace(/%.*$/s, "");
  const family = isIP(address);
  if (family === 0) return null;
  const canonical = family === 6
    ? new URL(`http://[${address}]`).hostname.slice(1, -1)
    : address;
  const mapped = /^::ffff:([\da-f]+):([\da-f]+)$/.exec(canonical);
  if (mapped === null) return canonical;
  const [high, low] = mapped.slice(1).map((group) => parseInt(group, 16));
  return [high >> 8, high & 255, low >> 8, low & 255].join(".");
}

/** The reverse proxies whose word on the client's address is taken. */
class TrustedProxies {
  readonly #networks = new BlockList();

  /** @throws if a network is none; the message says what to do */
  constructor(networks: string[]) {
    for (const network of networks) {
      const [, host, bits] = /^([^/]+)(?:\/(\d{1,3}))?$/.exec(network) ?? [];
      const address = plainAddress(host ?? "");
      const length = address?.includes(":") ? 128 : 32;
      // An IPv4 network may be written in its mapped form, of 128 bits.
      const skipped = length === 32 && host?.includes(":") ? 96 : 0;
      const prefix = bits === undefined ? length : Number(bits) - skipped;
      if (address === null || prefix < 0 || prefix > length) {
        throw new Error(
          `Cannot use ${network} for --trust-proxy: ` +
            "give a network, such as 10.0.0.0/8",
        );
      }
      this.#networks.addSubnet(address, prefix, familyOf(address));
    }
  }

  /** The address that a request comes from. A proxy appends the address that it
   * saw, so the last one is its own word; what stands before it anyone can send. */
  clientAddress(peer: string, { headers }: IncomingMessage): string {
    const address = plainAddress(peer);
    if (address === null) return peer;
    if (!this.#networks.check(address, familyOf(address))) return address;
    const hops = String(headers["x-forwarded-for"] ?? "").split(",");
    // Some proxies append a port: 192.0.2.1:4711, [2001:db8::1]:4711.
    const last = hops.at(-1)!.trim()
      .replace(/^\[(.*)\](?::\d+)?$/, "$1")
      .replace(/^([\d.]+):\d+$/, "$1");
    return plainAddress(last) ?? address;
  }
}

function familyOf(address: string): "ipv4" | "ipv6" {
  return address.includes(":") ? "ipv6" : "ipv4";
}

// ---------------------------------------------------------------------------
// WebSocket: a socket after its handshake, as a connection of the chat server.
// ---------------------------------------------------------------------------

/** The most input that waits for its turn, in bytes, and the longest message. The
 * server reads a client that is paced no faster than its lines may be said. */
const MOST_WAITING_BYTES = 65_536;

/** How many frames that carry no whole message may come between two pings: more
 * of them is work for nothing. A message of the greatest length, sent in pieces of
 * a packet each, has 47. */
const MOST_OTHER_FRAMES = 1_000;

/** How often a client is asked whether it is there. One that has vanished is
 * found after two of these. */
const PING_MILLISECONDS = 20_000;

const LF = 10;

// Opcodes (RFC 6455, 5.2).
const CONTINUATION = 0, BINARY_MESSAGE = 2; // and 1 is text
const CLOSE = 8, PING = 9, PONG = 10;

// Codes for the end (RFC 6455, 7.4.1).
const NORMAL = 1000, GOING_AWAY = 1001, PROTOCOL_ERROR = 1002;
const UNSUPPORTED = 1003, NOT_UTF8 = 1007, POLICY = 1008, TOO_BIG = 1009;

const SERVER_STOPS = "The server stops";

const NO_BYTES: Uint8Array = new Uint8Array(0), LINE_END = Uint8Array.of(LF);

/** Bytes that wait. An empty queue takes no memory: most people only listen. */
class ByteQueue {
  #buffer: Uint8Array = NO_BYTES;
  #start = 0;
  #end = 0;

  get length(): number {
    return this.#end - this.#start;
  }

  /** What waits; valid until something is added or dropped. */
  get bytes(): Uint8Array {
    return this.#buffer.subarray(this.#start, this.#end);
  }

  add(bytes: Uint8Array): void {
    if (this.#end + bytes.length > this.#buffer.length) {
      // Twice as much as is needed, so that it is seldom copied.
      const larger = new Uint8Array(2 * (this.length + bytes.length));
      larger.set(this.bytes);
      this.#end -= this.#start;
      this.#start = 0;
      this.#buffer = larger;
    }
    this.#buffer.set(bytes, this.#end);
    this.#end += bytes.length;
  }

  drop(count: number): void {
    this.#start += count;
    if (this.#start < this.#end) return;
    this.#start = this.#end = 0;
    this.#buffer = NO_BYTES;
  }
}

/** A frame from the server, which is not masked (RFC 6455, 5.1). */
function makeFrame(
  opcode: number,
  payload: Uint8Array,
  final = true,
): Uint8Array {
  const { length } = payload;
  const headLength = length < 126 ? 2 : length < 65_536 ? 4 : 10;
  const frame = new Uint8Array(headLength + length);
  frame[0] = (final ? 0x80 : 0) | opcode;
  frame[1] = length < 126 ? length : length < 65_536 ? 126 : 127;
  const view = new DataView(frame.buffer);
  if (headLength === 4) view.setUint16(2, length);
  if (headLength === 10) view.setBigUint64(2, BigInt(length));
  frame.set(payload, headLength);
  return frame;
}

/** The frame that was made last. Clients that are up to date are all written the
 * same bytes. */
let lastFrame = { payload: NO_BYTES, opcode: -1, final: true, bytes: NO_BYTES };

function makeSharedFrame(
  opcode: number,
  payload: Uint8Array,
  final: boolean,
): Uint8Array {
  const same = lastFrame.payload === payload &&
    lastFrame.opcode === opcode && lastFrame.final === final;
  if (!same) {
    const bytes = makeFrame(opcode, payload, final);
    lastFrame = { payload, opcode, final, bytes };
  }
  return lastFrame.bytes;
}

/** A code and a reason, which is ASCII and shorter than 124 bytes. */
function closePayload(code: number, reason: string): Uint8Array {
  return new TextEncoder().encode(`  ${reason}`).with(0, code >> 8)
    .with(1, code & 255);
}

class WebSocketConnection implements Connection {
  readonly #socket: Socket;
  readonly #isStopping: () => boolean;
  /** What came of a frame that is not complete. */
  readonly #partial = new ByteQueue();
  /** What came of a message that is not complete. */
  readonly #message = new ByteQueue();
  #inMessage = false;
  /** Lines that the server has not read yet. */
  readonly #waiting = new ByteQueue();
  #reader:
    | (PromiseWithResolvers<number | null> & { buffer: Uint8Array })
    | null = null;
  /** Nothing more comes from the other side. */
  #ended = false;
  #failure: Error | null = null;
  #writing = false;
  #spoken = false;
  /** The last message that was sent is not complete. */
  #midLine = false;
  #closeSent = false;
  #closed = false;
  #alive = true;
  #otherFrames = 0;

  /**
   * @param socket what the handshake was made on
   * @param isStopping whether the server has begun to stop
   */
  constructor(socket: Socket, isStopping: () => boolean) {
    this.#socket = socket;
    this.#isStopping = isStopping;
    socket.on("data", (chunk: Uint8Array) => this.receive(chunk));
    socket.on("end", () => this.#end());
    socket.on("error", (error: Error) => this.#fail(error));
    socket.on("close", () => {
      this.#closed = true;
      this.#end();
    });
  }

  // -- reading

  read(buffer: Uint8Array): Promise<number | null> {
    if (this.#waiting.length > 0) return Promise.resolve(this.#take(buffer));
    if (this.#failure !== null) return Promise.reject(this.#failure);
    if (this.#ended) return Promise.resolve(null);
    this.#reader = { buffer, ...Promise.withResolvers<number | null>() };
    return this.#reader.promise;
  }

  #take(buffer: Uint8Array): number {
    const bytes = this.#waiting.bytes.subarray(0, buffer.length);
    buffer.set(bytes);
    this.#waiting.drop(bytes.length);
    return bytes.length;
  }

  #end(): void {
    this.#ended = true;
    if (this.#reader === null) return;
    this.#reader.resolve(null);
    this.#reader = null;
  }

  #fail(error: Error): void {
    this.#failure ??= error;
    this.#ended = true;
    this.#waiting.drop(this.#waiting.length);
    if (this.#reader === null) return;
    this.#reader.reject(this.#failure);
    this.#reader = null;
  }

  /** Takes what came over the socket. */
  receive(chunk: Uint8Array): void {
    this.#alive = true;
    if (this.#ended) return;
    let bytes = chunk;
    if (this.#partial.length > 0) {
      this.#partial.add(chunk);
      bytes = this.#partial.bytes;
    }
    let used = 0;
    while (!this.#ended) {
      const length = this.#receiveFrame(bytes.subarray(used));
      if (length === 0) break;
      used += length;
    }
    if (bytes !== chunk) this.#partial.drop(this.#ended ? bytes.length : used);
    else if (!this.#ended && used < bytes.length) {
      this.#partial.add(bytes.subarray(used));
    }
  }

  /** Takes one frame from the beginning of `bytes`, and tells its length; 0 if it
   * is not complete, or not as it must be (RFC 6455, 5.2). */
  #receiveFrame(bytes: Uint8Array): number {
    if (bytes.length < 2) return 0;
    const final = (bytes[0] & 0x80) !== 0, opcode = bytes[0] & 0x0f;
    const isControl = opcode >= CLOSE;
    const known = opcode <= BINARY_MESSAGE ||
      (opcode >= CLOSE && opcode <= PONG);
    const masked = (bytes[1] & 0x80) !== 0, shortLength = bytes[1] & 0x7f;
    const extensions = (bytes[0] & 0x70) !== 0; // none was agreed on
    if (
      !known || extensions || !masked ||
      (isControl && (!final || shortLength > 125)) ||
      (!isControl && this.#inMessage !== (opcode === CONTINUATION))
    ) {
      this.#refuse(PROTOCOL_ERROR, "Not a frame of RFC 6455");
      return 0;
    }
    if (opcode === BINARY_MESSAGE) {
      this.#refuse(UNSUPPORTED, "Send text messages, one line each");
      return 0;
    }

    const headLength = 2 + 4 +
      (shortLength === 127 ? 8 : shortLength === 126 ? 2 : 0);
    if (bytes.length < headLength) return 0;
    const view = new DataView(bytes.buffer, bytes.byteOffset, headLength);
    const length = shortLength === 127
      ? Number(view.getBigUint64(2))
      : shortLength === 126
      ? view.getUint16(2)
      : shortLength;
    if (this.#message.length + length >= MOST_WAITING_BYTES) {
      this.#refuse(TOO_BIG, "A message is at most 64 KiB");
      return 0;
    }
    const end = headLength + length;
    if (bytes.length < end) return 0;

    const payload = bytes.subarray(headLength, end);
    const mask = bytes.subarray(headLength - 4, headLength);
    for (let i = 0; i < length; i++) payload[i] ^= mask[i & 3];
    if (isControl) this.#receiveControl(opcode, payload);
    else this.#receiveText(payload, final);
    if (isControl || !final) this.#countOtherFrame();
    return end;
  }

  #receiveText(payload: Uint8Array, final: boolean): void {
    this.#inMessage = !final;
    let message = payload;
    if (!final || this.#message.length > 0) {
      this.#message.add(payload);
      if (!final) return;
      message = this.#message.bytes;
    }
    if (!isUtf8(message)) {
      return this.#refuse(NOT_UTF8, "A text message is UTF-8");
    }
    if (this.#waiting.length + message.length >= MOST_WAITING_BYTES) {
      return this.#refuse(POLICY, "Too much at once: send more slowly");
    }
    this.#waiting.add(message);
    this.#waiting.add(LINE_END);
    this.#message.drop(this.#message.length);
    if (this.#reader === null) return;
    this.#reader.resolve(this.#take(this.#reader.buffer));
    this.#reader = null;
  }

  #receiveControl(opcode: number, payload: Uint8Array): void {
    // Its own close is sent when the server has written what is left.
    if (opcode === CLOSE) this.#end();
    // A pong for the last ping is enough (RFC 6455, 5.5.3): one that does not read
    // them gets no more.
    else if (opcode === PING && this.#socket.writableLength === 0) {
      this.#socket.write(makeFrame(PONG, payload));
    }
  }

  #countOtherFrame(): void {
    if (++this.#otherFrames <= MOST_OTHER_FRAMES || this.#ended) return;
    this.#refuse(POLICY, "Too many pings or fragments");
  }

  /** Ends the connection with a reason. */
  #refuse(code: number, reason: string): void {
    this.#sendClose(code, reason);
    this.#fail(new Error(reason));
    this.#finish();
  }

  // -- writing

  /** Resolves when the system has taken the bytes: that is the backpressure, so
   * one write of at most a segment of the log waits for each client. */
  write(bytes: Uint8Array): Promise<number> {
    if (this.#closeSent || this.#closed) {
      return Promise.reject(this.#failure ?? new Error("It is closed"));
    }
    // A message is whole lines, even if the bytes end within one.
    const final = bytes.at(-1) === LF;
    const opcode = this.#midLine ? CONTINUATION : BINARY_MESSAGE;
    this.#midLine = !final;
    const frame = makeSharedFrame(opcode, bytes, final);
    this.#spoken = this.#writing = true;
    return new Promise((resolve, reject) => {
      this.#socket.write(frame, (error) => {
        this.#writing = false;
        if (error) reject(error);
        else resolve(bytes.length);
      });
    });
  }

  /** Asks whether it is there. */
  ping(): void {
    this.#otherFrames = 0;
    if (this.#closeSent || this.#closed) return;
    if (!this.#alive) {
      this.#fail(new Error("It does not answer"));
      this.#socket.destroy();
    } else {
      this.#alive = false;
      this.#socket.write(makeFrame(PING, NO_BYTES));
    }
  }

  // -- closing

  /** Sends the close frame, and resolves when the system has taken it. */
  closeWrite(): Promise<void> {
    return new Promise((resolve, reject) => {
      const written = (error?: Error | null) =>
        error ? reject(error) : resolve();
      if (this.#closeSent || this.#closed) written(this.#failure);
      else if (this.#isStopping()) {
        this.#sendClose(GOING_AWAY, SERVER_STOPS, written);
      } else this.#sendClose(NORMAL, "", written);
    });
  }

  close(): void {
    // One that has not taken the last write would not take more.
    if (this.#writing) this.#socket.destroy();
    else {
      if (this.#isStopping()) this.#sendClose(GOING_AWAY, SERVER_STOPS);
      else if (!this.#spoken) {
        this.#sendClose(POLICY, "You cannot join from this address");
      } else this.#sendClose(NORMAL, "");
      this.#finish();
    }
  }

  /** Ends the connection because the web server does. */
  goAway(): void {
    if (!this.#closed) this.#refuse(GOING_AWAY, SERVER_STOPS);
  }

  #sendClose(
    code: number,
    reason: string,
    written?: (error?: Error | null) => void,
  ): void {
    if (this.#closeSent || this.#closed) return;
    this.#closeSent = true;
    this.#socket.write(makeFrame(CLOSE, closePayload(code, reason)), written);
  }

  #finish(): void {
    if (this.#closed) return;
    this.#socket.end();
    destroyLater(this.#socket);
  }
}

// ---------------------------------------------------------------------------
// The web server.
// ---------------------------------------------------------------------------

/**
 * The page and the WebSocket of a room.
 *
 * @example
 * ```ts
 * import { ChatServer } from "../main.ts";
 * import { WebServer } from "./web.ts";
 *
 * await using server = ChatServer.listen({ host: "127.0.0.1", port: 0 });
 * await using web = await WebServer.listen(server, {
 *   host: "127.0.0.1",
 *   port: 0,
 * });
 * const response = await fetch(`${web.url}/health`);
 * console.log(await response.text());
 * ```
 */
export class WebServer implements AsyncDisposable {
  /** Where the page is, such as `http://localhost:8080`. */
  readonly url: string;
  /** The port that it listens on. */
  readonly port: number;
  readonly #chat: ChatServer;
  readonly #http: ReturnType<typeof createHttpServer>;
  readonly #page: Page;
  readonly #proxies: TrustedProxies;
  readonly #connections = new Set<WebSocketConnection>();
  /** Connections without a WebSocket, by {@linkcode peerOf}. */
  readonly #requests = new Set<string>();
  readonly #pingTimer: ReturnType<typeof setInterval>;
  readonly #closed = Promise.withResolvers<void>();
  #stopping = false;

  private constructor(
    chat: ChatServer,
    http: ReturnType<typeof createHttpServer>,
    { host, rate = 20, trustProxy = [], tlsCert, pingMilliseconds }: WebOptions,
  ) {
    this.#chat = chat;
    this.#http = http;
    this.#page = new Page(rate);
    this.#proxies = new TrustedProxies(trustProxy);
    this.port = (http.address() as { port: number }).port;
    const anywhere = host === "0.0.0.0" || host === "::";
    const name = anywhere ? "localhost" : urlHost(host);
    const scheme = tlsCert ? "https" : "http";
    this.url = new URL(`${scheme}://${name}:${this.port}`).origin;

    http.on("connection", (socket: Socket) => this.#limitRequests(socket));
    http.on("request", (request, response) => {
      request.on("error", () => {}); // the connection's trouble, which ends it
      respond(request, response, answerOf(this.#page, request));
    });
    http.on("upgrade", (request, socket, head) => {
      this.#upgrade(request, socket as Socket, head);
    });
    http.on("clientError", (_error, socket) => socket.destroy());
    http.on("close", () => this.#closed.resolve());
    this.#pingTimer = setInterval(
      () => this.#connections.forEach((it) => it.ping()),
      pingMilliseconds ?? PING_MILLISECONDS,
    );
    Deno.unrefTimer(Number(this.#pingTimer));
    // The room tells its people of the end, and then closes their connections.
    chat.stopping.addEventListener("abort", () => this.#stopListening());
    if (chat.stopping.aborted) this.#stopListening();
  }

  /**
   * Opens the web listener of a room. It closes when the room does.
   *
   * @param chat the room
   * @param options where it listens, and how
   * @throws {Error} if the address and port cannot be listened on, or an option
   * cannot be used; the message says why, and what to do
   */
  static async listen(
    chat: ChatServer,
    options: WebOptions,
  ): Promise<WebServer> {
    new TrustedProxies(options.trustProxy ?? []); // before anything is opened
    const { host, port, tlsCert, tlsKey } = options;
    const { requestMilliseconds = REQUEST_MILLISECONDS } = options;
    const limits = {
      headersTimeout: requestMilliseconds,
      requestTimeout: requestMilliseconds,
      handshakeTimeout: requestMilliseconds,
      connectionsCheckingInterval: requestMilliseconds / 10,
    };
    const http = tlsCert
      ? createHttpsServer({ ...limits, cert: tlsCert, key: tlsKey })
      : createHttpServer(limits);
    await new Promise<void>((resolve, reject) => {
      http.once("error", (error: NodeJS.ErrnoException) =>
        reject(
          new Error(
            `Cannot listen on ${urlHost(host)}:${port}: ${
              listenProblem(error)
            }`,
            { cause: error },
          ),
        ));
      http.listen(port, host, resolve);
    });
    http.on("error", () => {}); // out of descriptors, say: the listener is good
    return new WebServer(chat, http, options);
  }

  #limitRequests(socket: Socket): void {
    if (this.#requests.size >= MOST_REQUESTS) {
      socket.destroy();
      return;
    }
    const key = peerOf(socket);
    this.#requests.add(key);
    socket.on("close", () => this.#requests.delete(key));
  }

  #upgrade(request: IncomingMessage, socket: Socket, head: Uint8Array): void {
    socket.on("error", () => {});
    if (
      pathOf(request) !== "/chat" || request.method !== "GET" ||
      request.headers.upgrade?.toLowerCase() !== "websocket"
    ) {
      // A request may offer another upgrade, such as to HTTP/2, and be content
      // with the page.
      return respondRaw(socket, answerOf(this.#page, request));
    }
    const refusal = upgradeRefusal(request);
    if (refusal !== null) return respondRaw(socket, refusal);
    socket.setNoDelay(true); // a line does not wait for another to join it
    socket.setTimeout(0);
    socket.write(
      "HTTP/1.1 101 Switching Protocols\r\n" +
        "Upgrade: websocket\r\nConnection: Upgrade\r\n" +
        `Sec-WebSocket-Accept: ${
          acceptKey(request.headers["sec-websocket-key"]!)
        }\r\n\r\n`,
    );
    this.#requests.delete(peerOf(socket));
    const connection = new WebSocketConnection(socket, () => this.#stopping);
    this.#connections.add(connection);
    socket.on("close", () => this.#connections.delete(connection));
    const hostname = this.#proxies.clientAddress(
      socket.remoteAddress ?? "",
      request,
    );
    this.#chat.admit(connection, { hostname, port: socket.remotePort ?? 0 });
    if (head.length > 0) connection.receive(head);
  }

  #stopListening(): void {
    if (this.#stopping) return;
    this.#stopping = true;
    clearInterval(this.#pingTimer);
    this.#http.close();
    this.#http.closeIdleConnections();
  }

  /**
   * Stops listening, and closes the connections of web clients with code 1001.
   * The end of the room does it too.
   *
   * @returns a promise that resolves when every connection is closed
   */
  async close(): Promise<void> {
    this.#stopListening();
    for (const connection of this.#connections) connection.goAway();
    await this.#closed.promise;
  }

  /** Closes it at the end of an `await using` block. */
  [Symbol.asyncDispose](): Promise<void> {
    return this.close();
  }
}

/** What a socket and the TLS socket around it have in common. */
function peerOf({ remoteAddress, remotePort }: Socket): string {
  return `${remoteAddress} ${remotePort}`;
}

/** An address as it is written before a port. */
function urlHost(host: string): string {
  return host.includes(":") ? `[${host}]` : host;
}

/** Why the web listener cannot be opened, and what to do. */
function listenProblem(error: NodeJS.ErrnoException): string {
  switch (error.code) {
    case "EADDRINUSE":
      return "the port is in use (choose another with --web)";
    case "EADDRNOTAVAIL":
      return "this machine does not have that address (choose one with --host)";
    case "EACCES":
      return "the system does not permit it (choose a port above 1023)";
    default:
      return error.message.replace(/[\p{C}\p{Z}]+/gu, " ");
  }
}
