/**
 * What a server sends: its log and its heartbeats to all servers, and the parts
 * of the log that others ask for.
 *
 * @module
 */
import type { Batch, Cursor, Log } from "./log.ts";
import {
  BrokenMessage,
  FROM,
  Kind,
  MESSAGE_BYTES,
  NAME_BYTES,
  RAW,
  type Reader,
  TEXT_BYTES,
  Writer,
} from "./wire.ts";

/** A connection to the message bus. */
export interface Bus {
  /** @param subject after the name of the room, such as `log.tokyo` */
  publish(subject: string, message: Uint8Array): void;
  /** Calls `done` when the bus has received everything published so far. If the
   * connection is lost before that, `done` is never called. */
  confirm(done: () => void): void;
}

/** A source of time; a simulation supplies its own. */
export interface Clock {
  /** Milliseconds since an arbitrary moment. */
  now(): number;
  /** Calls `then` at the end of this turn of the event loop. */
  soon(then: () => void): void;
  /** Calls `then` after some milliseconds; returns a function that cancels it. */
  after(milliseconds: number, then: () => void): () => void;
}

/** How many servers can wait for a part of the log. */
const MAX_ASKERS = 256;

/** How often a server sends a heartbeat. */
const HEARTBEAT_MILLISECONDS = 5_000;

/** Servers that greet this one within so long are answered by one heartbeat. */
const HELLO_MILLISECONDS = 100;

/** How many bytes may be on the way to NATS. */
const IN_FLIGHT_BYTES = 1024 * 1024;

/** After how many bytes NATS is asked to confirm them. */
const CONFIRM_BYTES = 64 * 1024;

/** How long a snapshot of the people can be sent to further servers. */
const SNAPSHOT_MILLISECONDS = 100;

/** A server that asked for a part of the log. */
interface Asker {
  /** Messages that it is sent first: the people at `cursor`. */
  people: Writer[];
  /** Where it reads on after them. */
  cursor: Cursor;
}

/** The people at entry `at`, as messages. */
interface Snapshot {
  madeAt: number;
  at: number;
  messages: Writer[];
}

/** What a publisher is made with. */
export interface PublisherOptions {
  /** The name of this server. */
  as: string;
  /** Whether the room relays lines without names. */
  raw: boolean;
  /** 16 hexadecimal digits, different at each start of a server. */
  identity: string;
  clock: Clock;
}

/** The sending side of a link. */
export class Publisher {
  readonly #log: Log;
  readonly #options: PublisherOptions;
  /** Whether this server holds its name: only then it publishes its log. */
  readonly #holdsName: () => boolean;
  readonly #startedAt: number;
  #bus: Bus | null = null;
  /** The log has been published up to here. */
  #published: Cursor;
  /** Entries below this number have reached the bus. */
  #confirmed = 0;
  #unconfirmedBytes = 0;
  #confirming = false;
  #scheduled = false;
  #lastHeartbeat = -Infinity;
  /** A server waits for a heartbeat, which the next tick sends. */
  #heartbeatWanted = false;
  /** By name, the one that has waited longest first. */
  readonly #askers = new Map<string, Asker>();
  readonly #snapshots: Partial<Record<"now" | "start", Snapshot>> = {};

  constructor(log: Log, options: PublisherOptions, holdsName: () => boolean) {
    this.#log = log;
    this.#options = options;
    this.#holdsName = holdsName;
    this.#published = log.first();
    this.#startedAt = options.clock.now();
  }

  get isConnected(): boolean {
    return this.#bus !== null;
  }

  /** Whether the whole log has been published. */
  get isDone(): boolean {
    return this.#published.number >= this.#log.end;
  }

  /** Goes on where the last connection ended. What was not confirmed on it may
   * be lost, and is sent again. */
  connected(bus: Bus): void {
    this.#bus = bus;
    this.#unconfirmedBytes = 0;
    this.#confirming = false;
    this.#askers.clear();
    const from = Math.max(this.#confirmed, this.#log.start);
    this.#published = this.#log.seek(from)!;
  }

  disconnected(): void {
    this.#bus = null;
  }

  /** Starts a message of this server. */
  message(kind: number, flags = 0): Writer {
    if (this.#options.raw) flags |= RAW;
    return Writer.message(kind, flags, this.#options.identity);
  }

  /** Sends a message to one server. */
  sendTo(server: string, message: Writer): void {
    this.#publish(`to.${server}.${this.#options.as}`, message);
  }

  #sendToAll(message: Writer): void {
    this.#publish(`log.${this.#options.as}`, message);
  }

  #publish(subject: string, message: Writer): void {
    // The log stops at IN_FLIGHT_BYTES (see pump). Any other message that is
    // dropped here is sent or asked for again.
    if (!this.#bus || this.#unconfirmedBytes > 2 * IN_FLIGHT_BYTES) return;
    const bytes = message.done();
    this.#unconfirmedBytes += bytes.length;
    this.#bus.publish(subject, bytes);
  }

  /** Sends a heartbeat to all servers. */
  heartbeat(flags = 0): void {
    const now = this.#options.clock.now();
    this.#lastHeartbeat = now;
    this.#heartbeatWanted = false;
    const { number, lines } = this.#published;
    const age = Math.max(0, Math.floor(now - this.#startedAt));
    this.#sendToAll(
      this.message(Kind.Heartbeat, flags).u48(number).u48(lines).u48(age),
    );
  }

  /** Answers a server that has just connected with a heartbeat. */
  answerHello(): void {
    const now = this.#options.clock.now();
    if (now - this.#lastHeartbeat > HELLO_MILLISECONDS) this.heartbeat();
    else this.#heartbeatWanted = true;
  }

  /** Sends a heartbeat if it is time for one, and what has not been sent yet. */
  tick(): void {
    const since = this.#options.clock.now() - this.#lastHeartbeat;
    const isTime = since >= HEARTBEAT_MILLISECONDS;
    if (isTime || this.#heartbeatWanted) this.heartbeat();
    if (isTime) this.#confirm();
    this.pump();
  }

  /** Calls `done` when the bus has received everything published so far. */
  confirmed(done: () => void): void {
    this.#bus?.confirm(done);
  }

  /** Publishes at the end of this turn of the event loop. */
  schedule(): void {
    if (this.#scheduled || !this.#bus) return;
    this.#scheduled = true;
    this.#options.clock.soon(() => {
      this.#scheduled = false;
      this.pump();
    });
  }

  /** Publishes new entries and what was asked for, until too many bytes are on
   * the way: one message of each in turn, so that neither delays the other. */
  pump(): void {
    if (!this.#bus || !this.#holdsName()) return;
    // NATS was too slow and entries were dropped: the others will ask for them.
    if (this.#published.number < this.#log.start) {
      this.#published = this.#log.first();
    }
    while (this.#unconfirmedBytes < IN_FLIGHT_BYTES) {
      const batch = this.#log.read(this.#published, this.#log.end);
      if (batch) this.#sendToAll(this.#entries(batch));
      const answered = this.#answerNext();
      if (!batch && !answered) break;
    }
    if (this.#unconfirmedBytes >= CONFIRM_BYTES) this.#confirm();
  }

  #confirm(): void {
    if (this.#confirming || !this.#bus) return;
    this.#confirming = true;
    const bus = this.#bus, bytes = this.#unconfirmedBytes;
    const { number } = this.#published;
    bus.confirm(() => {
      if (bus !== this.#bus) return;
      this.#confirming = false;
      this.#unconfirmedBytes -= bytes;
      this.#confirmed = number;
      this.pump();
    });
  }

  #entries({ first, lines, count, bytes }: Batch): Writer {
    return this.message(Kind.Entries).u48(first).u48(lines).u32(count)
      .raw(bytes);
  }

  // -- parts of the log that others ask for

  /** Handles the message of a server that asks for a part of the log. */
  readAsk(reader: Reader, from: string): void {
    const asked = reader.identity(), mode = reader.u8(), number = reader.u48();
    reader.end();
    const isForUs = asked === this.#options.identity;
    // An earlier server of this name is asked, or there is nothing new: the
    // heartbeat says so.
    if (!isForUs || number === this.#published.number) {
      this.heartbeat();
      if (!isForUs || mode === FROM) return;
    }
    if (number > this.#log.end && mode === FROM) {
      throw new BrokenMessage("with an impossible number");
    }
    if (!this.#askers.has(from) && this.#askers.size >= MAX_ASKERS) return;
    const asker = mode === FROM
      ? this.#askerFrom(number)
      : this.#askerOf("now");
    this.#askers.set(from, asker);
    this.schedule();
  }

  /** An asker that reads from entry `number`, or from the start of what is kept
   * if that entry was dropped. */
  #askerFrom(number: number): Asker {
    const cursor = this.#log.seek(number);
    return cursor ? { people: [], cursor } : this.#askerOf("start");
  }

  #askerOf(which: "now" | "start"): Asker {
    const { at, messages } = this.#snapshot(which);
    return { people: messages.slice(), cursor: this.#log.seek(at)! };
  }

  /** Sends one message to the server that has waited longest. `false` if none
   * waits. */
  #answerNext(): boolean {
    const first = this.#askers.entries().next();
    if (first.done) return false;
    const [name, asker] = first.value;
    this.#askers.delete(name);
    const people = asker.people.shift();
    if (people) this.sendTo(name, people);
    else if (asker.cursor.number < this.#log.start) {
      Object.assign(asker, this.#askerOf("start"));
    } else {
      this.#answerFrom(name, asker.cursor);
      if (asker.cursor.number >= this.#published.number) return true;
    }
    this.#askers.set(name, asker); // at the end of the queue
    return true;
  }

  /** Sends entries from `cursor` on: to one server, or to all if other askers
   * need them too. */
  #answerFrom(name: string, cursor: Cursor): void {
    const from = cursor.number, limit = this.#published.number;
    const batch = this.#log.read(cursor, limit);
    if (!batch) return;
    let isShared = false;
    for (const [otherName, other] of this.#askers) {
      const { number } = other.cursor;
      const needsIt = number >= from && number < cursor.number;
      if (other.people.length > 0 || !needsIt) continue;
      isShared = true;
      other.cursor = { ...cursor };
      if (cursor.number >= limit) this.#askers.delete(otherName);
    }
    if (isShared) this.#sendToAll(this.#entries(batch));
    else this.sendTo(name, this.#entries(batch));
  }

  /** The people after the last entry, or before the first that is kept. */
  #snapshot(which: "now" | "start"): Snapshot {
    const log = this.#log, old = this.#snapshots[which];
    const madeAt = this.#options.clock.now();
    const isKept = which === "now"
      ? old && old.at >= log.start
      : old?.at === log.start;
    if (old && isKept && madeAt - old.madeAt < SNAPSHOT_MILLISECONDS) {
      return old;
    }
    const people = which === "now" ? log.people : log.peopleAtStart;
    const cursor = which === "now" ? log.seek(log.end)! : log.first();
    const bodies = [new Writer(1024)];
    for (const [name, away] of people) {
      const body = bodies.at(-1)!;
      body.string(name).away(away);
      if (body.length > MESSAGE_BYTES - TEXT_BYTES - 2 * NAME_BYTES) {
        bodies.push(new Writer(1024));
      }
    }
    const messages = bodies.map((body, piece) =>
      this.message(Kind.People).u48(cursor.number).u48(cursor.lines)
        .u32(piece).u32(bodies.length).raw(body.done())
    );
    return this.#snapshots[which] = { madeAt, at: cursor.number, messages };
  }
}
