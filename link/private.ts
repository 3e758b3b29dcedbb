/**
 * Private messages between this server and another. Each is sent every second
 * until the other server answers whether its recipient is there; it is delivered
 * once, and in order.
 *
 * @module
 */
import type { Peer, Shared } from "./peer.ts";
import { HOST, Kind, type Reader } from "./wire.ts";

/** How many messages to one server can wait for an answer, and how many answers
 * to its messages are kept. */
const MAX_UNANSWERED = 256;

/** How often messages are sent again, and when they are given up. */
const RESEND_MILLISECONDS = 1_000;
const GIVE_UP_MILLISECONDS = 15_000;

/** The answers: the recipient has it, or is not there. */
const DELIVERED = 0, NOBODY = 1;

interface PrivateMessage {
  number: number;
  from: string;
  to: string;
  text: string;
  sentAt: number;
}

export class PrivateMessages {
  readonly #shared: Shared;
  readonly #peer: Peer;
  #unanswered: PrivateMessage[] = [];
  #lastNumber = 0;
  #lastSent = -Infinity;
  /** The number of the last message from the other server. */
  #lastReceived = 0;
  /** What its last messages were answered, by number. */
  readonly #answers = new Map<number, number>();

  constructor(shared: Shared, peer: Peer) {
    this.#shared = shared;
    this.#peer = peer;
  }

  /** Sends a message of a local person to a person of the other server. */
  send(from: string, to: string, text: string): void {
    const { room, options } = this.#shared, server = this.#peer.name;
    if (this.#unanswered.length >= MAX_UNANSWERED) {
      return room.answer(
        from,
        `Your message to ${to}@${server} was not sent: ${server} does not answer.`,
      );
    }
    const sentAt = options.clock.now();
    if (this.#unanswered.length === 0) this.#lastSent = sentAt;
    const message = { number: ++this.#lastNumber, from, to, text, sentAt };
    this.#unanswered.push(message);
    this.#send(message);
  }

  #send({ number, from, to, text }: PrivateMessage): void {
    const { publisher } = this.#shared;
    publisher.sendTo(
      this.#peer.name,
      publisher.message(Kind.Tell).identity(this.#peer.identity).u48(number)
        .u48(this.#unanswered[0].number).string(from).string(to).text(text),
    );
  }

  /** Sends again what was not answered, and gives up what is too old. */
  resend(now: number): void {
    const isLate = ({ sentAt }: PrivateMessage) =>
      now - sentAt >= GIVE_UP_MILLISECONDS;
    while (this.#unanswered.length > 0 && isLate(this.#unanswered[0])) {
      this.#tellLost(this.#unanswered.shift()!);
    }
    if (now - this.#lastSent < RESEND_MILLISECONDS) return;
    this.#lastSent = now;
    for (const message of this.#unanswered) this.#send(message);
  }

  /** Gives up all messages: the server is forgotten. */
  giveUp(): void {
    for (const message of this.#unanswered) this.#tellLost(message);
    this.#unanswered = [];
  }

  #tellLost({ from, to }: PrivateMessage): void {
    const server = this.#peer.name;
    this.#shared.room.answer(
      from,
      `Your message to ${to}@${server} may be lost: ${server} did not answer.`,
    );
  }

  /** Handles a message of the other server, and answers it. */
  read(reader: Reader): void {
    const identity = reader.identity(), number = reader.u48();
    const firstUnanswered = reader.u48();
    const from = reader.string(), to = reader.string(), text = reader.text();
    reader.end();
    const { options, publisher } = this.#shared;
    if (identity !== options.identity) return;
    if (number > this.#lastReceived) {
      const isNext = number === this.#lastReceived + 1 ||
        number === firstUnanswered;
      // The entry by which its sender joined may not have arrived yet.
      const isHere = from === HOST || this.#peer.people.has(from);
      if (!isNext || !isHere) return; // it comes again
      this.#deliver(number, from, to, text);
    }
    const answer = this.#answers.get(number) ?? DELIVERED;
    publisher.sendTo(
      this.#peer.name,
      publisher.message(Kind.Told).identity(this.#peer.identity).u48(number)
        .u8(answer),
    );
  }

  #deliver(number: number, from: string, to: string, text: string): void {
    const { room } = this.#shared;
    const isDelivered = room.tell(this.#peer.fullName(from), to, text);
    this.#lastReceived = number;
    this.#answers.set(number, isDelivered ? DELIVERED : NOBODY);
    if (this.#answers.size <= MAX_UNANSWERED) return;
    const [oldest] = this.#answers.keys();
    this.#answers.delete(oldest);
  }

  /** Handles the other server's answer to a message. */
  readAnswer(reader: Reader): void {
    const identity = reader.identity(), number = reader.u48();
    const answer = reader.u8();
    reader.end();
    if (identity !== this.#shared.options.identity) return;
    const index = this.#unanswered.findIndex((it) => it.number === number);
    if (index < 0) return;
    const [{ from, to }] = this.#unanswered.splice(index, 1);
    if (answer === NOBODY) {
      this.#shared.room.answer(
        from,
        `${this.#peer.fullName(to)} is not here.`,
      );
    }
  }
}
