/**
 * What a link uses of a chat server.
 *
 * @module
 */

/** What a link is told of the people and lines of its own server. Names are
 * local ones, without `@`. */
export interface LinkEvents {
  /** Lines that everyone receives: whole lines with their ends (LF), cleaned,
   * without a name in front; with `action` the text of one `/me`. In a raw room
   * `name` is empty. */
  said(name: string, lines: Uint8Array, action: boolean): void;
  /** A person is here from now on. */
  joined(name: string): void;
  /** A person has left; `reason` may be empty. */
  left(name: string, reason: string): void;
  /** A person has another name. */
  renamed(from: string, to: string): void;
  /** `reason` is `null` when the person is back. */
  away(name: string, reason: string | null): void;
  /** A private message of a local person to a person that the link has added,
   * such as `bob@paris`. */
  toldPrivately(from: string, to: string, text: string): void;
  /** The server stops: the others are told. The server waits at most a second. */
  stopping(): Promise<void>;
}

/** How a link puts people and lines from elsewhere into the room. Names of
 * people elsewhere hold one `@`, such as `alice@tokyo`. */
export interface Attachment {
  /** The local people now, and why they are away (`null`: they are not). */
  people(): { name: string; away: string | null }[];
  /** Adds a person; `announce`: the room is told. `false` if the name is none
   * or is there already. */
  add(
    name: string,
    options?: { announce?: boolean; away?: string | null },
  ): boolean;
  /** Takes a person out; `announce`: the room is told, with the reason. */
  remove(
    name: string,
    options?: { reason?: string; announce?: boolean },
  ): void;
  /** `false` if the new name is none or is there already. */
  rename(from: string, to: string): boolean;
  /** Says why a person is away; `null`: the person is back. */
  setAway(name: string, reason: string | null): void;
  /** Public lines of a person elsewhere, with their ends (LF). They are cleaned
   * and cut like any client's. */
  say(name: string, lines: Uint8Array, options?: { action?: boolean }): void;
  /** A private message to a local person; `false` if nobody is called that. */
  tell(from: string, to: string, text: string): boolean;
  /** An answer to one local person, in a line that begins with `! `. */
  answer(to: string, text: string): void;
  /** One line of the link to everyone, which begins with `* `. */
  notice(text: string): void;
  /** Ends the link: everyone whom it has added leaves the room. */
  detach(): void;
}

/** A chat server that can be linked. */
export interface Attachable {
  /** Links the room: `events` is told what happens in it. */
  attach(events: LinkEvents): Attachment;
}
