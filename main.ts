/**
 * Parley: a chat room for netcat, in one file.
 *
 * Open the room, and join it from any terminal:
 *
 * ```sh
 * deno run --allow-net main.ts
 * nc localhost 8008
 * ```
 *
 * `deno run main.ts --help` lists the options. In the room, `/help` lists the
 * commands.
 *
 * As a library, a room is a {@linkcode ChatServer}:
 *
 * ```ts
 * import { ChatServer } from "./main.ts";
 *
 * await using server = ChatServer.listen({ host: "127.0.0.1", port: 0 });
 * console.log("Listening on", server.addr.port);
 * ```
 *
 * The room is one append-only log of encoded lines, and every client is a
 * cursor into it. Saying something costs the same however many people listen,
 * a slow client holds up nobody, and the log has one bound for all.
 *
 * The parts, top to bottom, each using only what stands above it: options,
 * text, room, client, commands, gate, TLS, transcript, console, server, main.
 *
 * @module
 */
import { parseArgs as parseArgsUntyped } from "@std/cli/parse-args";
import { closestString as closestStringUntyped } from "@std/text/closest-string";
import config from "./deno.json" with { type: "json" };

// The npm build of @std has no types: these are the ones used here.
const parseArgs: (args: string[], options: {
  string: string[];
  collect: string[];
  alias: Record<string, string>;
  unknown: (arg: string) => boolean;
}) => Record<string, string | string[] | undefined> = parseArgsUntyped;
const closestString: (word: string, possible: string[]) => string =
  closestStringUntyped;

// ---------------------------------------------------------------------------
// Options: what can be set, from the command line and by an embedding program,
// and how addresses are written.
// ---------------------------------------------------------------------------

/** What can be set of a room. The command line's options have the same names. */
export interface Options {
  /** Address or host name to listen on; `::` is IPv4 and IPv6. */
  host: string;
  /** TCP port to listen on; 0 picks a free one. */
  port: number;
  /** Relay lines as they are: no names, notices, commands or history. */
  raw: boolean;
  /** Ask each newcomer for a name before anything else. */
  askName: boolean;
  /** Put the time of day, `12:34 `, before each line said. */
  timestamps: boolean;
  /** How many of the last lines said a newcomer is shown. */
  history: number;
  /** Lines a second that each client may send; 0 is no limit. */
  rate: number;
  /** How many clients may be connected; one more is told that it is full. */
  maxClients: number;
  /** The same for one address; 0 is no limit. */
  maxPerAddress: number;
  /** Admit only these networks and addresses, such as `192.168.0.0/16`. */
  allow: string[];
  /** The file that holds the password, which is asked for first; or none. */
  passwordFile: string;
  /** The file of the certificate chain for TLS (PEM); with `tlsKey`, or none. */
  tlsCert: string;
  /** The file of its private key (PEM). */
  tlsKey: string;
  /** The file that what is said is appended to, and the history read from. */
  log: string;
  /** Do not report comings and goings. */
  quiet: boolean;
}

/** What the command line asks for, as {@linkcode parseOptions} reads it. */
export interface CommandLine {
  /** The options that were given; what was not given is absent. */
  options: Partial<Options>;
  /** Give standard input the operator's seat. */
  console: boolean;
  /** Print the help and leave. */
  help: boolean;
  /** Print the version and leave. */
  version: boolean;
}

/** Options that cannot be used; the message says what to do. */
export class UsageError extends Error {
  /** What kind of error it is. */
  override name = "UsageError";

  /**
   * Brings `message` to one line, whatever was typed into it.
   *
   * @param message what is wrong, and what to do
   */
  constructor(message: string) {
    super(singleLine(message));
  }
}

/** A room that cannot be opened; the message says why, and what to do. */
export class OpenError extends Error {
  /** What kind of error it is. */
  override name = "OpenError";

  /**
   * Brings `message` to one line, whatever the names of files in it.
   *
   * @param message what cannot be opened, why, and what to do
   * @param options what caused it
   */
  constructor(message: string, options?: ErrorOptions) {
    super(singleLine(message), options);
  }
}

/** A text without line ends and what else a terminal does not show as it is. */
function singleLine(text: string): string {
  return text.replace(/[\p{C}\p{Z}]+/gu, " ");
}

/** What an error says, in one line. */
function reason(error: unknown): string {
  return singleLine(error instanceof Error ? error.message : String(error));
}

// ---------------------------------------------------------------------------
// Text: what bytes become lines, what of a line may pass, what is a name.
// ---------------------------------------------------------------------------

/** The longest line, in bytes; a longer one is passed on in pieces of this. */
const LINE_BYTES = 4_096;

const NUL = 0, TAB = 9, LF = 10, CR = 13, SPACE = 32, SLASH = 47, TILDE = 126;

// The commands of the telnet protocol (RFC 854) that are longer than two bytes.
const SE = 240, SB = 250, WILL = 251, WONT = 252, DO = 253, DONT = 254;
const IAC = 255;

/** The most that one read's worth of telnet options is answered with. */
const MOST_REPLY_BYTES = 192;

/** Where in a telnet command the stream stands. */
const enum Telnet {
  Text,
  Command,
  Option,
  Subnegotiation,
  SubnegotiationCommand,
}

type Timer = ReturnType<typeof setTimeout>;

const NO_BYTES = new Uint8Array(0), LINE_END = Uint8Array.of(LF);
const encoder = new TextEncoder();
// A mark of byte order is dropped when a line is cleaned: if the decoder did it,
// only a chunk's first line would lose it.
const decoder = new TextDecoder("utf-8", { ignoreBOM: true });

// Escape sequences after ECMA-48: control sequences (5.4), control strings
// (5.6: titles, links, device control), and the others (ECMA-35, 13.2).
// node:util's stripVTControlCharacters leaves half of a title behind, takes
// letters of the text for the end of a sequence, and costs 10 ms at start-up.
// Every alternative is linear: none can begin inside what another has read.
const ESCAPES =
  // deno-lint-ignore no-control-regex
  /(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]|(?:\x1b[\]PX^_]|[\x90\x98\x9d-\x9f])[^\x07\x1b\x80-\x9f]*(?:\x07|\x1b\\|\x9c)|\x1b[ -/]*[0-~]/g;

// Control characters but TAB, DEL, C1, line and paragraph separators, and what
// turns the direction of text around (Unicode UAX #9: embeddings, overrides and
// isolates). Also the mark of byte order, which would hide a command's slash.
const CONTROLS =
  // deno-lint-ignore no-control-regex
  /[\x00-\x08\n-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ufeff]/g;

// Whether lines need cleaning at all: the same but LF, what was no UTF-8, or a
// line that is empty.
const SUSPECT =
  // deno-lint-ignore no-control-regex
  /[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ufeff\ufffd]|^\n|\n\n/;

/**
 * Takes out of a line what could disturb a terminal or pass for another line:
 * escape sequences (ECMA-48) whole, then every control character but TAB, C1,
 * DEL, line and paragraph separators, and bidirectional controls.
 *
 * @param line one line of text, without its end
 * @returns the line as the room may hear it; it can be empty
 *
 * @example
 * ```ts
 * import { assertEquals } from "@std/assert";
 * import { cleanLine } from "./main.ts";
 *
 * assertEquals(cleanLine("\x1b]0;a title\x07\x1b[31mred\x07"), "red");
 * ```
 */
export function cleanLine(line: string): string {
  return line.replace(ESCAPES, "").replace(CONTROLS, "");
}

// "Letters and digits of any script" with the marks that many scripts write
// vowels with, but nothing that does not show (which would let two people look
// the same), such as the Hangul filler, a letter by its class.
const NAME =
  /^[[\p{L}\p{Nd}_\-]--\p{DI}][[\p{L}\p{M}\p{Nd}_\-]--\p{DI}]{0,23}$/v;

/** Names that would make what their owner says look like the server's words. */
const HOST = "host", RESERVED_NAMES = new Set([HOST, "you", "server"]);

/** What looks like a letter of those names: Cyrillic, Greek, Armenian, small
 * capitals, digits. */
const LOOKALIKES = new Map(
  Object.entries({
    e: "еᴇє3",
    h: "һнʜհηħ",
    o: "оοօᴏ0",
    r: "гʀ",
    s: "ѕꜱ5",
    t: "тτᴛ",
    u: "υսᴜ",
    v: "ѵνᴠ",
    y: "уүʏγ",
  }).flatMap(([letter, likes]) =>
    Array.from(likes, (like) => [like, letter] as const)
  ),
);

const NAME_RULE = "A name is 1 to 24 letters, digits, _ or -.";

/**
 * Brings a name to the form in which the room shows it (Unicode NFKC).
 *
 * @param name what a person typed
 * @returns the name, or `null` if it is none: 1 to 24 letters, digits, `_` or
 * `-` of any script
 *
 * @example
 * ```ts
 * import { assertEquals } from "@std/assert";
 * import { normalizeName } from "./main.ts";
 *
 * assertEquals(normalizeName("ａｌｉｃｅ"), "alice");
 * assertEquals(normalizeName("no spaces"), null);
 * ```
 */
export function normalizeName(name: string): string | null {
  const normal = name.trim().normalize("NFKC");
  return NAME.test(normal) ? normal : null;
}

/** What two names share if they differ in case alone. Neither case is enough: ẞ
 * and ß meet in lower case, ς and σ, or ı and i, in upper case. */
function nameKey(name: string): string {
  return /^[\w-]*$/.test(name)
    ? name.toLowerCase()
    : name.normalize("NFKC").toLowerCase().toUpperCase().toLowerCase()
      .normalize("NFKC");
}

/** Whether a name is reserved, or could be taken for one that is. */
function isReserved(name: string): boolean {
  const plain = nameKey(name).normalize("NFD").replace(/\p{M}/gu, "");
  // The Greek upsilon is like a y in capitals.
  return [plain, plain.replace(/^υ/, "y")].some((it) =>
    RESERVED_NAMES.has(
      Array.from(it, (letter) => LOOKALIKES.get(letter) ?? letter).join(""),
    )
  );
}

function concatenate(parts: Uint8Array[]): Uint8Array<ArrayBuffer> {
  const whole = new Uint8Array(
    parts.reduce((length, part) => length + part.length, 0),
  );
  let offset = 0;
  for (const part of parts) {
    whole.set(part, offset);
    offset += part.length;
  }
  return whole;
}

/** Writes all of `bytes`, of which a write may take only some. */
async function writeAll(
  to: { write(bytes: Uint8Array): Promise<number> },
  bytes: Uint8Array,
): Promise<void> {
  while (bytes.length) bytes = bytes.subarray(await to.write(bytes));
}

function delay(milliseconds: number): Promise<void> {
  return new Promise((resolve) => setTimeout(resolve, milliseconds));
}

/**
 * Makes lines of one client's bytes, the same ones however the stream is cut
 * into reads. It holds back less than {@linkcode LINE_BYTES} + one read.
 *
 * A stream of `TextDecoderStream` and `TextLineStream` would read better, but it
 * costs 84 KB a client (this: 8) and holds a line of any length in memory.
 */
class LineSplitter {
  /** The answer that the telnet client of the last chunk is owed, if any. */
  reply: Uint8Array | null = null;
  #partial: Uint8Array = NO_BYTES;
  #telnet = Telnet.Text;
  #verb = 0;

  /** The lines that `chunk` completes, cleaned and with their ends, without the
   * empty ones. They may lie in `chunk`: use them before it is overwritten. */
  push(chunk: Uint8Array): Uint8Array {
    // What most people type passes through as the bytes it came in: decoded and
    // encoded again, a line between two people took 3 % more time.
    const plain = this.#telnet === Telnet.Text && isPlain(chunk);
    let bytes = plain ? chunk : this.#withoutTelnet(chunk);
    if (this.#partial.length) bytes = concatenate([this.#partial, bytes]);
    if (bytes.length > LINE_BYTES) bytes = breakLongLines(bytes);
    const end = bytes.lastIndexOf(LF) + 1;
    this.#partial = end === bytes.length ? NO_BYTES : bytes.slice(end);
    const lines = bytes.subarray(0, end);
    return plain && bytes === chunk ? lines : cleanLines(lines);
  }

  /** The last words of a stream that ended without a newline. */
  end(): Uint8Array {
    const line = this.#partial;
    this.#partial = NO_BYTES;
    return line.length ? cleanLines(concatenate([line, LINE_END])) : NO_BYTES;
  }

  /**
   * Takes the telnet protocol out of a chunk: commands, negotiation, and
   * CR NUL, which ends a line like CR LF (RFC 854, page 11).
   *
   * Every option is refused, as RFC 854 asks of who does not know it. A telnet
   * whose user pressed Ctrl-C shows nothing more before that answer comes
   * (RFC 860, TIMING-MARK).
   */
  #withoutTelnet(chunk: Uint8Array): Uint8Array {
    if (
      this.#telnet === Telnet.Text && !chunk.includes(IAC) &&
      !chunk.includes(NUL)
    ) return chunk;
    const text = new Uint8Array(chunk.length), reply: number[] = [];
    let length = 0, before = this.#partial.at(-1);
    for (const byte of chunk) {
      switch (this.#telnet) {
        case Telnet.Text:
          if (byte === IAC) this.#telnet = Telnet.Command;
          else {
            text[length++] = before === CR && byte === NUL ? LF : byte;
            before = byte;
          }
          break;
        case Telnet.Command:
          if (byte === IAC) { // an escaped byte 255, no UTF-8
            before = text[length++] = IAC;
            this.#telnet = Telnet.Text;
          } else if (byte >= WILL) {
            this.#verb = byte;
            this.#telnet = Telnet.Option;
          } else if (byte === SB) this.#telnet = Telnet.Subnegotiation;
          else this.#telnet = Telnet.Text;
          break;
        case Telnet.Option:
          if (this.#verb === DO) reply.push(IAC, WONT, byte);
          if (this.#verb === WILL) reply.push(IAC, DONT, byte);
          this.#telnet = Telnet.Text;
          break;
        case Telnet.Subnegotiation:
          if (byte === IAC) this.#telnet = Telnet.SubnegotiationCommand;
          break;
        case Telnet.SubnegotiationCommand:
          this.#telnet = byte === SE ? Telnet.Text : Telnet.Subnegotiation;
      }
    }
    if (reply.length) {
      this.reply = new Uint8Array(reply.slice(0, MOST_REPLY_BYTES));
    }
    return text.subarray(0, length);
  }
}

/** Ends a line wherever one would grow longer than {@linkcode LINE_BYTES}. */
function breakLongLines(bytes: Uint8Array): Uint8Array {
  const pieces: Uint8Array[] = [];
  let from = 0, line = 0;
  while (line <= bytes.length) {
    const found = bytes.indexOf(LF, line);
    const stop = found < 0 ? bytes.length : found;
    while (stop - line > LINE_BYTES) {
      line = characterStart(bytes, line + LINE_BYTES);
      pieces.push(bytes.subarray(from, line), LINE_END);
      from = line;
    }
    line = stop + 1;
  }
  return pieces.length ? concatenate([...pieces, bytes.subarray(from)]) : bytes;
}

/** Where the character that holds the byte at `offset` begins (RFC 3629). */
function characterStart(bytes: Uint8Array, offset: number): number {
  for (let start = offset; start > offset - 4; start--) {
    if ((bytes[start] & 0xc0) === 0x80) continue;
    const length = bytes[start] >= 0xf0
      ? 4
      : bytes[start] >= 0xe0
      ? 3
      : bytes[start] >= 0xc0
      ? 2
      : 1;
    return start + length > offset ? start : offset;
  }
  return offset; // no UTF-8: any place will do
}

/** Whether there is nothing in a chunk to be cleaned: it is of printable ASCII
 * and TAB, in lines of which none is empty. */
function isPlain(chunk: Uint8Array): boolean {
  let before = LF;
  for (let i = 0; i < chunk.length; i++) { // `for of` takes 4.5 times as long
    const byte = chunk[i], printable = byte >= SPACE && byte <= TILDE;
    if (!printable && byte !== TAB && (byte !== LF || before === LF)) {
      return false;
    }
    before = byte;
  }
  return true;
}

/** Whole lines as the room may hear them, with their ends. */
function cleanLines(lines: Uint8Array): Uint8Array {
  const text = decoder.decode(lines);
  if (!SUSPECT.test(text)) return lines;
  return encoder.encode(
    splitLines(text).map((line) => line + "\n").join(""),
  );
}

/** The lines of a text, cleaned, without the empty ones. */
function splitLines(text: string): string[] {
  return text.split("\n").map(cleanLine).filter(Boolean);
}

/** What is typed elsewhere, as the lines that a client's would have become. */
function linesOf(text: string): string[] {
  return splitLines(decoder.decode(breakLongLines(encoder.encode(text))));
}

// ---------------------------------------------------------------------------
// Room: one append-only log of encoded lines, and the readers that follow it.
//
//  client ─lines→ Room.say() → [ … | segment | segment | segment ]  window, 4 MiB
//                                     ▲                       ▲
//                           slow reader's cursor     everyone else's
//
// Appending a line costs the same however many readers there are. One flush at
// the end of the event-loop turn starts a write for each reader that is not
// already writing; the others look again when their write ends.
// ---------------------------------------------------------------------------

/** The size of a segment of the log, in bytes. Its bytes are written once and
 * never change, so a write in flight can refer to them. */
const SEGMENT_BYTES = 65_536;

/** How many segments are kept (4 MiB). A reader whose cursor is in an older one
 * is too slow. This is the bound on memory however many readers there are. */
const WINDOW_SEGMENTS = 64;

/** The most bytes that one write copies together, when what a reader receives is
 * in several pieces. */
const COPIED_BYTES = 16_384;

/** The most lines that are appended at once, and about the most bytes of them,
 * so that they fit into a segment with a name before each line. */
const APPENDED_LINES = 256, APPENDED_BYTES = 8_192;

/** The bounds on what waits for one reader outside the log: detours, and bytes
 * inserted by them. A reader beyond either is too slow. */
const MOST_DETOURS = 4_096, MOST_INSERTED_BYTES = 65_536;

/** How many bytes may be appended in a turn before input waits for the next one:
 * each reader that keeps up writes at least a segment a turn. */
const TURN_BYTES = SEGMENT_BYTES;

/** In a room of up to this many readers a flush starts at a random one. Of more
 * writes the runtime postpones those past the first 128 (tokio's budget), in an
 * order of its own: with ten people who talk as fast as they receive, a thousand
 * readers get 1.6 times as many lines if the order stays the same. */
const RANDOM_START_READERS = 256;

/** A room of more people than this gathers join and leave notices. */
const CROWD = 50;

/** How many names a list of who is here gives before it only counts. */
const LISTED_NAMES = 20;

/** The reason why a slow reader is disconnected. */
const TOO_SLOW = "too slow";

/** A stretch of the log, written once. */
class Segment {
  next: Segment | null = null;
  readonly bytes = new Uint8Array(SEGMENT_BYTES);
  /** Where it ends in the log, in bytes. */
  end: number;
  #shared: Uint8Array = NO_BYTES;
  #sharedFrom = -1;

  /** @param start where it begins in the log, in bytes */
  constructor(readonly start: number) {
    this.end = start;
  }

  /**
   * Appends `text`, and if there are `lines`, each of them with `text` before it.
   *
   * @returns whether it fitted; if not, nothing has changed
   */
  append(text: string, lines: Uint8Array): boolean {
    const { bytes } = this, start = this.end - this.start;
    const { read, written } = encoder.encodeInto(text, bytes.subarray(start));
    const textEnd = start + written;
    let end = textEnd;
    // Byte by byte: most lines are too short for a copy by `set` to be faster.
    for (let at = 0; at < lines.length;) {
      if (at > 0) {
        for (let i = start; i < textEnd; i++) bytes[end++] = bytes[i];
      }
      let byte;
      do bytes[end++] = byte = lines[at++]; while (
        byte !== LF && at < lines.length
      );
    }
    if (read < text.length || end > SEGMENT_BYTES) return false;
    this.end = this.start + end;
    return true;
  }

  /** The bytes between two places of the log that are in this segment. */
  between(from: number, to: number): Uint8Array {
    return this.bytes.subarray(from - this.start, to - this.start);
  }

  /** The bytes from a place of the log on: the same view for all readers there. */
  rest(from: number): Uint8Array {
    const length = this.end - from;
    if (this.#sharedFrom !== from || this.#shared.length !== length) {
      this.#sharedFrom = from;
      this.#shared = this.between(from, this.end);
    }
    return this.#shared;
  }
}

/** The lines of the room, of which a window is kept. */
class Log {
  #head = new Segment(0);
  #segments = 1;
  tail = this.#head;

  /** Where the next line will begin, in bytes since the room was opened. */
  get end(): number {
    return this.tail.end;
  }

  /** Where the window begins. */
  get start(): number {
    return this.#head.start;
  }

  /** Appends lines as {@linkcode Segment.append} does; tells whether the window
   * has moved. */
  append(text: string, lines: Uint8Array): boolean {
    if (this.tail.append(text, lines)) return false;
    this.tail = this.tail.next = new Segment(this.end);
    this.tail.append(text, lines);
    if (this.#segments < WINDOW_SEGMENTS) {
      this.#segments++;
      return false;
    }
    this.#head = this.#head.next!;
    return true;
  }
}

/** A place where one reader leaves the log: it receives `inserted`, and goes on
 * behind the bytes that it skips. */
interface Detour {
  at: number;
  skipTo: number;
  inserted: Uint8Array;
  /** How many bytes of `inserted` only this reader refers to. */
  cost: number;
}

const NO_DETOURS: Detour[] = [];

/** What a reader writes to. */
interface Sink {
  /** Writes some of `bytes`; resolves to how many. */
  write(bytes: Uint8Array): Promise<number>;
  /** Everything up to the reader's end is written. */
  drained(): void;
  /** A write failed; there will be no other. */
  writeFailed(): void;
  /** The reader is too far behind. */
  tooSlow(): void;
  /** The reader is to end at the present end of the log. */
  leave(reason: string): void;
}

/**
 * A cursor into the log, and a write loop.
 *
 * What only this reader receives, or does not receive, is a {@linkcode Detour}.
 * Nearly all readers have none, and those at the same place write the same bytes.
 */
class Reader {
  #segment: Segment | null = null;
  #cursor = 0;
  /** Where it ends: nothing after this is written. */
  #end = Infinity;
  #detours: Detour[] = NO_DETOURS;
  /** What its detours cost, in bytes. */
  #waiting = 0;
  /** What is being written, or is left of it. */
  #batch: Uint8Array | null = null;
  #writing = false;

  constructor(readonly log: Log, readonly sink: Sink) {}

  /** Follows the log from its present end on. */
  follow(): void {
    this.#segment = this.log.tail;
    this.#cursor = this.log.end;
  }

  /** Sends bytes to this reader alone, in their place among what it reads.
   *
   * @param cost how many of them nobody else refers to: their number is bounded
   */
  insert(inserted: Uint8Array, cost: number = inserted.length): void {
    if (this.#end !== Infinity) return; // the last bytes may be on their way
    const at = this.#segment === null ? 0 : this.log.end;
    this.#detour({ at, skipTo: at, inserted, cost });
  }

  /** Leaves out the bytes from `from` to the end of the log. */
  skip(from: number): void {
    if (this.#segment === null) return;
    const skipTo = this.log.end, last = this.#detours.at(-1);
    if (last?.skipTo === from) last.skipTo = skipTo;
    else if (last === undefined && this.#cursor === from) this.#cursor = skipTo;
    else this.#detour({ at: from, skipTo, inserted: NO_BYTES, cost: 0 });
  }

  #detour(detour: Detour): void {
    const { length } = this.#detours;
    if (length === MOST_DETOURS || this.#waiting > MOST_INSERTED_BYTES) {
      return this.sink.tooSlow();
    }
    if (length === 0) this.#detours = [detour];
    else this.#detours.push(detour);
    this.#waiting += detour.cost;
  }

  /** Ends at the present end of the log, and calls {@linkcode Sink.drained} when
   * all before it is written. */
  end(): void {
    this.#end = this.log.end;
    this.flush();
  }

  /** Writes nothing more. A write in flight is the last. */
  stop(): void {
    this.#segment = this.#batch = null;
    this.#detours = NO_DETOURS;
    this.#end = 0;
    this.#writing = true;
  }

  /** Whether it receives the log, rather than only what is inserted. */
  get isFollowing(): boolean {
    return this.#segment !== null;
  }

  /** Whether its cursor is before the window. */
  get isBehind(): boolean {
    return this.#segment !== null && this.#cursor < this.log.start;
  }

  /** Starts to write what it has not written, unless it is writing. */
  flush(): void {
    if (this.#writing) return;
    this.#batch ??= this.#next();
    if (this.#batch === null) {
      if (this.#end === Infinity) return;
      this.stop();
      return this.sink.drained();
    }
    this.#writing = true;
    try {
      // Not an async function: its promises cost a tenth of a delivery.
      this.sink.write(this.#batch).then(this.#written, this.#failed);
    } catch {
      this.#failed();
    }
  }

  #written = (count: number): void => {
    if (this.#batch === null) return; // stopped meanwhile
    this.#writing = false;
    this.#batch = count < this.#batch.length
      ? this.#batch.subarray(count)
      : null;
    this.flush();
  };

  #failed = (): void => {
    this.stop();
    this.sink.writeFailed();
  };

  /** The bytes from the cursor on, or `null` if there are none. The cursor moves
   * behind them. */
  #next(): Uint8Array | null {
    if (this.#detours.length === 0) return this.#stretch(Infinity);
    const parts: Uint8Array[] = [], detours = this.#detours;
    let length = 0, passed = 0;
    while (length < COPIED_BYTES) {
      const detour = passed < detours.length ? detours[passed] : null;
      const most = parts.length > 0 ? COPIED_BYTES - length : Infinity;
      const bytes = this.#stretch(detour?.at ?? Infinity, most);
      if (bytes !== null) {
        parts.push(bytes);
        length += bytes.length;
      }
      // Without detours, what a reader receives is one stretch of the log.
      if (detour === null || this.#cursor < detour.at) break;
      passed++;
      this.#cursor = Math.max(this.#cursor, detour.skipTo);
      if (detour.inserted.length > 0) {
        parts.push(detour.inserted);
        length += detour.inserted.length;
        this.#waiting -= detour.cost;
      }
    }
    if (passed > 0) {
      this.#detours = passed < detours.length
        ? detours.slice(passed)
        : NO_DETOURS;
    }
    return parts.length > 1 ? concatenate(parts) : parts[0] ?? null;
  }

  /** The bytes from the cursor to `to`, as far as they lie in one segment. */
  #stretch(to: number, most = Infinity): Uint8Array | null {
    if (this.#segment === null) return null;
    while (this.#cursor >= this.#segment.end && this.#segment.next !== null) {
      this.#segment = this.#segment.next;
    }
    const segment = this.#segment, from = this.#cursor;
    const end = Math.min(to, segment.end, this.#end, from + most);
    if (end <= from) return null;
    this.#cursor = end;
    return end === segment.end
      ? segment.rest(from)
      : segment.between(from, end);
  }
}

/** Somebody in the room: what others see of them, and whom they ignore. */
abstract class Person {
  /** Empty until a name is given. */
  name = "";
  /** Those whose messages this person does not receive. */
  ignored: Set<Person> | null = null;
  /** Those who do not receive this person's messages. */
  ignoredBy: Set<Person> | null = null;
  /** Who sent the last private message to this person. */
  replyTo: Person | null = null;

  /** What this person receives the room by; none if they are elsewhere. */
  abstract readonly reader: Reader | null;

  constructor(readonly room: Room) {}

  /** Shows this person lines that nobody else receives. */
  tell(text: string): void {
    this.reader?.insert(encoder.encode(text));
    this.reader?.flush();
  }

  ignore(other: Person): void {
    if (this.replyTo === other) this.replyTo = null;
    (this.ignored ??= new Set()).add(other);
    (other.ignoredBy ??= new Set()).add(this);
  }

  /** Tells whether `other` was ignored. */
  stopIgnoring(other: Person): boolean {
    other.ignoredBy?.delete(this);
    return this.ignored?.delete(other) ?? false;
  }
}

/** The most bytes of history that are kept, however many lines are asked for. */
const HISTORY_BYTES = 1_048_576;

/** The last public lines, for newcomers: blocks of bytes that are written once,
 * so that all newcomers share them. */
class History {
  #blocks: { bytes: Uint8Array; used: number; lines: number }[] = [];
  #lines = 0;
  #bytes = 0;

  /** @param most how many lines it keeps */
  constructor(readonly most: number) {}

  /** Adds whole lines with their ends. */
  add(bytes: Uint8Array): void {
    let block = this.#blocks.at(-1);
    if (!block || block.used + bytes.length > block.bytes.length) {
      const size = Math.max(bytes.length, COPIED_BYTES);
      block = { bytes: new Uint8Array(size), used: 0, lines: 0 };
      this.#blocks.push(block);
    }
    block.bytes.set(bytes, block.used);
    block.used += bytes.length;
    this.#bytes += bytes.length;
    for (let end = 0; (end = bytes.indexOf(LF, end) + 1) > 0;) {
      block.lines++;
      this.#lines++;
    }
    this.#forget();
  }

  /** Drops the oldest blocks that are not needed. */
  #forget(): void {
    for (;;) {
      const [{ used, lines }] = this.#blocks;
      const enough = this.#lines - lines >= this.most;
      if (!enough && this.#bytes <= HISTORY_BYTES) return;
      if (this.#blocks.length === 1) return;
      this.#blocks.shift();
      this.#lines -= lines;
      this.#bytes -= used;
    }
  }

  /** The lines, in pieces that are shared. */
  get parts(): Uint8Array[] {
    const parts = this.#blocks.map(({ bytes, used }) =>
      bytes.subarray(0, used)
    );
    if (parts.length === 0) return parts;
    let start = 0;
    for (let extra = this.#lines - this.most; extra > 0; extra--) {
      start = parts[0].indexOf(LF, start) + 1;
    }
    parts[0] = parts[0].subarray(start);
    return parts;
  }
}

type Change = "entered" | "left";

function changeText(change: Change, name: string, reason: string): string {
  return `${name} has ${change} the room${reason && ` (${reason})`}`;
}

/** Join and leave notices of a crowd, gathered into one line. */
class JoinLeaveNotices {
  #entered = 0;
  #left = 0;
  #tooSlow = 0;
  /** The text of the last one by itself. */
  #last = "";

  add(change: Change, name: string, reason: string): void {
    if (change === "entered") this.#entered++;
    else this.#left++;
    if (reason === TOO_SLOW) this.#tooSlow++;
    this.#last = changeText(change, name, reason);
  }

  /** The line that tells of all of them, after which it begins anew. */
  take(): string {
    const entered = this.#entered, left = this.#left;
    const have = (count: number) => count === 1 ? "has" : "have";
    const people = (count: number) =>
      `${count} ${count === 1 ? "person" : "people"} ${have(count)}`;
    const slow = this.#tooSlow ? ` (${this.#tooSlow} ${TOO_SLOW})` : "";
    this.#entered = this.#left = this.#tooSlow = 0;
    if (entered + left === 1) return this.#last;
    if (entered === 0) return `${people(left)} left the room${slow}`;
    const joined = `${people(entered)} entered the room`;
    return left === 0 ? joined : `${joined}, ${left} ${have(left)} left${slow}`;
  }
}

/** The people, what they say, and who receives it. */
class Room {
  readonly log = new Log();
  /** Everybody and everything that receives something, in the room or not yet. */
  readonly readers = new Set<Reader>();
  /** Those who have a name, by {@linkcode nameKey}. */
  readonly people = new Map<string, Person>();
  /** Those who do not receive join and leave notices. */
  readonly quiet = new Set<Person>();
  /** Receives each public line, with the name before it, and when it was said. */
  transcript: Transcript | null = null;
  /** Whether the last line has been said. */
  closed = false;
  /** The first names of those who are here, as they are listed. */
  #names: string | null = null;
  /** None, if a newcomer is shown none. */
  readonly #history: History | null;
  #guests = 0;
  readonly #notices = new JoinLeaveNotices();
  #noticeTimer: Timer | undefined;
  #clock = { minute: 0, text: "" };
  /** Whether something was appended since the last flush. */
  #flushNeeded = false;
  #turnEnds = false;
  #lastSender: Person | undefined;
  /** Bytes that came in since the last turn whose end was awaited. */
  #bytesThisTurn = 0;
  readonly #emptied = Promise.withResolvers<void>();

  constructor(readonly options: Options) {
    const { raw, history } = options;
    this.#history = raw || history === 0 ? null : new History(history);
  }

  // -- people

  find(name: string): Person | undefined {
    return this.people.get(nameKey(name));
  }

  /** A name that nobody has. */
  guestName(): string {
    let name;
    do name = `guest${++this.#guests}`; while (this.find(name));
    return name;
  }

  /** What is wrong with a name that `person` wants, or `null`. */
  nameProblem(name: string | null, person: Person): string | null {
    if (name === null) return NAME_RULE;
    if (isReserved(name)) return `The name ${name} is reserved.`;
    const owner = this.find(name);
    return owner && owner !== person ? `The name ${name} is taken.` : null;
  }

  /** Gives `person` a name that has no {@linkcode nameProblem}. */
  setName(person: Person, name: string): void {
    if (person.name) this.#removeName(person);
    if (this.people.size < LISTED_NAMES) this.#names = null;
    person.name = name;
    this.people.set(nameKey(name), person);
  }

  #removeName(person: Person): boolean {
    this.#names = null;
    return this.people.delete(nameKey(person.name));
  }

  /** The line that tells who is here. */
  whoIsHere(nobody = ""): string {
    // Kept, as a crowd that joins would have it made anew for each.
    this.#names ??= Array.from(
      this.people.values().take(LISTED_NAMES),
      ({ name }) => name,
    ).join(", ");
    const more = this.people.size - LISTED_NAMES;
    const others = more > 0 ? ` and ${more} more` : "";
    return `* The room contains: ${(this.#names || nobody) + others}\n`;
  }

  /** Lets `person` in under a name that has no {@linkcode nameProblem}. */
  enter(person: Person, name: string): void {
    this.setName(person, name);
    this.#tellChange("entered", person, "");
    person.reader?.follow();
  }

  /** Takes `person` out; its reader may still write what was said before. */
  leave(person: Person, reason: string): void {
    person.replyTo = null; // or each would keep the one before in memory
    for (const other of person.ignored ?? []) other.ignoredBy?.delete(person);
    for (const other of person.ignoredBy ?? []) other.ignored?.delete(person);
    this.quiet.delete(person);
    if (person.name && this.#removeName(person)) {
      this.#tellChange("left", person, reason);
    }
  }

  /** Forgets a reader that will write nothing more. */
  forget(reader: Reader): void {
    this.readers.delete(reader);
    if (this.closed && this.readers.size === 0) this.#emptied.resolve();
  }

  /** Resolves when all readers are forgotten, after {@linkcode Room.close}. */
  async emptied(): Promise<void> {
    if (this.readers.size > 0) await this.#emptied.promise;
  }

  // -- lines

  /** Appends public lines of `from`: bytes with their line ends, no more than
   * {@linkcode APPENDED_LINES}. Everyone receives them but `from`, and those who
   * ignore `from`. */
  say(from: Person, lines: Uint8Array, mark: string = this.mark(from)): void {
    const start = this.log.end;
    this.#append(this.stamp() + mark, lines, from);
    if (this.#history !== null || this.transcript !== null) {
      const said = this.log.tail.between(start, this.log.end);
      this.#history?.add(said);
      this.transcript?.add(said);
    }
    this.#flushSoon(from);
  }

  /** What is before a line of `from`. */
  mark(from: Person): string {
    return this.options.raw ? "" : `[${from.name}] `;
  }

  /** `from` says something to `to` alone. */
  sayPrivately(from: Person, to: Person, text: string): void {
    const time = this.stamp();
    if (!to.ignored?.has(from)) {
      to.tell(`${time}[${from.name} -> you] ${text}\n`);
      to.replyTo = from;
    }
    from.tell(`${time}[you -> ${to.name}] ${text}\n`);
  }

  /** The server's own words to everyone. */
  notice(text: string): void {
    this.#append(`* ${text}\n`, NO_BYTES);
    this.#flushSoon();
  }

  /** In a small room at once. In a crowd one line a second; among more than a
   * thousand people less often: a thousand deliveries a second at most. */
  #tellChange(change: Change, person: Person, reason: string): void {
    if (this.options.raw || this.closed) return;
    if (this.people.size <= CROWD && this.#noticeTimer === undefined) {
      const text = changeText(change, person.name, reason);
      return this.#noticeChange(text, person);
    }
    this.#notices.add(change, person.name, reason);
    const wait = Math.max(1_000, this.people.size);
    this.#noticeTimer ??= setTimeout(() => {
      this.#noticeTimer = undefined;
      this.#noticeChange(this.#notices.take());
    }, wait);
  }

  /** Tells those who want to know, and do not ignore `person`. */
  #noticeChange(text: string, person?: Person): void {
    const start = this.log.end;
    this.#append(`* ${text}\n`, NO_BYTES, person);
    for (const other of this.quiet) other.reader?.skip(start);
    this.#flushSoon();
  }

  /** Says the last line that anyone receives. */
  close(): void {
    this.closed = true;
    clearTimeout(this.#noticeTimer);
    const line = this.options.raw ? "Shutdown Server\n" : "* Shutdown Server\n";
    this.#append(line, NO_BYTES);
    for (const reader of this.readers) {
      if (!reader.isFollowing) reader.insert(encoder.encode(line));
    }
    this.#flushSoon();
  }

  /** The last public lines, in pieces that all newcomers share. */
  get history(): Uint8Array[] {
    return this.#history?.parts ?? [];
  }

  /** Begins with lines that were said before, each with the time of it. */
  restoreHistory(lines: { time: Date; line: string }[]): void {
    for (const { time, line } of lines) {
      this.#history?.add(encoder.encode(`${this.stamp(time)}${line}\n`));
    }
  }

  /** The time of day before a public line, if it is wanted. */
  stamp(time?: Date): string {
    if (!this.options.timestamps) return "";
    const moment = time?.getTime() ?? Date.now();
    const minute = Math.floor(moment / 60_000);
    if (minute !== this.#clock.minute) {
      const text = new Date(moment).toTimeString().slice(0, 5) + " ";
      this.#clock = { minute, text };
    }
    return this.#clock.text;
  }

  /** Appends to the log, past `from` and those who ignore `from`. */
  #append(text: string, lines: Uint8Array, from?: Person): void {
    const start = this.log.end;
    if (this.log.append(text, lines)) this.#dropSlowReaders();
    from?.reader?.skip(start);
    for (const other of from?.ignoredBy ?? []) other.reader?.skip(start);
    this.countBytes(this.log.end - start);
  }

  /** The window has moved: now, as a write that a reader waits for may never
   * end. */
  #dropSlowReaders(): void {
    for (const reader of this.readers) {
      if (reader.isBehind) reader.sink.tooSlow();
    }
  }

  // -- turns of the event loop

  /** Whether so much came in this turn that input waits for the next. */
  get crowded(): boolean {
    return this.#bytesThisTurn >= TURN_BYTES;
  }

  /** Counts bytes that came in, towards {@linkcode Room.crowded}. */
  countBytes(count: number): void {
    this.#bytesThisTurn += count;
    if (this.#bytesThisTurn > TURN_BYTES / 4) this.#endTurnSoon();
  }

  /** Flushes at the end of the turn, with what else is said in it; at once if one
   * person alone is talking, which takes a tenth less time between two people. */
  #flushSoon(sender?: Person): void {
    const alone = sender !== undefined && sender === this.#lastSender;
    this.#lastSender = sender;
    if (alone && !this.#turnEnds) return this.#flush();
    this.#flushNeeded = true;
    this.#endTurnSoon();
  }

  #endTurnSoon(): void {
    if (this.#turnEnds) return;
    this.#turnEnds = true;
    // Not a microtask: that would come before the other reads of this turn, and
    // what they bring would leave in writes of its own. With ten people who talk
    // as fast as they receive, a thousand readers get twice as many lines.
    setImmediate(this.#endTurn);
  }

  #endTurn = (): void => {
    this.#turnEnds = false;
    this.#bytesThisTurn = 0;
    if (this.#flushNeeded) this.#flush();
  };

  /** Starts a write for each reader that is not writing. In a small room it starts
   * at a random reader, so that the same one is not always the last: with ten
   * people who talk as fast as they receive, a hundred readers get a fifth more. */
  #flush(): void {
    this.#flushNeeded = false;
    const { readers } = this, { size } = readers;
    const first = size > RANDOM_START_READERS
      ? 0
      : Math.floor(Math.random() * size);
    let place = 0;
    for (const reader of readers) if (place++ >= first) reader.flush();
    place = 0;
    for (const reader of readers) {
      if (place++ === first) break;
      reader.flush();
    }
  }
}

// ---------------------------------------------------------------------------
// Client: one connection, from its first byte to its last. It is read, split into
// lines and paced; it receives the room until it leaves.
// ---------------------------------------------------------------------------

/** The size of the read buffer, in bytes. A client that only listens has the
 * smallest; a full read makes it eight times larger, up to the largest. */
const SMALLEST_READ_BYTES = 256, LARGEST_READ_BYTES = 65_536;

/** The largest buffer of a client that is paced, as what was read waits in memory,
 * and of a client whose last read was small. */
const MODEST_READ_BYTES = 2_048;

/** How many seconds' worth of lines a client may send at once. */
const BURST_SECONDS = 5;

/** The time between reads of what a client still sends after it has left. */
const DISCARD_MILLISECONDS = 10;

/** The most that input waits when too much came in a turn. Each client waits for a
 * random time, so that the same one is not always the first. */
const CROWDED_MILLISECONDS = 4;

/** How long a client that leaves has to take the lines that wait for it. */
const DRAIN_MILLISECONDS = 1_000;

/** How long to wait for a TLS handshake, and for the password. */
const ANSWER_MILLISECONDS = 30_000;

/** How many wrong passwords are too many. */
const PASSWORD_TRIES = 3;

/** The first line of an HTTP request (RFC 9112, section 3), or its first piece,
 * if it is too long for one. */
const HTTP_REQUEST = /^[A-Z]+ \S+ HTTP\/\d|^[A-Z]+ \S{4000,}$/;

/** How a TLS handshake begins (RFC 8446, 5.1). */
const TLS_HANDSHAKE = [0x16, 0x03];

/** What the server needs of a connection. TCP is one kind; an embedding program
 * can bring others. */
export interface Connection {
  /** Reads into `buffer`; resolves to the number of bytes, `null` at the end. */
  read(buffer: Uint8Array): Promise<number | null>;
  /** Writes some of `bytes`; resolves to how many. */
  write(bytes: Uint8Array): Promise<number>;
  /** Ends both directions at once, with whatever is pending. */
  close(): void;
  /** Ends what is written (a half-close), where the connection can do that. */
  closeWrite?(): Promise<void>;
  /** Resolves when bytes can be exchanged, if that takes more than a connection. */
  handshake?(): Promise<unknown>;
}

/** Closes what may be closed already. */
function tryClose(connection: { close(): void }): void {
  try {
    connection.close();
  } catch { /* it was */ }
}

/** Prints what happened to a client, with its name, the reason, and how many are
 * connected. */
type Report = (what: string, client: Client, reason?: string) => void;

class Client extends Person implements Sink {
  readonly reader: Reader;
  /** When it connected, in milliseconds of `performance.now`. */
  readonly since = performance.now();

  // It is closed when it has left and both directions have ended; at once if one
  // of them fails; and at the latest when the time to drain is over.
  left = false;
  #inputEnded = false;
  #outputEnded = false;
  #outputFailed = false;
  #closed = false;

  #buffer: Uint8Array = smallestBuffer();
  /** Made with the first bytes: many clients only listen. */
  #splitter: LineSplitter | null = null;
  /** Lines that were not said yet, from the byte at `#nextLine` on. */
  #lines: Uint8Array = NO_BYTES;
  #nextLine = 0;
  #firstLineSeen = false;
  /** How many bytes of a TLS handshake it began with; -1 if with others. */
  #tlsBytes = 0;
  /** How many lines it may send now. */
  #tokens: number;
  #refilled = 0;
  #wake: (() => void) | null = null;
  #wakeTimer: Timer | undefined;
  #deadline: Timer | undefined;

  constructor(
    room: Room,
    readonly access: Access,
    readonly connection: Connection,
    readonly address: string,
    readonly port: number,
    readonly report: Report,
  ) {
    super(room);
    this.reader = new Reader(room.log, this);
    this.#tokens = room.options.rate * BURST_SECONDS;
  }

  /** Its address and port, in the usual form. */
  get origin(): string {
    return formatAddress(this.address, this.port);
  }

  /** The life of the client. While it is in the room this is the only function
   * that waits: one more frame costs each client kilobytes. */
  async live(): Promise<void> {
    const { room, access, connection } = this;
    if (connection.handshake) await this.#handshake();
    if (access.asksPassword && !this.left) await this.#givePassword();
    if (room.options.askName && !this.left) await this.#giveName();
    else if (!this.left) this.#enter(room.options.raw ? "" : room.guestName());
    while (!this.left) {
      const pause = this.#pause();
      if (this.#hasLine && pause === 0) this.#sayNext();
      else if (this.#inputEnded && !this.#hasLine) this.leave("");
      else if (pause > 0) await this.#sleep(pause);
      else {
        let count;
        try {
          count = await connection.read(this.#buffer);
        } catch {
          this.#readFailed();
          continue;
        }
        this.#received(count);
      }
    }
    // To close with unread input would reset the connection, and the last lines
    // to the client could be lost.
    while (!this.#inputEnded) {
      await this.#read();
      if (!this.#inputEnded) await this.#sleep(DISCARD_MILLISECONDS);
    }
    if (this.#outputEnded) this.#close();
  }

  // -- before it is in the room

  async #handshake(): Promise<void> {
    const fail = () => this.leave("no TLS", { drain: false });
    this.#setDeadline(ANSWER_MILLISECONDS, fail);
    await this.connection.handshake!().catch(fail);
    if (!this.left) clearTimeout(this.#deadline);
  }

  async #givePassword(): Promise<void> {
    // In a raw room the question is the only line that is not a relayed one.
    const answer = (text: string) => this.room.options.raw || this.tell(text);
    this.#setDeadline(ANSWER_MILLISECONDS, () => {
      answer("! That took too long.\n");
      this.leave("no password");
    });
    for (let tries = 0; tries < PASSWORD_TRIES; tries++) {
      const line = await this.ask("* This room has a password. What is it?\n");
      if (line === null) return;
      if (this.access.isPassword(line)) {
        clearTimeout(this.#deadline);
        return this.report("Password given by", this);
      }
      answer("! That is not the password.\n");
    }
    this.leave("no password");
  }

  /** Asks for a name, as Protohackers' Budget Chat does. */
  async #giveName(): Promise<void> {
    const line = await this.ask("* Welcome to Parley. What is your name?\n");
    if (line === null) return;
    const name = normalizeName(line);
    const problem = this.room.nameProblem(name, this);
    if (problem !== null) {
      this.tell(`! ${problem} Join again with another.\n`);
      return this.leave("no name");
    }
    this.#enter(name!);
    this.report("Name given by", this);
  }

  /** Asks, and resolves to the next line that the client sends; to `null` if it
   * leaves instead. */
  async ask(question: string): Promise<string | null> {
    this.tell(question);
    while (!this.left) {
      const pause = this.#pause();
      if (this.#hasLine && pause === 0) return this.#takeLine();
      if (this.#inputEnded && !this.#hasLine) this.leave("");
      else await (pause > 0 ? this.#sleep(pause) : this.#read());
    }
    return null;
  }

  /** Greets the client, and lets it into the room. */
  #enter(name: string): void {
    const { room } = this, { raw, askName } = room.options;
    if (raw) return this.reader.follow();
    const welcome =
      `* Welcome, ${name}. Type to talk, /nick NAME for a name, /help for more.\n`;
    this.reader.insert(encoder.encode(
      askName ? room.whoIsHere() : welcome + room.whoIsHere("nobody else yet"),
    ));
    for (const part of room.history) this.reader.insert(part, 0);
    if (this.left) return; // too slow for so much
    room.enter(this, name);
    this.reader.flush();
  }

  // -- reading

  get #hasLine(): boolean {
    return this.#nextLine < this.#lines.length;
  }

  /** How many milliseconds the client has to wait. What is not read, TCP holds
   * back at the sender: nothing is dropped. */
  #pause(): number {
    if (this.room.crowded) return Math.random() * CROWDED_MILLISECONDS;
    const { rate } = this.room.options;
    if (rate === 0) return 0;
    // A token bucket: `rate` lines a second, BURST_SECONDS' worth at most.
    const now = performance.now();
    const earned = (now - this.#refilled) * rate / 1_000;
    this.#tokens = Math.min(this.#tokens + earned, rate * BURST_SECONDS);
    this.#refilled = now;
    return this.#tokens >= 1 ? 0 : (1 - this.#tokens) * 1_000 / rate;
  }

  #sleep(milliseconds: number): Promise<void> {
    return new Promise((resolve) => {
      this.#wake = resolve;
      this.#wakeTimer = setTimeout(resolve, milliseconds);
    });
  }

  async #read(): Promise<void> {
    let count;
    try {
      count = await this.connection.read(this.#buffer);
    } catch {
      return this.#readFailed();
    }
    this.#received(count);
  }

  #readFailed(): void {
    this.#inputEnded = true;
    if (this.left) this.#close();
    else this.leave("", { drain: false });
  }

  #received(count: number | null): void {
    if (count === null) this.#inputEnded = true;
    if (this.left) return; // nothing more of it is looked at
    this.#nextLine = 0;
    if (count === null) {
      this.#lines = this.#splitter?.end() ?? NO_BYTES;
      return;
    }
    const chunk = this.#buffer.subarray(0, count);
    if (this.#beginsTls(chunk)) return this.leave("TLS, which is off");
    this.#splitter ??= new LineSplitter();
    this.#lines = this.#splitter.push(chunk);
    if (this.#lines.length === 0) this.#chargeForJunk(count);
    this.#sizeBuffer(count);
    const { reply } = this.#splitter;
    if (reply === null) return;
    this.#splitter.reply = null;
    this.reader.insert(reply);
    this.reader.flush();
    this.#tokens--; // it costs a line, so that replies have a bound
  }

  /** Whether its first bytes, which may come one by one, begin a handshake. */
  #beginsTls(chunk: Uint8Array): boolean {
    if (this.#tlsBytes < 0) return false;
    for (const byte of chunk) {
      if (byte !== TLS_HANDSHAKE[this.#tlsBytes++]) {
        this.#tlsBytes = -1;
        return false;
      }
      if (this.#tlsBytes === TLS_HANDSHAKE.length) return true;
    }
    return false;
  }

  /** Bytes that make no line cost like as many of a long line: they are work, and
   * could keep the server from everyone else. */
  #chargeForJunk(count: number): void {
    this.#tokens -= count / LINE_BYTES;
    this.room.countBytes(count);
  }

  #sizeBuffer(count: number): void {
    const size = this.#buffer.length;
    const most = this.room.options.rate > 0
      ? MODEST_READ_BYTES
      : LARGEST_READ_BYTES;
    if (count === size) {
      if (size < most) this.#buffer = new Uint8Array(Math.min(size * 8, most));
    } else if (count <= SMALLEST_READ_BYTES) {
      if (size > SMALLEST_READ_BYTES) this.#buffer = smallestBuffer();
    } else if (size > MODEST_READ_BYTES) {
      this.#buffer = new Uint8Array(MODEST_READ_BYTES);
    }
  }

  // -- talking

  /** Says the next lines: public ones together, or one other. */
  #sayNext(): void {
    if (!this.#firstLineSeen) {
      this.#firstLineSeen = true;
      if (HTTP_REQUEST.test(this.#peekLine())) return this.#refuseHttp();
    }
    const { rate, raw } = this.room.options;
    const lines = this.#lines, start = this.#nextLine;
    if (!raw && lines[start] === SLASH) {
      return runCommand(COMMANDS, this, this.#takeLine());
    }
    const most = rate === 0
      ? APPENDED_LINES
      : Math.min(Math.floor(this.#tokens), APPENDED_LINES);
    let end = start, count = 0;
    do {
      end = lines.indexOf(LF, end) + 1;
      count++;
    } while (
      end < lines.length && count < most && end - start < APPENDED_BYTES &&
      (raw || lines[end] !== SLASH)
    );
    this.#nextLine = end;
    this.#tokens -= count;
    this.room.say(this, lines.subarray(start, end));
  }

  #peekLine(): string {
    const end = this.#lines.indexOf(LF, this.#nextLine);
    return decoder.decode(this.#lines.subarray(this.#nextLine, end));
  }

  #takeLine(): string {
    const line = this.#peekLine();
    this.#nextLine = this.#lines.indexOf(LF, this.#nextLine) + 1;
    this.#tokens--;
    return line;
  }

  #refuseHttp(): void {
    const text = "This is a Parley chat room, not a web site.\n" +
      "Join it from a terminal: nc HOST PORT\n";
    this.tell(
      `HTTP/1.1 400 Bad Request\r\nContent-Type: text/plain\r\n` +
        `Content-Length: ${text.length}\r\nConnection: close\r\n\r\n${text}`,
    );
    this.leave("a web request");
  }

  // -- receiving

  write(bytes: Uint8Array): Promise<number> {
    return this.connection.write(bytes);
  }

  writeFailed(): void {
    // It may have said something before: the read will tell that it is gone.
    this.#outputFailed = true;
    if (this.left) this.#close();
  }

  tooSlow(): void {
    if (this.left) this.#close();
    else this.leave(TOO_SLOW, { drain: false });
  }

  // -- leaving

  /** Disconnects it, and tells it why. */
  disconnect(how: "kicked" | "banned", why: string): void {
    const reason = why ? `${how}: ${why}` : how;
    if (!this.room.options.raw) this.tell(`! You were ${reason}.\n`);
    this.leave(reason);
  }

  /** Leaves the room. The lines before that are still written, for
   * {@linkcode DRAIN_MILLISECONDS} at most, unless `drain` is false. */
  leave(reason: string, { drain = true } = {}): void {
    if (this.left) {
      if (this.room.closed && this.#outputEnded) this.#close();
      return;
    }
    this.left = true;
    this.room.leave(this, reason);
    this.access.release(this.address);
    this.report("Connection closed by", this, reason);
    if (!drain || this.#outputFailed) return this.#close();
    this.#setDeadline(DRAIN_MILLISECONDS, () => this.#close());
    this.#stopSleeping();
    this.reader.end();
  }

  async drained(): Promise<void> {
    if (!this.connection.closeWrite) return this.#close();
    try {
      await this.connection.closeWrite();
      this.#outputEnded = true;
      if (!this.#inputEnded && !this.room.closed) return;
    } catch { /* it is gone */ }
    this.#close();
  }

  #close(): void {
    if (this.#closed) return;
    this.#closed = this.#inputEnded = true;
    this.#stopSleeping();
    clearTimeout(this.#deadline);
    this.reader.stop();
    this.#buffer = this.#lines = NO_BYTES;
    this.#splitter = this.ignored = null;
    tryClose(this.connection);
    this.room.forget(this.reader);
  }

  #stopSleeping(): void {
    clearTimeout(this.#wakeTimer);
    this.#wake?.();
  }

  #setDeadline(milliseconds: number, late: () => void): void {
    clearTimeout(this.#deadline);
    this.#deadline = setTimeout(late, milliseconds);
  }
}

/** A part of an allocation that several clients share, which saves 0.6 KB each. */
function smallestBuffer(): Uint8Array {
  const { buffer, byteOffset } = Buffer.allocUnsafe(SMALLEST_READ_BYTES);
  return new Uint8Array(buffer, byteOffset, SMALLEST_READ_BYTES);
}

// ---------------------------------------------------------------------------
// Commands: what a line that begins with a slash does. /help is printed from the
// same table.
// ---------------------------------------------------------------------------

interface Command<Actor extends Person> {
  name: string;
  /** What is typed after the name: required, unless it is in brackets. */
  arguments?: string;
  help: string;
  run(actor: Actor, text: string): void;
}

/** The first word of a command's text, and the rest of it. */
function firstWord(text: string): [word: string, rest: string] {
  const [, word, rest] = /^(\S*)\s*(.*)$/.exec(text)!;
  return [word, rest];
}

/** Runs the command of a line that begins with a slash. */
function runCommand<Actor extends Person>(
  commands: Command<Actor>[],
  actor: Actor,
  line: string,
): void {
  if (line.charCodeAt(1) === SLASH) {
    return actor.room.say(actor, encoder.encode(line.slice(1) + "\n"));
  }
  const [name, rest] = firstWord(line.slice(1));
  const text = rest.trimEnd(); // not by the expression: that is quadratic
  const command = commands.find((it) => it.name === name.toLowerCase());
  if (command !== undefined) {
    const missing = text === "" && /^\w/.test(command.arguments ?? "");
    if (missing) answerError(actor, `Type ${usage(command)}.`);
    else command.run(actor, text);
  } else if (name.toLowerCase() === "help") {
    actor.tell(helpLines(commands));
  } else {
    const typed = name.slice(0, 24);
    answerError(
      actor,
      `There is no command /${typed}. Type /help for a list, //${typed} to say it.`,
    );
  }
}

function helpLines<Actor extends Person>(commands: Command<Actor>[]): string {
  const rows = [
    ["/help", "this list"],
    ...commands.map((command) => [usage(command), command.help]),
    ["//TEXT", "say /TEXT"],
    ["TEXT", "say TEXT to everyone here"],
  ];
  const width = Math.max(...rows.map(([typed]) => typed.length)) + 2;
  return rows.map(([typed, help]) => `* ${typed.padEnd(width)}${help}\n`).join(
    "",
  );
}

function usage({ name, arguments: args }: Command<never>): string {
  return args ? `/${name} ${args}` : `/${name}`;
}

/** Tells a person what was wrong with a command, and what to do. */
function answerError(person: Person, text: string): void {
  person.tell(`! ${text}\n`);
}

/** The person of that name; if there is none, `asker` is told so. */
function findPerson(asker: Person, name: string): Person | undefined {
  const person = asker.room.find(name);
  if (!person) {
    answerError(
      asker,
      `Nobody here is called ${name}. Type /who for who is here.`,
    );
  }
  return person;
}

/** How the reasons that the server gives begin; such a one is quoted if typed. */
const SERVER_REASON =
  /^\P{L}*(too slow|kicked|banned|TLS|a web request|no (?:name|password|TLS))/iu;

/** How many people one person can ignore. */
const MOST_IGNORED = 1_000;

const COMMANDS: Command<Client>[] = [
  {
    name: "nick",
    arguments: "NAME",
    help: "take another name",
    run(client, text) {
      const { room } = client, name = normalizeName(text);
      const problem = room.nameProblem(name, client);
      if (problem) {
        answerError(client, `${problem} Choose one with /nick NAME.`);
      } else if (name === client.name) {
        answerError(client, `You are ${name} already.`);
      } else {
        room.notice(`${client.name} is now known as ${name}`);
        room.setName(client, name!);
      }
    },
  },
  {
    name: "who",
    help: "who is here",
    run: (client) => client.tell(client.room.whoIsHere()),
  },
  {
    name: "me",
    arguments: "ACTION",
    help: "do something: /me waves",
    run(client, text) {
      const line = encoder.encode(text + "\n");
      client.room.say(client, line, `** ${client.name} `);
    },
  },
  {
    name: "msg",
    arguments: "NAME TEXT",
    help: "say something to one person alone",
    run(client, text) {
      const [name, message] = firstWord(text);
      if (!message) return answerError(client, "Type /msg NAME TEXT.");
      const person = findPerson(client, name);
      if (person) client.room.sayPrivately(client, person, message);
    },
  },
  {
    name: "reply",
    arguments: "TEXT",
    help: "answer the last who spoke to you alone",
    run(client, text) {
      const { room, replyTo } = client;
      if (replyTo === null) {
        answerError(
          client,
          "Nobody has spoken to you alone. Type /msg NAME TEXT.",
        );
      } else if (room.find(replyTo.name) !== replyTo) {
        answerError(client, `${replyTo.name} has left the room.`);
      } else room.sayPrivately(client, replyTo, text);
    },
  },
  {
    name: "ignore",
    arguments: "NAME",
    help: "do not hear NAME (again to stop that)",
    run(client, text) {
      const person = findPerson(client, text);
      if (!person) return;
      const { name } = person;
      if (person === client) {
        answerError(client, "That is you. Type another's name.");
      } else if (client.stopIgnoring(person)) {
        client.tell(`* You hear ${name} again.\n`);
      } else if (client.ignored?.size === MOST_IGNORED) {
        answerError(
          client,
          `You ignore ${MOST_IGNORED} people, which is the most.`,
        );
      } else {
        client.ignore(person);
        client.tell(
          `* You do not hear ${name} now. Type /ignore ${name} to stop that.\n`,
        );
      }
    },
  },
  {
    name: "quiet",
    help: "do not hear who enters and leaves (again to stop that)",
    run(client) {
      if (client.room.quiet.delete(client)) {
        return client.tell("* You hear who enters and leaves again.\n");
      }
      client.room.quiet.add(client);
      client.tell(
        "* You do not hear who enters and leaves now. Type /quiet to stop that.\n",
      );
    },
  },
  {
    name: "quit",
    arguments: "[REASON]",
    help: "leave the room",
    run: (client, text) =>
      client.leave(SERVER_REASON.test(text) ? `"${text}"` : text),
  },
];

// ---------------------------------------------------------------------------
// Server: the listener, the clients that it admits, and the end.
// ---------------------------------------------------------------------------

/** How long to wait when the system accepts no connections for the moment, and
 * how often at most to say that it does not. */
const ACCEPT_RETRY_MILLISECONDS = 100, ACCEPT_REPORT_MILLISECONDS = 60_000;

/** Where a server's own words go; by default nowhere. */
export interface Reports {
  /** Clients that connect and leave, a line each. */
  print?: (line: string) => void;
  /** What went wrong, a line each. */
  warn?: (line: string) => void;
}

/**
 * A chat room on a TCP port.
 *
 * @example A room for as long as a block runs
 * ```ts
 * import { assertEquals } from "@std/assert";
 * import { ChatServer } from "./main.ts";
 *
 * await using server = ChatServer.listen({
 *   host: "127.0.0.1",
 *   port: 0,
 *   raw: true,
 * });
 * using alice = await Deno.connect({ port: server.addr.port });
 * using bob = await Deno.connect({ port: server.addr.port });
 * await alice.write(new TextEncoder().encode("hello\n"));
 *
 * const buffer = new Uint8Array(100);
 * const count = await bob.read(buffer);
 * assertEquals(new TextDecoder().decode(buffer.subarray(0, count!)), "hello\n");
 * ```
 */
export class ChatServer implements AsyncDisposable {
  /** The address that it listens on, with the real port where 0 was asked for. */
  readonly addr: Deno.NetAddr;
  /** Resolves when the server has stopped and every connection is closed. */
  readonly finished: Promise<void>;
  readonly #options: Options;
  readonly #reports: Required<Reports>;
  readonly #room: Room;
  readonly #access: Access;
  readonly #tls: Tls | null;
  readonly #transcript: Transcript | null;
  readonly #listener: Deno.TcpListener;
  readonly #accepting: Promise<void>;
  #stopped: Promise<void> | null = null;
  #lastAcceptReport = -Infinity;

  /** Use {@linkcode ChatServer.listen}. */
  private constructor(options: Options, reports: Reports) {
    this.#options = options;
    this.#reports = {
      print: guarded(reports.print),
      warn: guarded(reports.warn),
    };
    // The files first: nobody shall connect to a room that does not open.
    const { host, port, tlsCert, tlsKey, log } = options;
    this.#room = new Room(options);
    this.#access = new Access(options);
    this.#tls = tlsCert ? new Tls(tlsCert, tlsKey) : null;
    this.#transcript = this.#room.transcript = log
      ? new Transcript(log, this.#room, this.#reports.warn)
      : null;
    try {
      this.#listener = Deno.listen({ hostname: host, port });
    } catch (error) {
      this.#transcript?.close();
      throw openError(`Cannot listen on ${formatAddress(host, port)}`, error, {
        flags: "--allow-net",
        denied: "choose a --port above 1023",
        other: "choose an address with --host",
      });
    }
    this.addr = this.#listener.addr as Deno.NetAddr;
    this.#accepting = this.#accept();
    this.finished = this.#accepting.then(() => this.stop());
  }

  /**
   * Opens a room.
   *
   * @param options what differs from the defaults of the command line
   * @param reports where clients that connect and leave, and troubles, are told
   * @returns the server, which accepts connections already
   * @throws {UsageError} if an option is out of its range, or contradicts another
   * @throws {OpenError} if a file cannot be read or written, or the address and
   * port cannot be listened on; what the system said is its `cause`
   *
   * @example
   * ```ts
   * import { ChatServer } from "./main.ts";
   *
   * const server = ChatServer.listen({ host: "127.0.0.1", port: 0, rate: 5 });
   * setTimeout(() => server.stop(), 100);
   * await server.finished;
   * ```
   */
  static listen(
    options: Partial<Options> = {},
    reports: Reports = {},
  ): ChatServer {
    checkOptions(options);
    const history = options.askName ? 0 : DEFAULTS.history;
    const given = Object.entries(options).filter(([, it]) => it !== undefined);
    return new ChatServer(
      { ...DEFAULTS, history, ...Object.fromEntries(given) },
      reports,
    );
  }

  /**
   * Stops the server: it admits nobody any more, tells everyone
   * `Shutdown Server`, gives each a second to take the lines that wait, and
   * disconnects them.
   *
   * @returns a promise that resolves when everyone is disconnected
   *
   * @example
   * ```ts
   * import { ChatServer } from "./main.ts";
   *
   * const server = ChatServer.listen({ host: "127.0.0.1", port: 0 });
   * await server.stop();
   * ```
   */
  stop(): Promise<void> {
    // Later, as what it does can let promises run that call this again.
    return this.#stopped ??= Promise.resolve().then(() => this.#stop());
  }

  /**
   * Lets an operator speak as `host`, receive what everyone receives, and keep
   * order by the commands that `/help` lists.
   *
   * @param lines what the operator types; its end leaves the room running
   * @param print where lines for the operator go
   * @returns a promise that resolves at the end of `lines`
   *
   * @example
   * ```ts
   * import { ChatServer } from "./main.ts";
   *
   * await using server = ChatServer.listen({ host: "127.0.0.1", port: 0 });
   * const typed = ReadableStream.from(["hello, everyone", "/who"]);
   * await server.operate(typed, (line) => console.log(line));
   * ```
   */
  async operate(
    lines: AsyncIterable<string>,
    print: (line: string) => void,
  ): Promise<void> {
    if (this.#room.closed) return;
    const operator = new Operator(
      this.#room,
      this.#access,
      guarded(print),
      () => this.stop(),
    );
    this.#room.readers.add(operator.reader);
    for await (const line of lines) operator.type(line);
  }

  /** Stops the server at the end of an `await using` block. */
  [Symbol.asyncDispose](): Promise<void> {
    return this.stop();
  }

  async #stop(): Promise<void> {
    this.#reports.print("Shutdown Server ......");
    this.#room.close();
    this.#listener.close();
    for (const { sink } of this.#room.readers) sink.leave("");
    await Promise.all([this.#room.emptied(), this.#transcript?.close()]);
    await this.#accepting; // only then is the port free
  }

  async #accept(): Promise<void> {
    while (!this.#room.closed) {
      try {
        for await (const conn of this.#listener) {
          try {
            conn.setNoDelay(true); // a line does not wait for the next one
            conn.setKeepAlive(true); // clients that vanish are noticed some day
            this.admit(this.#tls?.connect(conn) ?? conn, conn.remoteAddr);
          } catch (error) { // of this connection alone
            tryClose(conn);
            this.#reports.warn(`Cannot admit a connection: ${reason(error)}`);
          }
        }
        return; // the listener is closed
      } catch (error) {
        // Out of descriptors, for example. The listener itself is still good.
        if (this.#room.closed) return;
        if (
          error instanceof Deno.errors.ConnectionAborted ||
          error instanceof Deno.errors.NotConnected
        ) continue; // that client has gone again
        this.#reportAccept(error);
        await delay(ACCEPT_RETRY_MILLISECONDS);
      }
    }
  }

  #reportAccept(error: unknown): void {
    const now = performance.now();
    if (now - this.#lastAcceptReport < ACCEPT_REPORT_MILLISECONDS) return;
    this.#lastAcceptReport = now;
    this.#reports.warn(
      `Cannot accept connections for now: ${reason(error)} ` +
        `(newcomers wait; a higher ulimit -n lets more in)`,
    );
  }

  /**
   * Admits a client that does not come by the TCP port: anything that can be read
   * and written, such as a Unix socket or a WebSocket.
   *
   * @param connection the connection, which belongs to the server from now on
   * @param remote where it comes from; limits hold for each `hostname`
   *
   * @example A Unix socket beside the TCP port
   * ```ts
   * import { ChatServer } from "./main.ts";
   *
   * await using server = ChatServer.listen({ host: "127.0.0.1", port: 0 });
   * const path = `${await Deno.makeTempDir()}/parley.sock`;
   * using listener = Deno.listen({ transport: "unix", path });
   * using _guest = await Deno.connect({ transport: "unix", path });
   * server.admit(await listener.accept(), { hostname: path, port: 0 });
   * ```
   */
  admit(
    connection: Connection,
    remote: { hostname: string; port: number },
  ): void {
    const address = plainAddress(remote.hostname);
    if (this.#room.closed || !this.#access.admits(address)) {
      return tryClose(connection);
    }
    const refusal = this.#access.take(address);
    if (refusal !== null) {
      refuse(connection, refusal);
      return;
    }
    const client = new Client(
      this.#room,
      this.#access,
      connection,
      address,
      remote.port,
      this.#report,
    );
    this.#room.readers.add(client.reader);
    client.live();
    this.#report("New Connection from", client);
  }

  readonly #report: Report = (what, { origin, name }, reason = "") => {
    if (this.#options.quiet || this.#room.closed) return;
    const who = (name && `${name}, `) + (reason && `${reason}, `);
    this.#reports.print(`${what} ${origin} (${who}${this.#access.here} here)`);
  };
}

/** Tells a connection why it is refused, and closes it. */
async function refuse(connection: Connection, why: string): Promise<void> {
  const deadline = setTimeout(() => tryClose(connection), DRAIN_MILLISECONDS);
  try {
    await connection.handshake?.();
    await writeAll(connection, encoder.encode(`! ${why}\n`));
    await connection.closeWrite?.();
    // To close with unread input would reset it, and lose the line.
    const rest = new Uint8Array(SMALLEST_READ_BYTES);
    while (await connection.read(rest) !== null) {
      await delay(DISCARD_MILLISECONDS);
    }
  } catch { /* it is gone */ }
  clearTimeout(deadline);
  tryClose(connection);
}

/** An embedding program's function, whose errors are that program's own. */
function guarded(report?: (line: string) => void): (line: string) => void {
  return (line) => {
    try {
      report?.(line);
    } catch (error) {
      reportError(error);
    }
  };
}

// ---------------------------------------------------------------------------
// Access: which addresses are admitted, how many clients, and the password.
// ---------------------------------------------------------------------------

class Access {
  /** The addresses that the operator has banned. */
  readonly banned = new Set<string>();
  /** How many clients are connected. */
  here = 0;
  /** How many of them from each address. */
  readonly #addresses = new Map<string, number>();
  readonly #allows: (address: string) => boolean;
  /** Whether a text is the password; `null` if none is asked for. */
  readonly #isPassword: ((text: string) => boolean) | null;

  constructor(readonly options: Options) {
    const { allow, passwordFile } = options;
    this.#allows = allow.length > 0 ? networkTest(allow) : () => true;
    this.#isPassword = passwordFile
      ? passwordTest(readPassword(passwordFile))
      : null;
  }

  /** Whether clients from this address are admitted at all. */
  admits(address: string): boolean {
    return !this.banned.has(address) && this.#allows(address);
  }

  /** Counts a client, or tells why there is no place for it. */
  take(address: string): string | null {
    const { maxClients, maxPerAddress } = this.options;
    const fromHere = this.#addresses.get(address) ?? 0;
    if (this.here >= maxClients) return "The room is full. Try again later.";
    if (maxPerAddress > 0 && fromHere >= maxPerAddress) {
      return "Too many here are from your address.";
    }
    this.here++;
    this.#addresses.set(address, fromHere + 1);
    return null;
  }

  /** A client that was counted has left. */
  release(address: string): void {
    this.here--;
    const fromHere = this.#addresses.get(address)! - 1;
    if (fromHere > 0) this.#addresses.set(address, fromHere);
    else this.#addresses.delete(address);
  }

  get asksPassword(): boolean {
    return this.#isPassword !== null;
  }

  isPassword(text: string): boolean {
    return this.#isPassword?.(text) ?? true;
  }
}

// node:net and node:crypto take 35 ms and 9 MB at start-up: they are loaded when
// an option needs them.

/** Tests whether an address is in one of these networks. */
function networkTest(networks: string[]): (address: string) => boolean {
  const { BlockList } = process.getBuiltinModule("node:net");
  const family = (address: string) => address.includes(":") ? "ipv6" : "ipv4";
  const list = new BlockList();
  for (const network of networks) {
    const { address, prefix } = parseNetwork(network)!;
    list.addSubnet(address, prefix, family(address));
  }
  return (address) => {
    const canonical = canonicalAddress(address);
    return canonical !== null && list.check(canonical, family(canonical));
  };
}

/** Tests a password, in the same time whatever of it is right. */
function passwordTest(password: string): (text: string) => boolean {
  const { createHash, timingSafeEqual } = process.getBuiltinModule(
    "node:crypto",
  );
  // Digests have one length, so that no comparison ends early.
  const digest = (text: string) => createHash("sha256").update(text).digest();
  const expected = digest(password);
  return (text) => timingSafeEqual(digest(text), expected);
}

/** An address without the IPv4-mapped form (RFC 4291, 2.5.5.2). */
function plainAddress(address: string): string {
  return address.replace(/^::ffff:(?=\d+\.)/i, "");
}

/** The one spelling of an address that the system uses (RFC 5952), or `null`. */
function canonicalAddress(text: string): string | null {
  const isIPv6 = /^[\da-f:.]*:[\da-f:.]*$/i.test(text);
  // Without leading zeros, which some take for octal (RFC 6943, 3.1.1).
  const isIPv4 = /^(?:0|[1-9]\d{0,2})(?:\.(?:0|[1-9]\d{0,2})){3}$/.test(text);
  if (!isIPv6 && !isIPv4) return null;
  const host = URL.parse(`http://${isIPv6 ? `[${text}]` : text}/`)?.hostname;
  if (host === undefined || isIPv4) return host ?? null;
  const address = host.slice(1, -1);
  const mapped = /^::ffff:([\da-f]+):([\da-f]+)$/.exec(address);
  if (mapped === null) return address;
  const [high, low] = mapped.slice(1).map((group) => parseInt(group, 16));
  return [high >> 8, high & 255, low >> 8, low & 255].join(".");
}

/** Reads a network in CIDR notation (RFC 4632), or a single address. */
function parseNetwork(
  text: string,
): { address: string; prefix: number } | null {
  const [, host, bits] = /^([^/]+)(?:\/(\d{1,3}))?$/.exec(text) ?? [];
  const address = canonicalAddress(host ?? "");
  if (address === null) return null;
  const length = address.includes(":") ? 128 : 32;
  // An IPv4 address may have been written in its mapped form, of 128 bits.
  const skipped = length === 32 && host.includes(":") ? 96 : 0;
  const prefix = bits === undefined ? length : Number(bits) - skipped;
  return prefix >= 0 && prefix <= length ? { address, prefix } : null;
}

function formatAddress(address: string, port: number): string {
  return address.includes(":") ? `[${address}]:${port}` : `${address}:${port}`;
}

// -- what cannot be opened

/** What to do when something cannot be opened. */
interface Remedy {
  /** The flags that grant the permission of Deno. */
  flags: string;
  /** When the system denies it. */
  denied?: string;
  /** In all other cases. */
  other?: string;
}

/** The error of what cannot be opened: why, and what to do. */
function openError(what: string, error: unknown, remedy: Remedy): OpenError {
  return new OpenError(`${what}: ${problem(error, remedy)}`, { cause: error });
}

function problem(error: unknown, { flags, denied, other }: Remedy): string {
  if (error instanceof Deno.errors.NotCapable) {
    // For devices Deno "Requires all access".
    const all = error.message.includes("all access");
    // A binary was granted its permissions when it was made.
    const how = Deno.build.standalone ? "compile" : "run";
    return `it is not permitted (${how} it with ${
      all ? "--allow-all" : flags
    })`;
  }
  if (error instanceof Deno.errors.AddrInUse) {
    return "the port is in use (choose another with --port)";
  }
  if (error instanceof Deno.errors.AddrNotAvailable) {
    return "this machine does not have that address (choose one with --host)";
  }
  if (error instanceof Deno.errors.NotFound) return "there is no such file";
  if (error instanceof Deno.errors.PermissionDenied && denied) {
    return `the system does not permit it (${denied})`;
  }
  return reason(error) + (other ? ` (${other})` : "");
}

const FILE_DENIED = "look at the file's owner and mode";

function readFile(path: string): string {
  try {
    return Deno.readTextFileSync(path);
  } catch (error) {
    throw openError(`Cannot read ${path}`, error, {
      flags: `--allow-read=${path}`,
      denied: FILE_DENIED,
    });
  }
}

function readPassword(path: string): string {
  const [password] = readFile(path).replace(/^\ufeff/, "").split(/\r?\n/);
  // What a client types comes cleaned, and in pieces if it is too long.
  const [typed, ...more] = linesOf(password);
  if (typed === password && more.length === 0) return password;
  throw new OpenError(
    `Cannot use ${path}: its first line is to be the password, ` +
      `at most ${LINE_BYTES} bytes of UTF-8`,
  );
}

// ---------------------------------------------------------------------------
// TLS: a connection in whose stead an inner one speaks TLS.
//
//   client ──TLS──→ outer (TCP) ⇄ middle (loopback) ──→ inner (Deno.listenTls)
//
// Closing a Deno.TlsConn leaves its socket open until the other side says
// goodbye: a client that says nothing would keep its descriptor for ever. Here
// the client's socket is a TCP one, which closes when it is closed.
// ---------------------------------------------------------------------------

const LOOPBACK = "127.0.0.1";

class TlsEngine {
  readonly #options: Deno.ListenTlsOptions & Deno.TlsCertifiedKeyPem;

  /** Throws what `Deno.listenTls` throws if these are not a certificate and its
   * key. */
  constructor(cert: string, key: string) {
    this.#options = { hostname: LOOPBACK, port: 0, cert, key };
    Deno.listenTls(this.#options).close();
  }

  /** Two ends of one connection, the second of which speaks TLS. */
  async connect(): Promise<[Deno.TcpConn, Deno.TlsConn]> {
    // A listener for each (0.1 ms): a port that stayed open could be filled by
    // other programs of this machine.
    using listener = Deno.listenTls(this.#options);
    const { port } = listener.addr as Deno.NetAddr;
    const middle = await Deno.connect({ hostname: LOOPBACK, port });
    const own = middle.localAddr as Deno.NetAddr;
    try {
      for (;;) {
        const inner = await listener.accept();
        const from = inner.remoteAddr as Deno.NetAddr;
        if (from.port === own.port && from.hostname === own.hostname) {
          middle.setNoDelay(true);
          return [middle, inner];
        }
        inner.close(); // such a program, which was quick
      }
    } catch (error) {
      middle.close();
      throw error;
    }
  }
}

/** How much passes from one end to the other at once, in bytes. */
const FORWARD_BYTES = 4_096;

class TlsConnection implements Connection {
  readonly #outer: Deno.TcpConn;
  readonly #inner: Promise<Deno.TlsConn>;
  #ends: Deno.Conn[] = [];
  #closed = false;
  #sent: Promise<void> = Promise.resolve();

  constructor(outer: Deno.TcpConn, engine: TlsEngine) {
    this.#outer = outer;
    this.#inner = engine.connect().then(([middle, inner]) => {
      this.#ends = [middle, inner];
      if (this.#closed) this.close(); // it was given up meanwhile
      this.#forward(outer, middle);
      this.#sent = this.#forward(middle, outer);
      return inner;
    });
    this.#inner.catch(() => this.close());
  }

  /** Passes on what there is, and then the end. What fails in one direction
   * leaves the other alone, which may still have something to pass on. */
  async #forward(from: Deno.TcpConn, to: Deno.TcpConn): Promise<void> {
    try {
      // Not `from.readable`: at its end it closes the socket for writing too.
      const buffer = new Uint8Array(FORWARD_BYTES);
      for (let count; (count = await from.read(buffer)) !== null;) {
        await writeAll(to, buffer.subarray(0, count));
      }
    } catch { /* it is gone: that is an end as well */ }
    await to.closeWrite().catch(() => {});
  }

  async handshake(): Promise<void> {
    await (await this.#inner).handshake();
  }

  async read(buffer: Uint8Array): Promise<number | null> {
    const inner = await this.#inner;
    try {
      return await inner.read(buffer);
    } catch (error) {
      // Many clients end without TLS's own goodbye (close_notify, RFC 8446, 6.1).
      if (error instanceof Deno.errors.UnexpectedEof) return null;
      throw error;
    }
  }

  async write(bytes: Uint8Array): Promise<number> {
    return await (await this.#inner).write(bytes);
  }

  async closeWrite(): Promise<void> {
    await (await this.#inner).closeWrite();
    await this.#sent;
  }

  close(): void {
    this.#closed = true;
    for (const end of [this.#outer, ...this.#ends.splice(0)]) tryClose(end);
  }
}

class Tls {
  readonly #engine: TlsEngine;
  constructor(certPath: string, keyPath: string) {
    const cert = readFile(certPath), key = readFile(keyPath);
    try {
      this.#engine = new TlsEngine(cert, key);
    } catch (error) {
      throw openError(`Cannot use ${certPath} with ${keyPath}`, error, {
        flags: "--allow-net",
        other: "give a certificate and its own key, as PEM files",
      });
    }
  }
  connect(conn: Deno.TcpConn): Connection {
    return new TlsConnection(conn, this.#engine);
  }
}

// ---------------------------------------------------------------------------
// Output: lines on their way to a terminal, a pipe or the log file, without
// making the room wait.
// ---------------------------------------------------------------------------

/** How many characters may wait for standard output or standard error that
 * nobody reads, and for the log file. */
const PRINTED_CHARACTERS = 65_536, LOGGED_CHARACTERS = 4_194_304;

/** How long lines are gathered between writes: with a write for each of a thousand
 * lines that come at once, they took two thirds of the time. */
const GATHER_MILLISECONDS = 10;

/** How long to wait before another try after a write that failed. */
const RETRY_MILLISECONDS = 1_000;

/** What an {@linkcode Output} does when lines cannot be written. */
interface Troubles {
  /** Lines are dropped, because too many wait. */
  dropped(): void;
  /** A write failed; tells whether to try again. */
  failed(error: unknown): boolean;
}

/**
 * A file or pipe that lines are written to. Neither a terminal on hold (Ctrl-S)
 * nor a pipe that nobody reads stops the room, as `console.log` would.
 */
class Output {
  #waiting = "";
  #dropped = 0;
  #gone = false;
  #writing: Promise<void> | null = null;

  /** @param most how many characters may wait */
  constructor(
    readonly file: { write(bytes: Uint8Array): Promise<number> },
    readonly most: number,
    readonly troubles: Troubles,
  ) {}

  /** Adds a line, or several. */
  print(lines: string): void {
    if (this.#gone) return;
    if (this.#waiting.length > this.most) {
      this.#dropped += lines.split("\n").length;
      this.troubles.dropped();
    } else this.#waiting += lines + "\n";
    this.#writing ??= this.#write();
  }

  /** Resolves when all is written, or cannot be in that time. */
  async flush(milliseconds: number): Promise<void> {
    if (this.#writing === null) return;
    let timer: Timer | undefined;
    const late = new Promise<void>((resolve) => {
      timer = setTimeout(resolve, milliseconds);
    });
    await Promise.race([this.#writing, late]);
    clearTimeout(timer);
  }

  /** Writes nothing more. */
  stop(): void {
    this.#gone = true;
    this.#waiting = "";
  }

  async #write(): Promise<void> {
    while (this.#waiting) {
      let bytes: Uint8Array = encoder.encode(this.#waiting);
      this.#waiting = "";
      while (bytes.length > 0 && !this.#gone) {
        try {
          bytes = bytes.subarray(await this.file.write(bytes));
        } catch (error) {
          if (this.#gone || !this.troubles.failed(error)) return this.stop();
          await delay(RETRY_MILLISECONDS);
        }
      }
      if (this.#dropped > 0) {
        this.#waiting += `(${this.#dropped} lines not shown)\n`;
      }
      this.#dropped = 0;
      await delay(GATHER_MILLISECONDS);
    }
    this.#writing = null;
  }
}

/** A line of the log file: the time, and what was said. */
const TRANSCRIPT_LINE = /^(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z) (.+)$/;

/** The public lines, kept in a file. */
class Transcript {
  readonly #file: Deno.FsFile;
  readonly #output: Output;
  /** Whether trouble was reported, and nothing has been written since. */
  #reported = false;

  /** Opens the file, and takes the room's history from it.
   *
   * @throws {OpenError} if that cannot be done */
  constructor(
    readonly path: string,
    readonly room: Room,
    readonly warn: (line: string) => void,
  ) {
    try {
      this.#file = Deno.openSync(path, {
        read: true,
        append: true,
        create: true,
      });
    } catch (error) {
      throw openError(`Cannot open ${path}`, error, {
        flags: `--allow-read=${path} --allow-write=${path}`,
        denied: FILE_DENIED,
      });
    }
    this.#restore();
    this.#output = new Output(
      { write: (bytes) => this.#write(bytes) },
      LOGGED_CHARACTERS,
      {
        dropped: () =>
          this.#report("Some lines are lost: the disk is slower than the talk"),
        failed: (error) => {
          this.#report(`Cannot write: ${reason(error)}`);
          return true;
        },
      },
    );
  }

  /** Adds public lines, as the room receives them. */
  add(lines: Uint8Array): void {
    const stampLength = this.room.stamp().length;
    const start = new Date().toISOString() + " ";
    const text = decoder.decode(lines.subarray(0, -1));
    this.#output.print(
      text.split("\n").map((line) => start + line.slice(stampLength)).join(
        "\n",
      ),
    );
  }

  /** Closes the file when all is written, or cannot be in time. */
  async close(): Promise<void> {
    await this.#output.flush(DRAIN_MILLISECONDS);
    this.#output.stop();
    this.#file.close();
  }

  async #write(bytes: Uint8Array): Promise<number> {
    const count = await this.#file.write(bytes);
    this.#reported = false;
    return count;
  }

  #report(text: string): void {
    if (this.#reported) return;
    this.#reported = true;
    this.warn(`${text} (--log ${this.path}; the room goes on)`);
  }

  /** Gives the room the last lines of the file as its history. */
  #restore(): void {
    const file = this.#file, { history, raw } = this.room.options;
    const { isFile, size } = file.statSync();
    if (!isFile || size === 0) return;
    // The end is enough, however large the file is: as many of the longest lines
    // (three bytes a byte, where an invalid one became U+FFFD), or as much as the
    // history keeps and as much again for the times.
    const most = Math.min(
      (history + 1) * (3 * LINE_BYTES + 256),
      2 * HISTORY_BYTES,
    );
    file.seekSync(Math.max(0, size - most), Deno.SeekMode.Start);
    const tail = readFully(file, Math.min(size, most));
    if (tail.at(-1) !== LF) file.writeSync(LINE_END);
    if (history === 0 || raw) return;
    // What was cut off may be the middle of a line, which anyone can have made
    // to look like the beginning of one.
    const start = size > most ? tail.indexOf(LF) + 1 : 0;
    const lines = splitLines(decoder.decode(tail.subarray(start)));
    this.room.restoreHistory(
      lines.flatMap((line) => {
        const [, stamp, said] = TRANSCRIPT_LINE.exec(line) ?? [];
        const time = new Date(stamp);
        return Number.isNaN(time.getTime()) ? [] : [{ time, line: said }];
      }).slice(-history),
    );
  }
}

/** Reads `length` bytes, or up to the end. */
function readFully(file: Deno.FsFile, length: number): Uint8Array {
  const bytes = new Uint8Array(length);
  let filled = 0;
  while (filled < length) {
    const count = file.readSync(bytes.subarray(filled));
    if (count === null) break;
    filled += count;
  }
  return bytes.subarray(0, filled);
}

// ---------------------------------------------------------------------------
// Console: the operator, who speaks as host and keeps order.
// ---------------------------------------------------------------------------

class Operator extends Person implements Sink {
  readonly reader: Reader;

  constructor(
    room: Room,
    readonly access: Access,
    readonly print: (line: string) => void,
    readonly stop: () => void,
  ) {
    super(room);
    this.name = HOST;
    this.reader = new Reader(room.log, this);
    this.reader.follow();
  }

  /** Takes a line that the operator typed. */
  type(typed: string): void {
    for (const line of linesOf(typed)) {
      if (line.charCodeAt(0) === SLASH) {
        runCommand(CONSOLE_COMMANDS, this, line);
      } else this.room.say(this, encoder.encode(line + "\n"));
    }
  }

  /** All clients that are connected, whether they have a name or not. */
  get clients(): Client[] {
    return [...this.room.readers].map(({ sink }) => sink)
      .filter((sink) => sink instanceof Client)
      .filter(({ left }) => !left);
  }

  write(bytes: Uint8Array): Promise<number> {
    this.print(decoder.decode(bytes).trimEnd());
    return Promise.resolve(bytes.length);
  }

  tooSlow(): void {
    this.reader.follow();
  }

  leave(): void {
    this.reader.end();
  }

  drained(): void {
    this.room.forget(this.reader);
  }

  writeFailed(): void {}
}

const CONSOLE_COMMANDS: Command<Operator>[] = [
  {
    name: "who",
    help: "who is here, from where, for how long",
    run(operator) {
      const rows = operator.clients.map(({ name, origin, since }) => {
        const minutes = Math.floor((performance.now() - since) / 60_000);
        return `* ${name || "(no name)"} ${origin}, ${minutes} min\n`;
      });
      operator.tell(rows.join("") || "* Nobody is here.\n");
    },
  },
  {
    name: "kick",
    arguments: "NAME [REASON]",
    help: "send somebody away",
    run(operator, text) {
      const [name, why] = firstWord(text);
      const person = findPerson(operator, name);
      if (person instanceof Client) person.disconnect("kicked", why);
    },
  },
  {
    name: "ban",
    arguments: "NAME|ADDRESS [REASON]",
    help: "send somebody away, and keep the address out",
    run(operator, text) {
      const [whom, why] = firstWord(text);
      const person = operator.room.find(whom);
      const address = person instanceof Client
        ? person.address
        : canonicalAddress(whom);
      if (address === null) {
        return answerError(
          operator,
          `Nobody here is called ${whom}, and it is no address.`,
        );
      }
      operator.access.banned.add(address);
      operator.tell(`* ${address} is banned.\n`);
      for (const client of operator.clients) {
        if (client.address === address) client.disconnect("banned", why);
      }
    },
  },
  {
    name: "unban",
    arguments: "ADDRESS",
    help: "let an address in again",
    run(operator, text) {
      const address = canonicalAddress(text) ?? text;
      if (operator.access.banned.delete(address)) {
        return operator.tell(`* ${address} is no longer banned.\n`);
      }
      answerError(operator, `${text} is not banned. Type /banned for who is.`);
    },
  },
  {
    name: "banned",
    help: "which addresses are banned",
    run(operator) {
      const rows = Array.from(
        operator.access.banned,
        (address) => `* ${address} is banned.\n`,
      );
      operator.tell(rows.join("") || "* Nobody is banned.\n");
    },
  },
  { name: "quit", help: "stop the server", run: ({ stop }) => stop() },
];

// ---------------------------------------------------------------------------
// Command line: one table of options, read by parseOptions and printed by --help.
// ---------------------------------------------------------------------------

const DEFAULTS: Options = {
  host: "0.0.0.0",
  port: 8008,
  raw: false,
  askName: false,
  timestamps: false,
  history: 20,
  rate: 20,
  maxClients: 10_000,
  maxPerAddress: 0,
  allow: [],
  passwordFile: "",
  tlsCert: "",
  tlsKey: "",
  log: "",
  quiet: false,
};

interface Flag {
  name: string;
  short?: string;
  /** The name of its value in the help; a flag without one is on or off. */
  value?: string;
  /** The option that it sets; a flag without one is read by name. */
  key?: keyof Options;
  /** The range of a number, both ends included. */
  range?: [from: number, to: number];
  /** Whether it can be given more than once. */
  repeatable?: boolean;
  help: string;
}

// deno-fmt-ignore: a line each
const FLAGS: Flag[] = [
  { name: "host", key: "host", value: "ADDRESS",
    help: "address to listen on, :: for IPv4 and IPv6" },
  { name: "port", short: "p", key: "port", value: "PORT", range: [0, 65_535],
    help: "port to listen on, 0 picks a free one" },
  { name: "raw", key: "raw",
    help: "relay lines as they are: no names, no commands" },
  { name: "ask-name", key: "askName",
    help: "ask each newcomer for a name first" },
  { name: "timestamps", key: "timestamps",
    help: "put the time, 12:34, before each line said" },
  { name: "history", key: "history", value: "LINES", range: [0, 10_000],
    help: "said lines for a newcomer, 0 with --ask-name" },
  { name: "rate", key: "rate", value: "LINES", range: [0, 1_000_000],
    help: "lines a second for each client, 0 is no limit" },
  { name: "max-clients", key: "maxClients", value: "N", range: [1, 1_000_000],
    help: "how many may be here at once" },
  { name: "max-per-address", key: "maxPerAddress", value: "N",
    range: [0, 1_000_000], help: "the same for one address, 0 is no limit" },
  { name: "allow", key: "allow", value: "CIDR", repeatable: true,
    help: "admit only these, such as 10.0.0.0/8 (all)" },
  { name: "password-file", key: "passwordFile", value: "FILE",
    help: "ask for the password in it first (none)" },
  { name: "tls-cert", key: "tlsCert", value: "FILE",
    help: "speak TLS with this certificate chain (none)" },
  { name: "tls-key", key: "tlsKey", value: "FILE",
    help: "and this private key (none)" },
  { name: "log", key: "log", value: "FILE",
    help: "append what is said, take the history from it (none)" },
  { name: "console",
    help: "speak as host on standard input, and hear the room" },
  { name: "quiet", key: "quiet", help: "do not print comings and goings" },
  { name: "help", short: "h", help: "print this and leave" },
  { name: "version", short: "V", help: "print the version and leave" },
];

/** The text of `--help`: at most 80 columns, with every default. */
function helpText(): string {
  const { standalone } = Deno.build; // a binary from `deno compile`
  const program = standalone ? "parley" : "deno run --allow-net main.ts";
  const rows = FLAGS.map(({ name, short, value, key, help }) => {
    const flag = `${short ? `-${short}, ` : "    "}--${name} ${value ?? ""}`;
    const standard = key && String(DEFAULTS[key]);
    const what = value && standard ? `${help} (${standard})` : help;
    return `  ${flag.padEnd(26)}${what}`;
  });
  return `\
Parley: a chat room for netcat.

Usage: ${program} [OPTIONS]
Join:  nc localhost ${DEFAULTS.port}    (then /help)

Options (with their defaults):
${rows.join("\n")}`;
}

/**
 * Reads a command line.
 *
 * @param args the arguments after the program's name, as in `Deno.args`
 * @returns what was given, with the right types
 * @throws {UsageError} if an argument is unknown, lacks its value, or has one
 * that cannot be used; the message says what to do instead
 */
export function parseOptions(args: string[]): CommandLine {
  const names = FLAGS.flatMap(({ name, short }) =>
    short ? [name, short] : name
  );
  const dashed = (name: string) => (name.length > 1 ? "--" : "-") + name;
  const given = parseArgs(withTiedValues(args), {
    // All of them, so that a value that was given to an on/off flag shows.
    string: names,
    collect: FLAGS.filter((flag) => flag.repeatable).map((flag) => flag.name),
    alias: Object.fromEntries(
      FLAGS.flatMap(({ name, short }) => short ? [[short, name]] : []),
    ),
    unknown(arg) {
      if (!arg.startsWith("-")) return true; // and so it is in `given._`
      const option = arg.replace(/=.*/s, "");
      const nearest = closestString(option, names.map(dashed));
      throw new UsageError(
        `Unknown option ${option} (did you mean ${nearest}?)`,
      );
    },
  });
  const [stray] = given._ as string[];
  if (stray !== undefined) {
    throw new UsageError(
      `Unexpected argument ${
        stray === "" ? '""' : stray
      } (every option begins with --)`,
    );
  }

  const options: Partial<Record<keyof Options, unknown>> = {};
  for (const { name, key, value, range, repeatable } of FLAGS) {
    const texts = [given[name] ?? []].flat();
    if (texts.length === 0) continue;
    if (!value) {
      if (texts.some((text) => text !== "")) {
        throw new UsageError(`Option --${name} takes no value`);
      }
      if (key) options[key] = true;
    } else if (texts.includes("")) {
      throw new UsageError(
        `Option --${name} needs a value: --${name} ${value}`,
      );
    } else if (key) {
      const values = texts.map((text) =>
        range && /^\d+$/.test(text) ? Number(text) : text
      );
      options[key] = repeatable ? values : values.at(-1);
    }
  }
  checkOptions(options);
  return {
    options: options as Partial<Options>,
    console: given.console !== undefined,
    help: given.help !== undefined,
    version: given.version !== undefined,
  };
}

/** Ties each value to its option where parseArgs would not: it takes `--rate -3`
 * for two options, and `--host ""` for one without a value. */
function withTiedValues(args: string[]): string[] {
  const options = FLAGS.filter(({ value }) => value)
    .flatMap(({ name, short }) => [`--${name}`, `-${short}`]);
  const tied: string[] = [];
  for (const arg of args) {
    const before = tied.at(-1);
    if (/^(-\d|$)/.test(arg) && before && options.includes(before)) {
      tied[tied.length - 1] = `${before}=${arg}`;
    } else tied.push(arg);
  }
  return tied;
}

/** Throws a {@linkcode UsageError} if no room can be opened with `options`. */
function checkOptions(options: Partial<Record<keyof Options, unknown>>): void {
  const kind = (it: unknown) => Array.isArray(it) ? "list" : typeof it;
  for (const [key, value] of Object.entries(options)) {
    const standard: unknown = DEFAULTS[key as keyof Options];
    if (standard === undefined) throw new UsageError(`Unknown option ${key}`);
    if (value === undefined || typeof standard === "number") continue;
    if (kind(value) !== kind(standard)) {
      throw new UsageError(
        `Cannot use ${value} for ${key}: give a ${kind(standard)}`,
      );
    }
  }
  for (const { name, key, range } of FLAGS) {
    const value = key && options[key];
    if (value === undefined) continue;
    const require = (usable: boolean, what: string, given = value) => {
      if (usable) return;
      throw new UsageError(`Cannot use ${given} for --${name}: give ${what}`);
    };
    if (range) {
      const [from, to] = range;
      const number = Number.isInteger(value) ? Number(value) : NaN;
      require(
        number >= from && number <= to,
        `a whole number from ${from} to ${to}`,
      );
    } else if (name === "host") {
      // Letters, digits and what else an address or a host name can hold.
      require(
        /^[\p{L}\p{N}.:%_-]+$/u.test(String(value)),
        "an address, such as 127.0.0.1 or ::",
      );
    } else if (name === "allow") {
      for (const network of value as string[]) {
        require(
          parseNetwork(network) !== null,
          "a network, such as 192.168.0.0/16",
          network,
        );
      }
    }
  }
  const { raw, askName, timestamps, tlsCert, tlsKey } = options;
  if (raw && (askName || timestamps)) {
    throw new UsageError(
      `Cannot use --raw with ${askName ? "--ask-name" : "--timestamps"}: ` +
        "a raw room relays lines as they are",
    );
  }
  if (!tlsCert !== !tlsKey) {
    const [one, other] = tlsCert ? ["cert", "key"] : ["key", "cert"];
    throw new UsageError(
      `Cannot use --tls-${one} alone: give --tls-${other} FILE too`,
    );
  }
}

// ---------------------------------------------------------------------------
// Main: reads the command line, opens the room, and stops it on a signal.
// ---------------------------------------------------------------------------

/** How long standard output has to take the last lines. */
const EXIT_MILLISECONDS = 250;

function printer(file: typeof Deno.stdout): Output {
  return new Output(file, PRINTED_CHARACTERS, {
    dropped() {},
    failed: () => false,
  });
}

function exitWith(message: string, status: number): never {
  console.error(`parley: ${message}`);
  Deno.exit(status);
}

async function main(args: string[]): Promise<void> {
  let commandLine: CommandLine;
  try {
    commandLine = parseOptions(args);
  } catch (error) {
    if (!(error instanceof UsageError)) throw error;
    return exitWith(error.message, 2);
  }
  if (commandLine.help) return console.log(helpText());
  if (commandLine.version) return console.log(`parley ${config.version}`);

  const output = printer(Deno.stdout), errors = printer(Deno.stderr);
  let server: ChatServer;
  try {
    server = ChatServer.listen(commandLine.options, {
      print: (line) => output.print(line),
      warn: (line) => errors.print(`parley: ${line}`),
    });
  } catch (error) {
    if (!(error instanceof OpenError)) throw error;
    return exitWith(error.message, 1);
  }
  const { hostname, port } = server.addr;
  const anywhere = hostname === "0.0.0.0" || hostname === "::";
  output.print(
    `Listening on ${formatAddress(hostname, port)}. ` +
      `Join with: nc ${anywhere ? "localhost" : hostname} ${port}`,
  );

  // However the server is stopped, by a signal or the operator.
  server.finished.then(async () => {
    await output.flush(EXIT_MILLISECONDS);
    Deno.exit(0);
  });
  stopOn("SIGINT", 2, server);
  if (Deno.build.os === "windows") stopOn("SIGBREAK", 21, server);
  else stopOn("SIGTERM", 15, server);
  if (commandLine.console) {
    await server.operate(await typedLines(), (line) => output.print(line))
      .catch((error) => errors.print(`parley: The console ends: ${error}`));
  }
}

/** Stops the server on a signal, and exits at once on the second one with the
 * status that shells give: 128 and the signal's number. */
function stopOn(signal: Deno.Signal, number: number, server: ChatServer): void {
  let stopping = false;
  Deno.addSignalListener(signal, () => {
    if (stopping) Deno.exit(128 + number);
    stopping = true;
    server.stop();
  });
}

/** The lines that are typed on standard input. It is read only for the console: a
 * terminal stops a background job that reads. */
async function typedLines(): Promise<ReadableStream<string>> {
  const { TextLineStream } = await import("@std/streams/text-line-stream");
  return Deno.stdin.readable.pipeThrough(new TextDecoderStream())
    .pipeThrough(new TextLineStream());
}

if (import.meta.main) await main(Deno.args);
