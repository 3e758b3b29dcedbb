/**
 * Properties that hold for any input, and a simulated room whose clients must
 * receive exactly what a simple model says.
 */
import { assert, assertEquals, assertMatch } from "@std/assert";
import fc from "fast-check";
import {
  ChatServer,
  cleanLine,
  type Connection,
  normalizeName,
  type Options,
  parseOptions,
  UsageError,
} from "../main.ts";
import {
  DO,
  EC,
  EL,
  FAKE_ADDRESS,
  FORBIDDEN,
  GOODBYE,
  IAC,
  LINE_BYTES,
  never,
  open,
  SB,
  SE,
  turn,
  WAIT_MILLISECONDS,
  WILL,
  within,
} from "./helpers.ts";

const encoder = new TextEncoder();

// -- properties

const SLASH = 47;

/** A line that shows nothing. */
const BLANK = /^[\s\p{Default_Ignorable_Code_Point}\u2800]*$/u;

/** What shows nothing, or was no text, before a slash. */
const HIDDEN_START =
  /^[\p{White_Space}\p{Default_Ignorable_Code_Point}\p{Co}\p{Cn}\ufffd]+(?=\/)/u;

// fast-check reduces an input that fails, and prints the seed and the path that
// reproduce it. The limit ends the reduction where each try waits for a line that
// never comes.
fc.configureGlobal({
  numRuns: 250,
  interruptAfterTimeLimit: 2 * WAIT_MILLISECONDS,
  markInterruptAsFailure: true,
});

/** Tests that `holds` does not fail for any inputs. */
function property<Inputs extends [unknown, ...unknown[]]>(
  name: string,
  inputs: { [Key in keyof Inputs]: fc.Arbitrary<Inputs[Key]> },
  holds: (...inputs: Inputs) => Promise<void> | void,
): void {
  const check = async (...inputs: Inputs) => await holds(...inputs);
  Deno.test(name, () => fc.assert(fc.asyncProperty(...inputs, check)));
}

/** Text, or bytes that need not be text. */
type Content = string | Iterable<number>;

function bytesOf(...parts: Content[]): Uint8Array {
  const bytes = (it: Content) =>
    typeof it === "string" ? encoder.encode(it) : it;
  return Uint8Array.from(parts.flatMap((it) => [...bytes(it)]));
}

/** A connection whose input comes in reads of the sizes that a test chooses. */
class SplitConnection implements Connection {
  readonly #done = Promise.withResolvers<void>();
  /** Resolves when the server has read all input and done what it says. */
  readonly done = this.#done.promise;
  readonly #written: number[] = [];
  #reads = 0;

  /** @param sizes of its reads, in turn; with none it stays connected */
  constructor(public input: Uint8Array, readonly sizes: number[] = []) {}

  /** What it received but for the answers to telnet options, which depend on the
   * reads. Nothing else may contain a byte 255. */
  get received(): string {
    const bytes = [...this.#written];
    for (let at; (at = bytes.indexOf(IAC)) >= 0;) bytes.splice(at, 3);
    const decoder = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true });
    return decoder.decode(Uint8Array.from(bytes));
  }

  read(buffer: Uint8Array): Promise<number | null> {
    const size = this.sizes[this.#reads++ % this.sizes.length] ?? Infinity;
    const count = Math.min(size, buffer.length, this.input.length);
    buffer.set(this.input.subarray(0, count));
    this.input = this.input.subarray(count);
    if (count > 0) return Promise.resolve(count);
    if (this.sizes.length > 0) return Promise.resolve(null);
    this.#done.resolve();
    return never();
  }

  write(bytes: Uint8Array): Promise<number> {
    const count = Math.ceil(bytes.length / 2); // a write may take only some
    this.#written.push(...bytes.subarray(0, count));
    return Promise.resolve(count);
  }

  close = (): void => this.#done.resolve();
}

/** The options of a room, and what its recipient and its sender send first. */
type Setup = [Partial<Options>, recipient?: string, sender?: string];

/** What the recipient (`guest1`) and the sender (`guest2`) of some content receive.
 *
 * @param sizes of the reads of what the sender sends */
async function exchange(
  [options, recipient = "", sender = ""]: Setup,
  content: Content,
  sizes: number[],
): Promise<string[]> {
  await using server = open({ rate: 0, ...options });
  const connections = [
    new SplitConnection(bytesOf(recipient)),
    new SplitConnection(bytesOf(sender, content), sizes),
  ];
  for (const connection of connections) {
    server.admit(connection, FAKE_ADDRESS);
    await within(connection.done, "the end of the input");
  }
  await server.stop();
  return connections.map(({ received }) => received);
}

/** The lines that a raw room relays. */
async function relayed(content: Content, sizes: number[]): Promise<string[]> {
  const [received] = await exchange([{ raw: true }], content, sizes);
  return received.split("\n").slice(0, -2); // "Shutdown Server" is the last
}

const anySize = fc.oneof(fc.nat(2), fc.nat(299), fc.nat(19_999))
  .map((less) => less + 1);
const anySizes = fc.array(anySize, { minLength: 1, maxLength: 6 });

/** Complete telnet commands but for those that erase what was typed. */
const anyTelnet = fc.oneof(
  fc.integer({ min: 236, max: 249 }).filter((it) => it !== EC && it !== EL)
    .map((command) => [IAC, command]),
  fc.tuple(fc.constant(IAC), fc.integer({ min: WILL, max: 254 }), fc.nat(255)),
  fc.array(fc.constantFrom([0], [10], [13], [65], [SE], [IAC, IAC]))
    .map((data) => [IAC, SB, 31, ...data.flat(), IAC, SE]),
);
const anyPrintable = fc.string({ unit: "grapheme", minLength: 1 })
  .filter((text) =>
    !FORBIDDEN.test(text) && !BLANK.test(text) && !HIDDEN_START.test(text)
  );
const anyLong = fc.constantFrom("x", "é", "€", "🌍")
  .map((it) => it.repeat(LINE_BYTES / bytesOf(it).length));

// deno-fmt-ignore: by kind
const anyContent = fc.array(fc.oneof<fc.MaybeWeightedArbitrary<Content>[]>(
  { weight: 5, arbitrary: anyPrintable },
  { weight: 5, arbitrary: fc.constantFrom(
    "\n", "\r\n", "\r\0", "\r", "\0", "\t", "\x1b[31m", "\x1b]0;", "\x07",
    "\x9b", "\u2028", "\u202e", "\ufeff", "* host ", "[guest1] ", "! ",
    "\x08", "\x7f", "\x15", "\u200b", "\u3164", " ", "\x1bOP", "\x1b[[A", "\x9d",
    "\x01", "\x02", "\nGET / HTTP/1.1\n", "a") },
  { weight: 4, arbitrary: fc.constantFrom(
    "\n//", "\r/", "\n/me ", "\n/nick ", "\n/nick host", "\n/msg guest1 ",
    "\n/w guest2 ", "\r/reply ", "\n/ignore guest1\n", "\n/who\n",
    "\n/help\n", "\n/quiet\n", "\n/quit ", "\n/away ", "\n/nope ",
    "\n/etc/passwd\n", "\n// ", "\n//me ") },
  { weight: 3, arbitrary: anyTelnet },
  { weight: 3, arbitrary: fc.constantFrom( // broken off
    [IAC], [IAC, IAC], [IAC, DO], [IAC, SB], [IAC, EC], [IAC, EL], [0xc3], [0xe2, 0x82],
    [0xf0, 0x9f, 0x8c], [0x80], [0xc0, 0xaf], [0xed, 0xa0, 0x80]) },
  { weight: 1, arbitrary: fc.uint8Array({ maxLength: 9 }) },
  { weight: 1, arbitrary: anyLong },
), { maxLength: 12 }).map((parts) => bytesOf(...parts));

const anySetup = fc.constantFrom<Setup[]>(
  [{ raw: true }],
  [{}],
  [{}, "", "\x16\x03\x01 how TLS begins\n"],
  [{ askName: true }, "guest1\n", "guest2\n"],
  [{ askName: true }, "guest1\n"],
);

/** Without the answers to AYT and IP, which come when they are read: before the lines
 * of the same read. */
function withoutTelnetAnswers(received: string[]): string[] {
  return received.map((text) =>
    text.replace(
      /^\* (?:Yes, Parley is here|To leave, (?:type \/quit|close the connection \(in telnet: Ctrl-\], then quit\)))\.\n/gm,
      "",
    )
  );
}

property(
  "the same lines arrive however a stream is cut into reads",
  [anySetup, anyContent, anySizes, anySizes],
  async (setup, content, one, other) =>
    assertEquals(
      withoutTelnetAnswers(await exchange(setup, content, one)),
      withoutTelnetAnswers(await exchange(setup, content, other)),
    ),
);

const anyAscii = fc.string({
  unit: fc.constantFrom(..."abc XYZ/019'"),
  minLength: 1,
});
const anyNewline = fc.constantFrom("\n", "\r\n", "\r\0", "\r");

property(
  "CR, CR LF, CR NUL and LF each end one line",
  [
    fc.array(fc.tuple(anyAscii.map((it) => `. ${it}`), anyNewline)),
    anySizes,
  ],
  async (lines, sizes) =>
    assertEquals(
      await relayed(lines.flat().join(""), sizes),
      lines.map(([line]) => line),
    ),
);

property(
  "Backspace and DEL erase a character, Ctrl-U a line",
  [
    fc.array(anyAscii, { minLength: 1 }),
    fc.array(
      fc.constantFrom("x\b", "é\x7f", "xy\b\b", "e\u0301\u0302\b", "🌍\x7f"),
    ),
    fc.constantFrom("", "\b", "wrong\x15", "\x7f\x15"),
    anySizes,
  ],
  async (parts, erased, start, sizes) => {
    const typed = parts.map((part, i) => part + (erased[i] ?? "")).join("");
    assertEquals(await relayed(`${start}. ${typed}`, sizes), [
      ". " + parts.join(""),
    ]);
  },
);

const anyLine = fc.oneof({ weight: 3, arbitrary: anyPrintable }, anyLong);
const anyLines = fc.array(fc.tuple(anyLine, anyNewline), { maxLength: 6 });

property(
  "lines arrive unchanged with telnet commands between any of their bytes",
  [anyLines, fc.array(fc.tuple(fc.nat(), anyTelnet)), anySizes],
  async (lines, inserted, sizes) => {
    const parts = [...bytesOf(lines.flat().join(""))].map((byte) => [byte]);
    for (const [place, telnet] of inserted) {
      parts.splice(place % (parts.length + 1), 0, telnet);
    }
    assertEquals(await relayed(parts.flat(), sizes), lines.map(([it]) => it));
  },
);

property(
  "a line that is too long arrives in pieces without loss",
  [fc.array(anyLine, { maxLength: 8 }), anySizes],
  async (parts, sizes) => {
    const text = "no web request: " + parts.join("") + ".";
    const pieces = await relayed(text, sizes);
    assertEquals(pieces.join(""), text);
    for (const piece of pieces) assert(bytesOf(piece).length <= LINE_BYTES);
  },
);

/** What no line of a room that is not raw may contain. */
const CONTROL = new RegExp(`\t|${FORBIDDEN.source}`, "u");

property(
  "no client can send a line that looks like another sender's or the server's",
  [anyContent, anySizes],
  async (content, sizes) => {
    const [received] = await exchange([{}], content, sizes);
    // Without the greeting, the join notice and the shutdown.
    const lines = received.split("\n").slice(3, -2);
    const commands = content.includes(SLASH);
    let name = "guest2";
    for (const line of lines) {
      assert(!CONTROL.test(line), JSON.stringify(line));
      const [, old, next] = /^\* (\S+) is now known as (\S+)$/.exec(line) ?? [];
      if (commands && old === name) {
        name = next;
        assert(!/^(guest1|host|you|server)$/i.test(name), line);
      } else {
        const starts = [`[${name}] `, `* ${name} has left the room`];
        if (commands) starts.push(`** ${name} `, `[${name} -> you] `);
        assert(starts.some((start) => line.startsWith(start)), line);
      }
    }
  },
);

const anyText = fc.string({
  unit: fc.oneof(
    anyPrintable,
    fc.oneof(fc.nat(0xff), fc.nat(0xffff)).map((it) => String.fromCharCode(it)),
    fc.constantFrom(..."\x1b\x9b\x9c\x07[];\\\t\u2028\u202e\u2066\ufeff"),
    fc.constantFrom(..."abXY09-_*! ßｘﬁ\u0301\u200d\u3164"),
  ),
});

/** A text in which each TAB is spaces up to the next multiple of 8. */
function withoutTabs(text: string): string {
  let line = "";
  for (const part of text.split(/(\t)/)) {
    line += part === "\t" ? " ".repeat(8 - line.length % 8) : part;
  }
  return line;
}

property(
  "cleaning removes forbidden characters and nothing else",
  [anyText],
  (text) => {
    const clean = cleanLine(text);
    assert(!CONTROL.test(clean));
    assertEquals(cleanLine(clean), clean);
    // Escape sequences are removed whole, and some characters erase others.
    // deno-lint-ignore no-control-regex
    if (/[\b\x15\x1b\x7f-\x9f]/.test(text)) return;
    const kept = text.replace(new RegExp(FORBIDDEN, "gu"), "");
    const shown = BLANK.test(kept) ? "" : kept;
    assertEquals(cleanLine(text, { tabs: true }), shown);
    const start = (hidden: string) =>
      hidden.replace(/\p{Zs}/gu, " ").replace(/[^ \t]/gu, "");
    assertEquals(clean, withoutTabs(shown.replace(HIDDEN_START, start)));
  },
);

// What shows nothing: whole sequences and broken ones, erased letters, telnet
// commands with and without an end, what was no text.
const CSI = [
  "\x1b[",
  "\x9b",
  "\x1b[3",
  "\x1b[1;5",
  "\x9b?25",
  "\x1b[[",
  "\x1b[ ",
  "\x1b[!",
  "\x1b(",
  "\x1b#",
];
const STRINGS = ["\x1b]", "\x1bP", "\x1bX", "\x1b^", "\x1b_", "\x9d", "\x90"];
const anyHidden = fc.oneof<fc.MaybeWeightedArbitrary<Content>[]>(
  fc.nat(31).filter((it) => !"\t\n\r".includes(String.fromCharCode(it)))
    .map((it) => String.fromCharCode(it)),
  fc.integer({ min: 0x7f, max: 0x9f }).map((it) => String.fromCharCode(it)),
  fc.tuple(fc.constantFrom(...CSI.slice(0, 5)), fc.constantFrom(..."ABHPmn~@"))
    .map((parts) => parts.join("")),
  fc.tuple(
    fc.constantFrom(...STRINGS),
    fc.constantFrom("", "0;a title", "8;;http://x/y", "é"),
    fc.constantFrom("\x07", "\x1b\\", "\x9c"),
  ).map((parts) => parts.join("")),
  fc.constantFrom("\x1bOP", "\x8fP", "\x1bO5P", "\x1b[[A", "\x1b(B"),
  fc.constantFrom(
    ...CSI,
    ...STRINGS,
    "\x1b]0;",
    "\x1b",
    "\x1bO",
    "\x1bN",
    "\x8f",
  ),
  anyTelnet,
  fc.constantFrom([IAC], [IAC, IAC], [IAC, SB], [IAC, SB, 31, 0, 80]),
  fc.constantFrom(
    "\ufeff",
    "\u200b",
    "\u3164",
    "\u00ad",
    "\u2060",
    "\u{e0001}",
  ),
  fc.constantFrom("\u2028", "\u202e", "\u2066", "\ufe0f", "\ue000", "\u0378"),
  // Broken UTF-8, with a byte after which nothing makes it whole.
  fc.constantFrom([0xc3], [0x80], [0xe2, 0x82], [0xf0, 0x9f, 0x8c])
    .map((bytes) => [...bytes, 0xc0]),
  fc.constantFrom("\n", "\r", "\r\n", "\r\0"),
);
/** So much of it that the command begins in another piece of the line. */
const anyLongHidden = fc.oneof(
  fc.constant(""),
  fc.tuple(
    fc.constantFrom("\0", "\u200b", "\u3164", "\x1b[1m", "\ufeff"),
    fc.integer({ min: LINE_BYTES - 40, max: 3 * LINE_BYTES }),
  ).map(([text, bytes]) => text.repeat(bytes / bytesOf(text).length)),
);
const anyErased = fc.constantFrom<Content[]>("", "x\b", "é\x7f", "a b\x15", [
  ...[0x78, IAC, EC, 0x61, IAC, EL],
]);
const anySecret = fc.constantFrom(
  "QZWJ",
  "Q".repeat(LINE_BYTES),
  "Z".repeat(2 * LINE_BYTES) + "/QQ",
);
const anyPrivate = fc.constantFrom(
  ...["/msg guest1 ", "/w @guest1 ", "/tell nobody ", "/reply ", "/nick "],
  ...["/away ", "/ignore ", "/msg guest1  \0"],
);

property(
  "no bytes that show nothing make any part of a command public",
  [
    anyErased,
    fc.array(anyHidden, { maxLength: 8 }),
    anyLongHidden,
    anyPrivate,
    anySecret,
    anySizes,
  ],
  async (erased, hidden, long, command, secret, sizes) => {
    const content = bytesOf(erased, ...hidden, long, command, secret, "\n");
    const setup: Setup = [{}, "", ""];
    const [received] = await exchange(setup, content, sizes);
    const lines = received.replace(/^\[guest2 -> you\] .*\n/gm, "")
      .replace(/^\* guest2 is now known as QZWJ\n/m, "")
      .replace(/^\* QZWJ has left the room\n/m, "");
    assert(!/[QZWJ]/.test(lines.replace("Welcome", "")), JSON.stringify(lines));
  },
);

property(
  "no control character reaches anybody, but BEL to those who want it",
  [
    fc.constantFrom("", "/bell\n"),
    fc.array(fc.oneof(anyContent, anyHidden), { maxLength: 6 }),
    anySizes,
  ],
  async (first, parts, sizes) => {
    const content = bytesOf("hello\n", ...parts);
    const received = await exchange([{}, first], content, sizes);
    if (first) received[0] = received[0].replaceAll("\x07", "");
    for (const line of received.join("").split("\n")) {
      assert(!CONTROL.test(line), JSON.stringify(line));
    }
  },
);

const anyLetter = fc.constantFrom(..."aI-0iıİßẞsſςσΣµμΐΐŉǰΩΩЖжաև");
const anyLetters = fc.string({ unit: anyLetter, maxLength: 27, size: "max" });

property(
  "an accepted name has only visible letters, digits, - and _",
  [fc.oneof(anyText, anyLetters)],
  (typed) => {
    const name = normalizeName(typed);
    if (name === null) return assert(!/^[\w-]{1,24}$/.test(typed), "refused");
    assertMatch(name, /^[\p{L}\p{Nd}_\-][\p{L}\p{M}\p{Nd}_\-]{0,23}$/u);
    assert(!/[\p{DI}\p{C}]|\p{M}{4}/u.test(name));
    assertEquals([name.normalize("NFKC"), normalizeName(name)], [name, name]);
  },
);

property(
  "a name of many marks is refused, and costs little",
  [
    fc.array(fc.constantFrom(..."\u0301\u0307\u0316\u0e38\u05b0\u3099"), {
      minLength: 8,
      maxLength: 20,
    }),
    fc.constantFrom(1, 200),
    anyLetters,
  ],
  (marks, times, letters) =>
    assertEquals(
      normalizeName("a" + marks.join("").repeat(times) + letters),
      null,
    ),
);

property(
  "no two clients have names that differ in case alone",
  [anyLetters, fc.constantFrom("toString", "toLowerCase", "toUpperCase")],
  async (name, inCase) => {
    const typed = `/nick ${name[inCase]()}\n/who\n`;
    const setup: Setup = [{}, `/nick ${name}\n`];
    const [, received] = await exchange(setup, typed, [99]);
    const list = received.match(/(?<=^\* Here now: ).*(?= \(2\)$)/gm)!.at(-1)!;
    for (const names of [list, list.toLowerCase(), list.toUpperCase()]) {
      assertEquals(new Set(names.split(", ")).size, 2, list);
    }
  },
);

const FLAGS =
  " - -- --host= --port= --port -p --raw --raw= --no-raw --history=" +
  " --allow= --tls-key= --log= -h -hp= --prot --__proto__= --host.x=" +
  " --motd= --web= --link= --link-as= --timestamps= --console";
const anyFlag = fc.constantFrom(...FLAGS.split(" "));
const anyValue = fc.oneof(anyText, fc.constantFrom("", "0", "-1", "true"));
const anyArguments = fc.array(fc.tuple(anyFlag, anyValue));

property("command-line arguments are accepted, or refused in one line", [
  anyArguments,
], (pairs) => {
  try {
    const { port = 0 } = parseOptions(pairs.map((it) => it.join(""))).options;
    assert(Number.isInteger(port) && port >= 0 && port <= 65_535);
  } catch (error) {
    if (!(error instanceof UsageError)) throw error;
    assert(!FORBIDDEN.test(error.message), JSON.stringify(error.message));
  }
});

// -- simulation

/** Returns a random whole number from 0 to less than `sides`. */
type Dice = (sides: number) => number;

/** A pseudo-random generator, Mulberry32: a seed always gives the same numbers. */
function diceOf(seed: number): Dice {
  return (sides) => {
    seed = (seed + 0x6d2b79f5) | 0;
    let mixed = Math.imul(seed ^ (seed >>> 15), seed | 1);
    mixed ^= mixed + Math.imul(mixed ^ (mixed >>> 7), mixed | 61);
    return Math.floor(((mixed ^ (mixed >>> 14)) >>> 0) / 2 ** 32 * sides);
  };
}

function pick<T>(dice: Dice, things: readonly T[]): T {
  return things[dice(things.length)];
}

/** The last four two times in three, else all: so that the same few people often
 * have to do with each other. */
function recent<T>(dice: Dice, things: readonly T[]): readonly T[] {
  return dice(3) ? things.slice(-4) : things;
}

/** Someone in the room, as the model knows them. */
class Person {
  name = "";
  here = true;
  quiet = false;
  bell = false;
  /** Whether BEL may still arrive: it does not, before the first /bell. */
  mayRing = false;
  /** Why they are away, if they are. */
  away: string | null = null;
  /** The client has ended its input. */
  inputEnded = false;
  /** What was typed of a line that has not ended. */
  typed = "";
  /** What was typed last is a CR, which has ended a line: an LF or NUL belongs to it. */
  afterCr = false;
  /** How the line goes on that is too long already. */
  long: "" | "message" | "refused" = "";
  /** Whom /reply answers. */
  lastSender?: Person;
  readonly ignored = new Set<Person>();
  /** The end of what was received and compared with what was expected. */
  verified = "";
  /** What must be received next. */
  expected = "";
  /** What was received since. */
  received = "";

  constructor(readonly address: string) {}
}

/** A command as DESIGN says it: a slash, letters, then white space or the end. */
const COMMAND = /^\/(\p{L}+|\?)(?:\s+(.*?))?\s*$/su;

/** The other names of commands. */
const ALIASES: Record<string, string> = {
  ...{ h: "help", "?": "help", name: "nick", names: "who", list: "who" },
  ...{ tell: "msg", whisper: "msg", w: "msg", pm: "msg", r: "reply" },
  ...{ exit: "quit", bye: "quit" },
};

/** The answers to the commands that need more than was typed. */
const NEEDED: Record<string, string> = {
  nick: "! Type /nick NAME (changes your name).",
  me: "! Type /me ACTION (shows what you do: /me waves).",
  msg: "! Type /msg NAME TEXT (sends a private message).",
  reply: "! Type /reply TEXT (answers your last private message).",
};

/** What people mean by commands that there are not. */
const MEANT: Record<string, string> = {
  ...{ whoo: "who", em: "me", qiut: "quit", ingore: "ignore", nik: "nick" },
};

const WELCOME = (name: string) =>
  `* Welcome! You are ${name}. Type a message and press Enter. ` +
  "/nick NAME sets your name, /help lists commands.";

const piece = new Uint8Array(LINE_BYTES);

/** Where a line is cut: after the last character that fits into LINE_BYTES. */
function pieceEnd(line: string): number {
  return encoder.encodeInto(line, piece).read;
}

/** A line as others receive it. It has no escape sequences but colors. */
function shown(typed: string): string {
  let line = "";
  // deno-lint-ignore no-control-regex
  for (const character of typed.replace(/\x1b\[\d+m/g, "")) {
    if (character === "\x15") line = "";
    else if (/[\b\x7f]/.test(character)) line = line.slice(0, -1);
    else if (character === "\t") line += " ".repeat(8 - line.length % 8);
    // deno-lint-ignore no-control-regex
    else if (!/[\x00-\x1f]/.test(character)) line += character;
  }
  return BLANK.test(line) ? "" : line;
}

/** Tells who must receive what, by the simplest code that does. */
class Model {
  /** Everyone with a name, in the order in which the names were taken. */
  people: Person[] = [];
  /** Receives what the server prints. */
  readonly operator = new Person("the operator");
  #said: string[] = [];
  #here = 0;
  #guests = 0;

  constructor(readonly askName: boolean, readonly history: number) {}

  join(address: string): Person {
    const person = new Person(address);
    this.#here++;
    if (this.askName) tell(person, "* Welcome to Parley. What is your name?");
    else {
      let name;
      do name = `guest${++this.#guests}`; while (this.find(name));
      tell(person, WELCOME(name));
      this.#enter(person, name);
    }
    this.#print("New Connection from", person);
    return person;
  }

  type(person: Person, text: string): void {
    if (person.afterCr) text = text.replace(/^[\n\0]/, "");
    if (text) person.afterCr = text.endsWith("\r");
    const lines = (person.typed + text.replace(/\r[\n\0]?/g, "\n")).split("\n");
    lines.forEach((line, index) => {
      const ended = index < lines.length - 1;
      for (let end; (end = pieceEnd(line)) < line.length;) {
        this.#receive(person, line.slice(0, end), true);
        line = line.slice(end);
      }
      if (!ended) person.typed = line;
      else {
        this.#receive(person, line, false);
        person.long = "";
      }
    });
  }

  /** What is still typed is a line too at the end of the input. */
  endInput(person: Person): void {
    person.inputEnded = true;
    if (person.typed) this.type(person, "\n");
    this.leave(person);
  }

  leave(person: Person, reason = ""): undefined {
    if (!person.here) return;
    person.here = false;
    this.#here--;
    this.people = this.people.filter((other) => other !== person);
    if (person.name) this.#announce(person, "left", reason && ` (${reason})`);
    for (const { ignored } of this.people) ignored.delete(person);
    const closed = person.inputEnded;
    const what = closed ? "Connection closed by" : "Disconnected";
    this.#print(what, person, reason);
  }

  find(name: string): Person | undefined {
    const key = (name: string) => name.normalize("NFKC").toLowerCase();
    const named = (name: string) =>
      this.people.find((person) => key(person.name) === key(name));
    return named(name) ?? named(name.replace(/^@/, "").replace(/[,:]$/, ""));
  }

  /** @param isLong whether this is a piece that something follows */
  #receive(person: Person, typed: string, isLong: boolean): void {
    const line = shown(typed), isPiece = person.long !== "";
    if (!person.here || person.long === "refused") return;
    if (person.name === "") {
      if (isLong) person.long = "refused";
      this.#takeName(person, isLong ? "" : line.trim());
    } else if (line === "") return;
    else if (this.askName || isPiece || !COMMAND.test(line)) {
      if (isLong) person.long = "message";
      const quoted = !this.askName && !isPiece && line.startsWith("//") &&
        COMMAND.test(line.slice(1));
      this.#say(person, `[${person.name}] ${quoted ? line.slice(1) : line}`);
    } else if (isLong) {
      person.long = "refused";
      tell(
        person,
        `! Nothing was sent: a command can have ${LINE_BYTES} bytes at most.`,
      );
    } else {
      const [, command, text = ""] = COMMAND.exec(line)!;
      const needed = BLANK.test(text) ? "" : text;
      const answer = this.#run(person, command.toLowerCase(), needed);
      if (answer) tell(person, answer);
    }
  }

  #takeName(person: Person, wanted: string): void {
    const name = wanted.normalize("NFKC");
    const refusal = this.#refusal(person, name);
    if (refusal) {
      tell(person, `! ${refusal} Join again with another.`);
      this.leave(person, "no name");
    } else {
      this.#enter(person, name);
      this.#print("Name chosen by", person);
    }
  }

  #enter(person: Person, name: string): void {
    const names = this.people.map(({ name }) => name).join(", ");
    if (this.askName) tell(person, `* The room contains: ${names}`);
    else {
      tell(
        person,
        this.people.length ? this.#whoIsHere(20) : "* Nobody else is here yet.",
      );
      if (this.#said.length) tell(person, "* Earlier:");
    }
    tell(person, ...this.#said);
    person.name = name;
    this.#announce(person, "entered");
    this.people.push(person);
  }

  #whoIsHere(most = Infinity): string {
    const { length } = this.people;
    const names = this.people.slice(0, most)
      .map(({ name, away }) => away === null ? name : `${name} (away)`);
    const more = length > most ? `, and ${length - most} more` : "";
    return `* Here now: ${names.join(", ")}${more} (${length})`;
  }

  #refusal(person: Person, name: string): string | undefined {
    if (!/^[\p{L}\d_-]{1,24}$/u.test(name)) {
      return "A name is 1 to 24 letters, digits, _ or -.";
    }
    if (/^(host|you|server)$/i.test(name)) {
      return `The name ${name} is reserved.`;
    }
    const owner = this.find(name) ?? person;
    return owner === person ? undefined : `The name ${name} is taken.`;
  }

  /** Runs a command, and returns the answer to it. */
  #run(person: Person, typed: string, text: string): string | undefined {
    const { name, lastSender } = person, command = ALIASES[typed] ?? typed;
    if (text === "" && command in NEEDED) return NEEDED[command];
    const [, to, message] = /^(\S+)\s*(.*)$/.exec(text) ?? [];
    const called = command === "msg" ? to : text;
    const whom = this.find(called)!;
    if (command === "msg" && !message) {
      return "! Type /msg NAME TEXT (the text is missing).";
    }
    if (/^(msg|ignore|who)$/.test(command) && text && !whom) {
      return `! Nobody here is called ${called}. /who lists who is here.`;
    }
    const isOn = (before: boolean) => text ? /on/i.test(text) : !before;
    switch (command) {
      case "nick": {
        const wanted = text.normalize("NFKC");
        const refusal = this.#refusal(person, wanted);
        if (refusal) return `! ${refusal} Try another: /nick NAME`;
        if (wanted === name) return `! You are ${name} already.`;
        const line = `* ${name} is now known as ${wanted}`;
        const others = this.#recipients(person).filter(({ quiet }) => !quiet)
          .filter((other) => other !== person);
        tell([person, ...others], line);
        this.people = this.people.filter((other) => other !== person);
        this.people.push(person);
        person.name = wanted;
        return;
      }
      case "who":
        return this.#whoIsHere();
      case "me":
        return this.#say(person, `** ${name} ${text}`);
      case "msg":
        return this.#whisper(person, whom, message);
      case "reply":
        if (!lastSender) {
          return "! You have no private message to answer. /msg NAME TEXT sends one.";
        }
        return lastSender.here
          ? this.#whisper(person, lastSender, text)
          : `! ${lastSender.name} has left the room.`;
      case "ignore": {
        if (!text) {
          const names = Array.from(person.ignored, ({ name }) => name);
          return `* You ignore ${names.join(", ") || "nobody"}.`;
        }
        if (whom === person) return "! You cannot ignore yourself.";
        if (person.ignored.delete(whom)) {
          return `* You receive messages from ${whom.name} again.`;
        }
        person.ignored.add(whom);
        if (lastSender === whom) person.lastSender = undefined;
        const undo = `/ignore ${whom.name} undoes this.`;
        return `* You no longer receive messages from ${whom.name}. ${undo}`;
      }
      case "quiet":
      case "bell": {
        if (!/^(on|off)?$/i.test(text)) {
          return `! Type /${command} on or /${command} off.`;
        }
        const on = person[command] = isOn(person[command]);
        if (command === "quiet") {
          const notices = "* Join, leave and rename notices are";
          return on
            ? `${notices} hidden. /quiet off undoes this.`
            : `${notices} shown.`;
        }
        person.mayRing = true;
        return on
          ? "* Your terminal rings when you are named or get a private message." +
            " /bell off undoes this."
          : "* Your terminal no longer rings.";
      }
      case "away":
        person.away = typedReason(text);
        return `* You are away${text && `: ${person.away}`}. /back ends this.`;
      case "back":
        if (person.away === null) return "! You are not away.";
        person.away = null;
        return "* You are back.";
      case "quit":
        if (!this.askName) tell(person, GOODBYE);
        return this.leave(person, typedReason(text));
    }
    return `! Unknown command /${typed}. Did you mean /${MEANT[typed]}? ` +
      `/help lists commands, //${typed} sends it as a message.`;
  }

  #say(from: Person, line: string): undefined {
    const others = this.#recipients(from).filter((person) => person !== from);
    tell(others, line);
    this.#said = [...this.#said, line].slice(-this.history);
  }

  #whisper(from: Person, to: Person, text: string): string {
    if (!to.ignored.has(from)) {
      tell(to, `[${from.name} -> you] ${text}`);
      to.lastSender = from;
    }
    const answer = `[you -> ${to.name}] ${text}`;
    if (to.away === null) return answer;
    return `${answer}\n* ${to.name} is away${to.away && `: ${to.away}`}`;
  }

  /** To everyone but `person`, those who ignore them, and those who want no notices. */
  #announce(person: Person, what: string, why = ""): void {
    const line = `* ${person.name} has ${what} the room${why}`;
    tell(this.#recipients(person).filter(({ quiet }) => !quiet), line);
  }

  /** Everyone who does not ignore `from`. */
  #recipients(from: Person): Person[] {
    return this.people.filter(({ ignored }) => !ignored.has(from));
  }

  #print(what: string, { name, address }: Person, reason = ""): void {
    const who = [name, reason, `${this.#here} here`].filter(Boolean);
    tell(this.operator, `${what} ${address} (${who.join(", ")})`);
  }
}

/** A reason that the server gives is quoted if it was typed. */
function typedReason(text: string): string {
  return text === "too slow" || text === "kicked" ? `"${text}"` : text;
}

/** Expects lines to be received next. */
function tell(who: Person | Person[], ...lines: string[]): void {
  const text = lines.map((line) => line + "\n").join("");
  for (const person of [who].flat()) person.expected += text;
}

/** A connection in memory that splits reads and writes, stalls and fails, as one
 * through a network does. */
class UnreliableConnection implements Connection {
  /** Writes wait. */
  stalled = false;
  /** Writes fail. */
  writesFail = false;
  /** Reads and writes fail. */
  reset = false;
  /** The client has ended its half: a read returns `null` after the rest. */
  clientEnded = false;
  /** The server has ended its half. */
  serverEnded = false;
  closed = false;
  /** Whether the server has read everything that was sent and waits for more. */
  idle = false;
  closeWrite?: () => Promise<void>;
  #unread: Uint8Array = new Uint8Array(0);
  #changed = Promise.withResolvers<void>();
  readonly #decoder = new TextDecoder();

  /** @param dice its own, as the number of reads and writes depends on timing, and
   * the rest of the simulation must not */
  constructor(readonly person: Person, readonly dice: Dice) {
    if (dice(2)) this.closeWrite = () => this.#endWrite();
  }

  async read(buffer: Uint8Array): Promise<number | null> {
    this.idle = this.#unread.length === 0;
    while (!this.#unread.length && !this.reset && !this.clientEnded) {
      await this.#changed.promise;
    }
    if (this.reset) throw new Deno.errors.ConnectionReset();
    if (!this.#unread.length) return null;
    const count = this.#some(Math.min(this.#unread.length, buffer.length));
    buffer.set(this.#unread.subarray(0, count));
    this.#unread = this.#unread.subarray(count);
    return count;
  }

  async write(bytes: Uint8Array): Promise<number> {
    if (this.dice(4) === 0) await turn();
    while (this.stalled && !this.writesFail && !this.reset) {
      await this.#changed.promise;
    }
    if (this.writesFail || this.reset) throw new Deno.errors.BrokenPipe();
    // Copied after the wait, as a socket does: bytes that the server changed since
    // the call show up as wrong lines.
    const taken = bytes.subarray(0, this.#some(bytes.length));
    this.person.received += this.#decoder.decode(taken, { stream: true });
    return taken.length;
  }

  close(): void {
    if (this.closed) throw new Deno.errors.BadResource();
    this.change({ serverEnded: true, closed: true, reset: true });
  }

  async #endWrite(): Promise<void> {
    this.serverEnded = true;
    await turn();
    this.change({ clientEnded: true }); // as nc does
  }

  /** How many of `most` bytes are read or written at once. */
  #some(most: number): number {
    return this.dice(3) ? most : 1 + this.dice(most);
  }

  send(text: string): void {
    this.idle = false;
    const bytes = encoder.encode(text);
    this.#unread = new Uint8Array([...this.#unread, ...bytes]);
    this.change({});
  }

  change(to: Partial<UnreliableConnection>): void {
    Object.assign(this, to);
    this.#changed.resolve();
    this.#changed = Promise.withResolvers();
  }
}

/** How much the clock is put forward at each step: enough for every notice to come at
 * once. */
const STEP_MILLISECONDS = 10_000;

/** What ends a line, LF most often. */
const ENDS = ["\n", "\n", "\n", "\n", "\r\n", "\r\0", "\r"];

const NAMES = [
  ...["alice", "Alice", "bob", "BOB", "zoë", "ＺＯË", "Ольга", ""],
  ...["you", "Server", "no space", "semi;colon", "x".repeat(25), "-", "👋"],
];

/** Clients that join, type and leave at random. */
class Simulation {
  readonly #dice: Dice;
  readonly #model: Model;
  readonly #server: ChatServer;
  #clients: UnreliableConnection[] = [];
  #joined = 0;
  #typed = 0;
  readonly #steps: string[] = [];
  #error: unknown;
  /** The real clock, of which the server's goes ahead. */
  readonly #now = performance.now;

  constructor(readonly seed: number, askName: boolean) {
    this.#dice = diceOf(seed);
    this.#model = new Model(askName, 5);
    const { operator } = this.#model;
    this.#server = ChatServer.listen(
      { host: "127.0.0.1", port: 0, rate: 0, history: 5, askName },
      { print: (line) => operator.received += line + "\n" },
    );
  }

  async run(steps: number): Promise<void> {
    const caught = (event: Event) => {
      event.preventDefault();
      const { error } = event as ErrorEvent;
      this.#error ??= error ?? (event as PromiseRejectionEvent).reason;
    };
    const kinds = ["error", "unhandledrejection"];
    for (const kind of kinds) addEventListener(kind, caught);
    performance.now = () =>
      this.#time() + this.#steps.length * STEP_MILLISECONDS;
    try {
      while (this.#steps.length < steps) await this.#step();
      await this.#stop();
    } finally {
      for (const client of this.#clients) client.change({ reset: true });
      // An error may keep it from stopping, and is the better message.
      await within(this.#server.stop(), "the end").catch(() => {});
      performance.now = this.#now;
      for (const kind of kinds) removeEventListener(kind, caught);
    }
  }

  async #step(): Promise<void> {
    const dice = this.#dice, most = 45, roll = dice(100);
    const here = this.#clients.filter(({ person }) => person.here);
    // The more clients are here, the more often one of them leaves.
    const leaver = roll < 15 ? here[dice(most)] : undefined;
    let client = leaver ?? pick(dice, recent(dice, here));
    if (leaver) await this.#leave(leaver);
    else if (!client || (roll < 30 && here.length < most)) {
      client = this.#join();
    } else if (roll < 45) {
      this.#note(client, client.stalled ? "resumes" : "stalls");
      client.change({ stalled: !client.stalled });
    } else {
      const lines = Array.from(
        { length: 1 + dice(4) },
        () => this.#line(client.person),
      );
      if (client.person.name === "") lines.unshift(this.#name());
      const unfinished = pick(dice, ["", "", "", "and ", "/me "]);
      const ended = lines.map((line) => line + pick(dice, ENDS));
      this.#type(client, ended.join("") + unfinished);
    }
    const { person } = client, { operator } = this.#model;
    await this.#until(() =>
      operator.expected === "" && (client.idle || !person.here)
    );
    // A client that has left either resumes now or never: later it would race with
    // the deadline for its last lines.
    if (!person.here && dice(2)) client.change({ stalled: false });
    if (dice(3) === 0) await this.#settle();
  }

  #join(): UnreliableConnection {
    const remote = { ...FAKE_ADDRESS, port: ++this.#joined };
    const person = this.#model.join(`${remote.hostname}:${remote.port}`);
    const client = new UnreliableConnection(
      person,
      diceOf(this.#dice(2 ** 32)),
    );
    client.stalled = this.#dice(8) === 0;
    this.#note(client, client.stalled ? "joins, stalled" : "joins");
    this.#clients.push(client);
    this.#server.admit(client, remote);
    return client;
  }

  #time(): number {
    return this.#now.call(performance);
  }

  async #leave(client: UnreliableConnection): Promise<void> {
    const { person } = client;
    const ways = ["half-closes", "closes", "resets", "takes no writes"];
    const how = pick(this.#dice, ways);
    // A client that fails to take what waits for it leaves at once, whatever it has
    // typed.
    this.#verify(person);
    const waits = person.expected !== "";
    if (how === "takes no writes" || (how === "closes" && waits)) {
      await this.#fail(client);
      return;
    }
    if (how === "half-closes") this.#type(client, this.#line(person));
    this.#note(client, how);
    if (how === "resets") {
      person.inputEnded = true;
      this.#model.leave(person);
    } else this.#model.endInput(person);
    client.change({
      writesFail: how !== "half-closes",
      reset: how === "resets",
      clientEnded: how !== "resets",
    });
  }

  /** Lets the writes to a client fail, by which it leaves as soon as there is one. */
  async #fail(client: UnreliableConnection): Promise<void> {
    const { person } = client, model = this.#model;
    this.#note(client, "takes no writes");
    client.change({ writesFail: true });
    const others = this.#clients.filter((other) =>
      other !== client && other.person.here && other.person.name
    );
    if (person.expected === "" && others.length && this.#dice(2)) {
      // One line, as what comes after it may be handled before the write fails.
      const other = pick(this.#dice, others);
      this.#type(other, `hello ${++this.#typed}\n`);
      if (person.expected === "") await this.#until(() => other.idle);
    }
    if (person.expected === "") {
      // What is typed already is said; the answer to the rest fails.
      if (person.name && model.askName) client.change({ reset: true });
      else this.#type(client, person.name ? "\n/who\n" : "person\n");
    }
    person.inputEnded = true;
    model.leave(person);
    await this.#until(() => client.closed);
    this.#type(client, "nobody receives this\n");
  }

  #type(client: UnreliableConnection, text: string): void {
    this.#note(client, `types ${JSON.stringify(text)}`);
    this.#model.type(client.person, text);
    client.send(text);
  }

  #line({ lastSender }: Person): string {
    const dice = this.#dice, number = ++this.#typed;
    const person = dice(3)
      ? pick(dice, recent(dice, this.#model.people))
      : lastSender;
    const name = person?.name ?? "nobody";
    const somebody = pick(dice, [name, name, name.toUpperCase(), "nobody"]);
    const wanted = this.#name();
    return pick(dice, [
      `hello ${number}`,
      `日本 👋 ${number}`,
      ` /well ${number}`,
      `//who ${number}`,
      `/usr/bin/env ${number}`,
      pick(dice, [`// a comment ${number}`, `/help-me ${number}`, "//", "/"]),
      pick(dice, ["", "\r", " ", "\x07\t", "\u200b", "\x1b[1mbold\x1b[0m\r"]),
      pick(dice, [`helpo\b\blo ${number}`, `wrong\x15right ${number}\x7f`]),
      `a\tb\t${number}`,
      "x".repeat(dice(9_000)),
      `/me waves ${number}`,
      `/ME  is there\r`,
      `/msg ${somebody}  in private ${number} \r`,
      `/msg @${somebody}, psst ${number}`,
      `/w ${somebody} ` + "y".repeat(pick(dice, [9, 99, 4_100, 9_000])),
      `/reply of course ${number}`,
      `/R no ${number}`,
      `/nick ${wanted}`,
      `/Name  ${wanted} `,
      `/nick ${somebody}`,
      pick(dice, ["/who", "/WHO", "/list ", "/who gone."]),
      pick(dice, ["/nick", "/me", "/msg x", "/reply ", "/ignore"]),
      pick(dice, ["/whoo", "/em waves", "/QIUT", "/ingore x", "/nik"]),
      `/ignore ${somebody}`,
      pick(dice, ["/quiet", "/quiet on", "/quiet OFF", "/quiet please"]),
      pick(dice, ["/away", `/away for ${number}`, "/away kicked", "/back"]),
      pick(dice, ["/bell", "/bell on", "/bell off", "/bell maybe"]),
      pick(dice, ["/quit", "/quit too slow", "/bye of you  ", "/exit"]),
    ]);
  }

  #name(): string {
    const dice = this.#dice, guest = `guest${this.#joined + dice(9)}`;
    return pick(dice, [`person${++this.#typed}`, pick(dice, NAMES), guest]);
  }

  async #stop(): Promise<void> {
    for (const client of this.#clients) {
      if (client.person.here) client.change({ stalled: false });
      else if (client.stalled) client.change({ reset: true });
    }
    await this.#settle();
    this.#steps.push("The server stops");
    const clients = this.#clients,
      here = clients.filter(({ person }) => person.here);
    tell(here.map(({ person }) => person), "* Shutdown Server");
    tell(this.#model.operator, "Shutdown Server ......");
    let stopped = false;
    this.#server.stop().then(() => stopped = true);
    await this.#until(() => stopped && clients.every(({ closed }) => closed));
  }

  /** Waits until every client that does not stall has received everything, and the
   * end of its connection if it has left. */
  async #settle(): Promise<void> {
    await this.#until(() =>
      this.#clients.every((client) => this.#settled(client))
    );
    this.#clients = this.#clients.filter(({ closed }) => !closed);
  }

  #settled(client: UnreliableConnection): boolean {
    const { person, stalled, writesFail, serverEnded } = client;
    return stalled || writesFail ||
      (person.expected === "" && serverEnded !== person.here);
  }

  async #until(check: () => boolean): Promise<void> {
    const end = this.#time() + WAIT_MILLISECONDS;
    for (;;) {
      if (this.#error) throw new Error(this.#story, { cause: this.#error });
      for (const client of this.#clients) {
        const { person, stalled, writesFail, serverEnded } = client;
        this.#verify(person, serverEnded && !stalled && !writesFail);
      }
      this.#verify(this.#model.operator);
      if (check()) return;
      if (this.#time() > end) break;
      await turn();
    }
    const late = this.#clients.find((client) => !this.#settled(client));
    this.#verify(late?.person ?? this.#model.operator, true);
    throw new Error(`Late: ${this.#story}`);
  }

  /** Compares what was received since the last time with what was expected.
   *
   * @param all whether everything expected must have been received */
  #verify(person: Person, all = false): void {
    if (person.mayRing) {
      person.received = person.received.replaceAll("\x07", "");
    }
    const { name, address, verified, received, expected } = person;
    if (received === "" && !(all && expected)) return;
    if (!expected.startsWith(received) || (all && expected !== received)) {
      const shown = (verified + received).split("\n").length + 2;
      const lines = (text: string) => (verified + text).split("\n", shown);
      const what = `What ${name || address} received. ${this.#story}`;
      assertEquals(lines(received), lines(expected), what);
      assertEquals(received, expected, what);
    }
    person.verified = (verified + received).slice(-400);
    person.expected = expected.slice(received.length);
    person.received = "";
  }

  #note(
    { person: { name, address } }: UnreliableConnection,
    what: string,
  ): void {
    this.#steps.push(`${name || address} ${what}`.slice(0, 200));
  }

  get #story(): string {
    return `Step ${this.#steps.length} with the seed ${this.seed}. Again:\n` +
      `PARLEY_SEED=${this.seed} deno test --allow-all --filter simulated\n` +
      `The last steps:\n  ${this.#steps.slice(-12).join("\n  ")}\n`;
  }
}

for (const askName of [false, true]) {
  const kind = askName ? " that asks for names" : "";
  Deno.test(`in a simulated room${kind} everyone receives what the model says`, async () => {
    const seed = Deno.env.get("PARLEY_SEED") ?? Math.random() * 2 ** 32;
    await new Simulation(Number(seed) >>> 0, askName).run(5_000);
  });
}
