/**
 * What happens on this server, for the others: an append-only log of numbered
 * entries. The last 4 MiB are kept, so that entries can be sent again.
 *
 * @module
 */
import {
  countLines,
  ENTRIES_BYTES,
  type Entry,
  NAME_BYTES,
  readEntry,
  Reader,
  SAID_BYTES,
  Type,
  Writer,
} from "./wire.ts";

const WINDOW_BYTES = 4 * 1024 * 1024;

const LF = 10;
const encoder = new TextEncoder();

/** Why each person is away, by name; `null` for a person who is not. */
export type People = Map<string, string | null>;

/** A part of the log, which fits in one message. */
class Segment {
  readonly bytes = new Uint8Array(ENTRIES_BYTES);
  /** How many of the bytes are used. */
  length = 0;
  /** How many entries are in it, and how many lines in them. */
  entries = 0;
  lines = 0;
  next: Segment | null = null;

  /** @param first the number of the first entry
   * @param linesBefore how many lines there are before it in the log */
  constructor(readonly first: number, readonly linesBefore: number) {}
}

/** A position between two entries. */
export interface Cursor {
  /** The number of the next entry. */
  number: number;
  /** How many lines there are before it. */
  lines: number;
  /** Where it is in memory. */
  segment: Segment;
  offset: number;
}

/** Entries for one message. */
export interface Batch {
  /** The number of the first entry, and how many lines there are before it. */
  first: number;
  lines: number;
  /** How many entries there are. */
  count: number;
  bytes: Uint8Array;
}

/** The log of one server. */
export class Log {
  /** The people after the last entry. */
  readonly people: People = new Map();
  /** The people before the first entry that is kept. */
  readonly peopleAtStart: People = new Map();
  /** The number of the next entry. */
  end = 0;
  #head = new Segment(0, 0);
  #tail = this.#head;
  #segments = 1;
  readonly #maxSegments: number;
  /** Entries below this number have been sent, and do not change any more. */
  #sealed = 0;
  /** The last entry, if more lines of the same person can be added to it. `offset`
   * is that of its number of lines. */
  #open:
    | { name: string; action: boolean; number: number; offset: number }
    | null = null;

  /** @param window how many bytes are kept; at least two segments are */
  constructor(window: number = WINDOW_BYTES) {
    this.#maxSegments = Math.max(2, Math.floor(window / ENTRIES_BYTES));
  }

  /** The number of the first entry that is kept. */
  get start(): number {
    return this.#head.first;
  }

  /** Adds whole lines of a person, with their ends (LF). */
  say(name: string, lines: Uint8Array, action: boolean): void {
    while (lines.length) {
      let length = lines.length;
      if (length > SAID_BYTES) {
        length = lines.lastIndexOf(LF, SAID_BYTES - 1) + 1 || SAID_BYTES;
      }
      this.#addLines(name, lines.subarray(0, length), action);
      lines = lines.subarray(length);
    }
  }

  join(name: string, away: string | null): void {
    this.#add(new Writer().u8(Type.Joined).string(name));
    if (away !== null) this.setAway(name, away);
  }

  leave(name: string, reason: string): void {
    this.#add(new Writer().u8(Type.Left).string(name).text(reason));
  }

  rename(from: string, to: string): void {
    this.#add(new Writer().u8(Type.Renamed).string(from).string(to));
  }

  setAway(name: string, reason: string | null): void {
    this.#add(new Writer().u8(Type.Away).string(name).away(reason));
  }

  /** The position before entry `number`; `null` if that entry is not kept any more
   * or does not exist. */
  seek(number: number): Cursor | null {
    if (number < this.start || number > this.end) return null;
    let segment = this.#head;
    while (segment.next && segment.next.first <= number) segment = segment.next;
    let lines = segment.linesBefore;
    const reader = new Reader(segment.bytes);
    for (let at = segment.first; at < number; at++) {
      lines += countLines(readEntry(reader));
    }
    return { number, lines, segment, offset: reader.offset };
  }

  /** The position before the first entry that is kept. */
  first(): Cursor {
    const segment = this.#head, { first: number, linesBefore: lines } = segment;
    return { number, lines, segment, offset: 0 };
  }

  /** Reads as many entries as fit in one message, but none from number `limit` on,
   * and moves the cursor behind them. `null` if there are none. */
  read(cursor: Cursor, limit: number): Batch | null {
    if (cursor.number >= limit) return null;
    let { segment, offset } = cursor;
    if (offset === segment.length && segment.next) {
      segment = segment.next;
      offset = 0;
    }
    const end = segment.first + segment.entries;
    const { number: first, lines } = cursor;
    if (end <= limit) {
      Object.assign(cursor, {
        number: end,
        lines: segment.linesBefore + segment.lines,
        segment,
        offset: segment.length,
      });
    } else Object.assign(cursor, this.seek(limit));
    this.#sealed = Math.max(this.#sealed, cursor.number);
    return {
      first,
      lines,
      count: cursor.number - first,
      bytes: segment.bytes.subarray(offset, cursor.offset),
    };
  }

  #addLines(name: string, lines: Uint8Array, action: boolean): void {
    let count = 0;
    for (let at = -1; (at = lines.indexOf(LF, at + 1)) >= 0;) count++;
    if (this.#addToOpenEntry(name, lines, action, count)) return;
    // Written in place, which takes half the time of a Writer.
    const maxLength = 2 + NAME_BYTES + 4 + lines.length;
    if (this.#tail.length + maxLength > ENTRIES_BYTES) this.#addSegment();
    const tail = this.#tail, { bytes, length: start } = tail;
    const { written } = encoder.encodeInto(
      name,
      bytes.subarray(start + 2, start + 2 + NAME_BYTES),
    );
    const offset = start + 2 + written, size = lines.length;
    bytes[start] = action ? Type.Action : Type.Said;
    bytes[start + 1] = written;
    putU16Pair(bytes, offset, count, size);
    bytes.set(lines, offset + 4);
    tail.length = offset + 4 + size;
    tail.entries++;
    tail.lines += count;
    this.#open = { name, action, number: this.end++, offset };
  }

  /** Adds lines to the last entry, if it has the same author and has not been sent:
   * a paste makes few entries of many lines. */
  #addToOpenEntry(
    name: string,
    lines: Uint8Array,
    action: boolean,
    count: number,
  ): boolean {
    const open = this.#open, { bytes, length } = this.#tail;
    if (
      open === null || open.number < this.#sealed || open.name !== name ||
      open.action !== action || length + lines.length > bytes.length
    ) return false;
    const { offset } = open;
    const size = length - offset - 4 + lines.length;
    if (size > SAID_BYTES) return false;
    const total = (bytes[offset] << 8) + bytes[offset + 1] + count;
    putU16Pair(bytes, offset, total, size);
    bytes.set(lines, length);
    this.#tail.length += lines.length;
    this.#tail.lines += count;
    return true;
  }

  /** Adds an entry about a person. */
  #add(entry: Writer): void {
    this.#open = null;
    const bytes = entry.done();
    if (this.#tail.length + bytes.length > ENTRIES_BYTES) this.#addSegment();
    applyTo(this.people, readEntry(new Reader(bytes)));
    const tail = this.#tail;
    tail.bytes.set(bytes, tail.length);
    tail.length += bytes.length;
    tail.entries++;
    this.end++;
  }

  #addSegment(): void {
    const { linesBefore, lines } = this.#tail;
    const tail = new Segment(this.end, linesBefore + lines);
    this.#tail.next = tail;
    this.#tail = tail;
    if (++this.#segments > this.#maxSegments) this.#dropSegment();
  }

  #dropSegment(): void {
    const { bytes, length, next } = this.#head;
    const reader = new Reader(bytes.subarray(0, length));
    while (!reader.ended) applyTo(this.peopleAtStart, readEntry(reader));
    this.#head = next!;
    this.#segments--;
  }
}

function putU16Pair(
  bytes: Uint8Array,
  offset: number,
  first: number,
  second: number,
): void {
  bytes[offset] = first >> 8;
  bytes[offset + 1] = first;
  bytes[offset + 2] = second >> 8;
  bytes[offset + 3] = second;
}

function applyTo(people: People, entry: Entry): void {
  const { type, name } = entry;
  if (type === Type.Joined) people.set(name, null);
  else if (type === Type.Left) people.delete(name);
  else if (type === Type.Away && people.has(name)) people.set(name, entry.away);
  else if (type === Type.Renamed) {
    const away = people.get(name) ?? null;
    people.delete(name);
    people.set(entry.to, away);
  }
}
