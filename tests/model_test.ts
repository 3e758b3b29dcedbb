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
  FAKE_ADDRESS,
  FORBIDDEN,
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

const anyTelnet = fc.oneof(
  fc.integer({ min: SE, max: 249 }).map((command) => [IAC, command]),
  fc.tuple(fc.constant(IAC), fc.integer({ min: WILL, max: 254 }), fc.nat(255)),
  fc.array(fc.constantFrom([0], [10], [13], [65], [SE], [IAC, IAC]))
    .map((data) => [IAC, SB, 31, ...data.flat(), IAC, SE]),
);
const anyPrintable = fc.string({ unit: "grapheme", minLength: 1 })
  .filter((text) => !FORBIDDEN.test(text));
const anyLong = fc.constantFrom("x", "é", "€", "🌍")
  .map((it) => it.repeat(LINE_BYTES / bytesOf(it).length));

// deno-fmt-ignore: by kind
const anyContent = fc.array(fc.oneof<fc.MaybeWeightedArbitrary<Content>[]>(
  { weight: 5, arbitrary: anyPrintable },
  { weight: 5, arbitrary: fc.constantFrom(
    "\n", "\r\n", "\r\0", "\r", "\0", "\t", "\x1b[31m", "\x1b]0;", "\x07",
    "\x9b", "\u2028", "\u202e", "\ufeff", "* host ", "[guest1] ", "! ",
    "\nGET / HTTP/1.1\n", "a") },
  { weight: 4, arbitrary: fc.constantFrom(
    "\n//", "\n/", "\n/me ", "\n/nick ", "\n/nick host", "\n/msg guest1 ",
    "\n/msg guest2 ", "\n/reply ", "\n/ignore guest1\n", "\n/who\n",
    "\n/help\n", "\n/quiet\n", "\n/quit ") },
  { weight: 3, arbitrary: anyTelnet },
  { weight: 3, arbitrary: fc.constantFrom( // broken off
    [IAC], [IAC, IAC], [IAC, DO], [IAC, SB], [0xc3], [0xe2, 0x82],
    [0xf0, 0x9f, 0x8c], [0x80], [0xc0, 0xaf], [0xed, 0xa0, 0x80]) },
  { weight: 1, arbitrary: fc.uint8Array({ maxLength: 9 }) },
  { weight: 1, arbitrary: anyLong },
), { maxLength: 12 }).map((parts) => bytesOf(...parts));

const anySetup = fc.constantFrom<Setup[]>(
  [{ raw: true }],
  [{}],
  [{}, "", "\x16\x03\x01 how TLS begins\n"],
  [{ askName: true }, "guest1\n", "guest2\n"],
);

property(
  "the same lines arrive however a stream is cut into reads",
  [anySetup, anyContent, anySizes, anySizes],
  async (setup, content, one, other) =>
    assertEquals(
      await exchange(setup, content, one),
      await exchange(setup, content, other),
    ),
);

const anyLine = fc.oneof({ weight: 3, arbitrary: anyPrintable }, anyLong);
const anyEnd = fc.constantFrom("\n", "\r\n", "\r\0");
const anyLines = fc.array(fc.tuple(anyLine, anyEnd), { maxLength: 6 });

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
    const text = "no web request: " + parts.join("");
    const pieces = await relayed(text, sizes);
    assertEquals(pieces.join(""), text);
    for (const piece of pieces) assert(bytesOf(piece).length <= LINE_BYTES);
  },
);

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
      assert(!FORBIDDEN.test(line), JSON.stringify(line));
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

property(
  "cleaning removes forbidden characters and nothing else",
  [anyText],
  (text) => {
    const clean = cleanLine(text);
    assert(!FORBIDDEN.test(clean));
    assertEquals(cleanLine(clean), clean);
    // deno-lint-ignore no-control-regex
    if (/[\x1b\x80-\x9f]/.test(text)) return; // escape sequences are removed whole
    assertEquals(clean, text.replace(new RegExp(FORBIDDEN, "gu"), ""));
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
    assert(!/[\p{DI}\p{C}]/u.test(name));
    assertEquals([name.normalize("NFKC"), normalizeName(name)], [name, name]);
  },
);

property(
  "no two clients have names that differ in case alone",
  [anyLetters, fc.constantFrom("toString", "toLowerCase", "toUpperCase")],
  async (name, inCase) => {
    const typed = `/nick ${name[inCase]()}\n/who\n`;
    const setup: Setup = [{}, `/nick ${name}\n`];
    const [, received] = await exchange(setup, typed, [99]);
    const list = received.match(/(?<=^\* The room contains: ).*$/gm)!.at(-1)!;
    for (const names of [list, list.toLowerCase(), list.toUpperCase()]) {
      assertEquals(new Set(names.split(", ")).size, 2, list);
    }
  },
);

const FLAGS =
  " - -- --host= --port= --port -p --raw --raw= --no-raw --history=" +
  " --allow= --tls-key= --log= -h -hp= --prot --__proto__= --host.x=";
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
  /** What was typed of a line that has not ended. */
  typed = "";
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

/** A line in pieces of at most LINE_BYTES characters. */
const LINE_PIECES = new RegExp(`.{1,${LINE_BYTES}}`, "gs");

/** The arguments of the commands that need some. */
const NEEDED: Record<string, string> = {
  ...{ nick: "NAME", me: "ACTION", msg: "NAME TEXT" },
  ...{ reply: "TEXT", ignore: "NAME" },
};

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
      const help = "Type to talk, /nick NAME for a name, /help for more.";
      tell(person, `* Welcome, ${name}. ${help}`);
      this.#enter(person, name);
    }
    this.#print("New Connection from", person);
    return person;
  }

  /** Only ASCII lines may be longer than 4,096 bytes: their pieces are not cut between
   * characters here. */
  type(person: Person, text: string): void {
    const lines = (person.typed + text).split("\n")
      .map((line) => line.match(LINE_PIECES) ?? [""]);
    person.typed = lines.at(-1)!.pop()!;
    // deno-lint-ignore no-control-regex
    const removed = /\x1b\[\d+m|[\x00-\x08\n-\x1f]/g;
    for (const typed of lines.flat()) {
      const line = typed.replace(removed, "");
      if (line && person.here) this.#receive(person, line);
    }
  }

  leave(person: Person, reason = ""): undefined {
    if (!person.here) return;
    person.here = false;
    this.#here--;
    this.people = this.people.filter((other) => other !== person);
    if (person.name) this.#announce(person, "left", reason && ` (${reason})`);
    this.#print("Connection closed by", person, reason);
  }

  find(name: string): Person | undefined {
    const key = (name: string) => name.normalize("NFKC").toLowerCase();
    return this.people.find((person) => key(person.name) === key(name));
  }

  #receive(person: Person, line: string): void {
    const [, command, text] = /^\/(\S*)\s*(.*?)\s*$/.exec(line) ?? [];
    if (person.name === "") this.#takeName(person, line.trim());
    else if (command === undefined || command.startsWith("/")) {
      this.#say(person, `[${person.name}] ${line.replace(/^\//, "")}`);
    } else {
      const answer = this.#run(person, command, text);
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
      this.#print("Name given by", person);
    }
  }

  #enter(person: Person, name: string): void {
    const nobody = this.people.length || this.askName ? "" : "nobody else yet";
    tell(person, this.#whoIsHere + nobody, ...this.#said);
    person.name = name;
    this.#announce(person, "entered");
    this.people.push(person);
  }

  get #whoIsHere(): string {
    const names = this.people.map((person) => person.name);
    const more = names.length > 20 ? ` and ${names.length - 20} more` : "";
    return `* The room contains: ${names.slice(0, 20).join(", ")}${more}`;
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
    const { name, lastSender } = person, command = typed.toLowerCase();
    const [, to, message] = /^(\S+)\s+(.*)$/.exec(text) ?? [];
    const called = command === "msg" ? to : text;
    if (command in NEEDED && !called) {
      return `! Type /${command} ${NEEDED[command]}.`;
    }
    const whom = this.find(called)!;
    if (/^(msg|ignore)$/.test(command) && !whom) {
      return `! Nobody here is called ${called}. Type /who for who is here.`;
    }
    switch (command) {
      case "nick": {
        const wanted = text.normalize("NFKC");
        const refusal = this.#refusal(person, wanted);
        if (refusal) return `! ${refusal} Choose one with /nick NAME.`;
        if (wanted === name) return `! You are ${name} already.`;
        tell(this.people, `* ${name} is now known as ${wanted}`);
        this.people = this.people.filter((other) => other !== person);
        this.people.push(person);
        person.name = wanted;
        return;
      }
      case "who":
        return this.#whoIsHere;
      case "me":
        return this.#say(person, `** ${name} ${text}`);
      case "msg":
        return this.#whisper(person, whom, message);
      case "reply":
        if (!lastSender) {
          return "! Nobody has spoken to you alone. Type /msg NAME TEXT.";
        }
        return lastSender.here
          ? this.#whisper(person, lastSender, text)
          : `! ${lastSender.name} has left the room.`;
      case "ignore":
        if (whom === person) return "! That is you. Type another's name.";
        if (person.ignored.delete(whom)) {
          return `* You hear ${whom.name} again.`;
        }
        person.ignored.add(whom);
        if (lastSender === whom) person.lastSender = undefined;
        text = `Type /ignore ${whom.name} to stop that.`;
        return `* You do not hear ${whom.name} now. ${text}`;
      case "quiet":
        person.quiet = !person.quiet;
        if (!person.quiet) return "* You hear who enters and leaves again.";
        return "* You do not hear who enters and leaves now. Type /quiet to stop that.";
      case "quit":
        return this.leave(person, text);
    }
    typed = typed.slice(0, 24);
    return `! There is no command /${typed}. Type /help for a list, //${typed} to say it.`;
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
    return `[you -> ${to.name}] ${text}`;
  }

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

const NAMES = [
  ...["alice", "Alice", "bob", "BOB", "zoë", "ＺＯË", "Ольга"],
  ...["you", "Server", "no space", "semi;colon", "x".repeat(25), "-", "👋"],
];

/** Clients that join, type and leave at random, always fewer than 50: from there on
 * notices depend on the clock. */
class Simulation {
  readonly #dice: Dice;
  readonly #model: Model;
  readonly #server: ChatServer;
  #clients: UnreliableConnection[] = [];
  #joined = 0;
  #typed = 0;
  readonly #steps: string[] = [];
  #error: unknown;

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
    try {
      while (this.#steps.length < steps) await this.#step();
      await this.#stop();
    } finally {
      for (const client of this.#clients) client.change({ reset: true });
      // An error may keep it from stopping, and is the better message.
      await within(this.#server.stop(), "the end").catch(() => {});
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
      await this.#type(client, lines.join("\n") + "\n" + unfinished);
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

  async #leave(client: UnreliableConnection): Promise<void> {
    const how = pick(this.#dice, [
      "half-closes",
      "closes",
      "resets",
      "takes no writes",
    ]);
    if (how === "half-closes") {
      await this.#type(client, this.#line(client.person));
    }
    this.#note(client, how);
    const clientEnded = how.endsWith("closes");
    if (clientEnded) this.#model.type(client.person, "\n");
    if (how !== "takes no writes") this.#model.leave(client.person);
    const writesFail = client.writesFail || how !== "half-closes";
    client.change({ writesFail, reset: how === "resets", clientEnded });
  }

  async #type(client: UnreliableConnection, text: string): Promise<void> {
    if (/\/(ignore|quiet)/.test(text)) {
      // Whether a recipient ignores the sender is looked up when a line is written,
      // not when it is sent: no line may be waiting.
      client.change({ stalled: false });
      await this.#settle();
      await turn();
    }
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
      `//slashed ${number}`,
      pick(dice, ["", "\r", " ", "/", "//", "\x07\t", "\x1b[1mbold\x1b[0m\r"]),
      "x".repeat(dice(9_000)),
      `/me waves ${number}`,
      `/ME  is there\r`,
      `/msg ${somebody}  in private ${number} \r`,
      `/msg ${somebody} psst ${number}`,
      `/reply of course ${number}`,
      `/reply no ${number}`,
      `/nick ${wanted}`,
      `/Nick  ${wanted} `,
      `/nick ${somebody}`,
      pick(dice, ["/who", "/WHO", "/who  cares ", "/help-me please"]),
      pick(dice, ["/nick", "/me", "/msg x", "/reply ", "/ignore"]),
      `/ignore ${somebody}`,
      "/quiet",
      pick(dice, ["/quit", "/quit tired", "/quit  of you  "]),
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
    const end = performance.now() + WAIT_MILLISECONDS;
    for (;;) {
      if (this.#error) throw new Error(this.#story, { cause: this.#error });
      for (const client of this.#clients) {
        const { person, stalled, writesFail, serverEnded } = client;
        this.#verify(person, serverEnded && !stalled && !writesFail);
      }
      this.#verify(this.#model.operator);
      if (check()) return;
      if (performance.now() > end) break;
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
