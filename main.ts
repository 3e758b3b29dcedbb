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
  boolean: string[];
  collect: string[];
  alias: Record<string, string>;
  unknown: (arg: string) => boolean;
}) => Record<string, string | string[] | boolean | undefined> =
  parseArgsUntyped;
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
  /** What stands for its value in the help; a flag without one is on or off. */
  value?: string;
  /** The option that it sets; a flag without one is read by name. */
  key?: keyof Options;
  /** The range of a number, both ends included. */
  range?: [from: number, to: number];
  /** Whether it can be given more than once. */
  repeatable?: boolean;
  help: string;
}

// The command line is read by this table and --help is printed from it.
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
${rows.join("\n")}
`;
}

/**
 * Reads a command line.
 *
 * @param args the arguments after the program's name, as in `Deno.args`
 * @returns what was given, with the right types
 * @throws {UsageError} if an argument is unknown, lacks its value, or has one
 * that cannot be used; the message says what to do instead
 *
 * @example
 * ```ts
 * import { assertEquals } from "@std/assert";
 * import { parseOptions } from "./main.ts";
 *
 * const { options } = parseOptions(["-p", "9000", "--ask-name"]);
 * assertEquals(options, { port: 9000, askName: true });
 * ```
 */
export function parseOptions(args: string[]): CommandLine {
  const valued = FLAGS.filter((flag) => flag.value);
  const names = (flags: Flag[]) =>
    flags.flatMap(({ name, short }) => [name, ...short ? [short] : []]);
  const dashed = (name: string) => (name.length > 1 ? "--" : "-") + name;
  const takesValue = new Set(names(valued).map(dashed));

  // parseArgs takes `--rate -3` for two options, and `--host ""` for none with a
  // stray argument: tie such a value to its option.
  const tied: string[] = [];
  for (const arg of args) {
    const before = tied.at(-1);
    if (
      /^(-\d|$)/.test(arg) && before !== undefined && takesValue.has(before)
    ) {
      tied[tied.length - 1] = `${before}=${arg}`;
    } else tied.push(arg);
  }

  const given = parseArgs(tied, {
    string: valued.map((flag) => flag.name),
    boolean: FLAGS.filter((flag) => !flag.value).map((flag) => flag.name),
    collect: FLAGS.filter((flag) => flag.repeatable).map((flag) => flag.name),
    alias: Object.fromEntries(
      FLAGS.flatMap(({ name, short }) => short ? [[short, name]] : []),
    ),
    unknown(arg) {
      if (!arg.startsWith("-")) return true; // and so it is a stray one
      const option = arg.replace(/=.*/s, "");
      const known = names(FLAGS).map(dashed);
      throw new UsageError(
        `Unknown option ${option} (did you mean ${
          closestString(option, known)
        }?)`,
      );
    },
  });
  // parseArgs takes these words for the value of a flag that has none.
  const eaten = tied.find((arg, i) =>
    /^(true|false)$/.test(arg) && i > 0 && !takesValue.has(tied[i - 1])
  );
  const [stray] = [...given._ as string[], ...eaten ? [eaten] : []];
  if (stray !== undefined) {
    throw new UsageError(
      `Unexpected argument ${
        stray === "" ? '""' : stray
      } (every option begins with --)`,
    );
  }

  const options: Partial<Record<keyof Options, unknown>> = {};
  for (const flag of FLAGS) {
    const { name, key, value, range, repeatable } = flag;
    const texts = [given[name] ?? []].flat();
    if (!value) {
      const assigned = names([flag]).map((name) => `${dashed(name)}=`);
      if (tied.some((arg) => assigned.some((it) => arg.startsWith(it)))) {
        throw new UsageError(`Option --${name} takes no value`);
      }
      if (key && texts[0] === true) options[key] = true;
    } else if (key && texts.length > 0) {
      if (texts.includes("")) {
        throw new UsageError(
          `Option --${name} needs a value: --${name} ${value}`,
        );
      }
      const values = texts.map((text) =>
        range && /^\d+$/.test(String(text)) ? Number(text) : text
      );
      options[key] = repeatable ? values : values[0];
    }
  }
  checkOptions(options);
  return {
    options: options as Partial<Options>,
    console: given.console === true,
    help: given.help === true,
    version: given.version === true,
  };
}

/** Throws a {@linkcode UsageError} if no room can be opened with `options`. */
function checkOptions(options: Partial<Record<keyof Options, unknown>>): void {
  for (const [key, value] of Object.entries(options)) {
    const standard: unknown = DEFAULTS[key as keyof Options];
    if (standard === undefined) throw new UsageError(`Unknown option ${key}`);
    const kind = (it: unknown) => Array.isArray(it) ? "list" : typeof it;
    const wanted = kind(standard);
    // What is wrong with a number, its range says below.
    const usable = value === undefined || wanted === "number" ||
      kind(value) === wanted;
    if (!usable) {
      throw new UsageError(`Cannot use ${value} for ${key}: give a ${wanted}`);
    }
  }
  for (const { name, key, range } of FLAGS) {
    const value = key && options[key];
    if (value === undefined) continue;
    const expect = (usable: boolean, what: string, given = value) => {
      if (usable) return;
      throw new UsageError(`Cannot use ${given} for --${name}: give ${what}`);
    };
    if (range) {
      const [from, to] = range;
      const number = Number.isInteger(value) ? Number(value) : NaN;
      expect(
        number >= from && number <= to,
        `a whole number from ${from} to ${to}`,
      );
    } else if (name === "host") {
      // Letters, digits and what else an address or a host name can hold.
      expect(
        /^[\p{L}\p{N}.:%_-]+$/u.test(String(value)),
        "an address, such as 127.0.0.1 or ::",
      );
    } else if (name === "allow") {
      for (const network of value as string[]) {
        expect(
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
// Room: the log of everything to be heard, and the readers that follow it.
//
//  client ─lines→ Room.relay() → [ segment ]→[ segment ]→[ e41 | e42 | e43 ]
//                                   ▲                                ▲
//                             slow reader                     everyone else
//
// Appending encodes once and touches no reader. At the end of the turn (at once,
// if one person alone is talking) each reader that is not writing starts one write
// of all that it has not heard; the others look again when theirs ends, so that
// under load lines leave together.
// ---------------------------------------------------------------------------

/** The log is kept in segments of this many bytes, written once and never
 * again: a write in flight can hold on to one safely. */
const SEGMENT_BYTES = 65_536;

/** The window: how many segments are kept (4 MiB). Who needs an older one is too
 * slow. This is the bound on the log, however many listen; the history and each
 * client's buffers have bounds of their own. */
const WINDOW_SEGMENTS = 64;

/** The most entries in a segment, so that the window holds few objects even if
 * every line is one byte long. */
const SEGMENT_ENTRIES = 2_048;

/** The most bytes that are copied to leave in one write, where what a reader
 * hears lies in pieces. A stalled reader holds no more of the log than this. */
const COPIED_BYTES = 16_384;

/** The most lines, and about the most bytes of them, that are relayed as one
 * entry, so that each fits a segment, with a name before every line. */
const ENTRY_LINES = 256, ENTRY_BYTES = 8_192;

/** How many bytes may be added in a turn before input waits for the next one:
 * each reader that keeps up writes at least a segment a turn. */
const TURN_BYTES = SEGMENT_BYTES;

/** In a room of more people than this all are written to in the same order each
 * time. Of so many writes the runtime puts off those past the first 128 (tokio's
 * budget), in an order of its own; while ten talk as fast as they are heard, a
 * thousand are given 1.6 times as much if the order stays. From 250 to 500 people
 * either way can be ahead. */
const HALL = 256;

/** A room of more people than this hears of comings and goings once a second. */
const CROWD = 50;

/** How many names a list of who is here gives before it only counts. */
const LISTED_NAMES = 20;

/** Why a reader who fell out of the window is gone. */
const TOO_SLOW = "too slow";

const SERVER = 0, EVERYONE = 0;

/** A stretch of a segment that the same readers hear. */
interface Entry {
  /** Where it ends in the segment, in bytes. */
  end: number;
  /** The {@linkcode Reader.id} of who said it, who does not get it back. */
  from: number;
  /** The id of the only one who hears it, or {@linkcode EVERYONE}. */
  to: number;
  kind: Kind;
  /** When it was said, in milliseconds; kept for the transcript alone. */
  time: number;
}

const enum Kind {
  /** Talk: what the history and the transcript keep. */
  Said,
  /** The server's own words, and what is said to one person alone. */
  Told,
  /** A coming or going, which some do not want to hear. */
  Coming,
}

/** What one write takes of a segment. */
interface Batch {
  bytes: Uint8Array;
  /** The index of the first entry after it. */
  end: number;
}

class Segment {
  next: Segment | null = null;
  readonly entries: Entry[] = [];
  readonly bytes = new Uint8Array(SEGMENT_BYTES);
  #lastPersonal = -1;
  /** The batch for everyone that was asked for last, and where it begins. */
  #shared: Batch | null = null;
  #sharedStart = 0;

  /** @param first the number of its first entry, counted over the whole log */
  constructor(readonly first: number) {}

  /** Adds an entry: `text`, and if there are `lines`, each of them after it. Sets
   * where it ends, and returns its length in bytes; 0 if it does not fit. */
  add(text: string, lines: Uint8Array, entry: Entry): number {
    if (this.entries.length === SEGMENT_ENTRIES) return 0;
    const { bytes } = this, start = this.#start(this.entries.length);
    const { read, written } = encoder.encodeInto(text, bytes.subarray(start));
    const head = start + written;
    let end = head;
    // Byte by byte, as most lines are too short for anything else to pay. What
    // does not fit falls off the end.
    for (let at = 0; at < lines.length;) {
      if (at > 0) {
        for (let i = start; i < head; i++) bytes[end++] = bytes[i];
      }
      do bytes[end++] = lines[at]; while (
        lines[at++] !== LF && at < lines.length
      );
    }
    if (read < text.length || end > SEGMENT_BYTES) return 0;
    if (entry.to !== EVERYONE) this.#lastPersonal = this.entries.length;
    entry.end = end;
    this.entries.push(entry);
    this.#shared = null;
    return end - start;
  }

  /** Where the entry at `index` begins, in bytes. */
  #start(index: number): number {
    return index === 0 ? 0 : this.entries[index - 1].end;
  }

  /** What everyone hears from the entry at `index` on. It is the same buffer for
   * all who stand there. */
  sharedBatch(index: number): Batch {
    if (this.#shared === null || this.#sharedStart !== index) {
      this.#sharedStart = index;
      this.#shared = index > this.#lastPersonal
        ? this.#stretch(index, this.entries.length)
        : this.batch(index, ({ to }) => to === EVERYONE);
    }
    return this.#shared;
  }

  /** What `hears` lets through from the entry at `index` on: a stretch as it
   * lies here, or a few short ones copied together. */
  batch(index: number, hears: (entry: Entry, index: number) => boolean): Batch {
    const { entries } = this, parts: Uint8Array[] = [];
    let length = 0;
    while (index < entries.length) {
      if (!hears(entries[index], index)) {
        index++;
        continue;
      }
      let end = index + 1;
      while (end < entries.length && hears(entries[end], end)) end++;
      const { bytes } = this.#stretch(index, end);
      if (parts.length > 0 && length + bytes.length > COPIED_BYTES) break;
      parts.push(bytes);
      length += bytes.length;
      index = end;
    }
    if (parts.length === 0) return { bytes: NO_BYTES, end: index };
    const bytes = parts.length === 1 ? parts[0] : concatenate(parts);
    return { bytes, end: index };
  }

  /** The bytes of one entry. */
  entry(index: number): Uint8Array {
    return this.#stretch(index, index + 1).bytes;
  }

  #stretch(index: number, end: number): Batch {
    const bytes = this.bytes.subarray(this.#start(index), this.#start(end));
    return { bytes, end };
  }
}

/**
 * Someone who hears the room: a cursor into the log, and whom it leaves out.
 *
 * Batches are shared. Only a reader whom an entry treats specially needs one of
 * its own, and the number of the last such entry tells that at once.
 */
abstract class Reader {
  readonly id: number;
  name = "";
  /** Those whom it does not want to hear, by id. */
  ignored: Map<number, Reader> | null = null;
  /** Those who do not want to hear it. */
  ignoredBy: Set<Reader> | null = null;
  /** Who last spoke to it alone. */
  correspondent: Reader | null = null;
  #segment: Segment | null = null;
  #index = 0;
  /** The number of the last entry that concerns it in a way of its own. */
  #special = -1;
  /** The number of the first entry that it does not hear any more. */
  #last = Infinity;
  /** What leaves before anything of the log: greetings and questions. */
  #direct: Uint8Array | null = null;
  /** What is being written, or is left of what was. */
  #batch: Uint8Array | null = null;
  #writing = false;

  constructor(readonly room: Room) {
    this.id = room.nextId();
  }

  /** Writes some of `bytes`, and tells how many. */
  protected abstract write(bytes: Uint8Array): Promise<number>;

  /** It has been given all that it will ever hear. */
  protected abstract finished(): void;

  /** Writing to it failed. */
  protected writeFailed(): void {}

  /** The window has moved past its cursor. */
  abstract tooSlow(): void;

  /** Leaves, as if of its own accord. */
  abstract leave(reason: string): void;

  /** Sends something that is not in the log, ahead of what is. Who has left more
   * than a segment of it unread is too slow. */
  send(text: string | Uint8Array): void {
    if (this.#last !== Infinity) return; // its end may be on the way
    const bytes = typeof text === "string" ? encoder.encode(text) : text;
    if (this.#direct && this.#direct.length > SEGMENT_BYTES) {
      return this.tooSlow();
    }
    this.#direct = this.#direct ? concatenate([this.#direct, bytes]) : bytes;
    this.pump();
  }

  /** Whether it hears the log, rather than only what is sent to it. */
  get inside(): boolean {
    return this.#segment !== null;
  }

  /** Begins to hear, with the next entry. */
  joinLog(): void {
    this.#segment = this.room.tail;
    this.#index = this.#segment.entries.length;
  }

  /** Hears the log up to here and no further, then {@linkcode finished}. */
  endLog(): void {
    this.#last = this.room.nextEntry;
    this.#special = Infinity;
  }

  /** Hears nothing more. */
  protected dropLog(): void {
    this.#segment = this.#direct = this.#batch = null;
    this.#writing = true; // a write in flight is the last
  }

  ignore(other: Reader): void {
    if (this.correspondent === other) this.correspondent = null;
    (this.ignored ??= new Map()).set(other.id, other);
    (other.ignoredBy ??= new Set()).add(this);
  }

  /** How many who are here it ignores; it forgets the others. */
  countIgnored(): number {
    for (const [id, other] of this.ignored ?? []) {
      if (!this.room.readers.has(other)) this.ignored!.delete(id);
    }
    return this.ignored?.size ?? 0;
  }

  /** Tells whether it did ignore `other`. */
  stopIgnoring(other: Reader): boolean {
    other.ignoredBy?.delete(this);
    return this.ignored?.delete(other.id) ?? false;
  }

  /** The entry of this number concerns it in a way of its own. */
  markSpecial(entry: number): void {
    if (this.#special < entry) this.#special = entry;
  }

  /** Whether it stands before `segment`. */
  isBehind(segment: Segment): boolean {
    return this.#segment !== null && this.#segment.first < segment.first;
  }

  /** Starts to write what it has not heard, unless it is writing. */
  pump(): void {
    if (this.#writing) return;
    this.#batch ??= this.#next();
    if (this.#batch === null) {
      if (this.#last !== Infinity) this.finished();
      return;
    }
    this.#writing = true;
    try {
      // Not an async function: its promises cost a tenth of a delivery.
      this.write(this.#batch).then(this.#written, this.#notWritten);
    } catch {
      this.#notWritten();
    }
  }

  #written = (count: number): void => {
    if (this.#batch === null) return; // dropped meanwhile
    this.#writing = false;
    this.#batch = count < this.#batch.length
      ? this.#batch.subarray(count)
      : null;
    this.pump();
  };

  #notWritten = (): void => {
    this.dropLog();
    this.writeFailed();
  };

  #next(): Uint8Array | null {
    if (this.#direct !== null) {
      const direct = this.#direct;
      this.#direct = null;
      return direct;
    }
    while (this.#segment !== null) {
      const segment = this.#segment;
      if (this.#index === segment.entries.length) {
        if (segment.next === null) return null;
        this.#segment = segment.next;
        this.#index = 0;
        continue;
      }
      const { bytes, end } = this.batch(segment, this.#index);
      this.#index = end;
      if (bytes.length > 0) return bytes;
    }
    return null;
  }

  /** What it is written next, of a segment from the entry at `index` on. */
  protected batch(segment: Segment, index: number): Batch {
    return segment.first + index > this.#special
      ? segment.sharedBatch(index)
      : segment.batch(
        index,
        (entry, index) => this.#hears(entry, segment.first + index),
      );
  }

  #hears({ from, to, kind }: Entry, number: number): boolean {
    return number < this.#last &&
      (to === EVERYONE ? from !== this.id : to === this.id) &&
      !(kind === Kind.Coming && this.room.quiet.has(this)) &&
      !this.ignored?.has(from);
  }
}

/** The most bytes of history that are kept, however many lines were asked for. */
const HISTORY_BYTES = 1_048_576;

/** The last lines said, encoded, for newcomers. */
class History {
  #parts: { bytes: Uint8Array; lines: number }[] = [];
  #lines = 0;
  #length = 0;
  /** All of it, for the next newcomer too, until more is said. */
  #whole: Uint8Array | null = null;

  /** @param most how many lines it keeps */
  constructor(readonly most: number) {}

  /** Adds whole lines. `bytes` stays as it is, and keeps nothing else alive. */
  add(bytes: Uint8Array): void {
    let lines = 0;
    for (let end = 0; (end = bytes.indexOf(LF, end) + 1) > 0;) lines++;
    this.#parts.push({ bytes, lines });
    this.#lines += lines;
    this.#length += bytes.length;
    this.#whole = null;
    while (this.#parts.length > 0) {
      const [{ bytes, lines }] = this.#parts;
      const enough = this.#lines - lines >= this.most;
      if (!enough && this.#length <= HISTORY_BYTES) break;
      this.#parts.shift();
      this.#lines -= lines;
      this.#length -= bytes.length;
    }
  }

  /** The lines, of which the oldest part can hold more than are wanted. */
  get bytes(): Uint8Array {
    if (this.#whole === null) {
      const whole = concatenate(this.#parts.map(({ bytes }) => bytes));
      let start = 0;
      for (let extra = this.#lines - this.most; extra > 0; extra--) {
        start = whole.indexOf(LF, start) + 1;
      }
      this.#whole = whole.subarray(start);
    }
    return this.#whole;
  }
}

type Coming = "entered" | "left";

function comingText(what: Coming, name: string, reason: string): string {
  return `${name} has ${what} the room${reason && ` (${reason})`}`;
}

/** Comings and goings of a crowd, counted until it is told of them. */
class Comings {
  #entered = 0;
  #left = 0;
  #slow = 0;
  #last = ["", ""];
  #lastWhat: Coming = "entered";

  add(what: Coming, name: string, reason: string): void {
    if (what === "entered") this.#entered++;
    else this.#left++;
    if (reason === TOO_SLOW) this.#slow++;
    this.#lastWhat = what;
    this.#last = [name, reason];
  }

  get text(): string {
    const entered = this.#entered, left = this.#left;
    if (entered + left === 1) {
      return comingText(this.#lastWhat, this.#last[0], this.#last[1]);
    }
    const have = (count: number) => count === 1 ? "has" : "have";
    const people = (count: number) =>
      `${count} ${count === 1 ? "person" : "people"} ${have(count)}`;
    const slow = this.#slow ? ` (${this.#slow} ${TOO_SLOW})` : "";
    if (entered === 0) return `${people(left)} left the room${slow}`;
    const came = `${people(entered)} entered the room`;
    return left === 0 ? came : `${came}, ${left} ${have(left)} left${slow}`;
  }
}

/** The people, what they say, and the log of it. */
class Room {
  /** Everyone who is connected, whether inside already or not. */
  readonly readers = new Set<Reader>();
  /** Those who have a name, by {@linkcode nameKey}. */
  readonly people = new Map<string, Reader>();
  /** Those who do not want to hear who comes and goes. */
  readonly quiet = new Set<Reader>();
  /** The first names of those who are here, as they are listed. */
  #listed: string | null = null;
  #head = new Segment(0);
  #tail = this.#head;
  #segments = 1;
  /** None, if a newcomer is shown none. */
  readonly #history: History | null;
  /** Whether the end of the turn is to flush. */
  #flushDue = false;
  #turnEnding = false;
  #lastSpeaker: Reader | undefined;
  #lastId = 0;
  #guests = 0;
  /** Bytes added since the last turn of the event loop whose end was awaited. */
  #added = 0;
  /** Comings and goings of a crowd that it has not heard of yet. */
  #comings = new Comings();
  #crowdTimer: Timer | undefined;
  #time = { minute: 0, text: "" };
  readonly #emptied = Promise.withResolvers<void>();

  /** Whether the last line has been said. */
  closed = false;

  constructor(readonly options: Options) {
    const { raw, history } = options;
    this.#history = raw || history === 0 ? null : new History(history);
  }

  nextId(): number {
    return ++this.#lastId;
  }

  get tail(): Segment {
    return this.#tail;
  }

  /** The number that the next entry will have. */
  get nextEntry(): number {
    return this.#tail.first + this.#tail.entries.length;
  }

  /** Whether so much was added in this turn that input must wait for the next. */
  get crowded(): boolean {
    return this.#added >= TURN_BYTES;
  }

  // -- people

  find(name: string): Reader | undefined {
    return this.people.get(nameKey(name));
  }

  /** A name that nobody has. */
  guestName(): string {
    let name;
    do name = `guest${++this.#guests}`; while (this.find(name));
    return name;
  }

  /** What is wrong with a name that `reader` wants, or `null`. */
  refusal(name: string | null, reader: Reader): string | null {
    if (name === null) return NAME_RULE;
    if (isReserved(name)) {
      return `The name ${name} is reserved.`;
    }
    const owner = this.find(name);
    return owner && owner !== reader ? `The name ${name} is taken.` : null;
  }

  /** Gives `reader` a name that has no {@linkcode refusal}. */
  setName(reader: Reader, name: string): void {
    if (reader.name) this.#forgetName(reader);
    if (this.people.size < LISTED_NAMES) this.#listed = null;
    reader.name = name;
    this.people.set(nameKey(name), reader);
  }

  /** The line that tells who is here. */
  whoIsHere(nobody = ""): string {
    // Kept, as a crowd at the door would have it made anew for each.
    this.#listed ??= Array.from(
      this.people.values().take(LISTED_NAMES),
      ({ name }) => name,
    ).join(", ");
    const more = this.people.size - LISTED_NAMES;
    const others = more > 0 ? ` and ${more} more` : "";
    return `* The room contains: ${(this.#listed || nobody) + others}\n`;
  }

  /** `reader`, who has a name, begins to hear and be heard. */
  enter(reader: Reader): void {
    this.#tellComing("entered", reader, "");
    reader.joinLog();
  }

  /** Takes `reader` out, who may still be given what was said before. */
  leave(reader: Reader, reason: string): void {
    reader.correspondent = null; // or each would keep the one before
    for (const other of reader.ignored?.values() ?? []) {
      other.ignoredBy?.delete(reader);
    }
    if (reader.name && this.#forgetName(reader)) {
      this.#tellComing("left", reader, reason);
    }
  }

  /** Forgets `reader`, who is disconnected. */
  forget(reader: Reader): void {
    this.readers.delete(reader);
    this.quiet.delete(reader);
    if (this.closed && this.readers.size === 0) this.#emptied.resolve();
  }

  /** Resolves when everyone is disconnected, after {@linkcode Room.close}. */
  async emptied(): Promise<void> {
    if (this.readers.size > 0) await this.#emptied.promise;
  }

  #forgetName(reader: Reader): boolean {
    this.#listed = null;
    return this.people.delete(nameKey(reader.name));
  }

  // -- talk

  /** `from` says a line, or does it (`/me`): everyone else hears it. */
  say(from: Reader, line: string, mark: string = this.mark(from)): void {
    const text = `${this.stamp()}${mark}${line}\n`;
    this.#append(text, NO_BYTES, Kind.Said, from);
  }

  /** `from` says lines, as bytes with their ends: no more than make an entry. */
  relay(from: Reader, lines: Uint8Array): void {
    this.#append(this.stamp() + this.mark(from), lines, Kind.Said, from);
  }

  /** What stands before a line that `from` says. */
  mark(from: Reader): string {
    return this.options.raw ? "" : `[${from.name}] `;
  }

  /** Begins with lines that were said before, each with the time of it. */
  restoreHistory(lines: { time: Date; line: string }[]): void {
    for (const { time, line } of lines) {
      this.#history?.add(encoder.encode(`${this.stamp(time)}${line}\n`));
    }
  }

  /** The last lines said, for a newcomer. */
  get history(): Uint8Array {
    return this.#history?.bytes ?? NO_BYTES;
  }

  /** Tells one reader something, in its place among what the room hears. */
  tell(reader: Reader, content: string | Uint8Array, from?: Reader): void {
    if (!reader.inside) reader.send(content);
    else if (typeof content === "string") {
      this.#append(content, NO_BYTES, Kind.Told, from, reader);
    } else this.#append("", content, Kind.Told, from, reader);
  }

  /** `from` speaks to `to` alone. */
  sayPrivately(from: Reader, to: Reader, text: string): void {
    const time = this.stamp();
    this.tell(to, `${time}[${from.name} -> you] ${text}\n`, from);
    this.tell(from, `${time}[you -> ${to.name}] ${text}\n`);
    if (!to.ignored?.has(from.id)) to.correspondent = from;
  }

  /** The room's own words to everyone. Who ignores someone hears of that one's
   * new name too, or could not name whom to hear again. */
  notice(text: string): void {
    this.#append(`* ${text}\n`, NO_BYTES, Kind.Told);
  }

  /** The time of day before a line said, if it is wanted. */
  stamp(time?: Date): string {
    if (!this.options.timestamps) return "";
    const moment = time?.getTime() ?? Date.now();
    const minute = Math.floor(moment / 60_000);
    if (minute !== this.#time.minute) {
      const text = new Date(moment).toTimeString().slice(0, 5) + " ";
      this.#time = { minute, text };
    }
    return this.#time.text;
  }

  /** In a small room at once; in a crowd one line a second, lest comings drown
   * the talk, and past a thousand people seldomer, lest they keep the server
   * busy: a thousand deliveries a second at most. */
  #tellComing(what: Coming, reader: Reader, reason: string): void {
    if (this.options.raw || this.closed) return;
    if (this.people.size <= CROWD && this.#crowdTimer === undefined) {
      const text = comingText(what, reader.name, reason);
      return this.#noticeComing(text, reader);
    }
    this.#comings.add(what, reader.name, reason);
    const wait = Math.max(1_000, this.people.size);
    this.#crowdTimer ??= setTimeout(() => this.#tellCrowd(), wait);
  }

  #tellCrowd(): void {
    this.#noticeComing(this.#comings.text);
    this.#comings = new Comings();
    this.#crowdTimer = undefined;
  }

  #noticeComing(text: string, of?: Reader): void {
    this.#append(`* ${text}\n`, NO_BYTES, Kind.Coming, of);
  }

  /** Says the last line that anyone hears. */
  close(): void {
    this.closed = true;
    clearTimeout(this.#crowdTimer);
    const line = this.options.raw ? "Shutdown Server\n" : "* Shutdown Server\n";
    for (const reader of this.readers) if (!reader.inside) reader.send(line);
    this.#append(line, NO_BYTES, Kind.Told);
  }

  // -- the log

  #append(
    text: string,
    lines: Uint8Array,
    kind: Kind,
    from?: Reader,
    to?: Reader,
  ): void {
    const entry = {
      end: 0,
      from: from?.id ?? SERVER,
      to: to?.id ?? EVERYONE,
      kind,
      time: this.options.log ? Date.now() : 0,
    };
    let added = this.#tail.add(text, lines, entry);
    if (added === 0) {
      this.#moveWindow();
      added = this.#tail.add(text, lines, entry);
    }
    const number = this.nextEntry - 1;
    to?.markSpecial(number);
    if (from) {
      from.markSpecial(number);
      if (from.ignoredBy) {
        for (const reader of from.ignoredBy) reader.markSpecial(number);
      }
    }
    if (kind === Kind.Coming) {
      for (const reader of this.quiet) reader.markSpecial(number);
    }

    if (kind === Kind.Said && this.#history !== null) {
      this.#history.add(this.#tail.entry(number - this.#tail.first).slice());
    }
    this.countInput(added);
    this.#flushSoon(kind === Kind.Said ? from : undefined);
  }

  /** Counts bytes that were taken in, towards {@linkcode crowded}. */
  countInput(count: number): void {
    this.#added += count;
    if (this.#added > TURN_BYTES / 4) this.#endTurnSoon();
  }

  /** Has everyone written what was added: at the end of the turn, together with
   * what else is said in it, or at once if one person alone is talking and the
   * end of the turn is not awaited for another reason. */
  #flushSoon(speaker: Reader | undefined): void {
    // There is nothing to wait for then: between two people a line takes a tenth
    // less time.
    const alone = speaker !== undefined && speaker === this.#lastSpeaker;
    this.#lastSpeaker = speaker;
    if (alone && !this.#turnEnding) return this.#flush();
    this.#flushDue = true;
    this.#endTurnSoon();
  }

  #endTurnSoon(): void {
    if (this.#turnEnding) return;
    this.#turnEnding = true;
    // Not a microtask, which would come before the other reads of this turn: what
    // they bring leaves in the same writes. While ten talk as fast as they are
    // heard, a thousand are given twice as much, a hundred no less.
    setImmediate(this.#endTurn);
  }

  #endTurn = (): void => {
    this.#turnEnding = false;
    this.#added = 0;
    if (this.#flushDue) this.#flush();
  };

  #flush(): void {
    this.#flushDue = false;
    // Where they are not too many it begins anywhere, lest the same people always
    // be the last to hear. What the first answer comes while the others are
    // written to: while ten talk as fast as they are heard, a hundred are given
    // a fifth more.
    const { readers } = this, { size } = readers;
    const first = size > HALL ? 0 : Math.floor(Math.random() * size);
    let place = 0;
    for (const reader of readers) if (place++ >= first) reader.pump();
    place = 0;
    for (const reader of readers) {
      if (place++ === first) break;
      reader.pump();
    }
  }

  #moveWindow(): void {
    this.#tail = this.#tail.next = new Segment(this.nextEntry);
    if (++this.#segments <= WINDOW_SEGMENTS) return;
    this.#segments--;
    this.#head = this.#head.next!;
    // Now, not when its write ends: it may never end.
    for (const reader of this.readers) {
      if (reader.isBehind(this.#head)) reader.tooSlow();
    }
  }
}

// ---------------------------------------------------------------------------
// Client: one person's connection. It is read into lines, which are paced, and
// hears the room until it leaves.
// ---------------------------------------------------------------------------

/** The least and the most that is read at once, in bytes. Who only listens has
 * the least waiting; a full read makes it eight times that. */
const LEAST_READ_BYTES = 256, MOST_READ_BYTES = 65_536;

/** The most that waits for one who is paced, as what was read has to wait here,
 * or who has said all for now, lest one who was busy once cost more ever after. */
const RESTING_READ_BYTES = 2_048;

/** How many seconds' worth of lines a client has in hand at the start. */
const BURST_SECONDS = 5;

/** How long to wait between reads of what one who leaves goes on sending. */
const DISCARD_MILLISECONDS = 10;

/** How long input waits at most when too much came in a turn. Each client waits
 * a time of its own, lest the same one always be the first. */
const CROWDED_MILLISECONDS = 4;

/** How long one who leaves is given to take what is still due to it. */
const LINGER_MILLISECONDS = 1_000;

/** The first line of an HTTP request (RFC 9112, section 3), or its first piece,
 * if it is too long for one. */
const HTTP_REQUEST = /^[A-Z]+ \S+ HTTP\/\d|^[A-Z]+ \S{4000,}$/;

/** How a TLS handshake begins (RFC 8446, 5.1): it is no talk either. */
const TLS_HANDSHAKE = [0x16, 0x03];

/** What the server needs of a connection: TCP is one kind of door to the room. */
export interface Connection {
  /** Reads into `buffer`; resolves to the number of bytes, `null` at the end. */
  read(buffer: Uint8Array): Promise<number | null>;
  /** Writes some of `bytes`; resolves to how many. */
  write(bytes: Uint8Array): Promise<number>;
  /** Ends both directions at once, with whatever is pending. */
  close(): void;
  /** Ends what is written (a half-close), where the connection can do that. */
  closeWrite?(): Promise<void>;
}

/** What a client does not know itself but asks of its server. */
interface ClientEvents {
  /** A line that begins with a slash. */
  command(client: Client, line: string): void;
  /** It has left the room. */
  left(client: Client, reason: string): void;
}

/** For one who is never let in: nobody hears of its leaving. */
const UNHEARD: ClientEvents = { command() {}, left() {} };

/** Closes what may be closed already. */
function tryClose(connection: { close(): void }): void {
  try {
    connection.close();
  } catch { /* it was */ }
}

/** How many bytes the least read buffers are cut from: sixteen share one
 * allocation, which saves 0.6 KB a client (of 9.7). */
const SLAB_BYTES = 4_096;

let slab = new ArrayBuffer(SLAB_BYTES), slabUsed = 0;

function leastBuffer(): Uint8Array {
  if (slabUsed === SLAB_BYTES) {
    slab = new ArrayBuffer(SLAB_BYTES);
    slabUsed = 0;
  }
  const buffer = new Uint8Array(slab, slabUsed, LEAST_READ_BYTES);
  slabUsed += LEAST_READ_BYTES;
  return buffer;
}

class Client extends Reader {
  /** Who gets the next line instead of the room: the asker of a question. */
  asker: ((line: string) => void) | null = null;
  #leaving = false;
  #closed = false;
  #deaf = false;
  /** Nothing more will come from it. */
  #ended = false;
  /** All that is due to it has been written, and so will be the end. */
  #finished = false;
  /** The end of the stream has been written. */
  #endWritten = false;
  /** Its first line was looked at. */
  #spoken = false;
  /** How many bytes of a TLS handshake it began with; -1 if with others. */
  #handshake = 0;
  #buffer: Uint8Array = leastBuffer();
  /** Made with the first words: many only listen. */
  #splitter: LineSplitter | null = null;
  /** Lines that wait for their time, from the byte at `#nextHeld` on. */
  #held: Uint8Array = NO_BYTES;
  #nextHeld = 0;
  #tokens: number;
  #refilled = 0;
  #pauseTimer: Timer | undefined;
  /** For an answer that is asked for, and at the end for what is still due. */
  #deadline: Timer | undefined;
  /** When it came, in milliseconds of `performance.now`. */
  readonly since = performance.now();

  constructor(
    room: Room,
    readonly connection: Connection,
    /** Where it comes from: an address, and the port there. */
    readonly address: string,
    readonly port: number,
    readonly events: ClientEvents,
  ) {
    super(room);
    this.#tokens = room.options.rate * BURST_SECONDS;
  }

  /** Whether it hears and says nothing more. */
  get leaving(): boolean {
    return this.#leaving;
  }

  /** Its address and port, in the usual form. */
  get origin(): string {
    return formatAddress(this.address, this.port);
  }

  // -- reading

  /** Reads on until the end. */
  read(): void {
    try {
      this.connection.read(this.#buffer).then(this.#received, this.#readFailed);
    } catch {
      this.#readFailed();
    }
  }

  #received = (count: number | null): void => {
    if (this.#closed) return;
    if (count === null) {
      this.#ended = true;
      if (this.#leaving) return this.#endWritten ? this.#close() : undefined;
      this.#held = this.#splitter?.end() ?? NO_BYTES;
    } else {
      if (this.#leaving) { // look at nothing more of it, and not too often
        this.#pauseTimer = setTimeout(() => this.read(), DISCARD_MILLISECONDS);
        return;
      }
      const chunk = this.#buffer.subarray(0, count);
      if (this.#handshake >= 0 && this.#beginsTls(chunk)) {
        return this.leave("TLS, which is off");
      }
      this.#splitter ??= new LineSplitter();
      this.#held = this.#splitter.push(chunk);
      if (this.#held.length === 0) this.#payForNothing(count);
      this.#sizeBuffer(count);
      if (this.#splitter.reply) this.#replyToTelnet(this.#splitter.reply);
    }
    this.#hearHeld();
  };

  /** Whether its first bytes, which may come one by one, begin a handshake. */
  #beginsTls(chunk: Uint8Array): boolean {
    for (const byte of chunk) {
      if (byte !== TLS_HANDSHAKE[this.#handshake++]) {
        this.#handshake = -1;
        return false;
      }
      if (this.#handshake === TLS_HANDSHAKE.length) return true;
    }
    return false;
  }

  #readFailed = (): void => {
    if (this.#leaving) this.#close();
    else this.leave("", { drain: false });
  };

  #sizeBuffer(count: number): void {
    const size = this.#buffer.length;
    const paced = this.room.options.rate > 0;
    const most = paced ? RESTING_READ_BYTES : MOST_READ_BYTES;
    if (count === size) {
      if (size < most) this.#buffer = new Uint8Array(Math.min(size * 8, most));
    } else if (count <= LEAST_READ_BYTES) {
      if (size > LEAST_READ_BYTES) this.#buffer = leastBuffer();
    } else if (size > RESTING_READ_BYTES) {
      this.#buffer = new Uint8Array(RESTING_READ_BYTES);
    }
  }

  /** Bytes that make no line cost what as many of a long line would: they are
   * work, and could keep the server from everyone else. */
  #payForNothing(count: number): void {
    this.#tokens -= count / LINE_BYTES;
    this.room.countInput(count);
  }

  #replyToTelnet(reply: Uint8Array): void {
    this.#splitter!.reply = null;
    this.room.tell(this, reply);
    this.#tokens--; // it costs a line, or it could be had without a bound
  }

  /** Gives the lines held to the room, as fast as they may come, and then reads
   * on: what is not read, TCP holds back at the sender. Nothing is dropped. */
  #hearHeld(): void {
    for (;;) {
      const done = this.#nextHeld === this.#held.length;
      if (this.#leaving || (done && this.#ended)) break;
      const pause = this.#pause();
      if (pause !== null) {
        this.#pauseTimer = setTimeout(() => this.#hearHeld(), pause);
        return;
      }
      if (done) break;
      this.#hearSome();
    }
    if (this.#closed) return;
    this.#held = NO_BYTES;
    this.#nextHeld = 0;
    if (!this.#ended) this.read();
    else if (!this.#leaving) this.leave("");
  }

  /** How many milliseconds the next line has to wait, or `null`. */
  #pause(): number | null {
    if (this.room.crowded) return Math.random() * CROWDED_MILLISECONDS;
    const { rate } = this.room.options;
    if (rate === 0) return null;
    // A token bucket: `rate` lines a second, BURST_SECONDS' worth at most.
    const now = performance.now();
    const earned = (now - this.#refilled) * rate / 1_000;
    this.#tokens = Math.min(this.#tokens + earned, rate * BURST_SECONDS);
    this.#refilled = now;
    return this.#tokens >= 1 ? null : (1 - this.#tokens) * 1_000 / rate;
  }

  /** Hears the next lines held: a run of talk as one entry, or one other line. */
  #hearSome(): void {
    const held = this.#held, start = this.#nextHeld;
    let end = held.indexOf(LF, start) + 1;
    this.#nextHeld = end;
    const first = () => decoder.decode(held.subarray(start, end - 1));
    if (!this.#spoken) {
      this.#spoken = true;
      if (HTTP_REQUEST.test(first())) return this.#refuseHttp();
    }
    const { rate, raw } = this.room.options;
    if (this.asker !== null || (!raw && held[start] === SLASH)) {
      this.#tokens--;
      if (this.asker !== null) this.asker(first());
      else this.events.command(this, first());
      return;
    }
    const most = rate === 0
      ? ENTRY_LINES
      : Math.min(Math.floor(this.#tokens), ENTRY_LINES);
    let lines = 1;
    while (
      end < held.length && lines < most && end - start < ENTRY_BYTES &&
      (raw || held[end] !== SLASH)
    ) {
      end = held.indexOf(LF, end) + 1;
      lines++;
    }
    this.#nextHeld = end;
    this.#tokens -= lines;
    this.room.relay(this, held.subarray(start, end));
  }

  #refuseHttp(): void {
    const text = "This is a Parley chat room, not a web site.\n" +
      "Join it from a terminal: nc HOST PORT\n";
    this.room.tell(
      this,
      `HTTP/1.1 400 Bad Request\r\nContent-Type: text/plain\r\n` +
        `Content-Length: ${text.length}\r\nConnection: close\r\n\r\n${text}`,
    );
    this.leave("a web request");
  }

  // -- hearing

  protected write(bytes: Uint8Array): Promise<number> {
    return this.connection.write(bytes);
  }

  protected override writeFailed(): void {
    // It is gone, but may have said something before: the read will tell.
    this.#deaf = true;
    if (this.#leaving) this.#close();
  }

  tooSlow(): void {
    if (this.#leaving) this.#close();
    else this.leave(TOO_SLOW, { drain: false });
  }

  // -- leaving

  /** Does something unless the deadline is lifted before. */
  setDeadline(milliseconds: number, late: () => void): void {
    this.liftDeadline();
    this.#deadline = setTimeout(late, milliseconds);
  }

  liftDeadline(): void {
    clearTimeout(this.#deadline);
  }

  /** Sends it away, and tells it why. */
  dismiss(how: "kicked" | "banned", why: string): void {
    const reason = why ? `${how}: ${why}` : how;
    if (!this.room.options.raw) this.room.tell(this, `! You were ${reason}.\n`);
    this.leave(reason);
  }

  /** Leaves the room. What it has not heard yet is still sent, for a second at
   * most, unless `drain` is false. */
  leave(reason: string, { drain = true } = {}): void {
    if (this.#leaving) {
      if (this.room.closed && this.#endWritten) this.#close();
      return;
    }
    this.#leaving = true;
    this.endLog();
    this.room.leave(this, reason);
    this.events.left(this, reason);
    if (!drain || this.#deaf) return this.#close();
    this.setDeadline(LINGER_MILLISECONDS, () => this.#close());
    this.pump();
  }

  protected finished(): void {
    if (this.#finished) return;
    this.#finished = true;
    this.#endWrite();
  }

  async #endWrite(): Promise<void> {
    const { connection } = this;
    if (!connection.closeWrite) return this.#close();
    try {
      // To close with something unread would reset the connection, and what was
      // sent last could be lost on the way: end this side, and await the other.
      await connection.closeWrite();
      this.#endWritten = true;
      if (!this.#ended && !this.room.closed) return;
    } catch { /* it is gone */ }
    this.#close();
  }

  #close(): void {
    if (this.#closed) return;
    this.#closed = true;
    clearTimeout(this.#pauseTimer);
    this.liftDeadline();
    this.dropLog();
    this.#buffer = NO_BYTES;
    this.#held = NO_BYTES;
    this.#splitter = this.ignored = null;
    tryClose(this.connection);
    this.room.forget(this);
  }
}

// ---------------------------------------------------------------------------
// Commands: what a line that begins with a slash does. /help is printed from
// the same table.
// ---------------------------------------------------------------------------

interface Command<Actor extends Reader> {
  name: string;
  /** What is typed after the name: needed, unless it stands in brackets. */
  arguments?: string;
  help: string;
  run(actor: Actor, text: string): void;
}

/** The first word of a command's text, and what stands after it. */
function firstWord(text: string): [word: string, rest: string] {
  const [, word, rest] = /^(\S*)\s*(.*)$/.exec(text)!;
  return [word, rest];
}

/** Does what a line that begins with a slash says. */
function obey<Actor extends Reader>(
  commands: Command<Actor>[],
  actor: Actor,
  line: string,
): void {
  if (line.charCodeAt(1) === SLASH) {
    return actor.room.say(actor, line.slice(1));
  }
  const [name, rest] = firstWord(line.slice(1));
  const text = rest.trimEnd(); // not by the expression: that is quadratic
  const command = commands.find((it) => it.name === name.toLowerCase());
  if (command !== undefined) {
    const missing = text === "" && /^\w/.test(command.arguments ?? "");
    if (missing) fail(actor, `Type ${usage(command)}.`);
    else command.run(actor, text);
  } else if (name.toLowerCase() === "help") {
    actor.room.tell(actor, helpLines(commands));
  } else {
    const typed = name.slice(0, 24);
    fail(
      actor,
      `There is no command /${typed}. Type /help for a list, //${typed} to say it.`,
    );
  }
}

function helpLines<Actor extends Reader>(commands: Command<Actor>[]): string {
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

/** Tells a reader what was wrong with its command, and what to do. */
function fail(reader: Reader, text: string): void {
  reader.room.tell(reader, `! ${text}\n`);
}

function findPerson(asker: Reader, name: string): Reader | null {
  const person = asker.room.find(name);
  if (person) return person;
  fail(asker, `Nobody here is called ${name}. Type /who for who is here.`);
  return null;
}

/** What a reason that the server gives begins with; typed, it is put in quotes. */
const SERVER_REASON =
  /^\P{L}*(too slow|kicked|banned|TLS|a web request|no (?:name|password|TLS))/iu;

/** How many people one can ignore. */
const MOST_IGNORED = 1_000;

const COMMANDS: Command<Client>[] = [
  {
    name: "nick",
    arguments: "NAME",
    help: "take another name",
    run(client, text) {
      const { room } = client, name = normalizeName(text);
      const refusal = room.refusal(name, client);
      if (refusal) fail(client, `${refusal} Choose one with /nick NAME.`);
      else if (name === client.name) fail(client, `You are ${name} already.`);
      else {
        room.notice(`${client.name} is now known as ${name}`);
        room.setName(client, name!);
      }
    },
  },
  {
    name: "who",
    help: "who is here",
    run: (client) => client.room.tell(client, client.room.whoIsHere()),
  },
  {
    name: "me",
    arguments: "ACTION",
    help: "do something: /me waves",
    run: (client, text) => client.room.say(client, text, `** ${client.name} `),
  },
  {
    name: "msg",
    arguments: "NAME TEXT",
    help: "say something to one person alone",
    run(client, text) {
      const [name, message] = firstWord(text);
      if (!message) return fail(client, `Type /msg NAME TEXT.`);
      const person = findPerson(client, name);
      if (person) client.room.sayPrivately(client, person, message);
    },
  },
  {
    name: "reply",
    arguments: "TEXT",
    help: "answer the last who spoke to you alone",
    run(client, text) {
      const { room, correspondent } = client;
      if (correspondent === null) {
        fail(client, "Nobody has spoken to you alone. Type /msg NAME TEXT.");
      } else if (room.find(correspondent.name) !== correspondent) {
        fail(client, `${correspondent.name} has left the room.`);
      } else room.sayPrivately(client, correspondent, text);
    },
  },
  {
    name: "ignore",
    arguments: "NAME",
    help: "do not hear NAME (again to stop that)",
    run(client, text) {
      const person = findPerson(client, text);
      if (person === null) return;
      const { name } = person;
      if (person === client) fail(client, "That is you. Type another's name.");
      else if (client.stopIgnoring(person)) {
        client.room.tell(client, `* You hear ${name} again.\n`);
      } else if (client.countIgnored() === MOST_IGNORED) {
        fail(client, `You ignore ${MOST_IGNORED} people, which is the most.`);
      } else {
        client.ignore(person);
        client.room.tell(
          client,
          `* You do not hear ${name} now. Type /ignore ${name} to stop that.\n`,
        );
      }
    },
  },
  {
    name: "quiet",
    help: "do not hear who enters and leaves (again to stop that)",
    run(client) {
      const { room } = client;
      if (room.quiet.delete(client)) {
        room.tell(client, "* You hear who enters and leaves again.\n");
      } else {
        room.quiet.add(client);
        room.tell(
          client,
          "* You do not hear who enters and leaves now. Type /quiet to stop that.\n",
        );
      }
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
// Gate: who may come in at all, by address and by password.
// ---------------------------------------------------------------------------

class Gate {
  /** The addresses that the operator has banned. */
  readonly banned = new Set<string>();
  #admits: (address: string) => boolean = () => true;
  #isPassword: ((text: string) => boolean) | null = null;

  /** Whether its rules can be applied. */
  readonly ready: Promise<void>;

  /** @param password what must be given, if it is not empty */
  constructor(networks: string[], password: string) {
    this.ready = Promise.all([
      networks.length > 0 ? this.#useNetworks(networks) : null,
      password ? this.#usePassword(password) : null,
    ]).then(() => {});
  }

  get asksPassword(): boolean {
    return this.#isPassword !== null;
  }

  admits(address: string): boolean {
    return !this.banned.has(address) && this.#admits(address);
  }

  isPassword(text: string): boolean {
    return this.#isPassword?.(text) ?? true;
  }

  // node:net and node:crypto take 35 ms and 9 MB at start-up: only a room that
  // needs one loads it.

  async #useNetworks(networks: string[]): Promise<void> {
    const { BlockList } = await import("node:net");
    const family = (address: string) => address.includes(":") ? "ipv6" : "ipv4";
    const list = new BlockList();
    for (const network of networks) {
      const { address, prefix } = parseNetwork(network)!;
      list.addSubnet(address, prefix, family(address));
    }
    this.#admits = (address) => {
      const canonical = canonicalAddress(address);
      return canonical !== null && list.check(canonical, family(canonical));
    };
  }

  async #usePassword(password: string): Promise<void> {
    const { createHash, timingSafeEqual } = await import("node:crypto");
    // Digests have one length, so that no comparison ends early.
    const digest = (text: string) => createHash("sha256").update(text).digest();
    const expected = digest(password);
    this.#isPassword = (text) => timingSafeEqual(digest(text), expected);
  }
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

// ---------------------------------------------------------------------------
// Transcript: what is said, kept in a file. A reader of the log like any other:
// it writes in batches, and a slow disk delays nobody.
// ---------------------------------------------------------------------------

/** How much is written to the file at once, in characters. */
const TRANSCRIPT_BATCH = 65_536;

/** How long to wait before writing again to a disk that failed. */
const DISK_RETRY_MILLISECONDS = 1_000;

/** A line of the file: the time, and what was said. */
const TRANSCRIPT_LINE = /^(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z) (.+)$/;

class Transcript extends Reader {
  readonly #file: Deno.FsFile;
  /** It was said that lines are late or lost, and none has been written since. */
  #troubled = false;
  #retry: Timer | undefined;
  #deadline: Timer | undefined;

  /** Opens the file, and takes the history from it. */
  constructor(
    room: Room,
    readonly path: string,
    readonly warn: (line: string) => void,
  ) {
    super(room);
    this.#file = Deno.openSync(path, {
      read: true,
      append: true,
      create: true,
    });
    const { isFile, size } = this.#file.statSync();
    if (!isFile || size === 0) return;
    // The end is enough, however large the file is: as many of the longest lines
    // (three bytes a byte, where an invalid one became U+FFFD), or as much as the
    // history keeps and as much again for the times.
    const most = Math.min(
      (room.options.history + 1) * (3 * LINE_BYTES + 256),
      2 * HISTORY_BYTES,
    );
    this.#file.seekSync(Math.max(0, size - most), Deno.SeekMode.Start);
    const tail = readFully(this.#file, Math.min(size, most));
    if (tail.at(-1) !== LF) this.#file.writeSync(Uint8Array.of(LF));
    if (room.options.history === 0 || room.options.raw) return;
    // What was cut off may be the middle of a line, which anyone can have made
    // to look like the beginning of one.
    const start = size > most ? tail.indexOf(LF) + 1 : 0;
    const text = decoder.decode(tail.subarray(start));
    const lines = splitLines(text).flatMap((line) => {
      const [, stamp, said] = TRANSCRIPT_LINE.exec(line) ?? [];
      const time = new Date(stamp);
      return Number.isNaN(time.getTime()) ? [] : [{ time, line: said }];
    });
    room.restoreHistory(lines.slice(-room.options.history));
  }

  protected override batch(segment: Segment, index: number): Batch {
    const { entries } = segment, stampLength = this.room.stamp().length;
    let text = "";
    for (; index < entries.length && text.length < TRANSCRIPT_BATCH; index++) {
      const { kind, time } = entries[index];
      if (kind !== Kind.Said) continue;
      const start = new Date(time).toISOString() + " ";
      for (const line of decoder.decode(segment.entry(index)).split("\n")) {
        if (line) text += start + line.slice(stampLength) + "\n";
      }
    }
    return { bytes: encoder.encode(text), end: index };
  }

  protected async write(bytes: Uint8Array): Promise<number> {
    try {
      const count = await this.#file.write(bytes);
      this.#troubled = false;
      return count;
    } catch (error) {
      this.#warn(`Cannot write: ${reason(error)}`);
      await new Promise((resolve) => {
        this.#retry = setTimeout(resolve, DISK_RETRY_MILLISECONDS);
      });
      return 0; // and the same again
    }
  }

  tooSlow(): void {
    this.#warn("Some lines are lost: the disk is slower than the talk");
    this.joinLog();
  }

  leave(): void {
    this.endLog();
    this.#deadline = setTimeout(() => this.finished(), LINGER_MILLISECONDS);
    this.pump();
  }

  protected finished(): void {
    clearTimeout(this.#deadline);
    clearTimeout(this.#retry);
    this.dropLog();
    this.close();
    this.room.forget(this);
  }

  /** Closes the file. */
  close(): void {
    this.#file.close();
  }

  #warn(text: string): void {
    if (this.#troubled) return;
    this.#troubled = true;
    this.warn(`${text} (--log ${this.path}; the room goes on)`);
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
// Console: the operator's seat. It hears what everyone hears, speaks as host,
// and keeps order.
// ---------------------------------------------------------------------------

class Console extends Reader {
  constructor(
    room: Room,
    readonly gate: Gate,
    readonly output: (line: string) => void,
    readonly stop: () => void,
  ) {
    super(room);
    this.name = HOST;
    this.joinLog();
  }

  /** Takes a line that the operator typed. */
  hear(typed: string): void {
    for (const line of linesOf(typed)) {
      if (line.charCodeAt(0) !== SLASH) this.room.say(this, line);
      else obey(CONSOLE_COMMANDS, this, line);
    }
  }

  /** All who are connected, whether they have a name or not. */
  get clients(): Client[] {
    return [...this.room.readers].filter((reader) => reader instanceof Client)
      .filter((client) => !client.leaving);
  }

  protected write(bytes: Uint8Array): Promise<number> {
    this.output(decoder.decode(bytes).trimEnd());
    return Promise.resolve(bytes.length);
  }

  tooSlow(): void {
    this.joinLog();
  }

  leave(): void {
    this.endLog();
    this.pump();
  }

  protected finished(): void {
    this.dropLog();
    this.room.forget(this);
  }
}

const CONSOLE_COMMANDS: Command<Console>[] = [
  {
    name: "who",
    help: "who is here, from where, for how long",
    run(host) {
      const { room, clients } = host;
      if (clients.length === 0) room.tell(host, "* Nobody is here.\n");
      for (const { name, origin, since } of clients) {
        const minutes = Math.floor((performance.now() - since) / 60_000);
        room.tell(host, `* ${name || "(no name)"} ${origin}, ${minutes} min\n`);
      }
    },
  },
  {
    name: "kick",
    arguments: "NAME [REASON]",
    help: "send somebody away",
    run(host, text) {
      const [name, why] = firstWord(text);
      const person = findPerson(host, name);
      if (person instanceof Client) person.dismiss("kicked", why);
    },
  },
  {
    name: "ban",
    arguments: "NAME|ADDRESS [REASON]",
    help: "send somebody away, and keep the address out",
    run(host, text) {
      const [whom, why] = firstWord(text);
      const person = host.room.find(whom);
      const address = person instanceof Client
        ? person.address
        : canonicalAddress(whom);
      if (address === null) {
        return fail(
          host,
          `Nobody here is called ${whom}, and it is no address.`,
        );
      }
      host.gate.banned.add(address);
      host.room.tell(host, `* ${address} is banned.\n`);
      for (const client of host.clients) {
        if (client.address === address) client.dismiss("banned", why);
      }
    },
  },
  {
    name: "unban",
    arguments: "ADDRESS",
    help: "let an address in again",
    run(host, text) {
      const address = canonicalAddress(text) ?? text;
      if (host.gate.banned.delete(address)) {
        host.room.tell(host, `* ${address} is no longer banned.\n`);
      } else fail(host, `${text} is not banned. Type /banned for who is.`);
    },
  },
  {
    name: "banned",
    help: "which addresses are banned",
    run(host) {
      const { room, gate } = host;
      if (gate.banned.size === 0) room.tell(host, "* Nobody is banned.\n");
      for (const address of gate.banned) {
        room.tell(host, `* ${address} is banned.\n`);
      }
    },
  },
  { name: "quit", help: "stop the server", run: (host) => host.stop() },
];

// ---------------------------------------------------------------------------
// Server: the listener, who is let in, and the end.
// ---------------------------------------------------------------------------

/** How long to wait when the system accepts no connections for the moment, and
 * how seldom to say again that it does not. */
const ACCEPT_RETRY_MILLISECONDS = 100, ACCEPT_REPORT_MILLISECONDS = 60_000;

/** How long a newcomer has for what must come before anything else: TLS's
 * handshake, the password. */
const PATIENCE_MILLISECONDS = 30_000;

/** How many wrong passwords are too many. */
const PASSWORD_TRIES = 3;

/** Where a server's own words go; by default nowhere. */
export interface Reports {
  /** Comings and goings, a line each. */
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
  /** The address that it listens on; a port that was 0 is the real one here. */
  readonly addr: Deno.NetAddr;
  /** Resolves when the server has stopped and every connection is closed. */
  readonly finished: Promise<void>;
  readonly #options: Options;
  readonly #reports: Required<Reports>;
  readonly #listener: Deno.TcpListener;
  readonly #tls: TlsEngine | null;
  readonly #room: Room;
  readonly #gate: Gate;
  /** How many of each address are here. */
  readonly #addresses = new Map<string, number>();
  #here = 0;
  readonly #accepting: Promise<void>;
  #stopped: Promise<void> | null = null;
  #lastAcceptReport = -Infinity;

  /** Use {@linkcode ChatServer.listen}. */
  private constructor(options: Options, reports: Reports) {
    this.#options = options;
    this.#reports = { print: guard(reports.print), warn: guard(reports.warn) };
    this.#room = new Room(options);
    // The files first: nobody shall knock at a door that does not open.
    const { host, port, passwordFile, tlsCert, tlsKey, log } = options;
    const password = passwordFile && readPassword(passwordFile);
    this.#tls = tlsCert ? openTls(tlsCert, tlsKey) : null;
    this.#gate = new Gate(options.allow, password);
    const transcript = log ? this.#openTranscript(log) : null;
    try {
      this.#listener = Deno.listen({ hostname: host, port });
    } catch (error) {
      transcript?.close();
      const where = formatAddress(host, port);
      throw openError(`Cannot listen on ${where}`, listenProblem(error), error);
    }
    this.addr = this.#listener.addr as Deno.NetAddr;
    this.#accepting = this.#accept();
    this.finished = this.#accepting.then(() => this.stop());
  }

  /**
   * Opens a room.
   *
   * @param options what differs from the defaults of the command line
   * @param reports where comings and goings, and troubles, are told
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
   * Stops the server: nobody is let in any more, everyone is told
   * `Shutdown Server`, has a second to take what is due, and is disconnected.
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
    // Later, as what it does can let promises run that come back here.
    return this.#stopped ??= Promise.resolve().then(() => this.#stop());
  }

  /**
   * Gives someone the operator's seat: to speak as `host`, to hear what everyone
   * hears, and to keep order by the commands that `/help` lists.
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
    const seat = new Console(
      this.#room,
      this.#gate,
      guard(print),
      () => this.stop(),
    );
    this.#room.readers.add(seat);
    for await (const line of lines) seat.hear(line);
  }

  /** Stops the server at the end of an `await using` block. */
  [Symbol.asyncDispose](): Promise<void> {
    return this.stop();
  }

  async #stop(): Promise<void> {
    this.#reports.print("Shutdown Server ......");
    this.#room.close();
    this.#listener.close();
    for (const reader of this.#room.readers) reader.leave("");
    await this.#room.emptied();
    await this.#accepting; // only then is the port free
  }

  async #accept(): Promise<void> {
    await this.#gate.ready;
    while (!this.#room.closed) {
      try {
        for await (const conn of this.#listener) {
          try {
            conn.setNoDelay(true); // a line does not wait for another to join it
            conn.setKeepAlive(true); // who vanished is noticed some day
            const connection = this.#tls
              ? new TlsConnection(conn, this.#tls)
              : conn;
            this.#admit(connection, conn.remoteAddr);
          } catch (error) { // its own trouble: the loop goes on
            tryClose(conn);
            this.#reports.warn(`Cannot admit a connection: ${reason(error)}`);
          }
        }
        return; // it is closed
      } catch (error) {
        // Out of descriptors, for one. The listener itself is still good.
        if (this.#room.closed) return;
        if (
          error instanceof Deno.errors.ConnectionAborted ||
          error instanceof Deno.errors.NotConnected
        ) continue; // that one has gone again
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
   * Lets someone in through another door than the TCP port: whatever can be read
   * and written can be a client, such as a Unix socket or a WebSocket.
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
    this.#gate.ready.then(() => this.#admit(connection, remote));
  }

  #admit(
    connection: Connection & { handshake?(): Promise<unknown> },
    remote: { hostname: string; port: number },
  ): void {
    const { maxClients, maxPerAddress } = this.#options;
    const address = plainAddress(remote.hostname);
    const fromHere = this.#addresses.get(address) ?? 0;
    if (this.#room.closed || !this.#gate.admits(address)) {
      return tryClose(connection);
    }
    const refusal = this.#here >= maxClients
      ? "The room is full. Try again later."
      : maxPerAddress > 0 && fromHere >= maxPerAddress
      ? "Too many here are from your address."
      : null;
    const client = new Client(
      this.#room,
      connection,
      address,
      remote.port,
      refusal === null ? this.#events : UNHEARD,
    );
    if (refusal !== null) {
      client.send(`! ${refusal}\n`);
      client.leave("");
      return client.read();
    }
    this.#addresses.set(address, fromHere + 1);
    this.#here++;
    this.#room.readers.add(client);
    if (connection.handshake) this.#shakeHands(client, connection.handshake());
    else this.#receive(client);
    this.#report(`New Connection from ${client.origin}`, client.name);
  }

  /** Waits for TLS, at the cost of nobody else. */
  #shakeHands(client: Client, handshake: Promise<unknown>): void {
    const fail = () => client.leave("no TLS", { drain: false });
    client.setDeadline(PATIENCE_MILLISECONDS, fail);
    handshake.then(() => {
      if (client.leaving) return client.read(); // banned meanwhile, say
      client.liftDeadline();
      this.#receive(client);
    }, fail);
  }

  /** Begins with a newcomer: asks what is to be asked, then lets it in. */
  #receive(client: Client): void {
    if (this.#gate.asksPassword) this.#askPassword(client);
    else this.#letIn(client);
    client.read();
  }

  #letIn(client: Client): void {
    if (this.#options.raw) client.joinLog();
    else if (this.#options.askName) this.#askName(client);
    else this.#enter(client, this.#room.guestName());
  }

  #askPassword(client: Client): void {
    const prompt = "* This room has a password. What is it?\n";
    // In a raw room the question is the only line that is not a relayed one.
    const answer = (why: string) => this.#options.raw || client.send(why);
    let tries = 0;
    client.send(prompt);
    client.setDeadline(PATIENCE_MILLISECONDS, () => {
      answer("! That took too long.\n");
      client.leave("no password");
    });
    client.asker = (line) => {
      if (this.#gate.isPassword(line)) {
        client.asker = null;
        client.liftDeadline();
        this.#letIn(client);
        this.#report(`Password given by ${client.origin}`, client.name);
      } else {
        answer("! That is not the password.\n");
        if (++tries < PASSWORD_TRIES) client.send(prompt);
        else client.leave("no password");
      }
    };
  }

  /** Asks for a name, as Protohackers' Budget Chat does. */
  #askName(client: Client): void {
    client.send("* Welcome to Parley. What is your name?\n");
    client.asker = (line) => {
      const name = normalizeName(line);
      const refusal = this.#room.refusal(name, client);
      if (refusal !== null) {
        client.send(`! ${refusal} Join again with another.\n`);
        return client.leave("no name");
      }
      client.asker = null;
      this.#enter(client, name!);
      this.#report(`Name given by ${client.origin}`, client.name);
    };
  }

  /** Greets a client, and lets it in under a name. */
  #enter(client: Client, name: string): void {
    const room = this.#room;
    const welcome =
      `* Welcome, ${name}. Type to talk, /nick NAME for a name, /help for more.\n`;
    client.send(
      this.#options.askName
        ? room.whoIsHere()
        : welcome + room.whoIsHere("nobody else yet"),
    );
    const { history } = room;
    if (history.length > 0) client.send(history);
    if (client.leaving) return; // too slow for so much
    room.setName(client, name);
    room.enter(client);
  }

  readonly #events: ClientEvents = {
    command: (client, line) => obey(COMMANDS, client, line),
    left: (client, reason) => {
      this.#here--;
      const { address, name } = client;
      const fromThere = this.#addresses.get(address)! - 1;
      if (fromThere > 0) this.#addresses.set(address, fromThere);
      else this.#addresses.delete(address);
      this.#report(`Connection closed by ${client.origin}`, name, reason);
    },
  };

  #openTranscript(path: string): Transcript {
    try {
      const { warn } = this.#reports;
      const transcript = new Transcript(this.#room, path, warn);
      this.#room.readers.add(transcript);
      transcript.joinLog();
      return transcript;
    } catch (error) {
      const flags = `--allow-read=${path} --allow-write=${path}`;
      throw openError(`Cannot open ${path}`, fileProblem(error, flags), error);
    }
  }

  #report(what: string, name: string, reason = ""): void {
    if (this.#options.quiet || this.#room.closed) return;
    const who = (name && `${name}, `) + (reason && `${reason}, `);
    this.#reports.print(`${what} (${who}${this.#here} here)`);
  }
}

/** An embedding program's function, whose errors are that program's own. */
function guard(report?: (line: string) => void): (line: string) => void {
  return (line) => {
    try {
      report?.(line);
    } catch (error) {
      reportError(error);
    }
  };
}

/** Why the room cannot be opened, and what to do. */
function listenProblem(error: unknown): string {
  if (error instanceof Deno.errors.NotCapable) {
    return `the network is not permitted (${granted("--allow-net")})`;
  }
  if (error instanceof Deno.errors.AddrInUse) {
    return "the port is in use (choose another with --port)";
  }
  if (error instanceof Deno.errors.AddrNotAvailable) {
    return "this machine does not have that address (choose one with --host)";
  }
  if (error instanceof Deno.errors.PermissionDenied) {
    return "the system does not permit it (choose a --port above 1023)";
  }
  return `${reason(error)} (choose an address with --host)`;
}

function readFile(path: string): string {
  try {
    return Deno.readTextFileSync(path);
  } catch (error) {
    const problem = fileProblem(error, `--allow-read=${path}`);
    throw openError(`Cannot read ${path}`, problem, error);
  }
}

function readPassword(path: string): string {
  const [password] = readFile(path).replace(/^\ufeff/, "").split(/\r?\n/);
  // What a client types comes cleaned, and in pieces if it is too long.
  const [typed, ...more] = linesOf(password);
  if (typed === password && more.length === 0) return password;
  throw openError(
    `Cannot use ${path}`,
    `its first line is to be the password, at most ${LINE_BYTES} bytes of UTF-8`,
  );
}

function openTls(certPath: string, keyPath: string): TlsEngine {
  const cert = readFile(certPath), key = readFile(keyPath);
  try {
    return new TlsEngine(cert, key);
  } catch (error) {
    throw error instanceof Deno.errors.NotCapable
      ? openError("Cannot speak TLS", listenProblem(error), error)
      : openError(
        `Cannot use ${certPath} with ${keyPath}`,
        `${reason(error)} (give a certificate and its own key, as PEM files)`,
        error,
      );
  }
}

function openError(what: string, why: string, cause?: unknown): OpenError {
  return new OpenError(`${what}: ${why}`, { cause });
}

/** How to grant a permission; to a binary it was when it was made, or never. */
function granted(flags: string): string {
  return `${Deno.build.standalone ? "compile" : "run"} it with ${flags}`;
}

/** Why a file cannot be opened, and what to do. */
function fileProblem(error: unknown, flags: string): string {
  if (error instanceof Deno.errors.NotCapable) {
    // Devices need more: Deno says "Requires all access".
    const all = error.message.includes("all access");
    return `it is not permitted (${granted(all ? "--allow-all" : flags)})`;
  }
  if (error instanceof Deno.errors.NotFound) return "there is no such file";
  if (error instanceof Deno.errors.PermissionDenied) {
    return "the system does not permit it (look at the file's owner and mode)";
  }
  return reason(error);
}

// ---------------------------------------------------------------------------
// Main: the program. It reads the command line, opens the room, and stops it on
// a signal.
// ---------------------------------------------------------------------------

/** How many characters may wait for an output that is not read. */
const MOST_UNPRINTED = 65_536;

/** How long lines are gathered between writes: when thousands come at once, a
 * write for each took two thirds of the time. */
const PRINT_MILLISECONDS = 10;

/**
 * An output of the program, written behind the room's back: neither a terminal
 * on hold (Ctrl-S) nor a pipe that nobody reads, or that is closed, stops it.
 * `console.log` would wait for them.
 */
class Printer {
  #waiting = "";
  #missed = 0;
  #gone = false;
  #written: Promise<void> | null = null;

  constructor(readonly output: { write(bytes: Uint8Array): Promise<number> }) {}

  print(line: string): void {
    if (this.#gone) return;
    if (this.#waiting.length > MOST_UNPRINTED) {
      this.#missed += line.split("\n").length;
    } else this.#waiting += line + "\n";
    this.#written ??= this.#write();
  }

  /** Resolves when all is written, or cannot be in that time. */
  async flush(milliseconds: number): Promise<void> {
    await Promise.race([this.#written, delay(milliseconds)]);
  }

  async #write(): Promise<void> {
    try {
      while (this.#waiting) {
        const bytes = encoder.encode(this.#waiting);
        this.#waiting = "";
        await writeAll(this.output, bytes);
        await delay(PRINT_MILLISECONDS);
        if (this.#missed) {
          this.#waiting += `(${this.#missed} lines not shown)\n`;
        }
        this.#missed = 0;
      }
    } catch {
      this.#gone = true;
    }
    this.#written = null;
  }
}

function leaveWith(message: string, status: number): never {
  console.error(`parley: ${message}`);
  Deno.exit(status);
}

async function main(args: string[]): Promise<void> {
  let commandLine: CommandLine;
  try {
    commandLine = parseOptions(args);
  } catch (error) {
    if (!(error instanceof UsageError)) throw error;
    return leaveWith(error.message, 2);
  }
  if (commandLine.help) return console.log(helpText().trimEnd());
  if (commandLine.version) return console.log(`parley ${config.version}`);

  const output = new Printer(Deno.stdout), errors = new Printer(Deno.stderr);
  let server: ChatServer;
  try {
    server = ChatServer.listen(commandLine.options, {
      print: (line) => output.print(line),
      warn: (line) => errors.print(`parley: ${line}`),
    });
  } catch (error) {
    if (!(error instanceof OpenError)) throw error;
    return leaveWith(error.message, 1);
  }

  const { hostname, port } = server.addr;
  const anywhere = hostname === "0.0.0.0" || hostname === "::";
  output.print(
    `Listening on ${formatAddress(hostname, port)}. ` +
      `Join with: nc ${anywhere ? "localhost" : hostname} ${port}`,
  );

  // Whoever stops the server, a signal or the operator, it ends like this.
  server.finished.then(async () => {
    await output.flush(LINGER_MILLISECONDS / 4);
    Deno.exit(0);
  });
  let stopping = false;
  const stopOn = (signal: Deno.Signal, number: number) =>
    Deno.addSignalListener(signal, () => {
      if (stopping) Deno.exit(128 + number);
      stopping = true;
      server.stop();
    });
  stopOn("SIGINT", 2);
  if (Deno.build.os === "windows") stopOn("SIGBREAK", 21);
  else stopOn("SIGTERM", 15);
  if (commandLine.console) {
    await server.operate(await typedLines(), (line) => output.print(line))
      .catch((error) => errors.print(`parley: The console ends: ${error}`));
  }
}

/** What is typed on standard input. Who is not asked for the console must leave
 * it alone: a terminal stops a background job that reads. */
async function typedLines(): Promise<ReadableStream<string>> {
  const { TextLineStream } = await import("@std/streams/text-line-stream");
  return Deno.stdin.readable.pipeThrough(new TextDecoderStream())
    .pipeThrough(new TextLineStream());
}

if (import.meta.main) await main(Deno.args);
