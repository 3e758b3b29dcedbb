/**
 * The specification of Parley, as tests: on real sockets, and on real processes
 * where it is about signals, exit status, output, permissions or limits of the
 * system. tests/ has the properties, the simulation and the real clients.
 *
 * A test waits for what it expects, and fails if that has not come in time.
 */
import { assert, assertEquals, assertMatch, assertThrows } from "@std/assert";
import config from "./deno.json" with { type: "json" };
import { ChatServer, type Options, UsageError } from "./main.ts";
import {
  admit,
  AYT,
  BINARY,
  certificate,
  connectTls,
  DM,
  DO,
  DONT,
  EC,
  EL,
  eventually,
  fastClock,
  finished,
  flood,
  FORBIDDEN,
  GOODBYE,
  Guest,
  hurry,
  IAC,
  installed,
  IP,
  LINE_BYTES,
  Lines,
  LINUX,
  logged,
  MAIN,
  makeCertificate,
  never,
  NOP,
  numbered,
  open,
  OPENSSL,
  Program,
  run,
  SB,
  SE,
  stall,
  TemporaryFile,
  tlsClientOptions,
  tlsOptions,
  turn,
  Visitor,
  WILL,
  WINDOW_LINES,
  within,
  WONT,
} from "./tests/helpers.ts";

const encoder = new TextEncoder();

// -- the server

Deno.test("a raw room relays each line to everyone but its sender", async () => {
  await using server = open({ raw: true });
  await using alice = await Guest.connect(server.port);
  await using bob = await Guest.connect(server.port);
  await using carol = await Guest.connect(server.port);
  await alice.say("one");
  assertEquals(await bob.next(), "one");
  assertEquals(await carol.next(), "one");
  await bob.say("/two", "", "[x] three");
  assertEquals(await alice.next(), "/two"); // not "one"
  assertEquals(await alice.next(), "[x] three");
  assertEquals(await carol.next(), "/two");
  await server.stop();
  assertEquals(await alice.rest(), ["Shutdown Server"]);
});

Deno.test("joins and leaves are printed with the number of clients", async () => {
  const printed: string[] = [];
  await using server = open({}, printed);
  await using alice = await Guest.join(server.port);
  const { port } = alice.conn.localAddr;
  await using bob = await Guest.join(server.port, "bob");
  await bob.say("/quit tired");
  await alice.find(/^\* bob has left the room \(tired\)$/);
  assertEquals(
    printed[0],
    `New Connection from 127.0.0.1:${port} (guest1, 1 here)`,
  );
  assertMatch(
    printed[1],
    /^New Connection from 127\.0\.0\.1:\d+ \(guest2, 2 here\)$/,
  );
  assertMatch(
    printed[2],
    /^Disconnected 127\.0\.0\.1:\d+ \(bob, tired, 1 here\)$/,
  );
  await alice.conn.closeWrite();
  await alice.rest();
  assertEquals(
    printed[3],
    `Connection closed by 127.0.0.1:${port} (guest1, 0 here)`,
  );
});

Deno.test("a client may leave by close, half-close or reset", async () => {
  await using server = open();
  await using watcher = await Guest.join(server.port);
  const half = await Guest.join(server.port, "half");
  await half.send("last words");
  await half.conn.closeWrite();
  await watcher.find(/^\[half\] last words$/);
  await watcher.find(/^\* half has left the room$/);
  assertEquals((await half.rest()).slice(-1), []); // and is closed from here
  await half[Symbol.asyncDispose]();

  const closer = await Guest.join(server.port, "closer");
  await closer[Symbol.asyncDispose]();
  await watcher.find(/^\* closer has left the room$/);

  // Closing with something unread resets the connection.
  const conn = await Deno.connect({ port: server.port });
  await watcher.find(/^\* guest\d has entered the room$/);
  await watcher.say("unread");
  await conn.read(new Uint8Array(1));
  conn.close();
  await watcher.find(/^\* guest\d has left the room$/);
  await using late = await Guest.join(server.port);
  await late.say("still here");
  await watcher.find(/still here$/);
});

Deno.test("SIGINT and SIGTERM tell everyone and exit with status 0", async (t) => {
  for (const signal of ["SIGINT", "SIGTERM"] as const) {
    await t.step(signal, async () => {
      await using program = await Program.start();
      await using alice = await Guest.join(program.port);
      await using bob = await Guest.join(program.port);
      program.child.kill(signal);
      await program.output.find(/^Shutdown Server \.{6}$/);
      assertEquals((await alice.rest()).at(-1), "* Shutdown Server");
      assertEquals((await bob.rest()).at(-1), "* Shutdown Server");
      const { code } = await within(program.child.status, "the exit");
      assertEquals(code, 0);
      assertEquals(await program.errors.rest(), []);
    });
  }
});

Deno.test("clients that never read delay the shutdown by a second at most", async () => {
  await using program = await Program.start(["--raw", "--rate", "0"]);
  const stalled = await stall(program);
  program.child.kill("SIGINT");
  await program.output.find(/^Shutdown Server/);
  const started = performance.now();
  const { code } = await within(program.child.status, "the exit");
  const took = performance.now() - started;
  assertEquals(code, 0);
  assert(took > 700 && took < 2_000, `it took ${took} ms`);
  for (const conn of stalled) conn.close();
});

Deno.test("a second signal exits at once", async () => {
  await using program = await Program.start(["--raw", "--rate", "0"]);
  const stalled = await stall(program);
  program.child.kill("SIGINT");
  await program.output.find(/^Shutdown Server/);
  program.child.kill("SIGINT");
  const { code } = await within(program.child.status, "the exit");
  assertEquals(code, 130); // 128 + SIGINT, as in shells; 0 after the wait
  for (const conn of stalled) conn.close();
});

// -- names and commands

Deno.test("a newcomer is greeted, named and announced, and can talk at once", async () => {
  await using server = open();
  await using alice = await Guest.connect(server.port);
  assertEquals(
    await alice.next(),
    "* Welcome! You are guest1. Type a message and press Enter. " +
      "/nick NAME sets your name, /help lists commands.",
  );
  assertEquals(await alice.next(), "* Nobody else is here yet.");
  await using bob = await Guest.connect(server.port);
  await bob.say("hello");
  await bob.find(/^\* Welcome! You are guest2\. /);
  assertEquals(await bob.next(), "* Here now: guest1 (1)");
  assertEquals(await alice.next(), "* guest2 has entered the room");
  assertEquals(await alice.next(), "[guest2] hello");
  await bob.conn.closeWrite();
  assertEquals(await alice.next(), "* guest2 has left the room");
  assertEquals(await bob.rest(), []); // nothing of its own came back
});

Deno.test("the commands do what /help says", async (t) => {
  await using server = open();
  await using alice = await Guest.join(server.port, "alice");
  await using bob = await Guest.join(server.port, "bob");
  await alice.find(/known as bob/);

  await t.step("/help lists them all", async () => {
    await alice.say("/help");
    for (
      const name of [
        "help \\[COMMAND\\]",
        "nick NAME",
        "who \\[NAME\\]",
        "me ACTION",
        "msg NAME TEXT",
        "reply TEXT",
        "ignore \\[NAME\\]",
        "quiet \\[on\\|off\\]",
        "bell \\[on\\|off\\]",
        "away \\[REASON\\]",
        "back",
        "quit \\[REASON\\]",
        "/COMMAND",
      ]
    ) {
      assert((await alice.find(new RegExp(`^\\* /${name}  `))).length < 80);
    }
    await alice.settle();
  });
  await t.step("/help NAME tells about one of them", async () => {
    await alice.say("/help msg", "/help /W", "/help dance");
    for (let i = 0; i < 2; i++) {
      assertEquals(
        await alice.next(),
        "* /msg NAME TEXT: sends a private message " +
          "(also /tell, /whisper, /w, /pm)",
      );
    }
    assertMatch((await alice.next())!, /^! There is no command \/dance\./);
  });
  await t.step("/nick tells everyone", async () => {
    await alice.say("/nick Alïce");
    assertEquals(await bob.next(), "* alice is now known as Alïce");
    assertEquals(await alice.next(), "* alice is now known as Alïce");
    await alice.say("/nick alice");
    await alice.next();
    await bob.next();
  });
  await t.step("/who lists everyone", async () => {
    await bob.say("/WHO");
    assertEquals(await bob.next(), "* Here now: bob, alice (2)");
  });
  await t.step("/me acts", async () => {
    await alice.say("/me waves");
    assertEquals(await bob.next(), "** alice waves");
  });
  await t.step("//COMMAND says /COMMAND", async () => {
    await alice.say("//who", "//msg bob hi", "//dance");
    assertEquals(await bob.next(), "[alice] /who");
    assertEquals(await bob.next(), "[alice] /msg bob hi");
    assertEquals(await bob.next(), "[alice] /dance");
  });
  await t.step("/msg and /reply reach one person", async () => {
    await using carol = await Guest.join(server.port, "carol");
    await alice.find(/known as carol/);
    await bob.find(/known as carol/);
    await alice.say("/msg BOB psst: a b");
    assertEquals(await bob.next(), "[alice -> you] psst: a b");
    assertEquals(await alice.next(), "[you -> bob] psst: a b");
    await bob.say("/reply what?", "aloud");
    assertEquals(await alice.next(), "[bob -> you] what?");
    assertEquals(await bob.next(), "[you -> alice] what?");
    assertEquals(await carol.next(), "[bob] aloud");
    await alice.next();
  });
  await t.step(
    "/ignore hides one sender's lines until it is repeated",
    async () => {
      await alice.find(/carol has left/);
      await bob.find(/carol has left/);
      await bob.say("/ignore alice");
      assertEquals(
        await bob.next(),
        "* You no longer receive messages from alice. " +
          "/ignore alice undoes this.",
      );
      await bob.say("/ignore");
      assertEquals(await bob.next(), "* You ignore alice.");
      await alice.say("hidden", "/me hides", "/msg bob hidden too");
      await alice.find(/^\[you -> bob\] hidden too$/);
      await bob.say("/ignore alice");
      assertEquals(
        await bob.next(),
        "* You receive messages from alice again.",
      );
      await bob.say("/ignore");
      assertEquals(await bob.next(), "* You ignore nobody.");
      await alice.say("shown");
      assertEquals(await bob.next(), "[alice] shown");
    },
  );
  await t.step("/quiet hides join, leave and rename notices", async () => {
    await bob.say("/quiet on");
    assertEquals(
      await bob.next(),
      "* Join, leave and rename notices are hidden. /quiet off undoes this.",
    );
    const dave = await Guest.join(server.port, "dave");
    await dave[Symbol.asyncDispose]();
    await alice.find(/dave has left/);
    await bob.say("/quiet on"); // as it is
    assertMatch((await bob.next())!, /notices are hidden/);
    await bob.say("/quiet");
    assertEquals(
      await bob.next(),
      "* Join, leave and rename notices are shown.",
    );
    await bob.say("/quiet", "/quiet off");
    assertMatch((await bob.next())!, /notices are hidden/);
    assertMatch((await bob.next())!, /notices are shown/);
    await bob.say("/quiet sideways");
    assertEquals(await bob.next(), "! Type /quiet on or /quiet off.");
    await using _erin = await Guest.join(server.port, "erin");
    assertMatch((await bob.next())!, /has entered the room$/);
    assertMatch((await bob.next())!, /is now known as erin$/);
    await alice.find(/known as erin/);
  });
  await t.step("/quit leaves with a reason", async () => {
    await alice.find(/has left the room$/);
    await bob.say("/quit so long");
    assertEquals(await alice.next(), "* bob has left the room (so long)");
    assertEquals((await bob.rest()).at(-1), GOODBYE);
  });
});

Deno.test("a command that cannot be carried out is answered to its sender alone", async () => {
  await using server = open();
  await using alice = await Guest.join(server.port, "alice");
  await using bob = await Guest.join(server.port, "bob");
  await alice.find(/known as bob/);
  const answers: [string, RegExp][] = [
    ["/nick ALICE", /^! The name ALICE is taken\. .*\/nick NAME/],
    ["/nick Host", /^! The name Host is reserved\./],
    ["/nick you", /^! The name you is reserved\./],
    ["/nick server", /^! The name server is reserved\./],
    ["/nick two words", /^! A name is 1 to 24 letters/],
    ["/nick " + "x".repeat(25), /^! A name is 1 to 24 letters/],
    ["/nick ]", /^! A name is 1 to 24 letters/],
    ["/nick al@ice", /^! A name is 1 to 24 letters/],
    ["/nick", /^! Type \/nick NAME \(/],
    ["/nick bob", /^! You are bob already\.$/],
    ["/me", /^! Type \/me ACTION \(/],
    ["/msg", /^! Type \/msg NAME TEXT \(/],
    ["/msg alice", /^! Type \/msg NAME TEXT \(/],
    ["/msg zoe hi", /^! Nobody here is called zoe\. .*\/who/],
    ["/msg host hi", /^! Nobody here is called host\./],
    ["/reply", /^! Type \/reply TEXT \(/],
    ["/reply hi", /^! You have no private message to answer\. .*\/msg/],
    ["/who zoe", /^! Nobody here is called zoe\./],
    ["/ignore zoe", /^! Nobody here is called zoe\./],
    ["/ignore bob", /^! You cannot ignore yourself\.$/],
    ["/back", /^! You are not away\.$/],
    ["/bell loud", /^! Type \/bell on or \/bell off\.$/],
    ["/dance now", /^! Unknown command \/dance\. .*\/help.* \/\/dance /],
    ["/kick alice", /^! Unknown command \/kick\./],
  ];
  for (const [typed, answer] of answers) {
    await bob.say(typed);
    assertMatch((await bob.next())!, answer);
  }
  await bob.say("done");
  assertEquals(await alice.next(), "[bob] done");
});

Deno.test("a command has the aliases that people try", async (t) => {
  await using server = open({ rate: 0 });
  await using alice = await Guest.join(server.port, "alice");
  await using bob = await Guest.join(server.port, "bob");
  await alice.find(/known as bob/);
  const aliases: [typed: string, answer: RegExp][] = [
    ["/h", /^\* TEXT /],
    ["/?", /^\* TEXT /],
    ["/HELP", /^\* TEXT /],
    ["/name carol", /^\* alice is now known as carol$/],
    ["/nick alice", /^\* carol is now known as alice$/],
    ["/names", /^\* Here now: bob, alice \(2\)$/],
    ["/list", /^\* Here now: /],
    ["/who", /^\* Here now: /],
    ["/tell bob hi", /^\[you -> bob\] hi$/],
    ["/whisper bob hi", /^\[you -> bob\] hi$/],
    ["/w bob hi", /^\[you -> bob\] hi$/],
    ["/pm bob hi", /^\[you -> bob\] hi$/],
    ["/Msg bob hi", /^\[you -> bob\] hi$/],
  ];
  for (const [typed, answer] of aliases) {
    await t.step(typed, async () => {
      await alice.say(typed);
      assertMatch((await alice.next())!, answer);
      await alice.settle();
    });
  }
  await t.step("/r", async () => {
    await bob.say("/msg alice hi", "/quiet");
    await alice.find(/^\[bob -> you\] hi$/);
    await alice.say("/r hello");
    assertEquals(await alice.next(), "[you -> bob] hello");
    await bob.find(/^\[alice -> you\] hello$/);
  });
});

Deno.test("nothing that does not show makes a command public", async () => {
  await using server = open({ rate: 0 });
  await using alice = await Guest.join(server.port, "alice");
  await using bob = await Guest.join(server.port, "bob");
  const hidden = [
    "\u200b\u200c\u200d\u200e\u2060\u00ad\u034f\u061c\u180e\ufe0f\u{e0041}",
    ..."\u200b\u00ad\ufe0f\ue000\u0378",
    "\xff", // of Latin-1
  ];
  await alice.find(/bob$/);
  for (const it of hidden) {
    for (
      const typed of [
        `/msg${it} bob`,
        `/${it}msg bob`,
        ` /m${it}sg bob`,
        `/r${it}`,
      ]
    ) {
      const bytes = it === "\xff"
        ? Uint8Array.from(`${typed} a secret\n`, (c) => c.charCodeAt(0))
        : `${typed} a secret\n`;
      await alice.send(bytes);
    }
  }
  await alice.say(`/m\u200bzz bob ${"x".repeat(5_000)}`, "//w\u200bho", "done");
  const told: string[] = [];
  for (let line; !/done$/.test(line = (await bob.next())!);) told.push(line);
  assertEquals(told.filter((line) => !/^\[alice -> you\]/.test(line)), [
    "[alice] /w\u200bho",
  ]);
  assertEquals(told.length, 3 * hidden.length + 1);
});

Deno.test("an unknown command is answered with the nearest known one, and not said", async () => {
  await using server = open();
  await using alice = await Guest.join(server.port);
  await using bob = await Guest.join(server.port);
  const nearest: [typed: string, meant: string][] = [
    ["/nik zoe", "nick"],
    ["/nikc zoe", "nick"],
    ["/mgs guest1 secret", "msg"],
    ["/MESG guest1 secret", "msg"],
    ["/hlep", "help"],
    ["/qiut", "quit"],
    ["/ingore guest1", "ignore"],
    ["/repyl secret", "reply"],
    ["/awya", "away"],
    ["/em waves", "me"],
    ["/wo", "who"],
    ["/queit", "quiet"],
    ["/leave", "quit"],
    ["/users", "who"],
    ["/block guest1", "ignore"],
    ["/exti", "exit"],
    ["/tel guest1 secret", "tell"],
    ["/lsit", "list"],
  ];
  for (const [typed, meant] of nearest) {
    await bob.say(typed);
    const [, name] = /^\/(\w+)/.exec(typed.toLowerCase())!;
    assertEquals(
      await bob.next(),
      `! Unknown command /${name}. Did you mean /${meant}? ` +
        `/help lists commands, //${name} sends it as a message.`,
    );
  }
  // Another word is no slip of the fingers: nothing is suggested.
  for (const name of ["xyzzyplugh", "ping", "time", "x"]) {
    await bob.say(`/${name}`);
    assertEquals(
      await bob.next(),
      `! Unknown command /${name}. ` +
        `/help lists commands, //${name} sends it as a message.`,
    );
  }
  await bob.say(`/${"x".repeat(4_000)}`, "done");
  assert((await bob.next())!.length < 200);
  await alice.find(/guest2 has entered/);
  assertEquals(await alice.next(), "[guest2] done");
});

Deno.test("a name may have what people write around it", async () => {
  await using server = open({ rate: 0 });
  await using alice = await Guest.join(server.port, "alice");
  await using bob = await Guest.join(server.port, "bob");
  for (const name of ["bob,", "@bob", "@bob,", "BOB", "Ｂｏｂ"]) {
    await alice.say(`/msg ${name} hi`);
    assertEquals(await bob.next(), "[alice -> you] hi", name);
    await alice.find(/^\[you -> bob\] hi$/);
    await alice.say(`/who ${name}`);
    assertMatch((await alice.next())!, /^\* bob has been here for 0 minutes/);
    await alice.say(`/ignore ${name}`);
    assertMatch((await alice.next())!, /messages from bob/);
  }
});

Deno.test("/who NAME tells for how long a person is connected and idle, and why away", async () => {
  await using server = open();
  await using alice = await Guest.join(server.port, "alice");
  await using bob = await Guest.join(server.port, "bob");
  await alice.find(/known as bob/);
  await alice.say("/who bob");
  assertEquals(
    await alice.next(),
    "* bob has been here for 0 minutes, idle for 0 minutes.",
  );
  await bob.say("/away lunch");
  await bob.find(/away/);
  const { now } = performance;
  try {
    performance.now = () => now.call(performance) + 5 * 60_000;
    await bob.say("/bell off"); // no longer idle
    await bob.find(/rings/);
    performance.now = () => now.call(performance) + 6 * 60_000;
    await alice.say("/who bob");
    assertEquals(
      await alice.next(),
      "* bob has been here for 6 minutes, idle for 1 minute.",
    );
    assertEquals(await alice.next(), "* bob is away: lunch");
  } finally {
    performance.now = now;
  }
});

Deno.test("/away is shown by /who and to senders of private messages, until /back", async () => {
  await using server = open();
  await using alice = await Guest.join(server.port, "alice");
  await using bob = await Guest.join(server.port, "bob");
  await alice.find(/known as bob/);
  await bob.say("/away lunch until two");
  assertEquals(
    await bob.next(),
    "* You are away: lunch until two. /back ends this.",
  );
  await alice.say("/who", "/msg bob hi");
  assertEquals(await alice.next(), "* Here now: alice, bob (away) (2)");
  assertEquals(await alice.next(), "[you -> bob] hi");
  assertEquals(await alice.next(), "* bob is away: lunch until two");
  await bob.say("/reply hello");
  await alice.find(/^\[bob -> you\] hello$/);
  await alice.say("/reply enjoy it");
  await alice.find(/^\* bob is away: lunch until two$/);
  await using carol = await Guest.connect(server.port);
  await carol.find(/^\* Here now: alice, bob \(away\) \(2\)$/);
  await bob.say("/away");
  await bob.find(/^\* You are away\. /);
  await bob.say("/back");
  await bob.find(/^\* You are back\.$/);
  await alice.find(/guest3 has entered/);
  await alice.say("/msg bob hi", "/who");
  assertEquals(await alice.next(), "[you -> bob] hi");
  assertEquals(await alice.next(), "* Here now: alice, bob, guest3 (3)");
});

Deno.test("nobody can make others too slow by naming them or by private messages", async () => {
  await using server = open({ rate: 0 });
  const typed = [new TextEncoder().encode("/bell on\n")];
  admit(server, {
    read(buffer) {
      const bytes = typed.shift();
      if (bytes === undefined) return never();
      buffer.set(bytes);
      return Promise.resolve(bytes.length);
    },
    write: never, // it takes nothing
  });
  await using alice = await Guest.join(server.port, "alice");
  // A line that begins with a space is said alone.
  for (const line of [" guest1, are you there?", "/msg guest1 hello"]) {
    await alice.say(...Array(5_000).fill(line), "/who");
    assertEquals(
      await alice.find(/^\* Here now: /),
      "* Here now: guest1, alice (2)",
    );
  }
});

Deno.test("/bell rings when somebody is named or gets a private message", async () => {
  await using server = open({ rate: 0 });
  await using alice = await Guest.join(server.port, "alice");
  await using bob = await Guest.join(server.port, "bob");
  await alice.find(/known as bob/);
  /** Whether alice's terminal rings when bob sends a line. */
  const rings = async (line: string, marker = "") => {
    await bob.say(line, `//marker${marker}`);
    let received = "";
    for (let part; !(part = (await alice.next())!).endsWith("] /marker");) {
      received += part;
    }
    return received.includes("\x07");
  };
  const naming = [
    "hi alice",
    "ALICE: look",
    "@alice, hi",
    "alice",
    "/me hugs alice",
  ];
  for (const line of [...naming, "/msg alice hi"]) {
    assertEquals(await rings(line), false, line); // it is off by default
  }
  await alice.say("/bell on");
  assertEquals(
    await alice.next(),
    "* Your terminal rings when you are named or get a private message. " +
      "/bell off undoes this.",
  );
  for (const line of [...naming, "/msg alice hi"]) {
    assertEquals(await rings(line), true, line);
  }
  for (const line of ["hello", "malice", "alices", "/msg bob alice"]) {
    assertEquals(await rings(line), false, line);
  }
  await alice.say("/ignore bob");
  await alice.find(/no longer receive/);
  await bob.say("hi alice", "/msg alice hi");
  await using carol = await Guest.join(server.port, "carol");
  await carol.say("//marker");
  let received = "";
  for (let part; !(part = (await alice.next())!).endsWith("] /marker");) {
    received += part;
  }
  assertEquals(received.includes("\x07"), false);
  await alice.say("/bell off");
  assertEquals(await alice.next(), "* Your terminal no longer rings.");
});

Deno.test("another name does not get around /ignore", async () => {
  await using server = open();
  await using alice = await Guest.join(server.port, "alice");
  await using eve = await Guest.join(server.port, "eve");
  await alice.find(/known as eve/);
  await alice.say("/ignore eve");
  await alice.find(/no longer receive/);
  await eve.say("/nick buy_my_book", "hello", "/me waves", "/msg alice hi");
  await eve.find(/you -> alice/);
  await alice.say("/ignore");
  assertEquals(await alice.next(), "* You ignore buy_my_book.");
  await alice.say("/ignore buy_my_book");
  assertEquals(
    await alice.next(),
    "* You receive messages from buy_my_book again.",
  );
});

Deno.test("names that show something else than they are cannot be taken", async () => {
  await using server = open({ rate: 0 });
  await using alice = await Guest.join(server.port, "alice");
  const refused = [
    // letters of other scripts that look like the server's own words
    ..."SΕRVΕR,HOՏT,ΗΟЅΤ,hоst,HОST,ʜost,h0st,hosτ,уou,YΟU,ΥΟU,υου,seгver,SEᎡVER"
      .split(","),
    ..."ꓧꓳꓢꓔ,hoѕt,hosт,h\u0301ost,HOST,Ｈｏｓｔ,𝐡𝐨𝐬𝐭,ⓗⓞⓢⓣ".split(","),
    "ali\u0307", // a dot on an i that has one
    "\u{13441}", // blank hieroglyphs
    "bob\u{13441}",
    "\u{16fe4}", // a filler of Khitan
    "bob\u{16fe4}",
    "bob\u3164", // Hangul fillers
    "bob\uffa0",
    "bob\u115f",
    "bob\u200b",
    "bob\u200d",
    "bob\xad",
    "bob\u034f",
    "bob\ufe0f",
    "bob\u180b",
    "bob\u2060",
    "bob\u{e0041}", // a tag
    "bob\u0600", // a format character
    "bob\u0378", // unassigned
    "bob\u{e0100}",
    "bob\u2800",
    "bob\ue000", // private
    "b\u0301\u0302\u0303\u0304ob", // more than a few marks on a letter
    "b" + "\u0301".repeat(20),
    "\u0301bob", // a mark on nothing
  ];
  for (const name of refused) {
    await alice.say(`/nick ${name}`);
    assertMatch((await alice.next())!, /^! /, escape(name));
  }
  for (const name of ["Zoë", "Nguyễn", "नमस्ते", "Αλέξης", "Володя", "서연"]) {
    await alice.say(`/nick ${name}`);
    assertMatch((await alice.next())!, / is now known as /, name);
  }
});

Deno.test("names of thousands of marks take no time", async () => {
  await using server = open({ rate: 0 });
  await using alice = await Guest.join(server.port, "alice");
  const marks = "a" + "\u0315\u0300".repeat(1_000), each = 10;
  for (const command of ["nick", "ignore", "who", "msg"]) {
    let least = Infinity;
    for (let round = 0; round < 5; round++) {
      const started = performance.now();
      await alice.say(...Array(each).fill(`/${command} ${marks} hi`));
      for (let i = 0; i < each; i++) assertMatch((await alice.next())!, /^! /);
      least = Math.min(least, (performance.now() - started) / each);
    }
    assert(least < 4, `/${command} took ${least} ms`); // normalized: 12
  }
});

Deno.test("a typed reason is not taken for one that the server gives", async () => {
  const reasons = [
    "Too slow",
    "too slow",
    "TOO SLOW",
    "too\u200bslow",
    "too\u200b slow",
    "too\xa0slow",
    "too  slow",
    "t\u00adoo slow",
    "ｔｏｏ ｓｌｏｗ",
    "too\u3164slow",
    " too slow",
    "kicked",
    "kicked: by host",
    "k\u200bicked",
    "banned",
    "ban\u2060ned: spam",
    "no password",
    "no name",
    "no TLS",
    "TLS, which is off",
    "a web request",
    "an SSH client",
  ];
  for (const reason of reasons) {
    await using room = open();
    await using watcher = await Guest.join(room.port);
    await using guest = await Guest.join(room.port);
    await guest.say(`/away ${reason}`, `/quit ${reason}`);
    assertMatch((await guest.next())!, /^\* You are away: "/, escape(reason));
    const notice = await watcher.find(/has left/);
    assertMatch(notice, /^\* guest2 has left the room \("/, escape(reason));
  }
});

Deno.test("a reason that shows nothing is none", async () => {
  await using server = open();
  await using alice = await Guest.join(server.port);
  await using bob = await Guest.join(server.port);
  await bob.say("/away \u200b", "/quit \u3164");
  assertEquals(await bob.next(), "* You are away. /back ends this.");
  await alice.find(/entered/);
  assertEquals(await alice.next(), "* guest2 has left the room");
});

Deno.test("--motd FILE is shown after the welcome", async () => {
  using file = new TemporaryFile("Rules:\n\n\t1. Be \x1b[31mkind.\n\n");
  await using server = open({ motd: file.path, history: 20 });
  await using alice = await Guest.connect(server.port);
  assertMatch((await alice.next())!, /^\* Welcome!/);
  assertEquals(await alice.next(), "* Rules:");
  assertEquals(await alice.next(), "* ");
  assertEquals(await alice.next(), "*         1. Be kind.");
  assertEquals(await alice.next(), "* Nobody else is here yet.");
});

Deno.test("--motd with an empty file shows nothing", async () => {
  using file = new TemporaryFile("\n");
  await using server = open({ motd: file.path });
  await using alice = await Guest.connect(server.port);
  assertMatch((await alice.next())!, /^\* Welcome!/);
  assertEquals(await alice.next(), "* Nobody else is here yet.");
});

Deno.test("a greeting of any length keeps nobody out", async () => {
  using file = new TemporaryFile("x".repeat(79).concat("\n").repeat(2_000));
  await using server = open({ motd: file.path, history: 20 });
  await using alice = await Guest.join(server.port);
  await alice.say("hello");
  await alice.settle();
  await using bob = await Guest.join(server.port);
  assertEquals(await bob.next(), "* Earlier:");
  assertEquals(await bob.next(), "[guest1] hello");
  await bob.receivesNothing();
});

Deno.test("with --timestamps earlier lines of another day bear its date", async () => {
  const DAY = 86_400_000, now = Date.now();
  const stamp = (age: number) => new Date(now - age).toISOString();
  using file = new TemporaryFile(
    `${stamp(3 * DAY)} [old] three days ago\n` +
      `${stamp(DAY)} [old] yesterday\n${stamp(0)} ** old was here\n`,
  );
  const date = (age: number) => {
    const time = new Date(now - age);
    const two = (number: number) => String(number).padStart(2, "0");
    return `${time.getFullYear()}-${two(time.getMonth() + 1)}-` +
      `${two(time.getDate())} ${two(time.getHours())}:${
        two(time.getMinutes())
      }`;
  };
  await using server = open({ log: file.path, history: 9, timestamps: true });
  await using alice = await Guest.join(server.port);
  await alice.say("hello");
  await using bob = await Guest.join(server.port);
  for (const guest of [alice, bob]) {
    assertEquals(await guest.next(), "* Earlier:");
    assertEquals(await guest.next(), `${date(3 * DAY)} [old] three days ago`);
    assertEquals(await guest.next(), `${date(DAY)} [old] yesterday`);
    assertMatch((await guest.next())!, /^\d\d:\d\d \*\* old was here$/);
  }
  assertMatch((await bob.next())!, /^\d\d:\d\d \[guest1\] hello$/);
  // A day later the lines of today are of another day too.
  const { now: realNow } = Date;
  try {
    Date.now = () => realNow() + DAY;
    await using carol = await Guest.join(server.port);
    await carol.find(/yesterday$/);
    assertEquals(await carol.next(), `${date(0)} ** old was here`);
    assertMatch(
      (await carol.next())!,
      /^\d{4}-\d\d-\d\d \d\d:\d\d \[guest1\] hello$/,
    );
  } finally {
    Date.now = realNow;
  }
});

Deno.test("/who names everyone, in lines of at most 4,096 bytes", async () => {
  await using server = open({ rate: 0 });
  const people = 500;
  for (let i = 0; i < people; i++) {
    const visitor = Visitor.admit(server, "192.0.2.1");
    visitor.say(`/nick ${`日本語の名前${"x".repeat(12)}`}${i}`);
  }
  await using alice = await Guest.join(server.port, "alice");
  await eventually(async () => {
    await alice.say("/who");
    const names: string[] = [];
    for (let line = "";;) {
      line = await alice.find(/^\* Here now: /);
      assert(encoder.encode(line).length < LINE_BYTES, "the line is too long");
      const [, list, , count] = /^\* Here now: (.*?),?( \((\d+)\))?$/.exec(
        line,
      )!;
      names.push(...list.split(", "));
      if (count === undefined) continue;
      assertEquals(Number(count), people + 1);
      break;
    }
    assertEquals(names.length, people + 1);
    assertEquals(new Set(names).size, people + 1);
    return names.filter((name) => name.startsWith("日本")).length === people;
  }, "everyone has the name");
});

Deno.test("a client that takes a long list of people slowly stays", async () => {
  await using server = open({ rate: 0 });
  for (let i = 0; i < 800; i++) { // names of 84 bytes or more
    const visitor = Visitor.admit(server, "192.0.2.1");
    visitor.say(`/nick ${"𐐷".repeat(20)}${i}`);
  }
  await using alice = await Guest.join(server.port, "alice");
  let type: (line: string) => void = () => {};
  let take: (() => void) | null = null, received = "";
  const { closed } = admit(server, {
    read: (buffer) =>
      new Promise((resolve) =>
        type = (line) => {
          buffer.set(encoder.encode(line));
          resolve(line.length);
        }
      ),
    write: (bytes) =>
      new Promise((resolve) =>
        take = () => {
          take = null;
          received += new TextDecoder().decode(bytes);
          resolve(bytes.length);
        }
      ),
  });
  let isClosed = false;
  closed.then(() => isClosed = true);
  await eventually(() => take !== null, "the greeting"); // which waits
  type("/nick bob\n");
  await eventually(async () => {
    await alice.say("/who bob");
    return (await alice.find(/^\* bob has|^! Nobody/)).startsWith("* bob");
  }, "bob has his name");
  type("/who\n");
  await turn();
  await turn();
  await alice.say("/msg bob one", "/msg bob two", "/msg bob three");
  await alice.settle();
  await eventually(() => {
    take?.();
    return isClosed || received.endsWith("three\n");
  }, "all lines");
  assertEquals(isClosed, false);
  assertMatch(received, /\(802\)\n\[alice -> you\] one\n/);
});

Deno.test("--ask-name names everyone, and says lines that begin with a slash", async () => {
  await using server = open({ askName: true, rate: 0 });
  for (let i = 0; i < 30; i++) {
    const visitor = Visitor.admit(server, "192.0.2.1");
    visitor.say(`visitor${i}`);
    await visitor.find(/room contains/);
  }
  await using alice = await Guest.connect(server.port);
  await alice.say("alice");
  await alice.next();
  assertEquals(
    await alice.next(),
    `* The room contains: ${numbered(30, "visitor").join(", ")}`,
  );
  await using bob = await Guest.connect(server.port);
  await bob.say("bob");
  await bob.next();
  await bob.next();
  const lines = ["/who", "/quit", "/msg bob hi", "//who", "/x", "// y", "/"];
  await alice.say(...lines);
  for (const line of lines) assertEquals(await bob.next(), `[alice] ${line}`);
  const long = "/msg bob " + "x".repeat(LINE_BYTES - 9);
  await alice.say(`${long}/quit`);
  assertEquals(await bob.next(), `[alice] ${long}`);
  assertEquals(await bob.next(), "[alice] /quit");
});

Deno.test("names are compared without case and in their composed form", async () => {
  await using server = open();
  await using alice = await Guest.join(server.port);
  await using bob = await Guest.join(server.port);
  await alice.say("/nick Ａｌｉｃｅ");
  await bob.find(/^\* guest1 is now known as Alice$/);
  for (const name of ["alice", "ＡLICE", "aLıce"]) {
    await bob.say(`/nick ${name}`);
    assertMatch((await bob.next())!, /^! The name .* is taken/);
  }
  for (const name of ["नमस्ते", "张三", "Çelik_7", "guest5"]) {
    await bob.say(`/nick ${name}`);
    assertMatch((await bob.next())!, / is now known as /);
  }
  for (let i = 3; i <= 6; i++) {
    await using guest = await Guest.connect(server.port);
    const name = i < 5 ? `guest${i}` : `guest${i + 1}`; // guest5 is taken
    assertMatch((await guest.next())!, new RegExp(`You are ${name}\\. `));
  }
});

Deno.test("a newcomer receives the last public lines", async () => {
  await using server = open({ history: 3 });
  await using alice = await Guest.join(server.port, "alice");
  await using bob = await Guest.join(server.port, "bob");
  await alice.say("one", "two", "/msg bob secret", "/me three", "/who", "four");
  await bob.find(/four$/);
  await using carol = await Guest.join(server.port);
  assertEquals(await carol.next(), "* Earlier:");
  assertEquals(await carol.next(), "[alice] two");
  assertEquals(await carol.next(), "** alice three");
  assertEquals(await carol.next(), "[alice] four");
  await bob.say("five");
  assertEquals(await carol.next(), "[bob] five");
});

Deno.test("a history of many long lines is bounded in bytes too", async () => {
  const size = 4_000, fit = 1_048_576 / size; // the history has at most 1 MiB
  await using server = open({ history: 10_000, rate: 0 });
  await using alice = await Guest.join(server.port, "alice");
  await flood(alice, 1.5 * fit, size);
  await alice.settle();
  await using bob = await Guest.join(server.port);
  await alice.say("the last");
  const shown = [await bob.next()];
  while (!shown.at(-1)!.endsWith(" the last")) shown.push(await bob.next());
  const count = shown.length;
  assert(count > 0.75 * fit && count < 1.03 * fit, `${count} lines`);
});

Deno.test("the history has as many lines as are asked for, however long they are", async () => {
  const lines = Array.from(
    { length: 400 },
    (_, i) => `${i} `.padEnd(4_000, "x"),
  );
  await using server = open({ history: 200, rate: 0 });
  await using alice = await Guest.join(server.port, "alice");
  await alice.say(...lines);
  await alice.settle();
  await using bob = await Guest.join(server.port);
  assertEquals(await bob.next(), "* Earlier:");
  for (const line of lines.slice(-200)) {
    assertEquals(await bob.next(), `[alice] ${line}`);
  }
});

Deno.test("--timestamps puts the time of day before each message", async () => {
  await using server = open({ timestamps: true, history: 1 });
  await using alice = await Guest.join(server.port, "alice");
  await using bob = await Guest.join(server.port, "bob");
  await alice.say("hello", "/me waves");
  assertMatch((await bob.next())!, /^([01]\d|2[0-3]):[0-5]\d \[alice\] hello$/);
  assertMatch((await bob.next())!, /^\d\d:\d\d \*\* alice waves$/);
  await using carol = await Guest.join(server.port);
  assertEquals(await carol.next(), "* Earlier:");
  assertMatch((await carol.next())!, /^\d\d:\d\d \*\* alice waves$/);
});

Deno.test("a newcomer is shown twenty names, and how many there are", async () => {
  await using server = open();
  admitCrowd(server, 23);
  await using alice = await Guest.connect(server.port);
  const line = await alice.find(
    /^\* Here now: guest1, .*, guest20, and 3 more \(23\)$/,
  );
  assertEquals(line.split(", ").length, 21);
});

Deno.test("after ten joins and leaves they are told in one line a second", async () => {
  using _hurry = hurry(1_000);
  await using server = open();
  await using alice = await Guest.join(server.port);
  admitCrowd(server, 59); // her own was the first notice
  for (let guest = 2; guest <= 10; guest++) {
    assertEquals(await alice.next(), `* guest${guest} has entered the room`);
  }
  assertEquals(await alice.next(), "* 50 people have entered the room");
});

/** Admits clients in memory, of which the first `stalled` never take a write. */
function admitCrowd(server: ChatServer, size: number, stalled = 0): void {
  for (let i = 0; i < size; i++) {
    admit(server, i < stalled ? { write: never } : {});
  }
}

Deno.test("a crowd is told how many of the clients that left were too slow", async () => {
  using _hurry = hurry(1_000);
  await using server = open({ rate: 0 });
  await using alice = await Guest.join(server.port, "alice");
  admitCrowd(server, 60, 2);
  await alice.find(/people have entered/);
  // The clock stands still, or a notice may come at once on a busy machine.
  const { now } = performance, moment = performance.now();
  performance.now = () => moment;
  try {
    await flood(alice, 1.2 * WINDOW_LINES);
    assertEquals(
      await alice.find(/left/),
      "* 2 people have left the room (2 too slow)",
    );
  } finally {
    performance.now = now;
  }
});

Deno.test("no client is always the last to receive a line", async () => {
  await using server = open({ raw: true, rate: 0 });
  const clients = 5;
  let received = 0, last = Promise.withResolvers<number>();
  for (let i = 0; i < clients; i++) {
    admit(server, {
      write(bytes) {
        if (++received % clients === 0) last.resolve(i);
        return Promise.resolve(bytes.length);
      },
    });
  }
  await using alice = await Guest.connect(server.port);
  const wereLast = new Set<number>();
  for (let line = 0; line < 100; line++) {
    last = Promise.withResolvers();
    await alice.say("hi");
    wereLast.add(await within(last.promise, "the line"));
  }
  assertEquals(wereLast.size, clients);
});

Deno.test("a thousand people can be ignored, and no more", async () => {
  await using server = open({ rate: 0 });
  admitCrowd(server, 1_001);
  await using alice = await Guest.join(server.port, "alice");
  const ignores = numbered(1_002, "/ignore guest").slice(1); // from guest1 on
  await alice.say(...ignores);
  await alice.find(/^! You already ignore 1000 people\.$/);
});

Deno.test("thousands of /me lines arrive whole and in order", async () => {
  await using server = open({ rate: 0 });
  await using alice = await Guest.join(server.port, "alice");
  await using bob = await Guest.join(server.port);
  const actions = numbered(5_000, "waves ");
  await alice.say(...actions.map((action) => `/me ${action}`));
  for (const action of actions) {
    assertEquals(await bob.next(), `** alice ${action}`);
  }
});

Deno.test("thousands of short lines from the longest name arrive whole and in order", async () => {
  await using server = open({ rate: 0 });
  const name = "𐐷".repeat(24); // 24 letters of 4 bytes
  await using alice = await Guest.join(server.port, name);
  await using bob = await Guest.join(server.port);
  const lines = numbered(5_000);
  const sending = alice.say(...lines);
  for (const line of lines) assertEquals(await bob.next(), `[${name}] ${line}`);
  await sending;
});

Deno.test("--ask-name is Protohackers' Budget Chat", async () => {
  await using server = open({ askName: true, history: 20 });
  await using alice = await Guest.connect(server.port);
  assertMatch((await alice.next())!, /name\?$/);
  await alice.say("alice");
  assertEquals(await alice.next(), "* The room contains: ");
  await using bob = await Guest.connect(server.port);
  await bob.next();
  await alice.say("bob has no name yet");
  const nobody = await Guest.connect(server.port);
  await nobody.next();
  await nobody[Symbol.asyncDispose](); // without a notice, as it has no name
  await bob.say("bob");
  assertEquals(await bob.next(), "* The room contains: alice");
  assertEquals(await bob.next(), "[alice] bob has no name yet"); // history
  assertEquals(await alice.next(), "* bob has entered the room");
  await bob.say("hi alice");
  assertEquals(await alice.next(), "[bob] hi alice");
  await bob.conn.closeWrite();
  assertEquals(await alice.next(), "* bob has left the room");
  for (
    const name of ["", "alice", "no spaces", "host", "x".repeat(25), "/quit"]
  ) {
    await using guest = await Guest.connect(server.port);
    await guest.next();
    await guest.say(name);
    assertMatch((await guest.next())!, /^! /);
    assertEquals(await guest.next(), null); // without a goodbye
  }
  await bob.rest();
  await using last = await Guest.connect(server.port);
  await last.say("last");
  assertEquals(await alice.next(), "* last has entered the room");
});

// -- framing and cleaning

/** A stream with everything that ends, splits or interrupts a line. */
const STREAM = [
  ...encoder.encode("plain\ncr lf\r\ncr nul\r\0cr\rcr cr lf\r\r\n"),
  ...[IAC, DO, 10, IAC, WILL, 31],
  ...encoder.encode("naïve 🌍"),
  ...[IAC, SB, 31, 0, 10, 0, IAC, IAC, 10, IAC, SE],
  ...encoder.encode(" tail\n\n\r\n"),
  ...[0xe2, 0x82, 10, 0x61, 0xff, 0xff, 0x62, 10],
  ...encoder.encode("last words"),
];
/** The lines in it. */
const STREAM_LINES = [
  "plain",
  "cr lf",
  "cr nul",
  "cr",
  "cr cr lf",
  "naïve 🌍 tail",
  "\ufffd",
  "ab",
  "last words",
];

Deno.test("a stream has the same lines wherever it is cut into reads", async () => {
  await using server = open({ raw: true, rate: 0 });
  await using reader = await Guest.connect(server.port);
  for (let cut = 0; cut <= STREAM.length; cut++) {
    const conn = await Deno.connect({ port: server.port });
    conn.setNoDelay(true);
    const parts = cut === 0
      ? STREAM.map((byte) => [byte])
      : [STREAM.slice(0, cut), STREAM.slice(cut)].filter((part) => part.length);
    for (const part of parts) {
      await conn.write(Uint8Array.from(part));
      await new Promise((resolve) => setTimeout(resolve, 1)); // a read of its own
    }
    await conn.closeWrite();
    for (const line of STREAM_LINES) assertEquals(await reader.next(), line);
    conn.close();
  }
});

Deno.test("a telnet option is refused", async () => {
  await using server = open({ raw: true });
  using conn = await Deno.connect({ port: server.port });
  // What telnet sends for Ctrl-C; it prints nothing before the answer (RFC 860).
  const TIMING_MARK = 6;
  await conn.write(Uint8Array.of(IAC, IP, IAC, DO, TIMING_MARK));
  const buffer = new Uint8Array(20);
  const count = await within(conn.read(buffer), "the answer");
  assertEquals(
    [...buffer.slice(0, count!)],
    [IAC, DO, BINARY, IAC, WONT, TIMING_MARK],
  );
});

Deno.test("characters that could disturb a terminal are removed from a line", async () => {
  await using server = open({ rate: 0 });
  await using alice = await Guest.join(server.port, "alice");
  await using bob = await Guest.join(server.port, "bob");
  const lines: [typed: string, received: string][] = [
    ["\x1b[31mred\x1b[0m", "red"],
    ["\x1b]0;a new title\x07t", "t"],
    ["\x1b]8;;http://x/ y\x1b\\link", "link"],
    ["\x1bP1$r0m\x1b\\dcs", "dcs"],
    ["\x9b2Jc1", "c1"],
    ["\x1b#8double", "double"],
    ["\x1b]0;never ended", "]0;never ended"],
    ["bell\x07", "bell"],
    ["a\u2028b\u2029c\u0085d", "abcd"],
    ["\u202eevil\u2066x\u202c", "evilx"],
    ["\ufeff/me has a mark", ""],
    ["👩‍👩‍👧 مرحبا", "👩‍👩‍👧 مرحبا"],
  ];
  for (const [typed, received] of lines) {
    await alice.say(typed);
    assertEquals(
      await bob.next(),
      received ? `[alice] ${received}` : "** alice has a mark",
    );
  }
  await alice.say("\x07\x1b[0m", "", "end");
  assertEquals(await bob.next(), "[alice] end");
});

Deno.test("keys of a terminal leave nothing in a line", async () => {
  await using server = open({ rate: 0 });
  await using alice = await Guest.join(server.port, "alice");
  await using bob = await Guest.join(server.port, "bob");
  // deno-fmt-ignore: a kind of terminal a line
  const keys = [
    "\x1bOP", "\x1bOQ", "\x1b[15~", "\x1b[24~", "\x1b[1;2P", "\x1b[Z", // xterm
    "\x1b[A", "\x1bOA", "\x1b[1;5C", "\x1b[H", "\x1bOH", "\x1b[3~", "\x1bOM",
    "\x1b[[A", "\x1b[[E", "\x1b[1~", // the Linux console
    "\x1b[23^", "\x1b[8@", "\x1b[a", "\x1bOa", // rxvt
    "\x1bO2P", "\x1bO5C", // older xterm and Konsole
    "\x8fP", "\x9b15~", "\x1bNx", // C1, SS2
    "\x1b[200~", "\x1b[201~", "\x1b[I", "\x1b[<0;10;20M", // modes
    "\x1b", "\x1b\x1b[A", "\x07", "\x01", "\t\b",
  ];
  for (const key of keys) {
    for (const [before, after] of [["hello", ""], ["", "hello"]]) {
      await alice.say(before + key + after);
      assertEquals(await bob.next(), "[alice] hello", JSON.stringify(key));
    }
  }
  await alice.say("\x1bhi", "a\x1b b", "\x1b[200~pasted\x1b[201~");
  assertEquals(await bob.next(), "[alice] hi");
  assertEquals(await bob.next(), "[alice] a b");
  assertEquals(await bob.next(), "[alice] pasted");
});

Deno.test("Backspace, DEL and Ctrl-U erase what was typed", async () => {
  await using server = open({ rate: 0 });
  await using alice = await Guest.join(server.port, "alice");
  await using bob = await Guest.join(server.port, "bob");
  const lines: [typed: string, received: string][] = [
    ["helo\blo", "hello"],
    ["helo\x7flo", "hello"],
    ["\b\x7fhello", "hello"],
    ["hellooo\b\x7f", "hello"],
    ["hé\bello", "hello"],
    ["h日\bello", "hello"],
    ["h🌍\x7fello", "hello"],
    ["he\u0301\bello", "hello"], // a letter and its accent
    ["wrong\x15hello", "hello"],
    ["wrong\x15\x15hello\x1b[A", "hello"],
    ["/quit\b\b\b\b\bhello", "hello"],
    ["wrong\b\b\b\b\b\b\bhello", "hello"],
  ];
  for (const [typed, received] of lines) {
    await alice.say(typed);
    assertEquals(await bob.next(), `[alice] ${received}`, typed);
  }
  await alice.say("x\b\b", "hi", "\x15", "x\x7f/msg bob secret");
  assertEquals(await bob.next(), "[alice] hi");
  assertEquals(await bob.next(), "[alice -> you] secret");
});

Deno.test("a client in raw mode sends CR for Enter", async () => {
  await using server = open({ rate: 0 });
  await using alice = await Guest.join(server.port, "alice");
  await using bob = await Guest.join(server.port, "bob");
  await alice.send("hello\r");
  assertEquals(await bob.next(), "[alice] hello"); // without anything after it
  await alice.send("cr[bob] forged\r[bob] forged\r");
  assertEquals(await bob.next(), "[alice] cr[bob] forged");
  assertEquals(await bob.next(), "[alice] [bob] forged");
  await alice.send("/me waves\r");
  assertEquals(await bob.next(), "** alice waves");
  await alice.send("\n\0\rlast\r");
  assertEquals(await bob.next(), "[alice] last");
});

Deno.test("a stray byte 255, or an urgent byte taken from the stream, changes nothing else", async () => {
  await using server = open({ rate: 0 });
  await using alice = await Guest.join(server.port, "alice");
  await using bob = await Guest.join(server.port, "bob");
  const inputs: [typed: (string | number)[], received: string[]][] = [
    [["one", IAC, "\ntwo\n"], ["one", "two"]],
    [["one", IAC, "\r\ntwo\n"], ["one", "two"]],
    [["one", IAC, "\rtwo\n"], ["one", "two"]],
    [["o", IAC, "ne", IAC, IAC, "\ntwo\n"], ["one", "two"]],
    [[IAC, IAC, IAC, "one\n"], ["one"]],
    [[IAC, 0, "one\n"], ["one"]],
    [["one", IAC, DM, "\n"], ["one"]],
    [["o", IAC, NOP, "ne\n"], ["one"]],
    [[IAC, IP, IAC, "one\n"], ["one"]], // a Synch without its DM
  ];
  for (const [typed, received] of inputs) {
    await alice.send(
      typed.flatMap((part) =>
        typeof part === "number" ? part : [...encoder.encode(part)]
      ),
    );
    for (const line of received) {
      const said = (await bob.next())!.replaceAll("\ufffd", "");
      assertEquals(said, `[alice] ${line}`, JSON.stringify(typed));
    }
  }
  await alice.send([IAC, ...encoder.encode("/msg bob secret\n")]);
  assertEquals(await bob.next(), "[alice -> you] secret");
});

Deno.test("a sub-negotiation without an end swallows at most one line end", async () => {
  await using server = open({ rate: 0 });
  await using alice = await Guest.join(server.port, "alice");
  await using bob = await Guest.join(server.port, "bob");
  await alice.send([IAC, SB, 31, 0, 80, IAC, NOP]); // another command ends it
  await alice.say("one");
  assertEquals(await bob.next(), "[alice] one");
  await alice.send([IAC, SB, 31, ...encoder.encode("x".repeat(4_200))]);
  await alice.say("/msg bob the end of what was lost", "two");
  assertEquals(await bob.next(), "[alice] two");
});

Deno.test("Ctrl-C in telnet is told another way to leave where /quit is none", async () => {
  using file = new TemporaryFile("sesame\n");
  for (const options of [{ passwordFile: file.path }, { askName: true }]) {
    await using server = open(options);
    await using alice = await Guest.connect(server.port);
    await alice.send([IAC, IP]);
    await alice.find(
      /\* To leave, close the connection \(in telnet: Ctrl-\], then quit\)\.$/,
    );
  }
});

Deno.test("what is left of a telnet Synch changes nothing", async () => {
  await using server = open({ rate: 0 });
  await using alice = await Guest.join(server.port, "alice");
  await using bob = await Guest.join(server.port, "bob");
  const text = (typed: string) => [...encoder.encode(typed)];
  await alice.send([DM, ...text("one\r\nt"), DM, ...text("wo\r\n")]);
  await alice.send([...text("\u{80000} three"), DM, 10, DM, 13, 10]);
  await alice.send([DM]);
  await alice.settle();
  await alice.send(text("four\n"));
  // U+80000 begins with the same byte.
  for (const said of ["one", "two", "\u{80000} three", "four"]) {
    assertEquals(await bob.next(), `[alice] ${said}`);
  }
});

Deno.test("telnet commands of the user are carried out or answered", async () => {
  await using server = open({ rate: 0 });
  await using alice = await Guest.join(server.port, "alice");
  await using bob = await Guest.join(server.port, "bob");
  await alice.send([IAC, AYT]);
  await alice.find(/\* Yes, Parley is here\.$/);
  await alice.send([IAC, IP, IAC, DO, 6]); // Ctrl-C
  await alice.find(/\* To leave, type \/quit\.$/);
  await alice.send([IAC, IP]);
  assertEquals(await alice.next(), "* To leave, type /quit.");
  const text = (typed: string) => [...encoder.encode(typed)];
  await alice.send([...text("helox"), IAC, EC, IAC, EC, ...text("lo\n")]);
  assertEquals(await bob.next(), "[alice] hello");
  await alice.send([...text("wrong"), IAC, EL, ...text("right\n")]);
  assertEquals(await bob.next(), "[alice] right");
});

Deno.test("the first telnet command of a client is answered with DO BINARY, once", async () => {
  await using server = open({ raw: true });
  using conn = await Deno.connect({ port: server.port });
  const ECHO = 1;
  const asked = [IAC, DO, ECHO, IAC, WILL, BINARY, IAC, WILL, ECHO];
  for (const byte of asked) {
    await conn.write(Uint8Array.of(byte));
    await turn();
  }
  const expected = [IAC, DO, BINARY, IAC, WONT, ECHO, IAC, DONT, ECHO];
  const answers: number[] = [], buffer = new Uint8Array(20);
  while (answers.length < expected.length) {
    const count = await within(conn.read(buffer), "the answers");
    answers.push(...buffer.slice(0, count!));
  }
  assertEquals(answers, expected);
});

Deno.test("a line that begins with a slash and is no command is said as it is", async () => {
  await using server = open({ rate: 0 });
  await using alice = await Guest.join(server.port, "alice");
  await using bob = await Guest.join(server.port, "bob");
  const lines = [
    "// main.c",
    "/* block */",
    "/etc/passwd",
    "/usr/bin/env node",
    "/",
    "/ x",
    "//",
    "///",
    "//etc/hosts",
    "// who",
    "/who?",
    "/1",
    "/-me",
    "/me/you",
    "/dev/null 2>&1",
    "/^a.*b$/",
  ];
  await alice.settle();
  for (const line of lines) {
    await alice.say(line);
    assertEquals(await bob.next(), `[alice] ${line}`);
  }
  await alice.receivesNothing();
});

Deno.test("a line that shows nothing is not sent", async (t) => {
  const blank = [
    "",
    " ",
    "   ",
    "\t",
    "\xa0",
    "\u3000",
    "\u2003",
    "\u200b",
    "\u3164",
    "\u115f",
    "\u2800",
    "\xad",
    "\u2060",
    "\ufe0f",
    "\u{e0041}",
    " \u200b\u3164\t ",
    "\x1b[0m \x07",
    "x\b",
    "\r",
  ];
  for (const raw of [false, true]) {
    await t.step(raw ? "in a raw room" : "in a room", async () => {
      await using server = open({ raw, rate: 0 });
      await using bob = await Guest.connect(server.port);
      if (!raw) await bob.find(/Nobody else/);
      await using alice = await Guest.connect(server.port);
      if (!raw) await bob.find(/entered/);
      const mark = raw ? "" : "[guest2] ";
      for (const line of blank) {
        await alice.say(line, "end");
        assertEquals(await bob.next(), `${mark}end`, JSON.stringify(line));
      }
      if (raw) return;
      for (const line of blank) await alice.say(`/me ${line}`);
      await alice.say("end");
      assertEquals(await bob.next(), `${mark}end`);
    });
  }
});

Deno.test("a TAB becomes spaces up to the next multiple of 8, and stays in a raw room", async () => {
  await using server = open({ rate: 0 });
  await using alice = await Guest.join(server.port, "alice");
  await using bob = await Guest.join(server.port, "bob");
  await alice.say("a\tb", "\tx", "1234567\tx", "12345678\tx", "a\tb\t\tc");
  assertEquals(await bob.next(), "[alice] a       b");
  assertEquals(await bob.next(), "[alice]         x");
  assertEquals(await bob.next(), "[alice] 1234567 x");
  assertEquals(await bob.next(), "[alice] 12345678        x");
  assertEquals(await bob.next(), "[alice] a       b               c");
  await alice.say("/me\twaves", "/msg\tbob\thi");
  assertEquals(await bob.next(), "** alice waves");
  assertEquals(await bob.next(), "[alice -> you] hi");
  // However many there are, a line does not grow beyond its bound.
  await alice.say("\t".repeat(4_000) + "x", "end");
  const line = (await bob.next())!;
  assertMatch(line, /^\[alice\] +x$/);
  assert(line.length <= "[alice] ".length + LINE_BYTES, `${line.length} bytes`);
  assertEquals(await bob.next(), "[alice] end");

  await using raw = open({ raw: true });
  await using carol = await Guest.connect(raw.port);
  await using dave = await Guest.connect(raw.port);
  await carol.say("tab\tstays");
  assertEquals(await dave.next(), "tab\tstays");
});

// -- private text

/** A room with three people, and what the third, a stranger, has received. */
async function openWithStranger(options: Partial<Options> = {}) {
  const server = open({ rate: 0, ...options });
  const alice = await Guest.join(server.port, "alice");
  const bob = await Guest.join(server.port, "bob");
  const eve = await Guest.join(server.port, "eve");
  await alice.find(/known as eve/);
  await bob.find(/known as eve/);
  return {
    server,
    alice,
    bob,
    eve,
    async [Symbol.asyncDispose]() {
      for (const guest of [alice, bob, eve]) await guest[Symbol.asyncDispose]();
      await server.stop();
    },
  };
}

Deno.test("no part of a command that is too long is said or kept", async (t) => {
  using file = new TemporaryFile("");
  await using room = await openWithStranger({ log: file.path });
  const { alice, bob, eve } = room;
  await bob.say("/msg alice answer me");
  await alice.find(/answer me/);
  await bob.next();
  const long = "x".repeat(4_200) + " PIN 1234";
  const lines = [
    `/msg bob ${long}`,
    `/W bob ${long}`,
    `/reply ${long}`,
    `/r ${long}`,
    `/me ${long}`,
    `/nick ${long}`,
    `/quit ${long}`,
    `/mgs bob ${long}`, // an unknown one
    `/msg bob ${"é".repeat(2_100)} PIN 1234`,
    `/msg bob ${"x".repeat(LINE_BYTES - 8)}`, // a byte too long
    `/msg bob ${"x".repeat(20_000)} PIN 1234`,
    `/msg bob ${"x ".repeat(2_050)}/msg bob PIN 1234`,
    `/msg bob ${long}\rsecond`,
    `\x1bOQ/msg bob ${long}`,
    `\u200b/msg bob ${long}`,
  ];
  for (const line of lines) {
    await t.step(line.slice(0, 12), async () => {
      await alice.say(line);
      assertMatch((await alice.next())!, /^! Nothing was sent: a command /);
      await alice.receivesNothing();
      const [, second] = line.split("\r");
      if (second) {
        assertEquals(await eve.next(), "[alice] second");
        await bob.next();
      }
    });
  }
  const most = "x".repeat(LINE_BYTES - "/msg bob ".length);
  await alice.say(`/msg bob ${most}`, "done");
  assertEquals(await bob.next(), `[alice -> you] ${most}`);
  assertEquals(await bob.next(), "[alice] done");
  assertEquals(await eve.next(), "[alice] done");
  await room.server.stop();
  assertEquals(logged(file), ["[alice] second", "[alice] done"]);
});

Deno.test("a piece of a message that is too long is no command", async () => {
  await using room = await openWithStranger();
  const { alice, bob } = room;
  for (const piece of ["/quit", "/msg bob hi", "//who", "/x", "/nick zoe"]) {
    for (const letter of ["x", "é", "日"]) {
      const bytes = encoder.encode(letter).length;
      // Cut between characters, the first piece can be shorter.
      const first = letter.repeat(Math.floor(LINE_BYTES / bytes));
      const filler = "x".repeat(LINE_BYTES - first.length * bytes);
      await alice.say(first + filler + piece);
      assertEquals(await bob.next(), `[alice] ${first}${filler}`);
      assertEquals(await bob.next(), `[alice] ${piece}`);
    }
  }
  await alice.receivesNothing();
});

Deno.test("what is removed before a command makes no part of it public", async (t) => {
  await using room = await openWithStranger();
  const { alice, bob, eve } = room;
  const bytes = (...parts: (string | number)[]) =>
    parts.flatMap((part) =>
      typeof part === "number" ? part : [...encoder.encode(part)]
    );
  let sent = 0;
  /** Sends the command after `junk`; nobody but bob sees any part of it. */
  const hides = async (junk: number[]) => {
    const end = `end ${sent++}`;
    await alice.send([...junk, ...bytes(`/msg bob PIN 1234\n${end}\n`)]);
    for (const guest of [bob, eve]) {
      const seen: string[] = [];
      for (let line; !(line = (await guest.next())!).endsWith(end);) {
        line = line.replace(/^\[alice\] [\ufffd\uf704\u0378]+$/, "");
        if (line) seen.push(line.replaceAll("\ufffd", ""));
      }
      if (guest === bob && seen.length > 0) {
        assertEquals(seen, ["[alice -> you] PIN 1234"]);
      } else assertEquals(seen, []);
    }
  };
  const junk: [what: string, bytes: number[]][] = [
    ["Esc", bytes("\x1b")],
    ["F2", bytes("\x1bOQ")],
    ["F1 of the Linux console", bytes("\x1b[[A")],
    ["an unfinished sequence", bytes("\x1b[1;")],
    ["an unfinished function key", bytes("\x1bO")],
    ["an unfinished title", bytes("\x1b]")],
    ["an unfinished C1 sequence", bytes("\x9b")],
    ["a byte order mark", bytes("\ufeff")],
    ["zero-width spaces", bytes("\u200b\u200b")],
    ["a Hangul filler", bytes("\u3164")],
    ["a soft hyphen", bytes("\xad")],
    ["a word joiner", bytes("\u2060")],
    ["a tag", bytes("\u{e0041}")],
    ["a private character, such as a function key of macOS", bytes("\uf704")],
    ["an unassigned character", bytes("\u0378")],
    ["a bidirectional control", bytes("\u202e")],
    ["a line separator", bytes("\u2028")],
    ["control characters", bytes("\0\x01\x07")],
    ["what Backspace erased", bytes("x\b")],
    ["what Ctrl-U erased", bytes("hello\x15")],
    ["bytes that are no UTF-8", [0xc3, 0xfe]],
    ["a stray 255", [IAC]],
    ["two of them", [IAC, IAC]],
    ["NOP", [IAC, NOP]],
    ["DM", [IAC, DM]],
    ["an option", [IAC, WILL, 31]],
    ["a sub-negotiation", [IAC, SB, 31, 0, 80, 0, 24, IAC, SE]],
    ["what EC erased", [120, IAC, EC]],
    ["what EL erased", [120, 120, IAC, EL]],
  ];
  for (const [what, each] of junk) {
    await t.step(what, async () => {
      await hides(each);
      if (/unfinished|erased/.test(what)) return; // many of them show something
      // As much of it as one line can have, and a byte less or more.
      const most = Math.floor(LINE_BYTES / each.length);
      for (const count of [most - 1, most, most + 1]) {
        await hides(Array(count).fill(each).flat());
      }
    });
  }
  await t.step("a line cut anywhere in the command", async () => {
    for (let count = LINE_BYTES - 24; count <= LINE_BYTES + 1; count++) {
      await hides(Array(count).fill(0));
    }
  });
  await alice.settle();
});

Deno.test("white space of any kind ends the name of a command", async () => {
  await using room = await openWithStranger();
  const { alice, bob, eve } = room;
  for (const space of [" ", "  ", "\t", "\xa0", "\u3000", "\u2003"]) {
    await alice.say(`/msg${space}bob${space}PIN 1234`, "end");
    assertEquals(await bob.next(), "[alice -> you] PIN 1234");
    assertEquals(await bob.next(), "[alice] end");
    assertEquals(await eve.next(), "[alice] end");
  }
});

Deno.test("a password or a name that is too long is refused whole, once", async (t) => {
  using file = new TemporaryFile("sesame");
  const long = "x".repeat(9_000);
  await t.step("a password", async () => {
    await using server = open({ passwordFile: file.path });
    await using bob = await Guest.connect(server.port);
    await bob.say("sesame");
    await bob.find(/Nobody else/);
    await using alice = await Guest.connect(server.port);
    assertEquals(await alice.next(), ASKED);
    for (let i = 0; i < 2; i++) { // two of three tries
      await alice.say(long);
      assertMatch((await alice.next())!, /^! /);
      assertEquals(await alice.next(), ASKED);
    }
    await alice.say("sesame", "hello");
    await alice.find(/^\* Welcome/);
    assertMatch((await bob.next())!, /has entered the room$/);
    assertEquals(await bob.next(), "[guest2] hello");
  });
  await t.step("a name", async () => {
    await using server = open({ askName: true });
    await using bob = await Guest.connect(server.port);
    await bob.say("bob");
    await bob.find(/room contains/);
    await using alice = await Guest.connect(server.port);
    await alice.say(long, "hello");
    await alice.next();
    const answers = await alice.rest();
    assertEquals(answers.length, 1);
    assertMatch(answers[0], /^! /);
    await using carol = await Guest.connect(server.port);
    await carol.say("carol");
    assertEquals(await bob.next(), "* carol has entered the room");
  });
});

Deno.test("a line that is too long is passed on in pieces, cut between characters", async () => {
  await using server = open({ raw: true, rate: 0 });
  await using alice = await Guest.connect(server.port);
  await using bob = await Guest.connect(server.port);
  const half = LINE_BYTES / 2 - 1; // letters of two bytes after one of one byte
  await alice.say(
    "x".repeat(LINE_BYTES),
    "y".repeat(LINE_BYTES + 1),
    "z" + "é".repeat(half + 1_953),
  );
  assertEquals(await bob.next(), "x".repeat(LINE_BYTES));
  assertEquals(await bob.next(), "y".repeat(LINE_BYTES));
  assertEquals(await bob.next(), "y");
  assertEquals(await bob.next(), "z" + "é".repeat(half));
  assertEquals(await bob.next(), "é".repeat(1_953));
  const invalid = new Uint8Array(LINE_BYTES + 904).fill(0x80); // no UTF-8
  await alice.send([...invalid, 10]);
  assertEquals(await bob.next(), "\ufffd".repeat(LINE_BYTES));
  assertEquals(await bob.next(), "\ufffd".repeat(904));
});

Deno.test({
  name: "20 MB without a newline arrive whole, in flat memory",
  ignore: !LINUX,
  async fn() {
    await using program = await Program.start(["--raw", "--rate", "0"]);
    await using alice = await Guest.connect(program.port);
    await using bob = await Guest.connect(program.port);
    await program.output.find(/2 here/);
    const before = await program.memory(), size = 20_000_000;
    let most = before;
    const sending = (async () => {
      const part = encoder.encode("0123456789".repeat(10_000));
      for (let sent = 0; sent < size; sent += part.length) {
        await alice.send(part);
        if (sent % 2_000_000 === 0) {
          most = Math.max(most, await program.memory());
        }
      }
      await alice.say("");
    })();
    let received = 0;
    while (received < size) {
      const line = (await bob.next())!;
      assert(line.length <= LINE_BYTES);
      assertEquals(line[0], String(received % 10));
      received += line.length;
    }
    await sending;
    assertEquals(received, size);
    assert(most - before < 60, `${most - before} MiB more`);
  },
});

Deno.test("a first line that is an HTTP request is refused", async () => {
  await using server = open();
  await using alice = await Guest.join(server.port);
  await using page = await Guest.connect(server.port);
  await page.send("POST / HTTP/1.1\r\nHost: x\r\n\r\nI am a web page\r\n");
  assertEquals(await page.find(/^HTTP/), "HTTP/1.1 400 Bad Request");
  await page.find(/^This is a Parley chat room\. .*nc HOST PORT$/);
  await page.rest();
  assertEquals(await alice.next(), "* guest2 has entered the room");
  assertEquals(
    await alice.next(),
    "* guest2 has left the room (a web request)",
  );
  await using bob = await Guest.join(server.port, "bob");
  await bob.say("GET / HTTP/1.1");
  await alice.find(/^\[bob\] GET \/ HTTP\/1\.1$/); // not a first line
});

Deno.test("a TLS handshake or an over-long HTTP request is refused, not passed on", async () => {
  await using server = open();
  await using alice = await Guest.join(server.port);
  await using secure = await Guest.connect(server.port);
  await secure.send([0x16, 0x03, 0x01, 10, 65, 66, 10]);
  await secure.rest();
  await alice.find(/left the room \(TLS, which is off\)$/);
  await using page = await Guest.connect(server.port);
  await page.send(`POST /${"a".repeat(6_000)} HTTP/1.1\r\n\r\nhello\r\n`);
  await alice.find(/left the room \(a web request\)$/);
});

Deno.test("/reply goes to the last sender of a private message who is not ignored", async () => {
  await using server = open();
  await using alice = await Guest.join(server.port, "alice");
  await using bob = await Guest.join(server.port, "bob");
  await using mallory = await Guest.join(server.port, "mallory");
  await bob.say("/ignore mallory");
  await bob.find(/no longer receive messages from mallory/);
  await alice.say("/msg bob our plan?");
  await bob.find(/our plan/);
  await mallory.say("/msg bob x");
  await mallory.find(/you -> bob/);
  await bob.say("/reply tomorrow");
  await alice.find(/^\[bob -> you\] tomorrow$/);
});

Deno.test("bytes that make no line neither delay nor disconnect anyone", async () => {
  await using server = open();
  await using alice = await Guest.join(server.port, "alice");
  for (const bytes of [[IAC, DO, 6], [10], [IAC, SB, 1]]) {
    const flooder = await Guest.connect(server.port);
    const flooding = flooder.send(
      Array.from({ length: 3_000_000 }, (_, i) => bytes[i % bytes.length]),
    ).catch(() => {});
    for (let i = 0; i < 5; i++) {
      await within(alice.settle(), "an answer", 1_000);
    }
    flooder.conn.close();
    await flooding;
  }
});

// -- slow clients, rate and limits

Deno.test({
  name:
    "a client that never reads delays nobody, is disconnected as too slow, and the room is told",
  ignore: !LINUX,
  async fn() {
    await using program = await Program.start(["--rate", "0"]);
    await using alice = await Guest.join(program.port, "alice");
    await using bob = await Guest.join(program.port, "bob");
    await alice.find(/known as bob/);
    const descriptors = await program.descriptors();
    const before = await program.memory();
    const slow = await Deno.connect({ port: program.port });
    await alice.find(/entered the room/);
    let received = 0, told = false;
    for (let sent = 0; !told && sent < 40_000; sent += 100) {
      await flood(alice, 100);
      while (received < sent + 100) {
        const line = (await bob.find(/^\[alice\]|too slow/))!;
        if (line.startsWith("[")) received++;
        else {
          assertEquals(line, "* guest3 has left the room (too slow)");
          told = true;
        }
      }
    }
    assert(told, "the room was never told");
    assertMatch(
      await program.output.find(/too slow/),
      /^Disconnected .* \(guest3, too slow, 2 here\)$/,
    );
    // Although its write and its read never end:
    await eventually(
      async () => await program.descriptors() === descriptors,
      "the descriptor is closed",
    );
    assert(await program.memory() - before < 60);
    slow.close();
  },
});

Deno.test("readers that wait for a busy server are not too slow, however much is said", async () => {
  const readers = 300, lines = 5_000, lineBytes = 1_000; // more than the window
  await using server = open({ raw: true, rate: 0 });
  const waiting: (() => void)[] = []; // the writes, which this machine ends in turn
  const received: number[] = Array(readers).fill(0);
  for (let i = 0; i < readers; i++) {
    admit(server, {
      write: (bytes) =>
        new Promise((resolve) =>
          waiting.push(() => {
            const count = Math.min(bytes.length, 16_384);
            received[i] += count;
            resolve(count);
          })
        ),
    });
  }
  await using alice = await Guest.connect(server.port);
  const text = "x".repeat(lineBytes - 1);
  const said = alice.say(...Array(lines).fill(text));
  const isDone = () => received.every((count) => count === lines * lineBytes);
  const writing = (async () => {
    for (; !isDone(); await turn()) {
      waiting.splice(0, 8).forEach((end) => end());
    }
  })();
  await within(writing, "everyone receives all");
  await said;
});

Deno.test("a reader that takes nothing holds nobody's lines back", async () => {
  const readers = 300;
  await using server = open({ raw: true, rate: 0 });
  let received = 0;
  for (let i = 0; i < readers; i++) {
    admit(server, {
      write(bytes) {
        received += bytes.length;
        return Promise.resolve(bytes.length);
      },
    });
  }
  admit(server, { write: never });
  // Two who take turns: the lines of one alone are written at once.
  const says: ((bytes: Uint8Array) => void)[] = [];
  for (let i = 0; i < 2; i++) {
    admit(server, {
      read: (buffer) =>
        new Promise((resolve) =>
          says.push((bytes) => resolve(Buffer.from(bytes).copy(buffer)))
        ),
      write: (bytes) => Promise.resolve(bytes.length),
    });
  }
  /** Says a line; resolves to the turns of the event loop until all have it. */
  const turnsFor = async (line: Uint8Array) => {
    const all = received + readers * line.length;
    while (says.length < 2) await turn();
    says.shift()!(line);
    let turns = 0;
    for (; received < all && turns < 100_000; turns++) await turn();
    return turns;
  };
  const large = encoder.encode("x".repeat(249) + "\n");
  // Until the one that takes nothing is far behind, but not too slow.
  for (let i = 0; i < 8_000; i++) await turnsFor(large);
  let turns = 0;
  for (let i = 0; i < 20; i++) turns += await turnsFor(large);
  assert(turns < 400, `20 lines took ${turns} turns`); // 20 ms were thousands
});

Deno.test("a person who says something does not wait for all who always have more to say", async () => {
  const talkers = 200;
  await using server = open({ raw: true, rate: 0 });
  let received = 0, helloAt = 0;
  const decoder = new TextDecoder();
  admit(server, {
    write(bytes) {
      received += bytes.length;
      if (decoder.decode(bytes).includes("hello")) helloAt = received;
      return Promise.resolve(bytes.length);
    },
  });
  const alice = Promise.withResolvers<void>();
  let aliceSpoke = false;
  admit(server, {
    async read(buffer) {
      if (aliceSpoke) return await never();
      await alice.promise;
      aliceSpoke = true;
      return encoder.encodeInto("hello\n", buffer).written;
    },
  });
  const flood = Buffer.from(("y".repeat(99) + "\n").repeat(81)); // 8 KB
  for (let i = 0; i < talkers; i++) {
    admit(server, {
      read: (buffer) =>
        helloAt > 0 ? never() : Promise.resolve(flood.copy(buffer)),
      write: (bytes) => Promise.resolve(bytes.length),
    });
  }
  await eventually(() => received > 4_000_000, "all talk");
  const before = received;
  alice.resolve();
  await eventually(() => helloAt > 0, "hello is received");
  // A round of all talkers is 1.6 MB.
  assert(helloAt - before < 300_000, `after ${helloAt - before} bytes`);
});

Deno.test("clients whose input is all removed are not served before those who talk", async () => {
  await using server = open({ raw: true, rate: 0 });
  const reads = { talk: 0, junk: 0 };
  const kinds = {
    talk: Buffer.from(("y".repeat(99) + "\n").repeat(81)),
    junk: Buffer.alloc(65_536, "\n"),
  };
  let isOver = false;
  for (const kind of ["talk", "junk"] as const) {
    for (let i = 0; i < 100; i++) {
      admit(server, {
        read(buffer) {
          if (isOver) return never();
          reads[kind]++;
          return Promise.resolve(kinds[kind].copy(buffer));
        },
        write: (bytes) => Promise.resolve(bytes.length),
      });
    }
  }
  await eventually(() => reads.talk + reads.junk > 2_000, "all send");
  isOver = true;
  assert(reads.talk * 3 > reads.junk, JSON.stringify(reads));
});

Deno.test("the read buffer of a client shrinks when it sends little", async () => {
  const [most, resting, least] = [65_536, 2_048, 256]; // bytes
  await using server = open({ raw: true, rate: 0 });
  const sizes: number[] = [];
  const { closed } = admit(server, {
    async read(buffer) {
      await turn();
      buffer.fill(10);
      switch (sizes.push(buffer.length)) {
        case 9: // less than the whole buffer for the first time
          return buffer.length - 1;
        case 10: // one byte after that
          return 1;
        case 11:
          return null;
      }
      return buffer.length;
    },
  });
  await within(closed, "the end");
  assertEquals(sizes.slice(8), [most, resting, least]);
});

Deno.test("a known command behind white space is run, and another line stays as it is", async () => {
  await using server = open();
  await using alice = await Guest.join(server.port, "alice");
  await using bob = await Guest.join(server.port, "bob");
  await alice.find(/known as bob/);
  for (const space of [" ", "   ", "\t", "\u00a0", "\u3000", " \u200b "]) {
    await bob.say(`first\n${space}/msg alice PIN`, " /well", "  // main.c");
    assertEquals(await alice.next(), "[bob] first");
    assertEquals(await alice.next(), "[bob -> you] PIN");
    assertEquals(await alice.next(), "[bob]  /well");
    assertEquals(await alice.next(), "[bob]   // main.c");
    assertEquals(await bob.next(), "[you -> alice] PIN");
  }
});

Deno.test("what is refused for its length is not said among other lines", async () => {
  await using server = open({ rate: 0 });
  await using alice = await Guest.join(server.port, "alice");
  const bob = Visitor.admit(server, "192.0.2.1");
  await alice.find(/has entered/);
  bob.say(`one\n/msg alice ${"x".repeat(9_000)}\ntwo`);
  assertEquals(await alice.next(), "[guest2] one");
  assertEquals(await alice.next(), "[guest2] two");
});

Deno.test("a client gets the answer to each command of one write, also long ones", async () => {
  await using server = open({ rate: 0 });
  for (let i = 0; i < 200; i++) { // names of 84 bytes or more
    const visitor = Visitor.admit(server, "192.0.2.1");
    visitor.say(`/nick ${"𐐷".repeat(20)}${i}`);
  }
  await using alice = await Guest.join(server.port, "alice");
  await alice.say(...Array.from({ length: 20 }, () => "/who"));
  for (let i = 0; i < 20; i++) await alice.find(/\(201\)$/);
  await alice.settle();
});

Deno.test("a link whose functions throw costs nobody anything", async () => {
  const errors: unknown[] = [];
  const caught = (event: ErrorEvent) => {
    event.preventDefault();
    errors.push(event.error);
  };
  addEventListener("error", caught);
  try {
    const fail = () => {
      throw new Error("the link");
    };
    await using server = open();
    server.attach({
      said: fail,
      joined: fail,
      left: fail,
      renamed: fail,
      away: fail,
      toldPrivately: fail,
      stopping: fail,
    });
    await using alice = await Guest.join(server.port, "alice");
    await using bob = await Guest.join(server.port, "bob");
    await alice.find(/known as bob/);
    await bob.say("hello", "/away", "/back");
    await alice.find(/^\[bob\] hello$/);
    await bob.say("/quit");
    await alice.find(/^\* bob has left the room$/);
    await within(server.stop(), "the end");
    assert(errors.length >= 6, `${errors.length} errors`);
  } finally {
    removeEventListener("error", caught);
  }
});

/** A link that does nothing, of the server that others call tokyo. */
function attachLink(server: ChatServer) {
  return server.attach({
    said() {},
    joined() {},
    left() {},
    renamed() {},
    away() {},
    toldPrivately() {},
    stopping: () => Promise.resolve(),
  }, { name: "tokyo" });
}

Deno.test("a person on a linked server is found by the name that others use", async () => {
  await using server = open();
  const link = attachLink(server);
  link.add("Bob@paris");
  await using alice = await Guest.join(server.port, "alice");
  await using carol = await Guest.join(server.port, "carol");
  await alice.find(/known as carol/);
  await alice.say("/msg carol@tokyo hi", "/who @Carol@Tokyo,", "/bell on");
  assertEquals(await alice.next(), "[you -> carol] hi");
  assertMatch((await alice.next())!, /^\* carol has been here /);
  assertMatch((await alice.next())!, /rings/);
  assertEquals(await carol.find(/hi$/), "[alice -> you] hi");
  const bytes = (text: string) => new TextEncoder().encode(text);
  link.say("bob@paris", bytes("see alice@osaka\nsee alice@tokyo\n"));
  assertEquals(await alice.next(), "\x07[Bob@paris] see alice@osaka");
  assertEquals(await alice.next(), "[Bob@paris] see alice@tokyo");
  link.say("bob@paris", bytes("see alice@osaka\n"));
  assertEquals(await alice.next(), "[Bob@paris] see alice@osaka");
  for (const command of ["/msg bob hi", "/who BOB", "/ignore bob"]) {
    await alice.say(command);
    assertMatch(
      (await alice.next())!,
      /called bob\. Did you mean Bob@paris\?/i,
    );
  }
});

Deno.test("a person who returns after an outage is still ignored, and answered by /reply", async () => {
  await using server = open();
  const link = attachLink(server);
  const say = (text: string) =>
    link.say("bob@paris", new TextEncoder().encode(text + "\n"));
  await using alice = await Guest.join(server.port, "alice");
  link.add("bob@paris");
  link.add("eve@paris");
  link.tell("eve@paris", "alice", "psst");
  await alice.say("/ignore bob@paris");
  await alice.find(/no longer receive/);
  for (const name of ["bob@paris", "eve@paris"]) {
    link.remove(name, { mayReturn: true });
    assert(link.add(name));
  }
  say("hidden");
  await alice.say("/reply pssst", "/ignore");
  assertEquals(await alice.next(), "[you -> eve@paris] pssst");
  assertEquals(await alice.next(), "* You ignore bob@paris.");
  // Another person may have the name after that.
  link.remove("bob@paris", { mayReturn: true });
  link.remove("bob@paris");
  assert(link.add("bob@paris"));
  say("hello");
  assertEquals(await alice.next(), "[bob@paris] hello");
  await alice.say("/ignore");
  assertEquals(await alice.next(), "* You ignore nobody.");
});

Deno.test("a person who leaves is missed, even if they returned silently before", async () => {
  await using server = open();
  const link = attachLink(server), announce = true;
  await using alice = await Guest.join(server.port, "alice");
  // So many that what comes next is gathered.
  for (let i = 0; i < 20; i++) link.add(`bob${i}@paris`, { announce });
  for (const name of ["zoe@paris", "amy@paris"]) {
    link.add(name);
    link.remove(name, { announce, mayReturn: true });
    link.add(name);
  }
  link.remove("zoe@paris", { announce });
  link.detach();
  assertEquals(
    await alice.find(/people have/),
    "* 2 people have left the room", // and those who had just joined, in silence
  );
});

Deno.test("the new name of a person who left and returned within a second is told", async () => {
  await using server = open();
  const link = attachLink(server), announce = true;
  await using alice = await Guest.join(server.port, "alice");
  // So many that what comes next is gathered.
  for (let i = 0; i < 20; i++) link.add(`bob${i}@paris`, { announce });
  assert(link.add("zoe@paris"));
  link.remove("zoe@paris", { announce, mayReturn: true });
  link.add("zoe@paris", { announce });
  assert(link.rename("zoe@paris", "eve@paris"));
  assertMatch(
    await alice.find(/now known/),
    /^\* zoe@paris is now known as eve/,
  );
});

Deno.test("the operator sees people of other servers who join and leave, and lists them", async () => {
  const printed: string[] = [];
  await using server = open({}, printed);
  const link = attachLink(server);
  await using host = new Console(server);
  await host.type("/who");
  assertEquals(await host.next(), "* Nobody is here.");
  link.add("bob@paris", { announce: true, away: "lunch" });
  assertEquals(await host.next(), "* bob@paris has entered the room");
  await using alice = await Guest.join(server.port, "alice");
  await alice.settle();
  assertEquals(await host.next(), "* guest1 is now known as alice");
  await host.type("/who", "/who bob@paris", "/who zoe", "/who host");
  assertMatch((await host.next())!, /^\* alice 127\.0\.0\.1:\d+, 0 minutes$/);
  for (let i = 0; i < 2; i++) {
    assertEquals(
      await host.next(),
      "* bob@paris, on another server, away: lunch",
    );
  }
  assertMatch((await host.next())!, /^! Nobody here is called zoe\./);
  assertEquals(await host.next(), "* That is you.");
  link.remove("bob@paris", { announce: true });
  assertEquals(await host.next(), "* bob@paris has left the room");
});

Deno.test("after the end of the console's input an event is still printed once", async () => {
  await using program = await Program.start(["--console"], { typing: true });
  await program.type("hello");
  await program.typeEnd();
  await program.output.find(/no more input/);
  await using alice = await Guest.join(program.port, "alice");
  await alice.say("hello");
  assertMatch(
    (await program.output.next())!,
    /^New Connection from .*\(guest1, 1 here\)$/,
  );
  assertMatch((await program.output.next())!, /known as alice$/);
  assertEquals(await program.output.next(), "[alice] hello");
});

Deno.test("the operator of a raw room disconnects one client by its address and port", async () => {
  await using server = open({ raw: true });
  await using alice = await Guest.connect(server.port);
  await using bob = await Guest.connect(server.port);
  await bob.say("hello");
  await alice.find(/hello/);
  await using host = new Console(server);
  await host.type("/who");
  const rows = [(await host.next())!, (await host.next())!];
  const origins = rows.map((row) => /^\* \(no name\) (\S+), /.exec(row)![1]);
  await host.type(`/kick ${origins[1]}`);
  assertEquals(await bob.rest(), []);
  await host.type("still here");
  await alice.find(/still here/);
});

Deno.test("no piece of a long line is a command", async (t) => {
  const long = "a".repeat(4_096);
  const pieces = [
    " /msg alice secret",
    "/msg alice secret",
    " /me waves",
    "\u3000/nick zork",
    "\t/quit",
  ];
  await t.step("of a client", async () => {
    await using server = open();
    await using alice = await Guest.join(server.port, "alice");
    await using bob = await Guest.join(server.port, "bob");
    await alice.find(/known as bob/);
    for (const piece of pieces) {
      await bob.say(long + piece);
      assertEquals(await alice.next(), `[bob] ${long}`);
      const [, text] = /^\[bob\] +(\/.*)$/.exec((await alice.next())!)!;
      assertEquals(text, piece.trim());
    }
  });
  await t.step("of the operator", async () => {
    await using server = open();
    await using alice = await Guest.join(server.port, "alice");
    await using host = new Console(server);
    await host.type(`${long} /kick alice`, `${long} /quit`, "still here");
    assertEquals(await alice.next(), `[host] ${long}`);
    assertEquals(await alice.next(), "[host]  /kick alice");
    assertEquals(await alice.next(), `[host] ${long}`);
    assertEquals(await alice.next(), "[host]  /quit");
    assertEquals(await alice.next(), "[host] still here");
  });
});

Deno.test("nothing that follows what is erased in a long line becomes public", async () => {
  const x = "x".repeat(4_096);
  const lines = [
    `${x}y\x15/msg alice secret`, // Ctrl-U
    `${x}${"\b".repeat(4_096)}/msg alice secret`,
    `${x}${"\b".repeat(4_095)} /msg alice secret`,
    `/1${"x".repeat(4_094)}${"\x7f".repeat(4_095)}msg alice secret`,
    `  /1${" ".repeat(4_092)}${"\x7f".repeat(4_093)}msg alice secret`,
    `${x}yy\x15${"z".repeat(3_000)}\x15/msg alice secret`,
  ];
  await using server = open();
  await using alice = await Guest.join(server.port, "alice");
  await using bob = await Guest.join(server.port, "bob");
  await alice.find(/known as bob/);
  for (const line of lines) {
    await bob.say(line, "done");
    for (;;) {
      const received = await alice.next();
      if (received === "[bob] done") break;
      assertMatch(received!, /^\[bob\] /);
      assert(!/ecret|msg/.test(received!), received!);
    }
    assertEquals(
      await bob.find(/^! /),
      "! The rest of that line was not sent: nothing can be erased in a line " +
        "of more than 4096 bytes.",
    );
  }
  await bob.say(`/msg alice ${x}\x15/msg alice ${x}\x15/msg alice hi`, "done");
  assertEquals(await alice.next(), "[bob] done");
  assertMatch((await bob.next())!, /^! Nothing was sent: a command can have /);
  await bob.say("/who");
  assertMatch((await bob.next())!, /^\* Here now: /); // refused once
});

Deno.test("what is refused of a command that is too long is charged too", async () => {
  using _clock = fastClock();
  await using server = open({ rate: 20 });
  await using alice = await Guest.join(server.port, "alice");
  // 300 lines' worth: 100 at once, the others at 20 a second, of a fast clock.
  const start = performance.now();
  await alice.say(`/msg bob ${"x".repeat(300 * 4_096)}`, "/who");
  await alice.find(/^! Nothing was sent: /);
  await alice.find(/^\* Here now: /);
  assert(performance.now() - start > 8_000, "too soon");
});

Deno.test("an answer that is too long counts once, whatever is erased in it", async () => {
  const passwordFile = await Deno.makeTempFile();
  await Deno.writeTextFile(passwordFile, "sesame\n");
  await using server = open({ passwordFile });
  await using alice = await Guest.connect(server.port);
  await alice.say(`${`${"x".repeat(4_200)}\x15`.repeat(3)}sesame`, "sesame");
  await alice.find(/^! That is not the password\.$/);
  await alice.find(/Welcome! You are guest1/);
  await Deno.remove(passwordFile);
});

Deno.test("a rename is told to those who have seen the name before", async () => {
  await using server = open({ rate: 100 });
  await using alice = await Guest.join(server.port, "alice");
  await using guests = new AsyncDisposableStack();
  for (let i = 0; i < 12; i++) guests.use(await Guest.join(server.port));
  await using bob = await Guest.connect(server.port);
  await bob.say("hi", "/nick bob", "again");
  await alice.find(/^\[guest14\] hi$/);
  assertEquals(await alice.find(/bob/), "* guest14 is now known as bob");
  await alice.find(/^\[bob\] again$/);
});

Deno.test("a person who is removed silently is in no later notice", async () => {
  await using server = open();
  const link = attachLink(server);
  await using alice = await Guest.join(server.port, "alice");
  const names = numbered(14, "p").map((name) => `${name}@paris`);
  for (const name of names) link.add(name, { announce: true });
  for (const name of names) link.remove(name, { mayReturn: true });
  link.notice("paris is gone");
  await alice.find(/^\* paris is gone$/);
  await new Promise((resolve) => setTimeout(resolve, 1_200)); // past the next notice
  await alice.say("/who");
  assertEquals(await alice.next(), "* Here now: alice (1)");
});

Deno.test("lines that are typed on the console after /quit are not taken", async () => {
  const directory = await Deno.makeTempDir();
  const log = `${directory}/chat.log`;
  const server = open({ log });
  const lines = ReadableStream.from(["hello", "/quit\rat once", "later"]);
  await server.operate(lines, () => {});
  await within(server.finished, "the end");
  const said = await Deno.readTextFile(log);
  assertMatch(said, /^\S+ \[host\] hello\n$/);
  await Deno.remove(directory, { recursive: true });
});

Deno.test("a new connection is reported before it is refused for wrong passwords", async () => {
  const passwordFile = await Deno.makeTempFile();
  await Deno.writeTextFile(passwordFile, "sesame\n");
  const printed: string[] = [];
  await using server = open({ passwordFile }, printed);
  for (let i = 0; i < 2; i++) {
    await using guest = await Guest.connect(server.port);
    await guest.say("a", "b", "c");
    await guest.rest();
  }
  await eventually(() => printed.length === 4, "both have left");
  assertEquals(printed.map((line) => line.split(" ")[0]), [
    "New",
    "Disconnected",
    "New",
    "Disconnected",
  ]);
  await Deno.remove(passwordFile);
});

Deno.test("a connection whose handshake throws costs only itself", async () => {
  await using server = open();
  const handshake = () => {
    throw new Error("no handshake");
  };
  const { closed } = admit(server, { handshake });
  await within(closed, "the close");
  await using alice = await Guest.join(server.port, "alice");
  await alice.settle();
});

Deno.test("a refused client of a raw room, or one that asks for names, gets no goodbye", async () => {
  for (const options of [{ raw: true }, { askName: true }]) {
    await using server = open({ ...options, maxClients: 1 });
    await using _alice = await Guest.connect(server.port);
    await using bob = await Guest.connect(server.port);
    assertEquals(await bob.rest(), ["! The room is full. Try again later."]);
  }
});

Deno.test("connections that end unseen do not give their address another burst", async () => {
  await using server = open({ rate: 20 });
  await using alice = await Guest.join(server.port, "alice");
  let lines = 0;
  for (let i = 0; i < 10; i++) {
    const guest = await Deno.connect({ port: server.port });
    await guest.write(encoder.encode(numbered(100, "line ").join("\n") + "\n"));
    guest.close();
  }
  const counting = (async () => {
    for (let line; (line = await alice.next()) !== null;) {
      if (line.includes("] line ")) lines++;
    }
  })();
  await new Promise((resolve) => setTimeout(resolve, 500));
  // A burst, and half a second's worth of each that is still to be read.
  assert(lines > 50 && lines < 400, `${lines} lines`);
  await server.stop();
  await counting;
});

Deno.test("the sender of the line for which a slow client is dropped is told too", async () => {
  await using server = open({ rate: 0 });
  await using alice = await Guest.join(server.port, "alice");
  admit(server, { write: never });
  await alice.find(/has entered the room/);
  await flood(alice, 6_000);
  await alice.find(/^\* guest2 has left the room \(too slow\)$/);
});

Deno.test("a rate-limited paste arrives whole while others talk", async () => {
  const rate = 20, burst = 5 * rate; // lines a second, lines at once
  await using server = open({ rate });
  await using alice = await Guest.join(server.port, "alice");
  await using bob = await Guest.join(server.port, "bob");
  await using carol = await Guest.join(server.port, "carol");
  await bob.find(/known as carol/);
  const page = numbered(burst + 1.5 * rate, "line ");
  const started = performance.now();
  await alice.say(...page); // the command /nick was one more
  const received: string[] = [], times: number[] = [];
  while (received.length < page.length) {
    received.push((await bob.find(/^\[alice\]/)).replace("[alice] ", ""));
    times.push(performance.now() - started);
    if (received.length === burst + 10) {
      await carol.say("free to talk");
      await carol.settle();
    }
  }
  assertEquals(received, page);
  const first = times[burst - 5], all = times.at(-1)!;
  assert(first < 500, `the burst took ${first} ms`);
  assert(all > 1_000, `all took ${all} ms only`);
});

Deno.test("lines that a client sent before it left still arrive, at its rate", async () => {
  await using server = open({ rate: 20 });
  await using bob = await Guest.join(server.port);
  const alice = await Guest.join(server.port, "alice");
  await alice.say(...numbered(120, "line "));
  await alice[Symbol.asyncDispose]();
  await bob.find(/line 119$/);
  assertEquals(await bob.next(), "* alice has left the room");
});

Deno.test("clients that come and go have one rate together", async () => {
  const rate = 20, burst = 5 * rate; // lines a second, lines at once
  await using server = open({ rate });
  await using bob = await Guest.join(server.port, "bob");
  const started = performance.now();
  const buffer = new Uint8Array(10_000);
  for (let i = 0; i < 100; i++) {
    using conn = await Deno.connect({ port: server.port });
    await conn.read(buffer);
    await conn.write(encoder.encode("/msg bob hey\n".repeat(burst)));
    await new Promise((resolve) => setTimeout(resolve, 40));
  }
  await bob.say("/who");
  let said = 0;
  for (let line; !/Here now/.test(line = (await bob.next())!);) {
    if (/hey$/.test(line)) said++;
  }
  const seconds = (performance.now() - started) / 1_000;
  // Two of these are of those who are here, bob and the one who has just joined.
  assert(said < burst + 5 * rate * seconds, `${said} lines in ${seconds} s`);
});

Deno.test("what a client sends that is not said costs it like a line", async (t) => {
  const rate = 20, burst = 5 * rate; // lines a second, lines at once
  const inputs: [what: string, typed: string | number[], lines: number][] = [
    ["empty lines", "\n".repeat(2_000), 2_000],
    ["CR LF", "\r\n".repeat(burst + 10), burst + 10],
    ["lines of white space", " \n".repeat(burst + 10), burst + 10],
    ["invisible lines", "\u200b\n".repeat(burst + 10), burst + 10],
    ["control characters", "\0".repeat((burst + 10) * LINE_BYTES), burst + 10],
    [
      "telnet commands",
      Array(LINE_BYTES / 2 * (burst + 10)).fill([IAC, NOP]).flat(),
      burst + 10,
    ],
    ["escape sequences", "\x1b[0m".repeat((burst + 10) * 1_024), burst + 10],
  ];
  for (const [what, typed, lines] of inputs) {
    await t.step(what, async () => {
      using _clock = fastClock();
      await using server = open({ rate });
      await using alice = await Guest.connect(server.port);
      await using bob = await Guest.connect(server.port);
      await bob.find(/Here now/);
      const started = performance.now();
      await alice.send(typed);
      if (lines > 10 * burst) { // they would take a minute
        await alice.say("hello");
        await bob.say("first");
        await alice.find(/first$/);
        await bob.receivesNothing();
        return;
      }
      await alice.say("hello");
      await bob.find(/hello$/);
      const took = performance.now() - started, least = 1_000 * 8 / rate;
      assert(took > least, `${took} ms`);
    });
  }
});

Deno.test("empty lines cost the same after a silence", async () => {
  const rate = 20, burst = 5 * rate; // lines a second, lines at once
  using _clock = fastClock(20);
  await using server = open({ rate });
  await using alice = await Guest.join(server.port, "alice");
  await using bob = await Guest.join(server.port, "bob");
  await new Promise((resolve) => setTimeout(resolve, 600)); // 12 s of that clock
  const started = performance.now();
  await alice.say(...Array(burst + 20).fill(""), "hello");
  await bob.find(/hello$/);
  const took = performance.now() - started, least = 1_000 * 15 / rate;
  assert(took > least, `${took} ms`);
});

Deno.test("a client that comes back does not have its burst again", async (t) => {
  const rate = 100, burst = 5 * rate; // lines a second, lines at once
  /** How long it takes until all lines of `clients` are said, in milliseconds. */
  const takes = async (
    clients: string[],
    lines: number,
    say: (visitor: Visitor) => void,
  ) => {
    using _clock = fastClock();
    await using server = open({ rate });
    await using bob = await Guest.join(server.port);
    const started = performance.now();
    for (const hostname of clients) {
      const visitor = Visitor.admit(server, hostname);
      say(visitor);
      visitor.end();
      await visitor.rest();
    }
    for (let i = 0; i < lines; i++) await bob.find(/^\[guest\d+\] line/);
    return performance.now() - started;
  };
  const saying = (lines: number) => (visitor: Visitor) =>
    visitor.say(...numbered(lines, "line "));
  await t.step("from one address", async () => {
    const time = await takes(
      ["192.0.2.1", "192.0.2.1"],
      burst + 60,
      (visitor) => saying((burst + 60) / 2)(visitor),
    );
    assert(time > 500, `${time} ms`);
  });
  await t.step("often", async () => {
    const clients = Array(15).fill("192.0.2.1");
    const lines = 15 * 40; // more than the burst
    const time = await takes(clients, lines, saying(40));
    assert(time > 900, `${time} ms`);
  });
  await t.step("but only what it spent is gone", async () => {
    await using server = open({ rate: 1 });
    await using bob = await Guest.join(server.port);
    for (let i = 0; i < 3; i++) { // of five lines
      const visitor = Visitor.admit(server, "192.0.2.1");
      visitor.say("hello");
      visitor.end();
      await visitor.rest();
      await bob.find(/hello$/);
    }
    const started = performance.now();
    const visitor = Visitor.admit(server, "192.0.2.1");
    visitor.say("one", "two");
    await bob.find(/two$/);
    assert(performance.now() - started < 900);
  });
  await t.step("from one IPv6 network", async () => {
    const clients = ["2001:db8::1", "2001:db8::2"];
    const time = await takes(clients, burst + 60, saying((burst + 60) / 2));
    assert(time > 500, `${time} ms`);
  });
  await t.step("but others have theirs", async () => {
    const clients = [
      "192.0.2.1",
      "192.0.2.2",
      "2001:db8::1",
      "2001:db8:0:1::1",
    ];
    const time = await takes(clients, 4 * burst - 40, saying(burst - 10));
    assert(time < 4_000, `${time} ms`); // one address needs 15 seconds
  });
});

Deno.test("a client that joins and leaves between two gathered notices is in none", async () => {
  await using server = open();
  await using alice = await Guest.join(server.port, "alice");
  await using _bob = await Guest.join(server.port, "bob");
  await alice.find(/known as bob/);
  for (let i = 0; i < 40; i++) { // the first four are told, as two notices each
    const visitor = Visitor.admit(server, "192.0.2.1");
    visitor.say("/quit ".padEnd(190, "x"));
    await visitor.rest();
  }
  const carol = Visitor.admit(server, "192.0.2.1");
  carol.say("/nick carol"); // the name of now is told
  for (let i = 0; i < 4; i++) {
    assertMatch((await alice.next())!, /has entered the room$/);
    assertMatch((await alice.next())!, /has left the room \(x+\)$/);
  }
  assertEquals(await alice.next(), "* carol has entered the room");
  await alice.receivesNothing();
});

Deno.test("a client whose connection has failed stops when a line is sent to it", async () => {
  await using server = open({ rate: 20 });
  await using bob = await Guest.join(server.port, "bob");
  const mallory = await Guest.join(server.port, "mallory");
  await mallory.say(...numbered(400, "line ")); // 15 seconds' worth
  await bob.find(/line 99$/);
  await bob.say("unread"); // so that closing resets the connection
  await mallory.find(/^\[bob\] unread$/);
  await bob.say("unread");
  await mallory[Symbol.asyncDispose]();
  // The first line after a connection has ended only makes the system notice.
  const started = performance.now();
  let isGone = false;
  const gone = bob.find(/^\* mallory has left the room$/)
    .then(() => isGone = true);
  while (!isGone) {
    await bob.say("is anyone there?");
    await Promise.race([gone, new Promise((next) => setTimeout(next, 50))]);
  }
  const took = performance.now() - started;
  assert(took < 1_500, `${took} ms`);
});

Deno.test("a client whose connection has failed stops within seconds where nobody else talks", async () => {
  await using server = open({ rate: 20 });
  await using bob = await Guest.join(server.port, "bob");
  const mallory = await Deno.connect({ port: server.port });
  const lines = numbered(600, "line ").join("\n"); // 25 seconds' worth
  await mallory.write(encoder.encode(lines));
  await bob.find(/line 90$/);
  const started = performance.now();
  mallory.close(); // with what it has not read: the connection is reset
  await bob.find(/^\* guest2 has left the room$/);
  const took = performance.now() - started;
  assert(took < 5_000, `${took} ms`);
});

Deno.test("a person whose lines wait is told so after two seconds, and again after ten", async (t) => {
  /** What somebody is told who pastes 600 lines, until the last of them is said. */
  const told = async (options: Partial<Options>, last: number) => {
    // Timers keep their time: faster, a pause would let half a burst through.
    using _clock = fastClock(4);
    await using server = open({ rate: 20, ...options });
    await using alice = await Guest.connect(server.port);
    if (options.askName) await alice.say("alice");
    await using bob = await Guest.connect(server.port);
    if (options.askName) await bob.say("bob");
    await alice.say(...numbered(600, "line "));
    await bob.find(new RegExp(`line ${last}$`));
    await server.stop();
    return (await alice.rest()).filter((line) => /wait/.test(line));
  };
  await t.step("in a room", async () => {
    const lines = await told({}, 499);
    // After 2 and 12 seconds of 20, more or less on a machine that is busy.
    const { length } = lines;
    assert(length >= 1 && length <= 3, `${length} lines`);
    for (const line of lines) {
      const [, count] =
        /^! Your lines are sent at 20 a second; (\d+) (?:are|is) waiting\.$/
          .exec(line)!;
      assert(Number(count) >= 1 && Number(count) < 500, line);
    }
  });
  await t.step("but not in a raw room", async () => {
    assertEquals(await told({ raw: true }, 199), []);
  });
  await t.step("nor with --ask-name", async () => {
    assertEquals(await told({ askName: true }, 199), []);
  });
});

Deno.test("a client that sends commands faster than it reads gets all answers and stays", async () => {
  await using server = open({ rate: 0 });
  await using alice = await Guest.join(server.port, "alice");
  await using mallory = await Guest.join(server.port, "mallory");
  await alice.find(/known as mallory/);
  const commands = 4_000;
  const sending = mallory.say(...Array(commands).fill("/help"));
  await using bob = await Guest.join(server.port); // others feel nothing
  await bob.say("hello");
  await alice.find(/^\[guest3\] hello$/);
  for (let i = 0; i < commands; i++) await mallory.find(/^\* \/\/COMMAND /);
  await sending;
  await mallory.settle();
});

Deno.test("a refused connection is closed at once", async () => {
  await using server = open({ maxClients: 1 });
  await using _alice = await Guest.join(server.port);
  // It neither reads nor leaves.
  const refused = admit(server, { closeWrite: () => Promise.resolve() });
  await within(refused.closed, "the close", 500);
  assertEquals(
    refused.received,
    `! The room is full. Try again later.\n${GOODBYE}\n`,
  );
});

Deno.test({
  name: "the descriptors of refused connections are free at once",
  ignore: !LINUX,
  async fn() {
    await using program = await Program.start(["--max-per-address", "1"]);
    await using alice = await Guest.join(program.port);
    const before = await program.descriptors();
    const crowd: Deno.TcpConn[] = [];
    for (let i = 0; i < 50; i++) {
      crowd.push(await Deno.connect({ port: program.port }));
    }
    await alice.settle(); // the others were accepted before
    const started = performance.now();
    await eventually(
      async () => await program.descriptors() <= before,
      "the descriptors",
    );
    assert(performance.now() - started < 500);
    for (const conn of crowd) conn.close();
  },
});

Deno.test("IPv6 addresses of one /64 network count as one", async (t) => {
  await t.step("for places", async () => {
    await using server = open({ maxPerAddress: 1 });
    await using first = Visitor.admit(server, "2001:db8::5");
    assertMatch((await first.next())!, /Welcome/);
    await using second = Visitor.admit(server, "2001:db8::6");
    assertMatch((await second.next())!, /^! There are too many connections/);
    await using third = Visitor.admit(server, "2001:db8:0:1::5");
    assertMatch((await third.next())!, /Welcome/);
    first.end();
    await first.rest();
    await using fourth = Visitor.admit(server, "2001:db8::7");
    assertMatch((await fourth.next())!, /Welcome/);
  });
  await t.step("for bans", async () => {
    await using server = open();
    await using first = Visitor.admit(server, "2001:db8::5");
    assertMatch((await first.next())!, /Welcome/);
    const told: string[] = [];
    await server.operate(
      ReadableStream.from(["/ban 2001:db8::5"]),
      (line) => told.push(line),
    );
    assertEquals((await first.rest()).slice(-2), [
      "! You were banned.",
      GOODBYE,
    ]);
    await using second = Visitor.admit(server, "2001:db8::6");
    assertEquals(await second.rest(), []);
    await using third = Visitor.admit(server, "2001:db8:0:1::5");
    assertMatch((await third.next())!, /Welcome/);
    assertMatch(told[0], /^\* 2001:db8::\/64 is banned\./);
  });
  await t.step("for wrong passwords", async () => {
    using file = new TemporaryFile("sesame");
    await using server = open({ passwordFile: file.path });
    for (let i = 1; i <= 3; i++) {
      await using guest = Visitor.admit(server, `2001:db8::${i}`);
      assertEquals(await guest.next(), ASKED);
      guest.say("wrong");
      assertMatch((await guest.next())!, /^! That is not the password\./);
    }
    await using guest = Visitor.admit(server, "2001:db8::4");
    assertMatch((await guest.next())!, /^! Too many wrong passwords/);
  });
});

Deno.test("a client beyond --max-clients is told that the room is full", async () => {
  await using server = open({ maxClients: 2 });
  await using alice = await Guest.join(server.port);
  await using bob = await Guest.join(server.port);
  await using carol = await Guest.connect(server.port);
  assertEquals(await carol.rest(), [
    "! The room is full. Try again later.",
    GOODBYE,
  ]);
  await bob.say("/quit");
  await alice.find(/guest2 has left/);
  await using _dave = await Guest.join(server.port);
});

Deno.test("a refused connection that has failed already is closed", async () => {
  await using server = open({ maxClients: 1 });
  await using _alice = await Guest.join(server.port);
  const fail = () => Promise.reject(new Deno.errors.ConnectionReset());
  const { closed } = admit(server, { read: fail, write: fail });
  await within(closed, "the close");
});

Deno.test("a client beyond --max-per-address is told so", async () => {
  await using server = open({ maxPerAddress: 1 });
  await using _alice = await Guest.join(server.port);
  await using bob = await Guest.connect(server.port);
  assertEquals(await bob.rest(), [
    "! There are too many connections from your address.",
    GOODBYE,
  ]);
});

Deno.test({
  name: "without free descriptors the room goes on and newcomers wait",
  ignore: !LINUX,
  async fn() {
    const descriptors = 64;
    const shell = `ulimit -n ${descriptors};`;
    await using program = await Program.start([], { shell });
    await using alice = await Guest.join(program.port, "alice");
    const crowd: Deno.TcpConn[] = [];
    for (let i = 0; i < descriptors + 6; i++) {
      crowd.push(await Deno.connect({ port: program.port }));
    }
    assertMatch(
      await program.errors.find(/./),
      /^parley: Cannot accept connections for now: .*descriptor.*|.*open files/,
    );
    await alice.settle();
    await alice.say("/who");
    await alice.find(/^\* Here now: /);
    for (const conn of crowd) conn.close();
    await using bob = await Guest.join(program.port, "bob");
    await bob.say("hello");
    await alice.find(/^\[bob\] hello$/);
    program.child.kill("SIGINT");
    assertEquals(await program.errors.rest(), []); // printed once
  },
});

Deno.test({
  name: "connections that are reset before they are accepted delay nobody",
  ignore: !LINUX || !installed("socat"),
  async fn() {
    await using program = await Program.start();
    program.child.kill("SIGSTOP"); // it accepts nothing for the moment
    const target = `TCP:127.0.0.1:${program.port},linger=0`; // resets at the end
    for (let i = 0; i < 20; i++) {
      const args = ["-u", "/dev/null", target];
      await new Deno.Command("socat", { args }).output();
    }
    program.child.kill("SIGCONT");
    await using alice = await Guest.join(program.port);
    await alice.settle();
    program.child.kill("SIGTERM");
    assertEquals(await program.errors.rest(), []); // newcomers never had to wait
  },
});

/** Admits a client that sends `bytes` over and over, and never takes a write.
 * Tells how often it was read, and whether it was closed. */
function admitStalled(server: ChatServer, bytes: number[] | Uint8Array) {
  const state = { reads: 0, closed: false };
  const { closed } = admit(server, {
    async read(buffer) {
      await turn();
      state.reads++;
      const count = Math.min(buffer.length, bytes.length);
      for (let i = 0; i < count; i++) buffer[i] = bytes[i];
      return count;
    },
    write: never,
  });
  closed.then(() => state.closed = true);
  return state;
}

/** Waits until a client is no longer read. */
async function rests(client: { reads: number }): Promise<void> {
  await eventually(async () => {
    const before = client.reads;
    for (let i = 0; i < 100; i++) await turn();
    return client.reads === before;
  }, "the client is no longer read");
}

Deno.test("a client that takes no answers is not read until it does, and stays", async (t) => {
  using file = new TemporaryFile("sesame");
  const inputs: [what: string, input: number[] | Uint8Array][] = [
    ["telnet options", [IAC, DO, 1]],
    ["commands", encoder.encode("/help\n")],
    ["unknown commands", encoder.encode("/x\n")],
    ["lists", encoder.encode("/who\n")],
    ["private messages to itself", encoder.encode("/msg guest1 hi\n")],
    ["/me", encoder.encode("/me\n")],
  ];
  for (const passwordFile of ["", file.path]) {
    const when = passwordFile ? "before it joins" : "in the room";
    await using server = open({ passwordFile, rate: 0 });
    for (const [what, input] of inputs) {
      if (passwordFile && what !== "telnet options") continue;
      await t.step(`${what} ${when}`, async () => {
        const client = admitStalled(server, input);
        await rests(client);
        assert(client.reads > 1);
        assertEquals(client.closed, false);
      });
    }
  }
});

Deno.test("a closed standard output does not stop the room", async () => {
  await using program = await Program.start();
  await program.output[Symbol.asyncDispose]();
  for (let i = 0; i < 3; i++) {
    await using alice = await Guest.join(program.port, "alice");
    await alice.settle();
  }
});

Deno.test("a standard output that nobody reads does not stop the room", async () => {
  await using program = await Program.start(["--max-clients", "1"]);
  // The program prints two lines for each client, of at least 45 bytes; the pipe
  // holds 64 KiB, and the program as much.
  const clients = 65_536 / 45;
  for (let i = 0; i < clients; i++) {
    const guest = await Guest.connect(program.port);
    await guest.next();
    await guest[Symbol.asyncDispose]();
  }
  await eventually(async () => {
    await using guest = await Guest.connect(program.port);
    return (await guest.next())!.startsWith("* Welcome");
  }, "room for a client");
  program.child.kill("SIGINT");
  assertEquals((await within(program.child.status, "the exit", 2_500)).code, 0);
});

Deno.test("lines that standard output did not take are counted", async () => {
  await using program = await Program.start(["--console", "--rate", "0"]);
  await using alice = await Guest.join(program.port);
  const lines = numbered(20_000, "line ");
  await alice.say(...lines);
  await alice.settle();
  // Each line is either shown or counted.
  let shown = 0, missed = 0;
  while (shown + missed < lines.length) {
    const line = await program.output.next();
    if (/^\[guest1\] line \d+$/.test(line!)) shown++;
    missed += Number(/^\((\d+) lines not shown\)$/.exec(line!)?.[1] ?? 0);
  }
  assert(missed > 0);
});

// -- passwords, TLS and addresses

/** The question for the password. */
const ASKED = "* This room has a password. What is it?";

Deno.test("a client receives and sends nothing before it gives the password", async () => {
  using file = new TemporaryFile("open sesame\n");
  const printed: string[] = [];
  await using server = open({ passwordFile: file.path, history: 20 }, printed);
  await using alice = await Guest.connect(server.port);
  assertEquals(await alice.next(), ASKED);
  await alice.say("open sesame");
  assertMatch((await alice.next())!, /^\* Welcome! You are guest1/);
  assertEquals(await alice.next(), "* Nobody else is here yet.");

  await using mallory = await Guest.connect(server.port);
  assertEquals(await mallory.next(), ASKED);
  await alice.say("a secret", "/who");
  assertEquals(await alice.next(), "* Here now: guest1 (1)");
  await mallory.say("/who", "hello?");
  for (let i = 0; i < 2; i++) {
    assertEquals(await mallory.next(), "! That is not the password.");
    assertEquals(await mallory.next(), ASKED);
  }
  await alice.receivesNothing();

  await using bob = await Guest.connect(server.port);
  await bob.say("open sesame", "thanks"); // at once, as a script does
  assertEquals(await alice.next(), "* guest2 has entered the room");
  assertEquals(await alice.next(), "[guest2] thanks");
  await bob.find(/^\[guest1\] a secret$/);
  await bob.receivesNothing();
  assert(!printed.join().includes("sesame"));
  assertMatch(printed[1], /^Password accepted from \S+ \(guest1, 1 here\)$/);
});

Deno.test("whatever a client sends before it has given the password or a name, nothing is said", async (t) => {
  using file = new TemporaryFile("sesame");
  const inputs: [what: string, input: string][] = [
    ["long lines", ("x".repeat(4_000) + "\n").repeat(50)],
    ["short lines", "let me in\n".repeat(10_000)],
    ["commands", "/me waves\n".repeat(10_000)],
    ["a long line", "x".repeat(100_000) + "\n"],
    ["empty lines", "\n".repeat(50_000) + "let me in\n"],
  ];
  for (const passwordFile of [file.path, ""]) {
    const options = { passwordFile, askName: !passwordFile, rate: 0 };
    for (const [what, input] of inputs) {
      await t.step(
        `${what} before the ${passwordFile ? "password" : "name"}`,
        async () => {
          await using server = open(options);
          await using bob = await Guest.connect(server.port);
          await bob.say(passwordFile ? "sesame" : "bob");
          await bob.find(/Nobody else|room contains/);
          await using mallory = await Guest.connect(server.port);
          await mallory.send(input + "\n").catch(() => {});
          await mallory.conn.closeWrite().catch(() => {});
          await mallory.rest();
          await bob.conn.closeWrite(); // without a goodbye
          assertEquals(await bob.rest(), []);
        },
      );
    }
  }
});

Deno.test("the password is asked for before a name, and in a raw room", async () => {
  using file = new TemporaryFile("x y\r\n");
  await using named = open({ passwordFile: file.path, askName: true });
  await using alice = await Guest.connect(named.port);
  assertEquals(await alice.next(), ASKED);
  await alice.say("x y");
  assertMatch((await alice.next())!, /name\?$/);

  const printed: string[] = [];
  await using raw = open({ passwordFile: file.path, raw: true }, printed);
  await using bob = await Guest.connect(raw.port);
  await using carol = await Guest.connect(raw.port);
  await bob.say("x y");
  await eventually(() => printed.length === 3, "the password is taken");
  await carol.say("wrong", "x y", "hello");
  assertEquals(await bob.next(), ASKED);
  assertEquals(await bob.next(), "hello");
  await raw.stop();
  assertEquals(await carol.rest(), [ASKED, ASKED, "Shutdown Server"]);
});

Deno.test("after three wrong passwords an address is not asked for a minute", async (t) => {
  using file = new TemporaryFile("sesame");
  const LOCKED = [
    "! Too many wrong passwords from your address. Try again in a minute.",
    GOODBYE,
  ];
  await t.step("on one connection", async () => {
    await using server = open({ passwordFile: file.path });
    await using mallory = await Guest.connect(server.port);
    await mallory.say("one", "two", "three", "sesame", "hello");
    const wrong = [ASKED, "! That is not the password."];
    assertEquals(await mallory.rest(), [
      ...wrong,
      ...wrong,
      ...wrong,
      ...LOCKED,
    ]);
  });
  await t.step("over many connections", async () => {
    await using server = open({ passwordFile: file.path });
    for (let i = 0; i < 3; i++) {
      await using mallory = Visitor.admit(server, "192.0.2.1");
      assertEquals(await mallory.next(), ASKED);
      mallory.say(`${i}`);
      assertEquals(await mallory.next(), "! That is not the password.");
      mallory.end();
      await mallory.rest();
    }
    await using mallory = Visitor.admit(server, "192.0.2.1");
    assertEquals(await mallory.rest(), LOCKED);
    await using alice = Visitor.admit(server, "192.0.2.2");
    alice.say("sesame");
    assertEquals(await alice.next(), ASKED);
    assertMatch((await alice.next())!, /Welcome/);
    const { now } = performance;
    try { // a minute later
      performance.now = () => now.call(performance) + 61_000;
      await using late = Visitor.admit(server, "192.0.2.1");
      assertEquals(await late.next(), ASKED);
      late.say("sesame");
      assertMatch((await late.next())!, /Welcome/);
    } finally {
      performance.now = now;
    }
  });
  await t.step("that were asked at the same time", async () => {
    await using server = open({ passwordFile: file.path });
    const crowd: Visitor[] = [];
    for (let i = 0; i < 6; i++) {
      crowd.push(Visitor.admit(server, "192.0.2.1"));
      assertEquals(await crowd[i].next(), ASKED);
    }
    for (let i = 0; i < 5; i++) crowd[i].say(`${i}`);
    crowd[5].say("sesame");
    const answers = await Promise.all(crowd.map((guest) => guest.next()));
    assertEquals(
      answers.filter((line) => line === "! That is not the password.").length,
      3,
    );
    assertEquals(answers.filter((line) => line === LOCKED[0]).length, 3);
    for (const guest of crowd) await guest[Symbol.asyncDispose]();
  });
});

Deno.test("a client that gives no name within 60 seconds is disconnected, and its place is free", async () => {
  using _hurry = hurry(60_000);
  await using server = open({ askName: true, maxClients: 2 });
  await using one = await Guest.connect(server.port);
  await using two = await Guest.connect(server.port);
  for (const silent of [one, two]) {
    const [question, answer, ...more] = await silent.rest();
    assertMatch(question, /name\?$/);
    assertMatch(answer, /^! That took too long\./);
    assertEquals(more, []);
  }
  await using alice = await Guest.connect(server.port);
  await alice.say("alice");
  await alice.find(/room contains/);
});

Deno.test("nobody enters whose connection fails as the name arrives", async () => {
  await using server = open({ askName: true });
  const answer = Promise.withResolvers<number>();
  const question = Promise.withResolvers<number>();
  const connection = admit(server, {
    read(buffer) {
      buffer.set(encoder.encode("ann\n"));
      return answer.promise;
    },
    write: () => question.promise,
  });
  answer.resolve(4);
  question.reject(new Error("the client is gone"));
  await connection.closed;
  await using ann = await Guest.connect(server.port);
  await ann.say("ann");
  await ann.find(/^\* The room contains: $/);
});

Deno.test("a client that leaves or is disconnected gets a last line", async (t) => {
  const operated = async (server: ChatServer, ...lines: string[]) =>
    await server.operate(ReadableStream.from(lines), () => {});
  await t.step("/quit", async () => {
    await using server = open();
    for (const command of ["/quit", "/exit", "/bye", "/quit so long"]) {
      await using alice = await Guest.join(server.port);
      await alice.say(command, "more", "lines");
      assertEquals(await alice.rest(), [GOODBYE]);
    }
  });
  await t.step("a kick", async () => {
    await using server = open();
    await using alice = await Guest.join(server.port);
    await operated(server, "/kick guest1 too loud");
    assertEquals(await alice.rest(), ["! You were kicked: too loud.", GOODBYE]);
    await using bob = await Guest.join(server.port);
    await operated(server, "/kick guest2");
    assertEquals(await bob.rest(), ["! You were kicked.", GOODBYE]);
  });
  await t.step("none at the end of its own input", async () => {
    await using server = open();
    await using alice = await Guest.join(server.port);
    await alice.conn.closeWrite();
    assertEquals(await alice.rest(), []);
  });
  await t.step("none when the server stops", async () => {
    const server = open();
    await using alice = await Guest.join(server.port);
    await server.stop();
    assertEquals(await alice.rest(), ["* Shutdown Server"]);
  });
  await t.step("none in a raw room or with --ask-name", async () => {
    await using raw = open({ raw: true });
    await using alice = await Guest.connect(raw.port);
    await using bob = await Guest.connect(raw.port);
    await bob.say("hi");
    assertEquals(await alice.next(), "hi");
    await operated(raw, "/ban 127.0.0.1");
    assertEquals(await alice.rest(), []);
    await using named = open({ askName: true });
    await using carol = await Guest.connect(named.port);
    await carol.say("carol");
    await carol.find(/room contains/);
    await operated(named, "/kick carol");
    assertEquals(await carol.rest(), ["! You were kicked."]);
  });
});

Deno.test("a first line of another protocol is answered and not said", async (t) => {
  const lines = [
    "GET / HTTP/1.1",
    "get / http/1.1",
    "GET / HTTP/1.0",
    "HEAD /x HTTP/2",
    "OPTIONS * HTTP/1.1",
    "OPTIONS / RTSP/1.0",
    "DESCRIBE rtsp://x/ RTSP/1.0",
    "OPTIONS sip:nm SIP/2.0",
    "register sip:example.com SIP/2.0",
    "SSH-2.0-OpenSSH_9.9",
    "SSH-1.5-NmapNSE_1.0",
    `GET /${"a".repeat(6_000)} HTTP/1.1`,
    "M-SEARCH * HTTP/1.1",
    `DESCRIBE rtsp://x/${"a".repeat(6_000)} RTSP/1.0`,
  ];
  for (const line of lines) {
    await t.step(line.slice(0, 40), async () => {
      await using server = open();
      await using alice = await Guest.join(server.port);
      await using scanner = await Guest.connect(server.port);
      await scanner.send(`${line}\r\nVia: SIP/2.0/TCP nm\r\n\r\nhello\r\n`);
      const answer = (await scanner.rest()).join("\n");
      assertMatch(answer, /This is a Parley chat room\./);
      assertEquals(await alice.next(), "* guest2 has entered the room");
      assertMatch((await alice.next())!, /^\* guest2 has left the room \(/);
      await alice.receivesNothing();
      await using bob = await Guest.join(server.port);
      await bob.say("first", line);
      await alice.find(/first$/);
      await alice.find(/^\[guest3\] \w/); // it is not the first line
    });
  }
  await t.step("a sentence is said", async () => {
    await using server = open();
    await using alice = await Guest.join(server.port);
    for (
      const line of ["get well soon", "SSH is great", "options http/1.1 x"]
    ) {
      await using bob = await Guest.connect(server.port);
      await bob.say(line);
      await alice.find(new RegExp(`^\\[guest\\d+\\] ${line}$`));
    }
    await using bob = await Guest.connect(server.port);
    await bob.say(`look https://example.org/${"x".repeat(5_000)} nice`);
    await alice.find(/^\[guest\d+\] look https:\/\/example\.org\/x+$/);
    await alice.find(/x nice$/);
  });
});

Deno.test("a client that gives no password within 30 seconds is disconnected", async () => {
  using file = new TemporaryFile("x");
  using _hurry = hurry(30_000);
  await using server = open({ passwordFile: file.path });
  await using alice = await Guest.connect(server.port);
  assertEquals(await alice.rest(), [
    ASKED,
    "! That took too long. Join again.",
    GOODBYE,
  ]);
});

Deno.test({
  name:
    "clients talk over TLS while another stalls and a third fails in the handshake",
  ignore: !OPENSSL,
  async fn() {
    const printed: string[] = [];
    await using server = open(await tlsOptions(), printed);
    const silent = await Deno.connect({ port: server.port });
    await using plain = await Guest.connect(server.port);
    await plain.say("hello in plain text");
    assertEquals((await plain.rest()).join().includes("Welcome"), false);
    await eventually(
      () => printed.some((line) => line.includes("(no TLS, ")),
      "the error",
    );

    using first = await connectTls(server.port);
    await using alice = new Lines(first.readable);
    await alice.find(/^\* Nobody else is here yet/);
    using second = await connectTls(server.port);
    await using bob = new Lines(second.readable);
    await alice.find(/guest2 has entered/);
    await second.write(encoder.encode("over TLS\n"));
    assertEquals(await alice.next(), "[guest2] over TLS");
    silent.close();
    await server.stop();
    assertEquals((await bob.rest()).at(-1), "* Shutdown Server");
  },
});

Deno.test({
  name: "a TLS handshake that does not end within 30 seconds is abandoned",
  ignore: !OPENSSL,
  async fn() {
    using _hurry = hurry(30_000);
    await using server = open(await tlsOptions());
    await using silent = await Guest.connect(server.port);
    assertEquals(await silent.next(), null);
  },
});

Deno.test({
  name: "an address that is banned during a TLS handshake is refused after it",
  ignore: !OPENSSL,
  async fn() {
    const printed: string[] = [];
    await using server = open(await tlsOptions(), printed);
    const conn = await Deno.connect({
      hostname: "127.0.0.1",
      port: server.port,
    });
    await eventually(() => printed.length === 1, "the connection");
    await server.operate(ReadableStream.from(["/ban 127.0.0.1"]), () => {});
    using banned = await Deno.startTls(conn, await tlsClientOptions());
    await using lines = new Lines(banned.readable);
    assertEquals(await lines.rest(), ["! You were banned.", GOODBYE]);
  },
});

Deno.test({
  name: "a client beyond --max-clients is told so over TLS too",
  ignore: !OPENSSL,
  async fn() {
    await using server = open({ ...await tlsOptions(), maxClients: 1 });
    using first = await connectTls(server.port);
    await using alice = new Lines(first.readable);
    await alice.find(/^\* Nobody else is here yet/);
    using second = await connectTls(server.port);
    await using bob = new Lines(second.readable);
    assertEquals(await bob.rest(), [
      "! The room is full. Try again later.",
      GOODBYE,
    ]);
  },
});

Deno.test({
  name:
    "a last line without its end arrives when a TLS connection ends without close_notify",
  ignore: !OPENSSL,
  async fn() {
    await using server = open(await tlsOptions());
    using conn = await connectTls(server.port);
    await using alice = new Lines(conn.readable);
    await alice.find(/^\* Nobody else is here yet/);
    const client = new Deno.Command("openssl", {
      args: ["s_client", "-quiet", "-connect", `127.0.0.1:${server.port}`],
      stdin: "piped",
      stdout: "piped",
      stderr: "null",
    }).spawn();
    const input = client.stdin.getWriter();
    await using output = new Lines(client.stdout);
    await output.find(/^\* Here now/);
    await input.write(encoder.encode("one\nlast"));
    await alice.find(/^\[guest2\] one$/);
    client.kill("SIGKILL");
    await alice.find(/^\[guest2\] last$/);
    await alice.find(/guest2 has left the room$/);
    await client.status;
    await input.close().catch(() => {});
  },
});

Deno.test({
  name: "every descriptor is freed after TLS clients used them all",
  ignore: !LINUX || !OPENSSL,
  async fn() {
    const descriptors = 64;
    const { cert, key } = await certificate();
    await using program = await Program.start(
      ["--tls-cert", cert, "--tls-key", key],
      {
        shell: `ulimit -n ${descriptors};`,
        permissions: ["--allow-net", "--allow-read"],
      },
    );
    using first = await connectTls(program.port);
    await using alice = new Lines(first.readable);
    await alice.find(/^\* Nobody else is here yet/);
    const before = await program.descriptors();
    for (let wave = 0; wave < 2; wave++) {
      const crowd = await Promise.all(
        Array.from(
          { length: descriptors - 4 },
          () => Guest.connect(program.port),
        ),
      );
      // Some are refused, as there is no descriptor for their TLS.
      await Promise.race(crowd.map((guest) => guest.next()));
      for (const guest of crowd) await guest[Symbol.asyncDispose]();
      await eventually(
        async () => await program.descriptors() <= before + 1,
        "the descriptors",
      );
    }
    using last = await connectTls(program.port);
    await using bob = new Lines(last.readable);
    await bob.find(/^\* Here now/);
    await alice.find(/guest2 has entered the room$/); // the others never had
  },
});

Deno.test("addresses outside the allowed networks are disconnected without a word", async () => {
  await using server = open({
    allow: ["::ffff:10.0.0.0/104", "127.0.0.2", "::1/128"],
    host: "::",
  });
  /** What a client from this address receives first: nothing if it is closed. */
  const from = async (hostname: string) => {
    const client = admit(server, {}, { hostname });
    let closed = false;
    client.closed.then(() => closed = true);
    await eventually(() => closed || client.received !== "", "an answer");
    return client.received;
  };
  for (const address of ["10.1.2.3", "::ffff:10.9.9.9", "127.0.0.2", "::1"]) {
    assertMatch(await from(address), /Welcome/);
  }
  for (const address of ["127.0.0.1", "11.0.0.1", "::ffff:127.0.0.3", "::2"]) {
    assertEquals(await from(address), "");
  }
  await using alice = await Guest.connect(server.port); // ::ffff:127.0.0.1
  assertEquals(await alice.next(), null);
});

// -- the operator

Deno.test("the operator speaks as host, sees the room, kicks and bans", async (t) => {
  await using program = await Program.start(["--console", "--quiet"], {
    typing: true,
  });
  const { output } = program;
  await using alice = await Guest.join(program.port, "alice");
  await using bob = await Guest.join(program.port, "bob");
  await alice.find(/known as bob/);
  await output.find(/^\* guest2 is now known as bob$/);

  await t.step("speaks as host", async () => {
    await program.type("hello all", "/etc/motd", "//who", "\x1b[31mred");
    assertEquals(await alice.next(), "[host] hello all");
    assertEquals(await alice.next(), "[host] /etc/motd");
    assertEquals(await alice.next(), "[host] /who");
    assertEquals(await alice.next(), "[host] red");
    await program.type("/me waves");
    assertEquals(await alice.next(), "** host waves");
    await bob.find(/^\*\* host waves$/);
  });
  await t.step("is listed, and keeps its name", async () => {
    await alice.say("/who", "/who host", "/nick host");
    assertEquals(await alice.next(), "* Here now: host, alice, bob (3)");
    assertMatch((await alice.next())!, /^\* host /);
    assertMatch((await alice.next())!, /^! The name host is reserved/);
  });
  await t.step("sees messages to everyone, and no private ones", async () => {
    await alice.say("/msg bob secret", "hi", "/me waves");
    assertEquals(await output.next(), "[alice] hi");
    assertEquals(await output.next(), "** alice waves");
    await bob.find(/waves/);
    await alice.find(/secret/);
  });
  await t.step("sends and receives private messages", async () => {
    await alice.say("/msg host help me");
    assertEquals(await output.next(), "[alice -> you] help me");
    assertEquals(await alice.next(), "[you -> host] help me");
    await program.type("/reply with what?", "/msg bob hi");
    assertEquals(await output.next(), "[you -> alice] with what?");
    assertEquals(await alice.next(), "[host -> you] with what?");
    assertEquals(await output.next(), "[you -> bob] hi");
    assertEquals(await bob.next(), "[host -> you] hi");
    await bob.say("/reply hello");
    assertEquals(await output.next(), "[bob -> you] hello");
    await bob.next();
  });
  await t.step("lists who is connected", async () => {
    await program.type("/who");
    assertMatch(
      (await output.next())!,
      /^\* alice 127\.0\.0\.1:\d+, 0 minutes$/,
    );
    assertMatch(
      (await output.next())!,
      /^\* bob 127\.0\.0\.1:\d+, 0 minutes$/,
    );
  });
  await t.step(
    "gets an answer to commands that cannot be carried out",
    async () => {
      await program.type(
        "/kcik bob",
        "/kick",
        "/kick zoe",
        "/kick host",
        "/ban zoe",
        "/ban 10.0.0.0/33",
        "/unban 1.2.3.4",
      );
      assertMatch(
        (await output.next())!,
        /^! Unknown command \/kcik\. .*\/kick/,
      );
      assertMatch((await output.next())!, /^! Type \/kick NAME \[REASON\] \(/);
      assertMatch((await output.next())!, /^! Nobody here is called zoe\./);
      assertMatch((await output.next())!, /^! host /);
      assertMatch((await output.next())!, /^! Nobody here is called zoe\./);
      assertMatch((await output.next())!, /^! .*10\.0\.0\.0\/33/);
      assertMatch((await output.next())!, /^! 1\.2\.3\.4 is not banned/);
      await program.type("/help");
      for (
        const name of ["who", "me", "msg", "reply", "kick", "ban", "unban"]
      ) {
        await output.find(new RegExp(`^\\* /${name} `));
      }
      await output.find(/^\* \/banned /);
      await output.find(/^\* \/quit /);
      await output.find(/^\* \/\/COMMAND /);
    },
  );
  await t.step("kicks a client", async () => {
    await program.type("/kick @bob, too loud");
    assertEquals(await bob.next(), "! You were kicked: too loud.");
    assertEquals(await bob.next(), GOODBYE);
    assertEquals(await bob.next(), null);
    const notice = "* bob has left the room (kicked: too loud)";
    assertEquals(await alice.next(), notice);
    assertEquals(await output.next(), notice);
  });
  await t.step("bans and unbans an address", async () => {
    await using bob = await Guest.join(program.port, "bob");
    await program.type("/ban 127.0.0.1 spam");
    assertEquals(
      await output.find(/banned/),
      "* 127.0.0.1 is banned. /unban 127.0.0.1 undoes this.",
    );
    for (const guest of [alice, bob]) {
      assertEquals((await guest.rest()).slice(-2), [
        "! You were banned: spam.",
        GOODBYE,
      ]);
    }
    await using carol = await Guest.connect(program.port);
    assertEquals(await carol.next(), null);
    await program.type("/unban 127.0.0.1");
    await output.find(/^\* 127\.0\.0\.1 is no longer banned\.$/);
    // The IPv4-mapped form is the same address; octal digits are no address.
    await program.type("/banned", "/ban ::ffff:7f00:1", "/ban 0177.0.0.1");
    await output.find(/^\* Nobody is banned\.$/);
    await output.find(/^\* 127\.0\.0\.1 is banned\./);
    await output.find(/^! 0177\.0\.0\.1 is no address or network\. Type one/);
    await program.type("/unban 127.0.0.1");
    await output.find(/no longer/);
  });
  await t.step("may end standard input, and the room goes on", async () => {
    await program.typeEnd();
    await output.find(/^The console has no more input\. The room goes on/);
    await using carol = await Guest.join(program.port, "carol");
    await carol.say("/msg host hi");
    assertMatch((await carol.next())!, /^! Nobody here is called host\./);
  });
});

/** The operator of a room in this process. */
class Console extends Lines {
  #typed: WritableStreamDefaultWriter<string>;
  /** Resolves when the server takes no more lines. */
  readonly ended: Promise<void>;

  constructor(server: ChatServer) {
    const output = new TransformStream<
      Uint8Array<ArrayBuffer>,
      Uint8Array<ArrayBuffer>
    >(undefined, undefined, { highWaterMark: Infinity });
    super(output.readable);
    const printed = output.writable.getWriter();
    printed.closed.catch(() => {});
    const typed = new TransformStream<string, string>();
    this.#typed = typed.writable.getWriter();
    this.#typed.closed.catch(() => {});
    this.ended = server.operate(typed.readable, (line) => {
      printed.write(encoder.encode(line + "\n")).catch(() => {});
    });
  }

  async type(...lines: string[]): Promise<void> {
    for (const line of lines) await this.#typed.write(line);
  }
}

Deno.test("no part of a console command that is too long is said, and no piece of a message is one", async () => {
  using file = new TemporaryFile("");
  await using server = open({ log: file.path, rate: 0 });
  await using alice = await Guest.join(server.port, "alice");
  await using bob = await Guest.join(server.port, "bob");
  await alice.find(/known as bob/);
  await using host = new Console(server);
  const long = "x".repeat(4_200) + " PIN 1234";
  for (
    const command of [
      "/msg bob",
      "/me",
      "/kick bob",
      "/ban bob",
      "/quit",
      "/mgs bob",
      "\x1bOQ/msg bob",
    ]
  ) {
    await host.type(`${command} ${long}`);
    assertMatch((await host.next())!, /^! Nothing was sent: a command /);
  }
  const most = "x".repeat(LINE_BYTES);
  await host.type(
    `${most}/quit`,
    `${most}/kick alice`,
    "\x1bOQ/msg bob secret",
  );
  assertEquals(await host.next(), "[you -> bob] secret");
  assertEquals(await bob.next(), `[host] ${most}`);
  assertEquals(await bob.next(), "[host] /quit");
  assertEquals(await bob.next(), `[host] ${most}`);
  assertEquals(await bob.next(), "[host] /kick alice");
  assertEquals(await bob.next(), "[host -> you] secret");
  await alice.find(/^\[host\] \/kick alice$/);
  await alice.receivesNothing();
  await server.stop();
  assertEquals(
    logged(file),
    [most, "/quit", most, "/kick alice"].map((line) => `[host] ${line}`),
  );
});

Deno.test("/ban NAME refuses when others share the address, and tells which command does what", async () => {
  await using server = open();
  await using bob = Visitor.admit(server, "192.0.2.1");
  bob.say("/nick bob");
  await using carol = Visitor.admit(server, "192.0.2.1");
  carol.say("/nick carol");
  await using dave = Visitor.admit(server, "192.0.2.2");
  dave.say("/nick dave");
  await dave.find(/known as dave/);
  await using host = new Console(server);
  await host.type("/ban bob spam");
  const answer = (await host.next())!;
  assertMatch(answer, /^! Not banned: carol would be banned too\./);
  assertMatch(answer, /\/ban 192\.0\.2\.1 .*\/kick bob /);
  await host.type("/banned", "/ban dave spam", "/banned");
  assertEquals(await host.next(), "* Nobody is banned.");
  assertMatch((await host.next())!, /^\* 192\.0\.2\.2 is banned\./);
  assertEquals((await dave.rest()).slice(-2), [
    "! You were banned: spam.",
    GOODBYE,
  ]);
  assertMatch(
    await host.find(/ is banned since /),
    /^\* 192\.0\.2\.2 \(dave\) is banned since \d{4}-\d\d-\d\d \d\d:\d\d: spam$/,
  );
  await host.type("/unban DAVE", "/unban dave", "/banned");
  assertEquals(await host.next(), "* 192.0.2.2 is no longer banned.");
  assertMatch((await host.next())!, /^! dave is not banned\. \/banned /);
  assertEquals(await host.next(), "* Nobody is banned.");
  await using back = Visitor.admit(server, "192.0.2.2");
  assertMatch((await back.next())!, /Welcome/);
});

Deno.test("a ban names all who were there, and each of them lifts it", async () => {
  await using server = open();
  const crowd: Visitor[] = [];
  for (let i = 1; i <= 30; i++) {
    const visitor = Visitor.admit(server, "192.0.2.1");
    await visitor.find(/Here now|Nobody else/);
    crowd.push(visitor);
  }
  await using host = new Console(server);
  await host.type("/ban guest3");
  assertMatch((await host.next())!, /guest21, 9 more would be banned too\./);
  await host.type("/ban 192.0.2.1 spam", "/banned", "/unban @Guest29,");
  await host.find(/is banned\./);
  assertMatch(
    await host.find(/banned since/),
    /^\* 192\.0\.2\.1 \(guest1, .*guest20, 10 more\) is banned since .*: spam$/,
  );
  await host.find(/^\* 192\.0\.2\.1 is no longer banned\.$/);
  for (const visitor of crowd) await visitor.rest();
  for (
    const malformed of [
      "10.0.0.0/33",
      "300.1.1.1",
      "10.0.0",
      "[fd01::5]",
      "127.0.0.9:50983",
    ]
  ) {
    await host.type(`/ban ${malformed}`, `/unban ${malformed}`);
    const answer = `! ${malformed} is no address or network. ` +
      "Type one such as 10.0.0.1 or 10.0.0.0/8.";
    assertEquals([await host.next(), await host.next()], [answer, answer]);
  }
  await host.type("/nick zoe");
  assertMatch((await host.next())!, /^! Unknown command \/nick\. \/help /);
});

Deno.test("/ban takes a network", async () => {
  const printed: string[] = [];
  await using server = open({}, printed);
  await using bob = Visitor.admit(server, "10.1.2.3");
  await using carol = Visitor.admit(server, "::ffff:10.9.9.9");
  await using dave = Visitor.admit(server, "11.0.0.1");
  await dave.find(/Here now/);
  await using host = new Console(server);
  await host.type("/ban 10.1.2.3/8 spam");
  assertEquals(
    await host.find(/banned/),
    "* 10.0.0.0/8 is banned. /unban 10.0.0.0/8 undoes this.",
  );
  for (const guest of [bob, carol]) {
    assertEquals((await guest.rest()).at(-2), "! You were banned: spam.");
  }
  await using erin = Visitor.admit(server, "10.255.0.1");
  assertEquals(await erin.rest(), []); // without a word
  assertEquals(printed.at(-1), "Refused 10.255.0.1:1 (banned)");
  dave.say("/quiet", "still here");
  await host.find(/^\[guest3\] still here$/);
  await host.type("/unban 10.1.2.3");
  assertEquals(
    await host.find(/^! 10\.1\.2\.3 /),
    "! 10.1.2.3 is banned by 10.0.0.0/8. " +
      "/unban 10.0.0.0/8 admits all of it.",
  );
  await host.type("/unban 10.0.0.0/8");
  await host.find(/^\* 10\.0\.0\.0\/8 is no longer banned\.$/);
  await using frank = Visitor.admit(server, "10.255.0.1");
  assertMatch((await frank.next())!, /Welcome/);
  await host.type("/ban 2001:db8::/32");
  await host.find(/^\* 2001:db8::\/32 is banned\./);
  await using grace = Visitor.admit(server, "2001:db8:1:2::3");
  assertEquals(await grace.rest(), []);
});

Deno.test("refused connections are printed with the reason, at most one a second", async (t) => {
  await t.step("with the reason", async () => {
    const refusals: [Partial<Options>, command: string, line: string][] = [
      [{ maxClients: 1 }, "", "the room is full"],
      [{ maxPerAddress: 1 }, "", "--max-per-address"],
      [{ allow: ["127.0.0.1"] }, "", "not in --allow"],
      [{}, "/ban 192.0.2.1", "banned"],
    ];
    for (const [options, command, why] of refusals) {
      const printed: string[] = [];
      await using server = open(options, printed);
      if (command) {
        await server.operate(ReadableStream.from([command]), () => {});
      } else if (!options.allow) {
        Visitor.admit(server, "192.0.2.1");
      }
      await using guest = Visitor.admit(server, "192.0.2.1");
      await guest.rest();
      assertEquals(printed.at(-1), `Refused 192.0.2.1:1 (${why})`);
    }
  });
  await t.step("at most one a second", async () => {
    const printed: string[] = [];
    await using server = open({ allow: ["127.0.0.1"] }, printed);
    const { now } = performance;
    try {
      for (const seconds of [0, 0.5, 1.1, 1.2, 2.3]) {
        performance.now = () => now.call(performance) + seconds * 1_000;
        for (let i = 0; i < 10; i++) {
          await Visitor.admit(server, "192.0.2.1").rest();
        }
      }
    } finally {
      performance.now = now;
    }
    assertEquals(printed, [
      "Refused 192.0.2.1:1 (not in --allow)",
      "Refused 192.0.2.1:1 (not in --allow), and 19 before it",
      "Refused 192.0.2.1:1 (not in --allow), and 19 before it",
    ]);
  });
});

Deno.test("--console prints an event once", async (t) => {
  const events = async (quiet: string[]) => {
    await using program = await Program.start(["--console", ...quiet], {
      typing: true,
    });
    const alice = await Guest.join(program.port, "alice");
    await alice.say("hello");
    await alice.settle();
    await program.type("/kick alice bye");
    await alice.rest();
    await using bob = await Guest.join(program.port, "bob");
    await bob.say("/quit tired");
    await bob.rest();
    program.child.kill("SIGTERM");
    const lines = await program.output.rest();
    return lines.map((line) => line.replace(/127\.0\.0\.1:\d+/, "ADDRESS"));
  };
  await t.step("as a report, with the address", async () => {
    assertEquals(
      await events([]),
      [
        "New Connection from ADDRESS (guest1, 1 here)",
        "* guest1 is now known as alice",
        "[alice] hello",
        "Disconnected ADDRESS (alice, kicked: bye, 0 here)",
        "New Connection from ADDRESS (guest2, 1 here)",
        "* guest2 is now known as bob",
        "Disconnected ADDRESS (bob, tired, 0 here)",
        "Shutdown Server ......",
      ],
    );
  });
  await t.step("as a notice with --quiet", async () => {
    assertEquals(await events(["--quiet"]), [
      "* guest1 has entered the room",
      "* guest1 is now known as alice",
      "[alice] hello",
      "* alice has left the room (kicked: bye)",
      "* guest2 has entered the room",
      "* guest2 is now known as bob",
      "* bob has left the room (tired)",
      "Shutdown Server ......",
    ]);
  });
});

Deno.test("--timestamps puts the time of day before printed lines too", async () => {
  await using program = await Program.start(["--timestamps", "--console"], {
    typing: true,
  });
  await using alice = await Guest.join(program.port);
  assertMatch(
    (await program.output.next())!,
    /^\d\d:\d\d New Connection from 127\.0\.0\.1:\d+ \(guest1, 1 here\)$/,
  );
  await alice.say("hello");
  assertMatch((await program.output.next())!, /^\d\d:\d\d \[guest1\] hello$/);
  await alice.conn.closeWrite();
  assertMatch(
    (await program.output.next())!,
    /^\d\d:\d\d Connection closed by 127\.0\.0\.1:\d+ /,
  );
});

Deno.test("a name that was chosen is printed", async () => {
  const printed: string[] = [];
  await using server = open({ askName: true }, printed);
  await using alice = await Guest.connect(server.port);
  await alice.say("alice");
  await alice.find(/room contains/);
  const { port } = alice.conn.localAddr;
  assertEquals(printed, [
    `New Connection from 127.0.0.1:${port} (1 here)`,
    `Name chosen by 127.0.0.1:${port} (alice, 1 here)`,
  ]);
});

Deno.test("the end of the console's input is said", async () => {
  await using program = await Program.start(["--console"]); // of /dev/null
  await program.output.find(
    /^The console has no more input\. The room goes on; Ctrl-C stops it\.$/,
  );
  await using alice = await Guest.join(program.port);
  await alice.say("/who");
  assertEquals(await alice.next(), "* Here now: guest1 (1)");
});

Deno.test({
  name: "with TLS the first line tells how to join with TLS",
  ignore: !OPENSSL,
  async fn() {
    const { cert, key } = await certificate();
    const child = Program.command(
      // deno-fmt-ignore: an option a line
      ["--port", "0", "--tls-cert", cert, "--tls-key", key],
      ["--allow-net", "--allow-read"],
    ).spawn();
    await using output = new Lines(child.stdout);
    assertMatch(
      (await output.next())!,
      /^Listening on 0\.0\.0\.0:(\d+)\. Join with: ncat --ssl localhost \1$/,
    );
    child.kill("SIGTERM");
    await child.status;
    await child.stderr.cancel();
  },
});

Deno.test("the operator stops the server with /quit", async () => {
  await using program = await Program.start(["--console"], { typing: true });
  await program.type("/who");
  await program.output.find(/^\* Nobody is here\.$/);
  await using alice = await Guest.join(program.port);
  await program.type("/quit");
  await program.output.find(/^Shutdown Server \.{6}$/);
  assertEquals(await alice.rest(), ["* Shutdown Server"]);
  assertEquals((await within(program.child.status, "the exit")).code, 0);
});

Deno.test("standard input is not read without --console", async () => {
  await using program = await Program.start([], { typing: true });
  await using alice = await Guest.join(program.port);
  await program.type("hello", "/quit");
  await program.typeEnd();
  await alice.receivesNothing();
});

// -- the log file

Deno.test("public messages are written to the log file, which is the history of the next room", async () => {
  using file = new TemporaryFile("");
  const options = { log: file.path, history: 2, timestamps: true };
  const first = open(options);
  const alice = await Guest.join(first.port, "alice");
  await alice.say("one", "/msg alice private", "/me waves", "/nick bob", "two");
  await alice.find(/known as bob/);
  await first.stop();
  await alice[Symbol.asyncDispose]();
  assertEquals(logged(file), ["[alice] one", "** alice waves", "[bob] two"]);

  await using second = open(options);
  await using carol = await Guest.join(second.port);
  assertEquals(await carol.next(), "* Earlier:");
  assertMatch((await carol.next())!, /^\d\d:\d\d \*\* alice waves$/);
  assertMatch((await carol.next())!, /^\d\d:\d\d \[bob\] two$/);
  await carol.say("three");
  await eventually(() => file.lines.length === 4, "the line in the file");

  await using third = open({ ...options, history: 0 });
  await using dave = await Guest.join(third.port);
  await dave.receivesNothing();
});

Deno.test("a log file is read from its end, and an unfinished last line is ignored", async () => {
  using file = new TemporaryFile("");
  const old = "2026-01-31T12:34:56.789Z [old] ";
  const megabyte = (old + "x".repeat(100) + "\n").repeat(8_000);
  for (let i = 0; i < 30; i++) {
    await Deno.writeTextFile(file.path, megabyte, { append: true });
  }
  await Deno.writeTextFile(
    file.path,
    `not a line\n${old}last\n${old.slice(0, 20)}`,
    { append: true },
  );
  const started = performance.now();
  await using server = open({ log: file.path, history: 2 });
  assert(performance.now() - started < 200); // of 30 MB
  await using alice = await Guest.join(server.port);
  assertEquals(await alice.next(), "* Earlier:");
  assertEquals(await alice.next(), "[old] " + "x".repeat(100));
  assertEquals(await alice.next(), "[old] last");
  await alice.say("new");
  await eventually(
    () => / \[guest1\] new$/.test(file.lines.at(-1)!),
    "the line",
  );
});

Deno.test("a line of the log file that was broken off is not shown", async () => {
  const stamp = new Date().toISOString();
  const kept = `${stamp} [bob] whole\n${stamp} [bob] I do not like y`;
  using file = new TemporaryFile(kept);
  await using server = open({ log: file.path, history: 20 });
  await using alice = await Guest.connect(server.port);
  await alice.find(/^\* Earlier:$/);
  assertEquals(await alice.next(), "[bob] whole");
  await alice.receivesNothing();
  assertEquals(Deno.readTextFileSync(file.path), `${kept}\n`);
});

Deno.test("a line of the log file that is too long for the history is left out", async () => {
  const old = "2026-01-31T12:34:56.789Z [old] ";
  using file = new TemporaryFile(
    `${old}one\n${old}${"x".repeat(1_100_000)}\n${old}two\n`,
  );
  await using server = open({ log: file.path, history: 200 });
  await using alice = await Guest.join(server.port);
  assertEquals(await alice.next(), "* Earlier:");
  assertEquals(await alice.next(), "[old] one");
  assertEquals(await alice.next(), "[old] two");
});

Deno.test("no part of a line of the log file is taken for a line", async () => {
  const forged = "2026-01-31T12:34:56.789Z [host] The room has moved. ";
  using file = new TemporaryFile("");
  for (let cut = 0; cut < forged.length; cut++) {
    Deno.writeTextFileSync(
      file.path,
      "2026-01-31T12:34:56.789Z [eve] " + forged.repeat(1_000) + "\n" +
        "x".repeat(cut) + "\n",
    );
    await using server = open({ log: file.path, history: 1 });
    await using alice = await Guest.join(server.port);
    await alice.receivesNothing();
  }
});

Deno.test({
  name: "only its owner can read a log file that the server has made",
  ignore: !LINUX,
  async fn() {
    const directory = await Deno.makeTempDir();
    const path = `${directory}/chat.log`;
    await using server = open({ log: path });
    await using _alice = await Guest.join(server.port);
    assertEquals(Deno.statSync(path).mode! & 0o777, 0o600);
    await Deno.remove(directory, { recursive: true });
  },
});

/** What the program may do that has a log file. */
const LOG_PERMISSIONS = ["--allow-net", "--allow-read", "--allow-write"];

Deno.test({
  name:
    "without a terminal SIGHUP opens the log file anew, and no line is lost",
  ignore: !LINUX,
  async fn() {
    const directory = await Deno.makeTempDir();
    const path = `${directory}/chat.log`;
    const lines = (path: string) =>
      Deno.readTextFileSync(path).split("\n").slice(0, -1)
        .map((line) => line.slice(25));
    await using program = await Program.start(
      ["--rate", "0", "--log", path],
      { permissions: LOG_PERMISSIONS },
    );
    await using alice = await Guest.join(program.port, "alice");
    await using bob = await Guest.join(program.port);
    const files: string[] = [];
    let sent = 0;
    for (let rotation = 0; rotation < 3; rotation++) {
      const batch = numbered(2_000).map((number) =>
        `line ${sent + Number(number)}`
      );
      sent += batch.length;
      await alice.say(...batch.slice(0, 1_000));
      await bob.find(new RegExp(` ${sent - 1_500}$`)); // in the middle of a flood
      files.push(`${path}.${rotation}`);
      await Deno.rename(path, files.at(-1)!);
      program.child.kill("SIGHUP");
      await alice.say(...batch.slice(1_000));
      await bob.find(new RegExp(` ${sent - 1}$`));
      await eventually(async () => {
        try {
          return (await Deno.stat(path)).isFile;
        } catch {
          return false;
        }
      }, "the new file");
      assertEquals(Deno.statSync(path).mode! & 0o777, 0o600);
    }
    program.child.kill("SIGTERM");
    assertEquals((await within(program.child.status, "the exit")).code, 0);
    assertEquals(
      [...files, path].flatMap(lines),
      numbered(sent, "[alice] line "),
    );
    assert(lines(path).length > 0 || lines(files[2]).length > 0);
    assertEquals(await program.errors.rest(), []);
    await Deno.remove(directory, { recursive: true });
  },
});

Deno.test({
  name:
    "a log file that cannot be opened anew is reported, and the old one stays in use",
  ignore: !LINUX,
  async fn() {
    const directory = await Deno.makeTempDir();
    const folder = `${directory}/logs`, moved = `${directory}/moved`;
    await Deno.mkdir(folder);
    await using program = await Program.start(
      ["--log", `${folder}/chat.log`],
      { permissions: LOG_PERMISSIONS },
    );
    await using alice = await Guest.join(program.port, "alice");
    await Deno.rename(folder, moved);
    program.child.kill("SIGHUP");
    assertEquals(
      await program.errors.next(),
      `parley: Cannot open ${folder}/chat.log: ` +
        `the folder ${folder}/ does not exist (create it first); ` +
        "the file that was open stays in use",
    );
    await alice.say("hello");
    await eventually(
      () =>
        /\[alice\] hello\n$/.test(Deno.readTextFileSync(`${moved}/chat.log`)),
      "the line in the old file",
    );
    await Deno.remove(directory, { recursive: true });
  },
});

Deno.test({
  name: "SIGHUP under nohup leaves a room without a log file running",
  ignore: !LINUX,
  async fn() {
    await using program = await Program.start();
    await using alice = await Guest.join(program.port);
    program.child.kill("SIGHUP");
    await alice.settle();
    program.child.kill("SIGHUP");
    await using bob = await Guest.join(program.port);
    await bob.say("hello");
    await alice.find(/^\[guest2\] hello$/);
  },
});

Deno.test({
  name:
    "a terminal that is closed stops the server, and the log file has every line",
  ignore: !LINUX || !installed("script"),
  async fn(t) {
    for (const how of ["SIGHUP", "closed"]) {
      await t.step(how, async () => {
        using file = new TemporaryFile("");
        // deno-fmt-ignore: an option a line
        const words = [
          Deno.execPath(), "run", ...LOG_PERMISSIONS, MAIN,
          "--host", "127.0.0.1", "--port", "0", "--rate", "0",
          "--log", file.path,
        ];
        const terminal = new Deno.Command("script", {
          args: ["-qefc", `echo PID $$; exec ${words.join(" ")}`, "/dev/null"],
          stdin: "piped",
          stdout: "piped",
          env: { NO_COLOR: "1" },
        }).spawn();
        await using output = new Lines(terminal.stdout);
        const pid = Number((await output.find(/^PID \d+/)).slice(4));
        const listening = await output.find(/^Listening on /);
        const port = Number(/:(\d+)\. Join/.exec(listening)![1]);
        await using alice = await Guest.join(port, "alice");
        await using bob = await Guest.join(port);
        await alice.say(...numbered(3_000, "line "));
        await bob.find(/line 1000$/); // and the others are on their way
        if (how === "SIGHUP") {
          Deno.kill(pid, "SIGHUP");
          await output.find(/^Shutdown Server \.{6}\s*$/);
        } else terminal.kill("SIGKILL");
        const received = await bob.rest();
        assertEquals(received.pop(), "* Shutdown Server");
        await alice.rest();
        await within(terminal.status, "the exit");
        await eventually(() => {
          try {
            Deno.kill(pid, "SIGCONT");
            return false;
          } catch {
            return true;
          }
        }, "the end of the process");
        const log = logged(file);
        assertEquals(log.slice(1_001), received);
        await terminal.stdin.close().catch(() => {});
      });
    }
  },
});

Deno.test({
  name: "a disk that is too slow is reported once, and the room goes on",
  ignore: !LINUX,
  async fn() {
    const path = `${await Deno.makeTempDir()}/fifo`; // which nothing reads
    await new Deno.Command("mkfifo", { args: [path] }).output();
    await using program = await Program.start(
      ["--log", path, "--rate", "0"],
      { permissions: ["--allow-all"] },
    );
    await using alice = await Guest.join(program.port);
    await flood(alice, 2.4 * WINDOW_LINES);
    await alice.settle();
    program.child.kill("SIGTERM");
    assertEquals((await within(program.child.status, "the exit")).code, 0);
    const [warning, ...more] = await program.errors.rest();
    assertMatch(
      warning,
      /^parley: Some lines are lost: .*; the room goes on\)$/,
    );
    assertEquals(more, []);
  },
});

Deno.test({
  name: "a full disk is reported once, and the room goes on",
  ignore: !LINUX,
  async fn() {
    await using program = await Program.start(["--log", "/dev/full"], {
      permissions: ["--allow-all"], // as Deno wants it for a device
    });
    await using alice = await Guest.join(program.port, "alice");
    await using bob = await Guest.join(program.port, "bob");
    await alice.say("one");
    assertMatch(
      await program.errors.find(/./),
      /^parley: Cannot write: No space left on device.*\(--log \/dev\/full; the room goes on\)$/,
    );
    await alice.say("two");
    await bob.find(/two/);
    program.child.kill("SIGTERM");
    assertEquals(
      (await within(program.child.status, "the exit", 3_000)).code,
      0,
    );
    assertEquals(await program.errors.rest(), []);
  },
});

Deno.test("a file that cannot be used gives one line and exit status 1", async (t) => {
  using empty = new TemporaryFile("\n"), file = new TemporaryFile("x");
  using unicode = new TemporaryFile("x\0y\0\n\0"); // as in UTF-16
  const cases: [args: string[], permissions: string[], message: string][] = [
    [
      ["--password-file", file.path],
      [],
      `Cannot read ${file.path}: it is not permitted (run it with --allow-read=${file.path})`,
    ],
    [
      ["--password-file", empty.path],
      [`--allow-read=${empty.path}`],
      `Cannot use ${empty.path}: its first line has to be the password, at most 4096 bytes of UTF-8`,
    ],
    [
      ["--password-file", unicode.path],
      [`--allow-read=${unicode.path}`],
      `Cannot use ${unicode.path}: its first line has to be the password, at most 4096 bytes of UTF-8`,
    ],
    [
      ["--password-file", "/no/such"],
      ["--allow-read"],
      "Cannot read /no/such: there is no such file",
    ],
    [
      ["--tls-cert", file.path, "--tls-key", file.path],
      [],
      `Cannot read ${file.path}: it is not permitted (run it with --allow-read=${file.path})`,
    ],
    [
      ["--log", file.path],
      [],
      `Cannot open ${file.path}: it is not permitted (run it with --allow-read=${file.path} --allow-write=${file.path})`,
    ],
    [
      ["--motd", "/no/such"],
      ["--allow-read"],
      "Cannot read /no/such: there is no such file",
    ],
    [
      ["--log", "/"],
      ["--allow-read", "--allow-write"],
      "Cannot open /: it is a directory (give a file)",
    ],
    [
      ["--log", "/proc/nope"],
      ["--allow-all"],
      "Cannot open /proc/nope: no file can be made there (choose another path)",
    ],
    [
      ["--log", "/no/such/file"],
      ["--allow-read", "--allow-write"],
      "Cannot open /no/such/file: the folder /no/such/ does not exist (create it first)",
    ],
  ];
  for (const [args, permissions, message] of cases) {
    await t.step(message.replaceAll(/\/tmp\/\w+/g, "FILE"), async () => {
      assertEquals(
        await run(
          ["--host", "127.0.0.1", "-p", "0", ...args],
          permissions.includes("--allow-all")
            ? permissions
            : ["--allow-net", ...permissions],
        ),
        { code: 1, output: "", errors: `parley: ${message}\n` },
      );
    });
  }
  await t.step({
    name: "a certificate that is invalid or has another key",
    ignore: !OPENSSL,
    async fn() {
      const address = ["--host", "127.0.0.1", "-p", "0"];
      const { key } = await certificate();
      const other = await makeCertificate();
      for (const cert of [file.path, other.cert]) {
        const { code, errors } = await run(
          [...address, "--tls-cert", cert, "--tls-key", key],
          ["--allow-net", "--allow-read"],
        );
        assertEquals(code, 1);
        assertMatch(errors, /^parley: Cannot use \S+ with \S+: .*PEM.*\n$/);
      }
    },
  });
});

// -- the command line

Deno.test("a command line that cannot be used gives one line and exit status 2", async (t) => {
  const cases: [args: string, message: string][] = [
    ["--prot 1", "Unknown option --prot (did you mean --port?)"],
    ["-x", "Unknown option -x (did you mean -p?)"],
    ["--port", "Option --port needs a value: --port PORT"],
    [
      "--port banana",
      "Cannot use banana for --port: give a whole number from 0 to 65535",
    ],
    [
      "--port 70000",
      "Cannot use 70000 for --port: give a whole number from 0 to 65535",
    ],
    [
      "--port -1",
      "Cannot use -1 for --port: give a whole number from 0 to 65535",
    ],
    [
      "--rate -3",
      "Cannot use -3 for --rate: give a whole number from 0 to 1000000",
    ],
    [
      "--history 1.5",
      "Cannot use 1.5 for --history: give a whole number from 0 to 10000",
    ],
    [
      "--max-clients 0",
      "Cannot use 0 for --max-clients: give a whole number from 1 to 1000000",
    ],
    [
      "--host not!one",
      "Cannot use not!one for --host: give an address, such as 127.0.0.1 or ::",
    ],
    ["--host ", "Option --host needs a value: --host ADDRESS"], // $HOST, unset
    ["--raw=no", "Option --raw takes no value"],
    ["-h=1", "Option --help takes no value"],
    ["--raw true", "Option --raw takes no value"],
    [
      "--host two\nlines",
      "Cannot use two lines for --host: give an address, such as 127.0.0.1 or ::",
    ],
    [
      "--raw --ask-name",
      "Cannot use --raw with --ask-name: a raw room relays lines as they are",
    ],
    [
      "--ask-name --motd x",
      "Cannot use --motd with --ask-name: its clients are shown no text after a welcome",
    ],
    [
      "--host 127.0.0.1:80",
      "Cannot use 127.0.0.1:80 for --host: give an address alone, and the port with --port",
    ],
    [
      "--allow 10.0.0.0/33",
      "Cannot use 10.0.0.0/33 for --allow: give a network, such as 192.168.0.0/16",
    ],
    [
      "--allow ten",
      "Cannot use ten for --allow: give a network, such as 192.168.0.0/16",
    ],
    [
      "--tls-cert c.pem",
      "Cannot use --tls-cert alone: give --tls-key FILE too",
    ],
    ["--link-as tokyo", "Cannot use --link-as alone: give --link too"],
    ["--link-creds f", "Cannot use --link-creds alone: give --link too"],
    [
      "--trust-proxy 10.0.0.0/8",
      "Cannot use --trust-proxy alone: give --web too",
    ],
    ["--tls-key k.pem", "Cannot use --tls-key alone: give --tls-cert FILE too"],
    [
      "8008",
      "Unexpected argument 8008 (options are written --port 8008 or -p 8008)",
    ],
    ["0", "Unexpected argument 0 (options are written --port 8008 or -p 8008)"],
  ];
  for (const [args, message] of cases) {
    await t.step(args, async () => {
      assertEquals(await run(args.split(" ")), {
        code: 2,
        output: "",
        errors: `parley: ${message}\n`,
      });
    });
  }
});

Deno.test("a room that cannot be opened gives one line and exit status 1", async (t) => {
  const fails = async (
    args: string[],
    pattern: RegExp,
    permissions?: string[],
  ) => {
    const { code, output, errors } = await run(args, permissions);
    assertEquals([code, output], [1, ""]);
    assertMatch(errors, pattern);
    assertEquals(errors.trim().split("\n").length, 1);
  };
  await t.step("the port is in use", async () => {
    await using server = open();
    await fails(
      ["--host", "127.0.0.1", "-p", `${server.port}`],
      /^parley: Cannot listen on 127\.0\.0\.1:\d+: the port is in use \(choose another with --port\)\n$/,
    );
  });
  const cases: [
    what: string,
    args: string[],
    RegExp,
    permissions?: string[],
  ][] = [
    [
      "the address is not this machine's",
      ["--host", "203.0.113.1"],
      /^parley: Cannot listen on 203\.0\.113\.1:8008: .*--host/,
    ],
    [
      "the address is invalid",
      ["--host", "999.1.1.1"],
      /^parley: Cannot listen on 999\.1\.1\.1:8008: .*--host/,
    ],
    [
      "the network is not permitted",
      [],
      /^parley: Cannot listen on 0\.0\.0\.0:8008: .*--allow-net\)\n$/,
      [],
    ],
  ];
  for (const [what, ...given] of cases) {
    await t.step(what, () => fails(...given));
  }
});

Deno.test("--help fits 80 columns and names every option and default", async () => {
  const { code, output } = await run(["--help"], []);
  assertEquals(code, 0);
  for (const line of output.split("\n")) assert(line.length <= 80, line);
  const flags: [string, string][] = [
    ["--host ADDRESS", "(0.0.0.0)"],
    ["-p, --port PORT", "(8008)"],
    ["--reuse-port", ""],
    ["--raw", ""],
    ["--ask-name", ""],
    ["--timestamps", ""],
    ["--history LINES", "(20)"],
    ["--motd FILE", "(none)"],
    ["--rate LINES", "(20)"],
    ["--max-clients N", "(10000)"],
    ["--max-per-address N", "(0)"],
    ["--allow CIDR", "(all)"],
    ["--password-file FILE", "(none)"],
    ["--tls-cert FILE", "(none)"],
    ["--tls-key FILE", "(none)"],
    ["--log FILE", "(none)"],
    ["--console", ""],
    ["--quiet", ""],
    ["-h, --help", ""],
    ["-V, --version", ""],
  ];
  for (const [flag, value] of flags) {
    const line = output.split("\n").find((line) => line.includes(`${flag} `));
    assert(line?.includes(value), `${flag} ${value} in ${line}`);
  }
});

/** Whether `deno compile` can download the runtime that it puts into a binary. */
async function canCompile(): Promise<boolean> {
  using program = new TemporaryFile("");
  using binary = new TemporaryFile("");
  const { success } = await new Deno.Command(Deno.execPath(), {
    args: ["compile", "--quiet", "--ext=ts", "-o", binary.path, program.path],
    stdout: "null",
    stderr: "null",
    signal: AbortSignal.timeout(60_000),
  }).output();
  return success;
}

Deno.test("the compiled binary serves, helps and refuses like the script", async (t) => {
  await t.step({
    name: "compiled with a runtime that could be downloaded",
    ignore: !await canCompile(),
    fn: testBinary,
  });
});

async function testBinary(): Promise<void> {
  const directory = await Deno.makeTempDir();
  // Like the task, into a directory of its own.
  const command = config.tasks.compile.command
    .replace("--output parley", `--quiet --output ${directory}/parley`)
    .replace("main.ts", MAIN);
  const args = command.split(" ").slice(1);
  const compiled = new Deno.Command(Deno.execPath(), { args });
  assertEquals((await finished(compiled)).code, 0);
  const parley = (...args: string[]) =>
    finished(new Deno.Command(`${directory}/parley`, { args }));
  assertEquals(
    (await parley("--version")).output,
    `parley ${config.version}\n`,
  );
  assertMatch((await parley("--help")).output, /^Usage: +parley \[OPTIONS\]$/m);
  assertEquals((await parley("--prot")).code, 2);

  using log = new TemporaryFile("");
  using password = new TemporaryFile("sesame\n");
  const options = ["--log", log.path, "--password-file", password.path];
  const address = ["--host", "127.0.0.1", "--port", "0", "--console"];
  const child = new Deno.Command(`${directory}/parley`, {
    args: [...address, ...options, "--allow", "127.0.0.0/8"],
    stdin: "piped",
    stdout: "piped",
  }).spawn();
  await using output = new Lines(child.stdout);
  const line = await output.find(/^Listening on /);
  const port = Number(/:(\d+)\. Join/.exec(line)![1]);
  await using alice = await Guest.connect(port);
  await alice.say("sesame", "hello");
  await output.find(/^\[guest1\] hello$/);
  child.kill("SIGTERM");
  assertEquals((await child.status).code, 0);
  assertEquals(logged(log), ["[guest1] hello"]);
  await child.stdin.close();
  await Deno.remove(directory, { recursive: true });
}

Deno.test("--version prints the version in deno.json", async () => {
  const { code, output } = await run(["-V"], []);
  assertEquals([code, output], [0, `parley ${config.version}\n`]);
});

Deno.test("the server asks the npm registry for deno-std and nothing else", async () => {
  const asked = new Set<string>();
  await using registry = Deno.serve({
    hostname: "127.0.0.1",
    port: 0,
    onListen() {},
  }, ({ url }) => {
    asked.add(new URL(url).pathname.split("/")[1]);
    return new Response("", { status: 404 });
  });
  const home = await Deno.makeTempDir(); // without a cache and without an .npmrc
  const command = new Deno.Command(Deno.execPath(), {
    args: ["run", "--no-prompt", MAIN, "--version"],
    env: {
      HOME: home,
      DENO_DIR: home,
      NPM_CONFIG_REGISTRY: `http://127.0.0.1:${registry.addr.port}`,
    },
  });
  await within(finished(command), "the exit");
  await Deno.remove(home, { recursive: true });
  assertEquals([...asked], ["deno-std"]);
});

Deno.test("--quiet prints no joins and leaves", async () => {
  await using program = await Program.start(["--quiet"]);
  await using alice = await Guest.join(program.port);
  await alice.settle();
  program.child.kill("SIGINT");
  assertEquals(await program.output.rest(), ["Shutdown Server ......"]);
});

// -- embedding

Deno.test("several rooms in one process are independent", async () => {
  await using one = open();
  const two = open({ raw: true });
  await using alice = await Guest.join(one.port);
  await using bob = await Guest.connect(two.port);
  await bob.say("into the other room");
  await two.stop();
  await two.finished;
  assertEquals(await bob.rest(), ["Shutdown Server"]);
  await using carol = await Guest.join(one.port);
  await carol.say("hello");
  assertEquals(await alice.next(), "* guest2 has entered the room");
  assertEquals(await alice.next(), "[guest2] hello");
});

Deno.test("ChatServer.listen refuses options that cannot be used", () => {
  for (
    const [options, message] of [
      [{ port: 70_000 }, "Cannot use 70000 for --port"],
      [{ rate: NaN }, "Cannot use NaN for --rate"],
      [{ maxClients: 1.5 }, "Cannot use 1.5 for --max-clients"],
      [{ allow: ["nowhere"] }, "Cannot use nowhere for --allow"],
      [{ raw: true, askName: true }, "Cannot use --raw with --ask-name"],
      [{ host: null }, "Cannot use null for host: give a string"],
      [{ allow: "10.0.0.0/8" }, "Cannot use 10.0.0.0/8 for allow: give a list"],
      [{ raw: "false" }, "Cannot use false for raw: give a boolean"],
      [{ pasword: "x" }, "Unknown option pasword"],
    ] as [Partial<Options>, string][] // as JavaScript can pass them
  ) assertThrows(() => ChatServer.listen(options), UsageError, message);
});

Deno.test("an option that is undefined has its default", async () => {
  await using server = open({ rate: undefined, maxClients: undefined });
  await using alice = await Guest.join(server.port);
  await using bob = await Guest.join(server.port);
  await alice.say("hello");
  assertEquals(await bob.next(), "[guest1] hello");
});

Deno.test("an error thrown by a callback is reported to its program, and the room goes on", async () => {
  const errors: unknown[] = [];
  const caught = (event: ErrorEvent) => {
    event.preventDefault();
    errors.push(event.error);
  };
  addEventListener("error", caught);
  try {
    const mine = new Error("mine"), yours = new Error("yours");
    await using server = ChatServer.listen({ host: "127.0.0.1", port: 0 }, {
      print() {
        throw mine;
      },
    });
    await server.operate(ReadableStream.from([]), () => {
      throw yours;
    });
    await using alice = await Guest.join(server.addr.port);
    await alice.say("hello");
    await alice.settle();
    assertEquals(errors, [mine, yours]);
  } finally {
    removeEventListener("error", caught);
  }
});

Deno.test("a connection whose methods throw disconnects its own client only", async () => {
  await using server = open();
  const fail = (): never => {
    throw new Error("it has failed");
  };
  admit(server, { write: fail, close: fail });
  const read = () => Promise.reject(new Error("it has failed"));
  admit(server, { read, write: never, close: fail });
  const methods = { write: never, close: fail, closeWrite: fail };
  admit(server, { ...methods, read: fail });
  admit(server, { ...methods, read: () => Promise.resolve(null) });
  await using alice = await Guest.join(server.port, "alice");
  await alice.settle();
});

Deno.test("a connection whose read or write resolves to nothing costs itself only", async (t) => {
  // As JavaScript can resolve them.
  const nothing = [0, -1, NaN, undefined] as number[];
  for (const count of nothing) {
    await t.step(`read: ${count}`, async () => {
      await using server = open();
      await using alice = await Guest.join(server.port, "alice");
      const broken = admit(server, { read: () => Promise.resolve(count) });
      await within(broken.closed, "the close");
      await alice.find(/has left the room$/);
      await alice.settle();
    });
    await t.step(`write: ${count}`, async () => {
      await using server = open();
      await using alice = await Guest.join(server.port, "alice");
      const broken = admit(server, { write: () => Promise.resolve(count) });
      await within(broken.closed, "the close");
      await alice.find(/has left the room$/);
      await alice.settle();
    });
  }
  await t.step("before it has given a password", async () => {
    using file = new TemporaryFile("sesame");
    await using server = open({ passwordFile: file.path });
    for (const count of nothing) {
      const broken = admit(server, { read: () => Promise.resolve(count) });
      await within(broken.closed, "the close");
    }
  });
});

Deno.test("operate ends with the server", async () => {
  const server = open();
  let returned = false;
  const silent = { [Symbol.asyncIterator]: () => ({ next: never }) };
  const operating = server.operate(silent, () => {}).then(() =>
    returned = true
  );
  await using alice = await Guest.join(server.port);
  await alice.say("/who");
  assertEquals(await alice.next(), "* Here now: host, guest1 (2)");
  assertEquals(returned, false);
  await server.stop();
  await within(operating, "the end of operate");
});

Deno.test("console input that begins after the end does not delay it", async () => {
  const printed: string[] = [];
  const server = open({}, printed);
  admit(server, { write: never });
  await eventually(() => printed.length === 1, "the client");
  const stopped = server.stop();
  await new Promise((resolve) => setTimeout(resolve));
  await server.operate(ReadableStream.from(["hello"]), () => {});
  await within(stopped, "the end");
});

Deno.test("a room that was empty once stops as usual", async () => {
  const server = open();
  const alice = await Guest.join(server.port);
  await alice.say("/quit");
  await alice.rest();
  await using bob = await Guest.join(server.port);
  await within(server.stop(), "the end");
  assertEquals(await bob.rest(), ["* Shutdown Server"]);
});

Deno.test("a port can be used again as soon as its room is stopped", async () => {
  const first = open();
  await using alice = await Guest.join(first.port);
  await first.stop();
  await using second = open({ port: first.port });
  await using _bob = await Guest.join(second.port);
  await alice.rest();
});

// -- faults

/** Waits until so many people are in the room. */
async function counts(guest: Guest, people: number): Promise<void> {
  await eventually(async () => {
    await guest.say("/who");
    return (await guest.find(/^\* Here now: /)).endsWith(` (${people})`);
  }, `there are ${people} people`);
}

/** Tests that a room in which alice is recovers from a fault: the same people and
 * descriptors, little more memory, nothing on standard error. */
function recovers(
  from: string,
  fault: (program: Program, alice: Guest) => Promise<void>,
): void {
  Deno.test({
    name: `the room recovers from ${from}`,
    ignore: !LINUX,
    async fn() {
      await using program = await Program.start(["--rate", "0"]);
      await using alice = await Guest.join(program.port, "alice");
      const descriptors = await program.descriptors();
      const memory = await program.memory();
      await fault(program, alice);
      await eventually(
        async () => await program.descriptors() <= descriptors,
        "the descriptors are back",
      );
      await counts(alice, 1);
      const more = await program.memory() - memory;
      assert(more < 40, `${more} MiB more`);
      program.child.kill("SIGTERM");
      assertEquals((await within(program.child.status, "the exit")).code, 0);
      assertEquals(await program.errors.rest(), []);
    },
  });
}

recovers(
  "twenty clients that leave in the middle of a line",
  async (program, alice) => {
    const guests: Guest[] = [];
    for (let i = 0; i < 20; i++) {
      guests.push(await Guest.join(program.port));
      await guests[i].send("half a li");
    }
    await using bob = await Guest.join(program.port, "bob");
    await bob.say("a whole one");
    await alice.find(/^\[bob\] a whole one$/);
    for (const guest of guests) {
      await guest.conn.closeWrite();
      await alice.find(/^\[guest\d+\] half a li$/); // it was the end of the input
      await guest.rest();
    }
  },
);

recovers(
  "twenty connections that are reset in the middle of writes",
  async (program, alice) => {
    const conns: Deno.TcpConn[] = [];
    for (let i = 0; i < 20; i++) {
      conns.push(await Deno.connect({ port: program.port }));
    }
    await counts(alice, 21);
    await flood(alice, 3_000); // more than their buffers take
    await alice.settle();
    for (const conn of conns) conn.close(); // with unread input: a reset
    await counts(alice, 1);
  },
);

recovers("a client that sends random bytes", async (program, alice) => {
  await using mallory = await Guest.join(program.port, "mallory");
  const noise = new Uint8Array(65_536);
  for (let i = 0; i < 16; i++) {
    await mallory.send(crypto.getRandomValues(noise));
  }
  await mallory.conn.closeWrite();
  for (let line; !(line = (await alice.next())!).includes("has left");) {
    assert(!FORBIDDEN.test(line), JSON.stringify(line));
    assertMatch(
      line,
      /^\[mallory\] |^\* guest2 is now |^\* \S+ has (enter|left)/,
    );
  }
});

Deno.test("a SIGTERM in the middle of a flood loses no line that was sent to the room", async () => {
  using file = new TemporaryFile("");
  await using program = await Program.start(
    ["--rate", "0", "--log", file.path],
    { permissions: ["--allow-net", "--allow-read", "--allow-write"] },
  );
  await using alice = await Guest.join(program.port, "alice");
  using bob = await Deno.connect({ port: program.port });
  await alice.find(/has entered the room$/);

  // Bob's bytes are kept as they are and split into lines at the end: a busy
  // machine must not make him slower than the second that a shutdown gives him.
  const received: Uint8Array<ArrayBuffer>[] = [];
  let lines = 0, ended = false, progress = Promise.withResolvers<void>();
  const receiving = (async () => {
    const buffer = new Uint8Array(1_048_576);
    for (let count; (count = await bob.read(buffer)) !== null;) {
      const bytes = buffer.slice(0, count);
      received.push(bytes);
      for (const byte of bytes) if (byte === 10) lines++;
      progress.resolve();
      progress = Promise.withResolvers();
    }
    ended = true;
    progress.resolve();
  })();
  // For the same reason alice is never more than 100,000 lines, 2 MB, ahead of him.
  const batch = 1_000, ahead = 100 * batch;
  const flooding = (async () => {
    for (let sent = 0;; sent += batch) {
      while (sent - lines > ahead && !ended) await progress.promise;
      const numbers = Array.from({ length: batch }, (_, i) => sent + i);
      await alice.say(...numbers.map((number) => `line ${number}`));
    }
  })().catch(() => {}); // it fails when the server ends
  await eventually(() => lines > 20_000, "the first lines");
  program.child.kill("SIGTERM");
  assertEquals((await within(program.child.status, "the exit")).code, 0);
  await within(receiving, "the end of bob's connection");
  await within(flooding, "the end of alice's connection");

  const text = await new Blob(received).text();
  const [said, end] = text.split("* Shutdown Server\n");
  assertEquals(end, "", "after the last line");
  const messages = said.split("\n").slice(0, -1)
    .filter((line) => !line.startsWith("* ")); // the greeting
  assert(messages.length > 20_000);
  const expected = numbered(messages.length, "[alice] line ");
  assertEquals(messages, expected);
  assertEquals(logged(file), expected);
  assertEquals(await program.errors.rest(), []);
});

Deno.test("a system clock that jumps does not change the rate limit", async () => {
  const rate = 100, burst = 5 * rate;
  await using server = open({ rate, timestamps: true });
  await using alice = await Guest.join(server.port, "alice");
  await using bob = await Guest.join(server.port, "bob");
  const { now } = Date;
  try {
    // The first 500 lines are not paced, the others are: 30 lines in 300 ms.
    for (const [hours, lines] of [[-24, burst + 60], [48, 80]]) {
      Date.now = () => now() + hours * 3_600_000;
      const started = performance.now();
      await alice.say(...numbered(lines, "line "));
      await bob.find(new RegExp(` \\[alice\\] line ${lines - 1}$`));
      assert(performance.now() - started > 250, "they were paced");
    }
  } finally {
    Date.now = now;
  }
});
