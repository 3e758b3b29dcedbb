/**
 * The NATS client, for types and for `deno compile --include link/nats.ts`.
 *
 * `link.ts` imports the same package by a name that is not known before it runs:
 * otherwise every start of Parley would download it, linked or not. (By the name
 * of a file it would need `--allow-read`.)
 *
 * It is the core, which `@nats-io/transport-node` builds on: see `transport.ts`.
 *
 * @module
 */
// Not in the import map either: what is there is downloaded by every start.
export * from "npm:@nats-io/nats-core@3.4.0/internal";
