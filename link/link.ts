/**
 * Several servers, one room, over [NATS](https://nats.io).
 *
 * ```sh
 * nats-server &
 * deno run --allow-net main.ts --port 8008 --link nats://127.0.0.1 --link-as tokyo
 * deno run --allow-net main.ts --port 8009 --link nats://127.0.0.1 --link-as paris
 * ```
 *
 * A person on tokyo is `alice@tokyo` on paris. Each server has a log of what
 * happens on it: lines, and people who join, leave, change their name or are
 * away. The entries of a log are numbered, and every other server is a cursor
 * into it.
 *
 * | file | what it is |
 * | --- | --- |
 * | `link.ts` | the options, and the connection to NATS |
 * | `room.ts` | one server's part in the room: connects the files below |
 * | `name.ts` | the name of this server: claimed and defended |
 * | `log.ts`, `publisher.ts` | the log of this server, and how it is sent |
 * | `servers.ts`, `peer.ts` | the other servers, and how the log of one is read |
 * | `private.ts` | private messages to and from another server |
 * | `report.ts` | what the room and the operator are told |
 * | `wire.ts` | the messages as bytes |
 * | `attachment.ts` | what a link needs of a chat server |
 * | `transport.ts`, `nats.ts` | TCP and TLS for the NATS client, and its types |
 *
 * Only `link.ts`, `transport.ts` and `nats.ts` know NATS; the others take the time
 * from a parameter too, so that a simulation can run them.
 *
 * **Subjects.** In a room called `parley`:
 *
 * - `parley.parley.log.tokyo`: tokyo's log and heartbeats, for all servers
 * - `parley.parley.to.paris.tokyo`: what tokyo sends to paris only
 *
 * The last word is the publisher, so NATS can bind a name to a user: tokyo may
 * publish `parley.ROOM.log.tokyo` and `parley.ROOM.to.*.tokyo`, and subscribe to
 * `parley.ROOM.log.*` and `parley.ROOM.to.tokyo.*`. Without such permissions
 * every user of the NATS server can publish as any Parley server.
 *
 * **Messages** are binary, at most 64 KiB long, and contain the identity of their
 * sender: 8 bytes, chosen at random at each start.
 *
 * - _Entries_: the new entries at the end of an event-loop turn, with the number
 *   of the first and the number of lines before it. A receiver applies each entry
 *   once, in the order of the numbers.
 * - _Heartbeat_: how many entries the log has, so that a loss at its end is
 *   noticed, and how long the server has been running. It is sent every 5 s and
 *   after each connection.
 * - _Ask_: a receiver that misses entries asks for the log from a number on. They
 *   are sent to that server, or to all servers if several ask for them.
 * - _People_: the people at some entry of the log, sent before the entries after
 *   it. A server that has just started asks for the people of now. The last 4 MiB
 *   of the log are kept; if older entries are missing, the people at the start of
 *   what is kept are sent, and the lines before that are reported:
 *   `* 312 lines from tokyo were lost`. The log of a server that starts while
 *   this one is linked is read from its first entry, without people.
 * - _Tell_ and _told_: a private message, and whether its recipient is there. A
 *   message is sent every second, for 15 s, until it is answered. It is delivered
 *   in order and once.
 * - _Claim_ and _held_: a server claims its name, and takes part 0.75 s later.
 *   If another server holds the name, that one answers, and the newcomer is
 *   refused. If that one has crashed, there is no answer. The other servers accept
 *   the new identity when the old one has said goodbye, or has not answered for
 *   1.5 s.
 *
 * After 15 s of silence a server is gone and its people leave. What is known of
 * it is kept: if only the network was down, it goes on where it was.
 *
 * **Bounds.** At most 1 MiB is on the way to NATS; the rest waits in the log.
 * Others can make this server keep 256 servers, 65,536 people of each, and
 * 1,048,576 people in all. A message that breaks the format, an invalid name, a
 * line of a person who is not there, a second server with the same name: these
 * are dropped, and the operator is told at most once a second. The chat server
 * cleans and limits lines from a link like those of a client.
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

/** The NATS client. `nats.ts` gives the reason for this form of its name. */
const NATS_CLIENT = "npm:@nats-io/nats-core@3.4.0/internal";

/** Options of {@linkcode linkRoom}. */
export interface LinkOptions {
  /** NATS servers, such as `nats://user:password@host:4222`, `nats://token@host`
   * or `tls://host`; the first that answers is used. */
  servers: string[];
  /** The name of this server: 1 to 24 letters, digits, `_` or `-`. By default
   * four random letters. */
  as?: string;
  /** The name of the room, with the same rule; by default `parley`. */
  room?: string;
  /** The contents of a NATS credentials file. */
  creds?: string;
  /** Whether the room relays lines without names. */
  raw?: boolean;
  /** Receives warnings for the operator, one line each; by default they are
   * written to stderr. */
  warn?: (line: string) => void;
  /** Receives a line each time the room is linked. */
  print?: (line: string) => void;
}

/** A linked room. */
export interface Link {
  /** The name of this server. */
  readonly as: string;
  /** Sends the rest of the log and a goodbye, and ends the link. Resolves within a
   * second. */
  stop(): Promise<void>;
}

/** Thrown by {@linkcode linkRoom}; the message says what to do. */
export class LinkError extends Error {
  /** The name of the class. */
  override name = "LinkError";
}

/** How long NATS has to accept a connection, and then to answer each ping. */
const CONNECT_MILLISECONDS = 5_000, STALLED_MILLISECONDS = 15_000;

/** The pause before the next attempt to connect. It doubles up to the second
 * figure, and starts anew after a connection of at least 10 s. */
const FIRST_PAUSE_MILLISECONDS = 100, MAX_PAUSE_MILLISECONDS = 5_000;
const STABLE_MILLISECONDS = 10_000;

/** How often the operator is told that NATS refuses something. */
const REFUSAL_MILLISECONDS = 60_000;

/**
 * Links the room of `server` with the rooms of other servers.
 *
 * If NATS cannot be reached, the operator is warned, and the room is linked as
 * soon as NATS can be reached.
 *
 * @returns the link, as soon as the room is linked or an attempt to reach NATS has
 * failed
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

/** One NATS server, with the credentials in its URL. */
interface Target {
  /** Host and port: nothing else of the URL is shown to anyone. */
  address: string;
  options: Nats.ConnectionOptions;
}

/** Valid options. */
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
  // The part before the last @ may be a password, which is not shown.
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

/** One connection to NATS, as the room uses it. */
class NatsBus implements Bus {
  readonly #connection: Nats.NatsConnection;
  /** What all subjects of the room begin with. */
  readonly #prefix: string;
  /** When each unanswered ping was sent, the oldest first. */
  readonly #pings: number[] = [];

  constructor(connection: Nats.NatsConnection, prefix: string) {
    this.#connection = connection;
    this.#prefix = prefix;
  }

  publish(subject: string, message: Uint8Array): void {
    if (this.#connection.isClosed()) return;
    this.#connection.publish(this.#prefix + subject, message);
  }

  confirm(done: () => void): void {
    if (this.#connection.isClosed()) return;
    this.#pings.push(performance.now());
    this.#connection.flush().then(() => {
      this.#pings.shift();
      done();
    }, () => {});
  }

  /** Whether NATS has not answered for too long. The check of the NATS client
   * does not notice that: it first waits until what it has written is sent. */
  get isStalled(): boolean {
    const [oldest = Infinity] = this.#pings;
    return performance.now() - oldest > STALLED_MILLISECONDS;
  }
}

/** A room and its connection to NATS, which is made again after each loss. */
class NatsLink implements Link {
  readonly as: string;
  /** Resolves when the room is linked, or an attempt to reach NATS has failed. */
  readonly started: Promise<void>;
  readonly #nats: typeof Nats;
  readonly #settings: Settings;
  /** What all subjects of the room begin with. */
  readonly #prefix: string;
  readonly #room: LinkedRoom;
  readonly #start = Promise.withResolvers<void>();
  #connection: Nats.NatsConnection | null = null;
  /** Ends the pause between two attempts. */
  #endPause: () => void = () => {};
  #isStopped = false;
  /** Host and port of the NATS server in use. */
  #address = "";
  /** Whether the room has been linked before. */
  #wasLinked = false;
  /** Whether the operator knows that the link is down, or that another server has
   * the name; until the room is linked. */
  #toldDown = false;
  #toldRefused = false;
  /** Whether `started` has resolved: then an error can only be told. */
  #hasStarted = false;
  #lastRefusal = -Infinity;

  constructor(nats: typeof Nats, server: Attachable, settings: Settings) {
    this.#nats = nats;
    this.#settings = settings;
    const { as, room, raw, warn } = settings;
    this.as = as;
    this.#prefix = `parley.${room}.`;
    this.#room = new LinkedRoom(server, {
      as,
      raw,
      identity: randomIdentity(),
      clock,
      warn,
      claimed: (isHeld) => isHeld ? this.#tellLinked() : this.#tellRefused(),
      ended: () => this.#close(),
    });
    this.started = this.#start.promise;
    this.#run();
  }

  stop(): Promise<void> {
    return this.#room.stopping();
  }

  #close(): void {
    this.#isStopped = true;
    this.#endPause();
    this.#start.resolve();
    this.#connection?.close().catch(() => {});
  }

  /** Connects to one NATS server after another until the link is stopped. */
  async #run(): Promise<void> {
    for (let pause = FIRST_PAUSE_MILLISECONDS; !this.#isStopped;) {
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
        if (this.#isStopped) return;
      }
      this.#hasStarted = true;
      this.#start.resolve();
      // A random part, so that many servers do not connect at the same moment.
      await this.#pause(pause * (0.5 + Math.random() / 2));
      pause = Math.min(2 * pause, MAX_PAUSE_MILLISECONDS);
    }
  }

  async #pause(milliseconds: number): Promise<void> {
    const { promise, resolve } = Promise.withResolvers<void>();
    this.#endPause = resolve;
    const timer = setTimeout(resolve, milliseconds);
    await promise;
    clearTimeout(timer);
  }

  async #connect({ options }: Target): Promise<Nats.NatsConnection> {
    const { creds } = this.#settings;
    const connection = await this.#nats.NatsConnectionImpl.connect({
      ...options,
      authenticator: creds && this.#nats.credsAuthenticator(creds),
      name: `parley ${this.as}`,
      noEcho: true,
      // #run connects again. The client would keep everything that is published
      // while there is no connection, without a bound.
      reconnect: false,
      timeout: CONNECT_MILLISECONDS,
    });
    if (this.#isStopped) await connection.close();
    return connection;
  }

  /** Links the room through a connection until it is closed. */
  async #use(connection: Nats.NatsConnection, address: string): Promise<void> {
    if (this.#isStopped) return;
    const maxPayload = connection.info?.max_payload ?? 0;
    if (maxPayload < MESSAGE_BYTES) {
      await connection.close();
      throw new Error(
        `its max_payload must be at least ${MESSAGE_BYTES} bytes`,
      );
    }
    this.#connection = connection;
    this.#address = address;
    this.#tellRefusals(connection);
    this.#subscribe(connection);
    const bus = new NatsBus(connection, this.#prefix);
    const watchdog = setInterval(() => {
      if (bus.isStalled) connection.close();
    }, 1_000);
    this.#room.connected(bus);
    await connection.closed();
    clearInterval(watchdog);
    this.#connection = null;
    this.#room.disconnected();
    if (!this.#isStopped) this.#tellDown();
  }

  #subscribe(connection: Nats.NatsConnection): void {
    for (const subject of ["log.*", `to.${this.as}.*`]) {
      connection.subscribe(this.#prefix + subject, {
        callback: (error, message) => {
          if (error) return;
          const subject = message.subject.slice(this.#prefix.length);
          this.#room.receive(subject, message.data);
        },
      });
    }
  }

  /** Tells the operator what NATS refuses, such as a subject without permission. */
  async #tellRefusals(connection: Nats.NatsConnection): Promise<void> {
    for await (const status of connection.status()) {
      if (status.type !== "error") continue;
      const now = performance.now();
      if (now - this.#lastRefusal < REFUSAL_MILLISECONDS) continue;
      this.#lastRefusal = now;
      this.#settings.warn(`NATS refuses something: ${status.error.message}`);
    }
  }

  #tellLinked(): void {
    if (this.#wasLinked) this.#room.notice("This server is linked again");
    const again = this.#wasLinked ? " again" : "";
    this.#settings.print(
      `Linked${again} as ${this.as} through ${this.#address}`,
    );
    this.#wasLinked = this.#hasStarted = true;
    this.#toldDown = this.#toldRefused = false;
    this.#start.resolve();
  }

  #tellRefused(): void {
    if (this.#toldRefused) return;
    this.#toldRefused = true;
    const error = new LinkError(
      `Cannot link as ${this.as}: that name is in use ` +
        "(give another one with --link-as NAME)",
    );
    if (this.#hasStarted) return this.#settings.warn(error.message);
    this.#start.reject(error);
    this.#room.stop();
  }

  #tellDown(): void {
    if (!this.#wasLinked || this.#toldDown) return;
    this.#toldDown = true;
    this.#settings.warn(
      `The link through ${this.#address} is down: this server goes on alone`,
    );
    this.#room.notice("The link is down: this server goes on alone");
  }

  #tellFailure({ address }: Target, error: Error): void {
    if (this.#toldDown) return;
    this.#toldDown = true;
    const reason = error.message.replace(/ \(os error \d+\)$/, "");
    this.#settings.warn(
      `Cannot link through ${address}: ${reason} ` +
        "(this server goes on alone, and tries again)",
    );
  }
}
