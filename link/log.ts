/**
 * What a server said to the others: an append-only log of entries, of which the
 * last 4 MiB are kept to be sent again.
 *
 * The others, and the link that publishes, are cursors into it.
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

/** How many bytes of entries are kept to be sent again. */
export const WINDOW_BYTES = 4 * 1024 * 1024;

const LF = 10;
const encoder = new TextEncoder();

/** People by name, and why they are away (`null`: they are not). */
export type People = Map<string, string | null>;

class Segment {
  readonly bytes = new Uint8Array(ENTRIES_BYTES);
  length = 0;
  entries = 0;
  /** How many lines are in it. */
  said = 0;
  next: Segment | null = null;
  /** @param first the number of the first entry
   * @param lines how many lines were said before it */
  constructor(readonly first: number, readonly lines: number) {}
}

/** A place between two entries. */
export interface Cursor {
  /** The number of the next entry. */
  number: number;
  /** How many lines were said before it. */
  lines: number;
  segment: Segment;
  offset: number;
}

/** Entries as they are sent. */
export interface Batch {
  first: number;
  lines: number;
  count: number;
  bytes: Uint8Array;
}

/** The log of one server. */
export class Log {
  /** The people after the last entry. */
  readonly people: People = new Map();
  /** The people before the first entry that is kept. */
  readonly peopleAtStart: People = new Map();
  /** How many entries there were, and lines in them. */
  end = 0;
  lines = 0;
  #head = new Segment(0, 0);
  #tail = this.#head;
  #segments = 1;
  readonly #mostSegments: number;
  /** Entries below this number were sent, and do not change any more. */
  #sealed = 0;
  /** The last entry, if lines can be added to it. */
  #open: { name: string; action: boolean; at: number; offset: number } | null =
    null;

  /** @param window how many bytes are kept */
  constructor(window: number = WINDOW_BYTES) {
    this.#mostSegments = Math.max(2, Math.floor(window / ENTRIES_BYTES));
  }

  /** The number of the first entry that is kept. */
  get start(): number {
    return this.#head.first;
  }

  /** Lines that `name` said, with their ends. */
  say(name: string, lines: Uint8Array, action: boolean): void {
    while (lines.length) {
      let length = Math.min(lines.length, SAID_BYTES);
      if (length < lines.length) {
        length = lines.lastIndexOf(LF, length - 1) + 1 || length;
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

  /** The place before entry `number`, or `null` if it is not kept or not yet. */
  seek(number: number): Cursor | null {
    if (number < this.start || number > this.end) return null;
    let segment = this.#head;
    while (segment.next && segment.next.first <= number) segment = segment.next;
    let lines = segment.lines;
    const reader = new Reader(segment.bytes);
    for (let at = segment.first; at < number; at++) {
      lines += countLines(readEntry(reader));
    }
    return { number, lines, segment, offset: reader.offset };
  }

  /** The first place that is kept. */
  first(): Cursor {
    const segment = this.#head;
    return { number: segment.first, lines: segment.lines, segment, offset: 0 };
  }

  /** Reads as many entries as one message takes and moves the cursor after
   * them, but not past `limit`. `null` if there are none. */
  read(cursor: Cursor, limit: number): Batch | null {
    if (cursor.number >= limit) return null;
    let { segment, offset } = cursor;
    if (offset === segment.length && segment.next) {
      segment = segment.next;
      offset = 0;
    }
    const after = segment.first + segment.entries;
    const { number: first, lines } = cursor;
    if (after <= limit) {
      const next = segment.next;
      Object.assign(cursor, {
        number: after,
        lines: next ? next.lines : this.lines,
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
    this.lines += count;
    if (this.#addToOpenEntry(name, lines, action, count)) return;
    // Written in its place: what a person says costs half as much as by a Writer.
    const most = 2 + NAME_BYTES + 4 + lines.length;
    if (this.#tail.length + most > ENTRIES_BYTES) this.#addSegment();
    const tail = this.#tail, { bytes, length: start } = tail;
    const { written } = encoder.encodeInto(
      name,
      bytes.subarray(start + 2, start + 2 + NAME_BYTES),
    );
    const offset = start + 2 + written, size = lines.length;
    bytes[start] = action ? Type.Action : Type.Said;
    bytes[start + 1] = written;
    putNumbers(bytes, offset, count, size);
    bytes.set(lines, offset + 4);
    tail.length = offset + 4 + size;
    tail.entries++;
    tail.said += count;
    this.#open = { name, action, at: this.end++, offset };
  }

  /** Adds lines to the last entry, if it is the same person's and was not sent:
   * one who pastes makes few entries of many lines. */
  #addToOpenEntry(
    name: string,
    lines: Uint8Array,
    action: boolean,
    count: number,
  ): boolean {
    const open = this.#open, { bytes, length } = this.#tail;
    if (
      open === null || open.at < this.#sealed || open.name !== name ||
      open.action !== action || length + lines.length > bytes.length
    ) return false;
    const { offset } = open;
    const size = length - offset - 4 + lines.length;
    if (size > SAID_BYTES) return false;
    const all = (bytes[offset] << 8) + bytes[offset + 1] + count;
    putNumbers(bytes, offset, all, size);
    bytes.set(lines, length);
    this.#tail.length += lines.length;
    this.#tail.said += count;
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
    const tail = new Segment(this.end, this.#tail.lines + this.#tail.said);
    this.#tail.next = tail;
    this.#tail = tail;
    if (++this.#segments > this.#mostSegments) this.#dropSegment();
  }

  #dropSegment(): void {
    const { bytes, length, next } = this.#head;
    const reader = new Reader(bytes.subarray(0, length));
    while (!reader.ended) applyTo(this.peopleAtStart, readEntry(reader));
    this.#head = next!;
    this.#segments--;
  }
}

/** Writes two numbers of two bytes. */
function putNumbers(
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

/** Changes `people` as an entry says. */
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
