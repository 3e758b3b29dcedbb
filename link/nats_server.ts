/**
 * A `nats-server` of its own for each test.
 *
 * @module
 */

export async function hasNatsServer(): Promise<boolean> {
  return await new Deno.Command("nats-server", {
    args: ["--version"],
    stdout: "null",
    stderr: "null",
  }).output().then(({ success }) => success, () => false);
}

export function freePort(): number {
  using listener = Deno.listen({ hostname: "127.0.0.1", port: 0 });
  return listener.addr.port;
}

export class NatsServer implements AsyncDisposable {
  #process: Deno.ChildProcess | null = null;

  private constructor(
    readonly port: number,
    readonly args: string[],
    readonly file?: string,
  ) {}

  /** @param config the text of a configuration file, or none */
  static async start(config?: string, port = freePort()): Promise<NatsServer> {
    const args = ["-a", "127.0.0.1", "-p", `${port}`];
    let file;
    if (config !== undefined) {
      file = await Deno.makeTempFile({ suffix: ".conf" });
      await Deno.writeTextFile(file, config);
      args.push("-c", file);
    }
    const server = new NatsServer(port, args, file);
    await server.start();
    return server;
  }

  get url(): string {
    return `nats://127.0.0.1:${this.port}`;
  }

  async start(): Promise<void> {
    this.#process = new Deno.Command("nats-server", {
      args: this.args,
      stdout: "null",
      stderr: "null",
    }).spawn();
    const end = performance.now() + 10_000;
    while (!await this.#answers()) {
      if (performance.now() > end) {
        throw new Error("nats-server does not start");
      }
      await new Promise((resolve) => setTimeout(resolve, 20));
    }
  }

  async #answers(): Promise<boolean> {
    try {
      using conn = await Deno.connect({
        hostname: "127.0.0.1",
        port: this.port,
      });
      return await conn.read(new Uint8Array(1)) !== null;
    } catch {
      return false;
    }
  }

  async kill(): Promise<void> {
    if (!this.#process) return;
    this.#process.kill("SIGKILL");
    await this.#process.status;
    this.#process = null;
  }

  pause(): void {
    this.#process!.kill("SIGSTOP");
  }

  resume(): void {
    this.#process!.kill("SIGCONT");
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.kill();
    if (this.file) await Deno.remove(this.file);
  }
}
