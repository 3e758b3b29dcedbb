/**
 * The NATS client: its types, and the file to give to `deno compile --include`.
 *
 * `link.ts` loads the same package with `import()` of a variable. With a literal
 * name, Deno would download the package at every start of Parley, linked or not;
 * and for the name of this file it would need `--allow-read`.
 *
 * This is only the core of the client; `transport.ts` makes its connections.
 *
 * @module
 */
// Not in the import map: Deno downloads what is there at every start.
export * from "npm:@nats-io/nats-core@3.4.0/internal";
