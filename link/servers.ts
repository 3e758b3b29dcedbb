/**
 * The other servers of a room, and which process each name belongs to.
 *
 * @module
 */
import { Peer, type Shared } from "./peer.ts";
import { BrokenMessage, GOODBYE, HELLO, RAW, type Reader } from "./wire.ts";

/** Bounds on what others can have this server keep. */
const MAX_SERVERS = 256;
const MAX_PEOPLE_ELSEWHERE = 2 ** 20;

/** A server from which nothing has come for so long is gone: three heartbeats. */
export const SILENT_MILLISECONDS = 15_000;

/** After a connection, other servers have at least so long before they are
 * gone. */
const RECONNECTED_MILLISECONDS = 10_000;

/** How long a server must leave a question unanswered before another process
 * may take over its name. */
const TAKE_OVER_MILLISECONDS = 1_500;

export class Servers {
  readonly #shared: Shared;
  readonly #peers = new Map<string, Peer>();
  /** When this server was first linked. */
  #linkedAt: number | null = null;

  /** @param shared without `hasPlace`, which is decided here */
  constructor(shared: Omit<Shared, "hasPlace">) {
    this.#shared = { ...shared, hasPlace: () => this.#hasPlace() };
  }

  #now(): number {
    return this.#shared.options.clock.now();
  }

  get(name: string): Peer | undefined {
    return this.#peers.get(name);
  }

  /** This server is linked from now on, for the first time or again. Nothing can
   * have come from the others before. */
  linked(): void {
    const now = this.#now();
    this.#linkedAt ??= now;
    const earliest = now - SILENT_MILLISECONDS + RECONNECTED_MILLISECONDS;
    for (const peer of this.#peers.values()) {
      if (peer.state !== "silent") {
        peer.lastReceived = Math.max(peer.lastReceived, earliest);
      }
      peer.resetAsking();
    }
  }

  /** This process did not run for a while: the others did not fall silent. */
  slept(milliseconds: number): void {
    const now = this.#now();
    for (const peer of this.#peers.values()) {
      peer.lastReceived = Math.min(now, peer.lastReceived + milliseconds);
    }
  }

  tick(): void {
    const now = this.#now(), { publisher } = this.#shared;
    for (const peer of this.#peers.values()) {
      peer.privateMessages.resend(now);
      if (peer.state !== "linked") continue;
      if (now - peer.lastReceived >= SILENT_MILLISECONDS) peer.fellSilent();
      else if (!peer.isChallenged) {
        if (peer.isBehind) peer.ask();
      } else if (
        publisher.isConnected &&
        now - peer.rival!.since >= TAKE_OVER_MILLISECONDS
      ) this.#replace(peer, peer.rival!.identity, peer.rival!.startedAt);
    }
  }

  readHeartbeat(
    reader: Reader,
    from: string,
    identity: string,
    flags: number,
  ): void {
    const { options, publisher } = this.#shared;
    const end = reader.u48(), lines = reader.u48(), age = reader.u48();
    reader.end();
    if (Boolean(flags & RAW) !== options.raw) {
      throw new BrokenMessage(
        options.raw ? "of a room with names" : "of a raw room",
      );
    }
    const isGoodbye = Boolean(flags & GOODBYE);
    const peer = this.#peerOf(from, identity, age, isGoodbye);
    if (!peer) return;
    peer.received();
    if (flags & HELLO) publisher.answerHello();
    peer.hasEntries(end);
    if (isGoodbye) peer.stopped(lines, age);
    else if (peer.isBehind) peer.ask();
  }

  /** The server that a heartbeat comes from, unless its word is not taken. */
  #peerOf(
    name: string,
    identity: string,
    age: number,
    isGoodbye: boolean,
  ): Peer | undefined {
    const peer = this.#peers.get(name), startedAt = this.#now() - age;
    if (peer?.identity !== identity) {
      if (isGoodbye) return;
      if (!peer) return this.#meet(name, identity, startedAt);
      return this.#challenge(peer, identity, startedAt);
    }
    if (peer.state !== "stopped") return peer;
    if (isGoodbye || age <= peer.stoppedAge) return; // it came late
    // It still runs: another process sent the goodbye.
    this.#forget(peer);
    return this.#meet(name, identity, -Infinity);
  }

  /** Adds a server. One that started after this server was linked has sent all
   * of its log here, and is read from the first entry on. */
  #meet(
    name: string,
    identity: string,
    startedAt: number,
    isAnnounced = false,
  ): Peer | undefined {
    if (this.#peers.size >= MAX_SERVERS && !this.#forgetOne()) {
      const what = `too many: ${MAX_SERVERS} servers are linked`;
      return void this.#shared.report.dropped(name, what);
    }
    const fromStart = startedAt > this.#linkedAt!;
    const peer = new Peer(this.#shared, name, identity, fromStart);
    this.#peers.set(name, peer);
    if (!isAnnounced) peer.tell("linked");
    return peer;
  }

  /** Another process uses the name of a server. If that server is still there, it
   * keeps the name; it is asked, and `tick` looks whether it has answered. */
  #challenge(
    peer: Peer,
    identity: string,
    startedAt: number,
  ): Peer | undefined {
    if (peer.state !== "linked") {
      return this.#replace(peer, identity, startedAt);
    }
    const now = this.#now();
    if (peer.rival === null) {
      peer.rival = { identity, startedAt, since: now };
      peer.probe();
    } else if (peer.isChallenged) {
      Object.assign(peer.rival, { identity, startedAt });
    } else {
      // It has answered. Later it is asked anew: it may have crashed since.
      if (now - peer.rival.since > TAKE_OVER_MILLISECONDS) peer.rival = null;
      this.#shared.report.dropped(
        peer.name,
        "of a second server with that name",
      );
    }
  }

  #replace(
    peer: Peer,
    identity: string,
    startedAt: number,
  ): Peer | undefined {
    const wasLinked = peer.state === "linked";
    this.#forget(peer);
    if (wasLinked) peer.tell("started");
    const next = this.#meet(
      peer.name,
      identity,
      startedAt,
      wasLinked && peer.isKnown,
    );
    next?.ask();
    return next;
  }

  #forget(peer: Peer): void {
    this.#peers.delete(peer.name);
    peer.removePeople();
    peer.privateMessages.giveUp();
  }

  /** Forgets a server that is not linked any more. `false` if there is none. */
  #forgetOne(): boolean {
    for (const peer of this.#peers.values()) {
      if (peer.state === "linked") continue;
      this.#forget(peer);
      return true;
    }
    return false;
  }

  #hasPlace(): boolean {
    let people = 0;
    for (const peer of this.#peers.values()) people += peer.people.size;
    return people < MAX_PEOPLE_ELSEWHERE || this.#forgetOne();
  }
}
