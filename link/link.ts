/**
 * Several servers, one room, over [NATS](https://nats.io).
 *
 * ```sh
 * nats-server &
 * deno run --allow-net main.ts --port 8008 --link nats://127.0.0.1 --link-as tokyo
 * deno run --allow-net main.ts --port 8009 --link nats://127.0.0.1 --link-as paris
 * ```
 *
 * A person of tokyo is `alice@tokyo` in paris. Each server has a log of what
 * happens on it (lines, and people who join, leave, change their name or are
 * away), in which the entries are numbered; the others are cursors into it.
 *
 * `room.ts` is the protocol, which knows neither NATS nor the time; `log.ts` what
 * a server said; `wire.ts` the bytes; `transport.ts` the connection.
 *
 * **Subjects.** In a room called `parley`:
 *
 * - `parley.parley.log.tokyo`: tokyo's log and heartbeats, to everyone
 * - `parley.parley.to.paris.tokyo`: what tokyo sends to paris alone
 *
 * The publisher is the last word of each, so NATS can bind a name to a user:
 * tokyo may publish `parley.ROOM.log.tokyo` and `parley.ROOM.to.*.tokyo`, and
 * subscribe to `parley.ROOM.log.*` and `parley.ROOM.to.tokyo.*`. Without that,
 * anyone who may use the bus can speak for any server.
 *
 * **Messages** are binary (`wire.ts`), of at most 64 KiB, and bear the identity
 * of their sender: 8 random bytes a start.
 *
 * - _Entries_: as many as there are at the end of a turn of the event loop, with
 *   the number of the first, and of the lines before it. A receiver takes them in
 *   the order of their numbers, and each once.
 * - _Heartbeat_, every 5 s and after a (re)connection: how far the log goes, so
 *   that a lost end is noticed; and for how long the server has been running.
 * - _Ask_: a receiver that misses something asks for the log from a number on. It
 *   is sent again to that server; to all, if several ask. The last 4 MiB are
 *   kept. To one that needs what was dropped, the people at the start of what is
 *   kept are sent, and then the entries; the lines between are counted and told:
 *   `* 312 lines from tokyo were lost`. A server that has just started asks for
 *   the people of now. One that started while this server was linked is read
 *   from its first entry.
 * - _Tell_ and _told_: a private message, and whether that person is there.
 *   It is sent each second until it is answered, for 15 s; in order, and once.
 * - _Claim_ and _held_: before it takes part, a server claims its name for
 *   0.75 s. The holder objects, and the newcomer is refused. Where the holder has
 *   crashed nobody objects. The others believe a new identity when the old one
 *   has said goodbye, or does not answer for 1.5 s.
 *
 * A server that is silent for 15 s is gone, and its people leave. What was known
 * of it is kept: if it was only out of reach, it goes on where it was.
 *
 * **Bounds.** At most 1 MiB is on its way to NATS, and what cannot be sent waits
 * in the log. Others can have this server keep 256 servers, 65,536 people of
 * each, and 1,048,576 in all. What breaks the format, a name that is none, a
 * person who is not there, a second identity: the message is dropped, and the
 * operator is told, at most once a second. The room cleans and cuts what comes
 * like any client's lines.
 *
 * @module
 */
import type * as Nats from "./nats.ts";
import type { Attachable } from "./attachment.ts";
import { SERVER_NAME } from "./name.ts";
import { type Bus, type Clock, LinkedRoom } from "./room.ts";
import { DenoTransport } from "./transport.ts";
import { MESSAGE_BYTES } from "./wire.ts";

export type { Attachable, Attachment, LinkEvents } from "./attachment.ts";

/** The NATS client, as in `nats.ts`, which says why. */
const NATS_CLIENT = "npm:@nats-io/nats-core@3.4.0/internal";

/** What can be set of a link. */
export interface LinkOptions {
  /** NATS servers, such as `nats://user:password@host:4222`, `nats://token@host`
   * or `tls://host`; the first that answers is used. */
  servers: string[];
  /** The name of this server: 1 to 24 letters, digits, `_` or `-`. By default
   * four random letters. */
  as?: string;
  /** The name of the room, after the same rule; by default `parley`. */
  room?: string;
  /** The contents of a NATS credentials file. */
  creds?: string;
  /** Whether the room relays lines without names. */
  raw?: boolean;
  /** Receives what the operator should know, in lines. */
  warn?: (line: string) => void;
  /** Receives what goes well, in lines. */
  print?: (line: string) => void;
}

/** A room that is linked. */
export interface Link {
  /** The name of this server. */
  readonly as: string;
  /** Says goodbye to the others, and ends the link; takes at most a second. */
  stop(): Promise<void>;
}

/** Thrown if a link cannot be made with these options. */
export class LinkError extends Error {
  /** The name of the class. */
  override name = "LinkError";
}

/** How long a connection to NATS may take to be made, and how long an answer. */
const CONNECT_MILLISECONDS = 5_000;
const STALLED_MILLISECONDS = 15_000;

/** The pause between two attempts: doubled each time, until a connection lasts. */
const FIRST_PAUSE_MILLISECONDS = 100, MOST_PAUSE_MILLISECONDS = 5_000;
const STABLE_MILLISECONDS = 10_000;

/** How often the same complaint of NATS is told. */
const COMPLAINT_MILLISECONDS = 60_000;

/**
 * Links the room of `server` with the rooms of other servers.
 *
 * If NATS cannot be reached, the operator is warned, and the room is linked as
 * soon as it can be.
 *
 * @param server a chat server, which is attached to
 * @returns the link, when it is made or NATS cannot be reached
 * @throws {LinkError} if an option is wrong, another server has the name, or the
 * NATS client cannot be loaded
 *
 * @example
 * ```ts ignore
 * const link = await linkRoom(server, {
 *   servers: ["nats://127.0.0.1:4222"],
 *   as: "tokyo",
 * });
 * ```
 */
export async function linkRoom(
  server: Attachable,
  options: LinkOptions,
): Promise<Link> {
  const settings = checkOptions(options);
  let nats: typeof Nats;
  try {
    nats = await import(NATS_CLIENT);
    nats.setTransportFactory({ factory: () => new DenoTransport() });
  } catch (error) {
    throw new LinkError(
      `Cannot load the NATS client: ${(error as Error).message}`,
    );
  }
  const link = new NatsLink(nats, server, settings);
  await link.started;
  return link;
}

/** One NATS server and how to be let in. */
interface Target {
  /** Host and port: all of the URL that is ever shown. */
  address: string;
  options: Nats.ConnectionOptions;
}

/** Options that were checked. */
interface Settings extends Required<Omit<LinkOptions, "servers" | "creds">> {
  targets: Target[];
  creds?: Uint8Array;
}

function checkOptions(options: LinkOptions): Settings {
  const { servers, as = randomLetters(), room = "parley", creds } = options;
  checkName(as, "link-as");
  checkName(room, "link-room");
  if (!servers.length) throw new LinkError("Cannot link: give a NATS server");
  if (
    creds !== undefined &&
    !/BEGIN NATS USER JWT.*BEGIN USER NKEY SEED/s.test(creds)
  ) {
    throw new LinkError(
      "Cannot use --link-creds: it is not a NATS credentials file",
    );
  }
  return {
    targets: servers.map(parseTarget),
    as,
    room,
    creds: creds === undefined ? creds : new TextEncoder().encode(creds),
    raw: options.raw ?? false,
    warn: options.warn ?? console.error,
    print: options.print ?? (() => {}),
  };
}

function parseTarget(text: string): Target {
  const url = URL.parse(text);
  // A part before the last @ may be a password.
  const shown = text.slice(text.lastIndexOf("@") + 1);
  const isNats = url && /^(nats|tls):$/.test(url.protocol) && url.hostname;
  if (!isNats || !/^\/?$/.test(url.pathname)) {
    throw new LinkError(
      `Cannot link through ${shown}: give a URL, such as nats://127.0.0.1:4222`,
    );
  }
  const address = `${url.hostname}:${url.port || 4222}`;
  const options: Nats.ConnectionOptions = { servers: [address] };
  if (url.protocol === "tls:") options.tls = {};
  let user, pass;
  try {
    user = decodeURIComponent(url.username);
    pass = decodeURIComponent(url.password);
  } catch {
    throw new LinkError(
      `Cannot link through ${shown}: write % in a password as %25`,
    );
  }
  if (pass) Object.assign(options, { user, pass });
  else if (user) options.token = user;
  return { address, options };
}

function checkName(name: string, option: string): void {
  if (SERVER_NAME.test(name)) return;
  throw new LinkError(
    `Cannot use ${name} for --${option}: give 1 to 24 letters, digits, _ or -`,
  );
}

function randomLetters(): string {
  return String.fromCharCode(
    ...crypto.getRandomValues(new Uint8Array(4)).map((it) => 97 + it % 26),
  );
}

function randomIdentity(): string {
  return Array.from(
    crypto.getRandomValues(new Uint8Array(8)),
    (byte) => byte.toString(16).padStart(2, "0"),
  ).join("");
}

const clock: Clock = {
  now: () => performance.now(),
  soon: setImmediate,
  after(milliseconds, then) {
    const timer = setTimeout(then, milliseconds);
    return () => clearTimeout(timer);
  },
};

/** The connections to NATS, one after another, of one room. */
class NatsLink implements Link {
  readonly as: string;
  /** Resolves when the link is made, or NATS cannot be reached. */
  readonly started: Promise<void>;
  readonly #nats: typeof Nats;
  readonly #settings: Settings;
  /** What all subjects of the room begin with. */
  readonly #subject: string;
  readonly #room: LinkedRoom;
  readonly #start = Promise.withResolvers<void>();
  #connection: Nats.NatsConnection | null = null;
  /** Ends the pause between two attempts. */
  #wake: () => void = () => {};
  #stopped = false;
  /** Host and port of the NATS server in use. */
  #address = "";
  /** Whether this server took part, and whether it was told that it does not. */
  #linkedOnce = false;
  #warned = false;
  /** Whether it was told that another server has the name. */
  #refused = false;
  /** Whether the caller of `linkRoom` goes on. */
  #settled = false;
  #complained = -Infinity;

  constructor(nats: typeof Nats, server: Attachable, settings: Settings) {
    this.#nats = nats;
    this.#settings = settings;
    const { as, room, raw, warn } = settings;
    this.as = as;
    this.#subject = `parley.${room}.`;
    this.#room = new LinkedRoom(server, {
      as,
      raw,
      identity: randomIdentity(),
      clock,
      warn,
      claimed: (held) => this.#tellClaimed(held),
      ended: () => this.#close(),
    });
    this.started = this.#start.promise;
    this.#run();
  }

  stop(): Promise<void> {
    return this.#room.stopping();
  }

  #close(): void {
    this.#stopped = true;
    this.#wake();
    this.#start.resolve();
    this.#connection?.close().catch(() => {});
  }

  async #run(): Promise<void> {
    for (let pause = FIRST_PAUSE_MILLISECONDS; !this.#stopped;) {
      for (const target of this.#settings.targets) {
        try {
          const connection = await this.#connect(target);
          const since = performance.now();
          await this.#use(connection, target.address);
          const lasted = performance.now() - since;
          if (lasted > STABLE_MILLISECONDS) pause = FIRST_PAUSE_MILLISECONDS;
        } catch (error) {
          this.#tellFailure(target, error as Error);
        }
        if (this.#stopped) return;
      }
      this.#settled = true;
      this.#start.resolve();
      const paused = Promise.withResolvers<void>();
      this.#wake = paused.resolve;
      // Not all at the same moment.
      const timer = setTimeout(
        paused.resolve,
        pause * (0.5 + Math.random() / 2),
      );
      await paused.promise;
      clearTimeout(timer);
      pause = Math.min(2 * pause, MOST_PAUSE_MILLISECONDS);
    }
  }

  async #connect({ options }: Target): Promise<Nats.NatsConnection> {
    const { creds } = this.#settings;
    const connection = await this.#nats.NatsConnectionImpl.connect({
      ...options,
      authenticator: creds && this.#nats.credsAuthenticator(creds),
      name: `parley ${this.as}`,
      // One's own messages are of no use. The loop in #run connects again: the
      // client would keep without a bound what is published meanwhile.
      noEcho: true,
      reconnect: false,
      timeout: CONNECT_MILLISECONDS,
    });
    if (this.#stopped) await connection.close();
    return connection;
  }

  /** Links through a connection until it is closed. */
  async #use(connection: Nats.NatsConnection, address: string): Promise<void> {
    if (this.#stopped) return;
    const most = connection.info?.max_payload ?? 0;
    if (most < MESSAGE_BYTES) {
      await connection.close();
      throw new Error(
        `its max_payload must be at least ${MESSAGE_BYTES} bytes`,
      );
    }
    this.#connection = connection;
    this.#address = address;
    this.#watch(connection);
    for (const subject of ["log.*", `to.${this.as}.*`]) {
      connection.subscribe(this.#subject + subject, {
        callback: (error, message) => {
          if (error) return;
          const { subject } = message;
          this.#room.receive(
            subject.slice(this.#subject.length),
            message.data,
          );
        },
      });
    }
    const waiting = new Set<number>();
    const bus: Bus = {
      publish: (subject, message) => {
        if (connection.isClosed()) return;
        connection.publish(this.#subject + subject, message);
      },
      confirm(done) {
        if (connection.isClosed()) return;
        const since = performance.now();
        waiting.add(since);
        connection.flush().then(() => {
          waiting.delete(since);
          done();
        }, () => {});
      },
    };
    // A connection over which nothing comes back is no use. (The client's own
    // check waits for what it has written to be sent, which may never be.)
    const stalled = setInterval(() => {
      const [oldest] = waiting;
      if (performance.now() - oldest > STALLED_MILLISECONDS) connection.close();
    }, 1_000);
    this.#room.connected(bus);
    await connection.closed();
    clearInterval(stalled);
    this.#connection = null;
    this.#room.disconnected();
    if (this.#stopped) return;
    this.#tellDown(address);
  }

  /** Tells what NATS complains of, such as a subject that is not permitted. */
  async #watch(connection: Nats.NatsConnection): Promise<void> {
    for await (const status of connection.status()) {
      if (status.type !== "error") continue;
      const now = performance.now();
      if (now - this.#complained < COMPLAINT_MILLISECONDS) continue;
      this.#complained = now;
      this.#settings.warn(`NATS refuses something: ${status.error.message}`);
    }
  }

  #tellClaimed(held: boolean): void {
    if (held) {
      const again = this.#linkedOnce ? " again" : "";
      if (this.#linkedOnce) this.#room.notice("This server is linked again");
      this.#linkedOnce = true;
      this.#warned = this.#refused = false;
      this.#settings.print(
        `Linked${again} as ${this.as} through ${this.#address}`,
      );
      this.#settled = true;
      return this.#start.resolve();
    }
    if (this.#refused) return;
    this.#refused = true;
    const error = new LinkError(
      `Cannot link as ${this.as}: that name is in use ` +
        "(give another one with --link-as NAME)",
    );
    // Too late to stop: the room is open.
    if (this.#settled) return this.#settings.warn(error.message);
    this.#start.reject(error);
    this.#room.stop();
  }

  #tellDown(address: string): void {
    if (!this.#linkedOnce || this.#warned) return;
    this.#warned = true;
    this.#settings.warn(
      `The link through ${address} is down: this server goes on alone`,
    );
    this.#room.notice("The link is down: this server goes on alone");
  }

  #tellFailure({ address }: Target, error: Error): void {
    if (this.#warned) return;
    this.#warned = true;
    const reason = error.message.replace(/ \(os error \d+\)$/, "");
    this.#settings.warn(
      `Cannot link through ${address}: ${reason} ` +
        "(this server goes on alone, and tries again)",
    );
  }
}
