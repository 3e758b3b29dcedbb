/**
 * The protocol of a link: one server's part in a room that many share. It knows
 * neither NATS nor the time, so that a simulation can drive it.
 *
 * What is said between the servers, and why, is at the top of `link.ts`.
 *
 * @module
 */
import type { Attachable, Attachment, LinkEvents } from "./attachment.ts";
import { type Batch, type Cursor, Log, type People } from "./log.ts";
import {
  BrokenMessage,
  FROM,
  GOODBYE,
  HELLO,
  Kind,
  MESSAGE_BYTES,
  MOST,
  NAME_BYTES,
  NOW,
  RAW,
  readEntry,
  Reader,
  TEXT_BYTES,
  Type,
  Writer,
} from "./wire.ts";

/** What a link sends with and learns of what arrived. */
export interface Bus {
  /** @param subject after the name of the room, such as `log.tokyo` */
  publish(subject: string, message: Uint8Array): void;
  /** Calls `done` when everything published so far has arrived at the bus; not
   * at all, if the connection is lost. */
  confirm(done: () => void): void;
}

/** The time, so that a simulation can be its master. */
export interface Clock {
  /** Milliseconds since some moment. */
  now(): number;
  /** Calls `then` at the end of this turn of the event loop. */
  soon(then: () => void): void;
  /** Calls `then` after some milliseconds; returns what prevents it. */
  after(milliseconds: number, then: () => void): () => void;
}

/** What a link is made with. */
export interface RoomOptions {
  /** The name of this server. */
  as: string;
  /** Whether the room relays lines without names. */
  raw: boolean;
  /** 16 hexadecimal digits that no other start of a server has. */
  identity: string;
  clock: Clock;
  /** Receives what the operator should read, in lines. */
  warn: (line: string) => void;
  /** How many bytes are kept to be sent again. */
  window?: number;
  /** Called when this server takes part (`true`), after each connection; and
   * when another server has its name (`false`), after each attempt. */
  claimed?: (held: boolean) => void;
  /** Called once, when the link has ended. */
  ended?: () => void;
}

/** How often a server says that it is there, and how far its log goes. */
const HEARTBEAT_MILLISECONDS = 5_000;

/** A server from which nothing has come for so long is gone. */
export const SILENT_MILLISECONDS = 15_000;

/** How long a server that stops tries to say what is left. */
const GOODBYE_MILLISECONDS = 900;

/** How often what depends on the time is looked at. */
const TICK_MILLISECONDS = 250;

/** How long the holder of a name has to object to another. A round trip through
 * NATS around the world takes 300. */
export const CLAIM_MILLISECONDS = 750;

/** How often a name that was refused is claimed again. */
const CLAIM_AGAIN_MILLISECONDS = 15_000;

/** How long a server must be silent for another to take its place. */
const PLACE_MILLISECONDS = 1_500;

/** How many bytes may be on the way to NATS. */
const IN_FLIGHT_BYTES = 1024 * 1024;

/** After how many bytes NATS is asked whether they have arrived. */
const CONFIRM_BYTES = 64 * 1024;

/** How long an answer is waited for, at first; twice as long each time. */
const ASK_MILLISECONDS = 250, MOST_ASK_MILLISECONDS = 2_000;

/** After so many questions to a server that is there, in so long, without an
 * answer of use, what is missing is given up, and the people of now are asked
 * for. */
const MOST_ASKED = 8, GIVE_UP_MILLISECONDS = 30_000;

/** How long people are made from the same snapshot. */
const SNAPSHOT_MILLISECONDS = 100;

/** Bounds on what others can have this server keep. */
export const MOST_SERVERS = 256;
const MOST_PEOPLE = 65_536;
const MOST_PEOPLE_IN_ALL = 2 ** 20;

/** How many private messages to one server wait to be answered, how often they
 * are sent again, and when they are given up. */
const MOST_TOLD = 256;
const TELL_MILLISECONDS = 1_000;
const MOST_TELL_MILLISECONDS = 15_000;

const DELIVERED = 0, NOBODY = 1;

/** The operator of a server, who may be in no list of people. */
const HOST = "host";

/** What a server or a room can be called. */
export const SERVER_NAME = /^[\w-]{1,24}$/;

// As the names of people are in a room: letters, marks and digits of any script.
const NAME = /^[\p{L}\p{Nd}_-][\p{L}\p{M}\p{Nd}_-]{0,23}$/u;

const CONTROLS =
  // deno-lint-ignore no-control-regex
  /[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ufeff]/g;

/** A name taken by another identity, which is to take its place if it is gone. */
interface Rival {
  identity: string;
  since: number;
  flags: number;
  age: number;
}

/** A server elsewhere. */
class Peer {
  /** When something came from it. */
  lastReceived: number;
  /** Silent for too long: its people have left, and are kept for its return. */
  gone = false;
  /** Said goodbye: what still comes is late. */
  ended = false;
  /** How old it was then, in milliseconds. */
  endedAge = 0;
  /** Whether its people and the number of its next entry are known. */
  known: boolean;
  /** The number of the next entry, and how many lines were said before it. */
  next = 0;
  lines = 0;
  /** How far its log goes, as far as is known. */
  end = 0;
  readonly people: People = new Map();
  /** The snapshot that is coming in. */
  snapshot: { at: number; piece: number; seen: Set<string> } | null = null;
  asked = 0;
  askedSince = 0;
  askAgain = 0;
  askDelay = ASK_MILLISECONDS;
  askedWhen = 0;
  rival: Rival | null = null;
  /** The last private message that came from it, and what was answered. */
  told = 0;
  readonly answers = new Map<number, number>();

  constructor(
    readonly name: string,
    readonly identity: string,
    now: number,
    fromStart: boolean,
  ) {
    this.lastReceived = now;
    this.known = fromStart;
  }
}

/** A server that asked for entries, as a cursor into the log. */
interface Asker {
  /** The people that it is to be given first, as messages. */
  pieces: Uint8Array[];
  /** Where it reads on after them. */
  cursor: Cursor;
}

/** Messages of people, and the number of the entry that follows. */
interface Snapshot {
  made: number;
  at: number;
  pieces: Uint8Array[];
}

/** Private messages to one server that were not answered. */
interface Outbox {
  identity: string;
  last: number;
  sent: number;
  waiting: {
    number: number;
    from: string;
    to: string;
    text: string;
    since: number;
  }[];
}

/** The state of the claim to a name. */
type Claim = "none" | "claiming" | "held" | "refused";

/** One server's part in a room that many share. */
export class LinkedRoom implements LinkEvents {
  readonly #options: RoomOptions;
  readonly #clock: Clock;
  readonly #room: Attachment;
  readonly #log: Log;
  readonly #peers = new Map<string, Peer>();
  readonly #outboxes = new Map<string, Outbox>();
  readonly #started: number;
  #bus: Bus | null = null;
  #stopped = false;
  #stopTick: () => void;
  #lastTick: number;

  // The name.
  #claim: Claim = "none";
  #claimed = 0;
  #linkedAt: number | null = null;
  #disconnectedAt = 0;
  #warnedOfName = -Infinity;

  // Publishing.
  #sent: Cursor;
  #pumping = false;
  #unconfirmed = 0;
  #confirming = false;
  #confirmed = 0;
  #lastHeartbeat = -Infinity;
  /** Whether somebody new waits for a heartbeat. */
  #beatSoon = false;
  readonly #askers = new Map<string, Asker>();
  #snapshots: { now: Snapshot | null; start: Snapshot | null } = {
    now: null,
    start: null,
  };
  #peopleElsewhere = 0;

  // What the room and the operator are told, at most once a second.
  #news = new Map<string, News[]>();
  readonly #lost = new Map<string, number>();
  #lastNews = -Infinity;
  #dropped = { count: 0, what: "" };
  #lastDropped = -Infinity;

  constructor(server: Attachable, options: RoomOptions) {
    this.#options = options;
    this.#clock = options.clock;
    this.#log = new Log(options.window);
    this.#sent = this.#log.first();
    this.#started = this.#lastTick = this.#clock.now();
    this.#room = server.attach({
      said: this.said.bind(this),
      joined: this.joined.bind(this),
      left: this.left.bind(this),
      renamed: this.renamed.bind(this),
      away: this.away.bind(this),
      toldPrivately: this.toldPrivately.bind(this),
      stopping: this.stopping.bind(this),
    });
    for (const { name, away } of this.#room.people()) {
      this.#log.join(name, away);
    }
    this.#stopTick = this.#clock.after(TICK_MILLISECONDS, this.#tick);
  }

  // -- what happens here

  said(name: string, lines: Uint8Array, action: boolean): void {
    this.#log.say(name, lines, action);
    this.#pumpSoon();
  }

  joined(name: string): void {
    this.#log.join(name, null);
    this.#pumpSoon();
  }

  left(name: string, reason: string): void {
    this.#log.leave(name, reason);
    this.#pumpSoon();
  }

  renamed(from: string, to: string): void {
    this.#log.rename(from, to);
    this.#pumpSoon();
  }

  away(name: string, reason: string | null): void {
    this.#log.setAway(name, reason);
    this.#pumpSoon();
  }

  toldPrivately(from: string, to: string, text: string): void {
    const at = to.lastIndexOf("@"), server = to.slice(at + 1);
    const peer = this.#peers.get(server);
    if (!peer || peer.gone || peer.ended) {
      return this.#room.answer(from, `${to} is not here.`);
    }
    let outbox = this.#outboxes.get(server);
    if (outbox?.identity !== peer.identity) {
      if (outbox) this.#giveUp(server, outbox.waiting);
      const { identity } = peer;
      outbox = { identity, last: 0, sent: -Infinity, waiting: [] };
      this.#outboxes.set(server, outbox);
    }
    if (outbox.waiting.length >= MOST_TOLD) {
      return this.#room.answer(
        from,
        `Your message to ${to} was not sent: ${server} does not answer.`,
      );
    }
    const message = {
      number: ++outbox.last,
      from,
      to: to.slice(0, at),
      text,
      since: this.#clock.now(),
    };
    if (!outbox.waiting.length) outbox.sent = message.since;
    outbox.waiting.push(message);
    this.#tell(server, outbox, message);
  }

  /** Sends what is left, and then goodbye. */
  async stopping(): Promise<void> {
    if (this.#stopped) return;
    const done = Promise.withResolvers<void>();
    const end = () => {
      if (!this.#bus || this.#claim !== "held") return done.resolve();
      this.#pump();
      if (this.#sent.number < this.#log.end) {
        this.#clock.after(10, end);
        return;
      }
      this.#beat(GOODBYE);
      this.#bus.confirm(() => done.resolve());
    };
    const cancel = this.#clock.after(GOODBYE_MILLISECONDS, done.resolve);
    end();
    await done.promise;
    cancel();
    this.stop();
  }

  /** Ends at once. The people from elsewhere leave the room. */
  stop(): void {
    if (this.#stopped) return;
    this.#stopped = true;
    this.#stopTick();
    this.#bus = null;
    this.#room.detach();
    this.#options.ended?.();
  }

  // -- the connection

  /** There is a connection to the bus. */
  connected(bus: Bus): void {
    const now = this.#clock.now();
    this.#bus = bus;
    this.#unconfirmed = 0;
    this.#confirming = false;
    this.#askers.clear();
    // What was not confirmed is sent again: it may be lost.
    const from = Math.max(this.#confirmed, this.#log.start);
    this.#sent = this.#log.seek(from)!;
    const away = now - this.#disconnectedAt;
    if (this.#claim === "held" && away < SILENT_MILLISECONDS) this.#begin();
    else this.#claimName();
  }

  /** The connection is lost. */
  disconnected(): void {
    if (this.#bus === null) return;
    this.#bus = null;
    this.#disconnectedAt = this.#clock.now();
    if (this.#claim === "claiming") this.#claim = "none";
  }

  /** A line to everyone in the room. */
  notice(text: string): void {
    if (!this.#stopped) this.#room.notice(text);
  }

  #claimName(): void {
    this.#claim = "claiming";
    this.#claimed = this.#clock.now();
    this.#publish(
      `to.${this.#options.as}`,
      this.#message(Kind.Claim),
    );
  }

  /** Takes part from now on. */
  #begin(): void {
    const now = this.#clock.now();
    this.#linkedAt ??= now;
    this.#claim = "held";
    // Nothing could come from the others until now.
    for (const peer of this.#peers.values()) {
      if (!peer.gone) {
        peer.lastReceived = Math.max(peer.lastReceived, now - 5_000);
      }
      peer.asked = peer.askAgain = 0;
    }
    this.#beat(HELLO);
    this.#pump();
    this.#options.claimed?.(true);
  }

  #refused(): void {
    this.#claim = "refused";
    this.#claimed = this.#clock.now();
    this.#options.claimed?.(false);
  }

  #age(): number {
    return Math.max(0, Math.floor(this.#clock.now() - this.#started));
  }

  // -- publishing

  #message(kind: number, flags = 0): Writer {
    if (this.#options.raw) flags |= RAW;
    return Writer.message(kind, flags, this.#options.identity);
  }

  #publish(to: string, message: Writer | Uint8Array): void {
    // What is left out here is sent again, or asked for.
    if (this.#bus === null || this.#unconfirmed > 2 * IN_FLIGHT_BYTES) return;
    if (message instanceof Writer) message = message.done();
    const subject = to.startsWith("to.") ? `${to}.${this.#options.as}` : to;
    this.#unconfirmed += message.length;
    this.#bus.publish(subject, message);
  }

  get #logSubject(): string {
    return `log.${this.#options.as}`;
  }

  #beat(flags: number): void {
    this.#lastHeartbeat = this.#clock.now();
    this.#beatSoon = false;
    const { number, lines } = this.#sent;
    this.#publish(
      this.#logSubject,
      this.#message(Kind.Heartbeat, flags).u48(number).u48(lines)
        .u48(this.#age()),
    );
  }

  #pumpSoon(): void {
    if (this.#pumping || this.#bus === null) return;
    this.#pumping = true;
    this.#clock.soon(() => {
      this.#pumping = false;
      this.#pump();
    });
  }

  /** Publishes what is new, and what was asked for, as far as NATS takes it: one
   * message of each in turn, so that neither waits for the other. */
  #pump(): void {
    if (this.#bus === null || this.#claim !== "held") return;
    // What NATS has not taken in time is left out, and asked for.
    if (this.#sent.number < this.#log.start) this.#sent = this.#log.first();
    while (this.#unconfirmed < IN_FLIGHT_BYTES) {
      const batch = this.#log.read(this.#sent, this.#log.end);
      if (batch) this.#publish(this.#logSubject, this.#entries(batch));
      const served = this.#serve();
      if (!batch && !served) break;
    }
    if (this.#unconfirmed >= CONFIRM_BYTES) this.#confirm();
  }

  /** Finds out how much has arrived. */
  #confirm(): void {
    if (this.#confirming || this.#bus === null) return;
    this.#confirming = true;
    const bus = this.#bus, bytes = this.#unconfirmed, { number } = this.#sent;
    bus.confirm(() => {
      if (bus !== this.#bus) return;
      this.#confirming = false;
      this.#unconfirmed -= bytes;
      this.#confirmed = number;
      this.#pump();
    });
  }

  #entries({ first, lines, count, bytes }: Batch): Writer {
    return this.#message(Kind.Entries).u48(first).u48(lines).u32(count)
      .raw(bytes);
  }

  /** Sends one message to the server that waits longest for what it asked for. */
  #serve(): boolean {
    const first = this.#askers.entries().next();
    if (first.done) return false;
    const [name, asker] = first.value;
    // To the end of the queue.
    this.#askers.delete(name);
    const piece = asker.pieces.shift();
    if (piece) {
      this.#publish(`to.${name}`, piece);
      this.#askers.set(name, asker);
      return true;
    }
    const { cursor } = asker, from = cursor.number;
    if (from < this.#log.start) {
      this.#askers.set(name, this.#newAsker(FROM, from)!);
      return true;
    }
    const batch = this.#log.read(cursor, this.#sent.number);
    if (!batch) return true;
    // What several have asked for is sent once, to all.
    let several = false;
    for (const [otherName, other] of this.#askers) {
      const { number } = other.cursor;
      if (other.pieces.length || number < from || number >= cursor.number) {
        continue;
      }
      several = true;
      other.cursor = { ...cursor };
      if (cursor.number >= this.#sent.number) this.#askers.delete(otherName);
    }
    this.#publish(
      several ? this.#logSubject : `to.${name}`,
      this.#entries(batch),
    );
    if (cursor.number < this.#sent.number) this.#askers.set(name, asker);
    return true;
  }

  #newAsker(mode: number, from: number): Asker | null {
    if (mode === FROM) {
      if (from > this.#log.end) return null;
      const cursor = this.#log.seek(from);
      if (cursor) return { pieces: [], cursor };
    }
    const which = mode === NOW ? "now" : "start";
    const { at, pieces } = this.#snapshot(which);
    return { pieces: pieces.slice(), cursor: this.#log.seek(at)! };
  }

  /** Messages with the people now, or before the first entry that is kept. */
  #snapshot(which: "now" | "start"): Snapshot {
    const now = this.#clock.now(), log = this.#log;
    const old = this.#snapshots[which];
    if (
      old && now - old.made < SNAPSHOT_MILLISECONDS && old.at >= log.start &&
      (which === "now" || old.at === log.start)
    ) return old;
    const isNow = which === "now";
    const people = isNow ? log.people : log.peopleAtStart;
    const { number: at, lines } = isNow ? log.seek(log.end)! : log.first();
    const bodies: Writer[] = [new Writer(1024)];
    for (const [name, away] of people) {
      const body = bodies.at(-1)!;
      body.string(name).away(away);
      if (body.length > MESSAGE_BYTES - TEXT_BYTES - 2 * NAME_BYTES) {
        bodies.push(new Writer(1024));
      }
    }
    const pieces = bodies.map((body, piece) =>
      this.#message(Kind.People).u48(at).u48(lines).u32(piece)
        .u32(bodies.length).raw(body.done()).done()
    );
    return this.#snapshots[which] = { made: now, at, pieces };
  }

  // -- what arrives

  /** Takes a message in. `subject` is what follows the name of the room, such as
   * `log.paris`; the server named at its end is the one that published it. */
  receive(subject: string, message: Uint8Array): void {
    if (this.#stopped || this.#bus === null) return;
    const [way, ...names] = subject.split(".");
    const from = names.at(-1)!;
    if (names.length > 2 || !SERVER_NAME.test(from)) {
      return this.#drop("a server", "under a name that cannot be");
    }
    try {
      if (message.length > MESSAGE_BYTES) throw new BrokenMessage("too long");
      this.#read(new Reader(message), from, way === "to");
    } catch (error) {
      // Whatever it is: it must not end the connection, which calls this.
      this.#drop(from, (error as Error).message);
    }
    this.#pumpSoonIfDue();
  }

  #pumpSoonIfDue(): void {
    if (this.#askers.size) this.#pumpSoon();
  }

  #read(reader: Reader, from: string, addressed: boolean): void {
    const { kind, flags, identity } = reader.header();
    if (identity === this.#options.identity) return;
    if (from === this.#options.as) {
      return this.#readOwnName(reader, kind, flags, identity);
    }
    if (this.#claim !== "held") return;
    const now = this.#clock.now();
    if (kind === Kind.Heartbeat) {
      return this.#readHeartbeat(reader, from, identity, flags);
    }
    if (kind === Kind.Ask && addressed) return this.#readAsk(reader, from);
    const peer = this.#peers.get(from);
    // A server is met by its heartbeat; what it says before that, it is asked for.
    if (peer?.identity !== identity || peer.ended) return;
    peer.lastReceived = now;
    if (peer.gone) this.#returned(peer);
    if (kind === Kind.Entries) return this.#readEntries(reader, peer);
    if (addressed) {
      if (kind === Kind.People) return this.#readPeople(reader, peer);
      if (kind === Kind.Tell) return this.#readTell(reader, peer);
      if (kind === Kind.Told) return this.#readTold(reader, peer);
    }
    throw new BrokenMessage("of an unknown kind");
  }

  /** What another one says that has the name of this server. */
  #readOwnName(
    reader: Reader,
    kind: number,
    flags: number,
    identity: string,
  ): void {
    const own = this.#options.identity;
    if (kind === Kind.Claim) {
      // Of two that claim at once it goes to the greater identity.
      const first = this.#claim === "claiming" && own > identity;
      if (this.#claim === "held" || first) {
        this.#publish(
          `to.${this.#options.as}`,
          this.#message(Kind.Held).identity(identity),
        );
      } else if (this.#claim === "claiming") this.#refused();
    } else if (kind === Kind.Held) {
      if (reader.identity() === own && this.#claim === "claiming") {
        this.#refused();
      }
    } else if (flags & GOODBYE) return;
    else if (this.#claim === "claiming") this.#refused();
    else if (this.#claim === "held") {
      const now = this.#clock.now();
      if (now - this.#warnedOfName < 60_000) return;
      this.#warnedOfName = now;
      this.#options.warn(
        `Another server is linked as ${this.#options.as}, too: give one of ` +
          "them another name with --link-as NAME",
      );
    }
  }

  #readHeartbeat(
    reader: Reader,
    from: string,
    identity: string,
    flags: number,
  ): void {
    const next = reader.u48(), lines = reader.u48(), age = reader.u48();
    reader.end();
    if (Boolean(flags & RAW) !== this.#options.raw) {
      throw new BrokenMessage(
        this.#options.raw ? "of a room with names" : "of a raw room",
      );
    }
    const now = this.#clock.now();
    let peer = this.#peers.get(from);
    if (peer && peer.identity !== identity) {
      if (flags & GOODBYE) return;
      peer = this.#meetRival(peer, { identity, since: now, flags, age });
    } else if (!peer) {
      if (flags & GOODBYE) return;
      peer = this.#meet(from, identity, age);
    }
    if (peer?.ended && age > peer.endedAge && !(flags & GOODBYE)) {
      // It goes on: the goodbye was another one's.
      this.#forget(peer);
      peer = this.#meet(from, identity, Infinity);
    }
    if (!peer || peer.ended) return;
    peer.lastReceived = now;
    if (peer.gone) this.#returned(peer);
    if (flags & HELLO) {
      if (now - this.#lastHeartbeat > 100) this.#beat(0);
      else this.#beatSoon = true;
    }
    peer.end = Math.max(peer.end, next);
    if (flags & GOODBYE) return this.#end(peer, lines, age);
    if (!peer.known || peer.next < peer.end) this.#ask(peer);
  }

  /** A server is here for the first time, or again after a new start. One that
   * started after this server was linked is read from its start. */
  #meet(
    name: string,
    identity: string,
    age: number,
    wasHere = false,
  ): Peer | undefined {
    const now = this.#clock.now();
    if (this.#peers.size >= MOST_SERVERS && !this.#forgetGone()) {
      return void this.#drop(
        name,
        `too many: ${MOST_SERVERS} servers are linked`,
      );
    }
    const fromStart = age < now - this.#linkedAt!;
    const peer = new Peer(name, identity, now, fromStart);
    this.#peers.set(name, peer);
    if (fromStart && !wasHere) this.#tellNews("linked", peer);
    return peer;
  }

  /** Another one has the name of `peer`: it takes the place of one that has
   * ended, or does not answer. */
  #meetRival(peer: Peer, rival: Rival): Peer | undefined {
    if (peer.ended || peer.gone) return this.#replace(peer, rival);
    const now = this.#clock.now();
    if (peer.rival === null) {
      peer.rival = rival;
      this.#sendAsk(peer, FROM, peer.next);
    } else if (peer.lastReceived < peer.rival.since) {
      if (now - peer.rival.since >= PLACE_MILLISECONDS) {
        return this.#replace(peer, rival);
      }
      peer.rival.identity = rival.identity;
      peer.rival.age = rival.age + peer.rival.since - now;
    } else {
      peer.rival = now - peer.rival.since > PLACE_MILLISECONDS
        ? null
        : peer.rival;
      this.#drop(peer.name, "of a second server with that name");
    }
  }

  #replace(peer: Peer, rival: Rival): Peer | undefined {
    const wasHere = !peer.gone && !peer.ended;
    if (wasHere) {
      this.#removePeople(peer);
      this.#tellNews("started", peer);
    }
    this.#forget(peer);
    const age = rival.age + this.#clock.now() - rival.since;
    const met = this.#meet(peer.name, rival.identity, age, wasHere);
    if (met) this.#ask(met);
    return met;
  }

  #end(peer: Peer, lines: number, age: number): void {
    if (peer.known) this.#tellLost(peer, lines - peer.lines);
    peer.ended = true;
    peer.endedAge = age;
    this.#removePeople(peer);
    this.#tellNews("stopped", peer);
    this.#peopleElsewhere -= peer.people.size;
    peer.people.clear();
  }

  #gone(peer: Peer): void {
    peer.gone = true;
    peer.snapshot = null;
    this.#removePeople(peer);
    this.#tellNews("gone", peer);
  }

  #returned(peer: Peer): void {
    peer.gone = false;
    for (const [name, away] of peer.people) {
      if (!this.#room.add(`${name}@${peer.name}`, { away })) {
        peer.people.delete(name);
        this.#peopleElsewhere--;
      }
    }
    if (peer.known) this.#tellNews("back", peer);
  }

  /** Takes the people of a server out of the room. They are counted until they
   * are forgotten. */
  #removePeople(peer: Peer): void {
    for (const name of peer.people.keys()) {
      this.#room.remove(`${name}@${peer.name}`);
    }
  }

  #forget(peer: Peer): void {
    this.#peopleElsewhere -= peer.people.size;
    this.#peers.delete(peer.name);
    const outbox = this.#outboxes.get(peer.name);
    if (!outbox) return;
    this.#outboxes.delete(peer.name);
    this.#giveUp(peer.name, outbox.waiting);
  }

  #forgetGone(): boolean {
    for (const peer of this.#peers.values()) {
      if (!peer.gone && !peer.ended) continue;
      this.#forget(peer);
      return true;
    }
    return false;
  }

  // -- entries

  #readEntries(reader: Reader, peer: Peer): void {
    const first = reader.u48(), lines = reader.u48(), count = reader.u32();
    const after = first + count;
    if (after > MOST || count > MESSAGE_BYTES) {
      throw new BrokenMessage("with a number that cannot be");
    }
    peer.end = Math.max(peer.end, after);
    if (!peer.known || after <= peer.next) return;
    if (first > peer.next) return this.#ask(peer);
    let said = lines;
    for (let number = first; number < after; number++) {
      const entry = readEntry(reader);
      if ("count" in entry) said += entry.count;
      if (number < peer.next) continue;
      peer.next = number + 1;
      peer.lines = said;
      this.#apply(peer, entry);
    }
    reader.end();
    peer.snapshot = null;
    peer.asked = 0;
    peer.askDelay = ASK_MILLISECONDS;
    // What is sent again comes in many messages.
    peer.askAgain = peer.next < peer.end
      ? this.#clock.now() + ASK_MILLISECONDS
      : 0;
  }

  #apply(peer: Peer, entry: ReturnType<typeof readEntry>): void {
    const { name } = entry, full = `${name}@${peer.name}`, { people } = peer;
    // An operator opens and closes the console without a word.
    const announce = name !== HOST;
    switch (entry.type) {
      case Type.Said:
      case Type.Action: {
        const action = entry.type === Type.Action;
        if (this.#options.raw) {
          if (name !== "") throw new BrokenMessage("with a name in a raw room");
          return this.#room.say("", entry.lines, { action });
        }
        if (!people.has(name) && name !== HOST) {
          return this.#drop(peer.name, "of a person who is not there");
        }
        return this.#room.say(full, entry.lines, { action });
      }
      case Type.Joined:
        return void this.#addPerson(peer, name, null, announce);
      case Type.Left:
        if (!this.#removePerson(peer, name)) return;
        return this.#room.remove(full, {
          reason: clean(entry.reason),
          announce,
        });
      case Type.Renamed: {
        const away = people.get(name);
        if (away === undefined || name === entry.to) return;
        const to = `${entry.to}@${peer.name}`;
        const good = isName(entry.to) && !people.has(entry.to) &&
          this.#room.rename(full, to);
        people.delete(name);
        if (good) return void people.set(entry.to, away);
        this.#peopleElsewhere--;
        this.#room.remove(full, { announce: true });
        return this.#drop(peer.name, "with a name that cannot be");
      }
      case Type.Away:
        if (people.has(name)) this.#setAway(peer, name, entry.away);
    }
  }

  #addPerson(
    peer: Peer,
    name: string,
    away: string | null,
    announce: boolean,
  ): boolean {
    const { people } = peer;
    if (people.has(name)) return true;
    const full = this.#peopleElsewhere >= MOST_PEOPLE_IN_ALL;
    if (people.size >= MOST_PEOPLE || (full && !this.#forgetGone())) {
      this.#drop(peer.name, "of more people than there can be");
      return false;
    }
    if (away !== null) away = clean(away);
    if (
      !isName(name) || this.#options.raw ||
      !this.#room.add(`${name}@${peer.name}`, { announce, away })
    ) {
      this.#drop(peer.name, "with a name that cannot be");
      return false;
    }
    people.set(name, away);
    this.#peopleElsewhere++;
    return true;
  }

  #removePerson(peer: Peer, name: string): boolean {
    if (!peer.people.delete(name)) return false;
    this.#peopleElsewhere--;
    return true;
  }

  #setAway(peer: Peer, name: string, away: string | null): void {
    if (away !== null) away = clean(away);
    if (peer.people.get(name) === away) return;
    peer.people.set(name, away);
    this.#room.setAway(`${name}@${peer.name}`, away);
  }

  #readPeople(reader: Reader, peer: Peer): void {
    const at = reader.u48(), lines = reader.u48();
    const piece = reader.u32(), pieces = reader.u32();
    if (piece >= pieces) {
      throw new BrokenMessage("with a number that cannot be");
    }
    // Nothing was asked for, or it came late.
    const givenUp = this.#givesUp(peer);
    if (peer.known && (at < peer.next || (at === peer.next && !givenUp))) {
      return;
    }
    if (piece === 0) peer.snapshot = { at, piece: 0, seen: new Set() };
    const { snapshot } = peer;
    if (snapshot?.at !== at || snapshot.piece !== piece) return;
    const now = this.#clock.now();
    peer.askAgain = now + ASK_MILLISECONDS * 4;
    while (!reader.ended) {
      const name = reader.string(), away = reader.away();
      if (!this.#addPerson(peer, name, away, false)) continue;
      this.#setAway(peer, name, away);
      snapshot.seen.add(name);
    }
    if (++snapshot.piece < pieces) return;
    peer.snapshot = null;
    for (const name of peer.people.keys()) {
      if (snapshot.seen.has(name)) continue;
      this.#removePerson(peer, name);
      this.#room.remove(`${name}@${peer.name}`);
    }
    if (peer.known) this.#tellLost(peer, lines - peer.lines);
    else this.#tellNews("linked", peer);
    // A number that was made up is forgotten here.
    peer.end = givenUp ? at : Math.max(peer.end, at);
    Object.assign(peer, { known: true, next: at, lines });
    Object.assign(peer, { asked: 0, askDelay: ASK_MILLISECONDS, askAgain: 0 });
  }

  /** Asks for what is missing, unless the answer may still come. */
  #ask(peer: Peer): void {
    const now = this.#clock.now();
    if (now < peer.askAgain || this.#bus === null) return;
    // Only what it could have answered counts.
    if (peer.asked === 0) peer.askedSince = now;
    if (peer.asked === 0 || peer.lastReceived > peer.askedWhen) peer.asked++;
    const giveUp = this.#givesUp(peer);
    peer.askedWhen = now;
    peer.askAgain = now + peer.askDelay;
    peer.askDelay = Math.min(2 * peer.askDelay, MOST_ASK_MILLISECONDS);
    this.#sendAsk(peer, !peer.known || giveUp ? NOW : FROM, peer.next);
  }

  #givesUp(peer: Peer): boolean {
    return peer.asked > MOST_ASKED &&
      this.#clock.now() - peer.askedSince > GIVE_UP_MILLISECONDS;
  }

  #sendAsk(peer: Peer, mode: number, from: number): void {
    this.#publish(
      `to.${peer.name}`,
      this.#message(Kind.Ask).identity(peer.identity).u8(mode).u48(from),
    );
  }

  #readAsk(reader: Reader, from: string): void {
    const asked = reader.identity(), mode = reader.u8(), number = reader.u48();
    reader.end();
    // It asks for one that was here before, or whether that one is still there.
    if (asked !== this.#options.identity || number === this.#sent.number) {
      this.#beat(0);
      if (asked !== this.#options.identity || mode === FROM) return;
    }
    if (!this.#askers.has(from) && this.#askers.size >= MOST_SERVERS) return;
    const asker = this.#newAsker(mode, number);
    if (asker) this.#askers.set(from, asker);
    else throw new BrokenMessage("with a number that cannot be");
  }

  // -- private messages

  #tell(server: string, outbox: Outbox, message: Outbox["waiting"][0]): void {
    const { number, from, to, text } = message;
    this.#publish(
      `to.${server}`,
      this.#message(Kind.Tell).identity(outbox.identity).u48(number)
        .u48(outbox.waiting[0].number).string(from).string(to).text(text),
    );
  }

  /** Private messages arrive in their order, and once. */
  #readTell(reader: Reader, peer: Peer): void {
    const identity = reader.identity(), number = reader.u48();
    const first = reader.u48();
    const from = reader.string(), to = reader.string(), text = reader.text();
    reader.end();
    if (identity !== this.#options.identity) return;
    if (number > peer.told) {
      if (number !== peer.told + 1 && number !== first) return;
      // Somebody who is there comes in an entry that is still to come.
      if (from !== HOST && !peer.people.has(from)) return;
      const delivered = this.#room.tell(
        `${from}@${peer.name}`,
        to,
        clean(text),
      );
      peer.told = number;
      peer.answers.set(number, delivered ? DELIVERED : NOBODY);
      peer.answers.delete(number - MOST_TOLD);
    }
    const answer = peer.answers.get(number) ?? DELIVERED;
    this.#publish(
      `to.${peer.name}`,
      this.#message(Kind.Told).identity(peer.identity).u48(number).u8(answer),
    );
  }

  #readTold(reader: Reader, peer: Peer): void {
    const identity = reader.identity(), number = reader.u48();
    const answer = reader.u8();
    reader.end();
    const outbox = this.#outboxes.get(peer.name);
    if (identity !== this.#options.identity || !outbox) return;
    const index = outbox.waiting.findIndex((it) => it.number === number);
    if (index < 0) return;
    const [{ from, to }] = outbox.waiting.splice(index, 1);
    if (answer === NOBODY) {
      this.#room.answer(from, `${to}@${peer.name} is not here.`);
    }
  }

  #giveUp(server: string, messages: Outbox["waiting"]): void {
    for (const { from, to } of messages) {
      this.#room.answer(
        from,
        `Your message to ${to}@${server} may be lost: ${server} did not answer.`,
      );
    }
  }

  #sendAgain(server: string, outbox: Outbox, now: number): void {
    const late = outbox.waiting.findIndex((it) =>
      now - it.since < MOST_TELL_MILLISECONDS
    );
    this.#giveUp(
      server,
      outbox.waiting.splice(0, late < 0 ? outbox.waiting.length : late),
    );
    if (now - outbox.sent < TELL_MILLISECONDS) return;
    outbox.sent = now;
    for (const message of outbox.waiting) this.#tell(server, outbox, message);
  }

  // -- the time

  #tick = (): void => {
    this.#stopTick = this.#clock.after(TICK_MILLISECONDS, this.#tick);
    const now = this.#clock.now();
    // This process did not run: the others did not fall silent.
    const slept = now - this.#lastTick - TICK_MILLISECONDS;
    this.#lastTick = now;
    if (slept > 2_000) {
      for (const peer of this.#peers.values()) peer.lastReceived += slept;
      // To the others this one was gone, and another may have its name.
      const wasGone = slept > SILENT_MILLISECONDS && this.#claim === "held";
      if (wasGone && this.#bus) this.#claimName();
    }
    for (const peer of this.#peers.values()) {
      if (peer.gone || peer.ended) continue;
      if (now - peer.lastReceived >= SILENT_MILLISECONDS) this.#gone(peer);
      else if (peer.rival && peer.lastReceived < peer.rival.since) {
        if (now - peer.rival.since >= PLACE_MILLISECONDS && this.#bus) {
          this.#replace(peer, peer.rival);
        }
      } else if (!peer.known || peer.next < peer.end) this.#ask(peer);
    }
    for (const [server, outbox] of this.#outboxes) {
      this.#sendAgain(server, outbox, now);
    }
    this.#flushNews();
    this.#flushDropped();
    if (this.#bus === null) return;
    const since = now - this.#claimed;
    if (this.#claim === "claiming" && since >= CLAIM_MILLISECONDS) {
      this.#begin();
    }
    if (this.#claim === "refused" && since >= CLAIM_AGAIN_MILLISECONDS) {
      this.#claimName();
    }
    if (this.#claim !== "held") return;
    if (this.#beatSoon) this.#beat(0);
    if (now - this.#lastHeartbeat >= HEARTBEAT_MILLISECONDS) {
      this.#beat(0);
      this.#confirm();
    }
    this.#pump();
  };

  // -- what is told

  #tellNews(what: string, peer: Peer): void {
    const news = { name: peer.name, people: peer.people.size };
    this.#news.set(what, [...this.#news.get(what) ?? [], news]);
    this.#flushNews();
  }

  #tellLost(peer: Peer, lines: number): void {
    if (lines <= 0) return;
    this.#lost.set(peer.name, (this.#lost.get(peer.name) ?? 0) + lines);
    this.#flushNews();
  }

  /** At most once a second: many servers come back at once. */
  #flushNews(): void {
    const now = this.#clock.now();
    if (this.#news.size + this.#lost.size === 0) return;
    if (now - this.#lastNews < 1_000) return;
    this.#lastNews = now;
    const news = this.#news;
    this.#news = new Map();
    for (const [what, servers] of news) {
      this.#room.notice(describe(what, servers));
    }
    for (const [name, lines] of this.#lost) {
      this.#room.notice(
        lines === 1
          ? `1 line from ${name} was lost`
          : `${lines} lines from ${name} were lost`,
      );
    }
    this.#lost.clear();
  }

  #drop(from: string, what: string): void {
    this.#dropped.count++;
    this.#dropped.what = `from ${from}: it was ${what}`;
    this.#flushDropped();
  }

  #flushDropped(): void {
    const now = this.#clock.now(), { count, what } = this.#dropped;
    if (count === 0 || now - this.#lastDropped < 1_000) return;
    this.#lastDropped = now;
    this.#dropped = { count: 0, what: "" };
    this.#options.warn(
      count === 1
        ? `Dropped a message of the link ${what}`
        : `Dropped ${count} messages of the link, the last ${what}`,
    );
  }
}

function isName(name: string): boolean {
  return NAME.test(name) && name.normalize("NFKC") === name;
}

function clean(text: string): string {
  return text.replace(CONTROLS, "");
}

/** A server to which something happened, and how many people are there. */
interface News {
  name: string;
  people: number;
}

/** One line about what happened to servers. */
function describe(what: string, servers: News[]): string {
  const names = servers.slice(0, 5).map(({ name }) => name).join(", ");
  const more = servers.length > 5 ? ` and ${servers.length - 5} more` : "";
  const people = servers.reduce((sum, { people }) => sum + people, 0);
  const is = servers.length === 1 ? "is" : "are";
  const has = servers.length === 1 ? "has" : "have";
  const verb = {
    linked: `${is} linked`,
    back: `${is} linked again`,
    gone: `${is} gone`,
    stopped: `${has} stopped`,
    started: `${has} started again`,
  }[what];
  const moved = what === "linked" || what === "back" ? "entered" : "left";
  const crowd = people === 0
    ? ""
    : people === 1
    ? `: 1 person has ${moved}`
    : `: ${people} people have ${moved}`;
  return `${names}${more} ${verb}${crowd}`;
}
