/**
 * What a link needs of a chat server.
 *
 * @module
 */

import type { Attachment, LinkEvents } from "../main.ts";

export type { Attachment, LinkEvents };

/** A chat server that can be linked. */
export interface Attachable {
  /** Links the room. The methods of `events` are called for what happens in it.
   * `name` is what the others call this server. */
  attach(events: LinkEvents, options?: { name?: string }): Attachment;
}
