/**
 * One linked room, and single messages of another server.
 *
 * @module
 */
import { assert, assertEquals } from "@std/assert";
import { FakeServer } from "./fake_server.ts";
import { type Clock, LinkedRoom } from "./room.ts";
import { FROM, GOODBYE, Kind, NOW, Reader, Type, Writer } from "./wire.ts";

const TOKYO = "00000000000000aa", PARIS = "00000000000000bb";

/** What a private message is answered. */
const DELIVERED = 0, NOBODY = 1;

/** The room of tokyo, linked, in a time that the test moves. */
class Tokyo {
  readonly server = new FakeServer();
  readonly warnings: string[] = [];
  /** How often the link was made. */
  linked = 0;
  /** The messages that were sent, read up to the end of their headers. */
  sent: { subject: string; message: Reader; kind: number }[] = [];
  readonly link: LinkedRoom;
  #now = 0;
  readonly #timers = new Set<{ at: number; run: () => void }>();

  constructor() {
    const after = (milliseconds: number, run: () => void) => {
      const timer = { at: this.#now + milliseconds, run };
      this.#timers.add(timer);
      return () => void this.#timers.delete(timer);
    };
    const clock: Clock = {
      now: () => this.#now,
      soon: (then) => void after(0, then),
      after,
    };
    this.link = new LinkedRoom(this.server, {
      as: "tokyo",
      raw: false,
      identity: TOKYO,
      clock,
      warn: (line) => this.warnings.push(line),
      claimed: (held) => this.linked += held ? 1 : 0,
    });
    this.connect();
    this.run(1_000);
  }

  connect(): void {
    this.link.connected({
      publish: (subject, bytes) => {
        const message = new Reader(bytes.slice());
        this.sent.push({ subject, message, kind: message.header().kind });
      },
      confirm: (done) => done(),
    });
  }

  /** Lets time pass. */
  run(milliseconds: number): void {
    const end = this.#now + milliseconds;
    for (;;) {
      const [next] = [...this.#timers].sort((a, b) => a.at - b.at);
      if (next === undefined || next.at > end) break;
      this.#timers.delete(next);
      this.#now = Math.max(this.#now, next.at);
      next.run();
    }
    this.#now = end;
  }

  /** Lets time pass in which this process does not run. */
  sleep(milliseconds: number): void {
    this.#now += milliseconds;
  }

  fromParis(
    kind: number,
    body = (message: Writer) => message,
    flags = 0,
  ): void {
    const subject = kind === Kind.Heartbeat ? "log.paris" : "to.tokyo.paris";
    const message = body(Writer.message(kind, flags, PARIS));
    this.link.receive(subject, message.done());
  }

  /** Paris has an empty log and has been running for so long. */
  heartbeat(milliseconds: number, flags = 0): void {
    this.fromParis(
      Kind.Heartbeat,
      (message) => message.u48(0).u48(0).u48(milliseconds),
      flags,
    );
  }

  /** A private message of the operator of paris; returns how it is answered. */
  tell(number: number, to: string): number | undefined {
    this.sent = [];
    this.fromParis(
      Kind.Tell,
      (message) =>
        message.identity(TOKYO).u48(number).u48(number).string("host")
          .string(to).text("psst"),
    );
    const answer = this.sent.find(({ kind }) => kind === Kind.Told)?.message;
    if (answer === undefined) return;
    answer.identity();
    assertEquals(answer.u48(), number);
    return answer.u8();
  }
}

Deno.test("a server that was never announced leaves without a notice", () => {
  for (const flags of [GOODBYE, null]) {
    const tokyo = new Tokyo();
    tokyo.heartbeat(60_000); // its people are asked for, and do not come
    if (flags !== null) tokyo.heartbeat(60_001, flags);
    tokyo.run(20_000);
    assertEquals(tokyo.server.lines, []);
  }
});

Deno.test("a server that was announced leaves with a notice", () => {
  const tokyo = new Tokyo();
  tokyo.heartbeat(0);
  tokyo.run(1_000);
  tokyo.heartbeat(1_000, GOODBYE);
  tokyo.run(1_000);
  assertEquals(tokyo.server.lines, [
    "* paris is linked",
    "* paris has stopped",
  ]);
});

Deno.test("a server that slept and lost its connection claims its name again", () => {
  const tokyo = new Tokyo();
  assertEquals(tokyo.linked, 1);
  tokyo.sleep(60_000);
  tokyo.link.disconnected();
  tokyo.run(1_000);
  tokyo.sent = [];
  tokyo.connect();
  assertEquals(tokyo.sent.map(({ kind }) => kind), [Kind.Claim]);
  tokyo.run(1_000);
  assertEquals(tokyo.linked, 2);
});

Deno.test("a server that falls silent after this one slept is gone after 15 seconds", () => {
  const tokyo = new Tokyo();
  tokyo.heartbeat(0);
  tokyo.sleep(60_000);
  tokyo.heartbeat(60_000); // arrives before the first deadline is looked at
  tokyo.run(17_000);
  assertEquals(tokyo.server.lines, ["* paris is linked", "* paris is gone"]);
});

Deno.test("entries are given up after more than 16 questions without an answer", () => {
  const tokyo = new Tokyo();
  tokyo.heartbeat(0);
  tokyo.sent = [];
  // Paris has an entry, which does not arrive.
  const ask = (round: number) => {
    tokyo.fromParis(
      Kind.Heartbeat,
      (message) => message.u48(1).u48(1).u48(3_000 * round),
    );
    tokyo.run(3_000);
    const asks = tokyo.sent.filter(({ kind }) => kind === Kind.Ask);
    tokyo.sent = [];
    return asks.map(({ message }) => {
      message.identity();
      return message.u8();
    });
  };
  for (let round = 1; round <= 16; round++) {
    assert(ask(round).every((mode) => mode === FROM), `round ${round}`);
  }
  assert(ask(17).includes(NOW));
});

Deno.test("the answers to 256 private messages are kept, and no more", () => {
  const tokyo = new Tokyo();
  tokyo.server.join("alice");
  tokyo.heartbeat(0);
  assertEquals(tokyo.tell(1, "nobody"), NOBODY);
  for (let i = 1; i < 256; i++) tokyo.tell(1_000 * i, "alice");
  assertEquals(tokyo.tell(1, "nobody"), NOBODY);
  tokyo.tell(1_000_000, "alice");
  assertEquals(tokyo.tell(1, "nobody"), DELIVERED);
});

Deno.test("after an outage the people of a server are the same persons, not after it was replaced", () => {
  const tokyo = new Tokyo();
  tokyo.heartbeat(0);
  tokyo.fromParis(
    Kind.Entries,
    (message) => message.u48(0).u48(0).u32(1).u8(Type.Joined).string("bob"),
  );
  assertEquals([...tokyo.server.here.keys()], ["bob@paris"]);
  tokyo.run(20_000);
  assertEquals(tokyo.server.here.size, 0);
  assertEquals([...tokyo.server.absent], ["bob@paris"]);
  tokyo.heartbeat(20_000);
  assertEquals([...tokyo.server.here.keys()], ["bob@paris"]);
  assertEquals(tokyo.server.absent.size, 0);
  tokyo.run(20_000);
  const message = Writer.message(Kind.Heartbeat, 0, "00000000000000cc");
  const heartbeat = message.u48(0).u48(0).u48(0).done();
  tokyo.link.receive("log.paris", heartbeat); // of another process
  assertEquals(tokyo.server.absent.size, 0);
});
