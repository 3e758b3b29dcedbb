/**
 * The name of this server: claimed before the server takes part, defended after
 * that.
 *
 * @module
 */
import type { Publisher, PublisherOptions } from "./publisher.ts";
import { GOODBYE, Kind, type Reader } from "./wire.ts";

/** What a server or a room can be called. */
export const SERVER_NAME = /^[\w-]{1,24}$/;

/** How long the holder of a name has to object to a claim. A round trip through
 * NATS around the world takes 300 ms. */
const CLAIM_MILLISECONDS = 750;

/** How often a name that was refused is claimed again. */
const CLAIM_AGAIN_MILLISECONDS = 15_000;

/** How often the operator is told that another server uses the name. */
const WARNING_MILLISECONDS = 60_000;

/** What a claim to a name is made with. */
export interface NameClaimOptions extends PublisherOptions {
  warn: (line: string) => void;
}

export class NameClaim {
  readonly #options: NameClaimOptions;
  readonly #publisher: Publisher;
  /** Called when the name is held (`true`) or refused (`false`). */
  readonly #decided: (isHeld: boolean) => void;
  #state: "none" | "claiming" | "held" | "refused" = "none";
  /** When the name was claimed or refused last. */
  #since = 0;
  #lastWarning = -Infinity;

  constructor(
    options: NameClaimOptions,
    publisher: Publisher,
    decided: (isHeld: boolean) => void,
  ) {
    this.#options = options;
    this.#publisher = publisher;
    this.#decided = decided;
  }

  get isHeld(): boolean {
    return this.#state === "held";
  }

  /** Claims the name. If there is no connection, it is claimed on the next one. */
  claim(): void {
    if (!this.#publisher.isConnected) {
      this.#state = "none";
      return;
    }
    this.#state = "claiming";
    this.#since = this.#options.clock.now();
    this.#publisher.sendTo(
      this.#options.as,
      this.#publisher.message(Kind.Claim),
    );
  }

  /** The connection is lost: an objection could not arrive. */
  disconnected(): void {
    if (this.#state === "claiming") this.#state = "none";
  }

  tick(): void {
    const since = this.#options.clock.now() - this.#since;
    if (this.#state === "claiming" && since >= CLAIM_MILLISECONDS) {
      this.#state = "held";
      this.#decided(true);
    } else if (
      this.#state === "refused" && since >= CLAIM_AGAIN_MILLISECONDS
    ) this.claim();
  }

  #refused(): void {
    this.#state = "refused";
    this.#since = this.#options.clock.now();
    this.#decided(false);
  }

  /** Handles a message of another process that uses the name of this server. */
  read(reader: Reader, kind: number, flags: number, identity: string): void {
    if (kind === Kind.Claim) return this.#readClaim(identity);
    if (kind === Kind.Held) {
      if (reader.identity() !== this.#options.identity) return;
    } else if (flags & GOODBYE) return;
    else if (this.#state === "held") return this.#warn();
    if (this.#state === "claiming") this.#refused();
  }

  #readClaim(identity: string): void {
    const { as, identity: own } = this.#options;
    // Of two processes that claim at once, the greater identity wins.
    const wins = this.#state === "claiming" && own > identity;
    if (this.#state === "held" || wins) {
      this.#publisher.sendTo(
        as,
        this.#publisher.message(Kind.Held).identity(identity),
      );
    } else if (this.#state === "claiming") this.#refused();
  }

  #warn(): void {
    const now = this.#options.clock.now();
    if (now - this.#lastWarning < WARNING_MILLISECONDS) return;
    this.#lastWarning = now;
    this.#options.warn(
      `Another server is linked as ${this.#options.as}, too: give one of ` +
        "them another name with --link-as NAME",
    );
  }
}
