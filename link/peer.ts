/**
 * Another server, as a cursor into its log: what it says is applied to the room
 * of this server, and what is missing is asked for again.
 *
 * @module
 */
import type { Attachment } from "./attachment.ts";
import type { People } from "./log.ts";
import { PrivateMessages } from "./private.ts";
import type { Publisher, PublisherOptions } from "./publisher.ts";
import type { Report } from "./report.ts";
import {
  BrokenMessage,
  countLines,
  type Entry,
  FROM,
  HOST,
  Kind,
  MAX_NUMBER,
  MESSAGE_BYTES,
  NOW,
  readEntry,
  type Reader,
  Type,
} from "./wire.ts";

/** What the parts of a link share. */
export interface Shared {
  options: PublisherOptions;
  room: Attachment;
  publisher: Publisher;
  report: Report;
  /** Whether one more person from elsewhere can be added. */
  hasPlace: () => boolean;
}

/** How long an answer is waited for at first; each further wait is twice as
 * long, up to the second figure. */
const ASK_MILLISECONDS = 250, MAX_ASK_MILLISECONDS = 2_000;

/** After more questions than this, over more than so long, entries that are
 * missing are given up, and the people of now are asked for. On a bus that loses
 * 30% of all messages, one question in 100,000 remains without an answer so
 * often. */
const MAX_ASKED = 16, GIVE_UP_MILLISECONDS = 30_000;

/** How many people of one server are kept. */
const MAX_PEOPLE = 65_536;

/** What a person can be called, as in `main.ts`. */
const NAME = /^[\p{L}\p{Nd}_-][\p{L}\p{M}\p{Nd}_-]{0,23}$/u;

/** When to ask a server for what is missing, and when to give up. */
class Asking {
  #count = 0;
  #firstAt = 0;
  #lastAt = 0;
  #nextAt = 0;
  #delay = ASK_MILLISECONDS;

  isTime(now: number): boolean {
    return now >= this.#nextAt;
  }

  /** A question was sent. It counts towards giving up only if the server has been
   * there since the last one.
   * @param lastReceived when the last message arrived from the server */
  asked(now: number, lastReceived: number): void {
    if (this.#count === 0) this.#firstAt = now;
    if (this.#count === 0 || lastReceived > this.#lastAt) this.#count++;
    this.#lastAt = now;
    this.#nextAt = now + this.#delay;
    this.#delay = Math.min(2 * this.#delay, MAX_ASK_MILLISECONDS);
  }

  givesUp(now: number): boolean {
    return this.#count > MAX_ASKED &&
      now - this.#firstAt > GIVE_UP_MILLISECONDS;
  }

  /** Waits for the rest of an answer that comes in several messages. */
  waitUntil(time: number): void {
    this.#nextAt = time;
  }

  reset(nextAt = 0): void {
    this.#count = 0;
    this.#delay = ASK_MILLISECONDS;
    this.#nextAt = nextAt;
  }
}

/** Another process that uses the name of a server. */
interface Rival {
  identity: string;
  startedAt: number;
  /** When its first heartbeat arrived. */
  since: number;
}

export class Peer {
  readonly name: string;
  readonly identity: string;
  /** `silent`: nothing came from it for too long. Its people have left the room,
   * and are kept for its return. `stopped`: it said goodbye. */
  state: "linked" | "silent" | "stopped" = "linked";
  /** How long it had been running when it said goodbye, in milliseconds. */
  stoppedAge = 0;
  /** When the last message arrived from it. */
  lastReceived: number;
  /** The people on it, without `@` and its name. */
  readonly people: People = new Map();
  readonly privateMessages: PrivateMessages;
  /** The last process that wanted its name. */
  rival: Rival | null = null;
  readonly #shared: Shared;
  readonly #asking = new Asking();
  /** Whether its people and `#next` are known: from its start on, or since a
   * snapshot. */
  isKnown: boolean;
  /** The number of the next entry, and how many lines were said before it. */
  #next = 0;
  #lines = 0;
  /** How many entries its log has, as far as is known. */
  #end = 0;
  /** The snapshot of its people that is arriving, in pieces. */
  #snapshot: { at: number; piece: number; seen: Set<string> } | null = null;

  /** @param fromStart whether its log can be read from the first entry on */
  constructor(
    shared: Shared,
    name: string,
    identity: string,
    fromStart: boolean,
  ) {
    this.#shared = shared;
    this.name = name;
    this.identity = identity;
    this.lastReceived = this.#now();
    this.isKnown = fromStart;
    this.privateMessages = new PrivateMessages(shared, this);
  }

  #now(): number {
    return this.#shared.options.clock.now();
  }

  /** The name of one of its people in the room, such as `alice@tokyo`. */
  fullName(name: string): string {
    return `${name}@${this.name}`;
  }

  /** Whether entries, or all of its people, are missing. */
  get isBehind(): boolean {
    return !this.isKnown || this.#next < this.#end;
  }

  /** Whether nothing has arrived from it since a rival appeared. */
  get isChallenged(): boolean {
    return this.rival !== null && this.lastReceived < this.rival.since;
  }

  // -- whether it is there

  /** Tells the room what happened to it, if the room was told that it is linked. */
  tell(event: Parameters<Report["server"]>[0]): void {
    if (!this.isKnown) return;
    this.#shared.report.server(event, this.name, this.people.size);
  }

  /** Something came from it. */
  received(): void {
    this.lastReceived = this.#now();
    if (this.state === "silent") this.#returned();
  }

  #returned(): void {
    this.state = "linked";
    for (const [name, away] of this.people) {
      const isBack = this.#shared.room.add(this.fullName(name), { away });
      if (!isBack) this.people.delete(name);
    }
    this.tell("back");
  }

  fellSilent(): void {
    this.state = "silent";
    this.#snapshot = null;
    this.removePeople({ mayReturn: true });
    this.tell("gone");
  }

  /** It said goodbye.
   * @param lines how many lines its log has
   * @param age how long it had been running, in milliseconds */
  stopped(lines: number, age: number): void {
    if (this.isKnown) this.#tellLost(lines);
    this.state = "stopped";
    this.stoppedAge = age;
    this.removePeople();
    this.tell("stopped");
    this.people.clear();
  }

  /** Removes its people from the room; they stay in `people`. */
  removePeople(options?: { mayReturn: boolean }): void {
    for (const name of this.people.keys()) {
      this.#shared.room.remove(this.fullName(name), options);
    }
  }

  #tellLost(lines: number): void {
    this.#shared.report.lost(this.name, lines - this.#lines);
  }

  #drop(what: string): void {
    this.#shared.report.dropped(this.name, what);
  }

  // -- what is missing

  /** Its log has `end` entries. */
  hasEntries(end: number): void {
    this.#end = Math.max(this.#end, end);
  }

  /** Asks for what is missing, unless the answer to the last question may still
   * come. */
  ask(): void {
    const now = this.#now();
    if (!this.#shared.publisher.isConnected || !this.#asking.isTime(now)) {
      return;
    }
    this.#asking.asked(now, this.lastReceived);
    const people = !this.isKnown || this.#asking.givesUp(now);
    this.#sendAsk(people ? NOW : FROM);
  }

  /** Asks whether it is still there: any answer will do. */
  probe(): void {
    this.#sendAsk(FROM);
  }

  #sendAsk(mode: number): void {
    const { publisher } = this.#shared;
    publisher.sendTo(
      this.name,
      publisher.message(Kind.Ask).identity(this.identity).u8(mode)
        .u48(this.#next),
    );
  }

  /** Forgets how often it was asked: there is a new connection. */
  resetAsking(): void {
    this.#asking.reset();
  }

  // -- entries

  readEntries(reader: Reader): void {
    const first = reader.u48(), lines = reader.u48(), count = reader.u32();
    const after = first + count;
    if (after > MAX_NUMBER || count > MESSAGE_BYTES) {
      throw new BrokenMessage("with an impossible number");
    }
    this.hasEntries(after);
    if (!this.isKnown || after <= this.#next) return;
    if (first > this.#next) return this.ask();
    let linesRead = lines;
    for (let number = first; number < after; number++) {
      const entry = readEntry(reader);
      linesRead += countLines(entry);
      if (number < this.#next) continue;
      this.#next = number + 1;
      this.#lines = linesRead;
      this.#apply(entry);
    }
    reader.end();
    this.#snapshot = null;
    // What is still missing may be on its way: an answer has many messages.
    this.#asking.reset(this.isBehind ? this.#now() + ASK_MILLISECONDS : 0);
  }

  #apply(entry: Entry): void {
    const { name } = entry;
    // The operator opens and closes the console without notice.
    const announce = name !== HOST;
    switch (entry.type) {
      case Type.Said:
      case Type.Action:
        return this.#say(name, entry.lines, entry.type === Type.Action);
      case Type.Joined:
        return void this.#add(name, null, announce);
      case Type.Left:
        return this.#remove(name, { reason: entry.reason, announce });
      case Type.Renamed:
        return this.#rename(name, entry.to);
      case Type.Away:
        return this.#setAway(name, entry.away);
    }
  }

  #say(name: string, lines: Uint8Array, action: boolean): void {
    const { room, options } = this.#shared;
    if (options.raw) {
      if (name !== "") throw new BrokenMessage("with a name in a raw room");
      return room.say("", lines, { action });
    }
    if (name !== HOST && !this.people.has(name)) {
      return this.#drop("of a person who is not there");
    }
    room.say(this.fullName(name), lines, { action });
  }

  /** `false` if the person cannot be added. */
  #add(name: string, away: string | null, announce: boolean): boolean {
    if (this.people.has(name)) return true;
    const { room, options, hasPlace } = this.#shared;
    if (this.people.size >= MAX_PEOPLE || !hasPlace()) {
      this.#drop("of more people than there can be");
      return false;
    }
    if (
      options.raw || !isName(name) ||
      !room.add(this.fullName(name), { announce, away })
    ) {
      this.#drop("with an invalid name");
      return false;
    }
    this.people.set(name, away);
    return true;
  }

  #remove(
    name: string,
    options?: { reason?: string; announce?: boolean },
  ): void {
    if (!this.people.delete(name)) return;
    this.#shared.room.remove(this.fullName(name), options);
  }

  #rename(name: string, to: string): void {
    const away = this.people.get(name);
    if (away === undefined || name === to) return;
    const isPossible = isName(to) && !this.people.has(to) &&
      this.#shared.room.rename(this.fullName(name), this.fullName(to));
    if (!isPossible) {
      this.#remove(name, { announce: true });
      return this.#drop("with an invalid name");
    }
    this.people.delete(name);
    this.people.set(to, away);
  }

  #setAway(name: string, away: string | null): void {
    const before = this.people.get(name);
    if (before === undefined || before === away) return;
    this.people.set(name, away);
    this.#shared.room.setAway(this.fullName(name), away);
  }

  // -- snapshots of its people

  readPeople(reader: Reader): void {
    const at = reader.u48(), lines = reader.u48();
    const piece = reader.u32(), pieces = reader.u32();
    if (piece >= pieces) {
      throw new BrokenMessage("with an impossible number");
    }
    const now = this.#now(), givesUp = this.#asking.givesUp(now);
    const isOld = at < this.#next || (at === this.#next && !givesUp);
    if (this.isKnown && isOld) return;
    if (piece === 0) this.#snapshot = { at, piece: 0, seen: new Set() };
    const snapshot = this.#snapshot;
    if (snapshot?.at !== at || snapshot.piece !== piece) return;
    this.#asking.waitUntil(now + 4 * ASK_MILLISECONDS);
    while (!reader.ended) {
      const name = reader.string(), away = reader.away();
      if (!this.#add(name, away, false)) continue;
      this.#setAway(name, away);
      snapshot.seen.add(name);
    }
    if (++snapshot.piece < pieces) return;
    for (const name of this.people.keys()) {
      if (!snapshot.seen.has(name)) this.#remove(name);
    }
    if (this.isKnown) this.#tellLost(lines);
    this.#snapshot = null;
    this.#next = at;
    this.#lines = lines;
    // Entries that it did not send when it was asked so often may not exist.
    this.#end = givesUp ? at : Math.max(this.#end, at);
    this.#asking.reset();
    if (this.isKnown) return;
    this.isKnown = true;
    this.tell("linked");
  }
}

function isName(name: string): boolean {
  return NAME.test(name) && name.normalize("NFKC") === name;
}
