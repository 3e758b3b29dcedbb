/**
 * The clients that people have, run as programs against a room in this process.
 * Where a program is not installed, its tests are reported as ignored.
 */
import { assertEquals } from "@std/assert";
import {
  connectTls,
  eventually,
  finished,
  GOODBYE,
  installed,
  Lines,
  LINUX,
  open,
  OPENSSL,
  tlsOptions,
  within,
} from "./helpers.ts";

const encoder = new TextEncoder();

// Debian installs tt++ there, which is not on everyone's path.
Deno.env.set("PATH", `${Deno.env.get("PATH")}:/usr/games`);

/** The clients that busybox has: which ones, its distributor chose. */
const BUSYBOX = installed("busybox")
  ? (await finished(new Deno.Command("busybox", { args: ["--list"] }))).output
    .split("\n")
  : [];

/** Whether the program that a command starts is installed. */
function canStart(command: string): boolean {
  const words = command.split(" ");
  if (words[0] === "busybox") return BUSYBOX.includes(words[1]);
  if (words[0] === "rlwrap" && !installed("nc.openbsd")) return false;
  return installed(words[0]);
}

/** A client program: its lines are what it prints. */
class ClientProgram extends Lines {
  readonly #child: Deno.ChildProcess;
  readonly #input: WritableStreamDefaultWriter<Uint8Array>;

  private constructor(child: Deno.ChildProcess) {
    super(showReturns(child.stdout));
    this.#child = child;
    this.#input = child.stdin.getWriter();
  }

  static start(command: string): ClientProgram {
    return new ClientProgram(
      new Deno.Command("sh", {
        args: ["-c", `exec ${command}`],
        stdin: "piped",
        stdout: "piped",
        stderr: "null",
      }).spawn(),
    );
  }

  async type(text: string): Promise<void> {
    await this.#input.write(encoder.encode(text));
  }

  /** Ends its standard input. */
  async typeEnd(): Promise<void> {
    await this.#input.close();
  }

  /** Waits until it exits by itself. */
  async exited(): Promise<void> {
    await within(this.#child.status, "the client's exit");
  }

  /** Presses Enter until it exits. */
  async pressEnter(): Promise<void> {
    let running = true;
    this.#child.status.then(() => running = false);
    await eventually(async () => {
      if (running) await this.type("\n").catch(() => {});
      return !running;
    }, "the client's exit");
  }

  override async [Symbol.asyncDispose](): Promise<void> {
    try {
      this.#child.kill("SIGKILL");
    } catch { /* it has ended already */ }
    await this.#child.status;
    await this.#input.close().catch(() => {});
    await super[Symbol.asyncDispose]();
  }
}

/** Shows a carriage return as `^`: a line stream takes CR LF for LF, and would
 * hide one that the server should not have sent. */
function showReturns(bytes: ReadableStream<Uint8Array<ArrayBuffer>>) {
  return bytes.pipeThrough(
    new TransformStream<Uint8Array<ArrayBuffer>, Uint8Array<ArrayBuffer>>({
      transform: (chunk, controller) =>
        controller.enqueue(chunk.map((byte) => byte === 13 ? 94 : byte)),
    }),
  );
}

/** Opens a room in which guest1 is, and the client program becomes guest2. */
async function meet(command: string, { encrypted = false, piped = "" } = {}) {
  await using opened = new AsyncDisposableStack();
  const server = opened.use(open(encrypted ? await tlsOptions() : {}));
  const conn = opened.use(
    encrypted
      ? await connectTls(server.port)
      : await Deno.connect({ hostname: "127.0.0.1", port: server.port }),
  );
  const room = opened.use(new Lines(showReturns(conn.readable)));
  await room.find(/^\* Nobody else is here yet\./);
  const client = opened.use(
    ClientProgram.start(command.replace("PORT", String(server.port))),
  );
  if (piped) {
    await client.type(piped);
    await client.typeEnd();
  }
  assertEquals(await room.next(), "* guest2 has entered the room");
  const all = opened.move();
  return {
    client,
    /** What guest1 receives. */
    room,
    /** Sends a line from guest1. */
    say: (line: string) => conn.write(encoder.encode(line + "\n")),
    [Symbol.asyncDispose]: () => all.disposeAsync(),
  };
}

interface TestedClient {
  name: string;
  /** How a person starts it. */
  command: string;
  /** How it is started at the end of a pipe, so that it exits when that ends. */
  piped?: string[];
  encrypted?: boolean;
  /** When its input ends it closes the connection at once, and does not print what
   * the server still sends. */
  closesAtOnce?: boolean;
}

// deno-fmt-ignore: a line each
const CLIENTS: TestedClient[] = [
  { name: "nc.openbsd", command: "nc.openbsd 127.0.0.1 PORT",
    piped: ["nc.openbsd -N 127.0.0.1 PORT", "nc.openbsd -q 1 127.0.0.1 PORT"] },
  { name: "nc.traditional", command: "nc.traditional 127.0.0.1 PORT",
    piped: ["nc.traditional -q 1 127.0.0.1 PORT"] },
  { name: "ncat", command: "ncat 127.0.0.1 PORT",
    piped: ["ncat 127.0.0.1 PORT"] },
  { name: "ncat -C", command: "ncat -C 127.0.0.1 PORT",
    piped: ["ncat -C 127.0.0.1 PORT"] },
  { name: "ncat --ssl", command: "ncat --ssl 127.0.0.1 PORT", encrypted: true,
    piped: ["ncat --ssl 127.0.0.1 PORT"] },
  { name: "telnet", command: "telnet 127.0.0.1 PORT" },
  { name: "socat", command: "socat - TCP:127.0.0.1:PORT",
    piped: ["socat - TCP:127.0.0.1:PORT"] },
  { name: "plink -raw", command: "plink -batch -raw -P PORT 127.0.0.1",
    piped: ["plink -batch -raw -P PORT 127.0.0.1"] },
  { name: "plink -telnet", command: "plink -batch -telnet -P PORT 127.0.0.1" },
  { name: "busybox nc", command: "busybox nc 127.0.0.1 PORT",
    piped: ["busybox nc 127.0.0.1 PORT"] },
  { name: "busybox telnet", command: "busybox telnet 127.0.0.1 PORT" },
  { name: "openssl s_client", encrypted: true, closesAtOnce: true,
    command: "openssl s_client -quiet -connect 127.0.0.1:PORT",
    piped: ["openssl s_client -quiet -no_ign_eof -connect 127.0.0.1:PORT"] },
];

for (const client of CLIENTS) {
  const { name, command, piped = [], encrypted, closesAtOnce } = client;
  Deno.test({
    name: `${name} sends and prints lines unchanged`,
    ignore: !canStart(command) || (encrypted && !OPENSSL),
    async fn(t) {
      await t.step("typed", async () => {
        await using meeting = await meet(command, { encrypted });
        const { client, room, say } = meeting;
        await client.find(/^\* Welcome! You are guest2\./);
        assertEquals(await client.next(), "* Here now: guest1 (1)");
        await client.type("Ça va? 你好 🙂\n");
        assertEquals(await room.next(), "[guest2] Ça va? 你好 🙂");
        await say("Grüße, 世界 🙂");
        assertEquals(await client.next(), "[guest1] Grüße, 世界 🙂");
        await client.type("/quit bye\n");
        assertEquals(await room.next(), "* guest2 has left the room (bye)");
        assertEquals(await client.next(), GOODBYE);
        await client.typeEnd(); // some exit only then, whatever the server does
        await client.exited();
        // Nothing more of the room's; busybox adds words of its own.
        const more = (await client.rest()).filter((line) =>
          /^[[*!]/.test(line)
        );
        assertEquals(more, []);
      });

      for (const command of piped) {
        await t.step(`... | ${command}`, async () => {
          const piped = "one\n/who\ntwo";
          await using meeting = await meet(command, { encrypted, piped });
          const { client, room } = meeting;
          assertEquals(await room.next(), "[guest2] one");
          assertEquals(await room.next(), "[guest2] two");
          assertEquals(await room.next(), "* guest2 has left the room");
          await client.exited();
          if (closesAtOnce) return;
          assertEquals((await client.rest()).slice(1), [
            "* Here now: guest1 (1)",
            "* Here now: guest1, guest2 (2)",
          ]);
        });
      }
    },
  });
}

/** Tests a client in a terminal, which script gives it. */
function testInTerminal(
  name: string,
  command: string,
  fn: (meeting: Awaited<ReturnType<typeof meet>>) => Promise<void>,
): void {
  Deno.test({
    name,
    ignore: !LINUX || !installed("script") || !canStart(command),
    async fn() {
      await using meeting = await meet(
        `script -qfc 'stty rows 24 cols 80; TERM=xterm ${command}' /dev/null`,
      );
      // No `^`: some begin a line by moving within the one before.
      await meeting.client.find(/\* Here now: guest1/);
      await fn(meeting);
    },
  });
}

// These do not exit when the server closes the connection.
for (
  const [name, command] of [
    ["nc.openbsd", "nc.openbsd 127.0.0.1 PORT"],
    ["ncat", "ncat 127.0.0.1 PORT"],
    ["plink -raw", "plink -batch -raw -P PORT 127.0.0.1"],
  ]
) {
  for (const key of ["Enter", "Ctrl-C"]) {
    testInTerminal(
      `${name} shows the goodbye after /quit, and ends with ${key}`,
      command,
      async ({ client, room }) => {
        await client.type("/quit\n");
        await client.find(/^\* Goodbye\. .* press Enter or Ctrl-C\.\^$/);
        assertEquals(await room.next(), "* guest2 has left the room");
        if (key === "Ctrl-C") {
          await client.type("\x03");
          await client.exited();
        } else await client.pressEnter();
      },
    );
  }
}

testInTerminal(
  "telnet's interrupt (Ctrl-C) is answered with how to leave, and telnet goes on",
  "telnet 127.0.0.1 PORT",
  async ({ client, room, say }) => {
    // It sends DO TIMING-MARK too, and prints nothing more before the answer.
    await client.type("\x03");
    await client.find(/\* To leave, type \/quit\./); // behind its ^C
    await client.type("one\n");
    assertEquals(await room.next(), "[guest2] one");
    await client.type("half a li\x03"); // the terminal drops what it interrupts
    await client.find(/\* To leave, type \/quit\./);
    await client.type("two\n");
    assertEquals(await room.next(), "[guest2] two");
    await say("still there?");
    await client.find(/^\[guest1\] still there\?/);
    await client.type("/quit\n");
    assertEquals(await room.next(), "* guest2 has left the room");
    await client.find(/^\* Goodbye\./);
    await client.exited();
  },
);

testInTerminal(
  "telnet's `send ayt` is answered, and its `send synch` changes no line",
  "telnet 127.0.0.1 PORT",
  async ({ client, room }) => {
    const escape = "\x1d"; // Ctrl-], for a command of telnet's own
    await client.type(escape + "send ayt\n");
    await client.find(/\* Yes, Parley is here\./); // behind the prompt
    await client.type("one\n");
    assertEquals(await room.next(), "[guest2] one");
    await client.type(escape + "send synch\n");
    await client.type("two\n");
    // Its IAC is urgent data, so that only its DM arrives, which is no UTF-8.
    const line = await room.next();
    assertEquals(line!.replace("\ufffd", ""), "[guest2] two");
    await client.type(escape + "send synch\n");
    await client.type("/msg guest1 secret\n");
    assertEquals(await room.next(), "[guest2 -> you] secret");
    await client.find(/\[you -> guest1\] secret/); // behind the prompt
  },
);

testInTerminal(
  "telnet sends every letter unchanged from its second line on",
  "telnet 127.0.0.1 PORT",
  async ({ client, room, say }) => {
    const line = "Ü 日本語 🙂 Ç";
    // It takes some bytes of the first for keys, and sends a command for each: the
    // first is answered with IAC DO BINARY.
    await client.type(line + "\n");
    await room.find(/^\[guest2\] /);
    await say("received");
    await client.find(/^\[guest1\] received/); // and so what came before
    for (let i = 0; i < 2; i++) {
      await client.type(line + "\n");
      assertEquals(await room.next(), `[guest2] ${line}`);
    }
  },
);

testInTerminal(
  "socat in raw mode sends a line with Enter, and Backspace erases",
  "socat -,raw,echo=1 TCP:127.0.0.1:PORT",
  async ({ client, room }) => {
    await client.type("helo\x7flo\r");
    assertEquals(await room.next(), "[guest2] hello");
    await client.type("/msg guest1 PIM\bN\r");
    assertEquals(await room.next(), "[guest2 -> you] PIN");
    await client.type("/quit now\x7f\x7f\x7fbye\r");
    assertEquals(await room.next(), "* guest2 has left the room (bye)");
    await client.find(/\* Goodbye\./);
    await client.exited();
  },
);

testInTerminal(
  "busybox telnet, whose terminal is raw, sends a line with Enter",
  "busybox telnet 127.0.0.1 PORT",
  async ({ client, room, say }) => {
    await client.type("Ü 日本語 🙂\r");
    assertEquals(await room.next(), "[guest2] Ü 日本語 🙂");
    await say("Grüße");
    await client.find(/^\[guest1\] Grüße/);
    await client.type("/quit\r");
    assertEquals(await room.next(), "* guest2 has left the room");
    await client.find(/\* Goodbye\./);
    await client.exited();
  },
);

testInTerminal(
  "rlwrap nc recalls and edits lines, and Tab completes names",
  'rlwrap -r -S "> " -H /dev/null nc.openbsd 127.0.0.1 PORT',
  async ({ client, room, say }) => {
    await client.type("one\r");
    assertEquals(await room.next(), "[guest2] one");
    await client.type("\x1b[A!\r"); // Up: the line before, and more
    assertEquals(await room.next(), "[guest2] one!");
    await say("/nick alexandra");
    assertEquals(await room.next(), "* guest1 is now known as alexandra");
    await client.find(/\* guest1 is now known as alexandra/);
    await client.type("/msg alex\thello\r");
    assertEquals(await room.next(), "[guest2 -> you] hello");
    await client.find(/\[you -> alexandra\] hello/);
    await client.type("/quit\r");
    assertEquals(await room.next(), "* guest2 has left the room");
    await client.find(/\* Goodbye\./);
  },
);

testInTerminal(
  "tintin++ sends and shows lines",
  'tt++ -G -e "#session room 127.0.0.1 PORT"',
  async ({ client, room, say }) => {
    await client.type("Ü 日本語 from tintin\r");
    assertEquals(await room.next(), "[guest2] Ü 日本語 from tintin");
    await say("Grüße, 世界");
    await client.find(/\[guest1\] Grüße, 世界/);
    await client.type("/quit bye\r");
    assertEquals(await room.next(), "* guest2 has left the room (bye)");
    await client.find(/\* Goodbye\./);
  },
);

Deno.test({
  name: "plink -telnet may end lines by CR alone, and its input may end first",
  ignore: !installed("plink"),
  async fn() {
    await using meeting = await meet("plink -batch -telnet -P PORT 127.0.0.1");
    const { client, room, say } = meeting;
    await client.type("one\rtwo\r\nthr"); // CR NUL, CR NUL LF on the wire
    assertEquals(await room.next(), "[guest2] one");
    assertEquals(await room.next(), "[guest2] two");
    await client.type("ee\n");
    await client.typeEnd(); // it sends a telnet command for that, and stays
    assertEquals(await room.next(), "[guest2] three");
    await say("still there?");
    await client.find(/^\[guest1\] still there\?$/);
  },
});

Deno.test({
  name:
    "openssl s_client -quiet sends every line, and stays after its input ends",
  ignore: !OPENSSL,
  async fn() {
    await using meeting = await meet(
      "openssl s_client -quiet -connect 127.0.0.1:PORT",
      { encrypted: true },
    );
    const { client, room, say } = meeting;
    // Without -quiet a line that begins with Q or R is a command of its own.
    await client.type("Quite\nRight\n");
    assertEquals(await room.next(), "[guest2] Quite");
    assertEquals(await room.next(), "[guest2] Right");
    await client.typeEnd();
    await say("still there?");
    await client.find(/^\[guest1\] still there\?$/);
  },
});
