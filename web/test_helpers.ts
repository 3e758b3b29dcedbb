/** What the tests of the web listener and of the page share. */
import { TextLineStream as UntypedLineStream } from "@std/streams/text-line-stream";
import { ChatServer, type Options } from "../main.ts";
import { type WebOptions, WebServer } from "./web.ts";

// The npm build of @std has no types.
const TextLineStream: new () => TransformStream<string, string> =
  UntypedLineStream;

const WAIT_MILLISECONDS = 10_000;
const encoder = new TextEncoder();

/** Resolves like `promise`, or fails when that takes too long. */
export async function within<T>(
  promise: Promise<T>,
  what: string,
  milliseconds = WAIT_MILLISECONDS,
): Promise<T> {
  let timer;
  const late = new Promise<never>((_, reject) => {
    timer = setTimeout(() => reject(new Error(`Late: ${what}`)), milliseconds);
  });
  try {
    return await Promise.race([promise, late]);
  } finally {
    clearTimeout(timer);
  }
}

/** Waits until `check` holds. */
export async function eventually(
  check: () => boolean | Promise<boolean>,
  what: string,
): Promise<void> {
  const end = performance.now() + WAIT_MILLISECONDS;
  while (!await check()) {
    if (performance.now() > end) throw new Error(`Late: ${what}`);
    await new Promise((resolve) => setTimeout(resolve, 10));
  }
}

/** A room with a page, in this process. */
export async function open(
  options: Partial<Options> = {},
  webOptions: Partial<WebOptions> = {},
) {
  const printed: string[] = [];
  const server = ChatServer.listen(
    { host: "127.0.0.1", port: 0, ...options },
    { print: (line) => printed.push(line) },
  );
  const web = await WebServer.listen(server, {
    host: "127.0.0.1",
    port: 0,
    rate: options.rate,
    raw: options.raw,
    password: Boolean(options.passwordFile),
    ...webOptions,
  });
  return {
    server,
    web,
    url: web.url,
    printed,
    async [Symbol.asyncDispose]() {
      await server.stop();
      await web.close();
    },
  };
}

/** Someone with nc. */
export class Terminal implements AsyncDisposable {
  readonly #reader: ReadableStreamDefaultReader<string>;

  private constructor(readonly conn: Deno.TcpConn) {
    this.#reader = conn.readable.pipeThrough(new TextDecoderStream())
      .pipeThrough(new TextLineStream()).getReader();
  }

  static async join(server: ChatServer, name: string): Promise<Terminal> {
    const { port } = server.addr;
    const conn = await Deno.connect({ hostname: "127.0.0.1", port });
    const terminal = new Terminal(conn);
    await terminal.find(/^\* (?:Here now|Nobody else)/);
    await terminal.say(`/nick ${name}`);
    await terminal.find(new RegExp(`is now known as ${name}$`));
    return terminal;
  }

  /** Sends lines. */
  async say(...lines: string[]): Promise<void> {
    let bytes = encoder.encode(lines.map((line) => line + "\n").join(""));
    while (bytes.length > 0) {
      bytes = bytes.subarray(await this.conn.write(bytes));
    }
  }

  /** The next line; `null` at the end. */
  async next(): Promise<string | null> {
    const { done, value } = await within(this.#reader.read(), "a line");
    return done ? null : value;
  }

  /** The next line that matches, whatever comes before it. */
  async find(pattern: RegExp): Promise<string> {
    const passed: string[] = [];
    for (let line; (line = await this.next()) !== null;) {
      if (pattern.test(line)) return line;
      passed.push(line);
    }
    throw new Error(`No line ${pattern} in: ${passed.join(" | ")}`);
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.#reader.cancel().catch(() => {});
  }
}

/** A certificate for 127.0.0.1 and localhost, made by openssl. */
export async function makeCertificate(): Promise<{
  certPath: string;
  keyPath: string;
  cert: string;
  key: string;
}> {
  const directory = await Deno.makeTempDir();
  const certPath = `${directory}/cert.pem`, keyPath = `${directory}/key.pem`;
  const { success } = await new Deno.Command("openssl", {
    // deno-fmt-ignore: an option and its value
    args: [
      "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256",
      "-nodes", "-days", "2", "-subj", "/CN=localhost",
      "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1",
      "-addext", "basicConstraints=critical,CA:FALSE",
      "-out", certPath, "-keyout", keyPath,
    ],
    stderr: "null",
  }).output();
  if (!success) throw new Error("Cannot make a certificate with openssl");
  return {
    certPath,
    keyPath,
    cert: await Deno.readTextFile(certPath),
    key: await Deno.readTextFile(keyPath),
  };
}
