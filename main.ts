/**
 * Parley: a chat room for `nc`, `telnet` and any other client, in one file.
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
 * The room is one append-only log of encoded lines, and every client is a cursor
 * into it. A message costs the same to append however many people are in the
 * room, a slow client does not delay the others, and the log has one bound for all.
 *
 * The parts, from top to bottom: options, text, room, client, commands, server,
 * link, access, TLS, output, console, command line, main.
 *
 * @module
 */
import { concat } from "@std/bytes/concat";
import { parseArgs } from "@std/cli/parse-args";
import { closestString } from "@std/text/closest-string";
import { levenshteinDistance } from "@std/text/levenshtein-distance";
import config from "./deno.json" with { type: "json" };

// ---------------------------------------------------------------------------
// Options: what can be set, from the command line and by an embedding program.
// ---------------------------------------------------------------------------

/** What can be set of a room, with the defaults. The command line's options have the
 * same names. */
export class Options {
  /** Address or host name to listen on; `::` is IPv4 and IPv6. */
  host = "0.0.0.0";
  /** TCP port to listen on; 0 picks a free one. */
  port = 8008;
  /** Let other processes of this machine listen on the same port (Linux). */
  reusePort = false;
  /** Relay lines as they are: no names, notices, commands or history. */
  raw = false;
  /** Ask each client for a name before anything else. */
  askName = false;
  /** Put the time of day, `12:34 `, before messages and printed lines. */
  timestamps = false;
  /** How many of the last messages a new client is shown; with `askName`, if it is
   * not set, none. */
  history = 20;
  /** The file whose lines a new client is shown after the welcome; or none. */
  motd = "";
  /** Lines a second that each client may send; 0 is no limit. */
  rate = 20;
  /** How many clients may be connected. */
  maxClients = 10_000;
  /** How many of them from one address; 0 is no limit. */
  maxPerAddress = 0;
  /** Admit only these networks and addresses, such as `192.168.0.0/16`. */
  allow: string[] = [];
  /** The file that holds the password, which clients are asked for; or none. */
  passwordFile = "";
  /** The file of the certificate chain for TLS (PEM); with `tlsKey`, or none. */
  tlsCert = "";
  /** The file of its private key (PEM). */
  tlsKey = "";
  /** The file that messages are appended to, and the history is read from. */
  log = "";
  /** Do not report clients that connect and leave. */
  quiet = false;
}

const DEFAULTS = new Options();

/** Whether a room has commands, and words of its own for those who type them. */
function hasCommands({ raw, askName }: Options): boolean {
  return !raw && !askName;
}

/** What the command line asks for, as {@linkcode parseOptions} reads it. */
export interface CommandLine {
  /** The options that were given; what was not given is absent. */
  options: Partial<Options>;
  /** Let standard input be the operator's console. */
  console?: boolean;
  /** The port of the web page; 0 picks a free one. */
  web?: number;
  /** Networks of reverse proxies whose `X-Forwarded-For` is believed. */
  trustProxy?: string[];
  /** NATS servers by which the room is linked with others. */
  link?: string[];
  /** The name of this server among them. */
  linkAs?: string;
  /** The name of the room that they share. */
  linkRoom?: string;
  /** The file of the credentials for NATS. */
  linkCreds?: string;
  /** Print the help and exit. */
  help?: boolean;
  /** Print the version and exit. */
  version?: boolean;
}

/** Options that cannot be used; the message, one line, says what to do. */
export class UsageError extends Error {
  /** What kind of error it is. */
  override name = "UsageError";
}

/** A room that cannot be opened; the message, one line, says what to do. */
export class OpenError extends Error {
  /** What kind of error it is. */
  override name = "OpenError";
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
// Text: how bytes become lines, what a line may hold, and what a name is.
// ---------------------------------------------------------------------------

/** The longest line, in bytes. A longer message is passed on in pieces; a longer
 * command or answer is refused. */
const LINE_BYTES = 4_096;

/** The longest escape sequence that a key sends, about. */
const ESCAPE_BYTES = 32;

const NUL = 0, BS = 8, TAB = 9, LF = 10, CR = 13, NAK = 21, ESC = 27;
const SPACE = 32, SLASH = 47, TILDE = 126, DEL = 127;

/** Marks that {@linkcode LineSplitter} puts at the start of a line; none can be typed.
 * PIECE comes before each later piece of a long message. TOO_LONG stands for a command
 * or an answer that is too long, or for an empty answer; ERASED for the rest of a long
 * line in which something is erased. */
const PIECE = 1, TOO_LONG = 2, ERASED = 3;

type Timer = ReturnType<typeof setTimeout>;

const NO_BYTES = new Uint8Array(0), LINE_END = Uint8Array.of(LF);
const encoder = new TextEncoder();
// A byte order mark is dropped when a line is cleaned: if the decoder did it,
// only the first line of a chunk would lose it.
const decoder = new TextDecoder("utf-8", { ignoreBOM: true });

// How escape sequences begin (ECMA-48), in 7 and in 8 bits: control sequences, control
// strings (DCS, SOS, OSC, PM, APC), and single shifts (SS2, SS3).
const CSI = String.raw`(?:\x1b\[|\x9b)`;
const STRING = String.raw`(?:\x1b[\]PX^_]|[\x90\x98\x9d-\x9f])`;
const SHIFT = String.raw`(?:\x1b[NO]|[\x8e\x8f])`;

// Whole ones. node:util's stripVTControlCharacters leaves half of a title behind, takes
// letters of the text, and costs 10 ms at start-up. Every alternative is linear: none
// begins inside what another has read.
const ESCAPES = new RegExp(
  [
    CSI + String.raw`(?:\[[A-E]|[0-?]*[ -.]*[@-~])`, // keys of the Linux console too
    STRING + String.raw`[^\x07\x1b\x80-\x9f]*(?:\x07|\x1b\\|\x9c)`, // titles, links
    SHIFT + String.raw`[0-9;]*[@-~]`, // function keys
    String.raw`\x1b[()][0AB]|\x1b#[3-8]`, // character sets and sizes
  ].join("|"),
  "g",
);

// Control characters, line and paragraph separators, what turns the direction of
// text around (Unicode UAX #9), and the byte order mark.
const CONTROLS =
  // deno-lint-ignore no-control-regex
  /[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ufeff]/;

// What belongs to the character before it.
const MARK = /[\p{M}\u200d\p{VS}]/u;

/** A line that shows nothing. */
const BLANK = /^[\p{White_Space}\p{DI}\u2800]*$/v;

// What would hide the slash of a command. No character fits two alternatives, or a long
// run of them would take endlessly.
const HIDDEN_START = new RegExp(
  "^(?:" + [
    // Escape sequences that are broken off, in 7 and in 8 bits.
    String.raw`\x1b(?:\[[0-?]*[!-.]*|[\]PX\^_NO\(\)#]?[0-?]*)`,
    String.raw`\x9b[0-?]*[!-.]*|[\x8e-\x90\x98\x9d-\x9f][0-?]*`,
    // What shows nothing, or was no text; without what begins those sequences.
    String
      .raw`[[\p{White_Space}\p{DI}\p{Co}\p{Cn}\p{Cc}\u2028-\u202e\u2066-\u2069` +
    String.raw`\ufeff\ufffd]--[\x1b\x8e-\x90\x98\x9b\x9d-\x9f]]`,
  ].join("|") + ")+(?=/)",
  "v",
);

// Whether a chunk may hold a line that has to be changed.
const SUSPECT =
  // deno-lint-ignore no-control-regex
  /[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ufeff\ufffd]|^[\p{White_Space}\p{DI}\p{Co}\p{Cn}\u2800]|\t/mv;

/**
 * Removes from a line what could disturb a terminal or pass for another line:
 * escape sequences (ECMA-48) whole, what Backspace erases, and every other control
 * character, C1, separators and bidirectional controls. A TAB becomes spaces up
 * to the next multiple of 8, as it would keep a terminal at its last column.
 *
 * @param line one line of text, without its end
 * @param options `tabs`: whether a TAB stays, as in a raw room
 * @returns the line as others may receive it; empty if it would show nothing
 */
export function cleanLine(line: string, { tabs = false } = {}): string {
  const clean = CONTROLS.test(line)
    ? scrub(line.replace(ESCAPES, "\0"), tabs)
    : tabs
    ? line
    : showStart(line);
  return BLANK.test(clean) ? "" : clean;
}

/** Removes what hides a slash at the start of a line. Spaces of any kind become
 * plain ones there, so that a command behind them is found. A raw room has no
 * commands. */
function showStart(line: string): string {
  const first = line.charCodeAt(0);
  const isHidden = !(first > SPACE && first <= TILDE) && line.includes("/");
  if (!isHidden) return line;
  return line.replace(
    HIDDEN_START,
    (start) => start.replace(/\p{Zs}/gu, " ").replace(/[^ \t]/gu, ""),
  );
}

/** What a TAB fills after its first column, until the line is finished. */
const TAB_CELL = 1;

/** Where lines are scrubbed: to allocate it for each would take as long again. */
const scrubbed = new Uint16Array(LINE_BYTES + 8);

/** Removes control characters, and does what TAB asks for, and Backspace, DEL and
 * Ctrl-U of a client in raw mode, whose terminal edits nothing. One pass over all:
 * with an expression for each kind, such a line takes 20 to 40 times as long. */
function scrub(line: string, tabs: boolean): string {
  let text = tabs ? line : showStart(line), length = 0;
  let spare = LINE_BYTES - line.length; // negative for a long line of a file
  const units = spare < 0 ? new Uint16Array(line.length + 8) : scrubbed;
  for (let i = 0; i < text.length; i++) {
    const unit = text.charCodeAt(i);
    if (unit >= SPACE && unit <= TILDE) units[length++] = unit;
    else if (unit === BS || unit === DEL || unit === NAK) {
      const before = length;
      length = unit === NAK ? 0 : withoutLast(units, length);
      if (before === 0 || length > 0) continue;
      text = text.slice(i + 1); // the line begins here
      if (!tabs) text = showStart(text);
      i = -1;
    } else if (unit === TAB && !tabs) {
      // One space alone, where the line would grow too long.
      const width = spare > 8 ? 8 - length % 8 : 1;
      spare -= width - 1;
      units[length++] = SPACE;
      for (let cell = 1; cell < width; cell++) units[length++] = TAB_CELL;
    } else if (unit === TAB || !isControl(unit)) units[length++] = unit;
  }
  for (let i = 0; i < length; i++) if (units[i] === TAB_CELL) units[i] = SPACE;
  return Buffer.from(units.buffer, 0, 2 * length).toString("utf16le");
}

/** Whether a unit that is no printable ASCII is one of {@linkcode CONTROLS}. */
function isControl(unit: number): boolean {
  return unit < 0xa0 || (unit >= 0x2028 && unit <= 0x202e) ||
    (unit >= 0x2066 && unit <= 0x2069) || unit === 0xfeff;
}

/** Where the last character begins, with the marks that belong to it. */
function withoutLast(units: Uint16Array, length: number): number {
  while (length > 0) {
    const unit = units[--length];
    if (unit === TAB_CELL) continue;
    if (unit >= 0xdc00 && unit < 0xe000) return Math.max(0, length - 1);
    if (unit < 0x300 || !MARK.test(String.fromCharCode(unit))) return length;
  }
  return 0;
}

// Letters and digits of any script, and the marks that many write vowels with, but
// nothing that does not show, as the Hangul filler, a letter by its class.
const NAME =
  /^[[\p{L}\p{Nd}_\-]--\p{DI}][[\p{L}\p{M}\p{Nd}_\-]--\p{DI}]{0,23}$/v;

/** What lets two names look alike nevertheless: many marks on one letter, a dot on
 * an i that has one, and letters that are blank. */
const CONFUSING =
  /\p{M}{4}|[iIjJ\u0456\u0458]\u0307|[\u{13441}-\u{13446}\u{16fe4}]/u;

/** The longest text that is looked at as a name, in UTF-16 units. Normalizing
 * thousands of combining marks takes milliseconds. */
const NAME_UNITS = 200;

/** The operator's name. */
const HOST = "host";

/** Names that the server's own lines begin with, in all letters that look like theirs
 * in lower case. */
const RESERVED_NAME = (() => {
  const o = "[oоοօᴏ0ꓳⲟ]", e = "[eеεᴇєꓰꭼ3]", r = "[rгʀꓣꭱ]", s = "[sѕꜱտꓢꮪ5]";
  const host = `[hһнʜհηħꓧꮋ]${o}${s}[tтτᴛꓔꭲ]`;
  const you = `[yуүυʏγꓬ]${o}[uυսᴜꓴ]`;
  const server = `${s}${e}${r}[vνѵᴠꓦ]${e}${r}`;
  return new RegExp(`^(?:${host}|${you}|${server})$`, "u");
})();

const NAME_RULE = "A name is 1 to 24 letters, digits, _ or -.";

/**
 * Brings a name to the form in which the room shows it (Unicode NFKC).
 *
 * @param name what a person typed
 * @returns the name: 1 to 24 letters, digits, `_` or `-` of any script; `null` if
 * it cannot be one
 */
export function normalizeName(name: string): string | null {
  if (name.length > NAME_UNITS) return null;
  const normal = name.trim().normalize("NFKC");
  return NAME.test(normal) && !CONFUSING.test(normal) ? normal : null;
}

/** What two names have in common if they differ in case alone. Neither case is
 * enough: ẞ and ß meet in lower case, ς and σ, or ı and i, in upper case. */
function nameKey(name: string): string {
  if (/^[\w@-]*$/.test(name) || name.length > NAME_UNITS) {
    return name.toLowerCase();
  }
  return name.normalize("NFKC").toLowerCase().toUpperCase().toLowerCase()
    .normalize("NFKC");
}

/** Whether a name is reserved, or could be taken for one that is. */
function isReserved(name: string): boolean {
  const plain = nameKey(name).normalize("NFD").replace(/\p{M}/gu, "");
  return RESERVED_NAME.test(plain);
}

function delay(milliseconds: number): Promise<void> {
  return new Promise((resolve) => setTimeout(resolve, milliseconds));
}

/** Resolves when `promise` does, or when the time is over. */
async function atMost(
  milliseconds: number,
  promise: Promise<unknown>,
): Promise<void> {
  const { promise: late, resolve } = Promise.withResolvers<void>();
  const timer = setTimeout(resolve, milliseconds);
  await Promise.race([promise, late]);
  clearTimeout(timer);
}

// The telnet protocol (RFC 854): commands from 236 (RFC 1184) on, and those that
// something follows.
const FIRST_COMMAND = 236, SE = 240, DM = 242, IP = 244, AYT = 246, EC = 247;
const EL = 248, SB = 250, WILL = 251, WONT = 252, DO = 253, DONT = 254;
const IAC = 255;
const BINARY = 0; // RFC 856

/** How many bytes of replies to one read are enough to add no more. */
const MOST_REPLY_BYTES = 192;

/** States of {@linkcode TelnetFilter} beside the commands: text, and a sub-negotiation
 * without an end, up to the next line end. */
const TEXT = 0, LOST = 1;

/** Takes the telnet protocol out of a client's bytes, and makes one LF of each line
 * end: CR LF, CR NUL (RFC 854, page 11), and the CR alone that a client in raw mode
 * sends for Enter. */
class TelnetFilter {
  /** What the last bytes are to be answered with. */
  reply: number[] = [];
  /** What the user asked for by the last bytes: AYT, IP, or nothing. */
  request = 0;
  /** What the bytes so far end in: text, IAC, WILL, WONT, DO or DONT before its option,
   * SB (a sub-negotiation), SE (an IAC in it), or {@linkcode LOST}. */
  #state = TEXT;
  #afterCr = false;
  #afterDm = false;
  /** The bytes of the sub-negotiation. */
  #length = 0;
  #asked = false;

  /** Whether the next byte is text, and belongs to none before it. */
  get isInText(): boolean {
    return this.#state === TEXT && !this.#afterCr && !this.#afterDm;
  }

  /** The text of a chunk. An IAC that no command follows is dropped, as UTF-8 has no
   * such byte, and so is a DM that begins no character: the system takes the urgent
   * byte of a Synch out, which is one of these two (RFC 854, page 9). */
  filter(chunk: Uint8Array): Uint8Array {
    const text = new Uint8Array(chunk.length + 1); // and a DM of the last chunk
    let length = 0;
    const add = (byte: number) => {
      const isContinued = byte >= 0x80 && byte < 0xc0; // a character
      if (this.#afterDm && isContinued) text[length++] = DM;
      this.#afterDm = byte === DM;
      if (byte === DM) return;
      const isSecond = this.#afterCr && (byte === LF || byte === NUL);
      this.#afterCr = byte === CR;
      if (!isSecond) text[length++] = byte === CR ? LF : byte;
    };
    for (const byte of chunk) {
      switch (this.#state) {
        case TEXT:
          if (byte === IAC) this.#state = IAC;
          else add(byte);
          break;
        case IAC:
          if (byte === EC) add(BS);
          if (byte === EL) add(NAK);
          if (byte < FIRST_COMMAND) add(byte);
          this.#command(byte);
          break;
        case SB:
          if (byte === IAC) this.#state = SE;
          else if (++this.#length > LINE_BYTES) this.#state = LOST;
          break;
        case SE:
          if (byte < FIRST_COMMAND || byte === IAC) this.#state = SB;
          else this.#command(byte); // SE, or another that ends it as well
          break;
        case LOST:
          if (byte !== LF && byte !== CR) break;
          this.#state = TEXT;
          add(byte);
          break;
        default:
          this.#option(byte);
      }
    }
    return text.subarray(0, length);
  }

  #command(byte: number): void {
    if (byte === IAC) return; // it may begin a command itself
    this.#state = byte >= SB ? byte : TEXT;
    this.#length = 0;
    if (byte === AYT || byte === IP) this.request = byte;
    if (byte < SE || this.#asked) return;
    this.#asked = true; // without it Debian's telnet sends 7 bits of each byte
    this.reply.push(IAC, DO, BINARY);
  }

  /** Refuses an option. A telnet whose user pressed Ctrl-C shows nothing more
   * before that answer comes (RFC 860, TIMING-MARK). */
  #option(option: number): void {
    const verb = this.#state;
    this.#state = TEXT;
    if (this.reply.length >= MOST_REPLY_BYTES) return;
    if (verb === DO) this.reply.push(IAC, WONT, option);
    if (verb === WILL && option !== BINARY) this.reply.push(IAC, DONT, option);
  }
}

/**
 * Makes lines of one client's bytes: the same ones however the stream is cut into
 * reads. It holds back less than {@linkcode LINE_BYTES} + one read.
 *
 * `TextDecoderStream` and `TextLineStream` would read better, but cost 84 KB a
 * client (this: 8), and hold a line of any length in memory.
 */
class LineSplitter {
  /** Made with the first IAC, CR or DM. */
  telnet: TelnetFilter | null = null;
  /** What the last chunk cost beyond its lines, in lines: those that show nothing, and
   * bytes that are removed, {@linkcode LINE_BYTES} for a line. */
  junk = 0;
  #partial: Uint8Array = NO_BYTES;
  /** What the first piece of a line that is too long decided. */
  #long: "" | "message" | "refused" = "";

  /**
   * @param tabs whether a TAB stays
   * @param refuses whether a line that begins like this is refused if it is too
   * long, as a command or an answer, rather than passed on in pieces; the empty text
   * asks whether an empty line is an answer as well
   */
  constructor(
    readonly tabs: boolean,
    readonly refuses: (start: string) => boolean,
  ) {}

  /** The lines that `chunk` completes, cleaned, with their ends. They may lie in
   * `chunk`: use them before it is overwritten. Lines that are too long are cut between
   * characters into pieces of {@linkcode LINE_BYTES} at most. */
  push(chunk: Uint8Array): Uint8Array {
    // What most people type passes as the bytes it came in: decoded and encoded
    // again, a line between two people takes 3 % more time.
    let plain = (this.telnet?.isInText ?? true) && isPlain(chunk, this.tabs);
    let rest = plain ? chunk : this.#filter(chunk);
    this.junk = Math.max(0, chunk.length - rest.length) / LINE_BYTES;
    if (this.#partial.length > 0) {
      rest = concat([this.#partial, rest]);
      plain = false;
    }
    const cleaned: Uint8Array[] = [];
    for (;;) {
      const isFirst = cleaned.length === 0;
      // Whole lines together, as many as are no longer than one may be.
      const lineEnd = this.#long
        ? rest.indexOf(LF)
        : rest.lastIndexOf(LF, LINE_BYTES);
      const hasMore = lineEnd < 0 || lineEnd > LINE_BYTES;
      if (lineEnd < 0 && rest.length <= LINE_BYTES) break; // its line end is to come
      const end = hasMore ? cutBefore(rest, LINE_BYTES) : lineEnd + 1;
      const part = end === rest.length ? rest : rest.subarray(0, end);
      if (this.#long || hasMore) {
        cleaned.push(this.#cleanPiece(part, hasMore, isFirst));
      } else cleaned.push(plain ? part : this.#clean(part, isFirst));
      if (!hasMore) this.#long = "";
      rest = end === rest.length ? NO_BYTES : rest.subarray(end);
    }
    this.#partial = rest.length > 0 ? rest.slice() : NO_BYTES;
    return cleaned.length > 1 ? concat(cleaned) : cleaned[0] ?? NO_BYTES;
  }

  /** The last line of a stream that ended without a line end. */
  end(): Uint8Array {
    this.telnet = null;
    return this.#partial.length > 0 ? this.push(LINE_END) : NO_BYTES;
  }

  #filter(chunk: Uint8Array): Uint8Array {
    // Once there is one, nothing is looked for.
    if (
      this.telnet === null &&
      (chunk.includes(IAC) || chunk.includes(CR) || chunk.includes(DM))
    ) this.telnet = new TelnetFilter();
    return this.telnet?.filter(chunk) ?? chunk;
  }

  /** Whole lines as others may receive them, without those that show nothing.
   *
   * @param isFirst whether they are the first of a chunk
   */
  #clean(lines: Uint8Array, isFirst: boolean): Uint8Array {
    const text = decoder.decode(lines);
    if (!SUSPECT.test(text)) return lines;
    const typed = text.split("\n"), { tabs } = this;
    const kept = typed.filter(Boolean).map((line) => cleanLine(line, { tabs }))
      .filter(Boolean);
    if (isFirst && this.refuses("") && cleanLine(typed[0]) === "") {
      kept.unshift(String.fromCharCode(TOO_LONG)); // an empty answer
    }
    const clean = encoder.encode(kept.map((line) => line + "\n").join(""));
    this.junk += typed.length - 1 - kept.length;
    this.junk += Math.max(0, lines.length - clean.length) / LINE_BYTES;
    return clean;
  }

  /** Cleans a piece of a line that is too long. The first that shows something decides
   * whether the line is refused.
   *
   * @param hasMore whether more of the line follows
   */
  #cleanPiece(
    piece: Uint8Array,
    hasMore: boolean,
    isFirst: boolean,
  ): Uint8Array {
    if (this.#long === "refused") {
      this.junk += piece.length / LINE_BYTES;
      return NO_BYTES;
    }
    const line = hasMore ? concat([piece, LINE_END]) : piece;
    const clean = this.#clean(line, isFirst);
    if (this.#long === "message") {
      // What is erased may be in an earlier piece, and a command may follow.
      const erases = [BS, DEL, NAK].some((byte) => piece.includes(byte));
      if (erases && this.refuses("/")) return this.#refuse(ERASED);
      return clean.length > 0 ? concat([Uint8Array.of(PIECE), clean]) : clean;
    }
    const text = decoder.decode(clean).trimEnd();
    // Where a slash that follows would be the first character, it may be a command.
    const next = cleanLine(decoder.decode(piece) + "/").trimStart();
    if (text === "" || next === "/") return clean;
    if (this.refuses(text)) return this.#refuse(TOO_LONG);
    this.#long = "message";
    return clean;
  }

  /** Leaves out the rest of the line. */
  #refuse(why: number): Uint8Array {
    this.#long = "refused";
    return Uint8Array.of(why, LF);
  }
}

/** Where a piece ends that has the bytes before `offset`, or a few less: it divides no
 * character, and no escape sequence of a key, half of which would be letters. */
function cutBefore(bytes: Uint8Array, offset: number): number {
  // A character has at most three bytes after its first (RFC 3629). Without a first
  // one among these it is no UTF-8: any place will do.
  const near = bytes.subarray(offset - 3, offset + 1);
  const first = near.findLastIndex((byte) => (byte & 0xc0) !== 0x80);
  const end = first < 0 ? offset : offset - 3 + first;
  const escape = bytes.subarray(end - ESCAPE_BYTES, end).lastIndexOf(ESC);
  return escape < 0 ? end : end - ESCAPE_BYTES + escape;
}

/** Whether there is nothing to clean in a chunk: it is of printable ASCII, in lines
 * that show something. */
function isPlain(chunk: Uint8Array, tabs: boolean): boolean {
  let shown = false;
  for (let i = 0; i < chunk.length; i++) { // `for of` takes 4.5 times as long
    const byte = chunk[i];
    if (byte > SPACE && byte <= TILDE) shown = true;
    else if (byte === LF) {
      if (!shown) return false;
      shown = false;
    } else if (byte !== SPACE && (byte !== TAB || !tabs)) return false;
  }
  return true;
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
// already writing; the others look again when their write ends. Turns decides
// which client's lines are appended when.
// ---------------------------------------------------------------------------

/** The size of a segment of the log, in bytes. Its bytes are written once and
 * never change, so a write in flight can refer to them. */
const SEGMENT_BYTES = 65_536;

/** How far a reader may be behind, in bytes, before it is too slow. As only readers
 * keep old segments alive, this bounds the memory of all of them together. */
const WINDOW_BYTES = 4_194_304;

/** How far a reader is behind, in bytes, for which input is held back while it is this
 * machine that cannot write more. */
const FAR_BEHIND_BYTES = WINDOW_BYTES / 4;

/** For how many such readers no input is held back: a few may always be stalled. */
const FEW_READERS = 8;

/** The most bytes that one write copies together, when what a reader receives is
 * in several pieces. */
const COPIED_BYTES = 16_384;

/** The most lines that are appended at once, and about the most bytes: they fit into a
 * segment with a name before each line. */
const APPENDED_LINES = 256, APPENDED_BYTES = 8_192;

/** The bounds on what waits for one reader outside the log: detours, and bytes
 * inserted by them. A reader that is beyond either when another comes is too slow. */
const MOST_DETOURS = 4_096, MOST_INSERTED_BYTES = 65_536;

/** The part of these beyond which a client is not read, as answers would be added; and
 * the part beyond which others add nothing, so that they make nobody too slow. */
const BACKLOG_PART = 1 / 4, FULL_PART = 1 / 2;

/** In a room of up to this many readers a flush starts at a random one, so that none
 * is always the last: with ten people who talk as fast as they receive, a hundred
 * readers get a fifth more. A thousand get 1.6 times as much if the order stays: the
 * runtime postpones writes after the first 128 (tokio's budget). */
const RANDOM_START_READERS = 256;

/** The reason why a slow reader is disconnected. */
const TOO_SLOW = "too slow";

/** A stretch of the log, written once. */
class Segment {
  next: Segment | null = null;
  readonly bytes = new Uint8Array(SEGMENT_BYTES);
  /** Where it ends in the log, in bytes. */
  end: number;
  /** What was read last, and from where. */
  #view: Uint8Array = NO_BYTES;
  #viewFrom = -1;

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
    const textEnd = encodeAt(text, bytes, start);
    let end = textEnd;
    // Byte by byte: most lines are too short for a copy by `set` to be faster.
    // Past the end of the array an assignment has no effect.
    for (let at = 0; at < lines.length;) {
      if (at > 0) {
        for (let i = start; i < textEnd; i++) bytes[end++] = bytes[i];
      }
      let byte;
      do bytes[end++] = byte = lines[at++]; while (
        byte !== LF && at < lines.length
      );
    }
    if (end > SEGMENT_BYTES) return false;
    this.end = this.start + end;
    return true;
  }

  /** The bytes between two places of the log that are in this segment: the same view
   * for all readers that are at the same place. */
  between(from: number, to: number): Uint8Array {
    if (this.#viewFrom !== from || this.#view.length !== to - from) {
      this.#viewFrom = from;
      this.#view = this.bytes.subarray(from - this.start, to - this.start);
    }
    return this.#view;
  }
}

/** Encodes `text` into `bytes` from `start` on. Returns where it ends: past the end of
 * `bytes` if it does not fit. */
function encodeAt(text: string, bytes: Uint8Array, start: number): number {
  let end = start;
  // For ASCII alone this takes a tenth of the time of encodeInto.
  for (let i = 0; i < text.length; i++) {
    const unit = text.charCodeAt(i);
    if (unit > DEL) {
      const { read, written } = encoder.encodeInto(text, bytes.subarray(start));
      return read < text.length ? bytes.length + 1 : start + written;
    }
    bytes[end++] = unit;
  }
  return end;
}

/** A place where one reader leaves the log: it receives `inserted`, and continues
 * behind the bytes that it skips. */
interface Detour {
  at: number;
  skipTo: number;
  inserted: Uint8Array;
  /** How many bytes of it only this reader refers to. */
  cost: number;
}

const NO_DETOURS: Detour[] = [];

/** What a reader writes to. */
interface Sink {
  /** Writes some of `bytes`; resolves to how many. */
  write(bytes: Uint8Array): Promise<number>;
  /** Everything up to the reader's end is written. */
  drained(): void;
  /** A write failed, and there will be no other; or the reader is {@linkcode TOO_SLOW}. */
  fail(reason: "" | typeof TOO_SLOW): void;
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
  /** Where in the log it ends. */
  #lastPlace = Infinity;
  #detours: Detour[] = NO_DETOURS;
  /** What its detours cost, in bytes. */
  #waiting = 0;
  /** What is being written; `null` if nothing is. */
  #batch: Uint8Array | null = null;
  #stopped = false;
  #resolveWritten: (() => void) | null = null;

  constructor(readonly room: Room, readonly sink: Sink) {}

  /** Whether it receives the log, rather than only what is inserted. */
  get isFollowing(): boolean {
    return this.#segment !== null;
  }

  /** Whether its cursor is before a place of the log. */
  isBefore(place: number): boolean {
    return this.#segment !== null && this.#cursor < place;
  }

  /** Whether so much waits for this reader alone that its client is not read. */
  get isBacklogged(): boolean {
    return this.#hasWaiting(BACKLOG_PART);
  }

  /** Whether so much waits that it gets no private messages and no bell. */
  get isFull(): boolean {
    return this.#hasWaiting(FULL_PART);
  }

  #hasWaiting(part: number): boolean {
    return this.#waiting > MOST_INSERTED_BYTES * part ||
      this.#detours.length > MOST_DETOURS * part;
  }

  /** Follows the log from its present end on. */
  follow(): void {
    this.#segment = this.room.tail;
    this.#cursor = this.room.tail.end;
  }

  /** Sends bytes to this reader alone, in their place among what it reads.
   *
   * @param cost how many of them nobody else refers to: their number is bounded
   */
  insert(inserted: Uint8Array, cost: number = inserted.length): void {
    if (this.#lastPlace !== Infinity) return; // the last bytes may be on their way
    const at = this.#segment === null ? 0 : this.room.tail.end;
    this.#addDetour({ at, skipTo: at, inserted, cost });
  }

  /** Leaves out the bytes from `from` to the end of the log. */
  skip(from: number): void {
    if (this.#segment === null) return;
    const skipTo = this.room.tail.end, last = this.#detours.at(-1);
    if (last?.skipTo === from) last.skipTo = skipTo;
    else if (last === undefined && this.#cursor === from) this.#cursor = skipTo;
    else this.#addDetour({ at: from, skipTo, inserted: NO_BYTES, cost: 0 });
  }

  #addDetour(detour: Detour): void {
    const { length } = this.#detours;
    const isTooMuch = detour.cost > 0 && this.#waiting > MOST_INSERTED_BYTES;
    if (length === MOST_DETOURS || isTooMuch) return this.sink.fail(TOO_SLOW);
    if (length === 0) this.#detours = [detour];
    else this.#detours.push(detour);
    this.#waiting += detour.cost;
  }

  /** Ends at the present end of the log. */
  end(): void {
    if (this.#lastPlace === Infinity) this.#lastPlace = this.room.tail.end;
    this.flush();
  }

  /** Writes nothing more. A write in flight is the last. */
  stop(): void {
    this.#stopped = true;
    this.#segment = this.#batch = null;
    this.#detours = NO_DETOURS;
    this.#lastPlace = 0;
    this.#resolveWritten?.();
  }

  /** Resolves after the write in flight, or when it is stopped. One caller can
   * wait. */
  written(): Promise<void> {
    return new Promise((resolve) => this.#resolveWritten = resolve);
  }

  /** Starts to write what it has not written, unless it is writing. At its end it
   * stops. */
  flush(): void {
    if (this.#batch !== null || this.#stopped) return;
    const batch = this.#nextBatch();
    if (batch !== null) return this.#write(batch);
    if (this.#lastPlace === Infinity) return;
    this.stop();
    this.sink.drained();
  }

  #write(batch: Uint8Array): void {
    this.#batch = batch;
    try {
      // Not an async function: its promises cost a tenth of a delivery.
      this.sink.write(batch).then(
        (count) => this.#written(count),
        () => this.#failed(),
      );
    } catch {
      this.#failed();
    }
  }

  #written(count: number): void {
    const batch = this.#batch;
    this.#resolveWritten?.();
    this.room.turns.writesEnded++;
    if (batch === null) return; // stopped meanwhile
    if (!(count > 0)) return this.#failed(); // or it would be tried endlessly
    if (count < batch.length) return this.#write(batch.subarray(count));
    this.#batch = null;
    this.flush();
  }

  #failed(): void {
    if (this.#stopped) return;
    this.stop();
    this.sink.fail("");
  }

  /** The bytes from the cursor on, which moves behind them; `null` if there are none. */
  #nextBatch(): Uint8Array | null {
    const detours = this.#detours;
    if (detours.length === 0) return this.#stretch(Infinity);
    const parts: Uint8Array[] = [];
    let length = 0, passed = 0;
    while (length < COPIED_BYTES) {
      const detour = detours[passed] as Detour | undefined;
      const most = length > 0 ? COPIED_BYTES - length : Infinity;
      const bytes = this.#stretch(detour?.at ?? Infinity, most);
      if (bytes !== null) parts.push(bytes);
      length += bytes?.length ?? 0;
      if (detour === undefined || this.#cursor < detour.at) break;
      passed++;
      this.#cursor = Math.max(this.#cursor, detour.skipTo);
      if (detour.inserted.length > 0) parts.push(detour.inserted);
      length += detour.inserted.length;
      this.#waiting -= detour.cost;
    }
    if (passed === detours.length) this.#detours = NO_DETOURS;
    else if (passed > 0) this.#detours = detours.slice(passed);
    return parts.length > 1 ? concat(parts) : parts[0] ?? null;
  }

  /** The bytes from the cursor to `to`, as far as they lie in one segment. */
  #stretch(to: number, most = Infinity): Uint8Array | null {
    if (this.#segment === null) return null;
    while (this.#cursor >= this.#segment.end && this.#segment.next !== null) {
      this.#segment = this.#segment.next;
    }
    const segment = this.#segment, from = this.#cursor;
    const end = Math.min(to, segment.end, this.#lastPlace, from + most);
    if (end <= from) return null;
    this.#cursor = end;
    return segment.between(from, end);
  }
}

/** A person in the room: what others see of them, and whom they ignore. */
abstract class Person {
  /** Empty until a name is given. */
  name = "";
  /** Why this person is away; `null` if they are not. */
  away: string | null = null;
  /** Whether the others have neither been told yet that this person has joined, nor
   * heard anything: then they are not told of a new name either. */
  isUnknown = false;
  /** Those whose messages this person does not receive. */
  ignored: Set<Person> | null = null;
  /** Those who do not receive this person's messages. */
  ignoredBy: Set<Person> | null = null;
  /** Who sent the last private message to this person. */
  replyTo: Person | null = null;

  /** What this person receives the room by; none if they are elsewhere. */
  abstract readonly reader: Reader | null;

  constructor(readonly room: Room) {}

  /** Shows this person lines that nobody else receives.
   *
   * @param lines whole lines with their ends; as bytes if others share them
   */
  tell(lines: string | Uint8Array): void {
    const { reader } = this;
    if (reader === null) return;
    if (typeof lines === "string") reader.insert(encoder.encode(lines));
    else reader.insert(lines, 0);
    this.room.turns.answered(reader);
  }

  /** Tells this person what was wrong, and what to do. */
  tellError(text: string): void {
    this.tell(`! ${text}\n`);
  }

  /** Receives a private message; tells whether it could. */
  receive(from: Person, text: string): boolean {
    if (this.ignored?.has(from)) return true;
    if (this.reader?.isFull) return false;
    this.replyTo = from;
    const bell = this.room.bell.has(this) ? "\x07" : "";
    this.tell(`${bell}${this.room.stamp()}[${from.name} -> you] ${text}\n`);
    return true;
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

/** The last public lines, for new clients: blocks of bytes that are written once,
 * so that all new clients share them. */
class History {
  #blocks: { bytes: Uint8Array; used: number; lines: number }[] = [];
  #lines = 0;
  #bytes = 0;

  /** @param most how many lines it keeps */
  constructor(readonly most: number) {}

  /** Adds whole lines with their ends. */
  add(bytes: Uint8Array): void {
    if (this.most === 0) return;
    let block = this.#blocks.at(-1);
    if (!block || block.used + bytes.length > block.bytes.length) {
      const size = Math.max(bytes.length, COPIED_BYTES);
      block = { bytes: new Uint8Array(size), used: 0, lines: 0 };
      this.#blocks.push(block);
    }
    const lines = countLines(bytes);
    block.bytes.set(bytes, block.used);
    block.used += bytes.length;
    block.lines += lines;
    this.#lines += lines;
    this.#bytes += bytes.length;
    while (
      this.#lines - this.#blocks[0].lines >= this.most ||
      this.#bytes > HISTORY_BYTES
    ) {
      const oldest = this.#blocks.shift()!;
      this.#lines -= oldest.lines;
      this.#bytes -= oldest.used;
    }
  }

  /** The lines, in pieces that are shared. */
  get parts(): Uint8Array[] {
    const parts = this.#blocks.map((it) => it.bytes.subarray(0, it.used));
    let start = 0;
    for (let extra = this.#lines - this.most; extra > 0; extra--) {
      start = parts[0].indexOf(LF, start) + 1;
    }
    if (start > 0) parts[0] = parts[0].subarray(start);
    return parts;
  }

  /** Puts the date before lines that have only the time of day. */
  addDate(date: string): void {
    const text = decoder.decode(concat(this.parts));
    this.#blocks = [];
    this.#lines = this.#bytes = 0;
    for (const line of text.match(/.+\n/g) ?? []) {
      this.add(encoder.encode(line.replace(/^\d\d:/, `${date} $&`)));
    }
  }
}

function countLines(lines: Uint8Array): number {
  let count = 0;
  for (let end = 0; (end = lines.indexOf(LF, end) + 1) > 0;) count++;
  return count;
}

/** Lines that can be handled together. */
interface Run {
  /** The lines, with their ends, and how many they are. */
  lines: Uint8Array;
  count: number;
  /** Whether it is one line, which may be a command. */
  isCommand: boolean;
  /** The lines after them. */
  rest: Uint8Array;
}

/**
 * The next of the lines that {@linkcode LineSplitter} gave: one that has to be
 * looked at, or a run of others that can be appended at once.
 *
 * @param most how many lines
 * @param commands whether a line that begins with a slash or space may be a command
 */
function nextRun(lines: Uint8Array, most: number, commands: boolean): Run {
  const isCommand = (first: number) =>
    commands && (first === SLASH || first === SPACE);
  const isAlone = (first: number) => first <= ERASED || isCommand(first);
  const first = lines[0], start = first === PIECE ? 1 : 0;
  const mostLines = isAlone(first) ? 1 : Math.min(most, APPENDED_LINES);
  let end = 0, count = 0;
  do {
    end = lines.indexOf(LF, end) + 1;
    count++;
  } while (
    end < lines.length && count < mostLines && end < APPENDED_BYTES &&
    !isAlone(lines[end])
  );
  const rest = end < lines.length ? lines.subarray(end) : NO_BYTES;
  const run = lines.subarray(start, end);
  return { lines: run, count, isCommand: isCommand(first), rest };
}

/** How many join and leave notices may come at once. After them they are gathered
 * into one line a second. */
const NOTICE_BURST = 10;

/** Who has joined or left, and why those left; `null` for one who has joined. */
type Changes = Map<Person, string | null>;

/** Join and leave notices: one for each person while few come, then one line a
 * second for all. A person who joins and leaves, or leaves and returns, within that
 * second is in none. */
class JoinLeaveNotices {
  /** What the next line tells. */
  #changes: Changes = new Map();
  #timer: Timer | undefined;
  /** How many notices may come at once, and when that was counted. */
  #tokens = NOTICE_BURST;
  #counted = 0;

  constructor(readonly room: Room) {}

  /** Tells of a change, at once or later. */
  add(person: Person, reason: string | null): void {
    const { room } = this, now = performance.now();
    if (room.options.raw || room.closed) return;
    const earned = (now - this.#counted) / 1_000;
    this.#tokens = Math.min(this.#tokens + earned, NOTICE_BURST);
    this.#counted = now;
    const before = this.#changes.get(person);
    const isUndone = before !== undefined &&
      (before === null) !== (reason === null);
    if (isUndone) this.#changes.delete(person);
    else this.#changes.set(person, reason);
    if (this.#timer === undefined && this.#tokens >= 1) {
      this.#tokens--;
      return this.#tell();
    }
    person.isUnknown = this.#changes.get(person) === null;
    // Among more than a thousand people less often: a thousand deliveries a second.
    const milliseconds = Math.max(1_000, room.people.size);
    this.#timer ??= setTimeout(() => {
      this.#timer = undefined;
      this.#tokens = 0;
      this.#tell();
    }, milliseconds);
  }

  /** Tells nothing of `person`, unless it has left before. */
  forget(person: Person): void {
    person.isUnknown = false;
    if (this.#changes.get(person) === null) this.#changes.delete(person);
  }

  stop(): void {
    clearTimeout(this.#timer);
  }

  #tell(): void {
    const changes = this.#changes;
    this.#changes = new Map();
    for (const person of changes.keys()) person.isUnknown = false;
    if (changes.size > 0) this.room.noticeChanges(changes);
  }
}

/** One line for all changes, such as `alice has left the room (too slow)`, or `5 people
 * have entered the room, 2 have left (1 too slow)`. */
function changesText(changes: Changes): string {
  const [[{ name }, reason]] = changes, reasons = [...changes.values()];
  if (changes.size === 1) {
    return reason === null
      ? `${name} has entered the room`
      : `${name} has left the room${reason && ` (${reason})`}`;
  }
  const entered = reasons.filter((it) => it === null).length;
  const left = changes.size - entered;
  const slow = reasons.filter((it) => it === TOO_SLOW).length;
  const tooSlow = slow > 0 ? ` (${slow} ${TOO_SLOW})` : "";
  const have = (count: number) => `${count} ${count === 1 ? "has" : "have"}`;
  const people = (count: number) =>
    count === 1 ? "1 person has" : `${count} people have`;
  if (entered === 0) return `${people(left)} left the room${tooSlow}`;
  const others = left > 0 ? `, ${have(left)} left${tooSlow}` : "";
  return `${people(entered)} entered the room${others}`;
}

/** How much a turn of the event loop takes in, in milliseconds of work and in bytes
 * appended, before it lets reads and writes happen. */
const TURN_MILLISECONDS = 4, TURN_BYTES = 65_536;

/** How many writes to single readers a turn takes. With more than 128 reads and writes
 * in a turn (tokio's budget), reads wait, and everyone's lines with them. */
const TURN_ANSWERS = 64;

/** How much one client may send in a turn while nobody waits, in bytes; a line
 * counts for {@linkcode LINE_COST} more. */
const CLIENT_TURN_BYTES = 16_384, LINE_COST = 64;

/** How often a turn ends with a pause of a millisecond while clients wait, in
 * milliseconds. A busy runtime asks only every 61 turns which sockets are ready
 * (tokio's event interval): a line waited 80 ms for that. */
const PAUSE_INTERVAL_MILLISECONDS = 8;

/** With more than so many writes ending in a millisecond, readers wait for this machine.
 * With fewer, in so many turns, they are behind because they do not read. */
const BUSY_WRITES = 4, IDLE_TURNS = 10;

/** For how long input may be held back for readers that are behind, in milliseconds:
 * clients that read a little at a time could seem to wait for this machine. */
const MOST_HELD_MILLISECONDS = 1_000;

/**
 * Who is served when. A turn of the event loop handles a bounded amount of input,
 * a bounded part of it from each client, and then lets reads and writes happen.
 * Clients that have to wait form a queue. A turn is long while there is little to do: it
 * ends when {@linkcode Turns.endSoon} was called. While readers fall behind because this
 * machine cannot write more, nothing is handled: a reader that takes what it is offered
 * is not lost, however much others send.
 */
class Turns {
  /** How many turns have ended. */
  number = 0;
  #worked = 0;
  #bytes = 0;
  #answers = 0;
  /** The readers to flush after the client that is being served, if one is. */
  #answered: Reader[] | null = null;
  /** Whether the end of this turn is scheduled. */
  isEnding = false;
  #queue: { client: Client; served: () => void }[] = [];
  /** When the last pause began, and whether a client had to wait for others since. */
  #lastPause = 0;
  #isCrowded = false;
  /** How many writes have ended in this turn, and when it began. */
  writesEnded = 0;
  #began = 0;
  /** How many turns had few writes, whether input is held back, and when it last was
   * not. */
  #idleTurns = 0;
  #isHeld = false;
  #lastNotHeld = 0;

  constructor(readonly room: Room) {}

  /** Has `client` say what is next, if it may in this turn and nobody waits. */
  serve(client: Client): boolean {
    if (this.#queue.length > 0 || this.#isOver) {
      this.#isCrowded = true;
      return false;
    }
    if (this.hasUsed(client)) return false;
    this.#serve(client, performance.now());
    return true;
  }

  /** Resolves when `client` has been served. Those that were served longest ago come
   * first: a person who says something now and then does not wait for a thousand clients
   * that always have more to say. */
  wait(client: Client): Promise<void> {
    this.endSoon();
    const queue = this.#queue, { servedIn } = client;
    let place = queue.length;
    while (place > 0 && queue[place - 1].client.servedIn > servedIn) place--;
    return new Promise((served) => {
      queue.splice(place, 0, { client, served });
    });
  }

  /** Whether `client` has used its part of this turn. */
  hasUsed(client: Client): boolean {
    return client.turn === this.number && client.used >= CLIENT_TURN_BYTES;
  }

  /** Counts work for `client`, in bytes: what is read, and again what is said. */
  count(client: Client, bytes: number): void {
    if (client.turn !== this.number) client.used = 0;
    client.turn = this.number;
    client.used += bytes;
  }

  /** Counts bytes that were appended. */
  appended(bytes: number): void {
    this.#bytes += bytes;
    if (this.#bytes > TURN_BYTES / 4) this.endSoon();
  }

  /** Flushes a reader for which something was inserted: now, or when the client that is
   * being served has been. */
  answered(reader: Reader): void {
    if (this.#answered === null) reader.flush();
    else if (this.#answered.at(-1) !== reader) this.#answered.push(reader);
  }

  /** Ends the turn when all reads that are ready were handled. */
  endSoon(): void {
    if (this.isEnding) return;
    this.isEnding = true;
    // Not a microtask, which would come before the other reads of this turn: with ten
    // people who talk as fast as they receive, a thousand readers get twice as many
    // lines. Only a timer lets the runtime do nothing but read and write for a while.
    const now = performance.now(), sincePause = now - this.#lastPause;
    const isPauseDue = this.#isCrowded &&
      sincePause > PAUSE_INTERVAL_MILLISECONDS;
    if (!isPauseDue && !this.#isHeld) return void setImmediate(this.#end);
    this.#lastPause = now;
    this.#isCrowded = false;
    setTimeout(this.#end, 1);
  }

  #end = (): void => {
    this.isEnding = false;
    this.room.flush();
    this.number++;
    this.#worked = this.#bytes = this.#answers = 0;
    let now = performance.now();
    this.#holdInput(now);
    while (this.#queue.length > 0 && !this.#isOver) {
      const { client, served } = this.#queue.shift()!;
      now = this.#serve(client, now);
      served();
    }
    if (this.#queue.length > 0) this.endSoon();
  };

  /** Returns when it has served `client`. */
  #serve(client: Client, now: number): number {
    client.servedIn = this.number;
    const answered: Reader[] = this.#answered = [];
    client.sayNext(now);
    this.#answered = null;
    for (const reader of answered) reader.flush();
    this.#answers += answered.length;
    const ended = performance.now();
    this.#worked += ended - now;
    if (this.#isOver) this.endSoon();
    return ended;
  }

  /** Holds input back in this turn if readers are behind, and wait for this machine;
   * after {@linkcode MOST_HELD_MILLISECONDS} there is a turn with input. */
  #holdInput(now: number): void {
    const milliseconds = Math.max(1, now - this.#began);
    const isBusy = this.writesEnded > BUSY_WRITES * milliseconds;
    this.#idleTurns = isBusy ? 0 : this.#idleTurns + 1;
    this.writesEnded = 0;
    this.#began = now;
    const isLong = now - this.#lastNotHeld > MOST_HELD_MILLISECONDS;
    this.#isHeld = this.#idleTurns < IDLE_TURNS && !isLong &&
      this.room.areManyBehind();
    if (!this.#isHeld) this.#lastNotHeld = now;
  }

  /** Whether no more input is handled in this turn. */
  get #isOver(): boolean {
    return this.#isHeld || this.#worked > TURN_MILLISECONDS ||
      this.#bytes >= TURN_BYTES ||
      this.#answers >= TURN_ANSWERS;
  }
}

/** How many names a new client is shown before the others are only counted. */
const LISTED_NAMES = 20;

/** In a room of so many people all may be looked at to answer one of them. */
const SMALL_ROOM = 100;

/** The name in `bob,` or `@bob`. */
function bareName(name: string): string {
  return name.replace(/^@|[,:]$/g, "");
}

/** Who is here, by {@linkcode nameKey}. */
class People extends Map<string, Person> {
  /** The names of this server on its links, by {@linkcode nameKey}. */
  readonly ownNames = new Set<string>();
  #guests = 0;
  /** How the first ones are listed, and what `/who` answers; until that changes. A
   * crowd that joins would have both made for each. */
  #first = "";
  #everyone: Uint8Array | null = null;

  /** The person of that name, written `bob`, `bob,` or `@bob`; on the server that is
   * linked as tokyo also `bob@tokyo`. */
  find(name: string): Person | undefined {
    const exact = this.get(nameKey(name));
    if (exact !== undefined) return exact;
    const plain = bareName(name), at = plain.indexOf("@");
    const isOwn = at > 0 && this.ownNames.has(nameKey(plain.slice(at + 1)));
    return this.get(nameKey(isOwn ? plain.slice(0, at) : plain));
  }

  /** A person on another server whose name begins with `name`, as `bob@paris` does;
   * looked for only in a small room. */
  findElsewhere(name: string): Person | undefined {
    if (this.size > SMALL_ROOM) return;
    const start = `${nameKey(name)}@`;
    return this.values().find((it) => nameKey(it.name).startsWith(start));
  }

  /** A name that nobody has. */
  guestName(): string {
    let name;
    do name = `guest${++this.#guests}`; while (this.has(name));
    return name;
  }

  /** What is wrong with a name that `person` wants, or `null`. */
  nameProblem(name: string | null, person: Person): string | null {
    if (name === null) return NAME_RULE;
    if (isReserved(name)) return `The name ${name} is reserved.`;
    const owner = this.find(name);
    return owner && owner !== person ? `The name ${name} is taken.` : null;
  }

  /** Adds a person under a name that has no {@linkcode People.nameProblem}. */
  add(person: Person, name: string): void {
    person.name = name;
    this.set(nameKey(name), person);
    this.#everyone = null;
    if (this.size <= LISTED_NAMES) this.#first = "";
  }

  /** Tells whether `person` was here: not if no name was given yet. */
  remove(person: Person): boolean {
    const key = nameKey(person.name);
    if (this.get(key) !== person) return false;
    this.changed();
    return this.delete(key);
  }

  /** Somebody has left or changed. */
  changed(): void {
    this.#everyone = null;
    this.#first = "";
  }

  /** The first of those who are here, in one line for a new client. */
  get hereNow(): string {
    if (this.size === 0) return "* Nobody else is here yet.\n";
    this.#first ||= [...this.values().take(LISTED_NAMES).map(label)].join(", ");
    const others = this.size - LISTED_NAMES;
    const more = others > 0 ? `, and ${others} more` : "";
    return `* Here now: ${this.#first}${more} (${this.size})\n`;
  }

  /** Everyone who is here, in lines of {@linkcode LINE_BYTES} at most; those of
   * this server first. */
  get everyone(): Uint8Array {
    if (this.#everyone !== null) return this.#everyone;
    const isRemote = (person: Person) => Number(person instanceof RemotePerson);
    const people = [...this.values()].sort((a, b) => isRemote(a) - isRemote(b));
    const start = "* Here now:", lines = [start];
    for (const item of people.map((person) => ` ${label(person)},`)) {
      const line = lines.at(-1) + item;
      // A letter takes three bytes at most for a UTF-16 unit.
      if (line.length * 3 > LINE_BYTES) lines.push(start + item);
      else lines[lines.length - 1] = line;
    }
    const text = lines.join("\n").replace(/,$/, "");
    return this.#everyone = encoder.encode(`${text} (${this.size})\n`);
  }
}

const NO_LINKS: ReadonlySet<LinkEvents> = new Set();

/** The people, what they say, and who receives it. */
class Room {
  /** The last segment of the log. Only the readers refer to the ones before. */
  tail = new Segment(0);
  readonly turns = new Turns(this);
  /** Everyone and everything that receives something, in the room or not yet. */
  readonly readers = new Set<Reader>();
  readonly people = new People();
  readonly access: Access;
  /** Those who receive no notices of joining, leaving and new names. */
  readonly quiet = new Set<Person>();
  /** Those who receive no notices of clients of this server that join and leave: the
   * operator, if the reports tell of them. */
  readonly quietOnClients = new Set<Person>();
  /** Those whose terminals ring when they are named. */
  readonly bell = new Set<Person>();
  /** What a new client is shown after the welcome: lines with their ends. */
  motd = "";
  /** Where a browser that asks the chat port is sent. */
  webPage = "";
  transcript: Transcript | null = null;
  readonly links = new Set<LinkEvents>();
  /** Whether the last line has been said. */
  closed = false;
  readonly #history: History;
  readonly #notices = new JoinLeaveNotices(this);
  /** The last minute in which a line was stamped, since 1970, and its time of day. */
  #minute = 0;
  #time = "";
  #flushNeeded = false;
  #lastSender: Person | undefined;
  readonly #emptied = Promise.withResolvers<void>();

  constructor(readonly options: Options, readonly report: Report) {
    this.access = new Access(options);
    this.#history = new History(options.raw ? 0 : options.history);
  }

  // -- people

  /** Lets `person` in under a name that has no {@linkcode People.nameProblem}. */
  enter(person: Person, name: string): void {
    this.add(person, name);
    this.#notices.add(person, null);
    person.reader?.follow();
  }

  /** Adds `person` to those who are here, without a notice. */
  add(person: Person, name: string): void {
    this.people.add(person, name);
    for (const link of this.#linksFor(person)) link.joined(name);
  }

  /** Gives `person` another name that has no {@linkcode People.nameProblem}. */
  rename(person: Person, name: string): void {
    const before = person.name, text = `${before} is now known as ${name}`;
    this.people.remove(person);
    this.people.add(person, name);
    for (const link of this.#linksFor(person)) link.renamed(before, name);
    if (person.isUnknown) {
      // Only the operator has been told, by a report, who has connected.
      const others = person instanceof RemotePerson ? [] : this.quietOnClients;
      for (const other of others) other.tell(`* ${text}\n`);
    } else this.notice(text, person, this.quiet);
    person.tell(`* ${text}\n`); // in any case: this answers /nick
  }

  /** Takes `person` out, and tells the others unless `silent`. With `mayReturn`, those
   * who ignore the person do so after it has been added again. */
  leave(
    person: Person,
    reason: string,
    { silent = false, mayReturn = false } = {},
  ): void {
    person.replyTo = null; // or each would keep the one before in memory
    for (const it of person.ignored ?? []) it.ignoredBy?.delete(person);
    if (!mayReturn) {
      for (const it of person.ignoredBy ?? []) it.ignored?.delete(person);
    }
    this.quiet.delete(person);
    this.bell.delete(person);
    if (!this.people.remove(person)) return;
    for (const link of this.#linksFor(person)) link.left(person.name, reason);
    if (silent) this.#notices.forget(person);
    else this.#notices.add(person, reason);
  }

  setAway(person: Person, reason: string | null): void {
    person.away = reason;
    this.people.changed();
    for (const link of this.#linksFor(person)) link.away(person.name, reason);
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

  /** Appends public lines of `from`, no more than {@linkcode APPENDED_LINES}. Everyone
   * receives them but `from`, and those who ignore `from`. */
  say(from: Person, lines: Uint8Array, { action = false } = {}): void {
    if (this.bell.size > 0) this.#ring(from, decoder.decode(lines));
    from.isUnknown = false;
    const start = this.tail.end, time = this.stamp();
    const { raw } = this.options;
    const mark = action ? `** ${from.name} ` : raw ? "" : `[${from.name}] `;
    this.#append(time + mark, lines, from);
    if (this.#history.most > 0 || this.transcript !== null) {
      const said = this.tail.between(start, this.tail.end);
      this.#history.add(said);
      this.transcript?.add(said, time.length);
    }
    for (const link of this.#linksFor(from)) {
      link.said(from.name, lines, action);
    }
    this.#flushSoon(from);
  }

  /** Rings at everyone who is named in `text` and wants it. */
  #ring(from: Person, text: string): void {
    const words = new Set(text.split(/[^\p{L}\p{M}\p{Nd}_@-]+/u).map(nameKey));
    for (const word of words) {
      const person = this.people.get(word) ??
        (word.includes("@") ? this.people.find(word) : undefined);
      if (!person || person === from || !this.bell.has(person)) continue;
      if (person.reader?.isFull || person.ignored?.has(from)) continue;
      person.tell("\x07");
    }
  }

  /** `from` says something to `to` alone. */
  sayPrivately(from: Person, to: Person, text: string): void {
    if (!to.receive(from, text)) {
      return from.tellError(`${to.name} receives too slowly. Try again later.`);
    }
    from.tell(`${this.stamp()}[you -> ${to.name}] ${text}\n`);
    if (to.away !== null) from.tell(awayText(to));
  }

  /** The server's own words, hidden from the person that they are about, those who
   * ignore that person, and `others`. */
  notice(text: string, about?: Person, others?: Iterable<Person>): void {
    const start = this.tail.end;
    this.#append(`* ${text}\n`, NO_BYTES, about);
    for (const other of others ?? []) other.reader?.skip(start);
    this.#flushSoon();
  }

  /** Tells those who want to know who joined or left. A notice about one person alone
   * is hidden from that person and from those who ignore them. */
  noticeChanges(changes: Changes): void {
    const [person, another] = changes.keys(), { quiet, quietOnClients } = this;
    const hasRemote = changes.keys().some((it) => it instanceof RemotePerson);
    const others = hasRemote ? quiet : quiet.union(quietOnClients);
    this.notice(changesText(changes), another ? undefined : person, others);
  }

  /** Says the last line that anyone receives. */
  close(): void {
    this.closed = true;
    this.#notices.stop();
    const line = this.options.raw ? "Shutdown Server\n" : "* Shutdown Server\n";
    this.#append(line, NO_BYTES);
    for (const reader of this.readers) {
      if (!reader.isFollowing) reader.insert(encoder.encode(line));
    }
    this.#flushSoon();
  }

  /** The last public lines, in pieces that all new clients share. */
  history(): Uint8Array[] {
    this.stamp(); // puts the date before the lines of another day
    return this.#history.parts;
  }

  /** Begins with lines that were said before, each with the time of it. */
  restoreHistory(lines: { time: Date; line: string }[]): void {
    const today = dateText(new Date());
    this.stamp(); // or it would not be known later that this day has ended
    for (const { time, line } of lines) {
      const date = dateText(time), day = date === today ? "" : `${date} `;
      const stamp = this.options.timestamps ? `${day}${timeText(time)} ` : "";
      this.#history.add(encoder.encode(`${stamp}${line}\n`));
    }
  }

  /** The time of day before a line, `12:34 `, if it is wanted; made once a minute, as
   * it takes a microsecond. The first of a day puts the date before earlier lines. */
  stamp(): string {
    if (!this.options.timestamps) return "";
    const now = Date.now(), minute = Math.floor(now / 60_000);
    if (minute === this.#minute) return this.#time;
    const today = dateText(new Date(now));
    const lastDay = dateText(new Date(this.#minute * 60_000));
    if (lastDay !== today) this.#history.addDate(lastDay);
    this.#minute = minute;
    return this.#time = `${timeText(new Date(now))} `;
  }

  /** Appends to the log, past `from` and those who ignore `from`. */
  #append(text: string, lines: Uint8Array, from?: Person): void {
    const start = this.tail.end;
    if (!this.tail.append(text, lines)) {
      this.tail = this.tail.next = new Segment(start);
      this.tail.append(text, lines);
    }
    from?.reader?.skip(start);
    if (from?.ignoredBy) {
      for (const other of from.ignoredBy) other.reader?.skip(start);
    }
    this.turns.appended(this.tail.end - start);
  }

  /** The links that have to be told of what `person` does. */
  #linksFor(person: Person): Iterable<LinkEvents> {
    return person instanceof RemotePerson ? NO_LINKS : this.links;
  }

  /** Flushes at the end of the turn; at once if the line before was of the same person,
   * so that between two people it takes a tenth less time. */
  #flushSoon(sender?: Person): void {
    const alone = sender !== undefined && sender === this.#lastSender;
    this.#lastSender = sender;
    this.#flushNeeded = true;
    if (alone && !this.turns.isEnding) this.flush();
    else this.turns.endSoon();
  }

  /** Whether more readers are far behind than the few that do not read. */
  areManyBehind(): boolean {
    const place = this.tail.end - FAR_BEHIND_BYTES;
    let count = 0;
    if (place <= 0) return false;
    for (const reader of this.readers) {
      if (reader.isBefore(place) && ++count > FEW_READERS) return true;
    }
    return false;
  }

  /** Ends readers that are behind the window, and starts a write for each that is not
   * writing. */
  flush(): void {
    if (!this.#flushNeeded) return;
    this.#flushNeeded = false;
    const readers = [...this.readers], start = this.tail.end - WINDOW_BYTES;
    if (readers.length <= RANDOM_START_READERS) {
      const first = Math.floor(Math.random() * readers.length);
      readers.push(...readers.splice(0, first));
    }
    for (const reader of readers) {
      if (reader.isBefore(start)) reader.sink.fail(TOO_SLOW);
      reader.flush();
    }
  }
}

/** A person as lists show them. */
function label({ name, away }: Person): string {
  return away === null ? name : `${name} (away)`;
}

function awayText({ name, away }: Person): string {
  return `* ${name} is away${away && `: ${away}`}\n`;
}

/** The local time of day, `12:34`. */
function timeText(time: Date): string {
  return time.toTimeString().slice(0, 5);
}

/** The local date, `2026-01-31`. */
function dateText(time: Date): string {
  const month = String(time.getMonth() + 1).padStart(2, "0");
  const day = String(time.getDate()).padStart(2, "0");
  return `${time.getFullYear()}-${month}-${day}`;
}

// ---------------------------------------------------------------------------
// Client: one connection, from its first byte to its last. It is read, split into
// lines and paced; it receives the room until it leaves.
// ---------------------------------------------------------------------------

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

/** The size of the read buffer, in bytes. A client that only listens has the
 * smallest; a full read makes it eight times larger, up to the largest. */
const SMALLEST_READ_BYTES = 256, LARGEST_READ_BYTES = 65_536;

/** The largest buffer of a client that is paced, as what was read waits in memory,
 * and of a client whose last read did not fill its buffer. */
const PACED_READ_BYTES = 8_192, RESTING_READ_BYTES = 2_048;

/** An array of so many bytes. Small ones share an allocation, which saves each client
 * 0.6 KB. */
function allocate(size: number): Uint8Array {
  const { buffer, byteOffset } = Buffer.allocUnsafe(size);
  return new Uint8Array(buffer, byteOffset, size);
}

/** What a client sends: how bytes become lines, the lines that were not said yet, and
 * how fast they may be. */
class Input {
  /** The question that the next line answers. */
  question: "" | "password" | "name" = "";
  /** What it was answered with, until that is taken. */
  answer: string | null = null;
  /** Whether the first line was looked at. */
  firstLineSeen = false;
  /** The lines that wait. They may lie in the client's buffer, which is read into
   * again only when all are said. */
  lines: Uint8Array = NO_BYTES;
  readonly pace: Pace;
  readonly #splitter: LineSplitter;
  /** How many bytes of a TLS handshake came first; -1 if there were others. */
  #tlsBytes = 0;

  /** @param debt lines that its address sent beyond the rate before */
  constructor(readonly options: Options, record: AddressRecord, debt: number) {
    this.pace = new Pace(options.rate, record, debt);
    this.#splitter = new LineSplitter(options.raw, (start) => {
      if (this.question === "name") return true;
      // An empty password is no answer.
      if (this.question === "password" && start !== "") return true;
      return hasCommands(options) && beginsCommand(start);
    });
  }

  get hasLine(): boolean {
    return this.lines.length > 0;
  }

  /** Makes lines of what was read, when the ones before were all said. Returns what
   * made them. */
  split(bytes: Uint8Array): LineSplitter {
    this.lines = this.#splitter.push(bytes);
    return this.#splitter;
  }

  /** The client has ended: what it sent last may be a line. */
  end(): void {
    this.lines = this.#splitter.end();
  }

  /** The answer to the question: it may be the password, and is not kept. */
  takeAnswer(): string | null {
    const { answer } = this;
    this.answer = null;
    return answer;
  }

  /** Takes the lines that can be handled together, as {@linkcode nextRun} finds
   * them. */
  take(most: number): Run {
    const run = nextRun(this.lines, most, hasCommands(this.options));
    this.lines = run.rest;
    return run;
  }

  /** Whether the first bytes, which may come one by one, begin a TLS handshake. */
  beginsTls(bytes: Uint8Array): boolean {
    for (let i = 0; i < bytes.length && this.#tlsBytes >= 0; i++) {
      const isNext = bytes[i] === TLS_HANDSHAKE[this.#tlsBytes];
      this.#tlsBytes = isNext ? this.#tlsBytes + 1 : -1;
      if (this.#tlsBytes === TLS_HANDSHAKE.length) return true;
    }
    return false;
  }
}

/** How many seconds' worth of lines a client may send at once, and for how many it
 * waits at least when it has sent them: to wake up for each line takes four times
 * the time. */
const BURST_SECONDS = 5, PAUSE_SECONDS = 0.3;

/** How many seconds' worth of lines a client takes over at most of what its address
 * owes. With all of it, it is told that its lines wait before the first is said: that
 * shows whether its connection has failed. */
const DEBT_SECONDS = 8;

/** After how long, and how often, a client is told that its lines wait. */
const WAITING_MILLISECONDS = 2_000, WAITING_AGAIN_MILLISECONDS = 10_000;

/** Lines that were sent beyond a rate: a token bucket, by what is missing in it. */
class Debt {
  /** How many they were when last settled, and what was charged since. */
  lines = 0;
  #settled = performance.now();

  /** Takes off what `rate` lines a second have allowed since it was last settled.
   * Returns what is left. */
  settle(rate: number): number {
    const now = performance.now();
    const allowed = (now - this.#settled) * rate / 1_000;
    this.#settled = now;
    return this.lines = Math.max(0, this.lines - allowed);
  }
}

/** How fast a client may send. What an address sends over several connections, one
 * after the other, counts together. */
class Pace extends Debt {
  /** Whether it has to wait. */
  #isHeld = false;
  /** When the client is next told that its lines wait; if they do. */
  #nextNotice = Infinity;

  /** @param rate lines a second; 0 is no limit
   * @param debt lines beyond it */
  constructor(
    readonly rate: number,
    readonly record: AddressRecord,
    debt: number,
  ) {
    super();
    this.lines = Math.min(rate * DEBT_SECONDS, debt);
  }

  /** How many lines it may send at once. */
  get #most(): number {
    return this.rate * BURST_SECONDS;
  }

  /** How many lines it may send now. */
  get allowed(): number {
    return this.rate === 0 ? Infinity : Math.floor(this.#most - this.lines);
  }

  /** Takes what `lines` lines cost. The address is charged at once, as the end of a
   * client that is paced is seen only after its lines. */
  charge(lines: number): void {
    if (this.rate === 0) return;
    this.settle(this.rate);
    this.lines += lines;
    this.record.settleFor(this.rate);
    this.record.lines += lines;
  }

  /** For how many milliseconds the client has to wait. What is not read meanwhile, TCP
   * holds back at the sender: nothing is dropped. */
  pause(): number {
    const { rate } = this;
    if (rate === 0) return 0;
    const tokens = this.#most - this.settle(rate);
    this.#hold(tokens < 1);
    if (tokens > this.#most / 2) this.#nextNotice = Infinity;
    if (tokens >= 1) return 0;
    // Between half and all of it, or clients that began together would stay so.
    const enough = rate * PAUSE_SECONDS * (1 + Math.random()) / 2;
    return (Math.max(1, enough) - tokens) * 1_000 / rate;
  }

  /** The client has left. */
  end(): void {
    this.#hold(false);
  }

  #hold(isHeld: boolean): void {
    if (isHeld === this.#isHeld) return;
    this.#isHeld = isHeld;
    this.record.held += isHeld ? 1 : -1;
  }

  /** Whether a client whose lines wait is told so now. */
  isNoticeTime(): boolean {
    const now = performance.now();
    if (this.#nextNotice === Infinity) {
      this.#nextNotice = now + WAITING_MILLISECONDS;
    }
    if (now < this.#nextNotice) return false;
    this.#nextNotice = now + WAITING_AGAIN_MILLISECONDS;
    return true;
  }
}

/** How many commands of a client are run at once, to be answered in one write. */
const MOST_COMMANDS = 8;

/** The time between reads of what a client still sends after it has left. */
const DISCARD_MILLISECONDS = 10;

/** How long a client that leaves has to take the lines that wait for it. */
const DRAIN_MILLISECONDS = 1_000;

/** How long to wait for a TLS handshake or the password, and for a name. */
const ANSWER_MILLISECONDS = 30_000, NAME_MILLISECONDS = 60_000;

const GOODBYE =
  "* Goodbye. If your client stays open, press Enter or Ctrl-C.\n";

/** Prints what happened to a client, with its name, the reason, and how many are
 * connected. */
type Report = (what: string, client: Client, reason?: string) => void;

/** A connection and the person behind it. */
class Client extends Person implements Sink {
  readonly reader: Reader;
  /** What is remembered of its address. */
  readonly record: AddressRecord;
  /** When it connected, and when it sent its last line, in milliseconds of
   * `performance.now`. */
  readonly connected = performance.now();
  lastLine = this.connected;
  /** The last turn of which it used something, and how much. */
  turn = -1;
  used = 0;
  /** The turn in which it was served last, or else connected. */
  servedIn = this.room.turns.number;

  // It is closed when it has left and both directions have ended; at once if one
  // of them fails, or it is too slow; and at the latest when the time to drain is over.
  left = false;
  #inputEnded = false;
  #outputEnded = false;
  #closed = false;

  /** Where the next read goes. */
  #buffer = allocate(SMALLEST_READ_BYTES);
  /** Made with the first bytes, a question, or a debt of its address: many clients
   * only listen. */
  #input: Input | null = null;
  #wake: (() => void) | null = null;
  #wakeTimer: Timer | undefined;
  #deadline: Timer | undefined;

  constructor(
    room: Room,
    readonly connection: Connection,
    readonly address: string,
    readonly port: number,
  ) {
    super(room);
    this.reader = new Reader(room, this);
    this.record = room.access.record(address);
    const debt = this.record.settleFor(room.options.rate);
    if (debt > 0) this.#input = this.#newInput(debt);
  }

  /** Its address and port, in the usual form. */
  get origin(): string {
    return formatAddress(this.address, this.port);
  }

  /** The life of the client, from the first byte to the last. */
  async live(): Promise<void> {
    const { options, people } = this.room;
    if (this.connection.handshake) await handshake(this);
    if (options.passwordFile && !this.left) await askPassword(this);
    if (options.askName && !this.left) await askName(this);
    else if (!this.left) this.enter(options.raw ? "" : people.guestName());
    // Not awaited: while the client is in the room, one function waits. Another
    // would cost each client half a kilobyte.
    this.#run();
  }

  /** Asks, and resolves to the line that answers; to `null` if the client has left
   * instead. */
  ask(question: string, kind: "password" | "name"): Promise<string | null> {
    this.tell(question);
    (this.#input ??= this.#newInput()).question = kind;
    return this.#run();
  }

  /** Reads what the client sends, and says it; until there is nothing more, or the
   * question that it was asked is answered. */
  async #run(): Promise<string | null> {
    // It is here until it has ended, and all that it sent was said.
    while (!this.#inputEnded || (this.#hasLine && !this.left)) {
      const wait = this.left ? null : this.#wait();
      if (wait !== null) await wait;
      else if (this.left || !this.#hasLine) {
        let count: number | null = 0; // which means that reading fails
        try {
          count = await this.connection.read(this.#buffer);
        } catch { /* it does */ }
        this.#received(count);
        // To close with unread input would reset the connection, and the last
        // lines to the client could be lost.
        if (this.left && !this.#inputEnded) {
          await this.#sleep(DISCARD_MILLISECONDS);
        }
      } else if (!this.room.turns.serve(this)) await this.room.turns.wait(this);
      const answer = this.#input?.takeAnswer() ?? null;
      if (answer !== null) return answer;
    }
    this.leave("");
    if (this.#outputEnded) this.#close();
    return null;
  }

  /** Greets the client, and lets it into the room. */
  enter(name: string): void {
    const { room, reader } = this, { raw, askName } = room.options;
    clearTimeout(this.#deadline);
    if (raw) reader.follow();
    else {
      const history = room.history();
      reader.insert(encoder.encode(welcome(room, name, history.length > 0)));
      for (const part of history) reader.insert(part, 0);
      room.enter(this, name);
      reader.flush();
    }
    const what = askName ? "Name chosen by" : "Password accepted from";
    if (askName || room.options.passwordFile) room.report(what, this);
  }

  // -- reading

  #newInput(debt = 0): Input {
    return new Input(this.room.options, this.record, debt);
  }

  get #hasLine(): boolean {
    return this.#input?.hasLine ?? false;
  }

  /** Counts lines against its rate. They are what it has sent, or for that. */
  charge(lines: number): void {
    this.#input?.pace.charge(lines);
  }

  /** What the client has to wait for before anything else: its pace, the answers
   * that it has not taken yet, or its turn. */
  #wait(): Promise<void> | null {
    const input = this.#input;
    if (input === null) return null; // nothing was read
    const pause = input.pace.pause();
    if (pause > 0) {
      if (input.hasLine) tellOfWaiting(this, input);
      return this.#sleep(pause);
    }
    if (this.reader.isBacklogged) return this.reader.written();
    const { turns } = this.room;
    return turns.hasUsed(this) ? turns.wait(this) : null;
  }

  #sleep(milliseconds: number): Promise<void> {
    return new Promise((resolve) => {
      this.#wake = resolve;
      this.#wakeTimer = setTimeout(resolve, milliseconds);
    });
  }

  #received(count: number | null): void {
    if (count === null) this.#inputEnded = true;
    else if (!(count > 0)) return this.fail(""); // it would be tried endlessly
    if (this.left) return; // nothing more of it is looked at
    if (count === null) return this.#input?.end();
    const input = this.#input ??= this.#newInput();
    const bytes = this.#buffer.subarray(0, count);
    if (input.beginsTls(bytes)) return this.leave("TLS, which is off");
    const { junk, telnet } = input.split(bytes);
    this.#sizeBuffer(count);
    input.pace.charge(junk); // what cleaning removed was work like what it kept
    this.room.turns.count(this, count);
    if (telnet !== null) answerTelnet(this, telnet, input);
  }

  /** Chooses the size of the next read after one of `count` bytes. */
  #sizeBuffer(count: number): void {
    const { length } = this.#buffer, isPaced = this.room.options.rate > 0;
    const most = isPaced ? PACED_READ_BYTES : LARGEST_READ_BYTES;
    let size = Math.min(length, RESTING_READ_BYTES);
    if (count === length) size = Math.min(length * 8, most);
    else if (count <= SMALLEST_READ_BYTES) size = SMALLEST_READ_BYTES;
    if (size !== length) this.#buffer = allocate(size);
  }

  // -- talking

  /** Says the next lines together, or carries out some commands, one by one.
   *
   * @param now in milliseconds of `performance.now`: to call that here would take a
   * twentieth of the time of a line */
  sayNext(now: number): void {
    const input = this.#input;
    if (!input?.hasLine) return;
    this.lastLine = now;
    for (let commands = 0; commands < MOST_COMMANDS; commands++) {
      if (this.left || !input.hasLine) return;
      if (input.pace.allowed < 1 || this.reader.isBacklogged) return;
      if (refuseOtherProtocol(this, input) || this.#sayRun(input)) return;
    }
  }

  /** Says the next lines that can be appended together, or takes the next command or
   * answer. Tells whether that is all for now. */
  #sayRun(input: Input): boolean {
    const { room } = this, { pace } = input;
    const isAnswer = input.question !== "";
    const run = input.take(isAnswer ? 1 : pace.allowed);
    pace.charge(run.count);
    room.turns.count(this, run.lines.length + run.count * LINE_COST);
    if (!isAnswer) return COMMANDS.handle(this, run);
    input.question = "";
    input.answer = decoder.decode(run.lines.subarray(0, -1));
    return true;
  }

  // -- receiving

  write(bytes: Uint8Array): Promise<number> {
    return this.connection.write(bytes);
  }

  // -- leaving

  /** Disconnects the client, and tells it why. */
  disconnect(why: string, reason: string): void {
    if (!this.room.options.raw) this.tellError(why);
    this.quit(reason);
  }

  /** Leaves with a last line, as many clients stay open after the end. */
  quit(reason: string): void {
    if (hasCommands(this.room.options)) this.tell(GOODBYE);
    this.leave(reason);
  }

  /** Leaves the room. The lines before that are still written, for
   * {@linkcode DRAIN_MILLISECONDS} at most. */
  leave(reason: string): void {
    if (this.left) {
      // At shutdown the end of its input is not waited for.
      if (this.room.closed && this.#outputEnded) this.#close();
      return;
    }
    const { room } = this;
    this.left = true;
    this.#input?.pace.end();
    room.access.release(this.record);
    room.leave(this, reason);
    const what = this.#inputEnded ? "Connection closed by" : "Disconnected";
    room.report(what, this, reason);
    this.#stopSleeping();
    this.reader.end();
    if (this.#closed) return; // nothing waited; a timer takes 1.3 KB
    this.setDeadline(DRAIN_MILLISECONDS, () => this.#close());
  }

  /** Its connection has failed, or it is too slow: the lines that wait for it are
   * lost. */
  fail(reason: string): void {
    if (reason !== TOO_SLOW) this.#inputEnded = true;
    this.reader.stop();
    this.leave(reason);
    this.#close();
  }

  async drained(): Promise<void> {
    const { connection } = this;
    // If the client has ended its side, closing a TCP connection is enough: the system
    // still delivers what it took.
    const isEnd = this.#inputEnded && "setNoDelay" in connection;
    if (isEnd || !connection.closeWrite) return this.#close();
    try {
      await connection.closeWrite();
      this.#outputEnded = true;
      if (!this.#inputEnded && !this.room.closed) return;
    } catch { /* the client is gone */ }
    this.#close();
  }

  #close(): void {
    if (this.#closed) return;
    this.#closed = this.#inputEnded = true;
    this.#stopSleeping();
    clearTimeout(this.#deadline);
    this.reader.stop();
    this.#input = null;
    this.#buffer = NO_BYTES;
    this.ignored = null;
    tryClose(this.connection);
    this.room.forget(this.reader);
  }

  #stopSleeping(): void {
    clearTimeout(this.#wakeTimer);
    this.#wake?.();
  }

  /** Calls `late` after that time, in place of an earlier deadline, unless the client
   * enters the room or is closed before. */
  setDeadline(milliseconds: number, late: () => void): void {
    clearTimeout(this.#deadline);
    this.#deadline = setTimeout(late, milliseconds);
  }
}

// -- before a client is in the room

/** Waits until bytes can be exchanged. */
async function handshake(client: Client): Promise<void> {
  const fail = () => client.fail("no TLS");
  client.setDeadline(ANSWER_MILLISECONDS, fail);
  try {
    await client.connection.handshake!();
  } catch {
    fail();
  }
}

/** Disconnects a client that does not answer in time. */
function limitAnswer(
  client: Client,
  milliseconds: number,
  reason: string,
): void {
  const why = "That took too long. Join again.";
  client.setDeadline(milliseconds, () => client.disconnect(why, reason));
}

/** Asks for the password until it is right, or the client has left. */
async function askPassword(client: Client): Promise<void> {
  const { record, room: { access, options } } = client;
  limitAnswer(client, ANSWER_MILLISECONDS, "no password");
  await Promise.resolve(); // the new connection is reported first
  while (!record.isLocked) {
    const question = "* This room has a password. What is it?\n";
    const line = await client.ask(question, "password");
    if (line === null) return;
    // Others at its address may have tried meanwhile.
    if (record.isLocked) break;
    if (access.tryPassword(line, record)) return;
    // In a raw room the question is the only line that is not a relayed one.
    if (!options.raw) client.tellError("That is not the password.");
  }
  const wait = "Too many wrong passwords from your address.";
  client.disconnect(`${wait} Try again in a minute.`, "no password");
}

/** Asks for a name, as Protohackers' Budget Chat does, and lets the client in. */
async function askName(client: Client): Promise<void> {
  limitAnswer(client, NAME_MILLISECONDS, "no name");
  const question = "* Welcome to Parley. What is your name?\n";
  const line = await client.ask(question, "name");
  if (line === null || client.left) return;
  const name = normalizeName(line);
  const problem = client.room.people.nameProblem(name, client);
  if (problem === null) return client.enter(name!);
  client.disconnect(`${problem} Join again with another.`, "no name");
}

/** What a client is told as it enters. */
function welcome(room: Room, name: string, hasHistory: boolean): string {
  if (room.options.askName) {
    const names = Array.from(room.people.values(), ({ name }) => name);
    return `* The room contains: ${names.join(", ")}\n`;
  }
  return `* Welcome! You are ${name}. Type a message and press Enter. ` +
    "/nick NAME sets your name, /help lists commands.\n" +
    room.motd + room.people.hereNow + (hasHistory ? "* Earlier:\n" : "");
}

// -- while it is there

/** Tells a person who pastes why others do not see all of it yet. */
function tellOfWaiting(client: Client, input: Input): void {
  const { options } = client.room;
  if (!hasCommands(options) || !input.pace.isNoticeTime()) return;
  const count = countLines(input.lines);
  const waiting = `${count} ${count === 1 ? "is" : "are"} waiting`;
  client.tellError(
    `Your lines are sent at ${options.rate} a second; ${waiting}.`,
  );
}

// -- clients of other protocols

/** The first line of an HTTP, RTSP or SIP request (RFC 9112, section 3). */
const REQUEST = /^[\w-]+ \S+ ((?:HTTP|RTSP|SIP)\/\d\S*)/i;

/** The first piece of one that is too long. */
const LONG_REQUEST =
  /^(?:(?:GET|HEAD|POST|PUT|PATCH|DELETE|OPTIONS) |[\w-]+ (?:rtsp|sips?):)\S{4000,}$/i;

/** How a TLS handshake begins (RFC 8446, 5.1). */
const TLS_HANDSHAKE = [0x16, 0x03];

const NOT_A_TERMINAL =
  "This is a Parley chat room. Join it from a terminal: nc HOST PORT\n";

/** Answers a client whose first line is one of another protocol, and disconnects it;
 * tells whether it was. */
function refuseOtherProtocol(client: Client, input: Input): boolean {
  if (input.firstLineSeen) return false;
  input.firstLineSeen = true;
  const request = decoder.decode(input.lines), [line] = request.split("\n", 1);
  const isSsh = /^SSH-\d/.test(line); // RFC 4253, 4.2
  const [isRequest = LONG_REQUEST.test(line), version] = REQUEST.exec(line) ??
    [];
  if (!isRequest && !isSsh) return false;
  const { webPage } = client.room;
  client.tell(isSsh ? NOT_A_TERMINAL : webAnswer(request, webPage, version));
  client.leave(isSsh ? "an SSH client" : "a web request");
  return true;
}

/** Replies to telnet commands, and to what their user asks for by them. Each costs
 * like a line, so that replies have a bound. */
function answerTelnet(
  client: Client,
  telnet: TelnetFilter,
  input: Input,
): void {
  const { reply, request } = telnet, { reader } = client;
  telnet.reply = [];
  telnet.request = 0;
  if (reply.length > 0) {
    client.charge(1);
    reader.insert(Uint8Array.from(reply));
    reader.flush();
  }
  if (request === 0 || client.room.options.raw) return;
  client.charge(1);
  const isAsked = input.question !== "";
  const leaving = isAsked || !hasCommands(input.options)
    ? "close the connection (in telnet: Ctrl-], then quit)"
    : "type /quit";
  client.tell(
    request === AYT ? "* Yes, Parley is here.\n" : `* To leave, ${leaving}.\n`,
  );
}

/** The answer to a request, whose first lines have come: a redirect to the web page,
 * if there is one, under this machine's own name for itself. */
function webAnswer(request: string, url: string, version = "HTTP/1.1"): string {
  const page = URL.parse(url);
  const [, host] = /^host: *(\[[\da-f:.]+\]|[\w.-]+)/im.exec(request) ?? [];
  if (page !== null && host) page.hostname = host;
  const status = page && /^HTTP/i.test(version)
    ? `302 Found\r\nLocation: ${page}`
    : "400 Bad Request";
  return `${version} ${status}\r\nContent-Type: text/plain\r\n` +
    `Content-Length: ${NOT_A_TERMINAL.length}\r\nConnection: close\r\n\r\n` +
    NOT_A_TERMINAL;
}

// ---------------------------------------------------------------------------
// Commands: what a line such as "/who" or "/msg bob hi" does. /help is printed
// from the same table.
// ---------------------------------------------------------------------------

/** A command: a slash, letters, then white space or the end of the line. */
const COMMAND_LINE = /^\/(\p{L}+|\?)(?:\s|$)/u;

/** What does not show in the first word of a line, or was no text. */
const HIDDEN = /[\p{DI}\p{Co}\p{Cn}\ufffd]/gu;

/** A line without the spaces before it, and without what does not show in its first
 * word. */
function plainStart(line: string): string {
  return line.trimStart().replace(/^\S+/, (word) => word.replace(HIDDEN, ""));
}

/** The longest name of a command that is looked at. */
const COMMAND_UNITS = 24;

/** Names of commands, each before what it is called in other chats. */
const NAMES_ELSEWHERE = [
  "quit leave logout part disconnect q",
  "who users online",
  "nick rename",
  "ignore block mute",
  "msg dm query",
  "away afk",
  "help commands",
].map((names) => names.split(" "));

/** How many people one person can ignore. */
const MOST_IGNORED = 1_000;

/** The longest reason for leaving or being away, in UTF-16 units. */
const REASON_UNITS = 200;

/** How all reasons begin that the server itself gives to {@linkcode Client.leave},
 * without what is between their letters. A typed reason that begins like one is quoted. */
const SERVER_REASON =
  /^(tooslow|kicked|banned|tls|awebrequest|anssh|no(name|password|tls))/i;

/** Why a line, or the rest of it, was not sent, by what stands for it. */
const REFUSED: Record<number, string> = {
  [TOO_LONG]:
    `Nothing was sent: a command can have ${LINE_BYTES} bytes at most.`,
  [ERASED]:
    `The rest of that line was not sent: nothing can be erased in a line ` +
    `of more than ${LINE_BYTES} bytes.`,
};

type Command<Actor> = [
  /** Its name, and then others that mean the same. */
  names: string,
  /** What is typed after the name: required, unless it is in brackets. */
  args: string,
  help: string,
  run: (actor: Actor, text: string) => void,
];

/** Whether the first piece of a line that is too long begins a command. A slash
 * alone may: the rest of the command is in the next piece. */
function beginsCommand(start: string): boolean {
  const text = plainStart(start);
  return text === "/" || COMMAND_LINE.test(text);
}

/** A table of commands. */
class Commands<Actor extends Person> {
  readonly #byName = new Map<string, Command<Actor>>();
  /** The names that are suggested for others. */
  readonly #suggested: string[];
  #overview: Uint8Array | null = null;

  /** @param unsafe names that are never suggested for another */
  constructor(readonly list: Command<Actor>[], unsafe: string[] = []) {
    for (const command of list) {
      for (const name of command[0].split(" ")) this.#byName.set(name, command);
    }
    this.#suggested = list.flatMap(([names]) =>
      names.split(" ").filter((name, i) => i === 0 || name.length > 2)
    ).filter((name) => !unsafe.includes(name));
  }

  /** Says the lines of a run, or carries out its command. Tells whether the lines
   * themselves were said. */
  handle(actor: Actor, { isCommand, lines }: Run): boolean {
    const refusal = REFUSED[lines[0]];
    if (refusal) {
      actor.tellError(refusal);
      return false;
    }
    const said = isCommand ? this.#run(actor, lines) : lines;
    if (said !== null) actor.room.say(actor, said);
    return said !== null;
  }

  /**
   * Runs the command of a line. It may have spaces before it, or a space would make
   * a private message public; an unknown command after spaces is a message.
   *
   * @returns the line to say, with its end, if it is no command
   */
  #run(actor: Actor, bytes: Uint8Array): Uint8Array | null {
    const typed = decoder.decode(bytes.subarray(0, -1));
    const line = plainStart(typed), isIndented = !typed.startsWith("/");
    const [start, word] = COMMAND_LINE.exec(line) ?? [];
    const name = word?.slice(0, COMMAND_UNITS).toLowerCase() ?? "";
    const command = this.#byName.get(name);
    if (start === undefined || (isIndented && !command)) {
      const isQuoted = typed.startsWith("//") &&
        COMMAND_LINE.test(plainStart(typed.slice(1)));
      return isQuoted ? bytes.subarray(1) : bytes;
    }
    const rest = line.slice(start.length);
    const text = BLANK.test(rest) ? "" : rest.trim();
    if (command === undefined) {
      const nearest = this.#nearest(name);
      const hint = nearest && ` Did you mean /${nearest}?`;
      const help = `/help lists commands, //${name} sends it as a message.`;
      actor.tellError(`Unknown command /${name}.${hint} ${help}`);
      return null;
    }
    const [, args, help, run] = command;
    const lacksText = text === "" && /^\w/.test(args);
    if (lacksText) actor.tellError(`Type ${usage(command)} (${help}).`);
    else run(actor, text);
    return null;
  }

  /** The command that a word may mean: one of the same letters, what it is called
   * elsewhere, or the closest, unless that is quite another word; empty then. */
  #nearest(word: string): string {
    if (COMMANDS.#byName.has(word)) return ""; // which the operator does not have
    const all = this.#suggested, letters = sorted(word);
    const [elsewhere] = NAMES_ELSEWHERE.find((it) => it.includes(word)) ?? [];
    const known = all.find((name) => sorted(name) === letters) ??
      all.find((name) => name === elsewhere);
    if (known) return known;
    const most = word.length < 5 ? 1 : 2;
    const names = all
      .filter((name) => Math.abs(name.length - word.length) <= most);
    const closest = names.length > 0 ? closestString(word, names) : "";
    return levenshteinDistance(word, closest) <= most ? closest : "";
  }

  /** Tells what all commands do, or the one that is named in `text`. */
  help(actor: Actor, text: string): void {
    const name = text.slice(0, COMMAND_UNITS).replace(/^\//, "").toLowerCase();
    if (!name) return actor.tell(this.#overview ??= this.#allHelp());
    const command = this.#byName.get(name);
    if (!command) {
      const what = `There is no command /${name}.`;
      return actor.tellError(`${what} /help lists commands.`);
    }
    const others = command[0].split(" ").slice(1).map((name) => `/${name}`);
    const also = others.length > 0 ? ` (also ${others.join(", ")})` : "";
    actor.tell(`* ${usage(command)}: ${command[2]}${also}\n`);
  }

  #allHelp(): Uint8Array {
    const rows = [
      ["TEXT", "sends a message to everyone"],
      ...this.list.map((command) => [usage(command), command[2]]),
      ["//COMMAND", "sends a message that begins with /COMMAND"],
    ];
    const width = Math.max(...rows.map(([typed]) => typed.length)) + 2;
    const lines = rows.map(([typed, help]) =>
      `* ${typed.padEnd(width)}${help}\n`
    );
    return encoder.encode(lines.join(""));
  }
}

/** The letters of a word, in the order of the alphabet. */
function sorted(word: string): string {
  return [...word].sort().join("");
}

/** How a command is typed. */
function usage([names, args]: Command<never>): string {
  return `/${names.split(" ")[0]} ${args}`.trimEnd();
}

// deno-fmt-ignore: a command a line
/** The commands that the operator has too. */
const SHARED_COMMANDS: Command<Person>[] = [
  ["me", "ACTION", "shows what you do: /me waves", sayAction],
  ["msg tell whisper w pm", "NAME TEXT", "sends a private message", sendPrivateMessage],
  ["reply r", "TEXT", "answers your last private message", reply],
];

// deno-fmt-ignore: a command a line
const COMMANDS = new Commands<Client>([
  ["help h ?", "[COMMAND]", "lists the commands, or explains one", help],
  ["nick name", "NAME", "changes your name", changeName],
  ["who names list", "[NAME]", "lists who is here, or tells about one person", tellWho],
  ...SHARED_COMMANDS,
  ["ignore", "[NAME]", "hides NAME's messages, again to undo; alone: lists them", ignore],
  ["quiet", "[on|off]", "hides who joins, leaves or changes names", (client, text) => toggle(client, text, "quiet")],
  ["bell", "[on|off]", "rings when you are named or get a private message", (client, text) => toggle(client, text, "bell")],
  ["away", "[REASON]", "tells others that you are away", goAway],
  ["back", "", "tells others that you are back", comeBack],
  ["quit exit bye", "[REASON]", "leaves the room", (client, text) => client.quit(typedReason(text))],
]);

function sayAction(person: Person, text: string): void {
  person.room.say(person, encoder.encode(text + "\n"), { action: true });
}

function sendPrivateMessage(person: Person, typed: string): void {
  const [name, text] = firstWord(typed);
  if (BLANK.test(text)) {
    return person.tellError("Type /msg NAME TEXT (the text is missing).");
  }
  const to = findPerson(person, name);
  if (to) person.room.sayPrivately(person, to, text);
}

function reply(person: Person, text: string): void {
  const { room, replyTo } = person;
  if (replyTo === null) {
    const what = "You have no private message to answer.";
    person.tellError(`${what} /msg NAME TEXT sends one.`);
  } else if (room.people.find(replyTo.name) !== replyTo) {
    person.tellError(`${replyTo.name} has left the room.`);
  } else room.sayPrivately(person, replyTo, text);
}

function help(client: Client, text: string): void {
  client.charge(0.5); // the answer is long
  COMMANDS.help(client, text);
}

function changeName(client: Client, text: string): void {
  const { room } = client, name = normalizeName(text);
  const problem = room.people.nameProblem(name, client);
  if (problem) client.tellError(`${problem} Try another: /nick NAME`);
  else if (name !== client.name) room.rename(client, name!);
  else client.tellError(`You are ${name} already.`);
}

function tellWho(client: Client, text: string): void {
  if (!text) {
    const { everyone } = client.room.people;
    client.charge(everyone.length / LINE_BYTES);
    // How long this is does not depend on the client. A long one counts as just so
    // much that no other answer follows before it is taken (isBacklogged).
    const most = MOST_INSERTED_BYTES * BACKLOG_PART + 1;
    const cost = Math.min(everyone.length, most);
    client.reader.insert(everyone, cost);
    return client.reader.flush();
  }
  const person = findPerson(client, text);
  if (!person) return;
  const times = person instanceof Client
    ? ` has been here for ${timeSince(person.connected)}, ` +
      `idle for ${timeSince(person.lastLine)}`
    : " is here";
  client.tell(`* ${person.name}${times}.\n`);
  if (person.away !== null) client.tell(awayText(person));
}

function ignore(client: Client, text: string): void {
  if (!text) {
    const names = Array.from(client.ignored ?? [], ({ name }) => name);
    return client.tell(`* You ignore ${names.join(", ") || "nobody"}.\n`);
  }
  const person = findPerson(client, text);
  if (!person) return;
  const { name } = person;
  if (person === client) client.tellError("You cannot ignore yourself.");
  else if (client.stopIgnoring(person)) {
    client.tell(`* You receive messages from ${name} again.\n`);
  } else if (client.ignored?.size === MOST_IGNORED) {
    client.tellError(`You already ignore ${MOST_IGNORED} people.`);
  } else {
    client.ignore(person);
    const what = `You no longer receive messages from ${name}.`;
    client.tell(`* ${what} /ignore ${name} undoes this.\n`);
  }
}

/** What a person is told who switches a setting on, and off. */
const SETTINGS = {
  quiet: [
    "Join, leave and rename notices are hidden.",
    "Join, leave and rename notices are shown.",
  ],
  bell: [
    "Your terminal rings when you are named or get a private message.",
    "Your terminal no longer rings.",
  ],
};

/** Switches a setting by "on", "off", or nothing for the other one. */
function toggle(client: Client, text: string, name: "quiet" | "bell"): void {
  const people = client.room[name], [on, off] = SETTINGS[name];
  if (!/^(on|off)?$/i.test(text)) {
    return client.tellError(`Type /${name} on or /${name} off.`);
  }
  const isOn = text ? /on/i.test(text) : !people.has(client);
  if (isOn) people.add(client);
  else people.delete(client);
  client.tell(`* ${isOn ? `${on} /${name} off undoes this.` : off}\n`);
}

function goAway(client: Client, text: string): void {
  const reason = typedReason(text);
  client.room.setAway(client, reason);
  client.tell(`* You are away${reason && `: ${reason}`}. /back ends this.\n`);
}

function comeBack(client: Client): void {
  if (client.away === null) return client.tellError("You are not away.");
  client.room.setAway(client, null);
  client.tell("* You are back.\n");
}

/** The first word of a command's text, and the rest of it. */
function firstWord(text: string): [word: string, rest: string] {
  const [, word, rest] = /^(\S*)\s*(.*)$/.exec(text)!;
  return [word, rest];
}

/** The person of that name; if there is none, `asker` is told so. */
function findPerson(asker: Person, name: string): Person | undefined {
  const { people } = asker.room, person = people.find(name);
  if (person !== undefined) return person;
  const what = `Nobody here is called ${name.slice(0, 24).toWellFormed()}.`;
  const elsewhere = people.findElsewhere(name)?.name;
  const hint = elsewhere ? ` Did you mean ${elsewhere}?` : "";
  asker.tellError(`${what}${hint} /who lists who is here.`);
}

/** A typed reason, which must not pass for one that the server gives. */
function typedReason(text: string): string {
  const short = text.slice(0, REASON_UNITS).toWellFormed();
  const letters = short.normalize("NFKC").replace(/[\P{L}\p{DI}]/gv, "");
  return SERVER_REASON.test(letters) ? `"${short}"` : short;
}

/** How long ago something was, for a person. */
function timeSince(moment: number): string {
  const minutes = Math.floor((performance.now() - moment) / 60_000);
  return minutes === 1 ? "1 minute" : `${minutes} minutes`;
}

// ---------------------------------------------------------------------------
// Server: the listener, the clients that it admits, and the end.
// ---------------------------------------------------------------------------

/** How long to wait when the system accepts no connections for the moment. */
const ACCEPT_RETRY_MILLISECONDS = 100;

/** How often at most to say so, and to say who was refused. */
const ACCEPT_REPORT_MILLISECONDS = 60_000, REFUSAL_REPORT_MILLISECONDS = 1_000;

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
  readonly #stopping = new AbortController();
  /** Aborted when the server begins to stop, before anyone is told. */
  readonly stopping: AbortSignal = this.#stopping.signal;
  /** Resolves when the server has stopped and every connection is closed. */
  readonly finished: Promise<void>;
  readonly #reports: Required<Reports>;
  readonly #prints: boolean;
  readonly #room: Room;
  readonly #tls: TlsOptions | null;
  readonly #listener: Deno.TcpListener;
  readonly #accepting: Promise<void>;
  #stopped: Promise<void> | null = null;
  readonly #refusals = new ReportLimit(REFUSAL_REPORT_MILLISECONDS);
  readonly #acceptProblems = new ReportLimit(ACCEPT_REPORT_MILLISECONDS);

  /** Use {@linkcode ChatServer.listen}. */
  private constructor(options: Options, reports: Reports) {
    this.#reports = {
      print: guarded(reports.print),
      warn: guarded(reports.warn),
    };
    this.#prints = reports.print !== undefined;
    // The files first: no client can connect to a room that does not open.
    const { host, port, reusePort, tlsCert, tlsKey, log, motd } = options;
    this.#room = new Room(options, this.#report);
    this.#tls = tlsCert ? readTlsOptions(tlsCert, tlsKey) : null;
    if (motd) this.#room.motd = readMotd(motd);
    const { warn } = this.#reports;
    if (log) this.#room.transcript = new Transcript(log, this.#room, warn);
    try {
      this.#listener = Deno.listen({ hostname: host, port, reusePort });
    } catch (error) {
      this.#room.transcript?.close();
      const what = `Cannot listen on ${formatAddress(host, port)}`;
      throw openError(what, error, "--allow-net", {
        other: "choose an address with --host",
        PermissionDenied:
          "ports below 1024 are for administrators (choose a higher --port)",
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
    const unknown = Object.keys(options).find((it) =>
      !Object.hasOwn(DEFAULTS, it)
    );
    if (unknown) throw new UsageError(`Unknown option ${unknown}`);
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
    // Later, as those who are told of it may call this again.
    return this.#stopped ??= Promise.resolve().then(() => this.#stop());
  }

  /**
   * Lets an operator speak as `host`, receive what everyone receives, and use the
   * commands that `/help` lists, such as `/kick` and `/ban`.
   *
   * @param lines what the operator types; after its end the room goes on, and is
   * still printed
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
    const room = this.#room;
    if (room.closed) return;
    const stop = () => void this.stop();
    const operator = new Operator(room, guarded(print), stop);
    room.readers.add(operator.reader);
    // The reports tell of clients that join and leave, with the address.
    if (this.#prints && !room.options.quiet) room.quietOnClients.add(operator);
    if (!room.people.find(HOST)) room.add(operator, HOST);
    const iterator = lines[Symbol.asyncIterator]();
    try {
      for (;;) {
        const next = await Promise.race([iterator.next(), this.finished]);
        if (!next || next.done || this.stopping.aborted) break;
        operator.type(next.value);
      }
    } finally {
      room.leave(operator, "", { silent: true });
    }
  }

  /** The address of the web page of this room, to which a browser that asks the
   * chat port is sent; empty if there is none. */
  get webPage(): string {
    return this.#room.webPage;
  }

  set webPage(url: string) {
    this.#room.webPage = url;
  }

  /**
   * Opens the log file again, after another program has renamed it (logrotate).
   *
   * @throws {OpenError} if that cannot be done; the old file stays in use
   */
  reopenLog(): void {
    this.#room.transcript?.reopen();
  }

  /**
   * Links the room with others: receives what local people do, and adds people and
   * lines from elsewhere.
   *
   * @param events what the link is told of
   * @param options `name`: what the others call this server, so that `bob@tokyo` is
   * found as `bob` on the server tokyo
   * @returns how the link puts people and lines into the room
   */
  attach(events: LinkEvents, { name = "" } = {}): Attachment {
    return new RoomLink(this.#room, events, name);
  }

  /** Stops the server at the end of an `await using` block. */
  [Symbol.asyncDispose](): Promise<void> {
    return this.stop();
  }

  async #stop(): Promise<void> {
    this.#print("Shutdown Server ......");
    this.#stopping.abort();
    for (const { sink } of this.#prints ? this.#room.readers : []) {
      if (sink instanceof Operator) sink.leave(); // who was told by the report
    }
    this.#room.close();
    this.#listener.close();
    const links = Array.from(this.#room.links, (link) => link.stopping());
    for (const { sink } of this.#room.readers) sink.leave("");
    await Promise.all([
      this.#room.emptied(),
      this.#room.transcript?.close(),
      atMost(DRAIN_MILLISECONDS, Promise.allSettled(links)),
    ]);
    await this.#accepting; // only then is the port free
  }

  async #accept(): Promise<void> {
    while (!this.#room.closed) {
      try {
        for await (const conn of this.#listener) {
          try {
            conn.setNoDelay(true); // a line does not wait for the next one
            conn.setKeepAlive(true); // clients that vanish are noticed eventually
            const { remoteAddr } = conn;
            const tls = this.#tls && new TlsConnection(conn, this.#tls);
            this.admit(tls ?? conn, remoteAddr);
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
        if (this.#acceptProblems.next() !== null) {
          this.#reports.warn(
            `Cannot accept connections for now: ${reason(error)} ` +
              `(new clients wait; a higher ulimit -n lets more in)`,
          );
        }
        await delay(ACCEPT_RETRY_MILLISECONDS);
      }
    }
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
    // IPv4 without the form that it has at a listener on `::`.
    const address = remote.hostname.replace(/^::ffff:(?=\d+\.)/i, "");
    if (this.#room.closed) return tryClose(connection);
    const refusal = this.#room.access.admit(address);
    if (refusal !== null) {
      const { options } = this.#room;
      const who = formatAddress(address, remote.port);
      const untold = options.quiet ? null : this.#refusals.next();
      const more = untold ? `, and ${untold} before it` : "";
      if (untold !== null) this.#print(`Refused ${who} (${refusal})${more}`);
      refuse(connection, REFUSALS[refusal], options);
      return;
    }
    const client = new Client(this.#room, connection, address, remote.port);
    this.#room.readers.add(client.reader);
    client.live();
    this.#report("New Connection from", client);
  }

  readonly #report: Report = (what, client, reason = "") => {
    const { options, closed, access } = this.#room;
    if (options.quiet || closed || !this.#prints) return;
    const { origin, name } = client;
    const who = (name && `${name}, `) + (reason && `${reason}, `);
    this.#print(`${what} ${origin} (${who}${access.clients} here)`);
  };

  #print(line: string): void {
    this.#reports.print(this.#room.stamp() + line);
  }
}

/** Has what happens often reported once in so many milliseconds. */
class ReportLimit {
  #next = -Infinity;
  #untold = 0;

  constructor(readonly milliseconds: number) {}

  /** How many were not told before this one; `null` if it is not to be told itself. */
  next(): number | null {
    const now = performance.now(), untold = this.#untold;
    const isDue = now >= this.#next;
    if (isDue) this.#next = now + this.milliseconds;
    this.#untold = isDue ? 0 : untold + 1;
    return isDue ? untold : null;
  }
}

/** Tells a connection why it is refused, if that is told, and closes it at once:
 * nobody else waits for its descriptor. */
async function refuse(
  connection: Connection,
  answer: string,
  options: Options,
): Promise<void> {
  const goodbye = hasCommands(options) ? GOODBYE : "";
  const tell = async () => {
    await connection.handshake?.();
    await connection.write(encoder.encode(`! ${answer}\n${goodbye}`));
    await connection.closeWrite?.();
  };
  // It fails if the client is gone.
  if (answer) await atMost(DRAIN_MILLISECONDS, tell().catch(() => {}));
  tryClose(connection);
}

/** An embedding program's function, whose errors are that program's own. */
function guarded<Args extends unknown[], Result>(
  run?: (...args: Args) => Result,
): (...args: Args) => Result | undefined {
  return (...args) => {
    try {
      return run?.(...args);
    } catch (error) {
      reportError(error);
    }
  };
}

// ---------------------------------------------------------------------------
// Link: people and lines from other servers. What carries them is an add-on.
// ---------------------------------------------------------------------------

/** What a chat server tells a link about its own people and lines. Names are local
 * ones, without `@`. */
export interface LinkEvents {
  /** A person sent lines to everyone: whole lines with their ends (LF), cleaned,
   * without the name. With `action` it is the text of one `/me`. In a raw room
   * `name` is empty. */
  said(name: string, lines: Uint8Array, action: boolean): void;
  /** A person has joined. */
  joined(name: string): void;
  /** A person has left; `reason` may be empty. */
  left(name: string, reason: string): void;
  /** A person has changed their name. */
  renamed(from: string, to: string): void;
  /** A person is away, or back (`null`). */
  away(name: string, reason: string | null): void;
  /** A local person sent a private message to a person added by the link, such as
   * `bob@paris`. */
  toldPrivately(from: string, to: string, text: string): void;
  /** The chat server stops. It waits for the promise, but at most a second. */
  stopping(): Promise<void>;
}

/** How a link adds people and lines of other servers to the room. The names of
 * these people have one `@`, such as `alice@tokyo`. */
export interface Attachment {
  /** The local people, and why they are away; `null` if they are not. */
  people(): { name: string; away: string | null }[];
  /** Adds a person; with `announce` the room is told. `false` if the name is
   * invalid or taken. */
  add(
    name: string,
    options?: { announce?: boolean; away?: string | null },
  ): boolean;
  /** Removes a person; with `announce` the room is told, with the reason. With
   * `mayReturn` it is remembered who ignores the person and who answers it by `/reply`,
   * until the person is added again or removed without it. */
  remove(
    name: string,
    options?: { reason?: string; announce?: boolean; mayReturn?: boolean },
  ): void;
  /** Renames a person, and tells the room. `false` if the new name is invalid or
   * taken. */
  rename(from: string, to: string): boolean;
  /** Sets why a person is away; `null` if the person is back. */
  setAway(name: string, reason: string | null): void;
  /** Sends lines of a person to everyone. They are whole lines with their ends
   * (LF), and are cleaned and limited like those of a client. In a raw room any name
   * does. */
  say(name: string, lines: Uint8Array, options?: { action?: boolean }): void;
  /** Sends a private message to a local person. `false` if there is no such
   * person. */
  tell(from: string, to: string, text: string): boolean;
  /** Answers one local person, in a line that begins with `! `. */
  answer(to: string, text: string): void;
  /** Sends a line of the link to everyone. It begins with `* `. */
  notice(text: string): void;
  /** Ends the link, which is told nothing more: the people that it has added leave the
   * room without a notice. */
  detach(): void;
}

/** A person who is connected to another server. */
class RemotePerson extends Person {
  readonly reader = null;

  constructor(room: Room, readonly events: LinkEvents) {
    super(room);
  }

  override receive(from: Person, text: string): boolean {
    this.events.toldPrivately(from.name, this.name, text);
    return true;
  }
}

/** Puts people and lines from elsewhere into the room. Their names are two names with
 * `@` between them, such as `alice@tokyo`, which no local one is. */
class RoomLink implements Attachment {
  readonly #events: LinkEvents;
  /** Those who may return, by {@linkcode nameKey}. */
  readonly #absent = new Map<string, RemotePerson>();

  /** @param server what the others call this server; empty if nothing */
  constructor(
    readonly room: Room,
    events: LinkEvents,
    readonly server: string,
  ) {
    this.#events = {
      said: guarded(events.said.bind(events)),
      joined: guarded(events.joined.bind(events)),
      left: guarded(events.left.bind(events)),
      renamed: guarded(events.renamed.bind(events)),
      away: guarded(events.away.bind(events)),
      toldPrivately: guarded(events.toldPrivately.bind(events)),
      stopping: async () => await events.stopping(),
    };
    room.links.add(this.#events);
    if (server) room.people.ownNames.add(nameKey(server));
  }

  people(): { name: string; away: string | null }[] {
    return [...this.room.people.values()]
      .filter((person) => !(person instanceof RemotePerson))
      .map(({ name, away }) => ({ name, away }));
  }

  add(
    name: string,
    { announce = false, away = null as string | null } = {},
  ): boolean {
    if (!isRemoteName(name) || this.room.people.find(name)) return false;
    const person = this.#takeAbsent(name) ??
      new RemotePerson(this.room, this.#events);
    person.away = away && shortText(away);
    if (announce) this.room.enter(person, name);
    else this.room.add(person, name);
    return true;
  }

  remove(
    name: string,
    { announce = false, reason = "", mayReturn = false } = {},
  ): void {
    const absent = this.#takeAbsent(name);
    if (absent) this.room.leave(absent, "", { silent: true });
    const person = this.#find(name), silent = !announce;
    if (!person) return;
    this.room.leave(person, shortText(reason), { silent, mayReturn });
    if (mayReturn) this.#absent.set(nameKey(name), person);
  }

  /** The person of that name who may return, who is no longer remembered then. */
  #takeAbsent(name: string): RemotePerson | undefined {
    const key = nameKey(name), person = this.#absent.get(key);
    this.#absent.delete(key);
    return person;
  }

  rename(from: string, to: string): boolean {
    const person = this.#find(from), other = this.room.people.find(to);
    if (!person || !isRemoteName(to) || (other && other !== person)) {
      return false;
    }
    this.room.rename(person, to);
    return true;
  }

  setAway(name: string, reason: string | null): void {
    const person = this.#find(name), away = reason && shortText(reason);
    if (person) this.room.setAway(person, away);
  }

  say(name: string, lines: Uint8Array, { action = false } = {}): void {
    const room = this.room, { raw } = room.options;
    const person = raw
      ? new RemotePerson(room, this.#events)
      : this.#find(name);
    if (!person) return;
    const splitter = new LineSplitter(raw, () => false);
    for (const part of [splitter.push(lines), splitter.end()]) {
      for (let rest = part; rest.length > 0;) {
        const run = nextRun(rest, Infinity, false);
        room.say(person, run.lines, { action });
        rest = run.rest;
      }
    }
  }

  tell(from: string, to: string, text: string): boolean {
    const person = this.#find(from), recipient = this.room.people.find(to);
    if (!person || !recipient || recipient instanceof RemotePerson) {
      return false;
    }
    const line = cleanLine(text.slice(0, LINE_BYTES));
    return line === "" || recipient.receive(person, line);
  }

  answer(to: string, text: string): void {
    this.room.people.find(to)?.tellError(shortText(text));
  }

  notice(text: string): void {
    this.room.notice(shortText(text));
  }

  detach(): void {
    this.room.links.delete(this.#events);
    this.room.people.ownNames.delete(nameKey(this.server));
    const people = [...this.room.people.values(), ...this.#absent.values()];
    for (const person of people) {
      if (this.#isOwn(person)) this.room.leave(person, "", { silent: true });
    }
    this.#absent.clear();
  }

  #find(name: string): RemotePerson | undefined {
    const person = this.room.people.get(nameKey(name));
    return person && this.#isOwn(person) ? person : undefined;
  }

  #isOwn(person: Person): person is RemotePerson {
    return person instanceof RemotePerson && person.events === this.#events;
  }
}

/** Whether a name is one of a person on another server. */
function isRemoteName(name: string): boolean {
  const parts = name.split("@");
  return parts.length === 2 && parts.every((it) => normalizeName(it) === it);
}

/** A text from elsewhere, as it may be part of a notice. */
function shortText(text: string): string {
  return cleanLine(text.slice(0, REASON_UNITS).toWellFormed());
}

// ---------------------------------------------------------------------------
// Access: which addresses are admitted, how many clients of each, and the
// password. An address is an IPv4 address or an IPv6 network of 64 bits, as
// anyone with IPv6 has that many addresses.
// ---------------------------------------------------------------------------

/** How many wrong passwords from an address are too many, and for how long they
 * count. */
const PASSWORD_TRIES = 3, PASSWORD_MILLISECONDS = 60_000;

/** How many addresses are remembered before those of which nothing has to be
 * remembered are looked for. */
const MOST_ADDRESSES = 1_000;

/** What is remembered of an address, and how many lines its clients and earlier ones
 * have sent beyond their rate. */
class AddressRecord extends Debt {
  /** How many of its clients are connected, and how many of these have to wait. */
  clients = 0;
  held = 0;
  wrongPasswords = 0;
  lastWrong = -Infinity;

  /** Settles its debt, for clients of which each may send `rate` lines a second; but
   * for those that have to wait, which may be gone. */
  settleFor(rate: number): number {
    return this.settle(rate * Math.max(1, this.clients - this.held));
  }

  /** Whether the last wrong password still counts. */
  get wasWrong(): boolean {
    return performance.now() - this.lastWrong <= PASSWORD_MILLISECONDS;
  }

  /** Whether too many wrong passwords came from it. */
  get isLocked(): boolean {
    if (!this.wasWrong) this.wrongPasswords = 0;
    return this.wrongPasswords >= PASSWORD_TRIES;
  }
}

/** Why a network is banned. */
interface Ban {
  /** Who was connected from there, and was disconnected. */
  names: string[];
  reason: string;
  time: Date;
}

/** Why a client is refused, and what it is told: nothing if its network is not admitted
 * at all. */
const REFUSALS = {
  "not in --allow": "",
  "banned": "",
  "the room is full": "The room is full. Try again later.",
  "--max-per-address": "There are too many connections from your address.",
};

/** Who is admitted: address rules, bans, numbers of clients, lines that each address
 * has sent, and the password. */
class Access {
  /** By their networks, as {@linkcode readNetwork} gives them. */
  readonly bans = new Map<string, Ban>();
  /** How many clients are connected. */
  clients = 0;
  readonly #addresses = new Map<string, AddressRecord>();
  #lastForgotten = -Infinity;
  readonly #allowed: string[];
  /** Whether a text is the password; `null` if none is asked for. */
  readonly #isPassword: ((text: string) => boolean) | null;

  constructor(readonly options: Options) {
    const { allow, passwordFile } = options;
    this.#allowed = allow.map(readNetwork);
    this.#isPassword = passwordFile
      ? passwordTest(readPassword(passwordFile))
      : null;
  }

  /** Counts a client, unless it is refused: then it tells why. */
  admit(address: string): keyof typeof REFUSALS | null {
    const { allow, maxClients, maxPerAddress } = this.options;
    if (allow.length > 0 && !isIn(this.#allowed, address)) {
      return "not in --allow";
    }
    const { bans } = this;
    if (bans.size > 0 && isIn([...bans.keys()], address)) return "banned";
    if (this.clients >= maxClients) return "the room is full";
    const record = this.record(address);
    if (maxPerAddress > 0 && record.clients >= maxPerAddress) {
      return "--max-per-address";
    }
    this.clients++;
    record.clients++;
    return null;
  }

  /** A client that was counted has left. */
  release(record: AddressRecord): void {
    record.clients--;
    this.clients--;
  }

  /** Whether a text is the password; counts the wrong ones. */
  tryPassword(text: string, record: AddressRecord): boolean {
    const isRight = this.#isPassword?.(text) ?? true;
    record.wrongPasswords = isRight ? 0 : record.wrongPasswords + 1;
    if (!isRight) record.lastWrong = performance.now();
    return isRight;
  }

  /** What is remembered of an address. */
  record(address: string): AddressRecord {
    const key = addressKey(address), known = this.#addresses.get(key);
    if (known !== undefined) return known;
    if (this.#addresses.size >= MOST_ADDRESSES) this.#forgetAddresses();
    const record = new AddressRecord();
    this.#addresses.set(key, record);
    return record;
  }

  /** Forgets addresses of which nothing has to be remembered, at most once a
   * second. */
  #forgetAddresses(): void {
    const now = performance.now();
    if (now - this.#lastForgotten < 1_000) return;
    this.#lastForgotten = now;
    for (const [key, record] of this.#addresses) {
      const isQuiet = record.clients === 0 &&
        record.settleFor(this.options.rate) === 0;
      if (isQuiet && !record.wasWrong) this.#addresses.delete(key);
    }
  }
}

function readPassword(path: string): string {
  const [password] = readFile(path).replace(/^\ufeff/, "").split(/\r?\n/);
  // What a client types is cleaned, and refused if it is too long.
  const isShort = encoder.encode(password).length <= LINE_BYTES;
  if (password && isShort && cleanLine(password) === password) return password;
  throw new OpenError(
    `Cannot use ${path}: its first line has to be the password, ` +
      `at most ${LINE_BYTES} bytes of UTF-8`,
  );
}

/** Tests a password, in the same time however much of it is right. */
function passwordTest(password: string): (text: string) => boolean {
  // Loaded only when needed: at start-up it takes 35 ms and 9 MB.
  const { createHash, timingSafeEqual } = process.getBuiltinModule(
    "node:crypto",
  );
  // Digests have one length, so that no comparison ends early.
  const digest = (text: string) => createHash("sha256").update(text).digest();
  const expected = digest(password);
  return (text) => timingSafeEqual(digest(text), expected);
}

// -- addresses

/** What the 128 bits of an IPv4-mapped address begin with (RFC 4291, 2.5.5.2). */
const MAPPED_BITS = "0".repeat(80) + "1".repeat(16);

/** Reads a network (CIDR, RFC 4632) or a single address, such as `10.0.0.0/8` or `::1`.
 * Returns its family, 4 or 6, and the bits that its addresses begin with: `400001010`
 * for 10.0.0.0/8; empty if it is none. */
function readNetwork(text: string): string {
  const [, host = "", length] =
    /^([\da-f:.]+)(?:%[^/]*)?(?:\/(\d{1,3}))?$/i.exec(text) ?? [];
  const isIPv4 = !host.includes(":");
  // Checked, and brought to one spelling (RFC 5952): without leading zeros, which some
  // take for octal (RFC 6943, 3.1.1).
  const url = URL.parse(`http://[${isIPv4 ? "0:0:0:0:0:ffff:" : ""}${host}]/`);
  const prefix = isIPv4 ? 96 + Number(length ?? 32) : Number(length ?? 128);
  if (url === null || prefix > 128) return "";
  const [first, last = []] = url.hostname.slice(1, -1).split("::")
    .map((part) => part.split(":").filter(Boolean));
  const zeros = Array(8 - first.length - last.length).fill("0");
  const bits = [...first, ...zeros, ...last]
    .map((group) => parseInt(group, 16).toString(2).padStart(16, "0")).join("");
  if (!bits.startsWith(MAPPED_BITS)) return "6" + bits.slice(0, prefix);
  return prefix < 96 ? "" : "4" + bits.slice(96, prefix);
}

/** The usual spelling of a network; without a prefix if it is a single address. */
function networkText(network: string): string {
  const bits = network.slice(1), size = network[0] === "4" ? 32 : 128;
  const number = BigInt("0b" + bits.padEnd(size, "0"));
  const groups = number.toString(16).padStart(32, "0").match(/.{4}/g)!;
  const host = size === 32 ? `${number}` : `[${groups.join(":")}]`;
  const address = new URL(`http://${host}`).hostname.replace(/[[\]]/g, "");
  return bits.length < size ? `${address}/${bits.length}` : address;
}

/** Whether an address is in one of these networks. */
function isIn(networks: string[], address: string): boolean {
  const own = networks.length > 0 ? readNetwork(address) : "";
  return networks.some((network) => own.startsWith(network));
}

/** The network by which an address counts: of IPv6 the first 64 bits. */
function countedNetwork(network: string): string {
  return network.length > 128 ? network.slice(0, 65) : network;
}

/** The same as a key. What is no address, such as a path, counts by itself. */
function addressKey(address: string): string {
  if (!address.includes(":")) return address;
  return countedNetwork(readNetwork(address)) || address;
}

function formatAddress(address: string, port: number): string {
  return address.includes(":") ? `[${address}]:${port}` : `${address}:${port}`;
}

// -- files, and what cannot be opened

const PROBLEMS: Record<string, string> = {
  AddrInUse: "the port is in use (choose another with --port)",
  AddrNotAvailable:
    "this machine does not have that address (choose one with --host)",
  NotFound: "there is no such file",
  PermissionDenied:
    "the system denies access (look at the file's owner and mode)",
  IsADirectory: "it is a directory (give a file)",
  NotADirectory: "a part of its path is a file (give another path)",
};

/** The error of what cannot be opened: why, and what to do.
 *
 * @param flags the flags that grant the permission of Deno
 * @param remedies what to say of an error of that name, where it is not what is in
 * {@linkcode PROBLEMS}, and after any `other`
 */
function openError(
  what: string,
  error: unknown,
  flags: string,
  remedies: Record<string, string> = {},
): OpenError {
  const { name, message } = error as Error, { other } = remedies;
  const hint = other ? ` (${other})` : "";
  let why = remedies[name] ?? PROBLEMS[name] ?? reason(error) + hint;
  if (name === "NotCapable") {
    // For devices Deno "Requires all access".
    const needed = message.includes("all access") ? "--allow-all" : flags;
    // A binary was granted its permissions when it was made.
    const how = Deno.build.standalone ? "compile" : "run";
    why = `it is not permitted (${how} it with ${needed})`;
  }
  return new OpenError(`${what}: ${why}`, { cause: error });
}

function exists(path: string): boolean {
  try {
    Deno.statSync(path);
    return true;
  } catch {
    return false; // or it is not permitted to look
  }
}

function readFile(path: string): string {
  try {
    return Deno.readTextFileSync(path);
  } catch (error) {
    throw openError(`Cannot read ${path}`, error, `--allow-read=${path}`);
  }
}

/** The lines of a file for new clients, as the room shows them. */
function readMotd(path: string): string {
  const text = readFile(path).trimEnd();
  return text && text.split("\n").map((it) => `* ${cleanLine(it)}\n`).join("");
}

// ---------------------------------------------------------------------------
// TLS: a connection beside which an inner one speaks TLS.
//
//   client ──TLS──→ outer (TCP) ⇄ middle (loopback) ──→ inner (Deno.listenTls)
//
// A Deno.TlsConn that is closed keeps its socket open until the other side says
// goodbye, which a client that is gone never does. Here the client's socket is a
// TCP one. A TLSSocket of node:tls over it would take one descriptor a client
// instead of three, but its handshake never ends before Deno 2.8.
// ---------------------------------------------------------------------------

const LOOPBACK = "127.0.0.1";

/** How much is passed on at once, in bytes. */
const FORWARD_BYTES = 4_096;

type TlsOptions = Deno.ListenTlsOptions & Deno.TlsCertifiedKeyPem;

/** @throws {OpenError} if the files do not hold a certificate and its key */
function readTlsOptions(certPath: string, keyPath: string): TlsOptions {
  const cert = readFile(certPath), key = readFile(keyPath);
  const options = { hostname: LOOPBACK, port: 0, cert, key };
  try {
    Deno.listenTls(options).close();
  } catch (error) {
    const what = `Cannot use ${certPath} with ${keyPath}`;
    throw openError(what, error, "--allow-net", {
      other: "give a certificate and its own key, as PEM files",
    });
  }
  return options;
}

/** Two ends of one connection, the second of which speaks TLS. */
async function connectTls(
  options: TlsOptions,
): Promise<[middle: Deno.TcpConn, inner: Deno.TlsConn]> {
  // A listener for each (0.1 ms): a port that stayed open could be filled by
  // other programs of this machine.
  using listener = Deno.listenTls(options);
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

class TlsConnection implements Connection {
  readonly #ends: Promise<[middle: Deno.TcpConn, inner: Deno.TlsConn]>;
  readonly #inner: Promise<Deno.TlsConn>;
  #sent: Promise<void> = Promise.resolve();

  constructor(readonly outer: Deno.TcpConn, options: TlsOptions) {
    this.#ends = connectTls(options);
    this.#inner = this.#ends.then(([middle, inner]) => {
      forward(outer, middle);
      this.#sent = forward(middle, outer);
      return inner;
    });
    this.#inner.catch(() => this.close());
  }

  async handshake(): Promise<void> {
    await (await this.#inner).handshake();
  }

  async read(buffer: Uint8Array): Promise<number | null> {
    const inner = await this.#inner;
    try {
      return await inner.read(buffer);
    } catch (error) {
      // Many clients end without close_notify (RFC 8446, 6.1).
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
    tryClose(this.outer);
    this.#ends.then((ends) => ends.forEach(tryClose), () => {});
  }
}

/** Passes on what there is, and then the end. What fails in one direction leaves
 * the other alone, which may still have something to pass on. */
async function forward(from: Deno.TcpConn, to: Deno.TcpConn): Promise<void> {
  try {
    // Not `from.readable`: at its end it closes the socket for writing too.
    const buffer = new Uint8Array(FORWARD_BYTES);
    for (let count; (count = await from.read(buffer)) !== null;) {
      let rest = buffer.subarray(0, count);
      while (rest.length > 0) rest = rest.subarray(await to.write(rest));
    }
  } catch { /* the client is gone: that is an end as well */ }
  await to.closeWrite().catch(() => {});
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

/**
 * A file or pipe that lines are written to. Neither a terminal on hold (Ctrl-S)
 * nor a pipe that nobody reads stops the room, as `console.log` would.
 */
class Output {
  #waiting = "";
  #dropped = 0;
  #gone = false;
  #writing: Promise<void> | null = null;
  /** Whether trouble was told, and nothing has been written since. */
  #troubled = false;

  /**
   * @param most how many characters may wait
   * @param warn is told of trouble; without it the first write that fails is the last
   */
  constructor(
    public file: Pick<Deno.FsFile, "write" | "close">,
    readonly most: number,
    readonly warn?: (trouble: string) => void,
  ) {}

  /** Adds a line, or several. */
  print(lines: string): void {
    if (this.#gone) return;
    if (this.#waiting.length > this.most) {
      this.#dropped += lines.split("\n").length;
      this.#tell("Some lines are lost: the disk is slower than the talk");
    } else this.#waiting += lines + "\n";
    this.#writing ??= this.#write();
  }

  /** Resolves when all is written, or cannot be in that time. */
  async flush(milliseconds: number): Promise<void> {
    if (this.#writing !== null) await atMost(milliseconds, this.#writing);
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
          this.#troubled = false;
        } catch (error) {
          if (this.#gone || !this.warn) return this.stop();
          this.#tell(`Cannot write: ${reason(error)}`);
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

  #tell(trouble: string): void {
    if (!this.#troubled) this.warn?.(trouble);
    this.#troubled = true;
  }
}

/** The longest line of the log file, in bytes: each of a message can be an invalid
 * one, of which U+FFFD makes three. */
const TRANSCRIPT_LINE_BYTES = 3 * LINE_BYTES + 256;

/** A line of the log file: the time, and what was said. */
const TRANSCRIPT_LINE = /^(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z) (.+)$/;

/** Opens a log file.
 *
 * @throws {OpenError} if that cannot be done */
function openLog(path: string): Deno.FsFile {
  try {
    // Only its owner can read what people say.
    const options = { read: true, append: true, create: true, mode: 0o600 };
    return Deno.openSync(path, options);
  } catch (error) {
    const folder = path.replace(/[^/\\]*$/, "") || ".";
    const lacksFolder = error instanceof Deno.errors.NotFound &&
      !exists(folder); // which Deno may ask the user for
    const flags = `--allow-read=${path} --allow-write=${path}`;
    throw openError(`Cannot open ${path}`, error, flags, {
      NotFound: lacksFolder
        ? `the folder ${folder} does not exist (create it first)`
        : "no file can be made there (choose another path)",
    });
  }
}

/** The public lines, kept in a file. */
class Transcript extends Output {
  /** Opens the file, and takes the room's history from it. */
  constructor(
    readonly path: string,
    room: Room,
    warn: (line: string) => void,
  ) {
    const file = openLog(path);
    restore(room, file);
    const end = ` (--log ${path}; the room goes on)`;
    super(file, LOGGED_CHARACTERS, (trouble) => warn(trouble + end));
  }

  /** Opens the file again, after another program has renamed it. If that cannot be
   * done, the old one stays in use. */
  reopen(): void {
    const before = this.file;
    this.file = openLog(this.path);
    before.close();
  }

  /**
   * Adds public lines, as the room receives them.
   *
   * @param stampLength how many bytes of each are the time of day
   */
  add(lines: Uint8Array, stampLength: number): void {
    const start = new Date().toISOString() + " ";
    const said = decoder.decode(lines.subarray(0, -1)).split("\n");
    this.print(said.map((it) => start + it.slice(stampLength)).join("\n"));
  }

  /** Closes the file when all is written, or cannot be in time. */
  async close(): Promise<void> {
    await this.flush(DRAIN_MILLISECONDS);
    this.stop();
    this.file.close();
  }
}

/** Gives the room the last lines of its log file as its history. */
function restore(room: Room, file: Deno.FsFile): void {
  const { history, raw } = room.options, { isFile, size } = file.statSync();
  if (!isFile || size === 0) return;
  // The end is enough, however large the file is: as many of the longest lines,
  // or as much as the history keeps and as much again for the times.
  const most = Math.min(
    (history + 1) * TRANSCRIPT_LINE_BYTES,
    2 * HISTORY_BYTES,
  );
  file.seekSync(Math.max(0, size - most), Deno.SeekMode.Start);
  const tail = new Uint8Array(Math.min(size, most));
  let filled = 0, count;
  while ((count = file.readSync(tail.subarray(filled)))) filled += count;
  if (tail.at(-1) !== LF) file.writeSync(LINE_END);
  if (history === 0 || raw) return;
  // What was cut off may be the middle of a line, which anyone can have made
  // to look like the beginning of one.
  const start = size > most ? tail.indexOf(LF) + 1 : 0;
  const end = tail.lastIndexOf(LF) + 1; // a last line may be broken off
  const lines = decoder.decode(tail.subarray(start, end)).split("\n")
    .filter((line) => line.length <= TRANSCRIPT_LINE_BYTES)
    .flatMap((line) => {
      const [, stamp, said] = TRANSCRIPT_LINE.exec(cleanLine(line)) ?? [];
      const time = new Date(stamp);
      return Number.isNaN(time.getTime()) ? [] : [{ time, line: said }];
    });
  room.restoreHistory(lines.slice(-history));
}

// ---------------------------------------------------------------------------
// Console: the operator, who speaks as host and can disconnect and ban people.
// ---------------------------------------------------------------------------

/** The operator: a person who speaks as host, and whose reader is the console. */
class Operator extends Person implements Sink {
  readonly reader: Reader;
  readonly #splitter = new LineSplitter(false, beginsCommand);
  #hasQuit = false;

  /** @param stop stops the server */
  constructor(
    room: Room,
    readonly print: (line: string) => void,
    readonly stop: () => void,
  ) {
    super(room);
    this.name = HOST;
    this.reader = new Reader(room, this);
    this.reader.follow();
  }

  /** Takes a line that the operator typed. */
  type(typed: string): void {
    let rest = this.#splitter.push(encoder.encode(typed + "\n"));
    while (rest.length > 0 && !this.#hasQuit) {
      const run = nextRun(rest, 1, true);
      rest = run.rest;
      CONSOLE_COMMANDS.handle(this, run);
    }
  }

  /** Stops the server. Nothing that was typed after that is taken. */
  quit(): void {
    this.#hasQuit = true;
    this.stop();
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

  /** The console is never too slow: it goes on behind what it has missed. */
  fail(reason: string): void {
    if (reason === TOO_SLOW) this.reader.follow();
  }

  leave(): void {
    this.reader.end();
  }

  drained(): void {
    this.room.forget(this.reader);
  }
}

// deno-fmt-ignore: a command a line
const CONSOLE_COMMANDS = new Commands<Operator>([
  ["help h ?", "[COMMAND]", "lists the commands, or explains one", (operator, text) => CONSOLE_COMMANDS.help(operator, text)],
  ["who names list", "[NAME]", "lists who is here, from where, for how long", listPeople],
  ...SHARED_COMMANDS,
  ["kick", "NAME [REASON]", "disconnects a person", kick],
  ["ban", "NAME|NETWORK [REASON]", "disconnects an address or a network, and refuses it from now on", ban],
  ["unban", "NAME|NETWORK", "admits a banned address or network again", unban],
  ["banned", "", "lists who is banned, since when and why", listBans],
  ["quit exit", "", "stops the server", (operator) => operator.quit()],
], ["quit", "exit"]);

/** The name of a person for the operator. */
function nameOf({ name, room }: Person): string {
  return name || (room.options.raw ? "(no name)" : "(no name yet)");
}

/** The client of that name, or of that address and port, on this server; if there is
 * none, the operator is told so. */
function findClient(operator: Operator, name: string): Client | undefined {
  const client = operator.clients.find(({ origin }) => origin === name);
  const person = client ?? findPerson(operator, name);
  if (person === undefined || person instanceof Client) return person;
  operator.tellError(`${person.name} is not connected to this server.`);
}

function listPeople(operator: Operator, name: string): void {
  const only = name ? findPerson(operator, name) : undefined;
  if (name && !only) return;
  if (only instanceof Operator) return operator.tell("* That is you.\n");
  const { clients, room } = operator;
  const others = [...room.people.values()]
    .filter((person) => person instanceof RemotePerson);
  const rows = (only ? [only] : [...clients, ...others]).map((person) => {
    const { away } = person;
    const where = person instanceof Client
      ? ` ${person.origin}, ${timeSince(person.connected)}`
      : ", on another server";
    const end = away === null ? "" : `, away${away && `: ${away}`}`;
    return `* ${nameOf(person)}${where}${end}\n`;
  });
  operator.tell(rows.join("") || "* Nobody is here.\n");
}

function kick(operator: Operator, text: string): void {
  const [name, why] = firstWord(text);
  const reason = why ? `kicked: ${why}` : "kicked";
  findClient(operator, name)?.disconnect(`You were ${reason}.`, reason);
}

/** Bans a network, and disconnects the clients there. A ban of a person is refused
 * if there are others at the address. */
function ban(operator: Operator, text: string): void {
  const [whom, reason] = firstWord(text), typed = readNetwork(whom);
  if (!typed && isMalformed(operator, whom)) return;
  const client = typed ? undefined : findClient(operator, whom);
  if (!typed && !client) return;
  const network = countedNetwork(typed || readNetwork(client!.address));
  if (network === "") {
    return operator.tellError(
      `${whom} has no IP address. /kick ${whom} disconnects ${whom}.`,
    );
  }
  const shown = networkText(network), { bans } = operator.room.access;
  const there = operator.clients.filter((it) => isIn([network], it.address));
  const others = there.filter((it) => it !== client);
  if (client && others.length > 0) {
    return operator.tellError(
      `Not banned: ${firstNames(others.map(nameOf))} would be banned too. ` +
        `/ban ${shown} bans them all, ` +
        `/kick ${whom} disconnects ${whom} alone.`,
    );
  }
  bans.delete(network); // the last one is listed last
  const names = there.map(({ name }) => name).filter(Boolean);
  bans.set(network, { names, reason, time: new Date() });
  operator.tell(`* ${shown} is banned. /unban ${shown} undoes this.\n`);
  const why = reason ? `banned: ${reason}` : "banned";
  for (const it of there) it.disconnect(`You were ${why}.`, why);
}

/** Whether what was typed is no name, and no address or network either; the operator
 * is told so. The address and port of a client are one of the two. */
function isMalformed(operator: Operator, text: string): boolean {
  const isAddress = /[.:/]/.test(text.replace(/[,:]$/, "")) &&
    !operator.clients.some(({ origin }) => origin === text);
  if (isAddress) {
    const what = `${text} is no address or network.`;
    operator.tellError(`${what} Type one such as 10.0.0.1 or 10.0.0.0/8.`);
  }
  return isAddress;
}

/** The first of some names, and how many others there are. */
function firstNames(names: string[]): string {
  const others = names.length - LISTED_NAMES;
  const more = others > 0 ? [`${others} more`] : [];
  return [...names.slice(0, LISTED_NAMES), ...more].join(", ");
}

function unban(operator: Operator, text: string): void {
  const { bans } = operator.room.access, typed = readNetwork(text);
  if (!typed && isMalformed(operator, text)) return;
  const counted = countedNetwork(typed), key = nameKey(bareName(text));
  const lifted = [...bans].filter(([network, { names }]) =>
    network === counted || names.some((name) => nameKey(name) === key)
  );
  for (const [network] of lifted) {
    bans.delete(network);
    operator.tell(`* ${networkText(network)} is no longer banned.\n`);
  }
  if (lifted.length > 0) return;
  const network = [...bans.keys()].find((it) => typed.startsWith(it));
  const wider = network && networkText(network);
  operator.tellError(
    wider
      ? `${text} is banned by ${wider}. /unban ${wider} admits all of it.`
      : `${text} is not banned. /banned lists who is.`,
  );
}

function listBans(operator: Operator): void {
  const rows = Array.from(
    operator.room.access.bans,
    ([network, { names, reason, time }]) =>
      `* ${networkText(network)}` +
      `${names.length > 0 ? ` (${firstNames(names)})` : ""} is banned since ` +
      `${dateText(time)} ${timeText(time)}${reason && `: ${reason}`}\n`,
  );
  operator.tell(rows.join("") || "* Nobody is banned.\n");
}

// ---------------------------------------------------------------------------
// Command line: one table of options, read by parseOptions and printed by --help.
// ---------------------------------------------------------------------------

interface Flag {
  name: string;
  short?: string;
  /** The name of its value in the help; a flag without one is on or off. */
  value?: string;
  /** The range of a number, both ends included. */
  range?: [from: number, to: number];
  /** Whether it can be given more than once. */
  repeatable?: boolean;
  /** The flag without which it has no effect. */
  needs?: string;
  help: string;
}

// deno-fmt-ignore: a flag a line
const FLAGS: Flag[] = [
  { name: "host", value: "ADDRESS", help: "address to listen on, :: for IPv4 and IPv6" },
  { name: "port", short: "p", value: "PORT", range: [0, 65_535], help: "port to listen on, 0 picks a free one" },
  { name: "reuse-port", help: "share the port with other processes (Linux)" },
  { name: "raw", help: "relay lines as they are: no names, no commands" },
  { name: "ask-name", help: "ask each client for a name first" },
  { name: "timestamps", help: "put the time, 12:34, before messages" },
  { name: "history", value: "LINES", range: [0, 10_000], help: "messages for a new client, 0 with --ask-name" },
  { name: "motd", value: "FILE", help: "show its lines after the welcome (none)" },
  { name: "rate", value: "LINES", range: [0, 1_000_000], help: "lines a second for each client, 0 is no limit" },
  { name: "max-clients", value: "N", range: [1, 1_000_000], help: "how many clients may be connected" },
  { name: "max-per-address", value: "N", range: [0, 1_000_000], help: "the same for one address, 0 is no limit" },
  { name: "allow", value: "CIDR", repeatable: true, help: "admit only these, such as 10.0.0.0/8 (all)" },
  { name: "password-file", value: "FILE", help: "ask for the password in its first line (none)" },
  { name: "tls-cert", value: "FILE", help: "use TLS with this certificate chain (none)" },
  { name: "tls-key", value: "FILE", help: "and this private key (none)" },
  { name: "log", value: "FILE", help: "append messages to it, read the history (none)" },
  { name: "console", help: "take part as host on this terminal" },
  { name: "quiet", help: "do not print who connects and leaves" },
  { name: "web", value: "PORT", range: [0, 65_535], help: "serve a page for browsers on this port (none)" },
  { name: "trust-proxy", value: "CIDR", repeatable: true, needs: "web", help: "believe X-Forwarded-For of these (none)" },
  { name: "link", value: "URL", repeatable: true, help: "link with other servers over NATS (none)" },
  { name: "link-as", value: "NAME", needs: "link", help: "name of this server there (random)" },
  { name: "link-room", value: "NAME", needs: "link", help: "name of the shared room (parley)" },
  { name: "link-creds", value: "FILE", needs: "link", help: "credentials for NATS (none)" },
  { name: "help", short: "h", help: "print this and exit" },
  { name: "version", short: "V", help: "print the version and exit" },
];

/** The option that a flag sets: `maxClients` for `max-clients`. */
function keyOf({ name }: Flag): string {
  return name.replace(/-(\w)/g, (_, letter) => letter.toUpperCase());
}

/** The text of `--help`: at most 80 columns, with every default. */
function helpText(): string {
  const { standalone } = Deno.build; // a binary from `deno compile`
  const program = standalone ? "parley" : "deno run --allow-net main.ts";
  const rows = FLAGS.map((flag) => {
    const { name, short, value, help } = flag;
    const left = `${short ? `-${short}, ` : "    "}--${name} ${value ?? ""}`;
    const standard = String(DEFAULTS[keyOf(flag) as keyof Options] ?? "");
    const right = value && standard ? `${help} (${standard})` : help;
    return `  ${left.padEnd(26)}${right}`;
  });
  return `\
Parley: a chat room for nc, telnet and any other client.

Usage: ${program} [OPTIONS]
Join:  nc localhost ${DEFAULTS.port}    (with TLS: ncat --ssl), then /help

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
  const given = readArguments(args);
  const textsOf = (name: string): string[] => [given[name] ?? []].flat();
  const options: Record<string, unknown> = {};
  const others: Record<string, unknown> = {};
  for (const flag of FLAGS) {
    const texts = textsOf(flag.name), key = keyOf(flag);
    if (texts.length === 0) continue;
    if (flag.needs && textsOf(flag.needs).length === 0) {
      const { name, needs } = flag;
      throw new UsageError(`Cannot use --${name} alone: give --${needs} too`);
    }
    const values = readValues(flag, texts);
    const value = flag.repeatable ? values : values.at(-1);
    (key in DEFAULTS ? options : others)[key] = value;
  }
  checkOptions({ ...options, ...others });
  return { ...others, options };
}

/** The texts that are given for each flag, by its name. */
function readArguments(args: string[]) {
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
    unknown(arg: string) {
      if (!arg.startsWith("-")) return true; // and so it is in `given._`
      const option = arg.replace(/=.*/s, "");
      const nearest = closestString(option, names.map(dashed));
      throw new UsageError(
        `Unknown option ${singleLine(option)} (did you mean ${nearest}?)`,
      );
    },
  });
  const [stray] = given._ as unknown[]; // a number if it looks like one
  if (stray === undefined) return given;
  const shown = singleLine(String(stray)) || '""';
  throw new UsageError(
    `Unexpected argument ${shown} (options are written --port 8008 or -p 8008)`,
  );
}

/** The values of one flag, with their type. */
function readValues(flag: Flag, texts: string[]): unknown[] {
  const { name, value, range } = flag;
  if (!value && texts.some(Boolean)) {
    throw new UsageError(`Option --${name} takes no value`);
  }
  if (value && texts.includes("")) {
    throw new UsageError(`Option --${name} needs a value: --${name} ${value}`);
  }
  if (!value) return texts.map(() => true);
  const isNumber = (text: string) => range && /^\d+$/.test(text);
  return texts.map((text) => isNumber(text) ? Number(text) : text);
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

/** Throws a {@linkcode UsageError} if a value is not what its flag takes, or two
 * contradict each other. */
function checkOptions(options: Record<string, unknown>): void {
  for (const flag of FLAGS) checkValue(flag, options[keyOf(flag)]);
  const { raw, askName, timestamps, motd, tlsCert, tlsKey } = options;
  if (raw && (askName || timestamps)) {
    throw new UsageError(
      `Cannot use --raw with ${askName ? "--ask-name" : "--timestamps"}: ` +
        "a raw room relays lines as they are",
    );
  }
  if (motd && (raw || askName)) {
    throw new UsageError(
      `Cannot use --motd with ${raw ? "--raw" : "--ask-name"}: ` +
        "its clients are shown no text after a welcome",
    );
  }
  if (options.reusePort && Deno.build.os !== "linux") {
    throw new UsageError(
      "Cannot use --reuse-port: only Linux distributes connections " +
        "(give each process a --port of its own)",
    );
  }
  if (!tlsCert !== !tlsKey) {
    const [one, other] = tlsCert ? ["cert", "key"] : ["key", "cert"];
    throw new UsageError(
      `Cannot use --tls-${one} alone: give --tls-${other} FILE too`,
    );
  }
}

function checkValue(flag: Flag, value: unknown): void {
  if (value === undefined) return;
  const { name, value: kind, range, repeatable } = flag;
  const expect = (
    usable: boolean,
    what: string,
    { given = value, option = `--${name}` } = {},
  ) => {
    if (usable) return;
    const shown = singleLine(String(given));
    throw new UsageError(`Cannot use ${shown} for ${option}: give ${what}`);
  };
  if (range) {
    const [from, to] = range;
    const number = Number.isInteger(value) ? Number(value) : NaN;
    const isInRange = number >= from && number <= to;
    return expect(isInRange, `a whole number from ${from} to ${to}`);
  }
  const type = repeatable ? "list" : kind ? "string" : "boolean";
  const given = Array.isArray(value) ? "list" : typeof value;
  expect(given === type, `a ${type}`, { option: keyOf(flag) });
  for (const network of kind === "CIDR" ? value as string[] : []) {
    const isNetwork = readNetwork(network) !== "", given = network;
    expect(isNetwork, "a network, such as 192.168.0.0/16", { given });
  }
  // Letters, digits and what else an address or a host name can hold.
  if (name !== "host") return;
  const host = String(value), hasPort = /^[^:]*:\d*$/.test(host);
  expect(!hasPort, "an address alone, and the port with --port");
  const isHost = /^[\p{L}\p{N}.:%_-]+$/u.test(host);
  expect(isHost, "an address, such as 127.0.0.1 or ::");
}

// ---------------------------------------------------------------------------
// Main: reads the command line, opens the room, and stops it on a signal.
// ---------------------------------------------------------------------------

/** How long standard output has to take the last lines. */
const EXIT_MILLISECONDS = 250;

function exitWith(error: unknown, status: number): never {
  console.error(`parley: ${reason(error)}`);
  Deno.exit(status);
}

async function main(args: string[]): Promise<void> {
  let commandLine: CommandLine, server: ChatServer;
  const output = new Output(Deno.stdout, PRINTED_CHARACTERS);
  const errors = new Output(Deno.stderr, PRINTED_CHARACTERS);
  const print = (line: string) => output.print(line);
  const warn = (line: string) => errors.print(`parley: ${line}`);
  try {
    commandLine = parseOptions(args);
    if (commandLine.help) return console.log(helpText());
    if (commandLine.version) return console.log(`parley ${config.version}`);
    server = ChatServer.listen(commandLine.options, { print, warn });
  } catch (error) {
    if (error instanceof UsageError) return exitWith(error, 2);
    if (error instanceof OpenError) return exitWith(error, 1);
    throw error;
  }
  print(startLine(server.addr, commandLine.options));
  // However the server is stopped, by a signal or the operator.
  server.finished.then(async () => {
    await output.flush(EXIT_MILLISECONDS);
    Deno.exit(0);
  });
  handleSignals(server, warn);
  // Before the add-ons, so that a link counts the operator among the people here.
  if (commandLine.console) operate(server, { print, warn });
  try {
    await startAddOns(server, commandLine, { print, warn });
  } catch (error) {
    return exitWith(error, 1);
  }
}

/** Tells where the room is, and how to join it. */
function startLine(
  { hostname, port }: Deno.NetAddr,
  { tlsCert }: Partial<Options>,
): string {
  const isAnywhere = hostname === "0.0.0.0" || hostname === "::";
  const client = tlsCert ? "ncat --ssl" : "nc";
  return `Listening on ${formatAddress(hostname, port)}. ` +
    `Join with: ${client} ${isAnywhere ? "localhost" : hostname} ${port}`;
}

const NO_INPUT =
  "The console has no more input. The room goes on; Ctrl-C stops it.";

/** Lets the person at standard input be the operator, until its end. */
async function operate(
  server: ChatServer,
  { print, warn }: Required<Reports>,
): Promise<void> {
  try {
    await server.operate(typedLines(), print);
    if (server.stopping.aborted) return;
    print(NO_INPUT);
  } catch (error) {
    // Such as a terminal that nohup has taken away.
    warn(`${NO_INPUT} (${reason(error)})`);
  }
}

/** Starts what is beside the chat server, where it is asked for: only then it is
 * loaded. */
async function startAddOns(
  server: ChatServer,
  commandLine: CommandLine,
  reports: Required<Reports>,
): Promise<void> {
  const { web, trustProxy, link, linkAs, linkCreds } = commandLine;
  const options = { ...DEFAULTS, ...commandLine.options };
  const { tlsCert, tlsKey, passwordFile, raw } = options;
  if (web !== undefined) {
    const { WebServer } = await import("./web/web.ts");
    const page = await WebServer.listen(server, {
      ...options,
      port: web,
      tlsCert: tlsCert && readFile(tlsCert),
      tlsKey: tlsKey && readFile(tlsKey),
      trustProxy,
      password: passwordFile !== "",
    });
    server.webPage = page.url;
    reports.print(`Web page: ${page.url}`);
  }
  if (link !== undefined) {
    const { linkRoom } = await import("./link/link.ts");
    await linkRoom(server, {
      servers: link,
      as: linkAs,
      room: commandLine.linkRoom,
      creds: linkCreds && readFile(linkCreds),
      raw,
      ...reports,
    });
  }
}

/** Stops the server on a signal. A second one exits at once, with the status that
 * shells give: 128 and the signal's number. */
function handleSignals(
  server: ChatServer,
  warn: (line: string) => void,
): void {
  let stopping = false;
  const stopOn = (signal: Deno.Signal, number: number) =>
    Deno.addSignalListener(signal, () => {
      if (stopping) Deno.exit(128 + number);
      stopping = true;
      server.stop();
    });
  stopOn("SIGINT", 2);
  if (Deno.build.os === "windows") return stopOn("SIGBREAK", 21);
  stopOn("SIGTERM", 15);
  // A terminal that is closed stops the server. Without one (nohup, systemd) it is
  // logrotate, which has renamed the log file.
  const hasTerminal = Deno.stdin.isTerminal() || Deno.stdout.isTerminal();
  if (hasTerminal) return stopOn("SIGHUP", 1);
  Deno.addSignalListener("SIGHUP", () => {
    try {
      server.reopenLog();
    } catch (error) {
      warn(`${reason(error)}; the file that was open stays in use`);
    }
  });
}

/** The lines that are typed on standard input. It is read only for the console: a
 * terminal stops a background job that reads. */
async function* typedLines(): AsyncIterable<string> {
  const { TextLineStream } = await import("@std/streams/text-line-stream");
  const lines: ReadableStream<string> = Deno.stdin.readable
    .pipeThrough(new TextDecoderStream()).pipeThrough(new TextLineStream());
  yield* lines;
}

if (import.meta.main) await main(Deno.args);
