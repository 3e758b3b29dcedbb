/**
 * What a link tells the room and the operator: each at most one time a second,
 * since many servers come back at once after an outage.
 *
 * @module
 */

const REPORT_MILLISECONDS = 1_000;

/** What can happen to a server, as it is told of one and of several. */
const EVENTS = {
  linked: ["is linked", "are linked"],
  back: ["is linked again", "are linked again"],
  gone: ["is gone", "are gone"],
  stopped: ["has stopped", "have stopped"],
  started: ["has started again", "have started again"],
};

type ServerEvent = keyof typeof EVENTS;

/** A server and how many people are on it. */
interface Subject {
  name: string;
  people: number;
}

export class Report {
  readonly #now: () => number;
  readonly #notice: (line: string) => void;
  readonly #warn: (line: string) => void;
  #events = new Map<ServerEvent, Subject[]>();
  /** How many lines of each server were lost. */
  #lost = new Map<string, number>();
  #lastNotice = -Infinity;
  #dropped = { count: 0, last: "" };
  #lastWarning = -Infinity;

  /**
   * @param now milliseconds since an arbitrary moment
   * @param notice receives lines for everyone in the room
   * @param warn receives lines for the operator
   */
  constructor(
    now: () => number,
    notice: (line: string) => void,
    warn: (line: string) => void,
  ) {
    this.#now = now;
    this.#notice = notice;
    this.#warn = warn;
  }

  /** Something happened to a server with so many people. */
  server(event: ServerEvent, name: string, people: number): void {
    const subjects = this.#events.get(event) ?? [];
    this.#events.set(event, [...subjects, { name, people }]);
    this.flush();
  }

  /** Lines of a server cannot be had any more. */
  lost(name: string, lines: number): void {
    if (lines <= 0) return;
    this.#lost.set(name, (this.#lost.get(name) ?? 0) + lines);
    this.flush();
  }

  /** A message was dropped; `what` says what it was, such as `too long`. */
  dropped(from: string, what: string): void {
    this.#dropped.count++;
    this.#dropped.last = `from ${from}: it was ${what}`;
    this.flush();
  }

  /** Tells what waits, unless something was told less than a second ago. */
  flush(): void {
    const now = this.#now();
    if (
      this.#events.size + this.#lost.size > 0 &&
      now - this.#lastNotice >= REPORT_MILLISECONDS
    ) {
      this.#lastNotice = now;
      this.#tellRoom();
    }
    if (
      this.#dropped.count > 0 &&
      now - this.#lastWarning >= REPORT_MILLISECONDS
    ) {
      this.#lastWarning = now;
      this.#tellOperator();
    }
  }

  #tellRoom(): void {
    const events = this.#events, lost = this.#lost;
    this.#events = new Map();
    this.#lost = new Map();
    for (const [event, subjects] of events) {
      this.#notice(describe(event, subjects));
    }
    for (const [name, lines] of lost) {
      const what = lines === 1 ? "1 line" : `${lines} lines`;
      const were = lines === 1 ? "was" : "were";
      this.#notice(`${what} from ${name} ${were} lost`);
    }
  }

  #tellOperator(): void {
    const { count, last } = this.#dropped;
    this.#dropped = { count: 0, last: "" };
    this.#warn(
      count === 1
        ? `Dropped a message of the link ${last}`
        : `Dropped ${count} messages of the link, the last ${last}`,
    );
  }
}

/** One line, such as `tokyo, paris are linked: 3 people have entered`. */
function describe(event: ServerEvent, servers: Subject[]): string {
  const names = servers.slice(0, 5).map(({ name }) => name).join(", ");
  const more = servers.length > 5 ? ` and ${servers.length - 5} more` : "";
  const [one, several] = EVENTS[event];
  const line = `${names}${more} ${servers.length === 1 ? one : several}`;
  const people = servers.reduce((sum, { people }) => sum + people, 0);
  if (people === 0) return line;
  const moved = event === "linked" || event === "back" ? "entered" : "left";
  return people === 1
    ? `${line}: 1 person has ${moved}`
    : `${line}: ${people} people have ${moved}`;
}
