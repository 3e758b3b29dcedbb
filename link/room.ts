/**
 * One server's part in a room that many share. It knows neither NATS nor the
 * system's clock, so that a simulation can run it.
 *
 * What the servers send each other, and why, is at the top of `link.ts`.
 *
 * @module
 */
import type { Attachable, Attachment, LinkEvents } from "./attachment.ts";
import { Log } from "./log.ts";
import { NameClaim, SERVER_NAME } from "./name.ts";
import { type Bus, Publisher, type PublisherOptions } from "./publisher.ts";
import { Report } from "./report.ts";
import { Servers, SILENT_MILLISECONDS } from "./servers.ts";
import {
  BrokenMessage,
  GOODBYE,
  HELLO,
  Kind,
  MESSAGE_BYTES,
  Reader,
} from "./wire.ts";

export type { Bus, Clock } from "./publisher.ts";

/** What a linked room is made with. */
export interface RoomOptions extends PublisherOptions {
  /** Receives lines for the operator. */
  warn: (line: string) => void;
  /** How many bytes of the log are kept to be sent again; by default 4 MiB. */
  window?: number;
  /** Called with `true` when this server takes part, after each connection; with
   * `false` when another server has its name, after each attempt. */
  claimed?: (isHeld: boolean) => void;
  /** Called once, when the link has ended. */
  ended?: () => void;
}

/** How long a server that stops waits until the rest of its log is sent; the
 * chat server waits for a second. */
const GOODBYE_MILLISECONDS = 900;

/** How often it looks whether the rest of its log is sent. */
const DRAIN_MILLISECONDS = 10;

/** How often deadlines are looked at. */
const TICK_MILLISECONDS = 250;

/** A tick so much too late means that the process did not run. */
const SLEPT_MILLISECONDS = 2_000;

export class LinkedRoom implements LinkEvents {
  readonly #options: RoomOptions;
  readonly #room: Attachment;
  readonly #log: Log;
  readonly #publisher: Publisher;
  readonly #name: NameClaim;
  readonly #report: Report;
  readonly #servers: Servers;
  #isStopped = false;
  #cancelTick: () => void;
  #lastTick: number;
  #disconnectedAt = 0;

  /** Attaches to `server`. The room is linked as soon as {@linkcode connected} is
   * called. */
  constructor(server: Attachable, options: RoomOptions) {
    const { clock, warn } = options;
    this.#options = options;
    this.#log = new Log(options.window);
    const publisher = this.#publisher = new Publisher(
      this.#log,
      options,
      () => this.#name.isHeld,
    );
    this.#name = new NameClaim(options, publisher, (isHeld) => {
      if (isHeld) this.#takePart();
      else this.#options.claimed?.(false);
    });
    const room = this.#room = server.attach(this, { name: options.as });
    for (const { name, away } of room.people()) this.#log.join(name, away);
    const notice = (line: string) => room.notice(line);
    const report = this.#report = new Report(clock.now, notice, warn);
    this.#servers = new Servers({ options, room, publisher, report });
    this.#lastTick = clock.now();
    this.#cancelTick = clock.after(TICK_MILLISECONDS, this.#tick);
  }

  // -- events of the chat server

  said(name: string, lines: Uint8Array, action: boolean): void {
    this.#log.say(name, lines, action);
    this.#publisher.schedule();
  }

  joined(name: string): void {
    this.#log.join(name, null);
    this.#publisher.schedule();
  }

  left(name: string, reason: string): void {
    this.#log.leave(name, reason);
    this.#publisher.schedule();
  }

  renamed(from: string, to: string): void {
    this.#log.rename(from, to);
    this.#publisher.schedule();
  }

  away(name: string, reason: string | null): void {
    this.#log.setAway(name, reason);
    this.#publisher.schedule();
  }

  toldPrivately(from: string, to: string, text: string): void {
    const at = to.lastIndexOf("@");
    const peer = this.#servers.get(to.slice(at + 1));
    if (peer?.state !== "linked") {
      return this.#room.answer(from, `${to} is not here.`);
    }
    peer.privateMessages.send(from, to.slice(0, at), text);
  }

  /** Sends the rest of the log and a goodbye, for at most 0.9 s, and then
   * {@linkcode stop}s. */
  async stopping(): Promise<void> {
    if (this.#isStopped) return;
    const done = Promise.withResolvers<void>();
    const { clock } = this.#options, publisher = this.#publisher;
    const drain = () => {
      if (!publisher.isConnected || !this.#name.isHeld) return done.resolve();
      publisher.pump();
      if (!publisher.isDone) return void clock.after(DRAIN_MILLISECONDS, drain);
      publisher.heartbeat(GOODBYE);
      publisher.confirmed(done.resolve);
    };
    const cancel = clock.after(GOODBYE_MILLISECONDS, done.resolve);
    drain();
    await done.promise;
    cancel();
    this.stop();
  }

  /** Ends at once. The people from elsewhere leave the room. */
  stop(): void {
    if (this.#isStopped) return;
    this.#isStopped = true;
    this.#cancelTick();
    this.#publisher.disconnected();
    this.#room.detach();
    this.#options.ended?.();
  }

  /** Shows a line to everyone in the room. */
  notice(text: string): void {
    if (!this.#isStopped) this.#room.notice(text);
  }

  // -- the connection

  /** There is a connection to the bus. */
  connected(bus: Bus): void {
    this.#publisher.connected(bus);
    const absence = this.#options.clock.now() - this.#disconnectedAt;
    if (this.#name.isHeld && absence < SILENT_MILLISECONDS) this.#takePart();
    else this.#name.claim();
  }

  /** The connection is lost. */
  disconnected(): void {
    if (!this.#publisher.isConnected) return;
    this.#publisher.disconnected();
    this.#name.disconnected();
    this.#disconnectedAt = this.#options.clock.now();
  }

  #takePart(): void {
    this.#servers.linked();
    this.#publisher.heartbeat(HELLO);
    this.#publisher.pump();
    this.#options.claimed?.(true);
  }

  // -- messages

  /** Handles a message of another server.
   *
   * @param subject after the name of the room, such as `log.paris`; the last word
   * is the server that published it */
  receive(subject: string, message: Uint8Array): void {
    if (this.#isStopped || !this.#publisher.isConnected) return;
    const [kind, ...names] = subject.split(".");
    const from = names.at(-1) ?? "";
    if (names.length > 2 || !SERVER_NAME.test(from)) {
      return this.#report.dropped("a server", "under an invalid name");
    }
    try {
      if (message.length > MESSAGE_BYTES) throw new BrokenMessage("too long");
      this.#read(new Reader(message), from, kind === "to");
    } catch (error) {
      // Any error: it would end the connection, whose reader calls this.
      this.#report.dropped(from, (error as Error).message);
    }
  }

  #read(reader: Reader, from: string, isForUs: boolean): void {
    const { kind, flags, identity } = reader.header();
    if (identity === this.#options.identity) return;
    if (from === this.#options.as) {
      return this.#name.read(reader, kind, flags, identity);
    }
    if (!this.#name.isHeld) return;
    if (kind === Kind.Heartbeat) {
      return this.#servers.readHeartbeat(reader, from, identity, flags);
    }
    if (kind === Kind.Ask && isForUs) {
      return this.#publisher.readAsk(reader, from);
    }
    const peer = this.#servers.get(from);
    // A server is known from its first heartbeat on; what it said before that is
    // asked for.
    if (peer?.identity !== identity || peer.state === "stopped") return;
    peer.received();
    if (kind === Kind.Entries) return peer.readEntries(reader);
    if (isForUs) {
      if (kind === Kind.People) return peer.readPeople(reader);
      if (kind === Kind.Tell) return peer.privateMessages.read(reader);
      if (kind === Kind.Told) return peer.privateMessages.readAnswer(reader);
    }
    throw new BrokenMessage("of an unknown kind");
  }

  // -- deadlines

  #tick = (): void => {
    const { clock } = this.#options, now = clock.now();
    this.#cancelTick = clock.after(TICK_MILLISECONDS, this.#tick);
    const slept = now - this.#lastTick - TICK_MILLISECONDS;
    this.#lastTick = now;
    if (slept > SLEPT_MILLISECONDS) this.#slept(slept);
    this.#servers.tick();
    this.#report.flush();
    if (!this.#publisher.isConnected) return;
    this.#name.tick();
    if (this.#name.isHeld) this.#publisher.tick();
  };

  /** This process did not run, as on a laptop that was closed. */
  #slept(milliseconds: number): void {
    this.#servers.slept(milliseconds);
    // For the others this server was gone, and another may have its name now.
    const wasGone = milliseconds > SILENT_MILLISECONDS;
    if (wasGone && this.#name.isHeld) this.#name.claim();
  }
}
