/**
 * The chat room in a browser: one page, and a WebSocket that the chat server
 * treats like any other {@linkcode Connection}. `--web PORT` loads this module.
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
 * written here. `Deno.upgradeWebSocket` would be shorter, but measured with Deno
 * 2.9.6:
 *
 * - It cannot end a connection whose other side does not answer. A page that
 *   stopped reading kept its descriptor and 6.8 MB until the process ended.
 * - It accepts messages of up to 64 MiB.
 * - An idle connection takes 29 KB, compared with 17 KB here.
 *
 * @module
 */
import { Buffer, isUtf8 } from "node:buffer";
import { createHash } from "node:crypto";
import {
  createServer as createHttpServer,
  type IncomingMessage,
  ServerResponse,
} from "node:http";
import { createServer as createHttpsServer } from "node:https";
import { BlockList, isIP, type Socket } from "node:net";
import { gzipSync } from "node:zlib";
import type { ChatServer, Connection } from "../main.ts";
import pageSource from "./page.html" with { type: "text" };

/** Options of {@linkcode WebServer.listen}. */
export interface WebOptions {
  /** Address or host name to listen on; `::` is IPv4 and IPv6. */
  host: string;
  /** TCP port to listen on; 0 picks a free one. */
  port: number;
  /** The certificate chain for HTTPS (PEM); with `tlsKey`, or none. */
  tlsCert?: string;
  /** Its private key (PEM). */
  tlsKey?: string;
  /** Networks of reverse proxies, such as `10.0.0.0/8`. `X-Forwarded-For` is used
   * in requests from these addresses, and ignored in all others. */
  trustProxy?: string[];
  /** How many lines a second the page sends at most; 0 is no limit. The chat
   * server enforces its own limit. */
  rate?: number;
  /** Whether the room relays lines without names: the page asks for no name then,
   * and shows no list of people. */
  raw?: boolean;
  /** Whether the room has a password: only then a line of a raw room can be the
   * question for it. */
  password?: boolean;
  /** Milliseconds between two pings of a client. A client that has sent nothing
   * between two pings is disconnected. */
  pingMilliseconds?: number;
  /** How long a request may take to arrive, in milliseconds, including the TLS
   * handshake. */
  requestMilliseconds?: number;
}

// ---------------------------------------------------------------------------
// HTTP: the page, and the answers to all other requests.
// ---------------------------------------------------------------------------

const REQUEST_MILLISECONDS = 10_000;

/** How many connections without a WebSocket may be open. The limits of the room
 * do not count them, and they could use up all file descriptors. */
const MAX_REQUESTS = 500;

/** The answer to a request. */
interface Answer {
  status: number;
  headers?: Record<string, string>;
  body?: string | Uint8Array;
}

/** Sent with every answer. */
const SAFE_HEADERS = {
  "X-Content-Type-Options": "nosniff",
  "Referrer-Policy": "no-referrer",
  // One request a connection: then the deadline of the request ends idle
  // connections too.
  "Connection": "close",
};

/** The page as it is served. */
class Page {
  readonly #html: Uint8Array;
  readonly #compressed: Uint8Array;
  readonly #headers: Record<string, string>;

  /**
   * @param rate lines a second that the page may send
   * @param raw whether the room is raw
   * @param password whether the room has a password
   */
  constructor(rate: number, raw: boolean, password: boolean) {
    // A checkout may have CR LF. A browser computes the hashes of the security
    // policy with LF.
    const html = pageSource.replaceAll("\r\n", "\n")
      .replace(
        /data-rate="\d+"/,
        `data-rate="${rate}"` + (raw ? " data-raw" : "") +
          (password ? " data-password" : ""),
      );
    this.#html = new TextEncoder().encode(html);
    this.#compressed = gzipSync(this.#html, { level: 9 });
    this.#headers = {
      "Content-Type": "text/html; charset=utf-8",
      "Content-Security-Policy": contentSecurityPolicy(html),
      "ETag": `W/"${sha256(html)}"`,
      // A cached page is validated each time: it has to match the server.
      "Cache-Control": "no-cache",
      "Vary": "Accept-Encoding",
    };
  }

  answer({ headers }: IncomingMessage): Answer {
    const cached = (headers["if-none-match"] ?? "").split(",")
      .map((tag) => tag.trim());
    if (cached.includes(this.#headers.ETag) || cached.includes("*")) {
      return { status: 304, headers: this.#headers };
    }
    // `gzip;q=0` means that gzip is not accepted.
    const acceptsGzip = /\bgzip\b(?!\s*;\s*q=0(?:\.0*)?\s*(?:,|$))/i.test(
      String(headers["accept-encoding"] ?? ""),
    );
    if (!acceptsGzip) {
      return { status: 200, headers: this.#headers, body: this.#html };
    }
    const compressed = { ...this.#headers, "Content-Encoding": "gzip" };
    return { status: 200, headers: compressed, body: this.#compressed };
  }
}

function sha256(text: string): string {
  return createHash("sha256").update(text).digest("base64");
}

/** Permits the page's own script and style, by their hashes (CSP 3, 2.3.1), and
 * its WebSocket. Anything else is blocked, even if it were injected. */
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
    return textAnswer(404, "There is nothing here. The chat room is at /");
  }
  if (request.method !== "GET" && request.method !== "HEAD") {
    return textAnswer(405, "Only GET is served here", { Allow: "GET, HEAD" });
  }
  if (path === "/health") {
    return textAnswer(200, "ok", { "Cache-Control": "no-store" });
  }
  if (path === "/chat") {
    return textAnswer(426, "This is a WebSocket. The page is at /", {
      Upgrade: "websocket",
    });
  }
  return page.answer(request);
}

function textAnswer(
  status: number,
  text: string,
  headers: Record<string, string> = {},
): Answer {
  return {
    status,
    headers: { "Content-Type": "text/plain; charset=utf-8", ...headers },
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
    ...body === undefined ? {} : { "Content-Length": Buffer.byteLength(body) },
  });
  response.end(request.method === "HEAD" ? undefined : body);
}

/** Answers a request for an upgrade that is refused. `node:http` has handed over
 * the socket of such a request, so the response is put onto it again. */
function refuseUpgrade(
  request: IncomingMessage,
  socket: Socket,
  answer: Answer,
): void {
  const response = new ServerResponse(request);
  response.assignSocket(socket);
  response.on("finish", () => socket.end());
  respond(request, response, answer);
  destroyLater(socket);
}

/** How long the other side has to take the last bytes and close. */
const LINGER_MILLISECONDS = 1_000;

/** Destroys a socket that is ending, if the other side takes too long. */
function destroyLater(socket: Socket): void {
  const timer = setTimeout(() => socket.destroy(), LINGER_MILLISECONDS);
  socket.once("close", () => clearTimeout(timer));
  socket.resume(); // the other side's end is seen only after its bytes are read
}

// ---------------------------------------------------------------------------
// Handshake: who may open a WebSocket (RFC 6455, section 4.2).
// ---------------------------------------------------------------------------

/** Appended to the client's key before hashing (RFC 6455, 1.3). */
const HANDSHAKE_GUID = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11";

/** The answer to a request for the WebSocket that is refused; `null` if it is
 * accepted. */
function upgradeRefusal(
  { headers, httpVersion }: IncomingMessage,
): Answer | null {
  if (!isOwnOrigin(headers.origin, headers.host)) {
    return textAnswer(403, "This page may not open the chat of another site");
  }
  if (headers["sec-websocket-version"] !== "13") {
    return textAnswer(426, "WebSocket version 13 is needed (RFC 6455)", {
      "Upgrade": "websocket",
      "Sec-WebSocket-Version": "13",
    });
  }
  const key = headers["sec-websocket-key"] ?? "";
  if (httpVersion !== "1.1" || !/^[A-Za-z\d+/]{22}==$/.test(key)) {
    return textAnswer(400, "This is not a WebSocket handshake (RFC 6455)");
  }
  return null;
}

/** Whether a page of `origin` may connect to `host`: only if it was loaded from
 * there. A program without an origin is permitted: it could send any origin. */
function isOwnOrigin(origin?: string, host?: string): boolean {
  if (origin === undefined) return true;
  const from = URL.parse(origin);
  if (from === null || !host) return false;
  // URL.parse ignores upper and lower case and drops the default port.
  return from.host === URL.parse(`${from.protocol}//${host}`)?.host;
}

function acceptKey(key: string): string {
  return createHash("sha1").update(key + HANDSHAKE_GUID).digest("base64");
}

/** An IP address in its usual form: without a zone, and as IPv4 if it is an
 * IPv4-mapped address (RFC 4291, 2.5.5.2), as a listener on `::` reports them.
 * `null` if the text is no address. */
function normalizeAddress(text: string): string | null {
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

/** The reverse proxies that are trusted to tell the client's address. */
class TrustedProxies {
  readonly #networks = new BlockList();

  /** @throws {Error} if an entry is no network; the message says what to do */
  constructor(networks: string[]) {
    for (const network of networks) {
      const [, host, bits] = /^([^/]+)(?:\/(\d{1,3}))?$/.exec(network) ?? [];
      const address = normalizeAddress(host ?? "");
      const length = address?.includes(":") ? 128 : 32;
      // In the IPv4-mapped form the prefix counts 96 bits more.
      const mappedBits = length === 32 && host?.includes(":") ? 96 : 0;
      const prefix = bits === undefined ? length : Number(bits) - mappedBits;
      if (address === null || prefix < 0 || prefix > length) {
        throw new Error(
          `Cannot use ${network} for --trust-proxy: ` +
            "give a network, such as 10.0.0.0/8",
        );
      }
      this.#networks.addSubnet(address, prefix, familyOf(address));
    }
  }

  /** The address of the client that sent a request. A proxy appends the address
   * that it sees to `X-Forwarded-For`, so only the last one can be trusted. */
  clientAddress(peer: string, { headers }: IncomingMessage): string {
    const address = normalizeAddress(peer);
    if (address === null) return peer;
    if (!this.#networks.check(address, familyOf(address))) return address;
    const hops = String(headers["x-forwarded-for"] ?? "").split(",");
    // Some proxies append a port: 192.0.2.1:4711, [2001:db8::1]:4711.
    const last = hops.at(-1)!.trim()
      .replace(/^\[(.*)\](?::\d+)?$/, "$1")
      .replace(/^([\d.]+):\d+$/, "$1");
    return normalizeAddress(last) ?? address;
  }
}

function familyOf(address: string): "ipv4" | "ipv6" {
  return address.includes(":") ? "ipv6" : "ipv4";
}

// ---------------------------------------------------------------------------
// WebSocket: a socket after its handshake, as a Connection of the chat server.
// ---------------------------------------------------------------------------

/** How many bytes may wait to be read, and the limit of one message. Input waits
 * because the chat server reads a client no faster than its rate limit. */
const MAX_PENDING_BYTES = 65_536;

/** How many control frames and fragments a client may send between two pings;
 * without a limit they would keep the server busy and not be charged by the rate
 * limit. The longest message, in fragments of a packet each, has 47. */
const MAX_OTHER_FRAMES = 1_000;

/** Time between two pings. A client that has vanished is found after two. */
const PING_MILLISECONDS = 20_000;

const LF = 10;

// Opcodes (RFC 6455, 5.2).
const CONTINUATION = 0, TEXT = 1, BINARY = 2, CLOSE = 8, PING = 9, PONG = 10;

// Status codes of a close frame (RFC 6455, 7.4.1).
const NORMAL = 1000, GOING_AWAY = 1001, PROTOCOL_ERROR = 1002;
const UNSUPPORTED = 1003, NOT_UTF8 = 1007, POLICY = 1008, TOO_BIG = 1009;

const SERVER_STOPS = "The server stops";
const NOT_A_FRAME = "Not a frame of RFC 6455";

const NO_BYTES: Uint8Array = new Uint8Array(0), LINE_END = Uint8Array.of(LF);

/** A queue of bytes. It has no buffer while it is empty: most clients only
 * receive. */
class ByteQueue {
  #buffer: Uint8Array = NO_BYTES;
  #start = 0;
  #end = 0;

  get length(): number {
    return this.#end - this.#start;
  }

  /** All of the queue. */
  get bytes(): Uint8Array {
    return this.#buffer.subarray(this.#start, this.#end);
  }

  add(bytes: Uint8Array): void {
    if (this.#end + bytes.length > this.#buffer.length) {
      // Twice the size, so that it is copied seldom.
      const larger = new Uint8Array(2 * (this.length + bytes.length));
      larger.set(this.bytes);
      this.#end -= this.#start;
      this.#start = 0;
      this.#buffer = larger;
    }
    this.#buffer.set(bytes, this.#end);
    this.#end += bytes.length;
  }

  /** Removes bytes from the front. They stay valid: a buffer is never written
   * twice at the same place. */
  take(count: number): Uint8Array {
    const bytes = this.bytes.subarray(0, count);
    this.#start += count;
    if (this.#start === this.#end) {
      this.#start = this.#end = 0;
      this.#buffer = NO_BYTES;
    }
    return bytes;
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

/** The last frame: clients that are up to date are all sent the same bytes. */
let lastFrame = { payload: NO_BYTES, opcode: -1, final: true, bytes: NO_BYTES };

function makeSharedFrame(
  opcode: number,
  payload: Uint8Array,
  final: boolean,
): Uint8Array {
  const isSame = lastFrame.payload === payload &&
    lastFrame.opcode === opcode && lastFrame.final === final;
  if (!isSame) {
    const bytes = makeFrame(opcode, payload, final);
    lastFrame = { payload, opcode, final, bytes };
  }
  return lastFrame.bytes;
}

/** @param reason ASCII, at most 123 bytes (RFC 6455, 5.5) */
function closeFrame(code: number, reason: string): Uint8Array {
  const payload = new TextEncoder().encode(`  ${reason}`);
  payload[0] = code >> 8;
  payload[1] = code & 255;
  return makeFrame(CLOSE, payload);
}

/** A frame that a client may not send: the connection is closed. */
class FrameError extends Error {
  /** @param code the status code of the close frame, with `message` as reason */
  constructor(readonly code: number, message: string) {
    super(message);
  }
}

/** The head of a frame. */
interface FrameHead {
  isFinal: boolean;
  opcode: number;
  /** The head in bytes; its last four are the mask. */
  headLength: number;
  /** The payload in bytes. */
  length: number;
}

/** Reads the head of a client's frame (RFC 6455, 5.2).
 * @returns `null` if more bytes are needed
 * @throws {FrameError} if no client may send such a frame */
function readFrameHead(bytes: Uint8Array): FrameHead | null {
  if (bytes.length < 2) return null;
  const isFinal = (bytes[0] & 0x80) !== 0, opcode = bytes[0] & 0x0f;
  const isMasked = (bytes[1] & 0x80) !== 0, shortLength = bytes[1] & 0x7f;
  const isKnown = opcode <= BINARY || (opcode >= CLOSE && opcode <= PONG);
  const usesExtension = (bytes[0] & 0x70) !== 0; // none was negotiated
  const isLongControl = opcode >= CLOSE && (!isFinal || shortLength > 125);
  if (!isKnown || !isMasked || usesExtension || isLongControl) {
    throw new FrameError(PROTOCOL_ERROR, NOT_A_FRAME);
  }
  const lengthBytes = shortLength === 127 ? 8 : shortLength === 126 ? 2 : 0;
  const headLength = 2 + lengthBytes + 4;
  if (bytes.length < headLength) return null;
  const view = new DataView(bytes.buffer, bytes.byteOffset, headLength);
  let length = shortLength;
  if (lengthBytes === 2) length = view.getUint16(2);
  if (lengthBytes === 8) length = Number(view.getBigUint64(2));
  return { isFinal, opcode, headLength, length };
}

/** A text message or a control frame. */
interface Message {
  opcode: number;
  payload: Uint8Array;
}

/** Makes messages of the bytes that a client sends. */
class MessageReader {
  readonly #bytes = new ByteQueue();
  /** The fragments so far of a message that is not complete. */
  readonly #fragments = new ByteQueue();
  #inMessage = false;
  /** How many control frames and fragments there were since the last ping. */
  #otherFrames = 0;

  add(chunk: Uint8Array): void {
    this.#bytes.add(chunk);
  }

  pinged(): void {
    this.#otherFrames = 0;
  }

  /** Takes the next message or control frame.
   * @returns `null` if more bytes are needed
   * @throws {FrameError} if the client breaks a rule or a limit */
  next(): Message | null {
    for (;;) {
      const head = readFrameHead(this.#bytes.bytes);
      if (head === null) return null;
      const { opcode, isFinal } = head, isControl = opcode >= CLOSE;
      if (!isControl) this.#checkData(head);
      const payload = this.#takePayload(head);
      if (payload === null) return null;
      if (
        (isControl || !isFinal) && ++this.#otherFrames > MAX_OTHER_FRAMES
      ) throw new FrameError(POLICY, "Too many pings or fragments");
      if (isControl) return { opcode, payload };
      this.#fragments.add(payload);
      this.#inMessage = !isFinal;
      if (isFinal) return { opcode: TEXT, payload: this.#takeMessage() };
    }
  }

  #checkData({ opcode, length }: FrameHead): void {
    if (this.#inMessage !== (opcode === CONTINUATION)) {
      throw new FrameError(PROTOCOL_ERROR, NOT_A_FRAME);
    }
    if (opcode === BINARY) {
      throw new FrameError(UNSUPPORTED, "Send text messages, one line each");
    }
    if (this.#fragments.length + length >= MAX_PENDING_BYTES) {
      throw new FrameError(TOO_BIG, "A message is at most 64 KiB");
    }
  }

  #takePayload({ headLength, length }: FrameHead): Uint8Array | null {
    const end = headLength + length;
    if (this.#bytes.length < end) return null;
    const frame = this.#bytes.take(end);
    const payload = frame.subarray(headLength);
    const mask = frame.subarray(headLength - 4, headLength);
    for (let i = 0; i < length; i++) payload[i] ^= mask[i & 3];
    return payload;
  }

  #takeMessage(): Uint8Array {
    const message = this.#fragments.take(this.#fragments.length);
    if (isUtf8(message)) return message;
    throw new FrameError(NOT_UTF8, "A text message is UTF-8");
  }
}

class WebSocketConnection implements Connection {
  readonly #socket: Socket;
  readonly #isStopping: () => boolean;
  readonly #messages = new MessageReader();
  /** Lines that the chat server has not read yet. */
  readonly #pending = new ByteQueue();
  /** The chat server waits for input. */
  #pendingRead:
    | (PromiseWithResolvers<number | null> & { buffer: Uint8Array })
    | null = null;
  /** Nothing more comes from the client, or it is not read any more. */
  #inputEnded = false;
  #failure: Error | null = null;
  #isWriting = false;
  #hasWritten = false;
  /** The last message to the client ended within a line. */
  #isMidLine = false;
  #closeSent = false;
  #isClosed = false;
  /** Whether something has come since the last ping. */
  #isAlive = true;

  /**
   * @param socket a socket after the handshake
   * @param isStopping whether the server has begun to stop
   */
  constructor(socket: Socket, isStopping: () => boolean) {
    this.#socket = socket;
    this.#isStopping = isStopping;
    socket.on("data", (chunk: Uint8Array) => this.receive(chunk));
    socket.on("end", () => this.#endInput());
    socket.on("error", (error: Error) => this.#fail(error));
    socket.on("close", () => {
      this.#isClosed = true;
      this.#endInput();
    });
  }

  // -- reading

  read(buffer: Uint8Array): Promise<number | null> {
    if (this.#pending.length > 0) {
      return Promise.resolve(this.#readPending(buffer));
    }
    if (this.#failure !== null) return Promise.reject(this.#failure);
    if (this.#inputEnded) return Promise.resolve(null);
    this.#pendingRead = { buffer, ...Promise.withResolvers<number | null>() };
    return this.#pendingRead.promise;
  }

  #readPending(buffer: Uint8Array): number {
    const count = Math.min(this.#pending.length, buffer.length);
    buffer.set(this.#pending.take(count));
    return count;
  }

  #endInput(): void {
    this.#inputEnded = true;
    this.#pendingRead?.resolve(null);
    this.#pendingRead = null;
  }

  #fail(error: Error): void {
    this.#failure ??= error;
    this.#inputEnded = true;
    this.#pending.take(this.#pending.length);
    this.#pendingRead?.reject(this.#failure);
    this.#pendingRead = null;
  }

  /** Takes bytes from the socket. */
  receive(chunk: Uint8Array): void {
    this.#isAlive = true;
    if (this.#inputEnded) return;
    this.#messages.add(chunk);
    try {
      while (!this.#inputEnded) {
        const message = this.#messages.next();
        if (message === null) return;
        this.#receiveMessage(message);
      }
    } catch (error) {
      if (!(error instanceof FrameError)) throw error;
      this.#refuse(error.code, error.message);
    }
  }

  #receiveMessage({ opcode, payload }: Message): void {
    if (opcode === TEXT) this.#receiveLine(payload);
    // Our own close frame is sent when the chat server has written its last line.
    else if (opcode === CLOSE) this.#endInput();
    // It is enough to answer the last ping (RFC 6455, 5.5.3): a client that does
    // not read its pongs gets no more of them.
    else if (opcode === PING && this.#socket.writableLength === 0) {
      this.#socket.write(makeFrame(PONG, payload));
    }
  }

  #receiveLine(line: Uint8Array): void {
    if (this.#pending.length + line.length >= MAX_PENDING_BYTES) {
      throw new FrameError(POLICY, "Too much at once: send more slowly");
    }
    this.#pending.add(line);
    this.#pending.add(LINE_END);
    if (this.#pendingRead === null) return;
    const { buffer, resolve } = this.#pendingRead;
    this.#pendingRead = null;
    resolve(this.#readPending(buffer));
  }

  /** Closes the connection because of what the client did. */
  #refuse(code: number, reason: string): void {
    this.#sendClose(code, reason);
    this.#fail(new Error(reason));
    this.#finish();
  }

  // -- writing

  /** Resolves when the system has taken the bytes. That is the backpressure: the
   * chat server writes to a client only after its last write, and at most one
   * segment of the log. */
  write(bytes: Uint8Array): Promise<number> {
    if (this.#closeSent || this.#isClosed) {
      return Promise.reject(this.#failure ?? new Error("It is closed"));
    }
    // A message is whole lines: bytes that end within a line are a fragment.
    const isFinal = bytes.at(-1) === LF;
    const opcode = this.#isMidLine ? CONTINUATION : BINARY;
    this.#isMidLine = !isFinal;
    const frame = makeSharedFrame(opcode, bytes, isFinal);
    this.#hasWritten = this.#isWriting = true;
    return new Promise((resolve, reject) => {
      this.#socket.write(frame, (error) => {
        this.#isWriting = false;
        if (error) reject(error);
        else resolve(bytes.length);
      });
    });
  }

  /** Sends a ping, or disconnects a client that has not answered the last one. */
  ping(): void {
    this.#messages.pinged();
    if (this.#closeSent || this.#isClosed) return;
    if (!this.#isAlive) {
      this.#fail(new Error("It does not answer"));
      this.#socket.destroy();
      return;
    }
    this.#isAlive = false;
    this.#socket.write(makeFrame(PING, NO_BYTES));
  }

  // -- closing

  /** Sends the close frame, and resolves when the system has taken it. */
  closeWrite(): Promise<void> {
    return new Promise((resolve, reject) => {
      const written = (error?: Error | null) =>
        error ? reject(error) : resolve();
      if (this.#closeSent || this.#isClosed) written(this.#failure);
      else if (this.#isStopping()) {
        this.#sendClose(GOING_AWAY, SERVER_STOPS, written);
      } else this.#sendClose(NORMAL, "", written);
    });
  }

  close(): void {
    // A client that has not taken the last write would not take a close frame.
    if (this.#isWriting) {
      this.#socket.destroy();
      return;
    }
    if (this.#isStopping()) this.#sendClose(GOING_AWAY, SERVER_STOPS);
    else if (this.#hasWritten) this.#sendClose(NORMAL, "");
    else this.#sendClose(POLICY, "You cannot join from this address");
    this.#finish();
  }

  /** Closes the connection because the web server is closed. */
  goAway(): void {
    if (!this.#isClosed) this.#refuse(GOING_AWAY, SERVER_STOPS);
  }

  #sendClose(
    code: number,
    reason: string,
    written?: (error?: Error | null) => void,
  ): void {
    if (this.#closeSent || this.#isClosed) return;
    this.#closeSent = true;
    this.#socket.write(closeFrame(code, reason), written);
  }

  #finish(): void {
    if (this.#isClosed) return;
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
  /** Connections without a WebSocket, by {@linkcode remoteEnd}. */
  readonly #requests = new Set<string>();
  readonly #pingTimer: ReturnType<typeof setInterval>;
  readonly #closed = Promise.withResolvers<void>();
  #stopping = false;

  private constructor(
    chat: ChatServer,
    http: ReturnType<typeof createHttpServer>,
    proxies: TrustedProxies,
    options: WebOptions,
  ) {
    this.#chat = chat;
    this.#http = http;
    const { host, tlsCert, pingMilliseconds } = options;
    const { rate = 20, raw = false, password = false } = options;
    this.#page = new Page(rate, raw, password);
    this.#proxies = proxies;
    this.port = (http.address() as { port: number }).port;
    const anywhere = host === "0.0.0.0" || host === "::";
    const name = anywhere ? "localhost" : urlHost(host);
    const scheme = tlsCert ? "https" : "http";
    this.url = new URL(`${scheme}://${name}:${this.port}`).origin;

    this.#handleRequests();
    this.#pingTimer = setInterval(
      () => this.#connections.forEach((it) => it.ping()),
      pingMilliseconds ?? PING_MILLISECONDS,
    );
    Deno.unrefTimer(Number(this.#pingTimer));
    // The chat server sends its clients the last line, and closes their
    // connections itself.
    chat.stopping.addEventListener("abort", () => this.#stopListening());
    if (chat.stopping.aborted) this.#stopListening();
  }

  #handleRequests(): void {
    const http = this.#http;
    http.on("connection", (socket: Socket) => this.#limitRequests(socket));
    http.on("request", (request, response) => {
      request.on("error", () => {}); // the connection failed, and is closed
      respond(request, response, answerOf(this.#page, request));
    });
    http.on("upgrade", (request, socket, head) => {
      this.#upgrade(request, socket as Socket, head);
    });
    http.on("clientError", (_error, socket) => socket.destroy());
    http.on("close", () => this.#closed.resolve());
    // Out of descriptors, for example. The listener itself is still good.
    http.on("error", () => {});
  }

  /**
   * Opens the web listener of a room. It closes when the room does.
   *
   * @param chat the chat server that clients join
   * @throws {Error} if it cannot listen on the address and port, or an option
   * cannot be used; the message says why, and what to do
   */
  static async listen(
    chat: ChatServer,
    options: WebOptions,
  ): Promise<WebServer> {
    const { host, port, tlsCert, tlsKey, trustProxy = [] } = options;
    const { requestMilliseconds = REQUEST_MILLISECONDS } = options;
    const proxies = new TrustedProxies(trustProxy); // throws before it listens
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
      http.once("error", (cause: NodeJS.ErrnoException) => {
        const why = listenProblem(cause);
        const message = `Cannot listen on ${urlHost(host)}:${port}: ${why}`;
        reject(new Error(message, { cause }));
      });
      http.listen(port, host, resolve);
    });
    return new WebServer(chat, http, proxies, options);
  }

  #limitRequests(socket: Socket): void {
    if (this.#requests.size >= MAX_REQUESTS) {
      socket.destroy();
      return;
    }
    const key = remoteEnd(socket);
    this.#requests.add(key);
    socket.on("close", () => this.#requests.delete(key));
  }

  #upgrade(request: IncomingMessage, socket: Socket, head: Uint8Array): void {
    socket.on("error", () => {});
    const isWebSocket = pathOf(request) === "/chat" &&
      request.method === "GET" &&
      request.headers.upgrade?.toLowerCase() === "websocket";
    // Any other upgrade, such as to HTTP/2, may be ignored: the client takes the
    // answer to the plain request too.
    const refusal = isWebSocket
      ? upgradeRefusal(request)
      : answerOf(this.#page, request);
    if (refusal !== null) return refuseUpgrade(request, socket, refusal);
    const key = request.headers["sec-websocket-key"]!;
    socket.setNoDelay(true); // a line does not wait for the next one
    socket.setTimeout(0);
    socket.write(
      "HTTP/1.1 101 Switching Protocols\r\n" +
        "Upgrade: websocket\r\nConnection: Upgrade\r\n" +
        `Sec-WebSocket-Accept: ${acceptKey(key)}\r\n\r\n`,
    );
    this.#requests.delete(remoteEnd(socket));
    this.#admit(request, socket, head);
  }

  #admit(request: IncomingMessage, socket: Socket, head: Uint8Array): void {
    const connection = new WebSocketConnection(socket, () => this.#stopping);
    this.#connections.add(connection);
    socket.on("close", () => this.#connections.delete(connection));
    const { remoteAddress = "", remotePort = 0 } = socket;
    this.#chat.admit(connection, {
      hostname: this.#proxies.clientAddress(remoteAddress, request),
      port: remotePort,
    });
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

  /** Closes the web server at the end of an `await using` block. */
  [Symbol.asyncDispose](): Promise<void> {
    return this.close();
  }
}

/** Identifies a connection: a socket and the TLS socket on it have the same. */
function remoteEnd({ remoteAddress, remotePort }: Socket): string {
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
      return "ports below 1024 are for administrators (choose a port above 1023)";
    default:
      return error.message.replace(/[\p{C}\p{Z}]+/gu, " ");
  }
}
