/**
 * A chat server without clients, for the tests: it records what a client of its
 * room would see.
 *
 * @module
 */
import type { Attachable, Attachment, LinkEvents } from "./attachment.ts";

const encoder = new TextEncoder(), decoder = new TextDecoder();

export class FakeServer implements Attachable, Attachment {
  /** What a client would see, in lines. */
  readonly lines: string[] = [];
  /** How many bytes of lines came from elsewhere; `lines` can be left out. */
  bytes = 0;
  recording = true;
  /** What the link should not have done. */
  readonly mistakes: string[] = [];
  /** Everyone here: local people, and people elsewhere. */
  readonly here = new Map<string, string | null>();
  /** People elsewhere who may return. */
  readonly absent = new Set<string>();
  readonly #local = new Set<string>();
  #events: LinkEvents | null = null;
  #changed = Promise.withResolvers<void>();

  // -- what local people do

  join(name: string): void {
    this.#local.add(name);
    this.here.set(name, null);
    this.#events?.joined(name);
  }

  leave(name: string, reason = ""): void {
    this.#local.delete(name);
    this.here.delete(name);
    this.#events?.left(name, reason);
  }

  renameLocal(from: string, to: string): void {
    this.#local.delete(from);
    this.#local.add(to);
    this.here.set(to, this.here.get(from) ?? null);
    this.here.delete(from);
    this.#events?.renamed(from, to);
  }

  sayAway(name: string, reason: string | null): void {
    this.here.set(name, reason);
    this.#events?.away(name, reason);
  }

  /** A local person says lines (a text without the last line end, or bytes). */
  sayLocal(name: string, text: string | Uint8Array, action = false): void {
    const lines = typeof text === "string" ? encoder.encode(text + "\n") : text;
    this.#events?.said(name, lines, action);
  }

  message(from: string, to: string, text: string): void {
    this.#events?.toldPrivately(from, to, text);
  }

  async stop(): Promise<void> {
    await this.#events?.stopping();
  }

  get attached(): boolean {
    return this.#events !== null;
  }

  /** Waits until a client has seen `line`, in seconds. */
  async sees(line: string | RegExp, { within = 10 } = {}): Promise<string> {
    const isIt = (it: string) =>
      typeof line === "string" ? it === line : line.test(it);
    await this.until(() => this.lines.some(isIt), `${line}`, within);
    return this.lines.find(isIt)!;
  }

  async until(
    holds: () => boolean,
    what: string,
    within = 10,
  ): Promise<void> {
    const end = performance.now() + within * 1000;
    while (!holds()) {
      const left = end - performance.now();
      if (left <= 0) {
        const last = this.lines.slice(-20).join("\n");
        throw new Error(
          `Not in ${within} s: ${what}; the last lines:\n${last}`,
        );
      }
      let timer;
      const late = new Promise<void>((resolve) => {
        timer = setTimeout(resolve, Math.min(left, 200));
      });
      await Promise.race([this.#changed.promise, late]);
      clearTimeout(timer);
    }
  }

  #see(line: string): void {
    if (this.recording) this.lines.push(line);
    this.#changed.resolve();
    this.#changed = Promise.withResolvers();
  }

  // -- what the link does

  #fail(mistake: string): never {
    this.mistakes.push(mistake);
    throw new Error(mistake);
  }

  attach(events: LinkEvents): Attachment {
    this.#events = events;
    return this;
  }

  people(): { name: string; away: string | null }[] {
    return Array.from(
      this.#local,
      (name) => ({ name, away: this.here.get(name) ?? null }),
    );
  }

  add(
    name: string,
    { announce, away }: { announce?: boolean; away?: string | null } = {},
  ): boolean {
    if (!/^[^@]+@[^@]+$/.test(name)) this.#fail(`Added ${name}`);
    if (this.here.has(name)) return false;
    this.here.set(name, away ?? null);
    this.absent.delete(name);
    if (announce) this.#see(`* ${name} has entered the room`);
    return true;
  }

  remove(
    name: string,
    { reason, announce, mayReturn }: {
      reason?: string;
      announce?: boolean;
      mayReturn?: boolean;
    } = {},
  ): void {
    const wasAbsent = this.absent.delete(name);
    if (!this.here.delete(name) && !wasAbsent) this.#fail(`Removed ${name}`);
    if (mayReturn) this.absent.add(name);
    const why = reason ? ` (${reason})` : "";
    if (announce) this.#see(`* ${name} has left the room${why}`);
  }

  rename(from: string, to: string): boolean {
    const away = this.here.get(from);
    if (away === undefined) this.#fail(`Renamed ${from}`);
    if (this.here.has(to)) return false;
    this.here.delete(from);
    this.here.set(to, away);
    this.#see(`* ${from} is now known as ${to}`);
    return true;
  }

  setAway(name: string, reason: string | null): void {
    if (!this.here.has(name)) this.#fail(`Away ${name}`);
    this.here.set(name, reason);
  }

  say(
    name: string,
    lines: Uint8Array,
    { action }: { action?: boolean } = {},
  ): void {
    this.bytes += lines.length;
    if (!this.recording) return this.#see("");
    for (const line of decoder.decode(lines).split("\n").slice(0, -1)) {
      const mark = name === "" ? "" : action ? `** ${name} ` : `[${name}] `;
      this.#see(mark + line);
    }
  }

  tell(from: string, to: string, text: string): boolean {
    if (to !== "host" && !this.#local.has(to)) return false;
    this.#see(`[${from} -> ${to}] ${text}`);
    return true;
  }

  answer(to: string, text: string): void {
    this.#see(`! (${to}) ${text}`);
  }

  notice(text: string): void {
    this.#see(`* ${text}`);
  }

  detach(): void {
    this.#events = null;
    for (const name of this.here.keys()) {
      if (name.includes("@")) this.here.delete(name);
    }
  }
}
