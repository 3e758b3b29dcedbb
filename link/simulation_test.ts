/**
 * The protocol of a link, in a simulated time and over a simulated bus that
 * delays, drops and duplicates messages, mixes what different servers sent, and
 * restarts; with servers that are cut off, crash and start again.
 *
 * @module
 */
import { assert, assertEquals } from "@std/assert";
import fc from "fast-check";
import { FakeServer } from "./fake_server.ts";
import { type Bus, type Clock, LinkedRoom } from "./room.ts";

/** A source of numbers that the seed decides (mulberry32). */
function random(seed: number): () => number {
  return () => {
    seed = seed + 0x6d2b79f5 | 0;
    let t = Math.imul(seed ^ seed >>> 15, 1 | seed);
    t = t + Math.imul(t ^ t >>> 7, 61 | t) ^ t;
    return ((t ^ t >>> 14) >>> 0) / 4294967296;
  };
}

/** The time of a simulation, in milliseconds, and what is to happen. */
class World {
  now = 0;
  #events: { at: number; order: number; run: () => void }[] = [];
  #order = 0;

  at(time: number, run: () => void): () => void {
    const event = { at: Math.max(time, this.now), order: this.#order++, run };
    // Kept sorted: few are waiting.
    let low = 0, high = this.#events.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      const it = this.#events[middle];
      if (it.at < event.at || (it.at === event.at && it.order < event.order)) {
        low = middle + 1;
      } else high = middle;
    }
    this.#events.splice(low, 0, event);
    return () => {
      event.run = () => {};
    };
  }

  run(until: number): void {
    while (this.#events.length && this.#events[0].at <= until) {
      const event = this.#events.shift()!;
      this.now = event.at;
      event.run();
    }
    this.now = until;
  }
}

interface Weather {
  seed: number;
  /** The part of the deliveries that is dropped, and that comes twice. */
  drop: number;
  duplicate: number;
  /** The longest delay of a delivery, in milliseconds. */
  delay: number;
  /** The part of the deliveries in which a byte after the header is another. */
  corrupt?: number;
}

/** A server of the simulation, which can be started again. */
class Server {
  room = new FakeServer();
  starts = 0;
  link!: LinkedRoom;
  online = false;
  readonly warnings: string[] = [];
  /** What a start of it said: its lines, numbered. */
  said = 0;
  people = 0;

  constructor(
    readonly name: string,
    readonly bus: MemoryBus,
    readonly window: number | undefined,
  ) {
    this.start();
  }

  get identity(): string {
    const letters = Array.from(
      this.name,
      (letter) => letter.charCodeAt(0).toString(16),
    );
    return (letters.join("") + "0".repeat(16)).slice(0, 12) +
      String(this.starts).padStart(4, "0");
  }

  start(): void {
    this.starts++;
    this.room = new FakeServer();
    this.said = 0;
    const { world } = this.bus;
    const starts = this.starts;
    const alive = () => this.starts === starts;
    const clock: Clock = {
      now: () => world.now,
      soon: (then) => void world.at(world.now, () => alive() && then()),
      after: (milliseconds, then) =>
        world.at(world.now + milliseconds, () => alive() && then()),
    };
    this.link = new LinkedRoom(this.room, {
      as: this.name,
      raw: false,
      identity: this.identity,
      clock,
      warn: (line) => this.warnings.push(line),
      window: this.window,
    });
    this.bus.connect(this);
  }
}

/** A bus in memory: what one server publishes reaches another in its order, but
 * for what is dropped or comes twice. */
class MemoryBus {
  readonly servers: Server[] = [];
  readonly random: () => number;
  /** Counts the connections of each server: what is under way ends with it. */
  readonly #connections = new Map<string, number>();
  readonly #last = new Map<string, number>();
  messages = 0;
  bytes = 0;

  readonly weather: Weather;

  constructor(readonly world: World, weather: Weather) {
    this.weather = { ...weather };
    this.random = random(weather.seed);
  }

  add(name: string, window?: number): Server {
    const server = new Server(name, this, window);
    this.servers.push(server);
    return server;
  }

  /** Lets the servers meet before anyone speaks: what one says before another is
   * linked is not for it. */
  settle(): void {
    const { drop } = this.weather;
    this.weather.drop = 0;
    this.world.run(this.world.now + 15_000);
    this.weather.drop = drop;
  }

  connect(server: Server): void {
    const number = (this.#connections.get(server.name) ?? 0) + 1;
    this.#connections.set(server.name, number);
    server.online = true;
    const isOpen = () => this.#connections.get(server.name) === number;
    const { delay } = this.weather;
    const bus: Bus = {
      publish: (subject, message) => {
        if (!isOpen()) return;
        const bytes = message.slice();
        this.messages++;
        this.bytes += bytes.length;
        for (const to of this.servers) {
          const mine = subject.startsWith("log.") ||
            subject.startsWith(`to.${to.name}.`);
          if (to !== server && mine) this.#deliver(server, to, subject, bytes);
        }
      },
      confirm: (done) => {
        this.world.at(
          this.world.now + this.random() * delay,
          () => isOpen() && done(),
        );
      },
    };
    server.link.connected(bus);
  }

  disconnect(server: Server): void {
    this.#connections.set(
      server.name,
      (this.#connections.get(server.name) ?? 0) + 1,
    );
    server.online = false;
    server.link.disconnected();
  }

  #deliver(
    from: Server,
    to: Server,
    subject: string,
    bytes: Uint8Array,
  ): void {
    const { drop, duplicate, delay, corrupt = 0 } = this.weather;
    if (corrupt && this.random() < corrupt) {
      bytes = bytes.slice();
      const at = 12 + Math.floor(this.random() * (bytes.length - 12));
      bytes[at] = Math.floor(this.random() * 256);
    }
    if (!to.online || this.random() < drop) return;
    const way = `${from.name} ${to.name}`, { world } = this;
    const connection = this.#connections.get(to.name);
    const arrive = () => {
      if (this.#connections.get(to.name) !== connection) return;
      to.link.receive(subject, bytes);
    };
    const at = Math.max(
      this.#last.get(way) ?? 0,
      world.now + this.random() * delay,
    );
    this.#last.set(way, at);
    world.at(at, arrive);
    if (this.random() < duplicate) {
      world.at(at + this.random() * 5 * delay, arrive);
    }
  }

  /** Everyone is disconnected, and connects again within two seconds. */
  restart(): void {
    for (const server of this.servers) {
      if (!server.online) continue;
      this.disconnect(server);
      this.world.at(
        this.world.now + this.random() * 2_000,
        () => server.online || this.connect(server),
      );
    }
  }
}

/** Somebody does something on a server. */
function act(server: Server, random: () => number): void {
  const { room } = server;
  const people = room.people().map(({ name }) => name);
  const name = people[Math.floor(random() * people.length)];
  const what = random();
  if (people.length === 0 || what < 0.05) {
    room.join(`p${server.people++}`);
  } else if (what < 0.08) room.leave(name, "bye");
  else if (what < 0.11) room.renameLocal(name, `p${server.people++}`);
  else if (what < 0.14) room.sayAway(name, random() < 0.5 ? "lunch" : null);
  else {
    const lines = Array.from(
      { length: 1 + Math.floor(random() * 3) },
      () => `${server.starts}:${server.said++}`,
    );
    room.sayLocal(name, lines.join("\n"));
  }
}

/** The numbers of the lines of one start of `from` that a client of `to` saw. */
function linesFrom(from: Server, to: Server): number[] {
  const line = new RegExp(`^\\[\\w+@${from.name}\\] ${from.starts}:(\\d+)$`);
  return to.room.lines.flatMap((it) => {
    const found = line.exec(it);
    return found ? [Number(found[1])] : [];
  });
}

/** How many lines from a server a room was told that it lost. */
function lostFrom(from: Server, to: Server): number {
  const line = new RegExp(
    `^\\* (\\d+) lines? from ${from.name} w(?:as|ere) lost`,
  );
  return to.room.lines.reduce(
    (sum, it) => sum + Number(line.exec(it)?.[1] ?? 0),
    0,
  );
}

/** The people of `from` that a client of `to` sees, and why they are away. */
function peopleFrom(from: Server, to: Server): string[] {
  const end = `@${from.name}`;
  return Array.from(to.room.here)
    .filter(([name]) => name.endsWith(end))
    .map(([name, away]) => `${name.slice(0, -end.length)} ${away}`).sort();
}

function peopleOf(server: Server): string[] {
  return server.room.people().map(({ name, away }) => `${name} ${away}`).sort();
}

/** A client of `to` saw every line of `from`, once and in order. */
function assertAllLines(from: Server, to: Server): void {
  const seen = linesFrom(from, to);
  const wrong = seen.findIndex((number, i) => number !== i);
  const about = `lines of ${from.name} in ${to.name}, of ${from.said}`;
  if (wrong >= 0) assertEquals(seen.slice(wrong, wrong + 3), [wrong], about);
  assertEquals(seen.length, from.said, about);
}

function assertSamePeople(servers: Server[]): void {
  for (const to of servers) {
    assertEquals(to.room.mistakes, []);
    for (const from of servers) {
      if (from === to) continue;
      assertEquals(
        peopleFrom(from, to),
        peopleOf(from),
        `people of ${from.name} as ${to.name} has them`,
      );
    }
  }
}

const weather = fc.record({
  seed: fc.integer(),
  drop: fc.constantFrom(0, 0.05, 0.3),
  duplicate: fc.constantFrom(0, 0.2),
  delay: fc.constantFrom(1, 50, 400),
});

Deno.test("simulation: every line arrives once and in order, through losses, cuts and restarts of the bus", () => {
  fc.assert(
    fc.property(
      weather,
      fc.integer({ min: 2, max: 4 }),
      (weather, size) => {
        const world = new World(), bus = new MemoryBus(world, weather);
        for (let i = 0; i < size; i++) bus.add(`s${i}`);
        bus.settle();
        for (let round = 0; round < 300; round++) {
          const server = bus.servers[Math.floor(bus.random() * size)];
          act(server, bus.random);
          world.run(world.now + bus.random() * 300);
          const what = bus.random();
          if (what < 0.01) bus.restart();
          else if (what < 0.02 && server.online) {
            bus.disconnect(server);
            world.at(
              world.now + bus.random() * 40_000,
              () => server.online || bus.connect(server),
            );
          }
        }
        world.run(world.now + 45_000);
        bus.weather.drop = 0;
        world.run(world.now + 60_000);
        assertSamePeople(bus.servers);
        for (const to of bus.servers) {
          assertEquals(to.warnings, []);
          for (const from of bus.servers) {
            if (from === to) continue;
            assertAllLines(from, to);
          }
        }
      },
    ),
    { numRuns: 100 },
  );
});

Deno.test("simulation: lines that fell out of the window are counted, and the rest arrives", () => {
  fc.assert(
    fc.property(weather, (weather) => {
      const world = new World(), bus = new MemoryBus(world, weather);
      const window = 128 * 1024;
      const [from, to] = [bus.add("from", window), bus.add("to", window)];
      from.room.join("alice");
      bus.settle();
      const long = "x".repeat(200);
      for (let round = 0; round < 3; round++) {
        if (round > 0) bus.disconnect(to);
        for (let i = 0; i < 3_000; i++) {
          from.room.sayLocal("alice", `${from.starts}:${from.said++}`);
          from.room.sayLocal("alice", long);
          if (i % 100 === 0) {
            if (from.people > 1 && i % 300 === 0) {
              from.room.leave(`p${from.people - 2}`);
            }
            from.room.join(`p${from.people++}`);
            world.run(world.now + 20);
          }
        }
        if (round > 0) bus.connect(to);
        world.run(world.now + 60_000);
      }
      bus.weather.drop = 0;
      world.run(world.now + 60_000);
      assertSamePeople(bus.servers);
      const seen = linesFrom(from, to);
      assertEquals(seen, seen.toSorted((a, b) => a - b));
      assertEquals(new Set(seen).size, seen.length);
      assertEquals(seen.at(-1), from.said - 1);
      const longSeen = to.room.lines.filter((it) => it.endsWith(long)).length;
      assertEquals(
        seen.length + longSeen + lostFrom(from, to),
        2 * from.said,
      );
      assert(lostFrom(from, to) > 0);
    }),
    { numRuns: 15 },
  );
});

Deno.test("simulation: servers that crash and start again leave no ghosts, and lose no lines sent since", () => {
  fc.assert(
    fc.property(weather, fc.integer({ min: 2, max: 3 }), (weather, size) => {
      const world = new World(), bus = new MemoryBus(world, weather);
      for (let i = 0; i < size; i++) bus.add(`s${i}`);
      bus.settle();
      const [watcher] = bus.servers;
      for (let round = 0; round < 200; round++) {
        const server = bus.servers[Math.floor(bus.random() * size)];
        act(server, bus.random);
        world.run(world.now + bus.random() * 300);
        if (server !== watcher && bus.random() < 0.02) {
          bus.disconnect(server);
          world.run(world.now + bus.random() * 20_000);
          server.start();
        }
      }
      world.run(world.now + 45_000);
      bus.weather.drop = 0;
      world.run(world.now + 60_000);
      assertSamePeople(bus.servers);
      // The watcher was there all the time.
      for (const from of bus.servers.slice(1)) {
        assertAllLines(from, watcher);
      }
    }),
    { numRuns: 100 },
  );
});

Deno.test("simulation: a private message arrives once and in order, or its sender is told", () => {
  fc.assert(
    fc.property(weather, (weather) => {
      const world = new World(), bus = new MemoryBus(world, weather);
      const [a, b] = [bus.add("a"), bus.add("b")];
      a.room.join("alice");
      b.room.join("bob");
      bus.settle();
      const all = Array.from({ length: 100 }, (_, i) => `m${i}`);
      for (const text of all) {
        a.room.message("alice", "bob@b", text);
        world.run(world.now + bus.random() * 400);
        if (bus.random() < 0.03) bus.restart();
      }
      world.run(world.now + 60_000);
      const got = b.room.lines.flatMap((it) =>
        it.startsWith("[alice@a -> bob] ") ? [it.slice(17)] : []
      );
      assertEquals(got, all.filter((it) => got.includes(it)));
      const answers = a.room.lines.filter((it) => it.startsWith("! (alice)"));
      assert(
        got.length + answers.length >= all.length,
        `${got.length} arrived, ${answers.length} answers`,
      );
      if (weather.drop === 0) assertEquals(got, all);
    }),
    { numRuns: 100 },
  );
});

Deno.test("simulation: corrupt messages do not break the rules of a room", () => {
  fc.assert(
    fc.property(weather, (weather) => {
      const world = new World();
      const bus = new MemoryBus(world, { ...weather, corrupt: 0.2 });
      for (let i = 0; i < 3; i++) bus.add(`s${i}`);
      bus.settle();
      for (let round = 0; round < 300; round++) {
        const server = bus.servers[Math.floor(bus.random() * 3)];
        act(server, bus.random);
        if (bus.random() < 0.1) {
          const to = bus.servers[Math.floor(bus.random() * 3)];
          const [person] = server.room.people();
          if (person) server.room.message(person.name, `p0@${to.name}`, "psst");
        }
        world.run(world.now + bus.random() * 300);
      }
      world.run(world.now + 60_000);
      for (const { room, warnings } of bus.servers) {
        assertEquals(room.mistakes, []);
        assert(warnings.length <= world.now / 1_000);
        for (const name of room.here.keys()) {
          assert(/^[\p{L}\p{M}\p{Nd}_-]{1,24}(@s[012])?$/u.test(name), name);
        }
      }
    }),
    { numRuns: 50 },
  );
});

Deno.test("simulation: the traffic of 100 servers grows with what happens, not with how many people are there", () => {
  const world = new World();
  const bus = new MemoryBus(world, {
    seed: 1,
    drop: 0,
    duplicate: 0,
    delay: 5,
  });
  const size = 100, people = 20;
  for (let i = 0; i < size; i++) {
    const server = bus.add(`s${i}`);
    for (let j = 0; j < people; j++) server.room.join(`person${j}`);
    world.run(world.now + 50);
  }
  world.run(world.now + 30_000);
  assertSamePeople(bus.servers);
  const during = (seconds: number) => {
    const { bytes, messages } = bus;
    world.run(world.now + 1000 * seconds);
    return { bytes: bus.bytes - bytes, messages: bus.messages - messages };
  };
  // A heartbeat of 30 bytes of each server in 5 s, however many people there are.
  const quiet = during(50);
  assert(quiet.messages <= 11 * size, `${quiet.messages} messages`);
  assert(quiet.bytes <= 11 * size * 30, `${quiet.bytes} bytes`);
  // Each joins and leaves in a message of its own: less than 50 bytes.
  for (const { room } of bus.servers) {
    room.join("newcomer");
    world.run(world.now + 10);
    room.leave("newcomer");
    world.run(world.now + 10);
  }
  const changes = during(50);
  assert(
    changes.bytes - quiet.bytes <= 2 * size * 50,
    `${changes.bytes} bytes`,
  );
  // One that starts anew is told of 2,000 people, in about 10 bytes each.
  const [one] = bus.servers;
  bus.disconnect(one);
  one.start();
  const start = during(5);
  assert(start.bytes <= size * (people * 10 + 200), `${start.bytes} bytes`);
  assertSamePeople(bus.servers);
});
