/**
 * TCP and TLS for the NATS client, with the APIs of Deno.
 *
 * `@nats-io/transport-node` does the same with `node:net`. But if a connection is
 * reset while it closes, as after a wrong password, an error can be emitted after
 * its listeners have been removed, which ends the process: in 19 of 600
 * connections to a server on the same machine.
 *
 * @module
 */
import type * as Nats from "./nats.ts";

/** The longest INFO message, with which a NATS server begins, in bytes. */
const INFO_BYTES = 65_536;

const READ_BYTES = 65_536;

const LF = 10;

/** One connection to a NATS server. */
export class DenoTransport implements Nats.Transport {
  readonly lang = "deno";
  readonly version = "1.0.0";
  closeError?: Error;
  isClosed = false;
  #conn: Deno.TcpConn | Deno.TlsConn | null = null;
  #encrypted = false;
  /** The INFO message. The client reads it too. */
  #info = new Uint8Array(0);
  /** Frames that are not written yet. The room bounds them: at most 2 MiB. */
  #pending: Uint8Array[] = [];
  #writing = false;
  readonly #closed = Promise.withResolvers<void | Error>();

  async connect(
    { hostname, port }: Nats.Server,
    { tls }: Nats.ConnectionOptions,
  ): Promise<void> {
    try {
      const conn = this.#use(await Deno.connect({ hostname, port }));
      conn.setNoDelay(true);
      const info = await this.#readInfo(conn);
      if (info.tls_required || info.tls_available || tls) {
        if (!info.tls_required && !info.tls_available) {
          throw new Error("the server does not use TLS");
        }
        this.#use(await Deno.startTls(conn, { hostname }));
        await (this.#conn as Deno.TlsConn).handshake();
        this.#encrypted = true;
      }
    } catch (error) {
      this.#end(error as Error);
      throw error;
    }
  }

  async *[Symbol.asyncIterator](): AsyncIterableIterator<Uint8Array> {
    yield this.#info;
    const buffer = new Uint8Array(READ_BYTES);
    try {
      while (!this.isClosed) {
        const count = await this.#conn!.read(buffer);
        if (count === null) break;
        // A copy: the client may keep a part, and the buffer is used again.
        yield buffer.slice(0, count);
      }
      this.#end();
    } catch (error) {
      this.#end(error as Error);
    }
  }

  send(frame: Uint8Array): void {
    if (this.isClosed) return;
    this.#pending.push(frame);
    if (!this.#writing) this.#write();
  }

  isEncrypted(): boolean {
    return this.#encrypted;
  }

  closed(): Promise<void | Error> {
    return this.#closed.promise;
  }

  close(error?: Error): Promise<void> {
    this.#end(error);
    return Promise.resolve();
  }

  disconnect(): void {
    this.#end();
  }

  discard(): void {
    this.#end();
  }

  /** Keeps a new connection, unless the transport was closed meanwhile. */
  #use<Conn extends Deno.TcpConn | Deno.TlsConn>(conn: Conn): Conn {
    this.#conn = conn;
    if (!this.isClosed) return conn;
    conn.close();
    throw new Error("it was closed");
  }

  async #readInfo(conn: Deno.TcpConn): Promise<Nats.ServerInfo> {
    const bytes = new Uint8Array(INFO_BYTES);
    let length = 0;
    while (bytes[length - 1] !== LF) {
      const count = length < INFO_BYTES
        ? await conn.read(bytes.subarray(length))
        : null;
      if (count === null) throw new Error("no NATS server answers there");
      length += count;
    }
    this.#info = bytes.slice(0, length);
    const text = new TextDecoder().decode(this.#info);
    const [, json] = /^INFO\s+(\{.*\})\s*$/.exec(text) ?? [];
    if (json === undefined) throw new Error("no NATS server answers there");
    return JSON.parse(json);
  }

  async #write(): Promise<void> {
    this.#writing = true;
    try {
      for (let frame; (frame = this.#pending.shift()) !== undefined;) {
        while (frame.length) {
          frame = frame.subarray(await this.#conn!.write(frame));
        }
      }
    } catch (error) {
      this.#end(error as Error);
    }
    this.#writing = false;
  }

  #end(error?: Error): void {
    if (this.isClosed) return;
    this.isClosed = true;
    this.closeError = error;
    this.#pending = [];
    try {
      this.#conn?.close();
    } catch { /* startTls has taken it over, and closes it */ }
    this.#closed.resolve(error);
  }
}
