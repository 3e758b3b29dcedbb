/**
 * Measures what a link adds to a line, and how many lines it carries, between
 * two processes on this machine and a `nats-server`:
 *
 * ```sh
 * deno run --allow-all link/link_bench.ts
 * ```
 *
 * There are no clients: what a room does with a line is not in the figures.
 *
 * - _latency_: one says a line, the other says one when it comes, and so on.
 *   What is told is half of that.
 * - _lines_: one says lines of 64 bytes as fast as the other takes them: 2 MiB
 *   are on the way at most. Either one person says 64 KiB at once, as when a file
 *   is pasted, or a hundred people say a line each.
 * - _processor_: what the sender and the receiver used of it, a line.
 *
 * @module
 */
import { FakeServer } from "./fake_server.ts";
import { linkRoom } from "./link.ts";
import { NatsServer } from "./nats_server.ts";

const encoder = new TextEncoder(), decoder = new TextDecoder();
const LINE_BYTES = 64, ON_THE_WAY_BYTES = 2 * 1024 * 1024;

/** A room that hands what is said elsewhere to a function. */
class Room extends FakeServer {
  receive: (lines: Uint8Array) => void = () => {};

  override say(_name: string, lines: Uint8Array): void {
    this.receive(lines);
  }
}

async function open(url: string, as: string): Promise<Room> {
  const room = new Room();
  room.recording = false;
  await linkRoom(room, { servers: [url], as, warn: () => {} });
  for (let i = 0; i < 100; i++) room.join(`p${i}`);
  return room;
}

/** Microseconds of the processor, of this process. */
function processor(): number {
  const { user, system } = process.cpuUsage();
  return user + system;
}

/** The other end: answers each line, or counts and acknowledges bytes. */
async function answer(url: string): Promise<void> {
  const room = await open(url, "paris");
  let bytes = 0, acknowledged = 0, used = processor();
  room.receive = (lines) => {
    if (lines[0] === 63) return room.sayLocal("p0", "!"); // "?"
    if (lines[0] === 35) { // "#"
      room.sayLocal("p0", `#${processor() - used}`);
      bytes = acknowledged = 0;
      used = processor();
      return;
    }
    bytes += lines.length;
    if (bytes - acknowledged < 256 * 1024) return;
    acknowledged = bytes;
    room.sayLocal("p0", `${bytes}`);
  };
}

/** Waits until the other end answers: it has met this one. */
async function meet(room: Room): Promise<void> {
  let met = false;
  room.receive = () => met = true;
  while (!met) {
    room.sayLocal("p0", "?");
    await new Promise((resolve) => setTimeout(resolve, 200));
  }
}

async function latency(room: Room): Promise<void> {
  const times: number[] = [];
  for (let i = 0; i < 6_000; i++) {
    const received = Promise.withResolvers<void>();
    room.receive = () => received.resolve();
    const from = performance.now();
    room.sayLocal("p0", "?");
    await received.promise;
    if (i >= 1_000) times.push((performance.now() - from) / 2);
    // A silent room: the next line is not of the same turn.
    if (i % 10 === 0) await new Promise((resolve) => setTimeout(resolve, 1));
  }
  times.sort((a, b) => a - b);
  const at = (part: number) => times[Math.floor(part * times.length)];
  console.log(
    `latency      p50 ${at(0.5).toFixed(3)} ms   p99 ${at(0.99).toFixed(3)} ms`,
  );
}

async function lines(
  room: Room,
  people: number,
  count: number,
  report: (line: string) => void = console.log,
): Promise<void> {
  const line = encoder.encode("x".repeat(LINE_BYTES - 1) + "\n");
  const paste = encoder.encode(decoder.decode(line).repeat(1024));
  let acknowledged = 0;
  let more = Promise.withResolvers<void>();
  const settled = Promise.withResolvers<number>();
  room.receive = (lines) => {
    for (const text of decoder.decode(lines).trimEnd().split("\n")) {
      if (text.startsWith("#")) settled.resolve(Number(text.slice(1)));
      else acknowledged = Number(text);
    }
    more.resolve();
    more = Promise.withResolvers();
  };
  const used = processor(), from = performance.now();
  for (let bytes = 0; bytes < count * LINE_BYTES;) {
    if (bytes - acknowledged > ON_THE_WAY_BYTES) {
      await more.promise;
      continue;
    }
    if (people === 1) {
      room.sayLocal("p0", paste);
      bytes += paste.length;
    } else {
      for (let i = 0; i < people; i++) room.sayLocal(`p${i}`, line);
      bytes += people * LINE_BYTES;
    }
    await new Promise((resolve) => setImmediate(resolve));
  }
  const own = processor() - used;
  room.sayLocal("p0", "#");
  const other = await settled.promise;
  const seconds = (performance.now() - from) / 1000;
  const each = (micros: number) => (micros / count).toFixed(2);
  report(
    `${people === 1 ? "1 person  " : `${people} people`}   ` +
      `${Math.round(count / seconds).toLocaleString("en")} lines a second   ` +
      `processor ${each(own)} µs a line sent, ${each(other)} received`,
  );
}

const [url] = Deno.args;
if (url) await answer(url);
else {
  await using nats = await NatsServer.start();
  const other = new Deno.Command(Deno.execPath(), {
    args: ["run", "--allow-all", import.meta.filename!, nats.url],
  }).spawn();
  const room = await open(nats.url, "tokyo");
  await meet(room);
  await latency(room);
  for (const people of [1, 100]) {
    await lines(room, people, 500_000, () => {}); // for the compilers
    await lines(room, people, 2_000_000);
  }
  other.kill();
  await other.status;
  await nats.kill();
  Deno.exit();
}
