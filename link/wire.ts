/**
 * The messages of a link, as bytes. `link.ts` says what they mean.
 *
 * All numbers are big-endian. A message is a header of 12 bytes and a body:
 *
 * ```text
 * "P"  version (1)  kind  flags  identity of the sender (8)
 * ```
 *
 * | kind | body |
 * | --- | --- |
 * | entries | first (6), lines before it (6), count (4), entries |
 * | heartbeat | next (6), lines (6), milliseconds since the start (6) |
 * | people | next (6), lines (6), piece (4), pieces (4), people |
 * | ask | identity asked (8), mode (1), from (6) |
 * | tell | identity addressed (8), number (6), first unanswered (6), from, to, text |
 * | told | identity addressed (8), number (6), result (1) |
 * | claim | nothing |
 * | held | identity refused (8) |
 *
 * The number in parentheses is the length of a field in bytes. A name is its
 * length (1) and UTF-8. A text is its length (2) and UTF-8. _People_ are names, each
 * with a state: 0 (1) for a person who is here, or 1 (1) and the reason for a
 * person who is away.
 *
 * An entry is its type (1), the name of a person, and then
 *
 * - said, action: the number of lines (2), their length (2), and the lines
 * - joined: nothing; left: the reason; renamed: the new name; away: the state
 *
 * @module
 */

/** The longest message, in bytes; by default NATS accepts 1 MB. */
export const MESSAGE_BYTES = 65_536;
/** The most bytes of entries in one message: all but the header and the numbers
 * before the entries. */
export const ENTRIES_BYTES = MESSAGE_BYTES - 12 - 16;
/** The most bytes of lines in one entry. */
export const SAID_BYTES = 16_384;
/** The longest reason or private message, in bytes: more than the longest line,
 * which has 4,096. */
export const TEXT_BYTES = 5_000;
/** The longest name, in bytes: 24 characters of four. */
export const NAME_BYTES = 96;
/** The greatest number of an entry, which has six bytes. */
export const MAX_NUMBER = 2 ** 48 - 1;

/** The name of a server's operator, who speaks without being in the list of
 * people. */
export const HOST = "host";

const MAGIC = 80, VERSION = 1;

export const Kind = {
  Entries: 1,
  Heartbeat: 2,
  People: 3,
  Ask: 4,
  Tell: 5,
  Told: 6,
  Claim: 7,
  Held: 8,
} as const;

export const Type = {
  Said: 1,
  Action: 2,
  Joined: 3,
  Left: 4,
  Renamed: 5,
  Away: 6,
} as const;

/** Flags of a message: the room is raw; a heartbeat is wanted in answer; the
 * sender stops. */
export const RAW = 1, HELLO = 2, GOODBYE = 4;

/** Modes of asking: for the entries from a number on, or for the people of now. */
export const FROM = 0, NOW = 1;

/** What is removed from texts: control characters, line and paragraph separators,
 * and bidirectional controls. */
const CONTROLS =
  // deno-lint-ignore no-control-regex
  /[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ufeff]/g;

const encoder = new TextEncoder();
const decoder = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true });

/** Thrown for a message that is to be dropped. Its text completes the sentence "it
 * was …". */
export class BrokenMessage extends Error {
  override name = "BrokenMessage";
}

/** Writes a message or an entry. */
export class Writer {
  bytes: Uint8Array<ArrayBuffer>;
  length = 0;
  #view: DataView;

  constructor(size = 256) {
    this.bytes = new Uint8Array(size);
    this.#view = new DataView(this.bytes.buffer);
  }

  /** Starts a message. */
  static message(kind: number, flags: number, identity: string): Writer {
    return new Writer().u8(MAGIC).u8(VERSION).u8(kind).u8(flags)
      .identity(identity);
  }

  u8(value: number): this {
    this.#grow(1);
    this.bytes[this.length++] = value;
    return this;
  }

  u16(value: number): this {
    this.#grow(2);
    this.#view.setUint16(this.length, value);
    this.length += 2;
    return this;
  }

  u32(value: number): this {
    this.#grow(4);
    this.#view.setUint32(this.length, value);
    this.length += 4;
    return this;
  }

  u48(value: number): this {
    return this.u16(Math.floor(value / 2 ** 32)).u32(value % 2 ** 32);
  }

  identity(value: string): this {
    return this.u32(parseInt(value.slice(0, 8), 16))
      .u32(parseInt(value.slice(8), 16));
  }

  raw(bytes: Uint8Array): this {
    this.#grow(bytes.length);
    this.bytes.set(bytes, this.length);
    this.length += bytes.length;
    return this;
  }

  /** @param value no longer than {@linkcode NAME_BYTES} */
  string(value: string): this {
    const bytes = encoder.encode(value);
    return this.u8(bytes.length).raw(bytes);
  }

  /** Writes no more than {@linkcode TEXT_BYTES}, cut between characters. */
  text(value: string): this {
    const room = new Uint8Array(TEXT_BYTES);
    const { written } = encoder.encodeInto(value, room);
    return this.u16(written).raw(room.subarray(0, written));
  }

  away(reason: string | null): this {
    return reason === null ? this.u8(0) : this.u8(1).text(reason);
  }

  done(): Uint8Array<ArrayBuffer> {
    return this.bytes.subarray(0, this.length);
  }

  #grow(more: number): void {
    const needed = this.length + more;
    if (needed <= this.bytes.length) return;
    const old = this.bytes;
    this.bytes = new Uint8Array(Math.max(needed, 2 * old.length));
    this.bytes.set(old);
    this.#view = new DataView(this.bytes.buffer);
  }
}

/** Reads a message or entries. Its methods throw a {@linkcode BrokenMessage} if
 * the bytes end too early or break the format. */
export class Reader {
  offset = 0;
  #view: DataView;

  constructor(readonly bytes: Uint8Array) {
    this.#view = new DataView(bytes.buffer, bytes.byteOffset, bytes.length);
  }

  /** Reads the header of a message. */
  header(): { kind: number; flags: number; identity: string } {
    if (this.u8() !== MAGIC) throw new BrokenMessage("not Parley's");
    const version = this.u8();
    if (version !== VERSION) {
      throw new BrokenMessage(`of another version (${version})`);
    }
    return { kind: this.u8(), flags: this.u8(), identity: this.identity() };
  }

  get ended(): boolean {
    return this.offset >= this.bytes.length;
  }

  u8(): number {
    return this.bytes[this.#take(1)];
  }

  u16(): number {
    return this.#view.getUint16(this.#take(2));
  }

  u32(): number {
    return this.#view.getUint32(this.#take(4));
  }

  u48(): number {
    return this.u16() * 2 ** 32 + this.u32();
  }

  identity(): string {
    const at = this.#take(8);
    const half = (offset: number) =>
      this.#view.getUint32(offset).toString(16).padStart(8, "0");
    return half(at) + half(at + 4);
  }

  raw(length: number): Uint8Array {
    const at = this.#take(length);
    return this.bytes.subarray(at, at + length);
  }

  string(): string {
    const length = this.u8();
    if (length > NAME_BYTES) throw new BrokenMessage("with too long a name");
    return this.#decode(this.#take(length), length);
  }

  /** Reads a text, without control characters. */
  text(): string {
    const length = this.u16();
    if (length > TEXT_BYTES) throw new BrokenMessage("with too long a text");
    return this.#decode(this.#take(length), length).replace(CONTROLS, "");
  }

  away(): string | null {
    return this.u8() === 0 ? null : this.text();
  }

  /** Throws if bytes are left. */
  end(): void {
    if (!this.ended) throw new BrokenMessage("too long");
  }

  #decode(at: number, length: number): string {
    // For a short name in ASCII this takes a fifth of the decoder's time.
    let text = "";
    for (let i = at; i < at + length; i++) {
      const byte = this.bytes[i];
      if (byte >= 128 || length > 24) {
        return this.#decodeUtf8(this.bytes.subarray(at, at + length));
      }
      text += String.fromCharCode(byte);
    }
    return text;
  }

  #decodeUtf8(bytes: Uint8Array): string {
    try {
      return decoder.decode(bytes);
    } catch {
      throw new BrokenMessage("with text that is not UTF-8");
    }
  }

  #take(length: number): number {
    const at = this.offset;
    if (at + length > this.bytes.length) throw new BrokenMessage("cut short");
    this.offset = at + length;
    return at;
  }
}

/** An entry of a log. */
export type Entry =
  & { name: string }
  & (
    | {
      type: typeof Type.Said | typeof Type.Action;
      lines: Uint8Array;
      count: number;
    }
    | { type: typeof Type.Joined }
    | { type: typeof Type.Left; reason: string }
    | { type: typeof Type.Renamed; to: string }
    | { type: typeof Type.Away; away: string | null }
  );

/** How many lines an entry has. */
export function countLines(entry: Entry): number {
  return "count" in entry ? entry.count : 0;
}

/** Reads the next entry. */
export function readEntry(reader: Reader): Entry {
  const type = reader.u8(), name = reader.string();
  switch (type) {
    case Type.Said:
    case Type.Action: {
      const count = reader.u16(), length = reader.u16();
      if (length > SAID_BYTES || count > length) {
        throw new BrokenMessage("with too many lines");
      }
      return { type, name, count, lines: reader.raw(length) };
    }
    case Type.Joined:
      return { type, name };
    case Type.Left:
      return { type, name, reason: reader.text() };
    case Type.Renamed:
      return { type, name, to: reader.string() };
    case Type.Away:
      return { type, name, away: reader.away() };
  }
  throw new BrokenMessage("with an unknown entry");
}
