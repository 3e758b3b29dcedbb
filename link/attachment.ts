/**
 * What a link needs of a chat server.
 *
 * @module
 */

/** What a chat server tells a link about its own people and lines. Names are local
 * ones, without `@`. */
export interface LinkEvents {
  /** A person sent lines to everyone: whole lines with their ends (LF), cleaned,
   * without the name. With `action` it is the text of one `/me`. In a raw room
   * `name` is empty. */
  said(name: string, lines: Uint8Array, action: boolean): void;
  /** A person has joined. */
  joined(name: string): void;
  /** A person has left; `reason` may be empty. */
  left(name: string, reason: string): void;
  /** A person has changed their name. */
  renamed(from: string, to: string): void;
  /** A person is away, or back (`null`). */
  away(name: string, reason: string | null): void;
  /** A local person sent a private message to a person added by the link, such as
   * `bob@paris`. */
  toldPrivately(from: string, to: string, text: string): void;
  /** The chat server stops. It waits for the promise, but at most a second. */
  stopping(): Promise<void>;
}

/** How a link adds people and lines of other servers to the room. The names of
 * these people have one `@`, such as `alice@tokyo`. */
export interface Attachment {
  /** The local people, and why they are away; `null` if they are not. */
  people(): { name: string; away: string | null }[];
  /** Adds a person; with `announce` the room is told. `false` if the name is
   * invalid or taken. */
  add(
    name: string,
    options?: { announce?: boolean; away?: string | null },
  ): boolean;
  /** Removes a person; with `announce` the room is told, with the reason. With
   * `mayReturn` it is remembered who ignores the person, until the person is added
   * again or removed without it. */
  remove(
    name: string,
    options?: { reason?: string; announce?: boolean; mayReturn?: boolean },
  ): void;
  /** Renames a person, and tells the room. `false` if the new name is invalid or
   * taken. */
  rename(from: string, to: string): boolean;
  /** Sets why a person is away; `null` if the person is back. */
  setAway(name: string, reason: string | null): void;
  /** Sends lines of a person to everyone. They are whole lines with their ends
   * (LF), and are cleaned and limited like those of a client. */
  say(name: string, lines: Uint8Array, options?: { action?: boolean }): void;
  /** Sends a private message to a local person. `false` if there is no such
   * person. */
  tell(from: string, to: string, text: string): boolean;
  /** Answers one local person, in a line that begins with `! `. */
  answer(to: string, text: string): void;
  /** Sends a line of the link to everyone. It begins with `* `. */
  notice(text: string): void;
  /** Ends the link: the people that it has added leave the room. */
  detach(): void;
}

/** A chat server that can be linked. */
export interface Attachable {
  /** Links the room. The methods of `events` are called for what happens in it.
   * `name` is what the others call this server. */
  attach(events: LinkEvents, options?: { name?: string }): Attachment;
}
